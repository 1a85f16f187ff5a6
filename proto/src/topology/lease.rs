//! Leases: the right of a primary to serve a shard for a while, granted by a majority of the holders. No clock and no I/O: every time is
//! given, and is one of the clock of whoever decides.
//!
//! No two stores hold a lease of one shard at one moment, because
//! - a primary counts its lease from before it asked, and a holder's grant, which came after that, excludes others for a fifth longer: so
//!   much may the rates of two clocks differ (9 % each from the truth);
//! - the majorities of two primaries share a holder. It gives what it gave to one store to no other before the time is over or the lease is
//!   given back, and a holder that has forgotten what it gave gives nothing for as long;
//! - majorities of two versions of the group may share none. But a version counts when a majority of the one before has accepted it, and
//!   from then on refuses to grant under the old one. Whoever holds no lease waits after hearing of a new version until those of the old
//!   one are over.
//!
//! A new primary therefore comes to serve as soon as a majority of the holders has accepted its record and the old one's grants are over.

use super::peers::HolderGroup;
use super::record::{KeyspaceRecord, NOBODY, ShardRecord};
use super::settings::Settings;
use crate::id::{Epoch, ShardKey, StoreId};
use std::collections::BTreeMap;
use thiserror::Error;

/// How long a lease holds, from before it was asked for.
pub const LEASE_NS: u64 = 1_500_000_000;
/// How long a grant excludes others, from when it was given: a fifth longer.
pub const GRANT_NS: u64 = LEASE_NS / 5 * 6;

/// Whether a primary may serve a shard only with a lease: without copies nobody could take its place, and `STRICT no` gives it up.
pub fn is_needed(settings: &Settings, shard: &ShardRecord) -> bool {
    settings.strict() && !(shard.replicas.is_empty() && shard.learners.is_empty())
}

/// What a primary asks a holder for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub store: StoreId,
    pub shard: ShardKey,
    pub epoch: Epoch,
    /// Drawn by the store whenever it begins to ask for a shard: what it gives back is what it was granted under this number, even if
    /// the message comes late.
    pub tenure: u64,
    /// The version of the holder group that the store knows.
    pub group_version: u64,
}

/// Why a holder does not grant a lease; the text follows the name of the holder.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    #[error("knows no such keyspace")]
    NoRecord,
    #[error("knows that the keyspace was dropped")]
    Dropped,
    #[error("knows epoch {0}, at which nobody is primary")]
    Vacant(Epoch),
    #[error("knows epoch {epoch}, at which store {primary} is primary")]
    OtherPrimary { epoch: Epoch, primary: StoreId },
    #[error("knows epoch {0}")]
    OtherEpoch(Epoch),
    #[error("knows version {0} of the group of holders")]
    NewerGroup(u64),
    #[error("has started and grants nothing for another {} ms", .left_ns.div_ceil(1_000_000))]
    Started { left_ns: u64 },
    #[error("has granted it to store {to} for another {} ms", .left_ns.div_ceil(1_000_000))]
    Granted { to: StoreId, left_ns: u64 },
    #[error("was given it back")]
    Released,
}

/// What a holder has granted.
#[derive(Clone, Debug)]
pub struct Grants {
    started_ns: u64,
    /// Those that may not be over yet. Several of one shard: to one store in several tenures, or given back.
    by_shard: BTreeMap<ShardKey, Vec<Grant>>,
    /// The highest epoch granted. The newest record may go back: what a master of an earlier term had proposed and nobody chose is overruled.
    highest: BTreeMap<ShardKey, Epoch>,
}

#[derive(Clone, Copy, Debug)]
struct Grant {
    store: StoreId,
    epoch: Epoch,
    tenure: u64,
    granted_ns: u64,
    released: bool,
}

impl Grant {
    fn is_of(&self, asked: &Asked) -> bool {
        (self.store, self.epoch, self.tenure) == (asked.store, asked.epoch, asked.tenure)
    }
}

/// The rest of a grant's time.
fn left_ns(since_ns: u64, now_ns: u64) -> u64 {
    GRANT_NS.saturating_sub(now_ns.saturating_sub(since_ns))
}

impl Grants {
    /// Of a holder that starts now: what it has granted before is forgotten.
    pub fn new(now_ns: u64) -> Self {
        Self { started_ns: now_ns, by_shard: BTreeMap::new(), highest: BTreeMap::new() }
    }

    /// Grants what is asked for, or says why not. `newest` is the newest record of the keyspace that the holder has accepted or knows,
    /// and `group_version` the newest version of the group.
    pub fn answer(
        &mut self,
        asked: &Asked,
        newest: Option<&KeyspaceRecord>,
        group_version: u64,
        now_ns: u64,
    ) -> Result<(), Refusal> {
        let record = newest.ok_or(Refusal::NoRecord)?;
        if record.dropped {
            return Err(Refusal::Dropped);
        }
        let shard = record.shards.get(usize::from(asked.shard.shard.0)).ok_or(Refusal::NoRecord)?;
        match shard.primary {
            NOBODY => return Err(Refusal::Vacant(shard.epoch)),
            primary if primary != asked.store => return Err(Refusal::OtherPrimary { epoch: shard.epoch, primary }),
            _ if shard.epoch != asked.epoch => return Err(Refusal::OtherEpoch(shard.epoch)),
            _ => {}
        }
        if let Some(highest) = self.highest.get(&asked.shard).filter(|highest| **highest > asked.epoch) {
            return Err(Refusal::OtherEpoch(*highest));
        }
        if group_version > asked.group_version {
            return Err(Refusal::NewerGroup(group_version));
        }
        let left = left_ns(self.started_ns, now_ns);
        if left > 0 {
            return Err(Refusal::Started { left_ns: left });
        }
        let grants = self.by_shard.entry(asked.shard).or_default();
        grants.retain(|grant| left_ns(grant.granted_ns, now_ns) > 0);
        if let Some(other) = grants.iter().find(|grant| !grant.released && grant.store != asked.store) {
            return Err(Refusal::Granted { to: other.store, left_ns: left_ns(other.granted_ns, now_ns) });
        }
        self.highest.insert(asked.shard, asked.epoch);
        match grants.iter_mut().find(|grant| grant.is_of(asked)) {
            // This was asked before and comes late.
            Some(own) if own.released => return Err(Refusal::Released),
            Some(own) => own.granted_ns = now_ns,
            None => {
                let Asked { store, epoch, tenure, .. } = *asked;
                grants.push(Grant { store, epoch, tenure, granted_ns: now_ns, released: false });
            }
        }
        Ok(())
    }

    /// A primary gives back what it was granted in one tenure; it does not serve any more.
    pub fn release(&mut self, asked: &Asked) {
        for grant in self.by_shard.get_mut(&asked.shard).into_iter().flatten().filter(|grant| grant.is_of(asked)) {
            grant.released = true;
        }
    }

    /// Forgets what is over.
    pub fn prune(&mut self, now_ns: u64) {
        self.by_shard.retain(|_, grants| grants.iter().any(|grant| left_ns(grant.granted_ns, now_ns) > 0));
    }
}

/// The holder group as a primary knows it, and from when on it may get a lease under it that it does not hold yet.
#[derive(Clone, Debug, Default)]
pub struct KnownGroup {
    pub group: HolderGroup,
    usable_ns: u64,
}

impl KnownGroup {
    /// Heard of now, or by a process that starts now: it may have been new when the one before ended.
    pub fn new(group: HolderGroup, now_ns: u64) -> Self {
        // Nobody holds a lease of a version before the first.
        let usable_ns = if group.version <= 1 { 0 } else { now_ns + GRANT_NS };
        Self { group, usable_ns }
    }

    /// How long it may not be used yet for a lease that is not held.
    pub fn unusable_ns(&self, now_ns: u64) -> u64 {
        self.usable_ns.saturating_sub(now_ns)
    }
}

/// A primary's lease of one shard at one epoch.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    until_ns: u64,
    /// The version of the group to which `ends_ns` belongs.
    group_version: u64,
    /// Until when each holder's grant counts.
    ends_ns: BTreeMap<StoreId, u64>,
}

impl Lease {
    /// When it ends; 0 = it was never held.
    pub fn until_ns(&self) -> u64 {
        self.until_ns
    }

    pub fn is_held(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns
    }

    /// A holder has granted what it was asked for at `asked_ns`, under this version of the group.
    pub fn granted(&mut self, holder: StoreId, group_version: u64, asked_ns: u64, known: &KnownGroup, now_ns: u64) {
        if group_version != known.group.version {
            return;
        }
        if self.group_version != group_version {
            // What was granted under another version has its place in `until_ns`; it proves nothing under this one.
            self.ends_ns.clear();
            self.group_version = group_version;
        }
        let end_ns = self.ends_ns.entry(holder).or_default();
        *end_ns = (*end_ns).max(asked_ns + LEASE_NS);
        let mut ends: Vec<u64> = self.ends_of(known).collect();
        ends.sort_unstable_by_key(|end| std::cmp::Reverse(*end));
        let may_begin = known.unusable_ns(now_ns) == 0;
        if let Some(until_ns) = ends.get(known.group.quorum() - 1)
            && (may_begin || self.is_held(now_ns))
        {
            self.until_ns = self.until_ns.max(*until_ns);
        }
    }

    /// How many holders grant it now.
    pub fn holder_count(&self, known: &KnownGroup, now_ns: u64) -> usize {
        self.ends_of(known).filter(|end_ns| now_ns < *end_ns).count()
    }

    fn ends_of(&self, known: &KnownGroup) -> impl Iterator<Item = u64> {
        let is_same = self.group_version == known.group.version;
        let counts = move |holder: &StoreId| is_same && known.group.members.contains(holder);
        self.ends_ns.iter().filter(move |(holder, _)| counts(holder)).map(|(_, end_ns)| *end_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{KeyspaceId, ShardId};

    const SHARD: ShardKey = ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) };
    const FIRST: StoreId = StoreId(1);
    const SECOND: StoreId = StoreId(2);
    const MS: u64 = 1_000_000;

    fn record(epoch: u64, primary: StoreId) -> KeyspaceRecord {
        let mut record = KeyspaceRecord::new(KeyspaceId(0), "0", &[FIRST]).unwrap();
        record.shards[0].primary = primary;
        record.epoch = Epoch(epoch);
        record.shards[0].epoch = Epoch(epoch);
        record
    }

    fn asked(store: StoreId, epoch: u64, tenure: u64) -> Asked {
        Asked { store, shard: SHARD, epoch: Epoch(epoch), tenure, group_version: 1 }
    }

    #[test]
    fn a_lease_is_needed_where_somebody_could_take_over() {
        let strict = Settings::default();
        let lax = Settings { strict: Some(false), ..Settings::default() };
        let alone = ShardRecord::new(Epoch(1), FIRST, Vec::new());
        let copied = ShardRecord::new(Epoch(1), FIRST, vec![SECOND]);
        let learned = ShardRecord { learners: vec![SECOND], ..alone.clone() };
        assert!(is_needed(&strict, &copied) && is_needed(&strict, &learned));
        assert!(!is_needed(&strict, &alone) && !is_needed(&lax, &copied));
    }

    #[test]
    fn a_holder_grants_by_its_newest_record_and_to_one_store_at_a_time() {
        let mut grants = Grants::new(0);
        let (old, new) = (record(1, FIRST), record(2, SECOND));
        let ask = |grants: &mut Grants, asked: Asked, record: &KeyspaceRecord, now_ms: u64| {
            grants.answer(&asked, Some(record), 1, now_ms * MS)
        };
        let first = asked(FIRST, 1, 7);
        assert_eq!(ask(&mut grants, first, &old, 1799), Err(Refusal::Started { left_ns: MS }));
        assert_eq!(ask(&mut grants, first, &old, 1800), Ok(()));
        assert_eq!(ask(&mut grants, first, &old, 2300), Ok(()));
        let other = Refusal::OtherPrimary { epoch: Epoch(2), primary: SECOND };
        assert_eq!(ask(&mut grants, first, &new, 2400), Err(other));
        let second = asked(SECOND, 2, 8);
        assert_eq!(
            ask(&mut grants, second, &old, 2400),
            Err(Refusal::OtherPrimary { epoch: Epoch(1), primary: FIRST })
        );
        let held = Refusal::Granted { to: FIRST, left_ns: 1700 * MS };
        assert_eq!(ask(&mut grants, second, &new, 2400), Err(held));
        assert_eq!(ask(&mut grants, second, &new, 4100), Ok(()));
        assert_eq!(ask(&mut grants, asked(SECOND, 1, 8), &new, 4100), Err(Refusal::OtherEpoch(Epoch(2))));
        assert_eq!(ask(&mut grants, second, &record(3, NOBODY), 4100), Err(Refusal::Vacant(Epoch(3))));
        assert_eq!(ask(&mut grants, second, &new.as_dropped(), 4100), Err(Refusal::Dropped));
        assert_eq!(grants.answer(&second, None, 1, 4100 * MS), Err(Refusal::NoRecord));
        assert_eq!(grants.answer(&second, Some(&new), 2, 4100 * MS), Err(Refusal::NewerGroup(2)));
        grants.prune(5900 * MS);
        assert!(grants.by_shard.is_empty());
    }

    #[test]
    fn what_is_given_back_is_free_at_once_and_what_comes_late_changes_nothing() {
        let mut grants = Grants::new(0);
        let (old, new) = (record(1, FIRST), record(2, SECOND));
        let now = 5000 * MS;
        let (before, again) = (asked(FIRST, 1, 7), asked(FIRST, 1, 8));
        assert_eq!(grants.answer(&before, Some(&old), 1, now), Ok(()));
        // The store was restarted; what it gave back at its end comes after it has asked again.
        assert_eq!(grants.answer(&again, Some(&old), 1, now), Ok(()));
        grants.release(&before);
        assert_eq!(grants.answer(&before, Some(&old), 1, now), Err(Refusal::Released));
        let second = asked(SECOND, 2, 9);
        let held = Refusal::Granted { to: FIRST, left_ns: GRANT_NS };
        assert_eq!(grants.answer(&second, Some(&new), 1, now), Err(held));
        grants.release(&again);
        assert_eq!(grants.answer(&second, Some(&new), 1, now), Ok(()));
    }

    #[test]
    fn a_holder_does_not_go_back_to_an_earlier_epoch() {
        let mut grants = Grants::new(0);
        let (old, new) = (record(1, FIRST), record(2, SECOND));
        let now = 5000 * MS;
        let second = asked(SECOND, 2, 9);
        assert_eq!(grants.answer(&second, Some(&new), 1, now), Ok(()));
        grants.release(&second);
        // What it voted for then was overruled, and its newest record is the old one again.
        let refused = grants.answer(&asked(FIRST, 1, 7), Some(&old), 1, now);
        assert_eq!(refused, Err(Refusal::OtherEpoch(Epoch(2))));
    }

    fn group(version: u64, members: &[u32]) -> HolderGroup {
        HolderGroup { version, members: members.iter().copied().map(StoreId).collect() }
    }

    #[test]
    fn a_lease_holds_while_a_majority_grants_it_counted_from_asking() {
        let known = KnownGroup::new(group(1, &[1, 2, 3]), 0);
        let mut lease = Lease::default();
        lease.granted(StoreId(1), 1, 100 * MS, &known, 110 * MS);
        assert!(!lease.is_held(110 * MS));
        // Not one of the group.
        lease.granted(StoreId(9), 1, 100 * MS, &known, 110 * MS);
        assert!(!lease.is_held(110 * MS));
        lease.granted(StoreId(2), 1, 200 * MS, &known, 210 * MS);
        assert_eq!(lease.until_ns(), 1600 * MS);
        assert!(lease.is_held(1599 * MS) && !lease.is_held(1600 * MS));
        lease.granted(StoreId(3), 1, 300 * MS, &known, 310 * MS);
        assert_eq!((lease.until_ns(), lease.holder_count(&known, 1650 * MS)), (1700 * MS, 2));
        // The answer came back after the lease that it gives was over: a process that was stopped.
        lease.granted(StoreId(1), 1, 400 * MS, &known, 9000 * MS);
        assert!(!lease.is_held(9000 * MS));
    }

    #[test]
    fn a_holder_that_left_does_not_count_and_a_new_group_is_waited_for() {
        let first = KnownGroup::new(group(1, &[1, 2, 3]), 0);
        let mut lease = Lease::default();
        for holder in [1, 2] {
            lease.granted(StoreId(holder), 1, 0, &first, 10 * MS);
        }
        let second = KnownGroup::new(group(2, &[3, 4, 5]), 1000 * MS);
        let mut other = Lease::default();
        for lease in [&mut lease, &mut other] {
            lease.granted(StoreId(1), 2, 1000 * MS, &second, 1010 * MS);
            lease.granted(StoreId(3), 2, 1000 * MS, &second, 1010 * MS);
            // An answer to what was asked before the change.
            lease.granted(StoreId(4), 1, 1000 * MS, &second, 1010 * MS);
        }
        assert_eq!(lease.until_ns(), 1500 * MS, "store 1 is not in the group any more");
        for lease in [&mut lease, &mut other] {
            lease.granted(StoreId(4), 2, 1000 * MS, &second, 1010 * MS);
        }
        assert!(lease.is_held(2499 * MS), "whoever holds a lease goes on");
        assert!(!other.is_held(1010 * MS), "others wait until leases of the old group are over");
        other.granted(StoreId(3), 2, 2700 * MS, &second, 2799 * MS);
        other.granted(StoreId(4), 2, 2700 * MS, &second, 2799 * MS);
        assert!(!other.is_held(2799 * MS));
        other.granted(StoreId(4), 2, 2700 * MS, &second, 2800 * MS);
        assert_eq!(other.until_ns(), 4200 * MS);
    }
}
