//! Workloads of the policy that nobody on this host is.

use super::{Workload, Workloads};
use crate::lifecycle::paths;
use crate::policy::Policy;

/// Names of the policy's workloads that nobody on this host is now, as far as it can be seen.
#[must_use]
pub fn unmatched_here(policy: &Policy) -> Vec<&str> {
    // Most policies name none, and then there is nothing to look for.
    if !policy.workloads.iter().any(|rule| rule.needs_path()) {
        return Vec::new();
    }
    let here = paths::cgroup2_root().ok().and_then(|root| Workloads::new(root).all());
    // What runtimes write is root's alone.
    let labels_readable = nix::unistd::geteuid().is_root();
    here.map_or_else(Vec::new, |here| unmatched(policy, &here, labels_readable))
}

/// Names of the policy's workloads that no cgroup on this host fits. Workloads of users and networks alone are left out: who could be them
/// is not to be seen. So are those of labels, where those can't be read.
fn unmatched<'p>(policy: &'p Policy, here: &[Workload], labels_readable: bool) -> Vec<&'p str> {
    policy
        .workloads
        .iter()
        .filter(|rule| rule.needs_path() && (labels_readable || rule.labels.is_empty()))
        .filter(|rule| !here.iter().any(|workload| rule.fits_cgroup(workload)))
        .map(|rule| rule.name.as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::parse;

    #[test]
    fn only_what_could_be_seen_and_is_not_there_is_named() {
        let text = "
version: 1
issuers: [{name: a, issuer: 'https://i.example', keys: {discovery: true}, algorithms: [ES256]}]
servers: [{name: s, listen: ['127.0.0.1:1'], resource: 'https://h.example/mcp', issuers: [a]}]
workloads:
  - {name: here, unit: agent.service, uid: 4000000000, network: 10.0.0.0/8}
  - {name: gone, unit: other.service}
  - {name: glob, cgroup: /jobs/**}
  - {name: user, uid: 1}
  - {name: network, network: 10.0.0.0/8}
  - {name: label, label: {app: x}}
";
        let (policy, _) = parse("policy.yaml", text).unwrap();
        let here = ["/", "/agent.service"].map(|path| Workload::of(1, Some(path.to_owned())));
        assert_eq!(unmatched(&policy, &here, true), ["gone", "glob", "label"]);
        assert_eq!(unmatched(&policy, &here, false), ["gone", "glob"]);
    }
}
