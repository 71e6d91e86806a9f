//! How the file of revocations is written.

use enforcer_common::abi::{
    NameHash, REVOKE_CLIENT, REVOKE_ISSUER, REVOKE_SERVER, REVOKE_SUBJECT, REVOKE_TOKEN, REVOKE_WORKLOAD,
    Revocation, Text, text, text_str,
};
use serde::{Deserialize, Serialize};

use super::Recorded;
use crate::policy::MAX_LEEWAY_SECS;

const VERSION: u32 = 2;
/// Where a token's own end had the leeway of the policy at the time, and not the largest that any policy can have.
const FIRST_VERSION: u32 = 1;

/// The whole file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    version: u32,
    next_id: u64,
    token_life_s: u64,
    revocations: Vec<Row>,
}

impl Document {
    pub(super) fn of(recorded: &Recorded) -> Self {
        Self {
            version: VERSION,
            next_id: recorded.next_id,
            token_life_s: recorded.token_life_secs,
            revocations: recorded.revocations.iter().map(|(id, entry)| Row::of(*id, entry)).collect(),
        }
    }

    /// What it records, or what is wrong with it.
    pub(super) fn recorded(&self) -> Result<Recorded, String> {
        if !(FIRST_VERSION..=VERSION).contains(&self.version) {
            return Err(format!("version {}, where {VERSION} is known", self.version));
        }
        let revocations = self.revocations.iter().map(|row| {
            let mut revocation = row.revocation()?;
            if self.version == FIRST_VERSION && row.exact_end {
                let end = &mut revocation.expires_at_unix_secs;
                *end = end.saturating_add(MAX_LEEWAY_SECS);
            }
            Some((row.id, revocation))
        });
        let revocations = revocations.collect::<Option<_>>().ok_or("a hash is not hexadecimal")?;
        Ok(Recorded { next_id: self.next_id, token_life_secs: self.token_life_s, revocations })
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    id: u64,
    revoked_at_unix_s: u64,
    issued_until_unix_s: u64,
    expires_at_unix_s: u64,
    exact_end: bool,
    /// What a token must match; a row without any means every token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_fingerprint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    issuer: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_id: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    server: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workload: Option<Name>,
}

/// A name that a token must have: its hash decides, its beginning is for people.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    sha256_128: String,
    begins: String,
}

impl Row {
    fn of(id: u64, entry: &Revocation) -> Self {
        let asks = |selector| entry.selectors & selector != 0;
        let name = |selector, hash: &NameHash, begins: &[u8]| {
            asks(selector).then(|| Name { sha256_128: hex(hash), begins: text_str(begins).to_owned() })
        };
        Self {
            id,
            revoked_at_unix_s: entry.revoked_at_unix_secs,
            issued_until_unix_s: entry.issued_until_unix_secs,
            expires_at_unix_s: entry.expires_at_unix_secs,
            exact_end: entry.exact_end != 0,
            token_fingerprint: asks(REVOKE_TOKEN).then(|| hex(&entry.fingerprint)),
            issuer: name(REVOKE_ISSUER, &entry.issuer_hash, &entry.issuer),
            subject: name(REVOKE_SUBJECT, &entry.subject_hash, &entry.subject),
            client_id: name(REVOKE_CLIENT, &entry.client_hash, &entry.client_id),
            server: name(REVOKE_SERVER, &entry.server_hash, &entry.server),
            workload: name(REVOKE_WORKLOAD, &entry.workload_hash, &entry.workload),
        }
    }

    fn revocation(&self) -> Option<Revocation> {
        let mut selectors = 0;
        let mut hash = |selector, name: &Option<Name>| match name {
            Some(name) => {
                selectors |= selector;
                parse_hex(&name.sha256_128)
            }
            None => Some(NameHash::default()),
        };
        let issuer_hash = hash(REVOKE_ISSUER, &self.issuer)?;
        let subject_hash = hash(REVOKE_SUBJECT, &self.subject)?;
        let client_hash = hash(REVOKE_CLIENT, &self.client_id)?;
        let server_hash = hash(REVOKE_SERVER, &self.server)?;
        let workload_hash = hash(REVOKE_WORKLOAD, &self.workload)?;
        let fingerprint = match &self.token_fingerprint {
            Some(shown) => {
                selectors |= REVOKE_TOKEN;
                parse_hex(shown)?
            }
            None => [0; 16],
        };
        Some(Revocation {
            revoked_at_unix_secs: self.revoked_at_unix_s,
            issued_until_unix_secs: self.issued_until_unix_s,
            expires_at_unix_secs: self.expires_at_unix_s,
            fingerprint,
            issuer_hash,
            subject_hash,
            client_hash,
            server_hash,
            workload_hash,
            selectors,
            exact_end: u32::from(self.exact_end),
            issuer: begins(&self.issuer),
            subject: begins(&self.subject),
            client_id: begins(&self.client_id),
            server: begins(&self.server),
            workload: begins(&self.workload),
        })
    }
}

fn begins<const N: usize>(name: &Option<Name>) -> Text<N> {
    text(name.as_ref().map(|name| name.begins.as_str()).unwrap_or_default())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 32 hexadecimal digits: a hash, or a fingerprint as it is shown.
#[must_use]
pub fn parse_hex(shown: &str) -> Option<[u8; 16]> {
    if shown.len() != 32 || !shown.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(shown, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_as_they_are_shown() {
        let fingerprint = crate::token::Fingerprint([0x0a; 16]);
        assert_eq!(parse_hex(&fingerprint.to_string()), Some([0x0a; 16]));
        for wrong in ["", "0a", &"g".repeat(32), &"+".repeat(32), &"a".repeat(33)] {
            assert_eq!(parse_hex(wrong), None, "{wrong}");
        }
    }
}
