//! What the end-to-end tests stand on: real processes, raw RESP connections, redis-server as oracle, tests as data.
//!
//! The functions here panic where a test would fail anyway: their messages say what was waited for and what came.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may"))]

pub mod clock;
pub mod cluster;
pub mod connection;
pub mod eventually;
pub mod heavy;
pub mod history;
pub mod ledger;
pub mod linearizability;
pub mod load;
pub mod memory;
pub mod network;
pub mod node;
pub mod notation;
pub mod package_corpus;
pub mod payload;
pub mod redis_server;
pub mod resp;
pub mod script;
pub mod seed;
pub mod slots;

pub use cluster::{Cluster, Server};
pub use connection::{Address, Connection};
pub use heavy::heavy;
pub use node::Node;
pub use redis_server::RedisServer;
pub use resp::Value;
