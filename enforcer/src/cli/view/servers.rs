//! Servers, and which endpoints are theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use enforcer_common::abi::{Endpoint, EndpointKey, Flow, ServerLabel, text_str};
use serde::Serialize;

use crate::cli::format::ip;
use crate::cli::output::{Render, table};

#[derive(Debug, Serialize)]
pub(super) struct Servers {
    servers: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    id: u32,
    name: String,
    listen: Vec<String>,
    resource: String,
    path: String,
    /// Guarded connections to its endpoints; servers that share an endpoint share these.
    flows: usize,
}

impl Servers {
    pub(super) fn of<'a>(
        servers: &BTreeMap<u32, ServerLabel>,
        endpoints: &BTreeMap<EndpointKey, Endpoint>,
        flows: impl Iterator<Item = &'a Flow>,
    ) -> Self {
        let mut per_endpoint = BTreeMap::<u32, usize>::new();
        flows.for_each(|flow| *per_endpoint.entry(flow.endpoint_id).or_default() += 1);
        let row = |(&id, label): (&u32, &ServerLabel)| Row {
            id,
            name: text_str(&label.name).to_owned(),
            listen: listen(label).map(str::to_owned).collect(),
            resource: text_str(&label.resource).to_owned(),
            path: text_str(&label.path).to_owned(),
            flows: endpoint_ids(label, endpoints).iter().filter_map(|id| per_endpoint.get(id)).sum(),
        };
        Self { servers: servers.iter().map(row).collect() }
    }
}

impl Render for Servers {
    fn text(&self) -> String {
        let rows = self.servers.iter().map(|row| {
            [
                row.id.to_string(),
                row.name.clone(),
                row.listen.join(","),
                row.path.clone(),
                row.resource.clone(),
                row.flows.to_string(),
            ]
        });
        table(["ID", "NAME", "LISTEN", "PATH", "RESOURCE", "FLOWS"], rows)
    }
}

fn listen(label: &ServerLabel) -> impl Iterator<Item = &str> {
    text_str(&label.listen).split(',').map(str::trim).filter(|text| !text.is_empty())
}

/// The numbers of the endpoints that a server listens on. A label holds 192 bytes of addresses; of a server with more, the
/// last ones are not known here.
fn endpoint_ids(label: &ServerLabel, endpoints: &BTreeMap<EndpointKey, Endpoint>) -> BTreeSet<u32> {
    let listen: Vec<SocketAddr> = listen(label).filter_map(|text| text.parse().ok()).collect();
    let on = |key: &EndpointKey| listen.iter().any(|listen| covers(*listen, key));
    endpoints.iter().filter(|(key, _)| on(key)).map(|(_, endpoint)| endpoint.endpoint_id).collect()
}

/// `::` stands for every address of both families.
fn covers(listen: SocketAddr, key: &EndpointKey) -> bool {
    let address = ip(key);
    let both = match listen.ip() {
        IpAddr::V6(ip) => ip.is_unspecified() && address.is_unspecified(),
        IpAddr::V4(_) => false,
    };
    listen.port() == key.port && (listen.ip() == address || both)
}

/// Names of the servers on each endpoint, by the endpoint's number.
pub(super) fn names_by_endpoint(
    servers: &BTreeMap<u32, ServerLabel>,
    endpoints: &BTreeMap<EndpointKey, Endpoint>,
) -> BTreeMap<u32, Vec<String>> {
    let mut names = BTreeMap::<u32, Vec<String>>::new();
    for label in servers.values() {
        for id in endpoint_ids(label, endpoints) {
            names.entry(id).or_default().push(text_str(&label.name).to_owned());
        }
    }
    names
}

/// Name of a server, or its number if it is not known.
pub(super) fn name(servers: &BTreeMap<u32, ServerLabel>, id: u32) -> String {
    servers.get(&id).map_or_else(|| format!("#{id}"), |label| text_str(&label.name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{endpoint, flow, server, v4, v6};
    use super::*;

    #[test]
    fn flows_count_at_every_server_of_their_endpoint() {
        let servers = BTreeMap::from([
            (0, server("files", "127.0.0.1:80, [::1]:80")),
            (1, server("search", "[::]:90")),
            (2, server("more", "[::]:90")),
        ]);
        let endpoints = BTreeMap::from([
            endpoint(v4([127, 0, 0, 1], 80), 0),
            endpoint(v6([0, 0, 0, 0, 0, 0, 0, 1], 80), 1),
            endpoint(v4([0; 4], 90), 2),
            endpoint(v6([0; 8], 90), 2),
            endpoint(v4([127, 0, 0, 1], 91), 3),
        ]);
        let flows = [flow(0), flow(1), flow(2), flow(3)];
        let servers = Servers::of(&servers, &endpoints, flows.iter());
        assert_eq!(
            servers.text(),
            "ID  NAME    LISTEN                PATH  RESOURCE                 FLOWS\n\
             0   files   127.0.0.1:80,[::1]:80  /mcp  https://example.com/mcp  2\n\
             1   search  [::]:90               /mcp  https://example.com/mcp  1\n\
             2   more    [::]:90               /mcp  https://example.com/mcp  1\n"
                .replace("LISTEN                PATH", "LISTEN                 PATH")
                .replace("[::]:90               /mcp", "[::]:90                /mcp")
        );
        let json = serde_json::to_value(&servers).unwrap();
        assert_eq!(json["servers"][0]["listen"], serde_json::json!(["127.0.0.1:80", "[::1]:80"]));
    }

    #[test]
    fn an_unknown_server_is_shown_by_its_number() {
        assert_eq!(name(&BTreeMap::new(), 7), "#7");
    }
}
