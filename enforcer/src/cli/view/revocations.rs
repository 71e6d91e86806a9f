//! Revocations.

use enforcer_common::abi::{
    REVOKE_CLIENT, REVOKE_ISSUER, REVOKE_SERVER, REVOKE_SUBJECT, REVOKE_TOKEN, REVOKE_WORKLOAD, Revocation,
    text_str,
};
use serde::Serialize;

use crate::cli::format::{duration, hex};
use crate::cli::output::{Render, table};
use crate::revocation::{Revocations as All, is_over};

#[derive(Debug, Serialize)]
pub(super) struct Revocations {
    /// By number.
    revocations: Vec<Row>,
    capacity: u32,
}

#[derive(Debug, Serialize)]
struct Row {
    id: u64,
    /// What a token must match, as `selects` says it for people; all absent: every token.
    token_fingerprint: Option<String>,
    issuer: Option<String>,
    subject: Option<String>,
    client_id: Option<String>,
    server: Option<String>,
    workload: Option<String>,
    selects: String,
    revoked_at_unix_s: u64,
    age_s: u64,
    /// Only tokens with an `iat` up to this are meant; absent for a fingerprint.
    issued_until_unix_s: Option<u64>,
    ends_at_unix_s: u64,
    ends_in_s: u64,
}

/// The beginning of a name, if it is asked for.
fn name<'a>(entry: &Revocation, selector: u32, text: &'a [u8]) -> Option<&'a str> {
    (entry.selectors & selector != 0).then(|| text_str(text))
}

fn fingerprint(entry: &Revocation) -> Option<String> {
    (entry.selectors & REVOKE_TOKEN != 0).then(|| hex(&entry.fingerprint))
}

/// What a revocation means, in words.
pub(in crate::cli) fn selection(entry: &Revocation) -> String {
    let parts = [
        fingerprint(entry).map(|shown| format!("token {shown}")),
        name(entry, REVOKE_ISSUER, &entry.issuer).map(|name| format!("issuer {name}")),
        name(entry, REVOKE_SUBJECT, &entry.subject).map(|name| format!("subject {name}")),
        name(entry, REVOKE_CLIENT, &entry.client_id).map(|name| format!("client {name}")),
        name(entry, REVOKE_SERVER, &entry.server).map(|name| format!("server {name}")),
        name(entry, REVOKE_WORKLOAD, &entry.workload).map(|name| format!("workload {name}")),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "every token".to_owned() } else { parts.join(", ") }
}

impl Revocations {
    pub(super) fn of(all: &All, now_unix_secs: u64) -> Self {
        let row = |(&id, entry): (&u64, &Revocation)| {
            let owned = |selector, text| name(entry, selector, text).map(str::to_owned);
            Row {
                id,
                token_fingerprint: fingerprint(entry),
                issuer: owned(REVOKE_ISSUER, &entry.issuer),
                subject: owned(REVOKE_SUBJECT, &entry.subject),
                client_id: owned(REVOKE_CLIENT, &entry.client_id),
                server: owned(REVOKE_SERVER, &entry.server),
                workload: owned(REVOKE_WORKLOAD, &entry.workload),
                selects: selection(entry),
                revoked_at_unix_s: entry.revoked_at_unix_secs,
                age_s: now_unix_secs.saturating_sub(entry.revoked_at_unix_secs),
                issued_until_unix_s: (entry.selectors & REVOKE_TOKEN == 0)
                    .then_some(entry.issued_until_unix_secs),
                ends_at_unix_s: entry.expires_at_unix_secs,
                ends_in_s: entry.expires_at_unix_secs.saturating_sub(now_unix_secs),
            }
        };
        let rows = all.iter().filter(|(_, entry)| !is_over(entry, now_unix_secs)).map(row).collect();
        Self { revocations: rows, capacity: enforcer_common::abi::MAX_REVOCATIONS }
    }
}

impl Render for Revocations {
    fn text(&self) -> String {
        let rows = self.revocations.iter().map(|row| {
            [
                row.id.to_string(),
                row.selects.clone(),
                duration(row.age_s.saturating_mul(1000)),
                duration(row.ends_in_s.saturating_mul(1000)),
            ]
        });
        table(["ID", "TOKENS", "AGE", "ENDS IN"], rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::revocation::tests::revocation;

    #[test]
    fn what_stands_is_shown_and_what_is_over_is_not() {
        let all = [
            (2, revocation(REVOKE_ISSUER | REVOKE_SUBJECT)),
            (3, revocation(REVOKE_TOKEN)),
            (5, revocation(0)),
            (7, Revocation { expires_at_unix_secs: 1_010, ..revocation(REVOKE_CLIENT | REVOKE_SERVER) }),
        ];
        let shown = Revocations::of(&all.into(), 1_010);
        assert_eq!(
            shown.text(),
            "ID  TOKENS                                           AGE  ENDS IN\n\
             2   issuer https://login.example.com, subject alice  10s  1m30s\n\
             3   token 07070707070707070707070707070707           10s  1m30s\n\
             5   every token                                      10s  1m30s\n"
        );
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["revocations"][0]["subject"], "alice");
        assert_eq!(json["revocations"][0]["token_fingerprint"], serde_json::Value::Null);
        assert_eq!(json["revocations"][1]["issued_until_unix_s"], serde_json::Value::Null);
        assert_eq!(json["revocations"][2]["issued_until_unix_s"], 1_000);
    }
}
