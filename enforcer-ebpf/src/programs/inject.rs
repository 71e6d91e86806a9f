//! `sk_skb/stream_verdict` on the daemon's sockets: carries bytes from the daemon into a guarded socket, and hands flows back.
//!
//! Bytes go only to a flow that the daemon owns in the epoch that it means. A hand-back is a datagram of its own: when it is
//! processed, all bytes sent before it are queued at the guarded socket already, so nothing can pass before them.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::bindings::sk_action::SK_DROP;
use aya_ebpf::helpers::bpf_skb_adjust_room;
use aya_ebpf::macros::stream_verdict;
use aya_ebpf::programs::SkBuffContext;
use enforcer_common::abi::{
    Counter, Handed, INJECT_HAND_BACK, INJECT_TO_CLIENT, INJECT_TO_SERVER, INJECT_TO_SINK, InjectHeader,
    grant_slot,
};
use enforcer_common::flow::{Ctl, hand_back, may_inject};

use super::{charge, use_grant};
use crate::kernel::{CtlCell, count};
use crate::maps::{FLOWS, SINK, SOCKETS};

#[stream_verdict]
fn inject(ctx: SkBuffContext) -> u32 {
    match ctx.load::<InjectHeader>(0) {
        Ok(header) => match header.kind {
            INJECT_TO_SERVER => carry(&ctx, &header, u64::from(BPF_F_INGRESS), Counter::Injected),
            INJECT_TO_CLIENT => carry(&ctx, &header, 0, Counter::Answered),
            INJECT_HAND_BACK => return_flow(&header),
            // The first bytes that go there break the sink's queue: its peer is shut down.
            // SAFETY: the context is valid.
            INJECT_TO_SINK => (unsafe { SINK.redirect_skb(&ctx, 0, 0) }) as u32,
            _ => failed(),
        },
        Err(_) => failed(),
    }
}

fn carry(ctx: &SkBuffContext, header: &InjectHeader, flags: u64, counter: Counter) -> u32 {
    let Some(flow) = FLOWS.get_ptr_mut(header.cookie) else { return failed() };
    // SAFETY: a valid map value, of which one word is read.
    let word = CtlCell::new(unsafe { &raw mut (*flow).ctl });
    if !may_inject(&word, Ctl(header.expected_ctl)) {
        return failed();
    }
    // SAFETY: the context is valid. This is no TCP skb, so its length may change.
    let removed =
        unsafe { bpf_skb_adjust_room(ctx.as_ptr().cast(), -(size_of::<InjectHeader>() as i32), 0, 0) };
    if removed != 0 {
        return failed();
    }
    // Before a byte can be read: the hand-back may be late, and the next request's come in its place.
    if header.grant_serial != 0 {
        use_grant(flow, header.grant_serial);
        // SAFETY: a valid map value, as below.
        if unsafe { (&raw const (*flow).cookie).read_volatile() } != header.cookie {
            // The flow is gone and its memory another one's, whose grants may be amiss now: it ends with any that is revoked.
            // SAFETY: as above.
            unsafe { (&raw mut (*flow).evicted_grants).write_volatile(u64::MAX) };
            return failed();
        }
        charge::hold_always(flow, grant_slot(header.grant_serial));
    }
    count(counter);
    let verdict = SOCKETS.redirect_skb(ctx, header.cookie, flags) as u32;
    if header.refusal != 0 && verdict != SK_DROP {
        // SAFETY: as above; nobody else counts while the flow is the daemon's.
        unsafe {
            let refusals = &raw mut (*flow).refusals;
            refusals.write_volatile(refusals.read_volatile().wrapping_add(1));
        }
    }
    verdict
}

fn return_flow(header: &InjectHeader) -> u32 {
    let Some(flow) = FLOWS.get_ptr_mut(header.cookie) else { return failed() };
    // SAFETY: a valid map value.
    let word = CtlCell::new(unsafe { &raw mut (*flow).ctl });
    // The daemon's datagrams come one after the other, so nobody else writes this; a judge reads it only behind the exchange.
    // SAFETY: as above.
    let fields = || unsafe {
        (&raw mut (*flow).handed).write_volatile(Handed {
            remaining_bytes: header.remaining_bytes,
            chunked: header.chunked,
            grant_serial: header.grant_serial,
            write_seq_mark: header.write_seq_mark,
            flags: header.flags,
        });
    };
    let done = hand_back(&word, Ctl(header.expected_ctl), Ctl(header.new_ctl), fields);
    count(if done { Counter::HandedBack } else { Counter::HandBackLate });
    SK_DROP
}

fn failed() -> u32 {
    count(Counter::InjectFailed);
    SK_DROP
}
