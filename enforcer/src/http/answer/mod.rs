//! The enforcer's own HTTP answers.
//!
//! They are short on purpose: the kernel sends some of them in a request's place, in exactly as many bytes, so a
//! refusal that is longer than the request costs a trip to the daemon. Hence no `Date` and no `Server` (RFC 9110,
//! section 6.6.1 lets an origin server without a clock leave `Date` out), and no `Connection` unless it closes.

mod challenge;
mod template;
#[cfg(test)]
mod tests;

pub use template::{MAX_TEMPLATE_BYTES, ReplyTemplate, template};

use std::fmt::Write as _;

use bytes::Bytes;

use crate::http::head::{CredentialsFault, HeadError};
use crate::policy::Server;
use challenge::{Challenge, challenge};

/// Methods of the MCP endpoint: POST alone in the protocol of 2026-07-28, GET and DELETE in those before it.
pub const MCP_METHODS: &str = "POST, GET, DELETE";
/// Methods of a public path.
pub const PUBLIC_METHODS: &str = "GET, HEAD";

/// A complete HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Head and body, ready to send.
    pub bytes: Bytes,
    /// The connection must be closed after it.
    pub close: bool,
    /// A stable name for counters and logs.
    pub reason: &'static str,
}

impl Answer {
    /// Whether it is a refusal for something that its client did, and not because there is too much of it or something is missing here.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        self.status >= 400 && self.status != 429 && self.status != 503
    }
}

impl Answer {
    /// The same, and the connection closes after it.
    #[must_use]
    pub fn closing(&self) -> Self {
        const FIELD: &[u8] = b"Connection: close\r\n";
        let line = self.bytes.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let closes = self.close || line == 0;
        let bytes = if closes {
            self.bytes.clone()
        } else {
            [&self.bytes[..line], FIELD, &self.bytes[line..]].concat().into()
        };
        Self { bytes, close: true, ..self.clone() }
    }
}

/// An answer in the making: [`Draft::finish`] writes it.
#[derive(Debug, Clone)]
#[must_use]
pub struct Draft {
    status: u16,
    reason: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Option<Body>,
    close: bool,
}

#[derive(Debug, Clone)]
enum Body {
    /// A JSON-RPC error object.
    Error,
    /// This JSON document.
    Json(Vec<u8>),
}

impl Draft {
    fn error(status: u16, reason: &'static str) -> Self {
        Self { status, reason, headers: Vec::new(), body: Some(Body::Error), close: false }
    }

    /// A document, as JSON that anyone may store for five minutes.
    pub(super) fn json(reason: &'static str, document: Vec<u8>) -> Self {
        Self { status: 200, reason, headers: Vec::new(), body: Some(Body::Json(document)), close: false }
    }

    /// 204, without a body.
    pub(super) fn no_content(reason: &'static str) -> Self {
        Self { status: 204, reason, headers: Vec::new(), body: None, close: false }
    }

    pub(super) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The connection closes after the answer.
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// Lets the web page at `origin` read the answer, above all its challenge (Fetch standard, CORS protocol).
    /// Only for an origin that policy lists.
    pub fn readable_by(self, origin: &str) -> Self {
        self.header("Access-Control-Allow-Origin", header_safe(origin))
            .header("Access-Control-Expose-Headers", "WWW-Authenticate")
    }

    /// Writes the answer for a request with this method: one to HEAD has the same head and no body (RFC 9110,
    /// section 9.3.2). To send it with one would make the client read the body as its next answer.
    #[must_use]
    pub fn finish(self, request_method: &str) -> Answer {
        let body = match &self.body {
            Some(Body::Error) => Some(error_object(self.status)),
            Some(Body::Json(document)) => Some(document.clone()),
            None => None,
        };
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, phrase(self.status));
        for (name, value) in &self.headers {
            // Writing to a String cannot fail.
            let _ = write!(head, "{name}: {value}\r\n");
        }
        if let Some(body) = &body {
            head.push_str("Content-Type: application/json\r\n");
            head.push_str(match self.body {
                Some(Body::Json(_)) => "Cache-Control: max-age=300\r\n",
                _ => "Cache-Control: no-store\r\n",
            });
            let _ = write!(head, "Content-Length: {}\r\n", body.len());
        }
        if self.close {
            head.push_str("Connection: close\r\n");
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if request_method != "HEAD" {
            bytes.extend_from_slice(&body.unwrap_or_default());
        }
        Answer { status: self.status, bytes: bytes.into(), close: self.close, reason: self.reason }
    }
}

/// The code is the HTTP status: outside -32768..=-32000, which JSON-RPC 2.0, section 5.1 reserves.
fn error_object(status: u16) -> Vec<u8> {
    format!(r#"{{"jsonrpc":"2.0","id":null,"error":{{"code":{status},"message":"{}"}}}}"#, phrase(status))
        .into_bytes()
}

/// Reason phrases of RFC 9110, section 15 and RFC 6585.
const fn phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}

/// Drops what must not stand in a header's value: policy values are checked where they are read, and a line
/// break in one must not become a header here either.
fn header_safe(text: &str) -> String {
    text.chars().filter(|c| matches!(c, ' '..='~')).collect()
}

/// 401 to a request without credentials: a challenge without `error` (RFC 6750, section 3.1).
pub fn no_credentials(server: &Server, reason: &'static str) -> Draft {
    Draft::error(401, reason).header("WWW-Authenticate", challenge(server, Challenge::NoCredentials))
}

/// 401 to a token that is bad in any way. The description is the same for all of them: which check failed is for
/// the operator's log.
pub fn invalid_token(server: &Server, reason: &'static str) -> Draft {
    Draft::error(401, reason).header("WWW-Authenticate", challenge(server, Challenge::InvalidToken))
}

/// 400 to malformed credentials.
pub fn invalid_request(server: &Server, fault: CredentialsFault) -> Draft {
    Draft::error(400, fault.reason()).header("WWW-Authenticate", challenge(server, Challenge::InvalidRequest))
}

/// 403 to a good token without every scope in `needed`. All of them go into one challenge, also those that the
/// token holds (MCP authorization, scope challenge handling).
pub fn insufficient_scope(server: &Server, needed: &[String]) -> Draft {
    Draft::error(403, "insufficient-scope")
        .header("WWW-Authenticate", challenge(server, Challenge::InsufficientScope(needed)))
}

/// 403 that no scope would change: client, workload, Origin or Host not allowed.
pub fn forbidden(reason: &'static str) -> Draft {
    Draft::error(403, reason)
}

/// 404 off every path of the endpoint.
pub fn not_found() -> Draft {
    Draft::error(404, "path-unknown")
}

/// 405 with the methods that would do (RFC 9110, section 15.5.6).
pub fn method_not_allowed(allow: &'static str) -> Draft {
    Draft::error(405, "method-not-allowed").header("Allow", allow)
}

/// 400 to a body where there must be none: a server that does not read it would take it for the next request.
pub fn unexpected_body() -> Draft {
    Draft::error(400, "unexpected-body").closing()
}

/// 429 (RFC 6585, section 4): over a limit; try again in so many seconds.
pub fn over_limit(reason: &'static str, retry_after_seconds: u32) -> Draft {
    Draft::error(429, reason).header("Retry-After", retry_after_seconds.to_string())
}

/// 503: the enforcer cannot decide now (draining, a bound is full, an issuer's keys are unavailable).
pub fn unavailable(reason: &'static str, retry_after_seconds: u32) -> Draft {
    Draft::error(503, reason).header("Retry-After", retry_after_seconds.to_string())
}

/// The answer to a head that does not parse. It always closes the connection.
pub fn broken_head(error: &HeadError) -> Draft {
    Draft::error(error.status(), error.reason()).closing()
}

/// The answer to a CORS preflight from an origin that policy lists (Fetch standard, CORS-preflight fetch). The
/// server never sees it: a preflight holds no credentials, and every request to the server needs some.
pub fn preflight(origin: &str) -> Draft {
    Draft::no_content("preflight")
        .header("Access-Control-Allow-Origin", header_safe(origin))
        .header("Access-Control-Allow-Methods", MCP_METHODS)
        .header(
            "Access-Control-Allow-Headers",
            "Authorization, Content-Type, Accept, Last-Event-ID, Mcp-Method, Mcp-Name, Mcp-Protocol-Version, \
             Mcp-Session-Id",
        )
        .header("Access-Control-Max-Age", "600")
        .header("Vary", "Origin")
}
