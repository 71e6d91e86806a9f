//! Bytes and events for the daemon.

use aya_ebpf::helpers::{bpf_ringbuf_discard, bpf_ringbuf_reserve, bpf_ringbuf_submit};
use enforcer_common::abi::{
    Caller, Counter, Ends, FLOW_OBSERVE, Flow, Origin, PUNT_CHUNK_BYTES, PUNT_DATA, PUNT_MAX_CHUNKS,
    PUNT_OBSERVED, PUNT_SMALL_BYTES, PuntHeader,
};
use enforcer_common::flow::Ctl;

use crate::kernel::{Failed, Skb, count, repeat};
use crate::maps::PUNTS;

/// Something the daemon is told about a flow, without bytes.
pub(crate) struct Event {
    pub(crate) kind: u32,
    pub(crate) cookie: u64,
    pub(crate) netns_cookie: u64,
    pub(crate) endpoint_id: u32,
    pub(crate) reason: Counter,
    pub(crate) interface: u32,
    /// What follows.
    pub(crate) payload: Payload,
}

/// What follows an event.
pub(crate) enum Payload {
    Nothing,
    /// The ends of a socket that has no flow record.
    Ends(Ends),
    /// A process that was not let connect.
    Caller(Caller),
}

/// Room for any payload.
const EVENT_BYTES: usize = size_of::<Caller>();
const _: () = assert!(size_of::<Ends>() <= EVENT_BYTES);

/// Tells the daemon; a full ring buffer loses the event, which is counted (the daemon also looks for itself now and then).
#[inline(always)]
pub(crate) fn event(event: Event) {
    // SAFETY: the reservation has the header's size and is submitted once.
    unsafe {
        let record = reserve((size_of::<PuntHeader>() + EVENT_BYTES) as u64).cast::<PuntHeader>();
        if record.is_null() {
            count(Counter::EventLost);
            return;
        }
        record.write(PuntHeader {
            cookie: event.cookie,
            offset_bytes: 0,
            netns_cookie: event.netns_cookie,
            skip_bytes: 0,
            kind: event.kind,
            epoch: 0,
            len_bytes: match event.payload {
                Payload::Nothing => 0,
                Payload::Ends(_) => size_of::<Ends>() as u32,
                Payload::Caller(_) => size_of::<Caller>() as u32,
            },
            flags: 0,
            endpoint_id: event.endpoint_id,
            reason: event.reason as u32,
            write_seq: 0,
            interface: event.interface,
            origin: Origin::NONE,
        });
        match event.payload {
            Payload::Nothing => {}
            Payload::Ends(ends) => record.add(1).cast::<Ends>().write(ends),
            Payload::Caller(caller) => record.add(1).cast::<Caller>().write(caller),
        }
        bpf_ringbuf_submit(record.cast(), 0);
    }
}

#[inline(always)]
unsafe fn reserve(len: u64) -> *mut core::ffi::c_void {
    // SAFETY: the map is a ring buffer; a null result is for the caller to see.
    unsafe { bpf_ringbuf_reserve((&raw const PUNTS).cast_mut().cast(), len, 0) }
}

/// What the daemon is told with bytes.
pub(crate) struct Handed {
    pub(crate) reason: Counter,
    pub(crate) flags: u32,
    pub(crate) write_seq: u32,
    pub(crate) skip_bytes: u64,
}

/// What the records of an skb are made of. Nothing in here changes from one to the next but `failed`: what did, a verifier that follows each
/// value would follow through all rounds.
struct Copy<'a> {
    skb: Skb<'a>,
    flow: &'a Flow,
    what: &'a Handed,
    cookie: u64,
    /// Bytes of the epoch before these.
    offset_bytes: u64,
    epoch: u32,
    len: u32,
    failed: u32,
}

/// Copies a whole skb into the ring buffer, as bytes from `ctl`'s punted count on backwards.
#[inline(always)]
pub(crate) fn bytes(skb: Skb<'_>, flow: &Flow, cookie: u64, ctl: Ctl, what: &Handed) -> Result<(), Counter> {
    let len = skb.len();
    if len > PUNT_MAX_CHUNKS * PUNT_CHUNK_BYTES as u32 {
        return Err(Counter::DeadTooLong);
    }
    let offset_bytes = ctl.punted_bytes() - u64::from(len);
    let mut copy = Copy { skb, flow, what, cookie, offset_bytes, epoch: ctl.epoch(), len, failed: 0 };
    if len <= PUNT_SMALL_BYTES as u32 {
        // SAFETY: header and payload fit the reservation, which is submitted or discarded once.
        return match unsafe { record::<{ PUNT_SMALL_BYTES as u32 }>(&copy, 0, len) } {
            Ok(()) => Ok(()),
            Err(counter) => Err(counter),
        };
    }
    if repeat(PUNT_MAX_CHUNKS, chunk, &mut copy).is_err() {
        return Err(Counter::DeadHelper);
    }
    // There are enough rounds for the longest skb that comes here.
    if copy.failed == 0 { Ok(()) } else { Err(Counter::DeadRingFull) }
}

extern "C" fn chunk(index: u32, copy: *mut Copy<'_>) -> i64 {
    // SAFETY: `bpf_loop` hands back the pointer that it was given.
    let copy = unsafe { &mut *copy };
    let at = index.wrapping_mul(PUNT_CHUNK_BYTES as u32);
    if at >= copy.len {
        return 1;
    }
    let left = copy.len - at;
    let take = if left < PUNT_CHUNK_BYTES as u32 { left } else { PUNT_CHUNK_BYTES as u32 };
    // SAFETY: as above.
    if unsafe { record::<{ PUNT_CHUNK_BYTES as u32 }>(copy, at, take) }.is_err() {
        copy.failed = 1;
        return 1;
    }
    0
}

/// One record: header and `len` bytes of the skb from `at` on.
#[inline(always)]
unsafe fn record<const MAX: u32>(copy: &Copy<'_>, at: u32, len: u32) -> Result<(), Counter> {
    // SAFETY: the reservation holds a header and `MAX` bytes.
    unsafe {
        let record = reserve(size_of::<PuntHeader>() as u64 + u64::from(MAX));
        if record.is_null() {
            return Err(Counter::DeadRingFull);
        }
        let (flow, what) = (copy.flow, copy.what);
        let observed = if flow.flags & FLOW_OBSERVE != 0 { PUNT_OBSERVED } else { 0 };
        record.cast::<PuntHeader>().write(PuntHeader {
            cookie: copy.cookie,
            offset_bytes: copy.offset_bytes + u64::from(at),
            netns_cookie: flow.netns_cookie,
            skip_bytes: what.skip_bytes,
            kind: PUNT_DATA,
            epoch: copy.epoch,
            len_bytes: len,
            flags: what.flags | observed,
            endpoint_id: flow.endpoint_id,
            reason: what.reason as u32,
            write_seq: what.write_seq,
            interface: flow.interface,
            origin: flow.origin,
        });
        let payload = record.cast::<u8>().add(size_of::<PuntHeader>());
        match copy.skb.load::<MAX>(at, payload, len) {
            Ok(()) => {
                bpf_ringbuf_submit(record, 0);
                Ok(())
            }
            Err(Failed) => {
                bpf_ringbuf_discard(record, 0);
                Err(Counter::DeadHelper)
            }
        }
    }
}
