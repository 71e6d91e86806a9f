//! Over an enforcement that an earlier daemon left: its maps are taken over as they are, and connections go on.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, ensure};
use aya::programs::links::PinnedLink;
use enforcer_common::abi::{Config, DaemonState, Grant, MAX_BUCKETS, MAX_REPLIES, map, text_str};
use tracing::warn;

use super::apply::{self, InForce, Prepared};
use super::kernel::Kernel;
use super::reload::{Old, build, report, tell};
use super::revocations::State;
use super::setup::Up;
use crate::core::{Datapath as _, Endpoints, Engine, Numbers, Orphan, Secrets};
use crate::datapath::{self, Injectors, LINKS, LiveError, Maps, PinDir};
use crate::keys::KeyManagerHandle;
use crate::lifecycle::start::Ours;
use crate::policy::{self, Policy, PolicyText};
use crate::revocation::store::{RecordedPolicy, StateDir};
use crate::token::Fingerprinter;

/// Shows the kernel that a daemon is there, so that requests which it does not know wait for it instead of being refused, and tells
/// an earlier daemon's watcher that it is not needed any more.
pub(super) fn claim(pins: &PinDir, started_ns: u64) -> Result<(), LiveError> {
    let mut maps = Maps::open(pins)?;
    let config = maps.live.configuration()?;
    maps.set_config(Config {
        heartbeat_ns: super::now().boot_ns,
        daemon_started_ns: started_ns,
        daemon_pid: std::process::id(),
        ..config
    })
}

/// The policy that an earlier daemon recorded, if a reload could go from it to the next one, and its hash. Whether it is the one that the
/// maps were filled by, the hash says. A program of another version has another one for the same text, so from that is switched as well:
/// what was decided about heads ends, and open streams go on. Not if it judges by other rules, or makes something else of the text, as
/// then what its policy allows and what ours does can't be compared.
pub(super) fn former(state: &StateDir, next: &Policy) -> Option<(Policy, [u8; 32])> {
    let recorded = || -> anyhow::Result<Option<(Policy, [u8; 32])>> {
        let Some(RecordedPolicy { policy: text, policy_hash, compiled_hash, rules }) = state.read_policy()?
        else {
            return Ok(None);
        };
        ensure!(rules == policy::RULES, "it was judged by rules {rules}, here they are {}", policy::RULES);
        let (former, _) = policy::parse(&text.file, &text.text)?;
        ensure!(
            policy::compiled_hash(&former) == compiled_hash,
            "its text meant something else to the program that recorded it"
        );
        Numbers::default().next(&former)?.next(next)?;
        Ok(Some((former, policy_hash)))
    };
    recorded().unwrap_or_else(|error| {
        warn!(error = format!("{error:#}"), "the record of the former policy is of no use");
        None
    })
}

/// Takes over maps and links, and what they tell: keys, grants, templates. The policy must be the one that they were filled by.
pub(super) fn adopt(
    policy: &Policy,
    pins: &PinDir,
    ours: &Ours,
    replace_programs: bool,
    started_ns: u64,
    state: &State,
) -> anyhow::Result<Up> {
    if replace_programs {
        let mut maps = Maps::open(pins)?;
        let state = maps.daemon_state()?;
        // Should we be killed in the middle, the next start knows that it can't tell which programs are there.
        maps.set_daemon_state(&DaemonState { object_hash: [0; 32], ..state })?;
        datapath::replace(pins)?;
        maps.set_daemon_state(&DaemonState { object_hash: ours.object_hash, ..state })?;
    }
    let mut maps = Maps::open(pins)?;
    let now = super::now();
    let config = Config {
        heartbeat_ns: now.boot_ns,
        heartbeat_limit_ns: policy.daemon_timeout.as_nanos() as u64,
        daemon_started_ns: started_ns,
        daemon_pid: std::process::id(),
        // It was being unloaded, by a process that did not get to the end.
        draining: 0,
        ..maps.live.configuration()?
    };
    maps.set_config(config)?;
    let orphans = orphans(&maps)?;
    let ring = Maps::punts(pins)?;
    let injectors = Injectors::new(&mut maps)?;
    let links = LINKS.map(|(_, link)| PinnedLink::from_pin(pins.pin(link)));
    let links = links.into_iter().collect::<Result<_, _>>().context("cannot hold the links")?;

    let fingerprint_key = maps.daemon_state()?.fingerprint_key;
    state.keep_fingerprint_key(&fingerprint_key)?;
    state.bring_together(&mut maps.live, policy, now.unix_secs)?;
    maps.live.shield.apply(policy)?;
    let secrets =
        Secrets { digest: Box::new(maps.digest_key()?), fingerprint: Fingerprinter::new(fingerprint_key) };
    let numbers = numbers(&maps)?.next(policy)?;
    let endpoints = Endpoints::of(policy, &numbers);
    let mut engine = Engine::new((endpoints, policy.mode), config.generation, now.boot_ns, secrets);
    engine.replies().adopt((0..MAX_REPLIES).map_while(|id| maps.reply(id).ok()));
    let grants = grants(&maps)?;
    let mut kernel = Kernel::new(maps, injectors)?;
    kernel.hold(links);
    engine.grants().adopt(grants, config.generation, now);
    let maps = kernel.maps();
    let buckets = (0..MAX_BUCKETS).map(|index| (index, maps.buckets.get(index)));
    engine.buckets().adopt(buckets, |index| maps.live.limit_labels.get(&index, 0).ok(), now);
    Ok(Up { engine, kernel, ring, numbers, orphans })
}

/// From the policy that adopted maps were filled by to the one that the daemon was started with, as a reload does it. Call it before
/// the first record of the ring buffer is taken: nothing is decided under the former policy. `keys` are the new policy's and need
/// not be there yet, as there are no claims that they could prove.
///
/// # Errors
/// The former policy stays in force.
pub(super) fn switch(
    former: Arc<Policy>,
    (policy, text): (Arc<Policy>, PolicyText),
    keys: &KeyManagerHandle,
    revocations: State,
    up: &mut Up,
) -> anyhow::Result<()> {
    let Up { engine, kernel, numbers, orphans, .. } = up;
    let mut in_force = InForce { policy: Arc::clone(&former), numbers: numbers.clone(), keys: keys.clone() };
    let old = Old {
        policy: former,
        numbers: numbers.clone(),
        endpoints: engine.endpoints().clone(),
        keys: keys.clone(),
        claims: engine.claims(),
    };
    let prepared = build((policy, text), &[], Vec::new(), keys.clone(), old)?;
    let diff = prepared.diff.clone();
    let recorded = revocations.read()?;
    let prepared = Prepared { revocations: Some((revocations, recorded)), ..prepared };
    let consequences = apply::switch(prepared, &mut in_force, super::now(), engine, kernel)?;
    *numbers = in_force.numbers;
    // What is destroyed now is nobody's any more.
    kernel.destroy_all_due();
    orphans.retain(|orphan| kernel.flow_exists(orphan.cookie));
    tell("start", &Ok(report(engine, diff, Vec::new(), consequences)));
    Ok(())
}

/// What the earlier daemon had in its hands. Whatever joins later is ours.
fn orphans(maps: &Maps) -> Result<Vec<Orphan>, LiveError> {
    // A walk may show a flow twice.
    let mut orphans = BTreeMap::new();
    maps.live.each_flow(&mut |cookie, flow| {
        if let Some(orphan) = Orphan::of(cookie, flow) {
            orphans.insert(cookie, orphan);
        }
    })?;
    Ok(orphans.into_values().collect())
}

/// The numbers that the earlier daemon gave.
fn numbers(maps: &Maps) -> Result<Numbers, LiveError> {
    let labels = &maps.live.server_labels;
    let labels =
        (0..labels.len()).map(|id| labels.get(&id, 0).map(|label| (id, text_str(&label.name).to_owned())));
    let servers = labels
        .filter(|label| !label.as_ref().is_ok_and(|(_, name)| name.is_empty()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| LiveError::Map { name: map::SERVER_LABELS, source })?;
    let endpoints = maps
        .live
        .endpoints
        .iter()
        .map(|entry| entry.map(|(key, endpoint)| (key, endpoint.endpoint_id)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| LiveError::Map { name: map::ENDPOINTS, source })?;
    Ok(Numbers::found(servers, endpoints))
}

/// All slots.
fn grants(maps: &Maps) -> Result<Vec<(u32, Grant)>, LiveError> {
    let slots = 0..maps.live.grants.len();
    let grants = slots.map(|slot| maps.live.grants.get(&slot, 0).map(|grant| (slot, grant)));
    grants.collect::<Result<_, _>>().map_err(|source| LiveError::Map { name: map::GRANTS, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyErrors;

    const TEXT: &str = include_str!("../../../docs/policy.example.yaml");

    #[test]
    fn what_another_program_made_of_the_text_or_judged_by_other_rules_is_not_known()
    -> Result<(), PolicyErrors> {
        let place = tempfile::tempdir().unwrap();
        let state = StateDir::new(place.path(), "x");
        let lock = state.lock().unwrap();
        let (policy, _) = policy::parse("/policy.yaml", TEXT)?;
        let text = PolicyText { file: "/policy.yaml".into(), text: TEXT.into() };
        let recorded = RecordedPolicy::of(text, &policy);
        let cases = [
            (recorded.clone(), true),
            // Another version's.
            (RecordedPolicy { policy_hash: [7; 32], ..recorded.clone() }, true),
            (RecordedPolicy { compiled_hash: [7; 32], ..recorded.clone() }, false),
            (RecordedPolicy { rules: policy::RULES + 1, ..recorded.clone() }, false),
            (RecordedPolicy { rules: policy::RULES - 1, ..recorded }, false),
        ];
        for (recorded, known) in cases {
            state.write_policy(&lock, &recorded).unwrap();
            let former = former(&state, &policy);
            assert_eq!(former, known.then(|| (policy.clone(), recorded.policy_hash)), "{recorded:?}");
        }
        Ok(())
    }
}
