//! Connections that used more tokens than they remember one by one.

use enforcer_common::abi::{MAX_GRANTS, grant_bit};

use super::super::grants::RESERVED_SLOTS;
use super::*;

/// A grant of another token, in force, in this slot.
fn other(slot: u32, like: Grant) -> Grant {
    Grant {
        serial: grant_serial(1_000_000 + u64::from(slot), slot),
        deadline_ns: u64::MAX / 2,
        ends_at_unix_secs: NOW + 1_000_000,
        fingerprint: u128::from(slot).to_be_bytes(),
        ..like
    }
}

/// A request of a token, whose grant has made room for others on a connection that goes on.
fn evicted() -> (Bench, Grant) {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let first = bench.fake.grants[&0];
    let last = other(9, first);
    bench.fake.grants.insert(9, last);
    let flow = Flow { evicted_grants: grant_bit(first.serial), ..sweep_tests::flow([last.serial, 0, 0, 0]) };
    bench.fake.flows.insert(COOKIE, flow);
    bench.now.boot_ns = first.deadline_ns + 10 * QUARANTINE_NS;
    bench.now.unix_secs += 300;
    (bench, first)
}

#[test]
fn a_token_that_made_room_on_a_connection_can_be_revoked_until_it_has_ended() {
    let (mut bench, first) = evicted();
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0], first, "nobody could find the connection by it any more");
    assert!(bench.fake.destroyed.is_empty());
    bench.fake.grants.insert(0, Grant { revoked: 1, ..first });
    bench.fake.epoch += 1;
    bench.now.boot_ns += 1;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.destroyed, BTreeSet::from([COOKIE]));
    assert!(bench.fake.counts.contains(&"stream-revoked"));
}

#[test]
fn the_slot_is_free_when_no_leeway_makes_the_token_good_or_the_connection_is_gone() {
    let (mut bench, first) = evicted();
    bench.now.unix_secs = first.expires_at_unix_secs + 299;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0], first);
    bench.now.unix_secs += 1;
    bench.now.boot_ns += QUARANTINE_NS;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0].serial, 0);
    assert!(bench.fake.destroyed.is_empty());

    let (mut bench, _) = evicted();
    bench.fake.flows.clear();
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0].serial, 0);
}

#[test]
fn connections_that_keep_slots_end_when_slots_are_short() {
    for (in_use, ends) in [(MAX_GRANTS as usize - RESERVED_SLOTS, false), (MAX_GRANTS as usize, true)] {
        let (mut bench, first) = evicted();
        let living = 1..in_use as u32;
        bench.fake.grants.extend(living.map(|slot| (slot, other(slot, first))));
        let bystander = sweep_tests::flow([other(10, first).serial, 0, 0, 0]);
        bench.fake.flows.insert(COOKIE + 1, bystander);
        let slots: Vec<_> = bench.fake.grants.iter().map(|(slot, grant)| (*slot, *grant)).collect();
        let mut table = GrantTable::new(1 << 16);
        table.adopt(slots, GENERATION, bench.now);
        *bench.engine.grants() = table;
        bench.engine.tick(bench.now, &mut bench.fake);
        assert_eq!(bench.fake.destroyed, if ends { BTreeSet::from([COOKIE]) } else { BTreeSet::new() });
        assert_eq!(bench.fake.counts.contains(&"stream-grants-short"), ends);
        assert_eq!(bench.fake.grants[&0], first, "not freed while the connection may live");
        bench.fake.flows.remove(&COOKIE);
        bench.now.boot_ns += QUARANTINE_NS;
        bench.engine.tick(bench.now, &mut bench.fake);
        assert_eq!(bench.fake.grants[&0].serial, 0);
        assert_ne!(bench.fake.grants[&10].serial, 0);
    }
}

#[test]
fn a_use_that_is_noted_after_the_first_look_counts_too() {
    let (mut bench, first) = evicted();
    let noted_later = bench.fake.flows.remove(&COOKIE).unwrap();
    let last = other(9, first);
    let unrelated = Flow {
        evicted_grants: grant_bit(first.serial).rotate_left(1),
        ..sweep_tests::flow([last.serial, 0, 0, 0])
    };
    bench.fake.flows.insert(1, unrelated);
    bench.now.boot_ns = first.deadline_ns - 1_000_000_000;
    bench.fake.grants.insert(0, Grant { revoked: 1, ..first });
    bench.fake.epoch += 1;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert!(bench.fake.destroyed.is_empty());
    bench.fake.flows.insert(COOKIE, noted_later);
    bench.now.boot_ns += 500_000_000;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.destroyed, BTreeSet::from([COOKIE]));
}
