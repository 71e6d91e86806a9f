//! XDP on the interfaces that the policy names: drops packets for protected endpoints before TCP sees them, by source. What it lets
//! through, gate and judge look at like everything else: it is there so that a flood costs little, not to judge requests.
//!
//! Not for what is addressed to others, and never for loopback. Helpers copy the bytes, so it does not matter in how many pieces a frame
//! lies, and drivers with large frames can run it.
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value, further copies of keys and values would be on the stack"
)]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::{BPF_NOEXIST, xdp_md};
use aya_ebpf::helpers::{bpf_xdp_get_buff_len, bpf_xdp_load_bytes, bpf_xdp_store_bytes};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use enforcer_common::abi::{Counter, EndpointKey, MODE_OBSERVE, SHIELD_REASONS, ShieldConfig, ShieldSource};
use enforcer_common::limit;
use enforcer_common::shield::options::{self, MAX_STEPS, OPTION_BYTES};
use enforcer_common::shield::source;
use enforcer_common::shield::verdict::{Tables, Verdict, decide, reason_index};
use enforcer_common::shield::walk::{Frame, Packet, walk};

use super::failing::{is_quarantined, listed};
use super::sock_ops::endpoint;
use crate::kernel::{self, Failed, bounded, config, count, now_ns};
use crate::maps::{SHIELD_ADDRESSES, SHIELD_CONFIG, SHIELD_INTERFACES, SHIELD_OPTIONS, SHIELD_SOURCES};

/// How often a bucket is tried that other CPUs charge at the same moment.
const CHARGE_ATTEMPTS: u32 = 4;

#[xdp(frags)]
fn shield(ctx: XdpContext) -> u32 {
    let frame = Bytes { ctx: ctx.as_ptr().cast() };
    let mut packet = Packet::default();
    let kind = walk(&frame, &mut packet);
    let verdict = match SHIELD_CONFIG.get(0) {
        Some(config) => decide(kind, &packet, &Maps { config }),
        None => Verdict::Drop(Counter::ShieldHelper),
    };
    match verdict {
        Verdict::NotOurs | Verdict::Pass => XDP_PASS,
        _ if is_idle(verdict) => XDP_PASS,
        Verdict::PassSyn => match strip(&frame, &packet) {
            Ok(()) => XDP_PASS,
            Err(Failed) => dropped(&ctx, Counter::ShieldHelper),
        },
        Verdict::Drop(reason) => dropped(&ctx, reason),
    }
}

/// Whether nothing is to be dropped: the policy only observes, or the enforcement is being unloaded.
#[inline(always)]
fn is_idle(verdict: Verdict) -> bool {
    let Some(config) = config() else { return false };
    if config.mode == MODE_OBSERVE && matches!(verdict, Verdict::Drop(_)) {
        count(Counter::ShieldWouldDrop);
    }
    config.mode == MODE_OBSERVE || config.draining != 0
}

#[inline(always)]
fn dropped(ctx: &XdpContext, reason: Counter) -> u32 {
    count(reason);
    let interface = ctx.ingress_ifindex() as u32;
    if let Some(interface) = SHIELD_INTERFACES.get_ptr_mut(interface) {
        let index = reason_index(reason) as usize;
        if index < SHIELD_REASONS {
            // SAFETY: a valid map value, this CPU's own.
            let drops = unsafe { (*interface).drops.as_mut_ptr().add(index) };
            // SAFETY: the index is within.
            unsafe { *drops = (*drops).wrapping_add(1) };
        }
    }
    XDP_DROP
}

struct Bytes {
    ctx: *mut xdp_md,
}

impl Frame for Bytes {
    #[inline(always)]
    fn bytes(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { bpf_xdp_get_buff_len(self.ctx) as u32 }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: u32, to: &mut [u8; N]) -> bool {
        // SAFETY: the context is valid, and so are N bytes.
        unsafe { bpf_xdp_load_bytes(self.ctx, at, to.as_mut_ptr().cast(), N as u32) == 0 }
    }
}

struct Maps {
    config: &'static ShieldConfig,
}

impl Tables for Maps {
    #[inline(always)]
    fn is_for_endpoint(&self, packet: &Packet) -> bool {
        endpoint(destination(packet, packet.port)).is_some()
    }

    #[inline(always)]
    fn is_for_address(&self, packet: &Packet) -> bool {
        let address = destination(packet, 0);
        // SAFETY: only its presence counts.
        unsafe {
            SHIELD_ADDRESSES.get(address).or_else(|| SHIELD_ADDRESSES.get(address.wildcard())).is_some()
        }
    }

    #[inline(always)]
    fn listed(&self, packet: &Packet) -> u32 {
        listed(packet.family, &packet.source)
    }

    #[inline(always)]
    fn is_quarantined(&self, packet: &Packet) -> bool {
        self.config.quarantine_ns != 0 && is_quarantined(packet.family, &packet.source)
    }

    #[inline(always)]
    fn charge(&self, packet: &Packet, is_new: bool) -> Result<(), Counter> {
        if self.config.packet_interval_ns == 0 && (self.config.connection_interval_ns == 0 || !is_new) {
            return Ok(());
        }
        charge(self.config, packet, is_new)
    }
}

#[inline(always)]
fn destination(packet: &Packet, port: u16) -> EndpointKey {
    EndpointKey { addr: packet.destination, port, family: packet.family, zero: 0 }
}

#[inline(never)]
fn charge(config: &ShieldConfig, packet: &Packet, is_new: bool) -> Result<(), Counter> {
    let key = source::key(packet.family, &packet.source);
    let source = match SHIELD_SOURCES.get_ptr_mut(&key) {
        Some(source) => source,
        None => {
            let fresh = ShieldSource { key, connections_tat_ns: 0, packets_tat_ns: 0 };
            // Another CPU may have been faster.
            let _ = SHIELD_SOURCES.insert(&key, &fresh, u64::from(BPF_NOEXIST));
            SHIELD_SOURCES.get_ptr_mut(&key).ok_or(Counter::ShieldSourcesFull)?
        }
    };
    let now_ns = now_ns();
    // SAFETY: a valid map value, whoever's it is. A stranger's bucket that is charged by accident loses one event.
    unsafe {
        if (*source).key.prefix != key.prefix || (*source).key.rest != key.rest {
            return Err(Counter::ShieldSourcesFull);
        }
        if !admit(
            &raw mut (*source).packets_tat_ns,
            now_ns,
            config.packet_interval_ns,
            config.packet_burst_ns,
        ) {
            return Err(Counter::ShieldPackets);
        }
        if is_new
            && !admit(
                &raw mut (*source).connections_tat_ns,
                now_ns,
                config.connection_interval_ns,
                config.connection_burst_ns,
            )
        {
            return Err(Counter::ShieldConnections);
        }
    }
    Ok(())
}

/// Takes an event from a bucket, if there is one. Where others take from it all the time, it is at its limit.
///
/// # Safety
/// The word is valid and aligned.
#[inline(always)]
unsafe fn admit(tat: *mut u64, now_ns: u64, interval_ns: u64, burst_ns: u64) -> bool {
    let mut attempt = 0;
    while attempt < CHARGE_ATTEMPTS {
        // SAFETY: the caller's.
        let found_ns = unsafe { tat.read_volatile() };
        let Ok(next_ns) = limit::admit(found_ns, now_ns, interval_ns, burst_ns) else { return false };
        // SAFETY: the caller's.
        if unsafe { kernel::compare_exchange(tat, found_ns, next_ns) } == found_ns {
            return true;
        }
        attempt += 1;
    }
    false
}

/// Makes NOPs of MPTCP's options.
#[inline(never)]
fn strip(frame: &Bytes, packet: &Packet) -> Result<(), Failed> {
    const MAX: u32 = OPTION_BYTES as u32;
    const CHECKSUM_AT: u32 = 16;
    let (transport_at, option_bytes) = (packet.transport_at, packet.option_bytes);
    if option_bytes == 0 {
        return Ok(());
    }
    let Some(state) = SHIELD_OPTIONS.get_ptr_mut(0) else { return Err(Failed) };
    let len = bounded::<MAX>(option_bytes)?;
    // SAFETY: a valid map value of this CPU's own, which no other program uses while this one runs; as long as `MAX`.
    let state = unsafe { &mut *state };
    // SAFETY: `len` is in 1..=MAX, for which the bytes are valid.
    if unsafe { bpf_xdp_load_bytes(frame.ctx, transport_at + 20, state.bytes.as_mut_ptr().cast(), len) } != 0
    {
        return Err(Failed);
    }
    state.begin(option_bytes);
    let mut nothing = 0_u64;
    kernel::repeat(MAX_STEPS, strip_step, &mut nothing)?;
    if state.removed == 0 {
        return Ok(());
    }
    let mut checksum = [0; 2];
    if !frame.load(transport_at + CHECKSUM_AT, &mut checksum) {
        return Err(Failed);
    }
    let updated = options::update_checksum(u16::from_be_bytes(checksum), state.old, state.new);
    let mut checksum = updated.to_be_bytes();
    // SAFETY: as above, and two bytes.
    let stored = unsafe {
        bpf_xdp_store_bytes(
            frame.ctx,
            transport_at + 20,
            state.bytes.as_mut_ptr().cast(),
            bounded::<MAX>(option_bytes)?,
        ) | bpf_xdp_store_bytes(frame.ctx, transport_at + CHECKSUM_AT, checksum.as_mut_ptr().cast(), 2)
    };
    if stored != 0 {
        return Err(Failed);
    }
    count(Counter::ShieldMptcp);
    Ok(())
}

extern "C" fn strip_step(_index: u32, _nothing: *mut u64) -> i64 {
    match SHIELD_OPTIONS.get_ptr_mut(0) {
        // SAFETY: as in `strip`.
        Some(state) if unsafe { (*state).step() } => 0,
        _ => 1,
    }
}
