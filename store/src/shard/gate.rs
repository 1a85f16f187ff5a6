//! The one place that decides whether an operation may run on a shard. A refusal here is definite: nothing was executed.

use super::Shard;
use super::map::{Entry, ShardMap};
use super::ownership::Owned;
use std::sync::Arc;
use vasto_proto::batch::{OperationHead, Outcome};

/// Why an operation may not run.
pub type Refusal = (Outcome, String);

/// The shard of an operation, if it is here, serves, and is meant at the right epoch.
pub fn check<'m>(map: &'m ShardMap, head: &OperationHead) -> Result<&'m Arc<Shard>, Refusal> {
    match map.entry(head.target) {
        Some(Entry::Serving(shard)) if shard.is_failed() => {
            let reason = shard.trouble().unwrap_or_default();
            Err((Outcome::NotServing, format!("shard {} met an error and is being closed: {reason}", head.target)))
        }
        Some(Entry::Serving(shard)) if shard.epoch() == head.epoch => match shard.replication.refuses(head.flags) {
            // A replica's answers may be old: they need no lease.
            None if !shard.replication.leads() || shard.lease.allows() => Ok(shard),
            None => {
                let reason = shard.lease.reason();
                Err((Outcome::NotServing, format!("shard {} has no lease: {reason}", head.target)))
            }
            Some(reason) => Err((Outcome::NotServing, format!("shard {} {reason}", head.target))),
        },
        Some(Entry::Serving(shard)) => Err((
            Outcome::WrongEpoch,
            format!("shard {} is at epoch {}, not {}", head.target, shard.epoch(), head.epoch),
        )),
        Some(Entry::Opening) => Err((Outcome::NotServing, format!("shard {} is being opened", head.target))),
        Some(Entry::Closing(text)) => {
            Err((Outcome::NotServing, format!("shard {} met an error and is being closed: {text}", head.target)))
        }
        Some(Entry::Failed(text)) => Err((Outcome::NotServing, format!("shard {} is not open: {text}", head.target))),
        None => Err((Outcome::NotHere, format!("shard {} is not on this store", head.target))),
    }
}

impl Shard {
    /// Why a command that covers slots instead of naming keys may not run while the shard owns this: with other shards that assign slots
    /// otherwise it would miss keys, or see some twice.
    pub fn refuses_slots(&self, owned: &Owned, head: &OperationHead) -> Option<Refusal> {
        if owned.fence.is_some() {
            return Some((Outcome::NotServing, format!("slots of shard {} are just moving to another", self.key)));
        }
        let is_right = match head.shard_count() {
            Some(count) => count == owned.shard_count,
            None => !owned.had_operation,
        };
        let count = owned.shard_count;
        (!is_right).then(|| (Outcome::WrongEpoch, format!("the keyspace of shard {} has {count} shards", self.key)))
    }

    /// Why writes may not run though reads may.
    pub fn refuses_writes(&self) -> Option<Refusal> {
        if !self.replication.leads() {
            return Some((Outcome::NotServing, format!("shard {} is a replica here", self.key)));
        }
        self.replication.lacks_replicas().map(|reason| (Outcome::NoReplicas, format!("shard {}: {reason}", self.key)))
    }
}
