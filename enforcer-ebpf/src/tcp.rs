//! What the kernel knows of a TCP socket, read from its own structures.

use aya_ebpf::bindings::{__sk_buff, bpf_sock_ops};
use aya_ebpf::helpers::bpf_skc_to_tcp_sock;
use core::ffi::c_void;
use enforcer_common::abi::Flow;

/// Offsets in `struct tcp_sock`, set by the loader from the kernel's own type information.
#[unsafe(no_mangle)]
static TCP_WRITE_SEQ_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static TCP_SND_UNA_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static RECEIVE_QUEUE_LEN_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static SK_SOCKET_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static SOCKET_FILE_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static FILE_FLAGS_OFFSET: u32 = 0;

#[unsafe(no_mangle)]
static TCP_RCV_NXT_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static TCP_COPIED_SEQ_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static RECEIVE_BUFFER_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static LOW_WATER_OFFSET: u32 = 0;

#[unsafe(no_mangle)]
static SOCK_NET_OFFSET: u32 = 0;
#[unsafe(no_mangle)]
static NET_COOKIE_OFFSET: u32 = 0;

/// `O_NONBLOCK` in `struct file::f_flags`.
const O_NONBLOCK: u32 = 0o4000;

/// The kernel's record of an skb's TCP socket.
#[inline(always)]
pub(crate) fn of_skb(skb: *mut __sk_buff) -> Option<*const u8> {
    // SAFETY: the verifier checks the context access, and that the pointers are compared with null.
    unsafe {
        let sk = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        of(sk.cast())
    }
}

/// The kernel's record of the TCP socket that a `sock_ops` program is called for.
#[inline(always)]
pub(crate) fn of_sock_ops(ops: *mut bpf_sock_ops) -> Option<*const u8> {
    // SAFETY: the verifier checks the context access, and that the pointer is compared with null.
    let sk = unsafe { (*ops).__bindgen_anon_2.sk };
    if sk.is_null() { None } else { of(sk.cast()) }
}

/// The kernel's record of a socket, if it is one of TCP.
#[inline(always)]
fn of(sk: *mut c_void) -> Option<*const u8> {
    // SAFETY: the verifier checks that the pointer is a socket, and that the result is compared with null.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk).cast::<u8>() };
    if tcp.is_null() { None } else { Some(tcp) }
}

/// The server's next sequence number to write, and the oldest one that its client has not acknowledged.
#[inline(always)]
pub(crate) fn sequences(tcp: *const u8) -> (u32, u32) {
    // SAFETY: the offsets are constants to the verifier (the loader freezes them), which checks that they name 32-bit fields.
    unsafe { (number(tcp, &raw const TCP_WRITE_SEQ_OFFSET), number(tcp, &raw const TCP_SND_UNA_OFFSET)) }
}

/// Packets in TCP's own queue, behind the one that is being judged.
#[inline(always)]
pub(crate) fn queued_packets(tcp: *const u8) -> u32 {
    // SAFETY: as in `sequences`.
    unsafe { number(tcp, &raw const RECEIVE_QUEUE_LEN_OFFSET) }
}

/// Whether the server may block in `recv` on the socket; also where that can't be told.
///
/// An answer of the kernel wakes whoever reads the socket, and a blocking `recv` then fails with EAGAIN (see `Skb::swallow`). Few
/// servers survive that, and one that closes its socket takes the answer along.
#[inline(always)]
pub(crate) fn server_blocks(tcp: *const u8) -> bool {
    // SAFETY: as in `sequences`; the verifier follows the pointers by the kernel's type information.
    unsafe {
        let socket = field(tcp, &raw const SK_SOCKET_OFFSET);
        if socket.is_null() {
            return true;
        }
        let file = field(socket, &raw const SOCKET_FILE_OFFSET);
        if file.is_null() {
            return true;
        }
        number(file, &raw const FILE_FLAGS_OFFSET) & O_NONBLOCK == 0
    }
}

/// Sequence number of the next byte that the server reads, at most: what was dropped may not be counted.
#[inline(always)]
pub(crate) fn copied_seq(tcp: *const u8) -> u32 {
    // SAFETY: as in `sequences`.
    unsafe { number(tcp, &raw const TCP_COPIED_SEQ_OFFSET) }
}

/// Sequence number of the next byte that is to come.
#[inline(always)]
pub(crate) fn rcv_nxt(tcp: *const u8) -> u32 {
    // SAFETY: as in `sequences`.
    unsafe { number(tcp, &raw const TCP_RCV_NXT_OFFSET) }
}

/// Whether the server wants to hear of more than one byte at a time only (`SO_RCVLOWAT`).
#[inline(always)]
pub(crate) fn has_low_water(tcp: *const u8) -> bool {
    // SAFETY: as in `sequences`.
    unsafe { number(tcp, &raw const LOW_WATER_OFFSET) > 1 }
}

/// Whether the server has accepted the connection.
#[inline(always)]
pub(crate) fn is_accepted(tcp: *const u8) -> bool {
    // SAFETY: as in `sequences`.
    unsafe { !field(tcp, &raw const SK_SOCKET_OFFSET).is_null() }
}

/// Bytes that the server has not read yet, and the most that may wait. TCP alone keeps them below its receive buffer; bytes that
/// pass behind injected ones are not charged to it.
#[inline(always)]
pub(crate) fn unread_bytes(tcp: *const u8, flow: &Flow) -> (u32, u32) {
    let unread = rcv_nxt(tcp).wrapping_sub(copied_seq(tcp)).wrapping_sub(flow.swallowed_bytes);
    // A kernel that does count swallowed bytes as read makes the difference negative.
    let unread = if unread as i32 > 0 { unread } else { 0 };
    // SAFETY: as in `sequences`.
    let buffer_bytes = unsafe { number(tcp, &raw const RECEIVE_BUFFER_OFFSET) };
    (unread, buffer_bytes.saturating_mul(2))
}

/// Cookie of the network namespace of an skb's TCP socket, read where the kernel keeps it: `cgroup_skb` has no
/// `bpf_get_netns_cookie` on 6.1 ("unknown func bpf_get_netns_cookie#122"). 0 where it can't be told.
#[inline(always)]
pub(crate) fn netns_cookie(skb: *mut __sk_buff) -> u64 {
    let Some(tcp) = of_skb(skb) else { return 0 };
    // SAFETY: as in `sequences`; a socket's namespace lives as long as the socket.
    unsafe {
        let net = field(tcp, &raw const SOCK_NET_OFFSET);
        if net.is_null() {
            return 0;
        }
        net.add((&raw const NET_COOKIE_OFFSET).read_volatile() as usize).cast::<u64>().read_volatile()
    }
}

/// A pointer in a kernel structure.
///
/// # Safety
/// The structure has a pointer at that offset; the verifier checks it.
#[inline(always)]
unsafe fn field(structure: *const u8, offset: *const u32) -> *const u8 {
    // SAFETY: the caller's.
    unsafe { structure.add(offset.read_volatile() as usize).cast::<*const u8>().read_volatile() }
}

/// A 32-bit number in a kernel structure.
///
/// # Safety
/// As for [`field`].
#[inline(always)]
unsafe fn number(structure: *const u8, offset: *const u32) -> u32 {
    // SAFETY: the caller's.
    unsafe { structure.add(offset.read_volatile() as usize).cast::<u32>().read_volatile() }
}
