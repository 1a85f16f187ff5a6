//! BGSAVE and SAVE over real processes, and what `vasto restore` makes of their folders.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use redis_tests::cluster::{launch_gateway, launch_master, launch_store, temporary_directory, wait_until_serving};
use redis_tests::node::{READY_TIMEOUT, binary, free_address};
use redis_tests::{Address, Cluster, Connection, Node, Server, Value, eventually, heavy};

fn restore(from: &Path, data: &Path) -> Output {
    Command::new(binary()).arg("restore").arg("--from").arg(from).arg("--data").arg(data).output().unwrap()
}

fn restored(from: &Path, data: &Path) {
    let output = restore(from, data);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The folders of a store's backups, in the order of their names, which is that of their times.
fn backups(store: &Path) -> Vec<PathBuf> {
    let entries = match std::fs::read_dir(store.join("backups")) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        entries => entries.unwrap(),
    };
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

const PAIRS: usize = 40;

/// Writes two keys of one shard at once, again and again, with growing numbers.
struct Pairs {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<[AtomicU64]>,
    thread: JoinHandle<()>,
}

fn pair(number: usize) -> [String; 2] {
    [format!("{{pair:{number}}}a"), format!("{{pair:{number}}}b")]
}

impl Pairs {
    fn start(address: Address) -> Pairs {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged: Arc<[AtomicU64]> = (0..PAIRS).map(|_| AtomicU64::new(0)).collect();
        let (stopped, acks) = (stop.clone(), acknowledged.clone());
        let thread = std::thread::spawn(move || {
            let mut connection = Connection::open(&address);
            for round in 1.. {
                for (number, acknowledged) in acks.iter().enumerate() {
                    let ([a, b], value) = (pair(number), round.to_string());
                    connection.done(&["MSET", &a, &value, &b, &value]);
                    acknowledged.store(round, Ordering::Release);
                }
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        Pairs { stop, acknowledged, thread }
    }

    fn acknowledged(&self) -> Vec<u64> {
        self.acknowledged.iter().map(|value| value.load(Ordering::Acquire)).collect()
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// Each pair is whole, and not older than this.
fn check_pairs(connection: &mut Connection, not_older: &[u64]) {
    for (number, not_older) in not_older.iter().enumerate() {
        let [a, b] = pair(number);
        let values = connection.done(&["MGET", &a, &b]).elements().unwrap();
        assert_eq!(values[0], values[1], "pair {number} is torn");
        let value: u64 = values[0].text().parse().unwrap();
        assert!(value >= *not_older, "pair {number} holds {value}; {not_older} was acknowledged");
    }
}

fn names(prefix: &str) -> Vec<String> {
    (0..500).map(|number| format!("{prefix}:{number}")).collect()
}

fn write(connection: &mut Connection, names: &[String]) {
    let commands: Vec<Vec<&str>> = names.iter().map(|name| vec!["SET", name, name]).collect();
    assert!(connection.pipeline(&commands).unwrap().iter().all(|reply| *reply == Value::ok()));
}

fn read(connection: &mut Connection, names: &[String]) -> Vec<Value> {
    let commands: Vec<Vec<&str>> = names.iter().map(|name| vec!["GET", name]).collect();
    connection.pipeline(&commands).unwrap()
}

#[test]
fn a_restored_server_has_all_that_was_acknowledged_before_bgsave() {
    let _turn = heavy();
    let server = Server::start_with(&["--stores", "2", "--shards", "3"]);
    let mut connection = server.connect();
    assert_eq!(connection.call(&["LASTSAVE"]), Value::Integer(0));
    let before = names("before");
    write(&mut connection, &before);
    connection.done(&["SET", "mortal", "1", "PXAT", "33177117420123"]);
    connection.done(&["SET", "deleted", "1"]);
    connection.done(&["DEL", "deleted"]);
    let pairs = Pairs::start(server.address());
    eventually!("every pair is written", pairs.acknowledged().iter().all(|value| *value > 3));
    let acknowledged = pairs.acknowledged();
    assert_eq!(connection.call(&["BGSAVE"]).text(), "Background saving started");
    eventually!(60 s, "the backup is done", connection.call(&["LASTSAVE"]).integer() > Some(0));
    let info = connection.done(&["INFO", "persistence"]).text();
    assert!(info.contains("rdb_bgsave_in_progress:0") && info.contains("rdb_last_bgsave_status:ok"), "{info}");
    assert!(!info.contains("rdb_last_save_time:0"), "{info}");
    // What comes after the backup is not in it, whatever it is.
    let after = names("after");
    write(&mut connection, &after);
    pairs.stop();
    connection.done(&["DEL", "before:7", "mortal"]);
    connection.done(&["SET", "before:8", "changed"]);
    connection.done(&["FLUSHALL"]);

    let directory = temporary_directory();
    let data = directory.path().join("restored");
    let stores = ["store-1", "store-2"];
    for store in stores {
        let [backup] = &*backups(&server.data().join(store)) else { panic!("{store} has another number of backups") };
        restored(backup, &data.join(store));
    }
    let arguments = ["server", "--listen", &free_address(), "--data", data.to_str().unwrap(), "--stores", "2"];
    let node = Node::start("restored", directory.path(), &arguments);
    wait_until_serving(&node.redis_address());
    let mut again = Connection::open(&node.redis_address());
    assert!(read(&mut again, &before).iter().zip(&before).all(|(value, name)| *value == Value::bulk(name)));
    assert!(read(&mut again, &after).iter().all(|value| *value == Value::Nil));
    assert_eq!(again.call(&["PEXPIRETIME", "mortal"]), Value::Integer(33_177_117_420_123));
    assert_eq!(again.call(&["GET", "deleted"]), Value::Nil);
    check_pairs(&mut again, &acknowledged);
    assert_eq!(again.call(&["DBSIZE"]), Value::Integer((before.len() + 1 + 2 * PAIRS) as i64));
    // It takes writes, and makes backups of its own.
    write(&mut again, &after);
    again.done(&["SAVE"]);
    assert_eq!(backups(&data.join("store-1")).len(), 1);
    // The old one still serves and knows nothing of it.
    assert_eq!(connection.call(&["DBSIZE"]), Value::Integer(0));
}

#[test]
fn a_restored_cluster_serves_and_every_gateway_knows_the_last_save() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(2).gateways(2).shards(4).start();
    let before = names("before");
    write(&mut cluster.connect(0), &before);
    cluster.connect(0).done(&["SAVE"]);
    let last = cluster.connect(0).call(&["LASTSAVE"]);
    assert!(last.integer() > Some(0));
    assert_eq!(cluster.connect(1).call(&["LASTSAVE"]), last);
    cluster.kill_9();
    cluster.start_again();
    assert_eq!(cluster.connect(1).call(&["LASTSAVE"]), last, "it outlives the processes");
    let folders: Vec<PathBuf> = (0..2).map(|store| backups(&cluster.data(store)).remove(0)).collect();
    assert_eq!(folders[0].file_name(), folders[1].file_name(), "one name for all stores");

    let directory = temporary_directory();
    for (number, folder) in folders.iter().enumerate() {
        restored(folder, &directory.path().join(format!("store-{number}")));
    }
    cluster.kill_9();
    let master_address = free_address();
    let mut master = launch_master(&directory, &master_address, 4, 2);
    master.wait_ready(READY_TIMEOUT);
    let mut stores = [0, 1].map(|number| launch_store(&format!("store-{number}"), &directory, &master_address));
    stores.iter_mut().for_each(|store| store.wait_ready(READY_TIMEOUT));
    let mut gateway = launch_gateway("gateway", &directory, &master_address, &[]);
    gateway.wait_ready(READY_TIMEOUT);
    wait_until_serving(&gateway.redis_address());
    let mut again = Connection::open(&gateway.redis_address());
    assert!(read(&mut again, &before).iter().zip(&before).all(|(value, name)| *value == Value::bulk(name)));
    assert_eq!(again.call(&["DBSIZE"]), Value::Integer(before.len() as i64));
}

#[test]
fn a_crash_in_mid_backup_leaves_nothing_that_looks_like_one() {
    let _turn = heavy();
    let mut server = Server::start();
    let mut connection = server.connect();
    // Enough that a kill comes before its checksums are taken, and of bytes that do not shrink.
    for number in 0..40 {
        let value: Vec<u8> = (0..1 << 20).map(|_| fastrand::u8(..)).collect();
        connection.done(&[&b"SET"[..], format!("large:{number}").as_bytes(), &value]);
    }
    let store = server.data().join("store-1");
    let directory = temporary_directory();
    for round in 0..3 {
        server.connect().done(&["BGSAVE"]);
        server.node.kill_9();
        server.node.start_again();
        wait_until_serving(&server.address());
        let whole: Vec<PathBuf> = backups(&store).into_iter().filter(|folder| folder.extension().is_none()).collect();
        let has_saved = server.connect().call(&["LASTSAVE"]).integer() > Some(0);
        assert_eq!(has_saved, !whole.is_empty(), "what looks whole is a backup, and nothing else is");
        for (number, folder) in whole.iter().enumerate() {
            restored(folder, &directory.path().join(format!("{round}-{number}")));
        }
    }
    server.connect().done(&["SAVE"]);
    let left = backups(&store);
    assert!(left.iter().all(|folder| folder.extension().is_none()), "{left:?}");
}

#[test]
fn a_damaged_backup_is_refused_with_the_name_of_its_file() {
    let server = Server::start();
    let mut connection = server.connect();
    write(&mut connection, &names("key"));
    connection.done(&["SAVE"]);
    let [backup] = &*backups(&server.data().join("store-1")) else { panic!("one backup was made") };
    let shard = backup.join("shards/0-0");
    let mut tables: Vec<PathBuf> = std::fs::read_dir(&shard).unwrap().map(|entry| entry.unwrap().path()).collect();
    tables.retain(|path| path.extension().is_some_and(|extension| extension == "sst"));
    let table = tables.first().unwrap_or_else(|| panic!("no table in {}", shard.display()));
    let directory = temporary_directory();
    let data = directory.path().join("restored");
    let complaint = |what: &str| {
        let output = restore(backup, &data);
        assert_eq!(output.status.code(), Some(1), "{what}");
        assert!(!data.exists(), "{what}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let content = std::fs::read(table).unwrap();
    // A file of its own: the table is a hard link to that of the running server.
    std::fs::remove_file(table).unwrap();
    let text = complaint("a missing file");
    assert!(text.contains(table.to_str().unwrap()) && text.contains("it is missing"), "{text}");
    let mut flipped = content.clone();
    flipped[content.len() / 2] ^= 1;
    std::fs::write(table, flipped).unwrap();
    let text = complaint("a flipped bit");
    assert!(text.contains(table.to_str().unwrap()) && text.contains("its checksum is wrong"), "{text}");
    std::fs::write(table, content).unwrap();
    restored(backup, &data);
    let output = restore(backup, &data);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not empty"));
    let output = restore(&directory.path().join("nothing"), &directory.path().join("other"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("it has no manifest"));
}
