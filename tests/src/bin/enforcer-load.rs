//! Closed-loop load on an HTTP server, with latencies and CPU time.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::load::{LoadConfig, LoadReport, Stop, run, typical_request};

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// The server
    #[arg(long)]
    target: SocketAddr,
    /// Keep-alive connections
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Client threads
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Stop after this many requests instead of a time
    #[arg(long)]
    requests: Option<u64>,
    /// Length of the run in milliseconds
    #[arg(long, default_value_t = 3000)]
    duration_ms: u64,
    /// Path in the request line
    #[arg(long, default_value = "/mcp")]
    path: String,
    /// Send typical MCP calls that rotate over this many ES256 bearers of a throw-away issuer
    #[arg(long, default_value_t = 1)]
    tokens: usize,
    /// Send the bytes of these files instead
    #[arg(long = "request", value_name = "FILE")]
    request_files: Vec<PathBuf>,
    /// Add up the CPU time of these processes
    #[arg(long = "watch", value_name = "PID")]
    watched_pids: Vec<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let stop =
        arguments.requests.map_or(Stop::After(Duration::from_millis(arguments.duration_ms)), Stop::Requests);
    let mut config = LoadConfig::new(arguments.target, arguments.connections, requests(&arguments)?, stop);
    config.threads = arguments.threads;
    config.watched_pids.clone_from(&arguments.watched_pids);
    let report = run(&config)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn requests(arguments: &Arguments) -> Result<Vec<Vec<u8>>> {
    if !arguments.request_files.is_empty() {
        let read = |path: &PathBuf| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        return arguments.request_files.iter().map(read).collect();
    }
    let host = arguments.target.to_string();
    let issuer = Issuer::new("https://issuer.example", Alg::Es256)?;
    (0..arguments.tokens.max(1))
        .map(|number| {
            let mint = issuer.mint().audience("https://mcp.example/mcp").scope("mcp:tools");
            let token = mint.subject(&format!("user-{number}")).expires_in(3600).sign()?;
            Ok(typical_request(&host, &arguments.path, Some(&token)))
        })
        .collect()
}

fn print(report: &LoadReport) {
    let latency = &report.latency;
    println!(
        "{} requests in {:.2} s: {:.0} req/s, statuses {:?}, {} errors, {} reconnects",
        report.requests,
        report.elapsed_s,
        report.requests_per_s,
        report.status_counts,
        report.errors,
        report.reconnects
    );
    println!(
        "latency us: mean {:.1}, p50 {:.1}, p90 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}",
        latency.mean_us, latency.p50_us, latency.p90_us, latency.p99_us, latency.p999_us, latency.max_us
    );
    println!(
        "CPU: {:.2} us per request; machine {:.0} ms run, {:.0} ms by ticks; client {:.0} ms, watched {:.0} ms",
        report.cpu_us_per_request,
        report.cpu.machine_run_us / 1e3,
        report.cpu.machine_tick_us / 1e3,
        report.cpu.self_us / 1e3,
        report.cpu.watched_us / 1e3
    );
}
