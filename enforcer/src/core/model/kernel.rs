//! The kernel's side of one connection: the flow's record, the ring buffer, the socket's queue, and the client and server around them. One
//! packet at a judge, or one datagram at the inject program, is one step here; that their steps may overlap is looked at in
//! `enforcer_common::flow`'s own tests.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::Hash;
use std::rc::Rc;

use enforcer_common::abi::{
    ABI_VERSION, Config, Flow, Grant, HeadDigest, MODE_ENFORCE, PUNT_CLOSED, PuntHeader, Reply, Verdict,
};
use enforcer_common::flow::{Ctl, CtlWord, State};

use super::script::Script;
use super::world::{Options, Setting};

pub(super) const COOKIE: u64 = 7;

/// What is wrong with the kernel, or with the daemon around the engine. All but the first have to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Fault {
    #[default]
    Nothing,
    /// A hand-back does not look at the number of bytes.
    BytesNotCompared,
    /// The flow goes back before the bytes are sent.
    BackFirst,
    /// Bytes that pass do not queue behind injected ones.
    PassOvertakes,
    /// The judge does not look for the server's answer.
    AnswersNotAwaited,
    /// A record of the ring buffer is taken out when all was done about it.
    ReadTwice,
    /// A new daemon does not look for what the old one had in its hands.
    OrphansForgotten,
    /// A client that did not wait for an answer is trusted to do so again.
    PipeliningForgotten,
    /// A packet goes on behind a request that was passed.
    PipeliningPasses,
    /// A refused request's body passes.
    DiscardPasses,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The next packet reaches the judge.
    Packet,
    /// The first of what is queued reaches its socket.
    Queue,
    /// The server answers a request.
    Answer,
    /// The client acknowledges what it got.
    Ack,
    /// The daemon takes a record out of the ring buffer.
    Record,
    /// The daemon's batch of records is over.
    EndBatch,
    /// Keys were fetched.
    Keys,
    /// A connection is destroyed after its answer.
    Due,
    /// The daemon ends what its predecessor had in its hands.
    Orphans,
    /// The daemon is killed.
    Die,
    /// The heartbeat is too old.
    Lapse,
    /// A new daemon starts.
    Start,
    /// The client closes.
    Close,
}

/// What a client got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    /// The server's, to so many a request that reached it.
    Server(usize),
    /// A refusal.
    Refusal,
    /// 503 from the kernel.
    Unavailable,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Queued {
    Server(Vec<u8>),
    Client(Answer),
}

pub(super) struct Word<'a>(pub(super) &'a Cell<u64>);

impl CtlWord for Word<'_> {
    fn load(&self) -> Ctl {
        Ctl(self.0.get())
    }

    fn replace(&self, old: Ctl, new: Ctl) -> bool {
        let same = self.0.get() == old.0;
        if same {
            self.0.set(new.0);
        }
        same
    }
}

#[derive(Clone)]
pub(super) struct Kernel {
    pub(super) setting: Rc<Setting>,
    pub(super) script: Rc<Script>,
    pub(super) options: Options,
    pub(super) config: Config,
    pub(super) now_ns: u64,
    pub(super) unavailable_reply_id: u32,
    pub(super) history: Vec<Step>,
    /// Packets that the judge has seen.
    pub(super) packets: usize,
    pub(super) flow: Option<Flow>,
    pub(super) ring: VecDeque<(PuntHeader, Vec<u8>)>,
    pub(super) events_lost: bool,
    /// The guarded socket's: towards the server and towards the client.
    pub(super) queue: VecDeque<Queued>,
    /// What the server has got.
    pub(super) server: Vec<u8>,
    /// Requests that it has answered.
    pub(super) answered: usize,
    pub(super) client: Vec<Answer>,
    /// Requests that the kernel answered with 503: the server does not get them.
    pub(super) unavailable: BTreeSet<usize>,
    pub(super) write_seq: u32,
    pub(super) acknowledged_seq: u32,
    pub(super) verdicts: BTreeMap<HeadDigest, Verdict>,
    pub(super) grants: BTreeMap<u32, Grant>,
    pub(super) replies: BTreeMap<u32, Rc<Reply>>,
    /// The heartbeat is fresh.
    pub(super) alive: bool,
    /// The daemon was killed in the middle of a step: nothing it does counts any more.
    pub(super) dying: bool,
    pub(super) died: bool,
    pub(super) destroy_due: bool,
    /// [`Fault::BackFirst`]: bytes that the daemon has not sent yet.
    pub(super) held: Option<Vec<u8>>,
}

impl Kernel {
    pub(super) fn new(
        setting: &Rc<Setting>,
        script: &Rc<Script>,
        options: Options,
        generation: u64,
        now_ns: u64,
    ) -> Self {
        // SAFETY: `repr(C)`, integers only. As below.
        let mut config: Config = unsafe { std::mem::zeroed() };
        config.abi_version = ABI_VERSION;
        config.mode = MODE_ENFORCE;
        config.generation = generation;
        let flow = Flow { ctl: Ctl::new(State::Head, 0, 0).0, ..Flow::BLANK };
        Self {
            setting: Rc::clone(setting),
            script: Rc::clone(script),
            options,
            config,
            now_ns,
            unavailable_reply_id: 0,
            history: Vec::new(),
            packets: 0,
            flow: Some(flow),
            ring: VecDeque::new(),
            events_lost: false,
            queue: VecDeque::new(),
            server: Vec::new(),
            answered: 0,
            client: Vec::new(),
            unavailable: BTreeSet::new(),
            write_seq: 0,
            acknowledged_seq: 0,
            verdicts: BTreeMap::new(),
            grants: BTreeMap::new(),
            replies: BTreeMap::new(),
            alive: true,
            dying: false,
            died: false,
            destroy_due: false,
            held: None,
        }
    }

    pub(super) fn hash_into(&self, hasher: &mut impl std::hash::Hasher) {
        if let Some(flow) = &self.flow {
            (flow.ctl, flow.remaining_bytes, flow.chunked, flow.write_seq_mark, flow.flags).hash(hasher);
            (flow.requests == 0, flow.punts == 0).hash(hasher);
            if Ctl(flow.ctl).is_handed() {
                let left = flow.handed;
                (left.remaining_bytes, left.chunked, left.write_seq_mark, left.flags).hash(hasher);
            }
        }
        (self.packets, self.flow.is_some(), self.events_lost, self.answered).hash(hasher);
        for (header, bytes) in &self.ring {
            let what = (header.kind, header.epoch, header.offset_bytes, header.skip_bytes);
            (what, header.flags, header.write_seq, bytes.len()).hash(hasher);
        }
        (&self.queue, self.server.len(), &self.client, &self.unavailable).hash(hasher);
        (self.write_seq, self.acknowledged_seq, self.alive, self.died, self.destroy_due).hash(hasher);
        for (digest, verdict) in &self.verdicts {
            (digest.lo, verdict.kind, verdict.index, verdict.grant_serial).hash(hasher);
        }
        for (slot, grant) in &self.grants {
            (slot, grant.serial).hash(hasher);
        }
    }

    pub(super) fn ctl(&self) -> Ctl {
        self.flow.as_ref().map_or(Ctl(0), |flow| Ctl(flow.ctl))
    }

    pub(super) fn is_dead(&self) -> bool {
        self.ctl().state() == State::Dead as u64
    }

    pub(super) fn is_punted(&self) -> bool {
        self.ctl().state() == State::Punted as u64
    }

    pub(super) fn what(&self) -> String {
        let ctl = self.ctl();
        format!("{} epoch {} bytes {}", ctl.state_name(), ctl.epoch(), ctl.punted_bytes())
    }

    /// What can happen whatever the daemon does.
    pub(super) fn enabled(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.flow.is_none() {
            return steps;
        }
        if self.packets < self.script.packets.len() {
            steps.push(Step::Packet);
        }
        if !self.queue.is_empty() {
            steps.push(Step::Queue);
        }
        if self.answered < self.whole_requests() {
            steps.push(Step::Answer);
        }
        if self.acknowledged_seq != self.write_seq {
            steps.push(Step::Ack);
        }
        steps
    }

    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Packet => {
                let script = Rc::clone(&self.script);
                let (request, bytes) = &script.packets[self.packets];
                self.packets += 1;
                self.judge(*request, bytes);
            }
            Step::Queue => match self.queue.pop_front().expect("it is enabled") {
                Queued::Server(bytes) => self.server.extend(bytes),
                Queued::Client(answer) => self.write(answer),
            },
            Step::Answer => {
                self.write(Answer::Server(self.answered));
                self.answered += 1;
            }
            Step::Ack => self.acknowledged_seq = self.write_seq,
            Step::Lapse => self.alive = false,
            Step::Close => self.close(),
            step => panic!("{step:?} is not the kernel's"),
        }
    }

    fn write(&mut self, answer: Answer) {
        self.client.push(answer);
        self.write_seq += 1;
    }

    /// The requests that the server may get.
    fn allowed(&self) -> impl Iterator<Item = &Vec<u8>> {
        let requests = self.script.requests.iter().enumerate();
        requests
            .filter(|(index, (allowed, _))| *allowed && !self.unavailable.contains(index))
            .map(|(_, (_, bytes))| bytes)
    }

    fn whole_requests(&self) -> usize {
        let mut end = 0;
        self.allowed()
            .take_while(|bytes| {
                end += bytes.len();
                end <= self.server.len()
            })
            .count()
    }

    /// The socket is gone.
    fn close(&mut self) {
        if let Some(flow) = self.flow.take() {
            self.queue.clear();
            if flow.punts != 0 {
                self.event(PUNT_CLOSED);
            }
        }
    }

    pub(super) fn destroy(&mut self) {
        self.close();
    }

    pub(super) fn event(&mut self, kind: u32) {
        if self.ring_full() {
            self.events_lost = true;
            return;
        }
        // SAFETY: `repr(C)`, integers only.
        let header: PuntHeader = unsafe { std::mem::zeroed() };
        self.ring.push_back((PuntHeader { cookie: COOKIE, kind, ..header }, Vec::new()));
    }

    pub(super) fn ring_full(&self) -> bool {
        self.options.ring_records != 0 && self.ring.len() >= self.options.ring_records
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let wanted: Vec<u8> = self.allowed().flatten().copied().collect();
        if !wanted.starts_with(&self.server) {
            return Err(format!("the server got {:?}", String::from_utf8_lossy(&self.server)));
        }
        let mut reached = 0;
        for (index, answer) in self.client.iter().enumerate() {
            let Some((allowed, _)) = self.script.requests.get(index) else {
                return Err(format!("more answers than requests: {:?}", self.client));
            };
            let right = match answer {
                Answer::Unavailable => self.unavailable.contains(&index),
                Answer::Refusal => !allowed,
                Answer::Server(number) => *allowed && *number == reached,
            };
            if !right {
                return Err(format!("answers to the wrong requests: {:?}", self.client));
            }
            reached += usize::from(matches!(answer, Answer::Server(_)));
        }
        Ok(())
    }
}
