//! What can be wrong with a policy file, where, and what to do about it.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use super::path::PathError;
use super::resource::ResourceError;

/// Everything found wrong with one policy file, in file order. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyErrors {
    /// The defects, at most [`super::MAX_REPORTED_ERRORS`].
    pub errors: Vec<PolicyError>,
    /// How many more there were.
    pub suppressed: usize,
}

impl fmt::Display for PolicyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.errors.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        if self.suppressed > 0 {
            write!(f, "\n... and {} more", self.suppressed)?;
        }
        Ok(())
    }
}

impl std::error::Error for PolicyErrors {}

/// One defect and its place; displays as `file:line:column: field: what`, and the hint on a line of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyError {
    /// The file's name as it was given.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: u64,
    /// Column in characters, from 1.
    pub column: u64,
    /// The field's path, e.g. `servers[1].listen[0]`; empty for the file as a whole.
    pub field: String,
    /// What is wrong.
    pub defect: Defect,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{}", self.defect)?;
        if let Some(hint) = self.defect.hint() {
            write!(f, "\n    hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for PolicyError {}

/// What is wrong with a value in a policy file: one variant for each kind of defect.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant's message says what it and its fields are")]
pub enum Defect {
    // The file.
    #[error("the file can't be read: {reason}")]
    Unreadable { reason: String },
    #[error("this is not a regular file")]
    NotRegularFile,
    #[error("the file is larger than {limit} bytes")]
    FileTooLarge { limit: usize },
    #[error("the file is not UTF-8 text")]
    NotUtf8,
    #[error("not well-formed YAML for a policy: {message}")]
    Yaml { message: String },
    #[error("an anchor (`&`), an alias (`*`) or a merge key (`<<`) stands here")]
    YamlIndirection,

    // Shape.
    #[error("expected {expected}, found {found}")]
    WrongType { expected: &'static str, found: &'static str },
    #[error("unknown field `{field}`")]
    UnknownField { field: String, nearest: Option<&'static str>, allowed: &'static [&'static str] },
    #[error("the field `{field}` was already given in line {first_line}")]
    DuplicateField { field: String, first_line: u64 },
    #[error("the required field `{field}` is missing")]
    MissingField { field: &'static str },
    #[error("the list is empty, at least one entry is needed")]
    EmptyList,
    #[error("{found} entries, at most {limit} are allowed")]
    TooManyEntries { found: usize, limit: usize },
    #[error("{found} bytes of text, from 1 to {limit} are allowed")]
    TextLength { found: usize, limit: usize },
    #[error("the text holds a control character")]
    ControlCharacter,
    #[error("`{value}` was already given in line {first_line}")]
    DuplicateValue { value: String, first_line: u64 },
    #[error("the version is {found}, this program reads version 1")]
    Version { found: u64 },
    #[error("the mode is `{found}`, it can be `enforce` or `observe`")]
    Mode { found: String },
    #[error("`{value}` is not a name: 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit")]
    Name { value: String },
    #[error("`{value}` is not a duration")]
    Duration { value: String },
    #[error("the duration is {found}, from {min} to {max} is allowed")]
    DurationBounds { found: String, min: String, max: String },

    #[error("the number is {found}, from {min} to {max} is allowed")]
    NumberBounds { found: u64, min: u64, max: u64 },
    #[error("the {what} name `{name}` was already used in line {first_line}")]
    DuplicateName { what: &'static str, name: String, first_line: u64 },
    #[error("unknown {what} `{name}`")]
    UnknownName { what: &'static str, name: String, known: Vec<String> },

    // Workloads, bindings and limits.
    #[error("`{value}` is not {expected}")]
    Selector { value: String, expected: &'static str },
    #[error("nothing says which callers this workload is")]
    NoSelector,
    #[error("{found} of `workloads`, `claim`, `first_use` are given, exactly one is needed")]
    BindingCount { found: usize },
    #[error("`first_use` can only be true")]
    FirstUseFalse,
    #[error("unknown claim `{name}`")]
    UnknownClaim { name: String },
    #[error("no workload has a `spiffe_id`, so no caller could present these tokens")]
    NoSpiffeId,
    #[error("`{value}` is not a rate")]
    Rate { value: String },
    #[error("the limit has neither a `rate` nor `streams`")]
    LimitOfNothing,
    #[error("unknown dimension `{name}`")]
    UnknownDimension { name: String },
    #[error("requests can't be limited per {name}: request bodies are not read yet")]
    BodyDimension { name: &'static str },
    #[error("the limit counts per {per}, only sources have prefixes")]
    PrefixWithoutSource { per: &'static str },
    #[error("with this one, {found} limits apply to server `{server}`, at most {limit} can")]
    TooManyLimits { server: String, found: usize, limit: usize },

    // The shield.
    #[error("`{value}` is not a network: {reason}")]
    Prefix { value: String, reason: String },
    #[error("`{value}` is not the name of an interface")]
    Interface { value: String },
    #[error("`{value}` is the loopback interface, which the shield leaves alone")]
    Loopback { value: String },
    #[error("`{found}` is not a way to attach")]
    Attach { found: String },

    // Issuers.
    #[error("the issuer name `{name}` was already used in line {first_line}")]
    DuplicateIssuerName { name: String, first_line: u64 },
    #[error("the issuer identifier `{issuer}` already belongs to the issuer in line {first_line}")]
    DuplicateIssuerIdentifier { issuer: String, first_line: u64 },
    #[error("`{value}` is not an absolute http or https URL: {reason}")]
    Url { value: String, reason: String },
    #[error("the URL has user information (`...@`)")]
    UrlUserInfo,
    #[error("the URL has a fragment (`#...`)")]
    UrlFragment,
    #[error("the issuer identifier has a query (`?...`)")]
    IssuerQuery,
    #[error("keys would be fetched over plain http, and `allow_http_loopback` is not true")]
    PlainHttp,
    #[error("keys would be fetched over plain http from `{host}`, which is not a loopback address")]
    PlainHttpNotLoopback { host: String },
    #[error("{found} key sources are given, exactly one of `file`, `url`, `discovery` is needed")]
    KeySourceCount { found: usize },
    #[error("`discovery` can only be true")]
    DiscoveryFalse,
    #[error("no signature algorithm is listed, so no token could ever be accepted")]
    NoAlgorithms,
    #[error("`{name}` signs with a shared secret: whoever can verify its tokens can also make them")]
    SymmetricAlgorithm { name: String },
    #[error("`none` means no signature: anybody could make such a token")]
    UnsignedAlgorithm,
    #[error("unknown signature algorithm `{name}`")]
    UnknownAlgorithm { name: String },
    #[error("`{value}` is not a token type (media type name, RFC 7515 section 4.1.9)")]
    TokenType { value: String },
    #[error("`{value}` is the type of a token that is never an access token")]
    NotAccessTokenType { value: String },
    #[error("`max_staleness` is {staleness}, less than `refresh_interval`, which is {refresh}")]
    StalenessBelowRefresh { staleness: String, refresh: String },

    // Servers.
    #[error("no server is listed: the policy protects nothing")]
    NoServers,
    #[error("the server name `{name}` was already used in line {first_line}")]
    DuplicateServerName { name: String, first_line: u64 },
    #[error("unknown issuer `{name}`")]
    UnknownIssuer { name: String, known: Vec<String> },
    #[error("`{value}` is not an address with a port")]
    Listen { value: String },
    #[error("port 0 is not an endpoint")]
    PortZero,
    #[error("nothing can accept connections on {addr}")]
    NotListenable { addr: String },
    #[error("an address with a scope id can't be matched")]
    ScopeId,
    #[error(transparent)]
    Resource(ResourceError),
    #[error("{0}")]
    Path(PathError),
    #[error("the resource URI's path can't serve as the endpoint's path: {0}")]
    DefaultPath(PathError),
    #[error("the path ends with a slash")]
    TrailingSlash,
    #[error("{0}")]
    OverlappingServers(Box<Overlap>),
    #[error("the path is the server's own protected path")]
    PublicPathIsProtected,
    #[error(
        "the path equals, contains or lies under `{other_path}`, the protected path of server `{other}` on the same endpoint"
    )]
    PublicPathOfOtherServer { other: String, other_path: String },
    #[error("the path is also public for server `{other}` on the same endpoint, in line {other_line}")]
    PublicPathShared { other: String, other_line: u64 },
    #[error("the path lies under `/.well-known/oauth-protected-resource`, which belongs to the metadata")]
    MetadataPath,
    #[error(
        "the metadata path `{path}` would stand for two resources on one endpoint: `{resource}` and `{other_resource}` (server `{other}`)"
    )]
    MetadataClash { path: String, resource: String, other: String, other_resource: String },
    #[error("`{value}` is not a scope token (RFC 6749, section 3.3)")]
    Scope { value: String },
    #[error("`offline_access` asks for a refresh token and is no scope of a resource")]
    OfflineAccess,
    #[error("`{value}` is not a Host value")]
    Host { value: String },
    #[error("`{value}` is not an origin")]
    Origin { value: String },
    #[error("`{value}` would accept origins that nobody has named")]
    OpaqueOrigin { value: String },
}

/// Two servers that could both be meant by one request.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{endpoint} with path `{path}` overlaps {other_endpoint} with path `{other_path}` of server `{other}` in line {other_line}"
)]
pub struct Overlap {
    /// The later server's endpoint.
    pub endpoint: String,
    /// The later server's path.
    pub path: String,
    /// The earlier server's name.
    pub other: String,
    /// The earlier server's endpoint.
    pub other_endpoint: String,
    /// The earlier server's path.
    pub other_path: String,
    /// Where the earlier server's endpoint is given.
    pub other_line: u64,
}

impl Defect {
    /// The next step for whoever wrote the file.
    pub fn hint(&self) -> Option<String> {
        let fixed = match self {
            Self::FileTooLarge { .. } => {
                "split the servers over several hosts' policies, or remove what is not used"
            }
            Self::NotUtf8 => "save the file as UTF-8",
            Self::Yaml { .. } => {
                "check indentation and quotes here; IPv6 endpoints need quotes: \"[::]:8080\""
            }
            Self::YamlIndirection => "write the value out: a policy reads the same from top to bottom",
            Self::WrongType { expected: LISTEN, found: "a list" | "a mapping" } => "quote it: \"[::]:8080\"",
            Self::Duration { .. } | Self::WrongType { expected: DURATION, .. } => {
                "write a whole number and a unit: 30s, 5m, 24h, 7d"
            }
            Self::WrongType { expected: TEXT, found: "a number" | "a boolean" } => "put it in quotes",
            Self::WrongType { expected: BOOLEAN, .. } => "write true or false",
            Self::UnknownField { nearest, allowed, .. } => {
                return Some(match nearest {
                    Some(nearest) => format!("did you mean `{nearest}`?"),
                    None => format!("known here: {}", allowed.join(", ")),
                });
            }
            Self::DuplicateField { .. } | Self::DuplicateValue { .. } => "keep one of them",
            Self::MissingField { field } => return missing_hint(field).map(str::to_owned),
            Self::Version { .. } => "write `version: 1`",
            Self::DuplicateIssuerName { .. } => "give each issuer a name of its own",
            Self::DuplicateServerName { .. } => "give each server a name of its own",
            Self::DuplicateName { .. } => "give each a name of its own",
            Self::UnknownName { what, known, .. } => {
                return Some(format!("known {what}s: {}", listed(known)));
            }
            Self::Selector { expected: NETWORK, .. } => "e.g. 10.1.0.0/16, 10.1.2.3 or \"2001:db8::/32\"",
            Self::Selector { expected: CGROUP, .. } => "e.g. /system.slice/agent-*.service or /jobs/**",
            Self::Selector { expected: CONTAINER, .. } => {
                "`enforcer workloads --output json` shows it in full; names of containers are not known to the kernel, labels can be"
            }
            Self::NoSelector => {
                "give at least one of `unit`, `container`, `label`, `pod`, `cgroup`, `uid`, `network`"
            }
            Self::BindingCount { .. } => "one rule for each: all rules about a token must hold",
            Self::FirstUseFalse => "leave it out, and name who may present the token",
            Self::UnknownClaim { .. } => "it can be `kubernetes_pod` or `spiffe_id`",
            Self::NoSpiffeId => "give the workloads their ids: `spiffe_id: spiffe://prod.example/agent`",
            Self::Rate { .. } | Self::WrongType { expected: RATE, .. } => {
                "write how many in a second, minute or hour, from 1 to 1000000: 20/s, 300/m, 1000/h"
            }
            Self::Interface { .. } => "`ip link` lists them",
            Self::Loopback { .. } => "name the interfaces that clients on other hosts come in by",
            Self::Attach { .. } => "write auto (native, else generic), native or generic",
            Self::LimitOfNothing => "e.g. `rate: 20/s` or `streams: 10`",
            Self::UnknownDimension { .. } | Self::BodyDimension { .. } => {
                "it can be `server`, `source`, `workload`, `uid`, `principal` or `client`"
            }
            Self::PrefixWithoutSource { .. } => "remove the prefix, or write `per: source`",
            Self::TooManyLimits { .. } => "say with `servers` which servers each limit is for",
            Self::DuplicateIssuerIdentifier { .. } => {
                "keep one entry for each identifier: a token's `iss` must lead to one set of keys"
            }
            Self::Url { .. } => "write it in full, e.g. https://issuer.example/keys",
            Self::UrlUserInfo => "remove it: a policy holds no credentials",
            Self::UrlFragment | Self::IssuerQuery => "remove it (RFC 8414, section 2)",
            Self::PlainHttp => {
                "use https; for a development issuer on this host, set `allow_http_loopback: true`"
            }
            Self::PlainHttpNotLoopback { .. } => "use https, or an address in 127.0.0.0/8 or [::1]",
            Self::KeySourceCount { .. } => "e.g. `keys: {discovery: true}`",
            Self::DiscoveryFalse => "name another key source: `file` or `url`",
            Self::NoAlgorithms | Self::UnsignedAlgorithm | Self::UnknownAlgorithm { .. } => {
                "list what the issuer signs with, of RS256, RS384, RS512, PS256, ES256, ES384, EdDSA"
            }
            Self::SymmetricAlgorithm { .. } => {
                "let the issuer sign with a private key (RS256, ES256, EdDSA, ...) and publish the public one"
            }
            Self::TokenType { .. } => "e.g. at+jwt",
            Self::NotAccessTokenType { .. } => "access tokens are `at+jwt` (RFC 9068)",
            Self::StalenessBelowRefresh { .. } => "raise `max_staleness` or lower `refresh_interval`",
            Self::NoServers => "list at least one server",
            Self::UnknownIssuer { known, .. } => return Some(format!("known issuers: {}", listed(known))),
            Self::Listen { .. } | Self::WrongType { expected: LISTEN, .. } => {
                "write 127.0.0.1:8080, 0.0.0.0:8080 or \"[::]:8080\""
            }
            Self::PortZero => "write the port that the server listens on",
            Self::NotListenable { .. } => "name an address of this host, or 0.0.0.0 or [::] for all",
            Self::ScopeId => "listen on \"[::]\", or on an address that is not link-local",
            Self::Resource(error) => resource_hint(error)?,
            Self::DefaultPath(_) => "give the endpoint's path with `path`",
            Self::Path(error) => return Some(error.hint().to_owned()),
            Self::TrailingSlash => "leave the slash out: `/mcp` covers `/mcp/` as well",
            Self::OverlappingServers(_) => {
                "give them different ports or addresses, or paths of which neither contains the other"
            }
            Self::PublicPathIsProtected => "remove it: a protected path can't be public",
            Self::PublicPathOfOtherServer { .. } => "remove it, or give the servers endpoints of their own",
            Self::PublicPathShared { .. } => "list it for one of them",
            Self::MetadataPath => "remove it; `metadata.serve` says who answers there",
            Self::MetadataClash { .. } => {
                "give the resources different paths, or the servers endpoints of their own"
            }
            Self::Scope { .. } => {
                "visible ASCII without space, quote and backslash; one list entry for each scope"
            }
            Self::OfflineAccess => "remove it (MCP authorization: it never appears in a challenge)",
            Self::Host { .. } => {
                "a DNS name or IP address, with a port where clients send one: mcp.example:8080"
            }
            Self::Origin { .. } => "scheme://host, with a port where it is not the scheme's default",
            Self::OpaqueOrigin { .. } => "list each origin by name",
            Self::Unreadable { .. }
            | Self::NotRegularFile
            | Self::WrongType { .. }
            | Self::EmptyList
            | Self::TooManyEntries { .. }
            | Self::TextLength { .. }
            | Self::ControlCharacter
            | Self::NumberBounds { .. }
            | Self::Prefix { .. }
            | Self::Selector { .. }
            | Self::Mode { .. }
            | Self::Name { .. }
            | Self::DurationBounds { .. } => return None,
        };
        Some(fixed.to_owned())
    }
}

// What `WrongType` expects; the hint depends on it.
pub(super) const TEXT: &str = "text";
pub(super) const BOOLEAN: &str = "true or false";
pub(super) const DURATION: &str = "a duration";
pub(super) const LISTEN: &str = "an endpoint as text";
pub(super) const RATE: &str = "a rate";
// What `Selector` expects; so does the hint.
pub(super) const NETWORK: &str =
    "an address, or a network whose bits behind the prefix are zero (IPv4-mapped addresses are IPv4 ones)";
pub(super) const CGROUP: &str =
    "a pattern for a cgroup's path: segments that begin with `/`, `*` within one, `**` alone for any number";
pub(super) const CONTAINER: &str = "a container's id, 64 hexadecimal digits in lower case";

fn missing_hint(field: &str) -> Option<&'static str> {
    Some(match field {
        "version" => "write `version: 1`",
        "resource" => {
            "name the URI that clients use, e.g. https://mcp.example/mcp: tokens must be issued for it (RFC 8707)"
        }
        "issuers" => "a server needs at least one issuer whose tokens it accepts",
        "servers" => "list at least one server",
        "listen" => "list where the server accepts connections, e.g. [127.0.0.1:8080]",
        "algorithms" => "list what the issuer signs with, e.g. [ES256]",
        "keys" => "say where the issuer's keys are, e.g. {discovery: true}",
        "issuer" => "write the identifier exactly as it stands in the tokens' `iss`",
        _ => return None,
    })
}

fn resource_hint(error: &ResourceError) -> Option<&'static str> {
    Some(match error {
        ResourceError::Empty | ResourceError::Scheme { .. } | ResourceError::NoHost => {
            "write it in full, e.g. https://mcp.example/mcp"
        }
        ResourceError::Fragment | ResourceError::Query | ResourceError::UserInfo => "remove that part",
        ResourceError::Character { .. } => "an internationalized name is written in its xn-- form",
        ResourceError::Host { .. } => "one spelling an address: 192.0.2.1, [2001:db8::1]",
        _ => return None,
    })
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names if names.len() > 8 => format!("{}, ...", names[..8].join(", ")),
        names => names.join(", "),
    }
}

/// Something that is allowed but that its author should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The file's name as it was given.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: u64,
    /// Column in characters, from 1.
    pub column: u64,
    /// The field's path.
    pub field: String,
    /// What to know.
    pub caution: Caution,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}: warning: {}", self.file, self.line, self.column, self.field, self.caution)
    }
}

/// What a [`Warning`] is about.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant's message says what it and its fields are")]
pub enum Caution {
    #[error("observe mode: nothing is refused, requests without a valid token reach the servers")]
    Observe,
    #[error("{endpoint} is open on every interface; the requests are checked, but consider one address")]
    WildcardListen { endpoint: String },
    #[error(
        "tokens for `{resource}` travel over plain http and can be read on the way; use https in front of it"
    )]
    PlainHttpResource { resource: String },
    #[error(
        "`{resource}` is https on this very port: a server that speaks TLS itself can't be checked, its bytes must be plain HTTP"
    )]
    TlsOnListener { resource: String },
    #[error("`jwt` also fits ID tokens; only the audience then keeps them out")]
    PlainJwtType,
    #[error("the issuer identifier is plain http on another host; RFC 8414 asks for https")]
    PlainHttpIssuer,
    #[error("the file `{path}` is not there yet; until it is, no token of this issuer is accepted")]
    FileMissing { path: String },
    #[error("no server accepts tokens of this issuer")]
    UnusedIssuer,
    #[error("no server's callers and no binding name this workload")]
    UnusedWorkload,
    #[error("no server that this rule is for accepts tokens of its issuer")]
    UnusedBinding,
    #[error("the first workload that presents a token keeps it, also if that one is the thief")]
    FirstUse,
}
