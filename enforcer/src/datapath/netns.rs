//! Destroying guarded sockets in whatever network namespace they live.
//!
//! `SOCK_DESTROY` (sock_diag(7)) acts in the namespace in which its netlink socket was made. A namespace is known by its
//! cookie; it is found through the processes that live in it, once, and its netlink socket is kept.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use enforcer_common::abi::{Ends, FAMILY_V4};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};

const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST_ACK: u16 = 0x1 | 0x4;
const NLMSG_ERROR: u16 = 2;
/// Netlink sockets that are kept: namespaces with guarded servers.
pub(super) const MAX_NAMESPACES: usize = 256;
/// Pause after a search that found nothing.
const SEARCH_PAUSE: Duration = Duration::from_secs(1);

/// Destroys TCP sockets by their addresses and cookies.
#[derive(Default)]
pub struct SocketDestroyer {
    namespaces: HashMap<u64, OwnedFd>,
    /// Namespaces that were not found, and when: each search walks all of `/proc`.
    missing: HashMap<u64, Instant>,
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
#[repr(C)]
pub(super) struct Request {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    source_port: [u8; 2],
    destination_port: [u8; 2],
    source: [u8; 16],
    destination: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}
const _: () = assert!(size_of::<Request>() == 72);

impl Request {
    /// For TCP sockets of a family, in any state, with any ends.
    pub(super) fn new(kind: u16, flags: u16, family: u8) -> Self {
        Self {
            len: size_of::<Self>() as u32,
            kind,
            flags,
            sequence: 1,
            port: 0,
            family,
            protocol: libc::IPPROTO_TCP as u8,
            extensions: 0,
            pad: 0,
            states: u32::MAX,
            source_port: [0; 2],
            destination_port: [0; 2],
            source: [0; 16],
            destination: [0; 16],
            interface: 0,
            cookie: [0; 2],
        }
    }

    /// Only sockets in these states (a bit each) with this local port (0: any).
    pub(super) fn with_states(self, states: u32, port: u16) -> Self {
        Self { states, source_port: port.to_be_bytes(), ..self }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `repr(C)`, integers only; the size asserted above leaves no room for padding.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast::<u8>(), size_of::<Self>()) }
    }
}

impl SocketDestroyer {
    /// Destroys the socket with these ends and this cookie, bound to this interface (0: none), in the namespace with
    /// `netns_cookie`. Its peer sees a reset. A socket
    /// that is gone is fine.
    ///
    /// # Errors
    /// The namespace can't be found (nothing lives in it any more) or entered, or the kernel refuses.
    pub fn destroy(&mut self, netns_cookie: u64, cookie: u64, interface: u32, ends: Ends) -> Result<()> {
        self.find(netns_cookie)?;
        self.destroy_known(netns_cookie, cookie, interface, ends).unwrap_or_else(|| Err(not_found()))
    }

    /// As [`Self::destroy`], in a namespace that was found before; `None`: it was not. Never searches, so it takes no longer than
    /// the kernel does.
    pub fn destroy_known(
        &mut self,
        netns_cookie: u64,
        cookie: u64,
        interface: u32,
        ends: Ends,
    ) -> Option<Result<()>> {
        let netlink = self.namespaces.get(&netns_cookie)?.as_raw_fd();
        let Ends { local, peer } = ends;
        let v4 = local.family == FAMILY_V4;
        let family = if v4 { libc::AF_INET } else { libc::AF_INET6 };
        let request = Request {
            source_port: local.port.to_be_bytes(),
            destination_port: peer.port.to_be_bytes(),
            source: local.addr,
            destination: peer.addr,
            interface,
            cookie: [cookie as u32, (cookie >> 32) as u32],
            ..Request::new(SOCK_DESTROY, NLM_F_REQUEST_ACK, family as u8)
        };
        let result = (|| {
            send(netlink, request.bytes(), MsgFlags::empty())?;
            let mut answer = [0_u8; 512];
            let length = recv(netlink, &mut answer, MsgFlags::empty())?;
            Ok::<_, nix::Error>(acknowledgement(&answer[..length]))
        })();
        Some(match result {
            Ok(0) => Ok(()),
            Ok(code) if -code == libc::ENOENT => Ok(()),
            Ok(code) => Err(Error::from_raw_os_error(-code)),
            Err(error) => {
                self.namespaces.remove(&netns_cookie);
                Err(error.into())
            }
        })
    }

    /// Keeps a namespace that was found, by a sock_diag socket in it.
    pub fn add(&mut self, netns_cookie: u64, netlink: OwnedFd) {
        if self.namespaces.len() >= MAX_NAMESPACES {
            self.namespaces.clear();
        }
        self.namespaces.insert(netns_cookie, netlink);
    }

    /// Keeps the namespace that the thread is in.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_here(&mut self) -> Result<()> {
        let (netlink, netns_cookie) = netlink_here()?;
        self.add(netns_cookie, netlink);
        Ok(())
    }

    fn find(&mut self, netns_cookie: u64) -> Result<()> {
        if self.namespaces.contains_key(&netns_cookie) {
            return Ok(());
        }
        if self.missing.get(&netns_cookie).is_some_and(|since| since.elapsed() < SEARCH_PAUSE) {
            return Err(not_found());
        }
        if self.missing.len() >= MAX_NAMESPACES {
            self.missing.clear();
        }
        let found = find(netns_cookie).inspect_err(|_| {
            self.missing.insert(netns_cookie, Instant::now());
        })?;
        self.add(netns_cookie, found);
        Ok(())
    }
}

/// The error code of an acknowledgement, 0 for success.
fn acknowledgement(answer: &[u8]) -> i32 {
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    match (kind, answer.get(16..20)) {
        (Some(NLMSG_ERROR), Some(code)) => i32::from_ne_bytes([code[0], code[1], code[2], code[3]]),
        _ => -libc::EPROTO,
    }
}

/// A netlink socket in the namespace with this cookie. Entering a namespace changes the thread, so it is done in one of its own.
fn find(netns_cookie: u64) -> Result<OwnedFd> {
    if let Ok((socket, cookie)) = netlink_here()
        && cookie == netns_cookie
    {
        return Ok(socket);
    }
    std::thread::spawn(move || {
        let mut found = None;
        search(&mut BTreeSet::from([netns_cookie]), &mut |_, netlink| found = Some(netlink));
        found.ok_or_else(not_found)
    })
    .join()
    .unwrap_or_else(|_| Err(Error::other("the search for a network namespace panicked")))
}

/// Walks over the network namespaces until all that are wanted are found: each is taken out of `wanted`, and `found` gets its cookie
/// and a sock_diag socket in it. Leaves the thread in another namespace.
pub(super) fn search(wanted: &mut BTreeSet<u64>, found: &mut dyn FnMut(u64, OwnedFd)) {
    let mut seen = BTreeSet::new();
    for namespace in namespaces() {
        if wanted.is_empty() {
            return;
        }
        let Ok(file) = File::open(namespace) else { continue };
        let Ok(meta) = file.metadata() else { continue };
        if !seen.insert(meta.ino()) || setns(&file, CloneFlags::CLONE_NEWNET).is_err() {
            continue;
        }
        if let Ok((netlink, cookie)) = netlink_here()
            && wanted.remove(&cookie)
        {
            found(cookie, netlink);
        }
    }
}

fn not_found() -> Error {
    Error::new(ErrorKind::NotFound, "no process lives in the socket's network namespace")
}

/// Paths of network namespaces, many of them several times: of processes, those that `ip netns` keeps by name, and of threads.
pub(super) fn namespaces() -> impl Iterator<Item = PathBuf> {
    let named = entries(Path::new("/run/netns"));
    let threads = numbered(Path::new("/proc"))
        .flat_map(|process| numbered(&process.join("task")).map(|thread| thread.join("ns/net")));
    numbered(Path::new("/proc")).map(|process| process.join("ns/net")).chain(named).chain(threads)
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn numbered(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    entries(directory).filter(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<u32>().is_ok())
    })
}

/// A sock_diag socket in the thread's namespace, and that namespace's cookie.
pub(super) fn netlink_here() -> Result<(OwnedFd, u64)> {
    let netlink =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    let timeout = nix::sys::time::TimeVal::new(1, 0);
    setsockopt(&netlink, sockopt::ReceiveTimeout, &timeout)?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SO_NETNS_COOKIE is only answered by sockets of the internet families.
    // SAFETY: a socket call without memory; the descriptor is owned from here on.
    let probe = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if probe < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let probe = unsafe { OwnedFd::from_raw_fd(probe) };
    // SAFETY: value and length are valid for the call.
    let result = unsafe {
        libc::getsockopt(
            probe.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(Error::last_os_error());
    }
    Ok((netlink, cookie))
}

const SO_NETNS_COOKIE: i32 = 71;
