//! One JSON Web Key (RFC 7517, section 4; RFC 7518, section 6; RFC 8037).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use serde_json::{Map, Value};

use crate::policy::Algorithm;
use crate::token::Quoted;

/// RFC 7518, section 3.3.
const MIN_RSA_BITS: usize = 2048;
/// What `ring` verifies with; larger keys would also cost too much per token.
const MAX_RSA_BITS: usize = 8192;
const MAX_KEY_ID_BYTES: usize = 256;

/// A public key that can verify tokens.
#[derive(Clone)]
pub struct Key {
    id: Option<String>,
    kind: KeyKind,
    algorithm: Option<Algorithm>,
    decoding_key: DecodingKey,
    thumbprint: [u8; 32],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeyKind {
    Rsa { bits: usize },
    P256,
    P384,
    Ed25519,
}

/// Why a key of a set is not used. The set's other keys are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SkipReason {
    /// The entry is not an object.
    #[error("it is not a JSON object")]
    NotAnObject,
    /// A symmetric key in a public document is no key.
    #[error("it is symmetric (kty \"oct\")")]
    Symmetric,
    /// The set shows a private part: whoever reads it can sign.
    #[error("it carries the private member {0:?}")]
    Private(&'static str),
    /// Unknown `kty` (RFC 7517, section 5: ignore).
    #[error("its kty {0} is not supported")]
    UnsupportedType(Quoted),
    /// Unknown `crv`.
    #[error("its crv {0} is not supported")]
    UnsupportedCurve(Quoted),
    /// `use` is not `sig`.
    #[error("its use is {0}, not \"sig\"")]
    NotForSignatures(Quoted),
    /// `key_ops` has no `verify`.
    #[error("its key_ops do not hold \"verify\"")]
    NotForVerification,
    /// `alg` is none that a policy can name, or belongs to another kind of key.
    #[error("its alg {0} is not supported for its kty")]
    UnsupportedAlgorithm(Quoted),
    /// RSA modulus outside 2048 to 8192 bits.
    #[error("its RSA modulus has {bits} bits, accepted are {MIN_RSA_BITS} to {MAX_RSA_BITS}")]
    RsaSize {
        /// Bits of the modulus.
        bits: usize,
    },
    /// A member is missing or malformed.
    #[error("its member {0:?} is missing or malformed")]
    Malformed(&'static str),
}

impl Key {
    /// Parses one member of a JWKS `keys` array.
    pub(super) fn parse(jwk: &Value) -> Result<Self, SkipReason> {
        let Value::Object(jwk) = jwk else { return Err(SkipReason::NotAnObject) };
        let id = match jwk.get("kid") {
            None => None,
            Some(Value::String(id)) if (1..=MAX_KEY_ID_BYTES).contains(&id.len()) => Some(id.clone()),
            Some(_) => return Err(SkipReason::Malformed("kid")),
        };
        check_use(jwk)?;
        let (kind, decoding_key) = match text(jwk, "kty")? {
            "RSA" => rsa(jwk)?,
            "EC" => ec(jwk)?,
            "OKP" => okp(jwk)?,
            "oct" => return Err(SkipReason::Symmetric),
            other => return Err(SkipReason::UnsupportedType(Quoted::new(other))),
        };
        if let Some(private) =
            ["d", "p", "q", "dp", "dq", "qi", "oth", "k"].into_iter().find(|m| jwk.contains_key(*m))
        {
            return Err(SkipReason::Private(private));
        }
        let algorithm = match jwk.get("alg") {
            None => None,
            Some(_) => {
                let name = text(jwk, "alg")?;
                let algorithm = algorithm_of(name).filter(|a| kind.fits(*a));
                Some(algorithm.ok_or_else(|| SkipReason::UnsupportedAlgorithm(Quoted::new(name)))?)
            }
        };
        let thumbprint = thumbprint(jwk);
        Ok(Self { id, kind, algorithm, decoding_key, thumbprint })
    }

    /// `kid`.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// May this key verify tokens of this algorithm: by its kind, and by its own `alg` where it has one?
    #[must_use]
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        self.kind.fits(algorithm) && self.algorithm.is_none_or(|own| own == algorithm)
    }

    /// The kind of the key, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let kind = match self.kind {
            KeyKind::Rsa { bits } => format!("RSA {bits}"),
            KeyKind::P256 => "EC P-256".to_owned(),
            KeyKind::P384 => "EC P-384".to_owned(),
            KeyKind::Ed25519 => "OKP Ed25519".to_owned(),
        };
        self.algorithm.map_or_else(|| kind.clone(), |algorithm| format!("{kind} ({algorithm:?})"))
    }

    /// SHA-256 over what makes the key (RFC 7638): equal for equal keys, whatever their `kid` or `alg`.
    #[must_use]
    pub fn thumbprint(&self) -> [u8; 32] {
        self.thumbprint
    }

    pub(crate) fn decoding_key(&self) -> &DecodingKey {
        &self.decoding_key
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("id", &self.id).field("kind", &self.describe()).finish_non_exhaustive()
    }
}

impl KeyKind {
    fn fits(self, algorithm: Algorithm) -> bool {
        match algorithm {
            Algorithm::RS256 | Algorithm::RS384 | Algorithm::RS512 | Algorithm::PS256 => {
                matches!(self, Self::Rsa { .. })
            }
            Algorithm::ES256 => self == Self::P256,
            Algorithm::ES384 => self == Self::P384,
            Algorithm::EdDSA => self == Self::Ed25519,
        }
    }
}

fn algorithm_of(name: &str) -> Option<Algorithm> {
    Some(match name {
        "RS256" => Algorithm::RS256,
        "RS384" => Algorithm::RS384,
        "RS512" => Algorithm::RS512,
        "PS256" => Algorithm::PS256,
        "ES256" => Algorithm::ES256,
        "ES384" => Algorithm::ES384,
        // RFC 9864 gave EdDSA over Ed25519 a name of its own.
        "EdDSA" | "Ed25519" => Algorithm::EdDSA,
        _ => return None,
    })
}

/// `use` and `key_ops` (RFC 7517, sections 4.2 and 4.3).
fn check_use(jwk: &Map<String, Value>) -> Result<(), SkipReason> {
    if jwk.contains_key("use") {
        let found = text(jwk, "use")?;
        if found != "sig" {
            return Err(SkipReason::NotForSignatures(Quoted::new(found)));
        }
    }
    match jwk.get("key_ops") {
        None => Ok(()),
        Some(Value::Array(ops)) if ops.iter().any(|op| op == "verify") => Ok(()),
        Some(Value::Array(_)) => Err(SkipReason::NotForVerification),
        Some(_) => Err(SkipReason::Malformed("key_ops")),
    }
}

fn rsa(jwk: &Map<String, Value>) -> Result<(KeyKind, DecodingKey), SkipReason> {
    // RFC 7518, section 6.3.1.1 forbids leading zero octets, some issuers write one; ring wants none.
    let stripped = |member: &'static str| -> Result<Vec<u8>, SkipReason> {
        let bytes = octets(jwk, member)?;
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        Ok(bytes.into_iter().skip(zeros).collect())
    };
    let (n, e) = (stripped("n")?, stripped("e")?);
    let bits = n.first().map_or(0, |first| n.len() * 8 - first.leading_zeros() as usize);
    if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
        return Err(SkipReason::RsaSize { bits });
    }
    // An even exponent is none, and 1 makes every message its own signature. ring refuses exponents above 33 bits.
    if e.len() > 5 || e.last().is_none_or(|last| last % 2 == 0) || e == [1] {
        return Err(SkipReason::Malformed("e"));
    }
    Ok((KeyKind::Rsa { bits }, DecodingKey::from_rsa_raw_components(&n, &e)))
}

fn ec(jwk: &Map<String, Value>) -> Result<(KeyKind, DecodingKey), SkipReason> {
    let (kind, coordinate_bytes) = match text(jwk, "crv")? {
        "P-256" => (KeyKind::P256, 32),
        "P-384" => (KeyKind::P384, 48),
        other => return Err(SkipReason::UnsupportedCurve(Quoted::new(other))),
    };
    // Uncompressed point, SEC 1 section 2.3.3.
    let mut point = vec![4];
    for member in ["x", "y"] {
        let coordinate = octets(jwk, member)?;
        if coordinate.len() != coordinate_bytes {
            return Err(SkipReason::Malformed(member));
        }
        point.extend_from_slice(&coordinate);
    }
    Ok((kind, DecodingKey::from_ec_der(&point)))
}

fn okp(jwk: &Map<String, Value>) -> Result<(KeyKind, DecodingKey), SkipReason> {
    match text(jwk, "crv")? {
        "Ed25519" => {}
        other => return Err(SkipReason::UnsupportedCurve(Quoted::new(other))),
    }
    let x = octets(jwk, "x")?;
    if x.len() != 32 {
        return Err(SkipReason::Malformed("x"));
    }
    Ok((KeyKind::Ed25519, DecodingKey::from_ed_der(&x)))
}

/// RFC 7638, section 3: the required members, in the order of their names, without white space.
fn thumbprint(jwk: &Map<String, Value>) -> [u8; 32] {
    let members: &[&str] = match jwk.get("kty").and_then(Value::as_str) {
        Some("RSA") => &["e", "kty", "n"],
        Some("EC") => &["crv", "kty", "x", "y"],
        _ => &["crv", "kty", "x"],
    };
    let text = members.iter().filter_map(|name| Some(format!("\"{name}\":{}", jwk.get(*name)?)));
    let text = format!("{{{}}}", text.collect::<Vec<_>>().join(","));
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, text.as_bytes()).as_ref());
    out
}

fn text<'a>(jwk: &'a Map<String, Value>, member: &'static str) -> Result<&'a str, SkipReason> {
    jwk.get(member).and_then(Value::as_str).ok_or(SkipReason::Malformed(member))
}

fn octets(jwk: &Map<String, Value>, member: &'static str) -> Result<Vec<u8>, SkipReason> {
    URL_SAFE_NO_PAD.decode(text(jwk, member)?).map_err(|_| SkipReason::Malformed(member))
}
