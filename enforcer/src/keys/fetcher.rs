//! Issuers' keys over the network, fetched without privilege.
//!
//! Name resolution, TLS and HTTP are the largest body of code that touches bytes from the network. They run in processes without
//! capabilities, without a user and behind a filter of system calls. One such process is forked off the daemon at its start, before
//! there is any secret; for each fetch it forks another, which hands the document back and ends. Only a document that could be
//! parsed there reaches the daemon, which parses it again.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::KeySet;
use super::fetch::{ATTEMPT_TIMEOUT, FetchError, MAX_DOCUMENT_BYTES, Remote, fetch_document};
use crate::privileges::{self, PrivilegeError};

/// Linux's user and group without rights (`overflowuid`, Debian's `nobody`).
const NOBODY: u32 = 65534;
/// Largest order, in bytes: a URL and a file of certificate authorities.
const MAX_ORDER_BYTES: u64 = 4 * 1024 * 1024;
/// Largest answer besides the document, in bytes.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

static FETCHER: OnceLock<OwnedFd> = OnceLock::new();

/// Why there is no process that fetches.
#[derive(Debug, thiserror::Error)]
pub enum FetcherError {
    /// A system call failed.
    #[error("cannot start the process that fetches keys: {0}")]
    System(#[from] nix::Error),
    /// It can't be run with less rights.
    #[error("the process that fetches keys: {0}")]
    Privileges(#[from] PrivilegeError),
}

/// What came, as one line of JSON before the document.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    /// Where the document is from.
    origin: String,
    /// Why there is none.
    error: Option<String>,
}

/// Forks the process that fetches keys for this one, and ends with it. Call it before any thread is started, and before there are
/// secrets. Without it, keys are fetched in the process itself (command line).
///
/// # Errors
/// See [`FetcherError`].
pub fn start() -> Result<(), FetcherError> {
    if FETCHER.get().is_some() {
        return Ok(());
    }
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let parent = nix::unistd::getpid();
    // SAFETY: the caller promises that there is one thread, so the child may do what it likes.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            let code = match give_up() {
                Ok(()) if nix::unistd::getppid() == parent => {
                    serve(&theirs);
                    0
                }
                Ok(()) => 0,
                Err(error) => {
                    tracing::error!(%error, "keys can't be fetched");
                    1
                }
            };
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { .. } => {
            let _ = FETCHER.set(ours);
            Ok(())
        }
    }
}

/// In the child: no user, no capability, few system calls.
fn give_up() -> Result<(), FetcherError> {
    use nix::sys::prctl;
    use nix::sys::resource::{Resource, setrlimit};
    use nix::sys::signal::{SigHandler, Signal, signal};

    // SAFETY: no handlers, only dispositions. SIGTERM to the whole group is for the daemon, which may still need keys while it
    // drains; our end is the end of the socket. Children that fetch are not waited for.
    unsafe {
        signal(Signal::SIGTERM, SigHandler::SigIgn)?;
        signal(Signal::SIGINT, SigHandler::SigIgn)?;
        signal(Signal::SIGHUP, SigHandler::SigIgn)?;
        signal(Signal::SIGCHLD, SigHandler::SigIgn)?;
    }
    prctl::set_name(c"enforcer-keys")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, 64, 64)?;
    privileges::drop_all_capabilities(become_nobody)?;
    // After the change of user, which clears it.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    privileges::restrict_fetcher()?;
    Ok(())
}

fn become_nobody() -> nix::Result<()> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)
}

/// Takes sockets, one for each fetch, until the daemon has gone.
fn serve(control: &OwnedFd) {
    loop {
        let stream = match receive(control) {
            Ok(Some(stream)) => stream,
            Err(Errno::EINTR) => continue,
            Ok(None) | Err(_) => return,
        };
        // SAFETY: this process has one thread.
        if let Ok(ForkResult::Child) = unsafe { fork() } {
            // SAFETY: no memory involved. Bounds whatever hangs below.
            unsafe { libc::alarm(2 * ATTEMPT_TIMEOUT.as_secs() as u32) };
            let code = i32::from(answer(stream).is_err());
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) }
        }
    }
}

/// The next socket; `None` when the other side has gone.
fn receive(control: &OwnedFd) -> Result<Option<StdStream>, Errno> {
    let mut byte = [0; 1];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message =
        recvmsg::<()>(control.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let [descriptor] = descriptors[..]
        {
            // SAFETY: the kernel just made it for us.
            return Ok(Some(StdStream::from(unsafe { OwnedFd::from_raw_fd(descriptor) })));
        }
    }
    Ok(None)
}

/// One fetch: reads the order, writes the answer.
fn answer(mut stream: StdStream) -> std::io::Result<()> {
    let mut order = Vec::new();
    (&mut stream).take(MAX_ORDER_BYTES).read_to_end(&mut order)?;
    let remote: Remote = serde_json::from_slice(&order)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let fetched = runtime.block_on(async {
        let (origin, document) = fetch_document(&remote).await?;
        match KeySet::parse(&document) {
            Ok(_) => Ok((origin, document)),
            Err(source) => Err(FetchError::KeySet { origin, source }),
        }
    });
    let (answer, document) = match fetched {
        Ok((origin, document)) => (Answer { origin, error: None }, document),
        Err(error) => (Answer { origin: String::new(), error: Some(error.to_string()) }, Vec::new()),
    };
    let mut bytes = serde_json::to_vec(&answer)?;
    bytes.push(b'\n');
    bytes.extend(document);
    stream.write_all(&bytes)
}

/// Lets the other process fetch; `None` when there is none.
pub(super) async fn fetch(remote: &Remote) -> Option<Result<(String, Vec<u8>), FetchError>> {
    let control = FETCHER.get()?;
    Some(order(control, remote).await.unwrap_or_else(|defect| Err(FetchError::Task { defect })))
}

async fn order(control: &OwnedFd, remote: &Remote) -> Result<Result<(String, Vec<u8>), FetchError>, String> {
    let said = |error: &dyn std::fmt::Display| format!("the process that fetches keys: {error}");
    let (ours, theirs) = StdStream::pair().map_err(|error| said(&error))?;
    let descriptors = [theirs.as_raw_fd()];
    sendmsg::<()>(
        control.as_raw_fd(),
        &[IoSlice::new(b"f")],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    )
    .map_err(|error| said(&error))?;
    drop(theirs);
    ours.set_nonblocking(true).map_err(|error| said(&error))?;
    let mut stream = UnixStream::from_std(ours).map_err(|error| said(&error))?;
    let order = serde_json::to_vec(remote).map_err(|error| said(&error))?;
    stream.write_all(&order).await.map_err(|error| said(&error))?;
    stream.shutdown().await.map_err(|error| said(&error))?;
    let mut bytes = Vec::new();
    let limit = MAX_ANSWER_BYTES + MAX_DOCUMENT_BYTES;
    stream.take(limit).read_to_end(&mut bytes).await.map_err(|error| said(&error))?;
    read_answer(&bytes).ok_or_else(|| said(&"ended without an answer"))
}

fn read_answer(bytes: &[u8]) -> Option<Result<(String, Vec<u8>), FetchError>> {
    let end = bytes.iter().position(|&byte| byte == b'\n')?;
    let answer: Answer = serde_json::from_slice(&bytes[..end]).ok()?;
    Some(match answer.error {
        Some(text) => Err(FetchError::Remote { text }),
        None => Ok((answer.origin, bytes[end + 1..].to_vec())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_line_and_a_document() {
        let good = read_answer(b"{\"origin\":\"https://x/\",\"error\":null}\n{}\n{}").unwrap().unwrap();
        assert_eq!(good, ("https://x/".to_owned(), b"{}\n{}".to_vec()));
        let bad = read_answer(b"{\"origin\":\"\",\"error\":\"no route\"}\n").unwrap().unwrap_err();
        assert_eq!(bad.to_string(), "no route");
    }

    #[test]
    fn half_an_answer_is_none() {
        assert!(read_answer(b"").is_none());
        assert!(read_answer(b"{\"origin\":\"https://x/\",\"error\":null}").is_none());
        assert!(read_answer(b"nonsense\n{}").is_none());
    }
}
