//! Decides what becomes of the wish to create or drop a keyspace. Pure: what the master knows in, the record to make out.
//!
//! Both need more than half of the known stores to be up, and hold when more than half keep them: two masters, one after the other, then
//! cannot miss each other's decisions. A dropped keyspace stays as a record, so that no store that was away brings it back.

use std::collections::BTreeSet;

use thiserror::Error;
use vasto_proto::id::{Epoch, KeyspaceId, StoreId};
use vasto_proto::slot::{SHARD_COUNT_MAX, splitmix64};
use vasto_proto::topology::{KeyspaceRecord, RecordError, Settings, validate_name};

use crate::place::{self, Candidate, TooFewStores};
use crate::state::{FIRST_KEYSPACE, StoreList};

/// Keyspaces at one time. Each is a database a shard in its stores, with some files, memory and a log of its own.
const KEYSPACES_MAX: usize = 1000;

/// A new id lies up to so far above the highest one. A master that died may have given the next id to a keyspace that it could not finish and
/// that is on one absent store; ours is most likely another.
const ID_STEP_MAX: u64 = 1024;

/// A keyspace that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    pub name: String,
    /// `None`: as many as keyspace `0` has.
    pub shards: Option<u32>,
    pub copies: u32,
    pub settings: Settings,
    /// One of this name that is there is no error.
    pub may_exist: bool,
}

/// What the master knows when it decides.
#[derive(Debug)]
pub struct View<'a> {
    /// The newest version of each record.
    pub records: Vec<&'a KeyspaceRecord>,
    /// Those of them that gateways may know.
    pub published: BTreeSet<KeyspaceId>,
    pub up: Vec<Candidate>,
    pub known: BTreeSet<StoreId>,
    /// Known stores whose version knows nothing of dropped keyspaces.
    pub older: BTreeSet<StoreId>,
    /// Differs from one decision to the next.
    pub moment: u64,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is so already.
    Holds(KeyspaceRecord),
    /// It was decided before and is not confirmed yet.
    UnderWay(KeyspaceRecord),
    Make(KeyspaceRecord),
}

/// Why a keyspace is not created or dropped. Nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum KeyspaceError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("keyspace {0} exists already; nothing was changed")]
    Exists(String),
    #[error("no such keyspace '{0}'")]
    NoSuchKeyspace(String),
    #[error("a shard has one copy so far, not {0}: copies on other stores do not exist yet; nothing was created")]
    Copies(u32),
    #[error("{0}; nothing was created")]
    TooFewStores(#[from] TooFewStores),
    #[error("there are {KEYSPACES_MAX} keyspaces, and no more are possible; nothing was created")]
    TooMany,
    #[error(
        "{up} of {known} known stores are up, and it takes more than half of them to be sure of all keyspaces; stores {down} are down; \
         nothing was changed"
    )]
    NoMajority { up: usize, known: usize, down: StoreList },
    #[error("stores {0} run an older version that knows nothing of dropped keyspaces; nothing was changed")]
    StoresOlder(StoreList),
    #[error("there is no keyspace 0 yet; nothing was created")]
    NotBootstrapped,
    #[error("keyspace 0 is where every connection begins, it cannot be dropped; FLUSHDB empties it")]
    First,
}

/// Whether a version of a record goes to all stores before it is confirmed, and needs more than half of them. That a keyspace exists and
/// that it is no more cannot contradict what another master says; any other change could.
pub fn concerns_all(record: &KeyspaceRecord) -> bool {
    record.dropped || record.id != FIRST_KEYSPACE && record.epoch == Epoch(1)
}

pub fn create(view: &View<'_>, creation: &Creation) -> Result<Decision, KeyspaceError> {
    let name = &creation.name;
    validate_name(name)?;
    if let Some(record) = view.living().find(|record| record.name == *name) {
        return match (creation.may_exist, view.published.contains(&record.id)) {
            (true, true) => Ok(Decision::Holds(record.clone())),
            (true, false) => Ok(Decision::UnderWay(record.clone())),
            (false, _) => Err(KeyspaceError::Exists(name.clone())),
        };
    }
    let Some(first) = view.living().find(|record| record.id == FIRST_KEYSPACE) else {
        return Err(KeyspaceError::NotBootstrapped);
    };
    let shards = creation.shards.unwrap_or_else(|| u32::from(first.shard_count()));
    let Some(shards) = u16::try_from(shards).ok().filter(|shards| (1..=SHARD_COUNT_MAX).contains(shards)) else {
        return Err(RecordError::ShardCount(shards as usize).into());
    };
    if creation.copies > 1 {
        return Err(KeyspaceError::Copies(creation.copies));
    }
    if view.living().count() >= KEYSPACES_MAX {
        return Err(KeyspaceError::TooMany);
    }
    view.require_quorum()?;
    let placed = place::place(shards, 1, &view.up)?;
    let primaries: Vec<StoreId> = placed.iter().filter_map(|copies| copies.first().copied()).collect();
    let highest = view.records.iter().map(|record| record.id.0).max().unwrap_or_default();
    let chance = name.bytes().fold(view.moment, |sum, byte| splitmix64(sum ^ u64::from(byte)));
    let id = KeyspaceId(highest + 1 + (chance % ID_STEP_MAX) as u32);
    let record = KeyspaceRecord::new(id, name, &primaries)?;
    Ok(Decision::Make(KeyspaceRecord { settings: creation.settings.clone(), ..record }))
}

pub fn drop(view: &View<'_>, name: &str) -> Result<Decision, KeyspaceError> {
    let Some(record) = view.living().find(|record| record.name == *name) else {
        let half_dropped =
            |record: &&&KeyspaceRecord| record.dropped && record.name == *name && !view.published.contains(&record.id);
        return match view.records.iter().find(half_dropped) {
            Some(record) => Ok(Decision::UnderWay((*record).clone())),
            None => Err(KeyspaceError::NoSuchKeyspace(name.to_owned())),
        };
    };
    if record.id == FIRST_KEYSPACE {
        return Err(KeyspaceError::First);
    }
    view.require_quorum()?;
    Ok(Decision::Make(record.as_dropped()))
}

impl View<'_> {
    fn living(&self) -> impl Iterator<Item = &KeyspaceRecord> {
        self.records.iter().copied().filter(|record| !record.dropped)
    }

    fn require_quorum(&self) -> Result<(), KeyspaceError> {
        let up: BTreeSet<StoreId> = self.up.iter().map(|candidate| candidate.id).collect();
        if up.len() * 2 <= self.known.len() {
            let down = StoreList(self.known.difference(&up).copied().collect());
            return Err(KeyspaceError::NoMajority { up: up.len(), known: self.known.len(), down });
        }
        if !self.older.is_empty() {
            return Err(KeyspaceError::StoresOlder(StoreList(self.older.clone())));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(id: u32) -> Candidate {
        Candidate { id: StoreId(id), free_disk_bytes: 1 << 40, ..Candidate::default() }
    }

    fn view<'a>(records: &'a [KeyspaceRecord], up: &[u32], known: u32) -> View<'a> {
        View {
            records: records.iter().collect(),
            published: records.iter().map(|record| record.id).collect(),
            up: up.iter().map(|id| candidate(*id)).collect(),
            known: (1..=known).map(StoreId).collect(),
            older: BTreeSet::new(),
            moment: 1,
        }
    }

    fn first() -> KeyspaceRecord {
        KeyspaceRecord::new(FIRST_KEYSPACE, "0", &[StoreId(1), StoreId(2), StoreId(3)]).unwrap()
    }

    fn creation(name: &str, shards: Option<u32>) -> Creation {
        Creation { name: name.to_owned(), shards, copies: 1, settings: Settings::default(), may_exist: false }
    }

    fn made(decision: Result<Decision, KeyspaceError>) -> KeyspaceRecord {
        match decision {
            Ok(Decision::Make(record)) => record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_new_keyspace_has_a_new_id_and_its_shards_go_round() {
        let records = [first()];
        let record = made(create(&view(&records, &[1, 2, 3], 3), &creation("a", Some(4))));
        assert!(record.id.0 > 0);
        let mut primaries: Vec<u32> = record.shards.iter().map(|shard| shard.primary.0).collect();
        primaries.sort_unstable();
        assert_eq!(primaries, [1, 1, 2, 3]);
        // As many shards as keyspace 0, if nobody says.
        assert_eq!(made(create(&view(&records, &[1, 2, 3], 3), &creation("1", None))).shards.len(), 3);
        // The id of a dropped one is not used again, its name may be.
        let records = [first(), record.as_dropped()];
        let again = made(create(&view(&records, &[1, 2, 3], 3), &creation("a", Some(4))));
        assert!(again.id > record.id && again.epoch == Epoch(1));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        let record = KeyspaceRecord::new(KeyspaceId(9), "a", &[StoreId(1)]).unwrap();
        let records = [first(), record.clone()];
        let all = view(&records, &[1, 2, 3], 3);
        let few = view(&records, &[1], 3);
        let refused = |decision: Result<Decision, KeyspaceError>| decision.unwrap_err().to_string();
        assert_eq!(refused(create(&all, &creation("a", Some(1)))), "keyspace a exists already; nothing was changed");
        assert_eq!(refused(create(&all, &creation("b", Some(0)))), "a keyspace needs 1 to 1024 shards, not 0");
        assert_eq!(refused(create(&all, &creation("b", Some(70_000)))), "a keyspace needs 1 to 1024 shards, not 70000");
        assert!(refused(create(&all, &creation("a b", Some(1)))).starts_with("keyspace name \"a b\" is empty, longer"));
        let copies = Creation { copies: 2, ..creation("b", Some(1)) };
        assert!(refused(create(&all, &copies)).starts_with("a shard has one copy so far, not 2"));
        let text = "1 of 3 known stores are up, and it takes more than half of them to be sure of all keyspaces; \
                    stores 00000002,00000003 are down; nothing was changed";
        assert_eq!(refused(create(&few, &creation("b", Some(1)))), text);
        assert_eq!(refused(drop(&few, "a")), text);
        assert_eq!(refused(drop(&all, "b")), "no such keyspace 'b'");
        assert!(refused(drop(&all, "0")).starts_with("keyspace 0 is where every connection begins"));
        let older = View { older: [StoreId(2)].into(), ..view(&records, &[1, 2, 3], 3) };
        assert!(refused(drop(&older, "a")).starts_with("stores 00000002 run an older version"));
        assert_eq!(
            refused(create(&view(&[], &[1], 1), &creation("b", None))),
            "there is no keyspace 0 yet; nothing was created"
        );
        // One that may be there is found, also while it is being made.
        let may_exist = Creation { may_exist: true, ..creation("a", None) };
        assert_eq!(create(&few, &may_exist), Ok(Decision::Holds(record.clone())));
        let unpublished = View { published: [FIRST_KEYSPACE].into(), ..view(&records, &[1, 2, 3], 3) };
        assert_eq!(create(&unpublished, &may_exist), Ok(Decision::UnderWay(record.clone())));
    }

    #[test]
    fn a_keyspace_is_dropped_once_and_may_be_asked_for_again() {
        let record = KeyspaceRecord::new(KeyspaceId(9), "a", &[StoreId(1)]).unwrap();
        let records = [first(), record.clone()];
        let dropped = made(drop(&view(&records, &[1, 2], 3), "a"));
        assert_eq!(dropped, record.as_dropped());
        let records = [first(), dropped.clone()];
        let gone = view(&records, &[1, 2], 3);
        assert_eq!(drop(&gone, "a"), Err(KeyspaceError::NoSuchKeyspace("a".to_owned())));
        let half = View { published: [FIRST_KEYSPACE].into(), ..view(&records, &[1], 3) };
        assert_eq!(drop(&half, "a"), Ok(Decision::UnderWay(dropped)));
    }
}
