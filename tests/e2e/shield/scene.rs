//! What the tests share.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Guarded, GuardedBuilder};
use enforcer_tests::guard::{NetNs, VethPair, run, veth_pair};
use enforcer_tests::raw::Connection;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use serde_json::{Value, json};

use crate::common::TIMEOUT;

/// How long a connection that is not to come about is waited for: two repetitions of its SYN.
const REFUSED_AFTER: Duration = Duration::from_millis(3_500);

/// Client and server, each in a network namespace of its own.
pub(crate) struct Scene {
    pub(crate) guarded: Guarded,
    pub(crate) client: Arc<NetNs>,
    pub(crate) server: Arc<NetNs>,
    pub(crate) pair: VethPair,
}

/// The ends, before anything guards.
pub(crate) struct Ends {
    pub(crate) client: Arc<NetNs>,
    pub(crate) server: Arc<NetNs>,
    pub(crate) pair: VethPair,
}

impl Ends {
    /// The client's end has four more IPv4 addresses: its own is `.2`, they are `.11` to `.14`.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let (server, client) = (Arc::new(NetNs::new(name)?), Arc::new(NetNs::new("clients")?));
        let pair = veth_pair(&server, &client)?;
        let ends = Self { client, server, pair };
        for last in 11..15 {
            let address = format!("{}/24", ends.address(last));
            ends.client.ip(&["addr", "add", &address, "dev", &ends.pair.interface_b])?;
        }
        Ok(ends)
    }

    /// The client's address that ends so.
    pub(crate) fn address(&self, last: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.pair.b.0.octets();
        Ipv4Addr::new(a, b, c, last)
    }

    /// The policy's section: these fields, and the server's interface.
    pub(crate) fn shield(&self, mut fields: Value) -> Value {
        fields["interfaces"] = json!([self.pair.interface_a]);
        fields
    }
}

impl Scene {
    /// The server listens on every address.
    pub(crate) fn new(name: &str, fields: Value) -> Result<Self> {
        Self::with(name, fields, |builder| builder)
    }

    pub(crate) fn with(
        name: &str,
        fields: Value,
        change: impl FnOnce(GuardedBuilder) -> GuardedBuilder,
    ) -> Result<Self> {
        let ends = Ends::new(name)?;
        let shield = ends.shield(fields);
        let Ends { client, server, pair } = ends;
        let builder = Guarded::builder(name)
            .bind((Ipv6Addr::UNSPECIFIED, 0).into())
            .netns(&server)
            .daemon_netns(&server)
            .nonblocking()
            .server("hosts", json!(["tools.example"]))
            .policy("shield", shield);
        Ok(Self { guarded: change(builder).start()?, client, server, pair })
    }

    pub(crate) fn port(&self) -> u16 {
        self.guarded.addr().port()
    }

    /// The server's IPv4 address, as clients see it.
    pub(crate) fn server_v4(&self) -> SocketAddr {
        (self.pair.a.0, self.port()).into()
    }

    pub(crate) fn server_v6(&self) -> SocketAddr {
        (self.pair.a.1, self.port()).into()
    }

    /// The client's address that ends so.
    pub(crate) fn address(&self, last: u8) -> IpAddr {
        let [a, b, c, _] = self.pair.b.0.octets();
        Ipv4Addr::new(a, b, c, last).into()
    }

    /// A request to the server, with a good token or a bad one, whose head nobody has seen yet.
    pub(crate) fn request(&self, good: bool, number: usize) -> Result<Vec<u8>> {
        let token = if good { self.guarded.token()? } else { "bad".repeat(200) };
        let request =
            enforcer_tests::raw::RequestBuilder::mcp_call("tools.example", "/mcp", Some(&token), "echo");
        Ok(request.header("X-Number", &number.to_string()).build())
    }

    /// A connection from an address of the client's end.
    pub(crate) fn connect_from(&self, last: u8) -> Result<Connection> {
        let from = self.address(last);
        let to = self.server_v4();
        let stream = self.client.run(|| dial(from, to))??;
        Connection::over(stream, TIMEOUT)
    }

    /// From there no connection comes about.
    pub(crate) fn is_shut_out(&self, last: u8) -> Result<()> {
        ensure!(self.connect_from(last).is_err(), "a connection from {} came about", self.address(last));
        Ok(())
    }

    /// From there a connection comes about, and a good request is served.
    pub(crate) fn is_served(&self, last: u8) -> Result<()> {
        let mut connection =
            self.connect_from(last).with_context(|| format!("from {}", self.address(last)))?;
        self.serves(&mut connection)
    }

    /// A good request on this connection is served.
    pub(crate) fn serves(&self, connection: &mut Connection) -> Result<()> {
        let status = connection.roundtrip(&self.request(true, 0)?)?.status;
        ensure!(status == 200, "{status}");
        Ok(())
    }

    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        self.guarded.enforcement.counter(name)
    }

    /// The interface's row in `enforcer status`.
    pub(crate) fn interface(&self) -> Result<Value> {
        let status = self.guarded.enforcement.cli_json(&["status"])?;
        status.pointer("/loaded/shield/interfaces/0").cloned().context("no interface in the status")
    }

    /// The program that the kernel says is on the server's interface: its number, and whether it is native.
    pub(crate) fn program(&self) -> Result<Option<(u64, bool)>> {
        program_on(&self.server, &self.pair.interface_a)
    }
}

/// The XDP program on an interface.
pub(crate) fn program_on(netns: &NetNs, interface: &str) -> Result<Option<(u64, bool)>> {
    let mut command = Command::new("ip");
    command.args(["-json", "-details", "link", "show", "dev", interface]);
    netns.place(&mut command)?;
    let shown = run("ip link", command, b"", TIMEOUT)?;
    ensure!(shown.status.success(), "{}", shown.stderr);
    let links: Value = serde_json::from_str(&shown.stdout)?;
    let Some(xdp) = links.pointer("/0/xdp") else { return Ok(None) };
    let id = xdp.pointer("/prog/id").and_then(Value::as_u64).context("no program")?;
    // 1: the driver's, 2: generic.
    Ok(Some((id, xdp.get("mode").and_then(Value::as_u64) == Some(1))))
}

/// Connects from an address. Nothing is said to be refused before [`REFUSED_AFTER`].
fn dial(from: IpAddr, to: SocketAddr) -> Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let millis = libc::c_uint::try_from(REFUSED_AFTER.as_millis())?;
    setsockopt(&socket, sockopt::TcpUserTimeout, &millis)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(SocketAddr::new(from, 0)))?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(to))?;
    // What was sent and not acknowledged may take its time from here on.
    setsockopt(&socket, sockopt::TcpUserTimeout, &0)?;
    Ok(socket.into())
}
