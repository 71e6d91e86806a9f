//! A chunked body in front of the judge: the chunk decoder over an skb's bytes.

use enforcer_common::chunked::{ChunkStep, Chunked};

use crate::kernel::{Skb, repeat};

/// The most steps of the decoder over one skb: one for each of its bytes, however small the chunks.
const CHUNK_STEPS: u32 = 1 << 19;

/// Where an skb leads in a chunked body.
#[must_use]
pub(crate) enum Followed {
    /// Into it.
    Within,
    /// Exactly to its end.
    End,
    /// Past its end.
    Past,
    /// The framing is broken, or the bytes can't be read.
    Broken,
    /// The helper failed.
    Failed,
}

struct Walk<'a> {
    skb: Skb<'a>,
    decoder: Chunked,
    at: u64,
    len: u64,
    /// 0: goes on, 1: the body ends at `at`, 2: broken.
    end: u64,
}

/// Follows the framing through `len` bytes, from the decoder's state `bits` on, which becomes that behind them.
#[inline(always)]
pub(crate) fn follow(skb: Skb<'_>, len: u64, bits: &mut u64) -> Followed {
    let mut walk = Walk { skb, decoder: Chunked::from_bits(*bits), at: 0, len, end: 0 };
    if repeat(CHUNK_STEPS, chunk_step, &mut walk).is_err() {
        return Followed::Failed;
    }
    *bits = walk.decoder.to_bits();
    if walk.end == 2 || (walk.end == 0 && walk.at != walk.len) {
        return Followed::Broken;
    }
    match (walk.end == 1, walk.at == walk.len) {
        (false, _) => Followed::Within,
        (true, true) => Followed::End,
        (true, false) => Followed::Past,
    }
}

extern "C" fn chunk_step(_index: u32, walk: *mut Walk<'_>) -> i64 {
    // SAFETY: `bpf_loop` hands back the pointer that it was given.
    let walk = unsafe { &mut *walk };
    if walk.at >= walk.len {
        return 1;
    }
    let byte = if walk.decoder.data_left() != 0 {
        0
    } else {
        match walk.skb.byte(walk.at as u32) {
            Ok(byte) => byte,
            Err(_) => {
                walk.end = 2;
                return 1;
            }
        }
    };
    let step = decode(&raw mut walk.decoder, byte, walk.len - walk.at);
    walk.at += step >> 2;
    walk.end = step & 3;
    i64::from(walk.end != 0)
}

/// [`Chunked::step`]: how many bytes it took, and in the low bits what `Walk::end` becomes. A global function to the verifier, which
/// walks it once, for any arguments: 7.3 follows the loop through all states of the decoder otherwise, and gives up.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decode(decoder: *mut Chunked, byte: u8, available: u64) -> u64 {
    const BROKEN: u64 = 2;
    if decoder.is_null() {
        return BROKEN;
    }
    // SAFETY: the caller's pointer is valid; the verifier checks each access against the type's size.
    match unsafe { &mut *decoder }.step(byte, available) {
        ChunkStep::Consumed(taken) => taken << 2,
        ChunkStep::End(taken) => taken << 2 | 1,
        ChunkStep::Broken => BROKEN,
    }
}
