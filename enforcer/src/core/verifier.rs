//! Token verification with the keys, the revocations and the time of one decision.

use crate::authz::{TokenFault, TokenVerifier};
use crate::keys::KeySnapshot;
use crate::policy::Server;
use crate::revocation::{RevocationList, Subject};
use crate::token::{self, Fingerprinter, TokenError, VerifiedToken};
use crate::workload::{self, BindFault, Bound, CallerView};
use enforcer_common::abi::NameHash;

/// Verifies with these keys and revocations at this time.
pub struct KeyedVerifier<'a> {
    /// Issuers' keys.
    pub keys: &'a KeySnapshot,
    /// Revocations; `None`: they can't be read, and no token is accepted.
    pub revocations: Option<&'a RevocationList>,
    /// Fingerprints, as the revocations have them.
    pub fingerprinter: &'a Fingerprinter,
    /// Hashes of the names of the workload that presents the tokens, as the revocations have them.
    pub workload: [NameHash; 2],
    /// Seconds since 1970.
    pub now_unix_secs: u64,
}

impl TokenVerifier for KeyedVerifier<'_> {
    type Verified = VerifiedToken;

    fn verify(&self, token: &str, server: &Server) -> Result<VerifiedToken, TokenFault> {
        let verified =
            token::verify(token, server, self.keys, self.now_unix_secs).map_err(|error| match error {
                TokenError::UnknownKey { issuer, kid } => TokenFault::UnknownKey { issuer, kid },
                TokenError::KeysUnavailable { issuer } => TokenFault::KeysUnavailable { issuer },
                error => TokenFault::Invalid { reason: error.reason().name() },
            })?;
        let list = self.revocations.ok_or(TokenFault::RevocationsUnavailable)?;
        if !list.is_empty() {
            let fingerprint = self.fingerprinter.fingerprint(token.as_bytes());
            let subject = Subject::of_token(&verified, fingerprint, &server.name, self.workload);
            if list.find(&subject, self.now_unix_secs).is_some() {
                return Err(TokenFault::Invalid { reason: "revoked" });
            }
        }
        Ok(verified)
    }

    fn bind(
        &self,
        verified: &VerifiedToken,
        server: &Server,
        caller: &CallerView<'_>,
    ) -> Result<Bound, BindFault> {
        workload::bind(&server.bind, verified, caller)
    }

    fn missing_scopes(&self, verified: &VerifiedToken, needed: &[String]) -> Vec<String> {
        token::missing_scopes(verified, needed)
    }
}
