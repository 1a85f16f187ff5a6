//! What a master does to propose records: takes a term, adopts what holders have accepted, changes by compare-and-swap.
//! No clock, no chance, no I/O.
//!
//! Invariants:
//! - Nothing is proposed before a majority has promised the term, and then first what was adopted from their answers.
//! - A record may be acted on when [`Proposer::chosen`] returns it: a majority has accepted it under this term.
//! - In one term there is one record of each epoch, and the next only after the one before is chosen.
//! - After a holder has refused the term, nothing is proposed under it any more.
//! - The group of holders is itself voted on. It changes by one store at a time, when all records are with a majority of it, and while it
//!   changes both the old and the new one must agree to everything: any majority of one has a store in common with any of the other.
//! - The first group is formed by promises of all stores that could have a record, and written when all of its members keep all records.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::ballot::{Accepted, Answer, Refusal, Request, Term, Versioned};
use super::peers::HolderGroup;
use crate::id::{Epoch, KeyspaceId, StoreId};

/// Why a record is not proposed; nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProposeError {
    #[error("this master does not lead")]
    NotLeading,
    #[error("the change before is not yet kept by a majority of the holders")]
    Busy,
    #[error("the record has epoch {found}, not {expected}")]
    OtherEpoch { expected: Epoch, found: Epoch },
    #[error("epoch {proposed} does not follow epoch {expected}")]
    Gap { expected: Epoch, proposed: Epoch },
    #[error("the group of holders changes by one store at a time")]
    NotOneStore,
}

/// What an answer changes beyond the count of votes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Nothing,
    /// A majority has promised; what was adopted is to be sent to all holders.
    Leads(Term),
    /// The record may be acted on.
    Chosen(KeyspaceId, Epoch),
    /// Another master has the higher term: this one is a standby now, and says so.
    SteppedBack {
        own: Term,
        newer: Term,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposer<R> {
    group: Group<R>,
    /// Enough votes, whatever a majority is; only a test sets it.
    quorum_max: usize,
    life: u64,
    /// The highest term number that was heard of.
    highest: u64,
    phase: Phase<R>,
}

/// Whose majority decides, as far as it is known before a term is taken.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Group<R> {
    Fixed(BTreeSet<StoreId>),
    /// The newest that some store says it has accepted; none: there is no group yet.
    Heard(Option<Accepted<R>>),
}

/// How a cluster without a group gets one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Formation<R> {
    /// All of them must promise: every store that could have a record that nobody else has.
    pub electors: BTreeSet<StoreId>,
    /// The group; all of its members must keep all records and then it.
    pub group: R,
    /// It is asked for the group before the others, so that of two masters that form one at the same time the second finds the first's.
    pub first: StoreId,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase<R> {
    Standby,
    Preparing { term: Term, forming: Option<Formation<R>>, promised: BTreeMap<StoreId, Vec<Accepted<R>>> },
    Leading { term: Term, registers: BTreeMap<KeyspaceId, Register<R>>, voters: Voters },
}

/// The newest version that this term has for one keyspace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Register<R> {
    record: R,
    voted: BTreeSet<StoreId>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Voters {
    Group(BTreeSet<StoreId>),
    /// The new group is not chosen yet.
    Changing {
        old: BTreeSet<StoreId>,
        new: BTreeSet<StoreId>,
    },
    /// The first group is not chosen yet: all must agree.
    Forming {
        members: BTreeSet<StoreId>,
        first: StoreId,
    },
}

impl Voters {
    fn contains(&self, store: StoreId) -> bool {
        match self {
            Self::Group(members) | Self::Forming { members, .. } => members.contains(&store),
            Self::Changing { old, new } => old.contains(&store) || new.contains(&store),
        }
    }

    fn have_chosen(&self, voted: &BTreeSet<StoreId>, quorum_max: usize) -> bool {
        match self {
            Self::Group(members) => is_majority(members, voted, quorum_max),
            Self::Changing { old, new } => is_majority(old, voted, quorum_max) && is_majority(new, voted, quorum_max),
            Self::Forming { members, .. } => members.is_subset(voted),
        }
    }
}

fn is_majority(members: &BTreeSet<StoreId>, voted: &BTreeSet<StoreId>, quorum_max: usize) -> bool {
    members.intersection(voted).count() >= (members.len() / 2 + 1).min(quorum_max)
}

impl<R: Versioned> Proposer<R> {
    /// Of a group that never changes. `life` is drawn at random by each start of a master.
    pub fn new(holders: BTreeSet<StoreId>, life: u64) -> Self {
        Self { group: Group::Fixed(holders), quorum_max: usize::MAX, life, highest: 0, phase: Phase::Standby }
    }

    /// Of a group that stores tell.
    pub fn of_cluster(life: u64) -> Self {
        Self { group: Group::Heard(None), quorum_max: usize::MAX, life, highest: 0, phase: Phase::Standby }
    }

    /// Takes note of a group that a store has accepted.
    pub fn hear_group(&mut self, accepted: Accepted<R>) {
        if let Group::Heard(known) = &mut self.group
            && accepted.record.group().is_some()
            && known.as_ref().is_none_or(|known| known.position() < accepted.position())
        {
            *known = Some(accepted);
        }
    }

    /// The group that was heard of last, whether it is in force or not.
    pub fn heard_group(&self) -> Option<&HolderGroup> {
        match &self.group {
            Group::Fixed(_) | Group::Heard(None) => None,
            Group::Heard(Some(accepted)) => accepted.record.group(),
        }
    }

    /// The term under which this master asks or leads.
    pub fn term(&self) -> Option<Term> {
        match &self.phase {
            Phase::Standby => None,
            Phase::Preparing { term, .. } | Phase::Leading { term, .. } => Some(*term),
        }
    }

    pub fn leads(&self) -> bool {
        match &self.phase {
            Phase::Leading { .. } => true,
            Phase::Standby | Phase::Preparing { .. } => false,
        }
    }

    /// Whether the first group of the cluster is not chosen yet.
    pub fn is_forming(&self) -> bool {
        match &self.phase {
            Phase::Standby => false,
            Phase::Preparing { forming, .. } => forming.is_some(),
            Phase::Leading { voters: Voters::Forming { .. }, .. } => true,
            Phase::Leading { voters: Voters::Group(_) | Voters::Changing { .. }, .. } => false,
        }
    }

    /// The holders that have not voted for the newest version of a record.
    pub fn awaited(&self, keyspace: KeyspaceId) -> BTreeSet<StoreId> {
        let Phase::Leading { registers, voters, .. } = &self.phase else { return BTreeSet::new() };
        let members: BTreeSet<StoreId> = match voters {
            Voters::Group(members) | Voters::Forming { members, .. } => members.clone(),
            Voters::Changing { old, new } => old.union(new).copied().collect(),
        };
        match registers.get(&keyspace) {
            Some(register) => members.difference(&register.voted).copied().collect(),
            None => members,
        }
    }

    /// The record that a majority has accepted under this term, while no later version is under way.
    pub fn chosen(&self, keyspace: KeyspaceId) -> Option<&R> {
        self.registers()
            .find(|(record, is_chosen)| *is_chosen && record.keyspace() == keyspace)
            .map(|(record, _)| record)
    }

    /// The newest version of everything under this term, and whether it is chosen.
    pub fn registers(&self) -> impl Iterator<Item = (&R, bool)> {
        let (registers, voters) = match &self.phase {
            Phase::Leading { registers, voters, .. } => (Some(registers), Some(voters)),
            Phase::Standby | Phase::Preparing { .. } => (None, None),
        };
        let quorum_max = self.quorum_max;
        let is_chosen =
            move |register: &Register<R>| voters.is_some_and(|voters| voters.have_chosen(&register.voted, quorum_max));
        registers.into_iter().flatten().map(move |(_, register)| (&register.record, is_chosen(register)))
    }

    /// Asks for a term above all that this master has heard of. When is not decided here: after the leader's silence and a pause drawn at
    /// random, else two masters could overrule each other for ever.
    pub fn campaign(&mut self) -> Term {
        self.ask(None)
    }

    /// Asks for a term in a cluster that has no group. If a group is found on the way, that one is taken.
    pub fn form(&mut self, formation: Formation<R>) -> Term {
        self.ask(Some(formation))
    }

    fn ask(&mut self, forming: Option<Formation<R>>) -> Term {
        self.highest += 1;
        let term = Term { number: self.highest, life: self.life };
        self.phase = Phase::Preparing { term, forming, promised: BTreeMap::new() };
        term
    }

    /// Gives the term up, to ask for a later one.
    pub fn stand_by(&mut self) {
        self.phase = Phase::Standby;
    }

    /// Changes a keyspace from the epoch that whoever asks has seen, or makes it if there is none (`expected` is 0 then).
    pub fn propose(&mut self, expected: Epoch, record: R) -> Result<(), ProposeError> {
        let quorum_max = self.quorum_max;
        let Phase::Leading { registers, voters, .. } = &mut self.phase else { return Err(ProposeError::NotLeading) };
        let is_chosen = |register: &Register<R>| voters.have_chosen(&register.voted, quorum_max);
        let found = match registers.get(&record.keyspace()) {
            Some(register) if !is_chosen(register) => return Err(ProposeError::Busy),
            Some(register) => register.record.epoch(),
            None => Epoch(0),
        };
        if found != expected {
            return Err(ProposeError::OtherEpoch { expected, found });
        }
        let proposed = record.epoch();
        if proposed <= expected {
            return Err(ProposeError::Gap { expected, proposed });
        }
        if let Some(group) = record.group() {
            let Voters::Group(old) = &*voters else { return Err(ProposeError::Busy) };
            if old.symmetric_difference(&group.members).count() != 1 || group.members.is_empty() {
                return Err(ProposeError::NotOneStore);
            }
            // A majority of the new group then has a store that keeps each.
            if !registers.values().all(is_chosen) {
                return Err(ProposeError::Busy);
            }
            *voters = Voters::Changing { old: old.clone(), new: group.members.clone() };
        }
        registers.insert(record.keyspace(), Register { record, voted: BTreeSet::new() });
        Ok(())
    }

    /// What a holder has not answered yet; to be sent at once, and again after a while or a reconnection.
    pub fn requests(&self, holder: StoreId) -> Vec<Request<R>> {
        match &self.phase {
            Phase::Standby => Vec::new(),
            Phase::Preparing { term, promised, forming } => {
                if promised.contains_key(&holder) || !self.is_asked(holder, promised, forming.as_ref()) {
                    return Vec::new();
                }
                vec![Request::Prepare { term: *term }]
            }
            Phase::Leading { term, registers, voters } => {
                if !voters.contains(holder) {
                    return Vec::new();
                }
                let is_due = |register: &&Register<R>| {
                    let Voters::Forming { members, first } = voters else { return true };
                    let is_group = register.record.group().is_some();
                    let others =
                        |other: &Register<R>| other.record.group().is_some() || members.is_subset(&other.voted);
                    !is_group || registers.values().all(others) && (holder == *first || register.voted.contains(first))
                };
                let unanswered = registers.values().filter(|register| !register.voted.contains(&holder)).filter(is_due);
                unanswered
                    .map(|register| Request::Accept(Accepted { term: *term, record: register.record.clone() }))
                    .collect()
            }
        }
    }

    fn is_asked(
        &self,
        store: StoreId,
        promised: &BTreeMap<StoreId, Vec<Accepted<R>>>,
        forming: Option<&Formation<R>>,
    ) -> bool {
        match (&self.group, self.newest_group(promised), forming) {
            (Group::Fixed(holders), _, _) => holders.contains(&store),
            (Group::Heard(_), Some(group), _) => members(group).is_some_and(|members| members.contains(&store)),
            (Group::Heard(_), None, Some(formation)) => formation.electors.contains(&store),
            (Group::Heard(_), None, None) => false,
        }
    }

    /// By term and version, of all that was heard; it may not be chosen, but then it is completed.
    fn newest_group<'a>(&'a self, promised: &'a BTreeMap<StoreId, Vec<Accepted<R>>>) -> Option<&'a Accepted<R>> {
        let heard = match &self.group {
            Group::Fixed(_) => None,
            Group::Heard(heard) => heard.as_ref(),
        };
        let accepted = promised.values().flatten().filter(|accepted| accepted.record.group().is_some());
        accepted.chain(heard).max_by_key(|accepted| accepted.position())
    }

    /// Takes in what a store says. One that is not in the group has no vote; a blank one with a new id is such.
    pub fn hear(&mut self, from: StoreId, answer: Result<Answer<R>, Refusal>) -> Progress {
        match answer {
            Ok(Answer::Promised { term, accepted }) => self.hear_promise(from, term, accepted),
            Ok(Answer::Voted { term, keyspace, epoch }) => self.hear_vote(from, term, keyspace, epoch),
            Err(Refusal::LowerTerm { promised, .. }) => self.hear_term(promised),
            // The later message of this term was or will be answered.
            Err(Refusal::Overtaken { .. } | Refusal::OtherRecord { .. }) => Progress::Nothing,
        }
    }

    /// Takes note of a term that somebody has, as stores report it.
    pub fn hear_term(&mut self, newer: Term) -> Progress {
        self.highest = self.highest.max(newer.number);
        match self.term() {
            Some(own) if own < newer => {
                self.phase = Phase::Standby;
                Progress::SteppedBack { own, newer }
            }
            Some(_) | None => Progress::Nothing,
        }
    }

    fn hear_promise(&mut self, from: StoreId, of: Term, accepted: Vec<Accepted<R>>) -> Progress {
        let Phase::Preparing { term, forming, promised } = &mut self.phase else { return Progress::Nothing };
        if *term != of {
            return Progress::Nothing;
        }
        promised.insert(from, accepted);
        let (promised, forming) = (std::mem::take(promised), forming.take());
        let voters = self.voters(&promised, forming.as_ref());
        let Some(voters) = voters else {
            self.phase = Phase::Preparing { term: of, forming, promised };
            return Progress::Nothing;
        };
        let group = self.newest_group(&promised).cloned();
        let mut newest: BTreeMap<KeyspaceId, Accepted<R>> = BTreeMap::new();
        for accepted in promised.into_values().flatten().chain(group) {
            let keyspace = accepted.record.keyspace();
            if newest.get(&keyspace).is_none_or(|known| known.position() < accepted.position()) {
                newest.insert(keyspace, accepted);
            }
        }
        // A vote under an earlier term does not count: it is written again under this one.
        let register = |record: R| (record.keyspace(), Register { record, voted: BTreeSet::new() });
        let mut registers: BTreeMap<_, _> = newest.into_values().map(|accepted| register(accepted.record)).collect();
        if let (Voters::Forming { .. }, Some(formation)) = (&voters, forming) {
            registers.extend([register(formation.group)]);
        }
        self.phase = Phase::Leading { term: of, registers, voters };
        Progress::Leads(of)
    }

    /// Who votes from now on, if enough have promised.
    fn voters(&self, promised: &BTreeMap<StoreId, Vec<Accepted<R>>>, forming: Option<&Formation<R>>) -> Option<Voters> {
        let stores: BTreeSet<StoreId> = promised.keys().copied().collect();
        let group = match &self.group {
            Group::Fixed(holders) => Some(holders),
            Group::Heard(_) => self.newest_group(promised).and_then(members),
        };
        match (group, forming) {
            (Some(members), _) => {
                is_majority(members, &stores, self.quorum_max).then(|| Voters::Group(members.clone()))
            }
            (None, Some(formation)) => {
                let members = formation.group.group()?.members.clone();
                let all = formation.electors.union(&members).all(|store| stores.contains(store));
                all.then_some(Voters::Forming { members, first: formation.first })
            }
            (None, None) => None,
        }
    }

    fn hear_vote(&mut self, from: StoreId, of: Term, keyspace: KeyspaceId, epoch: Epoch) -> Progress {
        let quorum_max = self.quorum_max;
        let Phase::Leading { term, registers, voters } = &mut self.phase else { return Progress::Nothing };
        let register = registers.get_mut(&keyspace).filter(|register| register.record.epoch() == epoch);
        let Some(register) = register.filter(|_| *term == of && voters.contains(from)) else {
            return Progress::Nothing;
        };
        let was_chosen = voters.have_chosen(&register.voted, quorum_max);
        register.voted.insert(from);
        if was_chosen || !voters.have_chosen(&register.voted, quorum_max) {
            return Progress::Nothing;
        }
        if let Some(group) = register.record.group() {
            *voters = Voters::Group(group.members.clone());
        }
        Progress::Chosen(keyspace, epoch)
    }

    /// A proposer that is content with fewer holders, to show what a majority is good for.
    #[cfg(test)]
    pub(super) fn with_quorum(self, quorum: usize) -> Self {
        Self { quorum_max: quorum, ..self }
    }

    /// A leader that does not care what was accepted before, to show what adopting is good for.
    #[cfg(test)]
    pub(super) fn forget_adopted(&mut self) {
        if let Phase::Leading { registers, .. } = &mut self.phase {
            registers.clear();
        }
    }
}

fn members<R: Versioned>(accepted: &Accepted<R>) -> Option<&BTreeSet<StoreId>> {
    accepted.record.group().map(|group| &group.members)
}
