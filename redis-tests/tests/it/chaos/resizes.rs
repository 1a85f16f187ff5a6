//! Keyspaces that get more shards and fewer while clients work: no error, nothing lost, nothing back, nobody waits for long.

use redis_tests::slots::shard_of;
use redis_tests::{Cluster, Connection, Value, heavy};

use super::company::{Company, Failures, bytes_that_stay};
use super::operation::{End, begin, bytes_that_move, follow, resize_quietly};
use super::{KEYSPACE, ONE_COPY, Rounds, Safety, THREE_COPIES, TWO_SAFE_COPIES, Trial, create_keyspace};

/// Each number of shards of `path` after the other, under one load; all of `long` where there is time for more.
fn resize(safety: Safety, path: &[usize], long: &[&[usize]]) {
    let _turn = heavy();
    let mut rounds = Rounds::new(1);
    let paths = if rounds.are_many() { long } else { &[path] };
    for path in paths {
        let name = format!("resized through {path:?}");
        let Some(mut trial) = Trial::begin_with(&name, Cluster::builder(), safety, path[0]) else { return };
        trial.may_lose = false;
        let company = Company::start(&trial.cluster, trial.seed, Failures::AreWrong);
        loop {
            walk_through(&mut trial, path);
            if !rounds.another() || !rounds.are_many() {
                break;
            }
            // The next round begins where this one did.
            if path.last() != path.first() {
                trial.start_load();
                trial.resize(path[0]);
                trial.check();
            }
        }
        company.end();
        let breaks = trial.breaks;
        let totals = trial.end();
        assert_eq!((totals.failed(), breaks), (0, 0), "{totals:?}");
    }
}

fn walk_through(trial: &mut Trial, path: &[usize]) {
    trial.start_load();
    for pair in path.windows(2) {
        let (from, to) = (pair[0], pair[1]);
        let status = trial.resize(to);
        // Beside the load's own keys, which are few.
        eprintln!(
            "  {from} to {to} shards: {} bytes copied; of the keys that stay throughout {} bytes had to move",
            status.text("bytes"),
            bytes_that_move(bytes_that_stay(), from, to)
        );
        trial.go_on();
    }
    trial.check();
}

const LONG: &[&[usize]] = &[&[3, 4, 6, 2, 3], &[1, 3]];

#[test]
fn shards_of_one_copy_become_more_and_fewer() {
    resize(ONE_COPY, &[3, 4, 2, 3], LONG);
}

#[test]
fn shards_of_two_copies_become_more() {
    resize(TWO_SAFE_COPIES, &[1, 3], LONG);
}

#[test]
fn shards_of_three_copies_become_more_and_fewer() {
    resize(THREE_COPIES, &[3, 4, 2, 3], LONG);
}

const QUIET: &str = "quiet";

fn fill(connection: &mut Connection, keys: &[(String, usize)]) {
    for packet in keys.chunks(100) {
        let commands: Vec<Vec<Vec<u8>>> = packet
            .iter()
            .map(|(key, bytes)| vec![b"SET".to_vec(), key.clone().into(), key.as_bytes().repeat(1 + bytes / key.len())])
            .collect();
        assert!(connection.pipeline(&commands).unwrap().iter().all(|reply| *reply == Value::ok()));
    }
}

#[test]
fn a_resize_copies_what_moves_and_nothing_else() {
    let _turn = heavy();
    let cluster = Cluster::builder().start();
    create_keyspace(&cluster, QUIET, 3, ONE_COPY);
    let mut connection = cluster.connect(0);
    connection.done(&["SELECT", QUIET]);
    let keys: Vec<(String, usize)> = (0..6_000_usize)
        .map(|number| (format!("key:{number}"), if number.is_multiple_of(50) { 60_000 } else { 300 }))
        .collect();
    fill(&mut connection, &keys);
    for (from, to) in [(3, 4), (4, 6), (6, 2), (2, 3)] {
        let (status, end) = resize_quietly(&cluster.address(0), QUIET, to);
        assert_eq!(end, End::Done, "{}", status.line());
        let moved: Vec<&(String, usize)> =
            keys.iter().filter(|(key, _)| shard_of(key, from) != shard_of(key, to)).collect();
        let bytes: usize = moved.iter().map(|(key, bytes)| key.len() + key.len() * (1 + bytes / key.len())).sum();
        let copied = status.number("bytes").unwrap_or_default();
        eprintln!("{from} to {to}: {} keys of {bytes} bytes move; {}", moved.len(), status.line());
        assert_eq!(status.number("rows"), Some(moved.len() as i64), "{}", status.line());
        // A row has a header, and its key the slot.
        let with_headers = bytes + 64 * moved.len();
        assert!((bytes as i64..=with_headers as i64).contains(&copied), "{copied} bytes copied, {bytes} had to be");
        assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(keys.len() as i64));
    }
    for (key, bytes) in &keys {
        let expected = key.as_bytes().repeat(1 + bytes / key.len());
        assert!(connection.call(&["GET", key]) == Value::bulk(expected), "{key} is another");
    }
}

#[test]
fn what_is_flushed_while_its_rows_move_stays_away() {
    let _turn = heavy();
    let cluster = Cluster::builder().gateways(2).store_option("--resize-rate", "2").start();
    create_keyspace(&cluster, QUIET, 2, ONE_COPY);
    let mut connection = cluster.connect(0);
    connection.done(&["SELECT", QUIET]);
    let keys: Vec<(String, usize)> = (0..20_000).map(|number| (format!("old:{number}"), 500)).collect();
    fill(&mut connection, &keys);
    let operation = begin(&mut cluster.connect(0), QUIET, &["RESIZE", QUIET, "SHARDS", "3"]);
    let address = cluster.address(0);
    let mut flushed_in = None;
    let connect = || Connection::try_open(&address).map_err(|error| error.to_string());
    let (status, end) = follow(connect, QUIET, &operation, |status| {
        let copied = status.and_then(|status| status.number("bytes")).unwrap_or_default();
        if flushed_in.is_none() && copied > 0 {
            connection.done(&["FLUSHDB"]);
            fill(&mut connection, &[("new:1".to_owned(), 10), ("old:1".to_owned(), 10), ("old:2".to_owned(), 10)]);
            flushed_in = status.map(|status| status.phase());
        }
    });
    eprintln!("flushed in phase {flushed_in:?}: {}", status.line());
    assert_eq!(end, End::Done, "{}", status.line());
    assert_eq!(flushed_in.as_deref(), Some("copy"));
    for gateway in 0..2 {
        let mut connection = cluster.connect(gateway);
        connection.done(&["SELECT", QUIET]);
        assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(3));
        assert_eq!(connection.call(&["EXISTS", "new:1", "old:1", "old:2", "old:3"]), Value::Integer(3));
    }
}

#[test]
fn what_cannot_be_resized_is_refused_with_the_reason() {
    let _turn = heavy();
    let cluster = Cluster::builder().store_option("--resize-rate", "1").start();
    create_keyspace(&cluster, QUIET, 2, ONE_COPY);
    let mut connection = cluster.connect(0);
    connection.done(&["SELECT", QUIET]);
    let refused = |connection: &mut Connection, words: &[&str]| {
        let mut command = vec!["KEYSPACE"];
        command.extend_from_slice(words);
        let reply = connection.call(&command);
        assert!(reply.is_error(), "{words:?} is accepted: {}", reply.text());
        eprintln!("{words:?}: {}", reply.text());
        reply.text()
    };
    for shards in ["0", "1025", "-1", "x", "2"] {
        refused(&mut connection, &["RESIZE", QUIET, "SHARDS", shards]);
    }
    refused(&mut connection, &["RESIZE", "nosuch", "SHARDS", "3"]);
    refused(&mut connection, &["ABORT", QUIET]);
    let keys: Vec<(String, usize)> = (0..20_000).map(|number| (format!("key:{number}"), 500)).collect();
    fill(&mut connection, &keys);
    let operation = begin(&mut cluster.connect(0), QUIET, &["RESIZE", QUIET, "SHARDS", "3"]);
    for words in [&["RESIZE", QUIET, "SHARDS", "4"][..], &["REPLACE", QUIET, "STORE", cluster.store_id(0)]] {
        refused(&mut connection, words);
    }
    connection.done(&["KEYSPACE", "ABORT", QUIET]);
    let connect = || Connection::try_open(&cluster.address(0)).map_err(|error| error.to_string());
    let (status, end) = follow(connect, QUIET, &operation, |_| ());
    assert!(matches!(end, End::Aborted(_)), "{}", status.line());
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(keys.len() as i64));
    // As before: the next one goes through.
    let places = cluster.places(&mut connection, QUIET).unwrap();
    assert_eq!(places.len(), 2, "{places:?}");
    let (status, end) = resize_quietly(&cluster.address(0), QUIET, 1);
    assert_eq!(end, End::Done, "{}", status.line());
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(keys.len() as i64));
}

#[test]
fn a_resize_that_is_aborted_under_load_is_as_if_it_had_not_begun() {
    let _turn = heavy();
    let builder = Cluster::builder().store_option("--resize-rate", "1");
    let Some(mut trial) = Trial::begin_with("aborted", builder, ONE_COPY, 2) else { return };
    let company = Company::start(&trial.cluster, trial.seed, Failures::AreWrong);
    let mut rounds = Rounds::new(2);
    while rounds.another() {
        trial.start_load();
        let to = if rounds.number().is_multiple_of(2) { 4 } else { 1 };
        let operation = trial.begin_operation(&["RESIZE", KEYSPACE, "SHARDS", &to.to_string()]);
        let wait = std::time::Duration::from_millis(trial.random.u64(..1_500));
        trial.go_on_for(wait);
        trial.event("KEYSPACE ABORT");
        let reply = trial.cluster.connect(1).call(&["KEYSPACE", "ABORT", KEYSPACE]);
        let (status, end) = trial.follow_operation(&operation, |_| ());
        match end {
            End::Aborted(_) => {
                assert!(!reply.is_error(), "{}, and {}", reply.text(), status.line());
                trial.wait_for_shards(2);
            }
            // Too late for that.
            End::Done => {
                assert!(reply.is_error(), "it is done: {}", status.line());
                trial.wait_for_shards(to);
                trial.resize(2);
            }
        }
        trial.check();
    }
    company.end();
    let totals = trial.end();
    assert_eq!(totals.failed(), 0, "{totals:?}");
}
