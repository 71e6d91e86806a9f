//! Which connections are to be destroyed, and when: each is kept until it is, or until nothing is left of it.

use std::collections::{BTreeSet, HashMap};

use enforcer_common::abi::{Ends, MAX_FLOWS};

/// Pause before a destruction is tried again.
const AGAIN_NS: u64 = 500_000_000;
/// Connections without a flow record that may wait. One that finds no room, or for which no time is left, is found again by its
/// next packet, and gets no bytes.
const MAX_STRAYS: usize = 4096;
/// How often the destruction of such a one is tried: nothing tells when it is gone.
const STRAY_TRIES: u32 = 20;
/// All that may wait.
pub(super) const MAX_DOOMED: usize = MAX_FLOWS as usize + MAX_STRAYS;
/// Memory of one: in the table and in the order.
pub(super) const DOOMED_BYTES: u64 = (size_of::<(u64, (u64, Doomed))>() + size_of::<(u64, u64)>()) as u64;

/// A connection that is to be destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doomed {
    /// Socket cookie.
    pub cookie: u64,
    /// Network namespace of the server's socket.
    pub netns_cookie: u64,
    /// Interface and ends of one that has no flow record.
    pub stray: Option<(u32, Ends)>,
    /// How often it was tried in vain.
    pub tries: u32,
}

/// The connections that are to be destroyed, by time.
#[derive(Debug, Default)]
pub struct DoomedQueue {
    by_cookie: HashMap<u64, (u64, Doomed)>,
    by_time: BTreeSet<(u64, u64)>,
    strays: usize,
}

impl DoomedQueue {
    /// One more, to be destroyed at `when_ns`; what waits already keeps its time if that is earlier. Whether there is room.
    #[must_use]
    pub fn add(&mut self, when_ns: u64, doomed: Doomed) -> bool {
        if let Some((earlier_ns, waiting)) = self.by_cookie.get(&doomed.cookie).copied() {
            if when_ns < earlier_ns && waiting.tries == 0 {
                self.by_time.remove(&(earlier_ns, doomed.cookie));
                self.put(when_ns, waiting);
            }
            return true;
        }
        let full = self.by_cookie.len() >= MAX_DOOMED || doomed.stray.is_some() && self.strays >= MAX_STRAYS;
        if !full {
            self.strays += usize::from(doomed.stray.is_some());
            self.put(when_ns, doomed);
        }
        !full
    }

    /// Those that have a flow record.
    pub fn flows(&self) -> impl Iterator<Item = u64> {
        self.by_cookie.values().filter(|(_, doomed)| doomed.stray.is_none()).map(|(_, doomed)| doomed.cookie)
    }

    /// Whether this one still waits. One that was taken out and not given back does not.
    #[must_use]
    pub fn contains(&self, cookie: u64) -> bool {
        self.by_cookie.contains_key(&cookie)
    }

    fn put(&mut self, when_ns: u64, doomed: Doomed) {
        self.by_time.insert((when_ns, doomed.cookie));
        self.by_cookie.insert(doomed.cookie, (when_ns, doomed));
    }

    /// Whether there is one whose time has come.
    pub fn is_due(&self, now_ns: u64) -> bool {
        self.by_time.first().is_some_and(|(when_ns, _)| *when_ns <= now_ns)
    }

    /// Takes out the one whose time came first. Give it back by [`Self::again`] if it could not be destroyed.
    pub fn next_due(&mut self, now_ns: u64) -> Option<Doomed> {
        if !self.is_due(now_ns) {
            return None;
        }
        let (_, cookie) = self.by_time.pop_first()?;
        let (_, doomed) = self.by_cookie.remove(&cookie)?;
        self.strays -= usize::from(doomed.stray.is_some());
        Some(doomed)
    }

    /// It could not be destroyed: a while later. Whether it is kept; one with a record always is.
    #[must_use]
    pub fn again(&mut self, now_ns: u64, doomed: Doomed) -> bool {
        let tries = doomed.tries.saturating_add(1);
        let kept = doomed.stray.is_none() || tries < STRAY_TRIES;
        kept && self.add(now_ns.saturating_add(AGAIN_NS), Doomed { tries, ..doomed })
    }

    /// A network namespace was found: those that waited for it are tried now.
    pub fn found(&mut self, netns_cookie: u64, now_ns: u64) {
        let waiting = self.by_cookie.values().filter(|(when_ns, doomed)| {
            doomed.netns_cookie == netns_cookie && doomed.tries > 0 && *when_ns > now_ns
        });
        for (when_ns, doomed) in waiting.copied().collect::<Vec<_>>() {
            self.by_time.remove(&(when_ns, doomed.cookie));
            self.put(now_ns, doomed);
        }
    }
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::{EndpointKey, FAMILY_V4};

    use super::*;

    fn flow(cookie: u64) -> Doomed {
        Doomed { cookie, netns_cookie: cookie % 2, stray: None, tries: 0 }
    }

    fn stray(cookie: u64) -> Doomed {
        let end = EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 };
        Doomed { stray: Some((0, Ends { local: end, peer: end })), ..flow(cookie) }
    }

    fn due(queue: &mut DoomedQueue, now_ns: u64) -> Vec<u64> {
        std::iter::from_fn(|| queue.next_due(now_ns)).map(|doomed| doomed.cookie).collect()
    }

    #[test]
    fn each_comes_once_and_in_its_time() {
        let mut queue = DoomedQueue::default();
        for (when_ns, cookie) in [(30, 3), (10, 1), (20, 2), (5, 3), (40, 1)] {
            assert!(queue.add(when_ns, flow(cookie)));
        }
        assert!(!queue.is_due(4) && queue.next_due(4).is_none());
        assert_eq!(due(&mut queue, 10), [3, 1]);
        assert_eq!(due(&mut queue, 1_000), [2]);
    }

    #[test]
    fn one_that_could_not_be_destroyed_stays_and_is_tried_when_its_namespace_is_found() {
        let mut queue = DoomedQueue::default();
        assert!([1, 2, 3].into_iter().all(|cookie| queue.add(0, flow(cookie))));
        // To be destroyed later, so that its answer can be read: the namespace changes nothing about that.
        assert!(queue.add(AGAIN_NS, flow(5)));
        while let Some(doomed) = queue.next_due(0) {
            assert!(queue.again(0, doomed));
        }
        // Asked for again meanwhile: still one, and not before its time.
        assert!(queue.add(1, flow(2)));
        assert!(due(&mut queue, 1).is_empty());
        queue.found(1, 2);
        assert_eq!(due(&mut queue, 2), [1, 3]);
        assert_eq!(due(&mut queue, AGAIN_NS), [2, 5]);
        let mut doomed = flow(1);
        for _ in 0..10 * STRAY_TRIES {
            assert!(queue.again(0, doomed));
            doomed = queue.next_due(AGAIN_NS).unwrap();
        }
    }

    #[test]
    fn it_is_told_who_still_waits() {
        let mut queue = DoomedQueue::default();
        assert!(queue.add(0, flow(1)) && queue.add(0, stray(2)) && queue.add(5, flow(3)));
        let mut flows: Vec<u64> = queue.flows().collect();
        flows.sort_unstable();
        assert_eq!(flows, [1, 3]);
        let doomed = queue.next_due(0).unwrap();
        assert!(!queue.contains(1) && queue.contains(3));
        assert!(queue.again(0, doomed) && queue.contains(1));
    }

    #[test]
    fn strays_are_bounded_and_given_up() {
        let mut queue = DoomedQueue::default();
        let room = MAX_STRAYS as u64;
        assert!((0..room).all(|cookie| queue.add(0, stray(cookie))));
        assert!(!queue.add(0, stray(room)));
        assert!(queue.add(0, stray(0)), "it waits already");
        assert!(queue.add(0, flow(room)));
        let mut doomed = queue.next_due(0).unwrap();
        assert!(queue.add(0, stray(room + 1)));
        assert_eq!(due(&mut queue, 0).len(), MAX_STRAYS + 1);
        let mut tries = 1;
        while queue.again(0, doomed) {
            doomed = queue.next_due(AGAIN_NS).unwrap();
            tries += 1;
        }
        assert_eq!(tries, STRAY_TRIES);
    }
}
