//! What can be wrong with a policy file, where, and what to do about it.

mod hint;
mod warning;

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use super::path::PathError;
use super::resource::ResourceError;

pub use warning::{Caution, Warning};

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
