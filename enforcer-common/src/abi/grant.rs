//! Verdicts and grants: what makes a known head pass.

use super::{Origin, assert_layout};

/// Key of `VERDICTS`: the keyed digest of a request head, see [`crate::digest`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HeadDigest {
    /// First half.
    pub lo: u64,
    /// Second half.
    pub hi: u64,
}
assert_layout!(HeadDigest, 16, [lo: u64, hi: u64]);

/// The head passes while its grant lives.
pub const VERDICT_ALLOW: u32 = 1;
/// The head is answered with a template and the server does not see it.
pub const VERDICT_DENY: u32 = 2;
/// The head needs no token (a public path); it has no grant, only a generation.
pub const VERDICT_PUBLIC: u32 = 3;

/// What was decided about a head: `VERDICTS`, an LRU hash by [`HeadDigest`]. Writer and deleter: the daemon.
/// Reader: judge. 65,536 entries; an evicted verdict is a miss, so the head is judged again.
///
/// In the map it is [`super::Sealed`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Its key.
    pub digest: HeadDigest,
    /// `VERDICT_*`.
    pub kind: u32,
    /// `VERDICT_ALLOW`: slot in `GRANTS`. `VERDICT_DENY`: index in `REPLIES`.
    pub index: u32,
    /// Serial that the grant in that slot must have.
    pub grant_serial: u64,
    /// Policy generation under which it was decided.
    pub generation: u64,
    /// `CLOCK_BOOTTIME` after which it is void, in nanoseconds. A grant's own deadline holds besides.
    pub deadline_ns: u64,
    /// Number of the server.
    pub server_id: u32,
    /// Length of the head, in bytes.
    pub head_bytes: u32,
}
assert_layout!(Verdict, 56, [
    digest: HeadDigest, kind: u32, index: u32, grant_serial: u64, generation: u64, deadline_ns: u64, server_id: u32, head_bytes: u32,
]);

/// How many limit buckets a grant can name.
pub const GRANT_BUCKETS: usize = 8;

/// A token's right to call a server, for one caller: `GRANTS`, an array by slot. Writer: the daemon. Readers: judge and CLI.
///
/// A grant whose time is over keeps its slot while a flow names its serial, or has its bit and the token is good: whoever looks for streams that must end finds it there.
/// A slot is used again only a while after its grant was voided (`serial` 0), so that a program which still reads the
/// old grant never sees half of a new one. 65,536 entries: an array lookup is inlined, a hash lookup is not.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Unique number with the slot in its low bits ([`grant_slot`]); 0: the slot is free.
    pub serial: u64,
    /// `CLOCK_BOOTTIME` after which nothing is allowed, in nanoseconds.
    pub deadline_ns: u64,
    /// Policy generation under which it was given.
    pub generation: u64,
    /// Who may use it: [`Origin::caller`]. A verdict that names it is found by heads of that caller alone, since it is part of their digests.
    pub caller: Origin,
    /// Number of the principal (issuer, subject, client): a hash, so it outlives the daemon.
    pub principal_id: u64,
    /// `CLOCK_BOOTTIME` at which it was given, in nanoseconds.
    pub granted_ns: u64,
    /// The token's `exp`, in Unix seconds.
    pub expires_at_unix_secs: u64,
    /// When the token is refused, in Unix seconds: its `exp` plus the leeway. Streams that it opened end then.
    pub ends_at_unix_secs: u64,
    /// Requests allowed by it in the kernel. Writer: judge.
    pub requests: u64,
    /// Keyed fingerprint of the token.
    pub fingerprint: [u8; 16],
    /// Limit buckets that each request is charged to; 0: none.
    pub buckets: [u32; GRANT_BUCKETS],
    /// Number of the server.
    pub server_id: u32,
    /// `REVOKED_*`; 0: it is not revoked. Writers: the daemon and the CLI.
    pub revoked: u32,
}
assert_layout!(Grant, 152, [
    serial: u64, deadline_ns: u64, generation: u64, caller: Origin, principal_id: u64, granted_ns: u64,
    expires_at_unix_secs: u64, ends_at_unix_secs: u64, requests: u64, fingerprint: [u8; 16], buckets: [u32; GRANT_BUCKETS], server_id: u32,
    revoked: u32,
]);

/// Size of `VERDICTS`.
pub const MAX_VERDICTS: u32 = 65_536;
/// Size of `GRANTS`.
pub const MAX_GRANTS: u32 = 1 << GRANT_SLOT_BITS;
/// Low bits of a serial that are its slot.
pub const GRANT_SLOT_BITS: u32 = 16;

/// [`Grant::revoked`]: by an operator.
pub const REVOKED_BY_OPERATOR: u32 = 1;
/// [`Grant::revoked`]: a later policy does not allow it.
pub const REVOKED_BY_POLICY: u32 = 2;

/// The slot of the grant with this serial.
#[must_use]
#[inline(always)]
pub const fn grant_slot(serial: u64) -> u32 {
    serial as u32 & (MAX_GRANTS - 1)
}

/// Serial number `number`, which must not be 0, in this slot.
#[must_use]
pub const fn grant_serial(number: u64, slot: u32) -> u64 {
    number << GRANT_SLOT_BITS | slot as u64
}

/// The bit of [`super::Flow::evicted_grants`] that stands for a grant, and for one in 64 of the others.
#[must_use]
#[inline(always)]
pub const fn grant_bit(serial: u64) -> u64 {
    1 << ((serial >> GRANT_SLOT_BITS) & 63)
}
