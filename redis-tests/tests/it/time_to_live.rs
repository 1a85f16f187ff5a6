//! Times to live: exact to the millisecond, from a second to the end of time, and the disk space of what has expired.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis_tests::seed::number_from_environment;
use redis_tests::{Connection, Server, Value, heavy};

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_millis()).unwrap()
}

/// Reads a key that expires at `expiry` until it is gone: no answer contradicts the clock by more than a millisecond.
fn watch_expiry(connection: &mut Connection, key: &str, expiry: i64) {
    let mut last_alive = i64::MIN;
    loop {
        let asked = now_ms();
        let answer = connection.call(&["GET", key]);
        let answered = now_ms();
        match answer {
            Value::Nil => {
                assert!(answered >= expiry - 1, "{key} was gone at {answered}, {} ms too early", expiry - answered);
                assert!(asked >= last_alive, "the clock of this machine went back");
                return;
            }
            _ => assert!(asked <= expiry + 1, "{key} was there at {asked}, {} ms too long", asked - expiry),
        }
        last_alive = asked;
    }
}

#[test]
fn expiry_is_exact_to_the_millisecond() {
    let server = Server::start();
    let mut connection = server.connect();
    for round in 0..20 {
        let expiry = now_ms() + 20 + round;
        let key = format!("absolute:{round}");
        connection.done(&["SET", &key, "v", "PXAT", &expiry.to_string()]);
        watch_expiry(&mut connection, &key, expiry);
    }
    // Relative times count from the server's clock: it says itself what it made of them.
    for (key, command) in [
        ("ex", &["SET", "ex", "v", "EX", "1"][..]),
        ("setex", &["SETEX", "setex", "1", "v"]),
        ("psetex", &["PSETEX", "psetex", "1000", "v"]),
    ] {
        let before = now_ms();
        connection.done(command);
        let after = now_ms();
        let expiry = connection.done(&["PEXPIRETIME", key]).integer().unwrap();
        assert!(
            (before + 1000..=after + 1000).contains(&expiry),
            "{key}: {expiry}, written between {before} and {after}"
        );
        watch_expiry(&mut connection, key, expiry);
    }
}

#[test]
fn times_to_live_reach_from_a_second_to_beyond_2038() {
    const DAY_SECONDS: i64 = 86_400;
    let mut server = Server::start();
    let mut connection = server.connect();
    let relative: Vec<i64> = vec![60, 3_600, DAY_SECONDS, 30 * DAY_SECONDS, 365 * DAY_SECONDS, 200 * 365 * DAY_SECONDS];
    // The end of 32 bits of seconds, signed and unsigned, a far year, and the last millisecond that SET takes.
    let absolute = [i64::from(i32::MAX) * 1000, i64::from(u32::MAX) * 1000 + 1, 253_402_300_799_999, i64::MAX];
    let (mut relative_expiries, now) = (Vec::new(), now_ms());
    for seconds in &relative {
        let key = format!("relative:{seconds}");
        connection.done(&["SET", &key, "v", "EX", &seconds.to_string()]);
        let expiry = connection.done(&["PEXPIRETIME", &key]).integer().unwrap();
        assert!((now + seconds * 1000..=now_ms() + seconds * 1000).contains(&expiry), "{key}: {expiry}");
        relative_expiries.push((key, expiry));
    }
    for expiry in absolute {
        connection.done(&["SET", &format!("absolute:{expiry}"), "v", "PXAT", &expiry.to_string()]);
    }
    for _ in 0..2 {
        for (key, expiry) in &relative_expiries {
            assert_eq!(connection.call(&["PEXPIRETIME", key]), Value::Integer(*expiry));
            let left = connection.done(&["PTTL", key]).integer().unwrap();
            assert!(left > 0 && left <= expiry - now, "{key}: {left}");
        }
        for expiry in absolute {
            let key = format!("absolute:{expiry}");
            assert_eq!(connection.call(&["GET", &key]), Value::bulk("v"), "{key}");
            assert_eq!(connection.call(&["PEXPIRETIME", &key]), Value::Integer(expiry));
        }
        assert_eq!(connection.call(&["KEYSPACE", "COMPACT", "0"]), Value::ok());
        server.node.kill_9();
        server.node.start_again();
        connection = server.connect();
    }
}

/// Neither the expiry of an earlier value nor a compaction that buries it takes a later write away.
#[test]
fn expiry_never_beats_a_later_write() {
    let mut server = Server::start_with(&["--shards", "2"]);
    let mut connection = server.connect();
    let keys: Vec<String> = (0..200).map(|number| format!("k:{number}")).collect();
    let mut later = Connection::open(&server.address());
    for round in 0..5 {
        let value = round.to_string();
        let expiry = now_ms() + 30;
        for key in &keys {
            connection.done(&["SET", key, "mortal", "PXAT", &expiry.to_string()]);
        }
        for key in &keys[..100] {
            connection.done(&["SET", key, &value]);
        }
        watch_expiry(&mut connection, &keys[199], expiry);
        // While a compaction turns them into tombstones.
        connection.send(&redis_tests::resp::command(&["KEYSPACE", "COMPACT", "0"])).unwrap();
        for key in &keys[100..] {
            later.done(&["SET", key, &value]);
        }
        assert_eq!(connection.read_value().unwrap(), Value::ok());
        for key in &keys {
            assert_eq!(later.call(&["GET", key]), Value::bulk(&value), "{key}");
        }
    }
    server.node.kill_9();
    server.node.start_again();
    let mut connection = server.connect();
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(200));
}

/// Bytes of all files below a folder.
fn folder_bytes(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            // A file that a compaction has just replaced.
            Err(_) => 0,
        })
        .sum()
}

/// The value of a figure in the line of keyspace 0 in INFO.
fn figure(connection: &mut Connection, name: &str) -> u64 {
    let info = connection.done(&["INFO", "vasto"]).text();
    let line = info.lines().find(|line| line.starts_with("vasto_keyspace_0:")).expect("the figures of keyspace 0");
    let field = line.split([':', ',']).find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    field.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {line}"))
}

/// `VASTO_EXPIRED_KEYS` keys, 100,000 if it is not set.
#[test]
fn compaction_gives_the_space_of_expired_keys_back() {
    let _turn = heavy();
    let count = number_from_environment("VASTO_EXPIRED_KEYS").unwrap_or(100_000u64);
    let server = Server::start_with(&["--shards", "2"]);
    let mut connection = server.connect();
    connection.set_reply_timeout(Duration::from_secs(600)).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let key = |number: u64| format!("key:{number:08}");
    let write = |connection: &mut Connection, number: u64, random: &mut fastrand::Rng| {
        let value: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(200).collect();
        let command = vec![b"SET".to_vec(), key(number).into_bytes(), value, b"EX".to_vec(), b"1000".to_vec()];
        connection.send(&redis_tests::resp::command(&command)).unwrap();
    };
    const BURST: u64 = 1000;
    let in_bursts = |connection: &mut Connection, send: &mut dyn FnMut(&mut Connection, u64), expected: &Value| {
        for start in (0..count).step_by(BURST as usize) {
            let end = count.min(start + BURST);
            (start..end).for_each(|number| send(connection, number));
            (start..end).for_each(|_| assert_eq!(connection.read_value().unwrap(), *expected));
        }
    };
    in_bursts(&mut connection, &mut |connection, number| write(connection, number, &mut random), &Value::ok());
    assert_eq!(connection.call(&["KEYSPACE", "COMPACT", "0"]), Value::ok());
    let full_bytes = figure(&mut connection, "disk_bytes");
    assert!(full_bytes > 200 * count, "{count} rows of 200 bytes are {full_bytes}");
    // All of them expire in a moment; every tenth is deleted instead.
    let mut expire = |connection: &mut Connection, number: u64| {
        let key = key(number);
        let command = if number.is_multiple_of(10) { vec!["DEL", &key] } else { vec!["PEXPIRE", &key, "1"] };
        connection.send(&redis_tests::resp::command(&command)).unwrap();
    };
    in_bursts(&mut connection, &mut expire, &Value::Integer(1));
    redis_tests::eventually!("the last key is gone", {
        connection.call(&["EXISTS", &key(count - 1)]) == Value::Integer(0)
    });
    assert_eq!(connection.call(&["KEYSPACE", "COMPACT", "0"]), Value::ok());
    let tombstone_bytes = figure(&mut connection, "disk_bytes");
    assert!(figure(&mut connection, "rows_expired_by_compaction") >= count - count / 10);
    assert!(tombstone_bytes < full_bytes / 4, "{full_bytes} bytes became {tombstone_bytes}");
    // The log as well.
    redis_tests::eventually!("the folder has shrunk", folder_bytes(server.data()) < full_bytes / 2);
    let on_disk = folder_bytes(server.data());
    eprintln!("{count} keys: {full_bytes} bytes, expired and compacted {tombstone_bytes} ({on_disk} in the folder)");
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(0));
    drop(server);

    // Without a grace nothing of them stays.
    let server = Server::start_with(&["--shards", "2", "--gc-grace", "0"]);
    let mut connection = server.connect();
    connection.set_reply_timeout(Duration::from_secs(600)).unwrap();
    for number in 0..1000 {
        connection.done(&["SET", &key(number), "v", "PXAT", "1"]);
    }
    assert_eq!(connection.call(&["KEYSPACE", "COMPACT", "0"]), Value::ok());
    assert_eq!(figure(&mut connection, "rows_estimate"), 0);
    assert_eq!(figure(&mut connection, "tombstones_dropped"), 1000);
}
