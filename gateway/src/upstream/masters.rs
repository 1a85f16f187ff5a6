//! Asks the master to change keyspaces, on behalf of a client that waits for the answer.

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

/// What the master is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Alter(Alteration),
    Create(Creation),
    /// The keyspace of this name.
    Drop(String),
    Failover(Failover),
}

/// What has come of it.
enum Changed {
    Record(KeyspaceRecord),
    Dropped { keyspace: KeyspaceId, stores_down: Vec<StoreId> },
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

impl Masters {
    pub fn new(addresses: Vec<String>, topology: watch::Receiver<Arc<Snapshot>>) -> Self {
        Self { addresses, topology }
    }

    /// Asks the master that leads, and returns the packed reply: OK when the change holds and this gateway knows it.
    pub async fn change(&self, change: Change) -> Vec<u8> {
        let mut reply = Vec::new();
        match self.try_change(&change).await {
            Ok(Changed::Record(record)) => {
                let knows = |known: &KeyspaceRecord| known.epoch >= record.epoch;
                self.wait_until(|snapshot| snapshot.keyspace(record.id).is_some_and(knows)).await;
                ReplyWriter::new(&mut reply).ok();
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
            Err(error) => ReplyWriter::new(&mut reply).error(error.text()),
        }
        reply
    }

    /// The newest snapshot of the cluster.
    pub fn latest(&self) -> Arc<Snapshot> {
        Arc::clone(&self.topology.borrow())
    }

    async fn try_change(&self, change: &Change) -> Result<Changed, CommandError> {
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
                Err(Failure::Refused(text)) => return Err(one_line(&format!("ERR {text}"))),
                Err(Failure::Lost(text)) => return Err(one_line(&format!("{} ({text})", error::MASTER_LOST.text()))),
            }
        }
        if let Some(text) = elsewhere {
            return Err(one_line(&format!("ERR {text}")));
        }
        Err(one_line(&format!("{} ({reason})", error::NO_MASTER.text())))
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
    match record.map(KeyspaceRecord::try_from) {
        Some(Ok(record)) => Ok(Changed::Record(record)),
        Some(Err(error)) => Err(Failure::Lost(error.to_string())),
        None => Err(Failure::Lost("the answer has no record".to_owned())),
    }
}

fn one_line(text: &str) -> CommandError {
    error::single_line(text).into_owned().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::command::Reply;

    #[tokio::test]
    async fn without_a_master_the_answer_says_so() {
        let (_sender, topology) = watch::channel(Arc::new(Snapshot::default()));
        let alteration = Alteration { name: "0".to_owned(), changes: Settings::default(), copies: None };
        for (addresses, ending) in [(vec![], "(this gateway has no address of one)"), (vec!["127.0.0.1:1"], "error)")] {
            let addresses = addresses.into_iter().map(str::to_owned).collect();
            let reply = Masters::new(addresses, topology.clone()).change(Change::Alter(alteration.clone())).await;
            let Some(Reply::Error(text)) = Reply::take(&mut reply.as_slice()) else { panic!("{reply:?}") };
            let text = String::from_utf8_lossy(text);
            assert!(text.starts_with(error::NO_MASTER.text()) && text.ends_with(ending), "{text}");
        }
    }
}
