//! Settings of a keyspace: changed at one gateway, in force everywhere, kept over every restart.

use redis_tests::{Cluster, Connection, Server, Value, eventually, heavy, notation};

fn fsync(connection: &mut Connection) -> String {
    let answer = connection.done(&["CONFIG", "GET", "appendfsync"]).elements().unwrap();
    answer[1].text()
}

/// A figure of keyspace 0 in INFO vasto.
fn figure(connection: &mut Connection, name: &str) -> u64 {
    let info = connection.done(&["INFO", "vasto"]).text();
    let line = info.lines().find(|line| line.starts_with("vasto_keyspace_0:")).unwrap_or_else(|| panic!("{info}"));
    let value = line.split(',').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {line}"))
}

const WRITES: u64 = 25;

/// Syncs while some writes are answered, each before the next is sent.
fn syncs_of_writes(connection: &mut Connection) -> u64 {
    let before = figure(connection, "syncs");
    for number in 0..WRITES {
        connection.done(&["SET", &format!("key:{number}"), "v"]);
    }
    figure(connection, "syncs") - before
}

#[test]
fn a_change_of_fsync_holds_at_every_gateway_and_over_every_restart() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(2).gateways(2).shards(4).start();
    let mut first = cluster.connect(0);
    assert_eq!(fsync(&mut first), "everysec");
    assert_eq!(first.call(&["CONFIG", "SET", "appendfsync", "always", "hz", "20"]), Value::ok());
    // Whoever changed it sees it at once, the others when they have heard of it.
    assert_eq!(fsync(&mut first), "always");
    let mut second = cluster.connect(1);
    eventually!("the other gateway knows", fsync(&mut second) == "always");
    // No answer to a write without a sync, no two of them with one.
    let syncs = syncs_of_writes(&mut second);
    assert!(syncs >= WRITES, "{syncs} syncs for {WRITES} writes one after the other");

    cluster.master.kill_9();
    cluster.master.start_again();
    cluster.stores[0].kill_9();
    cluster.stores[0].start_again();
    cluster.gateways[0].kill_9();
    cluster.gateways[0].start_again();
    cluster.wait_until_serving();
    for gateway in 0..2 {
        let mut connection = cluster.connect(gateway);
        assert_eq!(fsync(&mut connection), "always");
        assert!(syncs_of_writes(&mut connection) >= WRITES);
    }
    cluster.kill_9();
    cluster.start_again();
    let mut connection = cluster.connect(1);
    assert_eq!(fsync(&mut connection), "always");
    assert!(syncs_of_writes(&mut connection) >= WRITES);

    // Away from it, by the other verb: nothing waits for the disk any more.
    assert_eq!(connection.call(&["KEYSPACE", "ALTER", "0", "FSYNC", "no"]), Value::ok());
    assert_eq!(fsync(&mut connection), "no");
    assert_eq!(syncs_of_writes(&mut connection), 0);
    assert_eq!(figure(&mut connection, "held_batches"), 0);
    cluster.terminate();
    cluster.start_again();
    assert_eq!(fsync(&mut cluster.connect(0)), "no");
}

#[test]
fn nothing_is_changed_without_the_master_or_with_a_store_away() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(2).gateways(1).shards(2).start();
    let mut connection = cluster.connect(0);
    let change = ["CONFIG", "SET", "hz", "30", "appendfsync", "no"];
    let hz = |connection: &mut Connection| connection.done(&["CONFIG", "GET", "hz"]).elements().unwrap()[1].text();
    cluster.stores[1].kill_9();
    eventually!("the master misses the store", notation::format(&connection.done(&["STORES"])).contains("down"));
    let text = eventually_refused(&mut connection, &change, "are down; nothing was changed");
    assert!(text.starts_with("ERR stores "), "{text}");
    cluster.stores[1].start_again();
    cluster.master.kill_9();
    let text = eventually_refused(&mut connection, &change, "");
    assert!(text.starts_with("ERR keyspaces are changed by the master, and none can be reached; nothing"), "{text}");
    assert_eq!((fsync(&mut connection), hz(&mut connection)), ("everysec".to_owned(), "10".to_owned()));
    // What does not need the master goes on.
    connection.done(&["CONFIG", "SET", "hz", "15"]);
    cluster.master.start_again();
    eventually!("it is changed when all are back", connection.call(&change) == Value::ok());
    assert_eq!((fsync(&mut connection), hz(&mut connection)), ("no".to_owned(), "30".to_owned()));
}

/// Asks until the answer is an error that ends so.
fn eventually_refused(connection: &mut Connection, command: &[&str], ending: &str) -> String {
    let mut text = String::new();
    eventually!("the change is refused", {
        let answer = connection.call(command);
        text = answer.text();
        answer.is_error() && text.ends_with(ending)
    });
    text
}

#[test]
fn the_option_holds_until_the_keyspace_has_a_setting_of_its_own() {
    let mut server = Server::start_with(&["--fsync", "always", "--shards", "2"]);
    let mut connection = server.connect();
    assert_eq!(fsync(&mut connection), "always");
    assert!(syncs_of_writes(&mut connection) >= WRITES);
    connection.done(&["CONFIG", "SET", "appendfsync", "no"]);
    assert_eq!((fsync(&mut connection), syncs_of_writes(&mut connection)), ("no".to_owned(), 0));
    server.node.kill_9();
    server.node.start_again();
    let mut connection = server.connect();
    assert_eq!((fsync(&mut connection), syncs_of_writes(&mut connection)), ("no".to_owned(), 0));
}

/// Clients that pipeline over the change are answered in order, none is forgotten, none is held for good.
#[test]
fn a_change_under_load_loses_no_answer() {
    let server = Server::start_with(&["--shards", "3"]);
    let address = server.address();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let address = address.clone();
                scope.spawn(move || {
                    let mut connection = Connection::open(&address);
                    for round in 0..60_u32 {
                        let commands: Vec<Vec<String>> =
                            (0..20).map(|number| vec!["INCR".to_owned(), format!("{writer}:{number}")]).collect();
                        let answers = connection.pipeline(&commands).unwrap();
                        assert!(answers.iter().all(|answer| *answer == Value::Integer(i64::from(round) + 1)));
                    }
                })
            })
            .collect();
        let mut connection = server.connect();
        while !writers.iter().all(|writer| writer.is_finished()) {
            for word in ["always", "no", "everysec"] {
                assert_eq!(connection.call(&["CONFIG", "SET", "appendfsync", word]), Value::ok());
            }
        }
    });
}
