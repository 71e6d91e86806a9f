//! However a request is cut into segments, the server reads exactly its bytes, or none of them.

#[allow(dead_code, reason = "each test program uses its part")]
mod torture;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use enforcer_tests::raw::Segmentation;
use torture::{Random, Scene, Sockets, get, post};

const LIMIT: Duration = Duration::from_secs(240);

/// Two connections per offset would do the same; every 16 offsets a new one covers the first request too.
const REQUESTS_PER_CONNECTION: usize = 16;

#[test]
fn heads_split_at_every_offset_reach_the_server_whole() -> Result<()> {
    let mut scene = Scene::new("split", LIMIT)?;
    let body = br#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#;
    let length = post(&scene.token()?).body(body).build().len();
    let mut client = scene.client()?;
    for at in 1..length {
        if at % REQUESTS_PER_CONNECTION == 0 {
            std::mem::replace(&mut client, scene.client()?)
                .finish(&scene)
                .with_context(|| format!("offset {at}"))?;
            scene.server.forget_closed()?;
        }
        let request = post(&scene.token()?).body(body).build();
        let cut = Segmentation::At(vec![at]);
        // Waiting between the parts makes sure that they arrive apart; not waiting lets the second race the daemon.
        let pause = Duration::from_millis(if at % 3 == 0 { 2 } else { 0 });
        client.good_cut(&request, &cut, pause).with_context(|| format!("first seen, offset {at}"))?;
        client.good_cut(&request, &cut, pause).with_context(|| format!("seen before, offset {at}"))?;
        client.good(&request).with_context(|| format!("known and whole, offset {at}"))?;
    }
    client.finish(&scene)?;
    scene.check_alive()
}

#[test]
fn refused_heads_split_at_every_offset_are_answered() -> Result<()> {
    let mut scene = Scene::new("split-refused", LIMIT)?;
    refused_heads_split(&mut scene)
}

#[test]
fn refused_heads_split_at_every_offset_are_answered_by_the_kernel_too() -> Result<()> {
    let mut scene = Scene::new("split-refused-kernel", LIMIT)?;
    scene.set_sockets(Sockets::NonBlocking);
    refused_heads_split(&mut scene)?;
    // How many of those the kernel refused depends on when the daemon handed each flow back. In quiet it must do all of them, for as
    // long as it remembers a bad token.
    let before = scene.enforcement.counter("refused")?;
    let mut client = scene.client()?;
    for _round in 0..50 {
        let request = post(&scene.bad_token()?).body(b"{\"id\":1}").build();
        for _again in 0..20 {
            client.refused(&request, 401)?;
        }
        if scene.enforcement.counter("refused")? > before + 10 {
            return client.finish(&scene);
        }
    }
    bail!("the kernel refused no known head by itself");
}

fn refused_heads_split(scene: &mut Scene) -> Result<()> {
    let good = post(&scene.token()?).body(b"{}").build();
    let length = post(&scene.bad_token()?).body(b"{\"id\":1}").build().len();
    let mut client = scene.client()?;
    client.good(&good)?;
    for at in 1..length {
        if at % REQUESTS_PER_CONNECTION == 0 {
            std::mem::replace(&mut client, scene.client()?).finish(scene)?;
            scene.server.forget_closed()?;
            client.good(&good)?;
        }
        let request = post(&scene.bad_token()?).body(b"{\"id\":1}").build();
        let cut = Segmentation::At(vec![at]);
        client.refused_cut(&request, &cut, 401).with_context(|| format!("first seen, offset {at}"))?;
        client.refused_cut(&request, &cut, 401).with_context(|| format!("seen before, offset {at}"))?;
        client.refused(&request, 401).with_context(|| format!("known and whole, offset {at}"))?;
        client
            .good_cut(&good, &cut, Duration::ZERO)
            .with_context(|| format!("a good one after it, offset {at}"))?;
    }
    client.finish(scene)?;
    scene.check_alive()
}

#[test]
fn requests_of_one_byte_segments_are_judged_like_any_other() -> Result<()> {
    let mut scene = Scene::new("one-byte", LIMIT)?;
    let bytewise = Segmentation::Every(1);
    let mut client = scene.client()?;
    for round in 0..10 {
        let request = post(&scene.token()?).body(b"{\"a\":\"one byte a segment\"}").build();
        client
            .good_cut(&request, &bytewise, Duration::ZERO)
            .with_context(|| format!("first seen, round {round}"))?;
        client
            .good_cut(&request, &bytewise, Duration::ZERO)
            .with_context(|| format!("again, round {round}"))?;
        client.good(&request)?;
        let bad = post(&scene.bad_token()?).body(b"{\"a\":\"one byte a segment\"}").build();
        client.refused_cut(&bad, &bytewise, 401).with_context(|| format!("refused, round {round}"))?;
        client.refused_cut(&bad, &bytewise, 401).with_context(|| format!("refused again, round {round}"))?;
        client
            .good_cut(&request, &bytewise, Duration::ZERO)
            .with_context(|| format!("after it, round {round}"))?;
    }
    // So slow that each byte is a segment of its own whatever the stack would join.
    let request = get(&scene.token()?).build();
    client.good_cut(&request, &bytewise, Duration::from_millis(2))?;
    client.good_cut(&request, &bytewise, Duration::from_millis(2))?;
    client.finish(&scene)?;
    scene.check_alive()
}

#[test]
fn a_body_that_follows_its_head_later_arrives_in_order() -> Result<()> {
    let mut scene = Scene::new("later-body", LIMIT)?;
    let mut random = Random::new(1);
    for pause_ms in [0, 1, 20] {
        for body_bytes in [1, 2, 100, 5_000, 70_000, 300_000] {
            let body = random.bytes(body_bytes);
            let builder = post(&scene.token()?).body(&body);
            let (head, request) = (builder.head().len(), builder.build());
            let cuts = [
                Segmentation::At(vec![head]),
                Segmentation::At(vec![head - 1]),
                Segmentation::At(vec![head - 2, head + 1]),
                Segmentation::At(vec![1, head, head + body_bytes / 2, head + body_bytes - 1]),
            ];
            let mut client = scene.client()?;
            for cut in &cuts {
                let pause = Duration::from_millis(pause_ms);
                client
                    .good_cut(&request, cut, pause)
                    .with_context(|| format!("{body_bytes} bytes, {pause_ms} ms, {cut:?}"))?;
                // First seen on an old connection.
                let other = post(&scene.token()?).body(&body).build();
                client.good_cut(&other, cut, pause)?;
            }
            client.finish(&scene)?;
        }
    }
    scene.check_alive()
}

#[test]
fn random_segments_of_a_long_keep_alive_connection_arrive_in_order() -> Result<()> {
    let mut scene = Scene::new("random-cuts", LIMIT)?;
    scene.set_sockets(Sockets::NonBlocking);
    let mut random = Random::new(2);
    let tokens: Vec<String> = (0..5).map(|_| scene.token()).collect::<Result<_>>()?;
    let mut client = scene.client()?;
    for number in 0..600 {
        let token = if number % 7 == 0 { scene.token()? } else { random.pick(&tokens).clone() };
        let length = if number % 50 == 0 { random.below(2 << 20) } else { random.below(20_000) };
        let request = post(&token).body(&random.bytes(length)).build();
        let cut = random.segmentation(request.len(), 12);
        client
            .good_cut(&request, &cut, Duration::ZERO)
            .with_context(|| format!("request {number}, {cut:?}"))?;
        if number % 5 == 0 {
            let bad = post(&scene.bad_token()?).body(&random.bytes(length)).build();
            let cut = random.segmentation(bad.len(), 12);
            client.refused_cut(&bad, &cut, 401).with_context(|| format!("refusal {number}, {cut:?}"))?;
        }
    }
    client.finish(&scene)?;
    scene.check_alive()
}
