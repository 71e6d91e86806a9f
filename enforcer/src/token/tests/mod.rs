//! Ways around token verification, one test each, and what must pass.

mod again;
mod algorithms_and_keys;
mod audience;
mod explain;
mod form;
mod good;
mod kinds;
mod random;
mod times;

use serde_json::Value;

use super::{TokenError, TokenReason, VerifiedToken};

const GONE: Value = Value::Null;

#[track_caller]
fn refused(result: Result<VerifiedToken, TokenError>, reason: TokenReason) -> TokenError {
    match result {
        Ok(token) => panic!("accepted {token:?}, expected {reason}"),
        Err(error) => {
            assert_eq!(error.reason(), reason, "{error}");
            error
        }
    }
}
