//! The `workloads` of a policy file.

use std::collections::HashMap;
use std::sync::Arc;

use super::error::{CGROUP, CONTAINER, Caution, Defect, NETWORK};
use super::fields::{Field, Mapping, Report};
use super::named::Names;
use super::node::Value;
use super::selectors::is_spiffe_id;
use super::{BindTo, CgroupGlob, MAX_WORKLOADS, Network, Policy, WorkloadRule, server};
use crate::workload::{is_container_id, is_pod_uid, is_unit};

const FIELDS: &[&str] =
    &["name", "unit", "container", "label", "pod", "cgroup", "uid", "network", "spiffe_id"];
/// Most values of one selector.
const MAX_VALUES: usize = 64;
/// Longest value, in bytes.
const MAX_VALUE_BYTES: usize = 4096;
/// The uid that stands for none.
const MAX_UID: u64 = u32::MAX as u64 - 1;

/// The workloads of a file, also the bad ones: who names one of those is not to blame.
pub(super) struct KnownWorkloads {
    names: Names,
    /// `None` behind a name whose workload has defects.
    by_name: HashMap<String, Option<Arc<WorkloadRule>>>,
}

impl KnownWorkloads {
    pub(super) fn compile(report: &mut Report, map: &Mapping<'_>) -> Self {
        let mut known = Self { names: Names::new("workload"), by_name: HashMap::new() };
        let Some(field) = map.optional("workloads") else { return known };
        let Some(entries) = field.list(report, MAX_WORKLOADS) else {
            known.names.nameless = true;
            return known;
        };
        for entry in entries {
            let Some(map) = entry.mapping(report, FIELDS) else {
                known.names.nameless = true;
                continue;
            };
            let name = known.names_of(report, &map);
            let rule = workload(report, &map, name.clone().unwrap_or_default());
            if let Some(name) = name {
                known.by_name.insert(name, rule.map(Arc::new));
            }
        }
        known
    }

    fn names_of(&mut self, report: &mut Report, map: &Mapping<'_>) -> Option<String> {
        let name = server::name(report, map);
        self.names.add(report, name)
    }

    /// All of them, in file order; `None` if any has defects.
    pub(super) fn in_order(&self) -> Option<Vec<Arc<WorkloadRule>>> {
        self.names.known.iter().map(|name| self.by_name.get(&name.value).cloned().flatten()).collect()
    }

    /// Those that a field lists by name.
    pub(super) fn named(&self, report: &mut Report, field: &Field<'_>) -> Option<Vec<Arc<WorkloadRule>>> {
        let names = self.names.listed(report, field, MAX_WORKLOADS)?;
        names.iter().map(|name| self.by_name.get(name).cloned().flatten()).collect()
    }

    /// Those that have SPIFFE ids; `None` if any workload has defects: it could be one.
    pub(super) fn with_spiffe_ids(&self) -> Option<Vec<Arc<WorkloadRule>>> {
        let mut all = self.in_order()?;
        all.retain(|rule| !rule.spiffe_ids.is_empty());
        Some(all)
    }

    /// Warns of those that nothing names.
    pub(super) fn warn_unused(&self, report: &mut Report, policy: &Policy) {
        let bound = policy.servers.iter().flat_map(|server| &server.bind).flat_map(|rule| match &rule.to {
            BindTo::Workloads(rules) | BindTo::SpiffeId(rules) => rules.as_slice(),
            BindTo::KubernetesPod | BindTo::FirstUse => &[],
        });
        let callers = policy.servers.iter().filter_map(|server| server.callers.as_ref()).flatten();
        let used: std::collections::HashSet<&str> =
            bound.chain(callers).map(|rule| rule.name.as_str()).collect();
        for name in self.names.known.iter().filter(|name| !used.contains(name.value.as_str())) {
            report.warn(name.at, name.field.clone(), Caution::UnusedWorkload);
        }
    }
}

/// One entry. Its defects are recorded also where the name has some.
fn workload(report: &mut Report, map: &Mapping<'_>, name: String) -> Option<WorkloadRule> {
    let units = texts(report, map, "unit", "a unit's name, e.g. agent.service", is_unit);
    let containers = texts(report, map, "container", CONTAINER, is_container_id);
    let labels = map.or_default("label", Vec::new(), |field| labels(report, &field));
    let pods = texts(report, map, "pod", "a pod's uid, hexadecimal digits in lower case", is_pod_uid);
    let cgroups = values(report, map, "cgroup", CGROUP, CgroupGlob::parse);
    let uids = map.or_default("uid", Vec::new(), |field| {
        field.one_or_more(report, MAX_VALUES, |report, entry| {
            entry.number(report, 0, MAX_UID).and_then(|uid| u32::try_from(uid).ok())
        })
    });
    let networks = values(report, map, "network", NETWORK, Network::parse);
    let spiffe_ids = texts(report, map, "spiffe_id", "a SPIFFE id with a path", is_spiffe_id);
    if !FIELDS.iter().any(|field| !matches!(*field, "name" | "spiffe_id") && map.has(field)) {
        report.error(map.at, map.path.clone(), Defect::NoSelector);
        return None;
    }
    Some(WorkloadRule {
        name,
        units: units?,
        containers: containers?,
        labels: labels?,
        pods: pods?,
        cgroups: cgroups?,
        uids: uids?,
        networks: networks?,
        spiffe_ids: spiffe_ids?,
    })
}

fn texts(
    report: &mut Report,
    map: &Mapping<'_>,
    field: &'static str,
    expected: &'static str,
    good: fn(&str) -> bool,
) -> Option<Vec<String>> {
    values(report, map, field, expected, |text| good(text).then(|| text.to_owned()))
}

fn values<T: PartialEq + ToString>(
    report: &mut Report,
    map: &Mapping<'_>,
    field: &'static str,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Option<Vec<T>> {
    map.or_default(field, Vec::new(), |field| {
        field.one_or_more(report, MAX_VALUES, |report, entry| {
            let text = entry.text(report, MAX_VALUE_BYTES)?;
            let value = parse(text);
            if value.is_none() {
                entry.error(report, Defect::Selector { value: text.to_owned(), expected });
            }
            value
        })
    })
}

/// A mapping from names of labels to their values.
fn labels(report: &mut Report, field: &Field<'_>) -> Option<Vec<(String, String)>> {
    let Value::Map(entries) = &field.node.value else {
        let found = field.node.value.kind();
        field.error(report, Defect::WrongType { expected: "a mapping of labels to their values", found });
        return None;
    };
    if entries.is_empty() {
        field.error(report, Defect::EmptyList);
        return None;
    }
    if entries.len() > MAX_VALUES {
        field.error(report, Defect::TooManyEntries { found: entries.len(), limit: MAX_VALUES });
        return None;
    }
    let mut out: Vec<(String, String)> = Vec::new();
    let mut lines: HashMap<&str, u64> = HashMap::new();
    let mut good = true;
    for (key, value) in entries {
        let key = Field { node: key, path: field.path.clone() };
        let value = Field { node: value, path: field.path.clone() };
        let (name, text) = (key.text(report, MAX_VALUE_BYTES), value.text(report, MAX_VALUE_BYTES));
        let (Some(name), Some(text)) = (name, text) else {
            good = false;
            continue;
        };
        match lines.insert(name, key.at().line) {
            Some(first_line) => {
                key.error(report, Defect::DuplicateField { field: name.to_owned(), first_line });
                good = false;
            }
            None => out.push((name.to_owned(), text.to_owned())),
        }
    }
    good.then_some(out)
}
