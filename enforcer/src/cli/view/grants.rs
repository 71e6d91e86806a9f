//! Grants.

use std::collections::BTreeMap;
use std::net::IpAddr;

use enforcer_common::abi::{Config, Grant, GrantLabel, ServerLabel, text_str};
use serde::Serialize;

use super::servers::name;
use crate::cli::format::{age_ms, duration, hex, or_none, remaining, remaining_secs};
use crate::cli::output::{Render, table};

#[derive(Debug, Serialize)]
pub(super) struct Grants {
    /// By serial number.
    grants: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    serial: u64,
    slot: u32,
    server_id: u32,
    server: String,
    issuer: String,
    subject: String,
    client_id: Option<String>,
    /// Who presents the token.
    caller: CallerRow,
    /// Keyed fingerprint of the token.
    token_fingerprint: String,
    state: &'static str,
    age_ms: u64,
    /// Until the kernel stops allowing by it; negative when that is past.
    expires_in_s: i64,
    /// The token's own `exp`.
    token_expires_at_unix_s: u64,
    requests: u64,
}

/// Who a grant is for: the kernel lets nobody else pass by it.
#[derive(Debug, Serialize)]
struct CallerRow {
    /// The workload; of a caller that is not known the address.
    name: String,
    address: IpAddr,
    /// Absent: the caller is on another host, or not known.
    cgroup_id: Option<u64>,
    uid: Option<u32>,
}

impl Grants {
    pub(super) fn of(
        grants: &BTreeMap<u32, Grant>,
        labels: &BTreeMap<u32, GrantLabel>,
        servers: &BTreeMap<u32, ServerLabel>,
        config: &Config,
        now_ns: u64,
    ) -> Self {
        let row = |(&slot, grant): (&u32, &Grant)| {
            let label = labels.get(&slot);
            let text = |of: fn(&GrantLabel) -> &[u8]| {
                label.map_or_else(String::new, |label| text_str(of(label)).to_owned())
            };
            let client_id = text(|label| &label.client_id);
            Row {
                serial: grant.serial,
                slot,
                server_id: grant.server_id,
                server: name(servers, grant.server_id),
                issuer: text(|label| &label.issuer),
                subject: text(|label| &label.subject),
                client_id: (!client_id.is_empty()).then_some(client_id),
                caller: CallerRow {
                    name: text(|label| &label.workload),
                    address: IpAddr::from(grant.caller.address()).to_canonical(),
                    cgroup_id: (grant.caller.cgroup_id() != 0).then(|| grant.caller.cgroup_id()),
                    uid: (grant.caller.cgroup_id() != 0).then(|| grant.caller.uid()),
                },
                token_fingerprint: hex(&grant.fingerprint),
                state: state(grant, config, now_ns),
                age_ms: age_ms(grant.granted_ns, now_ns),
                expires_in_s: remaining_secs(grant.deadline_ns, now_ns),
                token_expires_at_unix_s: grant.expires_at_unix_secs,
                requests: grant.requests,
            }
        };
        let mut rows: Vec<_> = grants.iter().map(row).collect();
        rows.sort_by_key(|row| row.serial);
        Self { grants: rows }
    }
}

fn state(grant: &Grant, config: &Config, now_ns: u64) -> &'static str {
    if grant.revoked != 0 {
        "revoked"
    } else if grant.generation != config.generation {
        "other-generation"
    } else if now_ns >= grant.deadline_ns {
        "expired"
    } else {
        "active"
    }
}

impl Render for Grants {
    fn text(&self) -> String {
        let rows = self.grants.iter().map(|row| {
            [
                row.serial.to_string(),
                row.server.clone(),
                or_none(&row.issuer),
                or_none(&row.subject),
                or_none(row.client_id.as_deref().unwrap_or_default()),
                or_none(&row.caller.name),
                row.token_fingerprint.clone(),
                row.state.to_owned(),
                duration(row.age_ms),
                remaining(row.expires_in_s),
                row.requests.to_string(),
            ]
        });
        let header = [
            "SERIAL",
            "SERVER",
            "ISSUER",
            "SUBJECT",
            "CLIENT ID",
            "WORKLOAD",
            "TOKEN",
            "STATE",
            "AGE",
            "EXPIRES IN",
            "REQUESTS",
        ];
        table(header, rows)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW_NS, config, grant, label, server};
    use super::*;

    #[test]
    fn states_are_told_apart() {
        let state = |grant: Grant| state(&grant, &config(), NOW_NS);
        assert_eq!(state(grant(1)), "active");
        assert_eq!(state(Grant { revoked: 1, deadline_ns: 0, ..grant(1) }), "revoked");
        assert_eq!(state(Grant { generation: 2, ..grant(1) }), "other-generation");
        assert_eq!(state(Grant { deadline_ns: NOW_NS, ..grant(1) }), "expired");
    }

    #[test]
    fn rows_are_by_serial_with_names_where_known() {
        let grants = BTreeMap::from([(0, grant(9)), (1, Grant { requests: 12, ..grant(3) })]);
        let labels = BTreeMap::from([(1, label(3, "alice", "cli"))]);
        let servers = BTreeMap::from([(0, server("files", ""))]);
        let shown = Grants::of(&grants, &labels, &servers, &config(), NOW_NS);
        assert_eq!(
            shown.text(),
            "SERIAL  SERVER  ISSUER  SUBJECT  CLIENT ID  WORKLOAD       TOKEN                             STATE   AGE  EXPIRES IN  REQUESTS\n\
             3       files   corp    alice    cli        agent.service  abababababababababababababababab  active  1s   1m00s       12\n\
             9       files   -       -        -          -              abababababababababababababababab  active  1s   1m00s       0\n"
        );
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["grants"][0]["slot"], 1);
        assert_eq!(json["grants"][0]["expires_in_s"], 60);
        assert_eq!(json["grants"][0]["token_expires_at_unix_s"], 1_800_000_000_u64);
        assert_eq!(json["grants"][1]["client_id"], serde_json::Value::Null);
    }
}
