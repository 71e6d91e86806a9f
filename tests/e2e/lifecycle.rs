//! Start, stop, restart: the enforcement stands as a whole or not at all.

mod common;

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use enforcer_tests::enforcement::{Enforcement, Guarded, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::{Cgroup, Deadline};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use nix::sys::signal::Signal;
use serde_json::json;

use common::{
    LIMIT, TIMEOUT, assert_nothing_is_left, assert_refusal, status, unknown, wait_until_unavailable,
};

/// Exit code of `enforcer run` and `enforcer unload` when something is in the way.
const BUSY: i32 = 6;

#[test]
fn sigterm_removes_programs_and_pins() -> Result<()> {
    let _deadline = Deadline::new("SIGTERM", LIMIT);
    let mut guarded = Guarded::start("sigterm")?;
    let mut open = guarded.connect()?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(open.roundtrip(&good)?.status, 200);
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    assert!(guarded.enforcement.pins().exists());
    assert!(guarded.enforcement.stop()?.success());
    // A guarded connection does not become an unguarded one.
    open.expect_closed()?;
    assert_nothing_is_left(&guarded)
}

#[test]
fn sigterm_lets_a_running_request_finish() -> Result<()> {
    let _deadline = Deadline::new("drain", LIMIT);
    let config = Config { answer_delay_ms: 1500, ..Config::default() };
    let mut guarded = Guarded::builder("drain").recorder(config).drain_timeout(20).start()?;
    let good = guarded.call(Some(&guarded.token()?)).header("Connection", "close").build();
    let mut running = guarded.connect()?;
    running.send(&good)?;
    let local = running.local_addr()?;
    guarded.recorder.wait_for_bytes(local, good.len() as u64, TIMEOUT)?;
    guarded.enforcement.daemon()?.signal(Signal::SIGTERM)?;
    assert_eq!(running.read_response()?.status, 200);
    drop(running);
    assert!(guarded.enforcement.stop()?.success());
    assert_nothing_is_left(&guarded)
}

#[test]
fn keep_leaves_the_enforcement_and_unload_ends_it() -> Result<()> {
    let _deadline = Deadline::new("--keep", LIMIT);
    let mut guarded = Guarded::builder("keep").option("--keep").start()?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let mut open = guarded.connect()?;
    assert_eq!(open.roundtrip(&good)?.status, 200);
    assert!(guarded.enforcement.stop()?.success());
    assert!(guarded.enforcement.pins().exists());
    // Known heads go on, on old and new connections.
    assert_eq!(open.roundtrip(&good)?.status, 200);
    assert_eq!(status(&guarded, &good)?, 200);
    wait_until_unavailable(&guarded)?;
    let read = guarded.bytes_read()?;
    let response = guarded.connect()?.roundtrip(&unknown(&guarded, &token, 1))?;
    assert_refusal(&response, 503, None);
    assert!(response.header("retry-after").is_some());
    assert_eq!(guarded.bytes_read()?, read);
    assert_eq!(open.roundtrip(&good)?.status, 200);
    let unload = guarded.enforcement.cli(&["unload", "--drain-timeout", "0"])?;
    assert!(unload.status.success(), "{}", unload.stderr);
    open.expect_closed()?;
    assert_nothing_is_left(&guarded)
}

#[test]
fn a_restart_after_keep_judges_by_the_new_policy() -> Result<()> {
    let _deadline = Deadline::new("new policy", LIMIT);
    let mut guarded = Guarded::builder("newpolicy").option("--keep").start()?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(status(&guarded, &good)?, 200);
    assert!(guarded.enforcement.stop()?.success());
    let moved = "https://moved.example.com/mcp";
    guarded.enforcement.write_policy(&PolicySpec::new(
        vec![IssuerSpec::from_file("corp", &guarded.issuer)],
        vec![ServerSpec::new("tools", &[guarded.addr()], moved)],
    ))?;
    guarded.enforcement.launch()?;
    assert_eq!(status(&guarded, &good)?, 401, "the old audience");
    let token = guarded.issuer.mint().audience(moved).sign()?;
    assert_eq!(status(&guarded, &guarded.call(Some(&token)).build())?, 200);
    Ok(())
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() -> Result<()> {
    let _deadline = Deadline::new("second daemon", LIMIT);
    let mut guarded = Guarded::start("seconddaemon")?;
    let mut open = guarded.connect()?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(open.roundtrip(&good)?.status, 200);
    let mut second = guarded.enforcement.spawn_daemon()?;
    assert_eq!(second.wait(TIMEOUT)?.code(), Some(BUSY), "{}", second.stderr());
    let pid = guarded.enforcement.daemon()?.pid().to_string();
    assert!(second.stderr().contains(&pid), "names the first one: {}", second.stderr());
    let unload = guarded.enforcement.cli(&["unload"])?;
    assert_eq!(unload.status.code(), Some(BUSY), "{}", unload.stderr);
    assert_eq!(open.roundtrip(&good)?.status, 200);
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    Ok(())
}

#[test]
fn what_cannot_be_enforced_is_not_half_attached() -> Result<()> {
    let _deadline = Deadline::new("bad start", LIMIT);
    let cgroup = Cgroup::new("badstart")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let recorder = RemoteRecorder::spawn(listen, &Config::default(), Some(&cgroup), None)?;
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    let server = || ServerSpec::new("tools", &[recorder.addr()], Guarded::RESOURCE);
    let policy = |servers| PolicySpec::new(vec![IssuerSpec::from_file("corp", &issuer)], servers);
    let mut enforcement = Enforcement::prepare(cgroup, &policy(vec![server()]), &[])?;
    let expect_failure = |enforcement: &Enforcement, what: &str, said: &str| -> Result<()> {
        let mut daemon = enforcement.spawn_daemon()?;
        let ended = daemon.wait(TIMEOUT)?;
        ensure!(ended.code().is_some_and(|code| code != 0), "{what}: {ended}");
        ensure!(daemon.stderr().contains(said), "{what}: {}", daemon.stderr());
        ensure!(enforcement.leftover_pins().is_empty(), "{what}: {:?}", enforcement.leftover_pins());
        let request = RequestBuilder::mcp_call(&recorder.addr().to_string(), "/mcp", None, "echo").build();
        let status = Connection::open(recorder.addr(), TIMEOUT)?.roundtrip(&request)?.status;
        ensure!(status == 200, "{what}: something is attached: {status}");
        Ok(())
    };
    for (what, broken, said) in [
        ("an unknown field", policy(vec![server().with("tokens", true)]), "tokens"),
        ("an unknown issuer", policy(vec![server().with("issuers", json!(["nobody"]))]), "nobody"),
        ("no servers", policy(vec![]), "servers"),
        ("a server twice", policy(vec![server(), server()]), "tools"),
        ("no audience", policy(vec![server().with("resource", "")]), "resource"),
    ] {
        enforcement.write_policy(&broken)?;
        expect_failure(&enforcement, what, said)?;
    }
    for (what, text) in [("empty", ""), ("not YAML", "{{{"), ("another version", "version: 9\n")] {
        fs::write(enforcement.policy_path(), text)?;
        expect_failure(&enforcement, what, "policy.yaml")?;
    }
    fs::remove_file(enforcement.policy_path())?;
    expect_failure(&enforcement, "no file", "policy.yaml")?;
    // The same with nothing wrong starts.
    enforcement.write_policy(&policy(vec![server()]))?;
    enforcement.launch()
}

#[test]
fn two_enforcements_in_two_cgroups_do_not_know_each_other() -> Result<()> {
    let _deadline = Deadline::new("two enforcements", LIMIT);
    let first = Guarded::start("first")?;
    let mut second = Guarded::start("other")?;
    let good = first.call(Some(&first.token()?)).build();
    assert_eq!(status(&first, &good)?, 200);
    assert_eq!(status(&second, &second.call(Some(&first.token()?)).build())?, 401, "another issuer's keys");
    assert!(second.enforcement.stop()?.success());
    assert_nothing_is_left(&second)?;
    assert_eq!(status(&first, &good)?, 200);
    assert_eq!(status(&first, &first.call(None).build())?, 401);
    assert!(first.enforcement.pins().exists());
    Ok(())
}
