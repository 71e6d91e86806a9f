//! A revocation holds until its last token has ended, whatever happens to command, daemon, file and policy meanwhile.

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Guarded, IssuerSpec, PolicySpec, ServerSpec, enforcer_bin};
use enforcer_tests::guard::{Deadline, Proc, wait_until};
use nix::sys::stat::Mode;
use serde_json::Value;

use common::{LIMIT, TIMEOUT};

/// Exit code of the command line.
const FAILURE: i32 = 1;

/// The policy of `guarded` with another leeway.
fn with_leeway(guarded: &Guarded, leeway: &str) -> PolicySpec {
    let issuer = IssuerSpec::from_file("corp", &guarded.issuer).with("leeway", leeway);
    PolicySpec::new(vec![issuer], vec![ServerSpec::new("tools", &[guarded.addr()], Guarded::RESOURCE)])
}

fn revocations(guarded: &Guarded) -> Result<usize> {
    let document = guarded.enforcement.cli_json(&["revocations"])?;
    Ok(document.get("revocations").and_then(Value::as_array).context("no list")?.len())
}

fn recorded(guarded: &Guarded) -> Result<usize> {
    let text = fs::read(guarded.enforcement.state_dir().join("revocations.json"))?;
    let document: Value = serde_json::from_slice(&text)?;
    Ok(document.get("revocations").and_then(Value::as_array).context("no list")?.len())
}

#[test]
fn a_token_stays_revoked_under_a_policy_with_a_larger_leeway() -> Result<()> {
    let _deadline = Deadline::new("larger leeway", LIMIT);
    let guarded = Guarded::builder("rev-leeway").issuer("leeway", "0s").option("--no-watch").start()?;
    let start = Instant::now();
    let request = guarded.call(Some(&guarded.mint().expires_in(5).sign()?)).build();
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    let grants = guarded.enforcement.cli_json(&["grants"])?;
    let fingerprint = grants.pointer("/grants/0/token_fingerprint").and_then(Value::as_str);
    let fingerprint = fingerprint.context("no grant")?;
    guarded.enforcement.cli_json(&["revoke", "--token-fingerprint", fingerprint])?;
    guarded.enforcement.write_policy(&with_leeway(&guarded, "5m"))?;
    guarded.enforcement.cli_json(&["reload"])?;
    // By its `exp` alone it is over, by this leeway it is not.
    std::thread::sleep(Duration::from_secs(6).saturating_sub(start.elapsed()));
    let refused = guarded.enforcement.reason("revoked")?;
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 401);
    assert_eq!(guarded.enforcement.reason("revoked")?, refused + 1);
    assert_eq!(revocations(&guarded)?, 1);
    Ok(())
}

#[test]
fn a_command_that_is_killed_leaves_nothing_in_force_that_would_be_forgotten() -> Result<()> {
    let _deadline = Deadline::new("killed revoke", LIMIT);
    let mut guarded = Guarded::start("rev-killed")?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    // The file is written beside its place first. Nobody reads this one, so the command waits for ever to open it.
    let fresh = guarded.enforcement.state_dir().join("revocations.new");
    nix::unistd::mkfifo(&fresh, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let mut command = Command::new(enforcer_bin()?);
    command.args(["revoke", "--all", "--pin-name", guarded.enforcement.pin_name()]);
    let mut revoke = Proc::spawn("revoke", command)?;
    let waits_for = format!("/proc/{}/syscall", revoke.pid());
    let open = format!("{} ", libc::SYS_openat);
    wait_until("the command writes the file", TIMEOUT, || {
        fs::read_to_string(&waits_for).is_ok_and(|call| call.starts_with(&open)).then_some(())
    })?;
    let in_force = revocations(&guarded)?;
    revoke.kill()?;
    fs::remove_file(&fresh)?;
    assert_eq!((in_force, recorded(&guarded)?), (0, 0), "it was in force, and nothing tells the next start");
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    // Said again it is kept.
    guarded.enforcement.cli_json(&["revoke", "--all"])?;
    assert_eq!((revocations(&guarded)?, recorded(&guarded)?), (1, 1));
    assert!(guarded.enforcement.stop()?.success());
    guarded.enforcement.launch()?;
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 401);
    Ok(())
}

#[test]
fn what_could_not_be_recorded_is_in_force_and_is_found_by_the_next_daemon() -> Result<()> {
    let _deadline = Deadline::new("unrecorded", LIMIT);
    let mut guarded = Guarded::start("rev-unrecorded")?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    let fresh = guarded.enforcement.state_dir().join("revocations.new");
    fs::create_dir(&fresh)?;
    let failed = guarded.enforcement.cli(&["revoke", "--all"])?;
    assert_eq!(failed.status.code(), Some(FAILURE), "{}", failed.stderr);
    ensure!(failed.stderr.contains("not recorded"), "{}", failed.stderr);
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 401);
    assert_eq!((revocations(&guarded)?, recorded(&guarded)?), (1, 0));
    fs::remove_dir(&fresh)?;
    // Another policy, and nobody knows which was there before: everything is loaded anew.
    guarded.enforcement.kill9()?;
    fs::remove_file(guarded.enforcement.state_dir().join("policy.json"))?;
    guarded.enforcement.write_policy(&with_leeway(&guarded, "1s"))?;
    guarded.enforcement.launch()?;
    assert!(guarded.enforcement.log()?.contains("taking over"));
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 401);
    assert_eq!((revocations(&guarded)?, recorded(&guarded)?), (1, 1));
    Ok(())
}

#[test]
fn a_disk_that_takes_its_time_holds_up_neither_a_reload_nor_requests() -> Result<()> {
    let _deadline = Deadline::new("slow disk", LIMIT);
    let guarded = Guarded::builder("rev-disk").issuer("leeway", "0s").option("--no-watch").start()?;
    let fresh = guarded.enforcement.state_dir().join("revocations.new");
    nix::unistd::mkfifo(&fresh, Mode::S_IRUSR | Mode::S_IWUSR)?;
    guarded.enforcement.write_policy(&with_leeway(&guarded, "10s"))?;
    guarded.enforcement.cli_json(&["reload"])?;
    for _ in 0..10 {
        let request = guarded.call(Some(&guarded.token()?)).build();
        assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
        std::thread::sleep(Duration::from_millis(100));
    }
    // What waits gets on, and can't be kept: no file is synced here. That is said, and who revokes is not locked out.
    let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fresh)?;
    wait_until("the daemon writes", TIMEOUT, || {
        file.read(&mut [0; 4096]).is_ok_and(|read| read > 0).then_some(())
    })?;
    drop(file);
    wait_until("the daemon says so", TIMEOUT, || {
        guarded.enforcement.log().is_ok_and(|log| log.contains("can't be recorded")).then_some(())
    })?;
    fs::remove_file(&fresh)?;
    guarded.enforcement.cli_json(&["revoke", "--all"])?;
    assert_eq!(recorded(&guarded)?, 1);
    Ok(())
}
