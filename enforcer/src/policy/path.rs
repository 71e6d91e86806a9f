//! URL paths in a policy: only those that every server reads alike.

use thiserror::Error;

/// Longest accepted path, in bytes.
pub const MAX_PATH_BYTES: usize = 1024;

/// Why a text is not a path that a policy can name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PathError {
    /// The first character is not a slash.
    #[error("the path `{path}` does not begin with `/`")]
    NotAbsolute {
        /// The path.
        path: String,
    },
    /// Longer than [`MAX_PATH_BYTES`].
    #[error("the path has {found} bytes, at most {MAX_PATH_BYTES} are allowed")]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// A `//`, which some servers read as `/`.
    #[error("the path `{path}` holds an empty segment (`//`)")]
    EmptySegment {
        /// The path.
        path: String,
    },
    /// A `.` or `..` segment, which servers and clients resolve.
    #[error("the path `{path}` holds a `.` or `..` segment")]
    DotSegment {
        /// The path.
        path: String,
    },
    /// A character that servers decode, cut off or refuse.
    #[error("the path holds {found:?}, which servers read in different ways")]
    Character {
        /// The character.
        found: char,
    },
}

impl PathError {
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::NotAbsolute { .. } => "begin with a slash: /mcp",
            Self::TooLong { .. } => "shorten it",
            Self::EmptySegment { .. } | Self::DotSegment { .. } => {
                "write the path as the server sees it, resolved"
            }
            Self::Character { .. } => {
                "letters, digits and -._~!$&'()*+,=:@ between slashes; no escapes, no query"
            }
        }
    }
}

/// Checks a path: `/`, then segments of the characters that RFC 3986 (section 3.3) allows bare, without `;` and
/// percent-encodings, because servers disagree about what those mean.
///
/// # Errors
/// [`PathError`], the first defect.
pub fn check_path(path: &str) -> Result<(), PathError> {
    if !path.starts_with('/') {
        return Err(PathError::NotAbsolute { path: path.to_owned() });
    }
    if path.len() > MAX_PATH_BYTES {
        return Err(PathError::TooLong { found: path.len() });
    }
    if let Some(found) =
        path.chars().find(|c| !(c.is_ascii_alphanumeric() || "/-._~!$&'()*+,=:@".contains(*c)))
    {
        return Err(PathError::Character { found });
    }
    if path.contains("//") {
        return Err(PathError::EmptySegment { path: path.to_owned() });
    }
    if path.split('/').any(|segment| segment == "." || segment == "..") {
        return Err(PathError::DotSegment { path: path.to_owned() });
    }
    Ok(())
}

/// `inner` is `outer` or lies under it, by whole segments: `/mcp` contains `/mcp` and `/mcp/x`, not `/mcpx`. `/`
/// contains every path.
pub fn path_contains(outer: &str, inner: &str) -> bool {
    outer == "/" || inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_all_servers_read_alike() {
        for good in ["/", "/mcp", "/a/b/", "/v1.0/mcp", "/.well-known/x", "/a...b", "/a:b@c,d=e"] {
            assert_eq!(check_path(good), Ok(()), "{good}");
        }
        for (bad, character) in [
            ("/a%2f", '%'),
            ("/a;b", ';'),
            ("/a?b", '?'),
            ("/a#b", '#'),
            ("/a b", ' '),
            ("/a\tb", '\t'),
            ("/a\\b", '\\'),
            ("/a\u{7f}", '\u{7f}'),
            ("/ä", 'ä'),
            ("/a\u{0}", '\u{0}'),
        ] {
            assert_eq!(check_path(bad), Err(PathError::Character { found: character }), "{bad:?}");
        }
        for bad in ["", "mcp", "*", "http://h/x"] {
            assert!(matches!(check_path(bad), Err(PathError::NotAbsolute { .. })), "{bad}");
        }
        for bad in ["//", "//mcp", "/a//b"] {
            assert!(matches!(check_path(bad), Err(PathError::EmptySegment { .. })), "{bad}");
        }
        for bad in ["/.", "/..", "/a/./b", "/a/.."] {
            assert!(matches!(check_path(bad), Err(PathError::DotSegment { .. })), "{bad}");
        }
        let long = "/".to_owned() + &"a".repeat(MAX_PATH_BYTES);
        assert_eq!(check_path(&long), Err(PathError::TooLong { found: MAX_PATH_BYTES + 1 }));
    }

    #[test]
    fn containment_is_by_segments() {
        assert!(path_contains("/", "/mcp"));
        assert!(path_contains("/mcp", "/mcp"));
        assert!(path_contains("/mcp", "/mcp/"));
        assert!(path_contains("/mcp", "/mcp/x"));
        assert!(!path_contains("/mcp", "/mcpx"));
        assert!(!path_contains("/mcp/x", "/mcp"));
        assert!(!path_contains("/mcp", "/"));
        assert!(!path_contains("/mcp", "/MCP"));
    }
}
