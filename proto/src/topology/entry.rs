//! What holders vote on in a running cluster: the record of a keyspace, or the group of the holders itself; and the votes as messages.

use super::ballot::{Accepted, Answer, Refusal, Term, Versioned};
use super::peers::HolderGroup;
use super::record::{KeyspaceRecord, RecordError};
use crate::id::{Epoch, KeyspaceId};
use crate::pb;

/// Under this id the group is voted on; no keyspace comes that far.
pub const GROUP: KeyspaceId = KeyspaceId(u32::MAX);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Group(HolderGroup),
    Keyspace(KeyspaceRecord),
}

impl Versioned for Entry {
    fn keyspace(&self) -> KeyspaceId {
        match self {
            Self::Group(_) => GROUP,
            Self::Keyspace(record) => record.id,
        }
    }

    fn epoch(&self) -> Epoch {
        match self {
            Self::Group(group) => Epoch(group.version),
            Self::Keyspace(record) => record.epoch,
        }
    }

    fn group(&self) -> Option<&HolderGroup> {
        match self {
            Self::Group(group) => Some(group),
            Self::Keyspace(_) => None,
        }
    }
}

impl Entry {
    pub fn record(&self) -> Option<&KeyspaceRecord> {
        match self {
            Self::Group(_) => None,
            Self::Keyspace(record) => Some(record),
        }
    }
}

impl From<Term> for pb::Term {
    fn from(term: Term) -> Self {
        Self { number: term.number, life: term.life }
    }
}

impl From<pb::Term> for Term {
    fn from(message: pb::Term) -> Self {
        Self { number: message.number, life: message.life }
    }
}

/// A term that a message leaves out.
pub fn term(message: Option<pb::Term>) -> Term {
    message.map_or(Term::NONE, Into::into)
}

impl From<&Entry> for pb::Entry {
    fn from(entry: &Entry) -> Self {
        let kind = match entry {
            Entry::Group(group) => pb::entry::Kind::Group(group.into()),
            Entry::Keyspace(record) => pb::entry::Kind::Record(record.into()),
        };
        Self { kind: Some(kind) }
    }
}

impl Entry {
    /// `None` if it is of a kind that only a later version knows.
    pub fn from_message(message: pb::Entry) -> Result<Option<Self>, RecordError> {
        Ok(match message.kind {
            Some(pb::entry::Kind::Group(group)) => Some(Self::Group(group.into())),
            Some(pb::entry::Kind::Record(record)) => Some(Self::Keyspace(record.try_into()?)),
            None => None,
        })
    }
}

impl From<&Accepted<Entry>> for pb::AcceptedEntry {
    fn from(accepted: &Accepted<Entry>) -> Self {
        Self { term: Some(accepted.term.into()), entry: Some((&accepted.record).into()) }
    }
}

impl Accepted<Entry> {
    pub fn from_message(message: pb::AcceptedEntry) -> Result<Option<Self>, RecordError> {
        let term = term(message.term);
        let entry = message.entry.map(Entry::from_message).transpose()?.flatten();
        Ok(entry.map(|record| Self { term, record }))
    }
}

impl From<&Result<Answer<Entry>, Refusal>> for pb::BallotAnswer {
    fn from(answer: &Result<Answer<Entry>, Refusal>) -> Self {
        use pb::ballot_answer::Kind;
        let kind = match answer {
            Ok(Answer::Promised { term, accepted }) => Some(Kind::Promise(pb::Promise {
                term: Some((*term).into()),
                accepted: accepted.iter().map(Into::into).collect(),
            })),
            Ok(Answer::Voted { term, keyspace, epoch }) => {
                Some(Kind::Vote(pb::Vote { term: Some((*term).into()), keyspace_id: keyspace.0, epoch: epoch.0 }))
            }
            Err(Refusal::LowerTerm { term, promised }) => {
                Some(Kind::LowerTerm(pb::LowerTerm { term: Some((*term).into()), promised: Some((*promised).into()) }))
            }
            // The later message of the same master was or will be answered.
            Err(Refusal::Overtaken { .. } | Refusal::OtherRecord { .. }) => None,
        };
        Self { kind }
    }
}

/// `None` if it says nothing.
pub fn answer(message: pb::BallotAnswer) -> Result<Option<Result<Answer<Entry>, Refusal>>, RecordError> {
    use pb::ballot_answer::Kind;
    Ok(match message.kind {
        Some(Kind::Promise(promise)) => {
            let accepted = promise.accepted.into_iter().map(Accepted::from_message).collect::<Result<Vec<_>, _>>()?;
            Some(Ok(Answer::Promised { term: term(promise.term), accepted: accepted.into_iter().flatten().collect() }))
        }
        Some(Kind::Vote(vote)) => Some(Ok(Answer::Voted {
            term: term(vote.term),
            keyspace: KeyspaceId(vote.keyspace_id),
            epoch: Epoch(vote.epoch),
        })),
        Some(Kind::LowerTerm(lower)) => {
            Some(Err(Refusal::LowerTerm { term: term(lower.term), promised: term(lower.promised) }))
        }
        None => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::StoreId;

    #[test]
    fn votes_round_trip() {
        let record = KeyspaceRecord::new(KeyspaceId(3), "three", &[StoreId(1)]).unwrap();
        let group = HolderGroup { version: 2, members: [StoreId(1), StoreId(2)].into() };
        let term = Term { number: 4, life: 9 };
        let accepted = [Entry::Group(group), Entry::Keyspace(record)].map(|record| Accepted { term, record });
        assert_eq!(accepted[0].record.keyspace(), GROUP);
        let promised = Term { number: 5, life: 1 };
        for sent in [
            Ok(Answer::Promised { term, accepted: accepted.to_vec() }),
            Ok(Answer::Voted { term, keyspace: KeyspaceId(3), epoch: Epoch(1) }),
            Err(Refusal::LowerTerm { term, promised }),
        ] {
            assert_eq!(answer(pb::BallotAnswer::from(&sent)), Ok(Some(sent)));
        }
        let overtaken = Err(Refusal::Overtaken { keyspace: KeyspaceId(3), epoch: Epoch(1), newer: Epoch(2) });
        assert_eq!(answer(pb::BallotAnswer::from(&overtaken)), Ok(None));
        assert_eq!(Accepted::from_message(pb::AcceptedEntry::default()), Ok(None));
    }
}
