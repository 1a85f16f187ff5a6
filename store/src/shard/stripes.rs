//! The locks of keys: one table for the whole store, each stripe with its part of the row cache, so that the lock that orders
//! the writes of a key also keeps its cached row true.

use super::row_cache::RowCache;
use parking_lot::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Stripes of a store: two batches of 64 keys meet on one about as often as not, and then wait some microseconds.
pub const STRIPE_COUNT: usize = 4096;
const WORDS: usize = STRIPE_COUNT / 64;

/// One lock and what it protects.
pub struct Stripe {
    pub cache: RowCache,
}

pub type StripeGuard<'a> = MutexGuard<'a, Stripe>;

pub struct Stripes {
    stripes: Box<[Mutex<Stripe>]>,
    hasher: foldhash::fast::RandomState,
}

impl Stripes {
    pub fn new(row_cache_bytes: usize) -> Self {
        let budget = row_cache_bytes / STRIPE_COUNT;
        let stripes = (0..STRIPE_COUNT).map(|_| Mutex::new(Stripe { cache: RowCache::new(budget) })).collect();
        Self { stripes, hasher: foldhash::fast::RandomState::default() }
    }

    /// The hash of a key of a shard, by its instance.
    pub fn hash(&self, instance: u32, key: &[u8]) -> u64 {
        use std::hash::{BuildHasher, Hasher};
        let mut hasher = self.hasher.build_hasher();
        hasher.write_u32(instance);
        hasher.write(key);
        hasher.finish()
    }

    /// The stripe of a hash: bits that the cache's own table does not use for its places and tags.
    fn stripe(hash: u64) -> usize {
        (hash >> 40) as usize % STRIPE_COUNT
    }

    /// Locks one stripe after the other: whatever held one when this began has let go of it when this returns.
    pub fn pass(&self, mut visit: impl FnMut(&mut RowCache)) {
        for stripe in &self.stripes {
            visit(&mut stripe.lock().cache);
        }
    }

    pub fn try_each(&self, mut visit: impl FnMut(&mut RowCache)) {
        for stripe in &self.stripes {
            if let Some(mut stripe) = stripe.try_lock() {
                visit(&mut stripe.cache);
            }
        }
    }
}

/// A set of stripes to lock together, in ascending order so that no two groups wait for each other.
pub struct StripeSet {
    words: [u64; WORDS],
    /// Which words are not zero.
    used: u64,
    /// Stripes chosen in the words before.
    before: [u16; WORDS],
}

impl Default for StripeSet {
    fn default() -> Self {
        Self { words: [0; WORDS], used: 0, before: [0; WORDS] }
    }
}

/// How long a group waits for stripes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Until a bound is over.
    Bounded(Duration),
    Unbounded,
}

impl StripeSet {
    pub fn clear(&mut self) {
        while self.used != 0 {
            self.words[self.used.trailing_zeros() as usize] = 0;
            self.used &= self.used - 1;
        }
    }

    pub fn add(&mut self, hash: u64) {
        let stripe = Stripes::stripe(hash);
        self.words[stripe / 64] |= 1 << (stripe % 64);
        self.used |= 1 << (stripe / 64);
    }

    pub fn add_all(&mut self) {
        self.words = [u64::MAX; WORDS];
        self.used = u64::MAX;
    }

    /// Locks the set; false if that took longer than the patience allows (what was locked is released by the caller's
    /// dropping `guards`).
    pub fn lock<'s, A: smallvec::Array<Item = StripeGuard<'s>>>(
        &mut self,
        stripes: &'s Stripes,
        patience: Patience,
        guards: &mut smallvec::SmallVec<A>,
    ) -> bool {
        let mut deadline = None;
        let mut used = self.used;
        while used != 0 {
            let word = used.trailing_zeros() as usize;
            used &= used - 1;
            self.before[word] = guards.len() as u16;
            let mut bits = self.words[word];
            while bits != 0 {
                let stripe = &stripes.stripes[word * 64 + bits.trailing_zeros() as usize];
                bits &= bits - 1;
                let guard = match (stripe.try_lock(), patience) {
                    (Some(guard), _) => guard,
                    (None, Patience::Unbounded) => stripe.lock(),
                    (None, Patience::Bounded(bound)) => {
                        let deadline = *deadline.get_or_insert_with(|| Instant::now() + bound);
                        let Some(guard) = stripe.try_lock_until(deadline) else { return false };
                        guard
                    }
                };
                guards.push(guard);
            }
        }
        true
    }

    /// Where the stripe of a hash stands among the locked ones.
    pub fn position(&self, hash: u64) -> u32 {
        let stripe = Stripes::stripe(hash);
        let below = self.words[stripe / 64] & ((1 << (stripe % 64)) - 1);
        u32::from(self.before[stripe / 64]) + below.count_ones()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use smallvec::SmallVec;

    proptest! {
        #[test]
        fn every_hash_finds_its_own_stripe_once(hashes in prop::collection::vec(any::<u64>(), 0..200)) {
            let stripes = Stripes::new(0);
            let mut set = StripeSet::default();
            for _ in 0..2 {
                hashes.iter().for_each(|hash| set.add(*hash));
                let mut guards: SmallVec<[StripeGuard<'_>; 4]> = SmallVec::new();
                prop_assert!(set.lock(&stripes, Patience::Bounded(Duration::ZERO), &mut guards));
                let mut expected: Vec<usize> = hashes.iter().map(|hash| Stripes::stripe(*hash)).collect();
                expected.sort_unstable();
                expected.dedup();
                prop_assert_eq!(guards.len(), expected.len());
                for hash in &hashes {
                    prop_assert_eq!(expected[set.position(*hash) as usize], Stripes::stripe(*hash));
                }
                set.clear();
            }
        }
    }

    #[test]
    fn a_stripe_that_stays_locked_ends_the_patience() {
        let stripes = Stripes::new(0);
        let held = stripes.stripes[Stripes::stripe(7)].lock();
        let mut set = StripeSet::default();
        set.add(7);
        let mut guards: SmallVec<[StripeGuard<'_>; 4]> = SmallVec::new();
        assert!(!set.lock(&stripes, Patience::Bounded(Duration::from_millis(1)), &mut guards));
        drop(held);
        assert!(set.lock(&stripes, Patience::Unbounded, &mut guards));
    }
}
