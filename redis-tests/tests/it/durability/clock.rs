//! The clock is set back by two minutes: no acknowledged write is ignored, and reads see the latest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use redis_tests::cluster::temporary_directory;
use redis_tests::{Connection, Server, Value, eventually};
use tempfile::TempDir;

use super::small_with;

const KEYS: u32 = 300;
const BACK_SECONDS: i64 = 120;

/// A time of day of its own for one server.
struct Clock {
    /// What `shifted_clock.c` reads: seconds, as the machine lays out a number.
    shift: File,
    environment: Vec<(String, String)>,
    _directory: TempDir,
}

impl Clock {
    /// `None`, and said, where there is no C compiler.
    fn new() -> Option<Clock> {
        let directory = temporary_directory();
        let library = compile(directory.path())?;
        let path = directory.path().join("shift");
        fs::write(&path, 0_i64.to_ne_bytes()).unwrap();
        let environment = [("LD_PRELOAD", &library), ("SHIFTED_CLOCK", &path)]
            .map(|(name, path)| (name.to_owned(), path.to_str().unwrap().to_owned()))
            .to_vec();
        let shift = File::options().write(true).open(&path).unwrap();
        Some(Clock { shift, environment, _directory: directory })
    }

    /// In place: the server has the file mapped.
    fn set(&self, seconds: i64) {
        self.shift.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }
}

fn compile(folder: &Path) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/durability/shifted_clock.c");
    let library = folder.join("shifted_clock.so");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).output();
    match compiled {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(library)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            eprintln!("skipped: no C compiler here");
            None
        }
        Err(error) => panic!("cannot run cc: {error}"),
    }
}

/// By how much the server's clock is behind that of the test.
fn seconds_behind(connection: &mut Connection) -> i64 {
    let time = connection.done(&["TIME"]).elements().unwrap();
    let seconds: i64 = time[0].text().parse().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    now - seconds
}

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
