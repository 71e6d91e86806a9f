//! Exit codes: what scripts see.

use std::io::{Error, ErrorKind};

use aya::maps::MapError;

use crate::control::ControlError;
use crate::datapath::LiveError;
use crate::lifecycle::UnloadError;
use crate::lifecycle::lock::LockError;

/// Done; also when the reader of the output went away.
pub const OK: u8 = 0;
/// Something failed; the message says what.
pub const FAILURE: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// There is no enforcement to look at, or no daemon to ask.
pub const NOT_LOADED: u8 = 3;
/// The command worked and its answer is no: the policy has defects, the token would be refused, a doctor's check failed.
pub const REJECTED: u8 = 4;
/// The caller lacks a right.
pub const NOT_PERMITTED: u8 = 5;
/// In the way: a daemon runs already, or connections are still guarded.
pub const BUSY: u8 = 6;

/// The codes for the help texts.
pub(super) const HELP: &str = "\
Exit codes:
  0  done
  1  failed; the message on stderr says why
  2  the command line is wrong
  3  no enforcement is loaded, or no daemon runs (reload, diff)
  4  the answer is no: defects in the policy (check, reload, diff), the token would
     be refused (explain), this machine can't enforce (doctor)
  5  not permitted; most commands need root
  6  in the way: a daemon is running, or connections are still guarded";

/// A code that a command chose itself, with its message.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failed {
    /// One of the constants of this module.
    pub code: u8,
    /// For stderr.
    pub message: String,
}

/// Fails with a code and a message.
pub(super) fn failed(code: u8, message: impl Into<String>) -> anyhow::Error {
    Failed { code, message: message.into() }.into()
}

/// The code for an error, by its causes.
#[must_use]
pub fn code_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(failed) = cause.downcast_ref::<Failed>() {
            return failed.code;
        }
        if let Some(LiveError::NotLoaded(_)) = cause.downcast_ref() {
            return NOT_LOADED;
        }
        if let Some(ControlError::NoDaemon { .. }) = cause.downcast_ref() {
            return NOT_LOADED;
        }
        if let Some(LockError::Held { .. }) = cause.downcast_ref() {
            return BUSY;
        }
        if let Some(UnloadError::StillGuarded { .. }) = cause.downcast_ref() {
            return BUSY;
        }
        if io_error(cause).is_some_and(|error| error.kind() == ErrorKind::PermissionDenied) {
            return NOT_PERMITTED;
        }
    }
    FAILURE
}

/// What the kernel said. aya's transparent variants hide it from the chain of causes.
fn io_error<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a Error> {
    match cause.downcast_ref() {
        Some(MapError::IoError(error) | MapError::CreateError { io_error: error, .. }) => Some(error),
        Some(MapError::SyscallError(call)) => Some(&call.io_error),
        _ => cause.downcast_ref(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn causes_decide_the_code() {
        let code = |error: anyhow::Error| code_of(&error);
        assert_eq!(code(LiveError::NotLoaded("x".into()).into()), NOT_LOADED);
        assert_eq!(code(LockError::Held { pin_name: "x".into(), pid: None }.into()), BUSY);
        assert_eq!(code(UnloadError::StillGuarded { count: 1, errors: vec![] }.into()), BUSY);
        assert_eq!(code(failed(REJECTED, "no")), REJECTED);
        assert_eq!(code(anyhow::anyhow!("boom")), FAILURE);
        let io = |kind: ErrorKind| Err::<(), _>(Error::from(kind)).context("while at it").unwrap_err();
        assert_eq!(code(io(ErrorKind::PermissionDenied)), NOT_PERMITTED);
        // Only stdout's reader may go away; any other broken pipe is a failure.
        assert_eq!(code(io(ErrorKind::BrokenPipe)), FAILURE);
        assert_eq!(code(io(ErrorKind::NotFound)), FAILURE);
        let map = MapError::IoError(ErrorKind::PermissionDenied.into());
        assert_eq!(code(LiveError::Map { name: "FLOWS", source: map }.into()), NOT_PERMITTED);
        let call =
            aya::sys::SyscallError { call: "bpf_obj_get", io_error: ErrorKind::PermissionDenied.into() };
        let map = MapError::SyscallError(call);
        assert_eq!(code(LiveError::Map { name: "FLOWS", source: map }.into()), NOT_PERMITTED);
    }
}
