//! The revocations in the maps.

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use enforcer_common::abi::{
    Grant, MAX_GRANTS, MAX_REVOCATIONS, REVOCATION_EPOCH, REVOCATION_GRANT_SLOTS, REVOCATION_NEXT_ID,
    Revocation, map,
};

use super::maps::open;
use super::{Live, LiveError, PinDir};
use crate::revocation::{Revocations, Subject};

fn failed(source: MapError) -> LiveError {
    LiveError::Map { name: map::REVOCATIONS, source }
}

fn state_failed(source: MapError) -> LiveError {
    LiveError::Map { name: map::REVOCATION_STATE, source }
}

/// The revocations in the maps of an enforcement of whatever version, and the number of the next one. `None`: it has none, or keeps
/// them in another form.
///
/// # Errors
/// See [`LiveError`].
pub fn left_behind(pins: &PinDir) -> Result<Option<(Revocations, u64)>, LiveError> {
    if !pins.pin(map::REVOCATIONS).exists() || !pins.pin(map::REVOCATION_STATE).exists() {
        return Ok(None);
    }
    let opened = open(pins, map::REVOCATIONS, Map::HashMap)
        .and_then(|list| Ok((list, open(pins, map::REVOCATION_STATE, Map::Array)?)));
    let (list, state): (HashMap<MapData, u64, Revocation>, Array<MapData, u64>) = match opened {
        Err(LiveError::Map {
            source: MapError::InvalidKeySize { .. } | MapError::InvalidValueSize { .. },
            ..
        }) => return Ok(None),
        opened => opened?,
    };
    Ok(Some((all(&list)?, state.get(&REVOCATION_NEXT_ID, 0).map_err(state_failed)?)))
}

/// A walk over a hash that changes meanwhile may start again, so it is bounded.
fn all(map: &HashMap<MapData, u64, Revocation>) -> Result<Revocations, LiveError> {
    let mut all = Revocations::new();
    for (count, entry) in map.iter().enumerate() {
        if count >= 2 * MAX_REVOCATIONS as usize {
            return Err(failed(MapError::IoError(std::io::Error::other("it changes too fast"))));
        }
        let (id, revocation) = entry.map_err(failed)?;
        all.insert(id, revocation);
    }
    Ok(all)
}

impl Live {
    /// All revocations.
    ///
    /// # Errors
    /// See [`LiveError`], and when the map changes so fast that the walk does not end.
    pub fn revocations(&self) -> Result<Revocations, LiveError> {
        all(&self.revocations)
    }

    /// Writes a revocation. Whoever does holds the lock of the state directory, and then moves the epoch.
    ///
    /// # Errors
    /// See [`LiveError`]; a full map is one.
    pub fn set_revocation(&mut self, id: u64, revocation: &Revocation) -> Result<(), LiveError> {
        self.revocations.insert(id, revocation, 0).map_err(failed)
    }

    /// Removes a revocation. As above.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn remove_revocation(&mut self, id: u64) -> Result<(), LiveError> {
        match self.revocations.remove(&id) {
            Err(error) if !matches!(error, MapError::KeyNotFound) => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// A word of `REVOCATION_STATE`.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn revocation_word(&self, index: u32) -> Result<u64, LiveError> {
        self.revocation_state.get(&index, 0).map_err(state_failed)
    }

    /// Writes a word of `REVOCATION_STATE`.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_revocation_word(&mut self, index: u32, value: u64) -> Result<(), LiveError> {
        self.revocation_state.set(index, value, 0).map_err(state_failed)
    }

    /// Says that the revocations have changed. Only who holds the lock of the state directory may.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn move_revocation_epoch(&mut self) -> Result<(), LiveError> {
        let epoch = self.revocation_word(REVOCATION_EPOCH)?;
        self.set_revocation_word(REVOCATION_EPOCH, epoch.wrapping_add(1))
    }

    /// The grants in force, with slot and what revocations are compared with. A grant whose label is another's is being written;
    /// its writer looks at the revocations after it.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn revocable_grants(&self) -> Result<Vec<(u32, Grant, Subject)>, LiveError> {
        let slots = self.revocation_word(REVOCATION_GRANT_SLOTS)?.min(u64::from(MAX_GRANTS)) as u32;
        let mut grants = Vec::new();
        for slot in 0..slots {
            let grant =
                self.grants.get(&slot, 0).map_err(|source| LiveError::Map { name: map::GRANTS, source })?;
            if grant.serial == 0 {
                continue;
            }
            let failed = |source| LiveError::Map { name: map::GRANT_LABELS, source };
            let label = self.grant_labels.get(&slot, 0).map_err(failed)?;
            if label.serial == grant.serial {
                grants.push((slot, grant, Subject::of_grant(grant.fingerprint, &label)));
            }
        }
        Ok(grants)
    }

    /// Revokes a grant: no head passes by it any more.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn revoke_grant(&mut self, slot: u32, grant: &Grant, by: u32) -> Result<(), LiveError> {
        let failed = |source| LiveError::Map { name: map::GRANTS, source };
        self.grants.set(slot, Grant { revoked: by, ..*grant }, 0).map_err(failed)
    }
}
