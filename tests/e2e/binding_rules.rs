//! How the rules that bind tokens add up, change, and are explained.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use enforcer_tests::caller::{Caller, NOBODY, Place};
use enforcer_tests::enforcement::{Guarded, GuardedBuilder};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, veth_pair};
use enforcer_tests::raw::{Connection, RequestBuilder};
use serde_json::{Value, json};

use common::{LIMIT, TIMEOUT, endless, ends, flows_on, open_stream, policy, tools};

/// Exit code of the command line: the token would be refused.
const REJECTED: i32 = 4;

/// `agent` and `thief` by their units, `nobody` by the user, `here` by the address.
fn workloads() -> Value {
    json!([
        {"name": "agent", "unit": "agent.service"},
        {"name": "thief", "unit": "thief.service"},
        {"name": "nobody", "unit": "agent.service", "uid": NOBODY},
        {"name": "here", "network": ["127.0.0.0/8", "::1"]},
    ])
}

fn guarded(name: &str) -> GuardedBuilder {
    // A slice, so that the units below it are known as such.
    Guarded::builder(&format!("{name}.slice")).policy("workloads", workloads())
}

struct Scene {
    guarded: Guarded,
    agent: Cgroup,
    thief: Cgroup,
    at: SocketAddr,
}

impl Scene {
    fn new(builder: GuardedBuilder, client: IpAddr) -> Result<Self> {
        let guarded = builder.start()?;
        let cgroup = guarded.enforcement.cgroup();
        let (agent, thief) = (cgroup.child("agent.service")?, cgroup.child("thief.service")?);
        let at = SocketAddr::new(client, guarded.addr().port());
        Ok(Self { guarded, agent, thief, at })
    }

    fn local(builder: GuardedBuilder) -> Result<Self> {
        Self::new(builder, Ipv4Addr::LOCALHOST.into())
    }

    fn request(&self, token: Option<&str>) -> Vec<u8> {
        self.guarded.call(token).build()
    }

    fn call(&self, cgroup: &Cgroup, uid: u32, request: &[u8]) -> Result<Caller> {
        Place { uid, ..Place::root(cgroup) }.call(self.at, &[], request)
    }

    fn statuses(&self, cgroup: &Cgroup, uid: u32, request: &[u8]) -> Result<Vec<u16>> {
        Ok(self.call(cgroup, uid, request)?.statuses())
    }
}

#[test]
fn every_rule_about_a_token_must_hold() -> Result<()> {
    let _deadline = Deadline::new("binding: every rule", LIMIT);
    let bind = json!([{"workloads": ["agent", "thief"]}, {"client": "editor", "workloads": "nobody"}, {"workloads": "here"}]);
    let scene = Scene::local(guarded("bindall").policy("bind", bind))?;
    let editor = scene.guarded.mint().claim("client_id", "editor").sign()?;
    let other = scene.guarded.mint().claim("client_id", "other").sign()?;
    let status = |cgroup, uid, token: &str| scene.statuses(cgroup, uid, &scene.request(Some(token)));
    assert_eq!(status(&scene.agent, NOBODY, &editor)?, [200]);
    assert_eq!(status(&scene.agent, 0, &editor)?, [401]);
    assert_eq!(status(&scene.thief, NOBODY, &editor)?, [401]);
    assert_eq!(status(&scene.thief, 0, &other)?, [200]);
    Ok(())
}

#[test]
fn a_new_rule_ends_what_was_opened_before_and_an_old_one_does_not() -> Result<()> {
    let _deadline = Deadline::new("binding: reload", LIMIT);
    let builder = guarded("bindreload").policy("bind", json!([{"workloads": "here"}]));
    let scene = Scene::local(builder.option("--no-watch").recorder(endless()))?;
    let request = scene.request(Some(&scene.guarded.token()?));
    let mut stream = open_stream(Connection::open(scene.at, TIMEOUT)?, &request)?;
    let reload = |bind: Value| -> Result<Value> {
        let next = policy(&scene.guarded, vec![tools(&scene.guarded)]).with("workloads", workloads());
        scene.guarded.enforcement.write_policy(&next.with("bind", bind))?;
        scene.guarded.enforcement.cli_json(&["reload"])
    };
    let here = json!({"workloads": "here"});
    let report = reload(json!([here.clone(), here.clone()]))?;
    assert_eq!((&report["changed"], &report["losses"]), (&json!(true), &json!([])), "{report}");
    flows_on(&mut stream)?;
    let report = reload(json!([here, {"workloads": "agent"}]))?;
    let losses = json!([{ "server": "tools", "reason": "binding-changed", "grants": 1, "flows": 1 }]);
    assert_eq!(report["losses"], losses, "{report}");
    ends(&mut stream)?;
    let mut stranger = Connection::open(scene.at, TIMEOUT)?;
    assert_eq!(stranger.roundtrip(&scene.request(Some(&scene.guarded.token()?)))?.status, 401);
    Ok(())
}

#[test]
fn the_command_line_tells_what_depends_on_the_caller() -> Result<()> {
    let _deadline = Deadline::new("binding: command line", LIMIT);
    let scene = Scene::local(guarded("bindcli").policy("bind", json!([{"workloads": ["nobody", "agent"]}])))?;
    let enforcement = &scene.guarded.enforcement;
    let token = scene.guarded.token()?;
    let explain = |options: &[&str]| -> Result<(Option<i32>, Value)> {
        let arguments = [&["explain", "--server", "tools", "--output", "json"], options].concat();
        let finished = enforcement.cli_with_input(&arguments, token.as_bytes())?;
        Ok((finished.status.code(), serde_json::from_str(&finished.stdout).context(finished.stderr)?))
    };
    let (code, shown) = explain(&[])?;
    assert_eq!((code, &shown["depends_on_caller"]), (Some(0), &json!(true)), "{shown}");
    for options in [["--workload", "agent"], ["--workload", "agent.service"]] {
        let (code, shown) = explain(&options)?;
        assert_eq!((code, &shown["depends_on_caller"]), (Some(0), &json!(false)), "{options:?} {shown}");
    }
    let thief = scene.call(&scene.thief, 0, &scene.request(Some(&token)))?;
    for options in [["--pid", &thief.process.pid().to_string()], ["--from", "192.0.2.1"]] {
        let (code, shown) = explain(&options)?;
        assert_eq!((code, &shown["would_pass"]), (Some(REJECTED), &json!(false)), "{options:?} {shown}");
    }
    // All workloads are there; one that is not is named.
    assert_eq!(enforcement.cli_json(&["status"])?["loaded"]["unmatched_workloads"], json!([]));
    let mut all = workloads();
    all.as_array_mut().context("a list")?.push(json!({"name": "ghost", "unit": "ghost.service"}));
    enforcement.write_policy(&policy(&scene.guarded, vec![tools(&scene.guarded)]).with("workloads", all))?;
    enforcement.cli_json(&["reload"])?;
    assert_eq!(enforcement.cli_json(&["status"])?["loaded"]["unmatched_workloads"], json!(["ghost"]));
    let checked = enforcement.cli(&["check", &enforcement.policy_path().display().to_string()])?;
    ensure!(
        checked.stderr.contains("workload \"ghost\": warning: nothing on this host"),
        "{}",
        checked.stderr
    );
    Ok(())
}

/// What an unknown process of the server's host gets when it calls from that host's own addresses: nothing that needs a name.
fn has_nobodys_name(daemon_knows_the_addresses: bool) -> Result<()> {
    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 55);
    let (clients, servers) = (NetNs::new("here-clients")?, Arc::new(NetNs::new("here-servers")?));
    let pair = veth_pair(&clients, &servers)?;
    servers.ip(&["address", "add", &format!("{OTHER}/32"), "dev", &pair.interface_b])?;
    let mut builder = guarded("bindhere")
        .bind((pair.b.0, 8_080).into())
        .server("hosts", json!(["localhost:8080"]))
        .policy("bind", json!([{"subject": "alice", "first_use": true}]))
        .netns(&servers);
    let mut from = pair.b.0;
    if daemon_knows_the_addresses {
        builder = builder.daemon_netns(&servers);
        from = OTHER;
    }
    let scene = Scene::new(builder, pair.b.0.into())?;
    // Not below the guarded cgroup, so not known.
    let outside = Cgroup::new("bind-stranger")?;
    let at = |netns| Place { netns: Some(netns), ..Place::root(&outside) };
    let request = |subject: &str| -> Result<Vec<u8>> {
        let token = scene.guarded.mint().subject(subject).sign()?;
        Ok(RequestBuilder::mcp_call("localhost:8080", "/mcp", Some(&token), "echo").build())
    };
    let (alice, bob) = (request("alice")?, request("bob")?);
    let from = format!("{from}:0");
    let here = |request: &[u8]| Ok(at(&servers).call(scene.at, &["--from", &from], request)?.statuses());
    let elsewhere = |request: &[u8]| Ok(at(&clients).call(scene.at, &[], request)?.statuses());
    let check = |case: &str, found: Result<Vec<u16>>, status| {
        ensure!(found.as_ref().is_ok_and(|found| *found == [status]), "{case}: {found:?}");
        Ok(())
    };
    check("its first use", here(&alice), 401)?;
    check("first use elsewhere", elsewhere(&alice), 200)?;
    check("an unbound token", here(&bob), 200)?;
    check("an unbound token elsewhere", elsewhere(&bob), 200)?;
    let thief = Place { netns: Some(&clients), ..Place::root(&scene.thief) };
    assert_eq!(thief.call(scene.at, &[], &bob)?.statuses(), [200]);
    scene.guarded.enforcement.cli_json(&["revoke", "--workload", "thief.service"])?;
    check("it may be the thief", here(&bob), 401)?;
    check("one elsewhere is not", elsewhere(&bob), 200)
}

#[test]
fn an_unknown_process_has_nobodys_name_at_the_servers_address() -> Result<()> {
    let _deadline = Deadline::new("binding: the server's address", LIMIT);
    has_nobodys_name(false)
}

#[test]
fn an_unknown_process_has_nobodys_name_at_any_address_of_the_host() -> Result<()> {
    let _deadline = Deadline::new("binding: the host's addresses", LIMIT);
    has_nobodys_name(true)
}
