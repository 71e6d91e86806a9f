//! Which sockets at protected endpoints the kernel programs do not see.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use enforcer_common::abi::{EndpointKey, FAMILY_V4, FAMILY_V6};

use crate::datapath::TcpSocket;

/// Whose sockets the programs see: those that were made in a cgroup of the guarded subtree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// The root is guarded, and with it every socket.
    Everything,
    /// The cgroups with these ids.
    Cgroups(BTreeSet<u64>),
}

impl Scope {
    fn holds(&self, socket: &TcpSocket) -> bool {
        match self {
            Self::Everything => true,
            Self::Cgroups(ids) => socket.cgroup_id.is_some_and(|id| ids.contains(&id)),
        }
    }
}

/// Why connections that a listener accepts are not guarded, or not all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gap {
    /// Its socket was made outside the guarded cgroup: none is.
    Outside,
    /// It takes connections to more addresses than the policy names: those to the others are not.
    Wider,
}

/// Connected sockets at protected endpoints, in the guarded cgroup, that have no flow record. `is_flow` must look at the
/// records *after* the sockets were listed, or what was accepted in between is taken for unguarded.
pub(super) fn connections(
    sockets: &[TcpSocket],
    endpoints: &BTreeSet<EndpointKey>,
    scope: &Scope,
    is_flow: impl Fn(u64) -> bool,
) -> Vec<TcpSocket> {
    let unguarded = |socket: &&TcpSocket| {
        !socket.listens
            && is_protected(endpoints, socket.ends.local)
            && scope.holds(socket)
            && !is_flow(socket.cookie)
    };
    sockets.iter().filter(unguarded).copied().collect()
}

/// Listeners that accept connections to a protected endpoint, and others that are not guarded.
pub(super) fn listeners(
    sockets: &[TcpSocket],
    endpoints: &BTreeSet<EndpointKey>,
    scope: &Scope,
) -> Vec<(TcpSocket, Gap)> {
    let gap = |socket: &TcpSocket| {
        let addresses = addresses(socket);
        let concerned = addresses.iter().any(|address| reaches(endpoints, *address));
        let gap = if !scope.holds(socket) {
            Gap::Outside
        } else if addresses.iter().any(|address| !is_protected(endpoints, *address)) {
            Gap::Wider
        } else {
            return None;
        };
        (socket.listens && concerned).then_some((*socket, gap))
    };
    sockets.iter().filter_map(gap).collect()
}

/// As the kernel looks an address up.
fn is_protected(endpoints: &BTreeSet<EndpointKey>, key: EndpointKey) -> bool {
    endpoints.contains(&key) || endpoints.contains(&key.wildcard())
}

/// Whether a connection to this address, or to one that this wildcard stands for, can be one to a protected endpoint.
fn reaches(endpoints: &BTreeSet<EndpointKey>, key: EndpointKey) -> bool {
    is_protected(endpoints, key)
        || key == key.wildcard()
            && endpoints.iter().any(|endpoint| (endpoint.port, endpoint.family) == (key.port, key.family))
}

/// What a listener takes connections to: one on `::` also those to every IPv4 address, unless it was told not to.
fn addresses(socket: &TcpSocket) -> Vec<EndpointKey> {
    let local = socket.ends.local;
    let dual = local.family == FAMILY_V6 && local.addr == Ipv6Addr::UNSPECIFIED.octets() && !socket.v6_only;
    let mut addresses = vec![local];
    addresses.extend(dual.then_some(EndpointKey { family: FAMILY_V4, ..local }));
    addresses
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use enforcer_common::abi::Ends;

    use super::*;

    const INSIDE: u64 = 7;

    fn key(addr: &str) -> EndpointKey {
        let addr: SocketAddr = addr.parse().unwrap();
        let mut bytes = [0; 16];
        let family = match addr.ip() {
            IpAddr::V4(ip) => {
                bytes[..4].copy_from_slice(&ip.octets());
                FAMILY_V4
            }
            IpAddr::V6(ip) => {
                bytes = ip.octets();
                FAMILY_V6
            }
        };
        EndpointKey { addr: bytes, port: addr.port(), family, zero: 0 }
    }

    fn socket(local: &str, listens: bool, cgroup_id: u64) -> TcpSocket {
        TcpSocket {
            cookie: 1,
            netns_cookie: 1,
            interface: 0,
            ends: Ends { local: key(local), peer: key("192.0.2.1:9") },
            listens,
            v6_only: false,
            cgroup_id: Some(cgroup_id),
            inode: 1,
        }
    }

    fn endpoints(keys: &[&str]) -> BTreeSet<EndpointKey> {
        keys.iter().map(|text| key(text)).collect()
    }

    #[test]
    fn a_connection_is_unguarded_at_an_endpoint_inside_without_a_record() {
        let scope = Scope::Cgroups(BTreeSet::from([INSIDE]));
        let found = |local: &str, listens, cgroup, scope: &Scope, flow: bool| {
            let endpoints = endpoints(&["127.0.0.1:80", "[::]:443", "0.0.0.0:443"]);
            !connections(&[socket(local, listens, cgroup)], &endpoints, scope, |_| flow).is_empty()
        };
        assert!(found("127.0.0.1:80", false, INSIDE, &scope, false));
        assert!(found("192.0.2.2:443", false, INSIDE, &scope, false));
        assert!(found("[fe80::1]:443", false, INSIDE, &scope, false));
        assert!(found("127.0.0.1:80", false, 8, &Scope::Everything, false));
        // It has a record; it listens; another address, port or family; another cgroup.
        assert!(!found("127.0.0.1:80", false, INSIDE, &scope, true));
        assert!(!found("127.0.0.1:80", true, INSIDE, &scope, false));
        assert!(!found("127.0.0.2:80", false, INSIDE, &scope, false));
        assert!(!found("127.0.0.1:81", false, INSIDE, &scope, false));
        assert!(!found("[::1]:80", false, INSIDE, &scope, false));
        assert!(!found("127.0.0.1:80", false, 8, &scope, false));
        let nowhere = TcpSocket { cgroup_id: None, ..socket("127.0.0.1:80", false, 0) };
        assert!(connections(&[nowhere], &endpoints(&["127.0.0.1:80"]), &scope, |_| false).is_empty());
    }

    #[test]
    fn listeners_outside_the_cgroup_or_wider_than_the_policy_are_found() {
        let scope = Scope::Cgroups(BTreeSet::from([INSIDE]));
        let gap = |listens_on: &str, v6_only, cgroup, protected: &[&str]| {
            let socket = TcpSocket { v6_only, ..socket(listens_on, true, cgroup) };
            listeners(&[socket], &endpoints(protected), &scope).first().map(|found| found.1)
        };
        for (listens_on, v6_only, cgroup, protected, expected) in [
            ("127.0.0.1:80", false, INSIDE, &["127.0.0.1:80"][..], None),
            ("127.0.0.1:80", false, INSIDE, &["0.0.0.0:80"], None),
            ("0.0.0.0:80", false, INSIDE, &["0.0.0.0:80"], None),
            ("[::]:80", false, INSIDE, &["0.0.0.0:80", "[::]:80"], None),
            ("[::]:80", true, INSIDE, &["[::]:80"], None),
            ("0.0.0.0:80", false, INSIDE, &["127.0.0.1:80"], Some(Gap::Wider)),
            ("[::]:80", false, INSIDE, &["[::]:80"], Some(Gap::Wider)),
            ("[::]:80", false, INSIDE, &["0.0.0.0:80"], Some(Gap::Wider)),
            ("[::]:80", false, INSIDE, &["127.0.0.1:80"], Some(Gap::Wider)),
            ("[::]:80", true, INSIDE, &["0.0.0.0:80"], None),
            ("127.0.0.1:80", false, 8, &["127.0.0.1:80"], Some(Gap::Outside)),
            ("0.0.0.0:80", false, 8, &["127.0.0.1:80"], Some(Gap::Outside)),
            ("[::]:80", false, 8, &["127.0.0.1:80"], Some(Gap::Outside)),
            // None of the policy's.
            ("127.0.0.9:80", false, 8, &["127.0.0.1:80"], None),
            ("0.0.0.0:81", false, 8, &["127.0.0.1:80"], None),
            ("[::1]:80", false, 8, &["127.0.0.1:80"], None),
        ] {
            assert_eq!(gap(listens_on, v6_only, cgroup, protected), expected, "{listens_on}, {protected:?}");
        }
        let connected = socket("127.0.0.1:80", false, 8);
        assert!(listeners(&[connected], &endpoints(&["127.0.0.1:80"]), &scope).is_empty());
    }
}
