//! The claims of an access token (RFC 7519, RFC 9068).

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::error::{Quoted, TokenError};
use super::json::type_name;
use crate::policy::{Issuer, Server};

/// 9999-12-31T23:59:59Z.
const MAX_UNIX_SECS: u64 = 253_402_300_799;
/// Bound for `sub`, `client_id`, `azp` and `jti`, in bytes. OpenID Connect allows 255; Kubernetes service accounts need
/// up to 337.
const MAX_TEXT_BYTES: usize = 1024;

type Claims = Map<String, Value>;

/// The server's issuer that `iss` names. Byte for byte: no trailing slash, case or port is normalized (RFC 9068, section 4).
pub(super) fn issuer(claims: &Claims, server: &Server) -> Result<Arc<Issuer>, TokenError> {
    let found = match claims.get("iss") {
        None => return Err(TokenError::IssuerMissing),
        Some(Value::String(found)) => found,
        Some(other) => {
            return Err(TokenError::ClaimMalformed {
                claim: "iss",
                found: type_name(other),
                expected: "a string",
            });
        }
    };
    server.issuers.iter().find(|issuer| issuer.issuer == *found).map(Arc::clone).ok_or_else(|| {
        TokenError::IssuerUnknown {
            found: Quoted::new(found),
            accepted: Quoted::list(server.issuers.iter().map(|issuer| issuer.issuer.as_str())),
        }
    })
}

/// The audience of the server that `aud` holds, as policy writes it. Every entry must be a non-empty string, also those
/// that are not ours.
pub(super) fn audience(claims: &Claims, server: &Server) -> Result<String, TokenError> {
    let ours = || std::iter::once(server.resource.as_str()).chain(server.aliases.iter().map(String::as_str));
    let entries = match claims.get("aud") {
        None => return Err(TokenError::AudienceMissing { expected: Quoted::list(ours()) }),
        Some(Value::Array(entries)) if entries.is_empty() => {
            return Err(TokenError::AudienceMalformed { found: "an empty array" });
        }
        Some(Value::Array(entries)) => entries.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let mut found = Vec::with_capacity(entries.len());
    for entry in entries {
        match entry {
            Value::String(text) if text.is_empty() => {
                return Err(TokenError::AudienceMalformed { found: "an empty string" });
            }
            Value::String(text) => found.push(text.as_str()),
            other => return Err(TokenError::AudienceMalformed { found: type_name(other) }),
        }
    }
    ours().find(|ours| found.iter().any(|found| same_resource(found, ours))).map(str::to_owned).ok_or_else(
        || TokenError::AudienceMismatch { found: Quoted::list(found), expected: Quoted::list(ours()) },
    )
}

/// Byte-exact equality, except that `scheme://authority` equals `scheme://authority/`.
///
/// Policy holds canonical URIs (lower-case scheme and host, no default port). An issuer that writes the audience in
/// another way, e.g. in upper case, is refused rather than normalized: RFC 9068, section 4 asks for the identifier
/// that the resource server expects for itself, and aliases in policy can name other spellings openly.
fn same_resource(a: &str, b: &str) -> bool {
    let without_root = |uri: &'_ str| -> usize {
        uri.strip_suffix('/')
            .filter(|rest| rest.split_once("://").is_some_and(|(_, host)| is_bare_authority(host)))
            .map_or(uri.len(), str::len)
    };
    a.get(..without_root(a)) == b.get(..without_root(b))
}

fn is_bare_authority(text: &str) -> bool {
    !text.is_empty() && !text.contains(['/', '?', '#'])
}

/// `exp`, in seconds: required, and now is before it plus leeway.
pub(super) fn expiry(claims: &Claims, issuer: &Issuer, now: u64) -> Result<u64, TokenError> {
    let expires_at = date(claims, "exp")?.ok_or(TokenError::ExpiryMissing)?;
    let leeway_secs = issuer.leeway.as_secs();
    if now >= expires_at.saturating_add(leeway_secs) {
        return Err(TokenError::Expired { expires_at, leeway_secs, now });
    }
    Ok(expires_at)
}

/// `nbf`, in seconds: optional.
pub(super) fn not_before(claims: &Claims, issuer: &Issuer, now: u64) -> Result<Option<u64>, TokenError> {
    let not_before = date(claims, "nbf")?;
    let leeway_secs = issuer.leeway.as_secs();
    match not_before {
        Some(not_before) if not_before > now.saturating_add(leeway_secs) => {
            Err(TokenError::NotYetValid { not_before, leeway_secs, now })
        }
        other => Ok(other),
    }
}

/// `iat`, in seconds: required.
pub(super) fn issued_at(claims: &Claims, issuer: &Issuer, now: u64) -> Result<u64, TokenError> {
    let issued_at = date(claims, "iat")?.ok_or(TokenError::IssuedAtMissing)?;
    let leeway_secs = issuer.leeway.as_secs();
    if issued_at > now.saturating_add(leeway_secs) {
        return Err(TokenError::IssuedInFuture { issued_at, leeway_secs, now });
    }
    Ok(issued_at)
}

/// `exp - iat` in seconds, if within the issuer's maximum.
pub(super) fn lifetime(issued_at: u64, expires_at: u64, issuer: &Issuer) -> Result<u64, TokenError> {
    let lifetime_secs = match expires_at.checked_sub(issued_at) {
        None | Some(0) => return Err(TokenError::ExpiryBeforeIssue { expires_at, issued_at }),
        Some(lifetime_secs) => lifetime_secs,
    };
    let maximum_secs = issuer.max_token_lifetime.as_secs();
    if lifetime_secs > maximum_secs {
        return Err(TokenError::LifetimeTooLong { lifetime_secs, issuer: issuer.name.clone(), maximum_secs });
    }
    Ok(lifetime_secs)
}

/// A NumericDate (RFC 7519, section 2), whole seconds only.
fn date(claims: &Claims, claim: &'static str) -> Result<Option<u64>, TokenError> {
    let found = match claims.get(claim) {
        None => return Ok(None),
        Some(Value::Number(number)) => match number.as_u64() {
            Some(secs) if secs <= MAX_UNIX_SECS => return Ok(Some(secs)),
            Some(_) => "after the year 9999",
            None if number.is_i64() => "negative",
            None => "not a whole number in range",
        },
        Some(other) => type_name(other),
    };
    Err(TokenError::DateMalformed { claim, found })
}

/// `sub`: required (RFC 9068, section 2.2).
pub(super) fn subject(claims: &Claims) -> Result<String, TokenError> {
    text(claims, "sub")?.ok_or(TokenError::SubjectMissing)
}

/// `client_id` (RFC 9068), else `azp` (OpenID Connect).
pub(super) fn client_id(claims: &Claims) -> Result<Option<String>, TokenError> {
    let azp = text(claims, "azp")?;
    Ok(text(claims, "client_id")?.or(azp))
}

/// `jti`.
pub(super) fn jwt_id(claims: &Claims) -> Result<Option<String>, TokenError> {
    text(claims, "jti")
}

/// The pod of a Kubernetes service account token (KEP-1205). Not a check: whoever needs it refuses a token without it.
pub(super) fn pod_uid(claims: &Claims) -> Option<String> {
    let pod = claims.get("kubernetes.io")?.as_object()?.get("pod")?.as_object()?;
    text(pod, "uid").ok().flatten()
}

fn text(claims: &Claims, claim: &'static str) -> Result<Option<String>, TokenError> {
    let found = match claims.get(claim) {
        None => return Ok(None),
        Some(Value::String(text)) if text.is_empty() => "empty",
        Some(Value::String(text)) if text.len() > MAX_TEXT_BYTES => "too long",
        Some(Value::String(text)) if text.chars().any(char::is_control) => {
            "a string with a control character"
        }
        Some(Value::String(text)) => return Ok(Some(text.clone())),
        Some(other) => type_name(other),
    };
    Err(TokenError::ClaimMalformed {
        claim,
        found,
        expected: "a string of 1 to 1024 bytes without control characters",
    })
}

/// `scope` (a string, RFC 9068) and `scp` (a string or an array, as several issuers write it), united: both are signed.
pub(super) fn scopes(claims: &Claims) -> Result<BTreeSet<String>, TokenError> {
    let mut scopes = BTreeSet::new();
    match claims.get("scope") {
        None => {}
        Some(Value::String(list)) => add_scopes(&mut scopes, "scope", list)?,
        Some(other) => {
            return Err(TokenError::ClaimMalformed {
                claim: "scope",
                found: type_name(other),
                expected: "a string",
            });
        }
    }
    match claims.get("scp") {
        None => {}
        Some(Value::String(list)) => add_scopes(&mut scopes, "scp", list)?,
        Some(Value::Array(entries)) => {
            for entry in entries {
                match entry {
                    Value::String(scope) if is_scope_token(scope) => scopes.insert(scope.clone()),
                    Value::String(_) => return Err(bad_scope("scp")),
                    other => {
                        return Err(TokenError::ClaimMalformed {
                            claim: "scp",
                            found: type_name(other),
                            expected: "strings in its array",
                        });
                    }
                };
            }
        }
        Some(other) => {
            return Err(TokenError::ClaimMalformed {
                claim: "scp",
                found: type_name(other),
                expected: "a string or an array of strings",
            });
        }
    }
    Ok(scopes)
}

fn add_scopes(scopes: &mut BTreeSet<String>, claim: &'static str, list: &str) -> Result<(), TokenError> {
    for scope in list.split(' ').filter(|scope| !scope.is_empty()) {
        if !is_scope_token(scope) {
            return Err(bad_scope(claim));
        }
        scopes.insert(scope.to_owned());
    }
    Ok(())
}

/// `scope-token` of RFC 6749, section 3.3.
fn is_scope_token(scope: &str) -> bool {
    !scope.is_empty() && scope.bytes().all(|byte| matches!(byte, 0x21 | 0x23..=0x5b | 0x5d..=0x7e))
}

fn bad_scope(claim: &'static str) -> TokenError {
    TokenError::ClaimMalformed {
        claim,
        found: "a list with other characters",
        expected: "scope tokens of RFC 6749, section 3.3",
    }
}

/// Refuses a token that is bound to its sender, whatever the binding.
pub(super) fn not_sender_constrained(claims: &Claims) -> Result<(), TokenError> {
    if claims.contains_key("cnf") { Err(TokenError::SenderConstrained) } else { Ok(()) }
}

/// Refuses ID, refresh and logout tokens by their claims. With `at+jwt` the header alone says access token, but where
/// policy admits plain `JWT`, an ID token has the same `typ`.
pub(super) fn is_access_token(claims: &Claims, token_type: &str) -> Result<(), TokenError> {
    // What Keycloak calls the token in its payload.
    if let Some(Value::String(kind)) = claims.get("typ")
        && ["id", "refresh", "offline", "logout"].iter().any(|other| kind.eq_ignore_ascii_case(other))
    {
        return Err(TokenError::NotAccessToken { claim: "typ" });
    }
    // The same from Amazon Cognito.
    if claims.get("token_use").is_some_and(|kind| kind != "access") {
        return Err(TokenError::NotAccessToken { claim: "token_use" });
    }
    if claims.contains_key("events") {
        return Err(TokenError::NotAccessToken { claim: "events" });
    }
    let of_id_tokens =
        ["nonce", "at_hash", "c_hash", "s_hash"].into_iter().find(|claim| claims.contains_key(*claim));
    match of_id_tokens {
        Some(claim) if token_type != "at+jwt" => Err(TokenError::NotAccessToken { claim }),
        _ => Ok(()),
    }
}
