//! A shard as a whole, for the commands that walk it: a narrow view of the engine.

use super::Shard;
use super::context::Failure;
use super::durability::SyncFigures;
use super::ownership::Owned;
use super::rows::{Rows, State};
use crate::command::census::{Kept, Moment};
use crate::engine::database::RawWalk;
use crate::replication::Figures;
use std::ops::Range;
use std::sync::Arc;
use vasto_proto::batch::Outcome;
use vasto_proto::row::Header;

/// One shard, as one command sees it: the rows on disk, and over them what the command's batch has written so far.
pub struct ShardView<'a> {
    shard: &'a Shard,
    now_ms: u64,
    flush_ns: u64,
    rows: &'a Rows,
    batch: &'a [u8],
    owned: Arc<Owned>,
}

impl<'a> ShardView<'a> {
    pub(super) fn new(
        shard: &'a Shard,
        now_ms: u64,
        flush_ns: u64,
        rows: &'a Rows,
        batch: &'a [u8],
        owned: Arc<Owned>,
    ) -> Self {
        Self { shard, now_ms, flush_ns, rows, batch, owned }
    }

    /// The slots of this shard in ascending order; never empty in practice, but may be with more shards than slots hash to.
    pub fn slots(&self) -> &[u16] {
        &self.owned.slots
    }

    /// Whether a client sees the row: neither deleted, nor expired, nor flushed.
    pub fn is_alive(&self, header: &Header) -> bool {
        header.is_alive(self.now_ms) && header.stamp.ns > self.flush_ns
    }

    /// Whether a FLUSHDB killed the row.
    pub fn is_flushed(&self, header: &Header) -> bool {
        header.stamp.ns <= self.flush_ns
    }

    /// A cursor over the rows of `keys` in order of their physical keys, dead rows included; not positioned yet.
    pub fn walk(&self) -> Walk<'a> {
        let mut written: Vec<(Vec<u8>, &'a [u8])> = self.rows.written(self.batch).collect();
        written.sort_unstable();
        let owned = Arc::clone(&self.owned);
        Walk { shard: self.shard, owned, disk: self.shard.database.walk(), written, next_written: 0 }
    }

    /// Whether writes are refused, since the disk is full or damaged.
    pub fn is_read_only(&self) -> bool {
        self.shard.is_read_only()
    }

    /// Rows in `keys`, dead ones included: RocksDB's estimate.
    pub fn estimate_keys(&self) -> u64 {
        self.shard.database.estimate_keys()
    }

    /// Bytes of the shard's files.
    pub fn disk_bytes(&self) -> u64 {
        self.shard.database.disk_bytes()
    }

    /// Bytes of files between physical keys; rows that are in memory only have none.
    pub fn bytes_between(&self, ranges: &[Range<Vec<u8>>]) -> Vec<u64> {
        self.shard.database.bytes_between(ranges)
    }

    /// Rows that no file has, what was overwritten included.
    pub fn memory_rows(&self) -> u64 {
        self.shard.database.memory_rows()
    }

    /// Puts into files what only memory has; an estimate can do without, so an error is left to those who write.
    pub fn write_out(&self) {
        if let Err(error) = self.shard.database.flush() {
            tracing::debug!(shard = %self.shard.key, %error, "cannot write out the memtables for an estimate");
        }
    }

    /// What a count of the rows depends on.
    pub fn moment(&self) -> Moment {
        let (sequence, flush_ns) = (self.shard.database.sequence(), self.flush_ns);
        Moment { sequence, flush_ns, ownership: self.owned.version }
    }

    /// Whether the batch has written rows that nobody else sees yet.
    pub fn has_own_writes(&self) -> bool {
        self.rows.written(self.batch).next().is_some()
    }

    pub fn kept_census(&self) -> &'a Kept {
        &self.shard.census
    }

    /// How far the copies of the shard are.
    pub fn replication(&self) -> Option<Figures> {
        self.shard.replication_figures()
    }

    pub fn durability(&self) -> SyncFigures {
        self.shard.durability.figures()
    }

    /// Expired rows that compactions have met since the shard was opened.
    pub fn rows_expired_by_compaction(&self) -> u64 {
        self.shard.database.garbage().rows_expired()
    }

    /// Tombstones that compactions have dropped since the shard was opened.
    pub fn tombstones_dropped(&self) -> u64 {
        self.shard.database.garbage().tombstones_dropped()
    }

    /// Rewrites the shard's files without its dead rows; blocks until it is done.
    pub fn compact(&self) {
        self.shard.database.compact();
    }

    pub fn memtable_bytes(&self) -> u64 {
        self.shard.database.memtable_bytes()
    }

    /// Bytes of blocks that all shards of the store share.
    pub fn block_cache_bytes(&self) -> u64 {
        self.shard.database.block_cache_bytes()
    }

    /// Keeps where a walk stopped (a small table, the oldest entries leave): `hash` names `physical_key` in a cursor.
    pub fn remember_place(&self, hash: u64, physical_key: &[u8]) {
        self.shard.places.lock().insert(hash, physical_key);
    }

    /// The physical key that [`ShardView::remember_place`] kept under this hash.
    pub fn find_place(&self, hash: u64) -> Option<Vec<u8>> {
        self.shard.places.lock().find(hash)
    }
}

/// A cursor over a shard's rows.
pub struct Walk<'a> {
    shard: &'a Shard,
    owned: Arc<Owned>,
    disk: RawWalk<'a>,
    /// Rows of the batch's own writes by physical key.
    written: Vec<(Vec<u8>, &'a [u8])>,
    next_written: usize,
}

impl Walk<'_> {
    /// Goes to the first row at or after a physical key.
    pub fn seek(&mut self, physical_key: &[u8]) {
        self.disk.seek(physical_key);
        self.next_written = self.written.partition_point(|(key, _)| key.as_slice() < physical_key);
        self.skip_slots_of_others();
    }

    /// Goes to the next row.
    pub fn next(&mut self) {
        match (self.disk.key(), self.written.get(self.next_written)) {
            (Some(disk), Some((written, _))) if disk == written.as_slice() => {
                self.disk.next();
                self.next_written += 1;
            }
            (Some(disk), Some((written, _))) if written.as_slice() < disk => self.next_written += 1,
            (None, Some(_)) => self.next_written += 1,
            (Some(_), Some(_) | None) => self.disk.next(),
            (None, None) => {}
        }
        self.skip_slots_of_others();
    }

    /// The physical key here; `None` at the end, or after an error that [`Walk::status`] tells.
    pub fn key(&self) -> Option<&[u8]> {
        match (self.disk.key(), self.written.get(self.next_written)) {
            (Some(disk), Some((written, _))) => Some(disk.min(written.as_slice())),
            (Some(disk), None) => Some(disk),
            (None, Some((written, _))) => Some(written),
            (None, None) => None,
        }
    }

    /// The row here, dead or alive.
    pub fn row(&self) -> Result<Option<(Header, &[u8])>, Failure> {
        let row = match (self.disk.key(), self.written.get(self.next_written)) {
            (Some(disk), Some((written, row))) if written.as_slice() <= disk => Some(*row),
            (None, Some((_, row))) => Some(*row),
            (Some(_), Some(_) | None) => self.disk.value(),
            (None, None) => None,
        };
        row.map(Header::decode).transpose().map_err(|error| self.unreadable(&error.to_string()))
    }

    /// Whether the walk ended because of an error.
    pub fn status(&self) -> Result<(), Failure> {
        self.disk.status().map_err(|error| self.unreadable(&error.to_string()))
    }

    fn unreadable(&self, text: &str) -> Failure {
        self.shard.note_unreadable(text);
        Failure::Refused(Outcome::NotServing, format!("shard {} cannot be read: {text}", self.shard.key))
    }

    /// Slots that the shard does not own are invisible.
    fn skip_slots_of_others(&mut self) {
        while let Some(slot) =
            self.disk.key().and_then(|key| key.first_chunk::<2>()).map(|slot| u16::from_be_bytes(*slot))
        {
            match self.owned.next_from(slot) {
                Some(own) if own == slot => return,
                Some(own) => self.disk.seek(&own.to_be_bytes()),
                None => self.disk.seek(&u16::MAX.to_be_bytes()),
            }
        }
    }
}

/// Where walks stopped: cursor hash -> physical key. Full, it forgets the oldest.
#[derive(Debug, Default)]
pub struct Places {
    entries: std::collections::VecDeque<(u64, Box<[u8]>)>,
}

/// Walks that can go on without searching; each costs a key's bytes.
const PLACES_MAX: usize = 256;

impl Places {
    fn insert(&mut self, hash: u64, physical_key: &[u8]) {
        self.entries.retain(|(other, _)| *other != hash);
        if self.entries.len() == PLACES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back((hash, physical_key.into()));
    }

    fn find(&self, hash: u64) -> Option<Vec<u8>> {
        self.entries.iter().rev().find(|(other, _)| *other == hash).map(|(_, key)| key.to_vec())
    }
}

impl Rows {
    /// Physical key and row of everything written so far.
    fn written<'r>(&'r self, batch: &'r [u8]) -> impl Iterator<Item = (Vec<u8>, &'r [u8])> {
        self.cells.iter().filter(|cell| cell.dirty).filter_map(move |cell| {
            let State::Bytes { start, length } = cell.state else { return None };
            let mut physical = Vec::new();
            vasto_proto::key::encode_key_into(&mut physical, cell.key(batch));
            Some((physical, &self.bytes[start..start + length]))
        })
    }
}
