//! Known ways around an enforcer: what was there before it, what goes past the socket's usual `read`, what it runs out of.

#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code, unused_imports, reason = "each test program uses its part")]
#[path = "../torture/mod.rs"]
mod torture;

mod before;
mod clock;
mod exhaustion;
#[allow(dead_code, reason = "each test program uses its part")]
mod maps;
mod past;
mod reading;
mod segments;
mod sockets;
mod wire;
