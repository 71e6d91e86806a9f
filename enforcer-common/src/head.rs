//! The head of a request: where it ends, what its `Content-Length` says, and which bytes its digest leaves out.
//!
//! **The kernel recognises, it never interprets.** All bytes of the head go into its digest, except the digits of
//! `Content-Length` (the value is parsed) and the values of a few headers that can change neither framing nor
//! authorization ([`IGNORED`]). Those are *masked*: overwritten with zeros in place, so that their length and their
//! position still count. A head that looks in any way unusual is [`Miss::Irregular`], and the daemon's strict parser sees it.
//!
//! The work is cut into steps that the kernel runs under `bpf_loop` and the host runs in plain loops ([`analyze`]).

use crate::abi::HeadDigest;
use crate::digest::{self, DigestKey};

/// Longest head that the kernel recognises, in bytes.
pub const HEAD_MAX_BYTES: usize = 4096;
/// Bytes behind the longest head that word-wise reads may touch.
const SLACK_BYTES: usize = 64;
/// The most lines of a head that the kernel recognises, the empty one included.
pub const HEAD_MAX_LINES: usize = 64;
/// Bytes of one scan or digest step.
pub const BLOCK_BYTES: usize = 64;
/// Steps that cover the longest head.
pub const MAX_BLOCKS: u32 = (HEAD_MAX_BYTES / BLOCK_BYTES) as u32;
/// Longest value of an ignored header that is masked; a longer one counts like any other byte.
pub const IGNORED_MAX_BYTES: u32 = 256;
/// Words that the longest masked value may touch.
pub const MASK_WORDS: u32 = IGNORED_MAX_BYTES / 8 + 1;
/// The most digits of a `Content-Length`.
const LENGTH_MAX_DIGITS: u32 = 10;

/// Headers whose values the digest leaves out. They say who made the software or which trace a request belongs to; no HTTP
/// server derives framing or authorization from them (RFC 9110, section 10.1.5; W3C Trace Context; W3C Baggage).
pub const IGNORED: [&str; 5] = ["user-agent", "traceparent", "tracestate", "x-request-id", "baggage"];

const OFFSET_MASK: u32 = HEAD_MAX_BYTES as u32 - 1;
const CR: u8 = b'\r';
const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;
const SPACES: u64 = 0x2020_2020_2020_2020;
const LINE_FEEDS: u64 = 0x0a0a_0a0a_0a0a_0a0a;
const DELETES: u64 = 0x7f7f_7f7f_7f7f_7f7f;

/// Memory for one head. The bytes of the request are copied in; the scan masks them in place.
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
    fn byte(&self, offset: u32) -> u8 {
        // SAFETY: the masked offset is below `HEAD_MAX_BYTES`.
        unsafe { *self.bytes.as_ptr().add((offset & OFFSET_MASK) as usize) }
    }

    #[inline(always)]
    fn set_byte(&mut self, offset: u32, value: u8) {
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
    fn set_word(&mut self, offset: u32, value: u64) {
        // SAFETY: as in `word`.
        unsafe {
            self.bytes.as_mut_ptr().add((offset & OFFSET_MASK & !7) as usize).cast::<u64>().write(value)
        };
    }

    /// Eight bytes from any offset, in lower case (which maps some other bytes onto each other: compare only with letters,
    /// `-` and `:`, and never decide more by it than what is masked).
    #[inline(always)]
    fn lower8(&self, offset: u32) -> u64 {
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
    fn line(&self, index: u32) -> u32 {
        // SAFETY: the masked index is below `HEAD_MAX_LINES`.
        unsafe { u32::from(*self.lines.as_ptr().add((index & (HEAD_MAX_LINES as u32 - 1)) as usize)) }
    }

    #[inline(always)]
    fn set_line(&mut self, index: u32, value: u32) {
        // SAFETY: as in `line`; the value is an offset below `HEAD_MAX_BYTES`.
        unsafe {
            *self.lines.as_mut_ptr().add((index & (HEAD_MAX_LINES as u32 - 1)) as usize) = value as u16
        };
    }
}

impl Default for HeadBuf {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a head has no digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Miss {
    /// Its end is not among the bytes at hand, or it is longer than [`HEAD_MAX_BYTES`].
    Incomplete = 1,
    /// Something in it is unusual: a bare line feed, a folded line, a `Content-Length` that is not plain, too many lines.
    Irregular = 2,
}

/// Whether a loop over steps goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// The next step follows.
    Next,
    /// The loop ends.
    Stop,
}

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
    /// Where the value to mask starts.
    mask_from: u32,
    /// Where it ends; 0: there is none.
    mask_to: u32,
    /// 1: a `Content-Length` was seen.
    has_length: u32,
    /// Its value.
    content_length: u64,
}

impl Scan {
    /// A scan of the first `len` bytes of a buffer.
    #[must_use]
    #[inline(always)]
    pub const fn new(len: u32) -> Self {
        Self {
            len,
            head_bytes: 0,
            lines: 0,
            line_start: 0,
            irregular: 0,
            mask_from: 0,
            mask_to: 0,
            has_length: 0,
            content_length: 0,
        }
    }

    #[inline(always)]
    fn fail(&mut self) -> Step {
        self.irregular = 1;
        Step::Stop
    }

    /// First loop, at most [`MAX_BLOCKS`] steps: finds line feeds and the end of the head in block `index`.
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

    /// Second loop, as many steps as there are lines: checks line `index` and masks what the digest leaves out.
    #[inline(always)]
    pub fn line(&mut self, buf: &mut HeadBuf, index: u32) -> Step {
        if index >= self.lines {
            return Step::Stop;
        }
        self.mask_to = 0;
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
            (true, value) => self.mask_length(buf, value, end),
            (false, value) => self.mask_ignored(value, end),
        }
    }

    /// `Content-Length`: once, after the colon at most one space, then plain digits without a leading zero to the end of
    /// the line (stricter than RFC 9112, section 6.2, asks).
    #[inline(always)]
    fn mask_length(&mut self, buf: &mut HeadBuf, value: u32, end: u32) -> Step {
        if self.has_length != 0 {
            return self.fail();
        }
        let mut at = value;
        if buf.byte(at) == b' ' {
            at += 1;
        }
        let digits = end.wrapping_sub(at);
        if digits == 0 || digits > LENGTH_MAX_DIGITS || (digits > 1 && buf.byte(at) == b'0') {
            return self.fail();
        }
        let mut length = 0_u64;
        let mut k = 0;
        while k < LENGTH_MAX_DIGITS {
            if k >= digits {
                break;
            }
            let digit = buf.byte(at + k).wrapping_sub(b'0');
            if digit > 9 {
                return self.fail();
            }
            length = length * 10 + u64::from(digit);
            buf.set_byte(at + k, 0);
            k += 1;
        }
        self.has_length = 1;
        self.content_length = length;
        Step::Next
    }

    /// An ignored header: its value is left to the third loop.
    #[inline(always)]
    fn mask_ignored(&mut self, value: u32, end: u32) -> Step {
        if value < end && end - value <= IGNORED_MAX_BYTES {
            self.mask_from = value;
            self.mask_to = end;
        }
        Step::Next
    }

    /// Whether the line that was just checked has a value to mask: then the third loop must run before the next line's step.
    #[inline(always)]
    pub fn has_mask(&self) -> bool {
        self.mask_to != 0
    }

    /// Third loop, at most [`MASK_WORDS`] steps: word `index` of the value of an ignored header becomes zeros, provided that it
    /// is printable ASCII.
    #[inline(always)]
    pub fn mask_word(&mut self, buf: &mut HeadBuf, index: u32) -> Step {
        let (from, to) = (self.mask_from, self.mask_to);
        let offset = (from & !7) + index * 8;
        if offset >= to {
            return Step::Stop;
        }
        let mut mask = u64::MAX;
        if offset < from {
            mask <<= ((from - offset) & 7) * 8;
        }
        if offset + 8 > to {
            mask &= u64::MAX >> (((offset + 8 - to) & 7) * 8);
        }
        let word = buf.word(offset);
        let checked = (word & mask) | (SPACES & !mask);
        let delete = checked ^ DELETES;
        let bad = checked | (checked.wrapping_sub(SPACES) & !checked) | (delete.wrapping_sub(ONES) & !delete);
        if bad & HIGHS != 0 {
            return self.fail();
        }
        buf.set_word(offset, word & !mask);
        Step::Next
    }

    /// What the head says, after both loops.
    ///
    /// # Errors
    /// Why it has no digest.
    #[inline(always)]
    pub fn finish(&self) -> Result<HeadInfo, Miss> {
        self.found()?;
        Ok(HeadInfo {
            head_bytes: self.head_bytes,
            has_content_length: self.has_length,
            content_length: self.content_length,
        })
    }
}

/// What the kernel knows of a head.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadInfo {
    /// Its length with the empty line, in bytes.
    pub head_bytes: u32,
    /// 1: it has a `Content-Length`.
    pub has_content_length: u32,
    /// The value, 0 without one.
    pub content_length: u64,
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

/// Scans, masks and digests the first `len` bytes of a buffer: what the kernel does, in plain loops.
///
/// # Errors
/// Why there is no digest.
pub fn analyze(
    buf: &mut HeadBuf,
    len: u32,
    key: &DigestKey,
    endpoint_id: u32,
) -> Result<(HeadInfo, HeadDigest), Miss> {
    let mut scan = Scan::new(len.min(HEAD_MAX_BYTES as u32));
    for index in 0..MAX_BLOCKS {
        if scan.block(buf, index) == Step::Stop {
            break;
        }
    }
    for index in 0..scan.found()? {
        if scan.line(buf, index) == Step::Stop {
            break;
        }
        if scan.has_mask() {
            for word in 0..MASK_WORDS {
                if scan.mask_word(buf, word) == Step::Stop {
                    break;
                }
            }
        }
        if scan.found().is_err() {
            break;
        }
    }
    let info = scan.finish()?;
    Ok((info, digest::of_head(buf, info.head_bytes, key, endpoint_id)))
}

/// [`analyze`] of bytes that are not in a buffer yet; only the first [`HEAD_MAX_BYTES`] count.
///
/// # Errors
/// Why there is no digest.
pub fn analyze_bytes(
    bytes: &[u8],
    key: &DigestKey,
    endpoint_id: u32,
) -> Result<(HeadInfo, HeadDigest), Miss> {
    let mut buf = HeadBuf::new();
    let len = bytes.len().min(HEAD_MAX_BYTES);
    buf.bytes[..len].copy_from_slice(&bytes[..len]);
    analyze(&mut buf, len as u32, key, endpoint_id)
}

#[cfg(test)]
mod tests;
