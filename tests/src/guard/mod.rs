//! Guards: what a test sets up on the machine, taken down again when the guard is dropped.

mod cgroup;
mod deadline;
mod netns;
mod process;

pub use cgroup::Cgroup;
pub use deadline::{Deadline, patience, wait_until};
pub use netns::{NetNs, VethPair, join, veth_pair};
pub use process::{Finished, Proc, bin_path, cpu_time, run, spawn_in};
