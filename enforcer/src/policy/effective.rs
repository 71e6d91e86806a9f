//! The effective policy in plain words: every check, also those that no file can turn off.

use std::fmt::{self, Write};
use std::net::IpAddr;
use std::sync::Arc;

use super::sharing::METADATA_PREFIX;
use super::{
    BindRule, BindTo, Dimension, Issuer, KeySource, Limit, Listen, Mode, Policy, Server, WorkloadRule,
    duration, shield,
};

/// What `policy` makes the enforcer check, for each server, in plain words. Stable for equal policies.
pub fn effective(policy: &Policy) -> String {
    let mut out = Text::default();
    let (servers, issuers) = (policy.servers.len(), policy.issuers.len());
    out.line(&format!(
        "policy version 1: {servers} server{}, {issuers} issuer{}",
        plural(servers),
        plural(issuers)
    ));
    out.line(match policy.mode {
        Mode::Enforce => {
            "mode enforce: the enforcer answers what is refused below; the server reads none of it"
        }
        Mode::Observe => {
            "mode OBSERVE: NOTHING IS REFUSED; what would be refused below passes, is counted and logged"
        }
    });
    for (id, server) in policy.servers.iter().enumerate() {
        out.line("");
        describe_server(&mut out, policy, id, server);
    }
    for workload in &policy.workloads {
        out.line("");
        describe_workload(&mut out, workload);
    }
    out.line("");
    describe_rest(&mut out, policy);
    out.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn line(&mut self, text: &str) {
        self.0.push_str(text);
        self.0.push('\n');
    }

    /// A label and what belongs to it, one item a line.
    fn item<S: AsRef<str>>(&mut self, label: &str, items: impl IntoIterator<Item = S>) {
        let mut label = label;
        for item in items {
            // Writing to a string can't fail.
            let _ = writeln!(self.0, "  {label:<16}{}", item.as_ref());
            label = "";
        }
    }
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

fn describe_server(out: &mut Text, policy: &Policy, id: usize, server: &Server) {
    out.line(&format!("server {id} \"{}\"", server.name));
    out.item("endpoints", server.listen.iter().map(|l| format!("{l} ({})", families(l))));
    let sharing = policy.sharing(server);
    out.item("shared with", sharing.iter().map(|s| format!("server \"{}\" (path {})", s.name, s.path)));
    out.item("path", [path_rule(server, sharing.is_empty())]);
    if server.public_paths.is_empty() {
        out.item("public paths", ["none"]);
    } else {
        let rule = |p: &String| {
            format!("{p} (exactly, without a query; any method, no token; Host and Origin as below)")
        };
        out.item("public paths", server.public_paths.iter().map(rule));
    }
    out.item("Host", [format!("one of: {}", server.hosts.join(", "))]);
    out.item("", ["any other Host: 403"]);
    if server.origins.is_empty() {
        out.item("Origin", ["none accepted: a request with an Origin header: 403"]);
    } else {
        out.item("Origin", [format!("absent, or one of: {}; any other: 403", server.origins.join(", "))]);
    }
    if let Some(callers) = &server.callers {
        out.item("callers", [format!("one of: {}; any other: 403, whatever is asked for", names(callers))]);
    }
    out.item(
        "token",
        [
            "in every request, in one `Authorization: Bearer` header; none: 401",
            "in the query string, two headers or bad syntax: 400",
            "bound to a key (`cnf`): 401, since the proof can't be checked",
        ],
    );
    out.item("audience", ["`aud` must hold one of these, compared after canonicalization; never a prefix:"]);
    for audience in std::iter::once(&server.resource).chain(&server.aliases) {
        let others = other_holders(policy, server, audience);
        let note = if others.is_empty() {
            String::new()
        } else {
            format!(" (also accepted by: {})", others.join(", "))
        };
        out.item("", [format!("  {audience}{note}")]);
    }
    for issuer in &server.issuers {
        describe_issuer(out, issuer);
    }
    if server.scopes.is_empty() {
        out.item("scopes", ["none needed: the scopes of a token are not looked at"]);
    } else {
        out.item("scopes", [format!("all of: {}; one missing: 403", server.scopes.join(" "))]);
    }
    describe_binding(out, server);
    out.item("limits", server.limits.iter().map(|l| limit(l)));
    describe_metadata(out, policy, server);
}

fn names(workloads: &[Arc<WorkloadRule>]) -> String {
    workloads.iter().map(|w| w.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn describe_binding(out: &mut Text, server: &Server) {
    if server.bind.is_empty() {
        out.item("binding", ["none: a token is good from any caller"]);
        return;
    }
    out.item("binding", ["every rule that is about a token must hold; an unknown caller fails; else 401:"]);
    out.item("", server.bind.iter().map(|rule| format!("  {rule}")));
}

/// Which tokens, and from where they are good.
impl fmt::Display for BindRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [("issuer", &self.issuer), ("subject", &self.subject), ("client", &self.client_id)];
        let about: Vec<_> =
            parts.iter().filter_map(|(what, value)| Some(format!("{what} {:?}", value.as_ref()?))).collect();
        f.write_str(if about.is_empty() { "every token" } else { "" })?;
        write!(f, "{}: only from ", about.join(", "))?;
        match &self.to {
            BindTo::Workloads(workloads) => write!(f, "{}", names(workloads)),
            BindTo::KubernetesPod => f.write_str("the pod that the token names (kubernetes.io.pod.uid)"),
            BindTo::SpiffeId(workloads) => {
                write!(f, "the workload with its `sub` as SPIFFE id, of {}", names(workloads))
            }
            BindTo::FirstUse => f.write_str("the workload that presents the first token of its principal"),
        }
    }
}

fn limit(limit: &Limit) -> String {
    let mut parts = Vec::new();
    parts.extend(limit.rate.map(|rate| rate.to_string()));
    parts.extend(limit.streams.map(|streams| format!("{streams} open streams")));
    let prefixes = match limit.per {
        Dimension::Source => format!(" (IPv4 /{}, IPv6 /{})", limit.ipv4_prefix, limit.ipv6_prefix),
        _ => String::new(),
    };
    format!("{}, per {}{prefixes}: {}; beyond: 429", limit.name, limit.per.name(), parts.join(", "))
}

fn describe_workload(out: &mut Text, rule: &WorkloadRule) {
    out.line(&format!("workload \"{}\": all of", rule.name));
    let shown = |values: &[String]| values.join(" or ");
    let texts = |values: Vec<String>| shown(&values);
    for (label, value) in [
        ("unit", shown(&rule.units)),
        ("container", shown(&rule.containers)),
        ("label", rule.labels.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(" and ")),
        ("pod", shown(&rule.pods)),
        ("cgroup", texts(rule.cgroups.iter().map(ToString::to_string).collect())),
        ("uid", texts(rule.uids.iter().map(ToString::to_string).collect())),
        ("network", texts(rule.networks.iter().map(ToString::to_string).collect())),
    ] {
        out.item(label, (!value.is_empty()).then_some(value));
    }
    out.item(
        "SPIFFE id",
        rule.spiffe_ids.iter().map(|id| format!("{id} (what it is called, not a condition)")),
    );
}

fn families(listen: &Listen) -> &'static str {
    match listen.addr {
        IpAddr::V6(ip) if ip.is_unspecified() => "every IPv6 and every IPv4 address of this host",
        IpAddr::V4(ip) if ip.is_unspecified() => "every IPv4 address of this host",
        IpAddr::V6(ip) if ip.is_loopback() => "IPv6 loopback",
        IpAddr::V4(ip) if ip.is_loopback() => "IPv4 loopback",
        IpAddr::V6(_) => "IPv6",
        IpAddr::V4(_) => "IPv4, also as IPv4-mapped IPv6",
    }
}

fn path_rule(server: &Server, alone: bool) -> String {
    let rest = if alone { "" } else { " and is no shared server's" };
    if server.path == "/" {
        return "every path that is not listed as public below needs a token".to_owned();
    }
    format!(
        "{0} and everything under {0}/ need a token, with or without a query; a path that is neither this nor public{rest}: refused",
        server.path
    )
}

/// The names of other servers that accept tokens for `audience`.
fn other_holders(policy: &Policy, server: &Server, audience: &String) -> Vec<String> {
    let holds = |s: &Server| s.resource == *audience || s.aliases.contains(audience);
    let others = policy.servers.iter().filter(|s| s.name != server.name && holds(s));
    others.map(|s| format!("\"{}\"", s.name)).collect()
}

fn describe_issuer(out: &mut Text, issuer: &Issuer) {
    let names: Vec<_> = issuer.algorithms.iter().map(|a| a.name()).collect();
    out.item("issuer", [format!("\"{}\": `iss` is exactly {}", issuer.name, issuer.issuer)]);
    out.item(
        "",
        [
            format!("  signature: {}; no other algorithm", names.join(", ")),
            format!("  keys: {}", key_source(issuer)),
            format!(
                "  keys are refreshed after {}; not refreshed for {}: no token of this issuer is accepted",
                duration::format(issuer.refresh_interval),
                duration::format(issuer.max_staleness)
            ),
            format!("  `typ`: {}; no other type, and none missing", issuer.token_types.join(", ")),
            format!(
                "  time: `exp` needed, `nbf` and `iat` honoured, {} of tolerance; `iat` needed, `exp` at most {} after it",
                duration::format(issuer.leeway),
                duration::format(issuer.max_token_lifetime)
            ),
        ],
    );
}

fn key_source(issuer: &Issuer) -> String {
    let roots = match &issuer.ca_file {
        Some(file) => format!("certificates checked against {}", file.display()),
        None => "certificates checked against the system's roots".to_owned(),
    };
    let http = if issuer.allow_http_loopback {
        "; plain http to loopback addresses allowed"
    } else {
        "; https only"
    };
    match &issuer.keys {
        KeySource::File(path) => format!("the file {}, read again when it changes", path.display()),
        KeySource::Url(url) => format!("{url} ({roots}{http})"),
        KeySource::Discovery => {
            format!("the URL in the metadata of {} (RFC 8414, OpenID Connect; {roots}{http})", issuer.issuer)
        }
    }
}

fn describe_metadata(out: &mut Text, policy: &Policy, server: &Server) {
    let path = server.metadata_path();
    let mut paths = vec![path.clone()];
    if policy.root_metadata(server) && path != METADATA_PREFIX {
        paths.push(METADATA_PREFIX.to_owned());
    }
    let paths = paths.join(" and ");
    if !server.metadata.serve {
        out.item(
            "metadata",
            [format!("{paths}: passes to the server without a token, which answers itself")],
        );
        return;
    }
    let issuers: Vec<_> = server.issuers.iter().map(|i| i.issuer.as_str()).collect();
    let scopes = match server.metadata.scopes_supported.as_slice() {
        [] => "not given".to_owned(),
        scopes => scopes.join(" "),
    };
    let name = server.metadata.resource_name.as_deref().unwrap_or("not given");
    out.item(
        "metadata",
        [
            format!("{paths}: answered by the enforcer without a token (RFC 9728)"),
            format!("resource: {}", server.resource),
            format!("authorization_servers: {}", issuers.join(" ")),
            format!("scopes_supported: {scopes}"),
            format!("resource_name: {name}"),
        ],
    );
}

fn describe_rest(out: &mut Text, policy: &Policy) {
    if let Some(shield) = &policy.shield {
        out.line("shield: packets for these endpoints, by source (an IPv4 address, the first 64 bits of an IPv6 one)");
        for (label, text) in shield::describe(shield) {
            out.item(label, [text]);
        }
        out.line("");
    }
    out.line("everything else on these endpoints");
    out.item(
        "not HTTP/1.1",
        ["HTTP/2, upgrades, unknown transfer encodings, malformed or oversized heads: refused"],
    );
    out.item("errors", ["a limit reached or a failure inside the enforcer never lets a request pass"]);
    out.item(
        "no daemon",
        [format!(
            "{} without a sign of life: what the kernel does not know gets 503; what it knows goes on until its token's grant ends",
            duration::format(policy.daemon_timeout)
        )],
    );
    out.item(
        "unknown",
        [format!("requests that the kernel does not know, per source: {}; beyond: 429", policy.unknown)],
    );
    out.item(
        "refused",
        policy.refused.map(|rate| format!("and public requests, per source: {rate}; beyond: 429")),
    );
    if policy.mode == Mode::Observe {
        out.item("observe", ["refusals above are only counted and logged, see the mode"]);
    }
    out.line("other endpoints of this host are not looked at");
}
