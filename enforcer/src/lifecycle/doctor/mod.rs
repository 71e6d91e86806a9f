//! Whether this machine can hold an enforcement: checks by behaviour, not by version.

mod kernel;
mod listeners;
mod machine;

use std::collections::BTreeSet;
use std::path::PathBuf;

use enforcer_common::abi::EndpointKey;
use serde::Serialize;

use crate::datapath::PinDir;

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Pass,
    /// An enforcement works, but something should be known.
    Warn,
    /// An enforcement will not work.
    Fail,
}

impl Grade {
    /// Name, for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable kebab-case name.
    pub name: &'static str,
    /// How it went.
    pub grade: Grade,
    /// What was found.
    pub detail: String,
    /// What to do about it; absent when there is nothing to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_step: Option<String>,
}

impl Check {
    fn pass(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, grade: Grade::Pass, detail: detail.into(), next_step: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { name, grade: Grade::Warn, detail: detail.into(), next_step: Some(next_step.into()) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { name, grade: Grade::Fail, detail: detail.into(), next_step: Some(next_step.into()) }
    }
}

/// A check of the datapath by behaviour: what was seen, or why an enforcement would not work here.
pub type BehaviourCheck = Box<dyn FnOnce() -> Result<String, String>>;

/// What to check.
pub struct Options {
    /// Where the pins will lie.
    pub bpffs: PathBuf,
    /// The cgroup to guard; the hierarchy's root when absent.
    pub cgroup: Option<PathBuf>,
    /// The endpoints of the policy that is to be enforced, if it is known.
    pub endpoints: Option<BTreeSet<EndpointKey>>,
    /// The pins of an enforcement that may be loaded.
    pub pins: PinDir,
    /// The datapath's own test; run last, and only if the programs load.
    pub behaviour: Option<BehaviourCheck>,
}

/// Runs all checks, in a stable order. They need no enforcement, disturb none, and leave nothing behind, except that a
/// missing bpffs is mounted, as `run` does it.
#[must_use]
pub fn examine(options: Options) -> Vec<Check> {
    let mut checks = vec![
        machine::privileges(),
        machine::kernel(),
        kernel::type_information(),
        machine::cgroup(options.cgroup.as_deref()),
        machine::bpffs(&options.bpffs),
    ];
    let programs = kernel::programs(&options.bpffs);
    let loaded = programs.grade == Grade::Pass;
    checks.extend([machine::memlock(loaded), programs, kernel::socket_destruction(), machine::mptcp()]);
    let clock = machine::clock();
    let may_behave = loaded && clock.grade == Grade::Pass;
    checks.extend([clock, listeners::check(&options)]);
    match options.behaviour {
        Some(behaviour) if may_behave => checks.push(match behaviour() {
            Ok(detail) => Check::pass("behaviour", detail),
            Err(detail) => Check::fail(
                "behaviour",
                detail,
                "this kernel delivers injected bytes wrongly; use another one (docs/cli.md, `doctor`)",
            ),
        }),
        Some(_) => checks.push(Check::fail(
            "behaviour",
            "not tried: the programs do not load, or the clocks differ",
            "see above",
        )),
        None => {}
    }
    checks
}

/// Whether an enforcement will work: no check failed.
#[must_use]
pub fn is_fit(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.grade != Grade::Fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::{paths, testing::is_root};

    #[test]
    fn this_machine_is_fit() {
        if !is_root("this_machine_is_fit") {
            return;
        }
        let bpffs = PathBuf::from(paths::BPFFS);
        let pins = PinDir::new(bpffs.join("enforcer-doctor-test"));
        let behaviour: BehaviourCheck = Box::new(|| Ok("worked".into()));
        let options = Options { bpffs, cgroup: None, endpoints: None, pins, behaviour: Some(behaviour) };
        let checks = examine(options);
        assert!(is_fit(&checks), "{checks:#?}");
        let names: Vec<_> = checks.iter().map(|check| check.name).collect();
        assert_eq!(
            names,
            [
                "privileges",
                "kernel",
                "type-information",
                "cgroup2",
                "bpffs",
                "memlock",
                "programs",
                "socket-destruction",
                "mptcp",
                "clock",
                "listeners",
                "behaviour"
            ]
        );
        let left = std::fs::read_dir(paths::BPFFS).unwrap().flatten().any(|entry| {
            entry.file_name().to_string_lossy() == format!("enforcer-doctor-{}", std::process::id())
        });
        assert!(!left);
    }

    #[test]
    fn a_failed_behaviour_is_a_failed_machine() {
        if !is_root("a_failed_behaviour_is_a_failed_machine") {
            return;
        }
        let bpffs = tempfile::tempdir().unwrap();
        let place = bpffs.path().to_owned();
        crate::lifecycle::testing::in_own_mount_namespace(move || {
            let behaviour: BehaviourCheck = Box::new(|| Err("the second request did not arrive".into()));
            let pins = PinDir::new(place.join("enforcer"));
            let checks = examine(Options {
                bpffs: place,
                cgroup: None,
                endpoints: None,
                pins,
                behaviour: Some(behaviour),
            });
            assert!(!is_fit(&checks));
            let last = checks.last().unwrap();
            assert_eq!((last.name, last.grade), ("behaviour", Grade::Fail));
            assert_eq!(last.detail, "the second request did not arrive");
        });
    }

    #[test]
    fn warnings_do_not_fail_a_machine() {
        assert!(is_fit(&[Check::pass("a", ""), Check::warn("b", "", "")]));
        assert!(!is_fit(&[Check::pass("a", ""), Check::fail("b", "", "")]));
    }
}
