//! The engine on a datapath of plain collections.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use enforcer_common::abi::{
    Bucket, BucketLabel, EndpointKey, Ends, FAMILY_V4, FirstUser, Flow, Grant, GrantLabel, HeadDigest,
    NameHash, Origin, PUNT_DATA, PUNT_OBSERVED, PUNT_UNANSWERED, PuntHeader, Reply, Revocation,
    VERDICT_ALLOW, VERDICT_DENY, Verdict, grant_serial,
};
use enforcer_common::digest::{DigestKey, KEY_WORDS};
use enforcer_common::flow::{Ctl, State};
use enforcer_common::head;

use super::sweep::tests as sweep_tests;
use super::*;
use crate::http::answer::Answer;
use crate::keys::KeySnapshot;
use crate::policy::Mode;
use crate::revocation::Revocations;
use crate::revocation::tests::revocation;
use crate::token::Fingerprinter;
use crate::token::testing::{NOW, World};

mod callers;
mod evicted;
mod grants;
mod limits;
mod revoked;
mod switch;

const COOKIE: u64 = 7;
const EPOCH: u32 = 3;
const GENERATION: u64 = 11;

#[derive(Default)]
pub(super) struct Fake {
    server: Vec<u8>,
    client: Vec<u8>,
    backs: Vec<(Ctl, HandBack)>,
    destroyed: BTreeSet<u64>,
    /// Serials of the grants by whose right bytes went to the server.
    used: Vec<u64>,
    pub(super) verdicts: BTreeMap<HeadDigest, Verdict>,
    pub(super) grants: BTreeMap<u32, Grant>,
    labels: BTreeMap<u32, GrantLabel>,
    pub(super) buckets: BTreeMap<u32, (Bucket, BucketLabel)>,
    holders: BTreeMap<Origin, CallerFacts>,
    first_users: BTreeMap<NameHash, FirstUser>,
    /// First users can't be remembered.
    no_first_users: bool,
    flows: BTreeMap<u64, Flow>,
    counts: Vec<&'static str>,
    /// Bytes can't be injected.
    full: bool,
    /// Grants can't be written.
    no_grants: bool,
    revocations: Revocations,
    epoch: u64,
    /// The revocations can't be read.
    no_revocations: bool,
    /// Calls of the daemon after which the operator's side takes its next step.
    steps_at: Vec<u32>,
    calls: u32,
    caller: CallerFacts,
    /// Requests that were charged to where they come from.
    source_charges: u32,
    /// What those are over.
    source_wait_ns: Option<u64>,
}

impl Fake {
    /// The operator's side of a revocation of everything, a step at a time: the list, the epoch, the grants.
    fn operator(&mut self) {
        self.calls += 1;
        while self.steps_at.first().is_some_and(|at| *at < self.calls) {
            self.operator_step();
        }
    }

    fn operator_step(&mut self) {
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

    fn charge_source(&mut self, _origin: &Origin, _now_ns: u64) -> Result<(), u64> {
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

struct Bench {
    engine: Engine,
    fake: Fake,
    keys: KeySnapshot,
    token: String,
    key: Box<DigestKey>,
    now: Now,
    offset_bytes: u64,
    epoch: u32,
    origin: Origin,
    /// The server's send sequence.
    write_seq: u32,
}

impl Bench {
    fn new() -> Self {
        let world = World::new();
        let key = Box::new(DigestKey {
            words: std::array::from_fn(|k| (k as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        });
        assert_eq!(key.words.len(), KEY_WORDS);
        let endpoint = EndpointPolicy {
            key: EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 },
            servers: vec![(0, Arc::new(world.server()))],
        };
        let secrets = Secrets { digest: key.clone(), fingerprint: Fingerprinter::new([1; 32]) };
        Self {
            engine: Engine::new(
                (Endpoints(BTreeMap::from([(0, endpoint)])), Mode::Enforce),
                GENERATION,
                100,
                secrets,
            ),
            fake: Fake::default(),
            keys: world.keys(),
            token: world.token(),
            key,
            now: Now { boot_ns: 1_000_000_000_000, unix_secs: NOW, unix_subsec_ns: 0 },
            offset_bytes: 0,
            epoch: EPOCH,
            origin: Origin::NONE,
            write_seq: 0,
        }
    }

    fn good(&self, extra: &str, body: &str) -> String {
        format!(
            "POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\nAuthorization: Bearer {}\r\n{extra}\r\n{body}",
            self.token
        )
    }

    fn refused(length: usize, body: &str) -> String {
        format!("POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\nContent-Length: {length}\r\n\r\n{body}")
    }

    fn punt(&mut self, bytes: &[u8], flags: u32, skip_bytes: u64) {
        let header = PuntHeader {
            cookie: COOKIE,
            offset_bytes: self.offset_bytes,
            netns_cookie: 0,
            skip_bytes,
            kind: PUNT_DATA,
            epoch: self.epoch,
            len_bytes: bytes.len() as u32,
            flags,
            endpoint_id: 0,
            reason: 0,
            write_seq: self.write_seq,
            interface: 0,
            origin: self.origin,
        };
        self.offset_bytes += bytes.len() as u64;
        self.engine.record(&header, bytes, self.now, &self.keys, &mut self.fake);
        self.engine.end_batch(&mut self.fake);
    }

    fn last_back(&self) -> (Ctl, HandBack) {
        *self.fake.backs.last().unwrap()
    }
}

#[test]
fn a_good_request_goes_to_the_server_however_it_is_cut() {
    let body = "{\"jsonrpc\":\"2.0\"}";
    let whole = Bench::new().good(&format!("Content-Length: {}\r\n", body.len()), body).len();
    for cut in 1..whole {
        let mut bench = Bench::new();
        let request = bench.good(&format!("Content-Length: {}\r\n", body.len()), body);
        bench.punt(&request.as_bytes()[..cut], 0, 0);
        bench.punt(&request.as_bytes()[cut..], 0, 0);
        assert_eq!(bench.fake.server, request.as_bytes(), "cut at {cut}");
        let (expected, to) = bench.last_back();
        assert_eq!(expected, Ctl::new(State::Punted, EPOCH, request.len() as u64));
        assert_eq!((to.ctl, to.remaining_bytes), (Ctl::new(State::Head, EPOCH, 0), 0));
        assert!(bench.fake.client.is_empty() && bench.fake.destroyed.is_empty());
    }
}

#[test]
fn the_verdict_is_for_the_digest_that_the_kernel_computes() {
    let mut bench = Bench::new();
    let request = bench.good("Content-Length: 2\r\n", "{}");
    bench.punt(request.as_bytes(), 0, 0);
    let (_, digest) = head::analyze_bytes(request.as_bytes(), &bench.key, &Origin::NONE).unwrap();
    let verdict = bench.fake.verdicts[&digest];
    let grant = bench.fake.grants[&verdict.index];
    assert_eq!(
        (verdict.kind, verdict.generation, verdict.grant_serial),
        (VERDICT_ALLOW, GENERATION, grant.serial)
    );
    assert!(grant.deadline_ns > bench.now.boot_ns && grant.deadline_ns <= bench.now.boot_ns + GRANT_MAX_NS);
    assert_eq!(grant.fingerprint, Fingerprinter::new([1; 32]).fingerprint(bench.token.as_bytes()).0);

    let refused = Bench::refused(0, "");
    bench.offset_bytes = request.len() as u64;
    bench.punt(refused.as_bytes(), 0, 0);
    let (_, digest) = head::analyze_bytes(refused.as_bytes(), &bench.key, &Origin::NONE).unwrap();
    assert_eq!(bench.fake.verdicts[&digest].kind, VERDICT_DENY);
}

#[test]
fn a_body_that_is_still_coming_is_left_to_the_kernel() {
    let mut bench = Bench::new();
    let request = bench.good("Content-Length: 1000\r\n", "only this");
    bench.punt(request.as_bytes(), 0, 0);
    let (_, to) = bench.last_back();
    assert_eq!((to.ctl, to.remaining_bytes), (Ctl::new(State::Body, EPOCH, 0), 991));
    // More came before the hand-back: it goes to the server, and the next attempt knows.
    bench.punt(&[b'x'; 100], 0, 0);
    let (expected, to) = bench.last_back();
    assert_eq!(expected.punted_bytes(), request.len() as u64 + 100);
    assert_eq!(to.remaining_bytes, 891);
    assert_eq!(bench.fake.server.len(), request.len() + 100);
}

#[test]
fn a_refused_request_reaches_no_server_and_its_body_is_skipped() {
    let mut bench = Bench::new();
    bench.punt(Bench::refused(50, "part").as_bytes(), 0, 0);
    assert!(bench.fake.server.is_empty());
    assert!(bench.fake.client.starts_with(b"HTTP/1.1 401 "));
    let (_, to) = bench.last_back();
    assert_eq!((to.ctl, to.remaining_bytes), (Ctl::new(State::Discard, EPOCH, 0), 46));
    // The rest of it and a good request in one packet: the answer was sent before, so this is no pipelining.
    let good = bench.good("", "");
    bench.punt(format!("{}{good}", "y".repeat(46)).as_bytes(), 0, 0);
    assert_eq!(bench.fake.server, good.as_bytes());
    assert!(bench.fake.destroyed.is_empty());
}

#[test]
fn a_new_epoch_can_begin_inside_a_refused_body() {
    let mut bench = Bench::new();
    let good = bench.good("", "");
    bench.punt(format!("zzz{good}").as_bytes(), 0, 3);
    assert_eq!(bench.fake.server, good.as_bytes());
    // That request was answered, or the kernel would say so: the next one may be refused, also in a record of its own.
    for records in [
        vec!["zzz".to_owned() + &Bench::refused(0, "")],
        vec!["zz".into(), "z".into(), Bench::refused(0, "")],
    ] {
        let mut bench = Bench::new();
        records.iter().for_each(|bytes| bench.punt(bytes.as_bytes(), 0, 3));
        assert!(bench.fake.client.starts_with(b"HTTP/1.1 401 ") && bench.fake.destroyed.is_empty());
        assert!(!bench.last_back().1.pipelined);
    }
}

#[test]
fn what_could_mix_answers_or_lose_bytes_ends_the_connection() {
    // A second request behind the first.
    let mut bench = Bench::new();
    let good = bench.good("", "");
    bench.punt(format!("{good}{good}").as_bytes(), 0, 0);
    assert!(bench.fake.destroyed.contains(&COOKIE) && bench.fake.server.is_empty());
    // A refusal that would overtake the server's answer.
    let mut bench = Bench::new();
    bench.punt(Bench::refused(0, "").as_bytes(), PUNT_UNANSWERED, 0);
    assert!(bench.fake.destroyed.contains(&COOKIE) && bench.fake.client.is_empty());
    // A record that is missing.
    let mut bench = Bench::new();
    bench.punt(&good.as_bytes()[..20], 0, 0);
    bench.offset_bytes += 1;
    bench.punt(&good.as_bytes()[21..], 0, 0);
    assert!(bench.fake.destroyed.contains(&COOKIE) && bench.fake.server.is_empty());
    // Bytes that are not HTTP.
    let mut bench = Bench::new();
    bench.punt(b"\x16\x03\x01\x02\x00", 0, 0);
    assert!(bench.fake.destroyed.contains(&COOKIE) && bench.fake.client.is_empty());
    // An injection that fails.
    let mut bench = Bench::new();
    bench.fake.full = true;
    let good = bench.good("", "");
    bench.punt(good.as_bytes(), 0, 0);
    assert!(bench.fake.destroyed.contains(&COOKIE));
    assert_eq!(bench.last_back().1.ctl, Ctl::new(State::Dead, EPOCH, 0));
}

#[test]
fn a_head_that_never_ends_runs_out_of_time() {
    let mut bench = Bench::new();
    bench.punt(b"POST /mcp HT", 0, 0);
    bench.now.boot_ns += 29_000_000_000;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert!(bench.fake.destroyed.is_empty());
    bench.now.boot_ns += 1_000_000_000;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert!(bench.fake.destroyed.contains(&COOKIE));
    assert_eq!(bench.fake.counts, ["head-timeout"]);
}

#[test]
fn observe_mode_follows_and_touches_nothing() {
    let mut bench = Bench::new();
    bench.punt(Bench::refused(10, "abc").as_bytes(), PUNT_OBSERVED, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.client.is_empty() && bench.fake.destroyed.is_empty());
    let (_, to) = bench.last_back();
    assert_eq!((to.ctl, to.remaining_bytes), (Ctl::new(State::Body, EPOCH, 0), 7));
    let mut bench = Bench::new();
    bench.punt(b"\0", PUNT_OBSERVED, 0);
    assert!(bench.fake.destroyed.is_empty());
    assert_eq!(bench.last_back().1.ctl, Ctl::new(State::Opaque, EPOCH, 0));
}

fn flow_of(state: State, flags: u32) -> Flow {
    Flow { ctl: Ctl::new(state, EPOCH, 5).0, flags, ..sweep_tests::flow([0; 4]) }
}

#[test]
fn only_flows_in_a_dead_daemons_hands_are_orphans() {
    for state in [State::Head, State::Body, State::Chunked, State::Discard, State::Opaque] {
        assert_eq!(Orphan::of(COOKIE, &flow_of(state, 0)), None, "{state:?}");
    }
    for state in [State::Punted, State::Dead] {
        let orphan = Orphan::of(COOKIE, &flow_of(state, 0)).unwrap();
        assert_eq!((orphan.cookie, orphan.ctl, orphan.observed), (COOKIE, Ctl::new(state, EPOCH, 5), false));
    }
}

#[test]
fn orphans_end_unless_their_first_bytes_were_still_to_be_read() {
    let mut bench = Bench::new();
    let good = bench.good("", "");
    bench.punt(good.as_bytes(), 0, 0);
    let orphan = |cookie, flags| Orphan::of(cookie, &flow_of(State::Punted, flags)).unwrap();
    let observed = orphan(3, enforcer_common::abi::FLOW_OBSERVE);
    bench.fake.backs.clear();
    bench.engine.end_orphans(&[orphan(COOKIE, 0), orphan(2, 0), observed], &mut bench.fake);
    assert_eq!(bench.fake.destroyed, BTreeSet::from([2]));
    assert_eq!(bench.fake.backs, [(observed.ctl, HandBack::empty(State::Opaque, EPOCH))]);
    assert_eq!(bench.fake.counts.iter().filter(|reason| **reason == "daemon-died").count(), 2);
}

fn everything() -> Revocation {
    Revocation { issued_until_unix_secs: NOW + 60, expires_at_unix_secs: NOW + 3600, ..revocation(0) }
}
