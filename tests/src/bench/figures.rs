//! From samples to the figures that people compare.

use anyhow::{Context, Result};
use serde::Serialize;

use super::stats::{Spread, median};
use super::{FirstSeen, Pair, Revocation, Samples, Shield, TokenRound, limit_figures};
use crate::load::LoadReport;

const STREAM_MIB: f64 = 64.0;

/// A measured quantity: what it is, and what it should be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// Its name in the JSON.
    pub key: &'static str,
    /// What it is, for people.
    pub what: &'static str,
    /// The unit of the two columns.
    pub unit: Unit,
    /// Median on the server that nothing guards, where there is one.
    pub direct: Option<f64>,
    /// Median on the guarded server.
    pub enforced: Option<f64>,
    /// The figure, median and quartiles over the pairs. Ratios are enforced by direct, differences enforced less direct.
    pub spread: Spread,
    /// What the project promises.
    pub target: Option<Target>,
}

/// Units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Requests per second; the figure is a ratio.
    RequestsPerSecond,
    /// MiB per second; the figure is a ratio.
    MebibytesPerSecond,
    /// Microseconds; the figure is a difference.
    Microseconds,
    /// Nanoseconds.
    Nanoseconds,
    /// Milliseconds.
    Milliseconds,
    /// Packets per second of one core.
    PacketsPerSecond,
    /// Microseconds; the figure is a ratio.
    MicrosecondsRatio,
    /// Requests per second; the figure is a deviation in percent.
    Percent,
}

/// A bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Figure {
    /// Whether the median keeps to the target, where there is one.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        self.target.map(|target| match target {
            Target::AtLeast(bound) => self.spread.median >= bound,
            Target::AtMost(bound) => self.spread.median <= bound,
        })
    }
}

pub(super) type Get = fn(&LoadReport) -> f64;

/// All figures, in the order in which they are shown.
///
/// # Errors
/// When a kind of sample is missing or no finite number.
pub fn figures(samples: &Samples) -> Result<Vec<Figure>> {
    let one = &samples.one_connection;
    let many = &samples.connections_64;
    let one_token: Vec<_> = many.iter().map(|round| &round.one_token).collect();
    let many_tokens: Vec<_> = many.iter().map(|round| &round.many_tokens).collect();
    let rate: Get = |run| run.requests_per_s;
    let cpu: Get = |run| run.cpu_us_per_request;
    let parties: Get = |run| parties_us_per_request(run);
    let p50: Get = |run| run.latency.p50_us;
    let p99: Get = |run| run.latency.p99_us;
    let at_least = |bound| Some(Target::AtLeast(bound));
    let at_most = |bound| Some(Target::AtMost(bound));
    let mut all = vec![
        ratio("throughput_ratio_1", "1 connection", one, rate, at_least(0.90))?,
        ratio("throughput_ratio_64", "64 connections", one_token.clone(), rate, at_least(0.87))?,
        ratio("throughput_ratio_64_tokens_1000", "64 connections, 1,000 tokens", many_tokens, rate, None)?,
        tokens(
            "tokens_1000_vs_1",
            "1,000 tokens by 1, enforced",
            many,
            |pair| &pair.enforced,
            at_least(0.95),
        )?,
        tokens("tokens_1000_vs_1_direct", "1,000 tokens by 1, direct", many, |pair| &pair.direct, None)?,
        ratio("refusals_ratio_64", "no token, 64 connections", &samples.refusals_64, rate, at_least(0.9))?,
        added("cpu_added_us_1", "CPU per request, 1 connection", one, cpu, None)?,
        added("cpu_added_us_64", "CPU per request, 64 connections", one_token.clone(), cpu, at_most(1.5))?,
        added(
            "cpu_parties_added_us_64",
            "CPU of client, server and daemon alone",
            one_token.clone(),
            parties,
            None,
        )?,
        added("p50_added_us_1", "latency p50, 1 connection", one, p50, at_most(3.0))?,
        added("p99_added_us_1", "latency p99, 1 connection", one, p99, None)?,
        added("p50_added_us_64", "latency p50, 64 connections", one_token.clone(), p50, None)?,
        added("p99_added_us_64", "latency p99, 64 connections", one_token, p99, None)?,
        first_seen(
            "first_seen_added_p50_us_es256",
            "first-seen token, ES256",
            &samples.first_seen_es256,
            at_most(400.0),
        )?,
        first_seen(
            "first_seen_added_p50_us_rs256",
            "first-seen token, RS256",
            &samples.first_seen_rs256,
            None,
        )?,
        stream(&samples.stream_64mib_s)?,
        judge("judge_run_ns", "judge, per call, 64 connections", samples, |connections| connections > 1)?,
        judge("judge_run_ns_1", "judge, per call, 1 connection", samples, |connections| connections == 1)?,
    ];
    all.extend(revocation_figures(&samples.revocation)?);
    all.extend(shield_figures(&samples.shield)?);
    if let Some(limits) = &samples.limits {
        all.extend(limit_figures(limits)?);
    }
    Ok(all)
}

/// The figures about packets that one core drops.
///
/// # Errors
/// When there are no samples.
pub fn shield_figures(samples: &Shield) -> Result<[Figure; 6]> {
    let alone = |(key, what, unit): (&'static str, &'static str, Unit), values: &[f64]| {
        let spread = Spread::of(values.iter().copied()).context(key)?;
        Ok::<_, anyhow::Error>(Figure { key, what, unit, direct: None, enforced: None, spread, target: None })
    };
    let (rate, ns) = (Unit::PacketsPerSecond, Unit::Nanoseconds);
    let datagrams = ("shield_datagrams_per_s", "shield alone: datagrams dropped", rate);
    let listed = ("shield_listed_per_s", "shield alone: a listed source's packets dropped", rate);
    let limited = ("shield_limited_per_s", "shield alone: SYNs over the limit dropped", rate);
    let passed = ("shield_passed_ns", "shield alone: a packet that passes", ns);
    let foreign = ("shield_foreign_ns", "shield alone: a packet for another port", ns);
    let flood = samples.flood.iter().map(|round| (round.passed_per_s, round.dropped_per_s));
    Ok([
        alone(datagrams, &samples.datagrams_per_s)?,
        alone(listed, &samples.listed_per_s)?,
        alone(limited, &samples.limited_per_s)?,
        alone(passed, &samples.passed_ns)?,
        alone(foreign, &samples.foreign_ns)?,
        paired(
            "shield_flood_per_s",
            "veth: SYNs to TCP, and dropped",
            rate,
            flood,
            |(_, dropped)| dropped,
            None,
        )?,
    ])
}

/// The figures about streams of tokens that are no longer good.
///
/// # Errors
/// When there are no samples.
pub fn revocation_figures(samples: &Revocation) -> Result<[Figure; 4]> {
    let figure = |key, what, spread| {
        let target = Some(Target::AtMost(1000.0));
        Figure { key, what, unit: Unit::Milliseconds, direct: None, enforced: None, spread, target }
    };
    let spread = |values: &[f64]| Spread::of(values.iter().copied());
    let worst = |values: &[f64]| Spread::of(values.iter().copied().max_by(f64::total_cmp));
    let (revoked, expired) = (&samples.revoked_ms, &samples.expired_ms);
    Ok([
        figure("revocation_p50_ms", "`revoke` to a stream's last byte", spread(revoked)?),
        figure("revocation_max_ms", "the same, longest", worst(revoked)?),
        figure("expiry_p50_ms", "a token's end to a stream's last byte", spread(expired)?),
        figure("expiry_max_ms", "the same, longest", worst(expired)?),
    ])
}

/// Of the three processes alone. Against the whole machine it lacks the kernel's own threads, and it is hardly disturbed
/// by whatever else runs.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn parties_us_per_request(run: &LoadReport) -> f64 {
    (run.cpu.self_us + run.cpu.watched_us) / run.requests.max(1) as f64
}

pub(super) fn ratio<'a>(
    key: &'static str,
    what: &'static str,
    pairs: impl IntoIterator<Item = &'a Pair<LoadReport>>,
    get: Get,
    target: Option<Target>,
) -> Result<Figure> {
    let values = pairs.into_iter().map(|pair| (get(&pair.direct), get(&pair.enforced)));
    paired(key, what, Unit::RequestsPerSecond, values, |(direct, enforced)| enforced / direct, target)
}

fn added<'a>(
    key: &'static str,
    what: &'static str,
    pairs: impl IntoIterator<Item = &'a Pair<LoadReport>>,
    get: Get,
    target: Option<Target>,
) -> Result<Figure> {
    let values = pairs.into_iter().map(|pair| (get(&pair.direct), get(&pair.enforced)));
    paired(key, what, Unit::Microseconds, values, |(direct, enforced)| enforced - direct, target)
}

fn stream(times_s: &[Pair<f64>]) -> Result<Figure> {
    let rates = times_s.iter().map(|pair| (STREAM_MIB / pair.direct, STREAM_MIB / pair.enforced));
    let ratio = |(direct, enforced): (f64, f64)| enforced / direct;
    let target = Some(Target::AtLeast(0.97));
    paired("stream_ratio_64mib", "a response of 64 MiB", Unit::MebibytesPerSecond, rates, ratio, target)
}

fn paired(
    key: &'static str,
    what: &'static str,
    unit: Unit,
    values: impl Iterator<Item = (f64, f64)>,
    compare: fn((f64, f64)) -> f64,
    target: Option<Target>,
) -> Result<Figure> {
    let values: Vec<_> = values.collect();
    Ok(Figure {
        key,
        what,
        unit,
        direct: Some(median(values.iter().map(|pair| pair.0))?),
        enforced: Some(median(values.iter().map(|pair| pair.1))?),
        spread: Spread::of(values.iter().copied().map(compare)).context(key)?,
        target,
    })
}

/// Both columns are of one side here, so they are left out.
fn tokens(
    key: &'static str,
    what: &'static str,
    rounds: &[TokenRound],
    side: fn(&Pair<LoadReport>) -> &LoadReport,
    target: Option<Target>,
) -> Result<Figure> {
    let ratios = rounds
        .iter()
        .map(|round| side(&round.many_tokens).requests_per_s / side(&round.one_token).requests_per_s);
    let spread = Spread::of(ratios).context(key)?;
    Ok(Figure { key, what, unit: Unit::RequestsPerSecond, direct: None, enforced: None, spread, target })
}

/// Single requests scatter more than the runs of the other measures, so this is the difference of the two medians; the
/// quartiles are those of the pairs.
fn first_seen(
    key: &'static str,
    what: &'static str,
    samples: &FirstSeen,
    target: Option<Target>,
) -> Result<Figure> {
    let values = samples.latency_us.iter().map(|pair| (pair.direct, pair.enforced));
    let difference = |(direct, enforced): (f64, f64)| enforced - direct;
    let mut figure = paired(key, what, Unit::Microseconds, values, difference, target)?;
    if let (Some(direct), Some(enforced)) = (figure.direct, figure.enforced) {
        figure.spread.median = enforced - direct;
    }
    Ok(figure)
}

fn judge(
    key: &'static str,
    what: &'static str,
    samples: &Samples,
    connections: fn(usize) -> bool,
) -> Result<Figure> {
    let runs = samples.judge.iter().filter(|run| connections(run.connections));
    let spread = Spread::of(runs.map(|run| run.ns_per_call)).context(key)?;
    Ok(Figure { key, what, unit: Unit::Nanoseconds, direct: None, enforced: None, spread, target: None })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bench::JudgeRun;
    use crate::bench::shield::Flood;
    use crate::load::{CpuUse, Latency, RunSource};

    fn run(requests_per_s: f64, us: f64) -> LoadReport {
        LoadReport {
            requests: 1,
            elapsed_s: 1.0,
            requests_per_s,
            latency: Latency {
                mean_us: us,
                p50_us: us,
                p90_us: us,
                p99_us: us * 2.0,
                p999_us: us,
                max_us: us,
            },
            status_counts: BTreeMap::new(),
            errors: 0,
            reconnects: 0,
            bytes_received: 0,
            cpu: CpuUse {
                machine_tick_us: us,
                machine_run_us: us,
                machine_run_source: RunSource::Ticks,
                self_us: us / 2.0,
                watched_us: us / 4.0,
            },
            cpu_us_per_request: us,
        }
    }

    fn pair<T>(direct: T, enforced: T) -> Pair<T> {
        Pair { direct, enforced }
    }

    fn samples() -> Samples {
        let runs = |ratio: f64| pair(run(1000.0, 10.0), run(1000.0 * ratio, 11.0));
        let round = TokenRound { one_token: runs(0.9), many_tokens: runs(0.81) };
        let first_seen = |direct, enforced| FirstSeen {
            latency_us: vec![pair(direct, enforced)],
            daemon_allowed: 1,
            continued: 0,
        };
        let judge = |connections, ns_per_call| JudgeRun { connections, requests: 1, calls: 1, ns_per_call };
        Samples {
            // The pair's ratios are 0.5, 0.95 and 2: a median of ratios, not a ratio of medians.
            one_connection: vec![
                pair(run(100.0, 10.0), run(50.0, 12.0)),
                pair(run(2000.0, 10.0), run(1900.0, 15.0)),
                pair(run(200.0, 10.0), run(400.0, 13.0)),
            ],
            connections_64: vec![round.clone(), round],
            refusals_64: vec![runs(1.1)],
            first_seen_es256: first_seen(30.0, 250.0),
            first_seen_rs256: first_seen(30.0, 530.0),
            stream_64mib_s: vec![pair(0.020, 0.025)],
            judge: vec![judge(64, 500.0), judge(1, 400.0)],
            limits: None,
            shield: Shield {
                datagrams_per_s: vec![2e7],
                listed_per_s: vec![1e7],
                limited_per_s: vec![5e6],
                passed_ns: vec![150.0],
                foreign_ns: vec![100.0],
                flood: vec![Flood { passed_per_s: 2e5, dropped_per_s: 1e6 }],
            },
            revocation: Revocation { revoked_ms: vec![10.0, 30.0, 20.0], expired_ms: vec![1500.0] },
        }
    }

    #[test]
    fn each_figure_compares_enforced_with_direct() {
        let figures = figures(&samples()).unwrap();
        let close = |key: &str, expected: f64| {
            let figure = figures.iter().find(|figure| figure.key == key).unwrap();
            let found = figure.spread.median;
            assert!((found - expected).abs() < 1e-9, "{key}: {found}, not {expected}");
            figure.met()
        };
        assert_eq!(close("throughput_ratio_1", 0.95), Some(true));
        assert_eq!(close("throughput_ratio_64", 0.9), Some(true));
        assert_eq!(close("throughput_ratio_64_tokens_1000", 0.81), None);
        assert_eq!(close("tokens_1000_vs_1", 0.9), Some(false));
        assert_eq!(close("tokens_1000_vs_1_direct", 1.0), None);
        assert_eq!(close("refusals_ratio_64", 1.1), Some(true));
        assert_eq!(close("cpu_added_us_1", 3.0), None);
        assert_eq!(close("cpu_added_us_64", 1.0), Some(true));
        assert_eq!(close("cpu_parties_added_us_64", 0.75), None);
        assert_eq!(close("p50_added_us_1", 3.0), Some(true));
        assert_eq!(close("p99_added_us_1", 6.0), None);
        assert_eq!(close("first_seen_added_p50_us_es256", 220.0), Some(true));
        assert_eq!(close("first_seen_added_p50_us_rs256", 500.0), None);
        assert_eq!(close("stream_ratio_64mib", 0.8), Some(false));
        assert_eq!(close("judge_run_ns", 500.0), None);
        assert_eq!(close("judge_run_ns_1", 400.0), None);
        assert_eq!(close("revocation_p50_ms", 20.0), Some(true));
        assert_eq!(close("revocation_max_ms", 30.0), Some(true));
        assert_eq!(close("expiry_p50_ms", 1500.0), Some(false));
        assert_eq!(close("shield_listed_per_s", 1e7), None);
        assert_eq!(close("shield_flood_per_s", 1e6), None);
    }

    #[test]
    fn a_missing_measure_is_an_error() {
        let mut samples = samples();
        samples.refusals_64.clear();
        assert!(figures(&samples).is_err());
    }
}
