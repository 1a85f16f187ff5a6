//! What one shard knows of slots that come to it, or that it has yet to clean up after: its note, its moves, and who works at them.

use super::cleaning::Cleaning;
use super::note::{Note, Rows};
use super::target::Taking;
use crate::engine::database::Database;
use crate::engine::{EngineError, meta};
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vasto_proto::id::{Epoch, ShardId, ShardKey};
use vasto_proto::topology::{KeyspaceRecord, Layout, MoveStatus, OperationKind, Phase, SlotSet};

use crate::shard::executor::Core;

/// A task that ends when the record says something else.
pub struct Task {
    stop: CancellationToken,
    /// Its other ends go with the task and with what it does on other threads.
    ended: mpsc::Receiver<()>,
}

/// Whoever stops a task waits until all of these are gone.
pub type Ending = mpsc::Sender<()>;

impl Task {
    /// Runs what `begin` makes of the token that ends it.
    pub fn start<F>(core: &Core, begin: impl FnOnce(CancellationToken, Ending) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = core.replicator.stopping();
        let (ending, ended) = mpsc::channel();
        core.replicator.spawn(begin(stop.clone(), ending));
        Self { stop, ended }
    }

    /// Ends it; what it is writing is written when this returns.
    pub fn stop(self) {
        self.stop.cancel();
        // An error is what it waits for: the sender is gone.
        let _ = self.ended.recv();
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What follows from the newest record.
#[derive(Default)]
pub struct State {
    /// Slots that come from other shards, as long as they may still go back.
    pub coming: SlotSet,
    /// The keyspace has an operation that has not ended.
    pub is_busy: bool,
    /// The version of the record that is followed, and the fence that stands by it.
    pub record_epoch: Epoch,
    pub fence: Option<Epoch>,
    /// Rows are deleted here, and copies that follow may have them yet.
    pub is_cleaning: bool,
    /// The resize whose leavings this shard has to delete, whether they are noted or not; 0 = there is none.
    pub to_clean: u64,
    pub moves: BTreeMap<ShardId, MoveStatus>,
    pub takings: Vec<(Taking, Task)>,
    pub cleaning: Option<(Cleaning, Task)>,
}

/// One shard's part in getting slots.
#[derive(Default)]
pub struct Incoming {
    note: Mutex<Note>,
    /// Held by whoever writes rows of slots that are not the shard's, and by who makes another part of the shard: whoever has looked
    /// whether it leads has written before it does not.
    writing: Mutex<()>,
    pub state: Mutex<State>,
    /// Held by whoever takes a file in, and by who rewrites files after slots have left.
    pub files: tokio::sync::Mutex<()>,
}

impl Incoming {
    pub fn open(database: &Database) -> Result<Self, EngineError> {
        let malformed = || EngineError::Failed("the note of foreign rows in meta is malformed".to_owned());
        let bytes = database.meta(meta::FOREIGN)?;
        let note = bytes.map(|bytes| Note::from_bytes(&bytes).ok_or_else(malformed)).transpose()?.unwrap_or_default();
        database.garbage().may_drop_up_to(note.dropped_ns);
        Ok(Self { note: Mutex::new(note), ..Self::default() })
    }

    pub fn note(&self) -> Note {
        self.note.lock().clone()
    }

    /// This lies in `meta` now.
    pub fn noted(&self, database: &Database, note: Note) {
        database.garbage().may_drop_up_to(note.dropped_ns);
        *self.note.lock() = note;
    }

    /// Nobody writes foreign rows while this is held.
    pub fn hold_still(&self) -> MutexGuard<'_, ()> {
        self.writing.lock()
    }

    /// Whether a physical key is of a slot that another shard still has and sends here.
    pub fn is_coming(&self, physical_key: &[u8]) -> bool {
        let slot = physical_key.first_chunk().map(|slot| u16::from_be_bytes(*slot));
        slot.is_some_and(|slot| self.state.lock().coming.contains(slot))
    }

    /// Whether the keyspace is being resized, or has a store replaced.
    pub fn is_busy(&self) -> bool {
        self.state.lock().is_busy
    }

    pub fn has_foreign_rows(&self) -> bool {
        let note = self.note();
        let (to_clean, is_cleaning) = {
            let state = self.state.lock();
            (state.to_clean, state.is_cleaning)
        };
        note.rows == Rows::Foreign || is_cleaning || to_clean != 0 && note.operation != to_clean
    }

    /// The fence up to which everything of a source is here, as long as it may be committed: what has come must stay as it is then.
    pub fn settled(&self, operation: u64, source: ShardId) -> Option<Epoch> {
        let drained = self.note().drained(operation, source)?;
        let state = self.state.lock();
        // Who has the slots may have heard of the fence before this store.
        (state.record_epoch <= drained || state.fence == Some(drained)).then_some(drained)
    }

    /// Whether the record of a fence, or a later one, is followed: since then it says which replicas must have what has come.
    pub fn has_heard_of(&self, fence: Epoch) -> bool {
        self.state.lock().record_epoch >= fence
    }

    pub fn moves(&self) -> Vec<MoveStatus> {
        self.state.lock().moves.values().cloned().collect()
    }

    /// Takes over what a record says before the shard's slots are changed by it: moves that it does not name any more have ended when this
    /// returns. `wanted` is what it wants.
    pub fn follow(&self, record: &KeyspaceRecord, layout: &Layout, key: ShardKey, wanted: &[Taking]) {
        let ended: Vec<Task> = {
            let mut state = self.state.lock();
            let operation = record.operation.as_ref().filter(|_| !record.dropped);
            let phase = operation.map(|operation| operation.phase);
            let may_go_back = operation.is_some_and(|operation| operation.may_be_aborted());
            state.coming = if may_go_back { layout.coming(key.shard) } else { SlotSet::default() };
            state.is_busy = record.active_operation().is_some();
            state.to_clean = left_by(record, key.shard);
            if !matches!(phase, Some(Phase::Copy | Phase::Fence | Phase::Committed | Phase::Clean)) {
                state.moves.clear();
            }
            let id = operation.map_or(0, |operation| operation.id);
            state.moves.retain(|_, status| status.operation == id);
            let is_over = |(taking, _): &mut (Taking, Task)| !wanted.contains(taking);
            state.takings.extract_if(.., is_over).map(|(_, task)| task).collect()
        };
        // Each ends when it has written what it is writing.
        ended.into_iter().for_each(Task::stop);
        // Not before: what is committed now nobody may take for something that can begin anew.
        let fenced = record.active_operation().filter(|operation| operation.phase == Phase::Fence);
        let mut state = self.state.lock();
        (state.record_epoch, state.fence) = (record.epoch, fenced.map(|operation| operation.fence));
    }
}

/// The resize that has taken slots from a shard which stays, as a record says it: their rows may be deleted then, or in its next phase. The
/// record is the note of it: it is on the disk of each copy before it is followed, and stays until there is another operation, which
/// there is not before all primaries have deleted those rows.
fn left_by(record: &KeyspaceRecord, shard: ShardId) -> u64 {
    let Some(operation) = record.operation.as_ref().filter(|_| !record.dropped) else { return 0 };
    let (OperationKind::Resize { from, to }, Phase::Committed | Phase::Clean | Phase::Done) =
        (operation.kind, operation.phase)
    else {
        return 0;
    };
    // A shard that goes loses its folder; by jump hash one that stays loses slots to new ones only.
    if to > from && shard.0 < from { operation.id } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::id::{KeyspaceId, StoreId};

    #[test]
    fn only_shards_that_stay_and_have_lost_slots_are_to_be_cleaned() {
        let before = KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(1), StoreId(2)]).unwrap();
        let fenced = before.begin_resize(3, vec![StoreId(3)]).unwrap().fence().unwrap();
        let id = fenced.operation.as_ref().unwrap().id;
        let committed = fenced.commit().unwrap();
        let clean = committed.clean().unwrap();
        let done = clean.finish().unwrap();
        for (record, left) in [
            (&before, [0, 0, 0]),
            (&fenced, [0, 0, 0]),
            (&fenced.abort("why").unwrap(), [0, 0, 0]),
            (&committed, [id, id, 0]),
            (&clean, [id, id, 0]),
            (&done, [id, id, 0]),
        ] {
            assert_eq!([0, 1, 2].map(|shard| left_by(record, ShardId(shard))), left, "{:?}", record.operation);
        }
        let smaller = before.begin_resize(1, Vec::new()).unwrap().fence().unwrap().commit().unwrap();
        assert_eq!([0, 1].map(|shard| left_by(&smaller, ShardId(shard))), [0, 0]);
    }
}
