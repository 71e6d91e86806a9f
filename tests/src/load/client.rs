//! One client thread: an epoll loop over its connections.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{LoadConfig, Stop, Tally};
use crate::wire::{content_length, head_end, header};

const SCRATCH_BYTES: usize = 256 << 10;
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct Client<'a> {
    config: &'a LoadConfig,
    stop: Stop,
    epoll: Epoll,
    connections: Vec<Connection>,
    tally: Tally,
    scratch: Vec<u8>,
}

struct Connection {
    stream: TcpStream,
    /// Index of the request that is sent next.
    next_request: usize,
    unsent: Unsent,
    waits_for_room: bool,
    sent_at: Instant,
    /// Head of the answer while it is incomplete.
    head: Vec<u8>,
    /// Body bytes to come, once the head is known.
    body_left: Option<u64>,
    status: u16,
    closes: bool,
}

/// The part of the current request that the socket did not take.
#[derive(Clone, Copy)]
struct Unsent {
    request: usize,
    from: usize,
}

#[derive(PartialEq, Eq)]
enum Progress {
    Waiting,
    Answered,
    Broken,
}

impl<'a> Client<'a> {
    pub(super) fn connect(
        config: &'a LoadConfig,
        offset: usize,
        connections: usize,
        stop: Stop,
    ) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut client = Self {
            config,
            stop,
            epoll,
            connections: Vec::new(),
            tally: Tally::new()?,
            scratch: vec![0; SCRATCH_BYTES],
        };
        for slot in 0..connections {
            let stream = open(config.target)?;
            client.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, slot as u64))?;
            client.connections.push(Connection::new(stream, (offset + slot) % config.requests.len()));
        }
        Ok(client)
    }

    pub(super) fn run(mut self) -> Result<Tally> {
        let start = Instant::now();
        for slot in 0..self.connections.len() {
            self.send_next(slot)?;
        }
        let mut events = [EpollEvent::empty(); 128];
        let mut last_answer = start;
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::from(100_u8)) {
                Err(nix::errno::Errno::EINTR) => 0,
                outcome => outcome.context("epoll_wait")?,
            };
            let before = self.tally.requests;
            for event in events.iter().take(count) {
                let slot = usize::try_from(event.data())?;
                if event.events().contains(EpollFlags::EPOLLOUT) {
                    self.push(slot)?;
                } else {
                    self.receive(slot)?;
                }
                if let Stop::Requests(limit) = self.stop
                    && self.tally.requests >= limit
                {
                    return Ok(self.tally);
                }
            }
            let now = Instant::now();
            if self.tally.requests > before {
                last_answer = now;
            }
            match self.stop {
                Stop::After(limit) if now - start >= limit => return Ok(self.tally),
                // A share of no requests at all.
                Stop::Requests(0) => return Ok(self.tally),
                _ => {}
            }
            ensure!(
                now - last_answer < self.config.stall_limit,
                "no answer for {:?}",
                self.config.stall_limit
            );
        }
    }

    fn send_next(&mut self, slot: usize) -> Result<()> {
        if let Some(connection) = self.connections.get_mut(slot) {
            connection.unsent = Unsent { request: connection.next_request, from: 0 };
            connection.next_request = (connection.next_request + 1) % self.config.requests.len();
            connection.head.clear();
            connection.body_left = None;
            connection.sent_at = Instant::now();
        }
        self.push(slot)
    }

    /// Writes what is left of the request; waits for room when the socket is full.
    fn push(&mut self, slot: usize) -> Result<()> {
        let Some(connection) = self.connections.get_mut(slot) else { return Ok(()) };
        let request =
            self.config.requests.get(connection.unsent.request).map(Vec::as_slice).unwrap_or_default();
        let was_waiting = connection.waits_for_room;
        let mut waits = false;
        while let Some(rest) = request.get(connection.unsent.from..).filter(|rest| !rest.is_empty()) {
            match connection.stream.write(rest) {
                Ok(count) => connection.unsent.from += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    waits = true;
                    break;
                }
                Err(_) => return self.broken(slot),
            }
        }
        connection.waits_for_room = waits;
        if waits != was_waiting {
            // While it waits for room an answer is read too: a refusal may come before the body is out.
            let flags = if waits { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            self.epoll.modify(&connection.stream, &mut EpollEvent::new(flags, slot as u64))?;
        }
        Ok(())
    }

    fn receive(&mut self, slot: usize) -> Result<()> {
        let Some(connection) = self.connections.get_mut(slot) else { return Ok(()) };
        let progress = connection.read(&mut self.scratch, &mut self.tally.bytes_received)?;
        match progress {
            Progress::Waiting => Ok(()),
            Progress::Broken => self.broken(slot),
            Progress::Answered => {
                let nanoseconds = u64::try_from(connection.sent_at.elapsed().as_nanos())?;
                self.tally.latency_ns.saturating_record(nanoseconds);
                self.tally.requests += 1;
                if let Some(count) = self.tally.status_counts.get_mut(usize::from(connection.status)) {
                    *count += 1;
                }
                // An answer that came before the request was out (a refusal) leaves the stream in the middle of it.
                if connection.closes || connection.waits_for_room {
                    self.reopen(slot)
                } else {
                    self.send_next(slot)
                }
            }
        }
    }

    fn broken(&mut self, slot: usize) -> Result<()> {
        self.tally.errors += 1;
        // A server that answers nothing must not become a busy loop of connects.
        if self.tally.errors > 1000 && self.tally.errors > self.tally.requests {
            bail!("{} connections broke, {} requests were answered", self.tally.errors, self.tally.requests);
        }
        self.reopen(slot)
    }

    fn reopen(&mut self, slot: usize) -> Result<()> {
        self.tally.reconnects += 1;
        let stream = open(self.config.target)?;
        self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, slot as u64))?;
        if let Some(connection) = self.connections.get_mut(slot) {
            *connection = Connection::new(stream, connection.next_request);
        }
        self.send_next(slot)
    }
}

impl Connection {
    fn new(stream: TcpStream, next_request: usize) -> Self {
        Self {
            stream,
            next_request,
            unsent: Unsent { request: next_request, from: 0 },
            waits_for_room: false,
            sent_at: Instant::now(),
            head: Vec::with_capacity(2048),
            body_left: None,
            status: 0,
            closes: false,
        }
    }

    /// Reads once. Only answers with `Content-Length` are understood.
    fn read(&mut self, scratch: &mut [u8], bytes_received: &mut u64) -> Result<Progress> {
        let count = match self.stream.read(scratch) {
            Ok(0) => return Ok(Progress::Broken),
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(Progress::Waiting);
            }
            Err(_) => return Ok(Progress::Broken),
        };
        *bytes_received += count as u64;
        let bytes = scratch.get(..count).unwrap_or_default();
        let left = match self.body_left {
            Some(left) => left.checked_sub(count as u64),
            None => {
                // The usual case, a whole head in one read, is parsed in place.
                let held = !self.head.is_empty();
                if held {
                    self.head.extend_from_slice(bytes);
                }
                let all = if held { self.head.as_slice() } else { bytes };
                let Some(end) = head_end(all) else {
                    ensure!(all.len() < 64 << 10, "no end of head in the answer's first 64 KiB");
                    if !held {
                        self.head.extend_from_slice(bytes);
                    }
                    return Ok(Progress::Waiting);
                };
                let head = all.get(..end).unwrap_or_default();
                self.status = status(head).with_context(|| {
                    format!("no status line: {:?}", String::from_utf8_lossy(head.get(..40).unwrap_or(head)))
                })?;
                self.closes =
                    header(head, "connection").is_some_and(|value| value.eq_ignore_ascii_case(b"close"));
                let length = content_length(head).context("an answer without Content-Length")?;
                length.checked_sub((all.len() - end) as u64)
            }
        };
        let left = left.context("more bytes than one answer while one request was in flight")?;
        self.body_left = Some(left);
        Ok(if left == 0 { Progress::Answered } else { Progress::Waiting })
    }
}

fn open(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, CONNECT_LIMIT)
        .with_context(|| format!("cannot connect to {target}"))?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn status(head: &[u8]) -> Option<u16> {
    std::str::from_utf8(head.get(9..12)?).ok()?.parse().ok()
}
