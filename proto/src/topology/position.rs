//! Positions: how far a copy of a shard has come in the shard's history, and what stores report of it.

use crate::id::{Epoch, ShardId, ShardKey, StoreId};
use crate::{id::KeyspaceId, pb};
use std::fmt;

/// One life of one primary: from when it begins to lead a shard until it stops or dies. Sequence numbers are comparable within an era. A later
/// era's log begins where its primary stood at the end of the era before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Era {
    /// The shard's epoch under which it leads.
    pub epoch: Epoch,
    /// Which life under that epoch, from 1: a primary that restarts begins a new one, since a power cut may have taken the end of its log.
    pub opened: u64,
}

/// How far a copy has come. The greater one has everything that was acknowledged to the other, once copies take part in nothing of an
/// earlier epoch any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub era: Era,
    /// The last sequence number of that era's log that the copy has.
    pub sequence: u64,
}

impl Position {
    pub const BYTES: usize = 24;

    /// Big endian: compares as bytes like the value.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.era.epoch.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.era.opened.to_be_bytes());
        bytes[16..].copy_from_slice(&self.sequence.to_be_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let number = |from: usize| bytes[from..].first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        let era = Era { epoch: Epoch(number(0)?), opened: number(8)? };
        Some(Self { era, sequence: number(16)? })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}:{}", self.era.epoch, self.era.opened, self.sequence)
    }
}

impl From<Position> for pb::Position {
    fn from(position: Position) -> Self {
        Self { epoch: position.era.epoch.0, opened: position.era.opened, sequence: position.sequence }
    }
}

impl From<pb::Position> for Position {
    fn from(message: pb::Position) -> Self {
        Self { era: Era { epoch: Epoch(message.epoch), opened: message.opened }, sequence: message.sequence }
    }
}

/// What a store is to a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Primary,
    /// A replica or a learner.
    Replica,
}

/// Where one copy stands, as its store reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardStatus {
    pub key: ShardKey,
    /// The shard's epoch in the record that the store follows: it takes part in nothing of an earlier one any more.
    pub epoch: Epoch,
    pub role: Role,
    /// `None`: the copy is not complete.
    pub position: Option<Position>,
    /// A primary that holds its lease, or needs none.
    pub serves: bool,
    /// Of a primary: every replica and learner of the record.
    pub followers: Vec<FollowerStatus>,
}

/// What a primary knows of one follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FollowerStatus {
    pub store: StoreId,
    pub connected: bool,
    /// It has all of the primary's log but what is on its way.
    pub in_sync: bool,
    /// Up to where in the primary's log it has applied.
    pub applied: u64,
}

impl From<&ShardStatus> for pb::ShardStatus {
    fn from(status: &ShardStatus) -> Self {
        let role = match status.role {
            Role::Primary => pb::Role::Primary,
            Role::Replica => pb::Role::Replica,
        };
        let follower = |follower: &FollowerStatus| pb::FollowerStatus {
            store_id: follower.store.0,
            connected: follower.connected,
            in_sync: follower.in_sync,
            applied: follower.applied,
        };
        Self {
            keyspace_id: status.key.keyspace.0,
            shard: u32::from(status.key.shard.0),
            epoch: status.epoch.0,
            role: role.into(),
            position: status.position.map(Into::into),
            serves: status.serves,
            followers: status.followers.iter().map(follower).collect(),
        }
    }
}

impl ShardStatus {
    /// `None` if it cannot be true.
    pub fn from_message(message: pb::ShardStatus) -> Option<Self> {
        let role = match message.role() {
            pb::Role::Primary => Role::Primary,
            pb::Role::Replica => Role::Replica,
            pb::Role::Unset => return None,
        };
        let follower = |follower: pb::FollowerStatus| FollowerStatus {
            store: StoreId(follower.store_id),
            connected: follower.connected,
            in_sync: follower.in_sync,
            applied: follower.applied,
        };
        Some(Self {
            key: ShardKey {
                keyspace: KeyspaceId(message.keyspace_id),
                shard: ShardId(u16::try_from(message.shard).ok()?),
            },
            epoch: Epoch(message.epoch),
            role,
            position: message.position.map(Into::into),
            serves: message.serves,
            followers: message.followers.into_iter().map(follower).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_round_trip_and_compare_as_bytes() {
        let position = |epoch, opened, sequence| Position { era: Era { epoch: Epoch(epoch), opened }, sequence };
        let ordered = [position(1, 1, 900), position(1, 2, 3), position(1, 2, 256), position(2, 1, 0)];
        for pair in ordered.windows(2) {
            assert!(pair[0] < pair[1] && pair[0].to_bytes() < pair[1].to_bytes());
        }
        for position in ordered {
            assert_eq!(Position::from_bytes(&position.to_bytes()), Some(position));
            assert_eq!(Position::from(pb::Position::from(position)), position);
        }
        assert_eq!(Position::from_bytes(b"short"), None);
        assert_eq!(ordered[0].to_string(), "1.1:900");
    }

    #[test]
    fn a_status_round_trips() {
        let status = ShardStatus {
            key: ShardKey { keyspace: KeyspaceId(3), shard: ShardId(7) },
            epoch: Epoch(9),
            role: Role::Primary,
            position: Some(Position { era: Era { epoch: Epoch(9), opened: 1 }, sequence: 5 }),
            serves: true,
            followers: vec![FollowerStatus { store: StoreId(8), connected: true, in_sync: false, applied: 4 }],
        };
        let message = pb::ShardStatus::from(&status);
        assert_eq!(ShardStatus::from_message(message.clone()), Some(status));
        assert_eq!(ShardStatus::from_message(pb::ShardStatus { role: 0, ..message.clone() }), None);
        assert_eq!(ShardStatus::from_message(pb::ShardStatus { shard: 1 << 20, ..message }), None);
    }
}
