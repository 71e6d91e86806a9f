//! Names, messages and the check-by-check account.

use std::collections::BTreeSet;

use serde_json::json;

use crate::token::testing::{NOW, World};
use crate::token::*;

#[test]
fn reasons_have_distinct_kebab_case_names() {
    let names: BTreeSet<_> = TokenReason::ALL.iter().map(|reason| reason.name()).collect();
    assert_eq!(names.len(), TokenReason::ALL.len());
    assert!(
        names
            .iter()
            .all(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'))
    );
}

#[test]
fn messages_are_bounded_and_escaped() {
    let world = World::new();
    let evil = format!("\u{1b}[2J\r\n\"{}\u{202e}", "A".repeat(5000));
    for result in [
        world.with_claim("iss", &json!(evil)),
        world.with_claim("aud", &json!([evil, evil])),
        world.with_header("alg", &json!(evil)),
        world.with_header("typ", &json!(evil)),
        world.with_header(&evil, &json!(1)),
    ] {
        let Err(error) = result else { continue };
        let message = error.to_string();
        assert!(message.len() < 512, "{message}");
        assert!(message.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{message}");
    }
    assert_eq!(Quoted::new("a\"b\n\u{e9}").to_string(), r#""a\"b\n\u{e9}""#);
    assert_eq!(Quoted::new(&"x".repeat(128)).to_string().len(), 130);
    assert_eq!(Quoted::new(&"x".repeat(129)).to_string(), format!("\"{}..\"", "x".repeat(126)));
}

#[test]
fn explain_shows_every_check_and_agrees_with_verify() {
    let mut world = World::new();
    let explained = |world: &World| explain(&world.token(), &world.server(), &world.keys(), NOW).0;
    let outcome =
        |checks: &[Check], name: &str| checks.iter().find(|check| check.name == name).unwrap().outcome;
    let good = explained(&world);
    assert!(good.iter().all(|check| check.outcome == Outcome::Pass), "{good:#?}");

    world.claims["aud"] = json!("https://other.example");
    world.claims["exp"] = json!(NOW - 600);
    let bad = explained(&world);
    assert_eq!(bad.len(), good.len());
    for (name, expected) in [
        ("audience", Outcome::Fail),
        ("expiry", Outcome::Fail),
        ("lifetime", Outcome::Skipped),
        ("signature", Outcome::Pass),
        ("required-scopes", Outcome::Skipped),
    ] {
        assert_eq!(outcome(&bad, name), expected, "{name}");
    }
    let first = bad.iter().find(|check| check.outcome == Outcome::Fail).unwrap();
    assert_eq!(first.detail, world.verify().unwrap_err().to_string());

    let mut world = World::new();
    world.claims["scope"] = json!("other");
    assert!(world.verify().is_ok());
    let narrow = explained(&world);
    assert_eq!(outcome(&narrow, "required-scopes"), Outcome::Fail);
    let text = format!("{narrow:?}");
    let token = world.token();
    assert!(token.split('.').all(|segment| !text.contains(segment)), "no token material");
    let garbage = explain("garbage", &world.server(), &world.keys(), NOW).0;
    assert_eq!(outcome(&garbage, "format"), Outcome::Fail);
    assert!(garbage[1..].iter().all(|check| check.outcome == Outcome::Skipped));
}
