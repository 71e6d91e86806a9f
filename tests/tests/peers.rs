//! Servers of other makers answer alike, and the benchmark's own keeps up.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use enforcer_tests::guard::{Deadline, Proc, bin_path};
use enforcer_tests::load::{LoadConfig, Stop, run, typical_request};
use enforcer_tests::peers::{Peer, PeerError, PeerKind, listening_addr};
use enforcer_tests::raw::{Connection, RequestBuilder, Segmentation};
use ring::digest::{SHA256, digest};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn peers_echo_and_stream_alike() -> Result<()> {
    let _deadline = Deadline::new("peers", 2 * LIMIT);
    for kind in PeerKind::ALL {
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let mut peer = match Peer::start(kind, listen.parse()?, None, None) {
                Err(PeerError::NoInterpreter { program, reason }) => {
                    println!("skipped {kind:?}: {program}: {reason}");
                    continue;
                }
                outcome => outcome?,
            };
            let mut client = Connection::open(peer.addr(), LIMIT)?;
            let big = vec![b'z'; 3 << 20];
            for body in [b"".as_slice(), b"{}", &big] {
                let plain = RequestBuilder::new("POST", "/mcp?a=1").header("Host", "h").body(body).build();
                let chunked = RequestBuilder::new("POST", "/mcp?a=1")
                    .header("Host", "h")
                    .chunked_body(body, 70_000)
                    .build();
                for request in [plain, chunked] {
                    client.send(&request)?;
                    let answer = client.read_response()?.json()?;
                    let expected = json!({ "method": "POST", "path": "/mcp?a=1", "len": body.len(), "sha256": sha256(body) });
                    assert_eq!(answer, expected, "{kind:?}");
                }
            }
            let get = RequestBuilder::new("GET", "/x").header("Host", "h").build();
            client.send_segmented(&get, &Segmentation::Every(1), Duration::ZERO)?;
            assert_eq!(client.read_response()?.json()?["method"], "GET");
            let sse = RequestBuilder::new("GET", "/sse?events=200&bytes=1000").header("Host", "h").build();
            let stream = client.roundtrip(&sse)?;
            assert_eq!(stream.header("content-type"), Some("text/event-stream"));
            let data = "x".repeat(1000);
            let expected: String = (0..200).map(|number| format!("id: {number}\ndata: {data}\n\n")).collect();
            assert!(stream.body == expected.as_bytes(), "{kind:?}");
            assert!(peer.process().try_wait()?.is_none());
        }
    }
    Ok(())
}

fn bench_server() -> Result<(Proc, SocketAddr)> {
    let mut command = Command::new(bin_path("enforcer-upstream")?);
    command.args(["bench", "--listen", "127.0.0.1:0"]);
    let mut process = Proc::spawn("enforcer-upstream bench", command)?;
    let addr = listening_addr(&mut process, LIMIT)?;
    Ok((process, addr))
}

#[test]
fn the_bench_server_answers_any_segmentation_pipelines_and_blobs() -> Result<()> {
    let _deadline = Deadline::new("bench server", LIMIT);
    let (_process, addr) = bench_server()?;
    let mut client = Connection::open(addr, LIMIT)?;
    let request = typical_request("h", "/mcp", Some("token"));
    for cut in [Segmentation::Whole, Segmentation::Every(1), Segmentation::At(vec![request.len() - 3])] {
        client.send_segmented(&request, &cut, Duration::ZERO)?;
        assert_eq!(client.read_response()?.json()?["result"]["content"][0]["text"], "ok");
    }
    let big = RequestBuilder::new("POST", "/mcp").body(&vec![b'y'; 5 << 20]).build();
    assert_eq!(client.roundtrip(&big)?.status, 200);
    client.send(&request.repeat(50))?;
    for _ in 0..50 {
        assert_eq!(client.read_response()?.status, 200);
    }
    for size in [0, 1, 1 << 20, 64 << 20] {
        let blob = RequestBuilder::new("GET", &format!("/blob?size={size}")).build();
        assert_eq!(client.roundtrip(&blob)?.body.len(), size);
    }
    assert_eq!(client.roundtrip(&request)?.status, 200);
    Ok(())
}

#[test]
fn the_load_generator_counts_what_it_sent() -> Result<()> {
    let _deadline = Deadline::new("load", LIMIT);
    let (process, addr) = bench_server()?;
    let requests: Vec<Vec<u8>> =
        (0..3).map(|number| typical_request("h", "/mcp", Some(&format!("token-{number}")))).collect();
    for (connections, threads) in [(1, 1), (16, 2)] {
        let mut config = LoadConfig::new(addr, connections, requests.clone(), Stop::Requests(5_000));
        config.threads = threads;
        config.watched_pids = vec![process.pid()];
        let report = run(&config)?;
        assert_eq!(report.status_counts.get(&200), Some(&report.requests), "{report:?}");
        assert_eq!((report.requests, report.errors, report.reconnects), (5_000, 0, 0), "{report:?}");
        assert!(report.latency.p50_us > 0.0 && report.latency.p50_us <= report.latency.p99_us, "{report:?}");
        assert!(report.cpu.watched_us > 0.0 && report.cpu_us_per_request > 0.0, "{report:?}");
    }
    let timed = run(&LoadConfig::new(addr, 4, requests, Stop::After(Duration::from_millis(200))))?;
    assert!(timed.requests > 0 && timed.elapsed_s >= 0.2, "{timed:?}");
    Ok(())
}

#[test]
fn the_load_generator_reports_refusals_stalls_and_dead_servers() -> Result<()> {
    use enforcer_tests::recorder::{Answer, Config, Recorder};
    let _deadline = Deadline::new("load failures", LIMIT);
    let config = |answer: Answer| Config { answer, ..Config::default() };
    let recorder =
        Recorder::start(SocketAddr::from(([127, 0, 0, 1], 0)), config(Answer::Status { code: 401 }))?;
    let request = vec![typical_request("h", "/mcp", None)];
    let mut load = LoadConfig::new(recorder.addr(), 4, request, Stop::Requests(100));
    let report = run(&load)?;
    assert_eq!(report.status_counts.get(&401), Some(&100));
    recorder.set_config(config(Answer::Close));
    assert!(run(&load).is_err(), "a server that only closes");
    recorder.set_config(Config { answer_delay_ms: 5_000, ..Config::default() });
    load.stall_limit = Duration::from_millis(200);
    let error = run(&load).unwrap_err();
    assert!(format!("{error:#}").contains("no answer for 200ms"), "{error:#}");
    Ok(())
}
