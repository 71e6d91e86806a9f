//! Keyed fingerprints: what logs and tables show in place of a token.

use std::fmt;

use ring::hmac;

/// Makes [`Fingerprint`]s under one secret key.
///
/// The key keeps a reader of the logs from testing guesses against a fingerprint. Fingerprints of different keys can't be
/// compared.
#[derive(Clone)]
pub struct Fingerprinter {
    key: hmac::Key,
}

impl Fingerprinter {
    /// A fingerprinter under `key`, which must come from a cryptographic random source.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, &key) }
    }

    /// The first 16 bytes of HMAC-SHA256 (RFC 2104, truncated as its section 5 allows) over the token's bytes.
    #[must_use]
    pub fn fingerprint(&self, token: &[u8]) -> Fingerprint {
        let tag = hmac::sign(&self.key, token);
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
        Fingerprint(bytes)
    }
}

impl fmt::Debug for Fingerprinter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprinter")
    }
}

/// A keyed 128-bit digest that stands for a token; shown as 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 16]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_rfc_4231_under_a_zero_padded_key() {
        // RFC 4231, test case 2: HMAC pads a short key with zeros, so the 32-byte key below is the key "Jefe".
        let mut key = [0; 32];
        key[..4].copy_from_slice(b"Jefe");
        let shown = Fingerprinter::new(key).fingerprint(b"what do ya want for nothing?").to_string();
        assert_eq!(shown, "5bdcc146bf60754e6a042426089575c7");
    }

    #[test]
    fn key_and_token_both_matter() {
        let a = Fingerprinter::new([1; 32]);
        let b = Fingerprinter::new([2; 32]);
        assert_eq!(a.fingerprint(b"x"), a.clone().fingerprint(b"x"));
        assert_ne!(a.fingerprint(b"x"), b.fingerprint(b"x"));
        assert_ne!(a.fingerprint(b"x"), a.fingerprint(b"y"));
    }
}
