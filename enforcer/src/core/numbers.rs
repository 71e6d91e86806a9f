//! Numbers of servers and endpoints: what the kernel's maps, digests and grants know them by.

use std::collections::{BTreeMap, BTreeSet};

use enforcer_common::abi::{EndpointKey, MAX_ENDPOINTS, MAX_SERVERS};

use super::endpoints::keys;
use crate::policy::Policy;

/// Why a policy's servers and endpoints can't all have a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NumbersError {
    /// The kernel's table of endpoints is too small, also while those of the old policy are still in it.
    #[error(
        "old and new policy together have {found} endpoints; the kernel's table holds {MAX_ENDPOINTS}: remove some in a first step"
    )]
    TooManyEndpoints {
        /// Endpoints of both.
        found: usize,
    },
    /// More servers than numbers.
    #[error("the policy has more than {MAX_SERVERS} servers")]
    TooManyServers,
    /// Every number for an endpoint was given once.
    #[error("no number is left for a new endpoint; start the daemon anew")]
    Exhausted,
}

/// Which number each server (by name) and each endpoint (by address) has. A number stays with its owner from policy to policy, so
/// that flows, grants and digests go on meaning the same; an owner that went and came back is a new one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numbers {
    servers: BTreeMap<String, u32>,
    endpoints: BTreeMap<EndpointKey, u32>,
    /// Every number from here on was never given.
    next_server_id: u32,
    next_endpoint_id: u32,
}

impl Numbers {
    /// The numbers that an earlier daemon gave, as they stand in the kernel's maps.
    pub fn found(
        servers: impl IntoIterator<Item = (u32, String)>,
        endpoints: impl IntoIterator<Item = (EndpointKey, u32)>,
    ) -> Self {
        let servers: BTreeMap<_, _> = servers.into_iter().map(|(id, name)| (name, id)).collect();
        let endpoints: BTreeMap<_, _> = endpoints.into_iter().collect();
        // What it had given before is not known; it went with a generation of its own.
        let after = |ids: Option<&u32>| ids.map_or(0, |id| id.saturating_add(1));
        let next_server_id = after(servers.values().max());
        let next_endpoint_id = after(endpoints.values().max());
        Self { servers, endpoints, next_server_id, next_endpoint_id }
    }

    /// The numbers under the next policy; of the first one, for the default value. Servers and endpoints are numbered in the order
    /// of the file.
    ///
    /// # Errors
    /// See [`NumbersError`].
    pub fn next(&self, policy: &Policy) -> Result<Self, NumbersError> {
        let mut next = Self {
            servers: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            next_server_id: self.next_server_id,
            next_endpoint_id: self.next_endpoint_id,
        };
        for server in &policy.servers {
            if let Some(id) = self.servers.get(&server.name) {
                next.servers.insert(server.name.clone(), *id);
            }
        }
        for server in &policy.servers {
            if !next.servers.contains_key(&server.name) {
                let id = next.fresh_server_id(self)?;
                next.servers.insert(server.name.clone(), id);
            }
            for key in server.listen.iter().flat_map(|listen| keys(*listen)) {
                let id = match self.endpoints.get(&key).or_else(|| next.endpoints.get(&key)) {
                    Some(id) => *id,
                    None => {
                        let id = next.next_endpoint_id;
                        next.next_endpoint_id = id.checked_add(1).ok_or(NumbersError::Exhausted)?;
                        id
                    }
                };
                next.endpoints.insert(key, id);
            }
        }
        let both: BTreeSet<_> = self.endpoints.keys().chain(next.endpoints.keys()).collect();
        if both.len() > MAX_ENDPOINTS as usize {
            return Err(NumbersError::TooManyEndpoints { found: both.len() });
        }
        Ok(next)
    }

    /// A number that no server had, if there is one left; else one that none of the old and new policy has.
    fn fresh_server_id(&mut self, old: &Self) -> Result<u32, NumbersError> {
        if self.next_server_id < MAX_SERVERS {
            self.next_server_id += 1;
            return Ok(self.next_server_id - 1);
        }
        let taken = |numbers: &Self, id: u32| numbers.servers.values().any(|taken| *taken == id);
        let free = |id: &u32| !taken(self, *id) && !taken(old, *id);
        let unused = |id: &u32| !taken(self, *id);
        (0..MAX_SERVERS)
            .find(free)
            .or_else(|| (0..MAX_SERVERS).find(unused))
            .ok_or(NumbersError::TooManyServers)
    }

    /// A server's number.
    #[must_use]
    pub fn server(&self, name: &str) -> Option<u32> {
        self.servers.get(name).copied()
    }

    /// All servers with their numbers.
    pub fn servers(&self) -> impl Iterator<Item = (&str, u32)> {
        self.servers.iter().map(|(name, id)| (name.as_str(), *id))
    }

    /// All endpoints with their numbers.
    pub fn endpoints(&self) -> impl Iterator<Item = (EndpointKey, u32)> {
        self.endpoints.iter().map(|(key, id)| (*key, *id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy;

    fn policy(servers: &[(&str, &str)]) -> Policy {
        let mut text = String::from(
            "version: 1\nissuers:\n  - {name: i, issuer: 'https://i.example', keys: {discovery: true}, algorithms: [ES256]}\nservers:\n",
        );
        for (name, listen) in servers {
            text.push_str(&format!(
                "  - {{name: {name}, listen: ['{listen}'], resource: 'https://{name}.example/mcp', issuers: [i]}}\n"
            ));
        }
        policy::parse("test.yaml", &text).unwrap().0
    }

    fn id(numbers: &Numbers, addr: [u8; 4], port: u16) -> Option<u32> {
        let found = numbers.endpoints().find(|(key, _)| key.addr[..4] == addr && key.port == port);
        found.map(|(_, id)| id)
    }

    #[test]
    fn who_stays_keeps_its_number_wherever_it_stands() {
        let first = Numbers::default()
            .next(&policy(&[("a", "10.0.0.1:1"), ("b", "10.0.0.1:2"), ("c", "10.0.0.1:3")]))
            .unwrap();
        assert_eq!((first.server("a"), first.server("b"), first.server("c")), (Some(0), Some(1), Some(2)));
        let second =
            first.next(&policy(&[("d", "10.0.0.1:4"), ("c", "10.0.0.1:3"), ("a", "10.0.0.1:5")])).unwrap();
        assert_eq!((second.server("a"), second.server("b"), second.server("c")), (Some(0), None, Some(2)));
        assert_eq!(second.server("d"), Some(3));
        assert_eq!(id(&second, [10, 0, 0, 1], 3), id(&first, [10, 0, 0, 1], 3));
        assert_eq!(id(&second, [10, 0, 0, 1], 1), None);
        let fresh = [id(&second, [10, 0, 0, 1], 4), id(&second, [10, 0, 0, 1], 5)];
        assert!(fresh.iter().all(|new| first.endpoints().all(|(_, old)| Some(old) != *new)));
        // Who comes back is a new one: nothing that was written for the old one may be taken for it.
        let third = second.next(&policy(&[("b", "10.0.0.1:2")])).unwrap();
        assert_eq!(third.server("b"), Some(4));
        assert_ne!(id(&third, [10, 0, 0, 1], 2), id(&first, [10, 0, 0, 1], 2));
    }

    #[test]
    fn the_next_daemon_finds_them_in_the_maps() {
        let first = Numbers::default().next(&policy(&[("a", "10.0.0.1:1"), ("b", "10.0.0.1:2")])).unwrap();
        let second = first.next(&policy(&[("b", "10.0.0.1:2"), ("c", "10.0.0.1:3")])).unwrap();
        let servers = second.servers().map(|(name, id)| (id, name.to_owned()));
        assert_eq!(Numbers::found(servers, second.endpoints()), second);
        assert_eq!(Numbers::found([], []), Numbers::default());
    }

    #[test]
    fn equal_policies_have_equal_numbers() {
        let policy = policy(&[("a", "[::]:1"), ("b", "10.0.0.1:2")]);
        let first = Numbers::default().next(&policy).unwrap();
        assert_eq!(first.endpoints().count(), 3);
        assert_eq!(first.next(&policy).unwrap(), first);
    }

    #[test]
    fn server_numbers_are_used_again_only_when_all_were_given() {
        let mut numbers = Numbers::default();
        for round in 0..3000_u32 {
            let name = format!("s{round}");
            let next = numbers.next(&policy(&[(&name, "10.0.0.1:1"), ("stays", "10.0.0.1:2")])).unwrap();
            let id = next.server(&name).unwrap();
            assert!(id < MAX_SERVERS && Some(id) != next.server("stays"));
            if let Some(before) = round.checked_sub(1) {
                assert_ne!(Some(id), numbers.server(&format!("s{before}")), "an old grant could name it");
                assert_eq!(next.server("stays"), numbers.server("stays"));
            }
            numbers = next;
        }
    }

    #[test]
    fn a_full_table_of_endpoints_is_an_error() {
        let many = |from: u16| {
            let servers: Vec<_> = (0..40).map(|k| format!("s{k}")).collect();
            let mut text = String::from(
                "version: 1\nissuers:\n  - {name: i, issuer: 'https://i.example', keys: {discovery: true}, algorithms: [ES256]}\nservers:\n",
            );
            for (k, name) in servers.iter().enumerate() {
                let listen: Vec<_> =
                    (0..60).map(|port| format!("'10.0.0.1:{}'", from + k as u16 * 60 + port)).collect();
                text.push_str(&format!(
                    "  - {{name: {name}, listen: [{}], resource: 'https://{name}.example/mcp', issuers: [i]}}\n",
                    listen.join(", ")
                ));
            }
            policy::parse("test.yaml", &text).unwrap().0
        };
        let first = Numbers::default().next(&many(1)).unwrap();
        assert_eq!(first.next(&many(1)).unwrap(), first);
        assert_eq!(first.next(&many(10_000)), Err(NumbersError::TooManyEndpoints { found: 4800 }));
    }
}
