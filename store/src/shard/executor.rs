//! Runs batches: the gate, groups by shard, locks, look-ups, commands, one write, answers.
//!
//! The way of a group (the operations of one batch on one shard, in their order):
//! 1. its keys are found, each once; their stripes are locked in ascending order;
//! 2. rows come from the row cache, the rest with one look-up in RocksDB that must not touch the disk;
//! 3. the commands run, reading through what the group has written so far;
//! 4. everything written is one batch of RocksDB; then the row cache is brought up to date and the locks are released.
//!
//! On a worker, what would wait is *diverted*: nothing of the operation is executed, it goes to the blocking lane, and later
//! operations of its connection on this shard follow it there.

use super::Shard;
use super::alarm::Alarm;
use super::context::{Context, Failure};
use super::durability::{Pass, SyncBell};
use super::gate::{self, Refusal};
use super::lane::LanePool;
use super::map::{ShardMap, Shards};
use super::rows::{CellIndex, Rows, State};
use super::session::Shared;
use super::stripes::{Patience, StripeGuard, StripeSet, Stripes};
use crate::backup::Backups;
use crate::command;
use crate::config::Limits;
use crate::engine::{Engine, EngineError, Tier, meta};
use crate::lease::clock::BootClock;
use crate::lease::state::{Admission, Need};
use crate::metrics::Counters;
use crate::replication::{Mode, Replicator};
use crate::resize::pace::Pace;
use bytes::Bytes;
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vasto_proto::batch::{
    Arguments, BatchError, FLAG_FROM_REPLICA, FLAG_LARGE_PERMIT, OperationHead, Operations, Outcome, begin_answer,
    cancel_answer, end_answer, write_answer,
};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, ReplyWriter};
use vasto_proto::net::LARGE_VALUE_BYTES;
use vasto_proto::slot::slot_of;

/// What all sessions and lanes of a store share.
pub struct Core {
    pub engine: Engine,
    pub limits: Limits,
    pub stripes: Stripes,
    pub shards: Shards,
    pub pool: LanePool,
    pub sync_bell: SyncBell,
    pub alarm: Arc<Alarm>,
    pub counters: Counters,
    pub backups: Backups,
    pub clock: Arc<BootClock>,
    pub replicator: Replicator,
    pub pace: Pace,
}

/// Where a batch runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a gateway worker's thread, which must not wait.
    Worker,
    /// In the blocking lane.
    Lane,
}

impl Place {
    fn tier(self) -> Tier {
        match self {
            Self::Worker => Tier::Memory,
            Self::Lane => Tier::Disk,
        }
    }

    fn patience(self) -> Patience {
        match self {
            Self::Worker => Patience::Bounded(STRIPE_WAIT_MAX),
            Self::Lane => Patience::Unbounded,
        }
    }
}

/// A group of 64 writes holds its stripes for about 0.2 ms; what takes longer is stuck behind a disk.
const STRIPE_WAIT_MAX: Duration = Duration::from_millis(5);
/// Operations with more bytes, in arguments or in a row, would hold up the others of their worker.
const WORKER_BYTES_MAX: usize = 256 << 10;
/// A flush of a shard with more bytes on disk asks for a compaction.
const FLUSHED_BYTES_KEPT: u64 = 64 << 20;

/// Stripes of a usual group: no allocation for their guards up to here.
const GUARDS_INLINE: usize = 64;
type Guards<'s> = SmallVec<[StripeGuard<'s>; GUARDS_INLINE]>;

/// One operation of the batch.
struct Operation {
    head: OperationHead,
    command: StoreCommand,
    /// The whole operation's bytes in the batch.
    start: u32,
    end: u32,
    arguments_start: u32,
    arguments_count: u32,
    /// The next operation of the same group.
    next: u32,
    /// Its part of [`Rows::operation_cells`].
    cells_start: u32,
    cells_end: u32,
    /// It belongs in the lane whatever memory holds.
    needs_lane: bool,
    /// It changes what is seen of every key.
    takes_all_keys: bool,
    is_blind: bool,
    /// It may change rows.
    writes: bool,
    /// It is about all keys of the shard's slots.
    covers_slots: bool,
    fate: Fate,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Answered,
    Diverted,
}

const END: u32 = u32::MAX;

impl Operation {
    fn args<'b>(&self, batch: &'b [u8]) -> Args<'b> {
        let packed = &batch[self.arguments_start as usize..self.end as usize];
        Args::new(Arguments::parse(packed, self.arguments_count).expect("the operation was decoded before"))
    }

    fn has_large_permit(&self) -> bool {
        self.head.flags & FLAG_LARGE_PERMIT != 0
    }
}

/// The operations of a batch on one shard.
struct Group {
    shard: Arc<Shard>,
    /// What the shard was when they were admitted.
    admission: Admission,
    mode: Mode,
    /// Its answers wait for replicas, whatever the shard is by then.
    waits_for_copies: bool,
    first: u32,
    last: u32,
}

impl Group {
    /// The number of the last entry of the log that replicas must have before its answers may leave.
    fn must_be_copied(&self) -> Option<u64> {
        let waits = match self.mode {
            Mode::Leads => self.waits_for_copies || self.shard.replication.min_replicas() > 0,
            Mode::Waits | Mode::Follows | Mode::IsMade => false,
        };
        if waits { self.shard.not_copied_yet() } else { None }
    }
}

/// Runs batches one after the other; all its memory is kept from batch to batch.
#[derive(Default)]
pub struct Executor {
    operations: Vec<Operation>,
    groups: Vec<Group>,
    rows: Rows,
    stripes: StripeSet,
    /// Cells that must come from RocksDB.
    missing: Vec<CellIndex>,
    /// Connections of the current group that have gone to the lane.
    diverted: Vec<u32>,
    commands_run: Vec<u32>,
    batches_run: u32,
}

/// Nanoseconds since 1970.
pub fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

impl Executor {
    /// Runs a batch. Of a malformed one nothing is executed.
    pub fn run(
        &mut self,
        core: &Core,
        map: &ShardMap,
        session: &Arc<Shared>,
        batch: &Bytes,
        place: Place,
        answers: &mut Vec<u8>,
    ) -> Result<(), BatchError> {
        let is_measured = place == Place::Worker && self.batches_run.is_multiple_of(MEASURED_BATCHES);
        let started = is_measured.then(Instant::now);
        self.decode(batch)?;
        self.admit(core, map, session, batch, place, answers);
        let mut groups = std::mem::take(&mut self.groups);
        for group in groups.drain(..) {
            let answers_start = answers.len();
            self.run_group(core, session, &group, batch, place, answers);
            // Guards are gone: what is durable can be waited for.
            if answers.len() > answers_start
                && !self.tells_of_copies_only(&group)
                && let durability = &group.shard.durability
                && let (needs, copies) = (durability.must_wait(), group.must_be_copied())
                && (needs.is_some() || copies.is_some())
            {
                let pass = Pass::new(&group.shard.lease, group.admission);
                let (answers, session) = (answers.split_off(answers_start), Arc::clone(session));
                match (needs, copies) {
                    (Some(needs), copies) => {
                        durability.hold(needs, copies, pass, answers, session);
                        core.sync_bell.ring();
                    }
                    (None, Some(sequence)) => durability.await_copies(sequence, pass, answers, session),
                    (None, None) => {}
                }
            }
            self.divert(core, &group, session, batch);
        }
        self.groups = groups;
        self.count(core, place);
        if let Some(started) = started {
            core.pace.ran(started.elapsed());
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[u8]) -> Result<(), BatchError> {
        self.operations.clear();
        let mut operations = Operations::new(batch);
        loop {
            let start = operations.offset();
            let Some(operation) = operations.next() else { return Ok(()) };
            let operation = operation?;
            let end = operations.offset();
            let command = StoreCommand::from_code(operation.head.command);
            self.operations.push(Operation {
                head: operation.head,
                // An unknown one is answered in `admit` and goes no further.
                command: command.unwrap_or(StoreCommand::Get),
                start: start as u32,
                end: end as u32,
                arguments_start: (end - operation.arguments.packed().len()) as u32,
                arguments_count: operation.arguments.len() as u32,
                next: END,
                cells_start: 0,
                cells_end: 0,
                needs_lane: false,
                takes_all_keys: false,
                is_blind: false,
                writes: false,
                covers_slots: false,
                fate: Fate::Open,
            });
        }
    }

    /// Refuses what may not run, queues what must stand behind its connection's lane, and groups the rest by shard.
    fn admit(
        &mut self,
        core: &Core,
        map: &ShardMap,
        session: &Arc<Shared>,
        batch: &Bytes,
        place: Place,
        answers: &mut Vec<u8>,
    ) {
        let has_lanes = place == Place::Worker && session.busy.load(Ordering::Acquire) > 0;
        for index in 0..self.operations.len() {
            let operation = &mut self.operations[index];
            let head = operation.head;
            if has_lanes && session.lanes.lock().contains_key(&(head.connection, head.target)) {
                operation.fate = Fate::Diverted;
                let bytes = batch.slice(operation.start as usize..operation.end as usize);
                session.divert(&core.pool, (head.connection, head.target), &bytes);
                continue;
            }
            let bytes = (operation.end - operation.start) as usize;
            let refusal = if StoreCommand::from_code(head.command).is_none() {
                operation.fate = Fate::Answered;
                let answer = begin_answer(answers, head.id, Outcome::Reply);
                let text = format!("ERR this store is older than the gateway and lacks command {}", head.command);
                ReplyWriter::new(answers).error(&text);
                end_answer(answers, answer);
                continue;
            } else if let Some(reason) = session.refuses(&head) {
                behind_a_refusal(&reason)
            } else if bytes > LARGE_VALUE_BYTES && !operation.has_large_permit() {
                (Outcome::NeedsLargePermit, String::new())
            } else {
                let has_group = |group: &Group| {
                    let shard = &group.shard;
                    shard.key == head.target
                        && shard.epoch() == head.epoch
                        && group.admission.epoch == head.epoch
                        && shard.replication.refuses(head.flags).is_none()
                };
                let group = self.groups.iter().position(has_group);
                let shard = match group {
                    Some(group) => Ok(&self.groups[group].shard),
                    None => gate::check(map, &head),
                };
                let shard = shard.and_then(|shard| match shard.refuses_writes() {
                    Some(refusal) if command::writes(operation.command, operation.args(batch)) => Err(refusal),
                    Some(_) | None => Ok(shard),
                });
                match shard {
                    // Before any lock: a write that RocksDB lets wait for space may hold it.
                    Ok(shard) if shard.is_read_only() && command::writes(operation.command, operation.args(batch)) => {
                        operation.fate = Fate::Answered;
                        let answer = begin_answer(answers, head.id, Outcome::Reply);
                        ReplyWriter::new(answers).error(shard.write_refusal().text());
                        end_answer(answers, answer);
                        continue;
                    }
                    Ok(shard) => {
                        // Once: between two looks it may have changed.
                        let mode = group.map_or_else(|| shard.replication.mode(), |group| self.groups[group].mode);
                        let takes_stale = head.flags & FLAG_FROM_REPLICA != 0;
                        match group {
                            None if mode != Mode::Leads && !takes_stale => {
                                let text = format!("shard {} has just ceased to be led here", head.target);
                                (Outcome::NotServing, text)
                            }
                            Some(group) => {
                                let group = &mut self.groups[group];
                                self.operations[group.last as usize].next = index as u32;
                                group.last = index as u32;
                                self.prepare(index, batch, place);
                                continue;
                            }
                            None => {
                                let (first, last) = (index as u32, index as u32);
                                let shard = Arc::clone(shard);
                                let admission = match mode {
                                    Mode::Leads => shard.lease.admission(head.epoch),
                                    // Who asks a replica takes what may be old.
                                    Mode::Waits | Mode::Follows | Mode::IsMade => {
                                        Admission { epoch: head.epoch, need: Need::NotPrimary }
                                    }
                                };
                                let waits_for_copies = mode == Mode::Leads && shard.replication.min_replicas() > 0;
                                self.groups.push(Group { shard, admission, mode, waits_for_copies, first, last });
                                self.prepare(index, batch, place);
                                continue;
                            }
                        }
                    }
                    Err(refusal) => refusal,
                }
            };
            self.operations[index].fate = Fate::Answered;
            refuse(session, answers, &head, &refusal);
        }
    }

    /// Learns from the command what the executor must know.
    fn prepare(&mut self, index: usize, batch: &[u8], place: Place) {
        let operation = &mut self.operations[index];
        let args = operation.args(batch);
        operation.is_blind = command::is_blind(operation.command, args);
        operation.takes_all_keys = command::takes_all_keys(operation.command, args);
        operation.writes = command::writes(operation.command, args);
        operation.covers_slots = command::covers_slots(operation.command, args);
        let bytes = (operation.end - operation.start) as usize;
        operation.needs_lane =
            place == Place::Worker && (bytes > WORKER_BYTES_MAX || command::needs_lane(operation.command, args));
    }

    fn run_group(
        &mut self,
        core: &Core,
        session: &Shared,
        group: &Group,
        batch: &[u8],
        place: Place,
        answers: &mut Vec<u8>,
    ) {
        let shard = &*group.shard;
        self.rows.clear();
        self.stripes.clear();
        self.diverted.clear();
        self.find_cells(core, group, batch);
        if place == Place::Lane {
            self.read_ahead(shard, batch);
        }
        let mut guards = Guards::new();
        if !self.stripes.lock(&core.stripes, place.patience(), &mut guards) {
            drop(guards);
            self.divert_all(group);
            return;
        }
        // Whoever makes another of the shard waits for all who hold stripes; from then on this is seen.
        if shard.epoch() != group.admission.epoch || shard.replication.mode() != group.mode {
            drop(guards);
            let text = format!("shard {} has just become another", shard.key);
            self.refuse_all(session, group, &(Outcome::WrongEpoch, text), answers);
            return;
        }
        // Not before the locks: whoever waited for them would take for alive what others have seen dead meanwhile.
        let now_ns = now_ns();
        self.load(core, shard, batch, place, &mut guards);
        let answers_start = answers.len();
        self.run_commands(core, session, group, batch, place, now_ns, &guards, answers);
        match self.commit(shard, batch, place) {
            Ok(()) => {
                self.refresh_cache(shard, batch, &mut guards);
                if core.engine.has_too_many_memtables() {
                    core.pool.schedule_write_out();
                }
                if self.rows.flush.is_some() && shard.database.disk_bytes() > FLUSHED_BYTES_KEPT {
                    core.pool.schedule_compaction(Arc::clone(&group.shard));
                }
                // The process may have been stopped since the gate, and another store may serve.
                if !shard.lease.allows_answer(group.admission) {
                    answers.truncate(answers_start);
                    self.answer_unknown(session, group, &shard.lease.lapse(), answers);
                }
            }
            Err(EngineError::Stalled | EngineError::NotInMemory) => {
                // Nothing was written: the answers are taken back and the lane waits until it can be.
                answers.truncate(answers_start);
                self.divert_all(group);
            }
            Err(
                error
                @ (EngineError::Full(_) | EngineError::Disk(_) | EngineError::Corrupt(_) | EngineError::Failed(_)),
            ) => {
                shard.meet(&error);
                answers.truncate(answers_start);
                // What the shard suffers from names the file; this error may be but its echo.
                let reason = shard.trouble().unwrap_or_else(|| error.to_string());
                self.answer_unknown(session, group, &format!("shard {}: {reason}", shard.key), answers);
            }
        }
    }

    /// Step 1: the cells of all keys, and their stripes.
    fn find_cells(&mut self, core: &Core, group: &Group, batch: &[u8]) {
        let mut next = group.first;
        while next != END {
            let operation = &mut self.operations[next as usize];
            next = operation.next;
            if operation.needs_lane || self.diverted.contains(&operation.head.connection) {
                self.diverted.push(operation.head.connection);
                operation.fate = Fate::Diverted;
                continue;
            }
            if operation.takes_all_keys {
                self.stripes.add_all();
            }
            operation.cells_start = self.rows.operation_cells.len() as u32;
            for key in command::keys_of(operation.command, operation.args(batch)) {
                let hash = core.stripes.hash(group.shard.instance, key);
                let (index, is_new) = self.rows.cell(key, hash, batch);
                if is_new {
                    self.stripes.add(hash);
                    self.rows.cells[index as usize].wanted = !operation.is_blind;
                }
                self.rows.operation_cells.push(index);
            }
            operation.cells_end = self.rows.operation_cells.len() as u32;
        }
    }

    /// In the lane: brings the rows' blocks into memory before any lock is taken.
    fn read_ahead(&mut self, shard: &Shard, batch: &[u8]) {
        self.missing.clear();
        for index in 0..self.rows.cells.len() {
            if self.rows.cells[index].wanted && self.rows.locate(index as CellIndex, batch, |slot| shard.owns(slot)) {
                self.missing.push(index as CellIndex);
            }
        }
        let keys = self.missing.iter().map(|cell| self.rows.physical(*cell));
        drop(shard.database.get_many(keys, Tier::Disk));
    }

    /// Step 2: rows from the row cache, the others from RocksDB.
    fn load(&mut self, core: &Core, shard: &Shard, batch: &[u8], place: Place, guards: &mut Guards<'_>) {
        let mut hits = 0;
        self.missing.clear();
        for index in 0..self.rows.cells.len() {
            let cell = &mut self.rows.cells[index];
            cell.guard = self.stripes.position(cell.hash);
            let cache = &mut guards[cell.guard as usize].cache;
            match cache.find(cell.hash, shard.instance, cell.key(batch)) {
                Some(row) => {
                    cell.state = State::Cached(row);
                    cell.was_cached = true;
                    hits += 1;
                }
                None => {
                    let wanted = cell.wanted;
                    let cell = index as CellIndex;
                    if self.rows.locate(cell, batch, |slot| shard.owns(slot)) && wanted {
                        self.missing.push(cell);
                    }
                }
            }
        }
        core.counters.looked_up(hits, self.missing.len() as u64);
        let tier = place.tier();
        let too_large = |row: &[u8]| place == Place::Worker && row.len() > WORKER_BYTES_MAX;
        match self.missing.as_slice() {
            [] => {}
            [one] => {
                let row = shard.database.get(self.rows.physical(*one), tier);
                self.rows.loaded(*one, borrowed(&row), too_large);
            }
            several => {
                let keys = several.iter().map(|cell| self.rows.physical(*cell));
                let rows = shard.database.get_many(keys, tier);
                for (cell, row) in several.iter().zip(&rows) {
                    self.rows.loaded(*cell, borrowed(row), too_large);
                }
            }
        }
    }

    /// Step 3.
    #[expect(clippy::too_many_arguments, reason = "what one group works on, borrowed separately")]
    fn run_commands(
        &mut self,
        core: &Core,
        session: &Shared,
        group: &Group,
        batch: &[u8],
        place: Place,
        now_ns: u64,
        guards: &Guards<'_>,
        answers: &mut Vec<u8>,
    ) {
        let mut next = group.first;
        while next != END {
            let operation = &mut self.operations[next as usize];
            next = operation.next;
            if operation.fate != Fate::Open {
                continue;
            }
            let id = operation.head.id;
            let cells = operation.cells_start as usize..operation.cells_end as usize;
            if !self.diverted.is_empty() && self.diverted.contains(&operation.head.connection) {
                operation.fate = Fate::Diverted;
                continue;
            }
            // Asked again: an operation before it in this very group may have been refused.
            if let Some(reason) = session.refuses(&operation.head) {
                operation.fate = Fate::Answered;
                refuse(session, answers, &operation.head, &behind_a_refusal(&reason));
                continue;
            }
            if !operation.has_large_permit() && self.rows.has_fetched_above(&cells, LARGE_VALUE_BYTES) {
                operation.fate = Fate::Answered;
                refuse(session, answers, &operation.head, &(Outcome::NeedsLargePermit, String::new()));
                continue;
            }
            if operation.writes && group.shard.changes.is_full() {
                let mut keys = command::keys_of(operation.command, operation.args(batch));
                if keys.any(|key| group.shard.changes.refuses(slot_of(key))) {
                    operation.fate = Fate::Answered;
                    let text = format!("a slot of shard {} changes faster than it moves", group.shard.key);
                    refuse(session, answers, &operation.head, &(Outcome::NotServing, text));
                    continue;
                }
            }
            let owned = operation.covers_slots.then(|| group.shard.owned());
            if let Some(refusal) = owned.as_ref().and_then(|owned| group.shard.refuses_slots(owned, &operation.head)) {
                operation.fate = Fate::Answered;
                refuse(session, answers, &operation.head, &refusal);
                continue;
            }
            let answer = begin_answer(answers, id, Outcome::Reply);
            let body_start = answers.len();
            self.rows.mark();
            let mut context = Context {
                rows: &mut self.rows,
                stripes: guards,
                shard: &group.shard,
                batch,
                answers,
                core,
                tier: place.tier(),
                has_large_permit: operation.head.flags & FLAG_LARGE_PERMIT != 0,
                owned: owned.clone(),
                now_ns,
                now_ms: now_ns / 1_000_000,
                hint: 0,
                cells,
            };
            let mut ran = command::run(operation.command, &mut context, operation.args(batch));
            operation.fate = Fate::Answered;
            // It has seen some slots before a change and some behind it.
            if owned.is_some_and(|owned| owned.version != group.shard.owned().version) {
                let text = format!("slots of shard {} have changed meanwhile", group.shard.key);
                ran = Err(Failure::Refused(Outcome::WrongEpoch, text));
            }
            let Err(failure) = ran else {
                end_answer(answers, answer);
                continue;
            };
            self.rows.roll_back();
            match (failure, place) {
                (Failure::Error(error), _) => {
                    answers.truncate(body_start);
                    ReplyWriter::new(answers).error(error.text());
                    end_answer(answers, answer);
                }
                (Failure::Refused(Outcome::Unknown, text), _) => {
                    cancel_answer(answers, answer);
                    write_answer(answers, id, Outcome::Unknown, text.as_bytes());
                }
                (Failure::Refused(outcome, text), _) => {
                    cancel_answer(answers, answer);
                    refuse(session, answers, &operation.head, &(outcome, text));
                }
                (Failure::Diverted, Place::Worker) => {
                    cancel_answer(answers, answer);
                    operation.fate = Fate::Diverted;
                    self.diverted.push(operation.head.connection);
                }
                (Failure::Diverted, Place::Lane) => {
                    cancel_answer(answers, answer);
                    let text = "the shard could not read its rows".to_owned();
                    refuse(session, answers, &operation.head, &(Outcome::NotServing, text));
                }
            }
        }
    }

    /// Step 4: one batch of writes.
    fn commit(&mut self, shard: &Shard, batch: &[u8], place: Place) -> Result<(), EngineError> {
        let (mut rows, mut bytes) = (0, 0);
        for index in 0..self.rows.cells.len() {
            let cell = &self.rows.cells[index];
            if let (true, State::Bytes { length, .. }) = (cell.dirty, &cell.state) {
                rows += 1;
                bytes += length;
                // A cached row's key was not located before; its slot is the shard's, or it would not be cached.
                self.rows.locate(index as CellIndex, batch, |_| true);
                bytes += self.rows.physical(index as CellIndex).len();
            }
        }
        if rows == 0 && self.rows.flush.is_none() {
            return Ok(());
        }
        let mut writes = shard.database.writes(rows, bytes);
        for (index, cell) in self.rows.cells.iter().enumerate() {
            if let (true, State::Bytes { start, length }) = (cell.dirty, &cell.state) {
                writes.put_row(self.rows.physical(index as CellIndex), &self.rows.bytes[*start..*start + *length]);
            }
        }
        if let Some(stamp) = self.rows.flush {
            writes.put_meta(meta::FLUSH, &stamp.to_bytes());
        }
        let written = shard.database.write(writes, place.tier());
        if let (Ok(()), Some(stamp)) = (&written, self.rows.flush) {
            shard.database.garbage().flushed(stamp.ns);
        }
        // After an error too: nobody knows what is written then.
        if shard.changes.is_on() {
            if self.rows.flush.is_some() {
                shard.changes.flushed();
            }
            shard.changes.wrote(self.rows.written_keys());
        }
        written?;
        shard.durability.wrote();
        Ok(())
    }

    /// Rows that were read are kept, kept rows that were written are changed.
    fn refresh_cache(&mut self, shard: &Shard, batch: &[u8], guards: &mut Guards<'_>) {
        for cell in &self.rows.cells {
            let is_kept = cell.dirty && cell.was_cached;
            if !(cell.fetched || is_kept) {
                continue;
            }
            let State::Bytes { start, length } = cell.state else { continue };
            let row = &self.rows.bytes[start..start + length];
            let cache = &mut guards[cell.guard as usize].cache;
            if cell.fetched {
                cache.insert(cell.hash, shard.instance, cell.key(batch), row);
            } else {
                cache.update(cell.hash, shard.instance, cell.key(batch), row);
            }
        }
    }

    /// Nothing of the group was executed.
    fn refuse_all(&mut self, session: &Shared, group: &Group, refusal: &Refusal, answers: &mut Vec<u8>) {
        let mut next = group.first;
        while next != END {
            let operation = &mut self.operations[next as usize];
            next = operation.next;
            // What goes to the lane is refused there.
            if operation.fate == Fate::Open {
                operation.fate = Fate::Answered;
                refuse(session, answers, &operation.head, refusal);
            }
        }
    }

    fn divert_all(&mut self, group: &Group) {
        let mut next = group.first;
        while next != END {
            let operation = &mut self.operations[next as usize];
            next = operation.next;
            operation.fate = Fate::Diverted;
        }
    }

    /// Whether the group only says how far the copies have come: that must not wait for them.
    fn tells_of_copies_only(&self, group: &Group) -> bool {
        let first = (group.first != END).then_some(group.first);
        let next = |index: &u32| Some(self.operations[*index as usize].next).filter(|next| *next != END);
        std::iter::successors(first, next)
            .all(|index| self.operations[index as usize].command == StoreCommand::InternalReplication)
    }

    /// Queues what was diverted, in order, after the group's own writes are done.
    fn divert(&mut self, core: &Core, group: &Group, session: &Arc<Shared>, batch: &Bytes) {
        let mut next = group.first;
        while next != END {
            let operation = &self.operations[next as usize];
            next = operation.next;
            if operation.fate == Fate::Diverted {
                let bytes = batch.slice(operation.start as usize..operation.end as usize);
                session.divert(&core.pool, (operation.head.connection, operation.head.target), &bytes);
            }
        }
    }

    /// The group's writes may or may not be in the log, or in that of the shard's next primary. What only reads may have seen them and is refused, so that it is sent again;
    /// not before a write of its own connection, behind which it would come to stand.
    fn answer_unknown(&mut self, session: &Shared, group: &Group, text: &str, answers: &mut Vec<u8>) {
        let first = (group.first != END).then_some(group.first);
        let next = |index: &u32| Some(self.operations[*index as usize].next).filter(|next| *next != END);
        let operations: Vec<u32> = std::iter::successors(first, next).collect();
        let mut writing: Vec<u32> = Vec::new();
        for index in operations.into_iter().rev() {
            let operation = &self.operations[index as usize];
            let head = &operation.head;
            if operation.fate != Fate::Answered {
                continue;
            }
            if operation.writes {
                writing.push(head.connection);
            }
            if writing.contains(&head.connection) {
                write_answer(answers, head.id, Outcome::Unknown, text.as_bytes());
            } else {
                refuse(session, answers, head, &(Outcome::NotServing, text.to_owned()));
            }
        }
    }

    /// Notes what was run; the shared counters are touched once in some batches.
    fn count(&mut self, core: &Core, place: Place) {
        if place == Place::Worker {
            core.counters.batch(self.operations.len());
        }
        self.commands_run.resize(vasto_proto::command::table::STORE_ROWS.len(), 0);
        for operation in &self.operations {
            if operation.fate == Fate::Answered {
                self.commands_run[operation.command as usize] += 1;
            }
        }
        self.batches_run += 1;
        if self.batches_run.is_multiple_of(COUNTED_BATCHES) || place == Place::Lane {
            core.counters.commands(&mut self.commands_run);
        }
    }
}

/// Of so many batches one is measured, for those who move rows meanwhile: the clock costs as much as a small command.
const MEASURED_BATCHES: u32 = 8;
/// Batches between two visits of the shared counters.
const COUNTED_BATCHES: u32 = 64;

fn borrowed<R: std::ops::Deref<Target = [u8]>>(
    row: &Result<Option<R>, EngineError>,
) -> Result<Option<&[u8]>, EngineError> {
    match row {
        Ok(row) => Ok(row.as_deref()),
        Err(error) => Err(error.clone()),
    }
}

/// Answers that nothing was executed, and has what is under way behind it refused as well.
fn refuse(session: &Shared, answers: &mut Vec<u8>, head: &OperationHead, (outcome, text): &Refusal) {
    session.start_refusing((head.connection, head.target), text);
    write_answer(answers, head.id, *outcome, text.as_bytes());
}

/// The reason of the first refusal is what a client should hear.
fn behind_a_refusal(reason: &str) -> Refusal {
    let text = if reason.is_empty() { "an earlier command of this connection was refused" } else { reason };
    (Outcome::NotServing, text.to_owned())
}
