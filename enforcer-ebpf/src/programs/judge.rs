//! `sk_skb/stream_verdict` on the guarded sockets: passes, answers or hands over each request.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::macros::stream_verdict;
use aya_ebpf::programs::SkBuffContext;
use enforcer_common::abi::{
    Counter, FLOW_OBSERVE, FLOW_PIPELINED, FLOW_PUNTED_ONCE, Flow, MODE_ENFORCE, MODE_OBSERVE, PUNT_DEAD,
    PUNT_UNANSWERED, REPLY_DIGITS, REPLY_MAX_BYTES, Verdict, punt_limited, reply_digits,
};
use enforcer_common::flow::{
    Advance, Claim, Ctl, CtlWord as _, Next, State, advance, answered, claim, go_on, next, settle,
};
use enforcer_common::head::{HeadInfo, Miss, zero_words};

use super::chunked::{self, Followed};
use super::hold;
use super::punt::{self, Event, Handed, Payload};
use super::recognise::{self, Head};
use super::use_grant;
use super::weigh::{self, Action, KNOWN};
use crate::kernel::{CtlCell, Skb, config, count, now_ns, observed};
use crate::maps::{FLOWS, REPLIES, SOCKETS};
use crate::tcp;

const _: () = assert!(MODE_OBSERVE >> 1 == FLOW_OBSERVE && MODE_ENFORCE >> 1 == 0);

/// What happens to an skb.
#[must_use]
enum Outcome {
    /// It goes to the server; the flow is in this state next, with so many bytes of the message left.
    Pass(Counter, State, u64),
    /// It is dropped; state and bytes left as above.
    Drop(Counter, State, u64),
    /// It becomes the answer with this number; so many bytes of the request's body will follow.
    Reply(Counter, u32, u64),
    /// The flow is the daemon's from here on; so many bytes still belong to a refused request's body.
    Punt(Counter, u64),
    /// The flow is the daemon's already; taken care of before anything else.
    PuntMore,
    /// Nothing passes any more; bytes left as above. (The number has to be there: left undefined it may be spilled, which the verifier
    /// refuses.)
    Dead(Counter, u64),
}

impl Outcome {
    #[inline(always)]
    const fn dead(reason: Counter) -> Self {
        Self::Dead(reason, 0)
    }
}

/// One skb of a guarded connection.
struct Input<'a> {
    skb: Skb<'a>,
    cookie: u64,
    len: u64,
    /// Behind a head: the answer to the request before is not there yet. For a head, the flow is marked.
    unanswered: bool,
    /// The server's send sequence.
    write_seq: u32,
}

#[stream_verdict]
fn judge(ctx: SkBuffContext) -> u32 {
    let skb = Skb { ctx: &ctx };
    if skb.len() == 0 {
        // A bare FIN. The server must learn that its client is gone, whatever the flow's state.
        count(Counter::EndPassed);
        return SK_PASS;
    }
    let cookie = skb.cookie();
    let Some(flow) = FLOWS.get_ptr_mut(cookie) else {
        count(Counter::NoFlow);
        return SK_DROP;
    };
    // SAFETY: a valid map value. Only this program changes it while the flow is the kernel's, under the socket's lock.
    let flow = unsafe { &mut *flow };
    let aligned = hold::align(skb, flow);
    let mut input = Input { skb, cookie, len: u64::from(skb.len()), unanswered: false, write_seq: 0 };
    flow.next_byte_seq = flow.next_byte_seq.wrapping_add(input.len as u32);
    if let Err(reason) = aligned {
        return dead(&input, flow, reason);
    }
    if input.len == 0 {
        // Nothing was new but a FIN.
        count(Counter::EndPassed);
        return SK_PASS;
    }
    let mut attempt = 0;
    let outcome = loop {
        let outcome = decide(&mut input, flow);
        if !matches!(outcome, Outcome::PuntMore) {
            break outcome;
        }
        match claim(&CtlCell::new(&raw mut flow.ctl), input.len) {
            Claim::Done(ctl) => {
                count(Counter::PuntContinued);
                return hand_over(&input, flow, ctl, Counter::PuntContinued, 0);
            }
            Claim::TooLong => break Outcome::dead(Counter::DeadTooLong),
            // The daemon handed the flow back at this very moment. The bytes follow all that it has injected, so they are judged
            // like any others; the flow can't become the daemon's again but by this program.
            Claim::HandedBack => {}
        }
        attempt += 1;
        if attempt == 2 {
            break Outcome::dead(Counter::DeadHelper);
        }
    };
    act(&input, flow, outcome)
}

#[inline(always)]
fn decide(input: &mut Input<'_>, flow: &mut Flow) -> Outcome {
    let word = CtlCell::new(&raw mut flow.ctl);
    let Some(now) = settle(&word, || take_over(flow)) else { return Outcome::dead(Counter::DeadHelper) };
    match next(now, || observed(flow), flow.remaining_bytes, input.len) {
        Next::Head => on_head(input, flow),
        Next::Pass(State::Opaque, left) => Outcome::Pass(Counter::OpaquePassed, State::Opaque, left),
        Next::Pass(state, left) => Outcome::Pass(Counter::BodyPassed, state, left),
        Next::Chunked => on_chunked(input, flow),
        Next::Claim => match look_for_answer(input, flow) {
            Ok(()) => Outcome::PuntMore,
            Err(counter) => Outcome::dead(counter),
        },
        Next::Drop(State::Dead, left) => Outcome::Drop(Counter::DeadDropped, State::Dead, left),
        Next::Drop(state, left) => Outcome::Drop(Counter::BodyDiscarded, state, left),
        // The refusal was sent before, so the client may rightly be in its next request: no pipelining.
        Next::BehindDiscard(left) => match look_for_answer(input, flow) {
            Ok(()) => Outcome::Punt(Counter::PuntBehindDiscard, left),
            Err(counter) => Outcome::dead(counter),
        },
        Next::Pipelined => Outcome::dead(Counter::DeadPipelined),
    }
}

/// What the daemon left with its hand-back.
#[inline(always)]
fn take_over(flow: &mut Flow) {
    // SAFETY: a field of a valid map value. Volatile: inject wrote it since this judge last looked, perhaps.
    let handed = unsafe { (&raw const flow.handed).read_volatile() };
    flow.remaining_bytes = handed.remaining_bytes;
    flow.chunked = handed.chunked;
    flow.write_seq_mark = handed.write_seq_mark;
    flow.flags |= handed.flags;
    if handed.grant_serial != 0 {
        use_grant(flow, handed.grant_serial);
    }
}

#[inline(always)]
fn on_head(input: &mut Input<'_>, flow: &mut Flow) -> Outcome {
    let now_ns = now_ns();
    if let Err(counter) = look_for_answer(input, flow) {
        return Outcome::dead(counter);
    }
    // In the record, not in a local, which the verifier would follow with each of its values through all that comes.
    flow.flags |= u32::from(input.unanswered) * FLOW_PIPELINED;
    input.unanswered = false;
    flow.write_seq_mark = input.write_seq;
    flow.requests += 1;
    flow.last_request_ns = now_ns;
    let Some(config) = config() else { return Outcome::dead(Counter::DeadHelper) };
    // Between two requests a flow takes on the mode of the policy in force. Without a branch, which the verifier would follow through
    // all that comes after it.
    flow.flags = flow.flags & !FLOW_OBSERVE | config.mode >> 1 & FLOW_OBSERVE;
    flow.limited = 0;
    let mut verdict = MaybeUninit::<Verdict>::uninit();
    // SAFETY: seven words, integers only.
    let verdict = unsafe {
        zero_words::<7>(verdict.as_mut_ptr().cast());
        verdict.assume_init_mut()
    };
    let (info, known) = match recognise::head(input.skb, flow, verdict) {
        Head::Read(info, true) => (info, KNOWN),
        Head::Read(info, false) => (info, Counter::PuntUnknown as u32),
        Head::Miss(Miss::Incomplete) => (HeadInfo::NONE, Counter::PuntIncomplete as u32),
        Head::Miss(Miss::Irregular) => (HeadInfo::NONE, Counter::PuntIrregular as u32),
        Head::NoScratch => return Outcome::dead(Counter::DeadScratch),
        Head::Failed => return Outcome::dead(Counter::DeadHelper),
    };
    let mut weighed = weigh::request(flow, verdict, known, now_ns, input.len);
    if matches!(weighed.action(), Action::Reply) && input.skb.tcp().is_none_or(tcp::server_blocks) {
        weighed = weigh::for_the_daemon(flow, Counter::PuntBlockingServer, now_ns);
    }
    let counter = weighed.counter();
    match weighed.action() {
        Action::Pass => pass_request(input, info, counter),
        Action::Reply | Action::ReplyAlone => {
            flow.refused += 1;
            refuse(input, info, weighed.reply_id(), counter)
        }
        Action::Punt => Outcome::Punt(counter, 0),
        Action::Dead => Outcome::dead(counter),
    }
}

/// Looks whether the server has answered what came before these bytes. The mark moves where a request starts: in [`on_head`], or
/// with a hand-back, because while the daemon owns the flow it alone knows where that is.
#[inline(always)]
fn look_for_answer(input: &mut Input<'_>, flow: &Flow) -> Result<(), Counter> {
    let Some(tcp) = input.skb.tcp() else { return Err(Counter::DeadHelper) };
    let (write_seq, acknowledged_seq) = tcp::sequences(tcp);
    input.unanswered = !answered(flow.requests == 0, flow.write_seq_mark, write_seq, acknowledged_seq);
    input.write_seq = write_seq;
    Ok(())
}

#[inline(always)]
fn pass_request(input: &Input<'_>, info: HeadInfo, counter: Counter) -> Outcome {
    match advance(u64::from(info.head_bytes) + info.content_length, input.len) {
        Advance::Within(left) => Outcome::Pass(counter, State::Body, left),
        Advance::End => Outcome::Pass(counter, State::Head, 0),
        Advance::Past => Outcome::dead(Counter::DeadPipelined),
    }
}

#[inline(always)]
fn refuse(input: &Input<'_>, info: HeadInfo, reply_id: u32, counter: Counter) -> Outcome {
    match advance(u64::from(info.head_bytes) + info.content_length, input.len) {
        Advance::Within(left) => Outcome::Reply(counter, reply_id, left),
        Advance::End => Outcome::Reply(counter, reply_id, 0),
        Advance::Past => Outcome::dead(Counter::DeadPipelined),
    }
}

#[inline(always)]
fn on_chunked(input: &Input<'_>, flow: &mut Flow) -> Outcome {
    match chunked::follow(input.skb, input.len, &mut flow.chunked) {
        Followed::Within => Outcome::Pass(Counter::BodyPassed, State::Chunked, 0),
        Followed::End => Outcome::Pass(Counter::BodyPassed, State::Head, 0),
        Followed::Past => Outcome::dead(Counter::DeadPipelined),
        Followed::Broken => Outcome::dead(Counter::DeadChunked),
        Followed::Failed => Outcome::dead(Counter::DeadHelper),
    }
}

/// Carries out what was decided. In enforce mode bytes reach the server by `Outcome::Pass` alone.
#[inline(always)]
fn act(input: &Input<'_>, flow: &mut Flow, outcome: Outcome) -> u32 {
    let ctl = CtlCell::new(&raw mut flow.ctl);
    match outcome {
        Outcome::Pass(counter, state, left) => {
            flow.remaining_bytes = left;
            if go_on(&ctl, |now| now.to(state)).is_none() {
                return dead(input, flow, Counter::DeadDropped);
            }
            count(counter);
            SK_PASS
        }
        Outcome::Drop(counter, state, left) => {
            flow.remaining_bytes = left;
            // If it was ended meanwhile it is as dead as that.
            let _ = go_on(&ctl, |now| now.to(state));
            count(counter);
            input.skb.swallow(flow)
        }
        Outcome::Reply(counter, reply_id, left) => reply(input, flow, counter, reply_id, left),
        Outcome::Punt(reason, skip_bytes) => {
            flow.punts += 1;
            flow.flags |= FLOW_PUNTED_ONCE;
            let Some(next) = go_on(&ctl, |now| now.punt(input.len)) else {
                return dead(input, flow, Counter::DeadDropped);
            };
            count(reason);
            hand_over(input, flow, next, reason, skip_bytes)
        }
        Outcome::PuntMore => dead(input, flow, Counter::DeadHelper),
        Outcome::Dead(reason, left) => {
            flow.remaining_bytes = left;
            dead(input, flow, reason)
        }
    }
}

#[inline(always)]
fn hand_over(input: &Input<'_>, flow: &mut Flow, ctl: Ctl, reason: Counter, skip_bytes: u64) -> u32 {
    flow.punted_bytes += input.len;
    let unanswered = input.unanswered || flow.flags & FLOW_PIPELINED != 0;
    let flags = if unanswered { PUNT_UNANSWERED } else { 0 } | punt_limited(flow.limited);
    let what = Handed { reason, flags, write_seq: input.write_seq, skip_bytes };
    match punt::bytes(input.skb, flow, input.cookie, ctl, &what) {
        // Observe mode: the daemon has a copy, the server gets the bytes.
        Ok(()) if observed(flow) => SK_PASS,
        Ok(()) => input.skb.swallow(flow),
        Err(counter) => dead(input, flow, counter),
    }
}

/// The request's own bytes become the answer: same length, so that the kernel's sequence numbers stay right.
#[inline(always)]
fn reply(input: &Input<'_>, flow: &mut Flow, counter: Counter, reply_id: u32, left: u64) -> u32 {
    const MAX: u32 = REPLY_MAX_BYTES as u32;
    let Some(reply) = REPLIES.get(reply_id) else { return dead(input, flow, Counter::DeadHelper) };
    let len = input.len as u32;
    let digits = reply_digits(len.wrapping_sub(reply.head_bytes));
    // SAFETY: the template has `REPLY_MAX_BYTES` bytes, the digits have `REPLY_DIGITS`.
    let stored = unsafe {
        input.skb.store::<MAX>(0, reply.bytes.as_ptr(), len).is_ok()
            && input
                .skb
                .store::<{ REPLY_DIGITS as u32 }>(
                    reply.content_length_at,
                    digits.as_ptr(),
                    REPLY_DIGITS as u32,
                )
                .is_ok()
    };
    if !stored {
        return dead(input, flow, Counter::DeadHelper);
    }
    let ctl = CtlCell::new(&raw mut flow.ctl);
    flow.remaining_bytes = left;
    let state = if left == 0 { State::Head } else { State::Discard };
    if go_on(&ctl, |now| now.to(state)).is_none() {
        return dead(input, flow, Counter::DeadDropped);
    }
    let verdict = SOCKETS.redirect_skb(input.skb.ctx, input.cookie, 0) as u32;
    if verdict == SK_DROP {
        return dead(input, flow, Counter::DeadReplyFailed);
    }
    count(counter);
    if matches!(counter, Counter::Refused) {
        flow.refusals = flow.refusals.wrapping_add(1);
    }
    verdict
}

/// Nothing passes on this flow any more, and the daemon is asked to destroy its socket. Observe mode refuses nothing, so
/// there the flow becomes opaque instead.
#[inline(never)]
fn dead(input: &Input<'_>, flow: &mut Flow, reason: Counter) -> u32 {
    let ctl = CtlCell::new(&raw mut flow.ctl);
    count(reason);
    if observed(flow) {
        ctl.store(ctl.load().to(State::Opaque));
        return SK_PASS;
    }
    ctl.store(ctl.load().to(State::Dead));
    punt::event(Event {
        kind: PUNT_DEAD,
        cookie: input.cookie,
        netns_cookie: flow.netns_cookie,
        endpoint_id: flow.endpoint_id,
        reason,
        interface: flow.interface,
        payload: Payload::Nothing,
    });
    input.skb.swallow(flow)
}
