//! The compact serialization and the JOSE header (RFC 7515).

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::error::{Quoted, TokenError};
use super::json::{self, JsonDefect, type_name};
use crate::policy::{Algorithm, Issuer};

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;

const MAX_KEY_ID_BYTES: usize = 256;

/// A token cut into its parts; all are valid base64url, none is verified.
pub(super) struct Jws<'a> {
    pub(super) proof: Proof<'a>,
    pub(super) header: Cow<'a, [u8]>,
    pub(super) payload: Cow<'a, [u8]>,
}

/// What shows that the issuer said it.
pub(super) enum Proof<'a> {
    /// The token's signature.
    Signature {
        /// What it covers: header, dot, payload, as sent.
        signing_input: &'a str,
        /// base64url.
        signature: &'a str,
    },
    /// A signature of the key with this thumbprint was seen and verified before.
    SeenBefore { key_thumbprint: [u8; 32] },
}

impl<'a> Jws<'a> {
    pub(super) fn split(token: &'a str) -> Result<Self, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::TooLarge { size_bytes: token.len(), limit_bytes: MAX_TOKEN_BYTES });
        }
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::SegmentCount { found: token.split('.').count() });
        };
        decode("signature", signature)?;
        let (signing_input, _) = token.rsplit_once('.').ok_or(TokenError::SegmentCount { found: 1 })?;
        Ok(Self {
            proof: Proof::Signature { signing_input, signature },
            header: decode("header", header)?.into(),
            payload: decode("payload", payload)?.into(),
        })
    }
}

fn decode(segment: &'static str, text: &str) -> Result<Vec<u8>, TokenError> {
    if text.is_empty() {
        return Err(TokenError::EmptySegment { segment });
    }
    URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::NotBase64Url { segment })
}

/// Header or payload as a JSON object without duplicate names.
pub(super) fn object(segment: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, TokenError> {
    json::parse_object(bytes).map_err(|defect| match defect {
        JsonDefect::DuplicateMember { name } => TokenError::DuplicateMember { segment, name },
        other => TokenError::NotJsonObject { segment, defect: other.to_string() },
    })
}

/// Refuses parameters that change what is signed, how it is encoded, or whose key signs. `x5c` and `x5t` only repeat
/// what the key set says and are never read.
pub(super) fn no_forbidden_parameter(header: &Map<String, Value>) -> Result<(), TokenError> {
    if header.contains_key("crit") {
        return Err(TokenError::CriticalExtension);
    }
    if let Some(parameter) = ["jku", "jwk", "x5u"].into_iter().find(|name| header.contains_key(*name)) {
        return Err(TokenError::KeyInHeader { parameter });
    }
    // RFC 7797 lets `b64` stand only together with `crit`, whatever its value.
    if header.contains_key("b64") {
        return Err(TokenError::UnencodedPayload);
    }
    match ["zip", "enc"].into_iter().find(|name| header.contains_key(*name)) {
        Some(parameter) => Err(TokenError::EncryptionParameter { parameter }),
        None => Ok(()),
    }
}

/// `alg`, if it is on the issuer's list. Names are case-sensitive (RFC 7515, section 4.1.1).
pub(super) fn algorithm(header: &Map<String, Value>, issuer: &Issuer) -> Result<Algorithm, TokenError> {
    let accepted = || issuer.algorithms.iter().map(|a| algorithm_name(*a)).collect::<Vec<_>>().join(" ");
    let found = match header.get("alg") {
        None => return Err(TokenError::AlgorithmMissing),
        Some(Value::String(found)) => found,
        Some(other) => {
            return Err(TokenError::ClaimMalformed {
                claim: "alg",
                found: type_name(other),
                expected: "a string",
            });
        }
    };
    match issuer.algorithms.iter().find(|a| algorithm_name(**a) == found) {
        Some(algorithm) => Ok(*algorithm),
        None if found.eq_ignore_ascii_case("none") => Err(TokenError::AlgorithmNone { accepted: accepted() }),
        None if found.get(..2).is_some_and(|start| start.eq_ignore_ascii_case("HS")) => {
            Err(TokenError::AlgorithmSymmetric { found: Quoted::new(found), accepted: accepted() })
        }
        None => Err(TokenError::AlgorithmNotAccepted {
            found: Quoted::new(found),
            issuer: issuer.name.clone(),
            accepted: accepted(),
        }),
    }
}

/// The JOSE name of an algorithm.
pub(crate) fn algorithm_name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::RS256 => "RS256",
        Algorithm::RS384 => "RS384",
        Algorithm::RS512 => "RS512",
        Algorithm::PS256 => "PS256",
        Algorithm::ES256 => "ES256",
        Algorithm::ES384 => "ES384",
        Algorithm::EdDSA => "EdDSA",
    }
}

/// `typ`, if it is on the issuer's list; lower case, without `application/` (RFC 7515, section 4.1.9).
pub(super) fn token_type(header: &Map<String, Value>, issuer: &Issuer) -> Result<String, TokenError> {
    let found = match header.get("typ") {
        None => {
            return Err(TokenError::TypeMissing {
                issuer: issuer.name.clone(),
                accepted: issuer.token_types.join(" "),
            });
        }
        Some(Value::String(found)) => found,
        Some(other) => {
            return Err(TokenError::ClaimMalformed {
                claim: "typ",
                found: type_name(other),
                expected: "a string",
            });
        }
    };
    let lower = found.to_ascii_lowercase();
    let short = lower.strip_prefix("application/").unwrap_or(&lower);
    if issuer.token_types.iter().any(|accepted| accepted == short) {
        Ok(short.to_owned())
    } else {
        Err(TokenError::TypeNotAccepted {
            found: Quoted::new(found),
            issuer: issuer.name.clone(),
            accepted: issuer.token_types.join(" "),
        })
    }
}

/// `kid`. It is only ever compared with the key set's: never a path, a URL or a query.
pub(super) fn key_id(header: &Map<String, Value>) -> Result<Option<String>, TokenError> {
    let found = match header.get("kid") {
        None => return Ok(None),
        Some(Value::String(kid)) if kid.is_empty() => "empty",
        Some(Value::String(kid)) if kid.len() > MAX_KEY_ID_BYTES => "too long",
        Some(Value::String(kid)) if kid.chars().any(char::is_control) => "a string with a control character",
        Some(Value::String(kid)) => return Ok(Some(kid.clone())),
        Some(other) => type_name(other),
    };
    Err(TokenError::KeyIdMalformed { found })
}
