//! The head of a request: where it ends, what its `Content-Length` says, and which bytes its digest leaves out.
//!
//! **The kernel recognises, it never interprets.** All bytes of the head go into its digest, except the digits of
//! `Content-Length` (the value is parsed) and the values of a few headers that can change neither framing nor
//! authorization ([`IGNORED`]). Those are *masked*: overwritten with zeros in place, so that their length and their
//! position still count. A head that looks in any way unusual is [`Miss::Irregular`], and the daemon's strict parser sees it.
//!
//! Three steps: the [`Layout`] says where the head ends and what is masked, [`mask()`] checks and masks, and
//! [`crate::digest::of_head`] digests head and layout. The layout comes from a [`Scan`], or from an earlier head of the
//! same connection: a wrong guess finds no verdict, and costs a scan.
//!
//! The scan is cut into steps that the kernel runs under `bpf_loop` and the host runs in plain loops ([`analyze`]).

mod buf;
mod layout;
mod mask;
mod scan;

pub use buf::{HeadBuf, zero_words};
pub use layout::{LAYOUT_WORDS, Layout, MAX_MASKS};
pub use mask::{mask, mask_value, mask_with};
pub use scan::Scan;

use crate::abi::{HeadDigest, Origin};
use crate::digest::{self, DigestKey};

/// Longest head that the kernel recognises, in bytes.
pub const HEAD_MAX_BYTES: usize = 4096;
/// The most lines of a head that the kernel recognises, the empty one included.
pub const HEAD_MAX_LINES: usize = 64;
/// Bytes of one step of the scan.
pub const BLOCK_BYTES: usize = 64;
/// Steps that cover the longest head.
pub const MAX_BLOCKS: u32 = (HEAD_MAX_BYTES / BLOCK_BYTES) as u32;
/// Longest value of an ignored header that is masked; a longer one counts like any other byte.
pub const IGNORED_MAX_BYTES: u32 = 256;

/// Headers whose values the digest leaves out. They say who made the software or which trace a request belongs to; no HTTP
/// server derives framing or authorization from them (RFC 9110, section 10.1.5; W3C Trace Context; W3C Baggage).
pub const IGNORED: [&str; 5] = ["user-agent", "traceparent", "tracestate", "x-request-id", "baggage"];

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

impl HeadInfo {
    /// Of a head that can't be read.
    pub const NONE: Self = Self { head_bytes: 0, has_content_length: 0, content_length: 0 };

    /// Of a masked head.
    #[must_use]
    #[inline(always)]
    pub const fn new(layout: &Layout, content_length: u64) -> Self {
        let has_content_length = (layout.length().1 != 0) as u32;
        Self { head_bytes: layout.head_bytes(), has_content_length, content_length }
    }
}

/// Whether a head of this layout may lie in the first `len` bytes of the buffer: worth a try.
#[must_use]
#[inline(always)]
pub fn may_have(buf: &HeadBuf, len: u32, layout: &Layout) -> bool {
    let head_bytes = layout.head_bytes();
    head_bytes >= 4 && head_bytes <= len && buf.ends_at(head_bytes)
}

/// The layout of the head in the first `len` bytes of a buffer: what the kernel does, in plain loops.
///
/// # Errors
/// Why there is none.
pub fn scan(buf: &mut HeadBuf, len: u32) -> Result<Layout, Miss> {
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
    }
    scan.finish()
}

/// Scans, masks and digests the first `len` bytes of a buffer.
///
/// # Errors
/// Why there is no digest.
pub fn analyze(
    buf: &mut HeadBuf,
    len: u32,
    key: &DigestKey,
    origin: &Origin,
) -> Result<(HeadInfo, HeadDigest), Miss> {
    let layout = scan(buf, len)?;
    let content_length = mask(buf, &layout).ok_or(Miss::Irregular)?;
    Ok((HeadInfo::new(&layout, content_length), digest::of_head(buf, &layout, key, origin)))
}

/// [`analyze`] of bytes that are not in a buffer yet; only the first [`HEAD_MAX_BYTES`] count.
///
/// # Errors
/// Why there is no digest.
pub fn analyze_bytes(bytes: &[u8], key: &DigestKey, origin: &Origin) -> Result<(HeadInfo, HeadDigest), Miss> {
    let mut buf = HeadBuf::new();
    let len = bytes.len().min(HEAD_MAX_BYTES);
    buf.bytes[..len].copy_from_slice(&bytes[..len]);
    analyze(&mut buf, len as u32, key, origin)
}

#[cfg(test)]
mod tests;
