//! The `limits` of a policy file.

use std::sync::Arc;

use enforcer_common::abi::GRANT_BUCKETS;

use super::bind::{Chosen, server_names};
use super::error::Defect;
use super::fields::{Field, Mapping, Report};
use super::named::Names;
use super::rate;
use super::server::{self, Draft};
use super::{Dimension, Limit, MAX_LIMITS};

const FIELDS: &[&str] = &["name", "per", "servers", "rate", "burst", "streams", "ipv4_prefix", "ipv6_prefix"];
/// Most streams that a limit can allow.
const MAX_STREAMS: u64 = 1_000_000;

/// Reads the limits and adds each to the servers that it is for. `None` if any is bad.
pub(super) fn compile(
    report: &mut Report,
    map: &Mapping<'_>,
    servers: &mut Option<Vec<Draft>>,
) -> Option<Vec<Arc<Limit>>> {
    let Some(field) = map.optional("limits") else { return Some(Vec::new()) };
    let known_servers = server_names(servers.as_deref());
    let mut names = Names::new("limit");
    let mut in_order = Some(Vec::new());
    for entry in field.list(report, MAX_LIMITS)? {
        let Some((limit, chosen)) = limit(report, &entry, &mut names, &known_servers) else {
            in_order = None;
            continue;
        };
        let limit = Arc::new(limit);
        let mut full: Option<(String, usize)> = None;
        for server in chosen.of(servers).filter_map(|draft| draft.server.as_mut()) {
            server.limits.push(Arc::clone(&limit));
            if server.limits.len() > GRANT_BUCKETS {
                full.get_or_insert((server.name.clone(), server.limits.len()));
            }
        }
        if let Some((server, found)) = full {
            entry.error(report, Defect::TooManyLimits { server, found, limit: GRANT_BUCKETS });
        }
        if let Some(list) = &mut in_order {
            list.push(limit);
        }
    }
    in_order
}

fn limit(
    report: &mut Report,
    entry: &Field<'_>,
    names: &mut Names,
    servers: &Names,
) -> Option<(Limit, Chosen)> {
    let map = entry.mapping(report, FIELDS)?;
    let name = server::name(report, &map);
    let name = names.add(report, name);
    let chosen = Chosen::read(report, &map, servers);
    let per = map.required(report, "per").and_then(|field| dimension(report, &field));
    let has_rate = map.has("rate") || map.has("burst");
    let rate = if has_rate { rate::rate(report, &map).map(Some) } else { Some(None) };
    let streams = map.or_default("streams", None, |field| field.number(report, 1, MAX_STREAMS).map(Some));
    if !has_rate && !map.has("streams") {
        entry.error(report, Defect::LimitOfNothing);
        return None;
    }
    let mut prefix = |name, default: u8, max: u64| {
        map.or_default(name, default, |field: Field<'_>| {
            if let Some(per) = per.filter(|per| *per != Dimension::Source) {
                field.error(report, Defect::PrefixWithoutSource { per: per.name() });
                return None;
            }
            field.number(report, 1, max).and_then(|bits| u8::try_from(bits).ok())
        })
    };
    let ipv4_prefix = prefix("ipv4_prefix", 32, 32);
    let ipv6_prefix = prefix("ipv6_prefix", 64, 128);
    let limit = Limit {
        name: name?,
        per: per?,
        rate: rate?,
        streams: streams?.and_then(|streams| u32::try_from(streams).ok()),
        ipv4_prefix: ipv4_prefix?,
        ipv6_prefix: ipv6_prefix?,
    };
    Some((limit, chosen?))
}

fn dimension(report: &mut Report, field: &Field<'_>) -> Option<Dimension> {
    let name = field.text(report, 64)?;
    match Dimension::ALL.into_iter().find(|dimension| dimension.name() == name) {
        Some(dimension @ (Dimension::Tool | Dimension::Method)) => {
            field.error(report, Defect::BodyDimension { name: dimension.name() });
            None
        }
        Some(dimension) => Some(dimension),
        None => {
            field.error(report, Defect::UnknownDimension { name: name.to_owned() });
            None
        }
    }
}
