//! Masters that are killed, away and frozen: the data path does not need them.

use std::time::Duration;

use redis_tests::seed::number_from_environment;
use redis_tests::{Cluster, Node, eventually, heavy};

use super::{KEYSPACE, ONE_COPY, Rounds, Safety, THREE_COPIES, Trial};

/// `VASTO_CHAOS_SECONDS` makes a minute of it.
fn away() -> Duration {
    let long = number_from_environment::<u64>("VASTO_CHAOS_SECONDS").is_some();
    Duration::from_secs(if long { 60 } else { 10 })
}

fn kill_the_master(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin("the master is killed", Cluster::builder(), safety) else { return };
    let mut rounds = Rounds::new(2);
    while rounds.another() {
        trial.start_load();
        trial.event("kill -9 the master");
        trial.cluster.master.kill_9();
        if rounds.number() % 2 == 1 {
            trial.go_on_for(away());
        }
        trial.event("the master is started again");
        trial.cluster.master.start_again();
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
    let totals = trial.end();
    assert_eq!(totals.failed(), 0, "{totals:?}");
}

#[test]
fn no_operation_fails_while_the_master_is_away() {
    kill_the_master(ONE_COPY);
}

#[test]
fn no_operation_on_three_copies_fails_while_the_master_is_away() {
    kill_the_master(THREE_COPIES);
}

/// The term under which a master led last; 0 if it never did.
fn term(master: &Node) -> u64 {
    let log = master.log();
    let led = log.lines().rev().find(|line| line.contains("this master leads"));
    let term = led.and_then(|line| line.split("term=").nth(1)).unwrap_or("0");
    let digits: String = term.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// The one that leads hangs, a primary dies meanwhile, so the other one must act; then the first goes on with what it knew before.
fn freeze_the_leader(safety: Safety) {
    let _turn = heavy();
    let builder = Cluster::builder().masters(2);
    let Some(mut trial) = Trial::begin("a master hangs", builder, safety) else { return };
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        trial.start_load();
        let terms: Vec<u64> = trial.cluster.masters().map(term).collect();
        let leader = usize::from(terms[1] > terms[0]);
        let log = |trial: &Trial, number: usize| trial.cluster.masters().nth(number).unwrap().log();
        trial.event(format!("master {leader} hangs, of terms {terms:?}"));
        trial.cluster.masters().nth(leader).unwrap().freeze();
        trial.go_on_for(Duration::from_secs(2));
        let killed = (safety.copies > 1).then(|| trial.some_primary());
        if let Some(store) = killed {
            trial.event(format!("kill -9 store-{store}"));
            trial.cluster.stores[store].kill_9();
        }
        trial.go_on_for(Duration::from_secs(8));
        trial.go_on();
        let before = log(&trial, leader).len();
        trial.event("it goes on");
        trial.cluster.masters().nth(leader).unwrap().thaw();
        eventually!(60 s, "the stale master says so", log(&trial, leader)[before..].contains("steps back from term"));
        trial.go_on();
        if let Some(store) = killed {
            trial.event(format!("store-{store} is started again"));
            trial.cluster.stores[store].start_again();
        }
        trial.wait_until_whole();
        let seen = |trial: &Trial, gateway: usize| {
            let mut connection = trial.cluster.connect(gateway);
            let places = trial.cluster.places(&mut connection, KEYSPACE).unwrap();
            places.iter().map(|place| (place.epoch, place.primary)).collect::<Vec<_>>()
        };
        eventually!(60 s, "both gateways know the same owners", seen(&trial, 0) == seen(&trial, 1));
        trial.check();
    }
    let totals = trial.end();
    assert!(safety.copies > 1 || totals.failed() == 0, "{totals:?}");
}

#[test]
fn of_two_masters_the_one_that_was_frozen_steps_back() {
    freeze_the_leader(ONE_COPY);
}

#[test]
fn the_second_master_fails_over_and_the_one_that_was_frozen_steps_back() {
    freeze_the_leader(THREE_COPIES);
}
