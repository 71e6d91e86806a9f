//! The refresh schedule, in simulated time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{Action, BootInstant, FetchError, Fetched, Freshness, KeySet, KeyStore, UnknownKid};
use crate::policy::{Algorithm, Issuer, KeySource};
use crate::token::testing::{TestKey, issuer};

fn set(kid: &str) -> KeySet {
    let jwk = TestKey::for_algorithm(Algorithm::ES256).jwk(kid);
    KeySet::parse(serde_json::json!({ "keys": [jwk] }).to_string().as_bytes()).unwrap()
}

/// A store over one issuer, with a clock.
struct Sim {
    store: KeyStore,
    issuer: Arc<Issuer>,
    now: BootInstant,
}

impl Sim {
    /// Refresh every 300 s, staleness limit 3600 s.
    fn new() -> Self {
        Self::with(issuer("main", "https://issuer.example.com"), 1)
    }

    fn with(issuer: Issuer, seed: u64) -> Self {
        let now = BootInstant::from_boot(Duration::from_secs(1000));
        let issuer = Arc::new(issuer);
        Self { store: KeyStore::new([Arc::clone(&issuer)], now, seed), issuer, now }
    }

    fn advance(&mut self, secs: f64) {
        self.now = self.now.saturating_add(Duration::from_secs_f64(secs));
    }

    fn wants_fetch(&mut self) -> bool {
        matches!(self.store.next_action(self.now), Action::Fetch(_))
    }

    /// Advances to the next due time; the wait in seconds.
    fn wait(&mut self) -> f64 {
        let Action::Wait(Some(until)) = self.store.next_action(self.now) else { panic!("not waiting") };
        let wait = until.saturating_since(self.now);
        self.now = until;
        wait.as_secs_f64()
    }

    fn fetched(&mut self, kid: &str) {
        self.store.on_fetched("main", Ok(Fetched::Keys(set(kid))), self.now);
    }

    fn failed(&mut self) {
        self.store.on_fetched("main", Err(FetchError::Timeout), self.now);
    }

    fn unknown(&mut self, kid: &str) -> UnknownKid {
        self.store.on_unknown_kid("main", kid, self.now)
    }

    fn freshness(&self) -> Freshness {
        self.store.snapshot(self.now).freshness(&self.issuer)
    }
}

#[test]
fn keys_are_fetched_at_once_and_once_at_a_time() {
    let mut sim = Sim::new();
    assert_eq!(sim.freshness(), Freshness::Missing);
    assert!(!sim.store.all_loaded());
    assert!(sim.wants_fetch());
    sim.advance(100.0);
    assert!(matches!(sim.store.next_action(sim.now), Action::Wait(None)), "one fetch runs");
    sim.fetched("k1");
    assert!(sim.store.all_loaded());
    assert_eq!(sim.freshness(), Freshness::Fresh);
    assert!(!sim.wants_fetch());
}

#[test]
fn refresh_is_ahead_of_the_interval_and_spread() {
    let mut waits = Vec::new();
    for seed in 0..50 {
        let mut sim = Sim::with(issuer("main", "https://issuer.example.com"), seed);
        assert!(sim.wants_fetch());
        sim.fetched("k1");
        let wait = sim.wait();
        assert!((240.0..285.0).contains(&wait), "{wait}");
        assert_eq!(sim.freshness(), Freshness::Fresh, "refreshed before the keys are stale");
        assert!(sim.wants_fetch());
        waits.push(wait);
    }
    waits.sort_by(f64::total_cmp);
    assert!(waits[49] - waits[0] > 20.0, "{waits:?}");
}

#[test]
fn a_day_without_the_issuer_backs_off_and_ends_in_refusal() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    let start = sim.now;
    let mut attempts: u32 = 0;
    let mut longest: f64 = 0.0;
    while sim.now.saturating_since(start) < Duration::from_secs(86_400) {
        let wait = sim.wait();
        if attempts > 0 {
            longest = longest.max(wait);
            assert!(wait >= 0.75, "{wait}");
        }
        assert!(sim.wants_fetch());
        sim.failed();
        attempts += 1;
        let age = sim.now.saturating_since(start).as_secs();
        let expected = match age {
            0..=300 => Freshness::Fresh,
            301..=3600 => Freshness::Stale,
            _ => Freshness::Expired,
        };
        assert!(sim.freshness() == expected || [300, 3600].contains(&age), "{age} s: {:?}", sim.freshness());
    }
    assert!((60.0..=75.0).contains(&longest), "{longest}");
    assert!((1200..2000).contains(&attempts), "{attempts} attempts in a day");
    assert!(sim.store.snapshot(sim.now).of_issuer(&sim.issuer).is_err());
    let status = &sim.store.status(sim.now)[0];
    assert_eq!((status.failures, status.key_count, status.freshness), (attempts, 1, Freshness::Expired));
    assert!(status.last_error.is_some());

    sim.wait();
    assert!(sim.wants_fetch());
    sim.fetched("k2");
    let snapshot = sim.store.snapshot(sim.now);
    assert!(snapshot.of_issuer(&sim.issuer).is_ok_and(|set| set.contains("k2") && !set.contains("k1")));
    assert_eq!(sim.store.status(sim.now)[0].last_error, None);
}

#[test]
fn age_counts_from_the_start_of_the_fetch() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.advance(10.0);
    sim.fetched("k1");
    assert_eq!(sim.store.status(sim.now)[0].age, Some(Duration::from_secs(10)));
}

#[test]
fn an_unknown_kid_triggers_one_refresh() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    sim.advance(60.0);
    assert_eq!(sim.unknown("k1"), UnknownKid::Known);
    assert_eq!(sim.unknown("k2"), UnknownKid::Refreshing);
    assert!(sim.wants_fetch());
    assert_eq!(sim.unknown("k2"), UnknownKid::Refreshing, "joins the running fetch");
    assert!(!sim.wants_fetch());
    sim.fetched("k2");
    assert_eq!(sim.unknown("k2"), UnknownKid::Known);
    assert_eq!(sim.store.on_unknown_kid("other", "k2", sim.now), UnknownKid::NoSuchIssuer);
}

#[test]
fn a_flood_of_invented_kids_costs_one_fetch_per_interval() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    let (mut fetches, mut tick) = (0, 0);
    // 100 s, a hundred different kids a second.
    while tick < 10_000 {
        let _ = sim.unknown(&format!("bad-{tick}"));
        if sim.wants_fetch() {
            fetches += 1;
            sim.fetched("k1");
        }
        sim.advance(0.01);
        tick += 1;
    }
    assert!((8..=10).contains(&fetches), "{fetches}");
}

#[test]
fn a_rotation_during_a_flood_is_seen_within_the_interval() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    sim.advance(1.0);
    let UnknownKid::Limited { until } = sim.unknown("k2") else { panic!() };
    assert_eq!(until.saturating_since(sim.now), Duration::from_secs(9));
    assert!(!sim.wants_fetch());
    assert!((sim.wait() - 9.0).abs() < 0.001);
    assert!(sim.wants_fetch());
    sim.fetched("k2");
    assert_eq!(sim.unknown("k2"), UnknownKid::Known);
}

#[test]
fn a_kid_that_a_refresh_did_not_bring_is_missing_for_a_while() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    sim.advance(20.0);
    assert_eq!(sim.unknown("bad"), UnknownKid::Refreshing);
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    sim.advance(15.0);
    assert_eq!(sim.unknown("bad"), UnknownKid::Missing);
    assert!(!sim.wants_fetch(), "no fetch for a kid that is known to be missing");
    assert_eq!(sim.unknown("new"), UnknownKid::Refreshing, "another one may ask");
    assert!(sim.wants_fetch());
    sim.failed();
    sim.advance(15.0);
    assert_eq!(sim.unknown("bad"), UnknownKid::Refreshing, "forgotten after 30 s");
}

#[test]
fn a_failed_refresh_does_not_mark_a_kid_missing() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    sim.advance(20.0);
    assert_eq!(sim.unknown("k2"), UnknownKid::Refreshing);
    assert!(sim.wants_fetch());
    sim.failed();
    sim.advance(0.1);
    assert!(matches!(sim.unknown("k2"), UnknownKid::Limited { .. }));
}

#[test]
fn remembered_kids_are_bounded() {
    let mut sim = Sim::new();
    for round in 0..20 {
        sim.advance(20.0);
        for n in 0..1000 {
            let _ = sim.unknown(&format!("bad-{round}-{n}"));
        }
        while sim.wants_fetch() {
            sim.fetched("k1");
        }
    }
    // 64 asked kids a round at most, so the Debug text (which shows every remembered kid) stays small.
    assert!(format!("{:?}", sim.store).matches("bad-").count() <= 256 + 64);
}

#[test]
fn a_file_is_polled_and_an_unchanged_one_stays_fresh() {
    let file = KeySource::File(PathBuf::from("/keys.json"));
    let mut sim = Sim::with(Issuer { keys: file, ..issuer("main", "https://issuer.example.com") }, 1);
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    for _ in 0..10_000 {
        assert!((sim.wait() - 2.0).abs() < 0.001);
        assert!(sim.wants_fetch());
        sim.store.on_fetched("main", Ok(Fetched::Unchanged), sim.now);
        assert_eq!(sim.freshness(), Freshness::Fresh);
    }
}

#[test]
fn unchanged_without_keys_is_a_failure() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.store.on_fetched("main", Ok(Fetched::Unchanged), sim.now);
    assert_eq!(sim.store.status(sim.now)[0].failures, 1);
    assert_eq!(sim.freshness(), Freshness::Missing);
}

#[test]
fn a_tight_staleness_limit_pulls_the_refresh_forward() {
    let limits =
        Issuer { max_staleness: Duration::from_secs(60), ..issuer("main", "https://issuer.example.com") };
    let mut sim = Sim::with(limits, 1);
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    assert!(sim.wait() < 30.0);
    // A limit of nothing must not become a busy loop.
    let none = Issuer { max_staleness: Duration::ZERO, ..issuer("main", "https://issuer.example.com") };
    let mut sim = Sim::with(none, 1);
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    assert!(sim.wait() >= 1.0);
}

#[test]
fn another_policys_store_keeps_what_comes_from_the_same_place() {
    let mut sim = Sim::new();
    assert!(sim.wants_fetch());
    sim.fetched("k1");
    sim.advance(10.0);
    let following = |sim: &Sim, issuer: Issuer| {
        let issuer = Arc::new(issuer);
        let store = sim.store.following([Arc::clone(&issuer)], sim.now);
        Sim { store, issuer, now: sim.now }
    };
    let mut same = following(&sim, (*sim.issuer).clone());
    assert_eq!(same.freshness(), Freshness::Fresh);
    assert!(!same.wants_fetch() && same.store.all_loaded());
    // Other limits: the same keys, judged by the new ones.
    let stricter = Issuer { max_staleness: Duration::from_secs(5), ..(*sim.issuer).clone() };
    let mut stricter = following(&sim, stricter);
    assert_eq!(stricter.freshness(), Freshness::Expired);
    assert!(stricter.wants_fetch());
    // Another place, or another issuer of this name: nothing of it is believed.
    for other in [
        Issuer { keys: KeySource::File(PathBuf::from("/other")), ..(*sim.issuer).clone() },
        Issuer { issuer: "https://other.example".into(), ..(*sim.issuer).clone() },
        Issuer { ca_file: Some(PathBuf::from("/ca")), ..(*sim.issuer).clone() },
        Issuer { name: "renamed".into(), ..(*sim.issuer).clone() },
    ] {
        let mut other = following(&sim, other);
        assert_eq!(other.freshness(), Freshness::Missing);
        assert!(other.wants_fetch());
    }
    // A fetch that runs for the old store says nothing to the new one.
    sim.wait();
    assert!(sim.wants_fetch());
    let mut same = following(&sim, (*sim.issuer).clone());
    assert!(same.wants_fetch());
}
