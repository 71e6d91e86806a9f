//! What is to be done about a request whose head was read: by its verdict and grant, by the limits, and by whether a daemon is there.
//!
//! A global function to the verifier, which walks it once: in line, each of its ways would be followed through all that the judge does
//! afterwards. So what it decides comes back as one word.

use enforcer_common::abi::{
    CHARGE_ANSWERED, CHARGE_GRANT, CHARGE_REFUSED, CHARGE_UNKNOWN, Config, Counter, FLOW_OBSERVE,
    FLOW_PIPELINED, Flow, REPLY_MAX_BYTES, VERDICT_ALLOW, Verdict,
};
use enforcer_common::limit::RETRY_STEPS;
use enforcer_common::verdict::{self, Known};

use super::charge::{ADMITTED, charge_request};
use super::use_grant;
use crate::kernel::{config, count};
use crate::maps::{GRANTS, REPLIES};

/// The head has a verdict; any other number is the [`Counter`] of the reason why it has none.
pub(crate) const KNOWN: u32 = u32::MAX;

/// What is to be done.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Action {
    /// Nothing passes any more.
    Dead = 0,
    /// It passes.
    Pass = 1,
    /// It is answered with the reply, or by the daemon if the server may block in `recv`.
    Reply = 2,
    /// It is answered with the reply; there is no daemon.
    ReplyAlone = 3,
    /// It goes to the daemon.
    Punt = 4,
}

/// An action in the low byte, its counter in the next one, the number of a reply in the upper half.
#[derive(Clone, Copy)]
pub(crate) struct Weighed(u64);

impl Weighed {
    #[inline(always)]
    const fn new(action: Action, counter: Counter) -> Self {
        Self::reply(action, counter, 0)
    }

    #[inline(always)]
    const fn reply(action: Action, counter: Counter, reply_id: u32) -> Self {
        Self(action as u64 | (counter as u64) << 8 | (reply_id as u64) << 32)
    }

    /// What is to be done.
    #[inline(always)]
    pub(crate) const fn action(self) -> Action {
        match self.0 as u8 {
            1 => Action::Pass,
            2 => Action::Reply,
            3 => Action::ReplyAlone,
            4 => Action::Punt,
            _ => Action::Dead,
        }
    }

    /// What it is counted as.
    #[inline(always)]
    pub(crate) const fn counter(self) -> Counter {
        // SAFETY: made by `reply`, of a counter.
        unsafe { core::mem::transmute::<u32, Counter>((self.0 >> 8) as u8 as u32) }
    }

    /// The reply.
    #[inline(always)]
    pub(crate) const fn reply_id(self) -> u32 {
        (self.0 >> 32) as u32
    }
}
const _: () = assert!(Counter::ALL.len() <= u8::MAX as usize);

/// Weighs a request of `len` bytes so far, by a verdict or, without one, by the reason why there is none.
#[inline(always)]
pub(crate) fn request(flow: &mut Flow, verdict: &Verdict, known: u32, now_ns: u64, len: u64) -> Weighed {
    Weighed(weigh(flow, verdict, known, now_ns, len))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn weigh(flow: *mut Flow, verdict: *const Verdict, known: u32, now_ns: u64, len: u64) -> u64 {
    if flow.is_null() || verdict.is_null() {
        return Weighed::new(Action::Dead, Counter::DeadHelper).0;
    }
    // SAFETY: the callers' pointers are valid; the verifier checks each access against the types' sizes.
    let (flow, verdict) = unsafe { (&mut *flow, &*verdict) };
    let weighed =
        if known == KNOWN { by_verdict(flow, verdict, now_ns) } else { unknown(flow, known, now_ns) };
    let alone = matches!(weighed.action(), Action::ReplyAlone);
    if !alone && !matches!(weighed.action(), Action::Reply) {
        return weighed.0;
    }
    if flow.flags & FLOW_PIPELINED != 0 {
        return Weighed::new(Action::Dead, Counter::DeadUnanswered).0;
    }
    // Without a head that the kernel can read nobody knows how long the request is.
    let readable = known == KNOWN || known == Counter::PuntUnknown as u32;
    let fits = readable
        && REPLIES.get(weighed.reply_id()).is_some_and(|reply| {
            reply.min_bytes != 0 && len >= u64::from(reply.min_bytes) && len <= REPLY_MAX_BYTES as u64
        });
    if fits {
        weighed.0
    } else if alone {
        Weighed::new(Action::Dead, Counter::DeadUnavailable).0
    } else {
        let reason = if flow.limited != 0 { Counter::PuntLimited } else { Counter::PuntReplyTooLong };
        hand_over(flow, reason as u32, now_ns)
    }
}

/// A head whose answer is known, and that the kernel can't give: for the daemon, which is no more to be flooded with these than with unknown ones.
/// Over that limit it answers 429 unread, and not without a limit either.
#[inline(always)]
pub(crate) fn for_the_daemon(flow: &mut Flow, reason: Counter, now_ns: u64) -> Weighed {
    Weighed(hand_over(flow, reason as u32, now_ns))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hand_over(flow: *mut Flow, reason: u32, now_ns: u64) -> u64 {
    if flow.is_null() {
        return Weighed::new(Action::Dead, Counter::DeadHelper).0;
    }
    // SAFETY: the callers' pointer is valid; the verifier checks each access against the type's size.
    let flow = unsafe { &mut *flow };
    let Some(config) = config() else { return Weighed::new(Action::Dead, Counter::DeadHelper).0 };
    let observed = flow.flags & FLOW_OBSERVE != 0;
    let mut reason = reason;
    if flow.limited == 0 {
        flow.limited = charge_request(flow, 0, CHARGE_UNKNOWN, now_ns);
        if observed {
            flow.limited = 0;
        } else if flow.limited != ADMITTED {
            reason = Counter::PuntLimited as u32;
        }
    }
    if flow.limited != 0 && charge_request(flow, 0, CHARGE_ANSWERED, now_ns) != ADMITTED {
        return Weighed::new(Action::Dead, Counter::DeadLimited).0;
    }
    if is_alive(config, now_ns) || observed {
        Action::Punt as u64 | u64::from(reason as u8) << 8
    } else {
        Weighed::new(Action::Dead, Counter::DeadUnavailable).0
    }
}

/// Whether a daemon has shown itself lately.
#[inline(always)]
fn is_alive(config: &Config, now_ns: u64) -> bool {
    // Signed: it may have done so since `now_ns` was read.
    let age_ns = now_ns.wrapping_sub(config.heartbeat_ns) as i64;
    config.abi_version != 0 && age_ns < config.heartbeat_limit_ns as i64
}

#[inline(always)]
fn by_verdict(flow: &mut Flow, verdict: &Verdict, now_ns: u64) -> Weighed {
    let Some(config) = config() else { return Weighed::new(Action::Dead, Counter::DeadHelper) };
    let observed = flow.flags & FLOW_OBSERVE != 0;
    let grant = if verdict.kind == VERDICT_ALLOW { GRANTS.get_ptr_mut(verdict.index) } else { None };
    // SAFETY: a valid map value; see `Grant` for why a grant is never half of another.
    let known = verdict::judge(verdict, grant.map(|grant| unsafe { &*grant }), config, now_ns);
    let what = match known {
        Known::Stale(reason) => return unknown(flow, reason as u32, now_ns),
        Known::Allow(_) if grant.is_some() => CHARGE_GRANT,
        Known::Allow(_) | Known::Deny(_) => CHARGE_REFUSED,
    };
    if let Some(limited) = limited(flow, verdict.index, what, now_ns) {
        return limited;
    }
    match known {
        Known::Allow(counter) => {
            if let Some(grant) = grant {
                // SAFETY: as above. The count may lose one when two CPUs use a grant at once; nothing is decided by it.
                unsafe { (*grant).requests = (*grant).requests.wrapping_add(1) };
                if flow.grants[0] != verdict.grant_serial {
                    use_grant(&raw mut *flow, verdict.grant_serial);
                }
            }
            flow.allowed += 1;
            Weighed::new(Action::Pass, counter)
        }
        Known::Deny(_) if observed => Weighed::new(Action::Pass, Counter::WouldRefuse),
        Known::Deny(reply_id) => Weighed::reply(Action::Reply, Counter::Refused, reply_id),
        Known::Stale(_) => Weighed::new(Action::Dead, Counter::DeadHelper),
    }
}

/// A head for the daemon, if it is alive; else 503 where that is possible.
#[inline(always)]
fn unknown(flow: &mut Flow, reason: u32, now_ns: u64) -> Weighed {
    let Some(config) = config() else { return Weighed::new(Action::Dead, Counter::DeadHelper) };
    if let Some(limited) = limited(flow, 0, CHARGE_UNKNOWN, now_ns) {
        return limited;
    }
    if is_alive(config, now_ns) || flow.flags & FLOW_OBSERVE != 0 {
        return Weighed(Action::Punt as u64 | u64::from(reason as u8) << 8);
    }
    Weighed::reply(Action::ReplyAlone, Counter::RefusedUnavailable, flow.unavailable_reply_id)
}

/// Charges a request; 429 if it is over a limit and must not pass.
#[inline(always)]
fn limited(flow: &mut Flow, slot: u32, what: u32, now_ns: u64) -> Option<Weighed> {
    let step = charge_request(flow, slot, what, now_ns);
    if step == ADMITTED {
        return None;
    }
    if flow.flags & FLOW_OBSERVE != 0 {
        count(Counter::WouldLimit);
        return None;
    }
    flow.limited = step;
    let Some(config) = config() else { return Some(Weighed::new(Action::Dead, Counter::DeadHelper)) };
    let at = (step.wrapping_sub(1) & (RETRY_STEPS as u32 - 1)) as usize;
    // SAFETY: the masked index is below the array's length. Volatile: the verifier must see the mask.
    let reply_id = unsafe { (&raw const config.limited_reply_ids).cast::<u32>().add(at).read_volatile() };
    Some(Weighed::reply(Action::Reply, Counter::Limited, reply_id))
}
