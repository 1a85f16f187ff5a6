//! Decides what becomes of the wish to create, alter or drop a keyspace. Pure: what the master knows in, the record to make out.
//!
//! A dropped keyspace stays as a record, so that no store that was away brings it back.

use std::collections::BTreeSet;

use thiserror::Error;
use vasto_proto::id::{KeyspaceId, ShardId, StoreId};
use vasto_proto::slot::{SHARD_COUNT_MAX, splitmix64};
use vasto_proto::topology::{KeyspaceRecord, NOBODY, RecordError, Settings, ShardRecord, validate_name};

use crate::place::{self, Candidate, TooFewStores};
use crate::state::{Alteration, FIRST_KEYSPACE, StoreList};

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
    /// Known stores whose version knows nothing of dropped keyspaces.
    pub older: BTreeSet<StoreId>,
    /// Known stores whose version knows nothing of copies.
    pub without_copies: BTreeSet<StoreId>,
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
    #[error("MIN-REPLICAS {min_replicas} needs COPIES of more than that, not {copies}; nothing was changed")]
    MinReplicas { min_replicas: u32, copies: u32 },
    #[error("{0}; nothing was changed")]
    TooFewStores(#[from] TooFewStores),
    #[error("stores {0} run an older version that knows nothing of copies; nothing was changed")]
    StoresWithoutCopies(StoreList),
    #[error("shard {shard} of keyspace {name} is getting another primary; nothing was changed")]
    NoPrimary { name: String, shard: ShardId },
    #[error("there are {KEYSPACES_MAX} keyspaces, and no more are possible; nothing was created")]
    TooMany,
    #[error("stores {0} run an older version that knows nothing of dropped keyspaces; nothing was changed")]
    StoresOlder(StoreList),
    #[error("there is no keyspace 0 yet; nothing was created")]
    NotBootstrapped,
    #[error("keyspace 0 is where every connection begins, it cannot be dropped; FLUSHDB empties it")]
    First,
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
    require_replicas(&creation.settings, creation.copies)?;
    if view.living().count() >= KEYSPACES_MAX {
        return Err(KeyspaceError::TooMany);
    }
    view.require_new_stores()?;
    let placed = place::place(shards, creation.copies as usize, &view.up)?;
    view.require_copies(creation.copies)?;
    let primaries: Vec<StoreId> = placed.iter().filter_map(|copies| copies.first().copied()).collect();
    let highest = view.records.iter().map(|record| record.id.0).max().unwrap_or_default();
    let chance = name.bytes().fold(view.moment, |sum, byte| splitmix64(sum ^ u64::from(byte)));
    let id = KeyspaceId(highest + 1 + (chance % ID_STEP_MAX) as u32);
    let mut record = KeyspaceRecord::new(id, name, &primaries)?;
    record.settings = creation.settings.clone();
    record.copies = creation.copies;
    // There is nothing yet that they could lack.
    for (shard, copies) in record.shards.iter_mut().zip(placed) {
        shard.replicas = copies.into_iter().skip(1).collect();
    }
    record.validate()?;
    Ok(Decision::Make(record))
}

/// The next version of a record with what is to be changed; `None`: it says so already. Copies come and go later, one after the other.
pub fn alter(
    view: &View<'_>,
    record: &KeyspaceRecord,
    alteration: &Alteration,
) -> Result<Option<KeyspaceRecord>, KeyspaceError> {
    let copies = alteration.copies.unwrap_or(record.copies);
    let settings = record.settings.changed_by(&alteration.changes);
    if settings == record.settings && copies == record.copies {
        return Ok(None);
    }
    // Who is chosen depends on what the copies have promised each other until then.
    let is_settled = |shard: &ShardRecord| !shard.is_vacant() && shard.previous == NOBODY;
    if let Some(shard) = record.shards.iter().position(|shard| !is_settled(shard)) {
        return Err(KeyspaceError::NoPrimary { name: record.name.clone(), shard: ShardId(shard as u16) });
    }
    require_replicas(&settings, copies)?;
    if copies > record.copies {
        if copies as usize > view.up.len() {
            return Err(TooFewStores { copies: copies as usize, up: view.up.len() }.into());
        }
        view.require_copies(copies)?;
    }
    let before = record.settings.min_replicas();
    let mut next = KeyspaceRecord { copies, ..record.with_settings(settings) };
    let after = next.settings.min_replicas();
    for shard in next.shards.iter_mut().filter(|_| after > before.max(1)) {
        // What was acknowledged may be on fewer of them than it says now: each must be heard until the primary has shown otherwise. While one
        // must have it, all must be heard anyway.
        let more: Vec<StoreId> =
            shard.replicas.iter().filter(|store| !shard.witnesses.contains(store)).copied().collect();
        shard.witnesses.extend(more);
    }
    next.validate()?;
    Ok(Some(next))
}

/// Whether as many replicas can acknowledge as must.
fn require_replicas(settings: &Settings, copies: u32) -> Result<(), KeyspaceError> {
    let min_replicas = settings.min_replicas();
    if min_replicas >= copies.max(1) {
        return Err(KeyspaceError::MinReplicas { min_replicas, copies });
    }
    Ok(())
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
    view.require_new_stores()?;
    Ok(Decision::Make(record.as_dropped()))
}

impl View<'_> {
    fn living(&self) -> impl Iterator<Item = &KeyspaceRecord> {
        self.records.iter().copied().filter(|record| !record.dropped)
    }

    /// Every store keeps every record: an older one would keep it without what it says of copies.
    fn require_copies(&self, copies: u32) -> Result<(), KeyspaceError> {
        if copies > 1 && !self.without_copies.is_empty() {
            return Err(KeyspaceError::StoresWithoutCopies(StoreList(self.without_copies.clone())));
        }
        Ok(())
    }

    fn require_new_stores(&self) -> Result<(), KeyspaceError> {
        if !self.older.is_empty() {
            return Err(KeyspaceError::StoresOlder(StoreList(self.older.clone())));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::id::Epoch;

    fn candidate(id: u32) -> Candidate {
        Candidate { id: StoreId(id), free_disk_bytes: 1 << 40, ..Candidate::default() }
    }

    fn view<'a>(records: &'a [KeyspaceRecord], up: &[u32]) -> View<'a> {
        View {
            records: records.iter().collect(),
            published: records.iter().map(|record| record.id).collect(),
            up: up.iter().map(|id| candidate(*id)).collect(),
            older: BTreeSet::new(),
            without_copies: BTreeSet::new(),
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
        let record = made(create(&view(&records, &[1, 2, 3]), &creation("a", Some(4))));
        assert!(record.id.0 > 0);
        let mut primaries: Vec<u32> = record.shards.iter().map(|shard| shard.primary.0).collect();
        primaries.sort_unstable();
        assert_eq!(primaries, [1, 1, 2, 3]);
        // As many shards as keyspace 0, if nobody says.
        assert_eq!(made(create(&view(&records, &[1, 2, 3]), &creation("1", None))).shards.len(), 3);
        // The id of a dropped one is not used again, its name may be.
        let records = [first(), record.as_dropped()];
        let again = made(create(&view(&records, &[1, 2, 3]), &creation("a", Some(4))));
        assert!(again.id > record.id && again.epoch == Epoch(1));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        let record = KeyspaceRecord::new(KeyspaceId(9), "a", &[StoreId(1)]).unwrap();
        let records = [first(), record.clone()];
        let all = view(&records, &[1, 2, 3]);
        let few = view(&records, &[1]);
        let refused = |decision: Result<Decision, KeyspaceError>| decision.unwrap_err().to_string();
        assert_eq!(refused(create(&all, &creation("a", Some(1)))), "keyspace a exists already; nothing was changed");
        assert_eq!(refused(create(&all, &creation("b", Some(0)))), "a keyspace needs 1 to 1024 shards, not 0");
        assert_eq!(refused(create(&all, &creation("b", Some(70_000)))), "a keyspace needs 1 to 1024 shards, not 70000");
        assert!(refused(create(&all, &creation("a b", Some(1)))).starts_with("keyspace name \"a b\" is empty, longer"));
        let copies = Creation { copies: 4, ..creation("b", Some(1)) };
        let text = "4 copies of a shard need 4 stores, and 3 are up; nothing was changed";
        assert_eq!(refused(create(&all, &copies)), text);
        let settings = Settings { min_replicas: Some(2), ..Settings::default() };
        let replicas = Creation { copies: 2, settings, ..creation("b", Some(1)) };
        let text = "MIN-REPLICAS 2 needs COPIES of more than that, not 2; nothing was changed";
        assert_eq!(refused(create(&all, &replicas)), text);
        let older = View { without_copies: [StoreId(3)].into(), ..view(&records, &[1, 2, 3]) };
        let text = "stores 00000003 run an older version that knows nothing of copies; nothing was changed";
        assert_eq!(refused(create(&older, &Creation { copies: 2, ..creation("b", Some(1)) })), text);
        assert!(create(&older, &creation("b", Some(1))).is_ok());
        assert_eq!(refused(drop(&all, "b")), "no such keyspace 'b'");
        assert!(refused(drop(&all, "0")).starts_with("keyspace 0 is where every connection begins"));
        let older = View { older: [StoreId(2)].into(), ..view(&records, &[1, 2, 3]) };
        assert!(refused(drop(&older, "a")).starts_with("stores 00000002 run an older version"));
        assert_eq!(
            refused(create(&view(&[], &[1]), &creation("b", None))),
            "there is no keyspace 0 yet; nothing was created"
        );
        // One that may be there is found, also while it is being made.
        let may_exist = Creation { may_exist: true, ..creation("a", None) };
        assert_eq!(create(&few, &may_exist), Ok(Decision::Holds(record.clone())));
        let unpublished = View { published: [FIRST_KEYSPACE].into(), ..view(&records, &[1, 2, 3]) };
        assert_eq!(create(&unpublished, &may_exist), Ok(Decision::UnderWay(record.clone())));
    }

    #[test]
    fn a_new_keyspace_has_its_replicas_from_the_start() {
        let records = [first()];
        let wanted = Creation { copies: 3, ..creation("a", Some(5)) };
        let record = made(create(&view(&records, &[1, 2, 3, 4]), &wanted));
        assert_eq!(record.copies, 3);
        assert!(record.shards.iter().all(|shard| shard.replicas.len() == 2 && shard.learners.is_empty()));
        let count = |store| record.copies_of(StoreId(store)).count();
        assert_eq!((1..=4).map(count).collect::<Vec<_>>(), [4, 4, 4, 3]);
    }

    #[test]
    fn copies_and_what_they_promise_are_altered() {
        let mut record = KeyspaceRecord::new(KeyspaceId(9), "a", &[StoreId(1)]).unwrap();
        record.copies = 3;
        record.shards[0].replicas = vec![StoreId(2), StoreId(3)];
        let records = [first()];
        let change = |record: &KeyspaceRecord, copies: Option<u32>, min_replicas: Option<u32>| {
            let changes = Settings { min_replicas, ..Settings::default() };
            let alteration = Alteration { name: "a".to_owned(), changes, copies, expected_epoch: None };
            alter(&view(&records, &[1, 2, 3]), record, &alteration)
        };
        let text = |result: Result<_, KeyspaceError>| result.map_err(|error| error.to_string());
        assert_eq!(change(&record, Some(3), None), Ok(None));
        let two = change(&record, Some(2), Some(1)).unwrap().unwrap();
        assert_eq!((two.epoch, two.copies, two.settings.min_replicas()), (Epoch(2), 2, 1));
        assert_eq!(two.shards, record.shards, "the copies go later");
        // One more that must have everything: until it is so, each is heard.
        let raised = change(&change(&record, None, Some(1)).unwrap().unwrap(), None, Some(2)).unwrap().unwrap();
        assert_eq!(raised.shards[0].witnesses, [StoreId(2), StoreId(3)]);
        assert_eq!(change(&raised, None, Some(1)).unwrap().unwrap().shards, raised.shards);
        let few = "4 copies of a shard need 4 stores, and 3 are up; nothing was changed";
        assert_eq!(text(change(&record, Some(4), None)), Err(few.to_owned()));
        let promised = "MIN-REPLICAS 1 needs COPIES of more than that, not 1; nothing was changed";
        assert_eq!(text(change(&two, Some(1), None)), Err(promised.to_owned()));
        let mut vacant = record.clone();
        vacant.shards[0] = ShardRecord::new(Epoch(2), NOBODY, vec![StoreId(2), StoreId(3), StoreId(1)]);
        let busy = "shard 0 of keyspace a is getting another primary; nothing was changed";
        assert_eq!(text(change(&vacant, None, Some(1))), Err(busy.to_owned()));
    }

    #[test]
    fn a_keyspace_is_dropped_once_and_may_be_asked_for_again() {
        let record = KeyspaceRecord::new(KeyspaceId(9), "a", &[StoreId(1)]).unwrap();
        let records = [first(), record.clone()];
        let dropped = made(drop(&view(&records, &[1, 2]), "a"));
        assert_eq!(dropped, record.as_dropped());
        let records = [first(), dropped.clone()];
        let gone = view(&records, &[1, 2]);
        assert_eq!(drop(&gone, "a"), Err(KeyspaceError::NoSuchKeyspace("a".to_owned())));
        let half = View { published: [FIRST_KEYSPACE].into(), ..view(&records, &[1]) };
        assert_eq!(drop(&half, "a"), Ok(Decision::UnderWay(dropped)));
    }
}
