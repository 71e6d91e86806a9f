//! A daemon that starts under another policy than the one before it: what that policy still allows goes on, the rest ends.

mod common;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "bypass/maps.rs"]
mod maps;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Guarded, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::Deadline;
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use serde_json::{Value, json};

use common::{
    LIMIT, OTHER_RESOURCE, TIMEOUT, endless, ends, flows_on, kept, open_stream, policy, restart, status,
    tools, unknown,
};
use maps::PinnedMap;

/// The log says that the last start has switched from one policy to the other.
fn assert_switched(guarded: &Guarded) -> Result<()> {
    let log = guarded.enforcement.log()?;
    ensure!(log.contains("switch_policy=true") && log.contains("policy changed"), "{log}");
    ensure!(!log.contains("taking over"), "{log}");
    Ok(())
}

fn generation(guarded: &Guarded) -> Result<u64> {
    let status = guarded.enforcement.cli_json(&["status"])?;
    status.pointer("/loaded/generation").and_then(Value::as_u64).context("no generation")
}

fn serials(guarded: &Guarded) -> Result<Vec<Value>> {
    let grants = guarded.enforcement.cli_json(&["grants"])?;
    let grants = grants["grants"].as_array().context("no grants")?;
    Ok(grants.iter().map(|grant| grant["serial"].clone()).collect())
}

/// A second server in the guarded cgroup.
fn another(guarded: &Guarded) -> Result<RemoteRecorder> {
    let anywhere: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    RemoteRecorder::spawn(anywhere, &endless(), Some(guarded.enforcement.cgroup()), None)
}

#[test]
fn what_the_new_policy_still_allows_goes_on() -> Result<()> {
    let _deadline = Deadline::new("restart: allowed", LIMIT);
    let mut guarded = kept("rs-allowed").server("scopes", json!(["a", "b"])).start()?;
    let known = guarded.call(Some(&guarded.mint().scope("a b").sign()?)).build();
    let mut open = guarded.connect()?;
    for _ in 0..2 {
        assert_eq!(open.roundtrip(&known)?.status, 200);
    }
    guarded.recorder.set_config(&endless())?;
    let mut stream = open_stream(guarded.connect()?, &known)?;
    guarded.recorder.set_config(&Config::default())?;
    let other = another(&guarded)?;
    let bare = RequestBuilder::mcp_call(&other.addr().to_string(), "/mcp", None, "echo").build();
    drop(open_stream(Connection::open(other.addr(), TIMEOUT)?, &bare)?);
    let other_spec = ServerSpec::new("other", &[other.addr()], OTHER_RESOURCE);
    let scopes = |scopes: &[&str]| tools(&guarded).with("scopes", json!(scopes));
    // A server more, in front of the one that is there; a scope less; another limit.
    let policies = [
        policy(&guarded, vec![other_spec.clone(), scopes(&["a", "b"])]),
        policy(&guarded, vec![scopes(&["b"]), other_spec.clone()]),
        policy(&guarded, vec![other_spec, scopes(&["b"])]).daemon_timeout("3s"),
    ];
    let (serials_before, dead) = (serials(&guarded)?, guarded.enforcement.counters()?.dead());
    for (number, policy) in policies.iter().enumerate() {
        let before = generation(&guarded)?;
        restart(&mut guarded, number % 2 == 0, policy)?;
        assert_switched(&guarded)?;
        assert!(generation(&guarded)? > before, "policy {number}");
        flows_on(&mut stream).with_context(|| format!("policy {number}"))?;
        // The first one is judged by the new policy, on its old grant; then the kernel knows.
        assert_eq!(open.roundtrip(&known)?.status, 200, "policy {number}");
        let allowed = guarded.enforcement.counter("allowed")?;
        for _ in 0..2 {
            assert_eq!(open.roundtrip(&known)?.status, 200, "policy {number}");
            assert_eq!(status(&guarded, &known)?, 200, "policy {number}");
        }
        assert!(guarded.enforcement.counter("allowed")? >= allowed + 3, "policy {number}");
        assert_eq!(status(&guarded, &guarded.call(None).build())?, 401, "policy {number}");
        assert_eq!(Connection::open(other.addr(), TIMEOUT)?.roundtrip(&bare)?.status, 401, "policy {number}");
        assert_eq!(serials(&guarded)?, serials_before, "policy {number}");
        assert_eq!(guarded.enforcement.counters()?.dead(), dead, "policy {number}");
    }
    let token = guarded.issuer.mint().audience(OTHER_RESOURCE).sign()?;
    let to_other = RequestBuilder::mcp_call(&other.addr().to_string(), "/mcp", Some(&token), "echo").build();
    drop(open_stream(Connection::open(other.addr(), TIMEOUT)?, &to_other)?);
    // A start under the same policy switches nothing, and a reload goes on from there.
    let before = generation(&guarded)?;
    guarded.enforcement.kill9()?;
    guarded.enforcement.launch()?;
    assert!(guarded.enforcement.log()?.contains("switch_policy=false"));
    assert_eq!(generation(&guarded)?, before);
    guarded.enforcement.write_policy(&policies[0])?;
    let report = guarded.enforcement.cli_json(&["reload"])?;
    // Whether its token has the scope that is back, nobody knows any more.
    let lost = report["losses"].to_string();
    assert!(lost.contains("not-remembered") && !lost.contains("other"), "{report}");
    ends(&mut stream)?;
    assert_eq!(status(&guarded, &known)?, 200);
    assert_eq!(guarded.enforcement.leftover_pins(), [guarded.enforcement.pins()]);
    Ok(())
}

#[test]
fn what_the_new_policy_does_not_allow_ends_at_the_start() -> Result<()> {
    let _deadline = Deadline::new("restart: not allowed", LIMIT);
    let mut guarded = kept("rs-lost").recorder(endless()).start()?;
    let other = another(&guarded)?;
    let other_spec = ServerSpec::new("other", &[other.addr()], OTHER_RESOURCE);
    let stranger = Issuer::new("https://elsewhere.example.com", Alg::Es256)?;
    let with = |server: ServerSpec| vec![server, other_spec.clone()];
    // Another audience alone, not another host with it.
    let at = |resource| {
        let hosts = json!([guarded.host(), "mcp.example.com"]);
        ServerSpec::new("tools", &[guarded.addr()], resource).with("hosts", hosts).with("path", "/mcp")
    };
    let base = policy(&guarded, with(at(Guarded::RESOURCE)));
    // Accepts another issuer's tokens, and keeps the first one for the second server.
    let corp = IssuerSpec::from_file("corp", &guarded.issuer);
    let of_stranger = at(Guarded::RESOURCE).with("issuers", json!(["stranger"]));
    let of_stranger =
        PolicySpec::new(vec![corp, IssuerSpec::from_file("stranger", &stranger)], with(of_stranger));
    let strict = at(Guarded::RESOURCE).with("scopes", json!(["more"]));
    let lost = [
        (of_stranger, "issuer-unknown", 401),
        (policy(&guarded, with(at("https://moved.example.com/mcp"))), "not-remembered", 401),
        (policy(&guarded, with(strict)), "not-remembered", 403),
    ];
    restart(&mut guarded, true, &base)?;
    let token = guarded.issuer.mint().audience(OTHER_RESOURCE).sign()?;
    let to_other = RequestBuilder::mcp_call(&other.addr().to_string(), "/mcp", Some(&token), "echo").build();
    let mut stays = open_stream(Connection::open(other.addr(), TIMEOUT)?, &to_other)?;
    let known = guarded.call(Some(&guarded.token()?)).build();
    for (number, (policy, reason, refusal)) in lost.iter().enumerate() {
        let mut streams =
            [open_stream(guarded.connect()?, &known)?, open_stream(guarded.connect()?, &known)?];
        let before = guarded.enforcement.reason(reason)?;
        restart(&mut guarded, number % 2 == 0, policy)?;
        assert_switched(&guarded)?;
        for stream in &mut streams {
            ends(stream).with_context(|| format!("policy {number}"))?;
        }
        assert_eq!(guarded.enforcement.reason(reason)?, before + 2, "policy {number}");
        assert_eq!(status(&guarded, &known)?, *refusal, "policy {number}");
        flows_on(&mut stays).with_context(|| format!("policy {number}"))?;
        restart(&mut guarded, number % 2 == 1, &base)?;
        assert_switched(&guarded)?;
        flows_on(&mut stays).with_context(|| format!("back from policy {number}"))?;
    }
    // The server goes: its streams do, and the other's don't.
    let mut stream = open_stream(guarded.connect()?, &known)?;
    let without = policy(&guarded, vec![other_spec]);
    restart(&mut guarded, true, &without)?;
    ends(&mut stream)?;
    flows_on(&mut stays)
}

#[test]
fn what_waits_for_a_daemon_is_judged_by_its_policy_alone() -> Result<()> {
    let _deadline = Deadline::new("restart: waiting", LIMIT);
    let mut guarded = kept("rs-waits").daemon_timeout("60s").start()?;
    let token = guarded.mint().scope("some").sign()?;
    assert_eq!(status(&guarded, &unknown(&guarded, &token, 0))?, 200);
    guarded.enforcement.kill9()?;
    let mut waiting = guarded.connect()?;
    waiting.send(&unknown(&guarded, &token, 1))?;
    let strict = tools(&guarded).with("scopes", json!(["more"]));
    guarded.enforcement.write_policy(&policy(&guarded, vec![strict]))?;
    guarded.enforcement.launch()?;
    assert_eq!(waiting.read_response()?.status, 403);
    assert_eq!(guarded.read_by_server(waiting.local_addr()?).unwrap_or_default(), b"");
    Ok(())
}

#[test]
fn enforcing_ends_what_was_observed_and_observing_lets_go_on() -> Result<()> {
    let _deadline = Deadline::new("restart: mode", LIMIT);
    let mut guarded = kept("rs-mode").observing().start()?;
    let (good, bare) = (guarded.call(Some(&guarded.token()?)).build(), guarded.call(None).build());
    let mut observed = guarded.connect()?;
    assert_eq!(observed.roundtrip(&bare)?.status, 200);
    // Its request is the daemon's when that dies.
    let mut begun = guarded.connect()?;
    begun.send(bare.get(..40).unwrap_or_default())?;
    guarded.recorder.wait_for_bytes(begun.local_addr()?, 40, TIMEOUT)?;
    let enforcing = policy(&guarded, vec![tools(&guarded)]);
    restart(&mut guarded, true, &enforcing)?;
    assert_switched(&guarded)?;
    ends(&mut observed)?;
    ends(&mut begun)?;
    let mut enforced = guarded.connect()?;
    assert_eq!(enforced.roundtrip(&bare)?.status, 401);
    assert_eq!(enforced.roundtrip(&good)?.status, 200);
    restart(&mut guarded, false, &enforcing.observing())?;
    assert_switched(&guarded)?;
    for request in [&bare, &good, &bare] {
        assert_eq!(enforced.roundtrip(request)?.status, 200);
    }
    Ok(())
}

#[test]
fn a_broken_policy_leaves_the_enforcement_as_it_is() -> Result<()> {
    let _deadline = Deadline::new("restart: broken", LIMIT);
    let mut guarded = kept("rs-broken").start()?;
    let known = guarded.call(Some(&guarded.token()?)).build();
    let mut open = guarded.connect()?;
    for _ in 0..2 {
        assert_eq!(open.roundtrip(&known)?.status, 200);
    }
    let before = generation(&guarded)?;
    let good = fs::read(guarded.enforcement.policy_path())?;
    guarded.enforcement.kill9()?;
    fs::write(guarded.enforcement.policy_path(), "version: 1\nservers: []\n")?;
    let mut daemon = guarded.enforcement.spawn_daemon()?;
    let end = daemon.wait(TIMEOUT)?;
    assert!(!end.success() && daemon.stderr().contains("policy.yaml:2:"), "{}", daemon.stderr());
    assert_eq!(generation(&guarded)?, before);
    assert_eq!(guarded.enforcement.leftover_pins(), [guarded.enforcement.pins()]);
    assert_eq!(open.roundtrip(&known)?.status, 200);
    assert_eq!(status(&guarded, &known)?, 200);
    fs::write(guarded.enforcement.policy_path(), good)?;
    guarded.enforcement.launch()?;
    assert!(guarded.enforcement.log()?.contains("switch_policy=false"));
    assert_eq!(open.roundtrip(&known)?.status, 200);
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    Ok(())
}

#[test]
fn without_the_record_of_the_former_policy_its_connections_are_closed() -> Result<()> {
    let _deadline = Deadline::new("restart: no record", LIMIT);
    let mut guarded = kept("rs-record").start()?;
    let known = guarded.call(Some(&guarded.token()?)).build();
    let record = guarded.enforcement.state_dir().join("policy.json");
    let mut next = policy(&guarded, vec![tools(&guarded)]);
    for (number, text) in [None, Some("{"), Some(r#"{"version":9}"#)].into_iter().enumerate() {
        let mut open = guarded.connect()?;
        assert_eq!(open.roundtrip(&known)?.status, 200);
        match text {
            Some(text) => fs::write(&record, text)?,
            None => fs::remove_file(&record)?,
        }
        next = next.daemon_timeout(&format!("{}s", 10 + number));
        restart(&mut guarded, true, &next)?;
        let log = guarded.enforcement.log()?;
        assert!(log.contains("taking over") && log.contains("its policy is another one"), "{log}");
        assert_eq!(text.is_some(), log.contains("of no use"), "{log}");
        open.expect_closed()?;
        assert_eq!(status(&guarded, &known)?, 200);
        assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    }
    // There is one again.
    let mut open = guarded.connect()?;
    assert_eq!(open.roundtrip(&known)?.status, 200);
    restart(&mut guarded, true, &next.daemon_timeout("20s"))?;
    assert_switched(&guarded)?;
    assert_eq!(open.roundtrip(&known)?.status, 200);
    Ok(())
}

/// An upgrade: the maps were filled by a program that has another hash for the same policy, and other kernel programs. What else it
/// recorded of itself is `differs`.
fn upgrade(guarded: &mut Guarded, differs: &[(&str, Value)]) -> Result<()> {
    let record = guarded.enforcement.state_dir().join("policy.json");
    guarded.enforcement.kill9()?;
    let mut document: Value = serde_json::from_slice(&fs::read(&record)?)?;
    document["recorded"]["policy_hash"] = json!(vec![7_u8; 32]);
    for (field, value) in differs {
        ensure!(document["recorded"].get(field).is_some(), "no {field} is recorded");
        document["recorded"][field] = value.clone();
    }
    fs::write(&record, document.to_string())?;
    let state = PinnedMap::open(&guarded.enforcement.pins().join("DAEMON_STATE"))?;
    // `DaemonState`: the key of the fingerprints, then the hashes of policy and programs.
    state.change(&0_u32.to_ne_bytes(), |value| value[32..96].fill(7))?;
    guarded.enforcement.launch()
}

#[test]
fn a_program_of_another_version_decides_anew_and_streams_go_on() -> Result<()> {
    let _deadline = Deadline::new("restart: version", LIMIT);
    let mut guarded = kept("rs-version").recorder(endless()).start()?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    let mut stream = open_stream(guarded.connect()?, &good)?;
    let before = generation(&guarded)?;
    upgrade(&mut guarded, &[])?;
    assert_switched(&guarded)?;
    assert!(guarded.enforcement.log()?.contains("replace_programs=true"));
    assert!(generation(&guarded)? > before);
    flows_on(&mut stream)?;
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    // By other rules, or from a text that meant something else to it, nobody knows that what it allowed would be allowed now.
    for differs in [("rules", json!(0)), ("compiled_hash", json!(vec![7_u8; 32]))] {
        let mut stream = open_stream(guarded.connect()?, &good)?;
        upgrade(&mut guarded, &[differs])?;
        let log = guarded.enforcement.log()?;
        assert!(log.contains("taking over") && log.contains("of no use"), "{log}");
        ends(&mut stream)?;
    }
    Ok(())
}
