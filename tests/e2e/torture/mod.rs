//! What the torture tests share: a guarded recorder, and clients that keep account of what they sent.

pub(crate) mod client;
pub(crate) mod random;
pub(crate) mod sockets;

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Enforcement, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, wait_until};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::RequestBuilder;
use enforcer_tests::recorder::{Config, ConnectionRecord, ReadMode, RemoteRecorder};

pub(crate) use client::Client;
pub(crate) use random::Random;

/// Bound of every single operation; generous, because the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The audience of good tokens.
pub(crate) const RESOURCE: &str = "https://mcp.test/mcp";
const HOST: &str = "mcp.test";

/// How the server reads: the kernel refuses by itself only where the server can't be blocked in `recv`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sockets {
    /// The accepted sockets block.
    Blocking,
    /// They have `O_NONBLOCK`.
    NonBlocking,
}

/// A recorder behind the enforcer. Its parts go down in this order: the server, the daemon with its cgroup, the time limit.
pub(crate) struct Scene {
    /// The guarded server.
    pub(crate) server: RemoteRecorder,
    /// The daemon that guards it.
    pub(crate) enforcement: Enforcement,
    /// Mints the tokens.
    pub(crate) issuer: Issuer,
    sockets: Sockets,
    _deadline: Deadline,
}

impl Scene {
    /// A recorder on a free loopback port, guarded.
    pub(crate) fn new(name: &str, limit: Duration) -> Result<Self> {
        Self::with(name, limit, "127.0.0.1:0", None)
    }

    /// As [`Scene::new`], on another address or in a namespace.
    pub(crate) fn with(name: &str, limit: Duration, listen: &str, netns: Option<&NetNs>) -> Result<Self> {
        let deadline = Deadline::new(name, limit);
        let cgroup = Cgroup::new(name)?;
        let server = RemoteRecorder::spawn(listen.parse()?, &config(), Some(&cgroup), netns)?;
        let (enforcement, issuer) = enforce(cgroup, &[server.addr()])?;
        Ok(Self { server, enforcement, issuer, sockets: Sockets::Blocking, _deadline: deadline })
    }

    /// From now on the sockets of new clients' connections are of this kind at the server.
    pub(crate) fn set_sockets(&mut self, sockets: Sockets) {
        self.sockets = sockets;
    }

    /// Where the server listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// A new client.
    pub(crate) fn client(&mut self) -> Result<Client> {
        let client = Client::open(self.addr())?;
        if self.sockets == Sockets::NonBlocking {
            sockets::set_nonblocking(self.server.process().pid(), client.connection.local_addr()?)?;
        }
        Ok(client)
    }

    /// A good token that was never seen before.
    pub(crate) fn token(&self) -> Result<String> {
        good_token(&self.issuer)
    }

    /// A token for another audience, never seen before.
    pub(crate) fn bad_token(&self) -> Result<String> {
        bad_token(&self.issuer)
    }

    /// The server's record of a connection that has ended.
    pub(crate) fn closed_record(&self, peer: SocketAddr) -> Result<ConnectionRecord> {
        wait_until(&format!("the end of {peer} at the server"), PATIENCE, || {
            self.server.connection(peer).map(|found| found.filter(|record| record.closed)).transpose()
        })?
    }

    /// Checks that daemon and server still do their work, for a fresh and for a known token, and that no connection is left
    /// in the kernel's records once all clients are gone.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        let ended = self.enforcement.daemon()?.try_wait()?;
        ensure!(ended.is_none(), "the daemon ended with {ended:?}: {}", self.enforcement.log()?);
        self.server.set_config(&config())?;
        let request = post(&self.token()?).body(b"still there?").build();
        let mut client = self.client()?;
        client.good(&request).context("a first-seen head afterwards")?;
        client.good(&request).context("a known head afterwards")?;
        client.refused(&post(&self.bad_token()?).body(b"x").build(), 401).context("a refusal afterwards")?;
        client.finish(self)?;
        wait_for_no_flows(&self.enforcement)
    }

    /// The daemon's resident memory in KiB.
    pub(crate) fn daemon_kib(&mut self) -> Result<u64> {
        resident_kib(self.enforcement.daemon()?.pid())
    }
}

/// Shown when the test fails: libtest keeps the output of those that pass to itself.
impl Drop for Scene {
    fn drop(&mut self) {
        if let Ok(log) = self.enforcement.log() {
            let lines: Vec<&str> = log.lines().filter(|line| !line.contains("refused")).collect();
            println!("the daemon's log, without refusals:\n{}", lines.join("\n"));
        }
        if let Ok(counters) = self.enforcement.cli(&["counters"]) {
            println!("counters:\n{}", counters.stdout);
        }
    }
}

/// Guards these endpoints of the cgroup's processes for tokens of one issuer, of which one address may send any number.
pub(crate) fn enforce(cgroup: Cgroup, listen: &[SocketAddr]) -> Result<(Enforcement, Issuer)> {
    enforce_as(cgroup, listen, |policy| policy)
}

/// As [`enforce`], with a policy that is changed.
pub(crate) fn enforce_as(
    cgroup: Cgroup,
    listen: &[SocketAddr],
    change: fn(PolicySpec) -> PolicySpec,
) -> Result<(Enforcement, Issuer)> {
    let issuer = Issuer::new("https://issuer.test", Alg::Es256)?;
    let corp = IssuerSpec::from_file("corp", &issuer);
    let policy = change(PolicySpec::new(vec![corp], vec![server(listen)]).any_number_of_unknown());
    Ok((Enforcement::start(cgroup, &policy)?, issuer))
}

/// The server at these endpoints, as policy has it.
pub(crate) fn server(listen: &[SocketAddr]) -> ServerSpec {
    ServerSpec::new("tortured", listen, RESOURCE)
}

/// A good token that was never seen before.
pub(crate) fn good_token(issuer: &Issuer) -> Result<String> {
    issuer.mint().audience(RESOURCE).sign()
}

/// A token for another audience, never seen before.
pub(crate) fn bad_token(issuer: &Issuer) -> Result<String> {
    issuer.mint().audience("https://other.test/mcp").sign()
}

/// Waits until the kernel has no record of a connection.
pub(crate) fn wait_for_no_flows(enforcement: &Enforcement) -> Result<()> {
    let mut last = serde_json::Value::Null;
    let outcome = wait_until("an empty flow table", PATIENCE, || match enforcement.cli_json(&["flows"]) {
        Ok(value) => {
            let empty = value.get("flows").and_then(|flows| flows.as_array()).is_some_and(Vec::is_empty);
            last = value;
            empty.then_some(Ok(()))
        }
        Err(error) => Some(Err(error)),
    });
    outcome.with_context(|| format!("left: {last}"))?
}

/// How the recorder serves unless a test says otherwise: it keeps little, since SHA-256 is compared.
pub(crate) fn config() -> Config {
    Config { keep_bytes: 4096, ..Config::default() }
}

/// A recorder's configuration with a slow reader.
pub(crate) fn slow(bytes: usize, pause_ms: u64) -> Config {
    Config { read: ReadMode::Slow { bytes, pause_ms }, ..config() }
}

/// A POST to the MCP endpoint with this token, without a body yet.
pub(crate) fn post(token: &str) -> RequestBuilder {
    RequestBuilder::new("POST", "/mcp")
        .header("Host", HOST)
        .header("Accept", "application/json, text/event-stream")
        .header("Content-Type", "application/json")
        .bearer(token)
}

/// A GET of the MCP endpoint with this token.
pub(crate) fn get(token: &str) -> RequestBuilder {
    RequestBuilder::new("GET", "/mcp")
        .header("Host", HOST)
        .header("Accept", "text/event-stream")
        .bearer(token)
}

/// Resident memory of a process in KiB (`VmRSS` in proc_pid_status(5)).
pub(crate) fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().strip_suffix("kB").context("VmRSS is not in kB")?.trim().parse()?)
}
