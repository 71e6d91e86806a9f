//! `enforcer doctor`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::Global;
use super::exit::{OK, REJECTED};
use super::format::NONE;
use super::output::{Render, print, table};
use crate::core::endpoint_keys;
use crate::daemon::selftest;
use crate::lifecycle::doctor::{Check, Options, examine, is_fit};
use crate::policy;

/// Check whether this machine can enforce
///
/// Tries everything that an enforcement needs: it loads the programs into a pin directory of its own and removes them,
/// destroys a loopback connection of its own, and so on. It disturbs no enforcement that runs. A missing bpffs is mounted,
/// as `run` would do.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer doctor
  enforcer doctor --policy policy.yaml
  enforcer doctor --output json | jq '.checks[] | select(.grade != \"pass\")'

Exit code 4 when a check failed; warnings alone are 0.")]
pub(super) struct Command {
    /// The cgroup that is to be guarded [default: the root of the cgroup2 hierarchy]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Also look whether the servers of this policy will be guarded as they run now
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Diagnosis {
    fit: bool,
    checks: Vec<Check>,
}

impl Render for Diagnosis {
    fn text(&self) -> String {
        let rows = self.checks.iter().map(|check| {
            let next_step = check.next_step.clone().unwrap_or_else(|| NONE.to_owned());
            [check.grade.name().to_owned(), check.name.to_owned(), check.detail.clone(), next_step]
        });
        let verdict = if self.fit { "this machine can enforce" } else { "this machine can't enforce" };
        format!("{}\n{verdict}\n", table(["GRADE", "CHECK", "FOUND", "NEXT STEP"], rows))
    }
}

pub(super) fn run(command: Command, global: &Global) -> anyhow::Result<u8> {
    let endpoints =
        command.policy.as_deref().map(policy::load).transpose()?.map(|(policy, _)| endpoint_keys(&policy));
    let bpffs = global.bpffs.clone();
    // No check before this one leaves a thread behind, so the self-test may fork.
    let behaviour = move || match selftest::run(&bpffs) {
        Ok(report) => Ok(report.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let options = Options {
        bpffs: global.bpffs.clone(),
        cgroup: command.cgroup,
        endpoints,
        pins: global.pins(),
        behaviour: Some(Box::new(behaviour)),
    };
    let checks = examine(options);
    let diagnosis = Diagnosis { fit: is_fit(&checks), checks };
    print(global.output, &diagnosis)?;
    Ok(if diagnosis.fit { OK } else { REJECTED })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::doctor::Grade;

    #[test]
    fn a_failed_check_is_named_with_its_next_step() {
        let check = Check {
            name: "bpffs",
            grade: Grade::Fail,
            detail: "missing".into(),
            next_step: Some("mount it".into()),
        };
        let text = Diagnosis { fit: false, checks: vec![check] }.text();
        assert!(text.contains("fail   bpffs  missing  mount it\n"), "{text}");
        assert!(text.ends_with("this machine can't enforce\n"));
    }
}
