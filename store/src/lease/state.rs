//! A shard's lease as those see it who run operations: one number to compare.

use super::clock::BootClock;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vasto_proto::id::{Epoch, ShardKey, StoreId};
use vasto_proto::topology::lease::is_needed;
use vasto_proto::topology::{KeyspaceRecord, ShardRecord};

/// Values of [`LeaseState::until_ns`] that are no times: no lease is needed, none was had at this epoch yet, and the store is not primary
/// (any more).
const NEEDS_NONE: u64 = u64::MAX;
const NONE_YET: u64 = 0;
const ENDED: u64 = 1;

/// What a store must have to serve a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Nothing,
    Lease,
    /// It is not primary: nothing helps.
    NotPrimary,
}

impl Need {
    /// As a record says it of one of its shards.
    pub fn of(record: &KeyspaceRecord, shard: &ShardRecord, store: StoreId) -> Self {
        if shard.primary != store {
            Self::NotPrimary
        } else if is_needed(&record.settings, shard) {
            Self::Lease
        } else {
            Self::Nothing
        }
    }
}

/// How an operation was let in, for the look before its answer leaves. What was let in where the store is not primary takes what may be
/// old, and needs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    pub epoch: Epoch,
    pub need: Need,
}

/// Until when a shard may be served.
#[derive(Debug)]
pub struct LeaseState {
    key: ShardKey,
    clock: Arc<BootClock>,
    /// That of `terms`; changed after `until_ns` and read after it, so that a lease of a later epoch never counts for an earlier one.
    epoch: AtomicU64,
    /// Read for every group of operations, changed under the lock of `terms` alone.
    until_ns: AtomicU64,
    terms: Mutex<Terms>,
}

#[derive(Debug)]
struct Terms {
    epoch: Epoch,
    need: Need,
    /// Why there is no lease, for people.
    reason: String,
}

fn beginning(need: Need) -> u64 {
    match need {
        Need::Nothing => NEEDS_NONE,
        Need::Lease => NONE_YET,
        Need::NotPrimary => ENDED,
    }
}

fn first_reason(need: Need) -> String {
    match need {
        Need::Nothing | Need::Lease => "it was not asked for yet".to_owned(),
        Need::NotPrimary => "this store is not its primary any more".to_owned(),
    }
}

impl LeaseState {
    pub fn new(key: ShardKey, clock: Arc<BootClock>, epoch: Epoch, need: Need) -> Self {
        let terms = Terms { epoch, need, reason: first_reason(need) };
        let (until_ns, epoch) = (AtomicU64::new(beginning(need)), AtomicU64::new(epoch.0));
        Self { key, clock, epoch, until_ns, terms: Mutex::new(terms) }
    }

    /// What the newest record says. A lease of one epoch is none of another.
    pub fn follow(&self, epoch: Epoch, need: Need) {
        self.change(&mut self.terms.lock(), epoch, need);
    }

    /// The store is not primary at this epoch any more, or stops: nothing that is under way is answered as done.
    pub fn end(&self, epoch: Epoch) {
        let mut terms = self.terms.lock();
        if terms.epoch == epoch {
            self.change(&mut terms, epoch, Need::NotPrimary);
        }
    }

    fn change(&self, terms: &mut Terms, epoch: Epoch, need: Need) {
        if (terms.epoch, terms.need) != (epoch, need) {
            *terms = Terms { epoch, need, reason: first_reason(need) };
            self.until_ns.store(beginning(need), Ordering::Release);
            self.epoch.store(epoch.0, Ordering::Release);
        }
    }

    /// The epoch at which the shard needs a lease.
    pub fn wanted(&self) -> Option<Epoch> {
        let terms = self.terms.lock();
        (terms.need == Need::Lease).then_some(terms.epoch)
    }

    /// The holders have granted a lease of this epoch.
    pub fn extend(&self, epoch: Epoch, until_ns: u64) {
        let terms = self.terms.lock();
        if terms.epoch == epoch && terms.need == Need::Lease {
            self.until_ns.fetch_max(until_ns, Ordering::Release);
        }
    }

    /// Why the lease of this epoch is not there.
    pub fn explain(&self, epoch: Epoch, reason: String) {
        let mut terms = self.terms.lock();
        if terms.epoch == epoch && terms.need == Need::Lease {
            terms.reason = reason;
        }
    }

    /// How an operation of this epoch is let in that the gate has passed.
    pub fn admission(&self, epoch: Epoch) -> Admission {
        let need = match self.until_ns.load(Ordering::Acquire) {
            NEEDS_NONE => Need::Nothing,
            _ => Need::Lease,
        };
        Admission { epoch, need }
    }

    /// Whether operations may be run now. Reads the clock only where a lease is needed.
    pub fn allows(&self) -> bool {
        match self.until_ns.load(Ordering::Acquire) {
            NEEDS_NONE => true,
            until_ns => self.clock.now_ns() < until_ns,
        }
    }

    /// Whether what was let in so may be answered as it was run.
    pub fn allows_answer(&self, admission: Admission) -> bool {
        let is_same = || admission.epoch.0 == self.epoch.load(Ordering::Acquire);
        match (admission.need, self.until_ns.load(Ordering::Acquire)) {
            (Need::NotPrimary, _) | (_, NEEDS_NONE) => true,
            // It was let in when none was needed; before the first lease nobody follows who could take over.
            (need, NONE_YET) => need == Need::Nothing && is_same(),
            (_, until_ns) => self.clock.now_ns() < until_ns && is_same(),
        }
    }

    /// What is said where [`LeaseState::allows_answer`] says no.
    pub fn lapse(&self) -> String {
        format!("shard {} has lost its lease meanwhile: {}", self.key, self.reason())
    }

    /// When the lease ends; `None` if none is needed or there is none.
    pub fn until_ns(&self) -> Option<u64> {
        match self.until_ns.load(Ordering::Acquire) {
            NEEDS_NONE | NONE_YET | ENDED => None,
            until_ns => Some(until_ns),
        }
    }

    /// Why the shard is not served.
    pub fn reason(&self) -> String {
        let reason = self.terms.lock().reason.clone();
        match self.until_ns() {
            Some(until_ns) => {
                let ago_ms = self.clock.now_ns().saturating_sub(until_ns) / 1_000_000;
                format!("it ended {ago_ms} ms ago; {reason}")
            }
            None => reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_NS: u64 = 3_600_000_000_000;

    fn state(need: Need) -> (Arc<BootClock>, LeaseState) {
        let clock = Arc::new(BootClock::default());
        (Arc::clone(&clock), LeaseState::new(ShardKey::default(), clock, Epoch(1), need))
    }

    #[test]
    fn a_lease_is_of_one_epoch_and_ends() {
        let (clock, state) = state(Need::Lease);
        let let_in = state.admission(Epoch(1));
        let later = Admission { epoch: Epoch(2), ..let_in };
        assert!(!state.allows() && !state.allows_answer(let_in));
        state.extend(Epoch(2), u64::MAX - 1);
        assert!(!state.allows());
        state.extend(Epoch(1), clock.now_ns() + HOUR_NS);
        assert!(state.allows() && state.allows_answer(let_in) && !state.allows_answer(later));
        state.follow(Epoch(1), Need::Lease);
        assert!(state.allows());
        clock.stop_after(0, 2 * HOUR_NS);
        assert!(!state.allows() && !state.allows_answer(let_in));
        assert!(state.reason().starts_with("it ended 3"), "{}", state.reason());
        state.follow(Epoch(3), Need::Lease);
        assert_eq!((state.until_ns(), state.wanted()), (None, Some(Epoch(3))));
        state.extend(Epoch(3), clock.now_ns() + HOUR_NS);
        assert!(!state.allows_answer(let_in) && state.allows_answer(state.admission(Epoch(3))));
        state.end(Epoch(1));
        assert_eq!(state.wanted(), Some(Epoch(3)));
        state.end(Epoch(3));
        state.extend(Epoch(3), u64::MAX - 1);
        assert!(!state.allows());
        assert_eq!(state.reason(), "this store is not its primary any more");
        assert!(state.allows_answer(Admission { epoch: Epoch(3), need: Need::NotPrimary }));
    }

    #[test]
    fn what_was_let_in_without_need_is_answered_until_there_is_a_lease_to_lose() {
        let (clock, alone) = state(Need::Nothing);
        let let_in = alone.admission(Epoch(1));
        alone.follow(Epoch(1), Need::Lease);
        assert!(!alone.allows() && alone.allows_answer(let_in));
        assert!(!alone.allows_answer(Admission { epoch: Epoch(2), ..let_in }));
        alone.extend(Epoch(1), clock.now_ns() + HOUR_NS);
        assert!(alone.allows_answer(let_in));
        clock.stop_after(0, 2 * HOUR_NS);
        assert!(!alone.allows_answer(let_in));
        let (_, gone) = state(Need::Nothing);
        gone.end(Epoch(1));
        assert!(!gone.allows_answer(let_in));
    }
}
