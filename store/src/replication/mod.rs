//! Copies of shards: who leads and who follows, how a follower gets the log or a whole copy, and what answers wait for.
//!
//! A record gives a store its part in a shard (`state`). A primary begins an era (`history`) and sends its log (`leader`) to those who
//! follow it (`follower`), who apply it with the position that it leads to (`apply`). Who has nothing, or what nobody can tell, gets a whole
//! copy (`copy`); who has more than its primary hands that over first (`hand_over`). Whether copies hold the same rows is compared
//! (`comparison`) when somebody asks and now and then.

mod apply;
pub mod comparison;
mod copy;
mod follower;
pub mod hand_over;
mod history;
pub mod leader;
mod rpc;
mod state;
#[cfg(test)]
pub mod tests;

pub use copy::{remove_beside, remove_unfinished, swap_in};
pub use rpc::{MoveLink, NotOpen};
pub use state::{Figures, FollowerFigures, Mode, Part, Replication};

use crate::engine::EngineError;
use crate::engine::garbage::ONLY_COPY;
use crate::shard::Shard;
use crate::shard::executor::Core;
use follower::Purpose;
use parking_lot::Mutex;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vasto_proto::id::{ClusterId, Epoch, StoreId};
use vasto_proto::topology::{NOBODY, Peers, Role};

/// Bytes of old logs kept for each shard with copies, beside those that RocksDB still needs itself: a follower that was away for longer
/// than it takes to write them is copied anew.
const LOG_BYTES_MAX: u64 = 256 << 20;
/// While a copy is on its way, which takes the longer the larger the shard is, and needs the log from its beginning on.
const LOG_BYTES_COPYING_MAX: u64 = 4 << 30;
/// How long an answer waits for replicas.
const COPIES_PATIENCE: Duration = Duration::from_secs(5);
/// How nice threads are that move rows: where cores are scarce they get a tenth of what another thread gets.
#[cfg(target_os = "linux")]
const ASIDE_NICE: i32 = 10;
/// How often answers are looked after, and, in seconds, the rest.
const ROUND: Duration = Duration::from_millis(200);
const ROUNDS_A_SECOND: u32 = 5;

/// What all shards of a store need to follow and to lead.
pub struct Replicator {
    pub store: StoreId,
    /// The folder of all shards.
    pub shards: PathBuf,
    cluster: AtomicU64,
    peers: watch::Receiver<Arc<Peers>>,
    handle: Handle,
    /// Of threads that come behind all others.
    aside: Handle,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// Within this the copies of each shard are compared once; zero = only when somebody asks.
    verify_interval: Duration,
    /// Changes when masters should hear of something at once.
    news: watch::Sender<u64>,
    /// Held by whoever rewrites files of a shard after slots have left it.
    pub compacting: tokio::sync::Mutex<()>,
    /// What `handle` and `aside` are of, until its thread takes them.
    runtimes: Mutex<Option<[Runtime; 2]>>,
}

impl Replicator {
    pub fn new(
        store: StoreId,
        cluster: ClusterId,
        data: &Path,
        peers: watch::Receiver<Arc<Peers>>,
        verify_interval: Duration,
    ) -> io::Result<Self> {
        // Its blocking threads apply and read.
        let runtime = Builder::new_current_thread().enable_all().thread_name("store-copies").build()?;
        // Of this one there are blocking threads only.
        let aside = Builder::new_current_thread().thread_name("store-moves").on_thread_start(step_back).build()?;
        Ok(Self {
            store,
            shards: data.join("shards"),
            cluster: AtomicU64::new(cluster.0),
            peers,
            handle: runtime.handle().clone(),
            aside: aside.handle().clone(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            verify_interval,
            news: watch::Sender::new(0),
            compacting: tokio::sync::Mutex::default(),
            runtimes: Mutex::new(Some([runtime, aside])),
        })
    }

    pub fn set_cluster(&self, cluster: ClusterId) {
        self.cluster.store(cluster.0, Ordering::Release);
    }

    pub fn cluster(&self) -> ClusterId {
        ClusterId(self.cluster.load(Ordering::Acquire))
    }

    pub fn address_of(&self, store: StoreId) -> Result<String, String> {
        let peers = self.peers.borrow();
        let address = peers.addresses.get(&store).filter(|address| !address.is_empty());
        address.cloned().ok_or_else(|| format!("nobody has said where store {store} is"))
    }

    /// A token that is cancelled when the store stops.
    pub fn stopping(&self) -> CancellationToken {
        self.stop.child_token()
    }

    /// Lets all masters hear now what the shards' statuses say.
    pub fn tell_news(&self) {
        self.news.send_modify(|number| *number = number.wrapping_add(1));
    }

    /// Whether there is something that masters should hear at once.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Runs a task of a copy on the thread that is there for them.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(task, &self.handle);
    }

    /// Runs what waits for the disk on a thread of its own.
    fn spawn_blocking(&self, work: impl FnOnce() + Send + 'static) {
        self.tasks.spawn_blocking_on(work, &self.handle);
    }

    /// Runs what may take its time on a thread that gets what those that serve leave of the cores. It takes no lock that they wait for.
    pub fn spawn_aside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.tasks.spawn_blocking_on(work, &self.aside)
    }

    /// Lets all tasks and the thread end.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// The loop of the thread; ends when the store stops.
    pub fn run(core: &Arc<Core>) {
        let Some([runtime, _aside]) = core.replicator.runtimes.lock().take() else { return };
        runtime.block_on(async {
            let tending = async { tokio::join!(tend(core), comparison::compare_in_turn(core)) };
            core.replicator.stop.run_until_cancelled(tending).await;
            core.replicator.tasks.close();
            core.replicator.tasks.wait().await;
        });
    }
}

/// Lets the calling thread come behind those that serve.
fn step_back() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, ASIDE_NICE) {
        tracing::debug!(%error, "cannot lower the priority of a thread");
    }
}

/// What is due from time to time.
async fn tend(core: &Arc<Core>) {
    let mut rounds = 0u32;
    loop {
        tokio::time::sleep(ROUND).await;
        for shard in core.shards.current().serving() {
            shard.durability.give_up_on_copies(COPIES_PATIENCE);
        }
        rounds = rounds.wrapping_add(1);
        if !rounds.is_multiple_of(ROUNDS_A_SECOND) {
            continue;
        }
        let core = Arc::clone(core);
        let tended = tokio::task::spawn_blocking(move || {
            for shard in core.shards.current().serving().filter(|shard| !shard.is_failed()) {
                shard.tend_copies(LOG_BYTES_MAX, LOG_BYTES_COPYING_MAX);
            }
        });
        if tended.await.is_err() {
            tracing::error!("looking after copies panicked");
        }
    }
}

/// Lets a shard lead under an epoch, of which this store is primary: call it when it needs no lease or has one. Fails, to be called again, while
/// something is missing yet. Blocks on the disk.
pub fn begin_leading(shard: &Shard, epoch: Epoch) -> Result<(), EngineError> {
    // Whoever is changing the shard's part may wait for the caller.
    let Some(_turn) = shard.replication.turn.try_lock() else {
        return Err(EngineError::Failed("what this store is to the shard is being changed".to_owned()));
    };
    let missing = {
        let state = shard.replication.state.lock();
        match &state.part {
            Some(part) if part.role == Role::Primary && part.epoch == epoch => state.takes_over.then(|| {
                format!("the end of the log of store {}, its primary before, has not come yet", part.previous)
            }),
            Some(_) | None => Some("this store is not its primary".to_owned()),
        }
    };
    match missing {
        Some(missing) => Err(EngineError::Failed(missing)),
        None if shard.replication.leads() => Ok(()),
        None => lead(shard, epoch),
    }
}

/// Begins an era, and serves then. A shard without other copies keeps no history.
fn lead(shard: &Shard, epoch: Epoch) -> Result<(), EngineError> {
    if shard.database.tail().is_on() {
        shard.begin_era(epoch)?;
        shard.count_followers();
    }
    shard.replication.set_mode(Mode::Leads);
    Ok(())
}

/// Makes of a shard what a record says that it is here. When it returns, the shard takes part in nothing of an earlier epoch any more, and
/// what it has is on the disk. Blocks; the caller sees to it that there is one call at a time.
pub fn assume(core: &Arc<Core>, shard: &Arc<Shard>, part: Part) -> Result<(), EngineError> {
    let _turn = shard.replication.turn.lock();
    let old = shard.replication.state.lock().part.clone();
    if old.as_ref() == Some(&part) {
        return Ok(());
    }
    // Rows of other shards' slots are written by whoever leads, too.
    let _still = shard.takes.hold_still();
    let is_another = |old: &Part| (old.epoch, old.role, old.primary) != (part.epoch, part.role, part.primary);
    if let Some(old) = old.filter(|old| !is_another(old)) {
        return take_changes(core, shard, &old, part);
    }
    shard.replication.stop_following();
    if part.role == Role::Replica {
        step_down(core, shard)?;
    }
    let has_others = part.has_others();
    record_tail(core, shard, has_others)?;
    shard.replication.set_min_replicas(if part.role == Role::Primary { part.min_replicas } else { 0 });
    let (epoch, primary, previous, role) = (part.epoch, part.primary, part.previous, part.role);
    {
        let mut state = shard.replication.state.lock();
        (state.part, state.takes_over) = (Some(part), false);
    }
    match role {
        Role::Primary => {
            let takes_over = previous != NOBODY && previous != core.replicator.store && {
                let state = shard.replication.state.lock();
                let log = state.log.unwrap_or_default();
                // With a single copy of nothing there is nothing to take.
                !state.history.has_led(log, epoch)
            };
            shard.replication.set_mode(Mode::Waits);
            shard.set_epoch(epoch);
            if takes_over {
                shard.replication.state.lock().takes_over = true;
                let task = follower::start(core, shard, previous, epoch, Purpose::TakeOver);
                shard.replication.state.lock().task = Some(task);
            } else if shard.lease.wanted().is_none() {
                lead(shard, epoch)?;
            }
            // Else with the first lease.
        }
        Role::Replica => {
            let is_whole = shard.replication.state.lock().position(shard.database.sequence()).is_some();
            shard.replication.set_mode(match (is_whole, primary) {
                (false, _) => Mode::IsMade,
                (true, NOBODY) => Mode::Waits,
                (true, _) => Mode::Follows,
            });
            shard.set_epoch(epoch);
            if primary != NOBODY {
                let task = follower::start(core, shard, primary, epoch, Purpose::Replicate);
                shard.replication.state.lock().task = Some(task);
            }
        }
    }
    Ok(())
}

/// Replicas and learners come and go while the same store leads under the same epoch.
fn take_changes(core: &Arc<Core>, shard: &Arc<Shard>, old: &Part, part: Part) -> Result<(), EngineError> {
    let (leads, epoch, has_others) = (part.role == Role::Primary, part.epoch, part.has_others());
    if leads {
        shard.replication.set_min_replicas(part.min_replicas);
    }
    let had_others = old.has_others();
    {
        let mut state = shard.replication.state.lock();
        state.followers.retain(|store, _| part.is_followed_by(*store));
        state.renewals.retain(|store, _| part.is_followed_by(*store));
        state.part = Some(part);
    }
    if leads && has_others != had_others {
        record_tail(core, shard, has_others)?;
        // One that does not lead yet begins when it does.
        if has_others && shard.replication.leads() {
            lead(shard, epoch)?;
        } else if !has_others {
            shard.replication.state.lock().era = None;
            if !shard.replication.leads() && !shard.replication.state.lock().takes_over {
                lead(shard, epoch)?;
            }
        }
    }
    shard.count_followers();
    Ok(())
}

/// Nothing is led any more: whatever was admitted has been committed, and where the log ends is on the disk.
fn step_down(core: &Core, shard: &Shard) -> Result<(), EngineError> {
    shard.replication.set_mode(Mode::Waits);
    shard.fence(&core.stripes);
    shard.pin_position()?;
    shard.database.sync_log()
}

/// Lets nothing more run on shards that this store leads; when it returns, what was running is committed, and only its answers are to leave.
/// Followers get the log as before. Blocks.
pub fn fall_silent(core: &Core, shards: &[Arc<Shard>]) {
    for shard in shards {
        let _turn = shard.replication.turn.lock();
        shard.replication.set_mode(Mode::Waits);
    }
    // The stripes are those of all shards.
    if let Some(shard) = shards.first() {
        shard.fence(&core.stripes);
    }
}

/// Lets batches be kept for followers, or not.
fn record_tail(core: &Core, shard: &Shard, wanted: bool) -> Result<(), EngineError> {
    let tail = shard.database.tail();
    let replicated_ns = if wanted { shard.replication.replicated_ns() } else { ONLY_COPY };
    shard.database.garbage().set_replicated_ns(replicated_ns);
    if tail.is_on() == wanted {
        return Ok(());
    }
    if !wanted {
        tail.stop();
        shard.replication.forget_others();
        return Ok(());
    }
    shard.start_tail(&core.stripes)
}
