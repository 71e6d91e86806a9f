//! The edge to the kernel: loading and pinning the programs, reading and writing their maps, injecting bytes, and
//! destroying sockets. Nothing here decides about a request.

mod buckets;
mod inject;
mod living;
mod load;
mod maps;
mod memory;
mod netns;
mod netns_search;
mod offsets;
mod revocations;
pub mod shield;
mod sockdiag;
mod sources;
mod sys;

pub use buckets::{Buckets, UNREADABLE_NS};
pub use inject::{InjectError, Injectors};
pub use living::{Living, attached_cgroup, object_hash};
pub use load::{LoadError, Loaded, load, replace};
pub use maps::{Live, LiveError, Maps, first_users_left_behind};
pub use memory::{MapMemory, map_memory};
pub use netns::SocketDestroyer;
pub use netns_search::{NamespaceSearch, Searched};
pub use offsets::{OffsetError, TcpOffsets};
pub use revocations::left_behind;
pub use sockdiag::{Dump, TcpSocket, tcp_sockets};

use std::path::{Path, PathBuf};

/// The object with the kernel programs.
pub static EBPF_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/enforcer-ebpf"));

/// Where the pins lie under a bpffs mount, unless told otherwise.
pub const PIN_NAME: &str = "enforcer";

/// Pin of the link that tags flows. While it exists, new connections are guarded.
pub const LINK_PIN: &str = "link_tag_flow";

/// Pin of the gate's link.
const GATE_PIN: &str = "link_gate";

/// The programs that are attached to the cgroup, in that order, and the pins of their links. The tags come before the gate: every connection
/// from then on has a record that lets it through. The callers come before the tags.
pub(crate) const LINKS: [(&str, &str); 4] =
    [("connect4", "link_connect4"), ("connect6", "link_connect6"), GUARDING[0], GUARDING[1]];

/// Those that guard; an enforcement of an older version has no others.
const GUARDING: [(&str, &str); 2] = [("tag_flow", LINK_PIN), ("gate", GATE_PIN)];

/// A pin directory: maps by their names, programs as `prog_*`, links as `link_*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinDir(PathBuf);

impl PinDir {
    /// A directory on a bpffs.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Whether an enforcer's pins are there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.0.join(enforcer_common::abi::map::CONFIG).exists()
    }

    /// The pin of a map, a program or a link.
    #[must_use]
    pub fn pin(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The directory in which a new set of pins is made before it takes this one's place. (A bpffs reserves names with a dot.)
    #[must_use]
    pub fn staging(&self) -> Self {
        self.beside("-staging")
    }

    /// The directory in which an earlier daemon's pins lie while its connections are closed.
    #[must_use]
    pub fn retired(&self) -> Self {
        self.beside("-retired")
    }

    fn beside(&self, suffix: &str) -> Self {
        let mut name = self.0.file_name().unwrap_or_default().to_owned();
        name.push(suffix);
        Self(self.0.with_file_name(name))
    }

    /// Removes all pins and the directory; what was not there is fine.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> std::io::Result<()> {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
