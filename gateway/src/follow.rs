//! Follows the master: keeps the latest snapshot of the cluster, whatever becomes of the master.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};
use vasto_proto::id::ClusterId;
use vasto_proto::pb::master_client::MasterClient;
use vasto_proto::topology::{KeyspaceRecord, ShardRecord, Snapshot, StoreInfo};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

/// The master's first snapshot leaves at once; one that takes longer hangs, and another address is tried.
const FIRST_SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(5);

/// Between attempts to reach a master: doubles from the first to the last, minus up to a half at random, so that all
/// gateways do not come back to a restarted master at once.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(1600);

/// The latest snapshot, at first an empty one. The task that keeps it belongs to `tracker` and ends at `shutdown`.
pub fn follow(
    masters: Vec<String>,
    tracker: &TaskTracker,
    shutdown: CancellationToken,
) -> watch::Receiver<Arc<Snapshot>> {
    let (sender, receiver) = watch::channel(Arc::new(Snapshot::default()));
    tracker.spawn(async move { shutdown.run_until_cancelled(keep_following(&masters, &sender)).await });
    receiver
}

async fn keep_following(masters: &[String], latest: &watch::Sender<Arc<Snapshot>>) {
    let mut pause = RETRY_PAUSE_MIN;
    let mut reason_before = String::new();
    for master in masters.iter().cycle() {
        let mut heard = false;
        let reason = match watch_once(master, latest, &mut heard).await {
            Ok(()) => "the master ended the stream".to_owned(),
            Err(reason) => reason,
        };
        if heard {
            pause = RETRY_PAUSE_MIN;
            reason_before.clear();
        }
        // One line a reason, not one an attempt.
        if reason != reason_before {
            warn!(master, reason, "no master; the topology known so far is kept, trying again");
            reason_before = reason;
        }
        let jitter = pause.mul_f64(fastrand::f64() / 2.0);
        tokio::time::sleep(pause - jitter).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

/// One stream of snapshots, to its end.
async fn watch_once(master: &str, latest: &watch::Sender<Arc<Snapshot>>, heard: &mut bool) -> Result<(), String> {
    let endpoint = net::endpoint(master).map_err(|error| describe(&error))?;
    let opening = async {
        let channel = endpoint.connect().await.map_err(|error| describe(&error))?;
        let mut client = MasterClient::new(channel);
        let request = pb::WatchRequest { protocol_version: PROTOCOL_VERSION };
        let mut snapshots =
            client.watch_topology(request).await.map_err(|status| status.message().to_owned())?.into_inner();
        let first = snapshots.next().await;
        Ok::<_, String>((snapshots, first))
    };
    let opened = tokio::time::timeout(FIRST_SNAPSHOT_TIMEOUT, opening).await;
    let (mut snapshots, mut next) = opened.map_err(|_| "the master does not answer".to_owned())??;
    while let Some(message) = next {
        let received = message.map_err(|status| status.message().to_owned())?;
        let received = Snapshot::try_from(received).map_err(|error| describe(&error))?;
        let merged = match merge(&latest.borrow(), received) {
            Ok(merged) => merged,
            Err(refused) => {
                error!(master, "{refused}; the topology known so far is kept");
                return Err(refused.to_string());
            }
        };
        if !*heard {
            *heard = true;
            info!(master, cluster = %merged.cluster, "following the master");
        }
        let before = latest.send_replace(Arc::new(merged));
        log_changes(&before, &latest.borrow());
        next = snapshots.next().await;
    }
    Ok(())
}

/// A snapshot that must not be believed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the master streams cluster {theirs}, but this gateway serves cluster {ours}")]
pub struct OtherCluster {
    pub ours: ClusterId,
    pub theirs: ClusterId,
}

/// What to believe after `received`, knowing `known`. A master that has just started knows a store that has not yet come
/// back to it by its records alone: then the address of before is kept, and so are keyspaces that it does not call dropped.
pub fn merge(known: &Snapshot, received: Snapshot) -> Result<Snapshot, OtherCluster> {
    let none = ClusterId(0);
    if known.cluster != none && received.cluster != none && known.cluster != received.cluster {
        return Err(OtherCluster { ours: known.cluster, theirs: received.cluster });
    }
    let mut merged = received;
    if merged.cluster == none && known.cluster != none {
        // No store has come back to it at all: it knows less than we do.
        merged.cluster = known.cluster;
    }
    // Who was dropped stays so: only the record of that is needed, and it may be on a store that has not come back yet.
    merged.dropped.extend(&known.dropped);
    merged.keyspaces.retain(|keyspace| !merged.dropped.contains(&keyspace.id));
    let is_missing = |keyspace: &&KeyspaceRecord| {
        !merged.dropped.contains(&keyspace.id) && !merged.keyspaces.iter().any(|other| other.id == keyspace.id)
    };
    let missing: Vec<KeyspaceRecord> = known.keyspaces.iter().filter(is_missing).cloned().collect();
    merged.keyspaces.extend(missing);
    merged.keyspaces.sort_by_key(|keyspace| keyspace.id);
    if !merged.keyspaces.is_empty() {
        merged.waiting_for.clear();
    }
    for keyspace in &mut merged.keyspaces {
        // Records only grow; the newest may be on a store that has not come back yet.
        if let Some(newer) = known.keyspace(keyspace.id).filter(|known| known.epoch > keyspace.epoch) {
            keyspace.clone_from(newer);
        }
    }
    for store in &mut merged.stores {
        if store.address.is_empty()
            && let Some(before) = known.store(store.id)
        {
            store.address.clone_from(&before.address);
            store.fsync = before.fsync;
            store.zone.clone_from(&before.zone);
            store.tags.clone_from(&before.tags);
        }
    }
    let is_forgotten = |store: &&StoreInfo| {
        let names_it = |shard: &ShardRecord| shard.primary == store.id || shard.replicas.contains(&store.id);
        let has_shards = merged.keyspaces.iter().flat_map(|keyspace| &keyspace.shards).any(names_it);
        has_shards && merged.store(store.id).is_none()
    };
    let forgotten: Vec<StoreInfo> =
        known.stores.iter().filter(is_forgotten).map(|store| StoreInfo { up: false, ..store.clone() }).collect();
    merged.stores.extend(forgotten);
    Ok(merged)
}

/// Each change once.
fn log_changes(before: &Snapshot, after: &Snapshot) {
    for store in &after.stores {
        let was_up = before.store(store.id).is_some_and(|before| before.up);
        match (was_up, store.up) {
            (false, true) => info!(store = %store.id, address = store.address, "store up"),
            (true, false) => warn!(store = %store.id, address = store.address, "store down"),
            (true, true) | (false, false) => {}
        }
    }
    for keyspace in &after.keyspaces {
        if before.keyspace(keyspace.id).map(|before| before.epoch) != Some(keyspace.epoch) {
            let shards = keyspace.shards.len();
            info!(keyspace = keyspace.name, epoch = %keyspace.epoch, shards, "topology of keyspace");
        }
    }
}

/// An error and what caused it: the text of a transport error says no more than that.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {

    use super::*;
    use vasto_proto::id::{Epoch, KeyspaceId, StoreId};

    fn store(id: u32, address: &str) -> StoreInfo {
        let up = !address.is_empty();
        StoreInfo {
            id: StoreId(id),
            address: address.to_owned(),
            up,
            free_disk_bytes: 1,
            fsync: None,
            zone: String::new(),
            tags: Vec::new(),
        }
    }

    fn snapshot(cluster: u64, stores: &[StoreInfo]) -> Snapshot {
        let primaries: Vec<StoreId> = stores.iter().map(|store| store.id).collect();
        let keyspaces = KeyspaceRecord::new(KeyspaceId(0), "0", &primaries).into_iter().collect();
        let cluster = ClusterId(cluster);
        Snapshot { cluster, version: 9, stores: stores.to_vec(), keyspaces, ..Snapshot::default() }
    }

    #[test]
    fn an_address_that_a_fresh_master_lacks_is_kept() {
        let known = snapshot(1, &[store(1, "one:1"), store(2, "two:1")]);
        let received = snapshot(1, &[store(1, "moved:1"), store(2, "")]);
        let merged = merge(&known, received).unwrap();
        assert_eq!(merged.store(StoreId(1)).unwrap().address, "moved:1");
        let second = merged.store(StoreId(2)).unwrap();
        assert_eq!((second.address.as_str(), second.up), ("two:1", false));
    }

    #[test]
    fn a_master_that_knows_nothing_yet_wipes_nothing() {
        let known = snapshot(1, &[store(1, "one:1")]);
        let fresh = Snapshot { version: 1, waiting_for: "0 of 1 stores".to_owned(), ..Snapshot::default() };
        let merged = merge(&known, fresh).unwrap();
        assert_eq!((merged.cluster, &merged.keyspaces), (known.cluster, &known.keyspaces));
        assert_eq!(merged.store(StoreId(1)).unwrap().address, "one:1");
        assert!(!merged.store(StoreId(1)).unwrap().up);
    }

    #[test]
    fn an_older_record_does_not_replace_a_newer_one() {
        let mut known = snapshot(1, &[store(1, "one:1")]);
        known.keyspaces[0].epoch = Epoch(4);
        let merged = merge(&known, snapshot(1, &[store(1, "one:1")])).unwrap();
        assert_eq!(merged.keyspaces[0].epoch, Epoch(4));
        let mut newer = known.clone();
        newer.keyspaces[0].epoch = Epoch(5);
        assert_eq!(merge(&known, newer.clone()).unwrap(), newer);
    }

    #[test]
    fn only_what_is_called_dropped_is_forgotten() {
        let mut known = snapshot(1, &[store(1, "one:1")]);
        known.keyspaces.push(KeyspaceRecord::new(KeyspaceId(7), "seven", &[StoreId(1)]).unwrap());
        // The store that knows of it has not come back to a new master.
        let without = snapshot(1, &[store(1, "one:1")]);
        assert_eq!(merge(&known, without.clone()).unwrap().keyspaces, known.keyspaces);
        let dropped = Snapshot { dropped: [KeyspaceId(7)].into(), ..without.clone() };
        let merged = merge(&known, dropped).unwrap();
        assert_eq!(merged.keyspaces, without.keyspaces);
        // Nor does a master bring it back that has only heard a store which was away.
        let again = merge(&merged, Snapshot { keyspaces: known.keyspaces.clone(), ..without.clone() }).unwrap();
        assert_eq!((again.keyspaces, again.dropped), (without.keyspaces, merged.dropped));
    }

    #[test]
    fn another_cluster_is_refused() {
        let known = snapshot(1, &[store(1, "one:1")]);
        let refused = merge(&known, snapshot(2, &[store(1, "one:1")])).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the master streams cluster 0000000000000002, but this gateway serves cluster 0000000000000001"
        );
        let first = snapshot(2, &[store(1, "one:1")]);
        assert_eq!(merge(&Snapshot::default(), first.clone()).unwrap(), first);
    }
}
