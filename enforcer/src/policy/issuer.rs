//! The `issuers` of a policy file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use url::{Host, Url};

use super::error::{Caution, Defect};
use super::fields::{Field, Mapping, Report};
use super::node::At;
use super::server::{self, Placed};
use super::{Algorithm, Issuer, KeySource, MAX_LEEWAY_SECS};

const FIELDS: &[&str] = &[
    "name",
    "issuer",
    "keys",
    "ca_file",
    "allow_http_loopback",
    "algorithms",
    "leeway",
    "max_token_lifetime",
    "token_types",
    "refresh_interval",
    "max_staleness",
];

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const MAX_LEEWAY: Duration = Duration::from_secs(MAX_LEEWAY_SECS);

/// Most token types for one issuer.
const MAX_TOKEN_TYPES: usize = 16;
/// Longest URL, in bytes.
const MAX_URL_BYTES: usize = 2048;

/// JOSE types of tokens that a client never presents as an access token. Accepting one as such would let a token
/// made for another purpose open a server (RFC 8725, section 3.12).
const NOT_ACCESS_TOKENS: &[&str] = &[
    "dpop+jwt",
    "logout+jwt",
    "oauth-authz-req+jwt",
    "oauth-id-jag+jwt",
    "secevent+jwt",
    "token-introspection+jwt",
    "client-authentication+jwt",
    "rt+jwt",
];

/// An issuer as far as it could be read.
pub(super) struct Draft {
    pub(super) name: Option<Placed<String>>,
    pub(super) identifier: Option<(String, At)>,
    pub(super) issuer: Option<Issuer>,
}

pub(super) fn compile(
    report: &mut Report,
    entry: &Field<'_>,
    directory: &Path,
    file_exists: &dyn Fn(&Path) -> bool,
) -> Draft {
    let Some(map) = entry.mapping(report, FIELDS) else {
        return Draft { name: None, identifier: None, issuer: None };
    };
    let name = server::name(report, &map);
    let allow_http_loopback = map.or_default("allow_http_loopback", false, |f| f.boolean(report));
    let identifier = map.required(report, "issuer").and_then(|field| {
        let text = field.text(report, MAX_URL_BYTES)?.to_owned();
        Some((text, field.at(), check_identifier(report, &field)))
    });
    let keys = keys(report, &map, directory, file_exists, allow_http_loopback);
    if let (Some(KeySource::Discovery), Some((_, at, Some(url)))) = (&keys, &identifier) {
        let path = format!("{}.issuer", entry.path);
        check_transport(report, *at, &path, url, allow_http_loopback);
    } else if let Some((_, at, Some(url))) = &identifier
        && url.scheme() == "http"
        && !is_loopback(url)
    {
        report.warn(*at, format!("{}.issuer", entry.path), Caution::PlainHttpIssuer);
    }
    let ca_file = match map.optional("ca_file") {
        None => Some(None),
        Some(field) => file(report, &field, directory, file_exists).map(Some),
    };
    let algorithms = algorithms(report, &map);
    let leeway = duration(report, &map, "leeway", 30 * SECOND, (Duration::ZERO, MAX_LEEWAY));
    let max_token_lifetime = duration(report, &map, "max_token_lifetime", DAY, (SECOND, 90 * DAY));
    let token_types = token_types(report, &map);
    let refresh_interval = duration(report, &map, "refresh_interval", 5 * MINUTE, (10 * SECOND, DAY));
    let max_staleness = duration(report, &map, "max_staleness", HOUR, (10 * SECOND, 7 * DAY));
    let fresh = check_staleness(report, &map, refresh_interval, max_staleness);

    let issuer = (|| {
        let (identifier, _, url) = identifier.as_ref()?;
        url.as_ref()?;
        fresh.then_some(Issuer {
            name: name.as_ref()?.value.clone(),
            issuer: identifier.clone(),
            keys: keys?,
            ca_file: ca_file?,
            allow_http_loopback: allow_http_loopback?,
            algorithms: algorithms?,
            leeway: leeway?,
            max_token_lifetime: max_token_lifetime?,
            token_types: token_types?,
            refresh_interval: refresh_interval?,
            max_staleness: max_staleness?,
        })
    })();
    Draft { name, identifier: identifier.map(|(text, at, _)| (text, at)), issuer }
}

/// An issuer identifier is an absolute URL without query and fragment (RFC 8414, section 2).
fn check_identifier(report: &mut Report, field: &Field<'_>) -> Option<Url> {
    let url = absolute_url(report, field)?;
    if url.query().is_some() {
        field.error(report, Defect::IssuerQuery);
        return None;
    }
    Some(url)
}

/// An absolute http or https URL without credentials and fragment.
fn absolute_url(report: &mut Report, field: &Field<'_>) -> Option<Url> {
    let text = field.text(report, MAX_URL_BYTES)?;
    let bad = |reason: &str| Defect::Url { value: text.to_owned(), reason: reason.to_owned() };
    // The URL parser mends these silently, and two readers of one text would then see two URLs.
    if !text.is_ascii() || text.contains([' ', '\\', '"', '<', '>', '^', '`', '{', '|', '}']) {
        field.error(report, bad("it holds characters that no URL may hold"));
        return None;
    }
    let lower = text.to_ascii_lowercase();
    if !lower.starts_with("https://") && !lower.starts_with("http://") {
        field.error(report, bad("it begins with neither `https://` nor `http://`"));
        return None;
    }
    let url = match Url::parse(text) {
        Ok(url) => url,
        Err(error) => {
            field.error(report, bad(&error.to_string()));
            return None;
        }
    };
    let defect = if text.split('/').nth(2).unwrap_or_default().contains('@') {
        Defect::UrlUserInfo
    } else if url.fragment().is_some() {
        Defect::UrlFragment
    } else if url.port() == Some(0) {
        Defect::PortZero
    } else {
        return Some(url);
    };
    field.error(report, defect);
    None
}

/// Keys may be fetched over plain http from a loopback address alone, and only if the issuer's entry says so. A name,
/// `localhost` included, is not an address: a resolver could send it elsewhere.
fn check_transport(report: &mut Report, at: At, path: &str, url: &Url, allowed: Option<bool>) -> bool {
    let defect = match (url.scheme(), allowed) {
        // The flag itself is bad and reported; what it would have said is unknown.
        ("https", _) | (_, None) => return true,
        (_, Some(_)) if !is_loopback(url) => {
            Defect::PlainHttpNotLoopback { host: url.host_str().unwrap_or_default().to_owned() }
        }
        (_, Some(true)) => return true,
        (_, Some(false)) => Defect::PlainHttp,
    };
    report.error(at, path, defect);
    false
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.to_canonical().is_loopback(),
        Some(Host::Domain(_)) | None => false,
    }
}

fn keys(
    report: &mut Report,
    map: &Mapping<'_>,
    directory: &Path,
    file_exists: &dyn Fn(&Path) -> bool,
    allow_http_loopback: Option<bool>,
) -> Option<KeySource> {
    let field = map.required(report, "keys")?;
    let sources = field.mapping(report, &["file", "url", "discovery"])?;
    let given = ["file", "url", "discovery"].into_iter().filter(|s| sources.has(s)).count();
    if given != 1 {
        field.error(report, Defect::KeySourceCount { found: given });
        return None;
    }
    if let Some(field) = sources.optional("file") {
        return file(report, &field, directory, file_exists).map(KeySource::File);
    }
    if let Some(field) = sources.optional("url") {
        let url = absolute_url(report, &field)?;
        let good = check_transport(report, field.at(), &field.path, &url, allow_http_loopback);
        return good.then_some(KeySource::Url(url));
    }
    let field = sources.optional("discovery")?;
    if field.boolean(report)? {
        return Some(KeySource::Discovery);
    }
    field.error(report, Defect::DiscoveryFalse);
    None
}

fn file(
    report: &mut Report,
    field: &Field<'_>,
    directory: &Path,
    file_exists: &dyn Fn(&Path) -> bool,
) -> Option<PathBuf> {
    let path = field.file(report, directory)?;
    if !file_exists(&path) {
        let caution = Caution::FileMissing { path: path.display().to_string() };
        report.warn(field.at(), field.path.clone(), caution);
    }
    Some(path)
}

fn algorithms(report: &mut Report, map: &Mapping<'_>) -> Option<Vec<Algorithm>> {
    let field = map.required(report, "algorithms")?;
    let mut algorithms = Vec::new();
    let names = field.texts(report, 32, 64, |_, name| {
        let algorithm = algorithm(name)?;
        algorithms.push(algorithm);
        Ok(algorithm.name().to_owned())
    })?;
    if names.is_empty() {
        field.error(report, Defect::NoAlgorithms);
        return None;
    }
    Some(algorithms)
}

fn algorithm(name: &str) -> Result<Algorithm, Defect> {
    if let Some(algorithm) = Algorithm::ALL.into_iter().find(|a| a.name() == name) {
        return Ok(algorithm);
    }
    let name = name.to_owned();
    Err(match name.to_ascii_uppercase().as_str() {
        "NONE" => Defect::UnsignedAlgorithm,
        "HS256" | "HS384" | "HS512" => Defect::SymmetricAlgorithm { name },
        _ => Defect::UnknownAlgorithm { name },
    })
}

/// `at+jwt` unless the file says otherwise (RFC 9068, section 4).
fn token_types(report: &mut Report, map: &Mapping<'_>) -> Option<Vec<String>> {
    let Some(field) = map.optional("token_types") else { return Some(vec!["at+jwt".to_owned()]) };
    let types = field.texts(report, MAX_TOKEN_TYPES, 128, |_, text| token_type(text))?;
    if types.is_empty() {
        field.error(report, Defect::EmptyList);
        return None;
    }
    if types.iter().any(|t| t == "jwt") {
        report.warn(field.at(), field.path.clone(), Caution::PlainJwtType);
    }
    Some(types)
}

fn token_type(text: &str) -> Result<String, Defect> {
    let lower = text.to_ascii_lowercase();
    // RFC 7515, section 4.1.9: the prefix may be left out, so with and without it are the same type.
    let short = lower.strip_prefix("application/").unwrap_or(&lower);
    // RFC 6838, section 4.2.
    let restricted = |c: char| c.is_ascii_alphanumeric() || "!#$&-^_.+".contains(c);
    if !short.starts_with(|c: char| c.is_ascii_alphanumeric()) || !short.chars().all(restricted) {
        return Err(Defect::TokenType { value: text.to_owned() });
    }
    if NOT_ACCESS_TOKENS.contains(&short) {
        return Err(Defect::NotAccessTokenType { value: text.to_owned() });
    }
    Ok(short.to_owned())
}

fn duration(
    report: &mut Report,
    map: &Mapping<'_>,
    name: &'static str,
    default: Duration,
    (min, max): (Duration, Duration),
) -> Option<Duration> {
    map.or_default(name, default, |field| field.duration(report, min, max))
}

/// Keys that expire before their first refresh would make every token fail in between.
fn check_staleness(
    report: &mut Report,
    map: &Mapping<'_>,
    refresh_interval: Option<Duration>,
    max_staleness: Option<Duration>,
) -> bool {
    let (Some(refresh), Some(staleness)) = (refresh_interval, max_staleness) else { return true };
    if staleness >= refresh {
        return true;
    }
    let defect = Defect::StalenessBelowRefresh {
        staleness: super::duration::format(staleness),
        refresh: super::duration::format(refresh),
    };
    match map.optional("max_staleness").or_else(|| map.optional("refresh_interval")) {
        Some(field) => field.error(report, defect),
        None => report.error(map.at, map.path.clone(), defect),
    }
    false
}
