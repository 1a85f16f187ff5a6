//! A store behind its socket: streams, pieces, shutdown.

use crate::{Config, RunError, Store, StoreHandle};
use futures_util::StreamExt;
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming};
use vasto_proto::batch::{Answer, Answers, FLAG_LARGE_PERMIT, OperationHead, Outcome, write_operation};
use vasto_proto::command::Reply;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::id::{ClusterId, Epoch, KeyspaceId, ShardId, ShardKey};
use vasto_proto::net::{self, FRAME_BYTES_MAX};
use vasto_proto::pb::Frame;
use vasto_proto::pb::store_client::StoreClient;
use vasto_proto::topology::KeyspaceRecord;

fn store(data: &Path) -> Store {
    let store = Store::open(Config { data: data.to_owned(), workers: 2, ..Config::default() }).unwrap();
    let handle = store.handle();
    handle.put_record(KeyspaceRecord::new(KeyspaceId(0), "0", &[handle.id()]).unwrap()).unwrap();
    store
}

type Running = JoinSet<Result<(), RunError>>;

/// A store that serves until the token is cancelled.
async fn serve(data: &Path) -> (StoreHandle, String, CancellationToken, Running) {
    let store = store(data);
    let handle = store.handle();
    let bound = store.bind().await.unwrap();
    let address = bound.address().to_string();
    let shutdown = CancellationToken::new();
    let mut running = JoinSet::new();
    running.spawn(bound.run(shutdown.clone()));
    (handle, address, shutdown, running)
}

async fn connect(handle: &StoreHandle, address: &str) -> Result<(mpsc::Sender<Frame>, Streaming<Frame>), Status> {
    let channel = net::endpoint(address).unwrap().connect().await.unwrap();
    let (sender, frames) = mpsc::channel(16);
    let mut request = Request::new(ReceiverStream::new(frames));
    request.metadata_mut().insert(net::PROTOCOL_METADATA, vasto_proto::PROTOCOL_VERSION.to_string().parse().unwrap());
    request.metadata_mut().insert(net::CLUSTER_METADATA, handle.cluster().to_string().parse().unwrap());
    let answers = StoreClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX).execute(request).await?;
    Ok((sender, answers.into_inner()))
}

fn operation(id: u32, command: StoreCommand, arguments: &[&[u8]]) -> Vec<u8> {
    let head = OperationHead {
        id,
        connection: id,
        target: ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) },
        epoch: Epoch(1),
        command: command.code(),
        flags: FLAG_LARGE_PERMIT,
    };
    let mut batch = Vec::new();
    write_operation(&mut batch, &head, arguments.iter().copied());
    batch
}

fn whole(packed: Vec<u8>) -> Frame {
    Frame { packed: packed.into(), lane: 0, more: false }
}

fn bulk<'a>(answer: &Answer<'a>) -> &'a [u8] {
    assert_eq!(answer.outcome, Outcome::Reply);
    match Reply::take(&mut { answer.body }).unwrap() {
        Reply::Bulk(value) => value,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn large_batches_travel_in_pieces_and_small_ones_overtake_them() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, address, shutdown, running) = serve(folder.path()).await;
    let (sender, mut answers) = connect(&handle, &address).await.unwrap();

    let value: Vec<u8> = (0..3 * FRAME_BYTES_MAX + 5).map(|index| index as u8).collect();
    let set = operation(1, StoreCommand::Set, &[b"large", &value]);
    let pieces: Vec<&[u8]> = set.chunks(FRAME_BYTES_MAX).collect();
    for (index, piece) in pieces.iter().enumerate() {
        let more = index + 1 < pieces.len();
        sender.send(Frame { packed: piece.to_vec().into(), lane: 7, more }).await.unwrap();
        if index == 1 {
            sender.send(whole(operation(2, StoreCommand::Set, &[b"small", b"s"]))).await.unwrap();
        }
    }
    let mut ids = Vec::new();
    for _ in 0..2 {
        let frame = answers.next().await.unwrap().unwrap();
        ids.extend(Answers::new(&frame.packed).map(|answer| answer.unwrap().id));
    }
    assert_eq!(ids, [2, 1]);

    sender.send(whole(operation(3, StoreCommand::Get, &[b"large"]))).await.unwrap();
    let mut packed = Vec::new();
    loop {
        let frame = answers.next().await.unwrap().unwrap();
        assert!(frame.packed.len() <= FRAME_BYTES_MAX && frame.lane != 0);
        packed.extend_from_slice(&frame.packed);
        if !frame.more {
            break;
        }
    }
    let answer = Answers::new(&packed).next().unwrap().unwrap();
    assert!(bulk(&answer) == value.as_slice());

    // A stop ends the streams, and what was acknowledged is there at the next start.
    shutdown.cancel();
    while let Some(Ok(_)) = answers.next().await {}
    tokio::time::timeout(Duration::from_secs(20), running.join_all()).await.unwrap().remove(0).unwrap();
    drop((sender, answers, handle));
    let again = self::store(folder.path());
    let (mut session, mut late) = again.handle().open_session();
    let mut out = Vec::new();
    session.execute(operation(1, StoreCommand::Strlen, &[b"small"]).into(), &mut out);
    if out.is_empty() {
        // Nothing is in memory yet.
        out = late.next().await.unwrap();
    }
    assert_eq!(Reply::take(&mut Answers::new(&out).next().unwrap().unwrap().body), Some(Reply::Integer(1)));
}

#[tokio::test]
async fn strangers_and_nonsense_are_turned_away() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, address, shutdown, running) = serve(folder.path()).await;

    let (sender, mut answers) = connect(&handle, &address).await.unwrap();
    sender.send(whole(b"nonsense".to_vec())).await.unwrap();
    let error = answers.next().await.unwrap().unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::InvalidArgument, "malformed batch at byte 0"));

    handle.set_cluster(ClusterId(5)).unwrap();
    assert!(connect(&handle, &address).await.is_ok());
    let other_folder = tempfile::tempdir().unwrap();
    let other = self::store(other_folder.path()).handle();
    let refused = connect(&other, &address).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("belongs to cluster 0000000000000005"), "{refused}");

    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(20), running.join_all()).await.unwrap().remove(0).unwrap();
}
