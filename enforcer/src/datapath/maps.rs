//! The pinned maps, opened by name.

use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeMap;

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SockMap};
use enforcer_common::abi::{
    ABI_VERSION, Bar, Barred, Bucket, BucketLabel, Config, Counter, DaemonState, Endpoint, EndpointKey,
    FirstUser, Flow, Grant, GrantLabel, HeadDigest, MAX_BARRED, MAX_FIRST_USERS, MAX_FLOWS, NameHash,
    ReasonName, Reply, Revocation, Sealed, ServerLabel, Source, SourceKey, Verdict, map, text,
};
use enforcer_common::digest::DigestKey;

use super::shield::ShieldMaps;
use super::{Buckets, PinDir};

/// Why the maps of a running enforcement can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// Nothing is pinned.
    #[error("no enforcement is loaded: {0} does not exist; start it with `enforcer run --policy FILE`")]
    NotLoaded(String),
    /// A map can't be opened or is of another layout.
    #[error("cannot use map `{name}`: {source}; are you root?")]
    Map {
        /// The map.
        name: &'static str,
        /// Why.
        source: MapError,
    },
    /// The maps belong to another version.
    #[error(
        "the loaded enforcement has ABI version {found}, this program {}; use the `enforcer` that loaded it",
        ABI_VERSION
    )]
    Abi {
        /// Version in the maps.
        found: u32,
    },
}

pub(super) fn open<M: TryFrom<Map, Error = MapError>>(
    pins: &PinDir,
    name: &'static str,
    wrap: impl FnOnce(MapData) -> Map,
) -> Result<M, LiveError> {
    let failed = |source| LiveError::Map { name, source };
    M::try_from(wrap(MapData::from_pin(pins.pin(name)).map_err(failed)?)).map_err(failed)
}

/// What people and the CLI look at.
pub struct Live {
    /// Configuration.
    pub config: Array<MapData, Config>,
    /// Flows by cookie.
    pub flows: HashMap<MapData, u64, Flow>,
    /// Verdicts by head digest.
    pub verdicts: HashMap<MapData, HeadDigest, Sealed<Verdict>>,
    /// Grants by slot.
    pub grants: Array<MapData, Grant>,
    /// Labels of grants by slot.
    pub grant_labels: Array<MapData, GrantLabel>,
    /// Workloads that presented a principal's first token.
    pub first_users: HashMap<MapData, NameHash, FirstUser>,
    /// Buckets of limits by index.
    pub limits: Array<MapData, Bucket>,
    /// Their labels.
    pub limit_labels: Array<MapData, BucketLabel>,
    /// Where requests without a grant come from.
    pub sources: HashMap<MapData, SourceKey, Source>,
    /// By the ids of cgroups those of the ones around them that have their workload's name.
    pub(super) named: HashMap<MapData, u64, u64>,
    /// Labels of servers by number.
    pub server_labels: Array<MapData, ServerLabel>,
    /// Endpoints.
    pub endpoints: HashMap<MapData, EndpointKey, Endpoint>,
    counters: PerCpuArray<MapData, u64>,
    /// Revocations by number.
    pub(super) revocations: HashMap<MapData, u64, Revocation>,
    pub(super) revocation_state: Array<MapData, u64>,
    /// Refusal reasons that the daemon counted.
    pub reasons: HashMap<MapData, ReasonName, u64>,
    /// The shield's.
    pub shield: ShieldMaps,
}

impl Live {
    /// Opens the maps of a loaded enforcement.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn open(pins: &PinDir) -> Result<Self, LiveError> {
        if !pins.exists() {
            return Err(LiveError::NotLoaded(pins.path().display().to_string()));
        }
        let live = Self {
            config: open(pins, map::CONFIG, Map::Array)?,
            flows: open(pins, map::FLOWS, Map::HashMap)?,
            verdicts: open(pins, map::VERDICTS, Map::LruHashMap)?,
            grants: open(pins, map::GRANTS, Map::Array)?,
            grant_labels: open(pins, map::GRANT_LABELS, Map::Array)?,
            first_users: open(pins, map::FIRST_USERS, Map::HashMap)?,
            limits: open(pins, map::LIMITS, Map::Array)?,
            limit_labels: open(pins, map::LIMIT_LABELS, Map::Array)?,
            sources: open(pins, map::SOURCES, Map::LruHashMap)?,
            named: open(pins, map::NAMED, Map::LruHashMap)?,
            server_labels: open(pins, map::SERVER_LABELS, Map::Array)?,
            endpoints: open(pins, map::ENDPOINTS, Map::HashMap)?,
            revocations: open(pins, map::REVOCATIONS, Map::HashMap)?,
            revocation_state: open(pins, map::REVOCATION_STATE, Map::Array)?,
            counters: open(pins, map::COUNTERS, Map::PerCpuArray)?,
            reasons: open(pins, map::REASONS, Map::HashMap)?,
            shield: ShieldMaps::open(pins)?,
        };
        let found = live.configuration()?.abi_version;
        if found != ABI_VERSION && found != 0 {
            return Err(LiveError::Abi { found });
        }
        Ok(live)
    }

    /// The configuration.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn configuration(&self) -> Result<Config, LiveError> {
        get(&self.config, map::CONFIG, 0)
    }

    /// Shows all flows. A walk over a hash that changes meanwhile may start again: a flow may be shown twice.
    ///
    /// # Errors
    /// See [`LiveError`], and when the map changes so fast that the walk does not end: some were not shown.
    pub fn each_flow(&self, each: &mut dyn FnMut(u64, &Flow)) -> Result<(), LiveError> {
        let failed = |source| LiveError::Map { name: map::FLOWS, source };
        for (count, entry) in self.flows.iter().enumerate() {
            if count >= 2 * MAX_FLOWS as usize {
                return Err(failed(MapError::IoError(std::io::Error::other("it changes too fast"))));
            }
            let (cookie, flow) = entry.map_err(failed)?;
            each(cookie, &flow);
        }
        Ok(())
    }

    /// Workloads that presented a principal's first token.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn first_users(&self) -> Result<Vec<(NameHash, FirstUser)>, LiveError> {
        let all: Result<_, _> = self.first_users.iter().take(MAX_FIRST_USERS as usize).collect();
        all.map_err(|source| LiveError::Map { name: map::FIRST_USERS, source })
    }

    /// All kernel counters, summed over the CPUs.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, LiveError> {
        Counter::ALL
            .iter()
            .map(|&counter| {
                let values = self
                    .counters
                    .get(&(counter as u32), 0)
                    .map_err(|source| LiveError::Map { name: map::COUNTERS, source })?;
                Ok((counter, values.iter().sum()))
            })
            .collect()
    }
}

fn get<T: Borrow<MapData>, V: Pod>(
    array: &Array<T, V>,
    name: &'static str,
    index: u32,
) -> Result<V, LiveError> {
    array.get(&index, 0).map_err(|source| LiveError::Map { name, source })
}

/// The first users that the maps of an earlier enforcement hold; none if there are no such maps.
///
/// # Errors
/// See [`LiveError`]: its maps may be of another version.
pub fn first_users_left_behind(pins: &PinDir) -> Result<Vec<(NameHash, FirstUser)>, LiveError> {
    if !pins.pin(map::FIRST_USERS).exists() {
        return Ok(Vec::new());
    }
    let users: HashMap<MapData, NameHash, FirstUser> = open(pins, map::FIRST_USERS, Map::HashMap)?;
    let failed = |source| LiveError::Map { name: map::FIRST_USERS, source };
    users.iter().take(MAX_FIRST_USERS as usize).collect::<Result<_, _>>().map_err(failed)
}

/// What the daemon writes.
pub struct Maps {
    /// What can be looked at.
    pub live: Live,
    digest_key: Array<MapData, DigestKey>,
    daemon_state: Array<MapData, DaemonState>,
    replies: Array<MapData, Reply>,
    injectors: SockMap<MapData>,
    sink: SockMap<MapData>,
    barred: HashMap<MapData, Barred, Bar>,
    /// Buckets of limits.
    pub buckets: Buckets,
}

impl Maps {
    /// Opens the maps for writing.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn open(pins: &PinDir) -> Result<Self, LiveError> {
        Ok(Self {
            live: Live::open(pins)?,
            digest_key: open(pins, map::DIGEST_KEY, Map::Array)?,
            daemon_state: open(pins, map::DAEMON_STATE, Map::Array)?,
            replies: open(pins, map::REPLIES, Map::Array)?,
            injectors: open(pins, map::INJECTORS, Map::SockMap)?,
            sink: open(pins, map::SINK, Map::SockMap)?,
            barred: open(pins, map::BARRED, Map::HashMap)?,
            buckets: Buckets::open(pins)?,
        })
    }

    /// The ring buffer. Only one reader may exist.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn punts(pins: &PinDir) -> Result<RingBuf<MapData>, LiveError> {
        open(pins, map::PUNTS, Map::RingBuf)
    }

    /// Writes the configuration.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_config(&mut self, config: Config) -> Result<(), LiveError> {
        set(&mut self.live.config, map::CONFIG, 0, config)
    }

    /// Writes the digest key.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_digest_key(&mut self, key: &DigestKey) -> Result<(), LiveError> {
        set(&mut self.digest_key, map::DIGEST_KEY, 0, *key)
    }

    /// The digest key.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn digest_key(&self) -> Result<DigestKey, LiveError> {
        get(&self.digest_key, map::DIGEST_KEY, 0)
    }

    /// What the last daemon left.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn daemon_state(&self) -> Result<DaemonState, LiveError> {
        get(&self.daemon_state, map::DAEMON_STATE, 0)
    }

    /// Leaves this to the next daemon.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_daemon_state(&mut self, state: &DaemonState) -> Result<(), LiveError> {
        set(&mut self.daemon_state, map::DAEMON_STATE, 0, *state)
    }

    /// Reads a response template.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn reply(&self, id: u32) -> Result<Reply, LiveError> {
        get(&self.replies, map::REPLIES, id)
    }

    /// Protects an endpoint.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_endpoint(&mut self, key: EndpointKey, endpoint: Endpoint) -> Result<(), LiveError> {
        let failed = |source| LiveError::Map { name: map::ENDPOINTS, source };
        self.live.endpoints.insert(key, endpoint, 0).map_err(failed)
    }

    /// Stops protecting an endpoint; one that is not there is fine.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn remove_endpoint(&mut self, key: EndpointKey) -> Result<(), LiveError> {
        match self.live.endpoints.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) => Err(LiveError::Map { name: map::ENDPOINTS, source }),
        }
    }

    /// Lets a workload connect to an endpoint no more, but for its users that may.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn bar(&mut self, key: &Barred, bar: &Bar) -> Result<(), LiveError> {
        let failed = |source| LiveError::Map { name: map::BARRED, source };
        self.barred.insert(key, bar, 0).map_err(failed)
    }

    /// All that an earlier daemon barred.
    #[must_use]
    pub fn all_barred(&self) -> BTreeMap<Barred, Bar> {
        self.barred.iter().take(2 * MAX_BARRED as usize).filter_map(Result::ok).collect()
    }

    /// Takes that back; what is not there is fine.
    pub fn unbar(&mut self, key: &Barred) {
        let _ = self.barred.remove(key);
    }

    /// Writes a response template.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_reply(&mut self, id: u32, reply: &Reply) -> Result<(), LiveError> {
        set(&mut self.replies, map::REPLIES, id, *reply)
    }

    /// Writes a verdict.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_verdict(&mut self, digest: HeadDigest, verdict: Verdict) -> Result<(), LiveError> {
        let failed = |source| LiveError::Map { name: map::VERDICTS, source };
        self.live.verdicts.insert(digest, Sealed::new(verdict), 0).map_err(failed)
    }

    /// Writes a grant.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_grant(&mut self, slot: u32, grant: &Grant) -> Result<(), LiveError> {
        set(&mut self.live.grants, map::GRANTS, slot, *grant)
    }

    /// Writes a grant's label.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_grant_label(&mut self, slot: u32, label: &GrantLabel) -> Result<(), LiveError> {
        set(&mut self.live.grant_labels, map::GRANT_LABELS, slot, *label)
    }

    /// Writes a bucket's label.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_limit_label(&mut self, index: u32, label: &BucketLabel) -> Result<(), LiveError> {
        set(&mut self.live.limit_labels, map::LIMIT_LABELS, index, *label)
    }

    /// Writes a server's label.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_server_label(&mut self, id: u32, label: &ServerLabel) -> Result<(), LiveError> {
        set(&mut self.live.server_labels, map::SERVER_LABELS, id, *label)
    }

    /// Adds to a refusal reason's count.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn add_reason(&mut self, reason: &str) -> Result<(), LiveError> {
        let key: ReasonName = text(reason);
        let count = self.live.reasons.get(&key, 0).unwrap_or(0);
        let failed = |source| LiveError::Map { name: map::REASONS, source };
        self.live.reasons.insert(key, count + 1, 0).map_err(failed)
    }

    /// Makes a socket the sink.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_sink(&mut self, socket: &impl std::os::fd::AsRawFd) -> Result<(), LiveError> {
        self.sink.set(0, socket, 0).map_err(|source| LiveError::Map { name: map::SINK, source })
    }

    /// Takes the sink away: from here on the judge drops what it would have swallowed.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn clear_sink(&mut self) -> Result<(), LiveError> {
        self.sink.clear_index(&0).map_err(|source| LiveError::Map { name: map::SINK, source })
    }

    /// Puts the kernel's end of a socket pair under the inject program.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_injector(&mut self, index: u32, socket: &impl std::os::fd::AsRawFd) -> Result<(), LiveError> {
        let failed = |source| LiveError::Map { name: map::INJECTORS, source };
        self.injectors.set(index, socket, 0).map_err(failed)
    }
}

fn set<T: BorrowMut<MapData>, V: Pod>(
    array: &mut Array<T, V>,
    name: &'static str,
    index: u32,
    value: V,
) -> Result<(), LiveError> {
    array.set(index, value, 0).map_err(|source| LiveError::Map { name, source })
}
