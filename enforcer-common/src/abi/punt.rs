//! The ring buffer to the daemon and the datagrams back.

use super::{EndpointKey, Origin, assert_layout};

/// Bytes of a flow that the daemon owns.
pub const PUNT_DATA: u32 = 1;
/// The socket of a flow that was punted before has closed.
pub const PUNT_CLOSED: u32 = 2;
/// The kernel declared the flow dead: the daemon is asked to destroy its socket.
pub const PUNT_DEAD: u32 = 3;
/// A socket could not be guarded (MPTCP, say) and was fenced: the daemon is asked to destroy it.
pub const PUNT_FENCED: u32 = 4;
/// A socket at a protected endpoint that is not guarded (it was accepted before the programs were attached, say) got bytes,
/// which were dropped: the daemon is asked to destroy it. [`Ends`] follow.
pub const PUNT_STRAY: u32 = 5;
/// A process was not let connect to a protected endpoint. Its [`super::Caller`] follows; not every one is told.
pub const PUNT_BARRED: u32 = 6;

/// The previous request on this flow was not answered yet, so an answer of ours could overtake the server's.
pub const PUNT_UNANSWERED: u32 = 1;
/// Observe mode: the bytes have passed to the server already.
pub const PUNT_OBSERVED: u32 = 2;
/// The request is over a limit and gets 429, whatever it is; the kernel can't answer it. [`punt_retry_step`] says when to try again.
pub const PUNT_LIMITED: u32 = 4;
/// Where the step of [`crate::limit::RETRY_AFTER_SECS`] begins in the flags, with [`PUNT_LIMITED`].
pub const PUNT_RETRY_SHIFT: u32 = 8;

/// The flags of a flow's [`super::Flow::limited`].
#[must_use]
#[inline(always)]
pub const fn punt_limited(limited: u32) -> u32 {
    if limited == 0 { 0 } else { PUNT_LIMITED | (limited - 1) << PUNT_RETRY_SHIFT }
}

/// The step in a record's flags.
#[must_use]
pub const fn punt_retry_step(flags: u32) -> u32 {
    (flags >> PUNT_RETRY_SHIFT) & 0xff
}

/// Header of a record in `PUNTS`. At most [`PUNT_CHUNK_BYTES`] bytes follow it, of which `len_bytes` count.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PuntHeader {
    /// Socket cookie of the flow.
    pub cookie: u64,
    /// Where the bytes stand in this epoch: bytes punted before them.
    pub offset_bytes: u64,
    /// Network namespace cookie of the server's socket.
    pub netns_cookie: u64,
    /// Bytes at the start of an epoch that belong to the body of a request that was refused before.
    pub skip_bytes: u64,
    /// `PUNT_DATA`, ...
    pub kind: u32,
    /// Punt epoch of the flow: one per hand-over to the daemon.
    pub epoch: u32,
    /// Bytes that follow.
    pub len_bytes: u32,
    /// `PUNT_*` flag bits.
    pub flags: u32,
    /// The protected endpoint.
    pub endpoint_id: u32,
    /// Why the kernel punted or gave up: a [`super::Counter`].
    pub reason: u32,
    /// The server's send sequence when these bytes came.
    pub write_seq: u32,
    /// Interface that the server's socket is bound to; 0: none.
    pub interface: u32,
    /// [`super::Flow::origin`].
    pub origin: Origin,
}
assert_layout!(PuntHeader, 96, [
    cookie: u64, offset_bytes: u64, netns_cookie: u64, skip_bytes: u64, kind: u32, epoch: u32, len_bytes: u32,
    flags: u32, endpoint_id: u32, reason: u32, write_seq: u32, interface: u32,
    origin: Origin,
]);

/// Payload of [`PUNT_STRAY`]: the ends of a socket that has no flow record.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The server's.
    pub local: EndpointKey,
    /// The client's.
    pub peer: EndpointKey,
}
assert_layout!(Ends, 40, [local: EndpointKey, peer: EndpointKey]);

/// Payload of a large record, a power of two (for the verifier); longer skbs make several records.
pub const PUNT_CHUNK_BYTES: usize = 16_384;
/// Payload of a small record: a request head with a small body.
pub const PUNT_SMALL_BYTES: usize = 2_048;
/// The most records that one skb may make. An skb is at most 512 KiB (BIG TCP); a longer one kills its flow.
pub const PUNT_MAX_CHUNKS: u32 = 32;
/// Size of `PUNTS`, in bytes.
pub const PUNTS_BYTES: u32 = 16 << 20;
/// Bytes in `PUNTS` from which on the gate holds the senders of punted flows back.
pub const PUNTS_BRAKE_BYTES: u64 = 4 << 20;

/// Bytes for the server, as if the client had sent them.
pub const INJECT_TO_SERVER: u32 = 1;
/// Bytes for the client, as if the server had sent them.
pub const INJECT_TO_CLIENT: u32 = 2;
/// No bytes: the flow goes back to the kernel if the daemon was given nothing more meanwhile.
pub const INJECT_HAND_BACK: u32 = 3;
/// No bytes for anybody: breaks the sink, once.
pub const INJECT_TO_SINK: u32 = 4;

/// Header of a datagram that the daemon sends to the inject program.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InjectHeader {
    /// Socket cookie of the flow.
    pub cookie: u64,
    /// `INJECT_HAND_BACK`: the word that `Flow::ctl` must be for the hand-back to take place.
    pub expected_ctl: u64,
    /// `INJECT_HAND_BACK`: the word that it becomes.
    pub new_ctl: u64,
    /// `INJECT_HAND_BACK`: `Flow::remaining_bytes`.
    pub remaining_bytes: u64,
    /// `INJECT_HAND_BACK`: `Flow::chunked`.
    pub chunked: u64,
    /// `INJECT_HAND_BACK`: serial of the grant that the request used; 0: none.
    pub grant_serial: u64,
    /// `INJECT_*`.
    pub kind: u32,
    /// `INJECT_HAND_BACK`: `Flow::write_seq_mark`.
    pub write_seq_mark: u32,
    /// `INJECT_HAND_BACK`: `FLOW_*` bits to set in `Flow::flags`.
    pub flags: u32,
    /// `INJECT_TO_CLIENT`: 1 if the answer is a refusal that counts against its client, else 0.
    pub refusal: u32,
}
assert_layout!(InjectHeader, 64, [
    cookie: u64, expected_ctl: u64, new_ctl: u64, remaining_bytes: u64, chunked: u64, grant_serial: u64, kind: u32,
    write_seq_mark: u32, flags: u32, refusal: u32,
]);

/// Entries of `INJECTORS`.
pub const MAX_INJECTORS: u32 = 8;
