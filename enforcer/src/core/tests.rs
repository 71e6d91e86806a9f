//! The engine on a datapath of plain collections.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use enforcer_common::abi::{
    EndpointKey, FAMILY_V4, Flow, Grant, GrantLabel, Origin, PUNT_DATA, PUNT_OBSERVED, PUNT_UNANSWERED,
    PuntHeader, Revocation, VERDICT_ALLOW, VERDICT_DENY, grant_serial,
};
use enforcer_common::digest::{DigestKey, KEY_WORDS};
use enforcer_common::flow::{Ctl, State};
use enforcer_common::head;

use super::sweep::tests as sweep_tests;
use super::*;
use crate::keys::KeySnapshot;
use crate::policy::Mode;
use crate::revocation::tests::revocation;
use crate::token::Fingerprinter;
use crate::token::testing::{NOW, World};

mod callers;
mod evicted;
mod fake;
mod grants;
mod limits;
mod revoked;
mod switch;

pub(super) use fake::Fake;

const COOKIE: u64 = 7;
const EPOCH: u32 = 3;
const GENERATION: u64 = 11;

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
