//! Tokens that are no longer good: their requests are refused, and the streams that they opened end.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, NetNs, wait_until};
use enforcer_tests::raw::{Connection, Response};
use enforcer_tests::recorder::Config;
use serde_json::{Value, json};

use common::{LIMIT, SOON, TIMEOUT, endless, flows_on, open_stream, wait_until_unavailable};

/// Reads until the connection is closed; for how long.
fn wait_for_end(connection: &mut Connection, limit: Duration) -> Result<Duration> {
    let start = Instant::now();
    while connection.read_some(65_536).is_ok_and(|bytes| !bytes.is_empty()) {
        ensure!(start.elapsed() < limit, "the stream goes on after {limit:?}");
    }
    Ok(start.elapsed())
}

#[test]
fn the_stream_of_an_expired_token_ends_in_another_namespace_and_others_go_on() -> Result<()> {
    let _deadline = Deadline::new("expired stream", LIMIT);
    let netns = Arc::new(NetNs::new("expired")?);
    let guarded =
        Guarded::builder("expired").issuer("leeway", "1s").recorder(endless()).netns(&netns).start()?;
    let connect = || netns.run(|| Connection::open(guarded.addr(), TIMEOUT))?;
    let long = guarded.call(Some(&guarded.token()?)).build();
    let mut other = open_stream(connect()?, &long)?;
    let start = Instant::now();
    let short = guarded.call(Some(&guarded.mint().expires_in(4).sign()?)).build();
    // First seen, and known.
    let mut streams = [open_stream(connect()?, &short)?, open_stream(connect()?, &short)?];
    for stream in &mut streams {
        wait_for_end(stream, Duration::from_secs(5) + SOON)?;
    }
    // Seconds are whole: it ends between four and five seconds after it was made, with one more of leeway.
    ensure!(start.elapsed() >= Duration::from_secs(4), "too early: {:?}", start.elapsed());
    flows_on(&mut other)?;
    assert_eq!(guarded.enforcement.reason("stream-expired")?, 2);
    Ok(())
}

#[test]
fn a_client_goes_on_with_its_next_token_when_the_first_one_ends() -> Result<()> {
    let _deadline = Deadline::new("next token", LIMIT);
    let guarded = Guarded::builder("nexttoken").issuer("leeway", "1s").start()?;
    let first = guarded.call(Some(&guarded.mint().expires_in(3).sign()?)).build();
    let mut connection = guarded.connect()?;
    assert_eq!(connection.roundtrip(&first)?.status, 200);
    guarded.recorder.set_config(&endless())?;
    let mut stream = open_stream(connection, &guarded.call(Some(&guarded.token()?)).build())?;
    let end = Instant::now() + Duration::from_secs(7);
    while Instant::now() < end {
        flows_on(&mut stream)?;
    }
    // Somebody else's token, and what it opened may not be over: that connection ends.
    guarded.recorder.set_config(&Config::default())?;
    let mallory = guarded.mint().subject("mallory").expires_in(3).sign()?;
    let mut connection = guarded.connect()?;
    assert_eq!(connection.roundtrip(&guarded.call(Some(&mallory)).build())?.status, 200);
    guarded.recorder.set_config(&endless())?;
    let mut stream = open_stream(connection, &guarded.call(Some(&guarded.token()?)).build())?;
    wait_for_end(&mut stream, Duration::from_secs(5) + SOON)?;
    Ok(())
}

/// Exit codes of the command line.
const FAILURE: i32 = 1;
const USAGE: i32 = 2;
const REJECTED: i32 = 4;

fn revoke(guarded: &Guarded, options: &[&str]) -> Result<Value> {
    guarded.enforcement.cli_json(&[&["revoke"], options].concat())
}

fn number(document: &Value, name: &str) -> u64 {
    document.get(name).and_then(Value::as_u64).unwrap_or(u64::MAX)
}

fn rows(guarded: &Guarded, noun: &str) -> Result<Vec<Value>> {
    let document = guarded.enforcement.cli_json(&[noun])?;
    Ok(document.get(noun).and_then(Value::as_array).cloned().unwrap_or_default())
}

/// `iat` has no fractions: what is minted now must be from a later second than a revocation that was said just before.
fn next_second() {
    std::thread::sleep(Duration::from_millis(1100));
}

fn assert_revoked(response: &Response) {
    assert_eq!(response.status, 401, "{response:?}");
    let challenge = response.header("www-authenticate").unwrap_or_default();
    assert!(challenge.contains("error=\"invalid_token\""), "{challenge}");
    assert!(!challenge.contains("revoked"), "it gives nothing away: {challenge}");
}

#[test]
fn each_selector_ends_what_it_names_and_nothing_else() -> Result<()> {
    let _deadline = Deadline::new("selectors", LIMIT);
    let guarded = Guarded::start("selectors")?;
    let long = "s".repeat(600);
    let subjects = ["alice".to_owned(), "bob".to_owned(), format!("{long}1"), format!("{long}2")];
    let token = |subject: &str, client: &str| guarded.mint().subject(subject).client_id(client).sign();
    for case in 0..8 {
        let [alice, bob, long_1, long_2] = &subjects;
        let all =
            [(alice, "editor"), (alice, "cli"), (bob, "editor"), (bob, "cli"), (long_1, "x"), (long_2, "x")];
        let mut clients = Vec::new();
        for (subject, client) in all {
            let request = guarded.call(Some(&token(subject, client)?)).build();
            let mut connection = guarded.connect()?;
            assert_eq!(connection.roundtrip(&request)?.status, 200, "case {case}: {subject} {client}");
            assert_eq!(connection.roundtrip(&request)?.status, 200, "case {case}: {subject} {client}, known");
            clients.push((subject, client, connection, request));
        }
        let fingerprint = rows(&guarded, "grants")?
            .iter()
            .filter(|row| row.get("state") == Some(&json!("active")))
            .find(|row| {
                row.get("subject") == Some(&json!("bob")) && row.get("client_id") == Some(&json!("cli"))
            })
            .and_then(|row| row.get("token_fingerprint")?.as_str().map(str::to_owned))
            .context("bob's grant")?;
        type Means<'a> = Box<dyn Fn(&str, &str) -> bool + 'a>;
        let (options, means): (Vec<&str>, Means<'_>) = match case {
            0 => (vec!["--token-fingerprint", &fingerprint], Box::new(|s, c| (s, c) == ("bob", "cli"))),
            1 => (vec!["--subject", "alice"], Box::new(|s, _| s == "alice")),
            2 => (vec!["--client", "editor"], Box::new(|_, c| c == "editor")),
            3 => (vec!["--subject", "alice", "--client", "cli"], Box::new(|s, c| (s, c) == ("alice", "cli"))),
            4 => (vec!["--issuer", "corp", "--subject", long_1], Box::new(|s, _| s == long_1)),
            5 => (vec!["--issuer", "https://login.example.com/tools"], Box::new(|_, _| true)),
            6 => (vec!["--server", "tools", "--client", "x"], Box::new(|_, c| c == "x")),
            _ => (vec!["--all"], Box::new(|_, _| true)),
        };
        let done = revoke(&guarded, &options)?;
        let meant = all.iter().filter(|(subject, client)| means(subject, client)).count();
        // Those of the cases before are there still.
        assert!(number(&done, "grants_revoked") >= meant as u64, "case {case}: {done}");
        assert_eq!(number(&done, "connections_closed"), meant as u64, "case {case}: {done}");
        for (subject, client, connection, request) in &mut clients {
            if means(subject, client) {
                connection.expect_closed().with_context(|| format!("case {case}: {subject} {client}"))?;
                // On new connections as well, by the daemon and then by what it has left with the kernel.
                for _ in 0..3 {
                    assert_revoked(&guarded.connect()?.roundtrip(request)?);
                }
            } else {
                assert_eq!(
                    connection.roundtrip(request)?.status,
                    200,
                    "case {case}: {subject} {client} goes on"
                );
            }
        }
        // Tokens that are issued later are good.
        next_second();
    }
    assert_eq!(rows(&guarded, "revocations")?.len(), 8);
    Ok(())
}

#[test]
fn a_stream_of_a_revoked_token_ends_in_another_namespace_and_others_go_on() -> Result<()> {
    let _deadline = Deadline::new("revoked stream", LIMIT);
    let netns = Arc::new(NetNs::new("revoked")?);
    let guarded = Guarded::builder("revstream").recorder(endless()).netns(&netns).start()?;
    let connect = || netns.run(|| Connection::open(guarded.addr(), TIMEOUT))?;
    let request = |subject: &str| -> Result<Vec<u8>> {
        Ok(guarded.call(Some(&guarded.mint().subject(subject).sign()?)).build())
    };
    let mut other = open_stream(connect()?, &request("bob")?)?;
    // First seen by the daemon, and known to the kernel.
    let alice = request("alice")?;
    let mut streams = [open_stream(connect()?, &alice)?, open_stream(connect()?, &alice)?];
    let done = revoke(&guarded, &["--subject", "alice"])?;
    assert_eq!((number(&done, "grants_revoked"), number(&done, "connections_closed")), (1, 2), "{done}");
    for stream in &mut streams {
        wait_for_end(stream, SOON)?;
    }
    flows_on(&mut other)?;
    assert_revoked(&netns.run(|| Connection::open(guarded.addr(), TIMEOUT)?.roundtrip(&alice))??);
    Ok(())
}

#[test]
fn an_earlier_token_of_a_connection_counts_too() -> Result<()> {
    let _deadline = Deadline::new("several tokens", LIMIT);
    let guarded = Guarded::start("several")?;
    let request = |subject: &str| -> Result<Vec<u8>> {
        Ok(guarded.call(Some(&guarded.mint().subject(subject).sign()?)).build())
    };
    // More tokens than a connection remembers one by one, on the fast path and the slow one.
    let subjects = ["alice", "bob", "carol", "dave", "erin", "frank"];
    let requests: Vec<_> = subjects.iter().map(|subject| request(subject)).collect::<Result<_>>()?;
    let (first, last) = (requests.first().context("none")?, requests.last().context("none")?);
    guarded.recorder.set_config(&endless())?;
    let mut bystander = open_stream(guarded.connect()?, last)?;
    for revoked in ["alice", "erin"] {
        // The answer to alice's request could go on behind those that followed it: nobody can tell from outside.
        guarded.recorder.set_config(&Config::default())?;
        let mut connection = guarded.connect()?;
        for request in if revoked == "alice" { &requests } else { requests.get(1..).unwrap_or_default() } {
            assert_eq!(connection.roundtrip(request)?.status, 200);
        }
        guarded.recorder.set_config(&endless())?;
        let mut stream = open_stream(connection, last)?;
        let done = revoke(&guarded, &["--subject", revoked])?;
        assert_eq!(number(&done, "connections_closed"), 1, "{done}");
        wait_for_end(&mut stream, SOON)?;
        flows_on(&mut bystander)?;
    }
    assert_revoked(&guarded.connect()?.roundtrip(first)?);
    Ok(())
}

#[test]
fn without_a_daemon_heads_are_refused_and_streams_end() -> Result<()> {
    let _deadline = Deadline::new("revoked without a daemon", LIMIT);
    let mut guarded = Guarded::start("revdead")?;
    let alice = guarded.call(Some(&guarded.mint().subject("alice").sign()?)).build();
    let bob = guarded.call(Some(&guarded.mint().subject("bob").sign()?)).build();
    let (mut idle, mut other) = (guarded.connect()?, guarded.connect()?);
    assert_eq!(idle.roundtrip(&alice)?.status, 200);
    assert_eq!(other.roundtrip(&bob)?.status, 200);
    guarded.recorder.set_config(&endless())?;
    let mut stream = open_stream(guarded.connect()?, &alice)?;
    guarded.recorder.set_config(&Config::default())?;
    guarded.enforcement.kill9()?;
    wait_until_unavailable(&guarded)?;
    assert_eq!(idle.roundtrip(&alice)?.status, 200, "known, and still good");
    let done = revoke(&guarded, &["--subject", "alice"])?;
    assert_eq!((number(&done, "grants_revoked"), number(&done, "connections_closed")), (1, 2), "{done}");
    wait_for_end(&mut stream, SOON)?;
    idle.expect_closed()?;
    let read = guarded.bytes_read()?;
    assert_eq!(guarded.connect()?.roundtrip(&alice)?.status, 503, "known, and not good any more");
    assert_eq!(guarded.bytes_read()?, read);
    assert_eq!(other.roundtrip(&bob)?.status, 200);
    // The next daemon knows it, and a restart later too.
    for _ in 0..2 {
        guarded.enforcement.launch()?;
        assert_revoked(&guarded.connect()?.roundtrip(&alice)?);
        assert_eq!(guarded.connect()?.roundtrip(&bob)?.status, 200);
        assert!(guarded.enforcement.stop()?.success());
    }
    // With nothing loaded it is recorded, and the next start enforces it.
    let done = revoke(&guarded, &["--subject", "bob"])?;
    assert_eq!(done.get("in_force"), Some(&json!(false)));
    guarded.enforcement.launch()?;
    assert_revoked(&guarded.connect()?.roundtrip(&bob)?);
    assert_eq!(rows(&guarded, "revocations")?.len(), 2);
    Ok(())
}

#[test]
fn a_fingerprint_outlives_the_daemon_and_ends_with_its_token() -> Result<()> {
    let _deadline = Deadline::new("fingerprints", LIMIT);
    let mut guarded = Guarded::builder("fingerprints").issuer("leeway", "0s").start()?;
    let token = guarded.mint().expires_in(600).sign()?;
    let request = guarded.call(Some(&token)).build();
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    let fingerprint = |guarded: &Guarded| -> Result<String> {
        let grants = rows(guarded, "grants")?;
        let shown = grants.first().and_then(|row| row.get("token_fingerprint")?.as_str());
        Ok(shown.context("no grant")?.to_owned())
    };
    let before = fingerprint(&guarded)?;
    assert!(guarded.enforcement.stop()?.success());
    guarded.enforcement.launch()?;
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    assert_eq!(fingerprint(&guarded)?, before, "the same key after everything was loaded anew");
    let done = revoke(&guarded, &["--token-fingerprint", &before])?;
    let ends = number(&done, "ends_in_s");
    assert!((800..=900).contains(&ends), "with the token, under any leeway: {done}");
    assert_revoked(&guarded.connect()?.roundtrip(&request)?);
    // One that nobody has seen may live as long as policy lets any token live.
    let done = revoke(&guarded, &["--token-fingerprint", &"0".repeat(32)])?;
    assert!(number(&done, "ends_in_s") > 3000, "{done}");
    Ok(())
}

#[test]
fn a_revocation_is_explained_and_can_be_taken_back() -> Result<()> {
    let _deadline = Deadline::new("unrevoke", LIMIT);
    let guarded = Guarded::start("unrevoke")?;
    let token = guarded.mint().subject("alice").sign()?;
    let request = guarded.call(Some(&token)).build();
    let policy = guarded.enforcement.policy_path();
    let policy = policy.to_str().context("a path")?;
    let explain = |code: i32, said: &str| -> Result<()> {
        let explained = ["explain", "--server", "tools", "--policy", policy];
        let explained = guarded.enforcement.cli_with_input(&explained, token.as_bytes())?;
        ensure!(explained.status.code() == Some(code), "{}{}", explained.stdout, explained.stderr);
        ensure!(explained.stdout.contains(said), "{}", explained.stdout);
        Ok(())
    };
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    explain(0, "is not revoked")?;
    let done = revoke(&guarded, &["--issuer", "corp", "--subject", "alice"])?;
    explain(REJECTED, "is revoked, by number 1: issuer corp, subject alice")?;
    assert_revoked(&guarded.connect()?.roundtrip(&request)?);
    let id = number(&done, "id").to_string();
    let undone = guarded.enforcement.cli(&["unrevoke", &id])?;
    ensure!(undone.status.success(), "{}", undone.stderr);
    assert!(rows(&guarded, "revocations")?.is_empty());
    explain(0, "is not revoked")?;
    // The kernel repeats a refusal for two seconds.
    wait_until("the token is good again", TIMEOUT, || {
        (guarded.connect().ok()?.roundtrip(&request).ok()?.status == 200).then_some(())
    })?;
    let again = guarded.enforcement.cli(&["unrevoke", &id])?;
    assert_eq!(again.status.code(), Some(FAILURE), "{}", again.stderr);
    for wrong in [
        vec!["revoke"],
        vec!["revoke", "--all", "--subject", "x"],
        vec!["revoke", "--token-fingerprint", "abc"],
        vec!["unrevoke", "x"],
    ] {
        assert_eq!(guarded.enforcement.cli(&wrong)?.status.code(), Some(USAGE), "{wrong:?}");
    }
    let wrong = guarded.enforcement.cli(&["revoke", "--server", "toolz"])?;
    assert_eq!(wrong.status.code(), Some(FAILURE));
    assert!(wrong.stderr.contains("tools"), "{}", wrong.stderr);
    Ok(())
}

#[test]
fn a_full_list_is_said_and_nothing_is_dropped() -> Result<()> {
    let _deadline = Deadline::new("full list", LIMIT);
    let mut guarded = Guarded::start("revfull")?;
    let token = guarded.mint().subject("alice").sign()?;
    let request = guarded.call(Some(&token)).build();
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    assert!(guarded.enforcement.stop()?.success());
    let row = |id: u64, ends: u64| {
        json!({
            "id": id, "revoked_at_unix_s": 1, "issued_until_unix_s": 1, "expires_at_unix_s": ends,
            "exact_end": true, "token_fingerprint": format!("{id:032x}"),
        })
    };
    let record = |rows: Vec<Value>| -> Result<()> {
        let document = json!({ "version": 1, "next_id": 20_000, "token_life_s": 3600, "revocations": rows });
        let file = guarded.enforcement.state_dir().join("revocations.json");
        Ok(std::fs::write(file, serde_json::to_vec(&document)?)?)
    };
    record((1..=16_384).map(|id| row(id, 4_000_000_000)).collect())?;
    guarded.enforcement.launch()?;
    let mut open = guarded.connect()?;
    assert_eq!(open.roundtrip(&request)?.status, 200);
    let full = guarded.enforcement.cli(&["revoke", "--subject", "alice"])?;
    assert_eq!(full.status.code(), Some(FAILURE), "{}", full.stderr);
    assert!(full.stderr.contains("full") && full.stderr.contains("unrevoke"), "{}", full.stderr);
    assert_eq!(open.roundtrip(&request)?.status, 200, "nothing is revoked");
    assert_eq!(rows(&guarded, "revocations")?.len(), 16_384, "nothing is dropped");
    // One is taken back, and there is room for one.
    ensure!(guarded.enforcement.cli(&["unrevoke", "77"])?.status.success());
    let done = revoke(&guarded, &["--subject", "alice"])?;
    assert_eq!((number(&done, "id"), number(&done, "connections_closed")), (20_000, 1));
    open.expect_closed()?;
    // One more than there is room for, and a file that is damaged: the daemon does not start without its revocations.
    assert!(guarded.enforcement.stop()?.success());
    let file = guarded.enforcement.state_dir().join("revocations.json");
    std::fs::write(&file, "{")?;
    let mut daemon = guarded.enforcement.spawn_daemon()?;
    ensure!(!daemon.wait(TIMEOUT)?.success(), "it started");
    assert!(daemon.stderr().contains("damaged"), "{}", daemon.stderr());
    assert!(!guarded.enforcement.pins().exists());
    std::fs::remove_file(file)?;
    Ok(())
}
