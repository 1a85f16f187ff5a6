//! The topology in the form that the hot path asks: a table from slot to shard and from shard to store.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::slot::{SlotTable, slot_of};
use vasto_proto::topology::{KeyspaceRecord, ShardRecord, Snapshot};

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

    /// By how many shards slots are assigned; the record describes more while their number changes.
    pub fn shard_count(&self) -> u16 {
        self.record.shard_count()
    }

    pub fn shard_of_key(&self, key: &[u8]) -> ShardId {
        // One shard owns every slot: nothing to hash.
        if self.shard_count() == 1 { ShardId(0) } else { self.slots.shard(slot_of(key)) }
    }

    pub fn shard_of_slot(&self, slot: u16) -> ShardId {
        self.slots.shard(slot)
    }

    pub fn shard_key(&self, shard: ShardId) -> ShardKey {
        ShardKey { keyspace: self.record.id, shard }
    }

    pub fn shard_keys(&self) -> impl Iterator<Item = ShardKey> + '_ {
        (0..self.shard_count()).map(|shard| self.shard_key(ShardId(shard)))
    }

    /// The store that serves a shard, and under which epoch; `None` if the shard is vacant or does not exist (any more).
    pub fn owner(&self, shard: ShardId) -> Option<(StoreId, Epoch)> {
        self.shard(shard).filter(|shard| !shard.is_vacant()).map(|shard| (shard.primary, shard.epoch))
    }

    /// The shard exists, and will have a primary.
    pub fn is_vacant(&self, shard: ShardId) -> bool {
        self.shard(shard).is_some_and(ShardRecord::is_vacant)
    }

    /// One of the replicas of a shard that `answers`, always the same for one `reader` while nothing changes.
    pub fn replica(&self, shard: ShardId, reader: u32, answers: impl Fn(StoreId) -> bool) -> Option<(StoreId, Epoch)> {
        let shard = self.shard(shard)?;
        let count = shard.replicas.iter().filter(|store| answers(**store)).count();
        let place = (reader as usize).checked_rem(count)?;
        shard.replicas.iter().filter(|store| answers(**store)).nth(place).map(|store| (*store, shard.epoch))
    }

    pub fn shard(&self, shard: ShardId) -> Option<&ShardRecord> {
        self.record.shards.get(usize::from(shard.0))
    }
}

/// Whose answers an operation takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    OfPrimaries,
    /// READONLY: replicas' too.
    OfReplicas,
}

/// What a store is to a shard, as far as an operation that was sent to it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It may answer.
    Here,
    /// Another is primary now, by plan: this one answers what it has taken, and nothing else.
    HandingOver,
    /// Another is primary now, or nobody.
    Elsewhere,
    /// This gateway does not know the shard (any more); the store does.
    Unknown,
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

    /// Whether slots of the keyspace are (still) assigned by so many shards; yes of one that is not known.
    pub fn is_assigned_by(&self, keyspace: KeyspaceId, shard_count: u16) -> bool {
        self.keyspace(keyspace).is_none_or(|keyspace| keyspace.shard_count() == shard_count)
    }

    /// Whether the master hears of the store.
    pub fn is_up(&self, store: StoreId) -> bool {
        self.snapshot.store(store).is_some_and(|store| store.up)
    }

    /// What `store` is to a shard that an operation is for; a replica that is down is none for a read that asked for one.
    pub fn place(&self, store: StoreId, target: ShardKey, reader: Reader) -> Place {
        let Some(shard) = self.keyspace(target.keyspace).and_then(|keyspace| keyspace.shard(target.shard)) else {
            return Place::Unknown;
        };
        if shard.primary == store
            || reader == Reader::OfReplicas && shard.replicas.contains(&store) && self.is_up(store)
        {
            Place::Here
        } else if shard.previous == store {
            Place::HandingOver
        } else {
            Place::Elsewhere
        }
    }

    pub fn keyspaces(&self) -> impl Iterator<Item = &Rc<KeyspaceRoutes>> {
        self.keyspaces.values()
    }
}
