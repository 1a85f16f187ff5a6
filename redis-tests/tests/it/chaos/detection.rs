//! The check itself: what a server would do wrong is done behind its back to a healthy one, and must be found.

use redis_tests::{Cluster, Connection, Value, heavy};

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
