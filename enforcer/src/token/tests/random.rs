//! Properties over arbitrary input.

use proptest::prelude::*;
use serde_json::json;

use crate::token::testing::{NOW, World, b64};
use crate::token::*;

proptest! {
    #[test]
    fn arbitrary_text_never_panics_and_never_verifies(text in any::<String>()) {
        let world = World::new();
        prop_assert!(world.verify_token(&text).is_err());
        prop_assert!(explain(&text, &world.server(), &world.keys(), NOW).0.iter().any(|c| c.outcome == Outcome::Fail));
    }

    #[test]
    fn arbitrary_segments_never_panic_and_never_verify(
        header in any::<Vec<u8>>(), payload in any::<Vec<u8>>(), signature in any::<Vec<u8>>(),
    ) {
        let world = World::new();
        let token = format!("{}.{}.{}", b64(header), b64(payload), b64(signature));
        prop_assert!(world.verify_token(&token).is_err());
    }

    /// A good token with bytes overwritten: verifies only if nothing changed.
    #[test]
    fn a_mutated_token_never_verifies(position in any::<prop::sample::Index>(), byte in 0x20u8..0x7f) {
        let world = World::new();
        let token = world.token();
        let mut bytes = token.clone().into_bytes();
        let position = position.index(bytes.len());
        bytes[position] = byte;
        let mutated = String::from_utf8(bytes).unwrap();
        prop_assert_eq!(world.verify_token(&mutated).is_ok(), mutated == token);
    }

    /// Both ways of walking the checks come to the same end, for claims of any type.
    #[test]
    fn explain_and_verify_agree(
        name in prop::sample::select(vec!["iss", "sub", "aud", "exp", "iat", "nbf", "scope", "scp", "cnf", "azp"]),
        value in prop::sample::select(vec![json!(1), json!("x"), json!([]), json!({}), json!(-1), json!(NOW), json!(1.5)]),
    ) {
        let mut world = World::new();
        world.claims[name] = value;
        let (server, keys, token) = (world.server(), world.keys(), world.token());
        let checks = explain(&token, &server, &keys, NOW).0;
        let failed = checks.iter().find(|check| check.outcome == Outcome::Fail && check.name != "required-scopes");
        match (verify(&token, &server, &keys, NOW), failed) {
            (Ok(_), None) => {}
            (Err(error), Some(check)) => prop_assert_eq!(error.to_string(), &*check.detail),
            (verified, failed) => prop_assert!(false, "{:?} but {:?}", verified, failed),
        }
    }
}
