//! Observe mode: everything passes, byte for byte, and what enforce would have refused is counted and logged.

mod common;

use std::time::Duration;

use anyhow::Result;
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, wait_until};
use enforcer_tests::raw::{RequestBuilder, Segmentation};

use common::{LIMIT, TIMEOUT};

#[test]
fn every_request_passes_as_it_was_sent_and_is_counted() -> Result<()> {
    let _deadline = Deadline::new("observe", LIMIT);
    let guarded = Guarded::builder("observe").observing().start()?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    let wrong = guarded.call(Some(&guarded.mint().audience("https://other.example").sign()?)).build();
    let none = guarded.call(None).build();
    let elsewhere = RequestBuilder::mcp_call("evil.example", "/admin", None, "echo").build();
    let mut connection = guarded.connect()?;
    let mut sent = Vec::new();
    for request in [&good, &wrong, &none, &elsewhere, &none, &good, &wrong, &elsewhere] {
        assert_eq!(connection.roundtrip(request)?.status, 200);
        sent.extend_from_slice(request);
    }
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, sent);
    // The daemon looks at a copy, so it may be behind.
    let counters = wait_until("the refusals are counted", TIMEOUT, || {
        let counters = guarded.enforcement.counters().ok()?;
        let refused = counters.daemon("no-credentials") + counters.daemon("path-unknown");
        (refused > 0 && refused + counters.kernel("would-refuse") >= 3).then_some(counters)
    })?;
    assert_eq!(
        (counters.kernel("refused"), counters.kernel("answered"), counters.dead()),
        (0, 0, 0),
        "{counters:?}"
    );
    let log = guarded.enforcement.log()?;
    assert!(log.contains("no-credentials") && log.contains("observed=true"), "{log}");
    Ok(())
}

#[test]
fn heads_that_are_known_are_counted_by_the_kernel() -> Result<()> {
    let _deadline = Deadline::new("would refuse", LIMIT);
    let guarded = Guarded::builder("would").observing().start()?;
    let none = guarded.call(None).build();
    assert_eq!(guarded.connect()?.roundtrip(&none)?.status, 200);
    wait_until("the head is judged", TIMEOUT, || {
        (guarded.enforcement.reason("no-credentials").ok()? == 1).then_some(())
    })?;
    for _ in 0..5 {
        assert_eq!(guarded.connect()?.roundtrip(&none)?.status, 200);
    }
    let counters = guarded.enforcement.counters()?;
    assert_eq!((counters.kernel("would-refuse"), counters.daemon("no-credentials")), (5, 1));
    Ok(())
}

#[test]
fn what_is_no_http_at_all_passes_too() -> Result<()> {
    let _deadline = Deadline::new("observe: no HTTP", LIMIT);
    let guarded = Guarded::builder("opaque").observing().start()?;
    let mut random = Vec::new();
    let mut state = 7_u64;
    while random.len() < 200_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        random.extend_from_slice(&state.to_be_bytes());
    }
    for (what, bytes) in [
        ("random bytes", random),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(50)),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n".to_vec()),
        ("pipelined", guarded.call(None).build().repeat(20)),
        ("a bare LF", b"GET / HTTP/1.1\nHost: x\n\n".to_vec()),
    ] {
        let mut connection = guarded.connect()?;
        connection.send_segmented(&bytes, &Segmentation::Every(7001), Duration::from_millis(1))?;
        let record =
            guarded.recorder.wait_for_bytes(connection.local_addr()?, bytes.len() as u64, TIMEOUT)?;
        assert_eq!(record.kept, bytes, "{what}");
    }
    Ok(())
}

#[test]
fn bodies_and_split_heads_pass_in_order() -> Result<()> {
    let _deadline = Deadline::new("observe: bodies", LIMIT);
    let guarded = Guarded::builder("obsbody").observing().start()?;
    let mut connection = guarded.connect()?;
    let mut sent = Vec::new();
    let base = || RequestBuilder::new("POST", "/mcp").header("Host", &guarded.host());
    for length in [0, 1, 5000, 200_000] {
        let body: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
        for request in [base().body(&body), base().chunked_body(&body, 999), base().bearer("x").body(&body)] {
            let request = request.build();
            for cut in [Segmentation::Whole, Segmentation::At(vec![20, 60])] {
                connection.send_segmented(&request, &cut, Duration::from_millis(5))?;
                assert_eq!(connection.read_response()?.status, 200);
                sent.extend_from_slice(&request);
            }
        }
    }
    let kept = guarded.read_by_server(connection.local_addr()?)?;
    // The recorder keeps the first MiB.
    assert!(!kept.is_empty() && sent.starts_with(&kept), "other bytes arrived");
    guarded.recorder.wait_for_bytes(connection.local_addr()?, sent.len() as u64, TIMEOUT)?;
    Ok(())
}

#[test]
fn a_dead_daemon_holds_nothing_up() -> Result<()> {
    let _deadline = Deadline::new("observe: dead daemon", LIMIT);
    let mut guarded = Guarded::builder("obsdead").observing().start()?;
    let mut connection = guarded.connect()?;
    let request = guarded.call(None).build();
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    guarded.enforcement.kill9()?;
    for number in 0..50 {
        let other = guarded.call(Some(&format!("token-{number}"))).build();
        assert_eq!(connection.roundtrip(&other)?.status, 200);
        assert_eq!(guarded.connect()?.roundtrip(&other)?.status, 200);
    }
    Ok(())
}
