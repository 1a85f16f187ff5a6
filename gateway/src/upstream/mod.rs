//! The ways to the stores and to the master.

pub mod grpc;
pub mod link;
pub mod masters;
pub(crate) mod pool;
pub mod records;
#[cfg(test)]
mod tests;

pub use grpc::GrpcConnector;
pub use link::{AnswerReceiver, BatchSender, Connector, LinkError, LocalFuture};
