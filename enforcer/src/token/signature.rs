//! Signature verification: `jsonwebtoken` with a provider backed by `ring`.
//!
//! `jsonwebtoken` brings two backends of its own; both would add a second crypto library beside the `ring` that TLS uses
//! already. This provider covers exactly the algorithms that a policy can name, verifies only, and can't sign.

use std::sync::OnceLock;

use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::signature::{Error as SignatureError, Verifier};
use jsonwebtoken::{Algorithm as JoseAlgorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind};
use ring::signature as rs;

use crate::policy::Algorithm;

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
    verifier_factory: |algorithm, key| Ok(Box::new(RingVerifier::new(*algorithm, key)?)),
    key_utils: KeyUtils::new_unimplemented(),
};

/// Makes `ring` the process's provider. `false` when something else in the process chose another one first; no key set
/// is built then, so that no signature is ever judged by code that nobody chose.
pub(crate) fn install_provider() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| PROVIDER.install_default().is_ok())
}

/// Is `signature` (base64url) one of `key`'s over `message`? Any defect of the key or the signature is a plain no.
///
/// `key` must come from a [`KeySet`](crate::keys::KeySet): building one installs the provider.
pub(crate) fn verifies(message: &[u8], signature: &str, key: &DecodingKey, algorithm: Algorithm) -> bool {
    jsonwebtoken::crypto::verify(signature, message, key, jose(algorithm)).unwrap_or(false)
}

fn jose(algorithm: Algorithm) -> JoseAlgorithm {
    match algorithm {
        Algorithm::RS256 => JoseAlgorithm::RS256,
        Algorithm::RS384 => JoseAlgorithm::RS384,
        Algorithm::RS512 => JoseAlgorithm::RS512,
        Algorithm::PS256 => JoseAlgorithm::PS256,
        Algorithm::ES256 => JoseAlgorithm::ES256,
        Algorithm::ES384 => JoseAlgorithm::ES384,
        Algorithm::EdDSA => JoseAlgorithm::EdDSA,
    }
}

/// One key, bound to one algorithm.
struct RingVerifier {
    jose: JoseAlgorithm,
    key: RingKey,
}

enum RingKey {
    Rsa { parameters: &'static rs::RsaParameters, components: rs::RsaPublicKeyComponents<Vec<u8>> },
    Point(rs::UnparsedPublicKey<Vec<u8>>),
}

impl RingVerifier {
    fn new(jose: JoseAlgorithm, key: &DecodingKey) -> Result<Self, Error> {
        let key = match jose {
            JoseAlgorithm::RS256 => rsa(&rs::RSA_PKCS1_2048_8192_SHA256, key)?,
            JoseAlgorithm::RS384 => rsa(&rs::RSA_PKCS1_2048_8192_SHA384, key)?,
            JoseAlgorithm::RS512 => rsa(&rs::RSA_PKCS1_2048_8192_SHA512, key)?,
            JoseAlgorithm::PS256 => rsa(&rs::RSA_PSS_2048_8192_SHA256, key)?,
            JoseAlgorithm::ES256 => point(AlgorithmFamily::Ec, &rs::ECDSA_P256_SHA256_FIXED, key)?,
            JoseAlgorithm::ES384 => point(AlgorithmFamily::Ec, &rs::ECDSA_P384_SHA384_FIXED, key)?,
            JoseAlgorithm::EdDSA => point(AlgorithmFamily::Ed, &rs::ED25519, key)?,
            _ => return Err(ErrorKind::UnsupportedAlgorithm.into()),
        };
        Ok(Self { jose, key })
    }
}

fn rsa(parameters: &'static rs::RsaParameters, key: &DecodingKey) -> Result<RingKey, Error> {
    match (key.family(), key.kind()) {
        (AlgorithmFamily::Rsa, DecodingKeyKind::RsaModulusExponent { n, e }) => Ok(RingKey::Rsa {
            parameters,
            components: rs::RsaPublicKeyComponents { n: n.clone(), e: e.clone() },
        }),
        _ => Err(ErrorKind::InvalidKeyFormat.into()),
    }
}

fn point(
    family: AlgorithmFamily,
    algorithm: &'static dyn rs::VerificationAlgorithm,
    key: &DecodingKey,
) -> Result<RingKey, Error> {
    if key.family() != family {
        return Err(ErrorKind::InvalidKeyFormat.into());
    }
    Ok(RingKey::Point(rs::UnparsedPublicKey::new(algorithm, key.try_get_as_bytes()?.to_vec())))
}

impl Verifier<Vec<u8>> for RingVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), SignatureError> {
        match &self.key {
            RingKey::Rsa { parameters, components } => components.verify(parameters, message, signature),
            RingKey::Point(key) => key.verify(message, signature),
        }
        .map_err(|_| SignatureError::new())
    }
}

impl JwtVerifier for RingVerifier {
    fn algorithm(&self) -> JoseAlgorithm {
        self.jose
    }
}
