//! When to fetch which key set: a state machine without I/O, with time passed in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::fetch::{FetchError, Fetched};
use super::{BootInstant, Freshness, KeySet, KeySnapshot, SnapshotEntry};
use crate::policy::{Issuer, KeySource};

/// How often a file's metadata is looked at.
const FILE_POLL: Duration = Duration::from_secs(2);
/// Unknown `kid`s start at most one fetch per issuer in this time, whoever sends them.
const MIN_REFETCH: Duration = Duration::from_secs(10);
/// The same for a file.
const MIN_REFETCH_FILE: Duration = Duration::from_secs(1);
/// How long a `kid` that a fresh key set did not hold is taken as missing.
const MISSING_KID_TTL: Duration = Duration::from_secs(30);
const MAX_MISSING_KIDS: usize = 256;
const MAX_ASKED_KIDS: usize = 64;
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// What the caller should do next.
#[derive(Debug, Clone)]
pub enum Action {
    /// Fetch this issuer's keys and report to [`KeyStore::on_fetched`]. Asked for once: the fetch counts as running until
    /// its report.
    Fetch(Arc<Issuer>),
    /// Nothing before this time; `None` when every issuer's fetch is running (or there is no issuer).
    Wait(Option<BootInstant>),
}

/// The answer to a token with a `kid` that its issuer's keys don't have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownKid {
    /// The store has it by now: verify again.
    Known,
    /// A fetch is running or due at once: wait for it, then verify again.
    Refreshing,
    /// The last fetch is too recent. One is due at `until`; refuse the token.
    Limited {
        /// When the next fetch is due.
        until: BootInstant,
    },
    /// A key set fetched since did not have it: refuse the token.
    Missing,
    /// No issuer has this name.
    NoSuchIssuer,
}

/// State of one issuer's keys, for tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerStatus {
    /// Name in policy.
    pub name: String,
    /// Issuer identifier.
    pub issuer: String,
    /// State of its keys.
    pub freshness: Freshness,
    /// Usable keys; 0 when none were loaded.
    pub key_count: usize,
    /// `kid`s of the usable keys that have one, in the document's order.
    pub key_ids: Vec<String>,
    /// Keys of the document that are not used, with the reason.
    pub skipped: Vec<String>,
    /// Time since the fetch that brought or confirmed the keys.
    pub age: Option<Duration>,
    /// What went wrong in the last fetch, and how long ago; absent after a success.
    pub last_error: Option<(String, Duration)>,
    /// Failed fetches since the last success.
    pub failures: u32,
}

/// All issuers' key sets and the schedule of their refreshes.
#[derive(Debug)]
pub struct KeyStore {
    issuers: Vec<IssuerKeys>,
    jitter: Jitter,
}

#[derive(Debug, Clone)]
struct IssuerKeys {
    issuer: Arc<Issuer>,
    keys: Option<Arc<KeySet>>,
    fetched_at: BootInstant,
    /// When to fetch next; ignored while a fetch runs.
    due: BootInstant,
    running: bool,
    last_start: Option<BootInstant>,
    /// Finished fetches, failed or not.
    finished: u64,
    failures: u32,
    last_error: Option<(String, BootInstant)>,
    /// `kid`s that the running or next fetch was asked for.
    asked: VecDeque<String>,
    /// `kid`s that a successful fetch did not bring, oldest first.
    missing: VecDeque<(String, BootInstant)>,
}

impl KeyStore {
    /// A store in which every issuer is due at once. `jitter_seed` spreads the refreshes of several daemons.
    #[must_use]
    pub fn new(issuers: impl IntoIterator<Item = Arc<Issuer>>, now: BootInstant, jitter_seed: u64) -> Self {
        let issuers = issuers.into_iter().map(|issuer| IssuerKeys::unknown(issuer, now)).collect();
        Self { issuers, jitter: Jitter(jitter_seed) }
    }

    /// A store for another policy's issuers. Who has its keys from the same place as before starts with what is known of them, and
    /// with the limits that hold for asking it.
    #[must_use]
    pub fn following(&self, issuers: impl IntoIterator<Item = Arc<Issuer>>, now: BootInstant) -> Self {
        let issuers = issuers.into_iter().map(|issuer| {
            match self.issuers.iter().find(|keys| same_source(&keys.issuer, &issuer)) {
                Some(known) => known.clone().under(issuer, now),
                None => IssuerKeys::unknown(issuer, now),
            }
        });
        Self { issuers: issuers.collect(), jitter: Jitter(self.jitter.0) }
    }

    /// What to do now. Call it until it says [`Action::Wait`].
    pub fn next_action(&mut self, now: BootInstant) -> Action {
        let idle = || self.issuers.iter().filter(|keys| !keys.running).map(|keys| keys.due);
        let wait = Action::Wait(idle().min());
        match self.issuers.iter_mut().find(|keys| !keys.running && keys.due <= now) {
            Some(keys) => {
                keys.running = true;
                keys.last_start = Some(now);
                Action::Fetch(Arc::clone(&keys.issuer))
            }
            None => wait,
        }
    }

    /// A fetch ended. Keys are as old as the fetch's start. A failed one leaves the keys and their age as they are.
    pub fn on_fetched(&mut self, issuer_name: &str, result: Result<Fetched, FetchError>, now: BootInstant) {
        let jitter = self.jitter.next();
        let Some(keys) = self.issuers.iter_mut().find(|keys| keys.issuer.name == issuer_name) else { return };
        keys.running = false;
        keys.finished += 1;
        let asked = std::mem::take(&mut keys.asked);
        let set = match (result, &keys.keys) {
            (Ok(Fetched::Keys(set)), _) => Arc::new(set),
            (Ok(Fetched::Unchanged), Some(set)) => Arc::clone(set),
            (Ok(Fetched::Unchanged), None) => return keys.failed(&FetchError::NothingToKeep, jitter, now),
            (Err(error), _) => return keys.failed(&error, jitter, now),
        };
        for kid in asked {
            if !set.contains(&kid) {
                keys.missing.retain(|(known, _)| *known != kid);
                keys.missing.push_back((kid, now));
            }
        }
        while keys.missing.len() > MAX_MISSING_KIDS {
            keys.missing.pop_front();
        }
        keys.keys = Some(set);
        keys.fetched_at = keys.last_start.unwrap_or(now);
        keys.failures = 0;
        keys.last_error = None;
        keys.due = now.saturating_add(keys.refresh_after(jitter));
    }

    /// A token named a `kid` that the issuer's keys don't have.
    pub fn on_unknown_kid(&mut self, issuer_name: &str, kid: &str, now: BootInstant) -> UnknownKid {
        let Some(keys) = self.issuers.iter_mut().find(|keys| keys.issuer.name == issuer_name) else {
            return UnknownKid::NoSuchIssuer;
        };
        if keys.keys.as_ref().is_some_and(|set| set.contains(kid)) {
            return UnknownKid::Known;
        }
        keys.missing.retain(|(_, since)| now.saturating_since(*since) < MISSING_KID_TTL);
        if keys.missing.iter().any(|(missing, _)| missing == kid) {
            return UnknownKid::Missing;
        }
        if keys.asked.len() < MAX_ASKED_KIDS && !keys.asked.iter().any(|asked| asked == kid) {
            keys.asked.push_back(kid.to_owned());
        }
        if keys.running {
            return UnknownKid::Refreshing;
        }
        let allowed_at = keys.last_start.map_or(now, |start| start.saturating_add(keys.min_refetch()));
        keys.due = keys.due.min(allowed_at.max(now));
        if keys.due <= now { UnknownKid::Refreshing } else { UnknownKid::Limited { until: keys.due } }
    }

    /// What verification needs, as of now.
    #[must_use]
    pub fn snapshot(&self, now: BootInstant) -> KeySnapshot {
        let entries = self.issuers.iter().map(|keys| SnapshotEntry {
            issuer: Arc::clone(&keys.issuer),
            keys: keys.keys.clone(),
            fetched_at: keys.fetched_at,
        });
        KeySnapshot::new(entries.collect(), now)
    }

    /// Finished fetches of an issuer, failed or not; 0 for an unknown name.
    #[must_use]
    pub fn finished(&self, issuer_name: &str) -> u64 {
        self.issuers.iter().find(|keys| keys.issuer.name == issuer_name).map_or(0, |keys| keys.finished)
    }

    /// Every issuer has keys (of whatever age).
    #[must_use]
    pub fn all_loaded(&self) -> bool {
        self.issuers.iter().all(|keys| keys.keys.is_some())
    }

    /// State of all issuers, in policy's order.
    #[must_use]
    pub fn status(&self, now: BootInstant) -> Vec<IssuerStatus> {
        self.issuers.iter().map(|keys| keys.status(now)).collect()
    }
}

/// Whether both have their keys from the same place, in the same way.
fn same_source(one: &Issuer, other: &Issuer) -> bool {
    let source = |issuer: &Issuer| {
        let Issuer { name, issuer, keys, ca_file, allow_http_loopback, .. } = issuer.clone();
        (name, issuer, keys, ca_file, allow_http_loopback)
    };
    source(one) == source(other)
}

impl IssuerKeys {
    fn unknown(issuer: Arc<Issuer>, now: BootInstant) -> Self {
        Self {
            issuer,
            keys: None,
            fetched_at: now,
            due: now,
            running: false,
            last_start: None,
            finished: 0,
            failures: 0,
            last_error: None,
            asked: VecDeque::new(),
            missing: VecDeque::new(),
        }
    }

    /// The same keys under changed limits. A fetch that is running reports to the old store only, so it is due here too.
    fn under(self, issuer: Arc<Issuer>, now: BootInstant) -> Self {
        let due = if self.running || *issuer != *self.issuer { now } else { self.due };
        Self { issuer, due, running: false, asked: VecDeque::new(), ..self }
    }

    fn failed(&mut self, error: &FetchError, jitter: f64, now: BootInstant) {
        self.failures = self.failures.saturating_add(1);
        self.last_error = Some((error.to_string(), now));
        let doublings = (self.failures - 1).min(16);
        let backoff = FIRST_BACKOFF.saturating_mul(1 << doublings).min(MAX_BACKOFF);
        self.due = now.saturating_add(backoff.mul_f64(0.75 + 0.5 * jitter));
    }

    /// Ahead of the age at which keys count as stale, and early enough for a retry before they expire.
    fn refresh_after(&self, jitter: f64) -> Duration {
        let interval = self.issuer.refresh_interval.min(self.issuer.max_staleness / 2);
        match self.issuer.keys {
            KeySource::File(_) => interval.min(FILE_POLL).max(FIRST_BACKOFF),
            KeySource::Url(_) | KeySource::Discovery => {
                interval.mul_f64(0.8 + 0.15 * jitter).max(FIRST_BACKOFF)
            }
        }
    }

    fn min_refetch(&self) -> Duration {
        match self.issuer.keys {
            KeySource::File(_) => MIN_REFETCH_FILE,
            KeySource::Url(_) | KeySource::Discovery => MIN_REFETCH,
        }
    }

    fn status(&self, now: BootInstant) -> IssuerStatus {
        let age = self.keys.as_ref().map(|_| now.saturating_since(self.fetched_at));
        let set = self.keys.as_deref();
        IssuerStatus {
            name: self.issuer.name.clone(),
            issuer: self.issuer.issuer.clone(),
            freshness: age.map_or(Freshness::Missing, |age| Freshness::of(age, &self.issuer)),
            key_count: set.map_or(0, KeySet::len),
            key_ids: set
                .map(|set| set.keys().iter().filter_map(|key| key.id().map(str::to_owned)).collect())
                .unwrap_or_default(),
            skipped: set
                .map(|set| set.skipped().iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
            age,
            last_error: self.last_error.as_ref().map(|(text, at)| (text.clone(), now.saturating_since(*at))),
            failures: self.failures,
        }
    }
}

/// SplitMix64: spreads timers, protects nothing.
#[derive(Debug)]
struct Jitter(u64);

impl Jitter {
    /// From 0 (inclusive) to 1 (exclusive).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
