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
    /// Bytes of its files and memtables.
    pub bytes: u64,
    /// It may hold rows of slots that it does not own.
    pub has_foreign_rows: bool,
    /// Of a primary that gets slots of other shards: each of those shards.
    pub moves: Vec<MoveStatus>,
}

/// How far a shard is with the slots of another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MoveStage {
    /// The source cannot be reached, or is about to begin.
    #[default]
    Waits,
    Copies,
    /// Everything has been copied; what changes is taken over as it comes.
    Follows,
    /// Everything up to the source's fence, which the record of this epoch set, is here and with the copies of this shard.
    Drained {
        fence: Epoch,
    },
}

/// What has come of one source's slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MoveStatus {
    /// The shard that has them.
    pub source: ShardId,
    pub operation: u64,
    pub stage: MoveStage,
    pub slots: u32,
    pub slots_copied: u32,
    pub rows_copied: u64,
    /// Bytes of keys and rows.
    pub bytes_copied: u64,
    /// An estimate of all of them.
    pub bytes_expected: u64,
    /// Keys that have changed at the source and are not here yet.
    pub behind_keys: u64,
    /// For how long the oldest of them has waited.
    pub behind_ms: u64,
    pub changes_applied: u64,
    /// How often it began.
    pub attempts: u32,
    /// Why it does not go on, for people; empty = it does.
    pub trouble: String,
}

impl From<&MoveStatus> for pb::MoveStatus {
    fn from(status: &MoveStatus) -> Self {
        let (stage, fence) = match status.stage {
            MoveStage::Waits => (pb::MoveStage::Waits, 0),
            MoveStage::Copies => (pb::MoveStage::Copies, 0),
            MoveStage::Follows => (pb::MoveStage::Follows, 0),
            MoveStage::Drained { fence } => (pb::MoveStage::Drained, fence.0),
        };
        Self {
            source: u32::from(status.source.0),
            operation: status.operation,
            stage: stage.into(),
            fence,
            slots: status.slots,
            slots_copied: status.slots_copied,
            rows_copied: status.rows_copied,
            bytes_copied: status.bytes_copied,
            bytes_expected: status.bytes_expected,
            behind_keys: status.behind_keys,
            behind_ms: status.behind_ms,
            changes_applied: status.changes_applied,
            attempts: status.attempts,
            trouble: status.trouble.clone(),
        }
    }
}

impl MoveStatus {
    /// `None` if it cannot be true.
    pub fn from_message(message: pb::MoveStatus) -> Option<Self> {
        let stage = match message.stage() {
            pb::MoveStage::Waits => MoveStage::Waits,
            pb::MoveStage::Copies => MoveStage::Copies,
            pb::MoveStage::Follows => MoveStage::Follows,
            pb::MoveStage::Drained => MoveStage::Drained { fence: Epoch(message.fence) },
            pb::MoveStage::Unset => return None,
        };
        Some(Self {
            source: ShardId(u16::try_from(message.source).ok()?),
            operation: message.operation,
            stage,
            slots: message.slots,
            slots_copied: message.slots_copied,
            rows_copied: message.rows_copied,
            bytes_copied: message.bytes_copied,
            bytes_expected: message.bytes_expected,
            behind_keys: message.behind_keys,
            behind_ms: message.behind_ms,
            changes_applied: message.changes_applied,
            attempts: message.attempts,
            trouble: message.trouble,
        })
    }
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
            bytes: status.bytes,
            has_foreign_rows: status.has_foreign_rows,
            moves: status.moves.iter().map(Into::into).collect(),
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
            bytes: message.bytes,
            has_foreign_rows: message.has_foreign_rows,
            moves: message.moves.into_iter().map(MoveStatus::from_message).collect::<Option<_>>()?,
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
            bytes: 1 << 40,
            has_foreign_rows: true,
            moves: vec![
                MoveStatus {
                    source: ShardId(3),
                    operation: 12,
                    stage: MoveStage::Drained { fence: Epoch(14) },
                    slots: 9,
                    behind_ms: 40,
                    trouble: "none".to_owned(),
                    ..MoveStatus::default()
                },
                MoveStatus::default(),
            ],
        };
        let message = pb::ShardStatus::from(&status);
        assert_eq!(ShardStatus::from_message(message.clone()), Some(status));
        assert_eq!(ShardStatus::from_message(pb::ShardStatus { role: 0, ..message.clone() }), None);
        assert_eq!(ShardStatus::from_message(pb::ShardStatus { shard: 1 << 20, ..message }), None);
    }
}
