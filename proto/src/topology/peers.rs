//! What every store must know to get along without a master: where the others are, and who holds the records.

use crate::id::StoreId;
use crate::pb;
use std::collections::{BTreeMap, BTreeSet};

/// The stores whose majority decides what is true: of records, and of leases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct HolderGroup {
    /// Grows with each change; 0 = there is none yet.
    pub version: u64,
    pub members: BTreeSet<StoreId>,
}

impl HolderGroup {
    /// How many of the members are a majority.
    pub fn quorum(&self) -> usize {
        self.members.len() / 2 + 1
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// host:port by store.
    pub addresses: BTreeMap<StoreId, String>,
    pub group: HolderGroup,
}

impl From<&HolderGroup> for pb::HolderGroup {
    fn from(group: &HolderGroup) -> Self {
        Self { version: group.version, members: group.members.iter().map(|store| store.0).collect() }
    }
}

impl From<pb::HolderGroup> for HolderGroup {
    fn from(message: pb::HolderGroup) -> Self {
        Self { version: message.version, members: message.members.into_iter().map(StoreId).collect() }
    }
}

impl From<&Peers> for pb::Peers {
    fn from(peers: &Peers) -> Self {
        let peer = |(store, address): (&StoreId, &String)| pb::Peer { store_id: store.0, address: address.clone() };
        Self { stores: peers.addresses.iter().map(peer).collect(), group: Some((&peers.group).into()) }
    }
}

impl From<pb::Peers> for Peers {
    fn from(message: pb::Peers) -> Self {
        let addresses = message.stores.into_iter().map(|peer| (StoreId(peer.store_id), peer.address)).collect();
        Self { addresses, group: message.group.map(Into::into).unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_round_trip() {
        let peers = Peers {
            addresses: [(StoreId(1), "one:1".to_owned()), (StoreId(2), String::new())].into(),
            group: HolderGroup { version: 3, members: [StoreId(1), StoreId(2), StoreId(5)].into() },
        };
        assert_eq!(Peers::from(pb::Peers::from(&peers)), peers);
        assert_eq!((peers.group.quorum(), HolderGroup::default().quorum()), (2, 1));
    }
}
