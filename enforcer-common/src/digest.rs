//! The keyed digest of a request head: two passes of NH (the universal hash of UMAC, RFC 4418, section 5.2) over its masked
//! bytes, with one key word per message word, so that no polynomial stage is needed up to the longest head.
//!
//! For two different heads fixed before the key was drawn, one pass collides with probability at most 2^-32 and two
//! passes with a shifted key (Toeplitz, as in UMAC) with at most 2^-64. An attacker never sees a digest or the key, only whether
//! a head was known; each try costs a request. The key is drawn anew at each load and only root can read it.

use crate::abi::HeadDigest;
use crate::head::{BLOCK_BYTES, HEAD_MAX_BYTES, HeadBuf, Step};

/// Key words: one per message word, one for length and endpoint, two for the second pass's shift.
pub const KEY_WORDS: usize = HEAD_MAX_BYTES / 8 + 8;
/// How far the second pass's key is shifted, in words.
const SHIFT: usize = 2;
/// Key word for length and endpoint.
const FINAL: usize = HEAD_MAX_BYTES / 8;

/// The secret key: `DIGEST_KEY`, an array of one.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct DigestKey {
    /// Random words.
    pub words: [u64; KEY_WORDS],
}
#[cfg(feature = "user")]
// SAFETY: `repr(C)`, an array of integers that fills the type (asserted below).
unsafe impl aya::Pod for DigestKey {}
const _: () = assert!(size_of::<DigestKey>() == KEY_WORDS * 8);

/// One NH term: both halves of the message word plus both halves of the key word, multiplied.
#[inline(always)]
const fn term(word: u64, key: u64) -> u64 {
    let low = (word as u32).wrapping_add(key as u32) as u64;
    let high = ((word >> 32) as u32).wrapping_add((key >> 32) as u32) as u64;
    low.wrapping_mul(high)
}

/// A digest in the making.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Digest {
    lo: u64,
    hi: u64,
    head_bytes: u32,
    zero: u32,
}

impl Digest {
    /// Of a head of so many bytes, nothing absorbed.
    #[must_use]
    #[inline(always)]
    pub const fn new(head_bytes: u32) -> Self {
        Self { lo: 0, hi: 0, head_bytes, zero: 0 }
    }

    /// Starts, and clears the bytes behind the head up to the end of its last block (they belong to the body).
    #[inline(always)]
    pub fn start(buf: &mut HeadBuf, head_bytes: u32) -> Self {
        clear_tail(buf, head_bytes);
        Self { lo: 0, hi: 0, head_bytes, zero: 0 }
    }

    /// Absorbs block `index`; at most [`crate::head::MAX_BLOCKS`] steps.
    #[inline(always)]
    pub fn block(&mut self, buf: &HeadBuf, key: &DigestKey, index: u32) -> Step {
        let base = index * BLOCK_BYTES as u32;
        if base >= self.head_bytes {
            return Step::Stop;
        }
        let first = (base / 8) & (HEAD_MAX_BYTES as u32 / 8 - 1) & !7;
        let mut k = 0;
        while k < 8 {
            let word = buf.word(base + k * 8);
            // SAFETY: `first + 7 + SHIFT < KEY_WORDS` because `first` is masked.
            let (one, two) = unsafe {
                let at = key.words.as_ptr().add((first + k) as usize);
                (*at, *at.add(SHIFT))
            };
            self.lo = self.lo.wrapping_add(term(word, one));
            self.hi = self.hi.wrapping_add(term(word, two));
            k += 1;
        }
        Step::Next
    }

    /// Absorbs length and endpoint.
    #[inline(always)]
    pub fn finish(&self, key: &DigestKey, endpoint_id: u32) -> HeadDigest {
        let word = u64::from(self.head_bytes) | u64::from(endpoint_id) << 32;
        HeadDigest {
            lo: self.lo.wrapping_add(term(word, key.words[FINAL])),
            hi: self.hi.wrapping_add(term(word, key.words[FINAL + SHIFT])),
        }
    }
}

#[inline(always)]
fn clear_tail(buf: &mut HeadBuf, head_bytes: u32) {
    let at = (head_bytes as usize) & (HEAD_MAX_BYTES - 1);
    if head_bytes as usize >= HEAD_MAX_BYTES {
        return;
    }
    let base = buf.bytes.as_mut_ptr();
    let word = at & !7;
    // SAFETY: `word` is below `HEAD_MAX_BYTES`, aligned to 8, and the slack behind holds the eight words of a whole block.
    unsafe {
        let first = base.add(word).cast::<u64>();
        first.write(first.read() & ((1_u64 << ((at & 7) * 8)) - 1));
        let mut k = 1;
        while k < 8 {
            base.add(word + k * 8).cast::<u64>().write(0);
            k += 1;
        }
    }
}

/// The digest of a masked head, in plain loops.
#[must_use]
pub fn of_head(buf: &mut HeadBuf, head_bytes: u32, key: &DigestKey, endpoint_id: u32) -> HeadDigest {
    let mut digest = Digest::start(buf, head_bytes);
    for index in 0..crate::head::MAX_BLOCKS {
        if digest.block(buf, key, index) == Step::Stop {
            break;
        }
    }
    digest.finish(key, endpoint_id)
}
