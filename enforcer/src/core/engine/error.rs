//! Why a flow is destroyed.

/// Why a flow is destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A record is missing.
    #[error("record-lost")]
    RecordLost,
    /// Too many bytes wait for a decision.
    #[error("parked-bytes-full")]
    ParkedFull,
    /// Too many flows.
    #[error("flow-table-full")]
    FlowsFull,
    /// Bytes behind the end of a request that is not answered.
    #[error("pipelined")]
    Pipelined,
    /// An answer of ours would overtake the server's.
    #[error("unanswered")]
    Unanswered,
    /// The chunked body's framing is broken.
    #[error("chunked-broken")]
    ChunkedBroken,
    /// Bytes could not be injected.
    #[error("inject-failed")]
    InjectFailed,
    /// The bytes are not HTTP.
    #[error("not-http")]
    NotHttp,
    /// The head did not arrive in time.
    #[error("head-timeout")]
    HeadTimeout,
    /// The policy does not name the connection's endpoint any more.
    #[error("endpoint-removed")]
    EndpointRemoved,
}

impl EngineError {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::RecordLost => "record-lost",
            Self::ParkedFull => "parked-bytes-full",
            Self::FlowsFull => "flow-table-full",
            Self::Pipelined => "pipelined",
            Self::Unanswered => "unanswered",
            Self::ChunkedBroken => "chunked-broken",
            Self::InjectFailed => "inject-failed",
            Self::NotHttp => "not-http",
            Self::HeadTimeout => "head-timeout",
            Self::EndpointRemoved => "endpoint-removed",
        }
    }
}
