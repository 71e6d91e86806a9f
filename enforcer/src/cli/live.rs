//! Reading the pinned maps.

use std::collections::BTreeMap;

use aya::Pod;
use aya::maps::{Array, MapData};
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

/// Those of these places of an array that are in use: whose serial is not zero.
fn in_use<T: Pod>(
    array: &Array<MapData, T>,
    name: &'static str,
    places: impl IntoIterator<Item = u32>,
    serial: impl Fn(&T) -> u64,
) -> Result<BTreeMap<u32, T>, LiveError> {
    let mut used = BTreeMap::new();
    for place in places {
        if place >= array.len() || used.contains_key(&place) {
            continue;
        }
        let value = array.get(&place, 0).map_err(failed_map(name))?;
        if serial(&value) != 0 {
            used.insert(place, value);
        }
    }
    Ok(used)
}

/// The labels of what is in use, by place and serial; one with another serial was written for an earlier use and is left out.
fn labels<L: Pod>(
    array: &Array<MapData, L>,
    name: &'static str,
    used: impl Iterator<Item = (u32, u64)>,
    serial: impl Fn(&L) -> u64,
) -> Result<BTreeMap<u32, L>, LiveError> {
    let mut labels = BTreeMap::new();
    for (place, used_serial) in used {
        let label = array.get(&place, 0).map_err(failed_map(name))?;
        if serial(&label) == used_serial {
            labels.insert(place, label);
        }
    }
    Ok(labels)
}

/// The grants in use, by slot.
pub(super) fn grants(live: &Live) -> Result<BTreeMap<u32, Grant>, LiveError> {
    grants_in(live, 0..live.grants.len())
}

/// The grants in some slots, as far as those are in use.
pub(super) fn grants_in(
    live: &Live,
    slots: impl IntoIterator<Item = u32>,
) -> Result<BTreeMap<u32, Grant>, LiveError> {
    in_use(&live.grants, map::GRANTS, slots, |grant| grant.serial)
}

/// The labels of grants.
pub(super) fn grant_labels(
    live: &Live,
    grants: &BTreeMap<u32, Grant>,
) -> Result<BTreeMap<u32, GrantLabel>, LiveError> {
    let used = grants.iter().map(|(slot, grant)| (*slot, grant.serial));
    labels(&live.grant_labels, map::GRANT_LABELS, used, |label| label.serial)
}

/// The buckets of limits in use, by index. The first is no limit's.
pub(super) fn buckets(live: &Live) -> Result<BTreeMap<u32, Bucket>, LiveError> {
    in_use(&live.limits, map::LIMITS, 1..live.limits.len(), |bucket| bucket.serial)
}

/// The labels of buckets.
pub(super) fn bucket_labels(
    live: &Live,
    buckets: &BTreeMap<u32, Bucket>,
) -> Result<BTreeMap<u32, BucketLabel>, LiveError> {
    let used = buckets.iter().map(|(index, bucket)| (*index, bucket.serial));
    labels(&live.limit_labels, map::LIMIT_LABELS, used, |label| label.serial)
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
