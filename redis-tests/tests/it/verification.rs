//! KEYSPACE VERIFY over real processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redis_tests::{Cluster, Connection, Value, eventually, heavy};

const KEYSPACE: &str = "verified";
const SHARDS: usize = 3;

/// A field of a map, as RESP2 shows it.
fn field(map: &Value, name: &str) -> Value {
    let elements = map.elements().unwrap();
    let place = elements.iter().position(|element| element.bytes() == Some(name.as_bytes()));
    elements[place.unwrap_or_else(|| panic!("no {name} in {map:?}")) + 1].clone()
}

/// The numbers of this name, one a shard.
fn numbers(shards: &[Value], name: &str) -> Vec<i64> {
    shards.iter().map(|shard| field(shard, name).integer().unwrap_or_else(|| panic!("{shard:?}"))).collect()
}

#[test]
fn a_keyspace_with_two_copies_is_compared_while_it_is_written() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(3).gateways(1).start();
    let mut connection = cluster.connect(0);
    eventually!(60 s, "the keyspace is created", {
        let shards = SHARDS.to_string();
        let created = connection.call(&["KEYSPACE", "CREATE", KEYSPACE, "SHARDS", &shards, "COPIES", "2"]);
        // So many stores may not have come yet.
        created == Value::ok()
    });
    eventually!(60 s, "the gateway knows it", connection.call(&["SELECT", KEYSPACE]) == Value::ok());
    eventually!(60 s, "there are two copies", {
        let places = cluster.places(&mut connection, KEYSPACE);
        places.is_ok_and(|places| places.iter().all(|place| place.is_up && place.replicas.len() == 1))
    });
    for number in 0..1000 {
        connection.done(&["SET", &format!("key:{number}"), "value"]);
    }
    let (stop, address) = (Arc::new(AtomicBool::new(false)), cluster.address(0));
    let stopped = Arc::clone(&stop);
    let writing = std::thread::spawn(move || {
        let mut connection = Connection::open(&address);
        connection.done(&["SELECT", KEYSPACE]);
        while !stopped.load(Ordering::Relaxed) {
            connection.done(&["SET", &format!("key:{}", fastrand::u32(..1000)), &fastrand::u64(..).to_string()]);
        }
    });
    let mut compared = 0;
    eventually!(60 s, "all copies are compared ten times", {
        let shards = connection.call(&["KEYSPACE", "VERIFY", KEYSPACE]).elements().unwrap();
        assert_eq!(numbers(&shards, "shard"), [0, 1, 2]);
        assert_eq!(numbers(&shards, "rows").iter().sum::<i64>(), 1000);
        assert_eq!(numbers(&shards, "slots_differing"), [0; SHARDS], "{shards:?}");
        // One that is not in sync at this moment is told of.
        compared += usize::from(numbers(&shards, "copies") == [1; SHARDS]);
        compared >= 10
    });
    stop.store(true, Ordering::Relaxed);
    writing.join().unwrap();
    // What has no other copy has nothing to be compared with.
    let shards = connection.call(&["KEYSPACE", "VERIFY", "0"]).elements().unwrap();
    assert!(numbers(&shards, "copies").iter().all(|copies| *copies == 0), "{shards:?}");
    let help = connection.call(&["KEYSPACE", "HELP"]).elements().unwrap();
    assert!(help.iter().any(|line| line.text() == "VERIFY <name>"), "{help:?}");
    let known = connection.call(&["COMMAND", "INFO", "keyspace|verify"]).elements().unwrap();
    assert!(known[0] != Value::Nil, "{known:?}");
}
