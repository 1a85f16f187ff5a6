//! What a master does to propose records: takes a term, adopts what holders have accepted, changes by compare-and-swap.
//! No clock, no chance, no I/O.
//!
//! Invariants:
//! - Nothing is proposed before a majority has promised the term, and then first what was adopted from their answers.
//! - A record may be acted on when [`Proposer::chosen`] returns it: a majority has accepted it under this term.
//! - In one term there is one record of each epoch, and the next only after the one before is chosen.
//! - After a holder has refused the term, nothing is proposed under it any more.
//!
//! The group is fixed for the life of a proposer, and it must be the same for every master of the cluster.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::ballot::{Accepted, Answer, Refusal, Request, Term, Versioned};
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
    holders: BTreeSet<StoreId>,
    quorum: usize,
    life: u64,
    /// The highest term number that was heard of.
    highest: u64,
    phase: Phase<R>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase<R> {
    Standby,
    Preparing { term: Term, promised: BTreeMap<StoreId, Vec<Accepted<R>>> },
    Leading { term: Term, registers: BTreeMap<KeyspaceId, Register<R>> },
}

/// The newest version that this term has for one keyspace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Register<R> {
    record: R,
    voted: BTreeSet<StoreId>,
}

impl<R: Versioned> Proposer<R> {
    /// `life` is drawn at random by each start of a master.
    pub fn new(holders: BTreeSet<StoreId>, life: u64) -> Self {
        let quorum = holders.len() / 2 + 1;
        Self { holders, quorum, life, highest: 0, phase: Phase::Standby }
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

    /// The record that a majority has accepted under this term, while no later version is under way.
    pub fn chosen(&self, keyspace: KeyspaceId) -> Option<&R> {
        match &self.phase {
            Phase::Leading { registers, .. } => {
                registers.get(&keyspace).filter(|register| register.voted.len() >= self.quorum).map(|it| &it.record)
            }
            Phase::Standby | Phase::Preparing { .. } => None,
        }
    }

    /// Asks for a term above all that this master has heard of. When is not decided here: after the leader's silence and a pause drawn at
    /// random, else two masters could overrule each other for ever.
    pub fn campaign(&mut self) -> Term {
        self.highest += 1;
        let term = Term { number: self.highest, life: self.life };
        self.phase = Phase::Preparing { term, promised: BTreeMap::new() };
        term
    }

    /// Changes a keyspace from the epoch that whoever asks has seen, or makes it if there is none (`expected` is 0 then).
    pub fn propose(&mut self, expected: Epoch, record: R) -> Result<(), ProposeError> {
        let Phase::Leading { registers, .. } = &mut self.phase else { return Err(ProposeError::NotLeading) };
        let found = match registers.get(&record.keyspace()) {
            Some(register) if register.voted.len() < self.quorum => return Err(ProposeError::Busy),
            Some(register) => register.record.epoch(),
            None => Epoch(0),
        };
        if found != expected {
            return Err(ProposeError::OtherEpoch { expected, found });
        }
        let proposed = record.epoch();
        if proposed.0 != expected.0 + 1 {
            return Err(ProposeError::Gap { expected, proposed });
        }
        registers.insert(record.keyspace(), Register { record, voted: BTreeSet::new() });
        Ok(())
    }

    /// What a holder has not answered yet; to be sent at once, and again after a while or a reconnection.
    pub fn requests(&self, holder: StoreId) -> Vec<Request<R>> {
        match &self.phase {
            Phase::Standby => Vec::new(),
            Phase::Preparing { promised, .. } if promised.contains_key(&holder) => Vec::new(),
            Phase::Preparing { term, .. } => vec![Request::Prepare { term: *term }],
            Phase::Leading { term, registers } => registers
                .values()
                .filter(|register| !register.voted.contains(&holder))
                .map(|register| Request::Accept(Accepted { term: *term, record: register.record.clone() }))
                .collect(),
        }
    }

    /// Takes in what a store says. One that is not in the group has no vote; a blank one with a new id is such.
    pub fn hear(&mut self, from: StoreId, answer: Result<Answer<R>, Refusal>) -> Progress {
        if !self.holders.contains(&from) {
            return Progress::Nothing;
        }
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
        let Phase::Preparing { term, promised } = &mut self.phase else { return Progress::Nothing };
        if *term != of {
            return Progress::Nothing;
        }
        promised.insert(from, accepted);
        if promised.len() < self.quorum {
            return Progress::Nothing;
        }
        let mut newest: BTreeMap<KeyspaceId, Accepted<R>> = BTreeMap::new();
        for accepted in std::mem::take(promised).into_values().flatten() {
            let keyspace = accepted.record.keyspace();
            if newest.get(&keyspace).is_none_or(|known| known.position() < accepted.position()) {
                newest.insert(keyspace, accepted);
            }
        }
        // A vote under an earlier term does not count: it is written again under this one.
        let register = |it: Accepted<R>| Register { record: it.record, voted: BTreeSet::new() };
        let registers = newest.into_iter().map(|(keyspace, accepted)| (keyspace, register(accepted))).collect();
        self.phase = Phase::Leading { term: of, registers };
        Progress::Leads(of)
    }

    fn hear_vote(&mut self, from: StoreId, of: Term, keyspace: KeyspaceId, epoch: Epoch) -> Progress {
        let Phase::Leading { term, registers } = &mut self.phase else { return Progress::Nothing };
        let register = registers.get_mut(&keyspace).filter(|register| register.record.epoch() == epoch);
        let Some(register) = register.filter(|_| *term == of) else { return Progress::Nothing };
        let is_new = register.voted.insert(from);
        if is_new && register.voted.len() == self.quorum {
            return Progress::Chosen(keyspace, epoch);
        }
        Progress::Nothing
    }

    /// A proposer that is content with fewer holders, to show what a majority is good for.
    #[cfg(test)]
    pub(super) fn with_quorum(self, quorum: usize) -> Self {
        Self { quorum, ..self }
    }

    /// A leader that does not care what was accepted before, to show what adopting is good for.
    #[cfg(test)]
    pub(super) fn forget_adopted(&mut self) {
        if let Phase::Leading { registers, .. } = &mut self.phase {
            registers.clear();
        }
    }
}
