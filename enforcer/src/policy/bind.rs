//! The rules of `bind` in a policy file.

use super::error::{Caution, Defect};
use super::fields::{Field, Mapping, Report};
use super::named::Names;
use super::server::{Draft, Placed};
use super::workloads::KnownWorkloads;
use super::{BindRule, BindTo, Issuers, MAX_BIND_RULES, MAX_SERVERS};

const FIELDS: &[&str] = &["servers", "issuer", "subject", "client", "workloads", "claim", "first_use"];
/// What names who may present a token.
const KINDS: [&str; 3] = ["workloads", "claim", "first_use"];
/// Longest subject and client, as in tokens.
const MAX_TEXT_BYTES: usize = 1024;

/// Reads the rules and adds each to the servers that it is for. `None` if any is bad.
pub(super) fn compile(
    report: &mut Report,
    map: &Mapping<'_>,
    issuers: &Issuers,
    workloads: &KnownWorkloads,
    servers: &mut Option<Vec<Draft>>,
) -> Option<()> {
    let Some(field) = map.optional("bind") else { return Some(()) };
    let names = server_names(servers.as_deref());
    let mut good = Some(());
    for entry in field.list(report, MAX_BIND_RULES)? {
        let Some((rule, chosen)) = rule(report, &entry, issuers, workloads, &names) else {
            good = None;
            continue;
        };
        let mut accepted = rule.issuer.is_none();
        for draft in chosen.of(servers) {
            accepted |= rule.issuer.as_ref().is_some_and(|issuer| draft.issuer_names.contains(issuer));
            if let Some(server) = &mut draft.server {
                server.bind.push(rule.clone());
            }
        }
        if !accepted {
            report.warn(entry.at(), entry.path.clone(), Caution::UnusedBinding);
        }
        if rule.to == BindTo::FirstUse {
            report.warn(entry.at(), entry.path, Caution::FirstUse);
        }
    }
    good
}

/// The servers that a rule or a limit is for.
pub(super) struct Chosen(Option<Vec<String>>);

impl Chosen {
    /// `None` if the field `servers` is bad.
    pub(super) fn read(report: &mut Report, map: &Mapping<'_>, names: &Names) -> Option<Self> {
        let listed = |field| names.listed(report, &field, MAX_SERVERS).map(Some);
        map.or_default("servers", None, listed).map(Self)
    }

    pub(super) fn of<'d>(&self, servers: &'d mut Option<Vec<Draft>>) -> impl Iterator<Item = &'d mut Draft> {
        let chosen = |draft: &&mut Draft| match (&self.0, &draft.name) {
            (None, _) => true,
            (Some(names), Some(name)) => names.contains(&name.value),
            (Some(_), None) => false,
        };
        servers.iter_mut().flatten().filter(chosen)
    }
}

/// The names of the servers, those with defects too.
pub(super) fn server_names(servers: Option<&[Draft]>) -> Names {
    let mut names = Names::new("server");
    names.nameless = servers.is_none();
    for draft in servers.unwrap_or_default() {
        match &draft.name {
            // Two of one name are reported where servers are compared.
            Some(name) if !names.has(&name.value) => {
                let Placed { value, at, field } = name;
                names.known.push(Placed { value: value.clone(), at: *at, field: field.clone() });
            }
            Some(_) => {}
            None => names.nameless = true,
        }
    }
    names
}

fn rule(
    report: &mut Report,
    entry: &Field<'_>,
    issuers: &Issuers,
    workloads: &KnownWorkloads,
    servers: &Names,
) -> Option<(BindRule, Chosen)> {
    let map = entry.mapping(report, FIELDS)?;
    let chosen = Chosen::read(report, &map, servers);
    let issuer = map.or_default("issuer", None, |field| {
        let name = field.text(report, MAX_TEXT_BYTES)?;
        if !issuers.by_name.contains_key(name) && !issuers.nameless {
            let mut known: Vec<String> = issuers.by_name.keys().cloned().collect();
            known.sort_unstable();
            field.error(report, Defect::UnknownIssuer { name: name.to_owned(), known });
            return None;
        }
        Some(Some(name.to_owned()))
    });
    let mut text = |name| {
        map.or_default(name, None, |field: Field<'_>| {
            field.text(report, MAX_TEXT_BYTES).map(|text| Some(text.to_owned()))
        })
    };
    let (subject, client_id) = (text("subject"), text("client"));
    let to = to(report, entry, &map, workloads);
    Some((BindRule { issuer: issuer?, subject: subject?, client_id: client_id?, to: to? }, chosen?))
}

fn to(
    report: &mut Report,
    entry: &Field<'_>,
    map: &Mapping<'_>,
    workloads: &KnownWorkloads,
) -> Option<BindTo> {
    let given = KINDS.iter().filter(|kind| map.has(kind)).count();
    if given != 1 {
        entry.error(report, Defect::BindingCount { found: given });
    }
    let mut found = None;
    if let Some(field) = map.optional("workloads") {
        found = workloads.named(report, &field).map(BindTo::Workloads);
    }
    if let Some(field) = map.optional("claim") {
        found = claim(report, &field, workloads);
    }
    if let Some(field) = map.optional("first_use") {
        match field.boolean(report) {
            Some(true) => found = Some(BindTo::FirstUse),
            Some(false) => field.error(report, Defect::FirstUseFalse),
            None => {}
        }
    }
    found.filter(|_| given == 1)
}

fn claim(report: &mut Report, field: &Field<'_>, workloads: &KnownWorkloads) -> Option<BindTo> {
    match field.text(report, MAX_TEXT_BYTES)? {
        "kubernetes_pod" => Some(BindTo::KubernetesPod),
        "spiffe_id" => {
            let rules = workloads.with_spiffe_ids()?;
            if rules.is_empty() {
                field.error(report, Defect::NoSpiffeId);
                return None;
            }
            Some(BindTo::SpiffeId(rules))
        }
        other => {
            field.error(report, Defect::UnknownClaim { name: other.to_owned() });
            None
        }
    }
}
