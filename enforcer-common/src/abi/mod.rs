//! The types that live in BPF maps, in the ring buffer and in injected datagrams.
//!
//! All are `#[repr(C)]`, made of integers only, without implicit padding; size and offsets are asserted beside
//! each type. [`ABI_VERSION`] is stored in the configuration map; whoever writes the maps checks it first.

mod caller;
mod config;
mod counter;
mod endpoint;
mod flow;
mod grant;
mod label;
mod limit;
mod punt;
mod reply;
mod revocation;
mod sealed;
mod shield;

pub use caller::*;
pub use config::*;
pub use counter::*;
pub use endpoint::*;
pub use flow::*;
pub use grant::*;
pub use label::*;
pub use limit::*;
pub use punt::*;
pub use reply::*;
pub use revocation::*;
pub use sealed::*;
pub use shield::*;

/// Version of everything in this module. It moves when a layout or the meaning of a field does.
pub const ABI_VERSION: u32 = 6;

/// Names of the maps, as the loader, the pins and the CLI know them.
pub mod map {
    /// Configuration, one entry.
    pub const CONFIG: &str = "CONFIG";
    /// Digest keys, one entry.
    pub const DIGEST_KEY: &str = "DIGEST_KEY";
    /// What a daemon leaves to the next one; no program reads it.
    pub const DAEMON_STATE: &str = "DAEMON_STATE";
    /// Protected endpoints.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Guarded sockets by cookie.
    pub const SOCKETS: &str = "SOCKETS";
    /// Flow records by socket cookie.
    pub const FLOWS: &str = "FLOWS";
    /// Verdicts by head digest.
    pub const VERDICTS: &str = "VERDICTS";
    /// Grants by slot.
    pub const GRANTS: &str = "GRANTS";
    /// Response templates for refusals that the kernel makes itself.
    pub const REPLIES: &str = "REPLIES";
    /// Outcomes in the kernel, per CPU.
    pub const COUNTERS: &str = "COUNTERS";
    /// Refusal reasons that the daemon found; no program reads it.
    pub const REASONS: &str = "REASONS";
    /// Bytes on their way to the daemon.
    pub const PUNTS: &str = "PUNTS";
    /// The daemon's sockets, from which bytes are injected.
    pub const INJECTORS: &str = "INJECTORS";
    /// Where bytes go that are dropped.
    pub const SINK: &str = "SINK";
    /// Scratch memory of the judge.
    pub const SCRATCH: &str = "SCRATCH";
    /// Labels of grants; no program reads it.
    pub const GRANT_LABELS: &str = "GRANT_LABELS";
    /// Labels of servers; no program reads it.
    pub const SERVER_LABELS: &str = "SERVER_LABELS";
    /// Revocations by number; no program reads it.
    pub const REVOCATIONS: &str = "REVOCATIONS";
    /// Words that belong to them; no program reads it.
    pub const REVOCATION_STATE: &str = "REVOCATION_STATE";

    /// Ports whose servers read past the judge: keys are wildcard [`super::EndpointKey`]s, values the time on the boot clock, in
    /// nanoseconds, at which it was seen. Writers: gate and tag_flow. Reader: gate. Nobody deletes.
    pub const HOLD: &str = "HOLD";

    /// Callers in their own `connect`.
    pub const CONNECTING: &str = "CONNECTING";
    /// Callers whose connections are on their way.
    pub const CALLERS: &str = "CALLERS";

    /// Workloads that presented a principal's first token; no program reads it.
    pub const FIRST_USERS: &str = "FIRST_USERS";
    /// Workloads that may not connect.
    pub const BARRED: &str = "BARRED";
    /// Buckets of limits.
    pub const LIMITS: &str = "LIMITS";
    /// Labels of buckets; no program reads it.
    pub const LIMIT_LABELS: &str = "LIMIT_LABELS";
    /// Buckets of requests without a grant, by where they come from.
    pub const SOURCES: &str = "SOURCES";
    /// The cgroups around others that have their workload's name.
    pub const NAMED: &str = "NAMED";
    /// What the policy asks of the shield.
    pub const SHIELD_CONFIG: &str = "SHIELD_CONFIG";
    /// Addresses with protected endpoints.
    pub const SHIELD_ADDRESSES: &str = "SHIELD_ADDRESSES";
    /// What sources have sent.
    pub const SHIELD_SOURCES: &str = "SHIELD_SOURCES";
    /// Sources whose requests are refused.
    pub const SHIELD_FAILING: &str = "SHIELD_FAILING";
    /// IPv4 prefixes that are dropped or exempt.
    pub const SHIELD_V4: &str = "SHIELD_V4";
    /// IPv6 prefixes that are dropped or exempt.
    pub const SHIELD_V6: &str = "SHIELD_V6";
    /// Interfaces under the shield.
    pub const SHIELD_INTERFACES: &str = "SHIELD_INTERFACES";
    /// Scratch memory of the shield.
    pub const SHIELD_OPTIONS: &str = "SHIELD_OPTIONS";

    /// All of them: what is pinned.
    pub const ALL: &[&str] = &[
        CONFIG,
        DIGEST_KEY,
        DAEMON_STATE,
        ENDPOINTS,
        SOCKETS,
        FLOWS,
        VERDICTS,
        GRANTS,
        REPLIES,
        COUNTERS,
        REASONS,
        PUNTS,
        INJECTORS,
        SINK,
        SCRATCH,
        GRANT_LABELS,
        SERVER_LABELS,
        REVOCATIONS,
        REVOCATION_STATE,
        HOLD,
        CONNECTING,
        CALLERS,
        FIRST_USERS,
        BARRED,
        LIMITS,
        LIMIT_LABELS,
        SOURCES,
        NAMED,
        SHIELD_CONFIG,
        SHIELD_ADDRESSES,
        SHIELD_SOURCES,
        SHIELD_FAILING,
        SHIELD_V4,
        SHIELD_V6,
        SHIELD_INTERFACES,
        SHIELD_OPTIONS,
    ];
}

/// Asserts a type's size at compile time, and that no padding hides in it.
macro_rules! assert_layout {
    ($type:ty, $size:expr, [$($field:ident : $field_type:ty),+ $(,)?]) => {
        const _: () = assert!(core::mem::size_of::<$type>() == $size);
        // Fields fill the type: there is no padding whose bytes could differ or leak.
        const _: () = assert!(0 $(+ core::mem::size_of::<$field_type>())+ == $size);
        const _: () = { $(let _ = core::mem::offset_of!($type, $field);)+ };
        #[cfg(feature = "user")]
        // SAFETY: `repr(C)`, integers and arrays of integers only, no padding (asserted above).
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use assert_layout;
