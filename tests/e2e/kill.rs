//! The daemon is killed at random instants under load, again and again, while every byte that the server reads is compared with what
//! was allowed: in order, once, and of requests alone that were allowed. Every request has an outcome: an answer, or a closed connection.
//!
//! 20 kills by default; `cargo xtask test --kills 500 killed_at_random` makes more.

mod common;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "torture/random.rs"]
mod random;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, wait_until};
use enforcer_tests::issuer::Issuer;
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::ConnectionRecord;
use random::Random;

use common::{TIMEOUT, status};

/// How many kills; `cargo xtask test --kills` sets it.
const KILLS_VARIABLE: &str = "ENFORCER_KILLS";
const DEFAULT_KILLS: usize = 20;
const CLIENTS: u64 = 6;
/// Kills between two comparisons.
const ROUND: usize = 10;
/// Within it every request must have its outcome: the daemon's timeout, and the time that a busy machine may take.
const OUTCOME: Duration = Duration::from_secs(20);

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Answered(u16),
    Closed,
}

/// A request as it was sent.
#[derive(Debug)]
struct Sent {
    bytes: Vec<u8>,
    allowed: bool,
    outcome: Outcome,
    took: Duration,
}

/// A connection as its client saw it.
#[derive(Debug)]
struct Seen {
    client: SocketAddr,
    requests: Vec<Sent>,
}

#[derive(Debug, Default)]
struct Tally {
    answered: BTreeMap<u16, u64>,
    closed: u64,
    compared_bytes: u64,
    slowest: Duration,
}

#[test]
fn killed_at_random_instants_no_byte_is_lost_doubled_or_unverified() -> Result<()> {
    let kills = match std::env::var(KILLS_VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("{KILLS_VARIABLE}={text} is no number"))?,
        Err(_) => DEFAULT_KILLS,
    };
    let _deadline = Deadline::new("random kills", Duration::from_secs(180 + 4 * kills as u64));
    let mut guarded = Guarded::builder("randomkill").nonblocking().start()?;
    let mut random = Random::new(0x6b11);
    let (mut tally, mut killed, start) = (Tally::default(), 0, Instant::now());
    while killed < kills {
        let round = ROUND.min(kills - killed);
        let seen = round_of(&mut guarded, &mut random, round, killed as u64)?;
        killed += round;
        compare(&guarded, &seen, &mut tally)?;
        guarded.recorder.forget_closed()?;
    }
    println!(
        "{killed} kills in {:.0} s; answers {:?}, closed {}, {} bytes compared, slowest outcome {:?}",
        start.elapsed().as_secs_f64(),
        tally.answered,
        tally.closed,
        tally.compared_bytes,
        tally.slowest
    );
    ensure!(
        tally.answered.get(&200).is_some_and(|count| *count > 10 * kills as u64),
        "hardly any load: {tally:?}"
    );
    ensure!(
        tally.answered.get(&401).is_some_and(|count| *count > kills as u64),
        "hardly any refusals: {tally:?}"
    );
    ensure!(guarded.enforcement.leftover_pins() == [guarded.enforcement.pins()], "pins leak");
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    assert!(guarded.enforcement.stop()?.success());
    Ok(())
}

/// Clients at work while the daemon dies some times. In the end one lives, and all clients have ended.
fn round_of(guarded: &mut Guarded, random: &mut Random, kills: usize, seed: u64) -> Result<Vec<Seen>> {
    let (addr, issuer, stop) = (guarded.addr(), guarded.issuer.clone(), AtomicBool::new(false));
    let host = guarded.host();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (issuer, stop, host) = (&issuer, &stop, host.as_str());
                let random = Random::new(seed << 8 | number);
                scope.spawn(move || client(addr, host, issuer, random, stop))
            })
            .collect();
        let killing = kill_some(guarded, random, kills);
        stop.store(true, Ordering::Release);
        let mut seen = Vec::new();
        for client in clients {
            seen.extend(client.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        killing?;
        Ok(seen)
    })
}

fn kill_some(guarded: &mut Guarded, random: &mut Random, kills: usize) -> Result<()> {
    // The one that runs.
    thread::sleep(Duration::from_millis(random.below(400) as u64));
    guarded.enforcement.kill9()?;
    for kill in 1..kills {
        let options: &[&str] = if kill == kills / 2 { &["--replace-programs"] } else { &[] };
        let mut daemon = guarded.enforcement.spawn_daemon_with(options)?;
        // At any moment of its start, or of its work.
        if random.below(2) == 0 {
            daemon.wait_for_line(" ready", TIMEOUT)?;
        }
        thread::sleep(Duration::from_micros(random.below(500_000) as u64));
        ensure!(daemon.try_wait()?.is_none(), "the daemon ended by itself: {}", daemon.stderr());
        daemon.kill()?;
    }
    guarded.enforcement.launch()
}

/// Good and bad tokens, heads that are known and heads that are new, whole and in pieces; each body is one of its kind.
fn client(
    addr: SocketAddr,
    host: &str,
    issuer: &Issuer,
    mut random: Random,
    stop: &AtomicBool,
) -> Result<Vec<Seen>> {
    let good = issuer.mint().audience(Guarded::RESOURCE).sign()?;
    let bad = Issuer::new("https://login.example.com/tools", enforcer_tests::issuer::Alg::Es256)?
        .mint()
        .audience(Guarded::RESOURCE)
        .sign()?;
    let mut all = Vec::new();
    let mut number = 0_u64;
    while !stop.load(Ordering::Acquire) {
        let Ok(mut connection) = Connection::open(addr, OUTCOME) else { continue };
        let Ok(client) = connection.local_addr() else { continue };
        let mut seen = Seen { client, requests: Vec::new() };
        for _ in 0..1 + random.below(20) {
            number += 1;
            let allowed = random.below(4) != 0;
            let bytes = request(host, if allowed { &good } else { &bad }, number, &mut random);
            let pieces = if random.below(4) == 0 { 3 } else { 0 };
            let cut = random.segmentation(bytes.len(), pieces);
            let pause = Duration::from_micros(random.below(3_000) as u64);
            let start = Instant::now();
            let answer =
                connection.send_segmented(&bytes, &cut, pause).and_then(|()| connection.read_response());
            let took = start.elapsed();
            ensure!(took < OUTCOME, "no outcome after {took:?}: {answer:?}");
            let outcome = match &answer {
                Ok(response) => Outcome::Answered(response.status),
                Err(_) => Outcome::Closed,
            };
            seen.requests.push(Sent { bytes, allowed, outcome, took });
            if outcome == Outcome::Closed || answer.is_ok_and(|answer| closes(&answer)) {
                break;
            }
            thread::sleep(Duration::from_micros(random.below(4_000) as u64));
        }
        all.push(seen);
    }
    Ok(all)
}

fn closes(answer: &enforcer_tests::raw::Response) -> bool {
    answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

fn request(host: &str, token: &str, number: u64, random: &mut Random) -> Vec<u8> {
    let mut builder = RequestBuilder::new("POST", "/mcp").header("Host", host).bearer(token);
    builder = builder.header("Content-Type", "application/json").header("X-Filler", &"x".repeat(300));
    if random.below(3) == 0 {
        builder = builder.header("X-Number", &number.to_string());
    }
    let length = *random.pick(&[64, 64, 64, 900, 20_000]);
    let mut body = format!("{number:>20} ").into_bytes();
    body.extend(random.bytes(length));
    if random.below(8) == 0 { builder.chunked_body(&body, 100).build() } else { builder.body(&body).build() }
}

/// Compares what the server read with what was allowed.
fn compare(guarded: &Guarded, seen: &[Seen], tally: &mut Tally) -> Result<()> {
    // All clients are gone: when the server has seen it, nothing can come late.
    let all = wait_until("the server has seen every connection's end", TIMEOUT, || {
        let records = guarded.recorder.connections().ok()?;
        records.iter().all(|record| record.closed).then_some(records)
    })?;
    let mut records: BTreeMap<SocketAddr, Vec<ConnectionRecord>> = BTreeMap::new();
    for record in all {
        records.entry(record.peer).or_default().push(record);
    }
    for connection in seen {
        for sent in &connection.requests {
            tally.slowest = tally.slowest.max(sent.took);
            match sent.outcome {
                Outcome::Answered(status) => *tally.answered.entry(status).or_default() += 1,
                Outcome::Closed => tally.closed += 1,
            }
        }
        // A port that was used twice: the records are in the order of their connections, but for those that the server never saw.
        let candidates = records.entry(connection.client).or_default();
        let found = candidates.iter().position(|record| check(&record.kept, &connection.requests).is_ok());
        match found {
            Some(at) => tally.compared_bytes += candidates.remove(at).bytes_read,
            None => {
                let kept = candidates.first().map(|record| record.kept.clone()).unwrap_or_default();
                check(&kept, &connection.requests)
                    .with_context(|| format!("connection of {}", connection.client))?;
            }
        }
    }
    if let Some(record) = records.values().flatten().find(|record| record.bytes_read > 0) {
        bail!("{} bytes of nobody, from {}: {:?}", record.bytes_read, record.peer, record.error);
    }
    Ok(())
}

/// The server must have read the allowed requests that it answered, whole and in order; of one whose connection was closed perhaps the
/// beginning; and nothing else.
fn check(kept: &[u8], requests: &[Sent]) -> Result<()> {
    let mut rest = kept;
    for sent in requests {
        match sent.outcome {
            Outcome::Answered(200) => {
                ensure!(sent.allowed, "a request with a bad token was answered with 200");
                rest = rest.strip_prefix(sent.bytes.as_slice()).with_context(|| {
                    format!(
                        "not the request that was answered: {}",
                        String::from_utf8_lossy(&rest[..rest.len().min(200)])
                    )
                })?;
            }
            Outcome::Answered(503) => {}
            Outcome::Answered(401) => ensure!(!sent.allowed, "a good token was refused"),
            Outcome::Answered(status) => bail!("an answer that nobody gives: {status}"),
            Outcome::Closed => {
                ensure!(rest.is_empty() || sent.allowed, "bytes of a request with a bad token");
                ensure!(sent.bytes.starts_with(rest), "other bytes than those of the last request");
                rest = &[];
            }
        }
    }
    ensure!(rest.is_empty(), "{} bytes too many", rest.len());
    Ok(())
}

#[test]
fn a_restart_under_load_loses_no_known_request_and_delays_new_ones_by_less_than_it_takes() -> Result<()> {
    let _deadline = Deadline::new("restart under load", common::LIMIT);
    let mut guarded = Guarded::builder("restartload").nonblocking().option("--keep").start()?;
    let token = guarded.token()?;
    let known = guarded.call(Some(&token)).build();
    assert_eq!(status(&guarded, &known)?, 200);
    let (addr, stop) = (guarded.addr(), AtomicBool::new(false));
    let counts = thread::scope(|scope| -> Result<Vec<u64>> {
        let (known, stop) = (&known, &stop);
        let clients: Vec<_> = (0..4)
            .map(|number| {
                scope.spawn(move || -> Result<u64> {
                    let mut count = 0;
                    let mut connection = Connection::open(addr, TIMEOUT)?;
                    while !stop.load(Ordering::Acquire) {
                        if number % 2 == 0 {
                            connection = Connection::open(addr, TIMEOUT)?;
                        }
                        let status = connection.roundtrip(known).context("a known request was lost")?.status;
                        ensure!(status == 200, "a known request got {status}");
                        count += 1;
                    }
                    Ok(count)
                })
            })
            .collect();
        let restarts = restarts(&mut guarded, &token);
        stop.store(true, Ordering::Release);
        let counts =
            clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        let counts = counts.collect::<Result<_>>();
        restarts?;
        counts
    })?;
    println!("known requests answered: {counts:?}");
    ensure!(counts.iter().all(|count| *count > 20), "hardly any load: {counts:?}");
    Ok(())
}

fn restarts(guarded: &mut Guarded, token: &str) -> Result<()> {
    let mut rounds = Vec::new();
    for round in 0..6 {
        let start = Instant::now();
        if round % 2 == 0 {
            guarded.enforcement.kill9()?;
        } else {
            ensure!(guarded.enforcement.stop()?.success(), "the daemon did not end well");
        }
        let mut connection = guarded.connect()?;
        let sent = Instant::now();
        let request = common::unknown(guarded, token, round);
        connection.send(&request)?;
        let waiter =
            thread::spawn(move || connection.read_response().map(|answer| (answer.status, sent.elapsed())));
        guarded.enforcement.launch()?;
        let took = start.elapsed();
        let (status, delay) = waiter.join().map_err(|_| anyhow!("the waiter panicked"))??;
        println!("restart {round}: {took:?}; a new request waited {delay:?}");
        ensure!(status == 200, "a request that waited for the daemon got {status}");
        rounds.push((took, delay));
        thread::sleep(Duration::from_millis(300));
    }
    // The answer is there before the daemon says that it is; reading either takes its time on a busy machine, in some of the rounds.
    let in_time = rounds.iter().filter(|(took, delay)| *delay < *took + Duration::from_millis(200)).count();
    ensure!(in_time > rounds.len() / 2, "restarts, and how long requests waited: {rounds:?}");
    Ok(())
}

#[test]
fn without_a_next_daemon_what_waits_for_it_ends() -> Result<()> {
    let _deadline = Deadline::new("watcher", common::LIMIT);
    let mut guarded = Guarded::builder("watcher").daemon_timeout("2s").start()?;
    let token = guarded.token()?;
    let known = guarded.call(Some(&token)).build();
    assert_eq!(status(&guarded, &known)?, 200);
    let read = guarded.bytes_read()?;
    let limit = guarded.enforcement.cli_json(&["status"])?;
    assert_eq!(limit.pointer("/daemon/heartbeat_limit_ms"), Some(&serde_json::json!(2000)));
    // One request is half in the daemon's hands, one comes when it is dead.
    let whole = common::unknown(&guarded, &token, 1);
    let mut begun = common::half_handed_over(&guarded, &whole)?;
    guarded.enforcement.kill9()?;
    let mut waiting = guarded.connect()?;
    waiting.send(&common::unknown(&guarded, &token, 2))?;
    begun.expect_closed()?;
    waiting.expect_closed()?;
    assert_eq!(guarded.bytes_read()?, read);
    // From then on what is new is refused at once, what is known goes on, and a new daemon finds all in order.
    assert_eq!(status(&guarded, &common::unknown(&guarded, &token, 3))?, 503);
    assert_eq!(status(&guarded, &known)?, 200);
    guarded.enforcement.launch()?;
    assert_eq!(status(&guarded, &common::unknown(&guarded, &token, 3))?, 200);
    assert_eq!(guarded.enforcement.reason("daemon-died").unwrap_or(0), 0, "nothing was left for it");
    Ok(())
}

#[test]
fn when_the_watcher_is_killed_too_the_next_daemon_ends_what_was_begun() -> Result<()> {
    let _deadline = Deadline::new("both killed", common::LIMIT);
    let mut guarded = Guarded::builder("bothkilled").daemon_timeout("2s").start()?;
    let token = guarded.token()?;
    let whole = common::unknown(&guarded, &token, 1);
    let mut begun = common::half_handed_over(&guarded, &whole)?;
    thread::sleep(Duration::from_millis(100));
    let watcher = watcher_of(guarded.enforcement.daemon()?.pid())?;
    guarded.enforcement.kill9()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(watcher), nix::sys::signal::Signal::SIGKILL)?;
    common::wait_until_unavailable(&guarded)?;
    thread::sleep(Duration::from_millis(500));
    let flows = guarded.enforcement.cli_json(&["flows"])?;
    ensure!(flows.to_string().contains("\"punted\""), "who ended it? {flows}");
    guarded.enforcement.launch()?;
    begun.expect_closed()?;
    assert_eq!(guarded.enforcement.reason("daemon-died")?, 1);
    assert_eq!(guarded.bytes_read()?, 0);
    Ok(())
}

/// Process id of a daemon's watcher. The daemon has another child, which fetches keys.
fn watcher_of(daemon: u32) -> Result<i32> {
    let children = std::fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"))?;
    let watches = |child: &&str| {
        let command = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).nth(1) == Some(b"watch")
    };
    Ok(children.split_whitespace().find(watches).context("the daemon has no watcher")?.parse()?)
}
