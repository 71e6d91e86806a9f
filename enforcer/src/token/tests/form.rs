//! Size, segments, base64url and JSON.

use serde_json::json;

use super::refused;
use crate::token::testing::World;
use crate::token::*;

#[test]
fn a_token_of_100_kb_is_refused() {
    let world = World::new();
    let error = refused(world.with_claim("pad", &json!("x".repeat(75_000))), TokenReason::TooLarge);
    assert!(matches!(error, TokenError::TooLarge { size_bytes: 100_000.., limit_bytes: MAX_TOKEN_BYTES }));
    refused(world.verify_token(&".".repeat(100_000)), TokenReason::TooLarge);
}

#[test]
fn a_token_that_is_not_three_base64url_segments_is_refused() {
    let world = World::new();
    let token = world.token();
    let (input, signature) = token.rsplit_once('.').unwrap();
    let (header, payload) = input.split_once('.').unwrap();
    for (token, reason) in [
        (String::new(), TokenReason::SegmentCount),
        ("abc".to_owned(), TokenReason::SegmentCount),
        (input.to_owned(), TokenReason::SegmentCount),
        (format!("{token}.{signature}"), TokenReason::SegmentCount),
        (format!("{token}.{signature}.{signature}"), TokenReason::SegmentCount),
        ("..".to_owned(), TokenReason::EmptySegment),
        (format!("{input}."), TokenReason::EmptySegment),
        (format!("{header}..{signature}"), TokenReason::EmptySegment),
        (format!(".{payload}.{signature}"), TokenReason::EmptySegment),
        (format!("{token}="), TokenReason::NotBase64Url),
        (format!("{token}=="), TokenReason::NotBase64Url),
        (format!("{token}\n"), TokenReason::NotBase64Url),
        (format!(" {token}"), TokenReason::NotBase64Url),
        (format!("{header}.{payload}+.{signature}"), TokenReason::NotBase64Url),
        (format!("{header}/.{payload}.{signature}"), TokenReason::NotBase64Url),
        (format!("{header}.{payload}.not base64"), TokenReason::NotBase64Url),
        (format!("{header}.{payload}.ü"), TokenReason::NotBase64Url),
    ] {
        refused(world.verify_token(&token), reason);
    }
}

/// Without this, one token has several spellings, and each is a new one to caches and logs.
#[test]
fn trailing_bits_are_refused() {
    let world = World::new();
    let token = world.token();
    // 64 signature bytes: the last character carries 2 bits and 4 zeros.
    let last = token.chars().last().unwrap();
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let position = alphabet.find(last).unwrap();
    let twin = alphabet.chars().nth(position + 1).unwrap();
    let twin = format!("{}{twin}", &token[..token.len() - 1]);
    refused(world.verify_token(&twin), TokenReason::NotBase64Url);
    assert!(world.verify_token(&token).is_ok());
}

#[test]
fn header_and_payload_are_objects_without_duplicates() {
    let world = World::new();
    let (header, claims) = (world.header.to_string(), world.claims.to_string());
    let check = |header: &str, payload: &str, reason| {
        refused(world.verify_token(&world.key.mint_raw(world.algorithm, header, payload)), reason);
    };
    check(&header.replacen('{', "{\"alg\":\"none\",", 1), &claims, TokenReason::DuplicateMember);
    check(&header.replacen('{', "{\"\\u0061lg\":\"none\",", 1), &claims, TokenReason::DuplicateMember);
    check(&header, &claims.replacen('{', "{\"aud\":\"x\",", 1), TokenReason::DuplicateMember);
    check(&header, &claims.replacen('{', "{\"x\":{\"a\":1,\"a\":2},", 1), TokenReason::DuplicateMember);
    for other in ["[]", "\"x\"", "1", "null", "{", "{} {}", "\u{feff}{}"] {
        check(other, &claims, TokenReason::NotJsonObject);
        check(&header, other, TokenReason::NotJsonObject);
    }
}
