//! The engine: takes the kernel's records, decides each request, and has its bytes carried on.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use enforcer_common::abi::{
    Counter, Ends, FLOW_OBSERVE, Flow, PUNT_CHUNK_BYTES, PUNT_CLOSED, PUNT_DATA, PUNT_DEAD, PUNT_FENCED,
    PUNT_OBSERVED, PUNT_STRAY, PUNT_UNANSWERED, PuntHeader, VERDICT_ALLOW, VERDICT_DENY, VERDICT_PUBLIC,
    Verdict,
};
use enforcer_common::chunked::Chunked;
use enforcer_common::digest::DigestKey;
use enforcer_common::flow::{Ctl, State};
use enforcer_common::head;
use tracing::{debug, info, warn};

use crate::authz::{self, CacheFor, Decision, KeyLookup, Options};
use crate::http::answer::{self, Answer};
use crate::http::head::{DEFAULT_MAX_HEAD_BYTES, Framing, HeadError, find_head_end, may_become_head};
use crate::keys::KeySnapshot;
use crate::policy::Server;
use crate::revocation::{RevocationList, Subject};
use crate::token::Fingerprinter;

use super::{
    Datapath, Endpoints, GrantFor, GrantTable, HandBack, KeyedVerifier, Now, ReplyTable, Revoked, Sweeper,
};

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
/// Answers of the daemon on one connection in a row; the next one closes it. A client that does not read its answers can so
/// not fill the injection buffer.
const ANSWERS_MAX: u32 = 128;
/// How long the kernel repeats a refusal that time or new keys may change.
const SHORT_NS: u64 = 2_000_000_000;
/// How long the kernel repeats a refusal that only policy changes.
const LONG_NS: u64 = 3_600_000_000_000;
/// `Retry-After` where a table is full.
const RETRY_AFTER_SECS: u32 = 5;
/// Refusals that are logged one by one between two ticks.
const LOG_LINES_MAX: u32 = 50;
/// How often flows are looked for whose end the kernel could not report.
const SWEEP_NS: u64 = 10_000_000_000;

/// Why a flow is destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A record is missing.
    #[error("record-lost")]
    RecordLost,
    /// Too many bytes wait for a decision.
    #[error("parked-bytes-full")]
    ParkedFull,
    /// Too many flows.
    #[error("flow-table-full")]
    FlowsFull,
    /// Bytes behind the end of a request that is not answered.
    #[error("pipelined")]
    Pipelined,
    /// An answer of ours would overtake the server's.
    #[error("unanswered")]
    Unanswered,
    /// The chunked body's framing is broken.
    #[error("chunked-broken")]
    ChunkedBroken,
    /// Bytes could not be injected.
    #[error("inject-failed")]
    InjectFailed,
    /// The bytes are not HTTP.
    #[error("not-http")]
    NotHttp,
    /// The head did not arrive in time.
    #[error("head-timeout")]
    HeadTimeout,
    /// The policy does not name the connection's endpoint any more.
    #[error("endpoint-removed")]
    EndpointRemoved,
}

impl EngineError {
    const fn name(self) -> &'static str {
        match self {
            Self::RecordLost => "record-lost",
            Self::ParkedFull => "parked-bytes-full",
            Self::FlowsFull => "flow-table-full",
            Self::Pipelined => "pipelined",
            Self::Unanswered => "unanswered",
            Self::ChunkedBroken => "chunked-broken",
            Self::InjectFailed => "inject-failed",
            Self::NotHttp => "not-http",
            Self::HeadTimeout => "head-timeout",
            Self::EndpointRemoved => "endpoint-removed",
        }
    }
}

/// Why a good request got no grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NoGrant {
    /// No slot is free, or the grant can't be written.
    Full,
    /// Its token was revoked since it was verified.
    Revoked,
}

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

/// How much of a request's body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    Length(u64),
    Chunked(Chunked),
}

impl Body {
    fn of(framing: Framing) -> Self {
        match framing {
            Framing::None => Self::Length(0),
            Framing::ContentLength(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunked::new()),
        }
    }

    /// Takes bytes off: how many belong to it, and whether it ends with them.
    fn take(&mut self, bytes: &[u8]) -> Result<(usize, bool), EngineError> {
        match self {
            Self::Length(left) => {
                let taken = (bytes.len() as u64).min(*left);
                *left -= taken;
                Ok((taken as usize, *left == 0))
            }
            Self::Chunked(decoder) => {
                let (taken, end) = decoder.run(bytes).ok_or(EngineError::ChunkedBroken)?;
                Ok((taken as usize, end))
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A head is expected, or half there.
    Head,
    /// The head is there, its token's key is being fetched.
    Waiting,
    /// The body goes to the server.
    Pass { server_id: u32, body: Body, grant_serial: u64 },
    /// The body is dropped.
    Discard { body: Body },
    /// The request is over; what follows is the next one's head.
    Done { grant_serial: u64 },
    /// Nothing more goes anywhere.
    Closing,
}

/// A flow that was handed over at least once.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
struct Punted {
    epoch: u32,
    endpoint_id: u32,
    netns_cookie: u64,
    /// Bytes given to us in this epoch.
    received_bytes: u64,
    /// Bytes that wait for a decision: the head, and what came with it.
    parked: Vec<u8>,
    /// How many of them were looked through for the end of the head.
    scanned: usize,
    stage: Stage,
    unanswered: bool,
    /// A request came before the one before it was answered; from then on none is known to be.
    pipelined: bool,
    /// The bytes to discard belong to a request that was answered before this epoch began: the kernel has looked.
    skipping: bool,
    observed: bool,
    /// When the head began.
    since_ns: u64,
    /// Answers given in a row.
    answers: u32,
    /// The server's send sequence when the current request began.
    write_seq_mark: u32,
    /// The server's send sequence when the last bytes came.
    last_write_seq: u32,
}

/// Memory of one such flow: the record, its time limit, its key.
pub(super) const FLOW_BYTES: u64 = (size_of::<Punted>() + 64) as u64;

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
    pub(super) generation: u64,
    secrets: Secrets,
    pub(super) grants: GrantTable,
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
}

impl Engine {
    /// An engine for a policy's endpoints.
    #[must_use]
    pub fn new(endpoints: Endpoints, generation: u64, first_serial: u64, secrets: Secrets) -> Self {
        Self {
            endpoints,
            generation,
            secrets,
            grants: GrantTable::new(first_serial),
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

    /// Takes the keys that are asked for.
    pub fn take_key_requests(&mut self) -> Vec<KeyRequest> {
        std::mem::take(&mut self.key_requests)
    }

    /// Flows that are followed.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// Takes one record of the ring buffer.
    pub fn record<D: Datapath>(
        &mut self,
        header: &PuntHeader,
        bytes: &[u8],
        now: Now,
        keys: &KeySnapshot,
        datapath: &mut D,
    ) {
        match header.kind {
            PUNT_DATA => {
                match self.data(header, bytes, now, keys, datapath) {
                    // A full record may be followed by others of the same packet; all others are handed back at once, before the
                    // client can have its answer and send more.
                    Ok(()) if bytes.len() < PUNT_CHUNK_BYTES => self.hand_back(header.cookie, datapath),
                    Ok(()) => {
                        self.touched.insert(header.cookie);
                    }
                    // Of a flow that an earlier daemon followed: its bytes have passed, and go on.
                    Err(_)
                        if header.flags & PUNT_OBSERVED != 0 && !self.flows.contains_key(&header.cookie) =>
                    {
                        let punted_bytes = header.offset_bytes + u64::from(header.len_bytes);
                        let ctl = Ctl::new(State::Punted, header.epoch, punted_bytes);
                        let_go(header.cookie, ctl, datapath);
                    }
                    Err(error) => {
                        self.give_up(header.cookie, header.netns_cookie, error, datapath);
                        self.touched.insert(header.cookie);
                    }
                }
            }
            PUNT_CLOSED => self.forget(header.cookie),
            PUNT_DEAD => {
                if header.reason == Counter::DeadUnjudged as u32 && self.log.admit() {
                    warn!(
                        cookie = header.cookie,
                        endpoint = header.endpoint_id,
                        "a server read bytes that were not judged (splice, zero-copy receive); from now on its connections get none before they are accepted"
                    );
                }
                self.forget(header.cookie);
                datapath.destroy(header.cookie, header.netns_cookie, 0);
            }
            PUNT_STRAY => {
                let Some(ends) = ends(bytes) else { return };
                datapath.count("unguarded-connection");
                info!(
                    cookie = header.cookie,
                    "a connection from before the enforcement is still there; it is destroyed"
                );
                datapath.destroy_stray(header.cookie, header.netns_cookie, header.interface, ends);
            }
            PUNT_FENCED => {
                warn!(cookie = header.cookie, "a connection could not be guarded and was cut off (MPTCP?)");
                datapath.destroy(header.cookie, header.netns_cookie, 0);
            }
            kind => warn!(kind, "unknown record in the ring buffer"),
        }
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
        self.sweeper.tick(now, &mut self.grants, datapath);
        self.log.refill();
        if now.boot_ns >= self.next_sweep_ns {
            self.next_sweep_ns = now.boot_ns + SWEEP_NS;
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

    fn data<D: Datapath>(
        &mut self,
        header: &PuntHeader,
        bytes: &[u8],
        now: Now,
        keys: &KeySnapshot,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let known = self.flows.get(&header.cookie).is_some_and(|flow| flow.epoch == header.epoch);
        if !known {
            self.begin(header, now)?;
        }
        let flow = self.flows.get_mut(&header.cookie).ok_or(EngineError::RecordLost)?;
        if flow.received_bytes != header.offset_bytes {
            return Err(EngineError::RecordLost);
        }
        flow.received_bytes += bytes.len() as u64;
        flow.last_write_seq = header.write_seq;
        if let Stage::Done { .. } = flow.stage {
            // The client was faster than the hand-back: the next request begins.
            flow.next_request(header, now);
        }
        let bytes = match flow.discard(bytes)? {
            Some(rest) => {
                flow.next_request(header, now);
                rest
            }
            None => bytes,
        };
        match flow.stage {
            Stage::Head | Stage::Waiting => {
                if flow.parked.len() + bytes.len() > PARKED_MAX_BYTES {
                    return Err(EngineError::ParkedFull);
                }
                self.make_room(bytes.len(), header.cookie, datapath);
                let flow = self.flows.get_mut(&header.cookie).ok_or(EngineError::RecordLost)?;
                flow.parked.extend_from_slice(bytes);
                self.parked_bytes += bytes.len();
                if flow.stage == Stage::Head {
                    self.try_decide(header.cookie, KeyLookup::MayRefresh, now, keys, datapath)?;
                }
                Ok(())
            }
            Stage::Pass { .. } => flow.body(header.cookie, bytes, datapath),
            Stage::Discard { .. } | Stage::Done { .. } | Stage::Closing => Ok(()),
        }
    }

    fn begin(&mut self, header: &PuntHeader, now: Now) -> Result<(), EngineError> {
        if header.offset_bytes != 0 {
            return Err(EngineError::RecordLost);
        }
        let answers = self.flows.get(&header.cookie).map_or(0, |flow| flow.answers);
        self.forget(header.cookie);
        if self.flows.len() >= FLOWS_MAX {
            return Err(EngineError::FlowsFull);
        }
        self.flows.insert(
            header.cookie,
            Punted {
                epoch: header.epoch,
                endpoint_id: header.endpoint_id,
                netns_cookie: header.netns_cookie,
                received_bytes: 0,
                parked: Vec::new(),
                scanned: 0,
                stage: if header.skip_bytes == 0 {
                    Stage::Head
                } else {
                    Stage::Discard { body: Body::Length(header.skip_bytes) }
                },
                write_seq_mark: header.write_seq,
                last_write_seq: header.write_seq,
                unanswered: header.flags & PUNT_UNANSWERED != 0,
                pipelined: header.flags & PUNT_UNANSWERED != 0,
                skipping: header.skip_bytes != 0,
                observed: header.flags & PUNT_OBSERVED != 0,
                since_ns: now.boot_ns,
                answers,
            },
        );
        Ok(())
    }

    /// Decides about the parked head if it is whole.
    fn try_decide<D: Datapath>(
        &mut self,
        cookie: u64,
        key_lookup: KeyLookup,
        now: Now,
        keys: &KeySnapshot,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        self.look_for_revocations(now, datapath);
        let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
        if !may_become_head(&flow.parked) {
            return Err(EngineError::NotHttp);
        }
        // What was looked through before, less what an end could have begun with.
        let from = flow.scanned.saturating_sub(3).min(flow.parked.len());
        flow.scanned = flow.parked.len();
        let parked = match find_head_end(flow.parked.get(from..).unwrap_or_default()).map(|end| from + end) {
            Some(end) => {
                self.parked_bytes -= flow.parked.len();
                // Entries of decided heads would pile up until their time is over.
                self.timeouts.remove(&(flow.since_ns + HEAD_TIMEOUT_NS, cookie));
                flow.scanned = 0;
                let parked = std::mem::take(&mut flow.parked);
                (parked, end)
            }
            None if flow.parked.len() > DEFAULT_MAX_HEAD_BYTES => {
                let error =
                    HeadError::TooLarge { len_bytes: flow.parked.len(), max_bytes: DEFAULT_MAX_HEAD_BYTES };
                let answer = answer::broken_head(&error).finish("GET");
                return self.answer(cookie, &answer, None, datapath);
            }
            None => return Ok(()),
        };
        let (bytes, end) = parked;
        let (head_bytes, rest) = bytes.split_at(end);
        let endpoint_id = flow.endpoint_id;
        let endpoint = self.endpoints.0.get(&endpoint_id).ok_or(EngineError::EndpointRemoved)?;
        let servers: Vec<&Server> = endpoint.servers.iter().map(|(_, server)| server.as_ref()).collect();
        let server_id = |index: usize| endpoint.servers.get(index).map(|(id, _)| *id);
        let verifier = KeyedVerifier {
            keys,
            revocations: self.revoked.list(),
            fingerprinter: &self.secrets.fingerprint,
            now_unix_secs: now.unix_secs,
        };
        let options = Options { key_lookup, ..Options::default() };
        match authz::decide(head_bytes, &servers, &verifier, &options) {
            Decision::Allow { server_index, verified, token, framing, cacheable, .. } => {
                let (server_id, server) =
                    endpoint.servers.get(server_index).ok_or(EngineError::RecordLost)?.clone();
                let ask = GrantFor {
                    token: &verified,
                    fingerprint: self.secrets.fingerprint.fingerprint(token.as_bytes()),
                    server_id,
                    server: &server.name,
                    generation: self.generation,
                };
                match self.allow(cookie, head_bytes, ask, framing, cacheable, now, datapath) {
                    Ok(serial) => self.pass(cookie, server_id, serial, head_bytes, rest, framing, datapath),
                    Err(why) => self.no_grant(cookie, &server, framing, why, datapath),
                }
            }
            Decision::Public { server_index, framing, cacheable, .. } => {
                let server_id = server_id(server_index).ok_or(EngineError::RecordLost)?;
                if cacheable {
                    let verdict = (VERDICT_PUBLIC, 0, 0, now.boot_ns + LONG_NS, server_id);
                    self.write_verdict(head_bytes, endpoint_id, framing, verdict, datapath);
                }
                self.pass(cookie, server_id, 0, head_bytes, rest, framing, datapath)
            }
            Decision::Answer { server_index, answer, framing, cache } => {
                let server_id = server_index.and_then(server_id);
                let server =
                    server_index.and_then(|index| servers.get(index)).map(|server| server.name.as_str());
                let observed = self.flows.get(&cookie).is_some_and(|flow| flow.observed);
                let (status, reason) = (answer.status, answer.reason);
                if status < 400 {
                    debug!(status, reason, server, "answered");
                } else if self.log.admit() {
                    info!(status, reason, server, peer = datapath.peer(cookie), observed, "refused");
                }
                datapath.count(answer.reason);
                self.remember_refusal(
                    head_bytes,
                    endpoint_id,
                    framing,
                    &answer,
                    cache,
                    server_id,
                    now,
                    datapath,
                );
                self.answer(cookie, &answer, framing, datapath)?;
                let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
                match flow.stage {
                    Stage::Done { .. } if !rest.is_empty() => Err(EngineError::Pipelined),
                    // The answer has only just been sent, so bytes behind the body are a request that did not wait for it.
                    _ => match flow.discard(rest)? {
                        Some(_) => Err(EngineError::Pipelined),
                        None => Ok(()),
                    },
                }
            }
            Decision::NeedKey { issuer, kid, .. } => {
                let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
                self.key_requests.push(KeyRequest { cookie, epoch: flow.epoch, issuer, kid });
                flow.stage = Stage::Waiting;
                self.parked_bytes += bytes.len();
                flow.parked = bytes;
                Ok(())
            }
        }
    }

    /// Writes grant and verdict; the grant's serial. Without a grant the request must not pass: nothing could end what it opens.
    #[expect(clippy::too_many_arguments, reason = "one call, all of it needed")]
    fn allow<D: Datapath>(
        &mut self,
        cookie: u64,
        head_bytes: &[u8],
        ask: GrantFor<'_>,
        framing: Framing,
        cacheable: bool,
        now: Now,
        datapath: &mut D,
    ) -> Result<u64, NoGrant> {
        let endpoint_id = self.flows.get(&cookie).ok_or(NoGrant::Full)?.endpoint_id;
        let granted = self.grants.grant(ask, now, datapath).ok_or(NoGrant::Full)?;
        // Whoever revoked the token since it was verified may have looked for its grant before it was there.
        if self.look_for_revocations(now, datapath) {
            let subject = Subject::of_token(ask.token, ask.fingerprint, ask.server);
            let good = |list: &RevocationList| list.find(&subject, now.unix_secs).is_none();
            if !self.revoked.list().is_some_and(good) {
                GrantTable::revoke(granted, datapath);
                return Err(NoGrant::Revoked);
            }
        }
        if tracing::enabled!(tracing::Level::DEBUG) {
            debug!(
                fingerprint = %ask.fingerprint,
                issuer = ask.token.issuer.name,
                subject = ask.token.subject,
                client_id = ask.token.client_id,
                server = ask.server,
                peer = datapath.peer(cookie),
                "allowed"
            );
        }
        datapath.count("allowed");
        if cacheable {
            let verdict = (VERDICT_ALLOW, granted.slot, granted.serial, granted.deadline_ns, ask.server_id);
            self.write_verdict(head_bytes, endpoint_id, framing, verdict, datapath);
        }
        Ok(granted.serial)
    }

    /// The answer to a good request that got no grant.
    fn no_grant<D: Datapath>(
        &mut self,
        cookie: u64,
        server: &Server,
        framing: Framing,
        why: NoGrant,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let draft = match why {
            NoGrant::Full => answer::unavailable("grant-table-full", RETRY_AFTER_SECS),
            NoGrant::Revoked => answer::invalid_token(server, "revoked"),
        };
        let answer = draft.closing().finish("POST");
        datapath.count(answer.reason);
        if self.log.admit() {
            info!(status = answer.status, reason = answer.reason, peer = datapath.peer(cookie), "refused");
        }
        self.answer(cookie, &answer, Some(framing), datapath)
    }

    /// Lets the kernel repeat a refusal, where it can.
    #[expect(clippy::too_many_arguments, reason = "one call, all of it needed")]
    fn remember_refusal<D: Datapath>(
        &mut self,
        head_bytes: &[u8],
        endpoint_id: u32,
        framing: Option<Framing>,
        answer: &Answer,
        cache: CacheFor,
        server_id: Option<u32>,
        now: Now,
        datapath: &mut D,
    ) {
        let (Some(framing), false) = (framing, answer.close) else { return };
        let deadline_ns = match cache {
            CacheFor::Never => return,
            CacheFor::Short => now.boot_ns + SHORT_NS,
            CacheFor::UntilPolicyChange => now.boot_ns + LONG_NS,
        };
        if let Some(reply_id) = self.replies.id(answer, datapath) {
            let verdict = (VERDICT_DENY, reply_id, 0, deadline_ns, server_id.unwrap_or(u32::MAX));
            self.write_verdict(head_bytes, endpoint_id, framing, verdict, datapath);
        }
    }

    /// Writes a verdict if the kernel reads the head's framing as the parser does.
    fn write_verdict<D: Datapath>(
        &self,
        head_bytes: &[u8],
        endpoint_id: u32,
        framing: Framing,
        (kind, index, grant_serial, deadline_ns, server_id): (u32, u32, u64, u64, u32),
        datapath: &mut D,
    ) {
        let Ok((info, digest)) = head::analyze_bytes(head_bytes, &self.secrets.digest, endpoint_id) else {
            return;
        };
        let alike = info.head_bytes as usize == head_bytes.len()
            && match framing {
                Framing::None => info.has_content_length == 0,
                Framing::ContentLength(length) => {
                    info.has_content_length == 1 && info.content_length == length
                }
                Framing::Chunked => false,
            };
        if !alike {
            return;
        }
        let verdict = Verdict {
            digest,
            kind,
            index,
            grant_serial,
            generation: self.generation,
            deadline_ns,
            server_id,
            head_bytes: info.head_bytes,
        };
        if let Err(error) = datapath.set_verdict(digest, verdict) {
            warn!(%error, "a verdict could not be written; the head stays on the slow path");
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one call, all of it needed")]
    fn pass<D: Datapath>(
        &mut self,
        cookie: u64,
        server_id: u32,
        grant_serial: u64,
        head_bytes: &[u8],
        rest: &[u8],
        framing: Framing,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
        flow.answers = 0;
        let mut body = Body::of(framing);
        // Everything that belongs to the request goes in one piece: servers like to read head and body at once.
        let (taken, end) = body.take(rest)?;
        if taken < rest.len() {
            return Err(EngineError::Pipelined);
        }
        flow.stage = Stage::Pass { server_id, body, grant_serial };
        if rest.is_empty() {
            flow.send(cookie, server_id, head_bytes, datapath)?;
        } else {
            flow.send(cookie, server_id, &[head_bytes, rest].concat(), datapath)?;
        }
        if end || body == Body::Length(0) {
            flow.stage = Stage::Done { grant_serial };
        }
        Ok(())
    }

    /// Sends an answer of ours in the server's place.
    fn answer<D: Datapath>(
        &mut self,
        cookie: u64,
        answer: &Answer,
        framing: Option<Framing>,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
        if flow.observed {
            // It has passed already; its body has to be followed all the same.
            let framing = framing.ok_or(EngineError::NotHttp)?;
            flow.stage = Stage::discard(framing);
            return Ok(());
        }
        if flow.unanswered {
            return Err(EngineError::Unanswered);
        }
        flow.answers += 1;
        let ctl = Ctl::new(State::Punted, flow.epoch, flow.received_bytes);
        datapath.to_client(cookie, ctl, &answer.bytes).map_err(|_| EngineError::InjectFailed)?;
        match framing {
            Some(framing) if !answer.close && flow.answers < ANSWERS_MAX => {
                flow.stage = Stage::discard(framing);
            }
            _ => {
                flow.stage = Stage::Closing;
                self.parked_bytes -= flow.parked.len();
                flow.parked = Vec::new();
                datapath.destroy(cookie, flow.netns_cookie, LINGER_NS);
            }
        }
        Ok(())
    }
}

impl Stage {
    fn discard(framing: Framing) -> Self {
        match Body::of(framing) {
            Body::Length(0) => Self::Done { grant_serial: 0 },
            body => Self::Discard { body },
        }
    }
}

impl Punted {
    fn send<D: Datapath>(
        &self,
        cookie: u64,
        server_id: u32,
        bytes: &[u8],
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        if self.observed || bytes.is_empty() {
            return Ok(());
        }
        let ctl = Ctl::new(State::Punted, self.epoch, self.received_bytes);
        let grant_serial = match self.stage {
            Stage::Pass { grant_serial, .. } | Stage::Done { grant_serial } => grant_serial,
            Stage::Head | Stage::Waiting | Stage::Discard { .. } | Stage::Closing => 0,
        };
        datapath.to_server(server_id, cookie, ctl, grant_serial, bytes).map_err(|_| EngineError::InjectFailed)
    }

    /// Bytes of a body whose request is decided.
    fn body<D: Datapath>(&mut self, cookie: u64, bytes: &[u8], datapath: &mut D) -> Result<(), EngineError> {
        match self.stage {
            Stage::Pass { server_id, mut body, grant_serial } => {
                let (taken, end) = body.take(bytes)?;
                if taken < bytes.len() {
                    return Err(EngineError::Pipelined);
                }
                self.send(cookie, server_id, bytes, datapath)?;
                self.stage = if end {
                    Stage::Done { grant_serial }
                } else {
                    Stage::Pass { server_id, body, grant_serial }
                };
                Ok(())
            }
            Stage::Done { .. } => Err(EngineError::Pipelined),
            Stage::Discard { .. } | Stage::Head | Stage::Waiting | Stage::Closing => Ok(()),
        }
    }

    /// The bytes are those of a new request. The kernel has looked for an answer since the head that it handed over; of the requests
    /// behind that one only the engine knows, whether the server has written since they came.
    fn next_request(&mut self, header: &PuntHeader, now: Now) {
        let silent = !std::mem::take(&mut self.skipping) && header.write_seq == self.write_seq_mark;
        self.stage = Stage::Head;
        self.pipelined |= silent || header.flags & PUNT_UNANSWERED != 0;
        self.unanswered = self.pipelined;
        self.write_seq_mark = self.last_write_seq;
        self.since_ns = now.boot_ns;
    }

    /// Drops what belongs to the body of a refused request; gives what follows it.
    fn discard<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<&'b [u8]>, EngineError> {
        let Stage::Discard { mut body } = self.stage else { return Ok(None) };
        let (taken, end) = body.take(bytes)?;
        self.stage = if end { Stage::Done { grant_serial: 0 } } else { Stage::Discard { body } };
        Ok(bytes.get(taken..).filter(|rest| !rest.is_empty()))
    }

    /// How the flow goes back to the kernel; `None`: it stays.
    fn hand_back(&self) -> Option<HandBack> {
        let to = |state, body, grant_serial| {
            let (remaining_bytes, chunked) = match body {
                Body::Length(left) => (left, 0),
                Body::Chunked(decoder) => (0, decoder.to_bits()),
            };
            let write_seq_mark = self.write_seq_mark;
            HandBack {
                ctl: Ctl::new(state, self.epoch, 0),
                remaining_bytes,
                chunked,
                grant_serial,
                write_seq_mark,
                pipelined: self.pipelined,
            }
        };
        match self.stage {
            Stage::Head | Stage::Waiting => None,
            Stage::Done { grant_serial } => Some(to(State::Head, Body::Length(0), grant_serial)),
            Stage::Pass { body: body @ Body::Length(_), grant_serial, .. } => {
                Some(to(State::Body, body, grant_serial))
            }
            Stage::Pass { body, grant_serial, .. } => Some(to(State::Chunked, body, grant_serial)),
            // Passed already, so the kernel only has to follow it.
            Stage::Discard { body: body @ Body::Length(_) } if self.observed => {
                Some(to(State::Body, body, 0))
            }
            Stage::Discard { body } if self.observed => Some(to(State::Chunked, body, 0)),
            Stage::Discard { body: body @ Body::Length(_) } => Some(to(State::Discard, body, 0)),
            // A refused chunked body is read to its end here: the kernel discards by length only.
            Stage::Discard { .. } => None,
            Stage::Closing if self.observed => Some(HandBack::empty(State::Opaque, self.epoch)),
            Stage::Closing => Some(HandBack::empty(State::Dead, self.epoch)),
        }
    }
}

/// How many lines a client can cause: between two ticks, [`LOG_LINES_MAX`]. The rest is counted and told as a number.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug, Default)]
struct LogLimit {
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    fn admit(&mut self) -> bool {
        if self.lines < LOG_LINES_MAX {
            self.lines += 1;
            return true;
        }
        self.left_out += 1;
        false
    }

    fn refill(&mut self) {
        if self.left_out != 0 {
            info!(
                left_out = self.left_out,
                "more refusals than are logged one by one; `enforcer counters` has them all"
            );
        }
        *self = Self::default();
    }
}

/// The ends of a socket, from a record's payload.
fn ends(bytes: &[u8]) -> Option<Ends> {
    if bytes.len() < size_of::<Ends>() {
        return None;
    }
    // SAFETY: `repr(C)`, integers only, and the slice is long enough.
    Some(unsafe { bytes.as_ptr().cast::<Ends>().read_unaligned() })
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
