//! Which TCP sockets there are, in every network namespace (sock_diag(7)).

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use std::collections::BTreeSet;

use enforcer_common::abi::{EndpointKey, Ends, FAMILY_V4, FAMILY_V6};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{MsgFlags, recv, send};

use super::netns::{Request, namespaces, netlink_here};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `struct inet_diag_msg`.
const MESSAGE_BYTES: usize = 72;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// `idiag_timer` of what is no socket any more but waits for late segments.
const TIMER_TIME_WAIT: u8 = 3;

// net/tcp_states.h.
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;
/// The states in which bytes may go to or from an application.
const STATES: u32 = 1 << ESTABLISHED | 1 << FIN_WAIT1 | 1 << FIN_WAIT2 | 1 << CLOSE_WAIT | 1 << LISTEN;

/// A TCP socket, as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its cookie, which no other socket has or will have.
    pub cookie: u64,
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// Interface that it is bound to; 0: none.
    pub interface: u32,
    /// Its own end and its peer's. A v4-mapped address is an IPv4 address here.
    pub ends: Ends,
    /// It listens.
    pub listens: bool,
    /// An IPv6 listener that takes no IPv4 connections.
    pub v6_only: bool,
    /// Id of the cgroup in which it (or its listener) was made; absent if the kernel does not say.
    pub cgroup_id: Option<u64>,
    /// Its inode, by which a descriptor of it is known; 0 for a connection that nobody has accepted yet.
    pub inode: u32,
}

/// What [`tcp_sockets`] found.
#[derive(Debug, Default)]
pub struct Dump {
    /// Sockets, at their local ports.
    pub sockets: Vec<TcpSocket>,
    /// Namespaces that could not be looked into, and why.
    pub errors: Vec<String>,
}

/// The TCP sockets with one of these local ports that listen or are connected, in all network namespaces in which a process
/// or thread lives, or that have a name in `/run/netns`. A namespace that is held by a descriptor or a mount elsewhere alone
/// is not found; the gate sees its packets all the same.
///
/// # Errors
/// No thread can be made. A namespace that can't be looked into is an entry in [`Dump::errors`].
pub fn tcp_sockets(ports: &BTreeSet<u16>) -> Result<Dump> {
    if ports.is_empty() {
        return Ok(Dump::default());
    }
    // Entering a namespace changes the thread.
    std::thread::scope(|scope| {
        let walk = std::thread::Builder::new().name("namespaces".into()).spawn_scoped(scope, || {
            let (mut dump, mut seen) = (Dump::default(), BTreeSet::new());
            for path in namespaces() {
                // What has ended meanwhile has no namespace.
                let Ok(meta) = std::fs::metadata(&path) else { continue };
                if !seen.insert(meta.ino()) {
                    continue;
                }
                let Ok(file) = File::open(&path) else { continue };
                let looked = setns(&file, CloneFlags::CLONE_NEWNET)
                    .map_err(Error::from)
                    .and_then(|()| in_this_namespace(ports, &mut dump.sockets));
                if let Err(error) = looked {
                    dump.errors.push(format!("{}: {error}", path.display()));
                }
            }
            dump
        })?;
        walk.join().map_err(|_| Error::other("the walk over the network namespaces panicked"))
    })
}

fn in_this_namespace(ports: &BTreeSet<u16>, sockets: &mut Vec<TcpSocket>) -> Result<()> {
    let (netlink, netns_cookie) = netlink_here()?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        // The kernel can look for one port itself.
        let port = if ports.len() == 1 { ports.first().copied().unwrap_or(0) } else { 0 };
        let request =
            Request::new(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, family as u8).with_states(STATES, port);
        send(netlink.as_raw_fd(), request.bytes(), MsgFlags::empty())?;
        read_dump(&netlink, |message| {
            if let Some(socket) = TcpSocket::parse(message, netns_cookie)
                && ports.contains(&socket.ends.local.port)
            {
                sockets.push(socket);
            }
        })?;
    }
    Ok(())
}

/// Gives each message of a dump, without its header.
fn read_dump(netlink: &OwnedFd, mut each: impl FnMut(&[u8])) -> Result<()> {
    let mut buffer = vec![0_u8; 1 << 16];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((kind, message, behind)) = next_message(rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    return Err(Error::from_raw_os_error(-(read_u32(message, 0).unwrap_or(0) as i32)));
                }
                SOCK_DIAG_BY_FAMILY => each(message),
                _ => {}
            }
            rest = behind;
        }
        if length == 0 {
            return Err(Error::other("the dump of sockets broke off"));
        }
    }
}

/// Kind and body of the first message, and what is behind it.
fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = read_u32(bytes, 0)? as usize;
    let message = bytes.get(HEADER_BYTES..length)?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    Some((kind, message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

impl TcpSocket {
    /// Reads a `struct inet_diag_msg` and the attributes behind it. Nothing for what is no socket of an application any more.
    fn parse(message: &[u8], netns_cookie: u64) -> Option<Self> {
        let (fixed, mut attributes) = message.split_at_checked(MESSAGE_BYTES)?;
        let (family, state, timer) = (fixed[0], fixed[1], fixed[2]);
        let inode = read_u32(fixed, 68)?;
        let orphan = inode == 0 && matches!(state, FIN_WAIT1 | FIN_WAIT2);
        if timer == TIMER_TIME_WAIT || orphan {
            return None;
        }
        let mut socket = Self {
            cookie: u64::from(read_u32(fixed, 44)?) | u64::from(read_u32(fixed, 48)?) << 32,
            netns_cookie,
            interface: read_u32(fixed, 40)?,
            ends: Ends { local: end(fixed, family, 4, 8)?, peer: end(fixed, family, 6, 24)? },
            listens: state == LISTEN,
            v6_only: false,
            cgroup_id: None,
            inode,
        };
        while let Some(length) = attributes.get(..2).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]])) {
            let Some(attribute) = attributes.get(..length.into()).filter(|attribute| attribute.len() >= 4)
            else {
                break;
            };
            match u16::from_ne_bytes([attribute[2], attribute[3]]) {
                INET_DIAG_CGROUP_ID => socket.cgroup_id = read_u64(attribute, 4),
                INET_DIAG_SKV6ONLY => socket.v6_only = attribute.get(4).is_some_and(|byte| *byte != 0),
                _ => {}
            }
            attributes = attributes.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
        }
        Some(socket)
    }
}

/// One end: its port at `port_at`, in network order, its address at `address_at`.
fn end(fixed: &[u8], family: u8, port_at: usize, address_at: usize) -> Option<EndpointKey> {
    let port = u16::from_be_bytes(fixed.get(port_at..port_at + 2)?.try_into().ok()?);
    let address: [u8; 16] = fixed.get(address_at..address_at + 16)?.try_into().ok()?;
    let mapped = address.starts_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    let (from, family) = match i32::from(family) {
        libc::AF_INET => (0..4, FAMILY_V4),
        libc::AF_INET6 if mapped => (12..16, FAMILY_V4),
        libc::AF_INET6 => (0..16, FAMILY_V6),
        _ => return None,
    };
    let mut addr = [0; 16];
    for (to, from) in addr.iter_mut().zip(&address[from]) {
        *to = *from;
    }
    Some(EndpointKey { addr, port, family, zero: 0 })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

    use super::*;

    fn message(family: i32, state: u8, local: [u8; 16], attributes: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; MESSAGE_BYTES];
        bytes[0] = family as u8;
        bytes[1] = state;
        bytes[4..6].copy_from_slice(&8080_u16.to_be_bytes());
        bytes[6..8].copy_from_slice(&5555_u16.to_be_bytes());
        bytes[8..24].copy_from_slice(&local);
        bytes[40..44].copy_from_slice(&7_u32.to_ne_bytes());
        bytes[44..48].copy_from_slice(&1_u32.to_ne_bytes());
        bytes[48..52].copy_from_slice(&2_u32.to_ne_bytes());
        bytes[68..72].copy_from_slice(&99_u32.to_ne_bytes());
        bytes.extend_from_slice(attributes);
        bytes
    }

    #[test]
    fn a_socket_is_read_with_its_attributes() {
        let mut attributes = vec![5, 0, INET_DIAG_SKV6ONLY as u8, 0, 1, 0, 0, 0];
        attributes.extend_from_slice(&[12, 0, INET_DIAG_CGROUP_ID as u8, 0]);
        attributes.extend_from_slice(&0x1_0000_0002_u64.to_ne_bytes());
        let socket = TcpSocket::parse(&message(libc::AF_INET6, LISTEN, [0; 16], &attributes), 3).unwrap();
        assert_eq!((socket.cookie, socket.netns_cookie, socket.interface), (0x2_0000_0001, 3, 7));
        assert_eq!((socket.ends.local.port, socket.ends.peer.port), (8080, 5555));
        assert_eq!((socket.listens, socket.v6_only, socket.inode), (true, true, 99));
        assert_eq!(socket.cgroup_id, Some(0x1_0000_0002));
        // Cut anywhere: nothing, or a socket without what was cut off.
        let whole = message(libc::AF_INET6, LISTEN, [0; 16], &attributes);
        for length in 0..whole.len() {
            let read = TcpSocket::parse(&whole[..length], 3);
            assert_eq!(read.is_some(), length >= MESSAGE_BYTES, "{length}");
            assert!(read.is_none_or(|socket| socket.cgroup_id.is_none()), "{length}");
        }
    }

    #[test]
    fn mapped_addresses_are_ipv4_and_what_waits_for_late_segments_is_none() {
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
        let socket = TcpSocket::parse(&message(libc::AF_INET6, ESTABLISHED, mapped, &[]), 0).unwrap();
        assert_eq!(socket.ends.local.family, FAMILY_V4);
        assert_eq!(socket.ends.local.addr[..5], [127, 0, 0, 1, 0]);
        let mut waits = message(libc::AF_INET, FIN_WAIT2, [0; 16], &[]);
        waits[2] = TIMER_TIME_WAIT;
        assert_eq!(TcpSocket::parse(&waits, 0), None);
        let mut orphan = message(libc::AF_INET, FIN_WAIT1, [0; 16], &[]);
        assert!(TcpSocket::parse(&orphan, 0).is_some());
        orphan[68..72].fill(0);
        assert_eq!(TcpSocket::parse(&orphan, 0), None);
        assert_eq!(TcpSocket::parse(&message(libc::AF_UNIX, ESTABLISHED, [0; 16], &[]), 0), None);
    }

    #[test]
    fn a_dump_is_taken_apart_message_by_message() {
        let mut bytes = Vec::new();
        for (kind, body) in [(SOCK_DIAG_BY_FAMILY, &[1_u8, 2, 3][..]), (NLMSG_DONE, &[0; 4])] {
            let length = HEADER_BYTES + body.len();
            bytes.extend_from_slice(&(length as u32).to_ne_bytes());
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(&[0; 10]);
            bytes.extend_from_slice(body);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let (kind, body, rest) = next_message(&bytes).unwrap();
        assert_eq!((kind, body), (SOCK_DIAG_BY_FAMILY, &[1, 2, 3][..]));
        assert_eq!(next_message(rest).unwrap().0, NLMSG_DONE);
        assert_eq!(next_message(&rest[..10]), None);
        assert_eq!(next_message(&[]), None);
    }

    #[test]
    fn sockets_of_this_process_are_found() {
        if !crate::lifecycle::testing::is_root("sockets_of_this_process_are_found") {
            return;
        }
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        let dump = tcp_sockets(&BTreeSet::from([port])).unwrap();
        let client_port = client.local_addr().unwrap().port();
        let mine: Vec<_> = dump.sockets.iter().filter(|socket| socket.ends.local.port == port).collect();
        let listening = mine.iter().find(|socket| socket.listens).unwrap();
        assert!(!listening.v6_only && listening.inode != 0 && listening.cgroup_id.is_some());
        let accepted = mine.iter().find(|socket| socket.ends.peer.port == client_port).unwrap();
        assert_eq!(accepted.ends.local.family, FAMILY_V4);
        // Nobody has accepted it.
        assert_eq!((accepted.listens, accepted.inode), (false, 0));
        assert_eq!(accepted.cgroup_id, listening.cgroup_id);
        // Two ports: the kernel does not filter.
        let both = tcp_sockets(&BTreeSet::from([port, client_port])).unwrap();
        let SocketAddr::V4(_) = client.local_addr().unwrap() else { panic!("IPv4") };
        assert!(both.sockets.iter().any(|socket| socket.ends.local.port == client_port));
        assert!(tcp_sockets(&BTreeSet::new()).unwrap().sockets.is_empty());
    }
}
