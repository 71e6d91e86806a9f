//! Access token verification: a pure function of token, policy, keys and time.
//!
//! [`verify`] and [`explain`] walk the same list of checks (`pipeline`), so what `enforcer explain` prints is what the
//! daemon does. Nothing in this module does I/O, reads a clock, or keeps a token.

mod claims;
mod error;
mod evidence;
mod fingerprint;
mod header;
pub(crate) mod json;
mod pipeline;
pub(crate) mod signature;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod verified;

pub use error::{Quoted, TokenError, TokenReason};
pub use evidence::Evidence;
pub use fingerprint::{Fingerprint, Fingerprinter};
pub use header::MAX_TOKEN_BYTES;
pub(crate) use header::algorithm_name;
pub use pipeline::{Check, Outcome, explain, verify, verify_again};
pub use verified::{Principal, VerifiedToken, missing_scopes};
