//! A token that belongs to one workload, in the hands of another.

use std::io::Write;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{CALL_LIMIT, Show};
use crate::demo::stage::{AGENT, BOUND_SUBJECT};
use crate::guard::{Cgroup, bin_path, run};

const THIEF: &str = "agent-b.service";
const TOKEN_VARIABLE: &str = "DEMO_TOKEN";

impl<W: Write> Show<'_, W> {
    pub(super) async fn another_workload(&mut self) -> Result<()> {
        self.narrator.step("A token in another workload's hands").await?;
        self.narrator.done(&format!(
            "{BOUND_SUBJECT}'s token belongs to {AGENT}, says the policy. That service's client calls `add`;"
        ))?;
        self.narrator.line(&format!("            then {THIEF} does, which has stolen the token"))?;
        let mint = self.sound(BOUND_SUBJECT)?;
        let token = self.sign(&mint)?;
        let [agent, thief] = [AGENT, THIEF].map(|name| self.stage.workload(name));
        let (agent, thief) = (agent?, thief?);
        self.narrator.promised(&format!("{AGENT} gets the server's answer"))?;
        let owners = self.add_from(&agent, &token)?;
        self.narrator.happened(owners == json!({"answered": "5"}), &owners.to_string())?;
        self.narrator.promised(&format!("{THIEF} gets HTTP 401; the server reads nothing of it"))?;
        let before = self.stage.cli().counters()?;
        let thiefs = self.add_from(&thief, &token)?;
        let reached = self.stage.cli().counters()?.reached_server().saturating_sub(before.reached_server());
        self.narrator.happened(
            thiefs == json!({"refused": 401}) && reached == 0,
            &format!("{thiefs}; passed or injected to the server, by the counters: {reached}"),
        )?;
        self.narrator.promised("the daemon's log names both workloads")?;
        let log = self.stage.daemon_log();
        let line = log.lines().find(|line| line.contains("token-of-another-workload")).unwrap_or_default();
        let kept =
            line.contains(&format!("workload=\"{THIEF}\"")) && line.contains(&format!("held_by=\"{AGENT}\""));
        let said = line.split_once("WARN").map_or(line, |(_, said)| said);
        self.narrator.happened(kept, said.trim())
    }

    /// The tool call of a client that runs in a workload: what it was answered, in short.
    fn add_from(&self, workload: &Cgroup, token: &str) -> Result<Value> {
        let mut command = Command::new(bin_path("enforcer-mcp")?);
        command.args(["client", "--url", &self.stage.resource()?, "--token-env", TOKEN_VARIABLE]);
        command.args(["call", "add", "{\"a\": 2, \"b\": 3}"]).env(TOKEN_VARIABLE, token);
        workload.place(&mut command)?;
        let finished = run("an agent's MCP client", command, b"", CALL_LIMIT)?;
        let outcome: Value = serde_json::from_str(finished.stdout.trim())
            .with_context(|| format!("{} {}", finished.stdout, finished.stderr))?;
        let text = find(&outcome, "text");
        let status = find(&outcome, "status");
        Ok(match (text, status) {
            (Some(text), None) => json!({ "answered": text }),
            (None, Some(status)) => json!({ "refused": status }),
            _ => outcome,
        })
    }
}

/// A field of an outcome, whatever it is wrapped in.
fn find<'v>(outcome: &'v Value, field: &str) -> Option<&'v Value> {
    outcome.get(field).or_else(|| outcome.as_object()?.values().find_map(|inner| inner.get(field)))
}
