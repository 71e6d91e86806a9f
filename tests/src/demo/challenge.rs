//! Reading a `WWW-Authenticate` challenge.

use std::collections::BTreeMap;

/// The parameters of a `Bearer` challenge with quoted values (RFC 6750 section 3), or nothing if it is anything else: what
/// does not read exactly like that is not what was promised.
pub(super) fn parameters(challenge: &str) -> Option<BTreeMap<String, String>> {
    let mut rest = challenge.strip_prefix("Bearer ")?;
    let mut parameters = BTreeMap::new();
    loop {
        let (name, after) = rest.split_once("=\"")?;
        let (value, after) = after.split_once('"')?;
        let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        if !plain || parameters.insert(name.to_owned(), value.to_owned()).is_some() {
            return None;
        }
        if after.is_empty() {
            return Some(parameters);
        }
        rest = after.strip_prefix(", ")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_parameters_and_nothing_else() {
        let read = parameters("Bearer error=\"invalid_token\", scope=\"a b\"").unwrap_or_default();
        assert_eq!(read.get("error").map(String::as_str), Some("invalid_token"));
        assert_eq!(read.get("scope").map(String::as_str), Some("a b"));
        for bad in [
            "",
            "Bearer",
            "Basic realm=\"x\"",
            "Bearer a=\"1\", a=\"2\"",
            "Bearer a=\"1\" b=\"2\"",
            "Bearer a=1",
        ] {
            assert_eq!(parameters(bad), None, "{bad}");
        }
    }
}
