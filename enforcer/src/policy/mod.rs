//! The policy: what is protected, by whose tokens, for which resource.
mod types;
pub use types::*;
