//! A snapshot of the whole cluster, as the master streams it to gateways.

use super::peers::HolderGroup;
use super::record::{KeyspaceRecord, RecordError, ShardRecord};
use super::settings::Fsync;
use crate::id::{ClusterId, KeyspaceId, StoreId};
use crate::pb;
use std::collections::BTreeSet;

/// What the master knows of one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreInfo {
    pub id: StoreId,
    /// host:port of its gRPC server.
    pub address: String,
    pub up: bool,
    pub free_disk_bytes: u64,
    /// What it does for keyspaces whose records do not say; `None` if it is not known.
    pub fsync: Option<Fsync>,
    /// The part of the house that fails as one; empty if it was not told.
    pub zone: String,
    pub tags: Vec<String>,
}

/// Who may change records, as far as the master knows that says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// 0 = nobody leads.
    pub term: u64,
    pub address: String,
    /// Whether the master that says so leads itself.
    pub is_own: bool,
    /// Masters that stand by.
    pub standbys: Vec<String>,
    pub group: HolderGroup,
}

/// The cluster at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub cluster: ClusterId,
    /// Grows with each change within one life of a master.
    pub version: u64,
    pub stores: Vec<StoreInfo>,
    pub keyspaces: Vec<KeyspaceRecord>,
    /// What the master waits for while there is no keyspace; else empty.
    pub waiting_for: String,
    /// Keyspaces that were dropped: what is neither here nor among `keyspaces` is only not known (yet).
    pub dropped: BTreeSet<KeyspaceId>,
    pub leadership: Leadership,
}

impl Snapshot {
    pub fn store(&self, id: StoreId) -> Option<&StoreInfo> {
        self.stores.iter().find(|store| store.id == id)
    }

    pub fn keyspace(&self, id: KeyspaceId) -> Option<&KeyspaceRecord> {
        self.keyspaces.iter().find(|keyspace| keyspace.id == id)
    }

    /// When writes of a keyspace are synced: as its record says, else as the stores of its shards were told, and of several
    /// answers the weakest.
    pub fn fsync(&self, keyspace: &KeyspaceRecord) -> Fsync {
        let strength = |fsync: &Fsync| match fsync {
            Fsync::Never => 0,
            Fsync::EverySecond => 1,
            Fsync::Always => 2,
        };
        let of_store = |shard: &ShardRecord| self.store(shard.primary).and_then(|store| store.fsync);
        let of_stores = || keyspace.shards.iter().map(|shard| of_store(shard).unwrap_or_default()).min_by_key(strength);
        keyspace.settings.fsync.or_else(of_stores).unwrap_or_default()
    }

    pub fn keyspace_named(&self, name: &str) -> Option<&KeyspaceRecord> {
        self.keyspaces.iter().find(|keyspace| keyspace.name == name)
    }
}

impl From<&Leadership> for pb::Leadership {
    fn from(leadership: &Leadership) -> Self {
        Self {
            term: leadership.term,
            address: leadership.address.clone(),
            is_own: leadership.is_own,
            standbys: leadership.standbys.clone(),
            group: Some((&leadership.group).into()),
        }
    }
}

impl From<pb::Leadership> for Leadership {
    fn from(message: pb::Leadership) -> Self {
        Self {
            term: message.term,
            address: message.address,
            is_own: message.is_own,
            standbys: message.standbys,
            group: message.group.map(Into::into).unwrap_or_default(),
        }
    }
}

impl From<&Snapshot> for pb::Topology {
    fn from(snapshot: &Snapshot) -> Self {
        let store = |store: &StoreInfo| pb::StoreInfo {
            store_id: store.id.0,
            address: store.address.clone(),
            up: store.up,
            free_disk_bytes: store.free_disk_bytes,
            fsync: Fsync::code(store.fsync),
            zone: store.zone.clone(),
            tags: store.tags.clone(),
        };
        Self {
            cluster_id: snapshot.cluster.0,
            version: snapshot.version,
            stores: snapshot.stores.iter().map(store).collect(),
            keyspaces: snapshot.keyspaces.iter().map(Into::into).collect(),
            waiting_for: snapshot.waiting_for.clone(),
            dropped: snapshot.dropped.iter().map(|keyspace| keyspace.0).collect(),
            leadership: Some((&snapshot.leadership).into()),
        }
    }
}

impl TryFrom<pb::Topology> for Snapshot {
    type Error = RecordError;

    fn try_from(message: pb::Topology) -> Result<Self, RecordError> {
        let store = |store: pb::StoreInfo| {
            Ok(StoreInfo {
                id: StoreId(store.store_id),
                address: store.address,
                up: store.up,
                free_disk_bytes: store.free_disk_bytes,
                fsync: Fsync::from_code(store.fsync)?,
                zone: store.zone,
                tags: store.tags,
            })
        };
        Ok(Self {
            cluster: ClusterId(message.cluster_id),
            version: message.version,
            stores: message.stores.into_iter().map(store).collect::<Result<_, _>>()?,
            keyspaces: message.keyspaces.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            waiting_for: message.waiting_for,
            dropped: message.dropped.into_iter().map(KeyspaceId).collect(),
            leadership: message.leadership.map(Into::into).unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Settings;

    #[test]
    fn the_record_decides_when_writes_are_synced_and_else_the_weakest_of_its_stores() {
        let store = |id, fsync| StoreInfo {
            id: StoreId(id),
            address: format!("store-{id}:1"),
            up: true,
            free_disk_bytes: 1,
            fsync,
            zone: "cellar".to_owned(),
            tags: vec!["ssd".to_owned()],
        };
        let snapshot =
            |first, second| Snapshot { stores: vec![store(1, first), store(2, second)], ..Snapshot::default() };
        let record = KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(1), StoreId(2)]).unwrap();
        let (always, never) = (Some(Fsync::Always), Some(Fsync::Never));
        assert_eq!(snapshot(always, always).fsync(&record), Fsync::Always);
        assert_eq!(snapshot(always, never).fsync(&record), Fsync::Never);
        assert_eq!(snapshot(always, None).fsync(&record), Fsync::EverySecond);
        let record = record.with_settings(Settings { fsync: always, ..Settings::default() });
        assert_eq!(snapshot(never, never).fsync(&record), Fsync::Always);
        let group = HolderGroup { version: 2, members: [StoreId(1)].into() };
        let leadership = Leadership {
            term: 3,
            address: "one:1".to_owned(),
            is_own: true,
            standbys: vec!["two:1".to_owned()],
            group,
        };
        let sent = Snapshot { dropped: [KeyspaceId(7)].into(), leadership, ..snapshot(always, None) };
        assert_eq!(Snapshot::try_from(pb::Topology::from(&sent)), Ok(sent));
    }
}
