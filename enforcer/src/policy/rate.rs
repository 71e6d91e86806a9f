//! Rates as policies write them: `20/s`, `300/m`, `1000/h`, with a burst.

use std::fmt;

use super::error::{Defect, RATE};
use super::fields::{Field, Mapping, Report};

const NANOS_PER_SEC: u64 = 1_000_000_000;
/// Nanoseconds in each unit, the shortest first.
const UNITS: [(u64, char); 3] =
    [(NANOS_PER_SEC, 's'), (60 * NANOS_PER_SEC, 'm'), (3600 * NANOS_PER_SEC, 'h')];
/// Most requests in one unit of time.
const MAX_PER_UNIT: u64 = 1_000_000;
/// Largest burst.
pub(super) const MAX_BURST: u64 = 1_000_000;

/// How many requests may come in what time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rate {
    /// Nanoseconds from one request to the next at this rate, rounded up; at least 1,000.
    pub interval_ns: u64,
    /// How many may come at once; from 1 to 1,000,000.
    pub burst: u32,
}

impl Rate {
    /// Depth of a bucket for it, in nanoseconds: see `enforcer_common::limit`.
    #[must_use]
    pub fn burst_ns(&self) -> u64 {
        self.interval_ns.saturating_mul(self.burst.into())
    }

    /// The rate without its burst, in the form that a policy file has: `20/s`.
    #[must_use]
    pub fn per_unit(&self) -> String {
        let exact = UNITS.iter().find_map(|(unit_ns, unit)| {
            let count = unit_ns.div_ceil(self.interval_ns.max(1));
            (unit_ns.div_ceil(count) == self.interval_ns).then(|| format!("{count}/{unit}"))
        });
        exact.unwrap_or_else(|| format!("one in {} ns", self.interval_ns))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} at once", self.per_unit(), self.burst)
    }
}

/// The interval in nanoseconds of `20/s`, and how many fit into one second.
fn parse(text: &str) -> Option<(u64, u64)> {
    let (count, unit) = text.split_once('/')?;
    let (unit_ns, _) = UNITS.iter().find(|(_, name)| unit.chars().eq([*name]))?;
    if count.starts_with('0') || !count.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count = count.parse::<u64>().ok().filter(|count| (1..=MAX_PER_UNIT).contains(count))?;
    let interval_ns = unit_ns.div_ceil(count);
    Some((interval_ns, NANOS_PER_SEC / interval_ns))
}

/// The fields `rate` and `burst` of a mapping. Without a burst it is what comes in one second, at least 1.
pub(super) fn rate(report: &mut Report, map: &Mapping<'_>) -> Option<Rate> {
    let interval = map.required(report, "rate").and_then(|field| {
        let text = field.text_as(report, 64, RATE)?;
        let parsed = parse(text);
        if parsed.is_none() {
            field.error(report, Defect::Rate { value: text.to_owned() });
        }
        parsed
    });
    let burst = map.or_default("burst", None, |field| field.number(report, 1, MAX_BURST).map(Some));
    let ((interval_ns, per_sec), burst) = (interval?, burst?);
    let burst = burst.unwrap_or_else(|| per_sec.max(1));
    Some(Rate { interval_ns, burst: u32::try_from(burst).unwrap_or(u32::MAX) })
}

/// A field that is nothing but `{rate: 20/s, burst: 40}`.
pub(super) fn rate_field(report: &mut Report, field: &Field<'_>) -> Option<Rate> {
    let map = field.mapping(report, &["rate", "burst"])?;
    rate(report, &map)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn good_and_bad_forms() {
        assert_eq!(parse("20/s"), Some((50_000_000, 20)));
        assert_eq!(parse("3/s"), Some((333_333_334, 2)));
        // Two counts of which one, rounded, is shown.
        assert_eq!(Rate { interval_ns: 12_345_680, burst: 1 }.per_unit(), "81/s");
        assert_eq!(parse("300/m"), Some((200_000_000, 5)));
        assert_eq!(parse("1/h"), Some((3600 * NANOS_PER_SEC, 0)));
        for bad in
            ["", "20", "0/s", "/s", "20/", "20/d", "020/s", "+20/s", "2.5/s", "20 /s", "20/ss", "1000001/s"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back_the_same(count in 1..=MAX_PER_UNIT, unit in 0..3_usize) {
            let (interval_ns, _) = parse(&format!("{count}/{}", UNITS[unit].1)).unwrap();
            let shown = Rate { interval_ns, burst: 1 }.per_unit();
            // Another count may stand for the same interval.
            prop_assert_eq!(parse(&shown).map(|(ns, _)| ns), Some(interval_ns), "{}", shown);
        }
    }
}
