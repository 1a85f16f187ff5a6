//! The topology in the form that the hot path asks: a table from slot to shard and from shard to store.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::slot::{SlotTable, slot_of};
use vasto_proto::topology::{KeyspaceRecord, Snapshot};

/// One keyspace as a worker routes it.
#[derive(Debug)]
pub struct KeyspaceRoutes {
    pub record: KeyspaceRecord,
    slots: SlotTable,
}

impl KeyspaceRoutes {
    fn new(record: &KeyspaceRecord) -> Self {
        Self { slots: SlotTable::new(record.shard_count()), record: record.clone() }
    }

    pub fn shard_of_key(&self, key: &[u8]) -> ShardId {
        // One shard owns every slot: nothing to hash.
        if self.record.shards.len() == 1 { ShardId(0) } else { self.slots.shard(slot_of(key)) }
    }

    pub fn shard_of_slot(&self, slot: u16) -> ShardId {
        self.slots.shard(slot)
    }

    pub fn shard_key(&self, shard: ShardId) -> ShardKey {
        ShardKey { keyspace: self.record.id, shard }
    }

    pub fn shard_keys(&self) -> impl Iterator<Item = ShardKey> + '_ {
        (0..self.record.shard_count()).map(|shard| self.shard_key(ShardId(shard)))
    }

    /// The store that serves a shard, and under which epoch; `None` if the shard does not exist (any more).
    pub fn owner(&self, shard: ShardId) -> Option<(StoreId, Epoch)> {
        self.record.shards.get(usize::from(shard.0)).map(|shard| (shard.primary, shard.epoch))
    }
}

/// What a worker knows of the cluster; replaced as a whole when the topology changes.
#[derive(Debug, Default)]
pub struct Routing {
    pub snapshot: Arc<Snapshot>,
    keyspaces: HashMap<KeyspaceId, Rc<KeyspaceRoutes>>,
}

impl Routing {
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        let keyspaces =
            snapshot.keyspaces.iter().map(|record| (record.id, Rc::new(KeyspaceRoutes::new(record)))).collect();
        Self { snapshot, keyspaces }
    }

    pub fn keyspace(&self, id: KeyspaceId) -> Option<&Rc<KeyspaceRoutes>> {
        self.keyspaces.get(&id)
    }

    pub fn keyspaces(&self) -> impl Iterator<Item = &Rc<KeyspaceRoutes>> {
        self.keyspaces.values()
    }
}
