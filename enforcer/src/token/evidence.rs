//! What is kept of a verified token, so that it can be judged again under another policy.

use std::borrow::Cow;
use std::fmt;

use super::error::TokenError;
use super::header::{Jws, Proof};

/// Header and claims of a token whose signature was verified, and which key made it. The signature itself is not kept: nobody can
/// present this as a token. See [`verify_again`](super::verify_again).
#[derive(Clone, PartialEq, Eq)]
pub struct Evidence {
    header: Box<[u8]>,
    payload: Box<[u8]>,
    key_thumbprint: [u8; 32],
}

impl Evidence {
    pub(super) fn new(jws: Jws<'_>, key_thumbprint: [u8; 32]) -> Self {
        Self {
            header: jws.header.into_owned().into_boxed_slice(),
            payload: jws.payload.into_owned().into_boxed_slice(),
            key_thumbprint,
        }
    }

    pub(super) fn parts(&self) -> Result<Jws<'_>, TokenError> {
        Ok(Jws {
            proof: Proof::SeenBefore { key_thumbprint: self.key_thumbprint },
            header: Cow::Borrowed(&self.header),
            payload: Cow::Borrowed(&self.payload),
        })
    }

    /// Memory that it takes, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        size_of::<Self>() + self.header.len() + self.payload.len()
    }
}

/// Claims are nobody's business in a log.
impl fmt::Debug for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evidence").field("size_bytes", &self.size_bytes()).finish_non_exhaustive()
    }
}
