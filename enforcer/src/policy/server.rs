//! The `servers` of a policy file.

use std::net::{IpAddr, SocketAddr};

use super::error::{Caution, Defect, LISTEN};
use super::fields::{Field, Mapping, Report};
use super::hosts;
use super::node::At;
use super::path::{PathError, check_path, path_contains};
use super::resource::{MAX_RESOURCE_BYTES, ResourceParts, canonical_resource, parse_resource};
use super::sharing::METADATA_PREFIX;
use super::workloads::KnownWorkloads;
use super::{Issuers, Listen, MAX_PATH_BYTES, Metadata, Server};

const FIELDS: &[&str] = &[
    "name",
    "listen",
    "resource",
    "aliases",
    "path",
    "public_paths",
    "issuers",
    "scopes",
    "metadata",
    "hosts",
    "origins",
    "callers",
];

/// Most endpoints, aliases, public paths and scopes for one server.
const MAX_ENTRIES: usize = 64;
/// Most hosts and origins for one server.
const MAX_HOSTS: usize = 256;
/// Longest scope, in bytes.
const MAX_SCOPE_BYTES: usize = 256;
/// Longest host or origin, in bytes: a DNS name (253) with scheme and port.
const MAX_ORIGIN_BYTES: usize = 320;

/// A value with its place.
pub(super) struct Placed<T> {
    pub(super) value: T,
    pub(super) at: At,
    pub(super) field: String,
}

/// A server as far as it could be read, for the checks that compare servers.
pub(super) struct Draft {
    pub(super) name: Option<Placed<String>>,
    pub(super) listen: Vec<Placed<Listen>>,
    pub(super) path: Option<Placed<String>>,
    pub(super) public_paths: Vec<Placed<String>>,
    /// Canonical.
    pub(super) resource: Option<Placed<String>>,
    pub(super) issuer_names: Vec<String>,
    pub(super) server: Option<Server>,
}

/// The `name` of a server or issuer.
pub(super) fn name(report: &mut Report, map: &Mapping<'_>) -> Option<Placed<String>> {
    let field = map.required(report, "name")?;
    let text = field.text(report, 1024)?;
    let good = text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if !good {
        field.error(report, Defect::Name { value: text.to_owned() });
        return None;
    }
    Some(Placed { value: text.to_owned(), at: field.at(), field: field.path })
}

pub(super) fn compile(
    report: &mut Report,
    entry: &Field<'_>,
    known: &Issuers,
    workloads: &KnownWorkloads,
) -> Draft {
    let mut draft = Draft {
        name: None,
        listen: Vec::new(),
        path: None,
        public_paths: Vec::new(),
        resource: None,
        issuer_names: Vec::new(),
        server: None,
    };
    let Some(map) = entry.mapping(report, FIELDS) else { return draft };
    draft.name = name(report, &map);
    let listen_good = listen(report, &map, &mut draft.listen);
    let resource = map.required(report, "resource").and_then(|field| resource(report, &field));
    let aliases = map.or_default("aliases", Vec::new(), |field| {
        let own = draft_resource(resource.as_ref());
        let own_line = map.optional("resource").map_or(0, |f| f.at().line);
        field.texts(report, MAX_ENTRIES, MAX_RESOURCE_BYTES, |_, text| {
            let canonical = canonical_resource(text).map_err(Defect::Resource)?;
            if Some(&canonical) == own.as_ref() {
                return Err(Defect::DuplicateValue { value: canonical, first_line: own_line });
            }
            Ok(canonical)
        })
    });
    draft.path = path(report, &map, resource.as_ref());
    let public_good = public_paths(report, &map, &mut draft);
    let issuers = issuers(report, &map, known, &mut draft.issuer_names);
    let scopes = map.or_default("scopes", Vec::new(), |field| scopes(report, &field));
    let metadata = metadata(report, &map, scopes.as_deref().unwrap_or_default());
    let hosts = match map.optional("hosts") {
        Some(field) => {
            field.texts(report, MAX_HOSTS, MAX_ORIGIN_BYTES, |_, t| hosts::host(t)).and_then(|hosts| {
                if hosts.is_empty() {
                    field.error(report, Defect::EmptyList);
                    return None;
                }
                Some(hosts)
            })
        }
        None => Some(default_hosts(resource.as_ref(), aliases.as_deref().unwrap_or_default(), &draft.listen)),
    };
    let origins = map.or_default("origins", Vec::new(), |field| {
        field.texts(report, MAX_HOSTS, MAX_ORIGIN_BYTES, |_, text| hosts::origin(text))
    });
    let callers = map.or_default("callers", None, |field| workloads.named(report, &field).map(Some));
    warn(report, &draft, resource.as_ref());

    draft.server = (|| {
        (listen_good && public_good).then_some(())?;
        Some(Server {
            name: draft.name.as_ref()?.value.clone(),
            listen: draft.listen.iter().map(|l| l.value).collect(),
            resource: resource.as_ref()?.canonical.value.clone(),
            aliases: aliases?,
            path: draft.path.as_ref()?.value.clone(),
            public_paths: draft.public_paths.iter().map(|p| p.value.clone()).collect(),
            issuers: issuers?,
            scopes: scopes?,
            metadata: metadata?,
            hosts: hosts?,
            origins: origins?,
            callers: callers?,
            // Added when those lists are read, which name servers.
            bind: Vec::new(),
            limits: Vec::new(),
        })
    })();
    draft.resource = resource.map(|r| r.canonical);
    draft
}

struct Resource {
    canonical: Placed<String>,
    parts: ResourceParts,
}

fn draft_resource(resource: Option<&Resource>) -> Option<String> {
    resource.map(|r| r.canonical.value.clone())
}

fn resource(report: &mut Report, field: &Field<'_>) -> Option<Resource> {
    let text = field.text(report, MAX_RESOURCE_BYTES)?;
    let both = parse_resource(text).and_then(|parts| Ok((canonical_resource(text)?, parts)));
    match both {
        Ok((value, parts)) => {
            Some(Resource { canonical: Placed { value, at: field.at(), field: field.path.clone() }, parts })
        }
        Err(error) => {
            field.error(report, Defect::Resource(error));
            None
        }
    }
}

/// Reads the endpoints into `out`; false if any is bad.
fn listen(report: &mut Report, map: &Mapping<'_>, out: &mut Vec<Placed<Listen>>) -> bool {
    let Some(field) = map.required(report, "listen") else { return false };
    let Some(entries) = field.list(report, MAX_ENTRIES) else { return false };
    if entries.is_empty() {
        field.error(report, Defect::EmptyList);
        return false;
    }
    let mut good = true;
    for entry in entries {
        let Some(text) = entry.text_as(report, 128, LISTEN) else {
            good = false;
            continue;
        };
        match endpoint(text) {
            Ok(value) => match out.iter().find(|l| l.value == value) {
                Some(first) => {
                    let first_line = first.at.line;
                    entry.error(report, Defect::DuplicateValue { value: value.to_string(), first_line });
                    good = false;
                }
                None => out.push(Placed { value, at: entry.at(), field: entry.path }),
            },
            Err(defect) => {
                entry.error(report, defect);
                good = false;
            }
        }
    }
    good
}

fn endpoint(text: &str) -> Result<Listen, Defect> {
    let address: SocketAddr = text.parse().map_err(|_| match text.contains('%') {
        true => Defect::ScopeId,
        false => Defect::Listen { value: text.to_owned() },
    })?;
    if matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0 || text.contains('%')) {
        return Err(Defect::ScopeId);
    }
    if address.port() == 0 {
        return Err(Defect::PortZero);
    }
    // The kernel shows a v4 connection to a v6 socket under its v4-mapped address: one form for both.
    let addr = address.ip().to_canonical();
    if addr.is_multicast() || addr == IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
        return Err(Defect::NotListenable { addr: addr.to_string() });
    }
    Ok(Listen { addr, port: address.port() })
}

/// The endpoint's path; without one, the resource URI's, whose last slash is left out.
fn path(report: &mut Report, map: &Mapping<'_>, resource: Option<&Resource>) -> Option<Placed<String>> {
    if let Some(field) = map.optional("path") {
        let text = field.text(report, MAX_PATH_BYTES)?;
        if text != "/" && text.ends_with('/') && check_path(text).is_ok() {
            field.error(report, Defect::TrailingSlash);
            return None;
        }
        return protected_path(report, text, field.at(), field.path, Defect::Path);
    }
    let resource = resource?;
    let place = &resource.canonical;
    let uri_path = resource.parts.path.as_str();
    let text = match uri_path.strip_suffix('/').unwrap_or(uri_path) {
        "" => "/",
        path => path,
    };
    protected_path(report, text, place.at, place.field.clone(), Defect::DefaultPath)
}

fn protected_path(
    report: &mut Report,
    text: &str,
    at: At,
    field: String,
    defect: fn(PathError) -> Defect,
) -> Option<Placed<String>> {
    let checked =
        check_path(text).map_err(defect).and_then(|()| match path_contains(METADATA_PREFIX, text) {
            true => Err(Defect::MetadataPath),
            false => Ok(()),
        });
    match checked {
        Ok(()) => Some(Placed { value: text.to_owned(), at, field }),
        Err(defect) => {
            report.error(at, field, defect);
            None
        }
    }
}

/// Reads the public paths into the draft; false if any is bad.
fn public_paths(report: &mut Report, map: &Mapping<'_>, draft: &mut Draft) -> bool {
    let Some(field) = map.optional("public_paths") else { return true };
    let own = draft.path.as_ref().map(|p| p.value.clone());
    let out = &mut draft.public_paths;
    let texts = field.texts(report, MAX_ENTRIES, MAX_PATH_BYTES, |entry, text| {
        check_path(text).map_err(Defect::Path)?;
        if path_contains(METADATA_PREFIX, text) {
            return Err(Defect::MetadataPath);
        }
        // With a trailing slash it is still the protected path for most servers.
        let bare = if text == "/" { text } else { text.trim_end_matches('/') };
        if own.as_deref() == Some(bare) {
            return Err(Defect::PublicPathIsProtected);
        }
        out.push(Placed { value: text.to_owned(), at: entry.at(), field: entry.path.clone() });
        Ok(text.to_owned())
    });
    texts.is_some()
}

fn issuers(
    report: &mut Report,
    map: &Mapping<'_>,
    known: &Issuers,
    names: &mut Vec<String>,
) -> Option<Vec<std::sync::Arc<super::Issuer>>> {
    let field = map.required(report, "issuers")?;
    let listed = field.texts(report, super::MAX_ISSUERS, 1024, |_, name| {
        // While some issuer's name can't be read, this one may be meant.
        if known.by_name.contains_key(name) || known.nameless {
            return Ok(name.to_owned());
        }
        let mut known: Vec<String> = known.by_name.keys().cloned().collect();
        known.sort_unstable();
        Err(Defect::UnknownIssuer { name: name.to_owned(), known })
    });
    let listed = listed?;
    if listed.is_empty() {
        field.error(report, Defect::EmptyList);
    }
    names.clone_from(&listed);
    listed.iter().map(|name| known.by_name.get(name).cloned().flatten()).collect()
}

fn scopes(report: &mut Report, field: &Field<'_>) -> Option<Vec<String>> {
    field.texts(report, MAX_ENTRIES, MAX_SCOPE_BYTES, |_, text| {
        let token_char = |b: u8| matches!(b, 0x21 | 0x23..=0x5b | 0x5d..=0x7e);
        if !text.bytes().all(token_char) {
            return Err(Defect::Scope { value: text.to_owned() });
        }
        if text == "offline_access" {
            return Err(Defect::OfflineAccess);
        }
        Ok(text.to_owned())
    })
}

fn metadata(report: &mut Report, map: &Mapping<'_>, required_scopes: &[String]) -> Option<Metadata> {
    let silent = Metadata { serve: true, resource_name: None, scopes_supported: required_scopes.to_vec() };
    let Some(field) = map.optional("metadata") else { return Some(silent) };
    let map = field.mapping(report, &["serve", "resource_name", "scopes_supported"])?;
    let serve = map.or_default("serve", true, |f| f.boolean(report));
    let resource_name =
        map.or_default("resource_name", None, |f| f.text(report, 256).map(|t| Some(t.to_owned())));
    let scopes_supported =
        map.or_default("scopes_supported", required_scopes.to_vec(), |f| scopes(report, &f));
    Some(Metadata { serve: serve?, resource_name: resource_name?, scopes_supported: scopes_supported? })
}

fn default_hosts(resource: Option<&Resource>, aliases: &[String], listen: &[Placed<Listen>]) -> Vec<String> {
    let mut resources: Vec<ResourceParts> = resource.map(|r| r.parts.clone()).into_iter().collect();
    resources.extend(aliases.iter().filter_map(|alias| parse_resource(alias).ok()));
    let listen: Vec<Listen> = listen.iter().map(|l| l.value).collect();
    hosts::default_hosts(&resources, &listen)
}

fn warn(report: &mut Report, draft: &Draft, resource: Option<&Resource>) {
    if let Some(endpoint) = draft.listen.iter().find(|l| l.value.addr.is_unspecified()) {
        let caution = Caution::WildcardListen { endpoint: endpoint.value.to_string() };
        report.warn(endpoint.at, endpoint.field.clone(), caution);
    }
    let Some(Resource { canonical, parts }) = resource else { return };
    let uri = canonical.value.clone();
    if !parts.https && !parts.host_is_loopback() {
        report.warn(canonical.at, canonical.field.clone(), Caution::PlainHttpResource { resource: uri });
    } else if parts.https
        && let Some(endpoint) =
            draft.listen.iter().find(|l| l.value.port == parts.port && !l.value.addr.is_loopback())
    {
        report.warn(endpoint.at, endpoint.field.clone(), Caution::TlsOnListener { resource: uri });
    }
}
