//! Which server a path stands for, and what passes without a token.

use super::{check, outcome};
use crate::http::test_server::server;

#[test]
fn row_15_paths() {
    let table = [
        ("POST /mcp/", "Authorization: Bearer good", "allow 0"),
        ("POST /mcp/x", "", "401 no-credentials UntilPolicyChange"),
        ("POST /mcp?x=%2e%2e", "Authorization: Bearer good", "allow 0"),
        ("POST /mcpx", "Authorization: Bearer good", "404 path-unknown UntilPolicyChange"),
        ("POST /MCP", "Authorization: Bearer good", "404 path-unknown UntilPolicyChange"),
        ("POST /", "Authorization: Bearer good", "404 path-unknown UntilPolicyChange"),
        ("POST /admin", "Authorization: Bearer good", "404 path-unknown UntilPolicyChange"),
        ("HEAD /admin", "", "404 path-unknown Never"),
        ("POST //mcp", "Authorization: Bearer good", "400 path-empty-segment Never close"),
        ("POST /./mcp", "Authorization: Bearer good", "400 path-dot-segment Never close"),
        ("POST /mcp/../admin", "Authorization: Bearer good", "400 path-dot-segment Never close"),
        ("POST /%6dcp", "Authorization: Bearer good", "400 path-percent Never close"),
        ("POST /mcp;x", "Authorization: Bearer good", "400 path-parameters Never close"),
        ("GET /healthz/../mcp", "", "400 path-dot-segment Never close"),
    ];
    check(&[&server("/mcp")], &table);
}

#[test]
fn public_paths_are_exact_and_only_read() {
    let table = [
        ("GET /healthz", "", "public 0"),
        ("HEAD /healthz", "", "public 0"),
        ("GET /healthz", "Connection: close", "public 0 once"),
        ("GET /healthz?a", "", "404 path-unknown UntilPolicyChange"),
        ("GET /healthz/", "", "404 path-unknown UntilPolicyChange"),
        ("POST /healthz", "", "405 method-not-allowed UntilPolicyChange"),
        ("GET /healthz", "Content-Length: 5", "400 unexpected-body Never close"),
        ("GET /healthz", "Transfer-Encoding: chunked", "400 unexpected-body Never close"),
        ("GET /healthz", "Origin: https://evil.example", "403 origin-not-allowed UntilPolicyChange"),
    ];
    check(&[&server("/mcp")], &table);
}

/// The longest path decides, and a public path opens nothing of another server.
#[test]
fn servers_that_share_an_endpoint() {
    let (root, mcp, mut deep) = (server("/"), server("/mcp"), server("/mcp/deep"));
    deep.public_paths = vec!["/mcp/ping".into(), "/mcp/deep".into(), "/mcp/deep/ping".into()];
    let table = [
        ("POST /mcp", "Authorization: Bearer good", "allow 1"),
        ("POST /mcp/deep", "Authorization: Bearer good", "allow 2"),
        ("POST /mcp/deep/x", "Authorization: Bearer good", "allow 2"),
        ("POST /mcp/deeper", "Authorization: Bearer good", "allow 1"),
        ("POST /", "Authorization: Bearer good", "allow 0"),
        ("POST /else", "Authorization: Bearer good", "allow 0"),
        ("GET /healthz", "", "public 0"),
        ("GET /mcp/ping", "", "401 no-credentials UntilPolicyChange"),
        ("GET /mcp/deep", "", "401 no-credentials UntilPolicyChange"),
        ("GET /mcp/deep/ping", "", "public 2"),
    ];
    check(&[&root, &mcp, &deep], &table);
    assert_eq!(outcome("GET /mcp HTTP/1.1\r\nHost: h\r\n\r\n", &[]), "404 path-unknown UntilPolicyChange");
}

#[test]
fn metadata_is_answered_here_or_passed_on() {
    let mut server = server("/mcp");
    let table = [
        ("GET /.well-known/oauth-protected-resource/mcp", "", "200 metadata Never"),
        (
            "GET /.well-known/oauth-protected-resource/mcp",
            "Origin: https://any.example",
            "200 metadata Never",
        ),
        ("GET /.well-known/oauth-protected-resource", "", "200 metadata Never"),
        (
            "OPTIONS /.well-known/oauth-protected-resource/mcp",
            "Origin: https://any.example",
            "204 metadata-preflight Never",
        ),
        ("POST /.well-known/oauth-protected-resource/mcp", "", "405 method-not-allowed Never"),
        ("GET /.well-known/oauth-protected-resource/x", "", "404 path-unknown UntilPolicyChange"),
        ("GET /.well-known/openid-configuration", "", "404 path-unknown UntilPolicyChange"),
    ];
    check(&[&server], &table);
    server.metadata.serve = false;
    let table = [
        ("GET /.well-known/oauth-protected-resource/mcp", "Origin: https://any.example", "public 0"),
        ("POST /.well-known/oauth-protected-resource/mcp", "", "405 method-not-allowed UntilPolicyChange"),
        (
            "GET /.well-known/oauth-protected-resource/mcp",
            "Content-Length: 5",
            "400 unexpected-body Never close",
        ),
    ];
    check(&[&server], &table);
}
