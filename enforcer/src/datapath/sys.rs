//! Calls of bpf(2) that aya has no function for.

use std::ffi::CString;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// Makes a call whose attributes are `attributes`, the first fields of `union bpf_attr`; the kernel takes the rest for zero.
///
/// # Safety
/// `A` is `repr(C)` without padding, has the fields of the command, and its pointers are valid for what the command does with them.
unsafe fn call<A>(command: libc::c_long, attributes: &mut A) -> Result<libc::c_long> {
    // SAFETY: the caller's.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<A>() as libc::c_long)
    };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

/// Of `BPF_OBJ_GET` and `BPF_OBJ_PIN`.
#[repr(C)]
struct PinAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at `pin`, whatever it is.
pub(super) fn open(pin: &Path) -> Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attributes = PinAttributes { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path lives until the end of the call.
    let fd = unsafe { call(BPF_OBJ_GET, &mut attributes) }?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Pins an object.
pub(super) fn pin(object: BorrowedFd<'_>, pin: &Path) -> Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attributes =
        PinAttributes { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path lives until the end of the call.
    unsafe { call(BPF_OBJ_PIN, &mut attributes) }.map(drop)
}

/// Attaches an XDP program to an interface, until the link is closed. (aya's function falls back to one that outlives its process, which
/// can't be pinned.)
pub(super) fn create_xdp_link(program: BorrowedFd<'_>, interface: u32, flags: u32) -> Result<OwnedFd> {
    const BPF_XDP: u32 = 37;
    #[repr(C)]
    struct Attributes {
        program: u32,
        interface: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attributes =
        Attributes { program: program.as_raw_fd() as u32, interface, attach_type: BPF_XDP, flags };
    // SAFETY: no pointers.
    let fd = unsafe { call(BPF_LINK_CREATE, &mut attributes) }?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Puts another program of the same kind behind a link. There is no moment without a program.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<()> {
    #[repr(C)]
    struct Attributes {
        link: u32,
        program: u32,
        flags: u32,
        old_program: u32,
    }
    let mut attributes = Attributes {
        link: link.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        flags: 0,
        old_program: 0,
    };
    // SAFETY: no pointers.
    unsafe { call(BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

/// The first bytes of the kernel's `struct bpf_*_info` of an object.
fn info<T: Default>(object: BorrowedFd<'_>) -> Result<T> {
    #[repr(C)]
    struct Attributes {
        fd: u32,
        len_bytes: u32,
        info: u64,
    }
    let mut info = T::default();
    let mut attributes = Attributes {
        fd: object.as_raw_fd() as u32,
        len_bytes: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: `info` is as long as is said.
    unsafe { call(BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(info)
}

/// Id of the cgroup that a cgroup link is attached to, which is the inode number of its directory; 0: the cgroup is gone.
pub(super) fn link_cgroup_id(link: BorrowedFd<'_>) -> Result<u64> {
    // type, id, program, padding, cgroup id
    let [_, _, cgroup_id] = info::<[u64; 3]>(link)?;
    Ok(cgroup_id)
}

/// Index of the interface that an XDP link is attached to; 0: the interface is gone.
pub(super) fn link_interface(link: BorrowedFd<'_>) -> Result<u32> {
    // type, id, program, padding, interface
    let [_, _, _, _, interface, _] = info::<[u32; 6]>(link)?;
    Ok(interface)
}

/// The first 32 bits of the first element of an array map, however long its values are.
pub(super) fn first_word(map: BorrowedFd<'_>) -> Result<u32> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    // type, id, key size, value size
    let [_, _, _, value_bytes] = info::<[u32; 4]>(map)?;
    let mut value = vec![0_u32; (value_bytes as usize).div_ceil(size_of::<u32>()).max(1)];
    let key = 0_u32;
    let mut attributes = Attributes {
        map: map.as_raw_fd() as u32,
        padding: 0,
        key: std::ptr::from_ref(&key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: an array's key has 32 bits, and the value has room for what the map says of itself.
    unsafe { call(BPF_MAP_LOOKUP_ELEM, &mut attributes) }?;
    Ok(value.first().copied().unwrap_or_default())
}
