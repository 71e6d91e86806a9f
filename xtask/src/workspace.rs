//! Where things lie, and how cargo is called.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process;

/// Tells `enforcer/build.rs` which object to embed.
pub(crate) const BPF_OBJECT_VARIABLE: &str = "ENFORCER_BPF_OBJECT";

/// The package that holds the end-to-end tests, the demo and the benchmark.
pub(crate) const TESTS_PACKAGE: &str = "enforcer-tests";

/// The package of the kernel programs.
pub(crate) const BPF_PACKAGE: &str = "enforcer-ebpf";

/// One target of a package, as cargo sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Package that it belongs to.
    pub(crate) package: String,
    /// `bin`, `lib`, `test`, ...
    pub(crate) kind: String,
    /// Its name.
    pub(crate) name: String,
}

/// The workspace as cargo sees it.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// Directory of the workspace's `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Where cargo puts what it builds for the host.
    pub(crate) target_dir: PathBuf,
    /// All targets of all packages.
    pub(crate) targets: Vec<Target>,
}

impl Workspace {
    /// Asks cargo, so that every way to configure the target directory counts.
    pub(crate) fn locate() -> Result<Self> {
        let manifest_dir = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest_dir.parent().context("the directory of xtask has no parent")?.to_owned();
        let mut command = cargo_in(&root);
        command.args(["metadata", "--no-deps", "--format-version=1"]);
        let text = process::stdout_of(&mut command)
            .context("cargo can't read the workspace; `cargo metadata --no-deps` says more")?;
        let metadata: Value = serde_json::from_str(&text).context("`cargo metadata` did not print JSON")?;
        let target_dir = metadata["target_directory"]
            .as_str()
            .context("`cargo metadata` names no target directory")?
            .into();
        Ok(Self { root, target_dir, targets: targets_of(&metadata) })
    }

    /// The finished object. One place per checkout, even when several share a target directory: a stranger's object
    /// must never end up in this checkout's daemon.
    pub(crate) fn bpf_object(&self) -> PathBuf {
        self.root.join("target/bpf").join(BPF_PACKAGE)
    }

    /// Cargo's own directory for the kernel programs, so that neither build ever waits for the other's lock or
    /// throws away its cache.
    pub(crate) fn bpf_build_dir(&self) -> PathBuf {
        self.target_dir.join("bpf-build")
    }

    /// Cargo for the host, with the object's place told.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = cargo_in(&self.root);
        command.env(BPF_OBJECT_VARIABLE, self.bpf_object());
        command
    }

    /// A binary of the host build.
    pub(crate) fn binary(&self, profile_dir: &str, name: &str) -> PathBuf {
        self.target_dir.join(profile_dir).join(name)
    }

    /// Names of all targets of one kind in one package, sorted.
    pub(crate) fn targets_of_kind(&self, package: &str, kind: &str) -> Vec<&str> {
        let matches = |target: &&Target| target.package == package && target.kind == kind;
        let mut names: Vec<&str> =
            self.targets.iter().filter(matches).map(|target| target.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// Fails with a message that names what exists when the package has no such binary.
    pub(crate) fn require_binary(&self, package: &str, name: &str) -> Result<()> {
        let names = self.targets_of_kind(package, "bin");
        if names.contains(&name) {
            return Ok(());
        }
        bail!(
            "package {package} has no binary `{name}` (it has: {}); is the checkout complete?",
            names.join(", ")
        )
    }
}

/// The cargo that called us, with the environment that the user called *it* with.
fn cargo_in(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    scrub(&mut command);
    command
}

/// Removes what `cargo run` set for xtask. Build scripts (ring's among them) ask to be run again when such a variable
/// changes, so leaving them in would rebuild half the tree on every switch between `cargo xtask` and plain `cargo`.
pub(crate) fn scrub(command: &mut Command) {
    for (name, _value) in env::vars_os() {
        if set_by_cargo_run(&name) {
            command.env_remove(name);
        }
    }
}

fn set_by_cargo_run(name: &OsString) -> bool {
    let Some(name) = name.to_str() else { return false };
    matches!(name, "CARGO" | "CARGO_BIN_NAME" | "CARGO_CRATE_NAME" | "CARGO_PRIMARY_PACKAGE" | "OUT_DIR")
        || name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_MANIFEST_")
}

fn targets_of(metadata: &Value) -> Vec<Target> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut targets = Vec::new();
    for package in list(&metadata["packages"]) {
        for target in list(&package["targets"]) {
            for kind in list(&target["kind"]) {
                targets.push(Target {
                    package: text(&package["name"]),
                    kind: text(&kind),
                    name: text(&target["name"]),
                });
            }
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cargo_run_sets_is_scrubbed() {
        for name in ["CARGO", "CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "OUT_DIR"] {
            assert!(set_by_cargo_run(&name.into()), "{name}");
        }
        for name in
            ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_NET_OFFLINE", "CARGO_BUILD_JOBS", "PATH", "RUSTFLAGS"]
        {
            assert!(!set_by_cargo_run(&name.into()), "{name}");
        }
    }

    #[test]
    fn reads_targets_from_metadata() {
        let metadata = serde_json::json!({"packages": [
            {"name": "a", "targets": [{"name": "a", "kind": ["lib", "cdylib"]}, {"name": "run", "kind": ["bin"]}]},
            {"name": "b", "targets": []},
        ]});
        let found: Vec<String> = targets_of(&metadata)
            .into_iter()
            .map(|t| format!("{}/{}/{}", t.package, t.kind, t.name))
            .collect();
        assert_eq!(found, ["a/lib/a", "a/cdylib/a", "a/bin/run"]);
        assert!(targets_of(&Value::Null).is_empty());
    }
}
