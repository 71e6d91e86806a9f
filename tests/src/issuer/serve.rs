//! The issuer's documents over loopback HTTP, with the failures that a consumer must survive.

use std::collections::HashMap;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::Issuer;
use crate::wire::{HeadBuffer, path_of};

/// How the server misbehaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailMode {
    /// It does not.
    None,
    /// Answers this status with a short text.
    Status(u16),
    /// Accepts and reads, and answers nothing until the mode changes.
    Hang,
    /// Closes the connection instead of an answer.
    Close,
    /// Answers 200 with a body that is no JSON.
    Garbage,
    /// Answers 200 with a JSON body padded by spaces to this many bytes.
    Oversized(usize),
    /// Metadata names another issuer (RFC 8414 section 3.3: must be refused).
    WrongIssuer,
    /// 302 to this place.
    Redirect(String),
}

/// The server of an [`Issuer`]; it ends when dropped.
///
/// It answers `<issuer path>/jwks.json`, RFC 8414's `/.well-known/oauth-authorization-server<issuer path>`
/// and OpenID's `<issuer path>/.well-known/openid-configuration` (also with the prefix in front).
#[derive(Debug)]
pub struct IssuerServer {
    addr: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    issuer: Issuer,
    addr: SocketAddr,
    state: Mutex<State>,
    closing: AtomicBool,
}

#[derive(Debug)]
struct State {
    mode: FailMode,
    max_age_seconds: Option<u32>,
    hits: HashMap<String, u64>,
}

/// A bound port that does not serve yet: the issuer's URI may hold it.
pub(super) struct Bound(TcpListener, SocketAddr);

impl Bound {
    pub(super) fn new() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = listener.local_addr()?;
        Ok(Self(listener, addr))
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.1
    }

    pub(super) fn start(self, issuer: &Issuer) -> Result<IssuerServer> {
        let Self(listener, addr) = self;
        let state = State { mode: FailMode::None, max_age_seconds: None, hits: HashMap::new() };
        let shared = Arc::new(Shared {
            issuer: issuer.clone(),
            addr,
            state: Mutex::new(state),
            closing: AtomicBool::new(false),
        });
        let served = Arc::clone(&shared);
        let acceptor = thread::Builder::new().name("issuer".to_owned()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if served.closing.load(Ordering::Acquire) {
                    return;
                }
                let served = Arc::clone(&served);
                thread::spawn(move || served.connection(stream));
            }
        })?;
        Ok(IssuerServer { addr, shared, acceptor: Some(acceptor) })
    }
}

impl IssuerServer {
    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://127.0.0.1:<port>`.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The key set's URL.
    #[must_use]
    pub fn jwks_url(&self) -> String {
        self.shared.jwks_url()
    }

    /// Changes how it fails, from the next request on (a hanging one wakes up too).
    pub fn set_fail_mode(&self, mode: FailMode) {
        self.shared.lock().mode = mode;
    }

    /// Adds `Cache-Control: max-age=..` to the answers, or leaves the header out.
    pub fn set_max_age(&self, seconds: Option<u32>) {
        self.shared.lock().max_age_seconds = seconds;
    }

    /// How many requests asked for `path`.
    #[must_use]
    pub fn hits(&self, path: &str) -> u64 {
        self.shared.lock().hits.get(path).copied().unwrap_or(0)
    }

    /// How many requests came in all.
    #[must_use]
    pub fn total_hits(&self) -> u64 {
        self.shared.lock().hits.values().sum()
    }
}

impl Drop for IssuerServer {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        // Wakes the acceptor; connections notice the flag at their next time-out.
        drop(TcpStream::connect(self.addr));
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn issuer_path(&self) -> &str {
        let rest = self.issuer.uri().split_once("://").map_or("", |(_, rest)| rest);
        rest.find('/').and_then(|at| rest.get(at..)).map_or("", |path| path.trim_end_matches('/'))
    }

    fn jwks_url(&self) -> String {
        format!("http://{}{}/jwks.json", self.addr, self.issuer_path())
    }

    fn connection(&self, mut stream: TcpStream) {
        drop(stream.set_read_timeout(Some(Duration::from_millis(50))));
        let mut heads = HeadBuffer::default();
        while !self.closing.load(Ordering::Acquire) {
            match heads.next_head(&mut stream) {
                Ok(Some(head)) => {
                    if !self.answer(&mut stream, path_of(&head)) {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(_) => return,
            }
        }
    }

    /// Answers one request; false when the connection ends with it.
    fn answer(&self, stream: &mut TcpStream, path: &str) -> bool {
        *self.lock().hits.entry(path.to_owned()).or_default() += 1;
        let mode = loop {
            let mode = self.lock().mode.clone();
            if mode != FailMode::Hang {
                break mode;
            }
            if self.closing.load(Ordering::Acquire) {
                return false;
            }
            thread::sleep(Duration::from_millis(10));
        };
        let (status, extra, body) = match mode {
            FailMode::Close => return false,
            FailMode::Status(status) => (status, String::new(), b"unavailable".to_vec()),
            FailMode::Redirect(to) => (302, format!("Location: {to}\r\n"), Vec::new()),
            FailMode::Garbage => (200, String::new(), b"<html>not a document</html>".to_vec()),
            FailMode::None | FailMode::Hang | FailMode::Oversized(_) | FailMode::WrongIssuer => {
                self.document(path, &mode)
            }
        };
        let cache = self.lock().max_age_seconds.map(|age| format!("Cache-Control: max-age={age}\r\n"));
        let head = format!(
            "HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{extra}{}\r\n",
            body.len(),
            cache.unwrap_or_default()
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).is_ok()
    }

    fn document(&self, path: &str, mode: &FailMode) -> (u16, String, Vec<u8>) {
        let prefix = self.issuer_path();
        let is_metadata = path == format!("/.well-known/oauth-authorization-server{prefix}")
            || path == format!("/.well-known/openid-configuration{prefix}")
            || path == format!("{prefix}/.well-known/openid-configuration");
        let value = if path == format!("{prefix}/jwks.json") {
            self.issuer.jwks()
        } else if is_metadata {
            let issuer = match mode {
                FailMode::WrongIssuer => "https://another-issuer.example",
                _ => self.issuer.uri(),
            };
            let base = self.base_url();
            json!({
                "issuer": issuer,
                "jwks_uri": self.jwks_url(),
                "authorization_endpoint": format!("{base}{prefix}/authorize"),
                "token_endpoint": format!("{base}{prefix}/token"),
                "response_types_supported": ["code"],
                "code_challenge_methods_supported": ["S256"],
            })
        } else {
            return (404, String::new(), b"{}".to_vec());
        };
        let mut body = value.to_string().into_bytes();
        if let FailMode::Oversized(length) = mode {
            body.resize((*length).max(body.len()), b' ');
        }
        (200, String::new(), body)
    }

    fn base_url(&self) -> String {
        format!("http://{}", self.addr)
    }
}
