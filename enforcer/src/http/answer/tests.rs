//! Each answer as a client's parser sees it, and the rows of the table that it implements.

use serde_json::Value;

use super::*;
use crate::http::head::{DEFAULT_MAX_HEAD_BYTES, parse_head};
use crate::http::metadata;
use crate::http::test_server::server;

struct Parsed {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Parsed {
    fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(have, _)| have.eq_ignore_ascii_case(name));
        let value = found.next().map(|(_, value)| value.as_str());
        assert!(found.next().is_none(), "{name} twice");
        value
    }
}

fn read(bytes: &[u8]) -> Parsed {
    let mut slots = [httparse::EMPTY_HEADER; 16];
    let mut response = httparse::Response::new(&mut slots);
    let Ok(httparse::Status::Complete(head_len)) = response.parse(bytes) else { panic!("not a whole head") };
    assert_eq!(response.version, Some(1));
    Parsed {
        status: response.code.expect("a status"),
        headers: response
            .headers
            .iter()
            .map(|h| (h.name.to_owned(), String::from_utf8(h.value.to_vec()).expect("ASCII")))
            .collect(),
        body: bytes[head_len..].to_vec(),
    }
}

/// Reads an answer and checks what holds for every refusal.
fn refusal(draft: Draft) -> Parsed {
    let answer = draft.finish("POST");
    let parsed = read(&answer.bytes);
    assert_eq!(parsed.status, answer.status);
    assert_eq!(parsed.header("content-length"), Some(parsed.body.len().to_string().as_str()));
    assert_eq!(parsed.header("content-type"), Some("application/json"));
    assert_eq!(parsed.header("cache-control"), Some("no-store"));
    assert_eq!(parsed.header("connection"), answer.close.then_some("close"));
    let body: Value = serde_json::from_slice(&parsed.body).expect("JSON");
    assert_eq!(body["jsonrpc"], "2.0");
    assert!(body["id"].is_null());
    let code = body["error"]["code"].as_i64().expect("a code");
    assert!(!(-32768..=-32000).contains(&code));
    assert!(body["error"]["message"].is_string());
    parsed
}

const URL: &str = "https://mcp.example.com/.well-known/oauth-protected-resource/mcp";

fn challenge_of(draft: Draft) -> (u16, String) {
    let parsed = refusal(draft);
    (parsed.status, parsed.header("www-authenticate").expect("a challenge").to_owned())
}

/// Row "no credentials": 401, metadata and scope, no error.
#[test]
fn no_credentials_is_401_without_error() {
    let want = format!(r#"Bearer resource_metadata="{URL}", scope="mcp:tools""#);
    assert_eq!(challenge_of(no_credentials(&server("/mcp"), "no-credentials")), (401, want));
}

/// Row "bad, expired, wrong audience, ...".
#[test]
fn bad_token_is_401_invalid_token() {
    let want = format!(
        "Bearer error=\"invalid_token\", error_description=\"The access token is not valid here\", \
         resource_metadata=\"{URL}\", scope=\"mcp:tools\""
    );
    assert_eq!(challenge_of(invalid_token(&server("/mcp"), "expired")), (401, want));
}

/// Row "malformed authorization".
#[test]
fn malformed_authorization_is_400_invalid_request() {
    let want = format!(r#"Bearer error="invalid_request", resource_metadata="{URL}", scope="mcp:tools""#);
    assert_eq!(challenge_of(invalid_request(&server("/mcp"), CredentialsFault::Repeated)), (400, want));
}

/// Row "scope missing": every scope in one challenge.
#[test]
fn missing_scope_is_403_with_all_scopes() {
    let needed = ["a".to_owned(), "b".to_owned()];
    let want = format!(r#"Bearer error="insufficient_scope", resource_metadata="{URL}", scope="a b""#);
    assert_eq!(challenge_of(insufficient_scope(&server("/mcp"), &needed)), (403, want));
}

/// Row "client or workload not allowed" and row "Origin, Host": nothing to ask for.
#[test]
fn forbidden_is_403_without_challenge() {
    let parsed = refusal(forbidden("origin-not-allowed"));
    assert_eq!((parsed.status, parsed.header("www-authenticate")), (403, None));
}

#[test]
fn other_refusals() {
    let parsed = refusal(method_not_allowed(MCP_METHODS));
    assert_eq!((parsed.status, parsed.header("allow")), (405, Some("POST, GET, DELETE")));
    assert_eq!(refusal(not_found()).status, 404);
    let parsed = refusal(unavailable("draining", 7));
    assert_eq!((parsed.status, parsed.header("retry-after")), (503, Some("7")));
    let parsed = refusal(over_limit("subject-rate", 2));
    assert_eq!((parsed.status, parsed.header("retry-after")), (429, Some("2")));
    let error = parse_head(b"GET / HTTP/1.0\r\n\r\n", DEFAULT_MAX_HEAD_BYTES).expect_err("HTTP/1.0");
    let parsed = refusal(broken_head(&error));
    assert_eq!((parsed.status, parsed.header("connection")), (505, Some("close")));
}

#[test]
fn every_head_error_has_a_phrase() {
    for status in [400, 413, 417, 431, 501, 505] {
        assert_ne!(phrase(status), "Error", "{status}");
    }
}

#[test]
fn offline_access_is_never_challenged() {
    let mut server = server("/mcp");
    server.scopes = vec!["offline_access".into()];
    let (_, challenge) = challenge_of(no_credentials(&server, "no-credentials"));
    assert_eq!(challenge, format!(r#"Bearer resource_metadata="{URL}""#));
    let needed = ["x".to_owned(), "offline_access".to_owned()];
    let (_, challenge) = challenge_of(insufficient_scope(&server, &needed));
    assert!(challenge.ends_with(r#"scope="x""#), "{challenge}");
}

#[test]
fn quoted_strings_cannot_be_left() {
    assert_eq!(challenge::quoted("a\"b\\c"), r#""a\"b\\c""#);
    assert_eq!(challenge::quoted("a\r\nX: y\u{e9}\0"), "\"aX: y\"");
    let mut server = server("/mcp");
    server.scopes = vec!["a\"\r\nEvil: yes".into()];
    let parsed = refusal(no_credentials(&server, "no-credentials"));
    assert_eq!(parsed.header("evil"), None);
    assert!(
        parsed.header("www-authenticate").is_some_and(|value| value.ends_with(r#"scope="a\"Evil: yes""#))
    );
    let parsed = refusal(forbidden("x").readable_by("https://a\r\nEvil: yes"));
    assert_eq!(parsed.header("evil"), None);
}

/// The kernel overwrites a request with it: a request of a usual client is longer.
#[test]
fn typical_401_is_short() {
    let answer = no_credentials(&server("/mcp"), "no-credentials").finish("POST");
    assert!(answer.bytes.len() <= 330, "{} bytes", answer.bytes.len());
}

/// RFC 9110, section 9.3.2: "the server MUST NOT send content in the response" to HEAD.
#[test]
fn head_gets_no_body() {
    let answer = not_found().finish("HEAD");
    let parsed = read(&answer.bytes);
    assert!(parsed.body.is_empty());
    assert!(parsed.header("content-length").is_some_and(|len| len != "0"));
}

#[test]
fn templates_stretch_to_every_length() {
    let server = server("/mcp");
    let answers = [
        no_credentials(&server, "no-credentials").finish("POST"),
        invalid_token(&server, "expired").finish("POST"),
        forbidden("host-not-allowed").finish("POST"),
        not_found().finish("GET"),
        metadata::draft(&server, "GET").finish("GET"),
    ];
    for answer in answers {
        let template = template(&answer).expect("it has a body and stays open");
        let plain = read(&answer.bytes);
        assert_eq!(template.min_len, template.bytes.len());
        assert_eq!(template.stretched(template.min_len), Some(template.bytes.clone()));
        assert_eq!(template.stretched(template.min_len - 1), None);
        assert_eq!(template.stretched(MAX_TEMPLATE_BYTES + 1), None);
        for len in template.min_len..=MAX_TEMPLATE_BYTES {
            let reply = template.stretched(len).expect("within bounds");
            assert_eq!(reply.len(), len);
            let parsed = read(&reply);
            assert_eq!(parsed.status, plain.status);
            assert_eq!(parsed.header("content-length"), Some(parsed.body.len().to_string().as_str()));
            assert_eq!(parsed.header("www-authenticate"), plain.header("www-authenticate"));
            assert_eq!(parsed.headers.len(), plain.headers.len());
            let (have, want): (Value, Value) = (
                serde_json::from_slice(&parsed.body).expect("JSON"),
                serde_json::from_slice(&plain.body).expect("JSON"),
            );
            assert_eq!(have, want);
        }
        let field = &template.bytes[template.content_length_at - 16..template.content_length_at + 6];
        assert!(field.starts_with(b"Content-Length: ") && field.ends_with(b"\r\n"), "{field:?}");
    }
}

#[test]
fn what_the_kernel_cannot_send_is_no_template() {
    assert_eq!(template(&not_found().closing().finish("GET")), None);
    assert_eq!(template(&not_found().finish("HEAD")), None);
    assert_eq!(template(&preflight("https://app.example.com").finish("OPTIONS")), None);
    let mut server = server("/mcp");
    server.scopes = vec!["s".repeat(MAX_TEMPLATE_BYTES)];
    assert_eq!(template(&no_credentials(&server, "no-credentials").finish("POST")), None);
}

#[test]
fn preflight_allows_what_mcp_clients_send() {
    let answer = preflight("https://app.example.com").finish("OPTIONS");
    let parsed = read(&answer.bytes);
    assert_eq!((parsed.status, parsed.body.len()), (204, 0));
    assert_eq!(parsed.header("content-length"), None);
    assert_eq!(parsed.header("access-control-allow-origin"), Some("https://app.example.com"));
    let allowed = parsed.header("access-control-allow-headers").expect("a list");
    for header in ["Authorization", "Content-Type", "Mcp-Protocol-Version", "Mcp-Session-Id", "Last-Event-ID"]
    {
        assert!(allowed.split(", ").any(|have| have == header), "{header}");
    }
}

#[test]
fn metadata_document_has_the_fields_of_rfc_9728() {
    let server = server("/mcp");
    let answer = metadata::draft(&server, "GET").finish("GET");
    let parsed = read(&answer.bytes);
    assert_eq!(parsed.status, 200);
    assert_eq!(parsed.header("access-control-allow-origin"), Some("*"));
    assert_eq!(parsed.header("access-control-expose-headers"), Some("WWW-Authenticate"));
    let document: Value = serde_json::from_slice(&parsed.body).expect("JSON");
    let want = serde_json::json!({
        "resource": "https://mcp.example.com/mcp",
        "authorization_servers": ["https://login.example.com"],
        "scopes_supported": ["mcp:tools", "mcp:admin"],
        "bearer_methods_supported": ["header"],
        "resource_name": "Tools",
    });
    assert_eq!(document, want);
    assert!(read(&metadata::draft(&server, "HEAD").finish("HEAD").bytes).body.is_empty());
    assert_eq!(metadata::draft(&server, "OPTIONS").finish("OPTIONS").status, 204);
    assert_eq!(metadata::draft(&server, "POST").finish("POST").status, 405);
}

/// RFC 9728, section 3.1: the prefix goes between host and path, and the slash of an empty path goes away.
#[test]
fn metadata_urls_come_from_the_resource() {
    for (resource, want) in [
        ("https://h", "https://h/.well-known/oauth-protected-resource"),
        ("https://h/", "https://h/.well-known/oauth-protected-resource"),
        ("https://h:8443/a/b", "https://h:8443/.well-known/oauth-protected-resource/a/b"),
        ("https://h/a/", "https://h/.well-known/oauth-protected-resource/a/"),
        ("https://h/a?b=c", "https://h/.well-known/oauth-protected-resource/a?b=c"),
        ("https://h?b=c", "https://h/.well-known/oauth-protected-resource?b=c"),
    ] {
        let mut server = server("/mcp");
        server.resource = resource.into();
        assert_eq!(metadata::resource_metadata_url(&server), want, "{resource}");
    }
}

#[test]
fn root_metadata_is_served_only_where_it_is_clear() {
    let (mcp, other, root) = (server("/mcp"), server("/other"), server("/"));
    let at = |path: &str, servers: &[&Server]| metadata::find(path, servers);
    let prefix = metadata::WELL_KNOWN;
    assert_eq!(at(prefix, &[&mcp]), Some(0));
    assert_eq!(at(prefix, &[&mcp, &other]), None);
    assert_eq!(at(prefix, &[&mcp, &root]), Some(1));
    assert_eq!(at(&format!("{prefix}/other"), &[&mcp, &other]), Some(1));
    assert_eq!(at(&format!("{prefix}/nowhere"), &[&mcp, &other]), None);
    assert_eq!(at(&format!("{prefix}x"), &[&mcp]), None);
    assert_eq!(at("/mcp", &[&mcp]), None);
    let mut behind_gateway = server("/mcp");
    behind_gateway.resource = "https://h/tools/mcp".into();
    assert_eq!(at(&format!("{prefix}/tools/mcp"), &[&other, &behind_gateway]), Some(1));
    assert_eq!(at(&format!("{prefix}/mcp"), &[&other, &behind_gateway]), Some(1));
}

#[test]
fn an_answer_that_closes_says_so_and_is_the_same_otherwise() {
    let answer = Draft::error(401, "x").header("WWW-Authenticate", "Bearer").finish("POST");
    let closing = answer.closing();
    let (text, was) = (
        String::from_utf8_lossy(&closing.bytes).into_owned(),
        String::from_utf8_lossy(&answer.bytes).into_owned(),
    );
    assert_eq!(text, was.replacen("\r\n", "\r\nConnection: close\r\n", 1));
    assert_eq!((closing.status, closing.reason, closing.close), (401, "x", true));
    let closing = Draft::error(401, "x").closing().finish("POST");
    assert_eq!(closing.closing(), closing);
}
