//! The strict parser: what it accepts and what it refuses.

use super::*;

const LIMIT: usize = DEFAULT_MAX_HEAD_BYTES;

fn parse(text: &str) -> Result<Head<'_>, HeadError> {
    parse_head(text.as_bytes(), LIMIT)
}

/// A request with these header lines behind Host.
fn with(lines: &str) -> String {
    format!("POST /mcp HTTP/1.1\r\nHost: h\r\n{lines}\r\n")
}

fn reason(text: &str) -> &'static str {
    match parse(text) {
        Ok(_) => "accepted",
        Err(error) => error.reason(),
    }
}

fn check(table: &[(&str, &str)], wrap: impl Fn(&str) -> String) {
    for (input, want) in table {
        assert_eq!(reason(&wrap(input)), *want, "{input:?}");
    }
}

#[test]
fn plain_request_is_read() {
    let text = "POST /mcp?a=1 HTTP/1.1\r\nhOsT: mcp.example.com:8080\r\nAUTHORIZATION: bEaReR abc.def-~+/==\r\n\
                Content-Length: 12\r\nX-Any:\t v \t\r\nUser-Agent: caf\u{e9}\r\n\r\n";
    let head = parse(text).expect("a good head");
    assert_eq!((head.method(), head.path(), head.query()), ("POST", "/mcp", Some("a=1")));
    assert_eq!(head.target(), "/mcp?a=1");
    assert_eq!((head.host(), head.framing()), ("mcp.example.com:8080", Framing::ContentLength(12)));
    assert_eq!(head.credentials(), Credentials::Bearer("abc.def-~+/=="));
    assert_eq!(head.header("x-any"), Some(&b"v"[..]));
    assert_eq!(head.headers().count(), 5);
    assert_eq!((head.connection(), head.origin()), (Connection::Unsaid, Origin::None));
}

#[test]
fn debug_output_holds_no_token() {
    let text = with("Authorization: Bearer s3cret\r\n").replace("/mcp", "/mcp?k=s3cret");
    let shown = format!("{:?}", parse(&text).expect("a good head"));
    assert!(!shown.contains("s3cret"), "{shown}");
}

#[test]
fn row_12_content_length() {
    let table = [
        ("Content-Length: 0", "accepted"),
        ("Content-Length:7", "accepted"),
        ("Content-Length: 1099511627776", "accepted"),
        ("Content-Length: 1099511627777", "body-too-large"),
        ("Content-Length: 18446744073709551616", "body-too-large"),
        ("Content-Length: 99999999999999999999999999999", "body-too-large"),
        ("Content-Length: 5\r\nContent-Length: 5", "header-repeated"),
        ("Content-Length: 5\r\ncontent-length: 6", "header-repeated"),
        ("Content-Length: +5", "content-length"),
        ("Content-Length: -5", "content-length"),
        ("Content-Length: 05", "content-length"),
        ("Content-Length: 00", "content-length"),
        ("Content-Length: 0x5", "content-length"),
        ("Content-Length: 5, 5", "content-length"),
        ("Content-Length: 5 5", "content-length"),
        ("Content-Length: ", "content-length"),
        ("Content-Length:", "content-length"),
        ("Content-Length: 5 ", "header-whitespace"),
        ("Content-Length: 5\t", "header-whitespace"),
        ("Content-Length:  5", "header-whitespace"),
        ("Content-Length:\t5", "header-whitespace"),
        ("Content-Length: \u{665}", "header-obs-text"),
        ("Content_Length: 5", "header-underscore"),
        ("Content-Length : 5", "header-space-before-colon"),
    ];
    check(&table, |line| with(&format!("{line}\r\n")));
}

#[test]
fn row_12_transfer_encoding() {
    let table = [
        ("Transfer-Encoding: chunked", "accepted"),
        ("transfer-encoding: CHUNKED", "accepted"),
        ("Transfer-Encoding: xchunked", "transfer-encoding"),
        ("Transfer-Encoding: chunked, identity", "transfer-encoding"),
        ("Transfer-Encoding: identity", "transfer-encoding"),
        ("Transfer-Encoding: gzip, chunked", "transfer-encoding"),
        ("Transfer-Encoding: chunked,", "transfer-encoding"),
        ("Transfer-Encoding: \"chunked\"", "transfer-encoding"),
        ("Transfer-Encoding:", "transfer-encoding"),
        ("Transfer-Encoding: chunked ", "header-whitespace"),
        ("Transfer-Encoding: \tchunked", "header-whitespace"),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "header-repeated"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", "length-and-encoding"),
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", "length-and-encoding"),
        ("Transfer_Encoding: chunked", "header-underscore"),
        ("Transfer-Encoding\t: chunked", "header-space-before-colon"),
        ("Trailer: Authorization", "trailer"),
    ];
    check(&table, |line| with(&format!("{line}\r\n")));
    let text = with("Transfer-Encoding: Chunked\r\n");
    assert_eq!(parse(&text).map(|head| head.framing()), Ok(Framing::Chunked));
}

#[test]
fn row_13_lines() {
    let table = [
        ("POST /mcp HTTP/1.1\nHost: h\r\n\r\n", "head-bare-lf"),
        ("POST /mcp HTTP/1.1\r\nHost: h\nX: y\r\n\r\n", "head-bare-lf"),
        ("POST /mcp HTTP/1.1\r\nHost: h\rX: y\r\n\r\n", "head-bare-cr"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\r\n\r\n", "head-bare-cr"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nX: \0\r\n\r\n", "head-control-byte"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nX: \x7f\r\n\r\n", "head-control-byte"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nX: \x1b[0m\r\n\r\n", "head-control-byte"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nX: y\r\n z\r\n\r\n", "header-folded"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nX: y\r\n\tz\r\n\r\n", "header-folded"),
        ("POST /mcp HTTP/1.1\r\n Host: h\r\n\r\n", "header-folded"),
        ("POST /mcp HTTP/1.1\r\nHost : h\r\n\r\n", "header-space-before-colon"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\n: v\r\n\r\n", "header-no-name"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nnocolon\r\n\r\n", "header-no-colon"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nX(y): v\r\n\r\n", "header-name"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\nX\u{e9}: v\r\n\r\n", "header-name"),
        ("\r\nPOST /mcp HTTP/1.1\r\nHost: h\r\n\r\n", "request-line"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\n\r\nX: y\r\n\r\n", "head-no-end"),
        ("POST /mcp HTTP/1.1\r\nHost: h\r\n", "head-no-end"),
        ("", "head-no-end"),
        ("\r\n\r\n", "request-line"),
    ];
    check(&table, str::to_owned);
}

#[test]
fn row_13_authorization() {
    use CredentialsFault as Fault;
    let too_long = format!("Authorization: Bearer {}\r\n", "a".repeat(LIMIT));
    let table = [
        ("", Credentials::None),
        ("Cookie: session=abc; access_token=abc\r\n", Credentials::None),
        ("Proxy-Authorization: Bearer t\r\n", Credentials::None),
        ("Authorization: Bearer t0k.e_n==\r\n", Credentials::Bearer("t0k.e_n==")),
        ("aUTHORIZATION:BEARER t\r\n", Credentials::Bearer("t")),
        ("Authorization: Basic dTpw\r\n", Credentials::OtherScheme),
        ("Authorization: DPoP t\r\n", Credentials::OtherScheme),
        ("Authorization: Bearer a\r\nAuthorization: Bearer a\r\n", Credentials::Malformed(Fault::Repeated)),
        ("Authorization: Basic b\r\nauthorization: Bearer a\r\n", Credentials::Malformed(Fault::Repeated)),
        ("Authorization: Bearer  t\r\n", Credentials::Malformed(Fault::Whitespace)),
        ("Authorization: Bearer\tt\r\n", Credentials::Malformed(Fault::Whitespace)),
        ("Authorization: Bearer t \r\n", Credentials::Malformed(Fault::Whitespace)),
        ("Authorization:  Bearer t\r\n", Credentials::Malformed(Fault::Whitespace)),
        ("Authorization:\tBearer t\r\n", Credentials::Malformed(Fault::Whitespace)),
        ("Authorization: Bearer\r\n", Credentials::Malformed(Fault::NoToken)),
        ("Authorization: Bearer \r\n", Credentials::Malformed(Fault::NoToken)),
        ("Authorization: \r\n", Credentials::Malformed(Fault::NoScheme)),
        ("Authorization:\r\n", Credentials::Malformed(Fault::NoScheme)),
        ("Authorization: , Bearer t\r\n", Credentials::Malformed(Fault::NoScheme)),
        ("Authorization: Basic x, Bearer t\r\n", Credentials::Malformed(Fault::TokenSyntax)),
        ("Authorization: Bearer a b\r\n", Credentials::Malformed(Fault::TokenSyntax)),
        ("Authorization: Bearer a,b\r\n", Credentials::Malformed(Fault::TokenSyntax)),
        ("Authorization: Bearer a=b\r\n", Credentials::Malformed(Fault::TokenSyntax)),
        ("Authorization: Bearer ==\r\n", Credentials::Malformed(Fault::TokenSyntax)),
        ("Authorization: Bearer \"t\"\r\n", Credentials::Malformed(Fault::TokenSyntax)),
    ];
    for (lines, want) in table {
        let text = with(lines);
        assert_eq!(parse(&text).map(|head| head.credentials()), Ok(want), "{lines:?}");
    }
    let text = with(&too_long);
    assert_eq!(reason(&text), "head-too-large");
    let head = parse_head(text.as_bytes(), LIMIT * 2).expect("within the larger limit");
    assert!(matches!(head.credentials(), Credentials::Bearer(token) if token.len() == MAX_TOKEN_BYTES));
    let text = text.replace("Bearer ", "Bearer a");
    let head = parse_head(text.as_bytes(), LIMIT * 2).expect("within the larger limit");
    assert!(matches!(head.credentials(), Credentials::Malformed(Fault::TokenTooLong { .. })));
}

/// RFC 6750, section 2.3 is not served: "Access tokens MUST NOT be included in the URI query string" (MCP).
#[test]
fn row_15_token_in_query_is_malformed_even_with_a_good_header() {
    for query in [
        "access_token=t",
        "a=1&access_token=t",
        "access_token",
        "a;access_token=t",
        "%61ccess_token=t",
        "access%5Ftoken=t",
        "%61%63%63%65%73%73%5f%74%6f%6b%65%6e=t",
        "ACCESS_TOKEN=t",
        "a=1&&access_token=",
    ] {
        let text = with("Authorization: Bearer t\r\n").replace("/mcp", &format!("/mcp?{query}"));
        let want = Credentials::Malformed(CredentialsFault::TokenInQuery);
        assert_eq!(parse(&text).map(|head| head.credentials()), Ok(want), "{query}");
    }
    for query in ["", "token=t", "a=access_token", "access_tokens=t", "access_token%=t", "%"] {
        let text = with("Authorization: Bearer t\r\n").replace("/mcp", &format!("/mcp?{query}"));
        assert_eq!(parse(&text).map(|head| head.credentials()), Ok(Credentials::Bearer("t")), "{query}");
    }
}

#[test]
fn row_14_versions_and_target_forms() {
    let table = [
        ("POST /mcp HTTP/1.1", "accepted"),
        ("POST /mcp HTTP/1.0", "http-1-0"),
        ("GET /mcp", "http-0-9"),
        ("PRI * HTTP/2.0", "http-2-preface"),
        ("POST /mcp HTTP/2.0", "http-version"),
        ("POST /mcp HTTP/1.2", "http-version"),
        ("POST /mcp HTTP/1.10", "http-version"),
        ("POST /mcp http/1.1", "request-line"),
        ("POST  /mcp HTTP/1.1", "request-line"),
        ("POST /mcp  HTTP/1.1", "request-line"),
        ("POST /mcp HTTP/1.1 ", "request-line"),
        (" POST /mcp HTTP/1.1", "request-line"),
        ("POST\t/mcp HTTP/1.1", "request-line"),
        ("POST /a b HTTP/1.1", "request-line"),
        ("POST", "request-line"),
        ("P(ST /mcp HTTP/1.1", "method-syntax"),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFG /mcp HTTP/1.1", "method-syntax"),
        ("CONNECT h:443 HTTP/1.1", "target-authority-form"),
        ("CONNECT /mcp HTTP/1.1", "target-authority-form"),
        ("POST h:80 HTTP/1.1", "target-authority-form"),
        ("POST mcp HTTP/1.1", "target-authority-form"),
        ("POST http://h/mcp HTTP/1.1", "target-absolute-form"),
        ("OPTIONS * HTTP/1.1", "target-asterisk-form"),
        ("POST /mcp#f HTTP/1.1", "target-syntax"),
        ("POST /mcp?a#f HTTP/1.1", "target-syntax"),
        ("POST /mcp?\u{e9} HTTP/1.1", "target-syntax"),
        ("POST /mcp?\t HTTP/1.1", "target-syntax"),
    ];
    check(&table, |line| format!("{line}\r\nHost: h\r\n\r\n"));
    assert_eq!(reason("PRI * HTTP/2.0\r\n\r\n"), "http-2-preface");
    assert_eq!(reason("GET /mcp\r\n\r\n"), "http-0-9");
}

#[test]
fn row_14_upgrades_and_expectations() {
    let table = [
        ("Upgrade: h2c", "upgrade"),
        ("Upgrade: websocket\r\nConnection: Upgrade", "upgrade"),
        ("HTTP2-Settings: AAA", "upgrade"),
        ("Connection: Upgrade, HTTP2-Settings", "upgrade"),
        ("Connection: keep-alive", "accepted"),
        ("Connection: Close", "accepted"),
        ("Connection: close , TE\r\nTE: trailers", "accepted"),
        ("Connection: close, keep-alive", "connection-conflict"),
        ("Connection: close\r\nConnection: close", "header-repeated"),
        ("Connection: authorization", "connection-option"),
        ("Connection: close, Content-Length", "connection-option"),
        ("Connection: x-anything", "connection-option"),
        ("Connection:", "connection-option"),
        ("TE: deflate", "te"),
        ("Expect: 100-Continue", "accepted"),
        ("Expect: 100-continue, x", "expect"),
        ("Expect: 200-ok", "expect"),
        ("Expect: 100-continue\r\nExpect: 100-continue", "header-repeated"),
    ];
    check(&table, |line| with(&format!("{line}\r\n")));
    let text = with("Expect: 100-continue\r\nConnection: close\r\n");
    let head = parse(&text).expect("a good head");
    assert!(head.expects_continue());
    assert_eq!(head.connection(), Connection::Close);
}

#[test]
fn row_15_paths() {
    let table = [
        ("/", "accepted"),
        ("/mcp/", "accepted"),
        ("/a/b.c/~d/...", "accepted"),
        ("//mcp", "path-empty-segment"),
        ("/mcp//", "path-empty-segment"),
        ("/./mcp", "path-dot-segment"),
        ("/mcp/.", "path-dot-segment"),
        ("/mcp/..", "path-dot-segment"),
        ("/mcp/../admin", "path-dot-segment"),
        ("/%6dcp", "path-percent"),
        ("/mcp%2f..%2fadmin", "path-percent"),
        ("/mcp;x=1", "path-parameters"),
        ("/mcp/..;/admin", "path-parameters"),
        ("/\\mcp", "path-backslash"),
        ("/mcp\"", "path-character"),
        ("/<mcp>", "path-character"),
        ("/mcp?//..%2f;", "accepted"),
    ];
    check(&table, |path| format!("POST {path} HTTP/1.1\r\nHost: h\r\n\r\n"));
}

/// "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1 request message that lacks a Host
/// header field and to any request message that contains more than one" (RFC 9112, section 3.2).
#[test]
fn host_is_there_once_and_well_formed() {
    let table = [
        ("", "host-missing"),
        ("Host: a\r\nHost: a\r\n", "header-repeated"),
        ("Host: a\r\nhost: b\r\n", "header-repeated"),
        ("Host:\r\n", "host-syntax"),
        ("Host: a,b\r\n", "host-syntax"),
        ("Host: u@a\r\n", "host-syntax"),
        ("Host: a/b\r\n", "host-syntax"),
        ("Host: a b\r\n", "host-syntax"),
        ("Host: a:\r\n", "host-syntax"),
        ("Host: a:8o\r\n", "host-syntax"),
        ("Host: a:123456\r\n", "host-syntax"),
        ("Host: a%41\r\n", "host-syntax"),
        ("Host: [::1\r\n", "host-syntax"),
        ("Host: [fe80::1%25eth0]\r\n", "host-syntax"),
        ("Host: []\r\n", "host-syntax"),
        ("Host: [::1]x\r\n", "host-syntax"),
        ("Host: \u{e9}\r\n", "header-obs-text"),
        ("Host:  a\r\n", "header-whitespace"),
        ("Host: [::1]:8080\r\n", "accepted"),
        ("Host: [::ffff:127.0.0.1]\r\n", "accepted"),
        ("Host: 127.0.0.1:80\r\n", "accepted"),
    ];
    check(&table, |lines| format!("POST /mcp HTTP/1.1\r\n{lines}\r\n"));
    assert_eq!(HeadError::HostMissing.status(), 400);
    assert_eq!(HeadError::Repeated { header: "host" }.status(), 400);
}

#[test]
fn row_17_headers_that_matter_are_not_imitated_or_repeated() {
    let table = [
        ("Mcp-Session-Id: a\r\nMcp-Session-Id: a", "header-repeated"),
        ("Mcp-Name: a\r\nmcp-name: b", "header-repeated"),
        ("Mcp-Name: a\r\nMcp-Method: b", "accepted"),
        ("Mcp-Name: \u{e9}", "header-obs-text"),
        ("Mcp_Name: a", "header-underscore"),
        ("Content-Type: a\r\nContent-Type: a", "header-repeated"),
        ("Content_Type: a", "header-underscore"),
        ("X-HTTP-Method-Override: DELETE", "header-rewrite"),
        ("X-Original-URL: /admin", "header-rewrite"),
        ("X_Rewrite_URL: /admin", "header-underscore"),
        ("Cookie: a\r\nCookie: b", "accepted"),
        ("User-Agent: \u{e9}\r\nUser-Agent: b", "accepted"),
    ];
    check(&table, |line| with(&format!("{line}\r\n")));
    let text = with("Origin: a\r\nOrigin: a\r\n");
    assert_eq!(parse(&text).map(|head| head.origin()), Ok(Origin::Several));
}

#[test]
fn row_7_bounds() {
    let lines = "a: b\r\n".repeat(MAX_HEADERS - 1);
    assert_eq!(reason(&with(&lines)), "accepted");
    assert_eq!(reason(&with(&format!("{lines}a: b\r\n"))), "too-many-headers");
    assert_eq!(reason(&with(&"a:\r\n".repeat(4000))), "too-many-headers");
    let text = with("");
    assert!(parse_head(text.as_bytes(), text.len()).is_ok());
    let error = parse_head(text.as_bytes(), text.len() - 1).expect_err("over the limit");
    assert_eq!((error.reason(), error.status()), ("head-too-large", 431));
}

#[test]
fn statuses() {
    for (error, status) in [
        (HeadError::Http09, 505),
        (HeadError::Http10, 505),
        (HeadError::Http2Preface, 505),
        (HeadError::Version, 505),
        (HeadError::Upgrade, 501),
        (HeadError::AuthorityForm, 501),
        (HeadError::TransferEncoding, 501),
        (HeadError::BodyTooLarge { max_bytes: MAX_BODY_BYTES }, 413),
        (HeadError::Expect, 417),
        (HeadError::TooManyHeaders { max: MAX_HEADERS }, 431),
        (HeadError::LengthAndEncoding, 400),
        (HeadError::Path(PathFault::Percent), 400),
    ] {
        assert_eq!(error.status(), status, "{error}");
    }
}

#[test]
fn row_10_the_head_ends_at_the_first_empty_line() {
    let one = with("");
    let two = format!("{one}{one}");
    assert_eq!(find_head_end(two.as_bytes()), Some(one.len()));
    for cut in 0..one.len() {
        assert_eq!(find_head_end(one.as_bytes().get(..cut).unwrap_or_default()), None, "{cut}");
    }
    assert_eq!(reason(&two), "head-no-end");
}

#[test]
fn other_protocols_are_told_apart() {
    for http in [&b""[..], b"G", b"GET ", b"POST /mcp HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n", b"M-SEARCH * "] {
        assert!(may_become_head(http), "{http:?}");
    }
    for other in [&b"\x16\x03\x01"[..], b"\r\n", b" GET", b"GET\t", b"SSH-2.0-x\r\n", &[b'A'; 40]] {
        assert!(!may_become_head(other), "{other:?}");
    }
}
