//! The network of copies: how a follower reaches its primary.

use futures_util::StreamExt;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Streaming};
use vasto_proto::id::ClusterId;
use vasto_proto::pb::store_client::StoreClient;
use vasto_proto::pb::{
    FollowOpen, FollowProgress, FollowerMessage, HandOverMessage, HandOverResponse, LeaderMessage, MoveMessage,
    MoveOpen, follower_message,
};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

/// Confirmations that wait for the network: each says all that the ones before it said.
const CONFIRMATIONS_MAX: usize = 64;
/// Messages of a hand-over that wait for the network.
const HANDED_MAX: usize = 4;
/// To be answered at all.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A primary that is silent for so long is gone: it says something ten times a second.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// To hear that nothing more comes.
const FINISH_MAX: Duration = Duration::from_millis(200);

/// Why there is no connection to a primary; the texts are for people.
pub enum NotOpen {
    Unreachable(String),
    /// It has answered.
    Refused(String),
}

/// A connection to a primary.
pub struct Link {
    confirmations: mpsc::Sender<FollowerMessage>,
    incoming: Streaming<LeaderMessage>,
}

impl Link {
    pub async fn open(address: &str, cluster: ClusterId, open: FollowOpen) -> Result<Self, NotOpen> {
        let unreachable = NotOpen::Unreachable;
        let mut client = client(address).await.map_err(unreachable)?;
        let (confirmations, outgoing) = mpsc::channel(CONFIRMATIONS_MAX);
        let first = FollowerMessage { kind: Some(follower_message::Kind::Open(open)) };
        confirmations.try_send(first).map_err(|error| unreachable(error.to_string()))?;
        let request = request(ReceiverStream::new(outgoing), cluster).map_err(unreachable)?;
        let answered = tokio::time::timeout(ANSWER_MAX, client.follow(request)).await;
        let response = answered.map_err(|_| unreachable("the primary does not answer".to_owned()))?;
        let incoming = response.map_err(|status| NotOpen::Refused(status.message().to_owned()))?.into_inner();
        Ok(Self { confirmations, incoming })
    }

    /// The next message; `None` when the primary has nothing more to say.
    pub async fn next(&mut self) -> Result<Option<pb::leader_message::Kind>, String> {
        let next = tokio::time::timeout(SILENCE_MAX, self.incoming.next()).await;
        match next.map_err(|_| "the primary is silent".to_owned())? {
            None => Ok(None),
            Some(Err(status)) => Err(status.message().to_owned()),
            Some(Ok(LeaderMessage { kind: Some(kind) })) => Ok(Some(kind)),
            Some(Ok(LeaderMessage { kind: None })) => Err("the primary says what nobody here understands".to_owned()),
        }
    }

    /// Lets the primary hear all that was said, and ends.
    pub async fn finish(self) {
        let Self { confirmations, mut incoming } = self;
        drop(confirmations);
        // It says no more than that it has heard the end; whoever does not is gone.
        let _ = tokio::time::timeout(FINISH_MAX, incoming.next()).await;
    }

    /// Where else the follower says something.
    pub fn sender(&self) -> mpsc::Sender<FollowerMessage> {
        self.confirmations.clone()
    }

    /// Says how far the follower is; left out if the network is slow, as the next one says it too.
    pub fn confirm(&self, applied: u64) -> Result<(), String> {
        let kind = Some(follower_message::Kind::Progress(FollowProgress { applied }));
        match self.confirmations.try_send(FollowerMessage { kind }) {
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err("the primary is gone".to_owned()),
        }
    }
}

/// A connection to the primary of a shard that gives slots away.
pub struct MoveLink {
    incoming: Streaming<MoveMessage>,
}

impl MoveLink {
    pub async fn open(address: &str, cluster: ClusterId, open: MoveOpen) -> Result<Self, NotOpen> {
        let unreachable = NotOpen::Unreachable;
        let mut client = client(address).await.map_err(unreachable)?;
        let request = request(open, cluster).map_err(unreachable)?;
        let answered = tokio::time::timeout(ANSWER_MAX, client.r#move(request)).await;
        let response = answered.map_err(|_| unreachable("the source does not answer".to_owned()))?;
        let incoming = response.map_err(|status| NotOpen::Refused(status.message().to_owned()))?.into_inner();
        Ok(Self { incoming })
    }

    /// The next message.
    pub async fn next(&mut self) -> Result<pb::move_message::Kind, String> {
        let next = tokio::time::timeout(SILENCE_MAX, self.incoming.next()).await;
        match next.map_err(|_| "the source is silent".to_owned())? {
            None => Err("the source has ended the move".to_owned()),
            Some(Err(status)) => Err(status.message().to_owned()),
            Some(Ok(MoveMessage { kind: Some(kind) })) => Ok(kind),
            Some(Ok(MoveMessage { kind: None })) => Err("the source says what nobody here understands".to_owned()),
        }
    }
}

/// Gives rows to a primary.
pub async fn hand_over(
    address: &str,
    cluster: ClusterId,
    messages: mpsc::Receiver<HandOverMessage>,
) -> Result<HandOverResponse, String> {
    let mut client = client(address).await?;
    let response = client.hand_over(request(ReceiverStream::new(messages), cluster)?).await;
    Ok(response.map_err(|status| status.message().to_owned())?.into_inner())
}

/// Room for the messages of a hand-over.
pub fn handed() -> (mpsc::Sender<HandOverMessage>, mpsc::Receiver<HandOverMessage>) {
    mpsc::channel(HANDED_MAX)
}

async fn client(address: &str) -> Result<StoreClient<Channel>, String> {
    let endpoint = net::endpoint(address).map_err(|error| error.to_string())?;
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    // A batch of the log has no limit but that of a value: it comes as it was written.
    Ok(StoreClient::new(channel).max_decoding_message_size(usize::MAX))
}

fn request<M>(messages: M, cluster: ClusterId) -> Result<Request<M>, String> {
    let mut request = Request::new(messages);
    let metadata = request.metadata_mut();
    for (name, value) in
        [(net::PROTOCOL_METADATA, PROTOCOL_VERSION.to_string()), (net::CLUSTER_METADATA, cluster.to_string())]
    {
        metadata.insert(name, value.parse().map_err(|_| format!("{value} cannot be said"))?);
    }
    Ok(request)
}
