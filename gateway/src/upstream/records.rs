//! Asks a store for records: what a gateway goes by while it hears no master.

use std::time::Duration;
use tonic::Request;
use vasto_proto::id::ClusterId;
use vasto_proto::pb::store_client::StoreClient;
use vasto_proto::topology::KeyspaceRecord;
use vasto_proto::{PROTOCOL_VERSION, net, pb};

/// A store answers from memory: one that takes longer hangs.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// What a store keeps as chosen and is newer than what is known; the text of an error is for people.
pub async fn newer(
    address: String,
    cluster: ClusterId,
    known: Vec<pb::KnownRecord>,
) -> Result<Vec<KeyspaceRecord>, String> {
    let asking = async {
        let endpoint = net::endpoint(&address).map_err(|error| error.to_string())?;
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let mut client = StoreClient::new(channel).max_decoding_message_size(net::CONTROL_BYTES_MAX);
        let mut request = Request::new(pb::RecordsRequest { known });
        let metadata = request.metadata_mut();
        metadata.insert(net::PROTOCOL_METADATA, PROTOCOL_VERSION.into());
        let cluster = cluster.to_string().parse().map_err(|_| "a cluster id is hexadecimal".to_owned())?;
        metadata.insert(net::CLUSTER_METADATA, cluster);
        let answered = client.records(request).await.map_err(|status| status.message().to_owned())?;
        let records = answered.into_inner().records.into_iter().map(KeyspaceRecord::try_from);
        records.collect::<Result<_, _>>().map_err(|error| error.to_string())
    };
    tokio::time::timeout(ANSWER_MAX, asking).await.map_err(|_| "the store does not answer".to_owned())?
}
