//! Each rule of resizing is needed: without it the model finds a course that goes wrong.

use super::line::Step;
use super::world::{Action, Place};
use super::{
    Bounds, Clocks, Fault, LIVE_TARGET, ONE_MOVE, SOURCE_WITH_REPLICA, TARGET_WITH_REPLICA, THERE_AND_BACK, WRONG,
};
use crate::topology::failover_model::{check, refute};

/// The shortest way to a wrong state.
fn must_be_missed(bounds: Bounds, fault: Fault) {
    refute(Bounds { fault, ..bounds }, &WRONG);
}

/// All of one move, nothing breaks.
const CALM: Bounds = Bounds { crashes: 0, breaks: 0, removals: 0, ..ONE_MOVE };

/// A target that serves other slots, and fails over.
const WRITTEN_ONCE: Bounds = Bounds { writes: 1, ..LIVE_TARGET };
/// A target that serves other slots has rows of a move that was aborted.
const ABORTED_BEFORE: Bounds =
    Bounds { to: &[1, 1], replicas: 0, failovers: 0, removals: 1, versions: 7, ..LIVE_TARGET };

const A: Place = Place { shard: 1, copy: 0 };
const B: Place = Place { shard: 1, copy: 1 };
const C: Place = Place { shard: 0, copy: 0 };
/// Shard 1 gets a row; B becomes its primary, and A hears of nothing any more; the row moves to shard 0 and shard 1 is gone; then it is
/// wished again, on A.
const GONE_AND_BACK: Bounds = Bounds {
    from: 2,
    to: &[1, 2],
    moves: &[(1, 0)],
    replicas: 0b10,
    writes: 2,
    removals: 1,
    versions: 12,
    fences: 2,
    failovers: 1,
    crashes: 0,
    breaks: 0,
    prelude: &[
        Action::Write { at: A, slot: 0, removes: false },
        Action::Replicate { shard: 1 },
        Action::Change { base: 0, step: Step::Failover { shard: 1 } },
        Action::Change { base: 1, step: Step::Begin { to: 1 } },
        Action::Learn { at: C, version: 2 },
        Action::Learn { at: B, version: 2 },
        Action::Open { at: C, slot: 0 },
        Action::SendRows { slot: 0 },
        Action::Receive { slot: 0, number: 0 },
        Action::Change { base: 2, step: Step::Fence },
        Action::Learn { at: C, version: 3 },
        Action::Learn { at: B, version: 3 },
        Action::Flip { at: B },
        Action::SendEnd { slot: 0 },
        Action::Receive { slot: 0, number: 0 },
        Action::Report { at: C, slot: 0 },
        Action::Change { base: 3, step: Step::Commit },
        Action::Change { base: 4, step: Step::Clean },
        Action::Learn { at: C, version: 5 },
        Action::Clean { at: C },
        Action::Learn { at: B, version: 5 },
        Action::Clean { at: B },
    ],
    ..ONE_MOVE
};

#[test]
fn the_source_must_stop_serving() {
    must_be_missed(CALM, Fault::Fence);
}

#[test]
fn a_restarted_source_must_know_of_the_fence() {
    must_be_missed(Bounds { crashes: 1, ..CALM }, Fault::Persistence);
}

#[test]
fn reads_must_stop_at_the_fence() {
    must_be_missed(CALM, Fault::ReadsFenced);
}

#[test]
fn a_fence_must_be_lifted_by_a_version() {
    must_be_missed(CALM, Fault::LiftAlone);
}

#[test]
fn the_commit_must_be_made_from_the_newest_version() {
    must_be_missed(CALM, Fault::CompareAndSwap);
}

#[test]
fn the_commit_must_be_of_the_fence_that_was_reported() {
    must_be_missed(CALM, Fault::FenceOfReport);
}

/// Another primary of the target either knows that its shard has reported, or that report does not count.
#[test]
fn a_report_must_be_of_the_target_that_leads_or_noted_in_its_log() {
    must_be_missed(WRITTEN_ONCE, Fault::EpochAndNoteInLog);
    check(Bounds { fault: Fault::EpochOfReport, ..WRITTEN_ONCE });
    check(Bounds { fault: Fault::NoteInLog, ..WRITTEN_ONCE });
}

#[test]
fn the_replica_of_the_target_must_have_everything() {
    must_be_missed(TARGET_WITH_REPLICA, Fault::DrainedReplica);
}

#[test]
fn a_target_must_follow_the_fence_before_it_reports() {
    must_be_missed(TARGET_WITH_REPLICA, Fault::HeardOfFence);
}

#[test]
fn a_target_that_has_reported_must_not_begin_anew() {
    must_be_missed(Bounds { breaks: 1, ..CALM }, Fault::DrainedNote);
}

#[test]
fn a_target_must_wait_for_the_commit() {
    must_be_missed(CALM, Fault::Activation);
}

#[test]
fn the_fence_must_wait_for_what_runs() {
    must_be_missed(CALM, Fault::Running);
}

#[test]
fn a_change_must_be_noted_after_the_write() {
    must_be_missed(CALM, Fault::NotedBefore);
}

#[test]
fn a_changed_key_must_be_taken_before_its_row_is_read() {
    must_be_missed(CALM, Fault::TakenAfterReading);
}

#[test]
fn changes_must_be_noted_before_rows_are_read() {
    must_be_missed(CALM, Fault::IteratorBeforeFlag);
}

#[test]
fn a_target_must_be_emptied_before_it_begins_anew() {
    must_be_missed(Bounds { breaks: 1, removals: 1, ..CALM }, Fault::Emptying);
}

#[test]
fn a_group_must_not_be_taken_over_behind_a_change() {
    must_be_missed(CALM, Fault::CopyBehindChange);
}

#[test]
fn a_move_must_begin_anew_with_another_source() {
    must_be_missed(SOURCE_WITH_REPLICA, Fault::NewSource);
}

#[test]
fn a_source_must_keep_its_rows_until_the_commit() {
    must_be_missed(CALM, Fault::CleanBehindFence);
}

#[test]
fn a_source_that_skips_the_commit_must_know_that_it_has_rows_of_others() {
    must_be_missed(CALM, Fault::Foreign);
}

#[test]
fn a_replica_must_be_clean_too() {
    must_be_missed(SOURCE_WITH_REPLICA, Fault::CleanReplica);
}

#[test]
fn a_copy_that_returns_must_not_hand_over_what_has_gone() {
    must_be_missed(SOURCE_WITH_REPLICA, Fault::HandOver);
}

#[test]
fn a_write_at_the_target_must_be_stamped_above_what_came() {
    must_be_missed(Bounds { clocks: Clocks::SourceIsAhead, ..TARGET_WITH_REPLICA }, Fault::Stamps);
}

#[test]
fn a_target_must_be_emptied_of_what_an_aborted_move_left() {
    must_be_missed(ABORTED_BEFORE, Fault::Emptying);
}

/// Not to empty what has no rows of others is right as long as copies know what they have.
#[test]
fn a_copy_must_be_known_to_be_of_an_earlier_shard() {
    check(Bounds { fault: Fault::Skipping, ..ABORTED_BEFORE });
    check(Bounds { fault: Fault::Skipping, ..THERE_AND_BACK });
    check(Bounds { fault: Fault::Skipping, ..GONE_AND_BACK });
    must_be_missed(GONE_AND_BACK, Fault::Born);
}
