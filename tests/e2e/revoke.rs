//! Tokens that are no longer good: their requests are refused, and the streams that they opened end.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, NetNs};
use enforcer_tests::raw::Connection;
use enforcer_tests::recorder::{Answer, Config};

use common::{LIMIT, TIMEOUT};

/// Streams end within a second; on a machine that does other work at the same time the clock is not to be trusted further.
const SOON: Duration = Duration::from_secs(5);

/// The server answers everything with events, for longer than any test runs.
fn endless() -> Config {
    let answer = Answer::Sse { events: 100_000, event_bytes: 10, interval_ms: 20 };
    Config { answer, ..Config::default() }
}

/// A connection with an open stream.
fn open_stream(mut connection: Connection, request: &[u8]) -> Result<Connection> {
    connection.send(request)?;
    let head = connection.read_head()?;
    ensure!(head.status == 200, "{head:?}");
    flows_on(&mut connection)?;
    Ok(connection)
}

/// More events come.
fn flows_on(connection: &mut Connection) -> Result<()> {
    for _ in 0..10 {
        ensure!(!connection.read_some(65_536)?.is_empty(), "the stream has ended");
    }
    Ok(())
}

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
