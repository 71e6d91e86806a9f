//! `cargo xtask test vm`: the end-to-end tests in other kernels.

mod archive;
mod image;
mod plan;
mod qemu;
mod report;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process::stdout_of;
use crate::workspace::{BPF_PACKAGE, Workspace};
use crate::{build, setup};
use archive::{Archive, Kernel, Wanted};
use report::Row;

/// The guests: what the user calls them, which kernel, and whether the daemon must refuse there.
const GUESTS: &[(&str, Wanted, bool)] = &[
    ("6.1", Wanted::Series(&[6, 1]), false),
    ("6.12", Wanted::Series(&[6, 12]), false),
    ("6.18", Wanted::Series(&[6, 18]), false),
    ("7", Wanted::Series(&[7]), false),
    ("stalling", Wanted::Stalling, true),
];

/// What the user asked for.
#[derive(Debug)]
pub(crate) struct Options {
    /// Names of guests; empty means all.
    pub(crate) kernels: Vec<String>,
    /// Also write the results to this file.
    pub(crate) markdown: Option<PathBuf>,
    /// Limit of each guest.
    pub(crate) guest_limit: Duration,
    /// Take what was downloaded before.
    pub(crate) offline: bool,
}

/// Names that `--kernel` takes.
pub(crate) fn names() -> Vec<&'static str> {
    GUESTS.iter().map(|(name, _wanted, _must_refuse)| *name).collect()
}

/// Builds, downloads, boots each guest, prints the table; fails when a guest is not as it must be.
pub(crate) fn test(workspace: &Workspace, options: &Options) -> Result<()> {
    if env::consts::ARCH != "x86_64" {
        bail!(
            "the guests are x86-64 and run this machine's own programs; this machine is {}",
            env::consts::ARCH
        );
    }
    let qemu = qemu::ensure()?;
    let toolchain = setup::ensure(workspace)?;
    build::bpf_object(workspace, &toolchain)?;
    build::host(workspace, false)?;
    let tests = test_programs(workspace)?;

    let directory = workspace.target_dir.join("vm");
    let archive = Archive::open(directory.join("apt"), options.offline)?;
    archive.unpack(&["busybox-static".into()], &directory.join("busybox"))?;
    let busybox = [directory.join("busybox/bin/busybox"), directory.join("busybox/usr/bin/busybox")]
        .into_iter()
        .find(|path| path.is_file())
        .context("the package busybox-static has no busybox")?;
    let images = image::ImageBuilder::new(directory.clone(), busybox);
    let programs: Vec<PathBuf> = ["enforcer", "enforcer-upstream", "enforcer-mcp", "enforcer-caller"]
        .iter()
        .map(|name| workspace.binary("debug", name))
        .chain(tests)
        .collect();
    let working = images.common("working", &programs, &plan::working())?;
    let refused = images.common("refused", &programs[..1], &plan::refused())?;

    let kernels = archive.kernels()?;
    let mut rows = Vec::new();
    let mut guests = Vec::new();
    for (series, wanted, must_refuse) in GUESTS {
        if !options.kernels.is_empty() && !options.kernels.iter().any(|name| name == series) {
            continue;
        }
        let common = if *must_refuse { &refused } else { &working };
        let mut row = Row {
            series,
            kernel: None,
            must_refuse: *must_refuse,
            reading: plan::Reading::default(),
            took_secs: 0.0,
        };
        match archive::newest(&kernels, *wanted) {
            None => row.reading.defects.push("GONE: the archive has no such kernel any more".into()),
            Some(kernel) => {
                let unpacked = directory.join("kernels").join(&kernel.release);
                archive.unpack(&kernel.packages, &unpacked)?;
                row.kernel = Some(format!("{} ({})", kernel.release, kernel.version));
                let image = images.image(&kernel.release, &unpacked, common)?;
                let log = directory.join(format!("{}.kernel.log", kernel.release));
                guests.push((rows.len(), kernel, image::vmlinuz(&unpacked)?, image, log));
            }
        }
        rows.push(row);
    }

    // As many at a time as there are processors: each guest has one.
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let (waiting, rows) = (Mutex::new(guests.into_iter()), Mutex::new(rows));
    thread::scope(|scope| {
        let worker = || -> Result<()> {
            loop {
                let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((index, kernel, vmlinuz, image, log)) = next else { return Ok(()) };
                let name = format!("{} | ", kernel.release);
                let outcome = qemu::boot(&name, &qemu, &vmlinuz, &image, &log, options.guest_limit)?;
                // The largest files here; the next run makes them again.
                let _ = fs::remove_file(&image);
                let row = &mut rows.lock().unwrap_or_else(PoisonError::into_inner)[index];
                row.took_secs = outcome.took.as_secs_f64();
                row.reading = judge(&outcome.lines, outcome.timed_out, &log, kernel, row.must_refuse);
            }
        };
        let workers: Vec<_> = (0..processors).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    let rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);

    println!("\n{}", report::table(&rows));
    if let Some(path) = &options.markdown {
        fs::write(path, report::markdown(&rows, &qemu::version(&qemu)))
            .with_context(|| format!("can't write {}", path.display()))?;
    }
    let failed: Vec<&str> = rows.iter().filter(|row| !row.is_good()).map(|row| row.series).collect();
    if !failed.is_empty() {
        bail!("not as it must be: {}; the kernels' logs are in {}", failed.join(", "), directory.display());
    }
    Ok(())
}

fn judge(
    lines: &[String],
    timed_out: bool,
    log: &std::path::Path,
    kernel: &Kernel,
    must_refuse: bool,
) -> plan::Reading {
    let steps = if must_refuse { plan::refused() } else { plan::working() };
    let mut reading = plan::read(lines, &steps);
    if timed_out {
        reading.defects.push("it was ended because its time was up (--guest-limit-s)".into());
    }
    if reading.release.as_ref().is_some_and(|release| *release != kernel.release) {
        reading.defects.push(format!("it runs {:?} instead of {}", reading.release, kernel.release));
    }
    match fs::read(log) {
        Ok(bytes) => reading.defects.extend(plan::complaints(&String::from_utf8_lossy(&bytes))),
        Err(error) => reading.defects.push(format!("no kernel log: {error}")),
    }
    reading
}

/// Builds the test programs that the guests run, for debugging, and says where cargo put them.
fn test_programs(workspace: &Workspace) -> Result<Vec<PathBuf>> {
    let mut cargo = workspace.cargo();
    // As `cargo xtask test` selects them, so that dependencies are compiled once.
    cargo.args(["test", "--no-run", "--message-format=json-render-diagnostics"]);
    cargo.args(["--workspace", "--exclude", BPF_PACKAGE]);
    for (name, _tests) in plan::TESTS {
        cargo.args(["--test", name]);
    }
    eprintln!("$ {}", crate::process::shown(&cargo));
    let messages = stdout_of(&mut cargo)?;
    plan::TESTS
        .iter()
        .map(|(name, _tests)| {
            executable(&messages, name).with_context(|| format!("cargo built no test program {name}"))
        })
        .collect()
}

fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|message| {
        let is_it = message["target"]["name"] == name && message["reason"] == "compiler-artifact";
        is_it.then(|| message["executable"].as_str().map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::TESTS_PACKAGE;

    #[test]
    fn the_test_programs_are_found_by_name() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"e2e_x"},"executable":"/t/e2e_x-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "e2e_x"), Some("/t/e2e_x-1".into()));
        assert_eq!(executable(messages, "e2e_y"), None);
    }

    #[test]
    fn every_planned_program_and_test_exists() {
        let workspace = Workspace::locate().unwrap();
        let known = workspace.targets_of_kind(TESTS_PACKAGE, "test");
        for (name, tests) in plan::TESTS {
            assert!(known.contains(name), "{name}");
            let place = workspace.root.join("tests/e2e").join(name.trim_start_matches("e2e_"));
            for test in *tests {
                let (module, function) = test.rsplit_once("::").unwrap_or(("", test));
                let file = if module.is_empty() {
                    place.with_extension("rs")
                } else {
                    place.join(module).with_extension("rs")
                };
                let source = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
                let start = format!("\nfn {function}");
                assert!(source.contains(&start), "{file:?} has no test {function}");
            }
        }
    }
}
