//! Bytes and events for the daemon.

use aya_ebpf::helpers::{bpf_ringbuf_discard, bpf_ringbuf_reserve, bpf_ringbuf_submit};
use enforcer_common::abi::{
    Counter, FLOW_OBSERVE, Flow, PUNT_CHUNK_BYTES, PUNT_DATA, PUNT_MAX_CHUNKS, PUNT_OBSERVED,
    PUNT_SMALL_BYTES, PuntHeader,
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
}

/// Tells the daemon; a full ring buffer loses the event, which is counted (the daemon also looks for itself now and then).
#[inline(always)]
pub(crate) fn event(event: Event) {
    // SAFETY: the reservation has the header's size and is submitted once.
    unsafe {
        let record = reserve(size_of::<PuntHeader>() as u64).cast::<PuntHeader>();
        if record.is_null() {
            count(Counter::EventLost);
            return;
        }
        record.write(PuntHeader {
            cookie: event.cookie,
            offset_bytes: 0,
            netns_cookie: event.netns_cookie,
            kind: event.kind,
            epoch: 0,
            len_bytes: 0,
            flags: 0,
            endpoint_id: event.endpoint_id,
            reason: event.reason as u32,
        });
        bpf_ringbuf_submit(record.cast(), 0);
    }
}

#[inline(always)]
unsafe fn reserve(len: u64) -> *mut core::ffi::c_void {
    // SAFETY: the map is a ring buffer; a null result is for the caller to see.
    unsafe { bpf_ringbuf_reserve((&raw const PUNTS).cast_mut().cast(), len, 0) }
}

struct Copy<'a> {
    skb: Skb<'a>,
    header: PuntHeader,
    /// Bytes of the skb that are in records already.
    at: u32,
    len: u32,
    failed: u32,
}

/// Copies a whole skb into the ring buffer, as bytes from `ctl`'s punted count on backwards.
#[inline(always)]
pub(crate) fn bytes(
    skb: Skb<'_>,
    flow: &Flow,
    cookie: u64,
    ctl: Ctl,
    reason: Counter,
    flags: u32,
) -> Result<(), Counter> {
    let len = skb.len();
    if len > PUNT_MAX_CHUNKS * PUNT_CHUNK_BYTES as u32 {
        return Err(Counter::DeadTooLong);
    }
    let observed = if flow.flags & FLOW_OBSERVE != 0 { PUNT_OBSERVED } else { 0 };
    let header = PuntHeader {
        cookie,
        offset_bytes: ctl.punted_bytes() - u64::from(len),
        netns_cookie: flow.netns_cookie,
        kind: PUNT_DATA,
        epoch: ctl.epoch(),
        len_bytes: len,
        flags: flags | observed,
        endpoint_id: flow.endpoint_id,
        reason: reason as u32,
    };
    if len <= PUNT_SMALL_BYTES as u32 {
        // SAFETY: header and payload fit the reservation, which is submitted or discarded once.
        return match unsafe { record::<{ PUNT_SMALL_BYTES as u32 }>(skb, &header, 0, len) } {
            Ok(()) => Ok(()),
            Err(counter) => Err(counter),
        };
    }
    let mut copy = Copy { skb, header, at: 0, len, failed: 0 };
    if repeat(PUNT_MAX_CHUNKS, chunk, &mut copy).is_err() {
        return Err(Counter::DeadHelper);
    }
    if copy.failed == 0 && copy.at == copy.len { Ok(()) } else { Err(Counter::DeadRingFull) }
}

extern "C" fn chunk(_index: u32, copy: *mut Copy<'_>) -> i64 {
    // SAFETY: `bpf_loop` hands back the pointer that it was given.
    let copy = unsafe { &mut *copy };
    let left = copy.len - copy.at;
    if left == 0 || copy.at >= copy.len {
        return 1;
    }
    let take = if left < PUNT_CHUNK_BYTES as u32 { left } else { PUNT_CHUNK_BYTES as u32 };
    let mut header = copy.header;
    header.offset_bytes += u64::from(copy.at);
    header.len_bytes = take;
    // SAFETY: as above.
    if unsafe { record::<{ PUNT_CHUNK_BYTES as u32 }>(copy.skb, &header, copy.at, take) }.is_err() {
        copy.failed = 1;
        return 1;
    }
    copy.at += take;
    0
}

/// One record: header and `len` bytes of the skb from `offset` on.
#[inline(always)]
unsafe fn record<const MAX: u32>(
    skb: Skb<'_>,
    header: &PuntHeader,
    offset: u32,
    len: u32,
) -> Result<(), Counter> {
    // SAFETY: the reservation holds a header and `MAX` bytes.
    unsafe {
        let record = reserve(size_of::<PuntHeader>() as u64 + u64::from(MAX));
        if record.is_null() {
            return Err(Counter::DeadRingFull);
        }
        record.cast::<PuntHeader>().write(*header);
        let payload = record.cast::<u8>().add(size_of::<PuntHeader>());
        match skb.load::<MAX>(offset, payload, len) {
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
