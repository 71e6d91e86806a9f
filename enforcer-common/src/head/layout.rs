//! Where a head ends and which of its bytes the digest leaves out.

use core::mem::MaybeUninit;

use super::zero_words;

/// Values of ignored headers that one layout can name; further ones count like any other byte.
pub const MAX_MASKS: u32 = 6;
/// Words of a layout.
pub const LAYOUT_WORDS: usize = 4;

/// Ranges of bytes within a head, found once by the scan ([`super::Scan`]) and tried again on the next head of the same
/// connection.
///
/// A layout is only a guess about a head that was not scanned. It is part of the digest, so a verdict is found only under the
/// layout that the scan gave for the judged head; and as the two heads are then equal but for masked bytes, and masked
/// bytes hold no line end, the scan would have found the same layout in this one.
///
/// Words 0 to 2: two ranges each, start and end in 16 bits each. Word 3: length of the head, how many ranges there are, start and end of
/// the digits of `Content-Length` (16 bits each, 0 and 0 without one).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// See above. All zeros: no layout.
    pub words: [u64; LAYOUT_WORDS],
}

impl Layout {
    /// Nothing known.
    pub const NONE: Self = Self { words: [0; LAYOUT_WORDS] };

    /// [`Self::NONE`], for the kernel's stack.
    #[must_use]
    #[inline(always)]
    pub fn none() -> Self {
        let mut layout = MaybeUninit::<Self>::uninit();
        // SAFETY: all words are written.
        unsafe {
            zero_words::<LAYOUT_WORDS>(layout.as_mut_ptr().cast());
            layout.assume_init()
        }
    }

    /// Length of the head in bytes; 0: no layout.
    #[must_use]
    #[inline(always)]
    pub const fn head_bytes(&self) -> u32 {
        self.words[3] as u16 as u32
    }

    /// Ranges in use, [`MAX_MASKS`] at most.
    #[must_use]
    #[inline(always)]
    pub const fn masks(&self) -> u32 {
        (self.words[3] >> 16) as u16 as u32
    }

    /// Start and end of the digits of `Content-Length`; the end is 0 without one.
    #[must_use]
    #[inline(always)]
    pub const fn length(&self) -> (u32, u32) {
        ((self.words[3] >> 32) as u16 as u32, (self.words[3] >> 48) as u32)
    }

    /// Start and end of range `index`, below [`MAX_MASKS`].
    #[must_use]
    #[inline(always)]
    pub const fn mask(&self, index: u32) -> (u32, u32) {
        // SAFETY: the masked index is at most 3. The verifier must see the mask, which the compiler drops from a checked access.
        let word = unsafe { *self.words.as_ptr().add(((index / 2) & 3) as usize) };
        let both = (word >> (32 * (index & 1))) as u32;
        (both & 0xffff, both >> 16)
    }

    #[inline(always)]
    pub(crate) const fn set_head_bytes(&mut self, head_bytes: u32) {
        self.words[3] |= head_bytes as u64;
    }

    #[inline(always)]
    pub(crate) const fn set_length(&mut self, from: u32, to: u32) {
        self.words[3] |= (from as u64) << 32 | (to as u64) << 48;
    }

    /// One more range, where there is room.
    #[inline(always)]
    pub(crate) fn add_mask(&mut self, from: u32, to: u32) {
        let both = u64::from(from | to << 16);
        // Constant indices: a variable one into a structure on the stack is beyond the verifier.
        match self.masks() {
            0 => self.words[0] |= both,
            1 => self.words[0] |= both << 32,
            2 => self.words[1] |= both,
            3 => self.words[1] |= both << 32,
            4 => self.words[2] |= both,
            5 => self.words[2] |= both << 32,
            _ => return,
        }
        self.words[3] += 1 << 16;
    }
}
