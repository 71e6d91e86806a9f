//! How often something may happen: the generic cell rate algorithm (GCRA, ITU-T I.371), which needs one word per bucket.
//!
//! The word is the *theoretical arrival time*: when the next event would come if all came at exactly the rate. An event that comes so much
//! earlier that the bucket's depth is used up is refused, and changes nothing.

/// What becomes of an event at `now_ns` in a bucket that takes one every `interval_ns` and holds `burst_ns` (events times the interval).
/// All in nanoseconds on one clock. An interval of 0 refuses nothing.
///
/// # Errors
/// It is refused; in so many nanoseconds the next one will not be, if no other comes. A word that no clock can have made refuses.
#[inline(always)]
pub const fn admit(tat_ns: u64, now_ns: u64, interval_ns: u64, burst_ns: u64) -> Result<u64, u64> {
    if interval_ns == 0 {
        return Ok(tat_ns);
    }
    let from_ns = if tat_ns > now_ns { tat_ns } else { now_ns };
    let next_ns = from_ns.saturating_add(interval_ns);
    let ahead_ns = next_ns - now_ns;
    if ahead_ns > burst_ns { Err(ahead_ns - burst_ns) } else { Ok(next_ns) }
}

/// Events that a bucket would take at once.
#[must_use]
pub const fn fill(tat_ns: u64, now_ns: u64, interval_ns: u64, burst_ns: u64) -> u64 {
    if interval_ns == 0 {
        return 0;
    }
    burst_ns.saturating_sub(tat_ns.saturating_sub(now_ns)) / interval_ns
}

/// The word of a bucket whose limit changes from one interval and depth to others, in nanoseconds: what it would take at once stays the
/// same, in events, up to the new depth. So a limit that changes gives nobody a fresh burst, and nobody owes what the new one never lent.
#[must_use]
pub const fn changed(tat_ns: u64, now_ns: u64, old: (u64, u64), new: (u64, u64)) -> u64 {
    let ((old_interval_ns, old_burst_ns), (interval_ns, burst_ns)) = (old, new);
    if interval_ns == 0 || old_interval_ns == 0 {
        // There is nothing to count with.
        return 0;
    }
    let left_ns = old_burst_ns.saturating_sub(tat_ns.saturating_sub(now_ns));
    let left_ns = left_ns as u128 * interval_ns as u128 / old_interval_ns as u128;
    let left_ns = if left_ns > burst_ns as u128 { burst_ns } else { left_ns as u64 };
    now_ns.saturating_add(burst_ns - left_ns)
}

/// Whether more places are taken than there are. Fewer than none can be taken for a moment, while the count is corrected.
#[must_use]
#[inline(always)]
pub const fn too_many_open(open: u64, max_open: u64) -> bool {
    open as i64 > 0 && open > max_open
}

/// What a connection is told to wait for a place where all are taken, in nanoseconds.
pub const PLACE_WAIT_NS: u64 = 5_000_000_000;

/// The values of `Retry-After` that the kernel can give, in seconds: it has one response template for each.
pub const RETRY_AFTER_SECS: [u32; RETRY_STEPS] = [1, 2, 5, 10, 30, 60, 600, 3600];
/// How many they are.
pub const RETRY_STEPS: usize = 8;

/// Which of [`RETRY_AFTER_SECS`] covers a wait; the longest for all beyond.
#[must_use]
#[inline(always)]
pub const fn retry_step(wait_ns: u64) -> u32 {
    const SEC_NS: u64 = 1_000_000_000;
    let mut step = 0;
    while step < RETRY_STEPS - 1 {
        if wait_ns <= RETRY_AFTER_SECS[step] as u64 * SEC_NS {
            break;
        }
        step += 1;
    }
    step as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEC: u64 = 1_000_000_000;

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let (interval, burst) = (SEC / 10, SEC / 10 * 3);
        let mut tat = 0;
        for _ in 0..3 {
            tat = admit(tat, 5 * SEC, interval, burst).unwrap();
        }
        assert_eq!(admit(tat, 5 * SEC, interval, burst), Err(interval));
        assert_eq!(fill(tat, 5 * SEC, interval, burst), 0);
        tat = admit(tat, 5 * SEC + interval, interval, burst).unwrap();
        assert_eq!(admit(tat, 5 * SEC + interval, interval, burst), Err(interval));
        assert_eq!(fill(tat, 60 * SEC, interval, burst), 3);
    }

    #[test]
    fn a_change_of_the_limit_changes_the_fill_only_by_the_new_depth() {
        let now = 50 * SEC;
        // One a second, ten at once, of which seven are used.
        let mut tat = 0;
        for _ in 0..7 {
            tat = admit(tat, now, SEC, 10 * SEC).unwrap();
        }
        for (interval, burst, left) in [
            (SEC, 10, 3),
            (SEC / 10, 10, 3),
            (10 * SEC, 10, 3),
            (SEC, 100, 3),
            (SEC, 2, 2),
            (SEC / 1000, 1, 1),
        ] {
            let word = changed(tat, now, (SEC, 10 * SEC), (interval, burst * interval));
            assert_eq!(fill(word, now, interval, burst * interval), left, "{interval} {burst}");
        }
        assert_eq!(changed(tat, now, (SEC, 10 * SEC), (0, 0)), 0);
        assert_eq!(fill(changed(u64::MAX, now, (SEC, SEC), (SEC, 5 * SEC)), now, SEC, 5 * SEC), 0);
    }

    #[test]
    fn what_no_clock_has_made_refuses() {
        assert!(admit(u64::MAX, SEC, SEC, SEC).is_err());
        assert!(admit(0, u64::MAX, SEC, SEC - 1).is_ok(), "nothing is ahead of the end of time");
        assert!(admit(0, SEC, SEC, SEC - 1).is_err(), "a bucket that holds no event");
        assert_eq!(admit(7, SEC, 0, 0), Ok(7));
    }

    #[test]
    fn the_wait_is_covered_by_its_step() {
        for (wait_ns, secs) in
            [(0, 1), (SEC, 1), (SEC + 1, 2), (6 * SEC, 10), (61 * SEC, 600), (u64::MAX, 3600)]
        {
            assert_eq!(RETRY_AFTER_SECS[retry_step(wait_ns) as usize], secs, "{wait_ns}");
        }
    }

    proptest! {
        /// However requests come, no more pass within a span than the burst and what the rate gives in it; and who waits as told, passes.
        #[test]
        fn no_more_than_burst_and_rate(
            gaps in proptest::collection::vec(0..3 * SEC, 1..200), interval in 1..SEC, burst in 1_u64..20
        ) {
            let (mut now, mut tat, mut passed) = (SEC, 0, Vec::new());
            for gap in gaps {
                now += gap;
                match admit(tat, now, interval, burst * interval) {
                    Ok(next) => { tat = next; passed.push(now); }
                    Err(wait) => prop_assert!(admit(tat, now + wait, interval, burst * interval).is_ok()),
                }
            }
            for (first, from) in passed.iter().enumerate() {
                for (last, to) in passed.iter().enumerate().skip(first) {
                    prop_assert!((last - first + 1) as u64 <= burst + (to - from) / interval + 1);
                }
            }
        }
    }
}
