//! The blocking lane: operations that must wait for the disk, walk far, or stand behind such ones, run on threads of their own.
//!
//! Each connection and shard of a session has its own queue, so that its operations keep their order, and one thread at a time.

use super::Shard;
use super::executor::{Core, Executor, Place};
use super::map::MapSnapshot;
use super::session::Shared;
use crate::command;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vasto_proto::batch::Operations;
use vasto_proto::command::Args;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::id::ShardKey;

/// Connection and shard.
pub type LaneKey = (u32, ShardKey);

/// What one turn takes from a lane: then others get the thread.
const TURN_OPERATIONS_MAX: usize = 128;
const TURN_BYTES_MAX: usize = 1 << 20;
/// An operation up to this size is copied into the queue, so that it does not keep its whole batch in memory.
const COPIED_BYTES_MAX: usize = 64 << 10;

/// Operations of one connection on one shard. In the session's map for as long as there is work in it.
#[derive(Debug, Default)]
pub struct Lane {
    queue: VecDeque<Bytes>,
}

impl Shared {
    /// Puts an operation (its packed bytes) at the end of its lane.
    pub fn divert(self: &Arc<Self>, pool: &LanePool, lane: LaneKey, operation: &Bytes) {
        let operation =
            if operation.len() <= COPIED_BYTES_MAX { Bytes::copy_from_slice(operation) } else { operation.clone() };
        self.one_more_waits(operation.len());
        pool.depth.fetch_add(1, Ordering::Relaxed);
        let mut lanes = self.lanes.lock();
        let mut is_new = false;
        lanes
            .entry(lane)
            .or_insert_with(|| {
                is_new = true;
                Lane::default()
            })
            .queue
            .push_back(operation);
        if is_new {
            self.busy.fetch_add(1, Ordering::AcqRel);
            drop(lanes);
            pool.schedule(Arc::clone(self), lane);
        }
    }
}

enum Job {
    Turn(Arc<Shared>, LaneKey),
    /// Takes the space of dead rows back.
    Compact(Arc<Shard>),
    /// Makes the backup of this name, which was begun.
    Backup(String),
    /// Takes memory of memtables back.
    WriteOut,
}

/// The threads of the lane, and what they have to do.
#[derive(Default)]
pub struct LanePool {
    state: Mutex<PoolState>,
    available: Condvar,
    depth: AtomicU64,
    /// A [`Job::WriteOut`] waits or runs: one at a time.
    writes_out: AtomicBool,
}

#[derive(Default)]
struct PoolState {
    jobs: VecDeque<Job>,
    stopped: bool,
}

impl LanePool {
    pub fn schedule(&self, session: Arc<Shared>, lane: LaneKey) {
        self.push(Job::Turn(session, lane));
    }

    pub fn schedule_compaction(&self, shard: Arc<Shard>) {
        self.push(Job::Compact(shard));
    }

    pub fn schedule_backup(&self, name: String) {
        self.push(Job::Backup(name));
    }

    /// Has memtables written out.
    pub fn schedule_write_out(&self) {
        if !self.writes_out.swap(true, Ordering::AcqRel) {
            self.push(Job::WriteOut);
        }
    }

    fn push(&self, job: Job) {
        self.state.lock().jobs.push_back(job);
        self.available.notify_one();
    }

    /// Operations that wait or run.
    pub fn depth(&self) -> u64 {
        self.depth.load(Ordering::Relaxed)
    }

    /// Lets the threads end when nothing is left to do.
    pub fn stop(&self) {
        self.state.lock().stopped = true;
        self.available.notify_all();
    }

    /// The loop of one thread.
    pub fn run(core: &Arc<Core>) {
        let mut worker = Worker { executor: Executor::default(), map: MapSnapshot::default(), answers: Vec::new() };
        loop {
            let job = {
                let mut state = core.pool.state.lock();
                loop {
                    match state.jobs.pop_front() {
                        // It can be done after the next start.
                        Some(Job::Compact(_) | Job::Backup(_) | Job::WriteOut) if state.stopped => {}
                        Some(job) => break job,
                        None if state.stopped => return,
                        None => core.pool.available.wait(&mut state),
                    }
                }
            };
            match job {
                Job::Turn(session, lane) => worker.turn(core, &session, lane),
                // It would only keep the shard from being closed.
                Job::Compact(shard) if shard.is_failed() => {}
                Job::Compact(shard) => shard.database.compact(),
                // How it ended is in the status and in the log.
                Job::Backup(name) => drop(core.backups.run(&core.shards.current(), &name)),
                Job::WriteOut => {
                    write_out(core);
                    core.pool.writes_out.store(false, Ordering::Release);
                }
            }
        }
    }
}

struct Worker {
    executor: Executor,
    map: MapSnapshot,
    answers: Vec<u8>,
}

impl Worker {
    fn turn(&mut self, core: &Arc<Core>, session: &Arc<Shared>, lane: LaneKey) {
        let (operations, bytes) = take(session, lane);
        if !session.is_closed() {
            let batch = match operations.as_slice() {
                [one] => one.clone(),
                several => Bytes::from(several.concat()),
            };
            core.shards.refresh(&mut self.map);
            let ran = self.executor.run(core, &self.map.map, session, &batch, Place::Lane, &mut self.answers);
            ran.expect("operations were decoded when their batch arrived");
        }
        core.pool.depth.fetch_sub(operations.len() as u64, Ordering::Relaxed);
        session.push_late(&self.answers, operations.len(), bytes);
        self.answers.clear();
        if self.answers.capacity() > TURN_BYTES_MAX {
            self.answers = Vec::new();
        }
        // An idle thread must not keep a closed shard open.
        self.map = MapSnapshot::default();
        if let std::collections::hash_map::Entry::Occupied(entry) = session.lanes.lock().entry(lane)
            && entry.get().queue.is_empty()
        {
            entry.remove();
            session.busy.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        if !session.parks(lane) {
            core.pool.schedule(Arc::clone(session), lane);
        }
    }
}

/// Writes memtables out, the largest first, until all together take no more memory than they may.
fn write_out(core: &Core) {
    let map = core.shards.current();
    // Their own sizes count, since the memory of what was written out is given back somewhat later.
    let bytes = || map.serving().map(|shard| shard.database.memtable_bytes()).sum::<u64>();
    while bytes() > core.engine.memtable_bytes_max() as u64 && !core.pool.state.lock().stopped {
        let Some(shard) = map.serving().max_by_key(|shard| shard.database.memtable_bytes()) else { return };
        let before = shard.database.memtable_bytes();
        if let Err(error) = shard.database.write_out_memtables() {
            tracing::warn!(shard = %shard.key, %error, "cannot write memtables out; they take more memory than they may");
            return;
        }
        // Empty ones take memory too; and what is written meanwhile asks again.
        if shard.database.memtable_bytes() >= before {
            return;
        }
    }
}

/// The operations of one turn and their bytes.
fn take(session: &Shared, lane: LaneKey) -> (Vec<Bytes>, usize) {
    let mut lanes = session.lanes.lock();
    let lane = lanes.get_mut(&lane).expect("a scheduled lane is in the map until its queue is empty");
    let (mut operations, mut bytes) = (Vec::new(), 0);
    while let Some(next) = lane.queue.front() {
        let alone = runs_alone(next);
        let is_full = operations.len() == TURN_OPERATIONS_MAX || bytes + next.len() > TURN_BYTES_MAX;
        if !operations.is_empty() && (is_full || alone) {
            break;
        }
        bytes += next.len();
        operations.extend(lane.queue.pop_front());
        if alone {
            break;
        }
    }
    (operations, bytes)
}

/// A walk may take long: no other operation's keys stay locked for it.
fn runs_alone(operation: &[u8]) -> bool {
    let Some(Ok(operation)) = Operations::new(operation).next() else { return true };
    StoreCommand::from_code(operation.head.command)
        .is_none_or(|command| command::needs_lane(command, Args::new(operation.arguments)))
}
