//! `cargo xtask test`: every test there is, in steps that can't hang.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::process::{run_bounded, shown};
use crate::summary::{Tally, tally_step};
use crate::workspace::{BPF_PACKAGE, TESTS_PACKAGE, Workspace};
use crate::{build, check, probe, setup};

/// Names the daemon's program to the end-to-end tests, the demo and the benchmark.
pub(crate) const ENFORCER_VARIABLE: &str = "ENFORCER_BIN";

/// A test that can't run here appends a line `name: reason` to this file and returns.
const SKIP_LOG_VARIABLE: &str = "ENFORCER_TEST_SKIP_LOG";

/// Set to `1` by `--quick`: tests take fewer rounds and smaller bodies.
const QUICK_VARIABLE: &str = "ENFORCER_TEST_QUICK";

/// How long the soak test runs, in seconds.
const SOAK_VARIABLE: &str = "ENFORCER_SOAK_SECS";

/// How often the kill test kills the daemon.
const KILLS_VARIABLE: &str = "ENFORCER_KILLS";

/// Cases per property with `--quick`; proptest's own default is 256.
const QUICK_PROPTEST_CASES: &str = "32";

/// What the user asked for.
#[derive(Debug)]
pub(crate) struct Options {
    /// Fewer rounds, smaller bodies.
    pub(crate) quick: bool,
    /// Run the daemon as it is released, not the build with debug assertions.
    pub(crate) release: bool,
    /// Leave out, without complaint, what only root can run.
    pub(crate) unprivileged: bool,
    /// How long the soak test runs; its own default without it.
    pub(crate) soak: Option<Duration>,
    /// How often the kill test kills; its own default without it.
    pub(crate) kills: Option<u64>,
    /// Limit of each step.
    pub(crate) step_limit: Duration,
    /// Substrings of test names; empty means all.
    pub(crate) filters: Vec<String>,
}

/// Sets up, checks, builds, tests, and prints one line with the sum.
pub(crate) fn test(workspace: &Workspace, options: &Options) -> Result<()> {
    let start = Instant::now();
    let toolchain = setup::ensure(workspace)?;
    if options.filters.is_empty() {
        check::check(workspace, &toolchain)?;
    } else {
        eprintln!("tests are filtered by name: `cargo xtask check` is left out");
        build::bpf_object(workspace, &toolchain)?;
    }

    let mut session = Session::begin(workspace, options)?;
    // All at once, so that the compiler has something to do on every CPU; what fails to compile is reported by its own step.
    run_bounded(session.cargo_test(&[]).arg("--no-run"), options.step_limit)?;
    session.step("unit and property tests", &["--lib", "--bins"])?;
    let privileged = session.end_to_end()?;
    session.finish(start.elapsed(), privileged)
}

/// Which tests that need root were run.
enum Privileged {
    Ran,
    LeftOut(Vec<String>),
}

struct Session<'a> {
    workspace: &'a Workspace,
    options: &'a Options,
    skip_log: PathBuf,
    tally: Tally,
    failed_steps: Vec<String>,
}

impl<'a> Session<'a> {
    fn begin(workspace: &'a Workspace, options: &'a Options) -> Result<Self> {
        let directory = workspace.root.join("target/xtask");
        fs::create_dir_all(&directory).with_context(|| format!("can't create {}", directory.display()))?;
        let skip_log = directory.join("skipped.txt");
        fs::write(&skip_log, "").with_context(|| format!("can't write {}", skip_log.display()))?;
        Ok(Self { workspace, options, skip_log, tally: Tally::default(), failed_steps: Vec::new() })
    }

    fn cargo_test(&self, selection: &[&str]) -> Command {
        let mut cargo = self.workspace.cargo();
        cargo
            // One selection of packages for all steps: with another one, dependencies get other features and are compiled again.
            .args(["test", "--no-fail-fast", "--workspace", "--exclude", BPF_PACKAGE])
            .args(selection)
            .env(ENFORCER_VARIABLE, enforcer(self.workspace, self.options.release))
            .env(SKIP_LOG_VARIABLE, &self.skip_log);
        if let Some(soak) = self.options.soak {
            cargo.env(SOAK_VARIABLE, soak.as_secs().to_string());
        }
        if let Some(kills) = self.options.kills {
            cargo.env(KILLS_VARIABLE, kills.to_string());
        }
        if self.options.quick {
            cargo.env(QUICK_VARIABLE, "1").env("PROPTEST_CASES", QUICK_PROPTEST_CASES);
        }
        cargo
    }

    /// Compiles under one limit and runs under another, so that a cold cache does not eat the tests' time.
    fn step(&mut self, name: &str, selection: &[&str]) -> Result<()> {
        eprintln!("\n== {name}");
        let limit = self.options.step_limit;
        let compiled = run_bounded(self.cargo_test(selection).arg("--no-run"), limit)?;
        if !compiled.success {
            let why = if compiled.timed_out { "did not compile in time" } else { "do not compile" };
            self.tally.failed += 1;
            self.failed_steps.push(format!("{name}: {why}; the compiler's messages are above"));
            return Ok(());
        }
        let mut command = self.cargo_test(selection);
        if !self.options.filters.is_empty() {
            // Some print what they measured, which is what one asks for who names them.
            command.args(["--", "--show-output"]).args(&self.options.filters);
        }
        let outcome = run_bounded(&mut command, limit)?;
        let tally = tally_step(outcome.lines.iter().map(String::as_str), outcome.success);
        eprintln!("== {name}: {tally}, {:.1} s", outcome.took.as_secs_f64());
        self.tally += tally;
        if outcome.timed_out {
            let limit = limit.as_secs();
            self.failed_steps.push(format!(
                "{name}: not done after {limit} s and ended (--step-limit-s); the tests without a result above were running"
            ));
        } else if !outcome.success {
            self.failed_steps.push(format!("{name}: run again with `{}`", shown(&command)));
        }
        Ok(())
    }

    fn end_to_end(&mut self) -> Result<Privileged> {
        let names = self.workspace.targets_of_kind(TESTS_PACKAGE, "test");
        if !probe::is_root() {
            return Ok(Privileged::LeftOut(names.into_iter().map(str::to_owned).collect()));
        }
        if names.is_empty() {
            return Ok(Privileged::Ran);
        }
        eprintln!("\n== the daemon for the end-to-end tests");
        build::host(self.workspace, self.options.release)?;
        for name in names {
            self.step(&format!("end to end: {name}"), &["--test", name])?;
        }
        Ok(Privileged::Ran)
    }

    fn finish(mut self, took: Duration, privileged: Privileged) -> Result<()> {
        let skips = read_skips(&self.skip_log)?;
        self.tally.skipped_at_run_time(skips.len() as u64);
        println!();
        for skip in &skips {
            println!("skipped: {skip}");
        }
        let mut incomplete = false;
        if let Privileged::LeftOut(names) = privileged {
            for name in &names {
                println!(
                    "skipped: end to end: {name}: loading eBPF programs and making namespaces needs root"
                );
            }
            self.tally.skipped += names.len() as u64;
            incomplete = !self.options.unprivileged;
        }
        for step in &self.failed_steps {
            println!("failed: {step}");
        }
        println!("{} ({:.0} s)", self.tally, took.as_secs_f64());
        if self.tally.failed > 0 || !self.failed_steps.is_empty() {
            bail!("tests failed");
        }
        if incomplete {
            bail!("not all tests ran: run it as root, or say --unprivileged to be content without them");
        }
        Ok(())
    }
}

/// The daemon's program as the end-to-end tests, the demo and the benchmark run it.
pub(crate) fn enforcer(workspace: &Workspace, release: bool) -> PathBuf {
    workspace.binary(if release { "release" } else { "debug" }, "enforcer")
}

fn read_skips(log: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(log).with_context(|| format!("can't read {}", log.display()))?;
    Ok(text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect())
}
