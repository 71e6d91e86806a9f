//! How many packets one core drops at the shield: the program alone, and a flood over a veth pair.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::interrupt;
use super::pinning::{Pinning, Place};
use crate::bpf::{XDP_DROP, XDP_PASS, open_pinned, run_xdp};
use crate::enforcement::Guarded;
use crate::frame::{ACK, Frame, SYN};
use crate::guard::{NetNs, veth_pair};
use crate::link::Link;

/// Runs of the program between two readings of the clock: below the burst of packets that the policy allows.
const REPEAT: u32 = 500_000;
/// Frames in one call of the sender.
const BATCH: usize = 256;

/// Rates are packets in a second, of one core.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shield {
    /// Datagrams for a protected port, the program alone.
    pub datagrams_per_s: Vec<f64>,
    /// Segments of a source that an operator listed, the program alone.
    pub listed_per_s: Vec<f64>,
    /// SYNs of a source over its limit of connections, the program alone.
    pub limited_per_s: Vec<f64>,
    /// Nanoseconds for a segment that passes, charged to its source's limit of packets.
    pub passed_ns: Vec<f64>,
    /// Nanoseconds for a segment for a port that is not protected.
    pub foreign_ns: Vec<f64>,
    /// A flood of SYNs of one source over a veth pair, sender and receiver on one core: let through to TCP, and dropped as over the limit.
    pub flood: Vec<Flood>,
}

impl Shield {
    /// Nothing measured yet.
    pub(super) const NONE: Self = Self {
        datagrams_per_s: Vec::new(),
        listed_per_s: Vec::new(),
        limited_per_s: Vec::new(),
        passed_ns: Vec::new(),
        foreign_ns: Vec::new(),
        flood: Vec::new(),
    };
}

/// One round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Flood {
    /// Packets in a second that TCP got.
    pub passed_per_s: f64,
    /// Packets in a second that were dropped.
    pub dropped_per_s: f64,
}

/// Measures so many rounds; each flood takes `run_ms`.
///
/// # Errors
/// When something can't be started, or a packet takes another way than the one that is measured.
pub fn measure(rounds: usize, run_ms: u64) -> Result<Shield> {
    let (server, clients) = (Arc::new(NetNs::new("bench-shield")?), NetNs::new("bench-flood")?);
    let pair = veth_pair(&server, &clients)?;
    let shield = json!({
        "interfaces": [pair.interface_a],
        "connections": { "rate": "1/h", "burst": 1 },
        "packets": { "rate": "1000000/s", "burst": 1_000_000 },
    });
    let guarded = Guarded::builder("bench-shield")
        .bind((Ipv6Addr::UNSPECIFIED, 0).into())
        .netns(&server)
        .daemon_netns(&server)
        .policy("shield", shield)
        .start()?;
    let program = open_pinned(&guarded.enforcement.pins().join("prog_shield"))?;
    let to = SocketAddr::new(pair.a.0.into(), guarded.addr().port());
    let elsewhere = SocketAddr::new(to.ip(), to.port() ^ 1);
    let ns = |frame: &Frame, verdict: u32| -> Result<f64> {
        interrupt::check()?;
        let ran = run_xdp(program.as_fd(), &frame.build(), REPEAT)?;
        ensure!(ran.verdict == verdict, "the last of {REPEAT} runs gave {}", ran.verdict);
        Ok(f64::from(ran.ns))
    };
    let per_s = |frame: &Frame| Ok::<_, anyhow::Error>(1e9 / ns(frame, XDP_DROP)?);
    let from =
        |number: usize| SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(0xc612_0000 + number as u32)), 40_000);
    let (listed, limited) = (from(1 << 16), from((1 << 16) + 1));
    guarded.enforcement.cli_json(&["shield", "add", &listed.ip().to_string()])?;
    // The one connection that it may make.
    run_xdp(program.as_fd(), &Frame::tcp(limited, to, SYN).build(), 1)?;
    let pinning = Pinning::choose()?;
    pinning.apply(Place::Together, &[])?;
    let mut all = Shield::NONE;
    for round in 0..rounds {
        all.datagrams_per_s.push(per_s(&Frame::udp(from(0), to))?);
        all.listed_per_s.push(per_s(&Frame::tcp(listed, to, ACK))?);
        all.limited_per_s.push(per_s(&Frame::tcp(limited, to, SYN))?);
        // Each round's source has all of its burst.
        all.passed_ns.push(ns(&Frame::tcp(from(round + 1), to, ACK), XDP_PASS)?);
        all.foreign_ns.push(ns(&Frame::tcp(from(0), elsewhere, ACK), XDP_PASS)?);
    }
    // Nobody has this address, so nobody answers what the server answers.
    let [a, b, c, _] = pair.b.0.octets();
    let source = SocketAddr::new(Ipv4Addr::new(a, b, c, 99).into(), 40_000);
    let nobody = clients.hardware_address(&pair.interface_b)?.map(|byte| format!("{byte:02x}")).join(":");
    let address = source.ip().to_string();
    server.ip(&[
        "neigh",
        "replace",
        &address,
        "lladdr",
        &nobody,
        "dev",
        &pair.interface_a,
        "nud",
        "permanent",
    ])?;
    let link = clients.run(|| Link::open(&pair.interface_b))??;
    let hardware = server.hardware_address(&pair.interface_a)?;
    let frames: Vec<Vec<u8>> = (0..BATCH)
        .map(|number| {
            let from = SocketAddr::new(source.ip(), 20_000 + number as u16);
            // What clients send: maximum segment size, selective acknowledgements, time stamps, window scale.
            let options = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];
            Frame::tcp(from, to, SYN).options(&options).build_for(hardware)
        })
        .collect();
    for round in 0..rounds {
        let passed = |guarded: &Guarded| -> Result<f64> {
            guarded.enforcement.cli_json(&["shield", "add", &address, "--exempt"])?;
            let before = dropped(guarded)?;
            let rate = flood(&link, &frames, run_ms, || server.tcp_input())?;
            guarded.enforcement.cli_json(&["shield", "remove", &address])?;
            ensure!(dropped(guarded)? == before, "the shield dropped of what it was to let through");
            Ok(rate)
        };
        let stopped = |guarded: &Guarded| flood(&link, &frames, run_ms, || dropped(guarded));
        let (passed_per_s, dropped_per_s) = if round % 2 == 0 {
            let passed = passed(&guarded)?;
            (passed, stopped(&guarded)?)
        } else {
            let dropped = stopped(&guarded)?;
            (passed(&guarded)?, dropped)
        };
        all.flood.push(Flood { passed_per_s, dropped_per_s });
    }
    pinning.apply(Place::Anywhere, &[])?;
    Ok(all)
}

fn dropped(guarded: &Guarded) -> Result<u64> {
    let counters = guarded.enforcement.counters()?;
    Ok(counters.kernel("shield-connections") + counters.kernel("shield-packets"))
}

/// Sends as fast as it goes; by how much `count` rises in a second. It must be nearly all that was sent.
#[expect(clippy::cast_precision_loss, reason = "reported figures, far below 2^53")]
fn flood(link: &Link, frames: &[Vec<u8>], run_ms: u64, count: impl Fn() -> Result<u64>) -> Result<f64> {
    interrupt::check()?;
    let before = count()?;
    let (start, length) = (Instant::now(), Duration::from_millis(run_ms));
    let mut sent = 0;
    while start.elapsed() < length {
        sent += link.send_many(frames).context("the flood")?;
    }
    let elapsed = start.elapsed();
    let counted = count()?.saturating_sub(before);
    ensure!(counted as f64 >= sent as f64 * 0.9, "of {sent} packets only {counted} were counted");
    Ok(counted as f64 / elapsed.as_secs_f64())
}
