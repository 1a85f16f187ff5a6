//! The gRPC side of the store: sockets to workers, streams to sessions.

mod following;
mod moving;
mod pieces;
pub mod server;
mod stream;
#[cfg(test)]
mod tests;
mod voting;
