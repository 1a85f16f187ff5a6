//! Leases: as a holder the store grants them, as a primary it asks for them, and a shard that needs one is served only while it holds.
//!
//! What is decided is decided in `vasto_proto::topology::lease`; here are the clock, the messages and the shards.
//! - `holder` answers what primaries ask, from memory alone;
//! - `keeper` asks all holders for all shards, on a thread of its own, and says of each until when it may be served;
//! - `state` is what the gate and the look before an answer leaves compare with the clock.

pub mod clock;
pub mod holder;
pub mod keeper;
mod rpc;
pub mod state;
#[cfg(test)]
mod tests;
