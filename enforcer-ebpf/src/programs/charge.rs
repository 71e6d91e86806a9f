//! Limits: each request is charged to the buckets of its grant, and one without a grant to its source. Whatever can't be read or changed
//! refuses. Most functions here are global ones to the verifier, which walks each once.
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value, further copies of keys and values would be on the stack"
)]

use aya_ebpf::bindings::BPF_ANY;
use enforcer_common::abi::{
    Bucket, CHARGE_ANSWERED, CHARGE_GRANT, CHARGE_REFUSED, CHARGE_UNKNOWN, Counter, Flow, GRANT_BUCKETS,
    Source, SourceKey, held_as,
};
use enforcer_common::limit::{PLACE_WAIT_NS, admit, retry_step, too_many_open};

use crate::kernel::{add, compare_exchange, config, count};
use crate::maps::{GRANTS, LIMITS, NAMED, SOURCES};

/// What a charge gives if it was admitted.
pub(crate) const ADMITTED: u32 = 0;
/// What it gives where a bucket can't be read: the shortest wait, as that passes.
const UNREADABLE: u32 = 1;
/// How often a bucket is tried that others change at the same moment.
const TRIES: u32 = 8;

/// A source that nothing came from; not on the stack, which the whole chain of calls shares.
static FRESH: Source = Source { unknown_tat_ns: 0, refused_tat_ns: 0, answered_tat_ns: 0, limited: 0 };

/// [`ADMITTED`], or 1 and the step of the wait.
#[inline(always)]
const fn refused(wait_ns: u64) -> u32 {
    1 + retry_step(wait_ns)
}

/// Charges a request on a flow: to the grant in a slot ([`CHARGE_GRANT`]), or to the flow's source. [`ADMITTED`], or 1 and the step of
/// `RETRY_AFTER_SECS` that covers the wait. In line: each call in between costs every chain of calls 32 bytes of their common stack.
#[inline(always)]
pub(crate) fn charge_request(flow: &mut Flow, slot: u32, what: u32, now_ns: u64) -> u32 {
    if what != CHARGE_GRANT {
        return charge_source(flow, what, now_ns);
    }
    let step = charge_grant(slot, now_ns);
    if step != ADMITTED {
        return step;
    }
    let step = hold(flow, slot, 0);
    if step != ADMITTED {
        refund(slot, GRANT_BUCKETS as u32);
    }
    step
}

/// Charges all buckets of a grant, or none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn charge_grant(slot: u32, now_ns: u64) -> u32 {
    let Some(grant) = GRANTS.get_ptr(slot) else { return UNREADABLE };
    let mut k = 0;
    while k < GRANT_BUCKETS as u32 {
        // SAFETY: the index is below the array's length. Volatile: the verifier must see that.
        let bucket = unsafe { (&raw const (*grant).buckets).cast::<u32>().add(k as usize).read_volatile() };
        if bucket == 0 {
            break;
        }
        let step = charge_bucket(bucket, now_ns);
        if step != ADMITTED {
            refund(slot, k);
            return step;
        }
        k += 1;
    }
    ADMITTED
}

/// Takes a charge of the first buckets of a grant back.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refund(slot: u32, buckets: u32) -> u32 {
    let Some(grant) = GRANTS.get_ptr(slot) else { return 0 };
    let mut k = 0;
    while k < GRANT_BUCKETS as u32 {
        if k >= buckets {
            break;
        }
        // SAFETY: as in `charge_grant`.
        let index = unsafe { (&raw const (*grant).buckets).cast::<u32>().add(k as usize).read_volatile() };
        if index == 0 {
            break;
        }
        if let Some(bucket) = LIMITS.get_ptr_mut(index) {
            // SAFETY: valid map values, changed word by word.
            unsafe {
                let interval_ns = (&raw const (*bucket).interval_ns).read_volatile();
                let word = &raw mut (*bucket).tat_ns;
                let tat_ns = word.read_volatile();
                // Never below zero, which would be the end of time. A refund that another change overtakes is lost.
                if tat_ns > interval_ns {
                    let _ = compare_exchange(word, tat_ns, tat_ns - interval_ns);
                }
                add(&raw mut (*bucket).admitted, u64::MAX);
            }
        }
        k += 1;
    }
    0
}

/// Charges one bucket.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn charge_bucket(index: u32, now_ns: u64) -> u32 {
    let Some(bucket) = LIMITS.get_ptr_mut(index) else { return UNREADABLE };
    // SAFETY: a valid map value, as below. Its words are read one by one; a limit that is being changed may be seen half changed.
    let (interval_ns, burst_ns, serial) = unsafe {
        (
            (&raw const (*bucket).interval_ns).read_volatile(),
            (&raw const (*bucket).burst_ns).read_volatile(),
            (&raw const (*bucket).serial).read_volatile(),
        )
    };
    if serial == 0 {
        count(Counter::BucketFailed);
        return UNREADABLE;
    }
    // SAFETY: as above.
    let step = unsafe { charge_word(&raw mut (*bucket).tat_ns, now_ns, interval_ns, burst_ns) };
    // SAFETY: as above.
    unsafe {
        let counted = if step == ADMITTED { &raw mut (*bucket).admitted } else { &raw mut (*bucket).limited };
        add(counted, 1);
    }
    step
}

/// Charges a request without a grant to where it comes from.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn charge_source(flow: *mut Flow, what: u32, now_ns: u64) -> u32 {
    if flow.is_null() {
        return UNREADABLE;
    }
    let Some(config) = config() else { return UNREADABLE };
    let (interval_ns, burst_ns) = if what == CHARGE_REFUSED {
        (config.refused_interval_ns, config.refused_burst_ns)
    } else {
        (config.unknown_interval_ns, config.unknown_burst_ns)
    };
    if interval_ns == 0 {
        return ADMITTED;
    }
    // SAFETY: a valid map value.
    let mut key = SourceKey::of(unsafe { &(*flow).origin });
    // By the key's own word: some kernels take no other memory than the stack's here.
    // SAFETY: a valid map value; one that is another cgroup's by now costs that one.
    if let Some(named) = unsafe { NAMED.get(&key.cgroup_id) } {
        key.cgroup_id = *named;
    }
    // SAFETY: a valid map value.
    unsafe { (&raw mut (*flow).charged_cgroup_id).write_volatile(key.cgroup_id) };
    let mut source = SOURCES.get_ptr_mut(&key);
    if source.is_none() {
        let fresh: &Source = &FRESH;
        let _ = SOURCES.insert(&key, fresh, u64::from(BPF_ANY));
        source = SOURCES.get_ptr_mut(&key);
    }
    let Some(source) = source else {
        count(Counter::BucketFailed);
        return UNREADABLE;
    };
    // SAFETY: a valid map value, whoever's it is.
    let step = unsafe {
        let word = match what {
            CHARGE_UNKNOWN => &raw mut (*source).unknown_tat_ns,
            CHARGE_ANSWERED => &raw mut (*source).answered_tat_ns,
            _ => &raw mut (*source).refused_tat_ns,
        };
        charge_word(word, now_ns, interval_ns, burst_ns)
    };
    if step != ADMITTED {
        count(Counter::SourceLimited);
        // SAFETY: as above.
        unsafe { add(&raw mut (*source).limited, 1) };
    }
    step
}

/// Charges a word.
///
/// # Safety
/// It is valid and aligned.
#[inline(always)]
unsafe fn charge_word(word: *mut u64, now_ns: u64, interval_ns: u64, burst_ns: u64) -> u32 {
    let mut attempt = 0;
    while attempt < TRIES {
        // SAFETY: the caller's.
        let tat_ns = unsafe { word.read_volatile() };
        let next_ns = match admit(tat_ns, now_ns, interval_ns, burst_ns) {
            Ok(next_ns) => next_ns,
            Err(wait_ns) => return refused(wait_ns),
        };
        // SAFETY: the caller's.
        if next_ns == tat_ns || unsafe { compare_exchange(word, tat_ns, next_ns) } == tat_ns {
            return ADMITTED;
        }
        attempt += 1;
    }
    count(Counter::BucketFailed);
    refused(0)
}

/// Gives a flow its place in the buckets of the grant in a slot, and takes away those that it had. Unless forced, only where each has one
/// left; if not, the flow has none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hold(flow: *mut Flow, slot: u32, force: u32) -> u32 {
    if flow.is_null() {
        return UNREADABLE;
    }
    let Some(grant) = GRANTS.get_ptr(slot) else { return UNREADABLE };
    // SAFETY: valid map values. As below.
    let serial = unsafe {
        held_as(
            (&raw const (*grant).serial).read_volatile(),
            (&raw const (*grant).generation).read_volatile(),
        )
    };
    // SAFETY: as above.
    if unsafe { (&raw const (*flow).held_serial).read_volatile() } == serial {
        return ADMITTED;
    }
    let _ = release(flow);
    let mut k = 0;
    while k < GRANT_BUCKETS as u32 {
        // SAFETY: as in `charge_grant`.
        let index = unsafe { (&raw const (*grant).buckets).cast::<u32>().add(k as usize).read_volatile() };
        if index == 0 {
            break;
        }
        let Some(bucket) = LIMITS.get_ptr_mut(index) else { break };
        // SAFETY: as above. The place is taken before it is looked at whether there was one.
        unsafe {
            add(&raw mut (*bucket).open, 1);
            (&raw mut (*flow).buckets).cast::<u32>().add(k as usize).write_volatile(index);
            if force == 0 && over_places(bucket) {
                add(&raw mut (*bucket).limited, 1);
                let _ = release(flow);
                return refused(PLACE_WAIT_NS);
            }
        }
        k += 1;
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*flow).held_serial).write_volatile(serial) };
    ADMITTED
}

/// Whether more places are taken than there are.
///
/// # Safety
/// A valid map value.
#[inline(always)]
unsafe fn over_places(bucket: *const Bucket) -> bool {
    // SAFETY: the caller's.
    let (open, max_open) = unsafe {
        ((&raw const (*bucket).open).read_volatile(), (&raw const (*bucket).max_open).read_volatile())
    };
    too_many_open(open, max_open)
}

/// Takes away a flow's places.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn release(flow: *mut Flow) -> u32 {
    if flow.is_null() {
        return 0;
    }
    let mut k = 0;
    while k < GRANT_BUCKETS as u32 {
        // SAFETY: as in `hold`.
        let word = unsafe { (&raw mut (*flow).buckets).cast::<u32>().add(k as usize) };
        // SAFETY: as above.
        let index = unsafe { word.read_volatile() };
        if index == 0 {
            break;
        }
        // SAFETY: as above.
        unsafe { word.write_volatile(0) };
        if let Some(bucket) = LIMITS.get_ptr_mut(index) {
            // SAFETY: as above.
            unsafe { add(&raw mut (*bucket).open, u64::MAX) };
        }
        k += 1;
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*flow).held_serial).write_volatile(0) };
    0
}

/// A request of the daemon's has passed: its flow has its place whatever the limit.
#[inline(always)]
pub(crate) fn hold_always(flow: *mut Flow, slot: u32) {
    let _ = hold(flow, slot, 1);
}

/// The flow is over.
#[inline(always)]
pub(crate) fn let_go(flow: *mut Flow) {
    let _ = release(flow);
}

/// Whether the daemon is told of one more process that may not connect: ten at once, and then ten a second.
#[inline(always)]
pub(crate) fn tells(now_ns: u64) -> bool {
    const INTERVAL_NS: u64 = 100_000_000;
    let Some(bucket) = LIMITS.get_ptr_mut(0) else { return false };
    // SAFETY: a valid map value.
    unsafe { charge_word(&raw mut (*bucket).tat_ns, now_ns, INTERVAL_NS, 10 * INTERVAL_NS) == ADMITTED }
}
