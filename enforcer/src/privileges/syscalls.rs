//! Which system calls may be made, as two filters.
//!
//! What is on the list is allowed; what is not fails with EPERM, so that the operation fails, with its own message, and the
//! daemon goes on guarding. What no part of it ever calls, but an intruder would, ends the process at once: the kernel goes on
//! guarding without it.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

use super::PrivilegeError;

/// Whose filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The daemon, once it guards.
    Daemon,
    /// A process that fetches keys.
    Fetcher,
}

/// Memory, threads, time, descriptors: whatever a program in Rust with tokio does.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_pselect6,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setitimer,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getdents64,
];

/// Calls that only x86-64 has: others have their successors alone.
#[cfg(target_arch = "x86_64")]
const RUNTIME_LEGACY: &[i64] = &[
    libc::SYS_access,
    libc::SYS_alarm,
    libc::SYS_arch_prctl,
    libc::SYS_epoll_wait,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const RUNTIME_LEGACY: &[i64] = &[];

/// Sockets, once they are made.
const SOCKETS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
];

/// Files: pins are removed at the end, state and control socket are written, the policy is watched.
const FILES: &[i64] = &[
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_rm_watch,
    libc::SYS_mkdirat,
    libc::SYS_pwrite64,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_statfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];
#[cfg(target_arch = "x86_64")]
const FILES_LEGACY: &[i64] = &[
    libc::SYS_chmod,
    libc::SYS_inotify_init,
    libc::SYS_mkdir,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const FILES_LEGACY: &[i64] = &[];

/// Starting this very program again, as the process that watches over the daemon. It runs under the same filter, with the same
/// capabilities.
const PROCESSES: &[i64] = &[
    libc::SYS_chdir,
    libc::SYS_execve,
    libc::SYS_pidfd_open,
    libc::SYS_setsid,
    libc::SYS_wait4,
    libc::SYS_waitid,
];
#[cfg(target_arch = "x86_64")]
const PROCESSES_LEGACY: &[i64] = &[libc::SYS_dup2, libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const PROCESSES_LEGACY: &[i64] = &[];

/// Families of sockets: netlink destroys sockets, and name resolution lists interfaces with it; unix leads to systemd; the internet's
/// to issuers, and to a namespace's cookie.
const FAMILIES: &[i32] = &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Commands of bpf(2) that a guarding daemon uses. No loading, no attaching, no looking up of strangers' objects by number.
/// Numbers of `enum bpf_cmd` in `linux/bpf.h`.
const BPF_COMMANDS: &[u64] = &[
    1,  // MAP_LOOKUP_ELEM
    2,  // MAP_UPDATE_ELEM
    3,  // MAP_DELETE_ELEM
    4,  // MAP_GET_NEXT_KEY
    7,  // OBJ_GET
    15, // OBJ_GET_INFO_BY_FD
    21, // MAP_LOOKUP_AND_DELETE_ELEM
    24, // MAP_LOOKUP_BATCH
    25, // MAP_LOOKUP_AND_DELETE_BATCH
    26, // MAP_UPDATE_BATCH
    27, // MAP_DELETE_BATCH
];

/// What ends the process: looking into others, changing mounts, modules, clock or machine, ways around the
/// filter itself.
const FATAL: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

pub(super) fn install(role: Role) -> Result<(), PrivilegeError> {
    // The list last: it lets nobody install another filter.
    let programs = [fatal()?, allowed(role)?];
    for program in &programs {
        apply_filter_all_threads(program)?;
    }
    Ok(())
}

fn allowed(role: Role) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = Rules::new();
    let lists: &[&[i64]] = match role {
        Role::Daemon => &[RUNTIME, RUNTIME_LEGACY, SOCKETS, FILES, FILES_LEGACY, PROCESSES, PROCESSES_LEGACY],
        Role::Fetcher => &[RUNTIME, RUNTIME_LEGACY, SOCKETS],
    };
    for &call in lists.iter().copied().flatten() {
        // No condition: whatever its arguments.
        rules.insert(call, Vec::new());
    }
    rules.insert(libc::SYS_socket, one_of(0, FAMILIES.iter().map(|&family| family as u64))?);
    if role == Role::Daemon {
        rules.insert(libc::SYS_bpf, one_of(0, BPF_COMMANDS.iter().copied())?);
        rules.insert(libc::SYS_setns, one_of(1, [libc::CLONE_NEWNET as u64])?);
    }
    compile(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn fatal() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = FATAL.iter().map(|&call| (call, Vec::new())).collect();
    compile(rules, SeccompAction::Allow, SeccompAction::KillProcess)
}

/// One rule for each value that an argument may have; any of them is enough.
fn one_of(
    argument: u8,
    values: impl IntoIterator<Item = u64>,
) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    values
        .into_iter()
        .map(|value| {
            SeccompRule::new(vec![SeccompCondition::new(
                argument,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::Eq,
                value,
            )?])
        })
        .collect()
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, matched, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// Makes one system call in a process of its own under the filter. Its errno, 0, or the signal that ended it.
    fn under(role: Role, call: fn() -> i64) -> Result<i32, Signal> {
        // SAFETY: the child makes system calls and exits; what it allocates before is bounded by the filter's size.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let code = match install(role) {
                    Ok(()) if call() >= 0 => 0,
                    Ok(()) => std::io::Error::last_os_error().raw_os_error().unwrap_or(254),
                    Err(_) => 255,
                };
                // SAFETY: ends the child without running the test harness's destructors.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
                WaitStatus::Exited(_, code) => Ok(code),
                WaitStatus::Signaled(_, signal, _) => Err(signal),
                other => panic!("{other:?}"),
            },
        }
    }

    fn bpf_load() -> i64 {
        // SAFETY: the filter or the kernel refuses it: there is no such attribute.
        unsafe { libc::syscall(libc::SYS_bpf, 5, std::ptr::null::<u8>(), 0) }
    }

    fn bpf_lookup() -> i64 {
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_bpf, 1, std::ptr::null::<u8>(), 0) }
    }

    fn packet_socket() -> i64 {
        // SAFETY: no memory involved.
        i64::from(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) })
    }

    fn tcp_socket() -> i64 {
        // SAFETY: no memory involved.
        i64::from(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) })
    }

    fn exec() -> i64 {
        // SAFETY: null pointers; the kernel would answer EFAULT.
        unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) }
    }

    fn trace_me() -> i64 {
        // SAFETY: no memory involved.
        unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0) }
    }

    fn sethostname() -> i64 {
        // SAFETY: a null name of no length.
        unsafe { libc::syscall(libc::SYS_sethostname, 0, -1) }
    }

    fn set_user_namespace() -> i64 {
        // SAFETY: no memory involved; the descriptor is none.
        unsafe { libc::syscall(libc::SYS_setns, -1, libc::CLONE_NEWUSER) }
    }

    fn set_net_namespace() -> i64 {
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_setns, -1, libc::CLONE_NEWNET) }
    }

    #[test]
    fn what_is_not_listed_fails_and_what_nobody_needs_is_fatal() {
        for role in [Role::Daemon, Role::Fetcher] {
            assert_eq!(under(role, sethostname), Ok(libc::EPERM), "{role:?}");
            assert_eq!(under(role, packet_socket), Ok(libc::EPERM), "{role:?}");
            assert_eq!(under(role, tcp_socket), Ok(0), "{role:?}");
            assert_eq!(under(role, trace_me), Err(Signal::SIGSYS), "{role:?}");
            assert_eq!(under(role, bpf_load), Ok(libc::EPERM), "{role:?}");
            assert_eq!(under(role, set_user_namespace), Ok(libc::EPERM), "{role:?}");
        }
    }

    #[test]
    fn only_the_daemon_uses_maps_and_enters_network_namespaces() {
        // EPERM also is the kernel's answer to a caller without rights; any other one comes from behind the filter.
        assert_eq!(under(Role::Fetcher, bpf_lookup), Ok(libc::EPERM));
        assert_eq!(under(Role::Fetcher, set_net_namespace), Ok(libc::EPERM));
        assert_eq!(under(Role::Fetcher, exec), Ok(libc::EPERM));
        assert_eq!(under(Role::Daemon, set_net_namespace), Ok(libc::EBADF));
    }

    #[test]
    fn no_call_is_both_allowed_and_fatal() {
        for list in [RUNTIME, RUNTIME_LEGACY, SOCKETS, FILES, FILES_LEGACY, PROCESSES, PROCESSES_LEGACY] {
            assert!(list.iter().all(|call| !FATAL.contains(call)));
        }
    }
}
