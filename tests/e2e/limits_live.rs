//! Limits that change, or whose daemon does: what was charged stays charged.

mod common;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "bypass/maps.rs"]
mod maps;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, wait_until};
use enforcer_tests::raw::Connection;
use enforcer_tests::recorder::Config;
use serde_json::{Value, json};

use common::{LIMIT, TIMEOUT, endless, flows_on, kept, open_stream, policy, tools, unknown};

/// So few that none comes back while a test runs.
const FEW: &str = "6/h";

fn statuses(connection: &mut Connection, request: &[u8], times: usize) -> Result<Vec<u16>> {
    (0..times).map(|_| Ok(connection.roundtrip(request)?.status)).collect()
}

fn reload(guarded: &Guarded, limits: &Value) -> Result<()> {
    let next = policy(guarded, vec![tools(guarded)]).with("limits", limits.clone());
    guarded.enforcement.write_policy(&next)?;
    guarded.enforcement.cli_json(&["reload"]).map(drop)
}

#[test]
fn a_limit_changes_under_open_connections_and_gives_no_fresh_burst() -> Result<()> {
    let _deadline = Deadline::new("limits: reload", LIMIT);
    let all =
        |rate: &str, burst: u32| json!([{"name": "all", "per": "server", "rate": rate, "burst": burst}]);
    let guarded = Guarded::builder("limreload").nonblocking().option("--no-watch");
    let guarded = guarded.policy("limits", all(FEW, 6)).start()?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let mut connection = guarded.connect_accepted()?;
    assert_eq!(statuses(&mut connection, &request, 4)?, [200; 4]);
    // Two are left, whatever it is called to hold.
    reload(&guarded, &all(FEW, 100))?;
    assert_eq!(statuses(&mut connection, &request, 1)?, [200]);
    reload(&guarded, &all("12/h", 100))?;
    assert_eq!(statuses(&mut connection, &request, 3)?, [200, 429, 429]);
    // One that is empty stays so when it is made smaller, also if its slower rate makes its depth longer.
    reload(&guarded, &all("1/h", 3))?;
    assert_eq!(statuses(&mut connection, &request, 2)?, [429; 2]);
    reload(&guarded, &json!([]))?;
    assert_eq!(statuses(&mut connection, &request, 20)?, [200; 20]);
    // Added again, it is the one that it was; another name is another limit.
    reload(&guarded, &all("1/h", 3))?;
    assert_eq!(statuses(&mut connection, &request, 2)?, [429; 2]);
    reload(&guarded, &json!([{"name": "new", "per": "server", "rate": FEW, "burst": 2}]))?;
    assert_eq!(statuses(&mut connection, &request, 4)?, [200, 200, 429, 429]);
    reload(&guarded, &all("1000/s", 1000))?;
    wait_until("the looser rate has filled it", TIMEOUT, || {
        (connection.roundtrip(&request).ok()?.status == 200).then_some(())
    })?;
    // From full to nearly nothing.
    reload(&guarded, &all(FEW, 1))?;
    let last = statuses(&mut connection, &request, 3)?;
    assert!(last == [200, 429, 429] || last == [429; 3], "{last:?}");
    Ok(())
}

#[test]
fn places_change_under_open_streams() -> Result<()> {
    let _deadline = Deadline::new("limits: reload of places", LIMIT);
    let open = |streams: u32| json!([{"name": "open", "per": "server", "streams": streams}]);
    let guarded = Guarded::builder("limplacesnew").recorder(Config { nonblocking: true, ..endless() });
    let guarded = guarded.option("--no-watch").policy("limits", open(1)).start()?;
    let token = guarded.token()?;
    let request = unknown(&guarded, &token, 0);
    let refused = |what: &str| -> Result<()> {
        let status = guarded.connect_accepted()?.roundtrip(&request)?.status;
        anyhow::ensure!(status == 429, "{what}: {status}");
        Ok(())
    };
    let mut first = open_stream(guarded.connect()?, &request)?;
    refused("the only place is taken")?;
    reload(&guarded, &open(2))?;
    let mut second = open_stream(guarded.connect_accepted()?, &request)?;
    refused("both are taken")?;
    // What is open goes on when there are more streams than places.
    reload(&guarded, &open(1))?;
    flows_on(&mut first)?;
    flows_on(&mut second)?;
    drop(first);
    for _ in 0..5 {
        refused("one place, one stream")?;
    }
    reload(&guarded, &json!([]))?;
    let third = open_stream(guarded.connect_accepted()?, &request)?;
    reload(&guarded, &open(2))?;
    flows_on(&mut second)?;
    drop((second, third));
    wait_until("the places are free", TIMEOUT, || {
        open_stream(guarded.connect_accepted().ok()?, &request).ok()
    })?;
    Ok(())
}

#[test]
fn limits_hold_without_a_daemon_and_the_next_one_takes_them_over() -> Result<()> {
    let _deadline = Deadline::new("limits: no daemon", LIMIT);
    let limits = json!([{"name": "all", "per": "server", "rate": FEW, "burst": 6, "streams": 2}]);
    let mut guarded = kept("limkill").nonblocking().policy("limits", limits).start()?;
    let token = guarded.token()?;
    let request = unknown(&guarded, &token, 0);
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    let mut connection = guarded.connect_accepted()?;
    assert_eq!(statuses(&mut connection, &request, 2)?, [200; 2]);
    guarded.enforcement.kill9()?;
    assert_eq!(statuses(&mut connection, &request, 1)?, [200]);
    let mut other = guarded.connect_accepted()?;
    assert_eq!(statuses(&mut other, &request, 1)?, [200]);
    // Both places are taken.
    assert_eq!(guarded.connect_accepted()?.roundtrip(&request)?.status, 429);
    guarded.enforcement.launch()?;
    assert_eq!(guarded.connect_accepted()?.roundtrip(&unknown(&guarded, &token, 1))?.status, 429);
    drop(other);
    // One request is left, known or not; of the same bucket, for the daemon and for the kernel.
    wait_until("its place is free", TIMEOUT, || {
        let status = guarded.connect_accepted().ok()?.roundtrip(&unknown(&guarded, &token, 1)).ok()?.status;
        (status == 200).then_some(())
    })?;
    assert_eq!(statuses(&mut connection, &request, 3)?, [429; 3]);
    // Not on that connection, which would still be in the daemon's hands when it is killed.
    assert_eq!(guarded.connect_accepted()?.roundtrip(&unknown(&guarded, &token, 2))?.status, 429);
    guarded.enforcement.kill9()?;
    assert_eq!(statuses(&mut connection, &request, 3)?, [429; 3]);
    guarded.enforcement.launch()?;
    assert_eq!(statuses(&mut connection, &request, 3)?, [429; 3]);
    Ok(())
}

#[test]
fn observe_mode_counts_and_refuses_nothing() -> Result<()> {
    let _deadline = Deadline::new("limits: observe", LIMIT);
    let few = json!({"rate": FEW, "burst": 3});
    let limits = json!([{"name": "all", "per": "server", "rate": FEW, "burst": 2}]);
    let guarded = Guarded::builder("limobserve").observing().policy("limits", limits);
    let guarded = guarded.policy("unknown_requests", few.clone()).policy("refused_requests", few).start()?;
    let token = guarded.token()?;
    let mut connection = guarded.connect_accepted()?;
    for _ in 0..10 {
        assert_eq!(connection.roundtrip(&guarded.call(Some(&token)).build())?.status, 200);
    }
    for number in 0..10 {
        assert_eq!(connection.roundtrip(&unknown(&guarded, "bad", number))?.status, 200);
        assert_eq!(connection.roundtrip(&unknown(&guarded, "bad", 0))?.status, 200);
    }
    let counters = guarded.enforcement.counters()?;
    let counted = counters.kernel("would-limit") + counters.daemon("would-limit");
    // Eight of the good ones; of those that were new to the kernel, and of those that were not, all but three each.
    assert!(counted >= 8 + 7, "{counters:?}");
    assert_eq!(counters.kernel("limited") + counters.daemon("over-limit"), 0, "{counters:?}");
    let heads = guarded.recorder.connection(connection.local_addr()?)?.context("the connection")?.requests;
    assert_eq!(heads.len(), 30);
    Ok(())
}

/// A bucket that does not say whose it is, or is not there, refuses, on both ways of a request.
#[test]
fn a_bucket_that_cannot_be_read_refuses() -> Result<()> {
    const SERIAL: usize = 56;
    let _deadline = Deadline::new("limits: unreadable", LIMIT);
    let guarded = Guarded::builder("limunread").nonblocking();
    let limits = json!([{"name": "all", "per": "server", "rate": "1000/s", "burst": 1000}]);
    let guarded = guarded.policy("limits", limits).start()?;
    let token = guarded.token()?;
    let known = guarded.call(Some(&token)).build();
    let mut connection = guarded.connect_accepted()?;
    assert_eq!(statuses(&mut connection, &known, 2)?, [200; 2]);
    let read = guarded.bytes_read()?;
    let buckets = maps::PinnedMap::open(&guarded.enforcement.pins().join("LIMITS"))?;
    buckets.change(&1_u32.to_ne_bytes(), |bucket| bucket[SERIAL..].fill(0))?;
    for request in [&known, &unknown(&guarded, &token, 1)] {
        let response = connection.roundtrip(request)?;
        assert_eq!((response.status, response.header("retry-after")), (429, Some("1")));
    }
    assert_eq!(guarded.bytes_read()?, read);
    let counters = guarded.enforcement.counters()?;
    ensure!(counters.kernel("bucket-failed") >= 1 && counters.daemon("bucket-failed") >= 1, "{counters:?}");
    Ok(())
}
