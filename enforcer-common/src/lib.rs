//! What the kernel programs and the daemon share.
//!
//! - [`abi`]: the types in the BPF maps and in the ring buffer, with their layout asserted.
//! - [`head`] and [`digest`]: where a request head ends, how long its body is, and its keyed digest.
//! - [`chunked`]: the framing of a chunked body.
//! - [`flow`]: the states of a connection and who owns it at any instant.
//! - [`limit`]: how often something may happen.
//! - [`shield`]: which packets never reach TCP.
//! - [`scratch`]: who may use a CPU's scratch memory.
//! - [`verdict`]: when a known head is allowed.
//!
//! Nothing here does I/O, allocates or reads a clock. The same code runs in the kernel and in the host's tests.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod chunked;
pub mod digest;
pub mod flow;
pub mod head;
pub mod limit;
pub mod scratch;
pub mod shield;
pub mod verdict;
