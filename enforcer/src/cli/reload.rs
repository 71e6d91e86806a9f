//! `enforcer reload` and `enforcer diff`: what the daemon says about another policy.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::Global;
use super::exit::{FAILURE, OK, REJECTED, failed};
use super::output::{Output, Render, print, print_text, say, table};
use crate::control::{Report, Request, Response, ask};
use crate::policy;

/// Have the daemon read its policy file again
///
/// The new policy takes the old one's place if it has no defects; else nothing changes. Prints what changed, and whose access
/// ended: tokens that the new policy does not allow are refused from then on, and their open connections are ended. All other
/// connections go on.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer diff new.yaml && cp new.yaml /etc/enforcer/policy.yaml && enforcer reload
  enforcer reload --output json | jq '.losses'

SIGHUP does the same. Unless it was started with --no-watch, the daemon also sees by itself that the file has changed.
Exit code 4 when the policy has defects, 3 when no daemon runs.")]
pub(super) struct ReloadCommand {}

/// Say what a policy would change, and whose access would end
///
/// Compares the file with the policy that the daemon runs, and judges the tokens and connections that are there now by it.
/// Changes nothing. Keys of issuers that are new are fetched, to see whether tokens would pass.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer diff new.yaml
  enforcer diff new.yaml --output json | jq '.diff.servers.removed'

Exit code 4 when the file has defects, 3 when no daemon runs.")]
pub(super) struct DiffCommand {
    /// The policy file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// An answer, and whether it is about what happened or what would.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    report: Report,
    #[serde(skip)]
    done: bool,
}

pub(super) fn reload(_command: &ReloadCommand, global: &Global) -> anyhow::Result<u8> {
    show(ask(&global.pin_name, &Request::Reload)?, true, global.output)
}

pub(super) fn diff(command: &DiffCommand, global: &Global) -> anyhow::Result<u8> {
    let file = std::path::absolute(&command.file)?;
    let text = match read(&file) {
        Ok(text) => text,
        Err(error) => return rejected(&error, global.output),
    };
    let file = file.display().to_string();
    show(ask(&global.pin_name, &Request::Diff { file, text })?, false, global.output)
}

/// The text of a policy without defects.
fn read(file: &Path) -> Result<String, String> {
    // Also warns about files that are missing here.
    policy::load(file).map_err(|errors| errors.to_string())?;
    std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))
}

fn show(response: Response, done: bool, output: Output) -> anyhow::Result<u8> {
    match response {
        Response::Done(report) => {
            if output == Output::Table {
                report.warnings.iter().for_each(|warning| say(warning));
            }
            print(output, &Shown { report: *report, done })?;
            Ok(OK)
        }
        Response::Rejected { error } => rejected(&error, output),
        Response::Failed { error } => Err(failed(FAILURE, error)).context("nothing was changed"),
    }
}

fn rejected(error: &str, output: Output) -> anyhow::Result<u8> {
    match output {
        Output::Json => {
            let document: Value = json!({ "changed": false, "error": error });
            print_text(&format!("{document:#}\n"))?;
        }
        Output::Table => say(error),
    }
    Ok(REJECTED)
}

impl Render for Shown {
    fn text(&self) -> String {
        let report = &self.report;
        if !report.changed {
            return "nothing differs from the policy in force\n".to_owned();
        }
        let mut text = match report.diff.to_string() {
            lines if lines.is_empty() => "only the order in the file differs\n".to_owned(),
            lines => format!("{lines}\n"),
        };
        let (verb, lost) = if self.done { ("lost", "have lost") } else { ("would lose", "would lose") };
        if report.losses.is_empty() {
            text.push_str(&format!(
                "\nnobody {verb} access (tokens in use: {}, connections: {})\n",
                report.grants, report.flows
            ));
            return text;
        }
        let (mut grants, mut flows) = (0, 0);
        let rows = report.losses.iter().map(|row| {
            grants += row.grants;
            flows += row.flows;
            [row.server.clone(), row.reason.clone(), row.grants.to_string(), row.flows.to_string()]
        });
        let rows = table(["SERVER", "REASON", "TOKENS", "CONNECTIONS"], rows);
        text.push_str(&format!("\n{rows}"));
        text.push_str(&format!(
            "\n{grants} of {} tokens in use {lost} their access, {flows} of {} connections {}\n",
            report.grants,
            report.flows,
            if self.done { "were ended" } else { "would be ended" }
        ));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Losses;
    use crate::policy::{FieldChange, PolicyDiff};

    fn report() -> Report {
        let mode = FieldChange { field: "mode".into(), old: json!("enforce"), new: json!("observe") };
        let losses =
            Losses { server: "files".into(), reason: "insufficient-scope".into(), grants: 2, flows: 5 };
        Report {
            changed: true,
            generation: 9,
            warnings: Vec::new(),
            diff: PolicyDiff { settings: vec![mode], ..PolicyDiff::default() },
            grants: 3,
            flows: 7,
            losses: vec![losses],
        }
    }

    #[test]
    fn what_would_happen_and_what_happened_read_differently() {
        let text = |done| Shown { report: report(), done }.text();
        assert_eq!(
            text(false),
            "~ mode: \"enforce\" -> \"observe\"\n\n\
             SERVER  REASON              TOKENS  CONNECTIONS\n\
             files   insufficient-scope  2       5\n\n\
             2 of 3 tokens in use would lose their access, 5 of 7 connections would be ended\n"
        );
        assert!(
            text(true)
                .ends_with("2 of 3 tokens in use have lost their access, 5 of 7 connections were ended\n")
        );
    }

    #[test]
    fn no_change_and_no_loss_say_so() {
        let same = Shown { report: Report::default(), done: true };
        assert_eq!(same.text(), "nothing differs from the policy in force\n");
        let harmless = Shown { report: Report { losses: Vec::new(), ..report() }, done: false };
        assert!(harmless.text().ends_with("\nnobody would lose access (tokens in use: 3, connections: 7)\n"));
        let order = Report { diff: PolicyDiff::default(), ..report() };
        assert!(
            Shown { report: order, done: false }.text().starts_with("only the order in the file differs\n")
        );
    }

    #[test]
    fn json_has_the_reports_own_names() {
        let json = serde_json::to_value(Shown { report: report(), done: true }).unwrap();
        assert_eq!(json["losses"][0]["flows"], 5);
        assert_eq!(json["diff"]["settings"][0]["field"], "mode");
        assert_eq!(json["changed"], true);
    }
}
