//! The MCP server: two tools, at `/mcp`, all protocol versions of the SDK side by side.

use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::{Implementation, ServerCapabilities, ServerConfig};
use rmcp::schemars::{self, JsonSchema};
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use rmcp::{ServerHandler, tool, tool_handler, tool_router};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

/// The handler behind `/mcp`. It knows nothing of tokens: that is the enforcer's business.
#[derive(Debug, Clone, Copy, Default)]
pub struct McpServer;

#[derive(Debug, Deserialize, JsonSchema)]
struct AddArguments {
    /// First summand.
    a: i64,
    /// Second summand.
    b: i64,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct EchoArguments {
    /// What comes back.
    text: String,
}

#[tool_router]
impl McpServer {
    #[tool(description = "Adds two whole numbers")]
    fn add(&self, Parameters(AddArguments { a, b }): Parameters<AddArguments>) -> String {
        a.saturating_add(b).to_string()
    }

    #[tool(description = "Gives back the text it was given")]
    fn echo(&self, Parameters(EchoArguments { text }): Parameters<EchoArguments>) -> String {
        text
    }
}

#[tool_handler]
impl ServerHandler for McpServer {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("enforcer-mcp", env!("CARGO_PKG_VERSION")))
    }
}

/// The axum router with the server at `/mcp` and a `/healthz` that answers "ok". Any `Host` is
/// accepted, since tests reach it under many addresses.
pub fn router(shutdown: CancellationToken) -> Router {
    let config =
        StreamableHttpServerConfig::default().disable_allowed_hosts().with_cancellation_token(shutdown);
    let service =
        StreamableHttpService::new(|| Ok(McpServer), Arc::new(LocalSessionManager::default()), config);
    Router::new().route("/healthz", axum::routing::get(async || "ok")).nest_service("/mcp", service)
}

/// Serves until `shutdown` is cancelled.
///
/// # Errors
/// When accepting fails for good.
pub async fn serve(listener: tokio::net::TcpListener, shutdown: CancellationToken) -> Result<()> {
    let router = router(shutdown.child_token());
    Ok(axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await?)
}
