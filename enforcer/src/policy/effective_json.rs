//! The effective policy for programs.

use std::sync::Arc;

use serde_json::{Value, json};

use super::sharing::METADATA_PREFIX;
use super::{
    BindRule, BindTo, Dimension, Issuer, KeySource, Limit, Mode, Policy, Rate, Server, WorkloadRule, shield,
};

/// What [`super::effective`] says, for programs: defaults filled in, durations in seconds, servers by id.
pub fn effective_json(policy: &Policy) -> Value {
    json!({
        "version": 1,
        "mode": match policy.mode {
            Mode::Enforce => "enforce",
            Mode::Observe => "observe",
        },
        "daemon_timeout_seconds": policy.daemon_timeout.as_secs(),
        "issuers": policy.issuers.iter().map(|i| issuer(i)).collect::<Vec<_>>(),
        "servers": policy.servers.iter().enumerate().map(|(id, s)| server(policy, id, s)).collect::<Vec<_>>(),
        "workloads": policy.workloads.iter().map(|w| workload(w)).collect::<Vec<_>>(),
        "limits": policy.limits.iter().map(|l| limit(l)).collect::<Vec<_>>(),
        "unknown_requests": rate(&policy.unknown),
        "refused_requests": policy.refused.as_ref().map(rate),
        "shield": policy.shield.as_ref().map(shield::json),
    })
}

fn issuer(issuer: &Issuer) -> Value {
    json!({
        "name": issuer.name,
        "issuer": issuer.issuer,
        "keys": match &issuer.keys {
            KeySource::File(path) => json!({ "file": path.display().to_string() }),
            KeySource::Url(url) => json!({ "url": url.as_str() }),
            KeySource::Discovery => json!({ "discovery": true }),
        },
        "ca_file": issuer.ca_file.as_ref().map(|p| p.display().to_string()),
        "allow_http_loopback": issuer.allow_http_loopback,
        "algorithms": issuer.algorithms.iter().map(|a| a.name()).collect::<Vec<_>>(),
        "leeway_seconds": issuer.leeway.as_secs(),
        "max_token_lifetime_seconds": issuer.max_token_lifetime.as_secs(),
        "token_types": issuer.token_types,
        "refresh_interval_seconds": issuer.refresh_interval.as_secs(),
        "max_staleness_seconds": issuer.max_staleness.as_secs(),
    })
}

fn server(policy: &Policy, id: usize, server: &Server) -> Value {
    let path = server.metadata_path();
    let mut paths = vec![path];
    if policy.root_metadata(server) && !paths.iter().any(|p| p == METADATA_PREFIX) {
        paths.push(METADATA_PREFIX.to_owned());
    }
    json!({
        "id": id,
        "name": server.name,
        "listen": server.listen.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "shares_endpoint_with": policy.sharing(server).iter().map(|s| &s.name).collect::<Vec<_>>(),
        "resource": server.resource,
        "aliases": server.aliases,
        "path": server.path,
        "public_paths": server.public_paths,
        "issuers": server.issuers.iter().map(|i| &i.name).collect::<Vec<_>>(),
        "scopes": server.scopes,
        "metadata": {
            "serve": server.metadata.serve,
            "paths": paths,
            "resource_name": server.metadata.resource_name,
            "scopes_supported": server.metadata.scopes_supported,
        },
        "hosts": server.hosts,
        "origins": server.origins,
        "callers": server.callers.as_deref().map(names),
        "bind": server.bind.iter().map(bind).collect::<Vec<_>>(),
        "limits": server.limits.iter().map(|l| &l.name).collect::<Vec<_>>(),
    })
}

fn names(workloads: &[Arc<WorkloadRule>]) -> Vec<&str> {
    workloads.iter().map(|w| w.name.as_str()).collect()
}

fn bind(rule: &BindRule) -> Value {
    json!({
        "issuer": rule.issuer,
        "subject": rule.subject,
        "client": rule.client_id,
        "to": match &rule.to {
            BindTo::Workloads(workloads) => json!({ "workloads": names(workloads) }),
            BindTo::KubernetesPod => json!({ "claim": "kubernetes_pod" }),
            BindTo::SpiffeId(workloads) => json!({ "claim": "spiffe_id", "workloads": names(workloads) }),
            BindTo::FirstUse => json!({ "first_use": true }),
        },
    })
}

fn workload(rule: &WorkloadRule) -> Value {
    json!({
        "name": rule.name,
        "unit": rule.units,
        "container": rule.containers,
        // Not an object: the name of a label may have dots, as inner fields of a difference have.
        "label": rule.labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>(),
        "pod": rule.pods,
        "cgroup": rule.cgroups.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "uid": rule.uids,
        "network": rule.networks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "spiffe_id": rule.spiffe_ids,
    })
}

fn limit(limit: &Limit) -> Value {
    let source = limit.per == Dimension::Source;
    json!({
        "name": limit.name,
        "per": limit.per.name(),
        "rate": limit.rate.as_ref().map(Rate::per_unit),
        "burst": limit.rate.as_ref().map(|rate| rate.burst),
        "streams": limit.streams,
        "ipv4_prefix": source.then_some(limit.ipv4_prefix),
        "ipv6_prefix": source.then_some(limit.ipv6_prefix),
    })
}

fn rate(rate: &Rate) -> Value {
    json!({ "rate": rate.per_unit(), "burst": rate.burst })
}
