//! Tokens with full control over header, claims and signature.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::Key;
use super::keys::base64url;

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// A token in the making. It starts as a sound RFC 9068 access token of five minutes (`sub` alice,
/// `client_id` test-client, a fresh `jti`) without `aud`; each method changes one thing.
#[derive(Debug, Clone)]
pub struct Mint {
    header: Map<String, Value>,
    claims: Map<String, Value>,
    key: Arc<Key>,
    now: i64,
    signature: Signature,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signature {
    Sound,
    OneBitWrong,
    Absent,
}

impl Mint {
    pub(super) fn new(issuer: &str, key: Arc<Key>) -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
        let jti = format!("{:x}-{}", since_epoch.as_nanos(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let header = Map::from_iter([
            ("alg".to_owned(), json!(key.alg().name())),
            ("kid".to_owned(), json!(key.kid())),
            ("typ".to_owned(), json!("at+jwt")),
        ]);
        let claims = Map::from_iter([
            ("iss".to_owned(), json!(issuer)),
            ("sub".to_owned(), json!("alice")),
            ("client_id".to_owned(), json!("test-client")),
            ("iat".to_owned(), json!(now)),
            ("exp".to_owned(), json!(now + 300)),
            ("jti".to_owned(), json!(jti)),
        ]);
        Self { header, claims, key, now, signature: Signature::Sound }
    }

    /// Sets `aud` to one string.
    #[must_use]
    pub fn audience(self, resource: &str) -> Self {
        self.claim("aud", resource)
    }

    /// Sets `aud` to an array.
    #[must_use]
    pub fn audiences(self, resources: &[&str]) -> Self {
        self.claim("aud", json!(resources))
    }

    /// Sets `sub`.
    #[must_use]
    pub fn subject(self, subject: &str) -> Self {
        self.claim("sub", subject)
    }

    /// Sets `client_id`.
    #[must_use]
    pub fn client_id(self, client: &str) -> Self {
        self.claim("client_id", client)
    }

    /// Sets `scope` (space separated).
    #[must_use]
    pub fn scope(self, scopes: &str) -> Self {
        self.claim("scope", scopes)
    }

    /// Sets `exp` to this many seconds from now; negative lies in the past.
    #[must_use]
    pub fn expires_in(self, seconds: i64) -> Self {
        let at = self.now + seconds;
        self.claim("exp", at)
    }

    /// Sets `iat` to this many seconds from now; negative lies in the past.
    #[must_use]
    pub fn issued_in(self, seconds: i64) -> Self {
        let at = self.now + seconds;
        self.claim("iat", at)
    }

    /// Sets `nbf` to this many seconds from now.
    #[must_use]
    pub fn not_before_in(self, seconds: i64) -> Self {
        let at = self.now + seconds;
        self.claim("nbf", at)
    }

    /// Sets any claim to any value.
    #[must_use]
    pub fn claim(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.claims.insert(name.to_owned(), value.into());
        self
    }

    /// Leaves a claim out.
    #[must_use]
    pub fn without_claim(mut self, name: &str) -> Self {
        self.claims.remove(name);
        self
    }

    /// Sets the header's `typ`.
    #[must_use]
    pub fn typ(self, typ: &str) -> Self {
        self.header("typ", typ)
    }

    /// Sets the header's `alg` without changing how the token is signed.
    #[must_use]
    pub fn alg_header(self, alg: &str) -> Self {
        self.header("alg", alg)
    }

    /// Sets the header's `kid` without changing the key.
    #[must_use]
    pub fn kid(self, kid: &str) -> Self {
        self.header("kid", kid)
    }

    /// Sets any header parameter.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.header.insert(name.to_owned(), value.into());
        self
    }

    /// Leaves a header parameter out.
    #[must_use]
    pub fn without_header(mut self, name: &str) -> Self {
        self.header.remove(name);
        self
    }

    /// Signs with another key; the header keeps naming the first one.
    #[must_use]
    pub fn signed_by(mut self, key: Arc<Key>) -> Self {
        self.key = key;
        self
    }

    /// Flips one bit of the signature.
    #[must_use]
    pub fn corrupt_signature(mut self) -> Self {
        self.signature = Signature::OneBitWrong;
        self
    }

    /// Leaves the signature empty (with `alg_header("none")`: an unsecured JWS, RFC 7515 appendix A.5).
    #[must_use]
    pub fn unsigned(mut self) -> Self {
        self.signature = Signature::Absent;
        self
    }

    /// The token in compact serialisation.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn sign(&self) -> Result<String> {
        let header = base64url(&serde_json::to_vec(&self.header)?);
        let claims = base64url(&serde_json::to_vec(&self.claims)?);
        let mut token = format!("{header}.{claims}");
        let mut signature = match self.signature {
            Signature::Absent => Vec::new(),
            Signature::Sound | Signature::OneBitWrong => self.key.sign(token.as_bytes())?,
        };
        if self.signature == Signature::OneBitWrong
            && let Some(byte) = signature.get_mut(8)
        {
            *byte ^= 1;
        }
        token.push('.');
        token.push_str(&base64url(&signature));
        Ok(token)
    }
}
