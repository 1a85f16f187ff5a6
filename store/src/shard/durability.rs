//! What of a shard is synced, and answers that wait until what they say is.

use super::Shard;
use super::executor::Core;
use super::session::Shared;
use crate::config::Fsync;
use crate::engine::EngineError;
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
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
    /// Why nothing is synced any more: the shard failed.
    ended: OnceLock<String>,
    /// Since when the work of every second is due.
    round: Mutex<Option<Instant>>,
    /// One of the threads that sync is at this shard.
    at_work: AtomicBool,
}

impl Durability {
    pub fn new(fsync: Fsync) -> Self {
        Self {
            fsync,
            written: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            held: Mutex::default(),
            ended: OnceLock::new(),
            round: Mutex::default(),
            at_work: AtomicBool::new(false),
        }
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
        let mut held = self.held.lock();
        match self.ended.get() {
            None => held.push(Held { needs, answers, session }),
            Some(reason) => {
                drop(held);
                session.answer_unknown(&answers, reason);
            }
        }
    }

    /// Whether the writes held back are on the disk will never be known: what waits, and what would, is never answered as if they were.
    pub fn end(&self, reason: &str) {
        // First this: whoever holds an answer from here on sees it.
        self.ended.get_or_init(|| reason.to_owned());
        let held = std::mem::take(&mut *self.held.lock());
        for held in held {
            held.session.answer_unknown(&held.answers, reason);
        }
    }

    fn is_due(&self) -> bool {
        let has_round = self.round.lock().is_some();
        has_round
            || match self.fsync {
                Fsync::Always => {
                    self.written.load(Ordering::Acquire) > self.synced.load(Ordering::Acquire)
                        || !self.held.lock().is_empty()
                }
                Fsync::EverySecond | Fsync::Never => false,
            }
    }
}

/// What a sync came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Synced {
    Done,
    /// Nothing is known to be synced that was not before.
    Not,
}

impl Shard {
    /// Syncs the log if it must be and releases the answers that waited for it.
    pub fn sync(&self) -> Synced {
        let written = self.durability.written.load(Ordering::Acquire);
        if !self.is_failed() && written > self.durability.synced.load(Ordering::Acquire) {
            let synced = if self.is_read_only() { self.database.sync_log_files() } else { self.database.sync_log() };
            match synced {
                Ok(()) => drop(self.durability.synced.fetch_max(written, Ordering::AcqRel)),
                // A write has met an error of the disk this very moment; that one decides what becomes of the shard.
                Err(error) if error.is_echo() => return Synced::Not,
                // Even if it only says that the disk is full: what the kernel could not write may be gone from its memory too.
                Err(error) => self.fail(&error.to_string()),
            }
        }
        if self.is_failed() {
            let reason = format!("the log of shard {} could not be synced", self.key);
            self.durability.end(&self.trouble().map_or(reason.clone(), |trouble| format!("{reason}: {trouble}")));
            return Synced::Not;
        }
        let synced = self.durability.synced.load(Ordering::Acquire);
        let ready: Vec<Held> = self.durability.held.lock().extract_if(.., |held| held.needs <= synced).collect();
        for held in ready {
            held.session.push_late(&held.answers, 1, held.answers.len());
        }
        Synced::Done
    }
}

/// Wakes the threads that sync.
#[derive(Default)]
pub struct SyncBell {
    state: Mutex<BellState>,
    rung: Condvar,
}

struct BellState {
    rung: bool,
    stopped: bool,
    next_round: Instant,
}

impl Default for BellState {
    fn default() -> Self {
        Self { rung: false, stopped: false, next_round: Instant::now() + SYNC_INTERVAL }
    }
}

/// How often the logs of `fsync=everysec` are synced, and the bounds of the stamps looked after.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// Shards that can be synced at the same time: a disk that is slow with one log holds up only so many.
pub const SYNC_THREADS: usize = 4;

/// Why a thread that syncs looks at the shards.
enum Turn {
    Rung,
    /// A second is over.
    Round,
    Stop,
}

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
        self.rung.notify_all();
    }

    fn wait(&self) -> Turn {
        let mut state = self.state.lock();
        loop {
            if state.stopped {
                return Turn::Stop;
            }
            let now = Instant::now();
            if now >= state.next_round {
                state.next_round = now + SYNC_INTERVAL;
                return Turn::Round;
            }
            if std::mem::take(&mut state.rung) {
                return Turn::Rung;
            }
            let until = state.next_round;
            self.rung.wait_until(&mut state, until);
        }
    }

    /// The loop of a thread that syncs: at once for those that wait, every second for all others.
    pub fn run(core: &Core) {
        let bell = &core.sync_bell;
        loop {
            let turn = bell.wait();
            let shards = core.shards.current();
            match turn {
                Turn::Rung => {}
                Turn::Round => {
                    core.counters.export(core);
                    for shard in shards.serving() {
                        shard.durability.round.lock().get_or_insert_with(Instant::now);
                    }
                }
                Turn::Stop => return,
            }
            let mut due = shards.serving().filter(|shard| shard.durability.is_due()).peekable();
            while let Some(shard) = due.next() {
                if due.peek().is_some() {
                    // Another thread begins with the next one.
                    bell.ring();
                }
                shard.tend();
            }
        }
    }
}

impl Shard {
    /// Does what is due; if another thread is at it, that one will.
    fn tend(&self) {
        let durability = &self.durability;
        while durability.is_due() && !durability.at_work.swap(true, Ordering::AcqRel) {
            let round = durability.round.lock().take();
            let synced = match durability.fsync {
                Fsync::Always | Fsync::EverySecond => self.sync(),
                Fsync::Never => Synced::Done,
            };
            if let Some(began) = round {
                metrics::gauge!("vasto_store_sync_lag_seconds").set(began.elapsed().as_secs_f64());
                self.look_after();
            }
            durability.at_work.store(false, Ordering::Release);
            if synced == Synced::Not {
                return;
            }
        }
    }

    /// What a shard needs once a second.
    fn look_after(&self) {
        self.check_disk();
        if self.is_read_only() || self.is_failed() {
            return;
        }
        let written = self.durability.written.load(Ordering::Acquire);
        if self.stamps.was_used_since_last_asked(written) {
            let raised = self.stamps.raise_ahead(crate::shard::executor::now_ns(), &self.database);
            self.met(raised);
        }
        self.met(self.database.release_tombstones().map(drop));
    }

    /// What failed here is tried again in a second, if the shard goes on at all.
    fn met(&self, result: Result<(), EngineError>) {
        if let Err(error) = result {
            self.meet(&error);
        }
    }
}
