//! What several end-to-end tests share.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use enforcer_tests::enforcement::{Guarded, GuardedBuilder, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::{NetNs, Proc, spawn_in, wait_until};
use enforcer_tests::issuer::Issuer;
use enforcer_tests::raw::{Connection, Response};
use enforcer_tests::recorder::{Answer, Config};
use ring::hmac;
use serde_json::json;

/// No test takes longer, on the slowest machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);
/// Exit code of the command line: nothing is loaded.
pub(crate) const NOT_LOADED: i32 = 3;
/// For one step.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// Streams end within a second; on a machine that does other work at the same time the clock is not to be trusted further.
pub(crate) const SOON: Duration = Duration::from_secs(5);

/// Checks what holds for every refusal, also for one that the kernel stretched to its request's length.
pub(crate) fn assert_refusal(response: &Response, status: u16, challenge: Option<&str>) {
    assert_eq!(response.status, status, "{response:?}");
    assert_eq!(response.header("www-authenticate"), challenge);
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert_eq!(response.header("cache-control"), Some("no-store"));
    let length = response.header("content-length").and_then(|value| value.parse().ok());
    assert_eq!(length, Some(response.body.len()));
    let body = response.json().expect("a JSON body");
    assert_eq!(body.pointer("/jsonrpc"), Some(&json!("2.0")));
    assert_eq!(body.pointer("/id"), Some(&json!(null)));
    assert_eq!(body.pointer("/error/code"), Some(&json!(status)));
    assert!(body.pointer("/error/message").is_some_and(serde_json::Value::is_string));
}

/// After refusals alone: the server has read nothing. It is there, though, and a good request reaches it as it was sent.
pub(crate) fn refused_unread(guarded: &Guarded, scopes: &str) -> Result<()> {
    assert_eq!(guarded.bytes_read()?, 0, "the server read of what was refused");
    let token = guarded.mint().scope(scopes).sign()?;
    let request = guarded.call(Some(&token)).build();
    let mut connection = guarded.connect()?;
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request);
    assert_eq!(guarded.bytes_read()?, request.len() as u64);
    Ok(())
}

/// A token that is authenticated with the issuer's public key as the secret of HS256.
pub(crate) fn hs256(issuer: &Issuer, audience: &str) -> Result<String> {
    let key = issuer.current_key();
    let token = issuer.mint().audience(audience).alg_header("HS256").unsigned().sign()?;
    let signed = token.trim_end_matches('.');
    let secret = hmac::Key::new(hmac::HMAC_SHA256, &serde_json::to_vec(&key.jwk())?);
    let tag = hmac::sign(&secret, signed.as_bytes());
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag.as_ref())))
}

/// The status of the answer to one request on a connection of its own.
pub(crate) fn status(guarded: &Guarded, request: &[u8]) -> Result<u16> {
    Ok(guarded.connect()?.roundtrip(request)?.status)
}

/// A head that nobody has seen yet, long enough to be overwritten by any answer.
pub(crate) fn unknown(guarded: &Guarded, token: &str, number: usize) -> Vec<u8> {
    guarded.call(Some(token)).header("X-Number", &number.to_string()).build()
}

/// Waits until the kernel has noticed that the daemon does not live.
pub(crate) fn wait_until_unavailable(guarded: &Guarded) -> Result<()> {
    wait_until("the daemon's heartbeat is too old", TIMEOUT, || {
        let status = guarded.enforcement.cli_json(&["status"]).ok()?;
        (status.pointer("/daemon/heartbeat_fresh")? == &serde_json::json!(false)).then_some(())
    })
}

/// Neither pins nor a status, and the server is open again: the program is detached.
pub(crate) fn assert_nothing_is_left(guarded: &Guarded) -> Result<()> {
    assert_eq!(guarded.enforcement.leftover_pins(), Vec::<PathBuf>::new());
    let status = guarded.enforcement.cli(&["status"])?;
    assert_eq!(status.status.code(), Some(NOT_LOADED), "{}", status.stdout);
    assert_eq!(self::status(guarded, &guarded.call(None).build())?, 200);
    Ok(())
}

/// A connection with an open stream.
pub(crate) fn open_stream(mut connection: Connection, request: &[u8]) -> Result<Connection> {
    connection.send(request)?;
    let head = connection.read_head()?;
    ensure!(head.status == 200, "{head:?}");
    flows_on(&mut connection)?;
    Ok(connection)
}

/// More events come.
pub(crate) fn flows_on(connection: &mut Connection) -> Result<()> {
    for _ in 0..10 {
        ensure!(!connection.read_some(65_536)?.is_empty(), "the stream has ended");
    }
    Ok(())
}

/// The audience of a second server.
pub(crate) const OTHER_RESOURCE: &str = "https://other.example.com/mcp";

/// A policy with the issuer that is the scene's.
pub(crate) fn policy(guarded: &Guarded, servers: Vec<ServerSpec>) -> PolicySpec {
    PolicySpec::new(vec![IssuerSpec::from_file("corp", &guarded.issuer)], servers)
}

/// The server as the first policy has it.
pub(crate) fn tools(guarded: &Guarded) -> ServerSpec {
    ServerSpec::new("tools", &[guarded.addr()], Guarded::RESOURCE)
}

/// The server answers everything with events, for longer than any test runs.
pub(crate) fn endless() -> Config {
    let answer = Answer::Sse { events: 100_000, event_bytes: 10, interval_ms: 20 };
    Config { answer, ..Config::default() }
}

/// Reads until the connection is closed.
pub(crate) fn ends(connection: &mut Connection) -> Result<()> {
    let start = Instant::now();
    while connection.read_some(65_536).is_ok_and(|bytes| !bytes.is_empty()) {
        ensure!(start.elapsed() < SOON, "the stream goes on");
    }
    Ok(())
}

/// A daemon that reads its policy only when it starts or is told to, and leaves the enforcement in the kernel when it ends.
pub(crate) fn kept(name: &str) -> GuardedBuilder {
    Guarded::builder(name).option("--no-watch").option("--keep")
}

/// Ends the daemon, and starts one for another policy.
pub(crate) fn restart(guarded: &mut Guarded, kill: bool, policy: &PolicySpec) -> Result<()> {
    if kill {
        guarded.enforcement.kill9()?;
    } else {
        ensure!(guarded.enforcement.stop()?.success(), "the daemon failed");
    }
    guarded.enforcement.write_policy(policy)?;
    guarded.enforcement.launch()
}

/// Accepts one connection, leaves its network namespace for that of another process, and answers with a stream.
const LEAVING_SERVER: &str = "
import ctypes, os, socket, sys, time
host, port, elsewhere = sys.argv[1:]
listener = socket.create_server((host, int(port)))
print('listening', flush=True)
connection, _ = listener.accept()
namespace = os.open(f'/proc/{elsewhere}/ns/net', os.O_RDONLY)
CLONE_NEWNET = 0x40000000
if ctypes.CDLL(None).setns(namespace, CLONE_NEWNET) != 0:
    sys.exit('setns')
print('left', flush=True)
connection.recv(65536)
connection.sendall(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n')
while True:
    connection.sendall(b': event\\n\\n')
    time.sleep(0.02)
";

/// Such a server, which listens in a namespace that nobody else lives in. It prints `left` when it has gone from there.
pub(crate) fn leaving_server(guarded: &Guarded, netns: &NetNs) -> Result<Proc> {
    let addr = guarded.addr();
    let mut command = Command::new("python3");
    command.args(["-c", LEAVING_SERVER, &addr.ip().to_string(), &addr.port().to_string()]);
    command.arg(std::process::id().to_string());
    netns.place(&mut command)?;
    let mut server = spawn_in(guarded.enforcement.cgroup(), "leaving-server", command)?;
    server.wait_for_line("listening", TIMEOUT)?;
    Ok(server)
}

/// A process by which a namespace can be found.
pub(crate) fn inhabitant(netns: &NetNs) -> Result<Proc> {
    let mut command = Command::new("sleep");
    command.arg("1000");
    netns.place(&mut command)?;
    Proc::spawn("sleep", command)
}

/// A connection with the first bytes of a request, which are the daemon's.
pub(crate) fn half_handed_over(guarded: &Guarded, request: &[u8]) -> Result<Connection> {
    let mut begun = guarded.connect()?;
    begun.send(request.get(..40).unwrap_or_default())?;
    wait_until("the request is the daemon's", TIMEOUT, || {
        let flows = guarded.enforcement.cli_json(&["flows"]).ok()?;
        flows.to_string().contains("\"punted\"").then_some(())
    })?;
    Ok(begun)
}
