//! Applies what a primary has logged: in order, without a gap, together with the position that it leads to.

use super::history::History;
use crate::config::Fsync;
use crate::engine::database::Database;
use crate::engine::log_batch::{Change, Family, LogBatch, Malformed};
use crate::engine::tail::Logged;
use crate::engine::{EngineError, Tier, meta};
use crate::resize::note::Note;
use crate::shard::Shard;
use crate::shard::durability::Synced;
use crate::shard::stripes::{Patience, StripeGuard, StripeSet, Stripes};
use smallvec::SmallVec;
use std::collections::HashMap;
use std::ops::ControlFlow;
use thiserror::Error;
use vasto_proto::row::Stamp;
use vasto_proto::slot::{SLOT_COUNT, slot_of};
use vasto_proto::topology::{Era, Position, SlotSet};

/// Bytes of the slot in front of a user's key.
const SLOT_BYTES: usize = 2;
const GUARDS_INLINE: usize = 64;

/// Why a part of the log was not applied.
#[derive(Debug, Error)]
pub enum ApplyError {
    #[error("the log goes on with {found} behind {after}")]
    Gap { after: u64, found: u64 },
    /// The shard must be copied anew.
    #[error("the log has an entry that nobody here writes")]
    Foreign,
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the log could not be synced")]
    NotSynced,
}

/// Where a follower stands in its primary's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// The last number of the primary's log that is applied.
    pub after: u64,
    /// The primary led when it wrote there, in this era; else what it wrote as a follower carries positions.
    pub led: Option<Era>,
    pub position: Position,
}

/// What a part of the log comes to.
#[derive(Default)]
struct Gathered<'b> {
    /// Of `keys` and `elements`, in their order: rows and deletions of whole slots.
    changes: Vec<Change<'b>>,
    has_deletions: bool,
    stamps: Option<&'b [u8]>,
    foreign: Option<Note>,
    flush: Option<Stamp>,
    history: Option<(History, &'b [u8])>,
}

impl Cursor {
    /// Reads batches and moves on behind them.
    fn gather<'b>(&mut self, batches: &'b [Logged]) -> Result<Gathered<'b>, ApplyError> {
        let mut gathered = Gathered::default();
        for batch in batches {
            if batch.first != self.after + 1 {
                return Err(ApplyError::Gap { after: self.after, found: batch.first });
            }
            let (mut carried, mut history) = (None, None);
            for change in LogBatch::parse(&batch.data).ok_or(ApplyError::Foreign)?.changes() {
                let change = change.map_err(|_: Malformed| ApplyError::Foreign)?;
                let (family, key, value) = match change {
                    Change::Put { family, key, value } => (family, key, value),
                    Change::DeleteRange { family: Family::Keys | Family::Elements, begin, end }
                        if begin.len() == SLOT_BYTES && end.len() == SLOT_BYTES =>
                    {
                        gathered.changes.push(change);
                        gathered.has_deletions = true;
                        continue;
                    }
                    Change::Delete { .. } | Change::DeleteRange { .. } => return Err(ApplyError::Foreign),
                };
                match family {
                    Family::Keys if key.len() >= SLOT_BYTES => gathered.changes.push(change),
                    Family::Elements => gathered.changes.push(change),
                    Family::Keys | Family::Default => return Err(ApplyError::Foreign),
                    Family::Meta if key == meta::FOREIGN => {
                        gathered.foreign = Some(Note::from_bytes(value).ok_or(ApplyError::Foreign)?);
                    }
                    Family::Meta if key == meta::STAMPS => gathered.stamps = Some(value),
                    Family::Meta if key == meta::FLUSH => {
                        let flush = Stamp::from_bytes(value).ok_or(ApplyError::Foreign)?;
                        gathered.flush = gathered.flush.max(Some(flush));
                    }
                    Family::Meta if key == meta::POSITION => carried = Position::from_bytes(value),
                    Family::Meta if key == meta::HISTORY => {
                        history = Some((History::from_bytes(value).ok_or(ApplyError::Foreign)?, value));
                    }
                    // The other store's own affairs.
                    Family::Meta => {}
                }
            }
            self.after = batch.last;
            let reached = match (&carried, &history, self.led) {
                (Some(position), _, _) => {
                    self.led = None;
                    Some(*position)
                }
                (None, Some((history, _)), _) => {
                    self.led = history.last().map(|entry| entry.era);
                    self.led.map(|era| Position { era, sequence: batch.last })
                }
                (None, None, Some(era)) => Some(Position { era, sequence: batch.last }),
                (None, None, None) => None,
            };
            // What was applied before and comes again does not take the copy back.
            self.position = reached.map_or(self.position, |reached| reached.max(self.position));
            gathered.history = history.or(gathered.history);
        }
        Ok(gathered)
    }
}

/// Applies batches of the primary's log as one write and moves the cursor on. Blocks on the disk.
pub fn apply(stripes: &Stripes, shard: &Shard, cursor: &mut Cursor, batches: &[Logged]) -> Result<(), ApplyError> {
    let mut moved = *cursor;
    let gathered = moved.gather(batches)?;
    let bytes: usize = batches.iter().map(|batch| batch.data.len()).sum();
    let mut writes = shard.database.writes(gathered.changes.len() + 4, bytes + 256);
    let mut set = StripeSet::default();
    let hash = |key: &[u8]| stripes.hash(shard.instance, &key[SLOT_BYTES..]);
    // Of a key that is written twice the last row counts; what is deleted behind it is nowhere.
    let mut last: HashMap<&[u8], &[u8]> = HashMap::new();
    for change in &gathered.changes {
        match *change {
            Change::Put { family, key, value } => {
                writes.put(family, key, value);
                if family == Family::Keys {
                    last.insert(key, value);
                    set.add(hash(key));
                }
            }
            Change::DeleteRange { family, begin, end } => {
                writes.delete_range(family, begin, end);
                if family == Family::Keys {
                    last.retain(|key, _| !is_between(key, begin, end));
                }
            }
            // None of these was gathered.
            Change::Delete { .. } => return Err(ApplyError::Foreign),
        }
    }
    if gathered.has_deletions {
        set.add_all();
    }
    if let Some(note) = &gathered.foreign {
        writes.put_meta(meta::FOREIGN, &note.to_bytes());
    }
    if let Some(bound) = gathered.stamps {
        writes.put_meta(meta::STAMPS, &shard.stamps.adopt(bound).ok_or(ApplyError::Foreign)?);
    }
    if let Some(stamp) = gathered.flush {
        writes.put_meta(meta::FLUSH, &stamp.to_bytes());
        set.add_all();
    }
    if let Some((_, bytes)) = &gathered.history {
        writes.put_meta(meta::HISTORY, bytes);
    }
    if moved.position != cursor.position {
        writes.put_meta(meta::POSITION, &moved.position.to_bytes());
    }
    if !writes.is_empty() {
        let mut guards: SmallVec<[StripeGuard<'_>; GUARDS_INLINE]> = SmallVec::new();
        set.lock(stripes, Patience::Unbounded, &mut guards);
        shard.database.write(writes, Tier::Disk).inspect_err(|error| shard.meet(error))?;
        if let Some(stamp) = gathered.flush {
            shard.database.garbage().flushed(stamp.ns);
        }
        if gathered.has_deletions {
            let mut deleted = SlotSet::default();
            for change in &gathered.changes {
                let Change::DeleteRange { family: Family::Keys, begin, end } = *change else { continue };
                let slot = |key: &[u8]| key.first_chunk().map_or(0, |slot| u16::from_be_bytes(*slot)).min(SLOT_COUNT);
                (slot(begin)..slot(end)).for_each(|slot| deleted.insert(slot));
            }
            guards.iter_mut().for_each(|guard| guard.cache.keep(shard.instance, |key| !deleted.contains(slot_of(key))));
        }
        if let Some(note) = gathered.foreign {
            shard.takes.noted(&shard.database, note);
        }
        for (key, row) in last {
            let hash = hash(key);
            let cache = &mut guards[set.position(hash) as usize].cache;
            cache.update(hash, shard.instance, &key[SLOT_BYTES..], row);
        }
        shard.durability.wrote();
        let mut state = shard.replication.state.lock();
        state.noted = Some(moved.position);
        if let Some((history, _)) = gathered.history {
            state.history = history;
        }
    }
    *cursor = moved;
    match shard.durability.fsync() {
        Fsync::Always => match shard.sync() {
            Synced::Done => Ok(()),
            Synced::Not => Err(ApplyError::NotSynced),
        },
        Fsync::EverySecond | Fsync::Never => Ok(()),
    }
}

fn is_between(key: &[u8], begin: &[u8], end: &[u8]) -> bool {
    begin <= key && key < end
}

/// Where in this copy's own log a position lies that it wrote as a follower: behind the batch that carries it, or the last one before it.
/// `None` if the log is gone.
pub fn find_carried(database: &Database, wanted: Position) -> Result<Option<u64>, EngineError> {
    let mut found = None;
    database.walk_log(0, |logged| {
        let Some(carried) = carried(&logged) else { return ControlFlow::Continue(()) };
        if carried > wanted {
            return ControlFlow::Break(());
        }
        if carried.era == wanted.era {
            found = Some(logged.last);
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

fn carried(logged: &Logged) -> Option<Position> {
    let changes = LogBatch::parse(&logged.data)?.changes();
    let mut position = None;
    for change in changes.flatten() {
        if let Change::Put { family: Family::Meta, key, value } = change
            && key == meta::POSITION
        {
            position = Position::from_bytes(value);
        }
    }
    position
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::history::Entry;
    use vasto_proto::id::Epoch;

    const KEYS: u8 = 1;
    const META: u8 = 3;

    fn at(epoch: u64, opened: u64, sequence: u64) -> Position {
        Position { era: Era { epoch: Epoch(epoch), opened }, sequence }
    }

    /// A batch as RocksDB logs it.
    fn batch(first: u64, entries: &[(u8, &[u8], &[u8])]) -> Logged {
        let mut data = first.to_le_bytes().to_vec();
        data.extend_from_slice(&(entries.len() as u32).to_le_bytes());
        for (family, key, value) in entries {
            data.extend_from_slice(&[0x5, *family, key.len() as u8]);
            data.extend_from_slice(key);
            data.push(value.len() as u8);
            data.extend_from_slice(value);
        }
        Logged::read(data.into()).unwrap()
    }

    #[test]
    fn a_follower_is_in_an_era_only_with_the_note_of_its_beginning() {
        // The primary of era 3.1 had followed era 1.1 to 90, in its own log at 300; this follower has 1.1 to 80, there at 280.
        let mut history = History::default();
        let parent = Some(at(1, 1, 90));
        history.push(Entry { era: at(3, 1, 0).era, log: 8, start: 301, floor_ns: 7, parent });
        let history = history.to_bytes();
        let carried = |sequence| at(1, 1, sequence).to_bytes();
        let log = [
            batch(281, &[(KEYS, b"00a", b"row"), (META, meta::POSITION, &carried(85))]),
            // The follower that it was noted what it had synced.
            batch(283, &[(META, meta::SYNCED, &[0; 8])]),
            batch(284, &[(KEYS, b"00b", b"row"), (META, meta::POSITION, &carried(90))]),
            batch(286, &[(META, meta::HISTORY, &history), (META, meta::LOG_ID, &[0; 8])]),
            batch(288, &[(KEYS, b"00c", b"row")]),
        ];
        let mut cursor = Cursor { after: 280, led: None, position: at(1, 1, 80) };
        let mut positions = Vec::new();
        for batch in &log {
            cursor.gather(std::slice::from_ref(batch)).unwrap();
            positions.push(cursor.position);
        }
        assert_eq!(positions, [at(1, 1, 85), at(1, 1, 85), at(1, 1, 90), at(3, 1, 287), at(3, 1, 288)]);
        // What comes again does not take it back, and in one part it ends the same.
        let mut again = Cursor { after: 280, led: None, position: at(1, 1, 88) };
        again.gather(&log[..1]).unwrap();
        assert_eq!(again.position, at(1, 1, 88));
        let gathered = again.gather(&log[1..]).unwrap();
        assert_eq!((again, gathered.changes.len(), gathered.history.is_some()), (cursor, 2, true));
    }

    #[test]
    fn a_gap_and_a_foreign_entry_are_not_applied() {
        let mut cursor = Cursor { after: 4, led: None, position: at(1, 1, 4) };
        let late = batch(6, &[(KEYS, b"00a", b"row")]);
        assert!(matches!(cursor.gather(&[late]), Err(ApplyError::Gap { after: 4, found: 6 })));
        let of_another_family = batch(5, &[(0, b"00a", b"row")]);
        assert!(matches!(cursor.gather(&[of_another_family]), Err(ApplyError::Foreign)));
    }
}
