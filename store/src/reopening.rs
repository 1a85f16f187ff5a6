//! Opens shards; closes those that met an error of their disk, and opens again what is not open, with growing pauses.
//!
//! Nothing on the disk is deleted or repaired, so trying again costs little, and a folder that was restored is served without a restart.

use crate::config::Config;
use crate::engine::EngineError;
use crate::engine::garbage::{Rules, UNKNOWN_COPIES};
use crate::lease::state::{LeaseState, Need};
use crate::node::{Records, shard_folder};
use crate::replication::{self, Part};
use crate::resize;
use crate::shard::Shard;
use crate::shard::alarm::Woken;
use crate::shard::executor::Core;
use crate::shard::map::Entry;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vasto_proto::id::{ShardKey, StoreId};
use vasto_proto::topology::{KeyspaceRecord, Layout};

/// Between attempts to open a shard: doubles from the first to the last.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// While the disk is full: writes must go on within 15 s of there being space.
const PAUSE_FULL: Duration = Duration::from_secs(4);
/// Between looks whether the users of a closing shard have left: a batch takes milliseconds, a walk seconds.
const LEAVING_PAUSE: Duration = Duration::from_millis(20);

/// Opens single shards of a store.
#[derive(Clone)]
pub struct Opener {
    store: StoreId,
    config: Arc<Config>,
    core: Arc<Core>,
}

impl Opener {
    pub fn new(store: StoreId, config: &Config, core: &Arc<Core>) -> Self {
        Self { store, config: Arc::new(config.clone()), core: Arc::clone(core) }
    }

    fn folder(&self, key: ShardKey) -> PathBuf {
        self.config.data.join("shards").join(shard_folder(key))
    }

    /// Makes the folder of a new shard, in which its first opening makes a database. Call it before the record is kept: a shard of a
    /// known record has a folder, and one whose folder is missing is not taken for an empty one. What an earlier shard of this name has left,
    /// if it could not be deleted, goes now.
    pub fn make_folder(&self, key: ShardKey) -> io::Result<()> {
        let (shards, folder) = (self.config.data.join("shards"), self.folder(key));
        replication::remove_beside(&shards, key)?;
        match fs::remove_dir_all(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        fs::create_dir_all(folder)?;
        File::open(shards)?.sync_all()
    }

    /// Opens a shard of this store that is not open and serves it; else the gate says why it is not served.
    pub fn open(&self, record: &KeyspaceRecord, key: ShardKey) -> Result<(), EngineError> {
        let shards = &self.core.shards;
        let Some((_, described)) = record.copies_of(self.store).find(|(shard, _)| *shard == key.shard) else {
            shards.set(key, None);
            return Ok(());
        };
        shards.set(key, Some(Entry::Opening));
        let folder = self.folder(key);
        // How many copies there are it hears with its part.
        let rules = Rules { grace: self.config.gc_grace, replicated_ns: UNKNOWN_COPIES };
        let fsync = record.settings.fsync.unwrap_or(self.config.fsync);
        let swapped = replication::swap_in(&self.config.data.join("shards"), key);
        let swapped = swapped.map_err(|error| EngineError::Disk(format!("cannot put a copy in its place: {error}")));
        let part = Part::new(self.store, described, record.settings.min_replicas());
        let engine = &self.core.engine;
        let open =
            || if part.has_others() { engine.open_followed(&folder, rules) } else { engine.open(&folder, rules) };
        let opened = swapped.and_then(|_| open()).and_then(|database| {
            let number = record.name.parse().ok();
            let (epoch, alarm) = (described.epoch, &self.core.alarm);
            let need = Need::of(record, described, self.store);
            let lease = Arc::new(LeaseState::new(key, Arc::clone(&self.core.clock), epoch, need));
            let shard = Shard::new(key, epoch, self.store, database, fsync, alarm, number, lease)?;
            let shard = Arc::new(shard);
            replication::assume(&self.core, &shard, part.clone())?;
            resize::follow(&self.core, &shard, record, &Layout::of(record))?;
            Ok(shard)
        });
        match opened {
            Ok(shard) => {
                shards.set(key, Some(Entry::Serving(shard)));
                Ok(())
            }
            Err(error) => {
                shards.set(key, Some(Entry::Failed(format!("{} cannot be opened: {error}", folder.display()))));
                self.core.alarm.ring();
                Err(error)
            }
        }
    }
}

/// The thread that closes and opens again.
pub struct Reopening {
    opener: Opener,
    records: Arc<Records>,
    /// The store is stopping.
    closed: Arc<AtomicBool>,
    /// Shards whose last users are leaving.
    leaving: Vec<Arc<Shard>>,
    attempts: HashMap<ShardKey, Attempts>,
}

/// What was tried to open a shard.
struct Attempts {
    next: Instant,
    pause: Duration,
}

impl Reopening {
    pub fn new(opener: Opener, records: &Arc<Records>, closed: &Arc<AtomicBool>) -> Self {
        Self {
            opener,
            records: Arc::clone(records),
            closed: Arc::clone(closed),
            leaving: Vec::new(),
            attempts: HashMap::new(),
        }
    }

    /// The loop of the thread; ends when the store stops.
    pub fn run(mut self) {
        loop {
            self.withdraw_failed();
            self.close_left();
            self.open_due();
            let core = Arc::clone(&self.opener.core);
            let next_look = (!self.leaving.is_empty()).then(|| Instant::now() + LEAVING_PAUSE);
            let next_attempt = self.attempts.values().map(|attempts| attempts.next).min();
            match core.alarm.wait(next_look.into_iter().chain(next_attempt).min()) {
                Woken::Work => {}
                Woken::Stop => return,
            }
        }
    }

    /// Takes failed shards out of the map.
    fn withdraw_failed(&mut self) {
        let shards = &self.opener.core.shards;
        let is_over = |shard: &&Arc<Shard>| shard.is_failed() || shard.replication.is_replaced();
        for shard in shards.current().serving().filter(is_over) {
            // A record that is being carried out may replace the entry as well.
            let _records = self.records.lock();
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            // Its keyspace may have been dropped meanwhile: then another thread closes it.
            if !matches!(shards.current().entry(shard.key), Some(Entry::Serving(now)) if Arc::ptr_eq(now, shard)) {
                continue;
            }
            shard.replication.stop_following();
            let reason = reason_of(shard);
            shard.durability.end(&format!("shard {} met an error of its disk: {reason}", shard.key));
            shards.set(shard.key, Some(Entry::Closing(reason)));
            shard.database.stop_background_work();
            self.leaving.push(Arc::clone(shard));
        }
    }

    /// Closes the shards that nobody uses any more.
    fn close_left(&mut self) {
        if self.leaving.is_empty() {
            return;
        }
        let shards = &self.opener.core.shards;
        shards.refresh_lent();
        for shard in std::mem::take(&mut self.leaving) {
            let key = shard.key;
            match Arc::try_unwrap(shard) {
                Ok(shard) => {
                    let reason = reason_of(&shard);
                    // Closes the database; may wait for the disk.
                    drop(shard);
                    let _records = self.records.lock();
                    if !self.closed.load(Ordering::Acquire)
                        && matches!(shards.current().entry(key), Some(Entry::Closing(_)))
                    {
                        shards.set(key, Some(Entry::Failed(format!("it was closed: {reason}"))));
                    }
                    self.attempts.insert(key, Attempts::beginning(Instant::now()));
                }
                Err(shard) => self.leaving.push(shard),
            }
        }
    }

    /// Opens what is not open and whose time has come.
    fn open_due(&mut self) {
        let Self { opener, attempts, records, closed, .. } = self;
        let shards = &opener.core.shards;
        let failed: Vec<ShardKey> = shards.current().failed().collect();
        attempts.retain(|key, _| failed.contains(key));
        for key in failed {
            let now = Instant::now();
            let attempts = attempts.entry(key).or_insert_with(|| Attempts::beginning(now + PAUSE_MIN));
            if attempts.next > now {
                continue;
            }
            let records = records.lock();
            if closed.load(Ordering::Acquire) {
                return;
            }
            // A record may have opened it meanwhile, or taken it away.
            let Some(Entry::Failed(known)) = shards.current().entry(key).cloned() else { continue };
            let Some(record) = records.get(&key.keyspace) else { continue };
            match opener.open(record, key) {
                Ok(()) => tracing::info!(shard = %key, "shard is open again"),
                Err(error) => {
                    attempts.failed(&error);
                    // One line an error, not one an attempt.
                    if !known.ends_with(&error.to_string()) {
                        tracing::error!(shard = %key, %error, "shard cannot be opened; it is tried further on");
                    }
                }
            }
        }
    }
}

/// Why a shard is closed that was open.
fn reason_of(shard: &Shard) -> String {
    let is_replaced = shard.replication.is_replaced().then(|| "a new copy takes its place".to_owned());
    shard.trouble().or(is_replaced).unwrap_or_default()
}

impl Attempts {
    fn beginning(next: Instant) -> Self {
        Self { next, pause: PAUSE_MIN }
    }

    fn failed(&mut self, error: &EngineError) {
        let now = Instant::now();
        match error {
            EngineError::Full(_) => self.next = now + PAUSE_FULL,
            EngineError::NotInMemory
            | EngineError::Stalled
            | EngineError::Disk(_)
            | EngineError::Corrupt(_)
            | EngineError::Failed(_) => {
                self.next = now + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
            }
        }
    }
}
