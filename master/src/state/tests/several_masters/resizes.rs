//! Keyspaces that are resized while masters, stores and everything between them fail: stores that are only a few rows each and obey fences.
//! No slot is ever served by two, nothing that was acknowledged is lost, every operation ends, and the next one works.

use vasto_proto::id::{ShardId, ShardKey};
use vasto_proto::topology::{Era, FollowerStatus, Layout, MoveStage, MoveStatus, Position, Role};

use super::*;

/// Slots that are looked at; by jump hash they lie anywhere.
const SLOTS: [u16; 16] =
    [0, 17, 900, 1500, 3000, 4242, 5000, 6007, 7777, 9000, 10101, 11999, 12345, 13001, 15000, 16383];

const FIRST: KeyspaceId = FIRST_KEYSPACE;
const NAME: &str = FIRST_KEYSPACE_NAME;

/// One copy of one shard on a disk.
#[derive(Clone, Debug, Default)]
struct Copy {
    /// Of which life of the shard it is.
    born: Epoch,
    /// The newest write that it has of each slot.
    rows: BTreeMap<u16, u64>,
    position: Option<Position>,
    /// It may have rows of slots that are not its own.
    is_foreign: bool,
    /// Of which operation, and up to which fence each source's rows are here.
    operation: u64,
    drained: BTreeMap<ShardId, Epoch>,
    /// Not on the disk: the epoch of the shard and of the source under which each move goes on, and how far it is.
    moves: BTreeMap<ShardId, (Epoch, Epoch, MoveStage)>,
}

/// What one version of the record says of slots and moves.
struct Said {
    served: BTreeSet<(ShardId, u16)>,
    moves: Vec<(ShardId, ShardId, Vec<u16>)>,
}

struct Plant {
    cluster: Cluster,
    copies: BTreeMap<(u32, ShardId), Copy>,
    /// Under which epoch of a shard somebody has begun to serve it last: nobody else has a lease.
    leases: BTreeMap<ShardId, Epoch>,
    said: BTreeMap<Epoch, Said>,
    down: BTreeSet<u32>,
    /// The newest acknowledged write of each slot.
    acknowledged: BTreeMap<u16, u64>,
    writes: u64,
    ended: BTreeMap<u64, Phase>,
}

impl Plant {
    fn new(copies: u32) -> Self {
        let mut plant = Self {
            cluster: Cluster::new(blank(1..=4)),
            copies: BTreeMap::new(),
            leases: BTreeMap::new(),
            said: BTreeMap::new(),
            down: BTreeSet::new(),
            acknowledged: BTreeMap::new(),
            writes: 0,
            ended: BTreeMap::new(),
        };
        plant.calm("the keyspace is there", |plant, leader| plant.newest(leader).is_some());
        if copies > 1 {
            let alteration = Alteration {
                name: NAME.to_owned(),
                changes: Settings { min_replicas: Some(1), ..Settings::default() },
                copies: Some(copies),
                expected_epoch: None,
            };
            plant.calm_asking(
                "the copies are altered",
                |plant, leader| {
                    let request = RequestId(plant.cluster.number());
                    plant.cluster.apply(leader, Event::AlterRequested { request, alteration: alteration.clone() });
                },
                |plant, leader| plant.newest(leader).unwrap().copies == copies,
            );
            plant.calm("all copies are there", |plant, leader| {
                let record = plant.newest(leader).unwrap();
                let has_all =
                    |shard: &ShardRecord| shard.replicas.len() + 1 == copies as usize && shard.learners.is_empty();
                record.copies == copies && record.shards.iter().all(has_all)
            });
        }
        plant
    }

    fn newest(&self, master: usize) -> Option<&KeyspaceRecord> {
        self.cluster.masters[master].records.get(&FIRST).map(|known| &known.record)
    }

    fn record(&self, store: u32) -> Option<KeyspaceRecord> {
        self.cluster.disks.get(&store)?.records.get(&FIRST).cloned()
    }

    fn said(&mut self, record: &KeyspaceRecord) -> &Said {
        self.said.entry(record.epoch).or_insert_with(|| {
            let layout = Layout::of(record);
            let shards = (0..record.shards.len() as u16).map(ShardId);
            let served = shards.flat_map(|shard| {
                let served = layout.served(shard);
                SLOTS
                    .into_iter()
                    .filter(move |slot| served.contains(*slot))
                    .map(move |slot| (shard, slot))
                    .collect::<Vec<_>>()
            });
            let slots = |part: &vasto_proto::topology::Move| {
                SLOTS.into_iter().filter(|slot| part.slots.contains(*slot)).collect()
            };
            let moves = layout.moves().into_iter().map(|part| (part.source, part.target, slots(&part))).collect();
            Said { served: served.collect(), moves }
        })
    }

    /// Whether the store serves the shard, by what it knows and by who may have a lease.
    fn serves(&self, store: u32, record: &KeyspaceRecord, shard: ShardId) -> bool {
        let Some(described) = record.shards.get(usize::from(shard.0)) else { return false };
        !self.down.contains(&store)
            && !record.dropped
            && described.primary == StoreId(store)
            && self.leases.get(&shard) == Some(&described.epoch)
    }

    /// What every store that lives does by itself: it follows the record that it has.
    fn tick(&mut self) {
        let stores: Vec<u32> = self.cluster.disks.keys().copied().filter(|store| !self.down.contains(store)).collect();
        for store in &stores {
            if let Some(record) = self.record(*store) {
                self.follow(*store, &record);
            }
        }
        // What a follower is given it must be there for.
        for store in &stores {
            let Some(record) = self.record(*store) else { continue };
            for (shard, _) in
                record.shards_of(StoreId(*store)).map(|(shard, it)| (shard, it.clone())).collect::<Vec<_>>()
            {
                if self.serves(*store, &record, shard) {
                    self.replicate(*store, &record, shard);
                    self.take_slots(*store, &record, shard);
                    self.clean(*store, &record, shard);
                }
            }
            let statuses = self.statuses(*store, &record);
            self.cluster.statuses.insert(*store, statuses);
        }
        self.check();
    }

    fn follow(&mut self, store: u32, record: &KeyspaceRecord) {
        let named: BTreeMap<ShardId, Epoch> =
            record.copies_of(StoreId(store)).map(|(shard, described)| (shard, described.born)).collect();
        self.copies.retain(|(of, shard), copy| *of != store || named.get(shard) == Some(&copy.born));
        for (shard, described) in
            record.copies_of(StoreId(store)).map(|(shard, it)| (shard, it.clone())).collect::<Vec<_>>()
        {
            let copy = self.copies.entry((store, shard)).or_default();
            copy.born = described.born;
            if described.primary != StoreId(store) {
                copy.moves.clear();
                continue;
            }
            let lease = self.leases.entry(shard).or_default();
            if described.epoch > *lease {
                *lease = described.epoch;
                let sequence = copy.position.map_or(0, |position| position.sequence);
                copy.position = Some(Position { era: Era { epoch: described.epoch, opened: 1 }, sequence });
                copy.moves.clear();
            }
            let operation = record.operation.as_ref();
            let is_taken = operation.is_some_and(|operation| operation.phase == Phase::Committed);
            copy.is_foreign |= is_taken && matches!(operation.unwrap().kind, OperationKind::Resize { .. });
        }
    }

    /// Gives every follower that hears the primary all that it has; returns how many replicas have it.
    fn replicate(&mut self, store: u32, record: &KeyspaceRecord, shard: ShardId) -> usize {
        let described = &record.shards[usize::from(shard.0)];
        let own = self.copies[&(store, shard)].clone();
        let mut have = 0;
        for follower in described.replicas.iter().chain(&described.learners) {
            let theirs = self.record(follower.0);
            let follows =
                theirs.and_then(|record| Some(record.shards.get(usize::from(shard.0))?.epoch)) == Some(described.epoch);
            if follows && !self.down.contains(&follower.0) && self.copies.contains_key(&(follower.0, shard)) {
                self.copies.insert((follower.0, shard), Copy { moves: BTreeMap::new(), ..own.clone() });
                have += usize::from(described.replicas.contains(follower));
            }
        }
        have
    }

    /// One step of each move to a shard.
    fn take_slots(&mut self, store: u32, record: &KeyspaceRecord, shard: ShardId) {
        let Some(operation) = record.active_operation().filter(|it| it.may_be_aborted()).cloned() else { return };
        let epoch = record.shards[usize::from(shard.0)].epoch;
        let moves: Vec<_> = self.said(record).moves.iter().filter(|(_, target, _)| *target == shard).cloned().collect();
        for (source, _, slots) in moves {
            let mut copy = self.copies[&(store, shard)].clone();
            if copy.operation != operation.id {
                (copy.operation, copy.is_foreign) = (operation.id, true);
                copy.drained.clear();
                copy.moves.clear();
            }
            let fence = Some(operation.fence).filter(|_| operation.phase == Phase::Fence);
            if fence.is_some() && copy.drained.get(&source) == fence.as_ref() {
                copy.moves.insert(source, (epoch, Epoch(0), MoveStage::Drained { fence: operation.fence }));
                self.copies.insert((store, shard), copy);
                continue;
            }
            let described = &record.shards[usize::from(source.0)];
            let giver = described.primary.0;
            let theirs = self.record(giver).filter(|theirs| {
                theirs.shards.get(usize::from(source.0)).map(|it| it.epoch) == Some(described.epoch)
                    && self.serves(giver, theirs, source)
                    && theirs.operation.as_ref().map(|it| it.id) == Some(operation.id)
            });
            let before = copy.moves.get(&source).copied();
            let is_same = before.is_some_and(|(own, of, _)| (own, of) == (epoch, described.epoch));
            let stage = before.filter(|_| is_same).map_or(MoveStage::Waits, |(.., stage)| stage);
            let stage = match (theirs, stage) {
                (None, _) => MoveStage::Waits,
                (Some(_), MoveStage::Waits) => {
                    copy.rows.retain(|slot, _| !slots.contains(slot));
                    copy.drained.remove(&source);
                    MoveStage::Copies
                }
                (Some(theirs), MoveStage::Copies | MoveStage::Follows | MoveStage::Drained { .. }) => {
                    let rows = &self.copies[&(giver, source)].rows;
                    for slot in &slots {
                        copy.rows.extend(rows.get(slot).map(|write| (*slot, *write)));
                    }
                    copy.position.as_mut().unwrap().sequence += 1;
                    self.copies.insert((store, shard), copy.clone());
                    let have = self.replicate(store, record, shard);
                    let replicas = record.shards[usize::from(shard.0)].replicas.len();
                    let is_kept = have >= (record.settings.min_replicas() as usize).max(usize::from(replicas > 0));
                    let reached = theirs.active_operation().filter(|it| it.phase == Phase::Fence).map(|it| it.fence);
                    match reached.filter(|reached| is_kept && Some(*reached) == fence) {
                        Some(fence) => {
                            copy.drained.insert(source, fence);
                            MoveStage::Drained { fence }
                        }
                        None => MoveStage::Follows,
                    }
                }
            };
            copy.moves.insert(source, (epoch, described.epoch, stage));
            self.copies.insert((store, shard), copy);
        }
    }

    fn clean(&mut self, store: u32, record: &KeyspaceRecord, shard: ShardId) {
        let may = record.active_operation().is_none_or(|operation| operation.phase == Phase::Clean);
        if may && self.copies[&(store, shard)].is_foreign {
            let own: BTreeSet<u16> =
                self.said(record).served.iter().filter(|(of, _)| *of == shard).map(|(_, slot)| *slot).collect();
            let copy = self.copies.get_mut(&(store, shard)).unwrap();
            copy.rows.retain(|slot, _| own.contains(slot));
            copy.is_foreign = false;
        }
    }

    fn statuses(&self, store: u32, record: &KeyspaceRecord) -> Vec<ShardStatus> {
        let status = |(shard, described): (ShardId, &ShardRecord)| {
            let copy = &self.copies[&(store, shard)];
            let is_primary = described.primary == StoreId(store);
            let serves = self.serves(store, record, shard);
            let follower = |other: &StoreId| {
                let theirs = self.copies.get(&(other.0, shard));
                let connected = !self.down.contains(&other.0) && theirs.is_some_and(|it| it.position == copy.position);
                let applied = copy.position.filter(|_| connected).map_or(0, |position| position.sequence);
                FollowerStatus { store: *other, connected, in_sync: connected, applied }
            };
            let others = described.replicas.iter().chain(&described.learners).filter(|_| serves);
            let moves = copy.moves.iter().filter(|_| is_primary).map(|(source, (_, _, stage))| MoveStatus {
                source: *source,
                operation: copy.operation,
                stage: *stage,
                ..MoveStatus::default()
            });
            ShardStatus {
                key: ShardKey { keyspace: FIRST, shard },
                epoch: described.epoch,
                role: if is_primary { Role::Primary } else { Role::Replica },
                position: copy.position,
                serves,
                followers: others.map(follower).collect(),
                bytes: 0,
                has_foreign_rows: copy.is_foreign,
                moves: moves.collect(),
            }
        };
        record.copies_of(StoreId(store)).map(status).collect()
    }

    /// Who serves each slot: nobody or one, and it has everything that was acknowledged.
    fn owners(&mut self) -> BTreeMap<u16, (u32, ShardId)> {
        let mut owners = BTreeMap::new();
        for store in self.cluster.disks.keys().copied().collect::<Vec<_>>() {
            let Some(record) = self.record(store) else { continue };
            let served: Vec<(ShardId, u16)> = self.said(&record).served.iter().copied().collect();
            for (shard, slot) in served.into_iter().filter(|(shard, _)| self.serves(store, &record, *shard)) {
                let other = owners.insert(slot, (store, shard));
                assert_eq!(other, None, "slot {slot} is served by shard {shard} on store {store} and by another one");
            }
        }
        owners
    }

    fn check(&mut self) {
        for (slot, (store, shard)) in self.owners() {
            let found = self.copies[&(store, shard)].rows.get(&slot).copied().unwrap_or_default();
            let wanted = self.acknowledged.get(&slot).copied().unwrap_or_default();
            assert!(found >= wanted, "slot {slot} on store {store}, shard {shard}: {found} instead of {wanted}");
        }
        for master in &self.cluster.masters {
            let record = master.records.get(&FIRST).map(|known| &known.record);
            let ended = record.and_then(|record| record.operation.as_ref()).filter(|operation| !operation.is_active());
            self.ended.extend(ended.map(|operation| (operation.id, operation.phase)));
        }
    }

    /// A client writes; the answer comes when enough copies have it.
    fn write(&mut self, slot: u16) {
        let Some((store, shard)) = self.owners().get(&slot).copied() else { return };
        let Some(record) = self.record(store) else { return };
        self.writes += 1;
        let copy = self.copies.get_mut(&(store, shard)).unwrap();
        copy.rows.insert(slot, self.writes);
        copy.position.as_mut().unwrap().sequence += 1;
        if self.replicate(store, &record, shard) >= record.settings.min_replicas() as usize {
            self.acknowledged.insert(slot, self.writes);
        }
    }

    fn round(&mut self, master: usize, stores: u32) {
        let up = (1..=STORES_MAX).filter(|store| stores & 1 << store != 0 && !self.down.contains(store));
        for store in up.collect::<Vec<_>>() {
            self.cluster.round(master, 1 << store);
            self.tick();
        }
    }

    /// The process ends, and with it everything that is not on the disk.
    fn kill(&mut self, store: u32) {
        self.down.insert(store);
        (0..MASTERS).for_each(|master| self.cluster.lose_session(master, store));
        self.copies.iter_mut().filter(|((of, _), _)| *of == store).for_each(|(_, copy)| copy.moves.clear());
    }

    /// Nothing fails any more until something is so; returns who leads.
    fn calm(&mut self, what: &str, is_so: impl Fn(&Self, usize) -> bool) -> usize {
        self.calm_asking(what, |_, _| {}, is_so)
    }

    /// As [`Self::calm`]; who leads is asked again and again.
    fn calm_asking(
        &mut self,
        what: &str,
        ask: impl Fn(&mut Self, usize),
        is_so: impl Fn(&Self, usize) -> bool,
    ) -> usize {
        self.down.clear();
        for (master, store) in self.cluster.wires.keys().copied().collect::<Vec<_>>() {
            self.cluster.lose_session(master, store);
        }
        for turn in 0..600 {
            self.cluster.now += at_ms(250);
            for master in 0..MASTERS {
                self.round(master, u32::MAX);
            }
            let slot = SLOTS[(self.writes % SLOTS.len() as u64) as usize];
            self.write(slot);
            let leads = |master: &usize| self.cluster.masters[*master].leadership.is_settled();
            if let [leader] = (0..MASTERS).filter(leads).collect::<Vec<_>>()[..] {
                if is_so(self, leader) {
                    return leader;
                }
                if turn % 40 == 8 {
                    ask(self, leader);
                }
            }
        }
        let states: Vec<_> = (0..MASTERS)
            .map(|master| {
                let state = &self.cluster.masters[master];
                (state.term(), state.operation_status(NAME, self.cluster.now).map(|status| status.waits_for))
            })
            .collect();
        let record = self.record(1);
        panic!("it never comes to be that {what}: {states:?} {record:?}");
    }

    fn ask(&mut self, master: usize, wish: OperationWish) {
        let request = RequestId(self.cluster.number());
        self.cluster.apply(master, Event::OperationRequested { request, wish });
    }

    fn resize(&mut self, master: usize, shards: u32) {
        self.ask(master, OperationWish::Resize { name: NAME.to_owned(), shards });
    }
}

#[derive(Clone, Debug)]
enum Turn {
    /// For a while nothing else happens.
    Calm {
        master: usize,
        rounds: usize,
    },
    Round {
        master: usize,
        stores: u32,
    },
    Report {
        master: usize,
        store: u32,
    },
    Arrives {
        master: usize,
        store: u32,
    },
    CarriesOut {
        master: usize,
        store: u32,
        count: usize,
    },
    SessionLost {
        master: usize,
        store: u32,
    },
    MasterRestarts(usize),
    StoreDies(u32),
    StoreReturns(u32),
    TimePasses {
        master: usize,
        ms: u64,
    },
    Writes(usize),
    Resize {
        master: usize,
        shards: u32,
    },
    Abort(usize),
}

fn a_turn() -> impl Strategy<Value = Turn> {
    // One of the masters is mostly heard.
    let master = || prop_oneof![4 => Just(0), 1 => 0..MASTERS];
    let store = || 1u32..=4;
    prop_oneof![
        16 => (master(), 1usize..12).prop_map(|(master, rounds)| Turn::Calm { master, rounds }),
        16 => (master(), prop_oneof![3 => Just(u32::MAX), 1 => 0u32..32]).prop_map(|(master, stores)| Turn::Round { master, stores }),
        3 => (master(), store()).prop_map(|(master, store)| Turn::Report { master, store }),
        3 => (master(), store()).prop_map(|(master, store)| Turn::Arrives { master, store }),
        3 => (master(), store(), 1usize..4).prop_map(|(master, store, count)| Turn::CarriesOut { master, store, count }),
        1 => (master(), store()).prop_map(|(master, store)| Turn::SessionLost { master, store }),
        1 => master().prop_map(Turn::MasterRestarts),
        2 => store().prop_map(Turn::StoreDies),
        4 => store().prop_map(Turn::StoreReturns),
        8 => (master(), 0u64..1_200).prop_map(|(master, ms)| Turn::TimePasses { master, ms }),
        12 => (0..SLOTS.len()).prop_map(Turn::Writes),
        6 => (master(), 1u32..6).prop_map(|(master, shards)| Turn::Resize { master, shards }),
        1 => master().prop_map(Turn::Abort),
    ]
}

fn run(copies: u32, turns: Vec<Turn>) {
    let mut plant = Plant::new(copies);
    for turn in turns {
        plant.cluster.now += at_ms(1);
        let is_there = |plant: &Plant, store: &u32| !plant.down.contains(store);
        match turn {
            Turn::Calm { master, rounds } => {
                for _ in 0..rounds {
                    plant.cluster.now += at_ms(200);
                    plant.round(master, u32::MAX);
                }
            }
            Turn::Round { master, stores } => plant.round(master, stores),
            Turn::Report { master, store } if is_there(&plant, &store) => plant.cluster.report(master, store),
            Turn::Report { .. } => {}
            Turn::Arrives { master, store } => plant.cluster.deliver_report(master, store),
            Turn::CarriesOut { master, store, count } if is_there(&plant, &store) => {
                plant.cluster.deliver_directives(master, store, count);
            }
            Turn::CarriesOut { .. } => {}
            Turn::SessionLost { master, store } => plant.cluster.lose_session(master, store),
            Turn::MasterRestarts(master) => plant.cluster.restart(master),
            Turn::StoreDies(store) => plant.kill(store),
            Turn::StoreReturns(store) => drop(plant.down.remove(&store)),
            Turn::TimePasses { master, ms } => {
                plant.cluster.now += at_ms(ms);
                plant.cluster.apply(master, Event::TimePassed);
            }
            Turn::Writes(number) => plant.write(SLOTS[number]),
            Turn::Resize { master, shards } => plant.resize(master, shards),
            Turn::Abort(master) => plant.ask(master, OperationWish::Abort { name: NAME.to_owned() }),
        }
        plant.tick();
    }
    let is_idle = |plant: &Plant, leader: usize| {
        let record = plant.newest(leader).unwrap();
        let served = (1..=record.shard_count()).map(|number| ShardId(number - 1)).all(|shard| {
            let primary = record.shards[usize::from(shard.0)].primary.0;
            plant.record(primary).is_some_and(|theirs| theirs == *record && plant.serves(primary, &theirs, shard))
        });
        record.active_operation().is_none() && served
    };
    let leader = plant.calm("every operation ends", is_idle);
    let owners = plant.owners();
    assert_eq!(owners.len(), SLOTS.len(), "slots that nobody serves");
    for slot in SLOTS {
        plant.write(slot);
    }
    // And the next one works.
    let shards = if plant.newest(leader).unwrap().shard_count() == 3 { 2 } else { 3 };
    let resize = |plant: &mut Plant, leader| plant.resize(leader, shards);
    plant.calm_asking("the next resize is done", resize, |plant, leader| {
        let record = plant.newest(leader).unwrap();
        is_idle(plant, leader) && u32::from(record.shard_count()) == shards
    });
    assert_eq!(plant.owners().len(), SLOTS.len());
    if std::env::var_os("VASTO_SHOW").is_some() {
        let failovers: u64 = plant.leases.values().map(|epoch| epoch.0).sum();
        let done = plant.ended.values().filter(|phase| **phase == Phase::Done).count();
        eprintln!(
            "{copies} copies: {} operations ended, {done} done, {} versions, {} writes, {failovers} epochs",
            plant.ended.len(),
            plant.said.len(),
            plant.writes
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn one_copy_is_moved_by_several_masters(turns in prop::collection::vec(a_turn(), 0..250)) {
        run(1, turns);
    }

    #[test]
    fn two_copies_are_moved_while_shards_fail_over(turns in prop::collection::vec(a_turn(), 0..250)) {
        run(2, turns);
    }

    #[test]
    fn three_copies_are_moved_while_shards_fail_over(turns in prop::collection::vec(a_turn(), 0..250)) {
        run(3, turns);
    }
}

/// Why the master refuses what it is asked for.
fn refusal(plant: &mut Plant, leader: usize, event: impl FnOnce(RequestId) -> Event) -> String {
    let request = RequestId(plant.cluster.number());
    plant.cluster.apply(leader, event(request));
    for _ in 0..40 {
        if let Some(text) = plant.cluster.refused.remove(&request) {
            return text;
        }
        // Nothing goes on but the votes.
        plant.cluster.now += at_ms(250);
        plant.cluster.round(leader, u32::MAX);
    }
    panic!("it is not refused");
}

fn wished(wish: OperationWish) -> impl FnOnce(RequestId) -> Event {
    move |request| Event::OperationRequested { request, wish }
}

#[test]
fn what_an_operation_builds_on_is_not_changed_while_it_goes_on() {
    let mut plant = Plant::new(2);
    let leader = plant.calm("all is well", |_, _| true);
    let name = || NAME.to_owned();
    let text = refusal(&mut plant, leader, wished(OperationWish::Abort { name: name() }));
    assert_eq!(text, "nothing is being done with keyspace 0 that could be aborted; nothing was changed");
    let text = refusal(&mut plant, leader, wished(OperationWish::Resize { name: "none".to_owned(), shards: 3 }));
    assert_eq!(text, "no such keyspace 'none'");
    let text = refusal(&mut plant, leader, wished(OperationWish::Resize { name: name(), shards: 2 }));
    assert_eq!(text, "the keyspace has 2 shards already; nothing was changed");

    let began = |plant: &Plant, leader: usize| plant.newest(leader).unwrap().active_operation().is_some();
    plant.resize(leader, 3);
    for _ in 0..40 {
        // The stores vote, and do nothing else.
        plant.cluster.now += at_ms(50);
        plant.cluster.round(leader, u32::MAX);
    }
    assert!(began(&plant, leader));
    let doing = "keyspace 0 is being resized from 2 to 3 shards (phase copy); nothing was changed";
    let planned = Planned { name: name(), shard: ShardId(0), to: None };
    let text = refusal(&mut plant, leader, |request| Event::FailoverRequested { request, planned });
    assert_eq!(text, doing);
    let settings = Settings::default();
    let alteration = Alteration { name: name(), changes: settings, copies: Some(3), expected_epoch: None };
    let text = refusal(&mut plant, leader, |request| Event::AlterRequested { request, alteration });
    assert_eq!(text, doing);
    assert_eq!(refusal(&mut plant, leader, wished(OperationWish::Resize { name: name(), shards: 5 })), doing);
    let replace = OperationWish::Replace { name: name(), store: StoreId(1), with: None };
    assert_eq!(refusal(&mut plant, leader, wished(replace)), doing);
    let status = plant.cluster.masters[leader].operation_status(NAME, plant.cluster.now).unwrap();
    assert!(status.waits_for.contains(" does not serve shard 2"), "{}", status.waits_for);
    assert_eq!(status.record.unwrap().shards.len(), 3);

    plant.ask(leader, OperationWish::Abort { name: name() });
    plant.calm("it is aborted", |plant, leader| !began(plant, leader));
    let record = plant.newest(leader).unwrap();
    assert_eq!((record.shards.len(), record.operation.as_ref().unwrap().phase), (2, Phase::Aborted));
    assert_eq!(record.operation.as_ref().unwrap().reason, "it was asked for");
    // And after it everything goes as before.
    let resize = |plant: &mut Plant, leader| plant.resize(leader, 3);
    let leader = plant.calm_asking("it is resized", resize, |plant, leader| {
        let record = plant.newest(leader).unwrap();
        record.shards.len() == 3 && !began(plant, leader)
    });
    let status = plant.cluster.masters[leader].operation_status(NAME, plant.cluster.now).unwrap();
    assert!(status.waits_for.is_empty() && status.elapsed_ms > 0 && status.moves.len() == 2, "{status:?}");
    assert!(plant.cluster.masters[leader].take_steps().iter().any(|step| step.operation.phase == Phase::Done));

    let committed =
        plant.newest(leader).unwrap().begin_resize(2, Vec::new()).unwrap().fence().unwrap().commit().unwrap();
    assert_eq!(
        operations::abort(&committed).unwrap_err().to_string(),
        "keyspace 0 is being resized from 3 to 2 shards (phase committed), and that is past the point where it can be aborted: it goes on to its end; nothing was changed"
    );
    plant.cluster.report(leader, 4);
    let wire = plant.cluster.wires.get_mut(&(leader, 4)).unwrap();
    wire.reports.back_mut().unwrap().protocol_version = RESIZE_VERSION - 1;
    plant.cluster.deliver_report(leader, 4);
    let text = refusal(&mut plant, leader, wished(OperationWish::Resize { name: name(), shards: 2 }));
    assert_eq!(text, "stores 00000004 run an older version that knows nothing of resizing; nothing was changed");
}
