//! A revocation holds until its last token has ended, whatever happens meanwhile.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use enforcer_tests::enforcement::{Guarded, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::Deadline;
use serde_json::Value;

use common::LIMIT;

/// The policy of `guarded` with another leeway.
fn with_leeway(guarded: &Guarded, leeway: &str) -> PolicySpec {
    let issuer = IssuerSpec::from_file("corp", &guarded.issuer).with("leeway", leeway);
    PolicySpec::new(vec![issuer], vec![ServerSpec::new("tools", &[guarded.addr()], Guarded::RESOURCE)])
}

fn revocations(guarded: &Guarded) -> Result<usize> {
    let document = guarded.enforcement.cli_json(&["revocations"])?;
    Ok(document.get("revocations").and_then(Value::as_array).context("no list")?.len())
}

#[test]
fn a_token_stays_revoked_under_a_policy_with_a_larger_leeway() -> Result<()> {
    let _deadline = Deadline::new("larger leeway", LIMIT);
    let guarded = Guarded::builder("rev-leeway").issuer("leeway", "0s").option("--no-watch").start()?;
    let start = Instant::now();
    let request = guarded.call(Some(&guarded.mint().expires_in(5).sign()?)).build();
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    let grants = guarded.enforcement.cli_json(&["grants"])?;
    let fingerprint = grants.pointer("/grants/0/token_fingerprint").and_then(Value::as_str);
    let fingerprint = fingerprint.context("no grant")?;
    guarded.enforcement.cli_json(&["revoke", "--token-fingerprint", fingerprint])?;
    guarded.enforcement.write_policy(&with_leeway(&guarded, "5m"))?;
    guarded.enforcement.cli_json(&["reload"])?;
    // By its `exp` alone it is over, by this leeway it is not.
    std::thread::sleep(Duration::from_secs(6).saturating_sub(start.elapsed()));
    let refused = guarded.enforcement.reason("revoked")?;
    assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 401);
    assert_eq!(guarded.enforcement.reason("revoked")?, refused + 1);
    assert_eq!(revocations(&guarded)?, 1);
    Ok(())
}
