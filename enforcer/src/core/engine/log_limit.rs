//! How much clients can make us log.

use tracing::info;

/// Refusals that are logged one by one between two ticks.
const LOG_LINES_MAX: u32 = 50;

/// How many lines a client can cause: between two ticks, [`LOG_LINES_MAX`]. The rest is counted and told as a number.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug, Default)]
pub(super) struct LogLimit {
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    pub(super) fn admit(&mut self) -> bool {
        if self.lines < LOG_LINES_MAX {
            self.lines += 1;
            return true;
        }
        self.left_out += 1;
        false
    }

    pub(super) fn refill(&mut self) {
        if self.left_out != 0 {
            info!(
                left_out = self.left_out,
                "more refusals than are logged one by one; `enforcer counters` has them all"
            );
        }
        *self = Self::default();
    }
}
