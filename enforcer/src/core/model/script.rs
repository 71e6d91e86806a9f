//! What a client sends.

use crate::token::testing::World as Issuer;

/// A request of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Allowed, without a body.
    Get,
    /// Allowed, with a `Content-Length`.
    Post,
    /// Allowed, chunked.
    Chunked,
    /// Allowed, with a token whose key is not at hand.
    NewKey,
    /// Refused, long enough for the kernel's own answer.
    Bad,
    /// Refused, and too short for it.
    ShortBad,
    /// Refused, with a `Content-Length`.
    BadPost,
    /// Refused, chunked.
    BadChunked,
    /// With a good token and a `Content-Length`, over a limit, and the kernel can't answer it.
    Limited,
    /// The first half of a head.
    Half,
}

/// What the head of a request over a limit begins with.
pub(super) const LIMITED: &[u8] = b"POST /mcp HTTP/1.1\r\nL: 1\r\n";

pub(super) const WHOLE: [Kind; 9] = [
    Kind::Get,
    Kind::Post,
    Kind::Chunked,
    Kind::NewKey,
    Kind::Bad,
    Kind::ShortBad,
    Kind::BadPost,
    Kind::BadChunked,
    Kind::Limited,
];

/// Where a request is cut into packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// Not at all.
    Whole,
    /// In the middle of the head.
    Head,
    /// Behind the head, where there is a body.
    Body,
    /// Behind the head and in the middle of the body.
    Bodies,
    /// Not at all, and what follows is in the same packet.
    Joined,
    /// Behind the head, and what follows the body is in the same packet as it.
    BodyJoined,
}

/// A sequence of requests, cut into packets.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) name: String,
    /// Whether each request may reach the server, and its bytes.
    pub(super) requests: Vec<(bool, Vec<u8>)>,
    /// Packets, with the number of the request that each begins in.
    pub(super) packets: Vec<(usize, Vec<u8>)>,
    /// Whether all requests are whole.
    pub(super) complete: bool,
}

const BODY: &str = "abcd";
const CHUNKS: &str = "2\r\nab\r\n0\r\n\r\n";

/// Tokens of the scripts.
pub(super) struct Tokens {
    pub(super) known: String,
    pub(super) new_key: String,
}

impl Tokens {
    pub(super) fn of(issuer: &Issuer, other: &Issuer) -> Self {
        Self { known: issuer.token(), new_key: other.token() }
    }

    fn head_and_body(&self, kind: Kind) -> (bool, String, &'static str) {
        let known = format!("Authorization: Bearer {}\r\n", self.known);
        let new_key = format!("Authorization: Bearer {}\r\n", self.new_key);
        let pad = format!("X-Pad: {}\r\n", "p".repeat(700));
        let (allowed, method, lines, body) = match kind {
            Kind::Get => (true, "GET", known, ""),
            Kind::Post => (true, "POST", format!("{known}Content-Length: 4\r\n"), BODY),
            Kind::Chunked => (true, "POST", format!("{known}Transfer-Encoding: chunked\r\n"), CHUNKS),
            Kind::NewKey => (true, "GET", new_key, ""),
            Kind::Limited => (false, "POST", format!("{known}Content-Length: 4\r\n"), BODY),
            Kind::Bad | Kind::Half => (false, "GET", pad, ""),
            Kind::ShortBad => (false, "GET", String::new(), ""),
            Kind::BadPost => (false, "POST", format!("{pad}Content-Length: 4\r\n"), BODY),
            Kind::BadChunked => (false, "POST", "Transfer-Encoding: chunked\r\n".to_owned(), CHUNKS),
        };
        let mark = if kind == Kind::Limited { "L: 1\r\n" } else { "" };
        (allowed, format!("{method} /mcp HTTP/1.1\r\n{mark}Host: mcp.example.com\r\n{lines}\r\n"), body)
    }
}

impl Script {
    pub(super) fn new(requests: &[(Kind, Cut)], tokens: &Tokens) -> Self {
        let mut script = Self {
            name: format!("{requests:?}"),
            requests: Vec::new(),
            packets: Vec::new(),
            complete: requests.iter().all(|(kind, _)| *kind != Kind::Half),
        };
        let mut joined = false;
        for (index, &(kind, cut)) in requests.iter().enumerate() {
            let (allowed, mut head, body) = tokens.head_and_body(kind);
            if kind == Kind::Half {
                head.truncate(head.len() / 2);
            }
            let (head, body) = (head.into_bytes(), body.as_bytes());
            let parts: Vec<Vec<u8>> = match cut {
                Cut::Whole | Cut::Joined => vec![[&head, body].concat()],
                Cut::Head => vec![head[..30].to_vec(), [&head[30..], body].concat()],
                Cut::Body | Cut::BodyJoined => vec![head.clone(), body.to_vec()],
                Cut::Bodies => vec![head.clone(), body[..2].to_vec(), body[2..].to_vec()],
            };
            for part in parts.into_iter().filter(|part| !part.is_empty()) {
                match script.packets.last_mut() {
                    Some((_, last)) if joined => last.extend_from_slice(&part),
                    _ => script.packets.push((index, part)),
                }
                joined = false;
            }
            joined = matches!(cut, Cut::Joined | Cut::BodyJoined);
            script.requests.push((allowed, [&head, body].concat()));
        }
        script
    }

    /// Cuts that make a difference to a request.
    pub(super) fn cuts(kind: Kind) -> &'static [Cut] {
        match kind {
            Kind::Post | Kind::Chunked | Kind::BadPost | Kind::BadChunked | Kind::Limited => {
                &[Cut::Whole, Cut::Head, Cut::Body, Cut::Bodies, Cut::Joined, Cut::BodyJoined]
            }
            Kind::Half => &[Cut::Whole],
            _ => &[Cut::Whole, Cut::Head, Cut::Joined],
        }
    }
}
