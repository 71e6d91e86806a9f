//! Requests that came while the flow was the daemon's: the kernel has not charged them.

use enforcer_common::abi::punt_limited;

use super::*;

const SEC_NS: u64 = 1_000_000_000;

#[test]
fn what_the_kernel_did_not_see_begin_is_charged_by_the_daemon() {
    let mut bench = Bench::new();
    bench.punt(Bench::refused(0, "").as_bytes(), 0, 0);
    assert_eq!(bench.fake.source_charges, 0, "the kernel has");
    // Faster than the hand-back.
    bench.write_seq += 1;
    bench.punt(Bench::refused(50, "part").as_bytes(), 0, 0);
    assert_eq!(bench.fake.source_charges, 1);
    // Behind the rest of a body.
    let next = bench.good("", "");
    bench.punt(format!("{}{next}", "y".repeat(46)).as_bytes(), 0, 0);
    assert_eq!(bench.fake.source_charges, 2);
    assert_eq!(bench.fake.server, next.as_bytes());
    // The same for a flow that was handed over in the middle of a body, whatever is said of the request before.
    let mut bench = Bench::new();
    let next = bench.good("", "");
    bench.punt(format!("zzz{next}").as_bytes(), punt_limited(1), 3);
    assert_eq!(bench.fake.source_charges, 1);
    assert_eq!(bench.fake.server, next.as_bytes());
}

#[test]
fn over_the_limit_it_is_answered_and_not_looked_at() {
    let mut bench = Bench::new();
    bench.punt(Bench::refused(0, "").as_bytes(), 0, 0);
    bench.fake.source_wait_ns = Some(3 * SEC_NS);
    bench.write_seq += 1;
    bench.fake.client.clear();
    let good = bench.good("", "");
    bench.punt(good.as_bytes(), 0, 0);
    let answer = String::from_utf8(bench.fake.client.clone()).unwrap();
    assert!(answer.starts_with("HTTP/1.1 429 ") && answer.contains("\r\nRetry-After: 5\r\n"), "{answer}");
    assert!(bench.fake.server.is_empty() && bench.fake.grants.is_empty() && bench.fake.destroyed.is_empty());
    assert_eq!(bench.fake.counts.last(), Some(&"over-limit"));
    bench.fake.source_wait_ns = None;
    bench.write_seq += 1;
    bench.punt(good.as_bytes(), 0, 0);
    assert_eq!(bench.fake.server, good.as_bytes());
}

#[test]
fn in_observe_mode_it_is_counted() {
    let mut bench = Bench::new();
    bench.punt(Bench::refused(0, "").as_bytes(), PUNT_OBSERVED, 0);
    bench.fake.source_wait_ns = Some(SEC_NS);
    bench.punt(bench.good("", "").as_bytes(), PUNT_OBSERVED, 0);
    assert_eq!(bench.fake.counts[1..], ["would-limit", "allowed"]);
}
