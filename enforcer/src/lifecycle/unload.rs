//! Taking an enforcement out of the kernel without cutting a connection in the middle of a request, where there is time
//! for that.
//!
//! The order matters. A socket that is taken out of its map while bytes wait in it loses them, and a detached sock_ops
//! program can't delete the records of flows that close. So: no new flows, then the flows end or are destroyed, then the
//! link goes, then the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, MapError, SockHash};
use enforcer_common::abi::{Config, Flow, MAX_FLOWS, MAX_SOCKETS, map};
use serde::Serialize;

use crate::datapath::{LINK_PIN, LiveError, Maps, PinDir, SocketDestroyer};

/// Pause between two looks at the flows.
const POLL: Duration = Duration::from_millis(50);
/// How long destroyed sockets may take until their records are gone.
const SETTLE: Duration = Duration::from_secs(1);
/// How often the destruction of sockets is tried.
const DESTROY_ROUNDS: usize = 3;
/// Most destroy errors that a report lists.
const MAX_LISTED_ERRORS: usize = 10;

/// How to unload.
#[derive(Debug, Clone, Copy)]
pub struct UnloadOptions {
    /// How long open connections may go on, still guarded, before they are destroyed.
    pub drain_timeout: Duration,
    /// Remove everything even if flows are still guarded, or the maps can't be read.
    pub force: bool,
}

/// What [`unload`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct UnloadReport {
    /// The pin directory.
    pub pin_directory: PathBuf,
    /// Something was there to unload.
    pub was_loaded: bool,
    /// Guarded connections that were open when it began.
    pub flows_at_start: usize,
    /// Those that ended by themselves while there was time.
    pub flows_drained: usize,
    /// Those whose sockets were destroyed; their clients saw a reset.
    pub flows_destroyed: usize,
    /// Records without a socket that were deleted.
    pub records_stale: usize,
    /// Connections that were still guarded when everything was removed (`force`); their unread bytes are lost.
    pub flows_abandoned: usize,
    /// Why sockets could not be destroyed, or maps not be read; at most ten.
    pub errors: Vec<String>,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
}

/// Why an enforcement was not unloaded. It is still in the kernel, and still guards what it guarded.
#[derive(Debug, thiserror::Error)]
pub enum UnloadError {
    /// The maps can't be used.
    #[error("{0}; with --force the pins are removed all the same")]
    Maps(#[from] LiveError),
    /// The list of flows can't be read.
    #[error("cannot read the flows: {0}; with --force the pins are removed all the same")]
    Flows(#[source] MapError),
    /// Sockets could not be destroyed.
    #[error("{count} connections are still guarded and were left so{}; end them, or cut them off with --force", listed(.errors))]
    StillGuarded {
        /// How many.
        count: usize,
        /// Why they could not be destroyed.
        errors: Vec<String>,
    },
    /// A pin can't be removed.
    #[error("cannot remove {path}: {source}")]
    Remove {
        /// The pin or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

fn listed(errors: &[String]) -> String {
    if errors.is_empty() { String::new() } else { format!(" ({})", errors.join("; ")) }
}

/// Unloads what is pinned in `pins`, and what a failed start may have left in its staging directory. Blocks for at most
/// the drain timeout and some seconds. A daemon that serves these pins may go on serving meanwhile, so that requests in
/// flight are answered. Nothing loaded is fine.
///
/// # Errors
/// See [`UnloadError`].
pub fn unload(pins: &PinDir, options: &UnloadOptions) -> Result<UnloadReport, UnloadError> {
    let start = Instant::now();
    let mut report = UnloadReport { pin_directory: pins.path().to_owned(), ..UnloadReport::default() };
    for pins in [pins, &pins.staging(), &pins.retired()] {
        if !pins.path().exists() {
            continue;
        }
        report.was_loaded = true;
        // Without maps there are no flows: such a directory was being made or removed when its process died.
        if pins.pin(map::FLOWS).exists() && pins.exists() {
            let drained =
                Drain::new(pins, &mut report).map_err(UnloadError::from).and_then(|drain| drain.run(options));
            match drained {
                Err(error) if options.force => report.error(error.to_string()),
                drained => drained?,
            }
        }
        remove(pins)?;
    }
    report.took_ms = start.elapsed().as_millis() as u64;
    Ok(report)
}

impl UnloadReport {
    fn error(&mut self, error: String) {
        if self.errors.len() < MAX_LISTED_ERRORS && !self.errors.contains(&error) {
            self.errors.push(error);
        }
    }
}

struct Drain<'a> {
    maps: Maps,
    sockets: SockHash<MapData, u64>,
    destroyer: SocketDestroyer,
    report: &'a mut UnloadReport,
}

impl<'a> Drain<'a> {
    fn new(pins: &PinDir, report: &'a mut UnloadReport) -> Result<Self, LiveError> {
        let maps = Maps::open(pins)?;
        let failed = |source| LiveError::Map { name: map::SOCKETS, source };
        let sockets = MapData::from_pin(pins.pin(map::SOCKETS)).map_err(failed)?;
        let sockets = SockHash::try_from(Map::SockHash(sockets)).map_err(failed)?;
        Ok(Self { maps, sockets, destroyer: SocketDestroyer::default(), report })
    }

    fn run(mut self, options: &UnloadOptions) -> Result<(), UnloadError> {
        let mut seen: BTreeSet<u64> = self.flows()?.into_keys().collect();
        self.stop_tagging()?;
        // A program that read the configuration before may be about to record its flow.
        std::thread::sleep(POLL);
        let mut flows = self.flows()?;
        seen.extend(flows.keys());
        let deadline = Instant::now() + options.drain_timeout;
        while !flows.is_empty() && Instant::now() < deadline {
            std::thread::sleep(POLL.min(deadline.saturating_duration_since(Instant::now())));
            self.stop_tagging()?;
            flows = self.flows()?;
            seen.extend(flows.keys());
        }
        let undrained = flows.len();
        self.report.flows_at_start += seen.len();
        self.report.flows_drained += seen.len() - undrained;

        let mut flows = self.destroy_all(flows)?;
        self.report.flows_destroyed += undrained.saturating_sub(flows.len());
        self.delete_stale(&mut flows)?;
        if flows.is_empty() {
            return Ok(());
        }
        if options.force {
            self.report.flows_abandoned += flows.len();
            return Ok(());
        }
        Err(UnloadError::StillGuarded { count: flows.len(), errors: self.report.errors.clone() })
    }

    /// A running daemon may write the configuration too, so this is said again while we wait.
    fn stop_tagging(&mut self) -> Result<(), LiveError> {
        let config = self.maps.live.configuration()?;
        if config.draining == 0 {
            self.maps.set_config(Config { draining: 1, ..config })?;
        }
        Ok(())
    }

    /// Flows by cookie. A walk over a hash that shrinks meanwhile may start again, so it is bounded, and what it shows
    /// twice counts once.
    fn flows(&self) -> Result<BTreeMap<u64, Flow>, UnloadError> {
        let walk = self.maps.live.flows.iter().take(2 * MAX_FLOWS as usize);
        walk.collect::<Result<_, _>>().map_err(UnloadError::Flows)
    }

    /// Destroys the sockets of `flows` and waits for their records to go. Returns the flows that are left.
    fn destroy_all(&mut self, mut flows: BTreeMap<u64, Flow>) -> Result<BTreeMap<u64, Flow>, UnloadError> {
        for _ in 0..DESTROY_ROUNDS {
            if flows.is_empty() {
                break;
            }
            self.destroy(&flows);
            let deadline = Instant::now() + SETTLE;
            while !flows.is_empty() && Instant::now() < deadline {
                std::thread::sleep(POLL);
                flows = self.flows()?;
            }
        }
        Ok(flows)
    }

    fn destroy(&mut self, flows: &BTreeMap<u64, Flow>) {
        // The search for a namespace that nothing lives in walks all of /proc: once is enough.
        let mut unreachable = BTreeSet::new();
        for (&cookie, flow) in flows {
            if unreachable.contains(&flow.netns_cookie) {
                continue;
            }
            if let Err(error) = self.destroyer.destroy(flow.netns_cookie, cookie, flow.local, flow.peer) {
                if error.kind() == std::io::ErrorKind::NotFound {
                    unreachable.insert(flow.netns_cookie);
                }
                self.report.error(format!("socket {cookie}: {error}"));
            }
        }
    }

    /// Deletes the records whose sockets are gone: the kernel takes a socket out of `SOCKETS` when it closes, but its
    /// record stays if no program was attached at that moment.
    fn delete_stale(&mut self, flows: &mut BTreeMap<u64, Flow>) -> Result<(), UnloadError> {
        if flows.is_empty() {
            return Ok(());
        }
        let guarded: BTreeSet<u64> = self
            .sockets
            .keys()
            .take(2 * MAX_SOCKETS as usize)
            .collect::<Result<_, _>>()
            .map_err(UnloadError::Flows)?;
        let stale: Vec<u64> = flows.keys().copied().filter(|cookie| !guarded.contains(cookie)).collect();
        for cookie in stale {
            // It may have gone by itself since.
            let _ = self.maps.live.flows.remove(&cookie);
            flows.remove(&cookie);
            self.report.records_stale += 1;
        }
        Ok(())
    }
}

/// Detaches, then removes the rest.
fn remove(pins: &PinDir) -> Result<(), UnloadError> {
    let link = pins.pin(LINK_PIN);
    match std::fs::remove_file(&link) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(UnloadError::Remove { path: link, source });
        }
        _ => {}
    }
    pins.remove().map_err(|source| UnloadError::Remove { path: pins.path().to_owned(), source })
}

#[cfg(test)]
#[path = "unload_tests.rs"]
mod tests;
