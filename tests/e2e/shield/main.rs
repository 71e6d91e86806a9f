//! The shield on a real interface: two network namespaces, a veth pair between them, the server and its daemon at one end.

#[path = "../common/mod.rs"]
mod common;
mod life;
mod limits;
mod scene;
#[allow(dead_code, unused_imports, reason = "each test program uses its part")]
#[path = "../torture/mod.rs"]
mod torture;
mod traffic;
