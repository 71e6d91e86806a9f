//! A daemon over what an earlier one left: connections, grants and counters go on, and what the earlier one had in its hands ends.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, wait_until};
use enforcer_tests::raw::Connection;
use serde_json::Value;

use common::{LIMIT, TIMEOUT, assert_nothing_is_left, status, unknown};

fn generation(guarded: &Guarded) -> Result<u64> {
    let status = guarded.enforcement.cli_json(&["status"])?;
    status.pointer("/loaded/generation").and_then(Value::as_u64).context("no generation")
}

/// Waits until the daemon has taken a connection's bytes: whatever it does with them it does not do a second time.
fn wait_for_punted(guarded: &Guarded, punts: u64) -> Result<()> {
    wait_until("the request is the daemon's", TIMEOUT, || {
        (guarded.enforcement.counters().ok()?.punts() > punts).then_some(())
    })?;
    // It reads the ring buffer as soon as it is woken.
    thread::sleep(Duration::from_millis(100));
    Ok(())
}

/// Waits until the daemon has handed a connection back: its client may have the answer a moment earlier.
fn wait_for_hand_back(guarded: &Guarded, connection: &Connection) -> Result<()> {
    let client = connection.local_addr()?.to_string();
    wait_until("the connection is the kernel's", TIMEOUT, || {
        let flows = guarded.enforcement.cli_json(&["flows"]).ok()?;
        let flows = flows.get("flows")?.as_array()?;
        let flow = flows.iter().find(|flow| flow.get("client_address") == Some(&client.clone().into()))?;
        (flow.get("state")?.as_str()? != "punted").then_some(())
    })
}

#[test]
fn a_restart_keeps_connections_grants_verdicts_and_counters() -> Result<()> {
    let _deadline = Deadline::new("adoption", LIMIT);
    let mut guarded = Guarded::builder("adopt").nonblocking().option("--keep").start()?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let bad = guarded.call(None).header("X-Filler", &"x".repeat(600)).build();
    let mut open = guarded.connect_accepted()?;
    for _ in 0..2 {
        assert_eq!(open.roundtrip(&good)?.status, 200);
        assert_eq!(open.roundtrip(&bad)?.status, 401);
    }
    wait_for_hand_back(&guarded, &open)?;
    let generation_before = generation(&guarded)?;
    let grants_before = guarded.enforcement.cli_json(&["grants"])?;
    for round in 0..4 {
        let before = guarded.enforcement.counters()?;
        if round % 2 == 0 {
            guarded.enforcement.kill9()?;
        } else {
            assert!(guarded.enforcement.stop()?.success());
        }
        assert_eq!(open.roundtrip(&good)?.status, 200, "no daemon, round {round}");
        guarded.enforcement.launch()?;
        // On old connections and new ones the kernel knows what it knew: nobody asks the daemon.
        for _ in 0..3 {
            assert_eq!(open.roundtrip(&good)?.status, 200, "round {round}");
            assert_eq!(open.roundtrip(&bad)?.status, 401, "round {round}");
            assert_eq!(status(&guarded, &good)?, 200, "round {round}");
        }
        let after = guarded.enforcement.counters()?;
        assert_eq!(after.punts(), before.punts(), "round {round}");
        assert_eq!(after.kernel("allowed"), before.kernel("allowed") + 7, "round {round}");
        assert_eq!(after.kernel("refused"), before.kernel("refused") + 3, "round {round}");
        assert_eq!(after.dead(), before.dead(), "round {round}");
        assert_eq!(generation(&guarded)?, generation_before);
        // A head that is new, by the token that has a grant: the grant is found, not given anew.
        assert_eq!(open.roundtrip(&unknown(&guarded, &token, round))?.status, 200, "round {round}");
        assert_eq!(open.roundtrip(&unknown(&guarded, &token, round))?.status, 200, "round {round}");
        wait_for_hand_back(&guarded, &open)?;
    }
    let serials = |grants: &Value| -> Vec<Value> {
        let list = grants.get("grants").and_then(Value::as_array).cloned().unwrap_or_default();
        list.iter().filter_map(|grant| grant.get("serial").cloned()).collect()
    };
    let grants = guarded.enforcement.cli_json(&["grants"])?;
    assert_eq!(serials(&grants), serials(&grants_before));
    assert_eq!(serials(&grants).len(), 1);
    assert_eq!(guarded.enforcement.leftover_pins(), [guarded.enforcement.pins()]);
    let unload = guarded.enforcement.cli(&["unload", "--drain-timeout", "0", "--even-if-running"])?;
    assert!(unload.status.success(), "{}", unload.stderr);
    guarded.enforcement.kill9()?;
    open.expect_closed()?;
    assert_nothing_is_left(&guarded)
}

#[test]
fn what_the_dead_daemon_had_begun_ends_and_what_waited_for_it_is_served_once() -> Result<()> {
    let _deadline = Deadline::new("parked", LIMIT);
    let mut guarded = Guarded::start("orphans")?;
    let token = guarded.token()?;
    let whole = unknown(&guarded, &token, 1);
    // Half a head is in the daemon's memory.
    let mut begun = guarded.connect()?;
    let punts = guarded.enforcement.counters()?.punts();
    begun.send(whole.get(..40).unwrap_or_default())?;
    wait_for_punted(&guarded, punts)?;
    guarded.enforcement.kill9()?;
    // The first is whole while nobody is there, the second goes on afterwards.
    let mut waiting = guarded.connect()?;
    waiting.send(&unknown(&guarded, &token, 2))?;
    let late = unknown(&guarded, &token, 3);
    let mut half = guarded.connect()?;
    half.send(late.get(..40).unwrap_or_default())?;
    guarded.enforcement.launch()?;
    assert_eq!(waiting.read_response()?.status, 200);
    begun.expect_closed()?;
    half.send(late.get(40..).unwrap_or_default())?;
    assert_eq!(half.read_response()?.status, 200);
    for (connection, request) in [(&waiting, &unknown(&guarded, &token, 2)), (&half, &late)] {
        assert_eq!(&guarded.read_by_server(connection.local_addr()?)?, request);
    }
    assert_eq!(guarded.read_by_server(begun.local_addr()?).unwrap_or_default(), b"");
    assert_eq!(guarded.enforcement.reason("daemon-died")?, 1);
    Ok(())
}

/// Ends the threads that look at it, also when the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn other_programs_take_their_place_without_a_gap() -> Result<()> {
    let _deadline = Deadline::new("replaced programs", LIMIT);
    let mut guarded = Guarded::builder("replace").option("--replace-programs").start()?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let mut open = guarded.connect()?;
    assert_eq!(open.roundtrip(&good)?.status, 200);
    wait_for_hand_back(&guarded, &open)?;
    let (addr, stop) = (guarded.addr(), AtomicBool::new(false));
    let mut known = 0_u32;
    thread::scope(|scope| -> Result<()> {
        let refused = guarded.call(None).header("X-Filler", &"x".repeat(600)).build();
        let stop = &stop;
        let _stopping = StopOnDrop(stop);
        // Connections come all the time, and whichever programs they meet, nothing without a token passes.
        let intruder = scope.spawn(move || -> Result<u32> {
            let mut answers = 0;
            while !stop.load(Ordering::Acquire) {
                let mut connection = Connection::open(addr, TIMEOUT)?;
                let Ok(response) = connection.roundtrip(&refused) else { continue };
                ensure!(response.status == 401 || response.status == 503, "{}", response.status);
                answers += 1;
            }
            Ok(answers)
        });
        for _ in 0..3 {
            guarded.enforcement.kill9()?;
            guarded.enforcement.launch()?;
            for number in 0..5 {
                assert_eq!(open.roundtrip(&good)?.status, 200);
                assert_eq!(open.roundtrip(&unknown(&guarded, &token, number))?.status, 200);
                known += 1;
            }
            wait_for_hand_back(&guarded, &open)?;
        }
        stop.store(true, Ordering::Release);
        ensure!(intruder.join().map_err(|_| anyhow!("the intruder panicked"))?? > 0, "no answer at all");
        Ok(())
    })?;
    let log = guarded.enforcement.log()?;
    ensure!(log.contains("replace_programs=true"), "{log}");
    let expected = (1 + known) as usize * good.len();
    ensure!(guarded.read_by_server(open.local_addr()?)?.len() >= expected, "bytes are missing");
    assert_eq!(status(&guarded, &guarded.call(None).build())?, 401);
    assert!(guarded.enforcement.stop()?.success());
    assert_nothing_is_left(&guarded)
}

#[test]
fn in_observe_mode_a_restart_disturbs_nobody() -> Result<()> {
    let _deadline = Deadline::new("observed restart", LIMIT);
    let mut guarded = Guarded::builder("adoptobs").observing().start()?;
    let whole = guarded.call(None).header("X-Filler", &"x".repeat(600)).build();
    let mut open = guarded.connect()?;
    let punts = guarded.enforcement.counters()?.punts();
    open.send(whole.get(..40).unwrap_or_default())?;
    wait_for_punted(&guarded, punts)?;
    guarded.enforcement.kill9()?;
    open.send(whole.get(40..100).unwrap_or_default())?;
    guarded.enforcement.launch()?;
    open.send(whole.get(100..).unwrap_or_default())?;
    assert_eq!(open.read_response()?.status, 200);
    for _ in 0..3 {
        assert_eq!(open.roundtrip(&whole)?.status, 200);
    }
    assert_eq!(guarded.read_by_server(open.local_addr()?)?, whole.repeat(4));
    Ok(())
}
