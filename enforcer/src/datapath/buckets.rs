//! The buckets of limits, mapped into memory: the kernel programs and the daemon change the same words, atomically.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::{MapData, MapError};
use enforcer_common::abi::{Bucket, GRANT_BUCKETS, MAX_BUCKETS, map};
use enforcer_common::limit::{PLACE_WAIT_NS, admit, changed, too_many_open};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{LiveError, PinDir};
use crate::core::Shape;

/// Words of a [`Bucket`], by their place.
const WORDS: usize = size_of::<Bucket>() / 8;
const TAT: usize = 0;
const INTERVAL: usize = 1;
const BURST: usize = 2;
const OPEN: usize = 3;
const MAX_OPEN: usize = 4;
const ADMITTED: usize = 5;
const LIMITED: usize = 6;
const SERIAL: usize = 7;
const _: () = assert!(
    WORDS == 8
        && std::mem::offset_of!(Bucket, tat_ns) == TAT * 8
        && std::mem::offset_of!(Bucket, interval_ns) == INTERVAL * 8
        && std::mem::offset_of!(Bucket, burst_ns) == BURST * 8
        && std::mem::offset_of!(Bucket, open) == OPEN * 8
        && std::mem::offset_of!(Bucket, max_open) == MAX_OPEN * 8
        && std::mem::offset_of!(Bucket, admitted) == ADMITTED * 8
        && std::mem::offset_of!(Bucket, limited) == LIMITED * 8
        && std::mem::offset_of!(Bucket, serial) == SERIAL * 8
);
const BYTES: usize = MAX_BUCKETS as usize * size_of::<Bucket>();
/// The wait, in nanoseconds, for a bucket that can't be read or is not there: the shortest, as the kernel has it.
pub const UNREADABLE_NS: u64 = 1;

/// The buckets.
pub struct Buckets {
    words: NonNull<AtomicU64>,
}

// SAFETY: shared memory that is accessed by atomic operations only.
unsafe impl Send for Buckets {}

impl Buckets {
    /// Maps the buckets of a loaded enforcement.
    ///
    /// # Errors
    /// The map can't be opened or mapped.
    pub fn open(pins: &PinDir) -> Result<Self, LiveError> {
        let failed = |source| LiveError::Map { name: map::LIMITS, source };
        let data = MapData::from_pin(pins.pin(map::LIMITS)).map_err(failed)?;
        let length = NonZeroUsize::new(BYTES).unwrap_or(NonZeroUsize::MIN);
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping of a map that has this many bytes; the kernel checks.
        let start = unsafe { mmap(None, length, both, MapFlags::MAP_SHARED, data.fd(), 0) };
        let start = start.map_err(|error| failed(MapError::IoError(error.into())))?;
        Ok(Self { words: start.cast() })
    }

    fn word(&self, index: u32, word: usize) -> Option<&AtomicU64> {
        let at = index as usize * WORDS + word;
        // SAFETY: inside of the mapping, aligned, and it lives as long as `self`.
        (index < MAX_BUCKETS && word < WORDS).then(|| unsafe { self.words.add(at).as_ref() })
    }

    fn read(&self, index: u32, word: usize) -> u64 {
        self.word(index, word).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    fn write(&self, index: u32, word: usize, value: u64) {
        if let Some(word) = self.word(index, word) {
            word.store(value, Ordering::Relaxed);
        }
    }

    fn add(&self, index: u32, word: usize, summand: u64) {
        if let Some(word) = self.word(index, word) {
            word.fetch_add(summand, Ordering::Relaxed);
        }
    }

    /// A bucket, word by word.
    #[must_use]
    pub fn get(&self, index: u32) -> Bucket {
        let word = |word| self.read(index, word);
        Bucket {
            tat_ns: word(TAT),
            interval_ns: word(INTERVAL),
            burst_ns: word(BURST),
            open: word(OPEN),
            max_open: word(MAX_OPEN),
            admitted: word(ADMITTED),
            limited: word(LIMITED),
            serial: word(SERIAL),
        }
    }

    /// Begins a bucket that no grant names. Its serial comes last: until then it refuses.
    pub fn begin(&self, index: u32, bucket: &Bucket) {
        self.write(index, SERIAL, 0);
        self.write(index, TAT, bucket.tat_ns);
        self.write(index, OPEN, bucket.open);
        self.write(index, ADMITTED, bucket.admitted);
        self.write(index, LIMITED, bucket.limited);
        self.write(index, INTERVAL, bucket.interval_ns);
        self.write(index, BURST, bucket.burst_ns);
        self.write(index, MAX_OPEN, bucket.max_open);
        if let Some(serial) = self.word(index, SERIAL) {
            serial.store(bucket.serial, Ordering::Release);
        }
    }

    /// Changes a bucket's limit. A request that is charged at the same moment may be charged by half of each.
    pub fn limit(&self, index: u32, shape: &Shape, now_ns: u64) {
        let old = (self.read(index, INTERVAL), self.read(index, BURST));
        let new = (shape.interval_ns, shape.burst_ns);
        if old != new {
            if let Some(word) = self.word(index, TAT) {
                let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
                let _ = word.fetch_update(success, failure, |tat_ns| Some(changed(tat_ns, now_ns, old, new)));
            }
            self.write(index, INTERVAL, new.0);
            self.write(index, BURST, new.1);
        }
        self.write(index, MAX_OPEN, shape.max_open);
    }

    /// Ends a bucket: it refuses what is charged to it.
    pub fn end(&self, index: u32) {
        self.write(index, SERIAL, 0);
    }

    /// Takes places away that no connection has.
    pub fn give_back(&self, index: u32, places: u64) {
        self.add(index, OPEN, places.wrapping_neg());
    }

    /// Charges a request to buckets, all or none. `held` are those in which its connection has a place already.
    ///
    /// # Errors
    /// It is over a limit: for so many nanoseconds.
    pub fn charge(
        &self,
        buckets: &[u32; GRANT_BUCKETS],
        held: &[u32; GRANT_BUCKETS],
        now_ns: u64,
    ) -> Result<(), u64> {
        let named = || buckets.iter().copied().take_while(|index| *index != 0);
        for (charged, index) in named().enumerate() {
            if let Err(wait_ns) = self.charge_one(index, held.contains(&index), now_ns) {
                self.add(index, LIMITED, 1);
                for index in named().take(charged) {
                    self.refund(index);
                    self.add(index, ADMITTED, u64::MAX);
                }
                return Err(wait_ns);
            }
            self.add(index, ADMITTED, 1);
        }
        Ok(())
    }

    /// Never below zero, which would be the end of time.
    fn refund(&self, index: u32) {
        let interval_ns = self.read(index, INTERVAL);
        if let Some(word) = self.word(index, TAT) {
            let less = |tat_ns: u64| tat_ns.checked_sub(interval_ns);
            let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
    }

    fn charge_one(&self, index: u32, held: bool, now_ns: u64) -> Result<(), u64> {
        let bucket = self.get(index);
        if bucket.serial == 0 {
            return Err(UNREADABLE_NS);
        }
        // The place itself is taken by the kernel, when the request goes to the server.
        if !held && too_many_open(bucket.open.wrapping_add(1), bucket.max_open) {
            return Err(PLACE_WAIT_NS);
        }
        let word = self.word(index, TAT).ok_or(UNREADABLE_NS)?;
        let mut wait_ns = 0;
        word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tat_ns| {
            admit(tat_ns, now_ns, bucket.interval_ns, bucket.burst_ns).map_err(|ns| wait_ns = ns).ok()
        })
        .map(|_| ())
        .map_err(|_| wait_ns)
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        let _ = unsafe { munmap(self.words.cast(), BYTES) };
    }
}
