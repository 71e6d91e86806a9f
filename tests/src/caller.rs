//! Clients in processes, cgroups, network namespaces and users of their own.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guard::{Cgroup, NetNs, Proc, bin_path, run};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A user that is not root and that every system has.
pub const NOBODY: u32 = 65_534;

/// Where a client runs.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Its cgroup.
    pub cgroup: &'a Cgroup,
    /// Its network namespace; this process's if absent.
    pub netns: Option<&'a NetNs>,
    /// Its user.
    pub uid: u32,
}

/// A client that has its answers, and stays connected.
#[derive(Debug)]
pub struct Caller {
    /// The process.
    pub process: Proc,
    /// Its end of the connection, as it sees it.
    pub local: SocketAddr,
}

impl<'a> Place<'a> {
    /// Root in a cgroup.
    #[must_use]
    pub const fn root(cgroup: &'a Cgroup) -> Self {
        Self { cgroup, netns: None, uid: 0 }
    }

    /// Starts a client with a request; what became of it, it tells later.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(&self, to: SocketAddr, options: &[&str], request: &[u8]) -> Result<Proc> {
        let mut command = Command::new(bin_path("enforcer-caller")?);
        command.args(["--to", &to.to_string()]).args(options);
        self.cgroup.place(&mut command)?;
        if let Some(netns) = self.netns {
            netns.place(&mut command)?;
        }
        if self.uid != 0 {
            command.uid(self.uid);
        }
        Proc::spawn_with_input("enforcer-caller", command, request)
    }

    /// Starts a client and waits until it is connected. It sends its request when there is a file at `go`.
    ///
    /// # Errors
    /// When it can't connect in time.
    pub fn connect(&self, to: SocketAddr, go: &Path, request: &[u8]) -> Result<Proc> {
        let mut process = self.start(to, &["--wait-for", go.to_str().context("path")?], request)?;
        process.wait_for_line("connected ", TIMEOUT)?;
        Ok(process)
    }

    /// Starts a client and waits until its requests are answered.
    ///
    /// # Errors
    /// When it can't connect, or gets no answer in time.
    pub fn call(&self, to: SocketAddr, options: &[&str], request: &[u8]) -> Result<Caller> {
        let mut process = self.start(to, options, request)?;
        process.wait_for_line("staying", TIMEOUT)?;
        let line = process.wait_for_line("connected ", TIMEOUT)?;
        let local = line.trim_start_matches("connected ").parse().context(line)?;
        Ok(Caller { process, local })
    }

    /// The error of a connection that is refused to it, or nothing if it is not.
    ///
    /// # Errors
    /// When the client can't be started, or tells nothing.
    pub fn refused(&self, to: SocketAddr) -> Result<Option<String>> {
        let mut process = self.start(to, &[], b"")?;
        let line = process.wait_for_line("ed ", TIMEOUT)?;
        Ok(line.strip_prefix("refused ").map(str::to_owned))
    }
}

impl Caller {
    /// Whether its connection is closed within a time.
    pub fn is_closed(&mut self, within: Duration) -> bool {
        self.process.wait_for_line("ended", within).is_ok()
    }

    /// The status of its first answer; `None`: there was none.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        self.statuses().first().copied()
    }

    /// The statuses of its answers.
    #[must_use]
    pub fn statuses(&self) -> Vec<u16> {
        let lines = self.process.stdout();
        lines.lines().filter_map(|line| line.strip_prefix("status ")?.parse().ok()).collect()
    }
}

/// Connections of a network namespace to `service` go to `server` (nftables DNAT), as those to a Kubernetes service address do.
///
/// # Errors
/// When nft is not there, or refuses.
pub fn translate(clients: &NetNs, service: SocketAddr, server: SocketAddr) -> Result<()> {
    let rules = format!(
        "table ip nat {{ chain output {{ type nat hook output priority -100; ip daddr {} tcp dport {} dnat to {server}\n}}\n}}\n",
        service.ip(),
        service.port(),
    );
    let mut nft = Command::new("nft");
    nft.args(["-f", "-"]);
    clients.place(&mut nft)?;
    let made = run("nft", nft, rules.as_bytes(), TIMEOUT)?;
    ensure!(made.status.success(), "nft: {}", made.stderr);
    Ok(())
}
