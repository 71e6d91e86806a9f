//! The runs of the load generator.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::bed::Bed;
use super::pinning::{Pinning, Place};
use super::{Pair, Plan, Side, interrupt};
use crate::load::{LoadConfig, LoadReport, Stop, run};

const OK: u16 = 200;
const UNAUTHORIZED: u16 = 401;
/// Connections of the runs with many.
pub(super) const CONNECTIONS: usize = 64;

/// Four runs on 64 connections, one after the other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenRound {
    /// Every request has the same token.
    pub one_token: Pair<LoadReport>,
    /// The requests of each connection go through all the tokens, the connections offset to each other.
    pub many_tokens: Pair<LoadReport>,
}

/// A load on one side and the only status that may come back.
struct Load {
    requests: Vec<Vec<u8>>,
    connections: usize,
    threads: usize,
    status: u16,
}

/// Every head that the runs use is sent once and known from then on.
pub(super) fn warm_up(bed: &mut Bed) -> Result<()> {
    for side in [Side::Direct, Side::Enforced] {
        let requests = bed.calls(side, usize::MAX);
        let stop = Stop::Requests(requests.len() as u64);
        once(bed, side, &Load { requests, connections: 1, threads: 1, status: OK }, stop)?;
        let status = refusal_status(side);
        let load = Load { requests: vec![bed.call(side, None)], connections: 1, threads: 1, status };
        once(bed, side, &load, Stop::Requests(100))?;
    }
    Ok(())
}

/// One token on one connection; client and server share a CPU.
pub(super) fn one_connection(bed: &mut Bed, pinning: &Pinning, plan: Plan) -> Result<Vec<Pair<LoadReport>>> {
    pinning.apply(Place::Together, &bed.server_pids())?;
    let loads = Pair::measure(false, |side| {
        Ok(Load { requests: bed.calls(side, 1), connections: 1, threads: 1, status: OK })
    })?;
    let punts = handed_over(bed)?;
    let pairs = pairs(bed, &loads, plan.one_connection_pairs, plan.run_ms)?;
    no_more_punts(bed, punts)?;
    Ok(pairs)
}

/// One token and many on 64 connections; client and server have a CPU each.
pub(super) fn tokens(bed: &mut Bed, pinning: &Pinning, plan: Plan) -> Result<Vec<TokenRound>> {
    pinning.apply(Place::Apart, &bed.server_pids())?;
    let loads = |count| {
        Pair::measure(false, |side| {
            Ok(Load { requests: bed.calls(side, count), connections: CONNECTIONS, threads: 1, status: OK })
        })
    };
    let (one, many) = (loads(1)?, loads(usize::MAX)?);
    let stop = Stop::After(Duration::from_millis(plan.run_ms));
    let punts = handed_over(bed)?;
    let rounds = (0..plan.token_rounds)
        .map(|round| {
            // Over four rounds each of the four runs comes first and last equally often.
            let mut pair = |loads: &Pair<Load>| {
                Pair::measure(round % 2 == 1, |side| once(bed, side, loads.of(side), stop))
            };
            if round % 4 < 2 {
                let one_token = pair(&one)?;
                Ok(TokenRound { one_token, many_tokens: pair(&many)? })
            } else {
                let many_tokens = pair(&many)?;
                Ok(TokenRound { one_token: pair(&one)?, many_tokens })
            }
        })
        .collect::<Result<_>>()?;
    no_more_punts(bed, punts)?;
    Ok(rounds)
}

/// Requests without a token on 64 connections: refused on one side, served on the other. The kernel refuses on the CPU
/// that sends, so two client threads send, and nobody is pinned: one thread alone would leave a CPU idle on one side.
pub(super) fn refusals(bed: &mut Bed, pinning: &Pinning, plan: Plan) -> Result<Vec<Pair<LoadReport>>> {
    pinning.apply(Place::Anywhere, &bed.server_pids())?;
    let loads = Pair::measure(false, |side| {
        let requests = vec![bed.call(side, None)];
        Ok(Load { requests, connections: CONNECTIONS, threads: 2, status: refusal_status(side) })
    })?;
    pairs(bed, &loads, plan.refusal_pairs, plan.run_ms)
}

/// A load of tool calls with one token on the guarded server.
pub(super) fn enforced_calls(bed: &mut Bed, connections: usize, run_ms: u64) -> Result<LoadReport> {
    let load = Load { requests: bed.calls(Side::Enforced, 1), connections, threads: 1, status: OK };
    once(bed, Side::Enforced, &load, Stop::After(Duration::from_millis(run_ms)))
}

fn refusal_status(side: Side) -> u16 {
    match side {
        Side::Direct => OK,
        Side::Enforced => UNAUTHORIZED,
    }
}

impl<T> Pair<T> {
    fn of(&self, side: Side) -> &T {
        match side {
            Side::Direct => &self.direct,
            Side::Enforced => &self.enforced,
        }
    }
}

fn pairs(bed: &mut Bed, loads: &Pair<Load>, count: usize, run_ms: u64) -> Result<Vec<Pair<LoadReport>>> {
    let stop = Stop::After(Duration::from_millis(run_ms));
    (0..count)
        .map(|number| Pair::measure(number % 2 == 1, |side| once(bed, side, loads.of(side), stop)))
        .collect()
}

fn once(bed: &mut Bed, side: Side, load: &Load, stop: Stop) -> Result<LoadReport> {
    interrupt::check()?;
    let mut config = LoadConfig::new(bed.addr(side), load.connections, load.requests.clone(), stop);
    config.threads = load.threads;
    config.watched_pids = vec![bed.server_pid(side), bed.daemon_pid()?];
    let report = run(&config).with_context(|| format!("load on the {side:?} server"));
    interrupt::check()?;
    let report = report?;
    ensure!(
        report.errors == 0 && report.reconnects == 0,
        "{side:?} server: {} connections broke, {} were opened again",
        report.errors,
        report.reconnects
    );
    ensure!(
        report.requests > 0 && report.status_counts.keys().all(|status| *status == load.status),
        "{side:?} server: statuses {:?} where only {} is right",
        report.status_counts,
        load.status
    );
    Ok(report)
}

/// What the daemon was handed so far: requests, and further bytes of a flow that it holds.
fn handed_over(bed: &Bed) -> Result<u64> {
    let counters = bed.counters()?;
    Ok(counters.punts() + counters.kernel("punt-continued"))
}

/// Requests with known heads are the kernel's alone; a run in which they were not would measure something else.
fn no_more_punts(bed: &Bed, before: u64) -> Result<()> {
    let punts = handed_over(bed)?.saturating_sub(before);
    ensure!(punts == 0, "{punts} requests with a known head went to the daemon");
    Ok(())
}
