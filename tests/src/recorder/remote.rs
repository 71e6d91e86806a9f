//! The recorder as a program of its own, controlled over a unix socket: that works from any network
//! namespace and adds nothing to the traffic under test.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::{Config, ConnectionRecord, Recorder, Shared, find};
use crate::guard::{Cgroup, NetNs, Proc, bin_path, wait_until};

const START_LIMIT: Duration = Duration::from_secs(10);

/// One line of JSON each way.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    Connections,
    ForgetClosed,
    SetConfig(Config),
}

/// A recorder in a process of its own.
#[derive(Debug)]
pub struct RemoteRecorder {
    addr: SocketAddr,
    control: PathBuf,
    process: Proc,
    // After the process: the socket's directory is removed last.
    _directory: TempDir,
}

impl RemoteRecorder {
    /// Starts `enforcer-upstream recorder` in the given cgroup and namespace and waits until it listens.
    ///
    /// # Errors
    /// When the program was not built or does not start.
    pub fn spawn(
        listen: SocketAddr,
        config: &Config,
        cgroup: Option<&Cgroup>,
        netns: Option<&NetNs>,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let control = directory.path().join("control");
        let mut command = Command::new(bin_path("enforcer-upstream")?);
        command.arg("recorder").arg("--listen").arg(listen.to_string()).arg("--control").arg(&control);
        command.arg("--config").arg(serde_json::to_string(config)?);
        if let Some(cgroup) = cgroup {
            cgroup.place(&mut command)?;
        }
        if let Some(netns) = netns {
            netns.place(&mut command)?;
        }
        let mut process = Proc::spawn("enforcer-upstream recorder", command)?;
        let addr = crate::peers::listening_addr(&mut process, START_LIMIT)?;
        Ok(Self { addr, control, process, _directory: directory })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its process, e.g. to kill it.
    pub fn process(&mut self) -> &mut Proc {
        &mut self.process
    }

    /// Changes how it serves.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn set_config(&self, config: &Config) -> Result<()> {
        self.order(&Order::SetConfig(config.clone())).map(drop)
    }

    /// All connections in the order of their acceptance.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn connections(&self) -> Result<Vec<ConnectionRecord>> {
        Ok(serde_json::from_str(&self.order(&Order::Connections)?)?)
    }

    /// The last connection from `peer`.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn connection(&self, peer: SocketAddr) -> Result<Option<ConnectionRecord>> {
        Ok(find(self.connections()?, peer))
    }

    /// Waits until the connection from `peer` has read `bytes`, and gives its record.
    ///
    /// # Errors
    /// When it has not within `timeout`, or the process is gone.
    pub fn wait_for_bytes(
        &self,
        peer: SocketAddr,
        bytes: u64,
        timeout: Duration,
    ) -> Result<ConnectionRecord> {
        wait_until(&format!("{bytes} bytes from {peer}"), timeout, || {
            self.connection(peer).map(|found| found.filter(|record| record.bytes_read >= bytes)).transpose()
        })?
    }

    /// Forgets the connections that have ended.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn forget_closed(&self) -> Result<()> {
        self.order(&Order::ForgetClosed).map(drop)
    }

    fn order(&self, order: &Order) -> Result<String> {
        let mut stream = UnixStream::connect(&self.control).context("the recorder's control socket")?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        writeln!(stream, "{}", serde_json::to_string(order)?)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    }
}

/// Answers orders for `recorder` on the unix socket `path` until the process ends. One at a time.
///
/// # Errors
/// When the socket can't be made.
pub fn serve_control(recorder: &Recorder, path: &Path) -> Result<()> {
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    println!("listening {}", recorder.addr());
    let shared = recorder.shared();
    for stream in listener.incoming().flatten() {
        if let Err(error) = obey(&shared, &stream) {
            eprintln!("recorder: control: {error}");
        }
    }
    Ok(())
}

fn obey(shared: &Arc<Shared>, mut stream: &UnixStream) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let reply = match serde_json::from_str(&line)? {
        Order::Connections => serde_json::to_string(&shared.connections())?,
        Order::ForgetClosed => {
            shared.forget_closed();
            "null".to_owned()
        }
        Order::SetConfig(config) => {
            shared.set_config(config);
            "null".to_owned()
        }
    };
    Ok(writeln!(stream, "{reply}")?)
}
