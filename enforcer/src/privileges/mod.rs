//! Giving up what the daemon does not need, in two steps: capabilities before its first thread, system calls once the
//! programs are attached. `docs/privileges.md` says what is kept, and what for.

mod syscalls;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;

/// The capabilities that the daemon keeps, and what for.
pub const KEPT: &[(Capability, &str)] = &[
    (Capability::CAP_BPF, "use the maps, load the programs"),
    (Capability::CAP_PERFMON, "load programs that read kernel structures"),
    (Capability::CAP_NET_ADMIN, "attach to cgroup and sockets, destroy sockets"),
    (Capability::CAP_SYS_ADMIN, "enter the network namespaces of guarded servers"),
    (Capability::CAP_SYS_PTRACE, "open the network namespaces of other users' processes in /proc"),
    (Capability::CAP_DAC_READ_SEARCH, "read policy, key and CA files that belong to other users"),
];

/// What could not be given up. The daemon does not start then.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// A set of capabilities can't be changed.
    #[error("cannot give up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// `prctl` was refused.
    #[error("cannot forbid new privileges: {0}")]
    NoNewPrivileges(#[source] nix::Error),
    /// The change of user was refused.
    #[error("cannot become nobody: {0}")]
    User(#[source] nix::Error),
    /// The filter could not be made; a defect of ours.
    #[error("cannot make the filter of system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refused the filter.
    #[error("cannot filter system calls: {0}")]
    Install(#[from] seccompiler::Error),
}

/// The scheduling priority of the daemon (`nice`).
const NICE: i32 = -10;

/// Lets this thread, and those that it starts, have a CPU before those who flood the servers: what the kernel refuses at once keeps them
/// busy, and the daemon waiting. Without the right to it (`CAP_SYS_NICE`) the priority stays as it is.
pub fn raise_priority() {
    // SAFETY: numbers only.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::info!(%error, "the daemon's scheduling priority stays as it is; a flood can keep it from a CPU");
    }
}

/// Keeps only [`KEPT`], of what there is, and rules out that a program gains more. Capabilities belong to threads, so call it
/// before any is started.
///
/// # Errors
/// See [`PrivilegeError`].
pub fn drop_capabilities() -> Result<(), PrivilegeError> {
    keep(&KEPT.iter().map(|(capability, _purpose)| *capability).collect())
}

/// Gives up every capability of the calling thread, in two steps: while `CAP_SETPCAP` is still there, and in the end.
///
/// # Errors
/// See [`PrivilegeError`].
pub(crate) fn drop_all_capabilities(
    become_nobody: impl FnOnce() -> nix::Result<()>,
) -> Result<(), PrivilegeError> {
    let none = CapsHashSet::new();
    bound(&none)?;
    become_nobody().map_err(PrivilegeError::User)?;
    keep(&none)
}

/// The bounding set only matters to an execve; without `CAP_SETPCAP` it stays.
fn bound(wanted: &CapsHashSet) -> Result<(), PrivilegeError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)?.difference(wanted) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    Ok(())
}

fn keep(wanted: &CapsHashSet) -> Result<(), PrivilegeError> {
    prctl::set_no_new_privs().map_err(PrivilegeError::NoNewPrivileges)?;
    let held = caps::read(None, CapSet::Permitted)?;
    bound(wanted)?;
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let kept: CapsHashSet = held.intersection(wanted).copied().collect();
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(())
}

/// From here on no thread of this process makes a system call that the running daemon does not need: see
/// `docs/privileges.md`.
///
/// # Errors
/// See [`PrivilegeError`].
pub fn restrict_daemon() -> Result<(), PrivilegeError> {
    syscalls::install(syscalls::Role::Daemon)
}

/// The same for a process that fetches keys: no eBPF, no namespaces, no change to any file.
///
/// # Errors
/// See [`PrivilegeError`].
pub(crate) fn restrict_fetcher() -> Result<(), PrivilegeError> {
    syscalls::install(syscalls::Role::Fetcher)
}
