//! Canonical resource URIs: what a policy names as audience and what a token's `aud` is compared with.

use std::net::{Ipv4Addr, Ipv6Addr};

use thiserror::Error;

/// Longest accepted resource URI, in bytes.
pub const MAX_RESOURCE_BYTES: usize = 2048;

/// Why a text is not a resource URI.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ResourceError {
    /// Nothing there.
    #[error("the resource URI is empty")]
    Empty,
    /// Longer than [`MAX_RESOURCE_BYTES`].
    #[error("the resource URI has {found} bytes, at most {MAX_RESOURCE_BYTES} are allowed")]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// White space, a control character, non-ASCII or a character that RFC 3986 has no place for.
    #[error("the resource URI holds {found:?} at byte {position}, which no URI may hold")]
    Character {
        /// The character.
        found: char,
        /// Byte offset, from 0.
        position: usize,
    },
    /// Not `http://` or `https://`.
    #[error("the resource URI begins with {found:?} instead of `https://` or `http://`")]
    Scheme {
        /// What stands before `://`, or the beginning of the text.
        found: String,
    },
    /// A fragment (RFC 8707, section 2: must not be included).
    #[error("the resource URI has a fragment (`#...`)")]
    Fragment,
    /// A query. RFC 8707 advises against it, and an MCP server's resource URI has none.
    #[error("the resource URI has a query (`?...`)")]
    Query,
    /// `user@` or `user:password@`.
    #[error("the resource URI has user information (`...@`)")]
    UserInfo,
    /// No host.
    #[error("the resource URI has no host")]
    NoHost,
    /// A host that is neither a name nor an address in its usual form.
    #[error("the resource URI's host {found:?} is neither a DNS name nor an IP address in its usual form")]
    Host {
        /// The host.
        found: String,
    },
    /// A port that is empty, zero, above 65535, or has leading zeros.
    #[error("the resource URI's port {found:?} is not a number from 1 to 65535")]
    Port {
        /// What stands after the colon.
        found: String,
    },
    /// `.` or `..` as a path segment: clients would resolve it before they ask for a token.
    #[error("the resource URI's path holds a `{found}` segment")]
    DotSegment {
        /// The segment.
        found: String,
    },
    /// A `%` without two hexadecimal digits.
    #[error("the resource URI holds a `%` without two hexadecimal digits at byte {position}")]
    PercentEncoding {
        /// Byte offset, from 0.
        position: usize,
    },
}

/// The parts of a canonical resource URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ResourceParts {
    pub(super) https: bool,
    /// Lower case; an IPv6 address with its brackets.
    pub(super) host: String,
    pub(super) port: u16,
    /// Empty for the root.
    pub(super) path: String,
}

impl ResourceParts {
    /// The port that the scheme stands for.
    fn default_port(https: bool) -> u16 {
        if https { 443 } else { 80 }
    }

    /// The port is the one that the scheme stands for.
    pub(super) fn has_default_port(&self) -> bool {
        self.port == Self::default_port(self.https)
    }

    /// `localhost` or a loopback address.
    pub(super) fn host_is_loopback(&self) -> bool {
        let bare = self.host.trim_start_matches('[').trim_end_matches(']');
        bare == "localhost"
            || bare.ends_with(".localhost")
            || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
    }

    fn canonical(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        let (host, path) = (&self.host, &self.path);
        if self.has_default_port() {
            format!("{scheme}://{host}{path}")
        } else {
            format!("{scheme}://{host}:{}{path}", self.port)
        }
    }
}

/// The canonical form of a resource URI (RFC 8707, section 2; MCP authorization, "Canonical Server URI").
///
/// Scheme and host become lower case, the scheme's default port is dropped, and `https://h/` becomes `https://h`, the
/// form that MCP prefers. Nothing else is changed: paths, their case, percent-encodings and trailing slashes stay.
/// Two audiences are equal exactly if their canonical forms are equal byte for byte.
///
/// # Errors
/// [`ResourceError`] for everything that is not an absolute http or https URI without user information, query and
/// fragment, of at most [`MAX_RESOURCE_BYTES`] bytes.
pub fn canonical_resource(text: &str) -> Result<String, ResourceError> {
    parse_resource(text).map(|parts| parts.canonical())
}

/// Like [`canonical_resource`], in parts.
pub(super) fn parse_resource(text: &str) -> Result<ResourceParts, ResourceError> {
    if text.is_empty() {
        return Err(ResourceError::Empty);
    }
    if text.len() > MAX_RESOURCE_BYTES {
        return Err(ResourceError::TooLong { found: text.len() });
    }
    if let Some((position, found)) = text.char_indices().find(|&(_, c)| !is_uri_character(c)) {
        return Err(ResourceError::Character { found, position });
    }
    let (scheme, rest) = text
        .split_once("://")
        .ok_or_else(|| ResourceError::Scheme { found: text.chars().take(16).collect() })?;
    let https = match scheme.to_ascii_lowercase().as_str() {
        "https" => true,
        "http" => false,
        _ => return Err(ResourceError::Scheme { found: scheme.chars().take(16).collect() }),
    };
    if rest.contains('#') {
        return Err(ResourceError::Fragment);
    }
    if rest.contains('?') {
        return Err(ResourceError::Query);
    }
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err(ResourceError::UserInfo);
    }
    let (host, port) = split_authority(authority)?;
    let port = port.map_or(Ok(ResourceParts::default_port(https)), parse_port)?;
    check_path(path, text.len() - path.len())?;
    let path = if path == "/" { String::new() } else { path.to_owned() };
    Ok(ResourceParts { https, host: parse_host(host)?, port, path })
}

/// Unreserved, reserved and `%` (RFC 3986, section 2).
fn is_uri_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~:/?#[]@!$&'()*+,;=%".contains(c)
}

/// Splits `host:port`; the host keeps the brackets of an IPv6 address.
pub(super) fn split_authority(authority: &str) -> Result<(&str, Option<&str>), ResourceError> {
    let after_host = match authority.strip_prefix('[') {
        Some(rest) => match rest.find(']') {
            Some(end) => end + 2,
            None => return Err(ResourceError::Host { found: authority.to_owned() }),
        },
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, rest) = authority.split_at(after_host);
    match rest.strip_prefix(':') {
        Some(port) => Ok((host, Some(port))),
        None if rest.is_empty() => Ok((host, None)),
        None => Err(ResourceError::Host { found: authority.to_owned() }),
    }
}

/// A port from 1 to 65535 without leading zeros or signs.
pub(super) fn parse_port(text: &str) -> Result<u16, ResourceError> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| plain).ok_or_else(|| ResourceError::Port { found: text.to_owned() })
}

/// A DNS name or an IP address in its usual form, in lower case.
pub(super) fn parse_host(host: &str) -> Result<String, ResourceError> {
    if host.is_empty() {
        return Err(ResourceError::NoHost);
    }
    let bad = || ResourceError::Host { found: host.to_owned() };
    let lower = host.to_ascii_lowercase();
    if let Some(inner) = lower.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or_else(bad)?;
        let address: Ipv6Addr = inner.parse().map_err(|_| bad())?;
        // One spelling an address (RFC 5952), or equal addresses would compare as different.
        return if address.to_string() == inner { Ok(lower) } else { Err(bad()) };
    }
    let name = lower.strip_suffix('.').unwrap_or(&lower);
    let label = |l: &str| {
        let end = |b: Option<&u8>| b.is_some_and(|b| *b != b'-');
        l.len() <= 63
            && end(l.as_bytes().first())
            && end(l.as_bytes().last())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err(bad());
    }
    // A last label that begins with a digit is how URL parsers recognise an IPv4 address, in many spellings.
    let last = name.rsplit('.').next().unwrap_or(name);
    if last.starts_with(|c: char| c.is_ascii_digit()) && lower.parse::<Ipv4Addr>().is_err() {
        return Err(bad());
    }
    Ok(lower)
}

fn check_path(path: &str, offset: usize) -> Result<(), ResourceError> {
    if let Some(found) = path.split('/').find(|s| *s == "." || *s == "..") {
        return Err(ResourceError::DotSegment { found: found.to_owned() });
    }
    for (index, part) in path.match_indices('%') {
        let digits = path.as_bytes().get(index + part.len()..index + part.len() + 2);
        if !digits.is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit)) {
            return Err(ResourceError::PercentEncoding { position: offset + index });
        }
    }
    // Brackets are for IPv6 addresses alone (RFC 3986, section 3.2.2).
    match path.char_indices().find(|&(_, c)| c == '[' || c == ']') {
        Some((position, found)) => Err(ResourceError::Character { found, position: offset + position }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_resources_have_one_form() {
        for (text, canonical) in [
            ("https://h", "https://h"),
            ("https://h/", "https://h"),
            ("HTTPS://H.Example/", "https://h.example"),
            ("https://h:443/mcp", "https://h/mcp"),
            ("http://h:80/mcp", "http://h/mcp"),
            ("http://h:443/mcp", "http://h:443/mcp"),
            ("https://h:8443", "https://h:8443"),
            ("https://h/MCP", "https://h/MCP"),
            ("https://h/mcp/", "https://h/mcp/"),
            ("https://h/a%2fb", "https://h/a%2fb"),
            ("https://h//", "https://h//"),
            ("https://[2001:DB8::1]:443/x", "https://[2001:db8::1]/x"),
            ("https://10.0.0.1/x", "https://10.0.0.1/x"),
            ("https://h./", "https://h."),
            ("https://my_host-1/x;y=1", "https://my_host-1/x;y=1"),
        ] {
            assert_eq!(canonical_resource(text).as_deref(), Ok(canonical), "{text}");
        }
    }

    #[test]
    fn different_resources_stay_different() {
        let forms = [
            "https://h",
            "http://h",
            "https://h./",
            "https://h/mcp",
            "https://h/mcp/",
            "https://h/MCP",
            "https://h//",
            "https://h:8443",
            "https://h/m%63p",
            "https://h.x",
        ];
        for (i, a) in forms.iter().enumerate() {
            for b in &forms[i + 1..] {
                assert_ne!(canonical_resource(a).unwrap(), canonical_resource(b).unwrap(), "{a} {b}");
            }
        }
    }

    #[test]
    fn each_defect_has_its_name() {
        use ResourceError as E;
        let is = |text: &str, want: E| assert_eq!(canonical_resource(text), Err(want), "{text}");
        is("", E::Empty);
        is("https://h/ä", E::Character { found: 'ä', position: 10 });
        is("https://h/a b", E::Character { found: ' ', position: 11 });
        is("https://h/\t", E::Character { found: '\t', position: 10 });
        is("https:\\\\h", E::Character { found: '\\', position: 6 });
        is("https://h/[", E::Character { found: '[', position: 10 });
        is("h/mcp", E::Scheme { found: "h/mcp".into() });
        is("ftp://h", E::Scheme { found: "ftp".into() });
        is(" https://h", E::Character { found: ' ', position: 0 });
        is("https://h#", E::Fragment);
        is("https://h?x", E::Query);
        is("https://u:p@h", E::UserInfo);
        is("https://h@/", E::UserInfo);
        is("https:///mcp", E::NoHost);
        is("https://:443/mcp", E::NoHost);
        is("https://h:", E::Port { found: String::new() });
        is("https://h:0", E::Port { found: "0".into() });
        is("https://h:0443", E::Port { found: "0443".into() });
        is("https://h:65536", E::Port { found: "65536".into() });
        is("https://h:+1", E::Port { found: "+1".into() });
        is("https://h/../x", E::DotSegment { found: "..".into() });
        is("https://h/x/.", E::DotSegment { found: ".".into() });
        is("https://h/%4", E::PercentEncoding { position: 10 });
        is("https://h/%zz", E::PercentEncoding { position: 10 });
        for host in [
            "a..b",
            "-a",
            "a-",
            "a%41",
            "[::1",
            "[::01]",
            "[1.2.3.4]",
            "1.2.3",
            "0x7f.1",
            "127.1",
            "h;x",
            "[::1]x",
        ] {
            let error = canonical_resource(&format!("https://{host}/"));
            assert!(matches!(error, Err(E::Host { .. })), "{host}: {error:?}");
        }
        let long = format!("https://h/{}", "a".repeat(MAX_RESOURCE_BYTES));
        is(&long, E::TooLong { found: MAX_RESOURCE_BYTES + 10 });
    }

    proptest! {
        #[test]
        fn canonical_is_a_fixed_point(text in "(?i)https?://[a-z0-9.:\\[\\]@-]{0,12}(:[0-9]{1,5})?(/[a-z0-9%./-]{0,8}){0,3}") {
            if let Ok(once) = canonical_resource(&text) {
                prop_assert_eq!(canonical_resource(&once), Ok(once.clone()));
                // The general URL parser agrees that both name the same thing.
                prop_assert_eq!(url::Url::parse(&once).unwrap(), url::Url::parse(&text).unwrap());
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let _ = canonical_resource(&text);
            let _ = canonical_resource(&format!("https://{text}"));
        }
    }
}
