//! Decides the steps by which a keyspace gets another number of shards. Pure: the record and what the master knows in, the next version of
//! the record out. All that is not in the record is soft: a master that begins anew only waits a little longer.
//!
//! Why a commit loses nothing and no slot has two owners, whoever fails meanwhile:
//! - Each version of a record is the next one of the version before, chosen by more than half of the holders: all masters, sources and
//!   targets see parts of one history. A fence is named by the epoch of the version that set it, so a fence that was lifted and set again is
//!   another one.
//! - `Drained{F}` says that a source which followed a version with fence F has sent everything, and that a target has it on disk. The
//!   source had stopped serving the slots before: F is on its disk, and after a restart it opens with it. It stays true for as long as the
//!   target is led by the same primary under the same shard epoch, because nothing of the slots changes at the source behind F, and a target
//!   that has said so does not begin anew behind F.
//! - Another primary of the source comes by a version after F. Either that still has F: then it does not serve the slots either, and all that
//!   was acknowledged before F was executed by primaries that led until F, the last of which has sent it; or the fence has been lifted
//!   meanwhile, and then the commit, which is the next version after one with F, cannot be chosen any more.
//! - Another primary of the target comes by a version with another epoch of the target's shard. What the one before has said does not count
//!   any more, and a commit that was decided by it is the next version of an older one: it is not chosen. If instead the target's
//!   primary fails after the commit was chosen, then who follows it has all that the copies had applied before `Drained`, as with every
//!   acknowledged write.
//! - Of two masters only one has its proposals chosen; the other one's are refused, for their term or for their place in the history. What a
//!   master has heard earlier may be late, but by the two points before it is still true or does not count.
//! - Before the commit the target does not serve the slots, and after it the source does not: to follow the commit's version or any later one
//!   means to know that, and who follows an older one is behind the fence.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use thiserror::Error;
use vasto_proto::id::{ShardId, ShardKey, StoreId};
use vasto_proto::topology::{
    KeyspaceRecord, Layout, MoveStage, MoveStatus, NOBODY, OperationKind, Phase, ShardRecord, StepError,
};

use crate::failover::{self, Tending};
use crate::place::{self, Candidate, TooFewStores};
use crate::progress::Progress;
use crate::standing::{View, shards};

/// What is behind a fence is not served: after so long the fence is lifted. To drain takes some tens of milliseconds and two synced votes.
const FENCE_MAX: Duration = Duration::from_secs(2);

/// After a fence was lifted the next one waits for so long, and each time as much longer.
const FENCE_PAUSE: Duration = Duration::from_secs(1);

/// So many fences are lifted; then the operation is aborted rather than to take slots away again and again.
const FENCES_MAX: u32 = 5;

/// A target that is not served for so long is given up: long enough for a store to be started again, and short enough for whoever waits.
const TARGET_PATIENCE: Duration = Duration::from_secs(30);

/// Reports one after the other by which a target must have caught up: one alone may be of a moment.
const CAUGHT_UP_REPORTS: u32 = 2;

/// What comes to a store must fit so many times into its free disk: compaction needs as much again for a while.
const DISK_RESERVE: u64 = 2;

/// A store with less free disk gets nothing: as much as RocksDB must write to go on after its disk was full.
const DISK_LEAST_BYTES: u64 = 32 << 20;

/// A target with less cannot keep the records of the next steps either.
const DISK_FULL_BYTES: u64 = 4 << 20;

/// Why a keyspace is not resized. Nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ResizeError {
    #[error("{0}; nothing was changed")]
    Step(#[from] StepError),
    #[error("a keyspace needs 1 to {max} shards, not {0}; nothing was changed", max = vasto_proto::slot::SHARD_COUNT_MAX)]
    ShardCount(u32),
    #[error("{0}; nothing was changed")]
    TooFewStores(#[from] TooFewStores),
    #[error("{}; nothing was changed", .0.0)]
    NotServed(Wait),
    #[error(
        "about {coming} MB would come to store {store}, whose disk has {free} MB free, and twice as much as comes, and 32 MB, are needed; nothing was changed"
    )]
    TooLittleDisk { store: StoreId, coming: u64, free: u64 },
}

/// What a step waits for, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait(pub String);

fn wait<T>(text: String) -> Result<T, Wait> {
    Err(Wait(text))
}

/// The version of the record that begins to resize its keyspace.
pub fn begin(record: &KeyspaceRecord, to: u32, view: &View<'_>) -> Result<KeyspaceRecord, ResizeError> {
    let Some(to) = u16::try_from(to).ok().filter(|to| (1..=vasto_proto::slot::SHARD_COUNT_MAX).contains(to)) else {
        return Err(ResizeError::ShardCount(to));
    };
    let from = record.shard_count();
    let new = to.saturating_sub(from);
    // What is wrong with the wish itself comes before what is wrong with the cluster.
    record.begin_resize(to, vec![StoreId(1); usize::from(new)])?;
    for (key, shard) in shards(record) {
        is_served(key, shard, view).map_err(ResizeError::NotServed)?;
    }
    let able = view.stores.values().filter(|store| store.up && !store.older);
    let candidates: Vec<Candidate> = able.map(|store| store.candidate.clone()).collect();
    let mut leads: HashMap<StoreId, usize> = HashMap::new();
    for shard in &record.shards {
        *leads.entry(shard.primary).or_default() += 1;
    }
    let placed = place::place_beside(&leads, new, record.copies as usize, &candidates)?;
    let primaries = placed.iter().filter_map(|copies| copies.first().copied()).collect();
    let next = record.begin_resize(to, primaries)?;
    require_disk(record, &next, &placed, view, &candidates)?;
    Ok(next)
}

/// Whether what comes to each store fits on its disk.
fn require_disk(
    record: &KeyspaceRecord,
    next: &KeyspaceRecord,
    placed: &[Vec<StoreId>],
    view: &View<'_>,
    candidates: &[Candidate],
) -> Result<(), ResizeError> {
    let layout = Layout::of(next);
    let bytes = |source: ShardId| {
        let key = ShardKey { keyspace: record.id, shard: source };
        let shard = record.shards.get(usize::from(source.0))?;
        Some(view.primary(key, shard)?.status.bytes)
    };
    let mut coming: HashMap<StoreId, u64> = HashMap::new();
    for part in layout.moves() {
        let slots = layout.served(part.source).len().max(1) as u64;
        let share = bytes(part.source).unwrap_or_default() / slots * part.slots.len() as u64;
        let target = usize::from(part.target.0);
        let existing = record.shards.get(target).map(|shard| shard.copies().collect());
        let new = placed.get(target.saturating_sub(record.shards.len())).cloned();
        for store in existing.or(new).unwrap_or_default() {
            *coming.entry(store).or_default() += share;
        }
    }
    for candidate in candidates {
        let disk = &candidate.site.disk;
        let shares = |other: &&Candidate| other.id == candidate.id || !disk.is_empty() && other.site.disk == *disk;
        let on_disk = candidates.iter().filter(shares);
        let sum: u64 = on_disk.map(|other| coming.get(&other.id).copied().unwrap_or_default()).sum();
        let is_too_little =
            candidate.free_disk_bytes / DISK_RESERVE < sum || candidate.free_disk_bytes < DISK_LEAST_BYTES;
        if coming.contains_key(&candidate.id) && is_too_little {
            let (store, free) = (candidate.id, candidate.free_disk_bytes >> 20);
            return Err(ResizeError::TooLittleDisk { store, coming: sum >> 20, free });
        }
    }
    Ok(())
}

/// The next version of a record whose keyspace is being resized, if one is wished now; who leads and who holds is decided here as well.
/// `lacking` are the stores that are up, hold copies and do not have this version yet.
pub fn next(
    record: &KeyspaceRecord,
    progress: &Progress,
    lacking: &BTreeSet<StoreId>,
    view: &View<'_>,
) -> Option<KeyspaceRecord> {
    let operation = record.active_operation()?;
    let aborted = || give_up(record, progress, view).and_then(|reason| record.abort(&reason).ok());
    match operation.phase {
        Phase::Copy => aborted()
            .or_else(|| failover::next_tending(record, view, |shard| tending(record, progress, shard, view)))
            .or_else(|| may_fence(record, progress, view).ok().and_then(|()| record.fence().ok())),
        // Nobody serves the slots: nothing is done now but what ends that.
        Phase::Fence if may_commit(record, progress, view).is_ok() => record.commit().ok(),
        Phase::Fence => aborted()
            .or_else(|| is_overdue(progress, view).then(|| record.unfence().ok()).flatten())
            .or_else(|| failover::next_tending(record, view, |_| Tending::Not)),
        Phase::Committed => failover::next_tending(record, view, |shard| tending(record, progress, shard, view))
            .or_else(|| may_clean(record, lacking, view).ok().and_then(|()| record.clean().ok())),
        Phase::Clean => failover::next_tending(record, view, |shard| tending(record, progress, shard, view))
            .or_else(|| may_finish(record, progress, view).ok().and_then(|()| record.finish().ok())),
        Phase::Done | Phase::Aborted => None,
    }
}

/// What the next step waits for, in words.
pub fn waits_for(record: &KeyspaceRecord, progress: &Progress, lacking: &BTreeSet<StoreId>, view: &View<'_>) -> String {
    let Some(operation) = record.active_operation() else { return String::new() };
    let waits = match operation.phase {
        Phase::Copy => may_fence(record, progress, view),
        Phase::Fence => may_commit(record, progress, view),
        Phase::Committed => may_clean(record, lacking, view),
        Phase::Clean => may_finish(record, progress, view),
        Phase::Done | Phase::Aborted => Ok(()),
    };
    waits.err().map(|Wait(text)| text).unwrap_or_default()
}

fn operation_of(record: &KeyspaceRecord) -> u64 {
    record.operation.as_ref().map_or(0, |operation| operation.id)
}

/// A shard that gets slots is copied when it has them: what streams in would have to be sent on row by row. One that goes is not copied.
fn tending(record: &KeyspaceRecord, progress: &Progress, shard: ShardId, view: &View<'_>) -> Tending {
    let Some(operation) = record.active_operation() else { return Tending::AsWished };
    let OperationKind::Resize { from, to } = operation.kind else { return Tending::AsWished };
    let is_before = operation.may_be_aborted();
    let is_new = shard.0 >= from && is_before;
    let goes = shard.0 >= to && !is_before;
    if goes {
        Tending::Not
    } else if is_new && !has_copied(record, progress, shard, view) {
        Tending::NoMore
    } else {
        Tending::AsWished
    }
}

/// Whether a target has all rows, except for what changes.
fn has_copied(record: &KeyspaceRecord, progress: &Progress, target: ShardId, view: &View<'_>) -> bool {
    let mut sources = progress.moves.iter().filter(|(_, of)| *of == target).map(|(source, _)| *source);
    sources.all(|source| {
        let stage = move_status(record, source, target, view).map(|status| status.stage);
        matches!(stage, Some(MoveStage::Follows | MoveStage::Drained { .. }))
    })
}

/// Whether a shard has a primary that serves it.
fn is_served(key: ShardKey, shard: &ShardRecord, view: &View<'_>) -> Result<(), Wait> {
    let (number, primary) = (key.shard, shard.primary);
    if shard.is_vacant() {
        return wait(format!("shard {number} has no primary"));
    }
    if shard.previous != NOBODY {
        return wait(format!("shard {number} is getting another primary"));
    }
    if !view.is_up(primary) {
        return wait(format!("store {primary}, the primary of shard {number}, is down"));
    }
    if !view.primary(key, shard).is_some_and(|primary| primary.status.serves) {
        return wait(format!("store {primary} does not serve shard {number}"));
    }
    Ok(())
}

fn concerned<'a>(record: &'a KeyspaceRecord, progress: &Progress) -> impl Iterator<Item = (ShardKey, &'a ShardRecord)> {
    let concerned = progress.concerned();
    shards(record).filter(move |(key, _)| concerned.contains(&key.shard))
}

/// What the target's primary says of the slots of a source.
fn move_status<'a>(
    record: &KeyspaceRecord,
    source: ShardId,
    target: ShardId,
    view: &'a View<'_>,
) -> Option<&'a MoveStatus> {
    let key = ShardKey { keyspace: record.id, shard: target };
    let primary = view.primary(key, record.shards.get(usize::from(target.0))?)?;
    let operation = operation_of(record);
    primary.status.moves.iter().find(|part| part.source == source && part.operation == operation)
}

/// Whether a fence would stand for a moment only.
fn may_fence(record: &KeyspaceRecord, progress: &Progress, view: &View<'_>) -> Result<(), Wait> {
    for (key, shard) in concerned(record, progress) {
        is_served(key, shard, view)?;
    }
    for (source, target) in &progress.moves {
        let Some(status) = move_status(record, *source, *target, view) else {
            return wait(format!("shard {target} has yet to begin with shard {source}"));
        };
        let trouble = if status.trouble.is_empty() { String::new() } else { format!(": {}", status.trouble) };
        match status.stage {
            MoveStage::Waits => return wait(format!("shard {target} waits for shard {source}{trouble}")),
            MoveStage::Copies => {
                let percent = status.bytes_copied.min(status.bytes_expected) * 100 / status.bytes_expected.max(1);
                return wait(format!("shard {target} copies from shard {source}: {percent} %{trouble}"));
            }
            MoveStage::Follows | MoveStage::Drained { .. } if !progress.is_near(status, view.now) => {
                let (keys, ms) = (status.behind_keys, status.behind_ms);
                return wait(format!("shard {target} is {keys} keys and {ms} ms behind shard {source}{trouble}"));
            }
            MoveStage::Follows | MoveStage::Drained { .. } => {}
        }
    }
    for target in progress.targets() {
        let Some(shard) = record.shards.get(usize::from(target.0)) else { continue };
        has_copies(record, target, shard, view)?;
        if progress.caught_up(target, shard.primary) < CAUGHT_UP_REPORTS {
            return wait(format!("shard {target} has just caught up"));
        }
    }
    let pause = FENCE_PAUSE * progress.lifted;
    let waited = view.now.saturating_sub(progress.phase_since);
    if waited < pause {
        return wait(format!("the next try, in {} ms", (pause - waited).as_millis()));
    }
    Ok(())
}

/// Whether so many copies of a target follow as shall have what it takes over.
fn has_copies(record: &KeyspaceRecord, target: ShardId, shard: &ShardRecord, view: &View<'_>) -> Result<(), Wait> {
    let key = ShardKey { keyspace: record.id, shard: target };
    let wanted = (record.copies as usize).saturating_sub(1);
    let is_new = target.0 >= record.shard_count();
    if is_new && shard.replicas.len() < wanted {
        return wait(format!("shard {target} has {} of {} copies", shard.replicas.len() + 1, record.copies));
    }
    let mut up = shard.replicas.iter().filter(|store| view.is_up(**store));
    if let Some(store) = up.find(|store| !view.is_in_sync(key, shard, **store)) {
        return wait(format!("the copy of shard {target} on store {store} is not in sync"));
    }
    let in_sync = shard.replicas.iter().filter(|store| view.is_in_sync(key, shard, **store)).count();
    let needed = (record.settings.min_replicas() as usize).max(usize::from(!shard.replicas.is_empty()));
    if in_sync < needed {
        return wait(format!("{in_sync} replicas of shard {target} are in sync, and {needed} must be"));
    }
    Ok(())
}

/// Whether every target has everything that its sources had when the fence was set: see the head of this file.
fn may_commit(record: &KeyspaceRecord, progress: &Progress, view: &View<'_>) -> Result<(), Wait> {
    let Some(operation) = record.active_operation() else { return wait("an operation".to_owned()) };
    for target in progress.targets() {
        let key = ShardKey { keyspace: record.id, shard: target };
        let Some(shard) = record.shards.get(usize::from(target.0)) else {
            return wait(format!("shard {target} is not there"));
        };
        is_served(key, shard, view)?;
        if view.primary(key, shard).is_none_or(|primary| primary.record < operation.fence) {
            return wait(format!("store {} has yet to hear of the fence", shard.primary));
        }
    }
    for (source, target) in &progress.moves {
        let drained = MoveStage::Drained { fence: operation.fence };
        match move_status(record, *source, *target, view) {
            Some(status) if status.stage == drained => {}
            Some(MoveStatus { trouble, .. }) if !trouble.is_empty() => {
                return wait(format!("shard {target} has yet to get the last changes of shard {source}: {trouble}"));
            }
            Some(_) | None => {
                return wait(format!("shard {target} has yet to get the last changes of shard {source}"));
            }
        }
    }
    // Without moves there is nothing that could have been drained: such a resize does not exist.
    if progress.moves.is_empty() { wait("moves".to_owned()) } else { Ok(()) }
}

/// Sources delete rows only when everybody who may be asked for them knows who has them now; and not while a target lacks what was committed
/// to it, which must not be and would be lost then.
fn may_clean(record: &KeyspaceRecord, lacking: &BTreeSet<StoreId>, view: &View<'_>) -> Result<(), Wait> {
    if let Some(store) = lacking.first() {
        return wait(format!("store {store} has yet to hear of the new shards"));
    }
    let mut moves = crate::progress::moves_of(record, operation_of(record), view);
    match moves.find(|(_, _, part)| !part.trouble.is_empty()) {
        Some((target, store, part)) => wait(format!("shard {target} on store {store}: {}", part.trouble)),
        None => Ok(()),
    }
}

/// Whether no shard that stays has rows of slots that it does not own.
fn may_finish(record: &KeyspaceRecord, progress: &Progress, view: &View<'_>) -> Result<(), Wait> {
    for (key, shard) in shards(record).filter(|(key, _)| key.shard.0 < record.shard_count()) {
        let number = key.shard;
        match view.primary(key, shard).filter(|primary| primary.record >= progress.phase_epoch) {
            None => return wait(format!("the primary of shard {number}, which has yet to say that it is clean")),
            Some(primary) if primary.status.has_foreign_rows => {
                return wait(format!("shard {number} deletes rows that it does not own any more"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

fn is_overdue(progress: &Progress, view: &View<'_>) -> bool {
    view.now.saturating_sub(progress.phase_since) >= FENCE_MAX
}

/// Why the operation is to be aborted, if it is.
fn give_up(record: &KeyspaceRecord, progress: &Progress, view: &View<'_>) -> Option<String> {
    let operation = record.active_operation()?;
    for (target, store, part) in crate::progress::moves_of(record, operation.id, view) {
        if is_disk_full(&part.trouble) {
            return Some(format!("shard {target} on store {store} cannot take more: {}", part.trouble));
        }
    }
    for target in progress.targets() {
        let primary = record.shards.get(usize::from(target.0)).map_or(NOBODY, |shard| shard.primary);
        let free = view.stores.get(&primary).map(|store| store.candidate.free_disk_bytes);
        if free.is_some_and(|free| free < DISK_FULL_BYTES) {
            return Some(format!("the disk of store {primary}, where shard {target} gets slots, is full"));
        }
        if progress.unserved_for(target, view.now) >= TARGET_PATIENCE {
            let key = ShardKey { keyspace: record.id, shard: target };
            let shard = record.shards.get(usize::from(target.0))?;
            let why = is_served(key, shard, view).err().map(|Wait(text)| text).unwrap_or_default();
            let seconds = TARGET_PATIENCE.as_secs();
            return Some(format!("shard {target}, which gets slots, was not served for {seconds} s: {why}"));
        }
    }
    let is_last = operation.phase == Phase::Fence && progress.lifted + 1 >= FENCES_MAX;
    if is_last && is_overdue(progress, view) {
        let why = may_commit(record, progress, view).err().map(|Wait(text)| text).unwrap_or_default();
        let seconds = FENCE_MAX.as_secs();
        return Some(format!("{FENCES_MAX} times the slots were held for {seconds} s and could not go over: {why}"));
    }
    None
}

/// How a store says that its disk is full: in its own words or those of the system.
fn is_disk_full(trouble: &str) -> bool {
    let trouble = trouble.to_lowercase();
    ["disk full", "disk is full", "no space left"].iter().any(|words| trouble.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Site;
    use crate::progress::Progresses;
    use crate::standing::{Standing, Store};
    use std::collections::BTreeMap;
    use vasto_proto::id::{Epoch, KeyspaceId};
    use vasto_proto::topology::{Era, FollowerStatus, Position, Role, ShardStatus};

    /// A keyspace, its stores and what they say.
    struct Scene {
        record: KeyspaceRecord,
        standing: Standing,
        progress: Progresses,
        stores: BTreeMap<StoreId, Store>,
        now: Duration,
        bytes: u64,
        /// What targets say of each of their moves.
        stage: MoveStage,
        behind_ms: u64,
        trouble: String,
        has_foreign_rows: bool,
        in_sync: bool,
        silent: BTreeSet<StoreId>,
    }

    impl Scene {
        fn new(primaries: &[u32], stores: u32) -> Self {
            let primaries: Vec<StoreId> = primaries.iter().map(|store| StoreId(*store)).collect();
            let store = |id: u32| {
                let candidate = Candidate { id: StoreId(id), free_disk_bytes: 1 << 40, ..Candidate::default() };
                (StoreId(id), Store { candidate, up: true, since: Duration::ZERO, older: false })
            };
            let mut scene = Self {
                record: KeyspaceRecord::new(KeyspaceId(7), "a", &primaries).unwrap(),
                standing: Standing::default(),
                progress: Progresses::default(),
                stores: (1..=stores).map(store).collect(),
                now: Duration::ZERO,
                bytes: 1 << 30,
                stage: MoveStage::Waits,
                behind_ms: 0,
                trouble: String::new(),
                has_foreign_rows: false,
                in_sync: true,
                silent: BTreeSet::new(),
            };
            scene.pass(1);
            scene
        }

        fn view(&self) -> View<'_> {
            View {
                now: self.now,
                began: Duration::ZERO,
                replace_after: Duration::from_secs(300),
                stores: self.stores.clone(),
                standing: &self.standing,
            }
        }

        fn note(&mut self) {
            self.standing.note(&self.record, self.now);
            let mut progress = std::mem::take(&mut self.progress);
            progress.note(&self.record, &self.view());
            self.progress = progress;
        }

        /// All who are up and not silent report that they follow the newest version, each second.
        fn pass(&mut self, seconds: u64) {
            for second in 0..=seconds {
                self.now += Duration::from_secs(u64::from(second > 0));
                self.note();
                let speaking = self.stores.values().filter(|store| store.up).map(|store| store.candidate.id);
                for store in speaking.filter(|store| !self.silent.contains(store)).collect::<Vec<_>>() {
                    self.say(store);
                }
            }
        }

        fn say(&mut self, store: StoreId) {
            let operation = operation_of(&self.record);
            let layout = Layout::of(&self.record);
            let statuses = self.record.copies_of(store).map(|(number, shard)| {
                let is_primary = shard.primary == store;
                let follower = |other: &StoreId| FollowerStatus {
                    store: *other,
                    connected: true,
                    in_sync: self.in_sync,
                    applied: 100,
                };
                let others = shard.replicas.iter().chain(&shard.learners).filter(|_| is_primary);
                let moves = layout.moves().into_iter().filter(|part| part.target == number && is_primary);
                ShardStatus {
                    key: ShardKey { keyspace: self.record.id, shard: number },
                    epoch: shard.epoch,
                    role: if is_primary { Role::Primary } else { Role::Replica },
                    position: Some(Position { era: Era { epoch: shard.epoch, opened: 1 }, sequence: 100 }),
                    serves: is_primary,
                    followers: others.map(follower).collect(),
                    bytes: self.bytes,
                    has_foreign_rows: self.has_foreign_rows,
                    moves: moves
                        .map(|part| MoveStatus {
                            source: part.source,
                            operation,
                            stage: self.stage,
                            slots: part.slots.len() as u32,
                            bytes_copied: 41,
                            bytes_expected: 100,
                            behind_ms: self.behind_ms,
                            trouble: self.trouble.clone(),
                            ..MoveStatus::default()
                        })
                        .collect(),
                }
            });
            let statuses: Vec<ShardStatus> = statuses.collect();
            let held = BTreeMap::from([(self.record.id, self.record.epoch)]);
            self.progress.hear(store, &statuses, self.now);
            self.standing.hear(store, statuses, &held, self.now);
        }

        fn begin(&mut self, to: u32) -> &mut Self {
            self.record = begin(&self.record, to, &self.view()).unwrap();
            self.record.validate().unwrap();
            self.pass(0);
            self
        }

        fn wish(&self) -> Option<KeyspaceRecord> {
            next(&self.record, self.progress.of(&self.record)?, &BTreeSet::new(), &self.view())
        }

        fn waits(&self) -> String {
            waits_for(&self.record, self.progress.of(&self.record).unwrap(), &BTreeSet::new(), &self.view())
        }

        /// Takes the wish in, and all follow it.
        fn step(&mut self) -> Phase {
            self.record = self.wish().unwrap_or_else(|| panic!("nothing is wished: {}", self.waits()));
            self.record.validate().unwrap();
            self.pass(0);
            self.phase()
        }

        fn phase(&self) -> Phase {
            self.record.operation.as_ref().unwrap().phase
        }

        fn fenced(&mut self) -> &mut Self {
            self.stage = MoveStage::Follows;
            self.pass(1);
            assert_eq!(self.step(), Phase::Fence);
            self
        }

        fn drain(&mut self) {
            self.stage = MoveStage::Drained { fence: self.record.operation.as_ref().unwrap().fence };
            self.pass(0);
        }

        fn refusal(&self, to: u32) -> String {
            begin(&self.record, to, &self.view()).unwrap_err().to_string()
        }

        fn reason(&self) -> &str {
            &self.record.operation.as_ref().unwrap().reason
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        let mut scene = Scene::new(&[1, 2], 2);
        assert_eq!(scene.refusal(0), "a keyspace needs 1 to 1024 shards, not 0; nothing was changed");
        assert_eq!(scene.refusal(1025), "a keyspace needs 1 to 1024 shards, not 1025; nothing was changed");
        assert_eq!(scene.refusal(65537), "a keyspace needs 1 to 1024 shards, not 65537; nothing was changed");
        assert_eq!(scene.refusal(2), "the keyspace has 2 shards already; nothing was changed");
        scene.record.copies = 3;
        assert_eq!(scene.refusal(3), "3 copies of a shard need 3 stores, and 2 are up; nothing was changed");
        scene.record.copies = 1;
        scene.bytes = 3 << 40;
        scene.pass(0);
        let text = scene.refusal(3);
        let end = " MB would come to store 00000001, whose disk has 1048576 MB free, and twice as much as comes, and 32 MB, are needed; nothing was changed";
        assert!(text.starts_with("about 2") && text.ends_with(end), "{text}");
    }

    #[test]
    fn a_shard_that_is_not_served_is_waited_for() {
        let mut scene = Scene::new(&[1, 2], 3);
        scene.stores.get_mut(&StoreId(2)).unwrap().up = false;
        assert_eq!(scene.refusal(3), "store 00000002, the primary of shard 1, is down; nothing was changed");
        let mut scene = Scene::new(&[1, 2], 3);
        scene.standing.change(|store, heard| heard.status.serves &= store != StoreId(2));
        assert_eq!(scene.refusal(3), "store 00000002 does not serve shard 1; nothing was changed");
        let mut scene = Scene::new(&[1, 2], 3);
        let shard = &mut scene.record.shards[0];
        (shard.primary, shard.replicas) = (NOBODY, vec![StoreId(1)]);
        assert_eq!(scene.refusal(3), "shard 0 has no primary; nothing was changed");
        let shard = &mut scene.record.shards[0];
        (shard.primary, shard.replicas, shard.previous) = (StoreId(1), vec![StoreId(3)], StoreId(3));
        assert_eq!(scene.refusal(3), "shard 0 is getting another primary; nothing was changed");
    }

    #[test]
    fn new_shards_go_to_stores_that_lead_few_and_have_room() {
        let mut scene = Scene::new(&[1, 2, 1], 3);
        scene.stores.get_mut(&StoreId(3)).unwrap().candidate.free_disk_bytes = 1300 << 20;
        let grown = begin(&scene.record, 5, &scene.view()).unwrap();
        let primaries: Vec<u32> = grown.shards.iter().map(|shard| shard.primary.0).collect();
        assert_eq!(primaries, [1, 2, 1, 3, 2]);
        // A fifth of 3 GB comes to each of the new ones.
        scene.bytes = 2 << 30;
        scene.pass(0);
        let text = scene.refusal(5);
        assert!(
            text.starts_with("about 12")
                && text.contains(" MB would come to store 00000003, whose disk has 1300 MB free"),
            "{text}"
        );
        // Two stores on one disk have its free bytes once.
        scene.bytes = 1 << 30;
        scene.pass(0);
        for store in scene.stores.values_mut() {
            store.candidate.free_disk_bytes = 2 << 30;
            store.candidate.site = Site { disk: "one".to_owned(), ..Site::default() };
        }
        assert!(begin(&scene.record, 5, &scene.view()).unwrap_err().to_string().contains("about 12"));
    }

    #[test]
    fn growing_and_shrinking_take_their_steps_in_order() {
        for (from, to) in [(vec![1, 2], 3), (vec![1, 2, 1], 1), (vec![1], 4), (vec![3, 3, 2, 1], 2)] {
            let mut scene = Scene::new(&from, 3);
            scene.begin(to);
            assert_eq!(scene.wish(), None);
            assert!(scene.waits().contains(" waits for shard "), "{}", scene.waits());
            scene.stage = MoveStage::Copies;
            scene.pass(3);
            assert_eq!(scene.wish(), None);
            assert!(scene.waits().contains(" copies from shard ") && scene.waits().ends_with(": 41 %"));
            scene.stage = MoveStage::Follows;
            scene.behind_ms = 51;
            scene.pass(3);
            assert_eq!(scene.wish(), None);
            assert!(scene.waits().contains(" is 0 keys and 51 ms behind shard "), "{}", scene.waits());
            scene.behind_ms = 50;
            scene.pass(0);
            assert_eq!((scene.wish(), scene.waits().contains("just caught up")), (None, true), "once is not enough");
            scene.pass(0);
            assert_eq!(scene.step(), Phase::Fence);
            assert_eq!(scene.wish(), None);
            // Of a fence of before.
            scene.stage = MoveStage::Drained { fence: Epoch(scene.record.epoch.0 - 1) };
            scene.pass(1);
            assert_eq!(scene.wish(), None);
            assert!(scene.waits().contains("has yet to get the last changes"), "{}", scene.waits());
            scene.drain();
            scene.has_foreign_rows = true;
            assert_eq!(scene.step(), Phase::Committed);
            assert_eq!(u32::from(scene.record.shard_count()), to);
            let lacking = BTreeSet::from([StoreId(2)]);
            let progress = scene.progress.of(&scene.record).unwrap();
            assert_eq!(next(&scene.record, progress, &lacking, &scene.view()), None);
            assert_eq!(scene.step(), Phase::Clean);
            assert_eq!(scene.wish(), None);
            assert!(scene.waits().ends_with("deletes rows that it does not own any more"), "{}", scene.waits());
            scene.has_foreign_rows = false;
            scene.pass(0);
            assert_eq!(scene.step(), Phase::Done);
            assert_eq!((scene.wish(), scene.record.shards.len()), (None, to as usize));
        }
    }

    /// One thing after the other is not as it must be, and each alone keeps the slots where they are.
    #[test]
    fn nothing_is_handed_over_before_all_has_arrived() {
        let scene = || {
            let mut scene = Scene::new(&[1, 2], 3);
            scene.begin(3).fenced().drain();
            assert_eq!(scene.wish().unwrap().operation.unwrap().phase, Phase::Committed);
            scene
        };
        let keeps = |scene: &Scene| {
            let wish = scene.wish().and_then(|next| next.operation);
            assert_ne!(wish.map(|operation| operation.phase), Some(Phase::Committed), "{}", scene.waits());
        };
        let mut one = scene();
        one.standing.change(|_, heard| heard.status.moves.truncate(1));
        keeps(&one);
        let mut one = scene();
        one.standing
            .change(|_, heard| heard.status.moves.iter_mut().take(1).for_each(|part| part.stage = MoveStage::Follows));
        keeps(&one);
        let mut one = scene();
        one.standing.change(|_, heard| heard.status.moves.iter_mut().for_each(|part| part.operation -= 1));
        keeps(&one);
        let mut one = scene();
        one.standing.change(|_, heard| heard.status.epoch = Epoch(heard.status.epoch.0 - 1));
        keeps(&one);
        let mut one = scene();
        one.standing.change(|_, heard| heard.status.role = Role::Replica);
        keeps(&one);
        let mut one = scene();
        one.standing.change(|_, heard| heard.status.serves = false);
        keeps(&one);
        let mut one = scene();
        one.standing.change(|_, heard| heard.record = Epoch(heard.record.0 - 1));
        keeps(&one);
        let mut one = scene();
        one.stores.get_mut(&StoreId(3)).unwrap().up = false;
        keeps(&one);
        // A source that is gone has sent everything.
        let mut one = scene();
        one.stores.get_mut(&StoreId(1)).unwrap().up = false;
        assert_eq!(one.step(), Phase::Committed);
        // Somebody has lifted the fence and set it again.
        let mut one = scene();
        one.record = one.record.unfence().unwrap().fence().unwrap();
        one.note();
        keeps(&one);
    }

    #[test]
    fn a_fence_that_takes_long_is_lifted_and_at_last_the_operation_ends() {
        let mut scene = Scene::new(&[1, 2], 3);
        scene.begin(3).fenced();
        for lifted in 1..FENCES_MAX {
            scene.pass(1);
            assert_eq!(scene.wish(), None);
            scene.pass(1);
            assert_eq!(scene.step(), Phase::Copy);
            // The targets still say that they were drained up to the one before, or not.
            scene.pass(0);
            for _ in 0..lifted {
                assert_eq!(scene.wish(), None);
                assert!(scene.waits().starts_with("the next try, in "), "{}", scene.waits());
                scene.pass(1);
            }
            assert_eq!(scene.step(), Phase::Fence);
        }
        scene.pass(2);
        assert_eq!(scene.step(), Phase::Aborted);
        assert_eq!(
            scene.reason(),
            "5 times the slots were held for 2 s and could not go over: shard 2 has yet to get the last changes of shard 0"
        );
        // A master that begins anew has forgotten how often; it lifts the fence all the same.
        let mut scene = Scene::new(&[1, 2], 3);
        scene.begin(3).fenced().pass(2);
        scene.progress = Progresses::default();
        scene.pass(1);
        assert_eq!(scene.wish(), None);
        scene.pass(1);
        assert_eq!(scene.step(), Phase::Copy);
    }

    #[test]
    fn a_target_that_is_lost_or_full_ends_the_operation() {
        let mut scene = Scene::new(&[1, 2], 3);
        scene.begin(3).pass(1);
        let target = scene.record.shards[2].primary;
        let store = scene.stores.get_mut(&target).unwrap();
        (store.up, store.since) = (false, scene.now);
        scene.pass(29);
        assert_eq!(scene.wish(), None);
        // It is back for a moment.
        scene.stores.get_mut(&target).unwrap().up = true;
        scene.pass(1);
        scene.stores.get_mut(&target).unwrap().up = false;
        scene.pass(29);
        assert_eq!((scene.wish(), scene.waits().as_str()), (None, "store 00000003, the primary of shard 2, is down"));
        scene.pass(1);
        assert_eq!((scene.step(), scene.record.shards.len()), (Phase::Aborted, 2));
        assert_eq!(
            scene.reason(),
            "shard 2, which gets slots, was not served for 30 s: store 00000003, the primary of shard 2, is down"
        );
        let mut scene = Scene::new(&[1, 2], 3);
        scene.begin(3);
        scene.trouble = "IO error: No space left on device".to_owned();
        scene.pass(0);
        assert_eq!(scene.step(), Phase::Aborted);
        assert_eq!(scene.reason(), "shard 2 on store 00000003 cannot take more: IO error: No space left on device");
        assert!(begin(&scene.record, 3, &scene.view()).is_ok(), "and again");
    }

    #[test]
    fn new_shards_are_copied_when_they_have_their_rows_and_fenced_when_copied() {
        let mut scene = Scene::new(&[1, 1], 3);
        scene.record.copies = 2;
        for shard in &mut scene.record.shards {
            shard.replicas = vec![StoreId(2)];
        }
        scene.pass(1);
        scene.begin(3);
        scene.in_sync = false;
        scene.stage = MoveStage::Copies;
        scene.pass(5);
        assert_eq!(scene.wish(), None, "no learner yet");
        scene.stage = MoveStage::Follows;
        scene.pass(1);
        assert!(scene.waits().ends_with("has 1 of 2 copies"), "{}", scene.waits());
        assert_eq!(scene.step(), Phase::Copy);
        assert_eq!(scene.record.shards[2].learners.len(), 1);
        scene.pass(5);
        assert_eq!(scene.wish(), None, "the learner is on its way");
        scene.in_sync = true;
        scene.pass(1);
        assert_eq!(scene.step(), Phase::Copy);
        assert_eq!((scene.record.shards[2].replicas.len(), scene.record.shards[2].learners.len()), (1, 0));
        scene.in_sync = false;
        scene.pass(1);
        assert!(scene.wish().is_none() && scene.waits().ends_with("is not in sync"), "{}", scene.waits());
        scene.in_sync = true;
        scene.pass(1);
        assert_eq!(scene.step(), Phase::Fence);
    }

    #[test]
    fn shards_fail_over_while_the_keyspace_is_resized() {
        let mut scene = Scene::new(&[1, 2], 3);
        scene.record.copies = 2;
        scene.record.shards[0].replicas = vec![StoreId(2)];
        scene.record.shards[1].replicas = vec![StoreId(3)];
        scene.pass(1);
        scene.begin(1);
        scene.fenced();
        let fence = scene.record.operation.clone();
        // The target fails, with all that it has said.
        scene.drain();
        let store = scene.stores.get_mut(&StoreId(1)).unwrap();
        (store.up, store.since) = (false, scene.now);
        scene.now += Duration::from_secs(1);
        let vacant = scene.wish().unwrap();
        assert!(vacant.shards[0].is_vacant() && vacant.operation == fence, "the fence stays as it is");
        scene.record = vacant;
        scene.stage = MoveStage::Waits;
        scene.pass(0);
        scene.record = scene.wish().unwrap();
        assert_eq!((scene.record.shards[0].primary, &scene.record.operation), (StoreId(2), &fence));
        scene.pass(0);
        assert_eq!(scene.wish(), None, "what the one before has said does not count");
        scene.drain();
        assert_eq!(scene.step(), Phase::Committed);
    }

    #[test]
    fn who_is_never_near_is_fenced_at_last() {
        let mut scene = Scene::new(&[1, 2], 3);
        scene.begin(3);
        (scene.stage, scene.behind_ms) = (MoveStage::Follows, 700);
        scene.pass(119);
        assert_eq!(scene.wish(), None);
        scene.pass(2);
        assert_eq!(scene.step(), Phase::Fence);
    }
}
