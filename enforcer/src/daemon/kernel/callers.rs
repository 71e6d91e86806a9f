//! Who is calling, and who may not.

use std::collections::BTreeMap;
use std::net::IpAddr;

use enforcer_common::abi::{Bar, Barred, Caller, Flow, Origin, SourceKey};
use tracing::warn;

use super::Kernel;
use crate::core::CallerFacts;

impl Kernel {
    /// Who that is, on this connection if it is known. Its process may be in the workload, which saves a walk.
    pub(super) fn facts(&mut self, origin: &Origin, flow: Option<&Flow>) -> CallerFacts {
        let pid = flow.map_or(0, |flow| flow.caller.pid);
        let address = IpAddr::from(origin.address()).to_canonical();
        // In another network namespace this host has other addresses, of which the server's own is one.
        let is_to_itself = flow.is_some_and(|flow| flow.peer.addr == flow.local.addr);
        let caller = Caller { cgroup_id: origin.cgroup_id(), uid: origin.uid(), pid, ..Caller::UNKNOWN };
        let workload = self.workloads.as_mut().and_then(|workloads| workloads.of_caller(&caller));
        let mut source = SourceKey::of(origin);
        if let Some(workload) = &workload {
            source.cgroup_id = workload.source_cgroup_id();
        }
        CallerFacts {
            uid: origin.uid(),
            is_known: caller.is_known(),
            workload,
            address,
            is_of_this_host: is_to_itself || self.own.contains(address),
            source,
            charged_elsewhere: false,
        }
    }

    /// Says who may not connect. Who can't be written is judged by its requests.
    pub(in crate::daemon) fn bar(&mut self, barred: BTreeMap<Barred, Bar>) {
        let old = std::mem::take(&mut self.barred);
        for gone in old.keys().filter(|key| !barred.contains_key(key)) {
            self.maps.unbar(gone);
        }
        let all = barred.len();
        let written =
            |(key, bar): &(Barred, Bar)| old.get(key) == Some(bar) || self.maps.bar(key, bar).is_ok();
        self.barred = barred.into_iter().filter(written).collect();
        let failed = all - self.barred.len();
        if failed != 0 {
            warn!(failed, "workloads that may not connect are let connect; their requests are refused");
        }
    }
}
