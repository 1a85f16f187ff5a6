//! Decides who leads a shard. Pure: the record and what the master knows in, the next version of the record out.
//!
//! A primary that is lost is followed by another in two steps. First the shard becomes vacant: each copy that follows this version takes
//! part in nothing of an earlier one any more and says where it stands. When so many have spoken that one of them must have everything that
//! was acknowledged, the one that has come furthest leads. `Acknowledged` means on the primary and `min-replicas` others: of all copies but
//! `min-replicas`, one has it. A primary that has led speaks for itself: it has everything. Of a planned change nobody but all together can
//! say that: its new primary may have begun, or not.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::Duration;

use thiserror::Error;
use vasto_proto::id::{Epoch, ShardId, ShardKey, StoreId};
use vasto_proto::topology::{KeyspaceRecord, NOBODY, Position, ShardRecord};

use crate::copies::Copying;
use crate::place;
use crate::standing::{View, shards};

/// A primary that is down for so long is replaced. Its store reports every half second, and a process that is started again is back sooner.
const FAILOVER_AFTER: Duration = Duration::from_secs(1);

/// A primary that is up and does not serve for so long is replaced if others could: several times the length of a lease.
const SERVE_PATIENCE: Duration = Duration::from_secs(5);

/// When enough copies have spoken, the others that are up are waited for so long: a power cut may have taken from one what another has.
const SPEAK_PATIENCE: Duration = Duration::from_secs(1);

/// Shards that a store which is replaced hands over at a time: each is served by nobody for a moment.
const HAND_OVERS_MAX: usize = 4;

/// A planned change of a primary, as a gateway asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    pub name: String,
    pub shard: ShardId,
    /// `None`: the replica that is best.
    pub to: Option<StoreId>,
}

/// Why a shard keeps its primary. Nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PlannedError {
    #[error("keyspace {name} has {count} shards, and no shard {shard}; nothing was changed")]
    NoSuchShard { name: String, shard: ShardId, count: u16 },
    #[error("shard {shard} of keyspace {name} has no replica; nothing was changed")]
    NoReplica { name: String, shard: ShardId },
    #[error("shard {shard} of keyspace {name} is getting another primary already; nothing was changed")]
    UnderWay { name: String, shard: ShardId },
    #[error("the primary of shard {shard} of keyspace {name}, store {primary}, does not serve; nothing was changed")]
    NoPrimary { name: String, shard: ShardId, primary: StoreId },
    #[error("store {store} is the primary of shard {shard} of keyspace {name} already; nothing was changed")]
    IsPrimary { name: String, shard: ShardId, store: StoreId },
    #[error("store {store} has no replica of shard {shard} of keyspace {name}; nothing was changed")]
    OtherStore { name: String, shard: ShardId, store: StoreId },
    #[error("no replica of shard {shard} of keyspace {name} is in sync: {states}; nothing was changed")]
    NotInSync { name: String, shard: ShardId, states: String },
}

/// What may be done with the copies of a shard beside its primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tending {
    AsWished,
    /// Those that there are become replicas or go; none is added.
    NoMore,
    /// They stay as they are.
    Not,
}

/// The next version of a record that is wished now; `None`: it is as it shall be, or must wait. The wish takes one step for each shard.
pub fn next(record: &KeyspaceRecord, view: &View<'_>) -> Option<KeyspaceRecord> {
    next_tending(record, view, |_| Tending::AsWished)
}

/// As [`next`], with less done for the copies of some shards.
pub fn next_tending(
    record: &KeyspaceRecord,
    view: &View<'_>,
    tending: impl Fn(ShardId) -> Tending,
) -> Option<KeyspaceRecord> {
    if record.dropped {
        return None;
    }
    let mut steps = Vec::new();
    let mut copying = Copying::new(record, view);
    let mut leads: HashMap<StoreId, usize> = HashMap::new();
    for shard in &record.shards {
        *leads.entry(shard.primary).or_default() += 1;
    }
    let mut hand_overs = record.shards.iter().filter(|shard| shard.previous != NOBODY).count();
    for (key, shard) in shards(record) {
        let step = if shard.is_vacant() {
            let chosen = choose(record, key, shard, view, &leads);
            if let Some(chosen) = &chosen {
                *leads.entry(chosen.primary).or_default() += 1;
            }
            chosen
        } else if let Some(vacant) = vacate(record, key, shard, view) {
            Some(vacant)
        } else if shard.previous != NOBODY {
            arrive(key, shard, view)
        } else if let Some(step) = match tending(key.shard) {
            Tending::AsWished => copying.step(record, key, shard),
            Tending::NoMore => copying.step_without_more(record, key, shard),
            Tending::Not => None,
        } {
            Some(step)
        } else if hand_overs < HAND_OVERS_MAX && copying.may_hand_over(record, shard) {
            let handed = hand_over(key, shard, copying.exchange().successor(shard), view, &leads);
            if let Some(handed) = &handed {
                hand_overs += 1;
                *leads.entry(handed.primary).or_default() += 1;
            }
            handed
        } else {
            None
        };
        steps.extend(step.map(|step| (key.shard, step)));
    }
    if steps.is_empty() {
        return None;
    }
    let mut next = record.clone();
    next.epoch = Epoch(record.epoch.0 + 1);
    for (shard, step) in steps {
        next.shards[usize::from(shard.0)] = step;
    }
    Some(next)
}

/// The shards that this next version of a record makes vacant because their primaries are up and do not serve, and these.
pub fn unfit(record: &KeyspaceRecord, next: &KeyspaceRecord, view: &View<'_>) -> Vec<(ShardKey, Epoch, StoreId)> {
    let pairs = shards(record).zip(&next.shards);
    let idle = pairs.filter(|((key, before), after)| {
        after.is_vacant() && !before.is_vacant() && view.idle_for(*key, before) >= SERVE_PATIENCE
    });
    idle.map(|((key, before), after)| (key, after.epoch, before.primary)).collect()
}

/// The next version of the record, under which the shard's primary hands over to one of its replicas.
pub fn plan(record: &KeyspaceRecord, planned: &Planned, view: &View<'_>) -> Result<KeyspaceRecord, PlannedError> {
    let (name, shard) = (planned.name.clone(), planned.shard);
    let key = ShardKey { keyspace: record.id, shard };
    let Some(before) = record.shards.get(usize::from(shard.0)) else {
        return Err(PlannedError::NoSuchShard { name, shard, count: record.shard_count() });
    };
    let primary = before.primary;
    if before.is_vacant() || before.previous != NOBODY || !before.witnesses.is_empty() {
        return Err(PlannedError::UnderWay { name, shard });
    }
    match planned.to {
        Some(store) if store == primary => return Err(PlannedError::IsPrimary { name, shard, store }),
        Some(store) if !before.replicas.contains(&store) => {
            return Err(PlannedError::OtherStore { name, shard, store });
        }
        Some(_) | None => {}
    }
    if before.replicas.is_empty() {
        return Err(PlannedError::NoReplica { name, shard });
    }
    if !view.primary(key, before).is_some_and(|primary| primary.status.serves) {
        return Err(PlannedError::NoPrimary { name, shard, primary });
    }
    let leads = place::count_copies(record.shards.iter().map(|shard| shard.primary));
    let Some(after) = hand_over(key, before, planned.to, view, &leads) else {
        let asked = before.replicas.iter().filter(|store| planned.to.is_none_or(|to| to == **store));
        let states: Vec<String> =
            asked.map(|store| format!("store {store} {}", state(*store, key, before, view))).collect();
        return Err(PlannedError::NotInSync { name, shard, states: states.join(", ") });
    };
    let mut next = record.clone();
    next.epoch = Epoch(record.epoch.0 + 1);
    next.shards[usize::from(shard.0)] = after;
    Ok(next)
}

/// The shard with another primary, which first takes the end of the log of the one before: the best replica that is in sync, or that one.
fn hand_over(
    key: ShardKey,
    before: &ShardRecord,
    to: Option<StoreId>,
    view: &View<'_>,
    leads: &HashMap<StoreId, usize>,
) -> Option<ShardRecord> {
    let primary = before.primary;
    if !view.primary(key, before).is_some_and(|primary| primary.status.serves) {
        return None;
    }
    let asked = before.replicas.iter().filter(|store| to.is_none_or(|to| to == **store));
    let ready = asked.filter(|store| view.is_in_sync(key, before, **store));
    let target = *ready.min_by_key(|store| {
        let applied = view.follower(key, before, **store).map_or(0, |follower| follower.applied);
        (leads.get(store).copied().unwrap_or_default(), Reverse(applied), **store)
    })?;
    let mut after = without(before, target);
    after.replicas.push(primary);
    Some(ShardRecord { epoch: Epoch(before.epoch.0 + 1), primary: target, previous: primary, ..after })
}

/// How a replica that is not in sync is, in words.
fn state(store: StoreId, key: ShardKey, shard: &ShardRecord, view: &View<'_>) -> &'static str {
    match view.follower(key, shard, store) {
        _ if !view.is_up(store) => "is down",
        None => "does not follow",
        Some(_) => "lags behind",
    }
}

/// The shard without one of its copies that follow.
fn without(shard: &ShardRecord, store: StoreId) -> ShardRecord {
    let mut shard = shard.clone();
    for list in [&mut shard.replicas, &mut shard.learners, &mut shard.witnesses] {
        list.retain(|other| *other != store);
    }
    shard
}

/// The vacant shard, if its primary is lost and another copy could lead.
fn vacate(record: &KeyspaceRecord, key: ShardKey, shard: &ShardRecord, view: &View<'_>) -> Option<ShardRecord> {
    let is_down = |store| view.down_for(store).is_some_and(|time| time >= FAILOVER_AFTER);
    let serves = view.primary(key, shard).is_some_and(|primary| primary.status.serves);
    let is_idle = view.idle_for(key, shard) >= SERVE_PATIENCE;
    // It waits for the end of a log that does not come.
    let is_orphan = shard.previous != NOBODY && is_down(shard.previous) && !serves;
    if !(is_down(shard.primary) || is_idle || is_orphan) {
        return None;
    }
    let mut vacant = shard.clone();
    vacant.epoch = Epoch(shard.epoch.0 + 1);
    vacant.primary = NOBODY;
    vacant.previous = NOBODY;
    vacant.replicas.push(shard.primary);
    // One that is asked for nothing but where it stands answers that even if it does not serve.
    let speaks = |store: StoreId| store != shard.primary || !is_idle || has_one_copy(record);
    let up: Vec<Voice> = voters(&vacant)
        .filter(|store| view.is_up(*store) && speaks(*store))
        .filter_map(|store| Some(Voice { store, position: view.heard(key, store)?.status.position }))
        .collect();
    // Nobody would be chosen: the shard is no worse off with the primary that it has.
    let others_could = up.iter().any(|voice| voice.store != shard.primary && voice.position.is_some());
    (others_could && suffice_without_last(record, &vacant, &up)).then_some(vacant)
}

/// What one copy says.
#[derive(Clone, Copy, Debug)]
struct Voice {
    store: StoreId,
    position: Option<Position>,
}

/// Who is heard, and may be chosen: replicas, and those that have been until a moment ago.
fn voters(shard: &ShardRecord) -> impl Iterator<Item = StoreId> {
    let left = shard.witnesses.iter().filter(|store| !shard.replicas.contains(store));
    shard.replicas.iter().chain(left).copied()
}

/// Whether what was acknowledged is with one copy, wherever that is just now.
fn has_one_copy(record: &KeyspaceRecord) -> bool {
    record.copies <= 1
}

/// Whether one of these copies must have everything that was acknowledged, whoever of them that is.
fn suffice_without_last(record: &KeyspaceRecord, vacant: &ShardRecord, voices: &[Voice]) -> bool {
    let min_replicas = record.settings.min_replicas() as usize;
    // Nothing was promised: whoever is there.
    if min_replicas == 0 && !has_one_copy(record) {
        return !voices.is_empty();
    }
    let is_heard = |store: &&StoreId| voices.iter().any(|voice| voice.store == **store);
    let heard = vacant.replicas.iter().filter(is_heard).count();
    heard + min_replicas >= vacant.replicas.len() && vacant.witnesses.iter().all(|store| is_heard(&store))
}

/// Whether the last primary is among them and has led: it has everything.
fn has_last(vacant: &ShardRecord, voices: &[Voice]) -> bool {
    let led = Epoch(vacant.epoch.0.saturating_sub(1));
    let is_last = |voice: &&Voice| vacant.replicas.last() == Some(&voice.store);
    voices.iter().find(is_last).and_then(|voice| voice.position).is_some_and(|position| position.era.epoch == led)
}

/// The vacant shard with the copy that has come furthest as its primary, if enough of them were heard.
fn choose(
    record: &KeyspaceRecord,
    key: ShardKey,
    vacant: &ShardRecord,
    view: &View<'_>,
    leads: &HashMap<StoreId, usize>,
) -> Option<ShardRecord> {
    let heard = voters(vacant).filter_map(|store| Some((store, view.heard_at(key, store, vacant.epoch)?)));
    let heard: Vec<_> = heard.collect();
    let is_heard = |store: StoreId| heard.iter().any(|(other, _)| *other == store);
    let all_heard = voters(vacant).all(|store| is_heard(store) || !view.is_up(store));
    let is_patient = |(_, heard): &&(StoreId, &crate::standing::Heard)| view.now >= heard.since + SPEAK_PATIENCE;
    // Without those that would not lead for long, if the others are enough without them.
    let is_fit = |store: StoreId| view.unfit(key, vacant) != Some(store);
    let admissions: [&dyn Fn(StoreId) -> bool; 4] =
        [&|store| is_fit(store) && view.is_up(store), &|store| view.is_up(store), &is_fit, &|_| true];
    for admits in admissions {
        let admitted = heard.iter().filter(|(store, _)| admits(*store));
        let admitted: Vec<_> = if all_heard { admitted.collect() } else { admitted.filter(is_patient).collect() };
        let voices: Vec<Voice> =
            admitted.iter().map(|(store, heard)| Voice { store: *store, position: heard.status.position }).collect();
        if !suffice_without_last(record, vacant, &voices) && !has_last(vacant, &voices) {
            continue;
        }
        let complete = voices.iter().filter_map(|voice| Some((voice.store, voice.position?)));
        let load = |store: StoreId| {
            let held = view.stores.get(&store).map_or(0, |store| store.candidate.held);
            (leads.get(&store).copied().unwrap_or_default(), held, store)
        };
        let Some((chosen, _)) = complete.max_by_key(|(store, position)| (*position, Reverse(load(*store)))) else {
            continue;
        };
        // What it has nobody else may have: the shard waits for it.
        if !view.is_up(chosen) {
            continue;
        }
        let mut shard = without(vacant, chosen);
        // What has come this far on few copies may now be on others of them.
        if !vacant.witnesses.is_empty() {
            shard.witnesses = voters(vacant).filter(|store| *store != chosen).collect();
        }
        return Some(ShardRecord { epoch: Epoch(vacant.epoch.0 + 1), primary: chosen, ..shard });
    }
    None
}

/// The shard after a planned change, when the new primary has taken over.
fn arrive(key: ShardKey, shard: &ShardRecord, view: &View<'_>) -> Option<ShardRecord> {
    let serves = view.primary(key, shard).is_some_and(|primary| primary.status.serves);
    serves.then(|| ShardRecord { previous: NOBODY, ..shard.clone() })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::place::{Candidate, Site};
    use crate::replacing;
    use crate::standing::{Standing, Store};
    use std::collections::BTreeMap;
    use vasto_proto::id::KeyspaceId;
    use vasto_proto::topology::{Era, FollowerStatus, Role, Settings, ShardStatus};

    /// Stores and what they say, second by second.
    pub struct Scene {
        pub record: KeyspaceRecord,
        pub standing: Standing,
        pub stores: BTreeMap<StoreId, Store>,
        pub now: Duration,
    }

    pub fn stores(ids: &[u32]) -> Vec<StoreId> {
        ids.iter().map(|store| StoreId(*store)).collect()
    }

    impl Scene {
        /// Store 1 leads `shards` shards with replicas on `replicas`; all that it knows serve and are in sync.
        pub fn new(shards: usize, replicas: &[u32], all: u32, min_replicas: u32) -> Self {
            let mut record = KeyspaceRecord::new(KeyspaceId(7), "a", &vec![StoreId(1); shards]).unwrap();
            record.copies = 1 + replicas.len() as u32;
            record.settings = Settings { min_replicas: Some(min_replicas), ..Settings::default() };
            for shard in &mut record.shards {
                shard.replicas = stores(replicas);
            }
            let store = |id: u32| {
                let candidate = Candidate { id: StoreId(id), free_disk_bytes: 1 << 40, ..Candidate::default() };
                (StoreId(id), Store { candidate, up: true, since: Duration::ZERO, older: false })
            };
            let stores = (1..=all).map(store).collect();
            let mut scene = Self { record, standing: Standing::default(), stores, now: Duration::ZERO };
            scene.pass(1);
            scene
        }

        pub fn at(&self, store: u32, epoch: u64, sequence: u64) -> Option<Position> {
            let era = Era { epoch: Epoch(epoch), opened: 1 };
            self.stores.contains_key(&StoreId(store)).then_some(Position { era, sequence })
        }

        /// What a store in its role says of all its copies.
        pub fn say(&mut self, store: u32, position: Option<Position>, serves: bool, in_sync: bool) {
            let id = StoreId(store);
            let statuses = self.record.copies_of(id).map(|(shard, record)| {
                let others = record.replicas.iter().chain(&record.learners).filter(|_| record.primary == id);
                let follower = |other: &StoreId| FollowerStatus {
                    store: *other,
                    connected: true,
                    in_sync,
                    applied: 90 + u64::from(other.0),
                };
                ShardStatus {
                    key: ShardKey { keyspace: self.record.id, shard },
                    epoch: record.epoch,
                    role: if record.primary == id { Role::Primary } else { Role::Replica },
                    position,
                    serves: serves && record.primary == id,
                    followers: others.map(follower).collect(),
                    bytes: 0,
                    has_foreign_rows: false,
                    moves: Vec::new(),
                }
            });
            let statuses: Vec<ShardStatus> = statuses.collect();
            let held = BTreeMap::from([(self.record.id, self.record.epoch)]);
            self.standing.hear(id, statuses, &held, self.now);
        }

        /// Seconds pass, in which all that are up report.
        pub fn pass(&mut self, seconds: u64) {
            for _ in 0..seconds {
                self.now += Duration::from_secs(1);
                self.standing.note(&self.record, self.now);
                let up: Vec<u32> = self.stores.iter().filter(|(_, store)| store.up).map(|(store, _)| store.0).collect();
                for store in up {
                    self.say(store, self.at(store, 1, 100 - u64::from(store)), true, true);
                }
            }
        }

        pub fn goes(&mut self, store: u32) {
            let store = self.stores.get_mut(&StoreId(store)).unwrap();
            (store.up, store.since) = (false, self.now);
        }

        pub fn view(&self) -> View<'_> {
            View {
                now: self.now,
                began: Duration::ZERO,
                replace_after: Duration::from_secs(300),
                stores: self.stores.clone(),
                standing: &self.standing,
            }
        }

        /// As a leader asks for it.
        pub fn next(&self, view: &View<'_>) -> Option<KeyspaceRecord> {
            replacing::next(&self.record, view).or_else(|| next(&self.record, view))
        }

        pub fn wish(&self) -> Option<ShardRecord> {
            self.next(&self.view()).map(|record| record.shards[0].clone())
        }

        /// Takes the wish in, and all that are up follow it.
        pub fn follow(&mut self) -> ShardRecord {
            let view = self.view();
            let next = self.next(&view).expect("something is wished");
            let unfit = unfit(&self.record, &next, &view);
            next.validate().unwrap();
            for (key, epoch, store) in unfit {
                self.standing.note_unfit(key, epoch, store);
            }
            self.record = next;
            self.standing.note(&self.record, self.now);
            self.record.shards[0].clone()
        }
    }

    #[test]
    fn a_lost_primary_is_followed_by_the_copy_that_has_come_furthest() {
        let mut scene = Scene::new(1, &[2, 3], 3, 1);
        assert_eq!(scene.wish(), None);
        scene.goes(1);
        assert_eq!(scene.wish(), None, "not at once");
        scene.pass(1);
        let vacant = scene.follow();
        assert_eq!((vacant.primary, vacant.replicas, vacant.epoch), (NOBODY, stores(&[2, 3, 1]), Epoch(2)));
        assert_eq!(scene.wish(), None, "nobody has said yet that he has stopped following");
        scene.say(2, scene.at(2, 1, 40), false, false);
        assert_eq!(scene.wish(), None, "the other may have more");
        scene.say(3, scene.at(3, 1, 41), false, false);
        let chosen = scene.follow();
        assert_eq!((chosen.primary, chosen.replicas, chosen.epoch), (StoreId(3), stores(&[2, 1]), Epoch(3)));
    }

    #[test]
    fn a_shard_keeps_a_lost_primary_when_nothing_is_gained() {
        let mut alone = Scene::new(1, &[], 3, 0);
        alone.goes(1);
        alone.pass(9);
        assert_eq!(alone.wish(), None, "there is one copy");
        // No copy is complete.
        let mut empty = Scene::new(1, &[2], 2, 0);
        empty.goes(1);
        empty.now += Duration::from_secs(9);
        empty.say(2, None, false, false);
        assert_eq!(empty.wish(), None);
        // One of two that must be heard is down too.
        let mut few = Scene::new(1, &[2, 3], 3, 1);
        few.goes(1);
        few.goes(3);
        few.pass(9);
        assert_eq!(few.wish(), None);
        few.record.settings.min_replicas = Some(2);
        assert!(few.wish().unwrap().is_vacant(), "each of the two must have everything");
        // A master that has just begun waits for stores to find it.
        let mut young = Scene::new(1, &[2], 2, 0);
        young.stores.remove(&StoreId(1));
        young.now = Duration::from_secs(2);
        assert_eq!(young.wish(), None);
        young.now = Duration::from_secs(3);
        assert!(young.wish().unwrap().is_vacant());
    }

    #[test]
    fn the_last_primary_leads_again_if_it_comes_back_first() {
        let mut scene = Scene::new(1, &[2, 3], 3, 1);
        scene.goes(1);
        scene.pass(1);
        scene.follow();
        scene.goes(2);
        scene.goes(3);
        scene.stores.get_mut(&StoreId(1)).unwrap().up = true;
        scene.say(1, scene.at(1, 1, 99), false, false);
        assert_eq!(scene.follow().primary, StoreId(1));
    }

    #[test]
    fn a_primary_that_is_up_and_does_not_serve_is_replaced() {
        for min_replicas in [0, 1] {
            let mut scene = Scene::new(1, &[2, 3], 3, min_replicas);
            for _ in 0..4 {
                scene.now += Duration::from_secs(1);
                scene.say(1, scene.at(1, 1, 99), false, false);
            }
            assert_eq!(scene.wish(), None, "it may be about to");
            scene.now += Duration::from_secs(1);
            assert!(scene.follow().is_vacant());
            for store in 1..=3 {
                scene.say(store, scene.at(store, 1, 99 - u64::from(store)), false, false);
            }
            assert_eq!(scene.wish().unwrap().primary, StoreId(2), "it has come further, but would not serve");
        }
    }

    #[test]
    fn shards_of_a_lost_primary_are_spread_over_the_others() {
        let mut scene = Scene::new(8, &[2, 3], 3, 1);
        scene.goes(1);
        scene.pass(1);
        scene.follow();
        for store in [2, 3] {
            scene.say(store, scene.at(store, 1, 7), false, false);
        }
        scene.follow();
        let leads = |store: u32| scene.record.shards_of(StoreId(store)).count();
        assert_eq!((leads(2), leads(3)), (4, 4));
    }

    #[test]
    fn a_planned_change_takes_the_end_of_the_log_and_ends_when_the_new_one_serves() {
        let mut scene = Scene::new(1, &[2, 3], 4, 1);
        let planned = |to: Option<u32>| Planned { name: "a".to_owned(), shard: ShardId(0), to: to.map(StoreId) };
        let refused = |scene: &Scene, planned: &Planned| {
            plan(&scene.record, planned, &scene.view()).map(|_| ()).unwrap_err().to_string()
        };
        let other = Planned { shard: ShardId(4), ..planned(None) };
        assert_eq!(refused(&scene, &other), "keyspace a has 1 shards, and no shard 4; nothing was changed");
        let text = "store 00000001 is the primary of shard 0 of keyspace a already; nothing was changed";
        assert_eq!(refused(&scene, &planned(Some(1))), text);
        let text = "store 00000004 has no replica of shard 0 of keyspace a; nothing was changed";
        assert_eq!(refused(&scene, &planned(Some(4))), text);
        scene.say(1, scene.at(1, 1, 99), true, false);
        let text = "no replica of shard 0 of keyspace a is in sync: store 00000002 lags behind, store 00000003 lags behind; \
                    nothing was changed";
        assert_eq!(refused(&scene, &planned(None)), text);
        scene.say(1, scene.at(1, 1, 99), false, true);
        let text = "the primary of shard 0 of keyspace a, store 00000001, does not serve; nothing was changed";
        assert_eq!(refused(&scene, &planned(None)), text);
        scene.pass(1);
        // The better one has applied more.
        scene.record = plan(&scene.record, &planned(None), &scene.view()).unwrap();
        let shard = scene.record.shards[0].clone();
        assert_eq!((shard.primary, shard.previous, shard.epoch), (StoreId(3), StoreId(1), Epoch(2)));
        assert_eq!(shard.replicas, stores(&[2, 1]));
        let text = "shard 0 of keyspace a is getting another primary already; nothing was changed";
        assert_eq!(refused(&scene, &planned(None)), text);
        assert_eq!(scene.wish(), None);
        scene.say(3, scene.at(3, 2, 100), true, true);
        assert_eq!(scene.follow().previous, NOBODY);
        let alone = Scene::new(1, &[], 2, 0);
        let text = "shard 0 of keyspace a has no replica; nothing was changed";
        assert_eq!(refused(&alone, &planned(None)), text);
    }

    #[test]
    fn when_the_primary_before_dies_in_a_planned_change_all_are_asked() {
        let mut scene = Scene::new(1, &[2, 3], 3, 1);
        let planned = Planned { name: "a".to_owned(), shard: ShardId(0), to: Some(StoreId(2)) };
        scene.record = plan(&scene.record, &planned, &scene.view()).unwrap();
        scene.goes(1);
        scene.now += Duration::from_secs(1);
        let vacant = scene.follow();
        assert_eq!((vacant.primary, vacant.replicas), (NOBODY, stores(&[3, 1, 2])));
        scene.say(2, scene.at(2, 1, 7), false, false);
        scene.now += Duration::from_secs(2);
        assert_eq!(scene.wish(), None, "the new primary has not begun: it may lack something");
        scene.say(3, scene.at(3, 1, 8), false, false);
        assert_eq!(scene.follow().primary, StoreId(3));
    }

    #[test]
    fn missing_copies_are_made_and_count_when_they_are_in_sync() {
        let mut scene = Scene::new(1, &[2], 4, 1);
        scene.record.copies = 3;
        scene.stores.get_mut(&StoreId(3)).unwrap().candidate.site = Site { host: "a".to_owned(), ..Site::default() };
        scene.stores.get_mut(&StoreId(2)).unwrap().candidate.site = Site { host: "a".to_owned(), ..Site::default() };
        assert_eq!(scene.follow().learners, stores(&[4]), "not on the host of another copy");
        scene.say(1, scene.at(1, 1, 99), true, false);
        assert_eq!(scene.wish(), None);
        scene.pass(1);
        let whole = scene.follow();
        assert_eq!((whole.replicas, whole.learners, whole.epoch), (stores(&[2, 4]), stores(&[]), Epoch(1)));
        assert_eq!(scene.wish(), None);
        // An older store would not know what a learner is.
        scene.record.copies = 4;
        scene.stores.get_mut(&StoreId(3)).unwrap().older = true;
        assert_eq!(scene.wish(), None);
    }

    #[test]
    fn few_copies_are_made_at_a_time() {
        let mut scene = Scene::new(20, &[], 3, 0);
        scene.record.copies = 2;
        scene.follow();
        let learners = |scene: &Scene| scene.record.shards.iter().filter(|shard| !shard.learners.is_empty()).count();
        assert_eq!(learners(&scene), 4);
        for _ in 0..20 {
            scene.pass(1);
            if scene.wish().is_none() {
                break;
            }
            scene.follow();
        }
        assert!(scene.record.shards.iter().all(|shard| shard.replicas.len() == 1 && shard.learners.is_empty()));
        let counts = [2, 3].map(|store| scene.record.copies_of(StoreId(store)).count());
        assert_eq!(counts, [10, 10]);
    }

    #[test]
    fn a_copy_that_is_too_many_goes_when_the_others_have_what_it_had() {
        let mut scene = Scene::new(1, &[2, 3], 3, 1);
        scene.record.copies = 2;
        scene.goes(3);
        let leaving = scene.follow();
        assert_eq!((leaving.replicas, &leaving.learners), (stores(&[2]), &leaving.witnesses), "first what is down");
        assert_eq!(leaving.witnesses, stores(&[3]));
        assert_eq!(scene.wish(), None, "the primary has not followed yet");
        scene.say(1, scene.at(1, 1, 93), true, true);
        assert_eq!(scene.wish(), None, "the other lacks something that this one may have acknowledged");
        scene.record.epoch = Epoch(scene.record.epoch.0 + 1);
        scene.say(1, scene.at(1, 1, 92), true, true);
        assert_eq!(scene.follow().witnesses, stores(&[]));
        let gone = scene.follow();
        assert_eq!((gone.replicas, gone.learners), (stores(&[2]), stores(&[])));
    }

    #[test]
    fn a_copy_that_is_away_for_long_is_made_elsewhere_and_goes() {
        let mut scene = Scene::new(1, &[2, 3], 4, 1);
        scene.goes(3);
        scene.pass(299);
        assert_eq!(scene.wish(), None);
        scene.pass(1);
        assert_eq!(scene.follow().learners, stores(&[4]));
        scene.pass(1);
        let more = scene.follow();
        assert_eq!((more.replicas, more.learners), (stores(&[2, 3, 4]), stores(&[])));
        let leaving = scene.follow();
        assert_eq!((leaving.replicas, leaving.learners), (stores(&[2, 4]), stores(&[3])));
        // It comes back in time, and is not needed any more all the same.
        scene.stores.get_mut(&StoreId(3)).unwrap().up = true;
        scene.pass(1);
        scene.say(1, scene.at(1, 1, 1), true, true);
        scene.record.epoch = Epoch(scene.record.epoch.0 + 1);
        scene.say(1, scene.at(1, 1, 92), true, true);
        scene.follow();
        assert_eq!(scene.follow().copies().collect::<Vec<_>>(), stores(&[1, 2, 4]));
    }
}
