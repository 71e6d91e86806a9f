//! The record of the policy in force, by which the next daemon can tell what a changed one changes.

use serde::{Deserialize, Serialize};

use super::{StateDir, StateError, StateLock, read, replace, unusable};
use crate::policy::{self, Policy, PolicyText};

pub(super) const FILE: &str = "policy.json";
const VERSION: u32 = 2;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    recorded: RecordedPolicy,
}

/// What is recorded of a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedPolicy {
    /// Its text.
    pub policy: PolicyText,
    /// [`crate::policy::hash`] of what the program that recorded it made of the text.
    pub policy_hash: [u8; 32],
    /// [`crate::policy::compiled_hash`] of the same.
    pub compiled_hash: [u8; 32],
    /// [`crate::policy::RULES`] of that program.
    pub rules: u32,
}

impl RecordedPolicy {
    /// Of a policy and the text that it was compiled from.
    #[must_use]
    pub fn of(text: PolicyText, policy: &Policy) -> Self {
        Self {
            policy: text,
            policy_hash: policy::hash(policy),
            compiled_hash: policy::compiled_hash(policy),
            rules: policy::RULES,
        }
    }
}

impl StateDir {
    /// The policy that was recorded last; `None`: none ever was. Whether it is the one that the maps were filled by, its hash says. It may
    /// be another version's.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn read_policy(&self) -> Result<Option<RecordedPolicy>, StateError> {
        let path = self.path().join(FILE);
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let damaged = |reason: String| StateError::Damaged { path: path.clone(), reason };
        let document: Document =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if document.version != VERSION {
            return Err(damaged(format!("version {}, where {VERSION} is known", document.version)));
        }
        Ok(Some(document.recorded))
    }

    /// Records a policy in place of the one before. Hold the lock.
    ///
    /// # Errors
    /// See [`StateError`]; what was recorded before stands.
    pub fn write_policy(&self, _lock: &StateLock, recorded: &RecordedPolicy) -> Result<(), StateError> {
        let path = self.path().join(FILE);
        let document = Document { version: VERSION, recorded: recorded.clone() };
        let bytes = serde_json::to_vec(&document).map_err(|error| unusable(&path)(error.into()))?;
        replace(&path, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_back_and_one_of_another_form_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        let state = StateDir::new(place.path(), "x");
        let lock = state.lock().unwrap();
        assert_eq!(state.read_policy().unwrap(), None);
        for text in ["version: 1\n# \"é\"\n", "{}"] {
            let policy = PolicyText { file: "/etc/policy.yaml".into(), text: text.into() };
            let recorded = RecordedPolicy { policy, policy_hash: [7; 32], compiled_hash: [8; 32], rules: 9 };
            state.write_policy(&lock, &recorded).unwrap();
            assert_eq!(state.read_policy().unwrap(), Some(recorded));
        }
        for text in
            ["", "{}", r#"{"version":1,"recorded":{"file":"","text":""}}"#, r#"{"version":2,"recorded":""}"#]
        {
            std::fs::write(state.path().join(FILE), text).unwrap();
            assert!(matches!(state.read_policy(), Err(StateError::Damaged { .. })), "{text}");
        }
    }
}
