//! The one list of checks behind [`verify`] and [`explain`].

use std::sync::Arc;

use super::error::{Quoted, TokenError};
use super::evidence::Evidence;
use super::header::{self, Jws, Proof, algorithm_name};
use super::verified::{VerifiedToken, missing_scopes};
use super::{claims, signature};
use crate::keys::KeySnapshot;
use crate::policy::Server;

/// Is `token` an access token of one of `server`'s issuers, for `server`, valid at `now_unix_secs`?
///
/// Pure: `keys` are the issuers' keys, `now_unix_secs` is in seconds since 1970-01-01T00:00:00Z. Cheap checks come first
/// and the signature last, so a flood of tokens with wrong claims costs no cryptography. Scopes are not part of it: see
/// [`missing_scopes`]. A check that becomes stricter moves [`crate::policy::RULES`].
///
/// # Errors
/// The first defect. [`TokenError::UnknownKey`] may be cured by one refresh of the issuer's keys;
/// [`TokenError::KeysUnavailable`] is not the client's fault (503).
pub fn verify(
    token: &str,
    server: &Server,
    keys: &KeySnapshot,
    now_unix_secs: u64,
) -> Result<VerifiedToken, TokenError> {
    judge(|| Jws::split(token), token.len(), server, keys, now_unix_secs)
}

/// As [`verify`], of a token that was verified before: every check is made again, and the key that made the signature must be the one
/// that the issuer's keys have for the token today.
///
/// # Errors
/// As [`verify`].
pub fn verify_again(
    evidence: &Evidence,
    server: &Server,
    keys: &KeySnapshot,
    now_unix_secs: u64,
) -> Result<VerifiedToken, TokenError> {
    judge(|| evidence.parts(), evidence.size_bytes(), server, keys, now_unix_secs)
}

fn judge<'a>(
    parts: impl FnOnce() -> Result<Jws<'a>, TokenError>,
    size_bytes: usize,
    server: &Server,
    keys: &KeySnapshot,
    now_unix_secs: u64,
) -> Result<VerifiedToken, TokenError> {
    let mut first = FirstError { error: None };
    let verified = run(parts, size_bytes, server, keys, now_unix_secs, &mut first);
    match first.error {
        Some(error) => Err(error),
        None => verified.ok_or(TokenError::Incomplete),
    }
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It holds.
    Pass,
    /// It does not, and the token is refused.
    Fail,
    /// A check that it builds on failed.
    Skipped,
}

/// One check of [`explain`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Stable kebab-case name.
    pub name: &'static str,
    /// How it went.
    pub outcome: Outcome,
    /// What was found and what was expected; never the token.
    pub detail: String,
}

/// The checks of [`verify`] one by one, going on after a failure where that is possible, and last the scopes that
/// `server` requires of every request. The token would pass if no outcome is [`Outcome::Fail`]. With what the token says, if all
/// checks but that of the scopes passed.
#[must_use]
pub fn explain(
    token: &str,
    server: &Server,
    keys: &KeySnapshot,
    now_unix_secs: u64,
) -> (Vec<Check>, Option<VerifiedToken>) {
    let mut all = AllChecks { checks: Vec::new() };
    let verified = run(|| Jws::split(token), token.len(), server, keys, now_unix_secs, &mut all);
    let required = if server.scopes.is_empty() { "none".to_owned() } else { server.scopes.join(" ") };
    let (outcome, detail) = match &verified {
        None => (Outcome::Skipped, format!("an earlier check failed; required: {required}")),
        Some(token) => {
            let missing = missing_scopes(token, &server.scopes);
            if missing.is_empty() {
                (Outcome::Pass, format!("required: {required}"))
            } else {
                (Outcome::Fail, format!("missing: {}; required: {required}", missing.join(" ")))
            }
        }
    };
    all.checks.push(Check { name: "required-scopes", outcome, detail });
    (all.checks, verified)
}

/// What becomes of a check's result. `needs` is the result of the checks that this one builds on.
trait Sink {
    fn check<P, T>(
        &mut self,
        name: &'static str,
        needs: Option<P>,
        run: impl FnOnce(P) -> Result<T, TokenError>,
        detail: impl FnOnce(&T) -> String,
    ) -> Option<T>;
}

/// Runs nothing any more after the first error.
struct FirstError {
    error: Option<TokenError>,
}

impl Sink for FirstError {
    fn check<P, T>(
        &mut self,
        _name: &'static str,
        needs: Option<P>,
        run: impl FnOnce(P) -> Result<T, TokenError>,
        _detail: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        if self.error.is_some() {
            return None;
        }
        match needs.map(run) {
            Some(Ok(value)) => Some(value),
            Some(Err(error)) => {
                self.error = Some(error);
                None
            }
            None => {
                self.error = Some(TokenError::Incomplete);
                None
            }
        }
    }
}

/// Runs whatever can run and writes all of it down.
struct AllChecks {
    checks: Vec<Check>,
}

impl Sink for AllChecks {
    fn check<P, T>(
        &mut self,
        name: &'static str,
        needs: Option<P>,
        run: impl FnOnce(P) -> Result<T, TokenError>,
        detail: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        let (outcome, detail, value) = match needs.map(run) {
            Some(Ok(value)) => (Outcome::Pass, detail(&value), Some(value)),
            Some(Err(error)) => (Outcome::Fail, error.to_string(), None),
            None => (Outcome::Skipped, "an earlier check failed".to_owned(), None),
        };
        self.checks.push(Check { name, outcome, detail });
        value
    }
}

fn run<'a>(
    parts: impl FnOnce() -> Result<Jws<'a>, TokenError>,
    size_bytes: usize,
    server: &Server,
    keys: &KeySnapshot,
    now: u64,
    sink: &mut impl Sink,
) -> Option<VerifiedToken> {
    let nothing_to_say = |(): &()| String::new();

    let parts =
        sink.check("format", Some(()), |()| parts(), |_| format!("a signed token of {size_bytes} bytes"));
    let jws = parts.as_ref();
    let header = sink.check("header", jws, |jws| header::object("header", &jws.header), |h| members(h.len()));
    let header = header.as_ref();
    let parameters = sink.check("header-parameters", header, header::no_forbidden_parameter, nothing_to_say);
    let kid = sink.check("key-id", header, header::key_id, |kid| quoted_or(kid.as_deref(), "none"));
    let payload =
        sink.check("payload", jws, |jws| header::object("payload", &jws.payload), |p| members(p.len()));
    let payload = payload.as_ref();

    // Everything below is read by the rules of the issuer that `iss` names, keys included.
    let issuer = sink.check(
        "issuer",
        payload,
        |p| claims::issuer(p, server),
        |i| format!("{:?}, {}", i.name, Quoted::new(&i.issuer)),
    );
    let issuer = issuer.as_ref();
    let token_type = sink.check(
        "type",
        header.zip(issuer),
        |(h, i)| header::token_type(h, i),
        |typ| Quoted::new(typ).to_string(),
    );
    let algorithm = sink.check(
        "algorithm",
        header.zip(issuer),
        |(h, i)| header::algorithm(h, i),
        |a| algorithm_name(*a).to_owned(),
    );
    let audience =
        sink.check("audience", payload, |p| claims::audience(p, server), |a| Quoted::new(a).to_string());
    let expires_at = sink.check(
        "expiry",
        payload.zip(issuer),
        |(p, i)| claims::expiry(p, i, now),
        |at| format!("{at}, in {} s", at.saturating_sub(now)),
    );
    let not_before = sink.check(
        "not-before",
        payload.zip(issuer),
        |(p, i)| claims::not_before(p, i, now),
        |at| at.map_or_else(|| "none".to_owned(), |at| at.to_string()),
    );
    let issued_at = sink.check(
        "issued-at",
        payload.zip(issuer),
        |(p, i)| claims::issued_at(p, i, now),
        |at| format!("{at}, {} s ago", now.saturating_sub(*at)),
    );
    let lifetime = sink.check(
        "lifetime",
        issued_at.zip(expires_at).zip(issuer),
        |((from, to), i)| claims::lifetime(from, to, i),
        |secs| format!("{secs} s"),
    );
    let subject = sink.check("subject", payload, claims::subject, |s| Quoted::new(s).to_string());
    let client_id =
        sink.check("client", payload, claims::client_id, |c| quoted_or(c.as_deref(), "not named"));
    let scopes = sink.check("scopes", payload, claims::scopes, |scopes| {
        if scopes.is_empty() {
            "none".to_owned()
        } else {
            Quoted::list(scopes.iter().map(String::as_str)).to_string()
        }
    });
    let jwt_id = sink.check("jwt-id", payload, claims::jwt_id, |id| quoted_or(id.as_deref(), "none"));
    let unbound =
        sink.check("sender-constraint", payload, claims::not_sender_constrained, |()| "none".to_owned());
    let access_token = sink.check(
        "access-token",
        payload.zip(token_type.as_deref()),
        |(p, typ)| claims::is_access_token(p, typ),
        nothing_to_say,
    );

    let key_set = sink.check(
        "keys",
        issuer,
        |i| keys.of_issuer(i),
        |set| format!("{} usable in the key set", set.len()),
    );
    let key = sink.check(
        "key",
        key_set.zip(issuer).zip(algorithm).zip(kid.as_ref()),
        |(((set, i), algorithm), kid)| set.select(i, kid.as_deref(), algorithm),
        |key| key.describe(),
    );
    let signature = sink.check(
        "signature",
        jws.zip(key).zip(issuer).zip(algorithm),
        |(((jws, key), i), algorithm)| {
            let good = match jws.proof {
                Proof::Signature { signing_input, signature } => {
                    signature::verifies(signing_input.as_bytes(), signature, key.decoding_key(), algorithm)
                }
                Proof::SeenBefore { key_thumbprint } => key.thumbprint() == key_thumbprint,
            };
            if good { Ok(()) } else { Err(TokenError::SignatureInvalid { issuer: i.name.clone() }) }
        },
        nothing_to_say,
    );

    // Named one by one: a check whose result is not used below still has to have passed.
    let ((), (), (), ()) = (parameters?, unbound?, access_token?, signature?);
    let (_, _) = (not_before?, lifetime?);
    let (issuer, expires_at) = (issuer?, expires_at?);
    Some(VerifiedToken {
        issuer: Arc::clone(issuer),
        subject: subject?,
        client_id: client_id?,
        scopes: scopes?,
        audience: audience?,
        issued_at: Some(issued_at?),
        expires_at,
        not_after_unix_secs: expires_at.saturating_add(issuer.leeway.as_secs()),
        jwt_id: jwt_id?,
        pod_uid: claims::pod_uid(payload?),
        key_id: key?.id().map(str::to_owned),
        evidence: Arc::new(Evidence::new(parts?, key?.thumbprint())),
    })
}

fn members(count: usize) -> String {
    format!("a JSON object of {count} members")
}

fn quoted_or(text: Option<&str>, otherwise: &str) -> String {
    text.map_or_else(|| otherwise.to_owned(), |text| Quoted::new(text).to_string())
}
