//! What a store can be told at its start.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use vasto_proto::topology::Fsync;

/// Bytes of memory by purpose.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// Rows in front of RocksDB.
    pub row_cache_bytes: usize,
    /// Blocks of RocksDB's files.
    pub block_cache_bytes: usize,
    /// Memtables of all shards together.
    pub write_buffer_bytes: usize,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { row_cache_bytes: 256 << 20, block_cache_bytes: 256 << 20, write_buffer_bytes: 256 << 20 }
    }
}

/// All settings of a store.
#[derive(Clone, Debug)]
pub struct Config {
    /// The data folder; created if it is not there.
    pub data: PathBuf,
    pub listen: SocketAddr,
    /// host:port where gateways reach the store; the bound address if not given.
    pub advertise: Option<String>,
    /// The part of the house that fails as one; empty = not told.
    pub zone: String,
    /// Words for whoever runs the store.
    pub tags: Vec<String>,
    /// Threads that run batches; 0 = one for each core.
    pub workers: usize,
    /// Threads that wait for the disk.
    pub lane_threads: usize,
    pub memory: MemoryConfig,
    /// Longest value in bytes.
    pub proto_max_bulk_len: usize,
    /// How long a tombstone is remembered.
    pub gc_grace: Duration,
    /// How far an event time that a client gives may lie ahead of the store's clock.
    pub max_clock_skew: Duration,
    /// When writes of keyspaces are synced whose records do not say.
    pub fsync: Fsync,
    /// Files that RocksDB keeps open per shard; -1 = all.
    pub max_open_files: i32,
    /// Threads of RocksDB for flushes and compactions.
    pub background_jobs: i32,
    /// What flushes and compactions may write together; 0 = without limit.
    pub background_bytes_per_second: u64,
    /// Within this the copies of each shard that the store leads are compared once; zero = only when somebody asks.
    pub verify_interval: Duration,
    /// Rows of slots that go to other shards, of all moves together; 0 = without limit.
    pub resize_bytes_per_second: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: PathBuf::from("data"),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            zone: String::new(),
            tags: Vec::new(),
            workers: 0,
            lane_threads: 16,
            memory: MemoryConfig::default(),
            proto_max_bulk_len: 512 << 20,
            gc_grace: Duration::from_secs(3600),
            max_clock_skew: Duration::from_millis(500),
            fsync: Fsync::default(),
            max_open_files: 1024,
            background_jobs: 4,
            background_bytes_per_second: 0,
            verify_interval: Duration::from_secs(24 * 3600),
            resize_bytes_per_second: 64_000_000,
        }
    }
}

/// Limits that commands check.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub proto_max_bulk_len: usize,
    pub max_clock_skew_ms: u64,
}
