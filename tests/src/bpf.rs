//! bpf(2), as far as tests and benchmark use it: pinned programs, run with packets that nobody sent.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Commands of bpf(2), from the kernel's `include/uapi/linux/bpf.h`.
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;

/// `XDP_DROP`.
pub const XDP_DROP: u32 = 1;
/// `XDP_PASS`.
pub const XDP_PASS: u32 = 2;

/// `struct { __u64 pathname; __u32 bpf_fd; __u32 file_flags; }` of `union bpf_attr`.
#[repr(C)]
struct ObjectGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// What is pinned at `path`.
///
/// # Errors
/// When there is nothing, or without privileges.
pub fn open_pinned(path: &Path) -> Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = ObjectGet { pathname: name.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    new_descriptor(BPF_OBJ_GET, &mut attributes).with_context(|| format!("cannot open {}", path.display()))
}

/// A bpf(2) command that gives a new descriptor.
pub(crate) fn new_descriptor<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = i32::try_from(bpf(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes at most the stated size of `attributes`, which lives through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// `test` of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// What an XDP program did with a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// `XDP_PASS`, ...
    pub verdict: u32,
    /// The frame as it left it.
    pub frame: Vec<u8>,
    /// Nanoseconds for one run, on average.
    pub ns: u32,
}

/// Runs an XDP program `repeat` times with a frame, one run after the other on the same bytes.
///
/// # Errors
/// When the kernel refuses: the frame is shorter than an Ethernet header, say.
pub fn run_xdp(program: BorrowedFd<'_>, frame: &[u8], repeat: u32) -> Result<Ran> {
    let mut out = vec![0; frame.len() + 256];
    let mut attributes = TestRun {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: u32::try_from(frame.len())?,
        data_size_out: u32::try_from(out.len())?,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        ..TestRun::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attributes)
        .with_context(|| format!("BPF_PROG_TEST_RUN with {} bytes", frame.len()))?;
    out.truncate(attributes.data_size_out as usize);
    Ok(Ran { verdict: attributes.retval, frame: out, ns: attributes.duration })
}
