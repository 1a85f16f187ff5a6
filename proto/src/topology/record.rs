//! The record: the durable description of one keyspace.

use super::operation::{Operation, OperationKind};
use super::settings::Settings;
use crate::id::{Epoch, KeyspaceId, ShardId, StoreId};
use crate::pb;
use crate::slot::SHARD_COUNT_MAX;
use std::collections::BTreeSet;
use thiserror::Error;

/// Longest name of a keyspace in bytes.
pub const KEYSPACE_NAME_BYTES_MAX: usize = 64;

/// The durable description of one keyspace: its shards and who holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyspaceRecord {
    pub id: KeyspaceId,
    pub name: String,
    /// Grows with every change of the record.
    pub epoch: Epoch,
    /// Replication factor: the primary and its replicas together.
    pub copies: u32,
    /// By shard number; never empty. While the keyspace is resized: those of before and after.
    pub shards: Vec<ShardRecord>,
    /// The number of shards by which slots are assigned.
    pub shard_count: u16,
    /// What is being done with the keyspace, or was done last.
    pub operation: Option<Operation>,
    pub settings: Settings,
    /// The keyspace is no more. Such a record stays for good, so that nobody who still has an older one brings it back; its shards
    /// say who held them.
    pub dropped: bool,
}

/// A dropped keyspace's epoch is so far above every other that it wins over changes of which its maker has not heard. Epochs count
/// changes: they never come that far.
const DROPPED_EPOCHS: u64 = 1 << 32;

/// Who holds one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRecord {
    /// Grows with every change of who may serve the shard.
    pub epoch: Epoch,
    /// [`NOBODY`]: the shard is vacant, and its copies take part in nothing of an earlier epoch any more.
    pub primary: StoreId,
    /// They count for acknowledgements. While the shard is vacant the last of them is the primary before.
    pub replicas: Vec<StoreId>,
    /// Copies that are being made: they follow, and neither count for acknowledgements nor can be chosen.
    pub learners: Vec<StoreId>,
    /// The primary before, from which the new one first takes the end of its log; [`NOBODY`]: from nobody.
    pub previous: StoreId,
    /// Copies (replicas, or learners that have been replicas) that may alone have something that was acknowledged: nobody is chosen
    /// before each of them was heard. Names the copies while one of them leaves, or while more of them must begin to have everything.
    pub witnesses: Vec<StoreId>,
    /// The epoch of the record that made the shard, 0 with the keyspace: a shard of a number that was there before is another one, and what
    /// is left of that one is nothing to it.
    pub born: Epoch,
}

/// Copies of one shard, those included that come and go: far more than anybody needs, few enough to list.
pub const COPIES_MAX: usize = 64;

/// No store has this id.
pub const NOBODY: StoreId = StoreId(0);

impl ShardRecord {
    pub fn new(epoch: Epoch, primary: StoreId, replicas: Vec<StoreId>) -> Self {
        let (learners, witnesses) = (Vec::new(), Vec::new());
        Self { epoch, primary, replicas, learners, previous: NOBODY, witnesses, born: Epoch::default() }
    }

    pub fn is_vacant(&self) -> bool {
        self.primary == NOBODY
    }

    /// Every store that holds or gets a copy, the primary first.
    pub fn copies(&self) -> impl Iterator<Item = StoreId> {
        let primary = Some(self.primary).filter(|primary| *primary != NOBODY);
        primary.into_iter().chain(self.replicas.iter().copied()).chain(self.learners.iter().copied())
    }

    /// What cannot be true of it.
    fn fault(&self) -> Option<&'static str> {
        let copies: BTreeSet<StoreId> = self.copies().collect();
        let holds = |store: &StoreId| copies.contains(store);
        if self.copies().count() > copies.len() {
            Some("names a store twice")
        } else if copies.len() > COPIES_MAX {
            Some("has more than 64 copies")
        } else if copies.is_empty() || self.is_vacant() && self.replicas.is_empty() {
            Some("has no copy")
        } else if holds(&NOBODY) {
            Some("has a copy on store 0, which does not exist")
        } else if self.previous != NOBODY && self.previous == self.primary {
            Some("goes from a store to the same store")
        } else if !self.witnesses.iter().all(holds) {
            Some("has a witness without a copy")
        } else {
            None
        }
    }
}

/// A received record that cannot be true.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RecordError {
    #[error("a keyspace needs 1 to {SHARD_COUNT_MAX} shards, not {0}")]
    ShardCount(usize),
    #[error(
        "keyspace name {0:?} is empty, longer than {KEYSPACE_NAME_BYTES_MAX} bytes or has other characters than letters, digits, '_', '-', '.'"
    )]
    Name(String),
    /// A later version may know it.
    #[error("setting {name} has the unknown value {code}")]
    Setting { name: &'static str, code: i32 },
    #[error("shard {shard} {fault}")]
    Shard { shard: ShardId, fault: &'static str },
    #[error("a shard has 1 to {COPIES_MAX} copies, not {0}")]
    Copies(u32),
    #[error("slots are assigned to {shard_count} shards, {shards} are described, and the operation says otherwise")]
    Layout { shard_count: u16, shards: usize },
    /// A later version may know it.
    #[error("an operation that is not known here")]
    Operation,
}

impl KeyspaceRecord {
    /// The first record of a new keyspace.
    pub fn new(id: KeyspaceId, name: &str, primaries: &[StoreId]) -> Result<Self, RecordError> {
        let shards = primaries.iter().map(|primary| ShardRecord::new(Epoch(1), *primary, Vec::new())).collect();
        let record = Self {
            id,
            name: name.to_owned(),
            epoch: Epoch(1),
            copies: 1,
            shards,
            shard_count: u16::try_from(primaries.len()).map_err(|_| RecordError::ShardCount(primaries.len()))?,
            operation: None,
            settings: Settings::default(),
            dropped: false,
        };
        record.validate()?;
        Ok(record)
    }

    /// Whether it can be true.
    pub fn validate(&self) -> Result<(), RecordError> {
        if self.shards.is_empty() || self.shards.len() > usize::from(SHARD_COUNT_MAX) {
            return Err(RecordError::ShardCount(self.shards.len()));
        }
        validate_name(&self.name)?;
        // Of a dropped keyspace only the id matters, and who has to delete something.
        if self.dropped {
            return Ok(());
        }
        if self.copies as usize > COPIES_MAX {
            return Err(RecordError::Copies(self.copies));
        }
        if !self.has_likely_layout() {
            return Err(RecordError::Layout { shard_count: self.shard_count, shards: self.shards.len() });
        }
        for (shard, record) in self.shards.iter().enumerate() {
            if let Some(fault) = record.fault() {
                return Err(RecordError::Shard { shard: ShardId(shard as u16), fault });
            }
        }
        Ok(())
    }

    /// Whether the numbers of shards agree with each other.
    fn has_likely_layout(&self) -> bool {
        let (serving, described) = (usize::from(self.shard_count), self.shards.len());
        let resize = self.active_operation().and_then(|operation| match operation.kind {
            OperationKind::Resize { from, to } => Some((operation.may_be_aborted(), from, to)),
            OperationKind::Replace { .. } => None,
        });
        match resize {
            Some((is_before, from, to)) => {
                described == usize::from(from.max(to)) && self.shard_count == if is_before { from } else { to }
            }
            None => serving == described,
        }
    }

    /// The next version of the record with other settings. The shards' epochs stay, so no request in flight is refused.
    pub fn with_settings(&self, settings: Settings) -> Self {
        Self { epoch: Epoch(self.epoch.0 + 1), settings, ..self.clone() }
    }

    /// The last version of the record: the keyspace is no more.
    pub fn as_dropped(&self) -> Self {
        let epoch = Epoch(self.epoch.0 + DROPPED_EPOCHS);
        let shard_count = self.shards.len() as u16;
        let settings = Settings::default();
        Self { epoch, settings, dropped: true, operation: None, shard_count, ..self.clone() }
    }

    /// Whether two records of one keyspace cannot both be true: one version that says different things. That a keyspace is no more is
    /// the same whatever it was before.
    pub fn contradicts(&self, other: &Self) -> bool {
        self.epoch == other.epoch && self != other && !(self.dropped && other.dropped)
    }

    /// The shards of which a store holds or gets a copy, in whatever role; none of a dropped keyspace.
    pub fn copies_of(&self, store: StoreId) -> impl Iterator<Item = (ShardId, &ShardRecord)> {
        let has_copy = move |shard: &ShardRecord| shard.copies().any(|copy| copy == store);
        let shards = self.shards.iter().enumerate().filter(move |(_, shard)| !self.dropped && has_copy(shard));
        shards.map(|(number, shard)| (ShardId(number as u16), shard))
    }

    /// By how many shards slots are assigned.
    pub fn shard_count(&self) -> u16 {
        self.shard_count
    }

    /// The shards that a store serves as primary; none of a dropped keyspace.
    pub fn shards_of(&self, store: StoreId) -> impl Iterator<Item = (ShardId, &ShardRecord)> {
        let shards = self.shards.iter().enumerate().filter(move |(_, shard)| !self.dropped && shard.primary == store);
        shards.map(|(number, shard)| (ShardId(number as u16), shard))
    }
}

/// Whether a keyspace may be called so.
pub fn validate_name(name: &str) -> Result<(), RecordError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if name.is_empty() || name.len() > KEYSPACE_NAME_BYTES_MAX || !name.bytes().all(allowed) {
        return Err(RecordError::Name(name.to_owned()));
    }
    Ok(())
}

impl From<&KeyspaceRecord> for pb::KeyspaceRecord {
    fn from(record: &KeyspaceRecord) -> Self {
        let shard = |shard: &ShardRecord| pb::ShardRecord {
            epoch: shard.epoch.0,
            primary: shard.primary.0,
            replicas: shard.replicas.iter().map(|store| store.0).collect(),
            learners: shard.learners.iter().map(|store| store.0).collect(),
            previous: shard.previous.0,
            witnesses: shard.witnesses.iter().map(|store| store.0).collect(),
            born: shard.born.0,
        };
        Self {
            keyspace_id: record.id.0,
            name: record.name.clone(),
            epoch: record.epoch.0,
            copies: record.copies,
            shards: record.shards.iter().map(shard).collect(),
            settings: Some((&record.settings).into()),
            dropped: record.dropped,
            shard_count: record.shard_count.into(),
            operation: record.operation.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<pb::KeyspaceRecord> for KeyspaceRecord {
    type Error = RecordError;

    fn try_from(message: pb::KeyspaceRecord) -> Result<Self, RecordError> {
        let shard = |shard: pb::ShardRecord| ShardRecord {
            epoch: Epoch(shard.epoch),
            primary: StoreId(shard.primary),
            replicas: shard.replicas.into_iter().map(StoreId).collect(),
            learners: shard.learners.into_iter().map(StoreId).collect(),
            previous: StoreId(shard.previous),
            witnesses: shard.witnesses.into_iter().map(StoreId).collect(),
            born: Epoch(shard.born),
        };
        let shards: Vec<ShardRecord> = message.shards.into_iter().map(shard).collect();
        let count = |count: usize| u16::try_from(count).map_err(|_| RecordError::ShardCount(count));
        let operation = |operation| Operation::from_message(operation).ok_or(RecordError::Operation);
        let record = Self {
            id: KeyspaceId(message.keyspace_id),
            name: message.name,
            epoch: Epoch(message.epoch),
            copies: message.copies,
            // Processes before protocol version 5 do not resize.
            shard_count: if message.shard_count == 0 {
                count(shards.len())?
            } else {
                count(message.shard_count as usize)?
            },
            operation: message.operation.map(operation).transpose()?,
            shards,
            // Processes before protocol version 2 do not know them.
            settings: message.settings.map(Settings::try_from).transpose()?.unwrap_or_default(),
            dropped: message.dropped,
        };
        record.validate()?;
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::settings::Fsync;

    #[test]
    fn a_record_round_trips_and_a_bad_one_is_refused() {
        let record = KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(7), StoreId(9)]).unwrap();
        let message = pb::KeyspaceRecord::from(&record);
        assert_eq!(KeyspaceRecord::try_from(message.clone()), Ok(record.clone()));
        assert_eq!(record.shards_of(StoreId(9)).map(|(shard, _)| shard).collect::<Vec<_>>(), [ShardId(1)]);
        let older = pb::KeyspaceRecord { settings: None, ..message.clone() };
        assert_eq!(KeyspaceRecord::try_from(older), Ok(record.clone()));
        let altered = record.with_settings(Settings { fsync: Some(Fsync::Always), ..Settings::default() });
        assert_eq!((altered.epoch, altered.shards.clone()), (Epoch(2), record.shards.clone()));
        assert_eq!(KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&altered)), Ok(altered.clone()));
        let dropped = altered.as_dropped();
        assert_eq!(KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&dropped)), Ok(dropped.clone()));
        assert_eq!((dropped.shards_of(StoreId(9)).count(), altered.shards_of(StoreId(9)).count()), (0, 1));
        // It wins over a change that its maker has not heard of, and two who drop it agree.
        assert!(record.as_dropped().epoch > altered.epoch);
        assert!(!record.as_dropped().contradicts(&KeyspaceRecord { copies: 2, ..record.as_dropped() }));
        assert!(record.contradicts(&KeyspaceRecord { copies: 2, ..record.clone() }));
        let mut copied = record.clone();
        copied.copies = 3;
        copied.shards[0].replicas = vec![StoreId(8), StoreId(9)];
        copied.shards[0].learners = vec![StoreId(4)];
        copied.shards[0].previous = StoreId(8);
        copied.shards[0].witnesses = vec![StoreId(4)];
        assert_eq!(KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&copied)), Ok(copied.clone()));
        let empty = pb::KeyspaceRecord { shards: Vec::new(), ..message };
        assert_eq!(KeyspaceRecord::try_from(empty), Err(RecordError::ShardCount(0)));
        assert!(KeyspaceRecord::new(KeyspaceId(1), "no spaces", &[StoreId(1)]).is_err());
    }

    #[test]
    fn a_shard_that_cannot_be_is_refused() {
        let good = ShardRecord {
            learners: vec![StoreId(4)],
            previous: StoreId(2),
            witnesses: vec![StoreId(4), StoreId(3)],
            ..ShardRecord::new(Epoch(5), StoreId(1), vec![StoreId(2), StoreId(3)])
        };
        let fault = |change: fn(&mut ShardRecord)| {
            let mut shard = good.clone();
            change(&mut shard);
            let mut record = KeyspaceRecord::new(KeyspaceId(1), "a", &[StoreId(1), StoreId(2)]).unwrap();
            record.shards[1] = shard;
            let dropped = record.as_dropped();
            assert_eq!(KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&dropped)), Ok(dropped));
            KeyspaceRecord::try_from(pb::KeyspaceRecord::from(&record)).err().map(|error| error.to_string())
        };
        assert_eq!(fault(|_| {}), None);
        assert_eq!(fault(|shard| shard.primary = NOBODY), None, "a vacant shard");
        let refused = |change, text: &str| assert_eq!(fault(change), Some(format!("shard 1 {text}")));
        refused(|shard| shard.replicas[0] = StoreId(1), "names a store twice");
        refused(|shard| shard.learners = vec![StoreId(3)], "names a store twice");
        refused(|shard| shard.learners = (10..80).map(StoreId).collect(), "has more than 64 copies");
        refused(|shard| *shard = ShardRecord::new(Epoch(5), NOBODY, Vec::new()), "has no copy");
        refused(|shard| shard.replicas[1] = NOBODY, "has a copy on store 0, which does not exist");
        refused(|shard| shard.previous = StoreId(1), "goes from a store to the same store");
        refused(|shard| shard.witnesses = vec![StoreId(9)], "has a witness without a copy");
        let many = KeyspaceRecord { copies: 65, ..KeyspaceRecord::new(KeyspaceId(1), "a", &[StoreId(1)]).unwrap() };
        assert_eq!(many.validate().unwrap_err().to_string(), "a shard has 1 to 64 copies, not 65");
    }
}
