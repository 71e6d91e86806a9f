//! `sock_ops` on a cgroup: guards each connection that a protected endpoint accepts, before its first byte can be read, and knows who made
//! it where that was a process of the cgroup.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_NOEXIST, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG,
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    bpf_sock_ops,
};
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_hash_update, bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use enforcer_common::abi::{
    Counter, Endpoint, EndpointKey, FAMILY_V4, FAMILY_V6, FLOW_OBSERVE, FLOW_PUNTED_ONCE, Flow, MODE_OBSERVE,
    Origin, PUNT_CLOSED, PUNT_FENCED,
};
use enforcer_common::flow::{Ctl, State};

use super::hold;
use super::punt::{self, Event, Payload};
use super::{caller, charge, failing};
use crate::kernel::{CtlCell, config, count, now_ns};
use crate::maps::{ENDPOINTS, FLOWS, SOCKETS};
use crate::tcp;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// A new flow's record, too large for the stack.
static BLANK: Flow = Flow::BLANK;

#[sock_ops]
fn tag_flow(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => caller::publish(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            established(&ctx);
            caller::identify(&ctx);
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => closed(&ctx),
        // A client that gets an answer and acknowledges nothing.
        BPF_SOCK_OPS_RTO_CB => find_out(&ctx),
        _ => {}
    }
    1
}

/// A function of its own: what it keeps on the stack comes not on top of what the others do.
#[inline(never)]
fn established(ctx: &SockOpsContext) {
    let Some(local) = local(ctx) else { return };
    // A copy: whoever replaces the entry replaces it as a whole.
    let Some(&endpoint) = endpoint(local) else { return };
    let Some(config) = config() else { return };
    let observe = config.mode == MODE_OBSERVE;
    if config.draining != 0 {
        return;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the context is valid.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let interface = interface(ctx);
    // Without a record the socket is guarded all the same: the judge drops what it has no record for.
    let blank: &Flow = &BLANK;
    if FLOWS.insert(cookie, blank, 0).is_err() {
        count(Counter::FlowTableFull);
        if observe {
            return;
        }
    }
    if let Some(flow) = FLOWS.get_ptr_mut(cookie) {
        // SAFETY: a valid map value. Until the state is written, which is the last thing, it lets nothing through.
        unsafe {
            (*flow).netns_cookie = netns_cookie;
            (*flow).opened_ns = now_ns();
            (*flow).local = local;
            (*flow).peer = peer(ctx);
            (*flow).endpoint_id = endpoint.endpoint_id;
            (*flow).unavailable_reply_id = endpoint.unavailable_reply_id;
            (*flow).flags = if observe { FLOW_OBSERVE } else { 0 };
            (*flow).interface = interface;
            (*flow).next_byte_seq = (*ctx.as_ptr().cast::<bpf_sock_ops>()).rcv_nxt;
            (*flow).cookie = cookie;
            (*flow).origin = Origin::new(endpoint.endpoint_id, &(*flow).peer, &(*flow).caller);
            // Seen by another CPU that still holds the memory's last flow, the word is none that it knows.
            CtlCell::new(&raw mut (*flow).ctl).store(Ctl::new(State::Head, cookie as u32, 0));
        }
    }
    let mut key = cookie;
    // SAFETY: the context is valid, the key is a word.
    let result = unsafe {
        bpf_sock_hash_update(
            ctx.as_ptr().cast(),
            (&raw const SOCKETS).cast_mut().cast(),
            (&raw mut key).cast(),
            u64::from(BPF_NOEXIST),
        )
    };
    if result != 0 {
        // It can't be guarded (it speaks MPTCP, say), so it must not talk: the gate drops whatever comes for a dead flow, and the
        // daemon destroys the socket. Where nothing is refused, it is left alone.
        count(Counter::SocketFenced);
        if observe {
            let _ = FLOWS.remove(cookie);
            return;
        }
        if let Some(flow) = FLOWS.get_ptr_mut(cookie) {
            // SAFETY: a valid map value; no program but this one has seen it yet.
            CtlCell::new(unsafe { &raw mut (*flow).ctl }).store(Ctl::new(State::Dead, 0, 0));
        }
        punt::event(Event {
            kind: PUNT_FENCED,
            cookie,
            netns_cookie,
            endpoint_id: endpoint.endpoint_id,
            reason: Counter::SocketFenced,
            interface,
            payload: Payload::Nothing,
        });
    }
    // SAFETY: the context is valid.
    unsafe {
        let flags = (*ctx.as_ptr().cast::<bpf_sock_ops>()).bpf_sock_ops_cb_flags;
        let wanted = BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;
        bpf_sock_ops_cb_flags_set(ctx.as_ptr().cast(), (flags | wanted) as i32);
    }
    count(Counter::FlowTagged);
}

/// Interface that the socket is bound to; 0: none.
#[inline(always)]
fn interface(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the verifier checks the context access, and that the pointer is compared with null.
    unsafe {
        let sk = (*ctx.as_ptr().cast::<bpf_sock_ops>()).__bindgen_anon_2.sk;
        if sk.is_null() { 0 } else { (*sk).bound_dev_if }
    }
}

/// Looks whether the server has read what was not judged.
fn find_out(ctx: &SockOpsContext) {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let Some(flow) = FLOWS.get_ptr_mut(cookie) else { return };
    let Some(tcp) = tcp::of_sock_ops(ctx.as_ptr().cast()) else { return };
    // SAFETY: a valid map value, which only this program removes.
    let flow = unsafe { &mut *flow };
    if hold::reads_past(tcp, flow) {
        hold::found_out(cookie, flow);
    }
}

fn closed(ctx: &SockOpsContext) {
    find_out(ctx);
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is read while the map holds it; only this callback removes it.
    let Some(flow) = (unsafe { FLOWS.get(cookie) }) else { return };
    let (flags, netns_cookie, endpoint_id) = (flow.flags, flow.netns_cookie, flow.endpoint_id);
    let interface = flow.interface;
    let flow = core::ptr::from_ref(flow).cast_mut();
    failing::note(flow);
    charge::let_go(flow);
    let _ = FLOWS.remove(cookie);
    count(Counter::FlowClosed);
    if flags & FLOW_PUNTED_ONCE != 0 {
        punt::event(Event {
            kind: PUNT_CLOSED,
            cookie,
            netns_cookie,
            endpoint_id,
            reason: Counter::FlowClosed,
            interface,
            payload: Payload::Nothing,
        });
    }
}

#[inline(always)]
pub(crate) fn endpoint(local: EndpointKey) -> Option<&'static Endpoint> {
    // SAFETY: entries are only replaced as a whole, by the daemon.
    unsafe { ENDPOINTS.get(local).or_else(|| ENDPOINTS.get(local.wildcard())) }
}

#[inline(always)]
pub(super) fn local(ctx: &SockOpsContext) -> Option<EndpointKey> {
    let port = ctx.local_port() as u16;
    match ctx.family() {
        AF_INET => Some(v4(ctx.local_ip4(), port)),
        AF_INET6 => Some(v6(ctx.local_ip6(), port)),
        _ => None,
    }
}

#[inline(always)]
pub(super) fn peer(ctx: &SockOpsContext) -> EndpointKey {
    // The port is in network order, in the upper half of a word that is in network order too.
    let port = u32::from_be(ctx.remote_port()) as u16;
    if ctx.family() == AF_INET { v4(ctx.remote_ip4(), port) } else { v6(ctx.remote_ip6(), port) }
}

#[inline(always)]
pub(crate) fn v4(addr: u32, port: u16) -> EndpointKey {
    let mut key = EndpointKey { addr: [0; 16], port, family: FAMILY_V4, zero: 0 };
    let bytes = addr.to_ne_bytes();
    key.addr[0] = bytes[0];
    key.addr[1] = bytes[1];
    key.addr[2] = bytes[2];
    key.addr[3] = bytes[3];
    key
}

/// A v4-mapped address is an IPv4 address: a server that listens on `::` speaks both.
#[inline(always)]
pub(crate) fn v6(addr: [u32; 4], port: u16) -> EndpointKey {
    if addr[0] == 0 && addr[1] == 0 && addr[2] == 0xffff_u32.to_be() {
        return v4(addr[3], port);
    }
    let mut key = EndpointKey { addr: [0; 16], port, family: FAMILY_V6, zero: 0 };
    let mut k = 0;
    while k < 4 {
        let bytes = addr[k].to_ne_bytes();
        key.addr[k * 4] = bytes[0];
        key.addr[k * 4 + 1] = bytes[1];
        key.addr[k * 4 + 2] = bytes[2];
        key.addr[k * 4 + 3] = bytes[3];
        k += 1;
    }
    key
}
