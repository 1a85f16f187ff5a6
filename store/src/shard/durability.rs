//! What of a shard is synced, and answers that wait until what they say is.

use super::Shard;
use super::executor::Core;
use super::session::Shared;
use crate::config::Fsync;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Answers that leave when the write with this number is synced.
struct Held {
    needs: u64,
    answers: Vec<u8>,
    session: Arc<Shared>,
}

/// Counts a shard's writes and how many of them are synced.
pub struct Durability {
    fsync: Fsync,
    written: AtomicU64,
    synced: AtomicU64,
    held: Mutex<Vec<Held>>,
}

impl Durability {
    pub fn new(fsync: Fsync) -> Self {
        Self { fsync, written: AtomicU64::new(0), synced: AtomicU64::new(0), held: Mutex::default() }
    }

    /// Notes a write that is in the log; call it before the stripes are released, so that whoever reads the rows counts it.
    pub fn wrote(&self) {
        self.written.fetch_add(1, Ordering::Release);
    }

    /// With `fsync=always`: the number of the write that must be synced before an answer given now may leave; `None` if it may.
    pub fn must_wait(&self) -> Option<u64> {
        match self.fsync {
            Fsync::Always => {
                let needs = self.written.load(Ordering::Acquire);
                (needs > self.synced.load(Ordering::Acquire)).then_some(needs)
            }
            Fsync::EverySecond | Fsync::Never => None,
        }
    }

    /// Keeps answers until write number `needs` is synced.
    pub fn hold(&self, needs: u64, answers: Vec<u8>, session: Arc<Shared>) {
        session.one_more_waits(answers.len());
        self.held.lock().push(Held { needs, answers, session });
    }
}

impl Shard {
    /// Syncs the log if it must be and releases the answers that waited for it.
    pub fn sync(&self) {
        let written = self.durability.written.load(Ordering::Acquire);
        if written > self.durability.synced.load(Ordering::Acquire) {
            if let Err(error) = self.database.sync_log() {
                self.fail(&error.to_string());
                // Whether the writes are on disk is unknown: what waits is never answered as if they were.
                let held = std::mem::take(&mut *self.durability.held.lock());
                for held in held {
                    held.session.answer_unknown(&held.answers, "the log could not be synced");
                }
                return;
            }
            self.durability.synced.fetch_max(written, Ordering::AcqRel);
        }
        let synced = self.durability.synced.load(Ordering::Acquire);
        let ready: Vec<Held> = self.durability.held.lock().extract_if(.., |held| held.needs <= synced).collect();
        for held in ready {
            held.session.push_late(&held.answers, 1, held.answers.len());
        }
    }
}

/// Wakes the thread that syncs.
#[derive(Default)]
pub struct SyncBell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: bool,
    stopped: bool,
}

/// How often the logs of `fsync=everysec` are synced, and the bounds of the stamps looked after.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

impl SyncBell {
    /// Answers wait for a sync.
    pub fn ring(&self) {
        let mut state = self.state.lock();
        if !state.rung {
            state.rung = true;
            self.rung.notify_one();
        }
    }

    pub fn stop(&self) {
        self.state.lock().stopped = true;
        self.rung.notify_one();
    }

    /// The loop of the thread that syncs: at once for those that wait, every second for all others.
    pub fn run(core: &Core) {
        let bell = &core.sync_bell;
        let mut next_round = Instant::now() + SYNC_INTERVAL;
        loop {
            let round = {
                let mut state = bell.state.lock();
                while !state.rung && !state.stopped && Instant::now() < next_round {
                    bell.rung.wait_until(&mut state, next_round);
                }
                if state.stopped {
                    return;
                }
                state.rung = false;
                Instant::now() >= next_round
            };
            for shard in core.shards.current().serving() {
                match shard.durability.fsync {
                    Fsync::Always => shard.sync(),
                    Fsync::EverySecond if round => shard.sync(),
                    Fsync::EverySecond | Fsync::Never => {}
                }
                if round {
                    shard.look_after();
                }
            }
            if round {
                let late = Instant::now().saturating_duration_since(next_round);
                metrics::gauge!("vasto_store_sync_lag_seconds").set(late.as_secs_f64());
                core.counters.export(core);
                next_round = Instant::now() + SYNC_INTERVAL;
            }
        }
    }
}

impl Shard {
    /// What a shard needs once a second.
    fn look_after(&self) {
        if self.is_failed() {
            self.probe();
            return;
        }
        let written = self.durability.written.load(Ordering::Acquire);
        if self.stamps.was_used_since_last_asked(written) {
            let raised = self.stamps.raise_ahead(crate::shard::executor::now_ns(), &self.database);
            if let Err(error) = raised {
                tracing::warn!(shard = %self.key, %error, "cannot raise the bound of the stamps ahead of time");
            }
        }
        if let Err(error) = self.database.release_tombstones() {
            tracing::warn!(shard = %self.key, %error, "cannot note which tombstones may go; they stay for now");
        }
    }
}
