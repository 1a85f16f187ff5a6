//! Resizing, every course of it within bounds: records, fences, streams of rows, changes, copies, and stores that know late of everything.
//!
//! The record's versions and who serves a slot by them are those of [`super::operation`] and [`super::slots`] themselves, asked for one slot of
//! each move; a slot has one key. Clients may ask any store at any time, like a gateway that sleeps through it all. A store writes each
//! version to its disk before it follows it, may skip some, and hears of them as late as can be. Masters act on any report that was ever
//! sent, and change the newest version only, which `model` shows: they may stop, go on and be two. A source may lift its fence itself: that is
//! the same change.
//!
//! Taken from `failover_model`: of a shard with a replica one store at a time has a lease, of the newest epoch; what a client was told is
//! with both copies; a replica has what its primary had at some moment, in its order. So a failover is one step to that replica, and a
//! return one of handing over and taking over.
//!
//! More generous than the protocol: a fence is set, lifted and an operation aborted at any time; cleaning begins without waiting for anybody.
//! Less: a move has one stream at a time (another target's is closed by the one that opens), two messages at most are on their way, groups
//! have one row, and a change of one key says nothing of another's.
//!
//! `rules` takes each thing that the protocol does out once: the model must miss it.

use std::fmt::Debug;

use stateright::{Model, Property};

use super::failover_model::{bounds, check};
use line::Step;
use world::{Action, World};

mod line;
mod rules;
mod world;

/// What is taken out of the protocol, to see that the model misses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The source goes on serving.
    Fence,
    /// A source that restarts has forgotten that a fence stands.
    Persistence,
    /// Reads are answered behind the fence.
    ReadsFenced,
    /// The source lifts the fence by itself, without a version that says so.
    LiftAlone,
    /// A master changes what it takes for the newest version.
    CompareAndSwap,
    /// A report of an earlier fence counts.
    FenceOfReport,
    /// A report under an earlier epoch of the target counts.
    EpochOfReport,
    /// That a target has everything is noted, but the note is not in its log.
    NoteInLog,
    /// Both.
    EpochAndNoteInLog,
    /// The target reports before its replica has everything.
    DrainedReplica,
    /// The target reports before it follows the record with the fence, and so may not know of its replica.
    HeardOfFence,
    /// A target that has reported begins anew when its stream breaks.
    DrainedNote,
    /// The target serves when it has everything, not when that is committed.
    Activation,
    /// A write that runs when the fence is set is not waited for.
    Running,
    /// A write looks first whether changes are noted, and then writes.
    NotedBefore,
    /// A changed row is read, and then its key taken from those that have changed.
    TakenAfterReading,
    /// Rows are read before changes are noted.
    IteratorBeforeFlag,
    /// What a target has is not removed before a move begins.
    Emptying,
    /// A target is not emptied if it does not know of rows of others.
    Skipping,
    /// The same, and a store that has a copy of a shard that is gone takes it for one of a new shard of that number.
    Born,
    /// A group that was sent before a change is taken over after it.
    CopyBehindChange,
    /// The target goes on with the source's next primary.
    NewSource,
    /// The source removes its rows before the commit.
    CleanBehindFence,
    /// A source that hears of the commit late does not know that it has rows of others.
    Foreign,
    /// A source says that it is clean before its replica is.
    CleanReplica,
    /// A copy that returns hands over rows of slots that have gone.
    HandOver,
    /// Stamps at the target may be below those of the rows that came.
    Stamps,
}

impl Fault {
    fn logs_note(self) -> bool {
        !matches!(self, Self::NoteInLog | Self::EpochAndNoteInLog)
    }

    fn counts_earlier_epochs(self) -> bool {
        matches!(self, Self::EpochOfReport | Self::EpochAndNoteInLog)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Healing {
    Unasked,
    Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clocks {
    Equal,
    /// That of shard 0 is far ahead of the others'.
    SourceIsAhead,
}

#[derive(Clone, Copy, Debug)]
struct Bounds {
    fault: Fault,
    /// Shards at the beginning, and what they are resized to, one operation after the other.
    from: u8,
    to: &'static [u8],
    /// Slots by the way that they take in the first operation.
    moves: &'static [(u8, u8)],
    /// Shards with a replica, as bits; a new shard gets it when it has rows.
    replicas: u8,
    /// Writes of each key, and how many of all leave no row behind.
    writes: u8,
    removals: u8,
    /// Versions of the record beyond the first, and which of them set a fence or follow the loss of a primary.
    versions: u8,
    fences: u8,
    failovers: u8,
    crashes: u8,
    /// Streams that break while both ends live.
    breaks: u8,
    clocks: Clocks,
    /// What has been done before.
    prelude: &'static [Action],
    /// Whether each state is asked if the operation would come to its end.
    healing: Healing,
}

impl Model for Bounds {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.actions(self, actions);
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        world.take(self, action)?;
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(ONE_OWNER, |bounds: &Self, world: &World| world.has_one_owner(bounds)),
            Property::always(NOTHING_LOST, |bounds: &Self, world: &World| world.has_all_told(bounds)),
            Property::always(NO_LEFTOVERS, |_, world: &World| world.has_no_leftovers()),
            Property::sometimes(DONE, |bounds: &Self, world: &World| world.is_told_after(bounds)),
            Property::sometimes(ABORTED, |_, world: &World| world.is_aborted()),
        ];
        if self.healing == Healing::Asked {
            properties.push(Property::always(HEALS, |bounds: &Self, world: &World| world.heals(bounds)));
        }
        if usize::from(self.fences) > self.to.len() {
            properties.push(Property::sometimes(FENCED_AGAIN, |_, world: &World| {
                world.is_committed_after(|step| *step == Step::Unfence)
            }));
        }
        if self.failovers > 0 {
            properties.push(Property::sometimes(FAILED_OVER, |_, world: &World| {
                world.is_committed_after(|step| matches!(step, Step::Failover { .. }))
            }));
        }
        properties
    }
}

const ONE_OWNER: &str = "no slot is served by two";
const NOTHING_LOST: &str = "whoever serves a slot has what clients were told of it, or later";
const NO_LEFTOVERS: &str = "who has rows of others knows it";
const DONE: &str = "all is done, and a client was told of a write first where the slot is then";
const ABORTED: &str = "an operation was aborted, all know it, and a client is told of a write";
const FENCED_AGAIN: &str = "a fence is lifted, set again, and then all is committed";
const FAILED_OVER: &str = "a shard loses its primary, and then all is committed";
const HEALS: &str = "the operation comes to its end once everybody hears everybody";
const WRONG: [&str; 3] = [ONE_OWNER, NOTHING_LOST, NO_LEFTOVERS];

/// One slot goes to a new shard; nobody has a replica.
const ONE_MOVE: Bounds = Bounds {
    fault: Fault::None,
    from: 1,
    to: &[2],
    moves: &[(0, 1)],
    replicas: 0,
    writes: 2,
    removals: 1,
    versions: 7,
    fences: 2,
    failovers: 0,
    crashes: 1,
    breaks: 1,
    clocks: Clocks::Equal,
    prelude: &[],
    healing: Healing::Unasked,
};
const SOURCE_WITH_REPLICA: Bounds =
    Bounds { replicas: 0b01, removals: 0, failovers: 1, crashes: 0, breaks: 0, versions: 6, fences: 1, ..ONE_MOVE };
const TARGET_WITH_REPLICA: Bounds = Bounds { replicas: 0b10, versions: 7, ..SOURCE_WITH_REPLICA };
const BOTH_WITH_REPLICAS: Bounds = Bounds { replicas: 0b11, writes: 1, ..TARGET_WITH_REPLICA };
const LIVE_TARGET: Bounds =
    Bounds { from: 2, to: &[1], moves: &[(1, 0)], replicas: 0b01, versions: 6, ..SOURCE_WITH_REPLICA };
const TWO_TARGETS: Bounds = Bounds {
    to: &[3],
    moves: &[(0, 1), (0, 2)],
    writes: 1,
    removals: 0,
    versions: 6,
    fences: 1,
    crashes: 0,
    breaks: 0,
    ..ONE_MOVE
};
const TWO_SOURCES: Bounds = Bounds { from: 2, moves: &[(0, 2), (1, 2)], ..TWO_TARGETS };
const THERE_AND_BACK: Bounds = Bounds { to: &[2, 1], fences: 2, versions: 10, crashes: 0, breaks: 0, ..ONE_MOVE };

#[test]
fn no_course_of_one_move_loses_what_was_told() {
    check(bounds(ONE_MOVE, Bounds { writes: 3, crashes: 2, ..ONE_MOVE }));
}

#[test]
fn no_course_of_a_source_with_a_replica_loses_what_was_told() {
    check(bounds(SOURCE_WITH_REPLICA, Bounds { crashes: 1, fences: 2, versions: 8, ..SOURCE_WITH_REPLICA }));
}

#[test]
fn no_course_of_a_target_with_a_replica_loses_what_was_told() {
    check(bounds(TARGET_WITH_REPLICA, Bounds { crashes: 1, fences: 2, versions: 8, ..TARGET_WITH_REPLICA }));
}

#[test]
fn no_course_of_a_target_that_serves_already_loses_what_was_told() {
    check(bounds(Bounds { writes: 1, ..LIVE_TARGET }, Bounds { fences: 2, versions: 8, ..LIVE_TARGET }));
}

#[test]
fn no_course_of_a_source_and_a_target_with_replicas_loses_what_was_told() {
    check(bounds(BOTH_WITH_REPLICAS, Bounds { failovers: 2, versions: 8, ..BOTH_WITH_REPLICAS }));
}

#[test]
fn no_course_of_one_source_with_two_targets_loses_what_was_told() {
    check(bounds(TWO_TARGETS, Bounds { crashes: 1, fences: 2, versions: 7, ..TWO_TARGETS }));
}

#[test]
fn no_course_of_two_sources_with_one_target_loses_what_was_told() {
    check(bounds(TWO_SOURCES, Bounds { crashes: 1, fences: 2, versions: 7, ..TWO_SOURCES }));
}

#[test]
fn no_course_there_and_back_loses_what_was_told() {
    check(bounds(THERE_AND_BACK, Bounds { to: &[2, 1, 2], fences: 3, versions: 15, ..THERE_AND_BACK }));
}

#[test]
fn every_course_heals() {
    let healing = Healing::Asked;
    let one = Bounds { writes: 1, removals: 0, healing, ..ONE_MOVE };
    let source = Bounds { writes: 1, healing, ..SOURCE_WITH_REPLICA };
    let target = Bounds { writes: 1, healing, ..TARGET_WITH_REPLICA };
    check(bounds(one, Bounds { writes: 2, crashes: 2, ..one }));
    check(bounds(source, Bounds { writes: 2, crashes: 1, ..source }));
    check(bounds(target, Bounds { writes: 2, crashes: 1, ..target }));
}
