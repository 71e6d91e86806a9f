//! Requests that nobody has granted anything: each source has its own limits, so that none can keep the daemon from the others.

mod common;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use enforcer_tests::caller::Place;
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Cgroup, Deadline, wait_until};
use enforcer_tests::raw::{Connection, RequestBuilder};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrStorage, bind, connect, socket,
};
use serde_json::json;

use common::{LIMIT, TIMEOUT, assert_refusal, unknown};

/// So few that none comes back while a test runs.
const FEW: &str = "6/h";

/// A client with an address of its own.
fn connect_from(guarded: &Guarded, from: Ipv4Addr) -> Result<Connection> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(from, 0)))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(guarded.addr()))?;
    Connection::over(socket.into(), TIMEOUT)
}

#[test]
fn a_source_has_its_own_share_of_first_seen_heads() -> Result<()> {
    let _deadline = Deadline::new("limits: unknown", LIMIT);
    for blocking in [false, true] {
        let builder = Guarded::builder(if blocking { "limsrcb" } else { "limsrc" });
        let builder = if blocking { builder } else { builder.nonblocking() };
        let guarded = builder.policy("unknown_requests", json!({"rate": FEW, "burst": 20})).start()?;
        let good = guarded.call(Some(&guarded.token()?)).build();
        let mut known = connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 9))?;
        assert_eq!(known.roundtrip(&good)?.status, 200);
        let mut flood = connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 9))?;
        let mut refused = 0;
        // Where the kernel can't answer, the daemon does, as often again.
        let count = if blocking { 38 } else { 60 };
        for number in 0..count {
            let bad = guarded.mint().subject(&format!("s{number}")).corrupt_signature().sign()?;
            let answer = flood.roundtrip(&guarded.call(Some(&bad)).build())?;
            match answer.status {
                401 => refused += 1,
                _ => {
                    assert_refusal(&answer, 429, None);
                    assert_eq!(answer.header("retry-after"), Some("600"));
                }
            }
        }
        assert_eq!(refused, 19, "the good one was the first of twenty");
        let counters = guarded.enforcement.counters()?;
        assert_eq!(counters.daemon("signature-invalid"), 19, "{counters:?}");
        // What it was granted is no matter of the daemon's.
        assert_eq!(known.roundtrip(&good)?.status, 200);
        // A new connection of the same source is the same source.
        let mut again = connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 9))?;
        assert_eq!(again.roundtrip(&unknown(&guarded, &guarded.token()?, 1))?.status, 429);
        ensure!(guarded.enforcement.counter("dead-limited")? == 0);
        // Others are not: by address, and by the workload.
        let mut other = connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 10))?;
        assert_eq!(other.roundtrip(&unknown(&guarded, &guarded.token()?, 2))?.status, 200);
        let agent = guarded.enforcement.cgroup().child("agent")?;
        let request = unknown(&guarded, &guarded.token()?, 3);
        let caller = Place::root(&agent).call(guarded.addr(), &["--from", "127.0.0.9:0"], &request)?;
        assert_eq!(caller.status(), Some(200));
        let shown = guarded.enforcement.cli_json(&["limits", "--sources"])?;
        let [source] = shown["sources"].as_array().map(Vec::as_slice).unwrap_or_default() else {
            bail!("{shown}")
        };
        ensure!(source["source"] == "127.0.0.9" && source["unknown_fill"] == 0, "{source}");
        ensure!(source["limited"].as_u64() >= Some(count - 18), "{source}");
        if blocking {
            let more =
                || connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 9))?.roundtrip(&unknown(&guarded, "x", 4));
            // The daemon may have answered some on its own account: those that came before it gave the connection back.
            ensure!((0..=20).any(|_| more().is_err()), "the daemon answers without a limit");
            ensure!(guarded.enforcement.counter("dead-limited")? > 0);
        }
    }
    Ok(())
}

/// A unit is one source, however many cgroups it makes below its own, also those that it removes again.
#[test]
fn a_workload_is_one_source_whatever_cgroups_it_makes() -> Result<()> {
    let _deadline = Deadline::new("limits: cgroups", LIMIT);
    let guarded = Guarded::builder("limsub.service").nonblocking();
    let guarded = guarded.policy("unknown_requests", json!({"rate": FEW, "burst": 6})).start()?;
    let calls = |cgroup: &Cgroup, count: usize| -> Result<Vec<u16>> {
        let mut statuses = Vec::new();
        for number in 0..count {
            let request = unknown(&guarded, &guarded.token()?, number);
            let caller = Place::root(cgroup).call(guarded.addr(), &[], &request)?;
            statuses.push(caller.status().unwrap_or_default());
        }
        Ok(statuses)
    };
    let unit = guarded.enforcement.cgroup();
    let [first, second] = [unit.child("first")?, unit.child("other.service")?];
    assert_eq!(calls(&first, 4)?, [200; 4]);
    assert_eq!(calls(&second, 4)?, [200, 200, 429, 429]);
    assert_eq!(calls(&first, 1)?, [429]);
    assert_eq!(calls(&unit.child("fresh")?, 2)?, [429, 429]);
    let shown = guarded.enforcement.cli_json(&["limits", "--sources"])?;
    let sources = shown["sources"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of_unit = sources.iter().find(|source| source["cgroup_id"].as_u64() == unit.id().ok());
    ensure!(of_unit.is_some_and(|unit| unit["unknown_fill"] == 0 && unit["limited"] == 5), "{shown}");
    Ok(())
}

/// Heads that the kernel does not look for, because they come with the rest of a refused body, are no way around.
#[test]
fn a_head_behind_a_refused_body_is_charged_too() -> Result<()> {
    let _deadline = Deadline::new("limits: behind a body", LIMIT);
    let guarded = Guarded::builder("limbehind").nonblocking();
    let guarded = guarded.policy("unknown_requests", json!({"rate": FEW, "burst": 6})).start()?;
    let refused = RequestBuilder::new("POST", "/mcp").header("Host", &guarded.host());
    let refused = refused.header("X-Filler", &"x".repeat(500)).body(&[b'x'; 900]).build();
    assert_eq!(guarded.connect()?.roundtrip(&refused)?.status, 401);
    let (front, rest) = refused.split_at(refused.len() - 100);
    let mut connection = guarded.connect_accepted()?;
    let mut found = Vec::new();
    for number in 0..12 {
        // While it is the daemon's, it charges this one, too.
        wait_until("the connection is the kernel's", TIMEOUT, || {
            let flows = guarded.enforcement.cli_json(&["flows"]).ok()?;
            (!flows.to_string().contains("\"punted\"")).then_some(())
        })?;
        connection.send(front)?;
        assert_eq!(connection.read_response()?.status, 401);
        connection.send(&[rest, &unknown(&guarded, "bad", number)].concat())?;
        found.push(connection.read_response()?.status);
    }
    assert_eq!(found, [[401; 5].as_slice(), &[429; 7]].concat());
    ensure!(guarded.enforcement.counter("punt-behind-discard")? > 0, "not a single one came so");
    // A limited request before does not limit what comes behind its body.
    let good = guarded.call(Some(&guarded.token()?)).build();
    let mut elsewhere = connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 10))?;
    assert_eq!(elsewhere.roundtrip(&good)?.status, 200);
    Ok(())
}

#[test]
fn what_the_kernel_refuses_has_a_limit_of_its_own() -> Result<()> {
    let _deadline = Deadline::new("limits: refused", LIMIT);
    let guarded = Guarded::builder("limrefused").nonblocking().server("public_paths", json!(["/health"]));
    let guarded = guarded.policy("refused_requests", json!({"rate": FEW, "burst": 6})).start()?;
    let bad = unknown(&guarded, "bad", 0);
    let health = RequestBuilder::new("GET", "/health").header("Host", &guarded.host());
    let health = health.header("X-Filler", &"x".repeat(500)).build();
    assert_eq!(guarded.connect()?.roundtrip(&bad)?.status, 401);
    assert_eq!(guarded.connect()?.roundtrip(&health)?.status, 200);
    let mut connection = guarded.connect_accepted()?;
    for _ in 0..3 {
        assert_eq!(connection.roundtrip(&bad)?.status, 401);
        assert_eq!(connection.roundtrip(&health)?.status, 200);
    }
    for _ in 0..3 {
        assert_refusal(&connection.roundtrip(&bad)?, 429, None);
        assert_refusal(&connection.roundtrip(&health)?, 429, None);
    }
    let good = guarded.call(Some(&guarded.token()?)).build();
    for _ in 0..20 {
        assert_eq!(connection.roundtrip(&good)?.status, 200);
    }
    let mut other = connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 10))?;
    assert_eq!(other.roundtrip(&health)?.status, 200);
    Ok(())
}

/// The usual limit, and a source that sends bad tokens as fast as it can.
#[test]
fn a_flood_of_bad_tokens_stops_nobody_else() -> Result<()> {
    let _deadline = Deadline::new("limits: flood", LIMIT);
    let guarded = Guarded::builder("limflood").nonblocking().start()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let flooders: Vec<_> = (0..2)
            .map(|thread| {
                let (guarded, stop) = (&guarded, &stop);
                scope.spawn(move || -> Result<(u32, u32)> {
                    let bad = guarded.mint().corrupt_signature().sign()?;
                    let mut connection = connect_from(guarded, Ipv4Addr::new(127, 0, 0, 9))?;
                    let (mut refused, mut limited) = (0, 0);
                    for number in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let request = unknown(guarded, &bad, 2 * number + thread);
                        match connection.roundtrip(&request)?.status {
                            401 => refused += 1,
                            429 => limited += 1,
                            other => bail!("{other}"),
                        }
                        // The daemon gives 128 answers in a row on one connection.
                        if number % 100 == 99 {
                            connection = connect_from(guarded, Ipv4Addr::new(127, 0, 0, 9))?;
                        }
                    }
                    Ok((refused, limited))
                })
            })
            .collect();
        let served = (|| {
            for number in 0..100 {
                let token = guarded.mint().subject(&format!("good-{number}")).sign()?;
                let mut connection = connect_from(&guarded, Ipv4Addr::new(127, 0, 0, 10))?;
                ensure!(connection.roundtrip(&unknown(&guarded, &token, 0))?.status == 200, "{number}");
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        for flooder in flooders {
            let (refused, limited) = flooder.join().map_err(|_| anyhow!("a flooder panicked"))??;
            ensure!(refused > 0, "{refused} refused, {limited} limited");
        }
        served
    })
}
