//! Pinned maps, from outside: what only the daemon and the programs write is spoilt on purpose.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

// enum bpf_cmd.
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_OBJ_GET: libc::c_int = 7;

/// A pinned map.
pub(crate) struct PinnedMap(OwnedFd);

#[repr(C)]
#[derive(Default)]
struct ObjGet {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl PinnedMap {
    pub(crate) fn open(pin: &Path) -> Result<Self> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let attr = ObjGet { path: path.as_ptr() as u64, ..ObjGet::default() };
        // SAFETY: path and attribute live through the call.
        let fd = unsafe { bpf(BPF_OBJ_GET, &attr) }.with_context(|| format!("open {}", pin.display()))?;
        // SAFETY: the kernel has just made it for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Bytes of a key and a value (`/proc/PID/fdinfo`).
    pub(crate) fn sizes(&self) -> Result<(usize, usize)> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let field = |name: &str| -> Result<usize> {
            let line = info.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            Ok(line.trim().parse()?)
        };
        Ok((field("key_size:")?, field("value_size:")?))
    }

    pub(crate) fn delete(&self, key: &[u8]) -> Result<()> {
        ensure!(key.len() == self.sizes()?.0, "a key has {} bytes", self.sizes()?.0);
        let attr = self.element(key, &[]);
        // SAFETY: the key lives through the call and has the map's size.
        unsafe { bpf(BPF_MAP_DELETE_ELEM, &attr) }.context("delete")?;
        Ok(())
    }

    /// Puts in zeroed values under keys that nothing else uses until the kernel has no room, or `most` are in. Gives the keys.
    pub(crate) fn fill(&self, most: u32) -> Result<Vec<Vec<u8>>> {
        let (key_bytes, value_bytes) = self.sizes()?;
        let value = vec![0_u8; value_bytes];
        let mut keys = Vec::new();
        for number in 0..most {
            let mut key = vec![0xa5_u8; key_bytes];
            for (to, from) in key.iter_mut().zip(number.to_ne_bytes()) {
                *to = from;
            }
            let attr = self.element(&key, &value);
            // SAFETY: key and value live through the call and have the map's sizes.
            match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attr) } {
                Ok(_) => keys.push(key),
                Err(error) if error.raw_os_error() == Some(libc::E2BIG) => return Ok(keys),
                Err(error) => return Err(error).context("update"),
            }
        }
        Ok(keys)
    }

    /// Changes a value.
    pub(crate) fn change(&self, key: &[u8], change: impl FnOnce(&mut [u8])) -> Result<()> {
        let (key_bytes, value_bytes) = self.sizes()?;
        ensure!(key.len() == key_bytes, "a key has {key_bytes} bytes");
        let mut value = vec![0_u8; value_bytes];
        let attr = Element { value: value.as_mut_ptr() as u64, ..self.element(key, &[]) };
        // SAFETY: key and value live through the call and have the map's sizes. As below.
        unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &attr) }.context("lookup")?;
        change(&mut value);
        // SAFETY: as above.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &self.element(key, &value)) }.context("update")?;
        Ok(())
    }

    /// Deletes every entry; gives how many there were.
    pub(crate) fn clear(&self) -> Result<usize> {
        let mut count = 0;
        while let Some(key) = self.next_key(&[])? {
            self.delete(&key)?;
            count += 1;
        }
        Ok(count)
    }

    /// The keys of all entries.
    pub(crate) fn keys(&self) -> Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        while let Some(key) = self.next_key(keys.last().map_or(&[], Vec::as_slice))? {
            keys.push(key);
        }
        Ok(keys)
    }

    /// The key that follows this one; the first one, if it is empty.
    fn next_key(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut next = vec![0_u8; self.sizes()?.0];
        let attr = Element { value: next.as_mut_ptr() as u64, ..self.element(key, &[]) };
        // SAFETY: the keys live through the call and have the map's size.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &attr) } {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error).context("next key"),
        }
    }

    fn element(&self, key: &[u8], value: &[u8]) -> Element {
        Element {
            map_fd: u32::try_from(self.0.as_raw_fd()).unwrap_or_default(),
            // The kernel insists that what a command does not use is zero.
            key: if key.is_empty() { 0 } else { key.as_ptr() as u64 },
            value: if value.is_empty() { 0 } else { value.as_ptr() as u64 },
            ..Element::default()
        }
    }
}

/// bpf(2).
///
/// # Safety
/// What `attr` points to is valid.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<RawFd> {
    // SAFETY: the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(RawFd::try_from(result).unwrap_or(-1)) }
}
