//! Medians and quartiles.

use anyhow::{Result, ensure};
use serde::Serialize;

/// The middle of some values and how far they scatter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// First quartile.
    pub low: f64,
    /// Median.
    pub median: f64,
    /// Third quartile.
    pub high: f64,
}

impl Spread {
    /// Median and quartiles, interpolated between neighbours.
    ///
    /// # Errors
    /// Without values, or when one is not finite.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Result<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        ensure!(!sorted.is_empty(), "no samples");
        ensure!(sorted.iter().all(|value| value.is_finite()), "a sample is no finite number");
        sorted.sort_by(f64::total_cmp);
        Ok(Self { low: at(&sorted, 1), median: at(&sorted, 2), high: at(&sorted, 3) })
    }
}

/// The median alone.
///
/// # Errors
/// As [`Spread::of`].
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> Result<f64> {
    Ok(Spread::of(values)?.median)
}

/// The value at `quarter` of 4 in a sorted, not empty slice.
fn at(sorted: &[f64], quarter: usize) -> f64 {
    let position = (sorted.len() - 1) * quarter;
    let (index, rest) = (position / 4, position % 4);
    let low = sorted.get(index).copied().unwrap_or(f64::NAN);
    let high = sorted.get(index + 1).copied().unwrap_or(low);
    let fraction = [0.0, 0.25, 0.5, 0.75].get(rest).copied().unwrap_or(0.0);
    low + (high - low) * fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_quartiles_of_any_order_and_number() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied()).unwrap();
        assert_eq!(spread(&[3.0, 1.0, 2.0, 5.0, 4.0]), Spread { low: 2.0, median: 3.0, high: 4.0 });
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]), Spread { low: 1.75, median: 2.5, high: 3.25 });
        assert_eq!(spread(&[7.0]), Spread { low: 7.0, median: 7.0, high: 7.0 });
    }

    #[test]
    fn no_value_or_no_number_is_an_error() {
        assert!(Spread::of([]).is_err());
        assert!(Spread::of([1.0, f64::NAN]).is_err());
        assert!(Spread::of([1.0, f64::INFINITY]).is_err());
    }
}
