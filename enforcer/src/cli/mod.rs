//! The command line: nouns read, verbs write.
//!
//! The reading commands look at the pinned maps themselves, so they work while no daemon runs.

mod check;
mod doctor;
pub mod exit;
mod explain;
mod first_users;
pub(crate) mod format;
mod live;
mod output;
mod reload;
mod revoke;
pub mod run;
mod shield;
mod unload;
mod view;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::daemon::watcher::{self, Watched};
use crate::datapath::{PIN_NAME, PinDir};
use crate::lifecycle::paths;
use crate::revocation::store::{STATE_DIR, StateDir};
use exit::{OK, USAGE};
pub use output::Output;

/// How long connections may go on at the end, unless told otherwise, in seconds.
const DRAIN_TIMEOUT_SECS: u64 = 10;

const EXAMPLES: &str = "\
Examples:
  enforcer doctor                               can this machine enforce?
  enforcer check policy.yaml                    what would be checked?
  enforcer run --policy policy.yaml             guard the servers
  enforcer status                               is it enforcing?
  enforcer diff new.yaml                        what would another policy change?
  enforcer reload                               read the policy again
  enforcer flows --output json                  live connections, for programs
  enforcer explain --server files < token       would this token pass, and why not?
  enforcer revoke --issuer corp --subject alice end what alice's tokens opened, refuse them
  enforcer shield add 192.0.2.0/24 --for 1h     drop packets before TCP sees them
  enforcer unload                               remove everything from the kernel";

/// Zero-trust authorization for MCP servers, enforced in the kernel
///
/// Every HTTP request that reaches a guarded server carries a valid token that was issued for that server, or is refused
/// with the right HTTP answer. No proxy, and the server is unchanged.
#[derive(Debug, Parser)]
#[command(name = "enforcer", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{}", exit::HELP))]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
struct Global {
    /// How results are written to stdout
    #[arg(long, value_enum, global = true, default_value_t)]
    output: Output,
    /// Where the BPF file system is mounted
    #[arg(long, global = true, value_name = "PATH", default_value = paths::BPFFS)]
    bpffs: PathBuf,
    /// Which enforcement: the name of its pin directory
    #[arg(long, global = true, value_name = "NAME", default_value = PIN_NAME, value_parser = paths::pin_name)]
    pin_name: String,
    /// Where revocations are recorded: a directory per pin name in it, for root only
    #[arg(long, global = true, value_name = "PATH", default_value = STATE_DIR)]
    state_dir: PathBuf,
}

impl Global {
    fn state(&self) -> StateDir {
        StateDir::new(&self.state_dir, &self.pin_name)
    }

    fn pins(&self) -> PinDir {
        paths::pin_dir(&self.bpffs, &self.pin_name)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Command),
    Check(check::Command),
    /// Whether requests are being checked, by what, and how full the tables are
    ///
    /// Exit code 3 when nothing is loaded.
    Status,
    /// The guarded servers
    Servers,
    /// The guarded connections, oldest first
    ///
    /// STATE: head (a request is expected), body and chunked (of an allowed request), punted (the daemon has it), discard
    /// (the body of a refused request), dead (nothing passes), opaque (observe mode: can't be followed).
    Flows,
    /// Which workloads on this host have connections open, and what they were recognised by
    ///
    /// FROM: pod, container or unit (read from the cgroup's path), path (the path says nothing), gone (the cgroup was removed). Callers on
    /// other hosts, and those outside of the guarded cgroup, are unknown.
    Workloads,
    /// What was decided about the request heads that the kernel knows
    ///
    /// Heads are shown by a fingerprint. STATE: current, or why the kernel would ask the daemon again.
    Verdicts,
    /// The tokens that the kernel lets pass, by serial number
    ///
    /// Tokens are shown by a keyed fingerprint, the same that stands in the log.
    Grants,
    FirstUsers(first_users::Command),
    Limits(view::limits::Command),
    Counters(CountersCommand),
    /// Tokens that are refused although issuer and policy would accept them, by number
    Revocations,
    Revoke(revoke::Command),
    Unrevoke(revoke::UndoCommand),
    #[command(subcommand)]
    Shield(shield::Command),
    Explain(explain::Command),
    Diff(reload::DiffCommand),
    Reload(reload::ReloadCommand),
    Doctor(doctor::Command),
    Unload(unload::Command),
    /// Ends what a daemon had in its hands when it died; started by `run`
    #[command(hide = true)]
    Watch(WatchCommand),
}

#[derive(Debug, Args)]
struct WatchCommand {
    #[arg(long)]
    daemon_pid: u32,
    #[arg(long)]
    daemon_started_ns: u64,
}

/// What has happened to requests and connections since the enforcement was loaded
///
/// `kernel` counts outcomes in the kernel, `daemon` the reasons for which the daemon refused requests.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer counters
  enforcer counters --all --output json")]
struct CountersCommand {
    /// Also those that are zero
    #[arg(long)]
    all: bool,
}

/// Parses the process's arguments, runs the command, reports its error on stderr.
#[must_use]
pub fn main() -> ExitCode {
    ExitCode::from(run_from(std::env::args_os()))
}

/// Runs a command line, program name first. Returns one of the codes of [`exit`].
fn run_from(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout; a reader that went away has what it wanted.
            let _ = error.print();
            return if error.use_stderr() { USAGE } else { OK };
        }
    };
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            output::say(&format!("enforcer: {}", message(&error)));
            exit::code_of(&error)
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    let global = cli.global;
    match cli.command {
        Command::Run(command) => run::run(&command.into_args(&global)),
        Command::Check(command) => check::run(&command, global.output),
        Command::Status => view::status(&global),
        Command::Servers => view::servers(&global),
        Command::Flows => view::flows(&global),
        Command::Workloads => view::workloads(&global),
        Command::Verdicts => view::verdicts(&global),
        Command::Grants => view::grants(&global),
        Command::FirstUsers(command) => first_users::run(&command, &global),
        Command::Limits(command) => view::limits(&command, &global),
        Command::Counters(command) => view::counters(&global, command.all),
        Command::Revocations => view::revocations(&global),
        Command::Revoke(command) => revoke::run(&command, &global),
        Command::Shield(command) => shield::run(&command, &global),
        Command::Unrevoke(command) => revoke::undo(&command, &global),
        Command::Explain(command) => explain::run(&command, &global),
        Command::Diff(command) => reload::diff(&command, &global),
        Command::Reload(command) => reload::reload(&command, &global),
        Command::Doctor(command) => doctor::run(command, &global),
        Command::Unload(command) => unload::run(&command, &global),
        Command::Watch(command) => {
            tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
            let watched = Watched { pid: command.daemon_pid, started_ns: command.daemon_started_ns };
            watcher::watch(&global.pins(), watched)?;
            Ok(OK)
        }
    }
}

/// An error with those of its causes that it does not quote itself.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests;
