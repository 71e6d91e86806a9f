//! Reading the pinned maps.

use std::collections::BTreeMap;

use enforcer_common::abi::{
    Bucket, BucketLabel, Endpoint, EndpointKey, Flow, Grant, GrantLabel, HeadDigest, MAX_FLOWS, MAX_SOURCES,
    MAX_VERDICTS, ServerLabel, Source, SourceKey, Verdict, map, text_str,
};

use super::Global;
use super::exit::{NOT_PERMITTED, failed};
use crate::datapath::{Live, LiveError};
use crate::keys::BootInstant;

/// The clock of the maps, in nanoseconds.
pub(super) fn now_ns() -> u64 {
    u64::try_from(BootInstant::now().since_boot().as_nanos()).unwrap_or(u64::MAX)
}

/// Opens the maps, or says why not: a missing right is not a missing enforcement.
pub(super) fn open(global: &Global) -> anyhow::Result<Live> {
    let pins = global.pins();
    if let Err(error) = std::fs::metadata(pins.pin(map::CONFIG))
        && error.kind() == std::io::ErrorKind::PermissionDenied
    {
        return Err(failed(
            NOT_PERMITTED,
            format!("cannot look into {}: {error}; are you root?", pins.path().display()),
        ));
    }
    Ok(Live::open(&pins)?)
}

fn failed_map(name: &'static str) -> impl Fn(aya::maps::MapError) -> LiveError {
    move |source| LiveError::Map { name, source }
}

/// All flows. A walk over a hash that changes meanwhile may start again: what comes twice counts once, and the walk is
/// bounded.
pub(super) fn flows(live: &Live) -> Result<BTreeMap<u64, Flow>, LiveError> {
    live.flows.iter().take(2 * MAX_FLOWS as usize).collect::<Result<_, _>>().map_err(failed_map(map::FLOWS))
}

/// All verdicts.
pub(super) fn verdicts(live: &Live) -> Result<BTreeMap<HeadDigest, Verdict>, LiveError> {
    let walk = live.verdicts.iter().take(2 * MAX_VERDICTS as usize);
    walk.map(|entry| entry.map(|(digest, sealed)| (digest, sealed.value)))
        .collect::<Result<_, _>>()
        .map_err(failed_map(map::VERDICTS))
}

/// The grants in use, by slot.
pub(super) fn grants(live: &Live) -> Result<BTreeMap<u32, Grant>, LiveError> {
    let mut grants = BTreeMap::new();
    for slot in 0..live.grants.len() {
        let grant = live.grants.get(&slot, 0).map_err(failed_map(map::GRANTS))?;
        if grant.serial != 0 {
            grants.insert(slot, grant);
        }
    }
    Ok(grants)
}

/// The grants in some slots, as far as those are in use.
pub(super) fn grants_in(
    live: &Live,
    slots: impl IntoIterator<Item = u32>,
) -> Result<BTreeMap<u32, Grant>, LiveError> {
    let mut grants = BTreeMap::new();
    for slot in slots {
        if slot < live.grants.len() && !grants.contains_key(&slot) {
            let grant = live.grants.get(&slot, 0).map_err(failed_map(map::GRANTS))?;
            if grant.serial != 0 {
                grants.insert(slot, grant);
            }
        }
    }
    Ok(grants)
}

/// The labels of grants; one that was written for another grant is left out.
pub(super) fn grant_labels(
    live: &Live,
    grants: &BTreeMap<u32, Grant>,
) -> Result<BTreeMap<u32, GrantLabel>, LiveError> {
    let mut labels = BTreeMap::new();
    for (slot, grant) in grants {
        let label = live.grant_labels.get(slot, 0).map_err(failed_map(map::GRANT_LABELS))?;
        if label.serial == grant.serial {
            labels.insert(*slot, label);
        }
    }
    Ok(labels)
}

/// The buckets of limits in use, by index. The first is no limit's.
pub(super) fn buckets(live: &Live) -> Result<BTreeMap<u32, Bucket>, LiveError> {
    let mut buckets = BTreeMap::new();
    for index in 1..live.limits.len() {
        let bucket = live.limits.get(&index, 0).map_err(failed_map(map::LIMITS))?;
        if bucket.serial != 0 {
            buckets.insert(index, bucket);
        }
    }
    Ok(buckets)
}

/// The labels of buckets; one that was written for an earlier use is left out.
pub(super) fn bucket_labels(
    live: &Live,
    buckets: &BTreeMap<u32, Bucket>,
) -> Result<BTreeMap<u32, BucketLabel>, LiveError> {
    let mut labels = BTreeMap::new();
    for (index, bucket) in buckets {
        let label = live.limit_labels.get(index, 0).map_err(failed_map(map::LIMIT_LABELS))?;
        if label.serial == bucket.serial {
            labels.insert(*index, label);
        }
    }
    Ok(labels)
}

/// Where requests without a grant come from. As for flows, the walk is bounded.
pub(super) fn sources(live: &Live) -> Result<BTreeMap<SourceKey, Source>, LiveError> {
    let walk = live.sources.iter().take(2 * MAX_SOURCES as usize);
    walk.collect::<Result<_, _>>().map_err(failed_map(map::SOURCES))
}

/// The servers, by number.
pub(super) fn servers(live: &Live) -> Result<BTreeMap<u32, ServerLabel>, LiveError> {
    let mut servers = BTreeMap::new();
    for id in 0..live.server_labels.len() {
        let label = live.server_labels.get(&id, 0).map_err(failed_map(map::SERVER_LABELS))?;
        if label.name.first().is_some_and(|byte| *byte != 0) {
            servers.insert(id, label);
        }
    }
    Ok(servers)
}

/// The protected endpoints.
pub(super) fn endpoints(live: &Live) -> Result<BTreeMap<EndpointKey, Endpoint>, LiveError> {
    live.endpoints.iter().collect::<Result<_, _>>().map_err(failed_map(map::ENDPOINTS))
}

/// The daemon's refusal reasons, by name.
pub(super) fn reasons(live: &Live) -> Result<BTreeMap<String, u64>, LiveError> {
    let reason = |(name, count): ([u8; 48], u64)| (text_str(&name).to_owned(), count);
    live.reasons
        .iter()
        .map(|entry| entry.map(reason))
        .collect::<Result<_, _>>()
        .map_err(failed_map(map::REASONS))
}
