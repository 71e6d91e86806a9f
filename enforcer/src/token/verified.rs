//! What a verified token says.

use std::collections::BTreeSet;
use std::sync::Arc;

use ring::digest;

use super::Evidence;
use crate::policy::Issuer;

/// An access token that passed every check of [`verify`](super::verify) for one server. Holds claims, never the token.
#[derive(Debug, Clone)]
pub struct VerifiedToken {
    /// The issuer whose key made the signature.
    pub issuer: Arc<Issuer>,
    /// `sub`; 1 to 1024 bytes without control characters.
    pub subject: String,
    /// `client_id` (RFC 9068), else `azp` (OpenID Connect); 1 to 1024 bytes without control characters.
    pub client_id: Option<String>,
    /// The scope tokens of `scope` (RFC 9068) and `scp` together.
    pub scopes: BTreeSet<String>,
    /// The server's audience (its resource or an alias, as policy writes it) that the token holds.
    pub audience: String,
    /// `iat`, in seconds since 1970-01-01T00:00:00Z. Always set today: `iat` is required (RFC 9068, section 2.2).
    pub issued_at: Option<u64>,
    /// `exp`, in seconds since 1970-01-01T00:00:00Z, without leeway.
    pub expires_at: u64,
    /// `exp` plus the issuer's leeway: from this second on the token is refused.
    pub not_after_unix_secs: u64,
    /// `jti`.
    pub jwt_id: Option<String>,
    /// `uid` of `pod` in `kubernetes.io`: the pod that a Kubernetes service account token was made for. Absent also if it is no text.
    pub pod_uid: Option<String>,
    /// `kid` of the key that verified it; absent when the issuer's only fitting key has none.
    pub key_id: Option<String>,
    /// With which it can be judged again.
    pub evidence: Arc<Evidence>,
}

/// Who a token speaks for: equal for all tokens that one issuer gives to one subject through one client, so it survives
/// a token's refresh.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Principal {
    /// The issuer identifier (`iss`).
    pub issuer: String,
    /// The subject (`sub`), unique within the issuer.
    pub subject: String,
    /// The OAuth client.
    pub client_id: Option<String>,
}

impl Principal {
    /// A number that is the same in every daemon and needs no table: SHA-256 over the parts, cut to 64 bits, never 0. Nobody can
    /// make a second principal with the number of a given one.
    #[must_use]
    pub fn id(&self) -> u64 {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in [Some(&self.issuer), Some(&self.subject), self.client_id.as_ref()] {
            // The length keeps the parts apart; an absent part differs from an empty one.
            let length = part.map_or(u64::MAX, |part| part.len() as u64);
            context.update(&length.to_le_bytes());
            context.update(part.map_or(&[], |part| part.as_bytes()));
        }
        let hash = context.finish();
        hash.as_ref().iter().take(8).fold(0, |id, byte| id << 8 | u64::from(*byte)).max(1)
    }
}

impl VerifiedToken {
    /// The identity to bind state to.
    #[must_use]
    pub fn principal(&self) -> Principal {
        Principal {
            issuer: self.issuer.issuer.clone(),
            subject: self.subject.clone(),
            client_id: self.client_id.clone(),
        }
    }
}

/// The scopes of `required` that `token` does not hold, in the order of `required`. Compared byte for byte (RFC 6749,
/// section 3.3). Not empty means 403 `insufficient_scope`.
#[must_use]
pub fn missing_scopes(token: &VerifiedToken, required: &[String]) -> Vec<String> {
    required.iter().filter(|scope| !token.scopes.contains(scope.as_str())).cloned().collect()
}
