//! Decides who holds copies of a shard beside its primary. Pure: one step at a time, by the record and what the master knows.
//!
//! A copy that is missing begins as a learner, and becomes a replica when the primary says that it is in sync: only then it counts for
//! acknowledgements. One that is too many stops counting first, and stays as a witness until the primary, which counts without it by then,
//! has enough other copies that have all that it had: it may be the only one that has something that was acknowledged.
//!
//! While a store is replaced its copies do not count as wished: others are made for them, and they go when those are in sync.

use std::cmp::Reverse;
use std::collections::HashMap;

use vasto_proto::id::{ShardKey, StoreId};
use vasto_proto::topology::{KeyspaceRecord, OperationKind, ShardRecord};

use crate::place::{self, Candidate, Site};
use crate::standing::{View, shards};

/// Copies of one keyspace that a store makes or gives at a time: each is read and sent as fast as disks and wires go.
const COPYING_MAX: usize = 4;

/// Between which stores copies of a keyspace change places; between none if no store is being replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    leaving: Option<StoreId>,
    coming: Option<StoreId>,
}

impl Exchange {
    pub fn of(record: &KeyspaceRecord) -> Self {
        match record.active_operation().map(|operation| operation.kind) {
            Some(OperationKind::Replace { store, with }) => Self { leaving: Some(store), coming: with },
            Some(OperationKind::Resize { .. }) | None => Self::default(),
        }
    }

    pub fn leaves(&self, store: StoreId) -> bool {
        self.leaving == Some(store)
    }

    /// Who gets the shard's copy on the store that leaves, if that was said; once it has it, others are for others.
    pub fn heir(&self, shard: &ShardRecord) -> Option<StoreId> {
        let is_due = shard.copies().any(|store| self.leaves(store));
        self.coming.filter(|store| is_due && !shard.copies().any(|copy| copy == *store))
    }

    /// The replica that leads in place of the store that leaves, if that was said.
    pub fn successor(&self, shard: &ShardRecord) -> Option<StoreId> {
        self.coming.filter(|store| shard.replicas.contains(store))
    }
}

/// What the steps of a record's shards have in common.
pub struct Copying<'a> {
    view: &'a View<'a>,
    exchange: Exchange,
    /// What was placed in this round counts.
    candidates: Vec<Candidate>,
    under_way: HashMap<StoreId, usize>,
}

impl<'a> Copying<'a> {
    pub fn new(record: &KeyspaceRecord, view: &'a View<'a>) -> Self {
        let exchange = Exchange::of(record);
        let able =
            view.stores.values().filter(|store| store.up && !store.older && !exchange.leaves(store.candidate.id));
        let candidates = able.map(|store| store.candidate.clone()).collect();
        let mut copying = Self { view, exchange, candidates, under_way: HashMap::new() };
        for (_, shard) in shards(record) {
            for learner in shard.learners.iter().filter(|learner| !shard.witnesses.contains(learner)) {
                if view.is_up(*learner) {
                    copying.count(shard.primary, *learner);
                }
            }
        }
        copying
    }

    fn count(&mut self, giver: StoreId, taker: StoreId) {
        *self.under_way.entry(giver).or_default() += 1;
        *self.under_way.entry(taker).or_default() += 1;
    }

    fn is_free(&self, store: StoreId) -> bool {
        self.under_way.get(&store).is_none_or(|count| *count < COPYING_MAX)
    }

    /// The next step of a shard that has a primary.
    pub fn step(&mut self, record: &KeyspaceRecord, key: ShardKey, shard: &ShardRecord) -> Option<ShardRecord> {
        self.step_without_more(record, key, shard).or_else(|| self.add(self.wanted(record, shard), shard))
    }

    /// The next step of a shard that has a primary and gets no more copies for now.
    pub fn step_without_more(
        &self,
        record: &KeyspaceRecord,
        key: ShardKey,
        shard: &ShardRecord,
    ) -> Option<ShardRecord> {
        let wanted = self.wanted(record, shard);
        let (view, exchange) = (self.view, self.exchange);
        settle(record, key, shard, view)
            .or_else(|| promote(wanted, key, shard, view, exchange))
            .or_else(|| forget_learner(wanted, key, shard, view, exchange))
            .or_else(|| demote(wanted, key, shard, view, exchange))
    }

    /// How many replicas there shall be that stay: one more while the primary does not.
    fn wanted(&self, record: &KeyspaceRecord, shard: &ShardRecord) -> usize {
        (record.copies as usize).saturating_sub(1) + usize::from(self.exchange.leaves(shard.primary))
    }

    /// Whether a shard whose primary leaves has all copies that stay, so that one of them may lead.
    pub fn may_hand_over(&self, record: &KeyspaceRecord, shard: &ShardRecord) -> bool {
        let has_all = staying(shard, self.view, self.exchange) >= self.wanted(record, shard);
        self.exchange.leaves(shard.primary) && has_all && shard.witnesses.is_empty()
    }

    pub fn exchange(&self) -> Exchange {
        self.exchange
    }

    /// One more learner.
    fn add(&mut self, wanted: usize, shard: &ShardRecord) -> Option<ShardRecord> {
        // A witness that is there may stay after all.
        let stays = |store: &StoreId| !self.view.is_lost(*store) && !self.exchange.leaves(*store);
        let coming = shard.learners.iter().filter(|store| stays(store)).count();
        if staying(shard, self.view, self.exchange) + coming >= wanted || !self.is_free(shard.primary) {
            return None;
        }
        let taken: Vec<StoreId> = shard.copies().collect();
        let beside = taken.iter().filter(|store| !self.exchange.leaves(**store));
        let places: Vec<&Site> =
            beside.filter_map(|store| Some(&self.view.stores.get(store)?.candidate.site)).collect();
        let best = match self.exchange.heir(shard) {
            Some(heir) => self.candidates.iter().map(|candidate| candidate.id).find(|store| *store == heir),
            None => place::place_one(&taken, &places, &self.candidates),
        };
        // The best place, and if that is busy, later: a worse one would be for long.
        let store = best.filter(|store| self.is_free(*store))?;
        self.count(shard.primary, store);
        for candidate in self.candidates.iter_mut().filter(|candidate| candidate.id == store) {
            candidate.held += 1;
        }
        let mut shard = shard.clone();
        shard.learners.push(store);
        Some(shard)
    }
}

/// Replicas that are not to be replaced.
fn staying(shard: &ShardRecord, view: &View<'_>, exchange: Exchange) -> usize {
    shard.replicas.iter().filter(|store| !view.is_lost(**store) && !exchange.leaves(**store)).count()
}

/// Learners that have never been replicas, or have been long ago.
fn fresh(shard: &ShardRecord) -> impl Iterator<Item = StoreId> {
    shard.learners.iter().filter(|store| !shard.witnesses.contains(store)).copied()
}

/// Without witnesses, when everything that was acknowledged before is on enough copies. The primary counts by this version of the record, so
/// nothing new is on too few; and the replicas that acknowledge from now on have all that it had when it was first heard under this version.
fn settle(record: &KeyspaceRecord, key: ShardKey, shard: &ShardRecord, view: &View<'_>) -> Option<ShardRecord> {
    if shard.witnesses.is_empty() {
        return None;
    }
    let primary = view.primary(key, shard).filter(|primary| primary.record >= record.epoch)?;
    let mark = primary.mark?.sequence;
    let has_all = |store: &&StoreId| view.follower(key, shard, **store).is_some_and(|status| status.applied >= mark);
    let have_all = shard.replicas.iter().filter(has_all).count();
    let enough = have_all >= record.settings.min_replicas() as usize;
    enough.then(|| ShardRecord { witnesses: Vec::new(), ..shard.clone() })
}

/// With a learner as a replica that is one.
fn promote(
    wanted: usize,
    key: ShardKey,
    shard: &ShardRecord,
    view: &View<'_>,
    exchange: Exchange,
) -> Option<ShardRecord> {
    if staying(shard, view, exchange) >= wanted {
        return None;
    }
    // A witness was a replica, and may be one again: it stays a witness.
    let learners = fresh(shard).chain(shard.learners.iter().copied());
    let mut staying = learners.filter(|store| !exchange.leaves(*store));
    let store = staying.find(|store| view.is_in_sync(key, shard, *store))?;
    let mut shard = shard.clone();
    shard.learners.retain(|learner| *learner != store);
    shard.replicas.push(store);
    Some(shard)
}

/// Without a learner that is too many: it has never counted.
fn forget_learner(
    wanted: usize,
    key: ShardKey,
    shard: &ShardRecord,
    view: &View<'_>,
    exchange: Exchange,
) -> Option<ShardRecord> {
    let leaving = fresh(shard).find(|store| exchange.leaves(*store));
    if leaving.is_none() && staying(shard, view, exchange) + fresh(shard).count() <= wanted {
        return None;
    }
    let worst = leaving.or_else(|| fresh(shard).max_by_key(|store| badness(*store, key, shard, view)))?;
    let mut shard = shard.clone();
    shard.learners.retain(|learner| *learner != worst);
    Some(shard)
}

/// With a replica that is too many as a learner and a witness.
fn demote(
    wanted: usize,
    key: ShardKey,
    shard: &ShardRecord,
    view: &View<'_>,
    exchange: Exchange,
) -> Option<ShardRecord> {
    // One at a time: the next one when this one is gone.
    if !shard.witnesses.is_empty() {
        return None;
    }
    let (leaving, others): (Vec<StoreId>, Vec<StoreId>) =
        shard.replicas.iter().partition(|store| exchange.leaves(**store));
    // One that leaves is as good as the others until there are enough of them that keep up without it.
    let in_sync = others.iter().filter(|store| view.is_in_sync(key, shard, **store)).count();
    let ready = leaving.into_iter().find(|_| in_sync >= wanted);
    if ready.is_none() && others.len() <= wanted {
        return None;
    }
    let worst = ready.or_else(|| others.into_iter().max_by_key(|store| badness(*store, key, shard, view)))?;
    let mut shard = shard.clone();
    shard.replicas.retain(|replica| *replica != worst);
    shard.learners.push(worst);
    shard.witnesses.push(worst);
    Some(shard)
}

/// Who goes first: what is down for long, what is down, what does not keep up, what would fail together with other copies, what is behind.
fn badness(store: StoreId, key: ShardKey, shard: &ShardRecord, view: &View<'_>) -> impl Ord + use<> {
    let site = |store: &StoreId| view.stores.get(store).map(|store| &store.candidate.site);
    let others: Vec<StoreId> = shard.copies().filter(|other| *other != store).collect();
    let nearness = site(&store).map_or(0, |own| place::nearness(own, others.iter().filter_map(site)));
    let applied = view.follower(key, shard, store).map_or(0, |follower| follower.applied);
    let in_sync = view.is_in_sync(key, shard, store);
    (view.is_lost(store), !view.is_up(store), !in_sync, nearness, Reverse(applied), store)
}
