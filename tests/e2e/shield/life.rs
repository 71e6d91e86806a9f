//! From the start to the end, over deaths, restarts and reloads.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Enforcement, IssuerSpec, PolicySpec, ServerSpec, skip};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, join, wait_until};
use enforcer_tests::issuer::{Alg, Issuer};
use serde_json::{Value, json};

use crate::common::{LIMIT, TIMEOUT};
use crate::scene::{Scene, program_on};

/// The scene's policy with another section, or none.
fn policy(scene: &Scene, shield: Option<Value>) -> PolicySpec {
    let listen = scene.guarded.addr();
    let server = ServerSpec::new("tools", &[listen], "https://mcp.example.com/mcp")
        .with("hosts", json!(["tools.example"]));
    let policy = PolicySpec::new(vec![IssuerSpec::from_file("corp", &scene.guarded.issuer)], vec![server]);
    match shield {
        Some(shield) => policy.with("shield", shield),
        None => policy,
    }
}

#[test]
fn it_stays_when_the_daemon_dies_and_goes_with_the_enforcement() -> Result<()> {
    let _deadline = Deadline::new("life", LIMIT);
    let mut scene =
        Scene::with("shield-life", json!({ "connections": { "rate": "1/h", "burst": 2 } }), |builder| {
            builder.option("--replace-programs")
        })?;
    let (first, native) = scene.program()?.context("no program")?;
    ensure!(native);
    scene.is_served(2)?;
    scene.guarded.enforcement.kill9()?;
    assert_eq!(scene.program()?, Some((first, true)), "the daemon's death took it along");
    scene.connect_from(2)?;
    scene.is_shut_out(2)?;
    let dropped = scene.counter("shield-connections")?;
    // The next daemon puts its own program in the place of that one; what was counted and charged stays.
    scene.guarded.enforcement.launch()?;
    let (second, _) = scene.program()?.context("no program")?;
    ensure!(second != first, "the program was not replaced");
    ensure!(scene.counter("shield-connections")? >= dropped);
    scene.is_shut_out(2)?;
    scene.is_served(11)?;
    scene.guarded.enforcement.stop()?;
    assert_eq!(scene.program()?, None, "it stayed behind");
    assert_eq!(scene.guarded.enforcement.leftover_pins(), Vec::<PathBuf>::new());
    scene.connect_from(2)?;
    Ok(())
}

#[test]
fn another_policy_changes_limits_at_once_and_takes_interfaces_off_but_adds_none() -> Result<()> {
    let _deadline = Deadline::new("reload", LIMIT);
    let scene = Scene::new("shield-load", json!({ "connections": { "rate": "1/h", "burst": 1 } }))?;
    let interface = scene.pair.interface_a.clone();
    let reload = |shield: Option<Value>| {
        scene.guarded.enforcement.write_policy(&policy(&scene, shield))?;
        scene.guarded.enforcement.cli(&["reload"])
    };
    scene.is_served(2)?;
    scene.is_shut_out(2)?;
    let wider = json!({ "interfaces": [interface], "connections": { "rate": "1/h", "burst": 1000 }, "exceptions": ["192.0.2.0/24"] });
    let done = reload(Some(wider.clone()))?;
    ensure!(done.status.success(), "{}", done.stderr);
    scene.is_served(2)?;
    let list = scene.guarded.enforcement.cli_json(&["shield", "list"])?;
    assert_eq!(list["prefixes"][0]["by"], json!("policy"), "{list}");
    // One more interface needs a program attached, which a daemon that runs can't do.
    let mut more = wider;
    more["interfaces"] = json!([interface, "other0"]);
    let refused = reload(Some(more))?;
    ensure!(
        !refused.status.success() && refused.stderr.contains("start the daemon again"),
        "{}",
        refused.stderr
    );
    ensure!(refused.stderr.contains("other0"), "{}", refused.stderr);
    let done = reload(None)?;
    ensure!(done.status.success(), "{}", done.stderr);
    wait_until("the interface is free", TIMEOUT, || scene.program().ok()?.is_none().then_some(()))?;
    scene.is_served(2)?;
    let status = scene.guarded.enforcement.cli_json(&["status"])?;
    assert_eq!(status["loaded"]["shield"]["interfaces"], json!([]));
    assert_eq!(scene.guarded.enforcement.cli_json(&["shield", "list"])?["prefixes"], json!([]));
    Ok(())
}

#[test]
fn a_start_with_another_policy_attaches_what_is_missing_and_connections_go_on() -> Result<()> {
    let _deadline = Deadline::new("restart", LIMIT);
    let mut scene =
        Scene::with("shield-start", json!({ "attach": "generic" }), |builder| builder.option("--keep"))?;
    assert!(matches!(scene.program()?, Some((_, false))));
    let mut open = scene.connect_from(2)?;
    scene.serves(&mut open)?;
    scene.guarded.enforcement.stop()?;
    let shield = json!({ "interfaces": [scene.pair.interface_a], "attach": "native" });
    scene.guarded.enforcement.write_policy(&policy(&scene, Some(shield)))?;
    scene.guarded.enforcement.launch()?;
    assert!(matches!(scene.program()?, Some((_, true))));
    assert_eq!(scene.interface()?["mode"], json!("native"));
    scene.serves(&mut open)
}

#[test]
fn an_interface_that_is_missing_or_goes_away_is_said() -> Result<()> {
    let _deadline = Deadline::new("missing", LIMIT);
    let mut scene = Scene::with("shield-gone", json!({}), |builder| builder.option("--keep"))?;
    scene.guarded.enforcement.stop()?;
    // With the pair goes the program.
    scene.server.ip(&["link", "del", &scene.pair.interface_a])?;
    let row = scene.interface()?;
    assert_eq!((&row["attached"], &row["interface"]), (&json!(false), &json!(scene.pair.interface_a)));
    let shown = scene.guarded.enforcement.cli(&["status"])?.stdout;
    ensure!(shown.contains("GONE"), "{shown}");
    let mut daemon = scene.guarded.enforcement.spawn_daemon()?;
    ensure!(!daemon.wait(TIMEOUT)?.success(), "it started without its interface");
    let log = daemon.stderr();
    ensure!(log.contains(&scene.pair.interface_a) && log.contains("ip link"), "{log}");
    // What guards goes on.
    let status = scene.guarded.enforcement.cli_json(&["status"])?;
    assert_eq!(status["state"], json!("enforcing"));
    ensure!(program_on(&scene.server, "lo")?.is_none());
    Ok(())
}

/// The kernel updates no link whose interface is gone.
#[test]
fn a_start_that_replaces_programs_shields_an_interface_that_came_back() -> Result<()> {
    let _deadline = Deadline::new("came back", LIMIT);
    let mut scene = Scene::with("shield-back", json!({}), |builder| {
        builder.option("--keep").option("--replace-programs")
    })?;
    scene.guarded.enforcement.stop()?;
    scene.server.ip(&["link", "del", &scene.pair.interface_a])?;
    join(&scene.server, &scene.client, &scene.pair)?;
    assert_eq!(scene.program()?, None);
    scene.guarded.enforcement.launch()?;
    ensure!(scene.program()?.is_some(), "the new interface has no shield");
    let status = scene.guarded.enforcement.cli_json(&["status"])?;
    let interfaces = status.pointer("/loaded/shield/interfaces").and_then(Value::as_array);
    assert_eq!(interfaces.context("no interfaces")?.len(), 1, "{status}");
    assert_eq!(scene.interface()?["attached"], json!(true));
    scene.is_served(2)
}

#[test]
fn an_interface_without_ethernet_headers_ends_the_start() -> Result<()> {
    const NAME: &str = "an_interface_without_ethernet_headers_ends_the_start";
    let _deadline = Deadline::new("tunnel", LIMIT);
    let netns = Arc::new(NetNs::new("shield-tun")?);
    if let Err(error) = netns.ip(&["tuntap", "add", "dev", "tunnel0", "mode", "tun"]) {
        skip(NAME, &format!("no tunnel can be made: {error:#}"));
        return Ok(());
    }
    // By its own name the policy may not name it.
    netns.ip(&["link", "set", "lo", "down"])?;
    netns.ip(&["link", "set", "lo", "name", "back0"])?;
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    for (interface, said) in [("tunnel0", "not an Ethernet interface"), ("back0", "a loopback interface")] {
        let server = ServerSpec::new("tools", &[([127, 0, 0, 1], 9).into()], "https://mcp.example.com/mcp");
        let policy = PolicySpec::new(vec![IssuerSpec::from_file("corp", &issuer)], vec![server])
            .with("shield", json!({ "interfaces": [interface] }));
        let mut enforcement =
            Enforcement::prepare(Cgroup::new("shield-tun")?, &policy, &["--drain-timeout", "0"])?;
        enforcement.live_in(&netns);
        let mut daemon = enforcement.spawn_daemon()?;
        ensure!(!daemon.wait(LIMIT)?.success(), "it started with {interface}");
        let log = daemon.stderr();
        ensure!(log.contains(interface) && log.contains(said), "{log}");
        assert_eq!(enforcement.leftover_pins(), Vec::<PathBuf>::new());
    }
    Ok(())
}

/// A dummy interface's driver can't run programs.
#[test]
fn a_start_that_is_refused_the_other_way_leaves_the_interface_as_it_was() -> Result<()> {
    const NAME: &str = "a_start_that_is_refused_the_other_way_leaves_the_interface_as_it_was";
    let _deadline = Deadline::new("refused", LIMIT);
    let mut scene = Scene::with("shield-mode", json!({}), |builder| builder.option("--keep"))?;
    if let Err(error) = scene.server.ip(&["link", "add", "driverless0", "type", "dummy"]) {
        skip(NAME, &format!("no such interface can be made: {error:#}"));
        return Ok(());
    }
    let attach = |mode: &str| json!({ "interfaces": ["driverless0"], "attach": mode });
    scene.guarded.enforcement.stop()?;
    scene.guarded.enforcement.write_policy(&policy(&scene, Some(attach("generic"))))?;
    scene.guarded.enforcement.launch()?;
    assert!(matches!(program_on(&scene.server, "driverless0")?, Some((_, false))));
    scene.guarded.enforcement.stop()?;
    scene.guarded.enforcement.write_policy(&policy(&scene, Some(attach("native"))))?;
    let mut daemon = scene.guarded.enforcement.spawn_daemon()?;
    ensure!(!daemon.wait(TIMEOUT)?.success(), "a driver ran the program");
    let log = daemon.stderr();
    ensure!(log.contains("cannot attach") && log.contains("driverless0"), "{log}");
    assert!(matches!(program_on(&scene.server, "driverless0")?, Some((_, false))));
    let row = scene.interface()?;
    assert_eq!((&row["attached"], &row["mode"]), (&json!(true), &json!("generic")));
    Ok(())
}

/// Whoever came first keeps the interface; a start that finds nothing leaves nothing.
#[test]
fn an_interface_with_another_program_ends_the_start_and_keeps_it() -> Result<()> {
    let _deadline = Deadline::new("occupied", LIMIT);
    let scene = Scene::new("shield-busy", json!({}))?;
    let program = scene.program()?;
    let listen = SocketAddr::new(scene.server_v4().ip(), 9);
    let server = ServerSpec::new("other", &[listen], "https://other.example.com/mcp");
    let other = PolicySpec::new(vec![IssuerSpec::from_file("corp", &scene.guarded.issuer)], vec![server])
        .with("shield", json!({ "interfaces": [scene.pair.interface_a] }));
    let mut second = Enforcement::prepare(Cgroup::new("shield-second")?, &other, &["--drain-timeout", "1"])?;
    second.live_in(&scene.server);
    let mut daemon = second.spawn_daemon()?;
    ensure!(!daemon.wait(LIMIT)?.success(), "two shields on one interface");
    let log = daemon.stderr();
    ensure!(log.contains("cannot attach") && log.contains(&scene.pair.interface_a), "{log}");
    assert_eq!(second.leftover_pins(), Vec::<PathBuf>::new());
    assert_eq!(scene.program()?, program);
    scene.is_served(2)
}

/// From a policy that nobody knows any more nothing is adopted: what takes over brings the interface and what operators said along.
#[test]
fn what_takes_over_keeps_interfaces_and_what_operators_said() -> Result<()> {
    let _deadline = Deadline::new("take over", LIMIT);
    let mut scene = Scene::with("shield-over", json!({}), |builder| builder.option("--keep"))?;
    let (first, _) = scene.program()?.context("no program")?;
    scene.guarded.enforcement.cli_json(&["shield", "add", &scene.address(2).to_string()])?;
    scene.guarded.enforcement.stop()?;
    std::fs::remove_file(scene.guarded.enforcement.state_dir().join("policy.json"))?;
    let shield = json!({ "interfaces": [scene.pair.interface_a], "packets": { "rate": "1000000/s" } });
    scene.guarded.enforcement.write_policy(&policy(&scene, Some(shield)))?;
    scene.guarded.enforcement.launch()?;
    let log = scene.guarded.enforcement.log()?;
    ensure!(log.contains("taking over") && !log.contains("shield attached"), "{log}");
    let (second, _) = scene.program()?.context("no program")?;
    ensure!(second != first, "the old program stayed");
    scene.is_shut_out(2)?;
    scene.is_served(11)?;
    let row = scene.interface()?;
    assert_eq!((&row["attached"], &row["mode"]), (&json!(true), &json!("native")));
    scene.guarded.enforcement.cli_json(&["unload", "--even-if-running", "--drain-timeout", "0"])?;
    assert_eq!(scene.program()?, None);
    Ok(())
}
