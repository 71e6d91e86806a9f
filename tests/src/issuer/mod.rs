//! A token issuer for tests: its keys, the tokens it mints (sound or with any defect), and its
//! JWKS and metadata documents, as values, as files, or over loopback HTTP.

mod keys;
mod mint;
mod serve;

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use serde_json::{Value, json};

pub use keys::{Alg, Key};
pub use mint::Mint;
pub use serve::{FailMode, IssuerServer};

/// An issuer with a current signing key. Clones share the keys, so a rotation is seen by all.
#[derive(Debug, Clone)]
pub struct Issuer {
    uri: String,
    alg: Alg,
    keys: Arc<Mutex<Keys>>,
}

#[derive(Debug)]
struct Keys {
    current: Arc<Key>,
    /// Older keys that the JWKS still lists.
    published: Vec<Arc<Key>>,
    serial: u32,
}

impl Issuer {
    /// An issuer whose tokens carry `uri` as `iss`, byte for byte.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(uri: &str, alg: Alg) -> Result<Self> {
        let current = Arc::new(Key::generate(alg, "key-0", 0)?);
        let keys = Keys { current, published: Vec::new(), serial: 0 };
        Ok(Self { uri: uri.to_owned(), alg, keys: Arc::new(Mutex::new(keys)) })
    }

    /// An issuer that is served at its own URI, `http://127.0.0.1:<port><path>`.
    ///
    /// # Errors
    /// When no key can be made or no port bound.
    pub fn served(path: &str, alg: Alg) -> Result<(Self, IssuerServer)> {
        let bound = serve::Bound::new()?;
        let issuer = Self::new(&format!("http://{}{path}", bound.addr()), alg)?;
        let server = bound.start(&issuer)?;
        Ok((issuer, server))
    }

    /// Serves this issuer's documents on a free loopback port, whatever its URI says.
    ///
    /// # Errors
    /// When no port can be bound.
    pub fn serve(&self) -> Result<IssuerServer> {
        serve::Bound::new()?.start(self)
    }

    /// The `iss` of its tokens.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The algorithm it signs with.
    #[must_use]
    pub fn alg(&self) -> Alg {
        self.alg
    }

    /// The key it signs with now.
    #[must_use]
    pub fn current_key(&self) -> Arc<Key> {
        Arc::clone(&self.lock().current)
    }

    /// Signs with a new key from now on, and gives its `kid`. The JWKS keeps the old key only when `keep_old`.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn rotate(&self, keep_old: bool) -> Result<String> {
        let mut keys = self.lock();
        keys.serial += 1;
        let kid = format!("key-{}", keys.serial);
        let fresh = Arc::new(Key::generate(self.alg, &kid, keys.serial)?);
        let old = std::mem::replace(&mut keys.current, fresh);
        if keep_old {
            keys.published.push(old);
        } else {
            keys.published.clear();
        }
        Ok(kid)
    }

    /// The public keys as a JWK set (RFC 7517 section 5).
    #[must_use]
    pub fn jwks(&self) -> Value {
        let keys = self.lock();
        let all: Vec<Value> =
            std::iter::once(&keys.current).chain(&keys.published).map(|key| key.jwk()).collect();
        json!({ "keys": all })
    }

    /// Writes [`Issuer::jwks`] to a file, by renaming, so that a reader never sees half of it.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write_jwks(&self, path: &Path) -> Result<()> {
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_vec_pretty(&self.jwks())?)?;
        Ok(fs::rename(part, path)?)
    }

    /// Starts a token that is sound but for its missing `aud`. See [`Mint`].
    #[must_use]
    pub fn mint(&self) -> Mint {
        Mint::new(&self.uri, self.current_key())
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
