//! A token that was verified before, under another policy: the same checks, without its signature.

use std::time::Duration;

use serde_json::{Value, json};

use super::refused;
use crate::policy::Algorithm;
use crate::token::testing::{ALL_ALGORITHMS, NOW, TestKey, World};
use crate::token::*;

fn again(first: &World, then: &World, now: u64) -> Result<VerifiedToken, TokenError> {
    let verified = first.verify().unwrap();
    verify_again(&verified.evidence, &then.server(), &then.keys(), now)
}

#[test]
fn what_did_not_change_is_found_again() {
    for algorithm in ALL_ALGORITHMS {
        let world = World::with_algorithm(algorithm);
        let (first, then) = (world.verify().unwrap(), again(&world, &world, NOW + 5).unwrap());
        assert_eq!((first.principal(), first.scopes), (then.principal(), then.scopes));
        assert_eq!(first.evidence, then.evidence);
    }
}

#[test]
fn every_part_of_the_policy_is_asked_again() {
    let world = World::new();
    let changed = |change: &dyn Fn(&mut World)| {
        let mut then = World { key: TestKey::for_algorithm(Algorithm::ES256), ..World::new() };
        then.jwks = Some(vec![world.key.jwk("k1")]);
        change(&mut then);
        again(&world, &then, NOW)
    };
    changed(&|_| {}).unwrap();
    refused(
        changed(&|then| then.resource = "https://other.example/mcp".into()),
        TokenReason::AudienceMismatch,
    );
    refused(changed(&|then| then.issuer.issuer = "https://other.example".into()), TokenReason::IssuerUnknown);
    refused(changed(&|then| then.issuer.token_types = vec!["jwt".into()]), TokenReason::TypeNotAccepted);
    let rs256 = vec![Algorithm::RS256];
    refused(changed(&|then| then.issuer.algorithms = rs256.clone()), TokenReason::AlgorithmNotAccepted);
    let minute = Duration::from_secs(60);
    refused(changed(&|then| then.issuer.max_token_lifetime = minute), TokenReason::LifetimeTooLong);
    refused(changed(&|then| then.jwks = Some(vec![then.key.jwk("k2")])), TokenReason::UnknownKey);
    // Another key under the same name.
    refused(changed(&|then| then.jwks = Some(vec![then.key.jwk("k1")])), TokenReason::SignatureInvalid);
}

#[test]
fn time_goes_on() {
    let world = World::new();
    again(&world, &world, NOW + 629).unwrap();
    refused(again(&world, &world, NOW + 630), TokenReason::Expired);
}

#[test]
fn what_is_kept_is_no_token_and_does_not_show() {
    let world = World::new();
    let token = world.token();
    let verified = world.verify_token(&token).unwrap();
    let shown = format!("{verified:?}");
    let signature = token.rsplit('.').next().unwrap();
    assert!(!shown.contains(signature) && !shown.contains(&token[..40]));
    let size_bytes = verified.evidence.size_bytes();
    assert!((100..1000).contains(&size_bytes), "{size_bytes}");
}

#[test]
fn a_thumbprint_is_that_of_rfc_7638() {
    // Section 3.1.
    let jwk: Value = json!({
        "kty": "RSA", "alg": "RS256", "kid": "2011-04-29", "e": "AQAB",
        "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    });
    let set = testing::key_set(&[jwk]);
    let expected = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs";
    assert_eq!(testing::b64(set.keys()[0].thumbprint()), expected);
}
