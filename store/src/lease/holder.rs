//! The store as a holder: grants leases to primaries. Everything it needs is in memory, so that a slow disk holds up nobody.

use super::clock::BootClock;
use metrics::counter;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::pb;
use vasto_proto::topology::lease::{Asked, Grants};
use vasto_proto::topology::{Entry, KeyspaceRecord, Peers};

type Records = RwLock<BTreeMap<KeyspaceId, Arc<KeyspaceRecord>>>;

pub struct Holder {
    clock: Arc<BootClock>,
    grants: Mutex<Grants>,
    /// As the store keeps them, but readable while it writes one to the disk.
    known: Records,
    /// What the store has voted for last, chosen or not.
    accepted: Records,
    accepted_group: AtomicU64,
    peers: watch::Receiver<Arc<Peers>>,
}

impl Holder {
    /// Grants nothing before what it may have granted in an earlier life is over.
    pub fn new(
        clock: Arc<BootClock>,
        records: &BTreeMap<KeyspaceId, KeyspaceRecord>,
        peers: watch::Receiver<Arc<Peers>>,
    ) -> Self {
        let known = records.values().map(|record| (record.id, Arc::new(record.clone()))).collect();
        let grants = Mutex::new(Grants::new(clock.now_ns()));
        Self {
            clock,
            grants,
            known: RwLock::new(known),
            accepted: RwLock::default(),
            accepted_group: AtomicU64::new(0),
            peers,
        }
    }

    /// A newer record has come: from here on it is judged by, whether it is on the disk yet or not.
    pub fn heard(&self, record: &KeyspaceRecord) {
        self.known.write().insert(record.id, Arc::new(record.clone()));
    }

    /// The store has voted, whatever it has voted for before: a later term may have overruled that.
    pub fn voted(&self, entry: &Entry) {
        match entry {
            Entry::Keyspace(record) => {
                self.accepted.write().insert(record.id, Arc::new(record.clone()));
            }
            Entry::Group(group) => self.accepted_group.store(group.version, Ordering::Release),
        }
    }

    /// The newest record of a keyspace that this store has accepted or knows to be true: by it the store grants leases.
    fn newest_record(&self, keyspace: KeyspaceId) -> Option<Arc<KeyspaceRecord>> {
        let accepted = self.accepted.read().get(&keyspace).cloned();
        let known = self.known.read().get(&keyspace).cloned();
        // Of one epoch, what is known to be true is.
        [accepted, known].into_iter().flatten().max_by_key(|record| record.epoch)
    }

    /// The newest version of the holder group that this store has accepted or knows to be true.
    fn newest_group_version(&self) -> u64 {
        self.peers.borrow().group.version.max(self.accepted_group.load(Ordering::Acquire))
    }

    /// Answers what a primary asks.
    pub fn renew(&self, request: &pb::RenewRequest) -> pb::RenewResponse {
        let group_version = self.newest_group_version();
        let now_ns = self.clock.now_ns();
        let mut refused = 0;
        let mut grants = self.grants.lock();
        let mut answer = |lease: &pb::LeaseRequest| {
            let Ok(shard) = u16::try_from(lease.shard) else {
                return pb::LeaseAnswer { granted: false, reason: "knows no such shard".to_owned() };
            };
            let keyspace = KeyspaceId(lease.keyspace_id);
            let asked = Asked {
                store: StoreId(request.store_id),
                shard: ShardKey { keyspace, shard: ShardId(shard) },
                epoch: Epoch(lease.epoch),
                tenure: lease.tenure,
                group_version: request.group_version,
            };
            if lease.release {
                grants.release(&asked);
                return pb::LeaseAnswer::default();
            }
            match grants.answer(&asked, self.newest_record(keyspace).as_deref(), group_version, now_ns) {
                Ok(()) => pb::LeaseAnswer { granted: true, reason: String::new() },
                Err(refusal) => {
                    refused += 1;
                    pb::LeaseAnswer { granted: false, reason: refusal.to_string() }
                }
            }
        };
        let answers: Vec<_> = request.leases.iter().map(&mut answer).collect();
        grants.prune(now_ns);
        drop(grants);
        counter!("vasto_store_leases_granted_total")
            .increment(answers.iter().filter(|answer| answer.granted).count() as u64);
        counter!("vasto_store_leases_refused_total").increment(refused);
        pb::RenewResponse { answers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::topology::HolderGroup;

    fn record(epoch: u64, primary: u32) -> KeyspaceRecord {
        let mut record = KeyspaceRecord::new(KeyspaceId(7), "seven", &[StoreId(primary)]).unwrap();
        record.epoch = Epoch(epoch);
        record.shards[0].epoch = Epoch(epoch);
        record
    }

    #[test]
    fn a_holder_judges_by_what_it_has_accepted_last_or_knows() {
        let (peers, watched) = watch::channel(Arc::new(Peers::default()));
        let holder = Holder::new(Arc::default(), &BTreeMap::new(), watched);
        let ask = |store: u32, epoch: u64, group_version: u64| {
            let lease = pb::LeaseRequest { keyspace_id: 7, epoch, ..Default::default() };
            let request = pb::RenewRequest { store_id: store, leases: vec![lease], group_version };
            holder.renew(&request).answers.remove(0).reason
        };
        assert_eq!(ask(1, 1, 1), "knows no such keyspace");
        holder.heard(&record(1, 1));
        assert!(ask(1, 1, 1).starts_with("has started and grants nothing"));
        holder.voted(&Entry::Keyspace(record(2, 2)));
        assert_eq!(ask(1, 1, 1), "knows epoch 2, at which store 00000002 is primary");
        // A later term has overruled that with what is known to be true.
        holder.voted(&Entry::Keyspace(record(1, 1)));
        assert!(ask(1, 1, 1).starts_with("has started"));
        holder.voted(&Entry::Keyspace(record(2, 3)));
        holder.heard(&record(2, 2));
        assert_eq!(ask(3, 2, 1), "knows epoch 2, at which store 00000002 is primary");

        holder.voted(&Entry::Group(HolderGroup { version: 4, ..HolderGroup::default() }));
        assert_eq!(ask(2, 2, 3), "knows version 4 of the group of holders");
        assert!(ask(2, 2, 4).starts_with("has started"));
        let group = HolderGroup { version: 5, ..HolderGroup::default() };
        peers.send_replace(Arc::new(Peers { group, ..Peers::default() }));
        assert_eq!(ask(2, 2, 4), "knows version 5 of the group of holders");
    }
}
