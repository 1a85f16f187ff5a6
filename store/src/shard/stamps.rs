//! Draws stamps: event times that only grow and sequences that are never used twice, crashes included.
//!
//! An upper bound of both lies in `meta`, ahead of what is used, and is written before a stamp above it is drawn. After a
//! crash the generator goes on above the bound.

use crate::engine::database::Database;
use crate::engine::{EngineError, Tier, meta};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use vasto_proto::id::StoreId;
use vasto_proto::row::Stamp;

/// How far the bounds run ahead: one write of `meta` a second at most, and a restart skips no more than this.
const AHEAD_NS: u64 = 3_000_000_000;
const AHEAD_SEQUENCES: u64 = 1 << 20;
/// A power cut can take the last second of the log, and with it a raise of the bound: a restart skips as many sequences as two
/// raises cover.
const SKIPPED_SEQUENCES: u64 = 2 * AHEAD_SEQUENCES;

/// What lies in `meta`: nothing above it was ever drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bound {
    ns: u64,
    sequence: u64,
}

impl Bound {
    fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.ns.to_be_bytes());
        out[8..].copy_from_slice(&self.sequence.to_be_bytes());
        out
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (ns, sequence) = bytes.split_first_chunk::<8>()?;
        Some(Self { ns: u64::from_be_bytes(*ns), sequence: u64::from_be_bytes(*sequence.first_chunk()?) })
    }
}

/// The generator of one shard.
#[derive(Debug)]
pub struct Stamps {
    origin: u32,
    /// The largest event time drawn.
    last_ns: AtomicU64,
    /// The next sequence.
    next_sequence: AtomicU64,
    bound_ns: AtomicU64,
    bound_sequence: AtomicU64,
    raising: Mutex<()>,
    /// What [`Stamps::was_used_since_last_asked`] was told last.
    asked: AtomicU64,
}

/// Some stamps drawn together: their event times and sequences are consecutive.
#[derive(Clone, Copy, Debug, Default)]
pub struct StampBlock {
    next: Stamp,
    left: u64,
}

impl StampBlock {
    /// The next stamp; draws `wanted` more when none is left.
    pub fn next(
        &mut self,
        stamps: &Stamps,
        now_ns: u64,
        wanted: u64,
        database: &Database,
        tier: Tier,
    ) -> Result<Stamp, EngineError> {
        if self.left == 0 {
            let count = wanted.max(1);
            self.next = stamps.draw(now_ns, count, |bound| database.put_meta(meta::STAMPS, bound, tier))?;
            self.left = count;
        }
        let stamp = self.next;
        self.next.ns += 1;
        self.next.sequence += 1;
        self.left -= 1;
        Ok(stamp)
    }

    /// Accepts an event time that a client gave: every stamp that is drawn from here on, here or by others, is above it.
    pub fn observe(
        &mut self,
        stamps: &Stamps,
        given_ns: u64,
        database: &Database,
        tier: Tier,
    ) -> Result<(), EngineError> {
        stamps.observe(given_ns, |bound| database.put_meta(meta::STAMPS, bound, tier))?;
        if self.next.ns <= given_ns {
            // Drawn before, and below it.
            self.left = 0;
        }
        Ok(())
    }
}

impl Stamps {
    pub fn open(origin: StoreId, database: &Database) -> Result<Self, EngineError> {
        let bound = match database.meta(meta::STAMPS)?.as_deref() {
            None => Bound::default(),
            Some(bytes) => Bound::from_bytes(bytes)
                .ok_or_else(|| EngineError::Failed("the bound of the stamps in meta is malformed".into()))?,
        };
        Ok(Self::above(origin, bound))
    }

    fn above(origin: StoreId, bound: Bound) -> Self {
        let sequence = if bound == Bound::default() { 1 } else { bound.sequence + SKIPPED_SEQUENCES };
        Self {
            origin: origin.0,
            last_ns: AtomicU64::new(bound.ns),
            next_sequence: AtomicU64::new(sequence),
            bound_ns: AtomicU64::new(bound.ns),
            bound_sequence: AtomicU64::new(0),
            raising: Mutex::new(()),
            asked: AtomicU64::new(0),
        }
    }

    /// Draws `count` stamps and returns the first; `save` makes a bound durable before anything above the old one is drawn.
    fn draw(
        &self,
        now_ns: u64,
        count: u64,
        mut save: impl FnMut(&[u8]) -> Result<(), EngineError>,
    ) -> Result<Stamp, EngineError> {
        let sequence = self.next_sequence.fetch_add(count, Ordering::Relaxed);
        let mut last = self.last_ns.load(Ordering::Relaxed);
        loop {
            let first = now_ns.max(last + 1);
            let end = first + count;
            if end > self.bound_ns.load(Ordering::Acquire)
                || sequence + count > self.bound_sequence.load(Ordering::Acquire)
            {
                self.raise(end, sequence + count, &mut save)?;
            }
            match self.last_ns.compare_exchange_weak(last, end - 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(Stamp { ns: first, origin: self.origin, sequence }),
                Err(now) => last = now,
            }
        }
    }

    /// Counts an event time as drawn; durable, by `save`, before it returns.
    fn observe(
        &self,
        given_ns: u64,
        mut save: impl FnMut(&[u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        if given_ns > self.bound_ns.load(Ordering::Acquire) {
            self.raise(given_ns, self.next_sequence.load(Ordering::Relaxed), &mut save)?;
        }
        self.last_ns.fetch_max(given_ns, Ordering::Relaxed);
        Ok(())
    }

    /// Counts as drawn whatever another store may have drawn by this bound of its own, and returns what `meta` must say from now on.
    pub fn adopt(&self, bound: &[u8]) -> Option<[u8; 16]> {
        let bound = Bound::from_bytes(bound)?;
        let _one_at_a_time = self.raising.lock();
        let ns = self.bound_ns.fetch_max(bound.ns, Ordering::AcqRel).max(bound.ns);
        // Sequences are each store's own; what is kept of them here must not fall.
        let next = self.next_sequence.load(Ordering::Relaxed);
        let sequence = self.bound_sequence.load(Ordering::Acquire).max(bound.sequence).max(next);
        self.bound_sequence.store(sequence, Ordering::Release);
        self.last_ns.fetch_max(bound.ns, Ordering::Relaxed);
        Some(Bound { ns, sequence }.to_bytes())
    }

    /// Begins anew above all that was ever drawn here or adopted, and returns that event time: whoever reads the log learns it from what
    /// `save` writes, whatever it knew before. A bound may have been raised where nobody reads.
    pub fn begin_above(&self, save: impl FnOnce(u64, &[u8]) -> Result<(), EngineError>) -> Result<u64, EngineError> {
        let _one_at_a_time = self.raising.lock();
        let ns = self.bound_ns.load(Ordering::Acquire).max(self.last_ns.load(Ordering::Relaxed));
        let next = self.next_sequence.load(Ordering::Relaxed);
        let sequence = self.bound_sequence.load(Ordering::Acquire).max(next);
        save(ns, &Bound { ns, sequence }.to_bytes())?;
        self.bound_ns.fetch_max(ns, Ordering::AcqRel);
        self.bound_sequence.fetch_max(sequence, Ordering::AcqRel);
        self.last_ns.fetch_max(ns, Ordering::Relaxed);
        Ok(ns)
    }

    /// Every stamp that is drawn from here on is above this event time; durable, by `meta`, before it returns.
    pub fn rise_above(&self, ns: u64, database: &Database) -> Result<(), EngineError> {
        self.observe(ns, |bound| database.put_meta(meta::STAMPS, bound, Tier::Disk))
    }

    /// The shard's time: the clock, or the largest event time there is if the clock is behind it.
    pub fn time_ns(&self, now_ns: u64) -> u64 {
        now_ns.max(self.last_ns.load(Ordering::Relaxed))
    }

    fn raise(
        &self,
        ns: u64,
        sequence: u64,
        save: &mut impl FnMut(&[u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let _one_at_a_time = self.raising.lock();
        let old =
            Bound { ns: self.bound_ns.load(Ordering::Acquire), sequence: self.bound_sequence.load(Ordering::Acquire) };
        if ns <= old.ns && sequence <= old.sequence {
            return Ok(());
        }
        let bound = Bound { ns: old.ns.max(ns + AHEAD_NS), sequence: old.sequence.max(sequence + AHEAD_SEQUENCES) };
        save(&bound.to_bytes())?;
        self.bound_ns.store(bound.ns, Ordering::Release);
        self.bound_sequence.store(bound.sequence, Ordering::Release);
        Ok(())
    }

    /// Whether the shard's count of writes changed since the last call.
    pub fn was_used_since_last_asked(&self, written: u64) -> bool {
        self.asked.swap(written, Ordering::Relaxed) != written
    }

    /// Raises the bounds while there is room left, so that a batch seldom has to; called while the shard is written to.
    pub fn raise_ahead(&self, now_ns: u64, database: &Database) -> Result<(), EngineError> {
        let next_sequence = self.next_sequence.load(Ordering::Relaxed);
        let far = now_ns + AHEAD_NS / 2 > self.bound_ns.load(Ordering::Acquire)
            || next_sequence + AHEAD_SEQUENCES / 2 > self.bound_sequence.load(Ordering::Acquire);
        if far {
            // What would have to wait is left to the batch that needs it: nothing else may wait here.
            let mut save = |bound: &[u8]| database.put_meta(meta::STAMPS, bound, Tier::Memory);
            self.raise(now_ns + AHEAD_NS / 2, next_sequence + AHEAD_SEQUENCES / 2, &mut save)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Draw {
            now_ns: u64,
            count: u64,
        },
        /// A client gives an event time.
        Observe {
            given_ns: u64,
        },
        /// The process dies; what was saved stays.
        Crash,
        Begin,
        /// The bound cannot be saved.
        DrawFails {
            now_ns: u64,
        },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let now = prop_oneof![0..10u64, 0..20_000_000_000u64];
        let step = prop_oneof![
            4 => (now.clone(), prop_oneof![1..5u64, 1..3_000_000u64]).prop_map(|(now_ns, count)| Step::Draw { now_ns, count }),
            2 => now.clone().prop_map(|given_ns| Step::Observe { given_ns }),
            1 => Just(Step::Crash),
            1 => Just(Step::Begin),
            1 => now.prop_map(|now_ns| Step::DrawFails { now_ns }),
        ];
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        #[test]
        fn no_stamp_is_used_twice_and_time_never_goes_back(steps in steps()) {
            let mut saved = Vec::new();
            let mut stamps = Stamps::above(StoreId(7), Bound::default());
            let (mut largest_ns, mut next_sequence) = (0, 0);
            for step in steps {
                match step {
                    Step::Draw { now_ns, count } => {
                        let first = stamps.draw(now_ns, count, |bound| { saved = bound.to_vec(); Ok(()) }).unwrap();
                        prop_assert!(first.ns > largest_ns && first.ns >= now_ns);
                        prop_assert!(first.sequence >= next_sequence);
                        largest_ns = first.ns + count - 1;
                        next_sequence = first.sequence + count;
                        let bound = Bound::from_bytes(&saved).unwrap();
                        prop_assert!(bound.ns > largest_ns && bound.sequence >= next_sequence);
                    }
                    Step::Observe { given_ns } => {
                        stamps.observe(given_ns, |bound| { saved = bound.to_vec(); Ok(()) }).unwrap();
                        largest_ns = largest_ns.max(given_ns);
                        prop_assert!(stamps.time_ns(0) >= given_ns);
                    }
                    Step::Crash => {
                        let bound = Bound::from_bytes(&saved).unwrap_or_default();
                        stamps = Stamps::above(StoreId(7), bound);
                    }
                    Step::Begin => {
                        let ns = stamps.begin_above(|_, bound| { saved = bound.to_vec(); Ok(()) }).unwrap();
                        prop_assert!(ns >= largest_ns && Bound::from_bytes(&saved).unwrap().ns == ns);
                        largest_ns = ns;
                    }
                    Step::DrawFails { now_ns } => {
                        let drawn = stamps.draw(now_ns, 1, |_| Err(EngineError::Stalled));
                        if let Ok(first) = drawn {
                            largest_ns = first.ns;
                            next_sequence = first.sequence + 1;
                        }
                    }
                }
            }
        }
    }
}
