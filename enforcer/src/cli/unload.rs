//! `enforcer unload`.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;

use super::Global;
use super::exit::OK;
use super::format::duration;
use super::output::{Render, print};
use crate::lifecycle::lock::DaemonLock;
use crate::lifecycle::{UnloadOptions, UnloadReport, unload};

/// Remove an enforcement from the kernel: FROM THEN ON THE SERVERS ARE NOT GUARDED
///
/// For an enforcement that a daemon left behind (`run --keep`, or a crash); a running daemon is stopped by SIGTERM and
/// does this itself. New connections are no longer guarded at once; open ones may end, then they are reset; then the
/// programs are detached and everything is removed. Nothing loaded is fine: exit code 0.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer unload
  enforcer unload --drain-timeout 0       reset open connections at once
  enforcer unload --force                 remove it whatever happens

Exit code 6 when a daemon is running, or connections could not be ended and --force is not given.")]
pub(super) struct Command {
    /// How long open connections may go on before they are reset
    #[arg(long, value_name = "SECS", default_value_t = super::DRAIN_TIMEOUT_SECS)]
    drain_timeout: u64,
    /// Remove everything even if connections can't be ended or the maps can't be read; unread bytes of such connections
    /// are lost
    #[arg(long)]
    force: bool,
    /// Also while a daemon is running, which is then left without its maps
    #[arg(long)]
    even_if_running: bool,
}

impl Render for UnloadReport {
    fn text(&self) -> String {
        let place = self.pin_directory.display();
        if !self.was_loaded {
            return format!("nothing is loaded at {place}\n");
        }
        let mut text = format!("unloaded {place} in {}\n", duration(self.took_ms));
        for (count, what) in [
            (self.flows_drained, "ended by themselves"),
            (self.flows_destroyed, "were reset"),
            (self.records_stale, "were gone without a trace; their records were deleted"),
            (self.flows_abandoned, "were still guarded; their unread bytes are lost"),
        ] {
            if count > 0 {
                // Writing to a string can't fail.
                let _ = writeln!(text, "  connections that {what}: {count}");
            }
        }
        for error in &self.errors {
            let _ = writeln!(text, "  error: {error}");
        }
        text
    }
}

pub(super) fn run(command: &Command, global: &Global) -> anyhow::Result<u8> {
    // Held until the end, so that no daemon starts in the middle.
    let _lock = if command.even_if_running { None } else { Some(DaemonLock::acquire(&global.pin_name)?) };
    let options =
        UnloadOptions { drain_timeout: Duration::from_secs(command.drain_timeout), force: command.force };
    print(global.output, &unload(&global.pins(), &options)?)?;
    Ok(OK)
}
