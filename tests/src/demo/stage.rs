//! What the demo sets up on the machine, and takes down again.

use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::cli::Cli;
use crate::guard::{Cgroup, Proc, bin_path, spawn_in};
use crate::issuer::{Alg, Issuer, IssuerServer};
use crate::peers::listening_addr;

/// How the pin directories of demos are called, followed by the demo's process id.
const PIN_PREFIX: &str = "enforcer-demo-";
/// Where the daemon pins when it is not told otherwise.
const BPFFS: &str = "/sys/fs/bpf";
/// Where the daemon's lock file stays behind, to tell the commands about the last daemon.
const LOCKS: &str = "/run/enforcer";
/// How long a program may take to start. The enforcer tries the kernel first.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long the daemon may take to end: it lets connections end for [`DRAIN_SECS`] first.
const STOP_LIMIT: Duration = Duration::from_secs(20);
const DRAIN_SECS: &str = "3";

/// The workload that a subject's tokens belong to, by the demo's policy.
pub(super) const AGENT: &str = "agent-a.service";
/// That subject.
pub(super) const BOUND_SUBJECT: &str = "erin";
/// The scope that the demo's policy asks for.
pub(super) const SCOPE: &str = "tools.call";

/// Issuer, MCP server and enforcer. On drop whatever still runs is ended, in the order that loses nothing: first the
/// enforcement, then the server, then the cgroup.
pub struct Stage {
    cli: Cli,
    daemon: Option<Proc>,
    server: Option<(Proc, SocketAddr)>,
    issuer: Issuer,
    issuer_server: IssuerServer,
    directory: tempfile::TempDir,
    cgroup: Cgroup,
}

impl Stage {
    /// Makes the cgroup and starts the issuer. Demos that were killed before they could clean up are cleaned up after.
    ///
    /// # Errors
    /// Without root, without a cgroup2 mount, or when no port can be bound.
    pub fn new(enforcer: &Path) -> Result<Self> {
        ensure!(enforcer.is_file(), "there is no program {}", enforcer.display());
        sweep(enforcer);
        let (issuer, issuer_server) = Issuer::served("/realms/demo", Alg::Es256)?;
        Ok(Self {
            cli: Cli::new(enforcer, &format!("{PIN_PREFIX}{}", std::process::id())),
            daemon: None,
            server: None,
            issuer,
            issuer_server,
            directory: tempfile::tempdir().context("cannot make a directory for the policy")?,
            cgroup: Cgroup::new("demo.slice")?,
        })
    }

    pub(super) fn cli(&self) -> &Cli {
        &self.cli
    }

    pub(super) fn issuer(&self) -> &Issuer {
        &self.issuer
    }

    pub(super) fn issuer_server(&self) -> &IssuerServer {
        &self.issuer_server
    }

    pub(super) fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// A workload below the guarded cgroup, which it shares with the server.
    pub(super) fn workload(&self, name: &str) -> Result<Cgroup> {
        self.cgroup.child(name)
    }

    /// Starts the MCP server in the cgroup.
    pub(super) fn start_server(&mut self) -> Result<()> {
        let mut command = Command::new(bin_path("enforcer-mcp")?);
        command.args(["server", "--listen", "127.0.0.1:0"]).process_group(0);
        let mut process = spawn_in(&self.cgroup, "the MCP server", command)?;
        let addr = listening_addr(&mut process, START_LIMIT)?;
        self.server = Some((process, addr));
        Ok(())
    }

    /// Where the MCP server listens.
    pub(super) fn addr(&self) -> Result<SocketAddr> {
        Ok(self.server.as_ref().context("the MCP server was not started")?.1)
    }

    /// The MCP server's process id, if it still runs.
    pub(super) fn server_pid(&mut self) -> Result<Option<u32>> {
        let Some((process, _)) = &mut self.server else { return Ok(None) };
        Ok(process.try_wait()?.is_none().then(|| process.pid()))
    }

    /// The MCP endpoint's URL, which is also the resource that tokens must be issued for.
    pub(super) fn resource(&self) -> Result<String> {
        Ok(format!("http://{}/mcp", self.addr()?))
    }

    /// Where clients find out whose tokens to get (RFC 9728 section 3.1).
    pub(super) fn metadata_url(&self) -> Result<String> {
        Ok(format!("http://{}/.well-known/oauth-protected-resource/mcp", self.addr()?))
    }

    /// The policy: one issuer, one server.
    pub(super) fn policy(&self) -> Result<String> {
        Ok(format!(
            "version: 1\n\
             issuers:\n\
             \x20 - name: demo\n\
             \x20   issuer: {issuer}\n\
             \x20   keys: {{url: \"{keys}\"}}\n\
             \x20   allow_http_loopback: true\n\
             \x20   algorithms: [ES256]\n\
             servers:\n\
             \x20 - name: calculator\n\
             \x20   listen: [\"{addr}\"]\n\
             \x20   resource: {resource}\n\
             \x20   issuers: [demo]\n\
             \x20   scopes: [{SCOPE}]\n\
             workloads:\n\
             \x20 - {{name: agent-a, unit: {AGENT}}}\n\
             bind:\n\
             \x20 - {{subject: {BOUND_SUBJECT}, workloads: [agent-a]}}\n",
            issuer = self.issuer.uri(),
            keys = self.issuer_server.jwks_url(),
            addr = self.addr()?,
            resource = self.resource()?,
        ))
    }

    /// Starts the enforcer on the cgroup and waits until it enforces.
    pub(super) fn start_enforcer(&mut self) -> Result<()> {
        let path = self.directory.path().join("policy.yaml");
        fs::write(&path, self.policy()?).context("cannot write the policy")?;
        let [run, policy, cgroup, drain] = ["run", "--policy", "--cgroup", "--drain-timeout"].map(OsStr::new);
        let command = self.cli.command(&[
            run,
            policy,
            path.as_os_str(),
            cgroup,
            self.cgroup.path().as_os_str(),
            drain,
            OsStr::new(DRAIN_SECS),
        ]);
        let daemon = self.daemon.insert(Proc::spawn("enforcer run", command)?);
        daemon.wait_for_line("ready", START_LIMIT)?;
        Ok(())
    }

    /// CPU time the daemon has used so far.
    pub(super) fn daemon_cpu_time(&self) -> Result<Duration> {
        self.daemon.as_ref().context("the enforcer was not started")?.cpu_time()
    }

    /// Whether the enforcement's pin directory is there.
    pub(super) fn pins_exist(&self) -> bool {
        Path::new(BPFFS).join(self.cli.pin_name()).exists()
    }

    /// Everything the daemon logged.
    pub(super) fn daemon_log(&self) -> String {
        self.daemon.as_ref().map(|daemon| daemon.stdout() + &daemon.stderr()).unwrap_or_default()
    }

    /// Asks the daemon to end (SIGTERM) and waits. It is forgotten only when it ended well: what went wrong is cleaned up on
    /// drop.
    pub(super) fn stop_enforcer(&mut self) -> Result<()> {
        let daemon = self.daemon.as_mut().context("the enforcer was not started")?;
        let status = daemon.terminate(STOP_LIMIT)?;
        ensure!(status.success(), "enforcer run ended with {status}: {}", last_line(&daemon.stderr()));
        self.daemon = None;
        Ok(())
    }

    /// Ends everything that still runs.
    ///
    /// # Errors
    /// When the enforcement can't be removed from the kernel; the message says how to do it by hand.
    pub fn close(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        let removed = if self.daemon.is_none() {
            Ok(())
        } else {
            let stopped = self.stop_enforcer();
            // Killed if it still runs.
            self.daemon = None;
            stopped.or_else(|_| self.unload())
        };
        self.server = None;
        remove_lock(self.cli.pin_name());
        removed
    }

    /// Removes what a daemon left behind that did not end well.
    fn unload(&self) -> Result<()> {
        let finished = self.cli.run(&["unload", "--drain-timeout", "0", "--force"])?;
        let (pin, said) = (self.cli.shown("unload --force"), finished.stderr);
        ensure!(
            finished.status.success(),
            "the enforcement is still in the kernel: {}; try `{pin}`",
            said.trim()
        );
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            eprintln!("enforcer-demo: {error:#}");
        }
    }
}

/// The end of what a program said.
fn last_line(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing")
}

/// A demo's enforcement never comes back under its name. There is nothing to do if the file is not there.
fn remove_lock(pin_name: &str) {
    drop(fs::remove_file(Path::new(LOCKS).join(format!("{pin_name}.lock"))));
}

/// Removes the enforcements of demos that no longer run. One that can't be removed is no reason not to begin.
fn sweep(enforcer: &Path) {
    for (pin_name, pid) in demo_pins() {
        if Path::new("/proc").join(pid.to_string()).exists() {
            continue;
        }
        let outcome = Cli::new(enforcer, &pin_name)
            .run(&["unload", "--drain-timeout", "0", "--force"])
            .and_then(|finished| {
                let said = || anyhow!("{}", last_line(&finished.stderr).to_owned());
                if finished.status.success() { Ok(()) } else { Err(said()) }
            });
        remove_lock(&pin_name);
        if let Err(error) = outcome {
            eprintln!("enforcer-demo: cannot remove what an earlier demo left as {pin_name}: {error:#}");
        }
    }
}

fn demo_pins() -> Vec<(String, u32)> {
    let Ok(entries) = fs::read_dir(PathBuf::from(BPFFS)) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let pid = name.strip_prefix(PIN_PREFIX)?.parse().ok()?;
            Some((name, pid))
        })
        .collect()
}
