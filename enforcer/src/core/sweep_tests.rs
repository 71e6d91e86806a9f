use enforcer_common::abi::{EndpointKey, FAMILY_V4, grant_serial};

use super::*;

const NOW: u64 = 1_000_000;

pub(in crate::core) fn flow(grants: [u64; FLOW_GRANTS]) -> Flow {
    let end = EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 };
    Flow { grants, local: end, peer: end, ..Flow::BLANK }
}

fn grant(number: u64, principal_id: u64, ends_at_unix_secs: u64, revoked: u32) -> Grant {
    Grant {
        serial: grant_serial(number, number as u32),
        // Long past: what a grant still allows is no matter here.
        deadline_ns: 0,
        generation: 0,
        caller: enforcer_common::abi::Origin::NONE,
        principal_id,
        granted_ns: 0,
        expires_at_unix_secs: 0,
        ends_at_unix_secs,
        requests: 0,
        fingerprint: [0; 16],
        buckets: [0; 8],
        server_id: 0,
        revoked,
    }
}

/// The end of a connection that used these grants, the last one first.
fn end(used: &[Grant]) -> Option<StreamEnd> {
    let mut grants = [0; FLOW_GRANTS];
    grants.iter_mut().zip(used).for_each(|(to, grant)| *to = grant.serial);
    let stream = Stream::of(7, &flow(grants), Mode::Enforce)?;
    must_end(&stream, NOW, &[], |serial| used.iter().find(|grant| grant.serial == serial).copied())
}

const GOOD: u64 = NOW + 1;

#[test]
fn a_stream_ends_with_its_token_and_not_with_its_grant() {
    assert_eq!(end(&[]), None);
    assert_eq!(end(&[grant(1, 1, GOOD, 0)]), None);
    assert_eq!(end(&[grant(1, 1, NOW, 0)]), Some(StreamEnd::Expired));
    assert_eq!(end(&[grant(1, 1, GOOD, 1)]), Some(StreamEnd::Revoked));
}

#[test]
fn an_earlier_token_counts_when_it_is_revoked_or_somebody_elses() {
    assert_eq!(end(&[grant(2, 1, GOOD, 0), grant(1, 1, GOOD, 1)]), Some(StreamEnd::Revoked));
    // The client went on with its next token.
    assert_eq!(end(&[grant(2, 1, GOOD, 0), grant(1, 1, NOW, 0)]), None);
    assert_eq!(end(&[grant(2, 1, GOOD, 0), grant(1, 9, NOW, 0)]), Some(StreamEnd::Expired));
    assert_eq!(end(&[grant(2, 1, NOW, 0), grant(1, 9, GOOD, 0)]), Some(StreamEnd::Expired));
}

#[test]
fn a_grant_that_is_gone_or_another_in_its_slot_is_no_licence() {
    let stream = Stream::of(7, &flow([grant_serial(5, 5), 0, 0, 0]), Mode::Enforce).unwrap();
    assert_eq!(must_end(&stream, NOW, &[], |_| None), Some(StreamEnd::GrantGone));
    let later = Grant { serial: grant_serial(6, 5), ..grant(5, 1, GOOD, 0) };
    assert_eq!(must_end(&stream, NOW, &[], |_| Some(later)), Some(StreamEnd::GrantGone));
    let free = Grant { serial: 0, ..later };
    assert_eq!(must_end(&stream, NOW, &[], |_| Some(free)), Some(StreamEnd::GrantGone));
}

#[test]
fn what_was_observed_ends_when_the_policy_enforces() {
    for grants in [[0; FLOW_GRANTS], [grant_serial(1, 1), 0, 0, 0]] {
        let observed = Flow { flags: FLOW_OBSERVE, ..flow(grants) };
        assert_eq!(Stream::of(7, &observed, Mode::Observe), None);
        let stream = Stream::of(7, &observed, Mode::Enforce).unwrap();
        let end = must_end(&stream, NOW, &[], |_| Some(grant(1, 1, GOOD, 0)));
        assert_eq!(end, Some(StreamEnd::Observed));
        // Judged since, or accepted under an enforcing policy: as ever, whatever is in force now.
        let judged = |mode| Stream::of(7, &flow(grants), mode).is_some();
        assert_eq!([judged(Mode::Observe), judged(Mode::Enforce)], [grants[0] != 0; 2]);
    }
}

#[test]
fn a_connection_of_many_tokens_ends_when_one_of_them_may_be_revoked() {
    let used: Vec<Grant> = (1..=9).map(|number| grant(number, number, GOOD, 0)).collect();
    let mut flow = flow([0; FLOW_GRANTS]);
    for grant in &used {
        enforcer_common::flow::use_grant(&mut flow.grants, &mut flow.evicted_grants, grant.serial);
    }
    let stream = Stream::of(7, &flow, Mode::Enforce).unwrap();
    let end = |revoked: u64| {
        must_end(&stream, NOW, &[grant_serial(revoked, 0)], |serial| {
            used.iter().find(|grant| grant.serial == serial).copied()
        })
    };
    for evicted in 1..=5 {
        assert_eq!(end(evicted), Some(StreamEnd::Revoked));
    }
    // It can't be one of these; one in 64 others looks as if it could.
    assert_eq!(end(30), None);
    assert_eq!(end(64 + 5), Some(StreamEnd::Revoked));
}
