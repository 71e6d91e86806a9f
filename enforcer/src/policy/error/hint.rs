//! What to do about a defect.

use super::{BOOLEAN, CGROUP, CONTAINER, DURATION, Defect, LISTEN, NETWORK, RATE, TEXT};
use crate::policy::resource::ResourceError;

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
