//! Hand-over: what a copy has and its primary lacks, found by the one and merged by stamp by the other.

use super::apply::find_carried;
use crate::engine::log_batch::{Change, Family, LogBatch};
use crate::engine::{EngineError, Tier, meta};
use crate::shard::Shard;
use crate::shard::stripes::{Patience, StripeGuard, StripeSet, Stripes};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use thiserror::Error;
use vasto_proto::id::Epoch;
use vasto_proto::pb;
use vasto_proto::row::{Header, Stamp, newer};
use vasto_proto::topology::Position;

/// In a shard's folder: handed rows that are older than a forgotten deletion, or of slots that have gone to another shard. Key and row, each behind its length (u32 big endian).
pub const QUARANTINE: &str = "quarantine";
/// Rows that travel in one message, or are merged under one set of locks.
const ROWS_MAX: usize = 256;
const BYTES_MAX: usize = 256 << 10;
const SLOT_BYTES: usize = 2;
const GUARDS_INLINE: usize = 64;

/// What a copy has to give.
#[derive(Debug, PartialEq, Eq)]
pub enum Surplus {
    /// Nothing but notes of its own lies behind the common position: the copy is as if it stood there.
    Nothing {
        common: Position,
    },
    Keys(BTreeSet<Vec<u8>>),
    /// It cannot be told which rows.
    All,
}

/// Finds out what of this copy may lie behind the position that its primary has in common with it. Blocks on the disk.
pub fn surplus(shard: &Shard, common: Option<Position>) -> Result<Surplus, EngineError> {
    let database = &shard.database;
    let latest = database.sequence();
    let (common, start) = {
        let state = shard.replication.state.lock();
        let now = state.position(latest);
        let Some((now, other)) = now.zip(common) else { return Ok(Surplus::All) };
        let Some(common) = state.history.common(now, other) else { return Ok(Surplus::All) };
        (common, state.log.and_then(|log| state.history.own_sequence(log, common)))
    };
    let start = match start {
        Some(start) => Some(start),
        None => find_carried(database, common)?,
    };
    let Some(start) = start else { return Ok(Surplus::All) };
    let (mut keys, mut reached, mut is_whole) = (BTreeSet::new(), start, true);
    database.walk_log(start, |logged| {
        is_whole &= logged.first == reached + 1;
        reached = logged.last;
        let Some(batch) = LogBatch::parse(&logged.data) else {
            is_whole = false;
            return ControlFlow::Break(());
        };
        for change in batch.changes() {
            match change {
                Ok(Change::Put { family: Family::Keys, key, .. }) => {
                    keys.insert(key.to_vec());
                }
                Ok(Change::Put { family: Family::Meta, key, .. }) if key != meta::FLUSH => {}
                Ok(Change::Put { .. } | Change::Delete { .. } | Change::DeleteRange { .. }) | Err(_) => {
                    is_whole = false
                }
            }
        }
        if is_whole { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(match is_whole && reached >= latest {
        true if keys.is_empty() => Surplus::Nothing { common },
        true => Surplus::Keys(keys),
        false => Surplus::All,
    })
}

/// Gives up what lies behind the common position, which is nothing that clients see: from here on the copy stands there.
pub fn step_back(shard: &Shard, common: Position) -> Result<(), EngineError> {
    let mut state = shard.replication.state.lock();
    let mut history = state.history.clone();
    history.cut(common.era);
    let mut writes = shard.database.writes(2, 1 << 10);
    writes.put_meta(meta::HISTORY, &history.to_bytes());
    writes.put_meta(meta::POSITION, &common.to_bytes());
    shard.database.write_synced(writes)?;
    state.history = history;
    state.noted = Some(common);
    Ok(())
}

/// Shows the messages that give the surplus away; the first says who gives. `give` says whether to go on. Blocks on the disk.
pub fn messages(
    shard: &Shard,
    surplus: &Surplus,
    first: pb::HandOverMessage,
    mut give: impl FnMut(pb::HandOverMessage) -> bool,
) -> Result<u64, EngineError> {
    let flush = shard.database.meta(meta::FLUSH)?.unwrap_or_default();
    if !give(pb::HandOverMessage { flush_stamp: flush, ..first }) {
        return Ok(0);
    }
    let (mut rows, mut bytes, mut given) = (Vec::new(), 0, 0);
    let mut add = |key: &[u8], row: &[u8]| {
        given += 1;
        let pieces = row.chunks(BYTES_MAX);
        let last = pieces.len().saturating_sub(1);
        for (number, piece) in pieces.enumerate() {
            bytes += key.len() + piece.len();
            rows.push(pb::HandedRow { physical_key: key.to_vec(), row: piece.to_vec(), more: number < last });
            if rows.len() >= ROWS_MAX || bytes >= BYTES_MAX {
                bytes = 0;
                if !give(pb::HandOverMessage { rows: std::mem::take(&mut rows), ..Default::default() }) {
                    return false;
                }
            }
        }
        true
    };
    match surplus {
        Surplus::Nothing { .. } => {}
        Surplus::Keys(keys) => {
            // Rows that another shard has sent here it sends to the primary as well.
            for key in keys.iter().filter(|key| !shard.takes.is_coming(key)) {
                let Some(row) = shard.database.get(key, Tier::Disk)? else { continue };
                if !add(key, &row) {
                    return Ok(given);
                }
            }
        }
        Surplus::All => {
            let is_fenced = shard.owned().fence.is_some();
            let mut walk = shard.database.walk();
            walk.seek(&[]);
            while let Some((key, row)) = walk.key().zip(walk.value()) {
                // Of slots that have gone for good this copy has what was left of them, which is nobody's any more.
                let slot = key.first_chunk::<SLOT_BYTES>().map_or(0, |slot| u16::from_be_bytes(*slot));
                let is_given = (shard.owns(slot) || is_fenced) && !shard.takes.is_coming(key);
                if is_given && !add(key, row) {
                    return Ok(given);
                }
                walk.next();
            }
            walk.status()?;
        }
    }
    if !rows.is_empty() {
        give(pb::HandOverMessage { rows, ..Default::default() });
    }
    Ok(given)
}

/// Why rows are not taken over.
#[derive(Debug, Error)]
pub enum MergeError {
    #[error("shard {0} does not lead here at this epoch")]
    NotLeading(String),
    /// Who lifts the fence may want the rows yet.
    #[error("slots of shard {0} are just moving to another")]
    Fenced(String),
    #[error("a handed row is malformed")]
    Malformed,
    #[error("cannot keep rows aside: {0}")]
    Quarantine(#[from] io::Error),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Takes over what one copy gives.
#[derive(Default)]
pub struct Merge {
    /// Under leases everything that the giver has was written before the eras here that are behind its own: what was drawn in those, above
    /// this event time, was written later, whatever the giver's clock said.
    later_ns: Option<u64>,
    pub merged: u64,
    pub older: u64,
    pub quarantined: u64,
    /// A row that comes in pieces.
    unfinished: Option<(Vec<u8>, Vec<u8>)>,
}

impl Merge {
    /// A copy that stands at this position begins to give.
    pub fn new(shard: &Shard, giver: Option<Position>) -> Self {
        // Without leases two may have led at once: then time decides.
        let later_ns = giver
            .filter(|_| shard.lease.wanted().is_some())
            .and_then(|giver| shard.replication.state.lock().history.floor_behind(giver.era));
        Self { later_ns, ..Self::default() }
    }

    fn was_drawn_later(&self, stored: &[u8]) -> bool {
        Header::decode(stored).is_ok_and(|(header, _)| header.written_at_ns == 0 && self.is_later(header.stamp.ns))
    }

    fn is_later(&self, ns: u64) -> bool {
        self.later_ns.is_some_and(|later_ns| ns > later_ns)
    }

    /// Everything is dead there up to this stamp, so it is here. Blocks on the disk.
    pub fn flush(&mut self, stripes: &Stripes, shard: &Shard, epoch: Epoch, stamp: &[u8]) -> Result<(), MergeError> {
        if stamp.is_empty() {
            return Ok(());
        }
        let mut stamp = Stamp::from_bytes(stamp).ok_or(MergeError::Malformed)?;
        stamp.ns = stamp.ns.min(self.later_ns.unwrap_or(u64::MAX));
        if stamp.ns <= shard.flush_ns() {
            return Ok(());
        }
        shard.stamps.rise_above(stamp.ns, &shard.database)?;
        let mut all = StripeSet::default();
        all.add_all();
        let mut guards: SmallVec<[StripeGuard<'_>; GUARDS_INLINE]> = SmallVec::new();
        all.lock(stripes, Patience::Unbounded, &mut guards);
        check(shard, epoch)?;
        let mut writes = shard.database.writes(1, 64);
        writes.put_meta(meta::FLUSH, &stamp.to_bytes());
        shard.database.write(writes, Tier::Disk).inspect_err(|error| shard.meet(error))?;
        shard.database.garbage().flushed(stamp.ns);
        if shard.changes.is_on() {
            shard.changes.flushed();
        }
        shard.durability.wrote();
        Ok(())
    }

    /// Merges rows. Blocks on the disk.
    pub fn take(
        &mut self,
        stripes: &Stripes,
        shard: &Shard,
        epoch: Epoch,
        handed: Vec<pb::HandedRow>,
    ) -> Result<(), MergeError> {
        let mut rows: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for handed in handed {
            let (key, mut row) = match self.unfinished.take() {
                Some((key, row)) if key == handed.physical_key => (key, row),
                Some(_) => return Err(MergeError::Malformed),
                None => (handed.physical_key.to_vec(), Vec::new()),
            };
            row.extend_from_slice(&handed.row);
            if handed.more {
                self.unfinished = Some((key, row));
            } else {
                rows.push((key, row));
            }
        }
        for rows in rows.chunks(ROWS_MAX) {
            self.merge(stripes, shard, epoch, rows)?;
        }
        Ok(())
    }

    fn merge(
        &mut self,
        stripes: &Stripes,
        shard: &Shard,
        epoch: Epoch,
        rows: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), MergeError> {
        let mut largest_ns = 0;
        let mut set = StripeSet::default();
        let hash = |key: &[u8]| stripes.hash(shard.instance, &key[SLOT_BYTES..]);
        for (key, row) in rows {
            let (header, _) = Header::decode(row).map_err(|_| MergeError::Malformed)?;
            let slot = key.first_chunk::<SLOT_BYTES>().map(|slot| u16::from_be_bytes(*slot));
            if slot.is_none() {
                return Err(MergeError::Malformed);
            }
            largest_ns = largest_ns.max(header.stamp.ns);
            set.add(hash(key));
        }
        // Before any of them can be read: what a client writes then must win over it.
        shard.stamps.rise_above(largest_ns, &shard.database)?;
        let mut guards: SmallVec<[StripeGuard<'_>; GUARDS_INLINE]> = SmallVec::new();
        set.lock(stripes, Patience::Unbounded, &mut guards);
        check(shard, epoch)?;
        let is_fenced = shard.owned().fence.is_some();
        let garbage = shard.database.garbage();
        let stored = shard.database.get_many(rows.iter().map(|(key, _)| key.as_slice()), Tier::Disk);
        let mut writes = shard.database.writes(rows.len(), rows.iter().map(|(key, row)| key.len() + row.len()).sum());
        let (mut written, mut aside) = (Vec::new(), Vec::new());
        for ((key, row), stored) in rows.iter().zip(stored) {
            let (header, _) = Header::decode(row).map_err(|_| MergeError::Malformed)?;
            let ns = header.stamp.ns;
            // An event time that a client gave is worth the same wherever it was written.
            let is_given = header.written_at_ns != 0;
            let slot = key.first_chunk::<SLOT_BYTES>().map_or(0, |slot| u16::from_be_bytes(*slot));
            match stored? {
                _ if is_fenced && !shard.owns(slot) => return Err(MergeError::Fenced(shard.key.to_string())),
                // Its slot has gone to another shard.
                _ if !shard.owns(slot) => aside.push((key, row)),
                _ if ns <= garbage.flush_ns() || !is_given && self.is_later(garbage.flush_ns()) => self.older += 1,
                Some(stored) if newer(&stored, row) == &stored[..] => self.older += 1,
                Some(stored) if !is_given && self.was_drawn_later(&stored) => self.older += 1,
                None if ns <= garbage.dropped_ns() || self.is_later(garbage.dropped_ns()) => aside.push((key, row)),
                Some(_) | None => {
                    writes.put_row(key, row);
                    written.push((key, row));
                }
            }
        }
        if !aside.is_empty() {
            self.quarantined += aside.len() as u64;
            let path = shard.database.folder().join(QUARANTINE);
            let mut file = File::options().create(true).append(true).open(&path)?;
            for part in aside.into_iter().flat_map(|(key, row)| [key, row]) {
                file.write_all(&(part.len() as u32).to_be_bytes())?;
                file.write_all(part)?;
            }
            file.sync_all()?;
        }
        if written.is_empty() {
            return Ok(());
        }
        let result = shard.database.write(writes, Tier::Disk).inspect_err(|error| shard.meet(error));
        // After an error too: nobody knows what is written then.
        if shard.changes.is_on() {
            shard.changes.wrote(written.iter().map(|(key, _)| key.as_slice()));
        }
        result?;
        for (key, row) in &written {
            let hash = hash(key);
            let cache = &mut guards[set.position(hash) as usize].cache;
            cache.update(hash, shard.instance, &key[SLOT_BYTES..], row);
        }
        self.merged += written.len() as u64;
        shard.replication.counts.handed_over_rows.fetch_add(written.len() as u64, Ordering::Relaxed);
        shard.durability.wrote();
        Ok(())
    }

    /// All has come: what was merged survives whatever happens to this store, as the giver will forget it.
    pub fn finish(self, shard: &Shard, giver: u32) -> Result<pb::HandOverResponse, MergeError> {
        if self.unfinished.is_some() {
            return Err(MergeError::Malformed);
        }
        shard.database.sync_log().inspect_err(|error| shard.meet(error))?;
        let Self { merged, older, quarantined, .. } = self;
        if quarantined > 0 {
            let folder = shard.database.folder().display();
            tracing::warn!(shard = %shard.key, giver, quarantined, %folder, "rows older than a forgotten deletion, or of slots that have gone, are kept aside in a file");
        }
        tracing::info!(shard = %shard.key, giver, merged, older, "a copy has handed over what only it had");
        Ok(pb::HandOverResponse { merged, older, quarantined })
    }
}

fn check(shard: &Shard, epoch: Epoch) -> Result<(), MergeError> {
    let leads = shard.replication.leads() && shard.epoch() == epoch;
    if leads { Ok(()) } else { Err(MergeError::NotLeading(shard.key.to_string())) }
}
