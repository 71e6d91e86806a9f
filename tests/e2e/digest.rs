//! The kernel's digest and the daemon's are the same, for random heads of every length; and every byte counts that is not masked.

#[allow(dead_code, unused_imports, reason = "each test program uses its part")]
mod torture;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Counters, Guarded};
use enforcer_tests::guard::Deadline;
use enforcer_tests::raw::Connection;
use torture::Random;

const LIMIT: Duration = Duration::from_secs(240);
/// A head that is not masked can't be shorter: the request line and `Host`.
const SHORTEST: usize = 60;
const LONGEST: usize = 4096;
/// The recorder keeps 1 MiB of a connection.
const PER_CONNECTION: usize = 200;
const MASKED: [&str; 5] = ["User-Agent", "traceparent", "tracestate", "X-Request-Id", "baggage"];
const TOKEN_CHARACTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";

/// A head, with the places of its bytes that may be changed: masked ones, and others.
struct Head {
    bytes: Vec<u8>,
    masked: Vec<usize>,
    counted: Vec<usize>,
}

/// A random head of exactly this length.
fn head(host: &str, length: usize, random: &mut Random) -> Head {
    let mut made = Head {
        bytes: format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\n").into_bytes(),
        masked: Vec::new(),
        counted: Vec::new(),
    };
    let mut masks = 0;
    loop {
        let left = length - made.bytes.len() - 2;
        if left == 0 {
            break;
        }
        // A line is at least `x:` and its end; what would be left must hold another, or nothing.
        let mut line = if left < 12 { left } else { 8 + random.below((left - 8).min(300)) };
        if left - line < 8 {
            line = left;
        }
        let name =
            if line > 20 && masks < 6 && random.below(3) == 0 { Some(*random.pick(&MASKED)) } else { None };
        let masked = name.is_some_and(|name| line - name.len() - 3 <= 256);
        masks += usize::from(masked);
        match name {
            Some(name) => made.bytes.extend_from_slice(name.as_bytes()),
            None => made.bytes.push(b'x'),
        }
        made.bytes.push(b':');
        let value = line - name.map_or(1, str::len) - 3;
        for _ in 0..value {
            let places = if masked { &mut made.masked } else { &mut made.counted };
            places.push(made.bytes.len());
            made.bytes.push(*random.pick(TOKEN_CHARACTERS));
        }
        made.bytes.extend_from_slice(b"\r\n");
    }
    made.bytes.extend_from_slice(b"\r\n");
    assert_eq!(made.bytes.len(), length);
    made
}

/// Heads that the kernel did not know. One that comes before the flow is handed back joins those that the daemon has.
fn unknown_heads(counters: &Counters) -> u64 {
    counters.kernel("punt-unknown") + counters.kernel("punt-continued")
}

fn change(bytes: &mut [u8], at: usize, random: &mut Random) {
    let before = bytes[at];
    while bytes[at] == before {
        bytes[at] = *random.pick(TOKEN_CHARACTERS);
    }
}

/// Sends all requests; the server must read them as they are, and nothing else.
fn send_all(guarded: &Guarded, requests: &[Vec<u8>]) -> Result<()> {
    for some in requests.chunks(PER_CONNECTION) {
        let mut connection: Connection = guarded.connect()?;
        for request in some {
            let response = connection.roundtrip(request);
            let status = response.with_context(|| format!("at {} bytes", request.len()))?.status;
            ensure!(status == 200, "{status} at {} bytes", request.len());
        }
        let read = guarded.read_by_server(connection.local_addr()?)?;
        ensure!(read == some.concat(), "the server read something else");
    }
    Ok(())
}

#[test]
fn kernel_and_daemon_digest_random_heads_of_every_length_alike() -> Result<()> {
    let _deadline = Deadline::new("digest", LIMIT);
    let guarded = Guarded::builder("digest")
        .server("public_paths", vec!["/healthz"])
        .any_number_of_unknown()
        .start()?;
    let mut random = Random::new(0xd16e57);
    let step = if std::env::var_os("ENFORCER_TEST_QUICK").is_some() { 7 } else { 1 };
    let heads: Vec<Head> =
        (SHORTEST..=LONGEST).step_by(step).map(|length| head(&guarded.host(), length, &mut random)).collect();
    let count = heads.len() as u64;

    let first: Vec<Vec<u8>> = heads.iter().map(|head| head.bytes.clone()).collect();
    let before = guarded.enforcement.counters()?;
    send_all(&guarded, &first)?;
    let after = guarded.enforcement.counters()?;
    let unknown = unknown_heads(&after) - unknown_heads(&before);
    ensure!(unknown == count, "{unknown} of {count} were unknown the first time: {after:?}");

    // Again, with other bytes in all masked places: all known.
    let again: Vec<Vec<u8>> = heads
        .iter()
        .map(|head| {
            let mut bytes = head.bytes.clone();
            head.masked.iter().for_each(|at| change(&mut bytes, *at, &mut random));
            bytes
        })
        .collect();
    let before = after;
    send_all(&guarded, &again)?;
    let after = guarded.enforcement.counters()?;
    let known = after.kernel("allowed-public") - before.kernel("allowed-public");
    ensure!(known == count, "{known} of {count} were known the second time");
    ensure!(after.punts() == before.punts(), "heads went to the daemon twice");

    // With one other byte that counts: all unknown.
    let changed: Vec<Vec<u8>> = heads
        .iter()
        .filter(|head| !head.counted.is_empty())
        .map(|head| {
            let mut bytes = head.bytes.clone();
            change(&mut bytes, *random.pick(&head.counted), &mut random);
            bytes
        })
        .collect();
    let before = after;
    send_all(&guarded, &changed)?;
    let after = guarded.enforcement.counters()?;
    let unknown = unknown_heads(&after) - unknown_heads(&before);
    ensure!(unknown == changed.len() as u64, "{unknown} of {} were unknown", changed.len());
    Ok(())
}
