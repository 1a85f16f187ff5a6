//! Faults of all kinds in a random order, each before the last one is recovered from.

use std::time::Duration;

use redis_tests::network::{Fault, Network, part};
use redis_tests::{Cluster, heavy};

use super::{KEYSPACE, ONE_COPY, Rounds, SHARDS, Safety, THREE_COPIES, TWO_COPIES, TWO_SAFE_COPIES, Trial};

/// Faults between two checks of all histories.
const FAULTS_PER_ROUND: usize = 6;

/// Shorter and longer than leases, deadlines and what makes a store count as down.
const FAULT_MILLISECONDS: std::ops::Range<u64> = 50..4_000;

fn storm(safety: Safety) {
    let _turn = heavy();
    // Without one the rest is done.
    let builder = match Network::new() {
        Some(network) => Cluster::builder().network(network),
        None => Cluster::builder(),
    };
    let Some(mut trial) = Trial::begin("a storm", builder, safety) else { return };
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        trial.start_load();
        for _ in 0..FAULTS_PER_ROUND {
            fault(&mut trial);
            let calm = Duration::from_millis(trial.random.u64(0..1_500));
            trial.go_on_for(calm);
        }
        trial.event("calm");
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
    trial.end();
}

/// One fault, from its beginning to its end.
fn fault(trial: &mut Trial) {
    let time = Duration::from_millis(trial.random.u64(FAULT_MILLISECONDS));
    let store = trial.random.usize(..trial.cluster.stores.len());
    let hosts = trial.cluster.hosts.clone();
    match (trial.random.u8(..9), &hosts) {
        (0 | 1, _) => {
            trial.event(format!("kill -9 store-{store} for {time:?}"));
            trial.cluster.stores[store].kill_9();
            trial.go_on_for(time);
            trial.cluster.stores[store].start_again();
        }
        (2, _) => {
            trial.event(format!("store-{store} hangs for {time:?}"));
            trial.cluster.stores[store].freeze();
            trial.go_on_for(time);
            trial.cluster.stores[store].thaw();
        }
        (3, _) => {
            trial.event(format!("store-{store} is restarted"));
            assert!(trial.cluster.stores[store].terminate().success());
            trial.cluster.stores[store].start_again();
        }
        (4, _) => {
            trial.event(format!("kill -9 the master for {time:?}"));
            trial.cluster.master.kill_9();
            trial.go_on_for(time);
            trial.cluster.master.start_again();
        }
        (5, _) => {
            trial.event(format!("the master hangs for {time:?}"));
            trial.cluster.master.freeze();
            trial.go_on_for(time);
            trial.cluster.master.thaw();
        }
        (6, Some(hosts)) => {
            let host = &hosts.stores[store];
            let others: Vec<_> = hosts.all().filter(|other| *other != host).collect();
            trial.event(format!("store-{store} is cut off for {time:?}"));
            part(&[host], &others);
            trial.go_on_for(time);
            hosts.heal();
        }
        (7, Some(hosts)) => {
            let others: Vec<_> = hosts.all().filter(|other| **other != hosts.stores[store]).collect();
            let receiver = others[trial.random.usize(..others.len())];
            trial.event(format!("nothing of store-{store} arrives at {} for {time:?}", receiver.address));
            receiver.receive_with(Fault::Drop, &hosts.stores[store]);
            trial.go_on_for(time);
            hosts.heal();
        }
        // With one copy it is refused.
        (_, _) => {
            let shard = trial.random.usize(..SHARDS).to_string();
            trial.event(format!("shard {shard} is handed over, if it can be"));
            let reply = trial.cluster.connect(0).call(&["KEYSPACE", "FAILOVER", KEYSPACE, "SHARD", &shard]);
            eprintln!("    {}", reply.text());
        }
    }
}

#[test]
fn a_storm_over_one_copy() {
    storm(ONE_COPY);
}

#[test]
fn a_storm_over_two_copies() {
    storm(TWO_COPIES);
}

#[test]
fn a_storm_over_two_copies_that_must_agree_loses_nothing() {
    storm(TWO_SAFE_COPIES);
}

#[test]
fn a_storm_over_three_copies_loses_nothing() {
    storm(THREE_COPIES);
}
