//! From the listeners of a policy to the endpoints that the kernel knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use enforcer_common::abi::{EndpointKey, FAMILY_V4, FAMILY_V6};

use super::Numbers;
use crate::policy::{Listen, Policy, Server};

/// An endpoint and the servers behind it.
#[derive(Debug, Clone)]
pub struct EndpointPolicy {
    /// Its keys in the kernel's map.
    pub key: EndpointKey,
    /// Servers that listen on it, with their numbers.
    pub servers: Vec<(u32, Arc<Server>)>,
}

/// All endpoints of a policy, by number.
#[derive(Debug, Clone, Default)]
pub struct Endpoints(pub BTreeMap<u32, EndpointPolicy>);

/// The kernel's keys of a listener: `::` accepts both families.
pub(super) fn keys(listen: Listen) -> Vec<EndpointKey> {
    let v4 = |addr: Ipv4Addr| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&addr.octets());
        EndpointKey { addr: bytes, port: listen.port, family: FAMILY_V4, zero: 0 }
    };
    let v6 =
        |addr: Ipv6Addr| EndpointKey { addr: addr.octets(), port: listen.port, family: FAMILY_V6, zero: 0 };
    match listen.addr {
        IpAddr::V4(addr) => vec![v4(addr)],
        IpAddr::V6(addr) if addr.is_unspecified() => vec![v6(addr), v4(Ipv4Addr::UNSPECIFIED)],
        IpAddr::V6(addr) => vec![v6(addr)],
    }
}

/// Keys of all listeners of a policy.
#[must_use]
pub fn endpoint_keys(policy: &Policy) -> BTreeSet<EndpointKey> {
    policy.servers.iter().flat_map(|server| &server.listen).flat_map(|listen| keys(*listen)).collect()
}

impl Endpoints {
    /// No address.
    pub(super) const NOWHERE: EndpointKey =
        EndpointKey { addr: [0; 16], port: 0, family: FAMILY_V6, zero: 0 };

    /// Names of the servers on an endpoint.
    #[must_use]
    pub fn names(&self, endpoint_id: u32) -> String {
        let servers =
            self.0.get(&endpoint_id).map(|endpoint| endpoint.servers.as_slice()).unwrap_or_default();
        servers.iter().map(|(_, server)| server.name.as_str()).collect::<Vec<_>>().join(",")
    }

    /// The endpoints of a policy under the numbers that were given for it. An endpoint's servers are all whose listeners cover it: a
    /// connection to `127.0.0.1:80` reaches who listens there and who listens on `0.0.0.0:80` or `[::]:80`.
    #[must_use]
    pub fn of(policy: &Policy, numbers: &Numbers) -> Self {
        let covers = |server: &Server, key: &EndpointKey| {
            let mut own = server.listen.iter().flat_map(|listen| keys(*listen));
            own.any(|listen| listen == *key || listen == key.wildcard())
        };
        let endpoint = |key: EndpointKey| {
            let servers = policy.servers.iter().filter(|server| covers(server, &key));
            let numbered =
                servers.filter_map(|server| Some((numbers.server(&server.name)?, Arc::clone(server))));
            EndpointPolicy { key, servers: numbered.collect() }
        };
        Self(numbers.endpoints().map(|(key, id)| (id, endpoint(key))).collect())
    }

    /// The servers on all endpoints, by number.
    #[must_use]
    pub fn servers(&self) -> BTreeMap<u32, Arc<Server>> {
        let servers = self.0.values().flat_map(|endpoint| &endpoint.servers);
        servers.map(|(id, server)| (*id, Arc::clone(server))).collect()
    }
}
