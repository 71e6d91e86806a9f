//! Masking: what the digest leaves out becomes zeros, in place, and is checked on the way.

use super::{HEAD_MAX_BYTES, HeadBuf, IGNORED_MAX_BYTES, Layout, MAX_MASKS};

/// The most digits of a `Content-Length`.
pub(super) const LENGTH_MAX_DIGITS: u32 = 10;
/// Words that the longest masked value may touch.
const MASK_WORDS: u32 = IGNORED_MAX_BYTES / 8 + 1;
/// Takes an offset to the start of its word.
const WORD_MASK: u32 = HEAD_MAX_BYTES as u32 - 8;
const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;
const SPACES: u64 = 0x2020_2020_2020_2020;

/// Masks the ranges of a layout, whose head must lie in the buffer. Gives the value of `Content-Length` (0 without one); `None`: the
/// bytes are not what the layout promises, namely plain digits without a leading zero and values in printable ASCII.
#[inline(always)]
pub fn mask(buf: &mut HeadBuf, layout: &Layout) -> Option<u64> {
    mask_with(buf, layout, mask_value)
}

/// [`mask`], with [`mask_value`] behind whatever the verifier wants in between.
#[inline(always)]
pub fn mask_with(
    buf: &mut HeadBuf,
    layout: &Layout,
    mask_value: impl Fn(&mut HeadBuf, u32, u32) -> bool,
) -> Option<u64> {
    let mut index = 0;
    while index < MAX_MASKS {
        if index >= layout.masks() {
            break;
        }
        let (from, to) = layout.mask(index);
        if !mask_value(buf, from, to) {
            return None;
        }
        index += 1;
    }
    let (from, to) = layout.length();
    if to == 0 { Some(0) } else { mask_digits(buf, from, to) }
}

/// Whether the bytes are plain digits without a leading zero, and their value.
#[inline(always)]
fn mask_digits(buf: &mut HeadBuf, from: u32, to: u32) -> Option<u64> {
    let digits = to.wrapping_sub(from);
    if digits == 0 || digits > LENGTH_MAX_DIGITS || (digits > 1 && buf.byte(from) == b'0') {
        return None;
    }
    let mut length = 0_u64;
    let mut k = 0;
    while k < LENGTH_MAX_DIGITS {
        if k >= digits {
            break;
        }
        let digit = buf.byte(from + k).wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        length = length * 10 + u64::from(digit);
        buf.set_byte(from + k, 0);
        k += 1;
    }
    Some(length)
}

/// Masks one value, which is not empty; whether it is printable ASCII (0x20 to 0x7e). Eight bytes at a time.
#[inline(always)]
pub fn mask_value(buf: &mut HeadBuf, from: u32, to: u32) -> bool {
    let first = from & WORD_MASK;
    let last = to.wrapping_sub(1) & WORD_MASK;
    // The bytes of the first and the last word that do not belong to the value.
    let before = (1_u64 << ((from & 7) * 8)) - 1;
    let behind = (u64::MAX << 8) << ((to.wrapping_sub(1) & 7) * 8);
    if first == last {
        return mask_word(buf, first, before | behind) & HIGHS == 0;
    }
    let mut bad = mask_word(buf, first, before) | mask_word(buf, last, behind);
    let mut offset = first;
    let mut words = 0;
    while words < MASK_WORDS {
        offset += 8;
        if offset >= last {
            return bad & HIGHS == 0;
        }
        bad |= mask_word(buf, offset, 0);
        words += 1;
    }
    false
}

/// Clears a word but for some bytes. A byte of the result is 0x80 or more if one of the others is not printable.
#[inline(always)]
fn mask_word(buf: &mut HeadBuf, offset: u32, keep: u64) -> u64 {
    let word = buf.word(offset);
    let value = (word & !keep) | (SPACES & keep);
    buf.set_word(offset, word & keep);
    // A byte from 0x80 on shows as it is, 0x7f when one is added, one below 0x20 when 0x20 is taken off. A carry between bytes comes
    // from such a byte only.
    value | value.wrapping_add(ONES) | value.wrapping_sub(SPACES)
}
