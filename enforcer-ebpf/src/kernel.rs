//! The kernel's helpers, as far as the programs need them, with results that must be looked at.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::sk_action::SK_DROP;
use aya_ebpf::helpers::{
    bpf_get_socket_cookie, bpf_ktime_get_boot_ns, bpf_loop, bpf_sk_redirect_map, bpf_skb_adjust_room,
    bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::programs::SkBuffContext;
use core::ffi::c_void;
use enforcer_common::abi::{Config, Counter, FLOW_OBSERVE, Flow, MODE_OBSERVE};
use enforcer_common::flow::{Ctl, CtlWord};

use crate::maps::{CONFIG, COUNTERS, SINK};
use crate::tcp;

/// TCP's protocol number.
pub(crate) const IPPROTO_TCP: u32 = 6;

/// A helper failed.
pub(crate) struct Failed;

/// Adds one to a counter.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the kernel gave a pointer to this CPU's value. An interruption between load and store can lose one count.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}

/// `CLOCK_BOOTTIME`, in nanoseconds.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Whether nothing on the flow is refused: it began so, and the policy in force still wants it.
#[inline(always)]
pub(crate) fn observed(flow: &Flow) -> bool {
    flow.flags & FLOW_OBSERVE != 0 && config().is_some_and(|config| config.mode == MODE_OBSERVE)
}

/// A flow's control word, read and written as a whole.
pub(crate) struct CtlCell(*mut u64);

impl CtlCell {
    #[inline(always)]
    pub(crate) fn new(word: *mut u64) -> Self {
        Self(word)
    }

    #[inline(always)]
    pub(crate) fn store(&self, ctl: Ctl) {
        // SAFETY: as in `load`.
        unsafe { self.0.write_volatile(ctl.0) }
    }
}

impl CtlWord for CtlCell {
    #[inline(always)]
    fn load(&self) -> Ctl {
        // SAFETY: an aligned word in a map value, changed by whole-word accesses only.
        Ctl(unsafe { self.0.read_volatile() })
    }

    #[inline(always)]
    fn replace(&self, old: Ctl, new: Ctl) -> bool {
        // SAFETY: as in `load`.
        unsafe { compare_exchange(self.0, old.0, new.0) == old.0 }
    }
}

// Rust has no compare-and-swap for this target (`target_has_atomic` is unset), the instruction set does (since v3).

/// Writes `new` if the word is `old`; gives what it was.
///
/// # Safety
/// `word` is valid and aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
    let found;
    // SAFETY: the caller's. Clobbers nothing but `r0`, which it gives.
    unsafe {
        core::arch::asm!("r0 = cmpxchg_64({word} + 0, r0, {new})", word = in(reg) word, new = in(reg) new, inout("r0") old => found);
    }
    found
}

/// Adds to a word, wrapping.
///
/// # Safety
/// `word` is valid and aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) unsafe fn add(word: *mut u64, summand: u64) {
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("lock *(u64 *)({word} + 0) += {summand}", word = in(reg) word, summand = in(reg) summand);
    }
}

/// Writes `new`; gives what the word was.
///
/// # Safety
/// `word` is valid and aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) unsafe fn exchange(word: *mut u64, new: u64) -> u64 {
    let found;
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("{value} = xchg_64({word} + 0, {value})", word = in(reg) word, value = inout(reg) new => found);
    }
    found
}

/// Keeps the machine from reading what follows before what precedes.
#[inline(always)]
pub(crate) fn memory_barrier() {
    let mut word = 0;
    // SAFETY: a word of our own. An exchange that gives the old value is a full barrier.
    let _ = unsafe { exchange(&raw mut word, 1) };
}

#[cfg(not(target_arch = "bpf"))]
pub(crate) unsafe fn add(_word: *mut u64, _summand: u64) {
    unreachable!("compiled for lints only")
}

#[cfg(not(target_arch = "bpf"))]
pub(crate) unsafe fn compare_exchange(_word: *mut u64, _old: u64, _new: u64) -> u64 {
    unreachable!("compiled for lints only")
}

#[cfg(not(target_arch = "bpf"))]
pub(crate) unsafe fn exchange(_word: *mut u64, _new: u64) -> u64 {
    unreachable!("compiled for lints only")
}

/// The bytes in front of a `stream_verdict` program.
#[derive(Clone, Copy)]
pub(crate) struct Skb<'a> {
    pub(crate) ctx: &'a SkBuffContext,
}

impl Skb<'_> {
    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.ctx.as_ptr().cast()
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        self.ctx.len()
    }

    /// The kernel's record of the socket that the bytes came in on.
    #[inline(always)]
    pub(crate) fn tcp(&self) -> Option<*const u8> {
        tcp::of_skb(self.raw())
    }

    /// TCP's sequence number of the first byte. TCP keeps it where a verdict program finds `cb` (`struct tcp_skb_cb`, `struct
    /// sk_skb_cb`); were it elsewhere, no byte would pass.
    #[inline(always)]
    pub(crate) fn first_byte_seq(&self) -> u32 {
        // SAFETY: the verifier checks the context access.
        unsafe { (&raw const (*self.raw()).cb[0]).read_volatile() }
    }

    /// Takes bytes off the front, all if there are fewer. The server's `copied_seq` moves on by what is left, as it must.
    #[inline(always)]
    pub(crate) fn cut_front(&self, bytes: u32) -> Result<(), Failed> {
        let len = self.len();
        let mut cut = Cut { skb: *self, left: if bytes < len { bytes } else { len } };
        repeat(CUT_STEPS, cut_step, &mut cut)?;
        if cut.left == 0 { Ok(()) } else { Err(Failed) }
    }

    /// Cookie of the socket that the bytes came in on.
    #[inline(always)]
    pub(crate) fn cookie(&self) -> u64 {
        // SAFETY: the context is valid.
        unsafe { bpf_get_socket_cookie(self.raw().cast()) }
    }

    /// Copies bytes. `MAX` is a power of two; a length of 0 or above `MAX` is an error.
    ///
    /// # Safety
    /// `to` is valid for `MAX` bytes.
    #[inline(always)]
    pub(crate) unsafe fn load<const MAX: u32>(
        &self,
        offset: u32,
        to: *mut u8,
        len: u32,
    ) -> Result<(), Failed> {
        let len = bounded::<MAX>(len)?;
        // SAFETY: `len` is in 1..=MAX, for which `to` is valid.
        let result = unsafe { bpf_skb_load_bytes(self.raw().cast(), offset, to.cast(), len) };
        if result == 0 { Ok(()) } else { Err(Failed) }
    }

    /// One byte.
    #[inline(always)]
    pub(crate) fn byte(&self, offset: u32) -> Result<u8, Failed> {
        let mut byte = 0_u8;
        // SAFETY: one byte into one byte.
        let result = unsafe { bpf_skb_load_bytes(self.raw().cast(), offset, (&raw mut byte).cast(), 1) };
        if result == 0 { Ok(byte) } else { Err(Failed) }
    }

    /// Overwrites bytes; the length rules are those of [`Self::load`].
    ///
    /// # Safety
    /// `from` is valid for `MAX` bytes.
    #[inline(always)]
    pub(crate) unsafe fn store<const MAX: u32>(
        &self,
        offset: u32,
        from: *const u8,
        len: u32,
    ) -> Result<(), Failed> {
        let len = bounded::<MAX>(len)?;
        // SAFETY: `len` is in 1..=MAX, for which `from` is valid.
        let result = unsafe { bpf_skb_store_bytes(self.raw().cast(), offset, from.cast(), len, 0) };
        if result == 0 { Ok(()) } else { Err(Failed) }
    }

    /// Drops the bytes, without waking the server where that is possible.
    ///
    /// A plain `SK_DROP` wakes whoever reads the socket, and a server that blocks in `recv` then gets EAGAIN although its socket is
    /// blocking (tcp_bpf_recvmsg_parser since 6.4). A redirect that fails consumes the bytes as well, but is an error to the caller,
    /// which then wakes nobody. It also leaves whatever else is queued until the next packet, so it is used only for the last one.
    #[inline(always)]
    pub(crate) fn swallow(&self, flow: &mut Flow) -> u32 {
        match self.tcp() {
            Some(tcp) if tcp::queued_packets(tcp) == 0 => {}
            _ => return SK_DROP,
        }
        // The sink's peer does not read and its queue is broken, so nothing ever leaves it. Without a sink this is SK_DROP.
        // SAFETY: the context and the map are valid.
        let verdict =
            unsafe { bpf_sk_redirect_map(self.raw(), (&raw const SINK).cast_mut().cast(), 0, 0) as u32 };
        if verdict != SK_DROP {
            flow.swallowed_bytes = flow.swallowed_bytes.wrapping_add(self.len());
        }
        verdict
    }
}

/// The most bytes that one call of the helper takes off.
const CUT_BYTES: u32 = 0xfff;
/// Enough for the longest skb there is.
const CUT_STEPS: u32 = (1 << 20) / CUT_BYTES;

struct Cut<'a> {
    skb: Skb<'a>,
    left: u32,
}

extern "C" fn cut_step(_index: u32, cut: *mut Cut<'_>) -> i64 {
    // SAFETY: `bpf_loop` hands back the pointer that it was given.
    let cut = unsafe { &mut *cut };
    let take = if cut.left < CUT_BYTES { cut.left } else { CUT_BYTES };
    if take == 0 {
        return 1;
    }
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_adjust_room(cut.skb.raw(), -(take as i32), 0, 0) } != 0 {
        return 1;
    }
    cut.left -= take;
    0
}

/// A length that every verifier since 6.1 believes to be in `1..=MAX`: compare first, then mask, with the compiler kept from
/// merging the two (6.1 forgets the lower bound of `len < 1 || len > MAX`).
#[inline(always)]
pub(crate) fn bounded<const MAX: u32>(len: u32) -> Result<u32, Failed> {
    if len == 0 || len > MAX {
        return Err(Failed);
    }
    Ok(barrier(((barrier(len) - 1) & (MAX - 1)) + 1))
}

/// Gives its argument, and keeps the compiler from knowing that. The value stays in a register: spilled, the verifier would
/// forget its bounds.
#[inline(always)]
fn barrier(value: u32) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        let mut word = u64::from(value);
        // SAFETY: a move onto itself (an empty text would give two source lines to one instruction, which the kernel refuses).
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) word, options(nomem, nostack)) };
        word as u32
    }
    #[cfg(not(target_arch = "bpf"))]
    value
}

/// A callback of `bpf_loop`: not 0 ends the loop.
pub(crate) type Callback<T> = extern "C" fn(u32, *mut T) -> i64;

/// Runs a callback with 0, 1, ... at most `times` times.
#[inline(always)]
pub(crate) fn repeat<T>(times: u32, callback: Callback<T>, state: &mut T) -> Result<(), Failed> {
    // SAFETY: the callback gets `state` back, which outlives the call; the verifier checks the callback like a program.
    let done = unsafe { bpf_loop(times, callback as *mut c_void, core::ptr::from_mut(state).cast(), 0) };
    if done < 0 { Err(Failed) } else { Ok(()) }
}
