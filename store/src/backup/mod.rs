//! Backups of a store: a checkpoint of every shard, the records and a manifest, in a folder that appears when it is whole.
//!
//! ```text
//! DATA/backups/NAME.unfinished/   while it is made; removed when the next one begins if a crash left it
//! DATA/backups/NAME/
//!     manifest                    written last: what belongs to the backup, with sizes and checksums
//!     identity, records/*         as in the data folder
//!     shards/KEYSPACE-SHARD/      a RocksDB of its own; its tables are hard links to those of the shard
//! ```
//!
//! Each shard is as it was at one moment, and different shards at different ones.

pub mod manifest;
pub mod restore;

use crate::engine::EngineError;
use crate::node::{self, Identity, OpenError};
use crate::shard::Shard;
use crate::shard::map::{Entry, ShardMap};
use manifest::{FileEntry, Manifest, ShardEntry};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error;
use vasto_proto::id::ShardKey;
use vasto_proto::rdb::crc64::Crc64;

/// The file that makes a folder a backup.
pub const MANIFEST: &str = "manifest";
const FOLDER: &str = "backups";
const UNFINISHED: &str = "unfinished";
const NAME_BYTES_MAX: usize = 64;
/// What is read at once when a file is copied or its checksum taken.
const CHUNK_BYTES: usize = 1 << 20;

/// Why there is no backup.
#[derive(Debug, Error)]
pub enum BackupError {
    #[error("a backup is in progress already")]
    Busy,
    #[error("{0:?} is no name for a backup, or taken already")]
    Name(String),
    #[error("shard {shard} is not served: {reason}")]
    NotServed { shard: ShardKey, reason: String },
    #[error("keyspace {0} is being resized or has a store replaced: wait until that has ended, or abort it")]
    Operation(String),
    #[error("cannot take a checkpoint of shard {shard}: {source}")]
    Checkpoint { shard: ShardKey, source: EngineError },
    #[error("cannot write {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Data(#[from] OpenError),
    #[error("the store is stopping")]
    Stopping,
}

/// What there is to know of a store's backups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub is_running: bool,
    /// When the last one was done, in Unix seconds; 0 = never.
    pub last_done_s: u64,
    /// The last one that was tried failed.
    pub has_failed: bool,
}

/// Makes the backups of one store, one at a time.
pub struct Backups {
    data: PathBuf,
    status: Mutex<Status>,
    is_stopping: AtomicBool,
}

impl Backups {
    /// Learns from the manifests in the data folder when the last backup was done.
    pub fn open(data: &Path) -> Self {
        let last_done_s = last_done_s(&data.join(FOLDER)).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot look for earlier backups");
            0
        });
        let status = Status { last_done_s, ..Status::default() };
        Self { data: data.to_owned(), status: Mutex::new(status), is_stopping: AtomicBool::new(false) }
    }

    pub fn status(&self) -> Status {
        *self.status.lock()
    }

    /// Takes the turn; [`Backups::run`] with the same name must follow.
    pub fn begin(&self, name: &str) -> Result<(), BackupError> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let is_name = !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(is_plain);
        let mut status = self.status.lock();
        if status.is_running {
            return Err(BackupError::Busy);
        }
        if !is_name || self.data.join(FOLDER).join(name).exists() {
            return Err(BackupError::Name(name.to_owned()));
        }
        operations(&self.data)?;
        status.is_running = true;
        Ok(())
    }

    /// Makes the backup that was begun. Blocks for long: every file is read for its checksum.
    pub fn run(&self, map: &ShardMap, name: &str) -> Result<(), BackupError> {
        let made = self.make(map, name);
        let mut status = self.status.lock();
        status.is_running = false;
        status.has_failed = made.is_err();
        match &made {
            Ok(manifest) => {
                status.last_done_s = manifest.finished_s;
                tracing::info!(name, files = manifest.files.len(), bytes = manifest.bytes(), "backup done");
            }
            Err(error) => tracing::error!(name, %error, "backup failed"),
        }
        made.map(drop)
    }

    /// Has a running backup give up soon.
    pub fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
    }

    fn go_on(&self) -> Result<(), BackupError> {
        if self.is_stopping.load(Ordering::Acquire) { Err(BackupError::Stopping) } else { Ok(()) }
    }

    fn make(&self, map: &ShardMap, name: &str) -> Result<Manifest, BackupError> {
        let backups = self.data.join(FOLDER);
        fs::create_dir_all(&backups).map_err(at(&backups))?;
        remove_unfinished(&backups)?;
        let unfinished = backups.join(format!("{name}.{UNFINISHED}"));
        let finished = backups.join(name);
        let made = self.fill(map, name, &unfinished).and_then(|manifest| {
            fs::rename(&unfinished, &finished).map_err(at(&finished))?;
            sync_folder(&backups)?;
            sync_folder(&self.data)?;
            Ok(manifest)
        });
        if made.is_err() {
            let _ = fs::remove_dir_all(&unfinished);
        }
        made
    }

    fn fill(&self, map: &ShardMap, name: &str, folder: &Path) -> Result<Manifest, BackupError> {
        let started_s = unix_seconds();
        let (records, shards) = (folder.join("records"), folder.join("shards"));
        for path in [folder, &records, &shards] {
            fs::create_dir(path).map_err(at(path))?;
        }
        let before = operations(&self.data)?;
        let mut shard_entries = Vec::new();
        for shard in all_served(map)? {
            self.go_on()?;
            let path = shards.join(node::shard_folder(shard.key));
            // All that is in the log now is in the checkpoint too.
            let sequence = shard.database.sequence();
            let taken = shard.database.checkpoint(&path);
            taken.map_err(|source| BackupError::Checkpoint { shard: shard.key, source })?;
            shard_entries.push(ShardEntry { shard: shard.key, sequence });
        }
        copy_small(&self.data.join("identity"), &folder.join("identity"))?;
        for record in node::record_files(&self.data)? {
            let name = record.file_name().unwrap_or_default();
            copy_small(&record, &records.join(name))?;
        }
        // Shards that were taken before and behind a step would not fit together.
        for (keyspace, operation) in operations(folder)? {
            if before.get(&keyspace).is_some_and(|before| *before != operation) {
                return Err(BackupError::Operation(keyspace));
            }
        }
        // Read from the copy: what is described is what is there.
        let identity = Identity::load_or_draw(folder)?;
        let mut keyspaces = Vec::new();
        for record in node::load_records(folder)?.into_values() {
            let in_backup = |shard| shard_entries.iter().any(|entry: &ShardEntry| entry.shard == shard);
            let own: Vec<_> = record.shards_of(identity.store).map(|(shard, _)| shard).collect();
            if own.into_iter().all(|shard| in_backup(ShardKey { keyspace: record.id, shard })) {
                keyspaces.push(record);
                continue;
            }
            // Created when the shards were taken already.
            let path = records.join(record.id.to_string());
            fs::remove_file(&path).map_err(at(&path))?;
        }

        let (mut folders, mut paths) = (Vec::new(), Vec::new());
        list(folder, &mut folders, &mut paths).map_err(at(folder))?;
        let mut files = Vec::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        for path in &paths {
            files.push(self.describe(folder, path, &mut chunk)?);
        }
        let manifest = Manifest {
            name: name.to_owned(),
            cluster: identity.cluster,
            store: identity.store,
            data_format: node::FORMAT_VERSION,
            started_s,
            finished_s: unix_seconds(),
            keyspaces,
            shards: shard_entries,
            files,
        };
        let path = folder.join(MANIFEST);
        write_synced(&path, manifest.to_text().as_bytes()).map_err(at(&path))?;
        folders.iter().try_for_each(|folder| sync_folder(folder))?;
        Ok(manifest)
    }

    /// Syncs a file and takes its checksum.
    fn describe(&self, folder: &Path, path: &Path, chunk: &mut [u8]) -> Result<FileEntry, BackupError> {
        let mut file = File::open(path).map_err(at(path))?;
        file.sync_all().map_err(at(path))?;
        let (mut crc, mut bytes) = (Crc64::default(), 0);
        loop {
            self.go_on()?;
            let length = file.read(chunk).map_err(at(path))?;
            if length == 0 {
                break;
            }
            crc.update(&chunk[..length]);
            bytes += length as u64;
        }
        let name = path.strip_prefix(folder).expect("it was found below this folder");
        Ok(FileEntry { name: name.display().to_string(), bytes, checksum: crc.value() })
    }
}

/// The last operation of each keyspace, none of which may go on.
fn operations(data: &Path) -> Result<BTreeMap<String, Option<u64>>, BackupError> {
    let mut operations = BTreeMap::new();
    for record in node::load_records(data)?.into_values() {
        if record.active_operation().is_some() {
            return Err(BackupError::Operation(record.name));
        }
        operations.insert(record.name, record.operation.map(|operation| operation.id));
    }
    Ok(operations)
}

/// All shards of the store in order; a backup without one of them would look whole and not be.
fn all_served(map: &ShardMap) -> Result<Vec<Arc<Shard>>, BackupError> {
    let mut keys: Vec<ShardKey> = map.keys().collect();
    keys.sort_unstable();
    let served = |shard: ShardKey| {
        let not_served = |reason: &str| BackupError::NotServed { shard, reason: reason.to_owned() };
        match map.entry(shard) {
            Some(Entry::Serving(open)) if open.is_failed() => Err(not_served("it met an error of its disk")),
            Some(Entry::Serving(open)) => Ok(Arc::clone(open)),
            Some(Entry::Opening) | None => Err(not_served("it is being opened")),
            Some(Entry::Closing(text) | Entry::Failed(text)) => Err(not_served(text)),
        }
    };
    // A replica is backed up by its primary's store.
    let is_replica = |shard: ShardKey| match map.entry(shard) {
        Some(Entry::Serving(open)) => open.replication.is_replica(),
        Some(Entry::Opening | Entry::Closing(_) | Entry::Failed(_)) | None => false,
    };
    keys.into_iter().filter(|key| !is_replica(*key)).map(served).collect()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> BackupError + use<> {
    let path = path.to_owned();
    move |source| BackupError::Io { path, source }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// When the latest backup here was done.
fn last_done_s(backups: &Path) -> io::Result<u64> {
    let entries = match fs::read_dir(backups) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut last = 0;
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some() {
            continue;
        }
        match Manifest::load(&path) {
            Ok(manifest) => last = last.max(manifest.finished_s),
            Err(error) => tracing::warn!(folder = %path.display(), %error, "no backup is in this folder"),
        }
    }
    Ok(last)
}

fn remove_unfinished(backups: &Path) -> Result<(), BackupError> {
    for entry in fs::read_dir(backups).map_err(at(backups))? {
        let path = entry.map_err(at(backups))?.path();
        if path.extension().is_some_and(|extension| extension == UNFINISHED) {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

/// Every folder (itself included) and every file below one, in order.
fn list(folder: &Path, folders: &mut Vec<PathBuf>, files: &mut Vec<PathBuf>) -> io::Result<()> {
    folders.push(folder.to_owned());
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort_unstable();
    for path in paths {
        if path.is_dir() {
            list(&path, folders, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn copy_small(from: &Path, to: &Path) -> Result<(), BackupError> {
    let content = fs::read(from).map_err(at(from))?;
    write_synced(to, &content).map_err(at(to))
}

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    fs::write(path, content)?;
    File::open(path)?.sync_all()
}

fn sync_folder(folder: &Path) -> Result<(), BackupError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::restore::{RestoreError, restore};
    use super::*;
    use crate::config::Config;
    use crate::{Store, StoreHandle};
    use tempfile::TempDir;
    use vasto_proto::id::KeyspaceId;
    use vasto_proto::topology::KeyspaceRecord;

    fn open(data: &Path) -> Store {
        Store::open(Config { data: data.to_owned(), ..Config::default() }).unwrap()
    }

    /// A store of three shards with some rows in each.
    fn filled(folder: &TempDir) -> (Store, PathBuf) {
        let data = folder.path().join("data");
        let store = open(&data);
        let handle = store.handle();
        handle.put_record(KeyspaceRecord::new(KeyspaceId(0), "0", &[handle.id(); 3]).unwrap()).unwrap();
        write(&handle, b"before");
        (store, data)
    }

    fn write(handle: &StoreHandle, value: &[u8]) {
        for shard in handle.core().shards.current().serving() {
            shard.database.put_meta(b"test", value, crate::engine::Tier::Disk).unwrap();
        }
    }

    fn values(handle: &StoreHandle) -> Vec<Vec<u8>> {
        let map = handle.core().shards.current();
        map.serving().map(|shard| shard.database.meta(b"test").unwrap().unwrap()).collect()
    }

    fn back_up(handle: &StoreHandle, name: &str) -> Result<(), BackupError> {
        let core = handle.core();
        core.backups.begin(name)?;
        core.backups.run(&core.shards.current(), name)
    }

    #[test]
    fn a_backup_holds_what_was_written_before_it_and_nothing_after() {
        let folder = tempfile::tempdir().unwrap();
        let (store, data) = filled(&folder);
        let handle = store.handle();
        assert_eq!(handle.core().backups.status(), Status::default());
        back_up(&handle, "first").unwrap();
        write(&handle, b"after");
        let restored = folder.path().join("restored");
        let manifest = restore(&data.join("backups/first"), &restored).unwrap();
        assert_eq!((manifest.store, manifest.shards.len()), (handle.id(), 3));
        let copy = open(&restored);
        assert_eq!(copy.handle().id(), handle.id());
        assert_eq!(values(&copy.handle()), [b"before"; 3]);
        assert_eq!(values(&handle), [b"after"; 3]);
        let status = handle.core().backups.status();
        assert_eq!(status, Status { is_running: false, last_done_s: manifest.finished_s, has_failed: false });
        // The next life of the store knows it too; the copy has no backups.
        drop(handle);
        drop(store);
        assert_eq!(open(&data).handle().core().backups.status(), status);
        assert_eq!(copy.handle().core().backups.status().last_done_s, 0);
    }

    #[test]
    fn one_at_a_time_and_each_name_once() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = filled(&folder);
        let handle = store.handle();
        let backups = &handle.core().backups;
        backups.begin("a").unwrap();
        assert!(matches!(backups.begin("b"), Err(BackupError::Busy)));
        backups.run(&handle.core().shards.current(), "a").unwrap();
        for name in ["a", "", "../a", "a/b", ".", &"x".repeat(65)] {
            assert!(matches!(backups.begin(name), Err(BackupError::Name(_))), "{name}");
        }
        back_up(&handle, "b").unwrap();
    }

    #[test]
    fn a_failed_backup_leaves_nothing_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let (store, data) = filled(&folder);
        let handle = store.handle();
        let left = data.join("backups/crashed.unfinished/shards");
        fs::create_dir_all(&left).unwrap();
        let shards = &handle.core().shards;
        let key = shards.current().keys().next().unwrap();
        let entry = shards.current().entry(key).cloned();
        shards.set(key, Some(Entry::Failed("for the test".to_owned())));
        assert!(matches!(back_up(&handle, "a"), Err(BackupError::NotServed { shard, .. }) if shard == key));
        assert_eq!(fs::read_dir(data.join("backups")).unwrap().count(), 0, "the crashed one is gone too");
        assert!(handle.core().backups.status().has_failed);
        shards.set(key, entry);
        handle.core().backups.stop();
        assert!(matches!(back_up(&handle, "a"), Err(BackupError::Stopping)));
        assert_eq!(fs::read_dir(data.join("backups")).unwrap().count(), 0);
    }

    #[test]
    fn damage_is_refused_with_the_name_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (store, data) = filled(&folder);
        back_up(&store.handle(), "a").unwrap();
        let backup = data.join("backups/a");
        let restored = folder.path().join("restored");
        let (mut folders, mut files) = (Vec::new(), Vec::new());
        list(&backup, &mut folders, &mut files).unwrap();
        assert!(files.len() > 10, "{files:?}");
        for path in &files {
            let content = fs::read(path).unwrap();
            let check = |what: &str| match restore(&backup, &restored) {
                Err(RestoreError::Damaged { path: named, .. }) => assert_eq!(named, *path, "{what}"),
                Err(RestoreError::NoBackup(named)) => assert_eq!(named.join(MANIFEST), *path, "{what}"),
                other => panic!("{what} of {}: {other:?}", path.display()),
            };
            fs::remove_file(path).unwrap();
            check("loss");
            // Hard links: never written in place.
            if !content.is_empty() {
                let mut flipped = content.clone();
                flipped[content.len() / 2] ^= 1;
                fs::write(path, flipped).unwrap();
                check("flip");
                fs::write(path, &content[..content.len() - 1]).unwrap();
                check("cut");
            }
            fs::write(path, [&content[..], b"x"].concat()).unwrap();
            check("growth");
            fs::write(path, content).unwrap();
        }
        assert!(!restored.exists());
        restore(&backup, &restored).unwrap();
        assert!(matches!(restore(&backup, &restored), Err(RestoreError::NotEmpty(_))));
    }
}
