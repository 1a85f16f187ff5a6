//! Follows all masters: keeps the latest snapshot of the cluster, whatever becomes of any of them. While no master speaks, stores are asked
//! for newer records: they may have lifted a fence or completed a commit without one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};
use vasto_proto::id::ClusterId;
use vasto_proto::pb::master_client::MasterClient;
use vasto_proto::topology::{KeyspaceRecord, Snapshot, StoreInfo};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

use crate::upstream::records;

/// The master's first snapshot leaves at once; one that takes longer hangs, and the stream is opened anew.
const FIRST_SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(5);

/// Between attempts to reach a master: doubles from the first to the last, minus up to a half at random, so that all
/// gateways do not come back to a restarted master at once.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(1600);

/// How often stores are asked while no master speaks: several times within the deadline of a request.
const STORES_ASKED_EVERY: Duration = Duration::from_millis(200);

/// The latest snapshot, at first an empty one. The tasks that keep it belong to `tracker` and end at `shutdown`.
pub fn follow(
    masters: Vec<String>,
    tracker: &TaskTracker,
    shutdown: CancellationToken,
) -> watch::Receiver<Arc<Snapshot>> {
    let (sender, receiver) = watch::channel(Arc::new(Snapshot::default()));
    let followed = Arc::new(Followed { latest: sender, streams: Mutex::default() });
    let distinct: BTreeSet<String> = masters.into_iter().collect();
    for (number, master) in distinct.into_iter().enumerate() {
        let (followed, shutdown) = (Arc::clone(&followed), shutdown.clone());
        tracker.spawn(async move { shutdown.run_until_cancelled(followed.keep_following(number, &master)).await });
    }
    tracker.spawn(async move { shutdown.run_until_cancelled(followed.ask_stores()).await });
    receiver
}

struct Followed {
    latest: watch::Sender<Arc<Snapshot>>,
    /// What each master said last whose stream is open.
    streams: Mutex<BTreeMap<usize, Snapshot>>,
}

impl Followed {
    async fn keep_following(&self, number: usize, master: &str) {
        let mut pause = RETRY_PAUSE_MIN;
        let mut reason_before = String::new();
        loop {
            let mut heard = false;
            let reason = match self.watch_once(number, master, &mut heard).await {
                Ok(()) => "the master ended the stream".to_owned(),
                Err(reason) => reason,
            };
            self.streams.lock().remove(&number);
            // Another master may know better from now on.
            if let Err(refused) = self.refresh() {
                error!(master, "{refused}; the topology known so far is kept");
            }
            if heard {
                pause = RETRY_PAUSE_MIN;
                reason_before.clear();
            }
            // One line a reason, not one an attempt.
            if reason != reason_before {
                warn!(master, reason, "no stream of this master; the topology known so far is kept, trying again");
                reason_before = reason;
            }
            let jitter = pause.mul_f64(fastrand::f64() / 2.0);
            tokio::time::sleep(pause - jitter).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    /// One stream of snapshots, to its end.
    async fn watch_once(&self, number: usize, master: &str, heard: &mut bool) -> Result<(), String> {
        let endpoint = net::endpoint(master).map_err(|error| describe(&error))?;
        let opening = async {
            let channel = endpoint.connect().await.map_err(|error| describe(&error))?;
            let mut client = MasterClient::new(channel).max_decoding_message_size(net::CONTROL_BYTES_MAX);
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
            let cluster = received.cluster;
            self.streams.lock().insert(number, received);
            if let Err(refused) = self.refresh() {
                error!(master, "{refused}; the topology known so far is kept");
                return Err(refused.to_string());
            }
            if !*heard {
                *heard = true;
                info!(master, %cluster, "following the master");
            }
            next = snapshots.next().await;
        }
        Ok(())
    }

    /// Learns from stores what they keep as chosen, for as long as no master speaks.
    async fn ask_stores(&self) {
        loop {
            tokio::time::sleep(STORES_ASKED_EVERY).await;
            let known = Arc::clone(&self.latest.borrow());
            if known.cluster == ClusterId(0) || !self.streams.lock().is_empty() {
                continue;
            }
            let epochs = |record: &KeyspaceRecord| pb::KnownRecord { keyspace_id: record.id.0, epoch: record.epoch.0 };
            let epochs: Vec<pb::KnownRecord> = known.keyspaces.iter().map(epochs).collect();
            let asking = known
                .stores
                .iter()
                .filter(|store| !store.address.is_empty())
                .map(|store| records::newer(store.address.clone(), known.cluster, epochs.clone()));
            // One that cannot be asked is down or cut off as the masters are.
            for record in futures_util::future::join_all(asking).await.into_iter().flatten().flatten() {
                self.learn(record);
            }
        }
    }

    /// Takes a record over that a store keeps as chosen, if it is newer than what is known.
    fn learn(&self, record: KeyspaceRecord) {
        // Who refreshes holds these: none of what a master says meanwhile is lost.
        let streams = self.streams.lock();
        let before = Arc::clone(&self.latest.borrow());
        if !streams.is_empty() || before.dropped.contains(&record.id) {
            return;
        }
        if before.keyspace(record.id).is_some_and(|known| known.epoch >= record.epoch) {
            return;
        }
        let mut after = Snapshot::clone(&before);
        after.keyspaces.retain(|keyspace| keyspace.id != record.id);
        if record.dropped {
            after.dropped.insert(record.id);
        } else {
            after.keyspaces.push(record);
            after.keyspaces.sort_by_key(|keyspace| keyspace.id);
        }
        log_changes(&before, &after);
        self.latest.send_replace(Arc::new(after));
    }

    /// Makes the latest snapshot of what all masters say.
    fn refresh(&self) -> Result<(), OtherCluster> {
        let streams = self.streams.lock();
        let before = Arc::clone(&self.latest.borrow());
        let Some(merged) = combine(&before, streams.values())? else { return Ok(()) };
        if merged != *before {
            log_changes(&before, &merged);
            self.latest.send_replace(Arc::new(merged));
        }
        Ok(())
    }
}

/// What to believe when several masters speak, knowing `known`: the newest records, whoever says them, and of stores what the leader says,
/// else the master to which most stores have come. `None` if nobody speaks.
fn combine<'a>(
    known: &Snapshot,
    received: impl Iterator<Item = &'a Snapshot>,
) -> Result<Option<Snapshot>, OtherCluster> {
    let mut received: Vec<&Snapshot> = received.collect();
    // One that was overruled may not know it yet: the higher term leads. The sort is stable: else the first.
    received.sort_by_key(|snapshot| {
        let term = if snapshot.leadership.is_own { snapshot.leadership.term } else { 0 };
        let up = snapshot.stores.iter().filter(|store| store.up).count();
        std::cmp::Reverse((term, up))
    });
    let mut said = received.into_iter();
    let Some(best) = said.next() else { return Ok(None) };
    let mut merged = merge(known, best.clone())?;
    for other in said {
        let only_records =
            Snapshot { keyspaces: other.keyspaces.clone(), dropped: other.dropped.clone(), ..merged.clone() };
        let cluster = if other.cluster == ClusterId(0) { merged.cluster } else { other.cluster };
        merged = merge(&merged, Snapshot { cluster, ..only_records })?;
    }
    Ok(Some(merged))
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
        let has_shards = merged.keyspaces.iter().any(|keyspace| keyspace.copies_of(store.id).next().is_some());
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
            let (shards, phase) =
                (keyspace.shard_count(), keyspace.active_operation().map(|operation| operation.phase));
            info!(keyspace = keyspace.name, epoch = %keyspace.epoch, shards, ?phase, "topology of keyspace");
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
    use vasto_proto::topology::Leadership;

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
    fn of_several_masters_the_newest_record_counts_and_of_stores_what_the_leader_says() {
        let lead = |term, is_own| Leadership { term, is_own, ..Leadership::default() };
        let leader = Snapshot { leadership: lead(7, true), ..snapshot(1, &[store(1, "one:1")]) };
        let mut standby = Snapshot { leadership: lead(7, false), ..snapshot(1, &[store(1, "old:1")]) };
        standby.keyspaces[0].epoch = Epoch(9);
        let overruled = Snapshot { leadership: lead(6, true), ..snapshot(1, &[store(1, "older:1")]) };
        let fresh = Snapshot { version: 1, ..Snapshot::default() };
        let none = Snapshot::default();
        for said in [[&standby, &leader, &overruled, &fresh], [&fresh, &overruled, &leader, &standby]] {
            let merged = combine(&none, said.into_iter()).unwrap().unwrap();
            assert_eq!((merged.keyspaces[0].epoch, merged.stores[0].address.as_str()), (Epoch(9), "one:1"));
            assert_eq!((merged.leadership.term, merged.leadership.is_own), (7, true));
        }
        // When the leader is gone the others are heard, and nothing is forgotten.
        let known = combine(&none, [&standby, &leader].into_iter()).unwrap().unwrap();
        let merged = combine(&known, [&overruled].into_iter()).unwrap().unwrap();
        assert_eq!((merged.keyspaces[0].epoch, merged.stores[0].address.as_str()), (Epoch(9), "older:1"));
        assert_eq!(combine(&known, std::iter::empty()), Ok(None));
        let stranger = snapshot(2, &[]);
        assert!(combine(&none, [&leader, &stranger].into_iter()).is_err());
    }

    #[test]
    fn a_store_is_believed_if_it_has_something_newer_and_no_master_speaks() {
        let first = KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(1)]).unwrap();
        let second = KeyspaceRecord::new(KeyspaceId(4), "four", &[StoreId(1)]).unwrap();
        let known = Snapshot { keyspaces: vec![first.clone(), second.clone()], ..snapshot(7, &[store(1, "a:1")]) };
        let (latest, heard) = watch::channel(Arc::new(known.clone()));
        let followed = Followed { latest, streams: Mutex::default() };
        let grown = first.begin_resize(2, vec![StoreId(1)]).unwrap();
        followed.learn(grown.clone());
        followed.learn(first.clone());
        followed.learn(second.as_dropped());
        followed.learn(second.begin_resize(2, vec![StoreId(1)]).unwrap());
        let after = Arc::clone(&heard.borrow());
        assert_eq!((&after.keyspaces, &after.stores), (&vec![grown.clone()], &known.stores));
        assert_eq!(after.dropped, [second.id].into());
        followed.streams.lock().insert(0, known);
        followed.learn(grown.fence().unwrap());
        assert_eq!(heard.borrow().keyspaces, [grown], "masters know better");
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
