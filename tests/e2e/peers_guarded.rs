//! Real servers behind the enforcer: Python's `http.server` (which blocks in its reads), Node's `http`, and axum.

#[allow(dead_code, reason = "each test program uses its part")]
mod torture;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::skip;
use enforcer_tests::guard::{Cgroup, Deadline};
use enforcer_tests::peers::{Peer, PeerError, PeerKind};
use enforcer_tests::raw::{Connection, RequestBuilder, Segmentation};
use ring::digest::{SHA256, digest};
use serde_json::json;
use torture::{PATIENCE, Random, bad_token, enforce, good_token, post, wait_for_no_flows};

const LIMIT: Duration = Duration::from_secs(180);
const KEEP_ALIVE_REQUESTS: usize = 1_000;

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sends a POST that the server must answer with what it read of it.
fn call(
    connection: &mut Connection,
    request: &RequestBuilder,
    body: &[u8],
    cut: &Segmentation,
) -> Result<()> {
    connection.send_segmented(&request.build(), cut, Duration::ZERO)?;
    let response = connection.read_response()?;
    ensure!(response.status == 200, "{}: {}", response.status, String::from_utf8_lossy(&response.body));
    let expected = json!({ "method": "POST", "path": "/mcp", "len": body.len(), "sha256": sha256(body) });
    ensure!(response.json()? == expected, "the server read {}, not {expected}", response.json()?);
    Ok(())
}

fn refused(connection: &mut Connection, request: &[u8]) -> Result<()> {
    let response = connection.roundtrip(request)?;
    ensure!(response.status == 401, "{} in place of 401", response.status);
    ensure!(response.header("www-authenticate").is_some(), "no challenge");
    Ok(())
}

fn guarded_peer(kind: PeerKind, name: &str) -> Result<()> {
    let _deadline = Deadline::new(name, LIMIT);
    let cgroup = Cgroup::new(name)?;
    let mut peer = match Peer::start(kind, "127.0.0.1:0".parse()?, Some(&cgroup), None) {
        Err(PeerError::NoInterpreter { program, reason }) => {
            skip(name, &format!("{program}: {reason}"));
            return Ok(());
        }
        outcome => outcome?,
    };
    let (enforcement, issuer) = enforce(cgroup, &[peer.addr()])?;
    let mut random = Random::new(30);
    let open = || Connection::open(peer.addr(), PATIENCE);

    let mut connection = open()?;
    for size in [0, 1, 5_000, 100_000, 3 << 20] {
        let body = random.bytes(size);
        for token in [good_token(&issuer)?, good_token(&issuer)?] {
            let request = post(&token).body(&body);
            for round in 0..3 {
                let cut = random.segmentation(request.build().len(), round * 4);
                call(&mut connection, &request, &body, &cut)
                    .with_context(|| format!("{size} bytes, round {round}"))?;
            }
            let chunked = post(&token).chunked_body(&body, 7_000);
            call(&mut connection, &chunked, &body, &Segmentation::Whole)
                .with_context(|| format!("chunked, {size}"))?;
            let bad = post(&bad_token(&issuer)?).body(&random.bytes(300)).build();
            refused(&mut connection, &bad).with_context(|| format!("first seen, after {size} bytes"))?;
            refused(&mut connection, &bad).with_context(|| format!("known, after {size} bytes"))?;
        }
    }
    drop(connection);
    // The very first request of a connection is refused, the second passes.
    for _ in 0..20 {
        let mut connection = open()?;
        let bad = post(&bad_token(&issuer)?).body(b"{}").build();
        refused(&mut connection, &bad).context("on a new connection")?;
        refused(&mut connection, &bad).context("again on a new connection")?;
        call(&mut connection, &post(&good_token(&issuer)?).body(b"{}"), b"{}", &Segmentation::Whole)?;
    }
    // One known head, again and again, refusals in between.
    let token = good_token(&issuer)?;
    let bad = post(&bad_token(&issuer)?).body(b"{\"n\":1}").build();
    let mut connection = open()?;
    for number in 0..KEEP_ALIVE_REQUESTS {
        let body = format!("{{\"number\":{number}}}");
        call(&mut connection, &post(&token).body(body.as_bytes()), body.as_bytes(), &Segmentation::Whole)
            .with_context(|| format!("keep-alive request {number}"))?;
        if number % 100 == 50 {
            refused(&mut connection, &bad).with_context(|| format!("refusal behind request {number}"))?;
        }
    }
    let sse =
        RequestBuilder::new("GET", "/mcp/sse?events=200&bytes=500").header("Host", "mcp.test").bearer(&token);
    connection.send(&sse.build())?;
    ensure!(connection.read_response()?.status == 200, "GET");
    drop(connection);
    ensure!(peer.process().try_wait()?.is_none(), "the server ended: {}", peer.process().stderr());
    let trace = peer.process().stderr();
    ensure!(!trace.contains("Traceback") && !trace.contains("Error"), "the server complains: {trace}");
    wait_for_no_flows(&enforcement)
}

#[test]
fn python_http_server() -> Result<()> {
    guarded_peer(PeerKind::Python, "guarded-python")
}

#[test]
fn node_http() -> Result<()> {
    guarded_peer(PeerKind::Node, "guarded-node")
}

#[test]
fn axum() -> Result<()> {
    guarded_peer(PeerKind::Axum, "guarded-axum")
}
