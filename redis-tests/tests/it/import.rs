//! `vasto import` of files that a real redis-server wrote.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use redis_tests::node::binary;
use redis_tests::seed::{Seeded, seeded};
use redis_tests::{Connection, RedisServer, Server, Value};

/// Runs `vasto import FILE --to SERVER OPTIONS…`.
fn import(file: &Path, server: &Server, options: &[&str]) -> Output {
    let to = server.address().to_string();
    let output = Command::new(binary()).arg("import").arg(file).args(["--to", &to]).args(options).output();
    output.unwrap()
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn complained(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Strings as Redis encodes them in every way, some with an expiry.
fn fill_strings(connection: &mut Connection, count: usize) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let Seeded { mut random, .. } = seeded("import");
    let mut strings = BTreeMap::new();
    for number in 0..count {
        let key = match number % 5 {
            0 => number.to_string().into_bytes(),
            1 => format!("{}:{number}", "compressible".repeat(10)).into_bytes(),
            2 => [&(number as u32).to_be_bytes()[..], b"\x00\r\n\xff"].concat(),
            _ => format!("key:{number}").into_bytes(),
        };
        let value = match number % 8 {
            0 => Vec::new(),
            1 => random.i8(..).to_string().into_bytes(),
            2 => random.i16(..).to_string().into_bytes(),
            3 => random.i32(..).to_string().into_bytes(),
            4 => random.i64(..).to_string().into_bytes(),
            5 => (0..random.usize(..500)).map(|_| random.u8(..)).collect(),
            6 => (0..random.usize(..20_000)).map(|_| random.u8(b'a'..b'd')).collect(),
            _ => b"to be or not to be ".repeat(random.usize(..100)),
        };
        let when = (33_177_117_420_000 + number).to_string();
        let mut command = vec![&b"SET"[..], &key, &value];
        if number % 3 == 0 {
            command.extend([&b"PXAT"[..], when.as_bytes()]);
        }
        connection.done(&command);
        strings.insert(key, value);
    }
    let large = vec![b'L'; 20_000_000];
    connection.done(&[&b"SET"[..], b"large", &large]);
    strings.insert(b"large".to_vec(), large);
    strings
}

/// One or more values of every other type, in each of their encodings.
fn fill_collections(connection: &mut Connection) {
    let long = "x".repeat(100_000);
    let mut add = |name: &str, key: &str, words: &[&str]| {
        let mut command = vec![name, key];
        command.extend(words);
        connection.done(&command);
    };
    add("RPUSH", "list:small", &["a", "2"]);
    add("RPUSH", "list:long", &[&long, "b", &long]);
    add("SADD", "set:numbers", &["1", "70000", "5000000000"]);
    add("SADD", "set:words", &["a", "b"]);
    add("HSET", "hash:small", &["field", "1"]);
    add("HSET", "hash:large", &["field", &long]);
    add("ZADD", "sorted:small", &["1.5", "a", "-inf", "b"]);
    add("ZADD", "sorted:large", &["1", &long, "inf", "b"]);
    add("XADD", "stream", &["1-1", "field", "value"]);
    add("XADD", "stream", &["1-2", "field", "value"]);
    add("XADD", "stream", &["2-1", "other", "value"]);
    add("XDEL", "stream", &["1-2"]);
    connection.done(&["XGROUP", "CREATE", "stream", "group", "0"]);
    connection.done(&["XREADGROUP", "GROUP", "group", "consumer", "COUNT", "1", "STREAMS", "stream", ">"]);
    connection.done(&["XGROUP", "CREATECONSUMER", "stream", "group", "idle"]);
    connection.done(&["FUNCTION", "LOAD", "#!lua name=mine\nredis.register_function('f', function() return 1 end)"]);
}

const COLLECTIONS: &str = "not imported: 2 of type list\nnot imported: 2 of type set\nnot imported: 2 of type sorted set\n\
                           not imported: 2 of type hash\nnot imported: 1 of type stream\n\
                           not imported: 1 libraries of functions\n";

/// Has redis-server write its file.
fn saved(redis: &RedisServer) -> PathBuf {
    redis.connect().done(&["SAVE"]);
    redis.directory().join("dump.rdb")
}

fn check(strings: &BTreeMap<Vec<u8>, Vec<u8>>, theirs: &mut Connection, ours: &mut Connection) {
    for (key, value) in strings {
        assert_eq!(ours.call(&[&b"GET"[..], key]).bytes(), Some(value.as_slice()), "{}", key.escape_ascii());
        let expiry = [&b"PEXPIRETIME"[..], key];
        assert_eq!(ours.call(&expiry), theirs.call(&expiry), "{}", key.escape_ascii());
    }
    assert_eq!(ours.call(&["DBSIZE"]), Value::Integer(strings.len() as i64));
}

#[test]
fn every_string_comes_over_and_what_does_not_is_counted() {
    let redis = RedisServer::start_with(&["--databases", "16"]);
    let mut theirs = redis.connect();
    // Nothing is removed before it is written.
    theirs.done(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]);
    let strings = fill_strings(&mut theirs, 3_000);
    fill_collections(&mut theirs);
    theirs.done(&["SET", "gone", "1", "PX", "1"]);
    let mut others = redis.connect();
    others.done(&["SELECT", "3"]);
    others.done(&["MSET", "in three", "1", "large", "small"]);
    others.done(&["RPUSH", "list of three", "a"]);
    let file = saved(&redis);

    let server = Server::start_with(&["--stores", "2", "--shards", "5"]);
    let mut ours = server.connect();
    let output = import(&file, &server, &[]);
    assert_eq!(output.status.code(), Some(3), "{}", complained(&output));
    let expected = format!(
        "imported: 3001 strings, 1000 of them with an expiry\nskipped: 1 strings that have expired\n\
         {COLLECTIONS}not imported: 3 keys of database 3\n"
    );
    assert_eq!(printed(&output), expected);
    check(&strings, &mut theirs, &mut ours);

    // Again, and all that is left out is left out knowingly.
    let output = import(&file, &server, &["--skip-other-types", "--skip-other-databases", "--existing", "keep"]);
    assert_eq!(output.status.code(), Some(0), "{}", complained(&output));
    assert!(printed(&output).starts_with("imported: 0 strings\nkept: 3001 keys that existed already\n"));
    let output = import(&file, &server, &["--existing", "refuse"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(complained(&output).contains("exists already"), "{}", complained(&output));
    assert!(printed(&output).starts_with("imported: 0 strings"), "{}", printed(&output));

    // Each into its own.
    ours.done(&["FLUSHALL"]);
    let output = import(&file, &server, &["--keep-databases", "--skip-other-types"]);
    assert_eq!(output.status.code(), Some(0), "{}", complained(&output));
    check(&strings, &mut theirs, &mut ours);
    let mut third = server.connect();
    third.done(&["SELECT", "3"]);
    assert_eq!(third.call(&["GET", "in three"]), Value::bulk("1"));
    assert_eq!(third.call(&["GET", "large"]), Value::bulk("small"));
    assert_eq!(third.call(&["DBSIZE"]), Value::Integer(2));

    // Both databases into one keyspace; the later one wins.
    ours.done(&["FLUSHALL"]);
    let output = import(&file, &server, &["--database", "0,3", "--skip-other-types"]);
    assert_eq!(output.status.code(), Some(0), "{}", complained(&output));
    assert_eq!(ours.call(&["GET", "in three"]), Value::bulk("1"));
    assert_eq!(ours.call(&["GET", "large"]), Value::bulk("small"));
    assert_eq!(ours.call(&["DBSIZE"]), Value::Integer(3002));
}

#[test]
fn files_without_compression_and_checksum_come_over_too() {
    let redis = RedisServer::start_with(&["--rdbcompression", "no", "--rdbchecksum", "no"]);
    let mut theirs = redis.connect();
    let strings = fill_strings(&mut theirs, 200);
    let server = Server::start();
    let output = import(&saved(&redis), &server, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", complained(&output));
    check(&strings, &mut theirs, &mut server.connect());
}

#[test]
fn a_damaged_file_changes_nothing_unless_it_shall() {
    let redis = RedisServer::start();
    let mut theirs = redis.connect();
    let strings = fill_strings(&mut theirs, 1_000);
    let file = saved(&redis);
    let whole = std::fs::read(&file).unwrap();
    let server = Server::start();
    let mut ours = server.connect();
    let bad = redis.directory().join("bad.rdb");

    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (what, bytes) in [("cut", &whole[..whole.len() / 3]), ("flipped", flipped.as_slice())] {
        std::fs::write(&bad, bytes).unwrap();
        let output = import(&bad, &server, &[]);
        assert_eq!(output.status.code(), Some(1), "{what}");
        let text = complained(&output);
        assert!(
            text.contains("nothing was imported") && text.contains("bad.rdb") && text.contains("at byte "),
            "{text}"
        );
        assert_eq!(ours.call(&["DBSIZE"]), Value::Integer(0), "{what}");
    }

    std::fs::write(&bad, &whole[..whole.len() / 3]).unwrap();
    let output = import(&bad, &server, &["--unchecked"]);
    assert_eq!(output.status.code(), Some(1));
    let text = complained(&output);
    assert!(text.contains(&format!("at byte {}: it ends in the middle of a value", whole.len() / 3)), "{text}");
    let imported = ours.call(&["DBSIZE"]).integer().unwrap();
    assert!((1..strings.len() as i64).contains(&imported), "{imported} keys");
    assert!(printed(&output).starts_with(&format!("imported: {imported} strings")), "{}", printed(&output));

    // What cannot be opened or reached.
    let output = import(Path::new("/nowhere/dump.rdb"), &server, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(complained(&output).contains("cannot open /nowhere/dump.rdb"), "{}", complained(&output));
    drop(server);
    let nobody = redis_tests::node::free_address();
    let output = Command::new(binary()).arg("import").arg(&file).args(["--to", &nobody]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(complained(&output).contains(&format!("cannot connect to {nobody}")), "{}", complained(&output));
}
