//! A store's life: its data folder (lock, identity, records), its shards and threads, from open to close.

use crate::backup::Backups;
use crate::config::{Config, Limits};
use crate::engine::{Engine, EngineError};
use crate::holder::HolderFiles;
use crate::lease::clock::BootClock;
use crate::lease::holder::Holder as Lessor;
use crate::lease::keeper::{LeaseFigures, Leases};
use crate::lease::state::Need;
use crate::metrics::Counters;
use crate::peers::PeerFile;
use crate::removal::{Dropped, Pending, Removal, left_behind};
use crate::reopening::{Opener, Reopening};
use crate::replication::{self, Figures, Part, Replicator};
use crate::resize::{self, pace::Pace};
use crate::rpc;
use crate::sealed::{self, checksum, replace_file};
use crate::shard::Shard;
use crate::shard::durability::{SYNC_THREADS, SyncBell};
use crate::shard::executor::Core;
use crate::shard::lane::LanePool;
use crate::shard::map::{Entry, Shards};
use crate::shard::session::{self, LateAnswers, Session};
use crate::shard::stripes::Stripes;
use parking_lot::Mutex;
use prost::Message;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vasto_proto::id::{ClusterId, Epoch, KeyspaceId, ShardKey, StoreId};
use vasto_proto::pb;
use vasto_proto::topology::ballot::{Accepted, Answer, Refusal, Request, Term};
use vasto_proto::topology::{Entry as VotedEntry, Fsync, KeyspaceRecord, Layout, NOBODY, Peers, Role, ShardStatus};

/// The layout of the data folder that this code reads and writes. Version 2: rows may carry when they were written. It is raised here
/// too, so that an older program does not open a single shard.
pub const FORMAT_VERSION: u32 = 2;

/// How long a primary that goes waits for its copies, so that what it has run is answered: longer than they take on a busy disk, less than the
/// second that gateways give it, and a part of its lease.
const ANSWERS_PATIENCE: Duration = Duration::from_millis(600);

/// Why a store does not start.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("data folder {0} is used by another process")]
    InUse(PathBuf),
    #[error("data folder {path} has format version {found}; this program knows {FORMAT_VERSION} and older")]
    NewerFormat { path: PathBuf, found: u32 },
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("cannot use {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Why a record was not accepted.
#[derive(Debug, Error)]
pub enum PutRecordError {
    #[error("another record of keyspace {keyspace} with epoch {epoch} is here already")]
    Conflict { keyspace: KeyspaceId, epoch: u64 },
    #[error("cannot persist the record of keyspace {keyspace}")]
    Persist { keyspace: KeyspaceId, source: io::Error },
    /// The record is persisted; this shard cannot be served as it says.
    #[error("cannot serve shard {shard}: {source}")]
    OpenShard { shard: ShardKey, source: EngineError },
    #[error("the store is closed")]
    Closed,
}

/// Why a cluster id was not accepted.
#[derive(Debug, Error)]
pub enum ClusterError {
    #[error("this store belongs to cluster {own}, not {other}")]
    Another { own: ClusterId, other: ClusterId },
    #[error("cannot persist the cluster id")]
    Persist(#[from] io::Error),
}

/// Why a server ended before it was told to.
#[derive(Debug, Error)]
pub enum RunError {
    #[error("cannot start a worker")]
    Worker(#[source] io::Error),
    #[error("worker {0} ended unexpectedly")]
    WorkerEnded(usize),
}

/// An opened store that does not serve yet.
pub struct Store {
    node: Arc<Node>,
}

/// A store that has an address.
pub struct Bound {
    node: Arc<Node>,
    listener: tokio::net::TcpListener,
    address: SocketAddr,
}

/// The store as others in its process use it.
#[derive(Clone)]
pub struct StoreHandle {
    node: Arc<Node>,
}

/// The newest record of each keyspace.
pub type Records = Mutex<BTreeMap<KeyspaceId, KeyspaceRecord>>;

/// What a store consists of.
struct Node {
    id: StoreId,
    config: Config,
    core: Arc<Core>,
    opener: Opener,
    cluster: Arc<Mutex<ClusterId>>,
    records: Arc<Records>,
    peers: PeerFile,
    holder: HolderFiles,
    lessor: Arc<Lessor>,
    leases: Arc<Leases>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Dropped to end the thread that hands figures to the recorder.
    exporting: Mutex<Option<mpsc::Sender<()>>>,
    /// Dropped to end the thread that deletes shards of dropped keyspaces.
    removing: Mutex<Option<mpsc::Sender<Dropped>>>,
    /// Shards whose folders are about to be deleted.
    pending: Arc<Pending>,
    closed: Arc<AtomicBool>,
    aside: CancellationToken,
    /// When a master was last heard that leads or is about to; first, when the store was opened.
    leader_heard: Mutex<Instant>,
    /// Held while the store lives, so that no second process opens the folder.
    _lock: File,
}

impl Store {
    /// Opens the data folder and the shards in it; makes both at the first start.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        let folder = &config.data;
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { path, source }
        };
        for path in [folder.clone(), folder.join("records"), folder.join("shards")] {
            fs::create_dir_all(&path).map_err(io_error(&path))?;
        }
        let lock = lock(folder)?;
        let identity = Identity::load_or_draw(folder)?;
        let records = load_records(folder)?;
        let peers = PeerFile::load(folder)?;
        let holder = HolderFiles::load(folder)?;
        let replicator =
            Replicator::new(identity.store, identity.cluster, folder, peers.latest(), config.verify_interval);
        let replicator = replicator.map_err(OpenError::Thread)?;
        replication::remove_unfinished(&replicator.shards).map_err(io_error(&replicator.shards))?;
        let core = Arc::new(Core {
            engine: Engine::new(&config)?,
            limits: Limits {
                proto_max_bulk_len: config.proto_max_bulk_len,
                max_clock_skew_ms: u64::try_from(config.max_clock_skew.as_millis()).unwrap_or(u64::MAX),
            },
            stripes: Stripes::new(config.memory.row_cache_bytes),
            shards: Shards::default(),
            pool: LanePool::default(),
            sync_bell: SyncBell::default(),
            alarm: Arc::default(),
            counters: Default::default(),
            backups: Backups::open(folder),
            clock: Arc::new(BootClock::default()),
            replicator,
            pace: Pace::new(config.resize_bytes_per_second),
        });
        let cluster = Arc::new(Mutex::new(identity.cluster));
        let lessor = Arc::new(Lessor::new(Arc::clone(&core.clock), &records, peers.latest()));
        holder.entries().iter().for_each(|entry| lessor.voted(entry));
        let leases = Leases::new(identity.store, &core, &lessor, &cluster, peers.latest());
        let opener = Opener::new(identity.store, &config, &core);
        let node = Node {
            id: identity.store,
            core,
            opener,
            cluster,
            records: Arc::new(Mutex::new(records)),
            peers,
            holder,
            lessor,
            leases,
            threads: Mutex::default(),
            exporting: Mutex::default(),
            removing: Mutex::default(),
            pending: Arc::default(),
            closed: Arc::default(),
            aside: CancellationToken::new(),
            leader_heard: Mutex::new(Instant::now()),
            config,
            _lock: lock,
        };
        node.start_threads().map_err(OpenError::Thread)?;
        let shards = node.config.data.join("shards");
        for key in left_behind(&node.config.data, node.id, &node.records.lock()).map_err(io_error(&shards))? {
            node.remove(Dropped { key, shard: None });
        }
        for record in node.records.lock().values() {
            if let Err(error) = node.open_shards(record) {
                // The others serve; the gate refuses this one with the reason.
                tracing::error!(%error, "a shard is not served");
            }
        }
        Ok(Self { node: Arc::new(node) })
    }

    pub fn handle(&self) -> StoreHandle {
        StoreHandle { node: Arc::clone(&self.node) }
    }

    pub async fn bind(self) -> io::Result<Bound> {
        let listener = tokio::net::TcpListener::bind(self.node.config.listen).await?;
        let address = listener.local_addr()?;
        Ok(Bound { node: self.node, listener, address })
    }
}

impl Bound {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn handle(&self) -> StoreHandle {
        StoreHandle { node: Arc::clone(&self.node) }
    }

    /// Where gateways reach the store, host:port.
    pub fn advertised(&self) -> String {
        self.node.config.advertise.clone().unwrap_or_else(|| self.address.to_string())
    }

    /// Serves until `shutdown`, then drains the streams and closes the store.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let handle = self.handle();
        let workers = match self.node.config.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let unfencing = resize::unfencing::run(handle.clone(), shutdown.clone());
        let (served, ()) = tokio::join!(rpc::server::serve(&handle, self.listener, workers, shutdown), unfencing);
        let closing = tokio::task::spawn_blocking(move || handle.close());
        if closing.await.is_err() {
            tracing::error!("closing the store panicked");
        }
        served
    }
}

impl StoreHandle {
    pub fn id(&self) -> StoreId {
        self.node.id
    }

    /// 0 until the store has joined a cluster.
    pub fn cluster(&self) -> ClusterId {
        *self.node.cluster.lock()
    }

    /// Joins a cluster for good; refuses if the store belongs to another. Blocks on the disk.
    pub fn set_cluster(&self, cluster: ClusterId) -> Result<(), ClusterError> {
        let mut own = self.node.cluster.lock();
        if *own == cluster {
            return Ok(());
        }
        if *own != ClusterId(0) {
            return Err(ClusterError::Another { own: *own, other: cluster });
        }
        Identity { store: self.node.id, cluster }.save(&self.node.config.data)?;
        *own = cluster;
        self.node.core.replicator.set_cluster(cluster);
        Ok(())
    }

    pub fn records(&self) -> Vec<KeyspaceRecord> {
        self.node.records.lock().values().cloned().collect()
    }

    /// Persists a record and serves the shards in it that are this store's; an older one than that here is ignored. Blocks on
    /// the disk.
    pub fn put_record(&self, record: KeyspaceRecord) -> Result<(), PutRecordError> {
        self.node.put_record(record)
    }

    /// Where the other stores are, and who holds the records, as far as a master has said.
    pub fn peers(&self) -> watch::Receiver<Arc<Peers>> {
        self.node.peers.latest()
    }

    /// Keeps what a master says of the other stores. Blocks on the disk.
    pub fn set_peers(&self, peers: Peers) -> io::Result<()> {
        self.node.peers.set(&self.node.config.data, peers)
    }

    /// Where the leases stand of the shards that need one here.
    pub fn leases(&self) -> Vec<LeaseFigures> {
        self.node.leases.figures()
    }

    /// Answers a primary that asks for leases; waits for nothing.
    pub(crate) fn renew(&self, request: &pb::RenewRequest) -> pb::RenewResponse {
        self.node.lessor.renew(request)
    }

    /// The highest term that this store has promised to follow.
    pub fn promised_term(&self) -> Term {
        self.node.holder.promised()
    }

    /// The group of holders that this store has accepted last.
    pub fn accepted_group(&self) -> Option<Accepted<VotedEntry>> {
        self.node.holder.group()
    }

    /// Votes; the answer may leave, what it promises is on the disk. Blocks on the disk.
    pub fn vote(&self, request: Request<VotedEntry>) -> io::Result<Result<Answer<VotedEntry>, Refusal>> {
        let chosen = || self.node.records.lock().clone();
        self.node.holder.answer(request, chosen, |entry| self.node.lessor.voted(entry))
    }

    /// Takes note that a master leads or is about to.
    pub(crate) fn note_leader(&self) {
        *self.node.leader_heard.lock() = Instant::now();
    }

    /// For how long no master was heard that leads or is about to.
    pub(crate) fn leader_silence(&self) -> Duration {
        self.node.leader_heard.lock().elapsed()
    }

    /// The keyspaces of which slots that this store has are behind a fence, and the versions of their records that set it. `None`
    /// while a record is being followed, which may take its time, and whoever asks must not wait.
    pub(crate) fn fenced(&self) -> Option<Vec<(KeyspaceId, Epoch)>> {
        let records = self.node.records.try_lock()?;
        let fence = |record: &KeyspaceRecord| resize::unfencing::fence_at(record, self.node.id);
        Some(records.values().filter_map(|record| Some((record.id, fence(record)?))).collect())
    }

    /// Changes when masters should hear what [`StoreHandle::shard_statuses`] says without waiting for the next report.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.node.core.replicator.news()
    }

    /// Where each copy on this store stands.
    pub fn shard_statuses(&self) -> Vec<ShardStatus> {
        self.node.core.shards.current().serving().filter_map(|shard| shard.status()).collect()
    }

    /// How far the copies of a shard have come, as this store knows it; `None` if it is not open here.
    pub fn replication_figures(&self, key: ShardKey) -> Option<Figures> {
        match self.node.core.shards.current().entry(key) {
            Some(Entry::Serving(shard)) => shard.replication_figures(),
            Some(Entry::Opening | Entry::Closing(_) | Entry::Failed(_)) | None => None,
        }
    }

    /// When writes of keyspaces are synced whose records do not say.
    pub fn fsync(&self) -> Fsync {
        self.node.config.fsync
    }

    /// The zone and the tags that it was told.
    pub fn zone_and_tags(&self) -> (&str, &[String]) {
        (&self.node.config.zone, &self.node.config.tags)
    }

    /// The machine, and the file system of the data folder on it; empty if that cannot be told.
    pub fn host_and_disk(&self) -> (String, String) {
        let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned());
        let (Ok(host), Ok(status)) = (host, rustix::fs::stat(&self.node.config.data)) else {
            return (String::new(), String::new());
        };
        let disk = format!("{host}/{}", status.st_dev);
        (host, disk)
    }

    /// Bytes free on the disk of the data folder; 0 if that cannot be told.
    pub fn free_disk_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.node.config.data).map_or(0, |disk| disk.f_bavail * disk.f_frsize)
    }

    /// A conversation for one gateway worker, and where its late answers come out. Drop both before the store is opened again.
    pub fn open_session(&self) -> (Session, LateAnswers) {
        session::open(&self.node.core)
    }

    /// The longest value in bytes.
    pub fn proto_max_bulk_len(&self) -> usize {
        self.node.config.proto_max_bulk_len
    }

    /// Rewrites the files of all shards, dropping what is dead. Blocks for long.
    pub fn compact(&self) {
        for shard in self.node.core.shards.current().serving() {
            shard.database.compact();
        }
    }

    #[cfg(test)]
    pub(crate) fn tenure(&self, shard: ShardKey) -> Option<u64> {
        self.node.leases.tenure(shard)
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.node.core
    }

    /// Stops serving, writes out and syncs everything; a second call does nothing. Blocks on the disk.
    pub fn close(&self) {
        self.node.close();
    }

    /// Lets other stores lead what this one leads together with others. Their followers must be served yet. Blocks for a moment.
    pub(crate) fn step_aside(&self) {
        self.node.step_aside();
    }

    /// Cancelled when others may lead what this store has led: it is about to stop.
    pub(crate) fn has_stepped_aside(&self) -> CancellationToken {
        self.node.aside.clone()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.close();
    }
}

impl Node {
    fn start_threads(&self) -> io::Result<()> {
        let mut threads = self.threads.lock();
        let core = Arc::clone(&self.core);
        let reopening = Reopening::new(self.opener.clone(), &self.records, &self.closed);
        let thread = std::thread::Builder::new().name("store-reopening".into());
        threads.push(thread.spawn(move || reopening.run())?);
        for number in 0..SYNC_THREADS {
            let core = Arc::clone(&core);
            let thread = std::thread::Builder::new().name(format!("store-sync-{number}"));
            threads.push(thread.spawn(move || SyncBell::run(&core))?);
        }
        let (removal, removing) = Removal::new(&core, &self.config.data, &self.pending);
        let thread = std::thread::Builder::new().name("store-removal".into());
        threads.push(thread.spawn(move || removal.run())?);
        *self.removing.lock() = Some(removing);
        let core = Arc::clone(&self.core);
        let thread = std::thread::Builder::new().name("store-copies".into());
        threads.push(thread.spawn(move || Replicator::run(&core))?);
        let core = Arc::clone(&self.core);
        let (exporting, ended) = mpsc::channel();
        let thread = std::thread::Builder::new().name("store-figures".into());
        threads.push(thread.spawn(move || Counters::run(&core, &ended))?);
        *self.exporting.lock() = Some(exporting);
        for number in 0..self.config.lane_threads.max(1) {
            let core = Arc::clone(&self.core);
            let thread = std::thread::Builder::new().name(format!("store-lane-{number}"));
            threads.push(thread.spawn(move || LanePool::run(&core))?);
        }
        self.leases.start()
    }

    fn step_aside(&self) {
        let map = self.core.shards.current();
        let led: Vec<_> = map.serving().filter(|shard| shard.has_followers()).cloned().collect();
        replication::fall_silent(&self.core, &led);
        let until = Instant::now() + ANSWERS_PATIENCE;
        led.iter().for_each(|shard| shard.durability.let_answers_leave(until));
        self.leases.stop();
        self.leases.join();
        for shard in &led {
            // Nobody would release them any more.
            shard.durability.end(&format!("the store of shard {} is stopping", shard.key));
        }
        self.aside.cancel();
    }

    fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let shards = &self.core.shards;
        let map = {
            // No record is accepted and no shard opened from here on: whoever holds the lock now finishes first.
            let _records = self.records.lock();
            let map = shards.current();
            for key in map.keys() {
                shards.set(key, Some(Entry::Failed("the store is stopping".to_owned())));
            }
            map
        };
        self.core.replicator.stop();
        self.core.backups.stop();
        self.core.pool.stop();
        self.core.sync_bell.stop();
        self.core.alarm.stop();
        self.exporting.lock().take();
        self.removing.lock().take();
        for thread in self.threads.lock().drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                tracing::error!(thread = name, "a thread had panicked");
            }
        }
        for shard in map.serving() {
            // Releases the answers that wait for it.
            shard.sync();
        }
        // Before the rest, which may take long: another store may serve as soon as this one has given back its right to.
        self.leases.stop();
        for shard in map.serving() {
            if shard.is_read_only() || shard.is_failed() {
                let error = shard.trouble().unwrap_or_default();
                tracing::error!(shard = %shard.key, error, "cannot write out the shard; its log is read at the next start");
                continue;
            }
            if let Err(error) = shard.database.flush().and_then(|()| shard.database.sync_log()) {
                tracing::error!(shard = %shard.key, %error, "cannot write out the shard; its log is read at the next start");
            }
        }
        self.leases.join();
    }

    fn put_record(&self, record: KeyspaceRecord) -> Result<(), PutRecordError> {
        let mut records = self.records.lock();
        if self.closed.load(Ordering::Acquire) {
            return Err(PutRecordError::Closed);
        }
        let is_known = match records.get(&record.id) {
            Some(own) if own.epoch > record.epoch => return Ok(()),
            Some(own) if own.contradicts(&record) => {
                return Err(PutRecordError::Conflict { keyspace: record.id, epoch: record.epoch.0 });
            }
            Some(own) => own.epoch == record.epoch,
            None => false,
        };
        if !is_known {
            self.lessor.heard(&record);
            let persist = |source| PutRecordError::Persist { keyspace: record.id, source };
            for (shard, described) in record.copies_of(self.id) {
                let own = records.get(&record.id);
                let before = own.and_then(|own| own.copies_of(self.id).find(|(known, _)| *known == shard));
                if before.is_some_and(|(_, before)| before.born == described.born) {
                    continue;
                }
                let key = ShardKey { keyspace: record.id, shard };
                if before.is_some() {
                    // A shard of this number that is no more, of whose end nothing was heard here.
                    self.leave(key);
                }
                // It may have been here before, and be on its way out.
                self.pending.wait_for(key).map_err(persist)?;
                self.opener.make_folder(key).map_err(persist)?;
            }
            save_record(&self.config.data, &record).map_err(persist)?;
            records.insert(record.id, record.clone());
        }
        let opened = self.open_shards(&record);
        self.leases.ring();
        opened
    }

    /// Makes the shards served here those of the record; returns the first failure, having tried all.
    fn open_shards(&self, record: &KeyspaceRecord) -> Result<(), PutRecordError> {
        let shards = &self.core.shards;
        let fsync = record.settings.fsync.unwrap_or(self.config.fsync);
        let mut result = Ok(());
        let own: Vec<_> = record.copies_of(self.id).collect();
        for key in shards.current().keys() {
            if key.keyspace == record.id && !own.iter().any(|(shard, _)| *shard == key.shard) {
                self.leave(key);
            }
        }
        // Leases of these are given back now; opening others may take long.
        self.leases.ring();
        let layout = Layout::of(record);
        for (shard, described) in own {
            let key = ShardKey { keyspace: record.id, shard };
            let served = match shards.current().entry(key) {
                // It is being opened anew.
                Some(Entry::Serving(open)) if open.replication.is_replaced() => Ok(()),
                Some(Entry::Serving(open)) => {
                    let need = Need::of(record, described, self.id);
                    let part = Part::new(self.id, described, record.settings.min_replicas());
                    let assumed = if hands_over(open, &part, self.id) {
                        let until = Instant::now() + ANSWERS_PATIENCE;
                        let assumed = replication::assume(&self.core, open, part);
                        // Nothing runs any more, and nobody else serves while this store has its lease: what waits for the copies gets its
                        // answer as long as it has.
                        open.durability.let_answers_leave(until);
                        open.lease.follow(described.epoch, need);
                        assumed
                    } else {
                        // First this: no operation is let in at the new epoch with a lease of the old one.
                        open.lease.follow(described.epoch, need);
                        replication::assume(&self.core, open, part)
                    };
                    let followed = assumed.and_then(|()| resize::follow(&self.core, open, record, &layout));
                    followed.and_then(|()| open.set_fsync(fsync, &self.core.sync_bell))
                }
                // Its old database is still open; the thread that closes it opens it by the newest record.
                Some(Entry::Closing(reason)) => Err(EngineError::Failed(reason.clone())),
                Some(Entry::Opening | Entry::Failed(_)) | None => self.opener.open(record, key),
            };
            if let Err(source) = served
                && result.is_ok()
            {
                result = Err(PutRecordError::OpenShard { shard: key, source });
            }
        }
        result
    }

    /// Serves a shard no more and has its folder deleted.
    fn leave(&self, key: ShardKey) {
        let shards = &self.core.shards;
        let current = shards.current();
        shards.set(key, None);
        let shard = match current.entry(key) {
            Some(Entry::Serving(shard)) => {
                shard.replication.stop_following();
                // What is under way is not answered any more: nobody releases what is held once the shard has left the map.
                shard.lease.end(shard.epoch());
                shard.durability.end(&format!("shard {key} has left this store"));
                Some(Arc::clone(shard))
            }
            // Who closes it has the folder open for a while yet; it goes all the same.
            Some(Entry::Opening | Entry::Closing(_) | Entry::Failed(_)) | None => None,
        };
        drop(current);
        self.remove(Dropped { key, shard });
    }

    /// Has the folder of a shard deleted whose keyspace was dropped; if the store is stopping, its next start does it.
    fn remove(&self, dropped: Dropped) {
        if let Some(removing) = &*self.removing.lock() {
            self.pending.add(dropped.key);
            // The thread lives as long as this sender.
            let _ = removing.send(dropped);
        }
    }
}

/// Whether the shard is served here and goes to another store by plan.
fn hands_over(shard: &Shard, part: &Part, store: StoreId) -> bool {
    let is_planned = part.role == Role::Replica && part.primary != NOBODY && part.previous == store;
    is_planned && shard.epoch() < part.epoch && shard.replication.leads() && shard.lease.allows()
}

/// The name of a shard's folder.
pub fn shard_folder(key: ShardKey) -> String {
    format!("{}-{}", key.keyspace, key.shard)
}

fn lock(folder: &Path) -> Result<File, OpenError> {
    let path = folder.join("LOCK");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|source| OpenError::Io { path, source })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse(folder.to_owned())),
        Err(error) => Err(OpenError::Io { path: folder.to_owned(), source: error.into() }),
    }
}

/// Who the store is: one small text file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub store: StoreId,
    pub cluster: ClusterId,
}

impl Identity {
    pub fn load_or_draw(folder: &Path) -> Result<Self, OpenError> {
        let path = folder.join("identity");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let drawn = Self { store: StoreId(fastrand::u32(1..)), cluster: ClusterId(0) };
                drawn.save(folder).map_err(|source| OpenError::Io { path, source })?;
                return Ok(drawn);
            }
            Err(source) => return Err(OpenError::Io { path, source }),
        };
        let damaged = |reason: &str| OpenError::Damaged { path: path.clone(), reason: reason.to_owned() };
        let (body, sum) = match text.rfind("checksum=") {
            Some(place) => (&text[..place], Some(&text[place..])),
            None => (text.as_str(), None),
        };
        if sum.is_some_and(|sum| sum != checksum_line(body)) {
            return Err(damaged("its checksum is wrong"));
        }
        let mut lines = body.lines();
        let mut field = |name: &str| {
            let line = lines.next().and_then(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.ok_or_else(|| damaged(&format!("it has no {name}")))
        };
        let format: u32 = field("format")?.parse().map_err(|_| damaged("format is no number"))?;
        if format > FORMAT_VERSION {
            return Err(OpenError::NewerFormat { path: folder.to_owned(), found: format });
        }
        let store = u32::from_str_radix(field("store")?, 16).map_err(|_| damaged("store is no number"))?;
        let cluster = u64::from_str_radix(field("cluster")?, 16).map_err(|_| damaged("cluster is no number"))?;
        let identity = Self { store: StoreId(store), cluster: ClusterId(cluster) };
        if sum.is_none() || format < FORMAT_VERSION {
            // Written before there were checksums: a flipped bit is found from now on.
            identity.save(folder).map_err(|source| OpenError::Io { path, source })?;
        }
        Ok(identity)
    }

    fn save(&self, folder: &Path) -> io::Result<()> {
        let body = format!("format={FORMAT_VERSION}\nstore={}\ncluster={}\n", self.store, self.cluster);
        let text = format!("{body}{}", checksum_line(&body));
        replace_file(folder, "identity", text.as_bytes())
    }
}

/// The last line of the identity: a flipped bit in it must not make a stranger of the store.
fn checksum_line(body: &str) -> String {
    format!("checksum={:016x}\n", checksum(body.as_bytes()))
}

fn save_record(folder: &Path, record: &KeyspaceRecord) -> io::Result<()> {
    sealed::save(&folder.join("records"), &record.id.to_string(), &pb::KeyspaceRecord::from(record))
}

/// The files of the records in a data folder.
pub fn record_files(folder: &Path) -> Result<Vec<PathBuf>, OpenError> {
    let folder = folder.join("records");
    let list = || {
        let paths = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        // Not a half-written `.new` that a crash left.
        Ok(paths.into_iter().filter(|path| path.extension().is_none()).collect())
    };
    list().map_err(|source| OpenError::Io { path: folder.clone(), source })
}

pub fn load_records(folder: &Path) -> Result<BTreeMap<KeyspaceId, KeyspaceRecord>, OpenError> {
    let mut records = BTreeMap::new();
    for path in record_files(folder)? {
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(source) => return Err(OpenError::Io { path, source }),
        };
        let record = decode_record(&content).map_err(|reason| OpenError::Damaged { path, reason })?;
        records.insert(record.id, record);
    }
    Ok(records)
}

fn decode_record(content: &[u8]) -> Result<KeyspaceRecord, String> {
    let message = pb::KeyspaceRecord::decode(sealed::unseal(content)?).map_err(|error| error.to_string())?;
    KeyspaceRecord::try_from(message).map_err(|error| error.to_string())
}
