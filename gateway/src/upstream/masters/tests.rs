//! Questions to a scripted master over gRPC, and what clients are answered without one.

use super::*;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tonic::Request;
use tonic::transport::server::TcpIncoming;
use vasto_proto::command::Reply;
use vasto_proto::pb::master_server::{Master, MasterServer};
use vasto_proto::topology::NOBODY;

/// A master that answers what it was told to, and notes what it is asked.
#[derive(Clone)]
struct Scripted(Arc<Script>);

struct Script {
    asked: Mutex<Vec<String>>,
    operation: Mutex<Result<pb::OperationResponse, Status>>,
    status: Mutex<Result<pb::OperationStatus, Status>>,
}

impl Scripted {
    fn new() -> Self {
        let (operation, status) = (Err(Status::internal("no script")), Err(Status::internal("no script")));
        Self(Arc::new(Script { asked: Mutex::default(), operation: Mutex::new(operation), status: Mutex::new(status) }))
    }

    /// Serves until the test's runtime ends; returns its address.
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serve = net::server().serve_with_incoming(MasterServer::new(self.clone()), TcpIncoming::from(listener));
        tokio_util::task::TaskTracker::new().spawn(serve);
        address
    }

    fn answer(&self, asked: String) -> Result<Response<pb::OperationResponse>, Status> {
        self.0.asked.lock().push(asked);
        self.0.operation.lock().clone().map(Response::new)
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.0.asked.lock())
    }
}

fn not_scripted<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not scripted"))
}

#[tonic::async_trait]
impl Master for Scripted {
    type RegisterStream = tokio_stream::Empty<Result<pb::Directive, Status>>;
    type WatchTopologyStream = tokio_stream::Empty<Result<pb::Topology, Status>>;

    async fn register(
        &self,
        _request: Request<tonic::Streaming<pb::StoreReport>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        not_scripted()
    }

    async fn watch_topology(
        &self,
        _request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchTopologyStream>, Status> {
        not_scripted()
    }

    async fn alter_keyspace(
        &self,
        _request: Request<pb::AlterKeyspaceRequest>,
    ) -> Result<Response<pb::AlterKeyspaceResponse>, Status> {
        not_scripted()
    }

    async fn create_keyspace(
        &self,
        _request: Request<pb::CreateKeyspaceRequest>,
    ) -> Result<Response<pb::CreateKeyspaceResponse>, Status> {
        not_scripted()
    }

    async fn drop_keyspace(
        &self,
        _request: Request<pb::DropKeyspaceRequest>,
    ) -> Result<Response<pb::DropKeyspaceResponse>, Status> {
        not_scripted()
    }

    async fn failover_shard(
        &self,
        _request: Request<pb::FailoverShardRequest>,
    ) -> Result<Response<pb::FailoverShardResponse>, Status> {
        not_scripted()
    }

    async fn resize_keyspace(
        &self,
        request: Request<pb::ResizeKeyspaceRequest>,
    ) -> Result<Response<pb::OperationResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.protocol_version, PROTOCOL_VERSION);
        self.answer(format!("resize {} {}", request.name, request.shards))
    }

    async fn replace_store(
        &self,
        request: Request<pb::ReplaceStoreRequest>,
    ) -> Result<Response<pb::OperationResponse>, Status> {
        let request = request.into_inner();
        self.answer(format!("replace {} {} {}", request.name, request.store_id, request.with_store_id))
    }

    async fn abort_operation(
        &self,
        request: Request<pb::AbortOperationRequest>,
    ) -> Result<Response<pb::OperationResponse>, Status> {
        self.answer(format!("abort {}", request.into_inner().name))
    }

    async fn get_operation(
        &self,
        request: Request<pb::GetOperationRequest>,
    ) -> Result<Response<pb::OperationStatus>, Status> {
        self.0.asked.lock().push(format!("status {}", request.into_inner().name));
        self.0.status.lock().clone().map(Response::new)
    }
}

fn users() -> KeyspaceRecord {
    KeyspaceRecord::new(KeyspaceId(5), "users", &[StoreId(0xb)]).unwrap()
}

fn growing() -> KeyspaceRecord {
    users().begin_resize(2, vec![StoreId(0xa)]).unwrap()
}

fn knowing(record: KeyspaceRecord) -> watch::Receiver<Arc<Snapshot>> {
    watch::channel(Arc::new(Snapshot { keyspaces: vec![record], ..Snapshot::default() })).1
}

fn error_text(reply: &[u8]) -> String {
    let Some(Reply::Error(text)) = Reply::take(&mut &*reply) else { panic!("no error: {reply:?}") };
    String::from_utf8_lossy(text).into_owned()
}

#[tokio::test]
async fn without_a_master_the_answer_says_so() {
    let (_sender, topology) = watch::channel(Arc::new(Snapshot::default()));
    let alteration = Alteration { name: "0".to_owned(), changes: Settings::default(), copies: None };
    let resizing = Resizing { name: "0".to_owned(), shards: 2 };
    for (addresses, ending) in [(vec![], "(this gateway has no address of one)"), (vec!["127.0.0.1:1"], "error)")] {
        let addresses: Vec<String> = addresses.into_iter().map(str::to_owned).collect();
        for change in [
            Change::Alter(alteration.clone()),
            Change::Resize(resizing.clone()),
            Change::Abort("0".to_owned()),
            // Not even the record is known.
            Change::Observe("0".to_owned()),
        ] {
            let text = error_text(&Masters::new(addresses.clone(), topology.clone()).change(change).await);
            assert!(text.starts_with(error::NO_MASTER.text()) && text.ends_with(ending), "{text}");
        }
    }
}

#[tokio::test]
async fn an_operation_is_answered_by_its_number_when_the_topology_has_it() {
    let script = Scripted::new();
    let (sender, topology) = watch::channel(Arc::new(Snapshot { keyspaces: vec![users()], ..Snapshot::default() }));
    let masters = Arc::new(Masters::new(vec![script.start().await], topology));
    *script.0.operation.lock() = Ok(pb::OperationResponse { record: Some((&growing()).into()) });
    let asking = {
        let masters = Arc::clone(&masters);
        let resizing = Resizing { name: "users".to_owned(), shards: 2 };
        async move {
            let reply = masters.change(Change::Resize(resizing)).await;
            (reply, masters.latest().keyspaces[0].epoch)
        }
    };
    let knows = async {
        // Only when it was asked.
        while script.0.asked.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        sender.send_modify(|snapshot| Arc::make_mut(snapshot).keyspaces = vec![growing()]);
    };
    let ((reply, known), ()) = tokio::join!(asking, knows);
    assert_eq!(Reply::take(&mut reply.as_slice()), Some(Reply::Integer(2)));
    assert_eq!(known, growing().epoch, "it was not answered before");
    let replacement = Replacement { name: "users".to_owned(), store: StoreId(0xb), with: None };
    let with = Some(StoreId(0xc));
    for change in [Change::Replace(replacement.clone()), Change::Replace(Replacement { with, ..replacement })] {
        assert_eq!(Reply::take(&mut masters.change(change).await.as_slice()), Some(Reply::Integer(2)));
    }
    let reply = masters.change(Change::Abort("users".to_owned())).await;
    assert_eq!(Reply::take(&mut reply.as_slice()), Some(Reply::Ok));
    assert_eq!(script.asked(), ["resize users 2", "replace users 11 0", "replace users 11 12", "abort users"]);
}

#[tokio::test]
async fn refusals_are_passed_on_and_what_is_not_known_is_said() {
    let script = Scripted::new();
    let masters = Masters::new(vec![script.start().await], knowing(users()));
    for (status, expected) in [
        (
            Status::failed_precondition("the keyspace has 1 shards\nalready; nothing was changed"),
            "ERR the keyspace has 1 shards already; nothing was changed",
        ),
        (Status::aborted("another master leads"), "ERR another master leads"),
        (Status::unimplemented("what?"), "ERR the master runs an older version; nothing was changed"),
        (
            Status::unavailable("the master is stopping"),
            "UNKNOWN the connection to the master was lost after the change was asked for: KEYSPACE INFO shows whether it was \
             made (the master is stopping)",
        ),
    ] {
        *script.0.operation.lock() = Err(status);
        let resizing = Resizing { name: "users".to_owned(), shards: 1 };
        assert_eq!(error_text(&masters.change(Change::Resize(resizing)).await), expected);
        assert_eq!(error_text(&masters.change(Change::Abort("users".to_owned())).await), expected);
    }
}

#[tokio::test]
async fn a_status_comes_from_the_master_or_else_from_the_record() {
    let script = Scripted::new();
    let address = script.start().await;
    let status = async |record: KeyspaceRecord, addresses: Vec<String>| {
        let reply = Masters::new(addresses, knowing(record)).change(Change::Observe("users".to_owned())).await;
        crate::command::show(&reply)
    };
    // The master's record, not the one that this gateway has.
    let told = pb::OperationStatus {
        record: Some((&growing()).into()),
        waits_for: "rows".to_owned(),
        slots: 7,
        ..pb::OperationStatus::default()
    };
    *script.0.status.lock() = Ok(told);
    let text = status(users(), vec![address.clone()]).await;
    assert!(text.contains(r#""operation": 2, "kind": "resize", "from": 1, "to": 2, "phase": "copy""#), "{text}");
    assert!(text.contains(r#""slots": 7"#) && text.contains(r#""waits_for": "rows""#), "{text}");
    assert_eq!(script.asked(), ["status users"]);
    // None leads, it hangs up, none can be reached.
    for (status_of_master, addresses, reason) in [
        (Status::aborted("this master stands by"), vec![address.clone()], "this master stands by"),
        (Status::unavailable("stopping"), vec![address.clone()], "the master has not answered (stopping)"),
        (Status::internal("unused"), vec!["127.0.0.1:1".to_owned()], "no master can be reached ("),
    ] {
        *script.0.status.lock() = Err(status_of_master);
        let text = status(growing(), addresses).await;
        assert!(text.contains(r#""phase": "copy", "percent": null"#), "{text}");
        assert!(text.contains(&format!("\"waits_for\": \"{reason}")), "{text}");
    }
    *script.0.status.lock() = Err(Status::failed_precondition("no such keyspace 'users'"));
    assert_eq!(status(growing(), vec![address]).await, "-ERR no such keyspace 'users'");
}

/// What cannot be true is not shown: the record of an answer is checked as any other.
#[tokio::test]
async fn an_answer_without_a_likely_record_is_none() {
    let script = Scripted::new();
    let masters = Masters::new(vec![script.start().await], knowing(users()));
    let mut unlikely = growing();
    unlikely.shards[0].primary = NOBODY;
    for record in [None, Some((&unlikely).into())] {
        *script.0.operation.lock() = Ok(pb::OperationResponse { record });
        let resizing = Resizing { name: "users".to_owned(), shards: 2 };
        let text = error_text(&masters.change(Change::Resize(resizing)).await);
        assert!(text.starts_with(error::MASTER_LOST.text()), "{text}");
    }
}
