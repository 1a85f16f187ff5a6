//! Shards: which are here, who may use them, and how groups of operations run on them.

pub mod context;
pub mod durability;
pub mod executor;
pub mod gate;
pub mod lane;
pub mod map;
pub mod row_cache;
pub mod rows;
pub mod session;
pub mod stamps;
pub mod stripes;
#[cfg(test)]
mod tests;
pub mod view;

use crate::command::census::Kept;
use crate::config::Fsync;
use crate::engine::database::Database;
use crate::engine::{EngineError, meta};
use durability::Durability;
use parking_lot::Mutex;
use stamps::Stamps;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use vasto_proto::id::{Epoch, ShardKey, StoreId};
use vasto_proto::row::Stamp;
use vasto_proto::slot::{SLOT_COUNT, SlotTable};
use view::Places;

/// One open shard.
pub struct Shard {
    pub key: ShardKey,
    /// Unique among all shards that this process ever opened: cached rows of an earlier life never match.
    pub instance: u32,
    epoch: AtomicU64,
    /// An I/O error was met; nothing is served until a probe succeeds.
    failed: AtomicBool,
    pub database: Database,
    pub stamps: Stamps,
    pub durability: Durability,
    pub places: Mutex<Places>,
    pub census: Kept,
    slots: Box<[u16]>,
    /// One bit per slot.
    owned: Box<[u64; SLOT_COUNT as usize / 64]>,
}

static INSTANCES: AtomicU32 = AtomicU32::new(1);

impl Shard {
    /// Takes an opened database into service; reads the shard's state from `meta`.
    pub fn new(
        key: ShardKey,
        epoch: Epoch,
        origin: StoreId,
        table: &SlotTable,
        database: Database,
        fsync: Fsync,
    ) -> Result<Self, EngineError> {
        let slots: Box<[u16]> = table.slots(key.shard).collect();
        let mut owned = Box::new([0; SLOT_COUNT as usize / 64]);
        for slot in &slots {
            owned[usize::from(slot / 64)] |= 1 << (slot % 64);
        }
        if let Some(stamp) = database.meta(meta::FLUSH)?.as_deref().and_then(Stamp::from_bytes) {
            database.garbage().flushed(stamp.ns);
        }
        let stamps = Stamps::open(origin, &database)?;
        Ok(Self {
            key,
            instance: INSTANCES.fetch_add(1, Ordering::Relaxed),
            epoch: AtomicU64::new(epoch.0),
            failed: AtomicBool::new(false),
            database,
            stamps,
            durability: Durability::new(fsync),
            places: Mutex::default(),
            census: Kept::default(),
            slots,
            owned,
        })
    }

    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    pub fn set_epoch(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
    }

    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Stops serving after an error of the engine.
    pub fn fail(&self, text: &str) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            tracing::error!(shard = %self.key, error = text, "shard stops serving");
        }
    }

    /// Tries to write again after a failure; RocksDB recovers from a full disk by itself.
    pub fn probe(&self) {
        match self.database.put_meta_synced(meta::PROBE, &[]) {
            Ok(()) => {
                self.failed.store(false, Ordering::Release);
                tracing::info!(shard = %self.key, "shard serves again");
            }
            Err(error) => tracing::debug!(shard = %self.key, %error, "shard still fails"),
        }
    }

    pub fn slots(&self) -> &[u16] {
        &self.slots
    }

    pub fn owns(&self, slot: u16) -> bool {
        self.owned.get(usize::from(slot / 64)).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    /// Rows with an event time up to this are dead.
    pub fn flush_ns(&self) -> u64 {
        self.database.garbage().flush_ns()
    }
}
