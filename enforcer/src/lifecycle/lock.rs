//! One daemon per enforcement.
//!
//! The daemon holds an exclusive `flock` on `/run/enforcer/<pin name>.lock` as long as it lives; the kernel releases it
//! whatever ends the daemon. The file says who holds it and stays behind, so that commands find the last daemon's policy.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// Where lock files lie; only root may enter.
pub const RUN_DIR: &str = "/run/enforcer";

/// A look at a lock holds it for an instant, so one refusal is not yet a daemon.
const ATTEMPTS: u32 = 5;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);
/// Longest lock file that is read, in bytes.
const MAX_RECORD_BYTES: u64 = 64 * 1024;
/// Longest error that is recorded. JSON may need six bytes for one that is written as an escape.
const MAX_ERROR_CHARS: usize = 4096;

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon has it.
    #[error("a daemon runs already for `{pin_name}`{}; stop it (SIGTERM), or choose another --pin-name", holder(.pid))]
    Held {
        /// Which enforcement.
        pin_name: String,
        /// Who, if it has said so.
        pid: Option<u32>,
    },
    /// The lock file or its directory can't be used.
    #[error("cannot use the lock {path}: {source}")]
    Unusable {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

fn holder(pid: &Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// What a daemon says about itself in its lock file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRecord {
    /// Its process id.
    pub pid: u32,
    /// Absolute path of the policy that it runs.
    #[serde(default)]
    pub policy: Option<PathBuf>,
    /// What became of the last attempt to switch to another policy.
    #[serde(default)]
    pub last_reload: Option<ReloadRecord>,
}

/// An attempt to read the policy file again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadRecord {
    /// When, on `CLOCK_BOOTTIME`, in nanoseconds.
    pub at_boot_ns: u64,
    /// When, in seconds since 1970.
    pub at_unix_s: u64,
    /// What asked for it.
    pub trigger: String,
    /// Why the policy was not taken; absent if it was.
    pub error: Option<String>,
}

/// The lock, held until dropped.
#[derive(Debug)]
pub struct DaemonLock {
    file: Flock<File>,
    path: PathBuf,
    record: LockRecord,
}

/// Who holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockState {
    /// Somebody holds it.
    pub held: bool,
    /// What the holder, or the last holder, said about itself.
    pub record: Option<LockRecord>,
}

impl DaemonLock {
    /// Takes the lock of the enforcement `pin_name` and writes this process's id into it.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn acquire(pin_name: &str) -> Result<Self, LockError> {
        Self::acquire_in(Path::new(RUN_DIR), pin_name)
    }

    fn acquire_in(dir: &Path, pin_name: &str) -> Result<Self, LockError> {
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| LockError::Unusable { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unusable(dir))?;
        let path = lock_path(dir, pin_name);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(unusable(&path))?;
        for attempt in 1.. {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    let record = LockRecord { pid: std::process::id(), ..LockRecord::default() };
                    let mut lock = Self { file, path, record };
                    lock.write()?;
                    return Ok(lock);
                }
                Err((_, Errno::EWOULDBLOCK)) if attempt == ATTEMPTS => break,
                Err((back, Errno::EWOULDBLOCK)) => file = back,
                Err((_, error)) => return Err(LockError::Unusable { path, source: error.into() }),
            }
            std::thread::sleep(ATTEMPT_PAUSE);
        }
        let pid = read_record(&path).map(|record| record.pid);
        Err(LockError::Held { pin_name: pin_name.to_owned(), pid })
    }

    /// Records the policy that the daemon runs, so that `enforcer explain` finds it. Pass an absolute path.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn record_policy(&mut self, policy: &Path) -> Result<(), LockError> {
        self.record.policy = Some(policy.to_owned());
        self.write()
    }

    /// Records an attempt to read the policy again, so that `enforcer status` shows it, also when the daemon has ended. An error that
    /// is too long for the file is cut.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn record_reload(&mut self, mut reload: ReloadRecord) -> Result<(), LockError> {
        if let Some(error) = &mut reload.error
            && let Some((end, _)) = error.char_indices().nth(MAX_ERROR_CHARS)
        {
            error.truncate(end);
            error.push_str(" ...");
        }
        self.record.last_reload = Some(reload);
        self.write()
    }

    fn write(&mut self) -> Result<(), LockError> {
        let written = serde_json::to_vec(&self.record).map_err(std::io::Error::other).and_then(|text| {
            self.file.set_len(0)?;
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&text)
        });
        written.map_err(|source| LockError::Unusable { path: self.path.clone(), source })
    }
}

/// Looks whether a daemon holds the lock of `pin_name`.
///
/// # Errors
/// The lock file is there but can't be opened; without the right to enter [`RUN_DIR`], say.
pub fn state(pin_name: &str) -> Result<LockState, LockError> {
    state_in(Path::new(RUN_DIR), pin_name)
}

fn state_in(dir: &Path, pin_name: &str) -> Result<LockState, LockError> {
    let path = lock_path(dir, pin_name);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(LockState { held: false, record: None });
        }
        Err(source) => return Err(LockError::Unusable { path, source }),
    };
    let held = match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => false,
        Err((_, Errno::EWOULDBLOCK)) => true,
        Err((_, error)) => return Err(LockError::Unusable { path, source: error.into() }),
    };
    Ok(LockState { held, record: read_record(&path) })
}

fn lock_path(dir: &Path, pin_name: &str) -> PathBuf {
    dir.join(format!("{pin_name}.lock"))
}

/// The daemon writes its record in place, as the file is its lock: one that is half written is read again.
fn read_record(path: &Path) -> Option<LockRecord> {
    for _attempt in 0..ATTEMPTS {
        let mut text = Vec::new();
        File::open(path).ok()?.take(MAX_RECORD_BYTES).read_to_end(&mut text).ok()?;
        if let Ok(record) = serde_json::from_slice(&text) {
            return Some(record);
        }
        std::thread::sleep(ATTEMPT_PAUSE);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_second_daemon_is_refused_with_the_pid_of_the_first() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("run");
        let mut first = DaemonLock::acquire_in(&dir, "one").unwrap();
        assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let error = DaemonLock::acquire_in(&dir, "one").unwrap_err();
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        // Another enforcement is another daemon's.
        let _other = DaemonLock::acquire_in(&dir, "two").unwrap();

        first.record_policy(Path::new("/etc/a-rather-long-path/policy.yaml")).unwrap();
        first.record_policy(Path::new("/etc/policy.yaml")).unwrap();
        let error = Some(format!("policy.yaml:3:1: {}", "\u{7}é".repeat(10_000)));
        first
            .record_reload(ReloadRecord { at_boot_ns: 1, at_unix_s: 1, trigger: "SIGHUP".into(), error })
            .unwrap();
        let long = state_in(&dir, "one").unwrap().record.unwrap().last_reload.unwrap().error.unwrap();
        assert!(long.starts_with("policy.yaml:3:1: ") && long.ends_with(" ..."));
        let reload = ReloadRecord { at_boot_ns: 2, at_unix_s: 2, trigger: "SIGHUP".into(), error: None };
        first.record_reload(reload.clone()).unwrap();
        let record = LockRecord {
            pid: std::process::id(),
            policy: Some("/etc/policy.yaml".into()),
            last_reload: Some(reload),
        };
        assert_eq!(state_in(&dir, "one").unwrap(), LockState { held: true, record: Some(record.clone()) });
        drop(first);
        assert_eq!(state_in(&dir, "one").unwrap(), LockState { held: false, record: Some(record) });
        DaemonLock::acquire_in(&dir, "one").unwrap();
    }

    #[test]
    fn no_file_is_no_daemon_and_a_broken_record_is_none() {
        let place = tempfile::tempdir().unwrap();
        assert_eq!(state_in(place.path(), "x").unwrap(), LockState { held: false, record: None });
        std::fs::write(place.path().join("x.lock"), b"{").unwrap();
        assert_eq!(state_in(place.path(), "x").unwrap(), LockState { held: false, record: None });
    }
}
