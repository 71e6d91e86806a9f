//! Sources whose requests are refused again and again.
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value, further copies of keys and values would be on the stack"
)]

use aya_ebpf::maps::lpm_trie::Key;
use enforcer_common::abi::{
    Counter, FAMILY_V4, Flow, SHIELD_EXEMPT, SHIELD_NONE, ShieldFailing, ShieldPrefix, is_loopback,
};
use enforcer_common::shield::{quarantine, source};

use crate::kernel::{compare_exchange, count, now_ns};
use crate::maps::{SHIELD_CONFIG, SHIELD_FAILING, SHIELD_V4, SHIELD_V6};

/// How many entries of one address may have ended one below the other. The next one is not found then, until somebody clears them away.
const MAX_ENDED: u32 = 8;

/// Charges a flow's source for the refusals that its client has got since it was last charged. The gate does it, at the client's next
/// packet, because the judge has no stack to spare; and `sock_ops` when the flow ends, for a client that sends no other.
#[inline(always)]
pub(super) fn note(flow: *mut Flow) {
    // SAFETY: the caller's pointer is a valid map value.
    if unsafe { (*flow).refusals != (*flow).noted_refusals } {
        note_refusals(flow, now_ns());
    }
}

/// See [`note`]. Not for clients on this host, nor for exceptions. A global function to the verifier: see `use_grant`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_refusals(flow: *mut Flow, now_ns: u64) -> u64 {
    if flow.is_null() {
        return 0;
    }
    // SAFETY: the callers' pointer is a valid map value; the verifier checks each access against the type's size.
    let flow = unsafe { &mut *flow };
    let more = flow.refusals.wrapping_sub(flow.noted_refusals);
    flow.noted_refusals = flow.refusals;
    let Some(config) = SHIELD_CONFIG.get(0) else { return 0 };
    if config.quarantine_ns == 0 {
        return 0;
    }
    let peer = &flow.peer;
    if is_loopback(peer) || peer.addr == flow.local.addr || flow.caller.is_known() {
        return 0;
    }
    let key = source::key(peer.family, &peer.addr);
    let found = match SHIELD_FAILING.get_ptr_mut(&key) {
        // SAFETY: a valid map value, whoever's it is: if it is another source's by now, that one has a refusal more.
        Some(failing) => unsafe { (&raw mut (*failing).refusals).read_volatile() },
        None => 0,
    };
    let (next, too_many) =
        quarantine::count(found, more, now_ns, config.refusal_window_ns, config.max_refusals);
    let too_many = too_many && listed(peer.family, &peer.addr) != SHIELD_EXEMPT;
    if !too_many && let Some(failing) = SHIELD_FAILING.get_ptr_mut(&key) {
        // One that is lost to another CPU at the same moment is one of many.
        // SAFETY: as above.
        unsafe { compare_exchange(&raw mut (*failing).refusals, found, next) };
        return 0;
    }
    let blocked_until_ns = if too_many { now_ns.saturating_add(config.quarantine_ns) } else { 0 };
    let failing = ShieldFailing { key, refusals: if too_many { 0 } else { next }, blocked_until_ns };
    if SHIELD_FAILING.insert(&key, &failing, 0).is_ok() && too_many {
        count(Counter::SourceQuarantined);
    }
    0
}

/// Whether packets of a source are dropped because too many of its requests were refused.
#[inline(never)]
pub(super) fn is_quarantined(family: u8, address: &[u8; 16]) -> bool {
    let key = source::key(family, address);
    let Some(failing) = SHIELD_FAILING.get_ptr(&key) else { return false };
    // SAFETY: a valid map value, whoever's it is.
    unsafe {
        let blocked_until_ns = (&raw const (*failing).blocked_until_ns).read_volatile();
        // One that is another's by now was this source's a moment ago: perhaps it is being replaced by its quarantine.
        let is_ours = (*failing).key.prefix == key.prefix && (*failing).key.rest == key.rest;
        !is_ours || blocked_until_ns != 0 && now_ns() < blocked_until_ns
    }
}

/// What is said of an address: `SHIELD_*`, by the longest prefix that says something.
#[inline(never)]
pub(super) fn listed(family: u8, address: &[u8; 16]) -> u32 {
    let mut bits = if family == FAMILY_V4 { 32 } else { 128 };
    let mut ended = 0;
    while ended < MAX_ENDED {
        let Some(entry) = longest(family, address, bits) else { return SHIELD_NONE };
        let word = if entry.until_ns == 0 {
            quarantine::word_of(entry, 0)
        } else {
            quarantine::word_of(entry, now_ns())
        };
        if word != SHIELD_NONE || entry.bits == 0 || entry.bits > bits {
            return word;
        }
        bits = entry.bits - 1;
        ended += 1;
    }
    SHIELD_NONE
}

#[inline(always)]
fn longest(family: u8, address: &[u8; 16], bits: u32) -> Option<&'static ShieldPrefix> {
    if family == FAMILY_V4 {
        SHIELD_V4.get(&Key::new(bits, [address[0], address[1], address[2], address[3]]))
    } else {
        SHIELD_V6.get(&Key::new(bits, *address))
    }
}
