//! The database of one shard: its column families, reads from memory or disk, and batches of writes.

use super::garbage::{Factory, Garbage, Rules};
use super::log_batch::Family;
use super::moved_file::{self, MovedFile, MovedFiles};
use super::tail::{Behind, Logged, Tail};
use super::{Engine, EngineError, OldLogs, Tier, compact_all_options, compact_part_options, meta, synced_mark};
use parking_lot::Mutex;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::properties;
use rocksdb::{
    Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBPinnableSlice, DBRawIterator, ErrorKind,
    IngestExternalFileOptions, Options, ReadOptions, ReadTier, WriteBatch, WriteOptions,
};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use vasto_proto::row::Stamp;
use vasto_proto::slot::SLOT_COUNT;
use vasto_proto::topology::SlotSet;

/// The order fixes the column families' ids: 1, 2, 3 (0 is RocksDB's own, which stays empty).
const KEYS: &str = "keys";
const ELEMENTS: &str = "elements";
const META: &str = "meta";

pub struct Database {
    db: DB,
    garbage: Arc<Garbage>,
    memory_reads: ReadOptions,
    disk_reads: ReadOptions,
    hasty_writes: WriteOptions,
    patient_writes: WriteOptions,
    synced_writes: WriteOptions,
    probing_writes: WriteOptions,
    block_cache: Cache,
    synced: Synced,
    tail: Tail,
    old_logs: OldLogs,
    keeps_files: Mutex<bool>,
    moved_options: Options,
}

/// How far the log is synced, by sequence numbers; 0 = not since the database was opened.
#[derive(Default)]
struct Synced {
    up_to: AtomicU64,
    /// What the log itself says of it.
    noted: AtomicU64,
    /// The last file that was taken in: the number before it and the one behind. Numbers in between need not stand in the log.
    jump: Mutex<(u64, u64)>,
}

impl Synced {
    /// What a batch shall say of it, if the log does not yet.
    fn news(&self) -> Option<u64> {
        let up_to = self.up_to.load(Ordering::Acquire);
        (up_to > self.noted.load(Ordering::Acquire)).then_some(up_to)
    }

    /// The last number that stands in the log, or one before it. A mark with a number that a file has taken would call the batch
    /// behind it synced.
    fn logged(&self, latest: impl FnOnce() -> u64) -> u64 {
        let (before, behind) = *self.jump.lock();
        let latest = latest();
        if (before..=behind).contains(&latest) { before } else { latest }
    }
}

/// Bytes of a WriteBatch's own header and of what surrounds one row in it: capacity to ask for.
const BATCH_HEAD_BYTES: usize = 12;
const BATCH_ROW_BYTES: usize = 12;

/// What who reads much once reads at a time.
const READ_AHEAD_BYTES: usize = 256 << 10;

/// A request to write memtables out that nobody has begun to carry out by then is lost.
const LOST_AFTER: Duration = Duration::from_secs(1);

const LOG_EXTENSION: &str = "log";
/// Where RocksDB puts logs that it needs no more, below the database's folder.
const ARCHIVE: &str = "archive";
/// A batch takes microseconds to be written; a turn that takes longer waits for a memtable.
const TURN_WAIT_MAX: Duration = Duration::from_millis(5);
/// After a full disk RocksDB first writes out what its memtables hold: one that is full and then some.
const ROOM_BYTES: u64 = 32 << 20;

/// Writes that reach the log together or not at all.
pub struct Writes<'d> {
    keys: &'d ColumnFamily,
    elements: &'d ColumnFamily,
    meta: &'d ColumnFamily,
    batch: WriteBatch,
    /// It changes what clients see.
    has_rows: bool,
    /// What the batch says of how far the log is synced.
    synced: Option<u64>,
}

impl Writes<'_> {
    pub fn put_row(&mut self, physical_key: &[u8], row: &[u8]) {
        self.has_rows = true;
        self.batch.put_cf(self.keys, physical_key, row);
    }

    pub fn put_meta(&mut self, name: &[u8], value: &[u8]) {
        self.has_rows |= name == meta::FLUSH;
        self.batch.put_cf(self.meta, name, value);
    }

    /// As it was logged by another copy.
    pub fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        match family {
            Family::Keys => self.put_row(key, value),
            Family::Elements => {
                self.has_rows = true;
                self.batch.put_cf(self.elements, key, value);
            }
            Family::Meta => self.put_meta(key, value),
            Family::Default => {}
        }
    }

    /// As it was logged by another copy.
    pub fn delete(&mut self, family: Family, key: &[u8]) {
        let family = match family {
            Family::Keys => self.keys,
            Family::Elements => self.elements,
            Family::Meta => self.meta,
            Family::Default => return,
        };
        self.has_rows = true;
        self.batch.delete_cf(family, key);
    }

    /// As it was logged by another copy, or for [`Writes::delete_slots`]: all keys from `begin` on and below `end`.
    pub fn delete_range(&mut self, family: Family, begin: &[u8], end: &[u8]) {
        let family = match family {
            Family::Keys => self.keys,
            Family::Elements => self.elements,
            Family::Meta => self.meta,
            Family::Default => return,
        };
        self.has_rows = true;
        self.batch.delete_range_cf(family, begin, end);
    }

    /// All rows of these slots, whatever they are. What the batch says before this is deleted too, what it says behind it stays.
    pub fn delete_slots(&mut self, slots: &SlotSet) {
        for run in slots.runs() {
            let (begin, end) = (run.start.to_be_bytes(), run.end.to_be_bytes());
            self.delete_range(Family::Keys, &begin, &end);
            self.delete_range(Family::Elements, &begin, &end);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }
}

impl Database {
    pub fn open(engine: &Engine, path: &Path, rules: Rules, old_logs: OldLogs) -> Result<Self, EngineError> {
        super::log_files::check(path)?;
        remove_moved(path)?;
        let options = match old_logs {
            OldLogs::Deleted => &engine.database_options,
            OldLogs::Archived => &engine.archiving_options,
        };
        let garbage = Arc::new(Garbage::new(rules));
        let mut keys_options = engine.keys_options.clone();
        keys_options.set_compaction_filter_factory(Factory(Arc::clone(&garbage)));
        let families = [
            ColumnFamilyDescriptor::new(rocksdb::DEFAULT_COLUMN_FAMILY_NAME, engine.small_options.clone()),
            ColumnFamilyDescriptor::new(KEYS, keys_options),
            ColumnFamilyDescriptor::new(ELEMENTS, engine.small_options.clone()),
            ColumnFamilyDescriptor::new(META, engine.small_options.clone()),
        ];
        let db = DB::open_cf_descriptors(options, path, families)
            .map_err(|error| super::log_files::opening_error(path, error))?;
        let mut memory_reads = ReadOptions::default();
        memory_reads.set_read_tier(ReadTier::BlockCache);
        let mut hasty_writes = WriteOptions::default();
        hasty_writes.set_no_slowdown(true);
        let mut synced_writes = WriteOptions::default();
        synced_writes.set_sync(true);
        let mut probing_writes = WriteOptions::default();
        probing_writes.set_sync(true);
        probing_writes.set_no_slowdown(true);
        let database = Self {
            db,
            garbage,
            memory_reads,
            disk_reads: ReadOptions::default(),
            hasty_writes,
            patient_writes: WriteOptions::default(),
            synced_writes,
            probing_writes,
            block_cache: engine.block_cache.clone(),
            synced: Synced::default(),
            tail: Tail::default(),
            old_logs,
            keeps_files: Mutex::new(false),
            moved_options: engine.moved_options.clone(),
        };
        database.take_format(path)?;
        database.garbage.arm();
        Ok(database)
    }

    /// Checks the format, brings an older one up to ours and loads what tombstones were dropped.
    fn take_format(&self, path: &Path) -> Result<(), EngineError> {
        let path = path.display();
        let found = match self.meta(meta::FORMAT)?.as_deref() {
            None => return self.put_meta_synced(meta::FORMAT, &meta::FORMAT_VERSION.to_be_bytes()),
            Some(bytes) => bytes.try_into().map(u32::from_be_bytes).map_err(|_| {
                EngineError::Failed(format!("the shard in {path} has a format version of {} bytes", bytes.len()))
            })?,
        };
        if found > meta::FORMAT_VERSION {
            return Err(EngineError::Failed(format!(
                "the shard in {path} has format version {found}; this program knows {} and older",
                meta::FORMAT_VERSION
            )));
        }
        let noted = self.meta(meta::DROPPED)?;
        let noted_ns = noted.as_deref().and_then(|bytes| bytes.first_chunk::<8>().copied()).map(u64::from_be_bytes);
        if let Some(noted_ns) = noted_ns {
            self.garbage.may_drop_up_to(noted_ns);
        }
        if found < meta::FORMAT_VERSION {
            // Version 1 noted what it had dropped up to a second later, but dropped nothing younger than the grace.
            if noted_ns.is_some() {
                self.note_dropped(self.garbage.grace_ends_ns(crate::shard::executor::now_ns()), Tier::Disk)?;
            }
            self.put_meta_synced(meta::FORMAT, &meta::FORMAT_VERSION.to_be_bytes())?;
        }
        Ok(())
    }

    /// Allows tombstones up to this event time to leave, once the disk knows. A synced write would hold up all others.
    fn note_dropped(&self, ns: u64, tier: Tier) -> Result<(), EngineError> {
        self.put_meta(meta::DROPPED, &ns.max(self.garbage.dropped_ns()).to_be_bytes(), tier)?;
        self.sync_log()?;
        self.garbage.may_drop_up_to(ns);
        Ok(())
    }

    /// Lets the tombstones go that compactions have met since the last call and that only waited for this note; says whether there
    /// were any. They leave with the next compaction that meets them.
    pub fn release_tombstones(&self, tier: Tier) -> Result<bool, EngineError> {
        let Some(wanted_ns) = self.garbage.wanted_ns() else { return Ok(false) };
        self.note_dropped(wanted_ns, tier)?;
        Ok(true)
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
        let capacity = BATCH_HEAD_BYTES + BATCH_ROW_BYTES + synced_mark::MARK_BYTES + rows * BATCH_ROW_BYTES + bytes;
        let mut batch = WriteBatch::with_capacity_bytes(capacity);
        let synced = self.synced.news();
        if let Some(sequence) = synced {
            batch.put_log_data(synced_mark::encode(sequence));
        }
        let (keys, elements, meta) = (self.family(KEYS), self.family(ELEMENTS), self.family(META));
        Writes { keys, elements, meta, batch, has_rows: false, synced }
    }

    /// Logs and applies the writes. [`Tier::Memory`]: refuses with [`EngineError::Stalled`] rather than waiting.
    pub fn write(&self, writes: Writes<'_>, tier: Tier) -> Result<(), EngineError> {
        let options = match tier {
            Tier::Memory => &self.hasty_writes,
            Tier::Disk => &self.patient_writes,
        };
        self.log(writes.batch, writes.has_rows, options, tier)?;
        if let Some(sequence) = writes.synced {
            self.synced.noted.fetch_max(sequence, Ordering::AcqRel);
        }
        Ok(())
    }

    /// As [`Database::write`]; synced when it returns.
    pub fn write_synced(&self, writes: Writes<'_>) -> Result<(), EngineError> {
        self.synced_by(|_| self.log(writes.batch, writes.has_rows, &self.synced_writes, Tier::Disk))?;
        if let Some(sequence) = writes.synced {
            self.synced.noted.fetch_max(sequence, Ordering::AcqRel);
        }
        Ok(())
    }

    /// The one place where batches enter the log, in turn if copies follow it.
    fn log(&self, batch: WriteBatch, has_rows: bool, options: &WriteOptions, tier: Tier) -> Result<(), EngineError> {
        let write = |batch| {
            self.db.write_opt(batch, options).map_err(|error| match (error.kind(), tier) {
                (ErrorKind::Incomplete, Tier::Memory) => EngineError::Stalled,
                _ => EngineError::from(error),
            })
        };
        if !self.tail.is_on() {
            return write(batch);
        }
        let turn = match tier {
            Tier::Memory => self.tail.ring.try_lock_for(TURN_WAIT_MAX),
            Tier::Disk => Some(self.tail.ring.lock()),
        };
        let Some(mut ring) = turn else { return Err(EngineError::Stalled) };
        let (data, count) = (batch.data().to_vec(), batch.len() as u64);
        let before = self.sequence();
        write(batch)?;
        let last = self.sequence();
        if last == before + count && count > 0 {
            self.tail.wrote(&mut ring, Logged::new(before + 1, last, data), has_rows);
        } else if last > before {
            // Something from before the tail was on came in between: the files have it in its order.
            ring.clear();
        }
        Ok(())
    }

    /// Takes a file of rows into `keys`; nobody may have written to any of its keys since they were deleted last. They are in no log: no
    /// copy may follow, and none that follows later may start before this. False, and nothing is taken, if memtables have keys between them: RocksDB would hold up all writers until those
    /// are written out, and for good if it forgets that ([`Database::asking_again`]).
    pub fn ingest(&self, file: &MovedFile) -> Result<bool, EngineError> {
        assert!(!self.tail.is_on(), "copies that follow the log would never hear of these rows");
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        options.set_allow_blocking_flush(false);
        // The file takes a number of its own if older files or memtables overlap with it.
        let mut jump = self.synced.jump.lock();
        let before = self.sequence();
        let ingested = self.db.ingest_external_file_cf_opts(self.family(KEYS), &options, vec![file.path()]);
        let behind = self.sequence();
        if behind > before {
            *jump = (before, behind);
        }
        match ingested {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::InvalidArgument => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// How files for [`Database::ingest`] are written.
    pub fn moved_files(&self) -> MovedFiles {
        MovedFiles { options: self.moved_options.clone(), folder: self.db.path().to_owned() }
    }

    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Batches of the log behind number `after`, up to about `bytes_max` bytes: from memory if they are there, else from the files.
    /// [`Behind::Older`]: they are gone.
    pub fn log_behind(&self, after: u64, bytes_max: usize) -> Result<Behind, EngineError> {
        let in_memory = self.tail.ring.lock().behind(after, self.sequence(), bytes_max);
        if in_memory != Behind::Older {
            return Ok(in_memory);
        }
        let (mut batches, mut bytes, mut next) = (Vec::new(), 0, after + 1);
        self.walk_log(after, |logged| {
            if logged.first != next {
                return ControlFlow::Break(());
            }
            next = logged.last + 1;
            bytes += logged.data.len();
            batches.push(logged);
            if bytes < bytes_max { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(if batches.is_empty() { Behind::Older } else { Behind::Batches(batches) })
    }

    /// Shows the batches in the log's files whose first number is above `after`, those in order that are still there: whether they follow
    /// each other is for the caller to see. RocksDB's iterator says the same for the end and for a gap.
    pub fn walk_log(&self, after: u64, mut visit: impl FnMut(Logged) -> ControlFlow<()>) -> Result<(), EngineError> {
        // It refuses a number that was not given yet.
        if after >= self.sequence() {
            return Ok(());
        }
        let mut batches = match self.db.get_updates_since(after) {
            Ok(batches) => batches,
            Err(error) => {
                tracing::debug!(%error, after, "the log cannot be read from here");
                return Ok(());
            }
        };
        for batch in &mut batches {
            let (_, batch) = batch?;
            let Some(logged) = Logged::read(batch.data().to_vec().into()) else { continue };
            if visit(logged).is_break() {
                return Ok(());
            }
        }
        if let Err(error) = batches.status() {
            tracing::debug!(%error, after, "the log ends here");
        }
        Ok(())
    }

    /// Keeps all files, old logs among them, while a copy is being made of a database that was opened when it had none; or no longer.
    pub fn keep_files(&self, wanted: bool) -> Result<(), EngineError> {
        let mut keeps = self.keeps_files.lock();
        let wanted = wanted && self.old_logs == OldLogs::Deleted;
        if wanted != *keeps {
            if wanted {
                self.db.disable_file_deletions()?
            } else {
                self.db.enable_file_deletions()?
            }
            *keeps = wanted;
        }
        Ok(())
    }

    /// Deletes the oldest logs that RocksDB needs no more until those left have no more than `bytes_max` bytes.
    pub fn shorten_log(&self, bytes_max: u64) -> io::Result<()> {
        let entries = match fs::read_dir(self.db.path().join(ARCHIVE)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut logs: Vec<(u64, u64, PathBuf)> = Vec::new();
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            let number = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            if let Some(number) = number {
                logs.push((number, entry.metadata().map_or(0, |metadata| metadata.len()), path));
            }
        }
        logs.sort_unstable();
        let mut bytes: u64 = logs.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, length, path) in logs {
            if bytes <= bytes_max {
                break;
            }
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            bytes -= length;
        }
        Ok(())
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        self.db.path()
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
        let mut writes = self.writes(1, name.len() + value.len());
        writes.put_meta(name, value);
        self.write_synced(writes)
    }

    /// Finds out whether the disk takes writes again: one that is synced and waits for nothing.
    pub fn probe(&self) -> Result<(), EngineError> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(META), meta::PROBE, []);
        self.log(batch, false, &self.probing_writes, Tier::Memory)
    }

    /// Everything written so far survives a power cut.
    pub fn sync_log(&self) -> Result<(), EngineError> {
        self.synced_by(|db| Ok(db.flush_wal(true)?))
    }

    /// What was written before a call that syncs the log is synced when it has succeeded.
    fn synced_by(&self, sync: impl FnOnce(&DB) -> Result<(), EngineError>) -> Result<(), EngineError> {
        let sequence = self.synced.logged(|| self.sequence());
        sync(&self.db)?;
        self.synced.up_to.fetch_max(sequence, Ordering::AcqRel);
        Ok(())
    }

    /// Lets the log say how far it is synced if no write has since: what was written before a pause is then told from what a power cut
    /// left.
    pub fn note_synced(&self) -> Result<(), EngineError> {
        let Some(sequence) = self.synced.news() else { return Ok(()) };
        self.put_meta(meta::SYNCED, &sequence.to_be_bytes(), Tier::Memory)
    }

    /// As [`Database::sync_log`], through descriptors of our own: RocksDB gives the whole database up when it is asked to sync a log
    /// of which it could not write the last record, as when the disk is full.
    pub fn sync_log_files(&self) -> Result<(), EngineError> {
        let sync = || -> io::Result<()> {
            for entry in fs::read_dir(self.db.path())? {
                let path = entry?.path();
                if path.extension().is_none_or(|extension| extension != LOG_EXTENSION) {
                    continue;
                }
                match File::open(&path) {
                    Ok(file) => file.sync_data()?,
                    // A log whose rows have been written out meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            File::open(self.db.path())?.sync_all()
        };
        sync()
            .map_err(|error| EngineError::Disk(format!("cannot sync the log in {}: {error}", self.db.path().display())))
    }

    /// Whether the disk has room for what RocksDB must write to go on after it was full.
    pub fn has_room(&self) -> bool {
        // Asked by taking it: what a quota or the file system keep back is not in any figure.
        let path = self.db.path().join("room");
        let Ok(file) = File::create(&path).and_then(|file| fs::remove_file(&path).map(|()| file)) else { return false };
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, ROOM_BYTES) {
            Ok(()) => true,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let disk = rustix::fs::statvfs(self.db.path());
                disk.is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= ROOM_BYTES)
            }
            Err(_) => false,
        }
    }

    /// Ends flushes and compactions, for good: the database is about to be closed.
    pub fn stop_background_work(&self) {
        self.db.cancel_all_background_work(false);
    }

    /// Writes the memtables out, so that the next start has no log to read.
    pub fn flush(&self) -> Result<(), EngineError> {
        let families = [self.family(KEYS), self.family(ELEMENTS), self.family(META)];
        Ok(self.asking_again(|| self.db.flush_cfs_opt(&families, &rocksdb::FlushOptions::default()))?)
    }

    /// Does what waits inside RocksDB until memtables are written out. RocksDB may lose a request for that: one that comes while older
    /// memtables are about to be written out is taken for done with them, and fewer than it gathers are then left as they are
    /// (`MemTableList::PickMemtablesToFlush`). Another request wakes whoever waits.
    fn asking_again<T>(&self, work: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            let (working, ends) = mpsc::channel::<()>();
            scope.spawn(move || {
                while let Err(RecvTimeoutError::Timeout) = ends.recv_timeout(LOST_AFTER) {
                    self.ask_again();
                }
            });
            let done = work();
            drop(working);
            done
        })
    }

    /// Has memtables written out that wait and that nobody is writing out.
    fn ask_again(&self) {
        let mut options = rocksdb::FlushOptions::default();
        options.set_wait(false);
        for name in [KEYS, ELEMENTS, META] {
            let family = self.family(name);
            let figure = |name| self.db.property_int_value_cf(family, name).ok().flatten().unwrap_or(0);
            let is_at_it =
                figure(properties::NUM_RUNNING_FLUSHES) > 0 || figure(properties::MEM_TABLE_FLUSH_PENDING) > 0;
            if !is_at_it
                && figure(properties::NUM_IMMUTABLE_MEM_TABLE) > 0
                && let Err(error) = self.db.flush_cf_opt(family, &options)
            {
                // Whoever waits hears it too.
                tracing::debug!(%error, "memtables cannot be written out");
            }
        }
    }

    /// Writes the memtables of `keys` out.
    pub fn write_out_memtables(&self) -> Result<(), EngineError> {
        Ok(self.asking_again(|| self.db.flush_cf(self.family(KEYS)))?)
    }

    /// Copies the database as it is now into a folder that does not exist yet; tables become hard links.
    pub fn checkpoint(&self, path: &Path) -> Result<(), EngineError> {
        let checkpoint = Checkpoint::new(&self.db)?;
        Ok(self.asking_again(|| checkpoint.create_checkpoint(path))?)
    }

    /// Rewrites all files, dropping what may be dropped; twice if tombstones may go that nobody had noted. The log is cut too: it has
    /// what the files lose, and the small column families would hold it back.
    pub fn compact(&self) {
        let rewrite =
            || self.db.compact_range_cf_opt(self.family(KEYS), None::<&[u8]>, None::<&[u8]>, &compact_all_options());
        self.asking_again(rewrite);
        match self.release_tombstones(Tier::Disk) {
            Ok(true) => self.asking_again(rewrite),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot note which tombstones may go; they stay for now"),
        }
        if let Err(error) = self.flush() {
            tracing::warn!(%error, "cannot write the memtables out; the log keeps its length");
        }
    }

    /// Those of the slots that have rows, dead ones included.
    pub fn slots_with_rows(&self, slots: &SlotSet) -> Result<SlotSet, EngineError> {
        let (mut walk, mut found) = (self.walk(), SlotSet::default());
        for run in slots.runs() {
            let mut next = run.start;
            while next < run.end {
                walk.seek(&next.to_be_bytes());
                let slot = walk.key().and_then(|key| key.first_chunk()).map(|slot| u16::from_be_bytes(*slot));
                let Some(slot) = slot.filter(|slot| *slot < run.end) else { break };
                found.insert(slot);
                next = slot + 1;
            }
        }
        walk.status()?;
        Ok(found)
    }

    /// Rewrites the files that have keys of these slots, without what was deleted. Memtables must have been written out.
    pub fn compact_slots(&self, slots: Range<u16>) {
        let begin = slots.start.to_be_bytes();
        // The last slot of all ends where there is nothing more.
        let end = (slots.end < SLOT_COUNT).then(|| slots.end.to_be_bytes());
        for family in [KEYS, ELEMENTS] {
            let family = self.family(family);
            self.asking_again(|| self.db.compact_range_cf_opt(family, Some(begin), end, &compact_part_options()));
        }
    }

    /// The rows behind the last batch of the log. Of the batches that copies follow each is in the log before or after it.
    pub fn still(&self) -> Result<Still<'_>, EngineError> {
        let _turn = self.tail.ring.lock();
        let flush = self.meta(meta::FLUSH)?;
        let flush_ns = flush.as_deref().and_then(Stamp::from_bytes).map_or(0, |stamp| stamp.ns);
        Ok(Still { sequence: self.sequence(), flush_ns, walk: self.walk() })
    }

    /// A cursor over `keys`.
    pub fn walk(&self) -> RawWalk<'_> {
        let mut options = ReadOptions::default();
        options.set_auto_readahead_size(true);
        RawWalk { iterator: self.db.raw_iterator_cf_opt(self.family(KEYS), options) }
    }

    /// A cursor over `keys` for who reads much once: it reads ahead, and leaves the cache to others.
    pub fn walk_apart(&self) -> RawWalk<'_> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(READ_AHEAD_BYTES);
        RawWalk { iterator: self.db.raw_iterator_cf_opt(self.family(KEYS), options) }
    }

    fn figure(&self, name: &rocksdb::properties::PropName) -> u64 {
        self.db.property_int_value_cf(self.family(KEYS), name).ok().flatten().unwrap_or(0)
    }

    pub fn estimate_keys(&self) -> u64 {
        self.figure(properties::ESTIMATE_NUM_KEYS)
    }

    /// Rows in memtables, what was overwritten included.
    pub fn memory_rows(&self) -> u64 {
        self.figure(properties::NUM_ENTRIES_ACTIVE_MEM_TABLE) + self.figure(properties::NUM_ENTRIES_IMM_MEM_TABLES)
    }

    pub fn disk_bytes(&self) -> u64 {
        self.figure(properties::TOTAL_SST_FILES_SIZE)
    }

    /// Bytes of files between physical keys, to a block or so for each file; rows that are in memory only have none.
    pub fn bytes_between(&self, ranges: &[Range<Vec<u8>>]) -> Vec<u64> {
        let ranges: Vec<rocksdb::Range<'_>> =
            ranges.iter().map(|range| rocksdb::Range::new(&range.start, &range.end)).collect();
        self.db.get_approximate_sizes_cf(self.family(KEYS), &ranges)
    }

    /// The number of the last write; each row has its own.
    pub fn sequence(&self) -> u64 {
        self.db.latest_sequence_number()
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

/// Deletes files that were not taken in before the end came.
fn remove_moved(folder: &Path) -> Result<(), EngineError> {
    let remove = || -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == moved_file::EXTENSION) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    };
    remove().map_err(|error| EngineError::Disk(format!("cannot clear {}: {error}", folder.display())))
}

fn read_error(error: rocksdb::Error) -> EngineError {
    match error.kind() {
        ErrorKind::Incomplete => EngineError::NotInMemory,
        _ => EngineError::from(error),
    }
}

/// What a database held at one place of its log.
pub struct Still<'d> {
    pub sequence: u64,
    /// Rows with an event time up to this are dead.
    pub flush_ns: u64,
    pub walk: RawWalk<'d>,
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

    pub fn status(&self) -> Result<(), EngineError> {
        Ok(self.iterator.status()?)
    }
}
