//! Everything that comes and goes does so for a while: connections, tokens, heads that stay halves, refusals, policies, and the daemon itself.
//! In the end memory is where it was, and nothing has leaked.
//!
//! A minute by default; `cargo xtask test --soak-minutes 10 soak` takes longer.

#[allow(dead_code, reason = "each test program uses its part")]
mod torture;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use enforcer_tests::enforcement::{Enforcement, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::issuer::Issuer;
use enforcer_tests::raw::Connection;
use serde_json::Value;
use torture::{Random, Scene, Sockets, post, wait_for_no_flows};

/// How long, in seconds; `cargo xtask test --soak-minutes` sets it.
const SECONDS_VARIABLE: &str = "ENFORCER_SOAK_SECS";
const DEFAULT_SECONDS: u64 = 60;
const CLIENTS: u64 = 8;
/// What an allocator may keep between two looks at a process that does the same all the time.
const SLACK_BYTES: u64 = 24 << 20;
/// Good tokens, never seen before, that all clients present in a second: in the five minutes that a grant lives fewer than there are
/// slots for. A full table refuses each further token, and this is about what comes and goes.
const FRESH_PER_SEC: u64 = 150;

/// Memory and tables at one moment.
#[derive(Debug)]
struct Sample {
    resident_bytes: u64,
    resident_max_bytes: u64,
    descriptors: u64,
    maps_bytes: u64,
    grants: u64,
}

impl Sample {
    fn of(enforcement: &Enforcement) -> Result<Self> {
        let status = enforcement.cli_json(&["status"])?;
        let number = |path: &str| {
            status.pointer(path).and_then(Value::as_u64).with_context(|| format!("no {path} in {status}"))
        };
        Ok(Self {
            resident_bytes: number("/daemon/process/resident_bytes")?,
            resident_max_bytes: number("/daemon/process/resident_max_bytes")?,
            descriptors: number("/daemon/process/descriptors")?,
            maps_bytes: number("/loaded/maps_bytes")?,
            grants: number("/loaded/grants/used")?,
        })
    }
}

/// Good tokens that were not presented yet, no faster than [`FRESH_PER_SEC`].
struct Fresh<'a> {
    issuer: &'a Issuer,
    since: Instant,
    given: AtomicU64,
}

impl Fresh<'_> {
    /// The next one, if it is due.
    fn next(&self) -> Result<Option<String>> {
        let due = self.since.elapsed().as_secs() * FRESH_PER_SEC;
        let given = self
            .given
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |given| (given < due).then(|| given + 1));
        given.is_ok().then(|| torture::good_token(self.issuer)).transpose()
    }
}

#[test]
fn memory_is_flat_and_nothing_leaks_under_churn() -> Result<()> {
    let seconds = match std::env::var(SECONDS_VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("{SECONDS_VARIABLE}={text} is no number"))?,
        Err(_) => DEFAULT_SECONDS,
    };
    let mut scene = Scene::new("soak", Duration::from_secs(seconds + 180))?;
    scene.set_sockets(Sockets::NonBlocking);
    let (addr, peer_issuer) = (scene.addr(), scene.issuer.clone());
    let quiet = Sample::of(&scene.enforcement)?;
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let fresh = Fresh { issuer: &peer_issuer, since: Instant::now(), given: AtomicU64::new(0) };
    let (early, late, kills) = thread::scope(|scope| {
        let running: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (stop, answered, fresh) = (&stop, &answered, &fresh);
                scope.spawn(move || client(addr, number, stop, answered, fresh))
            })
            .collect();
        let outcome = churn(&mut scene, Duration::from_secs(seconds));
        stop.store(true, Ordering::Release);
        for client in running {
            client.join().map_err(|_| anyhow!("a client panicked"))??;
        }
        outcome
    })?;
    wait_for_no_flows(&scene.enforcement)?;
    let after = Sample::of(&scene.enforcement)?;
    let answered = answered.into_inner();
    println!("{answered} answers, {kills} kills\n{quiet:?}\n{early:?}\n{late:?}\n{after:?}");
    ensure!(answered > 20 * seconds, "only {answered} answers");
    ensure!(
        late.resident_bytes < early.resident_bytes + early.resident_bytes / 4 + SLACK_BYTES,
        "the daemon grew from {} to {} bytes",
        early.resident_bytes,
        late.resident_bytes
    );
    ensure!(late.resident_bytes < late.resident_max_bytes, "more memory than computed: {late:?}");
    // A namespace's netlink socket may have come since.
    ensure!(after.descriptors <= quiet.descriptors + 4, "descriptors leak: {quiet:?}, {after:?}");
    ensure!(after.maps_bytes <= quiet.maps_bytes + 4096, "map memory leaks: {quiet:?}, {after:?}");
    scene.check_alive()?;
    let left = scene.enforcement.leftover_pins();
    ensure!(left == [scene.enforcement.pins()], "pins leak: {left:?}");
    ensure!(scene.enforcement.stop()?.success(), "the daemon did not end well");
    let left = scene.enforcement.leftover_pins();
    ensure!(left.is_empty(), "still pinned: {left:?}");
    Ok(())
}

/// A third of the time the daemon is killed and started again; then it is left to live under one policy after another, and looked at
/// early and late.
fn churn(scene: &mut Scene, time: Duration) -> Result<(Sample, Sample, u32)> {
    let start = Instant::now();
    let mut kills = 0;
    let mut random = Random::new(0x50a4);
    while start.elapsed() < time / 3 {
        thread::sleep(Duration::from_millis(500 + random.below(1500) as u64));
        scene.enforcement.kill9()?;
        kills += 1;
        scene.enforcement.launch()?;
    }
    thread::sleep(time / 6);
    let early = Sample::of(&scene.enforcement)?;
    let mut reloads = 0;
    while start.elapsed() < time {
        thread::sleep(Duration::from_millis(500));
        reload(scene, reloads % 2 == 0)?;
        reloads += 1;
        let sample = Sample::of(&scene.enforcement)?;
        ensure!(sample.resident_bytes < sample.resident_max_bytes, "more memory than computed: {sample:?}");
    }
    let late = Sample::of(&scene.enforcement)?;
    ensure!(late.grants > 0, "nothing was granted: {late:?}");
    Ok((early, late, kills))
}

/// Has the daemon read a policy with, or without, another server.
fn reload(scene: &Scene, with_another: bool) -> Result<()> {
    let mut servers = vec![torture::server(&[scene.addr()])];
    if with_another {
        servers.push(ServerSpec::new("another", &["127.0.0.2:9".parse()?], "https://another.test/mcp"));
    }
    let issuer = IssuerSpec::from_file("corp", &scene.issuer);
    scene.enforcement.write_policy(&PolicySpec::new(vec![issuer], servers).any_number_of_unknown())?;
    let reloaded = scene.enforcement.cli(&["reload"])?;
    ensure!(reloaded.status.success(), "{}: {}{}", reloaded.status, reloaded.stdout, reloaded.stderr);
    Ok(())
}

/// Calls with fresh and known tokens, good and bad ones, leaves heads and bodies unfinished, closes and resets. A connection may be
/// cut off at any time, but a bad token is never answered with 200, and a good one never with 401.
fn client(
    addr: SocketAddr,
    number: u64,
    stop: &AtomicBool,
    answered: &AtomicU64,
    fresh: &Fresh<'_>,
) -> Result<()> {
    let bad = || torture::bad_token(fresh.issuer);
    let mut random = Random::new(0x50a + number);
    let mut known = [vec![bad()?], vec![torture::good_token(fresh.issuer)?]];
    while !stop.load(Ordering::Acquire) {
        let Ok(mut connection) = Connection::open(addr, Duration::from_secs(5)) else {
            thread::sleep(Duration::from_millis(20));
            continue;
        };
        for _ in 0..1 + random.below(12) {
            let allowed = random.below(2) == 0;
            let of_kind = &mut known[usize::from(allowed)];
            let unseen = match (random.below(2) == 0, allowed) {
                (false, _) => None,
                (true, true) => fresh.next()?,
                (true, false) => Some(bad()?),
            };
            if let Some(token) = unseen {
                of_kind.truncate(8);
                of_kind.insert(0, token);
            }
            let token = random.pick(of_kind).clone();
            let request = post(&token).body(&random.bytes(random.clone().below(8_000))).build();
            let keep = if random.below(10) == 0 { random.below(request.len()) } else { request.len() };
            let part = request.get(..keep).unwrap_or_default();
            let cut = random.segmentation(keep, 3);
            if connection.send_segmented(part, &cut, Duration::ZERO).is_err() || keep < request.len() {
                break;
            }
            let Ok(response) = connection.read_response() else { break };
            let expected: &[u16] = if allowed { &[200, 503] } else { &[401, 503] };
            ensure!(expected.contains(&response.status), "{} for allowed: {allowed}", response.status);
            answered.fetch_add(1, Ordering::Relaxed);
        }
        if random.below(3) == 0 {
            drop(connection.reset());
        }
    }
    Ok(())
}
