//! Accepted `Host` and `Origin` values, and what is accepted when a policy names none.

use std::net::IpAddr;

use super::Listen;
use super::error::Defect;
use super::resource::{ResourceError, ResourceParts, parse_host, parse_port, split_authority};

/// The `Host` values that a server answers to when its policy names none: the authorities of its resource and
/// aliases, its concrete endpoints, and the loopback names of loopback and wildcard endpoints.
///
/// A scheme's default port may be present or absent (RFC 9110, section 7.2), so both forms are listed. What arrives
/// at an endpoint is plain http, whose default port is 80.
pub(super) fn default_hosts(resources: &[ResourceParts], listen: &[Listen]) -> Vec<String> {
    let mut hosts = Vec::new();
    let mut add = |host: &str, port: u16, is_default: bool| {
        let forms = [is_default.then(|| host.to_owned()), Some(format!("{host}:{port}"))];
        for form in forms.into_iter().flatten() {
            if !hosts.contains(&form) {
                hosts.push(form);
            }
        }
    };
    for parts in resources {
        add(&parts.host, parts.port, parts.has_default_port());
    }
    for endpoint in listen {
        let port = endpoint.port;
        if !endpoint.addr.is_unspecified() {
            let host = match endpoint.addr {
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            };
            add(&host, port, port == 80);
        }
        if endpoint.addr.is_unspecified() || endpoint.addr.is_loopback() {
            for host in ["localhost", "127.0.0.1", "[::1]"] {
                add(host, port, port == 80);
            }
        }
    }
    hosts
}

/// Checks one entry of `hosts`; lower case.
pub(super) fn host(text: &str) -> Result<String, Defect> {
    let normal = || -> Result<String, ResourceError> {
        let (host, port) = split_authority(text)?;
        let host = parse_host(host)?;
        Ok(match port {
            Some(port) => format!("{host}:{}", parse_port(port)?),
            None => host,
        })
    };
    normal().map_err(|_| Defect::Host { value: text.to_owned() })
}

/// Checks one entry of `origins`: an origin as browsers write it (RFC 6454, section 6.2); lower case, without the
/// default port of http and https.
pub(super) fn origin(text: &str) -> Result<String, Defect> {
    if text.contains('*') || text.eq_ignore_ascii_case("null") {
        return Err(Defect::OpaqueOrigin { value: text.to_owned() });
    }
    let normal = || -> Option<String> {
        let (scheme, authority) = text.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        let scheme_char = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        if !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.chars().all(scheme_char) {
            return None;
        }
        let (host, port) = split_authority(authority).ok()?;
        let host = parse_host(host).ok()?;
        let default = match scheme.as_str() {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        let port = port.map(parse_port).transpose().ok()?.filter(|p| Some(*p) != default);
        Some(match port {
            Some(port) => format!("{scheme}://{host}:{port}"),
            None => format!("{scheme}://{host}"),
        })
    };
    normal().ok_or_else(|| Defect::Origin { value: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::super::resource::parse_resource;
    use super::*;

    fn listen(text: &str) -> Listen {
        let address: std::net::SocketAddr = text.parse().expect("an endpoint");
        Listen { addr: address.ip(), port: address.port() }
    }

    #[test]
    fn default_hosts_have_both_forms_of_a_default_port() {
        let resources = ["https://mcp.example/mcp", "http://h:8080", "http://[2001:db8::1]"];
        let resources = resources.map(|r| parse_resource(r).expect("a resource"));
        assert_eq!(
            default_hosts(&resources, &[]),
            ["mcp.example", "mcp.example:443", "h:8080", "[2001:db8::1]", "[2001:db8::1]:80"]
        );
    }

    #[test]
    fn default_hosts_follow_the_endpoints() {
        assert_eq!(
            default_hosts(&[], &[listen("0.0.0.0:8080")]),
            ["localhost:8080", "127.0.0.1:8080", "[::1]:8080"]
        );
        assert_eq!(default_hosts(&[], &[listen("192.0.2.1:443")]), ["192.0.2.1:443"]);
        assert_eq!(
            default_hosts(&[], &[listen("127.0.0.1:80")]),
            ["127.0.0.1", "127.0.0.1:80", "localhost", "localhost:80", "[::1]", "[::1]:80"]
        );
    }

    #[test]
    fn host_values() {
        assert_eq!(host("MCP.Example:8080").as_deref(), Ok("mcp.example:8080"));
        assert_eq!(host("[::1]:80").as_deref(), Ok("[::1]:80"));
        for bad in ["", "*", "*.example", "http://h", "h/", "h:", "h:0", "u@h", "h h", "::1"] {
            assert!(host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn origin_values() {
        assert_eq!(origin("HTTPS://App.Example:443").as_deref(), Ok("https://app.example"));
        assert_eq!(origin("http://localhost:6274").as_deref(), Ok("http://localhost:6274"));
        assert_eq!(origin("vscode-webview://abc").as_deref(), Ok("vscode-webview://abc"));
        for bad in ["*", "null", "https://*.example"] {
            assert!(matches!(origin(bad), Err(Defect::OpaqueOrigin { .. })), "{bad}");
        }
        for bad in
            ["", "app.example", "https://h/", "https://h/x", "https://u@h", "https://", "://h", "1s://h"]
        {
            assert!(matches!(origin(bad), Err(Defect::Origin { .. })), "{bad}");
        }
    }
}
