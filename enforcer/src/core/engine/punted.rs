//! One connection that the daemon has in its hands.

use enforcer_common::abi::{Origin, PUNT_UNANSWERED, PuntHeader};
use enforcer_common::chunked::Chunked;
use enforcer_common::flow::{Ctl, State};
use enforcer_common::limit::retry_step;

use crate::core::{CallerFacts, Datapath, HandBack, Now};
use crate::http::head::Framing;

use super::EngineError;

/// How much of a request's body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    Length(u64),
    Chunked(Chunked),
}

impl Body {
    pub(super) fn of(framing: Framing) -> Self {
        match framing {
            Framing::None => Self::Length(0),
            Framing::ContentLength(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunked::new()),
        }
    }

    /// Takes bytes off: how many belong to it, and whether it ends with them.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<(usize, bool), EngineError> {
        match self {
            Self::Length(left) => {
                let taken = (bytes.len() as u64).min(*left);
                *left -= taken;
                Ok((taken as usize, *left == 0))
            }
            Self::Chunked(decoder) => {
                let (taken, end) = decoder.run(bytes).ok_or(EngineError::ChunkedBroken)?;
                Ok((taken as usize, end))
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// A head is expected, or half there.
    Head,
    /// The head is there, its token's key is being fetched.
    Waiting,
    /// The body goes to the server.
    Pass { server_id: u32, body: Body, grant_serial: u64 },
    /// The body is dropped.
    Discard { body: Body },
    /// The request is over; what follows is the next one's head.
    Done { grant_serial: u64 },
    /// Nothing more goes anywhere.
    Closing,
}

/// A flow that was handed over at least once.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub(super) struct Punted {
    pub(super) epoch: u32,
    pub(super) endpoint_id: u32,
    pub(super) netns_cookie: u64,
    /// Where it comes from.
    pub(super) origin: Origin,
    /// The request whose head is awaited is over a limit: step of `RETRY_AFTER_SECS`.
    pub(super) limited: Option<u32>,
    /// It was charged to where it comes from, or needs not be.
    pub(super) charged: bool,
    /// Bytes given to us in this epoch.
    pub(super) received_bytes: u64,
    /// Bytes that wait for a decision: the head, and what came with it.
    pub(super) parked: Vec<u8>,
    /// How many of them were looked through for the end of the head.
    pub(super) scanned: usize,
    pub(super) stage: Stage,
    pub(super) unanswered: bool,
    /// A request came before the one before it was answered; from then on none is known to be.
    pub(super) pipelined: bool,
    /// The bytes to discard belong to a request that was answered before this epoch began: the kernel has looked.
    pub(super) skipping: bool,
    pub(super) observed: bool,
    /// When the head began.
    pub(super) since_ns: u64,
    /// Answers given in a row.
    pub(super) answers: u32,
    /// The server's send sequence when the current request began.
    pub(super) write_seq_mark: u32,
    /// The server's send sequence when the last bytes came.
    pub(super) last_write_seq: u32,
}

/// Memory of one such flow: the record, its time limit, its key.
pub(in crate::core) const FLOW_BYTES: u64 = (size_of::<Punted>() + 64) as u64;

impl Stage {
    pub(super) fn discard(framing: Framing) -> Self {
        match Body::of(framing) {
            Body::Length(0) => Self::Done { grant_serial: 0 },
            body => Self::Discard { body },
        }
    }
}

impl Punted {
    pub(super) fn send<D: Datapath>(
        &self,
        cookie: u64,
        server_id: u32,
        bytes: &[u8],
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        if self.observed || bytes.is_empty() {
            return Ok(());
        }
        let ctl = Ctl::new(State::Punted, self.epoch, self.received_bytes);
        let grant_serial = match self.stage {
            Stage::Pass { grant_serial, .. } | Stage::Done { grant_serial } => grant_serial,
            Stage::Head | Stage::Waiting | Stage::Discard { .. } | Stage::Closing => 0,
        };
        datapath.to_server(server_id, cookie, ctl, grant_serial, bytes).map_err(|_| EngineError::InjectFailed)
    }

    /// Bytes of a body whose request is decided.
    pub(super) fn body<D: Datapath>(
        &mut self,
        cookie: u64,
        bytes: &[u8],
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        match self.stage {
            Stage::Pass { server_id, mut body, grant_serial } => {
                let (taken, end) = body.take(bytes)?;
                if taken < bytes.len() {
                    return Err(EngineError::Pipelined);
                }
                self.send(cookie, server_id, bytes, datapath)?;
                self.stage = if end {
                    Stage::Done { grant_serial }
                } else {
                    Stage::Pass { server_id, body, grant_serial }
                };
                Ok(())
            }
            Stage::Done { .. } => Err(EngineError::Pipelined),
            Stage::Discard { .. } | Stage::Head | Stage::Waiting | Stage::Closing => Ok(()),
        }
    }

    /// The bytes are those of a new request. The kernel has looked for an answer since the head that it handed over; of the requests
    /// behind that one only the engine knows, whether the server has written since they came.
    pub(super) fn next_request(&mut self, header: &PuntHeader, now: Now) {
        let silent = !std::mem::take(&mut self.skipping) && header.write_seq == self.write_seq_mark;
        self.stage = Stage::Head;
        self.limited = None;
        self.charged = false;
        self.pipelined |= silent || header.flags & PUNT_UNANSWERED != 0;
        self.unanswered = self.pipelined;
        self.write_seq_mark = self.last_write_seq;
        self.since_ns = now.boot_ns;
    }

    /// Whether the request whose head is there is over a limit: by which step of `RETRY_AFTER_SECS`. One that came while the flow was ours
    /// the kernel has not charged, or has charged to another source than the workload's.
    pub(super) fn over_limit<D: Datapath>(
        &mut self,
        caller: &CallerFacts,
        now: Now,
        datapath: &mut D,
    ) -> Option<u32> {
        let limited = self.limited.take();
        let charged = std::mem::replace(&mut self.charged, true);
        if limited.is_some() || (charged && !caller.charged_elsewhere) {
            return limited;
        }
        let wait_ns = datapath.charge_source(&caller.source, now.boot_ns).err()?;
        if self.observed {
            // The kernel has counted what it charged itself.
            if !charged {
                datapath.count("would-limit");
            }
            return None;
        }
        Some(retry_step(wait_ns))
    }

    /// Drops what belongs to the body of a refused request; gives what follows it.
    pub(super) fn discard<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<&'b [u8]>, EngineError> {
        let Stage::Discard { mut body } = self.stage else { return Ok(None) };
        let (taken, end) = body.take(bytes)?;
        self.stage = if end { Stage::Done { grant_serial: 0 } } else { Stage::Discard { body } };
        Ok(bytes.get(taken..).filter(|rest| !rest.is_empty()))
    }

    /// How the flow goes back to the kernel; `None`: it stays.
    pub(super) fn hand_back(&self) -> Option<HandBack> {
        let to = |state, body, grant_serial| {
            let (remaining_bytes, chunked) = match body {
                Body::Length(left) => (left, 0),
                Body::Chunked(decoder) => (0, decoder.to_bits()),
            };
            let write_seq_mark = self.write_seq_mark;
            HandBack {
                ctl: Ctl::new(state, self.epoch, 0),
                remaining_bytes,
                chunked,
                grant_serial,
                write_seq_mark,
                pipelined: self.pipelined,
            }
        };
        match self.stage {
            Stage::Head | Stage::Waiting => None,
            Stage::Done { grant_serial } => Some(to(State::Head, Body::Length(0), grant_serial)),
            Stage::Pass { body: body @ Body::Length(_), grant_serial, .. } => {
                Some(to(State::Body, body, grant_serial))
            }
            Stage::Pass { body, grant_serial, .. } => Some(to(State::Chunked, body, grant_serial)),
            // Passed already, so the kernel only has to follow it.
            Stage::Discard { body: body @ Body::Length(_) } if self.observed => {
                Some(to(State::Body, body, 0))
            }
            Stage::Discard { body } if self.observed => Some(to(State::Chunked, body, 0)),
            Stage::Discard { body: body @ Body::Length(_) } => Some(to(State::Discard, body, 0)),
            // A refused chunked body is read to its end here: the kernel discards by length only.
            Stage::Discard { .. } => None,
            Stage::Closing if self.observed => Some(HandBack::empty(State::Opaque, self.epoch)),
            Stage::Closing => Some(HandBack::empty(State::Dead, self.epoch)),
        }
    }
}
