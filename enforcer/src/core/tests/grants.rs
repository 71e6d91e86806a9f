//! What a grant is given for, how long it holds, and when its slot is free again.

use super::*;

#[test]
fn a_flow_knows_its_grant_before_the_server_has_a_byte() {
    // The next request comes before the first one is handed back, and needs no grant of its own.
    let mut bench = Bench::new();
    let first = bench.good("Content-Length: 4\r\n", "");
    bench.punt(first.as_bytes(), 0, 0);
    bench.punt(b"body", 0, 0);
    bench.punt(Bench::refused(0, "").as_bytes(), 0, 0);
    let serial = bench.fake.grants.values().next().unwrap().serial;
    assert_eq!(bench.fake.used, [serial, serial]);
}

#[test]
fn a_grant_ends_with_its_token_to_the_instant() {
    let mut bench = Bench::new();
    bench.now.unix_secs = World::new().verify().unwrap().not_after_unix_secs - 10;
    bench.now.unix_subsec_ns = 400_000_000;
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let grant = bench.fake.grants.values().next().copied().unwrap();
    assert_eq!(grant.deadline_ns, bench.now.boot_ns + 9_600_000_000);
}

#[test]
fn a_grant_ends_and_its_slot_rests_before_it_is_used_again() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let first = bench.fake.grants[&0];
    bench.now.boot_ns = first.deadline_ns;
    bench.now.unix_secs += 60;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0].serial, first.serial, "a program may still read it");
    bench.now.boot_ns += QUARANTINE_NS;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0].serial, 0);
    bench.punt(request.as_bytes(), 0, 0);
    assert_eq!(bench.fake.grants[&0].serial, 0);
    assert!(bench.fake.grants[&1].serial > first.serial);
    // The second grant goes too, and by then the first slot has rested.
    bench.now.boot_ns = bench.fake.grants[&1].deadline_ns + QUARANTINE_NS;
    bench.engine.tick(bench.now, &mut bench.fake);
    bench.punt(request.as_bytes(), 0, 0);
    assert!(bench.fake.grants[&0].serial > 0);
}

#[test]
fn a_slot_is_not_used_again_while_a_flow_names_its_grant() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let (_, back) = bench.last_back();
    let first = bench.fake.grants[&0];
    assert_eq!(back.grant_serial, first.serial);
    bench.fake.flows.insert(COOKIE, sweep_tests::flow([back.grant_serial, 0, 0, 0]));
    bench.now.boot_ns = first.deadline_ns + 10 * QUARANTINE_NS;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0], first);
    // The same token gets the same grant, with a new deadline.
    bench.punt(request.as_bytes(), 0, 0);
    assert_eq!(bench.last_back().1.grant_serial, first.serial);
    assert!(bench.fake.grants[&0].deadline_ns > bench.now.boot_ns);
    // The flow goes, and so does its grant.
    bench.fake.flows.clear();
    bench.now.boot_ns = bench.fake.grants[&0].deadline_ns + 10 * QUARANTINE_NS;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0].serial, 0);
}

#[test]
fn the_streams_of_an_ended_token_end_at_the_next_tick_and_no_others() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let grant = bench.fake.grants[&0];
    let observed =
        Flow { flags: enforcer_common::abi::FLOW_OBSERVE, ..sweep_tests::flow([grant.serial, 0, 0, 0]) };
    bench.fake.flows = BTreeMap::from([
        (1, sweep_tests::flow([grant.serial, 0, 0, 0])),
        (2, sweep_tests::flow([0; 4])),
        (3, observed),
    ]);
    bench.engine.mode = Mode::Observe;
    bench.now.unix_secs = grant.ends_at_unix_secs - 1;
    bench.now.boot_ns += 1;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert!(bench.fake.destroyed.is_empty());
    bench.now.unix_secs += 1;
    bench.now.boot_ns += 1;
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.destroyed, BTreeSet::from([1]));
    assert!(bench.fake.counts.contains(&"stream-expired"));
}

#[test]
fn a_grant_that_was_revoked_in_the_kernel_is_never_revived() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let first = bench.fake.grants[&0];
    bench.fake.grants.insert(0, Grant { revoked: 1, ..first });
    bench.punt(request.as_bytes(), 0, 0);
    assert_eq!(bench.fake.grants[&0], Grant { revoked: 1, ..first });
    assert!(bench.fake.grants[&1].serial > first.serial);
    assert_eq!(bench.last_back().1.grant_serial, bench.fake.grants[&1].serial);
    // Its slot is freed in its time, and the second grant stays the token's.
    bench.now.boot_ns = first.deadline_ns + QUARANTINE_NS;
    let second = bench.fake.grants[&1];
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0].serial, 0);
    assert_eq!((bench.fake.grants[&1].serial, bench.fake.grants[&1].revoked), (0, 0), "of the same age");
    assert_ne!(second.serial, 0);
}

#[test]
fn without_a_slot_for_its_grant_a_good_request_does_not_pass() {
    let mut bench = Bench::new();
    bench.fake.no_grants = true;
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    assert!(bench.fake.server.is_empty());
    assert!(bench.fake.client.starts_with(b"HTTP/1.1 503 "));
    assert_eq!(bench.fake.counts, ["grant-table-full"]);
}

#[test]
fn adopted_grants_are_found_and_freed() {
    let mut bench = Bench::new();
    let good = bench.good("", "");
    bench.punt(good.as_bytes(), 0, 0);
    let (&slot, &grant) = bench.fake.grants.first_key_value().unwrap();
    assert_eq!(slot, 0);
    // A new daemon finds it, one of an earlier generation, and one that was revoked.
    let old = Grant { serial: grant_serial(5, 2), generation: GENERATION - 1, fingerprint: [9; 16], ..grant };
    let number = 1_000_000;
    let revoked = Grant { serial: grant_serial(number, 3), fingerprint: [8; 16], revoked: 1, ..grant };
    bench.fake.grants.insert(2, old);
    bench.fake.grants.insert(3, revoked);
    let mut table = GrantTable::new(1 << 16);
    let free = Grant { serial: 0, ..grant };
    let slots =
        (0..8).map(|at| (at, bench.fake.grants.get(&at).copied().unwrap_or(free))).collect::<Vec<_>>();
    table.adopt(slots, GENERATION, bench.now);
    assert_eq!((table.len(), table.slots_used()), (1, 4));

    let verified = World::new().verify().unwrap();
    let later = Now { boot_ns: bench.now.boot_ns + 1_000_000_000, ..bench.now };
    let mut give = |fingerprint, now| {
        let fingerprint = crate::token::Fingerprint(fingerprint);
        let ask = GrantFor {
            token: &verified,
            fingerprint,
            server_id: grant.server_id,
            server: "",
            generation: GENERATION,
            caller: Origin::NONE,
            workload: "",
            workload_hashes: [[0; 16]; 2],
            buckets: [0; 8],
        };
        table.grant(ask, now, &mut bench.fake).unwrap()
    };
    let same = give(grant.fingerprint, later);
    assert_eq!((same.slot, same.serial), (slot, grant.serial));
    // The others get a slot that nobody used, as the free one rests, and a number that nobody had.
    let fresh = give(revoked.fingerprint, later);
    assert_eq!((fresh.slot, fresh.serial), (4, grant_serial(number + 1, 4)));
    let rested = Now { boot_ns: bench.now.boot_ns + QUARANTINE_NS, ..bench.now };
    assert_eq!(give(old.fingerprint, rested).slot, 1);
    let end = Now { boot_ns: bench.now.boot_ns + 2 * GRANT_MAX_NS, ..bench.now };
    table.free(&std::collections::HashSet::new(), 0, end, &mut bench.fake);
    assert!(table.is_empty());
    assert!(bench.fake.grants.values().all(|grant| grant.serial == 0));
}

#[test]
fn a_wall_clock_that_is_set_moves_no_deadline() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let first = bench.fake.grants[&0];
    assert!(first.deadline_ns <= bench.now.boot_ns + GRANT_MAX_NS);
    let set_right = bench.now.unix_secs;
    for unix_secs in [0, set_right - 86_400, set_right + 86_400, set_right + 1_000_000_000] {
        bench.now.unix_secs = unix_secs;
        bench.engine.tick(bench.now, &mut bench.fake);
        assert_eq!(bench.fake.grants[&0], first, "{unix_secs}");
        // Issued in the future, or expired: what is judged meanwhile is refused.
        let read = bench.fake.server.len();
        bench.punt(request.as_bytes(), 0, 0);
        assert_eq!(bench.fake.server.len(), read, "{unix_secs}");
    }
    bench.now =
        Now { boot_ns: first.deadline_ns + QUARANTINE_NS, unix_secs: set_right - 86_400, unix_subsec_ns: 0 };
    bench.engine.tick(bench.now, &mut bench.fake);
    assert_eq!(bench.fake.grants[&0].serial, 0);
}
