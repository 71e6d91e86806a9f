//! One guest under qemu: emulated, so that it works where virtualization does not. It shows correctness, never speed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::probe::{find_program, is_root, version_of};
use crate::process::{Outcome, run, run_bounded_as, stdout_of};

const QEMU: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// The guest's memory. The image is in it twice while it is unpacked.
const MEMORY_MIB: u32 = 2048;

/// Finds qemu; installs it where apt and root's rights are at hand, else says how.
pub(super) fn ensure() -> Result<PathBuf> {
    if let Some(found) = find_program(QEMU, &[]) {
        return Ok(found);
    }
    let mut install = install_command();
    if !is_root() || find_program("apt-get", &[]).is_none() {
        bail!("{QEMU} is missing; install it, e.g. as root: {}", crate::process::shown(&install));
    }
    eprintln!("{QEMU} is missing: installing the package {PACKAGE}");
    run(&mut install)?;
    find_program(QEMU, &[]).with_context(|| format!("{QEMU} is still missing; is {PACKAGE} installed?"))
}

/// Qemu's packages must all have one version. Where a part of it is installed already (often from backports), the rest
/// has to come from the same suite.
fn install_command() -> Command {
    let installed = stdout_of(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "qemu-utils"]));
    let wanted = match installed {
        Ok(version) if !version.is_empty() => format!("{PACKAGE}={version}"),
        _ => PACKAGE.to_owned(),
    };
    let suite = if wanted.contains("~bpo") {
        "-t $(. /etc/os-release; echo $VERSION_CODENAME)-backports"
    } else {
        ""
    };
    let script =
        format!("apt-get update && apt-get install -y --no-install-recommends --no-remove {suite} {wanted}");
    let mut command = Command::new("sh");
    command.args(["-c", &script]).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// First line of what qemu says of its version.
pub(super) fn version(qemu: &Path) -> String {
    version_of(qemu, &["--version"]).unwrap_or_else(|| "unknown".into())
}

/// Boots and runs to the end, or to the limit. The steps' output is in the outcome, the kernel's log in `kernel_log`.
///
/// A panic, too, ends qemu with success: only the guest's own last line says that it came to its end.
pub(super) fn boot(
    name: &str,
    qemu: &Path,
    vmlinuz: &Path,
    image: &Path,
    kernel_log: &Path,
    limit: Duration,
) -> Result<Outcome> {
    // One of an earlier run must not speak for this one.
    let _ = fs::remove_file(kernel_log);
    let mut command = Command::new(qemu);
    command
        .args(["-M", "pc", "-accel", "tcg,thread=single", "-cpu", "max", "-smp", "1"])
        .args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio", "-serial"])
        .arg(format!("file:{}", kernel_log.display()))
        .arg("-kernel")
        .arg(vmlinuz)
        .arg("-initrd")
        .arg(image)
        .args(["-append", "console=ttyS1 loglevel=5 panic=-1 mitigations=off random.trust_cpu=on"]);
    run_bounded_as(name, &mut command, limit)
}
