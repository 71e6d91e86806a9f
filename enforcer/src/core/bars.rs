//! Which workloads can't connect to which endpoints at all, as far as their cgroups tell.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use enforcer_common::abi::{BAR_UIDS, Bar, Barred, MAX_BARRED};

use super::Endpoints;
use crate::policy::WorkloadRule;
use crate::workload::{CallerView, Workload};

/// The workloads that no server of an endpoint admits, whatever address they call from, but for those of their users that one may admit.
/// Those that one may admit are judged by their requests. At most as many as the kernel has room for: who is left out is judged so too.
#[must_use]
pub fn barred<'w>(
    endpoints: &Endpoints,
    generation: u64,
    workloads: impl IntoIterator<Item = &'w Workload>,
) -> BTreeMap<Barred, Bar> {
    let closed: Vec<_> = endpoints
        .0
        .iter()
        .filter(|(_, endpoint)| endpoint.servers.iter().all(|(_, s)| s.callers.is_some()))
        .collect();
    let mut barred = BTreeMap::new();
    if closed.is_empty() {
        return barred;
    }
    for workload in workloads {
        for (endpoint_id, endpoint) in &closed {
            let rules = endpoint.servers.iter().filter_map(|(_, server)| server.callers.as_deref()).flatten();
            let admitted = rules.filter(|rule| may_match(rule, workload));
            if let Some(bar) = bar(admitted.map(AsRef::as_ref), generation)
                && barred.len() < MAX_BARRED as usize
            {
                let key = Barred { cgroup_id: workload.cgroup_id, endpoint_id: **endpoint_id, zero: 0 };
                barred.insert(key, bar);
            }
        }
    }
    barred
}

/// What is left to a workload that these rules may match; `None`: any of its users may be admitted, or more than there is room for.
fn bar<'r>(rules: impl Iterator<Item = &'r WorkloadRule>, generation: u64) -> Option<Bar> {
    let mut users = BTreeSet::new();
    for rule in rules {
        if rule.uids.is_empty() {
            return None;
        }
        users.extend(rule.uids.iter().copied());
    }
    let mut bar =
        Bar { generation, uids: [0; BAR_UIDS], uids_len: u32::try_from(users.len()).ok()?, zero: 0 };
    if users.len() > BAR_UIDS {
        return None;
    }
    bar.uids.iter_mut().zip(users).for_each(|(to, uid)| *to = uid);
    Some(bar)
}

/// Whether somebody has to look for workloads.
#[must_use]
pub fn some_closed(endpoints: &Endpoints) -> bool {
    endpoints.0.values().flat_map(|endpoint| &endpoint.servers).any(|(_, server)| server.callers.is_some())
}

/// Whether the rule may match some caller in the cgroup. Labels are not looked at: they take files to read.
fn may_match(rule: &WorkloadRule, workload: &Workload) -> bool {
    let by_path = WorkloadRule { labels: Vec::new(), uids: Vec::new(), networks: Vec::new(), ..rule.clone() };
    let address = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    !by_path.needs_path()
        || by_path.matches(&CallerView { workload: Some(workload), uid: 0, address, is_of_this_host: true })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use enforcer_common::abi::{EndpointKey, FAMILY_V4};

    use super::*;
    use crate::core::EndpointPolicy;
    use crate::http::test_server::server;
    use crate::policy::{Network, Server};

    fn unit(name: &str) -> WorkloadRule {
        WorkloadRule { units: vec![name.to_owned()], ..WorkloadRule::default() }
    }

    fn server_for(callers: Option<Vec<WorkloadRule>>) -> Arc<Server> {
        let callers = callers.map(|rules| rules.into_iter().map(Arc::new).collect());
        Arc::new(Server { callers, ..server("/mcp") })
    }

    fn barred_at(servers: Vec<Arc<Server>>) -> Vec<u64> {
        let barred = bars_at(servers);
        assert!(barred.values().all(|bar| bar.uids_len == 0));
        barred.into_keys().map(|barred| barred.cgroup_id).collect()
    }

    fn bars_at(servers: Vec<Arc<Server>>) -> BTreeMap<Barred, Bar> {
        let key = EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 };
        let servers = servers.into_iter().map(|server| (0, server)).collect();
        let endpoints = Endpoints(BTreeMap::from([(5, EndpointPolicy { key, servers })]));
        let workloads = [
            Workload::of(1, Some("/system.slice/a.service".to_owned())),
            Workload::of(2, Some("/system.slice/b.service".to_owned())),
            Workload::of(3, Some("/made/by/hand".to_owned())),
        ];
        let barred = barred(&endpoints, 9, &workloads);
        assert!(barred.iter().all(|(barred, bar)| barred.endpoint_id == 5 && bar.generation == 9));
        barred
    }

    #[test]
    fn only_who_can_never_be_admitted() {
        assert_eq!(barred_at(vec![server_for(None)]), [0_u64; 0]);
        assert_eq!(barred_at(vec![server_for(Some(vec![unit("a.service")]))]), [2, 3]);
        assert_eq!(barred_at(vec![server_for(Some(vec![unit("a.service"), unit("b.service")]))]), [3]);
        // Networks are known when it calls.
        let network = WorkloadRule {
            networks: vec![Network::parse("10.0.0.0/8").expect("a network")],
            ..WorkloadRule::default()
        };
        assert_eq!(barred_at(vec![server_for(Some(vec![network]))]), [0_u64; 0]);
    }

    #[test]
    fn users_that_may_be_admitted_are_let_through() {
        let of = |uids: &[u32], rule: WorkloadRule| WorkloadRule { uids: uids.to_vec(), ..rule };
        let users = |rules: Vec<WorkloadRule>| -> Vec<(u64, Vec<u32>)> {
            let shown =
                |(key, bar): (Barred, Bar)| (key.cgroup_id, bar.uids[..bar.uids_len as usize].to_vec());
            bars_at(vec![server_for(Some(rules))]).into_iter().map(shown).collect()
        };
        let anywhere = || of(&[1001, 1000], WorkloadRule::default());
        let all = |uids: &[u32]| [1, 2, 3].map(|cgroup| (cgroup, uids.to_vec()));
        assert_eq!(users(vec![anywhere()]), all(&[1000, 1001]));
        assert_eq!(users(vec![of(&[7], unit("a.service"))]), [(1, vec![7]), (2, vec![]), (3, vec![])]);
        assert_eq!(users(vec![unit("a.service"), anywhere()]), all(&[1000, 1001])[1..]);
        assert_eq!(users(vec![of(&[0, 1, 2, 3, 4, 5], WorkloadRule::default())]), all(&[0, 1, 2, 3, 4, 5]));
        assert_eq!(users(vec![of(&[0, 1, 2, 3, 4, 5, 6], WorkloadRule::default())]), []);
    }

    #[test]
    fn one_server_of_the_endpoint_is_enough() {
        let [a, b] = ["a.service", "b.service"].map(|name| server_for(Some(vec![unit(name)])));
        assert_eq!(barred_at(vec![Arc::clone(&a), b]), [3]);
        assert_eq!(barred_at(vec![a, server_for(None)]), [0_u64; 0]);
    }
}
