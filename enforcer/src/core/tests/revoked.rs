//! Revocations, between all steps of the daemon.

use super::*;

fn revoke_all(fake: &mut Fake) {
    fake.revocations.insert(1, everything());
    fake.epoch += 1;
}

#[test]
fn a_revoked_token_gets_401_and_no_grant() {
    let mut bench = Bench::new();
    revoke_all(&mut bench.fake);
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.grants.is_empty());
    let answer = String::from_utf8_lossy(&bench.fake.client).into_owned();
    assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("error=\"invalid_token\""), "{answer}");
    assert_eq!(bench.fake.counts, ["revoked"]);
    // Taken back, it is good again.
    bench.fake.revocations.clear();
    bench.fake.epoch += 1;
    bench.punt(request.as_bytes(), 0, 0);
    assert_eq!(bench.fake.server, request.as_bytes());
}

#[test]
fn while_the_revocations_cannot_be_read_no_token_is_accepted() {
    let mut bench = Bench::new();
    bench.fake.no_revocations = true;
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.grants.is_empty());
    assert!(bench.fake.client.starts_with(b"HTTP/1.1 503 "));
    bench.fake.no_revocations = false;
    bench.punt(request.as_bytes(), 0, 0);
    assert_eq!(bench.fake.server, request.as_bytes());
}

/// The operator's three steps at every point between the daemon's calls, while it gives a grant and then extends it: no grant is left
/// that a head could pass by, and nothing passes that came after the last step.
#[test]
fn no_grant_slips_through_between_daemon_and_operator() {
    let two_requests = |steps_at: Vec<u32>| {
        let never = steps_at.is_empty();
        let mut bench = Bench::new();
        bench.fake.steps_at = steps_at;
        let request = bench.good("", "");
        bench.punt(request.as_bytes(), 0, 0);
        let revoked = !never && bench.fake.steps_at.is_empty();
        let passed = bench.fake.server.len();
        // The connection is closed when the token is revoked in the middle; the next request comes on another one.
        bench.offset_bytes = 0;
        bench.epoch += 1;
        bench.punt(request.as_bytes(), 0, 0);
        assert!(!revoked || bench.fake.server.len() == passed, "passed after it was revoked");
        bench
    };
    let calls = two_requests(vec![]).fake.calls;
    assert!(calls >= 8, "{calls}");
    for first in 0..=calls {
        for second in first..=calls {
            for third in second..=calls {
                let mut bench = two_requests(vec![first, second, third]);
                while !bench.fake.steps_at.is_empty() {
                    bench.fake.operator_step();
                }
                let alive = bench.fake.grants.values().find(|grant| grant.serial != 0 && grant.revoked == 0);
                assert_eq!(alive, None, "steps at {first}, {second}, {third}");
            }
        }
    }
}
