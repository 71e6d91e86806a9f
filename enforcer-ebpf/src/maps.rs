//! The maps. What is in them, who writes, reads and deletes, and why they have their sizes: see the value types in
//! `enforcer_common::abi`.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{
    Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SockHash, SockMap,
};
use enforcer_common::abi::{
    Bar, Barred, Bucket, BucketLabel, Config, Connecting, DaemonState, Endpoint, EndpointKey, FirstUser,
    Flow, Grant, GrantLabel, HeadDigest, JoinKey, Joining, MAX_BARRED, MAX_BUCKETS, MAX_CALLERS,
    MAX_CONNECTING, MAX_COUNTERS, MAX_ENDPOINTS, MAX_FIRST_USERS, MAX_FLOWS, MAX_GRANTS, MAX_INJECTORS,
    MAX_NAMED, MAX_REASONS, MAX_REPLIES, MAX_REVOCATIONS, MAX_SERVERS, MAX_SHIELD_ADDRESSES,
    MAX_SHIELD_FAILING, MAX_SHIELD_INTERFACES, MAX_SHIELD_PREFIXES, MAX_SHIELD_SOURCES, MAX_SOCKETS,
    MAX_SOURCES, MAX_VERDICTS, NameHash, PUNTS_BYTES, REVOCATION_WORDS, ReasonName, Reply, Revocation,
    Sealed, ServerLabel, ShieldConfig, ShieldFailing, ShieldInterface, ShieldKey, ShieldPrefix, ShieldSource,
    Source, SourceKey, Verdict,
};
use enforcer_common::digest::DigestKey;
use enforcer_common::head::HeadBuf;
use enforcer_common::scratch::SLOTS;
use enforcer_common::shield::options::Options;

#[map]
pub(crate) static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static DIGEST_KEY: Array<DigestKey> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static DAEMON_STATE: Array<DaemonState> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static ENDPOINTS: HashMap<EndpointKey, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, 0);

/// Guarded sockets by cookie. The kernel removes a socket when it closes.
#[map]
pub(crate) static SOCKETS: SockHash<u64> = SockHash::with_max_entries(MAX_SOCKETS, 0);

#[map]
pub(crate) static FLOWS: HashMap<u64, Flow> = HashMap::with_max_entries(MAX_FLOWS, 0);

#[map]
pub(crate) static VERDICTS: LruHashMap<HeadDigest, Sealed<Verdict>> =
    LruHashMap::with_max_entries(MAX_VERDICTS, 0);

#[map]
pub(crate) static GRANTS: Array<Grant> = Array::with_max_entries(MAX_GRANTS, 0);

#[map]
pub(crate) static REPLIES: Array<Reply> = Array::with_max_entries(MAX_REPLIES, 0);

#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_COUNTERS, 0);

/// Bytes on their way to the daemon, headed by `PuntHeader`. Full: the flow that found it full is dead.
#[map]
pub(crate) static PUNTS: RingBuf = RingBuf::with_byte_size(PUNTS_BYTES, 0);

/// The kernel's ends of the daemon's socket pairs.
#[map]
pub(crate) static INJECTORS: SockMap = SockMap::with_max_entries(MAX_INJECTORS, 0);

/// Ports, as wildcard endpoints, whose servers were seen to read what was not judged, and since when. See `programs/hold.rs`.
#[map]
pub(crate) static HOLD: HashMap<EndpointKey, u64> = HashMap::with_max_entries(MAX_ENDPOINTS, 0);

/// A socket of the daemon whose peer is shut down: where bytes go that are dropped. See `Skb::swallow`.
#[map]
pub(crate) static SINK: SockMap = SockMap::with_max_entries(1, 0);

/// Memory for the head that is being judged, owned by who set `busy`: see [`enforcer_common::scratch`].
#[repr(C)]
pub(crate) struct Slot {
    pub(crate) busy: u64,
    pub(crate) head: HeadBuf,
}

#[map]
pub(crate) static SCRATCH: PerCpuArray<Slot> = PerCpuArray::with_max_entries(SLOTS, 0);

#[map]
pub(crate) static REASONS: HashMap<ReasonName, u64> = HashMap::with_max_entries(MAX_REASONS, 0);

#[map]
pub(crate) static GRANT_LABELS: Array<GrantLabel> = Array::with_max_entries(MAX_GRANTS, 0);

#[map]
pub(crate) static SERVER_LABELS: Array<ServerLabel> = Array::with_max_entries(MAX_SERVERS, 0);

#[map]
pub(crate) static REVOCATIONS: HashMap<u64, Revocation> = HashMap::with_max_entries(MAX_REVOCATIONS, 0);

#[map]
pub(crate) static REVOCATION_STATE: Array<u64> = Array::with_max_entries(REVOCATION_WORDS, 0);

#[map]
pub(crate) static CONNECTING: LruHashMap<u64, Sealed<Connecting>> =
    LruHashMap::with_max_entries(MAX_CONNECTING, 0);

#[map]
pub(crate) static CALLERS: LruHashMap<JoinKey, Sealed<Joining>> =
    LruHashMap::with_max_entries(MAX_CALLERS, 0);

#[map]
pub(crate) static FIRST_USERS: HashMap<NameHash, FirstUser> = HashMap::with_max_entries(MAX_FIRST_USERS, 0);

#[map]
pub(crate) static BARRED: HashMap<Barred, Bar> = HashMap::with_max_entries(MAX_BARRED, 0);

#[map]
pub(crate) static LIMITS: Array<Bucket> = Array::with_max_entries(MAX_BUCKETS, BPF_F_MMAPABLE);

#[map]
pub(crate) static LIMIT_LABELS: Array<BucketLabel> = Array::with_max_entries(MAX_BUCKETS, 0);

#[map]
pub(crate) static SOURCES: LruHashMap<SourceKey, Source> = LruHashMap::with_max_entries(MAX_SOURCES, 0);

#[map]
pub(crate) static NAMED: LruHashMap<u64, u64> = LruHashMap::with_max_entries(MAX_NAMED, 0);

#[map]
pub(crate) static SHIELD_CONFIG: Array<ShieldConfig> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static SHIELD_ADDRESSES: HashMap<EndpointKey, u32> =
    HashMap::with_max_entries(MAX_SHIELD_ADDRESSES, 0);

#[map]
pub(crate) static SHIELD_SOURCES: LruHashMap<ShieldKey, ShieldSource> =
    LruHashMap::with_max_entries(MAX_SHIELD_SOURCES, 0);

#[map]
pub(crate) static SHIELD_FAILING: LruHashMap<ShieldKey, ShieldFailing> =
    LruHashMap::with_max_entries(MAX_SHIELD_FAILING, 0);

#[map]
pub(crate) static SHIELD_V4: LpmTrie<[u8; 4], ShieldPrefix> =
    LpmTrie::with_max_entries(MAX_SHIELD_PREFIXES, 0);

#[map]
pub(crate) static SHIELD_V6: LpmTrie<[u8; 16], ShieldPrefix> =
    LpmTrie::with_max_entries(MAX_SHIELD_PREFIXES, 0);

#[map]
pub(crate) static SHIELD_INTERFACES: PerCpuHashMap<u32, ShieldInterface> =
    PerCpuHashMap::with_max_entries(MAX_SHIELD_INTERFACES, 0);

/// The options of the SYN that this CPU's shield looks at. Nothing interrupts it on its CPU that would run it again.
#[map]
pub(crate) static SHIELD_OPTIONS: PerCpuArray<Options> = PerCpuArray::with_max_entries(1, 0);
