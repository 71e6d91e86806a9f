//! The kernel programs.
//!
//! | program | hook | job |
//! |---|---|---|
//! | [`programs::sock_ops`] | `sock_ops` | guard each connection that a protected endpoint accepts, from its first byte |
//! | [`programs::connect`] | `cgroup/connect4`, `connect6` | note who is calling |
//! | [`programs::judge`] | `sk_skb/stream_verdict` on the guarded sockets | pass, answer, or hand over each request |
//! | [`programs::gate`] | `cgroup_skb/ingress` | no bytes for sockets that should be guarded and are not; hold senders back |
//! | [`programs::inject`] | `sk_skb/stream_verdict` on the daemon's sockets | carry bytes from the daemon into a guarded socket |
//! | [`programs::shield`] | XDP on the policy's interfaces | drop floods before TCP sees them |
//!
//! Every decision that needs no kernel is in `enforcer-common`. Nothing in here passes bytes because of an error: the one
//! place that does so in enforce mode is `Outcome::Pass`, and only a known head whose grant lives leads to it.
#![expect(clippy::needless_pass_by_value, reason = "aya's macros hand contexts over by value")]
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod kernel;
mod maps;
mod programs;
mod tcp;

/// The kernel wants to know that helpers reserved for GPL programs may be used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The programs hold no panicking code; an endless loop would not pass the verifier if they did.
    loop {}
}

/// The crate is compiled for the host by clippy and rustdoc only.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
