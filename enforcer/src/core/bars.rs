//! Which workloads can't connect to which endpoints at all, as far as their cgroups tell.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use enforcer_common::abi::{Barred, MAX_BARRED};

use super::Endpoints;
use crate::policy::{Server, WorkloadRule};
use crate::workload::{CallerView, Workload};

/// The workloads that no server of an endpoint admits, whatever user and address they call from. Those that one may admit are judged by
/// their requests. At most as many as the kernel has room for: who is left out is judged so too.
#[must_use]
pub fn barred<'w>(
    endpoints: &Endpoints,
    workloads: impl IntoIterator<Item = &'w Workload>,
) -> BTreeSet<Barred> {
    let closed: Vec<_> = endpoints
        .0
        .iter()
        .filter(|(_, endpoint)| endpoint.servers.iter().all(|(_, s)| s.callers.is_some()))
        .collect();
    let mut barred = BTreeSet::new();
    if closed.is_empty() {
        return barred;
    }
    for workload in workloads {
        for (endpoint_id, endpoint) in &closed {
            let admitted = endpoint.servers.iter().any(|(_, server)| may_admit(server, workload));
            if !admitted && barred.len() < MAX_BARRED as usize {
                barred.insert(Barred { cgroup_id: workload.cgroup_id, endpoint_id: **endpoint_id, zero: 0 });
            }
        }
    }
    barred
}

/// Whether somebody has to look for workloads.
#[must_use]
pub fn some_closed(endpoints: &Endpoints) -> bool {
    endpoints.0.values().flat_map(|endpoint| &endpoint.servers).any(|(_, server)| server.callers.is_some())
}

fn may_admit(server: &Server, workload: &Workload) -> bool {
    server.callers.as_ref().is_none_or(|rules| rules.iter().any(|rule| may_match(rule, workload)))
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
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use enforcer_common::abi::{EndpointKey, FAMILY_V4};

    use super::*;
    use crate::core::EndpointPolicy;
    use crate::http::test_server::server;
    use crate::policy::Network;

    fn unit(name: &str) -> WorkloadRule {
        WorkloadRule { units: vec![name.to_owned()], ..WorkloadRule::default() }
    }

    fn server_for(callers: Option<Vec<WorkloadRule>>) -> Arc<Server> {
        let callers = callers.map(|rules| rules.into_iter().map(Arc::new).collect());
        Arc::new(Server { callers, ..server("/mcp") })
    }

    fn barred_at(servers: Vec<Arc<Server>>) -> Vec<u64> {
        let key = EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 };
        let servers = servers.into_iter().map(|server| (0, server)).collect();
        let endpoints = Endpoints(BTreeMap::from([(5, EndpointPolicy { key, servers })]));
        let workloads = [
            Workload::of(1, Some("/system.slice/a.service".to_owned())),
            Workload::of(2, Some("/system.slice/b.service".to_owned())),
            Workload::of(3, Some("/made/by/hand".to_owned())),
        ];
        let barred = barred(&endpoints, &workloads);
        assert!(barred.iter().all(|barred| barred.endpoint_id == 5));
        barred.into_iter().map(|barred| barred.cgroup_id).collect()
    }

    #[test]
    fn only_who_can_never_be_admitted() {
        assert_eq!(barred_at(vec![server_for(None)]), [0_u64; 0]);
        assert_eq!(barred_at(vec![server_for(Some(vec![unit("a.service")]))]), [2, 3]);
        assert_eq!(barred_at(vec![server_for(Some(vec![unit("a.service"), unit("b.service")]))]), [3]);
        // Users and networks are known when it calls.
        let user = WorkloadRule { uids: vec![1000], ..WorkloadRule::default() };
        assert_eq!(barred_at(vec![server_for(Some(vec![user]))]), [0_u64; 0]);
        let unit_and_user = WorkloadRule { uids: vec![1000], ..unit("a.service") };
        assert_eq!(barred_at(vec![server_for(Some(vec![unit_and_user]))]), [2, 3]);
        let network = WorkloadRule {
            networks: vec![Network::parse("10.0.0.0/8").expect("a network")],
            ..WorkloadRule::default()
        };
        assert_eq!(barred_at(vec![server_for(Some(vec![network]))]), [0_u64; 0]);
    }

    #[test]
    fn one_server_of_the_endpoint_is_enough() {
        let [a, b] = ["a.service", "b.service"].map(|name| server_for(Some(vec![unit(name)])));
        assert_eq!(barred_at(vec![Arc::clone(&a), b]), [3]);
        assert_eq!(barred_at(vec![a, server_for(None)]), [0_u64; 0]);
    }
}
