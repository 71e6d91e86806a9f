//! The enforcer's answers, to the byte, over real connections: each row of MCP's and RFC 6750's table.

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use enforcer_tests::enforcement::{Enforcement, Guarded, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::{Cgroup, Deadline};
use enforcer_tests::issuer::{Alg, FailMode, Issuer};
use enforcer_tests::mcp::{self, CallOutcome};
use enforcer_tests::peers::listening_addr;
use enforcer_tests::raw::{Connection, RequestBuilder, Response};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use serde_json::json;

use common::{LIMIT, TIMEOUT, assert_refusal, hs256, refused_unread};

const SCOPES: &str = "tools.call files.read";
const ORIGIN: &str = "https://console.example.com";

fn guarded(name: &str) -> Result<Guarded> {
    Guarded::builder(name)
        .server("scopes", json!(["tools.call", "files.read"]))
        .server("public_paths", json!(["/healthz"]))
        .server("origins", json!([ORIGIN]))
        .server("metadata", json!({ "resource_name": "Tools" }))
        .start()
}

fn challenge(error: &str) -> String {
    let metadata = Guarded::METADATA_URL;
    format!("Bearer {error}resource_metadata=\"{metadata}\", scope=\"{SCOPES}\"")
}

fn invalid_token() -> String {
    challenge("error=\"invalid_token\", error_description=\"The access token is not valid here\", ")
}

/// The whole answer as it goes over the wire the first time.
fn wire(status: &str, headers: &str) -> String {
    let (code, phrase) = status.split_once(' ').unwrap_or_default();
    let body = format!(r#"{{"jsonrpc":"2.0","id":null,"error":{{"code":{code},"message":"{phrase}"}}}}"#);
    format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Type: application/json\r\nCache-Control: no-store\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn assert_wire(response: &Response, status: &str, headers: &str) {
    assert_eq!(String::from_utf8_lossy(&response.raw), wire(status, headers));
}

#[test]
fn without_credentials_401_has_a_challenge_without_an_error() -> Result<()> {
    let _deadline = Deadline::new("no credentials", LIMIT);
    let guarded = guarded("nocred")?;
    let headers = format!("WWW-Authenticate: {}\r\n", challenge(""));
    let none = guarded.call(None);
    for request in [
        none.clone(),
        none.clone().header("Authorization", "Basic YWxpY2U6c2VjcmV0"),
        none.clone().header("Cookie", "session=abc"),
        none.header("Mcp-Session-Id", "0b54d5f7"),
    ] {
        let response = guarded.connect()?.roundtrip(&request.build())?;
        assert_wire(&response, "401 Unauthorized", &headers);
    }
    refused_unread(&guarded, SCOPES)
}

#[test]
fn every_defect_of_a_token_is_the_same_401_invalid_token() -> Result<()> {
    let _deadline = Deadline::new("bad tokens", LIMIT);
    let guarded = guarded("badtoken")?;
    let sound = || guarded.mint().scope(SCOPES);
    let stranger = Issuer::new("https://stranger.example", Alg::Es256)?;
    let tokens = [
        ("wrong audience", sound().audience("https://other.example.com/mcp").sign()?),
        ("audience is a prefix", sound().audience("https://mcp.example.com").sign()?),
        ("audience has a slash more", sound().audience("https://mcp.example.com/mcp/").sign()?),
        ("no audience", sound().without_claim("aud").sign()?),
        ("expired", sound().issued_in(-7200).expires_in(-3600).sign()?),
        ("no expiry", sound().without_claim("exp").sign()?),
        ("not yet valid", sound().not_before_in(3600).sign()?),
        ("lives too long", sound().expires_in(90 * 86_400).sign()?),
        ("wrong issuer", sound().claim("iss", "https://login.example.com/tools/").sign()?),
        ("unknown issuer", stranger.mint().audience(Guarded::RESOURCE).scope(SCOPES).sign()?),
        ("bad signature", sound().corrupt_signature().sign()?),
        ("another issuer's key", sound().signed_by(stranger.current_key()).sign()?),
        ("alg none", sound().alg_header("none").unsigned().sign()?),
        ("no signature", sound().unsigned().sign()?),
        ("HS256 with the public key", hs256(&guarded.issuer, Guarded::RESOURCE)?),
        ("HS256 in the header alone", sound().alg_header("HS256").sign()?),
        ("an ID token", sound().typ("JWT").sign()?),
        ("bound to a key that is not proven", sound().claim("cnf", json!({ "jkt": "x" })).sign()?),
        ("an unknown critical header", sound().header("crit", json!(["exp"])).sign()?),
        ("unknown kid", sound().kid("../../etc/passwd").sign()?),
        ("opaque", "b64-but-no.jwt~".to_owned()),
    ];
    let headers = format!("WWW-Authenticate: {}\r\n", invalid_token());
    for (what, token) in &tokens {
        println!("{what}");
        let response = guarded.connect()?.roundtrip(&guarded.call(Some(token)).build())?;
        assert_wire(&response, "401 Unauthorized", &headers);
        assert!(!guarded.enforcement.log()?.contains(token.as_str()), "{what}: the token is in the log");
    }
    refused_unread(&guarded, SCOPES)
}

#[test]
fn malformed_credentials_are_400_invalid_request() -> Result<()> {
    let _deadline = Deadline::new("malformed credentials", LIMIT);
    let guarded = guarded("malformed")?;
    let token = guarded.mint().scope(SCOPES).sign()?;
    let none = guarded.call(None);
    let query = |query: &str, token: Option<&str>| {
        RequestBuilder::mcp_call(&guarded.host(), &format!("/mcp?{query}"), token, "echo")
    };
    let rows = [
        ("two bearers", none.clone().bearer(&token).bearer(&token)),
        ("bearer and basic", none.clone().bearer(&token).header("authorization", "Basic eA==")),
        ("no token", none.clone().header("Authorization", "Bearer")),
        ("two words", none.clone().header("Authorization", &format!("Bearer {token} x"))),
        ("two spaces", none.clone().header("Authorization", &format!("Bearer  {token}"))),
        ("a tab", none.clone().header("Authorization", &format!("Bearer\t{token}"))),
        ("a list", none.clone().header("Authorization", &format!("Bearer {token}, Basic eA=="))),
        (
            "hidden behind another scheme",
            none.clone().header("Authorization", &format!("Basic x, Bearer {token}")),
        ),
        ("no scheme", none.clone().header("Authorization", "")),
        ("quoted", none.header("Authorization", &format!("Bearer \"{token}\""))),
        ("in the query", query(&format!("access_token={token}"), None)),
        ("in the query, encoded", query(&format!("a=b&%61ccess_token={token}"), None)),
        ("in the query and in the header", query(&format!("access_token={token}"), Some(&token))),
    ];
    let headers = format!("WWW-Authenticate: {}\r\n", challenge("error=\"invalid_request\", "));
    for (what, request) in rows {
        println!("{what}");
        let response = guarded.connect()?.roundtrip(&request.build())?;
        assert_wire(&response, "400 Bad Request", &headers);
    }
    assert!(!guarded.enforcement.log()?.contains(&token));
    refused_unread(&guarded, SCOPES)
}

#[test]
fn a_missing_scope_is_403_with_all_scopes_in_one_challenge() -> Result<()> {
    let _deadline = Deadline::new("scopes", LIMIT);
    let guarded = guarded("scopes")?;
    let headers = format!("WWW-Authenticate: {}\r\n", challenge("error=\"insufficient_scope\", "));
    for mint in [
        guarded.mint(),
        guarded.mint().scope("tools.call"),
        guarded.mint().scope("tools.call files.reader files.rea"),
        guarded.mint().claim("scp", json!(["files.read"])),
    ] {
        let response = guarded.connect()?.roundtrip(&guarded.call(Some(&mint.sign()?)).build())?;
        assert_wire(&response, "403 Forbidden", &headers);
    }
    refused_unread(&guarded, SCOPES)?;
    let token = guarded.mint().claim("scp", json!(["files.read", "tools.call", "more"])).sign()?;
    assert_eq!(guarded.connect()?.roundtrip(&guarded.call(Some(&token)).build())?.status, 200);
    Ok(())
}

#[test]
fn foreign_origins_and_hosts_are_403_whatever_the_token() -> Result<()> {
    let _deadline = Deadline::new("origin and host", LIMIT);
    let guarded = guarded("origin")?;
    let token = guarded.mint().scope(SCOPES).sign()?;
    let call = || guarded.call(Some(&token));
    let host = |host: &str| RequestBuilder::mcp_call(host, "/mcp", Some(&token), "echo");
    for (what, request) in [
        ("not listed", call().header("Origin", "https://evil.example")),
        ("null", call().header("Origin", "null")),
        ("twice", call().header("Origin", ORIGIN).header("Origin", ORIGIN)),
        ("another scheme", call().header("Origin", "http://console.example.com")),
        ("rebinding", host("evil.example").header("Origin", "http://evil.example")),
        ("host not listed", host("evil.example")),
        ("host with another port", host("127.0.0.1:1")),
    ] {
        println!("{what}");
        let response = guarded.connect()?.roundtrip(&request.build())?;
        assert_wire(&response, "403 Forbidden", "");
    }
    refused_unread(&guarded, SCOPES)?;

    // A listed page may read the challenge, and may call.
    let mut connection = guarded.connect()?;
    let response = connection.roundtrip(&guarded.call(None).header("Origin", ORIGIN).build())?;
    assert_refusal(&response, 401, Some(&challenge("")));
    assert_eq!(response.header("access-control-allow-origin"), Some(ORIGIN));
    assert_eq!(response.header("access-control-expose-headers"), Some("WWW-Authenticate"));
    assert_eq!(connection.roundtrip(&call().header("Origin", ORIGIN).build())?.status, 200);
    let preflight = RequestBuilder::new("OPTIONS", "/mcp")
        .header("Host", &guarded.host())
        .header("Origin", ORIGIN)
        .header("Access-Control-Request-Method", "POST");
    let response = connection.roundtrip(&preflight.build())?;
    assert_eq!((response.status, response.header("access-control-allow-origin")), (204, Some(ORIGIN)));
    assert_eq!(connection.roundtrip(&call().header("Origin", ORIGIN).build())?.status, 200);
    Ok(())
}

#[test]
fn off_the_path_404_and_other_methods_405() -> Result<()> {
    let _deadline = Deadline::new("paths and methods", LIMIT);
    let guarded = guarded("paths")?;
    let token = guarded.mint().scope(SCOPES).sign()?;
    let host = guarded.host();
    for path in ["/", "/mcpx", "/MCP", "/admin", "/healthz/", "/healthz/x", "/healthz?x=1", "/.well-known/x"]
    {
        let request = RequestBuilder::mcp_call(&host, path, Some(&token), "echo");
        let response = guarded.connect()?.roundtrip(&request.build())?;
        assert_wire(&response, "404 Not Found", "");
    }
    for method in ["PUT", "PATCH", "OPTIONS", "TRACE", "QUERY", "post", "get"] {
        let request = RequestBuilder::new(method, "/mcp").header("Host", &host).bearer(&token);
        let response = guarded.connect()?.roundtrip(&request.build())?;
        assert_wire(&response, "405 Method Not Allowed", "Allow: POST, GET, DELETE\r\n");
    }
    let request = RequestBuilder::new("POST", "/healthz").header("Host", &host);
    let response = guarded.connect()?.roundtrip(&request.build())?;
    assert_wire(&response, "405 Method Not Allowed", "Allow: GET, HEAD\r\n");
    refused_unread(&guarded, SCOPES)
}

#[test]
fn metadata_is_public_in_both_forms_and_the_server_is_not_asked() -> Result<()> {
    let _deadline = Deadline::new("metadata", LIMIT);
    let guarded = guarded("metadata")?;
    let want = json!({
        "resource": Guarded::RESOURCE,
        "authorization_servers": ["https://login.example.com/tools"],
        "scopes_supported": ["tools.call", "files.read"],
        "bearer_methods_supported": ["header"],
        "resource_name": "Tools",
    });
    let mut connection = guarded.connect()?;
    for path in ["/.well-known/oauth-protected-resource", "/.well-known/oauth-protected-resource/mcp"] {
        let at = |method: &str| {
            // Metadata is for everyone: any page may read it, and Host decides nothing.
            RequestBuilder::new(method, path)
                .header("Host", "evil.example")
                .header("Origin", "https://evil.example")
        };
        let response = connection.roundtrip(&at("GET").build())?;
        assert_eq!((response.status, response.json()?), (200, want.clone()));
        assert_eq!(response.header("content-type"), Some("application/json"));
        assert_eq!(response.header("access-control-allow-origin"), Some("*"));
        assert_eq!(response.header("access-control-expose-headers"), Some("WWW-Authenticate"));
        connection.send(&at("HEAD").build())?;
        let head = connection.read_head()?;
        assert_eq!((head.status, head.header("content-length")), (200, response.header("content-length")));
        let options = connection.roundtrip(&at("OPTIONS").build())?;
        assert_eq!((options.status, options.header("access-control-allow-origin")), (204, Some("*")));
        let post = connection.roundtrip(&at("POST").body(b"{}").build())?;
        assert_eq!((post.status, post.header("allow")), (405, Some("GET, HEAD, OPTIONS")));
    }
    refused_unread(&guarded, SCOPES)
}

#[test]
fn public_paths_need_no_token_and_pass_byte_for_byte() -> Result<()> {
    let _deadline = Deadline::new("public paths", LIMIT);
    let guarded = guarded("public")?;
    let request = RequestBuilder::new("GET", "/healthz").header("Host", &guarded.host()).build();
    // A connection each: on the first one the daemon may still be about to hand the flow back.
    for _ in 0..3 {
        let mut connection = guarded.connect()?;
        assert_eq!(connection.roundtrip(&request)?.status, 200);
        assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request);
    }
    assert_eq!(guarded.enforcement.counter("allowed-public")?, 2);
    Ok(())
}

#[test]
fn without_an_issuers_keys_its_tokens_get_503_and_nothing_passes() -> Result<()> {
    let _deadline = Deadline::new("keys unavailable", LIMIT);
    let (issuer, keys) = Issuer::served("/realm", Alg::Es256)?;
    keys.set_fail_mode(FailMode::Status(500));
    let cgroup = Cgroup::new("nokeys")?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let recorder = RemoteRecorder::spawn(listen, &Config::default(), Some(&cgroup), None)?;
    let policy = PolicySpec::new(
        vec![IssuerSpec::from_url("corp", &issuer, &keys.jwks_url())],
        vec![ServerSpec::new("tools", &[recorder.addr()], Guarded::RESOURCE)],
    );
    let enforcement = Enforcement::start(cgroup, &policy)?;
    let token = issuer.mint().audience(Guarded::RESOURCE).sign()?;
    let call = |token| RequestBuilder::mcp_call(&recorder.addr().to_string(), "/mcp", token, "echo").build();
    let mut connection = Connection::open(recorder.addr(), TIMEOUT)?;
    for _ in 0..2 {
        let response = connection.roundtrip(&call(Some(&token)))?;
        assert_wire(&response, "503 Service Unavailable", "Retry-After: 5\r\n");
    }
    // What needs no keys is answered as ever.
    assert_eq!(connection.roundtrip(&call(None))?.status, 401);
    assert_eq!(recorder.connections()?.iter().map(|record| record.bytes_read).sum::<u64>(), 0);
    assert!(enforcement.reason("keys-unavailable")? >= 2);
    Ok(())
}

#[test]
fn the_official_sdk_works_through_the_enforcer_and_understands_its_refusals() -> Result<()> {
    let _deadline = Deadline::new("the official SDK", LIMIT);
    let cgroup = Cgroup::new("sdk")?;
    let mut command = std::process::Command::new(enforcer_tests::guard::bin_path("enforcer-mcp")?);
    command.args(["server", "--listen", "127.0.0.1:0"]);
    let mut server = enforcer_tests::guard::spawn_in(&cgroup, "MCP server", command)?;
    let addr = listening_addr(&mut server, TIMEOUT)?;
    let issuer = Issuer::new("https://login.example.com/tools", Alg::EdDsa)?;
    let resource = format!("http://{addr}/mcp");
    let policy = PolicySpec::new(
        vec![IssuerSpec::from_file("corp", &issuer)],
        vec![ServerSpec::new("tools", &[addr], &resource)],
    );
    let enforcement = Enforcement::start(cgroup, &policy)?;
    let good = issuer.mint().audience(&resource).sign()?;
    let wrong = issuer.mint().audience("https://other.example/mcp").sign()?;
    for protocol in [mcp::newest_version(), mcp::version("2025-06-18")?] {
        let call = |token| {
            let arguments = json!({ "a": 19, "b": 23 });
            mcp::call_tool_blocking(&resource, token, &protocol, "add", arguments, Duration::from_secs(20))
        };
        let outcome = call(Some(&good))?;
        let CallOutcome::Answered { text, is_error: false, protocol: spoken } = &outcome else {
            anyhow::bail!("{protocol}: {outcome:?}")
        };
        assert_eq!((text.as_str(), spoken.as_str()), ("42", protocol.as_str()));
        let metadata = metadata_url(addr);
        for (token, error) in [(Some(wrong.as_str()), "error=\"invalid_token\", "), (None, "")] {
            let outcome = call(token)?;
            let CallOutcome::Refused { status: 401, www_authenticate: Some(challenge) } = &outcome else {
                anyhow::bail!("{protocol}: {outcome:?}")
            };
            assert!(challenge.starts_with(&format!("Bearer {error}")), "{challenge}");
            assert!(challenge.contains(&format!("resource_metadata=\"{metadata}\"")), "{challenge}");
        }
    }
    ensure!(enforcement.counters()?.dead() == 0, "a connection was given up: {:?}", enforcement.counters()?);
    Ok(())
}

fn metadata_url(addr: SocketAddr) -> String {
    format!("http://{addr}/.well-known/oauth-protected-resource/mcp")
}

#[test]
fn a_server_that_serves_its_own_metadata_is_asked_for_it() -> Result<()> {
    let _deadline = Deadline::new("own metadata", LIMIT);
    let guarded = Guarded::builder("ownmeta").server("metadata", json!({ "serve": false })).start()?;
    let mut connection = guarded.connect()?;
    let path = "/.well-known/oauth-protected-resource/mcp";
    let request = RequestBuilder::new("GET", path).header("Host", &guarded.host()).build();
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request);
    let response = connection.roundtrip(&guarded.call(None).build())?;
    assert_eq!(response.status, 401);
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request);
    Ok(())
}
