//! The light server behind the benchmark. It must cost so little that it hides nothing: one epoll
//! loop per thread, no allocation per request, one read and one write per small request.
//!
//! `GET /blob?size=N` is answered with N bytes, everything else with a small JSON-RPC result.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};

use crate::wire::{content_length, head_end, method_and_target, query_number};

/// Longest head (with whatever body bytes came along) that is read at once.
const BUFFER_BYTES: usize = 16 << 10;
const BLOB_CHUNK_BYTES: usize = 1 << 20;
const LISTENER: u64 = u64::MAX;
const SMALL_ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 75\r\n\r\n\
{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"content\":[{\"type\":\"text\",\"text\":\"ok\"}]}}";

/// Opens a listener whose port several threads can share (SO_REUSEPORT).
///
/// # Errors
/// When the address can't be bound.
pub fn shared_listener(addr: SocketAddr) -> Result<TcpListener> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::ReusePort, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(addr)).with_context(|| format!("cannot bind {addr}"))?;
    listen(&fd, Backlog::new(1024)?)?;
    Ok(TcpListener::from(fd))
}

/// Serves on `listener` in the calling thread, until accepting or polling fails.
///
/// # Errors
/// When epoll is refused.
pub fn serve(listener: &TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    let mut server = Server {
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        connections: Vec::new(),
        free: Vec::new(),
        blob: vec![b'x'; BLOB_CHUNK_BYTES],
    };
    server.epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut events = [EpollEvent::empty(); 128];
    loop {
        let count = match server.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            outcome => outcome.context("epoll_wait")?,
        };
        for event in events.iter().take(count) {
            if event.data() == LISTENER {
                server.accept(listener)?;
            } else if let Ok(slot) = usize::try_from(event.data()) {
                server.ready(slot);
            }
        }
    }
}

struct Server {
    epoll: Epoll,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    blob: Vec<u8>,
}

struct Connection {
    fd: OwnedFd,
    buffer: [u8; BUFFER_BYTES],
    filled: usize,
    /// Body bytes of the request that are still to be read and thrown away.
    body_left: u64,
    /// The answer waits for the last of them.
    answer: Pending,
    waits_for_room: bool,
}

#[derive(Clone, Copy)]
enum Pending {
    None,
    Small {
        sent: usize,
    },
    /// The head is out; this much of the blob is not.
    Blob {
        left: u64,
    },
    /// Nothing is out.
    BlobHead {
        size: u64,
    },
}

impl Server {
    fn accept(&mut self, listener: &TcpListener) -> Result<()> {
        loop {
            // SAFETY: accept4(2) on an open listener; no address is asked for.
            let fd = unsafe {
                libc::accept4(
                    listener.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                )
            };
            if fd < 0 {
                return Ok(());
            }
            // SAFETY: the kernel has just given us this descriptor.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            self.epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLIN, slot as u64))?;
            if let Some(place) = self.connections.get_mut(slot) {
                *place = Some(Box::new(Connection {
                    fd,
                    buffer: [0; BUFFER_BYTES],
                    filled: 0,
                    body_left: 0,
                    answer: Pending::None,
                    waits_for_room: false,
                }));
            }
        }
    }

    fn ready(&mut self, slot: usize) {
        let Some(place) = self.connections.get_mut(slot) else { return };
        let Some(connection) = place else { return };
        let keep = connection.step(&self.blob).is_ok_and(|open| open);
        if !keep {
            // Closing the descriptor takes it out of the epoll set.
            *place = None;
            self.free.push(slot);
        } else if connection.waits_for_room != connection.wants_room() {
            let wants = !connection.waits_for_room;
            connection.waits_for_room = wants;
            let flags = if wants { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            let mut event = EpollEvent::new(flags, slot as u64);
            if self.epoll.modify(connection.fd.as_fd(), &mut event).is_err() {
                *place = None;
                self.free.push(slot);
            }
        }
    }
}

impl Connection {
    /// An answer is begun and the socket took no more.
    fn wants_room(&self) -> bool {
        self.body_left == 0 && !matches!(self.answer, Pending::None)
    }

    /// Does what can be done now; false at the end of the stream.
    fn step(&mut self, blob: &[u8]) -> io::Result<bool> {
        if self.waits_for_room {
            if !self.flush(blob)? {
                return Ok(true);
            }
        } else {
            let room = self.buffer.get_mut(self.filled..).unwrap_or_default();
            if room.is_empty() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // SAFETY: the buffer is valid for its length.
            let count = unsafe { libc::recv(self.fd.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
            match usize::try_from(count) {
                Ok(0) => return Ok(false),
                Ok(count) => self.filled += count,
                Err(_) => return would_block(),
            }
        }
        // Every complete request in the buffer, in order.
        loop {
            let skip = self.filled.min(usize::try_from(self.body_left).unwrap_or(usize::MAX));
            if skip > 0 {
                self.consume(skip);
                self.body_left -= skip as u64;
            }
            if self.body_left > 0 {
                return Ok(true);
            }
            if !matches!(self.answer, Pending::None) {
                if !self.flush(blob)? {
                    return Ok(true);
                }
                continue;
            }
            let bytes = self.buffer.get(..self.filled).unwrap_or_default();
            let Some(end) = head_end(bytes) else { return Ok(true) };
            let head = bytes.get(..end).unwrap_or_default();
            let (_, target) = method_and_target(head);
            self.answer = if target.starts_with("/blob") {
                Pending::BlobHead { size: query_number(target, "size").unwrap_or(0) }
            } else {
                Pending::Small { sent: 0 }
            };
            self.body_left = content_length(head).unwrap_or(0);
            self.consume(end);
        }
    }

    fn consume(&mut self, count: usize) {
        self.buffer.copy_within(count..self.filled, 0);
        self.filled -= count;
    }

    /// Writes the pending answer; true when it is out.
    fn flush(&mut self, blob: &[u8]) -> io::Result<bool> {
        loop {
            match self.answer {
                Pending::None => return Ok(true),
                Pending::Small { sent } => {
                    let rest = SMALL_ANSWER.get(sent..).unwrap_or_default();
                    let Some(count) = self.send(rest)? else { return Ok(false) };
                    self.answer = if count == rest.len() {
                        Pending::None
                    } else {
                        Pending::Small { sent: sent + count }
                    };
                }
                Pending::BlobHead { size } => {
                    let head = format!(
                        "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {size}\r\n\r\n"
                    );
                    let Some(count) = self.send(head.as_bytes())? else { return Ok(false) };
                    if count != head.len() {
                        // A send buffer without room for 100 bytes after EPOLLOUT: not worth a state.
                        return Err(io::ErrorKind::WriteZero.into());
                    }
                    self.answer = if size == 0 { Pending::None } else { Pending::Blob { left: size } };
                }
                Pending::Blob { left } => {
                    let take = blob.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    let Some(count) = self.send(blob.get(..take).unwrap_or_default())? else {
                        return Ok(false);
                    };
                    let left = left - count as u64;
                    self.answer = if left == 0 { Pending::None } else { Pending::Blob { left } };
                }
            }
        }
    }

    /// Writes once; `None` when there is no room.
    fn send(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        // SAFETY: the slice is valid for its length.
        let count = unsafe {
            libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL)
        };
        match usize::try_from(count) {
            Ok(count) => Ok(Some(count)),
            Err(_) => would_block().map(|_| None),
        }
    }
}

fn would_block() -> io::Result<bool> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock { Ok(true) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_answer_states_its_length() {
        let end = head_end(SMALL_ANSWER).unwrap();
        assert_eq!(content_length(&SMALL_ANSWER[..end]), Some((SMALL_ANSWER.len() - end) as u64));
    }
}
