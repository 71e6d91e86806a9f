//! What the daemon's tables add up to.

use enforcer_common::abi::{MAX_BUCKETS, MAX_GRANTS, MAX_REPLIES, PUNTS_BYTES, REPLY_MAX_BYTES};

use super::doomed::{DOOMED_BYTES, MAX_DOOMED};
use super::engine::{FLOW_BYTES, FLOWS_MAX, PARKED_TOTAL_MAX_BYTES};
use super::remembered;

/// A growing table or buffer is at most twice as large as what is in it.
const SLACK: u64 = 2;
/// A grant in the two tables that hold it, and a slot that rests.
const GRANT_BYTES: u64 = 384;
/// A limit's bucket in the tables that hold it.
const BUCKET_BYTES: u64 = 128;
/// Program, thread stacks, policy, key sets, log buffers, and what parsing the kernel's type information at the start leaves with the
/// allocator.
const BASE_BYTES: u64 = 128 << 20;

/// Most resident memory that the daemon can need, in bytes: its tables full, every parked byte used, the ring buffer's pages mapped
/// twice (as it maps itself). Clients can't make it grow beyond.
pub const MEMORY_MAX_BYTES: u64 = BASE_BYTES
    + 2 * PUNTS_BYTES as u64
    + SLACK * PARKED_TOTAL_MAX_BYTES as u64
    + SLACK * FLOWS_MAX as u64 * FLOW_BYTES
    + SLACK * MAX_DOOMED as u64 * DOOMED_BYTES
    + SLACK * MAX_GRANTS as u64 * GRANT_BYTES
    + SLACK * MAX_BUCKETS as u64 * BUCKET_BYTES
    + SLACK * remembered::ALL_MAX_BYTES as u64
    + SLACK * MAX_REPLIES as u64 * REPLY_MAX_BYTES as u64;
