//! Many clients at once, pipelined requests, and everything killed at random.

#[allow(dead_code, reason = "each test program uses its part")]
mod torture;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use enforcer_tests::raw::Connection;
use enforcer_tests::recorder::{Answer, Config, RemoteRecorder};
use torture::{Client, PATIENCE, Random, Scene, Sockets, config, get, post};

const LIMIT: Duration = Duration::from_secs(240);
const PARALLEL: usize = 100;

#[test]
fn a_hundred_connections_at_once_are_each_judged_on_their_own() -> Result<()> {
    for (name, sockets) in [("parallel", Sockets::Blocking), ("parallel-nonblocking", Sockets::NonBlocking)] {
        let mut scene = Scene::new(name, LIMIT)?;
        scene.set_sockets(sockets);
        let known: Vec<String> = (0..10).map(|_| scene.token()).collect::<Result<_>>()?;
        let known_bad = scene.bad_token()?;
        let clients: Vec<Client> = (0..PARALLEL).map(|_| scene.client()).collect::<Result<_>>()?;
        let scene = &mut scene;
        let shared = &*scene;
        let outcomes: Vec<Result<()>> = thread::scope(|scope| {
            let running: Vec<_> = clients
                .into_iter()
                .enumerate()
                .map(|(number, client)| {
                    let (known, known_bad) = (&known, &known_bad);
                    scope.spawn(move || {
                        one_of_many(client, number, shared, known, known_bad)
                            .with_context(|| format!("{name}, client {number}"))
                    })
                })
                .collect();
            running.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("panicked"))?).collect()
        });
        outcomes.into_iter().collect::<Result<()>>()?;
        scene.check_alive()?;
    }
    Ok(())
}

fn one_of_many(
    mut client: Client,
    number: usize,
    scene: &Scene,
    known: &[String],
    known_bad: &str,
) -> Result<()> {
    let mut random = Random::new(0x1000 + number as u64);
    for round in 0..12 {
        let length = if random.below(10) == 0 { random.below(300_000) } else { random.below(3_000) };
        let good = random.below(3) != 0;
        let token = match (good, random.below(3) == 0) {
            (true, true) => scene.token()?,
            (true, false) => random.pick(known).clone(),
            (false, true) => scene.bad_token()?,
            (false, false) => known_bad.to_owned(),
        };
        let request = post(&token).body(&random.bytes(length)).build();
        let cut = random.segmentation(request.len(), 10);
        let pause = Duration::from_millis(if random.below(4) == 0 { 3 } else { 0 });
        if good {
            client
                .good_cut(&request, &cut, pause)
                .with_context(|| format!("good, round {round}, {cut:?}"))?;
        } else {
            client
                .connection
                .send_segmented(&request, &cut, pause)
                .with_context(|| format!("round {round}"))?;
            let response = client
                .connection
                .read_response()
                .with_context(|| format!("refused, round {round}, {cut:?}"))?;
            ensure!(response.status == 401, "round {round}: {}", response.status);
        }
    }
    client.finish(scene)
}

/// Sends two requests without waiting in between, and checks that whatever comes back is the answers in order, or a prefix
/// of them and the end, and that the server read what it was to read of them, in order, and nothing else.
fn two_at_once(
    scene: &mut Scene,
    first: (&[u8], bool),
    second: (&[u8], bool),
    pause: Option<Duration>,
) -> Result<()> {
    let mut client = scene.client()?;
    let peer = client.connection.local_addr()?;
    match pause {
        None => client.connection.send(&[first.0, second.0].concat())?,
        Some(pause) => {
            client.connection.send(first.0)?;
            thread::sleep(pause);
            // Cut off already: as good.
            drop(client.connection.send(second.0));
        }
    }
    let mut statuses = Vec::new();
    for _ in 0..2 {
        match client.connection.read_response() {
            Ok(response) => {
                let expected: &[u8] = if response.status == 200 {
                    br#"{"jsonrpc":"2.0","id":1,"result":{"content":[]}}"#
                } else {
                    b""
                };
                ensure!(
                    response.body.starts_with(expected),
                    "mixed: {:?}",
                    String::from_utf8_lossy(&response.raw)
                );
                statuses.push(response.status);
            }
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(
                    text.contains("after \"\"") || text.contains("reset"),
                    "not between two answers: {text}"
                );
                break;
            }
        }
    }
    let expected = [first.1, second.1].map(|good| if good { 200 } else { 401 });
    ensure!(expected.starts_with(&statuses), "answers {statuses:?} to {expected:?}");
    drop(client);
    let record = scene.closed_record(peer)?;
    let mut allowed = Vec::new();
    for (request, good) in [first, second] {
        if good {
            allowed.extend_from_slice(request);
        }
    }
    let allowed = allowed.get(..4096.min(allowed.len())).unwrap_or_default();
    ensure!(allowed.starts_with(&record.kept), "the server read {:?}", String::from_utf8_lossy(&record.kept));
    Ok(())
}

#[test]
fn pipelined_requests_are_never_mixed_and_never_pass_unjudged() -> Result<()> {
    for (name, sockets) in [("pipelined", Sockets::Blocking), ("pipelined-nonblocking", Sockets::NonBlocking)]
    {
        let mut scene = Scene::new(name, LIMIT)?;
        scene.set_sockets(sockets);
        let known = post(&scene.token()?).body(b"{\"id\":1}").build();
        let known_bad = post(&scene.bad_token()?).body(b"{\"id\":2}").build();
        let mut warm = scene.client()?;
        warm.good(&known)?;
        warm.refused(&known_bad, 401)?;
        warm.finish(&scene)?;
        for delay_ms in [0, 150] {
            scene.server.set_config(&Config { answer_delay_ms: delay_ms, ..config() })?;
            for pause_ms in [None, Some(0), Some(2), Some(40)] {
                let pause = pause_ms.map(Duration::from_millis);
                for combination in 0..16 {
                    let side = |good: bool, fresh: bool| -> Result<(Vec<u8>, bool)> {
                        let request = match (good, fresh) {
                            (true, true) => post(&scene.token()?).body(b"{\"id\":3}").build(),
                            (true, false) => known.clone(),
                            (false, true) => post(&scene.bad_token()?).body(b"{\"id\":4}").build(),
                            (false, false) => known_bad.clone(),
                        };
                        Ok((request, good))
                    };
                    let first = side(combination & 1 != 0, combination & 2 != 0)?;
                    let second = side(combination & 4 != 0, combination & 8 != 0)?;
                    two_at_once(&mut scene, (&first.0, first.1), (&second.0, second.1), pause).with_context(|| {
                        format!("{name}: combination {combination:04b}, pause {pause:?}, answer after {delay_ms} ms")
                    })?;
                }
            }
        }
        scene.check_alive()?;
    }
    Ok(())
}

/// A client that sends a request while the answer to its last one is still running may find the refusal inside that answer: the
/// enforcer does not read what servers write (docs/limits.md). What must hold all the same: the server sees nothing of the
/// refused request, and no other connection is touched.
#[test]
fn a_refusal_during_a_running_answer_concerns_its_own_connection_alone() -> Result<()> {
    for (name, sockets) in
        [("mid-stream", Sockets::Blocking), ("mid-stream-nonblocking", Sockets::NonBlocking)]
    {
        let mut scene = Scene::new(name, LIMIT)?;
        scene.set_sockets(sockets);
        let known_bad = post(&scene.bad_token()?).body(b"{}").build();
        let mut warm = scene.client()?;
        warm.refused(&known_bad, 401)?;
        warm.finish(&scene)?;
        for fresh in [false, true] {
            let answer = Answer::Sse { events: 20, event_bytes: 30, interval_ms: 30 };
            scene.server.set_config(&Config { answer, ..config() })?;
            let token = scene.token()?;
            let (mut client, mut neighbour) = (scene.client()?, scene.client()?);
            for client in [&mut client, &mut neighbour] {
                let request = get(&token).build();
                client.expect_read(&request);
                client.connection.send(&request)?;
            }
            let mut responses = [client.connection.read_head()?, neighbour.connection.read_head()?];
            thread::sleep(Duration::from_millis(100));
            let bad = if fresh { post(&scene.bad_token()?).body(b"{}").build() } else { known_bad.clone() };
            drop(client.connection.send(&bad));
            neighbour.connection.read_body(&mut responses[1]).context("the neighbour's stream")?;
            ensure!(
                !String::from_utf8_lossy(&responses[1].raw).contains("401"),
                "{name}: the neighbour got it"
            );
            neighbour.finish(&scene)?;
            drop(client.connection.read_body(&mut responses[0]));
            client.finish(&scene)?;
        }
        scene.check_alive()?;
    }
    Ok(())
}

#[test]
fn whatever_is_killed_whenever_nothing_is_left_behind() -> Result<()> {
    let mut scene = Scene::new("chaos", LIMIT)?;
    let addr = scene.addr();
    let end = Instant::now() + Duration::from_secs(10);
    let stop = AtomicBool::new(false);
    let mut random = Random::new(0xc4a05);
    let tokens: Vec<String> = (0..20).map(|_| scene.token()).collect::<Result<_>>()?;
    let bad: Vec<String> = (0..20).map(|_| scene.bad_token()).collect::<Result<_>>()?;
    let mut restarts = 0;
    let answered: u64 = thread::scope(|scope| -> Result<u64> {
        let running: Vec<_> = (0..12)
            .map(|number| {
                let (stop, tokens, bad) = (&stop, &tokens, &bad);
                scope.spawn(move || random_client(addr, number, stop, tokens, bad))
            })
            .collect();
        let killed = (|| -> Result<()> {
            while Instant::now() < end {
                thread::sleep(Duration::from_millis(300 + random.below(1_200) as u64));
                scene.server.process().kill()?;
                restarts += 1;
                scene.server = restart(&scene, addr)?;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Release);
        let answered = running
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err(anyhow!("a client panicked"))))
            .sum();
        killed.and(answered)
    })?;
    ensure!(restarts > 3 && answered > 50, "{restarts} restarts, {answered} answers");
    scene.check_alive()?;
    // Nobody is connected any more, so the daemon has nothing to wait for.
    let status = scene.enforcement.stop()?;
    ensure!(status.success(), "the daemon ended with {status}");
    let left = scene.enforcement.leftover_pins();
    ensure!(left.is_empty(), "still pinned: {left:?}");
    Ok(())
}

/// The server again, at the same place; its port may be busy for a moment.
fn restart(scene: &Scene, addr: SocketAddr) -> Result<RemoteRecorder> {
    let answer = Answer::Big { bytes: 200_000 };
    enforcer_tests::guard::wait_until("the server again", PATIENCE, || {
        RemoteRecorder::spawn(
            addr,
            &Config { answer: answer.clone(), ..config() },
            Some(scene.enforcement.cgroup()),
            None,
        )
        .ok()
    })
}

/// Calls, breaks off, resets, waits; gives how many answers came. Any end of a connection is fine, a wrong answer is not.
fn random_client(
    addr: SocketAddr,
    number: u64,
    stop: &AtomicBool,
    tokens: &[String],
    bad: &[String],
) -> Result<u64> {
    let mut random = Random::new(0xabc + number);
    let mut answered = 0;
    while !stop.load(Ordering::Acquire) {
        let Ok(mut connection) = Connection::open(addr, Duration::from_secs(2)) else {
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        for _ in 0..1 + random.below(8) {
            let good = random.below(4) != 0;
            let token = if good { random.pick(tokens) } else { random.pick(bad) };
            let request = post(token).body(&random.bytes(random.clone().below(40_000))).build();
            let keep = if random.below(6) == 0 { random.below(request.len()) } else { request.len() };
            let cut = random.segmentation(keep, 5);
            let part = request.get(..keep).unwrap_or_default();
            if connection.send_segmented(part, &cut, Duration::ZERO).is_err() || keep < request.len() {
                break;
            }
            let Ok(response) = connection.read_response() else { break };
            let expected = if good { 200 } else { 401 };
            ensure!(response.status == expected, "{} in place of {expected}", response.status);
            answered += 1;
        }
        if random.below(2) == 0 {
            drop(connection.reset());
        }
    }
    Ok(answered)
}
