//! The task that keeps key sets fresh.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::fetch::{FetchError, Fetched, FileStamp, fetch};
use super::store::{Action, IssuerStatus, KeyStore, UnknownKid};
use super::{BootInstant, KeySnapshot};
use crate::policy::{Issuer, Policy};

/// Longest time that a request waits for a refresh that its `kid` asked for.
const UNKNOWN_KID_WAIT: Duration = Duration::from_secs(3);
/// tokio's timers stand still while the machine is suspended; the boot clock does not. Looking at it this often bounds
/// how late a refresh can be after a resume.
const MAX_SLEEP: Duration = Duration::from_secs(5);

/// Starts key management; see [`KeyManagerHandle`].
#[derive(Debug)]
pub struct KeyManager;

/// A handle on the running key management. It ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct KeyManagerHandle {
    shared: Arc<Shared>,
    _task: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<KeyStore>,
    /// The newest keys, sent after every finished fetch, failed or not.
    published: watch::Sender<KeySnapshot>,
    /// The store has an earlier due time than the task knows of.
    wake: Notify,
}

#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl KeyManager {
    /// Starts fetching the keys of all of `policy`'s issuers, at once and then ahead of their expiry.
    ///
    /// # Panics
    /// Outside of a tokio runtime with its time and I/O drivers enabled.
    #[must_use = "dropping the handle ends it"]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "a policy is shared, and callers hand over their reference"
    )]
    pub fn start(policy: Arc<Policy>) -> KeyManagerHandle {
        let now = BootInstant::now();
        let seed = now.since_boot().as_nanos() as u64 ^ (u64::from(std::process::id()) << 40);
        Self::run(KeyStore::new(policy.issuers.iter().map(Arc::clone), now, seed), now)
    }

    fn run(store: KeyStore, now: BootInstant) -> KeyManagerHandle {
        let published = watch::Sender::new(store.snapshot(now));
        let shared = Arc::new(Shared { store: Mutex::new(store), published, wake: Notify::new() });
        let task = tokio::spawn(run(Arc::clone(&shared)));
        KeyManagerHandle { shared, _task: Arc::new(AbortOnDrop(task.abort_handle())) }
    }
}

impl KeyManagerHandle {
    /// Starts key management for another policy, beside this one: issuers that have their keys from the same place as before start
    /// with the keys known here.
    ///
    /// # Panics
    /// As [`KeyManager::start`].
    #[must_use = "dropping the handle ends it"]
    pub fn following(&self, policy: &Policy) -> Self {
        let now = BootInstant::now();
        KeyManager::run(self.shared.store().following(policy.issuers.iter().map(Arc::clone), now), now)
    }

    /// The keys as of now. Cheap: two reference counts and a clock read. Take a new one for each verification, for a kept
    /// one does not age.
    #[must_use]
    pub fn snapshot(&self) -> KeySnapshot {
        self.shared.published.borrow().at(BootInstant::now())
    }

    /// For a token that failed with [`TokenError::UnknownKey`](crate::token::TokenError::UnknownKey): waits for one fetch
    /// of the issuer's keys if one is due or running, at most 3 s, and returns the newest keys. Verify once more with
    /// them and then refuse. Returns at once when the issuer was asked a moment ago or is known not to have the key, so
    /// a flood of invented `kid`s costs the issuer one request per 10 s.
    pub async fn refresh_for_unknown_kid(&self, issuer_name: &str, kid: &str) -> KeySnapshot {
        let mut published = self.shared.published.subscribe();
        let (answer, finished) = {
            let mut store = self.shared.store();
            (store.on_unknown_kid(issuer_name, kid, BootInstant::now()), store.finished(issuer_name))
        };
        match answer {
            UnknownKid::Refreshing => {
                self.shared.wake.notify_one();
                let fetched = async {
                    while self.shared.store().finished(issuer_name) == finished {
                        if published.changed().await.is_err() {
                            break;
                        }
                    }
                };
                // Too late is no error: the caller sees the keys that there are.
                let _ = tokio::time::timeout(UNKNOWN_KID_WAIT, fetched).await;
            }
            UnknownKid::Limited { .. } => self.shared.wake.notify_one(),
            UnknownKid::Known | UnknownKid::Missing | UnknownKid::NoSuchIssuer => {}
        }
        self.snapshot()
    }

    /// Waits until every issuer's keys were loaded once; `false` if that takes longer than `timeout`.
    pub async fn wait_initial(&self, timeout: Duration) -> bool {
        let mut published = self.shared.published.subscribe();
        let loaded = async {
            while !self.shared.store().all_loaded() {
                if published.changed().await.is_err() {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(timeout, loaded).await;
        self.shared.store().all_loaded()
    }

    /// State of every issuer's keys, in policy's order.
    #[must_use]
    pub fn status(&self) -> Vec<IssuerStatus> {
        self.shared.store().status(BootInstant::now())
    }
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, KeyStore> {
        // The store is changed only by its own methods, which leave it whole at every point where they could panic.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Finished = (Arc<Issuer>, Result<(Fetched, Option<FileStamp>), FetchError>);

async fn run(shared: Arc<Shared>) {
    let mut fetches: JoinSet<Finished> = JoinSet::new();
    let mut running: HashMap<tokio::task::Id, Arc<Issuer>> = HashMap::new();
    let mut stamps: HashMap<String, FileStamp> = HashMap::new();
    loop {
        let sleep = loop {
            let now = BootInstant::now();
            // Bound to a name so that the lock is released before anything else happens.
            let action = shared.store().next_action(now);
            match action {
                Action::Fetch(issuer) => {
                    let known = stamps.get(&issuer.name).copied();
                    let fetched = Arc::clone(&issuer);
                    let task = fetches.spawn(async move {
                        let result = fetch(&fetched, known).await;
                        (fetched, result)
                    });
                    running.insert(task.id(), issuer);
                }
                Action::Wait(until) => {
                    break until.map_or(MAX_SLEEP, |until| until.saturating_since(now)).min(MAX_SLEEP);
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(sleep) => {}
            () = shared.wake.notified() => {}
            Some(ended) = fetches.join_next_with_id() => {
                let (id, finished) = match ended {
                    Ok((id, (_, result))) => (id, result),
                    Err(error) => (error.id(), Err(FetchError::Task { defect: error.to_string() })),
                };
                if let Some(issuer) = running.remove(&id) {
                    finish(&shared, &mut stamps, &issuer, finished);
                }
            }
        }
    }
}

fn finish(
    shared: &Shared,
    stamps: &mut HashMap<String, FileStamp>,
    issuer: &Issuer,
    finished: Result<(Fetched, Option<FileStamp>), FetchError>,
) {
    let result = finished.map(|(fetched, stamp)| {
        if let Some(stamp) = stamp {
            stamps.insert(issuer.name.clone(), stamp);
        }
        fetched
    });
    match &result {
        Ok(Fetched::Unchanged) => {}
        Ok(Fetched::Keys(set)) => {
            tracing::info!(issuer = issuer.name, keys = set.len(), "key set loaded");
            for skipped in set.skipped() {
                tracing::warn!(issuer = issuer.name, "{skipped}");
            }
        }
        Err(error) => tracing::warn!(issuer = issuer.name, %error, "key set not loaded"),
    }
    let now = BootInstant::now();
    let mut store = shared.store();
    store.on_fetched(&issuer.name, result, now);
    shared.published.send_replace(store.snapshot(now));
}
