//! Token verification with the keys and the time of one decision.

use crate::authz::{TokenFault, TokenVerifier};
use crate::keys::KeySnapshot;
use crate::policy::Server;
use crate::token::{self, TokenError, VerifiedToken};

/// Verifies with these keys at this time.
pub struct KeyedVerifier<'a> {
    /// Issuers' keys.
    pub keys: &'a KeySnapshot,
    /// Seconds since 1970.
    pub now_unix_secs: u64,
}

impl TokenVerifier for KeyedVerifier<'_> {
    type Verified = VerifiedToken;

    fn verify(&self, token: &str, server: &Server) -> Result<VerifiedToken, TokenFault> {
        token::verify(token, server, self.keys, self.now_unix_secs).map_err(|error| match error {
            TokenError::UnknownKey { issuer, kid } => TokenFault::UnknownKey { issuer, kid },
            TokenError::KeysUnavailable { issuer } => TokenFault::KeysUnavailable { issuer },
            error => TokenFault::Invalid { reason: error.reason().name() },
        })
    }

    fn missing_scopes(&self, verified: &VerifiedToken, needed: &[String]) -> Vec<String> {
        token::missing_scopes(verified, needed)
    }
}
