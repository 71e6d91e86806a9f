//! The keyed digest of a request head: a multilinear hash of its masked bytes, its layout and its origin, taken as 64-bit words, and the same of the words with
//! their bytes reversed, each with keys of its own.
//!
//! For every word `w` at position `i`: `lo += w * key[i]` and `hi += reversed(w) * key[i + 1]`, modulo 2^64. Two multiplications,
//! one byte swap and two loads for eight bytes.
//!
//! **Bound.** Take two heads, fixed before the key was drawn, and the last word in which they differ, number `i`. Their difference there
//! has `t` trailing zero bits as it stands, and `s` reversed. `key[i + 1]` is not in the difference of the `lo`, so for all other keys
//! fixed the `lo` are equal for at most 2^t of the 2^64 values of `key[i]`, and then the `hi` for at most 2^s of those of
//! `key[i + 1]`. If the lowest and the highest byte that differ are numbers `m <= n`, then `t <= 8m + 7` and
//! `s <= 8(7 - n) + 7`, so `t + s <= 70`: the digests are equal with probability at most 2^-58, and at most 2^-66 unless the words
//! differ in one byte only. An attacker never sees
//! a digest or the key, only whether a head was known; each try costs a request. The key is drawn anew at each load and only root can
//! read it.

use crate::abi::{HeadDigest, ORIGIN_WORDS, Origin};
use crate::head::{HEAD_MAX_BYTES, HeadBuf, LAYOUT_WORDS, Layout};

/// Bytes that are absorbed at a time.
const BLOCK_BYTES: u32 = 64;
/// Words of a head.
const HEAD_WORDS: usize = HEAD_MAX_BYTES / 8;
/// Words of the secret key: one for each word of the head, of its layout, of its origin, and one more.
pub const KEY_WORDS: usize = HEAD_WORDS + LAYOUT_WORDS + ORIGIN_WORDS + 1;

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

#[inline(always)]
const fn absorb(digest: &mut HeadDigest, word: u64, one: u64, two: u64) {
    digest.lo = digest.lo.wrapping_add(word.wrapping_mul(one));
    digest.hi = digest.hi.wrapping_add(word.swap_bytes().wrapping_mul(two));
}

/// The digest of a head whose values were masked ([`crate::head::mask`]). Clears what follows the head in its last block.
#[inline(always)]
pub fn of_head(buf: &mut HeadBuf, layout: &Layout, key: &DigestKey, origin: &Origin) -> HeadDigest {
    let head_bytes = layout.head_bytes();
    buf.clear_tail(head_bytes);
    let mut digest = HeadDigest { lo: 0, hi: 0 };
    let mut base = 0;
    while base < HEAD_MAX_BYTES as u32 {
        if base >= head_bytes {
            break;
        }
        // SAFETY: `base` is below `HEAD_MAX_BYTES`, and the key has more words than a head. As below.
        let keys = unsafe { key.words.as_ptr().add((base / 8) as usize) };
        // SAFETY: as above.
        let mut one = unsafe { *keys };
        let mut k = 0;
        while k < BLOCK_BYTES / 8 {
            // SAFETY: as above.
            let two = unsafe { *keys.add(k as usize + 1) };
            absorb(&mut digest, buf.word(base + k * 8), one, two);
            one = two;
            k += 1;
        }
        base += BLOCK_BYTES;
    }
    let mut k = 0;
    while k < LAYOUT_WORDS {
        let at = HEAD_WORDS + k;
        absorb(&mut digest, layout.words[k], key.words[at], key.words[at + 1]);
        k += 1;
    }
    k = 0;
    while k < ORIGIN_WORDS {
        let at = HEAD_WORDS + LAYOUT_WORDS + k;
        absorb(&mut digest, origin.words[k], key.words[at], key.words[at + 1]);
        k += 1;
    }
    digest
}
