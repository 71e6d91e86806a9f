//! What is no plain TCP.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Enforcement, IssuerSpec, PolicySpec, ServerSpec, skip};
use enforcer_tests::frame::{Frame, SYN};
use enforcer_tests::guard::{Cgroup, Deadline, wait_until};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::link::Link;
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::Recorder;
use serde_json::json;

use crate::common::{LIMIT, TIMEOUT};
use crate::scene::{Ends, Scene};
use crate::torture::config;
use crate::torture::sockets::{ListenerKind, connect_mptcp, listener_in};

#[test]
fn datagrams_to_protected_ports_are_dropped_in_generic_mode_too() -> Result<()> {
    let _deadline = Deadline::new("datagrams", LIMIT);
    let scene = Scene::new("shield-udp", json!({ "attach": "generic" }))?;
    assert_eq!(scene.interface()?["mode"], json!("generic"));
    assert!(matches!(scene.program()?, Some((_, false))));
    let port = scene.port();
    let here: IpAddr = scene.pair.a.0.into();
    // In this process, which the enforcement does not guard: only the shield can drop it.
    let (protected, other) = scene.server.run(|| -> std::io::Result<_> {
        Ok((UdpSocket::bind((here, port))?, UdpSocket::bind((here, 0))?))
    })??;
    let elsewhere = other.local_addr()?;
    scene.client.run(|| -> Result<()> {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        for _ in 0..5 {
            socket.send_to(b"quic", (here, port))?;
            socket.send_to(b"dns", elsewhere)?;
        }
        Ok(())
    })??;
    let mut buffer = [0; 16];
    for _ in 0..5 {
        other.set_read_timeout(Some(TIMEOUT))?;
        assert_eq!(other.recv(&mut buffer)?, 3);
    }
    protected.set_nonblocking(true)?;
    ensure!(protected.recv(&mut buffer).is_err(), "a datagram arrived");
    assert_eq!(scene.counter("shield-datagram")?, 5);
    scene.is_served(2)
}

/// The client's kernel would repeat a SYN that is dropped after a second, and say MPTCP again.
#[test]
fn mptcp_clients_fall_back_at_once() -> Result<()> {
    const NAME: &str = "mptcp_clients_fall_back_at_once";
    let _deadline = Deadline::new("mptcp", LIMIT);
    let ends = Ends::new("shield-mptcp")?;
    let cgroup = Cgroup::new("shield-mptcp")?;
    let kind = ListenerKind { mptcp: true, ..ListenerKind::default() };
    let Ok(listener) = listener_in(&cgroup, Some(&ends.server), (ends.pair.a.0, 0).into(), kind) else {
        skip(NAME, "the kernel does not speak MPTCP");
        return Ok(());
    };
    let recorder = Recorder::on(listener, config())?;
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    let server = ServerSpec::new("tools", &[recorder.addr()], "https://mcp.example.com/mcp");
    let policy = PolicySpec::new(vec![IssuerSpec::from_file("corp", &issuer)], vec![server])
        .with("shield", ends.shield(json!({})));
    let mut enforcement = Enforcement::prepare(cgroup, &policy, &["--drain-timeout", "1"])?;
    enforcement.live_in(&ends.server);
    enforcement.launch()?;
    let began = Instant::now();
    let stream = ends.client.run(|| connect_mptcp(recorder.addr()))?.context("connect")?;
    let took = began.elapsed();
    ensure!(took < Duration::from_millis(900), "the connection took {took:?}: a SYN was repeated");
    let token = issuer.mint().audience("https://mcp.example.com/mcp").sign()?;
    let request =
        RequestBuilder::mcp_call(&recorder.addr().to_string(), "/mcp", Some(&token), "echo").build();
    let mut connection = Connection::over(stream, TIMEOUT)?;
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    assert_eq!(enforcement.counter("shield-mptcp")?, 1);
    assert_eq!(enforcement.counter("gate-mptcp")?, 0, "the gate had to drop it");
    assert_eq!(enforcement.counter("socket-fenced")?, 0);
    assert_eq!(enforcement.counter("flow-tagged")?, 1);
    Ok(())
}

#[test]
fn tagged_frames_are_looked_at() -> Result<()> {
    let _deadline = Deadline::new("tagged", LIMIT);
    let scene = Scene::new("shield-vlan", json!({}))?;
    let link = scene.client.run(|| Link::open(&scene.pair.interface_b))??;
    let (from, to) = ((scene.address(2), 40_000).into(), scene.server_v4());
    let elsewhere = SocketAddr::new(to.ip(), to.port() ^ 1);
    for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100]] {
        for to in [to, elsewhere] {
            link.send(&Frame::udp(from, to).tags(tags).build())?;
        }
        // It ends in the middle of its TCP header.
        link.send(&Frame::tcp(from, to, SYN).tags(tags).build()[..14 + tags.len() * 4 + 30])?;
    }
    wait_until("the frames", TIMEOUT, || (scene.counter("shield-unreadable").ok()? == 3).then_some(()))?;
    assert_eq!(scene.counter("shield-datagram")?, 3);
    scene.is_served(2)
}

/// Interfaces of a VLAN on both ends: whether the tag stands in the frame or beside it is the kernel's affair.
#[test]
fn a_vlan_on_the_interface_is_no_way_around() -> Result<()> {
    const NAME: &str = "a_vlan_on_the_interface_is_no_way_around";
    let _deadline = Deadline::new("vlan", LIMIT);
    let scene = Scene::new("shield-vlandev", json!({}))?;
    let ends = [
        (&scene.server, &scene.pair.interface_a, "192.0.2.1/24"),
        (&scene.client, &scene.pair.interface_b, "192.0.2.2/24"),
    ];
    for (netns, interface, address) in ends {
        if let Err(error) =
            netns.ip(&["link", "add", "link", interface, "name", "vlan7", "type", "vlan", "id", "7"])
        {
            skip(NAME, &format!("no VLAN can be made: {error:#}"));
            return Ok(());
        }
        netns.ip(&["addr", "add", address, "dev", "vlan7"])?;
        netns.ip(&["link", "set", "vlan7", "up"])?;
    }
    let to = SocketAddr::from(([192, 0, 2, 1], scene.port()));
    scene.client.run(|| UdpSocket::bind(("0.0.0.0", 0))?.send_to(b"quic", to))??;
    wait_until("the datagram", TIMEOUT, || (scene.counter("shield-datagram").ok()? == 1).then_some(()))?;
    let connect = |limit| scene.client.run(|| TcpStream::connect_timeout(&to, limit));
    scene.serves(&mut Connection::over(connect(TIMEOUT)??, TIMEOUT)?)?;
    scene.guarded.enforcement.cli_json(&["shield", "add", "192.0.2.2"])?;
    ensure!(connect(Duration::from_millis(1_500))?.is_err(), "a listed source connected");
    scene.is_served(2)
}

/// A datagram that the client's kernel takes apart.
#[test]
fn fragments_arrive_where_nothing_is_protected_and_not_where_something_is() -> Result<()> {
    let _deadline = Deadline::new("fragments", LIMIT);
    let scene = Scene::new("shield-frag", json!({ "packets": { "rate": "1000/s", "burst": 1000 } }))?;
    let (there, payload) = (scene.pair.a.0, vec![7_u8; 6_000]);
    let bind = |port| scene.server.run(|| UdpSocket::bind((there, port)));
    let (other, protected) = (bind(0)??, bind(scene.port())??);
    for receiver in [&other, &protected] {
        let to = receiver.local_addr()?;
        scene.client.run(|| UdpSocket::bind(("0.0.0.0", 0))?.send_to(&payload, to))??;
    }
    let mut buffer = vec![0; 8_000];
    other.set_read_timeout(Some(TIMEOUT))?;
    assert_eq!(other.recv(&mut buffer)?, payload.len());
    // Its first fragment was dropped, so the others are nothing.
    wait_until("the first fragment", TIMEOUT, || {
        (scene.counter("shield-datagram").ok()? == 1).then_some(())
    })?;
    protected.set_read_timeout(Some(Duration::from_millis(300)))?;
    ensure!(protected.recv(&mut buffer).is_err(), "a datagram arrived");
    Ok(())
}
