//! What was there before the programs, or is out of their reach: connections to protected endpoints without a flow record, and
//! listeners whose connections are not guarded, in all network namespaces.
//!
//! The programs alone let no bytes of such a connection through and report it at its first packet. One that stands idle
//! is found here, and one whose report was lost.

mod judge;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use enforcer_common::abi::{EndpointKey, MODE_OBSERVE, map};

pub use judge::{Gap, Scope};

use super::paths;
use crate::datapath::{
    Dump, LINK_PIN, Live, LiveError, PinDir, SocketDestroyer, TcpSocket, attached_cgroup, tcp_sockets,
};
use crate::workload::cgroups;

/// Id of a hierarchy's root.
const ROOT_CGROUP_ID: u64 = 1;
/// How often the destruction of connections is tried.
const ROUNDS: usize = 3;
/// Pause between two rounds.
const PAUSE: Duration = Duration::from_millis(20);

/// Why it can't be told what is unguarded.
#[derive(Debug, thiserror::Error)]
pub enum UnguardedError {
    /// The maps can't be read.
    #[error(transparent)]
    Maps(#[from] LiveError),
    /// The link can't be looked at.
    #[error("cannot see which cgroup is guarded: {0}")]
    Link(#[source] std::io::Error),
    /// The cgroup that was guarded does not exist any more; the kernel has detached the programs.
    #[error("the guarded cgroup was removed, so nothing is guarded any more; start the enforcer again")]
    Detached,
    /// The hierarchy can't be read.
    #[error(transparent)]
    Cgroup(#[from] paths::PathError),
    /// Sockets can't be listed.
    #[error("cannot list sockets: {0}")]
    Sockets(#[source] std::io::Error),
}

/// What the programs do not see.
#[derive(Debug, Default)]
pub struct Unguarded {
    /// Connections to protected endpoints.
    pub connections: Vec<TcpSocket>,
    /// Listeners.
    pub listeners: Vec<(TcpSocket, Gap)>,
    /// Network namespaces that could not be looked into.
    pub errors: Vec<String>,
}

/// What [`close`] did.
#[derive(Debug, Default)]
pub struct Closed {
    /// Connections that were found.
    pub found: Vec<TcpSocket>,
    /// How many of them could not be closed, and why. They get no bytes.
    pub open: usize,
    /// Listeners whose connections are not guarded.
    pub listeners: Vec<(TcpSocket, Gap)>,
    /// What went wrong.
    pub errors: Vec<String>,
    /// The policy observes: what was found was left as it is.
    pub observed: bool,
}

/// A loaded enforcement: its records, what it protects, and whose sockets it sees.
struct Guarding {
    live: Live,
    endpoints: BTreeSet<EndpointKey>,
    scope: Scope,
}

impl Guarding {
    fn of(live: Live, pins: &PinDir) -> Result<Self, UnguardedError> {
        let endpoints = live
            .endpoints
            .keys()
            .collect::<Result<BTreeSet<_>, _>>()
            .map_err(|source| LiveError::Map { name: map::ENDPOINTS, source })?;
        let cgroup_id = attached_cgroup(&pins.pin(LINK_PIN)).map_err(UnguardedError::Link)?;
        let scope = scope(cgroup_id.ok_or(UnguardedError::Detached)?)?;
        Ok(Self { live, endpoints, scope })
    }

    /// One look. A guarded connection that ends meanwhile has lost its record, and is among them.
    fn look(&self) -> Result<Unguarded, UnguardedError> {
        look(&self.endpoints, &self.scope, |cookie| self.live.flows.get(&cookie, 0).is_ok())
    }

    /// Leaves of some connections those that are there still.
    fn retain(&self, connections: &mut Vec<TcpSocket>) -> Result<(), UnguardedError> {
        if !connections.is_empty() {
            let again = self.look()?.connections;
            let still: BTreeSet<u64> = again.iter().map(|socket| socket.cookie).collect();
            connections.retain(|socket| still.contains(&socket.cookie));
        }
        Ok(())
    }

    /// Two looks, of which only what both see counts.
    fn find(&self) -> Result<Unguarded, UnguardedError> {
        let mut found = self.look()?;
        self.retain(&mut found.connections)?;
        Ok(found)
    }
}

/// Finds what a loaded enforcement does not guard although its policy names the endpoint.
///
/// # Errors
/// See [`UnguardedError`].
pub fn find(pins: &PinDir) -> Result<Unguarded, UnguardedError> {
    Guarding::of(Live::open(pins)?, pins)?.find()
}

/// As [`find`], for endpoints and a cgroup that nothing is attached to yet.
///
/// # Errors
/// See [`UnguardedError`].
pub fn find_before(endpoints: &BTreeSet<EndpointKey>, cgroup: &Path) -> Result<Unguarded, UnguardedError> {
    let id = fs::metadata(cgroup).map_err(UnguardedError::Link)?.ino();
    look(endpoints, &scope(id)?, |_| false)
}

fn look(
    endpoints: &BTreeSet<EndpointKey>,
    scope: &Scope,
    is_flow: impl Fn(u64) -> bool,
) -> Result<Unguarded, UnguardedError> {
    let ports = endpoints.iter().map(|endpoint| endpoint.port).collect();
    let Dump { sockets, errors } = tcp_sockets(&ports).map_err(UnguardedError::Sockets)?;
    Ok(Unguarded {
        connections: judge::connections(&sockets, endpoints, scope, is_flow),
        listeners: judge::listeners(&sockets, endpoints, scope),
        errors,
    })
}

/// Closes the connections that [`find`] finds; each client sees a reset. In observe mode they are only found.
///
/// # Errors
/// See [`UnguardedError`].
pub fn close(pins: &PinDir) -> Result<Closed, UnguardedError> {
    let live = Live::open(pins)?;
    let config = live.configuration()?;
    if config.draining != 0 {
        return Ok(Closed::default());
    }
    let guarding = Guarding::of(live, pins)?;
    let Unguarded { connections, listeners, errors } = guarding.find()?;
    let mut closed = Closed { listeners, errors, observed: config.mode == MODE_OBSERVE, ..Closed::default() };
    closed.found.clone_from(&connections);
    if closed.observed {
        return Ok(closed);
    }
    let (mut destroyer, mut left) = (SocketDestroyer::default(), connections);
    for _ in 0..ROUNDS {
        if left.is_empty() {
            break;
        }
        for socket in &left {
            let destroyed =
                destroyer.destroy(socket.netns_cookie, socket.cookie, socket.interface, socket.ends);
            if let Err(error) = destroyed {
                closed.errors.push(format!("socket {}: {error}", socket.cookie));
            }
        }
        std::thread::sleep(PAUSE);
        guarding.retain(&mut left)?;
    }
    closed.open = left.len();
    Ok(closed)
}

/// The subtree of the cgroup with this id.
fn scope(cgroup_id: u64) -> Result<Scope, UnguardedError> {
    if cgroup_id == ROOT_CGROUP_ID {
        return Ok(Scope::Everything);
    }
    let mut ids = BTreeSet::new();
    if let Some((_, top)) = cgroups(&paths::cgroup2_root()?).find(|(id, _)| *id == cgroup_id) {
        ids.extend(cgroups(&top).map(|(id, _)| id));
    }
    // Also if it is out of sight, in another cgroup namespace say.
    ids.insert(cgroup_id);
    Ok(Scope::Cgroups(ids))
}

/// Who has a descriptor of the socket with this inode, for people: `nginx (pid 42)`. The first one that is found.
#[must_use]
pub fn holder(inode: u32) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok()).find_map(|pid| {
        let mut descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        descriptors.find(|entry| {
            fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str())
        })?;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Some(format!("{} (pid {pid})", name.trim()))
    })
}
