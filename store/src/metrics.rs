//! Figures of the store: counted in plain atomics where commands run, handed to the recorder once a second.

use crate::shard::executor::Core;
use metrics::{Histogram, counter, gauge, histogram};
use std::sync::atomic::{AtomicU64, Ordering};
use vasto_proto::command::table::STORE_ROWS;

/// What all sessions of a store count into.
pub struct Counters {
    commands: Box<[AtomicU64]>,
    row_cache_hits: AtomicU64,
    row_cache_misses: AtomicU64,
    batch_operations: Histogram,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            commands: STORE_ROWS.iter().map(|_| AtomicU64::new(0)).collect(),
            row_cache_hits: AtomicU64::new(0),
            row_cache_misses: AtomicU64::new(0),
            batch_operations: histogram!("vasto_store_batch_operations"),
        }
    }
}

impl Counters {
    pub fn batch(&self, operations: usize) {
        self.batch_operations.record(operations as f64);
    }

    /// Adds one executor's counts and sets them back.
    pub fn commands(&self, run: &mut [u32]) {
        for (sum, run) in self.commands.iter().zip(run) {
            if *run != 0 {
                sum.fetch_add(u64::from(std::mem::take(run)), Ordering::Relaxed);
            }
        }
    }

    pub fn looked_up(&self, hits: u64, misses: u64) {
        if hits != 0 {
            self.row_cache_hits.fetch_add(hits, Ordering::Relaxed);
        }
        if misses != 0 {
            self.row_cache_misses.fetch_add(misses, Ordering::Relaxed);
        }
    }

    /// Hands everything to the recorder.
    pub fn export(&self, core: &Core) {
        for (row, run) in STORE_ROWS.iter().zip(&self.commands) {
            let run = run.load(Ordering::Relaxed);
            if run != 0 {
                counter!("vasto_store_operations_total", "command" => row.name).absolute(run);
            }
        }
        counter!("vasto_store_row_cache_hits_total").absolute(self.row_cache_hits.load(Ordering::Relaxed));
        counter!("vasto_store_row_cache_misses_total").absolute(self.row_cache_misses.load(Ordering::Relaxed));
        let (mut bytes, mut rows) = (0, 0);
        core.stripes.try_each(|cache| {
            bytes += cache.bytes();
            rows += cache.len();
        });
        gauge!("vasto_store_row_cache_bytes").set(bytes as f64);
        gauge!("vasto_store_row_cache_rows").set(rows as f64);
        gauge!("vasto_store_lane_operations").set(core.pool.depth() as f64);
        gauge!("vasto_store_block_cache_bytes").set(core.engine.block_cache_bytes() as f64);
        gauge!("vasto_store_memtable_bytes").set(core.engine.memtable_bytes() as f64);
        let map = core.shards.current();
        let (mut files, mut pending, mut stopped, mut slowed) = (0, 0, 0, 0);
        let (mut read_only, mut not_open) = (0, map.failed().count());
        for shard in map.serving() {
            read_only += usize::from(shard.is_read_only());
            not_open += usize::from(shard.is_failed());
            files += shard.database.disk_bytes();
            pending += shard.database.pending_compaction_bytes();
            stopped += shard.database.is_write_stopped();
            slowed += u64::from(shard.database.delayed_write_rate() > 0);
        }
        gauge!("vasto_store_file_bytes").set(files as f64);
        gauge!("vasto_store_pending_compaction_bytes").set(pending as f64);
        gauge!("vasto_store_shards_read_only").set(read_only as f64);
        gauge!("vasto_store_shards_failed").set(not_open as f64);
        gauge!("vasto_store_shards_stopped").set(stopped as f64);
        gauge!("vasto_store_shards_slowed").set(slowed as f64);
    }
}
