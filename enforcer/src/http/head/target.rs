//! The request line: method, target, version.

use super::error::PathFault;
use super::lines::is_tchar;
use super::{HeadError, MAX_METHOD_BYTES};

/// A request line in the one form that is accepted.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestLine<'a> {
    pub(super) method: &'a str,
    pub(super) target: &'a str,
    pub(super) path: &'a str,
    pub(super) query: Option<&'a str>,
}

/// Reads `METHOD SP origin-form SP HTTP/1.1` (RFC 9112, section 3).
pub(super) fn request_line(line: &[u8]) -> Result<RequestLine<'_>, HeadError> {
    if line == b"PRI * HTTP/2.0" {
        return Err(HeadError::Http2Preface);
    }
    let mut parts = line.split(|b| *b == b' ');
    let (method, target, version) = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(method), Some(target), Some(version), None) => (method, target, version),
        (Some(b"GET"), Some(target), None, None) if !target.is_empty() => return Err(HeadError::Http09),
        _ => return Err(HeadError::RequestLine),
    };
    match version {
        b"HTTP/1.1" => {}
        b"HTTP/1.0" => return Err(HeadError::Http10),
        other if other.starts_with(b"HTTP/") => return Err(HeadError::Version),
        _ => return Err(HeadError::RequestLine),
    }
    if method.is_empty() || method.len() > MAX_METHOD_BYTES || !method.iter().copied().all(is_tchar) {
        return Err(HeadError::Method { max_bytes: MAX_METHOD_BYTES });
    }
    let method = ascii(method)?;
    let target = ascii(target)?;
    if method == "CONNECT" {
        return Err(HeadError::AuthorityForm);
    }
    match target.as_bytes().first() {
        Some(b'/') => {}
        Some(b'*') if target.len() == 1 => return Err(HeadError::AsteriskForm),
        Some(_) if target.contains("://") => return Err(HeadError::AbsoluteForm),
        Some(_) => return Err(HeadError::AuthorityForm),
        None => return Err(HeadError::RequestLine),
    }
    // A fragment never goes over the wire (RFC 9112, section 3.2.1); parsers that cut it off would read another
    // target than those that do not.
    if !target.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
        return Err(HeadError::Target);
    }
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    judge_path(path)?;
    Ok(RequestLine { method, target, path, query })
}

fn ascii(bytes: &[u8]) -> Result<&str, HeadError> {
    str::from_utf8(bytes).ok().filter(|text| text.is_ascii()).ok_or(HeadError::Target)
}

/// Accepts a path only when nothing about it could be normalised: the characters of RFC 3986's `pchar` without
/// `%` and `;`, no empty segment but the last, no dot segment.
fn judge_path(path: &str) -> Result<(), PathFault> {
    for b in path.bytes() {
        match b {
            b'%' => return Err(PathFault::Percent),
            b';' => return Err(PathFault::Parameters),
            b'\\' => return Err(PathFault::Backslash),
            b'/' | b'-' | b'.' | b'_' | b'~' | b':' | b'@' => {}
            b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b'=' => {}
            _ if b.is_ascii_alphanumeric() => {}
            _ => return Err(PathFault::Character),
        }
    }
    if path.contains("//") {
        return Err(PathFault::EmptySegment);
    }
    if path.split('/').any(|segment| segment == "." || segment == "..") {
        return Err(PathFault::DotSegment);
    }
    Ok(())
}

/// Does a query hold a key `access_token` (RFC 6750, section 2.3)? Keys are percent-decoded and compared without
/// case, and `;` separates as well as `&`: the widest reading of any server counts.
pub(super) fn query_has_access_token(query: &str) -> bool {
    query.split(['&', ';']).any(|pair| {
        let key = pair.split_once('=').map_or(pair, |(key, _)| key);
        percent_decoded(key).eq_ignore_ascii_case(b"access_token")
    })
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if let (b'%', [high, low, after @ ..]) = (*first, tail)
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            out.push(high * 16 + low);
            rest = after;
            continue;
        }
        out.push(*first);
        rest = tail;
    }
    out
}

const fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}
