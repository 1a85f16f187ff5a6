//! Data outlive every end of every process, and whoever is not concerned goes on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use redis_tests::cluster::{launch_gateway, launch_master, launch_store, temporary_directory, wait_until_serving};
use redis_tests::ledger::Writers;
use redis_tests::node::{READY_TIMEOUT, free_address};
use redis_tests::{Address, Cluster, Connection, Server, Value, eventually, heavy};

/// Fills a keyspace with all that a row can hold, and knows it.
fn fill(connection: &mut Connection) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut expected = BTreeMap::new();
    for number in 0..2_000_u32 {
        let key = match number % 4 {
            0 => format!("plain:{number}").into_bytes(),
            1 => format!("{{tag}}:{number}").into_bytes(),
            2 => [&number.to_be_bytes()[..], b"\x00\r\n\xff"].concat(),
            _ => format!("user:{{{number}}}:name").into_bytes(),
        };
        let value = number.to_string().repeat((number % 50) as usize).into_bytes();
        let command = [b"SET".to_vec(), key.clone(), value.clone()];
        assert_eq!(connection.call(&command), Value::ok());
        expected.insert(key, value);
    }
    let removed: Vec<Vec<u8>> = expected.keys().step_by(7).cloned().collect();
    for key in removed {
        assert_eq!(connection.call(&[b"DEL".to_vec(), key.clone()]), Value::Integer(1));
        expected.remove(&key);
    }
    let large = vec![b'L'; 3_000_000];
    connection.done(&[&b"SET"[..], b"large", &large]);
    expected.insert(b"large".to_vec(), large);
    connection.done(&["SET", "mortal", "1", "PXAT", "33177117420123"]);
    expected.insert(b"mortal".to_vec(), b"1".to_vec());
    connection.done(&["SET", "gone", "1", "PX", "1"]);
    expected
}

fn check(connection: &mut Connection, expected: &BTreeMap<Vec<u8>, Vec<u8>>) {
    for (key, value) in expected {
        let found = connection.call(&[&b"GET"[..], key]);
        assert_eq!(found.bytes(), Some(value.as_slice()), "{}", key.escape_ascii());
    }
    assert_eq!(connection.call(&["GET", "gone"]), Value::Nil);
    assert_eq!(connection.call(&["PEXPIRETIME", "mortal"]), Value::Integer(33_177_117_420_123));
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(expected.len() as i64));
}

#[test]
fn a_server_keeps_its_data_over_sigterm_and_kill_9() {
    let mut server = Server::start_with(&["--stores", "2", "--shards", "3"]);
    let expected = fill(&mut server.connect());
    check(&mut server.connect(), &expected);
    for _ in 0..2 {
        let status = server.node.terminate();
        assert!(status.success(), "{status}");
        server.node.start_again();
        check(&mut server.connect(), &expected);
        server.node.kill_9();
        server.node.start_again();
        check(&mut server.connect(), &expected);
    }
}

#[test]
fn deleted_keys_stay_deleted_after_flushall_and_a_restart() {
    let mut server = Server::start_with(&["--shards", "3"]);
    let mut connection = server.connect();
    fill(&mut connection);
    connection.done(&["FLUSHALL"]);
    connection.done(&["SET", "after", "1"]);
    server.node.kill_9();
    server.node.start_again();
    let mut connection = server.connect();
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(1));
    assert_eq!(connection.call(&["KEYS", "*"]), Value::Array(vec![Value::bulk("after")]));
}

#[test]
fn a_server_loses_nothing_acknowledged_over_kills_under_load() {
    let _turn = heavy();
    let mut server = Server::start_with(&["--shards", "2"]);
    let writers = Writers::start("kill", &[server.address()], 4);
    for _ in 0..3 {
        writers.wait_for(3_000);
        server.node.kill_9();
        server.node.start_again();
    }
    writers.wait_for(1_000);
    let ledger = writers.stop();
    assert!(ledger.breaks > 0, "the kills were not noticed");
    ledger.check(&mut server.connect());
    server.node.kill_9();
    server.node.start_again();
    ledger.check(&mut server.connect());
}

#[test]
fn a_server_loses_nothing_acknowledged_over_sigterm_under_load() {
    let _turn = heavy();
    let mut server = Server::start();
    let writers = Writers::start("term", &[server.address()], 4);
    for _ in 0..2 {
        writers.wait_for(3_000);
        let status = server.node.terminate();
        assert!(status.success(), "{status}");
        server.node.start_again();
    }
    writers.wait_for(1_000);
    writers.stop().check(&mut server.connect());
}

#[test]
fn a_cluster_keeps_its_data_over_sigterm_and_kill_9_of_all() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(3).gateways(2).shards(5).start();
    let expected = fill(&mut cluster.connect(0));
    check(&mut cluster.connect(1), &expected);
    cluster.terminate();
    cluster.start_again();
    check(&mut cluster.connect(0), &expected);
    cluster.kill_9();
    cluster.start_again();
    check(&mut cluster.connect(1), &expected);
}

#[test]
fn a_cluster_loses_nothing_acknowledged_over_kills_under_load() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(3).gateways(2).shards(6).start();
    let writers = Writers::start("cluster", &[cluster.address(0), cluster.address(1)], 4);
    for round in 0..3 {
        writers.wait_for(2_000);
        cluster.stores[round].kill_9();
        cluster.stores[round].start_again();
    }
    writers.wait_for(1_000);
    cluster.gateways[1].kill_9();
    cluster.gateways[1].start_again();
    writers.wait_for(1_000);
    cluster.kill_9();
    cluster.start_again();
    writers.wait_for(1_000);
    let ledger = writers.stop();
    ledger.check(&mut cluster.connect(0));
    ledger.check(&mut cluster.connect(1));
}

/// The clients see nothing of it: no error, no broken connection, no long wait.
#[test]
fn a_restart_of_the_master_is_invisible_to_clients() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(2).gateways(2).shards(4).start();
    let writers = Writers::start("master", &[cluster.address(0), cluster.address(1)], 3);
    writers.wait_for(1_000);
    cluster.master.kill_9();
    // Without a master at all.
    writers.wait_for(2_000);
    let mut connection = cluster.connect(0);
    connection.done(&["SET", "while-away", "1"]);
    assert_eq!(cluster.connect(1).call(&["GET", "while-away"]), Value::bulk("1"));
    cluster.master.start_again();
    writers.wait_for(2_000);
    let status = cluster.master.terminate();
    assert!(status.success(), "{status}");
    cluster.master.start_again();
    writers.wait_for(1_000);
    let ledger = writers.stop();
    assert_eq!((ledger.errors, ledger.breaks), (0, 0), "the last error: {:?}", ledger.last_error);
    ledger.check(&mut cluster.connect(0));
    // The new master knows the cluster: a new gateway serves it.
    let gateway = cluster.launch_gateway();
    gateway.wait_ready(READY_TIMEOUT);
    let address = gateway.redis_address();
    wait_until_serving(&address);
    ledger.check(&mut Connection::open(&address));
}

#[test]
fn a_gateway_waits_for_the_master_and_for_stores() {
    let directory = temporary_directory();
    let master_address = free_address();
    let mut gateway = launch_gateway("gateway", &directory, &master_address, &[]);
    eventually!("the gateway says that it waits", !gateway.log().is_empty());
    assert!(gateway.is_running());
    let mut master = launch_master(&directory, &master_address, 3, 2);
    master.wait_ready(READY_TIMEOUT);
    let mut first = launch_store("store-0", &directory, &master_address);
    first.wait_ready(READY_TIMEOUT);
    assert!(gateway.is_running());
    // Two stores were asked for.
    let mut second = launch_store("store-1", &directory, &master_address);
    second.wait_ready(READY_TIMEOUT);
    gateway.wait_ready(READY_TIMEOUT);
    let address = gateway.redis_address();
    wait_until_serving(&address);
    let mut connection = Connection::open(&address);
    for number in 0..100 {
        let key = format!("key:{number}");
        connection.done(&["SET", &key, &key]);
        assert_eq!(connection.call(&["GET", &key]), Value::bulk(&key));
    }
    // A store that starts before its master.
    master.kill_9();
    second.kill_9();
    second.start_again_without_waiting();
    master.start_again();
    second.wait_ready(READY_TIMEOUT);
    let keys: Vec<String> = (0..100).map(|number| format!("key:{number}")).collect();
    eventually!("all keys are there again", all_are_there(&mut connection, &keys));
}

/// One GET for each key, all at once: a store that is down is waited for once, not once for each key.
fn get_all(connection: &mut Connection, keys: &[String]) -> Vec<Value> {
    let commands: Vec<Vec<&str>> = keys.iter().map(|key| vec!["GET", key]).collect();
    connection.pipeline(&commands).unwrap()
}

fn all_are_there(connection: &mut Connection, keys: &[String]) -> bool {
    get_all(connection, keys).iter().zip(keys).all(|(value, key)| *value == Value::bulk(key))
}

#[test]
fn a_store_that_is_down_is_missed_for_its_own_keys_alone() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(3).gateways(1).shards(6).start();
    let mut connection = cluster.connect(0);
    let keys: Vec<String> = (0..300).map(|number| format!("key:{number}")).collect();
    for key in &keys {
        connection.done(&["SET", key, key]);
    }
    cluster.stores[1].kill_9();
    let answers = get_all(&mut connection, &keys);
    let (mut there, mut missing) = (Vec::new(), Vec::new());
    for (key, value) in keys.iter().zip(answers) {
        if value.is_error() {
            missing.push((key.clone(), value.text()));
        } else {
            assert_eq!(value, Value::bulk(key));
            there.push(key.clone());
        }
    }
    assert!(
        !missing.is_empty() && !there.is_empty(),
        "{} of {} keys are missed; a store of three was killed",
        missing.len(),
        keys.len()
    );
    assert!(missing[0].1.len() > 10, "the error says nothing: {}", missing[0].1);
    // Keys of the other stores are not held up, whatever waits for the one that is down.
    let mut waiting = cluster.connect(0);
    waiting.send(&redis_tests::resp::command(&["GET", &missing[0].0])).unwrap();
    let begin = Instant::now();
    for key in &there {
        assert_eq!(connection.call(&["GET", key]), Value::bulk(key));
        connection.done(&["SET", key, key]);
    }
    assert!(begin.elapsed() < Duration::from_secs(10), "keys of other stores took {:?}", begin.elapsed());
    // Never a part of the answer as if it were all.
    for name in ["MGET", "EXISTS"] {
        let mut several = vec![name.to_owned()];
        several.extend(keys.iter().cloned());
        let answer = connection.call(&several);
        assert!(answer.is_error(), "{name} over a dead store is no success: {}", answer.text());
    }
    for command in [&["DBSIZE"][..], &["KEYS", "*"]] {
        let answer = connection.call(command);
        assert!(answer.is_error(), "{command:?} over a dead store is no success: {}", answer.text());
    }
    // It comes back by itself, on the same connection.
    cluster.stores[1].start_again();
    eventually!("all keys are there again", all_are_there(&mut connection, &keys));
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(keys.len() as i64));
}

/// A store that hangs is found like a dead one, and serves again when it goes on.
#[test]
fn a_store_that_hangs_does_not_hold_up_the_others() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(2).gateways(1).shards(4).start();
    let mut connection = cluster.connect(0);
    let keys: Vec<String> = (0..40).map(|number| format!("key:{number}")).collect();
    for key in &keys {
        connection.done(&["SET", key, key]);
    }
    cluster.stores[0].freeze();
    let address = cluster.address(0);
    let mut served = 0;
    for key in &keys {
        // A connection each: what hangs is waited for, the others must answer.
        let mut connection = Connection::open(&address);
        connection.set_reply_timeout(Duration::from_millis(500)).unwrap();
        match connection.try_call(&["GET", key]) {
            Ok(Value::Bulk(value)) if value == key.as_bytes() => served += 1,
            Ok(Value::Error(_)) | Err(_) => {}
            Ok(other) => panic!("{key}: {}", other.text()),
        }
    }
    cluster.stores[0].thaw();
    assert!(served > 5, "only {served} of {} keys were served", keys.len());
    eventually!("all keys are there again", all_are_there(&mut connection, &keys));
}

#[test]
fn a_gateway_that_dies_takes_nothing_with_it() {
    let mut cluster = Cluster::builder().stores(1).gateways(2).shards(2).start();
    let mut first = cluster.connect(0);
    first.done(&["SET", "a", "1"]);
    cluster.gateways[0].kill_9();
    assert_eq!(cluster.connect(1).call(&["INCR", "a"]), Value::Integer(2));
    cluster.gateways[0].start_again();
    let address: Address = cluster.address(0);
    wait_until_serving(&address);
    assert_eq!(cluster.connect(0).call(&["INCR", "a"]), Value::Integer(3));
}
