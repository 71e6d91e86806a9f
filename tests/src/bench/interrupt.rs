//! Ctrl-C and SIGTERM: the benchmark stops between two runs, so that what it set up is taken down.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_signal: libc::c_int) {
    STOPPED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP end [`super::run`] with an error instead of ending the process.
///
/// # Errors
/// When a handler can't be set.
pub fn catch_signals() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(stop), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does one atomic store, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot handle {signal}"))?;
    }
    Ok(())
}

/// An error once a signal has come.
pub(super) fn check() -> Result<()> {
    ensure!(!STOPPED.load(Ordering::Relaxed), "interrupted by a signal");
    Ok(())
}
