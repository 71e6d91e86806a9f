//! Servers that read past the judge.
//!
//! What comes before a connection is accepted lies in TCP's own queue, and is judged when the server first calls `recv`. `splice` and zero-copy receive take it from there unjudged. Such a server is found by what it has read: at the
//! next packet, at the next bytes, or at the end. The connection dies, and from then on the gate lets bytes come only to accepted
//! connections of that port, where they are judged as they come. Their clients repeat what came too early, which costs them a fifth of a
//! second: no measure for everybody.

use enforcer_common::abi::{Counter, FLOW_OBSERVE, Flow, PUNT_DEAD};
use enforcer_common::flow;

use super::punt::{self, Event, Payload};
use crate::kernel::{CtlCell, Skb, count, memory_barrier, now_ns};
use crate::maps::HOLD;
use crate::tcp;

/// Cuts off what the judge has seen already: segments may overlap, TCP leaves it to its readers to skip what they have, and its
/// `read_skb` doesn't. If bytes are missing, or the server is further than the judge, it has read bytes unjudged.
#[inline(never)]
pub(crate) fn align(skb: Skb<'_>, flow: &Flow) -> Result<(), Counter> {
    let Some(tcp) = skb.tcp() else { return Err(Counter::DeadHelper) };
    let repeated = flow.next_byte_seq.wrapping_sub(skb.first_byte_seq()) as i32;
    let ahead = tcp::copied_seq(tcp).wrapping_sub(flow.next_byte_seq) as i32;
    if repeated < 0 || ahead > 0 {
        hold(flow);
        return Err(Counter::DeadUnjudged);
    }
    if repeated == 0 {
        return Ok(());
    }
    count(Counter::OverlapCut);
    skb.cut_front(repeated as u32).map_err(|_| Counter::DeadHelper)
}

/// Whether the server has read bytes that were not judged. The end of the stream counts for one byte, and for one more each time that it is
/// read: so only while there are bytes which the judge has not seen.
#[inline(always)]
pub(crate) fn reads_past(tcp: *const u8, flow: &Flow) -> bool {
    let ahead = |between: fn()| {
        let read = tcp::copied_seq(tcp);
        between();
        // SAFETY: a field of a valid map value. The judge, on another CPU perhaps, moves it on before the bytes that it judged count as read.
        let judged = unsafe { (&raw const flow.next_byte_seq).read_volatile() };
        read.wrapping_sub(judged) as i32 > 0 && tcp::rcv_nxt(tcp).wrapping_sub(judged) as i32 > 1
    };
    // The barrier is for the one that is suspected, not for every packet.
    flow.flags & FLOW_OBSERVE == 0 && ahead(|| {}) && ahead(memory_barrier)
}

/// The flow is dead, and whatever listens on its port is held from here on; unless the record is another flow's by now.
#[inline(always)]
pub(crate) fn found_out(cookie: u64, flow: &mut Flow) {
    // SAFETY: a field of a valid map value.
    let ours = unsafe { (&raw const flow.cookie).read_volatile() } == cookie;
    if !ours || !flow::end(&CtlCell::new(&raw mut flow.ctl)) {
        return;
    }
    count(Counter::DeadUnjudged);
    hold(flow);
    punt::event(Event {
        kind: PUNT_DEAD,
        cookie,
        netns_cookie: flow.netns_cookie,
        endpoint_id: flow.endpoint_id,
        reason: Counter::DeadUnjudged,
        interface: flow.interface,
        payload: Payload::Nothing,
    });
}

/// Whatever listens on the flow's port is held from here on, unless nothing is refused on the flow.
#[inline(always)]
pub(crate) fn hold(flow: &Flow) {
    if flow.flags & FLOW_OBSERVE == 0 {
        let _ = HOLD.insert(flow.local.wildcard(), now_ns(), 0);
    }
}

/// Whether bytes must wait until the server has accepted the connection.
#[inline(always)]
pub(crate) fn is_held(flow: &Flow) -> bool {
    // SAFETY: only its presence counts.
    unsafe { HOLD.get(flow.local.wildcard()).is_some() }
}
