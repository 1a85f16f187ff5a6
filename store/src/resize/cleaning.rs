//! Deletes rows of slots that a shard does not own any more, or never came to own, and has the disk get their space back.
//!
//! Each primary does it for its shard once the record says that nobody needs those rows: with batches of its log, which its copies
//! follow. What is to be deleted is looked for, so that doing it twice, or by another primary, comes to the same.

use super::incoming::{Ending, Task};
use super::note::Rows;
use crate::engine::{EngineError, meta};
use crate::shard::Shard;
use crate::shard::executor::Core;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use vasto_proto::id::{Epoch, ShardId, ShardKey, StoreId};
use vasto_proto::slot::SLOT_COUNT;
use vasto_proto::topology::{KeyspaceRecord, Layout, Phase, SlotSet};

/// Until the shard serves, and after an error.
const PAUSE: Duration = Duration::from_millis(200);
/// Between looks whether copies have applied it.
const LOOK: Duration = Duration::from_millis(20);
/// Files are rewritten at once if so much of a shard's bytes is deleted, as a part of them; else compactions come to it as they come by. What
/// has left a shard of ten is not worth rewriting the shard.
const GARBAGE_SHARE: u64 = 8;
/// A shard is rewritten in parts of about so many bytes: others, and the end of the store, wait for one at most.
const PART_BYTES: u64 = 256 << 20;
const PARTS_MAX: u64 = 64;

/// A cleaning that the record asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleaning {
    /// The operation after which it is, or the one that the note speaks of.
    operation: u64,
    epoch: Epoch,
    /// All slots but those that the shard owns.
    slots: SlotSet,
}

/// Whether nobody needs rows any more of slots that a shard does not own.
fn may_clean(record: &KeyspaceRecord, shard: ShardId) -> bool {
    match record.active_operation() {
        None => !record.dropped,
        // A shard that goes loses its folder.
        Some(operation) => operation.phase == Phase::Clean && shard.0 < record.shard_count(),
    }
}

/// What a record, whose layout this is, asks of a shard of this store.
fn wanted(shard: &Shard, record: &KeyspaceRecord, layout: &Layout, own: StoreId) -> Option<Cleaning> {
    let described = record.shards.get(usize::from(shard.key.shard.0)).filter(|described| described.primary == own)?;
    if !may_clean(record, shard.key.shard) || !shard.takes.has_foreign_rows() {
        return None;
    }
    let operation = record.operation.as_ref().map_or_else(|| shard.takes.note().operation, |operation| operation.id);
    Some(Cleaning { operation, epoch: described.epoch, slots: layout.served(shard.key.shard).complement() })
}

/// Begins what a record asks for and ends what it does not ask for any more. Call it when the shard owns what the record says.
pub fn follow(core: &Arc<Core>, shard: &Arc<Shard>, record: &KeyspaceRecord, layout: &Layout) {
    let own = core.replicator.store;
    let wanted = wanted(shard, record, layout, own);
    let described = record.shards.get(usize::from(shard.key.shard.0));
    let leads = |epoch| described.is_some_and(|described| described.primary == own && described.epoch == epoch);
    let running = {
        let mut state = shard.takes.state.lock();
        let goes_on = match (&state.cleaning, &wanted) {
            // It may be done and be rewriting files.
            (Some((running, _)), None) => may_clean(record, shard.key.shard) && leads(running.epoch),
            (Some((running, _)), Some(wanted)) => running == wanted,
            (None, _) => false,
        };
        if goes_on {
            None
        } else {
            state.is_cleaning = false;
            state.cleaning.take()
        }
    };
    if let Some((_, task)) = running {
        task.stop();
    }
    let mut state = shard.takes.state.lock();
    if let (Some(cleaning), None) = (wanted, &state.cleaning) {
        let task = Task::start(core, |stop, ending| {
            let (core, shard, key) = (Arc::clone(core), Arc::downgrade(shard), shard.key);
            Cleaner { core, shard, key, cleaning: cleaning.clone(), stop }.run(ending)
        });
        state.cleaning = Some((cleaning, task));
    }
}

struct Cleaner {
    core: Arc<Core>,
    /// Nobody who waits keeps a shard from being closed.
    shard: Weak<Shard>,
    key: ShardKey,
    cleaning: Cleaning,
    stop: CancellationToken,
}

/// What was deleted.
struct Cleaned {
    /// Where in the log that stands.
    sequence: u64,
    slots: usize,
    /// That have rows and are the shard's.
    own_slots: usize,
    /// Of files, before.
    bytes: u64,
    bytes_of_all: u64,
}

impl Cleaner {
    async fn run(self, ending: Ending) {
        let stop = self.stop.clone();
        let mut reason_before = String::new();
        let cleaned = loop {
            let (cleaning, deleting) = (self.cleaning.clone(), ending.clone());
            let work = move |shard: &Shard| {
                let cleaned = clean(shard, &cleaning);
                drop(deleting);
                cleaned
            };
            match self.blocking(work).await {
                Some(Ok(Some(cleaned))) => break cleaned,
                // It does not serve yet.
                Some(Ok(None)) => {}
                Some(Err(error)) => {
                    let reason = error.to_string();
                    if reason != reason_before {
                        tracing::warn!(shard = %self.key, reason, "cannot delete rows of slots that are not the shard's; tries again");
                        reason_before = reason;
                    }
                }
                None => return,
            }
            if stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await.is_none() {
                return;
            }
        };
        // Files may be rewritten whatever the record says meanwhile.
        drop(ending);
        let Cleaned { sequence, slots, own_slots, bytes, bytes_of_all } = cleaned;
        if slots > 0 {
            fail::fail_point!("resize::source_cleaned");
        }
        // A copy that leads next has no reason to look for them once everybody has heard that they are gone.
        while !self.shard.upgrade().is_none_or(|shard| shard.has_reached_followers(sequence)) {
            if stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none() {
                return;
            }
        }
        if let Some(shard) = self.shard.upgrade() {
            shard.takes.state.lock().is_cleaning = false;
        }
        self.core.replicator.tell_news();
        tracing::info!(shard = %self.key, slots, bytes, "rows of slots that are not the shard's are deleted");
        // Bytes between keys are known to a block or so, which says little of slots that are small.
        let is_much = |part: u64, all: u64| part.saturating_mul(GARBAGE_SHARE) >= all;
        if slots > 0 && (is_much(bytes, bytes_of_all) || is_much(slots as u64, (slots + own_slots) as u64)) {
            self.compact(bytes_of_all).await;
        }
    }

    /// Rewrites the shard's files part by part, while no other shard of the store is rewritten for this reason.
    async fn compact(&self, bytes_of_all: u64) {
        let Some(_turn) = self.stop.run_until_cancelled(self.core.replicator.compacting.lock()).await else { return };
        let write_out = |shard: &Shard| {
            if let Err(error) = shard.database.flush() {
                tracing::warn!(shard = %shard.key, %error, "cannot write the memtables out; space comes back with later compactions");
            }
        };
        for part in parts(bytes_of_all) {
            let Some(shard) = self.shard.upgrade() else { return };
            let Some(_turn) = self.stop.run_until_cancelled(shard.takes.files.lock()).await else { return };
            let work = move |shard: &Shard| {
                write_out(shard);
                shard.database.compact_slots(part);
            };
            if self.stop.is_cancelled() || self.blocking(work).await.is_none() {
                return;
            }
        }
        tracing::info!(shard = %self.key, "the space of deleted slots is free");
    }

    /// Does something that waits for the disk, to its end whatever happens; `None` if the shard is gone.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Shard) -> T + Send + 'static) -> Option<T> {
        let shard = self.shard.upgrade().filter(|shard| !shard.is_failed())?;
        let done = tokio::task::spawn_blocking(move || work(&shard)).await;
        done.inspect_err(|error| tracing::error!(shard = %self.key, %error, "cleaning panicked")).ok()
    }
}

/// All slots, in parts that have about as many bytes each as they should.
fn parts(bytes: u64) -> Vec<Range<u16>> {
    let count = (bytes / PART_BYTES).clamp(1, PARTS_MAX) as u16;
    let slots = SLOT_COUNT.div_ceil(count);
    (0..count).map(|part| part * slots..((part + 1) * slots).min(SLOT_COUNT)).collect()
}

/// Deletes all rows of these slots and notes that; `None` while the shard does not serve.
fn clean(shard: &Shard, cleaning: &Cleaning) -> Result<Option<Cleaned>, EngineError> {
    let _still = shard.takes.hold_still();
    let serves = shard.replication.leads() && shard.epoch() == cleaning.epoch && shard.lease.allows();
    if !serves || shard.is_read_only() {
        return Ok(None);
    }
    let database = &shard.database;
    let left = database.slots_with_rows(&cleaning.slots)?;
    let ranges: Vec<Range<Vec<u8>>> =
        left.runs().map(|run| run.start.to_be_bytes().to_vec()..run.end.to_be_bytes().to_vec()).collect();
    let mut cleaned = Cleaned {
        sequence: 0,
        slots: left.len(),
        own_slots: database.slots_with_rows(&cleaning.slots.complement())?.len(),
        bytes: database.bytes_between(&ranges).iter().sum(),
        bytes_of_all: database.disk_bytes(),
    };
    let mut note = shard.takes.note();
    (note.operation, note.rows) = (cleaning.operation, Rows::Clean);
    note.moves.clear();
    let mut writes = database.writes(2 * left.len() + 1, 64);
    writes.delete_slots(&left);
    writes.put_meta(meta::FOREIGN, &note.to_bytes());
    database.write_synced(writes).inspect_err(|error| shard.meet(error))?;
    shard.durability.wrote();
    shard.takes.state.lock().is_cleaning = true;
    shard.takes.noted(database, note);
    cleaned.sequence = database.sequence();
    Ok(Some(cleaned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_slots_once() {
        for bytes in [0, PART_BYTES, 7 * PART_BYTES + 5, u64::MAX] {
            let parts = parts(bytes);
            assert_eq!((parts[0].start, parts.last().unwrap().end), (0, SLOT_COUNT), "{bytes}");
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start && pair[1].start < pair[1].end));
        }
    }
}
