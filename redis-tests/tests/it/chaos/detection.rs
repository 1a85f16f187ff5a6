//! The check itself: what a server would do wrong is done behind its back to a healthy one, and must be found.

use std::time::Duration;

use redis_tests::{Cluster, Connection, Value, heavy};

use super::company::{Company, Failures, gone, staying};
use super::{KEYSPACE, ONE_COPY, Trial, wrong};

/// Runs a load, does `harm` to its keys from outside while it runs, and gives what the check says.
fn after(harm: impl Fn(&mut Connection, &str)) -> Vec<String> {
    let _turn = heavy();
    let mut trial = Trial::begin("harm is done", Cluster::builder(), ONE_COPY).unwrap();
    trial.start_load();
    let mut connection = trial.cluster.connect(0);
    connection.done(&["SELECT", KEYSPACE]);
    for group in 0..super::GROUPS {
        // The first two of a group hold texts, the last one counts.
        for place in [0, 3] {
            harm(&mut connection, &format!("{{l1:{group}}}:{place}:0"));
        }
    }
    trial.go_on();
    let mut history = trial.load.take().unwrap().stop();
    history.read_back(&trial.cluster.address(0), KEYSPACE, trial.start);
    let wrong = wrong(&history, &trial.events);
    eprintln!("{} keys are wrong, the first of them:\n{}", wrong.len(), wrong.first().map_or("", String::as_str));
    wrong
}

fn counters(wrong: &[String]) -> usize {
    wrong.iter().filter(|text| text.contains(" counts ")).count()
}

#[test]
fn a_load_that_nothing_happens_to_is_right() {
    assert_eq!(after(|_, _| ()), Vec::<String>::new());
}

#[test]
fn a_lost_write_is_found() {
    let wrong = after(|connection, key| match connection.call(&["DECR", key]) {
        Value::Integer(_) => {}
        _ => drop(connection.done(&["SETRANGE", key, "0", "lost"])),
    });
    assert!(counters(&wrong) >= super::GROUPS, "{wrong:?}");
    assert!(wrong.len() > 2 * super::GROUPS, "{wrong:?}");
}

#[test]
fn an_increment_that_is_made_twice_is_found() {
    let wrong = after(|connection, key| drop(connection.call(&["INCR", key])));
    assert!(counters(&wrong) >= super::GROUPS, "{wrong:?}");
}

#[test]
fn a_key_that_is_gone_is_found() {
    let wrong = after(|connection, key| drop(connection.done(&["DEL", key])));
    assert!(counters(&wrong) >= super::GROUPS, "{wrong:?}");
}

/// The same for the clients beside the load.
fn after_in_company(harm: impl Fn(&mut Connection)) -> Vec<String> {
    let _turn = heavy();
    let mut trial = Trial::begin("harm is done to the company", Cluster::builder(), ONE_COPY).unwrap();
    let company = Company::start(&trial.cluster, trial.seed, Failures::AreWrong);
    trial.start_load();
    let mut connection = trial.cluster.connect(0);
    connection.done(&["SELECT", KEYSPACE]);
    // Each of them has begun, and has time to meet what was done.
    trial.go_on_for(Duration::from_millis(1_500));
    harm(&mut connection);
    trial.go_on_for(Duration::from_millis(1_500));
    let (wrong, failures) = company.stop();
    assert_eq!(failures, Vec::<String>::new());
    eprintln!("{} answers are wrong, the first of them: {}", wrong.len(), wrong.first().map_or("", String::as_str));
    wrong
}

#[test]
fn a_company_that_nothing_happens_to_is_right() {
    assert_eq!(after_in_company(|_| ()), Vec::<String>::new());
}

#[test]
fn keys_that_go_and_come_back_are_found_by_the_company() {
    let wrong = after_in_company(|connection| {
        connection.done(&["DEL", &staying(7)]);
        connection.done(&["SET", &gone(7), "back"]);
        connection.done(&["MSET", "{pair:0}:1", "0", "watched:0", "0"]);
        // Until it falls between a MSET and its MGET.
        for _ in 0..500 {
            connection.done(&["SET", "batch:7", "0"]);
        }
        connection.done(&["PERSIST", "lasting:7"]);
    });
    for part in ["a walk: ", "a batch: ", "a transaction: ", "gone:7 is back", "lasting:7 expires at", "KEYS missed"] {
        assert!(wrong.iter().any(|text| text.contains(part)), "nobody said '{part}': {wrong:#?}");
    }
}
