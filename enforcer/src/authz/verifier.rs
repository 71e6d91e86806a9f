//! What the decision needs from token verification.

use crate::policy::Server;
use crate::workload::{BindFault, Bound, CallerView};

/// Verifies access tokens. Keys and time are the implementation's: the decision only asks.
pub trait TokenVerifier {
    /// What a good token says.
    type Verified;

    /// Is this token good for this server?
    ///
    /// # Errors
    /// Why it is not, or cannot be judged yet.
    fn verify(&self, token: &str, server: &Server) -> Result<Self::Verified, TokenFault>;

    /// May this caller present the token to this server?
    ///
    /// # Errors
    /// The rule that does not hold.
    fn bind(
        &self,
        verified: &Self::Verified,
        server: &Server,
        caller: &CallerView<'_>,
    ) -> Result<Bound, BindFault>;

    /// Those of the scopes `needed` that the token does not grant, hierarchies included.
    fn missing_scopes(&self, verified: &Self::Verified, needed: &[String]) -> Vec<String>;
}

/// Why a token is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenFault {
    /// It is bad, whatever keys there are.
    #[error("the token is not valid: {reason}")]
    Invalid {
        /// A stable name for counters and logs.
        reason: &'static str,
    },
    /// Its issuer is accepted here, but the issuer's key set at hand does not hold this key.
    #[error("the key set of issuer {issuer} holds no key {kid}")]
    UnknownKey {
        /// Issuer identifier.
        issuer: String,
        /// The token's `kid`: chosen by the client, so never shown without escaping.
        kid: String,
    },
    /// There are no keys of this issuer, or only some that are too old.
    #[error("no usable keys of issuer {issuer}")]
    KeysUnavailable {
        /// Issuer identifier.
        issuer: String,
    },
    /// Nobody can tell which tokens are revoked.
    #[error("the revocations can't be read")]
    RevocationsUnavailable,
}
