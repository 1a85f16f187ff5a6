//! The way of one vote, or of what was chosen by them, to another store.

use std::time::Duration;
use tonic::Request;
use vasto_proto::id::ClusterId;
use vasto_proto::pb::store_client::StoreClient;
use vasto_proto::pb::vote_request::Kind;
use vasto_proto::{PROTOCOL_VERSION, net, pb};

/// What a holder may take to answer: it syncs a file or two, perhaps on a busy disk.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Sends a store one message; the text of an error is for people.
pub async fn say(address: &str, cluster: ClusterId, kind: Kind) -> Result<pb::VoteResponse, String> {
    let channel = net::endpoint(address).map_err(|error| error.to_string())?.connect_lazy();
    let mut client = StoreClient::new(channel).max_decoding_message_size(net::CONTROL_BYTES_MAX);
    let mut request = Request::new(pb::VoteRequest { kind: Some(kind) });
    let metadata = request.metadata_mut();
    metadata.insert(net::PROTOCOL_METADATA, PROTOCOL_VERSION.into());
    let cluster = cluster.to_string().parse().map_err(|_| "a cluster id is hexadecimal".to_owned())?;
    metadata.insert(net::CLUSTER_METADATA, cluster);
    match tokio::time::timeout(ANSWER_MAX, client.vote(request)).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(format!("cannot be asked: {}", status.message())),
        Err(_) => Err("does not answer".to_owned()),
    }
}
