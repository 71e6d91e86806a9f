//! Address families, wildcard listeners, and servers that share an endpoint.

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use enforcer_tests::enforcement::{Enforcement, Guarded, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::{Cgroup, Deadline};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use serde_json::json;

use common::{LIMIT, TIMEOUT};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const ANY_V4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const ANY_V6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// A server bound to `bind`, a policy that names `listen`: from each of `clients` a good token passes, as it was sent,
/// and a request without one is refused, by the daemon and by the kernel, unread.
fn guards(name: &str, bind: IpAddr, listen: IpAddr, clients: &[IpAddr]) -> Result<()> {
    let _deadline = Deadline::new(name, LIMIT);
    let guarded = Guarded::builder(name).bind((bind, 0).into()).policy_listen((listen, 0).into()).start()?;
    let port = guarded.addr().port();
    let token = guarded.token()?;
    for client in clients {
        let to = SocketAddr::new(*client, port);
        // The name under which policy's default hosts know every loopback client.
        let host = format!("localhost:{port}");
        let call = |token| RequestBuilder::mcp_call(&host, "/mcp", token, &format!("echo-{client}")).build();
        let mut connection = Connection::open(to, TIMEOUT)?;
        let mut passed = Vec::new();
        for round in 0..3 {
            assert_eq!(connection.roundtrip(&call(None))?.status, 401, "{to}, round {round}");
            assert_eq!(connection.roundtrip(&call(Some(&token)))?.status, 200, "{to}, round {round}");
            passed.extend_from_slice(&call(Some(&token)));
        }
        assert_eq!(guarded.read_by_server(connection.local_addr()?)?, passed, "{to}");
    }
    let flows = guarded.enforcement.counter("flow-tagged")?;
    assert_eq!(flows, clients.len() as u64);
    Ok(())
}

#[test]
fn ipv4() -> Result<()> {
    guards("v4", V4, V4, &[V4])
}

#[test]
fn ipv6() -> Result<()> {
    guards("v6", V6, V6, &[V6])
}

#[test]
fn ipv4_clients_of_a_dual_stack_listener() -> Result<()> {
    guards("mapped", ANY_V6, ANY_V6, &[V4, V6])
}

#[test]
fn any_ipv4_address_of_a_wildcard_listener() -> Result<()> {
    let other = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));
    guards("any4", ANY_V4, ANY_V4, &[V4, other])
}

#[test]
fn a_wildcard_in_the_policy_covers_a_server_on_one_address() -> Result<()> {
    guards("wild6", V6, ANY_V6, &[V6])?;
    guards("wild46", V4, ANY_V6, &[V4])?;
    guards("wild4", V4, ANY_V4, &[V4])
}

#[test]
fn a_v4_mapped_address_in_the_policy_is_its_ipv4_address() -> Result<()> {
    guards("map4", V4, IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()), &[V4])
}

#[test]
fn what_the_policy_does_not_name_is_not_touched() -> Result<()> {
    let _deadline = Deadline::new("unnamed", LIMIT);
    // The policy names another address of the same port, so this server is none of ours.
    let guarded =
        Guarded::builder("unnamed").policy_listen((Ipv4Addr::new(127, 0, 0, 77), 0).into()).start()?;
    let request = guarded.call(None).build();
    let mut connection = guarded.connect()?;
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request);
    assert_eq!(guarded.enforcement.counter("flow-tagged")?, 0);
    Ok(())
}

#[test]
fn servers_outside_the_cgroup_are_not_touched_and_nested_ones_are_guarded() -> Result<()> {
    let _deadline = Deadline::new("cgroups", LIMIT);
    let cgroup = Cgroup::new("nested")?;
    let child = cgroup.child("child")?;
    let grandchild = child.child("grandchild")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let inside = RemoteRecorder::spawn(listen, &Config::default(), Some(&grandchild), None)?;
    let outside = RemoteRecorder::spawn(listen, &Config::default(), None, None)?;
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    let policy = PolicySpec::new(
        vec![IssuerSpec::from_file("corp", &issuer)],
        vec![
            ServerSpec::new("in", &[inside.addr()], "https://in.example.com/mcp"),
            ServerSpec::new("out", &[outside.addr()], "https://out.example.com/mcp"),
        ],
    );
    let enforcement = Enforcement::start(cgroup, &policy)?;
    let ask = |addr: SocketAddr| -> Result<u16> {
        let request = RequestBuilder::mcp_call(&addr.to_string(), "/mcp", None, "echo").build();
        Ok(Connection::open(addr, TIMEOUT)?.roundtrip(&request)?.status)
    };
    assert_eq!((ask(inside.addr())?, ask(outside.addr())?), (401, 200));
    // Children before their parent.
    drop(inside);
    drop(grandchild);
    drop(child);
    drop(enforcement);
    Ok(())
}

#[test]
fn servers_that_share_an_endpoint_do_not_share_tokens() -> Result<()> {
    let _deadline = Deadline::new("shared endpoint", LIMIT);
    let cgroup = Cgroup::new("shared")?;
    let listen = (Ipv6Addr::UNSPECIFIED, 0).into();
    let recorder = RemoteRecorder::spawn(listen, &Config::default(), Some(&cgroup), None)?;
    let port = recorder.addr().port();
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    let build = Issuer::new("https://build.example.com", Alg::EdDsa)?;
    let (search, deploy) = ("https://tools.example.com/search", "https://tools.example.com/deploy");
    let policy = PolicySpec::new(
        vec![IssuerSpec::from_file("corp", &issuer), IssuerSpec::from_file("build", &build)],
        vec![
            ServerSpec::new("search", &[recorder.addr()], search),
            ServerSpec::new("deploy", &[recorder.addr()], deploy)
                .with("issuers", json!(["build"]))
                .with("scopes", json!(["deploy"])),
        ],
    );
    let enforcement = Enforcement::start(cgroup, &policy)?;
    let for_search = issuer.mint().audience(search).sign()?;
    let for_deploy = build.mint().audience(deploy).scope("deploy").sign()?;
    let for_both = issuer.mint().audiences(&[search, deploy]).scope("deploy").sign()?;
    let host = format!("localhost:{port}");
    let mut connection = Connection::open(SocketAddr::new(V4, port), TIMEOUT)?;
    let mut passed = Vec::new();
    // Twice: first the daemon decides, then the kernel.
    for round in 0..2 {
        for (token, path, status) in [
            (&for_search, "/search", 200),
            (&for_search, "/deploy", 401),
            (&for_deploy, "/deploy", 200),
            (&for_deploy, "/search", 401),
            (&for_both, "/search", 200),
            // The right audience, but of an issuer that this server does not trust.
            (&for_both, "/deploy", 401),
            (&for_deploy, "/deploy/x", 200),
            (&for_search, "/", 404),
            (&for_search, "/.well-known/oauth-protected-resource", 404),
        ] {
            let request = RequestBuilder::mcp_call(&host, path, Some(token), "echo").build();
            let response =
                connection.roundtrip(&request).with_context(|| format!("{path}, round {round}"))?;
            assert_eq!(response.status, status, "{path}, round {round}");
            if status == 200 {
                passed.extend_from_slice(&request);
            }
            if status == 401 {
                let metadata =
                    format!("https://tools.example.com/.well-known/oauth-protected-resource{path}");
                let challenge = response.header("www-authenticate").unwrap_or_default();
                assert!(challenge.contains(&metadata), "{path}: {challenge}");
            }
        }
    }
    let read = recorder.connection(connection.local_addr()?)?.map(|record| record.kept);
    assert_eq!(read, Some(passed));
    for (path, resource) in [("/search", search), ("/deploy", deploy)] {
        let path = format!("/.well-known/oauth-protected-resource{path}");
        let request = RequestBuilder::new("GET", &path).header("Host", &host).build();
        let document = connection.roundtrip(&request)?.json()?;
        assert_eq!(document.get("resource"), Some(&json!(resource)));
    }
    assert_eq!(enforcement.counters()?.dead(), 0);
    Ok(())
}
