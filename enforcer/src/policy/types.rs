//! The compiled policy. Built only by parsing a policy file, so that every value in it has been checked.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What happens to a request that policy refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is refused.
    Enforce,
    /// It passes; what `Enforce` would have done is counted and logged.
    Observe,
}

/// A whole policy file, version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What happens to refused requests.
    pub mode: Mode,
    /// How old the daemon's last sign of life may be for requests that the kernel does not know to wait for it; after that they get
    /// 503. From [`super::MIN_DAEMON_TIMEOUT`] to [`super::MAX_DAEMON_TIMEOUT`].
    pub daemon_timeout: Duration,
    /// Token issuers, in file order.
    pub issuers: Vec<Arc<Issuer>>,
    /// Protected servers, in file order.
    pub servers: Vec<Arc<Server>>,
}

/// A signature algorithm that a policy may list (RFC 7518 and RFC 8037 names). Asymmetric only: no `none`, no HMAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are the RFC names")]
pub enum Algorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    ES256,
    ES384,
    EdDSA,
}

/// Where an issuer's JSON Web Key Set comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A JWKS file on this host, read again when it changes.
    File(PathBuf),
    /// A JWKS URL.
    Url(url::Url),
    /// The issuer's metadata document (RFC 8414, then OpenID Connect Discovery) names the JWKS URL.
    Discovery,
}

/// An authorization server whose tokens are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    /// Name within the policy.
    pub name: String,
    /// Issuer identifier, compared byte for byte with the `iss` claim (RFC 9068, section 4).
    pub issuer: String,
    /// Where its keys come from.
    pub keys: KeySource,
    /// PEM file with the certificate authorities for its https URLs; the system's roots when absent.
    pub ca_file: Option<PathBuf>,
    /// Plain http is accepted for URLs whose host is a loopback address.
    pub allow_http_loopback: bool,
    /// Accepted signature algorithms; never empty.
    pub algorithms: Vec<Algorithm>,
    /// Clock tolerance for `exp`, `nbf` and `iat`.
    pub leeway: Duration,
    /// Longest accepted `exp - iat`.
    pub max_token_lifetime: Duration,
    /// Accepted JOSE `typ` values, lower case, without the `application/` prefix. Never empty.
    pub token_types: Vec<String>,
    /// Keys older than this are refreshed in the background.
    pub refresh_interval: Duration,
    /// Keys that could not be refreshed for this long are not used any more.
    pub max_staleness: Duration,
}

/// An endpoint on which a protected server accepts connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Listen {
    /// Local address; `0.0.0.0` is every IPv4 address, `::` every address of both families. Never v4-mapped.
    pub addr: IpAddr,
    /// Local port; never 0.
    pub port: u16,
}

/// Protected resource metadata options (RFC 9728).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// The enforcer answers the well-known URLs; otherwise they pass to the server without a token.
    pub serve: bool,
    /// `resource_name`.
    pub resource_name: Option<String>,
    /// `scopes_supported`; the required scopes when the file is silent.
    pub scopes_supported: Vec<String>,
}

/// A protected MCP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Name within the policy.
    pub name: String,
    /// Where it accepts connections; never empty.
    pub listen: Vec<Listen>,
    /// Canonical resource URI ([`super::canonical_resource`]): the audience that a token must hold (RFC 8707).
    pub resource: String,
    /// Further audiences accepted as this server's, byte for byte after canonicalization.
    pub aliases: Vec<String>,
    /// The MCP endpoint's path, e.g. `/mcp`. A request's path equals it, or starts with it and a `/`; `/` is every
    /// path ([`super::path_contains`]). No slash at the end of any other.
    pub path: String,
    /// Paths that need no token; compared byte for byte, query not allowed.
    pub public_paths: Vec<String>,
    /// Issuers whose tokens are accepted here; never empty.
    pub issuers: Vec<Arc<Issuer>>,
    /// Scopes that every request needs.
    pub scopes: Vec<String>,
    /// Metadata options.
    pub metadata: Metadata,
    /// Accepted `Host` values (lower case, with port where it is not the scheme's default). Never empty.
    pub hosts: Vec<String>,
    /// Accepted `Origin` values; a request with any other `Origin` is refused (DNS rebinding).
    pub origins: Vec<String>,
}
