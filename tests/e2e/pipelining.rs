//! Requests that do not wait for each other, and heads wherever they begin.

mod common;

use anyhow::{Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::Deadline;
use enforcer_tests::raw::RequestBuilder;

use common::{LIMIT, TIMEOUT};

/// Rows 10 and 11: a request that does not wait for the answer to the one before it.
#[test]
fn pipelined_requests_never_carry_each_other() -> Result<()> {
    let _deadline = Deadline::new("pipelining", LIMIT);
    let guarded = Guarded::start("pipelined")?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    let bad = guarded.call(Some(&guarded.mint().audience("https://other.example").sign()?)).build();
    let none = guarded.call(None).build();
    // Once more with heads that the kernel knows.
    for round in 0..2 {
        for (what, first, second) in [
            ("allowed, then refused", &good, &bad),
            ("allowed, then without a token", &good, &none),
            ("refused, then allowed", &bad, &good),
            ("refused, then refused", &none, &bad),
            ("allowed twice", &good, &good),
        ] {
            let mut connection = guarded.connect()?;
            drop(connection.send(&[first.as_slice(), second].concat()));
            // Answers in order, or none; in the end the connection is closed.
            let mut more = connection.read_some(1 << 16);
            drop(connection.finish_sending());
            while more.is_ok_and(|bytes| !bytes.is_empty()) {
                more = connection.read_some(1 << 16);
            }
            let record = guarded.recorder.connection(connection.local_addr()?)?;
            let read = record.map(|record| record.kept).unwrap_or_default();
            for forbidden in [&bad, &none] {
                ensure!(!contains(&read, forbidden), "{what}, round {round}: a refused request arrived");
            }
            ensure!(
                read.is_empty() || read == good || read == good.repeat(2),
                "{what}, round {round}: {} bytes",
                read.len()
            );
        }
        for request in [&good, &bad, &none] {
            guarded.connect()?.roundtrip(request)?;
        }
    }
    Ok(())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Row 16, at every size of the first body: the second head is judged wherever it begins.
#[test]
fn a_head_is_judged_wherever_it_begins() -> Result<()> {
    let _deadline = Deadline::new("head offsets", LIMIT);
    let guarded = Guarded::start("offsets")?;
    let token = guarded.token()?;
    let bad = guarded.call(Some("not-a-token")).build();
    let mut connection = guarded.connect()?;
    let mut passed = Vec::new();
    for length in (0..64).chain([4000, 5000, 70_000]) {
        let body = [bad.as_slice(), &[b'.'; 70_000]].concat();
        let body = body.get(..length).unwrap_or_default();
        let good = RequestBuilder::new("POST", "/mcp")
            .header("Host", &guarded.host())
            .bearer(&token)
            .body(body)
            .build();
        assert_eq!(connection.roundtrip(&good)?.status, 200, "{length}");
        assert_eq!(connection.roundtrip(&bad)?.status, 401, "{length}");
        passed.extend_from_slice(&good);
    }
    let record = guarded.recorder.wait_for_bytes(connection.local_addr()?, passed.len() as u64, TIMEOUT)?;
    assert_eq!(record.kept, passed);
    Ok(())
}
