//! The daemon's control socket: `enforcer reload` and `enforcer diff` ask through it.
//!
//! A unix stream socket beside the lock, for root only. A request is one line of JSON, and so is its answer.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::core::Losses;
use crate::lifecycle::lock::RUN_DIR;
use crate::policy::PolicyDiff;

/// Longest line, in bytes: a policy file of the greatest size, with every other byte escaped.
pub const MAX_LINE_BYTES: u64 = 4 << 20;
/// How long an answer may take: the new issuers' keys are waited for.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// Read the policy file again and switch to it.
    Reload,
    /// Say what a policy would change, and change nothing.
    Diff {
        /// Absolute path: for messages, and for where its relative paths begin.
        file: String,
        /// The file's content.
        text: String,
    },
}

/// What comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Response {
    /// It was done, or there was nothing to do.
    Done(Box<Report>),
    /// The policy has defects; nothing was changed.
    Rejected {
        /// The defects, a line each.
        error: String,
    },
    /// Something else went wrong; nothing was changed.
    Failed {
        /// What.
        error: String,
    },
}

/// What a switch to another policy changes, or would.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The policies differ.
    pub changed: bool,
    /// The policy generation in force afterwards.
    pub generation: u64,
    /// What the policy's author should know.
    pub warnings: Vec<String>,
    /// How the policies differ.
    pub diff: PolicyDiff,
    /// Tokens that the kernel lets pass.
    pub grants: u64,
    /// Guarded connections.
    pub flows: u64,
    /// Those of them that lose their access, by server and reason.
    pub losses: Vec<Losses>,
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error(
        "no daemon runs for `{pin_name}`: {path} does not answer; start one with `enforcer run --policy FILE`"
    )]
    NoDaemon {
        /// Which enforcement.
        pin_name: String,
        /// The socket.
        path: PathBuf,
    },
    /// The socket can't be used.
    #[error("cannot talk to the daemon through {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The socket of an enforcement's daemon.
#[must_use]
pub fn socket_path(pin_name: &str) -> PathBuf {
    Path::new(RUN_DIR).join(format!("{pin_name}.sock"))
}

/// Asks the daemon of the enforcement `pin_name`.
///
/// # Errors
/// See [`ControlError`].
pub fn ask(pin_name: &str, request: &Request) -> Result<Response, ControlError> {
    let path = socket_path(pin_name);
    let stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Err(ControlError::NoDaemon { pin_name: pin_name.to_owned(), path });
        }
        Err(source) => return Err(ControlError::Io { path, source }),
    };
    talk(&stream, request).map_err(|source| ControlError::Io { path, source })
}

fn talk(mut stream: &UnixStream, request: &Request) -> std::io::Result<Response> {
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).take(MAX_LINE_BYTES).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "the daemon closed without an answer"));
    }
    Ok(serde_json::from_str(&answer)?)
}
