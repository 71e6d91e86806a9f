//! Sockets that come to their server by other ways, and other protocols on a protected port.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Enforcement, Guarded, IssuerSpec, PolicySpec, ServerSpec, skip};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, wait_until};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Config, Recorder, RemoteRecorder};
use serde_json::Value;

use crate::common::{LIMIT, TIMEOUT, status};
use crate::torture::sockets::{ListenerKind, connect_mptcp, datagrams_in, listener_in};
use crate::torture::{PATIENCE, bad_token, config, enforce, enforce_as, good_token, post};

fn ask(addr: SocketAddr) -> Result<u16> {
    let request = RequestBuilder::mcp_call(&addr.to_string(), "/mcp", None, "x").build();
    Ok(Connection::open(addr, PATIENCE)?.roundtrip(&request)?.status)
}

/// Connections that can't be guarded are left alone where nothing is refused.
#[test]
fn in_observe_mode_mptcp_goes_on() -> Result<()> {
    let _deadline = Deadline::new("observed mptcp", LIMIT);
    let netns = NetNs::new("obs-mptcp")?;
    let cgroup = Cgroup::new("obsmptcp")?;
    let kind = ListenerKind { mptcp: true, ..ListenerKind::default() };
    let Ok(listener) = listener_in(&cgroup, Some(&netns), (Ipv4Addr::LOCALHOST, 0).into(), kind) else {
        skip("in_observe_mode_mptcp_goes_on", "the kernel does not speak MPTCP");
        return Ok(());
    };
    let recorder = Recorder::on(listener, config())?;
    let (enforcement, issuer) = enforce_as(cgroup, &[recorder.addr()], PolicySpec::observing)?;
    let mut stream = netns.run(|| connect_mptcp(recorder.addr()))?.context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    for token in [good_token(&issuer)?, bad_token(&issuer)?, good_token(&issuer)?] {
        stream.write_all(&post(&token).body(b"{}").build())?;
        let mut answer = [0; 4096];
        let count = stream.read(&mut answer)?;
        ensure!(
            answer[..count].starts_with(b"HTTP/1.1 200"),
            "{:?}",
            String::from_utf8_lossy(&answer[..count])
        );
    }
    ensure!(enforcement.counter("socket-fenced")? >= 1, "it was not MPTCP");
    Ok(())
}

/// HTTP/3 would be a way around. Datagrams of a connected socket, as a resolver's, pass even on that port.
#[test]
fn datagrams_to_a_protected_port_do_not_arrive() -> Result<()> {
    let _deadline = Deadline::new("datagrams", LIMIT);
    let guarded = Guarded::start("datagrams")?;
    let cgroup = guarded.enforcement.cgroup();
    let server = datagrams_in(cgroup, guarded.addr())?;
    let elsewhere = datagrams_in(cgroup, (Ipv4Addr::LOCALHOST, 0).into())?;
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let arrives = |socket: &UdpSocket, patience: Duration| -> Result<bool> {
        socket.set_read_timeout(Some(patience))?;
        Ok(socket.recv(&mut [0; 64]).is_ok())
    };
    for _ in 0..3 {
        client.send_to(b"\xc0\0\0\0\x01 initial", server.local_addr()?)?;
        ensure!(!arrives(&server, Duration::from_millis(100))?, "a datagram to a protected port arrived");
    }
    client.send_to(b"hello", elsewhere.local_addr()?)?;
    ensure!(arrives(&elsewhere, TIMEOUT)?, "a datagram to another port is lost");
    server.connect(client.local_addr()?)?;
    client.send_to(b"an answer", server.local_addr()?)?;
    ensure!(arrives(&server, TIMEOUT)?, "an answer to a connected socket is lost");
    ensure!(guarded.enforcement.counter("gate-datagram")? >= 3, "not counted");
    ensure!(status(&guarded, &guarded.call(None).build())? == 401, "TCP on the same port");
    Ok(())
}

#[test]
fn a_server_that_is_moved_to_another_cgroup_stays_guarded() -> Result<()> {
    let _deadline = Deadline::new("moved", LIMIT);
    let mut guarded = Guarded::start("moved")?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let mut open = guarded.connect()?;
    ensure!(open.roundtrip(&good)?.status == 200, "a good token");
    let root = Cgroup::mount_point()?;
    std::fs::write(root.join("cgroup.procs"), guarded.recorder.process().pid().to_string())?;
    ensure!(guarded.enforcement.cgroup().pids()?.is_empty(), "it was not moved");
    // The open connection, and new ones of the old listener.
    ensure!(open.roundtrip(&guarded.call(None).build())?.status == 401, "the open connection");
    ensure!(open.roundtrip(&good)?.status == 200, "a good token afterwards");
    ensure!(status(&guarded, &guarded.call(None).build())? == 401, "a new connection");
    ensure!(status(&guarded, &good)? == 200, "a good token on a new connection");
    Ok(())
}

/// A socket keeps the cgroup that it was made in: a server that moves in with its listener is not guarded, and that is said.
#[test]
fn a_server_that_moves_in_with_its_listener_is_named() -> Result<()> {
    let _deadline = Deadline::new("moved in", LIMIT);
    let cgroup = Cgroup::new("movedin")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let mut server = RemoteRecorder::spawn(listen, &Config::default(), None, None)?;
    std::fs::write(cgroup.path().join("cgroup.procs"), server.process().pid().to_string())?;
    let (enforcement, _issuer) = enforce(cgroup, &[server.addr()])?;
    let status = enforcement.cli_json(&["status"])?;
    let gap = status.pointer("/loaded/unguarded/listeners/0/gap").and_then(Value::as_str);
    ensure!(gap == Some("outside-cgroup"), "{status}");
    ensure!(enforcement.log()?.contains("NOT GUARDED"), "{}", enforcement.log()?);
    ensure!(ask(server.addr())? == 200, "it is guarded after all: the documentation is wrong");
    Ok(())
}

/// A server that starts after the enforcer is guarded from its first connection, also on a port that was another's before.
#[test]
fn a_port_that_changes_hands_is_guarded_from_the_first_connection() -> Result<()> {
    let _deadline = Deadline::new("changes hands", LIMIT);
    let cgroup = Cgroup::new("hands")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let mut stranger = RemoteRecorder::spawn(listen, &Config::default(), None, None)?;
    let addr = stranger.addr();
    let (enforcement, issuer) = enforce(cgroup, &[addr])?;
    ensure!(ask(addr)? == 200, "a server of another cgroup");
    let mut cookies = std::collections::BTreeSet::new();
    for round in 0..3 {
        stranger.process().kill()?;
        let mut server = wait_until("the guarded server", TIMEOUT, || {
            RemoteRecorder::spawn(addr, &Config::default(), Some(enforcement.cgroup()), None).ok()
        })?;
        ensure!(ask(addr)? == 401, "the first connection, round {round}");
        let mut open = Connection::open(addr, PATIENCE)?;
        ensure!(open.roundtrip(&post(&good_token(&issuer)?).build())?.status == 200, "a good token");
        let flows = enforcement.cli_json(&["flows"])?;
        for flow in flows.get("flows").and_then(Value::as_array).into_iter().flatten() {
            let cookie = flow.get("cookie").and_then(Value::as_u64).context("no cookie")?;
            ensure!(cookies.insert((round, cookie)), "cookie {cookie} twice");
        }
        server.process().kill()?;
        open.expect_closed()?;
        stranger = wait_until("the stranger", TIMEOUT, || {
            RemoteRecorder::spawn(addr, &Config::default(), None, None).ok()
        })?;
        ensure!(ask(addr)? == 200, "the stranger again, round {round}");
    }
    let distinct: std::collections::BTreeSet<u64> = cookies.iter().map(|(_, cookie)| *cookie).collect();
    ensure!(distinct.len() == cookies.len() && cookies.len() >= 3, "a cookie came twice: {cookies:?}");
    Ok(())
}

/// A listener with `TCP_DEFER_ACCEPT` becomes a connection only with the client's first bytes.
#[test]
fn a_listener_that_waits_for_bytes_is_guarded_and_served() -> Result<()> {
    let _deadline = Deadline::new("deferred", LIMIT);
    let cgroup = Cgroup::new("deferred")?;
    let kind = ListenerKind { defer_accept_secs: 1, ..ListenerKind::default() };
    let listener = listener_in(&cgroup, None, (Ipv4Addr::LOCALHOST, 0).into(), kind)?;
    let recorder = Recorder::on(listener, Config::default())?;
    let (_enforcement, issuer) = enforce(cgroup, &[recorder.addr()])?;
    let (good, bad) = (post(&good_token(&issuer)?).build(), post(&bad_token(&issuer)?).build());
    for (request, expected) in [(&bad, 401), (&good, 200)] {
        let mut client = Connection::open(recorder.addr(), PATIENCE)?;
        let status = client.roundtrip(request)?.status;
        ensure!(status == expected, "{status} in place of {expected}");
        let read = recorder.connection(client.local_addr()?).map(|record| record.kept).unwrap_or_default();
        ensure!(if expected == 200 { read == *request } else { read.is_empty() }, "it read {read:?}");
    }
    Ok(())
}

/// A socket has one verdict program: where a second enforcement guards the same endpoint, one of the two fences the connection,
/// and it gets nothing.
#[test]
fn what_two_enforcements_claim_gets_nothing() -> Result<()> {
    let _deadline = Deadline::new("claimed twice", LIMIT);
    let outer = Cgroup::new("outer")?;
    let inner = outer.child("inner")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let server = RemoteRecorder::spawn(listen, &Config::default(), Some(&inner), None)?;
    let (first, issuer) = enforce(inner, &[server.addr()])?;
    let corp = IssuerSpec::from_file("corp", &Issuer::new("https://other.test", Alg::Es256)?);
    let policy =
        PolicySpec::new(vec![corp], vec![ServerSpec::new("x", &[server.addr()], "https://x.test/mcp")]);
    let second = Enforcement::start(outer, &policy)?;
    let request = post(&good_token(&issuer)?).build();
    for _ in 0..3 {
        // Reset at once, or at the first bytes.
        let Ok(mut client) = Connection::open(server.addr(), PATIENCE) else { continue };
        drop(client.send(&request));
        ensure!(client.read_response().is_err(), "it was answered");
    }
    let fenced = first.counter("socket-fenced")? + second.counter("socket-fenced")?;
    ensure!(fenced >= 3, "{fenced} connections were fenced");
    let read: u64 = server.connections()?.iter().map(|record| record.bytes_read).sum();
    ensure!(read == 0, "the server read {read} bytes");
    // Inside out: a cgroup with children can't be removed.
    drop((server, first, second));
    Ok(())
}
