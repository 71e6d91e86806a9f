//! The enforcer's own commands, as its users call them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guard::{Finished, run, wait_until};

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the counters may keep moving after the last answer.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// Exit code of a command that found nothing loaded.
pub(super) const NOT_LOADED: i32 = 3;

/// The program and the enforcement that its commands look at.
#[derive(Debug, Clone)]
pub(super) struct Cli {
    program: PathBuf,
    pin_name: String,
}

/// What the kernel counted, by name; a name that is missing stands for zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// One counter.
    pub(super) fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// What went to the daemon, for whatever reason: all `punt-..` counters.
    pub(super) fn punts(&self) -> u64 {
        self.0.iter().filter(|(name, _)| name.starts_with("punt-")).map(|(_, count)| count).sum()
    }

    /// What a server got to read: heads and bodies that the kernel passed, whatever for, or the daemon injected.
    pub(super) fn reached_server(&self) -> u64 {
        const PASSED: [&str; 6] =
            ["allowed", "allowed-public", "body-passed", "injected", "would-refuse", "opaque-passed"];
        PASSED.iter().map(|name| self.get(name)).sum()
    }

    /// Connections that were cut off.
    pub(super) fn dead(&self) -> u64 {
        self.0.iter().filter(|(name, _)| name.starts_with("dead-")).map(|(_, count)| count).sum()
    }
}

impl Cli {
    pub(super) fn new(program: &Path, pin_name: &str) -> Self {
        Self { program: program.to_owned(), pin_name: pin_name.to_owned() }
    }

    /// The enforcement's name.
    pub(super) fn pin_name(&self) -> &str {
        &self.pin_name
    }

    /// A command on this enforcement. It gets a process group of its own: a Ctrl-C is for the demo, which then ends
    /// everything in order.
    pub(super) fn command(&self, arguments: &[&OsStr]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).args(["--pin-name", &self.pin_name]).process_group(0);
        command
    }

    /// How a reader would type a command.
    pub(super) fn shown(&self, arguments: &str) -> String {
        format!("enforcer {arguments} --pin-name {}", self.pin_name)
    }

    /// Runs a command, whatever its exit code.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<Finished> {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        run("enforcer", self.command(&arguments), b"", LIMIT)
    }

    /// The table that a command prints.
    pub(super) fn table(&self, noun: &str) -> Result<String> {
        self.succeed(&[noun])
    }

    /// The same as JSON: the list that is called like the command.
    pub(super) fn rows(&self, noun: &str) -> Result<Vec<Value>> {
        let text = self.succeed(&[noun, "--output", "json"])?;
        let document: Value = serde_json::from_str(&text).with_context(|| format!("enforcer {noun}"))?;
        let rows = document.get(noun).and_then(Value::as_array);
        Ok(rows.with_context(|| format!("enforcer {noun}: no list {noun:?}"))?.clone())
    }

    /// The kernel's counters once they stand still: what a client did before it closed may take a moment to be counted.
    pub(super) fn counters(&self) -> Result<Counters> {
        let mut last = None;
        let mut error = None;
        let settled = wait_until("counters that stand still", SETTLE_LIMIT, || {
            match self.counters_now() {
                Ok(now) if last.as_ref() == Some(&now) => return Some(now),
                Ok(now) => last = Some(now),
                Err(failed) => error = Some(failed),
            }
            std::thread::sleep(Duration::from_millis(30));
            None
        });
        match error {
            Some(error) => Err(error),
            None => settled,
        }
    }

    fn counters_now(&self) -> Result<Counters> {
        let text = self.succeed(&["counters", "--output", "json"])?;
        let document: Value = serde_json::from_str(&text).context("enforcer counters")?;
        let list = document.get("kernel").and_then(Value::as_array).context("enforcer counters: no list")?;
        let count =
            |entry: &Value| Some((entry.get("name")?.as_str()?.to_owned(), entry.get("count")?.as_u64()?));
        let counts: Option<_> = list.iter().map(count).collect();
        Ok(Counters(counts.context("enforcer counters: an entry without name or count")?))
    }

    fn succeed(&self, arguments: &[&str]) -> Result<String> {
        let finished = self.run(arguments)?;
        ensure!(
            finished.status.success(),
            "enforcer {}: {}: {}",
            arguments.join(" "),
            finished.status,
            finished.stderr.trim()
        );
        Ok(finished.stdout)
    }
}
