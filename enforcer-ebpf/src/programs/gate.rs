//! `cgroup_skb/ingress` on the guarded cgroup: the second line. It sees each packet before TCP has acknowledged it, so what it drops
//! is repeated by its sender, or never accepted.
//!
//! - Bytes for a protected endpoint reach only sockets that are guarded. One that is not, because it was accepted before the
//!   programs were attached or could not be put into the socket map, gets none, and the daemon destroys it at its first packet,
//!   with bytes or without. Bytes in a SYN, or in the packet that ends the handshake, wait for the next packet.
//! - A SYN that asks for MPTCP is dropped where the server would agree: MPTCP connections can't be guarded, and the client tries
//!   again without.
//! - Datagrams for a protected endpoint are dropped: HTTP/3 would lead around the judge.
//! - A packet that is marked urgent is dropped: TCP would take its byte out of the stream, past the judge, and HTTP has no use for it.
//! - A server that was seen to read past the judge gets no bytes before it accepts: see `hold.rs`.
//! - A server that wants to be woken for many bytes only (`SO_RCVLOWAT`) gets none: until then TCP would keep them where the judge does not
//!   see them, and other calls than `recv` do.
//! - The sender of a flow that the daemon owns is held back while the ring buffer fills, because dropped skbs leave its window open.
//! - Refusals that the client has got, whose next packet this is, are counted against its source: see `failing.rs`.
//! - A server that does not read can't make the kernel queue without bound.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_RB_AVAIL_DATA, bpf_sock};
use aya_ebpf::helpers::{
    bpf_get_socket_cookie, bpf_ringbuf_query, bpf_sk_fullsock, bpf_skb_load_bytes, bpf_skc_to_mptcp_sock,
};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use core::ffi::c_void;
use enforcer_common::abi::{
    Counter, EndpointKey, Ends, FLOW_OBSERVE, Flow, MODE_OBSERVE, PUNT_STRAY, PUNTS_BRAKE_BYTES,
};
use enforcer_common::flow::{Ctl, State};

use super::failing;
use super::hold;
use super::punt::{self, Event, Payload};
use super::sock_ops::{endpoint, v4, v6};
use crate::kernel::{IPPROTO_TCP, config, count};
use crate::maps::{FLOWS, PUNTS};
use crate::tcp;

const PASS: i32 = 1;
const DROP: i32 = 0;
const IPPROTO_UDP: u32 = 17;
const TCP_SYN_RECV: u32 = 3;
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;

#[cgroup_skb(ingress)]
fn gate(ctx: SkBuffContext) -> i32 {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let stop = match FLOWS.get_ptr_mut(cookie) {
        // SAFETY: a valid map value, while the program runs.
        Some(flow) => {
            failing::note(flow);
            // SAFETY: as above.
            guarded(&ctx, cookie, unsafe { &mut *flow })
        }
        None => unguarded(&ctx),
    };
    let Some(counter) = stop else { return PASS };
    if matches!(counter, Counter::GateDatagram | Counter::GateMptcp | Counter::GateUrgent) {
        count(counter);
        return DROP;
    }
    if matches!(counter, Counter::GateStray) {
        report(&ctx, cookie);
    }
    if has_payload(&ctx) {
        count(counter);
        DROP
    } else {
        PASS
    }
}

/// Why a guarded flow's bytes must wait, if they must.
#[inline(always)]
fn guarded(ctx: &SkBuffContext, cookie: u64, flow: &mut Flow) -> Option<Counter> {
    const HEAD: u64 = State::Head as u64;
    const DEAD: u64 = State::Dead as u64;
    const PUNTED: u64 = State::Punted as u64;
    const BODY: u64 = State::Body as u64;
    const CHUNKED: u64 = State::Chunked as u64;
    const OPAQUE: u64 = State::Opaque as u64;
    let state = Ctl(flow.ctl).state();
    if flow.flags & FLOW_OBSERVE != 0 {
        if config().is_some_and(|config| config.mode == MODE_OBSERVE) {
            return None;
        }
        // What passed only because the policy observed, and is in the middle of it, must not outlive that policy.
        if state == OPAQUE || state == DEAD || state == PUNTED {
            return Some(Counter::GateDead);
        }
    }
    if state == DEAD {
        return Some(Counter::GateDead);
    }
    if is_urgent(ctx) {
        return Some(Counter::GateUrgent);
    }
    let tcp = tcp::of_skb(ctx.as_ptr().cast())?;
    if hold::reads_past(tcp, flow) {
        hold::found_out(cookie, flow);
        return Some(Counter::GateDead);
    }
    if tcp::has_low_water(tcp) {
        return Some(Counter::GateLowWater);
    }
    if state == HEAD && flow.requests == 0 && !tcp::is_accepted(tcp) && hold::is_held(flow) {
        return Some(Counter::GateHeld);
    }
    if state == PUNTED {
        // SAFETY: the map is a ring buffer.
        let waiting =
            unsafe { bpf_ringbuf_query((&raw const PUNTS).cast_mut().cast(), u64::from(BPF_RB_AVAIL_DATA)) };
        if waiting > PUNTS_BRAKE_BYTES {
            return Some(Counter::GateRing);
        }
    }
    if state == PUNTED || state == BODY || state == CHUNKED {
        let (unread, limit) = tcp::unread_bytes(tcp, flow);
        return if unread > limit { Some(Counter::GateUnread) } else { None };
    }
    None
}

/// Why a packet for a socket without a flow record must not arrive, if it is for a protected endpoint.
#[inline(always)]
fn unguarded(ctx: &SkBuffContext) -> Option<Counter> {
    let target = target(ctx)?;
    endpoint(target.local)?;
    let config = config()?;
    if config.draining != 0 || config.mode == MODE_OBSERVE {
        None
    } else if target.protocol == IPPROTO_UDP {
        // One that is connected has chosen its peer itself: the resolver of a process whose port happens to be the same, say. A
        // server hears of a new peer on one that is not.
        if target.peer.port == 0 { Some(Counter::GateDatagram) } else { None }
    } else if target.is_mptcp_listener && asks_for_mptcp(ctx) {
        Some(Counter::GateMptcp)
    } else if is_urgent(ctx) {
        Some(Counter::GateUrgent)
    } else {
        Some(Counter::GateStray)
    }
}

/// The socket that a packet is for.
struct Target {
    local: EndpointKey,
    /// Its port is 0 for a socket that is not connected.
    peer: EndpointKey,
    protocol: u32,
    state: u32,
    is_mptcp_listener: bool,
}

#[inline(always)]
fn target(ctx: &SkBuffContext) -> Option<Target> {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: the verifier checks the accesses, and that the pointers are compared with null.
    unsafe {
        let sk: *mut bpf_sock = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        let sk = bpf_sk_fullsock(sk);
        if sk.is_null() {
            return None;
        }
        let protocol = (*sk).protocol;
        if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
            return None;
        }
        let local_port = (*sk).src_port as u16;
        let state = (*sk).state;
        let peer_port = u16::from_be((*sk).dst_port);
        let is_mptcp_listener = protocol == IPPROTO_TCP
            && state == TCP_LISTEN
            && !bpf_skc_to_mptcp_sock(sk.cast::<c_void>()).is_null();
        // The packet's own addresses, at the IP header's start: a listener on a wildcard address has none of its own.
        let first: u8 = ctx.load(0).ok()?;
        let (local, peer) = match first >> 4 {
            4 => (v4(ctx.load(16).ok()?, local_port), v4(ctx.load(12).ok()?, peer_port)),
            6 => (v6(ctx.load(24).ok()?, local_port), v6(ctx.load(8).ok()?, peer_port)),
            _ => return None,
        };
        Some(Target { local, peer, protocol, state, is_mptcp_listener })
    }
}

/// Offset of the TCP header in a packet that starts with its IP header; nothing where that can't be told.
#[inline(always)]
fn tcp_offset(ctx: &SkBuffContext) -> Option<u32> {
    let first: u8 = ctx.load(0).ok()?;
    match first >> 4 {
        4 => Some(u32::from(first & 0xf) * 4),
        6 => match ctx.load::<u8>(6) {
            Ok(next) if u32::from(next) == IPPROTO_TCP => Some(40),
            _ => None,
        },
        _ => None,
    }
}

#[inline(always)]
fn byte(ctx: &SkBuffContext, offset: u32) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: one byte into one byte.
    let result = unsafe { bpf_skb_load_bytes(ctx.as_ptr().cast(), offset, (&raw mut byte).cast(), 1) };
    if result == 0 { Some(byte) } else { None }
}

/// Whether a TCP packet has an option of MPTCP. One whose options can't be read passes: without bytes it harms nobody, and a
/// connection that becomes MPTCP all the same is fenced.
#[inline(always)]
fn asks_for_mptcp(ctx: &SkBuffContext) -> bool {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const MPTCP: u8 = 30;
    let Some(tcp) = tcp_offset(ctx) else { return false };
    let Some(length) = byte(ctx, tcp + 12) else { return false };
    let end = tcp + u32::from(length >> 4) * 4;
    let mut at = tcp + 20;
    let mut step = 0;
    // There are at most 40 bytes of options.
    while step < 40 {
        step += 1;
        if at >= end {
            return false;
        }
        match byte(ctx, at) {
            Some(NO_OPERATION) => at += 1,
            Some(MPTCP) => return true,
            None | Some(END) => return false,
            Some(_) => match byte(ctx, at + 1) {
                Some(length) if length >= 2 => at += u32::from(length),
                _ => return false,
            },
        }
    }
    false
}

/// Whether a TCP packet is marked urgent; also where that can't be told.
#[inline(always)]
fn is_urgent(ctx: &SkBuffContext) -> bool {
    const URG: u8 = 0x20;
    let flags = match tcp_offset(ctx) {
        Some(tcp) => byte(ctx, tcp + 13),
        None => None,
    };
    flags.is_none_or(|flags| flags & URG != 0)
}

/// Whether a TCP packet carries bytes; also where that can't be told. The context starts at the IP header.
#[inline(always)]
fn has_payload(ctx: &SkBuffContext) -> bool {
    let Some(tcp) = tcp_offset(ctx) else { return true };
    match byte(ctx, tcp + 12) {
        Some(offset) => ctx.len() > tcp + u32::from(offset >> 4) * 4,
        None => true,
    }
}

/// Asks the daemon to destroy a connection that should be guarded and is not. A listener is no connection, and one whose handshake ends at
/// this moment is about to be guarded.
#[inline(never)]
fn report(ctx: &SkBuffContext, cookie: u64) {
    let Some(Target { local, peer, state, .. }) = target(ctx) else { return };
    if state == TCP_LISTEN || state == TCP_SYN_RECV || state == TCP_NEW_SYN_RECV {
        return;
    }
    punt::event(Event {
        kind: PUNT_STRAY,
        cookie,
        netns_cookie: tcp::netns_cookie(ctx.as_ptr().cast()),
        endpoint_id: 0,
        reason: Counter::GateStray,
        interface: 0,
        payload: Payload::Ends(Ends { local, peer }),
    });
}
