//! Random courses of one shard: stores with logs that die, hang, are cut off and return, records and reports that come late, masters that
//! restart and know nothing. The master decides by [`failover::next`], [`failover::plan`], [`keyspaces::alter`] and [`replacing`] themselves;
//! the stores follow the rules of replication as far as positions and acknowledgements go.
//!
//! Whoever leads an epoch must have everything that was acknowledged, and when all stores are back, all wished copies must have it. Each
//! [`Fault`] takes one rule away, and must be found.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRng, TestRunner};
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::topology::{
    Era, FollowerStatus, KeyspaceRecord, NOBODY, Position, Role, Settings, ShardRecord, ShardStatus,
};

use crate::failover::{self, Planned};
use crate::keyspaces;
use crate::place::Candidate;
use crate::replacing;
use crate::standing::{Standing, Store, View};
use crate::state::Alteration;

const KEY: ShardKey = ShardKey { keyspace: KeyspaceId(7), shard: ShardId(0) };
const SILENCE_MAX: Duration = Duration::from_secs(2);
const REPLACE_AFTER: Duration = Duration::from_secs(300);
/// Courses in which a missing rule must be found.
const FAULT_COURSES: u32 = 40_000;

/// The rule that is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Another copy leads at once: nobody stops following first.
    Vacancy,
    /// One copy less is heard.
    Quorum,
    /// Any copy leads, however far it has come.
    Position,
    /// The new primary of a planned change speaks for itself even if it has not begun.
    Last,
    /// A replica that is too many goes at once.
    Witness,
    /// A witness goes before the primary counts without it.
    Version,
    /// More replicas must have everything, and from then on that is relied on.
    Raise,
    /// A store that catches up says that it stands in the era in which its primary writes now.
    Label,
    /// While the only copy changes its place either of the two leads, whether the other was heard or not.
    Alone,
}

#[derive(Clone, Debug)]
struct World {
    fault: Fault,
    /// Whether something is promised at all: at least one replica must have a write.
    promises: bool,
    now: Duration,
    /// The versions of the record that a majority holds.
    chosen: Vec<KeyspaceRecord>,
    stores: BTreeMap<StoreId, Node>,
    master: Master,
    written: u32,
    acknowledged: BTreeSet<u32>,
    led: BTreeMap<Epoch, StoreId>,
}

#[derive(Clone, Debug, Default)]
struct Master {
    began: Duration,
    standing: Standing,
    members: BTreeMap<StoreId, Member>,
}

#[derive(Clone, Debug)]
struct Member {
    session: bool,
    reported_at: Duration,
    up_since: Duration,
    held: Epoch,
}

impl Member {
    fn is_up(&self, now: Duration) -> bool {
        self.session && now - self.reported_at < SILENCE_MAX
    }
}

#[derive(Clone, Debug)]
struct Node {
    runs: bool,
    hangs: bool,
    /// Off from the master.
    cut: bool,
    record: KeyspaceRecord,
    copy: Option<Copy>,
    lead: Option<Lead>,
    /// Lives by the epoch that it led.
    opened: BTreeMap<Epoch, u64>,
    /// The epoch for which it has the end of the log of the primary before.
    arrived: Option<Epoch>,
    reports: VecDeque<(Option<ShardStatus>, Epoch)>,
}

/// Rows and where each era begins among them.
#[derive(Clone, Debug, Default)]
struct Copy {
    rows: Vec<u32>,
    eras: Vec<(Era, usize)>,
    position: Position,
}

#[derive(Clone, Debug)]
struct Lead {
    era: Era,
    followers: BTreeMap<StoreId, usize>,
    /// What followers have applied, on its way.
    applied: VecDeque<(StoreId, usize)>,
    /// Writes that are not answered yet, and the rows that there must be.
    waiting: Vec<(u32, usize)>,
}

impl Node {
    fn works(&self) -> bool {
        self.runs && !self.hangs
    }

    fn shard(&self) -> &ShardRecord {
        &self.record.shards[0]
    }
}

impl Copy {
    /// How much of the other copy's log this one has; `None`: it is ahead, or has another history.
    fn place_in(&self, leader: &Copy) -> Option<usize> {
        let Position { era, sequence } = self.position;
        let number = leader.eras.iter().position(|(other, _)| *other == era)?;
        let end = leader.eras.get(number + 1).map_or(leader.rows.len(), |(_, start)| *start);
        let place = sequence as usize;
        if place > end {
            return None;
        }
        assert_eq!(self.rows, leader.rows[..place], "a position does not say what a copy has");
        Some(place)
    }

    /// As much of the leader's log.
    fn prefix(leader: &Copy, rows: usize, fault: Fault) -> Copy {
        let eras: Vec<_> = leader.eras.iter().filter(|(_, start)| *start < rows || *start == 0).copied().collect();
        let now = if fault == Fault::Label { leader.eras.last() } else { eras.last() };
        let era = now.map(|(era, _)| *era).unwrap_or_default();
        Copy { rows: leader.rows[..rows].to_vec(), eras, position: Position { era, sequence: rows as u64 } }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u8),
    Follow(u8, u8),
    Applied(u8),
    Lead(u8),
    Take(u8, u8),
    Report(u8),
    Hear(u8),
    Heartbeats,
    Decide,
    RestartMaster,
    Crash(u8),
    Start(u8),
    /// It is back before anybody thinks that it is gone.
    Bounce(u8),
    Hang(u8),
    Continue(u8),
    Cut(u8),
    Join(u8),
    Pass(u16),
    PassLong,
    Alter(u8, u8),
    Plan(u8),
    /// A store gives its copy to another one, or to the best.
    Replace(u8, Option<u8>),
    AbortReplace,
    /// All that run hear of the newest record, report and lead, and the master decides, so many times; nobody follows.
    Turn(u8),
    /// All that run do all they can, so many times.
    Work(u8),
}

fn step() -> impl Strategy<Value = Step> {
    // Beyond the stores: whoever leads.
    let store = 0u8..8;
    prop_oneof![
        12 => store.clone().prop_map(Step::Write),
        16 => (0u8..5, 0u8..4).prop_map(|(store, rows)| Step::Follow(store, rows)),
        6 => store.clone().prop_map(Step::Applied),
        6 => store.clone().prop_map(Step::Lead),
        12 => (store.clone(), 0u8..3).prop_map(|(store, age)| Step::Take(store, age)),
        4 => store.clone().prop_map(Step::Report),
        4 => store.clone().prop_map(Step::Hear),
        6 => Just(Step::Heartbeats),
        10 => Just(Step::Decide),
        1 => Just(Step::RestartMaster),
        2 => store.clone().prop_map(Step::Crash),
        3 => store.clone().prop_map(Step::Start),
        3 => store.clone().prop_map(Step::Bounce),
        1 => store.clone().prop_map(Step::Hang),
        2 => store.clone().prop_map(Step::Continue),
        1 => store.clone().prop_map(Step::Cut),
        2 => store.clone().prop_map(Step::Join),
        6 => (50u16..1500).prop_map(Step::Pass),
        1 => Just(Step::PassLong),
        2 => (0u8..4, 0u8..3).prop_map(|(copies, min_replicas)| Step::Alter(copies, min_replicas)),
        3 => store.prop_map(Step::Plan),
        8 => (1u8..5).prop_map(Step::Turn),
        1 => (1u8..6).prop_map(Step::Work),
    ]
}

/// The same, while stores are replaced.
fn replacing_step() -> impl Strategy<Value = Step> {
    let with = prop_oneof![Just(None), (0u8..5).prop_map(Some)];
    prop_oneof![
        30 => step(),
        2 => (0u8..8, with).prop_map(|(store, with)| Step::Replace(store, with)),
        1 => Just(Step::AbortReplace),
        6 => (1u8..4).prop_map(Step::Work),
    ]
}

/// With one copy, which everything depends on, if `copies` says so.
fn replacing_course(copies: std::ops::RangeInclusive<u32>) -> impl Strategy<Value = Course> {
    (3u32..=5)
        .prop_flat_map(move |stores| (Just(stores), *copies.start()..=(*copies.end()).min(stores - 1)))
        .prop_flat_map(|(stores, copies)| (Just(stores), Just(copies), copies.min(2) - 1..copies.max(1)))
        .prop_flat_map(|(stores, copies, min_replicas)| {
            let steps = prop::collection::vec(replacing_step(), 20..150);
            steps.prop_map(move |mut steps| {
                // Another number of copies is another course.
                steps.retain(|step| copies > 1 || !matches!(step, Step::Alter(..)));
                steps.insert(0, Step::Work(6));
                Course { stores, copies, min_replicas, steps }
            })
        })
}

#[derive(Clone, Debug)]
struct Course {
    stores: u32,
    copies: u32,
    min_replicas: u32,
    steps: Vec<Step>,
}

fn course(promises: bool) -> impl Strategy<Value = Course> {
    let least = u32::from(promises);
    (3u32..=5)
        .prop_flat_map(move |stores| (Just(stores), (1 + least)..=stores.min(4)))
        .prop_flat_map(move |(stores, copies)| (Just(stores), Just(copies), least..copies.max(1)))
        .prop_flat_map(|(stores, copies, min_replicas)| {
            let steps = prop::collection::vec(step(), 20..150);
            // Mostly the copies are made before anything happens.
            let first = prop_oneof![1 => Just(0u8), 7 => Just(6)];
            (first, steps).prop_map(move |(first, mut steps)| {
                steps.insert(0, Step::Work(first));
                Course { stores, copies, min_replicas, steps }
            })
        })
}

impl World {
    fn new(course: &Course, fault: Fault, promises: bool) -> Self {
        let mut record = KeyspaceRecord::new(KEY.keyspace, "a", &[StoreId(1)]).unwrap();
        record.copies = course.copies;
        record.settings = Settings { min_replicas: Some(course.min_replicas), ..Settings::default() };
        record.shards[0].replicas = (2..=course.copies).map(StoreId).collect();
        let node = |store: u32| Node {
            runs: true,
            hangs: false,
            cut: false,
            record: record.clone(),
            copy: (store == 1).then(Copy::default),
            lead: None,
            opened: BTreeMap::new(),
            arrived: None,
            reports: VecDeque::new(),
        };
        let stores = (1..=course.stores).map(|store| (StoreId(store), node(store))).collect();
        Self {
            fault,
            promises,
            now: Duration::ZERO,
            chosen: vec![record],
            stores,
            master: Master::default(),
            written: 0,
            acknowledged: BTreeSet::new(),
            led: BTreeMap::new(),
        }
    }

    fn store(&self, number: u8) -> StoreId {
        let count = self.stores.len() as u32;
        let shard = &self.record().shards[0];
        match u32::from(number) {
            number if number < 5 => StoreId(number % count + 1),
            _ if shard.is_vacant() => shard.replicas[shard.replicas.len() - 1],
            _ => shard.primary,
        }
    }

    fn node(&mut self, store: StoreId) -> &mut Node {
        self.stores.get_mut(&store).unwrap()
    }

    fn record(&self) -> &KeyspaceRecord {
        self.chosen.last().unwrap()
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Write(store) => self.write(self.store(store)),
            Step::Follow(store, rows) => self.follow(self.store(store), usize::from(rows)),
            Step::Applied(store) => self.hear_applied(self.store(store)),
            Step::Lead(store) => self.lead(self.store(store)),
            Step::Take(store, age) => {
                let version = self.chosen.len().saturating_sub(1 + usize::from(age));
                self.take(self.store(store), self.chosen[version].clone());
            }
            Step::Report(store) => self.report(self.store(store)),
            Step::Hear(store) => self.hear(self.store(store)),
            Step::Heartbeats => {
                for store in self.stores.keys().copied().collect::<Vec<_>>() {
                    self.report(store);
                    self.hear(store);
                }
            }
            Step::Decide => self.decide(),
            Step::RestartMaster => self.master = Master { began: self.now, ..Master::default() },
            Step::Crash(store) => self.crash(self.store(store)),
            Step::Start(store) => self.node(self.store(store)).runs = true,
            Step::Bounce(store) => {
                let store = self.store(store);
                self.crash(store);
                self.node(store).runs = true;
                self.report(store);
                self.hear(store);
                self.lead(store);
            }
            Step::Hang(store) => self.node(self.store(store)).hangs = true,
            Step::Continue(store) => self.node(self.store(store)).hangs = false,
            Step::Cut(store) => self.node(self.store(store)).cut = true,
            Step::Join(store) => self.node(self.store(store)).cut = false,
            Step::Pass(ms) => self.now += Duration::from_millis(u64::from(ms)),
            Step::PassLong => self.now += REPLACE_AFTER,
            Step::Alter(copies, min_replicas) => self.alter(u32::from(copies), u32::from(min_replicas)),
            Step::Plan(store) => self.plan(self.store(store)),
            Step::Replace(store, with) => self.replace(self.store(store), with.map(|with| self.store(with))),
            Step::AbortReplace => {
                if let Ok(next) = self.record().abort("it was asked for") {
                    self.choose(next);
                }
            }
            Step::Turn(rounds) => {
                for _ in 0..rounds {
                    self.turn();
                }
            }
            Step::Work(rounds) => {
                for _ in 0..rounds {
                    self.work();
                }
            }
        }
        self.check();
    }

    fn write(&mut self, store: StoreId) {
        self.written += 1;
        let written = self.written;
        let node = self.node(store);
        if let (true, Some(lead), Some(copy)) = (node.works(), &mut node.lead, &mut node.copy) {
            copy.rows.push(written);
            copy.position.sequence = copy.rows.len() as u64;
            lead.waiting.push((written, copy.rows.len()));
        }
    }

    /// The store takes rows of its primary's log, or of the primary's before it.
    fn follow(&mut self, store: StoreId, rows: usize) {
        let fault = self.fault;
        let node = &self.stores[&store];
        let shard = node.shard().clone();
        if !node.works() || !shard.copies().any(|copy| copy == store) || shard.primary == NOBODY || node.lead.is_some()
        {
            return;
        }
        let takes_over = shard.primary == store;
        let leader = if takes_over { shard.previous } else { shard.primary };
        let Some(other) = self.stores.get(&leader).filter(|other| other.works()) else { return };
        if other.shard().epoch != shard.epoch || other.lead.is_some() == takes_over {
            return;
        }
        if !takes_over && !other.shard().copies().any(|copy| copy == store) {
            return;
        }
        let Some(theirs) = other.copy.clone() else { return };
        let own = node.copy.clone();
        let place = own.as_ref().and_then(|own| own.place_in(&theirs));
        if takes_over {
            let Some(place) = place else { return };
            let end = theirs.rows.len().min(place + rows);
            let node = self.node(store);
            if end > place {
                node.copy = Some(Copy::prefix(&theirs, end, fault));
            }
            if end == theirs.rows.len() {
                node.arrived = Some(shard.epoch);
            }
            return;
        }
        let end = match place {
            Some(place) => {
                let end = theirs.rows.len().min(place + rows);
                if end > place {
                    self.node(store).copy = Some(Copy::prefix(&theirs, end, fault));
                }
                end
            }
            None => {
                // It hands over what the leader lacks, and is copied.
                let lacked: Vec<u32> = own.map_or(Vec::new(), |own| own.rows);
                let lacked = lacked.into_iter().filter(|row| !theirs.rows.contains(row)).collect::<Vec<_>>();
                let leading = self.node(leader).copy.as_mut().unwrap();
                leading.rows.extend(lacked);
                leading.position.sequence = leading.rows.len() as u64;
                let copy = Copy::prefix(leading, leading.rows.len(), fault);
                let end = copy.rows.len();
                self.node(store).copy = Some(copy);
                end
            }
        };
        let lead = self.node(leader).lead.as_mut().unwrap();
        lead.followers.entry(store).or_default();
        lead.applied.push_back((store, end));
    }

    /// The primary hears what a follower has applied, and answers what enough of them have.
    fn hear_applied(&mut self, store: StoreId) {
        let node = self.node(store);
        if !node.works() {
            return;
        }
        let (replicas, min_replicas) = (node.shard().replicas.clone(), node.record.settings.min_replicas() as usize);
        let Some(lead) = &mut node.lead else { return };
        if let Some((follower, rows)) = lead.applied.pop_front() {
            lead.followers.insert(follower, rows);
        }
        let has = |rows: usize| {
            let applied = replicas.iter().filter_map(|replica| lead.followers.get(replica));
            applied.filter(|applied| **applied >= rows).count() >= min_replicas
        };
        let (answered, waiting) = lead.waiting.iter().partition(|(_, rows)| has(*rows));
        lead.waiting = waiting;
        let answered: Vec<(u32, usize)> = answered;
        self.acknowledged.extend(answered.into_iter().map(|(write, _)| write));
    }

    fn lead(&mut self, store: StoreId) {
        let node = self.node(store);
        let shard = node.shard().clone();
        let may =
            shard.previous == NOBODY || node.arrived == Some(shard.epoch) || node.opened.contains_key(&shard.epoch);
        if !node.works() || shard.primary != store || node.lead.is_some() || !may {
            return;
        }
        let copy = node.copy.as_mut().expect("a copy that is not complete was made primary");
        let opened = node.opened.entry(shard.epoch).or_default();
        *opened += 1;
        let era = Era { epoch: shard.epoch, opened: *opened };
        copy.eras.push((era, copy.rows.len()));
        copy.position = Position { era, sequence: copy.rows.len() as u64 };
        node.lead = Some(Lead { era, followers: BTreeMap::new(), applied: VecDeque::new(), waiting: Vec::new() });
        let before = self.led.insert(shard.epoch, store);
        assert!(before.is_none_or(|before| before == store), "two stores lead epoch {}", shard.epoch);
    }

    fn take(&mut self, store: StoreId, record: KeyspaceRecord) {
        let node = self.node(store);
        if !node.works() || node.cut || record.epoch <= node.record.epoch {
            return;
        }
        let shard = record.shards[0].clone();
        node.record = record;
        if shard.primary != store || node.lead.as_ref().is_some_and(|lead| lead.era.epoch != shard.epoch) {
            node.lead = None;
        }
        if let Some(lead) = &mut node.lead {
            lead.followers.retain(|follower, _| shard.copies().any(|copy| copy == *follower));
        }
        if !shard.copies().any(|copy| copy == store) {
            node.copy = None;
        }
    }

    fn crash(&mut self, store: StoreId) {
        let node = self.node(store);
        (node.runs, node.hangs, node.lead) = (false, false, None);
        node.reports.clear();
        if !node.cut
            && let Some(member) = self.master.members.get_mut(&store)
        {
            member.session = false;
        }
        for other in self.stores.values_mut() {
            if let Some(lead) = &mut other.lead {
                lead.followers.remove(&store);
            }
        }
    }

    fn report(&mut self, store: StoreId) {
        let node = &self.stores[&store];
        if !node.works() {
            return;
        }
        let shard = node.shard();
        let length = node.copy.as_ref().map_or(0, |copy| copy.rows.len());
        let follower = |follower: StoreId| {
            let applied = node.lead.as_ref().and_then(|lead| lead.followers.get(&follower)).copied();
            let other = &self.stores[&follower];
            let connected = applied.is_some() && other.works() && other.shard().epoch == shard.epoch;
            let applied = applied.unwrap_or_default();
            FollowerStatus {
                store: follower,
                connected,
                in_sync: connected && applied + 1 >= length,
                applied: applied as u64,
            }
        };
        let others = shard.copies().filter(|copy| *copy != store && shard.primary == store);
        let status = ShardStatus {
            key: KEY,
            epoch: shard.epoch,
            role: if shard.primary == store { Role::Primary } else { Role::Replica },
            position: node.copy.as_ref().filter(|copy| !copy.eras.is_empty()).map(|copy| copy.position),
            serves: node.lead.is_some(),
            followers: others.map(follower).collect(),
            bytes: 0,
            has_foreign_rows: false,
            moves: Vec::new(),
        };
        let status = shard.copies().any(|copy| copy == store).then_some(status);
        let held = node.record.epoch;
        self.node(store).reports.push_back((status, held));
    }

    fn hear(&mut self, store: StoreId) {
        let now = self.now;
        let node = self.node(store);
        if node.cut {
            return;
        }
        let Some((status, held)) = node.reports.pop_front() else { return };
        let new = Member { session: true, reported_at: now, up_since: now, held };
        let member = self.master.members.entry(store).or_insert(new);
        if !member.is_up(now) {
            member.up_since = now;
        }
        (member.session, member.reported_at, member.held) = (true, now, held);
        let held = BTreeMap::from([(KEY.keyspace, held)]);
        self.master.standing.hear(store, status.into_iter().collect(), &held, now);
    }

    fn view<'a>(&'a self, standing: &'a Standing) -> View<'a> {
        let store = |(store, member): (&StoreId, &Member)| {
            let candidate = Candidate { id: *store, free_disk_bytes: 1 << 40, ..Candidate::default() };
            let up = member.is_up(self.now);
            let since = if up { member.up_since } else { member.reported_at };
            (*store, Store { candidate, up, since, older: false })
        };
        View {
            now: self.now,
            began: self.master.began,
            replace_after: REPLACE_AFTER,
            stores: self.master.members.iter().map(store).collect(),
            standing,
        }
    }

    fn decide(&mut self) {
        let mut record = self.record().clone();
        self.master.standing.note(&record, self.now);
        let mut standing = self.master.standing.clone();
        let last = record.shards[0].replicas.last().copied();
        let vacant = record.shards[0].epoch;
        match self.fault {
            Fault::Quorum if record.shards[0].is_vacant() || record.shards[0].witnesses.is_empty() => {
                let more = record.settings.min_replicas() + 1;
                record.settings.min_replicas = Some(more);
            }
            Fault::Position => standing.change(|_, heard| {
                heard.status.position = heard.status.position.map(|_| Position::default());
            }),
            Fault::Last => standing.change(|store, heard| {
                if let Some(position) = heard.status.position.as_mut().filter(|_| Some(store) == last) {
                    position.era.epoch = Epoch(vacant.0 - 1);
                }
            }),
            Fault::Version => standing.change(|_, heard| heard.record = record.epoch),
            Fault::Quorum => {}
            Fault::None | Fault::Vacancy | Fault::Witness | Fault::Raise | Fault::Label | Fault::Alone => {}
        }
        let view = self.view(&standing);
        let next = replacing::next(&record, &view).or_else(|| failover::next(&record, &view));
        let hasty = Some(KeyspaceRecord { copies: 2, ..record.clone() }).filter(|_| self.fault == Fault::Alone);
        let hasty = hasty.and_then(|record| failover::next(&record, &view));
        let is_hasty = |hasty: &KeyspaceRecord| record.shards[0].is_vacant() || hasty.shards[0].is_vacant();
        let hasty = hasty.filter(is_hasty).map(|hasty| KeyspaceRecord { copies: 1, ..hasty });
        let Some(mut next) = hasty.or(next) else { return };
        let unfit = failover::unfit(&record, &next, &view);
        next.settings = self.record().settings.clone();
        if self.fault == Fault::Vacancy && next.shards[0].is_vacant() {
            let epoch = next.shards[0].epoch;
            let failed = record.shards[0].primary;
            let mut as_if = standing.clone();
            as_if.change(|store, heard| {
                heard.since = Duration::ZERO;
                heard.status.epoch = if store == failed { Epoch(0) } else { epoch };
            });
            let Some(mut chosen) = failover::next(&next, &self.view(&as_if)) else { return };
            chosen.shards[0].epoch = epoch;
            chosen.epoch = next.epoch;
            next = chosen;
        }
        if self.fault == Fault::Witness {
            let shard = &mut next.shards[0];
            let learners = std::mem::take(&mut shard.learners);
            let (gone, stays) = learners.into_iter().partition(|learner| shard.witnesses.contains(learner));
            let gone: Vec<StoreId> = gone;
            shard.learners = stays;
            shard.witnesses.retain(|witness| !gone.contains(witness));
        }
        for (key, epoch, store) in unfit {
            self.master.standing.note_unfit(key, epoch, store);
        }
        self.choose(next);
    }

    fn choose(&mut self, next: KeyspaceRecord) {
        next.validate().unwrap();
        assert_eq!(next.epoch.0, self.record().epoch.0 + 1);
        assert!(next.shards[0].epoch >= self.record().shards[0].epoch);
        if self.fault != Fault::Witness {
            self.check_copies(&next);
        }
        self.chosen.push(next);
    }

    fn alter(&mut self, copies: u32, min_replicas: u32) {
        // The master refuses it.
        if self.record().active_operation().is_some() {
            return;
        }
        let least = u32::from(self.promises);
        let copies = (1 + least + copies).min(self.stores.len() as u32);
        let min_replicas = (least + min_replicas).min(copies - 1);
        let up = self.stores.keys().map(|store| Candidate { id: *store, ..Candidate::default() });
        let view = keyspaces::View {
            records: Vec::new(),
            published: BTreeSet::new(),
            up: up.collect(),
            older: BTreeSet::new(),
            without_copies: BTreeSet::new(),
            moment: 0,
        };
        let changes = Settings { min_replicas: Some(min_replicas), ..Settings::default() };
        let alteration = Alteration { name: "a".to_owned(), changes, copies: Some(copies), expected_epoch: None };
        if let Ok(Some(mut next)) = keyspaces::alter(&view, self.record(), &alteration) {
            if self.fault == Fault::Raise {
                next.shards[0].witnesses.clone_from(&self.record().shards[0].witnesses);
            }
            self.choose(next);
        }
    }

    fn plan(&mut self, store: StoreId) {
        let planned = Planned { name: "a".to_owned(), shard: KEY.shard, to: Some(store) };
        if let Ok(next) = failover::plan(self.record(), &planned, &self.view(&self.master.standing)) {
            self.choose(next);
        }
    }

    fn replace(&mut self, store: StoreId, with: Option<StoreId>) {
        if let Ok(next) = replacing::begin(self.record(), store, with, &self.view(&self.master.standing)) {
            self.choose(next);
        }
    }

    /// Never so few copies that count as without the one that is too many.
    fn check_copies(&self, next: &KeyspaceRecord) {
        let count = |record: &KeyspaceRecord| {
            let shard = &record.shards[0];
            shard.replicas.len() + usize::from(!shard.is_vacant())
        };
        let (before, after) = (count(self.record()), count(next));
        assert!(after >= before.min(next.copies as usize), "of {before} copies that count {after} are left: {next:?}");
        let shard = &next.shards[0];
        let gone = self.record().shards[0].witnesses.iter().filter(|store| !shard.witnesses.contains(store));
        let lost: Vec<&StoreId> = gone.filter(|store| !shard.copies().any(|copy| copy == **store)).collect();
        assert!(lost.is_empty(), "witnesses {lost:?} are dropped before they are none any more");
    }

    /// All that run hear of the newest record, report and lead, and the master decides.
    fn turn(&mut self) {
        self.now += Duration::from_millis(400);
        for store in self.stores.keys().copied().collect::<Vec<_>>() {
            self.take(store, self.record().clone());
            self.lead(store);
            self.report(store);
            self.hear(store);
        }
        self.decide();
    }

    /// All that run do all they can.
    fn work(&mut self) {
        self.now += Duration::from_millis(300);
        let stores: Vec<StoreId> = self.stores.keys().copied().collect();
        for store in &stores {
            self.take(*store, self.record().clone());
            self.lead(*store);
        }
        for store in &stores {
            self.follow(*store, usize::MAX >> 1);
            self.lead(*store);
        }
        for store in &stores {
            let on_the_way = self.stores[store].lead.as_ref().map_or(0, |lead| lead.applied.len());
            for _ in 0..on_the_way {
                self.hear_applied(*store);
            }
            self.report(*store);
            while !self.stores[store].cut && !self.stores[store].reports.is_empty() {
                self.hear(*store);
            }
        }
        self.decide();
    }

    /// Whoever leads the newest epoch has everything that was acknowledged.
    fn check(&self) {
        let leading = self.stores.values().filter_map(|node| Some((node.lead.as_ref()?.era, node.copy.as_ref()?)));
        // A primary of an epoch before may not know yet: nobody acknowledges to it.
        let newest = self.led.keys().next_back().copied();
        let mut leading = leading.filter(|(era, _)| Some(era.epoch) == newest);
        if let (Some((era, copy)), true) = (leading.next(), self.promises) {
            let rows: BTreeSet<u32> = copy.rows.iter().copied().collect();
            let lost: Vec<_> = self.acknowledged.difference(&rows).collect();
            assert!(lost.is_empty(), "{lost:?} were acknowledged, and who leads {era:?} lacks them");
        }
    }

    /// Everybody is back: the shard comes to what is wished.
    fn end(&mut self) {
        for node in self.stores.values_mut() {
            (node.runs, node.hangs, node.cut) = (true, false, false);
        }
        let mut quiet = 0;
        for _ in 0..200 {
            let before = self.chosen.len();
            self.work();
            self.check();
            quiet = if before == self.chosen.len() { quiet + 1 } else { 0 };
            // Longer than anything is waited for, but for lost copies: all are back.
            if quiet > 25 {
                break;
            }
        }
        let record = self.record().clone();
        assert_eq!(record.active_operation(), None, "all are back, and it does not end: {record:?}");
        let shard = &record.shards[0];
        assert!(!shard.is_vacant() && shard.previous == NOBODY && shard.witnesses.is_empty(), "{shard:?}");
        assert!(shard.learners.is_empty() && shard.replicas.len() + 1 == record.copies as usize, "{record:?}");
        let leader = &self.stores[&shard.primary];
        assert!(leader.lead.is_some(), "nobody leads by {shard:?}");
        for (store, node) in &self.stores {
            assert_eq!(node.record, record);
            let rows = node.copy.as_ref().map(|copy| &copy.rows);
            let wished = shard
                .copies()
                .any(|copy| copy == *store)
                .then_some(leader.copy.as_ref().unwrap())
                .map(|copy| &copy.rows);
            assert_eq!(rows, wished, "{store}");
        }
    }
}

fn run(course: &Course, fault: Fault, promises: bool) {
    let mut world = World::new(course, fault, promises);
    for step in &course.steps {
        world.apply(step);
    }
    world.end();
}

proptest! {
    #[test]
    fn while_stores_are_replaced_nothing_is_lost_and_it_ends(course in replacing_course(2..=4)) {
        run(&course, Fault::None, true);
    }

    #[test]
    fn while_the_only_copy_changes_its_place_nothing_is_lost_and_it_ends(course in replacing_course(1..=1)) {
        run(&course, Fault::None, true);
    }

    #[test]
    fn nothing_acknowledged_is_lost_and_all_copies_come_back(course in course(true)) {
        run(&course, Fault::None, true);
    }

    #[test]
    fn where_nothing_is_promised_the_shard_goes_on_all_the_same(course in course(false)) {
        run(&course, Fault::None, false);
    }
}

/// The first of the same random courses that goes wrong without the rule, and how.
fn first_wrong(fault: Fault, courses: u32) -> Option<(u32, String)> {
    let rng = TestRng::deterministic_rng(prop::test_runner::RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = match fault {
        Fault::Alone => replacing_course(1..=1).boxed(),
        Fault::None
        | Fault::Vacancy
        | Fault::Quorum
        | Fault::Position
        | Fault::Last
        | Fault::Witness
        | Fault::Version
        | Fault::Raise
        | Fault::Label => course(true).boxed(),
    };
    (1..=courses).find_map(|number| {
        let course = strategy.new_tree(&mut runner).unwrap().current();
        Some((number, wrong(&course, fault)?))
    })
}

/// How the course goes wrong.
fn wrong(course: &Course, fault: Fault) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| run(course, fault, true))).err()?;
    Some(panic.downcast_ref::<String>().cloned().unwrap_or_default())
}

/// Chance does not come upon everything: three copies, one of which must have what was acknowledged.
fn find_in(fault: Fault, steps: Vec<Step>) {
    let course = Course { stores: 3, copies: 3, min_replicas: 1, steps };
    let text = wrong(&course, fault).unwrap_or_default();
    assert!(text.contains("were acknowledged"), "without {fault:?}: {text}");
    assert_eq!(wrong(&course, Fault::None), None);
}

/// Without the rule something that was acknowledged is lost, and with it the same course is right.
fn find(fault: Fault) {
    let (number, text) =
        first_wrong(fault, FAULT_COURSES).unwrap_or_else(|| panic!("without {fault:?} nothing goes wrong"));
    eprintln!("without {fault:?} course {number} goes wrong: {text}");
    assert!(text.contains("were acknowledged"), "without {fault:?} course {number} goes wrong otherwise: {text}");
    assert_eq!(first_wrong(Fault::None, number), None);
}

#[test]
fn without_a_vacancy_something_is_lost() {
    find(Fault::Vacancy);
}

#[test]
fn with_one_copy_less_heard_something_is_lost() {
    find(Fault::Quorum);
}

#[test]
fn when_positions_do_not_matter_something_is_lost() {
    find(Fault::Position);
}

#[test]
fn when_a_new_primary_that_has_not_begun_speaks_for_itself_something_is_lost() {
    let steps = vec![
        Step::Work(6),
        Step::Plan(2),
        // The primary, which has not heard of it, acknowledges one more write with the other replica, and both die.
        Step::Write(0),
        Step::Follow(1, 1),
        Step::Applied(0),
        Step::Take(2, 0),
        Step::Crash(0),
        Step::Pass(1100),
        Step::Heartbeats,
        Step::Decide,
        Step::Crash(1),
        Step::Turn(6),
    ];
    find_in(Fault::Last, steps);
}

#[test]
fn when_a_copy_goes_without_a_check_something_is_lost() {
    find(Fault::Witness);
}

#[test]
fn when_a_copy_goes_while_the_primary_still_counts_it_something_is_lost() {
    find(Fault::Version);
}

#[test]
fn when_more_must_have_everything_and_that_is_relied_on_at_once_something_is_lost() {
    find(Fault::Raise);
}

#[test]
fn when_one_of_two_places_of_the_only_copy_leads_unheard_something_is_lost() {
    let (number, text) = first_wrong(Fault::Alone, FAULT_COURSES).expect("without the rule nothing goes wrong");
    eprintln!("course {number} goes wrong: {text}");
    assert!(text.contains("were acknowledged"), "course {number} goes wrong otherwise: {text}");
}

#[test]
fn when_a_copy_that_catches_up_claims_the_newest_era_something_is_lost() {
    let steps = vec![
        Step::Work(6),
        Step::Write(0),
        Step::Write(0),
        Step::Write(0),
        Step::Follow(1, 3),
        Step::Applied(0),
        // The other replica is behind the beginning of the primary's next life.
        Step::Bounce(0),
        Step::Follow(2, 2),
        Step::Crash(0),
        Step::Turn(8),
    ];
    find_in(Fault::Label, steps);
}
