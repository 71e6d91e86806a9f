//! Streams that must end: which connections still carry the answer to a request whose token was revoked or has ended.
//!
//! A response may go on for hours (server-sent events), long after its request's grant. So each flow remembers the grants that its
//! requests used ([`enforcer_common::flow::use_grant`]), a grant keeps its slot while a flow names it, and now and then
//! all flows are held against the grants.

use std::collections::{BTreeMap, HashMap};

use enforcer_common::abi::{FLOW_GRANTS, FLOW_OBSERVE, Flow, Grant, grant_bit, grant_slot};
use tracing::{info, warn};

use super::{Datapath, GrantTable, Now};
use crate::policy::Mode;

/// How often flows are looked through without a reason.
const SELDOM_NS: u64 = 10_000_000_000;
/// How long after a token was revoked or has ended they are looked through at every tick: requests that passed just before
/// may be noted in their flows just after.
const OFTEN_FOR_NS: u64 = 3_000_000_000;
/// How often slots are freed.
const FREE_NS: u64 = 2_000_000_000;

/// Why a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamEnd {
    /// Its token was revoked, or policy does not allow it any more.
    Revoked,
    /// Its token has ended.
    Expired,
    /// It names a grant that does not exist.
    GrantGone,
    /// It comes from observe mode, and the policy enforces now: nobody refused what was sent on it.
    Observed,
    /// It used so many tokens that grants are kept on its account, and slots are short.
    GrantsShort,
}

impl StreamEnd {
    /// Name of its counter.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Revoked => "stream-revoked",
            Self::Expired => "stream-expired",
            Self::GrantGone => "stream-grant-gone",
            Self::Observed => "stream-observed",
            Self::GrantsShort => "stream-grants-short",
        }
    }
}

/// What of a flow decides whether it must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// Socket cookie.
    pub cookie: u64,
    /// Network namespace cookie of the server's socket.
    pub netns_cookie: u64,
    /// Serials of the last grants, the last one first; 0: none.
    pub grants: [u64; FLOW_GRANTS],
    /// Bits of those before them.
    pub evicted_grants: u64,
    /// Nothing was refused on it, and now something would be.
    pub observed: bool,
}

impl Stream {
    /// Of a flow, with the mode in force; `None`: nothing on it needs to end, as no grant was used, or nothing is refused.
    #[must_use]
    pub fn of(cookie: u64, flow: &Flow, mode: Mode) -> Option<Self> {
        // The flag says that nothing was judged since: a head that is takes on the mode in force.
        let observed = flow.flags & FLOW_OBSERVE != 0;
        let may_end = match mode {
            Mode::Enforce => observed || flow.grants[0] != 0,
            Mode::Observe => !observed && flow.grants[0] != 0,
        };
        may_end.then_some(Self {
            cookie,
            netns_cookie: flow.netns_cookie,
            grants: flow.grants,
            evicted_grants: flow.evicted_grants,
            observed,
        })
    }
}

/// Why this connection must end at `now_unix_secs`, if it must.
///
/// The open response belongs to the last grant, unless the client sent another request before it was complete; so the grants
/// before it count too. They count for less when they only ended: a client goes on with its next token on the same connection
/// all the time, so the end of an earlier token of the *same* principal ends nothing.
///
/// `grant` gives what is in the slot of a serial. `newly_revoked` are serials that were revoked since the last sweep: a
/// connection that used so many grants that it knows only bits of some ends if one of these may be among them.
pub fn must_end(
    stream: &Stream,
    now_unix_secs: u64,
    newly_revoked: &[u64],
    mut grant: impl FnMut(u64) -> Option<Grant>,
) -> Option<StreamEnd> {
    if stream.observed {
        return Some(StreamEnd::Observed);
    }
    let mut last_principal = None;
    for (age, serial) in stream.grants.iter().copied().take_while(|serial| *serial != 0).enumerate() {
        let Some(grant) = grant(serial).filter(|grant| grant.serial == serial) else {
            return Some(StreamEnd::GrantGone);
        };
        if grant.revoked != 0 {
            return Some(StreamEnd::Revoked);
        }
        if age == 0 {
            last_principal = Some(grant.principal_id);
        }
        let ended = now_unix_secs >= grant.ends_at_unix_secs;
        if ended && (age == 0 || last_principal != Some(grant.principal_id)) {
            return Some(StreamEnd::Expired);
        }
    }
    let may_be_evicted = |serial: &u64| stream.evicted_grants & grant_bit(*serial) != 0;
    newly_revoked.iter().any(may_be_evicted).then_some(StreamEnd::Revoked)
}

/// Decides when to look, looks, and has connections destroyed.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug, Default)]
pub struct Sweeper {
    next_ns: u64,
    next_free_ns: u64,
    often_until_ns: u64,
    /// Revoked grants and when they were seen first, on `CLOCK_BOOTTIME`.
    revoked: HashMap<u64, u64>,
}

impl Sweeper {
    /// Grants were revoked (by whom ever): the next ticks look for their streams.
    pub const fn wake(&mut self, now: Now) {
        self.often_until_ns = now.boot_ns.saturating_add(OFTEN_FOR_NS);
    }

    /// One tick, with the mode in force.
    pub fn tick<D: Datapath>(&mut self, now: Now, mode: Mode, grants: &mut GrantTable, datapath: &mut D) {
        if grants.some_token_ended(now) {
            self.wake(now);
        }
        let to_free = now.boot_ns >= self.next_free_ns && grants.some_is_over(now);
        if now.boot_ns >= self.often_until_ns && now.boot_ns < self.next_ns && !to_free {
            return;
        }
        self.next_ns = now.boot_ns.saturating_add(SELDOM_NS);
        self.next_free_ns = now.boot_ns.saturating_add(FREE_NS);
        let mut streams = Vec::new();
        let all = datapath.flows(&mut |cookie, flow| streams.extend(Stream::of(cookie, flow, mode)));
        streams.sort_unstable_by_key(|stream| stream.cookie);
        streams.dedup_by_key(|stream| stream.cookie);
        self.end(&streams, now, grants, datapath);
        match all {
            Ok(()) => {
                let named = streams.iter().flat_map(|stream| stream.grants).collect();
                let evicted = streams.iter().fold(0, |bits, stream| bits | stream.evicted_grants);
                let kept = grants.free(&named, evicted, now, datapath);
                if grants.is_short() {
                    // What these hold is freed when they are gone, not before.
                    let holds = |stream: &&Stream| stream.evicted_grants & kept != 0;
                    let ends = streams.iter().filter(holds).map(|stream| (stream, StreamEnd::GrantsShort));
                    destroy(ends.collect(), datapath);
                }
            }
            Err(error) => warn!(%error, "not all flows could be looked through; the next tick tries again"),
        }
    }

    fn end<D: Datapath>(&mut self, streams: &[Stream], now: Now, grants: &GrantTable, datapath: &mut D) {
        let newly_revoked = if streams.iter().any(|stream| stream.evicted_grants != 0) {
            self.newly_revoked(now, grants, datapath)
        } else {
            Vec::new()
        };
        let mut seen = HashMap::new();
        let end = |stream| {
            let end = must_end(stream, now.unix_secs, &newly_revoked, |serial| {
                *seen.entry(serial).or_insert_with(|| datapath.grant(grant_slot(serial)).ok())
            })?;
            Some((stream, end))
        };
        let ends = streams.iter().filter_map(end).collect();
        destroy(ends, datapath);
    }

    /// Serials of grants that were revoked a short while ago: a request that passed just before may be noted in its flow, and make
    /// room for others, just after the first look.
    fn newly_revoked<D: Datapath>(&mut self, now: Now, grants: &GrantTable, datapath: &mut D) -> Vec<u64> {
        let seen = std::mem::take(&mut self.revoked);
        let since = |serial: u64| (serial, seen.get(&serial).copied().unwrap_or(now.boot_ns));
        self.revoked = (0..grants.slots_used())
            .filter_map(|slot| datapath.grant(slot).ok())
            .filter(|grant| grant.serial != 0 && grant.revoked != 0)
            .map(|grant| since(grant.serial))
            .collect();
        let is_new = |since_ns: u64| now.boot_ns < since_ns.saturating_add(OFTEN_FOR_NS);
        self.revoked.iter().filter(|(_, since_ns)| is_new(**since_ns)).map(|(serial, _)| *serial).collect()
    }
}

fn destroy<D: Datapath>(ends: Vec<(&Stream, StreamEnd)>, datapath: &mut D) {
    let mut counts = BTreeMap::new();
    for (stream, end) in ends {
        datapath.count(end.name());
        datapath.destroy(stream.cookie, stream.netns_cookie, 0);
        *counts.entry(end).or_insert(0_u64) += 1;
    }
    if !counts.is_empty() {
        info!(
            ?counts,
            "connections of tokens that are no longer good, or can't be told any more, were ended"
        );
    }
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
pub(super) mod tests;
