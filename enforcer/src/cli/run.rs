//! `enforcer run`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::Global;
use super::exit::OK;
use crate::daemon::{self, RunOptions};

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Least severity that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
#[expect(missing_docs, reason = "the names of tracing's levels")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

/// Guard the policy's servers
///
/// Loads the kernel programs, attaches them to a cgroup and stays in the foreground, to judge requests that the kernel does
/// not know yet. Connections that were open before are closed, in every network namespace; in observe mode they are listed and left.
/// A changed policy file takes effect at once if it has no defects; SIGHUP and `enforcer reload` have it read again too.
/// Over an enforcement that an earlier daemon left, connections go on: under a changed policy, those that it still allows.
/// SIGTERM or SIGINT ends it: new connections are no longer guarded, open ones get time to end, then everything is removed.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer check policy.yaml && enforcer run --policy policy.yaml
  enforcer run --policy policy.yaml --cgroup /sys/fs/cgroup/system.slice/mcp.service
  enforcer run --policy policy.yaml --log-format json --log-level debug
  enforcer run --policy policy.yaml --keep    # survives SIGTERM; end it with `enforcer unload`")]
pub(super) struct Command {
    /// The policy file
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// Guard servers in this cgroup and below [default: the root of the cgroup2 hierarchy]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Form of the log on stderr
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    /// Least severity that is logged
    #[arg(long, value_enum, default_value_t)]
    log_level: LogLevel,
    /// On SIGTERM leave the enforcement in the kernel: known requests go on, unknown ones get 503
    #[arg(long)]
    keep: bool,
    /// Replace the programs in the kernel even if they are this program's own; for tests and repairs
    #[arg(long, hide = true)]
    replace_programs: bool,
    /// How long open connections may go on after SIGTERM before they are reset
    #[arg(long, value_name = "SECS", default_value_t = super::DRAIN_TIMEOUT_SECS)]
    drain_timeout: u64,
    /// Don't read the policy file again by itself when it changes; SIGHUP and `enforcer reload` still do
    #[arg(long)]
    no_watch: bool,
}

/// What `enforcer run` was asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RunArgs {
    pub(super) options: RunOptions,
    pub(super) log_format: LogFormat,
    pub(super) log_level: LogLevel,
}

impl Command {
    pub(super) fn into_args(self, global: &Global) -> RunArgs {
        RunArgs {
            options: RunOptions {
                policy: self.policy,
                cgroup: self.cgroup,
                bpffs: global.bpffs.clone(),
                pin_name: global.pin_name.clone(),
                state: global.state(),
                keep: self.keep,
                replace_programs: self.replace_programs,
                drain_timeout: Duration::from_secs(self.drain_timeout),
                watch: !self.no_watch,
            },
            log_format: self.log_format,
            log_level: self.log_level,
        }
    }
}

pub(super) fn run(args: &RunArgs) -> anyhow::Result<u8> {
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_max_level(tracing::Level::from(args.log_level));
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    daemon::run(&args.options)?;
    Ok(OK)
}
