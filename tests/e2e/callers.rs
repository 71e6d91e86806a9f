//! Who is calling: the process that connected, through equal addresses, address translation and data in the SYN.

mod common;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "bypass/maps.rs"]
mod maps;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use enforcer_tests::caller::{Caller, NOBODY, Place, translate};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, veth_pair};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use serde_json::{Value, json};

use common::{LIMIT, TIMEOUT};
use maps::PinnedMap;

fn flow_of(guarded: &Guarded, client: SocketAddr) -> Result<Value> {
    let flows = guarded.enforcement.cli_json(&["flows"])?;
    let mut of_client = flows["flows"]
        .as_array()
        .context("flows")?
        .iter()
        .filter(|flow| flow["client_address"] == client.to_string());
    of_client.next().cloned().with_context(|| format!("no flow of {client} in {flows}"))
}

fn path_below_root(cgroup: &Cgroup) -> Result<String> {
    Ok(format!("/{}", cgroup.path().strip_prefix(Cgroup::mount_point()?)?.display()))
}

/// The flow's caller is the process that was started in this cgroup.
fn assert_caller(flow: &Value, caller: &Caller, cgroup: &Cgroup, uid: u32) -> Result<()> {
    let seen = &flow["caller"];
    assert_eq!(seen["workload"]["cgroup_id"], json!(fs::metadata(cgroup.path())?.ino()), "{flow}");
    assert_eq!(seen["workload"]["cgroup_path"], json!(path_below_root(cgroup)?), "{flow}");
    assert_eq!(seen["pid"], json!(caller.process.pid()), "{flow}");
    assert_eq!(seen["uid"], json!(uid), "{flow}");
    assert_eq!(seen["comm"], "enforcer-caller", "{flow}");
    Ok(())
}

fn knows_its_callers(name: &str, listen: IpAddr, client: IpAddr) -> Result<()> {
    let _deadline = Deadline::new(name, LIMIT);
    let guarded = Guarded::builder(name).bind((listen, 0).into()).start()?;
    let host = format!("localhost:{}", guarded.addr().port());
    let token = guarded.token()?;
    let request = RequestBuilder::mcp_call(&host, "/mcp", Some(&token), "echo").build();
    let at = SocketAddr::new(client, guarded.addr().port());
    let agent = guarded.enforcement.cgroup().child("agent.service")?;
    let tool = guarded.enforcement.cgroup().child("tool")?;
    let first = Place { uid: NOBODY, ..Place::root(&agent) }.call(at, &[], &request)?;
    let second = Place::root(&tool).call(at, &[], &request)?;
    let flow = flow_of(&guarded, first.local)?;
    assert_caller(&flow, &first, &agent, NOBODY)?;
    assert_eq!(flow["caller"]["workload"]["unit"], "agent.service");
    assert_eq!(
        (&flow["caller"]["name"], &flow["caller"]["source"]),
        (&json!("agent.service"), &json!("unit"))
    );
    assert_eq!(
        flow["last_grant"]["subject"],
        guarded.enforcement.cli_json(&["grants"])?["grants"][0]["subject"]
    );
    let flow = flow_of(&guarded, second.local)?;
    assert_caller(&flow, &second, &tool, 0)?;
    assert_eq!(flow["caller"]["source"], "path");
    // This process is in no cgroup that is looked at.
    let mut stranger = Connection::open(at, TIMEOUT)?;
    assert_eq!(stranger.roundtrip(&request)?.status, 200);
    assert_eq!(flow_of(&guarded, stranger.local_addr()?)?["caller"], Value::Null);
    assert_eq!(guarded.enforcement.counter("caller-joined")?, 2);
    assert_eq!(guarded.enforcement.counter("caller-unknown")?, 1);
    let workloads = guarded.enforcement.cli_json(&["workloads"])?;
    let names: Vec<_> =
        workloads["workloads"].as_array().context("workloads")?.iter().map(|row| &row["unit"]).collect();
    assert_eq!(names, [&Value::Null, &json!("agent.service")], "{workloads}");
    assert_eq!(workloads["unknown"]["flows"], 1);
    // What is refused is logged with who asked for it.
    let bare = RequestBuilder::mcp_call(&host, "/mcp", None, "echo").build();
    let _refused = Place { uid: NOBODY, ..Place::root(&agent) }.call(at, &[], &bare)?;
    let log = guarded.enforcement.log()?;
    ensure!(log.contains("(agent.service, enforcer-caller["), "{log}");
    Ok(())
}

#[test]
fn by_cgroup_process_and_user_over_ipv4() -> Result<()> {
    knows_its_callers("callers4.slice", Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into())
}

#[test]
fn by_cgroup_process_and_user_over_ipv6() -> Result<()> {
    knows_its_callers("callers6.slice", Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into())
}

#[test]
fn ipv4_callers_of_a_dual_stack_server() -> Result<()> {
    knows_its_callers("callers46.slice", Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into())
}

#[test]
fn callers_with_one_address_and_port_in_two_namespaces_are_told_apart() -> Result<()> {
    let _deadline = Deadline::new("callers: namespaces", LIMIT);
    let places = [Arc::new(NetNs::new("caller-a")?), Arc::new(NetNs::new("caller-b")?)];
    let server: SocketAddr = (Ipv4Addr::LOCALHOST, 8_080).into();
    let client: SocketAddr = (Ipv4Addr::LOCALHOST, 40_404).into();
    let guarded = Guarded::builder("callersns").bind(server).netns(&places[0]).start()?;
    let cgroup = guarded.enforcement.cgroup();
    let _other = RemoteRecorder::spawn(server, &Config::default(), Some(cgroup), Some(&places[1]))?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let cgroups = [cgroup.child("a")?, cgroup.child("b")?];
    let from = client.to_string();
    let mut callers = Vec::new();
    for (netns, cgroup) in places.iter().zip(&cgroups) {
        let place = Place { netns: Some(netns), ..Place::root(cgroup) };
        callers.push(place.call(server, &["--from", &from], &request)?);
    }
    let flows = guarded.enforcement.cli_json(&["flows"])?;
    let flows = flows["flows"].as_array().context("flows")?;
    assert_eq!(flows.len(), 2, "{flows:?}");
    for (caller, cgroup) in callers.iter().zip(&cgroups) {
        let pid = json!(caller.process.pid());
        let flow = flows.iter().find(|flow| flow["caller"]["pid"] == pid).context("its flow")?;
        assert_eq!(flow["client_address"], client.to_string());
        assert_caller(flow, caller, cgroup, 0)?;
        assert_eq!(flow["caller"]["netns_cookie"], flow["netns_cookie"]);
    }
    assert_ne!(flows[0]["netns_cookie"], flows[1]["netns_cookie"]);
    // A note that nobody took, of a connection elsewhere in the one, is not for one from that address and port in the other.
    let from = SocketAddr::from((Ipv4Addr::LOCALHOST, 40_405));
    let elsewhere = places[1].run(|| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
    let place = Place { netns: Some(&places[1]), ..Place::root(&cgroups[1]) };
    let _noted = place.call(elsewhere.local_addr()?, &["--from", &from.to_string()], b"")?;
    assert_eq!(noted_seqs(&guarded)?.len(), 1);
    let outside = Cgroup::new("callersns-outside")?;
    let place = Place { netns: Some(&places[0]), ..Place::root(&outside) };
    let stranger = place.call(server, &["--from", &from.to_string()], &request)?;
    assert_eq!(flow_of(&guarded, stranger.local)?["caller"], Value::Null);
    Ok(())
}

#[test]
fn through_destination_nat() -> Result<()> {
    let _deadline = Deadline::new("callers: nat", LIMIT);
    let (clients, servers) = (NetNs::new("nat-clients")?, Arc::new(NetNs::new("nat-servers")?));
    let pair = veth_pair(&clients, &servers)?;
    let guarded = Guarded::builder("callersnat").bind((pair.b.0, 8_080).into()).netns(&servers).start()?;
    // A service address that nobody has, as Kubernetes makes them.
    let service: SocketAddr = (Ipv4Addr::new(10, 96, 0, 10), 80).into();
    clients.ip(&["route", "add", "10.96.0.0/16", "via", &pair.b.0.to_string()])?;
    translate(&clients, service, guarded.addr())?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let agent = guarded.enforcement.cgroup().child("agent")?;
    let caller = Place { netns: Some(&clients), ..Place::root(&agent) }.call(service, &[], &request)?;
    ensure!(caller.process.stdout().contains("status 200"), "{}", caller.process.stdout());
    let flow = flow_of(&guarded, caller.local)?;
    assert_eq!(flow["server_address"], guarded.addr().to_string());
    assert_caller(&flow, &caller, &agent, 0)?;
    assert_ne!(flow["caller"]["netns_cookie"], flow["netns_cookie"]);
    Ok(())
}

#[test]
fn with_data_in_the_syn() -> Result<()> {
    let _deadline = Deadline::new("callers: fast open", LIMIT);
    let place = Arc::new(NetNs::new("caller-tfo")?);
    place.run(|| fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1027"))??;
    let guarded = Guarded::builder("callerstfo").netns(&place).start()?;
    let agent = guarded.enforcement.cgroup().child("agent")?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let client = Place { netns: Some(&place), ..Place::root(&agent) };
    for _ in 0..2 {
        let caller = client.call(guarded.addr(), &["--fast-open"], &request)?;
        ensure!(caller.process.stdout().contains("status 200"), "{}", caller.process.stdout());
        assert_caller(&flow_of(&guarded, caller.local)?, &caller, &agent, 0)?;
    }
    // The gate drops it, and it comes again without the data.
    let mut with_data = 0;
    for name in ["TCPFastOpenPassive", "TCPFastOpenActive", "TCPFastOpenActiveFail"] {
        with_data += place.tcp_counter(name)?;
    }
    ensure!(with_data > 0, "no SYN had data in it, so the test proves nothing");
    Ok(())
}

/// Sequence numbers that are noted for clients whose server's end has not come.
fn noted_seqs(guarded: &Guarded) -> Result<Vec<u32>> {
    let notes = PinnedMap::open(&guarded.enforcement.pins().join("CALLERS"))?;
    let seq = |key: Vec<u8>| Some(u32::from_ne_bytes(key.get(20..24)?.try_into().ok()?));
    Ok(notes.keys()?.into_iter().filter_map(seq).collect())
}

/// A process that has learnt address, port and sequence number of another's connection, and uses the same.
#[test]
fn what_a_connection_elsewhere_leaves_names_nobody_else() -> Result<()> {
    let _deadline = Deadline::new("callers: left behind", LIMIT);
    let guarded = Guarded::start("callersleft")?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let cgroup = guarded.enforcement.cgroup();
    let (agent, thief) = (cgroup.child("agent")?, cgroup.child("thief")?);
    // A server's end outside of the cgroup takes no note.
    let elsewhere = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let left = Place::root(&agent).call(elsewhere.local_addr()?, &[], b"")?;
    let from = left.local.to_string();
    let notes = noted_seqs(&guarded)?;
    let [first_byte_seq] = notes[..] else { anyhow::bail!("{notes:?}") };
    elsewhere.accept()?.0.shutdown(std::net::Shutdown::Both)?;
    drop((left, elsewhere));
    let seq = first_byte_seq.wrapping_sub(1).to_string();
    let options = ["--from", &from, "--initial-seq", &seq];
    let caller = Place::root(&thief).call(guarded.addr(), &options, &request)?;
    assert_caller(&flow_of(&guarded, caller.local)?, &caller, &thief, 0)?;
    assert_eq!(noted_seqs(&guarded)?, Vec::<u32>::new(), "a note is for one connection");
    // Also a server's end that nobody guards takes what was noted for it.
    let inside =
        RemoteRecorder::spawn((Ipv4Addr::LOCALHOST, 0).into(), &Config::default(), Some(&thief), None)?;
    let _caller = Place::root(&agent).call(inside.addr(), &[], &request)?;
    assert_eq!(noted_seqs(&guarded)?, Vec::<u32>::new());
    Ok(())
}

#[test]
fn a_cgroup_of_the_same_name_is_another_workload() -> Result<()> {
    let _deadline = Deadline::new("callers: born again", LIMIT);
    let guarded = Guarded::start("callersborn")?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let agent = guarded.enforcement.cgroup().child("agent.service")?;
        let caller = Place::root(&agent).call(guarded.addr(), &[], &request)?;
        let flow = flow_of(&guarded, caller.local)?;
        assert_caller(&flow, &caller, &agent, 0)?;
        ids.push(flow["caller"]["workload"]["cgroup_id"].to_string());
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3, "the kernel gave an id out again");
    Ok(())
}
