//! Memory for one head.

use super::{HEAD_MAX_BYTES, HEAD_MAX_LINES};

/// Bytes behind the longest head that word-wise reads may touch.
const SLACK_BYTES: usize = 64;
const OFFSET_MASK: u32 = HEAD_MAX_BYTES as u32 - 1;
const SPACES: u64 = 0x2020_2020_2020_2020;

/// Memory for one head. The bytes of the request are copied in; masking overwrites some of them in place.
#[repr(C, align(8))]
pub struct HeadBuf {
    /// The head, and whatever the request holds behind it.
    pub bytes: [u8; HEAD_MAX_BYTES + SLACK_BYTES],
    /// Offsets of the line feeds. Twice as many as are used: the compiler drops a mask that it knows to be needless, and the
    /// verifier's own idea of the index's bound is one too wide.
    lines: [u16; 2 * HEAD_MAX_LINES],
}

impl HeadBuf {
    /// Empty memory.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; HEAD_MAX_BYTES + SLACK_BYTES], lines: [0; 2 * HEAD_MAX_LINES] }
    }

    // The offset is masked in each accessor: the verifier then knows that the access is inside the buffer, whatever the
    // caller computed; a wrong offset reads another byte of the same request and can only cause a miss.
    #[inline(always)]
    pub(crate) fn byte(&self, offset: u32) -> u8 {
        // SAFETY: the masked offset is below `HEAD_MAX_BYTES`.
        unsafe { *self.bytes.as_ptr().add((offset & OFFSET_MASK) as usize) }
    }

    #[inline(always)]
    pub(crate) fn set_byte(&mut self, offset: u32, value: u8) {
        // SAFETY: as in `byte`.
        unsafe { *self.bytes.as_mut_ptr().add((offset & OFFSET_MASK) as usize) = value };
    }

    /// The word at an offset that is a multiple of 8.
    #[inline(always)]
    pub(crate) fn word(&self, offset: u32) -> u64 {
        // SAFETY: the buffer is aligned to 8, like the masked offset, and 8 bytes behind it are inside the buffer.
        unsafe { self.bytes.as_ptr().add((offset & OFFSET_MASK & !7) as usize).cast::<u64>().read() }
    }

    #[inline(always)]
    pub(crate) fn set_word(&mut self, offset: u32, value: u64) {
        // SAFETY: as in `word`.
        unsafe {
            self.bytes.as_mut_ptr().add((offset & OFFSET_MASK & !7) as usize).cast::<u64>().write(value);
        };
    }

    /// Eight bytes from any offset, in lower case (which maps some other bytes onto each other: compare only with letters,
    /// `-` and `:`, and never decide more by it than what is masked).
    #[inline(always)]
    pub(crate) fn lower8(&self, offset: u32) -> u64 {
        let offset = offset & OFFSET_MASK;
        let shift = (offset & 7) * 8;
        let first = self.word(offset);
        if shift == 0 {
            return first | SPACES;
        }
        // SAFETY: the next word lies in the buffer or its slack: `HEAD_MAX_BYTES - 8 + 8 + 8 <= bytes.len()`.
        let second = unsafe { self.bytes.as_ptr().add((offset & !7) as usize + 8).cast::<u64>().read() };
        (first >> shift | second << (64 - shift)) | SPACES
    }

    #[inline(always)]
    pub(crate) fn line(&self, index: u32) -> u32 {
        // SAFETY: the masked index is below `HEAD_MAX_LINES`.
        unsafe { u32::from(*self.lines.as_ptr().add((index & (HEAD_MAX_LINES as u32 - 1)) as usize)) }
    }

    #[inline(always)]
    pub(crate) fn set_line(&mut self, index: u32, value: u32) {
        // SAFETY: as in `line`; the value is an offset below `HEAD_MAX_BYTES`.
        unsafe {
            *self.lines.as_mut_ptr().add((index & (HEAD_MAX_LINES as u32 - 1)) as usize) = value as u16;
        };
    }

    /// Whether the four bytes before `end` are an empty line.
    #[inline(always)]
    pub(crate) fn ends_at(&self, end: u32) -> bool {
        let at = end.wrapping_sub(4) & OFFSET_MASK;
        // SAFETY: four bytes from an offset below `HEAD_MAX_BYTES`, inside the buffer or its slack.
        unsafe { self.bytes.as_ptr().add(at as usize).cast::<[u8; 4]>().read() == *b"\r\n\r\n" }
    }

    /// Clears the bytes from `end` up to the end of their block of 64 (they belong to the body).
    #[inline(always)]
    pub(crate) fn clear_tail(&mut self, end: u32) {
        if end as usize >= HEAD_MAX_BYTES {
            return;
        }
        let at = end as usize & (HEAD_MAX_BYTES - 1);
        let word = at & !7;
        // SAFETY: `word` is below `HEAD_MAX_BYTES`, aligned to 8, and the slack behind holds the eight words of a whole block.
        unsafe {
            let base = self.bytes.as_mut_ptr();
            let first = base.add(word).cast::<u64>();
            first.write(first.read() & ((1_u64 << ((at & 7) * 8)) - 1));
            zero_words::<7>(first.add(1));
        }
    }
}

/// Writes zeros word by word. Anything else the compiler makes a call of `memset`, which for the kernel's target writes byte by byte:
/// ten times the instructions, and loads that must wait for eight stores.
///
/// # Safety
/// `at` is valid for `N` words.
#[inline(always)]
pub unsafe fn zero_words<const N: usize>(at: *mut u64) {
    let mut k = 0;
    while k < N {
        // SAFETY: the caller's.
        unsafe { at.add(k).write_volatile(0) };
        k += 1;
    }
}

impl Default for HeadBuf {
    fn default() -> Self {
        Self::new()
    }
}
