//! Adds up what the test binaries say about themselves.

use std::fmt;
use std::ops::AddAssign;

/// Numbers of tests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that ran and held.
    pub(crate) passed: u64,
    /// Tests that ran and did not hold, and steps that ended without saying how.
    pub(crate) failed: u64,
    /// Tests that did not run.
    pub(crate) skipped: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Tally {
    /// Moves `count` tests that returned early, saying why, from passed to skipped.
    pub(crate) fn skipped_at_run_time(&mut self, count: u64) {
        let moved = count.min(self.passed);
        self.passed -= moved;
        self.skipped += moved;
    }
}

/// Reads one line of libtest's output; `None` when it is not a result line.
///
/// ```text
/// test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s
/// ```
///
/// Ignored tests count as skipped; filtered ones were not asked for and do not count.
pub(crate) fn parse_result_line(line: &str) -> Option<Tally> {
    let (_verdict, counts) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
    let count = |label: &str| {
        counts.split("; ").find_map(|part| {
            let (number, name) = part.split_once(' ')?;
            (name == label).then(|| number.parse::<u64>().ok())?
        })
    };
    Some(Tally { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
}

/// The tally of a whole step: its result lines, and one failure more when it ended badly without naming any.
pub(crate) fn tally_step<'a>(lines: impl IntoIterator<Item = &'a str>, success: bool) -> Tally {
    let mut tally = Tally::default();
    for found in lines.into_iter().filter_map(parse_result_line) {
        tally += found;
    }
    if !success && tally.failed == 0 {
        tally.failed = 1;
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: &str =
        "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s";
    const BAD: &str =
        "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s";

    #[test]
    fn reads_both_verdicts() {
        assert_eq!(parse_result_line(OK), Some(Tally { passed: 5, failed: 0, skipped: 1 }));
        assert_eq!(parse_result_line(BAD), Some(Tally { passed: 3, failed: 2, skipped: 0 }));
    }

    #[test]
    fn other_lines_are_not_results() {
        for line in [
            "",
            "running 5 tests",
            "test a::b ... ok",
            "test result: ok",
            "test result: ok. x passed; 0 failed",
        ] {
            assert_eq!(parse_result_line(line), None, "{line}");
        }
    }

    #[test]
    fn adds_up_several_binaries() {
        let tally = tally_step([OK, "noise", BAD, OK], false);
        assert_eq!(tally, Tally { passed: 13, failed: 2, skipped: 2 });
        assert_eq!(tally.to_string(), "13 passed, 2 failed, 2 skipped");
    }

    #[test]
    fn a_step_that_dies_silently_is_a_failure() {
        assert_eq!(tally_step([OK], false).failed, 1);
        assert_eq!(tally_step([], false).failed, 1);
        assert_eq!(tally_step([OK], true).failed, 0);
    }

    #[test]
    fn run_time_skips_never_count_twice() {
        let mut tally = Tally { passed: 2, failed: 0, skipped: 1 };
        tally.skipped_at_run_time(1);
        assert_eq!(tally, Tally { passed: 1, failed: 0, skipped: 2 });
        tally.skipped_at_run_time(9);
        assert_eq!(tally, Tally { passed: 0, failed: 0, skipped: 3 });
    }
}
