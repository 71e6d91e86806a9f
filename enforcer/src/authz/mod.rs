//! The decision about one request: a pure function of its head, the policy, the keys and the time. A check that becomes
//! stricter moves [`crate::policy::RULES`].

mod decide;
mod decision;
#[cfg(test)]
mod tests;
mod verifier;

pub use decide::{decide, over_limit};
pub use decision::{CacheFor, Decision, KeyLookup, Misplaced, Options};
pub use verifier::{TokenFault, TokenVerifier};
