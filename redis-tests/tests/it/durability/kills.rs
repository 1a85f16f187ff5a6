//! kill -9 at random moments under load: every acknowledged write is there, none is half there.
//!
//! `VASTO_KILLS` is the number of kills over all settings; 1,000 take about a quarter of an hour.

use std::sync::Barrier;
use std::time::Duration;

use fastrand::Rng;
use redis_tests::eventually::pause;
use redis_tests::seed::{number_from_environment, seeded};
use redis_tests::{Server, Value, heavy};

use super::load::{Writer, connect};
use super::small_with;

const KILLS: u64 = 75;
const SETTINGS: u64 = 3;
const WRITERS: usize = 4;
/// The kill comes this long after the load began, at most.
const LOAD_MS_MAX: u64 = 300;
/// A process that is killed while it recovers has so long for it, at most: about what it needs.
const RECOVERY_MS_MAX: u64 = 60;

#[test]
fn nothing_is_lost_or_half_there_over_kills_with_fsync_always() {
    kill_again_and_again("always");
}

#[test]
fn nothing_is_lost_or_half_there_over_kills_with_fsync_everysec() {
    kill_again_and_again("everysec");
}

#[test]
fn nothing_is_lost_or_half_there_over_kills_with_fsync_no() {
    kill_again_and_again("no");
}

fn kill_again_and_again(fsync: &str) {
    let _turn = heavy();
    let mut random = seeded(&format!("kills with fsync={fsync}")).random;
    let kills_wanted = number_from_environment("VASTO_KILLS").unwrap_or(KILLS).div_ceil(SETTINGS);
    let mut server = Server::start_with(&small_with(&["--shards", "2", "--fsync", fsync]));
    let mut writers: Vec<Writer> = (0..WRITERS).map(|number| Writer::new(&number.to_string(), random.fork())).collect();
    let (mut kills, mut in_recovery, mut flushes, mut rounds) = (0, 0, 0, 0_u64);
    while kills < kills_wanted {
        rounds += 1;
        load_and_kill(&mut server, &mut writers, &mut random);
        kills += 1;
        while random.u8(..5) == 0 {
            server.node.start_again_without_waiting();
            pause(Duration::from_millis(random.u64(..RECOVERY_MS_MAX)));
            server.node.kill_9();
            kills += 1;
            in_recovery += 1;
        }
        server.node.start_again();

        let mut connection = server.connect();
        let wrong: Vec<String> = writers.iter_mut().flat_map(|writer| writer.check(&mut connection)).collect();
        assert!(
            wrong.is_empty(),
            "after kill {kills}, {} are wrong:\n{}",
            wrong.len(),
            wrong[..wrong.len().min(20)].join("\n")
        );
        // Stamps grow over every end: else this write would be older than the one before the kill, or than a flush.
        if rounds > 1 {
            assert_eq!(connection.call(&["GET", "probe"]), Value::bulk((rounds - 1).to_string()));
        }
        if random.u8(..8) == 0 {
            connection.done(&["FLUSHALL"]);
            writers.iter_mut().for_each(Writer::was_flushed);
            flushes += 1;
        }
        let probe = rounds.to_string();
        connection.done(&["SET", "probe", &probe]);
        assert_eq!(connection.call(&["GET", "probe"]), Value::bulk(&probe));
    }
    let sum = |figure: fn(&Writer) -> u64| writers.iter().map(figure).sum::<u64>();
    let (acknowledged, done, undone) =
        (sum(|writer| writer.acknowledged), sum(|writer| writer.found_done), sum(|writer| writer.found_undone));
    eprintln!(
        "fsync={fsync}: {kills} kills ({in_recovery} during recovery), {acknowledged} operations acknowledged and kept, \
         of {} without an answer {done} were there; {flushes} flushes",
        done + undone
    );
    assert!(acknowledged > rounds, "hardly anything was written: {acknowledged} in {rounds} rounds");
}

fn load_and_kill(server: &mut Server, writers: &mut [Writer], random: &mut Rng) {
    let connections = connect(&server.address(), writers.len());
    let begin = Barrier::new(writers.len() + 1);
    std::thread::scope(|scope| {
        for (writer, mut connection) in writers.iter_mut().zip(connections) {
            let begin = &begin;
            scope.spawn(move || {
                begin.wait();
                writer.write_until_cut(&mut connection);
            });
        }
        begin.wait();
        pause(Duration::from_micros(random.u64(..LOAD_MS_MAX * 1000)));
        server.node.kill_9();
    });
}
