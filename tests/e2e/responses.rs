//! Responses come back whole, slow peers hold each other back, and vanished ones leave nothing behind.

#[allow(dead_code, reason = "each test program uses its part")]
mod torture;

use std::io::{ErrorKind, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use enforcer_tests::raw::{Connection, Segmentation};
use enforcer_tests::recorder::{Answer, Config, pattern};
use nix::sys::socket::{setsockopt, sockopt};
use torture::{PATIENCE, Random, Scene, Sockets, config, get, post, slow};

const LIMIT: Duration = Duration::from_secs(240);
const HUGE: u64 = 64 << 20;

fn answering(answer: Answer) -> Config {
    Config { answer, ..config() }
}

fn events(count: u64, bytes: usize) -> Vec<u8> {
    let data = "x".repeat(bytes);
    (0..count).flat_map(|event| format!("id: {event}\ndata: {data}\n\n").into_bytes()).collect()
}

#[test]
fn event_streams_of_any_length_come_back_whole() -> Result<()> {
    let mut scene = Scene::new("sse", LIMIT)?;
    let known = get(&scene.token()?).build();
    let mut client = scene.client()?;
    for (count, bytes, interval_ms) in [
        (1, 10, 0),
        (2, 0, 5),
        (10, 100_000, 0),
        (100, 1_000, 1),
        (1_000, 50, 0),
        (1_000, 3_000, 0),
        (3, 20, 1_500),
    ] {
        scene.server.set_config(&answering(Answer::Sse {
            events: count,
            event_bytes: bytes,
            interval_ms,
        }))?;
        for request in
            [get(&scene.token()?).build(), known.clone(), post(&scene.token()?).body(b"{}").build()]
        {
            let response =
                client.good(&request).with_context(|| format!("{count} events of {bytes} bytes"))?;
            ensure!(
                response.body == events(count, bytes),
                "{count} events of {bytes} bytes came back changed"
            );
            client.refused(&get(&scene.bad_token()?).build(), 401).context("a refusal behind the stream")?;
        }
    }
    client.finish(&scene)?;
    scene.check_alive()
}

#[test]
fn a_long_response_reaches_a_slow_client_whole() -> Result<()> {
    let mut scene = Scene::new("long-response", LIMIT)?;
    let expected = pattern(HUGE);
    for (number, request) in
        [get(&scene.token()?).build(), post(&scene.token()?).body(b"{}").build()].iter().enumerate()
    {
        scene.server.set_config(&answering(Answer::Big { bytes: HUGE }))?;
        let mut client = scene.client()?;
        setsockopt(client.connection.stream(), sockopt::RcvBuf, &(64 << 10))?;
        client.expect_read(request);
        client.connection.send(request)?;
        let mut response = client.connection.read_head()?;
        ensure!(response.status == 200, "{}", response.status);
        let mut start = Vec::new();
        // All buffers between server and client fill up in the pauses.
        for _ in 0..30 {
            thread::sleep(Duration::from_millis(20));
            start.extend(client.connection.read_some(20_000)?);
        }
        ensure!(expected.starts_with(&start), "response {number}: the start came back changed");
        while start.len() < expected.len() {
            let more = client.connection.read_some(1 << 20)?;
            ensure!(!more.is_empty(), "response {number} ended after {} bytes", start.len());
            start.extend(more);
        }
        ensure!(start == expected, "response {number} came back changed");
        response.body.clear();
        client.refused(&get(&scene.bad_token()?).build(), 401).context("a refusal behind it")?;
        client.good(request).context("the same again, read fast")?;
        client.finish(&scene)?;
    }
    scene.check_alive()
}

#[test]
fn a_server_that_does_not_read_holds_the_client_back() -> Result<()> {
    for (name, known) in [("back-pressure-slow", false), ("back-pressure-fast", true)] {
        let mut scene = Scene::new(name, LIMIT)?;
        let body = Random::new(20).bytes(usize::try_from(4 * HUGE)?);
        let token = scene.token()?;
        if known {
            let mut client = scene.client()?;
            client.good(&post(&token).body(b"{}").build())?;
            client.finish(&scene)?;
        }
        let before_kib = scene.daemon_kib()?;
        scene.server.set_config(&slow(4096, 100))?;
        let request = post(&token).body(&body).build();
        let mut client = scene.client()?;
        client.expect_read(&request);
        let taken = write_until_stuck(&client.connection, &request)?;
        // What the two sockets may hold by the system's settings, as without us, and what may be on its way through the daemon.
        let bound = largest("tcp_rmem")? + largest("tcp_wmem")? + (16 << 20);
        println!("{name}: {taken} bytes were taken, {bound} are allowed");
        ensure!(taken < bound, "{name}: {taken} bytes were taken although the server does not read");
        let grown_kib = scene.daemon_kib()?.saturating_sub(before_kib);
        ensure!(grown_kib < 48 << 10, "{name}: the daemon grew by {grown_kib} KiB");
        // Others are served meanwhile, as fast as that server reads.
        let mut other = scene.client()?;
        other.good(&post(&scene.token()?).body(b"{}").build()).context("another client meanwhile")?;
        other.finish(&scene)?;
        scene.server.set_config(&config())?;
        client.connection.send(request.get(taken..).unwrap_or_default())?;
        let response = client.connection.read_response().with_context(|| name.to_owned())?;
        ensure!(response.status == 200, "{name}: {}", response.status);
        client.finish(&scene)?;
        scene.check_alive()?;
    }
    Ok(())
}

/// The largest buffer that the system lets a TCP socket have, in bytes (tcp(7)).
fn largest(which: &str) -> Result<usize> {
    let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{which}"))?;
    Ok(text.split_whitespace().last().context("no maximum")?.parse()?)
}

/// Writes without waiting until nothing was taken for a second; gives how much was.
fn write_until_stuck(connection: &Connection, bytes: &[u8]) -> Result<usize> {
    let mut stream = connection.stream();
    stream.set_nonblocking(true)?;
    let (mut taken, mut last) = (0, Instant::now());
    while last.elapsed() < Duration::from_secs(1) && taken < bytes.len() {
        match stream.write(bytes.get(taken..bytes.len().min(taken + (64 << 10))).unwrap_or_default()) {
            Ok(count) => {
                taken += count;
                last = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error).context(format!("after {taken} bytes")),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(taken)
}

#[test]
fn first_seen_bodies_for_a_server_that_does_not_read_stay_whole_or_are_refused() -> Result<()> {
    let mut scene = Scene::new("slow-crowd", LIMIT)?;
    scene.server.set_config(&slow(1024, 20))?;
    let before_kib = scene.daemon_kib()?;
    let mut random = Random::new(21);
    let mut clients = Vec::new();
    for _ in 0..24 {
        let request = post(&scene.token()?).body(&random.bytes(3 << 20)).build();
        let mut client = scene.client()?;
        client.expect_read(&request);
        let taken = write_until_stuck(&client.connection, request.get(..1 << 20).unwrap_or_default());
        clients.push((client, request, taken.unwrap_or(0)));
    }
    let grown_kib = scene.daemon_kib()?.saturating_sub(before_kib);
    ensure!(grown_kib < 128 << 10, "the daemon grew by {grown_kib} KiB");
    scene.server.set_config(&config())?;
    let mut whole = 0;
    for (mut client, request, taken) in clients {
        let sent = client.connection.send(request.get(taken..).unwrap_or_default());
        if sent.is_ok() && client.connection.read_response().is_ok_and(|response| response.status == 200) {
            client.finish(&scene)?;
            whole += 1;
        } else {
            let record = scene.closed_record(client.connection.local_addr()?)?;
            ensure!(
                request.starts_with(&record.kept),
                "a connection that was cut off read bytes nobody sent"
            );
            ensure!(record.requests.is_empty(), "a connection that was cut off read a whole request");
        }
    }
    ensure!(whole > 0, "not one of 24 slow requests came through");
    scene.check_alive()
}

#[test]
fn clients_that_vanish_anywhere_leave_nothing_behind() -> Result<()> {
    for (name, sockets) in [("vanish", Sockets::Blocking), ("vanish-nonblocking", Sockets::NonBlocking)] {
        let mut scene = Scene::new(name, LIMIT)?;
        scene.set_sockets(sockets);
        let mut random = Random::new(22);
        let known = scene.token()?;
        let mut warm = scene.client()?;
        warm.good(&post(&known).body(b"{}").build())?;
        warm.finish(&scene)?;
        for round in 0..60 {
            let token = if round % 2 == 0 { known.clone() } else { scene.token()? };
            let token = if round % 5 == 0 { scene.bad_token()? } else { token };
            let request = post(&token).body(&random.bytes(100_000)).build();
            let keep = match round % 3 {
                0 => 1 + random.below(400),
                1 => 600 + random.below(90_000),
                _ => request.len(),
            };
            if keep == request.len() {
                scene.server.set_config(&answering(Answer::Big { bytes: 8 << 20 }))?;
            }
            let mut client = scene.client()?;
            let part = request.get(..keep).unwrap_or_default();
            client.connection.send_segmented(part, &random.segmentation(keep, 4), Duration::ZERO)?;
            if keep == request.len() && round % 4 == 0 {
                drop(client.connection.read_some(1000));
            }
            match random.below(3) {
                0 => client.connection.reset()?,
                1 => drop(client),
                _ => {
                    // Half closed first, then gone.
                    client.connection.finish_sending()?;
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        scene.server.set_config(&config())?;
        // Nothing but parts of requests was sent with good tokens, and nothing else was read.
        scene.check_alive()?;
    }
    Ok(())
}

/// A known head passes before the end of the stream behind it. One that is not known yet comes to the server after it, because the
/// kernel tells the server of the end at once (docs/limits.md): such a client gets an empty close, or its answer.
#[test]
fn a_client_that_only_stops_sending_gets_its_answer_on_a_known_head() -> Result<()> {
    let mut scene = Scene::new("half-close", LIMIT)?;
    let known = scene.token()?;
    let request = post(&known).body(&vec![b'h'; 50_000]).build();
    scene.server.set_config(&Config { answer_delay_ms: 20, ..answering(Answer::Big { bytes: 3 << 20 }) })?;
    let mut first = scene.client()?;
    first.expect_read(&request);
    first.connection.send(&request)?;
    first.connection.read_response()?;
    first.finish(&scene)?;
    for round in 0..3 {
        let mut client = scene.client()?;
        client.expect_read(&request);
        client.connection.send(&request)?;
        client.connection.finish_sending()?;
        let response = client.connection.read_response().with_context(|| format!("round {round}"))?;
        ensure!(response.body == pattern(3 << 20), "round {round}: the answer came back changed");
        client.finish(&scene)?;

        let mut client = scene.client()?;
        client.connection.send(&post(&scene.bad_token()?).body(b"{}").build())?;
        client.connection.finish_sending()?;
        if let Ok(response) = client.connection.read_response() {
            ensure!(response.status == 401, "refused, round {round}: {}", response.status);
        }
        client.finish(&scene)?;
    }
    scene.check_alive()
}

#[test]
fn a_server_that_vanishes_ends_its_connections() -> Result<()> {
    let mut scene = Scene::new("server-vanishes", LIMIT)?;
    let known = scene.token()?;
    let mut clients = Vec::new();
    for number in 0..12 {
        let token = if number % 2 == 0 { known.clone() } else { scene.token()? };
        let mut client = scene.client()?;
        client.good(&post(&token).body(b"{}").build())?;
        clients.push((client, token));
    }
    scene.server.set_config(&Config { answer_delay_ms: 10_000, ..slow(100, 50) })?;
    for (number, (client, token)) in clients.iter_mut().enumerate() {
        let token = if number % 3 == 0 { scene.token()? } else { token.clone() };
        let request = post(&token).body(&vec![b'v'; 20_000]).build();
        let keep = if number % 4 == 0 { 300 } else { request.len() };
        client.connection.send(request.get(..keep).unwrap_or_default())?;
    }
    scene.server.process().kill()?;
    for (client, _) in &mut clients {
        client.connection.expect_closed()?;
    }
    torture::wait_for_no_flows(&scene.enforcement)?;
    let ended = scene.enforcement.daemon()?.try_wait()?;
    ensure!(ended.is_none(), "the daemon ended with its server: {ended:?}");
    ensure!(Connection::open(scene.addr(), PATIENCE).is_err(), "somebody else listens");
    Ok(())
}

#[test]
fn a_server_that_closes_without_an_answer_ends_the_connection() -> Result<()> {
    let mut scene = Scene::new("closing-server", LIMIT)?;
    scene.server.set_config(&answering(Answer::Close))?;
    for round in 0..20 {
        let request = post(&scene.token()?).body(b"{}").build();
        let mut client = scene.client()?;
        client.expect_read(&request);
        client.connection.send_segmented(&request, &Segmentation::Every(200), Duration::ZERO)?;
        client.finish_cut_off(&scene).with_context(|| format!("round {round}"))?;
    }
    // The answers of other statuses come back as they are.
    for code in [204, 304, 400, 401, 500, 503] {
        scene.server.set_config(&answering(Answer::Status { code }))?;
        let request = post(&scene.token()?).body(b"{}").build();
        let mut client = scene.client()?;
        client.expect_read(&request);
        client.connection.send(&request)?;
        let head = client.connection.read_head()?;
        ensure!(
            head.status == code && head.header("www-authenticate").is_none(),
            "{code} became {}",
            head.status
        );
    }
    scene.check_alive()
}
