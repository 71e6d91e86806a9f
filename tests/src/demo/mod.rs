//! The demo: an issuer, a real MCP server and a real MCP client, and the enforcer between them, in steps that say what
//! is done, what was promised and what happened. Each promise is checked; nothing is shown that was not measured.

mod acts;
mod challenge;
mod cli;
mod narrator;
mod stage;

pub use acts::play;
pub use narrator::Narrator;
pub use stage::Stage;
