//! What surrounds an enforcement: where it lies, who may run it, how it ends, and whether this machine can hold one.

pub mod clock;
pub mod doctor;
pub mod lock;
pub mod paths;
pub mod start;
#[cfg(test)]
pub(crate) mod testing;
pub mod unguarded;
mod unload;
mod usage;

pub use unload::{UnloadError, UnloadOptions, UnloadReport, unload};
pub use usage::Usage;
