//! The server of the self-test, in a process and a cgroup of its own.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe};

use super::{ANSWER, BLOCKING, SelfTestError, setup};

/// A cgroup that goes when this is dropped.
pub(super) struct TempCgroup(pub(super) PathBuf);

impl TempCgroup {
    pub(super) fn new(path: &Path) -> Result<Self, SelfTestError> {
        std::fs::create_dir(path).map_err(|error| setup(format!("{}: {error}", path.display())))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for TempCgroup {
    fn drop(&mut self) {
        // Empty as soon as the kernel has forgotten the server's process.
        for _ in 0..50 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A child process that serves one connection.
pub(super) struct Server {
    child: Pid,
    pub(super) addr: SocketAddr,
}

impl Server {
    pub(super) fn start(cgroup: &Path) -> Result<Self, SelfTestError> {
        let procs = cgroup.join("cgroup.procs");
        let (read, write) = pipe().map_err(setup)?;
        // SAFETY: the caller promises that there is one thread; the child calls nothing but what is written here, and exits.
        match unsafe { fork() }.map_err(setup)? {
            ForkResult::Child => {
                drop(read);
                let _ = serve(&procs, &write);
                // SAFETY: ends the child without running the parent's destructors.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                drop(write);
                let mut server = Self { child, addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)) };
                let mut port = [0; 2];
                std::fs::File::from(read)
                    .read_exact(&mut port)
                    .map_err(|_| setup("the self-test's server did not start"))?;
                server.addr.set_port(u16::from_ne_bytes(port));
                Ok(server)
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(self.child, Signal::SIGKILL);
        let _ = waitpid(self.child, None);
    }
}

/// The child: joins the cgroup, listens, tells its port, answers each request. A timer ends it in any case.
fn serve(procs: &Path, port: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: no memory involved.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::alarm(60);
    }
    std::fs::write(procs, "0")?;
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let bytes = listener.local_addr()?.port().to_ne_bytes();
    nix::unistd::write(port.as_fd(), &bytes)?;
    let (mut stream, _) = listener.accept()?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    let mut answered = 0;
    loop {
        let length = match stream.read(&mut buffer) {
            Err(error) if answered >= BLOCKING && error.kind() == ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
                continue;
            }
            length => length?,
        };
        if length == 0 {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..length]);
        if request.ends_with(b"\r\n\r\n") {
            request.clear();
            answered += 1;
            if answered == BLOCKING {
                // Before the answer: the next request follows it at once.
                stream.set_nonblocking(true)?;
            }
            stream.write_all(ANSWER)?;
        }
    }
}
