//! A connection that is to be destroyed, in a network namespace that nobody can find.

mod common;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::{Deadline, NetNs, wait_until};
use enforcer_tests::raw::Connection;

use common::{LIMIT, TIMEOUT};

#[test]
fn its_search_holds_up_nobody_and_it_ends_when_the_namespace_is_found() -> Result<()> {
    let _deadline = Deadline::new("lost namespace", LIMIT);
    let guarded = Guarded::start("lostns")?;
    let netns = NetNs::new("lost")?;
    let addr = guarded.addr();
    let mut server = common::leaving_server(&guarded, &netns)?;
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
    let _there = common::inhabitant(&netns)?;
    lost.expect_closed().context("the connection in the namespace that was lost")?;
    ensure!(guarded.enforcement.reason("destroy-given-up")? == 0, "it was given up");
    Ok(())
}
