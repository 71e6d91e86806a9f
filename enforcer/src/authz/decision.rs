//! What is decided about a request, and under which circumstances.

use crate::http::answer::Answer;
use crate::http::head::{self, Framing};
use crate::workload::BindFault;

/// What a token signed with an unknown key leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyLookup {
    /// [`Decision::NeedKey`]: the caller may refresh the issuer's keys once and decide again.
    MayRefresh,
    /// A 401: the refresh has been made, or is not allowed now.
    Final,
}

/// Bounds and circumstances of a decision.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Longest head in bytes, with its last CRLFCRLF.
    pub max_head_bytes: usize,
    /// What a token signed with an unknown key leads to.
    pub key_lookup: KeyLookup,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_head_bytes: head::DEFAULT_MAX_HEAD_BYTES, key_lookup: KeyLookup::MayRefresh }
    }
}

/// How long the same head may get the same answer without being judged again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheFor {
    /// Not at all.
    Never,
    /// Some seconds: time or new keys may change the answer.
    Short,
    /// As long as the policy stands: the answer depends on nothing but head and policy.
    UntilPolicyChange,
}

/// What happens to a request.
#[derive(Clone, PartialEq, Eq)]
#[must_use]
pub enum Decision<'h, V> {
    /// It goes to the server.
    Allow {
        /// Position among the endpoint's servers.
        server_index: usize,
        /// What the token says.
        verified: V,
        /// The token itself, for its fingerprint. Never log it.
        token: &'h str,
        /// How long the body is.
        framing: Framing,
        /// The kernel may let the same head through while the grant lives.
        cacheable: bool,
        /// The connection stays open after the request.
        keep_alive: bool,
        /// Only if no other workload presented a token of its principal before: a binding to the first use.
        first_use: bool,
    },
    /// It goes to the server without a token: a public path, or the server's own metadata. It has no body.
    Public {
        /// Position among the endpoint's servers.
        server_index: usize,
        /// Always empty ([`Framing::is_empty`]).
        framing: Framing,
        /// The kernel may let the same head through until the policy changes.
        cacheable: bool,
        /// The connection stays open after the request.
        keep_alive: bool,
    },
    /// The enforcer answers, and the server sees none of the request.
    Answer {
        /// Position among the endpoint's servers, where the path names one.
        server_index: Option<usize>,
        /// The answer.
        answer: Answer,
        /// How much body to discard before the next head; `None` where that is unknown. When the answer closes
        /// the connection, everything that follows is discarded.
        framing: Option<Framing>,
        /// How long the same head may get the same answer from the kernel, on the connections of the same caller.
        cache: CacheFor,
        /// The token is good, and not this caller's.
        misplaced: Option<Misplaced<'h, V>>,
    },
    /// The token names a key that is not at hand.
    NeedKey {
        /// Position among the endpoint's servers.
        server_index: usize,
        /// Issuer identifier.
        issuer: String,
        /// The key's id, chosen by the client.
        kid: String,
    },
}

/// A good token that its caller may not present.
#[derive(Clone, PartialEq, Eq)]
pub struct Misplaced<'h, V> {
    /// What the token says.
    pub verified: V,
    /// The token itself, for its fingerprint. Never log it.
    pub token: &'h str,
    /// Why the caller may not.
    pub fault: BindFault,
}

/// Leaves the token out.
impl<V: std::fmt::Debug> std::fmt::Debug for Decision<'_, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Allow { server_index, framing, cacheable, keep_alive, .. } => f
                .debug_struct("Allow")
                .field("server_index", server_index)
                .field("framing", framing)
                .field("cacheable", cacheable)
                .field("keep_alive", keep_alive)
                .finish_non_exhaustive(),
            Self::Public { server_index, cacheable, .. } => f
                .debug_struct("Public")
                .field("server_index", server_index)
                .field("cacheable", cacheable)
                .finish_non_exhaustive(),
            Self::Answer { server_index, answer, framing, cache, .. } => f
                .debug_struct("Answer")
                .field("server_index", server_index)
                .field("status", &answer.status)
                .field("reason", &answer.reason)
                .field("close", &answer.close)
                .field("framing", framing)
                .field("cache", cache)
                .finish(),
            Self::NeedKey { issuer, kid, .. } => {
                f.debug_struct("NeedKey").field("issuer", issuer).field("kid", kid).finish_non_exhaustive()
            }
        }
    }
}
