//! `cargo xtask fuzz`: the differential test of the HTTP parsers, for long.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use crate::build;
use crate::process::run;
use crate::setup::BpfToolchain;
use crate::workspace::Workspace;

/// The test that does it, in the crate `enforcer`.
const TEST: &str = "core::differential::what_may_have_a_verdict_is_read_alike_by_every_parser";

/// Runs for so many seconds, from a seed that is told, or a new one.
pub(crate) fn fuzz(
    workspace: &Workspace,
    toolchain: &BpfToolchain,
    seconds: u64,
    seed: Option<u64>,
) -> Result<()> {
    build::bpf_object(workspace, toolchain)?;
    let seed = match seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs(),
    };
    eprintln!("seed {seed}; what is found is kept in tests/fuzz-corpus");
    run(workspace
        .cargo()
        .args(["test", "--release", "--package", "enforcer", "--lib", "--", "--exact", "--nocapture", TEST])
        .env("ENFORCER_FUZZ_SECONDS", seconds.to_string())
        .env("ENFORCER_FUZZ_SEED", seed.to_string()))
}
