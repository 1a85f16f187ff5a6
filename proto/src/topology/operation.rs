//! What is being done with a keyspace as a whole, in its record: resizing it, or replacing a store. Each step is a version of the record.
//!
//! A resize goes through copy, fence, committed, clean and done; it can be aborted before it is committed, and a fence can be lifted. That a
//! step may be taken is for the master to know; here stands what it changes.

use super::record::{KeyspaceRecord, ShardRecord};
use crate::id::{Epoch, StoreId};
use crate::pb;
use crate::slot::SHARD_COUNT_MAX;
use thiserror::Error;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The epoch of the record that began it.
    pub id: u64,
    pub kind: OperationKind,
    pub phase: Phase,
    /// Of [`Phase::Fence`] and later: the epoch of the record that set the fence.
    pub fence: Epoch,
    /// Of [`Phase::Aborted`]: why, for people.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    /// From one number of shards to another.
    Resize { from: u16, to: u16 },
    /// The copies that a store has go to another, or to whichever are best.
    Replace { store: StoreId, with: Option<StoreId> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Rows are on their way; nothing else is different yet.
    Copy,
    /// The slots that go to other shards are served by nobody.
    Fence,
    /// The slots have their new shards; stores hear of it.
    Committed,
    /// The shards that had them delete their rows.
    Clean,
    Done,
    Aborted,
}

impl Phase {
    /// What people call it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Fence => "fence",
            Self::Committed => "committed",
            Self::Clean => "clean",
            Self::Done => "done",
            Self::Aborted => "aborted",
        }
    }
}

impl Operation {
    pub fn is_active(&self) -> bool {
        !matches!(self.phase, Phase::Done | Phase::Aborted)
    }

    /// Whether it can still end as if it had not begun.
    pub fn may_be_aborted(&self) -> bool {
        matches!(self.phase, Phase::Copy | Phase::Fence)
    }
}

/// Why a step cannot be taken from this version of a record.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StepError {
    #[error("the keyspace has {0} shards already")]
    SameCount(u16),
    #[error("a keyspace needs 1 to {SHARD_COUNT_MAX} shards, not {0}")]
    ShardCount(u16),
    #[error("{wanted} new shards need as many stores, not {placed}")]
    Placement { wanted: usize, placed: usize },
    #[error("an operation is under way")]
    Busy,
    #[error("the operation is not there yet, or past it")]
    OtherPhase,
}

impl KeyspaceRecord {
    /// The operation that goes on.
    pub fn active_operation(&self) -> Option<&Operation> {
        self.operation.as_ref().filter(|operation| operation.is_active() && !self.dropped)
    }

    fn next_with(&self, operation: Operation) -> Self {
        Self { epoch: Epoch(self.epoch.0 + 1), operation: Some(operation), ..self.clone() }
    }

    fn in_phase(&self, phase: Phase) -> Result<&Operation, StepError> {
        self.active_operation().filter(|operation| operation.phase == phase).ok_or(StepError::OtherPhase)
    }

    /// With the intention of another number of shards. New shards begin empty on the stores of `placed`, under shard epochs that no
    /// earlier shard of that number had; their replicas come later.
    pub fn begin_resize(&self, to: u16, placed: Vec<StoreId>) -> Result<Self, StepError> {
        let from = self.shard_count();
        if self.active_operation().is_some() {
            return Err(StepError::Busy);
        }
        if !(1..=SHARD_COUNT_MAX).contains(&to) {
            return Err(StepError::ShardCount(to));
        }
        if to == from {
            return Err(StepError::SameCount(to));
        }
        let wanted = usize::from(to.saturating_sub(from));
        if placed.len() != wanted {
            return Err(StepError::Placement { wanted, placed: placed.len() });
        }
        let epoch = Epoch(self.epoch.0 + 1);
        let kind = OperationKind::Resize { from, to };
        let operation =
            Operation { id: epoch.0, kind, phase: Phase::Copy, fence: Epoch::default(), reason: String::new() };
        let mut next = self.next_with(operation);
        let born = |primary| ShardRecord { born: epoch, ..ShardRecord::new(epoch, primary, Vec::new()) };
        next.shards.extend(placed.into_iter().map(born));
        Ok(next)
    }

    /// With the intention to give the copies that a store has to others.
    pub fn begin_replace(&self, store: StoreId, with: Option<StoreId>) -> Result<Self, StepError> {
        if self.active_operation().is_some() {
            return Err(StepError::Busy);
        }
        let id = self.epoch.0 + 1;
        let kind = OperationKind::Replace { store, with };
        let operation = Operation { id, kind, phase: Phase::Copy, fence: Epoch::default(), reason: String::new() };
        Ok(self.next_with(operation))
    }

    /// With the slots that go elsewhere served by nobody.
    pub fn fence(&self) -> Result<Self, StepError> {
        let operation = self.in_phase(Phase::Copy)?;
        if !matches!(operation.kind, OperationKind::Resize { .. }) {
            return Err(StepError::OtherPhase);
        }
        let fence = Epoch(self.epoch.0 + 1);
        Ok(self.next_with(Operation { phase: Phase::Fence, fence, ..operation.clone() }))
    }

    /// With the fence lifted: the sources serve again, and the rows go on being moved.
    pub fn unfence(&self) -> Result<Self, StepError> {
        let operation = self.in_phase(Phase::Fence)?;
        Ok(self.next_with(Operation { phase: Phase::Copy, ..operation.clone() }))
    }

    /// With the slots at their new shards: the moment of the change.
    pub fn commit(&self) -> Result<Self, StepError> {
        let operation = self.in_phase(Phase::Fence)?;
        let OperationKind::Resize { to, .. } = operation.kind else { return Err(StepError::OtherPhase) };
        let mut next = self.next_with(Operation { phase: Phase::Committed, ..operation.clone() });
        next.shard_count = to;
        Ok(next)
    }

    /// With the rows of slots that have gone free to be deleted.
    pub fn clean(&self) -> Result<Self, StepError> {
        let operation = self.in_phase(Phase::Committed)?;
        Ok(self.next_with(Operation { phase: Phase::Clean, ..operation.clone() }))
    }

    /// With the operation at its end; shards that have no slots any more are gone.
    pub fn finish(&self) -> Result<Self, StepError> {
        let operation = self.active_operation().ok_or(StepError::OtherPhase)?;
        let may_end = match operation.kind {
            OperationKind::Resize { .. } => Phase::Clean,
            OperationKind::Replace { .. } => Phase::Copy,
        };
        if operation.phase != may_end {
            return Err(StepError::OtherPhase);
        }
        let mut next = self.next_with(Operation { phase: Phase::Done, ..operation.clone() });
        next.shards.truncate(usize::from(next.shard_count));
        Ok(next)
    }

    /// As if the operation had not begun: shards that never had a slot are gone.
    pub fn abort(&self, reason: &str) -> Result<Self, StepError> {
        let operation = self.active_operation().filter(|operation| operation.may_be_aborted());
        let operation = operation.ok_or(StepError::OtherPhase)?;
        let mut next =
            self.next_with(Operation { phase: Phase::Aborted, reason: reason.to_owned(), ..operation.clone() });
        next.shards.truncate(usize::from(next.shard_count));
        Ok(next)
    }
}

impl From<&Operation> for pb::Operation {
    fn from(operation: &Operation) -> Self {
        use pb::operation::Kind;
        let kind = match operation.kind {
            OperationKind::Resize { from, to } => {
                Kind::Resize(pb::Resize { from_shards: from.into(), to_shards: to.into() })
            }
            OperationKind::Replace { store, with } => {
                Kind::Replace(pb::Replace { store_id: store.0, with_store_id: with.map_or(0, |store| store.0) })
            }
        };
        let phase = match operation.phase {
            Phase::Copy => pb::Phase::Copy,
            Phase::Fence => pb::Phase::Fence,
            Phase::Committed => pb::Phase::Committed,
            Phase::Clean => pb::Phase::Clean,
            Phase::Done => pb::Phase::Done,
            Phase::Aborted => pb::Phase::Aborted,
        };
        let (id, fence, reason) = (operation.id, operation.fence.0, operation.reason.clone());
        Self { id, kind: Some(kind), phase: phase.into(), fence, reason }
    }
}

impl Operation {
    /// `None` if it cannot be true, or is of a kind that only a later version knows.
    pub fn from_message(message: pb::Operation) -> Option<Self> {
        use pb::operation::Kind;
        let phase = match message.phase() {
            pb::Phase::Copy => Phase::Copy,
            pb::Phase::Fence => Phase::Fence,
            pb::Phase::Committed => Phase::Committed,
            pb::Phase::Clean => Phase::Clean,
            pb::Phase::Done => Phase::Done,
            pb::Phase::Aborted => Phase::Aborted,
            pb::Phase::Unset => return None,
        };
        let count = |count: u32| u16::try_from(count).ok().filter(|count| (1..=SHARD_COUNT_MAX).contains(count));
        let kind = match message.kind? {
            Kind::Resize(resize) => {
                OperationKind::Resize { from: count(resize.from_shards)?, to: count(resize.to_shards)? }
            }
            Kind::Replace(replace) => OperationKind::Replace {
                store: StoreId(replace.store_id),
                with: Some(StoreId(replace.with_store_id)).filter(|store| store.0 != 0),
            },
        };
        Some(Self { id: message.id, kind, phase, fence: Epoch(message.fence), reason: message.reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::KeyspaceId;

    fn record(shards: u32) -> KeyspaceRecord {
        let stores: Vec<StoreId> = (1..=shards).map(StoreId).collect();
        KeyspaceRecord::new(KeyspaceId(4), "four", &stores).unwrap()
    }

    #[test]
    fn growing_goes_through_its_phases() {
        let before = record(2);
        let copying = before.begin_resize(3, vec![StoreId(7)]).unwrap();
        assert_eq!((copying.epoch, copying.shard_count(), copying.shards.len()), (Epoch(2), 2, 3));
        assert_eq!((copying.shards[2].epoch, copying.shards[2].primary), (Epoch(2), StoreId(7)));
        assert_eq!(copying.begin_resize(4, vec![StoreId(7); 2]), Err(StepError::Busy));
        assert_eq!(copying.commit(), Err(StepError::OtherPhase));
        let fenced = copying.fence().unwrap();
        assert_eq!(fenced.operation.as_ref().unwrap().fence, Epoch(3));
        let again = fenced.unfence().unwrap().fence().unwrap();
        assert_eq!(again.operation.as_ref().unwrap().fence, Epoch(5));
        let committed = again.commit().unwrap();
        assert_eq!((committed.shard_count(), committed.shards.len()), (3, 3));
        assert_eq!(committed.abort("late"), Err(StepError::OtherPhase));
        let done = committed.clean().unwrap().finish().unwrap();
        assert!(done.active_operation().is_none() && done.shards.len() == 3);
        for record in [copying, fenced, again, committed, done] {
            assert_eq!(KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&record)), Ok(record));
        }
    }

    #[test]
    fn shrinking_keeps_the_old_shards_until_the_end() {
        let committed = record(4).begin_resize(1, Vec::new()).unwrap().fence().unwrap().commit().unwrap();
        assert_eq!((committed.shard_count(), committed.shards.len()), (1, 4));
        assert_eq!(committed.clean().unwrap().finish().unwrap().shards.len(), 1);
        // A shard of a number that was there before begins under an epoch that none of them had.
        let done = committed.clean().unwrap().finish().unwrap();
        let again = done.begin_resize(2, vec![StoreId(1)]).unwrap();
        assert_eq!((again.shards[1].epoch, again.shards[1].born), (again.epoch, again.epoch));
    }

    #[test]
    fn an_aborted_one_leaves_nothing_behind() {
        let before = record(2);
        let copying = before.begin_resize(5, vec![StoreId(7); 3]).unwrap();
        for record in [copying.clone(), copying.fence().unwrap()] {
            let aborted = record.abort("its disk is full").unwrap();
            assert_eq!((aborted.shard_count(), &aborted.shards), (2, &before.shards));
            assert_eq!(KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&aborted)), Ok(aborted.clone()));
            assert_eq!(aborted.abort("again"), Err(StepError::OtherPhase));
            assert!(aborted.begin_resize(1, Vec::new()).is_ok());
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(record(2).begin_resize(2, Vec::new()), Err(StepError::SameCount(2)));
        assert_eq!(record(2).begin_resize(0, Vec::new()), Err(StepError::ShardCount(0)));
        assert_eq!(record(2).begin_resize(1025, Vec::new()), Err(StepError::ShardCount(1025)));
        assert_eq!(record(2).begin_resize(4, vec![StoreId(1)]), Err(StepError::Placement { wanted: 2, placed: 1 }));
        let replacing = record(2).begin_replace(StoreId(1), Some(StoreId(3))).unwrap();
        assert_eq!(replacing.fence(), Err(StepError::OtherPhase));
        assert_eq!(KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&replacing)), Ok(replacing.clone()));
        assert!(replacing.finish().unwrap().active_operation().is_none());
    }
}
