//! `exp`, `nbf`, `iat` and the lifetime.

use std::time::Duration;

use serde_json::json;

use super::{GONE, refused};
use crate::token::testing::{NOW, World};
use crate::token::*;

#[test]
fn exp_missing_past_far_float_or_string_is_refused() {
    let world = World::new();
    refused(world.with_claim("exp", &GONE), TokenReason::ExpiryMissing);
    refused(world.with_claim("exp", &json!(253_402_300_799_u64)), TokenReason::LifetimeTooLong);
    for exp in [
        json!(253_402_300_800_u64),
        json!(u64::MAX),
        json!((NOW + 600) as f64),
        json!(1.8e9),
        json!((NOW + 600).to_string()),
        json!(-1),
        json!([NOW + 600]),
        json!(true),
    ] {
        refused(world.with_claim("exp", &exp), TokenReason::DateMalformed);
    }
    // Written as a float or with an exponent, and beyond 64 bits.
    for text in ["1800000600.0", "18000006e2", "18446744073709551616"] {
        let payload = world.claims.to_string().replace(&(NOW + 600).to_string(), text);
        let token = world.key.mint_raw(world.algorithm, &world.header.to_string(), &payload);
        refused(world.verify_token(&token), TokenReason::DateMalformed);
    }
}

#[test]
fn exp_is_exclusive_and_leeway_is_exact() {
    let mut world = World::new();
    assert!(world.with_claim("exp", &json!(NOW - 9)).is_ok(), "within leeway");
    assert!(world.with_claim("exp", &json!(NOW - 10)).is_err(), "not after iat");
    world.claims["iat"] = json!(NOW - 100);
    assert!(world.with_claim("exp", &json!(NOW - 29)).is_ok());
    refused(world.with_claim("exp", &json!(NOW - 30)), TokenReason::Expired);
    world.issuer.leeway = Duration::ZERO;
    assert!(world.with_claim("exp", &json!(NOW + 1)).is_ok());
    refused(world.with_claim("exp", &json!(NOW)), TokenReason::Expired);
}

#[test]
fn iat_missing_in_the_future_or_malformed_is_refused() {
    let world = World::new();
    refused(world.with_claim("iat", &GONE), TokenReason::IssuedAtMissing);
    assert!(world.with_claim("iat", &json!(NOW + 30)).is_ok());
    refused(world.with_claim("iat", &json!(NOW + 31)), TokenReason::IssuedInFuture);
    refused(world.with_claim("iat", &json!(1.5)), TokenReason::DateMalformed);
    refused(world.with_claim("iat", &json!(-5)), TokenReason::DateMalformed);
}

#[test]
fn nbf_is_honoured() {
    let world = World::new();
    assert!(world.with_claim("nbf", &json!(NOW + 30)).is_ok());
    refused(world.with_claim("nbf", &json!(NOW + 31)), TokenReason::NotYetValid);
    refused(world.with_claim("nbf", &json!("0")), TokenReason::DateMalformed);
}

#[test]
fn lifetime_above_the_maximum_is_refused() {
    let world = World::new();
    assert!(world.with_claim("exp", &json!(NOW - 10 + 3600)).is_ok());
    refused(world.with_claim("exp", &json!(NOW - 10 + 3601)), TokenReason::LifetimeTooLong);
    refused(world.with_claim("iat", &json!(0)), TokenReason::LifetimeTooLong);
}

#[test]
fn expiry_at_or_before_issue_is_refused() {
    let mut world = World::new();
    world.claims["iat"] = json!(NOW + 10);
    for exp in [NOW + 10, NOW + 9] {
        refused(world.with_claim("exp", &json!(exp)), TokenReason::ExpiryBeforeIssue);
    }
}
