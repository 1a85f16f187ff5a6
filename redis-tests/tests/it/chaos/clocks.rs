//! A store whose clock is two minutes ahead or behind, and then others take over from it, and it from them.

use redis_tests::clock::Clock;
use redis_tests::eventually::eventually_within;
use redis_tests::{Cluster, heavy};

use super::{
    KEYSPACE, ONE_COPY, RECOVERY_PATIENCE, Rounds, Safety, THREE_COPIES, TWO_SAFE_COPIES, Trial, make_primary,
};

const SHIFT_SECONDS: i64 = 120;

/// The store with a clock of its own.
const SHIFTED: usize = 0;

fn shift(safety: Safety) {
    let _turn = heavy();
    let Some(clock) = Clock::new() else { return };
    let builder = Cluster::builder().store_environment(SHIFTED, &clock.environment);
    let Some(mut trial) = Trial::begin("a clock is wrong", builder, safety) else { return };
    let mut rounds = Rounds::new(2);
    while rounds.another() {
        trial.start_load();
        let seconds = if rounds.number().is_multiple_of(2) { SHIFT_SECONDS } else { -SHIFT_SECONDS };
        trial.event(format!("the clock of store-{SHIFTED} is {seconds} s ahead"));
        clock.set(seconds);
        trial.go_on();
        if safety.copies > 1 {
            lead_all_copies(&mut trial, SHIFTED);
            trial.go_on();
        }
        trial.event(format!("kill -9 store-{SHIFTED}"));
        trial.cluster.stores[SHIFTED].kill_9();
        if safety.copies > 1 {
            trial.go_on();
        }
        trial.event(format!("store-{SHIFTED} is started again"));
        trial.cluster.stores[SHIFTED].start_again();
        trial.wait_until_whole();
        trial.go_on();
        // What the others wrote by their clocks is not shadowed by its own.
        if safety.copies > 1 {
            lead_all_copies(&mut trial, SHIFTED);
            trial.go_on();
        }
        clock.set(0);
        trial.event("the clock is right");
        trial.go_on();
        trial.check();
    }
    trial.end();
}

/// It leads every shard of which it has a copy.
fn lead_all_copies(trial: &mut Trial, store: usize) {
    trial.event(format!("store-{store} takes over all shards"));
    let places = eventually_within(RECOVERY_PATIENCE, "the gateway answers", || trial.places(KEYSPACE));
    for (shard, place) in places.iter().enumerate() {
        if place.primary == Some(store) || place.replicas.contains(&store) {
            make_primary(&trial.cluster, KEYSPACE, shard, store);
        }
    }
}

#[test]
fn a_clock_that_is_wrong_hides_nothing() {
    shift(ONE_COPY);
}

#[test]
fn a_clock_that_is_wrong_hides_nothing_where_two_copies_must_agree() {
    shift(TWO_SAFE_COPIES);
}

#[test]
fn a_clock_that_is_wrong_hides_nothing_after_a_failover() {
    shift(THREE_COPIES);
}
