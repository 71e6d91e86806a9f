//! Flows.

use std::collections::BTreeMap;
use std::sync::Arc;

use enforcer_common::abi::{
    Endpoint, EndpointKey, FLOW_OBSERVE, Flow, Grant, GrantLabel, ServerLabel, grant_slot, text_str,
};
use enforcer_common::flow::Ctl;
use serde::Serialize;

use super::servers::names_by_endpoint;
use super::unguarded::Connection;
use crate::cli::format::{NONE, age_ms, duration, ip, or_none, socket};
use crate::cli::output::{Render, table};
use crate::workload::{Workload, comm};

/// Everything that rows are made of.
pub(super) struct Source {
    pub(super) flows: BTreeMap<u64, Flow>,
    pub(super) grants: BTreeMap<u32, Grant>,
    pub(super) labels: BTreeMap<u32, GrantLabel>,
    pub(super) servers: BTreeMap<u32, ServerLabel>,
    pub(super) endpoints: BTreeMap<EndpointKey, Endpoint>,
    pub(super) unguarded: Vec<Connection>,
    /// Of the callers' cgroups.
    pub(super) workloads: BTreeMap<u64, Arc<Workload>>,
    /// Names of the callers' users.
    pub(super) users: BTreeMap<u32, String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Flows {
    /// Oldest first.
    flows: Vec<Row>,
    /// Connections to protected endpoints that have no flow record: from before the enforcement.
    unguarded: Vec<Connection>,
}

#[derive(Debug, Serialize)]
struct Row {
    cookie: u64,
    netns_cookie: u64,
    client_address: String,
    server_address: String,
    /// The process that connected. Absent: it is on another host, or not known.
    caller: Option<CallerRow>,
    /// What is said in place of a caller.
    #[serde(skip)]
    stranger: &'static str,
    endpoint_id: u32,
    /// Servers on this endpoint.
    servers: Vec<String>,
    state: &'static str,
    mode: &'static str,
    age_ms: u64,
    /// Since the last request head; absent before the first.
    idle_ms: Option<u64>,
    requests: u64,
    allowed: u64,
    refused: u64,
    punts: u64,
    punted_bytes: u64,
    /// The grant that the last request used. Absent if there is none, or it is gone.
    last_grant: Option<LastGrant>,
}

/// A process, as it was when it connected.
#[derive(Debug, Serialize)]
struct CallerRow {
    workload: Arc<Workload>,
    /// The workload's name for people, and what that was read from.
    name: String,
    source: &'static str,
    pid: u32,
    uid: u32,
    /// Absent: this system does not know the user.
    user: Option<String>,
    comm: String,
    netns_cookie: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct LastGrant {
    serial: u64,
    issuer: String,
    subject: String,
    client_id: Option<String>,
}

/// Slot of the grant that a flow's last request used.
pub(super) fn last_grant_slot(flow: &Flow) -> Option<u32> {
    (flow.grants[0] != 0).then(|| grant_slot(flow.grants[0]))
}

impl Flows {
    pub(super) fn of(source: Source, now_ns: u64) -> Self {
        let names = names_by_endpoint(&source.servers, &source.endpoints);
        let mut flows: Vec<_> = source.flows.iter().collect();
        flows.sort_by_key(|(cookie, flow)| (flow.opened_ns, **cookie));
        let row = |(&cookie, flow): (&u64, &Flow)| Row {
            cookie,
            netns_cookie: flow.netns_cookie,
            client_address: socket(&flow.peer),
            server_address: socket(&flow.local),
            caller: caller(&source, flow),
            // From a loopback address it is on this host, but nothing more is known.
            stranger: if ip(&flow.peer).is_loopback() { "unknown" } else { "address-only" },
            endpoint_id: flow.endpoint_id,
            servers: names.get(&flow.endpoint_id).cloned().unwrap_or_default(),
            state: Ctl(flow.ctl).state_name(),
            mode: if flow.flags & FLOW_OBSERVE != 0 { "observe" } else { "enforce" },
            age_ms: age_ms(flow.opened_ns, now_ns),
            idle_ms: (flow.last_request_ns != 0).then(|| age_ms(flow.last_request_ns, now_ns)),
            requests: flow.requests,
            allowed: flow.allowed,
            refused: flow.refused,
            punts: flow.punts,
            punted_bytes: flow.punted_bytes,
            last_grant: last_grant(&source, flow),
        };
        Self { flows: flows.into_iter().map(row).collect(), unguarded: source.unguarded }
    }
}

fn caller(source: &Source, flow: &Flow) -> Option<CallerRow> {
    let workload = Arc::clone(source.workloads.get(&flow.caller.cgroup_id)?);
    Some(CallerRow {
        name: workload.name(),
        source: workload.source(),
        workload,
        pid: flow.caller.pid,
        uid: flow.caller.uid,
        user: source.users.get(&flow.caller.uid).cloned(),
        comm: comm(&flow.caller),
        netns_cookie: flow.caller.netns_cookie,
    })
}

fn last_grant(source: &Source, flow: &Flow) -> Option<LastGrant> {
    let slot = last_grant_slot(flow)?;
    let grant = source.grants.get(&slot).filter(|grant| grant.serial == flow.grants[0])?;
    let label = source.labels.get(&slot)?;
    let client_id = text_str(&label.client_id);
    Some(LastGrant {
        serial: grant.serial,
        issuer: text_str(&label.issuer).to_owned(),
        subject: text_str(&label.subject).to_owned(),
        client_id: (!client_id.is_empty()).then(|| client_id.to_owned()),
    })
}

impl CallerRow {
    /// `curl[4711]:www-data`.
    fn process(&self) -> String {
        let user = self.user.clone().unwrap_or_else(|| self.uid.to_string());
        format!("{}[{}]:{user}", self.comm, self.pid)
    }
}

impl Render for Flows {
    fn text(&self) -> String {
        let rows = self.flows.iter().map(|row| {
            let grant = row.last_grant.as_ref();
            [
                row.cookie.to_string(),
                row.client_address.clone(),
                row.caller.as_ref().map_or_else(|| row.stranger.to_owned(), |caller| caller.name.clone()),
                row.caller.as_ref().map_or_else(|| NONE.to_owned(), CallerRow::process),
                row.server_address.clone(),
                or_none(&row.servers.join(",")),
                row.state.to_owned(),
                row.mode.to_owned(),
                duration(row.age_ms),
                row.idle_ms.map_or_else(|| NONE.to_owned(), duration),
                row.requests.to_string(),
                row.allowed.to_string(),
                row.refused.to_string(),
                row.punts.to_string(),
                grant.map_or_else(|| NONE.to_owned(), |grant| or_none(&grant.subject)),
                grant.and_then(|grant| grant.client_id.clone()).unwrap_or_else(|| NONE.to_owned()),
            ]
        });
        let unguarded = self.unguarded.iter().map(|found| {
            let mut row = [NONE; 16].map(str::to_owned);
            row[0] = found.cookie.to_string();
            row[1].clone_from(&found.client_address);
            row[4].clone_from(&found.server_address);
            "UNGUARDED".clone_into(&mut row[6]);
            row
        });
        let header = [
            "COOKIE",
            "CLIENT",
            "WORKLOAD",
            "PROCESS",
            "SERVER",
            "NAME",
            "STATE",
            "MODE",
            "AGE",
            "IDLE",
            "REQUESTS",
            "ALLOWED",
            "REFUSED",
            "PUNTS",
            "LAST SUBJECT",
            "LAST CLIENT ID",
        ];
        table(header, rows.chain(unguarded))
    }
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::{Caller, grant_serial, text};
    use enforcer_common::flow::State;

    use super::super::testing::{endpoint, flow, grant, label, server, v4, workload};
    use super::*;

    fn source() -> Source {
        let key = v4([127, 0, 0, 1], 80);
        let young = Flow { opened_ns: 2_000_000_000, flags: FLOW_OBSERVE, ..flow(0) };
        let old = Flow {
            ctl: Ctl::new(State::Punted, 3, 7).0,
            opened_ns: 1_000_000_000,
            last_request_ns: 3_000_000_000,
            requests: 5,
            allowed: 3,
            refused: 1,
            punts: 1,
            grants: [grant_serial(77, 4), 0, 0, 0],
            caller: Caller { cgroup_id: 7, pid: 4711, uid: 33, comm: text("agent"), ..Caller::UNKNOWN },
            ..flow(0)
        };
        Source {
            flows: BTreeMap::from([(1, young), (9, old), (4, Flow { opened_ns: 2_000_000_000, ..flow(8) })]),
            grants: BTreeMap::from([(4, grant(grant_serial(77, 4)))]),
            labels: BTreeMap::from([(4, label(grant_serial(77, 4), "alice", ""))]),
            servers: BTreeMap::from([(0, server("files", "127.0.0.1:80"))]),
            endpoints: BTreeMap::from([endpoint(key, 0)]),
            unguarded: Vec::new(),
            workloads: BTreeMap::from([(7, workload(7, "/system.slice/agent.service"))]),
            users: BTreeMap::from([(33, "www-data".to_owned())]),
        }
    }

    #[test]
    fn connections_without_a_record_come_last() {
        let unguarded = Connection {
            cookie: 77,
            netns_cookie: 1,
            client_address: "192.0.2.9:1".into(),
            server_address: "127.0.0.1:80".into(),
        };
        let flows = Flows::of(Source { unguarded: vec![unguarded], ..source() }, 64_000_000_000);
        let text = flows.text();
        let last: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(last[..8], ["77", "192.0.2.9:1", "-", "-", "127.0.0.1:80", "-", "UNGUARDED", "-"]);
        assert_eq!(serde_json::to_value(&flows).unwrap()["unguarded"][0]["cookie"], 77);
    }

    #[test]
    fn oldest_first_then_by_cookie() {
        let flows = Flows::of(source(), 64_000_000_000);
        assert_eq!(flows.flows.iter().map(|row| row.cookie).collect::<Vec<_>>(), [9, 1, 4]);
        let lines: Vec<Vec<String>> = flows
            .text()
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect();
        assert_eq!(
            lines[0],
            [
                "9",
                "192.0.2.7:5555",
                "agent.service",
                "agent[4711]:www-data",
                "127.0.0.1:80",
                "files",
                "punted",
                "enforce",
                "1m03s",
                "1m01s",
                "5",
                "3",
                "1",
                "1",
                "alice",
                "-"
            ]
        );
        assert_eq!(
            lines[1][2..10],
            ["address-only", "-", "127.0.0.1:80", "files", "head", "observe", "1m02s", "-"]
        );
        // An endpoint that nobody names any more.
        assert_eq!(lines[2][5], "-");
    }

    #[test]
    fn json_names_units_and_says_null_for_nothing() {
        let json = serde_json::to_value(Flows::of(source(), 64_000_000_000)).unwrap();
        let (old, young) = (&json["flows"][0], &json["flows"][1]);
        assert_eq!(old["age_ms"], 63_000);
        assert_eq!(old["caller"]["workload"]["unit"], "agent.service");
        assert_eq!(old["caller"]["workload"]["cgroup_path"], "/system.slice/agent.service");
        assert_eq!(old["caller"]["user"], "www-data");
        assert_eq!(young["caller"], serde_json::Value::Null);
        assert_eq!(old["last_grant"]["serial"], grant_serial(77, 4));
        assert_eq!(old["last_grant"]["client_id"], serde_json::Value::Null);
        assert_eq!(young["last_grant"], serde_json::Value::Null);
        assert_eq!(young["idle_ms"], serde_json::Value::Null);
    }

    #[test]
    fn a_grant_that_is_gone_is_not_shown() {
        let mut source = source();
        source.labels.clear();
        let json = serde_json::to_value(Flows::of(source, 0)).unwrap();
        assert_eq!(json["flows"][0]["last_grant"], serde_json::Value::Null);
    }
}
