//! One stripe's part of the cache of rows: bounded in bytes, the least recently asked for leave first (CLOCK).

use hashbrown::HashTable;

/// Bytes that an entry takes beside its key and row: the entry itself, its place in the table, the allocator's rounding.
const ENTRY_OVERHEAD_BYTES: usize = 80;
/// A row may take this part of the budget: a larger one would drive out everything else.
const ROW_SHARE_MAX: usize = 4;

struct Entry {
    hash: u64,
    /// The shard's instance; rows of a closed shard match nobody and leave in time.
    instance: u32,
    key_length: u32,
    /// Asked for since the hand passed.
    visited: bool,
    /// The key, then the encoded row; empty = this place is free.
    bytes: Vec<u8>,
}

impl Entry {
    fn is(&self, instance: u32, key: &[u8]) -> bool {
        self.instance == instance && self.bytes.get(..self.key_length as usize) == Some(key)
    }

    fn cost(&self) -> usize {
        self.bytes.capacity() + ENTRY_OVERHEAD_BYTES
    }
}

pub struct RowCache {
    table: HashTable<u32>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    hand: usize,
    bytes: usize,
    budget: usize,
}

impl RowCache {
    pub fn new(budget: usize) -> Self {
        Self { table: HashTable::new(), entries: Vec::new(), free: Vec::new(), hand: 0, bytes: 0, budget }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// The place of a key's row, which counts as asked for.
    pub fn find(&mut self, hash: u64, instance: u32, key: &[u8]) -> Option<u32> {
        let entries = &self.entries;
        let place = *self.table.find(hash, |place| entries[*place as usize].is(instance, key))?;
        self.entries[place as usize].visited = true;
        Some(place)
    }

    /// The encoded row at a place that [`RowCache::find`] gave; nothing may have changed since.
    pub fn row(&self, place: u32) -> &[u8] {
        let entry = &self.entries[place as usize];
        &entry.bytes[entry.key_length as usize..]
    }

    fn is_cacheable(&self, key: &[u8], row: &[u8]) -> bool {
        key.len() + row.len() + ENTRY_OVERHEAD_BYTES <= self.budget / ROW_SHARE_MAX
    }

    /// A row was read: keeps it.
    pub fn insert(&mut self, hash: u64, instance: u32, key: &[u8], row: &[u8]) {
        if self.find(hash, instance, key).is_some() {
            return self.update(hash, instance, key, row);
        }
        if !self.is_cacheable(key, row) {
            return;
        }
        let mut bytes = Vec::with_capacity(key.len() + row.len());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(row);
        // Not visited yet: rows that are read once leave before rows that are read twice.
        let entry = Entry { hash, instance, key_length: key.len() as u32, visited: false, bytes };
        self.make_room(entry.cost());
        self.bytes += entry.cost();
        let place = match self.free.pop() {
            Some(place) => {
                self.entries[place as usize] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        let entries = &self.entries;
        self.table.insert_unique(hash, place, |place| entries[*place as usize].hash);
    }

    /// A row was written: changes what is kept of it, and keeps nothing new.
    pub fn update(&mut self, hash: u64, instance: u32, key: &[u8], row: &[u8]) {
        let Some(place) = self.find(hash, instance, key) else { return };
        if !self.is_cacheable(key, row) {
            self.remove(place);
            return;
        }
        let entry = &mut self.entries[place as usize];
        let before = entry.cost();
        entry.bytes.truncate(entry.key_length as usize);
        if entry.bytes.capacity() > 2 * (key.len() + row.len()) {
            entry.bytes.shrink_to(key.len() + row.len());
        }
        entry.bytes.reserve_exact(row.len());
        entry.bytes.extend_from_slice(row);
        self.bytes = self.bytes - before + entry.cost();
        self.make_room(0);
    }

    /// Forgets the rows of a shard whose keys do not pass.
    pub fn keep(&mut self, instance: u32, passes: impl Fn(&[u8]) -> bool) {
        for place in 0..self.entries.len() {
            let entry = &self.entries[place];
            let is_its_row = entry.instance == instance && !entry.bytes.is_empty();
            if is_its_row && !passes(&entry.bytes[..entry.key_length as usize]) {
                self.remove(place as u32);
            }
        }
    }

    fn remove(&mut self, place: u32) {
        let entry = &mut self.entries[place as usize];
        self.bytes -= entry.cost();
        entry.bytes = Vec::new();
        if let Ok(found) = self.table.find_entry(entry.hash, |other| *other == place) {
            found.remove();
        }
        self.free.push(place);
    }

    fn make_room(&mut self, wanted: usize) {
        while self.bytes + wanted > self.budget && !self.table.is_empty() {
            self.hand = if self.hand + 1 < self.entries.len() { self.hand + 1 } else { 0 };
            let entry = &mut self.entries[self.hand];
            if entry.bytes.is_empty() {
                continue;
            }
            if std::mem::take(&mut entry.visited) {
                continue;
            }
            self.remove(self.hand as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn get(cache: &mut RowCache, key: &[u8]) -> Option<Vec<u8>> {
        let place = cache.find(u64::from(key[0]), 1, key)?;
        Some(cache.row(place).to_vec())
    }

    proptest! {
        #[test]
        fn what_is_kept_is_true_and_bounded(steps in prop::collection::vec((any::<bool>(), 0..20u8, 0..900usize), 0..200)) {
            let mut cache = RowCache::new(4000);
            let mut truth: HashMap<u8, Vec<u8>> = HashMap::new();
            for (write, key, length) in steps {
                // All keys of three share a hash: collisions are the rule.
                let hash = u64::from(key % 3);
                if write {
                    let row = vec![key; length];
                    cache.update(hash, 1, &[key], &row);
                    truth.insert(key, row);
                } else if let Some(row) = truth.get(&key) {
                    match cache.find(hash, 1, &[key]) {
                        Some(place) => prop_assert_eq!(cache.row(place), row.as_slice()),
                        None => cache.insert(hash, 1, &[key], row),
                    }
                }
                prop_assert!(cache.bytes() <= 4000);
                prop_assert_eq!(cache.bytes(), cache.entries.iter().filter(|entry| !entry.bytes.is_empty()).map(Entry::cost).sum::<usize>());
                prop_assert_eq!(cache.len() + cache.free.len(), cache.entries.len());
            }
        }
    }

    #[test]
    fn a_row_that_is_asked_for_again_outlives_rows_that_are_not() {
        let mut cache = RowCache::new(1000);
        cache.insert(0, 1, &[0], &[0; 100]);
        for key in 1..50 {
            assert!(get(&mut cache, &[0]).is_some(), "before {key}");
            cache.insert(u64::from(key), 1, &[key], &[0; 100]);
        }
    }

    #[test]
    fn another_life_of_the_shard_sees_nothing() {
        let mut cache = RowCache::new(1000);
        cache.insert(5, 1, b"key", b"row");
        assert!(cache.find(5, 1, b"key").is_some());
        assert!(cache.find(5, 2, b"key").is_none());
    }
}
