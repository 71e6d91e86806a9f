//! The core's [`Datapath`] on the real kernel.

mod callers;

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::MapError;
use aya::programs::links::PinnedLink;
use enforcer_common::abi::{
    Bar, Barred, Bucket, BucketLabel, DaemonState, Ends, FLOW_PIPELINED, FirstUser, Flow, Grant, GrantLabel,
    HeadDigest, InjectHeader, LOST_CGROUPS, MAX_FLOWS, NameHash, Origin, REVOCATION_EPOCH,
    REVOCATION_GRANT_SLOTS, Reply, SourceKey, Verdict,
};
use enforcer_common::flow::Ctl;
use tracing::{debug, error, warn};

use crate::cli::format;
use crate::core::{CallerFacts, Datapath, Doomed, DoomedQueue, GrantBuckets, HandBack, Shape};
use crate::datapath::{
    Injectors, LiveError, Maps, NamespaceSearch, Searched, SocketDestroyer, UNREADABLE_NS,
};
use crate::http::answer::Answer;
use crate::lifecycle::paths;
use crate::revocation::Revocations;
use crate::workload::{OwnAddresses, Workloads, comm};

/// Why the kernel did not do it.
#[derive(Debug, thiserror::Error)]
pub(super) enum KernelError {
    #[error(transparent)]
    Map(#[from] LiveError),
    #[error(transparent)]
    Inject(#[from] crate::datapath::InjectError),
    #[error("map lookup: {0}")]
    Lookup(#[from] MapError),
}

/// Why a connection was not destroyed.
enum NotDestroyed {
    /// Its network namespace is being searched.
    Searching,
    /// It should be, but too many are.
    SearchFull,
    Failed(std::io::Error),
}

/// An entry that is there stays as it is.
const BPF_NOEXIST: u64 = 1;
/// Destructions between which other work gets its turn.
const DESTROY_BATCH: usize = 512;

/// Maps, injectors and the destroyer of sockets.
pub(super) struct Kernel {
    maps: Maps,
    injectors: Injectors,
    destroyer: SocketDestroyer,
    search: NamespaceSearch,
    /// New connections are not guarded any more; whoever writes the configuration must not forget it.
    draining: bool,
    /// What keeps the programs attached even if their pins are deleted.
    links: Vec<PinnedLink>,
    doomed: DoomedQueue,
    unsettled: Option<Unsettled>,
    /// Who may not connect, as the kernel has it.
    barred: BTreeMap<Barred, Bar>,
    /// None: there is no hierarchy to look in.
    workloads: Option<Workloads>,
    own: OwnAddresses,
}

/// A policy that the maps do not name yet.
struct Unsettled {
    policy_hash: [u8; 32],
    /// Connections that were doomed when it came into force, and have not been seen gone.
    ends: BTreeSet<u64>,
}

impl Kernel {
    pub(super) fn new(maps: Maps, injectors: Injectors) -> std::io::Result<Self> {
        let mut destroyer = SocketDestroyer::default();
        destroyer.add_here()?;
        let barred = maps.all_barred();
        Ok(Self {
            maps,
            injectors,
            destroyer,
            search: NamespaceSearch::start()?,
            draining: false,
            links: Vec::new(),
            doomed: DoomedQueue::default(),
            unsettled: None,
            barred,
            workloads: paths::cgroup2_root().ok().map(Workloads::new),
            own: OwnAddresses::default(),
        })
    }

    pub(super) fn maps(&mut self) -> &mut Maps {
        &mut self.maps
    }

    fn count_unreadable(&mut self, charged: Result<(), u64>) -> Result<(), u64> {
        if charged == Err(UNREADABLE_NS) {
            self.count("bucket-failed");
        }
        charged
    }

    /// Keeps the links for as long as the daemon lives.
    pub(super) fn hold(&mut self, links: Vec<PinnedLink>) {
        self.links = links;
    }

    /// New connections are not guarded any more.
    pub(super) fn drain(&mut self) {
        self.draining = true;
    }

    /// Shows the kernel that the daemon lives.
    pub(super) fn heartbeat(&mut self, now_ns: u64) -> Result<(), LiveError> {
        let mut config = self.maps.live.configuration()?;
        config.heartbeat_ns = now_ns;
        config.draining |= u32::from(self.draining);
        self.maps.set_config(config)
    }

    /// Whether there are connections whose time has come.
    pub(super) fn has_due(&self) -> bool {
        self.doomed.is_due(super::now().boot_ns)
    }

    /// The maps are filled by another policy, and name it once all connections that are doomed now are gone: which those are, and why,
    /// no later daemon could tell, so one that finds no name takes over, and closes them. `None`: they name none.
    pub(super) fn name_policy(&mut self, policy_hash: Option<[u8; 32]>) {
        let ends = self.doomed.flows().collect();
        self.unsettled = policy_hash.map(|policy_hash| Unsettled { policy_hash, ends });
        self.settle();
    }

    fn settle(&mut self) {
        let Some(Unsettled { policy_hash, ends }) = &mut self.unsettled else { return };
        while let Some(first) = ends.first() {
            if self.doomed.contains(*first) {
                return;
            }
            ends.pop_first();
        }
        let policy_hash = *policy_hash;
        self.unsettled = None;
        let state = self.maps.daemon_state();
        let named = state.and_then(|state| self.maps.set_daemon_state(&DaemonState { policy_hash, ..state }));
        if let Err(error) = named {
            warn!(%error, "the next daemon will not know the policy, and closes the open connections");
        }
    }

    /// Destroys connections whose time has come, as many as may be without a pause. Searches for nothing.
    pub(super) fn destroy_due(&mut self) {
        self.destroy_batch();
        self.settle();
    }

    fn destroy_batch(&mut self) {
        let now_ns = super::now().boot_ns;
        for _ in 0..DESTROY_BATCH {
            let Some(doomed) = self.doomed.next_due(now_ns) else { return };
            match self.destroy_one(&doomed) {
                None | Some(Ok(())) => continue,
                Some(Err(NotDestroyed::Searching)) => {}
                Some(Err(NotDestroyed::SearchFull)) => self.count("netns-search-full"),
                Some(Err(NotDestroyed::Failed(error))) => {
                    self.count("destroy-failed");
                    if doomed.tries < 2 {
                        warn!(cookie = doomed.cookie, %error, "a connection could not be destroyed; it is tried again");
                    }
                }
            }
            if !self.doomed.again(now_ns, doomed) {
                self.give_up(doomed.cookie);
            }
        }
    }

    /// `None`: it is gone.
    fn destroy_one(&mut self, doomed: &Doomed) -> Option<Result<(), NotDestroyed>> {
        let Doomed { cookie, netns_cookie, stray, .. } = *doomed;
        let (interface, ends) = match (stray, self.maps.live.flows.get(&cookie, 0)) {
            (Some(stray), _) => stray,
            (None, Ok(flow)) => (flow.interface, Ends { local: flow.local, peer: flow.peer }),
            (None, Err(MapError::KeyNotFound)) => return None,
            (None, Err(error)) => return Some(Err(NotDestroyed::Failed(std::io::Error::other(error)))),
        };
        Some(match self.destroyer.destroy_known(netns_cookie, cookie, interface, ends) {
            Some(result) => result.map_err(NotDestroyed::Failed),
            None if self.search.ask(netns_cookie) => Err(NotDestroyed::Searching),
            None => Err(NotDestroyed::SearchFull),
        })
    }

    /// Destroys all whose time has come, however many; for when no other work is left.
    pub(super) fn destroy_all_due(&mut self) {
        for _ in 0..=MAX_FLOWS as usize / DESTROY_BATCH {
            self.destroy_due();
        }
    }

    /// Waits for a network namespace that a connection is to be destroyed in. Can be dropped at any time.
    pub(super) async fn searched(&mut self) -> Searched {
        self.search.answer().await
    }

    /// Takes such a namespace: the connections that waited for it are due.
    pub(super) fn take_searched(&mut self, searched: Searched) {
        let Searched { netns_cookie, netlink } = searched;
        match netlink {
            Some(netlink) => {
                self.destroyer.add(netns_cookie, netlink);
                self.doomed.found(netns_cookie, super::now().boot_ns);
            }
            // The next try asks for it again.
            None => {
                self.count("netns-not-found");
                debug!(
                    netns_cookie,
                    "no process lives in the network namespace of a connection that is to be destroyed"
                );
            }
        }
    }

    fn doom(&mut self, after_ns: u64, doomed: Doomed) {
        if !self.doomed.add(super::now().boot_ns.saturating_add(after_ns), doomed) {
            self.give_up(doomed.cookie);
        }
    }

    fn give_up(&mut self, cookie: u64) {
        self.count("destroy-given-up");
        warn!(cookie, "a connection could not be destroyed; it gets no bytes");
    }
}

impl Datapath for Kernel {
    type Error = KernelError;

    fn to_server(
        &mut self,
        server_id: u32,
        cookie: u64,
        ctl: Ctl,
        grant_serial: u64,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        Ok(self.injectors.to_server(server_id, cookie, ctl, grant_serial, bytes)?)
    }

    fn to_client(&mut self, cookie: u64, ctl: Ctl, answer: &Answer) -> Result<(), KernelError> {
        Ok(self.injectors.to_client(cookie, ctl, &answer.bytes, answer.is_refusal())?)
    }

    fn hand_back(&mut self, cookie: u64, expected: Ctl, to: HandBack) -> Result<(), KernelError> {
        Ok(self.injectors.hand_back(InjectHeader {
            cookie,
            expected_ctl: expected.0,
            new_ctl: to.ctl.0,
            remaining_bytes: to.remaining_bytes,
            chunked: to.chunked,
            grant_serial: to.grant_serial,
            kind: 0,
            write_seq_mark: to.write_seq_mark,
            flags: if to.pipelined { FLOW_PIPELINED } else { 0 },
            refusal: 0,
        })?)
    }

    fn destroy(&mut self, cookie: u64, netns_cookie: u64, after_ns: u64) {
        self.doom(after_ns, Doomed { cookie, netns_cookie, stray: None, tries: 0 });
    }

    fn destroy_stray(&mut self, cookie: u64, netns_cookie: u64, interface: u32, ends: Ends) {
        self.doom(0, Doomed { cookie, netns_cookie, stray: Some((interface, ends)), tries: 0 });
    }

    fn revocation_epoch(&mut self) -> Result<u64, KernelError> {
        Ok(self.maps.live.revocation_word(REVOCATION_EPOCH)?)
    }

    fn revocations(&mut self) -> Result<Revocations, KernelError> {
        Ok(self.maps.live.revocations()?)
    }

    fn set_grant_slots(&mut self, slots: u32) -> Result<(), KernelError> {
        Ok(self.maps.live.set_revocation_word(REVOCATION_GRANT_SLOTS, u64::from(slots))?)
    }

    fn flows(&mut self, each: &mut dyn FnMut(u64, &Flow)) -> Result<(), KernelError> {
        Ok(self.maps.live.each_flow(each)?)
    }

    fn flow_exists(&mut self, cookie: u64) -> bool {
        self.maps.live.flows.get(&cookie, 0).is_ok()
    }

    fn peer(&mut self, cookie: u64) -> String {
        let Ok(flow) = self.maps.live.flows.get(&cookie, 0) else { return "gone".into() };
        let address = format::socket(&flow.peer);
        match self.workloads.as_mut().and_then(|workloads| workloads.of_caller(&flow.caller)) {
            Some(workload) => {
                let (pid, uid) = (flow.caller.pid, flow.caller.uid);
                format!("{address} ({}, {}[{pid}], uid {uid})", workload.name(), comm(&flow.caller))
            }
            None => address,
        }
    }

    fn holder(&mut self, caller: &Origin) -> CallerFacts {
        self.facts(caller, None)
    }

    fn first_user(&mut self, key: &NameHash) -> Result<Option<FirstUser>, KernelError> {
        match self.maps.live.first_users.get(key, 0) {
            Ok(user) => Ok(Some(user)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn set_first_user(&mut self, key: &NameHash, user: &FirstUser) -> Result<(), KernelError> {
        Ok(self.maps.live.first_users.insert(key, user, BPF_NOEXIST)?)
    }

    fn caller(&mut self, cookie: u64, origin: &Origin) -> CallerFacts {
        // The record may be gone, or another flow's by now: whoever it is of, it is not this caller that it speaks for.
        let flow = self.maps.live.flows.get(&cookie, 0).ok();
        let facts = self.facts(origin, flow.as_ref());
        let charged_elsewhere = flow.is_none_or(|flow| flow.charged_cgroup_id != facts.source.cgroup_id);
        if charged_elsewhere
            && facts.source.cgroup_id != LOST_CGROUPS
            && self.maps.name_source(origin.cgroup_id(), facts.source.cgroup_id).is_err()
        {
            // The daemon goes on charging what the kernel does not.
            self.count("source-not-named");
        }
        CallerFacts { charged_elsewhere, ..facts }
    }

    fn set_verdict(&mut self, digest: HeadDigest, verdict: Verdict) -> Result<(), KernelError> {
        Ok(self.maps.set_verdict(digest, verdict)?)
    }

    fn grant(&mut self, slot: u32) -> Result<Grant, KernelError> {
        Ok(self.maps.live.grants.get(&slot, 0)?)
    }

    fn set_grant(&mut self, slot: u32, grant: &Grant) -> Result<(), KernelError> {
        Ok(self.maps.set_grant(slot, grant)?)
    }

    fn grant_label(&mut self, slot: u32) -> Result<GrantLabel, KernelError> {
        Ok(self.maps.live.grant_labels.get(&slot, 0)?)
    }

    fn set_grant_label(&mut self, slot: u32, label: &GrantLabel) -> Result<(), KernelError> {
        Ok(self.maps.set_grant_label(slot, label)?)
    }

    fn bucket(&mut self, index: u32) -> Result<Bucket, KernelError> {
        Ok(self.maps.buckets.get(index))
    }

    fn begin_bucket(&mut self, index: u32, bucket: &Bucket, label: &BucketLabel) -> Result<(), KernelError> {
        // First the label: every bucket in use has its own.
        self.maps.set_limit_label(index, label)?;
        self.maps.buckets.begin(index, bucket);
        Ok(())
    }

    fn limit_bucket(&mut self, index: u32, shape: &Shape, now_ns: u64) -> Result<(), KernelError> {
        self.maps.buckets.limit(index, shape, now_ns);
        Ok(())
    }

    fn end_bucket(&mut self, index: u32) -> Result<(), KernelError> {
        self.maps.buckets.end(index);
        Ok(())
    }

    fn give_back_places(&mut self, index: u32, places: u64) -> Result<(), KernelError> {
        self.maps.buckets.give_back(index, places);
        Ok(())
    }

    fn charge(&mut self, cookie: u64, buckets: &GrantBuckets, now_ns: u64) -> Result<(), u64> {
        if buckets[0] == 0 {
            return Ok(());
        }
        let held = self.maps.live.flows.get(&cookie, 0).map(|flow| flow.buckets).unwrap_or_default();
        let charged = self.maps.buckets.charge(buckets, &held, now_ns);
        self.count_unreadable(charged)
    }

    fn charge_source(&mut self, source: &SourceKey, now_ns: u64) -> Result<(), u64> {
        let charged = self.maps.charge_source(source, now_ns);
        self.count_unreadable(charged)
    }

    fn set_reply(&mut self, id: u32, reply: &Reply) -> Result<(), KernelError> {
        Ok(self.maps.set_reply(id, reply)?)
    }

    fn count(&mut self, reason: &'static str) {
        if let Err(error) = self.maps.add_reason(reason) {
            error!(reason, %error, "a refusal could not be counted");
        }
    }
}
