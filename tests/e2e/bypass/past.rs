//! Servers that take bytes from TCP past the judge: they are found, and held.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::guard::wait_until;
use enforcer_tests::raw::Connection;

use crate::reading::{ANSWER, ByHand, QUIET, Reader, read_until, recv, result};
use crate::torture::PATIENCE;

/// Takes what is in TCP's own queue, without waiting.
fn splice(socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let (mut reader, writer) = io::pipe()?;
    let (from, to) = (socket.as_raw_fd(), writer.as_raw_fd());
    // SAFETY: both descriptors are open; no offsets are given.
    let moved = unsafe {
        libc::splice(
            from,
            std::ptr::null_mut(),
            to,
            std::ptr::null_mut(),
            buffer.len(),
            libc::SPLICE_F_NONBLOCK,
        )
    };
    let moved = result(moved)?;
    reader.read_exact(&mut buffer[..moved])?;
    Ok(moved)
}

/// `struct tcp_zerocopy_receive`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct ZeroCopy {
    address: u64,
    length: u32,
    skip_hint: u32,
    in_queue: u32,
    error: i32,
    copy_address: u64,
    copy_length: i32,
    flags: u32,
}

/// As [`splice`], by `TCP_ZEROCOPY_RECEIVE`: whole pages are mapped, other bytes copied.
fn zero_copy(socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    const TCP_ZEROCOPY_RECEIVE: libc::c_int = 35;
    const LENGTH: usize = 1 << 16;
    let fd = socket.as_raw_fd();
    // SAFETY: a new mapping, removed below; all that the option names lives through the call.
    unsafe {
        let map = libc::mmap(std::ptr::null_mut(), LENGTH, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut request = ZeroCopy {
            address: map as u64,
            length: LENGTH as u32,
            copy_address: buffer.as_mut_ptr() as u64,
            copy_length: i32::try_from(buffer.len()).unwrap_or(i32::MAX),
            ..ZeroCopy::default()
        };
        let mut size = size_of::<ZeroCopy>() as libc::socklen_t;
        let got = libc::getsockopt(
            fd,
            libc::IPPROTO_TCP,
            TCP_ZEROCOPY_RECEIVE,
            (&raw mut request).cast(),
            &raw mut size,
        );
        let error = io::Error::last_os_error();
        let (mapped, copied) = (request.length as usize, usize::try_from(request.copy_length).unwrap_or(0));
        if got == 0 && mapped > 0 {
            std::ptr::copy(map.cast::<u8>(), buffer.as_mut_ptr().add(copied), mapped);
        }
        libc::munmap(map, LENGTH);
        match (got, mapped + copied) {
            (0, 0) => Err(ErrorKind::WouldBlock.into()),
            (0, count) => Ok(count),
            _ => Err(error),
        }
    }
}

/// `splice` and zero-copy receive look into TCP's own queue, where what came before the accept lies unjudged. The first
/// connection that is read like that shows what kind of server it is; from then on bytes come only to accepted connections.
#[test]
fn a_server_that_reads_past_the_judge_is_found_and_held() -> Result<()> {
    for (name, reader) in [("splice", splice as Reader), ("zerocopy", zero_copy)] {
        let scene = ByHand::new(name)?;
        let (good, bad) = (scene.request(true)?, scene.request(false)?);
        // Only what is judged passes once the connection is accepted.
        for _ in 0..2 {
            let (mut client, accepted) = scene.client(&bad, false)?;
            let read = read_until(reader, &accepted, usize::MAX, QUIET)?;
            ensure!(read.is_empty(), "{name}: it read {:?}", String::from_utf8_lossy(&read));
            ensure!(client.read_response()?.status == 401, "{name}: a bad token");
        }
        let (mut client, mut accepted) = scene.client(&bad, true)?;
        let read = read_until(reader, &accepted, bad.len(), QUIET)?;
        ensure!(
            read == bad,
            "{name}: this kernel shows nothing before the accept; the holding proves nothing"
        );
        drop(accepted.write_all(ANSWER));
        // It was read, but the connection does not outlive the answer, and it was the last one.
        let found = wait_until("the server is found out", PATIENCE, || {
            (scene.enforcement.counter("dead-unjudged").ok()? > 0).then_some(())
        });
        found.with_context(|| name)?;
        drop(client.send(&good));
        // A reset is as good as nothing.
        let more = read_until(reader, &accepted, usize::MAX, QUIET).unwrap_or_default();
        ensure!(more.is_empty(), "{name}: it read on: {:?}", String::from_utf8_lossy(&more));
        for round in 0..2 {
            let (mut client, accepted) = scene.client(&bad, true)?;
            let read = read_until(reader, &accepted, usize::MAX, Duration::from_millis(600))?;
            ensure!(read.is_empty(), "{name}, round {round}: it read {:?}", String::from_utf8_lossy(&read));
            ensure!(client.read_response()?.status == 401, "{name}, round {round}: a bad token");
            // Reading as everybody does works, if later.
            let (_client, accepted) = scene.client(&good, true)?;
            let read = read_until(|mut socket, buffer| socket.read(buffer), &accepted, good.len(), PATIENCE)?;
            ensure!(read == good, "{name}, round {round}: it read {:?}", String::from_utf8_lossy(&read));
        }
        ensure!(scene.enforcement.counter("gate-held")? > 0, "{name}: nothing was held");
        ensure!(scene.enforcement.counter("dead-unjudged")? == 1, "{name}: another one was found");
    }
    Ok(())
}

/// A client that closes without a byte, as probes do, and a server that reads the end more than once: nobody read past anybody.
#[test]
fn an_end_that_is_read_again_holds_nothing() -> Result<()> {
    let scene = ByHand::new("end-again")?;
    for times in 1..=4 {
        let client = Connection::open(scene.listener.local_addr()?, PATIENCE)?;
        let (accepted, _) = scene.listener.accept()?;
        client.stream().shutdown(Shutdown::Write)?;
        for _ in 0..times {
            ensure!(recv(&accepted, &mut [0; 64], 0)? == 0, "it read bytes");
        }
    }
    let good = scene.request(true)?;
    let (_client, accepted) = scene.client(&good, true)?;
    let read = read_until(|mut socket, buffer| socket.read(buffer), &accepted, good.len(), PATIENCE)?;
    ensure!(read == good, "it read {:?}", String::from_utf8_lossy(&read));
    // Those that are closed are looked at once more.
    std::thread::sleep(QUIET);
    ensure!(scene.enforcement.counter("dead-unjudged")? == 0, "the server was suspected");
    ensure!(scene.enforcement.counter("gate-held")? == 0, "the port is held");
    Ok(())
}

/// What is left of the packet shows how far the server is.
#[test]
fn a_server_that_reads_a_part_past_the_judge_is_found_and_held() -> Result<()> {
    let scene = ByHand::new("part")?;
    let bad = scene.request(false)?;
    let (mut client, accepted) = scene.client(&bad, true)?;
    let part = splice(&accepted, &mut vec![0; bad.len() - 1])?;
    ensure!(part == bad.len() - 1, "this kernel shows nothing before the accept; the holding proves nothing");
    let rest = recv(&accepted, &mut [0; 64], libc::MSG_DONTWAIT).unwrap_or_default();
    ensure!(rest == 0, "it read on");
    ensure!(client.read_response().is_err(), "it was answered");
    ensure!(scene.enforcement.counter("dead-unjudged")? == 1, "the server was not found");
    for round in 0..2 {
        let (mut client, accepted) = scene.client(&bad, true)?;
        let read = read_until(splice, &accepted, usize::MAX, Duration::from_millis(600))?;
        ensure!(read.is_empty(), "round {round}: it read {:?}", String::from_utf8_lossy(&read));
        ensure!(client.read_response()?.status == 401, "round {round}: a bad token");
    }
    Ok(())
}

/// A server that wants to be woken for many bytes only: until then TCP would keep them, and not show them to the judge.
#[test]
fn a_server_that_waits_for_many_bytes_gets_none() -> Result<()> {
    let scene = ByHand::new("low-water")?;
    let (good, bad) = (scene.request(true)?, scene.request(false)?);
    let set_low_water = |socket: &TcpStream, bytes: libc::c_int| {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVLOWAT);
        // SAFETY: the value lives through the call.
        let set =
            unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const bytes).cast(), 4) };
        ensure!(set == 0, "SO_RCVLOWAT: {}", io::Error::last_os_error());
        Ok(())
    };
    let (mut client, mut accepted) = scene.client(&good, false)?;
    let read = read_until(|mut socket, buffer| socket.read(buffer), &accepted, good.len(), PATIENCE)?;
    ensure!(read == good, "it read {:?}", String::from_utf8_lossy(&read));
    accepted.write_all(ANSWER)?;
    ensure!(client.read_response()?.status == 200, "a good token");
    set_low_water(&accepted, 60_000)?;
    client.send(&bad)?;
    for reader in [splice as Reader, zero_copy] {
        let read = read_until(reader, &accepted, usize::MAX, QUIET)?;
        ensure!(read.is_empty(), "it read {:?}", String::from_utf8_lossy(&read));
    }
    ensure!(scene.enforcement.counter("gate-low-water")? > 0, "nothing was dropped");
    // As soon as it wants to hear of each byte, the repetition arrives and is judged.
    set_low_water(&accepted, 1)?;
    ensure!(client.read_response()?.status == 401, "a bad token");
    ensure!(scene.enforcement.counter("dead-unjudged")? == 0, "it was found all the same");
    Ok(())
}
