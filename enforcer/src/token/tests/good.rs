//! What passes, and what a verified token says.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{GONE, refused};
use crate::token::testing::{ALL_ALGORITHMS, NOW, RESOURCE, World};
use crate::token::*;

#[test]
fn good_tokens_of_every_algorithm_verify() {
    for algorithm in ALL_ALGORITHMS {
        let token = World::with_algorithm(algorithm).verify().unwrap();
        assert_eq!(token.subject, "alice");
        assert_eq!(token.client_id.as_deref(), Some("agent-1"));
        assert_eq!(token.audience, RESOURCE);
        assert_eq!(token.issued_at, Some(NOW - 10));
        assert_eq!(token.expires_at, NOW + 600);
        assert_eq!(token.not_after_unix_secs, NOW + 630);
        assert_eq!(token.jwt_id.as_deref(), Some("id-1"));
        assert_eq!(token.key_id.as_deref(), Some("k1"));
        assert_eq!(token.scopes, BTreeSet::from(["mcp:read".to_owned(), "mcp:tools".to_owned()]));
        assert_eq!(token.issuer.name, "main");
    }
}

#[test]
fn principal_is_the_same_for_a_refreshed_token() {
    let world = World::new();
    let first = world.verify().unwrap().principal();
    assert_eq!(world.with_claim("jti", &json!("id-2")).unwrap().principal(), first);
    assert_ne!(world.with_claim("client_id", &json!("agent-2")).unwrap().principal(), first);
    assert_ne!(world.with_claim("sub", &json!("bob")).unwrap().principal(), first);
}

#[test]
fn a_principals_number_tells_its_parts_apart() {
    let principal = |issuer: &str, subject: &str, client_id: Option<&str>| {
        let client_id = client_id.map(str::to_owned);
        Principal { issuer: issuer.into(), subject: subject.into(), client_id }.id()
    };
    let id = principal("i", "s", Some("c"));
    assert_eq!(principal("i", "s", Some("c")), id);
    let others = [
        principal("is", "", Some("c")),
        principal("", "is", Some("c")),
        principal("i", "sc", Some("")),
        principal("i", "s", Some("")),
        principal("i", "s", None),
    ];
    for (at, other) in others.iter().enumerate() {
        assert_ne!(*other, id);
        assert!(!others[..at].contains(other));
    }
}

#[test]
fn client_is_client_id_then_azp() {
    let world = World::new();
    assert_eq!(world.with_claim("azp", &json!("z")).unwrap().client_id.as_deref(), Some("agent-1"));
    let mut world = World::new();
    world.claims["client_id"].take();
    world.claims.as_object_mut().unwrap().remove("client_id");
    assert_eq!(world.verify().unwrap().client_id, None);
    assert_eq!(world.with_claim("azp", &json!("z")).unwrap().client_id.as_deref(), Some("z"));
    refused(world.with_claim("azp", &json!(7)), TokenReason::ClaimMalformed);
    refused(world.with_claim("client_id", &json!("")), TokenReason::ClaimMalformed);
}

#[test]
fn scopes_come_from_scope_and_scp() {
    let world = World::new();
    let scopes = |name: &str, value: Value| world.with_claim(name, &value).map(|token| token.scopes);
    let set = |scopes: &[&str]| scopes.iter().map(|scope| (*scope).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(scopes("scp", json!("a b")), Ok(set(&["a", "b", "mcp:read", "mcp:tools"])));
    assert_eq!(scopes("scp", json!(["a"])), Ok(set(&["a", "mcp:read", "mcp:tools"])));
    assert_eq!(scopes("scope", json!("")), Ok(set(&[])));
    assert_eq!(scopes("scope", GONE), Ok(set(&[])));
    let rows =
        [("scope", json!(["a"])), ("scope", json!("a\tb")), ("scope", json!("a\"b")), ("scp", json!([1]))];
    for (name, value) in
        rows.into_iter().chain([("scp", json!(["a b"])), ("scp", json!({})), ("scp", json!(1))])
    {
        refused(world.with_claim(name, &value), TokenReason::ClaimMalformed);
    }
}

#[test]
fn missing_scopes_keep_the_order_and_the_case() {
    let token = World::new().verify().unwrap();
    let required = ["z", "mcp:tools", "MCP:read", "a"].map(str::to_owned);
    assert_eq!(missing_scopes(&token, &required), ["z", "MCP:read", "a"]);
    assert!(missing_scopes(&token, &[]).is_empty());
}
