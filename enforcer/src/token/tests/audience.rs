//! The audience must be this server's, and nothing like it.

use serde_json::json;

use super::{GONE, refused};
use crate::token::testing::{RESOURCE, World};
use crate::token::*;

#[test]
fn aud_missing_empty_or_of_another_type_is_refused() {
    let world = World::new();
    refused(world.with_claim("aud", &GONE), TokenReason::AudienceMissing);
    for aud in
        [json!(""), json!([]), json!(7), json!({}), json!(true), json!([RESOURCE, 7]), json!([RESOURCE, ""])]
    {
        refused(world.with_claim("aud", &aud), TokenReason::AudienceMalformed);
    }
    // A JSON null, not an absent claim.
    let payload = world.claims.to_string().replace(&format!("\"{RESOURCE}\""), "null");
    let token = world.key.mint_raw(world.algorithm, &world.header.to_string(), &payload);
    refused(world.verify_token(&token), TokenReason::AudienceMalformed);
    refused(world.with_claim("aud", &json!([[RESOURCE]])), TokenReason::AudienceMalformed);
}

#[test]
fn aud_array_may_hold_ours_among_others() {
    let world = World::new();
    let token = world.with_claim("aud", &json!(["https://other.example.com", RESOURCE])).unwrap();
    assert_eq!(token.audience, RESOURCE);
    refused(
        world.with_claim("aud", &json!(["https://other.example.com", "x"])),
        TokenReason::AudienceMismatch,
    );
}

#[test]
fn aud_prefix_suffix_slash_and_upper_case_are_refused() {
    let world = World::new();
    for aud in [
        "https://mcp.example.com",
        "https://mcp.example.com/",
        "https://mcp.example.com/mc",
        "https://mcp.example.com/mcp/",
        "https://mcp.example.com/mcp/x",
        "https://mcp.example.com/mcp?x",
        "https://mcp.example.com/mcp#x",
        "https://mcp.example.com:443/mcp",
        "HTTPS://MCP.EXAMPLE.COM/mcp",
        "https://mcp.example.com/MCP",
        "https://mcp.example.com.evil.example/mcp",
        "http://mcp.example.com/mcp",
        "mcp.example.com/mcp",
        "https://mcp.example.com/%6dcp",
        "*",
    ] {
        refused(world.with_claim("aud", &json!(aud)), TokenReason::AudienceMismatch);
    }
}

#[test]
fn aud_of_a_bare_authority_equals_itself_with_a_slash_and_nothing_else() {
    let mut world = World::new();
    for resource in ["https://h.example", "https://h.example/"] {
        world.resource = resource.to_owned();
        for aud in ["https://h.example", "https://h.example/"] {
            assert_eq!(world.with_claim("aud", &json!(aud)).unwrap().audience, resource);
        }
        for aud in
            ["https://h.example//", "https://h.exampl", "https://h.example/x", "https:///", "https://", "/"]
        {
            refused(world.with_claim("aud", &json!(aud)), TokenReason::AudienceMismatch);
        }
    }
}

#[test]
fn aud_may_be_an_alias() {
    let mut world = World::new();
    refused(world.with_claim("aud", &json!("urn:files")), TokenReason::AudienceMismatch);
    world.aliases = vec!["https://old.example/mcp".to_owned(), "urn:files".to_owned()];
    assert_eq!(world.with_claim("aud", &json!("urn:files")).unwrap().audience, "urn:files");
    refused(world.with_claim("aud", &json!("urn:files/")), TokenReason::AudienceMismatch);
}
