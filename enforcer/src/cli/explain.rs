//! `enforcer explain`.

mod caller;

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use zeroize::Zeroizing;

use super::exit::{FAILURE, NOT_LOADED, OK, REJECTED, USAGE, failed};
use super::output::{Render, print, say, table};
use super::view::revocations::selection;
use super::{Global, live};
use crate::datapath::LiveError;
use crate::keys::{KeyManager, KeyManagerHandle, KeySnapshot};
use crate::lifecycle::lock;
use crate::policy::{self, Policy, Server};
use crate::revocation::{RevocationList, Subject};
use crate::token::{self, Check, Fingerprinter, MAX_TOKEN_BYTES, Outcome, VerifiedToken};

/// How long the issuers' keys may take.
const KEYS_TIMEOUT: Duration = Duration::from_secs(15);
const KEYS_POLL: Duration = Duration::from_millis(10);

/// Say check by check why a token would or would not pass
///
/// Reads the token from stdin, never from the command line, which other users can see, and never shows it. The checks are
/// the daemon's own, with keys fetched anew from the server's issuers. Host, Origin and path of a request are not part of it. Who
/// calls is, if it is named by --workload, --pid or --from; else OUTCOME is `depends` where policy asks for it.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer explain --server files < token.txt
  get-token | enforcer explain --policy policy.yaml --server files --output json
  enforcer explain --server files --workload agent.service < token.txt

Exit code 0 when the token would pass, 4 when it would be refused.")]
pub(super) struct Command {
    /// The policy file [default: that of the daemon that runs, or ran last]
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Name of the server in the policy
    #[arg(long, value_name = "NAME")]
    server: String,
    #[command(flatten)]
    caller: caller::Options,
}

#[derive(Debug, Serialize)]
struct Explanation {
    server: String,
    policy: PathBuf,
    would_pass: bool,
    /// Only if the caller is one that policy asks for, which was not named or can't be known here.
    depends_on_caller: bool,
    checks: Vec<Row>,
    key_errors: Vec<KeyError>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    outcome: &'static str,
    detail: String,
}

#[derive(Debug, Serialize)]
struct KeyError {
    issuer: String,
    message: String,
}

impl Render for Explanation {
    fn text(&self) -> String {
        let rows =
            self.checks.iter().map(|row| [row.outcome.to_owned(), row.name.to_owned(), row.detail.clone()]);
        let mut text = table(["OUTCOME", "CHECK", "DETAIL"], rows);
        for error in &self.key_errors {
            text.push_str(&format!("keys of issuer \"{}\": {}\n", error.issuer, error.message));
        }
        let answer = match (self.would_pass, self.depends_on_caller) {
            (false, _) => "would be refused",
            (true, false) => "would pass",
            (true, true) => "would pass, if the caller is the one that policy asks for,",
        };
        text.push_str(&format!(
            "\nthe token {answer} at server \"{}\" ({})\n",
            self.server,
            self.policy.display()
        ));
        text
    }
}

pub(super) fn run(command: &Command, global: &Global) -> anyhow::Result<u8> {
    let path = policy_path(command, global)?;
    let (policy, _warnings) = policy::load(&path)
        .map_err(|errors| failed(REJECTED, format!("the policy has defects:\n{errors}")))?;
    let Some(server) = policy.servers.iter().find(|server| server.name == command.server) else {
        let names: Vec<_> = policy.servers.iter().map(|server| server.name.as_str()).collect();
        let message =
            format!("{} has no server `{}`; it has: {}", path.display(), command.server, names.join(", "));
        return Err(failed(FAILURE, message));
    };
    let caller = command.caller.caller(&policy)?;
    if std::io::stdin().is_terminal() {
        return Err(failed(
            USAGE,
            "give the token on stdin, from a file or a pipe: a terminal would show it",
        ));
    }
    let token = read_token(std::io::stdin().lock())?;
    let (keys, key_errors) = load_keys(&policy, server)?;
    let now_unix_secs =
        SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
    let revoked = revoked(global).unwrap_or_else(|error| {
        say(&format!("enforcer: revocations are not looked at: {error:#}"));
        None
    });
    let by = By { keys: &keys, revoked: revoked.as_ref(), caller: caller.as_ref(), now_unix_secs };
    let explanation = explain(&token, server, path, &by, key_errors);
    print(global.output, &explanation)?;
    Ok(if explanation.would_pass { OK } else { REJECTED })
}

/// What a token is judged by, besides the policy.
struct By<'a> {
    keys: &'a KeySnapshot,
    revoked: Option<&'a Revoked>,
    caller: Option<&'a caller::Caller>,
    now_unix_secs: u64,
}

fn explain(
    token: &str,
    server: &Server,
    policy: PathBuf,
    by: &By<'_>,
    key_errors: Vec<KeyError>,
) -> Explanation {
    let (checks, verified) = token::explain(token, server, by.keys, by.now_unix_secs);
    let revocation = by.revoked.map(|list| list.check(token, verified.as_ref(), server, by));
    let mut rows = vec![caller::may_call(server, by.caller)];
    rows.extend(checks.into_iter().map(Row::from));
    rows.extend(caller::may_present(server, verified.as_ref(), by.caller));
    rows.extend(revocation.map(Row::from));
    Explanation {
        server: server.name.clone(),
        policy,
        // Skipped checks follow from a failed one; asked for all the same, as a pass must be earned.
        would_pass: rows.iter().all(|row| matches!(row.outcome, "pass" | "depends")),
        depends_on_caller: rows.iter().any(|row| row.outcome == "depends"),
        checks: rows,
        key_errors,
    }
}

impl From<Check> for Row {
    fn from(check: Check) -> Self {
        Self { name: check.name, outcome: outcome(check.outcome), detail: check.detail }
    }
}

/// The revocations of the enforcement.
struct Revoked {
    list: RevocationList,
    fingerprinter: Fingerprinter,
}

/// `None`: there never was an enforcement.
fn revoked(global: &Global) -> anyhow::Result<Option<Revoked>> {
    let state = global.state();
    let Some(key) = state.read_fingerprint_key()? else { return Ok(None) };
    let all = match live::open(global) {
        Ok(live) => live.revocations()?,
        Err(error) if matches!(error.downcast_ref(), Some(LiveError::NotLoaded(_))) => {
            state.read()?.unwrap_or_default().revocations
        }
        Err(error) => return Err(error),
    };
    Ok(Some(Revoked { list: RevocationList::new(&all), fingerprinter: Fingerprinter::new(key) }))
}

impl Revoked {
    fn check(&self, token: &str, verified: Option<&VerifiedToken>, server: &Server, by: &By<'_>) -> Check {
        // Without a caller those of a workload are not looked at.
        let workload = by.caller.map_or([[1; 16]; 2], |caller| caller.view().name_hashes());
        let fingerprint = self.fingerprinter.fingerprint(token.as_bytes());
        let found = verified.map(|verified| {
            self.list
                .find(&Subject::of_token(verified, fingerprint, &server.name, workload), by.now_unix_secs)
        });
        let (outcome, detail) = match found {
            None => (Outcome::Skipped, "an earlier check failed".to_owned()),
            Some(None) => (Outcome::Pass, format!("token {fingerprint} is not revoked")),
            Some(Some((id, entry))) => (
                Outcome::Fail,
                format!("token {fingerprint} is revoked, by number {id}: {}", selection(entry)),
            ),
        };
        Check { name: "revocation", outcome, detail }
    }
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "pass",
        Outcome::Fail => "fail",
        Outcome::Skipped => "skipped",
    }
}

fn policy_path(command: &Command, global: &Global) -> anyhow::Result<PathBuf> {
    if let Some(path) = &command.policy {
        return Ok(path.clone());
    }
    lock::state(&global.pin_name)?
        .record
        .and_then(|record| record.policy)
        .ok_or_else(|| failed(NOT_LOADED, "no daemon has recorded its policy; name it with --policy FILE"))
}

/// The token, without the white space around it that files and shells add. Wiped from memory when dropped.
fn read_token(input: impl Read) -> anyhow::Result<Zeroizing<String>> {
    // Room for the longest token, line ends, and one byte that shows that there is too much; never re-allocated, which
    // would leave copies behind.
    let limit = MAX_TOKEN_BYTES + 64;
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 32));
    input.take(limit as u64).read_to_end(&mut bytes).context("cannot read the token from stdin")?;
    if bytes.len() == limit {
        return Err(failed(
            USAGE,
            format!("stdin holds more than a token: the limit is {MAX_TOKEN_BYTES} bytes"),
        ));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| failed(USAGE, "stdin is not text"))?;
    let text = text.trim_ascii();
    if text.is_empty() {
        return Err(failed(USAGE, "stdin is empty; give the token there"));
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// Fetches the keys of the server's issuers, each once.
fn load_keys(policy: &Policy, server: &Server) -> anyhow::Result<(KeySnapshot, Vec<KeyError>)> {
    let policy = Policy { issuers: server.issuers.clone(), servers: Vec::new(), ..policy.clone() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(async {
        let manager = KeyManager::start(Arc::new(policy));
        let deadline = Instant::now() + KEYS_TIMEOUT;
        while !settled(&manager) && Instant::now() < deadline {
            tokio::time::sleep(KEYS_POLL).await;
        }
        let errors =
            manager.status().into_iter().filter(|status| status.age.is_none()).map(|status| KeyError {
                issuer: status.name,
                message: status.last_error.map_or_else(
                    || format!("not loaded within {} s", KEYS_TIMEOUT.as_secs()),
                    |(message, _age)| message,
                ),
            });
        (manager.snapshot(), errors.collect())
    }))
}

/// Every issuer's first fetch has ended, well or not.
fn settled(manager: &KeyManagerHandle) -> bool {
    manager.status().iter().all(|status| status.age.is_some() || status.last_error.is_some())
}

#[cfg(test)]
#[path = "explain_tests.rs"]
mod tests;
