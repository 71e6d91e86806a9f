//! `cgroup/connect4` and `cgroup/connect6` on the guarded cgroup, in the context of the process that calls: note who it is, and stop who may
//! not connect.
//!
//! Only what the daemon has found out beforehand stops anybody. Who is not known to it yet, or reaches the endpoint by another address, is judged
//! by its first request, which is unknown to the kernel as no other caller's is taken for it.

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    bpf_sock_addr, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_lookup_tcp, bpf_sk_release,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use enforcer_common::abi::{
    BAR_UIDS, Barred, Caller, Connecting, Counter, EndpointKey, FAMILY_V4, MODE_OBSERVE, PUNT_BARRED, Sealed,
    destination, is_loopback,
};
use enforcer_common::head::zero_words;

use super::charge;
use super::punt::{self, Event, Payload};
use super::sock_ops::{v4, v6};
use crate::kernel::{IPPROTO_TCP, config, count, now_ns};
use crate::maps::{BARRED, CONNECTING, ENDPOINTS};

const ALLOW: i32 = 1;
/// The process gets EPERM.
const DENY: i32 = 0;

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    connect::<false>(&ctx)
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    connect::<true>(&ctx)
}

#[inline(always)]
fn connect<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the verifier checks the context access.
    if unsafe { (*ctx.sock_addr).protocol } != IPPROTO_TCP {
        return ALLOW;
    }
    // SAFETY: the context is valid; the other helpers take none.
    let (cookie, netns_cookie, cgroup_id, pid, uid) = unsafe {
        (
            bpf_get_socket_cookie(ctx.as_ptr()),
            bpf_get_netns_cookie(ctx.as_ptr()),
            bpf_get_current_cgroup_id(),
            (bpf_get_current_pid_tgid() >> 32) as u32,
            bpf_get_current_uid_gid() as u32,
        )
    };
    let comm = bpf_get_current_comm().unwrap_or_default();
    let caller = Caller { cgroup_id, netns_cookie, connected_ns: now_ns(), pid, uid, comm };
    let endpoint_id = barred_from::<V6>(ctx, cgroup_id, uid);
    if endpoint_id != NOT_BARRED {
        count(Counter::ConnectRefused);
        tell(cookie, endpoint_id as u32, &caller);
        return DENY;
    }
    note(cookie, &caller);
    ALLOW
}

/// Notes a caller; one that can't be noted is an unknown one. (A function of its own, as its stack comes not on top of the others' then.)
#[inline(never)]
fn note(cookie: u64, caller: &Caller) {
    let _ = CONNECTING.insert(cookie, Sealed::new(Connecting { cookie, caller: *caller }), 0);
}

/// They may connect.
const NOT_BARRED: u64 = u64::MAX;

/// Number of the endpoint that these processes may not connect to, if the socket is about to. (As an `Option` it would come back half
/// undefined, which the verifier refuses.)
#[inline(never)]
fn barred_from<const V6: bool>(ctx: &SockAddrContext, cgroup_id: u64, uid: u32) -> u64 {
    match barred::<V6>(ctx, cgroup_id, uid) {
        Some(endpoint_id) => u64::from(endpoint_id),
        None => NOT_BARRED,
    }
}

#[inline(always)]
fn barred<const V6: bool>(ctx: &SockAddrContext, cgroup_id: u64, uid: u32) -> Option<u32> {
    let config = config()?;
    if config.mode == MODE_OBSERVE || config.draining != 0 {
        return None;
    }
    let target = destination(target::<V6>(ctx.sock_addr));
    // SAFETY: entries are only replaced as a whole, by the daemon.
    let (endpoint_id, exact) = match unsafe { ENDPOINTS.get(target) } {
        Some(endpoint) => (endpoint.endpoint_id, true),
        // SAFETY: as above.
        None => (unsafe { ENDPOINTS.get(target.wildcard()) }?.endpoint_id, false),
    };
    let key = Barred { cgroup_id, endpoint_id, zero: 0 };
    // SAFETY: a valid map value. One that is replaced at this moment may be another's, or half another's: one process too many, or too few, is
    // told by its first request.
    let bar = unsafe { BARRED.get(key) }?;
    let mut k = 0;
    while k < BAR_UIDS {
        if k < bar.uids_len as usize && bar.uids[k] == uid {
            return None;
        }
        k += 1;
    }
    // A wildcard is every address of this host, and of no other; a loopback address is one of each network namespace.
    let exact = exact && !is_loopback(&target);
    if bar.generation == config.generation && (exact || listens_here(ctx, &target)) {
        Some(endpoint_id)
    } else {
        None
    }
}

#[inline(always)]
fn target<const V6: bool>(ctx: *mut bpf_sock_addr) -> EndpointKey {
    // SAFETY: the verifier checks the context accesses.
    unsafe {
        let port = u16::from_be((*ctx).user_port as u16);
        if !V6 {
            v4((*ctx).user_ip4, port)
        } else {
            let addr = &raw const (*ctx).user_ip6;
            let word = |k: usize| addr.cast::<u32>().add(k).read_volatile();
            v6([word(0), word(1), word(2), word(3)], port)
        }
    }
}

/// Whether somebody listens at the socket's destination in its own network namespace.
#[inline(never)]
fn listens_here(ctx: &SockAddrContext, target: &EndpointKey) -> bool {
    const CURRENT_NETNS: u64 = -1_i64 as u64;
    let mut tuple = MaybeUninit::<[u64; 5]>::uninit();
    let tuple = tuple.as_mut_ptr();
    let port = target.port.to_be();
    let a = &target.addr;
    let word = |k: usize| u32::from_ne_bytes([a[k], a[k + 1], a[k + 2], a[k + 3]]);
    // SAFETY: the verifier checks the tuple's size, and that a socket is released. The tuple's words are written before all else.
    unsafe {
        zero_words::<5>(tuple.cast());
        let len = if target.family == FAMILY_V4 {
            let tuple = tuple.cast::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>();
            (*tuple).daddr = word(0);
            (*tuple).dport = port;
            size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>()
        } else {
            let tuple = tuple.cast::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>();
            (*tuple).daddr = [word(0), word(4), word(8), word(12)];
            (*tuple).dport = port;
            size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>()
        };
        let sock = bpf_sk_lookup_tcp(ctx.as_ptr(), tuple.cast(), len as u32, CURRENT_NETNS, 0);
        if sock.is_null() {
            return false;
        }
        bpf_sk_release(sock.cast());
        true
    }
}

/// Tells the daemon, now and then.
#[inline(never)]
fn tell(cookie: u64, endpoint_id: u32, caller: &Caller) {
    if charge::tells(caller.connected_ns) {
        punt::event(Event {
            kind: PUNT_BARRED,
            cookie,
            netns_cookie: caller.netns_cookie,
            endpoint_id,
            reason: Counter::ConnectRefused,
            interface: 0,
            payload: Payload::Caller(*caller),
        });
    }
}
