//! The daemon is killed at random instants while a token's owner and a thief send the same bytes: never does the thief get through, and what
//! the token's limit lets pass in all is no more than it allows.

mod common;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "torture/random.rs"]
mod random;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use enforcer_tests::caller::Place;
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Cgroup, Deadline};
use random::Random;
use serde_json::json;

use common::LIMIT;

const KILLS: usize = 8;
/// The owner's limit, in requests per second and at once.
const RATE: u64 = 20;
const BURST: u64 = 10;

/// Statuses of a client's requests until it is told to stop. A connection that is closed has none.
fn send(cgroup: &Cgroup, to: SocketAddr, request: &[u8], stop: &AtomicBool) -> Result<Vec<u16>> {
    let mut statuses = Vec::new();
    while !stop.load(Ordering::Acquire) {
        statuses.extend(Place::root(cgroup).call(to, &[], request)?.statuses());
    }
    Ok(statuses)
}

#[test]
fn killed_at_random_instants_a_bound_token_stays_with_its_workload_and_within_its_limit() -> Result<()> {
    let _deadline = Deadline::new("kill: bound", 2 * LIMIT);
    let mut guarded = Guarded::builder("killbound.slice")
        .nonblocking()
        .policy("workloads", json!([{"name": "agent", "unit": "agent.service"}]))
        .policy("bind", json!([{"workloads": ["agent"]}]))
        .policy(
            "limits",
            json!([{"name": "each", "per": "principal", "rate": format!("{RATE}/s"), "burst": BURST}]),
        )
        .start()?;
    let cgroup = guarded.enforcement.cgroup();
    let (agent, thief) = (cgroup.child("agent.service")?, cgroup.child("thief.service")?);
    let (to, request) = (guarded.addr(), guarded.call(Some(&guarded.token()?)).build());
    let (stop, mut random, begin) = (AtomicBool::new(false), Random::new(0xb0bd), Instant::now());
    let (owners, thiefs) = thread::scope(|scope| -> Result<_> {
        let owners: Vec<_> = (0..2).map(|_| scope.spawn(|| send(&agent, to, &request, &stop))).collect();
        let thiefs = scope.spawn(|| send(&thief, to, &request, &stop));
        let killing = (0..KILLS).try_for_each(|_| -> Result<()> {
            thread::sleep(Duration::from_millis(random.below(700) as u64));
            guarded.enforcement.kill9()?;
            guarded.enforcement.launch()
        });
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Release);
        let joined = |client: thread::ScopedJoinHandle<'_, Result<Vec<u16>>>| {
            client.join().map_err(|_| anyhow!("a client panicked"))?
        };
        let mut all = Vec::new();
        for owner in owners {
            all.extend(joined(owner)?);
        }
        let thiefs = joined(thiefs)?;
        killing?;
        Ok((all, thiefs))
    })?;
    let took = begin.elapsed();
    let passed = owners.iter().filter(|status| **status == 200).count() as u64;
    let limited = owners.iter().filter(|status| **status == 429).count();
    ensure!(thiefs.iter().all(|status| [401, 429, 503].contains(status)), "{thiefs:?}");
    ensure!(thiefs.contains(&401), "no thief was refused, so this shows nothing: {thiefs:?}");
    ensure!(passed > BURST && limited > 0, "{passed} passed, {limited} were limited: hardly any load");
    let most = BURST + RATE * (took.as_secs() + 1);
    ensure!(passed <= most, "{passed} passed in {took:?}, {most} may");
    assert_eq!(guarded.bytes_read()? % request.len() as u64, 0);
    ensure!(guarded.bytes_read()? / request.len() as u64 <= most, "the server read more than may pass");
    Ok(())
}
