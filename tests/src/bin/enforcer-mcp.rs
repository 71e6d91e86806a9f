//! A real MCP server and a real MCP client.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use enforcer_tests::mcp::{self, CallOutcome};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

const CALL_LIMIT: Duration = Duration::from_secs(30);

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Serves the tools `add` and `echo` at /mcp, until SIGTERM
    Server {
        /// Address and port; port 0 takes a free one
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Uses a server's tools
    Client {
        /// The server's URL, e.g. http://127.0.0.1:8080/mcp
        #[arg(long)]
        url: String,
        /// Environment variable that holds the bearer token; without it none is sent
        #[arg(long, value_name = "VAR")]
        token_env: Option<String>,
        /// Protocol version [default: the newest]
        #[arg(long)]
        protocol: Option<String>,
        #[command(subcommand)]
        action: Action,
    },
}

#[derive(Subcommand)]
enum Action {
    /// Calls a tool and prints the outcome as JSON; exit code 3 when it is a refusal or an error
    Call {
        /// The tool's name
        tool: String,
        /// Its arguments, a JSON object
        arguments: String,
    },
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    match Arguments::parse().role {
        Role::Server { listen } => serve(listen).await,
        Role::Client { url, token_env, protocol, action: Action::Call { tool, arguments } } => {
            let token = token_env
                .map(|name| std::env::var(&name).with_context(|| format!("environment variable {name}")))
                .transpose()?;
            let protocol = protocol.map_or_else(|| Ok(mcp::newest_version()), |name| mcp::version(&name))?;
            let arguments = serde_json::from_str(&arguments).context("the tool's arguments")?;
            let outcome =
                mcp::call_tool(&url, token.as_deref(), &protocol, &tool, arguments, CALL_LIMIT).await?;
            println!("{}", serde_json::to_string(&outcome)?);
            let answered = matches!(outcome, CallOutcome::Answered { is_error: false, .. });
            Ok(if answered { ExitCode::SUCCESS } else { ExitCode::from(3) })
        }
    }
}

async fn serve(listen: SocketAddr) -> Result<ExitCode> {
    let listener = tokio::net::TcpListener::bind(listen).await?;
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    println!("listening {}", listener.local_addr()?);
    let on_signal = shutdown.clone();
    tokio::spawn(async move {
        terminate.recv().await;
        on_signal.cancel();
    });
    mcp::serve(listener, shutdown).await?;
    Ok(ExitCode::SUCCESS)
}
