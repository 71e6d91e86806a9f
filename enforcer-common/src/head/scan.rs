//! The scan: line by line through a head that nothing is known about.

use core::mem::MaybeUninit;

use super::mask::LENGTH_MAX_DIGITS;
use super::{BLOCK_BYTES, HEAD_MAX_LINES, HeadBuf, IGNORED_MAX_BYTES, Layout, Miss, Step, zero_words};

const CR: u8 = b'\r';
const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;
const LINE_FEEDS: u64 = 0x0a0a_0a0a_0a0a_0a0a;

/// What the scan has found so far.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Scan {
    /// Bytes at hand.
    len: u32,
    /// Length of the head; 0: not found yet.
    head_bytes: u32,
    /// Lines found.
    lines: u32,
    /// Where the current line starts.
    line_start: u32,
    /// 1: irregular.
    irregular: u32,
    /// Ranges to mask; the head's length is still missing.
    layout: Layout,
}

impl Scan {
    /// A scan of the first `len` bytes of a buffer.
    #[must_use]
    #[inline(always)]
    pub fn new(len: u32) -> Self {
        let mut scan = MaybeUninit::<Self>::uninit();
        // SAFETY: integers only, all of them written; the size is a multiple of eight because the layout's alignment is.
        unsafe {
            zero_words::<{ size_of::<Self>() / 8 }>(scan.as_mut_ptr().cast());
            (*scan.as_mut_ptr()).len = len;
            scan.assume_init()
        }
    }

    #[inline(always)]
    fn fail(&mut self) -> Step {
        self.irregular = 1;
        Step::Stop
    }

    /// First loop, at most [`super::MAX_BLOCKS`] steps: finds line feeds and the end of the head in block `index`.
    #[inline(always)]
    pub fn block(&mut self, buf: &mut HeadBuf, index: u32) -> Step {
        let base = index * BLOCK_BYTES as u32;
        if base >= self.len {
            return Step::Stop;
        }
        let mut step = Step::Next;
        let mut k = 0;
        while k < 8 {
            let offset = base + k * 8;
            let x = buf.word(offset) ^ LINE_FEEDS;
            let found = x.wrapping_sub(ONES) & !x & HIGHS;
            if found != 0 {
                step = self.word(buf, offset, found);
                if step == Step::Stop {
                    break;
                }
            }
            k += 1;
        }
        step
    }

    /// The line feeds of one word: at most two in a head that is regular (`x CR LF CR LF`).
    #[inline(always)]
    fn word(&mut self, buf: &mut HeadBuf, offset: u32, found: u64) -> Step {
        let second = found & found.wrapping_sub(1);
        if self.line_feed(buf, offset + lowest_byte(found)) == Step::Stop {
            return Step::Stop;
        }
        if second == 0 {
            return Step::Next;
        }
        if self.line_feed(buf, offset + lowest_byte(second)) == Step::Stop {
            return Step::Stop;
        }
        // Behind the end of the head there may be more of them: a body's, or what the buffer held before.
        if second & second.wrapping_sub(1) != 0 { self.fail() } else { Step::Next }
    }

    #[inline(always)]
    fn line_feed(&mut self, buf: &mut HeadBuf, at: u32) -> Step {
        if at >= self.len {
            return Step::Stop;
        }
        if self.lines >= HEAD_MAX_LINES as u32 {
            return self.fail();
        }
        buf.set_line(self.lines, at);
        self.lines += 1;
        if at <= self.line_start + 1 {
            // An empty line: the end of the head, unless nothing came before it.
            if self.lines == 1 {
                return self.fail();
            }
            self.head_bytes = at + 1;
            return Step::Stop;
        }
        self.line_start = at + 1;
        Step::Next
    }

    /// Whether the second loop may run.
    ///
    /// # Errors
    /// Why it may not.
    #[inline(always)]
    pub fn found(&self) -> Result<u32, Miss> {
        if self.irregular != 0 {
            Err(Miss::Irregular)
        } else if self.head_bytes == 0 {
            Err(Miss::Incomplete)
        } else {
            Ok(self.lines)
        }
    }

    /// Second loop, as many steps as there are lines: checks line `index` and finds what the digest leaves out.
    #[inline(always)]
    pub fn line(&mut self, buf: &HeadBuf, index: u32) -> Step {
        if index >= self.lines {
            return Step::Stop;
        }
        let line_feed = buf.line(index);
        let start = if index == 0 { 0 } else { buf.line(index - 1) + 1 };
        if line_feed <= start || buf.byte(line_feed - 1) != CR {
            return self.fail();
        }
        let end = line_feed - 1;
        let first = buf.byte(start);
        if first == b' ' || first == b'\t' {
            return self.fail();
        }
        if index == 0 || end == start {
            return Step::Next;
        }
        match classify(buf, start) {
            (_, 0) => Step::Next,
            (true, value) => self.length(buf, value, end),
            (false, value) => self.ignored(value, end),
        }
    }

    /// `Content-Length`: once, after the colon at most one space, then one to ten bytes to the end of the line, which [`super::mask`]
    /// wants to be plain digits without a leading zero (stricter than RFC 9112, section 6.2, asks).
    #[inline(always)]
    fn length(&mut self, buf: &HeadBuf, value: u32, end: u32) -> Step {
        let from = if buf.byte(value) == b' ' { value + 1 } else { value };
        let digits = end.wrapping_sub(from);
        if self.layout.length().1 != 0 || digits == 0 || digits > LENGTH_MAX_DIGITS {
            return self.fail();
        }
        self.layout.set_length(from, end);
        Step::Next
    }

    /// An ignored header.
    #[inline(always)]
    fn ignored(&mut self, value: u32, end: u32) -> Step {
        if value < end && end - value <= IGNORED_MAX_BYTES {
            self.layout.add_mask(value, end);
        }
        Step::Next
    }

    /// Where everything is, after both loops.
    ///
    /// # Errors
    /// Why the head has no digest.
    #[inline(always)]
    pub fn finish(&self) -> Result<Layout, Miss> {
        self.found()?;
        let mut layout = self.layout;
        layout.set_head_bytes(self.head_bytes);
        Ok(layout)
    }
}

/// Position of the lowest flagged byte.
#[inline(always)]
const fn lowest_byte(flags: u64) -> u32 {
    let low = flags & flags.wrapping_neg();
    // `low` is 0x80 << 8n; the product's top byte is n.
    ((low >> 7).wrapping_mul(0x0001_0203_0405_0607) >> 56) as u32
}

const fn name8(text: &str) -> u64 {
    let bytes = text.as_bytes();
    let mut out = 0;
    let mut k = 0;
    while k < 8 {
        let byte = if k < bytes.len() { bytes[k] } else { 0 };
        out |= (byte as u64) << (8 * k);
        k += 1;
    }
    out
}

/// The header of the line at `start`: (is it `Content-Length`, where its value starts); value 0: neither that nor ignored.
/// The name itself stays in the digest as it was written.
#[inline(always)]
fn classify(buf: &HeadBuf, start: u32) -> (bool, u32) {
    const LOW7: u64 = u64::MAX >> 8;
    const LOW5: u64 = u64::MAX >> 24;
    const LOW4: u64 = u64::MAX >> 32;
    const LOW3: u64 = u64::MAX >> 40;
    let name = buf.lower8(start);
    let (rest, mask, length) = if name == name8("content-") {
        (name8("length:"), LOW7, 15)
    } else if name == name8("user-age") {
        (name8("nt:"), LOW3, 11)
    } else if name == name8("tracepar") {
        (name8("ent:"), LOW4, 12)
    } else if name == name8("tracesta") {
        (name8("te:"), LOW3, 11)
    } else if name == name8("x-reques") {
        (name8("t-id:"), LOW5, 13)
    } else if name == name8("baggage:") {
        return (false, start + 8);
    } else {
        return (false, 0);
    };
    if buf.lower8(start + 8) & mask != rest {
        return (false, 0);
    }
    (length == 15, start + length)
}
