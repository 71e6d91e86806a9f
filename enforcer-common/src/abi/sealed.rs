//! Values that may be read while somebody writes them.

use super::{Connecting, HeadDigest, Joining, Verdict};

/// A value of an LRU hash, and a check word over it.
///
/// Such a map hands an element that was replaced or evicted on to another key at once, while programs may still read it, and nothing says in
/// which order its bytes change. So a value holds its own key, and whoever reads it copies it and looks whether the copy is whole: no mixture
/// of two values has their check.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed<T> {
    /// The value.
    pub value: T,
    /// [`check_of`] it.
    pub check: u64,
}

impl<T: Copy> Sealed<T> {
    /// Seals a value.
    #[must_use]
    #[inline(always)]
    pub fn new(value: T) -> Self {
        Self { check: check_of(&value), value }
    }

    /// Whether this copy is of one value.
    #[must_use]
    #[inline(always)]
    pub fn is_whole(&self) -> bool {
        check_of(&self.value) == self.check
    }
}

/// Sum of the value's words, each by a factor of its own. Words that are not all of one value give its sum by accident only.
#[must_use]
#[inline(always)]
pub fn check_of<T: Copy>(value: &T) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    const {
        assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8);
    }
    let words = core::ptr::from_ref(value).cast::<u64>();
    let mut sum = FACTOR;
    let mut k = 0;
    while k < size_of::<T>() / 8 {
        // SAFETY: `k` is inside of the value, which is aligned; the types in here are integers without padding.
        let word = unsafe { words.add(k).read() };
        sum =
            sum.wrapping_add(word.rotate_left(k as u32 * 5).wrapping_mul(FACTOR.wrapping_add(k as u64 * 2)));
        k += 1;
    }
    sum
}

macro_rules! sealed {
    ($($type:ty),+) => {$(
        const _: () = assert!(size_of::<Sealed<$type>>() == size_of::<$type>() + 8);
        #[cfg(feature = "user")]
        // SAFETY: `repr(C)`, the value is plain data without padding, and so is the check behind it (asserted above).
        unsafe impl aya::Pod for Sealed<$type> {}
    )+};
}
sealed!(Verdict, Connecting, Joining);

/// The verdict of a digest, if this is a whole one and of no other digest.
#[must_use]
#[inline(always)]
pub fn is_verdict_of(verdict: &Verdict, check: u64, digest: &HeadDigest) -> bool {
    verdict.digest.lo == digest.lo && verdict.digest.hi == digest.hi && check_of(verdict) == check
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::VERDICT_ALLOW;

    fn verdict(number: u64) -> Verdict {
        Verdict {
            digest: HeadDigest { lo: number, hi: !number },
            kind: VERDICT_ALLOW,
            index: number as u32,
            grant_serial: number << 16,
            generation: 3,
            deadline_ns: number * 1_000,
            server_id: 1,
            head_bytes: 700,
        }
    }

    fn words(sealed: &Sealed<Verdict>) -> [u64; 8] {
        // SAFETY: 64 bytes of integers.
        unsafe { core::ptr::from_ref(sealed).cast::<[u64; 8]>().read() }
    }

    #[test]
    fn no_mixture_of_two_verdicts_is_whole() {
        let (old, new) = (Sealed::new(verdict(5)), Sealed::new(verdict(6)));
        assert!(old.is_whole() && new.is_whole());
        let (olds, news) = (words(&old), words(&new));
        for mixture in 0..256_u32 {
            let mixed: [u64; 8] =
                core::array::from_fn(|k| if mixture >> k & 1 == 0 { olds[k] } else { news[k] });
            // SAFETY: as above.
            let mixed = unsafe { core::ptr::from_ref(&mixed).cast::<Sealed<Verdict>>().read() };
            assert_eq!(mixed.is_whole(), mixed == old || mixed == new, "{mixture:08b}");
            assert_eq!(
                is_verdict_of(&mixed.value, mixed.check, &old.value.digest),
                mixed == old,
                "{mixture:08b}"
            );
        }
    }
}
