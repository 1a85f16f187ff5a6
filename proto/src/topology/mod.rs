//! Who serves what: records of keyspaces and the snapshot that gateways route by. Pure values, validated on receipt.

pub mod ballot;
pub mod entry;
#[cfg(test)]
mod failover_model;
pub mod lease;
#[cfg(test)]
mod lease_model;
#[cfg(test)]
mod model;
pub mod operation;
pub mod peers;
pub mod position;
pub mod proposer;
pub mod record;
#[cfg(test)]
mod resize_model;
pub mod settings;
pub mod slots;
pub mod snapshot;

pub use entry::Entry;
pub use operation::{Operation, OperationKind, Phase, StepError};
pub use peers::{HolderGroup, Peers};
pub use position::{Era, FollowerStatus, MoveStage, MoveStatus, Position, Role, ShardStatus};
pub use record::{KeyspaceRecord, NOBODY, RecordError, ShardRecord, validate_name};
pub use settings::{Fsync, Settings};
pub use slots::{Layout, Move, SlotSet};
pub use snapshot::{Leadership, Snapshot, StoreInfo};
