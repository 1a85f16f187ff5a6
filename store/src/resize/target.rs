//! The side that gets slots: one task for each shard from which some come, for as long as the record says so.
//!
//! Rows of the first round come in groups. As long as no copy follows the shard's log, a group is written to a file and taken in as it is;
//! else, as everything that changes later, as batches of the log. A move that breaks off begins anew, with what had come deleted.

use super::groups::{Group, Reader, Written};
use super::incoming::{Ending, Task};
use crate::engine::moved_file::MovedFile;
use crate::engine::{EngineError, Tier, meta};
use crate::replication::{MoveLink, NotOpen};
use crate::shard::Shard;
use crate::shard::executor::Core;
use std::sync::{Arc, Weak};
use std::time::Duration;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use vasto_proto::id::{Epoch, ShardId, ShardKey, StoreId};
use vasto_proto::pb;
use vasto_proto::pb::move_message::Kind;
use vasto_proto::topology::{KeyspaceRecord, Layout, MoveStage, MoveStatus, OperationKind, Phase, SlotSet};

/// Between attempts to reach the source: doubles from the first to the last.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Between looks whether this shard serves, or its copies have everything: a fence waits for the latter.
const LOOK: Duration = Duration::from_millis(5);
/// A file is taken in if memtables have nothing between its rows. Where clients write meanwhile they always have, even when they were
/// written out just now, and after so many files that were for nothing no more are written.
const REFUSED_FILES_MAX: u32 = 2;

/// The slots that come from one other shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taking {
    /// The resize, by the epoch of the record that began it.
    pub operation: u64,
    pub source: ShardId,
    /// The source's primary, and the epoch at which it is.
    pub store: StoreId,
    pub source_epoch: Epoch,
    /// This shard's, whose primary is here.
    pub epoch: Epoch,
    pub slots: SlotSet,
}

/// What a record wants a shard of this store to take.
pub fn wanted(record: &KeyspaceRecord, layout: &Layout, shard: ShardId, own: StoreId) -> Vec<Taking> {
    let operation = record.active_operation().filter(|operation| operation.may_be_aborted());
    let described = |shard: ShardId| record.shards.get(usize::from(shard.0));
    let (Some(operation), Some(target)) = (operation, described(shard).filter(|target| target.primary == own)) else {
        return Vec::new();
    };
    let coming = layout.moves().into_iter().filter(|part| part.target == shard);
    let taking = coming.filter_map(|part| {
        let source = described(part.source)?;
        Some(Taking {
            operation: operation.id,
            source: part.source,
            store: source.primary,
            source_epoch: source.epoch,
            epoch: target.epoch,
            slots: part.slots,
        })
    });
    taking.collect()
}

/// Begins to take what is not being taken yet.
pub fn start(core: &Arc<Core>, shard: &Arc<Shard>, wanted: Vec<Taking>) {
    let mut state = shard.takes.state.lock();
    for taking in wanted {
        if state.takings.iter().any(|(running, _)| *running == taking) {
            continue;
        }
        let status = state.moves.entry(taking.source).or_default();
        *status = MoveStatus {
            source: taking.source,
            operation: taking.operation,
            attempts: status.attempts,
            slots: taking.slots.len() as u32,
            ..MoveStatus::default()
        };
        let task = Task::start(core, |stop, ending| {
            let mover = Mover {
                core: Arc::clone(core),
                shard: Arc::downgrade(shard),
                key: shard.key,
                taking: Arc::new(taking.clone()),
                stop,
                ending,
            };
            mover.run()
        });
        state.takings.push((taking, task));
    }
}

/// Says if slots were committed to a shard that is led here and has not got all their rows. They are served all the same: as after any
/// failover to a copy that lacked something, another one may still have it and hands it over when it follows, which merges rows of slots that
/// are owned only. Nobody else may serve them, so that to serve nothing would help nobody.
pub fn check_committed(shard: &Shard, record: &KeyspaceRecord, layout: &Layout) {
    let Some(operation) = record.active_operation() else { return };
    if operation.phase != Phase::Committed || !matches!(operation.kind, OperationKind::Resize { .. }) {
        return;
    }
    let note = shard.takes.note();
    for part in layout.moves().into_iter().filter(|part| part.target == shard.key.shard) {
        let drained = note.drained(operation.id, part.source);
        let is_whole = drained == Some(operation.fence);
        let mut state = shard.takes.state.lock();
        let status = state.moves.entry(part.source).or_default();
        (status.source, status.operation) = (part.source, operation.id);
        if is_whole {
            status.stage = MoveStage::Drained { fence: operation.fence };
            continue;
        }
        status.stage = MoveStage::Waits;
        "slots were committed to this shard, and rows of them are missing here".clone_into(&mut status.trouble);
        drop(state);
        tracing::error!(shard = %shard.key, source = %part.source, fence = %operation.fence, ?drained,
            "slots are this shard's now, and not all their rows have come here");
    }
}

/// Why a move does not go on.
#[derive(Debug, Error)]
pub enum TakeError {
    #[error("this shard does not serve here at this epoch")]
    NotServing,
    /// What has come may be committed at this moment.
    #[error("everything up to a fence is here, which may go over")]
    Settled,
    /// The move begins anew, for what was alive is dead here.
    #[error("the shard was flushed meanwhile")]
    Flushed,
    #[error("disk full: {0}")]
    Full(String),
    #[error("{0}")]
    Engine(EngineError),
    #[error("{0}")]
    Rows(#[from] super::moved_rows::MovedRowsError),
}

impl From<EngineError> for TakeError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Full(text) => Self::Full(text),
            error => Self::Engine(error),
        }
    }
}

/// What one connection has brought so far.
struct Run {
    /// The newest flush of the shard when it began; a later one ends it.
    flush_ns: u64,
    slots: u32,
    slots_complete: u32,
    /// The open group, if it goes into a file.
    group: Option<Group>,
    /// Files that were not taken in.
    refused_files: u32,
    copied: Reader,
    changed: Reader,
}

struct Mover {
    core: Arc<Core>,
    /// Nobody who waits keeps a shard from being closed.
    shard: Weak<Shard>,
    key: ShardKey,
    taking: Arc<Taking>,
    stop: CancellationToken,
    ending: Ending,
}

impl Mover {
    async fn run(self) {
        let mut pause = PAUSE_MIN;
        let mut reason_before = String::new();
        loop {
            let mut has_begun = false;
            let stop = self.stop.clone();
            if stop.run_until_cancelled(self.stay_settled()).await.is_none() {
                return;
            }
            // What is being written is written to its end all the same: see `blocking`.
            let Some(Err(reason)) = stop.run_until_cancelled(self.take_once(&mut has_begun)).await else { return };
            if self.shard.strong_count() == 0 {
                return;
            }
            if has_begun {
                pause = PAUSE_MIN;
            }
            let is_settled =
                |shard: Arc<Shard>| shard.takes.settled(self.taking.operation, self.taking.source).is_some();
            if !self.shard.upgrade().is_some_and(is_settled) {
                self.note_status(|status| {
                    status.stage = MoveStage::Waits;
                    status.trouble.clone_from(&reason);
                });
            }
            if reason != reason_before {
                tracing::warn!(shard = %self.key, source = %self.taking.source, reason, "a move does not go on; it begins anew");
                reason_before = reason;
            }
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn shard(&self) -> Result<Arc<Shard>, String> {
        self.shard.upgrade().filter(|shard| !shard.is_failed()).ok_or_else(|| "the shard is being closed".to_owned())
    }

    /// Changes the move's status; masters hear at once of another stage and of trouble.
    fn note_status(&self, change: impl FnOnce(&mut MoveStatus)) {
        let Some(shard) = self.shard.upgrade() else { return };
        let is_news = {
            let mut state = shard.takes.state.lock();
            let Some(status) = state.moves.get_mut(&self.taking.source) else { return };
            let before = (status.stage, status.trouble.clone());
            change(status);
            before != (status.stage, status.trouble.clone())
        };
        if is_news {
            self.core.replicator.tell_news();
        }
    }

    /// Does something that waits for the disk, to its end whatever happens: who stops this task waits for it.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Core, &Shard, &Taking) -> Result<T, TakeError> + Send + 'static,
    ) -> Result<T, String> {
        let (core, shard, taking) = (Arc::clone(&self.core), self.shard()?, Arc::clone(&self.taking));
        let ending = self.ending.clone();
        let done = tokio::task::spawn_blocking(move || {
            let done = work(&core, &shard, &taking).map_err(|error| error.to_string());
            drop((shard, ending));
            done
        });
        done.await.unwrap_or_else(|error| Err(format!("taking rows panicked: {error}")))
    }

    /// Says as long as it may be committed that everything is here, whatever has become of the source, of its stream or of this store
    /// since: what has come must not be touched then.
    async fn stay_settled(&self) {
        let mut sequence = None;
        loop {
            let Some(shard) = self.shard.upgrade() else { return };
            let Some(fence) = shard.takes.settled(self.taking.operation, self.taking.source) else { return };
            let sequence = *sequence.get_or_insert_with(|| shard.database.sequence());
            let is_whole = check(&shard, &self.taking).is_ok() && shard.is_copied_up_to(sequence);
            if is_whole && shard.takes.has_heard_of(fence) {
                self.note_status(|status| {
                    status.slots_copied = status.slots;
                    status.stage = MoveStage::Drained { fence };
                    status.trouble.clear();
                });
            }
            drop(shard);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// One attempt; it ends with an error or when it is stopped.
    async fn take_once(&self, has_begun: &mut bool) -> Result<(), String> {
        while check(&*self.shard()?, &self.taking).is_err() {
            tokio::time::sleep(LOOK).await;
        }
        let address = self.core.replicator.address_of(self.taking.store)?;
        let open = pb::MoveOpen {
            store_id: self.core.replicator.store.0,
            keyspace_id: self.key.keyspace.0,
            source: u32::from(self.taking.source.0),
            target: u32::from(self.key.shard.0),
            operation: self.taking.operation,
            source_epoch: self.taking.source_epoch.0,
        };
        let opened = MoveLink::open(&address, self.core.replicator.cluster(), open).await;
        let mut link = opened.map_err(|error| match error {
            NotOpen::Unreachable(reason) | NotOpen::Refused(reason) => reason,
        })?;
        let mut run: Option<Run> = None;
        loop {
            let next = link.next().await?;
            if let Kind::Start(start) = next {
                run = Some(self.begin(start).await?);
                *has_begun = true;
                continue;
            }
            let begun = run.take().ok_or("rows come before their beginning")?;
            run = Some(self.take(begun, next).await?);
        }
    }

    async fn begin(&self, start: pb::MoveStart) -> Result<Run, String> {
        let flush_ns = self.blocking(empty).await?;
        self.note_status(|status| {
            *status = MoveStatus {
                source: status.source,
                operation: status.operation,
                attempts: status.attempts + 1,
                slots: status.slots,
                stage: MoveStage::Copies,
                bytes_expected: start.bytes_expected,
                ..MoveStatus::default()
            };
        });
        tracing::info!(shard = %self.key, source = %self.taking.source, slots = start.slots,
            bytes = start.bytes_expected, "takes slots of another shard");
        Ok(Run {
            flush_ns,
            slots: start.slots,
            slots_complete: 0,
            group: None,
            refused_files: 0,
            copied: Reader::in_order(),
            changed: Reader::default(),
        })
    }

    async fn take(&self, mut run: Run, message: Kind) -> Result<Run, String> {
        match message {
            Kind::Start(_) => Err("a move begins twice at once".to_owned()),
            Kind::Copied(rows) => {
                let (count, bytes) = (u64::from(rows.rows), rows.bytes);
                let run = self.take_copied(run, rows).await?;
                self.note_status(|status| {
                    status.rows_copied += count;
                    status.bytes_copied += bytes;
                });
                Ok(run)
            }
            Kind::GroupEnd(end) => {
                if let Some(group) = run.group.take() {
                    let written = group.end().await?;
                    let shard = self.shard()?;
                    // Beside a compaction that somebody waits for RocksDB takes nothing in.
                    let _turn = shard.takes.files.lock().await;
                    let take_in = move |core: &Core, shard: &Shard, taking: &Taking| {
                        take_in(core, shard, taking, &mut run, written)?;
                        Ok(run)
                    };
                    run = self.blocking(take_in).await?;
                }
                run.slots_complete = end.slots_complete;
                self.note_status(|status| status.slots_copied = end.slots_complete);
                Ok(run)
            }
            Kind::Changed(rows) => {
                let count = u64::from(rows.rows);
                let changed = self.blocking(move |core, shard, taking| {
                    write(core, shard, taking, run.flush_ns, &mut run.changed, &rows)?;
                    fail::fail_point!("resize::target_changed");
                    Ok(run)
                });
                let run = changed.await?;
                self.note_status(|status| {
                    status.changes_applied += count;
                    // The fence was lifted.
                    if matches!(status.stage, MoveStage::Drained { .. }) {
                        status.stage = MoveStage::Follows;
                    }
                });
                Ok(run)
            }
            Kind::Progress(progress) => {
                let is_copied = run.slots_complete >= run.slots && run.group.is_none();
                self.note_status(|status| {
                    (status.behind_keys, status.behind_ms) = (progress.behind_keys, progress.behind_ms);
                    if is_copied && status.stage == MoveStage::Copies {
                        // Slots without rows come with no group.
                        status.slots_copied = status.slots;
                        status.stage = MoveStage::Follows;
                    }
                });
                Ok(run)
            }
            Kind::End(end) => {
                if run.copied.is_in_a_row() || run.changed.is_in_a_row() || run.group.is_some() {
                    return Err("the source has ended in the middle of a row or of a group".to_owned());
                }
                let fence = Epoch(end.fence);
                let drained = self.blocking(move |_, shard, taking| {
                    let sequence = drain(shard, taking, &run, &end)?;
                    Ok((run, sequence))
                });
                let (run, sequence) = drained.await?;
                self.wait_for_copies(fence, sequence).await?;
                fail::fail_point!("resize::target_drained");
                self.note_status(|status| {
                    status.slots_copied = status.slots;
                    (status.behind_keys, status.behind_ms) = (0, 0);
                    status.stage = MoveStage::Drained { fence };
                });
                tracing::info!(shard = %self.key, source = %self.taking.source, %fence, "everything up to the fence is here");
                Ok(run)
            }
        }
    }

    /// Rows of the open group. Copies that follow the log are not made to wait for its end.
    async fn take_copied(&self, mut run: Run, rows: pb::MovedRows) -> Result<Run, String> {
        let shard = self.shard()?;
        if run.group.is_none() && !shard.database.tail().is_on() && run.refused_files < REFUSED_FILES_MAX {
            let (replicator, reader, slots) = (&self.core.replicator, run.copied.clone(), self.taking.slots.clone());
            run.group = Some(Group::begin(replicator, &shard, reader, slots, run.flush_ns, self.ending.clone()));
        }
        drop(shard);
        if let Some(group) = &mut run.group {
            group.add(rows).await?;
            return Ok(run);
        }
        let written = self.blocking(move |core, shard, taking| {
            write(core, shard, taking, run.flush_ns, &mut run.copied, &rows)?;
            Ok(run)
        });
        written.await
    }

    /// Waits until all copies have the log up to this number that must.
    async fn wait_for_copies(&self, fence: Epoch, sequence: u64) -> Result<(), String> {
        loop {
            let shard = self.shard()?;
            check(&shard, &self.taking).map_err(|error| error.to_string())?;
            // A replica that is one since the fence must have it too.
            if shard.takes.has_heard_of(fence) && shard.is_copied_up_to(sequence) {
                return Ok(());
            }
            drop(shard);
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Whether this store may write what comes to the shard. Holds for as long as the caller keeps the shard still.
fn check(shard: &Shard, taking: &Taking) -> Result<(), TakeError> {
    let serves = shard.replication.leads() && shard.epoch() == taking.epoch && shard.lease.allows();
    if serves && !shard.is_failed() { Ok(()) } else { Err(TakeError::NotServing) }
}

/// Deletes what there is of the coming slots and notes that they come, before the first of their rows does. Returns up to which event time
/// rows are dead here.
fn empty(core: &Core, shard: &Shard, taking: &Taking) -> Result<u64, TakeError> {
    fail::fail_point!("resize::target_before_empty");
    let _still = shard.takes.hold_still();
    check(shard, taking)?;
    if shard.takes.settled(taking.operation, taking.source).is_some() {
        return Err(TakeError::Settled);
    }
    let database = &shard.database;
    // Looked for and not concluded from the note: what another life has left here must not come back among the rows that come.
    let left = database.slots_with_rows(&taking.slots)?;
    let before = shard.takes.note();
    let mut note = before.of(taking.operation);
    note.moves.insert(taking.source, Epoch::default());
    if !left.is_empty() || note != before {
        let mut writes = database.writes(2 * left.len() + 1, 64);
        writes.delete_slots(&left);
        writes.put_meta(meta::FOREIGN, &note.to_bytes());
        database.write_synced(writes).inspect_err(|error| shard.meet(error))?;
        shard.durability.wrote();
        shard.takes.noted(database, note);
    }
    if !left.is_empty() && !database.tail().is_on() {
        // Else the first file that is taken in would have writers wait for it.
        database.write_out_memtables()?;
    }
    write_out_if_needed(core);
    fail::fail_point!("resize::target_emptied");
    Ok(shard.flush_ns())
}

fn write_out_if_needed(core: &Core) {
    if core.engine.has_too_many_memtables() {
        core.pool.schedule_write_out();
    }
}

/// Takes a group in as the file that it was written to, or else as batches of the log.
fn take_in(core: &Core, shard: &Shard, taking: &Taking, run: &mut Run, written: Written) -> Result<(), TakeError> {
    let Written { messages, file, reader } = written;
    let is_taken = match file {
        Some(file) => ingest(shard, taking, run.flush_ns, &file)?,
        None => true,
    };
    if is_taken {
        run.copied = reader;
        run.refused_files = 0;
        return Ok(());
    }
    run.refused_files += 1;
    messages.iter().try_for_each(|rows| write(core, shard, taking, run.flush_ns, &mut run.copied, rows))
}

/// Whether a file was taken in: not if copies follow the log by now, nor if writes come in between.
fn ingest(shard: &Shard, taking: &Taking, flush_ns: u64, file: &MovedFile) -> Result<bool, TakeError> {
    for is_written_out in [false, true] {
        if is_written_out {
            shard.database.write_out_memtables()?;
        }
        // Whether copies follow changes with the shard's part.
        let _still = shard.takes.hold_still();
        check(shard, taking)?;
        check_flush(shard, flush_ns)?;
        if shard.database.tail().is_on() {
            return Ok(false);
        }
        fail::fail_point!("resize::target_before_ingest");
        if shard.database.ingest(file)? {
            fail::fail_point!("resize::target_ingested");
            return Ok(true);
        }
    }
    Ok(false)
}

/// A flush here kills rows that are alive where they come from.
fn check_flush(shard: &Shard, flush_ns: u64) -> Result<(), TakeError> {
    if shard.flush_ns() == flush_ns { Ok(()) } else { Err(TakeError::Flushed) }
}

/// Writes the rows of a message as one batch of the log: copies apply it at once, and what clients write waits for its turn. The shard does
/// not own their slots: nothing of them is cached and no operation touches them.
fn write(
    core: &Core,
    shard: &Shard,
    taking: &Taking,
    flush_ns: u64,
    reader: &mut Reader,
    message: &pb::MovedRows,
) -> Result<(), TakeError> {
    let bytes = message.packed.len().max(message.unpacked_bytes as usize);
    let mut writes = shard.database.writes(message.rows as usize, bytes);
    let mut is_empty = true;
    reader.read(message, &taking.slots, flush_ns, |key, row| {
        is_empty = false;
        writes.put_row(key, row);
        Ok::<_, TakeError>(())
    })?;
    if is_empty {
        return Ok(());
    }
    let still = shard.takes.hold_still();
    check(shard, taking)?;
    check_flush(shard, flush_ns)?;
    shard.database.write(writes, Tier::Disk).inspect_err(|error| shard.meet(error))?;
    shard.durability.wrote();
    drop(still);
    write_out_if_needed(core);
    Ok(())
}

/// Notes that everything up to a fence is here, on the disk. Returns where in the log that stands.
fn drain(shard: &Shard, taking: &Taking, run: &Run, end: &pb::MoveEnd) -> Result<u64, TakeError> {
    let _still = shard.takes.hold_still();
    check(shard, taking)?;
    check_flush(shard, run.flush_ns)?;
    let database = &shard.database;
    // What a client writes here then wins over what it could read there.
    let above_ns = end.stamps_above_ns.max(run.copied.largest_ns).max(run.changed.largest_ns);
    shard.stamps.rise_above(above_ns, database).inspect_err(|error| shard.meet(error))?;
    let mut note = shard.takes.note().of(taking.operation);
    note.moves.insert(taking.source, Epoch(end.fence));
    note.dropped_ns = note.dropped_ns.max(end.dropped_ns);
    fail::fail_point!("resize::target_before_drained");
    database.put_meta_synced(meta::FOREIGN, &note.to_bytes()).inspect_err(|error| shard.meet(error))?;
    shard.durability.wrote();
    shard.takes.noted(database, note);
    Ok(database.sequence())
}
