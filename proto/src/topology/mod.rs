//! Who serves what: records of keyspaces and the snapshot that gateways route by. Pure values, validated on receipt.

pub mod ballot;
#[cfg(test)]
mod model;
pub mod proposer;
pub mod record;
pub mod settings;
pub mod snapshot;

pub use record::{KeyspaceRecord, RecordError, ShardRecord, validate_name};
pub use settings::{Fsync, Settings};
pub use snapshot::{Snapshot, StoreInfo};
