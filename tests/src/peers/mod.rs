//! HTTP servers of other makers behind the enforcer: Python's and Node's standard ones, and axum.
//!
//! All answer alike. A request gets `{"method", "path", "len", "sha256"}` (of the body without any
//! chunking; hexadecimal), `/sse?events=N&bytes=M` an event stream of N events of M bytes each.

mod axum_server;

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use thiserror::Error;

use crate::guard::{Cgroup, NetNs, Proc, bin_path};

pub use axum_server::serve_axum;

const START_LIMIT: Duration = Duration::from_secs(20);
const PYTHON_SERVER: &str = include_str!("server.py");
const NODE_SERVER: &str = include_str!("server.js");

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerKind {
    /// `http.server` with a thread per connection.
    Python,
    /// Node's `http`.
    Node,
    /// axum over hyper, from this package.
    Axum,
}

impl PeerKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Python, Self::Node, Self::Axum];
}

/// Why a peer is not there.
#[derive(Debug, Error)]
pub enum PeerError {
    /// The interpreter is not installed: a test may skip, saying this.
    #[error("{program} is not installed or does not run: {reason}")]
    NoInterpreter {
        /// The interpreter's name.
        program: &'static str,
        /// What happened when it was tried.
        reason: String,
    },
    /// It is there and did not start: a failure.
    #[error("cannot start the {kind:?} server: {source}")]
    Start {
        /// Which server.
        kind: PeerKind,
        /// Why.
        source: anyhow::Error,
    },
}

/// A running peer; killed when dropped.
#[derive(Debug)]
pub struct Peer {
    addr: SocketAddr,
    process: Proc,
}

impl Peer {
    /// Starts a server on `listen` (port 0: a free one) in the given cgroup and namespace, and waits
    /// until it listens.
    ///
    /// # Errors
    /// [`PeerError::NoInterpreter`] is a reason to skip, [`PeerError::Start`] a failure.
    pub fn start(
        kind: PeerKind,
        listen: SocketAddr,
        cgroup: Option<&Cgroup>,
        netns: Option<&NetNs>,
    ) -> Result<Self, PeerError> {
        if let Some(program) = kind.interpreter() {
            let tried =
                Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            let reason = match tried {
                Ok(status) if status.success() => None,
                Ok(status) => Some(format!("--version: {status}")),
                Err(error) => Some(error.to_string()),
            };
            if let Some(reason) = reason {
                return Err(PeerError::NoInterpreter { program, reason });
            }
        }
        Self::launch(kind, listen, cgroup, netns).map_err(|source| PeerError::Start { kind, source })
    }

    fn launch(
        kind: PeerKind,
        listen: SocketAddr,
        cgroup: Option<&Cgroup>,
        netns: Option<&NetNs>,
    ) -> Result<Self> {
        let mut command = kind.command(listen)?;
        if let Some(cgroup) = cgroup {
            cgroup.place(&mut command)?;
        }
        if let Some(netns) = netns {
            netns.place(&mut command)?;
        }
        let mut process = Proc::spawn(&format!("the {kind:?} server"), command)?;
        let addr = listening_addr(&mut process, START_LIMIT)?;
        Ok(Self { addr, process })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Proc {
        &mut self.process
    }
}

impl PeerKind {
    fn interpreter(self) -> Option<&'static str> {
        match self {
            Self::Python => Some("python3"),
            Self::Node => Some("node"),
            Self::Axum => None,
        }
    }

    fn command(self, listen: SocketAddr) -> Result<Command> {
        let (program, mut arguments): (OsString, Vec<String>) = match self {
            Self::Python => {
                ("python3".into(), vec!["-u".to_owned(), "-c".to_owned(), PYTHON_SERVER.to_owned()])
            }
            Self::Node => ("node".into(), vec!["-e".to_owned(), NODE_SERVER.to_owned(), "--".to_owned()]),
            Self::Axum => (bin_path("enforcer-upstream")?.into(), Vec::new()),
        };
        match self {
            Self::Python | Self::Node => {
                arguments.extend([listen.ip().to_string(), listen.port().to_string()]);
            }
            Self::Axum => {
                arguments.extend(["axum".to_owned(), "--listen".to_owned(), listen.to_string()]);
            }
        }
        let mut command = Command::new(program);
        command.args(arguments);
        Ok(command)
    }
}

/// Waits for the line `listening ADDR` that every server program of this package prints.
///
/// # Errors
/// When the process ends or does not say it in time.
pub fn listening_addr(process: &mut Proc, timeout: Duration) -> Result<SocketAddr> {
    let line = process.wait_for_line("listening ", timeout)?;
    let (_, text) = line.split_once("listening ").context("no address")?;
    if let Ok(addr) = text.parse() {
        return Ok(addr);
    }
    // Interpreters print an IPv6 address and a port without brackets.
    let (ip, port) = text.rsplit_once(':').with_context(|| format!("no address: {line:?}"))?;
    Ok(SocketAddr::new(ip.parse::<IpAddr>().with_context(|| format!("no address: {line:?}"))?, port.parse()?))
}
