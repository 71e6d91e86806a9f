//! Who may use a CPU's scratch memory.
//!
//! A judge may be interrupted, or preempted, by another one on its CPU, for another socket. So a CPU has several slots of memory, and
//! a slot is owned by who set its word.

/// Slots per CPU. More than so many judges inside one another on a CPU: the flow of the last is dead.
pub const SLOTS: u32 = 4;

/// Takes the first free slot; its number tells inside of how many others this judge runs. `slot` gives the slot of a number, and `set` sets its word in one access, and gives what it was.
#[inline(always)]
pub fn acquire<S: Copy>(slot: impl Fn(u32) -> Option<S>, set: impl Fn(S) -> u64) -> Option<(u32, S)> {
    let mut index = 0;
    while index < SLOTS {
        let slot = slot(index)?;
        if set(slot) == 0 {
            return Some((index, slot));
        }
        index += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::vec::Vec;

    use shuttle::scheduler::DfsScheduler;
    use shuttle::sync::Arc;
    use shuttle::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use shuttle::{Config, Runner};

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        Nothing,
        /// All use the first slot.
        Shared,
        /// The word is read and then set.
        TwoAccesses,
    }

    #[derive(Default)]
    struct Slot {
        busy: AtomicU64,
        head: [AtomicU64; 2],
    }

    /// A judge: copies its head in, and reads it back for the digest. True: there was a slot, and nobody else's bytes.
    fn judge(slots: &[Slot], fault: Fault, number: u64) -> Option<bool> {
        let set = |slot: &Slot| match fault {
            Fault::Nothing => slot.busy.swap(1, SeqCst),
            Fault::Shared => 0,
            Fault::TwoAccesses => {
                let busy = slot.busy.load(SeqCst);
                slot.busy.store(1, SeqCst);
                busy
            }
        };
        let (_, slot) = acquire(|index| slots.get(index as usize), set)?;
        for word in &slot.head {
            word.store(number, SeqCst);
        }
        let whole = slot.head.iter().all(|word| word.load(SeqCst) == number);
        slot.busy.store(0, SeqCst);
        Some(whole)
    }

    /// Judges on one CPU, in every order, whoever interrupts whom: none digests another's bytes, and all find memory.
    fn every_order(judges: u64, fault: Fault) {
        let orders = Runner::new(DfsScheduler::new(None, false), Config::default()).run(move || {
            let slots: Arc<Vec<Slot>> = Arc::new((0..SLOTS).map(|_| Slot::default()).collect());
            let running: Vec<_> = (1..judges)
                .map(|number| {
                    let slots = Arc::clone(&slots);
                    shuttle::thread::spawn(move || judge(&slots, fault, number))
                })
                .collect();
            let first = judge(&slots, fault, 0);
            let others = running.into_iter().map(|thread| thread.join().unwrap());
            assert!(others.chain([first]).all(|whole| whole == Some(true)));
        });
        assert!(orders > 100, "{orders} orders are too few to be all");
    }

    #[test]
    fn no_judge_digests_the_bytes_of_another() {
        every_order(2, Fault::Nothing);
    }

    #[test]
    fn shared_scratch_memory_is_found() {
        for fault in [Fault::Shared, Fault::TwoAccesses] {
            assert!(catch_unwind(AssertUnwindSafe(|| every_order(2, fault))).is_err(), "{fault:?}");
        }
    }

    /// Inside one another, each interrupted with its slot taken.
    #[test]
    fn the_fifth_inside_one_another_gets_none() {
        let slots: Vec<std::sync::atomic::AtomicU64> = (0..SLOTS).map(|_| 0.into()).collect();
        let take = || acquire(|index| slots.get(index as usize), |slot| slot.swap(1, SeqCst));
        let taken: Vec<u32> = (0..SLOTS).map(|_| take().unwrap().0).collect();
        assert_eq!(taken, [0, 1, 2, 3]);
        assert!(take().is_none());
        slots[2].store(0, SeqCst);
        assert_eq!(take().unwrap().0, 2);
        assert!(take().is_none());
    }
}
