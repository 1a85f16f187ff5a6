//! Shards: which are here, who may use them, and how groups of operations run on them.

pub mod alarm;
pub mod context;
pub mod digests;
pub mod durability;
#[cfg(test)]
mod event_time_tests;
pub mod executor;
pub mod gate;
mod health;
pub mod lane;
pub mod map;
pub mod ownership;
pub mod row_cache;
pub mod rows;
pub mod session;
pub mod stamps;
pub mod stripes;
#[cfg(test)]
pub mod tests;
pub mod view;

use crate::command::census::Kept;
use crate::config::Fsync;
use crate::engine::database::Database;
use crate::engine::{EngineError, meta};
use crate::lease::state::LeaseState;
use crate::replication::Replication;
use crate::resize::changes::Changes;
use crate::resize::incoming::Incoming;
use alarm::Alarm;
use durability::Durability;
use health::Health;
use ownership::Ownership;
use parking_lot::Mutex;
use stamps::Stamps;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vasto_proto::id::{Epoch, ShardKey, StoreId};
use vasto_proto::row::Stamp;
use view::Places;

/// One open shard.
pub struct Shard {
    pub key: ShardKey,
    /// Unique among all shards that this process ever opened: cached rows of an earlier life never match.
    pub instance: u32,
    epoch: AtomicU64,
    health: Health,
    pub database: Database,
    pub stamps: Stamps,
    pub durability: Durability,
    pub lease: Arc<LeaseState>,
    pub replication: Replication,
    pub takes: Incoming,
    /// The number by which Redis clients know the keyspace, if its name is one.
    pub database_number: Option<i64>,
    pub places: Mutex<Places>,
    pub census: Kept,
    ownership: Ownership,
    /// What is to be sent again to those who get slots from this shard.
    pub changes: Changes,
}

static INSTANCES: AtomicU32 = AtomicU32::new(1);

impl Shard {
    /// Takes an opened database into service; reads the shard's state from `meta`. It owns no slot yet.
    #[expect(clippy::too_many_arguments, reason = "what a shard is made of, each of another type")]
    pub fn new(
        key: ShardKey,
        epoch: Epoch,
        origin: StoreId,
        database: Database,
        fsync: Fsync,
        alarm: &Arc<Alarm>,
        database_number: Option<i64>,
        lease: Arc<LeaseState>,
    ) -> Result<Self, EngineError> {
        if let Some(stamp) = database.meta(meta::FLUSH)?.as_deref().and_then(Stamp::from_bytes) {
            database.garbage().flushed(stamp.ns);
        }
        let stamps = Stamps::open(origin, &database)?;
        let replication = Replication::open(&database)?;
        let takes = Incoming::open(&database)?;
        Ok(Self {
            key,
            instance: INSTANCES.fetch_add(1, Ordering::Relaxed),
            epoch: AtomicU64::new(epoch.0),
            health: Health::new(Arc::clone(alarm)),
            database,
            stamps,
            durability: Durability::new(fsync),
            lease,
            replication,
            takes,
            database_number,
            places: Mutex::default(),
            census: Kept::default(),
            ownership: Ownership::default(),
            changes: Changes::default(),
        })
    }

    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// What the newest record says of the shard.
    pub fn set_epoch(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
    }

    /// Rows with an event time up to this are dead.
    pub fn flush_ns(&self) -> u64 {
        self.database.garbage().flush_ns()
    }
}
