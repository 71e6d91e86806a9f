//! Every outcome in the kernel has a counter.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)+) => {
        /// An outcome in the kernel: index in `COUNTERS`, a per-CPU array. Writers: the programs. Reader: the CLI.
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Counter { $($(#[$doc])* $name = $value,)+ }

        impl Counter {
            /// All counters, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Stable name, for people and for metrics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The counter of a number.
            #[must_use]
            pub fn from_index(index: u32) -> Option<Self> {
                Self::ALL.iter().copied().find(|counter| *counter as u32 == index)
            }
        }
    };
}

counters! {
    /// A connection to a protected endpoint was tagged.
    FlowTagged = 0, "flow-tagged";
    /// A tagged connection closed.
    FlowClosed = 1, "flow-closed";
    /// `FLOWS` was full: the connection gets nothing.
    FlowTableFull = 2, "flow-table-full";
    /// The socket could not be guarded and was cut off.
    SocketFenced = 3, "socket-fenced";
    /// Bytes on a guarded socket without a flow record were dropped.
    NoFlow = 4, "no-flow";
    /// A known head passed.
    Allowed = 5, "allowed";
    /// A known head of a public path passed.
    AllowedPublic = 6, "allowed-public";
    /// Body bytes passed (one count per skb).
    BodyPassed = 7, "body-passed";
    /// A known head was answered by the kernel.
    Refused = 8, "refused";
    /// The kernel answered 503 because the daemon shows no sign of life.
    RefusedUnavailable = 9, "refused-unavailable";
    /// Bytes of a refused request's body were dropped (one count per skb).
    BodyDiscarded = 10, "body-discarded";
    /// An unknown head went to the daemon.
    PuntUnknown = 11, "punt-unknown";
    /// A head that is not whole in its skb, or over the kernel's limit, went to the daemon.
    PuntIncomplete = 12, "punt-incomplete";
    /// A head with an unusual line end or `Content-Length` went to the daemon.
    PuntIrregular = 13, "punt-irregular";
    /// A verdict was found, but its generation or deadline is past.
    PuntStaleVerdict = 14, "punt-stale-verdict";
    /// A verdict was found, but its grant is gone, expired or revoked.
    PuntStaleGrant = 15, "punt-stale-grant";
    /// A known refusal that does not fit into its request went to the daemon.
    PuntReplyTooLong = 16, "punt-reply-too-long";
    /// Further bytes of a request that the daemon owns (one count per skb).
    PuntContinued = 17, "punt-continued";
    /// The ring buffer was full: the flow is dead.
    DeadRingFull = 18, "dead-ring-full";
    /// An skb was longer than can be handed to the daemon: the flow is dead.
    DeadTooLong = 19, "dead-too-long";
    /// Bytes after the end of a request whose answer is not there yet (pipelining): the flow is dead.
    DeadPipelined = 20, "dead-pipelined";
    /// A chunked body broke its framing: the flow is dead.
    DeadChunked = 21, "dead-chunked";
    /// A helper failed: the flow is dead.
    DeadHelper = 22, "dead-helper";
    /// The daemon shows no sign of life and the 503 does not fit: the flow is dead.
    DeadUnavailable = 23, "dead-unavailable";
    /// A refusal would have overtaken the server's answer: the flow is dead.
    DeadUnanswered = 24, "dead-unanswered";
    /// Bytes on a dead flow were dropped (one count per skb).
    DeadDropped = 25, "dead-dropped";
    /// No scratch memory was free on this CPU: the flow is dead.
    DeadScratch = 26, "dead-scratch";
    /// Bytes from the daemon went to a server.
    Injected = 27, "injected";
    /// An answer from the daemon went to a client.
    Answered = 28, "answered";
    /// A flow went back from the daemon to the kernel.
    HandedBack = 29, "handed-back";
    /// A hand-back found that more bytes had been punted meanwhile; the daemon tries again.
    HandBackLate = 30, "hand-back-late";
    /// A datagram of the daemon was malformed or its flow is gone.
    InjectFailed = 31, "inject-failed";
    /// Observe mode: a request passed that enforce would have refused in the kernel.
    WouldRefuse = 32, "would-refuse";
    /// Observe mode: bytes passed on a flow that could not be followed (one count per skb).
    OpaquePassed = 33, "opaque-passed";
    /// A flow's event for the daemon was lost because the ring buffer was full.
    EventLost = 34, "event-lost";
    /// The end of the client's stream passed: a packet without bytes.
    EndPassed = 35, "end-passed";
    /// A known refusal went to the daemon because the server's socket is blocking.
    PuntBlockingServer = 36, "punt-blocking-server";
    /// The rest of a refused body and the next head came in one packet: the daemon takes them apart.
    PuntBehindDiscard = 37, "punt-behind-discard";
    /// The gate dropped a packet with bytes for a socket that should be guarded and is not.
    GateStray = 38, "gate-stray";
    /// The gate dropped a packet with bytes for a dead flow.
    GateDead = 39, "gate-dead";
    /// The gate dropped a packet for a flow of the daemon because the ring buffer is filling; its sender will repeat it.
    GateRing = 40, "gate-ring";
    /// The gate dropped a packet because the server leaves too many bytes unread; its sender will repeat it.
    GateUnread = 41, "gate-unread";
    /// The gate dropped a SYN that asked a protected endpoint for MPTCP; its sender will ask for TCP.
    GateMptcp = 42, "gate-mptcp";
    /// The gate dropped a datagram for a protected endpoint.
    GateDatagram = 43, "gate-datagram";
    /// The gate dropped a packet for a connection that is not accepted yet, because its server was seen to read what was not
    /// judged; its sender will repeat it.
    GateHeld = 44, "gate-held";
    /// The server read bytes that were not judged (`splice`, zero-copy receive), or some are missing: the flow is dead.
    DeadUnjudged = 45, "dead-unjudged";
    /// A judge ran inside another one on its CPU, in scratch memory of its own.
    ScratchNested = 46, "scratch-nested";
    /// A packet's first bytes had come before (overlapping segments) and were cut off.
    OverlapCut = 47, "overlap-cut";
    /// The gate dropped a packet that is marked urgent.
    GateUrgent = 48, "gate-urgent";
    /// An answer of the kernel could not be sent: the flow is dead.
    DeadReplyFailed = 49, "dead-reply-failed";
    /// The gate dropped a packet with bytes because the server set `SO_RCVLOWAT`; its sender will repeat it.
    GateLowWater = 50, "gate-low-water";
    /// A tagged connection's caller is a process on this host, and known.
    CallerJoined = 51, "caller-joined";
    /// A tagged connection's caller is not known: it is elsewhere, outside of the cgroup, or was forgotten.
    CallerUnknown = 52, "caller-unknown";
    /// A request over a limit was answered 429 by the kernel.
    Limited = 53, "limited";
    /// A request over a limit went to the daemon, which answers it.
    PuntLimited = 54, "punt-limited";
    /// A request that has no grant was over its source's limit.
    SourceLimited = 55, "source-limited";
    /// A bucket could not be read, or many changed it at once: the request was refused as over its limit.
    BucketFailed = 56, "bucket-failed";
    /// Observe mode: a request passed that was over a limit.
    WouldLimit = 57, "would-limit";
    /// A process was not let connect to a protected endpoint.
    ConnectRefused = 58, "connect-refused";
    /// The shield dropped a packet whose source an operator put on its list.
    ShieldListed = 59, "shield-listed";
    /// The shield dropped a packet of a quarantined source.
    ShieldQuarantined = 60, "shield-quarantined";
    /// The shield dropped a packet because its source sends too many.
    ShieldPackets = 61, "shield-packets";
    /// The shield dropped a SYN because its source makes too many connections.
    ShieldConnections = 62, "shield-connections";
    /// The shield dropped a datagram for a protected endpoint.
    ShieldDatagram = 63, "shield-datagram";
    /// The shield dropped a packet for a protected address whose port can't be read.
    ShieldUnreadable = 64, "shield-unreadable";
    /// The shield dropped a packet because there was no room to count its source.
    ShieldSourcesFull = 65, "shield-sources-full";
    /// A helper failed: the shield dropped the packet.
    ShieldHelper = 66, "shield-helper";
    /// The shield took MPTCP's option out of a SYN, which passed.
    ShieldMptcp = 67, "shield-mptcp";
    /// Observe mode: a packet passed that the shield would have dropped.
    ShieldWouldDrop = 68, "shield-would-drop";
    /// A source was quarantined: too many of its requests were refused.
    SourceQuarantined = 69, "source-quarantined";
    /// A request for the daemon was over its source's limit, and the kernel could not answer it: the flow is dead.
    DeadLimited = 70, "dead-limited";
}

/// Size of `COUNTERS`.
pub const MAX_COUNTERS: u32 = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_numbered_without_gaps_and_named_uniquely() {
        let mut names = std::collections::BTreeSet::new();
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
            assert_eq!(Counter::from_index(index as u32), Some(*counter));
            assert!(names.insert(counter.name()));
        }
        assert!(Counter::ALL.len() <= MAX_COUNTERS as usize);
    }
}
