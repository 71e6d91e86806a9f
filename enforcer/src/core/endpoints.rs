//! From the listeners of a policy to the endpoints that the kernel knows.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use enforcer_common::abi::{EndpointKey, FAMILY_V4, FAMILY_V6};

use crate::policy::{Listen, Policy, Server};

/// An endpoint and the servers behind it.
#[derive(Debug, Clone)]
pub struct EndpointPolicy {
    /// Its keys in the kernel's map.
    pub key: EndpointKey,
    /// Servers that listen on it, with their numbers in the policy.
    pub servers: Vec<(u32, Arc<Server>)>,
}

/// All endpoints of a policy; the position is the endpoint's number.
#[derive(Debug, Clone, Default)]
pub struct Endpoints(pub Vec<EndpointPolicy>);

/// The kernel's keys of a listener: `::` accepts both families.
fn keys(listen: Listen) -> Vec<EndpointKey> {
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

impl Endpoints {
    /// The endpoints of a policy. An endpoint's servers are all whose listeners cover it: a connection to `127.0.0.1:80` reaches
    /// who listens there and who listens on `0.0.0.0:80` or `[::]:80`.
    #[must_use]
    pub fn of(policy: &Policy) -> Self {
        let mut endpoints = BTreeMap::new();
        for listen in policy.servers.iter().flat_map(|server| &server.listen) {
            for key in keys(*listen) {
                endpoints.entry(key).or_insert_with(Vec::new);
            }
        }
        for (key, servers) in &mut endpoints {
            for (id, server) in policy.servers.iter().enumerate() {
                let covers = server
                    .listen
                    .iter()
                    .flat_map(|listen| keys(*listen))
                    .any(|listen| listen == *key || listen == key.wildcard());
                if covers {
                    servers.push((id as u32, Arc::clone(server)));
                }
            }
        }
        Self(endpoints.into_iter().map(|(key, servers)| EndpointPolicy { key, servers }).collect())
    }
}
