//! Revocations.

use super::{NameHash, Text, assert_layout};

/// [`Revocation::selectors`]: one token, by its fingerprint.
pub const REVOKE_TOKEN: u32 = 1;
/// Tokens of an issuer.
pub const REVOKE_ISSUER: u32 = 2;
/// Tokens of a subject.
pub const REVOKE_SUBJECT: u32 = 4;
/// Tokens of a client.
pub const REVOKE_CLIENT: u32 = 8;
/// Tokens for a server: they stay good elsewhere.
pub const REVOKE_SERVER: u32 = 16;
/// Tokens when this workload presents them.
pub const REVOKE_WORKLOAD: u32 = 32;

/// Tokens that are refused although issuer and policy would accept them: `REVOCATIONS`, a hash by number. Writer: the CLI.
/// Readers: daemon and CLI; no program reads it. Deleters: the CLI, when an operator takes it back; whoever writes next, when it
/// has ended. 16,384 entries, each of which ends with the last token that it can mean; when it is full nothing is dropped, and the
/// operator is told.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation {
    /// When the operator said it, in Unix seconds.
    pub revoked_at_unix_secs: u64,
    /// It means tokens whose `iat` is at most this, in Unix seconds, and those that have none. A fingerprint needs no such bound.
    pub issued_until_unix_secs: u64,
    /// When the last token that it means has ended, in Unix seconds.
    pub expires_at_unix_secs: u64,
    /// Keyed fingerprint of the token.
    pub fingerprint: [u8; 16],
    /// Hash of the issuer's identifier or of its name in the policy.
    pub issuer_hash: NameHash,
    /// Hash of the subject.
    pub subject_hash: NameHash,
    /// Hash of the client's id.
    pub client_hash: NameHash,
    /// Hash of the server's name.
    pub server_hash: NameHash,
    /// Hash of the workload's name.
    pub workload_hash: NameHash,
    /// `REVOKE_*` bits: what a token must match, all of it. None: every token.
    pub selectors: u32,
    /// 1: `expires_at_unix_secs` is the token's own end and the largest leeway that a policy can give; 0: it follows from the longest life that policy allows a token.
    pub exact_end: u32,
    /// Beginning of the issuer, for people; as the following.
    pub issuer: Text<96>,
    /// Beginning of the subject.
    pub subject: Text<128>,
    /// Beginning of the client's id.
    pub client_id: Text<80>,
    /// Name of the server.
    pub server: Text<64>,
    /// Beginning of the workload's name.
    pub workload: Text<128>,
}
assert_layout!(Revocation, 624, [
    revoked_at_unix_secs: u64, issued_until_unix_secs: u64, expires_at_unix_secs: u64, fingerprint: [u8; 16],
    issuer_hash: NameHash, subject_hash: NameHash, client_hash: NameHash, server_hash: NameHash, workload_hash: NameHash, selectors: u32,
    exact_end: u32, issuer: Text<96>, subject: Text<128>, client_id: Text<80>, server: Text<64>,
    workload: Text<128>,
]);

/// Size of `REVOCATIONS`.
pub const MAX_REVOCATIONS: u32 = 16_384;

/// Index in `REVOCATION_STATE`, an array of words: moves with each change of `REVOCATIONS`, after the change itself and before
/// grants are revoked. Writer: who writes `REVOCATIONS`. The daemon reads it before and after it gives a grant.
pub const REVOCATION_EPOCH: u32 = 0;
/// The number of the next revocation. Writer: the CLI.
pub const REVOCATION_NEXT_ID: u32 = 1;
/// The longest that a token may be accepted, from its `iat` to its `exp` and the leeways at both ends, in seconds, by the policy.
/// Writer: the daemon.
pub const REVOCATION_TOKEN_LIFE_SECS: u32 = 2;
/// Slots of `GRANTS` that were ever used: those below this one. Writer: the daemon.
pub const REVOCATION_GRANT_SLOTS: u32 = 3;
/// Size of `REVOCATION_STATE`.
pub const REVOCATION_WORDS: u32 = 4;
