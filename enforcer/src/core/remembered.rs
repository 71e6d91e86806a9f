//! What the tokens with a grant say, in memory only: another policy can judge them at once, also those of streams that send no more
//! requests.

use std::collections::HashMap;
use std::sync::Arc;

use crate::token::Evidence;

/// Largest claims that are kept, in bytes. A token with larger ones is simply not known to the next policy.
const ONE_MAX_BYTES: usize = 4 << 10;
/// All that is kept, in bytes.
pub(super) const ALL_MAX_BYTES: usize = 32 << 20;

/// The claims behind a grant.
#[derive(Debug, Clone)]
pub struct Claims {
    /// Serial of the grant.
    pub serial: u64,
    /// Number of the server that it is for.
    pub server_id: u32,
    /// What was verified.
    pub evidence: Arc<Evidence>,
}

/// The claims by the serials of their grants.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug, Default)]
pub(super) struct Remembered {
    by_serial: HashMap<u64, Claims>,
    size_bytes: usize,
}

impl Remembered {
    /// Keeps claims, if there is room for them.
    pub(super) fn keep(&mut self, claims: Claims) {
        self.forget(claims.serial);
        let size_bytes = claims.evidence.size_bytes();
        if size_bytes <= ONE_MAX_BYTES && self.size_bytes + size_bytes <= ALL_MAX_BYTES {
            self.size_bytes += size_bytes;
            self.by_serial.insert(claims.serial, claims);
        }
    }

    pub(super) fn forget(&mut self, serial: u64) {
        if let Some(claims) = self.by_serial.remove(&serial) {
            self.size_bytes -= claims.evidence.size_bytes();
        }
    }

    pub(super) fn get(&self, serial: u64) -> Option<&Claims> {
        self.by_serial.get(&serial)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Claims> {
        self.by_serial.values()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::token::testing::World;

    fn claims(serial: u64, padding_bytes: usize) -> Claims {
        let mut world = World::new();
        world.claims["padding"] = json!("x".repeat(padding_bytes));
        Claims { serial, server_id: 0, evidence: world.verify().unwrap().evidence }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut remembered = Remembered::default();
        remembered.keep(claims(1, 10));
        remembered.keep(claims(1, 20));
        assert_eq!((remembered.all().count(), remembered.get(1).is_some()), (1, true));
        remembered.keep(claims(2, ONE_MAX_BYTES));
        assert!(remembered.get(2).is_none());
        let large = claims(0, 3000);
        for serial in 10..20_000 {
            remembered.keep(Claims { serial, ..large.clone() });
        }
        assert!(remembered.size_bytes <= ALL_MAX_BYTES && remembered.size_bytes > ALL_MAX_BYTES - 8192);
        (0..20_000).for_each(|serial| remembered.forget(serial));
        assert_eq!(remembered.size_bytes, 0);
    }
}
