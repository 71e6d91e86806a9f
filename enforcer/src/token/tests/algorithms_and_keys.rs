//! Algorithm confusion, keys from the wrong place, keys of the wrong issuer.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::{GONE, refused};
use crate::keys::{BootInstant, KeySnapshot, SnapshotEntry};
use crate::policy::Algorithm;
use crate::token::testing::{ALL_ALGORITHMS, NOW, TestKey, World, b64, issuer, key_set, server};
use crate::token::*;

#[test]
fn alg_none_is_refused_in_any_case_and_with_any_signature() {
    let world = World::new();
    for none in ["none", "None", "NONE", "nOnE"] {
        refused(world.with_header("alg", &json!(none)), TokenReason::AlgorithmNone);
    }
    let header = json!({"alg": "none", "typ": "at+jwt"}).to_string();
    let unsigned = format!("{}.{}.", b64(header), b64(world.claims.to_string()));
    refused(world.verify_token(&unsigned), TokenReason::EmptySegment);
}

#[test]
fn rs256_to_hs256_confusion_is_refused() {
    let world = World::with_algorithm(Algorithm::RS256);
    let header = json!({"alg": "HS256", "typ": "at+jwt", "kid": "k1"}).to_string();
    let input = format!("{}.{}", b64(header), b64(world.claims.to_string()));
    // The classic: the public key, as published, is the HMAC secret.
    let secret = world.key.jwk("k1")["n"].as_str().unwrap().to_owned();
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
    let token = format!("{input}.{}", b64(ring::hmac::sign(&key, input.as_bytes())));
    refused(world.verify_token(&token), TokenReason::AlgorithmSymmetric);
    for hmac in ["HS384", "HS512", "hs256"] {
        refused(world.with_header("alg", &json!(hmac)), TokenReason::AlgorithmSymmetric);
    }
}

#[test]
fn alg_must_be_on_the_issuers_list_and_spelled_exactly() {
    let mut world = World::new();
    for alg in ["es256", "ES256 ", "ES256K", "ES512", "PS384", "PS512", "Ed25519", "", "RSA-OAEP"] {
        refused(world.with_header("alg", &json!(alg)), TokenReason::AlgorithmNotAccepted);
    }
    refused(world.with_header("alg", &GONE), TokenReason::AlgorithmMissing);
    refused(world.with_header("alg", &json!(["ES256"])), TokenReason::ClaimMalformed);
    world.issuer.algorithms = vec![Algorithm::RS256];
    let error = refused(world.verify(), TokenReason::AlgorithmNotAccepted);
    assert_eq!(
        error.to_string(),
        "the algorithm \"ES256\" is not accepted from issuer \"main\", accepted are RS256"
    );
}

#[test]
fn a_key_of_another_kind_or_for_another_alg_is_refused() {
    let mut world = World::new();
    for algorithm in ["RS256", "ES384", "EdDSA"] {
        refused(world.with_header("alg", &json!(algorithm)), TokenReason::KeyUnfit);
    }
    world = World::with_algorithm(Algorithm::RS256);
    let mut jwk = world.key.jwk("k1");
    jwk["alg"] = json!("PS256");
    world.jwks = Some(vec![jwk]);
    refused(world.verify(), TokenReason::KeyUnfit);
}

#[test]
fn kid_is_only_compared() {
    let world = World::new();
    for kid in ["../../../../dev/null", "/etc/passwd", "' OR 1=1 --", "https://evil.example/k1", "K1", "k1 "]
    {
        let error = refused(world.with_header("kid", &json!(kid)), TokenReason::UnknownKey);
        assert_eq!(error, TokenError::UnknownKey { issuer: "main".to_owned(), kid: kid.to_owned() });
    }
    for kid in [json!(""), json!(1), json!(["k1"]), json!("k".repeat(257)), json!("k1\u{0}"), json!({})] {
        refused(world.with_header("kid", &kid), TokenReason::KeyIdMalformed);
    }
}

#[test]
fn a_missing_kid_needs_exactly_one_fitting_key() {
    let mut world = World::new();
    world.header.as_object_mut().unwrap().remove("kid");
    let own = world.key.jwk("k1");
    let rsa = TestKey::for_algorithm(Algorithm::RS256).jwk("k2");
    world.jwks = Some(vec![rsa.clone(), own.clone()]);
    assert_eq!(world.verify().unwrap().key_id.as_deref(), Some("k1"));
    world.jwks = Some(vec![own, TestKey::for_algorithm(Algorithm::ES256).jwk("k3")]);
    refused(world.verify(), TokenReason::KeyAmbiguous);
    world.jwks = Some(vec![rsa]);
    refused(world.verify(), TokenReason::KeyAmbiguous);
}

#[test]
fn a_header_that_brings_its_own_key_is_refused() {
    let world = World::new();
    let attacker = TestKey::for_algorithm(Algorithm::ES256);
    for (name, value) in [
        ("jku", json!("https://evil.example/jwks")),
        ("x5u", json!("https://evil.example/cert")),
        ("jwk", attacker.jwk("k1")),
        ("jwk", json!({})),
    ] {
        refused(world.with_header(name, &value), TokenReason::KeyInHeader);
    }
    // `x5c` is never read: it neither helps an attacker nor hurts a token that carries it.
    let header = json!({"alg": "ES256", "typ": "at+jwt", "kid": "k1", "x5c": ["AAAA"]}).to_string();
    refused(
        world.verify_token(&attacker.mint_raw(Algorithm::ES256, &header, &world.claims.to_string())),
        TokenReason::SignatureInvalid,
    );
    assert!(world.with_header("x5c", &json!(["AAAA"])).is_ok());
}

#[test]
fn crit_b64_zip_and_enc_are_refused() {
    let world = World::new();
    for crit in [json!(["exp"]), json!([]), json!("x"), json!(["b64"])] {
        refused(world.with_header("crit", &crit), TokenReason::CriticalExtension);
    }
    refused(world.with_header("b64", &json!(false)), TokenReason::UnencodedPayload);
    refused(world.with_header("b64", &json!(true)), TokenReason::UnencodedPayload);
    refused(world.with_header("zip", &json!("DEF")), TokenReason::EncryptionParameter);
    refused(world.with_header("enc", &json!("A256GCM")), TokenReason::EncryptionParameter);
}

/// Two issuers with one `kid`: each one's tokens verify with its own key only.
#[test]
fn issuers_with_the_same_kid_do_not_vouch_for_each_other() {
    let a = World::new();
    let b_key = TestKey::for_algorithm(Algorithm::ES256);
    let b_issuer = Arc::new(issuer("other", "https://other.example.com"));
    let a_issuer = Arc::new(a.issuer.clone());
    let at = BootInstant::from_boot(Duration::from_secs(1000));
    let entry = |issuer: &Arc<_>, key: &TestKey| SnapshotEntry {
        issuer: Arc::clone(issuer),
        keys: Some(key_set(&[key.jwk("k1")])),
        fetched_at: at,
    };
    let keys = KeySnapshot::new(Arc::from([entry(&a_issuer, &a.key), entry(&b_issuer, &b_key)]), at);
    let both = server(vec![Arc::clone(&a_issuer), Arc::clone(&b_issuer)]);
    let claims_of_a = a.claims.to_string();
    let claims_of_b = claims_of_a.replace("issuer.example.com", "other.example.com");
    let mint = |key: &TestKey, claims: &str| key.mint_raw(Algorithm::ES256, &a.header.to_string(), claims);

    assert_eq!(verify(&mint(&a.key, &claims_of_a), &both, &keys, NOW).unwrap().issuer.name, "main");
    assert_eq!(verify(&mint(&b_key, &claims_of_b), &both, &keys, NOW).unwrap().issuer.name, "other");
    refused(verify(&mint(&b_key, &claims_of_a), &both, &keys, NOW), TokenReason::SignatureInvalid);
    refused(verify(&mint(&a.key, &claims_of_b), &both, &keys, NOW), TokenReason::SignatureInvalid);
    // An issuer of the policy that is not this server's.
    let only_b = server(vec![b_issuer]);
    refused(verify(&mint(&a.key, &claims_of_a), &only_b, &keys, NOW), TokenReason::IssuerUnknown);
}

#[test]
fn iss_is_byte_exact() {
    let world = World::new();
    for iss in [
        "https://issuer.example.com/",
        "https://ISSUER.example.com",
        "https://issuer.example.com:443",
        "http://issuer.example.com",
        "https://issuer.example.com ",
        "",
    ] {
        refused(world.with_claim("iss", &json!(iss)), TokenReason::IssuerUnknown);
    }
    refused(world.with_claim("iss", &GONE), TokenReason::IssuerMissing);
    refused(world.with_claim("iss", &json!(["https://issuer.example.com"])), TokenReason::ClaimMalformed);
}

#[test]
fn keys_that_expired_or_never_came_are_unavailable_and_not_a_bad_token() {
    let world = World::new();
    let (server, token) = (world.server(), world.token());
    let keys = world.keys();
    let at = |secs: u64| keys.at(BootInstant::from_boot(Duration::from_secs(1000 + secs)));
    assert!(verify(&token, &server, &at(3600), NOW).is_ok(), "stale keys are used");
    let error = refused(verify(&token, &server, &at(3601), NOW), TokenReason::KeysUnavailable);
    assert!(error.reason().is_unavailable());
    let none = KeySnapshot::new(Arc::from([]), BootInstant::from_boot(Duration::ZERO));
    refused(verify(&token, &server, &none, NOW), TokenReason::KeysUnavailable);
    // The same name with another identifier is another issuer.
    let mut other = World::new();
    other.issuer.issuer = "https://new.example.com".to_owned();
    other.claims["iss"] = json!("https://new.example.com");
    refused(verify(&other.token(), &other.server(), &keys, NOW), TokenReason::KeysUnavailable);
}

/// Bad claims are found before any key is touched: no refresh, no signature check for them.
#[test]
fn claims_are_judged_before_keys() {
    let mut world = World::new();
    world.header["kid"] = json!("unknown");
    refused(world.with_claim("aud", &json!("https://other.example")), TokenReason::AudienceMismatch);
    refused(world.with_claim("exp", &json!(NOW - 600)), TokenReason::Expired);
    refused(world.verify(), TokenReason::UnknownKey);
}

#[test]
fn a_changed_byte_of_any_segment_is_refused_for_every_algorithm() {
    for algorithm in ALL_ALGORITHMS {
        let world = World::with_algorithm(algorithm);
        let token = world.token();
        let payload = world.claims.to_string().replace("alice", "mallo");
        let mut parts: Vec<_> = token.split('.').map(str::to_owned).collect();
        parts[1] = b64(payload);
        refused(world.verify_token(&parts.join(".")), TokenReason::SignatureInvalid);
        let signature = world.key.sign(algorithm, b"something else");
        let (input, _) = token.rsplit_once('.').unwrap();
        refused(world.verify_token(&format!("{input}.{}", b64(signature))), TokenReason::SignatureInvalid);
    }
}

#[test]
fn another_key_of_the_same_kind_is_refused() {
    let mut world = World::with_algorithm(Algorithm::RS256);
    world.jwks = Some(vec![TestKey::other_rsa().jwk("k1")]);
    refused(world.verify(), TokenReason::SignatureInvalid);
}

#[test]
fn a_der_encoded_ecdsa_signature_is_refused() {
    let world = World::new();
    let token = world.token();
    let (input, _) = token.rsplit_once('.').unwrap();
    let der = [&[0x30u8, 0x06, 0x02, 0x01, 0x01, 0x02, 0x01, 0x01][..], &[0; 56]].concat();
    refused(world.verify_token(&format!("{input}.{}", b64(der))), TokenReason::SignatureInvalid);
    refused(world.verify_token(&format!("{input}.{}", b64([0; 64]))), TokenReason::SignatureInvalid);
}
