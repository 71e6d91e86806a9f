//! The head of a request in front of the judge: scanned, masked and digested in scratch memory.

use enforcer_common::abi::HeadDigest;
use enforcer_common::digest::{Digest, DigestKey};
use enforcer_common::head::{HEAD_MAX_BYTES, HeadBuf, HeadInfo, MASK_WORDS, MAX_BLOCKS, Miss, Scan, Step};

use crate::kernel::{Failed, Skb, exchange, repeat};
use crate::maps::{DIGEST_KEY, SCRATCH, SLOTS, Slot};

/// What became of recognising a head.
#[must_use]
pub(crate) enum Head {
    /// Its framing and digest.
    Known(HeadInfo, HeadDigest),
    /// The daemon's parser must see it.
    Miss(Miss),
    /// No scratch memory was free.
    NoScratch,
    /// A helper failed.
    Failed,
}

struct Work {
    buf: *mut HeadBuf,
    key: *const DigestKey,
    scan: Scan,
    digest: Digest,
}

/// Recognises the head at the start of an skb.
#[inline(always)]
pub(crate) fn head(skb: Skb<'_>, endpoint_id: u32) -> Head {
    let Some(key) = DIGEST_KEY.get(0) else { return Head::Failed };
    let Some(slot) = acquire() else { return Head::NoScratch };
    // SAFETY: the slot is a valid map value, and ours until it is released.
    let head = unsafe { in_slot(skb, endpoint_id, key, &raw mut (*slot).head) };
    release(slot);
    match head {
        Ok(Ok((info, digest))) => Head::Known(info, digest),
        Ok(Err(miss)) => Head::Miss(miss),
        Err(Failed) => Head::Failed,
    }
}

#[inline(always)]
unsafe fn in_slot(
    skb: Skb<'_>,
    endpoint_id: u32,
    key: &DigestKey,
    buf: *mut HeadBuf,
) -> Result<Result<(HeadInfo, HeadDigest), Miss>, Failed> {
    let len = skb.len();
    let len = if len > HEAD_MAX_BYTES as u32 { HEAD_MAX_BYTES as u32 } else { len };
    // SAFETY: the buffer holds `HEAD_MAX_BYTES` and more.
    unsafe { skb.load::<{ HEAD_MAX_BYTES as u32 }>(0, buf.cast::<u8>(), len)? };
    let mut work = Work { buf, key, scan: Scan::new(len), digest: Digest::new(0) };
    repeat(MAX_BLOCKS, scan_block, &mut work)?;
    let lines = match work.scan.found() {
        Ok(lines) => lines,
        Err(miss) => return Ok(Err(miss)),
    };
    repeat(lines, scan_line, &mut work)?;
    let info = match work.scan.finish() {
        Ok(info) => info,
        Err(miss) => return Ok(Err(miss)),
    };
    // SAFETY: as above.
    work.digest = Digest::start(unsafe { &mut *buf }, info.head_bytes);
    repeat(MAX_BLOCKS, digest_block, &mut work)?;
    Ok(Ok((info, work.digest.finish(key, endpoint_id))))
}

fn acquire() -> Option<*mut Slot> {
    let mut index = 0;
    while index < SLOTS {
        let slot = SCRATCH.get_ptr_mut(index)?;
        // SAFETY: a valid map value; `busy` is taken atomically, and released by who took it.
        if unsafe { exchange(&raw mut (*slot).busy, 1) } == 0 {
            return Some(slot);
        }
        index += 1;
    }
    None
}

#[inline(always)]
fn release(slot: *mut Slot) {
    // SAFETY: as in `acquire`.
    unsafe { (&raw mut (*slot).busy).write_volatile(0) };
}

extern "C" fn scan_block(index: u32, work: *mut Work) -> i64 {
    // SAFETY: `bpf_loop` hands back the pointer that it was given; buffer and key outlive the loop. As below.
    unsafe { i64::from((*work).scan.block(&mut *(*work).buf, index) == Step::Stop) }
}

extern "C" fn scan_line(index: u32, work: *mut Work) -> i64 {
    // SAFETY: as above.
    let work = unsafe { &mut *work };
    // SAFETY: as above.
    if work.scan.line(unsafe { &mut *work.buf }, index) == Step::Stop {
        return 1;
    }
    if work.scan.has_mask() && repeat(MASK_WORDS, mask_word, work).is_err() {
        return 1;
    }
    i64::from(work.scan.found().is_err())
}

extern "C" fn mask_word(index: u32, work: *mut Work) -> i64 {
    // SAFETY: as above.
    unsafe { i64::from((*work).scan.mask_word(&mut *(*work).buf, index) == Step::Stop) }
}

extern "C" fn digest_block(index: u32, work: *mut Work) -> i64 {
    // SAFETY: as above.
    unsafe { i64::from((*work).digest.block(&*(*work).buf, &*(*work).key, index) == Step::Stop) }
}
