//! Segments as no honest stack sends them. The client is this test itself, at the other end of a TUN device; the server's kernel
//! is the real one.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use enforcer_tests::enforcement::{Enforcement, skip};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs};
use enforcer_tests::issuer::Issuer;
use enforcer_tests::recorder::{Config, RemoteRecorder};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::common::LIMIT;
use crate::torture::{PATIENCE, bad_token, config, enforce, good_token, post};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 232, 0, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 232, 0, 2);
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
const URG: u8 = 32;
/// How long the other side is given where nothing is expected of it.
const QUIET: Duration = Duration::from_millis(150);

/// A guarded server in a namespace whose only other host is this test.
struct Wire {
    server: RemoteRecorder,
    issuer: Issuer,
    enforcement: Enforcement,
    tun: File,
    port: u16,
    _netns: NetNs,
    _deadline: Deadline,
}

/// One connection; sequence numbers are relative to the first byte.
struct Raw<'a> {
    wire: &'a mut Wire,
    port: u16,
    initial: u32,
    next_from_server: u32,
    received: Vec<u8>,
    reset: bool,
}

impl Wire {
    fn new(name: &str) -> Result<Option<Self>> {
        let deadline = Deadline::new(name, LIMIT);
        let netns = NetNs::new(name)?;
        let tun = match netns.run(open_tun)? {
            Ok(tun) => tun,
            Err(error) => {
                skip(name, &format!("no TUN device: {error:#}"));
                return Ok(None);
            }
        };
        netns.ip(&["addr", "add", "10.232.0.1/24", "dev", "enftun"])?;
        netns.ip(&["link", "set", "enftun", "mtu", "65000", "up"])?;
        let cgroup = Cgroup::new(name)?;
        let listen = SocketAddr::from((SERVER, 0));
        let server = RemoteRecorder::spawn(
            listen,
            &Config { keep_bytes: 1 << 17, ..config() },
            Some(&cgroup),
            Some(&netns),
        )?;
        let (enforcement, issuer) = enforce(cgroup, &[server.addr()])?;
        Ok(Some(Self { server, issuer, enforcement, tun, port: 20_000, _netns: netns, _deadline: deadline }))
    }

    fn good(&self) -> Result<Vec<u8>> {
        Ok(post(&good_token(&self.issuer)?).header("X-Kind", "good").body(b"{\"id\":1}").build())
    }

    /// As long as a good one.
    fn bad(&self) -> Result<Vec<u8>> {
        let good = self.good()?;
        let bad = post(&bad_token(&self.issuer)?).header("X-Kind", "evil").body(b"{\"id\":1}").build();
        // The audiences differ in length; what matters is that this is refused.
        Ok(bad.into_iter().chain(std::iter::repeat(b'}')).take(good.len()).collect())
    }

    fn connect(&mut self) -> Result<Raw<'_>> {
        let mut raw = self.half_open()?;
        raw.send(0, ACK, 0, b"")?;
        Ok(raw)
    }

    /// SYN and its answer.
    fn half_open(&mut self) -> Result<Raw<'_>> {
        self.port += 1;
        let (port, initial) = (self.port, u32::from(self.port) * 7919);
        let mut raw =
            Raw { wire: self, port, initial, next_from_server: 0, received: Vec::new(), reset: false };
        raw.send(u32::MAX, SYN, 0, b"")?;
        let end = Instant::now() + PATIENCE;
        while raw.next_from_server == 0 {
            ensure!(Instant::now() < end, "no answer to the SYN");
            raw.pump(QUIET)?;
        }
        Ok(raw)
    }

    /// What the server has read on the connection from `port`.
    fn read_by_server(&self, port: u16) -> Result<Vec<u8>> {
        let peer = SocketAddr::V4(SocketAddrV4::new(CLIENT, port));
        Ok(self.server.connection(peer)?.map(|record| record.kept).unwrap_or_default())
    }
}

fn open_tun() -> Result<File> {
    const IFF_TUN: libc::c_short = 1;
    const IFF_NO_PI: libc::c_short = 0x1000;
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"enftun") {
        *to = libc::c_char::try_from(*from).unwrap_or_default();
    }
    request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI;
    // SAFETY: the request lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    ensure!(result == 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    Ok(file)
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

impl Raw<'_> {
    /// One segment, `at` bytes behind the first one.
    fn send(&mut self, at: u32, flags: u8, urgent: u16, payload: &[u8]) -> Result<()> {
        let to_port = self.wire.server.addr().port();
        let sequence = self.initial.wrapping_add(1).wrapping_add(at);
        let mut tcp = Vec::with_capacity(20 + payload.len());
        tcp.extend_from_slice(&self.port.to_be_bytes());
        tcp.extend_from_slice(&to_port.to_be_bytes());
        tcp.extend_from_slice(&sequence.to_be_bytes());
        tcp.extend_from_slice(&self.next_from_server.to_be_bytes());
        tcp.extend_from_slice(&[5 << 4, flags, 0xff, 0xff, 0, 0]);
        tcp.extend_from_slice(&urgent.to_be_bytes());
        tcp.extend_from_slice(payload);
        if tcp.len() % 2 == 1 {
            tcp.push(0);
        }
        let length = u16::try_from(20 + payload.len())?;
        let pseudo = [&CLIENT.octets()[..], &SERVER.octets(), &[0, 6], &length.to_be_bytes()].concat();
        let sum = checksum(&[&pseudo, &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp.truncate(length.into());
        let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0];
        ip.extend_from_slice(&CLIENT.octets());
        ip.extend_from_slice(&SERVER.octets());
        ip[2..4].copy_from_slice(&(20 + length).to_be_bytes());
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip.extend_from_slice(&tcp);
        Ok(self.wire.tun.write_all(&ip)?)
    }

    /// Bytes at their place.
    fn bytes(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.send(u32::try_from(at)?, ACK | PSH, 0, bytes)
    }

    /// Takes one packet of the server, if one comes in time, and acknowledges what is in it.
    fn pump(&mut self, patience: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(self.wire.tun.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::try_from(patience)?)? == 0 {
            return Ok(false);
        }
        let mut packet = vec![0; 1 << 16];
        let length = self.wire.tun.read(&mut packet)?;
        let packet = packet.get(..length).unwrap_or_default();
        // IPv6 router solicitations come too.
        if packet.first().is_none_or(|first| first >> 4 != 4) || packet.get(9) != Some(&6) {
            return Ok(true);
        }
        let tcp = packet.get(usize::from(packet[0] & 0xf) * 4..).unwrap_or_default();
        let word =
            |at: usize| -> Option<u32> { Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?)) };
        if tcp.get(2..4) != Some(&self.port.to_be_bytes()[..]) {
            return Ok(true);
        }
        let (sequence, flags) = (word(4).context("short")?, tcp.get(13).copied().context("short")?);
        if flags & RST != 0 {
            self.reset = true;
        } else if flags & SYN != 0 {
            self.next_from_server = sequence.wrapping_add(1);
        } else {
            let payload = tcp.get(usize::from(tcp[12] >> 4) * 4..).unwrap_or_default();
            if sequence == self.next_from_server && !payload.is_empty() {
                self.received.extend_from_slice(payload);
                self.next_from_server = sequence.wrapping_add(u32::try_from(payload.len())?);
            }
            if flags & FIN != 0 || !payload.is_empty() {
                let end = u32::from(flags & FIN != 0);
                self.next_from_server = self.next_from_server.wrapping_add(end);
                // Where the client stands does not matter for an acknowledgement.
                self.send(0, ACK, 0, b"")?;
            }
        }
        Ok(true)
    }

    /// The status of the answer; nothing if the connection was reset instead, or no answer comes.
    fn status(&mut self, patience: Duration) -> Result<Option<u16>> {
        let end = Instant::now() + patience;
        loop {
            if let Some(line) = self.received.get(..12) {
                let text = String::from_utf8_lossy(line).into_owned();
                let Some(status) = text.strip_prefix("HTTP/1.1 ") else { bail!("no answer: {text:?}") };
                return Ok(Some(status.parse()?));
            }
            if self.reset || Instant::now() > end {
                return Ok(None);
            }
            self.pump(QUIET)?;
        }
    }

    fn abort(mut self, at: usize) -> Result<()> {
        self.send(u32::try_from(at)?, RST, 0, b"")
    }
}

/// What a client sends: where, flags, how far the urgent byte is, and the bytes.
type Segment = (usize, u8, u16, Vec<u8>);

#[test]
fn segments_out_of_order_overlapping_and_repeated_are_judged_as_the_server_reads_them() -> Result<()> {
    let name = "segments_out_of_order_overlapping_and_repeated_are_judged_as_the_server_reads_them";
    let Some(mut wire) = Wire::new(name)? else { return Ok(()) };
    let rounds = 2;
    for round in 0..rounds {
        let (good, bad) = (wire.good()?, wire.bad()?);
        let length = good.len();
        let (third, two_thirds) = (length / 3, length * 2 / 3);
        let part = |of: &[u8], from: usize, to: usize| -> Segment {
            (from, ACK | PSH, 0, of.get(from..to).unwrap_or_default().to_vec())
        };
        let cases: Vec<(&str, Vec<Segment>)> = vec![
            ("in order", vec![part(&good, 0, third), part(&good, third, length)]),
            (
                "last one first",
                vec![part(&good, two_thirds, length), part(&good, third, two_thirds), part(&good, 0, third)],
            ),
            (
                "each twice",
                vec![
                    part(&good, 0, third),
                    part(&good, 0, third),
                    part(&good, third, length),
                    part(&good, third, length),
                ],
            ),
            (
                "a repeated one with other bytes",
                vec![part(&good, 0, two_thirds), part(&bad, 0, two_thirds), part(&good, two_thirds, length)],
            ),
            (
                "a bad one repeated with good bytes",
                vec![part(&bad, 0, two_thirds), part(&good, 0, two_thirds), part(&good, two_thirds, length)],
            ),
            (
                "overlapping, the second with other bytes",
                vec![part(&good, 0, two_thirds), part(&bad, third, length)],
            ),
            ("overlapping", vec![part(&good, 0, two_thirds), part(&good, third, length)]),
            (
                "overlapping, out of order",
                vec![
                    part(&good, two_thirds, length),
                    part(&good, third, length - 1),
                    part(&good, 0, two_thirds),
                ],
            ),
            ("the last byte alone is new", vec![part(&good, 0, length - 1), part(&good, 0, length)]),
            ("bad, overlapping", vec![part(&bad, 0, two_thirds), part(&bad, third, length)]),
            ("a hole filled over other bytes", vec![part(&bad, third, two_thirds), part(&good, 0, length)]),
            ("a hole filled up to other bytes", vec![part(&bad, third, length), part(&good, 0, two_thirds)]),
            (
                "other bytes beyond a hole, then the rest",
                vec![part(&bad, two_thirds, length), part(&good, 0, two_thirds)],
            ),
            ("bad", vec![part(&bad, 0, third), part(&bad, third, length)]),
            ("bad, last one first", vec![part(&bad, third, length), part(&bad, 0, third)]),
            ("one byte a segment, backwards", (0..length).rev().map(|at| part(&good, at, at + 1)).collect()),
            ("with the end in the same segment", vec![(0, ACK | PSH | FIN, 0, good.clone())]),
            ("bad with the end in the same segment", vec![(0, ACK | PSH | FIN, 0, bad.clone())]),
        ];
        for (what, segments) in cases {
            let mut raw = wire.connect()?;
            for (at, flags, urgent, bytes) in &segments {
                raw.send(u32::try_from(*at)?, *flags, *urgent, bytes)?;
            }
            let made_of = |whole: &[u8]| {
                segments.iter().all(|(at, _, _, bytes)| whole.get(*at..at + bytes.len()) == Some(bytes))
            };
            // Behind an end of the stream the server may leave without an answer.
            let must_be_answered = (made_of(&good) || made_of(&bad)) && !what.contains("the end");
            let patience = if must_be_answered { PATIENCE } else { Duration::from_millis(500) };
            let status = raw.status(patience).with_context(|| format!("{what}, round {round}"))?;
            let port = raw.port;
            raw.abort(length)?;
            let read = wire.read_by_server(port)?;
            // Exactly the good bytes, if they were allowed, or none: never a mixture, whatever the stack made of it.
            let shown = String::from_utf8_lossy(&read).into_owned();
            ensure!(read.is_empty() || read == good, "{what}, round {round}: the server read {shown:?}");
            ensure!((status == Some(200)) <= (read == good), "{what}, round {round}: served, but not read");
            if made_of(&bad) {
                ensure!(
                    read.is_empty() && status != Some(200),
                    "{what}, round {round}: a bad request was served"
                );
            }
            if must_be_answered {
                let expected = if made_of(&good) { 200 } else { 401 };
                ensure!(status == Some(expected), "{what}, round {round}: {status:?}");
            }
        }
    }
    ensure!(wire.enforcement.counter("flow-tagged")? >= 2 * 18, "not all connections were guarded");
    Ok(())
}

/// More is repeated than the kernel cuts off in one piece, in a body that passes as it comes, and in one that the daemon carries.
#[test]
fn long_overlaps_are_cut_off() -> Result<()> {
    let name = "long_overlaps_are_cut_off";
    let Some(mut wire) = Wire::new(name)? else { return Ok(()) };
    let body: Vec<u8> = (0..50_000_u32).map(|at| (at % 251) as u8).collect();
    let token = good_token(&wire.issuer)?;
    let plain = post(&token).body(&body).build();
    let chunked = post(&token).chunked_body(&body, 7_000).build();
    for (what, request) in [("first seen", &plain), ("known", &plain), ("chunked", &chunked)] {
        let mut raw = wire.connect()?;
        raw.bytes(0, &request[..30_000])?;
        raw.bytes(5_000, &request[5_000..40_000])?;
        raw.bytes(12_000, &request[12_000..])?;
        ensure!(raw.status(PATIENCE)? == Some(200), "{what}: not served");
        let port = raw.port;
        raw.abort(request.len())?;
        let read = wire.read_by_server(port)?;
        ensure!(read == *request, "{what}: the server read {} bytes of {}", read.len(), request.len());
    }
    ensure!(wire.enforcement.counter("overlap-cut")? == 6, "nothing was cut off");
    Ok(())
}

/// TCP takes an urgent byte out of the stream, past the judge: a packet that is marked so does not arrive.
#[test]
fn urgent_packets_do_not_arrive() -> Result<()> {
    let name = "urgent_packets_do_not_arrive";
    let Some(mut wire) = Wire::new(name)? else { return Ok(()) };
    let (good, bad) = (wire.good()?, wire.bad()?);
    let length = good.len();
    let third = length / 3;
    for (what, bytes, pointer) in [
        ("in the head", &good[..], 20),
        ("at a split", &good[..third], third),
        ("far ahead", &good[..], 60_000),
        ("in a bad head", &bad[..], 20),
        ("without a byte", &[][..], 1),
    ] {
        let dropped = wire.enforcement.counter("gate-urgent")?;
        let mut raw = wire.connect()?;
        raw.send(0, ACK | PSH | URG, u16::try_from(pointer)?, bytes)?;
        raw.send(u32::try_from(third)?, ACK | PSH, 0, &good[third..])?;
        ensure!(raw.status(Duration::from_millis(500))?.is_none(), "{what}: it was answered");
        // What was lost may be repeated without the mark.
        raw.send(0, ACK | PSH, 0, &good[..third])?;
        ensure!(raw.status(PATIENCE)? == Some(200), "{what}: not served");
        let port = raw.port;
        raw.abort(length)?;
        let read = wire.read_by_server(port)?;
        ensure!(read == good, "{what}: the server read {:?}", String::from_utf8_lossy(&read));
        ensure!(wire.enforcement.counter("gate-urgent")? == dropped + 1, "{what}: it was not dropped");
    }
    // In the packet that ends the handshake.
    let mut raw = wire.half_open()?;
    raw.send(0, ACK | URG, 1, b"")?;
    raw.send(0, ACK, 0, b"")?;
    raw.bytes(0, &good)?;
    ensure!(raw.status(PATIENCE)? == Some(200), "not served behind a handshake");
    ensure!(wire.enforcement.counter("gate-urgent")? == 6, "it was not dropped");
    Ok(())
}

/// A segment that repeats what was read already can't become the next request.
#[test]
fn bytes_behind_the_window_of_a_served_request_are_no_request() -> Result<()> {
    let name = "bytes_behind_the_window_of_a_served_request_are_no_request";
    let Some(mut wire) = Wire::new(name)? else { return Ok(()) };
    let (good, bad) = (wire.good()?, wire.bad()?);
    let mut raw = wire.connect()?;
    raw.bytes(0, &good)?;
    ensure!(raw.status(PATIENCE)? == Some(200), "a good request");
    raw.received.clear();
    raw.bytes(0, &bad)?;
    raw.bytes(5, &bad)?;
    // Half of this one is old, half of it new.
    raw.bytes(good.len() - 20, &bad)?;
    let status = raw.status(Duration::from_secs(1))?;
    ensure!(status != Some(200), "{status:?}");
    let port = raw.port;
    raw.abort(good.len())?;
    let read = wire.read_by_server(port)?;
    ensure!(read == good, "the server read {:?}", String::from_utf8_lossy(&read));
    Ok(())
}

/// Bytes in the packet that ends the handshake: they wait for their repetition, and are judged then.
#[test]
fn bytes_in_the_handshake_wait_until_the_connection_is_guarded() -> Result<()> {
    let name = "bytes_in_the_handshake_wait_until_the_connection_is_guarded";
    let Some(mut wire) = Wire::new(name)? else { return Ok(()) };
    for good in [true, false] {
        let request = if good { wire.good()? } else { wire.bad()? };
        let mut raw = wire.half_open()?;
        raw.bytes(0, &request)?;
        raw.pump(QUIET)?;
        raw.send(0, ACK, 0, b"")?;
        raw.bytes(0, &request)?;
        let status = raw.status(PATIENCE)?;
        ensure!((status == Some(200)) == good, "{status:?}");
        let port = raw.port;
        raw.abort(request.len())?;
        let read = wire.read_by_server(port)?;
        ensure!(read == if good { request } else { Vec::new() }, "the server read {read:?}");
    }
    ensure!(wire.enforcement.counter("gate-stray")? >= 2, "they did not wait");
    Ok(())
}
