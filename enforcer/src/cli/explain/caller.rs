//! The caller that `enforcer explain` is asked about, and what follows from who it is.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::slice;

use clap::Args;

use super::Row;
use crate::cli::exit::{FAILURE, failed};
use crate::lifecycle::paths;
use crate::policy::{CgroupGlob, Network, Policy, Server, WorkloadRule};
use crate::token::VerifiedToken;
use crate::workload::{
    CallerView, Identity, OwnAddresses, Workload, Workloads, bind, callers_allow, is_about,
};

/// The user that nobody is.
const NO_UID: u32 = u32::MAX;
/// Shorter beginnings of a container's id don't name it.
const MIN_ID_CHARS: usize = 12;

/// Who is calling.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// As this workload of the policy, or as what `enforcer workloads` shows: a pod, container, unit or cgroup path
    #[arg(long, value_name = "NAME", conflicts_with = "pid")]
    workload: Option<String>,
    /// As this process
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// From this address; alone: as a caller of whom nothing else is known [default: of --workload and --pid: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS")]
    from: Option<IpAddr>,
}

/// A caller as it is pretended to be.
#[derive(Debug)]
pub(super) struct Caller {
    workload: Option<Workload>,
    uid: u32,
    address: IpAddr,
}

impl Options {
    /// `None`: none is named.
    pub(super) fn caller(&self, policy: &Policy) -> anyhow::Result<Option<Caller>> {
        let address = self.from.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let Some(name) = &self.workload else {
            let Some(pid) = self.pid else {
                return Ok(self.from.map(|address| Caller { workload: None, uid: NO_UID, address }));
            };
            let workload = Workloads::new(paths::cgroup2_root()?)
                .of_process(pid)
                .map_err(|error| failed(FAILURE, format!("cannot see where process {pid} is: {error}")))?;
            let uid = uid_of(pid).unwrap_or(NO_UID);
            return Ok(Some(Caller { workload: Some(workload), uid, address }));
        };
        if let Some(rule) = policy.workloads.iter().find(|rule| rule.name == *name) {
            return Ok(Some(Caller::pretend(rule, self.from)));
        }
        let root = paths::cgroup2_root()?;
        let all = Workloads::new(&root).all().unwrap_or_default();
        let workload = all.into_iter().find(|workload| is_called(workload, name)).ok_or_else(|| {
            let message = format!(
                "no workload of the policy and no cgroup on this host is called `{name}`; `enforcer workloads` lists those with connections"
            );
            failed(FAILURE, message)
        })?;
        let path = workload.cgroup_path.as_deref().unwrap_or_default().trim_start_matches('/');
        let processes = fs::read_to_string(root.join(path).join("cgroup.procs")).unwrap_or_default();
        let uid = processes.lines().next().and_then(|pid| uid_of(pid.parse().ok()?)).unwrap_or(NO_UID);
        Ok(Some(Caller { workload: Some(workload), uid, address }))
    }
}

/// Whether a workload goes by a name, as it is shown or by one of its parts.
fn is_called(workload: &Workload, name: &str) -> bool {
    let Identity { unit, container_id, pod_uid, .. } = &workload.identity;
    let is = |part: &Option<String>| part.as_deref() == Some(name);
    let begins = container_id.as_ref().is_some_and(|id| name.len() >= MIN_ID_CHARS && id.starts_with(name));
    let pod = pod_uid.as_ref().is_some_and(|uid| name.strip_prefix("pod/") == Some(uid));
    workload.name() == name || is(&workload.cgroup_path) || is(unit) || is(pod_uid) || begins || pod
}

/// The user of a process, in this namespace.
fn uid_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

impl Caller {
    /// One that the rule fits, if it may come from the address.
    fn pretend(rule: &WorkloadRule, from: Option<IpAddr>) -> Self {
        let identity = Identity {
            unit: rule.units.first().cloned(),
            container_id: rule.containers.first().cloned(),
            pod_uid: rule.pods.first().cloned(),
            ..Identity::default()
        };
        let path = rule.cgroups.first().map_or_else(|| "/".to_owned(), CgroupGlob::example);
        let labels = rule.labels.iter().cloned().collect();
        let workload = Workload { identity, labels, ..Workload::of(0, Some(path)) };
        let own = rule.networks.first().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), Network::first);
        Self {
            workload: rule.needs_known_caller().then_some(workload),
            uid: rule.uids.first().copied().unwrap_or(NO_UID),
            address: from.unwrap_or(own),
        }
    }

    pub(super) fn view(&self) -> CallerView<'_> {
        let is_of_this_host = OwnAddresses::default().contains(self.address);
        CallerView { workload: self.workload.as_ref(), uid: self.uid, address: self.address, is_of_this_host }
    }

    fn shown(&self) -> String {
        let uid = if self.uid == NO_UID { "user not known".to_owned() } else { format!("uid {}", self.uid) };
        match &self.workload {
            Some(workload) => format!("{} ({uid}, from {})", workload.name(), self.address),
            None => format!("an unknown caller from {}", self.address),
        }
    }
}

const DEPENDS: &str = "depends";

fn row(name: &'static str, outcome: &'static str, detail: String) -> Row {
    Row { name, outcome, detail }
}

/// Whether the caller may call the server at all.
pub(super) fn may_call(server: &Server, caller: Option<&Caller>) -> Row {
    let Some(rules) = &server.callers else {
        return row("caller", "pass", "every caller may call".to_owned());
    };
    let names: Vec<_> = rules.iter().map(|rule| rule.name.as_str()).collect();
    let names = names.join(", ");
    match caller {
        None => {
            row("caller", DEPENDS, format!("only from {names}; name one with --workload, --pid or --from"))
        }
        Some(caller) => {
            let outcome = if callers_allow(server, &caller.view()) { "pass" } else { "fail" };
            row("caller", outcome, format!("{}; only from {names}", caller.shown()))
        }
    }
}

/// The rules about the token, one by one.
pub(super) fn may_present(
    server: &Server,
    token: Option<&VerifiedToken>,
    caller: Option<&Caller>,
) -> Vec<Row> {
    if server.bind.is_empty() {
        return vec![row("binding", "pass", "tokens are good from every caller".to_owned())];
    }
    let Some(token) = token else {
        return vec![row("binding", "skipped", "an earlier check failed".to_owned())];
    };
    let rules: Vec<_> = server.bind.iter().filter(|rule| is_about(rule, token)).collect();
    if rules.is_empty() {
        return vec![row("binding", "pass", "no rule is about this token".to_owned())];
    }
    let judged = rules.into_iter().map(|rule| {
        let Some(caller) = caller else {
            let detail = format!("{rule}; name a caller with --workload, --pid or --from");
            return row("binding", DEPENDS, detail);
        };
        let shown = caller.shown();
        match bind(slice::from_ref(rule), token, &caller.view()) {
            Ok(bound) if bound.first_use => {
                row("binding", DEPENDS, format!("{rule}; who that was only the daemon knows"))
            }
            Ok(_) => row("binding", "pass", format!("{shown}; {rule}")),
            Err(fault) => row("binding", "fail", format!("{}: {shown}; {rule}", fault.name())),
        }
    });
    judged.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::parse;
    use crate::token::testing::World;

    fn policy() -> Policy {
        let text = "
version: 1
issuers: [{name: main, issuer: 'https://issuer.example.com', keys: {discovery: true}, algorithms: [ES256]}]
servers:
  - {name: open, listen: ['127.0.0.1:1'], resource: 'https://o.example/mcp', issuers: [main]}
  - {name: files, listen: ['127.0.0.1:2'], resource: 'https://mcp.example.com/mcp', issuers: [main], callers: [agent, all, office]}
workloads:
  - {name: agent, unit: agent.service, uid: 7}
  - {name: other, unit: other.service}
  - {name: office, network: 10.0.0.0/8}
  - {name: all, label: {app: x}, cgroup: '/a*/**/b', pod: 8c2f6c4e-1f0a-4f5e-9d3b-0a1b2c3d4e5f, network: 'fd00::/8', uid: 1}
bind:
  - {servers: files, subject: alice, workloads: agent}
  - {servers: files, subject: bob, workloads: other}
  - {servers: files, client: agent-1, first_use: true}
";
        parse("policy.yaml", text).unwrap().0
    }

    fn options(workload: Option<&str>, from: Option<&str>) -> Options {
        Options {
            workload: workload.map(str::to_owned),
            pid: None,
            from: from.map(|address| address.parse().unwrap()),
        }
    }

    fn outcomes(policy: &Policy, options: &Options) -> Vec<&'static str> {
        let caller = options.caller(policy).unwrap();
        let token = World::new().verify().unwrap();
        let mut rows = vec![may_call(&policy.servers[1], caller.as_ref())];
        rows.extend(may_present(&policy.servers[1], Some(&token), caller.as_ref()));
        rows.into_iter().map(|row| row.outcome).collect()
    }

    #[test]
    fn who_is_pretended_to_be_a_workload_is_fitted_by_its_rule() {
        let policy = policy();
        for rule in &policy.workloads {
            let caller = options(Some(&rule.name), None).caller(&policy).unwrap().unwrap();
            assert!(rule.matches(&caller.view()), "{caller:?}");
        }
    }

    #[test]
    fn what_depends_on_the_caller_is_said_or_judged() {
        let policy = policy();
        assert_eq!(outcomes(&policy, &options(None, None)), ["depends", "depends", "depends"]);
        assert_eq!(outcomes(&policy, &options(Some("agent"), None)), ["pass", "pass", "depends"]);
        assert_eq!(outcomes(&policy, &options(Some("other"), None)), ["fail", "fail", "depends"]);
        assert_eq!(outcomes(&policy, &options(None, Some("10.1.1.1"))), ["pass", "fail", "depends"]);
        assert_eq!(outcomes(&policy, &options(None, Some("11.1.1.1"))), ["fail", "fail", "depends"]);
        let open = &policy.servers[0];
        assert_eq!(may_call(open, None).outcome, "pass");
        let token = World::new().verify().unwrap();
        assert_eq!(may_present(open, Some(&token), None)[0].outcome, "pass");
        assert_eq!(may_present(&policy.servers[1], None, None)[0].outcome, "skipped");
        assert!(options(Some("nobody-has-this-name"), None).caller(&policy).is_err());
    }

    #[test]
    fn a_process_is_called_by_the_names_of_where_it_is() {
        let Ok(root) = paths::cgroup2_root() else { return };
        let pid = std::process::id();
        let own = Workloads::new(root).of_process(pid).unwrap();
        let by_pid = Options { pid: Some(pid), ..options(None, None) }.caller(&policy()).unwrap().unwrap();
        assert_eq!((by_pid.workload.as_ref(), by_pid.uid), (Some(&own), nix::unistd::getuid().as_raw()));
        let path = own.cgroup_path.clone().unwrap();
        let by_path = options(Some(&path), None).caller(&policy()).unwrap().unwrap();
        assert_eq!(by_path.workload.unwrap().cgroup_id, own.cgroup_id);
        let container = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
        let workload = Workload::of(1, Some(format!("/docker/{container}")));
        for name in
            [container, &container[..12], "docker/0123456789ab", workload.cgroup_path.as_ref().unwrap()]
        {
            assert!(is_called(&workload, name), "{name}");
        }
        assert!(!is_called(&workload, "0123456789"));
    }
}
