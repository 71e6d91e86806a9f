//! Other ways to a server's socket: MPTCP, Fast Open, other namespaces and cgroups, SO_REUSEPORT, splice, lost segments.

#[allow(dead_code, reason = "each test program uses its part")]
mod torture;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Enforcement, skip};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, run, veth_pair, wait_until};
use enforcer_tests::issuer::Issuer;
use enforcer_tests::raw::Connection;
use enforcer_tests::recorder::{Recorder, RemoteRecorder};
use torture::sockets::{ListenerKind, connect_fast_open, connect_mptcp, listener_in};
use torture::{
    Client, PATIENCE, Random, Scene, bad_token, config, enforce, good_token, post, wait_for_no_flows,
};

const LIMIT: Duration = Duration::from_secs(180);

/// A recorder in this process on a listener that belongs to a guarded cgroup.
struct Passed {
    recorder: Recorder,
    enforcement: Enforcement,
    issuer: Issuer,
    _deadline: Deadline,
}

impl Passed {
    fn new(name: &str, netns: Option<&NetNs>, listen: SocketAddr, kind: ListenerKind) -> Result<Self> {
        let deadline = Deadline::new(name, LIMIT);
        let cgroup = Cgroup::new(name)?;
        let listener = listener_in(&cgroup, netns, listen, kind)?;
        let recorder = Recorder::on(listener, config())?;
        let (enforcement, issuer) = enforce(cgroup, &[recorder.addr()])?;
        Ok(Self { recorder, enforcement, issuer, _deadline: deadline })
    }

    /// Good and bad requests over plain TCP are judged as usual.
    fn check_plain_tcp(&self, connection: Connection) -> Result<()> {
        let mut client = Client::on(connection);
        let peer = client.connection.local_addr()?;
        let good = post(&good_token(&self.issuer)?).body(b"{\"id\":1}").build();
        let bad = post(&bad_token(&self.issuer)?).body(b"{\"id\":2}").build();
        for round in 0..3 {
            client.good(&good).with_context(|| format!("round {round}"))?;
            client.refused(&bad, 401).with_context(|| format!("round {round}"))?;
        }
        let expected = good.repeat(3);
        let record = self.recorder.wait_for_bytes(peer, expected.len() as u64, PATIENCE)?;
        ensure!(record.kept == expected, "the server read {:?}", String::from_utf8_lossy(&record.kept));
        Ok(())
    }

    /// No connection read anything that holds this marker.
    fn check_unread(&self, marker: &str) -> Result<()> {
        for record in self.recorder.connections() {
            let read = String::from_utf8_lossy(&record.kept).into_owned();
            ensure!(!read.contains(marker), "the server read {read:?}");
        }
        Ok(())
    }
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// Sets an option of the network namespace that this thread is in.
fn set_sysctl(name: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/net/{name}"), value).with_context(|| format!("cannot set {name}"))
}

#[test]
fn mptcp_on_both_ends_reads_nothing_uninspected() -> Result<()> {
    const NAME: &str = "mptcp_on_both_ends_reads_nothing_uninspected";
    if fs::read_to_string("/proc/sys/net/mptcp/enabled").ok().as_deref().map(str::trim) != Some("1") {
        skip(NAME, "the kernel does not speak MPTCP");
        return Ok(());
    }
    // A namespace of its own: a client whose SYNs are dropped may do without MPTCP for an hour afterwards.
    let netns = NetNs::new("mptcp")?;
    let falls_back = netns.run(|| {
        drop(set_sysctl("mptcp/syn_retrans_before_tcp_fallback", "0"));
        // What the client's kernel knows of SYNs that get lost. One that knows nothing repeats them as they are, to the end.
        let falls_back = set_sysctl("mptcp/blackhole_timeout", "0").is_ok();
        if falls_back { Ok(true) } else { set_sysctl("ipv4/tcp_syn_retries", "1").map(|()| false) }
    })??;
    let kind = ListenerKind { mptcp: true, ..ListenerKind::default() };
    let scene = Passed::new("mptcp", Some(&netns), loopback(), kind)?;
    for (round, good) in [true, false, true].into_iter().enumerate() {
        let token = if good { good_token(&scene.issuer)? } else { bad_token(&scene.issuer)? };
        let request = post(&token).header("X-Marker", if good { "good" } else { "over-mptcp" }).build();
        let connected = netns.run(|| connect_mptcp(scene.recorder.addr()))?;
        if !falls_back {
            ensure!(connected.is_err(), "round {round}: an MPTCP connection came about");
            continue;
        }
        let mut stream = connected.context("connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let peer = stream.local_addr()?;
        stream.write_all(&request)?;
        let mut start = [0; 12];
        stream.read_exact(&mut start).with_context(|| format!("round {round}"))?;
        // It fell back to plain TCP, and was judged.
        let line = String::from_utf8_lossy(&start).into_owned();
        ensure!(line == if good { "HTTP/1.1 200" } else { "HTTP/1.1 401" }, "round {round}: {line}");
        let read = scene.recorder.connection(peer).map(|record| record.kept).unwrap_or_default();
        ensure!(
            if good { read == request } else { read.is_empty() },
            "round {round}: the server read {read:?}"
        );
    }
    ensure!(scene.enforcement.counter("gate-mptcp")? >= 3, "the clients did not ask for MPTCP");
    // Plain clients of the same listener are not held up.
    let plain = scene.enforcement.counter("gate-mptcp")?;
    scene.check_plain_tcp(netns.run(|| Connection::open(scene.recorder.addr(), PATIENCE))??)?;
    ensure!(scene.enforcement.counter("gate-mptcp")? == plain, "a plain SYN was dropped");
    scene.check_unread("over-mptcp")
}

/// An MPTCP connection from before the enforcement has lost its only path, and gets no other.
#[test]
fn an_mptcp_connection_from_before_gets_nothing_more() -> Result<()> {
    let _deadline = Deadline::new("old mptcp", LIMIT);
    let netns = NetNs::new("old-mptcp")?;
    let cgroup = Cgroup::new("oldmptcp")?;
    let kind = ListenerKind { mptcp: true, ..ListenerKind::default() };
    let Ok(listener) = listener_in(&cgroup, Some(&netns), loopback(), kind) else {
        skip("an_mptcp_connection_from_before_gets_nothing_more", "the kernel does not speak MPTCP");
        return Ok(());
    };
    let recorder = Recorder::on(listener, config())?;
    let mut stream = netns.run(|| connect_mptcp(recorder.addr()))?.context("connect")?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let early = b"POST /mcp HTTP/1.1\r\nContent-Length: 5\r\n\r\nearly";
    stream.write_all(early)?;
    let peer = stream.local_addr()?;
    recorder.wait_for_bytes(peer, early.len() as u64, PATIENCE)?;
    let (_enforcement, _issuer) = enforce(cgroup, &[recorder.addr()])?;
    for _ in 0..10 {
        drop(stream.write_all(early));
        thread::sleep(Duration::from_millis(50));
    }
    let read = recorder.connection(peer).context("no record")?.bytes_read;
    ensure!(read == early.len() as u64, "the server read {read} bytes");
    Ok(())
}

#[test]
fn data_in_the_syn_is_judged() -> Result<()> {
    let netns = NetNs::new("fast-open")?;
    let kind = ListenerKind { fast_open: true, ..ListenerKind::default() };
    if let Err(error) = netns.run(|| set_sysctl("ipv4/tcp_fastopen", "3"))? {
        skip("data_in_the_syn_is_judged", &format!("{error:#}"));
        return Ok(());
    }
    let scene = Passed::new("fast-open", Some(&netns), loopback(), kind)?;
    let addr = scene.recorder.addr();
    let known_bad =
        post(&bad_token(&scene.issuer)?).header("X-Marker", "refused-in-the-syn").body(b"{}").build();
    let known = post(&good_token(&scene.issuer)?).body(b"{}").build();
    for round in 0..2 {
        for (request, status) in [
            (known_bad.clone(), 401),
            (known.clone(), 200),
            (post(&good_token(&scene.issuer)?).body(b"{\"fresh\":1}").build(), 200),
            (
                post(&bad_token(&scene.issuer)?).header("X-Marker", "refused-in-the-syn").body(b"{}").build(),
                401,
            ),
        ] {
            let (mut stream, sent) =
                netns.run(|| connect_fast_open(addr, &request))?.context("MSG_FASTOPEN")?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(request.get(sent..).unwrap_or_default())?;
            let mut start = [0; 12];
            stream
                .read_exact(&mut start)
                .with_context(|| format!("round {round}, {status} expected, {sent} bytes in the SYN"))?;
            let line = String::from_utf8_lossy(&start).into_owned();
            ensure!(line == format!("HTTP/1.1 {status}"), "round {round}: {line:?} in place of {status}");
            let peer = stream.local_addr()?;
            if status == 200 {
                let record = scene.recorder.wait_for_bytes(peer, request.len() as u64, PATIENCE)?;
                ensure!(record.kept == request, "round {round}: the server read something else");
            }
        }
    }
    scene.check_unread("refused-in-the-syn")?;
    // Taken at once, or dropped, and then sent again behind the handshake: either way, segments with SYN and data were sent.
    let names = ["TCPFastOpenPassive", "TCPFastOpenActive", "TCPFastOpenActiveFail"];
    let counts = names.map(|name| netns.tcp_counter(name).unwrap_or(0));
    ensure!(counts.iter().sum::<u64>() > 0, "no data was in a SYN, so the test proves nothing: {counts:?}");
    println!("{names:?}: {counts:?}");
    Ok(())
}

#[test]
fn lost_reordered_and_repeated_segments_change_nothing() -> Result<()> {
    let (server_side, client_side) = (NetNs::new("server")?, NetNs::new("client")?);
    let pair = veth_pair(&server_side, &client_side)?;
    for (netns, interface) in [(&client_side, &pair.interface_b), (&server_side, &pair.interface_a)] {
        let mut tc = std::process::Command::new("tc");
        tc.args(["qdisc", "add", "dev", interface, "root", "netem", "delay", "2ms", "1ms"]);
        tc.args(["reorder", "25%", "50%", "duplicate", "10%", "loss", "2%"]);
        netns.place(&mut tc)?;
        let made = run("tc", tc, b"", PATIENCE).map_err(|error| format!("{error:#}"));
        let made = made.and_then(|tc| if tc.status.success() { Ok(()) } else { Err(tc.stderr) });
        if let Err(reason) = made {
            skip("lost_reordered_and_repeated_segments_change_nothing", reason.trim());
            return Ok(());
        }
    }
    exchange_over_veth("netem", &server_side, &client_side, &format!("{}:0", pair.a.0), 12, 40_000)
}

#[test]
fn a_server_in_another_network_namespace_is_guarded() -> Result<()> {
    let (server_side, client_side) = (NetNs::new("server")?, NetNs::new("client")?);
    let pair = veth_pair(&server_side, &client_side)?;
    for listen in [format!("{}:0", pair.a.0), format!("[{}]:0", pair.a.1)] {
        exchange_over_veth("netns", &server_side, &client_side, &listen, 20, 300_000)?;
    }
    Ok(())
}

fn exchange_over_veth(
    name: &str,
    server_side: &NetNs,
    client_side: &NetNs,
    listen: &str,
    rounds: usize,
    longest: usize,
) -> Result<()> {
    let scene = Scene::with(name, LIMIT, listen, Some(server_side))?;
    let mut random = Random::new(40);
    let known = scene.token()?;
    let open = || -> Result<Client> {
        Ok(Client::on(client_side.run(|| Connection::open(scene.addr(), PATIENCE))??))
    };
    let mut client = open()?;
    for round in 0..rounds {
        let body = random.bytes(random.clone().below(longest));
        for token in [known.clone(), scene.token()?] {
            let request = post(&token).body(&body).build();
            let cut = random.segmentation(request.len(), 8);
            client
                .good_cut(&request, &cut, Duration::ZERO)
                .with_context(|| format!("{listen}, round {round}"))?;
        }
        let bad = post(&scene.bad_token()?).body(&random.bytes(200)).build();
        client
            .refused_cut(&bad, &random.segmentation(bad.len(), 4), 401)
            .with_context(|| format!("{listen}, {round}"))?;
        if round % 4 == 3 {
            std::mem::replace(&mut client, open()?).finish(&scene)?;
        }
    }
    client.finish(&scene)?;
    wait_for_no_flows(&scene.enforcement)
}

#[test]
fn a_server_in_a_nested_cgroup_is_guarded() -> Result<()> {
    let _deadline = Deadline::new("nested", LIMIT);
    let parent = Cgroup::new("nested")?;
    let child = parent.child("inner")?;
    let grandchild = child.child("innermost")?;
    let server = RemoteRecorder::spawn(loopback(), &config(), Some(&grandchild), None)?;
    let (enforcement, issuer) = enforce(parent, &[server.addr()])?;
    let mut connection = Connection::open(server.addr(), PATIENCE)?;
    let peer = connection.local_addr()?;
    let good = post(&good_token(&issuer)?).body(b"{}").build();
    ensure!(connection.roundtrip(&good)?.status == 200, "a good token");
    ensure!(
        connection.roundtrip(&post(&bad_token(&issuer)?).body(b"{}").build())?.status == 401,
        "a bad token"
    );
    ensure!(connection.roundtrip(&good)?.status == 200, "a good token again");
    let record = server.wait_for_bytes(peer, 2 * good.len() as u64, PATIENCE)?;
    ensure!(record.kept == good.repeat(2), "the server read {:?}", String::from_utf8_lossy(&record.kept));
    drop(connection);
    drop(server);
    wait_for_no_flows(&enforcement)?;
    // Inside out: a cgroup with children can't be removed.
    drop((grandchild, child));
    Ok(())
}

#[test]
fn every_socket_of_a_reuseport_group_is_guarded() -> Result<()> {
    let deadline = Deadline::new("reuseport", LIMIT);
    let cgroup = Cgroup::new("reuseport")?;
    let kind = ListenerKind { reuse_port: true, ..ListenerKind::default() };
    let first = Recorder::on(listener_in(&cgroup, None, loopback(), kind)?, config())?;
    let second = Recorder::on(listener_in(&cgroup, None, first.addr(), kind)?, config())?;
    let (enforcement, issuer) = enforce(cgroup, &[first.addr()])?;
    let known = post(&good_token(&issuer)?).body(b"{}").build();
    for _ in 0..64 {
        let mut connection = Connection::open(first.addr(), PATIENCE)?;
        let peer = connection.local_addr()?;
        let bad = post(&bad_token(&issuer)?).header("X-Marker", "refused").body(b"{}").build();
        ensure!(connection.roundtrip(&bad)?.status == 401, "a bad token");
        ensure!(connection.roundtrip(&known)?.status == 200, "a good token");
        let record = first.connection(peer).or_else(|| second.connection(peer)).context("no record")?;
        ensure!(record.kept == known, "the server read {:?}", String::from_utf8_lossy(&record.kept));
    }
    ensure!(
        !first.connections().is_empty() && !second.connections().is_empty(),
        "one listener took all connections"
    );
    drop((first, second));
    wait_for_no_flows(&enforcement)?;
    drop(deadline);
    Ok(())
}

#[test]
fn a_server_that_is_started_again_is_guarded_again() -> Result<()> {
    let mut scene = Scene::new("restarted", LIMIT)?;
    let addr = scene.addr();
    let known = scene.token()?;
    for round in 0..5 {
        let mut client = scene.client()?;
        client.good(&post(&known).body(b"{}").build()).with_context(|| format!("round {round}"))?;
        client
            .refused(&post(&scene.bad_token()?).body(b"{}").build(), 401)
            .with_context(|| format!("round {round}"))?;
        client.verify(&scene)?;
        scene.server.process().kill()?;
        client.connection.expect_closed()?;
        let cgroup = scene.enforcement.cgroup();
        scene.server = wait_until("the server again", PATIENCE, || {
            RemoteRecorder::spawn(addr, &config(), Some(cgroup), None).ok()
        })?;
    }
    scene.check_alive()
}

/// A guarded socket's bytes are not in its receive queue, where splice(2) looks for them: such a server gets nothing, and so
/// nothing unjudged. On a blocking socket it waits for ever; here it does not block. `read` on the same socket works.
#[test]
fn a_server_that_splices_gets_nothing_unjudged() -> Result<()> {
    let _deadline = Deadline::new("splice", LIMIT);
    let cgroup = Cgroup::new("splice")?;
    let listener: TcpListener = listener_in(&cgroup, None, loopback(), ListenerKind::default())?;
    let (_enforcement, issuer) = enforce(cgroup, &[listener.local_addr()?])?;
    for good in [false, true, true] {
        let token = if good { good_token(&issuer)? } else { bad_token(&issuer)? };
        let request = post(&token).body(b"{\"spliced\":true}").build();
        let mut client = Connection::open(listener.local_addr()?, PATIENCE)?;
        let (accepted, _) = listener.accept()?;
        client.send(&request)?;
        if !good {
            ensure!(client.read_response()?.status == 401, "a bad token");
        }
        thread::sleep(Duration::from_millis(300));
        // SPLICE_F_NONBLOCK is about the pipe; whether splice waits for the socket is the socket's own flag.
        accepted.set_nonblocking(true)?;
        let spliced = splice_once(&accepted)?;
        ensure!(
            spliced.is_empty() || (good && request.starts_with(&spliced)),
            "it spliced {} bytes",
            spliced.len()
        );
        if good && spliced.is_empty() {
            let mut accepted = accepted;
            accepted.set_nonblocking(false)?;
            accepted.set_read_timeout(Some(PATIENCE))?;
            let mut read = vec![0; request.len()];
            accepted.read_exact(&mut read).context("read after splice")?;
            ensure!(read == request, "read gave other bytes");
        }
    }
    Ok(())
}

/// What one splice(2) that does not wait takes from the socket.
fn splice_once(socket: &TcpStream) -> Result<Vec<u8>> {
    let (mut reader, writer) = std::io::pipe()?;
    // SAFETY: both descriptors are open; no offsets are given.
    let moved = unsafe {
        libc::splice(
            socket.as_raw_fd(),
            std::ptr::null_mut(),
            writer.as_raw_fd(),
            std::ptr::null_mut(),
            1 << 16,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    let Ok(moved) = usize::try_from(moved) else {
        let error = std::io::Error::last_os_error();
        ensure!(error.kind() == ErrorKind::WouldBlock, "splice: {error}");
        return Ok(Vec::new());
    };
    let mut bytes = vec![0; moved];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}
