//! Which workload a caller is: from the cgroup that its process was in when it connected, to the names that people know.

mod binding;
#[cfg(test)]
mod binding_tests;
mod caller;
mod identity;
mod labels;
mod own;
mod tree;
mod unmatched;

pub(crate) use binding::is_about;
pub use binding::{BindFault, Bound, bind, callers_allow};
pub use caller::CallerView;
pub use identity::Identity;
pub(crate) use identity::{is_container_id, is_pod_uid, is_unit};
pub use own::OwnAddresses;
pub use tree::Workloads;
pub(crate) use tree::cgroups;
pub use unmatched::unmatched_here;

use std::collections::BTreeMap;

use enforcer_common::abi::{Caller, LOST_CGROUPS, text_str};
use serde::Serialize;

/// Of longer paths the rest is left out.
const MAX_SHOWN_CHARS: usize = 512;

/// The workload of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Id of the cgroup.
    pub cgroup_id: u64,
    /// Its path below the root of the hierarchy. Absent: it is gone, or can't be seen from here.
    pub cgroup_path: Option<String>,
    /// Id of the cgroup that has the workload's name: this one, or the one around it whose part it is.
    pub named_cgroup_id: Option<u64>,
    /// What the path says.
    #[serde(flatten)]
    pub identity: Identity,
    /// The labels that the container's runtime gave it, as far as it says.
    pub labels: BTreeMap<String, String>,
}

impl Workload {
    pub(crate) fn of(cgroup_id: u64, cgroup_path: Option<String>) -> Self {
        let identity = cgroup_path.as_deref().map(Identity::of).unwrap_or_default();
        // Whoever may make cgroups chooses their names, and terminals obey control characters.
        let shown =
            |path: String| path.replace(char::is_control, "\u{fffd}").chars().take(MAX_SHOWN_CHARS).collect();
        let cgroup_path = cgroup_path.map(shown);
        Self { cgroup_id, cgroup_path, named_cgroup_id: None, identity, labels: BTreeMap::new() }
    }

    /// The cgroup that its requests are charged to while nobody has granted them anything.
    pub(crate) fn source_cgroup_id(&self) -> u64 {
        match self.cgroup_path {
            Some(_) => self.named_cgroup_id.unwrap_or(self.cgroup_id),
            None => LOST_CGROUPS,
        }
    }

    /// The path, if it is shown as it is, and whole. Others could look the same otherwise.
    fn exact_path(&self) -> Option<&str> {
        let path = self.cgroup_path.as_deref()?;
        let exact =
            !path.contains(char::REPLACEMENT_CHARACTER) && path.chars().nth(MAX_SHOWN_CHARS - 1).is_none();
        exact.then_some(path)
    }

    /// For people: its best name, else its path, else its number.
    #[must_use]
    pub fn name(&self) -> String {
        self.identity
            .name()
            .or_else(|| self.cgroup_path.clone())
            .unwrap_or_else(|| format!("cgroup {}", self.cgroup_id))
    }

    /// How it was resolved, for people.
    #[must_use]
    pub fn source(&self) -> &'static str {
        match &self.cgroup_path {
            Some(_) => self.identity.source().unwrap_or("path"),
            None => "gone",
        }
    }
}

/// The name of a caller's thread. Who runs it chooses it, so what could be taken for something else beside it is left out.
#[must_use]
pub fn comm(caller: &Caller) -> String {
    text_str(&caller.comm).chars().filter(|c| c.is_ascii_graphic() && !"[](),:".contains(*c)).collect()
}

/// Name of a user, as the system knows it.
#[must_use]
pub fn user_name(uid: u32) -> Option<String> {
    nix::unistd::User::from_uid(uid.into()).ok().flatten().map(|user| user.name)
}
