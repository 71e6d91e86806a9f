//! Durations as policies write them: `30s`, `5m`, `24h`, `7d`.

use std::time::Duration;

/// Reads a whole number followed by `s`, `m`, `h` or `d`. `None` for anything else, and for what 64 bits can't hold.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    let seconds_per_unit = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(seconds_per_unit).map(Duration::from_secs)
}

/// The shortest form that [`parse`] reads back as the same number of seconds.
pub(super) fn format(duration: Duration) -> String {
    let seconds = duration.as_secs();
    for (per_unit, unit) in [(86_400, 'd'), (3600, 'h'), (60, 'm')] {
        if seconds >= per_unit && seconds.is_multiple_of(per_unit) {
            return format!("{}{unit}", seconds / per_unit);
        }
    }
    format!("{seconds}s")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn good_and_bad_forms() {
        assert_eq!(parse("0s"), Some(Duration::ZERO));
        assert_eq!(parse("30s"), Some(Duration::from_secs(30)));
        assert_eq!(parse("5m"), Some(Duration::from_secs(300)));
        assert_eq!(parse("24h"), Some(Duration::from_secs(86_400)));
        for bad in
            ["", "s", "5", "5 m", "+5m", "-5m", "5M", "5ms", "1h30m", "1.5h", "99999999999999999999d", "5µ"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(parse("18446744073709551615d"), None, "overflow");
        assert_eq!(format(Duration::from_secs(86_400)), "1d");
        assert_eq!(format(Duration::from_secs(5400)), "90m");
        assert_eq!(format(Duration::ZERO), "0s");
    }

    proptest! {
        #[test]
        fn formatted_durations_read_back(seconds in 0..u64::from(u32::MAX)) {
            let duration = Duration::from_secs(seconds);
            prop_assert_eq!(parse(&format(duration)), Some(duration));
        }
    }
}
