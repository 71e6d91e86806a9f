//! Tokens that are refused although issuer and policy would accept them: who says so, for how long, and which tokens are meant.
//!
//! Decisions here, without I/O: what a revocation means ([`matches()`]), the daemon's view of all of them ([`RevocationList`]). The
//! list lies in a map, so that it takes effect while no daemon runs, and in a file, so that it outlives the map
//! ([`store`]).
//!
//! No grant slips through between the two sides. The operator's side writes the revocation, then moves the epoch, then revokes the
//! grants that it finds. The daemon reads the epoch and the list, checks the token, writes the grant, and reads the epoch again:
//! if it has not moved, the grant was there before the operator's side looked for grants; if it has, the token is
//! checked again, and the grant voided if it is meant.

mod list;
pub mod store;

use enforcer_common::abi::{
    GrantLabel, NameHash, REVOKE_CLIENT, REVOKE_ISSUER, REVOKE_SERVER, REVOKE_SUBJECT, REVOKE_TOKEN,
    REVOKE_WORKLOAD, Revocation,
};
use ring::digest::{SHA256, digest};

use crate::policy::Policy;
use crate::token::{Fingerprint, VerifiedToken};

pub use list::{RevocationList, Revocations};

/// Stands for a whole name in the maps, where labels hold only its beginning.
#[must_use]
pub fn name_hash(name: &str) -> NameHash {
    let mut hash = NameHash::default();
    hash.iter_mut().zip(digest(&SHA256, name.as_bytes()).as_ref()).for_each(|(to, from)| *to = *from);
    hash
}

/// Hashes of the names of a workload that has hidden them: what is revoked for any workload is revoked for it.
pub const UNNAMED: [NameHash; 2] = [[0; 16]; 2];

/// What a revocation is compared with: a token at a server, presented by a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// The token.
    pub fingerprint: Fingerprint,
    /// Its `iat`, in Unix seconds.
    pub issued_at_unix_secs: Option<u64>,
    /// Hash of the issuer's name in the policy.
    pub issuer_name: NameHash,
    /// Hash of the issuer identifier.
    pub issuer: NameHash,
    /// Hash of the subject.
    pub subject: NameHash,
    /// Hash of the client's id; zero where the token has none.
    pub client: NameHash,
    /// Hash of the server's name.
    pub server: NameHash,
    /// Hashes of the names of the workload that presents it.
    pub workload: [NameHash; 2],
}

impl Subject {
    /// Of a verified token at a server, presented by a workload.
    #[must_use]
    pub fn of_token(
        token: &VerifiedToken,
        fingerprint: Fingerprint,
        server: &str,
        workload: [NameHash; 2],
    ) -> Self {
        Self {
            fingerprint,
            issued_at_unix_secs: token.issued_at,
            issuer_name: name_hash(&token.issuer.name),
            issuer: name_hash(&token.issuer.issuer),
            subject: name_hash(&token.subject),
            client: token.client_id.as_deref().map(name_hash).unwrap_or_default(),
            server: name_hash(server),
            workload,
        }
    }

    /// Of a grant.
    #[must_use]
    pub fn of_grant(fingerprint: [u8; 16], label: &GrantLabel) -> Self {
        Self {
            fingerprint: Fingerprint(fingerprint),
            issued_at_unix_secs: (label.issued_at_unix_secs != 0).then_some(label.issued_at_unix_secs),
            issuer_name: label.issuer_name_hash,
            issuer: label.issuer_hash,
            subject: label.subject_hash,
            client: label.client_hash,
            server: label.server_hash,
            workload: label.workload_hashes,
        }
    }
}

/// Whether a revocation selects this token, whenever it was issued.
#[must_use]
pub fn selects(revocation: &Revocation, subject: &Subject) -> bool {
    let asks = |selector| revocation.selectors & selector != 0;
    let issuer = revocation.issuer_hash;
    (!asks(REVOKE_TOKEN) || revocation.fingerprint == subject.fingerprint.0)
        && (!asks(REVOKE_ISSUER) || issuer == subject.issuer || issuer == subject.issuer_name)
        && (!asks(REVOKE_SUBJECT) || revocation.subject_hash == subject.subject)
        && (!asks(REVOKE_CLIENT) || revocation.client_hash == subject.client)
        && (!asks(REVOKE_SERVER) || revocation.server_hash == subject.server)
        && (!asks(REVOKE_WORKLOAD)
            || subject.workload == UNNAMED
            || subject.workload.contains(&revocation.workload_hash))
}

/// Whether a revocation means this token: it selects it, and the token was issued before it. A token that does not say when it was
/// issued is meant.
#[must_use]
pub fn matches(revocation: &Revocation, subject: &Subject) -> bool {
    let in_time = revocation.selectors & REVOKE_TOKEN != 0
        || subject.issued_at_unix_secs.is_none_or(|at| at <= revocation.issued_until_unix_secs);
    in_time && selects(revocation, subject)
}

/// Whether a revocation is over: no token that it means can be accepted any more.
#[must_use]
pub const fn is_over(revocation: &Revocation, now_unix_secs: u64) -> bool {
    now_unix_secs >= revocation.expires_at_unix_secs
}

/// The longest that a policy may accept a token, from its `iat` to its `exp` with the leeways at both ends, in seconds.
#[must_use]
pub fn token_life_secs(policy: &Policy) -> u64 {
    let lives = policy.issuers.iter().map(|issuer| {
        issuer.max_token_lifetime.as_secs().saturating_add(issuer.leeway.as_secs().saturating_mul(2))
    });
    lives.max().unwrap_or(0)
}

#[cfg(test)]
pub(crate) mod tests;
