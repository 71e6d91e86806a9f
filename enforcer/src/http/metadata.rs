//! Protected resource metadata (RFC 9728).

use serde::Serialize;

use super::answer::Draft;
use crate::policy::Server;

/// The well-known prefix (RFC 9728, section 3); a resource's path follows it.
pub const WELL_KNOWN: &str = "/.well-known/oauth-protected-resource";
/// Methods of a metadata URL.
const METHODS: &str = "GET, HEAD, OPTIONS";

/// The metadata document. Field names are those of RFC 9728, section 2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Document<'a> {
    /// The resource identifier, exactly as clients know it.
    pub resource: &'a str,
    /// Issuer identifiers of the authorization servers; at least one, as policy demands.
    pub authorization_servers: Vec<&'a str>,
    /// Scopes that a client may ask for.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub scopes_supported: &'a [String],
    /// How tokens are presented: in the Authorization header alone.
    pub bearer_methods_supported: [&'static str; 1],
    /// The resource's name for humans.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource_name: Option<&'a str>,
}

/// The paths at which a server's metadata is found, as they stand in a request line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The well-known prefix and the path of the resource URI: the one in challenges.
    pub by_resource: String,
    /// The well-known prefix and the path of the endpoint: the same, unless a gateway in front of the server
    /// changes the path.
    pub by_endpoint: String,
}

/// A resource URI's origin, and its path and query (empty for `/`: RFC 9728, section 3.1 drops that slash).
fn split_resource(resource: &str) -> (&str, &str) {
    let authority = resource.find("://").map_or(0, |at| at.saturating_add(3));
    let end = resource
        .get(authority..)
        .and_then(|rest| rest.find(['/', '?', '#']))
        .map_or(resource.len(), |at| at.saturating_add(authority));
    let (origin, rest) = resource.split_at_checked(end).unwrap_or((resource, ""));
    let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
    (origin, if rest == "/" { "" } else { rest })
}

/// The absolute URL for challenges' `resource_metadata`: the prefix goes between origin and path.
#[must_use]
pub fn resource_metadata_url(server: &Server) -> String {
    let (origin, path) = split_resource(&server.resource);
    format!("{origin}{WELL_KNOWN}{path}")
}

/// Where a server's metadata is found, apart from the root form: see [`find`].
#[must_use]
pub fn metadata_urls(server: &Server) -> Paths {
    let (_, path) = split_resource(&server.resource);
    let path = path.split_once('?').map_or(path, |(before, _)| before);
    let endpoint = if server.path == "/" { "" } else { server.path.as_str() };
    Paths { by_resource: format!("{WELL_KNOWN}{path}"), by_endpoint: format!("{WELL_KNOWN}{endpoint}") }
}

/// The metadata document of a server.
#[must_use]
pub fn metadata_document(server: &Server) -> Document<'_> {
    Document {
        resource: &server.resource,
        authorization_servers: server.issuers.iter().map(|issuer| issuer.issuer.as_str()).collect(),
        scopes_supported: &server.metadata.scopes_supported,
        bearer_methods_supported: ["header"],
        resource_name: server.metadata.resource_name.as_deref(),
    }
}

/// Which server's metadata is at this path.
///
/// The path of a resource URI comes before the path of an endpoint. The root form belongs to the server whose own
/// path is `/`; else to the endpoint's server if there is only one; else to nobody, since a client that asks there
/// could mean any of them.
#[must_use]
pub fn find(path: &str, endpoint_servers: &[&Server]) -> Option<usize> {
    if path.strip_prefix(WELL_KNOWN).is_none_or(|rest| !(rest.is_empty() || rest.starts_with('/'))) {
        return None;
    }
    let urls: Vec<_> = endpoint_servers.iter().map(|server| metadata_urls(server)).collect();
    urls.iter()
        .position(|paths| paths.by_resource == path)
        .or_else(|| urls.iter().position(|paths| paths.by_endpoint == path))
        .or_else(|| (path == WELL_KNOWN && endpoint_servers.len() == 1).then_some(0))
}

/// The answer to a request to a metadata URL. Any web page may read it (RFC 9728, section 3.1 asks for no credentials).
pub fn draft(server: &Server, method: &str) -> Draft {
    let draft = match method {
        "GET" | "HEAD" => match serde_json::to_vec(&metadata_document(server)) {
            Ok(document) => Draft::json("metadata", document),
            // Strings and lists always serialise.
            Err(_) => super::answer::unavailable("metadata-unavailable", 1),
        },
        "OPTIONS" => Draft::no_content("metadata-preflight")
            .header("Access-Control-Allow-Methods", METHODS)
            .header("Access-Control-Allow-Headers", "*")
            .header("Access-Control-Max-Age", "600"),
        _ => super::answer::method_not_allowed(METHODS),
    };
    draft.readable_by("*")
}
