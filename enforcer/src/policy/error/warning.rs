//! What is allowed and should be known.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

/// Something that is allowed but that its author should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The file's name as it was given.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: u64,
    /// Column in characters, from 1.
    pub column: u64,
    /// The field's path.
    pub field: String,
    /// What to know.
    pub caution: Caution,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}: warning: {}", self.file, self.line, self.column, self.field, self.caution)
    }
}

/// What a [`Warning`] is about.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant's message says what it and its fields are")]
pub enum Caution {
    #[error("observe mode: nothing is refused, requests without a valid token reach the servers")]
    Observe,
    #[error("{endpoint} is open on every interface; the requests are checked, but consider one address")]
    WildcardListen { endpoint: String },
    #[error(
        "tokens for `{resource}` travel over plain http and can be read on the way; use https in front of it"
    )]
    PlainHttpResource { resource: String },
    #[error(
        "`{resource}` is https on this very port: a server that speaks TLS itself can't be checked, its bytes must be plain HTTP"
    )]
    TlsOnListener { resource: String },
    #[error("`jwt` also fits ID tokens; only the audience then keeps them out")]
    PlainJwtType,
    #[error("the issuer identifier is plain http on another host; RFC 8414 asks for https")]
    PlainHttpIssuer,
    #[error("the file `{path}` is not there yet; until it is, no token of this issuer is accepted")]
    FileMissing { path: String },
    #[error("no server accepts tokens of this issuer")]
    UnusedIssuer,
    #[error("no server's callers and no binding name this workload")]
    UnusedWorkload,
    #[error("no server that this rule is for accepts tokens of its issuer")]
    UnusedBinding,
    #[error("the first workload that presents a token keeps it, also if that one is the thief")]
    FirstUse,
}
