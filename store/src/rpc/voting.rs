//! Answers stores that propose while no master leads, as masters are answered.

use crate::StoreHandle;
use tonic::Status;
use vasto_proto::pb::vote_request::Kind;
use vasto_proto::pb::{VoteRequest, VoteResponse};
use vasto_proto::topology::ballot::{Accepted, Request};
use vasto_proto::topology::{Entry, KeyspaceRecord, entry};

/// Votes, or follows what was chosen; the answer leaves when that is on the disk.
pub async fn vote(handle: &StoreHandle, request: VoteRequest) -> Result<VoteResponse, Status> {
    let invalid = |error: &dyn std::error::Error| Status::invalid_argument(error.to_string());
    let requests = match request.kind {
        Some(Kind::Prepare(prepare)) => vec![Request::Prepare { term: entry::term(prepare.term) }],
        Some(Kind::Accept(accept)) => {
            let term = entry::term(accept.term);
            let entries = accept.entries.into_iter().map(Entry::from_message).collect::<Result<Vec<_>, _>>();
            let entries = entries.map_err(|error| invalid(&error))?.into_iter().flatten();
            entries.map(|record| Request::Accept(Accepted { term, record })).collect()
        }
        Some(Kind::Chosen(record)) => {
            let record = KeyspaceRecord::try_from(record).map_err(|error| invalid(&error))?;
            return follow(handle, record).await;
        }
        // Of a later version.
        None => Vec::new(),
    };
    let handle = handle.clone();
    let voting = tokio::task::spawn_blocking(move || {
        let votes = requests.into_iter().map(|request| handle.vote(request));
        votes.collect::<Result<Vec<_>, _>>()
    });
    let votes = voting.await.map_err(|panic| Status::internal(format!("voting panicked: {panic}")))?;
    let votes = votes.map_err(|error| Status::internal(format!("cannot keep a vote: {error}")))?;
    Ok(VoteResponse { answers: votes.iter().map(Into::into).collect() })
}

async fn follow(handle: &StoreHandle, record: KeyspaceRecord) -> Result<VoteResponse, Status> {
    let handle = handle.clone();
    let following = tokio::task::spawn_blocking(move || handle.put_record(record));
    let followed =
        following.await.map_err(|panic| Status::internal(format!("following a record panicked: {panic}")))?;
    followed.map_err(|error| Status::internal(error.to_string()))?;
    Ok(VoteResponse::default())
}
