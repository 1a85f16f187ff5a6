//! Copies of shards, streams between them, and what each can do next.

use std::collections::BTreeSet;

use super::line::{COPIES, Line, SHARDS, SLOTS, Step};
use super::{Bounds, Clocks, Fault};
use crate::topology::Phase;

/// Messages that are on their way of one move; more would only be older ones of the same row.
const ON_THE_WAY: usize = 2;
/// The clock of stores that are ahead, in stamps; the others' stands at 0.
const CLOCK_AHEAD: u8 = 9;

/// One copy, and its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub shard: u8,
    pub copy: u8,
}

/// What stands for a key: which write it is of, and when that was. Write 0: there is no row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Row {
    write: u8,
    /// Only if the clocks differ; else writes are stamped in their order.
    stamp: u8,
}

/// All of it is on disk but what says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Copy {
    /// The version of the record that is on disk.
    version: u8,
    /// In memory: the version by which it serves. Another one only until running operations on slots that it loses have ended.
    follows: u8,
    /// When the shard began that it is a copy of.
    born: u8,
    rows: [Row; SLOTS],
    /// The largest stamp that it has given or must be above.
    bound: u8,
    foreign: bool,
    /// By slot that comes: the version that set the fence up to which everything is here; 0: of none.
    drained: [u8; SLOTS],
    /// In memory: slots with an operation that has done the first half of a write.
    halves: u8,
    /// Of a replica: it has taken over what its primary has, under the epoch that it follows.
    joined: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    /// A group of rows as they were.
    Copied(Row),
    Changed(Row),
    End {
        fence: u8,
        stamps_above: u8,
    },
}

/// The stream of one move, in the memory of both who take part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Stream {
    operation: u8,
    source: Place,
    target: Place,
    /// The source's shard epoch.
    epoch: u8,
    /// Whether the source notes what changes.
    notes: bool,
    /// The group has been read and sent.
    copied: bool,
    /// The key is noted.
    changed: bool,
    /// The fence whose end has been sent.
    ended: u8,
    messages: Vec<Message>,
    /// The target has the group.
    arrived: bool,
}

/// A target's report that everything is there; it stays with some master for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Report {
    slot: u8,
    fence: u8,
    /// The target's shard epoch.
    epoch: u8,
}

/// What clients did with the key of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Register {
    writes: u8,
    /// Which of them took the row away.
    removals: u8,
    /// The latest write that a client was told of.
    told: u8,
    /// Where it was told of that first.
    told_at: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    line: Line,
    copies: [[Copy; COPIES]; SHARDS],
    streams: [Option<Stream>; SLOTS],
    reports: BTreeSet<Report>,
    registers: [Register; SLOTS],
    crashes: u8,
    breaks: u8,
    /// A merge replaced a row by one that was known to be older.
    taken_back: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// A master, or a source, makes the next version from the one of a number.
    Change {
        base: u8,
        step: Step,
    },
    /// A store writes a version to its disk.
    Learn {
        at: Place,
        version: u8,
    },
    /// Nothing of the old ownership runs any more.
    Flip {
        at: Place,
    },
    Restart {
        at: Place,
    },
    /// The first half of a write, and the second; the row is written in one and noted as changed in the other.
    Write {
        at: Place,
        slot: u8,
        removes: bool,
    },
    EndWrite {
        at: Place,
        slot: u8,
    },
    /// A client is told of what the row says.
    Answer {
        at: Place,
        slot: u8,
    },
    /// The replica takes over what the primary has, after it has handed over what only it has.
    Replicate {
        shard: u8,
    },
    Open {
        at: Place,
        slot: u8,
    },
    Break {
        slot: u8,
    },
    SendRows {
        slot: u8,
    },
    SendChange {
        slot: u8,
    },
    SendEnd {
        slot: u8,
    },
    Receive {
        slot: u8,
        number: u8,
    },
    Report {
        at: Place,
        slot: u8,
    },
    Clean {
        at: Place,
    },
    // Only without a rule:
    Note {
        slot: u8,
    },
    Reattach {
        slot: u8,
    },
    LiftAlone {
        at: Place,
    },
    Forget {
        slot: u8,
    },
}

fn bit(slot: u8) -> u8 {
    1 << slot
}

fn places() -> impl Iterator<Item = Place> {
    (0..SHARDS as u8).flat_map(|shard| (0..COPIES as u8).map(move |copy| Place { shard, copy }))
}

impl World {
    /// After what the bounds say has been done.
    pub fn new(bounds: &Bounds) -> Self {
        let line = Line::new(bounds.from, bounds.to[0], bounds.moves, bounds.replicas);
        let mut copies = [[Copy::default(); COPIES]; SHARDS];
        for copy in copies.as_flattened_mut() {
            copy.joined = true;
        }
        let mut world = Self {
            line,
            copies,
            streams: [const { None }; SLOTS],
            reports: BTreeSet::new(),
            registers: [Register::default(); SLOTS],
            crashes: 0,
            breaks: 0,
            taken_back: false,
        };
        for action in bounds.prelude {
            let mut actions = Vec::new();
            world.actions(bounds, &mut actions);
            assert!(actions.contains(action), "{action:?} is none of {actions:?}");
            world.take(bounds, *action).expect("it can be done");
        }
        world
    }

    fn copy(&self, at: Place) -> &Copy {
        &self.copies[usize::from(at.shard)][usize::from(at.copy)]
    }

    fn copy_mut(&mut self, at: Place) -> &mut Copy {
        &mut self.copies[usize::from(at.shard)][usize::from(at.copy)]
    }

    fn newest(&self) -> &super::line::Version {
        self.line.version(self.line.newest())
    }

    /// The version on a store's disk.
    fn record(&self, at: Place) -> &super::line::Version {
        self.line.version(self.copy(at).version)
    }

    fn has_copy(&self, at: Place) -> bool {
        self.record(at).has_copy(at.shard, at.copy)
    }

    fn leads(&self, at: Place) -> bool {
        self.record(at).primary(at.shard) == Some(at.copy)
    }

    /// Without a replica none is needed. With one a primary has it until a later epoch is chosen: that waits for it.
    fn has_lease(&self, at: Place) -> bool {
        let record = self.record(at);
        let epoch = record.shard_epoch(at.shard);
        self.leads(at) && (record.replica(at.shard).is_none() || epoch == self.newest().shard_epoch(at.shard))
    }

    /// Slots that a copy may serve by what it follows, as bits.
    fn owned(&self, bounds: &Bounds, at: Place) -> u8 {
        let copy = self.copy(at);
        let version = self.line.version(copy.follows);
        let served = version.served(at.shard);
        let drained = (0..SLOTS as u8).filter(|slot| copy.drained[usize::from(*slot)] != 0);
        match bounds.fault {
            Fault::Fence => version.assigned(at.shard),
            Fault::Activation => served | drained.fold(0, |slots, slot| slots | bit(slot)),
            _ => served,
        }
    }

    fn serves(&self, bounds: &Bounds, at: Place, slot: u8) -> bool {
        self.has_lease(at) && self.owned(bounds, at) & bit(slot) != 0
    }

    fn reads(&self, bounds: &Bounds, at: Place, slot: u8) -> bool {
        let behind_fence = || self.line.version(self.copy(at).follows).assigned(at.shard) & bit(slot) != 0;
        self.serves(bounds, at, slot) || bounds.fault == Fault::ReadsFenced && self.has_lease(at) && behind_fence()
    }

    fn row(&self, at: Place, slot: u8) -> Row {
        self.copy(at).rows[usize::from(slot)]
    }

    fn register(&self, slot: u8) -> &Register {
        &self.registers[usize::from(slot)]
    }

    /// The replica that a primary's record names, if it follows it.
    fn replica_of(&self, at: Place) -> Option<Place> {
        let record = self.record(at);
        let replica = Place { shard: at.shard, copy: record.replica(at.shard)? };
        let its = self.record(replica);
        let follows = its.replica(at.shard) == Some(replica.copy)
            && its.shard_epoch(at.shard) == record.shard_epoch(at.shard)
            && self.copy(replica).born == self.copy(at).born;
        (self.leads(at) && follows).then_some(replica)
    }

    /// Whether a copy's replica, if its record names one, has as much of a slot.
    fn is_replicated(&self, bounds: &Bounds, at: Place, slot: u8) -> bool {
        let number = usize::from(slot);
        let is_equal = |replica: Place| {
            let (one, other) = (self.copy(at), self.copy(replica));
            let note = one.drained[number] == other.drained[number] || !bounds.fault.logs_note();
            other.joined && one.rows[number] == other.rows[number] && note
        };
        self.record(at).replica(at.shard).is_none() || self.replica_of(at).is_some_and(is_equal)
    }

    /// Which write a client sees; of no row: the earliest that may be meant. `None`: something that is older than what was told.
    fn seen(&self, at: Place, slot: u8) -> Option<u8> {
        let register = self.register(slot);
        let write = self.row(at, slot).write;
        let is_removal = |write: &u8| *write == 0 || register.removals & bit(*write) != 0;
        if write != 0 { Some(write) } else { (register.told..=register.writes).find(is_removal) }
            .filter(|write| *write >= register.told)
    }

    /// The stream through which a source's changes go.
    fn outgoing(&mut self, at: Place, slot: u8) -> Option<&mut Stream> {
        self.streams[usize::from(slot)].as_mut().filter(|stream| stream.source == at)
    }

    fn note(&mut self, at: Place, slot: u8) {
        if let Some(stream) = self.outgoing(at, slot)
            && stream.notes
        {
            stream.changed = true;
        }
    }

    /// Whether both who take part in a move still mean the same by it.
    fn is_valid(&self, bounds: &Bounds, slot: u8, stream: &Stream) -> bool {
        let (source, target) = (stream.source, stream.target);
        let wants = |at: Place| {
            let record = self.record(at);
            self.leads(at) && record.moving() == Some(stream.operation) && record.way(slot).is_some()
        };
        let epoch = |at: Place| self.record(at).shard_epoch(source.shard);
        let same = epoch(target) == stream.epoch && epoch(source) == stream.epoch && wants(source);
        wants(target) && (same || bounds.fault == Fault::NewSource && stream.arrived)
    }

    /// From which store a target takes a slot by its record.
    fn source_for(&self, at: Place, slot: u8) -> Option<Place> {
        let record = self.record(at);
        let operation = record.moving()?;
        let (shard, target) = record.way(slot)?;
        let source = Place { shard, copy: record.primary(shard)? };
        let its = self.record(source);
        let agrees = its.moving() == Some(operation) && its.shard_epoch(shard) == record.shard_epoch(shard);
        (target == at.shard && self.leads(at) && self.leads(source) && agrees).then_some(source)
    }

    /// Whether what a target has of a slot may be emptied: not if it has said that everything is there and that may be relied on.
    fn may_begin_anew(&self, bounds: &Bounds, at: Place, slot: u8) -> bool {
        let (copy, record) = (self.copy(at), self.record(at));
        let drained = copy.drained[usize::from(slot)];
        let is_lifted = copy.version > drained && record.fence() != Some(drained);
        drained == 0 || is_lifted || bounds.fault == Fault::DrainedNote
    }

    /// Whether masters may have heard that all moves of a version are at the end.
    fn is_drained(&self, bounds: &Bounds, base: u8) -> bool {
        let version = self.line.version(base);
        let is_heard = |slot: u8, target: u8| {
            self.reports.iter().any(|report| {
                report.slot == slot
                    && (Some(report.fence) == version.fence() || bounds.fault == Fault::FenceOfReport)
                    && (report.epoch == version.shard_epoch(target) || bounds.fault.counts_earlier_epochs())
            })
        };
        (0..SLOTS as u8).all(|slot| version.way(slot).is_none_or(|(_, target)| is_heard(slot, target)))
    }

    /// Whether no primary says that it may have rows of others, which it says until its replica has none either.
    fn is_clean(&self, bounds: &Bounds) -> bool {
        let newest = self.newest();
        let Some(clean) = self.line.steps().collect::<Vec<_>>().iter().rposition(|step| *step == Step::Clean) else {
            return false;
        };
        let is_clean = |shard: u8| {
            let Some(copy) = newest.primary(shard) else { return true };
            let primary = Place { shard, copy };
            let replica = self.replica_of(primary);
            let copied = |replica: Place| {
                let (one, other) = (self.copy(primary), self.copy(replica));
                other.joined && !other.foreign && one.rows == other.rows
            };
            let applied = newest.replica(shard).is_none() || replica.is_some_and(copied);
            self.has_lease(primary)
                && usize::from(self.copy(primary).follows) > clean
                && !self.copy(primary).foreign
                && (applied || bounds.fault == Fault::CleanReplica)
        };
        // A shard that goes is removed as a whole.
        (0..newest.shard_count()).filter(|shard| newest.stays(*shard)).all(is_clean)
    }

    fn count(&self, counts: impl Fn(&Step) -> bool) -> u8 {
        self.line.steps().filter(|step| counts(step)).count() as u8
    }

    fn changes(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        let newest = self.line.newest();
        if newest >= bounds.versions {
            return;
        }
        let version = self.newest();
        let mut change = |step: Step| actions.push(Action::Change { base: newest, step });
        match version.phase() {
            None => {
                let begun = self.count(|step| matches!(step, Step::Begin { .. }));
                bounds.to.get(usize::from(begun)).into_iter().for_each(|to| change(Step::Begin { to: *to }));
            }
            Some(Phase::Copy) => {
                if self.count(|step| *step == Step::Fence) < bounds.fences && self.is_joined(bounds) {
                    change(Step::Fence);
                }
                let may_join = |shard: &u8| bounds.replicas >> shard & 1 == 1 && version.replica(*shard).is_none();
                (0..version.shard_count()).filter(may_join).for_each(|shard| {
                    // A copy is made when everything has been copied, so that it is made once.
                    let has_all = |slot: u8| {
                        version.way(slot).is_none_or(|(_, target)| {
                            let stream = self.streams[usize::from(slot)].as_ref();
                            target != shard || stream.is_some_and(|stream| stream.arrived)
                        })
                    };
                    if (0..SLOTS as u8).all(has_all) {
                        change(Step::Join { shard });
                    }
                });
                change(Step::Abort);
            }
            Some(Phase::Fence) => {
                change(Step::Unfence);
                change(Step::Abort);
                if bounds.fault != Fault::CompareAndSwap && self.is_drained(bounds, newest) {
                    change(Step::Commit);
                }
            }
            Some(Phase::Committed) => change(Step::Clean),
            Some(Phase::Clean) => {
                if self.is_clean(bounds) {
                    change(Step::Finish);
                }
            }
            Some(Phase::Done | Phase::Aborted) => {}
        }
        if self.count(|step| matches!(step, Step::Failover { .. })) < bounds.failovers {
            for shard in 0..version.shard_count() {
                let Some(copy) = version.replica(shard) else { continue };
                let replica = Place { shard, copy };
                let follows = self.record(replica).shard_epoch(shard) == version.shard_epoch(shard);
                if follows && self.copy(replica).joined {
                    change(Step::Failover { shard });
                }
            }
        }
        if bounds.fault == Fault::CompareAndSwap {
            let fenced = |base: &u8| self.line.version(*base).phase() == Some(Phase::Fence);
            let bases = (0..=newest).filter(fenced).filter(|base| self.is_drained(bounds, *base));
            actions.extend(bases.map(|base| Action::Change { base, step: Step::Commit }));
        }
    }

    /// Whether all shards have the replicas that they are to have.
    fn is_joined(&self, bounds: &Bounds) -> bool {
        let version = self.newest();
        let wants = |shard: &u8| bounds.replicas >> shard & 1 == 1;
        (0..version.shard_count()).filter(wants).all(|shard| version.replica(shard).is_some())
    }

    /// What is of no consequence is left out: a replica's record matters when its role or its shard's epoch changes.
    fn learns(&self, at: Place, version: u8) -> bool {
        let (before, after) = (self.record(at), self.line.version(version));
        let named = after.has_copy(at.shard, at.copy);
        if !self.has_copy(at) || self.leads(at) {
            return named || self.has_copy(at);
        }
        !named
            || after.primary(at.shard) == Some(at.copy)
            || before.shard_epoch(at.shard) != after.shard_epoch(at.shard)
    }

    pub fn actions(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        self.changes(bounds, actions);
        let newest = self.line.newest();
        for at in places() {
            let copy = self.copy(at);
            let later = (copy.version + 1..=newest).filter(|version| self.learns(at, *version));
            actions.extend(later.map(|version| Action::Learn { at, version }));
            if !self.leads(at) {
                continue;
            }
            if copy.follows != copy.version {
                actions.push(Action::Flip { at });
            }
            if self.crashes < bounds.crashes {
                actions.push(Action::Restart { at });
            }
            if copy.foreign {
                actions.push(Action::Clean { at });
            }
            if bounds.fault == Fault::LiftAlone && self.record(at).phase() == Some(Phase::Fence) {
                actions.push(Action::LiftAlone { at });
            }
            self.operations(bounds, at, actions);
        }
        actions.extend((0..SHARDS as u8).map(|shard| Action::Replicate { shard }));
        for slot in 0..bounds.moves.len() as u8 {
            self.moves(bounds, slot, actions);
        }
    }

    fn operations(&self, bounds: &Bounds, at: Place, actions: &mut Vec<Action>) {
        let removed: u32 = self.registers.iter().map(|register| register.removals.count_ones()).sum();
        for slot in 0..bounds.moves.len() as u8 {
            let copy = self.copy(at);
            let runs = copy.halves & bit(slot) != 0;
            if runs {
                actions.push(Action::EndWrite { at, slot });
            }
            // Its lease may have run out since it was asked.
            if !runs && self.owned(bounds, at) & bit(slot) != 0 && self.register(slot).writes < bounds.writes {
                actions.push(Action::Write { at, slot, removes: false });
                if removed < u32::from(bounds.removals) {
                    actions.push(Action::Write { at, slot, removes: true });
                }
            }
            let behind_fence = self.line.version(copy.follows).assigned(at.shard) & bit(slot) != 0;
            // An answer may leave behind the fence: to what was done before it.
            if self.has_lease(at) && (self.owned(bounds, at) & bit(slot) != 0 || behind_fence) {
                actions.push(Action::Answer { at, slot });
            }
            if self.source_for(at, slot).is_some() {
                let other = self.streams[usize::from(slot)].as_ref().is_none_or(|stream| stream.target != at);
                if other && self.may_begin_anew(bounds, at, slot) {
                    actions.push(Action::Open { at, slot });
                }
            }
            if copy.drained[usize::from(slot)] != 0 && self.has_lease(at) {
                actions.push(Action::Report { at, slot });
            }
        }
    }

    fn moves(&self, bounds: &Bounds, slot: u8, actions: &mut Vec<Action>) {
        let Some(stream) = &self.streams[usize::from(slot)] else { return };
        if self.breaks < bounds.breaks {
            actions.push(Action::Break { slot });
        }
        if stream.messages.len() < ON_THE_WAY {
            if !stream.copied {
                actions.push(Action::SendRows { slot });
            } else if stream.changed {
                actions.push(Action::SendChange { slot });
            } else {
                actions.push(Action::SendEnd { slot });
            }
        }
        if !stream.messages.is_empty() {
            actions.push(Action::Receive { slot, number: 0 });
        }
        let overtakes = matches!(stream.messages[..], [Message::Copied(_), Message::Changed(_)]);
        if bounds.fault == Fault::CopyBehindChange && overtakes {
            actions.push(Action::Receive { slot, number: 1 });
        }
        if bounds.fault == Fault::TakenAfterReading && matches!(stream.messages.last(), Some(Message::Changed(_))) {
            actions.push(Action::Forget { slot });
        }
        if !stream.notes && stream.copied {
            actions.push(Action::Note { slot });
        }
        if bounds.fault == Fault::NewSource
            && self.source_for(stream.target, slot).is_some_and(|it| it != stream.source)
        {
            actions.push(Action::Reattach { slot });
        }
    }

    /// `None`: that cannot be done now.
    pub fn take(&mut self, bounds: &Bounds, action: Action) -> Option<()> {
        match action {
            Action::Change { base, step } => self.change(bounds, base, step)?,
            Action::Learn { at, version } => self.learn(bounds, at, version),
            Action::Flip { at } => self.flip(bounds, at)?,
            Action::Restart { at } => self.restart(bounds, at),
            Action::Write { at, slot, removes } => self.write(bounds, at, slot, removes),
            Action::EndWrite { at, slot } => self.end_write(bounds, at, slot),
            Action::Answer { at, slot } => {
                if !self.is_replicated(bounds, at, slot) {
                    return None;
                }
                let seen = self.seen(at, slot)?;
                let register = &mut self.registers[usize::from(slot)];
                if seen > register.told {
                    (register.told, register.told_at) = (seen, at.shard);
                }
            }
            Action::Replicate { shard } => self.replicate(bounds, shard)?,
            Action::Open { at, slot } => self.open(bounds, at, slot)?,
            Action::Break { slot } => {
                self.breaks += 1;
                self.streams[usize::from(slot)] = None;
            }
            Action::SendRows { slot } => {
                let source = self.streams[usize::from(slot)].as_ref()?.source;
                let row = self.row(source, slot);
                let stream = self.streams[usize::from(slot)].as_mut()?;
                stream.copied = true;
                stream.messages.push(Message::Copied(row));
            }
            Action::SendChange { slot } => {
                let source = self.streams[usize::from(slot)].as_ref()?.source;
                let row = self.row(source, slot);
                let stream = self.streams[usize::from(slot)].as_mut()?;
                stream.changed = bounds.fault == Fault::TakenAfterReading;
                stream.messages.push(Message::Changed(row));
            }
            Action::SendEnd { slot } => {
                let source = self.streams[usize::from(slot)].as_ref()?.source;
                let version = self.line.version(self.copy(source).follows);
                let stands = version.phase() == Some(Phase::Fence);
                let fence = version.fence().filter(|_| stands)?;
                let stamps_above = self.copy(source).bound;
                let stream = self.streams[usize::from(slot)].as_mut()?;
                if stream.ended == fence {
                    return None;
                }
                stream.ended = fence;
                stream.messages.push(Message::End { fence, stamps_above });
            }
            Action::Receive { slot, number } => self.receive(bounds, slot, number)?,
            Action::Report { at, slot } => self.report(bounds, at, slot)?,
            Action::Clean { at } => self.clean(bounds, at)?,
            Action::Note { slot } => self.streams[usize::from(slot)].as_mut()?.notes = true,
            Action::Reattach { slot } => {
                let target = self.streams[usize::from(slot)].as_ref()?.target;
                let source = self.source_for(target, slot)?;
                let epoch = self.record(source).shard_epoch(source.shard);
                let stream = self.streams[usize::from(slot)].as_mut()?;
                *stream = Stream { source, epoch, changed: false, ended: 0, messages: Vec::new(), ..stream.clone() };
            }
            Action::Forget { slot } => self.streams[usize::from(slot)].as_mut()?.changed = false,
            Action::LiftAlone { at } => {
                let fence = self.record(at).fence()?;
                self.copy_mut(at).follows = fence - 1;
            }
        }
        Some(())
    }

    fn change(&mut self, bounds: &Bounds, base: u8, step: Step) -> Option<()> {
        self.line = self.line.next(base, step)?;
        if let Step::Join { shard } = step {
            let primary = *self.copy(Place { shard, copy: 0 });
            let (version, born) = (self.line.newest(), primary.born);
            let joined = true;
            *self.copy_mut(Place { shard, copy: 1 }) =
                Copy { version, follows: version, born, halves: 0, joined, ..primary };
        }
        // Reports of fences that are gone can be of no use to anybody, unless a rule is missing.
        if !matches!(bounds.fault, Fault::FenceOfReport | Fault::CompareAndSwap) {
            let fence = self.newest().fence();
            self.reports.retain(|report| Some(report.fence) == fence);
        }
        Some(())
    }

    fn learn(&mut self, bounds: &Bounds, at: Place, version: u8) {
        let led = self.leads(at);
        let epoch_before = self.record(at).shard_epoch(at.shard);
        let born = self.line.version(version).born(at.shard);
        self.copy_mut(at).version = version;
        let is_other = self.copy(at).born != born && bounds.fault != Fault::Born;
        if !self.has_copy(at) || is_other {
            *self.copy_mut(at) = Copy { version, follows: version, born, ..Copy::default() };
        }
        let epoch = self.record(at).shard_epoch(at.shard);
        let copy = self.copy_mut(at);
        copy.born = born;
        copy.joined &= epoch_before == epoch;
        let (owned, later) = (self.owned(bounds, at), self.line.version(version).served(at.shard));
        // Under another epoch nothing that was asked before is done any more.
        let goes_on = led && self.leads(at) && epoch == epoch_before;
        if !goes_on {
            self.copy_mut(at).halves = 0;
        }
        if !goes_on || owned & !later == 0 {
            self.follow(bounds, at);
        }
        self.end_streams(bounds);
    }

    fn follow(&mut self, bounds: &Bounds, at: Place) {
        let leads = self.leads(at);
        let record = self.record(at);
        let takes = match record.phase() {
            Some(Phase::Committed) => true,
            Some(Phase::Clean) => bounds.fault != Fault::Foreign,
            _ => false,
        };
        let foreign = leads && takes && record.leaves(at.shard);
        let copy = self.copy_mut(at);
        copy.follows = copy.version;
        copy.foreign |= foreign;
    }

    fn flip(&mut self, bounds: &Bounds, at: Place) -> Option<()> {
        let lost = self.owned(bounds, at) & !self.record(at).served(at.shard);
        if self.copy(at).halves & lost != 0 && bounds.fault != Fault::Running {
            return None;
        }
        self.follow(bounds, at);
        Some(())
    }

    fn restart(&mut self, bounds: &Bounds, at: Place) {
        self.crashes += 1;
        if bounds.fault == Fault::Persistence && self.record(at).phase() == Some(Phase::Fence) {
            self.copy_mut(at).version -= 1;
        }
        self.copy_mut(at).halves = 0;
        self.follow(bounds, at);
        for stream in &mut self.streams {
            if stream.as_ref().is_some_and(|stream| stream.source == at || stream.target == at) {
                *stream = None;
            }
        }
        self.end_streams(bounds);
    }

    fn end_streams(&mut self, bounds: &Bounds) {
        for slot in 0..SLOTS as u8 {
            let stream = self.streams[usize::from(slot)].take();
            self.streams[usize::from(slot)] = stream.filter(|stream| self.is_valid(bounds, slot, stream));
        }
    }

    fn put(&mut self, bounds: &Bounds, at: Place, slot: u8) {
        let register = &mut self.registers[usize::from(slot)];
        let write = register.writes;
        let removes = register.removals & bit(write) != 0;
        let copy = self.copy_mut(at);
        if bounds.clocks == Clocks::SourceIsAhead {
            copy.bound = (copy.bound + 1).max(if at.shard == 0 { CLOCK_AHEAD } else { 0 });
        }
        copy.rows[usize::from(slot)] = if removes { Row::default() } else { Row { write, stamp: copy.bound } };
    }

    fn write(&mut self, bounds: &Bounds, at: Place, slot: u8, removes: bool) {
        let register = &mut self.registers[usize::from(slot)];
        register.writes += 1;
        register.removals |= u8::from(removes) << register.writes;
        match bounds.fault {
            Fault::NotedBefore => self.note(at, slot),
            _ => self.put(bounds, at, slot),
        }
        // Where nothing can be noted the halves are one.
        if self.record(at).moving().is_some() && self.record(at).leaves(at.shard) {
            self.copy_mut(at).halves |= bit(slot);
        } else if bounds.fault == Fault::NotedBefore {
            self.put(bounds, at, slot);
        }
    }

    fn end_write(&mut self, bounds: &Bounds, at: Place, slot: u8) {
        match bounds.fault {
            Fault::NotedBefore => self.put(bounds, at, slot),
            _ => self.note(at, slot),
        }
        self.copy_mut(at).halves &= !bit(slot);
    }

    fn replicate(&mut self, bounds: &Bounds, shard: u8) -> Option<()> {
        let primary = |at: &Place| at.shard == shard && self.replica_of(*at).is_some();
        let at = places().find(primary)?;
        let replica = self.replica_of(at)?;
        if !self.copy(replica).joined {
            for slot in 0..SLOTS as u8 {
                self.hand_over(bounds, replica, at, slot);
            }
        }
        let Copy { rows, bound, foreign, drained, .. } = *self.copy(at);
        let own = self.copy(replica).drained;
        let drained = if bounds.fault.logs_note() { drained } else { own };
        let joined = true;
        let copy = self.copy_mut(replica);
        *copy = Copy { rows, bound, foreign, drained, joined, ..*copy };
        Some(())
    }

    /// A copy that returns gives what only it has, and the later stamp wins.
    fn hand_over(&mut self, bounds: &Bounds, from: Place, to: Place, slot: u8) {
        let (given, own) = (self.row(from, slot), self.row(to, slot));
        let register = self.register(slot);
        let is_forgotten = own.write == 0 && register.removals >> given.write != 0;
        let is_later = (given.stamp, given.write) > (own.stamp, own.write);
        let is_owned = self.owned(bounds, to) & bit(slot) != 0 || bounds.fault == Fault::HandOver;
        if given.write == 0 || !is_later || is_forgotten || !is_owned {
            return;
        }
        self.taken_back |= given.write < own.write && given.write <= register.told;
        let copy = self.copy_mut(to);
        copy.rows[usize::from(slot)] = given;
        copy.bound = copy.bound.max(given.stamp);
        self.note(to, slot);
    }

    fn open(&mut self, bounds: &Bounds, at: Place, slot: u8) -> Option<()> {
        let source = self.source_for(at, slot)?;
        let record = self.record(at);
        let (operation, epoch) = (record.moving()?, record.shard_epoch(source.shard));
        let copy = self.copy_mut(at);
        let is_emptied = match bounds.fault {
            Fault::Emptying => false,
            Fault::Skipping | Fault::Born => copy.foreign,
            _ => true,
        };
        copy.foreign = true;
        copy.drained[usize::from(slot)] = 0;
        if is_emptied {
            copy.rows[usize::from(slot)] = Row::default();
        }
        self.streams[usize::from(slot)] = Some(Stream {
            operation,
            source,
            target: at,
            epoch,
            notes: bounds.fault != Fault::IteratorBeforeFlag,
            copied: false,
            changed: false,
            ended: 0,
            messages: Vec::new(),
            arrived: false,
        });
        Some(())
    }

    fn receive(&mut self, bounds: &Bounds, slot: u8, number: u8) -> Option<()> {
        let stream = self.streams[usize::from(slot)].as_mut()?;
        let message = stream.messages.remove(usize::from(number));
        stream.arrived |= matches!(message, Message::Copied(_));
        let target = stream.target;
        let copy = self.copy_mut(target);
        let index = usize::from(slot);
        match message {
            // There is no row of what is not there: nothing is written over what is here.
            Message::Copied(row) if row.write == 0 => {}
            Message::Copied(row) => copy.rows[index] = row,
            Message::Changed(row) => (copy.rows[index], copy.drained[index]) = (row, 0),
            Message::End { fence, stamps_above } => {
                copy.drained[index] = fence;
                if bounds.fault != Fault::Stamps {
                    copy.bound = copy.bound.max(stamps_above);
                }
            }
        }
        Some(())
    }

    fn report(&mut self, bounds: &Bounds, at: Place, slot: u8) -> Option<()> {
        let copy = self.copy(at);
        let fence = copy.drained[usize::from(slot)];
        let has_heard = copy.version >= fence || bounds.fault == Fault::HeardOfFence;
        let is_replicated = self.is_replicated(bounds, at, slot) || bounds.fault == Fault::DrainedReplica;
        if !has_heard || !is_replicated {
            return None;
        }
        let epoch = self.record(at).shard_epoch(at.shard);
        let is_wanted = self.newest().fence() == Some(fence)
            || matches!(bounds.fault, Fault::FenceOfReport | Fault::CompareAndSwap);
        (is_wanted && self.reports.insert(Report { slot, fence, epoch })).then_some(())
    }

    fn clean(&mut self, bounds: &Bounds, at: Place) -> Option<()> {
        let copy = self.copy(at);
        let version = self.line.version(copy.follows);
        let may = match version.phase() {
            None | Some(Phase::Clean) => true,
            Some(Phase::Fence) => bounds.fault == Fault::CleanBehindFence,
            Some(_) => false,
        };
        if !may || copy.follows != copy.version {
            return None;
        }
        let served = version.served(at.shard);
        let copy = self.copy_mut(at);
        copy.foreign = false;
        for slot in (0..SLOTS as u8).filter(|slot| served & bit(*slot) == 0) {
            (copy.rows[usize::from(slot)], copy.drained[usize::from(slot)]) = (Row::default(), 0);
        }
        Some(())
    }
}

/// What must hold.
impl World {
    pub fn has_one_owner(&self, bounds: &Bounds) -> bool {
        (0..SLOTS as u8).all(|slot| places().filter(|at| self.serves(bounds, *at, slot)).count() <= 1)
    }

    pub fn has_all_told(&self, bounds: &Bounds) -> bool {
        let is_right = |at: Place, slot: u8| !self.reads(bounds, at, slot) || self.seen(at, slot).is_some();
        !self.taken_back && places().all(|at| (0..SLOTS as u8).all(|slot| is_right(at, slot)))
    }

    /// A primary at the end, or before the beginning, has nothing that it does not serve, or knows that it may have.
    pub fn has_no_leftovers(&self) -> bool {
        let newest = self.newest();
        let is_right = |at: Place| {
            let copy = self.copy(at);
            let rests = newest.phase().is_none() && copy.follows == self.line.newest() && self.has_lease(at);
            let is_foreign = |slot: u8| newest.served(at.shard) & bit(slot) == 0 && self.row(at, slot).write != 0;
            !rests || copy.foreign || !(0..SLOTS as u8).any(is_foreign)
        };
        places().all(is_right)
    }

    /// A client was told of a write first where the key is now, after all operations were done, those left out that would change nothing.
    pub fn is_told_after(&self, bounds: &Bounds) -> bool {
        let operations = 1 + bounds.to.windows(2).filter(|pair| pair[0] != pair[1]).count();
        let committed = usize::from(self.count(|step| *step == Step::Finish)) == operations;
        let newest = self.newest();
        let is_there = |slot: u8| {
            let register = self.register(slot);
            newest.served(register.told_at) & bit(slot) != 0 && register.told > 0
        };
        committed && (0..SLOTS as u8).any(is_there)
    }

    pub fn is_committed_after(&self, counts: impl Fn(&Step) -> bool) -> bool {
        let steps: Vec<Step> = self.line.steps().collect();
        let commit = steps.iter().position(|step| *step == Step::Commit);
        commit.is_some_and(|commit| steps[..commit].iter().any(counts))
    }

    pub fn is_aborted(&self) -> bool {
        let places = places().filter(|at| self.newest().primary(at.shard) == Some(at.copy));
        let told = self.registers.iter().any(|register| register.told > 0);
        let mut places = places.map(|at| self.copy(at).follows == self.line.newest());
        self.line.steps().last() == Some(Step::Abort) && told && places.all(|follows| follows)
    }
}

/// How it ends.
impl World {
    /// Whether the operation comes to its end, once everybody is up and hears everybody, without being aborted and without another fence than
    /// one that has not been set yet.
    pub fn heals(&self, bounds: &Bounds) -> bool {
        let (versions, fences) = (u8::MAX, u8::MAX);
        let bounds = Bounds { versions, fences, writes: 0, crashes: 0, breaks: 0, failovers: 0, ..*bounds };
        let mut world = self.clone();
        loop {
            let mut actions = Vec::new();
            world.actions(&bounds, &mut actions);
            let ranked = actions.into_iter().filter_map(|action| Some((world.rank(action)?, action)));
            let next = ranked.filter_map(|(rank, action)| {
                let mut after = world.clone();
                after.take(&bounds, action)?;
                (after != world).then_some((rank, after))
            });
            match next.min_by_key(|(rank, _)| *rank) {
                Some((_, after)) => world = after,
                None => return world.is_healed(&bounds),
            }
        }
    }

    /// In which order those act that do all they can; `None`: not while things heal.
    fn rank(&self, action: Action) -> Option<u8> {
        let rank = match action {
            Action::Learn { version, .. } if version != self.line.newest() => return None,
            Action::Learn { .. } => 0,
            Action::EndWrite { .. } => 1,
            Action::Flip { .. } | Action::Replicate { .. } | Action::Clean { .. } => 2,
            Action::Receive { .. } | Action::Answer { .. } => 3,
            Action::SendRows { .. } | Action::SendChange { .. } | Action::SendEnd { .. } => 4,
            Action::Open { .. } | Action::Report { .. } => 5,
            Action::Change { step, .. } => match step {
                Step::Fence | Step::Commit | Step::Clean | Step::Finish | Step::Join { .. } => 6,
                Step::Begin { .. } | Step::Unfence | Step::Abort | Step::Failover { .. } => return None,
            },
            Action::Restart { .. } | Action::Write { .. } | Action::Break { .. } => return None,
            Action::Note { .. } | Action::Reattach { .. } => return None,
            Action::LiftAlone { .. } | Action::Forget { .. } => return None,
        };
        Some(rank)
    }

    fn is_healed(&self, bounds: &Bounds) -> bool {
        let newest = self.newest();
        let follows = |at: Place| {
            let copy = self.copy(at);
            let is_here = self.has_copy(at) == newest.has_copy(at.shard, at.copy);
            let rests = !self.leads(at) || copy.follows == self.line.newest() && !copy.foreign && copy.halves == 0;
            let replica = self.replica_of(at).is_none_or(|replica| self.copy(replica).rows == self.copy(at).rows);
            is_here && rests && replica
        };
        let is_served = |slot: u8| places().filter(|at| self.serves(bounds, *at, slot)).count() == 1;
        newest.phase().is_none() && places().all(follows) && (0..bounds.moves.len() as u8).all(is_served)
    }
}
