//! Which buckets a request is charged to: one for each limit that the policy has for its server, by who sends it. Pure but for the calls of
//! [`Datapath`]; the charging itself is `enforcer_common::limit`.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use enforcer_common::abi::{
    Bucket, BucketLabel, GRANT_BUCKETS, GrantLabel, MAX_BUCKETS, NameHash, UNLIMITED, text, text_str,
};
use tracing::warn;

use super::{Datapath, Now, QUARANTINE_NS};
use crate::policy::{Dimension, Limit, Server};
use crate::revocation::name_hash;
use crate::token::VerifiedToken;
use crate::workload::CallerView;

/// Buckets of one grant; 0: none.
pub type GrantBuckets = [u32; GRANT_BUCKETS];

/// Who pays for a request.
#[derive(Debug, Clone)]
pub struct Payer<'a> {
    server: &'a Server,
    caller: &'a CallerView<'a>,
    issuer_name: String,
    subject: String,
    client_id: Option<String>,
    /// Hashes of issuer, subject and client, whole.
    principal: [NameHash; 3],
}

impl<'a> Payer<'a> {
    /// Who presents a token.
    #[must_use]
    pub fn of_token(server: &'a Server, token: &VerifiedToken, caller: &'a CallerView<'a>) -> Self {
        let client = token.client_id.as_deref().map(name_hash).unwrap_or_default();
        Self {
            server,
            caller,
            issuer_name: token.issuer.name.clone(),
            subject: token.subject.clone(),
            client_id: token.client_id.clone(),
            principal: [name_hash(&token.issuer.issuer), name_hash(&token.subject), client],
        }
    }

    /// Who has a grant.
    #[must_use]
    pub fn of_label(server: &'a Server, label: &GrantLabel, caller: &'a CallerView<'a>) -> Self {
        Self {
            server,
            caller,
            issuer_name: text_str(&label.issuer).to_owned(),
            subject: text_str(&label.subject).to_owned(),
            client_id: (label.client_hash != NameHash::default())
                .then(|| text_str(&label.client_id).to_owned()),
            principal: [label.issuer_hash, label.subject_hash, label.client_hash],
        }
    }

    /// The value of a limit's dimension: as it is shown, and what tells it from all others.
    fn value(&self, limit: &Limit) -> (String, String) {
        let same = |value: String| (value.clone(), value);
        let [issuer, subject, client] = self.principal.map(|hash| hex(&hash));
        match limit.per {
            Dimension::Server => same(self.server.name.clone()),
            Dimension::Source => same(network(self.caller.address, limit.ipv4_prefix, limit.ipv6_prefix)),
            Dimension::Workload if self.caller.workload.is_none() => {
                same(unknown_network(self.caller.address))
            }
            Dimension::Workload => same(self.caller.workload_name()),
            // An unknown caller's user is not known either; its address tells it from others.
            Dimension::Uid => same(match self.caller.workload {
                Some(_) => self.caller.uid.to_string(),
                None => format!("unknown, {}", unknown_network(self.caller.address)),
            }),
            Dimension::Principal => {
                let client_id = self.client_id.as_deref().map(|id| format!(" ({id})")).unwrap_or_default();
                let shown = format!("{}/{}{client_id}", self.issuer_name, self.subject);
                (shown, format!("{issuer}{subject}{client}"))
            }
            Dimension::Client => {
                let shown = format!("{}/{}", self.issuer_name, self.client_id.as_deref().unwrap_or("none"));
                (shown, format!("{issuer}{client}"))
            }
            // No policy has them yet: they need the request's body.
            Dimension::Tool | Dimension::Method => same(String::new()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Stands for a caller that is not known: its address, of IPv6 the network that one host has for itself.
fn unknown_network(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.to_string(),
        v6 => network(v6, 32, 64),
    }
}

/// The network of an address with the prefix for its family.
fn network(address: IpAddr, ipv4_prefix: u8, ipv6_prefix: u8) -> String {
    let kept = |all: u32, prefix: u8| all - u32::from(prefix).min(all);
    let (network, prefix) = match address.to_canonical() {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(kept(32, ipv4_prefix)).unwrap_or(0);
            (IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask)), ipv4_prefix)
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(kept(128, ipv6_prefix)).unwrap_or(0);
            (IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask)), ipv6_prefix)
        }
    };
    format!("{network}/{prefix}")
}

/// What a bucket allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// See [`Bucket::interval_ns`].
    pub interval_ns: u64,
    /// See [`Bucket::burst_ns`].
    pub burst_ns: u64,
    /// See [`Bucket::max_open`].
    pub max_open: u64,
}

impl Shape {
    /// What a limit's buckets allow.
    fn of(limit: &Limit) -> Self {
        let (interval_ns, burst_ns) = limit.rate.map_or((0, 0), |rate| (rate.interval_ns, rate.burst_ns()));
        Self { interval_ns, burst_ns, max_open: limit.streams.map_or(UNLIMITED, u64::from) }
    }
}

/// The buckets that are in use.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub struct BucketTable {
    by_key: HashMap<NameHash, u32>,
    keys: HashMap<u32, NameHash>,
    /// Freed ones and when they may be used again.
    resting: VecDeque<(u64, u32)>,
    /// The first that was never used.
    next: u32,
    next_serial: u64,
    /// What was wrong with places at the last look, by bucket.
    suspected: HashMap<u32, u64>,
}

impl BucketTable {
    /// An empty table whose buckets have serials from `first_serial` on, which is not 0.
    #[must_use]
    pub fn new(first_serial: u64) -> Self {
        Self {
            by_key: HashMap::new(),
            keys: HashMap::new(),
            resting: VecDeque::new(),
            next: 1,
            next_serial: first_serial.max(1),
            suspected: HashMap::new(),
        }
    }

    /// Takes over the buckets of an earlier daemon; call it once, on an empty table, with all in order. `label` gives that of a bucket.
    pub fn adopt(
        &mut self,
        buckets: impl IntoIterator<Item = (u32, Bucket)>,
        mut label: impl FnMut(u32) -> Option<BucketLabel>,
        now: Now,
    ) {
        let rested_ns = now.boot_ns.saturating_add(QUARANTINE_NS);
        let mut free = Vec::new();
        for (index, bucket) in buckets.into_iter().filter(|(index, _)| *index != 0) {
            if bucket.serial == 0 {
                free.push(index);
                continue;
            }
            self.next = index + 1;
            self.next_serial = self.next_serial.max(bucket.serial + 1);
            match label(index).filter(|label| label.serial == bucket.serial) {
                Some(label) if !self.by_key.contains_key(&label.key) => {
                    self.by_key.insert(label.key, index);
                    self.keys.insert(index, label.key);
                }
                // It is charged as before, and nobody gets it.
                _ => {}
            }
        }
        // Those that were never used need no rest.
        self.resting
            .extend(free.into_iter().filter(|index| *index < self.next).map(|index| (rested_ns, index)));
    }

    /// Buckets in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// The buckets of all limits of the payer's server, each with its limit as it is now. `None`: there is none left, or it can't be
    /// written; the request must not pass.
    pub fn assign<D: Datapath>(
        &mut self,
        payer: &Payer<'_>,
        now: Now,
        datapath: &mut D,
    ) -> Option<GrantBuckets> {
        let mut buckets = [0; GRANT_BUCKETS];
        if payer.server.limits.len() > buckets.len() {
            return None;
        }
        for (to, limit) in buckets.iter_mut().zip(&payer.server.limits) {
            let (shown, exact) = payer.value(limit);
            let key = name_hash(&format!("{}\0{}\0{exact}", limit.name, limit.per.name()));
            *to = match self.by_key.get(&key) {
                Some(index) => {
                    datapath.limit_bucket(*index, &Shape::of(limit), now.boot_ns).ok()?;
                    *index
                }
                None => self.begin(key, limit, &shown, now, datapath)?,
            };
        }
        Some(buckets)
    }

    fn begin<D: Datapath>(
        &mut self,
        key: NameHash,
        limit: &Limit,
        shown: &str,
        now: Now,
        datapath: &mut D,
    ) -> Option<u32> {
        let index = match self.resting.front().copied() {
            Some((free_ns, index)) if free_ns <= now.boot_ns => {
                self.resting.pop_front();
                index
            }
            _ if self.next < MAX_BUCKETS => {
                self.next += 1;
                self.next - 1
            }
            _ => return None,
        };
        let serial = self.next_serial;
        self.next_serial += 1;
        let Shape { interval_ns, burst_ns, max_open } = Shape::of(limit);
        let bucket =
            Bucket { tat_ns: 0, interval_ns, burst_ns, open: 0, max_open, admitted: 0, limited: 0, serial };
        let label = BucketLabel {
            serial,
            key,
            limit: text(&limit.name),
            per: text(limit.per.name()),
            value: text(shown),
        };
        if datapath.begin_bucket(index, &bucket, &label).is_err() {
            self.resting.push_back((now.boot_ns.saturating_add(QUARANTINE_NS), index));
            return None;
        }
        self.by_key.insert(key, index);
        self.keys.insert(index, key);
        Some(index)
    }

    /// Whether it is time to look for buckets that nobody needs.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.by_key.len() > MAX_BUCKETS as usize / 2
    }

    /// Frees the buckets that no grant names, no connection has a place in, and that are full again: who comes back finds one that is
    /// the same.
    pub fn free<D: Datapath>(&mut self, named: &HashSet<u32>, now: Now, datapath: &mut D) {
        let unused: Vec<_> = self.keys.iter().filter(|(index, _)| !named.contains(*index)).collect();
        let idle = |index: u32, datapath: &mut D| {
            datapath.bucket(index).is_ok_and(|bucket| bucket.open == 0 && bucket.tat_ns <= now.boot_ns)
        };
        let free: Vec<_> = unused
            .into_iter()
            .map(|(index, key)| (*index, *key))
            .filter(|(index, _)| idle(*index, datapath))
            .collect();
        for (index, key) in free {
            if datapath.end_bucket(index).is_ok() {
                self.by_key.remove(&key);
                self.keys.remove(&index);
                self.resting.push_back((now.boot_ns.saturating_add(QUARANTINE_NS), index));
            }
        }
    }

    /// How many places of each bucket are taken.
    pub fn places<D: Datapath>(&self, datapath: &mut D) -> HashMap<u32, u64> {
        let open = |index: &u32| Some((*index, datapath.bucket(*index).ok()?.open));
        self.keys.keys().filter_map(open).collect()
    }

    /// Compares the places that are taken with the connections that have one, and gives back what is too many at two looks in a row: a
    /// connection that ended while the daemon carried its request can leave one behind. Buckets whose places are others than before the
    /// connections were looked at say nothing.
    pub fn settle_places<D: Datapath>(
        &mut self,
        before: &HashMap<u32, u64>,
        taken: &HashMap<u32, u64>,
        datapath: &mut D,
    ) {
        let mut suspected = HashMap::new();
        for index in self.keys.keys() {
            let Ok(bucket) = datapath.bucket(*index) else { continue };
            let wrong = bucket.open.wrapping_sub(taken.get(index).copied().unwrap_or(0));
            if wrong == 0 || before.get(index) != Some(&bucket.open) {
                continue;
            }
            if self.suspected.get(index) == Some(&wrong) {
                warn!(
                    bucket = index,
                    places = wrong as i64,
                    "places of a limit that no connection has are given back"
                );
                let _ = datapath.give_back_places(*index, wrong);
            } else {
                suspected.insert(*index, wrong);
            }
        }
        self.suspected = suspected;
    }
}

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
