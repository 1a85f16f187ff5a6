//! Every course that two masters and three holders can take within bounds: messages are lost, doubled and overtake each other, masters
//! restart. The transitions are those of [`Holder`] and [`Proposer`] themselves.
//!
//! A request that was sent stays deliverable for ever, to each holder: one that never is, is lost; one that is delivered twice is doubled.
//! Its answer arrives at once or is lost. A late one adds nothing: what a master sends when it hears early may itself arrive late, and what
//! it does only while it has not heard, it may do after a lost answer. A holder has synced before it answers, so its crash is the loss of an
//! answer. One keyspace: the only thing that several share is the promise.

use std::collections::{BTreeMap, BTreeSet};

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::ballot::{Accepted, Answer, Holder, Refusal, Request, Term, Versioned};
use super::proposer::Proposer;
use crate::id::{Epoch, KeyspaceId, StoreId};

const HOLDERS: usize = 3;
const MAJORITY: usize = 2;
const KEYSPACE: KeyspaceId = KeyspaceId(0);
/// The first change that each master makes.
const CHANGE_OF_FIRST: u64 = 1;
const CHANGE_OF_SECOND: u64 = 11;

/// A record that remembers all that it came from: who made each version.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Line(Vec<u64>);

impl Versioned for Line {
    fn keyspace(&self) -> KeyspaceId {
        KEYSPACE
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.0.len() as u64)
    }
}

/// What is taken out of the protocol, to see that the model misses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    TermCheck,
    Majority,
    Adopting,
    /// A holder loses its disk and votes on under its old id.
    Memory,
}

#[derive(Clone, Copy, Debug)]
struct Cluster {
    fault: Fault,
    /// Terms that both masters together may ask for, over all their lives.
    campaigns: u8,
    /// Changes that both may make.
    changes: u8,
    /// How often one of them may restart.
    restarts: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    masters: Vec<Life>,
    holders: Vec<Holder<Line>>,
    sent: BTreeSet<(usize, Request<Line>)>,
    /// Who has ever accepted what, whether a master heard of it or not.
    votes: BTreeMap<(Term, Epoch), BTreeSet<usize>>,
    refused: bool,
    disks_lost: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Life {
    proposer: Proposer<Line>,
    campaigns: u8,
    changes: u8,
    restarts: u8,
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Campaign(usize),
    Change(usize),
    Restart(usize),
    Exchange { master: usize, holder: usize, request: Request<Line>, answer: Way },
    LoseDisk(usize),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Arrives,
    IsLost,
}

fn store(holder: usize) -> StoreId {
    StoreId(holder as u32)
}

impl Cluster {
    fn proposer(&self, life: u64) -> Proposer<Line> {
        let proposer = Proposer::new((0..HOLDERS).map(store).collect(), life);
        if self.fault == Fault::Majority { proposer.with_quorum(1) } else { proposer }
    }
}

impl World {
    fn send(&mut self, master: usize) {
        let proposer = &self.masters[master].proposer;
        let requests = (0..HOLDERS).flat_map(|holder| proposer.requests(store(holder)));
        self.sent.extend(requests.map(|request| (master, request)));
    }

    fn chosen_by(&self, master: usize) -> Line {
        self.masters[master].proposer.chosen(KEYSPACE).cloned().unwrap_or(Line(Vec::new()))
    }

    /// What a majority has ever accepted, by term and epoch.
    fn chosen(&self) -> BTreeMap<(Term, Epoch), &Line> {
        let accepted = self.sent.iter().filter_map(|(_, request)| match request {
            Request::Accept(accepted) => Some((accepted.position(), &accepted.record)),
            Request::Prepare { .. } => None,
        });
        let is_chosen =
            |position: &(Term, Epoch)| self.votes.get(position).is_some_and(|holders| holders.len() >= MAJORITY);
        accepted.filter(|(position, _)| is_chosen(position)).collect()
    }
}

impl Model for Cluster {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let life = |life| Life { proposer: self.proposer(life), campaigns: 0, changes: 0, restarts: 0 };
        let (masters, holders) = (vec![life(1), life(2)], vec![Holder::default(); HOLDERS]);
        let (sent, votes) = (BTreeSet::new(), BTreeMap::new());
        vec![World { masters, holders, sent, votes, refused: false, disks_lost: 0 }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let total = |count: fn(&Life) -> u8| world.masters.iter().map(count).sum::<u8>();
        let campaigns = total(|master| master.campaigns);
        let changes = total(|master| master.changes);
        let restarts = total(|master| master.restarts);
        for (number, master) in world.masters.iter().enumerate() {
            if campaigns < self.campaigns {
                actions.push(Action::Campaign(number));
            }
            if changes < self.changes && master.proposer.leads() {
                actions.push(Action::Change(number));
            }
            // A standby without a term has nothing to lose.
            if restarts < self.restarts && master.proposer.term().is_some() {
                actions.push(Action::Restart(number));
            }
        }
        if self.fault == Fault::Memory && world.disks_lost == 0 {
            actions.extend((0..HOLDERS).map(Action::LoseDisk));
        }
        for (master, request) in &world.sent {
            for holder in 0..HOLDERS {
                for answer in [Way::Arrives, Way::IsLost] {
                    actions.push(Action::Exchange { master: *master, holder, request: request.clone(), answer });
                }
            }
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        match action {
            Action::Campaign(master) => {
                world.masters[master].campaigns += 1;
                world.masters[master].proposer.campaign();
                world.send(master);
            }
            Action::Change(master) => {
                let Line(mut line) = world.chosen_by(master);
                let expected = Epoch(line.len() as u64);
                let life = &mut world.masters[master];
                life.changes += 1;
                // Which master, and which of its changes: no two changes are alike.
                line.push(master as u64 * 10 + u64::from(life.changes));
                life.proposer.propose(expected, Line(line)).ok()?;
                world.send(master);
            }
            Action::Restart(master) => {
                let life = &mut world.masters[master];
                life.restarts += 1;
                life.proposer = self.proposer(master as u64 + 1 + 10 * u64::from(life.restarts));
            }
            Action::LoseDisk(holder) => {
                world.disks_lost += 1;
                world.holders[holder] = Holder::default();
            }
            Action::Exchange { master, holder, request, answer: way } => {
                let receiver = &mut world.holders[holder];
                if self.fault == Fault::TermCheck {
                    *receiver = receiver.clone().without_promise();
                }
                let answer = receiver.answer(request);
                match &answer {
                    Ok(Answer::Voted { term, epoch, .. }) => {
                        world.votes.entry((*term, *epoch)).or_default().insert(holder);
                    }
                    Err(Refusal::LowerTerm { .. }) => world.refused = true,
                    Ok(Answer::Promised { .. }) => {}
                    Err(Refusal::Overtaken { .. }) => {}
                    Err(Refusal::OtherRecord { .. }) => {}
                }
                if way == Way::Arrives {
                    let proposer = &mut world.masters[master].proposer;
                    let led = proposer.leads();
                    proposer.hear(store(holder), answer);
                    if self.fault == Fault::Adopting && !led {
                        proposer.forget_adopted();
                    }
                    world.send(master);
                }
            }
        }
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_RECORD, |_, world: &World| {
                let mut by_epoch = BTreeMap::new();
                world.chosen().into_iter().all(|((_, epoch), line)| *by_epoch.entry(epoch).or_insert(line) == line)
            }),
            // By term and epoch, each continues the one before.
            Property::always(NOTHING_LOST, |_, world: &World| {
                let lines: Vec<&Line> = world.chosen().into_values().collect();
                lines.windows(2).all(|pair| pair[1].0.starts_with(&pair[0].0))
            }),
            // The others would be empty if it could not happen.
            Property::sometimes(TAKEN_OVER, |_, world: &World| {
                world.chosen().into_values().any(|line| line.0.starts_with(&[CHANGE_OF_FIRST, CHANGE_OF_SECOND]))
            }),
            Property::sometimes(REFUSED, |_, world: &World| world.refused),
        ]
    }
}

const ONE_RECORD: &str = "never two different records chosen for one keyspace and epoch";
const NOTHING_LOST: &str = "a chosen record is never lost by a later master";
const TAKEN_OVER: &str = "the second master changes what the first has made";
const REFUSED: &str = "a holder refuses the term of a master that was overruled";

/// Looks at all states.
fn check(cluster: Cluster) {
    let checker = cluster.checker().spawn_bfs().join();
    eprintln!("{cluster:?}: {} states", checker.unique_state_count());
    checker.assert_properties();
}

/// The shortest way to a wrong state.
fn violation(fault: Fault) -> usize {
    let cluster = Cluster { fault, campaigns: 2, changes: 2, restarts: 0 };
    let checker = cluster.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = [ONE_RECORD, NOTHING_LOST].into_iter().find_map(|name| checker.discovery(name));
    let steps = found.unwrap_or_else(|| panic!("without {fault:?} nothing goes wrong")).into_actions();
    eprintln!("without {fault:?}, {} steps: {steps:?}", steps.len());
    steps.len()
}

#[test]
fn no_course_of_two_masters_loses_or_doubles_a_record() {
    check(Cluster { fault: Fault::None, campaigns: 2, changes: 3, restarts: 0 });
}

#[test]
fn no_course_with_restarts_of_masters_loses_or_doubles_a_record() {
    check(Cluster { fault: Fault::None, campaigns: 2, changes: 2, restarts: 1 });
}

#[test]
fn without_the_term_check_a_record_is_lost() {
    violation(Fault::TermCheck);
}

#[test]
fn without_a_majority_a_record_is_lost() {
    violation(Fault::Majority);
}

#[test]
fn without_adopting_a_record_is_lost() {
    violation(Fault::Adopting);
}

#[test]
fn a_holder_that_lost_its_disk_must_not_vote_under_its_old_id() {
    violation(Fault::Memory);
}

#[test]
fn a_store_outside_the_group_has_no_vote() {
    let cluster = Cluster { fault: Fault::None, campaigns: 2, changes: 2, restarts: 0 };
    let mut proposer = cluster.proposer(1);
    let term = proposer.campaign();
    let blank = StoreId(99);
    for holder in [blank, store(0), blank] {
        let promise = Answer::Promised { term, accepted: Vec::<Accepted<Line>>::new() };
        proposer.hear(holder, Ok(promise));
    }
    assert!(!proposer.leads());
}
