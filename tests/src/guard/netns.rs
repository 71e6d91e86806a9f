//! Network namespaces that live exactly as long as their guard and the processes in them.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use nix::ifaddrs::getifaddrs;
use nix::sched::{CloneFlags, setns, unshare};

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A network namespace with `lo` up. It has no name in `/run/netns`: it is held by a descriptor,
/// so that not even a killed test leaves one behind.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    file: File,
}

impl NetNs {
    /// Makes the namespace; `name` only serves messages.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, or when `ip` fails.
    pub fn new(name: &str) -> Result<Self> {
        let file = thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
            File::open("/proc/thread-self/ns/net").context("cannot open the new namespace")
        })
        .join()
        .map_err(|_| anyhow!("the thread that makes namespace {name} panicked"))??;
        let ns = Self { name: name.to_owned(), file };
        ns.ip(&["link", "set", "lo", "up"])?;
        Ok(ns)
    }

    /// A path that `ip`, `nsenter --net=` and setns(2) of other processes take, valid while this guard lives.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `work` in a thread inside the namespace and gives its result. Sockets made there stay in it.
    ///
    /// # Errors
    /// When setns(2) is refused or `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.file, CloneFlags::CLONE_NEWNET).context("setns")?;
                    Ok(work())
                })
                .join()
                .map_err(|_| anyhow!("the closure in namespace {} panicked", self.name))?
        })
    }

    /// Makes `command` enter the namespace between fork and exec.
    ///
    /// # Errors
    /// When the descriptor can't be duplicated.
    pub fn place(&self, command: &mut Command) -> Result<()> {
        let file = self.file.try_clone()?;
        // SAFETY: between fork and exec the closure only calls setns(2).
        unsafe {
            command.pre_exec(move || enter(file.as_raw_fd()));
        }
        Ok(())
    }

    /// One of TCP's counters in there, by its name in `/proc/net/netstat`.
    ///
    /// # Errors
    /// When this kernel has no such counter.
    pub fn tcp_counter(&self, name: &str) -> Result<u64> {
        let statistics = self.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))??;
        counter(&statistics, "TcpExt:", name).with_context(|| format!("no counter {name}"))
    }

    /// Segments that TCP has got in there, whatever became of them (`InSegs` in `/proc/net/snmp`).
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn tcp_input(&self) -> Result<u64> {
        let statistics = self.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
        counter(&statistics, "Tcp:", "InSegs").context("no counter InSegs")
    }

    /// The hardware address of an interface in there.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn hardware_address(&self, interface: &str) -> Result<[u8; 6]> {
        let all = self.run(|| getifaddrs().map(Iterator::collect::<Vec<_>>))??;
        let mut addresses = all.into_iter().filter(|found| found.interface_name == interface);
        addresses
            .find_map(|found| found.address?.as_link_addr()?.addr())
            .with_context(|| format!("{interface} has no hardware address"))
    }

    /// Runs `ip` with these arguments inside.
    ///
    /// # Errors
    /// When it exits non-zero; the message holds what it said.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(arguments);
        self.place(&mut command)?;
        let output = command.output().context("cannot run ip")?;
        ensure!(
            output.status.success(),
            "ip {} in {}: {}",
            arguments.join(" "),
            self.name,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

/// There is a line of names above each line of values.
fn counter(statistics: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = statistics.lines().filter(|line| line.starts_with(group));
    let position = lines.next()?.split_whitespace().position(|found| found == name)?;
    lines.next()?.split_whitespace().nth(position)?.parse().ok()
}

fn enter(namespace: RawFd) -> io::Result<()> {
    // SAFETY: setns(2) takes an open descriptor; a wrong one only gives an error.
    if unsafe { libc::setns(namespace, libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The addresses of the two ends of a [`veth_pair`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethPair {
    /// Interface name on side a (the same on side b, with a `b` at the end).
    pub interface_a: String,
    /// Interface name on side b.
    pub interface_b: String,
    /// IPv4 and IPv6 address of side a.
    pub a: (Ipv4Addr, Ipv6Addr),
    /// IPv4 and IPv6 address of side b.
    pub b: (Ipv4Addr, Ipv6Addr),
}

/// Joins two namespaces by a veth pair with one IPv4 /24 and one IPv6 /64 (10.231.n.1/.2,
/// fd00:e4f:n::1/::2), both ends up, without duplicate address detection. It goes with either namespace.
///
/// # Errors
/// When `ip` refuses one of the steps.
pub fn veth_pair(a: &NetNs, b: &NetNs) -> Result<VethPair> {
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed) % 250;
    let octet = u8::try_from(serial)?;
    let subnet = u16::from(octet);
    let pair = VethPair {
        interface_a: format!("enf{serial}a"),
        interface_b: format!("enf{serial}b"),
        a: (Ipv4Addr::new(10, 231, octet, 1), Ipv6Addr::new(0xfd00, 0xe4f, subnet, 0, 0, 0, 0, 1)),
        b: (Ipv4Addr::new(10, 231, octet, 2), Ipv6Addr::new(0xfd00, 0xe4f, subnet, 0, 0, 0, 0, 2)),
    };
    join(a, b, &pair)?;
    Ok(pair)
}

/// Makes a pair, anew where one like it was deleted: see [`veth_pair`].
///
/// # Errors
/// As there.
pub fn join(a: &NetNs, b: &NetNs, pair: &VethPair) -> Result<()> {
    let (name_a, name_b) = (pair.interface_a.as_str(), pair.interface_b.as_str());
    a.ip(&["link", "add", name_a, "type", "veth", "peer", "name", name_b, "netns", &b.path()])?;
    for (ns, name, (v4, v6)) in [(a, name_a, pair.a), (b, name_b, pair.b)] {
        add_address(ns, name, v4.into(), 24)?;
        add_address(ns, name, v6.into(), 64)?;
        ns.ip(&["link", "set", name, "up"])?;
    }
    Ok(())
}

fn add_address(ns: &NetNs, interface: &str, address: IpAddr, prefix_bits: u8) -> Result<()> {
    let with_prefix = format!("{address}/{prefix_bits}");
    let mut arguments = vec!["addr", "add", &with_prefix, "dev", interface];
    if address.is_ipv6() {
        arguments.push("nodad");
    }
    ns.ip(&arguments)
}
