//! The enforcement as a whole.

use std::collections::BTreeMap;
use std::path::PathBuf;

use enforcer_common::abi::{
    ABI_VERSION, Config, MAX_BUCKETS, MAX_FLOWS, MAX_GRANTS, MAX_REVOCATIONS, MAX_VERDICTS, MODE_ENFORCE,
    MODE_OBSERVE,
};
use serde::Serialize;

use super::shield::Shielded;
use super::unguarded::Summary;
use crate::cli::format::{age_ms, duration, mebibytes};
use crate::cli::output::{Render, pairs};
use crate::datapath::MapMemory;
use crate::lifecycle::Usage;
use crate::lifecycle::lock::{LockState, ReloadRecord};

/// What the file system says.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) pin_directory: PathBuf,
    pub(super) link_pinned: bool,
}

/// Entries in the tables.
#[derive(Debug)]
pub(super) struct Used {
    pub(super) flows: usize,
    pub(super) verdicts: usize,
    pub(super) grants: usize,
    /// Buckets of limits.
    pub(super) limits: usize,
    pub(super) revocations: usize,
    /// Kernel memory of the maps, the largest first.
    pub(super) memory: Vec<MapMemory>,
    /// What the daemon's process holds, if it lives and may be looked at.
    pub(super) process: Option<Usage>,
    pub(super) unguarded: Summary,
    /// Workloads of the policy that nobody on this host is now.
    pub(super) unmatched_workloads: Vec<String>,
    pub(super) shield: Shielded,
}

#[derive(Debug, Serialize)]
pub(super) struct Status {
    /// `enforcing`, `observing`, `draining`, `detached`, `no-policy` or `not-loaded`.
    state: &'static str,
    /// Requests without a right are being refused.
    enforcing: bool,
    pin_directory: PathBuf,
    link_pinned: bool,
    daemon: Daemon,
    #[serde(skip_serializing_if = "Option::is_none")]
    loaded: Option<Loaded>,
}

#[derive(Debug, Serialize)]
struct Daemon {
    /// It holds its lock and has shown the kernel a sign of life within the limit.
    alive: bool,
    /// Absent if the lock can't be looked at.
    lock_held: Option<bool>,
    /// Its last sign of life is within the limit, so the kernel still parks unknown requests for it.
    heartbeat_fresh: bool,
    pid: Option<u32>,
    heartbeat_age_ms: Option<u64>,
    heartbeat_limit_ms: Option<u64>,
    /// The policy that it runs, or that the last one ran.
    policy: Option<PathBuf>,
    /// What became of its last attempt to switch to another policy; absent before the first.
    last_reload: Option<Reload>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Usage>,
}

#[derive(Debug, Serialize)]
struct Reload {
    at_unix_s: u64,
    age_ms: u64,
    trigger: String,
    ok: bool,
    /// Why the policy was not taken.
    error: Option<String>,
}

impl Reload {
    fn of(record: ReloadRecord, now_ns: u64) -> Self {
        let ReloadRecord { at_boot_ns, at_unix_s, trigger, error } = record;
        Self { at_unix_s, age_ms: age_ms(at_boot_ns, now_ns), trigger, ok: error.is_none(), error }
    }

    fn text(&self) -> String {
        let (age, trigger) = (duration(self.age_ms), &self.trigger);
        let Some(error) = &self.error else { return format!("ok, {age} ago ({trigger})") };
        let mut defects = error.lines().filter(|line| !line.trim_start().starts_with("hint: "));
        let first = defects.next().unwrap_or_default();
        let more = match defects.count() {
            0 => String::new(),
            more => format!(" (and {more} more; `--output json` has all)"),
        };
        format!("FAILED {age} ago ({trigger}), the policy before it stays in force: {first}{more}")
    }
}

#[derive(Debug, Serialize)]
struct Loaded {
    mode: &'static str,
    abi_version: u32,
    generation: u64,
    age_ms: u64,
    flows: Table,
    verdicts: Table,
    grants: Table,
    /// Buckets.
    limits: Table,
    revocations: Table,
    maps_bytes: u64,
    maps: BTreeMap<&'static str, u64>,
    /// What is at protected endpoints and not guarded.
    unguarded: Summary,
    /// Workloads of the policy that nobody on this host is now.
    unmatched_workloads: Vec<String>,
    shield: Shielded,
}

#[derive(Debug, Serialize)]
struct Table {
    used: usize,
    capacity: u32,
}

impl Table {
    fn text(&self) -> String {
        format!("{} of {}", self.used, self.capacity)
    }
}

impl Status {
    pub(super) fn not_loaded(place: Place, lock: Option<LockState>) -> Self {
        let lock_held = lock.as_ref().map(|lock| lock.held);
        let record = lock.and_then(|lock| lock.record);
        Self {
            state: "not-loaded",
            enforcing: false,
            pin_directory: place.pin_directory,
            link_pinned: place.link_pinned,
            daemon: Daemon {
                alive: false,
                pid: record.as_ref().filter(|_| lock_held == Some(true)).map(|record| record.pid),
                lock_held,
                heartbeat_fresh: false,
                heartbeat_age_ms: None,
                heartbeat_limit_ms: None,
                policy: record.and_then(|record| record.policy),
                last_reload: None,
                process: None,
            },
            loaded: None,
        }
    }

    pub(super) fn of(
        place: Place,
        lock: Option<LockState>,
        config: &Config,
        used: Used,
        now_ns: u64,
    ) -> Self {
        let state = state(&place, config);
        let lock_held = lock.as_ref().map(|lock| lock.held);
        let record = lock.and_then(|lock| lock.record).unwrap_or_default();
        let fresh = now_ns.saturating_sub(config.heartbeat_ns) < config.heartbeat_limit_ns;
        Self {
            state,
            enforcing: state == "enforcing",
            pin_directory: place.pin_directory,
            link_pinned: place.link_pinned,
            daemon: Daemon {
                alive: fresh && lock_held != Some(false),
                lock_held,
                heartbeat_fresh: fresh,
                pid: Some(config.daemon_pid),
                heartbeat_age_ms: Some(age_ms(config.heartbeat_ns, now_ns)),
                heartbeat_limit_ms: Some(age_ms(0, config.heartbeat_limit_ns)),
                policy: record.policy,
                last_reload: record.last_reload.map(|reload| Reload::of(reload, now_ns)),
                process: used.process,
            },
            loaded: Some(Loaded {
                mode: mode(config.mode),
                abi_version: config.abi_version,
                generation: config.generation,
                age_ms: age_ms(config.loaded_ns, now_ns),
                flows: Table { used: used.flows, capacity: MAX_FLOWS },
                verdicts: Table { used: used.verdicts, capacity: MAX_VERDICTS },
                grants: Table { used: used.grants, capacity: MAX_GRANTS },
                limits: Table { used: used.limits, capacity: MAX_BUCKETS - 1 },
                revocations: Table { used: used.revocations, capacity: MAX_REVOCATIONS },
                maps_bytes: used.memory.iter().map(|map| map.bytes).sum(),
                unguarded: used.unguarded,
                unmatched_workloads: used.unmatched_workloads,
                shield: used.shield,
                maps: used.memory.into_iter().map(|map| (map.name, map.bytes)).collect(),
            }),
        }
    }
}

fn state(place: &Place, config: &Config) -> &'static str {
    if !place.link_pinned {
        "detached"
    } else if config.draining != 0 {
        "draining"
    } else if config.abi_version != ABI_VERSION {
        "no-policy"
    } else if config.mode == MODE_OBSERVE {
        "observing"
    } else {
        // The kernel takes every other mode for this one.
        "enforcing"
    }
}

fn mode(mode: u32) -> &'static str {
    match mode {
        MODE_ENFORCE => "enforce",
        MODE_OBSERVE => "observe",
        _ => "unknown",
    }
}

/// What a state means for requests.
fn meaning(state: &str) -> &'static str {
    match state {
        "enforcing" => "requests without a valid token are refused",
        "observing" => "NOTHING IS REFUSED; what would be is counted",
        "draining" => "new connections are NOT guarded",
        "detached" => "new connections are NOT guarded; `enforcer unload` removes the rest",
        "no-policy" => "nothing is allowed: no policy was loaded",
        _ => "the servers are NOT guarded",
    }
}

impl Render for Status {
    fn text(&self) -> String {
        let mut rows = vec![("state", format!("{} ({})", self.state, meaning(self.state)))];
        rows.push(("daemon", self.daemon.text()));
        if let Some(process) = &self.daemon.process {
            rows.push(("resources", process.text()));
        }
        if let Some(policy) = &self.daemon.policy {
            rows.push(("policy", policy.display().to_string()));
        }
        if let Some(reload) = &self.daemon.last_reload {
            rows.push(("last reload", reload.text()));
        }
        if let Some(loaded) = &self.loaded {
            rows.extend([
                ("mode", loaded.mode.to_owned()),
                ("loaded", format!("{} ago", duration(loaded.age_ms))),
                ("generation", loaded.generation.to_string()),
                ("abi version", loaded.abi_version.to_string()),
                ("flows", loaded.flows.text()),
                ("verdicts", loaded.verdicts.text()),
                ("grants", loaded.grants.text()),
                ("limits", format!("{} buckets", loaded.limits.text())),
                ("revocations", loaded.revocations.text()),
                ("maps", format!("{} of kernel memory", mebibytes(loaded.maps_bytes))),
            ]);
            rows.extend(loaded.shield.text().into_iter().map(|text| ("shield", text)));
            rows.extend(loaded.unguarded.text().map(|text| ("NOT GUARDED", text)));
            if !loaded.unmatched_workloads.is_empty() {
                let names = loaded.unmatched_workloads.join(", ");
                rows.push(("NOT HERE", format!("workloads that nothing on this host fits now: {names}")));
            }
        }
        let link = if self.link_pinned { "attached" } else { "not attached" };
        rows.push(("pins", format!("{} ({link})", self.pin_directory.display())));
        pairs(rows)
    }
}

impl Daemon {
    fn text(&self) -> String {
        let pid = self.pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
        let (Some(age), Some(limit)) = (self.heartbeat_age_ms, self.heartbeat_limit_ms) else {
            let starting = format!("starting or ending (pid {pid})");
            return if self.lock_held == Some(true) { starting } else { "none".to_owned() };
        };
        let (age, limit) = (duration(age), duration(limit));
        match (self.alive, self.lock_held) {
            (true, _) => format!("alive (pid {pid}), last sign of life {age} ago (limit {limit})"),
            (false, Some(true)) => {
                format!(
                    "HANGS (pid {pid}): last sign of life {age} ago (limit {limit}); unknown requests get 503"
                )
            }
            (false, _) if self.heartbeat_fresh => {
                format!("none; it ended less than {limit} ago; after that unknown requests get 503")
            }
            (false, _) => format!("none; the last sign of life was {age} ago; unknown requests get 503"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW_NS, config};
    use super::*;
    use crate::lifecycle::lock::LockRecord;
    use crate::lifecycle::unguarded::Unguarded;

    fn used() -> Used {
        let map = |name, bytes| MapMemory { name, bytes };
        let memory = vec![map("FLOWS", 24 << 20), map("CONFIG", 4096)];
        let process = Usage {
            resident_bytes: 20 << 20,
            resident_max_bytes: 200 << 20,
            descriptors: 40,
            descriptors_max: 1024,
        };
        let unguarded = Summary::of(Ok(Unguarded::default()));
        let (process, unmatched_workloads) = (Some(process), Vec::new());
        let shield = Shielded::default();
        Used {
            flows: 3,
            verdicts: 2,
            grants: 1,
            limits: 5,
            revocations: 4,
            memory,
            process,
            unguarded,
            unmatched_workloads,
            shield,
        }
    }

    fn place(link_pinned: bool) -> Place {
        Place { pin_directory: "/sys/fs/bpf/enforcer".into(), link_pinned }
    }

    fn lock(held: bool) -> Option<LockState> {
        let policy = Some("/etc/enforcer/policy.yaml".into());
        let record = LockRecord { pid: 42, policy, last_reload: None };
        Some(LockState { held, record: Some(record) })
    }

    #[test]
    fn an_enforcing_status_shows_everything() {
        let status = Status::of(place(true), lock(true), &config(), used(), NOW_NS);
        assert_eq!(
            status.text(),
            "state        enforcing (requests without a valid token are refused)\n\
             daemon       alive (pid 42), last sign of life 400ms ago (limit 5s)\n\
             resources    20.0 MiB of at most 200.0 MiB, 40 of 1024 file descriptors\n\
             policy       /etc/enforcer/policy.yaml\n\
             mode         enforce\n\
             loaded       1m30s ago\n\
             generation   1\n\
             abi version  6\n\
             flows        3 of 65536\n\
             verdicts     2 of 65536\n\
             grants       1 of 65536\n\
             limits       5 of 32767 buckets\n\
             revocations  4 of 16384\n\
             maps         24.0 MiB of kernel memory\n\
             pins         /sys/fs/bpf/enforcer (attached)\n"
        );
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["enforcing"], true);
        assert_eq!(json["daemon"]["heartbeat_age_ms"], 400);
        assert_eq!(json["loaded"]["flows"]["capacity"], 65_536);
        assert_eq!(json["loaded"]["maps_bytes"], (24 << 20) + 4096);
        assert_eq!(json["loaded"]["maps"]["CONFIG"], 4096);
        assert_eq!(json["daemon"]["process"]["descriptors"], 40);
    }

    #[test]
    fn workloads_that_nobody_is_are_named() {
        let used = Used { unmatched_workloads: vec!["a".to_owned(), "b".to_owned()], ..used() };
        let status = Status::of(place(true), lock(true), &config(), used, NOW_NS);
        assert!(
            status.text().contains("\nNOT HERE     workloads that nothing on this host fits now: a, b\n"),
            "{}",
            status.text()
        );
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["loaded"]["unmatched_workloads"], serde_json::json!(["a", "b"]));
    }

    #[test]
    fn the_last_reload_and_its_first_defect_show() {
        let with = |error: Option<&str>| {
            let mut lock = lock(true).unwrap();
            lock.record.as_mut().unwrap().last_reload = Some(ReloadRecord {
                at_boot_ns: NOW_NS - 3_000_000_000,
                at_unix_s: 7,
                trigger: "SIGHUP".into(),
                error: error.map(str::to_owned),
            });
            Status::of(place(true), Some(lock), &config(), used(), NOW_NS)
        };
        let line = |status: &Status| {
            let text = status.text();
            text.lines().find_map(|line| line.strip_prefix("last reload  ")).unwrap().to_owned()
        };
        assert_eq!(line(&with(None)), "ok, 3s ago (SIGHUP)");
        let one = "p.yaml:3:1: servers[0].listen: no\n    hint: yes";
        let failed =
            "FAILED 3s ago (SIGHUP), the policy before it stays in force: p.yaml:3:1: servers[0].listen: no";
        assert_eq!(line(&with(Some(one))), failed);
        let two = format!("{one}\np.yaml:4:1: mode: bad\n    hint: no");
        assert_eq!(line(&with(Some(&two))), format!("{failed} (and 1 more; `--output json` has all)"));
        let json = serde_json::to_value(with(Some(&two))).unwrap();
        assert_eq!(json["daemon"]["last_reload"]["ok"], false);
        assert_eq!(json["daemon"]["last_reload"]["error"], two);
    }

    #[test]
    fn every_state_but_enforcing_says_so() {
        let state = |linked, config: Config| {
            let status = Status::of(place(linked), lock(true), &config, used(), NOW_NS);
            assert_eq!(status.enforcing, status.state == "enforcing");
            status.state
        };
        assert_eq!(state(true, config()), "enforcing");
        assert_eq!(state(false, config()), "detached");
        assert_eq!(state(true, Config { draining: 1, ..config() }), "draining");
        assert_eq!(state(true, Config { abi_version: 0, ..config() }), "no-policy");
        assert_eq!(state(true, Config { mode: MODE_OBSERVE, ..config() }), "observing");
        let none = Status::not_loaded(place(false), None);
        assert!(none.text().starts_with("state   not-loaded (the servers are NOT guarded)\ndaemon  none\n"));
        assert!(Status::not_loaded(place(false), lock(true)).text().contains("starting or ending (pid 42)"));
    }

    #[test]
    fn a_daemon_lives_only_with_lock_and_heartbeat() {
        let daemon = |lock, config: Config| Status::of(place(true), lock, &config, used(), NOW_NS).daemon;
        let old = Config { heartbeat_ns: NOW_NS - 5_000_000_000, ..config() };
        assert!(daemon(lock(true), config()).alive);
        assert!(daemon(None, config()).alive);
        assert!(!daemon(lock(false), config()).alive);
        assert!(daemon(lock(false), config()).text().starts_with("none; it ended less than 5s ago"));
        assert!(daemon(lock(true), old).text().starts_with("HANGS (pid 42)"));
        assert!(daemon(lock(false), old).text().starts_with("none"));
    }
}
