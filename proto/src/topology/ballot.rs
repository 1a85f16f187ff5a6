//! Votes on records: what a holder promises and keeps under terms. No clock, no chance, no I/O.
//!
//! One register for each keyspace, as in single-decree Paxos, with one promise for all of them. Whoever drives a [`Holder`] writes it to disk
//! and syncs it before an answer leaves; a holder that forgets what it answered breaks the protocol, as a test shows.

use std::collections::BTreeMap;

use thiserror::Error;

use super::peers::HolderGroup;
use super::record::KeyspaceRecord;
use crate::id::{Epoch, KeyspaceId};

/// The right to propose. Two lives of masters never have the same: the number orders, the life, drawn at random at its start, tells apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Term {
    pub number: u64,
    pub life: u64,
}

impl Term {
    /// What was accepted before there were terms.
    pub const NONE: Self = Self { number: 0, life: 0 };
}

/// What is voted on; its content means nothing here, but for the group of those who vote.
pub trait Versioned: Clone + Eq {
    fn keyspace(&self) -> KeyspaceId;
    fn epoch(&self) -> Epoch;
    /// The stores that vote from here on, if it says so.
    fn group(&self) -> Option<&HolderGroup> {
        None
    }
}

impl Versioned for KeyspaceRecord {
    fn keyspace(&self) -> KeyspaceId {
        self.id
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }
}

/// A record and the term of the master that wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Accepted<R> {
    pub term: Term,
    pub record: R,
}

impl<R: Versioned> Accepted<R> {
    /// The later one counts, whatever its epoch is: a higher term has overruled what a lower one left half-written.
    pub fn position(&self) -> (Term, Epoch) {
        (self.term, self.record.epoch())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Request<R> {
    /// Asks for the promise to refuse lower terms.
    Prepare {
        term: Term,
    },
    Accept(Accepted<R>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Answer<R> {
    Promised { term: Term, accepted: Vec<Accepted<R>> },
    Voted { term: Term, keyspace: KeyspaceId, epoch: Epoch },
}

/// Why a holder does not do what it is asked to; it has changed nothing.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    #[error("term {} is over: this store follows term {}", .term.number, .promised.number)]
    LowerTerm { term: Term, promised: Term },
    /// A message that was overtaken: the same master has written a later version since.
    #[error("epoch {epoch} of keyspace {keyspace} was overtaken by epoch {newer} of the same term")]
    Overtaken { keyspace: KeyspaceId, epoch: Epoch, newer: Epoch },
    /// A master never says two things in one term.
    #[error("another record of keyspace {keyspace} with epoch {epoch} was accepted in the same term")]
    OtherRecord { keyspace: KeyspaceId, epoch: Epoch },
}

/// What one store of the holder group keeps on its disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Holder<R> {
    promised: Term,
    accepted: BTreeMap<KeyspaceId, Accepted<R>>,
}

impl<R> Default for Holder<R> {
    fn default() -> Self {
        Self { promised: Term::NONE, accepted: BTreeMap::new() }
    }
}

impl<R: Versioned> Holder<R> {
    /// As it was written to disk.
    pub fn restore(promised: Term, accepted: impl IntoIterator<Item = Accepted<R>>) -> Self {
        let accepted: BTreeMap<_, _> = accepted.into_iter().map(|it| (it.record.keyspace(), it)).collect();
        // What was accepted was promised.
        let promised = accepted.values().map(|it| it.term).fold(promised, Term::max);
        Self { promised, accepted }
    }

    pub fn accepted_of(&self, keyspace: KeyspaceId) -> Option<&Accepted<R>> {
        self.accepted.get(&keyspace)
    }

    pub fn promised(&self) -> Term {
        self.promised
    }

    pub fn accepted(&self) -> impl Iterator<Item = &Accepted<R>> {
        self.accepted.values()
    }

    /// The same request again gets the same answer or a refusal, and changes nothing.
    pub fn answer(&mut self, request: Request<R>) -> Result<Answer<R>, Refusal> {
        match request {
            Request::Prepare { term } => self.prepare(term),
            Request::Accept(accepted) => self.accept(accepted),
        }
    }

    fn prepare(&mut self, term: Term) -> Result<Answer<R>, Refusal> {
        self.require(term)?;
        self.promised = term;
        Ok(Answer::Promised { term, accepted: self.accepted.values().cloned().collect() })
    }

    fn accept(&mut self, new: Accepted<R>) -> Result<Answer<R>, Refusal> {
        self.require(new.term)?;
        let (term, keyspace, epoch) = (new.term, new.record.keyspace(), new.record.epoch());
        if let Some(old) = self.accepted.get(&keyspace).filter(|old| old.term == term) {
            let newer = old.record.epoch();
            if newer > epoch {
                return Err(Refusal::Overtaken { keyspace, epoch, newer });
            }
            if newer == epoch && old.record != new.record {
                return Err(Refusal::OtherRecord { keyspace, epoch });
            }
        }
        self.promised = term;
        self.accepted.insert(keyspace, new);
        Ok(Answer::Voted { term, keyspace, epoch })
    }

    fn require(&self, term: Term) -> Result<(), Refusal> {
        if term < self.promised {
            return Err(Refusal::LowerTerm { term, promised: self.promised });
        }
        Ok(())
    }

    /// A holder without the memory of its promise, to show what it is good for.
    #[cfg(test)]
    pub(super) fn without_promise(self) -> Self {
        Self { promised: Term::NONE, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::StoreId;
    use crate::topology::{Fsync, Settings};

    fn term(number: u64) -> Term {
        Term { number, life: 7 }
    }

    fn record() -> KeyspaceRecord {
        KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(1)]).unwrap()
    }

    fn accept(holder: &mut Holder<KeyspaceRecord>, number: u64, record: &KeyspaceRecord) -> Result<(), Refusal> {
        let accepted = Accepted { term: term(number), record: record.clone() };
        holder.answer(Request::Accept(accepted)).map(drop)
    }

    #[test]
    fn a_lower_term_is_refused_and_changes_nothing() {
        let mut holder = Holder::default();
        holder.answer(Request::Prepare { term: term(5) }).unwrap();
        let before = holder.clone();
        let refusal = Refusal::LowerTerm { term: term(4), promised: term(5) };
        assert_eq!(holder.answer(Request::Prepare { term: term(4) }), Err(refusal));
        assert_eq!(accept(&mut holder, 4, &record()), Err(refusal));
        assert_eq!(refusal.to_string(), "term 4 is over: this store follows term 5");
        assert_eq!(holder, before);
    }

    #[test]
    fn messages_of_one_term_may_overtake_each_other() {
        let mut holder = Holder::default();
        let first = record();
        let second = first.with_settings(Settings { fsync: Some(Fsync::Always), ..Settings::default() });
        let other = first.with_settings(Settings { fsync: Some(Fsync::Never), ..Settings::default() });
        assert_eq!(accept(&mut holder, 1, &second), Ok(()));
        assert_eq!(accept(&mut holder, 1, &second), Ok(()));
        let keyspace = KeyspaceId(0);
        let overtaken = Refusal::Overtaken { keyspace, epoch: Epoch(1), newer: Epoch(2) };
        assert_eq!(accept(&mut holder, 1, &first), Err(overtaken));
        assert_eq!(accept(&mut holder, 1, &other), Err(Refusal::OtherRecord { keyspace, epoch: Epoch(2) }));
        // The next master found that the second version was never chosen.
        assert_eq!(accept(&mut holder, 2, &first), Ok(()));
        assert_eq!(holder.accepted().map(Accepted::position).collect::<Vec<_>>(), [(term(2), Epoch(1))]);
    }
}
