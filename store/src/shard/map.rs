//! Which shards are here. Readers keep a snapshot and look only whether a newer one exists.

use super::Shard;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use vasto_proto::id::ShardKey;

/// A shard of this store.
#[derive(Clone)]
pub enum Entry {
    Opening,
    Serving(Arc<Shard>),
    /// It met an error; its last users are leaving, then it is opened again.
    Closing(String),
    /// It could not be opened; that is tried again.
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
            Entry::Opening | Entry::Closing(_) | Entry::Failed(_) => None,
        })
    }

    pub fn failed(&self) -> impl Iterator<Item = ShardKey> {
        self.entries.iter().filter_map(|(key, entry)| match entry {
            Entry::Failed(_) => Some(*key),
            Entry::Opening | Entry::Serving(_) | Entry::Closing(_) => None,
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
    /// Copies of readers that may rest for long.
    lent: Mutex<Vec<Weak<Mutex<MapSnapshot>>>>,
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

    /// A copy for a reader that may rest between two looks; [`Shards::refresh_lent`] reaches it.
    pub fn lend(&self) -> Arc<Mutex<MapSnapshot>> {
        let snapshot = Arc::default();
        let mut lent = self.lent.lock();
        lent.retain(|other| other.strong_count() > 0);
        lent.push(Arc::downgrade(&snapshot));
        snapshot
    }

    /// Brings all lent copies up to date, so that none keeps a shard that is no longer here; waits for readers at work.
    pub fn refresh_lent(&self) {
        let lent: Vec<_> = self.lent.lock().iter().filter_map(Weak::upgrade).collect();
        for snapshot in lent {
            self.refresh(&mut snapshot.lock());
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
