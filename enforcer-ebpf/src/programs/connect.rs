//! `cgroup/connect4` and `cgroup/connect6` on the guarded cgroup: note who is calling, in the context of the process that calls.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
    bpf_get_netns_cookie, bpf_get_socket_cookie,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use enforcer_common::abi::{Caller, Connecting, Sealed};

use crate::kernel::now_ns;
use crate::maps::CONNECTING;

const ALLOW: i32 = 1;
const IPPROTO_TCP: u32 = 6;

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    note(&ctx);
    ALLOW
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    note(&ctx);
    ALLOW
}

/// A caller that could not be noted is an unknown one.
#[inline(always)]
fn note(ctx: &SockAddrContext) {
    // SAFETY: the verifier checks the context access.
    if unsafe { (*ctx.sock_addr).protocol } != IPPROTO_TCP {
        return;
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
    let _ = CONNECTING.insert(cookie, Sealed::new(Connecting { cookie, caller }), 0);
}
