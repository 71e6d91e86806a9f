//! Calls that must be refused, each with its status and challenge.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{CALL_LIMIT, SCOPE, Show, told};
use crate::demo::challenge;
use crate::issuer::Mint;
use crate::mcp::{CallError, CallOutcome};
use crate::raw::{self, RequestBuilder};

/// What a refusal must look like.
struct Refusal {
    status: u16,
    error: Option<&'static str>,
}

impl<W: Write> Show<'_, W> {
    pub(super) async fn another_audience(&mut self) -> Result<()> {
        let mint = self.for_another_server("carol")?;
        self.narrator.step("The same call with a token for another server").await?;
        self.narrator.done(
            "carol's token: same issuer, sound signature, but its audience is https://other.example/mcp",
        )?;
        self.refused(Some(&mint), &Refusal { status: 401, error: Some("invalid_token") }).await
    }

    pub(super) async fn no_token(&mut self) -> Result<()> {
        self.narrator.step("The same call without a token").await?;
        self.narrator.done("no Authorization header; then the client asks where the challenge points to")?;
        self.refused(None, &Refusal { status: 401, error: None }).await?;
        self.narrator.promised("the metadata names this resource and the issuer whose tokens open it")?;
        let (addr, url) = (self.stage.addr()?, self.stage.metadata_url()?);
        let path = url.split_once(&addr.to_string()).context("the metadata URL is not on the server")?.1;
        let request = RequestBuilder::new("GET", path).header("Host", &addr.to_string()).build();
        let response = raw::request(addr, &request, CALL_LIMIT)?;
        let document = response.json().unwrap_or(Value::Null);
        let kept = response.status == 200
            && document.get("resource") == Some(&json!(self.stage.resource()?))
            && document.get("authorization_servers") == Some(&json!([self.stage.issuer().uri()]))
            && document.get("scopes_supported") == Some(&json!([SCOPE]));
        self.narrator.happened(kept, &format!("HTTP {}\n{document:#}", response.status))
    }

    pub(super) async fn expired_token(&mut self) -> Result<()> {
        // Further back than the 30 s of leeway that a policy has by default.
        let mint = self.sound("alice")?.issued_in(-400).expires_in(-100);
        self.narrator.step("The same call with an expired token").await?;
        self.narrator.done("a token of alice's that ran out 100 seconds ago")?;
        self.refused(Some(&mint), &Refusal { status: 401, error: Some("invalid_token") }).await
    }

    pub(super) async fn missing_scope(&mut self) -> Result<()> {
        let mint = self.sound("dave")?.scope("tools.list");
        self.narrator.step("The same call with a token that lacks the scope").await?;
        self.narrator.done(&format!(
            "dave's token is sound but holds the scope tools.list, and policy asks for {SCOPE}"
        ))?;
        self.refused(Some(&mint), &Refusal { status: 403, error: Some("insufficient_scope") }).await
    }

    /// Makes the call and checks status, challenge, and that the server read nothing of it.
    async fn refused(&mut self, mint: Option<&Mint>, refusal: &Refusal) -> Result<()> {
        let error = match refusal.error {
            Some(error) => format!("error=\"{error}\""),
            None => "no error, since there was nothing to be wrong".to_owned(),
        };
        let Refusal { status, .. } = refusal;
        self.narrator.promised(&format!(
            "HTTP {status} with a challenge that says where to get a token and for which"
        ))?;
        self.narrator.more(&format!("scope; {error}; the server reads nothing of it"))?;
        let token = mint.map(|mint| self.sign(mint)).transpose()?;
        let before = self.stage.cli().counters()?;
        let outcome = self.add(token.as_deref(), &crate::mcp::newest_version()).await?;
        let after = self.stage.cli().counters()?;
        let expected = self.expected(refusal)?;
        self.narrator.happened(is_refusal(&outcome, *status, &expected), &told(&outcome))?;
        let reached = after.reached_server().saturating_sub(before.reached_server());
        let seen = after.punts() + after.get("refused") > before.punts() + before.get("refused");
        self.narrator.happened(
            reached == 0 && seen,
            &format!("passed or injected to the server, by the counters: {reached}"),
        )
    }

    /// All parameters that the challenge must have, and no others.
    fn expected(&self, refusal: &Refusal) -> Result<BTreeMap<String, String>> {
        let mut parameters = BTreeMap::from([
            ("resource_metadata".to_owned(), self.stage.metadata_url()?),
            ("scope".to_owned(), SCOPE.to_owned()),
        ]);
        if let Some(error) = refusal.error {
            parameters.insert("error".to_owned(), error.to_owned());
        }
        Ok(parameters)
    }
}

/// The description of an error is for people: it may say anything, but only about an error.
fn is_refusal(
    outcome: &Result<CallOutcome, CallError>,
    expected_status: u16,
    expected: &BTreeMap<String, String>,
) -> bool {
    let Ok(CallOutcome::Refused { status, www_authenticate: Some(header) }) = outcome else { return false };
    let Some(mut parameters) = challenge::parameters(header) else { return false };
    let described = parameters.remove("error_description").is_some();
    *status == expected_status && parameters == *expected && (!described || expected.contains_key("error"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_with_another_challenge_is_not_the_promised_one() {
        let expected = BTreeMap::from([("scope".to_owned(), SCOPE.to_owned())]);
        let refused = |status, header: &str| {
            is_refusal(
                &Ok(CallOutcome::Refused { status, www_authenticate: Some(header.to_owned()) }),
                401,
                &expected,
            )
        };
        assert!(refused(401, "Bearer scope=\"tools.call\""));
        assert!(!refused(403, "Bearer scope=\"tools.call\""));
        assert!(!refused(401, "Bearer scope=\"other\""));
        assert!(!refused(401, "Bearer error=\"invalid_token\", scope=\"tools.call\""));
        assert!(!refused(401, "Bearer error_description=\"x\", scope=\"tools.call\""));
        let answered =
            CallOutcome::Answered { text: "5".to_owned(), is_error: false, protocol: String::new() };
        assert!(!is_refusal(&Ok(answered), 401, &expected));
    }
}
