//! The compiled policy. Built only by parsing a policy file, so that every value in it has been checked.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

pub use super::rate::Rate;
pub use super::selectors::{CgroupGlob, Network};

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
    /// Workloads, in file order.
    pub workloads: Vec<Arc<WorkloadRule>>,
    /// Limits, in file order.
    pub limits: Vec<Arc<Limit>>,
    /// How many requests that the kernel does not know may come from one source.
    pub unknown: Rate,
    /// How many requests that are refused, or that need no token, may come from one source; without it as many as come.
    pub refused: Option<Rate>,
    /// What keeps floods from the servers, if anything does.
    pub shield: Option<Shield>,
}

/// Limits by source, on the interfaces that clients on other hosts come in by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shield {
    /// Interface names; never empty.
    pub interfaces: Vec<String>,
    /// Who runs the program.
    pub attach: ShieldAttach,
    /// New connections of a source.
    pub connections: Option<Rate>,
    /// Packets of a source.
    pub packets: Option<Rate>,
    /// When a source is shut out.
    pub quarantine: Option<Quarantine>,
    /// Networks that are neither limited nor quarantined.
    pub exceptions: Vec<IpNet>,
}

/// Who runs the shield's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShieldAttach {
    /// The driver if it can, else the kernel.
    Auto,
    /// The driver.
    Native,
    /// The kernel, whatever the driver.
    Generic,
}

impl ShieldAttach {
    /// As the policy writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// When a source is shut out, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quarantine {
    /// More refusals than these are too many; from 1.
    pub refusals: u32,
    /// How long refusals are counted together, from the first; 1 second to an hour.
    pub within: Duration,
    /// How long nothing of the source comes through; 1 second to 7 days.
    pub lasts: Duration,
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
    /// Who may send anything here: callers that one of these fits. Without it, everybody. Never empty.
    pub callers: Option<Vec<Arc<WorkloadRule>>>,
    /// The rules that apply here about who may present which token. All that are about a token must hold.
    pub bind: Vec<BindRule>,
    /// The limits that apply here, in file order; at most [`enforcer_common::abi::GRANT_BUCKETS`].
    pub limits: Vec<Arc<Limit>>,
}

/// A workload as policy names it. Every kind of selector that is given must fit a caller: one of its values, of the labels all. There is at
/// least one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkloadRule {
    /// Name within the policy.
    pub name: String,
    /// systemd units, `agent.service`.
    pub units: Vec<String>,
    /// Ids of containers, 64 hexadecimal digits.
    pub containers: Vec<String>,
    /// Labels of containers, each with its value.
    pub labels: Vec<(String, String)>,
    /// Uids of Kubernetes pods.
    pub pods: Vec<String>,
    /// Patterns for the cgroup's path.
    pub cgroups: Vec<CgroupGlob>,
    /// Users by number.
    pub uids: Vec<u32>,
    /// Addresses that it connects from.
    pub networks: Vec<Network>,
    /// The SPIFFE ids that it has. No selector: nobody is recognised by them.
    pub spiffe_ids: Vec<String>,
}

/// Who may present a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindRule {
    /// Only tokens of the issuer with this name in the policy.
    pub issuer: Option<String>,
    /// Only tokens with this `sub`.
    pub subject: Option<String>,
    /// Only tokens of this client.
    pub client_id: Option<String>,
    /// Who may present them.
    pub to: BindTo,
}

/// The workload that a token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BindTo {
    /// One of these.
    Workloads(Vec<Arc<WorkloadRule>>),
    /// The pod whose uid a Kubernetes service account token holds.
    KubernetesPod,
    /// Of these, which have SPIFFE ids, one that has the token's `sub`.
    SpiffeId(Vec<Arc<WorkloadRule>>),
    /// Whoever presents the first token of its principal.
    FirstUse,
}

/// How much may come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Name within the policy.
    pub name: String,
    /// What has a bucket of its own.
    pub per: Dimension,
    /// Requests. This or [`Self::streams`] is given.
    pub rate: Option<Rate>,
    /// Responses that are open at the same time.
    pub streams: Option<u32>,
    /// With [`Dimension::Source`]: IPv4 addresses with so many equal first bits are one source.
    pub ipv4_prefix: u8,
    /// With [`Dimension::Source`]: IPv6 addresses with so many equal first bits are one source.
    pub ipv6_prefix: u8,
}

/// What a limit counts by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dimension {
    /// Each server.
    Server,
    /// Each address or prefix that requests come from.
    Source,
    /// Each workload; callers that are not known by their addresses.
    Workload,
    /// Each user of this host.
    Uid,
    /// Each issuer, subject and client.
    Principal,
    /// Each OAuth client of an issuer.
    Client,
    /// Each MCP tool. No policy has it yet: request bodies are not read.
    Tool,
    /// Each MCP method. No policy has it yet: request bodies are not read.
    Method,
}

impl Dimension {
    /// Every dimension, in the order of the documentation.
    pub const ALL: [Self; 8] = [
        Self::Server,
        Self::Source,
        Self::Workload,
        Self::Uid,
        Self::Principal,
        Self::Client,
        Self::Tool,
        Self::Method,
    ];

    /// The name in policies.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Source => "source",
            Self::Workload => "workload",
            Self::Uid => "uid",
            Self::Principal => "principal",
            Self::Client => "client",
            Self::Tool => "tool",
            Self::Method => "method",
        }
    }
}
