//! Asks the master to change keyspaces, or how far a change is, on behalf of a client that waits for the answer.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tonic::{Code, Response, Status};
use vasto_proto::command::ReplyWriter;
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::{KeyspaceId, StoreId};
use vasto_proto::pb::master_client::MasterClient;
use vasto_proto::topology::{KeyspaceRecord, Settings, Snapshot};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

use crate::operation::{self, Progress};

/// The master answers within 5 s, whatever the stores do; one that takes longer hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
/// How long an answer waits for the topology that came with it: it was sent before.
const TOPOLOGY_TIMEOUT: Duration = Duration::from_secs(2);

/// What is to be changed in a keyspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alteration {
    pub name: String,
    pub changes: Settings,
    /// How many copies of each shard there shall be; `None`: as many as before.
    pub copies: Option<u32>,
}

/// Another primary is wanted for a shard, without a loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failover {
    pub name: String,
    pub shard: u32,
    /// `None`: the replica that is best.
    pub to: Option<StoreId>,
}

/// A keyspace that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    pub name: String,
    /// `None`: as many as keyspace `0` has.
    pub shards: Option<u32>,
    pub copies: u32,
    pub settings: Settings,
    /// One of this name that is there already is no error.
    pub may_exist: bool,
}

/// A keyspace shall have another number of shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resizing {
    pub name: String,
    pub shards: u32,
}

/// The copies that a store has of a keyspace shall be elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replacement {
    pub name: String,
    pub store: StoreId,
    /// `None`: wherever is best.
    pub with: Option<StoreId>,
}

/// What the master is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Alter(Alteration),
    Create(Creation),
    /// The keyspace of this name.
    Drop(String),
    Failover(Failover),
    Resize(Resizing),
    Replace(Replacement),
    /// The operation of the keyspace of this name.
    Abort(String),
    /// Nothing is changed: how far is the operation of the keyspace of this name?
    Observe(String),
}

/// What has come of it.
enum Changed {
    Record(KeyspaceRecord),
    /// The record names an operation that has begun.
    Begun(KeyspaceRecord),
    Observed(KeyspaceRecord, Box<pb::OperationStatus>),
    Dropped {
        keyspace: KeyspaceId,
        stores_down: Vec<StoreId>,
    },
}

/// The way to the masters.
#[derive(Debug)]
pub struct Masters {
    addresses: Vec<String>,
    topology: watch::Receiver<Arc<Snapshot>>,
}

/// Why there is no answer.
enum Failure {
    /// Nobody has heard of it; another address may.
    NotSent(String),
    Refused(String),
    /// It was sent.
    Lost(String),
    /// Nothing was done: another master leads, or none yet.
    Elsewhere(String),
}

impl Failure {
    fn error(&self) -> CommandError {
        one_line(&match self {
            Failure::NotSent(reason) => format!("{} ({reason})", error::NO_MASTER.text()),
            Failure::Refused(text) | Failure::Elsewhere(text) => format!("ERR {text}"),
            Failure::Lost(reason) => format!("{} ({reason})", error::MASTER_LOST.text()),
        })
    }

    /// Why no master that leads has said anything; `None` if one has.
    fn reason(&self) -> Option<String> {
        match self {
            Failure::Refused(_) => None,
            Failure::NotSent(reason) => Some(format!("no master can be reached ({reason})")),
            Failure::Lost(reason) => Some(format!("the master has not answered ({reason})")),
            Failure::Elsewhere(text) => Some(text.clone()),
        }
    }
}

impl Masters {
    pub fn new(addresses: Vec<String>, topology: watch::Receiver<Arc<Snapshot>>) -> Self {
        Self { addresses, topology }
    }

    /// Asks the master that leads, and returns the packed reply: OK, or the number of the operation that has begun, when the change holds
    /// and this gateway knows it.
    pub async fn change(&self, change: Change) -> Vec<u8> {
        let mut reply = Vec::new();
        match self.try_change(&change).await {
            Ok(Changed::Record(record)) => {
                self.wait_for(&record).await;
                ReplyWriter::new(&mut reply).ok();
            }
            Ok(Changed::Begun(record)) => {
                self.wait_for(&record).await;
                let operation = record.operation.map_or(0, |operation| operation.id);
                ReplyWriter::new(&mut reply).integer(i64::try_from(operation).unwrap_or(i64::MAX));
            }
            Ok(Changed::Observed(record, status)) => {
                operation::write_status(&mut ReplyWriter::new(&mut reply), &record, &Progress::Told(&status));
            }
            Ok(Changed::Dropped { keyspace, stores_down }) => {
                self.wait_until(|snapshot| snapshot.dropped.contains(&keyspace)).await;
                if stores_down.is_empty() {
                    ReplyWriter::new(&mut reply).ok();
                } else {
                    let stores: Vec<String> = stores_down.iter().map(StoreId::to_string).collect();
                    let text = format!("OK, stores {} delete their shards of it when they are back", stores.join(","));
                    ReplyWriter::new(&mut reply).simple(&text);
                }
            }
            Err(failure) => {
                let latest = self.latest();
                // Without a master the record is known all the same.
                let known = match (&change, failure.reason()) {
                    (Change::Observe(name), Some(reason)) => latest.keyspace_named(name).zip(Some(reason)),
                    (_, _) => None,
                };
                let mut reply = ReplyWriter::new(&mut reply);
                match known {
                    Some((record, reason)) => operation::write_status(&mut reply, record, &Progress::Unknown(&reason)),
                    None => reply.error(failure.error().text()),
                }
            }
        }
        reply
    }

    /// The newest snapshot of the cluster.
    pub fn latest(&self) -> Arc<Snapshot> {
        Arc::clone(&self.topology.borrow())
    }

    async fn try_change(&self, change: &Change) -> Result<Changed, Failure> {
        let mut reason = "this gateway has no address of one".to_owned();
        let mut elsewhere = None;
        // The leader first, as far as it is known; its address is perhaps not among those that this gateway was told.
        let leader = Some(self.latest().leadership.address.clone()).filter(|leader| !leader.is_empty());
        let others = self.addresses.iter().filter(|address| Some(*address) != leader.as_ref());
        for master in leader.iter().chain(others) {
            match ask(master, change).await {
                Ok(changed) => return Ok(changed),
                Err(Failure::NotSent(text)) => reason = text,
                Err(Failure::Elsewhere(text)) => elsewhere = Some(text),
                Err(failure @ (Failure::Refused(_) | Failure::Lost(_))) => return Err(failure),
            }
        }
        Err(elsewhere.map_or(Failure::NotSent(reason), Failure::Elsewhere))
    }

    /// In vain for a while at most: the change holds all the same.
    async fn wait_for(&self, record: &KeyspaceRecord) {
        let knows = |known: &KeyspaceRecord| known.epoch >= record.epoch;
        self.wait_until(|snapshot| snapshot.keyspace(record.id).is_some_and(knows)).await;
    }

    async fn wait_until(&self, knows: impl Fn(&Snapshot) -> bool) {
        let mut topology = self.topology.clone();
        // In vain: the change holds all the same, and the topology comes when it comes.
        let _ = tokio::time::timeout(TOPOLOGY_TIMEOUT, topology.wait_for(|snapshot| knows(snapshot))).await;
    }
}

async fn ask(master: &str, change: &Change) -> Result<Changed, Failure> {
    let endpoint = net::endpoint(master).map_err(|error| Failure::NotSent(error.to_string()))?;
    let channel = endpoint.connect().await.map_err(|error| Failure::NotSent(error.to_string()))?;
    let mut client = MasterClient::new(channel).max_decoding_message_size(net::CONTROL_BYTES_MAX);
    let protocol_version = PROTOCOL_VERSION;
    match change {
        Change::Alter(alteration) => {
            let request = pb::AlterKeyspaceRequest {
                protocol_version,
                name: alteration.name.clone(),
                settings: Some((&alteration.changes).into()),
                // A setting is set, whatever it was: who comes last wins.
                expected_epoch: 0,
                copies: alteration.copies.unwrap_or_default(),
            };
            let response = answer(client.alter_keyspace(request)).await?;
            changed(response.record)
        }
        Change::Create(creation) => {
            let request = pb::CreateKeyspaceRequest {
                protocol_version,
                name: creation.name.clone(),
                shards: creation.shards.unwrap_or_default(),
                copies: creation.copies,
                settings: Some((&creation.settings).into()),
                may_exist: creation.may_exist,
            };
            let response = answer(client.create_keyspace(request)).await?;
            changed(response.record)
        }
        Change::Failover(failover) => {
            let request = pb::FailoverShardRequest {
                protocol_version,
                name: failover.name.clone(),
                shard: failover.shard,
                to_store: failover.to.unwrap_or_default().0,
            };
            let response = answer(client.failover_shard(request)).await?;
            changed(response.record)
        }
        Change::Resize(resizing) => {
            let request =
                pb::ResizeKeyspaceRequest { protocol_version, name: resizing.name.clone(), shards: resizing.shards };
            begun(answer(client.resize_keyspace(request)).await?)
        }
        Change::Replace(replacement) => {
            let request = pb::ReplaceStoreRequest {
                protocol_version,
                name: replacement.name.clone(),
                store_id: replacement.store.0,
                with_store_id: replacement.with.unwrap_or_default().0,
            };
            begun(answer(client.replace_store(request)).await?)
        }
        Change::Abort(name) => {
            let request = pb::AbortOperationRequest { protocol_version, name: name.clone() };
            let response = answer(client.abort_operation(request)).await?;
            changed(response.record)
        }
        Change::Observe(name) => {
            let request = pb::GetOperationRequest { protocol_version, name: name.clone() };
            let mut status = answer(client.get_operation(request)).await?;
            let record = read_record(status.record.take())?;
            Ok(Changed::Observed(record, Box::new(status)))
        }
        Change::Drop(name) => {
            let request = pb::DropKeyspaceRequest { protocol_version, name: name.clone() };
            let response = answer(client.drop_keyspace(request)).await?;
            let stores_down = response.stores_down.into_iter().map(StoreId).collect();
            Ok(Changed::Dropped { keyspace: KeyspaceId(response.keyspace_id), stores_down })
        }
    }
}

async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Failure> {
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, call).await;
    let answer = answer.map_err(|_| Failure::Lost("the master does not answer".to_owned()))?;
    let response = answer.map_err(|status| match status.code() {
        Code::FailedPrecondition | Code::InvalidArgument => Failure::Refused(status.message().to_owned()),
        Code::Aborted => Failure::Elsewhere(status.message().to_owned()),
        Code::Unimplemented => Failure::Refused("the master runs an older version; nothing was changed".to_owned()),
        _ => Failure::Lost(status.message().to_owned()),
    })?;
    Ok(response.into_inner())
}

fn changed(record: Option<pb::KeyspaceRecord>) -> Result<Changed, Failure> {
    read_record(record).map(Changed::Record)
}

fn begun(response: pb::OperationResponse) -> Result<Changed, Failure> {
    read_record(response.record).map(Changed::Begun)
}

fn read_record(record: Option<pb::KeyspaceRecord>) -> Result<KeyspaceRecord, Failure> {
    match record.map(KeyspaceRecord::try_from) {
        Some(Ok(record)) => Ok(record),
        Some(Err(error)) => Err(Failure::Lost(error.to_string())),
        None => Err(Failure::Lost("the answer has no record".to_owned())),
    }
}

fn one_line(text: &str) -> CommandError {
    error::single_line(text).into_owned().into()
}

#[cfg(test)]
mod tests;
