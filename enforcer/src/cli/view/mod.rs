//! The reading commands. Each has a pure part, from the values in the maps and a time to rows.

mod counters;
mod flows;
mod grants;
pub(super) mod limits;
pub(super) mod revocations;
mod servers;
pub(super) mod shield;
mod status;
#[cfg(test)]
mod testing;
mod unguarded;
mod verdicts;
mod workloads;

use std::collections::BTreeMap;
use std::sync::Arc;

use enforcer_common::abi::{Caller, Flow};

use super::exit::{NOT_LOADED, OK};
use super::format::unix_secs;
use super::output::print;
use super::{Global, live};
use crate::datapath::{LiveError, map_memory};
use crate::lifecycle::unguarded::find;
use crate::lifecycle::{Usage, lock, paths};
use crate::workload::{Workload, Workloads, unmatched_here, user_name};

pub(super) fn status(global: &Global) -> anyhow::Result<u8> {
    let pins = global.pins();
    // Who may not look into the lock directory may still look at the maps.
    let lock = lock::state(&global.pin_name).ok();
    let place =
        status::Place { pin_directory: pins.path().to_owned(), link_pinned: unguarded::is_attached(&pins) };
    let live = match live::open(global) {
        Ok(live) => live,
        Err(error) if matches!(error.downcast_ref(), Some(LiveError::NotLoaded(_))) => {
            print(global.output, &status::Status::not_loaded(place, lock))?;
            return Ok(NOT_LOADED);
        }
        Err(error) => return Err(error),
    };
    let config = live.configuration()?;
    let used = status::Used {
        flows: live::flows(&live)?.len(),
        verdicts: live::verdicts(&live)?.len(),
        grants: live::grants(&live)?.len(),
        limits: live::buckets(&live)?.len(),
        revocations: live.revocations()?.len(),
        memory: map_memory(&pins)?,
        unguarded: unguarded::Summary::of(find(&pins)),
        unmatched_workloads: unmatched_workloads(global),
        shield: shield::Shielded::of(&live.shield, &pins, live::now_ns())?,
        process: lock
            .as_ref()
            .filter(|lock| lock.held)
            .and_then(|lock| Usage::of(lock.record.as_ref()?.pid).ok()),
    };
    print(global.output, &status::Status::of(place, lock, &config, used, live::now_ns()))?;
    Ok(OK)
}

/// Of the policy that the daemon recorded last; none if there is none that can be read.
fn unmatched_workloads(global: &Global) -> Vec<String> {
    let recorded = global.state().read_policy().ok().flatten();
    let policy = recorded.and_then(|recorded| recorded.policy.compile().ok());
    policy
        .map_or_else(Vec::new, |(policy, _)| unmatched_here(&policy).into_iter().map(str::to_owned).collect())
}

pub(super) fn servers(global: &Global) -> anyhow::Result<u8> {
    let live = live::open(global)?;
    let (servers, endpoints, flows) = (live::servers(&live)?, live::endpoints(&live)?, live::flows(&live)?);
    print(global.output, &servers::Servers::of(&servers, &endpoints, flows.values()))?;
    Ok(OK)
}

pub(super) fn flows(global: &Global) -> anyhow::Result<u8> {
    let live = live::open(global)?;
    let flows = live::flows(&live)?;
    let grants = live::grants_in(&live, flows.values().filter_map(flows::last_grant_slot))?;
    let (workloads, users) = callers(flows.values());
    let source = flows::Source {
        workloads,
        users,
        labels: live::grant_labels(&live, &grants)?,
        grants,
        servers: live::servers(&live)?,
        endpoints: live::endpoints(&live)?,
        flows,
        unguarded: unguarded::connections(&global.pins()),
    };
    print(global.output, &flows::Flows::of(source, live::now_ns()))?;
    Ok(OK)
}

pub(super) fn workloads(global: &Global) -> anyhow::Result<u8> {
    let live = live::open(global)?;
    let flows = live::flows(&live)?;
    let (workloads, users) = callers(flows.values());
    let (servers, endpoints) = (live::servers(&live)?, live::endpoints(&live)?);
    print(global.output, &workloads::View::of(flows.values(), &workloads, &users, &servers, &endpoints))?;
    Ok(OK)
}

/// The workloads and the names of the users that call, as far as they can be seen from here.
fn callers<'a>(
    flows: impl Iterator<Item = &'a Flow>,
) -> (BTreeMap<u64, Arc<Workload>>, BTreeMap<u32, String>) {
    let mut resolver = paths::cgroup2_root().ok().map(Workloads::new);
    let (mut workloads, mut users) = (BTreeMap::new(), BTreeMap::<u32, Option<String>>::new());
    for caller in flows.map(|flow| &flow.caller) {
        if let Some(workload) = resolver.as_mut().and_then(|resolver| resolver.of_caller(caller)) {
            workloads.insert(caller.cgroup_id, workload);
            users.entry(caller.uid).or_insert_with(|| user_name(caller.uid));
        }
    }
    (workloads, users.into_iter().filter_map(|(uid, name)| Some((uid, name?))).collect())
}

pub(super) fn verdicts(global: &Global) -> anyhow::Result<u8> {
    let live = live::open(global)?;
    let verdicts = live::verdicts(&live)?;
    let grants = live::grants_in(&live, verdicts.values().filter_map(verdicts::grant_slot))?;
    let (config, servers) = (live.configuration()?, live::servers(&live)?);
    print(global.output, &verdicts::Verdicts::of(&verdicts, &grants, &servers, &config, live::now_ns()))?;
    Ok(OK)
}

pub(super) fn grants(global: &Global) -> anyhow::Result<u8> {
    let live = live::open(global)?;
    let grants = live::grants(&live)?;
    let labels = live::grant_labels(&live, &grants)?;
    let (config, servers) = (live.configuration()?, live::servers(&live)?);
    print(global.output, &grants::Grants::of(&grants, &labels, &servers, &config, live::now_ns()))?;
    Ok(OK)
}

pub(super) fn limits(command: &limits::Command, global: &Global) -> anyhow::Result<u8> {
    let live = live::open(global)?;
    let buckets = live::buckets(&live)?;
    let labels = live::bucket_labels(&live, &buckets)?;
    let mut shown = limits::Limits::of(command, &buckets, &labels, live::now_ns());
    if command.wants_sources() {
        let (sources, config) = (live::sources(&live)?, live.configuration()?);
        let callers = sources.keys().map(|key| Caller { cgroup_id: key.cgroup_id, ..Caller::UNKNOWN });
        shown = shown.with_sources(&sources, &resolved(callers), &config, live::now_ns());
    }
    print(global.output, &shown)?;
    Ok(OK)
}

/// The workloads of callers, as far as they can be seen from here.
fn resolved(callers: impl Iterator<Item = Caller>) -> BTreeMap<u64, Arc<Workload>> {
    let Ok(mut resolver) = paths::cgroup2_root().map(Workloads::new) else { return BTreeMap::new() };
    callers.filter_map(|caller| Some((caller.cgroup_id, resolver.of_caller(&caller)?))).collect()
}

pub(super) fn revocations(global: &Global) -> anyhow::Result<u8> {
    let all = match live::open(global) {
        Ok(live) => live.revocations()?,
        // What the next start will read.
        Err(error) if matches!(error.downcast_ref(), Some(LiveError::NotLoaded(_))) => {
            global.state().read()?.ok_or(error)?.revocations
        }
        Err(error) => return Err(error),
    };
    print(global.output, &revocations::Revocations::of(&all, unix_secs()))?;
    Ok(OK)
}

pub(super) fn counters(global: &Global, all: bool) -> anyhow::Result<u8> {
    let live = live::open(global)?;
    print(global.output, &counters::Counters::of(&live.counters()?, live::reasons(&live)?, all))?;
    Ok(OK)
}
