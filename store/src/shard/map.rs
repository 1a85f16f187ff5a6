//! Which shards are here. Readers keep a snapshot and look only whether a newer one exists.

use super::Shard;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vasto_proto::id::ShardKey;

/// A shard of this store.
#[derive(Clone)]
pub enum Entry {
    Opening,
    Serving(Arc<Shard>),
    Failed(String),
}

/// One state of the map.
#[derive(Clone, Default)]
pub struct ShardMap {
    entries: HashMap<ShardKey, Entry, foldhash::fast::FixedState>,
}

impl ShardMap {
    pub fn entry(&self, key: ShardKey) -> Option<&Entry> {
        self.entries.get(&key)
    }

    pub fn serving(&self) -> impl Iterator<Item = &Arc<Shard>> {
        self.entries.values().filter_map(|entry| match entry {
            Entry::Serving(shard) => Some(shard),
            Entry::Opening | Entry::Failed(_) => None,
        })
    }

    pub fn keys(&self) -> impl Iterator<Item = ShardKey> {
        self.entries.keys().copied()
    }
}

/// The map as it is now.
#[derive(Default)]
pub struct Shards {
    current: RwLock<Arc<ShardMap>>,
    version: AtomicU64,
}

/// A reader's copy.
#[derive(Clone, Default)]
pub struct MapSnapshot {
    pub map: Arc<ShardMap>,
    version: u64,
}

impl Shards {
    pub fn current(&self) -> Arc<ShardMap> {
        Arc::clone(&self.current.read())
    }

    /// Brings a reader's copy up to date.
    pub fn refresh(&self, snapshot: &mut MapSnapshot) {
        if self.version.load(Ordering::Acquire) != snapshot.version {
            let current = self.current.read();
            snapshot.map = Arc::clone(&current);
            snapshot.version = self.version.load(Ordering::Acquire);
        }
    }

    /// Puts one entry in, or takes it out.
    pub fn set(&self, key: ShardKey, entry: Option<Entry>) {
        let mut current = self.current.write();
        let mut next = ShardMap::clone(&current);
        match entry {
            Some(entry) => next.entries.insert(key, entry),
            None => next.entries.remove(&key),
        };
        *current = Arc::new(next);
        self.version.fetch_add(1, Ordering::Release);
    }
}
