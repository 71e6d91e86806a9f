//! Tokens that are bound to workloads.

use super::*;
use crate::policy::{BindRule, BindTo, Server, WorkloadRule};
use crate::workload::Workload;

fn bound(bench: &mut Bench, change: impl FnOnce(&mut Server, Arc<WorkloadRule>)) {
    let agent = WorkloadRule { units: vec!["agent.service".to_owned()], ..WorkloadRule::default() };
    let endpoint = bench.engine.endpoints.0.get_mut(&0).unwrap();
    change(Arc::make_mut(&mut endpoint.servers[0].1), Arc::new(agent));
}

fn caller(path: &str) -> CallerFacts {
    let caller = Caller { cgroup_id: 7, ..Caller::UNKNOWN };
    let workload = Some(Arc::new(Workload::of(7, Some(path.to_owned()))));
    CallerFacts { caller, workload, ..CallerFacts::NOTHING }
}

#[test]
fn a_bound_token_is_good_from_its_workload_alone() {
    let to = |server: &mut Server, agent| {
        let to = BindTo::Workloads(vec![agent]);
        server.bind = vec![BindRule { issuer: None, subject: Some("alice".to_owned()), client_id: None, to }];
    };
    for (from, reason) in [
        (caller("/agent.service"), "allowed"),
        (caller("/other.service"), "token-of-another-workload"),
        (CallerFacts::NOTHING, "caller-unknown"),
    ] {
        let mut bench = Bench::new();
        bound(&mut bench, to);
        bench.fake.caller = from;
        let request = bench.good("", "");
        bench.punt(request.as_bytes(), 0, 0);
        assert_eq!(bench.fake.counts, [reason]);
        let passed = reason == "allowed";
        assert_eq!(bench.fake.server.is_empty(), !passed);
        assert_eq!(bench.fake.grants.is_empty(), !passed);
        assert_eq!(bench.fake.client.starts_with(b"HTTP/1.1 401 "), !passed);
    }
}

#[test]
fn who_may_not_call_a_server_reaches_nothing_of_it() {
    let mut bench = Bench::new();
    bound(&mut bench, |server, agent| server.callers = Some(vec![agent]));
    bench.fake.caller = caller("/other.service");
    bench.punt(bench.good("", "").as_bytes(), 0, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.client.starts_with(b"HTTP/1.1 403 "));
    assert_eq!(bench.fake.counts, ["caller-not-allowed"]);
}
