//! The contract of Vasto: everything that two processes must agree on byte for byte or compute alike.

pub mod batch;
pub mod command;
pub mod digest;
pub mod error;
pub mod id;
pub mod key;
pub mod net;
pub mod rdb;
pub mod row;
pub mod slot;
pub mod topology;

/// The generated messages and services; validated by the types of this crate on receipt.
pub mod pb {
    #![allow(clippy::all, clippy::unwrap_used, missing_docs)]
    tonic::include_proto!("vasto");
}

/// Version of the conversation between roles; adjacent versions must work together (rolling restart).
///
/// 2: records have settings, and the master alters them once every store is that new.
/// 3: keyspaces are created and dropped; a store before would keep the record of a dropped one as that of one that lives.
/// 4: shards have copies, primaries leases, records terms.
/// 5: keyspaces are resized; a store before would keep the record without what it says of that.
pub const PROTOCOL_VERSION: u32 = 5;

/// The first version whose stores keep the settings in a record.
pub const SETTINGS_VERSION: u32 = 2;

/// The first version whose stores know that a keyspace can be dropped.
pub const DROP_VERSION: u32 = 3;

/// The first version whose stores hold copies of shards and know terms.
pub const COPIES_VERSION: u32 = 4;

/// The first version whose stores move slots.
pub const RESIZE_VERSION: u32 = 5;

/// What `redis_version` in INFO and `version` in HELLO say: the Redis whose answers ours equal.
pub const REDIS_VERSION: &str = "7.0.15";
