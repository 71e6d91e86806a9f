//! The engine's part of a switch to another policy.
//!
//! The caller writes the maps in this order: new endpoints; [`Engine::carry`]; the configuration with its new generation, from which
//! moment on nothing of the old policy is allowed; [`Engine::switch`]; away with old endpoints. Between carrying and the new
//! generation the carried grants are void, which costs a look of the daemon and lets nothing through.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use enforcer_common::abi::{Flow, Grant, grant_slot};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::engine::Engine;
use super::{Claims, Datapath, Endpoints, GrantBuckets, Loss, Now, Payer, Transition};
use crate::keys::KeySnapshot;
use crate::policy::Server;

/// Grants that the new policy has judged, by serial.
pub type Judged = HashMap<u64, Result<(), Loss>>;

/// What the engine is to switch to.
#[derive(Debug)]
pub struct Next {
    /// The policies.
    pub transition: Transition,
    /// Grants that were judged beforehand; the others are judged now.
    pub judged: Judged,
}

/// A grant and what becomes of it.
#[derive(Debug, Clone, Copy)]
struct Carried {
    grant: Grant,
    holds: Result<(), Loss>,
}

/// The grants of the old generation, by serial, and what became of them: [`Engine::switch`] needs to know.
#[derive(Debug, Default)]
pub struct AllCarried(BTreeMap<u64, Carried>);

/// Counts by server and reason: grants, connections.
type Counts = BTreeMap<(String, &'static str), (u64, u64)>;

/// How many lose their access to a server for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Losses {
    /// The server in the old policy; several, with commas, where a connection may have been any one's.
    pub server: String,
    /// A [`Loss`] by name.
    pub reason: String,
    /// Tokens that the kernel let pass.
    pub grants: u64,
    /// Connections, which are ended.
    pub flows: u64,
}

/// What a switch means for who is there now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Consequences {
    /// Grants in force.
    pub grants: u64,
    /// Connections.
    pub flows: u64,
    /// Those that lose their access.
    pub losses: Vec<Losses>,
}

impl Next {
    /// Judges claims by the new policy; for doing it beforehand, as it may take a while.
    pub fn judge(&mut self, claims: &[Claims], keys: &KeySnapshot, now_unix_secs: u64) {
        let judge = |claims: &Claims| {
            let holds = self.transition.grant(claims.server_id, &claims.evidence, keys, now_unix_secs);
            (claims.serial, holds)
        };
        let judged: Vec<_> = claims.iter().map(judge).collect();
        self.judged.extend(judged);
    }
}

impl Engine {
    /// What is known of the tokens that have a grant.
    #[must_use]
    pub fn claims(&self) -> Vec<Claims> {
        self.grants.remembered.all().cloned().collect()
    }

    /// The generation in force.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The endpoints in force.
    #[must_use]
    pub const fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// What a switch would mean. Changes nothing.
    ///
    /// # Errors
    /// Not all grants or connections can be read.
    pub fn consequences<D: Datapath>(
        &self,
        next: &Next,
        keys: &KeySnapshot,
        now: Now,
        datapath: &mut D,
    ) -> Result<Consequences, D::Error> {
        let all = self.judge_grants(next, keys, now, datapath)?;
        look(&all, &next.transition, datapath, |_, _, _| {})
    }

    /// Gives the grants that the new policy allows their place in its generation, and revokes the others.
    ///
    /// # Errors
    /// Not all grants can be read; nothing was written then.
    pub fn carry<D: Datapath>(
        &mut self,
        next: &Next,
        generation: u64,
        keys: &KeySnapshot,
        now: Now,
        datapath: &mut D,
    ) -> Result<AllCarried, D::Error> {
        let all = self.judge_grants(next, keys, now, datapath)?;
        let servers = next.transition.endpoints().servers();
        for (serial, Carried { grant, holds }) in &all.0 {
            let grant = match holds {
                Ok(()) => {
                    let server = servers.get(&grant.server_id);
                    let Some(buckets) = self.buckets_under(server, grant, now, datapath) else {
                        warn!("a limit's bucket could not be had; a token is judged again");
                        continue;
                    };
                    Grant { generation, buckets, ..*grant }
                }
                Err(_) => Grant { revoked: 1, ..*grant },
            };
            self.grants.set_buckets(&grant);
            if let Err(error) = datapath.set_grant(grant_slot(*serial), &grant) {
                // Its generation ends all the same.
                warn!(%error, "a grant could not be written; its token is judged again");
            }
        }
        Ok(all)
    }

    /// The configuration has the new generation: from here on everything is decided under the new policy. Requests that wait are
    /// decided under it; connections that it does not allow are ended.
    ///
    /// # Errors
    /// Not all connections could be looked through: they keep only what the kernel lets them.
    pub fn switch<D: Datapath>(
        &mut self,
        next: &Next,
        all: &AllCarried,
        generation: u64,
        now: Now,
        datapath: &mut D,
    ) -> Result<Consequences, D::Error> {
        self.generation = generation;
        self.endpoints = next.transition.endpoints().clone();
        self.mode = next.transition.mode();
        // The sweep ends what a request that passed just now leaves behind.
        self.sweeper.wake(now);
        let mut ends = Vec::new();
        let consequences = look(all, &next.transition, datapath, |cookie, flow, loss| {
            ends.push((cookie, flow.netns_cookie, loss));
        })?;
        for (cookie, netns_cookie, loss) in ends {
            datapath.count(loss.name());
            self.end_flow(cookie, netns_cookie, datapath);
        }
        let lost = |serial: u64| all.0.get(&serial).is_some_and(|carried| carried.holds.is_err());
        let passing: Vec<_> = self.flows_with_grant(lost).collect();
        for (cookie, netns_cookie) in passing {
            self.end_flow(cookie, netns_cookie, datapath);
        }
        Ok(consequences)
    }

    /// The buckets of a grant by the limits of a server, whose tokens it is good for.
    fn buckets_under<D: Datapath>(
        &mut self,
        server: Option<&Arc<Server>>,
        grant: &Grant,
        now: Now,
        datapath: &mut D,
    ) -> Option<GrantBuckets> {
        let server = server?;
        if server.limits.is_empty() {
            return Some(GrantBuckets::default());
        }
        let label = datapath.grant_label(grant_slot(grant.serial)).ok()?;
        if label.serial != grant.serial {
            return None;
        }
        let holder = datapath.holder(&grant.caller);
        let view = holder.view();
        self.buckets.assign(&Payer::of_label(server, &label, &view), now, datapath)
    }

    fn judge_grants<D: Datapath>(
        &self,
        next: &Next,
        keys: &KeySnapshot,
        now: Now,
        datapath: &mut D,
    ) -> Result<AllCarried, D::Error> {
        let mut all = AllCarried::default();
        for slot in 0..self.grants.slots_used() {
            let grant = datapath.grant(slot)?;
            // A token whose time is over is the sweep's; its connection may have gone on with the next one.
            if grant.serial == 0 || grant.revoked != 0 || grant.ends_at_unix_secs <= now.unix_secs {
                continue;
            }
            let holds = match (next.judged.get(&grant.serial), self.grants.remembered.get(grant.serial)) {
                (Some(holds), _) => *holds,
                (None, Some(claims)) => {
                    next.transition.grant(claims.server_id, &claims.evidence, keys, now.unix_secs)
                }
                (None, None) => match datapath.grant_label(slot)? {
                    label if label.serial == grant.serial => {
                        next.transition.grant_unseen(grant.server_id, &label.issuer_hash)
                    }
                    _ => Err(Loss::NotRemembered),
                },
            };
            all.0.insert(grant.serial, Carried { grant, holds });
        }
        Ok(all)
    }
}

/// Looks through all connections, counts, and names those that must end.
fn look<D: Datapath>(
    all: &AllCarried,
    transition: &Transition,
    datapath: &mut D,
    mut end: impl FnMut(u64, &Flow, Loss),
) -> Result<Consequences, D::Error> {
    let mut counts = Counts::new();
    for carried in all.0.values() {
        if let Err(loss) = carried.holds {
            let server = transition.server_name(carried.grant.server_id).unwrap_or("?").to_owned();
            counts.entry((server, loss.name())).or_default().0 += 1;
        }
    }
    let mut seen = HashSet::new();
    datapath.flows(&mut |cookie, flow| {
        if !seen.insert(cookie) {
            return;
        }
        // What is revoked already is the sweep's.
        let used: Vec<&Carried> = named(flow).filter_map(|serial| all.0.get(&serial)).collect();
        let grants = used.iter().map(|carried| (carried.grant.server_id, carried.holds));
        if let Err(loss) = transition.flow(flow, grants) {
            let by_grant = used.first().and_then(|carried| transition.server_name(carried.grant.server_id));
            let server = by_grant.map_or_else(|| transition.endpoint_names(flow.endpoint_id), str::to_owned);
            counts.entry((server, loss.name())).or_default().1 += 1;
            end(cookie, flow, loss);
        }
    })?;
    let losses = counts.into_iter().map(|((server, reason), (grants, flows))| Losses {
        server,
        reason: reason.to_owned(),
        grants,
        flows,
    });
    Ok(Consequences { grants: all.0.len() as u64, flows: seen.len() as u64, losses: losses.collect() })
}

/// Serials of the grants that a connection used, the last one first.
fn named(flow: &Flow) -> impl Iterator<Item = u64> + use<> {
    flow.grants.into_iter().take_while(|serial| *serial != 0)
}
