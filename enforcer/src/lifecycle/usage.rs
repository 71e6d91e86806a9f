//! What a daemon's process holds, against its bounds.

use std::io::{Error, Result};
use std::path::Path;

use serde::Serialize;

use crate::cli::format::mebibytes;
use crate::core::MEMORY_MAX_BYTES;

/// Memory and file descriptors of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Resident memory (`VmRSS` in proc_pid_status(5)).
    pub resident_bytes: u64,
    /// What the daemon's own bounds add up to: see [`MEMORY_MAX_BYTES`].
    pub resident_max_bytes: u64,
    /// Open file descriptors.
    pub descriptors: u64,
    /// The soft limit `RLIMIT_NOFILE`.
    pub descriptors_max: u64,
}

impl Usage {
    /// Of a process.
    ///
    /// # Errors
    /// It is gone, or may not be looked at.
    pub fn of(pid: u32) -> Result<Self> {
        let process = Path::new("/proc").join(pid.to_string());
        let read = |name| std::fs::read_to_string(process.join(name));
        let unknown = || Error::other("an unknown format in /proc");
        Ok(Self {
            resident_bytes: field(&read("status")?, "VmRSS:").ok_or_else(unknown)? * 1024,
            resident_max_bytes: MEMORY_MAX_BYTES,
            descriptors: std::fs::read_dir(process.join("fd"))?.count() as u64,
            descriptors_max: field(&read("limits")?, "Max open files").ok_or_else(unknown)?,
        })
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "{} of at most {}, {} of {} file descriptors",
            mebibytes(self.resident_bytes),
            mebibytes(self.resident_max_bytes),
            self.descriptors,
            self.descriptors_max
        )
    }
}

/// The first number behind a name at the start of a line; no limit is the largest number.
fn field(text: &str, name: &str) -> Option<u64> {
    let word = text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
    if word == "unlimited" { Some(u64::MAX) } else { word.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_as_proc_writes_them() {
        assert_eq!(field("Name:\tx\nVmRSS:\t   20480 kB\n", "VmRSS:"), Some(20_480));
        let limits = "Max open files            1024                 4096                 files\n";
        assert_eq!(field(limits, "Max open files"), Some(1024));
        assert_eq!(field("Max open files   unlimited  unlimited files\n", "Max open files"), Some(u64::MAX));
        assert_eq!(field("", "VmRSS:"), None);
    }

    #[test]
    fn this_process_holds_something() {
        let usage = Usage::of(std::process::id()).unwrap();
        assert!(
            usage.resident_bytes > 0 && usage.descriptors >= 3 && usage.descriptors_max >= usage.descriptors
        );
        Usage::of(u32::MAX).unwrap_err();
    }
}
