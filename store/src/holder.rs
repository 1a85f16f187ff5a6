//! The votes of this store on records and on the group of holders, kept on the disk before they are answered.
//!
//! What it has accepted may never be chosen: it is not served, and lies apart from the records that are.

use crate::node::OpenError;
use crate::sealed;
use parking_lot::Mutex;
use prost::Message;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use vasto_proto::id::KeyspaceId;
use vasto_proto::pb;
use vasto_proto::topology::ballot::{Accepted, Answer, Holder, Refusal, Request, Term, Versioned};
use vasto_proto::topology::entry::{GROUP, term};
use vasto_proto::topology::{Entry, KeyspaceRecord};

const FOLDER: &str = "holder";
/// The file with the highest promise; the others are called as their keyspaces, that of the group as [`GROUP`].
const PROMISE: &str = "promise";

pub struct HolderFiles {
    folder: PathBuf,
    /// Held while a vote is written.
    holder: Mutex<Holder<Entry>>,
    /// What it says of itself in every heartbeat, which must not wait for the disk.
    said: Mutex<Said>,
}

struct Said {
    promised: Term,
    group: Option<Accepted<Entry>>,
}

impl Said {
    fn of(holder: &Holder<Entry>) -> Self {
        Self { promised: holder.promised(), group: holder.accepted_of(GROUP).cloned() }
    }
}

impl HolderFiles {
    pub fn load(data: &Path) -> Result<Self, OpenError> {
        let folder = data.join(FOLDER);
        let io_error = |source| OpenError::Io { path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(io_error)?;
        let (mut promised, mut accepted) = (Term::NONE, Vec::new());
        for entry in fs::read_dir(&folder).map_err(io_error)? {
            let path = entry.map_err(io_error)?.path();
            // A half-written `.new` that a crash left.
            if path.extension().is_some() {
                continue;
            }
            let content = match fs::read(&path) {
                Ok(content) => content,
                Err(source) => return Err(OpenError::Io { path, source }),
            };
            let damaged = |reason: String| OpenError::Damaged { path: path.clone(), reason };
            let message = sealed::unseal(&content).map_err(damaged)?;
            if path.ends_with(PROMISE) {
                let message = pb::Term::decode(message).map_err(|error| damaged(error.to_string()))?;
                promised = term(Some(message));
            } else {
                let message = pb::AcceptedEntry::decode(message).map_err(|error| damaged(error.to_string()))?;
                let entry = Accepted::from_message(message).map_err(|error| damaged(error.to_string()))?;
                accepted.push(entry.ok_or_else(|| damaged("it is of a later version".to_owned()))?);
            }
        }
        let holder = Holder::restore(promised, accepted);
        let said = Mutex::new(Said::of(&holder));
        Ok(Self { folder, holder: Mutex::new(holder), said })
    }

    pub fn promised(&self) -> Term {
        self.said.lock().promised
    }

    /// The group that it has accepted last.
    pub fn group(&self) -> Option<Accepted<Entry>> {
        self.said.lock().group.clone()
    }

    /// All that it has accepted last.
    pub fn entries(&self) -> Vec<Entry> {
        self.holder.lock().accepted().map(|accepted| accepted.record.clone()).collect()
    }

    /// The answer, which may leave: what it promises is on the disk. `chosen` gives the records that were kept without a vote of this
    /// store, of before there were terms or of before it became a holder; they count as accepted under no term. `voted` hears what is
    /// accepted, in the order of the votes. Blocks on the disk.
    pub fn answer(
        &self,
        request: Request<Entry>,
        chosen: impl FnOnce() -> BTreeMap<KeyspaceId, KeyspaceRecord>,
        voted: impl FnOnce(&Entry),
    ) -> io::Result<Result<Answer<Entry>, Refusal>> {
        let mut holder = self.holder.lock();
        let mut after = holder.clone();
        let mut answer = after.answer(request.clone());
        if answer.is_ok() {
            match &request {
                Request::Prepare { term } if *term == holder.promised() => {}
                Request::Prepare { term } => sealed::save(&self.folder, PROMISE, &pb::Term::from(*term))?,
                Request::Accept(accepted) if holder.accepted_of(accepted.record.keyspace()) == Some(accepted) => {}
                Request::Accept(accepted) => {
                    sealed::save(
                        &self.folder,
                        &accepted.record.keyspace().to_string(),
                        &pb::AcceptedEntry::from(accepted),
                    )?;
                    voted(&accepted.record);
                }
            }
        }
        if let Ok(Answer::Promised { accepted, .. }) = &mut answer {
            let without_vote = chosen().into_values().filter(|record| holder.accepted_of(record.id).is_none());
            accepted.extend(without_vote.map(|record| Accepted { term: Term::NONE, record: Entry::Keyspace(record) }));
        }
        *holder = after;
        *self.said.lock() = Said::of(&holder);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::id::{Epoch, StoreId};
    use vasto_proto::topology::{HolderGroup, Settings};

    fn term(number: u64) -> Term {
        Term { number, life: 3 }
    }

    fn accept(number: u64, record: Entry) -> Request<Entry> {
        Request::Accept(Accepted { term: term(number), record })
    }

    #[test]
    fn votes_are_there_at_the_next_start() {
        let data = tempfile::tempdir().unwrap();
        let files = HolderFiles::load(data.path()).unwrap();
        let old = KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(1)]).unwrap();
        let chosen = || BTreeMap::from([(old.id, old.clone())]);
        let group = Entry::Group(HolderGroup { version: 1, members: [StoreId(1)].into() });
        // A record of before there were terms counts as accepted.
        let promised = files.answer(Request::Prepare { term: term(2) }, chosen, |_| ()).unwrap();
        let before = Accepted { term: Term::NONE, record: Entry::Keyspace(old.clone()) };
        assert_eq!(promised, Ok(Answer::Promised { term: term(2), accepted: vec![before] }));

        let files = HolderFiles::load(data.path()).unwrap();
        assert_eq!((files.promised(), files.group()), (term(2), None));
        let refused = files.answer(accept(1, group.clone()), chosen, |_| ()).unwrap();
        assert_eq!(refused, Err(Refusal::LowerTerm { term: term(1), promised: term(2) }));
        let new = old.with_settings(Settings::default());
        for entry in [group.clone(), Entry::Keyspace(new.clone())] {
            files.answer(accept(4, entry), chosen, |_| ()).unwrap().unwrap();
        }

        let files = HolderFiles::load(data.path()).unwrap();
        // What was accepted was promised.
        assert_eq!(files.promised(), term(4));
        assert_eq!(files.group(), Some(Accepted { term: term(4), record: group }));
        let entry = files.entries().into_iter().find(|entry| entry.keyspace() == KeyspaceId(0));
        assert_eq!(entry, Some(Entry::Keyspace(new)));
        let promised = files.answer(Request::Prepare { term: term(5) }, chosen, |_| ()).unwrap();
        let Ok(Answer::Promised { accepted, .. }) = promised else { panic!("{promised:?}") };
        assert_eq!(
            accepted.iter().map(Accepted::position).collect::<Vec<_>>(),
            [(term(4), Epoch(2)), (term(4), Epoch(1))]
        );
    }

    #[test]
    fn damage_is_found() {
        let data = tempfile::tempdir().unwrap();
        let files = HolderFiles::load(data.path()).unwrap();
        files.answer(Request::Prepare { term: term(2) }, BTreeMap::new, |_| ()).unwrap().unwrap();
        let path = data.path().join(FOLDER).join(PROMISE);
        let mut content = fs::read(&path).unwrap();
        *content.last_mut().unwrap() ^= 1;
        fs::write(&path, content).unwrap();
        assert!(matches!(HolderFiles::load(data.path()), Err(OpenError::Damaged { .. })));
    }
}
