//! A gateway that sleeps through a whole resize and wakes with clients who write through it: what it knew is no more, and nothing is lost.

use redis_tests::history::open_in;
use redis_tests::{Cluster, Connection, Value, heavy};

use super::{KEYSPACE, ONE_COPY, Rounds, Safety, THREE_COPIES, Trial};

/// The gateway that sleeps.
const SLEEPER: usize = 1;

/// Keys that are used through it, of all shards.
const KEYS: usize = 300;

fn packet(connection: &mut Connection, words: impl Fn(&str) -> Vec<String>) -> Vec<Value> {
    let commands: Vec<Vec<String>> = (0..KEYS).map(|number| words(&format!("sleep:{number}"))).collect();
    connection.pipeline(&commands).unwrap()
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn sleep_through(safety: Safety, path: &[usize]) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin_with("a gateway sleeps", Cluster::builder(), safety, path[0]) else { return };
    let mut rounds = Rounds::new(path.len() - 1);
    while rounds.another() {
        let shards = path[1 + rounds.number() % (path.len() - 1)];
        if trial.places(KEYSPACE).unwrap().len() == shards {
            trial.resize(path[0]);
        }
        let mut awake = open_in(&trial.cluster.address(0), KEYSPACE).unwrap();
        let mut asleep = open_in(&trial.cluster.address(SLEEPER), KEYSPACE).unwrap();
        let before = rounds.number().to_string();
        assert!(packet(&mut awake, |key| owned(&["SET", key, "1"])).iter().all(|reply| *reply == Value::ok()));
        assert!(packet(&mut asleep, |key| owned(&["INCR", key])).iter().all(|reply| *reply == Value::Integer(2)));

        // Through the other one: what a sleeping gateway has under way when it falls asleep is answered late, or not known.
        trial.start_load_at(vec![trial.cluster.address(0)]);
        trial.event(format!("gateway-{SLEEPER} sleeps"));
        trial.cluster.gateways[SLEEPER].freeze();
        let operation = trial.begin_operation(&["RESIZE", KEYSPACE, "SHARDS", &shards.to_string()]);
        let (status, end) = trial.follow_operation(&operation, |_| ());
        assert_eq!(end, super::operation::End::Done, "{}", status.line());
        // Some are as the sleeper knew them, some have changed since.
        assert!(
            packet(&mut awake, |key| owned(&["INCRBY", key, "10"])).iter().all(|reply| *reply == Value::Integer(12))
        );
        trial.go_on();
        // They wait for it in its sockets.
        let mut waiting = Vec::new();
        for number in 0..KEYS {
            let key = format!("sleep:{number}");
            waiting.extend(redis_tests::resp::command(&["INCR", &key]));
            waiting.extend(redis_tests::resp::command(&["APPEND", &format!("text:{before}:{number}"), "x"]));
        }
        asleep.send(&waiting).unwrap();
        trial.event(format!("gateway-{SLEEPER} wakes"));
        trial.cluster.gateways[SLEEPER].thaw();
        for number in 0..KEYS {
            assert_eq!(asleep.read_value().unwrap(), Value::Integer(13), "sleep:{number}");
            assert_eq!(asleep.read_value().unwrap(), Value::Integer(1), "text:{before}:{number}");
        }
        // Nothing else goes on: both count the same.
        trial.check();
        assert_eq!(asleep.call(&["DBSIZE"]), awake.call(&["DBSIZE"]));
        for connection in [&mut awake, &mut asleep] {
            let values = packet(connection, |key| owned(&["GET", key]));
            assert!(values.iter().all(|value| *value == Value::bulk("13")), "{values:?}");
        }
        trial.wait_for_shards(shards);
        // And both of them go on.
        trial.start_load();
        trial.go_on();
        trial.check();
    }
    let totals = trial.end();
    assert_eq!(totals.failed(), 0, "{totals:?}");
}

#[test]
fn a_gateway_sleeps_through_resizes_of_one_copy() {
    sleep_through(ONE_COPY, &[2, 4, 1]);
}

#[test]
fn a_gateway_sleeps_through_a_resize_of_three_copies() {
    sleep_through(THREE_COPIES, &[2, 3]);
}
