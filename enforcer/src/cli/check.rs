//! `enforcer check`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::exit::{OK, REJECTED};
use super::output::{Output, print_text, say};
use crate::policy::{self, PolicyErrors, Warning};
use crate::workload::unmatched_here;

/// Check a policy file and say what it makes the enforcer check
///
/// Prints the effective policy: every check for each server, also those that no file can turn off. Defects are listed all
/// at once, each with its line and field. Needs no privilege and changes nothing.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer check policy.yaml
  enforcer check policy.yaml --output json | jq '.policy.servers[].resource'

Exit code 4 when the file has defects.")]
pub(super) struct Command {
    /// The policy file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(super) fn run(command: &Command, output: Output) -> anyhow::Result<u8> {
    let result = policy::load(&command.file);
    match (output, &result) {
        (Output::Json, result) => {
            let document = match result {
                Ok((policy, warnings)) => json!({
                    "valid": true,
                    "policy": policy::effective_json(policy),
                    "warnings": warnings.iter().map(warning).collect::<Vec<_>>(),
                    "unmatched_workloads": unmatched_here(policy),
                    "errors": [],
                }),
                Err(errors) => defects(errors),
            };
            print_text(&format!("{document:#}\n"))?;
        }
        (Output::Table, Ok((policy, warnings))) => {
            for warning in warnings {
                say(&warning.to_string());
            }
            for name in unmatched_here(policy) {
                say(&format!(
                    "{}: workload \"{name}\": warning: nothing on this host fits it now",
                    command.file.display()
                ));
            }
            print_text(&policy::effective(policy))?;
        }
        (Output::Table, Err(errors)) => say(&errors.to_string()),
    }
    Ok(if result.is_ok() { OK } else { REJECTED })
}

fn warning(warning: &Warning) -> Value {
    json!({
        "file": &*warning.file,
        "line": warning.line,
        "column": warning.column,
        "field": warning.field,
        "message": warning.caution.to_string(),
    })
}

fn defects(errors: &PolicyErrors) -> Value {
    let defect = |error: &policy::PolicyError| {
        json!({
            "file": &*error.file,
            "line": error.line,
            "column": error.column,
            "field": error.field,
            "message": error.defect.to_string(),
            "hint": error.defect.hint(),
        })
    };
    json!({
        "valid": false,
        "policy": null,
        "warnings": [],
        "unmatched_workloads": [],
        "errors": errors.errors.iter().map(defect).collect::<Vec<_>>(),
        "errors_not_listed": errors.suppressed,
    })
}
