//! Child cgroups of this test run in the cgroup2 hierarchy.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

const PREFIX: &str = "enforcer-test-";
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A cgroup of its own below the cgroup2 mount. On drop everything that still runs in it is
/// killed and the directory removed; nothing outside is touched.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes `enforcer-test-<pid>-<serial>-<name>`, after clearing what killed runs left behind.
    ///
    /// # Errors
    /// Without a cgroup2 mount, or without the right to make a directory in it.
    pub fn new(name: &str) -> Result<Self> {
        let root = Self::mount_point()?;
        sweep(&root);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        Self::create(root.join(format!("{PREFIX}{}-{serial}-{name}", std::process::id())))
    }

    /// Makes a cgroup inside this one. Drop it before its parent.
    ///
    /// # Errors
    /// When the directory can't be made.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::create(self.path.join(name))
    }

    fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("cannot make cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where cgroup2 is mounted, from `/proc/mounts` (first field pair with type `cgroup2`).
    ///
    /// # Errors
    /// When no cgroup2 hierarchy is mounted.
    pub fn mount_point() -> Result<PathBuf> {
        let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
        mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ');
                let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
                (kind == "cgroup2").then(|| PathBuf::from(at))
            })
            .next()
            .context("no cgroup2 hierarchy in /proc/mounts")
    }

    /// The cgroup's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cgroup's id as eBPF helpers see it: the inode number of its directory.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// Makes `command` enter this cgroup after the fork and before the exec, so that every socket
    /// of the program belongs to it.
    ///
    /// # Errors
    /// When `cgroup.procs` can't be opened for writing.
    pub fn place(&self, command: &mut Command) -> Result<()> {
        let procs = OpenOptions::new()
            .write(true)
            .open(self.path.join("cgroup.procs"))
            .with_context(|| format!("cannot open cgroup.procs of {}", self.path.display()))?;
        // SAFETY: between fork and exec the closure only calls write(2), which is async-signal-safe.
        unsafe {
            command.pre_exec(move || write_self(&procs));
        }
        Ok(())
    }

    /// Moves a process here.
    ///
    /// # Errors
    /// When there is no such process, or it may not be moved.
    pub fn take(&self, pid: u32) -> Result<()> {
        let file = self.path.join("cgroup.procs");
        fs::write(&file, pid.to_string()).with_context(|| format!("cannot move {pid} to {}", file.display()))
    }

    /// Ids of the processes in it (not in its children).
    ///
    /// # Errors
    /// When `cgroup.procs` can't be read.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let text = fs::read_to_string(self.path.join("cgroup.procs"))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }
}

/// Moves the calling process: "0" stands for the writer itself.
fn write_self(procs: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open and the buffer is one valid byte.
    let written = unsafe { libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) };
    if written == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Kills what runs in the cgroup and removes it, children first. Gives up after two seconds and
/// says so: a drop must not panic.
fn remove(path: &Path) {
    for child in subdirectories(path) {
        remove(&child);
    }
    // cgroup.kill (5.14 and later) signals exactly the processes inside.
    drop(fs::write(path.join("cgroup.kill"), "1"));
    let mut outcome = Ok(());
    for _ in 0..200 {
        outcome = fs::remove_dir(path);
        match &outcome {
            Err(error) if error.kind() != io::ErrorKind::NotFound => thread::sleep(Duration::from_millis(10)),
            _ => return,
        }
    }
    if let Err(error) = outcome {
        eprintln!("cgroup {} stays behind: {error}", path.display());
    }
}

fn subdirectories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries.flatten().filter(|entry| entry.path().is_dir()).map(|entry| entry.path()).collect()
}

/// Removes the cgroups of test processes that no longer run (killed before they could clean up).
fn sweep(root: &Path) {
    for path in subdirectories(root) {
        let owner = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix(PREFIX))
            .and_then(|rest| rest.split('-').next())
            .and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove(&path);
        }
    }
}
