//! Does this kernel carry the datapath? Tried, not read off a version number: some kernels lose or stall bytes after the first
//! injected request.
//!
//! A process of our own, in a cgroup of its own, accepts one loopback connection under the real programs. Six requests go over
//! it: two through the slow path, one that the kernel knows, one that the kernel refuses by itself, and two more through the slow
//! path whose bytes are dropped and not swallowed, as those of a request that comes in several packets can be. The kernels that
//! stall do it then only: they count as read what was dropped, and count it again when the server reads what was injected.

mod server;

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use aya::maps::{MapData, RingBuf};
use enforcer_common::abi::{
    ABI_VERSION, Config, Endpoint, EndpointKey, FAMILY_V4, Grant, InjectHeader, MODE_ENFORCE, Origin,
    PUNT_DATA, PuntHeader, REPLY_MAX_BYTES, Reply, VERDICT_ALLOW, VERDICT_DENY, Verdict, grant_serial,
};
use enforcer_common::digest::{DigestKey, KEY_WORDS};
use enforcer_common::flow::{Ctl, State};
use enforcer_common::head;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::datapath::{self, Injectors, Maps, PinDir};
use crate::lifecycle::paths;

use server::{Server, TempCgroup};

/// How long one step may take.
const STEP: Duration = Duration::from_secs(3);
/// How often the test is tried.
const ATTEMPTS: u32 = 3;
/// Names of its pin directory and cgroup, before the process id.
const NAME: &str = "enforcer-selftest-";
const ENDPOINT_ID: u32 = 0;
const GENERATION: u64 = 1;
/// Requests that the server reads with blocking calls, which must not fail; the kernel refuses only on non-blocking sockets.
const BLOCKING: u32 = 3;
/// What the self-test's server answers.
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
/// What the kernel answers to the request that it refuses: 20 bytes of head less the padding.
const REFUSAL_HEAD: &str = "HTTP/1.1 401 Unauthorized\r\nContent-Length:     \r\n\r\n";

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelfTestReport {
    /// Requests that went through the slow path.
    pub slow: u32,
    /// Requests that the kernel passed by itself.
    pub fast: u32,
    /// Requests that the kernel refused by itself.
    pub refused: u32,
}

impl fmt::Display for SelfTestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} slow, {} fast, {} refused in the kernel", self.slow, self.fast, self.refused)
    }
}

/// What does not work.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// The test could not be set up.
    #[error("cannot set up the self-test: {0}")]
    Setup(String),
    /// The kernel refused the programs.
    #[error(transparent)]
    Load(#[from] datapath::LoadError),
    /// The first request did not reach the daemon.
    #[error("request 1 did not reach the daemon within {} s: bytes on guarded sockets are not seen", STEP.as_secs())]
    NotPunted,
    /// The first request was not answered.
    #[error("request 1 was not answered within {} s: injected bytes do not reach the server", STEP.as_secs())]
    NotAnswered,
    /// A later request was not seen, or not answered.
    #[error(
        "request {request} ({path}) got nowhere within {} s: this kernel stalls a connection after injected bytes (known of 6.12.43 to \
         6.12.74, 6.16, 6.17 and 6.18 before 6.18.15); use another kernel",
        STEP.as_secs()
    )]
    Stalls {
        /// Which of the six.
        request: u32,
        /// Which way it should have gone.
        path: &'static str,
    },
    /// An answer was wrong.
    #[error("request {request} ({path}) got a wrong answer: {got:?}")]
    WrongAnswer {
        /// Which of the six.
        request: u32,
        /// Which way it should have gone.
        path: &'static str,
        /// What came.
        got: String,
    },
}

fn setup(error: impl fmt::Display) -> SelfTestError {
    SelfTestError::Setup(error.to_string())
}

/// Runs the test, more than once if need be: on a busy machine a step may be late, and only a kernel that fails each time is unfit.
/// Forks, so call it before any thread is started.
///
/// # Errors
/// See [`SelfTestError`]. Nothing stays behind.
pub fn run(bpffs: &Path) -> Result<SelfTestReport, SelfTestError> {
    let root = paths::cgroup2_root().map_err(setup)?;
    for dir in [bpffs, root.as_path()] {
        remove_leftovers(dir);
    }
    let mut result = once(bpffs, &root);
    for _ in 1..ATTEMPTS {
        if result.is_ok() || matches!(result, Err(SelfTestError::Load(_))) {
            break;
        }
        result = once(bpffs, &root);
    }
    result
}

/// Removes what a self-test left whose process was killed in the middle of it.
fn remove_leftovers(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|name| name.strip_prefix(NAME)).filter(|pid| pid.parse::<u32>().is_ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // A pin directory has files in it, a cgroup has none that can be removed.
            if std::fs::remove_dir(entry.path()).is_err() {
                let _ = PinDir::new(entry.path()).remove();
            }
        }
    }
}

fn once(bpffs: &Path, root: &Path) -> Result<SelfTestReport, SelfTestError> {
    let name = format!("{NAME}{}", std::process::id());
    let cgroup = TempCgroup::new(&root.join(&name))?;
    let pins = PinDir::new(bpffs.join(&name));
    let mut loaded = datapath::load(&pins)?;
    let mut maps = Maps::open(&pins).map_err(setup)?;
    let ring = Maps::punts(&pins).map_err(setup)?;
    let injectors = Injectors::new(&mut maps).map_err(setup)?;
    loaded.attach(&cgroup.0)?;
    let server = Server::start(&cgroup.0)?;
    let mut bench = Bench { maps, ring, injectors, digest_key: Box::new(DigestKey { words: key_words() }) };
    bench.configure(server.addr).map_err(setup)?;
    // `loaded` was not committed: its pins go when it is dropped, after the server's socket.
    let result = bench.six_requests(server.addr);
    drop(server);
    drop(loaded);
    result
}

/// A fixed key will do: nobody attacks the self-test.
fn key_words() -> [u64; KEY_WORDS] {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state ^ state >> 31
    })
}

struct Bench {
    maps: Maps,
    ring: RingBuf<MapData>,
    injectors: Injectors,
    digest_key: Box<DigestKey>,
}

impl Bench {
    fn configure(&mut self, addr: SocketAddr) -> Result<(), datapath::LiveError> {
        self.maps.set_digest_key(&self.digest_key)?;
        let mut key = EndpointKey { addr: [0; 16], port: addr.port(), family: FAMILY_V4, zero: 0 };
        key.addr[..4].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
        self.maps.set_endpoint(key, Endpoint { endpoint_id: ENDPOINT_ID, unavailable_reply_id: 0 })?;
        let mut bytes = [b' '; REPLY_MAX_BYTES];
        bytes[..REFUSAL_HEAD.len()].copy_from_slice(REFUSAL_HEAD.as_bytes());
        self.maps.set_reply(
            0,
            &Reply {
                min_bytes: REFUSAL_HEAD.len() as u32,
                head_bytes: REFUSAL_HEAD.len() as u32,
                content_length_at: REFUSAL_HEAD.find("    \r").unwrap_or_default() as u32,
                status: 401,
                bytes,
            },
        )?;
        let now_ns = super::now().boot_ns;
        self.maps.set_config(Config {
            abi_version: ABI_VERSION,
            mode: MODE_ENFORCE,
            generation: GENERATION,
            heartbeat_ns: now_ns,
            heartbeat_limit_ns: u64::MAX / 2,
            loaded_ns: now_ns,
            daemon_started_ns: now_ns,
            daemon_pid: std::process::id(),
            ..Config::NONE
        })
    }

    fn six_requests(&mut self, addr: SocketAddr) -> Result<SelfTestReport, SelfTestError> {
        let mut client = TcpStream::connect_timeout(&addr, STEP).map_err(setup)?;
        client.set_read_timeout(Some(STEP)).map_err(setup)?;
        client.set_nodelay(true).map_err(setup)?;
        let known = request("/known");
        let refused = request("/refused");
        let mut origin = Origin::NONE;
        for number in 1..=2 {
            origin = self.slow(&mut client, number, "slow path")?;
        }
        self.verdict(&known, &origin, VERDICT_ALLOW).map_err(setup)?;
        self.verdict(&refused, &origin, VERDICT_DENY).map_err(setup)?;
        // Its read must block before the bytes come: that is the harder case.
        std::thread::sleep(Duration::from_millis(5));
        client.write_all(known.as_bytes()).map_err(setup)?;
        expect(&mut client, 3, "fast path", b"HTTP/1.1 200")?;
        std::thread::sleep(Duration::from_millis(5));
        client.write_all(refused.as_bytes()).map_err(setup)?;
        expect(&mut client, 4, "refusal in the kernel", b"HTTP/1.1 401")?;
        self.maps.clear_sink().map_err(setup)?;
        for number in 5..=6 {
            self.slow(&mut client, number, "slow path, dropped")?;
        }
        Ok(SelfTestReport { slow: 4, fast: 1, refused: 1 })
    }

    /// One request that is new to the kernel; where it says that it comes from.
    fn slow(
        &mut self,
        client: &mut TcpStream,
        number: u32,
        path: &'static str,
    ) -> Result<Origin, SelfTestError> {
        std::thread::sleep(Duration::from_millis(5));
        client.write_all(request("/unknown").as_bytes()).map_err(setup)?;
        let origin = self.carry(number, path)?;
        expect(client, number, path, b"HTTP/1.1 200")?;
        Ok(origin)
    }

    fn verdict(&mut self, request: &str, origin: &Origin, kind: u32) -> Result<(), datapath::LiveError> {
        let Ok((info, digest)) = head::analyze_bytes(request.as_bytes(), &self.digest_key, origin) else {
            return Ok(());
        };
        let serial = grant_serial(1, 0);
        let far_ns = u64::MAX;
        self.maps.set_grant(
            0,
            &Grant {
                serial,
                deadline_ns: far_ns,
                generation: GENERATION,
                caller: Origin::NONE,
                principal_id: 0,
                granted_ns: 0,
                expires_at_unix_secs: 0,
                ends_at_unix_secs: u64::MAX,
                requests: 0,
                fingerprint: [0; 16],
                buckets: [0; 8],
                server_id: 0,
                revoked: 0,
            },
        )?;
        self.maps.set_verdict(
            digest,
            Verdict {
                digest,
                kind,
                index: 0,
                grant_serial: serial,
                generation: GENERATION,
                deadline_ns: far_ns,
                server_id: 0,
                head_bytes: info.head_bytes,
            },
        )
    }

    /// Does the daemon's part for one request that was punted whole.
    fn carry(&mut self, request: u32, path: &'static str) -> Result<Origin, SelfTestError> {
        let end = Instant::now() + STEP;
        loop {
            if let Some(record) = self.ring.next() {
                let Some((header, bytes)) = super::split(&record) else {
                    return Err(setup("malformed record"));
                };
                let PuntHeader { cookie, epoch, kind, len_bytes, write_seq, origin, .. } = header;
                if kind != PUNT_DATA {
                    continue;
                }
                let punted = Ctl::new(State::Punted, epoch, u64::from(len_bytes));
                self.injectors.to_server(0, cookie, punted, 0, bytes).map_err(setup)?;
                let head = Ctl::new(State::Head, epoch, 0);
                self.injectors
                    .hand_back(InjectHeader {
                        cookie,
                        expected_ctl: punted.0,
                        new_ctl: head.0,
                        remaining_bytes: 0,
                        chunked: 0,
                        kind: 0,
                        grant_serial: 0,
                        write_seq_mark: write_seq,
                        flags: 0,
                        refusal: 0,
                    })
                    .map_err(setup)?;
                return Ok(origin);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(nothing(request, path, SelfTestError::NotPunted));
            }
            let fd = self.ring.as_fd();
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout);
        }
    }
}

/// Nothing came in time: a kernel that carried the first request stalls.
fn nothing(request: u32, path: &'static str, if_first: SelfTestError) -> SelfTestError {
    if request == 1 { if_first } else { SelfTestError::Stalls { request, path } }
}

/// A request long enough for the kernel's refusal to fit.
fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: self-test\r\nX-Padding: {}\r\n\r\n", "x".repeat(100))
}

fn expect(
    client: &mut TcpStream,
    request: u32,
    path: &'static str,
    start: &[u8],
) -> Result<(), SelfTestError> {
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match client.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                got.extend_from_slice(&buffer[..length]);
                if complete(&got) {
                    break;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(nothing(request, path, SelfTestError::NotAnswered));
            }
            Err(error) => return Err(setup(error)),
        }
    }
    if got.starts_with(start) {
        Ok(())
    } else {
        Err(SelfTestError::WrongAnswer { request, path, got: String::from_utf8_lossy(&got).into_owned() })
    }
}

/// Whether a response with `Content-Length` is whole.
fn complete(response: &[u8]) -> bool {
    let text = String::from_utf8_lossy(response);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length:"));
    length.and_then(|value| value.trim().parse().ok()).is_some_and(|length: usize| body.len() >= length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_hold_the_refusal() {
        assert!(request("/refused").len() > REFUSAL_HEAD.len());
        assert!(complete(ANSWER));
        assert!(!complete(&ANSWER[..ANSWER.len() - 1]));
        assert_eq!(&REFUSAL_HEAD[REFUSAL_HEAD.find("    \r").unwrap()..][..4], "    ");
    }

    #[test]
    fn key_is_not_all_equal() {
        let words = key_words();
        assert!(words.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
