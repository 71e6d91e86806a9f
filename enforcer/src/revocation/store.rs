//! What outlives the kernel's memory: the revocations and the key of the token fingerprints, in files for root alone. And what the
//! next daemon needs of this one: the policy.
//!
//! `/var/lib/enforcer/<pin name>/` holds `revocations.json`, `fingerprint.key`, `policy.json` and `lock`. Files are written beside their place,
//! synced, and renamed, so a crash leaves the old one or the new one. Whoever changes revocations, in the map or here, holds
//! the lock; so does a starting daemon until its maps are in their place, so that no revocation falls between the file that
//! it has read and the maps that nobody sees yet.

mod document;
mod policy;

use document::Document;
pub use document::parse_hex;
pub use policy::RecordedPolicy;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use ring::rand::{SecureRandom, SystemRandom};

use super::Revocations;

/// Where the directories of the enforcements lie, unless told otherwise.
pub const STATE_DIR: &str = "/var/lib/enforcer";

const FILE: &str = "revocations.json";
const KEY_FILE: &str = "fingerprint.key";
const LOCK_FILE: &str = "lock";
/// Longest file that is read, in bytes: a full list of the longest names takes less.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// How long another command may hold the lock. A starting daemon holds it while it loads the programs.
const LOCK_LIMIT: Duration = Duration::from_secs(20);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Why the state can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file or the directory can't be read or written.
    #[error("cannot use {path}: {source}; --state-dir names another directory")]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error(
        "{path} is damaged: {reason}; put back a copy, or remove it if every token that it may name has ended"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Another command, or a starting daemon, is at it.
    #[error("{path} is locked by another command or a starting daemon; try again")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
}

/// What is recorded of the revocations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recorded {
    /// The number of the next revocation.
    pub next_id: u64,
    /// The longest that a token may be accepted by the policy that was loaded last, in seconds.
    pub token_life_secs: u64,
    /// The revocations.
    pub revocations: Revocations,
}

/// The directory of one enforcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir(PathBuf);

/// The lock, held until dropped.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
}

impl StateDir {
    /// Of the enforcement `pin_name`, in `base`.
    #[must_use]
    pub fn new(base: &Path, pin_name: &str) -> Self {
        Self(base.join(pin_name))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Waits for the lock; makes the directory where it is missing.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn lock(&self) -> Result<StateLock, StateError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(unusable(&self.0))?;
        let path = self.0.join(LOCK_FILE);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(unusable(&path))?;
        let end = Instant::now() + LOCK_LIMIT;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => return Ok(StateLock { _file: file }),
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= end => {
                    return Err(StateError::Locked { path });
                }
                Err((back, Errno::EWOULDBLOCK)) => file = back,
                Err((_, error)) => return Err(unusable(&path)(error.into())),
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }

    /// The recorded revocations; `None`: nothing was ever recorded here.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn read(&self) -> Result<Option<Recorded>, StateError> {
        let path = self.0.join(FILE);
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let document = serde_json::from_slice::<Document>(&bytes).map_err(|error| error.to_string());
        let recorded = document.and_then(|document| document.recorded());
        recorded.map(Some).map_err(|reason| StateError::Damaged { path, reason })
    }

    /// Records revocations in place of those before. Hold the lock.
    ///
    /// # Errors
    /// See [`StateError`]; what was recorded before stands.
    pub fn write(&self, _lock: &StateLock, recorded: &Recorded) -> Result<(), StateError> {
        let path = self.0.join(FILE);
        let bytes =
            serde_json::to_vec(&Document::of(recorded)).map_err(|error| unusable(&path)(error.into()))?;
        replace(&path, &bytes)
    }

    /// The key of the token fingerprints; `None`: there is none yet.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn read_fingerprint_key(&self) -> Result<Option<[u8; 32]>, StateError> {
        let path = self.0.join(KEY_FILE);
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let reason = format!("{} bytes instead of 32", bytes.len());
        let key = <[u8; 32]>::try_from(bytes.as_slice());
        key.map(Some).map_err(|_| StateError::Damaged { path, reason })
    }

    /// The key of the token fingerprints, drawn anew where there is none: it is kept so that a revoked token is known after a
    /// reboot too. Hold the lock.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn fingerprint_key(&self, _lock: &StateLock) -> Result<[u8; 32], StateError> {
        if let Some(key) = self.read_fingerprint_key()? {
            return Ok(key);
        }
        let path = self.0.join(KEY_FILE);
        let mut key = [0; 32];
        SystemRandom::new()
            .fill(&mut key)
            .map_err(|_| unusable(&path)(std::io::Error::other("the kernel gave no random bytes")))?;
        replace(&path, &key)?;
        Ok(key)
    }

    /// Keeps this key of the token fingerprints, by which fingerprints are shown already. Hold the lock.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn keep_fingerprint_key(&self, _lock: &StateLock, key: &[u8; 32]) -> Result<(), StateError> {
        if self.read_fingerprint_key()? == Some(*key) {
            return Ok(());
        }
        replace(&self.0.join(KEY_FILE), key)
    }
}

fn unusable(path: &Path) -> impl Fn(std::io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Unusable { path: path.clone(), source }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => {
            file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(unusable(path))?;
            Ok(Some(bytes))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unusable(path)(error)),
    }
}

/// Replaces a file as a whole, lastingly.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let fresh = path.with_extension("new");
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    })();
    written.map_err(unusable(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use enforcer_common::abi::{
        REVOKE_CLIENT, REVOKE_ISSUER, REVOKE_SERVER, REVOKE_SUBJECT, REVOKE_TOKEN, Revocation,
    };

    use super::*;
    use crate::policy::MAX_LEEWAY_SECS;
    use crate::revocation::tests::revocation;

    #[test]
    fn what_was_recorded_is_read_back_by_root_alone() {
        let place = tempfile::tempdir().unwrap();
        let state = StateDir::new(&place.path().join("lib"), "enforcer");
        assert_eq!(state.read().unwrap(), None);
        let lock = state.lock().unwrap();
        let all = REVOKE_TOKEN | REVOKE_ISSUER | REVOKE_SUBJECT | REVOKE_CLIENT | REVOKE_SERVER;
        let recorded = Recorded {
            next_id: 9,
            token_life_secs: 3720,
            revocations: [(3, revocation(0)), (8, revocation(all)), (5, revocation(REVOKE_SUBJECT))].into(),
        };
        state.write(&lock, &recorded).unwrap();
        assert_eq!(state.read().unwrap(), Some(recorded.clone()));
        state.write(&lock, &Recorded { next_id: 10, ..recorded.clone() }).unwrap();
        assert_eq!(state.read().unwrap(), Some(Recorded { next_id: 10, ..recorded }));
        let key = state.fingerprint_key(&lock).unwrap();
        assert_eq!(state.fingerprint_key(&lock).unwrap(), key);
        assert_eq!(state.read_fingerprint_key().unwrap(), Some(key));
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(state.path()), 0o700);
        for file in [FILE, KEY_FILE, LOCK_FILE] {
            assert_eq!(mode(&state.path().join(file)), 0o600);
        }
    }

    #[test]
    fn a_tokens_own_end_of_the_first_version_gets_the_leeway_that_a_later_policy_may_have() {
        let place = tempfile::tempdir().unwrap();
        let state = StateDir::new(place.path(), "x");
        let lock = state.lock().unwrap();
        let exact = Revocation { exact_end: 1, ..revocation(REVOKE_TOKEN) };
        let revocations = [(1, exact), (2, revocation(REVOKE_SUBJECT))].into();
        state.write(&lock, &Recorded { next_id: 3, token_life_secs: 60, revocations }).unwrap();
        let ends = || -> Vec<u64> {
            let recorded = state.read().unwrap().unwrap();
            recorded.revocations.values().map(|entry| entry.expires_at_unix_secs).collect()
        };
        assert_eq!(ends(), [1_100, 1_100]);
        let file = state.path().join(FILE);
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("\"version\":2", "\"version\":1")).unwrap();
        assert_eq!(ends(), [1_100 + MAX_LEEWAY_SECS, 1_100]);
        // Written anew it is of the second version, and gets no more.
        state.write(&lock, &state.read().unwrap().unwrap()).unwrap();
        assert_eq!(ends(), [1_100 + MAX_LEEWAY_SECS, 1_100]);
    }

    #[test]
    fn a_damaged_file_is_an_error_and_not_an_empty_list() {
        let place = tempfile::tempdir().unwrap();
        let state = StateDir::new(place.path(), "x");
        drop(state.lock().unwrap());
        for text in ["", "{", "[]", r#"{"version":3,"next_id":1,"token_life_s":1,"revocations":[]}"#] {
            std::fs::write(state.path().join(FILE), text).unwrap();
            assert!(matches!(state.read(), Err(StateError::Damaged { .. })), "{text}");
        }
        let row = r#"{"id":1,"revoked_at_unix_s":1,"issued_until_unix_s":1,"expires_at_unix_s":2,"exact_end":false,"token_fingerprint":"xyz"}"#;
        let text = format!(r#"{{"version":1,"next_id":1,"token_life_s":1,"revocations":[{row}]}}"#);
        std::fs::write(state.path().join(FILE), text).unwrap();
        assert!(matches!(state.read(), Err(StateError::Damaged { .. })));
        std::fs::write(state.path().join(KEY_FILE), "short").unwrap();
        assert!(matches!(state.read_fingerprint_key(), Err(StateError::Damaged { .. })));
    }
}
