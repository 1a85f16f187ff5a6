//! A set of slots, and how the slots of a keyspace are assigned to its shards while their number changes.

use super::operation::{OperationKind, Phase};
use super::record::KeyspaceRecord;
use crate::id::ShardId;
use crate::slot::{SLOT_COUNT, SlotTable};
use std::ops::Range;

const WORDS: usize = SLOT_COUNT as usize / 64;

/// Some of the slots, one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSet(Box<[u64; WORDS]>);

impl Default for SlotSet {
    fn default() -> Self {
        Self(Box::new([0; WORDS]))
    }
}

impl SlotSet {
    pub fn insert(&mut self, slot: u16) {
        self.0[usize::from(slot / 64)] |= 1 << (slot % 64);
    }

    /// Of a number that is no slot: no.
    pub fn contains(&self, slot: u16) -> bool {
        self.0.get(usize::from(slot / 64)).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..SLOT_COUNT).filter(|slot| self.contains(*slot))
    }

    /// All other slots.
    pub fn complement(&self) -> Self {
        let mut others = self.clone();
        others.0.iter_mut().for_each(|word| *word = !*word);
        others
    }

    /// Slots that follow each other without a gap, as ranges; the end of the last may be [`SLOT_COUNT`].
    pub fn runs(&self) -> impl Iterator<Item = Range<u16>> + '_ {
        let mut slots = self.iter().peekable();
        std::iter::from_fn(move || {
            let start = slots.next()?;
            let mut end = start + 1;
            while slots.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some(start..end)
        })
    }
}

impl FromIterator<u16> for SlotSet {
    fn from_iter<I: IntoIterator<Item = u16>>(slots: I) -> Self {
        let mut set = Self::default();
        slots.into_iter().for_each(|slot| set.insert(slot));
        set
    }
}

/// Slots that go from one shard to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    pub source: ShardId,
    pub target: ShardId,
    pub slots: SlotSet,
}

/// Who has which slot by one version of a record.
#[derive(Clone, Debug)]
pub struct Layout {
    /// By which slots are served.
    now: SlotTable,
    /// Of a change that goes on or has just been committed: before and after it.
    change: Option<(SlotTable, SlotTable)>,
    is_fenced: bool,
}

impl Layout {
    pub fn of(record: &KeyspaceRecord) -> Self {
        let operation = record.operation.as_ref().filter(|operation| operation.is_active() && !record.dropped);
        let change = operation.and_then(|operation| match operation.kind {
            OperationKind::Resize { from, to } => Some((SlotTable::new(from), SlotTable::new(to))),
            OperationKind::Replace { .. } => None,
        });
        let is_fenced = operation.is_some_and(|operation| operation.phase == Phase::Fence);
        Self { now: SlotTable::new(record.shard_count()), is_fenced: is_fenced && change.is_some(), change }
    }

    /// The slots that a shard may serve: a slot that is behind a fence is served by nobody.
    pub fn served(&self, shard: ShardId) -> SlotSet {
        let stays = |slot: &u16| match &self.change {
            Some((_, after)) if self.is_fenced => after.shard(*slot) == shard,
            Some(_) | None => true,
        };
        self.now.slots(shard).filter(stays).collect()
    }

    /// The slots that a change brings to a shard from others.
    pub fn coming(&self, shard: ShardId) -> SlotSet {
        self.moving(|before, after| after == shard && before != shard)
    }

    /// The slots that a change takes from a shard.
    pub fn leaving(&self, shard: ShardId) -> SlotSet {
        self.moving(|before, after| before == shard && after != shard)
    }

    fn moving(&self, counts: impl Fn(ShardId, ShardId) -> bool) -> SlotSet {
        let Some((before, after)) = &self.change else { return SlotSet::default() };
        (0..SLOT_COUNT).filter(|slot| counts(before.shard(*slot), after.shard(*slot))).collect()
    }

    /// All moves of a change, by source and target.
    pub fn moves(&self) -> Vec<Move> {
        let Some((before, after)) = &self.change else { return Vec::new() };
        let mut moves = std::collections::BTreeMap::<_, SlotSet>::new();
        for slot in 0..SLOT_COUNT {
            let (source, target) = (before.shard(slot), after.shard(slot));
            if source != target {
                moves.entry((source, target)).or_default().insert(slot);
            }
        }
        moves.into_iter().map(|((source, target), slots)| Move { source, target, slots }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{KeyspaceId, StoreId};

    #[test]
    fn runs_are_the_slots_without_gaps() {
        let set: SlotSet = [0, 1, 2, 63, 64, 100, 16382, 16383].into_iter().collect();
        assert_eq!(set.runs().collect::<Vec<_>>(), [0..3, 63..65, 100..101, 16382..16384]);
        assert_eq!((set.len(), set.complement().len()), (8, 16376));
        assert!(set.contains(63) && !set.contains(62) && !set.contains(u16::MAX));
        assert_eq!(SlotSet::default().runs().count(), 0);
    }

    #[test]
    fn each_slot_is_served_by_one_shard_before_and_after_and_by_nobody_behind_the_fence() {
        for (from, to) in [(1, 2), (3, 4), (4, 6), (6, 2), (2, 3), (3, 1), (1, 1024)] {
            let stores: Vec<StoreId> = (1..=u32::from(from)).map(StoreId).collect();
            let before = KeyspaceRecord::new(KeyspaceId(0), "0", &stores).unwrap();
            let placed = (0..to.max(from) - from).map(|_| StoreId(9)).collect();
            let copying = before.begin_resize(to, placed).unwrap();
            let fenced = copying.fence().unwrap();
            let committed = fenced.commit().unwrap();
            let served = |record: &KeyspaceRecord| {
                let layout = Layout::of(record);
                let mut owners = vec![Vec::new(); usize::from(SLOT_COUNT)];
                for shard in 0..record.shards.len() as u16 {
                    layout.served(ShardId(shard)).iter().for_each(|slot| owners[usize::from(slot)].push(shard));
                }
                owners
            };
            let (first, last) = (SlotTable::new(from), SlotTable::new(to));
            let of = |table: &SlotTable| (0..SLOT_COUNT).map(|slot| vec![table.shard(slot).0]).collect::<Vec<_>>();
            let mut behind = of(&first);
            for (owners, after) in behind.iter_mut().zip(of(&last)) {
                if *owners != after {
                    owners.clear();
                }
            }
            assert_eq!(served(&before), of(&first));
            assert_eq!(served(&copying), of(&first));
            assert_eq!(served(&fenced), behind);
            assert_eq!(served(&committed), of(&last));
            let layout = Layout::of(&copying);
            let moved: usize = layout.moves().iter().map(|part| part.slots.len()).sum();
            let coming: usize = (0..to).map(|shard| layout.coming(ShardId(shard)).len()).sum();
            let leaving: usize = (0..from).map(|shard| layout.leaving(ShardId(shard)).len()).sum();
            assert_eq!((moved, moved), (coming, leaving));
            let finished = committed.clean().unwrap().finish().unwrap();
            assert_eq!((finished.shard_count(), finished.shards.len()), (to, usize::from(to)));
            assert!(Layout::of(&finished).moves().is_empty());
        }
    }
}
