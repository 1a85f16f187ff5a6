//! Random courses of stores that ask each other for leases: clocks of different rates, restarts, messages that are lost, late or overtaken,
//! changes of the record and of the holder group. At no real moment do two stores hold a lease; with any one rule taken out, two do.

use super::lease::{Asked, GRANT_NS, Grants, KnownGroup, Lease};
use super::peers::HolderGroup;
use super::record::KeyspaceRecord;
use crate::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use crate::slot::splitmix64;
use std::collections::BTreeSet;

const STORES: u64 = 5;
/// Of them, those that records name primary.
const PRIMARIES: u64 = 3;
const SHARD: ShardKey = ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) };
const MS: u64 = 1_000_000;
const COURSES: u64 = 1000;
const STEPS: usize = 2000;

/// What is taken out, to see that its absence is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A holder that starts grants at once.
    StartsAtOnce,
    /// A lease is counted from the answer.
    CountsFromAnswer,
    /// What is given back is whatever the store was granted, in whichever tenure.
    ReleasesAll,
    /// A new version of the group is used at once.
    UsesGroupAtOnce,
    /// Holders grant under versions of the group that are over.
    GrantsUnderOldGroup,
    /// A holder grants without looking whom it has granted before.
    ForgetsGrants,
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        splitmix64(self.0) % bound
    }
}

struct Store {
    id: StoreId,
    /// Percent of the true rate.
    rate: u64,
    offset_ns: u64,
    accepted: KeyspaceRecord,
    known: KeyspaceRecord,
    accepted_group: u64,
    group: KnownGroup,
    grants: Grants,
    lease: Lease,
    tenure: u64,
}

impl Store {
    fn clock(&self, now_ms: u64) -> u64 {
        self.offset_ns + now_ms * MS / 100 * self.rate
    }

    fn is_primary(&self) -> bool {
        self.known.shards[0].primary == self.id
    }

    fn serves(&self, now_ms: u64) -> bool {
        self.is_primary() && self.lease.is_held(self.clock(now_ms))
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Renew,
    Granted,
    Release,
}

#[derive(Clone, Copy, Debug)]
struct Message {
    kind: Kind,
    from: StoreId,
    to: StoreId,
    asked: Asked,
    asked_ns: u64,
}

/// What is proposed, and who has accepted it.
struct Proposal<T> {
    value: T,
    votes: BTreeSet<StoreId>,
}

struct Course {
    fault: Fault,
    random: Random,
    now_ms: u64,
    stores: Vec<Store>,
    messages: Vec<Message>,
    record: KeyspaceRecord,
    next_record: Option<Proposal<KeyspaceRecord>>,
    group: HolderGroup,
    next_group: Option<Proposal<HolderGroup>>,
    /// How often a store came to serve after another one.
    changes: u64,
    served_last: Option<StoreId>,
}

fn is_majority(votes: &BTreeSet<StoreId>, group: &HolderGroup) -> bool {
    votes.intersection(&group.members).count() >= group.quorum()
}

impl Course {
    fn new(seed: u64, fault: Fault) -> Self {
        let mut random = Random(seed);
        let record = KeyspaceRecord::new(SHARD.keyspace, "0", &[StoreId(1)]).unwrap();
        let group = HolderGroup { version: 1, members: (1..=3).map(StoreId).collect() };
        let mut store = |id| {
            let offset_ns = random.below(100_000) * MS;
            Store {
                id: StoreId(id),
                rate: [91, 100, 109][random.below(3) as usize],
                offset_ns,
                accepted: record.clone(),
                known: record.clone(),
                accepted_group: 1,
                group: KnownGroup::new(group.clone(), offset_ns),
                grants: Grants::new(offset_ns),
                lease: Lease::default(),
                tenure: u64::from(id),
            }
        };
        let stores = (1..=STORES as u32).map(&mut store).collect();
        Self {
            fault,
            random,
            now_ms: 0,
            stores,
            messages: Vec::new(),
            record,
            next_record: None,
            group,
            next_group: None,
            changes: 0,
            served_last: None,
        }
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..22 => self.now_ms += 1 + self.random.below(200),
            22..42 => {
                for index in 0..PRIMARIES as usize {
                    if self.random.below(2) == 0 {
                        self.send(index, Kind::Renew);
                    }
                }
            }
            42..75 => {
                let count = if self.random.below(3) == 0 { 1 } else { self.messages.len() };
                for _ in 0..count {
                    self.deliver();
                }
            }
            75..77 => {
                if !self.messages.is_empty() {
                    let index = self.random.below(self.messages.len() as u64) as usize;
                    self.messages.swap_remove(index);
                }
            }
            77 => self.restart(),
            78..80 => self.propose(),
            80..89 => self.vote(),
            89..99 => self.learn(),
            _ => {
                if self.random.below(3) == 0 {
                    self.propose_group();
                }
            }
        }
    }

    fn send(&mut self, index: usize, kind: Kind) {
        let store = &self.stores[index];
        if !store.is_primary() {
            return;
        }
        let (from, asked_ns) = (store.id, store.clock(self.now_ms));
        let asked = Asked {
            store: from,
            shard: SHARD,
            epoch: store.known.shards[0].epoch,
            tenure: store.tenure,
            group_version: store.group.group.version,
        };
        for to in store.group.group.members.iter().copied() {
            self.messages.push(Message { kind, from, to, asked, asked_ns });
        }
    }

    fn deliver(&mut self) {
        if self.messages.is_empty() {
            return;
        }
        // Some overtake others.
        let index = if self.random.below(4) == 0 { self.random.below(self.messages.len() as u64) as usize } else { 0 };
        let message = self.messages.remove(index);
        // What is given back comes late more often than not: that is when it may do harm.
        if matches!(message.kind, Kind::Release) && self.random.below(8) > 0 {
            self.messages.push(message);
            return;
        }
        let (fault, now_ms) = (self.fault, self.now_ms);
        let to = &mut self.stores[message.to.0 as usize - 1];
        let now_ns = to.clock(now_ms);
        match message.kind {
            Kind::Renew => {
                let newest = if to.accepted.epoch > to.known.epoch { &to.accepted } else { &to.known };
                let mut group_version = to.accepted_group.max(to.group.group.version);
                if fault == Fault::GrantsUnderOldGroup {
                    group_version = 0;
                }
                if fault == Fault::ForgetsGrants {
                    to.grants = Grants::new(0);
                }
                if to.grants.answer(&message.asked, Some(newest), group_version, now_ns).is_ok() {
                    let (from, to) = (message.to, message.from);
                    self.messages.push(Message { kind: Kind::Granted, from, to, ..message });
                }
            }
            Kind::Granted => {
                let asked = message.asked;
                if (asked.epoch, asked.tenure) == (to.known.shards[0].epoch, to.tenure) {
                    let asked_ns = if fault == Fault::CountsFromAnswer { now_ns } else { message.asked_ns };
                    to.lease.granted(message.from, asked.group_version, asked_ns, &to.group, now_ns);
                }
            }
            Kind::Release => {
                to.grants.release(&message.asked);
                if fault == Fault::ReleasesAll {
                    for tenure in 0..=message.asked.tenure + 10 * STORES {
                        to.grants.release(&Asked { tenure, ..message.asked });
                    }
                }
            }
        }
    }

    fn restart(&mut self) {
        let index = self.random.below(STORES) as usize;
        // In order: it gives back what it holds.
        if self.random.below(2) == 0 {
            self.send(index, Kind::Release);
        }
        let (fault, now_ms) = (self.fault, self.now_ms);
        let store = &mut self.stores[index];
        let now_ns = store.clock(now_ms);
        store.lease = Lease::default();
        store.tenure += STORES;
        store.grants = Grants::new(if fault == Fault::StartsAtOnce { 0 } else { now_ns });
        store.group = known_group(fault, store.group.group.clone(), now_ns);
    }

    fn propose(&mut self) {
        if self.next_record.is_some() {
            return;
        }
        let mut value = self.record.clone();
        value.epoch = Epoch(value.epoch.0 + 1);
        value.shards[0].epoch = value.epoch;
        value.shards[0].primary = StoreId(1 + self.random.below(PRIMARIES) as u32);
        self.next_record = Some(Proposal { value, votes: BTreeSet::new() });
    }

    fn propose_group(&mut self) {
        if self.next_group.is_some() {
            return;
        }
        // Any three: the old majority and the new one may have nobody in common.
        let mut members = BTreeSet::new();
        while members.len() < 3 {
            members.insert(StoreId(1 + self.random.below(STORES) as u32));
        }
        let value = HolderGroup { version: self.group.version + 1, members };
        self.next_group = Some(Proposal { value, votes: BTreeSet::new() });
    }

    /// A store accepts what is proposed; a majority makes it true. A change of the group takes majorities of the old and the new one.
    fn vote(&mut self) {
        let index = self.random.below(STORES) as usize;
        let store = &mut self.stores[index];
        if let Some(next) = &mut self.next_record {
            store.accepted = next.value.clone();
            next.votes.insert(store.id);
            if is_majority(&next.votes, &self.group) {
                self.record = next.value.clone();
                self.next_record = None;
            }
        }
        if let Some(next) = &mut self.next_group {
            store.accepted_group = next.value.version;
            next.votes.insert(store.id);
            if is_majority(&next.votes, &self.group) && is_majority(&next.votes, &next.value) {
                self.group = next.value.clone();
                self.next_group = None;
                // Votes of the old group are none of the new one's.
                self.next_record = None;
            }
        }
    }

    fn learn(&mut self) {
        let (record, group, now_ms, fault) = (self.record.clone(), self.group.clone(), self.now_ms, self.fault);
        let takes_group = self.random.below(2) == 0;
        let index = self.random.below(STORES) as usize;
        if takes_group {
            let store = &mut self.stores[index];
            if store.group.group != group {
                store.group = known_group(fault, group, store.clock(now_ms));
            }
        } else if self.stores[index].known != record {
            self.send(index, Kind::Release);
            let store = &mut self.stores[index];
            store.known = record;
            store.lease = Lease::default();
            store.tenure += STORES;
        }
    }

    fn check(&mut self) {
        let serving: Vec<StoreId> =
            self.stores.iter().filter(|store| store.serves(self.now_ms)).map(|store| store.id).collect();
        assert!(serving.len() <= 1, "{serving:?} serve at once at {} ms", self.now_ms);
        if let [serving] = serving.as_slice()
            && self.served_last != Some(*serving)
        {
            self.changes += 1;
            self.served_last = Some(*serving);
        }
    }
}

fn known_group(fault: Fault, group: HolderGroup, now_ns: u64) -> KnownGroup {
    let since_ns = if fault == Fault::UsesGroupAtOnce { now_ns.saturating_sub(GRANT_NS) } else { now_ns };
    KnownGroup::new(group, since_ns)
}

fn first_seed() -> u64 {
    let seed = std::env::var("VASTO_SEED").ok().and_then(|seed| seed.parse().ok());
    seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        now.as_nanos() as u64
    })
}

#[test]
fn two_stores_never_hold_a_lease_of_one_shard() {
    let first = first_seed();
    eprintln!("VASTO_SEED={first}");
    let mut changes = 0;
    for seed in 0..COURSES {
        let mut course = Course::new(first.wrapping_add(seed), Fault::None);
        for _ in 0..STEPS {
            course.step();
            course.check();
        }
        changes += course.changes;
    }
    eprintln!("{changes} times a store came to serve after another one");
    assert!(changes > COURSES, "the courses are too quiet to say anything: {changes} changes of who serves");
}

#[test]
fn with_any_rule_taken_out_two_stores_hold_a_lease() {
    let first = first_seed();
    eprintln!("VASTO_SEED={first}");
    let faults = [
        Fault::StartsAtOnce,
        Fault::CountsFromAnswer,
        Fault::ReleasesAll,
        Fault::UsesGroupAtOnce,
        Fault::GrantsUnderOldGroup,
        Fault::ForgetsGrants,
    ];
    for fault in faults {
        let fails = |seed| {
            let mut course = Course::new(first.wrapping_add(seed), fault);
            (0..STEPS).any(|_| {
                course.step();
                course.stores.iter().filter(|store| store.serves(course.now_ms)).count() > 1
            })
        };
        let found = (0..20 * COURSES).find(|seed| fails(*seed));
        eprintln!("{fault:?} is found in course {found:?}");
        assert!(found.is_some(), "{fault:?} makes no difference");
    }
}
