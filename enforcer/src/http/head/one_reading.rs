//! Whatever the strict parser accepts, lenient parsers read alike.

use proptest::prelude::*;

use super::*;

const LIMIT: usize = DEFAULT_MAX_HEAD_BYTES;

/// How a lenient server might read a head: any line end, any case, any white space, first header or last header.
/// Shares no code with the parser under test.
mod lenient {
    pub(super) struct Reading {
        pub(super) method: String,
        pub(super) target: String,
        pub(super) headers: Vec<(String, String)>,
    }

    pub(super) fn read(bytes: &[u8], line_end: fn(&char) -> bool) -> Option<Reading> {
        let text: String = bytes.iter().map(|b| char::from(*b)).collect();
        let mut lines: Vec<String> = vec![String::new()];
        for c in text.chars().filter(|c| *c != '\0') {
            if line_end(&c) {
                lines.push(String::new());
            } else if c != '\r' && c != '\n' {
                lines.last_mut()?.push(c);
            }
        }
        let mut words = lines.first()?.split_whitespace();
        let method = words.next()?.to_uppercase();
        let target = words.next()?.to_owned();
        let mut headers: Vec<(String, String)> = Vec::new();
        for line in lines.iter().skip(1).filter(|line| !line.is_empty()) {
            match line.split_once(':') {
                Some((name, value)) if !line.starts_with([' ', '\t']) => {
                    let name = name.trim().to_lowercase().replace('_', "-");
                    headers.push((name, value.trim().to_owned()));
                }
                _ => headers.last_mut()?.1.push_str(line.trim()),
            }
        }
        Some(Reading { method, target, headers })
    }

    impl Reading {
        pub(super) fn all(&self, name: &str) -> Vec<&str> {
            self.headers.iter().filter(|(have, _)| have == name).map(|(_, value)| value.as_str()).collect()
        }
    }
}

/// Every lenient reading of an accepted head must equal ours.
fn assert_one_reading(bytes: &[u8], head: &Head<'_>) {
    let by_lf: fn(&char) -> bool = |c| *c == '\n';
    let by_cr: fn(&char) -> bool = |c| *c == '\r';
    for line_end in [by_lf, by_cr] {
        let reading = lenient::read(bytes, line_end).expect("an accepted head has lines");
        assert_eq!(reading.method, head.method().to_uppercase());
        assert_eq!(reading.target, head.target());
        let (mut lengths, mut encodings) = (reading.all("content-length"), reading.all("transfer-encoding"));
        let framing = match (lengths.pop(), encodings.pop()) {
            (None, None) => Framing::None,
            (Some(len), None) => Framing::ContentLength(len.parse().expect("a number")),
            (None, Some(coding)) if coding.to_lowercase() == "chunked" => Framing::Chunked,
            other => panic!("read as {other:?}"),
        };
        assert_eq!(framing, head.framing());
        assert!(lengths.is_empty() && encodings.is_empty());
        assert_eq!(reading.all("host"), [head.host()]);
        let tokens: Vec<_> = reading
            .all("authorization")
            .into_iter()
            .filter_map(|value| value.split_at_checked(7))
            .filter(|(scheme, _)| scheme.to_lowercase() == "bearer ")
            .map(|(_, token)| token)
            .collect();
        match head.credentials() {
            Credentials::Bearer(token) => assert_eq!(tokens, [token]),
            Credentials::None | Credentials::OtherScheme => assert!(tokens.is_empty(), "{}", tokens.len()),
            Credentials::Malformed(_) => {}
        }
    }
}

fn piece() -> impl Strategy<Value = Vec<u8>> {
    let known = prop::sample::select(vec![
        "\r\n",
        "\r\n",
        "\r\n",
        "\r\n\r\n",
        "\r",
        "\n",
        "\0",
        " ",
        " ",
        "\t",
        ":",
        ": ",
        ",",
        ";",
        "\u{e9}",
        "GET ",
        "POST ",
        "CONNECT ",
        "/mcp",
        "/",
        "//",
        "/..",
        "%2e",
        "?a=b",
        "?access_token=x",
        " HTTP/1.1",
        " HTTP/1.1\r\n",
        " HTTP/1.0",
        "Host: h\r\n",
        "Host: h",
        "Content-Length: 5",
        "Content-Length: 5\r\n",
        "content_length: 6\r\n",
        "5",
        "+5",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: ",
        "chunked",
        "identity",
        "Authorization: Bearer abc\r\n",
        "authorization: ",
        "Bearer ",
        "bearer x",
        "Basic ",
        "Connection: ",
        "close",
        "keep-alive",
        "upgrade",
        "Expect: 100-continue\r\n",
        "X-Y: z\r\n",
        "User-Agent: ",
        "Origin: null\r\n",
    ])
    .prop_map(|text| text.as_bytes().to_vec());
    prop_oneof![9 => known, 1 => prop::collection::vec(any::<u8>(), 0..4)]
}

/// Good heads, spoiled in up to two places: most of what is refused is refused for a small reason.
fn nearly_good() -> impl Strategy<Value = Vec<u8>> {
    let lines = prop::collection::vec(
        prop::sample::select(vec![
            "Content-Length: 5\r\n",
            "Transfer-Encoding: chunked\r\n",
            "Authorization: Bearer abc\r\n",
            "authorization:Basic x\r\n",
            "Accept: */*\r\n",
            "User-Agent:  a b \r\n",
            "Connection: close\r\n",
            "Mcp-Name: x\r\n",
            "Cookie: a=b\r\n",
            "Origin: https://a\r\n",
            "X-Empty:\r\n",
            "TE: trailers\r\n",
        ]),
        0..5,
    );
    let edits = prop::collection::vec((any::<prop::sample::Index>(), 0..3_u8, piece()), 0..3);
    (lines, edits).prop_map(|(lines, edits)| {
        let mut bytes = format!("POST /mcp HTTP/1.1\r\nHost: h\r\n{}\r\n", lines.concat()).into_bytes();
        for (at, kind, with) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => drop(bytes.splice(at..at, with)),
                1 => drop(bytes.splice(at..=at, with)),
                _ => drop(bytes.remove(at)),
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_head(&bytes, LIMIT);
        let _ = (find_head_end(&bytes), may_become_head(&bytes));
    }

    #[test]
    fn random_pieces_have_one_reading(pieces in prop::collection::vec(piece(), 0..14)) {
        let bytes = pieces.concat();
        if let Ok(head) = parse_head(&bytes, LIMIT) {
            assert_one_reading(&bytes, &head);
        }
    }

    #[test]
    fn spoiled_heads_have_one_reading(bytes in nearly_good()) {
        if let Ok(head) = parse_head(&bytes, LIMIT) {
            assert_one_reading(&bytes, &head);
            prop_assert_eq!(find_head_end(&bytes), Some(bytes.len()));
        }
    }
}
