//! The decision, by the rows of the table of answers and of the ways around an enforcer.

use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;

use super::*;
use crate::http::head::Framing;
use crate::http::test_server::server;
use crate::policy::Server;
use crate::workload::{BindFault, Bound, CallerView};

mod callers;
mod paths;

/// Nobody knows who it is.
const REMOTE: CallerView<'_> = CallerView {
    workload: None,
    uid: u32::MAX,
    address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    is_of_this_host: false,
};

/// Knows tokens by their names; `good` holds every scope, `scopes.a.b` holds a and b (`~` stands for a colon).
struct Fake;

impl TokenVerifier for Fake {
    type Verified = Vec<String>;

    fn verify(&self, token: &str, server: &Server) -> Result<Self::Verified, TokenFault> {
        let issuer = || server.issuers[0].issuer.clone();
        match token {
            "good" => Ok(server.scopes.clone()),
            "rotated" => Err(TokenFault::UnknownKey { issuer: issuer(), kid: "k2".into() }),
            "unjudged" => Err(TokenFault::KeysUnavailable { issuer: issuer() }),
            "expired" => Err(TokenFault::Invalid { reason: "expired" }),
            _ => match token.strip_prefix("scopes") {
                Some(scopes) => Ok(scopes.split('.').skip(1).map(|scope| scope.replace('~', ":")).collect()),
                None => Err(TokenFault::Invalid { reason: "syntax" }),
            },
        }
    }

    fn bind(
        &self,
        verified: &Self::Verified,
        _: &Server,
        caller: &CallerView<'_>,
    ) -> Result<Bound, BindFault> {
        let holds = |scope: &str| verified.iter().any(|held| held == scope);
        match caller.workload {
            _ if holds("anothers") => Err(BindFault::OtherWorkload),
            None if holds("local") => Err(BindFault::CallerUnknown),
            _ => Ok(Bound { first_use: holds("first") }),
        }
    }

    fn missing_scopes(&self, verified: &Self::Verified, needed: &[String]) -> Vec<String> {
        needed.iter().filter(|scope| !verified.contains(scope)).cloned().collect()
    }
}

/// What became of a request, in a line.
fn outcome(text: &str, servers: &[&Server]) -> String {
    outcome_for(text, servers, &REMOTE)
}

fn outcome_for(text: &str, servers: &[&Server], caller: &CallerView<'_>) -> String {
    match decide(text.as_bytes(), servers, &Fake, caller, &Options::default()) {
        Decision::Allow { server_index, cacheable, first_use, .. } => {
            let first_use = if first_use { " first use" } else { "" };
            format!("allow {server_index}{}{first_use}", if cacheable { "" } else { " once" })
        }
        Decision::Public { server_index, cacheable, .. } => {
            format!("public {server_index}{}", if cacheable { "" } else { " once" })
        }
        Decision::Answer { answer, cache, .. } => {
            let close = if answer.close { " close" } else { "" };
            format!("{} {} {cache:?}{close}", answer.status, answer.reason)
        }
        Decision::NeedKey { issuer, kid, .. } => format!("key {kid} of {issuer}"),
    }
}

/// Each row: request line, further header lines, outcome. Host is that of the server.
fn check(servers: &[&Server], table: &[(&str, &str, &str)]) {
    for (line, lines, want) in table {
        let lines = lines.replace(" | ", "\r\n");
        let end = if lines.is_empty() { "" } else { "\r\n" };
        let text = format!("{line} HTTP/1.1\r\nHost: mcp.example.com\r\n{lines}{end}\r\n");
        assert_eq!(outcome(&text, servers), *want, "{line} {lines:?}");
    }
}

/// The rows of the table of answers, each with how long it may be repeated.
#[test]
fn table_of_answers() {
    let table = [
        ("POST /mcp", "Authorization: Bearer good | Content-Length: 9", "allow 0"),
        ("POST /mcp", "", "401 no-credentials UntilPolicyChange"),
        ("POST /mcp", "Authorization: Basic eDp5", "401 other-scheme UntilPolicyChange"),
        ("POST /mcp", "Authorization: Bearer expired", "401 expired Short"),
        ("POST /mcp", "Authorization: Bearer nonsense", "401 syntax Short"),
        (
            "POST /mcp",
            "Authorization: Bearer a | Authorization: Bearer a",
            "400 authorization-repeated UntilPolicyChange",
        ),
        ("POST /mcp", "Authorization: Bearer", "400 bearer-no-token UntilPolicyChange"),
        ("POST /mcp?access_token=good", "", "400 token-in-query UntilPolicyChange"),
        ("POST /mcp?access_token=x", "Authorization: Bearer good", "400 token-in-query UntilPolicyChange"),
        ("POST /mcp", "Authorization: Bearer scopes.other", "403 insufficient-scope Short"),
        ("POST /mcp", "Authorization: Bearer scopes.other.mcp~tools", "allow 0"),
        (
            "POST /mcp",
            "Origin: https://evil.example | Authorization: Bearer good",
            "403 origin-not-allowed UntilPolicyChange",
        ),
        ("POST /mcp", "Origin: null | Authorization: Bearer good", "403 origin-null UntilPolicyChange"),
        (
            "POST /mcp",
            "Origin: https://app.example.com | Origin: https://app.example.com",
            "403 origin-repeated UntilPolicyChange",
        ),
        ("POST /mcp", "Origin: https://app.example.com | Authorization: Bearer good", "allow 0"),
        (
            "POST /mcp",
            "Origin: https://app.example.com.evil | Authorization: Bearer good",
            "403 origin-not-allowed UntilPolicyChange",
        ),
        ("POST /mcp", "Authorization: Bearer unjudged", "503 keys-unavailable Never"),
        ("POST /mcp", "Authorization: Bearer rotated", "key k2 of https://login.example.com"),
    ];
    check(&[&server("/mcp")], &table);
}

/// "Host not on the list: 403 (DNS rebinding: Origin equals Host there, so check both against lists)".
#[test]
fn host_is_checked_against_the_list() {
    let server = server("/mcp");
    for (host, want) in [
        ("mcp.example.com", "allow 0"),
        ("MCP.Example.COM", "allow 0"),
        ("localhost:8080", "allow 0"),
        ("localhost", "403 host-not-allowed UntilPolicyChange"),
        ("mcp.example.com:8080", "403 host-not-allowed UntilPolicyChange"),
        ("mcp.example.com.", "403 host-not-allowed UntilPolicyChange"),
        ("evil.example", "403 host-not-allowed UntilPolicyChange"),
    ] {
        let text = format!("POST /mcp HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer good\r\n\r\n");
        assert_eq!(outcome(&text, &[&server]), want, "{host}");
    }
}

/// "Wrong method: 405"; the methods of every protocol version pass; only POST has a body.
#[test]
fn methods() {
    let table = [
        ("GET /mcp", "Authorization: Bearer good", "allow 0"),
        ("DELETE /mcp", "Authorization: Bearer good", "allow 0"),
        ("PUT /mcp", "Authorization: Bearer good", "405 method-not-allowed UntilPolicyChange"),
        ("PATCH /mcp", "", "405 method-not-allowed UntilPolicyChange"),
        ("post /mcp", "Authorization: Bearer good", "405 method-not-allowed UntilPolicyChange"),
        ("TRACE /mcp", "Authorization: Bearer good", "405 method-not-allowed UntilPolicyChange"),
        ("HEAD /mcp", "Authorization: Bearer good", "405 method-not-allowed Never"),
        ("GET /mcp", "Authorization: Bearer good | Content-Length: 4", "400 unexpected-body Never close"),
        (
            "DELETE /mcp",
            "Authorization: Bearer good | Transfer-Encoding: chunked",
            "400 unexpected-body Never close",
        ),
    ];
    check(&[&server("/mcp")], &table);
}

/// A head that differs from this one in Content-Length's digits alone is refused: the kernel, which masks them,
/// must not learn it.
#[test]
fn empty_body_of_a_get_is_not_remembered() {
    let table = [
        ("GET /mcp", "Authorization: Bearer good | Content-Length: 0", "allow 0 once"),
        ("GET /healthz", "Content-Length: 0", "public 0 once"),
        ("POST /mcp", "Authorization: Bearer good | Content-Length: 0", "allow 0"),
    ];
    check(&[&server("/mcp")], &table);
}

#[test]
fn preflights_are_answered_here_for_listed_origins_alone() {
    let table = [
        (
            "OPTIONS /mcp",
            "Origin: https://app.example.com | Access-Control-Request-Method: POST",
            "204 preflight Never",
        ),
        ("OPTIONS /mcp", "Origin: https://app.example.com", "405 method-not-allowed UntilPolicyChange"),
        (
            "OPTIONS /mcp",
            "Origin: https://evil.example | Access-Control-Request-Method: POST",
            "403 origin-not-allowed UntilPolicyChange",
        ),
        ("OPTIONS /mcp", "Access-Control-Request-Method: POST", "405 method-not-allowed UntilPolicyChange"),
        ("OPTIONS /mcp", "Authorization: Bearer good", "405 method-not-allowed UntilPolicyChange"),
    ];
    check(&[&server("/mcp")], &table);
}

#[test]
fn refusals_are_readable_by_listed_origins_alone() {
    let server = server("/mcp");
    let headers_for = |origin: &str| {
        let text = format!("POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\n{origin}\r\n");
        match decide(text.as_bytes(), &[&server], &Fake, &REMOTE, &Options::default()) {
            Decision::Answer { answer, .. } => String::from_utf8_lossy(&answer.bytes).into_owned(),
            other => panic!("{other:?}"),
        }
    };
    assert!(
        headers_for("Origin: https://app.example.com\r\n")
            .contains("Access-Control-Expose-Headers: WWW-Auth")
    );
    assert!(!headers_for("Origin: https://evil.example\r\n").contains("Access-Control"));
    assert!(!headers_for("").contains("Access-Control"));
}

/// Row 11 and 16: each head is judged by itself; there is no state that a good token could leave behind.
#[test]
fn row_16_two_tokens_are_judged_each_on_its_own() {
    let table = [
        ("POST /mcp", "Authorization: Bearer good", "allow 0"),
        ("POST /mcp", "Authorization: Bearer expired", "401 expired Short"),
        ("POST /mcp", "Authorization: Bearer good", "allow 0"),
        ("POST /mcp", "Authorization: Bearer scopes.mcp~tools", "allow 0"),
        ("POST /mcp", "", "401 no-credentials UntilPolicyChange"),
    ];
    check(&[&server("/mcp")], &table);
}

/// Row 10: two requests are two heads; bytes that hold both are not one.
#[test]
fn row_10_two_requests_are_not_one_head() {
    let good = "POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\nAuthorization: Bearer good\r\n\r\n";
    let bad = "POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\n\r\n";
    for text in [format!("{good}{bad}"), format!("{bad}{good}")] {
        assert_eq!(outcome(&text, &[&server("/mcp")]), "400 head-no-end Never close");
    }
}

/// Rows 12 to 14, through the whole decision and with a good token: the answer's status, and that it closes.
#[test]
fn rows_12_to_14_broken_heads_close() {
    let table = [
        ("POST /mcp", "Authorization: Bearer good | Content-Length: +1", "400 content-length Never close"),
        (
            "POST /mcp",
            "Authorization: Bearer good | Content-Length: 1 | Content-Length: 1",
            "400 header-repeated Never close",
        ),
        ("POST /mcp", "Authorization: Bearer good | Content-Length: 4294967296", "allow 0"),
        (
            "POST /mcp",
            "Authorization: Bearer good | Content-Length: 18446744073709551616",
            "413 body-too-large Never close",
        ),
        (
            "POST /mcp",
            "Authorization: Bearer good | Transfer-Encoding: xchunked",
            "501 transfer-encoding Never close",
        ),
        (
            "POST /mcp",
            "Authorization: Bearer good | Transfer-Encoding: chunked | Content-Length: 3",
            "400 length-and-encoding Never close",
        ),
        ("POST /mcp", "Authorization: Bearer good | Trailer: Authorization", "400 trailer Never close"),
        ("POST /mcp", "Authorization : Bearer good", "400 header-space-before-colon Never close"),
        ("POST /mcp", "Authorization: Bearer good | Upgrade: h2c", "501 upgrade Never close"),
        ("POST /mcp", "Authorization: Bearer good | Expect: a-miracle", "417 expect Never close"),
        (
            "POST http://mcp.example.com/mcp",
            "Authorization: Bearer good",
            "400 target-absolute-form Never close",
        ),
        (
            "CONNECT mcp.example.com:443",
            "Authorization: Bearer good",
            "501 target-authority-form Never close",
        ),
        ("OPTIONS *", "Authorization: Bearer good", "400 target-asterisk-form Never close"),
    ];
    check(&[&server("/mcp")], &table);
    for (text, want) in [
        ("PRI * HTTP/2.0\r\n\r\n", "505 http-2-preface Never close"),
        ("GET /mcp\r\n\r\n", "505 http-0-9 Never close"),
        ("GET /mcp HTTP/1.0\r\nAuthorization: Bearer good\r\n\r\n", "505 http-1-0 Never close"),
    ] {
        assert_eq!(outcome(text, &[&server("/mcp")]), want);
    }
}

/// Rows 13 and 14: what the kernel cannot recognise again is judged each time.
#[test]
fn only_plain_heads_are_remembered() {
    let table = [
        ("POST /mcp", "Authorization: Bearer good | Connection: keep-alive", "allow 0"),
        ("POST /mcp", "Authorization: Bearer good | Connection: close", "allow 0 once"),
        ("POST /mcp", "Authorization: Bearer good | Transfer-Encoding: chunked", "allow 0 once"),
        (
            "POST /mcp",
            "Authorization: Bearer good | Expect: 100-continue | Content-Length: 3",
            "allow 0 once",
        ),
        ("POST /mcp", "Connection: close", "401 no-credentials Never close"),
        ("POST /mcp", "Transfer-Encoding: chunked", "401 no-credentials Never close"),
        ("POST /mcp", "Expect: 100-continue | Content-Length: 3", "401 no-credentials Never close"),
    ];
    check(&[&server("/mcp")], &table);
}

/// "resource comes from policy, never from the request's Host".
#[test]
fn challenge_does_not_follow_the_host() {
    let server = server("/mcp");
    let text = "POST /mcp HTTP/1.1\r\nHost: localhost:8080\r\n\r\n";
    let Decision::Answer { answer, server_index, framing, .. } =
        decide(text.as_bytes(), &[&server], &Fake, &REMOTE, &Options::default())
    else {
        panic!("no credentials must be refused")
    };
    let shown = String::from_utf8_lossy(&answer.bytes).into_owned();
    assert!(
        shown.contains("https://mcp.example.com/.well-known/") && !shown.contains("localhost"),
        "{shown}"
    );
    assert_eq!((server_index, framing), (Some(0), Some(Framing::None)));
}

#[test]
fn unknown_key_after_the_refresh_is_401() {
    let server = server("/mcp");
    let text = "POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\nAuthorization: Bearer rotated\r\n\r\n";
    let options = Options { key_lookup: KeyLookup::Final, ..Options::default() };
    let decision = decide(text.as_bytes(), &[&server], &Fake, &REMOTE, &options);
    assert!(
        matches!(&decision, Decision::Answer { answer, cache: CacheFor::Short, .. } if answer.status == 401),
        "{decision:?}"
    );
}

/// "Never answer 401 to a request whose token is valid (clients drop the whole login)."
#[test]
fn valid_token_never_gets_401() {
    let server = server("/mcp");
    for method in ["POST", "GET", "DELETE", "PUT", "HEAD", "OPTIONS"] {
        for token in ["good", "scopes.none"] {
            for lines in ["", "Origin: https://evil.example\r\n", "Content-Length: 5\r\n", "Expect: x\r\n"] {
                let text = format!(
                    "{method} /mcp HTTP/1.1\r\nHost: mcp.example.com\r\nAuthorization: Bearer {token}\r\n{lines}\r\n"
                );
                assert!(!outcome(&text, &[&server]).starts_with("401"), "{text}");
            }
        }
    }
}

#[test]
fn debug_output_holds_no_token() {
    let server = server("/mcp");
    let text = "POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\nAuthorization: Bearer good\r\n\r\n";
    let decision = decide(text.as_bytes(), &[&server], &Fake, &REMOTE, &Options::default());
    assert!(matches!(decision, Decision::Allow { token: "good", .. }));
    assert!(!format!("{decision:?}").contains("good"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) })]

    /// However a request without a good token is written, it is never allowed; however one with it is spoiled,
    /// an allow has exactly that token.
    #[test]
    fn an_allow_has_the_good_token(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 0..4),
        with_token in any::<bool>(),
    ) {
        let line = if with_token { "Authorization: Bearer good\r\n" } else { "Cookie: Bearer good\r\n" };
        let mut bytes =
            format!("POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\n{line}Content-Length: 3\r\n\r\n").into_bytes();
        for (at, byte, kind) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes.insert(at, byte),
                1 => bytes[at] = byte,
                _ => drop(bytes.remove(at)),
            }
        }
        if let Decision::Allow { token, .. } = decide(&bytes, &[&server("/mcp")], &Fake, &REMOTE, &Options::default()) {
            prop_assert!(with_token);
            prop_assert_eq!(token, "good");
        }
    }
}
