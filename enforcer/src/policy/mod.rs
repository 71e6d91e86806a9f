//! The policy: what is protected, by whose tokens, for which resource.
//!
//! [`load`] and [`parse`] turn a YAML file, version 1, into a [`Policy`] in which every value has been checked, or into
//! every defect of the file at once, each with its line, column and field. `docs/policy.md` is the file's reference.
//! [`effective`] says in plain words what a policy makes the enforcer check.

mod bind;
mod conflicts;
mod diff;
pub(crate) mod duration;
mod effective;
mod effective_json;
mod error;
mod fields;
mod hosts;
mod issuer;
mod limits;
mod named;
mod node;
mod path;
mod rate;
mod resource;
mod selectors;
mod server;
mod sharing;
mod shield;
#[cfg(test)]
mod tests;
mod types;
mod workloads;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use diff::{Changed, FieldChange, NamedChanges, PolicyDiff};
pub use effective::effective;
pub use effective_json::effective_json;
pub use error::{Caution, Defect, Overlap, PolicyError, PolicyErrors, Warning};
pub use path::{MAX_PATH_BYTES, PathError, check_path, path_contains};
pub use resource::{MAX_RESOURCE_BYTES, ResourceError, canonical_resource};
pub use sharing::METADATA_PREFIX;
pub use shield::parse_prefix;
pub use types::*;

use serde::{Deserialize, Serialize};

use fields::{Field, Mapping, Report};
use node::{At, Value};
use server::{Draft, Placed};
use workloads::KnownWorkloads;

/// Largest accepted policy file, in bytes.
pub const MAX_FILE_BYTES: usize = 1 << 20;
/// [`Policy::daemon_timeout`] where the file does not say.
pub const DEFAULT_DAEMON_TIMEOUT: Duration = Duration::from_secs(5);
/// Shortest [`Policy::daemon_timeout`]: some of the daemon's signs of life, which it gives every half second, may be late.
pub const MIN_DAEMON_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest [`Policy::daemon_timeout`].
pub const MAX_DAEMON_TIMEOUT: Duration = Duration::from_secs(300);
/// Largest `leeway` of an issuer, in seconds: how long after its `exp` a token may be accepted by any policy.
pub const MAX_LEEWAY_SECS: u64 = 300;
/// Most servers in one policy.
pub const MAX_SERVERS: usize = 1024;
/// Most issuers in one policy.
pub const MAX_ISSUERS: usize = 256;
/// Most workloads in one policy.
pub const MAX_WORKLOADS: usize = 1024;
/// Most rules of `bind` in one policy.
pub const MAX_BIND_RULES: usize = 1024;
/// Most limits in one policy.
pub const MAX_LIMITS: usize = 256;
/// [`Policy::unknown`] where the file does not say.
pub const DEFAULT_UNKNOWN: Rate = Rate { interval_ns: 1_000_000, burst: 2_000 };
/// Most defects that are listed one by one; the rest is counted.
pub const MAX_REPORTED_ERRORS: usize = 200;

/// Reads and compiles the policy file at `path`.
///
/// # Errors
/// Everything that [`parse`] finds, and a file that can't be read, is not a regular one, is larger than
/// [`MAX_FILE_BYTES`] or is not UTF-8.
pub fn load(path: &Path) -> Result<(Policy, Vec<Warning>), PolicyErrors> {
    PolicyText::read(path)?.compile()
}

/// The text of a policy file, from which the same policy can be compiled again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyText {
    /// What messages call the file. Its directory is where the file's relative paths begin.
    pub file: String,
    /// What is in it.
    pub text: String,
}

impl PolicyText {
    /// Reads the policy file at `path`.
    ///
    /// # Errors
    /// The file can't be read, is not a regular one, is larger than [`MAX_FILE_BYTES`] or is not UTF-8.
    pub fn read(path: &Path) -> Result<Self, PolicyErrors> {
        let file = path.display().to_string();
        let text = read(path).map_err(|(at, defect)| Report::new(&file).fail(at, "", defect))?;
        Ok(Self { file, text })
    }

    /// Compiles it, and looks whether the files that it names are there.
    ///
    /// # Errors
    /// Every defect found, in file order.
    pub fn compile(&self) -> Result<(Policy, Vec<Warning>), PolicyErrors> {
        compile(&self.file, &self.text, Path::exists)
    }
}

/// Number of the rules by which tokens and heads are judged besides what the policy says. It moves with each check that becomes
/// stricter: what was allowed under another number is not taken over, since the policy alone would seem to allow it still.
pub const RULES: u32 = 1;

/// SHA-256 of all that a policy says, and of the program that judges by it: its version and [`RULES`]. What was decided under one
/// hash holds under no other.
#[must_use]
pub fn hash(policy: &Policy) -> [u8; 32] {
    sha256(&format!("{} {RULES} {policy:?}", env!("CARGO_PKG_VERSION")))
}

/// SHA-256 of all that a policy says, by which a program of another version can tell that it makes the same of a text.
#[must_use]
pub fn compiled_hash(policy: &Policy) -> [u8; 32] {
    // The debug form has every field there is, also those that are added later.
    sha256(&format!("{policy:?}"))
}

fn sha256(text: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, text.as_bytes()).as_ref());
    hash
}

/// Compiles the text of a policy file; `file_name` is what messages call it, and its directory is where the file's
/// relative paths begin. Reads nothing else.
///
/// # Errors
/// Every defect found, in file order.
pub fn parse(file_name: &str, text: &str) -> Result<(Policy, Vec<Warning>), PolicyErrors> {
    compile(file_name, text, |_| true)
}

fn read(path: &Path) -> Result<String, (At, Defect)> {
    let unreadable = |e: std::io::Error| (At::START, Defect::Unreadable { reason: e.to_string() });
    // Asked before opening, because opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err((At::START, Defect::NotRegularFile));
    }
    let mut bytes = Vec::new();
    let limit = MAX_FILE_BYTES as u64 + 1;
    File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)).map_err(unreadable)?;
    if bytes.len() > MAX_FILE_BYTES {
        return Err((At::START, Defect::FileTooLarge { limit: MAX_FILE_BYTES }));
    }
    String::from_utf8(bytes).map_err(|e| {
        let good = e.as_bytes().get(..e.utf8_error().valid_up_to()).unwrap_or_default();
        let before = String::from_utf8_lossy(good);
        let line = before.matches('\n').count() as u64 + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() as u64 + 1;
        (At { line, column }, Defect::NotUtf8)
    })
}

fn compile(
    file_name: &str,
    text: &str,
    file_exists: impl Fn(&Path) -> bool,
) -> Result<(Policy, Vec<Warning>), PolicyErrors> {
    let mut report = Report::new(file_name);
    if text.len() > MAX_FILE_BYTES {
        return Err(report.fail(At::START, "", Defect::FileTooLarge { limit: MAX_FILE_BYTES }));
    }
    let root = match node::parse(text) {
        Ok(root) => root,
        Err((at, defect)) => return Err(report.fail(at, "", defect)),
    };
    let root = Field { node: &root, path: String::new() };
    let directory = Path::new(file_name).parent().unwrap_or_else(|| Path::new(""));
    let policy = compile_root(&mut report, &root, directory, &file_exists);
    let warnings = report.finish()?;
    // No defect was recorded, so nothing is missing; if a reader forgot to record one, the policy is still refused.
    policy.map(|policy| (policy, warnings)).ok_or_else(|| {
        let message = "the policy could not be compiled".to_owned();
        Report::new(file_name).fail(At::START, "", Defect::Yaml { message })
    })
}

const FIELDS: &[&str] = &[
    "version",
    "mode",
    "daemon_timeout",
    "issuers",
    "servers",
    "workloads",
    "bind",
    "limits",
    "unknown_requests",
    "refused_requests",
    "shield",
];

fn compile_root(
    report: &mut Report,
    root: &Field<'_>,
    directory: &Path,
    file_exists: &dyn Fn(&Path) -> bool,
) -> Option<Policy> {
    // The fields of another version mean other things: no more can be said about them.
    if let Some((at, found)) = other_version(root) {
        report.error(at, "version", Defect::Version { found });
        return None;
    }
    let map = root.mapping(report, FIELDS)?;
    let version = map.required(report, "version").and_then(|field| field.integer(report));
    let mode = compile_mode(report, &map);
    let daemon_timeout = map.or_default("daemon_timeout", DEFAULT_DAEMON_TIMEOUT, |field| {
        field.duration(report, MIN_DAEMON_TIMEOUT, MAX_DAEMON_TIMEOUT)
    });
    let issuers = compile_issuers(report, &map, directory, file_exists);
    let workloads = KnownWorkloads::compile(report, &map);
    let mut drafts = compile_servers(report, &map, &issuers, &workloads);
    let bind = bind::compile(report, &map, &issuers, &workloads, &mut drafts);
    let limits = limits::compile(report, &map, &mut drafts);
    let unknown = map.or_default("unknown_requests", DEFAULT_UNKNOWN, |f| rate::rate_field(report, &f));
    let refused = map.or_default("refused_requests", None, |f| rate::rate_field(report, &f).map(Some));
    let shield = map.or_default("shield", None, |field| shield::compile(report, &field).map(Some));
    version?;
    bind?;
    let drafts = drafts?;
    let policy = Policy {
        mode: mode?,
        daemon_timeout: daemon_timeout?,
        issuers: issuers.in_order?,
        servers: drafts.into_iter().map(|draft| draft.server.map(Arc::new)).collect::<Option<_>>()?,
        workloads: workloads.in_order()?,
        limits: limits?,
        unknown: unknown?,
        refused: refused?,
        shield: shield?,
    };
    workloads.warn_unused(report, &policy);
    Some(policy)
}

/// The `version` if it is a number other than 1.
fn other_version(root: &Field<'_>) -> Option<(At, u64)> {
    let Value::Map(entries) = &root.node.value else { return None };
    entries.iter().find_map(|(key, value)| match (&key.value, &value.value) {
        (Value::Text(name), Value::Integer(found)) if name == "version" && *found != 1 => {
            Some((value.at, *found))
        }
        _ => None,
    })
}

fn compile_mode(report: &mut Report, map: &Mapping<'_>) -> Option<Mode> {
    let Some(field) = map.optional("mode") else { return Some(Mode::Enforce) };
    match field.text(report, 64)? {
        "enforce" => Some(Mode::Enforce),
        "observe" => {
            report.warn(field.at(), field.path, Caution::Observe);
            Some(Mode::Observe)
        }
        other => {
            field.error(report, Defect::Mode { found: other.to_owned() });
            None
        }
    }
}

/// The issuers of a file, also the bad ones: a server that names one of those is not to blame.
struct Issuers {
    /// `None` behind a name whose issuer has defects.
    by_name: HashMap<String, Option<Arc<Issuer>>>,
    /// `None` if the list or any issuer has defects.
    in_order: Option<Vec<Arc<Issuer>>>,
    /// An issuer's name could not be read, so a name that looks unknown may be its.
    nameless: bool,
    /// The names, in file order.
    names: Vec<Placed<String>>,
}

fn compile_issuers(
    report: &mut Report,
    map: &Mapping<'_>,
    directory: &Path,
    file_exists: &dyn Fn(&Path) -> bool,
) -> Issuers {
    let mut issuers = Issuers { by_name: HashMap::new(), in_order: None, nameless: false, names: Vec::new() };
    let Some(field) = map.required(report, "issuers") else {
        issuers.nameless = true;
        return issuers;
    };
    let Some(entries) = field.list(report, MAX_ISSUERS) else {
        issuers.nameless = true;
        return issuers;
    };
    if entries.is_empty() {
        field.error(report, Defect::EmptyList);
    }
    let mut identifiers: HashMap<String, u64> = HashMap::new();
    let mut in_order = Some(Vec::new());
    for entry in entries {
        let draft = issuer::compile(report, &entry, directory, file_exists);
        if let Some((identifier, at)) = draft.identifier {
            if let Some(&first_line) = identifiers.get(&identifier) {
                let path = format!("{}.issuer", entry.path);
                report.error(at, path, Defect::DuplicateIssuerIdentifier { issuer: identifier, first_line });
            } else {
                identifiers.insert(identifier, at.line);
            }
        }
        let built = draft.issuer.map(Arc::new);
        match draft.name {
            Some(name) => {
                if let Some(first) = issuers.names.iter().find(|n| n.value == name.value) {
                    let defect = Defect::DuplicateIssuerName { first_line: first.at.line, name: name.value };
                    report.error(name.at, name.field, defect);
                } else {
                    issuers.by_name.insert(name.value.clone(), built.clone());
                    issuers.names.push(name);
                }
            }
            None => issuers.nameless = true,
        }
        match (built, &mut in_order) {
            (Some(issuer), Some(list)) => list.push(issuer),
            _ => in_order = None,
        }
    }
    issuers.in_order = in_order;
    issuers
}

/// The servers as far as they could be read. `None` if there is no list of them.
fn compile_servers(
    report: &mut Report,
    map: &Mapping<'_>,
    issuers: &Issuers,
    workloads: &KnownWorkloads,
) -> Option<Vec<Draft>> {
    let field = map.required(report, "servers")?;
    let entries = field.list(report, MAX_SERVERS)?;
    if entries.is_empty() {
        field.error(report, Defect::NoServers);
    }
    let drafts: Vec<_> =
        entries.iter().map(|entry| server::compile(report, entry, issuers, workloads)).collect();
    conflicts::check(report, &drafts);
    let used: HashSet<&String> = drafts.iter().flat_map(|draft| &draft.issuer_names).collect();
    for name in issuers.names.iter().filter(|name| !used.contains(&name.value)) {
        report.warn(name.at, name.field.clone(), Caution::UnusedIssuer);
    }
    Some(drafts)
}
