//! Clocks that differ.

use std::process::Command;

use anyhow::{Result, ensure};
use enforcer_tests::enforcement::{Guarded, enforcer_bin, skip};
use enforcer_tests::guard::{Deadline, run};

use crate::common::{LIMIT, TIMEOUT, assert_nothing_is_left};

/// The kernel programs read the machine's boot clock whatever namespace the daemon is in: deadlines would lie a day ahead.
#[test]
fn in_a_time_namespace_with_another_boot_clock_nothing_starts() -> Result<()> {
    const NAME: &str = "in_a_time_namespace_with_another_boot_clock_nothing_starts";
    let _deadline = Deadline::new("time namespace", LIMIT);
    if !std::path::Path::new("/proc/self/timens_offsets").exists() {
        skip(NAME, "the kernel has no time namespaces");
        return Ok(());
    }
    let mut guarded = Guarded::start("timens")?;
    ensure!(guarded.enforcement.stop()?.success(), "stop");
    let mut command = Command::new("unshare");
    command.args(["--fork", "--kill-child", "--time", "--boottime", "86400"]).arg(enforcer_bin()?);
    command.args(["doctor", "--output", "json", "--pin-name", guarded.enforcement.pin_name()]);
    let doctor = run("doctor in a time namespace", command, b"", TIMEOUT)?;
    ensure!(!doctor.status.success(), "the machine is fit");
    ensure!(doctor.stdout.contains("time namespace"), "{}{}", doctor.stdout, doctor.stderr);
    let mut command = Command::new("unshare");
    command.args(["--fork", "--kill-child", "--time", "--boottime", "86400"]).arg(enforcer_bin()?);
    command.args(["run", "--pin-name", guarded.enforcement.pin_name(), "--policy"]);
    command.arg(guarded.enforcement.policy_path()).arg("--cgroup").arg(guarded.enforcement.cgroup().path());
    let daemon = run("run in a time namespace", command, b"", TIMEOUT)?;
    ensure!(!daemon.status.success(), "it started");
    ensure!(daemon.stderr.contains("time namespace"), "{}", daemon.stderr);
    assert_nothing_is_left(&guarded)
}
