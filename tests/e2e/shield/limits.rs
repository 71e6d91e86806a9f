//! Limits, quarantine, exceptions, and what operators say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::GuardedBuilder;
use enforcer_tests::guard::{Deadline, NetNs, patience, wait_until};
use enforcer_tests::raw::Connection;
use serde_json::{Value, json};

use crate::common::{LIMIT, TIMEOUT};
use crate::scene::Scene;

#[test]
fn over_its_limit_a_source_makes_no_new_connections_and_open_ones_go_on() -> Result<()> {
    let _deadline = Deadline::new("connections", LIMIT);
    let scene = Scene::new("shield-conn", json!({ "connections": { "rate": "1/h", "burst": 3 } }))?;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(scene.connect_from(2)?);
    }
    scene.is_shut_out(2)?;
    for connection in &mut open {
        scene.serves(connection)?;
    }
    scene.is_served(11)?;
    // Another family, another source.
    let to = scene.server_v6();
    let mut v6 = scene.client.run(|| Connection::open(to, TIMEOUT))??;
    scene.serves(&mut v6)?;
    let dropped = scene.counter("shield-connections")?;
    ensure!(dropped >= 2, "{dropped} SYNs were dropped, of one and its repetitions");
    let interface = scene.interface()?;
    assert_eq!(interface["interface"], json!(scene.pair.interface_a));
    assert_eq!(interface["attached"], json!(true));
    assert_eq!(interface["dropped_by_reason"]["shield-connections"], json!(dropped));
    // A veth's driver can.
    assert_eq!(interface["mode"], json!("native"));
    assert!(matches!(scene.program()?, Some((_, true))));
    Ok(())
}

#[test]
fn over_its_limit_of_packets_a_source_gets_nothing_through_and_others_do() -> Result<()> {
    let _deadline = Deadline::new("packets", LIMIT);
    let scene = Scene::new("shield-pkt", json!({ "packets": { "rate": "1/h", "burst": 40 } }))?;
    let mut connection = scene.connect_from(2)?;
    for _ in 0..100 {
        if scene.counter("shield-packets")? > 0 {
            break;
        }
        connection.send(&scene.request(true, 0)?)?;
        // An answer may not come any more.
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(scene.counter("shield-packets")? > 0, "the limit was never reached");
    scene.is_shut_out(2)?;
    scene.is_served(11)
}

/// Refusals until the source is quarantined, at most so many.
fn fail(scene: &Scene, last: u8, at_most: usize) -> Result<usize> {
    let mut connection = scene.connect_from(last)?;
    for number in 0..at_most {
        // Every other head the kernel has seen before, and refuses by itself.
        let request = scene.request(false, number & !1)?;
        let status = connection.roundtrip(&request).map(|response| response.status);
        match status {
            Ok(status) => ensure!(status == 401, "{status}"),
            Err(_) => return Ok(number),
        }
        if scene.counter("source-quarantined")? > 0 {
            return Ok(number + 1);
        }
    }
    Ok(at_most)
}

fn quarantined(scene: &Scene) -> Result<Vec<Value>> {
    let list = scene.guarded.enforcement.cli_json(&["shield", "list"])?;
    list.get("quarantined").and_then(Value::as_array).cloned().context("no list")
}

#[test]
fn a_source_that_keeps_failing_is_quarantined_for_its_time() -> Result<()> {
    let _deadline = Deadline::new("quarantine", LIMIT);
    let for_s = 12 * patience();
    let quarantine = json!({ "refusals": 9, "within": "1h", "for": format!("{for_s}s") });
    let scene = Scene::new("shield-quar", json!({ "quarantine": quarantine }))?;
    let mut bystander = scene.connect_from(11)?;
    // The client may acknowledge the last one with its next request.
    let refusals = fail(&scene, 2, 100)?;
    ensure!(refusals == 10 || refusals == 11, "{refusals} refusals before the quarantine");
    let counters = scene.guarded.enforcement.counters()?;
    ensure!(counters.kernel("refused") > 0 && counters.kernel("answered") > 0, "{counters:?}");
    let list = quarantined(&scene)?;
    assert_eq!(list.len(), 1, "{list:?}");
    assert_eq!(list[0]["source"], json!(format!("{}/32", scene.address(2))));
    let left = list[0]["ends_in_s"].as_i64().context("no time")?;
    ensure!((0..i64::from(for_s)).contains(&left), "{left}");
    scene.is_shut_out(2)?;
    ensure!(scene.counter("shield-quarantined")? > 0);
    scene.serves(&mut bystander)?;
    scene.is_served(12)?;
    let at_most = Duration::from_secs(for_s.into()) + TIMEOUT;
    wait_until("the quarantine's end", at_most, || scene.is_served(2).ok())?;
    assert_eq!(quarantined(&scene)?, Vec::<Value>::new());
    Ok(())
}

/// Neither a loopback address, nor one of its own by which it calls itself.
#[test]
fn this_host_is_never_quarantined() -> Result<()> {
    let _deadline = Deadline::new("own", LIMIT);
    let quarantine = json!({ "refusals": 2, "within": "1h", "for": "1h" });
    let scene = Scene::new("shield-own", json!({ "quarantine": quarantine }))?;
    let loopback = |address: IpAddr| SocketAddr::new(address, scene.port());
    let own = [
        loopback(Ipv4Addr::LOCALHOST.into()),
        loopback(Ipv6Addr::LOCALHOST.into()),
        scene.server_v4(),
        scene.server_v6(),
    ];
    for to in own {
        // From this process, whom nobody knows there.
        let stream = scene.server.run(|| TcpStream::connect_timeout(&to, TIMEOUT))??;
        let mut connection = Connection::over(stream, TIMEOUT)?;
        for number in 0..8 {
            assert_eq!(connection.roundtrip(&scene.request(false, number)?)?.status, 401, "{to}");
        }
    }
    assert_eq!(quarantined(&scene)?, Vec::<Value>::new());
    // Elsewhere it takes three.
    fail(&scene, 11, 20)?;
    assert_eq!(quarantined(&scene)?.len(), 1);
    scene.is_served(12)
}

/// Nothing of it comes after its requests, not even an acknowledgement of the answers.
#[test]
fn a_client_that_falls_silent_is_quarantined_when_its_connections_end() -> Result<()> {
    let _deadline = Deadline::new("silent", LIMIT);
    let quarantine = json!({ "refusals": 2, "within": "1h", "for": "1h" });
    let scene = Scene::new("shield-mute", json!({ "quarantine": quarantine }))?;
    // The server gives a silent client up after 600 ms.
    scene.server.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_retries2", "1"))??;
    let mut open = (0..3).map(|_| scene.connect_from(11)).collect::<Result<Vec<_>>>()?;
    let (client, server) = (scene.address(11).to_string(), scene.pair.a.0.to_string());
    let lead_astray = |netns: &NetNs, address: &str, interface: &str| {
        let nowhere = "02:00:00:00:00:99";
        netns.ip(&["neigh", "replace", address, "lladdr", nowhere, "dev", interface, "nud", "permanent"])
    };
    lead_astray(&scene.server, &client, &scene.pair.interface_a)?;
    for (number, connection) in open.iter_mut().enumerate() {
        connection.send(&scene.request(false, number)?)?;
    }
    lead_astray(&scene.client, &server, &scene.pair.interface_b)?;
    wait_until("the quarantine", TIMEOUT, || (scene.counter("source-quarantined").ok()? == 1).then_some(()))?;
    assert_eq!(quarantined(&scene)?[0]["source"], json!(format!("{client}/32")));
    scene.client.ip(&["neigh", "del", &server, "dev", &scene.pair.interface_b])?;
    scene.server.ip(&["neigh", "del", &client, "dev", &scene.pair.interface_a])?;
    scene.is_shut_out(11)?;
    scene.is_served(12)
}

#[test]
fn exceptions_are_neither_limited_nor_quarantined() -> Result<()> {
    let _deadline = Deadline::new("exceptions", LIMIT);
    let ends = json!({
        "connections": { "rate": "1/h", "burst": 1 },
        "quarantine": { "refusals": 2, "within": "1h", "for": "1h" },
        "exceptions": ["10.231.0.0/16"],
    });
    let scene = Scene::new("shield-exc", ends)?;
    assert_eq!(fail(&scene, 2, 12)?, 12);
    for _ in 0..5 {
        scene.is_served(2)?;
    }
    assert_eq!(quarantined(&scene)?, Vec::<Value>::new());
    // The IPv6 address is no exception.
    let to = scene.server_v6();
    let mut v6 = scene.client.run(|| Connection::open(to, TIMEOUT))??;
    for number in 0..3 {
        assert_eq!(v6.roundtrip(&scene.request(false, number)?)?.status, 401);
    }
    wait_until("the quarantine", TIMEOUT, || (scene.counter("source-quarantined").ok()? == 1).then_some(()))?;
    let source = IpAddr::V6(Ipv6Addr::from_bits(u128::from_be_bytes(scene.pair.b.1.octets()) >> 64 << 64));
    assert_eq!(quarantined(&scene)?[0]["source"], json!(format!("{source}/64")));
    Ok(())
}

#[test]
fn what_operators_say_goes_before_everything_and_without_a_daemon_too() -> Result<()> {
    let _deadline = Deadline::new("operators", LIMIT);
    let quarantine = json!({ "refusals": 2, "within": "1h", "for": "1h" });
    let mut scene = Scene::new("shield-op", json!({ "quarantine": quarantine }))?;
    let network = format!("{}/24", scene.address(0));
    let shield = |scene: &Scene, arguments: &[&str]| -> Result<Value> {
        scene.guarded.enforcement.cli_json(&[&["shield"], arguments].concat())
    };
    let address = |last| scene.address(last).to_string();
    let (second, eleventh) = (address(2), address(11));
    let mut open = scene.connect_from(12)?;
    shield(&scene, &["add", &network])?;
    shield(&scene, &["add", &eleventh, "--exempt"])?;
    scene.is_shut_out(2)?;
    scene.is_served(11)?;
    // Open connections too.
    let from = SocketAddr::new(scene.address(12), 0);
    open.send(&scene.request(true, 1)?)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(scene.guarded.enforcement.counter("shield-listed")? > 0, "{from}");
    let list = shield(&scene, &["list"])?;
    let said: Vec<_> = list["prefixes"].as_array().context("no list")?.iter().collect();
    assert_eq!(said.len(), 2, "{list}");
    assert_eq!(
        (&said[0]["action"], &said[0]["by"], &said[0]["network"]),
        (&json!("drop"), &json!("operator"), &json!(network))
    );
    scene.guarded.enforcement.kill9()?;
    let removed = shield(&scene, &["remove", &network])?;
    assert_eq!(removed["taken_back"], json!(true));
    ensure!(scene.guarded.enforcement.cli(&["shield", "remove", &network])?.status.code() == Some(1));
    scene.connect_from(2)?;
    shield(&scene, &["add", &second, "--for", "8s"])?;
    scene.is_shut_out(2)?;
    wait_until("its end", TIMEOUT, || scene.connect_from(2).ok())?;
    // The next daemon leaves what was said, and quarantines as before; an operator ends that.
    scene.guarded.enforcement.launch()?;
    scene.is_served(2)?;
    fail(&scene, 2, 20)?;
    scene.is_shut_out(2)?;
    assert_eq!(shield(&scene, &["remove", &network])?["quarantines_ended"], json!(1));
    scene.is_served(2)?;
    assert_eq!(shield(&scene, &["list"])?["prefixes"][0]["network"], json!(format!("{eleventh}/32")));
    Ok(())
}

#[test]
fn in_observe_mode_everything_passes_and_is_counted() -> Result<()> {
    let _deadline = Deadline::new("observe", LIMIT);
    let limits = json!({
        "connections": { "rate": "1/h", "burst": 1 },
        "quarantine": { "refusals": 1, "within": "1h", "for": "1h" },
    });
    let scene = Scene::with("shield-obs", limits, GuardedBuilder::observing)?;
    scene.guarded.enforcement.cli_json(&["shield", "add", &scene.address(11).to_string()])?;
    for number in 0..4 {
        for last in [2, 11] {
            let mut connection = scene.connect_from(last)?;
            assert_eq!(connection.roundtrip(&scene.request(false, number)?)?.status, 200);
        }
    }
    let counters = scene.guarded.enforcement.counters()?;
    ensure!(counters.kernel("shield-would-drop") > 4, "{counters:?}");
    for reason in ["shield-connections", "shield-listed", "source-quarantined", "shield-quarantined"] {
        assert_eq!(counters.kernel(reason), 0, "{reason}");
    }
    Ok(())
}
