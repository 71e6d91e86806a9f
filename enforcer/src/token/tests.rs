//! Ways around token verification, one test each, and what must pass.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::testing::{ALL_ALGORITHMS, NOW, RESOURCE, TestKey, World, b64, issuer, key_set, server};
use super::*;
use crate::keys::{BootInstant, KeySnapshot, SnapshotEntry};
use crate::policy::Algorithm;

const GONE: Value = Value::Null;

#[track_caller]
fn refused(result: Result<VerifiedToken, TokenError>, reason: TokenReason) -> TokenError {
    match result {
        Ok(token) => panic!("accepted {token:?}, expected {reason}"),
        Err(error) => {
            assert_eq!(error.reason(), reason, "{error}");
            error
        }
    }
}

// What must pass.

#[test]
fn good_tokens_of_every_algorithm_verify() {
    for algorithm in ALL_ALGORITHMS {
        let token = World::with_algorithm(algorithm).verify().unwrap();
        assert_eq!(token.subject, "alice");
        assert_eq!(token.client_id.as_deref(), Some("agent-1"));
        assert_eq!(token.audience, RESOURCE);
        assert_eq!(token.issued_at, Some(NOW - 10));
        assert_eq!(token.expires_at, NOW + 600);
        assert_eq!(token.not_after_unix_secs, NOW + 630);
        assert_eq!(token.jwt_id.as_deref(), Some("id-1"));
        assert_eq!(token.key_id.as_deref(), Some("k1"));
        assert_eq!(token.scopes, BTreeSet::from(["mcp:read".to_owned(), "mcp:tools".to_owned()]));
        assert_eq!(token.issuer.name, "main");
    }
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

#[test]
fn principal_is_the_same_for_a_refreshed_token() {
    let world = World::new();
    let first = world.verify().unwrap().principal();
    assert_eq!(world.with_claim("jti", &json!("id-2")).unwrap().principal(), first);
    assert_ne!(world.with_claim("client_id", &json!("agent-2")).unwrap().principal(), first);
    assert_ne!(world.with_claim("sub", &json!("bob")).unwrap().principal(), first);
}

#[test]
fn client_is_client_id_then_azp() {
    let world = World::new();
    assert_eq!(world.with_claim("azp", &json!("z")).unwrap().client_id.as_deref(), Some("agent-1"));
    let mut world = World::new();
    world.claims["client_id"].take();
    world.claims.as_object_mut().unwrap().remove("client_id");
    assert_eq!(world.verify().unwrap().client_id, None);
    assert_eq!(world.with_claim("azp", &json!("z")).unwrap().client_id.as_deref(), Some("z"));
    refused(world.with_claim("azp", &json!(7)), TokenReason::ClaimMalformed);
    refused(world.with_claim("client_id", &json!("")), TokenReason::ClaimMalformed);
}

#[test]
fn scopes_come_from_scope_and_scp() {
    let world = World::new();
    let scopes = |name: &str, value: Value| world.with_claim(name, &value).map(|token| token.scopes);
    let set = |scopes: &[&str]| scopes.iter().map(|scope| (*scope).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(scopes("scp", json!("a b")), Ok(set(&["a", "b", "mcp:read", "mcp:tools"])));
    assert_eq!(scopes("scp", json!(["a"])), Ok(set(&["a", "mcp:read", "mcp:tools"])));
    assert_eq!(scopes("scope", json!("")), Ok(set(&[])));
    assert_eq!(scopes("scope", GONE), Ok(set(&[])));
    let rows =
        [("scope", json!(["a"])), ("scope", json!("a\tb")), ("scope", json!("a\"b")), ("scp", json!([1]))];
    for (name, value) in
        rows.into_iter().chain([("scp", json!(["a b"])), ("scp", json!({})), ("scp", json!(1))])
    {
        refused(world.with_claim(name, &value), TokenReason::ClaimMalformed);
    }
}

#[test]
fn missing_scopes_keep_the_order_and_the_case() {
    let token = World::new().verify().unwrap();
    let required = ["z", "mcp:tools", "MCP:read", "a"].map(str::to_owned);
    assert_eq!(missing_scopes(&token, &required), ["z", "MCP:read", "a"]);
    assert!(missing_scopes(&token, &[]).is_empty());
}

// 22: algorithms, keys, headers.

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

// 23: audience.

#[test]
fn aud_missing_empty_or_of_another_type_is_refused() {
    let world = World::new();
    refused(world.with_claim("aud", &GONE), TokenReason::AudienceMissing);
    for aud in
        [json!(""), json!([]), json!(7), json!({}), json!(true), json!([RESOURCE, 7]), json!([RESOURCE, ""])]
    {
        refused(world.with_claim("aud", &aud), TokenReason::AudienceMalformed);
    }
    // A JSON null, not an absent claim.
    let payload = world.claims.to_string().replace(&format!("\"{RESOURCE}\""), "null");
    let token = world.key.mint_raw(world.algorithm, &world.header.to_string(), &payload);
    refused(world.verify_token(&token), TokenReason::AudienceMalformed);
    refused(world.with_claim("aud", &json!([[RESOURCE]])), TokenReason::AudienceMalformed);
}

#[test]
fn aud_array_may_hold_ours_among_others() {
    let world = World::new();
    let token = world.with_claim("aud", &json!(["https://other.example.com", RESOURCE])).unwrap();
    assert_eq!(token.audience, RESOURCE);
    refused(
        world.with_claim("aud", &json!(["https://other.example.com", "x"])),
        TokenReason::AudienceMismatch,
    );
}

#[test]
fn aud_prefix_suffix_slash_and_upper_case_are_refused() {
    let world = World::new();
    for aud in [
        "https://mcp.example.com",
        "https://mcp.example.com/",
        "https://mcp.example.com/mc",
        "https://mcp.example.com/mcp/",
        "https://mcp.example.com/mcp/x",
        "https://mcp.example.com/mcp?x",
        "https://mcp.example.com/mcp#x",
        "https://mcp.example.com:443/mcp",
        "HTTPS://MCP.EXAMPLE.COM/mcp",
        "https://mcp.example.com/MCP",
        "https://mcp.example.com.evil.example/mcp",
        "http://mcp.example.com/mcp",
        "mcp.example.com/mcp",
        "https://mcp.example.com/%6dcp",
        "*",
    ] {
        refused(world.with_claim("aud", &json!(aud)), TokenReason::AudienceMismatch);
    }
}

#[test]
fn aud_of_a_bare_authority_equals_itself_with_a_slash_and_nothing_else() {
    let mut world = World::new();
    for resource in ["https://h.example", "https://h.example/"] {
        world.resource = resource.to_owned();
        for aud in ["https://h.example", "https://h.example/"] {
            assert_eq!(world.with_claim("aud", &json!(aud)).unwrap().audience, resource);
        }
        for aud in
            ["https://h.example//", "https://h.exampl", "https://h.example/x", "https:///", "https://", "/"]
        {
            refused(world.with_claim("aud", &json!(aud)), TokenReason::AudienceMismatch);
        }
    }
}

#[test]
fn aud_may_be_an_alias() {
    let mut world = World::new();
    refused(world.with_claim("aud", &json!("urn:files")), TokenReason::AudienceMismatch);
    world.aliases = vec!["https://old.example/mcp".to_owned(), "urn:files".to_owned()];
    assert_eq!(world.with_claim("aud", &json!("urn:files")).unwrap().audience, "urn:files");
    refused(world.with_claim("aud", &json!("urn:files/")), TokenReason::AudienceMismatch);
}

// 24: times.

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

// 25: other kinds of token.

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

// 26: form.

#[test]
fn a_token_of_100_kb_is_refused() {
    let world = World::new();
    let error = refused(world.with_claim("pad", &json!("x".repeat(75_000))), TokenReason::TooLarge);
    assert!(matches!(error, TokenError::TooLarge { size_bytes: 100_000.., limit_bytes: MAX_TOKEN_BYTES }));
    refused(world.verify_token(&".".repeat(100_000)), TokenReason::TooLarge);
}

#[test]
fn a_token_that_is_not_three_base64url_segments_is_refused() {
    let world = World::new();
    let token = world.token();
    let (input, signature) = token.rsplit_once('.').unwrap();
    let (header, payload) = input.split_once('.').unwrap();
    for (token, reason) in [
        (String::new(), TokenReason::SegmentCount),
        ("abc".to_owned(), TokenReason::SegmentCount),
        (input.to_owned(), TokenReason::SegmentCount),
        (format!("{token}.{signature}"), TokenReason::SegmentCount),
        (format!("{token}.{signature}.{signature}"), TokenReason::SegmentCount),
        ("..".to_owned(), TokenReason::EmptySegment),
        (format!("{input}."), TokenReason::EmptySegment),
        (format!("{header}..{signature}"), TokenReason::EmptySegment),
        (format!(".{payload}.{signature}"), TokenReason::EmptySegment),
        (format!("{token}="), TokenReason::NotBase64Url),
        (format!("{token}=="), TokenReason::NotBase64Url),
        (format!("{token}\n"), TokenReason::NotBase64Url),
        (format!(" {token}"), TokenReason::NotBase64Url),
        (format!("{header}.{payload}+.{signature}"), TokenReason::NotBase64Url),
        (format!("{header}/.{payload}.{signature}"), TokenReason::NotBase64Url),
        (format!("{header}.{payload}.not base64"), TokenReason::NotBase64Url),
        (format!("{header}.{payload}.ü"), TokenReason::NotBase64Url),
    ] {
        refused(world.verify_token(&token), reason);
    }
}

/// Without this, one token has several spellings, and each is a new one to caches and logs.
#[test]
fn trailing_bits_are_refused() {
    let world = World::new();
    let token = world.token();
    // 64 signature bytes: the last character carries 2 bits and 4 zeros.
    let last = token.chars().last().unwrap();
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let position = alphabet.find(last).unwrap();
    let twin = alphabet.chars().nth(position + 1).unwrap();
    let twin = format!("{}{twin}", &token[..token.len() - 1]);
    refused(world.verify_token(&twin), TokenReason::NotBase64Url);
    assert!(world.verify_token(&token).is_ok());
}

#[test]
fn header_and_payload_are_objects_without_duplicates() {
    let world = World::new();
    let (header, claims) = (world.header.to_string(), world.claims.to_string());
    let check = |header: &str, payload: &str, reason| {
        refused(world.verify_token(&world.key.mint_raw(world.algorithm, header, payload)), reason);
    };
    check(&header.replacen('{', "{\"alg\":\"none\",", 1), &claims, TokenReason::DuplicateMember);
    check(&header.replacen('{', "{\"\\u0061lg\":\"none\",", 1), &claims, TokenReason::DuplicateMember);
    check(&header, &claims.replacen('{', "{\"aud\":\"x\",", 1), TokenReason::DuplicateMember);
    check(&header, &claims.replacen('{', "{\"x\":{\"a\":1,\"a\":2},", 1), TokenReason::DuplicateMember);
    for other in ["[]", "\"x\"", "1", "null", "{", "{} {}", "\u{feff}{}"] {
        check(other, &claims, TokenReason::NotJsonObject);
        check(&header, other, TokenReason::NotJsonObject);
    }
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

// Reasons, messages, explain.

#[test]
fn reasons_have_distinct_kebab_case_names() {
    let names: BTreeSet<_> = TokenReason::ALL.iter().map(|reason| reason.name()).collect();
    assert_eq!(names.len(), TokenReason::ALL.len());
    assert!(
        names
            .iter()
            .all(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'))
    );
}

#[test]
fn messages_are_bounded_and_escaped() {
    let world = World::new();
    let evil = format!("\u{1b}[2J\r\n\"{}\u{202e}", "A".repeat(5000));
    for result in [
        world.with_claim("iss", &json!(evil)),
        world.with_claim("aud", &json!([evil, evil])),
        world.with_header("alg", &json!(evil)),
        world.with_header("typ", &json!(evil)),
        world.with_header(&evil, &json!(1)),
    ] {
        let Err(error) = result else { continue };
        let message = error.to_string();
        assert!(message.len() < 512, "{message}");
        assert!(message.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{message}");
    }
    assert_eq!(Quoted::new("a\"b\n\u{e9}").to_string(), r#""a\"b\n\u{e9}""#);
    assert_eq!(Quoted::new(&"x".repeat(128)).to_string().len(), 130);
    assert_eq!(Quoted::new(&"x".repeat(129)).to_string(), format!("\"{}..\"", "x".repeat(126)));
}

#[test]
fn explain_shows_every_check_and_agrees_with_verify() {
    let mut world = World::new();
    let explained = |world: &World| explain(&world.token(), &world.server(), &world.keys(), NOW);
    let outcome =
        |checks: &[Check], name: &str| checks.iter().find(|check| check.name == name).unwrap().outcome;
    let good = explained(&world);
    assert!(good.iter().all(|check| check.outcome == Outcome::Pass), "{good:#?}");

    world.claims["aud"] = json!("https://other.example");
    world.claims["exp"] = json!(NOW - 600);
    let bad = explained(&world);
    assert_eq!(bad.len(), good.len());
    for (name, expected) in [
        ("audience", Outcome::Fail),
        ("expiry", Outcome::Fail),
        ("lifetime", Outcome::Skipped),
        ("signature", Outcome::Pass),
        ("required-scopes", Outcome::Skipped),
    ] {
        assert_eq!(outcome(&bad, name), expected, "{name}");
    }
    let first = bad.iter().find(|check| check.outcome == Outcome::Fail).unwrap();
    assert_eq!(first.detail, world.verify().unwrap_err().to_string());

    let mut world = World::new();
    world.claims["scope"] = json!("other");
    assert!(world.verify().is_ok());
    let narrow = explained(&world);
    assert_eq!(outcome(&narrow, "required-scopes"), Outcome::Fail);
    let text = format!("{narrow:?}");
    let token = world.token();
    assert!(token.split('.').all(|segment| !text.contains(segment)), "no token material");
    let garbage = explain("garbage", &world.server(), &world.keys(), NOW);
    assert_eq!(outcome(&garbage, "format"), Outcome::Fail);
    assert!(garbage[1..].iter().all(|check| check.outcome == Outcome::Skipped));
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics_and_never_verifies(text in any::<String>()) {
        let world = World::new();
        prop_assert!(world.verify_token(&text).is_err());
        prop_assert!(explain(&text, &world.server(), &world.keys(), NOW).iter().any(|c| c.outcome == Outcome::Fail));
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
        let checks = explain(&token, &server, &keys, NOW);
        let failed = checks.iter().find(|check| check.outcome == Outcome::Fail && check.name != "required-scopes");
        match (verify(&token, &server, &keys, NOW), failed) {
            (Ok(_), None) => {}
            (Err(error), Some(check)) => prop_assert_eq!(error.to_string(), &*check.detail),
            (verified, failed) => prop_assert!(false, "{:?} but {:?}", verified, failed),
        }
    }
}
