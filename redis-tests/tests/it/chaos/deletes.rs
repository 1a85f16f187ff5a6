//! A replica is down while most of a keyspace is deleted and the log of it is thrown away: nothing comes back with it.

use redis_tests::seed::number_from_environment;
use redis_tests::{Cluster, Connection, Value, heavy};

use super::{TWO_COPIES, copies_are_supported, create_keyspace, make_primary, wait_until_whole};

const KEYSPACE: &str = "deletes";

/// Commands of one packet.
const PIPELINE: usize = 500;

/// One key of so many stays.
const STAYS: usize = 10;

/// Rows that are written after the deletes, so that nothing keeps a log that reaches back to them: `VASTO_CHAOS_LOG_MIB`.
const LOG_MIB: usize = 96;

const ROW_BYTES: usize = 64 << 10;

fn in_packets(connection: &mut Connection, commands: impl Iterator<Item = Vec<String>>) -> Vec<Value> {
    let commands: Vec<Vec<String>> = commands.collect();
    let mut replies = Vec::new();
    for packet in commands.chunks(PIPELINE) {
        replies.extend(connection.pipeline(packet).unwrap());
    }
    replies
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Deleted keys that are there, and others that are not as they were.
fn wrong(connection: &mut Connection, keys: usize) -> Vec<String> {
    let replies = in_packets(connection, (0..keys).map(|key| words(&["GET", &format!("key:{key}")])));
    let expected = |key: usize| if key.is_multiple_of(STAYS) { Value::bulk(key.to_string()) } else { Value::Nil };
    let replies = replies.into_iter().enumerate().filter(|(key, reply)| *reply != expected(*key));
    replies.map(|(key, reply)| format!("key:{key} is {}", reply.text())).collect()
}

#[test]
fn a_replica_that_missed_deletes_brings_nothing_back() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().gateways(1).store_option("--write-buffer", "8mb").start();
    if !copies_are_supported(&cluster) {
        return;
    }
    let keys: usize = number_from_environment("VASTO_CHAOS_DELETES").unwrap_or(50_000);
    let log_mib: usize = number_from_environment("VASTO_CHAOS_LOG_MIB").unwrap_or(LOG_MIB);
    create_keyspace(&cluster, KEYSPACE, 1, TWO_COPIES);
    wait_until_whole(&cluster, KEYSPACE, TWO_COPIES);
    let mut connection = cluster.connect(0);
    connection.done(&["SELECT", KEYSPACE]);
    let stored =
        in_packets(&mut connection, (0..keys).map(|key| words(&["SET", &format!("key:{key}"), &key.to_string()])));
    assert!(stored.iter().all(|reply| *reply == Value::ok()));

    let place = cluster.places(&mut connection, KEYSPACE).unwrap().remove(0);
    let (primary, replica) = (place.primary.unwrap(), place.replicas[0]);
    cluster.stores[replica].kill_9();
    let deleted = (0..keys).filter(|key| !key.is_multiple_of(STAYS));
    let deleted = in_packets(&mut connection, deleted.map(|key| words(&["DEL", &format!("key:{key}")])));
    assert!(deleted.iter().all(|reply| *reply == Value::Integer(1)));
    // More than any log that is kept for a copy, then a restart, which begins a new one.
    let mut random = fastrand::Rng::with_seed(7);
    for row in 0..log_mib * (1 << 20) / ROW_BYTES {
        let value: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(ROW_BYTES).collect();
        connection.done(&[b"SET".to_vec(), format!("log:{}", row % 8).into_bytes(), value]);
    }
    assert!(cluster.stores[primary].terminate().success());
    cluster.stores[primary].start_again();
    redis_tests::eventually!(60 s, "it is served again", !connection.call(&["GET", "key:0"]).is_error());
    assert!(wrong(&mut connection, keys).is_empty());

    cluster.stores[replica].start_again();
    wait_until_whole(&cluster, KEYSPACE, TWO_COPIES);
    // By reading the replica; it may be a moment behind.
    let mut reader = cluster.connect(0);
    reader.done(&["SELECT", KEYSPACE]);
    reader.done(&["READONLY"]);
    redis_tests::eventually!(60 s, "the replica has it all", wrong(&mut reader, keys).is_empty());
    // And by making a primary of it.
    make_primary(&cluster, KEYSPACE, 0, replica);
    let wrong = wrong(&mut connection, keys);
    let deletes = deleted.len();
    eprintln!("chaos: {deletes} deletes that a replica missed: {} keys are wrong at its return", wrong.len());
    assert!(wrong.is_empty(), "{:?}", &wrong[..wrong.len().min(10)]);
}
