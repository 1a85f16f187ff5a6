//! The line of chosen versions of the record: each is made from another by the record's own steps, and is asked by the real layout who has
//! which of the modelled slots.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};

use crate::id::{Epoch, KeyspaceId, ShardId, StoreId};
use crate::slot::{SLOT_COUNT, SlotTable};
use crate::topology::{KeyspaceRecord, Layout, Operation, Phase};

pub const SHARDS: usize = 3;
/// A shard has a primary and at most one replica.
pub const COPIES: usize = 2;
pub const SLOTS: usize = 2;

/// What a master, or a source that hears of none, changes. Failover and joining are changes of [`super::super::failover_model`], here in one
/// version each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    Begin {
        to: u8,
    },
    Fence,
    Unfence,
    Commit,
    Clean,
    Finish,
    Abort,
    /// The replica becomes the primary, and the primary a replica.
    Failover {
        shard: u8,
    },
    /// A shard that grew out of nothing gets its replica.
    Join {
        shard: u8,
    },
}

/// One version, and all before it.
pub struct Version {
    /// How it came to be: which version each was made from, and by what.
    path: Vec<(u8, Step)>,
    pub record: KeyspaceRecord,
    /// By shard: bits of the slots that it may serve.
    served: [u8; SHARDS],
    /// By shard: what it could serve if no fence stood.
    assigned: [u8; SHARDS],
    /// Of each slot that moves: from which shard to which.
    moves: [Option<(u8, u8)>; SLOTS],
    slots: Vec<u16>,
    before: Vec<Line>,
    /// Layouts of 16384 slots are not made again for each state.
    next: Mutex<BTreeMap<(u8, Step), Option<Line>>>,
}

#[derive(Clone)]
pub struct Line(Arc<Version>);

impl fmt::Debug for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.0.path.iter().map(|(_, step)| step)).finish()
    }
}

impl PartialEq for Line {
    fn eq(&self, other: &Self) -> bool {
        self.0.path == other.0.path
    }
}

impl Eq for Line {}

impl Hash for Line {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.path.hash(state);
    }
}

/// Where a copy is: copy 0 of a shard is on another store than copy 1, and each store has one copy.
fn store(shard: u8, copy: u8) -> StoreId {
    StoreId(u32::from(shard) * COPIES as u32 + u32::from(copy) + 1)
}

impl Line {
    /// The first version: so many shards, those of `replicas` with a replica. Slot i goes as `moves[i]` says when there are `to` shards.
    pub fn new(from: u8, to: u8, moves: &[(u8, u8)], replicas: u8) -> Self {
        let (before, after) = (SlotTable::new(from.into()), SlotTable::new(to.into()));
        let goes = |slot: &u16, (source, target): (u8, u8)| {
            before.shard(*slot) == ShardId(source.into()) && after.shard(*slot) == ShardId(target.into())
        };
        let slots = moves.iter().map(|way| (0..SLOT_COUNT).find(|slot| goes(slot, *way)).expect("some slot goes so"));
        let primaries: Vec<StoreId> = (0..from).map(|shard| store(shard, 0)).collect();
        let mut record = KeyspaceRecord::new(KeyspaceId(4), "model", &primaries).expect("a keyspace");
        for shard in (0..from).filter(|shard| replicas >> shard & 1 == 1) {
            record.shards[usize::from(shard)].replicas.push(store(shard, 1));
        }
        Self::of(Vec::new(), record, slots.collect(), Vec::new())
    }

    fn of(path: Vec<(u8, Step)>, record: KeyspaceRecord, slots: Vec<u16>, before: Vec<Self>) -> Self {
        record.validate().expect("a record that can be");
        let layout = Layout::of(&record);
        let table = SlotTable::new(record.shard_count());
        let (mut served, mut assigned) = ([0; SHARDS], [0; SHARDS]);
        let mut moves = [None; SLOTS];
        for shard in 0..record.shards.len() {
            let id = ShardId(shard as u16);
            let (serves, coming) = (layout.served(id), layout.coming(id));
            for (number, slot) in slots.iter().enumerate() {
                served[shard] |= u8::from(serves.contains(*slot)) << number;
                assigned[shard] |= u8::from(table.shard(*slot) == id) << number;
                if coming.contains(*slot) {
                    let is_source = |source: &u16| layout.leaving(ShardId(*source)).contains(*slot);
                    let source = (0..record.shards.len() as u16).find(is_source).expect("what comes has left somebody");
                    moves[number] = Some((source as u8, shard as u8));
                }
            }
        }
        Self(Arc::new(Version { path, record, served, assigned, moves, slots, before, next: Mutex::default() }))
    }

    /// The number of versions after the first, which is also the newest one's number.
    pub fn newest(&self) -> u8 {
        self.0.path.len() as u8
    }

    pub fn version(&self, number: u8) -> &Version {
        self.0.before.get(usize::from(number)).map_or(&self.0, |line| &line.0)
    }

    pub fn steps(&self) -> impl Iterator<Item = Step> {
        self.0.path.iter().map(|(_, step)| *step)
    }

    /// With one more version, made from the one of a number; `None`: that one does not allow it.
    pub fn next(&self, base: u8, step: Step) -> Option<Self> {
        let mut known = self.0.next.lock().expect("nobody panics with it");
        let next = known.entry((base, step)).or_insert_with(|| self.make(base, step));
        next.clone()
    }

    fn make(&self, base: u8, step: Step) -> Option<Self> {
        let newest = self.newest() + 1;
        let epoch = Epoch(u64::from(newest) + 1);
        let from = &self.version(base).record;
        let mut record = match step {
            Step::Begin { to } => {
                let new = u8::try_from(from.shard_count()).expect("few shards")..to;
                from.begin_resize(to.into(), new.map(|shard| store(shard, 0)).collect()).ok()?
            }
            Step::Fence => from.fence().ok()?,
            Step::Unfence => from.unfence().ok()?,
            Step::Commit => from.commit().ok()?,
            Step::Clean => from.clean().ok()?,
            Step::Finish => from.finish().ok()?,
            Step::Abort => from.abort("it was wished").ok()?,
            Step::Failover { shard } => {
                let mut next = from.clone();
                let shard = next.shards.get_mut(usize::from(shard))?;
                let replica = shard.replicas.pop()?;
                shard.replicas.push(shard.primary);
                (shard.primary, shard.epoch) = (replica, epoch);
                next
            }
            Step::Join { shard } => {
                let mut next = from.clone();
                next.shards.get_mut(usize::from(shard))?.replicas.push(store(shard, 1));
                next
            }
        };
        record.epoch = epoch;
        let path = self.0.path.iter().copied().chain([(base, step)]).collect();
        let before = self.0.before.iter().cloned().chain([self.clone()]).collect();
        Some(Self::of(path, record, self.0.slots.clone(), before))
    }
}

impl Version {
    pub fn operation(&self) -> Option<&Operation> {
        self.record.active_operation()
    }

    pub fn phase(&self) -> Option<Phase> {
        self.operation().map(|operation| operation.phase)
    }

    /// Whether rows are on their way, and of which operation.
    pub fn moving(&self) -> Option<u8> {
        self.operation().filter(|operation| operation.may_be_aborted()).map(|operation| operation.id as u8)
    }

    /// The number of the version that set the fence that stands, or stood at the commit.
    pub fn fence(&self) -> Option<u8> {
        let fenced = self.operation().filter(|operation| operation.phase != Phase::Copy);
        fenced.map(|operation| operation.fence.0 as u8 - 1)
    }

    pub fn shard_count(&self) -> u8 {
        self.record.shards.len() as u8
    }

    pub fn primary(&self, shard: u8) -> Option<u8> {
        let record = self.record.shards.get(usize::from(shard))?;
        (0..COPIES as u8).find(|copy| store(shard, *copy) == record.primary)
    }

    pub fn replica(&self, shard: u8) -> Option<u8> {
        let record = self.record.shards.get(usize::from(shard))?;
        (0..COPIES as u8).find(|copy| record.replicas.contains(&store(shard, *copy)))
    }

    /// Whether a shard has slots, or is to have some.
    pub fn stays(&self, shard: u8) -> bool {
        u16::from(shard) < self.record.shard_count()
    }

    pub fn has_copy(&self, shard: u8, copy: u8) -> bool {
        self.primary(shard) == Some(copy) || self.replica(shard) == Some(copy)
    }

    /// Of a shard that does not exist: 0, which none has that does.
    pub fn shard_epoch(&self, shard: u8) -> u8 {
        self.record.shards.get(usize::from(shard)).map_or(0, |record| record.epoch.0 as u8)
    }

    /// In which version the shard began: one that goes and comes again is another one.
    pub fn born(&self, shard: u8) -> u8 {
        self.record.shards.get(usize::from(shard)).map_or(0, |record| record.born.0 as u8)
    }

    pub fn served(&self, shard: u8) -> u8 {
        self.served[usize::from(shard)]
    }

    pub fn assigned(&self, shard: u8) -> u8 {
        self.assigned[usize::from(shard)]
    }

    /// From which shard to which a slot moves.
    pub fn way(&self, slot: u8) -> Option<(u8, u8)> {
        self.moves[usize::from(slot)]
    }

    pub fn leaves(&self, shard: u8) -> bool {
        self.moves.iter().flatten().any(|(source, _)| *source == shard)
    }
}
