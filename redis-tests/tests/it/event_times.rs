//! Writes that come late, come again, or come while the clock is wrong: what is acknowledged stays, what is deleted stays deleted.

use std::time::{SystemTime, UNIX_EPOCH};

use redis_tests::clock::{Clock, seconds_behind};
use redis_tests::{Connection, Server, Value};

/// Keys of each scenario, so that all shards have some.
const KEYS: u32 = 20;

fn deletion(connection: &mut Connection, key: &str, event_time: u64) -> Value {
    connection.call(&["DEL", key, "EVENTTIME", &event_time.to_string()])
}

fn late_put(connection: &mut Connection, key: &str, event_time: u64) -> Value {
    connection.call(&["SET", key, "late", "EVENTTIME", &event_time.to_string()])
}

/// Leaves every kind of row that a late write can meet, its event time being 200.
fn write_scenarios(connection: &mut Connection) {
    for number in 0..KEYS {
        let key = |scenario: &str| format!("{scenario}:{number}");
        assert_eq!(late_put(connection, &key("alive"), 200), Value::ok());
        assert_eq!(late_put(connection, &key("deleted"), 100), Value::ok());
        assert_eq!(deletion(connection, &key("deleted"), 200), Value::Integer(1));
        assert_eq!(deletion(connection, &key("absent"), 200), Value::Integer(0));
        let expired = ["SET", &key("expired"), "v", "PXAT", "1", "EVENTTIME", "200"];
        assert_eq!(connection.call(&expired), Value::ok());
        assert_eq!(connection.call(&["SET", &key("plain"), "v"]), Value::ok());
        assert_eq!(connection.call(&["SET", &key("plain-deleted"), "v"]), Value::ok());
        assert_eq!(connection.call(&["DEL", &key("plain-deleted")]), Value::Integer(1));
        assert_eq!(connection.call(&["DEL", &key("plain-absent")]), Value::Integer(0));
    }
}

/// Late writes change nothing, and what is seen is what the scenarios left. `refused`: how a write is answered whose key has no row.
fn check_scenarios(connection: &mut Connection, refused: impl Fn(&Value) -> bool) {
    for number in 0..KEYS {
        for (scenario, seen) in [
            ("alive", Some("late")),
            ("deleted", None),
            ("absent", None),
            ("expired", None),
            ("plain", Some("v")),
            ("plain-deleted", None),
            ("plain-absent", None),
        ] {
            let key = format!("{scenario}:{number}");
            let answer = late_put(connection, &key, 150);
            match seen {
                Some(_) => assert_eq!(answer, Value::Nil, "{key}"),
                None => assert!(refused(&answer), "{key}: {}", answer.text()),
            }
            assert_eq!(deletion(connection, &key, 150), Value::Integer(0), "{key}");
            assert_eq!(connection.call(&["GET", &key]), seen.map_or(Value::Nil, Value::bulk), "{key}");
        }
    }
}

fn compact(connection: &mut Connection) {
    assert_eq!(connection.call(&["KEYSPACE", "COMPACT", "0"]), Value::ok());
}

#[test]
fn late_writes_change_nothing_after_compaction_and_kill_9() {
    let mut server = Server::start_with(&["--stores", "2", "--shards", "3"]);
    let older = |answer: &Value| *answer == Value::Nil;
    write_scenarios(&mut server.connect());
    check_scenarios(&mut server.connect(), older);
    compact(&mut server.connect());
    check_scenarios(&mut server.connect(), older);
    server.node.kill_9();
    server.node.start_again();
    check_scenarios(&mut server.connect(), older);
    compact(&mut server.connect());
    assert!(server.node.terminate().success());
    server.node.start_again();
    let mut connection = server.connect();
    check_scenarios(&mut connection, older);
    for number in 0..KEYS {
        for scenario in ["alive", "deleted", "absent", "expired"] {
            let key = format!("{scenario}:{number}");
            assert_eq!(late_put(&mut connection, &key, 201), Value::ok(), "{key}");
            assert_eq!(connection.call(&["OBJECT", "EVENTTIME", &key]), Value::Integer(201));
        }
    }
}

/// With no grace the tombstones are gone at once: the server does not know any more, and says that instead of guessing.
#[test]
fn late_writes_are_refused_when_the_tombstones_are_gone() {
    let mut server = Server::start_with(&["--shards", "3", "--gc-grace", "0"]);
    write_scenarios(&mut server.connect());
    compact(&mut server.connect());
    let refused = |answer: &Value| *answer == Value::Nil || answer.text().starts_with("TOOOLD ");
    check_scenarios(&mut server.connect(), refused);
    for _ in 0..2 {
        server.node.kill_9();
        server.node.start_again();
        // No row is left in any cache.
        check_scenarios(&mut server.connect(), |answer| answer.text().starts_with("TOOOLD "));
    }
    let info = server.connect().done(&["INFO", "vasto"]).text();
    let figures = info.lines().find(|line| line.starts_with("vasto_keyspace_0:")).expect("the figures of keyspace 0");
    assert!(figures.contains(",rows_estimate=40,"), "only what is alive is left: {figures}");
}

#[test]
fn a_clock_that_is_set_back_two_minutes_loses_no_acknowledged_write() {
    let Some(clock) = Clock::new() else { return };
    let mut server = Server::start_in(&["--shards", "2"], &clock.environment);
    let mut connection = server.connect();
    let keys: Vec<String> = (0..200).map(|number| format!("k:{number}")).collect();
    for key in &keys {
        connection.done(&["MSET", key, "before", &format!("{key}:counter"), "1"]);
        connection.done(&["SET", &format!("{key}:gone"), "before"]);
    }
    let event_time = |key: &str, connection: &mut Connection| {
        connection.done(&["OBJECT", "EVENTTIME", key]).integer().expect("the key exists")
    };
    let before: Vec<i64> = keys.iter().map(|key| event_time(key, &mut connection)).collect();

    clock.set(-120);
    let behind = seconds_behind(&mut connection);
    assert!((100..=140).contains(&behind), "the server's clock is {behind} s behind");
    let write = |round: &str, connection: &mut Connection| {
        for key in &keys {
            assert_eq!(connection.call(&["SET", key, round]), Value::ok());
            connection.done(&["INCR", &format!("{key}:counter")]);
            connection.done(&["DEL", &format!("{key}:gone")]);
            assert_eq!(connection.call(&["SET", &format!("{key}:{round}"), round, "EX", "1000"]), Value::ok());
        }
    };
    let check = |rounds: &[&str], connection: &mut Connection| {
        let last = rounds.last().expect("one round at least");
        for key in &keys {
            assert_eq!(connection.call(&["GET", key]), Value::bulk(last), "{key}");
            let counter = connection.call(&["GET", &format!("{key}:counter")]);
            assert_eq!(counter, Value::bulk((rounds.len() + 1).to_string()), "{key}");
            assert_eq!(connection.call(&["EXISTS", &format!("{key}:gone")]), Value::Integer(0), "{key}");
            for round in rounds {
                assert_eq!(connection.call(&["GET", &format!("{key}:{round}")]), Value::bulk(round), "{key}");
            }
        }
    };
    write("back", &mut connection);
    check(&["back"], &mut connection);
    for (key, before) in keys.iter().zip(&before) {
        assert!(event_time(key, &mut connection) > *before, "{key} went back in time");
        // An older event time that a client gives still loses, against values and against tombstones.
        let given = (before - 600_000_000_000).to_string();
        for key in [key.clone(), format!("{key}:gone")] {
            assert_eq!(connection.call(&["SET", &key, "late", "EVENTTIME", &given]), Value::Nil, "{key}");
        }
    }
    // The true time is in this clock's future: an error, not a write that is ignored.
    let given = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos().to_string();
    let answer = connection.call(&["SET", &keys[0], "given", "EVENTTIME", &given]);
    assert!(answer.text().contains("ahead of the store's clock"), "{}", answer.text());

    server.node.kill_9();
    server.node.start_again();
    let mut connection = server.connect();
    check(&["back"], &mut connection);
    write("killed", &mut connection);
    check(&["back", "killed"], &mut connection);
    compact(&mut connection);
    check(&["back", "killed"], &mut connection);
    clock.set(0);
    write("forth", &mut connection);
    check(&["back", "killed", "forth"], &mut connection);
}
