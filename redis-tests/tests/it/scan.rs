//! Whole walks with SCAN: nothing is missed, and in a quiet keyspace nothing comes twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redis_tests::seed::seeded;
use redis_tests::{Address, Cluster, Connection, Server, Value, heavy};

/// No walk of these tests has so many pages unless it runs in a circle.
const PAGES_MAX: usize = 200_000;

struct Page {
    cursor: String,
    keys: Vec<Vec<u8>>,
}

fn page(connection: &mut Connection, cursor: &str, options: &[&str]) -> Page {
    let mut command = vec!["SCAN", cursor];
    command.extend_from_slice(options);
    let reply = connection.done(&command).elements().unwrap();
    let cursor = reply[0].text();
    assert!(cursor.parse::<u64>().is_ok_and(|cursor| cursor < 1 << 53), "cursor {cursor}");
    let keys = reply[1].elements().unwrap();
    Page { cursor, keys: keys.iter().map(|key| key.bytes().unwrap().to_vec()).collect() }
}

/// How often each key came.
fn walk(connection: &mut Connection, options: &[&str]) -> BTreeMap<Vec<u8>, usize> {
    let mut found = BTreeMap::new();
    let mut cursor = "0".to_owned();
    for _ in 0..PAGES_MAX {
        let page = page(connection, &cursor, options);
        for key in page.keys {
            *found.entry(key).or_default() += 1;
        }
        cursor = page.cursor;
        if cursor == "0" {
            return found;
        }
    }
    panic!("SCAN {options:?} does not end");
}

fn load(connection: &mut Connection, keys: &BTreeSet<Vec<u8>>) {
    let keys: Vec<&Vec<u8>> = keys.iter().collect();
    for chunk in keys.chunks(200) {
        let commands: Vec<Vec<Vec<u8>>> =
            chunk.iter().map(|key| vec![b"SET".to_vec(), key.to_vec(), b"v".to_vec()]).collect();
        for reply in connection.pipeline(&commands).unwrap() {
            assert_eq!(reply, Value::ok());
        }
    }
}

/// Keys of many slots, of one crowded slot, and odd ones.
fn keys() -> BTreeSet<Vec<u8>> {
    let mut keys = BTreeSet::new();
    for number in 0..3_000 {
        keys.insert(format!("key:{number}").into_bytes());
        keys.insert(format!("{{crowd}}:{number}").into_bytes());
    }
    for byte in 0..=255 {
        keys.insert(vec![byte]);
        keys.insert(vec![byte, 0, byte]);
    }
    keys.insert(Vec::new());
    keys.insert(vec![b'x'; 60_000]);
    keys
}

fn every_key_once(connection: &mut Connection) {
    let keys = keys();
    load(connection, &keys);
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(keys.len() as i64));
    for options in [
        &[][..],
        &["COUNT", "1"],
        &["COUNT", "7"],
        &["COUNT", "1000"],
        &["COUNT", "1000000"],
        &["MATCH", "*", "COUNT", "100"],
        &["TYPE", "string", "COUNT", "100"],
    ] {
        let found = walk(connection, options);
        let twice: Vec<String> = found
            .iter()
            .filter(|(_, count)| **count > 1)
            .map(|(key, count)| format!("{} x{count}", key.escape_ascii()))
            .collect();
        assert!(
            twice.is_empty(),
            "SCAN {options:?}: {} keys came again: {:?}",
            twice.len(),
            &twice[..twice.len().min(5)]
        );
        let found: BTreeSet<Vec<u8>> = found.into_keys().collect();
        assert_eq!(found.len(), keys.len(), "SCAN {options:?}");
        assert!(found == keys, "SCAN {options:?}: other keys");
    }
    assert!(walk(connection, &["TYPE", "list"]).is_empty());
}

#[test]
fn every_key_comes_once_from_one_shard() {
    every_key_once(&mut Server::start().connect());
}

#[test]
fn every_key_comes_once_from_many_shards() {
    every_key_once(&mut Server::start_with(&["--stores", "3", "--shards", "7"]).connect());
}

#[test]
fn a_pattern_gives_what_a_filter_gives() {
    let server = Server::start_with(&["--stores", "2", "--shards", "5"]);
    let mut connection = server.connect();
    let keys: BTreeSet<Vec<u8>> = (0..2_000)
        .flat_map(|number| {
            [
                format!("user:{number}"),
                format!("{{user}}:{number}"),
                format!("order:{number}:item"),
                format!("{{{number}}}"),
                format!("a{{b}}c{number}"),
            ]
        })
        .map(String::into_bytes)
        .collect();
    load(&mut connection, &keys);
    let by = |predicate: &dyn Fn(&str) -> bool| -> BTreeSet<Vec<u8>> {
        keys.iter().filter(|key| predicate(std::str::from_utf8(key).unwrap())).cloned().collect()
    };
    let cases: Vec<(&str, BTreeSet<Vec<u8>>)> = vec![
        ("user:1*", by(&|key| key.starts_with("user:1"))),
        ("user:199", by(&|key| key == "user:199")),
        ("{user}:*", by(&|key| key.starts_with("{user}:"))),
        ("{user}:19?", by(&|key| key.starts_with("{user}:19") && key.len() == 10)),
        ("{1*", by(&|key| key.starts_with("{1"))),
        ("{12}", by(&|key| key == "{12}")),
        ("a{b}c1*", by(&|key| key.starts_with("a{b}c1"))),
        ("*:item", by(&|key| key.ends_with(":item"))),
        ("*", keys.clone()),
        ("order:[12]:*", by(&|key| key == "order:1:item" || key == "order:2:item")),
        ("\\user:5", by(&|key| key == "user:5")),
        ("us\\er:5*", by(&|key| key.starts_with("user:5"))),
        ("none*", BTreeSet::new()),
        ("", BTreeSet::new()),
    ];
    for (pattern, expected) in cases {
        for count in ["3", "1000"] {
            let found = walk(&mut connection, &["MATCH", pattern, "COUNT", count]);
            assert!(found.values().all(|count| *count == 1), "MATCH {pattern}: a key came twice");
            let found: BTreeSet<Vec<u8>> = found.into_keys().collect();
            assert_eq!(found.len(), expected.len(), "MATCH {pattern} COUNT {count}");
            assert!(found == expected, "MATCH {pattern} COUNT {count}: other keys");
        }
        let listed = connection.done(&["KEYS", pattern]).elements().unwrap();
        let listed: BTreeSet<Vec<u8>> = listed.iter().map(|key| key.bytes().unwrap().to_vec()).collect();
        assert!(listed == expected, "KEYS {pattern}");
    }
}

/// COUNT is a hint, and a page of a large keyspace is not all of it.
#[test]
fn pages_are_about_as_long_as_asked_for() {
    let server = Server::start();
    let mut connection = server.connect();
    let keys: BTreeSet<Vec<u8>> = (0..5_000).map(|number| format!("k{number}").into_bytes()).collect();
    load(&mut connection, &keys);
    for (options, most) in [(&[][..], 100), (&["COUNT", "100"], 1_000), (&["COUNT", "1000"], 4_000)] {
        let first = page(&mut connection, "0", options);
        assert!(first.keys.len() <= most, "SCAN 0 {options:?}: {} keys", first.keys.len());
        assert_ne!(first.cursor, "0");
    }
}

#[test]
fn a_walk_goes_on_at_another_gateway_and_after_restarts() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(2).gateways(2).shards(5).start();
    let keys: BTreeSet<Vec<u8>> = (0..2_000)
        .flat_map(|number| [format!("k{number}"), format!("{{slot}}{number}")])
        .map(String::into_bytes)
        .collect();
    load(&mut cluster.connect(0), &keys);
    let mut found: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut cursor = "0".to_owned();
    let mut pages = 0;
    loop {
        let page = page(&mut cluster.connect(pages % 2), &cursor, &["COUNT", "40"]);
        for key in page.keys {
            *found.entry(key).or_default() += 1;
        }
        cursor = page.cursor;
        pages += 1;
        if cursor == "0" {
            break;
        }
        if pages == 20 {
            // Whatever the store remembered of the walk is gone.
            cluster.kill_9();
            cluster.start_again();
        }
        assert!(pages < PAGES_MAX, "the walk does not end");
    }
    let missed = keys.iter().filter(|key| !found.contains_key(*key)).count();
    assert_eq!(missed, 0, "of {} keys in {pages} pages", keys.len());
    assert_eq!(found.len(), keys.len());
}

/// Odd cursors are answered, never with an error of the server's own, never without end.
#[test]
fn any_cursor_may_be_given() {
    let server = Server::start_with(&["--shards", "3"]);
    let mut connection = server.connect();
    let keys: BTreeSet<Vec<u8>> = (0..500)
        .flat_map(|number| [format!("k{number}"), format!("{{slot}}{number}")])
        .map(String::into_bytes)
        .collect();
    load(&mut connection, &keys);
    let mut seeded = seeded("cursors");
    for round in 0..300 {
        let cursor = match round % 3 {
            0 => seeded.random.u64(..),
            1 => seeded.random.u64(..1 << 53),
            _ => seeded.random.u64(..16384) << 39,
        };
        let first = page(&mut connection, &cursor.to_string(), &["COUNT", "100"]);
        let mut next = first.cursor;
        let mut pages = 0;
        while next != "0" {
            next = page(&mut connection, &next, &["COUNT", "100"]).cursor;
            pages += 1;
            assert!(pages < 1_000, "the walk from {cursor} does not end");
        }
    }
}

/// Keys that are there all the time are found, whatever comes and goes around them.
fn stable_keys_are_found(addresses: &[Address], rounds: usize) {
    let stable: BTreeSet<Vec<u8>> = (0..1_500)
        .flat_map(|number| [format!("stable:{number}"), format!("{{churn}}stable:{number}")])
        .map(String::into_bytes)
        .collect();
    load(&mut Connection::open(&addresses[0]), &stable);
    let stop = Arc::new(AtomicBool::new(false));
    let seed = seeded("churn").seed;
    let writers: Vec<_> = (0..2)
        .map(|number| {
            let stop = stop.clone();
            let mut connection = Connection::open(&addresses[number % addresses.len()]);
            let mut random = fastrand::Rng::with_seed(seed + number as u64);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let commands: Vec<Vec<String>> = (0..20)
                        .map(|_| {
                            let tag = if random.bool() { "{churn}" } else { "" };
                            let key = format!("{tag}passing:{}", random.u32(..2_000));
                            match random.u32(..5) {
                                0..2 => vec!["DEL".to_owned(), key],
                                // Written again and again, and yet the same keys.
                                2 => vec![
                                    "SET".to_owned(),
                                    format!("stable:{}", random.u32(..1_500)),
                                    "again".to_owned(),
                                ],
                                3 => vec!["SET".to_owned(), key, "x".to_owned(), "PX".to_owned(), "5".to_owned()],
                                _ => vec!["SET".to_owned(), key, "x".to_owned()],
                            }
                        })
                        .collect();
                    connection.pipeline(&commands).unwrap();
                }
            })
        })
        .collect();
    let mut failures = Vec::new();
    for round in 0..rounds {
        let mut connection = Connection::open(&addresses[round % addresses.len()]);
        let count = ["5", "50", "500"][round % 3];
        let options: &[&str] = if round % 2 == 0 { &["COUNT", count] } else { &["COUNT", count, "MATCH", "*stable:*"] };
        let found = walk(&mut connection, options);
        let missed: Vec<String> =
            stable.iter().filter(|key| !found.contains_key(*key)).map(|key| key.escape_ascii().to_string()).collect();
        if !missed.is_empty() {
            failures.push(format!("{options:?} missed {}: {:?}", missed.len(), &missed[..missed.len().min(5)]));
        }
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.join().unwrap();
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn stable_keys_are_found_while_others_come_and_go_in_one_process() {
    let _turn = heavy();
    let server = Server::start_with(&["--shards", "3"]);
    stable_keys_are_found(&[server.address()], 12);
}

#[test]
fn stable_keys_are_found_while_others_come_and_go_in_a_cluster() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(2).gateways(2).shards(4).start();
    stable_keys_are_found(&[cluster.address(0), cluster.address(1)], 12);
}
