//! `cgroup_skb/ingress` on the guarded cgroup: the second line. It sees each packet before TCP has acknowledged it, so what it drops
//! is repeated by its sender, or never accepted.
//!
//! - Bytes for a protected endpoint reach only sockets that are guarded. One that is not, because it was accepted before the
//!   programs were attached or could not be put into the socket map, gets none, and the daemon destroys it. Bytes in a SYN, or
//!   in the packet that ends the handshake, wait for the next packet.
//! - The sender of a flow that the daemon owns is held back while the ring buffer fills, because dropped skbs leave its window open.
//! - A server that does not read can't make the kernel queue without bound.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_RB_AVAIL_DATA, bpf_sock};
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_ringbuf_query, bpf_sk_fullsock, bpf_skb_load_bytes};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use enforcer_common::abi::{
    Counter, EndpointKey, Ends, FLOW_OBSERVE, Flow, MODE_OBSERVE, PUNT_STRAY, PUNTS_BRAKE_BYTES,
};
use enforcer_common::flow::{Ctl, State};

use super::punt::{self, Event};
use super::sock_ops::{endpoint, v4, v6};
use crate::kernel::{config, count, netns_cookie, unread_bytes};
use crate::maps::{FLOWS, PUNTS};

const PASS: i32 = 1;
const DROP: i32 = 0;
const IPPROTO_TCP: u32 = 6;
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;

#[cgroup_skb(ingress)]
fn gate(ctx: SkBuffContext) -> i32 {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is read while the map holds it.
    let stop = match unsafe { FLOWS.get(cookie) } {
        Some(flow) => guarded(&ctx, flow),
        None => unguarded(&ctx),
    };
    match stop {
        Some(counter) if has_payload(&ctx) => {
            count(counter);
            if matches!(counter, Counter::GateStray) {
                report(&ctx, cookie);
            }
            DROP
        }
        _ => PASS,
    }
}

/// Why a guarded flow's bytes must wait, if they must.
#[inline(always)]
fn guarded(ctx: &SkBuffContext, flow: &Flow) -> Option<Counter> {
    const DEAD: u64 = State::Dead as u64;
    const PUNTED: u64 = State::Punted as u64;
    const BODY: u64 = State::Body as u64;
    const CHUNKED: u64 = State::Chunked as u64;
    if flow.flags & FLOW_OBSERVE != 0 {
        return None;
    }
    let state = Ctl(flow.ctl).state();
    if state == DEAD {
        return Some(Counter::GateDead);
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
        return match unread_bytes(ctx.as_ptr().cast(), flow) {
            Some((unread, limit)) if unread > limit => Some(Counter::GateUnread),
            _ => None,
        };
    }
    None
}

/// Whether a socket without a flow record should have one.
#[inline(always)]
fn unguarded(ctx: &SkBuffContext) -> Option<Counter> {
    let (local, _, _) = ends(ctx)?;
    endpoint(local)?;
    let config = config()?;
    if config.draining != 0 || config.mode == MODE_OBSERVE { None } else { Some(Counter::GateStray) }
}

/// Local end, remote end and state of the packet's TCP socket.
#[inline(always)]
fn ends(ctx: &SkBuffContext) -> Option<(EndpointKey, EndpointKey, u32)> {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: the verifier checks the accesses, and that the pointers are compared with null.
    unsafe {
        let sk: *mut bpf_sock = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        let sk = bpf_sk_fullsock(sk);
        if sk.is_null() || (*sk).protocol != IPPROTO_TCP {
            return None;
        }
        let local_port = (*sk).src_port as u16;
        let state = (*sk).state;
        let peer_port = u16::from_be((*sk).dst_port);
        // The packet's own addresses, at the IP header's start: a listener on a wildcard address has none of its own.
        let first: u8 = ctx.load(0).ok()?;
        match first >> 4 {
            4 => Some((v4(ctx.load(16).ok()?, local_port), v4(ctx.load(12).ok()?, peer_port), state)),
            6 => Some((v6(ctx.load(24).ok()?, local_port), v6(ctx.load(8).ok()?, peer_port), state)),
            _ => None,
        }
    }
}

/// Whether a TCP packet carries bytes; also where that can't be told. The context starts at the IP header.
#[inline(always)]
fn has_payload(ctx: &SkBuffContext) -> bool {
    let Ok(first) = ctx.load::<u8>(0) else { return true };
    let ip = match first >> 4 {
        4 => u32::from(first & 0xf) * 4,
        6 => match ctx.load::<u8>(6) {
            Ok(next) if u32::from(next) == IPPROTO_TCP => 40,
            _ => return true,
        },
        _ => return true,
    };
    let mut offset = 0_u8;
    // SAFETY: one byte into one byte.
    let result = unsafe { bpf_skb_load_bytes(ctx.as_ptr().cast(), ip + 12, (&raw mut offset).cast(), 1) };
    if result != 0 {
        return true;
    }
    ctx.len() > ip + u32::from(offset >> 4) * 4
}

/// Asks the daemon to destroy a connection that should be guarded and is not. A listener is no connection.
#[inline(always)]
fn report(ctx: &SkBuffContext, cookie: u64) {
    let Some((local, peer, state)) = ends(ctx) else { return };
    if state == TCP_LISTEN || state == TCP_NEW_SYN_RECV {
        return;
    }
    punt::event(Event {
        kind: PUNT_STRAY,
        cookie,
        netns_cookie: netns_cookie(ctx.as_ptr().cast()),
        endpoint_id: 0,
        reason: Counter::GateStray,
        interface: 0,
        ends: Some(Ends { local, peer }),
    });
}
