//! Tokens that are no access tokens, or not for bearers.

use serde_json::json;

use super::{GONE, refused};
use crate::token::testing::World;
use crate::token::*;

#[test]
fn an_id_token_is_refused() {
    let mut world = World::new();
    refused(world.with_header("typ", &GONE), TokenReason::TypeMissing);
    refused(world.with_header("typ", &json!("JWT")), TokenReason::TypeNotAccepted);
    world.issuer.token_types.push("jwt".to_owned());
    world.header["typ"] = json!("JWT");
    assert!(world.verify().is_ok(), "policy admits plain JWT");
    for claim in ["nonce", "at_hash", "c_hash"] {
        refused(world.with_claim(claim, &json!("x")), TokenReason::NotAccessToken);
    }
    refused(world.with_claim("typ", &json!("ID")), TokenReason::NotAccessToken);
    refused(world.with_claim("token_use", &json!("id")), TokenReason::NotAccessToken);
    assert!(world.with_claim("token_use", &json!("access")).is_ok());
    assert!(world.with_claim("typ", &json!("Bearer")).is_ok());
}

#[test]
fn an_id_jag_is_refused() {
    let mut world = World::new();
    world.issuer.token_types.push("jwt".to_owned());
    for typ in [
        "oauth-id-jag+jwt",
        "application/oauth-id-jag+jwt",
        "logout+jwt",
        "dpop+jwt",
        "at+jwt;x",
        " at+jwt",
        "",
    ] {
        refused(world.with_header("typ", &json!(typ)), TokenReason::TypeNotAccepted);
    }
}

#[test]
fn a_refresh_or_logout_token_is_refused() {
    let world = World::new();
    for kind in ["Refresh", "Offline", "Logout"] {
        refused(world.with_claim("typ", &json!(kind)), TokenReason::NotAccessToken);
    }
    refused(world.with_claim("token_use", &json!("refresh")), TokenReason::NotAccessToken);
    refused(world.with_claim("events", &json!({})), TokenReason::NotAccessToken);
}

#[test]
fn typ_is_compared_without_case_and_prefix() {
    let world = World::new();
    for typ in ["at+jwt", "AT+JWT", "application/at+jwt", "Application/AT+jwt"] {
        assert!(world.with_header("typ", &json!(typ)).is_ok(), "{typ}");
    }
    refused(world.with_header("typ", &json!(1)), TokenReason::ClaimMalformed);
    refused(world.with_header("typ", &json!("application/application/at+jwt")), TokenReason::TypeNotAccepted);
}

#[test]
fn a_token_with_cnf_is_never_downgraded_to_a_bearer() {
    let world = World::new();
    for cnf in [json!({"jkt": "x"}), json!({"x5t#S256": "x"}), json!({}), json!("")] {
        refused(world.with_claim("cnf", &cnf), TokenReason::SenderConstrained);
    }
}

#[test]
fn sub_is_required_and_bounded() {
    let world = World::new();
    refused(world.with_claim("sub", &GONE), TokenReason::SubjectMissing);
    for sub in [json!(""), json!(7), json!("x".repeat(1025)), json!("a\nb"), json!(["alice"])] {
        refused(world.with_claim("sub", &sub), TokenReason::ClaimMalformed);
    }
    assert!(world.with_claim("sub", &json!("x".repeat(1024))).is_ok());
}
