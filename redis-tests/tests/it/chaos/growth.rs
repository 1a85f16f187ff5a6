//! Many resizes one after the other, and one whose target has no room: what stays behind on disk and in memory, and what does not.

use std::path::Path;

use redis_tests::seed::number_from_environment;
use redis_tests::{Cluster, Connection, Value, heavy};

use super::company::{Company, Failures};
use super::operation::{End, begin, follow};
use super::{KEYSPACE, ONE_COPY, Rounds, Safety, THREE_COPIES, Trial, create_keyspace};
use crate::faults::SmallDisk;

/// Resizes with one look at what they leave: `VASTO_CHAOS_RESIZES`.
const RESIZES: usize = 4;

const MIB: u64 = 1 << 20;

/// Bytes of all files below.
fn bytes_below(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.filter_map(Result::ok).map(bytes).sum()
}

fn print_use(trial: &Trial, shards: usize) {
    let stores = 0..trial.cluster.stores.len();
    let disk: Vec<u64> =
        stores.clone().map(|store| bytes_below(&trial.cluster.data(store).join("shards")) / MIB).collect();
    let memory: Vec<u64> = stores.map(|store| trial.cluster.stores[store].resident_bytes() / MIB).collect();
    eprintln!("  {shards} shards: MiB on disk {disk:?}, in memory {memory:?}");
}

fn grow_and_shrink(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin_with("many resizes", Cluster::builder(), safety, 3) else { return };
    trial.may_lose = false;
    let company = Company::start(&trial.cluster, trial.seed, Failures::AreWrong);
    print_use(&trial, 3);
    let many = if Rounds::new(0).are_many() { 20 } else { RESIZES };
    let mut rounds = Rounds::new(number_from_environment("VASTO_CHAOS_RESIZES").unwrap_or(many));
    while rounds.another() {
        let shards = if rounds.number().is_multiple_of(2) { 4 } else { 3 };
        trial.start_load();
        trial.resize(shards);
        trial.check();
        print_use(&trial, shards);
    }
    company.end();
    let totals = trial.end();
    assert_eq!(totals.failed(), 0, "{totals:?}");
}

#[test]
fn growing_and_shrinking_again_and_again_leaves_nothing_behind() {
    grow_and_shrink(ONE_COPY);
}

#[test]
fn growing_and_shrinking_three_copies_leaves_nothing_behind() {
    grow_and_shrink(THREE_COPIES);
}

/// Room for what the target gets, several times over, until something else takes it.
const DISK_MEGABYTES: u32 = 256;

const VALUE_BYTES: usize = 4096;
const VALUES: usize = 16_000;

fn value_of(number: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number as u64);
    std::iter::repeat_with(|| random.u8(..)).take(VALUE_BYTES).collect()
}

fn read_all(connection: &mut Connection, what: &str) {
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(VALUES as i64), "{what}");
    for number in 0..VALUES {
        assert!(connection.call(&["GET", &number.to_string()]) == Value::bulk(value_of(number)), "{number}, {what}");
    }
}

#[test]
fn a_resize_whose_target_has_no_room_is_aborted_and_the_next_one_works_elsewhere() {
    let _turn = heavy();
    // Slow enough that the disk is full before everything is there.
    let mut cluster = Cluster::builder().store_option("--resize-rate", "1").start();
    create_keyspace(&cluster, KEYSPACE, 3, ONE_COPY);
    let mut connection = cluster.connect(0);
    connection.done(&["SELECT", KEYSPACE]);
    for number in 0..VALUES {
        connection.done(&[b"SET".to_vec(), number.to_string().into(), value_of(number)]);
    }
    // The new shard goes to the store that has nothing yet.
    let small = cluster.stores.len();
    let Some(disk) = SmallDisk::mount(&cluster.data(small), DISK_MEGABYTES) else { return };
    assert_eq!(cluster.add_store(), small);

    let operation = begin(&mut cluster.connect(0), KEYSPACE, &["RESIZE", KEYSPACE, "SHARDS", "4"]);
    let mut ballast = None;
    let connect = || Connection::try_open(&cluster.address(0)).map_err(|error| error.to_string());
    let (status, end) = follow(connect, KEYSPACE, &operation, |status| {
        let copied = status.and_then(|status| status.number("bytes")).unwrap_or_default();
        if ballast.is_none() && copied > 0 {
            ballast = Some(disk.fill());
        }
    });
    let places = cluster.places(&mut connection, KEYSPACE).unwrap();
    eprintln!("{} on {places:?}", status.line());
    let End::Aborted(reason) = end else { panic!("it is {end:?}, on {places:?}: {}", status.line()) };
    assert!(reason.contains("disk") || reason.contains("space"), "{reason}");
    assert_eq!(places.len(), 3);
    read_all(&mut connection, "after a resize that was aborted");

    // With no room there, it goes elsewhere or is refused.
    let reply = connection.call(&["KEYSPACE", "RESIZE", KEYSPACE, "SHARDS", "4"]);
    eprintln!("with a store whose disk is full: {}", reply.text());
    if reply.is_error() {
        assert!(reply.text().contains("disk"), "{}", reply.text());
        assert!(cluster.stores[small].terminate().success());
        redis_tests::eventually!(60 s, "it works elsewhere", {
            !connection.call(&["KEYSPACE", "RESIZE", KEYSPACE, "SHARDS", "4"]).is_error()
        });
    }
    redis_tests::eventually!(90 s, "there are four shards", {
        let status = super::operation::status(&mut connection, KEYSPACE).unwrap();
        status.phase() == "done" && cluster.places(&mut connection, KEYSPACE).unwrap().len() == 4
    });
    let places = cluster.places(&mut connection, KEYSPACE).unwrap();
    assert!(places.iter().all(|place| place.primary != Some(small)), "{places:?}");
    read_all(&mut connection, "after one that was done elsewhere");
}
