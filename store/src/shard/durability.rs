//! What of a shard is synced and what its copies have, and answers that wait until what they say is and until they do.

use super::Shard;
use super::executor::Core;
use super::session::Shared;
use crate::config::Fsync;
use crate::engine::{EngineError, Tier};
use crate::lease::state::{Admission, LeaseState};
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Between two looks whether answers have left.
const ANSWERS_PAUSE: Duration = Duration::from_millis(5);

/// Answers that leave when the write with this number is synced.
struct Held {
    needs: u64,
    pass: Pass,
    /// What copies must have before they leave, then.
    copies: Option<u64>,
    answers: Vec<u8>,
    session: Arc<Shared>,
}

/// Answers that leave when enough copies have the log up to this number.
struct Awaiting {
    sequence: u64,
    since: Instant,
    pass: Pass,
    answers: Vec<u8>,
    session: Arc<Shared>,
}

/// The look at the lease before answers leave that were held.
pub struct Pass {
    lease: Arc<LeaseState>,
    admission: Admission,
}

impl Pass {
    pub fn new(lease: &Arc<LeaseState>, admission: Admission) -> Self {
        Self { lease: Arc::clone(lease), admission }
    }

    /// Gives held answers to their gateway; as unknown if the store may have lost the shard to another one meanwhile. Reads as well: later
    /// operations of their connections have run, and sent again they would come to stand behind those.
    pub fn send(&self, session: &Shared, answers: &[u8]) {
        if self.lease.allows_answer(self.admission) {
            session.push_late(answers, 1, answers.len());
        } else {
            session.answer_unknown(answers, &self.lease.lapse());
        }
    }
}

/// Counts a shard's writes and how many of them are synced.
pub struct Durability {
    /// Place in [`Fsync::ALL`].
    fsync: AtomicU8,
    written: AtomicU64,
    synced: AtomicU64,
    held: Mutex<Vec<Held>>,
    awaiting: Mutex<Vec<Awaiting>>,
    /// Some of them have left.
    left: Condvar,
    /// Up to where in the log as many copies have it as must.
    copied: AtomicU64,
    /// Why nothing is synced any more: the shard failed.
    ended: OnceLock<String>,
    /// The work of every second is due.
    round: AtomicBool,
    /// One of the threads that sync is at this shard.
    at_work: AtomicBool,
    /// Held by whoever syncs: a second one would wait for the same disk.
    syncing: Mutex<()>,
    /// The last sync met the echo of an error that some other call has met.
    echoed: AtomicBool,
    unsynced: Unsynced,
    counted: SyncCounts,
}

/// Since when writes wait for a sync, in milliseconds after `opened`; 0 = none does.
struct Unsynced {
    opened: Instant,
    /// The oldest write since the last sync began …
    later_ms: AtomicU64,
    /// … and the oldest that the sync under way, or one that failed, is for.
    under_way_ms: AtomicU64,
}

/// What was done for durability since the shard was opened.
#[derive(Default)]
struct SyncCounts {
    syncs: AtomicU64,
    slow_syncs: AtomicU64,
    held_batches: AtomicU64,
}

/// Figures of a shard's durability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncFigures {
    pub syncs: u64,
    /// Those that took longer than [`SYNC_INTERVAL`].
    pub slow_syncs: u64,
    /// Batches of answers that had to wait for a sync, and those that wait now.
    pub held_batches: u64,
    pub held_batches_now: u64,
    /// Age of the oldest write that no sync has covered; `None` where nobody is promised one.
    pub lag: Option<Duration>,
}

impl Unsynced {
    fn now_ms(&self) -> u64 {
        // 0 means none.
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    fn wrote(&self) {
        if self.later_ms.load(Ordering::SeqCst) == 0 {
            let _ = self.later_ms.compare_exchange(0, self.now_ms(), Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Call it before the writes that the sync will cover are counted: one that comes in between counts as older than it is, never
    /// as synced when it is not.
    fn sync_begins(&self) {
        let since_ms = self.later_ms.swap(0, Ordering::SeqCst);
        // What a failed sync left is older still.
        let _ = self.under_way_ms.compare_exchange(0, since_ms, Ordering::SeqCst, Ordering::SeqCst);
    }

    fn sync_succeeded(&self) {
        self.under_way_ms.store(0, Ordering::SeqCst);
    }

    fn age(&self) -> Duration {
        let oldest = [&self.later_ms, &self.under_way_ms].map(|since_ms| since_ms.load(Ordering::SeqCst));
        let oldest_ms = oldest.into_iter().filter(|since_ms| *since_ms > 0).min();
        Duration::from_millis(oldest_ms.map_or(0, |since_ms| self.now_ms().saturating_sub(since_ms)))
    }
}

impl Durability {
    pub fn new(fsync: Fsync) -> Self {
        let opened = Instant::now();
        Self {
            fsync: AtomicU8::new(place(fsync)),
            written: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            held: Mutex::default(),
            awaiting: Mutex::default(),
            left: Condvar::new(),
            copied: AtomicU64::new(0),
            ended: OnceLock::new(),
            round: AtomicBool::new(false),
            at_work: AtomicBool::new(false),
            syncing: Mutex::default(),
            echoed: AtomicBool::new(false),
            unsynced: Unsynced { opened, later_ms: AtomicU64::new(0), under_way_ms: AtomicU64::new(0) },
            counted: SyncCounts::default(),
        }
    }

    pub fn fsync(&self) -> Fsync {
        Fsync::ALL[usize::from(self.fsync.load(Ordering::Acquire))]
    }

    pub fn figures(&self) -> SyncFigures {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SyncFigures {
            syncs: read(&self.counted.syncs),
            slow_syncs: read(&self.counted.slow_syncs),
            held_batches: read(&self.counted.held_batches),
            held_batches_now: (self.held.lock().len() + self.awaiting.lock().len()) as u64,
            lag: match self.fsync() {
                Fsync::Always | Fsync::EverySecond => Some(self.unsynced.age()),
                Fsync::Never => None,
            },
        }
    }

    /// Holds up every sync, as a slow disk would.
    #[cfg(test)]
    pub fn stall(&self) -> parking_lot::MutexGuard<'_, ()> {
        self.syncing.lock()
    }

    /// Whether the threads that sync have anything to do for this shard.
    fn is_due(&self) -> bool {
        self.round.load(Ordering::Acquire) || self.wants_sync()
    }

    /// Whether a sync is wanted now and not with the next round.
    fn wants_sync(&self) -> bool {
        // Answers may be held from before the setting was changed.
        !self.held.lock().is_empty()
            || match self.fsync() {
                Fsync::Always => self.written.load(Ordering::Acquire) > self.synced.load(Ordering::Acquire),
                Fsync::EverySecond | Fsync::Never => false,
            }
    }

    /// Notes a write that is in the log; call it before the stripes are released, so that whoever reads the rows counts it.
    pub fn wrote(&self) {
        self.written.fetch_add(1, Ordering::SeqCst);
        self.unsynced.wrote();
    }

    /// With `fsync=always`: the number of the write that must be synced before an answer given now may leave; `None` if it may.
    pub fn must_wait(&self) -> Option<u64> {
        match self.fsync() {
            Fsync::Always => {
                let needs = self.written.load(Ordering::Acquire);
                (needs > self.synced.load(Ordering::Acquire)).then_some(needs)
            }
            Fsync::EverySecond | Fsync::Never => None,
        }
    }

    /// Keeps answers until write number `needs` is synced, and then until copies have the log up to `copies`.
    pub fn hold(&self, needs: u64, copies: Option<u64>, pass: Pass, answers: Vec<u8>, session: Arc<Shared>) {
        session.one_more_waits(answers.len());
        self.counted.held_batches.fetch_add(1, Ordering::Relaxed);
        let mut held = self.held.lock();
        match self.ended.get() {
            None => held.push(Held { needs, copies, pass, answers, session }),
            Some(reason) => {
                drop(held);
                session.answer_unknown(&answers, reason);
            }
        }
    }

    /// Keeps answers until enough copies have the log up to this number.
    pub fn await_copies(&self, sequence: u64, pass: Pass, answers: Vec<u8>, session: Arc<Shared>) {
        session.one_more_waits(answers.len());
        self.counted.held_batches.fetch_add(1, Ordering::Relaxed);
        self.await_counted(sequence, pass, answers, session);
    }

    /// As [`Durability::await_copies`] for answers that count as waiting already.
    fn await_counted(&self, sequence: u64, pass: Pass, answers: Vec<u8>, session: Arc<Shared>) {
        let mut awaiting = self.awaiting.lock();
        if let Some(reason) = self.ended.get() {
            drop(awaiting);
            session.answer_unknown(&answers, reason);
        } else if sequence <= self.copied() {
            // The copies were faster.
            drop(awaiting);
            pass.send(&session, &answers);
        } else {
            awaiting.push(Awaiting { sequence, since: Instant::now(), pass, answers, session });
        }
    }

    /// Up to where in the log as many copies have it as must.
    pub fn copied(&self) -> u64 {
        self.copied.load(Ordering::SeqCst)
    }

    /// Enough copies have the log up to this number: what waited for that leaves.
    pub fn copied_up_to(&self, sequence: u64) {
        if self.copied.fetch_max(sequence, Ordering::SeqCst) >= sequence {
            return;
        }
        // Whoever holds this lock now has not seen the number; who takes it later has.
        let mut awaiting = self.awaiting.lock();
        let ready: Vec<Awaiting> = awaiting.extract_if(.., |awaiting| awaiting.sequence <= sequence).collect();
        drop(awaiting);
        for ready in ready {
            ready.pass.send(&ready.session, &ready.answers);
        }
        self.left.notify_all();
    }

    /// Waits until the answers have left that are held, for so long at most. Call it when nothing more is run; whoever has just run
    /// something holds its answers within one of the pauses.
    pub fn let_answers_leave(&self, until: Instant) {
        let mut were_gone = false;
        loop {
            let are_synced = self.held.lock().is_empty();
            let mut awaiting = self.awaiting.lock();
            let are_gone = are_synced && awaiting.is_empty();
            if are_gone && were_gone || Instant::now() >= until {
                return;
            }
            were_gone = are_gone;
            self.left.wait_for(&mut awaiting, ANSWERS_PAUSE);
        }
    }

    /// Answers as unknown what has waited for copies too long.
    pub fn give_up_on_copies(&self, patience: Duration) {
        let mut awaiting = self.awaiting.lock();
        let given_up: Vec<Awaiting> = awaiting.extract_if(.., |awaiting| awaiting.since.elapsed() > patience).collect();
        drop(awaiting);
        for given_up in given_up {
            given_up.session.answer_unknown(&given_up.answers, "too few replicas have confirmed it in time");
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
        let awaiting = std::mem::take(&mut *self.awaiting.lock());
        for awaiting in awaiting {
            awaiting.session.answer_unknown(&awaiting.answers, reason);
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

fn place(fsync: Fsync) -> u8 {
    match fsync {
        Fsync::EverySecond => 0,
        Fsync::Always => 1,
        Fsync::Never => 2,
    }
}

impl Shard {
    /// From now on writes are synced so. With `always`, what was written before is synced when this returns; with the others, answers
    /// that are held leave with one more sync. Fails, whatever the setting is then, if what was written before could not be synced.
    pub fn set_fsync(&self, fsync: Fsync, bell: &SyncBell) -> Result<(), EngineError> {
        let is_new = self.durability.fsync.swap(place(fsync), Ordering::AcqRel) != place(fsync);
        if is_new {
            tracing::info!(shard = %self.key, %fsync, "writes are synced otherwise from now on");
        }
        match fsync {
            // Asked again after a failure, it must not be taken for done.
            Fsync::Always => match self.sync() {
                Synced::Done => Ok(()),
                Synced::Not => {
                    let reason = self.trouble().unwrap_or_else(|| "its log could not be synced".into());
                    Err(EngineError::Failed(reason))
                }
            },
            Fsync::EverySecond | Fsync::Never => {
                if is_new {
                    bell.ring();
                }
                Ok(())
            }
        }
    }

    /// Syncs the log if it must be and releases the answers that waited for it.
    pub fn sync(&self) -> Synced {
        let _turn = self.durability.syncing.lock();
        self.durability.unsynced.sync_begins();
        let written = self.durability.written.load(Ordering::SeqCst);
        if !self.is_failed() && written > self.durability.synced.load(Ordering::Acquire) {
            let begin = Instant::now();
            let synced = if self.is_read_only() { self.database.sync_log_files() } else { self.database.sync_log() };
            let took = begin.elapsed();
            metrics::histogram!("vasto_store_sync_seconds").record(took.as_secs_f64());
            self.durability.counted.syncs.fetch_add(1, Ordering::Relaxed);
            self.durability.counted.slow_syncs.fetch_add(u64::from(took > SYNC_INTERVAL), Ordering::Relaxed);
            match synced {
                Ok(()) => {
                    self.durability.synced.fetch_max(written, Ordering::AcqRel);
                    self.durability.echoed.store(false, Ordering::Relaxed);
                }
                // A write has met an error of the disk this very moment; that one decides what becomes of the shard. If none has by the
                // next time, it was a flush of RocksDB's own, and nobody else will.
                Err(error) if error.is_echo() && !self.durability.echoed.swap(true, Ordering::Relaxed) => {
                    return Synced::Not;
                }
                Err(error) if error.is_echo() => self.meet(&error),
                // Even if it only says that the disk is full: what the kernel could not write may be gone from its memory too.
                Err(error) => self.fail(&error.to_string()),
            }
        }
        if self.is_failed() {
            let reason = format!("the log of shard {} could not be synced", self.key);
            self.durability.end(&self.trouble().map_or(reason.clone(), |trouble| format!("{reason}: {trouble}")));
            return Synced::Not;
        }
        self.durability.unsynced.sync_succeeded();
        let synced = self.durability.synced.load(Ordering::Acquire);
        let ready: Vec<Held> = self.durability.held.lock().extract_if(.., |held| held.needs <= synced).collect();
        for held in ready {
            match held.copies {
                Some(sequence) => self.durability.await_counted(sequence, held.pass, held.answers, held.session),
                None => held.pass.send(&held.session, &held.answers),
            }
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
            // Taken anew each time: an old one would keep shards open that have left.
            let shards = core.shards.current();
            match turn {
                Turn::Rung => {}
                Turn::Round => {
                    for shard in shards.serving() {
                        shard.durability.round.store(true, Ordering::Release);
                    }
                }
                Turn::Stop => return,
            }
            // One that another thread is at rings again when it is done, if it must.
            let waits =
                |shard: &&Arc<Shard>| shard.durability.is_due() && !shard.durability.at_work.load(Ordering::SeqCst);
            let mut due = shards.serving().filter(waits).peekable();
            while let Some(shard) = due.next() {
                if due.peek().is_some() {
                    // Another thread begins with the next one.
                    bell.ring();
                }
                shard.tend(bell);
            }
        }
    }
}

impl Shard {
    /// Does what is due, once: a busy shard must not keep its thread from the others. If another thread is at it, that one will.
    fn tend(&self, bell: &SyncBell) {
        let durability = &self.durability;
        if durability.at_work.swap(true, Ordering::AcqRel) {
            return;
        }
        let is_round = durability.round.swap(false, Ordering::AcqRel);
        let synced = match durability.fsync() {
            Fsync::Always | Fsync::EverySecond => self.sync(),
            Fsync::Never if durability.wants_sync() => self.sync(),
            Fsync::Never => Synced::Done,
        };
        if is_round {
            self.look_after();
        }
        durability.at_work.store(false, Ordering::SeqCst);
        // Whoever rang meanwhile was passed by.
        if synced == Synced::Done && durability.is_due() {
            bell.ring();
        }
    }

    /// What a shard needs once a second.
    fn look_after(&self) {
        self.check_disk();
        if self.is_read_only() || self.is_failed() {
            return;
        }
        let written = self.durability.written.load(Ordering::Acquire);
        // A replica draws none, and nobody reads in its log how far it went.
        if self.replication.leads() && self.stamps.was_used_since_last_asked(written) {
            let raised = self.stamps.raise_ahead(crate::shard::executor::now_ns(), &self.database);
            self.met(raised);
        }
        self.met(self.database.release_tombstones(Tier::Memory).map(drop));
        self.met(self.database.note_synced());
    }

    /// What failed here is tried again in a second, if the shard goes on at all.
    fn met(&self, result: Result<(), EngineError>) {
        if let Err(error) = result {
            self.meet(&error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_the_age_of_the_oldest_write_that_no_sync_has_covered() {
        // A shard that was opened an hour ago.
        let Some(opened) = Instant::now().checked_sub(Duration::from_secs(3600)) else { return };
        let unsynced = Unsynced { opened, later_ms: AtomicU64::new(0), under_way_ms: AtomicU64::new(0) };
        assert_eq!(unsynced.age(), Duration::ZERO);
        unsynced.later_ms.store(unsynced.now_ms() - 1_800_000, Ordering::SeqCst);
        unsynced.wrote();
        assert!(unsynced.age() >= Duration::from_secs(1800), "a later write does not make the first one younger");
        unsynced.sync_begins();
        unsynced.wrote();
        assert!(unsynced.age() >= Duration::from_secs(1800), "a sync under way has covered nothing yet");
        // It failed, and the next one is for the old writes too.
        unsynced.sync_begins();
        assert!(unsynced.age() >= Duration::from_secs(1800));
        unsynced.sync_succeeded();
        assert!(unsynced.age() < Duration::from_secs(1800));
    }

    #[test]
    fn every_setting_has_its_place() {
        for fsync in Fsync::ALL {
            assert_eq!(Durability::new(fsync).fsync(), fsync);
        }
    }
}
