//! Before and after: the server without and with the enforcer.

use std::io::Write;
use std::time::Instant;

use anyhow::Result;

use super::Show;
use crate::demo::cli::NOT_LOADED;
use crate::mcp;

impl<W: Write> Show<'_, W> {
    pub(super) async fn server_without_protection(&mut self) -> Result<()> {
        self.narrator.step("An MCP server that checks nothing").await?;
        self.stage.start_server()?;
        let (addr, cgroup) = (self.stage.addr()?, self.stage.cgroup().display().to_string());
        self.narrator.done(&format!("a server on the official Rust SDK listens on {addr}, in the cgroup"))?;
        self.narrator.more(&format!("{cgroup};"))?;
        self.narrator.more("a client on the same SDK calls its tool `add` with 2 and 3, without a token")?;
        self.narrator.promised("nobody protects it yet: the server answers")?;
        let newest = mcp::newest_version();
        let outcome = self.add(None, &newest).await?;
        self.should_be_answered(&outcome, &newest)
    }

    pub(super) async fn enforcer_starts(&mut self) -> Result<()> {
        self.narrator.step("The enforcer starts").await?;
        let server = self.stage.server_pid()?;
        self.narrator.done("an issuer serves its keys on loopback; this policy goes to `enforcer run`:")?;
        let policy = self.stage.policy()?;
        self.narrator.block("policy.yaml", &policy)?;
        self.narrator
            .promised("it fetches the keys and enforces; the server is neither changed nor restarted")?;
        let begin = Instant::now();
        self.stage.start_enforcer()?;
        let took_ms = begin.elapsed().as_millis();
        let fetched = self.stage.issuer_server().hits("/realms/demo/jwks.json");
        let same = server.is_some() && self.stage.server_pid()? == server;
        let state = if same { "still runs" } else { "is another one" };
        let pid = server.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
        self.narrator.happened(
            fetched > 0 && same,
            &format!(
                "ready after {took_ms} ms; keys fetched {fetched} time(s); server process {pid} {state}"
            ),
        )
    }

    pub(super) async fn enforcer_stops(&mut self) -> Result<()> {
        self.narrator.step("The enforcer stops").await?;
        let server = self.stage.server_pid()?;
        let log = self.stage.daemon_log();
        self.narrator
            .done("SIGTERM to the daemon; then the call of the first step again, without a token")?;
        self.narrator
            .promised("nothing stays in the kernel; the server never noticed, and answers anyone again")?;
        self.stage.stop_enforcer()?;
        let status = self.stage.cli().run(&["status"])?;
        let code = status.status.code();
        self.narrator.happened(
            code == Some(NOT_LOADED) && !self.stage.pins_exist(),
            &format!(
                "`enforcer status` says {:?}, exit code {}",
                status_line(&status.stdout, &status.stderr),
                shown(code)
            ),
        )?;
        let same = server.is_some() && self.stage.server_pid()? == server;
        self.narrator
            .happened(same, if same { "the server is the same process" } else { "the server is gone" })?;
        let newest = mcp::newest_version();
        let outcome = self.add(None, &newest).await?;
        self.should_be_answered(&outcome, &newest)?;
        // The narrator knows all tokens: one in the log would be found, replaced and counted as a broken promise.
        let broken = self.narrator.broken().len();
        drop(self.narrator.redact(&log));
        let clean = self.narrator.broken().len() == broken && !log.is_empty();
        let lines = log.lines().count();
        self.narrator.happened(clean, &format!("the daemon's log ({lines} lines) holds none of the tokens"))
    }
}

fn status_line(stdout: &str, stderr: &str) -> String {
    let text = if stderr.trim().is_empty() { stdout } else { stderr };
    text.lines().next().unwrap_or_default().to_owned()
}

fn shown(code: Option<i32>) -> String {
    code.map_or_else(|| "none (killed)".to_owned(), |code| code.to_string())
}
