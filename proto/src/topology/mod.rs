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
pub mod peers;
pub mod position;
pub mod proposer;
pub mod record;
pub mod settings;
pub mod snapshot;

pub use entry::Entry;
pub use peers::{HolderGroup, Peers};
pub use position::{Era, FollowerStatus, Position, Role, ShardStatus};
pub use record::{KeyspaceRecord, NOBODY, RecordError, ShardRecord, validate_name};
pub use settings::{Fsync, Settings};
pub use snapshot::{Leadership, Snapshot, StoreInfo};
