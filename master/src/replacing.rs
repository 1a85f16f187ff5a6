//! Decides how the copies that a store has of a keyspace go to others. Pure: the record and what the master knows in, the next version of the
//! record out.
//!
//! There is no step of its own: while the record says that a store is replaced, [`crate::copies`] does not count what it has, and
//! [`crate::failover`] hands over what it leads. Another copy is made, counts, leads if it must; then the one that leaves goes by the
//! rules for every copy that is too many. Here stands how that begins, and how it ends.

use thiserror::Error;
use vasto_proto::id::{ShardId, ShardKey, StoreId};
use vasto_proto::topology::{KeyspaceRecord, NOBODY, OperationKind, ShardRecord, StepError};

use crate::copies::Exchange;
use crate::failover;
use crate::standing::{Store, View, shards};

/// Why a store keeps its copies. Nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReplaceError {
    #[error("an operation of keyspace {name} is under way; nothing was changed")]
    Busy { name: String },
    #[error("store {store} has no copy of keyspace {name}; nothing was changed")]
    NoCopy { name: String, store: StoreId },
    #[error("store {store} cannot take its own place; nothing was changed")]
    Itself { store: StoreId },
    #[error("there is no store {store}; nothing was changed")]
    NoSuchStore { store: StoreId },
    #[error("store {store} is down; nothing was changed")]
    Down { store: StoreId },
    #[error("store {store} runs an older version that does not know copies; nothing was changed")]
    Older { store: StoreId },
    #[error("store {store} has a copy of shard {shard} of keyspace {name} already; nothing was changed")]
    HasCopy { name: String, shard: ShardId, store: StoreId },
    #[error("store {store} is down and has the only copy of shard {shard} of keyspace {name}; nothing was changed")]
    OnlyCopy { name: String, shard: ShardId, store: StoreId },
    #[error(
        "{copies} copies of keyspace {name} need as many stores without store {store}, and {others} are up; nothing was changed"
    )]
    TooFewStores { name: String, copies: u32, others: usize, store: StoreId },
    #[error(
        "no store that is up and has {bytes} bytes free is without a copy of shard {shard} of keyspace {name}; nothing was changed"
    )]
    NoPlace { name: String, shard: ShardId, bytes: u64 },
    #[error("store {store} has {free} bytes free, and {bytes} would come to it; nothing was changed")]
    DiskFull { store: StoreId, free: u64, bytes: u64 },
}

/// The version of the record that says that the copies of a store go to another, or to whichever are best.
pub fn begin(
    record: &KeyspaceRecord,
    store: StoreId,
    with: Option<StoreId>,
    view: &View<'_>,
) -> Result<KeyspaceRecord, ReplaceError> {
    let name = record.name.clone();
    let busy = |_: StepError| ReplaceError::Busy { name: name.clone() };
    let next = record.begin_replace(store, with).map_err(busy)?;
    if with == Some(store) {
        return Err(ReplaceError::Itself { store });
    }
    if record.copies_of(store).next().is_none() {
        return Err(ReplaceError::NoCopy { name, store });
    }
    if let Some(with) = with {
        let Some(known) = view.stores.get(&with) else { return Err(ReplaceError::NoSuchStore { store: with }) };
        if !known.up {
            return Err(ReplaceError::Down { store: with });
        }
        if known.older {
            return Err(ReplaceError::Older { store: with });
        }
    }
    let others = view.stores.values().filter(|other| other.up && !other.older && other.candidate.id != store).count();
    if others < record.copies as usize {
        return Err(ReplaceError::TooFewStores { name, copies: record.copies, others, store });
    }
    let mut bytes_in_all = 0;
    for (shard, described) in record.copies_of(store) {
        let name = name.clone();
        if !view.is_up(store) && depends_on(record, described, store) {
            return Err(ReplaceError::OnlyCopy { name, shard, store });
        }
        let holds = |other: StoreId| described.copies().any(|copy| copy == other);
        if let Some(with) = with.filter(|with| holds(*with)) {
            return Err(ReplaceError::HasCopy { name, shard, store: with });
        }
        let bytes = bytes_of(record, shard, described, view);
        bytes_in_all += bytes;
        let can_take = |other: &Store| other.up && !other.older && other.candidate.free_disk_bytes > bytes;
        let has_place = view.stores.values().any(|other| can_take(other) && !holds(other.candidate.id));
        if with.is_none() && !has_place {
            return Err(ReplaceError::NoPlace { name, shard, bytes });
        }
    }
    if let Some((store, known)) = with.and_then(|with| Some((with, view.stores.get(&with)?))) {
        let free = known.candidate.free_disk_bytes;
        if free <= bytes_in_all {
            return Err(ReplaceError::DiskFull { store, free, bytes: bytes_in_all });
        }
    }
    Ok(next)
}

/// The next version of a record in which a store is replaced: one step for each shard, or the end. `None`: there is no such operation, or
/// it must wait.
pub fn next(record: &KeyspaceRecord, view: &View<'_>) -> Option<KeyspaceRecord> {
    let OperationKind::Replace { store, with } = record.active_operation()?.kind else { return None };
    if record.copies_of(store).next().is_none() {
        return record.finish().ok();
    }
    if let Some(reason) = hopeless(record, store, with, view) {
        return record.abort(&reason).ok();
    }
    failover::next(record, view)
}

/// Why the operation cannot end well, in words.
fn hopeless(record: &KeyspaceRecord, store: StoreId, with: Option<StoreId>, view: &View<'_>) -> Option<String> {
    let seconds = view.replace_after.as_secs();
    if let Some(with) = with.filter(|with| view.is_lost(*with)) {
        return Some(format!("store {with} has been down for {seconds} s; copies that have changed places stay there"));
    }
    if !view.is_lost(store) {
        return None;
    }
    let (shard, _) = record.copies_of(store).find(|(_, shard)| depends_on(record, shard, store))?;
    Some(format!("store {store} has been down for {seconds} s, and nobody else has all of shard {shard}"))
}

/// Whether the shard cannot go on without this copy of it.
fn depends_on(record: &KeyspaceRecord, shard: &ShardRecord, store: StoreId) -> bool {
    let leads = shard.primary == store;
    let is_leading = leads || shard.previous == store || shard.is_vacant();
    leads && shard.replicas.is_empty() || record.copies <= 1 && is_leading
}

/// How large a copy of the shard is, as whoever has one says.
fn bytes_of(record: &KeyspaceRecord, shard: ShardId, described: &ShardRecord, view: &View<'_>) -> u64 {
    let key = ShardKey { keyspace: record.id, shard };
    described.copies().filter_map(|copy| Some(view.heard(key, copy)?.status.bytes)).max().unwrap_or_default()
}

/// What is waited for, in words for people; empty if no store is being replaced.
pub fn waits_for(record: &KeyspaceRecord, view: &View<'_>) -> String {
    let Some(OperationKind::Replace { store, with }) = record.active_operation().map(|operation| operation.kind) else {
        return String::new();
    };
    let down =
        |store: StoreId| view.down_for(store).map(|time| format!("; store {store} is down since {} s", time.as_secs()));
    let left = record.copies_of(store).count();
    let made = shards(record).map(|(_, shard)| shard.learners.iter().filter(|store| !is_going(shard, **store)).count());
    let changing = record.shards.iter().filter(|shard| shard.previous != NOBODY || shard.is_vacant()).count();
    let lacks_place = with.is_none() && record.copies_of(store).any(|(_, shard)| lacks_place(record, shard, view));
    let mut text = format!(
        "{left} copies on store {store} of {} shards, {} copies are being made, {changing} shards get another primary",
        record.shards.len(),
        made.sum::<usize>(),
    );
    text.extend(with.and_then(down));
    text.extend(down(store));
    if lacks_place {
        text.push_str("; there is no store that is up and has no copy yet");
    }
    text
}

fn is_going(shard: &ShardRecord, store: StoreId) -> bool {
    shard.witnesses.contains(&store)
}

/// Whether one more copy is wished and no store can take it.
fn lacks_place(record: &KeyspaceRecord, shard: &ShardRecord, view: &View<'_>) -> bool {
    let exchange = Exchange::of(record);
    let staying = shard.copies().filter(|store| !exchange.leaves(*store) && !view.is_lost(*store)).count();
    let is_free = |other: &Store| other.up && !other.older && !shard.copies().any(|copy| copy == other.candidate.id);
    staying < record.copies as usize && !view.stores.values().any(is_free)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::tests::{Scene, stores};
    use vasto_proto::id::Epoch;
    use vasto_proto::topology::{Operation, Phase};

    fn begun(scene: &mut Scene, store: u32, with: Option<u32>) {
        scene.record = begin(&scene.record, StoreId(store), with.map(StoreId), &scene.view()).unwrap();
    }

    fn refused(scene: &Scene, store: u32, with: Option<u32>) -> String {
        begin(&scene.record, StoreId(store), with.map(StoreId), &scene.view()).map(drop).unwrap_err().to_string()
    }

    fn operation(scene: &Scene) -> &Operation {
        scene.record.operation.as_ref().expect("there is an operation")
    }

    /// What the first shard is, in short: primary <- primary before | replicas | learners, witnesses with a mark.
    fn short(shard: &ShardRecord) -> String {
        let list = |stores: &[StoreId]| {
            let store =
                |store: &StoreId| format!("{}{}", store.0, if shard.witnesses.contains(store) { "!" } else { "" });
            stores.iter().map(store).collect::<Vec<_>>().join(" ")
        };
        let previous = if shard.previous == NOBODY { String::new() } else { format!("<-{}", shard.previous.0) };
        format!("{}{previous}|{}|{}", shard.primary.0, list(&shard.replicas), list(&shard.learners))
    }

    /// All that are up do what they are told, and the primary is heard with nothing that the others lack, until nothing is wished.
    fn steps(scene: &mut Scene) -> Vec<String> {
        let mut steps = Vec::new();
        for _ in 0..40 {
            scene.now += std::time::Duration::from_millis(500);
            let up: Vec<u32> =
                scene.stores.values().filter(|store| store.up).map(|store| store.candidate.id.0).collect();
            for store in up {
                let epoch = scene.record.shards[0].epoch.0;
                scene.say(store, scene.at(store, epoch, 50), true, true);
            }
            if scene.wish().is_none() {
                return steps;
            }
            steps.push(short(&scene.follow()));
        }
        panic!("it does not end: {steps:?}");
    }

    #[test]
    fn the_only_copy_goes_to_another_store() {
        let mut scene = Scene::new(1, &[], 3, 0);
        begun(&mut scene, 1, Some(3));
        let expected = ["1||3", "1|3|", "3<-1|1|", "3|1|", "3||1!", "3||1", "3||", "3||"];
        assert_eq!(steps(&mut scene), expected);
        assert_eq!((operation(&scene).phase, operation(&scene).reason.as_str()), (Phase::Done, ""));
        assert_eq!(steps(&mut scene), [""; 0]);
    }

    #[test]
    fn a_replica_goes_when_another_is_in_sync() {
        let mut scene = Scene::new(1, &[2], 4, 1);
        begun(&mut scene, 2, Some(4));
        assert_eq!(steps(&mut scene), ["1|2|4", "1|2 4|", "1|4|2!", "1|4|2", "1|4|", "1|4|"]);
        assert_eq!(operation(&scene).phase, Phase::Done);
    }

    #[test]
    fn a_primary_leads_until_all_copies_that_stay_are_there() {
        let mut scene = Scene::new(1, &[2], 4, 1);
        begun(&mut scene, 1, None);
        let steps = steps(&mut scene);
        // Of two replicas that lead nothing the better one leads: it has applied more.
        assert_eq!(steps, ["1|2|3", "1|2 3|", "3<-1|2 1|", "3|2 1|", "3|2|1!", "3|2|1", "3|2|", "3|2|"]);
        // Said to whom, that one leads, whoever is better.
        let mut scene = Scene::new(1, &[4], 4, 1);
        begun(&mut scene, 1, Some(2));
        assert!(self::steps(&mut scene).contains(&"2<-1|4 1|".to_owned()));
        assert_eq!(operation(&scene).phase, Phase::Done);
    }

    #[test]
    fn a_store_that_is_dead_is_replaced_at_once() {
        let mut scene = Scene::new(1, &[2], 3, 1);
        scene.goes(1);
        begun(&mut scene, 1, Some(3));
        scene.now += std::time::Duration::from_secs(1);
        scene.say(2, scene.at(2, 1, 50), false, false);
        assert_eq!(short(&scene.follow()), "0|2 1|");
        scene.say(2, scene.at(2, 1, 50), false, false);
        let expected = ["2|1|", "2|1|3", "2|1 3|", "2|3|1!", "2|3|1", "2|3|", "2|3|"];
        assert_eq!(steps(&mut scene), expected);
        assert_eq!(operation(&scene).phase, Phase::Done);
    }

    #[test]
    fn a_copy_that_leaves_is_as_good_as_others_until_these_keep_up() {
        let mut scene = Scene::new(1, &[2, 3], 4, 1);
        begun(&mut scene, 2, None);
        scene.pass(1);
        assert_eq!(short(&scene.follow()), "1|2 3|4");
        scene.pass(1);
        assert_eq!(short(&scene.follow()), "1|2 3 4|");
        scene.goes(3);
        scene.pass(1);
        assert_eq!(scene.wish(), None, "only two of three would be there");
        scene.stores.get_mut(&StoreId(3)).unwrap().up = true;
        scene.pass(1);
        assert_eq!(short(&scene.follow()), "1|3 4|2!");
    }

    #[test]
    fn a_store_that_shall_take_over_and_dies_is_waited_for_and_then_given_up() {
        let mut scene = Scene::new(1, &[2], 4, 1);
        begun(&mut scene, 1, Some(3));
        scene.pass(1);
        assert_eq!(short(&scene.follow()), "1|2|3");
        scene.goes(3);
        scene.pass(299);
        assert_eq!(scene.wish(), None);
        assert!(waits_for(&scene.record, &scene.view()).ends_with("store 00000003 is down since 299 s"));
        scene.pass(1);
        scene.follow();
        let text = "store 00000003 has been down for 300 s; copies that have changed places stay there";
        assert_eq!((operation(&scene).phase, operation(&scene).reason.as_str()), (Phase::Aborted, text));
        assert_eq!(short(&scene.follow()), "1|2|");
        assert_eq!(scene.wish(), None);
        // Without one that is named, another one takes over.
        let mut scene = Scene::new(1, &[2], 4, 1);
        begun(&mut scene, 1, None);
        scene.pass(1);
        assert_eq!(short(&scene.follow()), "1|2|3");
        scene.goes(3);
        scene.pass(300);
        assert_eq!(short(&scene.follow()), "1|2|3 4");
        steps(&mut scene);
        assert_eq!((operation(&scene).phase, short(&scene.record.shards[0])), (Phase::Done, "4|2|".to_owned()));
    }

    #[test]
    fn nobody_leads_for_a_store_with_the_only_copy_that_dies_on_the_way() {
        let mut scene = Scene::new(1, &[], 2, 0);
        begun(&mut scene, 1, Some(2));
        for expected in ["1||2", "1|2|"] {
            scene.pass(1);
            assert_eq!(short(&scene.follow()), expected);
        }
        scene.goes(1);
        scene.pass(299);
        assert_eq!(scene.wish(), None, "the other may lack something");
        let mut back = Scene { record: scene.record.clone(), standing: scene.standing.clone(), ..scene };
        back.pass(1);
        back.follow();
        let text = "store 00000001 has been down for 300 s, and nobody else has all of shard 0";
        assert_eq!((operation(&back).phase, operation(&back).reason.as_str()), (Phase::Aborted, text));
        assert_eq!(short(&back.record.shards[0]), "1|2|");
        // The same while it hands over; the one that takes over has not begun.
        let mut scene = Scene::new(1, &[], 2, 0);
        begun(&mut scene, 1, Some(2));
        for expected in ["1||2", "1|2|", "2<-1|1|"] {
            scene.pass(1);
            assert_eq!(short(&scene.follow()), expected);
        }
        scene.goes(1);
        for _ in 0..9 {
            scene.now += std::time::Duration::from_secs(1);
            scene.say(2, scene.at(2, 1, 50), false, false);
            assert_eq!(scene.wish(), None);
        }
        // It is back, and the other has died: what it has nobody else can have but that one.
        scene.stores.get_mut(&StoreId(1)).unwrap().up = true;
        scene.goes(2);
        scene.now += std::time::Duration::from_secs(9);
        scene.say(1, scene.at(1, 1, 50), false, false);
        assert_eq!(scene.wish(), None);
    }

    #[test]
    fn few_shards_are_handed_over_at_a_time_and_all_in_the_end() {
        let mut scene = Scene::new(9, &[2], 3, 0);
        begun(&mut scene, 1, None);
        let mut most = 0;
        for _ in 0..90 {
            scene.pass(1);
            // Each shard speaks under its own epoch.
            for store in 1..=3 {
                let epoch = scene.record.epoch.0;
                scene.say(store, scene.at(store, epoch, 50), true, true);
            }
            if scene.wish().is_none() {
                break;
            }
            scene.follow();
            most = most.max(scene.record.shards.iter().filter(|shard| shard.previous != NOBODY).count());
        }
        assert_eq!((operation(&scene).phase, most), (Phase::Done, 4));
        assert!(scene.record.shards.iter().all(|shard| shard.copies().count() == 2 && shard.primary != StoreId(1)));
        let leads = |store: u32| scene.record.shards_of(StoreId(store)).count();
        assert!(leads(2).abs_diff(leads(3)) <= 1, "{} and {}", leads(2), leads(3));
    }

    #[test]
    fn when_it_is_aborted_what_has_not_changed_places_stays() {
        let mut scene = Scene::new(2, &[2], 3, 1);
        begun(&mut scene, 1, Some(3));
        scene.pass(1);
        scene.follow();
        assert!(scene.record.shards.iter().all(|shard| shard.learners == stores(&[3])));
        scene.record = scene.record.abort("it was asked for").unwrap();
        scene.pass(1);
        scene.follow();
        assert!(scene.record.shards.iter().all(|shard| short(shard) == "1|2|"));
        assert_eq!((scene.wish(), next(&scene.record, &scene.view())), (None, None));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        let mut scene = Scene::new(2, &[2], 4, 1);
        let first = [(3, None), (1, Some(1)), (1, Some(9)), (1, Some(2))];
        let mut wrong: Vec<String> = first.into_iter().map(|(store, with)| refused(&scene, store, with)).collect();
        scene.goes(3);
        wrong.push(refused(&scene, 1, Some(3)));
        let four = scene.stores.get_mut(&StoreId(4)).unwrap();
        (four.older, four.candidate.free_disk_bytes) = (true, 1000);
        wrong.push(refused(&scene, 1, Some(4)));
        wrong.push(refused(&scene, 1, None));
        scene.stores.get_mut(&StoreId(4)).unwrap().older = false;
        scene.standing.change(|_, heard| heard.status.bytes = 500);
        wrong.push(refused(&scene, 1, Some(4)));
        scene.standing.change(|_, heard| heard.status.bytes = 1000);
        wrong.push(refused(&scene, 1, None));
        scene.standing.change(|_, heard| heard.status.bytes = 0);
        scene.record.shards[1].replicas.clear();
        scene.goes(1);
        wrong.push(refused(&scene, 1, None));
        scene.stores.get_mut(&StoreId(1)).unwrap().up = true;
        begun(&mut scene, 1, Some(4));
        wrong.push(refused(&scene, 1, None));
        let expected = [
            "store 00000003 has no copy of keyspace a; nothing was changed",
            "store 00000001 cannot take its own place; nothing was changed",
            "there is no store 00000009; nothing was changed",
            "store 00000002 has a copy of shard 0 of keyspace a already; nothing was changed",
            "store 00000003 is down; nothing was changed",
            "store 00000004 runs an older version that does not know copies; nothing was changed",
            "2 copies of keyspace a need as many stores without store 00000001, and 1 are up; nothing was changed",
            "store 00000004 has 1000 bytes free, and 1000 would come to it; nothing was changed",
            "no store that is up and has 1000 bytes free is without a copy of shard 0 of keyspace a; nothing was changed",
            "store 00000001 is down and has the only copy of shard 1 of keyspace a; nothing was changed",
            "an operation of keyspace a is under way; nothing was changed",
        ];
        assert_eq!(wrong, expected);
        assert_eq!(scene.record.epoch, Epoch(2));
        assert_eq!(
            waits_for(&scene.record, &scene.view()),
            "2 copies on store 00000001 of 2 shards, 0 copies are being made, 0 shards get another primary"
        );
    }
}
