//! Moves slots between shards: what a shard owns by each version of the record, and how rows of the slots that it gives away are sent.

pub mod changes;
pub mod cleaning;
mod groups;
pub mod incoming;
mod moved_rows;
pub mod note;
pub mod pace;
mod rows;
mod rpc;
pub mod source;
pub mod target;
#[cfg(test)]
mod target_tests;
#[cfg(test)]
mod tests;
pub mod unfencing;

use crate::engine::EngineError;
use crate::shard::Shard;
use crate::shard::executor::Core;
use crate::shard::ownership::Owned;
use std::sync::Arc;
use vasto_proto::topology::{KeyspaceRecord, Layout, Phase};

/// Makes of a shard's slots what a record says, whose layout this is: call it when the record is on the disk and the shard has its part,
/// before anybody hears that the record is followed. Blocks; the caller sees to it that there is one call at a time.
pub fn follow(
    core: &Arc<Core>,
    shard: &Arc<Shard>,
    record: &KeyspaceRecord,
    layout: &Layout,
) -> Result<(), EngineError> {
    let gives = !layout.leaving(shard.key.shard).is_empty();
    let phase = record.active_operation().map(|operation| operation.phase).filter(|_| gives);
    match phase {
        Some(Phase::Fence) => fail::fail_point!("resize::source_fence_kept"),
        Some(Phase::Committed) => fail::fail_point!("resize::source_committed"),
        Some(Phase::Clean) => fail::fail_point!("resize::source_before_clean"),
        Some(Phase::Copy | Phase::Done | Phase::Aborted) | None => {}
    }
    let wanted = target::wanted(record, layout, shard.key.shard, core.replicator.store);
    // Before slots become the shard's: nothing is written to them then but by clients.
    shard.takes.follow(record, layout, shard.key, &wanted);
    let is_committed = record.active_operation().is_some_and(|operation| operation.phase == Phase::Committed);
    let gets = is_committed && !layout.coming(shard.key.shard).is_empty();
    if gets {
        fail::fail_point!("resize::target_committed");
        if !shard.replication.is_replica() {
            target::check_committed(shard, record, layout);
        }
    }
    let owned = Owned::of(record, layout, shard.key.shard);
    if let Some(fenced) = shard.take_ownership(&core.stripes, owned) {
        core.counters.fenced(fenced);
    }
    if phase == Some(Phase::Fence) {
        fail::fail_point!("resize::source_fenced");
    }
    if gets {
        fail::fail_point!("resize::target_serves");
    }
    // When nothing runs any more by what the shard owned before.
    target::start(core, shard, wanted);
    cleaning::follow(core, shard, record, layout);
    Ok(())
}
