//! The rows that one group of operations touches: as loaded, and as the group's own writes leave them.

use super::stamps::StampBlock;
use crate::engine::database::Database;
use crate::engine::{EngineError, Tier};
use hashbrown::HashTable;
use std::ops::Range;
use vasto_proto::key::encode_key_of_slot_into;
use vasto_proto::row::{Header, Stamp};
use vasto_proto::slot::slot_of;

pub type CellIndex = u32;

/// What is known of a key's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody asked yet.
    Unfetched,
    /// It must be read from disk.
    NotInMemory,
    /// There is none.
    Absent,
    /// At this place of its stripe's row cache, which does not change while the group runs.
    Cached(u32),
    /// In [`Rows::bytes`].
    Bytes { start: usize, length: usize },
    /// The key's slot belongs to another shard.
    NotOwned(u16),
    /// It could not be read.
    Broken(Box<str>),
}

/// One key of the group.
#[derive(Debug)]
pub struct Cell {
    key_start: u32,
    key_length: u32,
    pub hash: u64,
    /// Index among the locked stripes.
    pub guard: u32,
    pub state: State,
    /// Written by the group: the state goes to disk.
    pub dirty: bool,
    /// Read from RocksDB by the group: a candidate for the row cache.
    pub fetched: bool,
    /// The first operation that names it reads it; after a blind write nothing need be fetched.
    pub wanted: bool,
    /// The row cache had it when the group began.
    pub was_cached: bool,
    /// Start and length in [`Rows::physical`]; length 0 = not computed.
    physical: (u32, u32),
}

impl Cell {
    pub fn key<'b>(&self, batch: &'b [u8]) -> &'b [u8] {
        &batch[self.key_start as usize..(self.key_start + self.key_length) as usize]
    }

    /// Whether this is the cell of `key`; the same place in the batch needs no look at the bytes.
    pub fn is(&self, key: &[u8], batch: &[u8]) -> bool {
        let own = self.key(batch);
        own.len() == key.len() && (std::ptr::eq(own, key) || own == key)
    }
}

/// Scratch of the executor, kept from group to group so that the hot path allocates nothing.
#[derive(Default)]
pub struct Rows {
    pub cells: Vec<Cell>,
    /// Cells of each operation, one operation after the other, in the order of its keys.
    pub operation_cells: Vec<CellIndex>,
    /// Encoded rows: fetched and written ones.
    pub bytes: Vec<u8>,
    physical: Vec<u8>,
    table: HashTable<CellIndex>,
    undo: Vec<(CellIndex, State, bool)>,
    undo_flush: Option<Stamp>,
    pub stamps: StampBlock,
    /// The group flushed the shard: rows up to this stamp are dead.
    pub flush: Option<Stamp>,
}

/// Groups up to this many keys are searched one by one; above it a hash table finds a key's cell.
const LINEAR_CELLS_MAX: usize = 8;
/// Scratch that a rare large group left behind is given back above this size.
const KEPT_BYTES_MAX: usize = 1 << 20;

impl Rows {
    pub fn clear(&mut self) {
        if self.cells.len() > LINEAR_CELLS_MAX {
            self.table.clear();
        }
        self.cells.clear();
        self.operation_cells.clear();
        self.bytes.clear();
        self.physical.clear();
        self.undo.clear();
        self.undo_flush = None;
        self.stamps = StampBlock::default();
        self.flush = None;
        if self.bytes.capacity() > KEPT_BYTES_MAX {
            self.bytes = Vec::new();
        }
        if self.physical.capacity() > KEPT_BYTES_MAX {
            self.physical = Vec::new();
        }
        if self.table.capacity() > KEPT_BYTES_MAX / 8 {
            self.table = HashTable::new();
        }
    }

    /// The cell of a key, which must be a part of `batch`, and whether it is a new one.
    pub fn cell(&mut self, key: &[u8], hash: u64, batch: &[u8]) -> (CellIndex, bool) {
        let found = if self.cells.len() <= LINEAR_CELLS_MAX {
            self.cells.iter().position(|cell| cell.hash == hash && cell.is(key, batch)).map(|place| place as CellIndex)
        } else {
            let cells = &self.cells;
            self.table.find(hash, |cell| cells[*cell as usize].is(key, batch)).copied()
        };
        if let Some(cell) = found {
            return (cell, false);
        }
        let index = self.cells.len() as CellIndex;
        self.cells.push(Cell {
            key_start: (key.as_ptr() as usize - batch.as_ptr() as usize) as u32,
            key_length: key.len() as u32,
            hash,
            guard: 0,
            state: State::Unfetched,
            dirty: false,
            fetched: false,
            wanted: false,
            was_cached: false,
            physical: (0, 0),
        });
        let cells = &self.cells;
        if cells.len() > LINEAR_CELLS_MAX {
            let first = if cells.len() == LINEAR_CELLS_MAX + 1 { 0 } else { index };
            for cell in first..=index {
                let hash = cells[cell as usize].hash;
                self.table.insert_unique(hash, cell, |cell| cells[*cell as usize].hash);
            }
        }
        (index, true)
    }

    /// Computes the physical key of a cell; false (and the state says so) if its slot belongs to another shard.
    pub fn locate(&mut self, cell: CellIndex, batch: &[u8], owns: impl Fn(u16) -> bool) -> bool {
        let cell = &mut self.cells[cell as usize];
        if cell.physical.1 != 0 {
            // What it owned before the locks need not be what it owns now.
            let start = cell.physical.0 as usize;
            let slot = self.physical[start..].first_chunk().map_or(0, |slot| u16::from_be_bytes(*slot));
            let is_owned = owns(slot);
            if !is_owned {
                cell.state = State::NotOwned(slot);
            }
            return is_owned;
        }
        let key = cell.key(batch);
        let slot = slot_of(key);
        if !owns(slot) {
            cell.state = State::NotOwned(slot);
            return false;
        }
        let start = self.physical.len();
        encode_key_of_slot_into(&mut self.physical, slot, key);
        cell.physical = (start as u32, (self.physical.len() - start) as u32);
        true
    }

    /// The physical key of a located cell.
    pub fn physical(&self, cell: CellIndex) -> &[u8] {
        let (start, length) = self.cells[cell as usize].physical;
        &self.physical[start as usize..(start + length) as usize]
    }

    /// The physical keys of the rows that were written, all of which are located.
    pub fn written_keys(&self) -> impl Iterator<Item = &[u8]> {
        let written = (0..self.cells.len()).filter(|cell| self.cells[*cell].dirty);
        written.map(|cell| self.physical(cell as CellIndex))
    }

    /// Fetches a located cell's row.
    pub fn fetch_one(&mut self, cell: CellIndex, database: &Database, tier: Tier) {
        match database.get(self.physical(cell), tier) {
            Ok(row) => self.loaded(cell, Ok(row.as_deref()), |_| false),
            Err(error) => self.loaded(cell, Err(error), |_| false),
        }
    }

    /// Notes what RocksDB said of a cell; a row that is too large here is left to the lane.
    pub fn loaded(
        &mut self,
        cell: CellIndex,
        row: Result<Option<&[u8]>, EngineError>,
        is_too_large: impl FnOnce(&[u8]) -> bool,
    ) {
        let cell = &mut self.cells[cell as usize];
        cell.state = match row {
            Ok(Some(row)) if is_too_large(row) => State::NotInMemory,
            Ok(Some(row)) => {
                cell.fetched = true;
                let start = self.bytes.len();
                self.bytes.extend_from_slice(row);
                State::Bytes { start, length: row.len() }
            }
            Ok(None) => State::Absent,
            Err(EngineError::NotInMemory | EngineError::Stalled) => State::NotInMemory,
            Err(
                error
                @ (EngineError::Full(_) | EngineError::Disk(_) | EngineError::Corrupt(_) | EngineError::Failed(_)),
            ) => State::Broken(error.to_string().into()),
        };
    }

    /// Whether an operation's cells hold a row above so many bytes that came from RocksDB.
    pub fn has_fetched_above(&self, operation_cells: &Range<usize>, bytes: usize) -> bool {
        self.operation_cells[operation_cells.clone()].iter().any(|cell| {
            let cell = &self.cells[*cell as usize];
            cell.fetched && matches!(cell.state, State::Bytes { length, .. } if length > bytes)
        })
    }

    /// Starts an operation: what it writes from here on can be taken back.
    pub fn mark(&mut self) {
        self.undo.clear();
        self.undo_flush = self.flush;
    }

    /// Takes back what was written since the mark.
    pub fn roll_back(&mut self) {
        while let Some((cell, state, dirty)) = self.undo.pop() {
            let cell = &mut self.cells[cell as usize];
            cell.state = state;
            cell.dirty = dirty;
        }
        self.flush = self.undo_flush;
    }

    pub fn write(&mut self, cell: CellIndex, header: &Header, payload: &[u8]) {
        let start = self.bytes.len();
        header.encode_into(&mut self.bytes);
        self.bytes.extend_from_slice(payload);
        let state = State::Bytes { start, length: self.bytes.len() - start };
        let written = &mut self.cells[cell as usize];
        let before = std::mem::replace(&mut written.state, state);
        self.undo.push((cell, before, written.dirty));
        written.dirty = true;
    }
}
