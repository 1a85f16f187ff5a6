//! The streams of moves: shards that take slots over come here to the shard that has them.

use crate::resize::source::{Giving, MESSAGES_MAX};
use crate::shard::executor::Core;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::adapters::Map;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vasto_proto::id::{KeyspaceId, ShardId, ShardKey};
use vasto_proto::pb::{MoveMessage, MoveOpen};

type Outgoing = Result<MoveMessage, String>;
/// What a target is sent.
pub type MoveStream = Map<ReceiverStream<Outgoing>, fn(Outgoing) -> Result<MoveMessage, Status>>;

/// Gives a target the rows of the slots that it takes over, until it goes or this store stops.
pub async fn give(core: &Arc<Core>, open: MoveOpen, shutdown: &CancellationToken) -> Result<MoveStream, Status> {
    let shard =
        |shard: u32| u16::try_from(shard).map(ShardId).map_err(|_| Status::invalid_argument("there is no such shard"));
    let (source, target) = (shard(open.source)?, shard(open.target)?);
    let key = ShardKey { keyspace: KeyspaceId(open.keyspace_id), shard: source };
    let beginning = Arc::clone(core);
    let giving = tokio::task::spawn_blocking(move || Giving::new(&beginning, &open, key, target)).await;
    let giving = giving.map_err(|error| Status::internal(error.to_string()))?.map_err(Status::unavailable)?;
    let (outgoing, messages) = mpsc::channel(MESSAGES_MAX);
    core.replicator.spawn(giving.run(outgoing, shutdown.clone()));
    Ok(ReceiverStream::new(messages).map(|message| message.map_err(Status::unavailable)))
}
