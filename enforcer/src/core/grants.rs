//! Which token holds which slot of the kernel's grants.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use enforcer_common::abi::{
    GRANT_BUCKETS, GRANT_SLOT_BITS, Grant, GrantLabel, MAX_GRANTS, NameHash, Origin, REVOKED_BY_OPERATOR,
    grant_bit, grant_serial, text,
};

use tracing::error;

use crate::policy::MAX_LEEWAY_SECS;
use crate::revocation::name_hash;
use crate::token::{Fingerprint, VerifiedToken};

use super::remembered::{Claims, Remembered};
use super::{Datapath, Now};

/// Longest life of a grant: after it the token is verified again, with the keys of that time.
pub const GRANT_MAX_NS: u64 = 300 * 1_000_000_000;
/// How long a slot rests between two grants, and a grant whose time is over before its slot is freed: longer than any program
/// runs, so that none reads one half old and half new, and none still notes its serial in a flow.
pub const QUARANTINE_NS: u64 = 2 * 1_000_000_000;

/// Callers that may hold grants of one token at a time: with one a host could take all slots, by its many addresses.
pub(super) const MAX_CALLERS_PER_TOKEN: u32 = 4_096;
/// Others that are looked at when a token comes from one more.
const MAX_OTHERS: usize = 16;

/// Slots that grants which are kept for [`enforcer_common::abi::Flow::evicted_grants`] alone leave to others.
pub(super) const RESERVED_SLOTS: usize = MAX_GRANTS as usize / 4;

/// A grant that a verdict can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Its slot.
    pub slot: u32,
    /// Its serial.
    pub serial: u64,
    /// When it ends, on `CLOCK_BOOTTIME`.
    pub deadline_ns: u64,
    /// The token had none from this caller.
    pub is_new: bool,
}

/// What a grant is given for.
#[derive(Debug, Clone, Copy)]
pub struct GrantFor<'a> {
    /// The token's claims.
    pub token: &'a VerifiedToken,
    /// The token.
    pub fingerprint: Fingerprint,
    /// Number of the server.
    pub server_id: u32,
    /// Name of the server.
    pub server: &'a str,
    /// Policy generation.
    pub generation: u64,
    /// Who presents the token: [`Origin::caller`].
    pub caller: Origin,
    /// The workload's name.
    pub workload: &'a str,
    /// Hashes of its names.
    pub workload_hashes: [NameHash; 2],
    /// Buckets that its requests are charged to.
    pub buckets: [u32; GRANT_BUCKETS],
}

/// A token, who presents it, and the number of the server.
type Key = (Fingerprint, Origin, u32);

/// A slot's grant.
#[derive(Debug, Clone, Copy)]
struct InUse {
    key: Key,
    serial: u64,
    /// When its token is refused whatever leeway a policy allows, in Unix seconds.
    token_over_unix_secs: u64,
    buckets: [u32; GRANT_BUCKETS],
}

impl InUse {
    const fn new(key: Key, serial: u64, expires_at_unix_secs: u64, buckets: [u32; GRANT_BUCKETS]) -> Self {
        let token_over_unix_secs = expires_at_unix_secs.saturating_add(MAX_LEEWAY_SECS);
        Self { key, serial, token_over_unix_secs, buckets }
    }
}

/// The slots, by token, caller and server.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub struct GrantTable {
    held: BTreeMap<Key, Granted>,
    /// How many of those each token has.
    per_token: HashMap<Fingerprint, u32>,
    /// Slots in use, by the end of their grants: also of those that gave way to another grant of the same token.
    by_deadline: BTreeMap<(u64, u32), InUse>,
    /// When tokens end, in Unix seconds, and their slots: what streams must end next.
    by_end: BTreeSet<(u64, u32)>,
    /// Freed slots and when they may be used again.
    resting: VecDeque<(u64, u32)>,
    next_slot: u32,
    next_number: u64,
    pub(super) remembered: Remembered,
}

impl GrantTable {
    /// An empty table whose serials start at `first_serial`, which must be at least 65,536.
    #[must_use]
    pub fn new(first_serial: u64) -> Self {
        Self {
            held: BTreeMap::new(),
            per_token: HashMap::new(),
            by_deadline: BTreeMap::new(),
            by_end: BTreeSet::new(),
            resting: VecDeque::new(),
            next_slot: 0,
            next_number: (first_serial >> GRANT_SLOT_BITS).max(1),
            remembered: Remembered::default(),
        }
    }

    /// Takes over the grants that an earlier daemon gave; call it once, on an empty table, with all slots in order. Those of another
    /// generation and revoked ones are not given to a token again, but their slots are in use until their time is over.
    pub fn adopt(&mut self, slots: impl IntoIterator<Item = (u32, Grant)>, generation: u64, now: Now) {
        let mut free = Vec::new();
        for (slot, grant) in slots {
            if grant.serial == 0 {
                free.push(slot);
                continue;
            }
            self.next_slot = slot + 1;
            self.next_number = self.next_number.max(grant.serial >> GRANT_SLOT_BITS);
            let key = (Fingerprint(grant.fingerprint), grant.caller, grant.server_id);
            let in_use = InUse::new(key, grant.serial, grant.expires_at_unix_secs, grant.buckets);
            self.by_deadline.insert((grant.deadline_ns, slot), in_use);
            self.by_end.insert((grant.ends_at_unix_secs, slot));
            let newest = self.held.get(&key).is_none_or(|held| held.serial < grant.serial);
            if newest && grant.generation == generation && grant.revoked == 0 {
                let granted =
                    Granted { slot, serial: grant.serial, deadline_ns: grant.deadline_ns, is_new: false };
                self.hold(key, granted);
            }
        }
        // Slots that were never used need no rest.
        let rested_ns = now.boot_ns.saturating_add(QUARANTINE_NS);
        let used = free.into_iter().filter(|slot| *slot < self.next_slot);
        self.resting.extend(used.map(|slot| (rested_ns, slot)));
    }

    /// Grants in force, or not yet freed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether no grant is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The slots that were ever used are those below this one.
    #[must_use]
    pub const fn slots_used(&self) -> u32 {
        self.next_slot
    }

    /// Gives a verified token its grant, or extends the one it has. A grant that was revoked or voided in the kernel is never
    /// revived: the token, if it is still good, gets another. `None`: no slot is free, or the token's time is over; the
    /// request must not pass, as nothing could end what it opens.
    pub fn grant<D: Datapath>(&mut self, ask: GrantFor<'_>, now: Now, datapath: &mut D) -> Option<Granted> {
        let token = ask.token;
        let left_secs = token.not_after_unix_secs.checked_sub(now.unix_secs)?;
        // To the instant: a grant that ended with the second in which it was given would outlive its token by what is over of that.
        let left_ns = left_secs.saturating_mul(1_000_000_000).saturating_sub(now.unix_subsec_ns.into());
        let deadline_ns = now.boot_ns.saturating_add(left_ns.min(GRANT_MAX_NS));
        let key = (ask.fingerprint, ask.caller, ask.server_id);
        let held = match self.held.get(&key) {
            Some(held) => {
                let current = datapath.grant(held.slot).ok()?;
                (current.serial == held.serial && current.revoked == 0).then_some((*held, current.requests))
            }
            None => None,
        };
        let (slot, serial, requests) = match held {
            Some((held, requests)) => (held.slot, held.serial, requests),
            None => {
                let slot = self.free_slot(now, datapath)?;
                self.next_number += 1;
                (slot, grant_serial(self.next_number, slot), 0)
            }
        };
        let grant = Grant {
            serial,
            deadline_ns,
            generation: ask.generation,
            caller: ask.caller,
            principal_id: token.principal().id(),
            granted_ns: now.boot_ns,
            expires_at_unix_secs: token.expires_at,
            ends_at_unix_secs: token.not_after_unix_secs,
            requests,
            fingerprint: ask.fingerprint.0,
            buckets: ask.buckets,
            server_id: ask.server_id,
            revoked: 0,
        };
        // First the label: who looks for grants to revoke finds every grant labelled.
        if datapath.set_grant_label(slot, &label(&ask, serial)).is_err()
            || datapath.set_grant(slot, &grant).is_err()
        {
            if held.is_none() {
                self.resting.push_back((now.boot_ns.saturating_add(QUARANTINE_NS), slot));
            }
            return None;
        }
        if let Some((old, _)) = held {
            self.by_deadline.remove(&(old.deadline_ns, slot));
        }
        let evidence = Arc::clone(&token.evidence);
        self.remembered.keep(Claims { serial, server_id: ask.server_id, evidence });
        let granted = Granted { slot, serial, deadline_ns, is_new: held.is_none() };
        self.hold(key, granted);
        self.by_deadline.insert((deadline_ns, slot), InUse::new(key, serial, token.expires_at, ask.buckets));
        self.by_end.insert((token.not_after_unix_secs, slot));
        Some(granted)
    }

    /// Others that hold a grant of the same token; of many some.
    #[must_use]
    pub fn other_callers(&self, fingerprint: Fingerprint, but: &Origin) -> BTreeSet<Origin> {
        const LAST: Origin = Origin { words: [u64::MAX; 4] };
        let of_token = (fingerprint, Origin::NONE, 0)..=(fingerprint, LAST, u32::MAX);
        let callers = self.held.range(of_token).map(|((_, caller, _), _)| *caller);
        callers.filter(|caller| caller != but).take(MAX_OTHERS).collect()
    }

    /// Whether a token has so many grants that one more caller gets none.
    #[must_use]
    pub fn has_too_many_callers(&self, fingerprint: Fingerprint, caller: &Origin) -> bool {
        let own = (fingerprint, *caller, 0)..=(fingerprint, *caller, u32::MAX);
        self.per_token.get(&fingerprint).is_some_and(|held| *held >= MAX_CALLERS_PER_TOKEN)
            && self.held.range(own).next().is_none()
    }

    fn hold(&mut self, key: Key, granted: Granted) {
        if self.held.insert(key, granted).is_none() {
            *self.per_token.entry(key.0).or_default() += 1;
        }
    }

    fn let_go(&mut self, key: &Key) {
        if self.held.remove(key).is_some()
            && let Some(held) = self.per_token.get_mut(&key.0)
        {
            *held -= 1;
            if *held == 0 {
                self.per_token.remove(&key.0);
            }
        }
    }

    /// Buckets that grants name, also those whose time is over.
    #[must_use]
    pub fn buckets(&self) -> HashSet<u32> {
        self.by_deadline.values().flat_map(|in_use| in_use.buckets).collect()
    }

    /// A grant that is carried into another policy is charged to other buckets.
    pub(super) fn set_buckets(&mut self, grant: &Grant) {
        let slot = enforcer_common::abi::grant_slot(grant.serial);
        if let Some(in_use) = self.by_deadline.get_mut(&(grant.deadline_ns, slot)) {
            in_use.buckets = grant.buckets;
        }
    }

    fn free_slot<D: Datapath>(&mut self, now: Now, datapath: &mut D) -> Option<u32> {
        if let Some((free_ns, slot)) = self.resting.front().copied()
            && free_ns <= now.boot_ns
        {
            self.resting.pop_front();
            return Some(slot);
        }
        if self.next_slot >= MAX_GRANTS {
            return None;
        }
        datapath.set_grant_slots(self.next_slot + 1).ok()?;
        self.next_slot += 1;
        Some(self.next_slot - 1)
    }

    /// Revokes a grant that should not have been given: its token was revoked meanwhile.
    pub fn revoke<D: Datapath>(granted: Granted, datapath: &mut D) {
        let revoked = datapath.grant(granted.slot).and_then(|current| {
            let revoked = Grant { revoked: REVOKED_BY_OPERATOR, ..current };
            if current.serial == granted.serial { datapath.set_grant(granted.slot, &revoked) } else { Ok(()) }
        });
        if let Err(error) = revoked {
            error!(%error, slot = granted.slot, "a grant could not be revoked; it has no verdict");
        }
    }

    /// Whether a token has ended since this was asked last, so that its streams must end.
    pub fn some_token_ended(&mut self, now: Now) -> bool {
        let later = self.by_end.split_off(&(now.unix_secs.saturating_add(1), 0));
        let ended = std::mem::replace(&mut self.by_end, later);
        !ended.is_empty()
    }

    /// Whether there are grants whose time is over and whose slots may be free.
    #[must_use]
    pub fn some_is_over(&self, now: Now) -> bool {
        self.by_deadline.first_key_value().is_some_and(|((deadline_ns, _), _)| over(*deadline_ns, now))
    }

    /// Whether fewer slots than `RESERVED_SLOTS` are free.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.by_deadline.len() > MAX_GRANTS as usize - RESERVED_SLOTS
    }

    /// Frees the slots of grants whose time is over, but for those that revocations must still find: whose serial is one of `named`,
    /// which flows name, or which has one of the bits `evicted`, that flows have, and a token that is still good. Gives the bits
    /// of the latter.
    pub fn free<D: Datapath>(
        &mut self,
        named: &HashSet<u64>,
        evicted: u64,
        now: Now,
        datapath: &mut D,
    ) -> u64 {
        let mut kept = 0;
        let mut free = Vec::new();
        for (&at, in_use) in self.by_deadline.iter().take_while(|((at, _), _)| over(*at, now)) {
            let InUse { key, serial, token_over_unix_secs, .. } = *in_use;
            if named.contains(&serial) {
                continue;
            }
            if evicted & grant_bit(serial) != 0 && now.unix_secs < token_over_unix_secs {
                kept |= grant_bit(serial);
            } else {
                free.push((at, key));
            }
        }
        for (at, key) in free {
            let slot = at.1;
            let Ok(current) = datapath.grant(slot) else { return kept };
            if datapath.set_grant(slot, &Grant { serial: 0, ..current }).is_err() {
                return kept;
            }
            self.remembered.forget(current.serial);
            self.by_deadline.remove(&at);
            self.by_end.remove(&(current.ends_at_unix_secs, slot));
            if self.held.get(&key).is_some_and(|held| held.slot == slot) {
                self.let_go(&key);
            }
            self.resting.push_back((now.boot_ns.saturating_add(QUARANTINE_NS), slot));
        }
        kept
    }
}

fn over(deadline_ns: u64, now: Now) -> bool {
    deadline_ns.saturating_add(QUARANTINE_NS) <= now.boot_ns
}

fn label(ask: &GrantFor<'_>, serial: u64) -> GrantLabel {
    let token = ask.token;
    let client_id = token.client_id.as_deref();
    GrantLabel {
        serial,
        issuer: text(&token.issuer.name),
        subject: text(&token.subject),
        client_id: text(client_id.unwrap_or_default()),
        issued_at_unix_secs: token.issued_at.unwrap_or(0),
        issuer_name_hash: name_hash(&token.issuer.name),
        issuer_hash: name_hash(&token.issuer.issuer),
        subject_hash: name_hash(&token.subject),
        client_hash: client_id.map(name_hash).unwrap_or_default(),
        server_hash: name_hash(ask.server),
        workload_hashes: ask.workload_hashes,
        workload: text(ask.workload),
    }
}
