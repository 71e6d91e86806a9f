//! The first request with a token: it goes to the daemon, which verifies the token's signature.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::bed::Bed;
use super::pinning::{Pinning, Place};
use super::{Pair, Side, interrupt};
use crate::issuer::Alg;
use crate::raw::Connection;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Pairs that are not counted: the first one on a connection sets more up than a token.
const WARM_UP_PAIRS: usize = 20;

/// Requests with a fresh token each, alternating between two warm connections.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FirstSeen {
    /// Microseconds from the request's first byte to the answer's last.
    pub latency_us: Vec<Pair<f64>>,
    /// Requests that the daemon judged and let pass meanwhile: all on the enforced side.
    pub daemon_allowed: u64,
    /// Those of them that came in while the daemon still held the flow for the one before. Their latency has the wait in it.
    pub continued: u64,
}

pub(super) fn measure(bed: &mut Bed, pinning: &Pinning, alg: Alg, pairs: usize) -> Result<FirstSeen> {
    // Three parties, the daemon's threads among them: any placement of ours would favour one.
    pinning.apply(Place::Anywhere, &bed.server_pids())?;
    let total = pairs + WARM_UP_PAIRS;
    let tokens = bed.fresh_tokens(alg, total)?;
    let calls = |side| tokens.iter().map(|token| bed.call(side, Some(token))).collect::<Vec<_>>();
    // Neither side sees a token twice, for they are different servers.
    let calls = [calls(Side::Direct), calls(Side::Enforced)];
    let [direct_calls, enforced_calls] = &calls;
    let mut direct = Connection::open(bed.addr(Side::Direct), TIMEOUT)?;
    let mut enforced = Connection::open(bed.addr(Side::Enforced), TIMEOUT)?;
    let before = bed.counters()?;
    let mut latency_us = Vec::with_capacity(total);
    for (number, (direct_call, enforced_call)) in direct_calls.iter().zip(enforced_calls).enumerate() {
        interrupt::check()?;
        latency_us.push(Pair::measure(number % 2 == 1, |side| match side {
            Side::Direct => timed(&mut direct, direct_call),
            Side::Enforced => timed(&mut enforced, enforced_call),
        })?);
    }
    let after = bed.counters()?;
    let daemon_allowed = after.daemon("allowed").saturating_sub(before.daemon("allowed"));
    ensure!(
        daemon_allowed == total as u64,
        "{total} tokens were new, but the daemon let {daemon_allowed} pass"
    );
    let continued = after.kernel("punt-continued").saturating_sub(before.kernel("punt-continued"));
    latency_us.drain(..WARM_UP_PAIRS);
    Ok(FirstSeen { latency_us, daemon_allowed, continued })
}

fn timed(connection: &mut Connection, request: &[u8]) -> Result<f64> {
    let start = Instant::now();
    let response = connection.roundtrip(request)?;
    let elapsed = start.elapsed();
    ensure!(response.status == 200, "a sound token was answered with {}", response.status);
    Ok(elapsed.as_secs_f64() * 1e6)
}
