//! A JSON Web Key Set (RFC 7517, section 5).

use serde_json::Value;

use super::jwk::{Key, SkipReason};
use crate::policy::{Algorithm, Issuer};
use crate::token::json::{self, JsonDefect};
use crate::token::{Quoted, TokenError, signature};

/// Most keys in a set.
const MAX_KEYS: usize = 128;

/// An issuer's public keys, ready to verify with. Sets are compared and replaced as a whole.
#[derive(Debug, Clone)]
pub struct KeySet {
    keys: Vec<Key>,
    skipped: Vec<SkippedKey>,
}

/// A key of the document that is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedKey {
    /// Position in the `keys` array, from 0.
    pub position: usize,
    /// Its `kid`, if that is a string.
    pub key_id: Option<Quoted>,
    /// Why.
    pub reason: SkipReason,
}

impl std::fmt::Display for SkippedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.key_id {
            Some(id) => write!(f, "key {} ({id}) is not used: {}", self.position, self.reason),
            None => write!(f, "key {} is not used: {}", self.position, self.reason),
        }
    }
}

/// Why a document is not a usable key set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// Not one JSON object.
    #[error("the key set is not a JSON object: {0}")]
    NotJsonObject(String),
    /// A member name twice in one object (RFC 7517, section 4).
    #[error("the key set names the member {0} twice")]
    DuplicateMember(Quoted),
    /// No `keys` array.
    #[error("the key set has no \"keys\" array")]
    NoKeysArray,
    /// More keys than any issuer needs.
    #[error("the key set has {found} keys, at most {MAX_KEYS} are accepted")]
    TooManyKeys {
        /// Length of the array.
        found: usize,
    },
    /// Two usable keys answer to one `kid`.
    #[error("the key set has two keys with the kid {0}")]
    DuplicateKeyId(Quoted),
    /// Something else in the process chose how signatures are verified.
    #[error("another JOSE crypto provider was installed in this process before ours")]
    ForeignProvider,
}

impl KeySet {
    /// Parses a JWKS document.
    ///
    /// Strict about the document, tolerant about keys that are not for us: those of unknown types, for encryption,
    /// malformed or too weak are left out (RFC 7517, section 5) and listed in [`skipped`](Self::skipped). A set without
    /// any usable key is valid: an issuer may withdraw all its keys.
    ///
    /// # Errors
    /// The document's first defect.
    pub fn parse(document: &[u8]) -> Result<Self, KeySetError> {
        if !signature::install_provider() {
            return Err(KeySetError::ForeignProvider);
        }
        let object = json::parse_object(document).map_err(|defect| match defect {
            JsonDefect::DuplicateMember { name } => KeySetError::DuplicateMember(name),
            other => KeySetError::NotJsonObject(other.to_string()),
        })?;
        let Some(Value::Array(entries)) = object.get("keys") else { return Err(KeySetError::NoKeysArray) };
        if entries.len() > MAX_KEYS {
            return Err(KeySetError::TooManyKeys { found: entries.len() });
        }
        let mut set = Self { keys: Vec::with_capacity(entries.len()), skipped: Vec::new() };
        for (position, entry) in entries.iter().enumerate() {
            match Key::parse(entry) {
                Ok(key) => {
                    if let Some(id) = key.id()
                        && set.contains(id)
                    {
                        return Err(KeySetError::DuplicateKeyId(Quoted::new(id)));
                    }
                    set.keys.push(key);
                }
                Err(reason) => {
                    let key_id = entry.get("kid").and_then(Value::as_str).map(Quoted::new);
                    set.skipped.push(SkippedKey { position, key_id, reason });
                }
            }
        }
        Ok(set)
    }

    /// Count of usable keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// No key is usable.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The usable keys, in the document's order.
    #[must_use]
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// The keys that are not used, in the document's order.
    #[must_use]
    pub fn skipped(&self) -> &[SkippedKey] {
        &self.skipped
    }

    /// Is there a usable key with this `kid`? Byte for byte (RFC 7517, section 4.5).
    #[must_use]
    pub fn contains(&self, kid: &str) -> bool {
        self.keys.iter().any(|key| key.id() == Some(kid))
    }

    /// The key for a token with this `kid` and algorithm. Without a `kid`, exactly one key must fit the algorithm.
    ///
    /// # Errors
    /// [`TokenError::UnknownKey`], [`TokenError::KeyUnfit`] or [`TokenError::KeyAmbiguous`].
    pub fn select(
        &self,
        issuer: &Issuer,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<&Key, TokenError> {
        let algorithm_name = crate::token::algorithm_name(algorithm);
        let Some(kid) = kid else {
            let mut fitting = self.keys.iter().filter(|key| key.fits(algorithm));
            return match (fitting.next(), fitting.next()) {
                (Some(only), None) => Ok(only),
                _ => Err(TokenError::KeyAmbiguous {
                    issuer: issuer.name.clone(),
                    algorithm: algorithm_name,
                    fitting: self.keys.iter().filter(|key| key.fits(algorithm)).count(),
                }),
            };
        };
        match self.keys.iter().find(|key| key.id() == Some(kid)) {
            Some(key) if key.fits(algorithm) => Ok(key),
            Some(key) => Err(TokenError::KeyUnfit {
                issuer: issuer.name.clone(),
                kid: kid.to_owned(),
                key: key.describe(),
                algorithm: algorithm_name,
            }),
            None => Err(TokenError::UnknownKey { issuer: issuer.name.clone(), kid: kid.to_owned() }),
        }
    }
}
