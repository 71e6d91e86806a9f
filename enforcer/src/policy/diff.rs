//! What differs between two policies, field by field.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Policy, effective_json};

/// What differs between two effective policies: what a file leaves out counts as its default. Order in a file means nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyDiff {
    /// Fields of the file as a whole, such as `mode`.
    pub settings: Vec<FieldChange>,
    /// Issuers, by name.
    pub issuers: NamedChanges,
    /// Servers, by name.
    pub servers: NamedChanges,
    /// Workloads, by name.
    pub workloads: NamedChanges,
    /// Limits, by name.
    pub limits: NamedChanges,
}

/// Changes of things with names. Each list is in the order of the names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedChanges {
    /// Only in the new policy.
    pub added: Vec<String>,
    /// Only in the old policy.
    pub removed: Vec<String>,
    /// In both, and not the same.
    pub changed: Vec<Changed>,
}

/// Something that changed under its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The name in both policies.
    pub name: String,
    /// The fields that differ; never empty.
    pub fields: Vec<FieldChange>,
}

/// One field's two values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldChange {
    /// The field as `enforcer check --output json` calls it; inner fields with a dot.
    pub field: String,
    /// Its value in the old policy.
    pub old: Value,
    /// Its value in the new policy.
    pub new: Value,
}

/// Fields that follow from others, or say nothing about what is checked.
const DERIVED: &[&str] = &["version", "id", "name", "shares_endpoint_with", "metadata.paths"];

impl PolicyDiff {
    /// From the old policy to the new one.
    #[must_use]
    pub fn between(old: &Policy, new: &Policy) -> Self {
        let (mut old, mut new) = (effective_json(old), effective_json(new));
        let mut named =
            |list: &str| NamedChanges::between(&by_name(old[list].take()), &by_name(new[list].take()));
        let (issuers, servers) = (named("issuers"), named("servers"));
        let (workloads, limits) = (named("workloads"), named("limits"));
        Self { settings: changes(&old, &new), issuers, servers, workloads, limits }
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let named = [&self.issuers, &self.servers, &self.workloads, &self.limits];
        self.settings.is_empty() && named.iter().all(|named| named.is_empty())
    }
}

impl NamedChanges {
    fn between(old: &BTreeMap<String, Value>, new: &BTreeMap<String, Value>) -> Self {
        let only = |one: &BTreeMap<String, Value>, other: &BTreeMap<String, Value>| {
            one.keys().filter(|name| !other.contains_key(*name)).cloned().collect()
        };
        let changed = old.iter().filter_map(|(name, old)| {
            let fields = changes(old, new.get(name)?);
            (!fields.is_empty()).then(|| Changed { name: name.clone(), fields })
        });
        Self { added: only(new, old), removed: only(old, new), changed: changed.collect() }
    }

    fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }
}

fn by_name(list: Value) -> BTreeMap<String, Value> {
    let Value::Array(entries) = list else { return BTreeMap::new() };
    entries.into_iter().filter_map(|entry| Some((entry.get("name")?.as_str()?.to_owned(), entry))).collect()
}

fn changes(old: &Value, new: &Value) -> Vec<FieldChange> {
    let (mut old_fields, mut new_fields) = (BTreeMap::new(), BTreeMap::new());
    flatten("", old, &mut old_fields);
    flatten("", new, &mut new_fields);
    let fields: std::collections::BTreeSet<_> = old_fields.keys().chain(new_fields.keys()).collect();
    fields
        .into_iter()
        .filter(|field| !DERIVED.contains(&field.as_str()))
        .filter_map(|field| {
            let value = |fields: &BTreeMap<String, Value>| fields.get(field).cloned().unwrap_or(Value::Null);
            let (old, new) = (value(&old_fields), value(&new_fields));
            (old != new).then(|| FieldChange { field: field.clone(), old, new })
        })
        .collect()
}

/// The fields of an object; those of an inner object under both names.
fn flatten(prefix: &str, value: &Value, fields: &mut BTreeMap<String, Value>) {
    let none = Map::new();
    for (name, value) in value.as_object().unwrap_or(&none) {
        let field = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Object(_) => flatten(&field, value, fields),
            _ => drop(fields.insert(field, value.clone())),
        }
    }
}

/// One line for each difference, without a newline at the end.
impl fmt::Display for PolicyDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines: Vec<String> = self.settings.iter().map(|change| format!("~ {change}")).collect();
        for (kind, named) in [
            ("issuer", &self.issuers),
            ("server", &self.servers),
            ("workload", &self.workloads),
            ("limit", &self.limits),
        ] {
            lines.extend(named.added.iter().map(|name| format!("+ {kind} \"{name}\"")));
            lines.extend(named.removed.iter().map(|name| format!("- {kind} \"{name}\"")));
            for changed in &named.changed {
                let fields = changed.fields.iter();
                lines.extend(fields.map(|change| format!("~ {kind} \"{}\": {change}", changed.name)));
            }
        }
        f.write_str(&lines.join("\n"))
    }
}

impl fmt::Display for FieldChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.field, self.old, self.new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::parse;

    const OLD: &str = "
version: 1
issuers:
  - {name: corp, issuer: 'https://i.example', keys: {file: keys.json}, algorithms: [ES256]}
  - {name: gone, issuer: 'https://g.example', keys: {discovery: true}, algorithms: [ES256]}
servers:
  - {name: a, listen: ['10.0.0.1:1'], resource: 'https://a.example/mcp', issuers: [corp]}
  - {name: b, listen: ['10.0.0.1:2'], resource: 'https://b.example/mcp', issuers: [corp, gone]}
  - {name: c, listen: ['10.0.0.1:3'], resource: 'https://c.example/mcp', issuers: [corp]}
workloads: [{name: w, unit: a.service, spiffe_id: 'spiffe://e/w'}]
bind: [{servers: c, issuer: corp, subject: s, client: c, first_use: true}]
limits: [{name: l, per: source, rate: 1/s, servers: [b]}]
";

    fn policy(text: &str) -> Policy {
        parse("policy.yaml", text).unwrap().0
    }

    fn diff(new: &str) -> PolicyDiff {
        PolicyDiff::between(&policy(OLD), &policy(new))
    }

    #[test]
    fn every_difference_has_its_line() {
        let new = "
version: 1
mode: observe
issuers:
  - {name: corp, issuer: 'https://i.example', keys: {url: 'https://i.example/keys'}, algorithms: [ES256], leeway: 1m}
  - {name: new, issuer: 'https://n.example', keys: {discovery: true}, algorithms: [ES256]}
servers:
  - {name: d, listen: ['10.0.0.1:4'], resource: 'https://d.example/mcp', issuers: [new]}
  - {name: b, listen: ['10.0.0.1:2'], resource: 'https://b.example/mcp', issuers: [corp]}
  - {name: a, listen: ['10.0.0.1:1'], resource: 'https://a.example/mcp', issuers: [corp], scopes: [x], metadata: {serve: false}}
";
        assert_eq!(
            diff(new).to_string(),
            "~ mode: \"enforce\" -> \"observe\"\n\
             + issuer \"new\"\n\
             - issuer \"gone\"\n\
             ~ issuer \"corp\": keys.file: \"keys.json\" -> null\n\
             ~ issuer \"corp\": keys.url: null -> \"https://i.example/keys\"\n\
             ~ issuer \"corp\": leeway_seconds: 30 -> 60\n\
             + server \"d\"\n\
             - server \"c\"\n\
             ~ server \"a\": metadata.scopes_supported: [] -> [\"x\"]\n\
             ~ server \"a\": metadata.serve: true -> false\n\
             ~ server \"a\": scopes: [] -> [\"x\"]\n\
             ~ server \"b\": issuers: [\"corp\",\"gone\"] -> [\"corp\"]\n\
             ~ server \"b\": limits: [\"l\"] -> []\n\
             - workload \"w\"\n\
             - limit \"l\""
        );
        let json = serde_json::to_value(diff(new)).unwrap();
        assert_eq!(serde_json::from_value::<PolicyDiff>(json).unwrap(), diff(new));
    }

    #[test]
    fn order_and_defaults_are_no_difference() {
        assert!(diff(OLD).is_empty());
        let mut lines: Vec<&str> = OLD.lines().collect();
        lines.swap(4, 3);
        let (a, c) = (6, 8);
        lines.swap(a, c);
        let text = lines.join("\n").replace("name: a,", "name: a, scopes: [], path: /mcp,");
        assert_eq!(diff(&text).to_string(), "");
        assert!(diff(&text).is_empty());
    }

    /// A field that the effective policy does not show would change without anybody being told.
    #[test]
    fn every_field_of_a_server_and_an_issuer_shows() {
        for (from, to) in [
            ("listen: ['10.0.0.1:1']", "listen: ['10.0.0.1:9']"),
            ("resource: 'https://a.example/mcp'", "resource: 'https://z.example/mcp'"),
            ("name: a,", "name: a, aliases: ['https://y.example'],"),
            ("name: a,", "name: a, path: /other,"),
            ("name: a,", "name: a, public_paths: [/health],"),
            ("name: a,", "name: a, scopes: [x],"),
            ("name: a,", "name: a, metadata: {resource_name: A},"),
            ("name: a,", "name: a, metadata: {serve: false},"),
            ("name: a,", "name: a, metadata: {scopes_supported: [y]},"),
            ("name: a,", "name: a, hosts: [h.example],"),
            ("name: a,", "name: a, origins: ['https://o.example'],"),
            ("name: corp,", "name: corp, ca_file: ca.pem,"),
            ("name: corp,", "name: corp, allow_http_loopback: true,"),
            ("algorithms: [ES256]}\n  - {name: gone", "algorithms: [ES256, RS256]}\n  - {name: gone"),
            ("name: corp,", "name: corp, leeway: 5s,"),
            ("name: corp,", "name: corp, max_token_lifetime: 1h,"),
            ("name: corp,", "name: corp, token_types: [JWT],"),
            ("name: corp,", "name: corp, refresh_interval: 1m,"),
            ("name: corp,", "name: corp, max_staleness: 2h,"),
            ("issuer: 'https://i.example'", "issuer: 'https://j.example'"),
            ("file: keys.json", "file: other.json"),
            ("name: a,", "name: a, callers: w,"),
            ("bind: [", "bind: [{workloads: w}, "),
            ("subject: s,", "subject: t,"),
            ("issuer: corp,", "issuer: gone,"),
            ("client: c,", ""),
            ("first_use: true", "claim: kubernetes_pod"),
            ("first_use: true", "workloads: w"),
            ("first_use: true", "claim: spiffe_id"),
            ("servers: c", "servers: [c, b]"),
            ("unit: a.service", "unit: b.service"),
            ("unit: a.service", "unit: a.service, uid: 1"),
            ("unit: a.service", "unit: a.service, network: ::1"),
            ("unit: a.service", "unit: a.service, cgroup: /a"),
            ("unit: a.service", "unit: a.service, label: {a.b: c}"),
            ("unit: a.service", "unit: a.service, pod: 8c2f6c4e-1f0a-4f5e-9d3b-0a1b2c3d4e5f"),
            ("spiffe://e/w", "spiffe://e/x"),
            ("per: source,", "per: server,"),
            ("rate: 1/s,", "rate: 2/s,"),
            ("rate: 1/s,", "rate: 1/s, burst: 5,"),
            ("rate: 1/s,", "rate: 1/s, streams: 5,"),
            ("rate: 1/s,", "rate: 1/s, ipv4_prefix: 24,"),
            ("rate: 1/s,", "rate: 1/s, ipv6_prefix: 56,"),
            ("servers: [b]", "servers: [a]"),
            ("version: 1\n", "version: 1\nunknown_requests: {rate: 1/s}\n"),
            ("version: 1\n", "version: 1\nrefused_requests: {rate: 1/s}\n"),
        ] {
            let text = OLD.replace(from, to);
            assert_ne!(text, OLD, "{from}");
            assert!(!diff(&text).is_empty(), "{to}");
        }
    }
}
