//! The store: runs commands on its shards, one RocksDB per shard.
//!
//! Arrows point one way: `rpc` -> `shard` -> `command` -> `engine`; `node` owns the data folder and what is in it,
//! `lease` says until when a shard may be served, `backup` copies it while it serves, `replication` to other stores, `resize` moves slots
//! between shards, `registration` speaks with the master on the public API alone.

mod backup;
mod command;
pub mod config;
mod engine;
mod holder;
mod lease;
mod metrics;
mod node;
mod peers;
pub mod registration;
mod removal;
mod reopening;
pub mod replication;
mod resize;
mod rpc;
mod sealed;
mod shard;

pub use backup::manifest::Manifest as BackupManifest;
pub use backup::restore::{RestoreError, restore};
pub use config::{Config, Fsync, MemoryConfig};
pub use lease::keeper::LeaseFigures;
pub use node::{Bound, ClusterError, OpenError, PutRecordError, RunError, Store, StoreHandle};
pub use shard::session::{LateAnswers, Session};
