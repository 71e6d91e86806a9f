//! Sockets of other processes, and listeners that belong to a cgroup of their own although this process serves them.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::guard::{Cgroup, NetNs, wait_until};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, recvmsg, socketpair,
};

/// Gives the accepted socket of process `pid` whose peer is `client` the flag `O_NONBLOCK`, which is a property of the open
/// file and so of both processes' descriptors.
pub(crate) fn set_nonblocking(pid: u32, client: SocketAddr) -> Result<()> {
    // SAFETY: pidfd_open(2) takes numbers alone.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    ensure!(pidfd >= 0, "pidfd_open: {}", io::Error::last_os_error());
    // SAFETY: a descriptor that was just opened and belongs to nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(pidfd)?) };
    let stream = wait_until("the accepted socket", Duration::from_secs(30), || {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let numbers = descriptors.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.filter_map(|number: RawFd| borrow(&pidfd, number)).find(|stream| {
            stream.peer_addr().is_ok_and(|peer| {
                peer.port() == client.port() && peer.ip().to_canonical() == client.ip().to_canonical()
            })
        })
    })?;
    Ok(stream.set_nonblocking(true)?)
}

/// A duplicate of another process's descriptor, if it is a socket. Asking a socket of another kind for its peer fails.
fn borrow(pidfd: &OwnedFd, number: RawFd) -> Option<TcpStream> {
    // SAFETY: pidfd_getfd(2) takes numbers alone.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: a descriptor that was just made and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    path.to_str()?.starts_with("socket:").then(|| TcpStream::from(fd))
}

/// How a listener is made.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ListenerKind {
    /// `IPPROTO_MPTCP` in place of plain TCP.
    pub(crate) mptcp: bool,
    /// `SO_REUSEPORT`.
    pub(crate) reuse_port: bool,
    /// `TCP_FASTOPEN` with a queue of 16.
    pub(crate) fast_open: bool,
    /// `TCP_DEFER_ACCEPT` for so many seconds; 0: not.
    pub(crate) defer_accept_secs: libc::c_int,
}

/// Makes an IPv4 listener inside `cgroup` (and `netns`).
pub(crate) fn listener_in(
    cgroup: &Cgroup,
    netns: Option<&NetNs>,
    listen: SocketAddr,
    kind: ListenerKind,
) -> Result<TcpListener> {
    Ok(made_in(cgroup, netns, move || make(listen, kind))?.into())
}

/// Makes an IPv4 UDP socket inside `cgroup`.
pub(crate) fn datagrams_in(cgroup: &Cgroup, listen: SocketAddr) -> Result<UdpSocket> {
    Ok(made_in(cgroup, None, move || bound(libc::SOCK_DGRAM, 0, listen))?.into())
}

/// A socket belongs to the cgroup of the process that makes it, so a short-lived child makes it and passes it over a unix
/// socket (SCM_RIGHTS).
fn made_in(
    cgroup: &Cgroup,
    netns: Option<&NetNs>,
    make: impl Fn() -> io::Result<RawFd> + Send + Sync + 'static,
) -> Result<OwnedFd> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)
        .context("socketpair")?;
    let mut command = Command::new("true");
    cgroup.place(&mut command)?;
    if let Some(netns) = netns {
        netns.place(&mut command)?;
    }
    // SAFETY: the closure makes system calls on memory of its own; no lock is taken and nothing allocated.
    unsafe {
        command.pre_exec(move || pass(theirs.as_raw_fd(), make()?));
    }
    let status = command.status().context("cannot start the listener's maker")?;
    ensure!(status.success(), "the listener's maker ended with {status}");
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut byte = [0; 1];
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    let message = recvmsg::<SockaddrStorage>(
        ours.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let fd = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.context("no descriptor came")?) })
}

fn make(listen: SocketAddr, kind: ListenerKind) -> io::Result<RawFd> {
    let protocol = if kind.mptcp { libc::IPPROTO_MPTCP } else { libc::IPPROTO_TCP };
    // SAFETY: plain system calls on a socket of our own.
    unsafe {
        let fd = check(libc::socket(libc::AF_INET, libc::SOCK_STREAM, protocol))?;
        set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if kind.reuse_port {
            set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        bind(fd, listen)?;
        if kind.fast_open {
            set_option(fd, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)?;
        }
        if kind.defer_accept_secs > 0 {
            set_option(fd, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, kind.defer_accept_secs)?;
        }
        check(libc::listen(fd, 128))?;
        Ok(fd)
    }
}

/// A socket with an IPv4 address.
fn bound(kind: libc::c_int, protocol: libc::c_int, listen: SocketAddr) -> io::Result<RawFd> {
    // SAFETY: a plain system call.
    let fd = check(unsafe { libc::socket(libc::AF_INET, kind, protocol) })?;
    bind(fd, listen)?;
    Ok(fd)
}

fn bind(fd: RawFd, listen: SocketAddr) -> io::Result<()> {
    let SocketAddr::V4(listen) = listen else { return Err(io::ErrorKind::Unsupported.into()) };
    let addr = libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: listen.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(listen.ip().octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: the address lives through the call.
    check(unsafe { libc::bind(fd, (&raw const addr).cast(), socklen::<libc::sockaddr_in>()) }).map(drop)
}

fn set_option(fd: RawFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value lives through the call.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), socklen::<libc::c_int>()) })
        .map(drop)
}

fn socklen<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default()
}

fn pass(over: RawFd, fd: RawFd) -> io::Result<()> {
    let mut byte = [0_u8; 1];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // Words, so that the header in it is aligned.
    let mut control = [0_u64; 8];
    // SAFETY: all pointers are to locals; the control buffer has room for one descriptor.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
        check(i32::try_from(libc::sendmsg(over, &raw const message, 0)).unwrap_or(-1)).map(drop)
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Connects with `IPPROTO_MPTCP`.
pub(crate) fn connect_mptcp(addr: SocketAddr) -> io::Result<TcpStream> {
    let SocketAddr::V4(addr) = addr else { return Err(io::ErrorKind::Unsupported.into()) };
    let raw = libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: addr.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: as in `make`; the descriptor is owned from the first moment.
    unsafe {
        let fd =
            check(libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP))?;
        let stream = TcpStream::from(OwnedFd::from_raw_fd(fd));
        check(libc::connect(fd, (&raw const raw).cast(), socklen::<libc::sockaddr_in>()))?;
        Ok(stream)
    }
}

/// Connects and sends `data` in the SYN (`MSG_FASTOPEN`); gives how many bytes the kernel took. It asks for a cookie, and
/// sends no data with the SYN, while it has none.
pub(crate) fn connect_fast_open(addr: SocketAddr, data: &[u8]) -> io::Result<(TcpStream, usize)> {
    let SocketAddr::V4(addr) = addr else { return Err(io::ErrorKind::Unsupported.into()) };
    let raw = libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: addr.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: as above; the data outlives the call.
    unsafe {
        let fd = check(libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))?;
        let stream = TcpStream::from(OwnedFd::from_raw_fd(fd));
        let sent = libc::sendto(
            fd,
            data.as_ptr().cast(),
            data.len(),
            libc::MSG_FASTOPEN,
            (&raw const raw).cast(),
            socklen::<libc::sockaddr_in>(),
        );
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        Ok((stream, sent))
    }
}
