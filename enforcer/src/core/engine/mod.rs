//! The engine: takes the kernel's records, decides each request, and has its bytes carried on.
//! `records.rs` reads the records, `decide.rs` finds out what a request is, `outcome.rs` gives or refuses what it asks for, `punted.rs` follows one connection.

mod decide;
mod error;
mod log_limit;
mod outcome;
mod punted;
mod records;
mod refuse;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use enforcer_common::abi::{FLOW_OBSERVE, Flow};
use enforcer_common::digest::DigestKey;
use enforcer_common::flow::{Ctl, State};
use tracing::{info, warn};

use crate::authz::KeyLookup;
use crate::keys::KeySnapshot;
use crate::policy::Mode;
use crate::token::Fingerprinter;

use super::{BucketTable, Datapath, Endpoints, GrantTable, HandBack, Now, ReplyTable, Revoked, Sweeper};

pub use error::EngineError;
use log_limit::LogLimit;
pub(super) use punted::FLOW_BYTES;
use punted::{Punted, Stage};

/// Bytes of one flow that may wait for a decision.
const PARKED_MAX_BYTES: usize = 1 << 20;
/// Bytes of all flows that may wait for a decision.
pub(super) const PARKED_TOTAL_MAX_BYTES: usize = 64 << 20;
/// Flows that the engine follows.
pub(super) const FLOWS_MAX: usize = 65_536;
/// How long a head may take to arrive, or its decision to be made.
const HEAD_TIMEOUT_NS: u64 = 30_000_000_000;
/// How long a closing answer may be read before the connection is destroyed.
const LINGER_NS: u64 = 1_000_000_000;
/// How often flows are looked for whose end the kernel could not report.
const SWEEP_NS: u64 = 10_000_000_000;

/// A key that the engine waits for. Answer with [`Engine::keys_refreshed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRequest {
    /// Flow that waits.
    pub cookie: u64,
    /// Epoch in which it waits.
    pub epoch: u32,
    /// Name of the issuer in the policy.
    pub issuer: String,
    /// Key id, chosen by the client.
    pub kid: String,
}

/// A flow that an earlier daemon had in its hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orphan {
    /// Socket cookie.
    pub cookie: u64,
    /// Its control word: punted, or dead and waiting for its socket to be destroyed.
    pub ctl: Ctl,
    /// Network namespace of the server's socket.
    pub netns_cookie: u64,
    /// Observe mode: its bytes have passed already.
    pub observed: bool,
}

impl Orphan {
    /// The flow, if it was in the daemon's hands.
    #[must_use]
    pub fn of(cookie: u64, flow: &Flow) -> Option<Self> {
        let ctl = Ctl(flow.ctl);
        let held = ctl.state() == State::Punted as u64 || ctl.state() == State::Dead as u64;
        let observed = flow.flags & FLOW_OBSERVE != 0;
        held.then_some(Self { cookie, ctl, netns_cookie: flow.netns_cookie, observed })
    }
}

/// Observe mode: the flow can't be followed any more. Late bytes only mean that the next batch tries again.
fn let_go<D: Datapath>(cookie: u64, expected: Ctl, datapath: &mut D) {
    let _ = datapath.hand_back(cookie, expected, HandBack::empty(State::Opaque, expected.epoch()));
}

/// Random secrets of one load.
#[cfg_attr(test, derive(Clone))]
pub struct Secrets {
    /// Key of the head digests; the kernel has the same.
    pub digest: Box<DigestKey>,
    /// Key of the token fingerprints.
    pub fingerprint: Fingerprinter,
}

/// The engine.
#[cfg_attr(test, derive(Clone))]
pub struct Engine {
    pub(super) endpoints: Endpoints,
    pub(super) mode: Mode,
    pub(super) generation: u64,
    secrets: Secrets,
    pub(super) grants: GrantTable,
    pub(super) buckets: BucketTable,
    pub(super) sweeper: Sweeper,
    revoked: Revoked,
    replies: ReplyTable,
    flows: HashMap<u64, Punted>,
    parked_bytes: usize,
    /// Flows that this batch of records touched.
    touched: BTreeSet<u64>,
    /// When heads that are not decided run out of time.
    timeouts: BTreeMap<(u64, u64), u32>,
    key_requests: Vec<KeyRequest>,
    next_sweep_ns: u64,
    log: LogLimit,
    /// A flood of refusals hides no alarm.
    alarms: LogLimit,
}

impl Engine {
    /// An engine for a policy's endpoints and mode.
    #[must_use]
    pub fn new(
        (endpoints, mode): (Endpoints, Mode),
        generation: u64,
        first_serial: u64,
        secrets: Secrets,
    ) -> Self {
        Self {
            endpoints,
            mode,
            generation,
            secrets,
            grants: GrantTable::new(first_serial),
            buckets: BucketTable::new(first_serial),
            sweeper: Sweeper::default(),
            revoked: Revoked::default(),
            replies: ReplyTable::default(),
            flows: HashMap::new(),
            parked_bytes: 0,
            touched: BTreeSet::new(),
            timeouts: BTreeMap::new(),
            key_requests: Vec::new(),
            next_sweep_ns: 0,
            log: LogLimit::default(),
            alarms: LogLimit::default(),
        }
    }

    /// The templates, for those that are made beforehand.
    pub fn replies(&mut self) -> &mut ReplyTable {
        &mut self.replies
    }

    /// The grants, for those that an earlier daemon gave.
    pub fn grants(&mut self) -> &mut GrantTable {
        &mut self.grants
    }

    /// The buckets of limits, for those that an earlier daemon began.
    pub fn buckets(&mut self) -> &mut BucketTable {
        &mut self.buckets
    }

    /// Takes the keys that are asked for.
    pub fn take_key_requests(&mut self) -> Vec<KeyRequest> {
        std::mem::take(&mut self.key_requests)
    }

    /// Flows that are followed.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// Ends what an earlier daemon had in its hands when it died: nobody knows how far it got. Call it when all records have been
    /// read that were there when `orphans` were listed: flows whose first bytes were among them are ours, and go on.
    pub fn end_orphans<D: Datapath>(&mut self, orphans: &[Orphan], datapath: &mut D) {
        for orphan in orphans.iter().filter(|orphan| !self.flows.contains_key(&orphan.cookie)) {
            datapath.count("daemon-died");
            if orphan.observed {
                let_go(orphan.cookie, orphan.ctl, datapath);
            } else {
                datapath.destroy(orphan.cookie, orphan.netns_cookie, 0);
            }
        }
    }

    /// After a batch of records: gives back to the kernel what is decided.
    pub fn end_batch<D: Datapath>(&mut self, datapath: &mut D) {
        for cookie in std::mem::take(&mut self.touched) {
            self.hand_back(cookie, datapath);
        }
    }

    fn hand_back<D: Datapath>(&mut self, cookie: u64, datapath: &mut D) {
        let Some(flow) = self.flows.get(&cookie) else { return };
        let Some(to) = flow.hand_back() else {
            if matches!(flow.stage, Stage::Head | Stage::Waiting) {
                self.timeouts.insert((flow.since_ns + HEAD_TIMEOUT_NS, cookie), flow.epoch);
            }
            return;
        };
        let expected = Ctl::new(State::Punted, flow.epoch, flow.received_bytes);
        if datapath.hand_back(cookie, expected, to).is_err() {
            let netns_cookie = flow.netns_cookie;
            self.give_up(cookie, netns_cookie, EngineError::InjectFailed, datapath);
        }
    }

    /// An issuer's keys were refreshed, or could not be, for this flow: decides with what there is.
    pub fn keys_refreshed<D: Datapath>(
        &mut self,
        cookie: u64,
        epoch: u32,
        now: Now,
        keys: &KeySnapshot,
        datapath: &mut D,
    ) {
        let Some(flow) = self.flows.get_mut(&cookie) else { return };
        if flow.epoch != epoch || flow.stage != Stage::Waiting {
            return;
        }
        let netns_cookie = flow.netns_cookie;
        flow.stage = Stage::Head;
        self.touched.insert(cookie);
        if let Err(error) = self.try_decide(cookie, KeyLookup::Final, now, keys, datapath) {
            self.give_up(cookie, netns_cookie, error, datapath);
        }
        self.end_batch(datapath);
    }

    /// Time passes: a few times per second.
    pub fn tick<D: Datapath>(&mut self, now: Now, datapath: &mut D) {
        while let Some((&(deadline_ns, cookie), &epoch)) = self.timeouts.first_key_value() {
            if deadline_ns > now.boot_ns {
                break;
            }
            self.timeouts.pop_first();
            let Some(flow) = self.flows.get(&cookie) else { continue };
            let late = now.boot_ns.saturating_sub(flow.since_ns) >= HEAD_TIMEOUT_NS;
            if flow.epoch == epoch && late && matches!(flow.stage, Stage::Head | Stage::Waiting) {
                let netns_cookie = flow.netns_cookie;
                self.give_up(cookie, netns_cookie, EngineError::HeadTimeout, datapath);
            }
        }
        self.look_for_revocations(now, datapath);
        self.sweeper.tick(now, self.mode, &mut self.grants, datapath);
        self.log.refill();
        self.alarms.refill();
        if now.boot_ns >= self.next_sweep_ns {
            self.next_sweep_ns = now.boot_ns + SWEEP_NS;
            self.look_at_buckets(now, datapath);
            let gone: Vec<u64> =
                self.flows.keys().copied().filter(|cookie| !datapath.flow_exists(*cookie)).collect();
            gone.into_iter().for_each(|cookie| self.forget(cookie));
        }
    }

    /// Grants were revoked: connections that carry answers to their requests end with one of the next ticks.
    pub const fn sweep_soon(&mut self, now: Now) {
        self.sweeper.wake(now);
    }

    /// Whether other tokens may be revoked than when this was asked last.
    fn look_for_revocations<D: Datapath>(&mut self, now: Now, datapath: &mut D) -> bool {
        let changed = self.revoked.look(datapath);
        if changed {
            self.sweeper.wake(now);
        }
        changed
    }

    /// Frees buckets if they are getting short, and corrects the places in them.
    fn look_at_buckets<D: Datapath>(&mut self, now: Now, datapath: &mut D) {
        if self.buckets.is_empty() {
            return;
        }
        if self.buckets.is_short() {
            self.buckets.free(&self.grants.buckets(), now, datapath);
        }
        let before = self.buckets.places(datapath);
        let mut taken = HashMap::new();
        let mut seen = BTreeSet::new();
        let all = datapath.flows(&mut |cookie, flow| {
            if seen.insert(cookie) {
                for index in flow.buckets.iter().take_while(|index| **index != 0) {
                    *taken.entry(*index).or_insert(0_u64) += 1;
                }
            }
        });
        match all {
            Ok(()) => self.buckets.settle_places(&before, &taken, datapath),
            Err(error) => warn!(%error, "not all flows could be looked through for places in limits"),
        }
    }

    /// Keeps the parked bytes of all flows bounded: the oldest unfinished heads give way, so that clients which never finish theirs
    /// can't keep others out.
    fn make_room<D: Datapath>(&mut self, bytes: usize, but: u64, datapath: &mut D) {
        while self.parked_bytes + bytes > PARKED_TOTAL_MAX_BYTES {
            let Some((&(_, cookie), &epoch)) = self.timeouts.first_key_value() else { return };
            self.timeouts.pop_first();
            let Some(flow) = self.flows.get(&cookie) else { continue };
            if cookie != but && flow.epoch == epoch && matches!(flow.stage, Stage::Head | Stage::Waiting) {
                let netns_cookie = flow.netns_cookie;
                self.give_up(cookie, netns_cookie, EngineError::ParkedFull, datapath);
            }
        }
    }

    fn forget(&mut self, cookie: u64) {
        if let Some(flow) = self.flows.remove(&cookie) {
            self.parked_bytes -= flow.parked.len();
            self.timeouts.remove(&(flow.since_ns + HEAD_TIMEOUT_NS, cookie));
        }
    }

    /// The flow can't go on: its connection is destroyed, or, in observe mode, no longer followed.
    fn give_up<D: Datapath>(&mut self, cookie: u64, netns_cookie: u64, error: EngineError, datapath: &mut D) {
        datapath.count(error.name());
        let flow = self.flows.get(&cookie);
        let observed = flow.is_some_and(|flow| flow.observed);
        if self.log.admit() {
            info!(reason = error.name(), peer = datapath.peer(cookie), observed, "connection given up");
        }
        match flow {
            Some(flow) if observed => {
                let_go(cookie, Ctl::new(State::Punted, flow.epoch, flow.received_bytes), datapath);
            }
            _ => datapath.destroy(cookie, netns_cookie, 0),
        }
        self.close(cookie);
    }

    /// Destroys a connection that policy does not allow any more, whatever it is at.
    pub(super) fn end_flow<D: Datapath>(&mut self, cookie: u64, netns_cookie: u64, datapath: &mut D) {
        datapath.destroy(cookie, netns_cookie, 0);
        if let Some(flow) = self.flows.get_mut(&cookie) {
            // Also of one that was only observed nothing more may pass.
            flow.observed = false;
            self.close(cookie);
        }
    }

    /// Nothing more goes anywhere on this flow.
    fn close(&mut self, cookie: u64) {
        if let Some(flow) = self.flows.get_mut(&cookie) {
            self.parked_bytes -= flow.parked.len();
            self.timeouts.remove(&(flow.since_ns + HEAD_TIMEOUT_NS, cookie));
            flow.parked = Vec::new();
            flow.stage = Stage::Closing;
        }
    }

    /// Flows with an allowed request in our hands, by its grant: cookie and network namespace.
    pub(super) fn flows_with_grant(&self, which: impl Fn(u64) -> bool) -> impl Iterator<Item = (u64, u64)> {
        self.flows.iter().filter_map(move |(cookie, flow)| match flow.stage {
            Stage::Pass { grant_serial, .. } | Stage::Done { grant_serial } if which(grant_serial) => {
                Some((*cookie, flow.netns_cookie))
            }
            _ => None,
        })
    }
}

impl HandBack {
    /// A state without a body.
    #[must_use]
    pub const fn empty(state: State, epoch: u32) -> Self {
        Self {
            ctl: Ctl::new(state, epoch, 0),
            remaining_bytes: 0,
            chunked: 0,
            grant_serial: 0,
            write_seq_mark: 0,
            pipelined: false,
        }
    }
}

#[cfg(test)]
impl Engine {
    /// What the engine does next depends on this, and on grants and templates. For the search over all states.
    pub(super) fn state(&self) -> String {
        let flows: BTreeMap<_, _> = self.flows.iter().collect();
        format!("{flows:?} {:?} {:?}", self.touched, self.timeouts)
    }
}
