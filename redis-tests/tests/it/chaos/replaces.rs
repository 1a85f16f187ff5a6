//! A store that lives or one that is dead gives its copies of a keyspace to another one, while clients work.

use redis_tests::{Cluster, Value, heavy};

use super::company::{Company, Failures};
use super::operation::End;
use super::{KEYSPACE, ONE_COPY, Rounds, Safety, THREE_COPIES, TWO_SAFE_COPIES, Trial};

/// More than stores, so that the one that goes has several.
const SHARDS: usize = 5;

impl Trial {
    /// The shards of which a store has a copy.
    fn copies_of(&self, store: usize) -> Vec<i64> {
        let places = self.places(KEYSPACE).unwrap();
        let is_there =
            |place: &&redis_tests::cluster::ShardPlace| place.primary == Some(store) || place.replicas.contains(&store);
        places.iter().filter(is_there).map(|place| place.shard).collect()
    }

    fn replace(&mut self, from: usize, to: Option<usize>) {
        let (from_id, to_id) =
            (self.cluster.store_id(from).to_owned(), to.map(|to| self.cluster.store_id(to).to_owned()));
        let mut words = vec!["REPLACE", KEYSPACE, "STORE", &from_id];
        words.extend(to_id.iter().flat_map(|id| ["WITH", id.as_str()]));
        let before = self.copies_of(from);
        let operation = self.begin_operation(&words);
        let (status, end) = self.follow_operation(&operation, |_| ());
        assert_eq!(end, End::Done, "{}", status.line());
        redis_tests::eventually!("the gateway knows that it has none any more", self.copies_of(from).is_empty());
        if let Some(to) = to {
            let now = self.copies_of(to);
            assert!(before.iter().all(|shard| now.contains(shard)), "{before:?} went to {now:?}");
        }
    }
}

/// There and back again: with a store named, and without.
fn replace_a_live_store(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin_with("a store is replaced", Cluster::builder(), safety, SHARDS) else { return };
    trial.may_lose = false;
    let newcomer = trial.cluster.add_store();
    let company = Company::start(&trial.cluster, trial.seed, Failures::AreWrong);
    let (mut from, mut to) = (trial.random.usize(..newcomer), newcomer);
    let mut rounds = Rounds::new(2);
    while rounds.another() {
        trial.start_load();
        // Of four stores with three copies the one that has none is the only one left to choose.
        let named = (rounds.number().is_multiple_of(2) || safety.copies < 3).then_some(to);
        trial.replace(from, named);
        trial.wait_for_shards(SHARDS);
        trial.go_on();
        trial.check();
        (from, to) = (to, from);
    }
    company.end();
    let totals = trial.end();
    assert_eq!(totals.failed(), 0, "{totals:?}");
}

#[test]
fn a_live_store_with_the_only_copies_is_replaced() {
    replace_a_live_store(ONE_COPY);
}

#[test]
fn a_live_store_of_two_copies_is_replaced() {
    replace_a_live_store(TWO_SAFE_COPIES);
}

#[test]
fn a_live_store_of_three_copies_is_replaced() {
    replace_a_live_store(THREE_COPIES);
}

fn replace_a_dead_store(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin_with("a dead store is replaced", Cluster::builder(), safety, SHARDS) else {
        return;
    };
    let newcomer = trial.cluster.add_store();
    let company = Company::start(&trial.cluster, trial.seed, Failures::AreCounted);
    let (mut dead, mut other) = (trial.random.usize(..newcomer), newcomer);
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        trial.start_load();
        trial.event(format!("kill -9 store-{dead}"));
        trial.cluster.stores[dead].kill_9();
        redis_tests::eventually!(60 s, "it is known to be down", {
            let stores = trial.cluster.connect(0).call(&["STORES"]).elements().unwrap();
            let id = trial.cluster.store_id(dead);
            let of = |store: &Value, name: &str| store.field(name).map(|value| value.text()).unwrap_or_default();
            stores.iter().any(|store| of(store, "id") == id && of(store, "state") == "down")
        });
        trial.replace(dead, Some(other));
        trial.wait_until_whole();
        trial.go_on();
        trial.event(format!("store-{dead} is started again"));
        trial.cluster.stores[dead].start_again();
        // What it still has of them goes.
        trial.wait_for_shards(SHARDS);
        trial.check();
        (dead, other) = (other, dead);
    }
    company.end();
    trial.end();
}

#[test]
fn a_dead_store_of_two_copies_is_replaced() {
    replace_a_dead_store(TWO_SAFE_COPIES);
}

#[test]
fn a_dead_store_of_three_copies_is_replaced() {
    replace_a_dead_store(THREE_COPIES);
}

#[test]
fn what_cannot_be_replaced_is_refused_with_the_reason() {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin_with("refused", Cluster::builder(), ONE_COPY, SHARDS) else { return };
    let idle = trial.cluster.add_store();
    let ids: Vec<String> = (0..4).map(|store| trial.cluster.store_id(store).to_owned()).collect();
    let refused = |trial: &Trial, words: &[&str]| {
        let mut command = vec!["KEYSPACE", "REPLACE", KEYSPACE, "STORE"];
        command.extend_from_slice(words);
        let reply = trial.cluster.connect(0).call(&command);
        assert!(reply.is_error(), "{words:?} is accepted: {}", reply.text());
        eprintln!("  {words:?}: {}", reply.text());
    };
    refused(&trial, &[&ids[idle]]);
    refused(&trial, &["0000000z"]);
    refused(&trial, &["7fffffff"]);
    refused(&trial, &[&ids[0], "WITH", "7fffffff"]);
    refused(&trial, &[&ids[0], "WITH", &ids[0]]);
    trial.cluster.stores[0].kill_9();
    redis_tests::eventually!(60 s, "it is known to be down", {
        trial.places(KEYSPACE).unwrap().iter().any(|place| place.primary == Some(0) && !place.is_up)
    });
    // Nobody else has what it has.
    refused(&trial, &[&ids[0], "WITH", &ids[idle]]);
    refused(&trial, &[&ids[1], "WITH", &ids[0]]);
    trial.cluster.stores[0].start_again();
    trial.wait_until_whole();
    trial.end();
}
