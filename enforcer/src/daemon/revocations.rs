//! The revocations at a start: from the file into the maps.

use anyhow::{Context as _, ensure};
use enforcer_common::abi::{MAX_REVOCATIONS, REVOCATION_NEXT_ID, REVOCATION_TOKEN_LIFE_SECS, Revocation};
use tracing::warn;

use crate::datapath::{Live, PinDir, left_behind};
use crate::policy::{Policy, PolicyText};
use crate::revocation::store::{Recorded, RecordedPolicy, StateDir, StateError, StateLock};
use crate::revocation::{Revocations, is_over, token_life_secs};

/// What the maps and the file are to hold: all that either has and that is not over, for as long as the policy lets a token live.
fn merged(recorded: Recorded, in_maps: Revocations, life_secs: u64, now_unix_secs: u64) -> Recorded {
    let mut revocations = recorded.revocations;
    for (id, entry) in in_maps {
        let recorded_end = revocations.get(&id).map_or(0, |recorded| recorded.expires_at_unix_secs);
        let expires_at_unix_secs = entry.expires_at_unix_secs.max(recorded_end);
        revocations.insert(id, Revocation { expires_at_unix_secs, ..entry });
    }
    for revocation in revocations.values_mut().filter(|revocation| revocation.exact_end == 0) {
        let end = revocation.issued_until_unix_secs.saturating_add(life_secs);
        revocation.expires_at_unix_secs = revocation.expires_at_unix_secs.max(end);
    }
    revocations.retain(|_, revocation| !is_over(revocation, now_unix_secs));
    let next_id = revocations.keys().next_back().map_or(1, |last| last + 1).max(recorded.next_id);
    Recorded { next_id, token_life_secs: life_secs, revocations }
}

/// The state directory, locked.
pub(super) struct State {
    dir: StateDir,
    lock: StateLock,
}

impl State {
    pub(super) fn open(dir: &StateDir) -> Result<Self, StateError> {
        Ok(Self { dir: dir.clone(), lock: dir.lock()? })
    }

    /// Records the policy that the maps were filled by.
    pub(super) fn keep_policy(&self, text: PolicyText, policy: &Policy) {
        if let Err(error) = self.dir.write_policy(&self.lock, &RecordedPolicy::of(text, policy)) {
            warn!(%error, "the policy can't be recorded; a start under another one will close the open connections");
        }
    }

    /// The key of the token fingerprints, for maps that are new.
    pub(super) fn fingerprint_key(&self) -> anyhow::Result<[u8; 32]> {
        Ok(self.dir.fingerprint_key(&self.lock)?)
    }

    /// Keeps the key of maps that are adopted.
    pub(super) fn keep_fingerprint_key(&self, key: &[u8; 32]) -> anyhow::Result<()> {
        Ok(self.dir.keep_fingerprint_key(&self.lock, key)?)
    }

    /// Takes what the maps of an earlier daemon hold into maps that nobody uses yet: what could not be recorded in the file is there
    /// alone. [`Self::bring_together`] does the rest.
    pub(super) fn inherit(&self, pins: &PinDir, live: &mut Live) -> anyhow::Result<()> {
        let Some((revocations, next_id)) = left_behind(pins)? else { return Ok(()) };
        for (id, revocation) in &revocations {
            live.set_revocation(*id, revocation)?;
        }
        Ok(live.set_revocation_word(REVOCATION_NEXT_ID, next_id)?)
    }

    /// Brings maps and file together, at a start.
    pub(super) fn bring_together(
        &self,
        live: &mut Live,
        policy: &Policy,
        now_unix_secs: u64,
    ) -> anyhow::Result<()> {
        let merged = self.fill(live, self.read()?, policy, now_unix_secs)?;
        self.write(&merged)
    }

    /// What the file says.
    pub(super) fn read(&self) -> Result<Recorded, StateError> {
        Ok(self.dir.read()?.unwrap_or_default())
    }

    /// Brings what the file said into the maps; gives what it is to say now. For maps that nobody uses yet, and for those of a living
    /// enforcement: when it is adopted, and when the policy has changed, because a longer life of tokens is a longer life of their
    /// revocations.
    pub(super) fn fill(
        &self,
        live: &mut Live,
        mut recorded: Recorded,
        policy: &Policy,
        now_unix_secs: u64,
    ) -> anyhow::Result<Recorded> {
        let in_maps = live.revocations()?;
        recorded.next_id = recorded.next_id.max(live.revocation_word(REVOCATION_NEXT_ID)?);
        let before: Vec<u64> = in_maps.keys().copied().collect();
        let merged = merged(recorded, in_maps, token_life_secs(policy), now_unix_secs);
        ensure!(
            merged.revocations.len() <= MAX_REVOCATIONS as usize,
            "{} holds {} revocations, more than {MAX_REVOCATIONS}",
            self.dir.path().display(),
            merged.revocations.len()
        );
        for id in before.into_iter().filter(|id| !merged.revocations.contains_key(id)) {
            live.remove_revocation(id)?;
        }
        for (id, revocation) in &merged.revocations {
            live.set_revocation(*id, revocation)?;
        }
        live.set_revocation_word(REVOCATION_NEXT_ID, merged.next_id)?;
        live.set_revocation_word(REVOCATION_TOKEN_LIFE_SECS, merged.token_life_secs)?;
        live.move_revocation_epoch()?;
        Ok(merged)
    }

    /// Records what [`Self::fill`] gave.
    pub(super) fn write(&self, merged: &Recorded) -> anyhow::Result<()> {
        self.dir.write(&self.lock, merged).context("the revocations can't be recorded")
    }
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::{REVOKE_SUBJECT, REVOKE_TOKEN};

    use super::*;
    use crate::revocation::tests::revocation;

    #[test]
    fn what_either_side_knows_holds_and_what_is_over_goes() {
        let over = Revocation { exact_end: 1, ..revocation(REVOKE_TOKEN) };
        let recorded = Recorded {
            next_id: 4,
            token_life_secs: 1,
            revocations: [(1, revocation(REVOKE_SUBJECT)), (3, over)].into(),
        };
        let merged = merged(recorded, [(2, revocation(0))].into(), 3600, 1_200);
        assert_eq!(merged.revocations.keys().copied().collect::<Vec<_>>(), [1, 2]);
        assert_eq!((merged.next_id, merged.token_life_secs), (4, 3600));
        // Tokens may live longer now, so the revocations must.
        assert!(
            merged.revocations.values().all(|revocation| revocation.expires_at_unix_secs == 1_000 + 3_600)
        );
    }

    #[test]
    fn what_both_sides_know_ends_with_the_later_of_both() {
        let exact = |expires_at_unix_secs| Revocation {
            exact_end: 1,
            expires_at_unix_secs,
            ..revocation(REVOKE_TOKEN)
        };
        for (in_file, in_maps) in [(1_400, 1_100), (1_100, 1_400)] {
            let recorded = Recorded { revocations: [(1, exact(in_file))].into(), ..Recorded::default() };
            let merged = merged(recorded, [(1, exact(in_maps))].into(), 3600, 1_200);
            assert_eq!(merged.revocations.get(&1), Some(&exact(1_400)));
        }
    }

    #[test]
    fn numbers_are_not_used_again() {
        let one = || Recorded { revocations: [(7, revocation(0))].into(), ..Recorded::default() };
        assert_eq!(merged(one(), Revocations::new(), 3600, 0).next_id, 8);
        assert_eq!(merged(Recorded { next_id: 20, ..one() }, Revocations::new(), 3600, 0).next_id, 20);
        assert_eq!(merged(Recorded::default(), Revocations::new(), 3600, 0).next_id, 1);
    }
}
