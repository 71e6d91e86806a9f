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
    match walk.decoder.step(byte, walk.len - walk.at) {
        ChunkStep::Consumed(taken) => {
            walk.at += taken;
            0
        }
        ChunkStep::End(taken) => {
            walk.at += taken;
            walk.end = 1;
            1
        }
        ChunkStep::Broken => {
            walk.end = 2;
            1
        }
    }
}
