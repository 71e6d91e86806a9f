//! The issuer's tokens verify under its published keys, and its defects are the ones asked for.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use enforcer_tests::guard::Deadline;
use enforcer_tests::issuer::{Alg, FailMode, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder, Response, request};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RsaParameters,
    RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);

fn decode(text: &str) -> Result<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).context("base64url")
}

fn parts(token: &str) -> Result<(Value, Value, Vec<u8>)> {
    let mut parts = token.split('.');
    let mut next = || parts.next().context("too few parts");
    let (header, claims, signature) = (next()?, next()?, next()?);
    Ok((
        serde_json::from_slice(&decode(header)?)?,
        serde_json::from_slice(&decode(claims)?)?,
        decode(signature)?,
    ))
}

/// Verifies with nothing but the JWK, independently of the signing side's key objects.
fn verifies(token: &str, jwks: &Value) -> Result<bool> {
    let (header, _, signature) = parts(token)?;
    let keys = jwks["keys"].as_array().context("keys")?;
    let Some(jwk) = keys.iter().find(|key| key["kid"] == header["kid"]) else { return Ok(false) };
    let member = |name: &str| decode(jwk[name].as_str().with_context(|| format!("no {name}"))?);
    let (message, _) = token.rsplit_once('.').context("no dot")?;
    let message = message.as_bytes();
    let rsa = |parameters: &'static RsaParameters| -> Result<bool> {
        let key = RsaPublicKeyComponents { n: member("n")?, e: member("e")? };
        Ok(key.verify(parameters, message, &signature).is_ok())
    };
    let point = || -> Result<Vec<u8>> { Ok([vec![4], member("x")?, member("y")?].concat()) };
    Ok(match jwk["alg"].as_str().context("no alg")? {
        "ES256" => {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point()?).verify(message, &signature).is_ok()
        }
        "ES384" => {
            UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point()?).verify(message, &signature).is_ok()
        }
        "EdDSA" => UnparsedPublicKey::new(&ED25519, member("x")?).verify(message, &signature).is_ok(),
        "RS256" => rsa(&RSA_PKCS1_2048_8192_SHA256)?,
        "RS384" => rsa(&RSA_PKCS1_2048_8192_SHA384)?,
        "RS512" => rsa(&RSA_PKCS1_2048_8192_SHA512)?,
        "PS256" => rsa(&RSA_PSS_2048_8192_SHA256)?,
        other => anyhow::bail!("unknown alg {other}"),
    })
}

#[test]
fn tokens_of_every_algorithm_verify_under_the_key_set() -> Result<()> {
    for alg in Alg::ALL {
        let issuer = Issuer::new("https://issuer.example", alg)?;
        let mint = issuer.mint().audience("https://mcp.example/mcp").scope("a b");
        let token = mint.sign()?;
        assert!(verifies(&token, &issuer.jwks())?, "{alg}");
        assert!(!verifies(&mint.clone().corrupt_signature().sign()?, &issuer.jwks())?, "{alg}");
        let other = Issuer::new("https://issuer.example", alg)?;
        other.rotate(false)?;
        assert!(!verifies(&mint.signed_by(other.current_key()).sign()?, &issuer.jwks())?, "{alg}");
        let (header, claims, _) = parts(&token)?;
        assert_eq!(header, json!({ "alg": alg.name(), "kid": "key-0", "typ": "at+jwt" }));
        assert_eq!(claims["iss"], "https://issuer.example");
        assert_eq!((&claims["aud"], &claims["scope"]), (&json!("https://mcp.example/mcp"), &json!("a b")));
        assert_eq!(alg.name().parse::<Alg>()?, alg);
    }
    Ok(())
}

#[test]
fn every_part_of_a_token_can_be_set() -> Result<()> {
    let issuer = Issuer::new("https://issuer.example", Alg::Es256)?;
    let token = issuer
        .mint()
        .audiences(&["https://a", "https://b"])
        .expires_in(-10)
        .issued_in(-20)
        .not_before_in(5)
        .claim("scp", json!(["x"]))
        .without_claim("sub")
        .typ("JWT")
        .alg_header("none")
        .without_header("kid")
        .unsigned()
        .sign()?;
    let (header, claims, signature) = parts(&token)?;
    assert_eq!(header, json!({ "alg": "none", "typ": "JWT" }));
    assert_eq!((&claims["aud"], &claims["scp"]), (&json!(["https://a", "https://b"]), &json!(["x"])));
    assert!(claims.get("sub").is_none() && signature.is_empty() && token.ends_with('.'));
    let at = |name: &str| claims[name].as_i64().context("no number");
    assert_eq!((at("exp")? - at("iat")?, at("nbf")? - at("exp")?), (10, 15));
    assert_ne!(parts(&issuer.mint().sign()?)?.1["jti"], claims["jti"]);
    Ok(())
}

#[test]
fn a_rotation_changes_the_key_and_the_set() -> Result<()> {
    for alg in [Alg::Es256, Alg::Rs256] {
        let issuer = Issuer::new("https://issuer.example", alg)?;
        let before = issuer.mint().sign()?;
        assert_eq!(issuer.rotate(true)?, "key-1");
        assert!(verifies(&before, &issuer.jwks())? && verifies(&issuer.mint().sign()?, &issuer.jwks())?);
        issuer.rotate(false)?;
        assert!(!verifies(&before, &issuer.jwks())? && verifies(&issuer.mint().sign()?, &issuer.jwks())?);
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("jwks.json");
        issuer.write_jwks(&path)?;
        assert_eq!(serde_json::from_slice::<Value>(&std::fs::read(&path)?)?, issuer.jwks());
    }
    Ok(())
}

#[test]
fn the_documents_are_served_and_fail_as_told() -> Result<()> {
    let _deadline = Deadline::new("issuer server", LIMIT);
    let (issuer, server) = Issuer::served("/tenant", Alg::EdDsa)?;
    assert_eq!(issuer.uri(), format!("{}/tenant", server.base_url()));
    let head = |path: &str| RequestBuilder::new("GET", path).header("Host", "issuer").build();
    let get = |path: &str| -> Result<Response> { request(server.addr(), &head(path), LIMIT) };
    assert_eq!(get("/tenant/jwks.json")?.json()?, issuer.jwks());
    for path in ["/.well-known/oauth-authorization-server/tenant", "/tenant/.well-known/openid-configuration"]
    {
        let metadata = get(path)?.json()?;
        assert_eq!(metadata["issuer"], issuer.uri());
        assert_eq!(metadata["jwks_uri"], server.jwks_url());
    }
    assert_eq!(get("/other")?.status, 404);
    assert_eq!(server.hits("/tenant/jwks.json"), 1);
    assert_eq!(server.total_hits(), 4);

    let path = "/tenant/jwks.json";
    server.set_max_age(Some(60));
    assert_eq!(get(path)?.header("cache-control"), Some("max-age=60"));
    server.set_fail_mode(FailMode::Status(503));
    assert_eq!(get(path)?.status, 503);
    server.set_fail_mode(FailMode::Garbage);
    assert!(get(path)?.json().is_err());
    server.set_fail_mode(FailMode::Oversized(1 << 20));
    let big = get(path)?;
    assert_eq!((big.body.len(), big.json()?), (1 << 20, issuer.jwks()));
    server.set_fail_mode(FailMode::Close);
    assert!(get(path).is_err());
    server.set_fail_mode(FailMode::Redirect("http://127.0.0.1:1/".to_owned()));
    assert_eq!(get(path)?.header("location"), Some("http://127.0.0.1:1/"));
    server.set_fail_mode(FailMode::WrongIssuer);
    assert_ne!(get("/tenant/.well-known/openid-configuration")?.json()?["issuer"], issuer.uri());

    server.set_fail_mode(FailMode::Hang);
    assert!(request(server.addr(), &head(path), Duration::from_millis(100)).is_err());
    // A connection that hangs is answered when the mode changes, and can be used again.
    let mut waiting = Connection::open(server.addr(), LIMIT)?;
    waiting.send(&head(path))?;
    server.set_fail_mode(FailMode::None);
    assert_eq!(waiting.read_response()?.status, 200);
    assert_eq!(waiting.roundtrip(&head(path))?.status, 200);
    let shared: Arc<_> = issuer.current_key();
    assert_eq!(shared.kid(), "key-0");
    Ok(())
}
