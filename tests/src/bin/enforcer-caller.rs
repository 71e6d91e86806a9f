//! A client in a process of its own, for tests of who is calling: sends its standard input as one request, tells the status of the answer,
//! does so with further ones, and stays.

use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use enforcer_tests::raw::Connection;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, sendto, setsockopt, socket,
    sockopt,
};

const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Where to
    #[arg(long)]
    to: SocketAddr,
    /// Address and port to call from
    #[arg(long)]
    from: Option<SocketAddr>,
    /// Then send the request in this file, on the same connection
    #[arg(long)]
    then: Vec<PathBuf>,
    /// Send the request in the SYN
    #[arg(long)]
    fast_open: bool,
    /// Send the request so many times, one after the other, on the one connection
    #[arg(long, default_value_t = 1)]
    times: u32,
    /// Connected, wait until this file exists
    #[arg(long)]
    wait_for: Option<PathBuf>,
    /// Speak MPTCP
    #[arg(long)]
    mptcp: bool,
    /// Initial sequence number (needs root)
    #[arg(long)]
    initial_seq: Option<u32>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut request = Vec::new();
    std::io::stdin().read_to_end(&mut request)?;
    let family = if arguments.to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = if arguments.mptcp {
        mptcp_socket(family)?
    } else {
        socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?
    };
    if let Some(from) = arguments.from {
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(from)).context("bind")?;
    }
    if let Some(seq) = arguments.initial_seq {
        choose_initial_seq(&socket, seq)?;
    }
    let to = SockaddrStorage::from(arguments.to);
    let mut sent = 0;
    if arguments.fast_open {
        let flag = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
        sent = sendto(socket.as_raw_fd(), &request, &to, flag).context("sendto")?;
    } else if let Err(error) = connect(socket.as_raw_fd(), &to) {
        println!("refused {error}");
        return Ok(());
    }
    let stream = TcpStream::from(socket);
    let mut rest = stream.try_clone()?;
    let mut connection = Connection::over(stream, TIMEOUT)?;
    println!("connected {}", connection.local_addr()?);
    if let Some(file) = &arguments.wait_for {
        while !file.exists() {
            thread::sleep(Duration::from_millis(10));
        }
    }
    if !request.is_empty() {
        for _ in 0..arguments.times {
            connection.send(request.get(sent..).unwrap_or_default())?;
            sent = 0;
            tell(&mut connection);
        }
    }
    for file in &arguments.then {
        connection.send(&std::fs::read(file)?)?;
        tell(&mut connection);
    }
    println!("staying");
    let mut byte = [0; 1];
    loop {
        match rest.read(&mut byte) {
            Ok(1..) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Ok(0) | Err(_) => break,
        }
    }
    println!("ended");
    loop {
        thread::sleep(TIMEOUT);
    }
}

fn tell(connection: &mut Connection) {
    match connection.read_response() {
        Ok(response) => println!("status {}", response.status),
        Err(error) => println!("closed {error:#}"),
    }
}

fn mptcp_socket(family: AddressFamily) -> Result<OwnedFd> {
    // SAFETY: a system call with numbers.
    let fd =
        unsafe { libc::socket(family as i32, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("an MPTCP socket");
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A socket that is repaired keeps the number that it was given (tcp(7), `TCP_REPAIR`).
fn choose_initial_seq(socket: &OwnedFd, seq: u32) -> Result<()> {
    const SEND_QUEUE: u32 = 2;
    for (option, value) in [
        (libc::TCP_REPAIR, 1),
        (libc::TCP_REPAIR_QUEUE, SEND_QUEUE),
        (libc::TCP_QUEUE_SEQ, seq),
        (libc::TCP_REPAIR, 0),
    ] {
        // SAFETY: the value is one integer, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                option,
                (&raw const value).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(std::io::Error::last_os_error()).context("TCP_REPAIR");
        }
    }
    Ok(())
}
