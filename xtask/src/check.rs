//! `cargo xtask check`: everything that CI looks at besides the tests.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::run;
use crate::setup::BpfToolchain;
use crate::workspace::{BPF_PACKAGE, Workspace};
use crate::{build, bypass};

/// A longer file is a hint that it holds two subjects.
const MOST_LINES_PER_FILE: usize = 450;

/// The step that repairs itself.
const FORMAT: &str = "format";

/// A named step and how it ended.
type Step = (&'static str, Result<()>);

/// Runs every step, also after one that failed, and fails naming those that did.
pub(crate) fn check(workspace: &Workspace, toolchain: &BpfToolchain) -> Result<()> {
    // First, because the daemon's crate embeds the object: nothing that includes it compiles without.
    build::bpf_object(workspace, toolchain)?;
    let steps: Vec<Step> = vec![
        (FORMAT, run(workspace.cargo().args(["fmt", "--all", "--check"]))),
        ("lints of the host crates", host_clippy(workspace)),
        (
            "lints of the kernel programs",
            run(bpf_on_host(workspace, "clippy").args(["--", "-D", "warnings"])),
        ),
        ("documentation of the host crates", host_doc(workspace)),
        ("documentation of the kernel programs", bpf_doc(workspace)),
        ("shape of the tree", tree(&workspace.root)),
        ("tests named in the documentation", bypass::check(&workspace.root)),
    ];
    let mut failed = Vec::new();
    for (name, outcome) in steps {
        match outcome {
            Ok(()) => println!("ok      {name}"),
            Err(error) => {
                println!("FAILED  {name}: {error:#}");
                failed.push(name);
            }
        }
    }
    if !failed.is_empty() {
        let hint = if failed.contains(&FORMAT) { "; `cargo fmt --all` repairs the format" } else { "" };
        bail!("checks failed: {}{hint}", failed.join(", "));
    }
    Ok(())
}

fn host_clippy(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["clippy", "--workspace", "--exclude", BPF_PACKAGE, "--all-targets", "--", "-D", "warnings"]);
    run(&mut cargo)
}

fn host_doc(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo
        .args(["doc", "--no-deps", "--workspace", "--exclude", BPF_PACKAGE])
        .env("RUSTDOCFLAGS", "-D warnings");
    run(&mut cargo)
}

fn bpf_doc(workspace: &Workspace) -> Result<()> {
    let mut cargo = bpf_on_host(workspace, "doc");
    cargo.args(["--no-deps", "--document-private-items"]);
    cargo.env("RUSTDOCFLAGS", format!("-D warnings {}", host_flags_of_bpf()));
    run(&mut cargo)
}

/// The kernel programs, looked at by cargo as if they were for the host.
///
/// Clippy must be of the very release that built `core`, and where only a distribution has the source of `core` there
/// is no such clippy. aya's crates compile for the host, with helpers that do nothing, so the whole of the programs
/// is linted except what is `cfg(target_arch = "bpf")`. A directory of its own keeps the other flags from throwing
/// away the host's cache.
fn bpf_on_host(workspace: &Workspace, subcommand: &str) -> Command {
    let mut cargo = workspace.cargo();
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", host_flags_of_bpf());
    cargo
        .args([subcommand, "--package", BPF_PACKAGE, "--target-dir"])
        .arg(workspace.target_dir.join("bpf-lint"));
    cargo
}

/// A program without the standard library can't unwind.
fn host_flags_of_bpf() -> String {
    format!("-Cpanic=abort --cfg=bpf_target_arch=\"{}\"", env::consts::ARCH)
}

fn tree(root: &Path) -> Result<()> {
    let ci = root.join(".ci/run");
    let mode =
        fs::metadata(&ci).with_context(|| format!("{} is missing", ci.display()))?.permissions().mode();
    if mode & 0o111 == 0 {
        bail!("{} is not executable; `chmod +x` it", ci.display());
    }
    for name in ["LICENSE-MIT", "LICENSE-APACHE", "Cargo.lock"] {
        if !root.join(name).is_file() {
            bail!("{name} is missing from {}", root.display());
        }
    }
    for (path, lines) in long_files(root)? {
        println!("warning: {} has {lines} lines; split it by subject", path.display());
    }
    Ok(())
}

/// Rust files over the limit, sorted by path.
fn long_files(root: &Path) -> Result<Vec<(PathBuf, usize)>> {
    let mut found = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries =
            fs::read_dir(&directory).with_context(|| format!("can't read {}", directory.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("can't read {}", directory.display()))?;
            let path = entry.path();
            let name = entry.file_name();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if name != "target" && !name.to_string_lossy().starts_with('.') {
                    directories.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text =
                    fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
                let lines = text.lines().count();
                if lines > MOST_LINES_PER_FILE {
                    found.push((path, lines));
                }
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_long_files_outside_of_build_directories() {
        let root = env::temp_dir().join(format!("xtask-tree-{}", std::process::id()));
        for directory in ["src", "target", ".git"] {
            fs::create_dir_all(root.join(directory)).unwrap();
            fs::write(root.join(directory).join("long.rs"), "\n".repeat(MOST_LINES_PER_FILE + 1)).unwrap();
        }
        fs::write(root.join("src/just.rs"), "\n".repeat(MOST_LINES_PER_FILE)).unwrap();
        fs::write(root.join("src/long.txt"), "\n".repeat(MOST_LINES_PER_FILE + 1)).unwrap();
        assert_eq!(long_files(&root).unwrap(), [(root.join("src/long.rs"), MOST_LINES_PER_FILE + 1)]);

        assert!(tree(&root).unwrap_err().to_string().contains(".ci/run"));
        fs::remove_dir_all(&root).unwrap();
    }
}
