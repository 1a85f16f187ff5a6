//! Keyspaces over real processes: created, apart from each other, altered and dropped for good, whoever is killed meanwhile.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use redis_tests::cluster::temporary_directory;
use redis_tests::node::{Node, binary, free_address};
use redis_tests::{Address, Cluster, Connection, Server, Value, eventually, heavy};

/// Counts in keyspace 0 as fast as one client can; no answer may be an error and no count may be lost.
struct Counting {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<i64>,
}

impl Counting {
    fn start(address: Address) -> Counting {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut connection = Connection::open(&address);
            let mut count = 0;
            while !stopped.load(Ordering::Relaxed) {
                count += 1;
                assert_eq!(connection.call(&["INCR", "counter"]), Value::Integer(count));
            }
            count
        });
        Counting { stop, thread }
    }

    fn stop(self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn names(connection: &mut Connection) -> Vec<String> {
    let list = connection.call(&["KEYSPACE", "LIST"]).elements().unwrap();
    let name = |keyspace: &Value| field(keyspace, "name").text();
    list.iter().map(name).collect()
}

/// A field of a map, as RESP2 shows it.
fn field(map: &Value, name: &str) -> Value {
    let elements = map.elements().unwrap();
    let place = elements.iter().position(|element| element.bytes() == Some(name.as_bytes()));
    elements[place.unwrap_or_else(|| panic!("no {name} in {map:?}")) + 1].clone()
}

fn id(connection: &mut Connection, name: &str) -> i64 {
    field(&connection.call(&["KEYSPACE", "INFO", name]), "id").integer().unwrap()
}

fn folders(store: &Path, keyspace: i64) -> Vec<String> {
    let entries = std::fs::read_dir(store.join("shards")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(&format!("{keyspace}-"))).collect()
}

/// The place in the cluster of the store with this id.
fn store_number(cluster: &Cluster, id: &str) -> usize {
    (0..cluster.stores.len()).find(|number| cluster.stores[*number].ready_line().contains(id)).unwrap()
}

fn no_folder_is_left(cluster: &Cluster, keyspace: i64) {
    eventually!("the folders are deleted", {
        (0..cluster.stores.len()).all(|store| folders(&cluster.data(store), keyspace).is_empty())
    });
}

#[test]
fn keyspaces_come_change_and_go_under_load_of_another_one() {
    let _turn = heavy();
    let cluster = Cluster::builder().stores(3).shards(3).gateways(2).start();
    let counting = Counting::start(cluster.address(0));
    let (mut admin, mut other) = (cluster.connect(0), cluster.connect(1));
    for round in 0..4 {
        let name = format!("round-{}", round % 2);
        admin.done(&["KEYSPACE", "CREATE", &name, "SHARDS", "5", "COPIES", "1", "FSYNC", "no"]);
        let keyspace = id(&mut admin, &name);
        let again = admin.call(&["KEYSPACE", "CREATE", &name, "SHARDS", "1"]).text();
        assert!(again.contains("exists already; nothing was changed"), "{again}");
        eventually!("the other gateway knows", other.call(&["SELECT", &name]) == Value::ok());
        for key in 0..200 {
            other.done(&["SET", &key.to_string(), &name]);
        }
        assert_eq!(other.call(&["DBSIZE"]), Value::Integer(200));
        assert_eq!(admin.call(&["EXISTS", "1", "2"]), Value::Integer(0), "keyspace 0 has none of them");
        let info = other.call(&["CLIENT", "INFO"]).text();
        assert!(info.contains(&format!(" db={name} ")), "{info}");
        let text = other.call(&["INFO", "keyspace"]).text();
        assert!(text.contains(&format!("\ndb{name}:keys=200,expires=0,avg_ttl=0\r\n")), "{text}");
        admin.done(&["KEYSPACE", "ALTER", &name, "FSYNC", "always"]);
        other.done(&["SET", "last", "1"]);
        let places: usize = (0..3)
            .map(|store| folders(&cluster.data(store), keyspace).len())
            .inspect(|count| assert!(*count <= 2))
            .sum();
        assert_eq!(places, 5, "spread over the stores");
        other.done(&["FLUSHDB"]);
        other.done(&["SET", "after", "1"]);

        let unconfirmed = admin.call(&["KEYSPACE", "DROP", &name]).text();
        assert!(unconfirmed.contains("CONFIRM drops it; nothing was changed"), "{unconfirmed}");
        admin.done(&["KEYSPACE", "DROP", &name, "CONFIRM"]);
        assert_eq!(names(&mut admin), ["0"]);
        let answer = admin.call(&["SELECT", &name]).text();
        assert!(answer.contains("not an integer"), "{answer}");
        eventually!("whoever is in it is told", {
            other.call(&["GET", "after"]).text().contains("the keyspace of this connection was dropped")
        });
        other.done(&["SELECT", "0"]);
        no_folder_is_left(&cluster, keyspace);
        let gone = admin.call(&["KEYSPACE", "DROP", &name, "CONFIRM"]).text();
        assert!(gone.contains(&format!("no such keyspace '{name}'")), "{gone}");
    }
    for (command, text) in [
        (&["KEYSPACE", "CREATE", "twice", "SHARDS", "1", "COPIES", "60"][..], "60 copies of a shard need 60 stores"),
        (&["KEYSPACE", "CREATE", "far", "SHARDS", "5000"], "a keyspace needs 1 to 1024 shards, not 5000"),
        (&["KEYSPACE", "DROP", "0", "CONFIRM"], "keyspace 0 is where every connection begins"),
    ] {
        let answer = admin.call(command).text();
        assert!(answer.contains(text), "{command:?}: {answer}");
    }
    assert_eq!(names(&mut admin), ["0"]);
    assert!(counting.stop() > 0);
}

#[test]
fn a_store_that_was_down_drops_its_shards_when_it_returns() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(3).shards(3).start();
    for restarts_master in [false, true] {
        let mut admin = cluster.connect(0);
        admin.done(&["KEYSPACE", "CREATE", "zombie", "SHARDS", "3"]);
        let keyspace = id(&mut admin, "zombie");
        admin.done(&["SELECT", "zombie"]);
        for key in 0..300 {
            admin.done(&["SET", &key.to_string(), "brain"]);
        }
        admin.done(&["SELECT", "0"]);
        let down = field(&admin.call(&["KEYSPACE", "INFO", "zombie"]), "layout").elements().unwrap();
        let down = store_number(&cluster, &field(&down[0], "primary").text());
        cluster.stores[down].kill_9();
        eventually!("the master notices", {
            let stores = admin.call(&["STORES"]).elements().unwrap();
            stores.iter().any(|store| field(store, "state").text() == "down")
        });
        let answer = admin.call(&["KEYSPACE", "DROP", "zombie", "CONFIRM"]).text();
        assert!(answer.starts_with("OK, stores ") && answer.contains("delete their shards"), "{answer}");
        assert_eq!(names(&mut admin), ["0"]);
        assert_eq!(folders(&cluster.data(down), keyspace).len(), 1, "it is away");
        if restarts_master {
            cluster.master.kill_9();
            cluster.master.start_again();
        }
        cluster.stores[down].start_again();
        no_folder_is_left(&cluster, keyspace);
        // A gateway that never heard of it, and a master that has only the stores to learn from.
        cluster.kill_9();
        cluster.start_again();
        let mut admin = cluster.connect(0);
        assert_eq!(names(&mut admin), ["0"]);
        admin.done(&["KEYSPACE", "CREATE", "zombie", "SHARDS", "3"]);
        assert!(id(&mut admin, "zombie") > keyspace, "an id is never used twice");
        admin.done(&["SELECT", "zombie"]);
        assert_eq!(admin.call(&["DBSIZE"]), Value::Integer(0));
        admin.done(&["KEYSPACE", "DROP", "zombie", "CONFIRM"]);
    }
}

#[test]
fn with_one_store_of_three_nothing_is_created_or_dropped() {
    let mut cluster = Cluster::builder().stores(3).shards(3).start();
    let mut admin = cluster.connect(0);
    admin.done(&["KEYSPACE", "CREATE", "a", "SHARDS", "1"]);
    cluster.stores[1].kill_9();
    cluster.stores[2].kill_9();
    eventually!("the master notices", {
        let stores = admin.call(&["STORES"]).elements().unwrap();
        stores.iter().filter(|store| field(store, "state").text() == "down").count() == 2
    });
    let answer = admin.call(&["KEYSPACE", "CREATE", "b", "SHARDS", "1"]).text();
    assert!(
        answer.contains("1 of 3 holders of the records are up") && answer.contains("nothing was changed"),
        "{answer}"
    );
    let answer = admin.call(&["KEYSPACE", "DROP", "a", "CONFIRM"]).text();
    assert!(
        answer.contains("1 of 3 holders of the records are up") && answer.contains("nothing was changed"),
        "{answer}"
    );
    cluster.stores[1].start_again();
    cluster.stores[2].start_again();
    eventually!("all are up", admin.call(&["KEYSPACE", "DROP", "a", "CONFIRM"]) == Value::ok());
    assert_eq!(names(&mut admin), ["0"]);
}

#[test]
fn what_was_answered_holds_when_everything_is_killed_at_once() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(3).shards(2).start();
    let mut admin = cluster.connect(0);
    for round in 0..3 {
        admin.done(&["KEYSPACE", "CREATE", "kept", "SHARDS", "4"]);
        cluster.kill_9();
        cluster.start_again();
        admin = cluster.connect(0);
        let keyspace = id(&mut admin, "kept");
        admin.done(&["SELECT", "kept"]);
        for key in 0..100 {
            admin.done(&["SET", &key.to_string(), &round.to_string()]);
        }
        admin.done(&["KEYSPACE", "DROP", "kept", "CONFIRM"]);
        cluster.kill_9();
        cluster.start_again();
        admin = cluster.connect(0);
        assert_eq!(names(&mut admin), ["0"]);
        no_folder_is_left(&cluster, keyspace);
    }
}

#[test]
fn a_database_that_many_choose_first_is_made_once() {
    let cluster = Cluster::builder().stores(2).shards(3).gateways(2).gateway_option("--databases", "20").start();
    for number in ["1", "7", "19"] {
        let choose = |gateway: usize| {
            let address = cluster.address(gateway % 2);
            std::thread::spawn(move || {
                let mut connection = Connection::open(&address);
                connection.done(&["SELECT", number]);
                connection.call(&["INCR", "chosen"]).integer().unwrap()
            })
        };
        let clients: Vec<_> = (0..8).map(choose).collect();
        let counts: i64 = clients.into_iter().map(|client| client.join().unwrap()).sum();
        assert_eq!(counts, (1..=8).sum::<i64>(), "all count in one");
    }
    let mut connection = cluster.connect(0);
    assert_eq!(names(&mut connection), ["0", "1", "7", "19"]);
    assert_eq!(field(&connection.call(&["KEYSPACE", "INFO", "7"]), "shards"), Value::Integer(3), "as keyspace 0");
    assert_eq!(connection.call(&["SELECT", "20"]).text(), "ERR DB index is out of range");
    connection.done(&["SET", "zero", "1"]);
    connection.done(&["FLUSHALL"]);
    connection.done(&["SELECT", "7"]);
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(0));
}

const KEYSPACES: usize = 50;
/// What 50 keyspaces may take beside the caches: some hundred KiB each for the memtables that a database begins with.
const RESIDENT_BYTES_MAX: u64 = 400 << 20;
const OPEN_FILES_MAX: usize = 50 * 20;

#[test]
fn fifty_keyspaces_on_one_store_share_its_memory() {
    let _turn = heavy();
    let options = ["--row-cache", "16mb", "--block-cache", "16mb", "--write-buffer", "32mb", "--max-open-files", "64"];
    let mut server = Server::start_with(&options);
    let mut connection = server.connect();
    let value = "v".repeat(20_000);
    for number in 0..KEYSPACES {
        let name = format!("many-{number}");
        connection.done(&["KEYSPACE", "CREATE", &name, "SHARDS", "1"]);
        connection.done(&["SELECT", &name]);
        for key in 0..100 {
            connection.done(&["SET", &format!("{name}:{key}"), &value]);
        }
    }
    let resident = server.node.resident_bytes();
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.node.pid())).unwrap().count();
    eprintln!("{KEYSPACES} keyspaces: {} MiB resident, {open} open files", resident >> 20);
    assert!(resident < RESIDENT_BYTES_MAX, "{resident}");
    assert!(open < OPEN_FILES_MAX, "{open}");
    server.node.kill_9();
    server.node.start_again();
    let mut connection = server.connect();
    for number in 0..KEYSPACES {
        let name = format!("many-{number}");
        connection.done(&["SELECT", &name]);
        assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(100), "{name}");
        assert_eq!(connection.call(&["GET", &format!("{name}:7")]), Value::bulk(&value));
        connection.done(&["KEYSPACE", "DROP", &name, "CONFIRM"]);
    }
    connection.done(&["SELECT", "0"]);
    assert_eq!(names(&mut connection), ["0"]);
}

#[test]
fn a_backup_has_every_keyspace_and_none_that_was_dropped() {
    let server = Server::start_with(&["--shards", "2"]);
    let mut connection = server.connect();
    connection.done(&["KEYSPACE", "CREATE", "gone", "SHARDS", "1"]);
    connection.done(&["KEYSPACE", "CREATE", "named", "SHARDS", "3", "FSYNC", "always"]);
    connection.done(&["KEYSPACE", "DROP", "gone", "CONFIRM"]);
    for database in ["0", "3", "named"] {
        connection.done(&["SELECT", database]);
        for key in 0..50 {
            connection.done(&["SET", &key.to_string(), database]);
        }
    }
    connection.done(&["SAVE"]);
    let backups = server.data().join("store-1/backups");
    let backup = std::fs::read_dir(&backups).unwrap().next().unwrap().unwrap().path();
    let manifest = std::fs::read_to_string(backup.join("MANIFEST")).unwrap_or_default();
    let directory = temporary_directory();
    let data = directory.path().join("restored");
    let output = Command::new(binary())
        .arg("restore")
        .arg("--from")
        .arg(&backup)
        .arg("--data")
        .arg(data.join("store-1"))
        .output();
    assert!(output.unwrap().status.success(), "{manifest}");
    let listen = free_address();
    let node =
        Node::start("restored", directory.path(), &["server", "--listen", &listen, "--data", data.to_str().unwrap()]);
    let mut connection = Connection::open(&node.redis_address());
    assert_eq!(names(&mut connection).len(), 3);
    for database in ["0", "3", "named"] {
        connection.done(&["SELECT", database]);
        assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(50));
        assert_eq!(connection.call(&["GET", "7"]), Value::bulk(database));
    }
    assert_eq!(field(&connection.call(&["KEYSPACE", "INFO", "named"]), "fsync").text(), "always");
}
