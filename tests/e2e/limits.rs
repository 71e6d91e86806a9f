//! Limits: what is over one gets 429, the server reads none of it, and the connection lives on.

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use enforcer_tests::caller::{NOBODY, Place};
use enforcer_tests::enforcement::{Guarded, ServerSpec};
use enforcer_tests::guard::{Deadline, wait_until};
use enforcer_tests::load::{self, LoadConfig, Stop};
use enforcer_tests::raw::{Connection, RequestBuilder, Response};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use serde_json::{Value, json};

use common::{
    LIMIT, OTHER_RESOURCE, TIMEOUT, assert_refusal, endless, flows_on, open_stream, policy, tools, unknown,
};

/// So few that none comes back while a test runs.
const FEW: &str = "6/h";

/// What every 429 is like.
fn assert_over_limit(response: &Response, retry_after_secs: &str) {
    assert_refusal(response, 429, None);
    assert_eq!(response.header("retry-after"), Some(retry_after_secs));
    assert_ne!(response.header("connection"), Some("close"));
}

fn statuses(connection: &mut Connection, request: &[u8], times: usize) -> Result<Vec<u16>> {
    (0..times).map(|_| Ok(connection.roundtrip(request)?.status)).collect()
}

#[test]
fn over_a_rate_the_kernel_answers_429_and_the_connection_lives_on() -> Result<()> {
    let _deadline = Deadline::new("limits: kernel", LIMIT);
    let limits = json!([{"name": "all", "per": "server", "rate": FEW, "burst": 4}]);
    let guarded = Guarded::builder("limkernel").nonblocking().policy("limits", limits).start()?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    let mut connection = guarded.connect_accepted()?;
    let before = guarded.enforcement.counters()?;
    assert_eq!(statuses(&mut connection, &request, 3)?, [200; 3]);
    for _ in 0..20 {
        let refusal = connection.roundtrip(&request)?;
        // Ten minutes until the next one, less what the test took.
        assert_over_limit(&refusal, "600");
        assert_eq!(refusal.raw.len(), request.len(), "in the request's place");
    }
    let after = guarded.enforcement.counters()?;
    assert_eq!(after.kernel("limited") - before.kernel("limited"), 20);
    assert_eq!(after.punts(), before.punts());
    assert_eq!(after.dead(), before.dead());
    let read = guarded.read_by_server(connection.local_addr()?)?;
    assert_eq!(read, request.repeat(3), "the server reads what is within the limit, as it was sent");
    // A body that comes behind its head belongs to what was refused.
    let body = vec![b'x'; 3000];
    let long = RequestBuilder::new("POST", "/mcp").header("Host", &guarded.host());
    let long = long.bearer(&guarded.token()?).body(&body).build();
    for _ in 0..3 {
        assert_eq!(connection.roundtrip(&long)?.status, 429);
        let (head, rest) = long.split_at(long.len() - 1000);
        connection.send(head)?;
        assert_over_limit(&connection.read_response()?, "600");
        connection.send(rest)?;
    }
    assert_over_limit(&connection.roundtrip(&request)?, "600");
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, read);
    let shown = guarded.enforcement.cli_json(&["limits", "--limit", "all"])?;
    let bucket = &shown["limits"][0];
    assert_eq!((&bucket["per"], &bucket["value"]), (&json!("server"), &json!("tools")), "{shown}");
    assert_eq!((&bucket["fill"], &bucket["burst"], &bucket["rate"]), (&json!(0), &json!(4), &json!(FEW)));
    assert_eq!((&bucket["admitted"], &bucket["refused"]), (&json!(4), &json!(20 + 6 + 1)), "{shown}");
    assert_eq!(guarded.enforcement.cli_json(&["limits", "--limit", "other"])?["limits"], json!([]));
    assert_eq!(guarded.enforcement.cli_json(&["status"])?["loaded"]["limits"]["used"], 1);
    Ok(())
}

#[test]
fn who_waits_as_told_passes() -> Result<()> {
    let _deadline = Deadline::new("limits: wait", LIMIT);
    let limits = json!([{"name": "all", "per": "server", "rate": "1/s", "burst": 3}]);
    let guarded = Guarded::builder("limwait").nonblocking().policy("limits", limits).start()?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let mut connection = guarded.connect_accepted()?;
    let mut passed = 0;
    for _ in 0..3 {
        let refusal = loop {
            let response = connection.roundtrip(&request)?;
            if response.status == 429 {
                break response;
            }
            assert_eq!(response.status, 200);
            passed += 1;
        };
        assert_over_limit(&refusal, "1");
        thread::sleep(Duration::from_secs(1));
        assert_eq!(connection.roundtrip(&request)?.status, 200);
        passed += 1;
    }
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request.repeat(passed));
    Ok(())
}

#[test]
fn where_the_kernel_cannot_answer_the_daemon_does() -> Result<()> {
    let _deadline = Deadline::new("limits: daemon", LIMIT);
    let limits = json!([{"name": "all", "per": "server", "rate": FEW, "burst": 2}]);
    for blocking in [true, false] {
        let builder = Guarded::builder(if blocking { "limblock" } else { "limlong" });
        let builder = if blocking { builder } else { builder.nonblocking() };
        let guarded = builder.policy("limits", limits.clone()).start()?;
        let request = RequestBuilder::new("POST", "/mcp").header("Host", &guarded.host());
        // More than the kernel overwrites, where it would overwrite.
        let request = request.bearer(&guarded.token()?).body(&vec![b'x'; if blocking { 10 } else { 8000 }]);
        let request = request.build();
        assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
        let mut connection = guarded.connect_accepted()?;
        assert_eq!(connection.roundtrip(&request)?.status, 200);
        for _ in 0..20 {
            assert_over_limit(&connection.roundtrip(&request)?, "600");
        }
        let counters = guarded.enforcement.counters()?;
        assert_eq!(counters.kernel("limited"), 0);
        let reason = if blocking { "punt-blocking-server" } else { "punt-limited" };
        assert!(counters.kernel(reason) > 0, "{counters:?}");
        assert_eq!(counters.daemon("over-limit"), 20);
        assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request);
    }
    Ok(())
}

#[test]
fn heads_that_nobody_has_seen_are_charged_too() -> Result<()> {
    let _deadline = Deadline::new("limits: varied", LIMIT);
    let limits = json!([{"name": "each", "per": "principal", "rate": FEW, "burst": 5}]);
    let guarded = Guarded::builder("limvaried").nonblocking().policy("limits", limits).start()?;
    let token = guarded.token()?;
    let mut connection = guarded.connect_accepted()?;
    for number in 0..5 {
        assert_eq!(connection.roundtrip(&unknown(&guarded, &token, number))?.status, 200);
    }
    // Another token of the same principal is nobody else.
    let renewed = guarded.mint().expires_in(1800).sign()?;
    for number in 5..15 {
        let by = if number % 2 == 0 { &token } else { &renewed };
        assert_over_limit(&connection.roundtrip(&unknown(&guarded, by, number))?, "600");
        assert_over_limit(&guarded.connect()?.roundtrip(&unknown(&guarded, by, number))?, "600");
    }
    // The kernel and the daemon charge the same bucket.
    assert_over_limit(&connection.roundtrip(&unknown(&guarded, &token, 0))?, "600");
    let other = guarded.mint().subject("somebody-else").sign()?;
    assert_eq!(connection.roundtrip(&unknown(&guarded, &other, 0))?.status, 200);
    Ok(())
}

/// Sends a request so often, from a process of its own, and tells the answers.
fn ask(place: &Place<'_>, from: Ipv4Addr, to: SocketAddr, request: &[u8], times: usize) -> Result<Vec<u16>> {
    let from = SocketAddr::from((from, 0)).to_string();
    let caller = place.call(to, &["--from", &from, "--times", &times.to_string()], request)?;
    let lines = caller.process.stdout();
    lines
        .lines()
        .filter_map(|line| line.strip_prefix("status "))
        .map(|status| status.parse().context("a status"))
        .collect()
}

#[test]
fn each_dimension_has_buckets_of_its_own() -> Result<()> {
    let _deadline = Deadline::new("limits: dimensions", LIMIT);
    let guarded = Guarded::builder("limdim.slice").option("--no-watch").start()?;
    let cgroup = guarded.enforcement.cgroup();
    let second =
        RemoteRecorder::spawn((Ipv4Addr::LOCALHOST, 0).into(), &Config::default(), Some(cgroup), None)?;
    let other = ServerSpec::new("other", &[second.addr()], OTHER_RESOURCE);
    let (agent, tool) = (cgroup.child("agent.service")?, cgroup.child("tool.service")?);
    let (one, two) = (Ipv4Addr::new(127, 0, 1, 1), Ipv4Addr::new(127, 0, 2, 1));
    let root = Place::root(&agent);
    let nobody = Place { uid: NOBODY, ..Place::root(&agent) };
    let elsewhere = Place::root(&tool);
    let mint = |subject: &str, client: &str| guarded.mint().subject(subject).client_id(client).sign();
    let (alice, again, bob) = (mint("alice", "app")?, mint("alice", "app2")?, mint("bob", "app")?);
    let request = |token: &str| guarded.call(Some(token)).build();
    let (alice, again, bob) = (request(&alice), request(&again), request(&bob));
    let to = guarded.addr();
    let limited = |fields: Value| -> Result<()> {
        let mut limit = json!({"name": "few", "rate": FEW, "burst": 2});
        for (field, value) in fields.as_object().context("fields")? {
            limit[field] = value.clone();
        }
        let next = policy(&guarded, vec![tools(&guarded), other.clone()]).with("limits", json!([limit]));
        guarded.enforcement.write_policy(&next)?;
        guarded.enforcement.cli_json(&["reload"]).map(drop)
    };
    // Who shares the bucket of the first, and who does not.
    let all = |shared: &[(&Place<'_>, Ipv4Addr, &[u8])], own: &[(&Place<'_>, Ipv4Addr, &[u8])]| {
        ensure!(ask(&root, one, to, &alice, 4)? == [200, 200, 429, 429], "the first");
        for (place, from, request) in shared {
            ensure!(ask(place, *from, to, request, 2)? == [429, 429], "of the same bucket");
        }
        for (place, from, request) in own {
            ensure!(ask(place, *from, to, request, 3)? == [200, 200, 429], "of another bucket");
        }
        Ok(())
    };
    limited(json!({"per": "server"}))?;
    all(&[(&elsewhere, two, &bob)], &[]).context("server")?;
    let token = guarded.issuer.mint().audience(OTHER_RESOURCE).sign()?;
    let there = RequestBuilder::mcp_call(&second.addr().to_string(), "/mcp", Some(&token), "echo").build();
    assert_eq!(ask(&root, one, second.addr(), &there, 3)?, [200, 200, 429]);
    limited(json!({"per": "server", "servers": "other", "name": "there"}))?;
    assert_eq!(ask(&root, one, to, &alice, 5)?, [200; 5]);
    limited(json!({"per": "source"}))?;
    all(&[(&elsewhere, one, &bob)], &[(&root, two, &alice)]).context("source")?;
    limited(json!({"per": "source", "ipv4_prefix": 16, "name": "network"}))?;
    all(&[(&root, two, &alice)], &[(&root, Ipv4Addr::new(127, 1, 0, 1), &alice)]).context("prefix")?;
    limited(json!({"per": "workload"}))?;
    all(&[(&nobody, two, &bob)], &[(&elsewhere, one, &alice)]).context("workload")?;
    limited(json!({"per": "uid"}))?;
    all(&[(&elsewhere, two, &bob)], &[(&nobody, one, &alice)]).context("uid")?;
    limited(json!({"per": "principal"}))?;
    all(&[(&elsewhere, two, &alice)], &[(&root, one, &bob), (&root, one, &again)]).context("principal")?;
    limited(json!({"per": "client"}))?;
    all(&[(&elsewhere, two, &bob)], &[(&root, one, &again)]).context("client")?;
    Ok(())
}

#[test]
fn as_many_streams_as_the_limit_has_places() -> Result<()> {
    let _deadline = Deadline::new("limits: streams", LIMIT);
    let limits = json!([{"name": "open", "per": "principal", "streams": 2}]);
    let guarded = Guarded::builder("limstreams").nonblocking().recorder(endless_nonblocking());
    let guarded = guarded.policy("limits", limits).start()?;
    let token = guarded.token()?;
    let request = unknown(&guarded, &token, 0);
    let mut first = open_stream(guarded.connect()?, &request)?;
    let mut second = open_stream(guarded.connect_accepted()?, &request)?;
    let mut third = guarded.connect_accepted()?;
    for number in 0..5 {
        // Known to the kernel, and not.
        assert_over_limit(&third.roundtrip(&request)?, "5");
        assert_over_limit(&third.roundtrip(&unknown(&guarded, &token, 10 + number))?, "5");
    }
    assert!(guarded.enforcement.counter("limited")? >= 1);
    let other = guarded.mint().subject("somebody-else").sign()?;
    drop(open_stream(guarded.connect()?, &unknown(&guarded, &other, 0))?);
    flows_on(&mut first)?;
    drop(first);
    wait_until("a place is free", TIMEOUT, || {
        let mut connection = guarded.connect_accepted().ok()?;
        connection.send(&request).ok()?;
        (connection.read_head().ok()?.status == 200).then_some(connection)
    })
    .map(|mut stream| flows_on(&mut stream))??;
    // That one has ended again; the refused connection takes its place with the next request.
    wait_until("a place is free", TIMEOUT, || {
        third.send(&request).ok()?;
        let mut head = third.read_head().ok()?;
        if head.status == 200 {
            return Some(());
        }
        third.read_body(&mut head).ok().and(None)
    })?;
    flows_on(&mut third)?;
    flows_on(&mut second)?;
    assert_over_limit(&guarded.connect_accepted()?.roundtrip(&request)?, "5");
    Ok(())
}

fn endless_nonblocking() -> Config {
    Config { nonblocking: true, ..endless() }
}

/// A connection keeps its place from one request to the next, until it closes or sends as somebody else.
#[test]
fn a_connection_keeps_its_place() -> Result<()> {
    let _deadline = Deadline::new("limits: places", LIMIT);
    let limits = json!([{"name": "open", "per": "principal", "streams": 1}]);
    let guarded = Guarded::builder("limplaces").nonblocking().policy("limits", limits).start()?;
    let (alice, bob) = (guarded.token()?, guarded.mint().subject("bob").sign()?);
    let mut first = guarded.connect_accepted()?;
    for number in 0..10 {
        assert_eq!(first.roundtrip(&unknown(&guarded, &alice, number / 2))?.status, 200);
    }
    let mut second = guarded.connect_accepted()?;
    assert_over_limit(&second.roundtrip(&unknown(&guarded, &alice, 0))?, "5");
    assert_eq!(first.roundtrip(&unknown(&guarded, &bob, 0))?.status, 200);
    assert_eq!(second.roundtrip(&unknown(&guarded, &alice, 0))?.status, 200);
    assert_over_limit(&second.roundtrip(&unknown(&guarded, &bob, 0))?, "5");
    // It gave its place up for that, and nobody has taken it.
    assert_eq!(second.roundtrip(&unknown(&guarded, &alice, 0))?.status, 200);
    Ok(())
}

#[test]
fn many_connections_at_once_get_the_rate_and_no_more() -> Result<()> {
    let _deadline = Deadline::new("limits: accuracy", LIMIT);
    let (rate, burst) = (200, 50);
    let limits = json!([{"name": "all", "per": "server", "rate": format!("{rate}/s"), "burst": burst}]);
    let guarded = Guarded::builder("limaccuracy").nonblocking().policy("limits", limits).start()?;
    let tokens = [guarded.token()?, guarded.mint().subject("bob").sign()?];
    let requests = tokens.iter().map(|token| guarded.call(Some(token)).build()).collect();
    let stop = Stop::After(Duration::from_secs(3));
    let config = LoadConfig { threads: 2, ..LoadConfig::new(guarded.addr(), 8, requests, stop) };
    let before = Instant::now();
    let report = load::run(&config)?;
    let most = burst + rate * before.elapsed().as_secs() + rate;
    let passed = report.status_counts.get(&200).copied().unwrap_or(0);
    let refused = report.status_counts.get(&429).copied().unwrap_or(0);
    assert_eq!(passed + refused, report.requests, "{report:?}");
    ensure!(refused > 5 * passed, "too little was offered: {report:?}");
    ensure!(passed <= most, "{passed} passed of at most {most}: {report:?}");
    ensure!(passed >= 2 * rate, "{passed} passed: {report:?}");
    assert_eq!(report.errors + report.reconnects, 0, "{report:?}");
    let heads: u64 = guarded.recorder.connections()?.iter().map(|record| record.requests.len() as u64).sum();
    // What was in flight at the end is not counted by the client.
    ensure!(heads >= passed && heads <= passed + 8, "the server read {heads} requests, {passed} passed");
    Ok(())
}
