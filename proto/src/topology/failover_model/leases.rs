//! Every course that leases and changes of the record can take under terms: no two stores have the lease of a shard, and an answer never
//! leaves after one of a later primary.
//!
//! Three stores are the holders, and any of them may be named primary: what makes one fit is the other model's (`copies`). A master is a
//! term: it asks a majority for it, writes the newest record again that it finds there, and changes it, always by one version. That several
//! are awake at once is how they overrule each other; what a term has sent may arrive at any time, and never. Its promises arrive
//! together: a holder that promises earlier than the last only refuses more. The votes themselves, with their messages doubled and late, are
//! in the model of the ballot.
//!
//! Time is an order: a holder's grant is over only after the store that asked for it counts it as over, since that store counts less time
//! and from before it asked. So a grant is one bit, until the asker's clock has run out (which may be at any time, also before the answer
//! arrives: then the bit was never set). A holder forgets what it granted when it restarts, and then waits until whatever it granted is over.

use stateright::{Model, Property};

const STORES: usize = 3;
const NOBODY: u8 = STORES as u8;
const ALL: u8 = (1 << STORES) - 1;
/// Room in a state; [`Bounds`] keeps below.
const TERMS: usize = 4;
const EPOCHS: usize = 7;

/// What is taken out of the protocol, to see that the model misses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A holder grants although another store's grant is still valid.
    LeaseWait,
    /// A holder does not refuse a lower term.
    TermCheck,
    /// One holder's vote chooses a record.
    MajorityOfVotes,
    /// One holder's grant is a lease.
    MajorityOfGrants,
    /// A holder grants whoever asks, whatever its record says.
    RecordCheck,
    /// A holder grants for an epoch that is before one for which it has granted.
    GoingBack,
    /// Nothing is checked before an answer leaves.
    SecondCheck,
    /// Before an answer leaves any lease will do, also that of a later epoch than the request's.
    EpochOfCheck,
    /// A holder that has restarted grants at once.
    GrantMemory,
    /// A holder that has restarted knows nothing of its votes.
    VoteMemory,
}

#[derive(Clone, Copy, Debug)]
struct Bounds {
    fault: Fault,
    /// Masters, one after the other, each of which may go on after the next one's start.
    terms: u8,
    /// Versions of the record.
    epochs: u8,
    restarts: u8,
}

/// A master's life: under which epoch it wrote last, and who voted for that. Of votes it hears at once: not having heard is not acting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Term {
    /// 0: nothing yet, the term has not begun.
    epoch: u8,
    voted: u8,
    /// The primary by epoch, in the versions that it wrote; 0: not written in this term, else one more than the store.
    wrote: [u8; EPOCHS],
}

/// A version of the record, as a store has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Version {
    epoch: u8,
    primary: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Store {
    promised: u8,
    /// The term and the version that it voted for last.
    accepted: (u8, Version),
    /// The newest version of which it was told that it was chosen.
    follows: Version,
    /// Has restarted and granted nothing since.
    waits: bool,
    /// The latest epoch for which it has granted since its start.
    gave: u8,
    /// The holders whose grants this store counts, under the epoch that it follows.
    granted: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct World {
    terms: [Term; TERMS],
    begun: u8,
    stores: [Store; STORES],
    restarts: u8,
    /// By store: whose grants it counted at the last restart of any store, and still counts without having asked again.
    before: [u8; STORES],
    /// The latest epoch under which an answer left, and from which store.
    answered: Version,
    overtaken: bool,
    /// The one request that is not answered at once, by whom and under which epoch it passed the gate; epoch 0 = none.
    request: Version,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    /// A new master has the promises of these holders.
    Begin {
        promises: u8,
    },
    Propose {
        term: u8,
        primary: u8,
    },
    /// A term's version arrives at a holder.
    Vote {
        term: u8,
        epoch: u8,
        holder: u8,
    },
    /// A store is told that a version was chosen.
    Tell {
        term: u8,
        epoch: u8,
        store: u8,
    },
    Grant {
        holder: u8,
        store: u8,
    },
    /// The store's clock has run out for a holder's grant.
    RunOut {
        holder: u8,
        store: u8,
    },
    /// A request passes the gate and is answered while the lease is still the same.
    Serve {
        store: u8,
    },
    /// A request passes the gate, and the store is held up …
    Enter {
        store: u8,
    },
    /// … and goes on.
    Answer,
    Restart {
        store: u8,
    },
}

fn bit(store: u8) -> u8 {
    1 << store
}

impl Store {
    /// By its votes and by what it was told: the later one counts.
    fn newest(&self) -> Version {
        if self.accepted.1.epoch > self.follows.epoch { self.accepted.1 } else { self.follows }
    }
}

impl Bounds {
    fn votes(&self) -> u32 {
        if self.fault == Fault::MajorityOfVotes { 1 } else { STORES as u32 / 2 + 1 }
    }

    fn has_lease(&self, store: &Store) -> bool {
        let needed = if self.fault == Fault::MajorityOfGrants { 1 } else { STORES as u32 / 2 + 1 };
        store.granted.count_ones() >= needed
    }

    fn grants(&self, world: &World, holder: u8, store: u8) -> bool {
        let (grants, asks) = (&world.stores[usize::from(holder)], &world.stores[usize::from(store)]);
        let names = grants.newest() == asks.follows || self.fault == Fault::RecordCheck;
        let is_late = asks.follows.epoch < grants.gave && self.fault != Fault::GoingBack;
        let mut others = world.stores.iter().enumerate().filter(|(other, _)| *other != usize::from(store));
        let is_free = if self.fault == Fault::LeaseWait {
            true
        } else if grants.waits {
            // What it does not know, it cannot wait for.
            self.fault == Fault::GrantMemory || world.before == [0; STORES]
        } else {
            others.all(|(_, other)| other.granted & bit(holder) == 0)
        };
        asks.follows.primary == store && names && !is_late && is_free
    }
}

impl World {
    fn term(&mut self, term: u8) -> &mut Term {
        &mut self.terms[usize::from(term) - 1]
    }

    fn wrote(&self, term: u8, epoch: u8) -> Option<Version> {
        let primary = self.terms[usize::from(term) - 1].wrote[usize::from(epoch) - 1].checked_sub(1)?;
        Some(Version { epoch, primary })
    }

    fn write(&mut self, term: u8, version: Version) {
        let life = self.term(term);
        (life.epoch, life.voted) = (version.epoch, 0);
        life.wrote[usize::from(version.epoch) - 1] = version.primary + 1;
    }

    /// Whether a master knows that a version that it wrote is chosen: it writes the next one only then.
    fn is_chosen(&self, bounds: &Bounds, term: u8, epoch: u8) -> bool {
        let life = &self.terms[usize::from(term) - 1];
        life.epoch > epoch || (life.epoch == epoch && life.voted.count_ones() >= bounds.votes())
    }

    fn answer(&mut self, version: Version) {
        self.overtaken |= version.epoch < self.answered.epoch;
        self.overtaken |= version.epoch == self.answered.epoch && version != self.answered;
        self.answered = version;
    }

    /// The same with the second and the third store called by each other's name: nothing tells them apart.
    fn renamed(mut self) -> Self {
        let store = |store: u8| match store {
            1 => 2,
            2 => 1,
            other => other,
        };
        let version = |version: Version| Version { primary: store(version.primary), ..version };
        let mask = |mask: u8| mask & 1 | (mask & 2) << 1 | (mask & 4) >> 1;
        for term in &mut self.terms {
            term.voted = mask(term.voted);
            term.wrote = term.wrote.map(|primary| primary.checked_sub(1).map_or(0, |primary| store(primary) + 1));
        }
        self.stores.swap(1, 2);
        self.before.swap(1, 2);
        self.before = self.before.map(mask);
        for state in &mut self.stores {
            state.accepted.1 = version(state.accepted.1);
            state.follows = version(state.follows);
            state.granted = mask(state.granted);
        }
        (self.answered, self.request) = (version(self.answered), version(self.request));
        self
    }

    fn take(&mut self, bounds: &Bounds, action: Action) -> Option<()> {
        match action {
            Action::Begin { promises } => {
                self.begun += 1;
                let term = self.begun;
                let promising = (0..STORES).filter(|store| promises & bit(*store as u8) != 0);
                let mut newest = (0, Version::default());
                for store in promising {
                    let holder = &mut self.stores[store];
                    holder.promised = term;
                    newest = newest.max_by_position(holder.accepted);
                }
                self.write(term, newest.1);
            }
            Action::Propose { term, primary } => {
                let epoch = self.term(term).epoch + 1;
                self.write(term, Version { epoch, primary });
            }
            Action::Vote { term, epoch, holder } => {
                let version = self.wrote(term, epoch)?;
                let state = &mut self.stores[usize::from(holder)];
                if term < state.promised && bounds.fault != Fault::TermCheck {
                    return None;
                }
                let (last, accepted) = state.accepted;
                if last == term && accepted.epoch > epoch {
                    return None;
                }
                (state.promised, state.accepted) = (term, (term, version));
                let life = self.term(term);
                if life.epoch == epoch {
                    life.voted |= bit(holder);
                }
            }
            Action::Tell { term, epoch, store } => {
                let version = self.wrote(term, epoch)?;
                let state = &mut self.stores[usize::from(store)];
                (state.follows, state.granted) = (version, 0);
                self.before[usize::from(store)] = 0;
            }
            Action::Grant { holder, store } => {
                let epoch = self.stores[usize::from(store)].follows.epoch;
                let grants = &mut self.stores[usize::from(holder)];
                (grants.waits, grants.gave) = (false, epoch);
                self.stores[usize::from(store)].granted |= bit(holder);
                self.before[usize::from(store)] &= !bit(holder);
            }
            Action::RunOut { holder, store } => {
                self.stores[usize::from(store)].granted &= !bit(holder);
                self.before[usize::from(store)] &= !bit(holder);
            }
            Action::Serve { store } => {
                let epoch = self.stores[usize::from(store)].follows.epoch;
                self.answer(Version { epoch, primary: store });
            }
            Action::Enter { store } => {
                let epoch = self.stores[usize::from(store)].follows.epoch;
                self.request = Version { epoch, primary: store };
            }
            Action::Answer => {
                let request = std::mem::take(&mut self.request);
                let state = &self.stores[usize::from(request.primary)];
                let is_same = state.follows.epoch == request.epoch || bounds.fault == Fault::EpochOfCheck;
                let leaves = bounds.fault == Fault::SecondCheck || (bounds.has_lease(state) && is_same);
                if leaves {
                    self.answer(request);
                }
            }
            Action::Restart { store } => {
                self.restarts += 1;
                let first = self.terms[0].wrote[0] - 1;
                let state = &mut self.stores[usize::from(store)];
                (state.granted, state.waits, state.gave) = (0, true, 0);
                if bounds.fault == Fault::VoteMemory {
                    let version = Version { epoch: 1, primary: first };
                    (state.promised, state.accepted, state.follows) = (0, (0, version), version);
                }
                if self.request.primary == store {
                    self.request = Version::default();
                }
                self.before = self.stores.map(|store| store.granted);
            }
        }
        Some(())
    }
}

trait Later {
    fn max_by_position(self, other: Self) -> Self;
}

impl Later for (u8, Version) {
    /// By term, then epoch.
    fn max_by_position(self, other: Self) -> Self {
        if (other.0, other.1.epoch) > (self.0, self.1.epoch) { other } else { self }
    }
}

impl Model for Bounds {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let first = Version { epoch: 1, primary: 0 };
        let mut world = World { begun: 1, ..World::default() };
        world.write(1, first);
        world.term(1).voted = ALL;
        for store in &mut world.stores {
            *store = Store { promised: 1, accepted: (1, first), follows: first, ..Store::default() };
        }
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.begun < self.terms {
            let quorums = (1..=ALL).filter(|promises| promises.count_ones() == self.votes());
            actions.extend(quorums.map(|promises| Action::Begin { promises }));
        }
        for term in 1..=world.begun {
            let life = &world.terms[usize::from(term) - 1];
            if life.epoch < self.epochs && world.is_chosen(self, term, life.epoch) {
                let primary = life.wrote[usize::from(life.epoch) - 1] - 1;
                let others = (0..=NOBODY).filter(|other| *other != primary);
                actions.extend(others.map(|primary| Action::Propose { term, primary }));
            }
            for epoch in (1..=life.epoch).filter(|epoch| world.wrote(term, *epoch).is_some()) {
                for store in 0..STORES as u8 {
                    actions.push(Action::Vote { term, epoch, holder: store });
                    let is_newer = world.stores[usize::from(store)].follows.epoch < epoch;
                    if is_newer && world.is_chosen(self, term, epoch) {
                        actions.push(Action::Tell { term, epoch, store });
                    }
                }
            }
        }
        for (number, state) in world.stores.iter().enumerate() {
            let store = number as u8;
            for holder in 0..STORES as u8 {
                if self.grants(world, holder, store) {
                    actions.push(Action::Grant { holder, store });
                }
                if state.granted & bit(holder) != 0 {
                    actions.push(Action::RunOut { holder, store });
                }
            }
            if self.has_lease(state) {
                actions.push(Action::Serve { store });
                if world.request.epoch == 0 {
                    actions.push(Action::Enter { store });
                }
            }
            if world.restarts < self.restarts {
                actions.push(Action::Restart { store });
            }
        }
        if world.request.epoch != 0 {
            actions.push(Action::Answer);
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = *before;
        world.take(self, action)?;
        let world = world.min(world.renamed());
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_LINE, |bounds, world: &World| {
                let versions = (1..=world.begun).flat_map(|term| (1..=bounds.epochs).map(move |epoch| (term, epoch)));
                let chosen = versions.filter(|(term, epoch)| world.is_chosen(bounds, *term, *epoch));
                let mut of_epoch = [None; EPOCHS];
                chosen
                    .filter_map(|(term, epoch)| world.wrote(term, epoch))
                    .all(|version| *of_epoch[usize::from(version.epoch) - 1].get_or_insert(version) == version)
            }),
            Property::always(ONE_LEASE, |bounds, world: &World| {
                world.stores.iter().filter(|store| bounds.has_lease(store)).count() < 2
            }),
            Property::always(IN_ORDER, |_, world: &World| !world.overtaken),
            Property::sometimes(TAKEN_OVER, |_, world: &World| world.answered.primary != 0),
        ]
    }
}

const ONE_LINE: &str = "no two versions of one epoch are chosen";
const ONE_LEASE: &str = "no two stores have a lease";
const IN_ORDER: &str = "no answer leaves after one of a later primary";
const TAKEN_OVER: &str = "another store answers";

/// All that can be shown quickly: two versions beyond the first under one master, one under two.
const ONE_MASTER: Bounds = Bounds { fault: Fault::None, terms: 1, epochs: 3, restarts: 1 };
const TWO_MASTERS: Bounds = Bounds { fault: Fault::None, terms: 2, epochs: 2, restarts: 1 };

/// The shortest way to a wrong state.
fn refute(bounds: Bounds, fault: Fault) {
    super::refute(Bounds { fault, ..bounds }, &[ONE_LINE, ONE_LEASE, IN_ORDER]);
}

#[test]
fn no_course_of_one_master_has_two_leases() {
    super::check(ONE_MASTER);
}

#[test]
fn no_course_of_two_masters_has_two_leases() {
    let quick = Bounds { restarts: 0, ..TWO_MASTERS };
    let wide = vec![TWO_MASTERS, Bounds { epochs: 3, ..quick }];
    super::bounds(vec![quick], wide).into_iter().for_each(super::check);
}

#[test]
fn a_lease_must_wait_for_the_one_before() {
    refute(Bounds { restarts: 0, ..ONE_MASTER }, Fault::LeaseWait);
}

#[test]
fn a_holder_must_refuse_a_lower_term() {
    refute(TWO_MASTERS, Fault::TermCheck);
}

#[test]
fn a_record_needs_a_majority_of_votes() {
    refute(TWO_MASTERS, Fault::MajorityOfVotes);
}

#[test]
fn a_lease_needs_a_majority_of_grants() {
    refute(ONE_MASTER, Fault::MajorityOfGrants);
}

#[test]
fn a_holder_must_ask_its_record_before_it_grants() {
    refute(ONE_MASTER, Fault::RecordCheck);
}

#[test]
fn a_holder_must_not_go_back_in_the_epochs_that_it_grants() {
    refute(Bounds { restarts: 0, ..TWO_MASTERS }, Fault::GoingBack);
}

#[test]
fn the_lease_must_be_checked_before_an_answer_leaves() {
    refute(Bounds { restarts: 0, ..ONE_MASTER }, Fault::SecondCheck);
}

#[test]
fn the_lease_of_a_later_epoch_is_not_that_of_the_request() {
    refute(Bounds { restarts: 0, ..ONE_MASTER }, Fault::EpochOfCheck);
}

#[test]
fn a_restarted_holder_must_wait_before_it_grants() {
    refute(ONE_MASTER, Fault::GrantMemory);
}

#[test]
fn a_holder_must_know_its_votes_after_a_restart() {
    refute(TWO_MASTERS, Fault::VoteMemory);
}
