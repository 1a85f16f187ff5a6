//! Stores that are killed, stopped for a while and restarted, one, some and all of them.

use std::time::Duration;

use redis_tests::cluster::ShardPlace;
use redis_tests::eventually::eventually_within;
use redis_tests::{Cluster, heavy};

use super::{KEYSPACE, ONE_COPY, RECOVERY_PATIENCE, Rounds, Safety, THREE_COPIES, TWO_COPIES, TWO_SAFE_COPIES, Trial};

/// Without its restart the shards of a store are somewhere else after a while, or, with one copy, nowhere.
const DEAD_FOR: Duration = Duration::from_secs(6);

fn kill_a_primary(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin("a primary is killed", Cluster::builder(), safety) else { return };
    let mut rounds = Rounds::new(2);
    while rounds.another() {
        trial.start_load();
        let store = trial.some_primary();
        // At once, and then only after others had to take over.
        let at_once = rounds.number() % 2 == 1;
        trial.event(format!("kill -9 store-{store}"));
        trial.cluster.stores[store].kill_9();
        if !at_once {
            trial.go_on_for(DEAD_FOR);
            if safety.copies > 1 {
                // All shards are served by the others.
                trial.go_on();
            }
        }
        trial.event(format!("store-{store} is started again"));
        trial.cluster.stores[store].start_again();
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
    trial.end();
}

#[test]
fn a_store_with_the_only_copies_is_killed_and_returns_with_all_of_them() {
    kill_a_primary(ONE_COPY);
}

#[test]
fn a_primary_of_two_copies_is_killed() {
    kill_a_primary(TWO_COPIES);
}

/// The other copy goes on with reads; writes are refused until there are two copies again.
#[test]
fn a_primary_of_two_copies_that_must_agree_is_killed_and_nothing_is_lost() {
    kill_a_primary(TWO_SAFE_COPIES);
}

#[test]
fn a_primary_of_three_copies_is_killed_and_nothing_is_lost() {
    kill_a_primary(THREE_COPIES);
}

/// Both copies are needed for a write, and one is gone for good: reads go on, and writes do when there is another copy elsewhere.
#[test]
fn writes_go_on_when_a_lost_copy_was_made_again_elsewhere() {
    let _turn = heavy();
    let builder = Cluster::builder().master_option("--replace-after", "4");
    let Some(mut trial) = Trial::begin("a copy is replaced", builder, TWO_SAFE_COPIES) else { return };
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        // What only the lost store had would have to wait for it: a write is answered when both copies have it.
        let mut connection = trial.cluster.connect(0);
        connection.call(&["SELECT", KEYSPACE]);
        eventually_within(RECOVERY_PATIENCE, "every shard has two copies", || {
            let answers = (0..64).map(|key| connection.call(&["SET", &format!("whole:{key}"), "1"]).text());
            answers.collect::<Vec<_>>().iter().all(|answer| answer == "OK").then_some(()).ok_or("a write is refused")
        });
        trial.start_load();
        let store = trial.some_primary();
        trial.event(format!("kill -9 store-{store} until it is replaced"));
        trial.cluster.stores[store].kill_9();
        eventually_within(RECOVERY_PATIENCE, "every shard has its copies elsewhere", || {
            let places = trial.places(KEYSPACE)?;
            let elsewhere = |place: &ShardPlace| {
                place.primary.is_some_and(|primary| primary != store)
                    && place.replicas.iter().any(|replica| *replica != store)
            };
            if places.iter().all(elsewhere) { Ok(()) } else { Err(format!("{places:?}")) }
        });
        trial.event("every copy is made again");
        trial.go_on();
        trial.event(format!("store-{store} is started again"));
        trial.cluster.stores[store].start_again();
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
    trial.end();
}

fn freeze_a_primary(safety: Safety, times: &[Duration]) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin("a primary hangs", Cluster::builder(), safety) else { return };
    let mut rounds = Rounds::new(times.len());
    while rounds.another() {
        trial.start_load();
        let time = times[rounds.number() % times.len()];
        let store = trial.some_primary();
        trial.event(format!("store-{store} hangs for {time:?}"));
        trial.cluster.stores[store].freeze();
        trial.go_on_for(time);
        trial.event(format!("store-{store} goes on"));
        trial.cluster.stores[store].thaw();
        trial.go_on();
        trial.wait_until_whole();
        trial.check();
    }
    trial.end();
}

#[test]
fn a_store_with_the_only_copies_hangs() {
    freeze_a_primary(ONE_COPY, &[Duration::from_secs(1), Duration::from_secs(7)]);
}

#[test]
fn a_primary_of_two_copies_hangs() {
    freeze_a_primary(TWO_COPIES, &[Duration::from_secs(1), Duration::from_secs(10)]);
}

#[test]
fn a_primary_of_three_copies_hangs_and_nothing_is_lost() {
    freeze_a_primary(THREE_COPIES, &[Duration::from_secs(1), Duration::from_secs(10)]);
}

fn kill_all(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin("all stores are killed", Cluster::builder(), safety) else { return };
    let mut rounds = Rounds::new(3);
    while rounds.another() {
        trial.start_load();
        trial.event("kill -9 all stores");
        for store in &mut trial.cluster.stores {
            store.kill_9();
        }
        let mut order: Vec<usize> = (0..trial.cluster.stores.len()).collect();
        trial.random.shuffle(&mut order);
        trial.event(format!("stores are started again in the order {order:?}"));
        for store in order {
            trial.cluster.stores[store].start_again_without_waiting();
            let apart = Duration::from_millis(trial.random.u64(..1500));
            trial.go_on_for(apart);
        }
        for store in &mut trial.cluster.stores {
            store.wait_ready(redis_tests::node::READY_TIMEOUT);
        }
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
    trial.end();
}

#[test]
fn all_stores_are_killed_and_return_with_the_only_copies() {
    kill_all(ONE_COPY);
}

#[test]
fn all_stores_of_two_copies_are_killed() {
    kill_all(TWO_COPIES);
}

#[test]
fn all_stores_of_three_copies_are_killed_and_nothing_is_lost() {
    kill_all(THREE_COPIES);
}

/// SIGTERM to one process after the other.
fn restart_everything(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin("a rolling restart", Cluster::builder(), safety) else { return };
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        trial.start_load();
        for store in 0..trial.cluster.stores.len() {
            trial.event(format!("store-{store} is restarted"));
            assert!(trial.cluster.stores[store].terminate().success());
            trial.cluster.stores[store].start_again();
            trial.wait_until_whole();
            trial.go_on();
        }
        for gateway in 0..trial.cluster.gateways.len() {
            trial.event(format!("gateway-{gateway} is restarted"));
            assert!(trial.cluster.gateways[gateway].terminate().success());
            trial.cluster.gateways[gateway].start_again();
            trial.go_on();
        }
        trial.event("the master is restarted");
        assert!(trial.cluster.master.terminate().success());
        trial.cluster.master.start_again();
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
    trial.end();
}

#[test]
fn everything_is_restarted_with_one_copy() {
    restart_everything(ONE_COPY);
}

#[test]
fn everything_is_restarted_with_two_copies() {
    restart_everything(TWO_COPIES);
}

#[test]
fn everything_is_restarted_with_three_copies_and_nothing_is_lost() {
    restart_everything(THREE_COPIES);
}
