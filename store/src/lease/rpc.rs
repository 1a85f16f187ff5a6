//! The way to one holder over gRPC.

use std::future::Future;
use std::time::Duration;
use tonic::Request;
use tonic::transport::Channel;
use vasto_proto::id::ClusterId;
use vasto_proto::pb::store_client::StoreClient;
use vasto_proto::pb::{RenewRequest, RenewResponse};
use vasto_proto::{PROTOCOL_VERSION, net};

/// What a holder may take to answer: two attempts fit into a lease.
pub const ANSWER_MAX: Duration = Duration::from_millis(400);
/// Calls without an answer after which the channel is made anew: one to a machine that is gone waits for TCP, far longer than it is away.
const MISSES_MAX: u32 = 2;
/// Calls under way to one holder. More have come only where it does not answer: another one would tell nothing.
const CALLS_MAX: usize = 8;

pub struct Link {
    address: String,
    client: Option<StoreClient<Channel>>,
    misses: u32,
    calls: usize,
}

impl Link {
    pub fn new(address: String) -> Self {
        Self { address, client: None, misses: 0, calls: 0 }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Asks the holder; tell [`Link::ended`] how it went. `None`: so many calls are under way that this one is left out.
    pub fn ask(
        &mut self,
        request: RenewRequest,
        cluster: ClusterId,
    ) -> Option<impl Future<Output = Result<RenewResponse, String>> + Send + use<>> {
        if self.calls >= CALLS_MAX {
            return None;
        }
        self.calls += 1;
        let client = match &self.client {
            Some(client) => Ok(client.clone()),
            None => net::endpoint(&self.address).map_err(|error| error.to_string()).map(|endpoint| {
                // Connects when it is first used, and again whenever the connection is lost.
                let channel = endpoint.connect_timeout(ANSWER_MAX).connect_lazy();
                self.client.insert(StoreClient::new(channel)).clone()
            }),
        };
        Some(async move {
            let mut client = client?;
            let mut request = Request::new(request);
            let metadata = request.metadata_mut();
            metadata.insert(net::PROTOCOL_METADATA, PROTOCOL_VERSION.into());
            let cluster = cluster.to_string().parse().map_err(|_| "a cluster id is hexadecimal".to_owned())?;
            metadata.insert(net::CLUSTER_METADATA, cluster);
            match tokio::time::timeout(ANSWER_MAX, client.renew(request)).await {
                Ok(Ok(response)) => Ok(response.into_inner()),
                Ok(Err(status)) => Err(format!("cannot be asked: {}", status.message())),
                Err(_) => Err("does not answer".to_owned()),
            }
        })
    }

    pub fn ended(&mut self, has_answered: bool) {
        // The link may be a new one, to another address.
        self.calls = self.calls.saturating_sub(1);
        if has_answered {
            self.misses = 0;
        } else {
            self.misses += 1;
            if self.misses >= MISSES_MAX {
                self.misses = 0;
                self.client = None;
            }
        }
    }
}
