//! The headers that decide about framing, authorization and routing.

use super::lines::{Field, trim};
use super::{HeadError, MAX_BODY_BYTES};

/// How long a request's body is (RFC 9112, section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Neither Content-Length nor Transfer-Encoding: no body.
    None,
    /// This many bytes, at most [`MAX_BODY_BYTES`].
    ContentLength(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

impl Framing {
    /// Is there certainly no body?
    #[must_use]
    pub const fn is_empty(self) -> bool {
        matches!(self, Self::None | Self::ContentLength(0))
    }
}

/// What the Connection header says (RFC 9110, section 7.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    /// Nothing: HTTP/1.1 keeps the connection open.
    Unsaid,
    /// `keep-alive`.
    KeepAlive,
    /// `close`.
    Close,
}

/// The Origin header (RFC 6454, section 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin<'a> {
    /// None was sent.
    None,
    /// One value, as sent.
    One(&'a str),
    /// Two or more headers.
    Several,
}

/// A header whose repetition is judged later, with an answer of its own.
#[derive(Debug, Clone, Copy)]
pub(super) enum Occurrence<'a> {
    None,
    /// Everything after the colon.
    One(&'a str),
    Several,
}

#[derive(Debug, Clone)]
pub(super) struct Fields<'a> {
    pub(super) framing: Framing,
    pub(super) expects_continue: bool,
    pub(super) connection: Connection,
    pub(super) host: &'a str,
    pub(super) origin: Origin<'a>,
    pub(super) authorization: Occurrence<'a>,
}

/// Headers that matter: each at most once, in ASCII, without needless white space, never with an underscore for a
/// dash. Every name that starts with `mcp-` matters as well. `Cookie` does not: it is never a credential here, and
/// a server that gives it a meaning still serves only requests that hold a good token.
const MATTER: [&str; 15] = [
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "dpop",
    "expect",
    "host",
    "http2-settings",
    "origin",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Headers by which frameworks let a client replace the request line's method or path. No MCP client sends them,
/// and what was judged would not be what is served.
const REWRITE: [&str; 5] =
    ["x-http-method", "x-http-method-override", "x-method-override", "x-original-url", "x-rewrite-url"];

/// The header's name among those that matter, however it is written.
fn mattering_name(name: &str) -> Option<&'static str> {
    let alike = |known: &&'static str| {
        known.len() == name.len()
            && known
                .bytes()
                .zip(name.bytes())
                .all(|(want, have)| want == have.to_ascii_lowercase() || (want == b'-' && have == b'_'))
    };
    let is_mcp = name.get(..3).is_some_and(|start| start.eq_ignore_ascii_case("mcp"))
        && matches!(name.as_bytes().get(3), Some(b'-' | b'_'));
    MATTER.iter().chain(&REWRITE).find(|known| alike(known)).copied().or(is_mcp.then_some("mcp-*"))
}

/// Reads the headers that matter.
pub(super) fn read<'a>(fields: &[Field<'a>]) -> Result<Fields<'a>, HeadError> {
    let mut seen = Seen::default();
    for (index, field) in fields.iter().enumerate() {
        let Some(header) = mattering_name(field.name) else { continue };
        if field.name.contains('_') {
            return Err(HeadError::Underscore { header });
        }
        if REWRITE.contains(&header) {
            return Err(HeadError::Rewrite { header });
        }
        let raw = str::from_utf8(field.raw_value)
            .ok()
            .filter(|value| value.is_ascii())
            .ok_or(HeadError::ObsText { header })?;
        // Answered with a challenge (400) and as a refused origin (403), not as a broken head.
        if header == "authorization" {
            seen.authorization = match seen.authorization {
                Occurrence::None => Occurrence::One(raw),
                Occurrence::One(_) | Occurrence::Several => Occurrence::Several,
            };
            continue;
        }
        let value = raw.strip_prefix(' ').unwrap_or(raw);
        if value.len() != trim(value.as_bytes()).len() {
            return Err(HeadError::Whitespace { header });
        }
        if header == "origin" {
            seen.origin = match seen.origin {
                Origin::None => Origin::One(value),
                Origin::One(_) | Origin::Several => Origin::Several,
            };
            continue;
        }
        let earlier = fields.get(..index).unwrap_or_default();
        if earlier.iter().any(|other| other.name.eq_ignore_ascii_case(field.name)) {
            return Err(HeadError::Repeated { header });
        }
        seen.take(header, value)?;
    }
    seen.finish()
}

struct Seen<'a> {
    content_length: Option<u64>,
    chunked: bool,
    expects_continue: bool,
    connection: Connection,
    host: Option<&'a str>,
    origin: Origin<'a>,
    authorization: Occurrence<'a>,
}

impl Default for Seen<'_> {
    fn default() -> Self {
        Self {
            content_length: None,
            chunked: false,
            expects_continue: false,
            connection: Connection::Unsaid,
            host: None,
            origin: Origin::None,
            authorization: Occurrence::None,
        }
    }
}

impl<'a> Seen<'a> {
    fn take(&mut self, header: &str, value: &'a str) -> Result<(), HeadError> {
        match header {
            "content-length" => self.content_length = Some(content_length(value)?),
            "transfer-encoding" if value.eq_ignore_ascii_case("chunked") => self.chunked = true,
            "transfer-encoding" => return Err(HeadError::TransferEncoding),
            "host" if is_host(value) => self.host = Some(value),
            "host" => return Err(HeadError::HostSyntax),
            "connection" => self.connection = connection(value)?,
            "expect" if value.eq_ignore_ascii_case("100-continue") => self.expects_continue = true,
            "expect" => return Err(HeadError::Expect),
            "upgrade" | "http2-settings" => return Err(HeadError::Upgrade),
            "trailer" => return Err(HeadError::Trailer),
            "te" if !value.eq_ignore_ascii_case("trailers") => return Err(HeadError::Te),
            _ => {}
        }
        Ok(())
    }

    fn finish(self) -> Result<Fields<'a>, HeadError> {
        let framing = match (self.content_length, self.chunked) {
            (None, false) => Framing::None,
            (Some(len), false) => Framing::ContentLength(len),
            (None, true) => Framing::Chunked,
            (Some(_), true) => return Err(HeadError::LengthAndEncoding),
        };
        Ok(Fields {
            framing,
            expects_continue: self.expects_continue,
            connection: self.connection,
            host: self.host.ok_or(HeadError::HostMissing)?,
            origin: self.origin,
            authorization: self.authorization,
        })
    }
}

/// Digits alone, no leading zero but in `0`.
fn content_length(value: &str) -> Result<u64, HeadError> {
    let plain = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    if !plain || (value.starts_with('0') && value.len() > 1) {
        return Err(HeadError::ContentLength);
    }
    // All digits: the only way to fail is to overflow.
    value
        .parse()
        .ok()
        .filter(|len| *len <= MAX_BODY_BYTES)
        .ok_or(HeadError::BodyTooLarge { max_bytes: MAX_BODY_BYTES })
}

/// Options are an allow-list: an unknown one names a header that some server would drop after we judged it.
fn connection(value: &str) -> Result<Connection, HeadError> {
    let mut found = Connection::Unsaid;
    for option in value.split(',').map(|option| option.trim_matches([' ', '\t'])) {
        let next = if option.eq_ignore_ascii_case("close") {
            Connection::Close
        } else if option.eq_ignore_ascii_case("keep-alive") {
            Connection::KeepAlive
        } else if option.eq_ignore_ascii_case("te") {
            continue;
        } else if option.eq_ignore_ascii_case("upgrade") || option.eq_ignore_ascii_case("http2-settings") {
            return Err(HeadError::Upgrade);
        } else {
            return Err(HeadError::ConnectionOption);
        };
        if found != Connection::Unsaid && found != next {
            return Err(HeadError::ConnectionConflict);
        }
        found = next;
    }
    Ok(found)
}

/// `uri-host [ ":" port ]` without user information, zone or percent-encoding (RFC 9110, section 7.2).
fn is_host(value: &str) -> bool {
    let (host, port) = match value.strip_prefix('[') {
        Some(rest) => {
            let Some((address, after)) = rest.split_once(']') else { return false };
            let inside = !address.is_empty()
                && address.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.'));
            if !inside {
                return false;
            }
            match after.strip_prefix(':') {
                Some(port) => ("v6", Some(port)),
                None if after.is_empty() => ("v6", None),
                None => return false,
            }
        }
        None => match value.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (value, None),
        },
    };
    !host.is_empty()
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        && port.is_none_or(|port| (1..=5).contains(&port.len()) && port.bytes().all(|b| b.is_ascii_digit()))
}
