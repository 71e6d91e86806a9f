//! The daemon's core: what happens to the bytes that the kernel hands over. No I/O, no clock: bytes, keys and the time go in,
//! calls of a [`Datapath`] come out. In tests the datapath is a plain collection.

mod bars;
mod bounds;
#[cfg(test)]
mod differential;
mod doomed;
mod endpoints;
mod engine;
mod grants;
mod limits;
#[cfg(test)]
mod model;
mod numbers;
mod remembered;
mod replies;
mod revoked;
mod sweep;
mod switch;
#[cfg(test)]
mod tests;
mod transition;
mod verifier;

pub use bars::{barred, some_closed};
pub use bounds::MEMORY_MAX_BYTES;
pub use doomed::{Doomed, DoomedQueue};
pub use endpoints::{EndpointPolicy, Endpoints, endpoint_keys};
pub use engine::{Engine, EngineError, KeyRequest, Orphan, Secrets};
pub use grants::{GRANT_MAX_NS, GrantFor, GrantTable, Granted, QUARANTINE_NS};
pub use limits::{BucketTable, GrantBuckets, Payer, Shape};
pub use numbers::{Numbers, NumbersError};
pub use remembered::Claims;
pub use replies::ReplyTable;
pub use revoked::Revoked;
pub use sweep::{Stream, StreamEnd, Sweeper, must_end};
pub use switch::{AllCarried, Consequences, Judged, Losses, Next};
pub use transition::{Loss, Transition};
pub use verifier::KeyedVerifier;

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use enforcer_common::abi::{
    Bucket, BucketLabel, Ends, FirstUser, Flow, Grant, GrantLabel, HeadDigest, NameHash, Origin, Reply,
    SourceKey, Verdict,
};
use enforcer_common::flow::Ctl;

use crate::http::answer::Answer;
use crate::revocation::Revocations;
use crate::workload::{CallerView, Workload};

/// Who is calling on a connection, as far as it is known.
#[derive(Debug, Clone)]
pub struct CallerFacts {
    /// Its user; of an unknown caller it means nothing.
    pub uid: u32,
    /// It is on this host, and known to the kernel. Its workload may be gone.
    pub is_known: bool,
    /// Its workload; `None` for an unknown caller.
    pub workload: Option<Arc<Workload>>,
    /// Where the connection comes from.
    pub address: IpAddr,
    /// That is an address of this host.
    pub is_of_this_host: bool,
    /// What its requests are charged to while nobody has granted them anything.
    pub source: SourceKey,
    /// The kernel has charged another for its last one: it did not know which workload's part its cgroup is.
    pub charged_elsewhere: bool,
}

impl CallerFacts {
    /// Nothing is known, also no address.
    pub const NOTHING: Self = Self {
        uid: u32::MAX,
        is_known: false,
        workload: None,
        address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        is_of_this_host: false,
        source: SourceKey { cgroup_id: 0, addr: [0; 2] },
        charged_elsewhere: false,
    };

    /// As policy asks for it.
    #[must_use]
    pub fn view(&self) -> CallerView<'_> {
        let Self { uid, ref workload, address, is_of_this_host, .. } = *self;
        CallerView { workload: workload.as_deref(), uid, address, is_of_this_host }
    }
}

impl Default for CallerFacts {
    fn default() -> Self {
        Self::NOTHING
    }
}

/// What the core asks of the kernel. Every call may fail; the core then destroys the flow or does without the fast path.
pub trait Datapath {
    /// Why a call failed.
    type Error: std::fmt::Display;

    /// Bytes for the server of a flow that the daemon owns in `ctl`'s epoch, by the right of a grant (0: none is needed). The flow
    /// remembers the grant before the server can read a byte: a hand-back may come late, and another request before it.
    ///
    /// # Errors
    /// Part of them may have gone: the flow must be destroyed.
    fn to_server(
        &mut self,
        server_id: u32,
        cookie: u64,
        ctl: Ctl,
        grant_serial: u64,
        bytes: &[u8],
    ) -> Result<(), Self::Error>;

    /// An answer for the client of such a flow.
    ///
    /// # Errors
    /// As above.
    fn to_client(&mut self, cookie: u64, ctl: Ctl, answer: &Answer) -> Result<(), Self::Error>;

    /// Gives the flow back if its control word still is `expected`.
    ///
    /// # Errors
    /// Nothing was given back.
    fn hand_back(&mut self, cookie: u64, expected: Ctl, to: HandBack) -> Result<(), Self::Error>;

    /// Destroys the connection, after so many nanoseconds (for an answer to be read first).
    fn destroy(&mut self, cookie: u64, netns_cookie: u64, after_ns: u64);

    /// Destroys a connection that has no flow record.
    fn destroy_stray(&mut self, cookie: u64, netns_cookie: u64, interface: u32, ends: Ends);

    /// Where the list of revocations stands: it moves with each change.
    ///
    /// # Errors
    /// It can't be told.
    fn revocation_epoch(&mut self) -> Result<u64, Self::Error>;

    /// All revocations.
    ///
    /// # Errors
    /// They can't be read.
    fn revocations(&mut self) -> Result<Revocations, Self::Error>;

    /// Says that slots of grants below this one may be in use from now on.
    ///
    /// # Errors
    /// It can't be said: who looks for grants would not find those.
    fn set_grant_slots(&mut self, slots: u32) -> Result<(), Self::Error>;

    /// Shows all flows; one that comes or goes meanwhile may be missed.
    ///
    /// # Errors
    /// Some were not shown.
    fn flows(&mut self, each: &mut dyn FnMut(u64, &Flow)) -> Result<(), Self::Error>;

    /// Whether the flow still has a record.
    fn flow_exists(&mut self, cookie: u64) -> bool;

    /// The client's address, and the workload and process where they are known, for the log.
    fn peer(&mut self, cookie: u64) -> String;

    /// Who presented a token before, as its grant says.
    fn holder(&mut self, caller: &Origin) -> CallerFacts;

    /// The workload that a principal's tokens belong to because it presented the first, if there was one.
    ///
    /// # Errors
    /// It can't be told.
    fn first_user(&mut self, key: &NameHash) -> Result<Option<FirstUser>, Self::Error>;

    /// Remembers the workload that presented a principal's first token.
    ///
    /// # Errors
    /// It is not remembered, because the table is full, say.
    fn set_first_user(&mut self, key: &NameHash, user: &FirstUser) -> Result<(), Self::Error>;

    /// Who is calling on a flow that comes from `origin`. Whatever has become of the flow's record, it is who the kernel tells from others by that.
    fn caller(&mut self, cookie: u64, origin: &Origin) -> CallerFacts;

    /// Writes a verdict.
    ///
    /// # Errors
    /// The head stays unknown to the kernel.
    fn set_verdict(&mut self, digest: HeadDigest, verdict: Verdict) -> Result<(), Self::Error>;

    /// Reads a grant.
    ///
    /// # Errors
    /// There is no such slot.
    fn grant(&mut self, slot: u32) -> Result<Grant, Self::Error>;

    /// Writes a grant.
    ///
    /// # Errors
    /// The grant is not in force.
    fn set_grant(&mut self, slot: u32, grant: &Grant) -> Result<(), Self::Error>;

    /// Reads a grant's label.
    ///
    /// # Errors
    /// There is no such slot.
    fn grant_label(&mut self, slot: u32) -> Result<GrantLabel, Self::Error>;

    /// Writes a grant's label.
    ///
    /// # Errors
    /// The label is missing.
    fn set_grant_label(&mut self, slot: u32, label: &GrantLabel) -> Result<(), Self::Error>;

    /// Reads a limit's bucket.
    ///
    /// # Errors
    /// There is no such bucket.
    fn bucket(&mut self, index: u32) -> Result<Bucket, Self::Error>;

    /// Begins a bucket that nobody uses, with its label.
    ///
    /// # Errors
    /// It must not be used.
    fn begin_bucket(&mut self, index: u32, bucket: &Bucket, label: &BucketLabel) -> Result<(), Self::Error>;

    /// Gives a bucket another limit; see [`enforcer_common::limit::changed`] for what becomes of its fill.
    ///
    /// # Errors
    /// It may be half changed.
    fn limit_bucket(&mut self, index: u32, shape: &Shape, now_ns: u64) -> Result<(), Self::Error>;

    /// Ends a bucket that nobody uses: what is charged to it from now on is refused.
    ///
    /// # Errors
    /// It goes on.
    fn end_bucket(&mut self, index: u32) -> Result<(), Self::Error>;

    /// Takes places away that no connection has.
    ///
    /// # Errors
    /// They stay.
    fn give_back_places(&mut self, index: u32, places: u64) -> Result<(), Self::Error>;

    /// Charges a request of a flow to the buckets of its grant: all, or none.
    ///
    /// # Errors
    /// It is over a limit, for so many nanoseconds.
    fn charge(&mut self, cookie: u64, buckets: &GrantBuckets, now_ns: u64) -> Result<(), u64>;

    /// Charges a request to where it comes from, as one that the kernel does not know: the kernel did not see its head begin, or took
    /// another source for its.
    ///
    /// # Errors
    /// It is over the limit, for so many nanoseconds.
    fn charge_source(&mut self, source: &SourceKey, now_ns: u64) -> Result<(), u64>;

    /// Writes a response template.
    ///
    /// # Errors
    /// The kernel can't give this answer.
    fn set_reply(&mut self, id: u32, reply: &Reply) -> Result<(), Self::Error>;

    /// Counts a refusal reason.
    fn count(&mut self, reason: &'static str);
}

/// The state that a flow is given back in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandBack {
    /// New control word.
    pub ctl: Ctl,
    /// Body bytes left.
    pub remaining_bytes: u64,
    /// Chunk decoder.
    pub chunked: u64,
    /// Serial of the request's grant; 0: none.
    pub grant_serial: u64,
    /// The server's send sequence when the last request began.
    pub write_seq_mark: u32,
    /// The client sent a request before the one before it was answered.
    pub pipelined: bool,
}

/// One instant, on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_BOOTTIME`, in nanoseconds: the kernel's deadlines.
    pub boot_ns: u64,
    /// Seconds since 1970: the tokens' claims.
    pub unix_secs: u64,
    /// How much of the next second is over, in nanoseconds.
    pub unix_subsec_ns: u32,
}
