//! Which slots a shard owns, as the newest record says: bits for the way of a command, the whole of it for who walks.
//!
//! A bit is read under the lock of the key's stripe. Whoever takes slots away clears their bits and then passes through every stripe once:
//! nothing that was let in before still runs then, and nothing of these slots is cached. So a cached row needs no look at the bits.

use super::Shard;
use super::stripes::Stripes;
use parking_lot::RwLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use vasto_proto::id::{Epoch, ShardId};
use vasto_proto::slot::{SLOT_COUNT, slot_of};
use vasto_proto::topology::{KeyspaceRecord, Layout, Move, OperationKind, Phase, SlotSet};

const WORDS: usize = SLOT_COUNT as usize / 64;

/// What one version of a record gives a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owned {
    /// Counts what the shard has owned since it was opened.
    pub version: u64,
    /// In ascending order.
    pub slots: Box<[u16]>,
    pub set: SlotSet,
    /// By how many shards the record assigns slots; 0 = it is not known yet.
    pub shard_count: u16,
    /// Slots of the keyspace are on their way to other shards, or have been at some time.
    pub had_operation: bool,
    /// Some of the shard's slots are behind the fence of this epoch: nobody serves them.
    pub fence: Option<Epoch>,
    /// The slots that may be given to other shards now.
    pub outgoing: Option<Outgoing>,
}

/// Slots that a shard gives away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The resize.
    pub operation: u64,
    /// All from this shard.
    pub moves: Vec<Move>,
}

impl Outgoing {
    pub fn to(&self, target: ShardId) -> Option<&Move> {
        self.moves.iter().find(|given| given.target == target)
    }
}

impl Owned {
    /// What a record, whose layout this is, gives a shard.
    pub fn of(record: &KeyspaceRecord, layout: &Layout, shard: ShardId) -> Self {
        let set = layout.served(shard);
        let resize = record.active_operation().filter(|operation| match operation.kind {
            OperationKind::Resize { .. } => operation.may_be_aborted(),
            OperationKind::Replace { .. } => false,
        });
        let outgoing = resize.and_then(|operation| {
            let moves: Vec<Move> = layout.moves().into_iter().filter(|given| given.source == shard).collect();
            (!moves.is_empty()).then_some(Outgoing { operation: operation.id, moves })
        });
        let fence = resize.filter(|operation| operation.phase == Phase::Fence && outgoing.is_some());
        Self {
            version: 0,
            slots: set.iter().collect(),
            set,
            shard_count: record.shard_count(),
            had_operation: record.operation.is_some(),
            fence: fence.map(|operation| operation.fence),
            outgoing,
        }
    }

    /// The slot itself, or the first one behind it that is owned.
    pub fn next_from(&self, slot: u16) -> Option<u16> {
        self.slots.get(self.slots.partition_point(|own| *own < slot)).copied()
    }
}

/// What a shard owns now.
pub struct Ownership {
    /// One bit per slot.
    bits: Box<[AtomicU64; WORDS]>,
    current: RwLock<Arc<Owned>>,
    /// As `current`, but not before what was let in earlier has ended.
    settled: watch::Sender<Arc<Owned>>,
    /// Since when slots have been behind a fence.
    fenced: RwLock<Option<Instant>>,
}

impl Default for Ownership {
    fn default() -> Self {
        let none = Arc::<Owned>::default();
        Self {
            bits: Box::new([const { AtomicU64::new(0) }; WORDS]),
            current: RwLock::new(Arc::clone(&none)),
            settled: watch::Sender::new(none),
            fenced: RwLock::default(),
        }
    }
}

impl Shard {
    /// Whether the shard owns a slot. Holds for as long as the caller holds the stripe of a key in it.
    pub fn owns(&self, slot: u16) -> bool {
        let word = self.ownership.bits.get(usize::from(slot / 64));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (slot % 64) & 1 == 1)
    }

    /// What the shard owns, for a walk, which is true if the shard still owns the same when it has ended.
    pub fn owned(&self) -> Arc<Owned> {
        Arc::clone(&self.ownership.current.read())
    }

    /// What the shard owns, told when nothing of an earlier ownership runs any more.
    pub fn settled_ownership(&self) -> watch::Receiver<Arc<Owned>> {
        self.ownership.settled.subscribe()
    }

    /// Owns this from now on. When it returns, nothing that was let in before touches a slot that was taken away. For how long slots were
    /// behind a fence is returned when they are not any more. The caller sees to it that there is one call at a time.
    pub fn take_ownership(&self, stripes: &Stripes, owned: Owned) -> Option<Duration> {
        let before = self.owned();
        let owned = Owned { version: before.version, ..owned };
        if *before == owned {
            return None;
        }
        let owned = Arc::new(Owned { version: before.version + 1, ..owned });
        *self.ownership.current.write() = Arc::clone(&owned);
        let mut are_lost = false;
        for (number, word) in self.ownership.bits.iter().enumerate() {
            let first = number as u16 * 64;
            let bits = (0..64).filter(|bit| owned.set.contains(first + bit)).fold(0, |bits, bit| bits | 1 << bit);
            are_lost |= word.swap(bits, Ordering::AcqRel) & !bits != 0;
        }
        if are_lost {
            stripes.pass(|cache| cache.keep(self.instance, |key| self.owns(slot_of(key))));
        }
        let since = {
            let mut fenced = self.ownership.fenced.write();
            match owned.fence {
                Some(_) => {
                    fenced.get_or_insert_with(Instant::now);
                    None
                }
                None => fenced.take(),
            }
        };
        self.ownership.settled.send_replace(owned);
        since.map(|since| since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::id::{KeyspaceId, StoreId};

    #[test]
    fn a_shard_owns_what_each_version_of_the_record_gives_it() {
        let first = KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(1), StoreId(2)]).unwrap();
        let copying = first.begin_resize(3, vec![StoreId(3)]).unwrap();
        let fenced = copying.fence().unwrap();
        let committed = fenced.commit().unwrap();
        let of = |record: &KeyspaceRecord, shard| Owned::of(record, &Layout::of(record), ShardId(shard));
        let before = of(&first, 0);
        assert_eq!((before.shard_count, before.had_operation, &before.outgoing), (2, false, &None));
        let outgoing = of(&copying, 0).outgoing.unwrap();
        assert_eq!((outgoing.operation, outgoing.moves.len()), (copying.epoch.0, 1));
        let leaving = outgoing.to(ShardId(2)).unwrap().slots.clone();
        assert_eq!(of(&copying, 0).set, before.set, "nothing is different while rows are copied");
        let behind = of(&fenced, 0);
        assert_eq!(behind.fence, Some(fenced.epoch));
        assert!(leaving.iter().all(|slot| before.set.contains(slot) && !behind.set.contains(slot)));
        assert_eq!(behind.slots.len() + leaving.len(), before.slots.len());
        assert_eq!(of(&fenced, 2).fence, None, "the shard that gets them has none of them behind a fence");
        assert_eq!(of(&fenced.unfence().unwrap(), 0).set, before.set);
        let after = of(&committed, 0);
        assert_eq!((after.shard_count, after.fence, &after.outgoing), (3, None, &None));
        assert_eq!((after.set, of(&committed, 2).set.len()), (behind.set, of(&committed, 2).slots.len()));
    }

    #[test]
    fn the_next_owned_slot_is_found_from_any() {
        let owned = Owned { slots: [3, 4, 9].into(), ..Owned::default() };
        let next: Vec<Option<u16>> = [0, 3, 4, 5, 9, 10].into_iter().map(|slot| owned.next_from(slot)).collect();
        assert_eq!(next, [Some(3), Some(3), Some(4), Some(9), Some(9), None]);
    }
}
