//! Servers that tests and the benchmark put behind the enforcer.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use enforcer_tests::{bench_server, peers, recorder};

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    server: Server,
}

#[derive(Subcommand)]
enum Server {
    /// The light epoll server of the benchmark: small JSON answers, `GET /blob?size=N`
    Bench {
        /// Address and port; port 0 takes a free one
        #[arg(long)]
        listen: SocketAddr,
        /// Threads, each with a listener of its own on the same port
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
        threads: u16,
    },
    /// Keeps every byte it reads
    Recorder {
        /// Address and port; port 0 takes a free one
        #[arg(long)]
        listen: SocketAddr,
        /// Path of the unix socket that takes orders
        #[arg(long)]
        control: PathBuf,
        /// How to serve, as JSON
        #[arg(long)]
        config: Option<String>,
    },
    /// Answers each request with its method, path, and its body's length and SHA-256
    Axum {
        /// Address and port; port 0 takes a free one
        #[arg(long)]
        listen: SocketAddr,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().server {
        Server::Bench { listen, threads } => bench(listen, threads),
        Server::Recorder { listen, control, config } => {
            let config = config.map(|text| serde_json::from_str(&text)).transpose().context("--config")?;
            let recorder = recorder::Recorder::start(listen, config.unwrap_or_default())?;
            recorder::serve_control(&recorder, &control)
        }
        Server::Axum { listen } => axum(listen),
    }
}

fn bench(listen: SocketAddr, threads: u16) -> Result<()> {
    let first = bench_server::shared_listener(listen)?;
    let addr = first.local_addr()?;
    let mut running = Vec::new();
    for _ in 1..threads {
        let listener = bench_server::shared_listener(addr)?;
        running.push(thread::spawn(move || bench_server::serve(&listener)));
    }
    println!("listening {addr}");
    bench_server::serve(&first)
}

fn axum(listen: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen).await?;
        println!("listening {}", listener.local_addr()?);
        peers::serve_axum(listener).await
    })
}
