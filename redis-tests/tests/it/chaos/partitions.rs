//! Parts of the network that do not reach each other, in one or both directions, or lose some packets.

use std::time::Duration;

use redis_tests::network::{Fault, Network, part};
use redis_tests::{Cluster, heavy};

use super::{ONE_COPY, Rounds, Safety, THREE_COPIES, TWO_COPIES, Trial};

/// Longer than every lease, deadline and keep-alive, so that all of them are over.
const PARTED_FOR: Duration = Duration::from_secs(8);

fn begin(name: &str, safety: Safety) -> Option<Trial> {
    let network = Network::new()?;
    Trial::begin(name, Cluster::builder().network(network), safety)
}

/// Runs the load while `fault` is on, heals, and checks.
fn faults(trial: &mut Trial, what: &str, mut fault: impl FnMut(&mut Trial)) {
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        trial.start_load();
        trial.event(what);
        fault(trial);
        trial.go_on_for(PARTED_FOR);
        trial.event("healed");
        trial.cluster.hosts.as_ref().unwrap().heal();
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
}

/// The gateway goes on by what it knows; of a new primary it hears from the stores.
fn gateway_from_master(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = begin("a gateway is cut off from the master", safety) else { return };
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        trial.start_load();
        trial.event("gateway-1 is cut off from the master");
        let hosts = trial.cluster.hosts.clone().unwrap();
        part(&[&hosts.gateways[1]], &[&hosts.masters[0]]);
        trial.go_on_for(PARTED_FOR);
        // So far nothing has happened that a gateway would have to be told.
        let before = trial.totals.failed();
        trial.check();
        assert_eq!(trial.totals.failed(), before, "{:?}", trial.totals);
        trial.start_load();
        if safety.copies > 1 {
            let store = trial.some_primary();
            trial.event(format!("kill -9 store-{store}"));
            trial.cluster.stores[store].kill_9();
            trial.go_on_for(PARTED_FOR);
            trial.go_on();
            trial.event(format!("store-{store} is started again"));
            trial.cluster.stores[store].start_again();
        }
        trial.event("healed");
        hosts.heal();
        trial.wait_until_whole();
        trial.go_on();
        trial.check();
    }
    trial.end();
}

#[test]
fn no_operation_fails_while_a_gateway_is_cut_off_from_the_master() {
    gateway_from_master(ONE_COPY);
}

#[test]
fn a_gateway_that_is_cut_off_from_the_master_hears_of_a_failover_from_stores() {
    gateway_from_master(THREE_COPIES);
}

/// A primary with a gateway on its side must not go on without the others, whatever that gateway's clients ask.
fn primary_from_others(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = begin("a primary is cut off from the others", safety) else { return };
    faults(&mut trial, "a store and gateway-1 are cut off from all others", |trial| {
        let store = trial.some_primary();
        let hosts = trial.cluster.hosts.as_ref().unwrap();
        let with_it = [&hosts.stores[store], &hosts.gateways[1]];
        let others: Vec<_> = hosts.all().filter(|host| !with_it.contains(host)).collect();
        part(&with_it, &others);
    });
    trial.end();
}

#[test]
fn a_store_with_the_only_copies_is_cut_off_from_the_others() {
    primary_from_others(ONE_COPY);
}

#[test]
fn a_primary_of_two_copies_is_cut_off_from_the_others() {
    primary_from_others(TWO_COPIES);
}

#[test]
fn a_primary_of_three_copies_is_cut_off_from_the_others_and_nothing_is_lost() {
    primary_from_others(THREE_COPIES);
}

/// Requests arrive and are executed, answers do not: what is sent again would be executed twice.
fn replies_only(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = begin("replies are dropped", safety) else { return };
    faults(&mut trial, "nothing arrives at gateway-0 from a store", |trial| {
        let store = trial.some_primary();
        let hosts = trial.cluster.hosts.as_ref().unwrap();
        hosts.gateways[0].receive_with(Fault::Drop, &hosts.stores[store]);
    });
    trial.end();
}

#[test]
fn no_increment_is_made_twice_when_replies_are_dropped() {
    replies_only(ONE_COPY);
}

#[test]
fn no_increment_of_three_copies_is_made_twice_when_replies_are_dropped() {
    replies_only(THREE_COPIES);
}

fn some_packets(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = begin("5 % of all packets are lost", safety) else { return };
    faults(&mut trial, "every host loses 5 % of what arrives", |trial| {
        let hosts = trial.cluster.hosts.as_ref().unwrap();
        for here in hosts.all() {
            for there in hosts.all().filter(|there| *there != here) {
                here.receive_with(Fault::Lose(5), there);
            }
        }
    });
    trial.end();
}

#[test]
fn nothing_is_wrong_when_packets_are_lost() {
    some_packets(ONE_COPY);
}

#[test]
fn nothing_of_three_copies_is_wrong_when_packets_are_lost() {
    some_packets(THREE_COPIES);
}
