//! What verification sees of the keys: immutable, cheap to clone, stamped with a time.

use std::sync::Arc;
use std::time::Duration;

use super::{BootInstant, KeySet};
use crate::policy::Issuer;
use crate::token::TokenError;

/// How old an issuer's keys are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Freshness {
    /// Not older than the refresh interval.
    Fresh,
    /// Older, but within the staleness limit: used.
    Stale,
    /// Beyond the staleness limit: not used.
    Expired,
    /// Never loaded.
    Missing,
}

impl Freshness {
    /// Keys of `age` under the limits of `issuer`.
    #[must_use]
    pub fn of(age: Duration, issuer: &Issuer) -> Self {
        if age > issuer.max_staleness {
            Self::Expired
        } else if age > issuer.refresh_interval {
            Self::Stale
        } else {
            Self::Fresh
        }
    }
}

/// One issuer's keys in a [`KeySnapshot`].
#[derive(Debug, Clone)]
pub struct SnapshotEntry {
    /// Whose keys.
    pub issuer: Arc<Issuer>,
    /// The keys; absent before the first successful fetch.
    pub keys: Option<Arc<KeySet>>,
    /// When the fetch that brought (or last confirmed) them began.
    pub fetched_at: BootInstant,
}

/// The keys of all issuers at one point in time.
#[derive(Debug, Clone)]
pub struct KeySnapshot {
    entries: Arc<[SnapshotEntry]>,
    at: BootInstant,
}

impl KeySnapshot {
    /// A snapshot of `entries`, judged at `at`.
    #[must_use]
    pub fn new(entries: Arc<[SnapshotEntry]>, at: BootInstant) -> Self {
        Self { entries, at }
    }

    /// The same keys, judged at another time.
    #[must_use]
    pub fn at(&self, at: BootInstant) -> Self {
        Self { entries: Arc::clone(&self.entries), at }
    }

    /// State of an issuer's keys.
    #[must_use]
    pub fn freshness(&self, issuer: &Issuer) -> Freshness {
        match self.entry(issuer) {
            Some(entry) if entry.keys.is_some() => {
                Freshness::of(self.at.saturating_since(entry.fetched_at), &entry.issuer)
            }
            _ => Freshness::Missing,
        }
    }

    /// The keys of exactly this issuer.
    ///
    /// # Errors
    /// [`TokenError::KeysUnavailable`] if they were never loaded or are past the staleness limit.
    pub fn of_issuer(&self, issuer: &Issuer) -> Result<&KeySet, TokenError> {
        let usable = matches!(self.freshness(issuer), Freshness::Fresh | Freshness::Stale);
        self.entry(issuer)
            .filter(|_| usable)
            .and_then(|entry| entry.keys.as_deref())
            .ok_or_else(|| TokenError::KeysUnavailable { issuer: issuer.name.clone() })
    }

    /// Found by name and identifier: after a policy change, a snapshot of the old policy must not lend the keys of an
    /// issuer that only shares its name.
    fn entry(&self, issuer: &Issuer) -> Option<&SnapshotEntry> {
        self.entries
            .iter()
            .find(|entry| entry.issuer.name == issuer.name && entry.issuer.issuer == issuer.issuer)
    }
}
