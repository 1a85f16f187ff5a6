//! Figures of the store: counted in plain atomics where commands run, handed to the recorder once a second by a thread of its own:
//! the one that syncs may hang in a sync, and that is when the figures are looked at.

use crate::shard::durability::SyncFigures;
use crate::shard::executor::Core;
use metrics::{Histogram, counter, gauge, histogram};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;
use vasto_proto::command::table::STORE_ROWS;

/// What all sessions of a store count into.
pub struct Counters {
    commands: Box<[AtomicU64]>,
    row_cache_hits: AtomicU64,
    row_cache_misses: AtomicU64,
    row_cache_bytes: AtomicU64,
    digest_comparisons: AtomicU64,
    digest_slots_differing: AtomicU64,
    copies_repaired: AtomicU64,
    batch_operations: Histogram,
    fences: Histogram,
    moved_rows: AtomicU64,
    moved_bytes: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            commands: STORE_ROWS.iter().map(|_| AtomicU64::new(0)).collect(),
            row_cache_hits: AtomicU64::new(0),
            row_cache_misses: AtomicU64::new(0),
            row_cache_bytes: AtomicU64::new(0),
            digest_comparisons: AtomicU64::new(0),
            digest_slots_differing: AtomicU64::new(0),
            copies_repaired: AtomicU64::new(0),
            batch_operations: histogram!("vasto_store_batch_operations"),
            fences: histogram!("vasto_store_fence_seconds"),
            moved_rows: AtomicU64::new(0),
            moved_bytes: AtomicU64::new(0),
        }
    }
}

/// How often figures reach the recorder: what Prometheus asks for is at most so old.
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);

impl Counters {
    /// The loop of the thread that exports; ends when the other end is dropped.
    pub fn run(core: &Core, ended: &mpsc::Receiver<()>) {
        while let Err(mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(EXPORT_INTERVAL) {
            core.counters.export(core);
        }
    }

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

    /// Rows were read for another shard.
    pub fn moved(&self, rows: u64, bytes: u64) {
        self.moved_rows.fetch_add(rows, Ordering::Relaxed);
        self.moved_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Slots were behind a fence for so long.
    pub fn fenced(&self, fenced: Duration) {
        self.fences.record(fenced.as_secs_f64());
    }

    /// A copy was compared with its primary.
    pub fn compared(&self, slots_differing: usize) {
        self.digest_comparisons.fetch_add(1, Ordering::Relaxed);
        self.digest_slots_differing.fetch_add(slots_differing as u64, Ordering::Relaxed);
    }

    /// A copy that differed has been made anew.
    pub fn repaired(&self) {
        self.copies_repaired.fetch_add(1, Ordering::Relaxed);
    }

    /// Copies compared, slots of them that differed, copies made anew for that.
    pub fn comparisons(&self) -> (u64, u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.digest_comparisons), read(&self.digest_slots_differing), read(&self.copies_repaired))
    }

    /// Bytes that the row cache held when they were last counted.
    pub fn row_cache_bytes(&self) -> u64 {
        self.row_cache_bytes.load(Ordering::Relaxed)
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
        self.row_cache_bytes.store(bytes as u64, Ordering::Relaxed);
        gauge!("vasto_store_row_cache_bytes").set(bytes as f64);
        gauge!("vasto_store_row_cache_rows").set(rows as f64);
        gauge!("vasto_store_lane_operations").set(core.pool.depth() as f64);
        gauge!("vasto_store_block_cache_bytes").set(core.engine.block_cache_bytes() as f64);
        gauge!("vasto_store_memtable_bytes").set(core.engine.memtable_bytes() as f64);
        let map = core.shards.current();
        let (mut files, mut pending, mut stopped, mut slowed) = (0, 0, 0, 0);
        let (mut read_only, mut not_open) = (0, map.failed().count());
        let mut unreplicated = 0;
        let (mut durability, mut lag) = (SyncFigures::default(), Duration::ZERO);
        for shard in map.serving() {
            read_only += usize::from(shard.is_read_only());
            not_open += usize::from(shard.is_failed());
            files += shard.database.disk_bytes();
            pending += shard.database.pending_compaction_bytes();
            stopped += shard.database.is_write_stopped();
            slowed += u64::from(shard.database.delayed_write_rate() > 0);
            let figures = shard.durability.figures();
            durability.syncs += figures.syncs;
            durability.slow_syncs += figures.slow_syncs;
            durability.held_batches += figures.held_batches;
            durability.held_batches_now += figures.held_batches_now;
            lag = lag.max(figures.lag.unwrap_or_default());
            let Some(figures) = shard.replication_figures() else { continue };
            for follower in figures.followers {
                let labels = [
                    ("keyspace", shard.key.keyspace.to_string()),
                    ("shard", shard.key.shard.to_string()),
                    ("store", follower.store.to_string()),
                ];
                gauge!("vasto_store_copy_lag_seconds", &labels).set(follower.lag.as_secs_f64());
                unreplicated += usize::from(!follower.in_sync);
            }
        }
        let (comparisons, slots_differing, repaired) = self.comparisons();
        counter!("vasto_store_digest_comparisons_total").absolute(comparisons);
        counter!("vasto_store_digest_slots_differing_total").absolute(slots_differing);
        counter!("vasto_store_copies_repaired_total").absolute(repaired);
        counter!("vasto_store_moved_rows_total").absolute(self.moved_rows.load(Ordering::Relaxed));
        counter!("vasto_store_moved_bytes_total").absolute(self.moved_bytes.load(Ordering::Relaxed));
        gauge!("vasto_store_resize_rate_share").set(core.pace.share());
        gauge!("vasto_store_copies_behind").set(unreplicated as f64);
        gauge!("vasto_store_file_bytes").set(files as f64);
        gauge!("vasto_store_pending_compaction_bytes").set(pending as f64);
        gauge!("vasto_store_shards_read_only").set(read_only as f64);
        gauge!("vasto_store_shards_failed").set(not_open as f64);
        gauge!("vasto_store_shards_stopped").set(stopped as f64);
        gauge!("vasto_store_shards_slowed").set(slowed as f64);
        counter!("vasto_store_syncs_total").absolute(durability.syncs);
        counter!("vasto_store_slow_syncs_total").absolute(durability.slow_syncs);
        counter!("vasto_store_held_batches_total").absolute(durability.held_batches);
        gauge!("vasto_store_held_batches").set(durability.held_batches_now as f64);
        gauge!("vasto_store_sync_lag_seconds").set(lag.as_secs_f64());
    }
}
