//! The servers, the issuers, the daemon, and the requests.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Side;
use crate::enforcement::{Counters, Enforcement, IssuerSpec, PolicySpec, ServerSpec};
use crate::guard::{Cgroup, Proc, bin_path, spawn_in};
use crate::issuer::{Alg, Issuer};
use crate::load::typical_request;
use crate::raw::RequestBuilder;

/// It has no path, so that every path needs a token: the responses of a given size have a path of their own.
const RESOURCE: &str = "https://mcp.example.com";
const MCP_PATH: &str = "/mcp";
const START_LIMIT: Duration = Duration::from_secs(10);
/// Longer than any run.
const TOKEN_LIFETIME_S: i64 = 3600;

/// Everything that runs. Dropped in this order: the servers first, so that the daemon finds no open connection.
pub(super) struct Bed {
    direct: Server,
    enforced: Server,
    enforcement: Enforcement,
    es256: Issuer,
    rs256: Issuer,
    tokens: Vec<String>,
    /// The cgroup of the server that nothing guards.
    _plain: Cgroup,
}

/// The server of the benchmark, in a process of its own.
pub(super) struct Server {
    pub(super) process: Proc,
    pub(super) addr: SocketAddr,
}

impl Bed {
    /// Starts all of it. The two servers are the same program, each in a cgroup of its own at the same depth.
    pub(super) fn start(tokens: usize) -> Result<Self> {
        let (plain, guarded) = (Cgroup::new("bench-direct")?, Cgroup::new("bench-enforced")?);
        let direct = Server::start(&plain, "the server without enforcement")?;
        let enforced = Server::start(&guarded, "the server with enforcement")?;
        let es256 = Issuer::new("https://es256.example.com", Alg::Es256)?;
        let rs256 = Issuer::new("https://rs256.example.com", Alg::Rs256)?;
        let server =
            ServerSpec::new("bench", &[enforced.addr], RESOURCE).with("issuers", vec!["es256", "rs256"]);
        let issuers = vec![IssuerSpec::from_file("es256", &es256), IssuerSpec::from_file("rs256", &rs256)];
        // One source sends all of this, as fast as it can.
        let policy = PolicySpec::new(issuers, vec![server]).any_number_of_unknown();
        let enforcement = Enforcement::start(guarded, &policy)?;
        let tokens = (0..tokens.max(1)).map(|number| token(&es256, number)).collect::<Result<_>>()?;
        Ok(Self { direct, enforced, enforcement, es256, rs256, tokens, _plain: plain })
    }

    /// The daemon ends by itself and leaves nothing.
    pub(super) fn stop(mut self) -> Result<()> {
        for server in [&mut self.direct, &mut self.enforced] {
            server.process.kill()?;
        }
        let status = self.enforcement.stop()?;
        ensure!(status.success(), "the daemon ended with {status}");
        let pins = self.enforcement.leftover_pins();
        ensure!(pins.is_empty(), "the daemon left {pins:?}");
        Ok(())
    }

    pub(super) fn addr(&self, side: Side) -> SocketAddr {
        match side {
            Side::Direct => self.direct.addr,
            Side::Enforced => self.enforced.addr,
        }
    }

    pub(super) fn server_pid(&self, side: Side) -> u32 {
        match side {
            Side::Direct => self.direct.process.pid(),
            Side::Enforced => self.enforced.process.pid(),
        }
    }

    pub(super) fn server_pids(&self) -> [u32; 2] {
        [self.direct.process.pid(), self.enforced.process.pid()]
    }

    pub(super) fn daemon_pid(&mut self) -> Result<u32> {
        Ok(self.enforcement.daemon()?.pid())
    }

    pub(super) fn daemon_log(&self) -> Result<String> {
        self.enforcement.log()
    }

    pub(super) fn enforcement(&self) -> &Enforcement {
        &self.enforcement
    }

    pub(super) fn counters(&self) -> Result<Counters> {
        self.enforcement.counters()
    }

    /// The same tool call once with each of the first `count` tokens.
    pub(super) fn calls(&self, side: Side, count: usize) -> Vec<Vec<u8>> {
        self.tokens.iter().take(count).map(|token| self.call(side, Some(token))).collect()
    }

    /// A tool call as an SDK's client sends it, with this token or none.
    pub(super) fn call(&self, side: Side, token: Option<&str>) -> Vec<u8> {
        typical_request(&self.addr(side).to_string(), MCP_PATH, token)
    }

    /// A request for a response of so many bytes.
    pub(super) fn blob(&self, side: Side, size_bytes: u64) -> Result<Vec<u8>> {
        let token = self.tokens.first().context("no token was made")?;
        Ok(RequestBuilder::new("GET", &format!("/blob?size={size_bytes}"))
            .header("Host", &self.addr(side).to_string())
            .header("Accept", "*/*")
            .bearer(token)
            .build())
    }

    /// Tokens that nobody has seen.
    pub(super) fn fresh_tokens(&self, alg: Alg, count: usize) -> Result<Vec<String>> {
        let issuer = if alg == Alg::Rs256 { &self.rs256 } else { &self.es256 };
        (0..count).map(|number| token(issuer, number)).collect()
    }
}

impl Server {
    pub(super) fn start(cgroup: &Cgroup, name: &str) -> Result<Self> {
        let mut command = Command::new(bin_path("enforcer-upstream")?);
        command.args(["bench", "--listen", "127.0.0.1:0"]);
        let mut process = spawn_in(cgroup, name, command)?;
        let line = process.wait_for_line("listening ", START_LIMIT)?;
        let addr = line.trim_start_matches("listening ").parse().with_context(|| line.clone())?;
        Ok(Self { process, addr })
    }
}

fn token(issuer: &Issuer, number: usize) -> Result<String> {
    let mint = issuer.mint().audience(RESOURCE).scope("mcp:tools");
    mint.subject(&format!("user-{number}")).expires_in(TOKEN_LIFETIME_S).sign()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_request_is_a_realistic_one() {
        let issuer = Issuer::new("https://es256.example.com", Alg::Es256).unwrap();
        let with = typical_request("127.0.0.1:40000", MCP_PATH, Some(&token(&issuer, 0).unwrap()));
        let without = typical_request("127.0.0.1:40000", MCP_PATH, None);
        assert!((650..750).contains(&without.len()), "{} bytes", without.len());
        assert!((1000..1150).contains(&with.len()), "{} bytes", with.len());
    }
}
