//! A connection that is to be destroyed, in a network namespace that nobody can find.

mod common;

use std::process::Command;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, NetNs, Proc, spawn_in, wait_until};
use enforcer_tests::raw::Connection;

use common::{LIMIT, TIMEOUT};

/// Accepts one connection, and leaves its network namespace for that of another process.
const SERVER: &str = "
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
time.sleep(1000)
";

#[test]
fn its_search_holds_up_nobody_and_it_ends_when_the_namespace_is_found() -> Result<()> {
    let _deadline = Deadline::new("lost namespace", LIMIT);
    let guarded = Guarded::start("lostns")?;
    let netns = NetNs::new("lost")?;
    let addr = guarded.addr();
    let mut command = Command::new("python3");
    command.args(["-c", SERVER, &addr.ip().to_string(), &addr.port().to_string()]);
    command.arg(std::process::id().to_string());
    netns.place(&mut command)?;
    let mut server = spawn_in(guarded.enforcement.cgroup(), "lost-server", command)?;
    server.wait_for_line("listening", TIMEOUT)?;
    let mut lost = netns.run(|| Connection::open(addr, TIMEOUT))??;
    server.wait_for_line("left", TIMEOUT)?;
    // Not HTTP: the daemon has it destroyed.
    lost.send(b"\x16\x03\x01\x00\x05hello")?;
    wait_until("it was searched in vain, twice", TIMEOUT, || {
        (guarded.enforcement.reason("netns-not-found").ok()? >= 2).then_some(())
    })?;
    assert_eq!(guarded.enforcement.reason("not-http")?, 1);
    // The daemon decides about others, and its own namespace's connections are destroyed.
    assert_eq!(guarded.connect()?.roundtrip(&guarded.call(Some(&guarded.token()?)).build())?.status, 200);
    let mut other = guarded.connect()?;
    other.send(b"\x16\x03\x01\x00\x05hello")?;
    other.expect_closed()?;
    // It was not forgotten: somebody comes to live there, and it ends.
    let mut command = Command::new("sleep");
    command.arg("100");
    netns.place(&mut command)?;
    let _there = Proc::spawn("sleep", command)?;
    lost.expect_closed().context("the connection in the namespace that was lost")?;
    ensure!(guarded.enforcement.reason("destroy-given-up")? == 0, "it was given up");
    Ok(())
}
