//! Deletes the folders of shards whose keyspace was dropped or that this store has no part in any more, when nobody uses them.
//!
//! The record that says so is on the disk before anything is deleted, and at each start what is left of such folders is deleted: a crash
//! at any moment ends in "still there" or "gone". A shard may come back: whoever makes its folder again waits until the old one is gone.

use crate::node::shard_folder;
use crate::replication;
use crate::shard::Shard;
use crate::shard::executor::Core;
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use vasto_proto::id::{KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::topology::KeyspaceRecord;

/// Between looks whether the users of a dropped shard have left: a batch takes milliseconds, a walk seconds.
const LEAVING_PAUSE: Duration = Duration::from_millis(20);

/// How long the folder of a shard may take to go before it is made again.
const PENDING_MAX: Duration = Duration::from_secs(10);

/// Shards whose folders are about to be deleted.
#[derive(Default)]
pub struct Pending {
    keys: Mutex<BTreeSet<ShardKey>>,
    fewer: Condvar,
}

impl Pending {
    pub fn add(&self, key: ShardKey) {
        self.keys.lock().insert(key);
    }

    fn remove(&self, key: ShardKey) {
        self.keys.lock().remove(&key);
        self.fewer.notify_all();
    }

    /// Waits until a shard's folder is gone.
    pub fn wait_for(&self, key: ShardKey) -> io::Result<()> {
        let deadline = Instant::now() + PENDING_MAX;
        let mut keys = self.keys.lock();
        while keys.contains(&key) {
            if self.fewer.wait_until(&mut keys, deadline).timed_out() {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "its old folder is still in use"));
            }
        }
        Ok(())
    }
}

/// A shard that is no longer in the map; `shard` if it was open.
pub struct Dropped {
    pub key: ShardKey,
    pub shard: Option<Arc<Shard>>,
}

/// The thread that deletes. It ends when the sender is dropped; what it has not deleted then goes at the next start.
pub struct Removal {
    core: Arc<Core>,
    folder: PathBuf,
    work: Receiver<Dropped>,
    leaving: Vec<(ShardKey, Arc<Shard>)>,
    pending: Arc<Pending>,
}

impl Removal {
    /// `data` is the store's folder.
    pub fn new(core: &Arc<Core>, data: &Path, pending: &Arc<Pending>) -> (Self, Sender<Dropped>) {
        // Bounded by the shards that the store has.
        let (sender, work) = channel();
        let (core, pending) = (Arc::clone(core), Arc::clone(pending));
        (Self { core, folder: data.join("shards"), work, leaving: Vec::new(), pending }, sender)
    }

    pub fn run(mut self) {
        loop {
            let received = if self.leaving.is_empty() {
                self.work.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.work.recv_timeout(LEAVING_PAUSE)
            };
            match received {
                Ok(Dropped { key, shard: Some(shard) }) => {
                    shard.database.stop_background_work();
                    self.leaving.push((key, shard));
                }
                Ok(Dropped { key, shard: None }) => self.delete(key),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.delete_left();
        }
    }

    /// Closes and deletes what nobody uses any more.
    fn delete_left(&mut self) {
        if self.leaving.is_empty() {
            return;
        }
        self.core.shards.refresh_lent();
        for (key, shard) in std::mem::take(&mut self.leaving) {
            match Arc::try_unwrap(shard) {
                Ok(shard) => {
                    // Closes the database; may wait for the disk.
                    drop(shard);
                    self.delete(key);
                }
                Err(shard) => self.leaving.push((key, shard)),
            }
        }
    }

    fn delete(&self, key: ShardKey) {
        let path = self.folder.join(shard_folder(key));
        let beside = replication::remove_beside(&self.folder, key);
        let deleted =
            beside.and_then(|()| fs::remove_dir_all(&path)).and_then(|()| File::open(&self.folder)?.sync_all());
        self.pending.remove(key);
        match deleted {
            Ok(()) => tracing::info!(shard = %key, "a shard is deleted that has no part here any more"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                let path = path.display();
                tracing::error!(shard = %key, %path, %error, "a dropped shard cannot be deleted; the next start tries again");
            }
        }
    }
}

/// Shards of dropped keyspaces, and those that are others' now, whose folders are still there.
pub fn left_behind(
    data: &Path,
    store: StoreId,
    records: &BTreeMap<KeyspaceId, KeyspaceRecord>,
) -> io::Result<Vec<ShardKey>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(data.join("shards"))? {
        let name = entry?.file_name();
        let Some(key) = name.to_str().and_then(shard_of_folder) else { continue };
        let is_own = |record: &KeyspaceRecord| record.copies_of(store).any(|(shard, _)| shard == key.shard);
        if records.get(&key.keyspace).is_some_and(|record| !is_own(record)) {
            found.push(key);
        }
    }
    Ok(found)
}

fn shard_of_folder(name: &str) -> Option<ShardKey> {
    let (keyspace, shard) = name.split_once('-')?;
    Some(ShardKey { keyspace: KeyspaceId(keyspace.parse().ok()?), shard: ShardId(shard.parse().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::node::Store;

    #[test]
    fn a_dropped_keyspace_leaves_the_disk_and_does_not_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let open = || Store::open(Config { data: data.clone(), ..Config::default() }).unwrap().handle();
        let folders = || {
            let mut names: Vec<String> = fs::read_dir(data.join("shards"))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        let store = open();
        let first = KeyspaceRecord::new(KeyspaceId(0), "0", &[store.id()]).unwrap();
        let second = KeyspaceRecord::new(KeyspaceId(7), "seven", &[store.id(), store.id()]).unwrap();
        store.put_record(first.clone()).unwrap();
        store.put_record(second.clone()).unwrap();
        assert_eq!(folders(), ["0-0", "7-0", "7-1"]);
        store.put_record(second.as_dropped()).unwrap();
        // What was missed is not an error, and neither is hearing of the end twice.
        store.put_record(second.clone()).unwrap();
        store.put_record(second.as_dropped()).unwrap();
        assert_eq!(store.core().shards.current().keys().count(), 1);
        store.close();
        drop(store);
        // As a crash leaves it in the middle of deleting.
        fs::create_dir_all(data.join("shards/7-1")).unwrap();
        fs::write(data.join("shards/7-1/000007.log"), "half").unwrap();
        let store = open();
        assert_eq!(store.records(), [first, second.as_dropped()]);
        store.close();
        assert_eq!(folders(), ["0-0"]);
    }

    #[test]
    fn a_shard_of_a_number_that_was_there_before_begins_empty() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let open = || Store::open(Config { data: data.clone(), ..Config::default() }).unwrap().handle();
        let store = open();
        let two = KeyspaceRecord::new(KeyspaceId(7), "seven", &[StoreId(9), store.id()]).unwrap();
        store.put_record(two.clone()).unwrap();
        let key = ShardKey { keyspace: two.id, shard: vasto_proto::id::ShardId(1) };
        let shard = |store: &crate::StoreHandle| match store.core().shards.current().entry(key) {
            Some(crate::shard::map::Entry::Serving(shard)) => Arc::clone(shard),
            _ => panic!("the shard is not open"),
        };
        shard(&store).database.put_meta_synced(b"probe", b"before").unwrap();
        // It was away while the shard went, and hears only of the next one of its number.
        let one = two.begin_resize(1, Vec::new()).unwrap().fence().unwrap().commit().unwrap();
        let next = one.clean().unwrap().finish().unwrap().begin_resize(2, vec![store.id()]).unwrap();
        store.put_record(next.clone()).unwrap();
        assert_eq!(shard(&store).database.meta(b"probe").unwrap(), None);
        shard(&store).database.put_meta_synced(b"probe", b"after").unwrap();
        store.close();
        drop(store);
        let store = open();
        assert_eq!(shard(&store).database.meta(b"probe").unwrap().as_deref(), Some(&b"after"[..]));
        store.put_record(next.fence().unwrap()).unwrap();
        assert_eq!(shard(&store).database.meta(b"probe").unwrap().as_deref(), Some(&b"after"[..]));
        store.close();
    }

    #[test]
    fn a_folder_names_its_shard() {
        let key = ShardKey { keyspace: KeyspaceId(12), shard: ShardId(3) };
        assert_eq!(shard_of_folder(&shard_folder(key)), Some(key));
        assert_eq!(shard_of_folder("0-0.restoring"), None);
        assert_eq!(shard_of_folder("lost+found"), None);
    }
}
