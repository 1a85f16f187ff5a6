//! Whole copies: a checkpoint that leaves file by file, and one that comes into a side folder until it can take the place of what is there.

use crate::engine::database::Database;
use crate::engine::garbage::{Rules, UNKNOWN_COPIES};
use crate::engine::{Engine, EngineError, crc32c, meta};
use crate::node::shard_folder;
use crate::replication::history::History;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;
use vasto_proto::id::ShardKey;
use vasto_proto::pb;
use vasto_proto::topology::Position;

/// Bytes that travel in one message.
const PART_BYTES: usize = 256 << 10;
/// A copy whose store has gone away is kept for its return.
const KEPT: Duration = Duration::from_secs(60);

/// Behind the name of a shard's folder: a checkpoint that is being sent (with its number), a copy that comes, one that is whole, and what
/// it has taken the place of.
const SENT: &str = "sending-";
const COMING: &str = "copying";
const WHOLE: &str = "copied";
const REPLACED: &str = "replaced";

/// Why a copy did not become whole.
#[derive(Debug, Error)]
pub enum CopyError {
    #[error("cannot use {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("file {0} of the copy came with another checksum")]
    Checksum(String),
    #[error("the copy is not what was announced")]
    NotAnnounced,
    #[error("the copy does not say where it stands")]
    NoPosition,
    #[error(transparent)]
    Engine(#[from] EngineError),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CopyError + use<> {
    let path = path.to_owned();
    move |source| CopyError::Io { path, source }
}

fn beside(shards: &Path, key: ShardKey, what: &str) -> PathBuf {
    shards.join(format!("{}.{what}", shard_folder(key)))
}

/// A checkpoint on its way to a follower. Its folder goes with it.
#[derive(Debug)]
pub struct OutgoingCopy {
    pub id: u64,
    pub position: Position,
    pub files: Vec<(String, u64)>,
    folder: PathBuf,
    is_sent: AtomicBool,
    used: parking_lot::Mutex<Instant>,
}

impl OutgoingCopy {
    /// Takes a checkpoint. Blocks on the disk.
    pub fn make(database: &Database, shards: &Path, key: ShardKey, position: Position) -> Result<Self, CopyError> {
        let id = fastrand::u64(1..);
        let folder = beside(shards, key, &format!("{SENT}{id:016x}"));
        let mut copy = Self {
            id,
            position,
            files: Vec::new(),
            folder,
            is_sent: AtomicBool::new(false),
            used: parking_lot::Mutex::new(Instant::now()),
        };
        database.checkpoint(&copy.folder)?;
        for entry in fs::read_dir(&copy.folder).map_err(at(&copy.folder))? {
            let entry = entry.map_err(at(&copy.folder))?;
            let bytes = entry.metadata().map_err(at(&copy.folder))?.len();
            copy.files.push((entry.file_name().to_string_lossy().into_owned(), bytes));
        }
        copy.files.sort();
        Ok(copy)
    }

    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }

    pub fn start(&self, from_bytes: u64) -> pb::CopyStart {
        let file = |(name, bytes): &(String, u64)| pb::CopyFile { name: name.clone(), bytes: *bytes };
        pb::CopyStart {
            copy_id: self.id,
            position: Some(self.position.into()),
            bytes: self.bytes(),
            files: self.files.iter().map(file).collect(),
            from_bytes,
        }
    }

    /// The next part behind so many bytes of all files; empty behind the last. Blocks on the disk.
    pub fn read(&self, mut from_bytes: u64) -> Result<Vec<u8>, CopyError> {
        *self.used.lock() = Instant::now();
        for (name, bytes) in &self.files {
            if from_bytes >= *bytes {
                from_bytes -= bytes;
                continue;
            }
            let path = self.folder.join(name);
            let wanted = (*bytes - from_bytes).min(PART_BYTES as u64) as usize;
            let mut part = vec![0; wanted];
            let read = File::open(&path).and_then(|mut file| {
                file.seek(SeekFrom::Start(from_bytes))?;
                file.read_exact(&mut part)
            });
            read.map_err(at(&path))?;
            return Ok(part);
        }
        Ok(Vec::new())
    }

    /// The checksum of each file. Blocks on the disk.
    pub fn checksums(&self) -> Result<Vec<u32>, CopyError> {
        self.files.iter().map(|(name, bytes)| checksum(&self.folder.join(name), *bytes)).collect()
    }

    pub fn is_sent(&self) {
        self.is_sent.store(true, Ordering::Release);
    }

    /// Whether nobody will ask for it any more.
    pub fn is_forgotten(&self) -> bool {
        self.is_sent.load(Ordering::Acquire) || self.used.lock().elapsed() > KEPT
    }
}

impl Drop for OutgoingCopy {
    fn drop(&mut self) {
        // What is left is deleted at the next start.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The checksum of a file's first bytes.
fn checksum(path: &Path, bytes: u64) -> Result<u32, CopyError> {
    let mut file = File::open(path).map_err(at(path))?.take(bytes);
    let (mut sum, mut chunk) = (0, vec![0; PART_BYTES]);
    loop {
        let length = file.read(&mut chunk).map_err(at(path))?;
        if length == 0 {
            return Ok(sum);
        }
        sum = crc32c::extend(sum, &[&chunk[..length]]);
    }
}

/// A copy that comes.
pub struct IncomingCopy {
    pub id: u64,
    /// How much of it is here.
    pub bytes: u64,
    files: Vec<(String, u64)>,
    folder: PathBuf,
    /// The file that is being written.
    current: usize,
    open: Option<File>,
    in_current: u64,
}

impl IncomingCopy {
    /// Makes an empty side folder. Blocks on the disk.
    pub fn begin(shards: &Path, key: ShardKey, start: &pb::CopyStart) -> Result<Self, CopyError> {
        let folder = beside(shards, key, COMING);
        remove(&folder)?;
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let is_plain = |name: &str| !name.is_empty() && name != "." && name != ".." && !name.contains('/');
        if start.from_bytes != 0 || !start.files.iter().all(|file| is_plain(&file.name)) {
            return Err(CopyError::NotAnnounced);
        }
        let files = start.files.iter().map(|file| (file.name.clone(), file.bytes)).collect();
        Ok(Self { id: start.copy_id, bytes: 0, files, folder, current: 0, open: None, in_current: 0 })
    }

    /// Takes the next part. Blocks on the disk.
    pub fn take(&mut self, mut part: &[u8]) -> Result<(), CopyError> {
        while !part.is_empty() {
            let Some((name, bytes)) = self.files.get(self.current) else { return Err(CopyError::NotAnnounced) };
            let path = self.folder.join(name);
            let file = match &mut self.open {
                Some(file) => file,
                None => self.open.insert(File::create(&path).map_err(at(&path))?),
            };
            let length = part.len().min(usize::try_from(bytes - self.in_current).unwrap_or(usize::MAX));
            file.write_all(&part[..length]).map_err(at(&path))?;
            part = &part[length..];
            self.in_current += length as u64;
            self.bytes += length as u64;
            if self.in_current == *bytes {
                file.sync_all().map_err(at(&path))?;
                self.next_file();
            }
        }
        Ok(())
    }

    fn next_file(&mut self) {
        self.open = None;
        self.in_current = 0;
        self.current += 1;
    }

    /// Checks what has come, makes it a database of its own and marks it as whole: the next opening of the shard puts it in the place of
    /// what is there. Blocks on the disk.
    pub fn finish(
        mut self,
        engine: &Engine,
        shards: &Path,
        key: ShardKey,
        checksums: &[u32],
    ) -> Result<Position, CopyError> {
        // Files without bytes have no part.
        while let Some((name, 0)) = self.files.get(self.current) {
            let path = self.folder.join(name);
            File::create(&path).and_then(|file| file.sync_all()).map_err(at(&path))?;
            self.next_file();
        }
        if self.current != self.files.len() || checksums.len() != self.files.len() {
            return Err(CopyError::NotAnnounced);
        }
        for ((name, bytes), expected) in self.files.iter().zip(checksums) {
            if checksum(&self.folder.join(name), *bytes)? != *expected {
                return Err(CopyError::Checksum(name.clone()));
            }
        }
        let position = {
            let rules = Rules { grace: Duration::MAX, replicated_ns: UNKNOWN_COPIES };
            let database = engine.open(&self.folder, rules)?;
            make_own(&database)?
        };
        sync_folder(&self.folder)?;
        let whole = beside(shards, key, WHOLE);
        remove(&whole)?;
        fs::rename(&self.folder, &whole).map_err(at(&whole))?;
        sync_folder(shards)?;
        Ok(position)
    }
}

/// Makes a database of a store's own of what was its primary's: its log is another from here on.
fn make_own(database: &Database) -> Result<Position, CopyError> {
    let history = database.meta(meta::HISTORY)?.and_then(|bytes| History::from_bytes(&bytes));
    let log = database.meta(meta::LOG_ID)?.and_then(|bytes| bytes.as_slice().try_into().ok().map(u64::from_be_bytes));
    let noted = database.meta(meta::POSITION)?.and_then(|bytes| Position::from_bytes(&bytes));
    let position = history.and_then(|history| history.position(log, noted, database.sequence()));
    let position = position.ok_or(CopyError::NoPosition)?;
    let mut writes = database.writes(2, 64);
    writes.put_meta(meta::POSITION, &position.to_bytes());
    writes.put_meta(meta::LOG_ID, &fastrand::u64(1..).to_be_bytes());
    database.write_synced(writes)?;
    // Marks in its log speak of what the other store had synced: nothing of that log is read again.
    database.flush()?;
    database.sync_log()?;
    Ok(position)
}

/// Puts a whole copy in the place of what is there. Nobody may have either open. After a crash at any moment the next call ends it.
pub fn swap_in(shards: &Path, key: ShardKey) -> io::Result<bool> {
    let (folder, whole) = (shards.join(shard_folder(key)), beside(shards, key, WHOLE));
    let replaced = beside(shards, key, REPLACED);
    let is_there = |path: &Path| path.try_exists();
    if !is_there(&whole)? {
        if is_there(&replaced)? {
            fs::remove_dir_all(&replaced)?;
        }
        return Ok(false);
    }
    if is_there(&folder)? {
        if is_there(&replaced)? {
            fs::remove_dir_all(&replaced)?;
        }
        keep_aside(&folder, &whole)?;
        fs::rename(&folder, &replaced)?;
    }
    fs::rename(&whole, &folder)?;
    File::open(shards)?.sync_all()?;
    if is_there(&replaced)? {
        fs::remove_dir_all(&replaced)?;
    }
    Ok(true)
}

/// Rows that were kept aside in one folder stay so in the next.
fn keep_aside(from: &Path, to: &Path) -> io::Result<()> {
    match fs::copy(from.join(super::hand_over::QUARANTINE), to.join(super::hand_over::QUARANTINE)) {
        Ok(_) => File::open(to.join(super::hand_over::QUARANTINE))?.sync_all(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Deletes what copies of a shard have left beside its folder.
pub fn remove_beside(shards: &Path, key: ShardKey) -> io::Result<()> {
    for what in [COMING, WHOLE, REPLACED] {
        match fs::remove_dir_all(beside(shards, key, what)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Deletes what was on its way when the store ended.
pub fn remove_unfinished(shards: &Path) -> io::Result<()> {
    for entry in fs::read_dir(shards)? {
        let path = entry?.path();
        let what = path.extension().and_then(|what| what.to_str()).unwrap_or_default();
        if what == COMING || what.starts_with(SENT) {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

fn remove(folder: &Path) -> Result<(), CopyError> {
    match fs::remove_dir_all(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(at(folder)(error)),
    }
}

fn sync_folder(folder: &Path) -> Result<(), CopyError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}
