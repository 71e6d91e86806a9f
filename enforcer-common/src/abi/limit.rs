//! Limits: buckets that requests are charged to.

use super::{NameHash, Origin, Text, assert_layout};

/// A bucket of one limit, for one server, workload, principal, ...: `LIMITS`, an array, mapped into the daemon's memory, so that both sides
/// change its words atomically. Index 0 is no request's: it says how often the
/// daemon is told of processes that may not connect. 32,768 entries; when all are in use, a request that needs a new one is refused.
///
/// Writers: judge, inject, tag_flow (`open`) and the daemon (`tat_ns`, `open`, the counts); the daemon (the rest). Readers: these, and the CLI.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Theoretical arrival time on `CLOCK_BOOTTIME`, in nanoseconds: see [`crate::limit`].
    pub tat_ns: u64,
    /// Nanoseconds per request; 0: the rate is not limited.
    pub interval_ns: u64,
    /// Depth, in nanoseconds.
    pub burst_ns: u64,
    /// Connections whose last request was charged here.
    pub open: u64,
    /// The most that may be; `u64::MAX`: any number.
    pub max_open: u64,
    /// Requests that it let pass.
    pub admitted: u64,
    /// Requests that it refused.
    pub limited: u64,
    /// Tells its uses apart; 0: it is free, and refuses whatever is charged to it.
    pub serial: u64,
}
assert_layout!(Bucket, 64, [
    tat_ns: u64, interval_ns: u64, burst_ns: u64, open: u64, max_open: u64, admitted: u64, limited: u64, serial: u64,
]);

/// Names of a bucket: `LIMIT_LABELS`, an array by the same index. Writer: the daemon. Readers: the daemon and the CLI.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketLabel {
    /// Serial of the bucket that it belongs to.
    pub serial: u64,
    /// Hash of the limit's name, its dimension, and the value below, whole.
    pub key: NameHash,
    /// Name of the limit in the policy.
    pub limit: Text<64>,
    /// The dimension, `client`.
    pub per: Text<16>,
    /// Beginning of the dimension's value.
    pub value: Text<128>,
}
assert_layout!(BucketLabel, 232, [
    serial: u64, key: NameHash, limit: Text<64>, per: Text<16>, value: Text<128>,
]);

/// Size of `LIMITS`.
pub const MAX_BUCKETS: u32 = 32_768;
/// [`Bucket::max_open`]: any number.
pub const UNLIMITED: u64 = u64::MAX;

/// Where requests come from that have no grant: the workload's cgroup (of one that [`MAX_NAMED`] names: the one around it), or, where the caller is not known, its address (IPv6: the network of
/// 64 bits, which one host has for itself; all of 127.0.0.0/8 is one, as every process here can have each). Key of `SOURCES`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceKey {
    /// [`Origin::cgroup_id`]; 0: the caller is not known.
    pub cgroup_id: u64,
    /// The caller's address as IPv6 (IPv4: mapped), in network order; 0 where it is known.
    pub addr: [u64; 2],
}
assert_layout!(SourceKey, 24, [cgroup_id: u64, addr: [u64; 2]]);

/// 127.0.0.0, mapped.
const LOOPBACK_V4: u64 = 0xffff_7f00_0000;

impl SourceKey {
    /// The source of a flow.
    #[must_use]
    #[inline(always)]
    pub const fn of(origin: &Origin) -> Self {
        if origin.words[0] != 0 {
            return Self { cgroup_id: origin.words[0], addr: [0; 2] };
        }
        // In an IPv4-mapped address the first word is zero, and the second is the address.
        let mut host = if origin.words[2] == 0 { origin.words[3] } else { 0 };
        if u64::from_be(host) >> 24 == LOOPBACK_V4 >> 24 {
            host = LOOPBACK_V4.to_be();
        }
        Self { cgroup_id: 0, addr: [origin.words[2], host] }
    }
}

/// Buckets of a source: `SOURCES`, an LRU hash by [`SourceKey`]. Writers: judge and the daemon. 65,536 entries; one that is evicted begins anew. As the
/// memory may be another source's while it is charged, a charge may be that one's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Theoretical arrival time of requests that the kernel does not know.
    pub unknown_tat_ns: u64,
    /// Of requests that it refuses, and of those for public paths.
    pub refused_tat_ns: u64,
    /// Of requests over the first limit that the kernel can't answer: so many of them the daemon does.
    pub answered_tat_ns: u64,
    /// Requests that were over a limit.
    pub limited: u64,
}
assert_layout!(Source, 32, [unknown_tat_ns: u64, refused_tat_ns: u64, answered_tat_ns: u64, limited: u64]);

/// Size of `SOURCES`.
pub const MAX_SOURCES: u32 = 65_536;
/// Size of `NAMED`, an LRU hash by the id of a cgroup: the id of the one around it that has the workload's name, a unit's or a container's.
/// Who may make cgroups below its own is one source by that. Writer: the daemon. Readers: judge and the daemon. One that is not there, or was
/// evicted, is a source of its own until the daemon meets its next request.
pub const MAX_NAMED: u32 = 16_384;
/// [`SourceKey::cgroup_id`] of all cgroups that the daemon can't find: nobody knows whose they are. The kernel charges each by itself, the daemon
/// this one as well.
pub const LOST_CGROUPS: u64 = u64::MAX;

/// A request is charged to the buckets of its grant.
pub const CHARGE_GRANT: u32 = 0;
/// A request is charged to its source, as one that the kernel does not know.
pub const CHARGE_UNKNOWN: u32 = 1;
/// A request is charged to its source, as one over its limit that the daemon answers: at the rate of unknown ones.
pub const CHARGE_ANSWERED: u32 = 3;
/// A request is charged to its source, as one without a grant that the kernel knows.
pub const CHARGE_REFUSED: u32 = 2;

/// What a flow that has a place in a grant's buckets notes in [`super::Flow::held_serial`]: under another policy they may be others.
#[must_use]
#[inline(always)]
pub const fn held_as(serial: u64, generation: u64) -> u64 {
    serial ^ generation.rotate_left(32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{Caller, EndpointKey, FAMILY_V4, FAMILY_V6};

    #[test]
    fn a_source_is_a_workload_or_an_address_and_never_both() {
        let v4 = |last| {
            let mut addr = [0; 16];
            addr[..4].copy_from_slice(&[10, 0, 0, last]);
            EndpointKey { addr, port: 1, family: FAMILY_V4, zero: 0 }
        };
        let v6 = |network, last| {
            let mut addr = [0; 16];
            addr[0] = 0x20;
            addr[7] = network;
            addr[15] = last;
            EndpointKey { addr, port: 1, family: FAMILY_V6, zero: 0 }
        };
        let known = Caller { cgroup_id: 5, uid: 1, ..Caller::UNKNOWN };
        let source = |peer: &EndpointKey, caller: &Caller| SourceKey::of(&Origin::new(3, peer, caller));
        assert_eq!(source(&v4(1), &known), source(&v6(1, 1), &known));
        assert_ne!(source(&v4(1), &known), source(&v4(1), &Caller { cgroup_id: 6, ..known }));
        assert_ne!(source(&v4(1), &Caller::UNKNOWN), source(&v4(2), &Caller::UNKNOWN));
        assert_eq!(source(&v6(1, 1), &Caller::UNKNOWN), source(&v6(1, 2), &Caller::UNKNOWN));
        assert_ne!(source(&v6(1, 1), &Caller::UNKNOWN), source(&v6(2, 1), &Caller::UNKNOWN));
        assert_ne!(source(&v4(1), &Caller::UNKNOWN), source(&v4(1), &known));
        let loopback = |a, d| {
            let mut key = v4(d);
            key.addr[0] = a;
            source(&key, &Caller::UNKNOWN)
        };
        assert_eq!(loopback(127, 1), loopback(127, 200));
        assert_eq!(loopback(127, 1).addr, [0, 0xffff_7f00_0000_u64.to_be()]);
        for other in [126, 128] {
            assert_ne!(loopback(other, 1), loopback(other, 200));
        }
    }
}
