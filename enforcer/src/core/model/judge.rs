//! The judge, as in `enforcer-ebpf`'s `programs/judge.rs`, by the functions that it decides with.

use std::cell::Cell;

use enforcer_common::abi::{
    FLOW_PIPELINED, Flow, PUNT_CHUNK_BYTES, PUNT_DATA, PUNT_DEAD, PUNT_UNANSWERED, PuntHeader,
    REPLY_MAX_BYTES, VERDICT_ALLOW, punt_limited,
};
use enforcer_common::chunked::Chunked;
use enforcer_common::flow::{self, Advance, Claim, Ctl, Next, State, advance, answered};
use enforcer_common::head::{self, HeadInfo};
use enforcer_common::verdict::{self, Known};

use super::kernel::{Answer, COOKIE, Fault, Kernel, Queued, Word};
use super::script::LIMITED;

impl Kernel {
    pub(super) fn judge(&mut self, request: usize, bytes: &[u8]) {
        let len = bytes.len() as u64;
        for _ in 0..2 {
            let Some(flow) = &mut self.flow else { return };
            let punted = Ctl(flow.ctl);
            let Flow { ctl, handed, remaining_bytes, chunked, write_seq_mark, flags, .. } = flow;
            let word = Word(Cell::from_mut(ctl));
            let now = flow::settle(&word, || {
                *remaining_bytes = handed.remaining_bytes;
                *chunked = handed.chunked;
                *write_seq_mark = handed.write_seq_mark;
                *flags |= handed.flags;
            });
            let now = now.expect("nobody else changes the word");
            match flow::next(now, || false, *remaining_bytes, len) {
                Next::Head => return self.on_head(request, bytes),
                Next::Pass(state, left) => return self.pass(bytes, state, left),
                Next::Chunked => return self.on_chunked(bytes),
                Next::Claim => match flow::claim(&word, len) {
                    Claim::Done(ctl) => return self.hand_over(bytes, ctl, 0),
                    Claim::TooLong => return self.dead(),
                    Claim::HandedBack => assert_ne!(punted.0, self.ctl().0),
                },
                Next::Drop(..) if self.options.fault == Fault::DiscardPasses => {
                    return self.pass(bytes, State::Head, 0);
                }
                Next::Drop(state, left) => return self.to(state, left),
                Next::BehindDiscard(left) => return self.punt(bytes, left),
                Next::Pipelined => return self.pipelined(bytes),
            }
        }
        self.dead();
    }

    fn to(&mut self, state: State, left: u64) {
        let Some(flow) = &mut self.flow else { return };
        flow.remaining_bytes = left;
        flow.ctl = Ctl(flow.ctl).to(state).0;
    }

    fn pass(&mut self, bytes: &[u8], state: State, left: u64) {
        self.to(state, left);
        if self.queue.is_empty() || self.options.fault == Fault::PassOvertakes {
            self.server.extend_from_slice(bytes);
        } else {
            self.queue.push_back(Queued::Server(bytes.to_vec()));
        }
    }

    fn pipelined(&mut self, bytes: &[u8]) {
        if self.options.fault == Fault::PipeliningPasses {
            return self.pass(bytes, State::Head, 0);
        }
        self.dead();
    }

    fn on_chunked(&mut self, bytes: &[u8]) {
        let Some(flow) = &mut self.flow else { return };
        let mut decoder = Chunked::from_bits(flow.chunked);
        let done = decoder.run(bytes);
        flow.chunked = decoder.to_bits();
        match done {
            None => self.dead(),
            Some((_, false)) => self.pass(bytes, State::Chunked, 0),
            Some((taken, true)) if taken == bytes.len() as u64 => self.pass(bytes, State::Head, 0),
            Some((_, true)) => self.pipelined(bytes),
        }
    }

    fn unanswered(&self) -> bool {
        let Some(flow) = &self.flow else { return false };
        let pipelined = flow.flags & FLOW_PIPELINED != 0 && self.options.fault != Fault::PipeliningForgotten;
        self.options.fault != Fault::AnswersNotAwaited
            && (pipelined
                || !answered(flow.requests == 0, flow.write_seq_mark, self.write_seq, self.acknowledged_seq))
    }

    fn on_head(&mut self, request: usize, bytes: &[u8]) {
        let unanswered = self.unanswered();
        let limited = bytes.starts_with(LIMITED);
        let write_seq = self.write_seq;
        if let Some(flow) = &mut self.flow {
            if unanswered {
                flow.flags |= FLOW_PIPELINED;
            }
            flow.write_seq_mark = write_seq;
            flow.requests += 1;
            flow.limited = u32::from(limited);
        }
        if limited {
            return self.punt_flagged(bytes, 0, unanswered);
        }
        let Ok((info, digest)) =
            head::analyze_bytes(bytes, &self.setting.key, &enforcer_common::abi::Origin::NONE)
        else {
            return self.unknown(request, bytes, unanswered, None);
        };
        let Some(verdict) = self.verdicts.get(&digest) else {
            return self.unknown(request, bytes, unanswered, Some(info));
        };
        let grant = if verdict.kind == VERDICT_ALLOW { self.grants.get(&verdict.index) } else { None };
        match verdict::judge(verdict, grant, &self.config, self.now_ns) {
            Known::Allow(_) => {
                match advance(u64::from(info.head_bytes) + info.content_length, bytes.len() as u64) {
                    Advance::Within(left) => self.pass(bytes, State::Body, left),
                    Advance::End => self.pass(bytes, State::Head, 0),
                    Advance::Past => self.pipelined(bytes),
                }
            }
            Known::Deny(reply_id) => self.refuse(request, bytes, info, unanswered, reply_id),
            Known::Stale(_) => self.unknown(request, bytes, unanswered, Some(info)),
        }
    }

    fn unknown(&mut self, request: usize, bytes: &[u8], unanswered: bool, info: Option<HeadInfo>) {
        match info {
            _ if self.alive => self.punt_flagged(bytes, 0, unanswered),
            Some(info) => self.refuse(request, bytes, info, unanswered, self.unavailable_reply_id),
            None => self.dead(),
        }
    }

    fn refuse(&mut self, request: usize, bytes: &[u8], info: HeadInfo, unanswered: bool, reply_id: u32) {
        let unavailable = reply_id == self.unavailable_reply_id;
        if unanswered {
            return self.dead();
        }
        let len = bytes.len() as u64;
        let left = match advance(u64::from(info.head_bytes) + info.content_length, len) {
            Advance::Within(left) => left,
            Advance::End => 0,
            Advance::Past => return self.dead(),
        };
        let fits = self.replies.get(&reply_id).is_some_and(|reply| {
            reply.min_bytes != 0 && len >= u64::from(reply.min_bytes) && len <= REPLY_MAX_BYTES as u64
        });
        if !fits {
            return if unavailable { self.dead() } else { self.punt_flagged(bytes, 0, unanswered) };
        }
        if !unavailable && self.options.server_blocks {
            return self.punt_flagged(bytes, 0, unanswered);
        }
        if unavailable {
            self.unavailable.insert(request);
        }
        self.to(if left == 0 { State::Head } else { State::Discard }, left);
        self.queue.push_back(Queued::Client(if unavailable { Answer::Unavailable } else { Answer::Refusal }));
    }

    fn punt(&mut self, bytes: &[u8], skip_bytes: u64) {
        let unanswered = self.unanswered();
        self.punt_flagged(bytes, skip_bytes, unanswered);
    }

    fn punt_flagged(&mut self, bytes: &[u8], skip_bytes: u64, unanswered: bool) {
        let Some(flow) = &mut self.flow else { return };
        flow.punts += 1;
        let next = Ctl(flow.ctl).punt(bytes.len() as u64);
        flow.ctl = next.0;
        self.records(bytes, next, skip_bytes, unanswered);
    }

    fn hand_over(&mut self, bytes: &[u8], ctl: Ctl, skip_bytes: u64) {
        let unanswered = self.unanswered();
        self.records(bytes, ctl, skip_bytes, unanswered);
    }

    fn records(&mut self, bytes: &[u8], ctl: Ctl, skip_bytes: u64, unanswered: bool) {
        let mut offset_bytes = ctl.punted_bytes() - bytes.len() as u64;
        let limited = self.flow.as_ref().map_or(0, |flow| flow.limited);
        for part in bytes.chunks(PUNT_CHUNK_BYTES) {
            if self.ring_full() {
                return self.dead();
            }
            // SAFETY: `repr(C)`, integers only.
            let header: PuntHeader = unsafe { std::mem::zeroed() };
            let header = PuntHeader {
                cookie: COOKIE,
                offset_bytes,
                skip_bytes,
                kind: PUNT_DATA,
                epoch: ctl.epoch(),
                len_bytes: part.len() as u32,
                flags: if unanswered { PUNT_UNANSWERED } else { 0 } | punt_limited(limited),
                write_seq: self.write_seq,
                ..header
            };
            self.ring.push_back((header, part.to_vec()));
            offset_bytes += part.len() as u64;
        }
    }

    fn dead(&mut self) {
        let Some(flow) = &mut self.flow else { return };
        flow.ctl = Ctl(flow.ctl).to(State::Dead).0;
        self.event(PUNT_DEAD);
    }
}
