use std::io::Cursor;

use serde_json::json;

use super::super::exit::code_of;
use super::*;
use crate::policy::{Algorithm, DEFAULT_DAEMON_TIMEOUT, DEFAULT_UNKNOWN, Issuer, KeySource, Mode};
use crate::token::testing::{self, RESOURCE, TestKey};

const KID: &str = "key-1";

fn policy_with_key_file(jwks: PathBuf) -> (Policy, Arc<Server>) {
    let issuer =
        Issuer { keys: KeySource::File(jwks), ..testing::issuer("corp", "https://login.example.com") };
    let issuer = Arc::new(issuer);
    let server = Arc::new(testing::server(vec![Arc::clone(&issuer)]));
    let policy = Policy {
        mode: Mode::Enforce,
        daemon_timeout: DEFAULT_DAEMON_TIMEOUT,
        issuers: vec![issuer],
        servers: vec![Arc::clone(&server)],
        workloads: Vec::new(),
        limits: Vec::new(),
        unknown: DEFAULT_UNKNOWN,
        refused: None,
        shield: None,
    };
    (policy, server)
}

#[test]
fn a_token_is_explained_with_keys_from_the_issuer_and_not_shown() {
    let place = tempfile::tempdir().unwrap();
    let jwks = place.path().join("keys.json");
    let key = TestKey::for_algorithm(Algorithm::ES256);
    std::fs::write(&jwks, json!({"keys": [key.jwk(KID)]}).to_string()).unwrap();
    let (policy, server) = policy_with_key_file(jwks);
    let (keys, errors) = load_keys(&policy, &server).unwrap();
    assert!(errors.is_empty(), "{errors:?}");

    let header = json!({"alg": "ES256", "typ": "at+jwt", "kid": KID}).to_string();
    let claims = |audience: &str| {
        json!({
            "iss": "https://login.example.com", "aud": audience, "sub": "alice", "client_id": "cli",
            "iat": testing::NOW - 10, "exp": testing::NOW + 60, "jti": "1", "scope": server.scopes.join(" "),
        })
        .to_string()
    };
    let good = key.mint_raw(Algorithm::ES256, &header, &claims(RESOURCE));
    let by = By { keys: &keys, revoked: None, caller: None, now_unix_secs: testing::NOW };
    let shown = explain(&good, &server, "p.yaml".into(), &by, Vec::new());
    assert!(shown.would_pass, "{}", shown.text());

    let other = key.mint_raw(Algorithm::ES256, &header, &claims("https://other.example.com/mcp"));
    let shown = explain(&other, &server, "p.yaml".into(), &by, Vec::new());
    assert!(!shown.would_pass);
    let text = shown.text();
    let fails: Vec<_> = text.lines().filter(|line| line.starts_with("fail")).collect();
    assert_eq!(fails.len(), 1, "{text}");
    assert!(fails[0].contains("audience") && fails[0].contains("other.example.com"), "{text}");
    let json = serde_json::to_string(&shown).unwrap();
    for part in other.split('.') {
        assert!(!text.contains(part) && !json.contains(part));
    }
}

#[test]
fn missing_keys_are_said_at_once() {
    let (policy, server) = policy_with_key_file("/no/such/keys.json".into());
    let start = Instant::now();
    let (_, errors) = load_keys(&policy, &server).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(errors[0].issuer, "corp");
    assert!(errors[0].message.contains("/no/such/keys.json"), "{errors:?}");
}

#[test]
fn the_token_is_read_whole_or_not_at_all() {
    assert_eq!(*read_token(Cursor::new("  a.b.c\r\n")).unwrap(), "a.b.c");
    let longest = "x".repeat(MAX_TOKEN_BYTES);
    assert_eq!(*read_token(Cursor::new(format!("{longest}\n"))).unwrap(), longest);
    for bad in [String::new(), "\n".to_owned(), "x".repeat(MAX_TOKEN_BYTES + 64)] {
        let error = read_token(Cursor::new(bad)).unwrap_err();
        assert_eq!(code_of(&error), USAGE);
        assert!(!error.to_string().contains("xxx"));
    }
    assert_eq!(code_of(&read_token(Cursor::new([0xff, 0xfe])).unwrap_err()), USAGE);
}
