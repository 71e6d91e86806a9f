//! `cargo xtask build`: the kernel programs, then the host programs with them inside.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::probe;
use crate::process::run;
use crate::setup::BpfToolchain;
use crate::workspace::{BPF_PACKAGE, Workspace, scrub};

/// The kernel's 64-bit little-endian target.
const BPF_TARGET: &str = "bpfel-unknown-none";

/// Variables that would reach into the kernel build from outside. They are set for the host's sake, or by rustup.
const FOREIGN: &[&str] = &[
    "RUSTC",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTFLAGS",
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "RUSTUP_TOOLCHAIN",
];

/// Compiler flags of the kernel programs.
///
/// `target-cpu=v3` gives 32-bit operations and is what every kernel that we run on takes; `--btf` and full debug
/// information give the types that the loader checks; `bpf_target_arch` tells aya's bindings whose registers they see.
fn bpf_rustflags() -> String {
    let arch = format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH);
    [arch.as_str(), "-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"].join("\x1f")
}

/// Builds the kernel programs; cargo decides whether there is anything to do. Returns the object.
pub(crate) fn bpf_object(workspace: &Workspace, toolchain: &BpfToolchain) -> Result<PathBuf> {
    let object = workspace.bpf_object();
    let directory = object.parent().context("the object's path has no directory")?;
    // Cargo copies the artifact here while it holds its lock, so another checkout that shares the target directory
    // can't slip its own in between.
    let fresh = directory.join("fresh");
    fs::create_dir_all(&fresh).with_context(|| format!("can't create {}", fresh.display()))?;

    let compiler = &toolchain.compiler;
    let mut cargo = std::process::Command::new(&compiler.cargo);
    scrub(&mut cargo);
    for name in FOREIGN {
        cargo.env_remove(name);
    }
    cargo
        .current_dir(&workspace.root)
        // Named outright: a rustup shim would put its own toolchain's libraries before the linker's.
        .env("RUSTC", &compiler.rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", bpf_rustflags())
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &toolchain.linker.path);
    if compiler.needs_bootstrap() {
        cargo.env("RUSTC_BOOTSTRAP", "1");
    }
    if let Some(llvm_dir) = probe::llvm_dir(workspace, compiler)? {
        cargo.env("LD_LIBRARY_PATH", probe::library_path(&llvm_dir));
    }
    cargo
        .args(["build", "--release", "--package", BPF_PACKAGE, "--bin", BPF_PACKAGE, "--target", BPF_TARGET])
        .args(["-Z", "build-std=core", "-Z", "unstable-options"])
        .arg("--artifact-dir")
        .arg(&fresh)
        .arg("--target-dir")
        .arg(workspace.bpf_build_dir());
    run(&mut cargo).context(
        "the kernel programs did not build. If the messages above come from the linker or from `core`, \
         `cargo xtask setup --check` shows which toolchain was chosen and why",
    )?;
    publish(&fresh.join(BPF_PACKAGE), &object)?;
    Ok(object)
}

/// Replaces `published` only when the bytes differ: its time stamp decides whether the daemon is compiled again.
fn publish(fresh: &Path, published: &Path) -> Result<()> {
    let bytes = fs::read(fresh).with_context(|| format!("cargo made no {}", fresh.display()))?;
    if fs::read(published).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let temporary = published.with_extension("new");
    fs::write(&temporary, bytes).with_context(|| format!("can't write {}", temporary.display()))?;
    fs::rename(&temporary, published).with_context(|| format!("can't write {}", published.display()))
}

/// Builds every host binary. A debug build takes xtask along, though it is running, so that dependencies have the features that
/// they have in tests.
pub(crate) fn host(workspace: &Workspace, release: bool) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--workspace", "--bins", "--exclude", BPF_PACKAGE]);
    if release {
        cargo.args(["--release", "--exclude", "xtask"]);
    }
    run(&mut cargo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_separated_as_cargo_wants_them() {
        let flags = bpf_rustflags();
        let flags: Vec<&str> = flags.split('\x1f').collect();
        assert_eq!(flags.len(), 4);
        assert!(flags[0].starts_with("--cfg=bpf_target_arch=\"") && flags[0].ends_with('"'));
        assert!(flags.iter().all(|flag| !flag.contains(' ')));
    }

    #[test]
    fn an_equal_object_is_left_alone_and_a_different_one_replaced() {
        let directory = env::temp_dir().join(format!("xtask-publish-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (fresh, published) = (directory.join("fresh"), directory.join("published"));
        fs::write(&fresh, b"one").unwrap();
        publish(&fresh, &published).unwrap();
        let first = fs::metadata(&published).unwrap().modified().unwrap();
        publish(&fresh, &published).unwrap();
        assert_eq!(fs::metadata(&published).unwrap().modified().unwrap(), first);
        fs::write(&fresh, b"two").unwrap();
        publish(&fresh, &published).unwrap();
        assert_eq!(fs::read(&published).unwrap(), b"two");
        assert!(publish(&directory.join("absent"), &published).is_err());
        fs::remove_dir_all(&directory).unwrap();
    }
}
