//! Bytes for guarded sockets, as datagrams to the inject program.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

use enforcer_common::abi::{
    INJECT_HAND_BACK, INJECT_TO_CLIENT, INJECT_TO_SERVER, INJECT_TO_SINK, InjectHeader, MAX_INJECTORS,
    PUNT_CHUNK_BYTES,
};
use enforcer_common::flow::Ctl;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, SockaddrStorage, sendmsg, setsockopt, shutdown,
    socketpair, sockopt,
};

use super::{LiveError, Maps};

/// Bytes that may wait in one socket pair for slow servers or clients.
const SEND_BUFFER_BYTES: usize = 32 << 20;
/// Pairs for bytes to servers; the others carry answers to clients. Servers share them by number, so that one which does not
/// read can fill only its own pair.
const SERVER_PAIRS: u32 = MAX_INJECTORS - 2;

/// Why bytes were not injected. The flow must be destroyed then.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The pair is full: the receivers do not read.
    #[error("the injection buffer is full")]
    Full,
    /// The kernel refused the datagram.
    #[error("cannot send to the inject program: {0}")]
    Send(nix::Error),
    /// A pair could not be made.
    #[error("cannot make a socket pair: {0}")]
    Pair(nix::Error),
    /// A pair could not be put under the program.
    #[error(transparent)]
    Map(#[from] LiveError),
}

/// By what right bytes go, or for want of which.
#[derive(Debug, Clone, Copy, Default)]
struct Right {
    grant_serial: u64,
    is_refusal: bool,
}

/// The daemon's ends of the socket pairs.
pub struct Injectors {
    ours: Vec<OwnedFd>,
    /// The kernel's ends and the sink: open as long as we live, or the maps would lose them.
    _theirs: Vec<OwnedFd>,
}

impl Injectors {
    /// Makes the pairs and puts them under the inject program.
    ///
    /// # Errors
    /// See [`InjectError`].
    pub fn new(maps: &mut Maps) -> Result<Self, InjectError> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for index in 0..MAX_INJECTORS {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let (mine, kernel) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)
                .map_err(InjectError::Pair)?;
            for end in [&mine, &kernel] {
                setsockopt(end, sockopt::SndBufForce, &SEND_BUFFER_BYTES).map_err(InjectError::Pair)?;
                setsockopt(end, sockopt::RcvBufForce, &SEND_BUFFER_BYTES).map_err(InjectError::Pair)?;
            }
            maps.set_injector(index, &kernel)?;
            ours.push(mine);
            theirs.push(kernel);
        }
        let (sink, peer) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)
            .map_err(InjectError::Pair)?;
        maps.set_sink(&sink)?;
        // Sending to it is an error, yet it stays connected: a sink whose peer is gone could not be redirected to.
        shutdown(peer.as_raw_fd(), Shutdown::Read).map_err(InjectError::Pair)?;
        theirs.extend([sink, peer]);
        let injectors = Self { ours, _theirs: theirs };
        let none = Ctl(0);
        injectors.carry(0, INJECT_TO_SINK, 0, none, Right::default(), b"x")?;
        Ok(injectors)
    }

    fn send(&self, pair: u32, header: &InjectHeader, bytes: &[u8]) -> Result<(), InjectError> {
        // SAFETY: the header is `repr(C)`, integers without padding.
        let header = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(header).cast::<u8>(), size_of::<InjectHeader>())
        };
        let socket = &self.ours[pair as usize];
        let parts = [IoSlice::new(header), IoSlice::new(bytes)];
        match sendmsg::<SockaddrStorage>(
            socket.as_raw_fd(),
            &parts,
            &[],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => Ok(()),
            Err(nix::Error::EAGAIN | nix::Error::ENOBUFS) => Err(InjectError::Full),
            Err(error) => Err(InjectError::Send(error)),
        }
    }

    fn carry(
        &self,
        pair: u32,
        kind: u32,
        cookie: u64,
        ctl: Ctl,
        right: Right,
        bytes: &[u8],
    ) -> Result<(), InjectError> {
        for part in bytes.chunks(PUNT_CHUNK_BYTES) {
            let header = InjectHeader {
                cookie,
                expected_ctl: ctl.0,
                new_ctl: 0,
                remaining_bytes: 0,
                chunked: 0,
                grant_serial: right.grant_serial,
                kind,
                write_seq_mark: 0,
                flags: 0,
                refusal: u32::from(right.is_refusal),
            };
            self.send(pair, &header, part)?;
        }
        Ok(())
    }

    /// Bytes for the server of a flow that is ours in `ctl`'s epoch, by the right of a grant (0: none is needed), which the flow
    /// remembers.
    ///
    /// # Errors
    /// See [`InjectError`]; part of the bytes may have gone.
    pub fn to_server(
        &self,
        server_id: u32,
        cookie: u64,
        ctl: Ctl,
        grant_serial: u64,
        bytes: &[u8],
    ) -> Result<(), InjectError> {
        let right = Right { grant_serial, is_refusal: false };
        self.carry(server_id % SERVER_PAIRS, INJECT_TO_SERVER, cookie, ctl, right, bytes)
    }

    /// An answer for the client of such a flow; `is_refusal`: it counts against its source.
    ///
    /// # Errors
    /// See [`InjectError`].
    pub fn to_client(
        &self,
        cookie: u64,
        ctl: Ctl,
        bytes: &[u8],
        is_refusal: bool,
    ) -> Result<(), InjectError> {
        let right = Right { grant_serial: 0, is_refusal };
        self.carry(self.client_pair(cookie), INJECT_TO_CLIENT, cookie, ctl, right, bytes)
    }

    fn client_pair(&self, cookie: u64) -> u32 {
        SERVER_PAIRS + (cookie % u64::from(MAX_INJECTORS - SERVER_PAIRS)) as u32
    }

    /// Gives a flow back to the kernel, if its control word still is the expected one. It goes through the pair that answers use:
    /// by the time it is sent, everything sent before on any pair is queued at its socket.
    ///
    /// # Errors
    /// See [`InjectError`].
    pub fn hand_back(&self, header: InjectHeader) -> Result<(), InjectError> {
        let header = InjectHeader { kind: INJECT_HAND_BACK, ..header };
        self.send(self.client_pair(header.cookie), &header, &[])
    }
}
