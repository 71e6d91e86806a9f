//! Another policy takes the place of the one in force.

mod common;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Guarded, GuardedBuilder, PolicySpec, ServerSpec};
use enforcer_tests::guard::{Deadline, wait_until};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::RemoteRecorder;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use common::{
    LIMIT, NOT_LOADED, OTHER_RESOURCE, TIMEOUT, assert_refusal, endless, ends, flows_on, open_stream, policy,
    tools,
};

/// Exit code of the command line: the policy has defects.
const REJECTED: i32 = 4;

/// A daemon that reads its policy only when it is told to.
fn unwatched(name: &str) -> GuardedBuilder {
    Guarded::builder(name).option("--no-watch")
}

/// Writes a policy and has it read.
fn reload(guarded: &Guarded, policy: &PolicySpec) -> Result<Value> {
    guarded.enforcement.write_policy(policy)?;
    guarded.enforcement.cli_json(&["reload"])
}

fn last_reload(guarded: &Guarded) -> Option<Value> {
    guarded.enforcement.cli_json(&["status"]).ok()?.pointer("/daemon/last_reload").cloned()
}

/// Waits until the daemon has read its policy again, with this result, for the last time.
fn wait_for_reload(guarded: &Guarded, trigger: &str, ok: bool) -> Result<Value> {
    wait_until(&format!("a reload by {trigger} that is {ok}"), TIMEOUT, || {
        last_reload(guarded).filter(|last| last["ok"] == ok && last["trigger"] == trigger)
    })
}

#[test]
fn a_new_scope_refuses_known_tokens_and_ends_what_they_opened() -> Result<()> {
    let _deadline = Deadline::new("reload: scope", LIMIT);
    let guarded = unwatched("rl-scope").nonblocking().start()?;
    let with_scope = guarded.call(Some(&guarded.mint().scope("tools.call").sign()?)).build();
    let without = guarded.call(Some(&guarded.mint().scope("other").sign()?)).build();
    let (mut good, mut lost) = (guarded.connect()?, guarded.connect()?);
    for _ in 0..3 {
        assert_eq!(good.roundtrip(&with_scope)?.status, 200);
        assert_eq!(lost.roundtrip(&without)?.status, 200);
    }
    let next = policy(&guarded, vec![tools(&guarded).with("scopes", json!(["tools.call"]))]);
    guarded.enforcement.write_policy(&next)?;
    assert_eq!(lost.roundtrip(&without)?.status, 200, "nobody has said that the policy is to be read");
    let report = guarded.enforcement.cli_json(&["reload"])?;
    assert_eq!(report["changed"], true);
    let losses = json!([{ "server": "tools", "reason": "insufficient-scope", "grants": 1, "flows": 1 }]);
    assert_eq!(report["losses"], losses, "{report}");
    assert_eq!(report["diff"]["servers"]["changed"][0]["name"], "tools");
    ends(&mut lost)?;
    // The other connection goes on with its token, and meets the refusal with the known one.
    assert_eq!(good.roundtrip(&with_scope)?.status, 200);
    let refusal = good.roundtrip(&without)?;
    assert_eq!(refusal.status, 403, "{refusal:?}");
    let shown = refusal.header("www-authenticate").unwrap_or_default();
    assert!(shown.contains("insufficient_scope") && shown.contains("tools.call"), "{shown}");
    // Known heads pass in the kernel again.
    assert_eq!(good.roundtrip(&with_scope)?.status, 200);
    let allowed = guarded.enforcement.counter("allowed")?;
    assert_eq!(good.roundtrip(&with_scope)?.status, 200);
    assert_eq!(guarded.enforcement.counter("allowed")?, allowed + 1);
    Ok(())
}

#[test]
fn sighup_with_another_audience_refuses_old_tokens() -> Result<()> {
    let _deadline = Deadline::new("reload: audience", LIMIT);
    let mut guarded = unwatched("rl-audience").recorder(endless()).start()?;
    let old = guarded.call(Some(&guarded.token()?)).build();
    let mut stream = open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &old)?;
    let server = ServerSpec::new("tools", &[guarded.addr()], OTHER_RESOURCE)
        .with("hosts", json!([guarded.host(), "mcp.example.com"]));
    let next = policy(&guarded, vec![server.clone()]);
    // The first step only says which hosts there are, so that no host is lost in the second one.
    let hosts = json!([guarded.host()]);
    reload(&guarded, &policy(&guarded, vec![tools(&guarded).with("hosts", hosts)]))?;
    ends(&mut stream)?;
    let mut stream = open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &old)?;
    guarded.enforcement.write_policy(&next)?;
    guarded.enforcement.daemon()?.signal(Signal::SIGHUP)?;
    wait_for_reload(&guarded, "SIGHUP", true)?;
    ends(&mut stream)?;
    assert_eq!(guarded.enforcement.reason("audience-mismatch")?, 1);
    assert_eq!(guarded.enforcement.reason("host-removed")?, 1);
    let refused = Connection::open(guarded.addr(), TIMEOUT)?.roundtrip(&old)?;
    assert_eq!(refused.status, 401);
    let token = guarded.issuer.mint().audience(OTHER_RESOURCE).sign()?;
    open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &guarded.call(Some(&token)).build())?;
    assert!(guarded.enforcement.log()?.contains("policy changed"));
    assert!(!guarded.enforcement.log()?.contains(&token), "a token in the log");
    Ok(())
}

#[test]
fn a_bad_file_changes_nothing_and_shows_in_the_status() -> Result<()> {
    let _deadline = Deadline::new("reload: bad file", LIMIT);
    let guarded = Guarded::builder("rl-bad").recorder(endless()).start()?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let mut stream = open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &good)?;
    let before = guarded.enforcement.cli_json(&["status"])?;
    let original = fs::read(guarded.enforcement.policy_path())?;
    let bad = policy(&guarded, vec![tools(&guarded).with("listen", json!(["127.0.0.1:0"])), tools(&guarded)]);
    guarded.enforcement.write_policy(&bad)?;
    let last = wait_for_reload(&guarded, "file changed", false)?;
    let error = last["error"].as_str().context("no error")?;
    let place = format!("{}:", guarded.enforcement.policy_path().display());
    assert!(error.contains(&place) && error.contains("servers[0].listen[0]"), "{error}");
    let reload = guarded.enforcement.cli(&["reload"])?;
    assert_eq!(reload.status.code(), Some(REJECTED), "{}", reload.stderr);
    assert!(reload.stderr.contains("servers[0].listen[0]"), "{}", reload.stderr);
    let text = guarded.enforcement.cli(&["status"])?.stdout;
    assert!(text.contains("FAILED") && text.contains("servers[0].listen[0]"), "{text}");
    assert!(guarded.enforcement.log()?.contains("policy not taken"));
    // Nothing has changed.
    let after = guarded.enforcement.cli_json(&["status"])?;
    assert_eq!(after["loaded"]["generation"], before["loaded"]["generation"]);
    flows_on(&mut stream)?;
    drop(open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &good)?);
    fs::remove_file(guarded.enforcement.policy_path())?;
    let gone = guarded.enforcement.cli(&["reload"])?;
    assert_eq!(gone.status.code(), Some(REJECTED), "{}", gone.stderr);
    flows_on(&mut stream)?;
    fs::write(guarded.enforcement.policy_path(), original)?;
    wait_for_reload(&guarded, "file changed", true)?;
    flows_on(&mut stream)
}

#[test]
fn a_changed_file_is_seen_however_it_was_replaced() -> Result<()> {
    let _deadline = Deadline::new("reload: watch", LIMIT);
    let guarded = Guarded::builder("rl-watch").start()?;
    let token = guarded.mint().scope("a b").sign()?;
    let request = guarded.call(Some(&token)).build();
    let status = || anyhow::Ok(guarded.connect()?.roundtrip(&request)?.status);
    let wait_for = |expected: u16| {
        wait_until(&format!("an answer {expected}"), TIMEOUT, || (status().ok()? == expected).then_some(()))
    };
    let scopes = |scopes: &[&str]| policy(&guarded, vec![tools(&guarded).with("scopes", json!(scopes))]);
    wait_for(200)?;
    // Written in place.
    guarded.enforcement.write_policy(&scopes(&["c"]))?;
    wait_for(403)?;
    // Renamed over.
    let path = guarded.enforcement.policy_path();
    let aside = path.with_extension("new");
    fs::write(&aside, serde_json::to_vec(&scopes(&["a"]).document())?)?;
    fs::rename(&aside, &path)?;
    wait_for(200)?;
    // A link that is turned.
    fs::write(&aside, serde_json::to_vec(&scopes(&["d"]).document())?)?;
    let link = path.with_extension("link");
    std::os::unix::fs::symlink(&aside, &link)?;
    fs::rename(&link, &path)?;
    wait_for(403)
}

#[test]
fn a_server_that_is_removed_loses_its_streams_and_others_do_not() -> Result<()> {
    let _deadline = Deadline::new("reload: removed server", LIMIT);
    let guarded = unwatched("rl-remove").recorder(endless()).start()?;
    let anywhere = (Ipv4Addr::LOCALHOST, 0).into();
    let cgroup = Some(guarded.enforcement.cgroup());
    let other = RemoteRecorder::spawn(anywhere, &endless(), cgroup, None)?;
    let other_spec = ServerSpec::new("other", &[other.addr()], OTHER_RESOURCE);
    let bare = RequestBuilder::mcp_call(&other.addr().to_string(), "/mcp", None, "echo").build();
    drop(open_stream(Connection::open(other.addr(), TIMEOUT)?, &bare)?);
    // A server that comes is guarded from then on.
    let both = policy(&guarded, vec![other_spec, tools(&guarded)]);
    let report = reload(&guarded, &both)?;
    assert_eq!((&report["diff"]["servers"]["added"], &report["losses"]), (&json!(["other"]), &json!([])));
    let refused = Connection::open(other.addr(), TIMEOUT)?.roundtrip(&bare)?;
    assert_refusal(
        &refused,
        401,
        Some(
            r#"Bearer resource_metadata="https://other.example.com/.well-known/oauth-protected-resource/mcp""#,
        ),
    );
    let token = guarded.issuer.mint().audience(OTHER_RESOURCE).sign()?;
    let to_other = RequestBuilder::mcp_call(&other.addr().to_string(), "/mcp", Some(&token), "echo").build();
    let mut goes = open_stream(Connection::open(other.addr(), TIMEOUT)?, &to_other)?;
    let to_tools = guarded.call(Some(&guarded.token()?)).build();
    let mut stays = open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &to_tools)?;
    let numbers = |guarded: &Guarded| guarded.enforcement.cli_json(&["servers"]);
    let before = numbers(&guarded)?;
    // It goes: its stream ends, the other one goes on under its number.
    let report = reload(&guarded, &policy(&guarded, vec![tools(&guarded)]))?;
    let losses = report["losses"].as_array().context("no losses")?;
    let flows: u64 = losses.iter().filter_map(|loss| loss["flows"].as_u64()).sum();
    assert_eq!(report["diff"]["servers"]["removed"], json!(["other"]), "{report}");
    ensure!(flows >= 1, "{report}");
    ends(&mut goes)?;
    flows_on(&mut stays)?;
    let (before, after) = (before["servers"].as_array(), numbers(&guarded)?);
    let (before, after) =
        (before.context("no servers")?, after["servers"].as_array().context("no servers")?.clone());
    assert_eq!((before.len(), after.len()), (2, 1));
    assert!(before.iter().any(|server| server["id"] == after[0]["id"] && server["name"] == "tools"));
    // What the policy does not name is not guarded.
    drop(open_stream(Connection::open(other.addr(), TIMEOUT)?, &bare)?);
    assert_eq!(
        Connection::open(guarded.addr(), TIMEOUT)?.roundtrip(&guarded.call(None).build())?.status,
        401
    );
    Ok(())
}

#[test]
fn a_connection_of_an_unchanged_server_keeps_its_known_heads() -> Result<()> {
    let _deadline = Deadline::new("reload: unchanged", LIMIT);
    let guarded = unwatched("rl-same").start()?;
    let known = guarded.call(Some(&guarded.token()?)).build();
    let mut connection = guarded.connect()?;
    assert_eq!(connection.roundtrip(&known)?.status, 200);
    let grants = |guarded: &Guarded| guarded.enforcement.cli_json(&["grants"]);
    let serial = grants(&guarded)?["grants"][0]["serial"].clone();
    let spare = ServerSpec::new("spare", &[(Ipv4Addr::LOCALHOST, 1).into()], OTHER_RESOURCE);
    for round in 0..20 {
        let mut servers = vec![spare.clone(), tools(&guarded)];
        servers.truncate(2);
        if round % 2 == 0 {
            servers.swap(0, 1);
        }
        let metadata = json!({ "resource_name": format!("round {round}") });
        servers.push(ServerSpec::new(
            "round",
            &[(Ipv4Addr::LOCALHOST, 2 + round).into()],
            "https://r.example.com/mcp",
        ));
        let servers = servers.into_iter().map(|server| server.with("metadata", metadata.clone())).collect();
        let report = reload(&guarded, &policy(&guarded, servers))?;
        assert_eq!((&report["changed"], &report["losses"]), (&json!(true), &json!([])), "{report}");
        for _ in 0..2 {
            assert_eq!(connection.roundtrip(&known)?.status, 200);
        }
    }
    assert_eq!(grants(&guarded)?["grants"][0]["serial"], serial, "the token kept its grant");
    let record = guarded.recorder.connection(connection.local_addr()?)?.context("no connection")?;
    assert_eq!(record.requests.len(), 41);
    // The same once more is no change.
    let generation = guarded.enforcement.cli_json(&["status"])?["loaded"]["generation"].clone();
    let report = guarded.enforcement.cli_json(&["reload"])?;
    assert_eq!((&report["changed"], &report["generation"]), (&json!(false), &generation));
    Ok(())
}

#[test]
fn enforcing_ends_what_was_observed_and_observing_lets_go_on() -> Result<()> {
    let _deadline = Deadline::new("reload: mode", LIMIT);
    let guarded = unwatched("rl-mode").observing().start()?;
    let (good, bare) = (guarded.call(Some(&guarded.token()?)).build(), guarded.call(None).build());
    let (mut idle, mut opaque) = (guarded.connect()?, guarded.connect()?);
    assert_eq!(idle.roundtrip(&bare)?.status, 200);
    opaque.send(b"\x16\x03\x01 no HTTP at all")?;
    let bytes = b"\x16\x03\x01 no HTTP at all".len() as u64;
    guarded.recorder.wait_for_bytes(opaque.local_addr()?, bytes, TIMEOUT)?;
    let report = reload(&guarded, &policy(&guarded, vec![tools(&guarded)]))?;
    assert_eq!(
        report["losses"],
        json!([{ "server": "tools", "reason": "observed", "grants": 0, "flows": 2 }])
    );
    ends(&mut idle)?;
    ends(&mut opaque)?;
    assert_eq!(guarded.enforcement.cli_json(&["status"])?["state"], "enforcing");
    let mut connection = guarded.connect()?;
    assert_eq!(connection.roundtrip(&bare)?.status, 401);
    assert_eq!(connection.roundtrip(&good)?.status, 200);
    // And back: on the same connection nothing is refused any more.
    let report = reload(&guarded, &policy(&guarded, vec![tools(&guarded)]).observing())?;
    assert_eq!(report["losses"], json!([]));
    for request in [&bare, &good, &bare] {
        assert_eq!(connection.roundtrip(request)?.status, 200);
    }
    assert_eq!(guarded.enforcement.cli_json(&["status"])?["state"], "observing");
    Ok(())
}

#[test]
fn diff_foresees_what_a_reload_does_and_changes_nothing() -> Result<()> {
    let _deadline = Deadline::new("reload: diff", LIMIT);
    let guarded = unwatched("rl-diff").recorder(endless()).start()?;
    let few = guarded.call(Some(&guarded.mint().scope("a").sign()?)).build();
    let many = guarded.call(Some(&guarded.mint().scope("a b").sign()?)).build();
    let mut streams = [
        open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &few)?,
        open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &few)?,
    ];
    let mut stays = open_stream(Connection::open(guarded.addr(), TIMEOUT)?, &many)?;
    let next = policy(&guarded, vec![tools(&guarded).with("scopes", json!(["b"]))]);
    let file = guarded.enforcement.policy_path().with_file_name("next.yaml");
    fs::write(&file, serde_json::to_vec_pretty(&next.document())?)?;
    let file = file.display().to_string();
    let foreseen = guarded.enforcement.cli_json(&["diff", &file])?;
    let losses = json!([{ "server": "tools", "reason": "insufficient-scope", "grants": 1, "flows": 2 }]);
    assert_eq!((&foreseen["losses"], &foreseen["flows"]), (&losses, &json!(3)), "{foreseen}");
    let text = guarded.enforcement.cli(&["diff", &file])?.stdout;
    assert!(text.contains(r#"~ server "tools": scopes: [] -> ["b"]"#), "{text}");
    assert!(
        text.contains("1 of 2 tokens in use would lose their access, 2 of 3 connections would be ended"),
        "{text}"
    );
    streams.iter_mut().try_for_each(flows_on)?;
    assert_eq!(last_reload(&guarded), Some(Value::Null));
    let same = guarded.enforcement.policy_path().display().to_string();
    let same = guarded.enforcement.cli(&["diff", &same])?;
    assert!(same.status.success() && same.stdout.contains("nothing differs"), "{}", same.stdout);
    fs::write(&file, "version: 1\nservers: []\n")?;
    let bad = guarded.enforcement.cli(&["diff", &file])?;
    assert_eq!(bad.status.code(), Some(REJECTED));
    assert!(bad.stderr.contains("next.yaml:2:"), "{}", bad.stderr);
    // What was foreseen comes.
    let report = reload(&guarded, &next)?;
    assert_eq!((&report["losses"], &report["diff"]), (&foreseen["losses"], &foreseen["diff"]));
    streams.iter_mut().try_for_each(ends)?;
    flows_on(&mut stays)
}

#[test]
fn the_control_socket_is_roots_and_goes_with_the_daemon() -> Result<()> {
    let _deadline = Deadline::new("reload: socket", LIMIT);
    let mut guarded = unwatched("rl-socket").start()?;
    let socket = Path::new("/run/enforcer").join(format!("{}.sock", guarded.enforcement.pin_name()));
    let mode = |path: &Path| anyhow::Ok(fs::metadata(path)?.permissions().mode() & 0o777);
    assert_eq!(mode(&socket)?, 0o600);
    assert_eq!(mode(Path::new("/run/enforcer"))?, 0o700);
    guarded.enforcement.kill9()?;
    let dead = guarded.enforcement.cli(&["reload"])?;
    assert_eq!(dead.status.code(), Some(NOT_LOADED), "{}", dead.stderr);
    assert!(dead.stderr.contains("no daemon runs"), "{}", dead.stderr);
    // What the dead one left is in nobody's way.
    guarded.enforcement.launch()?;
    assert_eq!(guarded.enforcement.cli_json(&["reload"])?["changed"], false);
    guarded.enforcement.stop()?;
    assert!(!socket.exists());
    Ok(())
}
