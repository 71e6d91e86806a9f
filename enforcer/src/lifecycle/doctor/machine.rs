//! What the machine and this process bring along.

use std::fs;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::Check;
use crate::lifecycle::paths::{self, Bpffs};

// capabilities(7), numbers of linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// What each is needed for. `CAP_SYS_ADMIN` also stands for the two that were split off it in Linux 5.8.
const NEEDED: &[(u32, &str, &str, bool)] = &[
    (CAP_BPF, "CAP_BPF", "load programs and maps", true),
    (CAP_PERFMON, "CAP_PERFMON", "let programs read kernel structures", true),
    (CAP_NET_ADMIN, "CAP_NET_ADMIN", "attach to sockets and destroy them", false),
    (CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "enter network namespaces and mount a bpffs", false),
];

pub(super) fn privileges() -> Check {
    const NAME: &str = "privileges";
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let Some(held) = effective_capabilities(&status) else {
        return Check::fail(NAME, "cannot read the capabilities in /proc/self/status", "mount /proc");
    };
    let missing = missing(held);
    if missing.is_empty() {
        return Check::pass(NAME, "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN");
    }
    Check::fail(NAME, format!("missing: {}", missing.join("; ")), "run as root, or give the capabilities")
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(field.trim(), 16).ok()
}

fn missing(held: u64) -> Vec<String> {
    let has = |bit: u32| held >> bit & 1 == 1;
    NEEDED
        .iter()
        .filter(|(bit, _, _, split_off)| !(has(*bit) || *split_off && has(CAP_SYS_ADMIN)))
        .map(|(_, name, purpose, _)| format!("{name} ({purpose})"))
        .collect()
}

pub(super) fn kernel() -> Check {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
    let release = read("osrelease");
    let detail = format!("Linux {} {} (said for information only)", release.trim(), std::env::consts::ARCH);
    Check::pass("kernel", detail)
}

pub(super) fn cgroup(chosen: Option<&Path>) -> Check {
    match paths::cgroup(chosen) {
        Ok(path) => Check::pass("cgroup2", format!("{}", path.display())),
        Err(error) => Check::fail("cgroup2", error.to_string(), "mount cgroup2, or choose another --cgroup"),
    }
}

pub(super) fn bpffs(path: &Path) -> Check {
    match paths::ensure_bpffs(path) {
        Ok(Bpffs::Present) => Check::pass("bpffs", format!("mounted at {}", path.display())),
        Ok(Bpffs::Mounted) => {
            Check::pass("bpffs", format!("was missing; mounted just now at {}", path.display()))
        }
        Err(error) => Check::fail("bpffs", error.to_string(), format!("mount -t bpf bpf {}", path.display())),
    }
}

/// The limit binds only where the kernel still charges BPF memory to it; that the programs were loaded shows that it does
/// not bind.
pub(super) fn memlock(programs_loaded: bool) -> Check {
    const NAME: &str = "memlock";
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((RLIM_INFINITY, _)) => Check::pass(NAME, "unlimited"),
        Ok((bytes, _)) if programs_loaded => {
            Check::pass(NAME, format!("limited to {} KiB, which does not hinder the maps", bytes / 1024))
        }
        Ok((bytes, _)) => Check::warn(
            NAME,
            format!("limited to {} KiB, and the programs do not load", bytes / 1024),
            "lift it: `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit",
        ),
        Err(error) => Check::warn(NAME, format!("not known: {error}"), "see getrlimit(2)"),
    }
}

/// The kernel programs read the machine's clock, the daemon reads its time namespace's: with an offset between them, deadlines
/// would be anywhere.
pub(super) fn clock() -> Check {
    match crate::lifecycle::clock::check() {
        Ok(()) => Check::pass("clock", "this process and the kernel programs read the same clock"),
        Err(error) => {
            Check::fail("clock", error.to_string(), "run the enforcer in the initial time namespace")
        }
    }
}

pub(super) fn mptcp() -> Check {
    let enabled = fs::read_to_string("/proc/sys/net/mptcp/enabled").ok();
    let protocols = fs::read_to_string("/proc/net/protocols").unwrap_or_default();
    judge_mptcp(enabled.as_deref().map(str::trim), &protocols)
}

fn judge_mptcp(enabled: Option<&str>, protocols: &str) -> Check {
    const NAME: &str = "mptcp";
    let sockets = mptcp_sockets(protocols);
    match enabled {
        None => Check::pass(NAME, "this kernel has no MPTCP"),
        Some("0") => Check::pass(NAME, "switched off"),
        Some(_) if sockets == 0 => {
            Check::pass(NAME, "switched on, but no socket in this network namespace uses it")
        }
        Some(_) => Check::warn(
            NAME,
            format!(
                "{sockets} sockets in this network namespace use MPTCP; their clients are made to use plain TCP, which takes them some seconds at the first connection"
            ),
            "sysctl net.mptcp.enabled=0, or start Go servers with GODEBUG=multipathtcp=0",
        ),
    }
}

/// Sockets of MPTCP over both families in `/proc/net/protocols`; listeners count as well.
fn mptcp_sockets(protocols: &str) -> u64 {
    protocols
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let name = fields.next()?;
            (name == "MPTCP" || name == "MPTCPv6").then(|| fields.nth(1)?.parse::<u64>().ok())?
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    #[test]
    fn capabilities_are_judged_one_by_one() {
        assert_eq!(effective_capabilities("Name:\tx\nCapEff:\t0000000000201000\n"), Some(0x20_1000));
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
        assert_eq!(missing(u64::MAX), Vec::<String>::new());
        // CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON, not for CAP_NET_ADMIN.
        assert_eq!(missing(1 << CAP_SYS_ADMIN), ["CAP_NET_ADMIN (attach to sockets and destroy them)"]);
        assert_eq!(missing(0).len(), 4);
    }

    #[test]
    fn mptcp_sockets_of_both_families_count() {
        let protocols = "protocol  size sockets  memory press maxhdr  slab module\n\
            MPTCPv6   2064      2      85   no       0   yes  kernel\n\
            TCPv6     2624      7      85   no     320   yes  kernel\n\
            MPTCP     1936      1      85   no       0   yes  kernel\n";
        assert_eq!(mptcp_sockets(protocols), 3);
        assert_eq!(judge_mptcp(Some("1"), protocols).grade, Grade::Warn);
        assert_eq!(judge_mptcp(Some("0"), protocols).grade, Grade::Pass);
        assert_eq!(judge_mptcp(Some("1"), "").grade, Grade::Pass);
        assert_eq!(judge_mptcp(None, "").grade, Grade::Pass);
    }
}
