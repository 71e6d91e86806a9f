//! Keys, policy and minted tokens for tests.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{self as rs, KeyPair};
use serde_json::{Value, json};

use crate::keys::{BootInstant, KeySet, KeySnapshot, SnapshotEntry};
use crate::policy::{Algorithm, Issuer, KeySource, Listen, Metadata, Server};

pub(crate) const NOW: u64 = 1_800_000_000;
pub(crate) const RESOURCE: &str = "https://mcp.example.com/mcp";
pub(crate) const ALL_ALGORITHMS: [Algorithm; 7] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

pub(crate) fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

pub(crate) enum TestKey {
    Rsa(rs::RsaKeyPair),
    P256(rs::EcdsaKeyPair),
    P384(rs::EcdsaKeyPair),
    Ed(rs::Ed25519KeyPair),
}

impl TestKey {
    pub(crate) fn for_algorithm(algorithm: Algorithm) -> Self {
        let random = SystemRandom::new();
        match algorithm {
            Algorithm::ES256 => {
                let signing = &rs::ECDSA_P256_SHA256_FIXED_SIGNING;
                let pkcs8 = rs::EcdsaKeyPair::generate_pkcs8(signing, &random).unwrap();
                Self::P256(rs::EcdsaKeyPair::from_pkcs8(signing, pkcs8.as_ref(), &random).unwrap())
            }
            Algorithm::ES384 => {
                let signing = &rs::ECDSA_P384_SHA384_FIXED_SIGNING;
                let pkcs8 = rs::EcdsaKeyPair::generate_pkcs8(signing, &random).unwrap();
                Self::P384(rs::EcdsaKeyPair::from_pkcs8(signing, pkcs8.as_ref(), &random).unwrap())
            }
            Algorithm::EdDSA => {
                let pkcs8 = rs::Ed25519KeyPair::generate_pkcs8(&random).unwrap();
                Self::Ed(rs::Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap())
            }
            _ => Self::rsa(include_str!("../../testdata/keys/test-only-rsa-2048-a.pem")),
        }
    }

    pub(crate) fn other_rsa() -> Self {
        Self::rsa(include_str!("../../testdata/keys/test-only-rsa-2048-b.pem"))
    }

    fn rsa(pem: &str) -> Self {
        let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        Self::Rsa(rs::RsaKeyPair::from_pkcs8(&STANDARD.decode(body).unwrap()).unwrap())
    }

    pub(crate) fn jwk(&self, kid: &str) -> Value {
        let point = |curve: &str, point: &[u8]| {
            let (x, y) = point[1..].split_at((point.len() - 1) / 2);
            json!({"kty": "EC", "crv": curve, "x": b64(x), "y": b64(y), "kid": kid, "use": "sig"})
        };
        match self {
            Self::Rsa(pair) => {
                let public = rs::RsaPublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({"kty": "RSA", "n": b64(public.n), "e": b64(public.e), "kid": kid, "use": "sig"})
            }
            Self::P256(pair) => point("P-256", pair.public_key().as_ref()),
            Self::P384(pair) => point("P-384", pair.public_key().as_ref()),
            Self::Ed(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": b64(pair.public_key()), "kid": kid, "use": "sig"})
            }
        }
    }

    pub(crate) fn sign(&self, algorithm: Algorithm, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Rsa(pair) => {
                let encoding: &'static dyn rs::RsaEncoding = match algorithm {
                    Algorithm::RS384 => &rs::RSA_PKCS1_SHA384,
                    Algorithm::RS512 => &rs::RSA_PKCS1_SHA512,
                    Algorithm::PS256 => &rs::RSA_PSS_SHA256,
                    _ => &rs::RSA_PKCS1_SHA256,
                };
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(encoding, &random, message, &mut signature).unwrap();
                signature
            }
            Self::P256(pair) | Self::P384(pair) => pair.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::Ed(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }

    /// A token with exactly these texts as header and payload.
    pub(crate) fn mint_raw(&self, algorithm: Algorithm, header: &str, payload: &str) -> String {
        let input = format!("{}.{}", b64(header), b64(payload));
        let signature = b64(self.sign(algorithm, input.as_bytes()));
        format!("{input}.{signature}")
    }
}

pub(crate) fn issuer(name: &str, identifier: &str) -> Issuer {
    Issuer {
        name: name.to_owned(),
        issuer: identifier.to_owned(),
        keys: KeySource::Discovery,
        ca_file: None,
        allow_http_loopback: false,
        algorithms: ALL_ALGORITHMS.to_vec(),
        leeway: Duration::from_secs(30),
        max_token_lifetime: Duration::from_secs(3600),
        token_types: vec!["at+jwt".to_owned()],
        refresh_interval: Duration::from_secs(300),
        max_staleness: Duration::from_secs(3600),
    }
}

pub(crate) fn server(issuers: Vec<Arc<Issuer>>) -> Server {
    Server {
        name: "files".to_owned(),
        listen: vec![Listen { addr: [127, 0, 0, 1].into(), port: 8000 }],
        resource: RESOURCE.to_owned(),
        aliases: Vec::new(),
        path: "/mcp".to_owned(),
        public_paths: Vec::new(),
        issuers,
        scopes: vec!["mcp:tools".to_owned()],
        metadata: Metadata { serve: true, resource_name: None, scopes_supported: Vec::new() },
        hosts: vec!["mcp.example.com".to_owned()],
        origins: Vec::new(),
        callers: None,
        bind: Vec::new(),
        limits: Vec::new(),
    }
}

pub(crate) fn key_set(jwks: &[Value]) -> Arc<KeySet> {
    Arc::new(KeySet::parse(json!({"keys": jwks}).to_string().as_bytes()).unwrap())
}

/// One issuer, one ES256 key, one server; every part can be changed.
pub(crate) struct World {
    pub(crate) issuer: Issuer,
    pub(crate) key: TestKey,
    pub(crate) algorithm: Algorithm,
    pub(crate) header: Value,
    pub(crate) claims: Value,
    pub(crate) aliases: Vec<String>,
    pub(crate) resource: String,
    pub(crate) jwks: Option<Vec<Value>>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with_algorithm(Algorithm::ES256)
    }

    pub(crate) fn with_algorithm(algorithm: Algorithm) -> Self {
        Self {
            issuer: issuer("main", "https://issuer.example.com"),
            key: TestKey::for_algorithm(algorithm),
            algorithm,
            header: json!({"alg": format!("{algorithm:?}"), "typ": "at+jwt", "kid": "k1"}),
            claims: json!({
                "iss": "https://issuer.example.com", "sub": "alice", "aud": RESOURCE, "client_id": "agent-1",
                "iat": NOW - 10, "exp": NOW + 600, "scope": "mcp:tools mcp:read", "jti": "id-1",
            }),
            aliases: Vec::new(),
            resource: RESOURCE.to_owned(),
            jwks: None,
        }
    }

    pub(crate) fn server(&self) -> Server {
        Server {
            aliases: self.aliases.clone(),
            resource: self.resource.clone(),
            ..server(vec![Arc::new(self.issuer.clone())])
        }
    }

    pub(crate) fn keys(&self) -> KeySnapshot {
        let jwks = self.jwks.clone().unwrap_or_else(|| vec![self.key.jwk("k1")]);
        let at = BootInstant::from_boot(Duration::from_secs(1000));
        let entry = SnapshotEntry {
            issuer: Arc::new(self.issuer.clone()),
            keys: Some(key_set(&jwks)),
            fetched_at: at,
        };
        KeySnapshot::new(Arc::from([entry]), at)
    }

    pub(crate) fn token(&self) -> String {
        self.key.mint_raw(self.algorithm, &self.header.to_string(), &self.claims.to_string())
    }

    pub(crate) fn verify(&self) -> Result<super::VerifiedToken, super::TokenError> {
        self.verify_token(&self.token())
    }

    pub(crate) fn verify_token(&self, token: &str) -> Result<super::VerifiedToken, super::TokenError> {
        super::verify(token, &self.server(), &self.keys(), NOW)
    }

    /// Verifies with one header parameter set, or removed when `value` is null.
    pub(crate) fn with_header(
        &self,
        name: &str,
        value: &Value,
    ) -> Result<super::VerifiedToken, super::TokenError> {
        let header = changed(&self.header, name, value).to_string();
        self.verify_token(&self.key.mint_raw(self.algorithm, &header, &self.claims.to_string()))
    }

    /// Verifies with one claim set, or removed when `value` is null.
    pub(crate) fn with_claim(
        &self,
        name: &str,
        value: &Value,
    ) -> Result<super::VerifiedToken, super::TokenError> {
        let claims = changed(&self.claims, name, value).to_string();
        self.verify_token(&self.key.mint_raw(self.algorithm, &self.header.to_string(), &claims))
    }
}

fn changed(object: &Value, name: &str, value: &Value) -> Value {
    let mut object = object.clone();
    let members = object.as_object_mut().unwrap();
    if value.is_null() {
        members.remove(name);
    } else {
        members.insert(name.to_owned(), value.clone());
    }
    object
}
