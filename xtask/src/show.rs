//! `cargo xtask demo` and `cargo xtask bench`: build for release, then hand over to a program of the tests package.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::shown;
use crate::test::{ENFORCER_VARIABLE, enforcer};
use crate::workspace::{TESTS_PACKAGE, Workspace, scrub};
use crate::{build, probe, setup};

/// Runs `program` with `arguments` in the caller's directory, so that a relative path means what the caller thinks.
pub(crate) fn show(workspace: &Workspace, program: &str, arguments: &[OsString]) -> Result<()> {
    workspace.require_binary(TESTS_PACKAGE, program)?;
    if !probe::is_root() {
        bail!("{program} loads eBPF programs and makes cgroups, which needs root; run it as root");
    }
    let toolchain = setup::ensure(workspace)?;
    build::bpf_object(workspace, &toolchain)?;
    build::host(workspace, true)?;
    let mut command = Command::new(workspace.binary("release", program));
    scrub(&mut command);
    command.args(arguments).env(ENFORCER_VARIABLE, enforcer(workspace, true));
    eprintln!("$ {}", shown(&command));
    // The terminal is the program's: it may be asked to stop by Ctrl-C, and cleans up by itself.
    let status = command.status().with_context(|| format!("can't start `{}`", shown(&command)))?;
    if !status.success() {
        bail!("{program} failed ({status}); its own messages are above");
    }
    Ok(())
}
