//! Looks now and then for the workloads that may not connect, and tells the kernel.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use enforcer_common::abi::{Bar, Barred};
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::warn;

use super::kernel::Kernel;
use crate::core::{Endpoints, Engine, barred, some_closed};
use crate::lifecycle::paths;
use crate::workload::{Workload, cgroups};

/// How often.
const INTERVAL: Duration = Duration::from_secs(2);
/// Cgroups that are looked at, at most; the processes in others are judged by their requests.
const MAX_CGROUPS: usize = 8_192;

/// What is to be done.
pub(super) enum Event {
    /// It is time to look.
    Due,
    /// Who may not connect.
    Found(BTreeMap<Barred, Bar>),
}

/// The search, which runs beside the daemon's other work.
pub(super) struct Bars {
    cgroup: PathBuf,
    due: Interval,
    running: Option<JoinHandle<BTreeMap<Barred, Bar>>>,
}

impl Bars {
    /// Looks once, before anybody is told that the servers are guarded.
    pub(super) fn start(cgroup: &Path, engine: &Engine, kernel: &mut Kernel) -> Self {
        let mut due = interval(INTERVAL);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        due.reset();
        if some_closed(engine.endpoints()) {
            kernel.bar(find(cgroup, engine.endpoints(), engine.generation()));
        }
        Self { cgroup: cgroup.to_owned(), due, running: None }
    }

    /// Waits. Can be dropped at any time.
    pub(super) async fn next(&mut self) -> Event {
        match &mut self.running {
            None => {
                self.due.tick().await;
                Event::Due
            }
            Some(task) => {
                let found = task.await;
                self.running = None;
                match found {
                    Ok(found) => Event::Found(found),
                    Err(error) => {
                        warn!(%error, "who may not connect is not known; they are judged by their requests");
                        Event::Due
                    }
                }
            }
        }
    }

    /// Another policy is in force.
    pub(super) fn hurry(&mut self) {
        self.due.reset_immediately();
    }

    pub(super) fn handle(&mut self, event: Event, engine: &Engine, kernel: &mut Kernel) {
        match event {
            Event::Due if some_closed(engine.endpoints()) => {
                let (cgroup, endpoints) = (self.cgroup.clone(), engine.endpoints().clone());
                let generation = engine.generation();
                self.running =
                    Some(tokio::task::spawn_blocking(move || find(&cgroup, &endpoints, generation)));
            }
            Event::Due => kernel.bar(BTreeMap::new()),
            Event::Found(found) => kernel.bar(found),
        }
    }
}

fn find(cgroup: &Path, endpoints: &Endpoints, generation: u64) -> BTreeMap<Barred, Bar> {
    let Ok(root) = paths::cgroup2_root() else { return BTreeMap::new() };
    let workload = |(id, path): (u64, PathBuf)| {
        let below = path.strip_prefix(&root).ok()?.display().to_string();
        Some(Workload::of(id, Some(format!("/{below}"))))
    };
    let workloads: Vec<_> = cgroups(cgroup).take(MAX_CGROUPS).filter_map(workload).collect();
    barred(endpoints, generation, &workloads)
}
