//! Connections that were open before the enforcement, and listeners that are out of its reach.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Enforcement, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, wait_until};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Answer, Config, RemoteRecorder};
use serde_json::Value;

use crate::common::{LIMIT, TIMEOUT, status};
use crate::maps::PinnedMap;
use crate::torture::{PATIENCE, RESOURCE, get};

/// A stream that outlives every test.
fn streaming() -> Config {
    Config { answer: Answer::Sse { events: 1000, event_bytes: 20, interval_ms: 50 }, ..Config::default() }
}

fn prepare(cgroup: Cgroup, listen: &[SocketAddr], observing: bool) -> Result<(Enforcement, Issuer)> {
    let issuer = Issuer::new("https://issuer.test", Alg::Es256)?;
    let corp = IssuerSpec::from_file("corp", &issuer);
    let policy = PolicySpec::new(vec![corp], vec![ServerSpec::new("before", listen, RESOURCE)]);
    let policy = if observing { policy.observing() } else { policy };
    Ok((Enforcement::prepare(cgroup, &policy, &["--drain-timeout", "0"])?, issuer))
}

/// Without a token: nobody asks for one yet.
fn ask(addr: SocketAddr) -> Vec<u8> {
    RequestBuilder::mcp_call(&addr.to_string(), "/mcp", None, "early").build()
}

/// Connections in every stage: idle, in the middle of a head, used and idle again, and one that only receives.
fn open_all(server: &RemoteRecorder, to: SocketAddr) -> Result<Vec<(&'static str, Connection)>> {
    let idle = Connection::open(to, PATIENCE)?;
    let mut half = Connection::open(to, PATIENCE)?;
    half.send(b"POST /mcp HTTP/1.1\r\nHost: x")?;
    server.set_config(&Config::default())?;
    let mut used = Connection::open(to, PATIENCE)?;
    ensure!(used.roundtrip(&ask(to))?.status == 200, "unguarded");
    server.set_config(&streaming())?;
    let mut receiving = Connection::open(to, PATIENCE)?;
    receiving.send(&ask(to))?;
    ensure!(receiving.read_head()?.status == 200, "unguarded");
    for connection in [&idle, &half, &used, &receiving] {
        server.wait_for_bytes(connection.local_addr()?, 0, PATIENCE)?;
    }
    Ok(vec![("idle", idle), ("half a head", half), ("used", used), ("receiving", receiving)])
}

/// Reads until the connection ends, whatever comes before that.
fn ends(connection: &mut Connection) -> bool {
    let ended = wait_until("the end of a connection", PATIENCE, || match connection.read_some(1 << 16) {
        Ok(bytes) => bytes.is_empty().then_some(true),
        Err(_) => Some(true),
    });
    ended.is_ok()
}

#[test]
fn connections_from_before_are_closed_whatever_they_do() -> Result<()> {
    let _deadline = Deadline::new("before", LIMIT);
    let cgroup = Cgroup::new("before")?;
    let nested = cgroup.child("nested")?;
    let netns = NetNs::new("before")?;
    // On every address of both families, in a cgroup below, and in another network namespace.
    let here =
        RemoteRecorder::spawn((Ipv6Addr::UNSPECIFIED, 0).into(), &Config::default(), Some(&nested), None)?;
    let there = RemoteRecorder::spawn(
        (Ipv4Addr::LOCALHOST, 0).into(),
        &Config::default(),
        Some(&cgroup),
        Some(&netns),
    )?;
    let outside = RemoteRecorder::spawn((Ipv4Addr::LOCALHOST, 0).into(), &Config::default(), None, None)?;
    let port = here.addr().port();
    let mut open = open_all(&here, (Ipv4Addr::LOCALHOST, port).into())?;
    open.extend(open_all(&here, (Ipv6Addr::LOCALHOST, port).into())?);
    open.extend(netns.run(|| open_all(&there, there.addr()))??);
    let mut untouched = Connection::open(outside.addr(), PATIENCE)?;
    ensure!(untouched.roundtrip(&ask(outside.addr()))?.status == 200, "unguarded");

    let (mut enforcement, issuer) = prepare(cgroup, &[here.addr(), there.addr()], false)?;
    enforcement.launch()?;
    for (what, connection) in &mut open {
        // Refused if they are gone already.
        drop(connection.send(&ask(here.addr())));
        ensure!(ends(connection), "{what} is still open");
    }
    for record in here.connections()?.iter().chain(&there.connections()?) {
        ensure!(record.requests.len() <= 1, "a request passed on a connection from before: {record:?}");
    }
    ensure!(enforcement.reason("unguarded-connection")? >= 12, "{:?}", enforcement.counters()?);
    ensure!(untouched.roundtrip(&ask(outside.addr()))?.status == 200, "another server's connection");
    let flows = enforcement.cli_json(&["flows"])?;
    ensure!(flows.get("unguarded").and_then(Value::as_array).is_some_and(Vec::is_empty), "{flows}");

    // New ones are judged.
    here.set_config(&Config::default())?;
    let mut client = Connection::open((Ipv4Addr::LOCALHOST, port).into(), PATIENCE)?;
    ensure!(client.roundtrip(&ask(here.addr()))?.status != 200, "a request without a token");
    let token = issuer.mint().audience(RESOURCE).sign()?;
    let good = RequestBuilder::mcp_call(&format!("localhost:{port}"), "/mcp", Some(&token), "x").build();
    ensure!(client.roundtrip(&good)?.status == 200, "a good token");
    drop((here, there, nested));
    Ok(())
}

#[test]
fn in_observe_mode_connections_from_before_are_listed_and_left() -> Result<()> {
    let _deadline = Deadline::new("before, observed", LIMIT);
    let cgroup = Cgroup::new("observed")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let server = RemoteRecorder::spawn(listen, &Config::default(), Some(&cgroup), None)?;
    let mut open = Connection::open(server.addr(), PATIENCE)?;
    ensure!(open.roundtrip(&ask(server.addr()))?.status == 200, "unguarded");
    let (mut enforcement, _issuer) = prepare(cgroup, &[server.addr()], true)?;
    enforcement.launch()?;
    let client = open.local_addr()?.to_string();
    let flows = enforcement.cli_json(&["flows"])?;
    let listed = flows.pointer("/unguarded/0/client_address").and_then(Value::as_str);
    ensure!(listed == Some(client.as_str()), "{client} is not listed: {flows}");
    let table = enforcement.cli(&["flows"])?.stdout;
    ensure!(table.contains("UNGUARDED"), "{table}");
    let unguarded = enforcement.cli_json(&["status"])?;
    let count = unguarded.pointer("/loaded/unguarded/connections").and_then(Value::as_u64);
    ensure!(count == Some(1), "{unguarded}");
    ensure!(enforcement.cli(&["status"])?.stdout.contains("NOT GUARDED"), "the status is silent");
    ensure!(enforcement.log()?.contains(&client), "the log does not name it: {}", enforcement.log()?);
    ensure!(open.roundtrip(&ask(server.addr()))?.status == 200, "it was cut off");
    Ok(())
}

/// The kernel programs alone: a connection without a record is reported at its first packet, be it an acknowledgement.
#[test]
fn a_connection_that_no_list_shows_ends_at_its_first_packet() -> Result<()> {
    let _deadline = Deadline::new("no record", LIMIT);
    let cgroup = Cgroup::new("norecord")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let server = RemoteRecorder::spawn(listen, &streaming(), Some(&cgroup), None)?;
    let (mut enforcement, issuer) = prepare(cgroup, &[server.addr()], false)?;
    enforcement.launch()?;
    let token = issuer.mint().audience(RESOURCE).sign()?;
    // The watch has had its second look, so the next one is far away.
    std::thread::sleep(Duration::from_secs(2));
    let flows = PinnedMap::open(&enforcement.pins().join("FLOWS"))?;
    for sends in [true, false] {
        let mut client = Connection::open(server.addr(), PATIENCE)?;
        client.send(&get(&token).build())?;
        ensure!(client.read_head()?.status == 200, "a good token");
        let listed = enforcement.cli_json(&["flows"])?;
        let cookie = listed.pointer("/flows/0/cookie").and_then(Value::as_u64).context("no flow")?;
        let before = server.wait_for_bytes(client.local_addr()?, 1, PATIENCE)?.bytes_read;
        flows.delete(&cookie.to_ne_bytes())?;
        if sends {
            drop(client.send(&ask(server.addr())));
        }
        ensure!(ends(&mut client), "still open although it {}", if sends { "sends" } else { "receives" });
        let after = server.wait_for_bytes(client.local_addr()?, 1, PATIENCE)?.bytes_read;
        ensure!(before == after, "the server read {} bytes more", after - before);
    }
    ensure!(enforcement.reason("unguarded-connection")? >= 2, "{:?}", enforcement.counters()?);
    Ok(())
}

#[test]
fn listeners_out_of_reach_are_named() -> Result<()> {
    let _deadline = Deadline::new("listeners", LIMIT);
    let cgroup = Cgroup::new("listeners")?;
    let config = Config::default();
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let good = RemoteRecorder::spawn(listen, &config, Some(&cgroup), None)?;
    let outside = RemoteRecorder::spawn(listen, &config, None, None)?;
    let wider = RemoteRecorder::spawn((Ipv4Addr::UNSPECIFIED, 0).into(), &config, Some(&cgroup), None)?;
    let narrow = SocketAddr::from((Ipv4Addr::LOCALHOST, wider.addr().port()));
    let cgroup_path = cgroup.path().to_string_lossy().into_owned();
    let (mut enforcement, _issuer) = prepare(cgroup, &[good.addr(), outside.addr(), narrow], false)?;
    let policy = enforcement.policy_path().to_string_lossy().into_owned();
    let expect = |checks: &Value| -> Result<()> {
        let checks = checks.get("checks").and_then(Value::as_array).context("no checks")?;
        let named = |check: &&Value| check.get("name").and_then(Value::as_str) == Some("listeners");
        let check = checks.iter().find(named).context("no check of the listeners")?;
        let text = check.to_string();
        ensure!(check.get("grade").and_then(Value::as_str) == Some("warn"), "{text}");
        ensure!(text.contains(&outside.addr().to_string()), "{text}");
        ensure!(text.contains(&wider.addr().to_string()), "{text}");
        ensure!(!text.contains(&good.addr().to_string()), "{text}");
        Ok(())
    };
    let before = ["doctor", "--policy", policy.as_str(), "--cgroup", cgroup_path.as_str()];
    expect(&enforcement.cli_json(&before)?).context("before")?;
    enforcement.launch()?;
    let log = enforcement.log()?;
    let status = enforcement.cli_json(&["status"])?;
    for (server, gap) in [(&outside, "outside-cgroup"), (&wider, "wider-than-policy")] {
        let address = server.addr().to_string();
        ensure!(log.lines().any(|line| line.contains(&address) && line.contains("NOT GUARDED")), "{log}");
        let listeners = status.pointer("/loaded/unguarded/listeners").and_then(Value::as_array);
        let found = listeners
            .into_iter()
            .flatten()
            .find(|listener| listener.get("address").and_then(Value::as_str) == Some(address.as_str()));
        let found = found.with_context(|| format!("{address} is not in {status}"))?;
        ensure!(found.get("gap").and_then(Value::as_str) == Some(gap), "{found}");
        let process = found.get("process").and_then(Value::as_str).unwrap_or_default();
        ensure!(process.starts_with("enforcer-upstre"), "{found}");
    }
    Ok(())
}

/// The kernel detaches the programs of a cgroup that is removed, as a service's is when it stops.
#[test]
fn a_guarded_cgroup_that_is_removed_is_no_silence() -> Result<()> {
    let _deadline = Deadline::new("cgroup removed", LIMIT);
    let mut guarded = enforcer_tests::enforcement::Guarded::start("removed")?;
    ensure!(status(&guarded, &guarded.call(None).build())? == 401, "guarded");
    guarded.recorder.process().kill()?;
    let path = guarded.enforcement.cgroup().path().to_owned();
    wait_until("the cgroup is gone", TIMEOUT, || std::fs::remove_dir(&path).ok())?;
    let ended = guarded.enforcement.daemon()?.wait(TIMEOUT)?;
    ensure!(!ended.success(), "the daemon ended well");
    ensure!(guarded.enforcement.log()?.contains("NOTHING IS GUARDED"), "{}", guarded.enforcement.log()?);
    let status = guarded.enforcement.cli_json(&["status"])?;
    ensure!(status.get("state").and_then(Value::as_str) == Some("detached"), "{status}");
    ensure!(status.get("enforcing") == Some(&Value::Bool(false)), "{status}");
    Ok(())
}
