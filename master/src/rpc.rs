//! The master's gRPC services: sessions of stores, and the topology as a stream.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;
use vasto_proto::id::{ClusterId, Epoch, ShardId, StoreId};
use vasto_proto::pb::master_server::{Master, MasterServer};
use vasto_proto::topology::ballot::Accepted;
use vasto_proto::topology::{Fsync, KeyspaceRecord, RecordError, Settings, ShardStatus, entry};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

use crate::driver::{AlterFailure, Change, Link, SessionEnd, Stopped};
use crate::failover::Planned;
use crate::keyspaces::Creation;
use crate::leadership::Ballot;
use crate::operations::OperationWish;
use crate::place::Site;
use crate::state::{Alteration, Report, SessionId};

pub struct Service {
    link: Arc<Link>,
    /// One task per store's session.
    sessions: TaskTracker,
    shutdown: CancellationToken,
}

impl Service {
    pub fn new(link: Arc<Link>, shutdown: CancellationToken) -> Self {
        Self { link, sessions: TaskTracker::new(), shutdown }
    }

    /// The tasks that are to be awaited when the server has ended.
    pub fn sessions(&self) -> TaskTracker {
        self.sessions.clone()
    }

    pub fn into_server(self) -> MasterServer<Self> {
        MasterServer::new(self).max_decoding_message_size(net::CONTROL_BYTES_MAX)
    }
}

/// The gRPC server ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("the master's gRPC server failed")]
pub struct ServeError(#[from] tonic::transport::Error);

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, service: Service, stop: CancellationToken) -> Result<(), ServeError> {
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let stopped = stop.cancelled_owned();
    Ok(net::server().serve_with_incoming_shutdown(service.into_server(), incoming, stopped).await?)
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Master for Service {
    type RegisterStream = ResponseStream<pb::Directive>;

    async fn register(
        &self,
        request: Request<Streaming<pb::StoreReport>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let (session, directives) = self.link.open_session().await.map_err(stopping)?;
        let reports = request.into_inner();
        let (link, shutdown) = (Arc::clone(&self.link), self.shutdown.clone());
        self.sessions.spawn(async move {
            let read = read_reports(&link, session, reports);
            let broken = shutdown.run_until_cancelled(read).await.and_then(Result::err);
            let reason = broken.map(|status| SessionEnd(status.message().to_owned()));
            debug!(session = session.0, ?reason, "session ended");
            // After shutdown nobody listens any more.
            let _ = link.end_session(session, reason).await;
        });
        let directives = ReceiverStream::new(directives);
        Ok(Response::new(Box::pin(directives.map(|directive| directive.map_err(refused)))))
    }

    type WatchTopologyStream = ResponseStream<pb::Topology>;

    async fn watch_topology(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchTopologyStream>, Status> {
        require_version(request.get_ref().protocol_version)?;
        let snapshots = WatchStream::new(self.link.topology());
        Ok(Response::new(Box::pin(snapshots.map(|snapshot| Ok(pb::Topology::from(snapshot.as_ref()))))))
    }

    async fn alter_keyspace(
        &self,
        request: Request<pb::AlterKeyspaceRequest>,
    ) -> Result<Response<pb::AlterKeyspaceResponse>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        let changes = Settings::try_from(request.settings.unwrap_or_default());
        let changes = changes.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let expected_epoch = Some(Epoch(request.expected_epoch)).filter(|epoch| epoch.0 != 0);
        let copies = Some(request.copies).filter(|copies| *copies != 0);
        let change = Change::Alter(Alteration { name: request.name, changes, copies, expected_epoch });
        let record = self.link.change(change).await.map_err(not_changed)?;
        Ok(Response::new(pb::AlterKeyspaceResponse { record: Some((&record).into()) }))
    }

    async fn create_keyspace(
        &self,
        request: Request<pb::CreateKeyspaceRequest>,
    ) -> Result<Response<pb::CreateKeyspaceResponse>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        let settings = Settings::try_from(request.settings.unwrap_or_default());
        let creation = Creation {
            name: request.name,
            shards: Some(request.shards).filter(|shards| *shards != 0),
            copies: request.copies.max(1),
            settings: settings.map_err(|error| Status::invalid_argument(error.to_string()))?,
            may_exist: request.may_exist,
        };
        let record = self.link.change(Change::Create(creation)).await.map_err(not_changed)?;
        Ok(Response::new(pb::CreateKeyspaceResponse { record: Some((&record).into()) }))
    }

    async fn drop_keyspace(
        &self,
        request: Request<pb::DropKeyspaceRequest>,
    ) -> Result<Response<pb::DropKeyspaceResponse>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        let record = self.link.change(Change::Drop(request.name)).await.map_err(not_changed)?;
        let snapshot = Arc::clone(&self.link.topology().borrow());
        let is_down = |store: &StoreId| !snapshot.store(*store).is_some_and(|store| store.up);
        let owners: BTreeSet<StoreId> = record.shards.iter().map(|shard| shard.primary).collect();
        let stores_down = owners.into_iter().filter(is_down).map(|store| store.0).collect();
        Ok(Response::new(pb::DropKeyspaceResponse { keyspace_id: record.id.0, stores_down }))
    }

    async fn failover_shard(
        &self,
        request: Request<pb::FailoverShardRequest>,
    ) -> Result<Response<pb::FailoverShardResponse>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        let shard = u16::try_from(request.shard).map_err(|_| {
            Status::failed_precondition(format!("there is no shard {}; nothing was changed", request.shard))
        })?;
        let to = Some(StoreId(request.to_store)).filter(|store| store.0 != 0);
        let planned = Planned { name: request.name, shard: ShardId(shard), to };
        let record = self.link.change(Change::Failover(planned)).await.map_err(not_changed)?;
        Ok(Response::new(pb::FailoverShardResponse { record: Some((&record).into()) }))
    }

    async fn resize_keyspace(
        &self,
        request: Request<pb::ResizeKeyspaceRequest>,
    ) -> Result<Response<pb::OperationResponse>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        self.operate(OperationWish::Resize { name: request.name, shards: request.shards }).await
    }

    async fn replace_store(
        &self,
        request: Request<pb::ReplaceStoreRequest>,
    ) -> Result<Response<pb::OperationResponse>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        let with = Some(StoreId(request.with_store_id)).filter(|store| store.0 != 0);
        self.operate(OperationWish::Replace { name: request.name, store: StoreId(request.store_id), with }).await
    }

    async fn abort_operation(
        &self,
        request: Request<pb::AbortOperationRequest>,
    ) -> Result<Response<pb::OperationResponse>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        self.operate(OperationWish::Abort { name: request.name }).await
    }

    async fn get_operation(
        &self,
        request: Request<pb::GetOperationRequest>,
    ) -> Result<Response<pb::OperationStatus>, Status> {
        let request = request.into_inner();
        require_version(request.protocol_version)?;
        Ok(Response::new(self.link.operation_status(request.name).await.map_err(not_changed)?))
    }
}

impl Service {
    async fn operate(&self, wish: OperationWish) -> Result<Response<pb::OperationResponse>, Status> {
        let record = self.link.change(Change::Operate(wish)).await.map_err(not_changed)?;
        Ok(Response::new(pb::OperationResponse { record: Some((&record).into()) }))
    }
}

fn not_changed(failure: AlterFailure) -> Status {
    match failure {
        // Nothing was changed, and the gateway asks another master.
        AlterFailure::Refused(error) if error.is_elsewhere() => Status::aborted(error.to_string()),
        AlterFailure::Refused(error) => Status::failed_precondition(error.to_string()),
        AlterFailure::Stopped => stopping(Stopped),
    }
}

/// Hands reports to the driver until the stream ends.
async fn read_reports(link: &Link, session: SessionId, mut reports: Streaming<pb::StoreReport>) -> Result<(), Status> {
    while let Some(message) = reports.message().await? {
        require_version(message.protocol_version)?;
        let report = parse_report(message).map_err(|error| Status::invalid_argument(error.to_string()))?;
        link.report(session, report).await.map_err(stopping)?;
    }
    Ok(())
}

fn parse_report(message: pb::StoreReport) -> Result<Report, RecordError> {
    let fsync = Fsync::from_code(message.fsync)?;
    let records = message.records.into_iter().map(KeyspaceRecord::try_from).collect::<Result<Vec<_>, _>>()?;
    let ballot = Ballot {
        follows: entry::term(message.follows),
        leader_heard: message.leader_heard_ms.map(Duration::from_millis),
        leader: message.leader,
        group: message.group.map(Accepted::from_message).transpose()?.flatten(),
        answers: message
            .answers
            .into_iter()
            .filter_map(|it| entry::answer(it).transpose())
            .collect::<Result<_, _>>()?,
        masters: message.masters,
    };
    Ok(Report {
        ballot,
        store: StoreId(message.store_id),
        address: message.address,
        protocol_version: message.protocol_version,
        cluster: ClusterId(message.cluster_id),
        records: message.has_records.then_some(records),
        free_disk_bytes: message.free_disk_bytes,
        fsync,
        site: Site { zone: message.zone, host: message.host, disk: message.disk, tags: message.tags },
        failure: message.failure,
        // One that cannot be true says nothing.
        shards: message.shards.into_iter().filter_map(ShardStatus::from_message).collect(),
    })
}

/// Adjacent versions work together, so that a cluster can be upgraded one process after the other.
fn require_version(theirs: u32) -> Result<(), Status> {
    if theirs.abs_diff(PROTOCOL_VERSION) <= 1 {
        return Ok(());
    }
    let text = format!("protocol version {theirs} does not work with this master's version {PROTOCOL_VERSION}");
    Err(Status::failed_precondition(text))
}

fn refused(SessionEnd(reason): SessionEnd) -> Status {
    Status::failed_precondition(reason)
}

fn stopping(_: Stopped) -> Status {
    Status::unavailable("the master is stopping")
}
