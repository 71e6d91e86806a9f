//! The `WWW-Authenticate` challenge (RFC 6750, section 3; RFC 9728, section 5.1).

use crate::http::metadata;
use crate::policy::Server;

/// What a challenge tells the client.
#[derive(Debug, Clone, Copy)]
pub(super) enum Challenge<'a> {
    /// No error: get a token.
    NoCredentials,
    /// `invalid_token`.
    InvalidToken,
    /// `invalid_request`.
    InvalidRequest,
    /// `insufficient_scope`, with the scopes that the operation needs.
    InsufficientScope(&'a [String]),
}

/// A scope that asks for a refresh token is between client and authorization server: a resource server never
/// names it (MCP authorization: "SHOULD NOT include `offline_access`").
const NEVER_CHALLENGED: &str = "offline_access";

/// Writes the header's value. The metadata URL comes from the server's resource URI, never from the request.
pub(super) fn challenge(server: &Server, what: Challenge<'_>) -> String {
    let mut params = Vec::with_capacity(4);
    let mut scopes = server.scopes.as_slice();
    match what {
        Challenge::NoCredentials => {}
        Challenge::InvalidToken => {
            params.push(("error", "invalid_token".to_owned()));
            params.push(("error_description", "The access token is not valid here".to_owned()));
        }
        Challenge::InvalidRequest => params.push(("error", "invalid_request".to_owned())),
        Challenge::InsufficientScope(needed) => {
            scopes = needed;
            params.push(("error", "insufficient_scope".to_owned()));
        }
    }
    params.push(("resource_metadata", metadata::resource_metadata_url(server)));
    let scopes: Vec<_> =
        scopes.iter().map(String::as_str).filter(|scope| *scope != NEVER_CHALLENGED).collect();
    if !scopes.is_empty() {
        params.push(("scope", scopes.join(" ")));
    }
    let params: Vec<_> = params.iter().map(|(name, value)| format!("{name}={}", quoted(value))).collect();
    format!("Bearer {}", params.join(", "))
}

/// A quoted-string (RFC 9110, section 5.6.4). Anything but visible ASCII and space is left out.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len().saturating_add(2));
    out.push('"');
    for c in text.chars().filter(|c| matches!(c, ' '..='~')) {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
    out
}
