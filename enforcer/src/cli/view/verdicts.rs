//! Verdicts.

use std::collections::BTreeMap;

use enforcer_common::abi::{
    Config, Grant, HeadDigest, ServerLabel, VERDICT_ALLOW, VERDICT_DENY, VERDICT_PUBLIC, Verdict,
};
use enforcer_common::verdict::{Known, judge};
use serde::Serialize;

use super::servers::name;
use crate::cli::format::{NONE, digest_fingerprint, remaining, remaining_secs};
use crate::cli::output::{Render, table};

#[derive(Debug, Serialize)]
pub(super) struct Verdicts {
    /// By server, then fingerprint.
    verdicts: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    /// Stands for the head's digest.
    fingerprint: String,
    kind: &'static str,
    server_id: u32,
    server: String,
    head_bytes: u32,
    /// Absent unless the verdict allows by a grant.
    grant_serial: Option<u64>,
    /// Until the verdict's own deadline; negative when it is past.
    expires_in_s: i64,
    state: &'static str,
}

/// Slot of the grant by which a verdict allows.
pub(super) fn grant_slot(verdict: &Verdict) -> Option<u32> {
    (verdict.kind == VERDICT_ALLOW).then_some(verdict.index)
}

impl Verdicts {
    pub(super) fn of(
        verdicts: &BTreeMap<HeadDigest, Verdict>,
        grants: &BTreeMap<u32, Grant>,
        servers: &BTreeMap<u32, ServerLabel>,
        config: &Config,
        now_ns: u64,
    ) -> Self {
        let row = |(head, verdict): (&HeadDigest, &Verdict)| Row {
            fingerprint: digest_fingerprint(head),
            kind: kind(verdict.kind),
            server_id: verdict.server_id,
            server: name(servers, verdict.server_id),
            head_bytes: verdict.head_bytes,
            grant_serial: grant_slot(verdict).map(|_| verdict.grant_serial),
            expires_in_s: remaining_secs(verdict.deadline_ns, now_ns),
            state: state(verdict, grant_slot(verdict).and_then(|slot| grants.get(&slot)), config, now_ns),
        };
        let mut rows: Vec<_> = verdicts.iter().map(row).collect();
        rows.sort_by(|a, b| (a.server_id, &a.fingerprint).cmp(&(b.server_id, &b.fingerprint)));
        Self { verdicts: rows }
    }
}

fn kind(kind: u32) -> &'static str {
    match kind {
        VERDICT_ALLOW => "allow",
        VERDICT_DENY => "deny",
        VERDICT_PUBLIC => "public",
        _ => "unknown",
    }
}

/// What the kernel itself would make of it, with the reason if it would ask the daemon.
fn state(verdict: &Verdict, grant: Option<&Grant>, config: &Config, now_ns: u64) -> &'static str {
    match judge(verdict, grant, config, now_ns) {
        Known::Allow(_) | Known::Deny(_) => "current",
        Known::Stale(_) if verdict.generation != config.generation => "other-generation",
        Known::Stale(_) if now_ns >= verdict.deadline_ns => "expired",
        Known::Stale(_) => match grant {
            Some(grant) if grant.serial == verdict.grant_serial => "grant-void",
            _ if verdict.kind == VERDICT_ALLOW => "grant-gone",
            _ => "void",
        },
    }
}

impl Render for Verdicts {
    fn text(&self) -> String {
        let rows = self.verdicts.iter().map(|row| {
            [
                row.fingerprint.clone(),
                row.kind.to_owned(),
                row.server.clone(),
                row.head_bytes.to_string(),
                row.grant_serial.map_or_else(|| NONE.to_owned(), |serial| serial.to_string()),
                remaining(row.expires_in_s),
                row.state.to_owned(),
            ]
        });
        table(["HEAD", "KIND", "SERVER", "BYTES", "GRANT", "EXPIRES IN", "STATE"], rows)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW_NS, config, grant, server, verdict};
    use super::*;

    fn states(verdict: Verdict, grant: Option<Grant>) -> &'static str {
        state(&verdict, grant.as_ref(), &config(), NOW_NS)
    }

    #[test]
    fn staleness_has_a_reason() {
        assert_eq!(states(verdict(7), Some(grant(7))), "current");
        assert_eq!(states(verdict(7), Some(Grant { revoked: 1, ..grant(7) })), "grant-void");
        assert_eq!(states(verdict(7), Some(grant(8))), "grant-gone");
        assert_eq!(states(verdict(7), None), "grant-gone");
        assert_eq!(states(Verdict { generation: 2, ..verdict(7) }, Some(grant(7))), "other-generation");
        assert_eq!(states(Verdict { deadline_ns: NOW_NS, ..verdict(7) }, Some(grant(7))), "expired");
        assert_eq!(states(Verdict { kind: VERDICT_DENY, ..verdict(0) }, None), "current");
        assert_eq!(states(Verdict { kind: VERDICT_PUBLIC, ..verdict(0) }, None), "current");
        assert_eq!(states(Verdict { kind: 9, ..verdict(0) }, None), "void");
    }

    #[test]
    fn rows_are_in_a_stable_order_and_never_show_a_digest() {
        let head = |lo| HeadDigest { lo, hi: 0xdead_beef_dead_beef };
        let verdicts = BTreeMap::from([
            (head(1), Verdict { server_id: 1, ..verdict(7) }),
            (head(2), Verdict { kind: VERDICT_DENY, ..verdict(0) }),
            (head(3), verdict(7)),
        ]);
        let grants = BTreeMap::from([(4, grant(7))]);
        let servers = BTreeMap::from([(0, server("files", ""))]);
        let shown = Verdicts::of(&verdicts, &grants, &servers, &config(), NOW_NS);
        let text = shown.text();
        assert!(!text.contains("deadbeef") && !text.contains("efbeadde"), "{text}");
        let servers: Vec<_> = shown.verdicts.iter().map(|row| row.server.as_str()).collect();
        assert_eq!(servers, ["files", "files", "#1"]);
        assert!(shown.verdicts[0].fingerprint < shown.verdicts[1].fingerprint);
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["verdicts"][2]["grant_serial"], 7);
        assert_eq!(json["verdicts"][2]["expires_in_s"], 60);
        assert_eq!(json["verdicts"][2]["state"], "current");
    }
}
