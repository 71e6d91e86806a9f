//! Who is calling, and whether a workload of the policy is meant.

use std::net::IpAddr;

use enforcer_common::abi::NameHash;

use super::Workload;
use crate::policy::WorkloadRule;
use crate::revocation::{UNNAMED, name_hash};

/// Who is calling, as far as it is known.
#[derive(Debug, Clone, Copy)]
pub struct CallerView<'a> {
    /// `None`: unknown, because it is on another host, or because its connection was not recognised.
    pub workload: Option<&'a Workload>,
    /// The user of the process that connected; of an unknown caller it means nothing.
    pub uid: u32,
    /// Where the connection comes from.
    pub address: IpAddr,
    /// That is an address of this host, which any of its processes can have.
    pub is_of_this_host: bool,
}

impl CallerView<'_> {
    /// The workload by a name that is the same after a restart of the enforcer: the pod, else the container's id in full, else the unit,
    /// else the cgroup's path; of a caller that none of these is known of, the address. No user is part of it.
    #[must_use]
    pub fn workload_name(&self) -> String {
        let known = self.workload.and_then(|workload| {
            let path = workload.cgroup_path.as_ref()?;
            let identity = &workload.identity;
            let pod = identity.pod_uid.as_ref().map(|uid| format!("pod/{uid}"));
            let container = || identity.container_id.as_ref().map(|id| format!("container/{id}"));
            let name = pod.or_else(container).or_else(|| identity.unit.clone());
            // Several paths are shown alike if they are not shown as they are.
            let shown = || match workload.exact_path() {
                Some(path) => path.to_owned(),
                None => format!("{path} (cgroup {})", workload.cgroup_id),
            };
            Some(name.unwrap_or_else(shown))
        });
        known.unwrap_or_else(|| self.address.to_canonical().to_string())
    }
}

impl CallerView<'_> {
    /// The name that people are shown, as `enforcer workloads` has it; of an unknown caller the address.
    #[must_use]
    pub fn shown_name(&self) -> String {
        self.workload.map_or_else(|| self.address.to_canonical().to_string(), Workload::name)
    }

    /// Whether its name is its own: its workload was found, or it has an address that is not every process's of this host. A workload can hide its
    /// name, by being gone, and then has that of others.
    #[must_use]
    pub fn has_name(&self) -> bool {
        match self.workload {
            Some(workload) => workload.cgroup_path.is_some(),
            None => !self.is_of_this_host,
        }
    }

    /// Hashes of the name that lasts and of the one that is shown: what a revocation may mean it by. [`UNNAMED`] without a name: that may be
    /// anybody.
    #[must_use]
    pub fn name_hashes(&self) -> [NameHash; 2] {
        if !self.has_name() {
            return UNNAMED;
        }
        [name_hash(&self.workload_name()), name_hash(&self.shown_name())]
    }
}

impl WorkloadRule {
    /// Whether it fits the caller: each kind of selector that is given does, by one of its values, of the labels all. Only networks fit
    /// callers that are unknown, and only networks and users those whose cgroup is gone. SPIFFE ids are no selector.
    #[must_use]
    pub fn matches(&self, caller: &CallerView<'_>) -> bool {
        let in_network = |address| self.networks.iter().any(|network| network.contains(address));
        if !self.has_selector() || !(self.networks.is_empty() || in_network(caller.address)) {
            return false;
        }
        if !self.needs_known_caller() {
            return true;
        }
        let Some(workload) = caller.workload else { return false };
        (self.uids.is_empty() || self.uids.contains(&caller.uid)) && self.fits_cgroup(workload)
    }

    /// Whether those selectors fit that look at the caller's cgroup, if there are any.
    #[must_use]
    pub fn fits_cgroup(&self, workload: &Workload) -> bool {
        // Named one by one: who adds a selector has to say how it fits.
        let Self { name: _, units, containers, labels, pods, cgroups, uids: _, networks: _, spiffe_ids: _ } =
            self;
        if !self.needs_path() {
            return true;
        }
        if workload.cgroup_path.is_none() {
            return false;
        }
        let identity = &workload.identity;
        let one_of = |values: &[String], found: &Option<String>| {
            values.is_empty() || found.as_ref().is_some_and(|found| values.contains(found))
        };
        one_of(units, &identity.unit)
            && one_of(containers, &identity.container_id)
            && one_of(pods, &identity.pod_uid)
            && labels.iter().all(|(name, value)| workload.labels.get(name) == Some(value))
            && (cgroups.is_empty()
                || workload.exact_path().is_some_and(|path| cgroups.iter().any(|glob| glob.matches(path))))
    }

    /// Whether it can only fit callers that are known.
    #[must_use]
    pub fn needs_known_caller(&self) -> bool {
        self.needs_path() || !self.uids.is_empty()
    }

    /// Whether it can only fit callers whose cgroup's path is known.
    #[must_use]
    pub fn needs_path(&self) -> bool {
        !(self.units.is_empty()
            && self.containers.is_empty()
            && self.labels.is_empty()
            && self.pods.is_empty()
            && self.cgroups.is_empty())
    }

    fn has_selector(&self) -> bool {
        self.needs_known_caller() || !self.networks.is_empty()
    }
}
