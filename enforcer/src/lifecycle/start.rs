//! What a start does about an enforcement that is in the kernel already.

use std::path::Path;
use std::time::Duration;

use enforcer_common::abi::ABI_VERSION;

use super::{UnloadError, UnloadOptions, unload};
use crate::datapath::{Living, PinDir};

/// What a daemon brings along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ours {
    /// Id of the cgroup that it is to guard.
    pub cgroup_id: u64,
    /// SHA-256 of its policy and version.
    pub policy_hash: [u8; 32],
    /// SHA-256 of its kernel programs.
    pub object_hash: [u8; 32],
}

/// How a daemon starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Nothing is there.
    Fresh,
    /// The maps are taken over with all that is in them, and connections go on.
    Adopt {
        /// The programs in the kernel are not this daemon's own.
        replace_programs: bool,
        /// The maps were filled by another policy, from which is then switched as at a reload.
        switch_policy: bool,
    },
    /// A new enforcement is attached beside the old one, which goes then, with its connections.
    TakeOver {
        /// Why it can't be adopted.
        reason: &'static str,
    },
}

/// What is in the kernel is newer than this program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "downgrade refused: the enforcement in the kernel has ABI version {found}, this program knows {ABI_VERSION}; it goes on guarding as it \
     is. Run the newer `enforcer`, or remove it first with `enforcer unload --force`: the servers are not guarded in between"
)]
pub struct Downgrade {
    /// Its ABI version.
    pub found: u32,
}

/// Decides how to start. `former_hash` is that of the policy which the last daemon recorded, if a reload could go from it to ours.
///
/// # Errors
/// See [`Downgrade`]; nothing may be touched then.
pub fn plan(living: Option<&Living>, ours: &Ours, former_hash: Option<[u8; 32]>) -> Result<Start, Downgrade> {
    let Some(living) = living else { return Ok(Start::Fresh) };
    let take_over = |reason| Ok(Start::TakeOver { reason });
    match living.abi_version {
        Some(found) if found > ABI_VERSION => return Err(Downgrade { found }),
        Some(ABI_VERSION) => {}
        Some(0) => return take_over("it never had a policy"),
        Some(_) => return take_over("its ABI version is older"),
        None => return take_over("its configuration can't be read"),
    }
    let Some(state) = living.state.filter(|_| living.complete) else {
        return take_over("its maps are not complete");
    };
    match living.cgroup_id {
        Some(id) if id == ours.cgroup_id => {}
        Some(_) => return take_over("it guards another cgroup"),
        None => return take_over("its programs are not attached"),
    }
    let switch_policy = state.policy_hash != ours.policy_hash;
    // The record counts only if it is the policy that the maps were filled by.
    if switch_policy && former_hash != Some(state.policy_hash) {
        return take_over("its policy is another one, and is not known well enough to switch from it");
    }
    Ok(Start::Adopt { replace_programs: state.object_hash != ours.object_hash, switch_policy })
}

/// Which of the directories that starts use takes the place of the lasting one, if that is missing: a start was killed
/// between two renames.
fn stands_in(lasting_exists: bool, staging_attached: bool, retired_exists: bool) -> Option<Stage> {
    match (lasting_exists, staging_attached, retired_exists) {
        (true, _, _) => None,
        // It guards by its own policy already; the other one was on its way out.
        (false, true, _) => Some(Stage::Staging),
        (false, false, true) => Some(Stage::Retired),
        (false, false, false) => None,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Staging,
    Retired,
}

/// Puts in order what a start that was killed left: first something guards under the lasting name, then the rest is removed.
///
/// # Errors
/// The file system's, and those of [`unload`].
pub fn settle(pins: &PinDir) -> Result<(), UnloadError> {
    let (staging, retired) = (pins.staging(), pins.retired());
    let attached = Living::look(&staging).is_some_and(|living| living.guards);
    let stand_in = match stands_in(pins.path().exists(), attached, retired.path().exists()) {
        Some(Stage::Staging) => Some(&staging),
        Some(Stage::Retired) => Some(&retired),
        None => None,
    };
    if let Some(stage) = stand_in {
        rename(stage.path(), pins.path())?;
    }
    for left in [&staging, &retired] {
        unload(left, &UnloadOptions { drain_timeout: Duration::ZERO, force: true })?;
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<(), UnloadError> {
    std::fs::rename(from, to).map_err(|source| UnloadError::Remove { path: from.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use enforcer_common::abi::DaemonState;

    const OURS: Ours = Ours { cgroup_id: 7, policy_hash: [1; 32], object_hash: [2; 32] };

    fn state() -> DaemonState {
        DaemonState { fingerprint_key: [3; 32], policy_hash: OURS.policy_hash, object_hash: OURS.object_hash }
    }

    fn living() -> Living {
        Living {
            abi_version: Some(ABI_VERSION),
            complete: true,
            cgroup_id: Some(7),
            guards: true,
            state: Some(state()),
        }
    }

    fn is_take_over(living: Living) -> bool {
        // With the record that would do, were it not for the rest.
        let former = living.state.map(|state| state.policy_hash);
        matches!(plan(Some(&living), &OURS, former), Ok(Start::TakeOver { .. }))
    }

    #[test]
    fn the_same_is_adopted_and_only_other_programs_are_replaced() {
        assert_eq!(plan(None, &OURS, None), Ok(Start::Fresh));
        let adopt = |replace_programs| Ok(Start::Adopt { replace_programs, switch_policy: false });
        // No record is needed, and none that is another one's does harm.
        for former in [None, Some(OURS.policy_hash), Some([4; 32])] {
            assert_eq!(plan(Some(&living()), &OURS, former), adopt(false));
            for object_hash in [[0; 32], [9; 32]] {
                let other = Living { state: Some(DaemonState { object_hash, ..state() }), ..living() };
                assert_eq!(plan(Some(&other), &OURS, former), adopt(true));
            }
        }
    }

    #[test]
    fn from_another_policy_is_switched_if_it_is_known_that_it_filled_the_maps() {
        let former = [4; 32];
        let filled_by = |policy_hash| Living {
            state: Some(DaemonState { policy_hash, object_hash: [9; 32], ..state() }),
            ..living()
        };
        let switch = Start::Adopt { replace_programs: true, switch_policy: true };
        assert_eq!(plan(Some(&filled_by(former)), &OURS, Some(former)), Ok(switch));
        // None is recorded, or another one; or a daemon was killed while it switched.
        let unknown = [
            (former, None),
            (former, Some([5; 32])),
            (former, Some(OURS.policy_hash)),
            ([0; 32], Some(former)),
        ];
        for (policy_hash, recorded) in unknown {
            let start = plan(Some(&filled_by(policy_hash)), &OURS, recorded).unwrap();
            assert!(matches!(start, Start::TakeOver { reason } if reason.contains("policy")), "{start:?}");
        }
    }

    #[test]
    fn what_cannot_be_adopted_is_taken_over() {
        assert!(is_take_over(Living { abi_version: None, ..living() }));
        assert!(is_take_over(Living { abi_version: Some(0), ..living() }));
        assert!(is_take_over(Living { abi_version: Some(ABI_VERSION - 1), ..living() }));
        assert!(is_take_over(Living { complete: false, ..living() }));
        assert!(is_take_over(Living { state: None, ..living() }));
        assert!(is_take_over(Living { cgroup_id: None, ..living() }));
        assert!(is_take_over(Living { cgroup_id: Some(8), ..living() }));
    }

    #[test]
    fn a_newer_one_is_left_alone_whatever_else_is_wrong() {
        let found = ABI_VERSION + 1;
        let newer =
            Living { abi_version: Some(found), complete: false, cgroup_id: None, guards: false, state: None };
        let error = plan(Some(&newer), &OURS, Some(OURS.policy_hash)).unwrap_err();
        assert_eq!(error, Downgrade { found });
        assert!(error.to_string().starts_with("downgrade refused"), "{error}");
    }

    #[test]
    fn what_guards_takes_the_lasting_place() {
        assert_eq!(stands_in(true, true, true), None);
        assert_eq!(stands_in(false, true, true), Some(Stage::Staging));
        assert_eq!(stands_in(false, true, false), Some(Stage::Staging));
        assert_eq!(stands_in(false, false, true), Some(Stage::Retired));
        assert_eq!(stands_in(false, false, false), None);
    }
}
