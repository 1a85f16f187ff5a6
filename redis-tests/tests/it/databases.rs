//! Databases as Redis clients know them, numbers for SELECT: several at a time, against redis-server.

use std::collections::BTreeSet;

use redis_tests::seed::seeded;
use redis_tests::{Address, Cluster, Connection, RedisServer, Server, Value, heavy};

const STEPS: usize = 6_000;
/// Some of Redis's sixteen.
const NUMBERS: [&str; 5] = ["0", "1", "2", "9", "15"];
const KEYS: [&str; 4] = ["a", "b", "key:1", "{t}x"];

#[test]
fn one_shard_a_database_answers_as_redis_server_does() {
    let server = Server::start();
    compare("databases of one shard", &server.address());
}

#[test]
fn many_shards_a_database_answer_as_redis_server_does() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(2).shards(4).start();
    compare("databases of many shards", &cluster.address(0));
}

fn compare(name: &str, ours: &Address) {
    let redis = RedisServer::start_with(&["--databases", "16"]);
    let mut seeded = seeded(name);
    let random = &mut seeded.random;
    // Two clients of each: what one chooses is not the other's.
    let mut pairs: Vec<(Connection, Connection)> = (0..2).map(|_| (redis.connect(), Connection::open(ours))).collect();
    for step in 0..STEPS {
        let number = NUMBERS[random.usize(..NUMBERS.len())];
        let (key, other) = (KEYS[random.usize(..KEYS.len())], KEYS[random.usize(..KEYS.len())]);
        let value = random.u32(..50).to_string();
        let command: Vec<&str> = match random.u32(..100) {
            0..20 => vec!["SELECT", number],
            20..40 => vec!["SET", key, &value],
            40..55 => vec!["GET", key],
            55..60 => vec!["INCR", key],
            60..65 => vec!["DEL", key, other],
            65..70 => vec!["EXISTS", key, other, key],
            70..75 => vec!["DBSIZE"],
            75..80 => vec!["KEYS", "*"],
            80..83 => vec!["SCAN", "0", "COUNT", "100"],
            83..85 => vec!["FLUSHDB"],
            85 => vec!["FLUSHALL"],
            86..89 => vec!["INFO", "keyspace"],
            89..92 => vec!["DUMP", key],
            92 => vec!["RESET"],
            93 => vec!["SELECT", "16"],
            94 => vec!["SELECT", "-1"],
            95 => vec!["COPY", key, key, "DB", "99"],
            96 => vec!["CLIENT", "INFO"],
            97 => vec!["CONFIG", "GET", "databases"],
            98 => vec!["RANDOMKEY"],
            _ => vec!["MGET", key, other],
        };
        let client = random.usize(..pairs.len());
        let (theirs, ours) = &mut pairs[client];
        let (expected, got) = (theirs.call(&command), ours.call(&command));
        let same = match command[0] {
            "KEYS" => as_set(&expected) == as_set(&got),
            "SCAN" => as_set(&expected.elements().unwrap()[1]) == as_set(&got.elements().unwrap()[1]),
            // Any key of the database.
            "RANDOMKEY" => (expected == Value::Nil) == (got == Value::Nil),
            // Of the whole line only the database is the same.
            "CLIENT" => database(&expected) == database(&got),
            _ => expected == got,
        };
        assert!(same, "seed {}, step {step}: {command:?}: {} instead of {}", seeded.seed, got.text(), expected.text());
    }
    refused(ours);
    transactions(&redis, ours);
}

fn as_set(value: &Value) -> BTreeSet<String> {
    value.elements().unwrap_or_default().iter().map(Value::text).collect()
}

fn database(client_info: &Value) -> Option<String> {
    client_info.text().split(' ').find(|field| field.starts_with("db=")).map(str::to_owned)
}

/// What redis-server does with two databases at once, and we do not.
fn refused(ours: &Address) {
    let mut connection = Connection::open(ours);
    connection.done(&["SET", "moved", "1"]);
    for command in [vec!["MOVE", "moved", "1"], vec!["SWAPDB", "0", "1"], vec!["COPY", "moved", "moved", "DB", "1"]] {
        let answer = connection.call(&command);
        assert!(answer.text().contains("databases have shards of their own"), "{command:?}: {}", answer.text());
    }
    assert_eq!(connection.call(&["GET", "moved"]), Value::bulk("1"));
    assert_eq!(connection.call(&["COPY", "{moved}", "{moved}2", "DB", "0"]), Value::Integer(0));
    // The way round.
    let dumped = connection.call(&["DUMP", "moved"]);
    connection.done(&["SELECT", "1"]);
    connection.done(&[&b"RESTORE"[..], b"moved", b"0", dumped.bytes().unwrap(), b"REPLACE"]);
    assert_eq!(connection.call(&["GET", "moved"]), Value::bulk("1"));
}

/// Watched keys are those of the database in which they were watched; SELECT inside a transaction counts from there on.
fn transactions(redis: &RedisServer, ours: &Address) {
    let run = |connection: &mut Connection, other: &mut Connection| {
        let mut answers = Vec::new();
        let mut call = |command: &[&str]| answers.push(connection.call(command));
        call(&["SELECT", "2"]);
        call(&["SET", "w", "1"]);
        call(&["WATCH", "w"]);
        // Another database: not the same key.
        other.done(&["SELECT", "1"]);
        other.done(&["SET", "w", "2"]);
        call(&["MULTI"]);
        call(&["INCR", "w"]);
        call(&["EXEC"]);
        call(&["WATCH", "w"]);
        other.done(&["SELECT", "2"]);
        other.done(&["SET", "w", "7"]);
        call(&["MULTI"]);
        call(&["INCR", "w"]);
        call(&["EXEC"]);
        call(&["SELECT", "1"]);
        call(&["MULTI"]);
        call(&["SELECT", "2"]);
        call(&["INCR", "w"]);
        call(&["EXEC"]);
        call(&["GET", "w"]);
        answers
    };
    let expected = run(&mut redis.connect(), &mut redis.connect());
    let got = run(&mut Connection::open(ours), &mut Connection::open(ours));
    assert_eq!(got, expected);
    // A database that does not exist yet is not created inside.
    let mut connection = Connection::open(ours);
    connection.done(&["MULTI"]);
    connection.call(&["SELECT", "11"]);
    connection.call(&["SET", "w", "1"]);
    let answer = connection.call(&["EXEC"]).text();
    assert!(answer.contains("database 11 does not exist yet; SELECT it once before MULTI"), "{answer}");
    assert_eq!(connection.call(&["GET", "w"]), Value::Nil, "nothing went into another database");
}
