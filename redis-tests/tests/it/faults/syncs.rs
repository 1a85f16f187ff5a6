//! Syncs that fail, and syncs that take long.

use redis_tests::cluster::temporary_directory;
use redis_tests::ledger::Writers;
use redis_tests::{Connection, eventually, heavy};

use super::{Injection, start_server};

/// Every thread's sync with this number fails once, so the shards of a server fail, are opened again, and fail in that as well.
fn fail_syncs(fsync: &str, when: u32) {
    let _turn = heavy();
    let directory = temporary_directory();
    let data = directory.path().join("data");
    let options = ["--fsync", fsync, "--shards", "2", "--row-cache", "1mb"];
    let mut node = start_server(directory.path(), &data, &options);
    let address = node.redis_address();
    let writers = Writers::start("eio", std::slice::from_ref(&address), 4);
    writers.wait_for(2_000);
    let Some(injection) = Injection::attach(&node, directory.path(), &format!("error=EIO:when={when}")) else {
        writers.stop();
        return;
    };
    eventually!(60 s, "a shard has failed and is open again", node.log().contains("shard is open again"));
    writers.wait_for(500);
    let injected = injection.injected();
    drop(injection);
    writers.wait_for(2_000);
    let ledger = writers.stop();
    eprintln!(
        "{fsync}: {injected} syncs failed, {} writes were errors, such as {:?}",
        ledger.errors, ledger.last_error
    );
    assert!(injected > 0);
    assert!(node.is_running() && !node.log().contains("panicked"), "{}", node.log());
    assert!(node.log().contains("While fdatasync: "), "the file is not named:\n{}", node.log());
    assert_eq!(ledger.breaks, 0, "connections broke");
    if fsync == "always" {
        // Writes waited for that sync.
        assert!(
            ledger.last_error.as_deref().is_some_and(|text| text.starts_with("UNKNOWN ")),
            "{:?}",
            ledger.last_error
        );
    }
    ledger.check(&mut Connection::open(&address));
    node.kill_9();
    node.start_again();
    redis_tests::cluster::wait_until_serving(&address);
    ledger.check(&mut Connection::open(&address));
}

#[test]
fn a_failed_sync_loses_nothing_acknowledged() {
    fail_syncs("everysec", 2);
}

#[test]
fn a_failed_sync_loses_nothing_acknowledged_when_every_write_is_synced() {
    fail_syncs("always", 5);
}

/// Every sync takes longer; what waits for one takes longer too, nothing else does, and nothing is an error.
fn slow_syncs(fsync: &str, delay_ms: u32, writes: u64) {
    let _turn = heavy();
    let directory = temporary_directory();
    let data = directory.path().join("data");
    let node = start_server(directory.path(), &data, &["--fsync", fsync, "--shards", "3"]);
    let address = node.redis_address();
    let delay = format!("delay_enter={}", delay_ms * 1000);
    let Some(injection) = Injection::attach(&node, directory.path(), &delay) else { return };
    let writers = Writers::start("slow", std::slice::from_ref(&address), 4);
    writers.wait_for(writes);
    eventually!(60 s, "some syncs were slow", injection.injected() > 3);
    let ledger = writers.stop();
    assert_eq!(ledger.errors, 0, "{:?}", ledger.last_error);
    assert_eq!(ledger.breaks, 0);
    assert!(!node.log().contains("stops serving"), "{}", node.log());
    drop(injection);
    ledger.check(&mut Connection::open(&address));
}

/// If the writes waited for the syncs, so many would take minutes.
#[test]
fn slow_syncs_do_not_hold_up_writes_that_need_not_wait() {
    slow_syncs("everysec", 3_000, 5_000);
}

/// Four connections with eight commands each wait for one sync of each shard, and the syncs of shards run side by side.
#[test]
fn slow_syncs_are_no_errors_for_writes_that_wait() {
    slow_syncs("always", 300, 500);
}
