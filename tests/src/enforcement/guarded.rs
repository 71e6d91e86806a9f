//! The usual case: one recording server at `/mcp`, one issuer with its keys in a file, and a daemon.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Enforcement, IssuerSpec, PolicySpec, ServerSpec, any_number};
use crate::guard::{Cgroup, NetNs};
use crate::issuer::{Alg, Issuer, Mint};
use crate::raw::{Connection, RequestBuilder};
use crate::recorder::{Config, RemoteRecorder};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A guarded recorder.
#[derive(Debug)]
pub struct Guarded {
    /// The server; dropped first, so that the daemon finds no open connection when it ends.
    pub recorder: RemoteRecorder,
    /// The daemon.
    pub enforcement: Enforcement,
    /// The issuer called `corp`.
    pub issuer: Issuer,
}

/// What [`Guarded`] is to be.
#[derive(Debug)]
pub struct GuardedBuilder {
    name: String,
    bind: SocketAddr,
    policy_listen: Option<SocketAddr>,
    server_fields: Vec<(String, Value)>,
    issuer_fields: Vec<(String, Value)>,
    observing: bool,
    policy_fields: Vec<(String, Value)>,
    daemon_netns: Option<Arc<NetNs>>,
    config: Config,
    drain_timeout_secs: u64,
    options: Vec<String>,
    netns: Option<Arc<NetNs>>,
}

impl Guarded {
    /// The audience of the server.
    pub const RESOURCE: &'static str = "https://mcp.example.com/mcp";
    /// Where its metadata is.
    pub const METADATA_URL: &'static str = "https://mcp.example.com/.well-known/oauth-protected-resource/mcp";

    /// With everything as usual.
    ///
    /// # Errors
    /// When server or daemon do not start.
    pub fn start(name: &str) -> Result<Self> {
        Self::builder(name).start()
    }

    /// To change what is usual. `name` names the cgroup.
    #[must_use]
    pub fn builder(name: &str) -> GuardedBuilder {
        GuardedBuilder {
            name: name.to_owned(),
            bind: (Ipv4Addr::LOCALHOST, 0).into(),
            policy_listen: None,
            server_fields: Vec::new(),
            issuer_fields: Vec::new(),
            observing: false,
            policy_fields: Vec::new(),
            daemon_netns: None,
            config: Config::default(),
            drain_timeout_secs: 1,
            options: Vec::new(),
            netns: None,
        }
    }

    /// Where the server listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.recorder.addr()
    }

    /// The value of Host that a client would send.
    #[must_use]
    pub fn host(&self) -> String {
        self.addr().to_string()
    }

    /// A sound token for this server, in the making.
    #[must_use]
    pub fn mint(&self) -> Mint {
        self.issuer.mint().audience(Self::RESOURCE)
    }

    /// A sound token for this server.
    ///
    /// # Errors
    /// When it can't be signed.
    pub fn token(&self) -> Result<String> {
        self.mint().sign()
    }

    /// A request to the server's path, with a token or none.
    #[must_use]
    pub fn call(&self, token: Option<&str>) -> RequestBuilder {
        RequestBuilder::mcp_call(&self.host(), "/mcp", token, "echo")
    }

    /// A connection to the server.
    ///
    /// # Errors
    /// When it is refused.
    pub fn connect(&self) -> Result<Connection> {
        Connection::open(self.addr(), TIMEOUT)
    }

    /// A connection that the server has accepted: before that, nobody can tell whether its socket is non-blocking, and the
    /// daemon refuses what the kernel could.
    ///
    /// # Errors
    /// When it is refused, or not accepted in time.
    pub fn connect_accepted(&self) -> Result<Connection> {
        let connection = self.connect()?;
        self.recorder.wait_for_bytes(connection.local_addr()?, 0, TIMEOUT)?;
        Ok(connection)
    }

    /// What the server read on the connection whose client end is `client`.
    ///
    /// # Errors
    /// When the server is gone or never saw the connection.
    pub fn read_by_server(&self, client: SocketAddr) -> Result<Vec<u8>> {
        let record =
            self.recorder.connection(client)?.with_context(|| format!("no connection of {client}"))?;
        Ok(record.kept)
    }

    /// Bytes that the server read in all.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn bytes_read(&self) -> Result<u64> {
        Ok(self.recorder.connections()?.iter().map(|record| record.bytes_read).sum())
    }
}

impl GuardedBuilder {
    /// The server binds this address (port 0: a free one). The policy names it, unless it is told otherwise.
    #[must_use]
    pub fn bind(mut self, addr: SocketAddr) -> Self {
        self.bind = addr;
        self
    }

    /// The policy's `listen` has this address, with the port that the server really has.
    #[must_use]
    pub fn policy_listen(mut self, addr: SocketAddr) -> Self {
        self.policy_listen = Some(addr);
        self
    }

    /// The server lives in this network namespace, and its clients must too.
    #[must_use]
    pub fn netns(mut self, netns: &Arc<NetNs>) -> Self {
        self.netns = Some(Arc::clone(netns));
        self
    }

    /// The daemon lives in this network namespace.
    #[must_use]
    pub fn daemon_netns(mut self, netns: &Arc<NetNs>) -> Self {
        self.daemon_netns = Some(Arc::clone(netns));
        self
    }

    /// Sets a field of the policy's server.
    #[must_use]
    pub fn server(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.server_fields.push((field.to_owned(), value.into()));
        self
    }

    /// Sets a field of the policy's issuer.
    #[must_use]
    pub fn issuer(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.issuer_fields.push((field.to_owned(), value.into()));
        self
    }

    /// One source may send so many heads that nobody knows as no test does.
    #[must_use]
    pub fn any_number_of_unknown(self) -> Self {
        self.policy("unknown_requests", any_number())
    }

    /// Mode `observe`.
    #[must_use]
    pub fn observing(mut self) -> Self {
        self.observing = true;
        self
    }

    /// The policy's `daemon_timeout`.
    #[must_use]
    pub fn daemon_timeout(self, timeout: &str) -> Self {
        self.policy("daemon_timeout", timeout)
    }

    /// Sets a field of the policy's top level.
    #[must_use]
    pub fn policy(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.policy_fields.push((field.to_owned(), value.into()));
        self
    }

    /// How the server serves.
    #[must_use]
    pub fn recorder(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// The server's sockets are non-blocking, as those of event loops are. Only then does the kernel refuse by itself: its
    /// answer wakes the reader without bytes, which a blocking one does not expect.
    #[must_use]
    pub fn nonblocking(mut self) -> Self {
        self.config.nonblocking = true;
        self
    }

    /// How long the daemon lets open connections go on when it is stopped; usually one second.
    #[must_use]
    pub fn drain_timeout(mut self, seconds: u64) -> Self {
        self.drain_timeout_secs = seconds;
        self
    }

    /// Adds an option of `enforcer run`.
    #[must_use]
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// Starts it all.
    ///
    /// # Errors
    /// When server or daemon do not start.
    pub fn start(self) -> Result<Guarded> {
        let cgroup = Cgroup::new(&self.name)?;
        let recorder = RemoteRecorder::spawn(self.bind, &self.config, Some(&cgroup), self.netns.as_deref())?;
        let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
        let mut listen = self.policy_listen.unwrap_or(recorder.addr());
        listen.set_port(recorder.addr().port());
        let mut server = ServerSpec::new("tools", &[listen], Guarded::RESOURCE);
        for (field, value) in self.server_fields {
            server = server.with(&field, value);
        }
        let mut corp = IssuerSpec::from_file("corp", &issuer);
        for (field, value) in self.issuer_fields {
            corp = corp.with(&field, value);
        }
        let policy = PolicySpec::new(vec![corp], vec![server]);
        let policy = if self.observing { policy.observing() } else { policy };
        let policy =
            self.policy_fields.into_iter().fold(policy, |policy, (field, value)| policy.with(&field, value));
        let drain_timeout = self.drain_timeout_secs.to_string();
        let mut options = vec!["--drain-timeout", &drain_timeout];
        options.extend(self.options.iter().map(String::as_str));
        let mut enforcement = Enforcement::prepare(cgroup, &policy, &options)?;
        if let Some(netns) = &self.daemon_netns {
            enforcement.live_in(netns);
        }
        enforcement.launch()?;
        Ok(Guarded { recorder, enforcement, issuer })
    }
}
