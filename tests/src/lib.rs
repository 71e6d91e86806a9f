//! Support for the end-to-end tests, the demo and the benchmark: guards that clean up after
//! themselves, a token issuer, clients that send exact bytes, and the servers behind the enforcer.
//!
//! | module | what is in it |
//! |---|---|
//! | [`guard`] | cgroups, network namespaces, child processes, time limits |
//! | [`bpf`], [`frame`], [`link`](mod@link) | frames, for programs that the kernel runs with them, and onto interfaces |
//! | [`enforcement`] | a daemon over a cgroup of its own, with policy, issuer and server |
//! | [`caller`] | clients in processes of their own, anywhere |
//! | [`issuer`] | signing keys, tokens with any defect, JWKS and metadata over loopback HTTP |
//! | [`raw`] | an HTTP/1.1 client that sends exactly the bytes it is given, in any segmentation |
//! | [`recorder`] | a server that records what it read |
//! | [`bench_server`] | the light epoll server behind the benchmark |
//! | [`mod@bench`] | the benchmark's measures and figures |
//! | [`load`] | the closed-loop load generator and its CPU accounting |
//! | [`peers`] | HTTP servers of other makers: Python, Node, axum |
//! | [`mcp`] | an MCP server and client on the official SDK |
//! | [`demo`] | the steps of `cargo xtask demo` |

pub mod bench;
pub mod bench_server;
pub mod bpf;
pub mod caller;
pub mod demo;
pub mod enforcement;
pub mod frame;
pub mod guard;
pub mod issuer;
pub mod link;
pub mod load;
pub mod mcp;
pub mod peers;
pub mod raw;
pub mod recorder;
mod wire;
