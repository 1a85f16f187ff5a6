//! The database of one shard: its column families, reads from memory or disk, and batches of writes.

use super::garbage::{Factory, Garbage, Rules};
use super::{Engine, EngineError, Tier, compact_all_options, meta};
use rocksdb::properties;
use rocksdb::{
    Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBPinnableSlice, DBRawIterator, ErrorKind, ReadOptions, ReadTier,
    WriteBatch, WriteOptions,
};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The order fixes the column families' ids: 1, 2, 3 (0 is RocksDB's own, which stays empty).
const KEYS: &str = "keys";
const ELEMENTS: &str = "elements";
const META: &str = "meta";

pub struct Database {
    db: DB,
    garbage: Arc<Garbage>,
    saved_dropped_ns: AtomicU64,
    memory_reads: ReadOptions,
    disk_reads: ReadOptions,
    hasty_writes: WriteOptions,
    patient_writes: WriteOptions,
    synced_writes: WriteOptions,
    block_cache: Cache,
}

/// Bytes of a WriteBatch's own header and of what surrounds one row in it: capacity to ask for.
const BATCH_HEAD_BYTES: usize = 12;
const BATCH_ROW_BYTES: usize = 12;

/// Writes that reach the log together or not at all.
pub struct Writes<'d> {
    keys: &'d ColumnFamily,
    meta: &'d ColumnFamily,
    batch: WriteBatch,
}

impl Writes<'_> {
    pub fn put_row(&mut self, physical_key: &[u8], row: &[u8]) {
        self.batch.put_cf(self.keys, physical_key, row);
    }

    pub fn put_meta(&mut self, name: &[u8], value: &[u8]) {
        self.batch.put_cf(self.meta, name, value);
    }
}

impl Database {
    pub fn open(engine: &Engine, path: &Path, rules: Rules) -> Result<Self, EngineError> {
        let garbage = Arc::new(Garbage::new(rules));
        let mut keys_options = engine.keys_options.clone();
        keys_options.set_compaction_filter_factory(Factory(Arc::clone(&garbage)));
        let families = [
            ColumnFamilyDescriptor::new(rocksdb::DEFAULT_COLUMN_FAMILY_NAME, engine.small_options.clone()),
            ColumnFamilyDescriptor::new(KEYS, keys_options),
            ColumnFamilyDescriptor::new(ELEMENTS, engine.small_options.clone()),
            ColumnFamilyDescriptor::new(META, engine.small_options.clone()),
        ];
        let db = DB::open_cf_descriptors(&engine.database_options, path, families)?;
        let mut memory_reads = ReadOptions::default();
        memory_reads.set_read_tier(ReadTier::BlockCache);
        let mut hasty_writes = WriteOptions::default();
        hasty_writes.set_no_slowdown(true);
        let mut synced_writes = WriteOptions::default();
        synced_writes.set_sync(true);
        let database = Self {
            db,
            garbage,
            saved_dropped_ns: AtomicU64::new(0),
            memory_reads,
            disk_reads: ReadOptions::default(),
            hasty_writes,
            patient_writes: WriteOptions::default(),
            synced_writes,
            block_cache: engine.block_cache.clone(),
        };
        database.check_format()?;
        database.load_dropped()?;
        Ok(database)
    }

    fn check_format(&self) -> Result<(), EngineError> {
        match self.meta(meta::FORMAT)?.as_deref() {
            None => self.put_meta_synced(meta::FORMAT, &meta::FORMAT_VERSION.to_be_bytes()),
            Some(bytes) if bytes == meta::FORMAT_VERSION.to_be_bytes() => Ok(()),
            Some(bytes) => Err(EngineError::Failed(format!(
                "the shard has format version {bytes:?}, this program knows {} only",
                meta::FORMAT_VERSION
            ))),
        }
    }

    /// A crash may have lost the last note of what compaction dropped, but nothing younger than the grace was.
    fn load_dropped(&self) -> Result<(), EngineError> {
        if let Some(bytes) = self.meta(meta::DROPPED)?.as_deref().and_then(|bytes| bytes.first_chunk::<8>().copied()) {
            let noted_ns = u64::from_be_bytes(bytes);
            self.garbage.dropped(noted_ns.max(self.garbage.grace_ends_ns(crate::shard::executor::now_ns())));
            self.saved_dropped_ns.store(noted_ns, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Notes the largest dropped stamp if it has grown.
    pub fn save_dropped(&self) -> Result<(), EngineError> {
        let dropped_ns = self.garbage.dropped_ns();
        if dropped_ns > self.saved_dropped_ns.load(Ordering::Relaxed) {
            self.put_meta(meta::DROPPED, &dropped_ns.to_be_bytes(), Tier::Disk)?;
            self.saved_dropped_ns.store(dropped_ns, Ordering::Relaxed);
        }
        Ok(())
    }

    pub fn garbage(&self) -> &Garbage {
        &self.garbage
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("every column family is opened with the database and never dropped")
    }

    fn reads(&self, tier: Tier) -> &ReadOptions {
        match tier {
            Tier::Memory => &self.memory_reads,
            Tier::Disk => &self.disk_reads,
        }
    }

    /// The row of a physical key.
    pub fn get(&self, physical_key: &[u8], tier: Tier) -> Result<Option<DBPinnableSlice<'_>>, EngineError> {
        self.db.get_pinned_cf_opt(self.family(KEYS), physical_key, self.reads(tier)).map_err(read_error)
    }

    /// The rows of several physical keys, in their order.
    pub fn get_many<'k>(
        &self,
        physical_keys: impl Iterator<Item = &'k [u8]>,
        tier: Tier,
    ) -> Vec<Result<Option<DBPinnableSlice<'_>>, EngineError>> {
        let rows = self.db.batched_multi_get_cf_opt(self.family(KEYS), physical_keys, false, self.reads(tier));
        // RocksDB answers "found" with no bytes for a key whose block is not in memory; a row is never empty.
        let rows = rows.into_iter().map(|row| match row {
            Ok(Some(row)) if tier == Tier::Memory && row.is_empty() => Err(EngineError::NotInMemory),
            Ok(row) => Ok(row),
            Err(error) => Err(read_error(error)),
        });
        rows.collect()
    }

    /// An empty set of writes with room for `rows` rows of `bytes` bytes in all.
    pub fn writes(&self, rows: usize, bytes: usize) -> Writes<'_> {
        let capacity = BATCH_HEAD_BYTES + rows * BATCH_ROW_BYTES + bytes;
        Writes { keys: self.family(KEYS), meta: self.family(META), batch: WriteBatch::with_capacity_bytes(capacity) }
    }

    /// Logs and applies the writes. [`Tier::Memory`]: refuses with [`EngineError::Stalled`] rather than waiting.
    pub fn write(&self, writes: Writes<'_>, tier: Tier) -> Result<(), EngineError> {
        let options = match tier {
            Tier::Memory => &self.hasty_writes,
            Tier::Disk => &self.patient_writes,
        };
        self.db.write_opt(writes.batch, options).map_err(|error| match (error.kind(), tier) {
            (ErrorKind::Incomplete, Tier::Memory) => EngineError::Stalled,
            _ => EngineError::from(error),
        })
    }

    pub fn meta(&self, name: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.db.get_cf(self.family(META), name)?)
    }

    pub fn put_meta(&self, name: &[u8], value: &[u8], tier: Tier) -> Result<(), EngineError> {
        let mut writes = self.writes(1, name.len() + value.len());
        writes.put_meta(name, value);
        self.write(writes, tier)
    }

    pub fn put_meta_synced(&self, name: &[u8], value: &[u8]) -> Result<(), EngineError> {
        Ok(self.db.put_cf_opt(self.family(META), name, value, &self.synced_writes)?)
    }

    /// Everything written so far survives a power cut.
    pub fn sync_log(&self) -> Result<(), EngineError> {
        Ok(self.db.flush_wal(true)?)
    }

    /// Writes the memtables out, so that the next start has no log to read.
    pub fn flush(&self) -> Result<(), EngineError> {
        Ok(self.db.flush_cfs_opt(
            &[self.family(KEYS), self.family(ELEMENTS), self.family(META)],
            &rocksdb::FlushOptions::default(),
        )?)
    }

    /// Writes the memtables of `keys` out.
    pub fn write_out_memtables(&self) -> Result<(), EngineError> {
        Ok(self.db.flush_cf(self.family(KEYS))?)
    }

    /// Rewrites all files, dropping what may be dropped.
    pub fn compact(&self) {
        self.db.compact_range_cf_opt(self.family(KEYS), None::<&[u8]>, None::<&[u8]>, &compact_all_options());
    }

    /// A cursor over `keys`.
    pub fn walk(&self) -> RawWalk<'_> {
        let mut options = ReadOptions::default();
        options.set_auto_readahead_size(true);
        RawWalk { iterator: self.db.raw_iterator_cf_opt(self.family(KEYS), options) }
    }

    fn figure(&self, name: &rocksdb::properties::PropName) -> u64 {
        self.db.property_int_value_cf(self.family(KEYS), name).ok().flatten().unwrap_or(0)
    }

    pub fn estimate_keys(&self) -> u64 {
        self.figure(properties::ESTIMATE_NUM_KEYS)
    }

    pub fn disk_bytes(&self) -> u64 {
        self.figure(properties::TOTAL_SST_FILES_SIZE)
    }

    pub fn live_bytes(&self) -> u64 {
        self.figure(properties::ESTIMATE_LIVE_DATA_SIZE)
    }

    pub fn memtable_bytes(&self) -> u64 {
        self.figure(properties::CUR_SIZE_ALL_MEM_TABLES)
    }

    pub fn pending_compaction_bytes(&self) -> u64 {
        self.figure(properties::ESTIMATE_PENDING_COMPACTION_BYTES)
    }

    /// 1 while writes are stopped.
    pub fn is_write_stopped(&self) -> u64 {
        self.figure(properties::IS_WRITE_STOPPED)
    }

    /// Bytes a second that writes are slowed down to; 0 = not.
    pub fn delayed_write_rate(&self) -> u64 {
        self.figure(properties::ACTUAL_DELAYED_WRITE_RATE)
    }

    pub fn block_cache_bytes(&self) -> u64 {
        self.block_cache.get_usage() as u64
    }
}

fn read_error(error: rocksdb::Error) -> EngineError {
    match error.kind() {
        ErrorKind::Incomplete => EngineError::NotInMemory,
        _ => EngineError::from(error),
    }
}

/// A cursor over the rows of `keys` as they were when it was made.
pub struct RawWalk<'d> {
    iterator: DBRawIterator<'d>,
}

impl RawWalk<'_> {
    pub fn seek(&mut self, physical_key: &[u8]) {
        self.iterator.seek(physical_key);
    }

    pub fn next(&mut self) {
        if self.iterator.valid() {
            self.iterator.next();
        }
    }

    pub fn key(&self) -> Option<&[u8]> {
        self.iterator.key()
    }

    pub fn value(&self) -> Option<&[u8]> {
        self.iterator.value()
    }

    pub fn status(&self) -> Result<(), String> {
        self.iterator.status().map_err(|error| error.into_string())
    }
}
