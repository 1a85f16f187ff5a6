//! The streams of copies: followers that come to a primary here, and copies that hand over to it.

use crate::replication::hand_over::Merge;
use crate::replication::leader::{self, Connection, Heard, MESSAGES_MAX};
use crate::shard::Shard;
use crate::shard::executor::Core;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt;
use tokio_stream::adapters::Map;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::pb::follower_message::Kind;
use vasto_proto::pb::{FollowerMessage, HandOverMessage, HandOverResponse, LeaderMessage};

/// A follower says at once who it is.
const OPENING_MAX: Duration = Duration::from_secs(5);

type Outgoing = Result<LeaderMessage, String>;
/// What a follower is sent.
pub type LeaderStream = Map<ReceiverStream<Outgoing>, fn(Outgoing) -> Result<LeaderMessage, Status>>;

fn key(keyspace: u32, shard: u32) -> Result<ShardKey, Status> {
    let shard = u16::try_from(shard).map_err(|_| Status::invalid_argument("there is no such shard"))?;
    Ok(ShardKey { keyspace: KeyspaceId(keyspace), shard: ShardId(shard) })
}

/// Serves a follower until it goes or this store stops.
pub async fn follow(
    core: &Arc<Core>,
    mut incoming: Streaming<FollowerMessage>,
    shutdown: &CancellationToken,
) -> Result<LeaderStream, Status> {
    let first = tokio::time::timeout(OPENING_MAX, incoming.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("a follower must say who it is"))??;
    let Some(FollowerMessage { kind: Some(Kind::Open(open)) }) = first else {
        return Err(Status::invalid_argument("a follower says first who it is"));
    };
    let key = key(open.keyspace_id, open.shard)?;
    let shard = leader::find(core, key, StoreId(open.store_id), open.epoch).map_err(Status::unavailable)?;
    let connection = Connection::new(core, &shard, open);
    drop(shard);
    let heard = |message: Result<FollowerMessage, Status>| match message {
        Ok(FollowerMessage { kind: Some(Kind::Progress(progress)) }) => Some(Heard::Applied(progress.applied)),
        Ok(FollowerMessage { kind: Some(Kind::Digests(digests)) }) => Some(Heard::Digests(digests)),
        Ok(FollowerMessage { kind: Some(Kind::Open(_)) | None }) | Err(_) => None,
    };
    let (outgoing, messages) = mpsc::channel(MESSAGES_MAX);
    core.replicator.spawn(connection.run(incoming.map_while(heard), outgoing, shutdown.clone()));
    Ok(ReceiverStream::new(messages).map(|message| message.map_err(Status::unavailable)))
}

/// Merges what a copy gives.
pub async fn take_over(
    core: &Arc<Core>,
    incoming: Streaming<HandOverMessage>,
    shutdown: &CancellationToken,
) -> Result<HandOverResponse, Status> {
    let (done, answer) = oneshot::channel();
    let (taking, shutdown) = (Arc::clone(core), shutdown.clone());
    core.replicator.spawn(async move {
        // A copy that gives slowly does not keep the store from stopping: it gives again to the next primary.
        if let Some(taken) = shutdown.run_until_cancelled(take(&taking, incoming)).await {
            // Whoever asked may be gone.
            let _ = done.send(taken);
        }
    });
    answer.await.unwrap_or_else(|_| Err(Status::unavailable("the store stops")))
}

async fn take(core: &Arc<Core>, mut incoming: Streaming<HandOverMessage>) -> Result<HandOverResponse, Status> {
    let mut merge: Option<Merge> = None;
    let mut giver: Option<(Arc<Shard>, u32, Epoch)> = None;
    while let Some(message) = incoming.message().await? {
        let (shard, _, epoch) = match &giver {
            Some(giver) => giver,
            None => {
                let key = key(message.keyspace_id, message.shard)?;
                let shard = leader::find(core, key, StoreId(message.store_id), message.epoch);
                giver.insert((shard.map_err(Status::unavailable)?, message.store_id, Epoch(message.epoch)))
            }
        };
        let (core, shard, epoch) = (Arc::clone(core), Arc::clone(shard), *epoch);
        let mut taking = merge.take().unwrap_or_else(|| Merge::new(&shard, message.position.map(Into::into)));
        let merging = tokio::task::spawn_blocking(move || {
            taking.flush(&core.stripes, &shard, epoch, &message.flush_stamp)?;
            taking.take(&core.stripes, &shard, epoch, message.rows)?;
            Ok::<_, crate::replication::hand_over::MergeError>(taking)
        });
        let merged = merging.await.map_err(|error| Status::internal(error.to_string()))?;
        merge = Some(merged.map_err(|error| Status::unavailable(error.to_string()))?);
    }
    let Some(((shard, store, _), merge)) = giver.zip(merge) else {
        return Err(Status::invalid_argument("nobody hands over nothing"));
    };
    let finished = tokio::task::spawn_blocking(move || merge.finish(&shard, store)).await;
    let finished = finished.map_err(|error| Status::internal(error.to_string()))?;
    finished.map_err(|error| Status::unavailable(error.to_string()))
}
