//! The recorder reads what the raw client sends, byte for byte, in process and out of process.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use enforcer_tests::guard::{Cgroup, Deadline, NetNs};
use enforcer_tests::raw::{Connection, RequestBuilder, Segmentation};
use enforcer_tests::recorder::{Answer, Config, ReadMode, Recorder, RemoteRecorder, pattern};
use ring::digest::{SHA256, digest};

const LIMIT: Duration = Duration::from_secs(30);
const NO_PAUSE: Duration = Duration::ZERO;

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_segmentation_arrives_as_the_same_bytes() -> Result<()> {
    let _deadline = Deadline::new("segmentation", LIMIT);
    let recorder = Recorder::start(loopback(), Config::default())?;
    let plain = RequestBuilder::mcp_call("host", "/mcp", Some("a.b.c"), "echo").build();
    let chunked =
        RequestBuilder::new("POST", "/mcp?x=1").header("Host", "h").chunked_body(b"hello, chunks", 5).build();
    let mut client = Connection::open(recorder.addr(), LIMIT)?;
    let mut sent = Vec::new();
    let cuts = [
        Segmentation::Whole,
        Segmentation::Every(1),
        Segmentation::Every(7),
        Segmentation::At(vec![1, 17, plain.len() - 1]),
    ];
    for cut in &cuts {
        for request in [&plain, &chunked] {
            client.send_segmented(request, cut, NO_PAUSE)?;
            let response = client.read_response()?;
            assert_eq!((response.status, response.json()?["id"].as_u64()), (200, Some(1)), "{cut:?}");
            sent.extend_from_slice(request);
        }
    }
    client.finish_sending()?;
    client.expect_closed()?;
    let peer = client.local_addr()?;
    let record = recorder.wait_for_bytes(peer, sent.len() as u64, LIMIT)?;
    assert_eq!((&record.kept, &record.sha256), (&sent, &sha256(&sent)));
    assert_eq!(record.requests.len(), 2 * cuts.len());
    let last = record.requests.last().expect("a request");
    assert_eq!((last.method.as_str(), last.target.as_str(), last.body_bytes), ("POST", "/mcp?x=1", 13));
    assert_eq!(last.body_sha256, sha256(b"hello, chunks"));
    Ok(())
}

#[test]
fn big_bodies_pass_both_ways() -> Result<()> {
    let _deadline = Deadline::new("big bodies", LIMIT);
    let size = 64 << 20;
    let config = Config { answer: Answer::Big { bytes: size }, keep_bytes: 100, ..Config::default() };
    let recorder = Recorder::start(loopback(), config)?;
    let body = pattern(size);
    let request = RequestBuilder::new("POST", "/").header("Host", "h").body(&body).build();
    let mut client = Connection::open(recorder.addr(), LIMIT)?;
    let response = client.roundtrip(&request)?;
    assert!(response.body == body, "the answer differs");
    let record = recorder.wait_for_bytes(client.local_addr()?, request.len() as u64, LIMIT)?;
    assert_eq!((record.bytes_read, record.sha256), (request.len() as u64, sha256(&request)));
    assert_eq!(record.kept, request[..100]);
    assert_eq!(record.requests[0].body_sha256, sha256(&body));
    Ok(())
}

#[test]
fn a_hundred_and_fifty_connections_are_kept_apart() -> Result<()> {
    let _deadline = Deadline::new("parallel", LIMIT);
    let recorder = Recorder::start(loopback(), Config { answer_delay_ms: 20, ..Config::default() })?;
    let mut clients = Vec::new();
    for number in 0..150 {
        let mut client = Connection::open(recorder.addr(), LIMIT)?;
        let request = RequestBuilder::new("GET", &format!("/{number}")).header("Host", "h").build();
        client.send(&request)?;
        clients.push((client, request));
    }
    for (client, request) in &mut clients {
        assert_eq!(client.read_response()?.status, 200);
        let record = recorder.connection(client.local_addr()?).expect("recorded");
        assert_eq!(&record.kept, request);
    }
    assert_eq!(recorder.connections().len(), 150);
    drop(clients);
    enforcer_tests::guard::wait_until("all ends", LIMIT, || {
        recorder.forget_closed();
        recorder.connections().is_empty().then_some(())
    })
}

#[test]
fn answers_are_as_configured() -> Result<()> {
    let _deadline = Deadline::new("answers", LIMIT);
    let recorder = Recorder::start(loopback(), Config::default())?;
    let request = RequestBuilder::new("GET", "/mcp").header("Host", "h").build();
    let mut client = Connection::open(recorder.addr(), LIMIT)?;
    let set = |answer: Answer| recorder.set_config(Config { answer, ..Config::default() });

    set(Answer::Sse { events: 3, event_bytes: 5, interval_ms: 1 });
    let response = client.roundtrip(&request)?;
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    assert_eq!(
        String::from_utf8(response.body)?,
        "id: 0\ndata: xxxxx\n\nid: 1\ndata: xxxxx\n\nid: 2\ndata: xxxxx\n\n"
    );
    set(Answer::Status { code: 404 });
    assert_eq!(client.roundtrip(&request)?.status, 404);
    // Reads in pieces: 100 bytes in 10 reads of at least 5 ms.
    recorder.set_config(Config { read: ReadMode::Slow { bytes: 10, pause_ms: 5 }, ..Config::default() });
    let start = Instant::now();
    let slow = RequestBuilder::new("POST", "/").body(&[b'x'; 100]).build();
    assert_eq!(client.roundtrip(&slow)?.status, 200);
    assert!(start.elapsed() >= Duration::from_millis(50));
    set(Answer::Close);
    client.send(&request)?;
    client.expect_closed()?;

    // A client that vanishes in the middle is recorded as such.
    let mut gone = Connection::open(recorder.addr(), LIMIT)?;
    let peer = gone.local_addr()?;
    gone.send(b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")?;
    recorder.wait_for_bytes(peer, 41, LIMIT)?;
    gone.reset()?;
    let record = enforcer_tests::guard::wait_until("the end", LIMIT, || {
        recorder.connection(peer).filter(|record| record.closed)
    })?;
    assert!(record.requests.is_empty() && record.error.is_some(), "{record:?}");
    Ok(())
}

#[test]
fn a_recorder_of_its_own_process_serves_from_a_cgroup_and_a_namespace() -> Result<()> {
    let _deadline = Deadline::new("remote recorder", LIMIT);
    let (cgroup, ns) = (Cgroup::new("recorder")?, NetNs::new("recorder")?);
    let mut remote = RemoteRecorder::spawn(loopback(), &Config::default(), Some(&cgroup), Some(&ns))?;
    assert_eq!(cgroup.pids()?, [remote.process().pid()]);
    let request = RequestBuilder::mcp_call("host", "/mcp", None, "add").build();
    let addr = remote.addr();
    let mut client = ns.run(|| Connection::open(addr, LIMIT))??;
    assert_eq!(client.roundtrip(&request)?.status, 200);
    let record = remote.wait_for_bytes(client.local_addr()?, request.len() as u64, LIMIT)?;
    assert_eq!(record.kept, request);
    remote.set_config(&Config { answer: Answer::Status { code: 418 }, ..Config::default() })?;
    assert_eq!(client.roundtrip(&request)?.status, 418);
    assert_eq!(remote.connections()?.len(), 1);
    remote.process().kill()?;
    assert!(remote.connections().is_err());
    client.expect_closed()
}
