//! Tables, descriptors, memory and patience run out: what is refused is refused, and the good client still gets through.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, wait_until};
use enforcer_tests::raw::Connection;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;

use crate::common::{LIMIT, TIMEOUT, refused_unread, status, unknown};
use crate::maps::PinnedMap;
use crate::torture::resident_kib;

/// More than any table has room for.
const ANY_TABLE: u32 = 1 << 20;

/// Sets a limit of another process, hard and soft.
fn limit(pid: u32, resource: libc::__rlimit_resource_t, value: u64) -> Result<()> {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the limit lives through the call; the old one is not asked for.
    let set = unsafe {
        libc::prlimit(libc::pid_t::try_from(pid)?, resource, &raw const limit, std::ptr::null_mut())
    };
    ensure!(set == 0, "prlimit: {}", std::io::Error::last_os_error());
    Ok(())
}

#[test]
fn a_connection_for_which_there_is_no_record_gets_nothing() -> Result<()> {
    let _deadline = Deadline::new("flows full", LIMIT);
    let guarded = Guarded::start("flowsfull")?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    ensure!(status(&guarded, &good)? == 200, "a good token");
    let read = guarded.bytes_read()?;
    let flows = PinnedMap::open(&guarded.enforcement.pins().join("FLOWS"))?;
    let keys = flows.fill(ANY_TABLE)?;
    ensure!(keys.len() > 60_000, "it was full with {}", keys.len());
    for request in [&good, &guarded.call(None).build()] {
        let mut client = guarded.connect()?;
        // Reset by then, maybe.
        drop(client.send(request));
        ensure!(client.read_response().is_err(), "it was answered");
    }
    ensure!(guarded.enforcement.counter("flow-table-full")? >= 2, "not counted");
    ensure!(guarded.bytes_read()? == read, "the server read of it");
    for key in &keys {
        flows.delete(key)?;
    }
    ensure!(status(&guarded, &guarded.call(None).build())? == 401, "afterwards");
    ensure!(status(&guarded, &good)? == 200, "a good token afterwards");
    Ok(())
}

/// Where nothing is refused, nothing is refused for want of a record either.
#[test]
fn in_observe_mode_a_full_table_stops_nobody() -> Result<()> {
    let _deadline = Deadline::new("observed, full", LIMIT);
    let guarded = Guarded::builder("obsfull").observing().start()?;
    let flows = PinnedMap::open(&guarded.enforcement.pins().join("FLOWS"))?;
    flows.fill(ANY_TABLE)?;
    for request in [guarded.call(Some(&guarded.token()?)).build(), guarded.call(None).build()] {
        let mut client = guarded.connect()?;
        for _ in 0..2 {
            ensure!(client.roundtrip(&request)?.status == 200, "it was stopped");
        }
    }
    ensure!(guarded.enforcement.counter("flow-table-full")? >= 2, "there was room");
    Ok(())
}

/// A full table forgets the least recently used verdicts, also that of a request whose body is on its way; here all of them.
#[test]
fn a_verdict_that_is_forgotten_in_the_middle_of_a_request_changes_nothing() -> Result<()> {
    let _deadline = Deadline::new("evicted", LIMIT);
    let guarded = Guarded::start("evicted")?;
    let token = guarded.token()?;
    let request = guarded.call(Some(&token)).header("X-Padding", &"p".repeat(500)).build();
    let bad = guarded.call(Some("not-a-token")).build();
    let mut client = guarded.connect()?;
    ensure!(client.roundtrip(&request)?.status == 200, "a good token");
    let verdicts = PinnedMap::open(&guarded.enforcement.pins().join("VERDICTS"))?;
    let mut expected = request.clone();
    for round in 0..3 {
        let known = guarded.enforcement.counter("punt-unknown")?;
        // A known head and the first bytes of its body.
        client.send(&request[..request.len() - 10])?;
        ensure!(verdicts.clear()? > 0, "round {round}: there was none");
        client.send(&request[request.len() - 10..])?;
        ensure!(client.read_response()?.status == 200, "round {round}: the rest of the body");
        ensure!(status(&guarded, &bad)? == 401, "round {round}: a bad token");
        ensure!(client.roundtrip(&request)?.status == 200, "round {round}: judged again");
        ensure!(
            guarded.enforcement.counter("punt-unknown")? >= known + 2,
            "round {round}: nothing was forgotten"
        );
        expected.extend_from_slice(&request.repeat(2));
    }
    ensure!(guarded.read_by_server(client.local_addr()?)? == expected, "the server read something else");
    Ok(())
}

#[test]
fn a_daemon_without_descriptors_judges_on() -> Result<()> {
    let _deadline = Deadline::new("no descriptors", LIMIT);
    let mut guarded = Guarded::start("nofiles")?;
    let token = guarded.token()?;
    let known = guarded.call(Some(&token)).build();
    ensure!(status(&guarded, &known)? == 200, "a good token");
    let mut read = known.len() as u64;
    // Those that are open stay; there will be no other.
    limit(guarded.enforcement.daemon()?.pid(), libc::RLIMIT_NOFILE, 3)?;
    for number in 0..5 {
        ensure!(status(&guarded, &unknown(&guarded, "not-a-token", number))? == 401, "a bad token");
        let good = unknown(&guarded, &token, number);
        ensure!(status(&guarded, &good)? == 200, "a good token");
        ensure!(status(&guarded, &known)? == 200, "a known head");
        read += (good.len() + known.len()) as u64;
        // What must be destroyed can't be; it gets nothing all the same.
        let mut tls = guarded.connect()?;
        tls.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")?;
        drop(tls.send(&known));
    }
    thread::sleep(Duration::from_millis(300));
    ensure!(guarded.bytes_read()? == read, "the server read {} bytes of {read}", guarded.bytes_read()?);
    ensure!(guarded.enforcement.daemon()?.try_wait()?.is_none(), "the daemon ended");
    Ok(())
}

#[test]
fn a_daemon_without_memory_lets_nothing_unverified_through() -> Result<()> {
    let _deadline = Deadline::new("no memory", LIMIT);
    let mut guarded = Guarded::start("nomemory")?;
    let known = guarded.call(Some(&guarded.token()?)).build();
    ensure!(status(&guarded, &known)? == 200, "a good token");
    let mut read = known.len() as u64;
    limit(guarded.enforcement.daemon()?.pid(), libc::RLIMIT_AS, 1 << 20)?;
    // Tokens of a key that must be fetched first: their bodies wait in the daemon's memory.
    let token = guarded.mint().kid("nobody-has-it").sign()?;
    let body = vec![b'x'; 900_000];
    let request = enforcer_tests::raw::RequestBuilder::new("POST", "/mcp")
        .header("Host", &guarded.host())
        .bearer(&token)
        .body(&body)
        .build();
    // All at once, until one allocation fails: stopped, the daemon can't be done with one before the next comes. It looks for such a key
    // once a second.
    let addr = guarded.addr();
    let daemon = guarded.enforcement.daemon()?;
    for _ in 0..10 {
        daemon.signal(Signal::SIGSTOP)?;
        thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| -> Result<()> {
                    let mut client = Connection::open(addr, Duration::from_secs(3))?;
                    client.send(&request)?;
                    drop(client.read_response());
                    Ok(())
                });
            }
            thread::sleep(Duration::from_millis(500));
            daemon.signal(Signal::SIGCONT)
        })?;
        if daemon.try_wait()?.is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(1_100));
    }
    let ended = daemon.wait(TIMEOUT).context("it had memory enough")?;
    ensure!(!ended.success(), "it ended well");
    ensure!(guarded.enforcement.log()?.contains("memory allocation"), "{}", guarded.enforcement.log()?);
    for number in 0..3 {
        ensure!(status(&guarded, &known)? == 200, "a known head");
        read += known.len() as u64;
        let mut client = Connection::open(guarded.addr(), Duration::from_millis(300))?;
        let answer = client.roundtrip(&unknown(&guarded, "not-a-token", number));
        ensure!(answer.is_err() || answer?.status == 503, "an unknown head was answered");
    }
    ensure!(guarded.bytes_read()? == read, "the server read {} bytes of {read}", guarded.bytes_read()?);
    Ok(())
}

#[test]
fn heads_over_every_limit_are_refused() -> Result<()> {
    let _deadline = Deadline::new("long heads", LIMIT);
    let guarded = Guarded::start("longheads")?;
    let token = guarded.token()?;
    let base = || guarded.call(Some(&token));
    let tiny =
        |count: usize| (0..count).fold(base(), |request, number| request.header(&format!("A{number}"), "b"));
    let mut endless = base().head();
    endless.truncate(endless.len() - 2);
    endless.extend(std::iter::repeat_n(b"X: y\r\n", 100_000).flatten());
    for (what, request) in [
        ("10,000 headers", tiny(10_000).build()),
        ("101 headers", tiny(101).build()),
        ("a long value", base().header("X-Long", &"v".repeat(20_000)).build()),
        ("a long name", base().header(&"N".repeat(20_000), "v").build()),
        (
            "a long target",
            enforcer_tests::raw::RequestBuilder::new("POST", &format!("/mcp?{}", "q".repeat(20_000)))
                .header("Host", &guarded.host())
                .bearer(&token)
                .build(),
        ),
        ("a long token", guarded.call(Some(&"t".repeat(100_000))).build()),
        ("a head that never ends", endless),
    ] {
        for _ in 0..2 {
            let mut client = guarded.connect()?;
            // The answer comes before the end.
            drop(client.send(&request));
            match client.read_response() {
                Ok(response) => {
                    ensure!(matches!(response.status, 400 | 414 | 431), "{what}: {}", response.status);
                }
                // A reset that came before the answer was read.
                Err(error) => ensure!(format!("{error:#}").contains("reset"), "{what}: {error:#}"),
            }
        }
    }
    refused_unread(&guarded, "")
}

/// Idle connections, heads and bodies that stand still, refused requests without end: the good client still gets through, and the
/// daemon does not grow.
#[test]
fn in_a_flood_the_good_client_gets_through() -> Result<()> {
    let _deadline = Deadline::new("flood", LIMIT);
    // Three ends per connection at most, in three processes.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 4096, 4096);
    let mut guarded = Guarded::builder("flooded").nonblocking().start()?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    ensure!(status(&guarded, &good)? == 200, "a good token");
    let pid = guarded.enforcement.daemon()?.pid();
    let before_kib = resident_kib(pid)?;
    let mut standing = Vec::new();
    for number in 0..150 {
        let mut client = guarded.connect()?;
        match number % 3 {
            0 => {}
            1 => client.send(&unknown(&guarded, &token, number)[..60])?,
            // A known head whose body never comes.
            _ => client.send(&good[..good.len() - 5])?,
        }
        standing.push(client);
    }
    let stop = AtomicBool::new(false);
    let (served, refused) = thread::scope(|scope| -> Result<(u32, u32)> {
        let floods: Vec<_> = (0..3)
            .map(|number| {
                let (guarded, stop) = (&guarded, &stop);
                scope.spawn(move || flood(guarded, number, stop))
            })
            .collect();
        let good = (|| {
            for number in 0..10 {
                ensure!(status(&guarded, &good)? == 200, "a known head, {number}");
                ensure!(
                    status(&guarded, &unknown(&guarded, &token, 1000 + number))? == 200,
                    "a new head, {number}"
                );
            }
            Ok(10)
        })();
        stop.store(true, Ordering::Release);
        let mut refused = 0;
        for flood in floods {
            refused += flood.join().map_err(|_| anyhow!("a flood panicked"))??;
        }
        Ok((good?, refused))
    })?;
    ensure!(served == 10 && refused > 50, "{served} served, {refused} refused");
    let after_kib = resident_kib(pid)?;
    ensure!(after_kib < before_kib + (64 << 10), "the daemon grew from {before_kib} to {after_kib} KiB");
    for record in guarded.recorder.connections()? {
        ensure!(!String::from_utf8_lossy(&record.kept).contains("not-a-token"), "a refused request was read");
    }
    drop(standing);
    wait_until("the records are gone", TIMEOUT, || {
        let flows = guarded.enforcement.cli_json(&["flows"]).ok()?;
        flows.get("flows")?.as_array()?.is_empty().then_some(())
    })
}

/// Different bad tokens, and one that is known as bad, until it is told to stop; gives how many were refused.
fn flood(guarded: &Guarded, number: usize, stop: &AtomicBool) -> Result<u32> {
    let mut refused = 0;
    while !stop.load(Ordering::Acquire) {
        let mut client = guarded.connect()?;
        for round in 0..50 {
            let token = if round % 2 == 0 {
                "not-a-token".to_owned()
            } else {
                format!("not-a-token-{number}-{refused}")
            };
            let status = client.roundtrip(&guarded.call(Some(&token)).build())?.status;
            ensure!(status == 401, "{status}");
            refused += 1;
        }
    }
    Ok(refused)
}

/// While the daemon stands still nobody empties the ring buffer: the flow that finds it full is dead, and nothing passes.
#[test]
fn a_full_ring_buffer_ends_connections_and_lets_nothing_through() -> Result<()> {
    let _deadline = Deadline::new("ring full", LIMIT);
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 4096, 4096);
    let mut guarded = Guarded::start("ringfull")?;
    let good = guarded.call(Some(&guarded.token()?)).build();
    ensure!(status(&guarded, &good)? == 200, "a good token");
    let mut read = good.len() as u64;
    guarded.enforcement.daemon()?.signal(Signal::SIGSTOP)?;
    let body = vec![b'x'; 100_000];
    let mut clients = Vec::new();
    for number in 0..400 {
        let request = enforcer_tests::raw::RequestBuilder::new("POST", "/mcp")
            .header("Host", &guarded.host())
            .bearer(&format!("not-a-token-{number}"))
            .body(&body)
            .build();
        let mut client = guarded.connect()?;
        client.stream().set_nonblocking(true)?;
        // What the kernel takes at once.
        drop(client.send(&request));
        clients.push(client);
    }
    let full = guarded.enforcement.counter("dead-ring-full")?;
    // A known head needs no daemon.
    ensure!(status(&guarded, &good)? == 200, "a known head");
    read += good.len() as u64;
    guarded.enforcement.daemon()?.signal(Signal::SIGCONT)?;
    ensure!(full > 0, "the buffer was not full: {:?}", guarded.enforcement.counters()?);
    // A client that only closes would go on repeating what the dead connection does not take.
    for client in clients {
        client.reset()?;
    }
    wait_until("the daemon has caught up", TIMEOUT, || {
        // One that still finds the buffer full is never answered.
        let mut client = Connection::open(guarded.addr(), Duration::from_millis(500)).ok()?;
        let answer = client.roundtrip(&guarded.call(None).build()).ok()?;
        (answer.status == 401).then_some(())
    })?;
    ensure!(guarded.bytes_read()? == read, "the server read {} bytes of {read}", guarded.bytes_read()?);
    wait_until("the records are gone", TIMEOUT, || {
        let flows = guarded.enforcement.cli_json(&["flows"]).ok()?;
        flows.get("flows")?.as_array()?.is_empty().then_some(())
    })
}
