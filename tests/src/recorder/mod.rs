//! A server that keeps what it read: the witness of what passed the enforcer.
//!
//! In-process as [`Recorder`], or as a program of its own (`enforcer-upstream recorder`) in a cgroup
//! and a network namespace of its own as [`RemoteRecorder`]. Both serve the same way.

mod connection;
mod remote;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::guard::wait_until;

pub use connection::pattern;
pub use remote::{RemoteRecorder, serve_control};

/// What a request is answered with. The status is 200 unless said otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A small JSON-RPC result.
    Json,
    /// A body of this many bytes with `Content-Length`; byte `i` is `i % 251`.
    Big {
        /// Length of the body.
        bytes: u64,
    },
    /// An event stream, chunked, one chunk per event, then its regular end.
    Sse {
        /// Number of events.
        events: u64,
        /// Bytes of data in each event.
        event_bytes: usize,
        /// Pause before each event.
        interval_ms: u64,
    },
    /// This status with a small JSON body.
    Status {
        /// The status code.
        code: u16,
    },
    /// Closes the connection without an answer.
    Close,
}

/// How fast the server reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadMode {
    /// As fast as bytes come.
    Fast,
    /// At most `bytes` at a time, then a pause.
    Slow {
        /// Bytes per read, at least 1.
        bytes: usize,
        /// Pause after each read.
        pause_ms: u64,
    },
}

/// How the recorder serves; a change holds from each connection's next request (or read) on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// What requests are answered with.
    pub answer: Answer,
    /// How fast it reads.
    pub read: ReadMode,
    /// Pause between a request's last byte and its answer.
    pub answer_delay_ms: u64,
    /// How many bytes of each connection are kept as they are (all are counted and hashed).
    pub keep_bytes: usize,
    /// Accepted sockets are non-blocking, as those of event loops are.
    #[serde(default)]
    pub nonblocking: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            answer: Answer::Json,
            read: ReadMode::Fast,
            answer_delay_ms: 0,
            keep_bytes: 1 << 20,
            nonblocking: false,
        }
    }
}

/// What the server read on one connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionRecord {
    /// The client's address as the server sees it.
    pub peer: SocketAddr,
    /// Bytes read in all.
    pub bytes_read: u64,
    /// SHA-256 over all of them, in hexadecimal.
    pub sha256: String,
    /// The first of them, up to [`Config::keep_bytes`].
    #[serde(with = "base64_bytes")]
    pub kept: Vec<u8>,
    /// The requests whose last byte was read.
    pub requests: Vec<RequestRecord>,
    /// The connection has ended.
    pub closed: bool,
    /// Why, if not by an orderly end of file.
    pub error: Option<String>,
}

/// One request as the lenient parser saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Its method.
    pub method: String,
    /// Its target, with the query.
    pub target: String,
    /// Length of its head with the blank line.
    pub head_bytes: u64,
    /// Length of its body without chunking.
    pub body_bytes: u64,
    /// SHA-256 over the body without chunking, in hexadecimal.
    pub body_sha256: String,
}

/// A recording server in threads of this process; it ends when dropped.
#[derive(Debug)]
pub struct Recorder {
    addr: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    config: Mutex<Config>,
    /// By order of acceptance.
    records: Mutex<BTreeMap<u64, ConnectionRecord>>,
    closing: AtomicBool,
}

impl Recorder {
    /// Listens on `listen` (port 0: a free one).
    ///
    /// # Errors
    /// When the address can't be bound.
    pub fn start(listen: SocketAddr, config: Config) -> Result<Self> {
        let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
        Self::on(listener, config)
    }

    /// Serves on a listener made elsewhere, e.g. in a network namespace.
    ///
    /// # Errors
    /// When the listener has no address or no thread can be started.
    pub fn on(listener: TcpListener, config: Config) -> Result<Self> {
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            config: Mutex::new(config),
            records: Mutex::new(BTreeMap::new()),
            closing: AtomicBool::new(false),
        });
        let served = Arc::clone(&shared);
        listener.set_nonblocking(true)?;
        let acceptor =
            thread::Builder::new().name("recorder".to_owned()).spawn(move || accept(&listener, &served))?;
        Ok(Self { addr, shared, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes how it serves.
    pub fn set_config(&self, config: Config) {
        *lock(&self.shared.config) = config;
    }

    /// All connections in the order of their acceptance.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionRecord> {
        self.shared.connections()
    }

    /// The last connection from `peer`.
    #[must_use]
    pub fn connection(&self, peer: SocketAddr) -> Option<ConnectionRecord> {
        find(self.connections(), peer)
    }

    /// Waits until the connection from `peer` has read `bytes`, and gives its record.
    ///
    /// # Errors
    /// When it has not within `timeout`.
    pub fn wait_for_bytes(
        &self,
        peer: SocketAddr,
        bytes: u64,
        timeout: Duration,
    ) -> Result<ConnectionRecord> {
        wait_until(&format!("{bytes} bytes from {peer}"), timeout, || {
            self.connection(peer).filter(|record| record.bytes_read >= bytes)
        })
    }

    /// Forgets the connections that have ended.
    pub fn forget_closed(&self) {
        self.shared.forget_closed();
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
    }
}

impl Shared {
    pub(crate) fn connections(&self) -> Vec<ConnectionRecord> {
        lock(&self.records).values().cloned().collect()
    }

    pub(crate) fn forget_closed(&self) {
        lock(&self.records).retain(|_, record| !record.closed);
    }

    pub(crate) fn set_config(&self, config: Config) {
        *lock(&self.config) = config;
    }

    fn config(&self) -> Config {
        lock(&self.config).clone()
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn update(&self, id: u64, change: impl FnOnce(&mut ConnectionRecord)) {
        if let Some(record) = lock(&self.records).get_mut(&id) {
            change(record);
        }
    }
}

pub(crate) fn find(records: Vec<ConnectionRecord>, peer: SocketAddr) -> Option<ConnectionRecord> {
    // A dual-stack listener sees IPv4 clients as v4-mapped; a client calls itself by its plain address.
    let same = |record: &ConnectionRecord| {
        record.peer.port() == peer.port() && record.peer.ip().to_canonical() == peer.ip().to_canonical()
    };
    records.into_iter().rev().find(same)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut next_id = 0;
    while !shared.is_closing() {
        let Ok((stream, peer)) = listener.accept() else {
            wait_readable(listener, 50);
            continue;
        };
        let nonblocking = shared.config().nonblocking;
        // Before the connection is on record: who sees it there may count on it.
        drop(stream.set_nonblocking(nonblocking));
        let record = ConnectionRecord {
            peer,
            bytes_read: 0,
            sha256: connection::hex_sha256(&[]),
            kept: Vec::new(),
            requests: Vec::new(),
            closed: false,
            error: None,
        };
        lock(&shared.records).insert(next_id, record);
        let (shared, id) = (Arc::clone(shared), next_id);
        next_id += 1;
        // A small stack: there may be hundreds of connections.
        let spawned = thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || connection::serve(&prepare(stream), &shared, id));
        if let Err(error) = spawned {
            eprintln!("recorder: no thread for {peer}: {error}");
        }
    }
}

fn prepare(stream: TcpStream) -> TcpStream {
    // Without these the connection still works, only its end is noticed later.
    drop(stream.set_nodelay(true));
    drop(stream.set_read_timeout(Some(Duration::from_millis(200))));
    drop(stream.set_write_timeout(Some(Duration::from_millis(200))));
    stream
}

/// Waits for something to read, an end or an error; false when `timeout_ms` passes without.
fn wait_readable(socket: &impl AsFd, timeout_ms: u8) -> bool {
    wait_for(socket, PollFlags::POLLIN, timeout_ms)
}

/// Waits for room to write, or an error; false when `timeout_ms` passes without.
fn wait_writable(socket: &impl AsFd, timeout_ms: u8) -> bool {
    wait_for(socket, PollFlags::POLLOUT, timeout_ms)
}

fn wait_for(socket: &impl AsFd, events: PollFlags, timeout_ms: u8) -> bool {
    let mut polled = [PollFd::new(socket.as_fd(), events)];
    poll(&mut polled, PollTimeout::from(timeout_ms)).is_ok_and(|ready| ready > 0)
}

mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &Vec<u8>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
