//! A real MCP server and client on the official SDK (`rmcp`), over streamable HTTP.

mod client;
mod server;

use anyhow::Result;
use rmcp::model::ProtocolVersion;

pub use client::{CallError, CallOutcome, Session, call_tool, call_tool_blocking};
pub use server::{McpServer, router, serve};

/// The newest protocol version that the SDK speaks: 2026-07-28, without a handshake.
#[must_use]
pub fn newest_version() -> ProtocolVersion {
    ProtocolVersion::LATEST
}

/// The protocol version called `name`, if the SDK knows it.
///
/// # Errors
/// When it does not; the message lists the known ones.
pub fn version(name: &str) -> Result<ProtocolVersion> {
    let known = ProtocolVersion::KNOWN_VERSIONS;
    known.iter().find(|version| version.as_str() == name).cloned().ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(ProtocolVersion::as_str).collect();
        anyhow::anyhow!("the SDK does not speak MCP {name}, only {}", names.join(", "))
    })
}
