//! The clock is set back by two minutes: no acknowledged write is ignored, and reads see the latest.

use redis_tests::clock::{Clock, seconds_behind};
use redis_tests::{Connection, Server, Value, eventually};

use super::small_with;

const KEYS: u32 = 300;
const BACK_SECONDS: i64 = 120;

fn is_two_minutes_behind(connection: &mut Connection) -> bool {
    (BACK_SECONDS - 10..=BACK_SECONDS + 10).contains(&seconds_behind(connection))
}

/// Writes of all kinds, each of which must be seen at once; `era` tells those of one time from those of another.
fn write_and_read(connection: &mut Connection, era: &str) {
    for number in 0..KEYS {
        let (key, value) = (format!("key:{number}"), format!("{era}:{number}"));
        match number % 5 {
            0 => {
                connection.done(&["SET", &key, &value]);
            }
            1 => {
                connection.done(&["DEL", &key]);
                assert_eq!(connection.call(&["SET", &key, &value, "NX"]), Value::ok(), "{key} was deleted");
            }
            2 => {
                connection.done(&["SET", &key, "", "EX", "10000"]);
                assert_eq!(connection.call(&["APPEND", &key, &value]), Value::Integer(value.len() as i64));
            }
            3 => {
                connection.done(&["MSET", &key, &value]);
            }
            _ => {
                connection.done(&["GETSET", &key, &value]);
            }
        }
        assert_eq!(connection.call(&["GET", &key]), Value::bulk(&value), "{key} right after it was written");
    }
    connection.done(&["INCR", "counter"]);
    connection.done(&["SET", "deleted", era]);
    assert_eq!(connection.call(&["DEL", "deleted"]), Value::Integer(1));
}

fn check(connection: &mut Connection, era: &str, count: i64) {
    for number in 0..KEYS {
        let (key, value) = (format!("key:{number}"), format!("{era}:{number}"));
        assert_eq!(connection.call(&["GET", &key]), Value::bulk(&value), "{key}");
    }
    assert_eq!(connection.call(&["GET", "counter"]).text(), count.to_string());
    assert_eq!(connection.call(&["EXISTS", "deleted"]), Value::Integer(0));
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(i64::from(KEYS) + 1));
}

#[test]
fn a_clock_set_back_while_a_server_is_down_hides_no_write() {
    let Some(clock) = Clock::new() else { return };
    let mut server = Server::start_in(&small_with(&["--shards", "2"]), &clock.environment);
    write_and_read(&mut server.connect(), "before");
    for (number, kill) in [false, true].into_iter().enumerate() {
        // The later stop, the older the clock: two minutes back each time.
        if kill {
            server.node.kill_9();
        } else {
            assert!(server.node.terminate().success());
        }
        clock.set(-BACK_SECONDS * (number as i64 + 1));
        server.node.start_again();
        let mut connection = server.connect();
        let behind = seconds_behind(&mut connection);
        assert!(behind >= BACK_SECONDS * (number as i64 + 1) - 10, "the clock is only {behind} s behind");
        let era = if number == 0 { "before" } else { "after 1" };
        check(&mut connection, era, number as i64 + 1);
        write_and_read(&mut connection, &format!("after {}", number + 1));
        check(&mut connection, &format!("after {}", number + 1), number as i64 + 2);
    }
    server.node.kill_9();
    server.node.start_again();
    check(&mut server.connect(), "after 2", 3);
    // In the right time again.
    server.node.kill_9();
    server.node.set_environment(&[]);
    server.node.start_again();
    let mut connection = server.connect();
    check(&mut connection, "after 2", 3);
    write_and_read(&mut connection, "today");
    check(&mut connection, "today", 4);
}

#[test]
fn a_clock_set_back_under_a_running_server_hides_no_write() {
    let Some(clock) = Clock::new() else { return };
    let mut server = Server::start_in(&small_with(&["--shards", "2"]), &clock.environment);
    let mut connection = server.connect();
    write_and_read(&mut connection, "before");
    clock.set(-BACK_SECONDS);
    eventually!("the server sees the older clock", is_two_minutes_behind(&mut connection));
    check(&mut connection, "before", 1);
    write_and_read(&mut connection, "after");
    check(&mut connection, "after", 2);
    server.node.kill_9();
    server.node.start_again();
    let mut connection = server.connect();
    check(&mut connection, "after", 2);
    write_and_read(&mut connection, "later");
    check(&mut connection, "later", 3);
}

/// A flush is a stamp; rows below it are dead. A write after it must be above it whatever the clock says.
#[test]
fn what_is_written_after_a_flush_lives_though_the_clock_was_set_back() {
    let Some(clock) = Clock::new() else { return };
    let mut server = Server::start_in(&small_with(&["--shards", "2"]), &clock.environment);
    let mut connection = server.connect();
    write_and_read(&mut connection, "before");
    connection.done(&["FLUSHALL"]);
    clock.set(-BACK_SECONDS);
    eventually!("the server sees the older clock", is_two_minutes_behind(&mut connection));
    write_and_read(&mut connection, "after");
    check(&mut connection, "after", 1);
    connection.done(&["FLUSHALL"]);
    server.node.kill_9();
    clock.set(-2 * BACK_SECONDS);
    server.node.start_again();
    let mut connection = server.connect();
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(0));
    write_and_read(&mut connection, "later");
    check(&mut connection, "later", 1);
    server.node.kill_9();
    server.node.start_again();
    check(&mut server.connect(), "later", 1);
}
