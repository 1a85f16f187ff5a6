//! One gateway worker's conversation with the store: batches in, answers out, some of them late.

use super::executor::{Core, Executor, Place};
use super::lane::{Lane, LaneKey};
use super::map::MapSnapshot;
use bytes::Bytes;
use foldhash::fast::FixedState;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use vasto_proto::batch::{Answers, BatchError, FLAG_AFTER_REFUSAL, OperationHead, Outcome, write_answer};

/// Operations of one session that may wait in the blocking lane (or for a sync): above it no further batch is read.
const WAITING_OPERATIONS_MAX: usize = 8192;
/// Bytes of them: a few large values and many small ones.
const WAITING_BYTES_MAX: usize = 64 << 20;
/// Late answers that the gateway has not taken: above it the session's lanes rest.
const LATE_BYTES_MAX: usize = 32 << 20;

/// What a session shares with the threads that work for it.
#[derive(Default)]
pub struct Shared {
    late: Mutex<Late>,
    late_waker: AtomicWaker,
    pub(super) lanes: Mutex<Lanes>,
    /// Lanes that have work.
    pub(super) busy: AtomicUsize,
    refusing: Refusing,
    waiting_operations: AtomicUsize,
    waiting_bytes: AtomicUsize,
    admit_waker: AtomicWaker,
    closed: AtomicBool,
}

/// Connections and shards of which an operation was refused: later ones, which were under way behind it, must not overtake it, and are
/// refused too until the gateway says that it knows ([`FLAG_AFTER_REFUSAL`]).
#[derive(Default)]
struct Refusing {
    /// How many there are, read without the lock on the hot path.
    count: AtomicUsize,
    /// With the reason of the first refusal.
    keys: Mutex<HashMap<LaneKey, Arc<str>, FixedState>>,
}

pub(super) type Lanes = HashMap<LaneKey, Lane, FixedState>;

#[derive(Default)]
struct Late {
    answers: Vec<u8>,
    /// Lanes that rest until the answers are taken.
    parked: Vec<LaneKey>,
}

impl Shared {
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// An operation of this connection on this shard was refused.
    pub(super) fn start_refusing(&self, lane: LaneKey, reason: &str) {
        let mut keys = self.refusing.keys.lock();
        keys.entry(lane).or_insert_with(|| Arc::from(reason));
        self.refusing.count.store(keys.len(), Ordering::Release);
    }

    /// Why an operation must be refused because one before it was; one with the flag ends that.
    pub(super) fn refuses(&self, head: &OperationHead) -> Option<Arc<str>> {
        if self.refusing.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let lane = (head.connection, head.target);
        let mut keys = self.refusing.keys.lock();
        if head.flags & FLAG_AFTER_REFUSAL == 0 {
            return keys.get(&lane).cloned();
        }
        keys.remove(&lane);
        self.refusing.count.store(keys.len(), Ordering::Release);
        None
    }

    /// Counts something that waits and will end in [`Shared::push_late`].
    pub fn one_more_waits(&self, bytes: usize) {
        self.waiting_operations.fetch_add(1, Ordering::AcqRel);
        self.waiting_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    fn fewer_wait(&self, operations: usize, bytes: usize) {
        self.waiting_operations.fetch_sub(operations, Ordering::AcqRel);
        self.waiting_bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.admit_waker.wake();
    }

    /// Gives answers to the session's gateway; `operations` and `bytes` waited for them.
    pub fn push_late(&self, answers: &[u8], operations: usize, bytes: usize) {
        if !answers.is_empty() {
            self.late.lock().answers.extend_from_slice(answers);
        }
        self.fewer_wait(operations, bytes);
        self.late_waker.wake();
    }

    /// Answers everything in `answers` as unknown instead.
    pub fn answer_unknown(&self, answers: &[u8], text: &str) {
        let mut unknown = Vec::new();
        for answer in Answers::new(answers).flatten() {
            write_answer(&mut unknown, answer.id, Outcome::Unknown, text.as_bytes());
        }
        self.push_late(&unknown, 1, answers.len());
    }

    /// Whether a lane must rest because the gateway does not take its answers; the lane is woken when it does.
    pub(super) fn parks(&self, lane: LaneKey) -> bool {
        let mut late = self.late.lock();
        let full = late.answers.len() > LATE_BYTES_MAX;
        if full {
            late.parked.push(lane);
        }
        full
    }

    fn poll_admit(&self, task: &mut Context<'_>) -> Poll<()> {
        let admits = || {
            self.waiting_operations.load(Ordering::Acquire) < WAITING_OPERATIONS_MAX
                && self.waiting_bytes.load(Ordering::Acquire) < WAITING_BYTES_MAX
        };
        if admits() {
            return Poll::Ready(());
        }
        self.admit_waker.register(task.waker());
        if admits() { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// The side that gives batches.
pub struct Session {
    core: Arc<Core>,
    shared: Arc<Shared>,
    executor: Executor,
    /// Lent, so that a gateway that sends nothing does not keep a closed shard open.
    map: Arc<Mutex<MapSnapshot>>,
}

/// The side that takes what could not be answered at once.
pub struct LateAnswers {
    core: Arc<Core>,
    shared: Arc<Shared>,
}

pub fn open(core: &Arc<Core>) -> (Session, LateAnswers) {
    let shared = Arc::new(Shared::default());
    let session = Session {
        core: Arc::clone(core),
        shared: Arc::clone(&shared),
        executor: Executor::default(),
        map: core.shards.lend(),
    };
    (session, LateAnswers { core: Arc::clone(core), shared })
}

impl Session {
    /// Runs now what can be run from memory and appends its packed answers; the rest comes from [`LateAnswers`].
    pub fn execute(&mut self, batch: Bytes, answers: &mut Vec<u8>) {
        if let Err(error) = self.try_execute(&batch, answers) {
            tracing::error!(%error, "a batch is malformed; nothing of it was executed");
        }
    }

    /// As [`Session::execute`]; of a malformed batch nothing is executed.
    pub fn try_execute(&mut self, batch: &Bytes, answers: &mut Vec<u8>) -> Result<(), BatchError> {
        let mut snapshot = self.map.lock();
        self.core.shards.refresh(&mut snapshot);
        self.executor.run(&self.core, &snapshot.map, &self.shared, batch, Place::Worker, answers)
    }

    /// Waits while too much of this session waits in the blocking lane.
    pub async fn admit(&self) {
        poll_fn(|task| self.poll_admit(task)).await;
    }

    pub fn poll_admit(&self, task: &mut Context<'_>) -> Poll<()> {
        self.shared.poll_admit(task)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.late_waker.wake();
    }
}

impl LateAnswers {
    /// Waits for packed answers; `None` when the session is gone.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        poll_fn(|task| self.poll_next(task)).await
    }

    pub fn poll_next(&mut self, task: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        self.shared.late_waker.register(task.waker());
        let (answers, parked) = {
            let mut late = self.shared.late.lock();
            (std::mem::take(&mut late.answers), std::mem::take(&mut late.parked))
        };
        for lane in parked {
            self.core.pool.schedule(Arc::clone(&self.shared), lane);
        }
        if !answers.is_empty() {
            Poll::Ready(Some(answers))
        } else if self.shared.is_closed() {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }

    /// Whether operations wait for which answers will come.
    pub fn is_waiting(&self) -> bool {
        self.shared.waiting_operations.load(Ordering::Acquire) > 0
    }
}
