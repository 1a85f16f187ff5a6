//! A snapshot of the whole cluster, as the master streams it to gateways.

use super::record::{KeyspaceRecord, RecordError};
use crate::id::{ClusterId, KeyspaceId, StoreId};
use crate::pb;

/// What the master knows of one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreInfo {
    pub id: StoreId,
    /// host:port of its gRPC server.
    pub address: String,
    pub up: bool,
    pub free_disk_bytes: u64,
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
}

impl Snapshot {
    pub fn store(&self, id: StoreId) -> Option<&StoreInfo> {
        self.stores.iter().find(|store| store.id == id)
    }

    pub fn keyspace(&self, id: KeyspaceId) -> Option<&KeyspaceRecord> {
        self.keyspaces.iter().find(|keyspace| keyspace.id == id)
    }

    pub fn keyspace_named(&self, name: &str) -> Option<&KeyspaceRecord> {
        self.keyspaces.iter().find(|keyspace| keyspace.name == name)
    }
}

impl From<&Snapshot> for pb::Topology {
    fn from(snapshot: &Snapshot) -> Self {
        let store = |store: &StoreInfo| pb::StoreInfo {
            store_id: store.id.0,
            address: store.address.clone(),
            up: store.up,
            free_disk_bytes: store.free_disk_bytes,
        };
        Self {
            cluster_id: snapshot.cluster.0,
            version: snapshot.version,
            stores: snapshot.stores.iter().map(store).collect(),
            keyspaces: snapshot.keyspaces.iter().map(Into::into).collect(),
            waiting_for: snapshot.waiting_for.clone(),
        }
    }
}

impl TryFrom<pb::Topology> for Snapshot {
    type Error = RecordError;

    fn try_from(message: pb::Topology) -> Result<Self, RecordError> {
        let store = |store: pb::StoreInfo| StoreInfo {
            id: StoreId(store.store_id),
            address: store.address,
            up: store.up,
            free_disk_bytes: store.free_disk_bytes,
        };
        Ok(Self {
            cluster: ClusterId(message.cluster_id),
            version: message.version,
            stores: message.stores.into_iter().map(store).collect(),
            keyspaces: message.keyspaces.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            waiting_for: message.waiting_for,
        })
    }
}
