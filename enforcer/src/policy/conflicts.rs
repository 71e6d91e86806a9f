//! Checks that compare the servers of a policy with each other.

use std::collections::{HashMap, HashSet};

use super::Listen;
use super::error::{Defect, Overlap};
use super::fields::Report;
use super::path::path_contains;
use super::resource::parse_resource;
use super::server::{Draft, Placed};
use super::sharing::METADATA_PREFIX;

pub(super) fn check(report: &mut Report, servers: &[Draft]) {
    names(report, servers);
    for pair in sharing_pairs(servers) {
        paths(report, &pair);
        public_paths(report, pair.first, pair.second);
        public_paths(report, pair.second, pair.first);
        shared_public_paths(report, &pair);
        metadata(report, &pair);
    }
}

fn names(report: &mut Report, servers: &[Draft]) {
    let mut seen: HashMap<&str, u64> = HashMap::new();
    for name in servers.iter().filter_map(|s| s.name.as_ref()) {
        if let Some(&first_line) = seen.get(name.value.as_str()) {
            let value = name.value.clone();
            report.error(
                name.at,
                name.field.clone(),
                Defect::DuplicateServerName { name: value, first_line },
            );
        } else {
            seen.insert(&name.value, name.at.line);
        }
    }
}

/// Two servers on which the same connection can arrive.
struct Pair<'d> {
    first: &'d Draft,
    second: &'d Draft,
    /// The overlapping endpoints.
    first_listen: &'d Placed<Listen>,
    second_listen: &'d Placed<Listen>,
}

/// Each pair of servers once, in file order. Only endpoints with equal ports are compared.
fn sharing_pairs(servers: &[Draft]) -> Vec<Pair<'_>> {
    let mut by_port: HashMap<u16, Vec<(usize, &Placed<Listen>)>> = HashMap::new();
    let mut seen = HashSet::new();
    let mut pairs = Vec::new();
    for (i, second) in servers.iter().enumerate() {
        for second_listen in &second.listen {
            let same_port = by_port.entry(second_listen.value.port).or_default();
            for &(j, first_listen) in &*same_port {
                if i != j && second_listen.value.overlaps(&first_listen.value) && seen.insert((j, i)) {
                    pairs.extend(servers.get(j).map(|first| Pair {
                        first,
                        second,
                        first_listen,
                        second_listen,
                    }));
                }
            }
            same_port.push((i, second_listen));
        }
    }
    pairs
}

fn label(server: &Draft) -> String {
    server.name.as_ref().map_or_else(|| "(unnamed)".to_owned(), |n| n.value.clone())
}

fn paths(report: &mut Report, pair: &Pair<'_>) {
    let (Some(first), Some(second)) = (&pair.first.path, &pair.second.path) else { return };
    if path_contains(&first.value, &second.value) || path_contains(&second.value, &first.value) {
        let defect = Defect::OverlappingServers(Box::new(Overlap {
            endpoint: pair.second_listen.value.to_string(),
            path: second.value.clone(),
            other: label(pair.first),
            other_endpoint: pair.first_listen.value.to_string(),
            other_path: first.value.clone(),
            other_line: pair.first_listen.at.line,
        }));
        report.error(pair.second_listen.at, pair.second_listen.field.clone(), defect);
    }
}

fn public_paths(report: &mut Report, server: &Draft, other: &Draft) {
    let Some(other_path) = &other.path else { return };
    for public in &server.public_paths {
        if path_contains(&other_path.value, &public.value) || path_contains(&public.value, &other_path.value)
        {
            let defect =
                Defect::PublicPathOfOtherServer { other: label(other), other_path: other_path.value.clone() };
            report.error(public.at, public.field.clone(), defect);
        }
    }
}

fn shared_public_paths(report: &mut Report, pair: &Pair<'_>) {
    for public in &pair.second.public_paths {
        if let Some(first) = pair.first.public_paths.iter().find(|p| p.value == public.value) {
            let defect = Defect::PublicPathShared { other: label(pair.first), other_line: first.at.line };
            report.error(public.at, public.field.clone(), defect);
        }
    }
}

/// One metadata path on one endpoint can't describe two resources.
fn metadata(report: &mut Report, pair: &Pair<'_>) {
    let (Some(first), Some(second)) = (&pair.first.resource, &pair.second.resource) else { return };
    let (Ok(a), Ok(b)) = (parse_resource(&first.value), parse_resource(&second.value)) else { return };
    if first.value != second.value && a.path == b.path {
        let defect = Defect::MetadataClash {
            path: format!("{METADATA_PREFIX}{}", a.path),
            resource: second.value.clone(),
            other: label(pair.first),
            other_resource: first.value.clone(),
        };
        report.error(second.at, second.field.clone(), defect);
    }
}
