//! A process dies exactly at a step of a resize, or at any moment of it: the resize ends by itself, done or as before, and the next one works.

use std::time::Duration;

use redis_tests::eventually::eventually_within;
use redis_tests::{Cluster, eventually, heavy};

use super::company::{Company, Failures};
use super::operation::End;
use super::{KEYSPACE, ONE_COPY, RECOVERY_PATIENCE, Rounds, Safety, THREE_COPIES, Trial, make_primary, panics_of};

/// Whose step it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Source,
    Target,
    Master,
}

const POINTS: &[(Part, &str)] = &[
    (Part::Source, "source_opened"),
    (Part::Source, "source_group_sent"),
    (Part::Source, "source_copied"),
    (Part::Source, "source_fence_kept"),
    (Part::Source, "source_fenced"),
    (Part::Source, "source_before_end"),
    (Part::Source, "source_after_end"),
    (Part::Source, "source_committed"),
    (Part::Source, "source_before_clean"),
    (Part::Source, "source_cleaned"),
    (Part::Target, "target_before_empty"),
    (Part::Target, "target_emptied"),
    (Part::Target, "target_before_ingest"),
    (Part::Target, "target_ingested"),
    (Part::Target, "target_changed"),
    (Part::Target, "target_before_drained"),
    (Part::Target, "target_drained"),
    (Part::Target, "target_committed"),
    (Part::Target, "target_serves"),
    (Part::Master, "master_began"),
    (Part::Master, "master_before_fence"),
    (Part::Master, "master_fenced"),
    (Part::Master, "master_before_commit"),
    (Part::Master, "master_committed"),
    (Part::Master, "master_before_clean"),
    (Part::Master, "master_before_done"),
];

/// The number of shards before growing and after shrinking, and the other one.
const FEW: usize = 2;
const MANY: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Grows,
    Shrinks,
}

impl Direction {
    const BOTH: [Self; 2] = [Self::Grows, Self::Shrinks];

    fn shards(self) -> usize {
        match self {
            Self::Grows => MANY,
            Self::Shrinks => FEW,
        }
    }
}

/// A process of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Process {
    Store(usize),
    Master,
}

impl Trial {
    fn process(&mut self, process: Process) -> &mut redis_tests::Node {
        match process {
            Process::Store(store) => &mut self.cluster.stores[store],
            Process::Master => &mut self.cluster.master,
        }
    }

    /// The one that does this part of the next resize.
    fn concerned(&mut self, part: Part, direction: Direction, newcomer: usize) -> Process {
        let places = self.places(KEYSPACE).unwrap();
        let leader = |shard: usize| Process::Store(places[shard].primary.unwrap());
        match (part, direction) {
            (Part::Master, _) => Process::Master,
            (Part::Source, Direction::Grows) | (Part::Target, Direction::Shrinks) => leader(0),
            (Part::Source, Direction::Shrinks) => leader(MANY - 1),
            // It has nothing else, so the new shard goes there.
            (Part::Target, Direction::Grows) => Process::Store(newcomer),
        }
    }

    /// Starts a process with other variables; what it led it leads again.
    fn start_with(&mut self, process: Process, environment: &[(String, String)]) {
        let led: Vec<usize> = match process {
            Process::Master => Vec::new(),
            Process::Store(store) => {
                let places = self.places(KEYSPACE).unwrap();
                (0..places.len()).filter(|shard| places[*shard].primary == Some(store)).collect()
            }
        };
        let node = self.process(process);
        assert!(node.terminate().success());
        node.set_environment(environment);
        node.start_again();
        self.wait_until_whole();
        if let Process::Store(store) = process {
            for shard in led {
                make_primary(&self.cluster, KEYSPACE, shard, store);
            }
            self.wait_until_whole();
        }
    }

    /// Starts again whatever has ended, without its fail point.
    fn revive(&mut self) {
        let ended: Vec<Process> = (0..self.cluster.stores.len())
            .map(Process::Store)
            .chain([Process::Master])
            .filter(|process| !self.process(*process).is_running())
            .collect();
        for process in &ended {
            self.event(format!("{process:?} has ended and is started again"));
            let node = self.process(*process);
            node.kill_9();
            node.set_environment(&[]);
            node.start_again_without_waiting();
        }
        self.panics += ended.len();
    }

    fn wait_until_all_are_ready(&mut self) {
        for store in &mut self.cluster.stores {
            store.wait_ready(redis_tests::node::READY_TIMEOUT);
        }
        self.cluster.master.wait_ready(redis_tests::node::READY_TIMEOUT);
    }

    /// The keyspace has so many shards in the end, whatever has become of the first attempt.
    fn settle(&mut self, shards: usize, before: usize, end: &End) {
        // Who ends at the last step of all may still be on its way out when the operation is done.
        eventually_within(RECOVERY_PATIENCE, "nothing is left behind", || {
            self.revive();
            self.leftovers()
        });
        self.wait_until_all_are_ready();
        match end {
            End::Done => self.wait_for_shards(shards),
            End::Aborted(reason) => {
                eprintln!("  aborted: {reason}");
                self.wait_for_shards(before);
                self.resize(shards);
            }
        }
        self.go_on();
        self.check();
    }
}

/// `false` if the resize went through without coming by the point.
fn die_at(trial: &mut Trial, newcomer: usize, (part, point): (Part, &str), direction: Direction) -> bool {
    let process = trial.concerned(part, direction, newcomer);
    let before: usize = trial.places(KEYSPACE).unwrap().len();
    trial.start_with(process, &[("FAILPOINTS".to_owned(), format!("resize::{point}=1*panic"))]);
    trial.start_load();
    trial.event(format!("{process:?} will end at {point}"));
    let panics = trial.panics;
    let shards = direction.shards();
    let words = ["RESIZE", KEYSPACE, "SHARDS", &shards.to_string()];
    let operation = trial.insist_on_operation(&words, Trial::revive);
    let (_, end) = trial.follow_operation(&operation, Trial::revive);
    // At its last step it may end a moment after that.
    trial.go_on();
    trial.revive();
    trial.settle(shards, before, &end);
    let was_there = trial.panics > panics;
    eprintln!("  {point}, {direction:?}: {end:?}{}", if was_there { "" } else { ", and nobody came by" });
    if !was_there {
        trial.start_with(process, &[]);
    }
    was_there
}

/// What a process may not come by: a shard that vanishes is deleted, not cleaned; and where clients write to the target meanwhile, or copies
/// follow it, no file is taken in.
fn may_be_missed(point: &str, direction: Direction) -> bool {
    let points = ["source_before_clean", "source_cleaned", "target_before_ingest", "target_ingested"];
    direction == Direction::Shrinks && points.contains(&point)
}

/// Two shards with their copies on three stores, and a fourth that has nothing: who plays which part is known.
fn begin(name: &str, safety: Safety) -> Option<(Trial, usize)> {
    let mut trial = Trial::begin_with(name, Cluster::builder(), safety, FEW)?;
    let newcomer = trial.cluster.add_store();
    Some((trial, newcomer))
}

/// At these points always, and at one by chance; at all of them, in both directions, with `VASTO_CHAOS_SECONDS`.
fn die_at_steps(safety: Safety, always: &[&str]) {
    let _turn = heavy();
    let Some((mut trial, newcomer)) = begin("a process dies at a step of a resize", safety) else { return };
    let company = Company::start(&trial.cluster, trial.seed, Failures::AreCounted);
    let by_name = |name: &str| *POINTS.iter().find(|(_, point)| *point == name).expect("there is such a point");
    let mut chosen: Vec<(Part, &str)> = always.iter().map(|name| by_name(name)).collect();
    let others: Vec<(Part, &str)> = POINTS.iter().filter(|point| !chosen.contains(point)).copied().collect();
    chosen.push(others[trial.random.usize(..others.len())]);
    let steps: Vec<((Part, &str), Direction)> = if Rounds::new(0).are_many() {
        POINTS.iter().flat_map(|point| Direction::BOTH.map(|direction| (*point, direction))).collect()
    } else {
        chosen.into_iter().zip(Direction::BOTH.into_iter().cycle()).collect()
    };
    eprintln!("  steps: {steps:?}");
    let mut missed = Vec::new();
    let mut rounds = Rounds::new(steps.len());
    while rounds.another() {
        let (point, direction) = steps[rounds.number() % steps.len()];
        // After an odd number of steps the next round begins with the other direction.
        let needed = if direction == Direction::Grows { FEW } else { MANY };
        if trial.places(KEYSPACE).unwrap().len() != needed {
            trial.resize(needed);
        }
        if !die_at(&mut trial, newcomer, point, direction) && !may_be_missed(point.1, direction) {
            missed.push((point.1, direction));
        }
    }
    company.end();
    trial.end();
    assert!(missed.is_empty(), "nobody came by {missed:?}");
}

#[test]
fn a_process_dies_at_a_step_of_a_resize_of_one_copy() {
    die_at_steps(ONE_COPY, &["source_fenced", "target_drained", "master_fenced"]);
}

#[test]
fn a_process_dies_at_a_step_of_a_resize_of_three_copies() {
    die_at_steps(THREE_COPIES, &["master_committed", "target_drained", "source_fenced"]);
}

/// Longer than stores wait for a master before they end what it has left, and than a request waits.
const LEFT_ALONE: Duration = Duration::from_secs(9);

#[test]
fn nothing_fails_when_the_master_dies_in_the_middle_and_stays_away() {
    let _turn = heavy();
    let Some((mut trial, _)) = begin("the master dies in a resize and stays away", ONE_COPY) else { return };
    let mut rounds = Rounds::new(2);
    while rounds.another() {
        // Behind a fence, which stores lift; and when the commit is chosen, of which they and the gateways must hear then.
        let (point, shards) = [("master_fenced", MANY), ("master_committed", FEW)][rounds.number() % 2];
        let before = trial.places(KEYSPACE).unwrap().len();
        let shards = if before == shards { FEW + MANY - shards } else { shards };
        trial.start_with(Process::Master, &[("FAILPOINTS".to_owned(), format!("resize::{point}=1*panic"))]);
        trial.start_load();
        trial.event(format!("the master will end at {point}"));
        let operation = trial.begin_operation(&["RESIZE", KEYSPACE, "SHARDS", &shards.to_string()]);
        eventually!(60 s, "the master ends", !trial.cluster.master.is_running());
        trial.event("the master has ended");
        trial.go_on_for(LEFT_ALONE);
        trial.revive();
        let (_, end) = trial.follow_operation(&operation, |_| ());
        trial.settle(shards, before, &end);
    }
    let totals = trial.end();
    assert_eq!(totals.failed(), 0, "{totals:?}");
}

/// Longer than a resize of so little takes without a fault.
const MOMENTS_MS: u64 = 3_000;

const AWAY_MS: u64 = 2_000;

fn die_at_any_moment(safety: Safety) {
    let _turn = heavy();
    let Some((mut trial, _)) = begin("a process dies at any moment of a resize", safety) else { return };
    let company = Company::start(&trial.cluster, trial.seed, Failures::AreCounted);
    let mut rounds = Rounds::new(3);
    while rounds.another() {
        let before = trial.places(KEYSPACE).unwrap().len();
        let shards = [1, 2, 3, 4].into_iter().filter(|shards| *shards != before).collect::<Vec<_>>();
        let shards = shards[trial.random.usize(..shards.len())];
        trial.start_load();
        let operation = trial.begin_operation(&["RESIZE", KEYSPACE, "SHARDS", &shards.to_string()]);
        let moment = Duration::from_millis(trial.random.u64(..MOMENTS_MS));
        let stores = trial.cluster.stores.len();
        let victim = match trial.random.usize(..=stores) {
            store if store < stores => Process::Store(store),
            _ => Process::Master,
        };
        trial.go_on_for(moment);
        trial.event(format!("kill -9 {victim:?} after {moment:?}"));
        trial.process(victim).kill_9();
        let away = Duration::from_millis(trial.random.u64(..AWAY_MS));
        trial.go_on_for(away);
        trial.event(format!("{victim:?} is started again"));
        trial.process(victim).start_again();
        let (_, end) = trial.follow_operation(&operation, |_| ());
        trial.settle(shards, before, &end);
    }
    company.end();
    assert_eq!(trial.cluster.nodes().map(|node| panics_of(node)).sum::<usize>(), 0);
    trial.end();
}

#[test]
fn a_process_dies_at_any_moment_of_a_resize_of_one_copy() {
    die_at_any_moment(ONE_COPY);
}

#[test]
fn a_process_dies_at_any_moment_of_a_resize_of_three_copies() {
    die_at_any_moment(THREE_COPIES);
}
