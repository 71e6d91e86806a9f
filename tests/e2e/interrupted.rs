//! A start or a reload that is cut off: by a kill, by a stop, or because what is to end can't be found.

mod common;

use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use enforcer_tests::enforcement::{Guarded, IssuerSpec, PolicySpec};
use enforcer_tests::guard::{Deadline, NetNs, wait_until};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder};
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;

use common::{
    LIMIT, TIMEOUT, assert_nothing_is_left, endless, ends, flows_on, kept, open_stream, policy,
    refused_unread, restart, status, tools,
};

/// Starts that are killed.
const ROUNDS: u32 = 10;

#[test]
fn killed_at_any_moment_of_such_a_start_nothing_is_open() -> Result<()> {
    let _deadline = Deadline::new("interrupted: killed", LIMIT);
    let mut guarded = kept("in-killed").start()?;
    let policies = [
        policy(&guarded, vec![tools(&guarded).with("scopes", json!(["a"]))]),
        policy(&guarded, vec![tools(&guarded)]),
    ];
    let bare = guarded.call(None).build();
    guarded.enforcement.kill9()?;
    let mut switched = 0;
    for round in 0..ROUNDS {
        // Such a start as a whole, to know how long it takes now; the next one is killed before its end, or just after it.
        let start = Instant::now();
        guarded.enforcement.write_policy(&policies[0])?;
        guarded.enforcement.launch()?;
        let takes = start.elapsed();
        guarded.enforcement.kill9()?;
        guarded.enforcement.write_policy(&policies[1])?;
        let mut daemon = guarded.enforcement.spawn_daemon()?;
        thread::sleep(takes * round / (ROUNDS - 1));
        let asked = Connection::open(guarded.addr(), Duration::from_millis(200))?.roundtrip(&bare);
        let status = asked.map_or(0, |response| response.status);
        ensure!([0, 401, 503].contains(&status), "round {round}: {status}");
        daemon.kill()?;
        switched += u32::from(daemon.stderr().contains("policy changed"));
    }
    eprintln!("{switched} of {ROUNDS} starts had switched when they were killed");
    guarded.enforcement.launch()?;
    refused_unread(&guarded, "a")?;
    assert_eq!(guarded.enforcement.leftover_pins(), [guarded.enforcement.pins()]);
    Ok(())
}

#[test]
fn what_was_observed_in_another_namespace_ends_before_keys_come() -> Result<()> {
    let _deadline = Deadline::new("interrupted: another namespace", LIMIT);
    let netns = Arc::new(NetNs::new("in-netns")?);
    let mut guarded = kept("in-netns").observing().recorder(endless()).netns(&netns).start()?;
    let bare = guarded.call(None).build();
    let mut stream = open_stream(netns.run(|| Connection::open(guarded.addr(), TIMEOUT))??, &bare)?;
    guarded.enforcement.kill9()?;
    // Its keys never come, so the start waits for them as long as it ever does.
    let issuer = Issuer::new("https://slow.example.com", Alg::Es256)?;
    let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let url = format!("http://{}/jwks", silent.local_addr()?);
    let slow = IssuerSpec::from_url("slow", &issuer, &url).with("allow_http_loopback", true);
    let issuers = vec![IssuerSpec::from_file("corp", &guarded.issuer), slow];
    let server = tools(&guarded).with("issuers", json!(["corp", "slow"]));
    guarded.enforcement.write_policy(&PolicySpec::new(issuers, vec![server]))?;
    let mut daemon = guarded.enforcement.spawn_daemon()?;
    daemon.wait_for_line("policy changed", TIMEOUT)?;
    ends(&mut stream)?;
    let log = daemon.stderr();
    ensure!(!log.contains("no keys yet") && !log.contains("daemon: ready"), "{log}");
    daemon.kill()?;
    Ok(())
}

/// Whom the policy does not allow any more can't be told by a path that is public no more: the daemon that changed the policy knows it.
#[test]
fn who_is_killed_before_all_has_ended_is_taken_over() -> Result<()> {
    let _deadline = Deadline::new("interrupted: not ended", LIMIT);
    for killed in [true, false] {
        let name = format!("in-lost-{killed}");
        let mut guarded = kept(&name).server("public_paths", json!(["/healthz"])).start()?;
        let (netns, addr) = (NetNs::new(&name)?, guarded.addr());
        let _server = common::leaving_server(&guarded, &netns)?;
        let public = RequestBuilder::new("GET", "/healthz").header("Host", &guarded.host()).build();
        let mut stream = open_stream(netns.run(|| Connection::open(addr, TIMEOUT))??, &public)?;
        let next = policy(&guarded, vec![tools(&guarded)]);
        if killed {
            restart(&mut guarded, true, &next)?;
        } else {
            guarded.enforcement.write_policy(&next)?;
            guarded.enforcement.cli_json(&["reload"])?;
        }
        assert_eq!(guarded.enforcement.reason("public-path-removed")?, 1);
        wait_until("its namespace was searched in vain", TIMEOUT, || {
            (guarded.enforcement.reason("netns-not-found").ok()? >= 1).then_some(())
        })?;
        flows_on(&mut stream)?;
        if killed {
            guarded.enforcement.kill9()?;
        }
        // Somebody comes to live there.
        let _there = common::inhabitant(&netns)?;
        if !killed {
            ends(&mut stream)?;
            // The daemon has turned to other work since.
            assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
            guarded.enforcement.kill9()?;
        }
        guarded.enforcement.launch()?;
        ends(&mut stream)?;
        let log = guarded.enforcement.log()?;
        assert_eq!(log.contains("taking over"), killed, "{log}");
        assert_eq!(log.contains("switch_policy=false"), !killed, "{log}");
        assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    }
    Ok(())
}

#[test]
fn a_reload_that_is_prepared_when_the_daemon_is_stopped_lets_go_of_the_state() -> Result<()> {
    let _deadline = Deadline::new("interrupted: prepared", LIMIT);
    let mut guarded = Guarded::builder("in-term").option("--no-watch").drain_timeout(120).start()?;
    let known = guarded.call(Some(&guarded.token()?)).build();
    let mut open = guarded.connect()?;
    assert_eq!(open.roundtrip(&known)?.status, 200);
    // Its keys never come, so the new policy is waited with.
    let slow = Issuer::new("https://slow.example.com", Alg::Es256)?;
    let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let url = format!("http://{}/jwks", silent.local_addr()?);
    let issuers =
        vec![IssuerSpec::from_file("corp", &guarded.issuer), IssuerSpec::from_url("slow", &slow, &url)];
    let strict = tools(&guarded).with("scopes", json!(["more"])).with("issuers", json!(["corp", "slow"]));
    guarded.enforcement.write_policy(&PolicySpec::new(issuers, vec![strict]))?;
    guarded.enforcement.daemon()?.signal(nix::sys::signal::Signal::SIGHUP)?;
    // It is being prepared.
    let asked = silent.accept()?;
    guarded.enforcement.daemon()?.signal(nix::sys::signal::Signal::SIGTERM)?;
    guarded.enforcement.daemon()?.wait_for_line("stopping", TIMEOUT)?;
    // Longer than a policy waits for keys: one that is not abandoned would be ready by now, and hold the lock until the end.
    thread::sleep(Duration::from_secs(7));
    let lock = wait_until("the lock of the state", TIMEOUT, || {
        let file =
            fs::OpenOptions::new().write(true).open(guarded.enforcement.state_dir().join("lock")).ok()?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
    })?;
    assert_eq!(open.roundtrip(&known)?.status, 200, "it drains under the policy in force");
    let log = guarded.enforcement.log()?;
    assert!(!log.contains("policy changed") && !log.contains("policy not taken"), "{log}");
    drop((open, asked, lock));
    assert!(guarded.enforcement.stop()?.success());
    assert_nothing_is_left(&guarded)
}
