//! A disk that runs full under load, and has space again.

use std::time::Instant;

use redis_tests::cluster::temporary_directory;
use redis_tests::{Connection, Node, Value, eventually, heavy};

use super::{SmallDisk, check_values, start_server, value_of};

const VALUE_BYTES: usize = 4096;

/// Commands of one packet.
const PIPELINE: usize = 16;

const DISK_MEGABYTES: u32 = 128;
const BALLAST_MEGABYTES: usize = 64;

/// What a load came to.
#[derive(Default)]
struct Load {
    acknowledged: Vec<usize>,
    unknown: Vec<usize>,
    refused: Vec<String>,
}

/// Writes until a write is refused.
fn write_until_refused(connection: &mut Connection) -> Load {
    let mut load = Load::default();
    let mut next = 0;
    while load.refused.is_empty() {
        assert!(next < 200_000, "{next} values of {VALUE_BYTES} bytes fit on a disk of {DISK_MEGABYTES} MiB");
        let numbers: Vec<usize> = (next..next + PIPELINE).collect();
        next += PIPELINE;
        let commands: Vec<Vec<Vec<u8>>> = numbers
            .iter()
            .map(|number| vec![b"SET".to_vec(), format!("key:{number}").into_bytes(), value_of(*number, VALUE_BYTES)])
            .collect();
        for (number, reply) in numbers.iter().zip(connection.pipeline(&commands).unwrap()) {
            match reply {
                Value::Error(text) => {
                    let text = String::from_utf8(text).unwrap();
                    if text.starts_with("MISCONF ") {
                        load.refused.push(text);
                    } else {
                        assert!(text.starts_with("UNKNOWN "), "{text}");
                        assert!(text.contains("No space left on device"), "{text}");
                        load.unknown.push(*number);
                    }
                }
                reply => {
                    assert_eq!(reply, Value::ok());
                    load.acknowledged.push(*number);
                }
            }
        }
    }
    load
}

/// Reads all that was acknowledged; what has an unknown outcome is there as it was sent, or not at all.
fn check(connection: &mut Connection, load: &Load) {
    check_values(connection, &load.acknowledged, VALUE_BYTES);
    for number in &load.unknown {
        match connection.call(&["GET", &format!("key:{number}")]) {
            Value::Nil => {}
            value => assert_eq!(value, Value::bulk(value_of(*number, VALUE_BYTES)), "key:{number}"),
        }
    }
}

fn is_served(node: &Node, words: &[&str]) -> bool {
    Connection::try_open(&node.redis_address())
        .and_then(|mut connection| connection.try_call(words))
        .is_ok_and(|reply| !reply.is_error())
}

fn fill_and_recover(fsync: &str) {
    let _turn = heavy();
    let directory = temporary_directory();
    let Some(disk) = SmallDisk::mount(&directory.path().join("disk"), DISK_MEGABYTES) else { return };
    let ballast = disk.ballast(BALLAST_MEGABYTES);
    let data = disk.path.join("data");
    let mut node = start_server(directory.path(), &data, &["--fsync", fsync, "--row-cache", "1mb"]);
    let mut connection = Connection::open(&node.redis_address());
    let load = write_until_refused(&mut connection);
    let refusal = &load.refused[0];
    eprintln!("{fsync}: {} acknowledged, {} unknown, then: {refusal}", load.acknowledged.len(), load.unknown.len());
    assert!(refusal.starts_with("MISCONF Errors writing to shard 0/0: "), "{refusal}");
    assert!(refusal.contains("No space left on device"), "{refusal}");
    // None if a write of the store's own met the full disk first.
    assert!(load.unknown.len() <= PIPELINE, "{} are unknown", load.unknown.len());

    // Reads go on, writes are refused at once, whatever they are.
    check(&mut connection, &load);
    for command in [&["INCR", "n"][..], &["DEL", "key:0"], &["FLUSHALL"], &["SET", "key:0", ""]] {
        let reply = connection.call(command);
        assert!(reply.is_error() && reply.text().starts_with("MISCONF "), "{command:?}: {}", reply.text());
    }
    assert_eq!(connection.call(&["MULTI"]), Value::ok());
    connection.done(&["SET", "{key:0}", "x"]);
    let reply = connection.call(&["EXEC"]);
    assert!(reply.text().contains("MISCONF "), "{}", reply.text());
    assert!(connection.done(&["INFO", "vasto"]).text().contains("shards_read_only=1"));
    check(&mut connection, &load);

    std::fs::remove_file(ballast).unwrap();
    let freed = Instant::now();
    eventually!(60 s, "writes go on by themselves", !connection.call(&["SET", "after", "1"]).is_error());
    eprintln!("{fsync}: writes go on {:.1} s after there was space", freed.elapsed().as_secs_f64());
    check(&mut connection, &load);
    assert!(connection.done(&["INFO", "vasto"]).text().contains("shards_read_only=0"));
    assert!(node.is_running());

    node.kill_9();
    node.start_again();
    redis_tests::cluster::wait_until_serving(&node.redis_address());
    let mut connection = Connection::open(&node.redis_address());
    check(&mut connection, &load);
    assert_eq!(connection.call(&["GET", "after"]), Value::bulk("1"));
    assert!(!node.log().contains("panicked"), "{}", node.log());
}

#[test]
fn a_full_disk_refuses_writes_serves_reads_and_recovers() {
    fill_and_recover("everysec");
}

#[test]
fn a_full_disk_refuses_writes_serves_reads_and_recovers_with_every_write_synced() {
    fill_and_recover("always");
}

/// RocksDB must write before it can open: nothing is served until there is space, and then it is, without another start.
#[test]
fn a_process_that_is_killed_on_a_full_disk_serves_when_there_is_space() {
    let _turn = heavy();
    let directory = temporary_directory();
    let Some(disk) = SmallDisk::mount(&directory.path().join("disk"), DISK_MEGABYTES) else { return };
    let ballast = disk.ballast(BALLAST_MEGABYTES);
    let options = ["--request-deadline-ms", "300", "--row-cache", "1mb"];
    let mut node = start_server(directory.path(), &disk.path.join("data"), &options);
    let load = write_until_refused(&mut Connection::open(&node.redis_address()));
    node.kill_9();
    // Not a byte is left.
    let rest = disk.path.join("rest");
    let filled = std::fs::write(&rest, vec![b'r'; (DISK_MEGABYTES as usize) << 20]);
    assert!(filled.is_err(), "the disk is not full");
    node.start_again();
    let mut connection = Connection::open(&node.redis_address());
    let reply = connection.call(&["GET", "key:0"]);
    assert!(reply.text().starts_with("CLUSTERDOWN "), "{}", reply.text());
    assert!(reply.text().contains("No space left on device"), "{}", reply.text());
    std::fs::remove_file(ballast).unwrap();
    std::fs::remove_file(rest).unwrap();
    let freed = Instant::now();
    eventually!(60 s, "the shard serves", is_served(&node, &["SET", "after", "1"]));
    eprintln!("it serves {:.1} s after there was space", freed.elapsed().as_secs_f64());
    check(&mut connection, &load);
}
