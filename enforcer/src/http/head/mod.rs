//! A strict parser for HTTP/1.1 request heads.
//!
//! It accepts less than RFC 9112 allows. The server behind us parses the same bytes with a parser that we do not
//! know, so a head is accepted only where no parser could read its method, target, framing or authorization in
//! another way. The raw lines are checked here, `httparse` reads the same bytes on its own, and both must agree.

mod credentials;
mod error;
mod fields;
mod lines;
#[cfg(test)]
mod one_reading;
mod target;
#[cfg(test)]
mod tests;

pub use credentials::{Credentials, CredentialsFault};
pub use error::{HeadError, PathFault};
pub use fields::{Connection, Framing, Origin};

use fields::Fields;
use target::RequestLine;

/// Largest head that the daemon accepts by default, with its last CRLFCRLF.
pub const DEFAULT_MAX_HEAD_BYTES: usize = 16 * 1024;
/// Most header lines in a head.
pub const MAX_HEADERS: usize = 100;
/// Largest Content-Length: 1 TiB.
pub const MAX_BODY_BYTES: u64 = 1 << 40;
/// Longest bearer token.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// Longest method.
pub const MAX_METHOD_BYTES: usize = 32;

/// Where the head at the start of `bytes` ends: the offset just behind its first CRLFCRLF, if that has arrived.
#[must_use]
pub fn find_head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at.saturating_add(4))
}

/// Could these first bytes of a connection become an HTTP/1.x request head? False means another protocol (a TLS
/// client hello, say): answering it in HTTP is pointless, close instead. True for a head that is still too short
/// to tell.
#[must_use]
pub fn may_become_head(bytes: &[u8]) -> bool {
    let start = bytes.get(..MAX_METHOD_BYTES.saturating_add(1)).unwrap_or(bytes);
    match start.iter().position(|b| !lines::is_tchar(*b)) {
        Some(at) => at > 0 && start.get(at) == Some(&b' '),
        None => start.len() <= MAX_METHOD_BYTES,
    }
}

/// A request head that has exactly one reading.
#[derive(Clone)]
pub struct Head<'a> {
    line: RequestLine<'a>,
    fields: Fields<'a>,
    headers: Vec<(&'a str, &'a [u8])>,
}

/// Method, path and framing only: never the query, never a header's value.
impl std::fmt::Debug for Head<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Head")
            .field("method", &self.line.method)
            .field("path", &self.line.path)
            .field("framing", &self.fields.framing)
            .field("credentials", &self.credentials())
            .finish_non_exhaustive()
    }
}

impl<'a> Head<'a> {
    /// The method, as sent (methods are case-sensitive).
    #[must_use]
    pub const fn method(&self) -> &'a str {
        self.line.method
    }

    /// The whole target, in origin-form. May hold what must not be logged: see [`Head::path`].
    #[must_use]
    pub const fn target(&self) -> &'a str {
        self.line.target
    }

    /// The path, as sent. It needs no normalisation.
    #[must_use]
    pub const fn path(&self) -> &'a str {
        self.line.path
    }

    /// The query without its `?`, as sent.
    #[must_use]
    pub const fn query(&self) -> Option<&'a str> {
        self.line.query
    }

    /// How long the body is.
    #[must_use]
    pub const fn framing(&self) -> Framing {
        self.fields.framing
    }

    /// Does the client wait for `100 Continue` (RFC 9110, section 10.1.1)?
    #[must_use]
    pub const fn expects_continue(&self) -> bool {
        self.fields.expects_continue
    }

    /// What the Connection header says.
    #[must_use]
    pub const fn connection(&self) -> Connection {
        self.fields.connection
    }

    /// The Host header: one host, with a port where one was sent.
    #[must_use]
    pub const fn host(&self) -> &'a str {
        self.fields.host
    }

    /// The Origin header.
    #[must_use]
    pub const fn origin(&self) -> Origin<'a> {
        self.fields.origin
    }

    /// The first header of this name (without case), trimmed. For a header that matters there is no second.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers.iter().find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    /// Every header in order, values trimmed.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + '_ {
        self.headers.iter().copied()
    }

    /// The credentials: from the Authorization header alone (MCP authorization: "MUST use the Authorization
    /// request header field"). A token in the query makes them malformed, whatever else is there.
    #[must_use]
    pub fn credentials(&self) -> Credentials<'a> {
        if self.line.query.is_some_and(target::query_has_access_token) {
            return Credentials::Malformed(CredentialsFault::TokenInQuery);
        }
        match self.fields.authorization {
            fields::Occurrence::None => Credentials::None,
            fields::Occurrence::One(raw_value) => credentials::parse(raw_value),
            fields::Occurrence::Several => Credentials::Malformed(CredentialsFault::Repeated),
        }
    }
}

/// Parses a head: `bytes` must end with their first CRLFCRLF (see [`find_head_end`]).
///
/// # Errors
/// One variant per defect; see [`HeadError`].
pub fn parse_head(bytes: &[u8], max_bytes: usize) -> Result<Head<'_>, HeadError> {
    if bytes.len() > max_bytes {
        return Err(HeadError::TooLarge { len_bytes: bytes.len(), max_bytes });
    }
    let split = lines::split(bytes, MAX_HEADERS)?;
    let line = target::request_line(split.request_line)?;
    let raw = split.fields.into_iter().map(lines::field).collect::<Result<Vec<_>, _>>()?;
    let fields = fields::read(&raw)?;
    let headers: Vec<_> = raw.iter().map(|field| (field.name, lines::trim(field.raw_value))).collect();
    second_opinion(bytes, &line, &headers)?;
    Ok(Head { line, fields, headers })
}

/// Lets `httparse` read the same bytes: it must find the same method, target, version and headers.
fn second_opinion(bytes: &[u8], line: &RequestLine<'_>, headers: &[(&str, &[u8])]) -> Result<(), HeadError> {
    let mut slots = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut slots);
    let agreed = match request.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => {
            len == bytes.len()
                && request.version == Some(1)
                && request.method == Some(line.method)
                && request.path == Some(line.target)
                && request
                    .headers
                    .iter()
                    .map(|header| (header.name, header.value))
                    .eq(headers.iter().copied())
        }
        Ok(httparse::Status::Partial) => false,
        Err(error) => return Err(HeadError::SecondParser(error)),
    };
    if agreed { Ok(()) } else { Err(HeadError::Disagreement) }
}
