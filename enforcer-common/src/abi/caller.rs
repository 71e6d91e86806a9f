//! Who is calling: what the kernel knows of the process that made a connection.

use super::{EndpointKey, FAMILY_V4, assert_layout};

/// The process that connected a socket, as it was in its own call of `connect`. All zero: unknown.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Id of its cgroup (the inode number of its directory in cgroupfs; the kernel gives none out twice); 0: the caller is unknown.
    pub cgroup_id: u64,
    /// Network namespace cookie of its socket.
    pub netns_cookie: u64,
    /// `CLOCK_BOOTTIME` of the call, in nanoseconds.
    pub connected_ns: u64,
    /// Process id (thread group) in the initial namespace. For the log: it may have ended, and its number be another's.
    pub pid: u32,
    /// User id in the initial namespace.
    pub uid: u32,
    /// Name of the thread, padded with zeros.
    pub comm: [u8; 16],
}
assert_layout!(Caller, 48, [
    cgroup_id: u64, netns_cookie: u64, connected_ns: u64, pid: u32, uid: u32, comm: [u8; 16],
]);

impl Caller {
    /// Nobody knows who it is: it is on another host, or outside of the cgroup that is looked at.
    pub const UNKNOWN: Self =
        Self { cgroup_id: 0, netns_cookie: 0, connected_ns: 0, pid: 0, uid: u32::MAX, comm: [0; 16] };

    /// Whether it is known.
    #[must_use]
    #[inline(always)]
    pub const fn is_known(&self) -> bool {
        self.cgroup_id != 0
    }
}

/// Words of an [`Origin`].
pub const ORIGIN_WORDS: usize = 4;

/// Where a connection comes from and goes to, as it is part of the digest of each of its heads: what is known of a head, and each grant, holds
/// for one caller at one endpoint. Word 0: id of the caller's cgroup, 0 for an unknown one. Word 1: its user id, and above it the number of the
/// endpoint. Words 2 and 3: its address as IPv6 (IPv4: mapped), in network order.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// See above.
    pub words: [u64; ORIGIN_WORDS],
}
assert_layout!(Origin, 32, [words: [u64; ORIGIN_WORDS]]);

impl Origin {
    /// Nobody's.
    pub const NONE: Self = Self { words: [0; ORIGIN_WORDS] };

    /// Of a connection from `peer`, by this caller.
    #[must_use]
    #[inline(always)]
    pub const fn new(endpoint_id: u32, peer: &EndpointKey, caller: &Caller) -> Self {
        let a = &peer.addr;
        let addr = if peer.family == FAMILY_V4 {
            [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]])]
        } else {
            [
                u64::from_ne_bytes([a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]]),
                u64::from_ne_bytes([a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]]),
            ]
        };
        let (cgroup_id, uid) = (caller.cgroup_id, caller.uid as u64);
        Self { words: [cgroup_id, (endpoint_id as u64) << 32 | uid, addr[0], addr[1]] }
    }

    /// The same caller, at any endpoint: who a grant is for.
    #[must_use]
    #[inline(always)]
    pub const fn caller(&self) -> Self {
        let [cgroup_id, uid, high, low] = self.words;
        Self { words: [cgroup_id, uid & 0xffff_ffff, high, low] }
    }

    /// Id of the caller's cgroup; 0: it is not known.
    #[must_use]
    pub const fn cgroup_id(&self) -> u64 {
        self.words[0]
    }

    /// The caller's user id; `u32::MAX`: it is not known.
    #[must_use]
    pub const fn uid(&self) -> u32 {
        self.words[1] as u32
    }

    /// The caller's address, in network order; IPv4 as a mapped one.
    #[must_use]
    pub const fn address(&self) -> [u8; 16] {
        let (high, low) = (self.words[2].to_ne_bytes(), self.words[3].to_ne_bytes());
        let mut out = [0; 16];
        let mut k = 0;
        while k < 8 {
            out[k] = high[k];
            out[k + 8] = low[k];
            k += 1;
        }
        out
    }
}

/// A caller between `connect` and its SYN, a moment later in the same call: `CONNECTING`, an LRU hash by the client's socket cookie. Writer:
/// connect. Reader and deleter: sock_ops. 4,096 entries; an evicted one leaves its caller unknown.
///
/// In the map it is [`super::Sealed`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connecting {
    /// Its key.
    pub cookie: u64,
    /// The caller.
    pub caller: Caller,
}
assert_layout!(Connecting, 56, [cookie: u64, caller: Caller]);

/// What both ends of a connection know of it before a byte has come, whatever was done to the address that it went to: key of `CALLERS`.
///
/// The sequence number tells connections apart that have the same client address in different network namespaces. A client can choose its
/// own, and may learn that of another: so each connection that begins in the cgroup replaces or removes what is noted under its key.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JoinKey {
    /// The client's end.
    pub client: EndpointKey,
    /// Sequence number of the client's first byte: its initial one and one more.
    pub first_byte_seq: u32,
}
assert_layout!(JoinKey, 24, [client: EndpointKey, first_byte_seq: u32]);

/// A caller whose SYN is on its way: `CALLERS`, an LRU hash. Writer and deleter: sock_ops, at the client's SYN and when the server's end is
/// there. 32,768 entries; connections to other places stay until they are evicted. An evicted one leaves its caller unknown. In the map it is
/// [`super::Sealed`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joining {
    /// Its key.
    pub key: JoinKey,
    /// The caller.
    pub caller: Caller,
}
assert_layout!(Joining, 72, [key: JoinKey, caller: Caller]);

/// A workload that may not connect to an endpoint: key of `BARRED`, a hash of [`Bar`]s.
/// Writer and deleter: the daemon. Reader: connect. 16,384 entries; who has no entry connects, and the daemon judges its first request.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Barred {
    /// Id of its cgroup.
    pub cgroup_id: u64,
    /// Number of the endpoint.
    pub endpoint_id: u32,
    /// Zero.
    pub zero: u32,
}
assert_layout!(Barred, 16, [cgroup_id: u64, endpoint_id: u32, zero: u32]);

/// Users that a [`Bar`] has room for.
pub const BAR_UIDS: usize = 6;

/// How far a workload may not connect.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Generation of the policy for which it holds.
    pub generation: u64,
    /// Users that may nevertheless.
    pub uids: [u32; BAR_UIDS],
    /// How many of those there are.
    pub uids_len: u32,
    /// Zero.
    pub zero: u32,
}
assert_layout!(Bar, 40, [generation: u64, uids: [u32; BAR_UIDS], uids_len: u32, zero: u32]);

/// Size of `BARRED`.
pub const MAX_BARRED: u32 = 16_384;

/// Where a connection to the unspecified address goes: to this host itself.
#[must_use]
#[inline(always)]
pub fn destination(key: EndpointKey) -> EndpointKey {
    let mut addr = key.addr;
    let mut k = 0;
    while k < 16 {
        if addr[k] != 0 {
            return key;
        }
        k += 1;
    }
    if key.family == FAMILY_V4 {
        addr[0] = 127;
        addr[3] = 1;
    } else {
        addr[15] = 1;
    }
    EndpointKey { addr, ..key }
}

/// Whether an address is of the host itself: 127.0.0.0/8 or ::1.
#[must_use]
#[inline(always)]
pub fn is_loopback(key: &EndpointKey) -> bool {
    if key.family == FAMILY_V4 {
        return key.addr[0] == 127;
    }
    let mut k = 0;
    while k < 15 {
        if key.addr[k] != 0 {
            return false;
        }
        k += 1;
    }
    key.addr[15] == 1
}

/// Size of `CONNECTING`.
pub const MAX_CONNECTING: u32 = 4_096;
/// Size of `CALLERS`.
pub const MAX_CALLERS: u32 = 32_768;
/// How long after its `connect` a caller is believed, in nanoseconds: Linux repeats a SYN for 127 seconds.
pub const JOIN_MAX_NS: u64 = 130 * 1_000_000_000;

/// Whether what was noted is of the connection with this `key`, and not too old.
#[must_use]
#[inline(always)]
pub fn is_joined(noted: &Joining, key: &JoinKey, now_ns: u64) -> bool {
    let age_ns = now_ns.wrapping_sub(noted.caller.connected_ns);
    noted.key.client.addr == key.client.addr
        && noted.key.client.port == key.client.port
        && noted.key.client.family == key.client.family
        && noted.key.first_byte_seq == key.first_byte_seq
        && age_ns <= JOIN_MAX_NS
        && noted.caller.is_known()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::FAMILY_V4;

    #[test]
    fn a_connection_to_nowhere_goes_to_this_host() {
        let key = |addr: [u8; 16], family| EndpointKey { addr, port: 80, family, zero: 0 };
        let mut loopback = [0; 16];
        loopback[15] = 1;
        assert_eq!(destination(key([0; 16], 6)), key(loopback, 6));
        let mut loopback = [0; 16];
        loopback[..4].copy_from_slice(&[127, 0, 0, 1]);
        assert_eq!(destination(key([0; 16], FAMILY_V4)), key(loopback, FAMILY_V4));
        assert_eq!(destination(key([1; 16], 6)), key([1; 16], 6));
    }

    #[test]
    fn only_its_own_connection_has_a_caller_and_not_for_ever() {
        let mut client = EndpointKey { addr: [0; 16], port: 40_000, family: FAMILY_V4, zero: 0 };
        client.addr[..4].copy_from_slice(&[127, 0, 0, 1]);
        let key = JoinKey { client, first_byte_seq: 7 };
        let caller = Caller { cgroup_id: 5, connected_ns: 1_000, ..Caller::UNKNOWN };
        let noted = Joining { key, caller };
        assert!(is_joined(&noted, &key, 1_000));
        assert!(is_joined(&noted, &key, 1_000 + JOIN_MAX_NS));
        assert!(!is_joined(&noted, &key, 1_001 + JOIN_MAX_NS));
        // A clock that seems to run backwards is no reason to believe.
        assert!(!is_joined(&noted, &key, 999));
        for other in [
            JoinKey { first_byte_seq: 8, ..key },
            JoinKey { client: EndpointKey { port: 40_001, ..client }, ..key },
            JoinKey { client: EndpointKey { addr: [1; 16], ..client }, ..key },
            JoinKey { client: EndpointKey { family: 6, ..client }, ..key },
        ] {
            assert!(!is_joined(&noted, &other, 1_000));
        }
        assert!(!is_joined(&Joining { caller: Caller { cgroup_id: 0, ..caller }, ..noted }, &key, 1_000));
    }
}
