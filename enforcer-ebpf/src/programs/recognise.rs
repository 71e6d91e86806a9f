//! The head of a request in front of the judge: laid out, masked, digested and looked up, in scratch memory.

use core::mem::MaybeUninit;

use enforcer_common::abi::{Counter, FLOW_LAYOUTS, Flow, HeadDigest, Origin, Verdict, is_verdict_of};
use enforcer_common::digest::{self, DigestKey};
use enforcer_common::head::{
    HEAD_MAX_BYTES, HeadBuf, HeadInfo, Layout, MAX_BLOCKS, Miss, Scan, Step, mask_value, mask_with, may_have,
    zero_words,
};
use enforcer_common::scratch;

use crate::kernel::{Failed, Skb, count, exchange, repeat};
use crate::maps::{DIGEST_KEY, SCRATCH, Slot, VERDICTS};

/// What became of recognising a head.
#[must_use]
pub(crate) enum Head {
    /// Its framing, and whether it is known: then what was decided about it is where the caller wants it.
    Read(HeadInfo, bool),
    /// The daemon's parser must see it.
    Miss(Miss),
    /// No scratch memory was free.
    NoScratch,
    /// A helper failed.
    Failed,
}

/// The scan's loops have this as their context.
struct Work {
    buf: *mut HeadBuf,
    scan: Scan,
}

/// What [`mask_and_digest`] gives in place of a `Content-Length`: the bytes are not what the layout promises.
const IRREGULAR: u64 = u64::MAX;

/// Recognises the head at the start of an skb.
#[inline(always)]
pub(crate) fn head(skb: Skb<'_>, flow: &mut Flow, verdict: &mut Verdict) -> Head {
    let Some(key) = DIGEST_KEY.get(0) else { return Head::Failed };
    let Some((index, slot)) = acquire() else { return Head::NoScratch };
    if index != 0 {
        count(Counter::ScratchNested);
    }
    // SAFETY: the slot is a valid map value, and ours until it is released.
    let head = unsafe { in_slot(skb, flow, key, &raw mut (*slot).head, verdict) };
    release(slot);
    match head {
        Ok(head) => head,
        Err(Failed) => Head::Failed,
    }
}

/// First with a layout that this connection's heads had before, which saves the scan. Only if that finds no verdict is the head
/// scanned, and only the scan says what an unknown head is.
#[inline(always)]
unsafe fn in_slot(
    skb: Skb<'_>,
    flow: &mut Flow,
    key: &DigestKey,
    buf: *mut HeadBuf,
    verdict: &mut Verdict,
) -> Result<Head, Failed> {
    let origin = &raw const flow.origin;
    let len = skb.len();
    let len = if len > HEAD_MAX_BYTES as u32 { HEAD_MAX_BYTES as u32 } else { len };
    let mut layout = Layout::none();
    let mut digest = MaybeUninit::<HeadDigest>::uninit();
    // SAFETY: two words. The helpers and functions below want memory that was written.
    let digest = unsafe {
        zero_words::<2>(digest.as_mut_ptr().cast());
        digest.assume_init_mut()
    };
    // SAFETY: the buffer holds `HEAD_MAX_BYTES` and more. As below.
    unsafe { skb.load::<{ HEAD_MAX_BYTES as u32 }>(0, buf.cast::<u8>(), len)? };
    // SAFETY: as above.
    if remembered(flow, unsafe { &*buf }, len, &mut layout) {
        let content_length = mask_and_digest(buf, key, &raw const layout, origin, digest);
        if content_length != IRREGULAR && verdict_of(digest, verdict) != 0 {
            return Ok(Head::Read(HeadInfo::new(&layout, content_length), true));
        }
        // Masked in vain.
        // SAFETY: as above.
        unsafe { skb.load::<{ HEAD_MAX_BYTES as u32 }>(0, buf.cast::<u8>(), len)? };
    }
    let mut work = Work { buf, scan: Scan::new(len) };
    repeat(MAX_BLOCKS, scan_block, &mut work)?;
    let lines = match work.scan.found() {
        Ok(lines) => lines,
        Err(miss) => return Ok(Head::Miss(miss)),
    };
    repeat(lines, scan_line, &mut work)?;
    layout = match work.scan.finish() {
        Ok(layout) => layout,
        Err(miss) => return Ok(Head::Miss(miss)),
    };
    let content_length = mask_and_digest(buf, key, &raw const layout, origin, digest);
    if content_length == IRREGULAR {
        return Ok(Head::Miss(Miss::Irregular));
    }
    let known = verdict_of(digest, verdict) != 0;
    if known {
        remember(flow, &layout);
    }
    Ok(Head::Read(HeadInfo::new(&layout, content_length), known))
}

/// The one of the flow's layouts that may fit.
#[inline(always)]
fn remembered(flow: &Flow, buf: &HeadBuf, len: u32, layout: &mut Layout) -> bool {
    let mut k = 0;
    while k < FLOW_LAYOUTS {
        layout.words = flow.layouts[k];
        if may_have(buf, len, layout) {
            return true;
        }
        k += 1;
    }
    false
}

#[inline(always)]
fn remember(flow: &mut Flow, layout: &Layout) {
    let at = (flow.next_layout & (FLOW_LAYOUTS as u64 - 1)) as usize;
    flow.next_layout = flow.next_layout.wrapping_add(1);
    // SAFETY: `at` is masked.
    unsafe { *flow.layouts.as_mut_ptr().add(at) = layout.words };
}

/// Masks the head and writes its digest; the value of its `Content-Length`, or [`IRREGULAR`].
///
/// A global function to the verifier (it has external linkage), which walks it once, for any arguments, and not once per call and path.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mask_and_digest(
    buf: *mut HeadBuf,
    key: *const DigestKey,
    layout: *const Layout,
    origin: *const Origin,
    digest: *mut HeadDigest,
) -> u64 {
    if buf.is_null() || key.is_null() || layout.is_null() || origin.is_null() || digest.is_null() {
        return IRREGULAR;
    }
    // SAFETY: the callers' pointers are valid; the verifier checks each access against the types' sizes.
    let (buf, key, layout, origin) = unsafe { (&mut *buf, &*key, &*layout, &*origin) };
    let ok = |buf: &mut HeadBuf, from, to| mask_range(&raw mut *buf, from, to) != 0;
    let Some(content_length) = mask_with(buf, layout, ok) else { return IRREGULAR };
    // SAFETY: as above.
    unsafe { *digest = digest::of_head(buf, layout, key, origin) };
    content_length
}

/// [`mask_value`]; 0: not printable. Global as well: inlined, it is a loop in a loop, which the verifier follows through all combinations.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mask_range(buf: *mut HeadBuf, from: u32, to: u32) -> u32 {
    if buf.is_null() {
        return 0;
    }
    // SAFETY: as above.
    u32::from(mask_value(unsafe { &mut *buf }, from, to))
}

/// Copies the verdict of a digest; 0: there is none. A global function, as above.
///
/// The element may become another head's while it is read: see [`enforcer_common::abi::Sealed`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn verdict_of(digest: *const HeadDigest, out: *mut Verdict) -> u32 {
    if digest.is_null() || out.is_null() {
        return 0;
    }
    // SAFETY: the callers' pointers are valid; the verifier checks each access against the types' sizes. The element is valid memory,
    // whoever's it is.
    unsafe {
        // A copy on this stack: 6.1 takes no other memory for a map's key.
        let digest = digest.read_volatile();
        let Some(found) = VERDICTS.get_ptr(digest) else { return 0 };
        out.write((&raw const (*found).value).read_volatile());
        let check = (&raw const (*found).check).read_volatile();
        u32::from(is_verdict_of(&*out, check, &digest))
    }
}

#[inline(always)]
fn acquire() -> Option<(u32, *mut Slot)> {
    // SAFETY: a valid map value; `busy` is taken atomically, and released by who took it.
    scratch::acquire(|index| SCRATCH.get_ptr_mut(index), |slot| unsafe { exchange(&raw mut (*slot).busy, 1) })
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
    unsafe { i64::from((*work).scan.line(&*(*work).buf, index) == Step::Stop) }
}
