//! The steps in their order.

mod calls;
mod kernel;
mod refusals;
mod start;
mod workloads;

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use rmcp::model::ProtocolVersion;
use serde_json::json;

use super::narrator::Narrator;
use super::stage::{SCOPE, Stage};
use crate::issuer::Mint;
use crate::mcp::{CallError, CallOutcome, call_tool};

/// How long a tool call or one exchange on a raw connection may take.
const CALL_LIMIT: Duration = Duration::from_secs(15);
/// The newest protocol version that still begins with a handshake and has sessions.
const LEGACY_VERSION: &str = "2025-11-25";

/// Plays the demo to its end. A promise that is not kept is noted by the narrator, and the demo goes on.
///
/// # Errors
/// When a step can't be carried out at all.
pub async fn play<W: Write>(stage: &mut Stage, narrator: &mut Narrator<W>) -> Result<()> {
    let mut show = Show { stage, narrator };
    show.server_without_protection().await?;
    show.enforcer_starts().await?;
    show.good_token().await?;
    show.another_audience().await?;
    show.no_token().await?;
    show.expired_token().await?;
    show.missing_scope().await?;
    let shared = show.two_tokens_on_one_connection().await?;
    show.what_the_kernel_holds(&shared).await?;
    show.known_calls().await?;
    show.known_refusals(shared).await?;
    show.another_workload().await?;
    show.enforcer_stops().await
}

/// Stage and narrator together.
struct Show<'a, W> {
    stage: &'a mut Stage,
    narrator: &'a mut Narrator<W>,
}

impl<W: Write> Show<'_, W> {
    /// A token for our server with the scope it asks for; the caller changes what it wants changed.
    fn sound(&self, subject: &str) -> Result<Mint> {
        Ok(self.stage.issuer().mint().subject(subject).audience(&self.stage.resource()?).scope(SCOPE))
    }

    /// A token for another server of the same issuer.
    fn for_another_server(&self, subject: &str) -> Result<Mint> {
        Ok(self.sound(subject)?.audience("https://other.example/mcp"))
    }

    /// Signs a token; from then on the narrator keeps it secret.
    fn sign(&mut self, mint: &Mint) -> Result<String> {
        let token = mint.sign()?;
        self.narrator.keep_secret(&token);
        Ok(token)
    }

    /// The tool call that all steps make: 2 + 3.
    async fn add(
        &self,
        token: Option<&str>,
        protocol: &ProtocolVersion,
    ) -> Result<Result<CallOutcome, CallError>> {
        let url = self.stage.resource()?;
        Ok(call_tool(&url, token, protocol, "add", json!({ "a": 2, "b": 3 }), CALL_LIMIT).await)
    }

    /// Says how a call ended that should have been answered.
    fn should_be_answered(
        &mut self,
        outcome: &Result<CallOutcome, CallError>,
        protocol: &ProtocolVersion,
    ) -> Result<()> {
        let kept = matches!(
            outcome,
            Ok(CallOutcome::Answered { text, is_error: false, protocol: spoken })
                if text == "5" && spoken == protocol.as_str()
        );
        self.narrator.happened(kept, &told(outcome))
    }
}

/// A call's outcome in words.
fn told(outcome: &Result<CallOutcome, CallError>) -> String {
    match outcome {
        Ok(CallOutcome::Answered { text, is_error, protocol }) => {
            let what = if *is_error { "the tool failed with" } else { "the server answered" };
            format!("{what} \"{text}\" (MCP {protocol})")
        }
        Ok(CallOutcome::Refused { status, www_authenticate }) => match www_authenticate {
            Some(challenge) => format!("HTTP {status}\nWWW-Authenticate: {challenge}"),
            None => format!("HTTP {status} without a challenge"),
        },
        Ok(CallOutcome::RpcError { code, message }) => format!("JSON-RPC error {code}: {message}"),
        Err(error) => format!("no answer: {error}"),
    }
}
