//! Time limits: no test may hang.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// A hard limit on the life of a test. When it passes before the guard is dropped, the process
/// says which test hung and aborts; its children die with it.
#[derive(Debug)]
pub struct Deadline {
    end: Instant,
    // Dropped with the guard; the watchdog thread sees the channel close and ends.
    _alive: Sender<()>,
}

impl Deadline {
    /// Starts the clock for `what` (a test's name).
    #[must_use]
    pub fn new(what: &str, limit: Duration) -> Self {
        let limit = limit * patience();
        let (alive, closed) = channel();
        let what = what.to_owned();
        thread::spawn(move || watch(&what, limit, &closed));
        Self { end: Instant::now() + limit, _alive: alive }
    }

    /// Time left; zero when the limit has passed.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }
}

/// How many times as long everything may take here: `ENFORCER_TEST_PATIENCE`, for machines that are emulated.
#[must_use]
pub fn patience() -> u32 {
    std::env::var("ENFORCER_TEST_PATIENCE").ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

fn watch(what: &str, limit: Duration, closed: &Receiver<()>) {
    if closed.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
        // Not eprintln: the test harness captures that, and the abort would swallow it.
        drop(writeln!(io::stderr(), "{what}: not done after {limit:?}, aborting the test process"));
        std::process::abort();
    }
}

/// Calls `probe` every 5 ms until it gives a value.
///
/// # Errors
/// When `timeout` passes first; the message names `what`.
pub fn wait_until<T>(what: &str, timeout: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + timeout;
    loop {
        if let Some(value) = probe() {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("{what}: not seen within {timeout:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}
