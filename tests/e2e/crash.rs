//! Sudden death of daemon, server or client: nothing unverified ever passes, and nothing is left behind.

mod common;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Cgroup, Deadline, wait_until};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use nix::sys::signal::Signal;

use common::{
    LIMIT, TIMEOUT, assert_nothing_is_left, assert_refusal, refused_unread, status, unknown,
    wait_until_unavailable,
};

#[test]
fn after_kill_9_known_heads_go_on_and_unknown_ones_get_503() -> Result<()> {
    let _deadline = Deadline::new("kill -9", LIMIT);
    let mut guarded = Guarded::start("kill9")?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let bad = guarded.call(Some("not-a-token")).build();
    let mut open = guarded.connect()?;
    assert_eq!(open.roundtrip(&good)?.status, 200);
    assert_eq!(status(&guarded, &bad)?, 401);
    guarded.enforcement.kill9()?;
    let mut expected = good.len() as u64;
    for _ in 0..20 {
        assert_eq!(open.roundtrip(&good)?.status, 200);
        assert_eq!(status(&guarded, &good)?, 200);
        expected += 2 * good.len() as u64;
    }
    // What is parked for a daemon that does not come gets nothing, and the server neither.
    let mut parked = guarded.connect()?;
    parked.send(&unknown(&guarded, &token, 0))?;
    wait_until_unavailable(&guarded)?;
    for number in 1..20 {
        for request in [unknown(&guarded, &token, number), unknown(&guarded, "not-a-token", number)] {
            let response = guarded.connect()?.roundtrip(&request)?;
            assert_refusal(&response, 503, None);
        }
    }
    // On a connection that has been good so far, too; and it stays good for what is known.
    assert_eq!(open.roundtrip(&unknown(&guarded, &token, 99))?.status, 503);
    assert_eq!(open.roundtrip(&good)?.status, 200);
    expected += good.len() as u64;
    // Half a head, or a request too short for the answer: closed, not passed.
    for bytes in [&b"POST /mcp HTT"[..], b"GET /mcp HTTP/1.1\r\nHost: x\r\n\r\n"] {
        let mut connection = guarded.connect()?;
        connection.send(bytes)?;
        drop(connection.read_some(1));
    }
    assert_eq!(guarded.bytes_read()?, expected);
    Ok(())
}

#[test]
fn a_daemon_that_is_stopped_is_as_good_as_dead_until_it_goes_on() -> Result<()> {
    let _deadline = Deadline::new("SIGSTOP", LIMIT);
    let mut guarded = Guarded::start("sigstop")?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    assert_eq!(status(&guarded, &good)?, 200);
    guarded.enforcement.daemon()?.signal(Signal::SIGSTOP)?;
    let mut parked = guarded.connect()?;
    parked.send(&unknown(&guarded, &token, 0))?;
    wait_until_unavailable(&guarded)?;
    assert_eq!(status(&guarded, &good)?, 200);
    assert_eq!(status(&guarded, &unknown(&guarded, &token, 1))?, 503);
    guarded.enforcement.daemon()?.signal(Signal::SIGCONT)?;
    assert_eq!(parked.read_response()?.status, 200);
    wait_until("the daemon answers again", TIMEOUT, || {
        (status(&guarded, &unknown(&guarded, &token, 2)).ok()? == 200).then_some(())
    })
}

#[test]
fn a_daemon_killed_at_any_moment_of_its_start_leaves_nothing_that_stays() -> Result<()> {
    let _deadline = Deadline::new("killed while starting", LIMIT);
    let mut guarded = Guarded::start("killstart")?;
    assert!(guarded.enforcement.stop()?.success());
    let mut killed = Vec::new();
    for delay_ms in [0, 5, 20, 50, 100, 150, 200, 300, 400, 600, 800, 1000, 1300] {
        let mut daemon = guarded.enforcement.spawn_daemon()?;
        thread::sleep(Duration::from_millis(delay_ms));
        killed.push(daemon.pid());
        daemon.kill()?;
        // Whatever stage it was in: a request without a token passes only while nothing guards the server at all.
        let guards = guarded.enforcement.pins().exists();
        let mut connection = guarded.connect()?;
        connection.send(&guarded.call(None).header("X-Filler", &"x".repeat(600)).build())?;
        if !guards {
            assert_eq!(connection.read_response()?.status, 200, "after {delay_ms} ms");
        }
    }
    guarded.enforcement.launch()?;
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    assert!(guarded.enforcement.stop()?.success());
    assert_nothing_is_left(&guarded)?;
    // Nor does anything of the self-tests stay that were cut short.
    let left: Vec<PathBuf> = [PathBuf::from("/sys/fs/bpf"), Cgroup::mount_point()?]
        .iter()
        .flat_map(|directory| killed.iter().map(|pid| directory.join(format!("enforcer-selftest-{pid}"))))
        .filter(|path| path.exists())
        .collect();
    for path in &left {
        // On a bpffs the pins are files; in a cgroup directory only the directory itself can be removed.
        drop(fs::remove_dir(path).or_else(|_| fs::remove_dir_all(path)));
    }
    ensure!(left.is_empty(), "{left:?} stayed behind");
    Ok(())
}

#[test]
fn killed_under_load_nothing_unverified_passes() -> Result<()> {
    let _deadline = Deadline::new("killed under load", LIMIT);
    let mut guarded = Guarded::start("killload")?;
    let token = guarded.token()?;
    let addr = guarded.addr();
    let good = guarded.call(Some(&token)).header("X-Number", "000").build();
    let bad = guarded.call(Some("not-a-token")).header("X-Number", "000").build();
    assert_eq!(guarded.connect()?.roundtrip(&good)?.status, 200);
    for round in 0..4 {
        thread::scope(|scope| -> Result<()> {
            let (good, bad) = (&good, &bad);
            let clients: Vec<_> =
                (0..6).map(|client| scope.spawn(move || hammer(addr, good, bad, client))).collect();
            thread::sleep(Duration::from_millis(37 * (round + 1)));
            guarded.enforcement.kill9()?;
            for client in clients {
                client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            }
            guarded.enforcement.launch()
        })?;
    }
    for record in guarded.recorder.connections()? {
        let mut rest = record.kept.as_slice();
        while !rest.is_empty() {
            let next = rest.get(..good.len()).unwrap_or(rest);
            ensure!(same_but_number(next, &good), "{}: other bytes than allowed ones arrived", record.peer);
            rest = rest.get(good.len()..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Requests of both kinds, known and unknown, for a while; ends with its connection at the latest.
fn hammer(addr: SocketAddr, good: &[u8], bad: &[u8], client: usize) -> Result<()> {
    for number in 0..60 {
        let Ok(mut connection) = Connection::open(addr, Duration::from_millis(200)) else { return Ok(()) };
        for request in
            [numbered(good, client * 60 + number), numbered(bad, client * 60 + number), good.to_vec()]
        {
            match connection.roundtrip(&request) {
                Ok(response) => {
                    let allowed = !request.windows(11).any(|window| window == b"not-a-token");
                    ensure!(allowed || response.status != 200, "a bad token passed");
                    ensure!(matches!(response.status, 200 | 401 | 503), "{}", response.status);
                }
                // Parked for the dead daemon, or reset by the next one.
                Err(_) => break,
            }
        }
    }
    Ok(())
}

fn numbered(request: &[u8], number: usize) -> Vec<u8> {
    let text = String::from_utf8_lossy(request);
    text.replace("X-Number: 000", &format!("X-Number: {number:03}")).into_bytes()
}

fn same_but_number(bytes: &[u8], good: &[u8]) -> bool {
    let at = good.windows(10).position(|window| window == b"X-Number: ").unwrap_or(usize::MAX);
    let differs = |(index, (a, b)): (usize, (&u8, &u8))| a != b && !(at + 10..at + 13).contains(&index);
    bytes.len() <= good.len() && !bytes.iter().zip(good).enumerate().any(differs)
}

#[test]
fn clients_and_servers_that_vanish_leave_nothing() -> Result<()> {
    let _deadline = Deadline::new("vanishing peers", LIMIT);
    let mut guarded = Guarded::start("vanish")?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let long = RequestBuilder::new("POST", "/mcp")
        .header("Host", &guarded.host())
        .bearer(&token)
        .body(&vec![b'x'; 300_000])
        .build();
    // In the middle of a head, of a body that is allowed, and of one that is refused.
    for bytes in [good.get(..30), long.get(..600), long.get(..100_000), Some(good.as_slice())] {
        for _ in 0..3 {
            let mut connection = guarded.connect()?;
            connection.send(bytes.unwrap_or_default())?;
            connection.reset()?;
            let mut connection = guarded.connect()?;
            connection.send(bytes.unwrap_or_default())?;
            drop(connection);
        }
    }
    assert_eq!(status(&guarded, &good)?, 200);
    // The server dies in the middle of a request, and comes back under the same address.
    let mut running = guarded.connect()?;
    running.send(long.get(..5000).unwrap_or_default())?;
    let mut idle = guarded.connect()?;
    assert_eq!(idle.roundtrip(&good)?.status, 200);
    guarded.recorder.process().kill()?;
    idle.expect_closed()?;
    drop(running);
    let addr = guarded.addr();
    let cgroup = guarded.enforcement.cgroup();
    guarded.recorder = wait_until("the server is back", TIMEOUT, || {
        RemoteRecorder::spawn(addr, &Config::default(), Some(cgroup), None).ok()
    })?;
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    refused_unread(&guarded, "")?;
    wait_until("the records of all flows are gone", TIMEOUT, || {
        let flows = guarded.enforcement.cli_json(&["flows"]).ok()?;
        flows.get("flows")?.as_array()?.is_empty().then_some(())
    })?;
    assert!(guarded.enforcement.stop()?.success());
    assert_nothing_is_left(&guarded)
}

#[test]
fn pins_that_vanish_under_the_daemon_do_not_open_the_door() -> Result<()> {
    let _deadline = Deadline::new("pins deleted", LIMIT);
    let mut guarded = Guarded::start("nopins")?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let mut open = guarded.connect()?;
    assert_eq!(open.roundtrip(&good)?.status, 200);
    fs::remove_dir_all(guarded.enforcement.pins()).context("the pins")?;
    let read = guarded.bytes_read()?;
    // The kernel frees a link that nobody holds a little later.
    for _ in 0..20 {
        assert_ne!(status(&guarded, &guarded.call(None).build())?, 200, "the server is open");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(guarded.bytes_read()?, read);
    drop(guarded.enforcement.stop());
    assert_eq!(guarded.enforcement.leftover_pins(), Vec::<PathBuf>::new());
    Ok(())
}
