//! A datapath of plain collections.

use std::collections::{BTreeMap, BTreeSet};

use enforcer_common::abi::{
    Bucket, BucketLabel, Ends, FirstUser, Flow, Grant, GrantLabel, HeadDigest, NameHash, Origin, Reply,
    SourceKey, Verdict,
};
use enforcer_common::flow::Ctl;

use super::everything;
use crate::core::*;
use crate::http::answer::Answer;
use crate::revocation::Revocations;

#[derive(Default)]
pub(in crate::core) struct Fake {
    pub(in crate::core) server: Vec<u8>,
    pub(in crate::core) client: Vec<u8>,
    pub(in crate::core) backs: Vec<(Ctl, HandBack)>,
    pub(in crate::core) destroyed: BTreeSet<u64>,
    /// Serials of the grants by whose right bytes went to the server.
    pub(in crate::core) used: Vec<u64>,
    pub(in crate::core) verdicts: BTreeMap<HeadDigest, Verdict>,
    pub(in crate::core) grants: BTreeMap<u32, Grant>,
    pub(in crate::core) labels: BTreeMap<u32, GrantLabel>,
    pub(in crate::core) buckets: BTreeMap<u32, (Bucket, BucketLabel)>,
    pub(in crate::core) holders: BTreeMap<Origin, CallerFacts>,
    pub(in crate::core) first_users: BTreeMap<NameHash, FirstUser>,
    /// First users can't be remembered.
    pub(in crate::core) no_first_users: bool,
    pub(in crate::core) flows: BTreeMap<u64, Flow>,
    pub(in crate::core) counts: Vec<&'static str>,
    /// Bytes can't be injected.
    pub(in crate::core) full: bool,
    /// Grants can't be written.
    pub(in crate::core) no_grants: bool,
    pub(in crate::core) revocations: Revocations,
    pub(in crate::core) epoch: u64,
    /// The revocations can't be read.
    pub(in crate::core) no_revocations: bool,
    /// Calls of the daemon after which the operator's side takes its next step.
    pub(in crate::core) steps_at: Vec<u32>,
    pub(in crate::core) calls: u32,
    pub(in crate::core) caller: CallerFacts,
    /// Requests that were charged to where they come from.
    pub(in crate::core) source_charges: u32,
    /// What those are over.
    pub(in crate::core) source_wait_ns: Option<u64>,
}

impl Fake {
    /// The operator's side of a revocation of everything, a step at a time: the list, the epoch, the grants.
    pub(in crate::core) fn operator(&mut self) {
        self.calls += 1;
        while self.steps_at.first().is_some_and(|at| *at < self.calls) {
            self.operator_step();
        }
    }

    pub(in crate::core) fn operator_step(&mut self) {
        match self.steps_at.len() {
            3 => _ = self.revocations.insert(1, everything()),
            2 => self.epoch += 1,
            _ => self.grants.values_mut().for_each(|grant| grant.revoked = 1),
        }
        self.steps_at.remove(0);
    }
}

impl Datapath for Fake {
    type Error = &'static str;

    fn to_server(
        &mut self,
        _server_id: u32,
        _cookie: u64,
        _ctl: Ctl,
        grant_serial: u64,
        bytes: &[u8],
    ) -> Result<(), Self::Error> {
        if self.full {
            return Err("full");
        }
        self.used.push(grant_serial);
        self.server.extend_from_slice(bytes);
        Ok(())
    }

    fn to_client(&mut self, _cookie: u64, _ctl: Ctl, answer: &Answer) -> Result<(), Self::Error> {
        self.client.extend_from_slice(&answer.bytes);
        Ok(())
    }

    fn hand_back(&mut self, _cookie: u64, expected: Ctl, to: HandBack) -> Result<(), Self::Error> {
        self.backs.push((expected, to));
        Ok(())
    }

    fn destroy(&mut self, cookie: u64, _netns_cookie: u64, _after_ns: u64) {
        self.destroyed.insert(cookie);
    }

    fn destroy_stray(&mut self, cookie: u64, _netns_cookie: u64, _interface: u32, _ends: Ends) {
        self.destroyed.insert(cookie);
    }

    fn revocation_epoch(&mut self) -> Result<u64, Self::Error> {
        self.operator();
        Ok(self.epoch)
    }

    fn revocations(&mut self) -> Result<Revocations, Self::Error> {
        self.operator();
        if self.no_revocations { Err("unreadable") } else { Ok(self.revocations.clone()) }
    }

    fn set_grant_slots(&mut self, _slots: u32) -> Result<(), Self::Error> {
        Ok(())
    }

    fn flows(&mut self, each: &mut dyn FnMut(u64, &Flow)) -> Result<(), Self::Error> {
        self.flows.iter().for_each(|(cookie, flow)| each(*cookie, flow));
        Ok(())
    }

    fn flow_exists(&mut self, _cookie: u64) -> bool {
        true
    }

    fn peer(&mut self, _cookie: u64) -> String {
        String::new()
    }

    fn holder(&mut self, caller: &Origin) -> CallerFacts {
        self.holders.get(caller).cloned().unwrap_or_default()
    }

    fn first_user(&mut self, key: &NameHash) -> Result<Option<FirstUser>, Self::Error> {
        Ok(self.first_users.get(key).copied())
    }

    fn set_first_user(&mut self, key: &NameHash, user: &FirstUser) -> Result<(), Self::Error> {
        if self.no_first_users {
            return Err("full");
        }
        self.first_users.insert(*key, *user);
        Ok(())
    }

    fn caller(&mut self, _cookie: u64, _origin: &Origin) -> CallerFacts {
        self.caller.clone()
    }

    fn set_verdict(&mut self, digest: HeadDigest, verdict: Verdict) -> Result<(), Self::Error> {
        self.operator();
        self.verdicts.insert(digest, verdict);
        Ok(())
    }

    fn grant(&mut self, slot: u32) -> Result<Grant, Self::Error> {
        self.operator();
        self.grants.get(&slot).copied().ok_or("no such slot")
    }

    fn set_grant(&mut self, slot: u32, grant: &Grant) -> Result<(), Self::Error> {
        self.operator();
        if self.no_grants {
            return Err("full");
        }
        self.grants.insert(slot, *grant);
        Ok(())
    }

    fn grant_label(&mut self, slot: u32) -> Result<GrantLabel, Self::Error> {
        self.labels.get(&slot).copied().ok_or("no such slot")
    }

    fn set_grant_label(&mut self, slot: u32, label: &GrantLabel) -> Result<(), Self::Error> {
        self.operator();
        self.labels.insert(slot, *label);
        Ok(())
    }

    fn bucket(&mut self, index: u32) -> Result<Bucket, Self::Error> {
        self.buckets.get(&index).map(|(bucket, _)| *bucket).ok_or("no such bucket")
    }

    fn begin_bucket(&mut self, index: u32, bucket: &Bucket, label: &BucketLabel) -> Result<(), Self::Error> {
        self.buckets.insert(index, (*bucket, *label));
        Ok(())
    }

    fn limit_bucket(&mut self, index: u32, shape: &Shape, now_ns: u64) -> Result<(), Self::Error> {
        let (bucket, _) = self.buckets.get_mut(&index).ok_or("no such bucket")?;
        let Shape { interval_ns, burst_ns, max_open } = *shape;
        let (old, new) = ((bucket.interval_ns, bucket.burst_ns), (interval_ns, burst_ns));
        let tat_ns = enforcer_common::limit::changed(bucket.tat_ns, now_ns, old, new);
        *bucket = Bucket { tat_ns, interval_ns, burst_ns, max_open, ..*bucket };
        Ok(())
    }

    fn end_bucket(&mut self, index: u32) -> Result<(), Self::Error> {
        self.buckets.remove(&index).map(|_| ()).ok_or("no such bucket")
    }

    fn give_back_places(&mut self, index: u32, places: u64) -> Result<(), Self::Error> {
        let (bucket, _) = self.buckets.get_mut(&index).ok_or("no such bucket")?;
        bucket.open = bucket.open.wrapping_sub(places);
        Ok(())
    }

    fn charge(&mut self, _cookie: u64, buckets: &GrantBuckets, now_ns: u64) -> Result<(), u64> {
        for index in buckets.iter().take_while(|index| **index != 0) {
            let (bucket, _) = self.buckets.get_mut(index).ok_or(u64::MAX)?;
            bucket.tat_ns =
                enforcer_common::limit::admit(bucket.tat_ns, now_ns, bucket.interval_ns, bucket.burst_ns)?;
        }
        Ok(())
    }

    fn charge_source(&mut self, _source: &SourceKey, _now_ns: u64) -> Result<(), u64> {
        self.source_charges += 1;
        self.source_wait_ns.map_or(Ok(()), Err)
    }

    fn set_reply(&mut self, _id: u32, _reply: &Reply) -> Result<(), Self::Error> {
        Ok(())
    }

    fn count(&mut self, reason: &'static str) {
        self.counts.push(reason);
    }
}
