//! How long the stream of a token goes on after it was revoked, or has ended.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::interrupt;
use crate::enforcement::Guarded;
use crate::raw::Connection;
use crate::recorder::{Answer, Config};

/// An event is sent this often, so the last byte is known as exactly.
const EVENT_MS: u64 = 2;
/// No stream goes on longer.
const LIMIT: Duration = Duration::from_secs(20);
/// Tokens of the expiry runs end between two and six seconds after they were made.
const FIRST_END_S: u64 = 2;
const ENDS: u64 = 5;

/// Milliseconds to the last byte at the client.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Revocation {
    /// From the start of `enforcer revoke --subject S`.
    pub revoked_ms: Vec<f64>,
    /// From the instant of the token's end (`exp`; the issuer's leeway is 0).
    pub expired_ms: Vec<f64>,
}

/// Measures on a server of its own, with so many streams of each kind.
///
/// # Errors
/// When something can't be started, or a stream does not end.
pub fn measure(streams: usize) -> Result<Revocation> {
    let answer = Answer::Sse { events: u64::MAX, event_bytes: 100, interval_ms: EVENT_MS };
    let config = Config { answer, ..Config::default() };
    let guarded = Guarded::builder("bench-revoke").issuer("leeway", "0s").recorder(config).start()?;
    let mut bystander = stream(&guarded, &guarded.mint().subject("bystander").sign()?)?;
    let revoked_ms = (0..streams).map(|number| revoked(&guarded, number)).collect::<Result<_>>()?;
    let expired_ms = expired(&guarded, streams as u64)?;
    ensure!(!bystander.read_some(1 << 20)?.is_empty(), "the stream of a good token has ended");
    Ok(Revocation { revoked_ms, expired_ms })
}

fn stream(guarded: &Guarded, token: &str) -> Result<Connection> {
    let mut connection = guarded.connect()?;
    connection.send(&guarded.call(Some(token)).build())?;
    ensure!(connection.read_head()?.status == 200, "no stream");
    ensure!(!connection.read_some(1 << 20)?.is_empty(), "no event");
    Ok(connection)
}

/// When the last byte came.
fn last_byte(connection: &mut Connection) -> Result<Instant> {
    let start = Instant::now();
    let mut last = start;
    while connection.read_some(1 << 20).is_ok_and(|bytes| !bytes.is_empty()) {
        last = Instant::now();
        ensure!(last - start < LIMIT, "the stream goes on after {LIMIT:?}");
    }
    Ok(last)
}

fn revoked(guarded: &Guarded, number: usize) -> Result<f64> {
    interrupt::check()?;
    let subject = format!("subject-{number}");
    let mut connection = stream(guarded, &guarded.mint().subject(&subject).sign()?)?;
    let reader = thread::spawn(move || last_byte(&mut connection));
    // So that the reader reads.
    thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    let done = guarded.enforcement.cli_json(&["revoke", "--subject", &subject])?;
    ensure!(done.get("connections_closed").and_then(serde_json::Value::as_u64) == Some(1), "{done}");
    let last = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
    Ok(last.saturating_duration_since(start).as_secs_f64() * 1e3)
}

fn expired(guarded: &Guarded, streams: u64) -> Result<Vec<f64>> {
    interrupt::check()?;
    let since_1970 = || SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970");
    let first = since_1970()?.as_secs() + FIRST_END_S;
    let readers: Vec<_> = (0..streams)
        .map(|number| {
            let end = first + number % ENDS;
            let mint = guarded.mint().subject(&format!("ending-{number}"));
            let token = mint.claim("exp", end).sign()?;
            let mut connection = stream(guarded, &token)?;
            Ok((end, thread::spawn(move || last_byte(&mut connection))))
        })
        .collect::<Result<_>>()?;
    // One instant on both clocks.
    let (now, now_1970) = (Instant::now(), since_1970()?);
    readers
        .into_iter()
        .map(|(end, reader)| {
            let last = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
            let last_1970 = now_1970.as_secs_f64() + last.saturating_duration_since(now).as_secs_f64();
            #[expect(clippy::cast_precision_loss, reason = "seconds since 1970")]
            let late_s = last_1970 - end as f64;
            ensure!(late_s >= -0.1, "a stream ended before its token");
            Ok(late_s.max(0.0) * 1e3)
        })
        .collect()
}
