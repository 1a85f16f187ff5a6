//! The stateless gateway: speaks RESP to clients, routes each key to its shard, merges the answers.
//!
//! The way of a command: `listener` -> `worker` -> `connection` (reads, scans) -> `dispatch` -> `command` (answered here) or
//! `route` (which shards) -> `upstream` (batches to stores); the answers come back through `upstream` into the connection's ring of
//! pending replies and leave in the order of the requests.

pub mod clients;
pub mod command;
mod connection;
mod dispatch;
pub mod follow;
mod listener;
pub mod metrics;
mod operation;
pub mod process;
mod resp;
mod route;
pub mod routing;
pub mod session;
pub mod settings;
pub mod shared;
pub mod slowlog;
pub mod statistics;
pub mod upstream;
mod worker;

pub use listener::{Bound, Gateway};
pub use settings::Config;
