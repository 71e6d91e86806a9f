//! Issuer key sets: where they come from, how long they are trusted.
//!
//! [`KeySet`] parses a JWKS, [`KeyStore`] decides when to fetch one (no I/O, time passed in), [`KeyManager`] fetches, and
//! [`KeySnapshot`] is what verification sees.

mod clock;
mod fetch;
pub mod fetcher;
mod jwk;
mod manager;
#[cfg(test)]
mod manager_tests;
mod set;
#[cfg(test)]
mod set_tests;
mod snapshot;
mod store;
#[cfg(test)]
mod store_tests;
mod transport;

pub use clock::BootInstant;
pub use fetch::{FetchError, Fetched};
pub use jwk::{Key, SkipReason};
pub use manager::{KeyManager, KeyManagerHandle};
pub use set::{KeySet, KeySetError, SkippedKey};
pub use snapshot::{Freshness, KeySnapshot, SnapshotEntry};
pub use store::{Action, IssuerStatus, KeyStore, UnknownKid};
