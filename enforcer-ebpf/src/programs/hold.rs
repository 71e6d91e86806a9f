//! Servers that read past the judge.
//!
//! What comes before a connection is accepted lies in TCP's own queue, and is judged when the server first calls `recv`. `splice`
//! and zero-copy receive take it from there unjudged. Such a server is found by what it has read before anything was judged; from
//! then on the gate lets bytes come only to its accepted connections, where they are judged as they come. Their clients repeat
//! what came too early, which costs them a fifth of a second: no measure for everybody.

use enforcer_common::abi::{Counter, FLOW_OBSERVE, Flow, PUNT_DEAD};
use enforcer_common::flow::{self, Ctl, State};

use super::punt::{self, Event};
use crate::kernel::{CtlCell, copied_seq, count, now_ns, observed};
use crate::maps::HOLD;

/// Whether the server has read bytes before one was judged. (An end of the stream counts for one byte.)
#[inline(always)]
pub(crate) fn reads_past(tcp: *const u8, flow: &Flow) -> bool {
    // First: the judge, on another CPU perhaps, writes the record before the bytes that it judged count as read.
    let read = copied_seq(tcp).wrapping_sub(flow.next_byte_seq);
    // SAFETY: fields of a valid map value. Volatile, and so after the read above.
    let (requests, punts, ctl) = unsafe {
        (
            (&raw const flow.requests).read_volatile(),
            (&raw const flow.punts).read_volatile(),
            (&raw const flow.ctl).read_volatile(),
        )
    };
    if requests != 0 || punts != 0 || flow.flags & FLOW_OBSERVE != 0 {
        return false;
    }
    if !matches!(Ctl(ctl).state(), HEAD) {
        return false;
    }
    read > 1 && (read as i32) > 0
}

const HEAD: u64 = State::Head as u64;

/// The flow is dead, and whatever listens on its port is held from here on; unless the record is another flow's by now.
#[inline(always)]
pub(crate) fn found_out(cookie: u64, flow: &mut Flow) {
    // SAFETY: a field of a valid map value.
    let ours = unsafe { (&raw const flow.cookie).read_volatile() } == cookie;
    if !ours || !flow::end(&CtlCell::new(&raw mut flow.ctl), State::Head) {
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
        ends: None,
    });
}

/// Whatever listens on the flow's port is held from here on, unless nothing is refused there.
#[inline(always)]
pub(crate) fn hold(flow: &Flow) {
    if !observed(flow) {
        let _ = HOLD.insert(flow.local.wildcard(), now_ns(), 0);
    }
}

/// Whether bytes must wait until the server has accepted the connection.
#[inline(always)]
pub(crate) fn is_held(flow: &Flow) -> bool {
    // SAFETY: only its presence counts.
    unsafe { HOLD.get(flow.local.wildcard()).is_some() }
}
