//! The ways to the stores.

pub mod grpc;
pub mod link;
pub(crate) mod pool;

pub use grpc::GrpcConnector;
pub use link::{AnswerReceiver, BatchSender, Connector, LinkError, LocalFuture};
