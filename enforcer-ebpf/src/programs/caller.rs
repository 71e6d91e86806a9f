//! Joins the two ends of a connection: what `connect` noted of the caller is published at the client's SYN, under what the server's end will
//! know of it too, and taken from there when that end is made.
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value, further copies of keys and values would be on the stack"
)]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock_ops;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::programs::SockOpsContext;
use enforcer_common::abi::{Counter, JoinKey, Joining, Origin, Sealed, is_joined};

use super::sock_ops::{local, peer};
use crate::kernel::{count, now_ns};
use crate::maps::{CALLERS, CONNECTING, FLOWS};
use crate::tcp;

/// The client's socket is about to send its SYN, in the process that calls `connect`, or that sends the first bytes. Also where nobody
/// noted who that is: what an earlier connection left under this key is not this one's.
#[inline(never)]
pub(super) fn publish(ctx: &SockOpsContext) {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let Some(client) = local(ctx) else { return };
    let Some(tcp) = tcp::of_sock_ops(ctx.as_ptr().cast()) else { return };
    let (initial_seq, _acknowledged) = tcp::sequences(tcp);
    let key = JoinKey { client, first_byte_seq: initial_seq.wrapping_add(1) };
    let _ = CALLERS.remove(&key);
    let Some(noted) = CONNECTING.get_ptr(cookie) else { return };
    // SAFETY: a valid map value, whoever's it is.
    let noted = unsafe { noted.read_volatile() };
    if !noted.is_whole() || noted.value.cookie != cookie {
        return;
    }
    let joining = Sealed::new(Joining { key, caller: noted.value.caller });
    let _ = CALLERS.insert(&key, &joining, 0);
    let _ = CONNECTING.remove(cookie);
}

/// Takes what was noted of a connection whose server's end is new, guarded or not, and writes it into the record if that is the flow's.
/// The judge, which runs under the same lock, comes later.
#[inline(never)]
pub(super) fn identify(ctx: &SockOpsContext) {
    // SAFETY: the verifier checks the context access.
    let first_byte_seq = unsafe { (*ctx.as_ptr().cast::<bpf_sock_ops>()).rcv_nxt };
    let key = JoinKey { client: peer(ctx), first_byte_seq };
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let Some(flow) = FLOWS.get_ptr_mut(cookie) else {
        let _ = CALLERS.remove(&key);
        return;
    };
    let counter = match CALLERS.get_ptr(&key) {
        // SAFETY: valid map values. The noted one is whoever's it is.
        Some(noted) => unsafe {
            let noted = noted.read_volatile();
            if noted.is_whole() && is_joined(&noted.value, &key, now_ns()) {
                (*flow).caller = noted.value.caller;
                (*flow).origin = Origin::new((*flow).endpoint_id, &(*flow).peer, &(*flow).caller);
                Counter::CallerJoined
            } else {
                Counter::CallerUnknown
            }
        },
        None => Counter::CallerUnknown,
    };
    let _ = CALLERS.remove(&key);
    count(counter);
}
