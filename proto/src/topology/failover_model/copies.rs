//! Every course that the copies of one shard can take through writes, vacancies, planned changes, crashes and returns: what was answered is
//! in whatever serves later.
//!
//! Taken from the other model (`leases`): chosen records are one line; one store at a time has a lease, and gets it only under the newest
//! chosen record; answers leave under it. It runs out at any time.
//!
//! A write is a bit, and a copy's content a set of them: rows are values with stamps, so merging is union. A log entry that was written may
//! still arrive at whoever follows its era's epoch, however late, also when its primary has died and lost it. A status is what a fenced copy
//! holds, since that does not change any more: the master hears of any subset, as if the others' reports were lost. Applying is
//! durable at once, because nobody is told of it earlier. A crash of a primary may take the end of its log that it has not answered for (a
//! power cut under `fsync=always`, or kill -9, which takes nothing). A follower's crash is the loss of what it was sent: nothing happens.
//! What is executed late, after the lease it entered under, is a write without a lease.

use stateright::{Model, Property};

const STORES: usize = 3;
const NOBODY: u8 = STORES as u8;
/// Room in a state, enough for all bounds below; an index beyond it is a panic.
const VERSIONS: usize = 11;
const ERAS: usize = 8;
/// A log has each write at most once in an era.
const ENTRIES: usize = 3;

/// What is taken out of the protocol, to see that the model misses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A store gets a lease while another's grants are still valid.
    LeaseWait,
    /// The next primary is chosen by statuses of copies that go on following.
    Vacancy,
    /// One status fewer is enough.
    Quorum,
    /// Any copy that was heard is chosen.
    Greatest,
    /// Answers leave before replicas have what they saw.
    Replicas,
    /// Reads of what was there before the era leave before replicas have reached its start.
    Inherited,
    /// A restarted primary goes on in its era.
    EraOfEpoch,
    /// A follower calls what it applies by the leader's era before it has reached that era's start.
    EarlyEra,
    /// A primary that was to take the end of the log of the one before counts as having it.
    Appointed,
    /// A replica is removed in one step.
    Removal,
    /// A learner need not be heard, and cannot be chosen.
    Learner,
    /// A learner is removed before the replicas that stay have what it may have counted for.
    Steadiness,
}

#[derive(Clone, Copy, Debug)]
struct Bounds {
    fault: Fault,
    /// The primary and the replicas at the start.
    copies: u8,
    min_replicas: u8,
    writes: u8,
    /// Versions of the record beyond the first.
    changes: u8,
    crashes: u8,
    /// Changes that are planned ones.
    planned: u8,
    /// Changes that remove a replica.
    removals: u8,
    /// Whether each state is asked if the copies would find together.
    healing: Healing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Healing {
    Unasked,
    Asked,
}

/// One version; the epoch is the shard's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Record {
    epoch: u8,
    primary: u8,
    replicas: u8,
    learners: u8,
    previous: u8,
}

/// Eras are numbered as they begin, which is their order: one begins only under the newest epoch. The sequence counts from the era's start;
/// negative: behind it, which only a fault makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Position {
    era: u8,
    sequence: i8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Era {
    epoch: u8,
    /// Where its lineage stood; of the first era: nowhere.
    parent: Position,
    entries: [u8; ENTRIES],
    length: u8,
    /// One more than the sequence number of which the primary may know that a store has applied it; 0: not even the start.
    applied: [u8; STORES],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Store {
    /// Number of the version that it follows.
    version: u8,
    /// Without one it has no copy.
    position: Option<Position>,
    content: u8,
    leads: bool,
    lease: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct World {
    records: [Record; VERSIONS],
    newest: u8,
    stores: [Store; STORES],
    eras: [Era; ERAS],
    era_count: u8,
    writes: u8,
    crashes: u8,
    planned: u8,
    removals: u8,
    /// What clients were told: written, or read.
    answered: u8,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Vacate,
    Choose {
        heard: u8,
        store: u8,
    },
    Plan {
        target: u8,
    },
    /// A replica becomes a learner.
    Demote {
        store: u8,
    },
    /// A learner is no copy any more.
    Remove {
        store: u8,
    },
    Learn {
        store: u8,
        version: u8,
    },
    /// Gets the lease and, if it does not lead yet, begins an era.
    Lead {
        store: u8,
    },
    Lapse {
        store: u8,
    },
    Write {
        store: u8,
    },
    Answer {
        store: u8,
    },
    Apply {
        store: u8,
        era: u8,
    },
    HandOver {
        store: u8,
    },
    Copy {
        store: u8,
    },
    /// `kept`: how much of its last era's log is still there.
    Crash {
        store: u8,
        kept: i8,
    },
}

impl Record {
    fn followers(&self) -> u8 {
        self.replicas | self.learners
    }
}

fn bit(store: u8) -> u8 {
    1 << store
}

/// A place in a log: the position there, how many entries came before it, and what the entry that leads there wrote (nothing: an era starts).
#[derive(Clone, Copy)]
struct Place {
    position: Position,
    entries: i8,
    wrote: u8,
}

impl World {
    fn record(&self) -> Record {
        self.records[usize::from(self.newest)]
    }

    fn followed(&self, store: u8) -> Record {
        self.records[usize::from(self.stores[usize::from(store)].version)]
    }

    fn era(&self, era: u8) -> &Era {
        &self.eras[usize::from(era)]
    }

    /// The log that ends at a position, from the very beginning.
    fn log_to(&self, end: Position) -> Vec<Place> {
        let mut log = if end.era == 0 { Vec::with_capacity(16) } else { self.log_to(self.era(end.era).parent) };
        let entries = log.last().map_or(0, |place| place.entries);
        log.push(Place { position: Position { era: end.era, sequence: 0 }, entries, wrote: 0 });
        if end.sequence < 0 {
            // Short of the era's start by so many entries.
            log.retain(|place| place.entries <= entries + end.sequence);
        }
        for sequence in 1..=end.sequence {
            let wrote = self.era(end.era).entries[sequence as usize - 1];
            log.push(Place { position: Position { era: end.era, sequence }, entries: entries + sequence, wrote });
        }
        log
    }

    fn content_of(&self, position: Position) -> u8 {
        self.log_to(position).iter().fold(0, |content, place| content | place.wrote)
    }

    /// Where in a log a position lies.
    fn find(log: &[Place], position: Position) -> Option<usize> {
        if position.sequence >= 0 {
            return log.iter().position(|place| place.position == position);
        }
        let start = log.iter().find(|place| place.position == Position { sequence: 0, ..position })?;
        log.iter().position(|place| place.entries == start.entries + position.sequence)
    }

    /// The primary that a store's record names, if it leads under the same epoch.
    fn leader_of(&self, store: u8) -> Option<u8> {
        let record = self.followed(store);
        let primary = self.stores.get(usize::from(record.primary))?;
        let leads = primary.leads && self.followed(record.primary).epoch == record.epoch;
        (leads && record.primary != store && record.followers() & bit(store) != 0).then_some(record.primary)
    }

    /// How far the log may be that a store can be sent, by era: that of its epoch's primary; or to the new primary of a planned change
    /// that of the one before, which has stopped.
    fn source(&self, store: u8, era: u8) -> Option<Position> {
        let record = self.followed(store);
        if self.era(era).epoch == record.epoch && record.primary != store && record.followers() & bit(store) != 0 {
            return Some(Position { era, sequence: self.era(era).length as i8 });
        }
        let previous = self.stores.get(usize::from(record.previous))?;
        let end = previous.position.filter(|end| end.era == era)?;
        let sends = record.primary == store && self.followed(record.previous).epoch == record.epoch;
        (sends && !self.stores[usize::from(store)].leads).then_some(end)
    }

    /// Whether a planned new primary has all of the one before, or need not.
    fn has_end_of_previous(&self, store: u8) -> bool {
        let record = self.followed(store);
        let Some(previous) = self.stores.get(usize::from(record.previous)) else { return true };
        if self.followed(record.previous).epoch != record.epoch {
            return false;
        }
        let (Some(end), Some(position)) = (previous.position, self.stores[usize::from(store)].position) else {
            return false;
        };
        Self::find(&self.log_to(position), end).is_some()
    }

    /// One more than up to where in its log enough replicas of the record that a primary follows have come.
    fn reached(&self, bounds: &Bounds, store: u8, era: u8) -> u8 {
        let replicas = self.followed(store).replicas;
        let counts = (0..STORES as u8).filter(|replica| replicas & bit(*replica) != 0);
        let mut applied: Vec<u8> = counts.map(|replica| self.era(era).applied[usize::from(replica)]).collect();
        applied.sort_unstable_by(|one, other| other.cmp(one));
        applied.get(usize::from(bounds.min_replicas) - 1).copied().unwrap_or(0)
    }

    /// Whether the newest record's replicas have all that the primary can have answered for under an earlier version.
    fn is_steady(&self, bounds: &Bounds) -> bool {
        let primary = self.record().primary;
        let state = &self.stores[usize::from(primary)];
        let position = state.position.filter(|_| state.leads && state.version == self.newest);
        position.is_some_and(|it| i16::from(self.reached(bounds, primary, it.era)) > i16::from(it.sequence))
    }

    /// What a store may answer for: the content of its log up to where enough replicas have applied it.
    fn answerable(&self, bounds: &Bounds, store: u8) -> u8 {
        let primary = &self.stores[usize::from(store)];
        let Some(position) = primary.position else { return 0 };
        if bounds.fault == Fault::Replicas {
            return primary.content;
        }
        let era = self.era(position.era);
        let reached = self.reached(bounds, store, position.era);
        match reached.checked_sub(1) {
            Some(sequence) => {
                let sequence = (sequence as i8).min(position.sequence);
                self.content_of(Position { sequence, ..position })
            }
            None if bounds.fault == Fault::Inherited && position.era != 0 => self.content_of(era.parent),
            None => 0,
        }
    }

    /// Whether the statuses that were heard are enough to say what was acknowledged under a record.
    fn is_enough(&self, bounds: &Bounds, record: Record, heard: u8) -> bool {
        let enough = |primary: u8, others: u8| {
            let missing = u32::from(bounds.fault == Fault::Quorum);
            let needed = (others.count_ones() + 1).saturating_sub(u32::from(bounds.min_replicas) + missing);
            heard & bit(primary) != 0 || (heard & others).count_ones() >= needed.max(1)
        };
        let begun = || {
            let status = &self.stores[usize::from(record.primary)];
            let epoch = status.position.map(|position| self.era(position.era).epoch);
            heard & bit(record.primary) != 0 && epoch == Some(record.epoch)
        };
        let others = if bounds.fault == Fault::Learner { record.replicas } else { record.followers() };
        enough(record.primary, others)
            && (record.previous == NOBODY || bounds.fault == Fault::Appointed || begun() || {
                let others = (others | bit(record.primary)) & !bit(record.previous);
                enough(record.previous, others)
            })
    }

    /// The newest version that names a primary.
    fn vacated(&self) -> Record {
        let mut versions = self.records[..=usize::from(self.newest)].iter().rev();
        *versions.find(|record| record.primary != NOBODY).expect("the first version names a primary")
    }

    fn choices(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        let record = self.record();
        let asked = if bounds.fault == Fault::Learner { record.replicas } else { record.followers() };
        let vacated = self.vacated();
        for heard in 1..1u8 << STORES {
            let speaks = |store: u8| {
                let fenced = bounds.fault == Fault::Vacancy || self.followed(store).epoch == record.epoch;
                asked & bit(store) != 0 && fenced
            };
            let heard_by = || (0..STORES as u8).filter(|store| heard & bit(*store) != 0);
            if !heard_by().all(speaks) || !self.is_enough(bounds, vacated, heard) {
                continue;
            }
            let position = |store: u8| self.stores[usize::from(store)].position;
            let greatest = heard_by().filter_map(position).max();
            let can_be = |store: &u8| match position(*store) {
                Some(_) if bounds.fault == Fault::Greatest => true,
                own => own.is_some() && own == greatest,
            };
            actions.extend(heard_by().filter(can_be).map(|store| Action::Choose { heard, store }));
        }
    }

    fn propose(&mut self, record: Record) {
        self.newest += 1;
        self.records[usize::from(self.newest)] = record;
    }

    fn confirm(&mut self, store: u8) {
        let Some(position) = self.stores[usize::from(store)].position else { return };
        let applied = &mut self.eras[usize::from(position.era)].applied[usize::from(store)];
        let reached = u8::try_from(position.sequence + 1).unwrap_or(0);
        *applied = reached.max(*applied);
    }

    fn append(&mut self, store: u8, wrote: u8) -> Option<()> {
        let primary = &mut self.stores[usize::from(store)];
        let position = primary.position.as_mut()?;
        let era = &mut self.eras[usize::from(position.era)];
        era.entries[usize::from(era.length)] = wrote;
        era.length += 1;
        position.sequence += 1;
        primary.content |= wrote;
        Some(())
    }

    fn begin(&mut self, bounds: &Bounds, store: u8) -> Option<()> {
        let (epoch, position) = (self.followed(store).epoch, self.stores[usize::from(store)].position?);
        self.stores[usize::from(store)].leads = true;
        if bounds.fault == Fault::EraOfEpoch && self.era(position.era).epoch == epoch {
            // What it lost is written over.
            let era = &mut self.eras[usize::from(position.era)];
            era.length = position.sequence as u8;
            era.entries[usize::from(era.length)..].fill(0);
            return Some(());
        }
        let number = self.era_count;
        self.eras[usize::from(number)] = Era { epoch, parent: position, ..Era::default() };
        self.era_count += 1;
        self.stores[usize::from(store)].position = Some(Position { era: number, sequence: 0 });
        Some(())
    }

    fn apply(&mut self, bounds: &Bounds, store: u8, era: u8) -> Option<()> {
        let end = self.source(store, era)?;
        let log = self.log_to(end);
        let before = self.stores[usize::from(store)].position?;
        let mut at = Self::find(&log, before)? + 1;
        let wrote = log.get(at)?.wrote;
        // The position is called by the newest era that starts there.
        while log.get(at + 1).is_some_and(|next| next.wrote == 0) {
            at += 1;
        }
        let mut after = log[at].position;
        if bounds.fault == Fault::EarlyEra {
            let start = log.iter().find(|place| place.position == Position { era, sequence: 0 })?;
            after = Position { era, sequence: log[at].entries - start.entries };
        }
        let follower = &mut self.stores[usize::from(store)];
        follower.content |= wrote;
        follower.position = Some(after);
        self.confirm(store);
        Some(())
    }

    /// The leader, if the store's copy cannot go on in its log.
    fn differs_from(&self, store: u8) -> Option<u8> {
        let leader = self.leader_of(store)?;
        let end = self.stores[usize::from(leader)].position?;
        let position = self.stores[usize::from(store)].position?;
        Self::find(&self.log_to(end), position).is_none().then_some(leader)
    }

    fn take(&mut self, bounds: &Bounds, action: Action) -> Option<()> {
        match action {
            Action::Vacate => {
                let record = self.record();
                let replicas = record.replicas | bit(record.primary);
                self.propose(Record { epoch: record.epoch + 1, primary: NOBODY, replicas, previous: NOBODY, ..record });
            }
            Action::Choose { heard: _, store } => {
                let record = self.record();
                let mut replicas = record.replicas & !bit(store);
                if record.primary != NOBODY {
                    replicas |= bit(record.primary);
                }
                let learners = record.learners & !bit(store);
                let epoch = record.epoch + 1;
                self.propose(Record { epoch, primary: store, replicas, learners, previous: NOBODY });
            }
            Action::Plan { target } => {
                let record = self.record();
                self.planned += 1;
                let replicas = (record.replicas | bit(record.primary)) & !bit(target);
                let previous = record.primary;
                self.propose(Record { epoch: record.epoch + 1, primary: target, replicas, previous, ..record });
            }
            Action::Demote { store } => {
                let record = self.record();
                self.removals += 1;
                let replicas = record.replicas & !bit(store);
                self.propose(Record { replicas, learners: record.learners | bit(store), ..record });
            }
            Action::Remove { store } => {
                let record = self.record();
                let replicas = record.replicas & !bit(store);
                self.propose(Record { replicas, learners: record.learners & !bit(store), ..record });
            }
            Action::Learn { store, version } => {
                let before = self.followed(store);
                self.stores[usize::from(store)].version = version;
                let record = self.followed(store);
                let follower = &mut self.stores[usize::from(store)];
                if before.epoch != record.epoch {
                    (follower.leads, follower.lease) = (false, false);
                }
                if record.primary != store && record.followers() & bit(store) == 0 {
                    (follower.position, follower.content) = (None, 0);
                }
            }
            Action::Lead { store } => {
                self.stores[usize::from(store)].lease = true;
                if !self.stores[usize::from(store)].leads {
                    self.begin(bounds, store)?;
                }
            }
            Action::Lapse { store } => self.stores[usize::from(store)].lease = false,
            Action::Write { store } => {
                self.append(store, 1 << self.writes)?;
                self.writes += 1;
            }
            Action::Answer { store } => self.answered |= self.answerable(bounds, store),
            Action::Apply { store, era } => self.apply(bounds, store, era)?,
            Action::HandOver { store } => {
                let leader = self.differs_from(store)?;
                let missing = self.stores[usize::from(store)].content & !self.stores[usize::from(leader)].content;
                self.append(leader, missing)?;
            }
            Action::Copy { store } => {
                let leader = self.stores[usize::from(self.differs_from(store)?)];
                let follower = &mut self.stores[usize::from(store)];
                (follower.position, follower.content) = (leader.position, leader.content);
                self.confirm(store);
            }
            Action::Crash { store, kept } => {
                self.crashes += 1;
                let primary = &mut self.stores[usize::from(store)];
                (primary.leads, primary.lease) = (false, false);
                let position = primary.position.as_mut()?;
                let era = &self.eras[usize::from(position.era)];
                for lost in kept..position.sequence {
                    primary.content &= !era.entries[lost as usize];
                }
                position.sequence = kept;
            }
        }
        Some(())
    }

    /// The number of entries of its era that a leader has answered for, and therefore synced.
    fn synced(&self, position: Position) -> i8 {
        let era = self.era(position.era);
        let of_answered = |sequence: &i8| era.entries[*sequence as usize - 1] & self.answered != 0;
        (1..=position.sequence).rev().find(of_answered).unwrap_or(0)
    }
}

impl World {
    /// Whether the copies find together, and all that they have is answered, once everybody is up and hears everybody.
    fn heals(&self, bounds: &Bounds) -> bool {
        let changes = VERSIONS as u8 - 1;
        let bounds = Bounds { changes, writes: 0, crashes: 0, planned: 0, removals: 0, ..*bounds };
        let mut world = *self;
        loop {
            let mut actions = Vec::new();
            bounds.actions(&world, &mut actions);
            let ranked = actions.into_iter().filter_map(|action| Some((world.rank(action)?, action)));
            let next = ranked.filter_map(|(rank, action)| Some((rank, bounds.next_state(&world, action)?)));
            match next.min_by_key(|(rank, _)| *rank) {
                Some((_, after)) => world = after,
                None => return world.is_healed(&bounds),
            }
        }
    }

    /// In which order those act that do all they can; `None`: not while things heal.
    fn rank(&self, action: Action) -> Option<u8> {
        let record = self.record();
        let leads = |store: u8| self.stores.get(usize::from(store)).is_some_and(|state| state.leads);
        let (rank, is_asked) = match action {
            Action::Learn { version, .. } => (0, version == self.newest),
            Action::Choose { heard, .. } => (1, heard == record.followers()),
            Action::Lapse { store } => (2, store != record.primary),
            Action::Lead { .. } => (3, true),
            Action::Apply { .. } | Action::HandOver { .. } | Action::Copy { .. } | Action::Answer { .. } => (4, true),
            // A planned change that cannot be made is given up.
            Action::Vacate => (5, !leads(record.primary)),
            Action::Plan { .. } | Action::Demote { .. } | Action::Remove { .. } => return None,
            Action::Write { .. } | Action::Crash { .. } => return None,
        };
        is_asked.then_some(rank)
    }

    fn is_healed(&self, bounds: &Bounds) -> bool {
        let record = self.record();
        let Some(primary) = self.stores.get(usize::from(record.primary)) else { return false };
        let followers = (0..STORES as u8).filter(|store| record.followers() & bit(*store) != 0);
        let mut followers = followers.map(|store| self.stores[usize::from(store)]);
        let is_equal = |it: Store| it.position == primary.position && it.content == primary.content;
        let can_answer = record.replicas.count_ones() >= u32::from(bounds.min_replicas);
        primary.leads && primary.lease && followers.all(is_equal) && (!can_answer || self.answered == primary.content)
    }
}

impl Model for Bounds {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let replicas = (1..self.copies).fold(0, |replicas, store| replicas | bit(store));
        let mut world = World { era_count: 1, ..World::default() };
        world.records[0] = Record { epoch: 1, primary: 0, replicas, learners: 0, previous: NOBODY };
        world.eras[0].epoch = 1;
        for store in 0..self.copies {
            world.stores[usize::from(store)].position = Some(Position { era: 0, sequence: 0 });
            if store > 0 {
                world.eras[0].applied[usize::from(store)] = 1;
            }
        }
        (world.stores[0].leads, world.stores[0].lease) = (true, true);
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let record = world.record();
        if world.newest < self.changes {
            if record.primary == NOBODY || self.fault == Fault::Vacancy {
                world.choices(self, actions);
            } else {
                actions.push(Action::Vacate);
            }
        }
        if world.newest < self.changes && record.primary != NOBODY {
            let position = world.stores[usize::from(record.primary)].position;
            // A planned change is made only of a primary that leads: its status says so.
            let has_begun = position.is_some_and(|position| world.era(position.era).epoch == record.epoch);
            for store in (0..STORES as u8).filter(|store| record.replicas & bit(*store) != 0) {
                if world.planned < self.planned && has_begun {
                    actions.push(Action::Plan { target: store });
                }
                if world.removals < self.removals {
                    actions.push(Action::Demote { store });
                    if self.fault == Fault::Removal {
                        actions.push(Action::Remove { store });
                    }
                }
            }
            let steady = self.fault == Fault::Steadiness || world.is_steady(self);
            let learners = (0..STORES as u8).filter(|store| steady && record.learners & bit(*store) != 0);
            actions.extend(learners.map(|store| Action::Remove { store }));
        }
        for store in 0..self.copies {
            let state = &world.stores[usize::from(store)];
            actions.extend((state.version + 1..=world.newest).map(|version| Action::Learn { store, version }));
            let is_newest = world.followed(store).epoch == record.epoch && record.primary == store;
            let others = world.stores.iter().any(|other| other.lease);
            if is_newest
                && !state.lease
                && (!others || self.fault == Fault::LeaseWait)
                && world.has_end_of_previous(store)
            {
                actions.push(Action::Lead { store });
            }
            if state.lease {
                actions.push(Action::Lapse { store });
                actions.push(Action::Answer { store });
            }
            if let Some(position) = state.position.filter(|_| state.leads) {
                if world.writes < self.writes {
                    actions.push(Action::Write { store });
                }
                if world.crashes < self.crashes {
                    let kept = world.synced(position)..=position.sequence;
                    actions.extend(kept.map(|kept| Action::Crash { store, kept }));
                }
            }
            actions.extend((0..world.era_count).map(|era| Action::Apply { store, era }));
            if let Some(leader) = world.differs_from(store) {
                let has_more = state.content & !world.stores[usize::from(leader)].content != 0;
                if has_more {
                    actions.push(Action::HandOver { store });
                } else {
                    actions.push(Action::Copy { store });
                }
            }
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = *before;
        world.take(self, action)?;
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(NOTHING_LOST, |_, world: &World| {
                let serving = world.stores.iter().filter(|store| store.leads && store.lease);
                serving.into_iter().all(|store| world.answered & !store.content == 0)
            }),
            Property::always(NO_GAP, |_, world: &World| {
                let content = |store: &Store| store.position.map_or(0, |position| world.content_of(position));
                world.stores.iter().all(|store| store.content == content(store))
            }),
            Property::sometimes(PROMOTED, |_, world: &World| {
                let eras = &world.eras[1..usize::from(world.era_count)];
                world.stores[1..].iter().any(|store| store.leads && store.lease)
                    && eras
                        .iter()
                        .any(|era| era.epoch > 2 && era.entries.iter().any(|entry| entry & world.answered != 0))
            }),
            Property::sometimes(RETURNED, |_, world: &World| {
                // Something that only the first era had is in a later one's log, and the first primary follows there.
                let later = &world.eras[1..usize::from(world.era_count)];
                let handed = |era: &Era| era.epoch > 1 && era.entries.iter().any(|it| it & world.handed_over() != 0);
                let position = world.stores[0].position;
                later.iter().any(handed)
                    && !world.stores[0].leads
                    && position.is_some_and(|it| world.era(it.era).epoch > 1)
            }),
        ];
        if self.healing == Healing::Asked {
            properties.push(Property::always(HEALS, |bounds, world: &World| world.heals(bounds)));
        }
        if self.removals > 0 {
            properties.push(Property::sometimes(REMOVED, |_, world: &World| {
                world.stores[1..].iter().any(|store| store.position.is_none())
            }));
        }
        if self.planned > 0 {
            properties.push(Property::sometimes(PLANNED, |_, world: &World| {
                let took_over =
                    |store: u8| world.followed(store).previous != NOBODY && world.stores[usize::from(store)].leads;
                (0..STORES as u8).any(took_over)
            }));
        }
        properties
    }
}

impl World {
    /// Writes of the first era.
    fn handed_over(&self) -> u8 {
        self.eras[0].entries.iter().fold(0, |writes, entry| writes | entry)
    }
}

const NOTHING_LOST: &str = "what was answered is in whatever serves";
const NO_GAP: &str = "a copy has exactly what its position says";
const PROMOTED: &str = "a replica is promoted and a write is answered under it";
const RETURNED: &str = "the first primary returns, hands over what only it has, and follows";
const HEALS: &str = "the copies find together, and all that they have is answered, once everybody hears everybody";
const REMOVED: &str = "a replica is removed";
const PLANNED: &str = "a planned change is made";

/// Two failovers, one after the other, and a restart.
const BOUNDS: Bounds = Bounds {
    fault: Fault::None,
    copies: 3,
    min_replicas: 1,
    writes: 2,
    changes: 4,
    crashes: 1,
    planned: 0,
    removals: 0,
    healing: Healing::Unasked,
};
const PLANNED_CHANGE: Bounds = Bounds { planned: 1, ..BOUNDS };
const REMOVED_REPLICA: Bounds = Bounds { removals: 1, ..BOUNDS };

/// The shortest way to a wrong state.
fn refute(bounds: Bounds, fault: Fault) {
    super::refute(Bounds { fault, ..bounds }, &[NOTHING_LOST]);
}

#[test]
fn no_course_of_three_copies_loses_what_was_answered() {
    super::check(BOUNDS);
}

#[test]
fn no_course_of_two_copies_loses_what_was_answered() {
    let two = Bounds { copies: 2, writes: 3, ..BOUNDS };
    super::check(super::bounds(two, Bounds { planned: 1, ..two }));
}

#[test]
fn no_course_that_waits_for_both_replicas_loses_what_was_answered() {
    super::check(super::bounds(Bounds { min_replicas: 2, crashes: 0, ..BOUNDS }, Bounds { min_replicas: 2, ..BOUNDS }));
}

#[test]
fn no_course_with_a_planned_change_loses_what_was_answered() {
    super::check(super::bounds(Bounds { crashes: 0, ..PLANNED_CHANGE }, PLANNED_CHANGE));
}

#[test]
fn no_course_with_a_removed_replica_loses_what_was_answered() {
    super::check(super::bounds(Bounds { crashes: 0, ..REMOVED_REPLICA }, REMOVED_REPLICA));
}

#[test]
fn every_course_heals() {
    let failover = Bounds { changes: 2, planned: 1, healing: Healing::Asked, ..BOUNDS };
    super::check(super::bounds(failover, Bounds { changes: 3, ..failover }));
}

#[test]
fn a_lease_must_wait_for_the_one_before() {
    refute(BOUNDS, Fault::LeaseWait);
}

#[test]
fn copies_must_stop_following_before_one_is_chosen() {
    refute(BOUNDS, Fault::Vacancy);
}

#[test]
fn enough_copies_must_be_heard() {
    refute(BOUNDS, Fault::Quorum);
}

#[test]
fn the_greatest_position_must_be_chosen() {
    refute(BOUNDS, Fault::Greatest);
}

#[test]
fn answers_must_wait_for_replicas() {
    refute(BOUNDS, Fault::Replicas);
}

#[test]
fn answers_must_wait_until_replicas_have_reached_the_start_of_the_era() {
    refute(BOUNDS, Fault::Inherited);
}

#[test]
fn a_restarted_primary_must_begin_an_era() {
    refute(BOUNDS, Fault::EraOfEpoch);
}

#[test]
fn a_follower_must_not_be_in_an_era_before_its_start() {
    refute(BOUNDS, Fault::EarlyEra);
}

#[test]
fn a_planned_primary_must_have_begun_to_be_heard_alone() {
    refute(PLANNED_CHANGE, Fault::Appointed);
}

#[test]
fn a_replica_must_not_be_removed_in_one_step() {
    refute(REMOVED_REPLICA, Fault::Removal);
}

#[test]
fn a_learner_must_be_heard() {
    refute(REMOVED_REPLICA, Fault::Learner);
}

#[test]
fn a_learner_must_be_kept_until_the_replicas_have_what_it_has() {
    refute(REMOVED_REPLICA, Fault::Steadiness);
}
