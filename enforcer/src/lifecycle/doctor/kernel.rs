//! What the kernel does when it is tried.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use enforcer_common::abi::{EndpointKey, FAMILY_V4};

use super::Check;
use crate::datapath::{SocketDestroyer, TcpOffsets, load};
use crate::lifecycle::paths::pin_dir;

pub(super) fn type_information() -> Check {
    const NAME: &str = "type-information";
    match TcpOffsets::of_running_kernel() {
        Ok(offsets) => Check::pass(
            NAME,
            format!(
                "struct tcp_sock has write_seq at byte {} and snd_una at byte {}",
                offsets.write_seq, offsets.snd_una
            ),
        ),
        Err(error) => Check::fail(NAME, error.to_string(), "boot a kernel with CONFIG_DEBUG_INFO_BTF=y"),
    }
}

pub(super) fn programs(bpffs: &Path) -> Check {
    const NAME: &str = "programs";
    // A directory of our own, removed again when the value is dropped.
    match load(&pin_dir(bpffs, &format!("enforcer-doctor-{}", std::process::id()))) {
        Ok(_loaded) => Check::pass(NAME, "the kernel accepts all programs and maps"),
        Err(error) => Check::fail(
            NAME,
            error.to_string(),
            "clear the checks above first; if only this one fails, this kernel is not supported",
        ),
    }
}

pub(super) fn socket_destruction() -> Check {
    const NAME: &str = "socket-destruction";
    match destroy_own_connection() {
        Ok(()) => Check::pass(NAME, "a loopback connection of ours was reset"),
        Err(error) => Check::fail(
            NAME,
            format!("a loopback connection could not be destroyed: {error}"),
            "boot a kernel with CONFIG_INET_DIAG_DESTROY=y, and load the module tcp_diag",
        ),
    }
}

fn destroy_own_connection() -> std::io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    client.set_read_timeout(Some(Duration::from_secs(2)))?;
    let (server, peer) = listener.accept()?;
    let cookie = socket_cookie(&server, libc::SO_COOKIE)?;
    let netns_cookie = socket_cookie(&server, libc::SO_NETNS_COOKIE)?;
    SocketDestroyer::default().destroy(netns_cookie, cookie, key(server.local_addr()?)?, key(peer)?)?;
    match client.read(&mut [0; 1]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(std::io::Error::other("the connection was not reset")),
    }
}

fn key(addr: SocketAddr) -> std::io::Result<EndpointKey> {
    let SocketAddr::V4(addr) = addr else { return Err(std::io::Error::other("not an IPv4 address")) };
    let [a, b, c, d] = addr.ip().octets();
    let bytes = [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    Ok(EndpointKey { addr: bytes, port: addr.port(), family: FAMILY_V4, zero: 0 })
}

/// A 64-bit option of the socket level.
fn socket_cookie(socket: &impl AsRawFd, option: i32) -> std::io::Result<u64> {
    let mut value = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length are valid for the call, and the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(value) } else { Err(std::io::Error::last_os_error()) }
}
