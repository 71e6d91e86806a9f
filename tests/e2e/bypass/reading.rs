//! Other ways for a server to read than `read`: whatever it calls, it gets what was judged or nothing.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Enforcement, skip};
use enforcer_tests::guard::{Cgroup, Deadline};
use enforcer_tests::issuer::Issuer;
use enforcer_tests::raw::Connection;

use crate::common::LIMIT;
use crate::torture::sockets::{ListenerKind, listener_in};
use crate::torture::{PATIENCE, bad_token, enforce, good_token, post};

/// How long a server tries to read what must not come.
pub(crate) const QUIET: Duration = Duration::from_millis(150);
pub(crate) const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// A guarded listener that this test serves by hand.
pub(crate) struct ByHand {
    pub(crate) listener: TcpListener,
    pub(crate) enforcement: Enforcement,
    issuer: Issuer,
    _deadline: Deadline,
}

/// Takes what is there; [`ErrorKind::WouldBlock`] if nothing is.
pub(crate) type Reader = fn(&TcpStream, &mut [u8]) -> io::Result<usize>;

impl ByHand {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let deadline = Deadline::new(name, LIMIT);
        let cgroup = Cgroup::new(name)?;
        let listener = listener_in(&cgroup, None, (Ipv4Addr::LOCALHOST, 0).into(), ListenerKind::default())?;
        let (enforcement, issuer) = enforce(cgroup, &[listener.local_addr()?])?;
        Ok(Self { listener, enforcement, issuer, _deadline: deadline })
    }

    pub(crate) fn request(&self, good: bool) -> Result<Vec<u8>> {
        let token = if good { good_token(&self.issuer)? } else { bad_token(&self.issuer)? };
        Ok(post(&token).body(b"{\"read\":\"somehow\"}").build())
    }

    /// A client that has sent a request, before or after the server accepted it.
    pub(crate) fn client(&self, request: &[u8], early: bool) -> Result<(Connection, TcpStream)> {
        let mut client = Connection::open(self.listener.local_addr()?, PATIENCE)?;
        if early {
            client.send(request)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        let (accepted, _) = self.listener.accept()?;
        accepted.set_nonblocking(true)?;
        if !early {
            client.send(request)?;
        }
        Ok((client, accepted))
    }

    /// Good and bad requests, first seen and known, sent before and after the accept, read by `reader`.
    pub(crate) fn serve(&self, reader: Reader) -> Result<()> {
        let (good, bad) = (self.request(true)?, self.request(false)?);
        for (round, early) in [false, false, true, true].into_iter().enumerate() {
            let (mut client, accepted) = self.client(&bad, early)?;
            let read = read_until(reader, &accepted, usize::MAX, QUIET)?;
            ensure!(read.is_empty(), "round {round}: it read {:?}", String::from_utf8_lossy(&read));
            ensure!(client.read_response()?.status == 401, "round {round}: a bad token");

            let (mut client, mut accepted) = self.client(&good, early)?;
            let read = read_until(reader, &accepted, good.len(), PATIENCE)?;
            ensure!(read == good, "round {round}: it read {:?}", String::from_utf8_lossy(&read));
            accepted.write_all(ANSWER)?;
            ensure!(client.read_response()?.status == 200, "round {round}: a good token");
            // On the same connection.
            client.send(&bad)?;
            let read = read_until(reader, &accepted, usize::MAX, QUIET)?;
            ensure!(read.is_empty(), "round {round}: it read {:?}", String::from_utf8_lossy(&read));
            ensure!(client.read_response()?.status == 401, "round {round}: a bad token behind a good one");
        }
        Ok(())
    }
}

/// Reads `wanted` bytes, or what comes in `patience`.
pub(crate) fn read_until(
    reader: Reader,
    socket: &TcpStream,
    wanted: usize,
    patience: Duration,
) -> Result<Vec<u8>> {
    let (mut read, end) = (Vec::new(), Instant::now() + patience);
    let mut buffer = vec![0; 1 << 16];
    while read.len() < wanted && Instant::now() < end {
        match reader(socket, &mut buffer) {
            Ok(0) => break,
            Ok(count) => read.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error).context("read"),
        }
    }
    Ok(read)
}

pub(crate) fn result(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

pub(crate) fn recv(socket: &TcpStream, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: the buffer lives through the call.
    result(unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) })
}

#[test]
fn peeking_reading_in_vectors_and_in_batches_shows_nothing_unjudged() -> Result<()> {
    let scene = ByHand::new("peek")?;
    // Looks first, then takes exactly what it saw.
    scene.serve(|socket, buffer| {
        let seen = recv(socket, buffer, libc::MSG_PEEK)?;
        let (shown, mut taken) = (buffer[..seen].to_vec(), vec![0; seen]);
        let count = recv(socket, &mut taken, 0)?;
        if taken[..count] != shown[..count] {
            return Err(io::Error::other("it read something else than it saw"));
        }
        buffer[..count].copy_from_slice(&taken[..count]);
        Ok(count)
    })?;
    scene.serve(|mut socket, buffer| {
        let (mut one, mut rest) = ([0], vec![0; 4096]);
        let count =
            socket.read_vectored(&mut [io::IoSliceMut::new(&mut one), io::IoSliceMut::new(&mut rest)])?;
        let all = [&one[..], &rest].concat();
        buffer[..count].copy_from_slice(&all[..count]);
        Ok(count)
    })?;
    scene.serve(|socket, buffer| {
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: all-zero is a valid header; buffer and header live through the call.
        unsafe {
            let mut message: libc::mmsghdr = std::mem::zeroed();
            message.msg_hdr.msg_iov = &raw mut part;
            message.msg_hdr.msg_iovlen = 1;
            let flags = libc::MSG_DONTWAIT;
            let fd = socket.as_raw_fd();
            result(libc::recvmmsg(fd, &raw mut message, 1, flags, std::ptr::null_mut()) as isize)?;
            Ok(message.msg_len as usize)
        }
    })
}

/// Urgent bytes don't arrive at all, neither in line nor out of it; and they don't make the server look as if it read past the judge.
#[test]
fn reading_out_of_band_shows_nothing_unjudged() -> Result<()> {
    let scene = ByHand::new("oob")?;
    let (good, bad) = (scene.request(true)?, scene.request(false)?);
    for request in [&bad, &good] {
        for early in [0, 1, 40] {
            let client = Connection::open(scene.listener.local_addr()?, PATIENCE)?;
            // Three of them would move the server's place in the stream.
            for at in early..early + 3 {
                let fd = client.stream().as_raw_fd();
                // SAFETY: the bytes live through the call.
                result(unsafe { libc::send(fd, request[..early].as_ptr().cast(), early, 0) })?;
                // SAFETY: as above.
                result(unsafe { libc::send(fd, request[at..].as_ptr().cast(), 1, libc::MSG_OOB) })?;
                std::thread::sleep(Duration::from_millis(20));
            }
            let (accepted, _) = scene.listener.accept()?;
            accepted.set_nonblocking(true)?;
            let out_of_band = |socket: &TcpStream, buffer: &mut [u8]| {
                recv(socket, buffer, libc::MSG_OOB).map_err(|error| match error.raw_os_error() {
                    // There is none.
                    Some(libc::EINVAL | libc::EAGAIN) => ErrorKind::WouldBlock.into(),
                    _ => error,
                })
            };
            let urgent = read_until(out_of_band, &accepted, 1, QUIET)?;
            ensure!(urgent.is_empty(), "an urgent byte arrived: {urgent:?}");
            let read = read_until(|mut socket, buffer| socket.read(buffer), &accepted, 1, QUIET)?;
            ensure!(read.is_empty(), "it read {:?}", String::from_utf8_lossy(&read));
        }
    }
    ensure!(scene.enforcement.counter("gate-urgent")? >= 6, "nothing was dropped");
    ensure!(scene.enforcement.counter("dead-unjudged")? == 0, "the server was suspected");
    let (_client, accepted) = scene.client(&good, true)?;
    let read = read_until(|mut socket, buffer| socket.read(buffer), &accepted, good.len(), PATIENCE)?;
    ensure!(read == good, "it read {:?}", String::from_utf8_lossy(&read));
    ensure!(scene.enforcement.counter("gate-held")? == 0, "the port is held");
    Ok(())
}

#[test]
fn a_server_on_io_uring_gets_nothing_unjudged() -> Result<()> {
    use io_uring::{IoUring, opcode, types};
    let probe = IoUring::new(4);
    if let Err(error) = probe {
        skip("a_server_on_io_uring_gets_nothing_unjudged", &format!("no io_uring: {error}"));
        return Ok(());
    }
    let scene = ByHand::new("uring")?;
    scene.serve(|socket, buffer| {
        let mut ring = IoUring::new(4)?;
        let length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let fd = types::Fd(socket.as_raw_fd());
        let entry = opcode::Recv::new(fd, buffer.as_mut_ptr(), length).flags(libc::MSG_DONTWAIT).build();
        // SAFETY: the buffer lives until the completion, which is waited for.
        unsafe { ring.submission().push(&entry).map_err(io::Error::other)? };
        ring.submit_and_wait(1)?;
        let done = ring.completion().next().ok_or_else(|| io::Error::other("no completion"))?.result();
        if done < 0 { Err(io::Error::from_raw_os_error(-done)) } else { Ok(done as usize) }
    })?;
    // The accept too, and a read that was there before the bytes.
    let mut ring = IoUring::new(4)?;
    let mut run = |entry: &io_uring::squeue::Entry| -> Result<i32> {
        // SAFETY: what the entry points to lives until the completion, which is waited for.
        unsafe { ring.submission().push(entry)? };
        ring.submit_and_wait(1)?;
        Ok(ring.completion().next().context("no completion")?.result())
    };
    for good in [true, true] {
        let request = scene.request(good)?;
        let mut client = Connection::open(scene.listener.local_addr()?, PATIENCE)?;
        let listener = types::Fd(scene.listener.as_raw_fd());
        let accept = opcode::Accept::new(listener, std::ptr::null_mut(), std::ptr::null_mut()).build();
        let accepted = run(&accept)?;
        ensure!(accepted >= 0, "accept: {}", io::Error::from_raw_os_error(-accepted));
        let mut buffer = vec![0_u8; 1 << 16];
        let sender = std::thread::spawn(move || -> Result<u16> {
            std::thread::sleep(Duration::from_millis(100));
            client.send(&request)?;
            Ok(client.read_response()?.status)
        });
        let recv = opcode::Recv::new(types::Fd(accepted), buffer.as_mut_ptr(), 1 << 16).build();
        let count = run(&recv)?;
        let text =
            String::from_utf8_lossy(buffer.get(..usize::try_from(count)?).unwrap_or_default()).into_owned();
        ensure!(text.starts_with("POST /mcp") && text.ends_with("\"somehow\"}"), "it read {text:?}");
        let send =
            opcode::Send::new(types::Fd(accepted), ANSWER.as_ptr(), u32::try_from(ANSWER.len())?).build();
        ensure!(run(&send)? == i32::try_from(ANSWER.len())?, "send");
        ensure!(sender.join().map_err(|_| anyhow::anyhow!("the client panicked"))?? == 200, "a good token");
        ensure!(run(&opcode::Close::new(types::Fd(accepted)).build())? == 0, "close");
    }
    Ok(())
}

/// Kernel TLS replaces a socket's methods, the enforcer's among them. Here the kernel has none, and says so; where it has, the
/// server that turns it on reads nothing of a refused request.
#[test]
fn a_server_that_turns_kernel_tls_on_gets_nothing_unjudged() -> Result<()> {
    let scene = ByHand::new("ktls")?;
    let bad = scene.request(false)?;
    for early in [false, true] {
        let (mut client, accepted) = scene.client(&bad[..20], early)?;
        // SAFETY: the name lives through the call.
        let set = unsafe {
            libc::setsockopt(
                accepted.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_ULP,
                c"tls".as_ptr().cast(),
                3,
            )
        };
        let error = io::Error::last_os_error();
        if set != 0 && error.raw_os_error() == Some(libc::ENOENT) {
            skip(
                "a_server_that_turns_kernel_tls_on_gets_nothing_unjudged",
                "setsockopt(TCP_ULP, \"tls\") gives ENOENT: no kernel TLS",
            );
            return Ok(());
        }
        drop(client.send(&bad[20..]));
        let read = read_until(|mut socket, buffer| socket.read(buffer), &accepted, usize::MAX, QUIET)
            .unwrap_or_default();
        ensure!(read.is_empty(), "TLS {set}: it read {:?}", String::from_utf8_lossy(&read));
    }
    Ok(())
}

/// The accepted socket in the hands of a process outside the guarded cgroup, which reads until the end.
#[test]
fn an_accepted_socket_passed_to_a_process_outside_stays_guarded() -> Result<()> {
    let scene = ByHand::new("passed")?;
    let (good, bad) = (scene.request(true)?, scene.request(false)?);
    for early in [false, true] {
        let (mut client, accepted) = scene.client(&bad, early)?;
        accepted.set_nonblocking(false)?;
        let stdin = Stdio::from(std::os::fd::OwnedFd::from(accepted.try_clone()?));
        let reader = Command::new("cat").stdin(stdin).stdout(Stdio::piped()).spawn()?;
        ensure!(client.read_response()?.status == 401, "a bad token");
        client.send(&good)?;
        std::thread::sleep(QUIET);
        client.finish_sending()?;
        let output = reader.wait_with_output()?;
        ensure!(output.stdout == good, "it read {:?}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}
