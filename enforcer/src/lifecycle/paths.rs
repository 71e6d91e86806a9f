//! Where the cgroup hierarchy and the BPF file system are, and the pin directory's name.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

use crate::datapath::PinDir;

/// Where a bpffs is mounted on most systems.
pub const BPFFS: &str = "/sys/fs/bpf";
/// Longest pin name, in bytes.
pub const MAX_PIN_NAME_BYTES: usize = 64;

const MOUNTS: &str = "/proc/self/mounts";
/// Where systemd mounts cgroup2; preferred when there are several.
const CGROUP: &str = "/sys/fs/cgroup";

/// Why a place that the enforcer needs is not there.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The mount table can't be read.
    #[error("cannot read the mount table {MOUNTS}: {0}; is /proc mounted?")]
    Mounts(std::io::Error),
    /// There is no cgroup2 mount.
    #[error(
        "no cgroup2 file system is mounted; mount one with `mount -t cgroup2 none {CGROUP}`, or name one with --cgroup"
    )]
    NoCgroup2,
    /// A path that should be a cgroup2 directory is not.
    #[error("{path} is not a cgroup2 directory: {reason}")]
    NotCgroup2 {
        /// The path.
        path: PathBuf,
        /// What it is, or why that is not known.
        reason: String,
    },
    /// There is no bpffs, and it could not be mounted.
    #[error(
        "no bpffs is mounted at {path}, and mounting one failed: {source}; as root, run `mount -t bpf bpf {path}`"
    )]
    NoBpffs {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The path can't be looked at.
    #[error("cannot look at {path}: {source}")]
    Unreadable {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// Root of the cgroup2 hierarchy, from the mount table: `/sys/fs/cgroup` where that is one, else the first (a hybrid
/// layout has it under `/sys/fs/cgroup/unified`).
///
/// # Errors
/// No mount table, or no cgroup2 in it.
pub fn cgroup2_root() -> Result<PathBuf, PathError> {
    let table = std::fs::read(MOUNTS).map_err(PathError::Mounts)?;
    let mounts = mounts_of(&table, b"cgroup2");
    let usual = mounts.iter().find(|path| path.as_path() == Path::new(CGROUP)).cloned();
    usual.or_else(|| mounts.into_iter().next()).ok_or(PathError::NoCgroup2)
}

/// `chosen` if it is a cgroup2 directory, else the hierarchy's root.
///
/// # Errors
/// See [`PathError`].
pub fn cgroup(chosen: Option<&Path>) -> Result<PathBuf, PathError> {
    let Some(path) = chosen else { return cgroup2_root() };
    let fail = |reason: String| PathError::NotCgroup2 { path: path.to_owned(), reason };
    let found = statfs(path).map_err(|error| fail(error.desc().to_owned()))?;
    if found.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(fail("it lies on another file system".to_owned()));
    }
    if !path.is_dir() {
        return Err(fail("it is not a directory".to_owned()));
    }
    Ok(path.to_owned())
}

/// Mount points of a file system type in a mount table (proc(5)).
fn mounts_of(table: &[u8], kind: &[u8]) -> Vec<PathBuf> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let (_device, path, found) = (fields.next()?, fields.next()?, fields.next()?);
            (found == kind).then(|| PathBuf::from(OsString::from_vec(unescape(path))))
        })
        .collect()
}

/// Undoes the octal escapes of blank, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        (rest, _) = match escaped {
            Some(byte) => (tail.get(3..).unwrap_or_default(), out.push(byte)),
            None => (tail, out.push(first)),
        };
    }
    out
}

/// What [`ensure_bpffs`] found or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Bpffs {
    /// A bpffs was mounted there.
    Present,
    /// It was mounted just now; say so.
    Mounted,
}

/// Whether a bpffs is mounted at `path`.
///
/// # Errors
/// The path is there but can't be looked at.
pub fn is_bpffs(path: &Path) -> Result<bool, PathError> {
    match statfs(path) {
        Ok(found) => Ok(found.filesystem_type() == BPF_FS_MAGIC),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(false),
        Err(error) => Err(PathError::Unreadable { path: path.to_owned(), source: error.into() }),
    }
}

/// Makes sure that a bpffs is mounted at `path`, or above it in a bpffs; mounts one where there is none, for root only to
/// enter.
///
/// # Errors
/// It is not there and can't be mounted (for want of `CAP_SYS_ADMIN`, say).
pub fn ensure_bpffs(path: &Path) -> Result<Bpffs, PathError> {
    if is_bpffs(path)? {
        return Ok(Bpffs::Present);
    }
    let failed = |source| PathError::NoBpffs { path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(failed)?;
    if is_bpffs(path)? {
        return Ok(Bpffs::Present);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|error| failed(error.into()))?;
    Ok(Bpffs::Mounted)
}

/// Why a pin name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a pin name: 1 to {MAX_PIN_NAME_BYTES} letters, digits, `-` and `_` (bpffs reserves names with a dot)"
)]
pub struct PinNameError(String);

/// Checks a pin name, which becomes a file name on a bpffs and under `/run`.
///
/// # Errors
/// Anything but 1 to [`MAX_PIN_NAME_BYTES`] ASCII letters, digits, `-` and `_`.
pub fn pin_name(name: &str) -> Result<String, PinNameError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if name.is_empty() || name.len() > MAX_PIN_NAME_BYTES || !name.bytes().all(allowed) {
        return Err(PinNameError(name.to_owned()));
    }
    Ok(name.to_owned())
}

/// The pin directory of an enforcement.
#[must_use]
pub fn pin_dir(bpffs: &Path, name: &str) -> PinDir {
    PinDir::new(bpffs.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::testing::{in_own_mount_namespace, is_root};

    #[test]
    fn mount_points_are_read_and_unescaped() {
        let table = b"tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nnone /mnt/with\\040blank\\134 cgroup2 rw 0 0\nbroken\n";
        let found = mounts_of(table, b"cgroup2");
        assert_eq!(found, [Path::new("/sys/fs/cgroup/unified"), Path::new("/mnt/with blank\\")]);
        assert_eq!(mounts_of(table, b"bpf"), Vec::<PathBuf>::new());
        assert_eq!(unescape(b"a\\04"), b"a\\04");
    }

    #[test]
    fn only_cgroup2_directories_are_taken() {
        let error = cgroup(Some(Path::new("/proc"))).unwrap_err();
        assert!(matches!(error, PathError::NotCgroup2 { .. }), "{error}");
        let error = cgroup(Some(Path::new("/no/such/place"))).unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
    }

    #[test]
    fn this_machine_has_a_cgroup2_root() {
        if !is_root("this_machine_has_a_cgroup2_root") {
            return;
        }
        let root = cgroup(None).unwrap();
        assert_eq!(cgroup(Some(&root)).unwrap(), root);
    }

    #[test]
    fn bpffs_is_mounted_once_where_it_is_missing() {
        if !is_root("bpffs_is_mounted_once_where_it_is_missing") {
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("deep/bpf");
        in_own_mount_namespace(move || {
            assert!(!is_bpffs(&path).unwrap());
            assert_eq!(ensure_bpffs(&path).unwrap(), Bpffs::Mounted);
            assert_eq!(ensure_bpffs(&path).unwrap(), Bpffs::Present);
            let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
            assert_eq!(mode & 0o777, 0o700);
        });
    }

    #[test]
    fn pin_names_are_plain() {
        assert_eq!(pin_name("enforcer-2_b").as_deref(), Ok("enforcer-2_b"));
        for bad in ["", ".", "..", "a.b", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(pin_name(bad).is_err(), "{bad}");
        }
    }
}
