//! The benchmark: what the enforcer adds to a request, measured in pairs.
//!
//! Two servers, the same program, stand side by side: the policy protects one, nothing is attached to the other. Each
//! figure comes from many short runs that alternate between the two, as direct, enforced, enforced, direct, ..., so that a
//! change in the machine's speed meets both alike; the figure is the median over the pairs. `docs/benchmarks.md` says how
//! to read them.

mod bed;
mod figures;
mod first_seen;
mod interrupt;
mod judge;
mod limit_figures;
pub mod limits;
mod machine;
mod markdown;
mod pinning;
pub mod revocation;
mod rounds;
pub mod shield;
mod stats;
mod stream;
mod table;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};

pub use figures::{Figure, Target, Unit, figures, revocation_figures, shield_figures};
pub use first_seen::FirstSeen;
pub use interrupt::catch_signals;
pub use judge::JudgeRun;
pub use limit_figures::limit_figures;
pub use limits::Limits;
pub use machine::Machine;
pub use markdown::write_markdown;
pub use revocation::Revocation;
pub use rounds::TokenRound;
pub use shield::Shield;
pub use stats::Spread;
pub use table::table;

use crate::issuer::Alg;
use crate::load::LoadReport;
use bed::Bed;
use pinning::{Pinning, Place};

/// How long everything takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Length of one run of the load generator, in milliseconds.
    pub run_ms: u64,
    /// Pairs of runs on one connection.
    pub one_connection_pairs: usize,
    /// Rounds of four runs on 64 connections: one token and many, direct and enforced.
    pub token_rounds: usize,
    /// Tokens in the runs with many.
    pub tokens: usize,
    /// Pairs of runs with requests that are refused.
    pub refusal_pairs: usize,
    /// Pairs of requests with a first-seen token, per algorithm.
    pub first_seen_pairs: usize,
    /// Pairs of 64 MiB responses.
    pub stream_pairs: usize,
    /// Streams whose token is revoked, and as many whose token ends.
    pub revoked_streams: usize,
    /// Rounds of packets for the shield.
    pub shield_rounds: usize,
    /// Pairs of runs without and with limits, on one and on 64 connections.
    pub limit_pairs: usize,
    /// Length of the run over a limit, in milliseconds.
    pub accuracy_ms: u64,
    /// Length of each of two phases in and two out of a flood, in milliseconds; the same again without a limit.
    pub flood_phase_ms: u64,
}

impl Plan {
    /// About five minutes.
    pub const FULL: Self = Self {
        run_ms: 500,
        one_connection_pairs: 40,
        token_rounds: 30,
        tokens: 1000,
        refusal_pairs: 30,
        first_seen_pairs: 2000,
        stream_pairs: 60,
        revoked_streams: 50,
        shield_rounds: 20,
        limit_pairs: 30,
        accuracy_ms: 10_000,
        flood_phase_ms: 3_000,
    };
    /// A minute: shows that everything works, and the order of magnitude.
    pub const QUICK: Self = Self {
        run_ms: 200,
        one_connection_pairs: 10,
        token_rounds: 8,
        tokens: 1000,
        refusal_pairs: 8,
        first_seen_pairs: 200,
        stream_pairs: 10,
        revoked_streams: 10,
        shield_rounds: 5,
        limit_pairs: 8,
        accuracy_ms: 3_000,
        flood_phase_ms: 1_000,
    };
}

/// The same thing measured on both servers, one right after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Pair<T> {
    /// On the server that nothing guards.
    pub direct: T,
    /// On the server behind the policy.
    pub enforced: T,
}

impl<T> Pair<T> {
    /// Measures both; `enforced_first` swaps the order, not the places.
    fn measure(enforced_first: bool, mut run: impl FnMut(Side) -> Result<T>) -> Result<Self> {
        if enforced_first {
            let enforced = run(Side::Enforced)?;
            Ok(Self { direct: run(Side::Direct)?, enforced })
        } else {
            let direct = run(Side::Direct)?;
            Ok(Self { direct, enforced: run(Side::Enforced)? })
        }
    }
}

/// One of the two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Direct,
    Enforced,
}

/// Every sample of a run of the benchmark.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Samples {
    /// One token, one connection.
    pub one_connection: Vec<Pair<LoadReport>>,
    /// 64 connections.
    pub connections_64: Vec<TokenRound>,
    /// 64 connections, requests without a token.
    pub refusals_64: Vec<Pair<LoadReport>>,
    /// First-seen ES256 tokens.
    pub first_seen_es256: FirstSeen,
    /// First-seen RS256 tokens.
    pub first_seen_rs256: FirstSeen,
    /// Seconds from the request to the last byte of a 64 MiB response.
    pub stream_64mib_s: Vec<Pair<f64>>,
    /// Calls of the judging program, on 64 and on one connection.
    pub judge: Vec<JudgeRun>,
    /// Streams of tokens that were revoked, or have ended.
    pub revocation: Revocation,
    /// Packets at the shield.
    pub shield: Shield,
    /// Limits; absent until they are measured, which is last.
    pub limits: Option<Limits>,
}

/// A run of the benchmark.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where it ran.
    pub machine: Machine,
    /// How long.
    pub plan: Plan,
    /// What it was called with.
    pub command: String,
    /// What was measured.
    pub samples: Samples,
}

/// Sets everything up, measures, takes it all down. `progress` hears what is being measured.
///
/// # Errors
/// When something can't be set up, an answer is not the expected one, a connection breaks, or a signal that
/// [`catch_signals`] catches arrives. A figure beyond its target is no error.
pub fn run(plan: Plan, command: String, mut progress: impl FnMut(&str)) -> Result<Report> {
    let machine = Machine::describe()?;
    progress("starting two servers and the daemon");
    let mut bed = Bed::start(plan.tokens)?;
    let pinning = Pinning::choose()?;
    let samples = measure(&mut bed, &pinning, plan, &mut progress).inspect_err(|_| {
        if let Ok(log) = bed.daemon_log() {
            eprintln!("the daemon's log ends with:\n{}", last_lines(&log, 20));
        }
    })?;
    progress("taking down");
    bed.stop()?;
    // What is started from here on would stay where this thread was last.
    pinning.apply(Place::Anywhere, &[])?;
    progress("streams of revoked and of expired tokens");
    let samples = Samples { revocation: revocation::measure(plan.revoked_streams)?, ..samples };
    progress("packets at the shield");
    let samples = Samples { shield: shield::measure(plan.shield_rounds, plan.run_ms)?, ..samples };
    progress("limits: their price, their accuracy, and a flood");
    let samples = Samples { limits: Some(limits::measure(plan)?), ..samples };
    Ok(Report { machine, plan, command, samples })
}

fn measure(bed: &mut Bed, pinning: &Pinning, plan: Plan, progress: &mut impl FnMut(&str)) -> Result<Samples> {
    progress("warming up: every head is seen once");
    rounds::warm_up(bed)?;
    progress("1 connection, 1 token");
    let one_connection = rounds::one_connection(bed, pinning, plan)?;
    progress("64 connections, 1 token and many");
    let connections_64 = rounds::tokens(bed, pinning, plan)?;
    progress("64 connections, no token");
    let refusals_64 = rounds::refusals(bed, pinning, plan)?;
    progress("a response of 64 MiB");
    let stream_64mib_s = stream::measure(bed, pinning, plan.stream_pairs)?;
    progress("first-seen tokens, ES256");
    let first_seen_es256 = first_seen::measure(bed, pinning, Alg::Es256, plan.first_seen_pairs)?;
    progress("first-seen tokens, RS256");
    let first_seen_rs256 = first_seen::measure(bed, pinning, Alg::Rs256, plan.first_seen_pairs)?;
    // Last, because the kernel's statistics slow the program down.
    progress("the judging program by itself");
    let judge = judge::measure(bed, pinning, plan.run_ms)?;
    Ok(Samples {
        one_connection,
        connections_64,
        refusals_64,
        first_seen_es256,
        first_seen_rs256,
        stream_64mib_s,
        judge,
        revocation: Revocation { revoked_ms: Vec::new(), expired_ms: Vec::new() },
        shield: Shield::NONE,
        limits: None,
    })
}

/// The report as JSON: each figure under its key, and everything behind it under `raw`.
///
/// # Errors
/// When a sample is no finite number.
pub fn to_json(report: &Report) -> Result<Value> {
    let figures = figures(&report.samples)?;
    let mut object: Map<String, Value> =
        figures.iter().map(|figure| (figure.key.to_owned(), json!(figure.spread.median))).collect();
    object.insert("figures".to_owned(), serde_json::to_value(&figures)?);
    object.insert("raw".to_owned(), serde_json::to_value(report)?);
    Ok(Value::Object(object))
}

/// Writes [`to_json`] to a file.
///
/// # Errors
/// As [`to_json`], and when the file can't be written.
pub fn write_json(report: &Report, path: &Path) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(&to_json(report)?)?;
    text.push(b'\n');
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn last_lines(text: &str, count: usize) -> &str {
    let start = text.trim_end().rmatch_indices('\n').nth(count.saturating_sub(1)).map_or(0, |(at, _)| at + 1);
    text.get(start..).unwrap_or_default()
}
