//! When a source that keeps failing is quarantined.

use crate::abi::{SHIELD_NONE, ShieldPrefix};

/// Bits of a word of refusals that count them; the others are the time of the first, in milliseconds.
const COUNT_BITS: u32 = 20;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
const MS_NS: u64 = 1_000_000;
/// Most refusals that a policy may allow.
pub const MAX_REFUSALS: u64 = COUNT_MASK - 1;

/// So many refusals more: the new word, and whether that is too many. The window begins with the first refusal after the last window, so a
/// source gets through with twice as many at most, around the border of two.
#[must_use]
#[inline(always)]
pub const fn count(word: u64, more: u32, now_ns: u64, window_ns: u64, max: u64) -> (u64, bool) {
    let now_ms = now_ns / MS_NS;
    let (mut began_ms, mut count) = (word >> COUNT_BITS, word & COUNT_MASK);
    if count == 0 || now_ms.wrapping_sub(began_ms) >= window_ns / MS_NS {
        (began_ms, count) = (now_ms, 0);
    }
    count += more as u64;
    if count > COUNT_MASK {
        count = COUNT_MASK;
    }
    (began_ms << COUNT_BITS | count, count > max)
}

/// What a prefix's entry says at this moment: `SHIELD_*`.
#[must_use]
#[inline(always)]
pub const fn word_of(entry: &ShieldPrefix, now_ns: u64) -> u32 {
    if entry.operator != SHIELD_NONE && (entry.until_ns == 0 || now_ns < entry.until_ns) {
        entry.operator
    } else {
        entry.policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{SHIELD_DROP, SHIELD_EXEMPT};

    const SEC: u64 = 1_000_000_000;

    fn run(times: impl IntoIterator<Item = u64>, max: u64) -> Option<usize> {
        let mut word = 0;
        times.into_iter().position(|now_ns| {
            let (next, too_many) = count(word, 1, now_ns, 10 * SEC, max);
            word = next;
            too_many
        })
    }

    #[test]
    fn one_more_than_allowed_within_the_window_is_too_many() {
        assert_eq!(run((0..100).map(|k| 7 * SEC + k), 50), Some(50));
        assert_eq!(run((0..100).map(|k| 7 * SEC + k * SEC / 10), 50), Some(50));
        assert_eq!(run((0..1_000).map(|k| 7 * SEC + k * SEC), 10), None);
        assert_eq!(run([5 * SEC], 0), Some(0));
        assert!(!count(0, 50, SEC, 10 * SEC, 50).1 && count(0, 51, SEC, 10 * SEC, 50).1);
        assert!(count(count(0, 7, SEC, SEC, 50).0, u32::MAX, SEC, SEC, MAX_REFUSALS).1);
        // Far more than can be counted.
        assert_eq!(run((0..2_000_000).map(|k| SEC + k), MAX_REFUSALS), Some(MAX_REFUSALS as usize));
    }

    #[test]
    fn an_operators_word_goes_before_the_policys_while_it_lasts() {
        let entry =
            ShieldPrefix { until_ns: 9, operator: SHIELD_DROP, policy: SHIELD_EXEMPT, bits: 8, zero: 0 };
        assert_eq!(word_of(&entry, 8), SHIELD_DROP);
        assert_eq!(word_of(&entry, 9), SHIELD_EXEMPT);
        assert_eq!(word_of(&ShieldPrefix { until_ns: 0, ..entry }, u64::MAX), SHIELD_DROP);
        assert_eq!(word_of(&ShieldPrefix { operator: SHIELD_NONE, ..entry }, 1), SHIELD_EXEMPT);
        assert_eq!(word_of(&ShieldPrefix::default(), 1), SHIELD_NONE);
    }
}
