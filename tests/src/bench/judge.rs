//! The judging program's own run time, as the kernel counts it.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::bed::Bed;
use super::pinning::{Pinning, Place};
use super::rounds::{CONNECTIONS, enforced_calls};
use crate::bpf::{new_descriptor, open_pinned};

/// A command of bpf(2) and a kind of statistics, from the kernel's `include/uapi/linux/bpf.h`.
const BPF_ENABLE_STATS: libc::c_long = 32;
const BPF_STATS_RUN_TIME: u32 = 0;

/// The calls of the judging program during one run of tool calls with known heads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct JudgeRun {
    /// Keep-alive connections.
    pub connections: usize,
    /// Answered requests.
    pub requests: u64,
    /// Calls of the program.
    pub calls: u64,
    /// Nanoseconds per call, with the few that reading the clock takes.
    pub ns_per_call: f64,
}

#[expect(clippy::cast_precision_loss, reason = "reported figures, far below 2^53")]
pub(super) fn measure(bed: &mut Bed, pinning: &Pinning, run_ms: u64) -> Result<Vec<JudgeRun>> {
    let program = open_pinned(&bed.enforcement().pins().join("prog_judge"))?;
    let _counting = enable_stats()?;
    [(CONNECTIONS, Place::Apart), (1, Place::Together)]
        .into_iter()
        .map(|(connections, place)| {
            pinning.apply(place, &bed.server_pids())?;
            let before = Stats::read(&program)?;
            let report = enforced_calls(bed, connections, run_ms * 4)?;
            let after = Stats::read(&program)?;
            let calls = after.run_count.saturating_sub(before.run_count);
            let run_time_ns = after.run_time_ns.saturating_sub(before.run_time_ns);
            ensure!(calls >= report.requests, "{} requests, but {calls} calls of the judge", report.requests);
            let ns_per_call = run_time_ns as f64 / calls as f64;
            Ok(JudgeRun { connections, requests: report.requests, calls, ns_per_call })
        })
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stats {
    run_time_ns: u64,
    run_count: u64,
}

impl Stats {
    fn read(program: &OwnedFd) -> Result<Self> {
        let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
        Self::parse(&fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?)
    }

    /// From a program's fdinfo: lines of name, colon, tab, number.
    fn parse(text: &str) -> Result<Self> {
        let number = |name: &str| -> Result<u64> {
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| *key == name)
                .and_then(|(_, value)| value.trim().parse().ok())
                .with_context(|| format!("no {name} in the program's fdinfo"))
        };
        Ok(Self { run_time_ns: number("run_time_ns")?, run_count: number("run_cnt")? })
    }
}

/// The kernel counts the run time of all programs while this descriptor is open (Linux 5.8 and later).
fn enable_stats() -> Result<OwnedFd> {
    let mut kind = BPF_STATS_RUN_TIME;
    new_descriptor(BPF_ENABLE_STATS, &mut kind).context("BPF_ENABLE_STATS")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statistics_are_found_in_fdinfo() {
        let text =
            "pos:\t0\nflags:\t02000002\nprog_type:\t14\nrun_time_ns:\t1234\nrun_cnt:\t5\nmemlock:\t4096\n";
        assert_eq!(Stats::parse(text).unwrap(), Stats { run_time_ns: 1234, run_count: 5 });
        assert!(Stats::parse("pos:\t0\n").is_err());
    }
}
