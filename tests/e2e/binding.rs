//! Tokens that belong to workloads: useless in another one, however it reaches the server.

mod common;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use enforcer_tests::caller::{NOBODY, Place, translate};
use enforcer_tests::enforcement::{Guarded, GuardedBuilder, skip};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, veth_pair, wait_until};
use enforcer_tests::raw::Connection;
use serde_json::json;

use common::{LIMIT, TIMEOUT};

/// Alice's tokens belong to `agent.service`.
fn bound(name: &str) -> GuardedBuilder {
    Guarded::builder(name)
        .nonblocking()
        .policy("workloads", json!([{"name": "agent", "unit": "agent.service"}]))
        .policy("bind", json!([{"subject": "alice", "workloads": ["agent"]}]))
}

struct Workloads {
    agent: Cgroup,
    thief: Cgroup,
}

impl Workloads {
    fn of(guarded: &Guarded) -> Result<Self> {
        let cgroup = guarded.enforcement.cgroup();
        Ok(Self { agent: cgroup.child("agent.service")?, thief: cgroup.child("thief.service")? })
    }
}

fn request_of(guarded: &Guarded, subject: &str) -> Result<Vec<u8>> {
    let token = guarded.mint().subject(subject).sign()?;
    let host = format!("localhost:{}", guarded.addr().port());
    Ok(enforcer_tests::raw::RequestBuilder::mcp_call(&host, "/mcp", Some(&token), "echo").build())
}

/// From the workload that a token belongs to it passes, also on the fast path; from another one the same bytes are refused, on a new and on a
/// kept connection, and that changes nothing for the first.
fn good_from_its_workload_alone(guarded: &Guarded, to: SocketAddr, netns: Option<&NetNs>) -> Result<()> {
    let workloads = Workloads::of(guarded)?;
    let agent = Place { netns, ..Place::root(&workloads.agent) };
    let thief = Place { netns, ..Place::root(&workloads.thief) };
    let (request, own) = (request_of(guarded, "alice")?, request_of(guarded, "bob")?);
    for _ in 0..2 {
        assert_eq!(agent.call(to, &[], &request)?.statuses(), [200]);
    }
    let before = guarded.enforcement.counters()?;
    ensure!(before.kernel("allowed") == 1, "the kernel does not know the head, so this shows nothing");

    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), &request)?;
    let then = file.path().to_str().context("path")?;
    assert_eq!(thief.call(to, &[], &request)?.statuses(), [401]);
    assert_eq!(thief.call(to, &["--then", then], &own)?.statuses(), [200, 401]);
    let read = guarded.bytes_read()?;
    assert_eq!(read, (2 * request.len() + own.len()) as u64, "the server saw a stolen token");
    // The second time the kernel may have known the refusal, which is the thief's alone.
    let counters = guarded.enforcement.counters()?;
    assert_eq!(counters.daemon("token-of-another-workload") + counters.kernel("refused"), 2);

    // The owner's head is as known as before.
    let middle = guarded.enforcement.counters()?;
    assert_eq!(agent.call(to, &[], &request)?.statuses(), [200]);
    let after = guarded.enforcement.counters()?;
    assert_eq!(after.kernel("allowed"), middle.kernel("allowed") + 1);
    assert_eq!(after.punts(), middle.punts());

    // The alarm names both.
    let log = guarded.enforcement.log()?;
    let alarm = log.lines().find(|line| line.contains("refused: a token of another workload"));
    let alarm = alarm.with_context(|| format!("no alarm in {log}"))?;
    ensure!(alarm.contains("WARN") && alarm.contains("workload=\"thief.service\""), "{alarm}");
    ensure!(alarm.contains("held_by=\"agent.service\"") && alarm.contains("subject=\"alice\""), "{alarm}");
    let grants = guarded.enforcement.cli_json(&["grants"])?;
    let held: Vec<_> = grants["grants"]
        .as_array()
        .context("grants")?
        .iter()
        .map(|grant| (grant["subject"].as_str(), grant["caller"]["name"].as_str()))
        .collect();
    assert_eq!(
        held,
        [(Some("alice"), Some("agent.service")), (Some("bob"), Some("thief.service"))],
        "{grants}"
    );
    Ok(())
}

fn over_loopback(name: &str, address: IpAddr) -> Result<()> {
    let _deadline = Deadline::new(name, LIMIT);
    let guarded = bound(name).bind((address, 0).into()).start()?;
    good_from_its_workload_alone(&guarded, guarded.addr(), None)
}

#[test]
fn a_bound_token_is_refused_from_another_workload_over_ipv4() -> Result<()> {
    over_loopback("binding4.slice", Ipv4Addr::LOCALHOST.into())
}

#[test]
fn a_bound_token_is_refused_from_another_workload_over_ipv6() -> Result<()> {
    over_loopback("binding6.slice", Ipv6Addr::LOCALHOST.into())
}

#[test]
fn a_bound_token_is_refused_from_another_workload_across_namespaces() -> Result<()> {
    let _deadline = Deadline::new("binding: namespaces", LIMIT);
    let (clients, servers) = (NetNs::new("bind-clients")?, Arc::new(NetNs::new("bind-servers")?));
    let pair = veth_pair(&clients, &servers)?;
    let guarded = bound("bindingns.slice")
        .bind((pair.b.0, 8_080).into())
        .server("hosts", json!(["localhost:8080"]))
        .netns(&servers)
        .start()?;
    good_from_its_workload_alone(&guarded, guarded.addr(), Some(&clients))
}

#[test]
fn a_bound_token_is_refused_from_another_workload_through_dnat() -> Result<()> {
    let _deadline = Deadline::new("binding: nat", LIMIT);
    let (clients, servers) = (NetNs::new("bindnat-clients")?, Arc::new(NetNs::new("bindnat-servers")?));
    let pair = veth_pair(&clients, &servers)?;
    let guarded = bound("bindingnat.slice")
        .bind((pair.b.0, 8_080).into())
        .server("hosts", json!(["localhost:8080"]))
        .netns(&servers)
        .start()?;
    let service: SocketAddr = (Ipv4Addr::new(10, 96, 0, 10), 80).into();
    clients.ip(&["route", "add", "10.96.0.0/16", "via", &pair.b.0.to_string()])?;
    translate(&clients, service, guarded.addr())?;
    good_from_its_workload_alone(&guarded, service, Some(&clients))
}

/// The README's story: agent B presents agent A's token; its signature is valid, and its audience right.
#[test]
fn a_confused_deputy_gets_nothing_with_another_agents_token() -> Result<()> {
    let _deadline = Deadline::new("binding: deputy", LIMIT);
    let guarded = Guarded::builder("deputy.slice")
        .policy(
            "workloads",
            json!([{"name": "agent-a", "unit": "agent-a.service"}, {"name": "agent-b", "unit": "agent-b.service"}]),
        )
        .policy(
            "bind",
            json!([
                {"client": "agent-a", "workloads": ["agent-a"]},
                {"client": "agent-b", "workloads": ["agent-b"]},
            ]),
        )
        .start()?;
    let cgroup = guarded.enforcement.cgroup();
    let (a, b) = (cgroup.child("agent-a.service")?, cgroup.child("agent-b.service")?);
    let of = |client: &str| -> Result<Vec<u8>> {
        Ok(guarded.call(Some(&guarded.mint().client_id(client).sign()?)).build())
    };
    let (as_a, as_b) = (of("agent-a")?, of("agent-b")?);
    assert_eq!(Place::root(&a).call(guarded.addr(), &[], &as_a)?.statuses(), [200]);
    assert_eq!(Place::root(&b).call(guarded.addr(), &[], &as_b)?.statuses(), [200]);
    assert_eq!(Place::root(&b).call(guarded.addr(), &[], &as_a)?.statuses(), [401]);
    assert_eq!(guarded.bytes_read()?, (as_a.len() + as_b.len()) as u64);
    let log = guarded.enforcement.log()?;
    let line = log.lines().find(|line| line.contains("token-of-another-workload")).context("no log line")?;
    for named in ["agent-a.service", "agent-b.service", "client_id=\"agent-a\"", "uid 0"] {
        ensure!(line.contains(named), "{named} is not in {line}");
    }
    Ok(())
}

#[test]
fn an_unknown_caller_satisfies_no_binding() -> Result<()> {
    let _deadline = Deadline::new("binding: unknown", LIMIT);
    let guarded = bound("bindingunknown.slice").start()?;
    // This process is outside of the guarded cgroup.
    let mut stranger = guarded.connect()?;
    assert_eq!(stranger.roundtrip(&request_of(&guarded, "alice")?)?.status, 401);
    assert_eq!(stranger.roundtrip(&request_of(&guarded, "bob")?)?.status, 200);
    assert_eq!(guarded.enforcement.reason("caller-unknown")?, 1);
    Ok(())
}

/// It connects as the workload that its token belongs to, and then nobody can say any more whose its cgroup was.
#[test]
fn a_caller_whose_cgroup_is_gone_satisfies_no_binding() -> Result<()> {
    let _deadline = Deadline::new("binding: gone", LIMIT);
    let guarded = bound("bindinggone.slice").start()?;
    let place = tempfile::tempdir()?;
    let go = place.path().join("go");
    let own = guarded.enforcement.cgroup().child("agent.service")?;
    let elsewhere = guarded.enforcement.cgroup().child("elsewhere.service")?;
    let mut agent = Place::root(&own).connect(guarded.addr(), &go, &request_of(&guarded, "alice")?)?;
    elsewhere.take(agent.pid())?;
    drop(own);
    fs::write(&go, "")?;
    assert_eq!(agent.wait_for_line("status ", TIMEOUT)?, "status 401");
    assert_eq!(guarded.bytes_read()?, 0);
    Ok(())
}

/// Whether the programs run at MPTCP's `connect` is the kernel's affair; nobody is taken for another by it.
#[test]
fn an_mptcp_caller_is_itself_or_nobody() -> Result<()> {
    const NAME: &str = "an_mptcp_caller_is_itself_or_nobody";
    let _deadline = Deadline::new("binding: mptcp", LIMIT);
    if !fs::read_to_string("/proc/sys/net/mptcp/enabled").is_ok_and(|enabled| enabled.trim() == "1") {
        skip(NAME, "the kernel does not speak MPTCP");
        return Ok(());
    }
    let guarded = bound("bindingmptcp.slice").start()?;
    let workloads = Workloads::of(&guarded)?;
    let ask = |cgroup, subject| -> Result<u16> {
        let request = request_of(&guarded, subject)?;
        Place::root(cgroup).call(guarded.addr(), &["--mptcp"], &request)?.status().context("no answer")
    };
    assert_eq!(ask(&workloads.thief, "alice")?, 401);
    let unknown = guarded.enforcement.reason("caller-unknown")?;
    let expected = if unknown == 0 { 200 } else { 401 };
    assert_eq!(ask(&workloads.agent, "alice")?, expected);
    assert_eq!(guarded.enforcement.reason("caller-unknown")?, 2 * unknown);
    assert_eq!(ask(&workloads.agent, "bob")?, 200);
    Ok(())
}

#[test]
fn an_unbound_token_from_two_workloads_raises_the_alarm() -> Result<()> {
    let _deadline = Deadline::new("binding: alarm", LIMIT);
    let guarded = bound("bindingalarm.slice").start()?;
    let workloads = Workloads::of(&guarded)?;
    let request = request_of(&guarded, "bob")?;
    for cgroup in [&workloads.agent, &workloads.agent, &workloads.thief] {
        assert_eq!(guarded.enforcement.reason("token-from-two-workloads")?, 0);
        assert_eq!(Place::root(cgroup).call(guarded.addr(), &[], &request)?.statuses(), [200]);
    }
    assert_eq!(guarded.enforcement.reason("token-from-two-workloads")?, 1);
    let log = guarded.enforcement.log()?;
    let alarm = log.lines().find(|line| line.contains("one token, two workloads")).context("no alarm")?;
    ensure!(alarm.contains("thief.service") && alarm.contains("held_by=\"agent.service\""), "{alarm}");
    Ok(())
}

#[test]
fn a_pods_token_is_good_in_its_pod_alone() -> Result<()> {
    const POD: &str = "8c2f6c4e-1f0a-4f5e-9d3b-0a1b2c3d4e5f";
    const OTHER: &str = "11111111-1f0a-4f5e-9d3b-0a1b2c3d4e5f";
    let _deadline = Deadline::new("binding: pod", LIMIT);
    let guarded =
        Guarded::builder("bindingpod.slice").policy("bind", json!([{"claim": "kubernetes_pod"}])).start()?;
    let cgroup = guarded.enforcement.cgroup();
    let slice = |pod: &str| cgroup.child(&format!("kubepods-burstable-pod{}.slice", pod.replace('-', "_")));
    let (mine, others) = (slice(POD)?, slice(OTHER)?);
    let claim = json!({"namespace": "tools", "pod": {"name": "agent", "uid": POD}});
    let token = guarded.mint().claim("kubernetes.io", claim).sign()?;
    let request = guarded.call(Some(&token)).build();
    assert_eq!(Place::root(&mine).call(guarded.addr(), &[], &request)?.statuses(), [200]);
    assert_eq!(Place::root(&others).call(guarded.addr(), &[], &request)?.statuses(), [401]);
    let bare = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(Place::root(&mine).call(guarded.addr(), &[], &bare)?.statuses(), [401]);
    assert_eq!(guarded.enforcement.reason("token-of-another-workload")?, 1);
    assert_eq!(guarded.enforcement.reason("workload-claim-missing")?, 1);
    Ok(())
}

#[test]
fn a_spiffe_id_is_good_in_its_workload_alone() -> Result<()> {
    let _deadline = Deadline::new("binding: spiffe", LIMIT);
    let id = "spiffe://example.org/agent";
    let guarded = Guarded::builder("bindingspiffe.slice")
        .policy("workloads", json!([{"name": "agent", "unit": "agent.service", "spiffe_id": id}]))
        .policy("bind", json!([{"claim": "spiffe_id"}]))
        .start()?;
    let workloads = Workloads::of(&guarded)?;
    let request = guarded.call(Some(&guarded.mint().subject(id).sign()?)).build();
    assert_eq!(Place::root(&workloads.agent).call(guarded.addr(), &[], &request)?.statuses(), [200]);
    assert_eq!(Place::root(&workloads.thief).call(guarded.addr(), &[], &request)?.statuses(), [401]);
    Ok(())
}

#[test]
fn the_first_workload_keeps_a_principal_also_over_a_crash() -> Result<()> {
    let _deadline = Deadline::new("binding: first use", LIMIT);
    let mut guarded = Guarded::builder("bindingfirst.slice")
        .policy("bind", json!([{"subject": "alice", "first_use": true}]))
        .start()?;
    let workloads = Workloads::of(&guarded)?;
    let (agent, thief) = (Place::root(&workloads.agent), Place::root(&workloads.thief));
    assert_eq!(agent.call(guarded.addr(), &[], &request_of(&guarded, "alice")?)?.statuses(), [200]);
    assert_eq!(thief.call(guarded.addr(), &[], &request_of(&guarded, "alice")?)?.statuses(), [401]);
    guarded.enforcement.kill9()?;
    guarded.enforcement.launch()?;
    // Another token of the same principal.
    assert_eq!(thief.call(guarded.addr(), &[], &request_of(&guarded, "alice")?)?.statuses(), [401]);
    assert_eq!(agent.call(guarded.addr(), &[], &request_of(&guarded, "alice")?)?.statuses(), [200]);
    let pins = guarded.enforcement.cli_json(&["first-users"])?;
    assert_eq!(pins["first_users"][0]["workload"], "agent.service", "{pins}");
    let principal = pins["first_users"][0]["id"].as_str().context("id")?.to_owned();
    guarded.enforcement.cli_json(&["first-users", "--forget", &principal])?;
    assert_eq!(thief.call(guarded.addr(), &[], &request_of(&guarded, "alice")?)?.statuses(), [200]);
    Ok(())
}

#[test]
fn a_new_binding_ends_what_it_does_not_allow() -> Result<()> {
    let _deadline = Deadline::new("binding: reload", LIMIT);
    let guarded = Guarded::builder("bindingreload.slice").start()?;
    let workloads = Workloads::of(&guarded)?;
    let (agent, thief) = (Place::root(&workloads.agent), Place::root(&workloads.thief));
    let request = request_of(&guarded, "alice")?;
    let mut kept = thief.call(guarded.addr(), &[], &request)?;
    let path = guarded.enforcement.policy_path();
    let mut policy: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    policy["workloads"] = json!([{"name": "agent", "unit": "agent.service"}]);
    policy["bind"] = json!([{"subject": "alice", "workloads": ["agent"]}]);
    fs::write(&path, serde_json::to_vec(&policy)?)?;
    guarded.enforcement.cli_json(&["reload"])?;
    ensure!(kept.is_closed(TIMEOUT), "the connection of the token that belongs to another lives on");
    assert_eq!(thief.call(guarded.addr(), &[], &request)?.statuses(), [401]);
    assert_eq!(agent.call(guarded.addr(), &[], &request)?.statuses(), [200]);
    Ok(())
}

#[test]
fn revoking_a_workloads_tokens_leaves_those_of_others() -> Result<()> {
    let _deadline = Deadline::new("binding: revoke", LIMIT);
    let guarded = Guarded::builder("bindingrevoke.slice").start()?;
    let workloads = Workloads::of(&guarded)?;
    let (agent, thief) = (Place::root(&workloads.agent), Place::root(&workloads.thief));
    let request = request_of(&guarded, "bob")?;
    let mut kept = thief.call(guarded.addr(), &[], &request)?;
    let mut other = agent.call(guarded.addr(), &[], &request)?;
    let done = guarded.enforcement.cli_json(&["revoke", "--workload", "thief.service"])?;
    assert_eq!((&done["grants_revoked"], &done["connections_closed"]), (&json!(1), &json!(1)), "{done}");
    ensure!(kept.is_closed(TIMEOUT), "its connection lives on");
    assert_eq!(thief.call(guarded.addr(), &[], &request)?.statuses(), [401]);
    assert_eq!(agent.call(guarded.addr(), &[], &request)?.statuses(), [200]);
    ensure!(
        !other.is_closed(std::time::Duration::from_millis(200)),
        "another workload's connection is closed"
    );
    Ok(())
}

/// A user is known when it calls `connect`, so it is let or not let there, also from a cgroup that is new.
#[test]
fn only_users_among_the_callers_may_connect() -> Result<()> {
    let _deadline = Deadline::new("binding: users", LIMIT);
    let guarded = Guarded::builder("bindinguser.slice")
        .policy("workloads", json!([{"name": "nobody", "uid": NOBODY}]))
        .server("callers", json!(["nobody"]))
        .start()?;
    let cgroup = guarded.enforcement.cgroup().child("agent.service")?;
    let (root, nobody) = (Place::root(&cgroup), Place { uid: NOBODY, ..Place::root(&cgroup) });
    let request = request_of(&guarded, "bob")?;
    let refused = || root.refused(guarded.addr()).ok().flatten();
    let error = wait_until("root is not let connect", TIMEOUT, refused)?;
    ensure!(error.contains("EPERM"), "{error}");
    assert_eq!(nobody.call(guarded.addr(), &[], &request)?.statuses(), [200]);
    assert_eq!(nobody.refused(guarded.addr())?, None);
    Ok(())
}

#[test]
fn only_callers_of_the_server_may_connect() -> Result<()> {
    let _deadline = Deadline::new("binding: connect", LIMIT);
    let guarded = Guarded::builder("bindingconnect.slice")
        .policy("workloads", json!([{"name": "agent", "unit": "agent.service"}]))
        .server("callers", json!(["agent"]))
        .server("public_paths", json!(["/healthz"]))
        .start()?;
    let workloads = Workloads::of(&guarded)?;
    let (agent, thief) = (Place::root(&workloads.agent), Place::root(&workloads.thief));
    let request = request_of(&guarded, "bob")?;
    assert_eq!(agent.call(guarded.addr(), &[], &request)?.statuses(), [200]);
    // The cgroup is new: until the daemon has looked, it may connect, and its requests are refused.
    let mut error = None;
    for _ in 0..200 {
        error = thief.refused(guarded.addr())?;
        if error.is_some() {
            break;
        }
        assert_eq!(thief.call(guarded.addr(), &[], &request).map_or(vec![403], |c| c.statuses()), [403]);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    ensure!(error.as_deref().is_some_and(|error| error.contains("EPERM")), "{error:?}");
    // A connection to no address in particular comes here too.
    let anywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), guarded.addr().port());
    ensure!(thief.refused(anywhere)?.is_some_and(|error| error.contains("EPERM")));
    ensure!(guarded.enforcement.counter("connect-refused")? >= 2);
    // Who nobody knows gets nothing either, of public paths neither.
    let mut stranger = Connection::open(guarded.addr(), TIMEOUT)?;
    let public = format!("GET /healthz HTTP/1.1\r\nHost: {}\r\n\r\n", guarded.host());
    assert_eq!(stranger.roundtrip(public.as_bytes())?.status, 403);
    assert_eq!(stranger.roundtrip(&request)?.status, 403);
    assert_eq!(guarded.bytes_read()?, request.len() as u64);
    let log = guarded.enforcement.log()?;
    let line = log.lines().find(|line| line.contains("a process that may not connect was not let"));
    ensure!(line.is_some_and(|line| line.contains("thief.service")), "{log}");
    assert_eq!(agent.call(guarded.addr(), &[], &request)?.statuses(), [200]);
    Ok(())
}
