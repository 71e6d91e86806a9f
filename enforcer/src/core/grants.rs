//! Which token holds which slot of the kernel's grants.

use std::collections::{BTreeSet, HashMap, VecDeque};

use enforcer_common::abi::{GRANT_BUCKETS, Grant, GrantLabel, MAX_GRANTS, text};

use crate::token::{Fingerprint, VerifiedToken};

use super::{Datapath, Now};

/// Longest life of a grant: after it the token is verified again, with the keys of that time.
pub const GRANT_MAX_NS: u64 = 300 * 1_000_000_000;
/// How long a slot rests between two grants: longer than any program runs, so that none reads one half old and half new.
pub const QUARANTINE_NS: u64 = 2 * 1_000_000_000;

/// A grant that a verdict can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Its slot.
    pub slot: u32,
    /// Its serial.
    pub serial: u64,
    /// When it ends, on `CLOCK_BOOTTIME`.
    pub deadline_ns: u64,
}

/// The slots, by token and server.
#[derive(Debug)]
pub struct GrantTable {
    held: HashMap<(Fingerprint, u32), Granted>,
    by_deadline: BTreeSet<(u64, u32, Fingerprint, u32)>,
    /// Freed slots and when they may be used again.
    resting: VecDeque<(u64, u32)>,
    next_slot: u32,
    next_serial: u64,
}

impl GrantTable {
    /// An empty table whose serials start at `first_serial`, which must not be 0.
    #[must_use]
    pub fn new(first_serial: u64) -> Self {
        Self {
            held: HashMap::new(),
            by_deadline: BTreeSet::new(),
            resting: VecDeque::new(),
            next_slot: 0,
            next_serial: first_serial,
        }
    }

    /// Grants in force, or not yet swept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether no grant is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Gives a verified token its grant, or extends the one it has. `None`: no slot is free, or the token's time is over;
    /// the request itself may pass, the next one will be judged again.
    pub fn grant<D: Datapath>(
        &mut self,
        token: &VerifiedToken,
        fingerprint: Fingerprint,
        server_id: u32,
        generation: u64,
        now: Now,
        datapath: &mut D,
    ) -> Option<Granted> {
        let left_ns = token.not_after_unix_secs.checked_sub(now.unix_secs)?.saturating_mul(1_000_000_000);
        let deadline_ns = now.boot_ns.saturating_add(left_ns.min(GRANT_MAX_NS));
        let key = (fingerprint, server_id);
        let (slot, serial, requests) = match self.held.get(&key) {
            Some(held) => {
                let current = datapath.grant(held.slot).ok()?;
                // Somebody voided or revoked it behind our back: that stands.
                if current.serial != held.serial || current.revoked != 0 {
                    return None;
                }
                (held.slot, held.serial, current.requests)
            }
            None => {
                let slot = self.free_slot(now)?;
                self.next_serial += 1;
                (slot, self.next_serial, 0)
            }
        };
        let grant = Grant {
            serial,
            deadline_ns,
            generation,
            workload_id: 0,
            principal_id: token.principal().id(),
            granted_ns: now.boot_ns,
            expires_at_unix_secs: token.expires_at,
            requests,
            fingerprint: fingerprint.0,
            buckets: [0; GRANT_BUCKETS],
            server_id,
            revoked: 0,
        };
        let label = GrantLabel {
            serial,
            issuer: text(&token.issuer.name),
            subject: text(&token.subject),
            client_id: text(token.client_id.as_deref().unwrap_or_default()),
        };
        if datapath.set_grant_label(slot, &label).is_err() || datapath.set_grant(slot, &grant).is_err() {
            return None;
        }
        let granted = Granted { slot, serial, deadline_ns };
        if let Some(old) = self.held.insert(key, granted) {
            self.by_deadline.remove(&(old.deadline_ns, old.slot, fingerprint, server_id));
        }
        self.by_deadline.insert((deadline_ns, slot, fingerprint, server_id));
        Some(granted)
    }

    fn free_slot(&mut self, now: Now) -> Option<u32> {
        if let Some((free_ns, slot)) = self.resting.front().copied()
            && free_ns <= now.boot_ns
        {
            self.resting.pop_front();
            return Some(slot);
        }
        if self.next_slot >= MAX_GRANTS {
            return None;
        }
        self.next_slot += 1;
        Some(self.next_slot - 1)
    }

    /// Frees the slots of grants whose time is over.
    pub fn sweep<D: Datapath>(&mut self, now: Now, datapath: &mut D) {
        while let Some(&(deadline_ns, slot, fingerprint, server_id)) = self.by_deadline.first() {
            if deadline_ns > now.boot_ns {
                break;
            }
            let Ok(current) = datapath.grant(slot) else { break };
            if datapath.set_grant(slot, &Grant { serial: 0, ..current }).is_err() {
                break;
            }
            self.by_deadline.pop_first();
            self.held.remove(&(fingerprint, server_id));
            self.resting.push_back((now.boot_ns.saturating_add(QUARANTINE_NS), slot));
        }
    }
}
