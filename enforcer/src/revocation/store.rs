//! What outlives the kernel's memory: the revocations and the key of the token fingerprints, in files for root alone. And what the
//! next daemon needs of this one: the policy.
//!
//! `/var/lib/enforcer/<pin name>/` holds `revocations.json`, `fingerprint.key`, `policy.json` and `lock`. Files are written beside their place,
//! synced, and renamed, so a crash leaves the old one or the new one. Whoever changes revocations, in the map or here, holds
//! the lock; so does a starting daemon until its maps are in their place, so that no revocation falls between the file that
//! it has read and the maps that nobody sees yet.

mod policy;

pub use policy::RecordedPolicy;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use enforcer_common::abi::{
    NameHash, REVOKE_CLIENT, REVOKE_ISSUER, REVOKE_SERVER, REVOKE_SUBJECT, REVOKE_TOKEN, REVOKE_WORKLOAD,
    Revocation, Text, text, text_str,
};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use super::Revocations;
use crate::policy::MAX_LEEWAY_SECS;

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
        let damaged = |reason: String| StateError::Damaged { path: path.clone(), reason };
        let document: Document =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if !(FIRST_VERSION..=VERSION).contains(&document.version) {
            return Err(damaged(format!("version {}, where {VERSION} is known", document.version)));
        }
        let revocations = document.revocations.iter().map(|row| {
            let mut revocation = row.revocation()?;
            if document.version == FIRST_VERSION && row.exact_end {
                let end = &mut revocation.expires_at_unix_secs;
                *end = end.saturating_add(MAX_LEEWAY_SECS);
            }
            Some((row.id, revocation))
        });
        let revocations =
            revocations.collect::<Option<_>>().ok_or_else(|| damaged("a hash is not hexadecimal".into()))?;
        Ok(Some(Recorded { next_id: document.next_id, token_life_secs: document.token_life_s, revocations }))
    }

    /// Records revocations in place of those before. Hold the lock.
    ///
    /// # Errors
    /// See [`StateError`]; what was recorded before stands.
    pub fn write(&self, _lock: &StateLock, recorded: &Recorded) -> Result<(), StateError> {
        let path = self.0.join(FILE);
        let document = Document {
            version: VERSION,
            next_id: recorded.next_id,
            token_life_s: recorded.token_life_secs,
            revocations: recorded.revocations.iter().map(|(id, entry)| Row::of(*id, entry)).collect(),
        };
        let bytes = serde_json::to_vec(&document).map_err(|error| unusable(&path)(error.into()))?;
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

const VERSION: u32 = 2;
/// Where a token's own end had the leeway of the policy at the time, and not the largest that any policy can have.
const FIRST_VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    next_id: u64,
    token_life_s: u64,
    revocations: Vec<Row>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    id: u64,
    revoked_at_unix_s: u64,
    issued_until_unix_s: u64,
    expires_at_unix_s: u64,
    exact_end: bool,
    /// What a token must match; a row without any means every token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_fingerprint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    issuer: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_id: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    server: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workload: Option<Name>,
}

/// A name that a token must have: its hash decides, its beginning is for people.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    sha256_128: String,
    begins: String,
}

impl Row {
    fn of(id: u64, entry: &Revocation) -> Self {
        let asks = |selector| entry.selectors & selector != 0;
        let name = |selector, hash: &NameHash, begins: &[u8]| {
            asks(selector).then(|| Name { sha256_128: hex(hash), begins: text_str(begins).to_owned() })
        };
        Self {
            id,
            revoked_at_unix_s: entry.revoked_at_unix_secs,
            issued_until_unix_s: entry.issued_until_unix_secs,
            expires_at_unix_s: entry.expires_at_unix_secs,
            exact_end: entry.exact_end != 0,
            token_fingerprint: asks(REVOKE_TOKEN).then(|| hex(&entry.fingerprint)),
            issuer: name(REVOKE_ISSUER, &entry.issuer_hash, &entry.issuer),
            subject: name(REVOKE_SUBJECT, &entry.subject_hash, &entry.subject),
            client_id: name(REVOKE_CLIENT, &entry.client_hash, &entry.client_id),
            server: name(REVOKE_SERVER, &entry.server_hash, &entry.server),
            workload: name(REVOKE_WORKLOAD, &entry.workload_hash, &entry.workload),
        }
    }

    fn revocation(&self) -> Option<Revocation> {
        let mut selectors = 0;
        let mut hash = |selector, name: &Option<Name>| match name {
            Some(name) => {
                selectors |= selector;
                parse_hex(&name.sha256_128)
            }
            None => Some(NameHash::default()),
        };
        let issuer_hash = hash(REVOKE_ISSUER, &self.issuer)?;
        let subject_hash = hash(REVOKE_SUBJECT, &self.subject)?;
        let client_hash = hash(REVOKE_CLIENT, &self.client_id)?;
        let server_hash = hash(REVOKE_SERVER, &self.server)?;
        let workload_hash = hash(REVOKE_WORKLOAD, &self.workload)?;
        let fingerprint = match &self.token_fingerprint {
            Some(shown) => {
                selectors |= REVOKE_TOKEN;
                parse_hex(shown)?
            }
            None => [0; 16],
        };
        Some(Revocation {
            revoked_at_unix_secs: self.revoked_at_unix_s,
            issued_until_unix_secs: self.issued_until_unix_s,
            expires_at_unix_secs: self.expires_at_unix_s,
            fingerprint,
            issuer_hash,
            subject_hash,
            client_hash,
            server_hash,
            workload_hash,
            selectors,
            exact_end: u32::from(self.exact_end),
            issuer: begins(&self.issuer),
            subject: begins(&self.subject),
            client_id: begins(&self.client_id),
            server: begins(&self.server),
            workload: begins(&self.workload),
        })
    }
}

fn begins<const N: usize>(name: &Option<Name>) -> Text<N> {
    text(name.as_ref().map(|name| name.begins.as_str()).unwrap_or_default())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 32 hexadecimal digits: a hash, or a fingerprint as it is shown.
#[must_use]
pub fn parse_hex(shown: &str) -> Option<[u8; 16]> {
    if shown.len() != 32 || !shown.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(shown, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
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

    #[test]
    fn fingerprints_are_read_as_they_are_shown() {
        let fingerprint = crate::token::Fingerprint([0x0a; 16]);
        assert_eq!(parse_hex(&fingerprint.to_string()), Some([0x0a; 16]));
        for wrong in ["", "0a", &"g".repeat(32), &"+".repeat(32), &"a".repeat(33)] {
            assert_eq!(parse_hex(wrong), None, "{wrong}");
        }
    }
}
