//! The bearer token in a head (RFC 6750, section 2.1).

use super::MAX_TOKEN_BYTES;

/// What a head presents as credentials. A cookie is never one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Credentials<'a> {
    /// No Authorization header.
    None,
    /// A well-formed header of another scheme, which RFC 6750, section 3.1 treats like none.
    OtherScheme,
    /// Exactly one well-formed bearer token. Never log it.
    Bearer(&'a str),
    /// Something that no reading makes one well-formed bearer token.
    Malformed(CredentialsFault),
}

/// Leaves the token out, so that a head may be logged.
impl std::fmt::Debug for Credentials<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::OtherScheme => f.write_str("OtherScheme"),
            Self::Bearer(token) => write!(f, "Bearer({} bytes)", token.len()),
            Self::Malformed(fault) => write!(f, "Malformed({fault:?})"),
        }
    }
}

/// Why credentials are malformed: each is a 400 with `error="invalid_request"` (RFC 6750, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsFault {
    /// Two or more Authorization headers.
    #[error("more than one Authorization header")]
    Repeated,
    /// A token in the query string ("Access tokens MUST NOT be included in the URI query string", MCP
    /// authorization).
    #[error("a token in the query string")]
    TokenInQuery,
    /// The value is empty, or does not start with a scheme.
    #[error("the Authorization header has no scheme")]
    NoScheme,
    /// Not exactly one space between scheme and token, or white space around the value.
    #[error("the Authorization header does not have exactly one space")]
    Whitespace,
    /// `Bearer` and nothing more.
    #[error("the bearer token is empty")]
    NoToken,
    /// The token is not a `b64token`.
    #[error("the bearer token is not a b64token")]
    TokenSyntax,
    /// The token is over the limit.
    #[error("the bearer token is {len_bytes} bytes long, the limit is {max_bytes}")]
    TokenTooLong {
        /// Length seen.
        len_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
}

impl CredentialsFault {
    /// A stable name for counters and logs.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Repeated => "authorization-repeated",
            Self::TokenInQuery => "token-in-query",
            Self::NoScheme => "authorization-no-scheme",
            Self::Whitespace => "authorization-whitespace",
            Self::NoToken => "bearer-no-token",
            Self::TokenSyntax => "bearer-syntax",
            Self::TokenTooLong { .. } => "bearer-too-long",
        }
    }
}

/// Reads the part of an Authorization header after its colon.
pub(super) fn parse(raw_value: &str) -> Credentials<'_> {
    use CredentialsFault as Fault;
    let value = raw_value.strip_prefix(' ').unwrap_or(raw_value);
    if value.starts_with([' ', '\t']) || value.ends_with([' ', '\t']) {
        // `Bearer ` with nothing behind it is told apart only for the counters.
        let empty = value.trim_end_matches([' ', '\t']).eq_ignore_ascii_case("bearer");
        return Credentials::Malformed(if empty { Fault::NoToken } else { Fault::Whitespace });
    }
    let scheme_end = value.find([' ', '\t', ',']).unwrap_or(value.len());
    let (scheme, rest) = value.split_at(scheme_end);
    if scheme.is_empty() || !scheme.bytes().all(super::lines::is_tchar) {
        return Credentials::Malformed(Fault::NoScheme);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        // A list of credentials could hold a bearer that only some servers find.
        if rest.to_ascii_lowercase().contains("bearer ") {
            return Credentials::Malformed(Fault::TokenSyntax);
        }
        return Credentials::OtherScheme;
    }
    let Some(token) = rest.strip_prefix(' ') else {
        return Credentials::Malformed(if rest.is_empty() { Fault::NoToken } else { Fault::Whitespace });
    };
    if token.starts_with([' ', '\t']) {
        return Credentials::Malformed(Fault::Whitespace);
    }
    if token.len() > MAX_TOKEN_BYTES {
        return Credentials::Malformed(Fault::TokenTooLong {
            len_bytes: token.len(),
            max_bytes: MAX_TOKEN_BYTES,
        });
    }
    if is_b64token(token) { Credentials::Bearer(token) } else { Credentials::Malformed(Fault::TokenSyntax) }
}

/// `1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="`
fn is_b64token(token: &str) -> bool {
    let body = token.trim_end_matches('=');
    !body.is_empty()
        && body
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b'+' | b'/'))
}
