//! The shield's tables: whose packets are dropped before TCP sees them.

use super::{Text, assert_layout};

/// What the policy asks of the shield: `SHIELD_CONFIG`, an array of one. Writer: the daemon. Readers: shield, the programs that refuse, CLI.
/// All zero: nothing is limited, nobody is quarantined.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShieldConfig {
    /// New connections of a source: one every so many nanoseconds; 0: no limit.
    pub connection_interval_ns: u64,
    /// How many at once, times the interval, in nanoseconds.
    pub connection_burst_ns: u64,
    /// Packets of a source, likewise.
    pub packet_interval_ns: u64,
    /// How many at once, times the interval, in nanoseconds.
    pub packet_burst_ns: u64,
    /// How long refusals are counted together, in nanoseconds.
    pub refusal_window_ns: u64,
    /// How long a quarantine lasts, in nanoseconds; 0: there is none.
    pub quarantine_ns: u64,
    /// More refusals than these within the window quarantine their source.
    pub max_refusals: u64,
}
assert_layout!(ShieldConfig, 56, [
    connection_interval_ns: u64, connection_burst_ns: u64, packet_interval_ns: u64, packet_burst_ns: u64,
    refusal_window_ns: u64, quarantine_ns: u64, max_refusals: u64,
]);

/// Who sends: see [`crate::shield::source::key`]. Words in network order.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShieldKey {
    /// The address's first 64 bits; of an IPv4 address zero.
    pub prefix: u64,
    /// Its last 64 bits, if they count, else zero; an IPv4 address behind `0000:ffff`, as a v4-mapped one.
    pub rest: u64,
}
assert_layout!(ShieldKey, 16, [prefix: u64, rest: u64]);

/// What a source has sent: `SHIELD_SOURCES`, an LRU hash by [`ShieldKey`]. Writer and reader: shield. 65,536 entries; an evicted source
/// begins anew. Addresses can be forged, so whoever floods can fill it: what must not be forgotten is in `SHIELD_FAILING`.
///
/// An element that was evicted is another source's at once, and may be read meanwhile: whoever finds another key in it takes the source's
/// limit for used up.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShieldSource {
    /// Its key.
    pub key: ShieldKey,
    /// Bucket of new connections: see [`crate::limit::admit`].
    pub connections_tat_ns: u64,
    /// Bucket of packets.
    pub packets_tat_ns: u64,
}
assert_layout!(ShieldSource, 32, [key: ShieldKey, connections_tat_ns: u64, packets_tat_ns: u64]);

/// A source whose requests are refused: `SHIELD_FAILING`, an LRU hash by [`ShieldKey`]. Writers: gate and sock_ops, for connections that
/// stood, so nobody gets in here by a forged address; the daemon, when it takes over; the CLI, which ends a quarantine. Readers: gate and
/// sock_ops, shield, CLI. 16,384 entries.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShieldFailing {
    /// Its key, for the reason that [`ShieldSource`] has one.
    pub key: ShieldKey,
    /// Refusals, and when the first of them was: see [`crate::shield::quarantine::count`].
    pub refusals: u64,
    /// `CLOCK_BOOTTIME` until which its packets are dropped, in nanoseconds. Only set in a new element, never in place.
    pub blocked_until_ns: u64,
}
assert_layout!(ShieldFailing, 32, [key: ShieldKey, refusals: u64, blocked_until_ns: u64]);

/// Nothing is said of a prefix.
pub const SHIELD_NONE: u32 = 0;
/// Packets of the prefix are dropped.
pub const SHIELD_DROP: u32 = 1;
/// Nothing of the prefix is limited or quarantined.
pub const SHIELD_EXEMPT: u32 = 2;

/// What is said of a prefix: `SHIELD_V4` and `SHIELD_V6`, tries by longest prefix. Writers: the CLI for operators, the daemon for the
/// policy's exceptions; both under the state directory's lock. Readers: shield, the programs that refuse, CLI. 16,384 entries each, made
/// one by one.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShieldPrefix {
    /// `CLOCK_BOOTTIME` at which the operator's word ends, in nanoseconds; 0: never.
    pub until_ns: u64,
    /// The operator's word: `SHIELD_*`. It goes before the policy's.
    pub operator: u32,
    /// The policy's word: [`SHIELD_NONE`] or [`SHIELD_EXEMPT`].
    pub policy: u32,
    /// Length of the prefix, in bits: what follows it where this entry says nothing any more is one bit shorter, at most.
    pub bits: u32,
    /// Zero.
    pub zero: u32,
}
assert_layout!(ShieldPrefix, 24, [until_ns: u64, operator: u32, policy: u32, bits: u32, zero: u32]);

/// Why the shield drops a packet: index in [`ShieldInterface::drops`], and a [`super::Counter`] each.
pub const SHIELD_REASONS: usize = 8;

/// An interface under the shield: `SHIELD_INTERFACES`, a hash per CPU by interface index. Writers: the daemon makes and deletes it;
/// shield counts. Reader: CLI. 64 entries, as many as a policy may name.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShieldInterface {
    /// Its name when the program was attached.
    pub name: Text<16>,
    /// 1: the driver runs the program; 0: the kernel does, for every driver (generic).
    pub native: u64,
    /// Dropped packets by reason, on this CPU.
    pub drops: [u64; SHIELD_REASONS],
}
assert_layout!(ShieldInterface, 88, [name: Text<16>, native: u64, drops: [u64; SHIELD_REASONS]]);

/// Size of `SHIELD_SOURCES`.
pub const MAX_SHIELD_SOURCES: u32 = 65_536;
/// Size of `SHIELD_FAILING`.
pub const MAX_SHIELD_FAILING: u32 = 16_384;
/// Size of `SHIELD_V4` and of `SHIELD_V6`.
pub const MAX_SHIELD_PREFIXES: u32 = 16_384;
/// Size of `SHIELD_INTERFACES`.
pub const MAX_SHIELD_INTERFACES: u32 = 64;
/// Size of `SHIELD_ADDRESSES`: protected addresses, as [`super::EndpointKey`]s with port 0 (a wildcard's address is zero); values are 1.
/// Writer: the daemon. Reader: shield, for packets whose port can't be read.
pub const MAX_SHIELD_ADDRESSES: u32 = super::MAX_ENDPOINTS;
