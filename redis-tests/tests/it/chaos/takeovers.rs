//! How long nobody serves a shard when its primary dies, hangs, stops in order or hands over.

use std::time::Duration;

use redis_tests::{Cluster, heavy};

use super::{KEYSPACE, Rounds, SHARDS, Safety, THREE_COPIES, TWO_COPIES, Trial, make_primary};

/// Longer than the longest of them may take, so that none ends because the store is back.
const AWAY_FOR: Duration = Duration::from_millis(6_500);

/// How a primary goes.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Killed,
    Hangs,
    Stopped,
    HandsOver,
}

impl Leave {
    const ALL: [Self; 4] = [Self::Killed, Self::Hangs, Self::Stopped, Self::HandsOver];
}

/// One primary goes and comes back; returns for how long a key was unavailable.
fn leave(trial: &mut Trial, how: Leave) -> Duration {
    trial.longest = Duration::ZERO;
    trial.start_load();
    let store = trial.some_primary();
    trial.event(format!("store-{store}: {how:?}"));
    match how {
        Leave::Killed => trial.cluster.stores[store].kill_9(),
        Leave::Hangs => trial.cluster.stores[store].freeze(),
        Leave::Stopped => assert!(trial.cluster.stores[store].terminate().success()),
        Leave::HandsOver => {
            let shard = trial.random.usize(..SHARDS);
            let place = trial.places(KEYSPACE).unwrap().remove(shard);
            make_primary(&trial.cluster, KEYSPACE, shard, place.replicas[0]);
        }
    }
    match how {
        Leave::Killed | Leave::Hangs | Leave::Stopped => trial.go_on_for(AWAY_FOR),
        Leave::HandsOver => {}
    }
    trial.go_on();
    match how {
        Leave::Killed | Leave::Stopped => trial.cluster.stores[store].start_again(),
        Leave::Hangs => trial.cluster.stores[store].thaw(),
        Leave::HandsOver => {}
    }
    trial.wait_until_whole();
    trial.go_on();
    trial.check();
    trial.longest
}

fn take_over(safety: Safety) {
    let _turn = heavy();
    let Some(mut trial) = Trial::begin("primaries go", Cluster::builder(), safety) else { return };
    let mut times = Leave::ALL.map(|how| (how, Vec::new()));
    let mut rounds = Rounds::new(1);
    while rounds.another() {
        for (how, times) in &mut times {
            times.push(leave(&mut trial, *how));
        }
    }
    for (how, times) in &mut times {
        times.sort();
        let shown: Vec<String> = times.iter().map(|time| format!("{:.2}", time.as_secs_f64())).collect();
        eprintln!("  {how:?}, {} copies: seconds until another served: {}", safety.copies, shown.join(" "));
    }
    trial.end();
}

#[test]
fn another_of_two_copies_serves_soon() {
    take_over(TWO_COPIES);
}

#[test]
fn another_of_three_copies_serves_soon() {
    take_over(THREE_COPIES);
}
