//! The load generator: a fixed number of connections, each with one request in flight.

mod client;
mod cpu;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use hdrhistogram::Histogram;
use serde::Serialize;

pub use cpu::{CpuClock, CpuUse, RunSource};

use crate::raw::RequestBuilder;

/// When a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// After this many answered requests in all (each thread does an equal share).
    Requests(u64),
    /// After this long; requests in flight are dropped.
    After(Duration),
}

/// A run.
#[derive(Debug, Clone)]
pub struct LoadConfig {
    /// The server.
    pub target: SocketAddr,
    /// Keep-alive connections in all, at least 1.
    pub connections: usize,
    /// Client threads, at least 1 and at most the number of connections.
    pub threads: usize,
    /// Complete requests; each connection sends them in turn, the connections offset to each other.
    pub requests: Vec<Vec<u8>>,
    /// When it ends.
    pub stop: Stop,
    /// The run fails when no answer comes for so long.
    pub stall_limit: Duration,
    /// Processes whose CPU time is added up in [`CpuUse::watched_us`], e.g. the server and the daemon.
    pub watched_pids: Vec<u32>,
}

impl LoadConfig {
    /// One thread, ten seconds without an answer are a failure, no process watched.
    #[must_use]
    pub fn new(target: SocketAddr, connections: usize, requests: Vec<Vec<u8>>, stop: Stop) -> Self {
        let stall_limit = Duration::from_secs(10);
        Self { target, connections, threads: 1, requests, stop, stall_limit, watched_pids: Vec::new() }
    }
}

/// What a run measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoadReport {
    /// Answered requests.
    pub requests: u64,
    /// From the first request to the last answer.
    pub elapsed_s: f64,
    /// Answered requests per second.
    pub requests_per_s: f64,
    /// From the first byte sent to the last byte received.
    pub latency: Latency,
    /// Answers by status code.
    pub status_counts: BTreeMap<u16, u64>,
    /// Connections that broke with a request in flight.
    pub errors: u64,
    /// Connections opened again, after an error or because the server closed after an answer.
    pub reconnects: u64,
    /// Bytes of all answers.
    pub bytes_received: u64,
    /// CPU time around the run.
    pub cpu: CpuUse,
    /// CPU time of the whole machine per answered request, from [`CpuUse::machine_run_us`].
    pub cpu_us_per_request: f64,
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Arithmetic mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Longest.
    pub max_us: f64,
}

/// Counts of one client thread.
pub(crate) struct Tally {
    pub(crate) latency_ns: Histogram<u64>,
    pub(crate) status_counts: Vec<u64>,
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    pub(crate) reconnects: u64,
    pub(crate) bytes_received: u64,
}

impl Tally {
    /// Three digits over 1 us to 60 s.
    fn new() -> Result<Self> {
        let latency_ns = Histogram::new_with_bounds(1_000, 60_000_000_000, 3)
            .map_err(|error| anyhow!("histogram bounds: {error}"))?;
        let status_counts = vec![0; 600];
        Ok(Self { latency_ns, status_counts, requests: 0, errors: 0, reconnects: 0, bytes_received: 0 })
    }

    fn add(&mut self, other: &Self) -> Result<()> {
        self.latency_ns.add(&other.latency_ns).map_err(|error| anyhow!("histograms differ: {error}"))?;
        for (sum, count) in self.status_counts.iter_mut().zip(&other.status_counts) {
            *sum += count;
        }
        self.requests += other.requests;
        self.errors += other.errors;
        self.reconnects += other.reconnects;
        self.bytes_received += other.bytes_received;
        Ok(())
    }
}

/// Runs the load. Connections are opened before the clocks start.
///
/// # Errors
/// When the configuration is empty, a connection can't be opened, an answer is no HTTP with a
/// length, or nothing is answered for [`LoadConfig::stall_limit`].
pub fn run(config: &LoadConfig) -> Result<LoadReport> {
    ensure!(config.connections > 0 && !config.requests.is_empty(), "no connection or no request to send");
    let threads = config.threads.clamp(1, config.connections);
    let mut clients = Vec::new();
    for thread in 0..threads {
        let share = |total: usize| total / threads + usize::from(thread < total % threads);
        let stop = match config.stop {
            Stop::Requests(total) => Stop::Requests(share(usize::try_from(total)?) as u64),
            after @ Stop::After(_) => after,
        };
        clients.push(client::Client::connect(config, thread * 31, share(config.connections), stop)?);
    }
    let cpu = CpuClock::start(&config.watched_pids)?;
    let start = Instant::now();
    let outcomes: Vec<Result<Tally>> = thread::scope(|scope| {
        let running: Vec<_> = clients.into_iter().map(|client| scope.spawn(|| client.run())).collect();
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a client thread panicked"))?)
            .collect()
    });
    let elapsed = start.elapsed();
    let cpu = cpu.stop()?;
    let mut total = Tally::new()?;
    for outcome in outcomes {
        total.add(&outcome.context("load")?)?;
    }
    Ok(report(&total, elapsed, cpu))
}

#[expect(clippy::cast_precision_loss, reason = "reported figures, far below 2^53")]
fn report(total: &Tally, elapsed: Duration, cpu: CpuUse) -> LoadReport {
    let at = |quantile: f64| total.latency_ns.value_at_quantile(quantile) as f64 / 1e3;
    let status_counts = (0..)
        .zip(&total.status_counts)
        .filter(|(_, count)| **count > 0)
        .map(|(status, count)| (status, *count))
        .collect();
    LoadReport {
        requests: total.requests,
        elapsed_s: elapsed.as_secs_f64(),
        requests_per_s: total.requests as f64 / elapsed.as_secs_f64(),
        latency: Latency {
            mean_us: total.latency_ns.mean() / 1e3,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: total.latency_ns.max() as f64 / 1e3,
        },
        status_counts,
        errors: total.errors,
        reconnects: total.reconnects,
        bytes_received: total.bytes_received,
        cpu,
        cpu_us_per_request: cpu.machine_run_us / total.requests.max(1) as f64,
    }
}

/// An MCP call whose head has about 900 bytes with an ES256 bearer: what a usual SDK client and an
/// agent's tracing put in.
#[must_use]
pub fn typical_request(host: &str, path: &str, token: Option<&str>) -> Vec<u8> {
    let body = br#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hello"},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}"#;
    let mut request = RequestBuilder::new("POST", path)
        .header("Host", host)
        .header("Accept", "application/json, text/event-stream")
        .header("Content-Type", "application/json")
        .header("User-Agent", "mcp-client/3.9 (linux; x86_64)")
        .header("MCP-Protocol-Version", "2026-07-28")
        .header("Mcp-Method", "tools/call")
        .header("Mcp-Name", "echo");
    if let Some(token) = token {
        request = request.bearer(token);
    }
    request
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .header("tracestate", "es=s:1,vendor=00f067aa0ba902b7")
        .header("x-request-id", "0b54d5f7-3a39-4f43-8e7b-6b8d0a5f1c9e")
        .header("Accept-Encoding", "gzip, deflate, br")
        .header("Connection", "keep-alive")
        .body(body)
        .build()
}
