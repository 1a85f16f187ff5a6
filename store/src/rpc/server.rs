//! Workers: one thread, one runtime and one gRPC server each; an acceptor hands every socket to the least loaded.

use super::following;
use super::moving;
use super::stream::AnswerStream;
use super::voting;
use crate::{RunError, StoreHandle};
use futures_util::StreamExt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use vasto_proto::id::ClusterId;
use vasto_proto::pb::store_server;
use vasto_proto::pb::{
    FollowerMessage, Frame, HandOverMessage, HandOverResponse, MoveOpen, RecordsRequest, RecordsResponse, RenewRequest,
    RenewResponse, VoteRequest, VoteResponse,
};
use vasto_proto::topology::KeyspaceRecord;
use vasto_proto::{PROTOCOL_VERSION, net};

/// Sockets that wait for a worker to take them up.
const SOCKET_QUEUE_MAX: usize = 64;
/// How long streams may drain at the end.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// After a failure to accept (no file descriptors left): soon enough, and no busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `shutdown`.
pub async fn serve(
    handle: &StoreHandle,
    listener: TcpListener,
    workers: usize,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
    let draining = CancellationToken::new();
    let workers: Vec<Worker> = (0..workers)
        .map(|number| Worker::start(number, handle.clone(), draining.clone()))
        .collect::<io::Result<_>>()
        .map_err(RunError::Worker)?;
    let accepted = shutdown.run_until_cancelled(accept(&listener, &workers)).await;
    drop(listener);
    shutdown.cancel();
    // While followers are served: answers may wait for them.
    let aside = handle.clone();
    if tokio::task::spawn_blocking(move || aside.step_aside()).await.is_err() {
        tracing::error!("letting others lead panicked");
    }
    draining.cancel();
    for worker in workers {
        let thread = worker.thread;
        drop(worker.sockets);
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("a worker had panicked");
        }
    }
    accepted.unwrap_or(Ok(()))
}

async fn accept(listener: &TcpListener, workers: &[Worker]) -> Result<(), RunError> {
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let least = workers.iter().enumerate().min_by_key(|(_, worker)| worker.load.load(Ordering::Relaxed));
        let Some((number, worker)) = least else { return Ok(()) };
        // The worker's own runtime must watch the socket, so it travels as the plain thing.
        let Ok(socket) = socket.set_nodelay(true).and_then(|()| socket.into_std()) else { continue };
        let load = Load::new(&worker.load);
        if worker.sockets.send((socket, load)).await.is_err() {
            return Err(RunError::WorkerEnded(number));
        }
    }
}

struct Worker {
    sockets: mpsc::Sender<(std::net::TcpStream, Load)>,
    load: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Worker {
    fn start(number: usize, handle: StoreHandle, shutdown: CancellationToken) -> io::Result<Self> {
        let (sockets, incoming) = mpsc::channel(SOCKET_QUEUE_MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name(format!("store-{number}")).spawn(move || {
            if let Err(error) = runtime.block_on(work(handle, incoming, shutdown)) {
                tracing::error!(%error, "a worker's server failed");
            }
        })?;
        Ok(Self { sockets, load: Arc::default(), thread })
    }
}

async fn work(
    handle: StoreHandle,
    incoming: mpsc::Receiver<(std::net::TcpStream, Load)>,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let service = store_server::StoreServer::new(Service { handle, shutdown: shutdown.clone() })
        .max_decoding_message_size(net::MESSAGE_BYTES_MAX);
    let sockets = ReceiverStream::new(incoming).map(|(socket, load)| {
        let stream = TcpStream::from_std(socket)?;
        Ok::<_, io::Error>(Socket { stream, _load: load })
    });
    let serving = net::server().serve_with_incoming_shutdown(service, sockets, shutdown.clone().cancelled_owned());
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN_MAX).await;
    };
    tokio::select! {
        served = serving => served,
        () = overdue => {
            tracing::warn!("streams did not drain in time");
            Ok(())
        }
    }
}

/// Counts a connection for as long as it lives.
struct Load(Arc<AtomicUsize>);

impl Load {
    fn new(load: &Arc<AtomicUsize>) -> Self {
        load.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(load))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A gateway's connection.
struct Socket {
    stream: TcpStream,
    _load: Load,
}

impl Connected for Socket {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(task, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(task, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(task, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(task)
    }
}

struct Service {
    handle: StoreHandle,
    shutdown: CancellationToken,
}

#[tonic::async_trait]
impl store_server::Store for Service {
    type ExecuteStream = AnswerStream;

    async fn execute(&self, request: Request<Streaming<Frame>>) -> Result<Response<AnswerStream>, Status> {
        check_peer(request.metadata(), self.handle.cluster())?;
        Ok(Response::new(AnswerStream::new(&self.handle, request.into_inner(), &self.shutdown)))
    }

    type FollowStream = following::LeaderStream;

    async fn follow(
        &self,
        request: Request<Streaming<FollowerMessage>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        check_peer(request.metadata(), self.handle.cluster())?;
        let stream = following::follow(self.handle.core(), request.into_inner(), &self.shutdown).await?;
        Ok(Response::new(stream))
    }

    async fn hand_over(
        &self,
        request: Request<Streaming<HandOverMessage>>,
    ) -> Result<Response<HandOverResponse>, Status> {
        check_peer(request.metadata(), self.handle.cluster())?;
        Ok(Response::new(following::take_over(self.handle.core(), request.into_inner(), &self.shutdown).await?))
    }

    type MoveStream = moving::MoveStream;

    async fn r#move(&self, request: Request<MoveOpen>) -> Result<Response<Self::MoveStream>, Status> {
        check_peer(request.metadata(), self.handle.cluster())?;
        Ok(Response::new(moving::give(self.handle.core(), request.into_inner(), &self.shutdown).await?))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        check_peer(request.metadata(), self.handle.cluster())?;
        Ok(Response::new(self.handle.renew(request.get_ref())))
    }

    async fn vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        check_peer(request.metadata(), self.handle.cluster())?;
        Ok(Response::new(voting::vote(&self.handle, request.into_inner()).await?))
    }

    async fn records(&self, request: Request<RecordsRequest>) -> Result<Response<RecordsResponse>, Status> {
        check_peer(request.metadata(), self.handle.cluster())?;
        let known = request.into_inner().known;
        let is_news = |record: &KeyspaceRecord| {
            let known = known.iter().find(|known| known.keyspace_id == record.id.0);
            known.is_none_or(|known| known.epoch < record.epoch.0)
        };
        let handle = self.handle.clone();
        // They may be locked while one of them is being followed.
        let records = tokio::task::spawn_blocking(move || handle.records()).await;
        let records = records.map_err(|panic| Status::internal(format!("reading records panicked: {panic}")))?;
        let records = records.iter().filter(|record| is_news(record)).map(Into::into).collect();
        Ok(Response::new(RecordsResponse { records }))
    }
}

/// Adjacent versions work together, clusters never.
fn check_peer(metadata: &MetadataMap, own: ClusterId) -> Result<(), Status> {
    let text = |name: &'static str| metadata.get(name).and_then(|value| value.to_str().ok());
    let version = text(net::PROTOCOL_METADATA).and_then(|version| version.parse::<u32>().ok());
    match version {
        Some(version) if version.abs_diff(PROTOCOL_VERSION) <= 1 => {}
        Some(version) => {
            return Err(Status::failed_precondition(format!(
                "protocol version {version} does not work with version {PROTOCOL_VERSION} of this store"
            )));
        }
        None => return Err(Status::failed_precondition(format!("no protocol version in {}", net::PROTOCOL_METADATA))),
    }
    let cluster = text(net::CLUSTER_METADATA).and_then(|cluster| u64::from_str_radix(cluster, 16).ok());
    let cluster = ClusterId(cluster.unwrap_or(0));
    if own != ClusterId(0) && own != cluster {
        return Err(Status::failed_precondition(format!("this store belongs to cluster {own}, not {cluster}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_peers_of_the_same_cluster_and_an_adjacent_version_get_in() {
        let metadata = |version: &str, cluster: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(net::PROTOCOL_METADATA, version.parse().unwrap());
            metadata.insert(net::CLUSTER_METADATA, cluster.parse().unwrap());
            metadata
        };
        let own = ClusterId(0xab);
        let adjacent = (PROTOCOL_VERSION + 1).to_string();
        assert!(check_peer(&metadata(&adjacent, "00000000000000ab"), own).is_ok());
        assert!(check_peer(&metadata(&adjacent, "ac"), ClusterId(0)).is_ok());
        let other = check_peer(&metadata(&adjacent, "ac"), own).unwrap_err();
        assert_eq!(other.message(), "this store belongs to cluster 00000000000000ab, not 00000000000000ac");
        assert!(check_peer(&metadata(&(PROTOCOL_VERSION + 2).to_string(), "ab"), own).is_err());
        assert!(check_peer(&MetadataMap::new(), ClusterId(0)).is_err());
    }
}
