//! Configuration and keys.

use super::assert_layout;

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
}
assert_layout!(Config, 56, [
    abi_version: u32, mode: u32, generation: u64, heartbeat_ns: u64, heartbeat_limit_ns: u64, loaded_ns: u64,
    daemon_started_ns: u64, daemon_pid: u32, draining: u32,
]);

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
