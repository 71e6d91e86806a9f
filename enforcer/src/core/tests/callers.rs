//! Tokens that are bound to workloads.

use super::*;
use crate::policy::{BindRule, BindTo, Dimension, Limit, Rate, Server, WorkloadRule};
use crate::workload::Workload;
use enforcer_common::abi::{PUNT_LIMITED, PUNT_RETRY_SHIFT};

fn bound(bench: &mut Bench, change: impl FnOnce(&mut Server, Arc<WorkloadRule>)) {
    let agent = WorkloadRule { units: vec!["agent.service".to_owned()], ..WorkloadRule::default() };
    let endpoint = bench.engine.endpoints.0.get_mut(&0).unwrap();
    change(Arc::make_mut(&mut endpoint.servers[0].1), Arc::new(agent));
}

fn caller(path: &str) -> CallerFacts {
    let workload = Some(Arc::new(Workload::of(7, Some(path.to_owned()))));
    CallerFacts { uid: 0, is_known: true, workload, ..CallerFacts::NOTHING }
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

/// One more request, whose flow was the kernel's in between.
fn again(bench: &mut Bench, request: &str) {
    bench.epoch += 1;
    bench.offset_bytes = 0;
    bench.punt(request.as_bytes(), 0, 0);
}

fn at(bench: &mut Bench, number: u8, path: &str) {
    bench.origin = Origin { words: [u64::from(number), 0, 0, 0] };
    bench.fake.caller = caller(path);
    let holder = (bench.origin.caller(), caller(path));
    bench.fake.holders.extend([holder]);
    bench.fake.client.clear();
}

#[test]
fn a_token_from_a_second_workload_raises_an_alarm_and_has_a_grant_of_its_own() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    for (number, path) in [(1, "/agent.service"), (2, "/agent.service"), (3, "/thief.service")] {
        assert!(!bench.fake.counts.contains(&"token-from-two-workloads"), "one workload, two cgroups");
        at(&mut bench, number, path);
        again(&mut bench, &request);
    }
    assert_eq!(bench.fake.counts.iter().filter(|count| **count == "token-from-two-workloads").count(), 1);
    let callers: BTreeSet<_> = bench.fake.grants.values().map(|grant| grant.caller.cgroup_id()).collect();
    assert_eq!(callers, BTreeSet::from([1, 2, 3]));
    assert_eq!(bench.fake.verdicts.len(), 3, "equal bytes of three callers are three heads");
}

#[test]
fn what_a_thief_is_refused_changes_nothing_for_the_owner() {
    let mut bench = Bench::new();
    bound(&mut bench, |server, agent| {
        let to = BindTo::Workloads(vec![agent]);
        server.bind = vec![BindRule { issuer: None, subject: None, client_id: None, to }];
    });
    let request = bench.good("", "");
    at(&mut bench, 1, "/agent.service");
    again(&mut bench, &request);
    let (verdicts, grants) = (bench.fake.verdicts.clone(), bench.fake.grants.clone());
    at(&mut bench, 2, "/thief.service");
    again(&mut bench, &request);
    assert_eq!(bench.fake.counts, ["allowed", "token-of-another-workload"]);
    assert_eq!(bench.fake.grants, grants);
    assert!(verdicts.iter().all(|(digest, verdict)| bench.fake.verdicts.get(digest) == Some(verdict)));
    assert!(bench.fake.verdicts.values().any(|verdict| verdict.kind == VERDICT_DENY));
}

#[test]
fn the_first_workload_keeps_the_principal_and_a_full_table_lets_nobody_in() {
    let first_use = |server: &mut Server, _| {
        server.bind = vec![BindRule { issuer: None, subject: None, client_id: None, to: BindTo::FirstUse }];
    };
    let mut bench = Bench::new();
    bound(&mut bench, first_use);
    let request = bench.good("", "");
    for (number, path) in [(1, "/agent.service"), (2, "/other.service"), (3, "/agent.service")] {
        at(&mut bench, number, path);
        again(&mut bench, &request);
        assert_eq!(bench.fake.client.starts_with(b"HTTP/1.1 401 "), number == 2);
    }
    assert_eq!(bench.fake.counts, ["allowed", "token-of-another-first-user", "allowed"]);
    let mut full = Bench::new();
    bound(&mut full, first_use);
    full.fake.no_first_users = true;
    let request = full.good("", "");
    full.punt(request.as_bytes(), 0, 0);
    assert!(full.fake.server.is_empty() && full.fake.client.starts_with(b"HTTP/1.1 503 "));
}

#[test]
fn over_a_limit_is_429_and_the_connection_lives_on() {
    let mut bench = Bench::new();
    bound(&mut bench, |server, _| {
        let rate = Some(Rate { interval_ns: 1_500_000_000, burst: 1 });
        let limit = Limit {
            name: "one".to_owned(),
            per: Dimension::Server,
            rate,
            streams: None,
            ipv4_prefix: 32,
            ipv6_prefix: 64,
        };
        server.limits = vec![Arc::new(limit)];
    });
    let request = bench.good("", "");
    again(&mut bench, &request);
    again(&mut bench, &request);
    assert_eq!(bench.fake.counts, ["allowed", "over-limit"]);
    assert_eq!(bench.fake.server, request.as_bytes());
    let answer = String::from_utf8_lossy(&bench.fake.client).into_owned();
    assert!(answer.starts_with("HTTP/1.1 429 ") && answer.contains("\r\nRetry-After: 2\r\n"), "{answer}");
    assert!(!answer.contains("Connection: close"), "{answer}");
    bench.now.boot_ns += 1_500_000_000;
    again(&mut bench, &request);
    assert_eq!(bench.fake.counts, ["allowed", "over-limit", "allowed"]);
}

#[test]
fn what_the_kernel_has_found_over_a_limit_is_answered_unread() {
    let mut bench = Bench::new();
    bench.punt(bench.good("", "").as_bytes(), PUNT_LIMITED | 3 << PUNT_RETRY_SHIFT, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.grants.is_empty());
    let answer = String::from_utf8_lossy(&bench.fake.client).into_owned();
    assert!(answer.starts_with("HTTP/1.1 429 ") && answer.contains("\r\nRetry-After: 10\r\n"), "{answer}");
}
