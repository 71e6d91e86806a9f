//! The race for a flow's control word, in every order that two CPUs can give it: the judge runs [`settle`], [`next`], [`claim`] and [`go_on`], the inject
//! program [`may_inject`] and [`hand_back`], the gate [`end`], on the same word and fields. `shuttle` tries all orders, switching before each access to
//! word, fields and queues.
//!
//! Accesses of one CPU happen in the program's order here. On a machine that reorders them, the exchanges of the word are barriers, between
//! what a hand-back leaves and the judge that takes it over.
//!
//! Each scenario runs with the real functions, and with one thing left out at a time, which has to be found.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard};
use std::vec::Vec;

use shuttle::scheduler::DfsScheduler;
use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicU64, Ordering};

use shuttle::{Config, Runner};

use super::*;

/// What is wrong with the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    /// The hand-back looks at state and epoch, not at the number of bytes.
    BytesNotCompared,
    /// The hand-back does not look at the epoch.
    EpochNotCompared,
    /// The hand-back writes the word without looking again.
    NoExchange,
    /// The judge counts its bytes without looking again.
    ClaimStores,
    /// The hand-back writes the fields behind the word.
    FieldsLast,
    /// The judge reads what was left before it looks at the word.
    FieldsFirst,
    /// The judge writes its next state without looking whether the flow was ended.
    GoesOnBlindly,
    /// The judge looks at the word again when it has settled.
    LooksAgain,
    /// The judge does not take over what was left.
    NotSettled,
    /// Bytes are injected whatever the epoch.
    InjectedBlindly,
}

/// A message of so many bytes begins the connection, of which the daemon decides about the first packet.
const MESSAGE_BYTES: u64 = 3;

struct Word<'a>(&'a Shared);

struct Shared {
    fault: Fault,
    ctl: AtomicU64,
    remaining: AtomicU64,
    handed: AtomicU64,
    /// What the server gets, by number.
    server: Mutex<Vec<u64>>,
    /// Epoch, offset, first number, length.
    ring: Mutex<VecDeque<(u32, u64, u64, u64)>>,
}

impl CtlWord for Word<'_> {
    fn load(&self) -> Ctl {
        Ctl(self.0.ctl.load(Ordering::SeqCst))
    }

    fn replace(&self, old: Ctl, new: Ctl) -> bool {
        self.0.ctl.compare_exchange(old.0, new.0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

impl Word<'_> {
    fn store(&self, ctl: Ctl) {
        self.0.ctl.store(ctl.0, Ordering::SeqCst);
    }
}

impl Shared {
    fn new(fault: Fault) -> Self {
        Self {
            fault,
            ctl: AtomicU64::new(Ctl::new(State::Head, 0, 0).0),
            remaining: AtomicU64::new(0),
            handed: AtomicU64::new(0),
            server: Mutex::new(Vec::new()),
            ring: Mutex::new(VecDeque::new()),
        }
    }

    /// A switch may happen before a queue is touched.
    fn server(&self) -> MutexGuard<'_, Vec<u64>> {
        shuttle::thread::yield_now();
        self.server.lock().unwrap()
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<(u32, u64, u64, u64)>> {
        shuttle::thread::yield_now();
        self.ring.lock().unwrap()
    }

    /// The judge, on bytes `first..first + len`.
    fn judge(&self, first: u64, len: u64) {
        let word = Word(self);
        for _ in 0..2 {
            let early = self.handed.load(Ordering::SeqCst);
            let fields = || {
                let handed = match self.fault {
                    Fault::NotSettled => return,
                    Fault::FieldsFirst => early,
                    _ => self.handed.load(Ordering::SeqCst),
                };
                self.remaining.store(handed, Ordering::SeqCst);
            };
            let now = settle(&word, fields).expect("nobody else changes the word");
            let now = if self.fault == Fault::LooksAgain { word.load() } else { now };
            match next(now, || false, self.remaining.load(Ordering::SeqCst), len) {
                // Each head is unknown here.
                Next::Head => {
                    let Some(ctl) = self.go_on(&word, |now| now.punt(len)) else { return };
                    return self.ring().push_back((ctl.epoch(), 0, first, len));
                }
                Next::Pass(state, left) => {
                    self.remaining.store(left, Ordering::SeqCst);
                    if self.go_on(&word, |now| now.to(state)).is_none() {
                        return;
                    }
                    return self.server().extend(first..first + len);
                }
                Next::Claim => match self.claim(&word, len) {
                    Claim::Done(ctl) => {
                        let record = (ctl.epoch(), ctl.punted_bytes() - len, first, len);
                        return self.ring().push_back(record);
                    }
                    Claim::HandedBack => {}
                    Claim::TooLong => panic!("too long"),
                },
                Next::Drop(State::Dead, _) => return,
                other => panic!("{other:?}"),
            }
        }
        panic!("handed back twice");
    }

    fn go_on(&self, word: &Word<'_>, next: impl FnOnce(Ctl) -> Ctl) -> Option<Ctl> {
        if self.fault != Fault::GoesOnBlindly {
            return go_on(word, next);
        }
        let next = next(word.load());
        word.store(next);
        Some(next)
    }

    fn claim(&self, word: &Word<'_>, len: u64) -> Claim {
        if self.fault != Fault::ClaimStores {
            return claim(word, len);
        }
        let more = word.load().punt_more(len).unwrap();
        word.store(more);
        Claim::Done(more)
    }

    fn hand_back(&self, expected: Ctl, new: Ctl, left: u64) -> bool {
        let word = Word(self);
        let fields = || self.handed.store(left, Ordering::SeqCst);
        let now = word.load();
        match self.fault {
            Fault::BytesNotCompared if now.epoch() == expected.epoch() => hand_back(&word, now, new, fields),
            Fault::EpochNotCompared if now.punted_bytes() == expected.punted_bytes() => {
                hand_back(&word, now, new, fields)
            }
            Fault::NoExchange if now == expected => {
                fields();
                word.store(new.handed());
                true
            }
            Fault::FieldsLast => {
                let done = hand_back(&word, expected, new, || {});
                if done {
                    fields();
                }
                done
            }
            _ => hand_back(&word, expected, new, fields),
        }
    }
}

/// The daemon: injects what it was given, and hands the flow back after every record.
#[derive(Default)]
struct Daemon {
    epoch: u32,
    received: u64,
    /// Bytes of the message that were injected.
    passed: u64,
    back: bool,
}

impl Daemon {
    fn round(&mut self, shared: &Shared) {
        let record = shared.ring().pop_front();
        if let Some((epoch, offset, first, len)) = record {
            if epoch != self.epoch {
                *self = Self { epoch, ..Self::default() };
            }
            assert_eq!(offset, self.received, "a record is lost");
            self.received += len;
            self.passed += len;
            self.back = false;
            let meant = Ctl::new(State::Punted, epoch, self.received);
            assert!(may_inject(&Word(shared), meant), "the flow is not the daemon's");
            shared.server().extend(first..first + len);
        }
        if self.epoch != 0 && !self.back {
            let expected = Ctl::new(State::Punted, self.epoch, self.received);
            let left = MESSAGE_BYTES - self.passed.min(MESSAGE_BYTES);
            let state = if left == 0 { State::Head } else { State::Body };
            self.back = shared.hand_back(expected, Ctl::new(state, self.epoch, 0), left);
        }
    }
}

/// The daemon has the first byte of a message; the rest comes in packets of these lengths while it goes its rounds. In the end the
/// server has every byte, once and in order, and the flow is the kernel's, at the end of the message.
fn rest_of_message(fault: Fault, packets: &'static [u64], rounds: usize) {
    every_order(move || {
        let shared = Arc::new(Shared::new(fault));
        shared.judge(0, 1);
        let kernel = Arc::clone(&shared);
        let judge = shuttle::thread::spawn(move || {
            let mut first = 1;
            for len in packets {
                kernel.judge(first, *len);
                first += len;
            }
        });
        let mut daemon = Daemon::default();
        for _ in 0..rounds {
            daemon.round(&shared);
        }
        judge.join().unwrap();
        for _ in packets {
            daemon.round(&shared);
        }
        assert_eq!(*shared.server.lock().unwrap(), [0, 1, 2]);
        let ctl = Word(&shared).load();
        assert_eq!((ctl.state(), ctl.punted_bytes()), (State::Head as u64, 0));
    });
}

fn one_packet(fault: Fault) {
    rest_of_message(fault, &[2], 2);
}

fn two_packets(fault: Fault) {
    rest_of_message(fault, &[1, 1], 1);
}

/// Runs a scenario in every order.
fn every_order(scenario: impl Fn() + Send + Sync + 'static) {
    let scheduler = DfsScheduler::new(None, false);
    let orders = Runner::new(scheduler, Config::default()).run(scenario);
    assert!(orders > 3, "{orders} orders are too few to be all");
}

/// A daemon that was slow acts for an epoch that is over, while the judge gives the flow to the next one.
fn old_epoch(fault: Fault) {
    every_order(move || {
        let shared = Arc::new(Shared::new(fault));
        Word(&shared).store(Ctl::new(State::Head, 7, 0));
        let kernel = Arc::clone(&shared);
        let judge = shuttle::thread::spawn(move || kernel.judge(0, 1));
        let old = Ctl::new(State::Punted, 7, 1);
        let blindly = fault == Fault::InjectedBlindly;
        assert!(
            !(blindly && Word(&shared).load().state() == State::Punted as u64
                || may_inject(&Word(&shared), old))
        );
        assert!(!shared.hand_back(old, Ctl::new(State::Head, 7, 0), 0));
        judge.join().unwrap();
        assert_eq!(Word(&shared).load(), Ctl::new(State::Punted, 8, 1));
    });
}

/// The judge declares a flow dead while the daemon hands it back: it stays dead.
fn dead(fault: Fault) {
    every_order(move || {
        let shared = Arc::new(Shared::new(fault));
        let punted = Ctl::new(State::Punted, 1, 1);
        Word(&shared).store(punted);
        let kernel = Arc::clone(&shared);
        let judge = shuttle::thread::spawn(move || {
            let word = Word(&kernel);
            word.store(word.load().to(State::Dead));
        });
        shared.hand_back(punted, Ctl::new(State::Head, 1, 0), 0);
        judge.join().unwrap();
        assert_eq!(Word(&shared).load().state(), State::Dead as u64);
    });
}

/// The gate ends a flow while its judge is at work on it: it stays dead, whether the judge was about to pass bytes or to punt them.
fn ended(fault: Fault) {
    for state in [State::Body, State::Head] {
        every_order(move || {
            let shared = Arc::new(Shared::new(fault));
            Word(&shared).store(Ctl::new(state, 1, 0));
            shared.remaining.store(MESSAGE_BYTES, Ordering::SeqCst);
            let kernel = Arc::clone(&shared);
            let judge = shuttle::thread::spawn(move || kernel.judge(0, 1));
            let ended = end(&Word(&shared));
            judge.join().unwrap();
            assert_eq!(ended, Word(&shared).load().state() == State::Dead as u64);
        });
    }
}

fn found(scenario: fn(Fault), fault: Fault) -> bool {
    catch_unwind(AssertUnwindSafe(|| scenario(fault))).is_err()
}

#[test]
fn no_order_of_judge_and_hand_back_loses_repeats_or_moves_a_byte() {
    one_packet(Fault::Nothing);
    two_packets(Fault::Nothing);
    old_epoch(Fault::Nothing);
    dead(Fault::Nothing);
    ended(Fault::Nothing);
}

#[test]
fn each_part_of_the_protocol_is_needed() {
    for fault in [
        Fault::BytesNotCompared,
        Fault::NoExchange,
        Fault::ClaimStores,
        Fault::FieldsLast,
        Fault::FieldsFirst,
        Fault::NotSettled,
        Fault::LooksAgain,
    ] {
        assert!(found(one_packet, fault) || found(two_packets, fault), "{fault:?} is not found");
    }
    for fault in [Fault::EpochNotCompared, Fault::InjectedBlindly] {
        assert!(found(old_epoch, fault), "{fault:?} is not found");
    }
    assert!(found(dead, Fault::NoExchange));
    assert!(found(ended, Fault::GoesOnBlindly));
}
