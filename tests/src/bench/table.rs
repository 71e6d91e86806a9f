//! The figures in a table, for a terminal or in Markdown.

use super::{Figure, Target, Unit};

pub(super) const HEADINGS: [&str; 6] = ["measure", "direct", "enforced", "figure", "quartiles", "target"];

/// The figures in aligned columns, one line each.
#[must_use]
pub fn table(figures: &[Figure]) -> String {
    let rows: Vec<[String; 6]> =
        std::iter::once(HEADINGS.map(str::to_owned)).chain(figures.iter().map(row)).collect();
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| match column {
            0 | 5 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The cells of a figure, under [`HEADINGS`].
pub(super) fn row(figure: &Figure) -> [String; 6] {
    let spread = figure.spread;
    let bare = |value: f64| match figure.unit {
        Unit::RequestsPerSecond | Unit::MebibytesPerSecond => format!("{value:.3}"),
        Unit::MicrosecondsRatio | Unit::Percent => format!("{value:.2}"),
        Unit::Microseconds => format!("{value:+.2}"),
        Unit::Nanoseconds => format!("{value:.0}"),
        Unit::Milliseconds => format!("{value:.1}"),
        Unit::PacketsPerSecond => millions(value),
    };
    let unit = match figure.unit {
        Unit::RequestsPerSecond | Unit::MebibytesPerSecond => "",
        Unit::MicrosecondsRatio => " times",
        Unit::Percent => "%",
        Unit::Microseconds => " us",
        Unit::Nanoseconds => " ns",
        Unit::Milliseconds => " ms",
        Unit::PacketsPerSecond => " M/s",
    };
    let quartiles = if spread.low.total_cmp(&spread.high).is_eq() {
        String::new()
    } else {
        format!("{} .. {}", bare(spread.low), bare(spread.high))
    };
    [
        figure.what.to_owned(),
        figure.direct.map_or_else(String::new, |value| column(value, figure.unit)),
        figure.enforced.map_or_else(String::new, |value| column(value, figure.unit)),
        format!("{}{unit}", bare(spread.median)),
        quartiles,
        target(figure, unit),
    ]
}

fn column(value: f64, unit: Unit) -> String {
    match unit {
        Unit::RequestsPerSecond | Unit::Percent => format!("{value:.0} req/s"),
        Unit::MebibytesPerSecond => format!("{value:.0} MiB/s"),
        Unit::Microseconds | Unit::MicrosecondsRatio => format!("{value:.2} us"),
        Unit::Nanoseconds => format!("{value:.0} ns"),
        Unit::Milliseconds => format!("{value:.1} ms"),
        Unit::PacketsPerSecond => format!("{} M/s", millions(value)),
    }
}

fn millions(value: f64) -> String {
    format!("{:.2}", value / 1e6)
}

fn target(figure: &Figure, unit: &str) -> String {
    let bound = match figure.target {
        None => return String::new(),
        Some(Target::AtLeast(bound)) => format!("at least {bound}{unit}"),
        Some(Target::AtMost(bound)) => format!("at most {bound}{unit}"),
    };
    let outcome = if figure.met() == Some(true) { "met" } else { "missed" };
    format!("{bound}: {outcome}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Spread;

    fn figure(unit: Unit, median: f64, target: Option<Target>) -> Figure {
        let spread = Spread { low: median - 0.5, median, high: median + 0.5 };
        Figure { key: "k", what: "w", unit, direct: Some(10.0), enforced: None, spread, target }
    }

    #[test]
    fn a_row_says_what_was_promised_and_whether_it_was_kept() {
        let kept = row(&figure(Unit::RequestsPerSecond, 0.9, Some(Target::AtLeast(0.9))));
        assert_eq!(kept, ["w", "10 req/s", "", "0.900", "0.400 .. 1.400", "at least 0.9: met"]);
        let missed = row(&figure(Unit::Microseconds, 4.0, Some(Target::AtMost(3.0))));
        assert_eq!(missed, ["w", "10.00 us", "", "+4.00 us", "+3.50 .. +4.50", "at most 3 us: missed"]);
    }

    #[test]
    fn columns_are_aligned() {
        let text = table(&[figure(Unit::Nanoseconds, 500.0, None), figure(Unit::Microseconds, 1.0, None)]);
        let ends: Vec<_> = text.lines().map(|line| line.find("500 ns").map(|at| at + 6)).collect();
        let heading = text.lines().next().and_then(|line| line.find("figure")).map(|at| at + 6);
        assert_eq!(ends.get(1).copied().flatten(), heading);
    }
}
