//! Looks now and then for the workloads that may not connect, and tells the kernel.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use enforcer_common::abi::Barred;
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
    /// Who may not connect, and under which generation of the policy.
    Found(BTreeSet<Barred>, u64),
}

/// The search, which runs beside the daemon's other work.
pub(super) struct Bars {
    cgroup: PathBuf,
    due: Interval,
    running: Option<(JoinHandle<BTreeSet<Barred>>, u64)>,
}

impl Bars {
    /// Looks once, before anybody is told that the servers are guarded.
    pub(super) fn start(cgroup: &Path, engine: &Engine, kernel: &mut Kernel) -> Self {
        let mut due = interval(INTERVAL);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        due.reset();
        if some_closed(engine.endpoints()) {
            kernel.bar(&find(cgroup, engine.endpoints()), engine.generation());
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
            Some((task, generation)) => {
                let (found, generation) = (task.await, *generation);
                self.running = None;
                match found {
                    Ok(found) => Event::Found(found, generation),
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
                let task = tokio::task::spawn_blocking(move || find(&cgroup, &endpoints));
                self.running = Some((task, engine.generation()));
            }
            Event::Due => kernel.bar(&BTreeSet::new(), engine.generation()),
            Event::Found(found, generation) => kernel.bar(&found, generation),
        }
    }
}

fn find(cgroup: &Path, endpoints: &Endpoints) -> BTreeSet<Barred> {
    let Ok(root) = paths::cgroup2_root() else { return BTreeSet::new() };
    let workload = |(id, path): (u64, PathBuf)| {
        let below = path.strip_prefix(&root).ok()?.display().to_string();
        Some(Workload::of(id, Some(format!("/{below}"))))
    };
    let workloads: Vec<_> = cgroups(cgroup).take(MAX_CGROUPS).filter_map(workload).collect();
    barred(endpoints, &workloads)
}
