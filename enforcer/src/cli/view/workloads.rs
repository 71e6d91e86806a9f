//! Workloads: who has connections open.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use enforcer_common::abi::{Endpoint, EndpointKey, Flow, ServerLabel};
use serde::Serialize;

use super::servers::names_by_endpoint;
use crate::cli::format::or_none;
use crate::cli::output::{Render, table};
use crate::workload::Workload;

#[derive(Debug, Serialize)]
pub(super) struct View {
    /// By name, then by cgroup.
    workloads: Vec<Row>,
    /// Connections of callers on other hosts, or that are not known.
    unknown: Totals,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// What the name was read from: `pod`, `container`, `unit`, `path`, or `gone`.
    source: &'static str,
    #[serde(flatten)]
    workload: Arc<Workload>,
    users: BTreeSet<String>,
    servers: BTreeSet<String>,
    #[serde(flatten)]
    totals: Totals,
}

/// Of the connections that are open now.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Totals {
    flows: u64,
    requests: u64,
    allowed: u64,
    refused: u64,
}

impl Totals {
    const fn add(&mut self, flow: &Flow) {
        self.flows += 1;
        self.requests += flow.requests;
        self.allowed += flow.allowed;
        self.refused += flow.refused;
    }
}

impl View {
    pub(super) fn of<'a>(
        flows: impl Iterator<Item = &'a Flow>,
        workloads: &BTreeMap<u64, Arc<Workload>>,
        users: &BTreeMap<u32, String>,
        servers: &BTreeMap<u32, ServerLabel>,
        endpoints: &BTreeMap<EndpointKey, Endpoint>,
    ) -> Self {
        let names = names_by_endpoint(servers, endpoints);
        let mut rows: BTreeMap<u64, Row> = BTreeMap::new();
        let mut unknown = Totals::default();
        for flow in flows {
            let Some(workload) = workloads.get(&flow.caller.cgroup_id) else {
                unknown.add(flow);
                continue;
            };
            let row = rows.entry(workload.cgroup_id).or_insert_with(|| Row {
                name: workload.name(),
                source: workload.source(),
                workload: Arc::clone(workload),
                users: BTreeSet::new(),
                servers: BTreeSet::new(),
                totals: Totals::default(),
            });
            let uid = flow.caller.uid;
            row.users.insert(users.get(&uid).cloned().unwrap_or_else(|| uid.to_string()));
            row.servers.extend(names.get(&flow.endpoint_id).into_iter().flatten().cloned());
            row.totals.add(flow);
        }
        let mut workloads: Vec<Row> = rows.into_values().collect();
        workloads.sort_by(|a, b| a.name.cmp(&b.name).then(a.workload.cgroup_id.cmp(&b.workload.cgroup_id)));
        Self { workloads, unknown }
    }
}

impl Render for View {
    fn text(&self) -> String {
        let joined = |set: &BTreeSet<String>| or_none(&set.iter().cloned().collect::<Vec<_>>().join(","));
        let row = |name: &str, source: &str, users: String, servers: String, totals: &Totals, path: &str| {
            [
                name.to_owned(),
                source.to_owned(),
                users,
                servers,
                totals.flows.to_string(),
                totals.requests.to_string(),
                totals.allowed.to_string(),
                totals.refused.to_string(),
                or_none(path),
            ]
        };
        let rows = self.workloads.iter().map(|of| {
            let path = of.workload.cgroup_path.as_deref().unwrap_or_default();
            row(&of.name, of.source, joined(&of.users), joined(&of.servers), &of.totals, path)
        });
        let unknown = (self.unknown.flows > 0)
            .then(|| row("(unknown)", "-", or_none(""), or_none(""), &self.unknown, ""));
        let header =
            ["WORKLOAD", "FROM", "USERS", "SERVERS", "FLOWS", "REQUESTS", "ALLOWED", "REFUSED", "CGROUP"];
        table(header, rows.chain(unknown))
    }
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::Caller;

    use super::super::testing::{endpoint, flow, server, v4, workload};
    use super::*;

    #[test]
    fn connections_are_summed_by_cgroup_and_strangers_come_last() {
        let of = |cgroup_id, uid, requests| Flow {
            requests,
            allowed: requests,
            caller: Caller { cgroup_id, uid, ..Caller::UNKNOWN },
            ..flow(0)
        };
        let flows = [of(7, 33, 2), of(0, 0, 1), of(9, 1000, 1), of(7, 0, 3)];
        let workloads = BTreeMap::from([
            (7, workload(7, "/system.slice/zeta.service")),
            (9, workload(9, "/made/by hand")),
        ]);
        let users = BTreeMap::from([(0, "root".to_owned()), (33, "www-data".to_owned())]);
        let servers = BTreeMap::from([(0, server("files", "127.0.0.1:80"))]);
        let endpoints = BTreeMap::from([endpoint(v4([127, 0, 0, 1], 80), 0)]);
        let view = View::of(flows.iter(), &workloads, &users, &servers, &endpoints);
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["workloads"][0]["cgroup_path"], "/made/by hand");
        assert_eq!(json["workloads"][1]["unit"], "zeta.service");
        assert_eq!(json["workloads"][1]["requests"], 5);
        assert_eq!(json["workloads"][1]["users"], serde_json::json!(["root", "www-data"]));
        assert_eq!(json["unknown"]["flows"], 1);
        let text = view.text();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("/made/by hand") && lines[1].contains("1000"), "{text}");
        assert!(lines[2].starts_with("zeta.service") && lines[2].contains("root,www-data"), "{text}");
        assert!(lines[3].starts_with("(unknown)"), "{text}");
    }
}
