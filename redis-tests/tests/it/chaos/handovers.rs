//! Planned failovers under load: nothing is lost, whatever may be lost when a primary dies.

use redis_tests::{Cluster, heavy};

use super::{KEYSPACE, Rounds, SHARDS, Safety, THREE_COPIES, TWO_COPIES, Trial, make_primary};

fn hand_over(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin("shards are handed over", Cluster::builder(), safety) else { return };
    trial.may_lose = false;
    let mut rounds = Rounds::new(2);
    while rounds.another() {
        trial.start_load();
        for shard in 0..SHARDS {
            let place = trial.places(KEYSPACE).unwrap().remove(shard);
            let target = place.replicas[trial.random.usize(..place.replicas.len())];
            trial.event(format!("shard {shard} is handed over from {:?} to {target}", place.primary));
            make_primary(&trial.cluster, KEYSPACE, shard, target);
            trial.go_on();
        }
        trial.wait_until_whole();
        trial.check();
    }
    let totals = trial.end();
    assert_eq!(totals.unknown, 0, "a planned change leaves nobody in doubt: {totals:?}");
}

#[test]
fn shards_of_two_copies_are_handed_over_and_nothing_is_lost() {
    hand_over(TWO_COPIES);
}

#[test]
fn shards_of_three_copies_are_handed_over_and_nothing_is_lost() {
    hand_over(THREE_COPIES);
}
