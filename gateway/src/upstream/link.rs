//! One worker's way to one store, behind a small interface: over gRPC, or a call in the same process.

use bytes::Bytes;
use std::future::Future;
use std::pin::Pin;
use thiserror::Error;
use vasto_proto::id::{ClusterId, StoreId};

/// A future that stays on its worker's thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The way to a store was lost or could not be opened; the text says why.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct LinkError(pub String);

/// Both halves of an open link.
pub type LinkHalves = (Box<dyn BatchSender>, Box<dyn AnswerReceiver>);

/// Opens links.
pub trait Connector: Send + Sync + 'static {
    /// Opens a link on the calling worker's thread.
    fn connect(
        &self,
        store: StoreId,
        address: &str,
        cluster: ClusterId,
    ) -> LocalFuture<'static, Result<LinkHalves, LinkError>>;
}

/// The sending half.
pub trait BatchSender {
    /// Hands over one packed batch of operations; waits while the way is full.
    fn send(&mut self, batch: Bytes) -> LocalFuture<'_, Result<(), LinkError>>;
}

/// The receiving half.
pub trait AnswerReceiver {
    /// The next packed batch of answers. Cancel safe.
    fn receive(&mut self) -> LocalFuture<'_, Result<Bytes, LinkError>>;
}
