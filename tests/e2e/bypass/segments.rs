//! Segments as no honest stack sends them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::torture::{PATIENCE, good_token, post};
use crate::wire::{ACK, FIN, PSH, QUIET, URG, Wire};

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
