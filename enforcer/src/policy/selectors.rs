//! What a workload is recognised by: the values that a policy's selectors may have.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// A pattern for a cgroup's path below the hierarchy's root: `/system.slice/agent-*.service/**`. `*` is any text within one segment, `**`
/// any number of segments, also none; every other character stands for itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CgroupGlob(String);

impl CgroupGlob {
    /// `None` unless it begins with `/`, has no empty, `.` or `..` segment, and `**` only as a whole segment.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let below = text.strip_prefix('/')?;
        // What stands for characters that are not shown would fit several of them.
        let good = |segment: &str| {
            !matches!(segment, "" | "." | "..")
                && (segment == "**" || !segment.contains("**"))
                && !segment.contains(char::REPLACEMENT_CHARACTER)
        };
        (below.is_empty() || below.split('/').all(good)).then(|| Self(text.to_owned()))
    }

    /// A path that it fits.
    #[must_use]
    pub fn example(&self) -> String {
        self.0.replace("**", "x").replace('*', "x")
    }

    /// Whether it fits a path.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let segments = |text: &'_ str| -> Vec<String> {
            text.split('/').filter(|segment| !segment.is_empty()).map(str::to_owned).collect()
        };
        let (pattern, path) = (segments(&self.0), segments(path));
        wild(
            &pattern,
            &path,
            |segment| segment == "**",
            |segment, name| {
                let chars = |text: &str| text.chars().collect::<Vec<_>>();
                wild(&chars(segment), &chars(name), |c| *c == '*', |a, b| a == b)
            },
        )
    }
}

impl fmt::Display for CgroupGlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a pattern, of which some items stand for any number of items, fits. In time of both lengths' product: the last of those items
/// takes one more whenever the rest does not fit.
fn wild<T>(
    pattern: &[T],
    items: &[T],
    any_number: impl Fn(&T) -> bool,
    fits: impl Fn(&T, &T) -> bool,
) -> bool {
    let (mut at, mut item) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while let Some(found) = items.get(item) {
        match pattern.get(at) {
            Some(wanted) if any_number(wanted) => {
                retry = Some((at, item));
                at += 1;
            }
            Some(wanted) if fits(wanted, found) => {
                at += 1;
                item += 1;
            }
            _ => {
                let Some((star, taken)) = retry else { return false };
                retry = Some((star, taken + 1));
                at = star + 1;
                item = taken + 1;
            }
        }
    }
    pattern.iter().skip(at).all(any_number)
}

/// Addresses with the same first bits. IPv4 addresses are never in a network of IPv6 ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network(IpNet);

impl Network {
    /// An address, or one with a prefix length behind which all bits are zero. `None` for IPv4-mapped addresses: those are IPv4 ones.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let network = text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse::<IpNet>()).ok()?;
        let mapped = matches!(network.addr(), IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
        (!mapped && network.trunc() == network).then_some(Self(network))
    }

    /// Its first address.
    #[must_use]
    pub fn first(&self) -> IpAddr {
        self.0.addr()
    }

    /// Whether the address lies in it; an IPv4-mapped one counts as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether a text is a SPIFFE id in the form that the SPIFFE-ID standard (section 2) asks for, with a path.
pub(super) fn is_spiffe_id(text: &str) -> bool {
    let Some((domain, path)) = text.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')) else {
        return false;
    };
    let domain_char = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
    let path_char = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let segment = |s: &str| !matches!(s, "" | "." | "..") && s.bytes().all(path_char);
    text.len() <= 2048
        && (1..=255).contains(&domain.len())
        && domain.bytes().all(domain_char)
        && path.split('/').all(segment)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn glob(text: &str) -> CgroupGlob {
        CgroupGlob::parse(text).expect(text)
    }

    #[test]
    fn globs_fit_by_segments() {
        for (pattern, fits, not) in [
            ("/", vec!["/"], vec!["/a"]),
            ("/**", vec!["/", "/a", "/a/b"], vec![]),
            ("/a", vec!["/a"], vec!["/", "/a/b", "/A", "/aa"]),
            ("/a/*", vec!["/a/b", "/a/.b"], vec!["/a", "/a/b/c"]),
            ("/a/**", vec!["/a", "/a/b", "/a/b/c"], vec!["/ab", "/b/a"]),
            ("/a/**/z", vec!["/a/z", "/a/b/z", "/a/z/z"], vec!["/a/z/y", "/z"]),
            ("/**/x-*.y/**", vec!["/x-1.y", "/q/x-.y/r"], vec!["/x.y", "/q/x-1.yz"]),
            ("/a*b*c", vec!["/abc", "/a1b2c", "/abbcc"], vec!["/ab", "/a/b/c"]),
            ("/a?[b]", vec!["/a?[b]"], vec!["/axb", "/a?b"]),
            ("/w\\x2dx", vec!["/w\\x2dx"], vec!["/w-x"]),
        ] {
            assert!(glob(pattern).matches(&glob(pattern).example()), "{pattern}");
            for path in fits {
                assert!(glob(pattern).matches(path), "{pattern} {path}");
            }
            for path in not {
                assert!(!glob(pattern).matches(path), "{pattern} {path}");
            }
        }
        for bad in ["", "a", "//", "/a/", "/a//b", "/a/..", "/./a", "/a**", "/***", "/\u{fffd}"] {
            assert_eq!(CgroupGlob::parse(bad), None, "{bad}");
        }
    }

    /// The textbook definition, which takes exponential time.
    fn by_definition(pattern: &[char], text: &[char]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            (['*', rest @ ..], _) => (0..=text.len()).any(|n| by_definition(rest, &text[n..])),
            ([a, rest @ ..], [b, others @ ..]) => a == b && by_definition(rest, others),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn stars_fit_as_defined(pattern in "[ab*]{0,8}", text in "[ab]{0,8}") {
            let [pattern, text] = [pattern, text].map(|t| t.chars().collect::<Vec<_>>());
            let found = wild(&pattern, &text, |c| *c == '*', |a, b| a == b);
            prop_assert_eq!(found, by_definition(&pattern, &text));
        }
    }

    #[test]
    fn networks_are_strict_and_know_mapped_addresses() {
        let network = |text: &str| Network::parse(text).expect(text);
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(network("10.0.0.0/8").contains(address("10.1.2.3")));
        assert!(network("10.0.0.0/8").contains(address("::ffff:10.1.2.3")));
        assert!(!network("10.0.0.0/8").contains(address("11.0.0.0")));
        assert!(network("::1").contains(address("::1")) && !network("::1").contains(address("::2")));
        assert!(!network("::/0").contains(address("10.1.2.3")));
        assert_eq!(network("10.0.0.1").to_string(), "10.0.0.1/32");
        for bad in
            ["", "10.0.0.1/8", "10/8", "::ffff:10.0.0.0/104", "fe80::1%eth0", "h", "10.0.0.0/33", "10.0.0.0/"]
        {
            assert_eq!(Network::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn spiffe_ids_by_their_standard() {
        assert!(is_spiffe_id("spiffe://prod.example/ns/tools/sa/Agent-1"));
        for bad in [
            "spiffe://prod.example",
            "spiffe://prod.example/",
            "spiffe:///a",
            "spiffe://Prod/a",
            "SPIFFE://prod/a",
            "spiffe://prod:80/a",
            "spiffe://prod/a/../b",
            "spiffe://prod/a//b",
            "spiffe://prod/a%20",
            "spiffe://prod/a?b",
            "https://prod/a",
        ] {
            assert!(!is_spiffe_id(bad), "{bad}");
        }
    }
}
