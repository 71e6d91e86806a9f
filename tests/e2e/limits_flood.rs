//! Requests that nobody has granted anything: each source has its own limits, so that none can keep the daemon from the others.

mod common;

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use enforcer_tests::caller::Place;
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Cgroup, Deadline, Proc, wait_until};
use enforcer_tests::raw::{Connection, RequestBuilder};
use nix::sys::signal::Signal;
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

/// What each caller says of its answer.
fn answers(callers: &mut [Proc]) -> Result<Vec<String>> {
    callers.iter_mut().map(|caller| caller.wait_for_line("status ", TIMEOUT)).collect()
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
        // A new connection is the same source, and so is another loopback address, as everybody has all of them.
        let mut again = connect_from(&guarded, Ipv4Addr::new(127, 7, 0, 10))?;
        assert_eq!(again.roundtrip(&unknown(&guarded, &guarded.token()?, 1))?.status, 429);
        ensure!(guarded.enforcement.counter("dead-limited")? == 0);
        // A workload is another.
        let agent = guarded.enforcement.cgroup().child("agent")?;
        let request = unknown(&guarded, &guarded.token()?, 3);
        let caller = Place::root(&agent).call(guarded.addr(), &["--from", "127.0.0.9:0"], &request)?;
        assert_eq!(caller.status(), Some(200));
        let shown = guarded.enforcement.cli_json(&["limits", "--sources"])?;
        let [source] = shown["sources"].as_array().map(Vec::as_slice).unwrap_or_default() else {
            bail!("{shown}")
        };
        ensure!(source["source"] == "127.0.0.0/8" && source["unknown_fill"] == 0, "{source}");
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

/// A unit is one source, however many cgroups it makes below its own.
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

/// A workload may have many heads on their way before the daemon has met the first of them, and told the kernel whose they are.
#[test]
fn heads_of_new_cgroups_that_are_on_their_way_are_charged_to_the_workload() -> Result<()> {
    const BURST: usize = 4;
    let _deadline = Deadline::new("limits: on their way", LIMIT);
    let guarded = Guarded::builder("limburst.service").nonblocking();
    let mut guarded = guarded.policy("unknown_requests", json!({"rate": FEW, "burst": BURST})).start()?;
    let unit = guarded.enforcement.cgroup();
    let cgroups = [unit.child("first")?, unit.child("second")?];
    let requests: Vec<_> =
        (0..BURST).map(|number| Ok(unknown(&guarded, &guarded.token()?, number))).collect::<Result<_>>()?;
    let addr = guarded.addr();
    let place = tempfile::tempdir()?;
    let go = place.path().join("go");
    let mut callers = Vec::new();
    for (cgroup, request) in
        cgroups.iter().flat_map(|cgroup| requests.iter().map(move |request| (cgroup, request)))
    {
        callers.push(Place::root(cgroup).connect(addr, &go, request)?);
    }
    let punts = guarded.enforcement.counters()?.punts();
    // Stopped, the daemon meets none before all are there.
    guarded.enforcement.daemon()?.signal(Signal::SIGSTOP)?;
    fs::write(&go, "")?;
    let there = wait_until("all heads", TIMEOUT, || {
        (guarded.enforcement.counters().ok()?.punts() - punts >= 2 * BURST as u64).then_some(())
    });
    guarded.enforcement.daemon()?.signal(Signal::SIGCONT)?;
    there?;
    let mut statuses = answers(&mut callers)?;
    statuses.sort();
    assert_eq!(statuses, [["status 200"; BURST], ["status 429"; BURST]].concat());
    Ok(())
}

/// Nor does it help to remove them again before anything is sent: nobody knows then whose they were.
#[test]
fn callers_whose_cgroups_are_gone_are_one_source() -> Result<()> {
    let _deadline = Deadline::new("limits: gone", LIMIT);
    let guarded = Guarded::builder("limgone").nonblocking();
    let guarded = guarded.policy("unknown_requests", json!({"rate": FEW, "burst": 3})).start()?;
    let place = tempfile::tempdir()?;
    let go = place.path().join("go");
    let elsewhere = guarded.enforcement.cgroup().child("elsewhere")?;
    let mut callers = Vec::new();
    for number in 0..5 {
        let own = guarded.enforcement.cgroup().child(&format!("own-{number}"))?;
        let request = unknown(&guarded, &guarded.token()?, number);
        let caller = Place::root(&own).connect(guarded.addr(), &go, &request)?;
        elsewhere.take(caller.pid())?;
        callers.push(caller);
    }
    fs::write(&go, "")?;
    let mut statuses = answers(&mut callers)?;
    statuses.sort();
    assert_eq!(statuses, ["status 200", "status 200", "status 200", "status 429", "status 429"]);
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
    let elsewhere = guarded.enforcement.cgroup().child("elsewhere")?;
    assert_eq!(Place::root(&elsewhere).call(guarded.addr(), &[], &good)?.status(), Some(200));
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
    let elsewhere = guarded.enforcement.cgroup().child("elsewhere")?;
    assert_eq!(Place::root(&elsewhere).call(guarded.addr(), &[], &health)?.status(), Some(200));
    Ok(())
}

/// A source that sends bad tokens as fast as it can.
#[test]
fn a_flood_of_bad_tokens_stops_nobody_else() -> Result<()> {
    let _deadline = Deadline::new("limits: flood", LIMIT);
    const PER_SEC: u64 = 100;
    let guarded = Guarded::builder("limflood").nonblocking();
    let limit = json!({"rate": format!("{PER_SEC}/s"), "burst": PER_SEC});
    let guarded = guarded.policy("unknown_requests", limit).start()?;
    let good = guarded.enforcement.cgroup().child("good")?;
    let since = Instant::now();
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
                let request = unknown(&guarded, &token, 0);
                let caller = Place::root(&good).call(guarded.addr(), &[], &request)?;
                ensure!(caller.status() == Some(200), "{number}: {caller:?}");
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let mut judged = 0;
        for flooder in flooders {
            let (refused, limited) = flooder.join().map_err(|_| anyhow!("a flooder panicked"))??;
            ensure!(refused > 0 && limited > 0, "{refused} refused, {limited} limited");
            judged += u64::from(refused);
        }
        let at_most = PER_SEC + PER_SEC * (since.elapsed().as_secs() + 1);
        ensure!(judged <= at_most, "{judged} of one source judged, where {at_most} may be");
        served
    })
}
