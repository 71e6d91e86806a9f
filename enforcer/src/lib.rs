//! Zero-trust authorization for MCP servers, enforced in the kernel.
//!
//! The library holds everything that the `enforcer` binary does, so that tests can drive it.

pub mod authz;
pub mod cli;
pub mod control;
pub mod core;
pub mod daemon;
pub mod datapath;
pub mod http;
pub mod keys;
pub mod lifecycle;
pub mod policy;
pub mod privileges;
pub mod revocation;
pub mod token;
pub mod workload;
