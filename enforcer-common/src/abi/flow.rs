//! Flow records.

use super::{Caller, EndpointKey, GRANT_BUCKETS, Origin, assert_layout};
use crate::head::{LAYOUT_WORDS, Layout};

/// Layouts of heads that a flow remembers: an agent's calls come in a few shapes.
pub const FLOW_LAYOUTS: usize = 4;

/// Grants that a flow remembers one by one: several tokens on one connection are rare.
pub const FLOW_GRANTS: usize = 4;

/// Nothing on the flow is refused: the policy's mode when it was tagged, and at each head since.
pub const FLOW_OBSERVE: u32 = 1;
/// The flow was punted at least once: the daemon may hold state for it.
pub const FLOW_PUNTED_ONCE: u32 = 2;
/// The client sent a request before the one before it was answered. From then on nobody can tell which answers the server still owes,
/// so a refusal ends the connection.
pub const FLOW_PIPELINED: u32 = 4;

/// A guarded connection, what each known head touches first: `FLOWS`, a hash by socket cookie. 65,536 entries; a connection without a record gets nothing.
///
/// Writers: sock_ops makes and deletes it; judge changes it under its socket's lock; inject changes `ctl`, `handed` and the grants
/// while the flow is punted; gate and sock_ops make it dead, and the gate notes refusals. Readers: the CLI.
///
/// A deleted record's memory is another connection's at once, and inject and gate may hold a pointer to it. So the control words of two
/// connections differ (their epochs begin with their cookies), what must not be a stranger's is changed by compare-and-swap only, and
/// what inject writes beside it, no judge reads but behind its own flow's hand-back.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// State, punt epoch and punted bytes in one word, so that owner changes are one compare-and-swap:
    /// see [`crate::flow::Ctl`].
    pub ctl: u64,
    /// Heads seen.
    pub requests: u64,
    /// `CLOCK_BOOTTIME` of the last request head, in nanoseconds.
    pub last_request_ns: u64,
    /// The server's send sequence when the last head came, to tell whether that request was answered.
    pub write_seq_mark: u32,
    /// `FLOW_*` bits. Writers: sock_ops at the start, then judge.
    pub flags: u32,
    /// The protected endpoint.
    pub endpoint_id: u32,
    /// Index in `REPLIES` of the endpoint's answer while no daemon lives.
    pub unavailable_reply_id: u32,
    /// Heads allowed on the fast path.
    pub allowed: u64,
    /// Where in `layouts` the next one goes. Wraps.
    pub next_layout: u64,
    /// Serials of the last grants that requests on this flow used, the last one first; 0: none. See [`crate::flow::use_grant`].
    pub grants: [u64; FLOW_GRANTS],
    /// Layouts of the last known heads of different layout: see [`crate::head::Layout`].
    pub layouts: [[u64; LAYOUT_WORDS]; FLOW_LAYOUTS],
    /// Bytes left of the body in states `BODY` and `DISCARD`.
    pub remaining_bytes: u64,
    /// Chunk decoder in state `CHUNKED`: see [`crate::chunked::Chunked::to_bits`].
    pub chunked: u64,
    /// Network namespace cookie of the server's socket.
    pub netns_cookie: u64,
    /// `CLOCK_BOOTTIME` of the tag, in nanoseconds.
    pub opened_ns: u64,
    /// Requests that the kernel refused itself.
    pub refused: u64,
    /// Requests handed to the daemon.
    pub punts: u64,
    /// Bytes handed to the daemon.
    pub punted_bytes: u64,
    /// The server's end.
    pub local: EndpointKey,
    /// The client's end.
    pub peer: EndpointKey,
    /// Which grants are no longer in `grants`: bit `n` stands for all whose [`super::grant_bit`] is `n`.
    pub evicted_grants: u64,
    /// Interface that the server's socket is bound to; 0: none.
    pub interface: u32,
    /// Bytes that were dropped without waking the server; the kernel goes on counting them as unread. Wraps.
    pub swallowed_bytes: u32,
    /// Sequence number of the client's next byte that the judge has not seen.
    pub next_byte_seq: u32,
    /// The current head is over a limit: 1 and the step of [`crate::limit::RETRY_AFTER_SECS`]; 0: it is not.
    pub limited: u32,
    /// The key that the record is kept under.
    pub cookie: u64,
    /// What the last hand-back left for the judge.
    pub handed: Handed,
    /// Who is calling.
    pub caller: Caller,
    /// What the digests of its heads say of where they come from.
    pub origin: Origin,
    /// Limit buckets in which it has a place: those of the grant that its last request used.
    pub buckets: [u32; GRANT_BUCKETS],
    /// Serial and generation of that grant, as [`super::held_as`] puts them together; 0: none.
    pub held_serial: u64,
    /// Answers that refused something which the client did. Wraps. Writers: judge, and inject while the flow is punted.
    pub refusals: u32,
    /// Those that its source was charged for. Writer: gate.
    pub noted_refusals: u32,
    /// [`super::SourceKey::cgroup_id`] of what its last head without a grant was charged to.
    pub charged_cgroup_id: u64,
}

/// What a hand-back tells the judge, which makes it its own when it next runs: [`crate::flow::settle`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handed {
    /// [`Flow::remaining_bytes`].
    pub remaining_bytes: u64,
    /// [`Flow::chunked`].
    pub chunked: u64,
    /// Serial of the grant that the request used; 0: none.
    pub grant_serial: u64,
    /// [`Flow::write_seq_mark`].
    pub write_seq_mark: u32,
    /// `FLOW_*` bits to set.
    pub flags: u32,
}
assert_layout!(Handed, 32, [
    remaining_bytes: u64, chunked: u64, grant_serial: u64, write_seq_mark: u32, flags: u32,
]);

const NOWHERE: EndpointKey = EndpointKey { addr: [0; 16], port: 0, family: 0, zero: 0 };

impl Flow {
    /// A record of nothing. Its state is none at all: no byte passes.
    pub const BLANK: Self = Self {
        ctl: 0,
        requests: 0,
        last_request_ns: 0,
        write_seq_mark: 0,
        flags: 0,
        endpoint_id: 0,
        unavailable_reply_id: 0,
        allowed: 0,
        next_layout: 0,
        grants: [0; FLOW_GRANTS],
        layouts: [Layout::NONE.words; FLOW_LAYOUTS],
        remaining_bytes: 0,
        chunked: 0,
        netns_cookie: 0,
        opened_ns: 0,
        refused: 0,
        punts: 0,
        punted_bytes: 0,
        local: NOWHERE,
        peer: NOWHERE,
        evicted_grants: 0,
        interface: 0,
        swallowed_bytes: 0,
        next_byte_seq: 0,
        limited: 0,
        cookie: 0,
        handed: Handed { remaining_bytes: 0, chunked: 0, grant_serial: 0, write_seq_mark: 0, flags: 0 },
        caller: Caller::UNKNOWN,
        origin: Origin::NONE,
        buckets: [0; GRANT_BUCKETS],
        held_serial: 0,
        refusals: 0,
        noted_refusals: 0,
        charged_cgroup_id: 0,
    };
}
assert_layout!(Flow, 512, [
    ctl: u64, requests: u64, last_request_ns: u64, write_seq_mark: u32, flags: u32, endpoint_id: u32, unavailable_reply_id: u32, allowed: u64, next_layout: u64, grants: [u64; FLOW_GRANTS], layouts: [[u64; LAYOUT_WORDS]; FLOW_LAYOUTS], remaining_bytes: u64, chunked: u64, netns_cookie: u64, opened_ns: u64, refused: u64, punts: u64, punted_bytes: u64, local: EndpointKey, peer: EndpointKey, evicted_grants: u64, interface: u32, swallowed_bytes: u32, next_byte_seq: u32, limited: u32, cookie: u64, handed: Handed, caller: Caller, origin: Origin, buckets: [u32; GRANT_BUCKETS], held_serial: u64, refusals: u32, noted_refusals: u32, charged_cgroup_id: u64,
]);

/// Size of `FLOWS`.
pub const MAX_FLOWS: u32 = 65_536;
/// Size of `SOCKETS`. Larger than [`MAX_FLOWS`], because a connection without a flow record is dropped by the judge at once, while
/// one that is not in here needs the gate. Elements are allocated one by one, only the buckets beforehand.
pub const MAX_SOCKETS: u32 = 1 << 18;
