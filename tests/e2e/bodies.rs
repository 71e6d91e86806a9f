//! Bodies of every size and framing reach the server byte for byte, or not at all.

#[allow(dead_code, reason = "each test program uses its part")]
mod torture;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::raw::{RequestBuilder, Segmentation};
use torture::{Random, Scene, Sockets, post};

const LIMIT: Duration = Duration::from_secs(300);
const SIZES: [usize; 11] =
    [0, 1, 2, 4095, 4096, 4097, (16 << 10) - 1, 16 << 10, (16 << 10) + 1, 64 << 10, 1 << 20];
const HUGE: usize = 64 << 20;

#[test]
fn bodies_with_content_length_arrive_whole_on_the_slow_and_on_the_fast_path() -> Result<()> {
    let mut scene = Scene::new("bodies", LIMIT)?;
    let mut random = Random::new(10);
    let known = scene.token()?;
    let mut client = scene.client()?;
    client.good(&post(&known).body(b"").build())?;
    for size in SIZES {
        let body = random.bytes(size);
        for round in 0..3 {
            let first_seen = post(&scene.token()?).body(&body);
            let cut = if round == 0 { Segmentation::Whole } else { random.segmentation(size + 500, 5) };
            client
                .good_cut(&first_seen.build(), &cut, Duration::ZERO)
                .with_context(|| format!("first seen, {size}"))?;
            let again = post(&known).body(&body).build();
            client.good_cut(&again, &cut, Duration::ZERO).with_context(|| format!("known, {size}"))?;
            // As the first request of a connection.
            let mut fresh = scene.client()?;
            fresh
                .good(&post(&scene.token()?).body(&body).build())
                .with_context(|| format!("fresh, {size}"))?;
            fresh.good(&again)?;
            fresh.finish(&scene)?;
        }
        client.verify(&scene)?;
    }
    client.finish(&scene)?;
    scene.check_alive()
}

#[test]
fn bodies_of_64_mib_arrive_whole_on_the_slow_and_on_the_fast_path() -> Result<()> {
    let mut scene = Scene::new("huge", LIMIT)?;
    let body = Random::new(11).bytes(HUGE);
    let request = post(&scene.token()?).body(&body).build();
    let mut client = scene.client()?;
    client.good(&request).context("first seen")?;
    client.good(&request).context("known")?;
    let request = post(&scene.token()?).body(&body).build();
    client
        .good_cut(&request, &Segmentation::Every(100_003), Duration::ZERO)
        .context("first seen, in pieces")?;
    client.finish(&scene)?;
    scene.check_alive()
}

#[test]
fn behind_a_first_seen_body_of_any_length_the_next_request_is_judged() -> Result<()> {
    let mut scene = Scene::new("behind-body", LIMIT)?;
    let mut random = Random::new(17);
    let body = random.bytes(2 << 20);
    for round in 0..150 {
        // The hand-back falls somewhere into these bodies: whoever is wrong about their end lets the next head pass as body.
        let length = if round % 3 == 0 { random.below(2 << 20) } else { 16_000 + random.below(400_000) };
        let body = body.get(..length).unwrap_or_default();
        let mut client = scene.client()?;
        client
            .good(&post(&scene.token()?).body(body).build())
            .with_context(|| format!("round {round}, {length}"))?;
        let bad = post(&scene.bad_token()?).body(b"{\"unjudged\":true}").build();
        client.refused(&bad, 401).with_context(|| format!("behind {length} bytes, round {round}"))?;
        let wire = chunked(body, &[30_000, 5]);
        client
            .good(&chunked_request(&scene.token()?, &wire).build())
            .with_context(|| format!("chunked, round {round}"))?;
        client.refused(&bad, 401).with_context(|| format!("behind {length} chunked bytes, round {round}"))?;
        client.finish(&scene)?;
    }
    scene.check_alive()
}

/// A body in chunks of these sizes, taken in turn, as it goes over the wire.
fn chunked(body: &[u8], sizes: &[usize]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(body.len() + body.len() / sizes[0].max(1) * 8 + 16);
    let (mut at, mut turn) = (0, 0);
    while at < body.len() {
        let size = sizes[turn % sizes.len()].min(body.len() - at);
        wire.extend_from_slice(format!("{size:x}\r\n").as_bytes());
        wire.extend_from_slice(&body[at..at + size]);
        wire.extend_from_slice(b"\r\n");
        at += size;
        turn += 1;
    }
    wire.extend_from_slice(b"0\r\n\r\n");
    wire
}

fn chunked_request(token: &str, wire: &[u8]) -> RequestBuilder {
    post(token).header("Transfer-Encoding", "chunked").bare_body(wire)
}

#[test]
fn chunked_bodies_arrive_whole_whatever_the_chunks_and_segments() -> Result<()> {
    let mut scene = Scene::new("chunked", LIMIT)?;
    let mut random = Random::new(12);
    let known = scene.token()?;
    let chunk_sizes: [&[usize]; 6] = [&[1], &[7], &[1000], &[16_384], &[65_536], &[1, 4_000, 13, 70_000, 2]];
    for sizes in chunk_sizes {
        let mut client = scene.client()?;
        for size in SIZES {
            // A chunk of one byte takes six on the wire; a MiB of them adds nothing but time.
            if size > 64 << 10 && sizes[0] < 100 && sizes.len() == 1 {
                continue;
            }
            let wire = chunked(&random.bytes(size), sizes);
            for token in [&known, &scene.token()?] {
                let request = chunked_request(token, &wire);
                let head = request.head().len();
                let request = request.build();
                let cuts = [
                    Segmentation::Whole,
                    Segmentation::At(vec![head]),
                    Segmentation::At(vec![head + 1, head + 2, head + 3]),
                    Segmentation::At(vec![head, request.len() - 5]),
                    Segmentation::At(vec![head, request.len() - 1]),
                    random.segmentation(request.len(), 20),
                ];
                for cut in cuts {
                    client
                        .good_cut(&request, &cut, Duration::ZERO)
                        .with_context(|| format!("{size} bytes in chunks of {sizes:?}, {cut:?}"))?;
                }
            }
            client.verify(&scene)?;
        }
        client.finish(&scene)?;
    }
    scene.check_alive()
}

#[test]
fn chunked_bodies_in_one_byte_segments_arrive_whole() -> Result<()> {
    let mut scene = Scene::new("chunked-one-byte", LIMIT)?;
    let body = Random::new(13).bytes(2_000);
    let mut client = scene.client()?;
    for sizes in [&[1_usize][..], &[7], &[1000], &[65_536]] {
        let request = chunked_request(&scene.token()?, &chunked(&body, sizes)).build();
        for _ in 0..2 {
            client
                .good_cut(&request, &Segmentation::Every(1), Duration::ZERO)
                .with_context(|| format!("{sizes:?}"))?;
            client
                .good_cut(&request, &Segmentation::Every(3), Duration::ZERO)
                .with_context(|| format!("{sizes:?}"))?;
        }
    }
    client.finish(&scene)?;
    scene.check_alive()
}

#[test]
fn chunked_bodies_of_64_mib_arrive_whole() -> Result<()> {
    let mut scene = Scene::new("chunked-huge", LIMIT)?;
    let body = Random::new(14).bytes(HUGE);
    let mut client = scene.client()?;
    for sizes in [&[1000_usize][..], &[16_384], &[65_536], &[1, 300_000, 77]] {
        let request = chunked_request(&scene.token()?, &chunked(&body, sizes)).build();
        client.good(&request).with_context(|| format!("{sizes:?}"))?;
        client.verify(&scene)?;
    }
    client.finish(&scene)?;
    scene.check_alive()
}

#[test]
fn after_a_break_in_the_chunked_framing_nothing_reaches_the_server() -> Result<()> {
    let mut scene = Scene::new("chunked-broken", LIMIT)?;
    // What follows the marker must not be read by the server; what precedes it may or may not.
    let breaks: [(&str, &[u8]); 16] = [
        ("no hexadecimal size", b"5\r\nhello\r\nzz\r\n"),
        ("a negative size", b"5\r\nhello\r\n-1\r\n"),
        ("a size with a plus sign", b"5\r\nhello\r\n+1\r\n"),
        ("a size with 0x", b"5\r\nhello\r\n0x1\r\n"),
        ("a size of 17 digits", b"5\r\nhello\r\n10000000000000000\r\n"),
        ("a size with a space before it", b"5\r\nhello\r\n 1\r\n"),
        ("a size with a space behind it", b"5\r\nhello\r\n1 \r\n"),
        ("a size that ends in LF", b"5\r\nhello\r\n1\nx\r\n"),
        ("a size that ends in CR", b"5\r\nhello\r\n1\rx\r\n"),
        ("an empty size", b"5\r\nhello\r\n\r\n"),
        ("data that is too long", b"5\r\nhello!\r\n"),
        ("data that is too short", b"5\r\nhell\r\n0\r\n\r\n"),
        ("data that ends in LF", b"5\r\nhello\n0\r\n\r\n"),
        ("data without an end", b"5\r\nhello0\r\n\r\n"),
        ("a request in place of the last CRLF", b"0\r\nGET /mcp HTTP/1.1\r\n\r\n"),
        ("a last line that ends in LF", b"0\r\n\n"),
    ];
    let secret = b"MARKER-behind-the-break\r\n0\r\n\r\n";
    for (what, wire) in breaks {
        for (late, pause) in [(false, Duration::ZERO), (true, Duration::from_millis(20))] {
            let head = chunked_request(&scene.token()?, b"").build();
            let request = [head.as_slice(), wire].concat();
            let mut client = scene.client()?;
            let peer = client.connection.local_addr()?;
            let cut = if late { Segmentation::At(vec![head.len()]) } else { Segmentation::Whole };
            // A connection that was cut off already refuses the write, which is as good.
            let sent = client.connection.send_segmented(&request, &cut, pause);
            std::thread::sleep(Duration::from_millis(20));
            if sent.is_ok() {
                drop(client.connection.send(secret));
            }
            ended_without_an_answer(&mut client).with_context(|| format!("{what}, late: {late}"))?;
            let record = scene.closed_record(peer)?;
            let sent = [request.as_slice(), secret].concat();
            ensure!(sent.starts_with(&record.kept), "{what}: the server read bytes that were not sent");
            let marker = record.kept.windows(6).any(|bytes| bytes == b"MARKER");
            ensure!(!marker, "{what}, late: {late}: the server read what followed the break");
            ensure!(record.requests.is_empty(), "{what}: the server took it for a whole request");
        }
        scene.server.forget_closed()?;
    }
    scene.check_alive()
}

/// The connection ends, with or without a refusal on it, but without the server's answer.
fn ended_without_an_answer(client: &mut torture::Client) -> Result<()> {
    match client.connection.read_response() {
        Ok(response) => {
            ensure!(response.status >= 400, "it was answered with {}", response.status);
            client.connection.expect_closed()
        }
        Err(error) => {
            let timed_out = error.downcast_ref::<std::io::Error>().is_some_and(|error| {
                matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
            });
            ensure!(!timed_out, "the connection stays open");
            Ok(())
        }
    }
}

#[test]
fn a_refused_request_with_a_long_body_leaves_the_connection_usable() -> Result<()> {
    for (name, sockets) in
        [("refused-body", Sockets::Blocking), ("refused-body-kernel", Sockets::NonBlocking)]
    {
        let mut scene = Scene::new(name, LIMIT)?;
        scene.set_sockets(sockets);
        let mut random = Random::new(15);
        let known_bad = scene.bad_token()?;
        let mut client = scene.client()?;
        for size in SIZES.into_iter().chain([4 << 20, HUGE]) {
            let body = random.bytes(size);
            for token in [&scene.bad_token()?, &known_bad] {
                for cut in [Segmentation::Whole, random.segmentation(size + 500, 8)] {
                    let request = post(token).body(&body).build();
                    refuse_whole(&mut client, &request, &cut)
                        .with_context(|| format!("{size} bytes, {cut:?}"))?;
                    client
                        .good(&post(&scene.token()?).body(&random.bytes(100)).build())
                        .with_context(|| format!("a good request behind {size} refused bytes, {cut:?}"))?;
                }
            }
            let nothing = RequestBuilder::new("POST", "/mcp").header("Host", "mcp.test").body(&body).build();
            refuse_whole(&mut client, &nothing, &Segmentation::Whole)
                .with_context(|| format!("no token, {size}"))?;
            client.verify(&scene)?;
        }
        client.finish(&scene)?;
        scene.check_alive()?;
    }
    Ok(())
}

/// Sends all of it, however early the answer comes, and reads the answer.
fn refuse_whole(client: &mut torture::Client, request: &[u8], cut: &Segmentation) -> Result<()> {
    client.connection.send_segmented(request, cut, Duration::ZERO).context("sending")?;
    let response = client.connection.read_response()?;
    ensure!(response.status == 401, "{}", response.status);
    Ok(())
}

#[test]
fn a_refusal_comes_before_the_body_and_the_next_request_after_it_is_judged() -> Result<()> {
    for (name, sockets) in [("early", Sockets::Blocking), ("early-kernel", Sockets::NonBlocking)] {
        let mut scene = Scene::new(name, LIMIT)?;
        scene.set_sockets(sockets);
        let mut client = scene.client()?;
        for round in 0..50 {
            let body = vec![b'x'; 1 + round * 37];
            let request = post(&scene.bad_token()?).body(&body);
            for _ in 0..2 {
                client.refused(&request.head(), 401).with_context(|| format!("round {round}"))?;
                client.connection.send(&body)?;
            }
            client
                .good(&post(&scene.token()?).body(b"{}").build())
                .with_context(|| format!("round {round}"))?;
        }
        client.finish(&scene)?;
        scene.check_alive()?;
    }
    Ok(())
}

#[test]
fn a_refused_chunked_request_never_reaches_the_server() -> Result<()> {
    let mut scene = Scene::new("refused-chunked", LIMIT)?;
    let mut random = Random::new(16);
    for size in [0, 1, 5_000, 70_000, 1 << 20, 4 << 20] {
        for cut_count in [0, 6] {
            let good = post(&scene.token()?).body(b"{}").build();
            let mut client = scene.client()?;
            client.good(&good)?;
            let wire = chunked(&random.bytes(size), &[1000]);
            let request = chunked_request(&scene.bad_token()?, &wire).build();
            let cut = random.segmentation(request.len(), cut_count);
            let sent = client.connection.send_segmented(&request, &cut, Duration::ZERO);
            match client.connection.read_response() {
                Ok(response) => ensure!(response.status == 401, "{size} bytes: {}", response.status),
                // Closed while we were still writing: the reset may overtake the answer.
                Err(error) => ensure!(sent.is_err() || size > 16 << 10, "{size} bytes: {error:#}"),
            }
            // Closed or usable: either way, a request behind it is judged on its own.
            if client.connection.send(&good).is_ok() && client.connection.read_response().is_ok() {
                client.expect_read(&good);
                client.finish(&scene)?;
            } else {
                client.finish_cut_off(&scene)?;
            }
        }
    }
    scene.check_alive()
}
