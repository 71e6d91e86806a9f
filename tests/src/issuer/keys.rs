//! Signing keys and their public JWK form.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::error::KeyRejected;
use ring::rand::SystemRandom;
use ring::rsa::PublicKeyComponents;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
    Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256,
    RsaEncoding, RsaKeyPair,
};
use serde_json::{Value, json};

/// RSA keys are slow to make, so two are kept as files; they protect nothing.
const RSA_TEST_KEYS_PEM: [&str; 2] = [
    include_str!("../../fixtures/rsa2048-test-only-a.pem"),
    include_str!("../../fixtures/rsa2048-test-only-b.pem"),
];

/// A JWS signature algorithm (RFC 7518 section 3.1, RFC 8037).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alg {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    Rs384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    Rs512,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// Ed25519.
    EdDsa,
}

impl Alg {
    /// Every algorithm.
    pub const ALL: [Self; 7] =
        [Self::Rs256, Self::Rs384, Self::Rs512, Self::Ps256, Self::Es256, Self::Es384, Self::EdDsa];

    /// Its name in a JOSE header.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
        }
    }
}

impl fmt::Display for Alg {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Alg {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|alg| alg.name() == name)
            .with_context(|| format!("no such algorithm: {name}"))
    }
}

enum Signer {
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
    Rsa(RsaKeyPair, &'static dyn RsaEncoding),
}

/// A signing key with its `kid`.
pub struct Key {
    alg: Alg,
    kid: String,
    signer: Signer,
    random: SystemRandom,
}

impl Key {
    /// Makes a key. The EC and Ed25519 ones are new each time; RSA takes one of two fixed keys by `serial`.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn generate(alg: Alg, kid: &str, serial: u32) -> Result<Self> {
        let random = SystemRandom::new();
        let signer = match alg {
            Alg::Es256 => ec(&ECDSA_P256_SHA256_FIXED_SIGNING, &random)?,
            Alg::Es384 => ec(&ECDSA_P384_SHA384_FIXED_SIGNING, &random)?,
            Alg::EdDsa => {
                let pkcs8 = Ed25519KeyPair::generate_pkcs8(&random).map_err(|_| anyhow!("no Ed25519 key"))?;
                Signer::Ed(Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).map_err(rejected)?)
            }
            Alg::Rs256 => rsa(serial, &RSA_PKCS1_SHA256)?,
            Alg::Rs384 => rsa(serial, &RSA_PKCS1_SHA384)?,
            Alg::Rs512 => rsa(serial, &RSA_PKCS1_SHA512)?,
            Alg::Ps256 => rsa(serial, &RSA_PSS_SHA256)?,
        };
        Ok(Self { alg, kid: kid.to_owned(), signer, random })
    }

    /// The algorithm it signs with.
    #[must_use]
    pub fn alg(&self) -> Alg {
        self.alg
    }

    /// Its key id.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The raw JWS signature of `message` (for ECDSA `r || s`, RFC 7518 section 3.4).
    ///
    /// # Errors
    /// When the random source fails.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>> {
        match &self.signer {
            Signer::Ec(pair) => {
                let signature =
                    pair.sign(&self.random, message).map_err(|_| anyhow!("ECDSA signing failed"))?;
                Ok(signature.as_ref().to_vec())
            }
            Signer::Ed(pair) => Ok(pair.sign(message).as_ref().to_vec()),
            Signer::Rsa(pair, encoding) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(*encoding, &self.random, message, &mut signature)
                    .map_err(|_| anyhow!("RSA signing failed"))?;
                Ok(signature)
            }
        }
    }

    /// The public half as a JWK with `kid`, `alg` and `use`.
    #[must_use]
    pub fn jwk(&self) -> Value {
        let mut jwk = match &self.signer {
            Signer::Ec(pair) => {
                // Uncompressed point: 0x04, then x and y of equal length.
                let point = pair.public_key().as_ref().get(1..).unwrap_or_default();
                let (x, y) = point.split_at(point.len() / 2);
                let curve = if self.alg == Alg::Es384 { "P-384" } else { "P-256" };
                json!({ "kty": "EC", "crv": curve, "x": base64url(x), "y": base64url(y) })
            }
            Signer::Ed(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": base64url(pair.public_key().as_ref()) })
            }
            Signer::Rsa(pair, _) => {
                let public: PublicKeyComponents<Vec<u8>> = pair.public().into();
                json!({ "kty": "RSA", "n": base64url(&public.n), "e": base64url(&public.e) })
            }
        };
        if let Some(members) = jwk.as_object_mut() {
            members.insert("kid".to_owned(), json!(self.kid));
            members.insert("alg".to_owned(), json!(self.alg.name()));
            members.insert("use".to_owned(), json!("sig"));
        }
        jwk
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Key").field("alg", &self.alg).field("kid", &self.kid).finish_non_exhaustive()
    }
}

pub(super) fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn ec(algorithm: &'static EcdsaSigningAlgorithm, random: &SystemRandom) -> Result<Signer> {
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, random).map_err(|_| anyhow!("no EC key"))?;
    Ok(Signer::Ec(EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), random).map_err(rejected)?))
}

fn rsa(serial: u32, encoding: &'static dyn RsaEncoding) -> Result<Signer> {
    let index = usize::try_from(serial)? % RSA_TEST_KEYS_PEM.len();
    let Some(pem) = RSA_TEST_KEYS_PEM.get(index) else { bail!("no RSA test key {index}") };
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let pkcs8 = STANDARD.decode(body).context("RSA test key is not PEM")?;
    Ok(Signer::Rsa(RsaKeyPair::from_pkcs8(&pkcs8).map_err(rejected)?, encoding))
}

/// Without its `std` feature ring's errors are no `std::error::Error`.
fn rejected(error: KeyRejected) -> anyhow::Error {
    anyhow!("key rejected: {error}")
}
