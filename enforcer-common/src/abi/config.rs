//! Configuration and keys.

use super::assert_layout;
use crate::limit::RETRY_STEPS;

/// What happens to refused requests, as stored in [`Config::mode`].
pub const MODE_ENFORCE: u32 = 1;
/// Refused requests pass and are counted.
pub const MODE_OBSERVE: u32 = 2;

/// Configuration of the programs: `CONFIG`, an array of one. Writer: the daemon. Readers: programs and CLI.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// [`super::ABI_VERSION`] of the daemon that loaded the programs. 0: no policy was ever loaded, nothing is allowed.
    pub abi_version: u32,
    /// [`MODE_ENFORCE`] or [`MODE_OBSERVE`].
    pub mode: u32,
    /// Current policy generation; grants and verdicts of another generation are dead.
    pub generation: u64,
    /// `CLOCK_BOOTTIME` of the daemon's last sign of life, in nanoseconds.
    pub heartbeat_ns: u64,
    /// How old the heartbeat may be for unknown heads to be parked, in nanoseconds.
    pub heartbeat_limit_ns: u64,
    /// `CLOCK_BOOTTIME` at which the programs were loaded, in nanoseconds.
    pub loaded_ns: u64,
    /// `CLOCK_BOOTTIME` at which the daemon that writes the heartbeat came to these maps, in nanoseconds: with its process id it
    /// tells one daemon from the next.
    pub daemon_started_ns: u64,
    /// Process id of the daemon.
    pub daemon_pid: u32,
    /// The sock_ops program tags no new flows any more (the enforcer is being unloaded).
    pub draining: u32,
    /// Limit of requests that the kernel does not know, per source: nanoseconds per request.
    pub unknown_interval_ns: u64,
    /// Its depth, in nanoseconds.
    pub unknown_burst_ns: u64,
    /// Limit of requests that it refuses, and of those for public paths, per source: nanoseconds per request; 0: none.
    pub refused_interval_ns: u64,
    /// Its depth, in nanoseconds.
    pub refused_burst_ns: u64,
    /// 429 for each of [`crate::limit::RETRY_AFTER_SECS`]: indices in `REPLIES`.
    pub limited_reply_ids: [u32; RETRY_STEPS],
}
assert_layout!(Config, 120, [
    abi_version: u32, mode: u32, generation: u64, heartbeat_ns: u64, heartbeat_limit_ns: u64, loaded_ns: u64,
    daemon_started_ns: u64, daemon_pid: u32, draining: u32, unknown_interval_ns: u64, unknown_burst_ns: u64, refused_interval_ns: u64, refused_burst_ns: u64,
    limited_reply_ids: [u32; RETRY_STEPS],
]);

impl Config {
    /// No policy: nothing is allowed, nothing waits for a daemon, nothing is limited.
    pub const NONE: Self = Self {
        abi_version: 0,
        mode: MODE_ENFORCE,
        generation: 0,
        heartbeat_ns: 0,
        heartbeat_limit_ns: 0,
        loaded_ns: 0,
        daemon_started_ns: 0,
        daemon_pid: 0,
        draining: 0,
        unknown_interval_ns: 0,
        unknown_burst_ns: 0,
        refused_interval_ns: 0,
        refused_burst_ns: 0,
        limited_reply_ids: [0; RETRY_STEPS],
    };
}

/// What a daemon leaves to the next one: `DAEMON_STATE`, an array of one. Writer and reader: the daemon; no program reads it.
/// Root alone can open the map, and with it the key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DaemonState {
    /// Key of the token fingerprints.
    pub fingerprint_key: [u8; 32],
    /// SHA-256 of the policy that [`Config::generation`] stands for, and of the version that judged by it.
    pub policy_hash: [u8; 32],
    /// SHA-256 of the object whose programs are attached; zero while they are being replaced.
    pub object_hash: [u8; 32],
}
assert_layout!(DaemonState, 96, [fingerprint_key: [u8; 32], policy_hash: [u8; 32], object_hash: [u8; 32]]);
