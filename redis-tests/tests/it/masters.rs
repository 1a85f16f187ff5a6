//! Masters over real processes: killed, away, stopped and continued, several at once; clients of the data never notice.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use redis_tests::seed::seeded;
use redis_tests::{Address, Cluster, Connection, Value, eventually, heavy, notation};

/// A client of the data that never gets an error: it counts, and reads what it wrote.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<i64>,
}

impl Load {
    fn start(address: Address) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut connection = Connection::open(&address);
            let mut count = 0;
            while !stopped.load(Ordering::Relaxed) {
                count += 1;
                let key = format!("key-{}", count % 97);
                assert_eq!(connection.call(&["INCR", "counter"]), Value::Integer(count));
                assert_eq!(connection.call(&["SET", &key, &count.to_string()]), Value::ok());
                assert_eq!(connection.call(&["GET", &key]).text(), count.to_string());
            }
            count
        });
        Load { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        assert!(self.thread.join().unwrap() > 0);
    }
}

/// The time itself is what is tested: how long somebody is away.
#[expect(clippy::disallowed_methods, reason = "nothing happens meanwhile that could be waited for")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// One line of INFO vasto.
fn info(connection: &mut Connection, name: &str) -> String {
    let text = connection.call(&["INFO", "vasto"]).text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
}

fn term(connection: &mut Connection) -> u64 {
    info(connection, "vasto_term").parse().unwrap()
}

/// The number of the master that leads, as the gateway says.
fn leader(cluster: &mut Cluster, connection: &mut Connection, masters: usize) -> Option<usize> {
    let address = info(connection, "vasto_master");
    (0..masters).find(|number| cluster.master(*number).grpc_address().to_string() == address)
}

fn names(connection: &mut Connection) -> BTreeSet<String> {
    let list = connection.call(&["KEYSPACE", "LIST"]).elements().unwrap();
    list.iter().map(|keyspace| keyspace.elements().unwrap()[1].text()).collect()
}

#[test]
fn a_master_that_is_killed_restarted_and_away_is_not_missed() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(3).shards(3).start();
    let load = Load::start(cluster.address(0));
    let mut admin = cluster.connect(0);
    for round in 0..4 {
        let before = term(&mut admin);
        cluster.master.kill_9();
        if round == 3 {
            // Away for a while: what needs it says so.
            pause(Duration::from_secs(8));
            let answer = admin.call(&["KEYSPACE", "CREATE", "nobody", "SHARDS", "1"]).text();
            assert!(answer.contains("none can be reached; nothing was changed"), "{answer}");
        }
        cluster.master.start_again();
        let name = format!("round-{round}");
        admin.done(&["KEYSPACE", "CREATE", &name, "SHARDS", "2"]);
        admin.done(&["KEYSPACE", "ALTER", &name, "FSYNC", "always"]);
        eventually!("the new term is known", term(&mut admin) > before);
    }
    let expected: BTreeSet<String> = (0..4).map(|round| format!("round-{round}")).chain(["0".to_owned()]).collect();
    assert_eq!(names(&mut admin), expected);
    load.stop();
}

/// Two at once, one of them paused: the standby takes over, and the stale one changes nothing, says so and steps back.
#[test]
fn a_leader_that_is_stopped_and_continued_steps_back() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(3).shards(3).masters(2).start();
    let load = Load::start(cluster.address(0));
    let mut admin = cluster.connect(0);
    eventually!("the other master stands by", !info(&mut admin, "vasto_standby_masters").is_empty());
    let first = leader(&mut cluster, &mut admin, 2).expect("one leads");
    let before = term(&mut admin);
    cluster.master(first).freeze();
    eventually!("the standby leads", term(&mut admin) > before);
    assert_eq!(leader(&mut cluster, &mut admin, 2), Some(1 - first));
    admin.done(&["KEYSPACE", "CREATE", "made", "SHARDS", "2"]);
    admin.done(&["KEYSPACE", "ALTER", "made", "FSYNC", "always"]);
    admin.done(&["KEYSPACE", "ALTER", "0", "FSYNC", "no"]);
    // Ten seconds in all, so that its sessions have ended and its events have waited.
    pause(Duration::from_secs(6));
    let epochs = notation::format(&admin.call(&["KEYSPACE", "INFO", "0"]));
    let after = term(&mut admin);
    cluster.master(first).thaw();
    eventually!("the stale one steps back", {
        let log = cluster.master(first).log();
        log.contains(&format!("another master has term {after}: this one steps back from term {before} and stands by"))
    });
    eventually!("it stands by", info(&mut admin, "vasto_standby_masters").contains(':'));
    assert_eq!((notation::format(&admin.call(&["KEYSPACE", "INFO", "0"])), term(&mut admin)), (epochs, after));
    admin.done(&["KEYSPACE", "DROP", "made", "CONFIRM"]);
    assert_eq!(names(&mut admin), ["0".to_owned()].into());
    load.stop();
}

#[test]
fn three_masters_restart_in_any_order_while_keyspaces_come_and_go() {
    let _turn = heavy();
    let mut random = seeded("three_masters_restart_in_any_order_while_keyspaces_come_and_go").random;
    let mut cluster = Cluster::builder().stores(3).shards(3).masters(3).gateways(2).start();
    let load = Load::start(cluster.address(0));
    let (mut admin, mut other) = (cluster.connect(0), cluster.connect(1));
    let mut expected = BTreeSet::from(["0".to_owned()]);
    for round in 0..6 {
        // One or two of them die at a bad moment, and come back.
        let victims: BTreeSet<usize> = (0..1 + round % 2).map(|_| random.usize(0..3)).collect();
        for victim in &victims {
            cluster.master(*victim).kill_9();
        }
        let name = format!("k{round}");
        let created = admin.call(&["KEYSPACE", "CREATE", &name, "SHARDS", "2"]);
        if created.is_error() {
            // It was under way when its master died, or none had come to lead: it holds or not, and says which.
            eventually!("it is created or was", {
                let answer = admin.call(&["KEYSPACE", "CREATE", &name, "SHARDS", "2"]);
                !answer.is_error() || answer.text().contains("exists already")
            });
        }
        expected.insert(name.clone());
        eventually!("it is altered", !admin.call(&["KEYSPACE", "ALTER", &name, "FSYNC", "always"]).is_error());
        for victim in &victims {
            cluster.master(*victim).start_again();
        }
        if round % 2 == 1 {
            let gone = format!("k{}", round - 1);
            eventually!("it is dropped", {
                let answer = admin.call(&["KEYSPACE", "DROP", &gone, "CONFIRM"]);
                !answer.is_error() || answer.text().contains("no such keyspace")
            });
            expected.remove(&gone);
        }
        eventually!("both gateways know", names(&mut admin) == expected && names(&mut other) == expected);
    }
    load.stop();
}

#[test]
fn the_group_grows_with_the_cluster_and_forms_in_one_of_before_there_were_terms() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().stores(1).shards(1).start();
    let mut admin = cluster.connect(0);
    eventually!("one holder", info(&mut admin, "vasto_holders").split(',').count() == 1);
    let stores = admin.call(&["STORES"]).elements().unwrap();
    let first = notation::format(&stores[0]);
    assert!(first.contains("\"no: 1 of the 3 holders that it takes\""), "{first}");
    for _ in 0..2 {
        cluster.launch_store();
    }
    eventually!("three holders", info(&mut admin, "vasto_holders").split(',').count() == 3);
    eventually!("failover is possible", info(&mut admin, "vasto_automatic_failover") == "yes");
    admin.done(&["KEYSPACE", "CREATE", "spread", "SHARDS", "3"]);
    admin.done(&["SET", "k", "v"]);

    // Folders of before there were terms have no votes.
    cluster.terminate();
    for store in 0..3 {
        fs::remove_dir_all(cluster.data(store).join("holder")).unwrap();
        fs::remove_file(cluster.data(store).join("peers")).unwrap();
    }
    cluster.start_again();
    let mut admin = cluster.connect(0);
    admin.done(&["KEYSPACE", "ALTER", "spread", "FSYNC", "always"]);
    eventually!("three holders", info(&mut admin, "vasto_holders").split(',').count() == 3);
    assert_eq!(term(&mut admin), 1, "the first term");
    assert_eq!(admin.call(&["GET", "k"]).text(), "v");
    assert_eq!(names(&mut admin), ["0".to_owned(), "spread".to_owned()].into());
}
