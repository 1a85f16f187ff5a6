//! The only user of RocksDB: what all shards of a store share, and how one shard's database is opened.

mod changed_value;
pub mod crc32c;
pub mod database;
pub mod error;
pub mod garbage;
pub mod log_batch;
mod log_files;
pub mod meta;
pub mod moved_file;
mod synced_mark;
pub mod tail;
#[cfg(test)]
mod tests;

use crate::config::Config;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, CompactOptions, DBCompressionType, DBRecoveryMode,
    DataBlockIndexType, Env, LogLevel, Options, WriteBufferManager,
};
use std::path::Path;

pub use error::EngineError;

/// Where rows may be looked for, and whether writes may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    Memory,
    Disk,
}

/// What becomes of logs whose rows are in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldLogs {
    Deleted,
    Archived,
}

/// What all shards share.
pub struct Engine {
    database_options: Options,
    /// Of shards with copies: logs that are needed no more go into a folder of their own, for those that follow; who looks after the
    /// shard deletes them.
    archiving_options: Options,
    keys_options: Options,
    small_options: Options,
    /// Of files that are written beside the database and taken into `keys` as they are.
    moved_options: Options,
    block_cache: Cache,
    write_buffers: WriteBufferManager,
    write_buffer_bytes: usize,
}

/// A memtable is a skip list: while it is small, most of what an insert looks at is in the CPU's cache. With 8 MiB a SET costs
/// about a sixth more on its own thread, with 16 a quarter.
const WRITE_BUFFER_BYTES: usize = 4 << 20;
/// Memtables that become one file together at most: few files of 32 MiB instead of many make compaction rewrite less, and
/// reads pass fewer of them. With less memory for memtables fewer gather.
const WRITE_BUFFERS_MERGED_MAX: usize = 8;
/// Part of that memory in which one shard's memtables may gather.
const GATHERING_SHARE: usize = 8;
/// Of column families that hold little: `meta`, and `elements` until there are collections.
const SMALL_WRITE_BUFFER_BYTES: usize = 1 << 20;
/// Memtables of a shard, full ones included, at which writes wait, if there is memory for so many. A flush takes all full ones that
/// there are, so a slow one is followed by a larger one: on a busy machine writes stalled with half of these.
const WRITE_BUFFERS_MAX: usize = 48;
const WRITE_BUFFERS_MIN: usize = 6;
/// Files of level 0 that start a compaction: each one rewrites what they overlap, so it should be worth it; reads pass more
/// files by their filters in return.
const LEVEL_0_FILES: i32 = 8;
/// zstd's fastest ordinary level: half of the default's time for some per cent of space.
const ZSTD_LEVEL: i32 = 1;
/// Positive levels are LZ4HC to RocksDB, which takes several times as long.
const LZ4_FAST_LEVEL: i32 = -1;
/// A shard's log is cut when it is this long, by flushing the column families that hold it back.
const LOG_BYTES_MAX: u64 = 256 << 20;
/// RocksDB itself deletes archived logs beyond this, in its own time of ten minutes: never before we do.
const ARCHIVED_LOG_MEGABYTES_MAX: u64 = 1 << 20;
/// The newest table format that this RocksDB writes.
const TABLE_FORMAT: i32 = 6;

impl Engine {
    pub fn new(config: &Config) -> Result<Self, EngineError> {
        let block_cache = Cache::new_hyper_clock_cache(config.memory.block_cache_bytes, 0);
        let write_buffers = WriteBufferManager::new_write_buffer_manager(config.memory.write_buffer_bytes, false);
        let mut env = Env::new()?;
        env.set_high_priority_background_threads(1.max(config.background_jobs / 4));
        env.set_low_priority_background_threads(config.background_jobs);

        let mut database_options = Options::default();
        database_options.create_if_missing(true);
        database_options.create_missing_column_families(true);
        database_options.set_env(&env);
        database_options.set_write_buffer_manager(&write_buffers);
        database_options.set_max_background_jobs(config.background_jobs);
        database_options.set_max_open_files(config.max_open_files);
        database_options.set_max_total_wal_size(LOG_BYTES_MAX);
        database_options.set_paranoid_checks(true);
        // The default mode silently drops acknowledged rows after a flipped bit.
        database_options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        database_options.set_track_and_verify_wals_in_manifest(true);
        database_options.set_avoid_unnecessary_blocking_io(true);
        database_options.set_bytes_per_sync(1 << 20);
        // Not so for logs (wal_bytes_per_sync): the beginning of a new log would come to the disk before the end of the old one is
        // synced, and a power cut in between would lose writes whose followers are kept.
        database_options.set_stats_dump_period_sec(0);
        database_options.set_stats_persist_period_sec(0);
        database_options.set_keep_log_file_num(2);
        database_options.set_max_log_file_size(1 << 20);
        database_options.set_log_level(LogLevel::Warn);
        if config.background_bytes_per_second > 0 {
            let rate = i64::try_from(config.background_bytes_per_second).unwrap_or(i64::MAX);
            database_options.set_ratelimiter(rate, 100_000, 10);
        }

        let mut archiving_options = database_options.clone();
        archiving_options.set_wal_size_limit_mb(ARCHIVED_LOG_MEGABYTES_MAX);

        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&block_cache);
        table.set_format_version(TABLE_FORMAT);
        table.set_block_size(4 << 10);
        table.set_data_block_index_type(DataBlockIndexType::BinaryAndHash);
        table.set_data_block_hash_ratio(0.75);
        table.set_bloom_filter(10.0, false);
        table.set_whole_key_filtering(true);
        table.set_optimize_filters_for_memory(true);
        table.set_cache_index_and_filter_blocks(true);
        table.set_cache_index_and_filter_blocks_with_high_priority(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);

        let mut keys_options = Options::default();
        keys_options.set_block_based_table_factory(&table);
        // Files of level 0 live for seconds: compressing them costs more than it saves.
        let (none, lz4) = (DBCompressionType::None, DBCompressionType::Lz4);
        keys_options.set_compression_per_level(&[none, lz4, lz4, lz4, lz4, lz4, lz4]);
        keys_options.set_bottommost_compression_type(DBCompressionType::Zstd);
        keys_options.set_bottommost_compression_options(-14, ZSTD_LEVEL, 0, 0, true);
        keys_options.set_level_zero_file_num_compaction_trigger(LEVEL_0_FILES);
        keys_options.set_level_zero_slowdown_writes_trigger(4 * LEVEL_0_FILES);
        keys_options.set_level_zero_stop_writes_trigger(6 * LEVEL_0_FILES);
        keys_options.set_level_compaction_dynamic_level_bytes(true);
        keys_options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        let write_buffers_max = config.memory.write_buffer_bytes / 4 * 3 / WRITE_BUFFER_BYTES;
        keys_options.set_max_write_buffer_number(write_buffers_max.clamp(WRITE_BUFFERS_MIN, WRITE_BUFFERS_MAX) as i32);
        let merged = config.memory.write_buffer_bytes / GATHERING_SHARE / WRITE_BUFFER_BYTES;
        keys_options.set_min_write_buffer_number_to_merge(merged.clamp(1, WRITE_BUFFERS_MERGED_MAX) as i32);
        keys_options.set_target_file_size_base(32 << 20);
        keys_options.set_max_bytes_for_level_base(256 << 20);
        keys_options.set_memtable_whole_key_filtering(true);
        keys_options.set_memtable_prefix_bloom_ratio(0.05);

        // A memtable and its filter take memory from the start, in each shard.
        let mut small_options = keys_options.clone();
        small_options.set_write_buffer_size(SMALL_WRITE_BUFFER_BYTES);
        small_options.set_min_write_buffer_number_to_merge(1);
        small_options.set_memtable_prefix_bloom_ratio(0.0);

        let mut moved_options = keys_options.clone();
        // They are written while clients wait for the same cores; compaction comes to the rest.
        moved_options.set_bottommost_compression_type(lz4);
        moved_options.set_bottommost_compression_options(-14, LZ4_FAST_LEVEL, 0, 0, true);

        let write_buffer_bytes = config.memory.write_buffer_bytes;
        Ok(Self {
            database_options,
            archiving_options,
            keys_options,
            small_options,
            moved_options,
            block_cache,
            write_buffers,
            write_buffer_bytes,
        })
    }

    pub fn block_cache_bytes(&self) -> usize {
        self.block_cache.get_usage()
    }

    pub fn memtable_bytes(&self) -> usize {
        self.write_buffers.get_usage()
    }

    /// What memtables may take together before some are written out early: as much of their memory as RocksDB's own manager lets be
    /// filled; what is written meanwhile takes the rest.
    pub fn memtable_bytes_max(&self) -> usize {
        self.write_buffer_bytes / 8 * 7
    }

    /// Whether they take more. RocksDB's manager has memtables written out while they are being filled; it takes full ones for
    /// on their way to the disk, but those of many shards may all wait for others of their shard.
    pub fn has_too_many_memtables(&self) -> bool {
        self.memtable_bytes() > self.memtable_bytes_max()
    }

    /// Opens the database of a shard; makes it in a folder that is empty.
    pub fn open(&self, path: &Path, rules: garbage::Rules) -> Result<database::Database, EngineError> {
        database::Database::open(self, path, rules, OldLogs::Deleted)
    }

    /// As [`Engine::open`], for a shard with copies.
    pub fn open_followed(&self, path: &Path, rules: garbage::Rules) -> Result<database::Database, EngineError> {
        database::Database::open(self, path, rules, OldLogs::Archived)
    }
}

/// Of a part of the keys, beside which RocksDB's own compactions go on.
fn compact_part_options() -> CompactOptions {
    let mut options = compact_all_options();
    options.set_exclusive_manual_compaction(false);
    options
}

fn compact_all_options() -> CompactOptions {
    let mut options = CompactOptions::default();
    options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
    options
}
