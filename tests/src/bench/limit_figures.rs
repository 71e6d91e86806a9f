//! The figures about limits.

use anyhow::{Context, Result};

use super::figures::{Get, ratio};
use super::limits::Flood;
use super::stats::{Spread, median};
use super::{Figure, Limits, Target, Unit};

/// How much slower a first-seen token may get while another source floods.
const FLOOD_FACTOR: f64 = 3.0;

/// The figures about limits. The column `direct` is the guarded server without limits, the offered load, or the quiet time.
///
/// # Errors
/// When a kind of sample is missing or no finite number.
pub fn limit_figures(samples: &Limits) -> Result<Vec<Figure>> {
    let rate: Get = |run| run.requests_per_s;
    let at_least = Some(Target::AtLeast(0.95));
    let (offered, admitted) = samples.accuracy.rates();
    let accuracy = Figure {
        key: "limit_accuracy_percent",
        what: "offered, and admitted by a limit: off by",
        unit: Unit::Percent,
        direct: Some(offered),
        enforced: Some(admitted),
        spread: Spread::of([samples.accuracy.off_percent()])?,
        target: Some(Target::AtMost(2.0)),
    };
    Ok(vec![
        ratio("limits_ratio_1", "five limits, 1 connection", &samples.one_connection, rate, at_least)?,
        ratio("limits_ratio_64", "five limits, 64 connections", &samples.connections_64, rate, at_least)?,
        accuracy,
        flooded(
            "flood_first_seen_ratio",
            "first-seen token, quiet and in a flood",
            &samples.flood,
            Some(Target::AtMost(FLOOD_FACTOR)),
        )?,
        checked("flood_checks_ratio", "the flood, and its signature checks", &samples.flood)?,
        flooded("flood_unlimited_ratio", "the same without a limit", &samples.flood_unlimited, None)?,
        checked("flood_unlimited_checks_ratio", "its signature checks", &samples.flood_unlimited)?,
    ])
}

fn flooded(key: &'static str, what: &'static str, flood: &Flood, target: Option<Target>) -> Result<Figure> {
    let middle = |values: &[f64]| median(values.iter().copied()).context(key);
    let (quiet, flooded) = (middle(&flood.quiet_us)?, middle(&flood.flooded_us)?);
    let spread = Spread::of(flood.flooded_us.iter().map(|us| us / quiet)).context(key)?;
    let (direct, enforced) = (Some(quiet), Some(flooded));
    Ok(Figure { key, what, unit: Unit::MicrosecondsRatio, direct, enforced, spread, target })
}

fn checked(key: &'static str, what: &'static str, flood: &Flood) -> Result<Figure> {
    let spread = Spread::of([flood.checks_per_s / flood.flood_per_s]).context(key)?;
    let (direct, enforced) = (Some(flood.flood_per_s), Some(flood.checks_per_s));
    Ok(Figure { key, what, unit: Unit::RequestsPerSecond, direct, enforced, spread, target: None })
}

#[cfg(test)]
mod tests {
    use super::super::limits::Accuracy;
    use super::*;

    #[test]
    fn each_figure_compares_with_its_own_other_side() {
        let flood = |flooded_us, checks_per_s| Flood {
            quiet_us: vec![200.0, 210.0, 190.0],
            flooded_us,
            flood_per_s: 50_000.0,
            checks_per_s,
        };
        let close = |figure: Figure, expected: f64| {
            let found = figure.spread.median;
            assert!((found - expected).abs() < 1e-9, "{}: {found}, not {expected}", figure.key);
            figure.met()
        };
        let target = Some(Target::AtMost(3.0));
        let slow = flooded("k", "w", &flood(vec![300.0, 400.0, 500.0], 0.0), target).unwrap();
        assert_eq!(close(slow, 2.0), Some(true));
        assert_eq!(close(flooded("k", "w", &flood(vec![2000.0], 0.0), target).unwrap(), 10.0), Some(false));
        assert_eq!(close(checked("k", "w", &flood(vec![1.0], 1000.0)).unwrap(), 0.02), None);
        let (limit_per_s, burst, offered) = (1000, 100, 101_000);
        for (admitted, off) in [(10_000, 100.0 / 101.0), (10_200, 100.0 / 101.0)] {
            let accuracy = Accuracy { limit_per_s, burst, elapsed_s: 10.0, offered, admitted };
            assert!((accuracy.off_percent() - off).abs() < 1e-9, "{}", accuracy.off_percent());
            assert!((accuracy.rates().0 - 10_100.0).abs() < 1e-9);
        }
    }
}
