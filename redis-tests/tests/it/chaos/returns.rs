//! What an old primary acknowledged and no other copy got: how much of it is away after its death, and that all of it is there when it returns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use redis_tests::eventually::pause;
use redis_tests::history::open_in;
use redis_tests::{Address, Cluster, Connection, Value, heavy};

use super::{Rounds, TWO_COPIES, copies_are_supported, create_keyspace, wait_until_whole};

const KEYSPACE: &str = "returns";

const WRITERS: usize = 4;

/// Commands of one packet: a log that is written fast is replicated late.
const PIPELINE: usize = 32;

/// How long is written before and after a primary dies.
const WRITTEN_FOR: Duration = Duration::from_secs(3);

/// Keys that are written once, each with the moment of its acknowledgement.
fn write_once(address: &Address, name: &str, start: Instant, stop: &AtomicBool) -> Vec<(String, Duration)> {
    let mut acknowledged = Vec::new();
    let mut connection: Option<Connection> = None;
    let mut next = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let Some(open) = connection.as_mut() else {
            connection = open_in(address, KEYSPACE).ok();
            if connection.is_none() {
                pause(Duration::from_millis(20));
            }
            continue;
        };
        let keys: Vec<String> = (next..next + PIPELINE as u64).map(|number| format!("{name}:{number}")).collect();
        next += PIPELINE as u64;
        let commands: Vec<Vec<&str>> = keys.iter().map(|key| vec!["SET", key, key]).collect();
        match open.pipeline(&commands) {
            Ok(replies) => {
                let at = start.elapsed();
                let stored = keys.into_iter().zip(replies).filter(|(_, reply)| *reply == Value::ok());
                acknowledged.extend(stored.map(|(key, _)| (key, at)));
            }
            Err(_) => connection = None,
        }
    }
    acknowledged
}

/// Acknowledged keys that are not there, or hold something else.
fn missing(address: &Address, acknowledged: &[(String, Duration)]) -> Vec<(String, Duration)> {
    let mut connection = open_in(address, KEYSPACE).unwrap();
    let mut missing = Vec::new();
    for packet in acknowledged.chunks(500) {
        let commands: Vec<Vec<&str>> = packet.iter().map(|(key, _)| vec!["GET", key.as_str()]).collect();
        for ((key, at), reply) in packet.iter().zip(connection.pipeline(&commands).unwrap()) {
            assert!(!reply.is_error(), "{key}: {}", reply.text());
            if reply != Value::bulk(key) {
                missing.push((key.clone(), *at));
            }
        }
    }
    missing
}

#[test]
fn what_only_an_old_primary_has_is_merged_back_when_it_returns() {
    let _turn = heavy();
    let mut cluster = Cluster::builder().gateways(2).start();
    if !copies_are_supported(&cluster) {
        return;
    }
    create_keyspace(&cluster, KEYSPACE, 3, TWO_COPIES);
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        wait_until_whole(&cluster, KEYSPACE, TWO_COPIES);
        let start = Instant::now();
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..WRITERS)
            .map(|number| {
                let (stop, address) = (stop.clone(), cluster.address(number % 2));
                let name = format!("once:{}:{number}", rounds.number());
                std::thread::spawn(move || write_once(&address, &name, start, &stop))
            })
            .collect();
        pause(WRITTEN_FOR);
        let place = cluster.places(&mut cluster.connect(0), KEYSPACE).unwrap().remove(0);
        let primary = place.primary.unwrap();
        cluster.stores[primary].kill_9();
        let killed = start.elapsed();
        // The old primary's rows of these keys are older than those that are written now.
        let mut connection = open_in(&cluster.address(0), KEYSPACE).unwrap();
        let rewritten = "rewritten by the new primary";
        pause(WRITTEN_FOR);
        stop.store(true, Ordering::Relaxed);
        let mut acknowledged: Vec<_> = writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
        redis_tests::eventually!(60 s, "all shards serve", !connection.call(&["DBSIZE"]).is_error());
        let lost = missing(&cluster.address(1), &acknowledged);
        // Every other lost one is written again, every one after that deleted: the old primary must not undo either.
        let (mut set, mut deleted) = (Vec::new(), Vec::new());
        for (number, (key, _)) in lost.iter().enumerate().take(300) {
            match number % 3 {
                0 => {
                    connection.done(&["SET", key, rewritten]);
                    set.push(key.clone());
                }
                1 => {
                    connection.done(&["SET", key, "soon gone"]);
                    connection.done(&["DEL", key]);
                    deleted.push(key.clone());
                }
                _ => {}
            }
        }
        let window = lost.iter().map(|(_, at)| killed.saturating_sub(*at)).max().unwrap_or_default();
        let late = lost.iter().filter(|(_, at)| *at > killed + Duration::from_secs(1)).count();
        eprintln!(
            "chaos: {} acknowledged, {} of them away after kill -9 of store-{primary}, the oldest of these {:.1} ms before it",
            acknowledged.len(),
            lost.len(),
            window.as_secs_f64() * 1000.0
        );
        assert_eq!(late, 0, "acknowledged by the new primary and lost");

        cluster.stores[primary].start_again();
        wait_until_whole(&cluster, KEYSPACE, TWO_COPIES);
        acknowledged.retain(|(key, _)| !set.contains(key) && !deleted.contains(key));
        redis_tests::eventually!(60 s, "everything is merged back", missing(&cluster.address(1), &acknowledged).is_empty());
        for key in &set {
            assert_eq!(connection.call(&["GET", key]), Value::bulk(rewritten), "{key}");
        }
        for key in &deleted {
            assert_eq!(connection.call(&["GET", key]), Value::Nil, "{key}");
        }
        eprintln!("chaos: 0 of {} away after its return", acknowledged.len());
    }
}
