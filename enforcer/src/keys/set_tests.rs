//! What a key set may hold, and what of it is used.

use serde_json::{Value, json};

use super::{KeySet, KeySetError, SkipReason};
use crate::policy::Algorithm;
use crate::token::testing::{ALL_ALGORITHMS, TestKey, b64};

fn parse(jwks: &[Value]) -> Result<KeySet, KeySetError> {
    KeySet::parse(json!({ "keys": jwks }).to_string().as_bytes())
}

/// The reason for which the only key of a set is skipped.
#[track_caller]
fn skipped(jwk: &Value) -> SkipReason {
    let set = parse(std::slice::from_ref(jwk)).unwrap();
    assert!(set.is_empty(), "{jwk} is used");
    set.skipped()[0].reason.clone()
}

fn with(mut jwk: Value, name: &str, value: Value) -> Value {
    jwk[name] = value;
    jwk
}

fn without(mut jwk: Value, name: &str) -> Value {
    jwk.as_object_mut().unwrap().remove(name);
    jwk
}

fn p256() -> Value {
    TestKey::for_algorithm(Algorithm::ES256).jwk("k1")
}

fn rsa() -> Value {
    TestKey::for_algorithm(Algorithm::RS256).jwk("k1")
}

#[test]
fn every_kind_fits_its_algorithms_only() {
    for (jwk, fitting) in [
        (rsa(), vec![Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::PS256]),
        (p256(), vec![Algorithm::ES256]),
        (TestKey::for_algorithm(Algorithm::ES384).jwk("k1"), vec![Algorithm::ES384]),
        (TestKey::for_algorithm(Algorithm::EdDSA).jwk("k1"), vec![Algorithm::EdDSA]),
    ] {
        let set = parse(&[jwk]).unwrap();
        let fits: Vec<_> = ALL_ALGORITHMS.into_iter().filter(|a| set.keys()[0].fits(*a)).collect();
        assert_eq!(fits, fitting);
    }
    let set = parse(&[with(rsa(), "alg", json!("PS256"))]).unwrap();
    let fits: Vec<_> = ALL_ALGORITHMS.into_iter().filter(|a| set.keys()[0].fits(*a)).collect();
    assert_eq!(fits, [Algorithm::PS256]);
    let ed = TestKey::for_algorithm(Algorithm::EdDSA).jwk("k1");
    assert_eq!(parse(&[with(ed, "alg", json!("Ed25519"))]).unwrap().len(), 1);
}

#[test]
fn the_document_is_strict() {
    let not_json = |text: &str| matches!(KeySet::parse(text.as_bytes()), Err(KeySetError::NotJsonObject(_)));
    assert!(["", "[]", "{", "{\"keys\":[]} x", "<html>"].into_iter().all(not_json));
    for text in ["{}", r#"{"keys":{}}"#, r#"{"keys":null}"#, r#"{"Keys":[]}"#] {
        assert_eq!(KeySet::parse(text.as_bytes()).unwrap_err(), KeySetError::NoKeysArray, "{text}");
    }
    for text in [r#"{"keys":[],"keys":[]}"#, r#"{"keys":[{"kid":"a","kid":"b"}]}"#] {
        assert!(matches!(KeySet::parse(text.as_bytes()), Err(KeySetError::DuplicateMember(_))), "{text}");
    }
    assert_eq!(parse(&vec![json!({}); 129]).unwrap_err(), KeySetError::TooManyKeys { found: 129 });
    assert!(parse(&[]).unwrap().is_empty(), "an issuer may withdraw every key");
}

#[test]
fn two_usable_keys_with_one_kid_are_refused() {
    assert!(matches!(parse(&[p256(), rsa()]), Err(KeySetError::DuplicateKeyId(_))));
    let for_encryption = with(rsa(), "use", json!("enc"));
    assert_eq!(parse(&[p256(), for_encryption]).unwrap().len(), 1, "a key that is not used is no twin");
    assert_eq!(parse(&[without(p256(), "kid"), without(p256(), "kid")]).unwrap().len(), 2);
}

#[test]
fn keys_that_are_not_for_us_are_skipped_and_the_rest_is_used() {
    let set = parse(&[
        json!({"kty": "oct", "k": "AAAA", "kid": "hmac"}),
        json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"}),
        json!("text"),
        p256(),
    ])
    .unwrap();
    assert_eq!(set.len(), 1);
    assert!(set.contains("k1") && !set.contains("hmac"));
    let shown: Vec<_> = set.skipped().iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "key 0 (\"hmac\") is not used: it is symmetric (kty \"oct\")",
            "key 1 is not used: its kty \"AKP\" is not supported",
            "key 2 is not used: it is not a JSON object",
        ]
    );
}

#[test]
fn use_and_key_ops_and_alg_must_fit() {
    assert!(matches!(skipped(&with(p256(), "use", json!("enc"))), SkipReason::NotForSignatures(_)));
    assert_eq!(skipped(&with(p256(), "use", json!(["sig"]))), SkipReason::Malformed("use"));
    assert_eq!(skipped(&with(p256(), "key_ops", json!(["sign"]))), SkipReason::NotForVerification);
    assert_eq!(skipped(&with(p256(), "key_ops", json!("verify"))), SkipReason::Malformed("key_ops"));
    assert_eq!(parse(&[with(without(p256(), "use"), "key_ops", json!(["verify"]))]).unwrap().len(), 1);
    for alg in ["HS256", "RS256", "ES384", "none", "ES256K", ""] {
        let reason = skipped(&with(p256(), "alg", json!(alg)));
        assert!(matches!(reason, SkipReason::UnsupportedAlgorithm(_)), "{alg}: {reason}");
    }
    assert!(matches!(skipped(&with(rsa(), "alg", json!("RSA-OAEP"))), SkipReason::UnsupportedAlgorithm(_)));
}

#[test]
fn weak_or_broken_rsa_keys_are_skipped() {
    let modulus = |bytes: usize, first: u8| {
        let mut n = vec![0xff; bytes];
        n[0] = first;
        b64(n)
    };
    for (n, bits) in [(modulus(128, 0x80), 1024), (modulus(256, 0x7f), 2047), (modulus(1025, 0x80), 8200)] {
        assert_eq!(skipped(&with(rsa(), "n", json!(n))), SkipReason::RsaSize { bits });
    }
    assert_eq!(skipped(&with(rsa(), "n", json!(b64([0; 256])))), SkipReason::RsaSize { bits: 0 });
    assert_eq!(parse(&[with(rsa(), "n", json!(modulus(257, 0)))]).unwrap().len(), 1, "a leading zero octet");
    for e in [vec![1], vec![2], vec![1, 0, 0], vec![0], vec![1, 0, 0, 0, 0, 1]] {
        assert_eq!(skipped(&with(rsa(), "e", json!(b64(e)))), SkipReason::Malformed("e"));
    }
    assert_eq!(skipped(&without(rsa(), "n")), SkipReason::Malformed("n"));
    assert_eq!(skipped(&with(rsa(), "n", json!("AQAB=="))), SkipReason::Malformed("n"));
    assert_eq!(skipped(&with(rsa(), "d", json!("AQAB"))), SkipReason::Private("d"));
}

#[test]
fn broken_curve_keys_are_skipped() {
    assert_eq!(skipped(&with(p256(), "x", json!(b64([1; 31])))), SkipReason::Malformed("x"));
    assert_eq!(skipped(&with(p256(), "y", json!(b64([1; 33])))), SkipReason::Malformed("y"));
    assert_eq!(skipped(&without(p256(), "y")), SkipReason::Malformed("y"));
    assert!(matches!(skipped(&with(p256(), "crv", json!("secp256k1"))), SkipReason::UnsupportedCurve(_)));
    assert_eq!(skipped(&with(p256(), "crv", json!("P-384"))), SkipReason::Malformed("x"));
    let ed = || TestKey::for_algorithm(Algorithm::EdDSA).jwk("k1");
    assert!(matches!(skipped(&with(ed(), "crv", json!("X25519"))), SkipReason::UnsupportedCurve(_)));
    assert_eq!(skipped(&with(ed(), "x", json!(b64([0; 57])))), SkipReason::Malformed("x"));
    assert_eq!(skipped(&with(p256(), "kid", json!(1))), SkipReason::Malformed("kid"));
    assert_eq!(skipped(&with(p256(), "kid", json!(""))), SkipReason::Malformed("kid"));
    assert_eq!(skipped(&json!({})), SkipReason::Malformed("kty"));
}
