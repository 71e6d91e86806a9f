//! Who owns a connection's bytes: the kernel, or the daemon.
//!
//! One word holds the state, the punt epoch and how many bytes were punted in it. While the kernel owns the flow only its
//! judge changes the word, under the socket's lock; anybody may end the flow. While the daemon owns it ([`State::Punted`]) the
//! judge adds to the punted bytes and the inject program hands the flow back, both by compare-and-swap: the hand-back succeeds
//! only if the daemon has been given, and has injected, every byte that was punted. Nothing else makes the kernel pass bytes
//! again, so a byte can neither be lost nor overtake another. What a hand-back says about the new state lies apart until the
//! judge takes it over.

use crate::abi::{FLOW_GRANTS, grant_bit};

/// What happens to the next bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// A request head is expected.
    Head = 1,
    /// Body of an allowed request: bytes pass.
    Body = 2,
    /// Chunked body of an allowed request: bytes pass while the framing holds.
    Chunked = 3,
    /// The daemon owns the flow: bytes go to it.
    Punted = 4,
    /// Body of a refused request: bytes are dropped.
    Discard = 5,
    /// All bytes are dropped until the connection ends.
    Dead = 6,
    /// Observe mode only: all bytes pass, the flow can't be followed.
    Opaque = 7,
}

/// The control word of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ctl(pub u64);

const STATE_MASK: u64 = 0x7f;
/// The flow was handed back, and its judge has not looked since.
const HANDED: u64 = 0x80;
const EPOCH_SHIFT: u32 = 8;
const PUNTED_SHIFT: u32 = 24;
const EPOCH_MASK: u64 = 0xffff;
/// Punted bytes of one epoch that the word can hold (1 TiB); an epoch that gets there is dead.
pub const PUNTED_MAX_BYTES: u64 = (1 << (64 - PUNTED_SHIFT)) - 1;

impl Ctl {
    /// A word of its parts; `punted_bytes` at most [`PUNTED_MAX_BYTES`], of `epoch` the low 16 bits count.
    #[must_use]
    #[inline(always)]
    pub const fn new(state: State, epoch: u32, punted_bytes: u64) -> Self {
        Self(state as u64 | (epoch as u64 & EPOCH_MASK) << EPOCH_SHIFT | punted_bytes << PUNTED_SHIFT)
    }

    /// Number of the state; compare with `State::X as u64`.
    #[must_use]
    #[inline(always)]
    pub const fn state(self) -> u64 {
        self.0 & STATE_MASK
    }

    /// Whether the judge has yet to take over what a hand-back left: [`settle`].
    #[must_use]
    #[inline(always)]
    pub const fn is_handed(self) -> bool {
        self.0 & HANDED != 0
    }

    #[inline(always)]
    const fn handed(self) -> Self {
        Self(self.0 | HANDED)
    }

    /// Punt epoch.
    #[must_use]
    #[inline(always)]
    pub const fn epoch(self) -> u32 {
        (self.0 >> EPOCH_SHIFT & EPOCH_MASK) as u32
    }

    /// Bytes punted in this epoch.
    #[must_use]
    #[inline(always)]
    pub const fn punted_bytes(self) -> u64 {
        self.0 >> PUNTED_SHIFT
    }

    /// The same epoch in another state, nothing punted.
    #[must_use]
    #[inline(always)]
    pub const fn to(self, state: State) -> Self {
        Self::new(state, self.epoch(), 0)
    }

    /// The daemon's from here on: a new epoch.
    #[must_use]
    #[inline(always)]
    pub const fn punt(self, len_bytes: u64) -> Self {
        Self::new(State::Punted, self.epoch().wrapping_add(1), len_bytes)
    }

    /// More bytes for the daemon; `None`: more than the word holds.
    #[must_use]
    #[inline(always)]
    pub const fn punt_more(self, len_bytes: u64) -> Option<Self> {
        let punted = self.punted_bytes() + len_bytes;
        if punted > PUNTED_MAX_BYTES { None } else { Some(Self::new(State::Punted, self.epoch(), punted)) }
    }

    /// Name of the state, for people.
    #[must_use]
    pub const fn state_name(self) -> &'static str {
        match self.state() {
            1 => "head",
            2 => "body",
            3 => "chunked",
            4 => "punted",
            5 => "discard",
            6 => "dead",
            7 => "opaque",
            _ => "unknown",
        }
    }
}

/// A control word where it is kept: in a map's value, or in a test's memory.
pub trait CtlWord {
    /// The word as it is now.
    fn load(&self) -> Ctl;

    /// Changes the word if it still is `old`; whether it was. Atomic, with a full barrier.
    #[must_use]
    fn replace(&self, old: Ctl, new: Ctl) -> bool;
}

/// What became of the judge's wish to give more bytes to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Claim {
    /// They are the daemon's, under this control word.
    Done(Ctl),
    /// The flow is no longer the daemon's: the bytes must be judged like any others.
    HandedBack,
    /// More bytes than the control word counts.
    TooLong,
}

/// Adds bytes to a flow that was the daemon's when the judge looked. The judge's side of the race with [`hand_back`].
#[inline(always)]
pub fn claim(word: &impl CtlWord, len_bytes: u64) -> Claim {
    let now = word.load();
    if now.state() != State::Punted as u64 {
        return Claim::HandedBack;
    }
    let Some(next) = now.punt_more(len_bytes) else { return Claim::TooLong };
    if word.replace(now, next) { Claim::Done(next) } else { Claim::HandedBack }
}

/// Gives a flow back to the kernel if it still is as the daemon saw it: whether it did. `fields` leaves what belongs to the new state;
/// it runs before the word changes, and only while the flow is the daemon's, so nobody reads it meanwhile.
#[inline(always)]
pub fn hand_back(word: &impl CtlWord, expected: Ctl, new: Ctl, fields: impl FnOnce()) -> bool {
    if word.load() != expected || expected.state() != State::Punted as u64 {
        return false;
    }
    fields();
    word.replace(expected, new.handed())
}

/// Before the judge looks at a flow: `fields` takes over what a hand-back left, if there was one since. It runs behind the exchange of the
/// word, which is a barrier. Gives the word that [`next`] is to go by; none if it changed meanwhile, which nobody else may do then.
#[must_use]
#[inline(always)]
pub fn settle(word: &impl CtlWord, fields: impl FnOnce()) -> Option<Ctl> {
    let now = word.load();
    if !now.is_handed() {
        return Some(now);
    }
    let settled = Ctl(now.0 & !HANDED);
    if !word.replace(now, settled) {
        return None;
    }
    fields();
    Some(settled)
}

/// Ends a flow, whoever looks at it beside its judge: whether it did. (If not, it is dead already, or goes on at this moment: the next
/// look will tell.)
#[must_use]
#[inline(always)]
pub fn end(word: &impl CtlWord) -> bool {
    let now = word.load();
    now.state() != State::Dead as u64 && word.replace(now, now.to(State::Dead))
}

/// The judge's way from one state to the next, `next` of the word as it is; none if the flow was ended meanwhile.
#[must_use]
#[inline(always)]
pub fn go_on(word: &impl CtlWord, next: impl FnOnce(Ctl) -> Ctl) -> Option<Ctl> {
    let now = word.load();
    let next = next(now);
    if now.state() != State::Dead as u64 && word.replace(now, next) { Some(next) } else { None }
}

/// Whether the daemon may put bytes into a flow, `meant` being the word that it believes in: it owns the flow, in that epoch.
#[must_use]
#[inline(always)]
pub fn may_inject(word: &impl CtlWord, meant: Ctl) -> bool {
    let now = word.load();
    now.state() == State::Punted as u64 && now.epoch() == meant.epoch()
}

/// What the judge does with bytes, as far as the flow's state tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// They must begin a request.
    Head,
    /// They pass; the flow is in this state then, with so many bytes of the message left.
    Pass(State, u64),
    /// They pass if the chunk decoder agrees.
    Chunked,
    /// They are the daemon's, if it still owns the flow: [`claim`].
    Claim,
    /// They are dropped; state and bytes left as above.
    Drop(State, u64),
    /// So many of them end a refused request's body, the others begin the next request.
    BehindDiscard(u64),
    /// They go past the end of a request that was passed.
    Pipelined,
}

/// What the judge does with `len` bytes, by the word that it has [`settle`]d; `left` of the message are to go. A state that is none, and [`State::Opaque`] outside of observe mode, let nothing through.
#[inline(always)]
pub fn next(now: Ctl, observed: impl Fn() -> bool, left: u64, len: u64) -> Next {
    const HEAD: u64 = State::Head as u64;
    const BODY: u64 = State::Body as u64;
    const CHUNKED: u64 = State::Chunked as u64;
    const PUNTED: u64 = State::Punted as u64;
    const DISCARD: u64 = State::Discard as u64;
    const OPAQUE: u64 = State::Opaque as u64;
    match now.state() {
        HEAD => Next::Head,
        BODY => match advance(left, len) {
            Advance::Within(left) => Next::Pass(State::Body, left),
            Advance::End => Next::Pass(State::Head, 0),
            Advance::Past => Next::Pipelined,
        },
        CHUNKED => Next::Chunked,
        PUNTED => Next::Claim,
        DISCARD => match advance(left, len) {
            Advance::Within(left) => Next::Drop(State::Discard, left),
            Advance::End => Next::Drop(State::Head, 0),
            Advance::Past => Next::BehindDiscard(left),
        },
        OPAQUE if observed() => Next::Pass(State::Opaque, 0),
        _ => Next::Drop(State::Dead, 0),
    }
}

/// Where `len` bytes lead that follow in a message with `left` bytes to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Advance {
    /// Into the body, with so many bytes left.
    Within(u64),
    /// Exactly to the end: a head is next.
    End,
    /// Past the end: more than one request in flight (pipelining).
    Past,
}

/// Takes `len` bytes off a message with `left` bytes to go.
#[inline(always)]
pub const fn advance(left: u64, len: u64) -> Advance {
    if len < left {
        Advance::Within(left - len)
    } else if len == left {
        Advance::End
    } else {
        Advance::Past
    }
}

/// Whether the server has answered everything that was passed to it, as far as its send sequence tells: it has written since
/// the last head (`mark`), and the client has acknowledged all that it wrote. Only then may an answer of ours be sent.
///
/// The first request of a connection (`first`) has no answer to wait for.
#[must_use]
#[inline(always)]
pub const fn answered(first: bool, mark: u32, write_seq: u32, acknowledged_seq: u32) -> bool {
    first || (write_seq != mark && acknowledged_seq == write_seq)
}

/// Notes that a request used a grant: the grants that a flow used last, the last one first, and the bits of those that had to
/// make room. So it can be told which streams may belong to a token, also on a connection that carries several: never a token too
/// few, and none too many as long as a connection has [`FLOW_GRANTS`].
#[inline(always)]
pub const fn use_grant(grants: &mut [u64; FLOW_GRANTS], evicted: &mut u64, serial: u64) {
    let [first, second, third, fourth] = *grants;
    if serial == first {
        return;
    }
    *grants = if serial == second {
        [serial, first, third, fourth]
    } else if serial == third {
        [serial, first, second, fourth]
    } else {
        if serial != fourth && fourth != 0 {
            *evicted |= grant_bit(fourth);
        }
        [serial, first, second, third]
    };
}

#[cfg(test)]
mod races;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every grant that was used is remembered, one by one or by its bit; the last is first, and none is there twice.
        #[test]
        fn no_grant_that_was_used_is_forgotten(numbers in prop::collection::vec(1_u64..12, 1..60)) {
            let (mut grants, mut evicted) = ([0; FLOW_GRANTS], 0);
            let mut used = std::collections::BTreeSet::new();
            for number in numbers {
                let serial = crate::abi::grant_serial(number, number as u32 * 7);
                use_grant(&mut grants, &mut evicted, serial);
                used.insert(serial);
                prop_assert_eq!(grants[0], serial);
                prop_assert!(used.iter().all(|serial| grants.contains(serial) || evicted & grant_bit(*serial) != 0));
                let kept: std::collections::BTreeSet<_> = grants.iter().filter(|serial| **serial != 0).collect();
                prop_assert_eq!(kept.len(), used.len().min(FLOW_GRANTS));
                if used.len() <= FLOW_GRANTS {
                    prop_assert_eq!(evicted, 0);
                }
            }
        }

        #[test]
        fn ctl_round_trips(epoch in 0_u32..=0xffff, punted in 0..=PUNTED_MAX_BYTES) {
            let ctl = Ctl::new(State::Punted, epoch, punted);
            prop_assert_eq!(ctl.state(), State::Punted as u64);
            prop_assert_eq!(ctl.epoch(), epoch);
            prop_assert_eq!(ctl.punted_bytes(), punted);
        }

        /// The state machine against a reference: a stream of messages, cut at random, ends each message where it was made
        /// to end, and flags a segment that holds the end of one and the start of the next.
        #[test]
        fn advance_follows_a_reference_stream(
            messages in prop::collection::vec(1_u64..5_000, 1..20),
            cuts in prop::collection::vec(1_u64..3_000, 1..400),
        ) {
            let ends: Vec<u64> = messages.iter().scan(0, |sum, len| { *sum += len; Some(*sum) }).collect();
            let (mut at, mut message, mut left) = (0, 0, messages[0]);
            for cut in cuts {
                let crosses = at + cut > ends[message];
                match advance(left, cut) {
                    Advance::Past => { prop_assert!(crosses); break; }
                    Advance::End => {
                        at += cut;
                        prop_assert_eq!(at, ends[message]);
                        message += 1;
                        if message == messages.len() { break; }
                        left = messages[message];
                    }
                    Advance::Within(rest) => {
                        at += cut;
                        prop_assert!(!crosses);
                        prop_assert_eq!(at + rest, ends[message]);
                        left = rest;
                    }
                }
            }
        }
    }

    #[test]
    fn an_epoch_that_overflows_is_refused() {
        let ctl = Ctl::new(State::Punted, 1, PUNTED_MAX_BYTES);
        assert_eq!(ctl.punt_more(1), None);
        assert_eq!(ctl.punt_more(0), Some(ctl));
        assert_eq!(Ctl::new(State::Head, 0xffff, 0).punt(7).epoch(), 0);
    }

    #[test]
    fn an_answer_may_be_sent_only_when_nothing_is_outstanding() {
        assert!(answered(true, 5, 5, 5));
        assert!(!answered(false, 5, 5, 5));
        assert!(!answered(false, 5, 9, 8));
        assert!(answered(false, 5, 9, 9));
    }
}
