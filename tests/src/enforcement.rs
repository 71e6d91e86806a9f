//! A running daemon over a cgroup of its own, with policy, issuer and server; all of it is taken down when it is dropped.

mod guarded;
mod policy;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::guard::{Cgroup, Finished, NetNs, Proc, bin_path, run};

pub use guarded::{Guarded, GuardedBuilder};
pub use policy::{IssuerSpec, PolicySpec, ServerSpec, any_number};

const BPFFS: &str = "/sys/fs/bpf";
const RUN_DIR: &str = "/run/enforcer";
const STATE_DIR: &str = "/var/lib/enforcer";
const PIN_PREFIX: &str = "enforcer-test-";
/// From the command to the line `ready`: the kernel's self-test and the issuers' keys, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(180);
/// From SIGTERM to the end, with the drain time.
const STOP_LIMIT: Duration = Duration::from_secs(30);
const CLI_LIMIT: Duration = Duration::from_secs(30);

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// The daemon's program: `ENFORCER_BIN`, else `enforcer` beside the running test.
///
/// # Errors
/// When neither is there.
pub fn enforcer_bin() -> Result<PathBuf> {
    match std::env::var_os("ENFORCER_BIN") {
        Some(path) => {
            let path = PathBuf::from(path);
            ensure!(path.is_file(), "ENFORCER_BIN={} is no file", path.display());
            Ok(path)
        }
        None => bin_path("enforcer"),
    }
}

/// Notes in the file `ENFORCER_TEST_SKIP_LOG` that `test` can't run here, and why.
pub fn skip(test: &str, reason: &str) {
    eprintln!("{test} is skipped: {reason}");
    if let Some(path) = std::env::var_os("ENFORCER_TEST_SKIP_LOG") {
        let log = fs::OpenOptions::new().create(true).append(true).open(path);
        if let Err(error) = log.and_then(|mut log| writeln!(log, "{test}: {reason}")) {
            eprintln!("the skip log can't be written: {error}");
        }
    }
}

/// A pin name that no other test uses. What dead test processes left under such names is removed.
#[must_use]
pub fn fresh_pin_name() -> String {
    sweep();
    format!("{PIN_PREFIX}{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed))
}

/// A daemon and what it enforces.
#[derive(Debug)]
pub struct Enforcement {
    daemon: Option<Proc>,
    pin_name: String,
    bin: PathBuf,
    options: Vec<String>,
    cgroup: Cgroup,
    directory: TempDir,
    netns: Option<Arc<NetNs>>,
}

impl Enforcement {
    /// Starts a daemon for `policy` over `cgroup` and waits until it is ready.
    ///
    /// # Errors
    /// When the policy or a key file can't be written, or the daemon does not become ready; the message holds its log.
    pub fn start(cgroup: Cgroup, policy: &PolicySpec) -> Result<Self> {
        Self::start_with(cgroup, policy, &["--drain-timeout", "1"])
    }

    /// As [`Enforcement::start`], with other options for `enforcer run`.
    ///
    /// # Errors
    /// As [`Enforcement::start`].
    pub fn start_with(cgroup: Cgroup, policy: &PolicySpec, options: &[&str]) -> Result<Self> {
        let mut enforcement = Self::prepare(cgroup, policy, options)?;
        enforcement.launch()?;
        Ok(enforcement)
    }

    /// Writes policy and key files, and starts nothing yet.
    ///
    /// # Errors
    /// When a file can't be written or the daemon's program is not there.
    pub fn prepare(cgroup: Cgroup, policy: &PolicySpec, options: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        policy.write(directory.path())?;
        Ok(Self {
            daemon: None,
            pin_name: fresh_pin_name(),
            bin: enforcer_bin()?,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            cgroup,
            directory,
            netns: None,
        })
    }

    /// Daemons that are started from here on live in this network namespace.
    pub fn live_in(&mut self, netns: &Arc<NetNs>) {
        self.netns = Some(Arc::clone(netns));
    }

    /// Starts the daemon (again) and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn launch(&mut self) -> Result<()> {
        let mut daemon = self.spawn_daemon()?;
        let json = self.options.iter().any(|option| option.contains("json"));
        daemon.wait_for_line(if json { "\"ready\"" } else { " ready" }, START_LIMIT)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Starts a daemon for the same policy, cgroup and pin name, and waits for nothing. It is the caller's.
    ///
    /// # Errors
    /// When the program can't be started.
    pub fn spawn_daemon(&self) -> Result<Proc> {
        self.spawn_daemon_with(&[])
    }

    /// As [`Enforcement::spawn_daemon`], with further options.
    ///
    /// # Errors
    /// As [`Enforcement::spawn_daemon`].
    pub fn spawn_daemon_with(&self, options: &[&str]) -> Result<Proc> {
        let mut command = Command::new(&self.bin);
        command.arg("run").arg("--policy").arg(self.policy_path()).arg("--cgroup").arg(self.cgroup.path());
        command.args(["--pin-name", &self.pin_name]).args(&self.options).args(options);
        if let Some(netns) = &self.netns {
            netns.place(&mut command)?;
        }
        Proc::spawn("enforcer run", command)
    }

    /// The daemon.
    ///
    /// # Errors
    /// When none was started, or it was stopped.
    pub fn daemon(&mut self) -> Result<&mut Proc> {
        self.daemon.as_mut().context("no daemon runs")
    }

    /// Everything that the daemon wrote to its log.
    ///
    /// # Errors
    /// When none runs.
    pub fn log(&self) -> Result<String> {
        Ok(self.daemon.as_ref().context("no daemon runs")?.stderr())
    }

    /// SIGTERM, then waits for the end.
    ///
    /// # Errors
    /// When none runs or it does not end in time.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let mut daemon = self.daemon.take().context("no daemon runs")?;
        daemon.terminate(STOP_LIMIT)
    }

    /// SIGKILL. What it pinned stays.
    ///
    /// # Errors
    /// When none runs.
    pub fn kill9(&mut self) -> Result<ExitStatus> {
        self.daemon.take().context("no daemon runs")?.kill()
    }

    /// Replaces the policy file and its key files; the daemon reads them when it is started next.
    ///
    /// # Errors
    /// When they can't be written.
    pub fn write_policy(&self, policy: &PolicySpec) -> Result<()> {
        policy.write(self.directory.path())
    }

    /// The policy file.
    #[must_use]
    pub fn policy_path(&self) -> PathBuf {
        self.directory.path().join("policy.yaml")
    }

    /// The key file of an issuer with keys in a file.
    #[must_use]
    pub fn key_file(&self, issuer_name: &str) -> PathBuf {
        self.directory.path().join(format!("{issuer_name}.jwks"))
    }

    /// The guarded cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The pin name.
    #[must_use]
    pub fn pin_name(&self) -> &str {
        &self.pin_name
    }

    /// The pin directory.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        Path::new(BPFFS).join(&self.pin_name)
    }

    /// Where it keeps its revocations.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        Path::new(STATE_DIR).join(&self.pin_name)
    }

    /// Pins of this enforcement: the directory, and those used while it is made or replaced.
    #[must_use]
    pub fn leftover_pins(&self) -> Vec<PathBuf> {
        entries(Path::new(BPFFS)).into_iter().filter(|path| belongs_to(path, &self.pin_name)).collect()
    }

    /// Runs `enforcer ARGUMENTS --pin-name NAME` to its end.
    ///
    /// # Errors
    /// When it can't be started or does not end; a failure's exit code is in the result.
    pub fn cli(&self, arguments: &[&str]) -> Result<Finished> {
        self.cli_with_input(arguments, b"")
    }

    /// As [`Enforcement::cli`], with `input` on standard input.
    ///
    /// # Errors
    /// As [`Enforcement::cli`].
    pub fn cli_with_input(&self, arguments: &[&str], input: &[u8]) -> Result<Finished> {
        let mut command = Command::new(&self.bin);
        command.args(arguments).args(["--pin-name", &self.pin_name]);
        run(&format!("enforcer {}", arguments.join(" ")), command, input, CLI_LIMIT)
    }

    /// A command's result as JSON.
    ///
    /// # Errors
    /// When it fails or prints no JSON.
    pub fn cli_json(&self, arguments: &[&str]) -> Result<Value> {
        let finished = self.cli(&[arguments, &["--output", "json"]].concat())?;
        ensure!(finished.status.success(), "{arguments:?}: {}: {}", finished.status, finished.stderr);
        serde_json::from_str(&finished.stdout).with_context(|| format!("{arguments:?}: {}", finished.stdout))
    }

    /// A counter of the kernel programs; 0 when it never rose.
    ///
    /// # Errors
    /// When nothing is loaded.
    pub fn counter(&self, name: &str) -> Result<u64> {
        Ok(self.counters()?.kernel(name))
    }

    /// A counter of the daemon: refusals by reason, and `allowed`.
    ///
    /// # Errors
    /// When nothing is loaded.
    pub fn reason(&self, name: &str) -> Result<u64> {
        Ok(self.counters()?.daemon(name))
    }

    /// All counters at once.
    ///
    /// # Errors
    /// When nothing is loaded.
    pub fn counters(&self) -> Result<Counters> {
        Ok(Counters(self.cli_json(&["counters", "--all"])?))
    }
}

/// The counters at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters(Value);

impl Counters {
    /// A counter of the kernel programs.
    #[must_use]
    pub fn kernel(&self, name: &str) -> u64 {
        self.sum("kernel", |found| found == name)
    }

    /// A counter of the daemon.
    #[must_use]
    pub fn daemon(&self, name: &str) -> u64 {
        self.sum("daemon", |found| found == name)
    }

    /// Requests that were handed to the daemon, for whatever reason.
    #[must_use]
    pub fn punts(&self) -> u64 {
        self.sum("kernel", |found| found.starts_with("punt-") && found != "punt-continued")
    }

    /// Connections that were given up in the kernel, for whatever reason.
    #[must_use]
    pub fn dead(&self) -> u64 {
        self.sum("kernel", |found| found.starts_with("dead-") && found != "dead-dropped")
    }

    fn sum(&self, source: &str, wanted: impl Fn(&str) -> bool) -> u64 {
        let all = self.0.get(source).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        all.iter()
            .filter(|entry| entry.get("name").and_then(Value::as_str).is_some_and(&wanted))
            .filter_map(|entry| entry.get("count")?.as_u64())
            .sum()
    }
}

impl Drop for Enforcement {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take()
            && daemon.terminate(STOP_LIMIT).is_err()
        {
            eprintln!("the daemon of {} did not end; it is killed\n{}", self.pin_name, daemon.stderr());
            drop(daemon.kill());
        }
        if self.pins().exists() {
            drop(self.cli(&["unload", "--drain-timeout", "0", "--force"]));
        }
        remove_traces(&self.pin_name);
    }
}

/// Removes pins, lock file and control socket of an enforcement whose daemon has ended. Without pins the kernel frees the programs.
pub fn remove_traces(pin_name: &str) {
    let pins = entries(Path::new(BPFFS)).into_iter().filter(|path| belongs_to(path, pin_name));
    for path in pins {
        if let Err(error) = fs::remove_dir_all(&path) {
            eprintln!("{} stays behind: {error}", path.display());
        }
    }
    // By design the daemon leaves its lock file and its state; a test does not.
    drop(fs::remove_dir_all(Path::new(STATE_DIR).join(pin_name)));
    for kind in ["lock", "sock"] {
        drop(fs::remove_file(Path::new(RUN_DIR).join(format!("{pin_name}.{kind}"))));
    }
}

fn belongs_to(path: &Path, pin_name: &str) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // A name with more behind it is that of a stage of the same pins, unless it only continues the number.
    name.strip_prefix(pin_name).is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
}

/// Removes what test processes that no longer run left behind (killed before they could clean up).
fn sweep() {
    for path in [BPFFS, RUN_DIR, STATE_DIR].iter().flat_map(|directory| entries(Path::new(directory))) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let pid = name.strip_prefix(PIN_PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Another test may sweep the same at this moment.
            drop(if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) });
        }
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).collect()
}
