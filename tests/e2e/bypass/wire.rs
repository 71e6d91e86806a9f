//! A client that sends segments as it likes: the test itself, at the other end of a TUN device. The server's kernel is the real one.

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
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;
pub(crate) const URG: u8 = 32;
/// How long the other side is given where nothing is expected of it.
pub(crate) const QUIET: Duration = Duration::from_millis(150);

/// A guarded server in a namespace whose only other host is this test.
pub(crate) struct Wire {
    server: RemoteRecorder,
    pub(crate) issuer: Issuer,
    pub(crate) enforcement: Enforcement,
    tun: File,
    port: u16,
    _netns: NetNs,
    _deadline: Deadline,
}

/// One connection; sequence numbers are relative to the first byte.
pub(crate) struct Raw<'a> {
    wire: &'a mut Wire,
    pub(crate) port: u16,
    initial: u32,
    next_from_server: u32,
    pub(crate) received: Vec<u8>,
    reset: bool,
}

impl Wire {
    pub(crate) fn new(name: &str) -> Result<Option<Self>> {
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

    pub(crate) fn good(&self) -> Result<Vec<u8>> {
        Ok(post(&good_token(&self.issuer)?).header("X-Kind", "good").body(b"{\"id\":1}").build())
    }

    /// As long as a good one.
    pub(crate) fn bad(&self) -> Result<Vec<u8>> {
        let good = self.good()?;
        let bad = post(&bad_token(&self.issuer)?).header("X-Kind", "evil").body(b"{\"id\":1}").build();
        // The audiences differ in length; what matters is that this is refused.
        Ok(bad.into_iter().chain(std::iter::repeat(b'}')).take(good.len()).collect())
    }

    pub(crate) fn connect(&mut self) -> Result<Raw<'_>> {
        let mut raw = self.half_open()?;
        raw.send(0, ACK, 0, b"")?;
        Ok(raw)
    }

    /// SYN and its answer.
    pub(crate) fn half_open(&mut self) -> Result<Raw<'_>> {
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
    pub(crate) fn read_by_server(&self, port: u16) -> Result<Vec<u8>> {
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
    pub(crate) fn send(&mut self, at: u32, flags: u8, urgent: u16, payload: &[u8]) -> Result<()> {
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
    pub(crate) fn bytes(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.send(u32::try_from(at)?, ACK | PSH, 0, bytes)
    }

    /// Takes one packet of the server, if one comes in time, and acknowledges what is in it.
    pub(crate) fn pump(&mut self, patience: Duration) -> Result<bool> {
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
    pub(crate) fn status(&mut self, patience: Duration) -> Result<Option<u16>> {
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

    pub(crate) fn abort(mut self, at: usize) -> Result<()> {
        self.send(u32::try_from(at)?, RST, 0, b"")
    }
}
