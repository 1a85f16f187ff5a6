//! What stores say of their copies, since when, and what the master knows of the stores themselves: all that it decides by. Soft: a master
//! that restarts hears it again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::topology::{FollowerStatus, KeyspaceRecord, Position, Role, ShardRecord, ShardStatus};

use crate::place::Candidate;

/// A store that a master has not heard since it began counts as down only after so long: stores find a new master within a second or two.
const RETURN_PATIENCE: Duration = Duration::from_secs(2);

/// What each copy was last heard to say.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    heard: BTreeMap<(ShardKey, StoreId), Heard>,
    /// When the master first saw a record with this epoch of a shard.
    epochs: BTreeMap<ShardKey, (Epoch, Duration)>,
    /// Who led a shard that is vacant since this epoch, was up, and did not serve: it would not do so the next time.
    unfit: BTreeMap<ShardKey, (Epoch, StoreId)>,
}

/// The newest status of one copy.
#[derive(Clone, Debug)]
pub struct Heard {
    pub status: ShardStatus,
    /// When it first reported this epoch.
    pub since: Duration,
    /// When it last reported under this epoch that it serves.
    pub served_at: Option<Duration>,
    /// The version of the keyspace's record that its store had.
    pub record: Epoch,
    /// Where it stood when it was first heard under this version, in this era.
    pub mark: Option<Position>,
}

impl Standing {
    /// Takes in all that a store says of its copies; `held` are the versions of the records that it has.
    pub fn hear(
        &mut self,
        store: StoreId,
        statuses: Vec<ShardStatus>,
        held: &BTreeMap<KeyspaceId, Epoch>,
        now: Duration,
    ) {
        let named: BTreeSet<ShardKey> = statuses.iter().map(|status| status.key).collect();
        self.heard.retain(|(shard, of), _| *of != store || named.contains(shard));
        for status in statuses {
            let record = held.get(&status.key.keyspace).copied().unwrap_or_default();
            let place = (status.key, store);
            let before = self.heard.get(&place);
            let same_epoch = before.filter(|before| before.status.epoch == status.epoch);
            let same_version = before.filter(|before| before.record == record && before.era() == era(&status));
            let heard = Heard {
                since: same_epoch.map_or(now, |before| before.since),
                served_at: Some(now).filter(|_| status.serves).or(same_epoch.and_then(|before| before.served_at)),
                mark: same_version.map_or(status.position, |before| before.mark),
                record,
                status,
            };
            self.heard.insert(place, heard);
        }
    }

    /// Notes which epochs the shards of a record have now.
    pub fn note(&mut self, record: &KeyspaceRecord, now: Duration) {
        for (key, shard) in shards(record) {
            let noted = self.epochs.entry(key).or_insert((shard.epoch, now));
            if noted.0 != shard.epoch {
                *noted = (shard.epoch, now);
            }
        }
    }

    /// Notes who led without serving until the shard became vacant with this epoch.
    pub fn note_unfit(&mut self, key: ShardKey, epoch: Epoch, store: StoreId) {
        self.unfit.insert(key, (epoch, store));
    }

    /// Lets a test lie.
    #[cfg(test)]
    pub fn change(&mut self, change: impl Fn(StoreId, &mut Heard)) {
        for ((_, store), heard) in &mut self.heard {
            change(*store, heard);
        }
    }

    /// Forgets keyspaces that are no more.
    pub fn keep(&mut self, lives: impl Fn(KeyspaceId) -> bool) {
        self.heard.retain(|(key, _), _| lives(key.keyspace));
        self.epochs.retain(|key, _| lives(key.keyspace));
        self.unfit.retain(|key, _| lives(key.keyspace));
    }
}

fn era(status: &ShardStatus) -> Option<vasto_proto::topology::Era> {
    status.position.map(|position| position.era)
}

impl Heard {
    fn era(&self) -> Option<vasto_proto::topology::Era> {
        era(&self.status)
    }
}

/// The shards of a record with their names.
pub fn shards(record: &KeyspaceRecord) -> impl Iterator<Item = (ShardKey, &ShardRecord)> {
    let key = |number: usize| ShardKey { keyspace: record.id, shard: ShardId(number as u16) };
    record.shards.iter().enumerate().map(move |(number, shard)| (key(number), shard))
}

/// A store that has come since the master began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    pub candidate: Candidate,
    pub up: bool,
    /// Of one that is up: since when; of one that is down: when it was last heard.
    pub since: Duration,
    /// It knows nothing of copies: its version is older.
    pub older: bool,
}

/// All that the master decides by.
#[derive(Clone, Debug)]
pub struct View<'a> {
    pub now: Duration,
    /// When this master began to hear stores.
    pub began: Duration,
    /// A copy whose store is down for so long is made elsewhere.
    pub replace_after: Duration,
    pub stores: BTreeMap<StoreId, Store>,
    pub standing: &'a Standing,
}

impl View<'_> {
    pub fn is_up(&self, store: StoreId) -> bool {
        self.stores.get(&store).is_some_and(|store| store.up)
    }

    /// For how long the store is down.
    pub fn down_for(&self, store: StoreId) -> Option<Duration> {
        match self.stores.get(&store) {
            Some(store) if store.up => None,
            Some(store) => Some(self.now.saturating_sub(store.since)),
            None => Some(self.now.saturating_sub(self.began + RETURN_PATIENCE)),
        }
    }

    /// Whether its copies are to be made elsewhere.
    pub fn is_lost(&self, store: StoreId) -> bool {
        self.down_for(store).is_some_and(|time| time >= self.replace_after)
    }

    pub fn heard(&self, key: ShardKey, store: StoreId) -> Option<&Heard> {
        self.standing.heard.get(&(key, store))
    }

    /// What the copy has said under the shard's epoch.
    pub fn heard_at(&self, key: ShardKey, store: StoreId, epoch: Epoch) -> Option<&Heard> {
        self.heard(key, store).filter(|heard| heard.status.epoch == epoch)
    }

    /// What the primary of the record says, while it is up.
    pub fn primary(&self, key: ShardKey, shard: &ShardRecord) -> Option<&Heard> {
        let heard = self.heard_at(key, shard.primary, shard.epoch)?;
        (heard.status.role == Role::Primary && self.is_up(shard.primary)).then_some(heard)
    }

    /// What the primary says of a copy that follows it.
    pub fn follower(&self, key: ShardKey, shard: &ShardRecord, store: StoreId) -> Option<FollowerStatus> {
        let followers = &self.primary(key, shard)?.status.followers;
        followers.iter().find(|follower| follower.store == store && follower.connected).copied()
    }

    pub fn is_in_sync(&self, key: ShardKey, shard: &ShardRecord, store: StoreId) -> bool {
        self.is_up(store) && self.follower(key, shard, store).is_some_and(|follower| follower.in_sync)
    }

    /// For how long the shard's primary has been up and could have served, and did not.
    pub fn idle_for(&self, key: ShardKey, shard: &ShardRecord) -> Duration {
        let Some(store) = self.stores.get(&shard.primary).filter(|store| store.up) else {
            return Duration::ZERO;
        };
        let known = self.standing.epochs.get(&key).filter(|(epoch, _)| *epoch == shard.epoch);
        let since = known.map_or(self.now, |(_, since)| *since).max(store.since);
        let served_at = self.heard_at(key, shard.primary, shard.epoch).and_then(|heard| heard.served_at);
        self.now.saturating_sub(served_at.unwrap_or_default().max(since))
    }

    /// The store that must not lead the vacant shard again if another can.
    pub fn unfit(&self, key: ShardKey, shard: &ShardRecord) -> Option<StoreId> {
        let (epoch, store) = self.standing.unfit.get(&key)?;
        (*epoch == shard.epoch).then_some(*store)
    }
}
