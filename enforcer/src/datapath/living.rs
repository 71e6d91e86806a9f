//! What a start finds in a pin directory.

use std::os::fd::AsFd;
use std::path::Path;

use enforcer_common::abi::{DaemonState, map};
use ring::digest::{SHA256, digest};

use super::{EBPF_OBJECT, GUARDING, LINKS, Maps, PinDir, sys};

/// An enforcement that an earlier daemon left in the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Living {
    /// ABI version in its configuration; `None`: it can't be read, 0: none was written.
    pub abi_version: Option<u32>,
    /// Every map has the layout that this program knows.
    pub complete: bool,
    /// Cgroup that all its links are attached to; `None`: one is missing, or its cgroup is gone.
    pub cgroup_id: Option<u64>,
    /// Programs in this directory tag and gate connections.
    pub guards: bool,
    /// What its daemon left to the next one.
    pub state: Option<DaemonState>,
}

impl Living {
    /// Looks at what is pinned; `None`: nothing.
    #[must_use]
    pub fn look(pins: &PinDir) -> Option<Self> {
        if !pins.path().exists() {
            return None;
        }
        let abi_version = first_word(&pins.pin(map::CONFIG));
        let all_there = map::ALL.iter().all(|name| pins.pin(name).exists());
        // Opening checks key and value sizes, and the version.
        let maps = if all_there { Maps::open(pins).ok() } else { None };
        Some(Self {
            abi_version,
            complete: maps.is_some(),
            cgroup_id: cgroup_of(pins, LINKS),
            guards: cgroup_of(pins, GUARDING).is_some(),
            state: maps.and_then(|maps| maps.daemon_state().ok()),
        })
    }
}

fn first_word(pin: &Path) -> Option<u32> {
    sys::first_word(sys::open(pin).ok()?.as_fd()).ok()
}

/// The cgroup that all these links are attached to.
fn cgroup_of<const N: usize>(pins: &PinDir, links: [(&str, &str); N]) -> Option<u64> {
    let mut all = links.iter().map(|(_, link)| attached_cgroup(&pins.pin(link)).ok().flatten());
    let first = all.next()??;
    all.all(|cgroup| cgroup == Some(first)).then_some(first)
}

/// Id of the cgroup that the link pinned at `pin` is attached to; nothing if that cgroup was removed, which detached the link.
///
/// # Errors
/// There is no such pin, or it can't be looked at.
pub fn attached_cgroup(pin: &Path) -> std::io::Result<Option<u64>> {
    let link = sys::open(pin)?;
    Ok(Some(sys::link_cgroup_id(link.as_fd())?).filter(|id| *id != 0))
}

/// SHA-256 of the object with this program's kernel programs.
#[must_use]
pub fn object_hash() -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, EBPF_OBJECT).as_ref());
    hash
}
