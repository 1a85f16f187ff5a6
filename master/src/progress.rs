//! How the operations of keyspaces come along, and since when. Soft: a master that restarts begins to count anew, and decides the same a
//! little later.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use vasto_proto::id::{Epoch, KeyspaceId, ShardId, StoreId};
use vasto_proto::pb;
use vasto_proto::topology::{
    KeyspaceRecord, Layout, MoveStage, MoveStatus, Operation, OperationKind, Phase, ShardStatus,
};

use crate::standing::{View, shards};

/// What changes at a source must arrive so soon before the fence is set …
const BEHIND_MAX: Duration = Duration::from_millis(50);
/// … and no more keys than this may be on their way: they are sent in some 10 ms.
const BEHIND_KEYS_MAX: u64 = 4096;
/// A machine that is busy may never come so near: after each such time twice as much is let pass, …
const RELAX_AFTER: Duration = Duration::from_secs(30);
/// … up to 16 times as much: 800 ms, of the time that a fence may take less than half.
const RELAXED_MAX: u32 = 4;

/// The rate is that of the last seconds.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// Samples of the rate: one for each heartbeat of a window would be 10; more than that come when stores report each step.
const SAMPLES_MAX: usize = 64;
const SAMPLE_STEP: Duration = Duration::from_millis(250);

/// What the master has seen of one keyspace's operation.
#[derive(Clone, Debug)]
pub struct Progress {
    pub operation: u64,
    /// Source and target of each move, by target.
    pub moves: Vec<(ShardId, ShardId)>,
    began: Duration,
    phase: Phase,
    /// The first version of the record that this master has seen in this phase, and when.
    pub phase_epoch: Epoch,
    pub phase_since: Duration,
    fence: Epoch,
    /// How often a fence was lifted.
    pub lifted: u32,
    /// What the fence waited for when it was to be lifted.
    pub lift_reason: String,
    /// Reports one after the other that say of a target that all its moves have caught up.
    caught_up: BTreeMap<ShardId, (StoreId, u32)>,
    /// Since when each target is not served.
    unserved: BTreeMap<ShardId, Duration>,
    samples: VecDeque<(Duration, u64)>,
    /// What was said of each move last, by target and source: it is shown when the operation has ended, too.
    said: BTreeMap<(ShardId, ShardId), (StoreId, MoveStatus)>,
}

/// A step that was taken: for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub keyspace: String,
    pub operation: Operation,
    /// The phase before and how long it lasted; `None`: this master sees the operation for the first time.
    pub before: Option<(Phase, Duration)>,
    pub elapsed: Duration,
    /// Of a fence that was lifted: what it waited for.
    pub waited_for: String,
}

/// That of all keyspaces.
#[derive(Debug, Default)]
pub struct Progresses {
    of: BTreeMap<KeyspaceId, Progress>,
    steps: Vec<Step>,
}

impl Progresses {
    pub fn of(&self, record: &KeyspaceRecord) -> Option<&Progress> {
        let operation = record.operation.as_ref()?;
        self.of.get(&record.id).filter(|progress| progress.operation == operation.id)
    }

    /// Notes why a fence is about to be lifted.
    pub fn note_lift(&mut self, keyspace: KeyspaceId, reason: String) {
        if let Some(progress) = self.of.get_mut(&keyspace) {
            progress.lift_reason = reason;
        }
    }

    /// Takes in the newest version of a record that is chosen.
    pub fn note(&mut self, record: &KeyspaceRecord, view: &View<'_>) {
        let Some(operation) = &record.operation else { return };
        let known = self.of.get_mut(&record.id).filter(|progress| progress.operation == operation.id);
        let Some(progress) = known else {
            // How one ended that this master has not seen is not news.
            if operation.is_active() {
                if operation.id == record.epoch.0 {
                    fail::fail_point!("resize::master_began");
                }
                self.of.insert(record.id, Progress::new(record, operation, view.now));
                self.steps.push(Step {
                    keyspace: record.name.clone(),
                    operation: operation.clone(),
                    before: None,
                    elapsed: Duration::ZERO,
                    waited_for: String::new(),
                });
            }
            return;
        };
        if (progress.phase, progress.fence) != (operation.phase, operation.fence) {
            let took = view.now.saturating_sub(progress.phase_since);
            let before = (progress.phase, took);
            match operation.phase {
                Phase::Fence => fail::fail_point!("resize::master_fenced"),
                Phase::Committed => fail::fail_point!("resize::master_committed"),
                Phase::Copy | Phase::Clean | Phase::Done | Phase::Aborted => {}
            }
            progress.note_said(record, view);
            let is_lifted = before.0 == Phase::Fence && operation.phase == Phase::Copy;
            progress.lifted += u32::from(is_lifted);
            progress.phase = operation.phase;
            progress.fence = operation.fence;
            (progress.phase_epoch, progress.phase_since) = (record.epoch, view.now);
            progress.caught_up.clear();
            self.steps.push(Step {
                keyspace: record.name.clone(),
                operation: operation.clone(),
                before: Some(before),
                elapsed: view.now.saturating_sub(progress.began),
                waited_for: std::mem::take(&mut progress.lift_reason),
            });
        }
        progress.note_unserved(record, view);
    }

    /// Takes in what a store says of its copies.
    pub fn hear(&mut self, store: StoreId, statuses: &[ShardStatus], now: Duration) {
        for status in statuses.iter().filter(|status| !status.moves.is_empty()) {
            if let Some(progress) = self.of.get_mut(&status.key.keyspace) {
                progress.hear(store, status, now);
            }
        }
    }

    /// Samples how much has been copied, for the rate.
    pub fn sample(&mut self, record: &KeyspaceRecord, view: &View<'_>) {
        let Some(progress) = self.of.get_mut(&record.id) else { return };
        let is_due = progress.samples.back().is_none_or(|(at, _)| view.now >= *at + SAMPLE_STEP);
        if is_due && progress.phase == Phase::Copy {
            progress.note_said(record, view);
            let copied = progress.said.values().map(|(_, status)| status.bytes_copied).sum();
            progress.samples.push_back((view.now, copied));
            let oldest = view.now.saturating_sub(RATE_WINDOW);
            while progress.samples.len() > SAMPLES_MAX || progress.samples.front().is_some_and(|(at, _)| *at < oldest) {
                progress.samples.pop_front();
            }
        }
    }

    /// Whether there is something to be noted of a record's operation.
    pub fn concerns(&self, record: &KeyspaceRecord) -> bool {
        record.active_operation().is_some() || self.of(record).is_some_and(Progress::goes_on)
    }

    /// Forgets keyspaces that are no more.
    pub fn keep(&mut self, lives: impl Fn(KeyspaceId) -> bool) {
        self.of.retain(|keyspace, _| lives(*keyspace));
    }

    /// The steps since the last time.
    pub fn take_steps(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    /// How many operations go on.
    pub fn running(&self) -> usize {
        self.of.values().filter(|progress| progress.goes_on()).count()
    }
}

impl Progress {
    fn new(record: &KeyspaceRecord, operation: &Operation, now: Duration) -> Self {
        let mut moves: Vec<(ShardId, ShardId)> =
            Layout::of(record).moves().into_iter().map(|part| (part.source, part.target)).collect();
        moves.sort_by_key(|(source, target)| (*target, *source));
        Self {
            operation: operation.id,
            moves,
            began: now,
            phase: operation.phase,
            phase_epoch: record.epoch,
            phase_since: now,
            fence: operation.fence,
            lifted: 0,
            lift_reason: String::new(),
            caught_up: BTreeMap::new(),
            unserved: BTreeMap::new(),
            samples: VecDeque::new(),
            said: BTreeMap::new(),
        }
    }

    fn goes_on(&self) -> bool {
        !matches!(self.phase, Phase::Done | Phase::Aborted)
    }

    /// Keeps what is said of the moves.
    fn note_said(&mut self, record: &KeyspaceRecord, view: &View<'_>) {
        for (target, store, status) in moves_of(record, self.operation, view) {
            self.said.insert((target, status.source), (store, status.clone()));
        }
    }

    /// The shards that get slots.
    pub fn targets(&self) -> Vec<ShardId> {
        let mut targets: Vec<ShardId> = self.moves.iter().map(|(_, target)| *target).collect();
        targets.dedup();
        targets
    }

    /// The shards that get or give slots.
    pub fn concerned(&self) -> Vec<ShardId> {
        let mut concerned: Vec<ShardId> = self.moves.iter().flat_map(|(source, target)| [*source, *target]).collect();
        concerned.sort();
        concerned.dedup();
        concerned
    }

    /// How many reports one after the other have said that a target has caught up.
    pub fn caught_up(&self, target: ShardId, store: StoreId) -> u32 {
        self.caught_up.get(&target).filter(|(of, _)| *of == store).map_or(0, |(_, count)| *count)
    }

    /// For how long a target has not been served.
    pub fn unserved_for(&self, target: ShardId, now: Duration) -> Duration {
        self.unserved.get(&target).map_or(Duration::ZERO, |since| now.saturating_sub(*since))
    }

    /// Whether so little is on its way that a fence would be short.
    pub fn is_near(&self, status: &MoveStatus, now: Duration) -> bool {
        let waited = now.saturating_sub(self.phase_since).as_secs() / RELAX_AFTER.as_secs();
        let relaxed = 1 << waited.min(RELAXED_MAX.into());
        status.behind_keys <= BEHIND_KEYS_MAX * relaxed
            && u128::from(status.behind_ms) <= BEHIND_MAX.as_millis() * u128::from(relaxed)
    }

    fn hear(&mut self, store: StoreId, status: &ShardStatus, now: Duration) {
        let target = status.key.shard;
        let has_caught_up = |source: ShardId| {
            let all = status.moves.iter().filter(|part| part.operation == self.operation);
            all.filter(|part| part.source == source).any(|part| match part.stage {
                // It was drained up to a fence that has been lifted: it follows.
                MoveStage::Follows | MoveStage::Drained { .. } => self.is_near(part, now),
                MoveStage::Waits | MoveStage::Copies => false,
            })
        };
        let mut sources = self.moves.iter().filter(|(_, of)| *of == target).map(|(source, _)| *source);
        let have_all = sources.all(has_caught_up);
        let before = self.caught_up.get(&target).filter(|(of, _)| *of == store).map_or(0, |(_, count)| *count);
        self.caught_up.insert(target, (store, if have_all { before.saturating_add(1) } else { 0 }));
    }

    fn note_unserved(&mut self, record: &KeyspaceRecord, view: &View<'_>) {
        let targets = self.targets();
        for (key, shard) in shards(record).filter(|(key, _)| targets.contains(&key.shard)) {
            if view.primary(key, shard).is_some_and(|primary| primary.status.serves) {
                self.unserved.remove(&key.shard);
            } else {
                self.unserved.entry(key.shard).or_insert(view.now);
            }
        }
    }

    /// Bytes a second; 0 = not known.
    fn rate(&self) -> u64 {
        let (Some((first, before)), Some((last, after))) = (self.samples.front(), self.samples.back()) else {
            return 0;
        };
        let ms = last.saturating_sub(*first).as_millis();
        let bytes = u128::from(after.saturating_sub(*before));
        (bytes * 1000).checked_div(ms).map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

/// What the primaries of the record say of the moves of an operation.
pub fn moves_of<'a>(
    record: &'a KeyspaceRecord,
    operation: u64,
    view: &'a View<'_>,
) -> impl Iterator<Item = (ShardId, StoreId, &'a MoveStatus)> {
    shards(record).flat_map(move |(key, shard)| {
        let moves = view.primary(key, shard).map_or(&[][..], |primary| &primary.status.moves);
        let of_it = moves.iter().filter(move |part| part.operation == operation);
        of_it.map(move |part| (key.shard, shard.primary, part))
    })
}

/// How far the operation of a keyspace has come.
pub fn describe(
    record: &KeyspaceRecord,
    progress: Option<&Progress>,
    waits_for: String,
    view: &View<'_>,
) -> pb::OperationStatus {
    let mut status = pb::OperationStatus { record: Some(record.into()), waits_for, ..pb::OperationStatus::default() };
    let Some((operation, progress)) = record.operation.as_ref().zip(progress) else { return status };
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let now = if operation.is_active() { view.now } else { progress.phase_since };
    status.elapsed_ms = ms(now.saturating_sub(progress.began));
    status.phase_ms = ms(now.saturating_sub(progress.phase_since));
    let mut said = progress.said.clone();
    for (target, store, part) in moves_of(record, operation.id, view) {
        said.insert((target, part.source), (store, part.clone()));
    }
    for ((target, _), (store, part)) in &said {
        status.slots += part.slots;
        status.slots_copied += part.slots_copied;
        status.rows_copied += part.rows_copied;
        status.bytes_copied += part.bytes_copied;
        status.bytes_expected += part.bytes_expected.max(part.bytes_copied);
        status.behind_keys = status.behind_keys.max(part.behind_keys);
        status.behind_ms = status.behind_ms.max(part.behind_ms);
        let (target, store_id) = (target.0.into(), store.0);
        status.moves.push(pb::MoveOfShard { target, store_id, status: Some(part.into()) });
    }
    if operation.phase == Phase::Copy && matches!(operation.kind, OperationKind::Resize { .. }) {
        status.bytes_per_second = progress.rate();
        let left = u128::from(status.bytes_expected.saturating_sub(status.bytes_copied)) * 1000;
        let remaining = left.checked_div(status.bytes_per_second.into()).unwrap_or_default();
        status.remaining_ms = u64::try_from(remaining).unwrap_or(u64::MAX);
    }
    status
}
