//! KEYSPACE RESIZE, REPLACE, STATUS and ABORT: what is done with a keyspace as a whole, by the master.

use super::keyspaces::{Answered, store_id};
use super::{Ask, Context, Next, Round, ShardRequest};
use crate::upstream::masters::{Change, Replacement, Resizing};
use std::cmp::Ordering;
use std::time::Duration;
use vasto_proto::command::{Args, Reply};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::KeyspaceId;
use vasto_proto::topology::{Phase, Snapshot};

const NOT_A_STORE: CommandError = CommandError::fixed(
    "ERR STORE and WITH are followed by the id of a store, 8 hexadecimal digits as STORES shows it",
);

/// How often a client that watches an operation is told nothing: the topology is looked at, nobody is asked.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// KEYSPACE RESIZE name SHARDS n [WATCH]
pub fn resize(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = context;
    let name = String::from_utf8_lossy(args.bytes()?).into_owned();
    let (mut shards, mut is_watched) = (None, false);
    while !args.is_empty() {
        if args.option("shards") {
            shards = Some(u32::try_from(args.integer()?).map_err(|_| error::NOT_AN_INTEGER)?);
        } else if args.option("watch") {
            is_watched = true;
        } else {
            return Err(error::SYNTAX);
        }
    }
    // Which numbers are possible is the master's to say: it has the reasons.
    let resizing = Resizing { name: name.clone(), shards: shards.ok_or(error::SYNTAX)? };
    Ok(Next::AskMaster(Change::Resize(resizing), answer(name, is_watched)))
}

/// KEYSPACE REPLACE name STORE a [WITH b] [WATCH]
pub fn replace(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = context;
    let name = String::from_utf8_lossy(args.bytes()?).into_owned();
    let (mut store, mut with, mut is_watched) = (None, None, false);
    while !args.is_empty() {
        if args.option("store") {
            store = Some(store_id(args.bytes()?).ok_or(NOT_A_STORE)?);
        } else if args.option("with") {
            with = Some(store_id(args.bytes()?).ok_or(NOT_A_STORE)?);
        } else if args.option("watch") {
            is_watched = true;
        } else {
            return Err(error::SYNTAX);
        }
    }
    let replacement = Replacement { name: name.clone(), store: store.ok_or(error::SYNTAX)?, with };
    Ok(Next::AskMaster(Change::Replace(replacement), answer(name, is_watched)))
}

/// KEYSPACE STATUS name
pub fn status(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = context;
    let name = String::from_utf8_lossy(args.bytes()?).into_owned();
    Ok(Next::AskMaster(Change::Observe(name), Box::new(Answered)))
}

/// KEYSPACE ABORT name
pub fn abort(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = context;
    let name = String::from_utf8_lossy(args.bytes()?).into_owned();
    Ok(Next::AskMaster(Change::Abort(name), Box::new(Answered)))
}

fn answer(name: String, is_watched: bool) -> Box<dyn Ask> {
    if is_watched { Box::new(Watched { name, operation: None, keyspace: None }) } else { Box::new(Answered) }
}

/// Answers when the operation that the master has begun is at its end, as the topology tells it.
#[derive(Debug)]
struct Watched {
    name: String,
    /// The operation that has begun.
    operation: Option<u64>,
    /// Known when the topology has come.
    keyspace: Option<KeyspaceId>,
}

impl Watched {
    /// Whether the operation has ended well; `None` while it goes on.
    fn end(&mut self, id: u64, snapshot: &Snapshot) -> Option<Result<(), CommandError>> {
        let found = match self.keyspace {
            Some(keyspace) => snapshot.keyspace(keyspace),
            None => snapshot.keyspace_named(&self.name),
        };
        let Some(record) = found else {
            let is_dropped = self.keyspace.is_some_and(|keyspace| snapshot.dropped.contains(&keyspace));
            let text = format!("ERR keyspace {} was dropped, and operation {id} with it", self.name);
            return is_dropped.then(|| Err(error::single_line(&text).into_owned().into()));
        };
        self.keyspace = Some(record.id);
        // The topology may be older than the operation.
        let operation = record.operation.as_ref()?;
        match operation.id.cmp(&id) {
            Ordering::Less => None,
            Ordering::Greater => {
                let text = format!("UNKNOWN operation {id} has ended, and operation {} has begun since", operation.id);
                Some(Err(text.into()))
            }
            Ordering::Equal => match operation.phase {
                Phase::Copy | Phase::Fence | Phase::Committed | Phase::Clean => None,
                Phase::Done => Some(Ok(())),
                Phase::Aborted => {
                    let text = format!("ERR operation {id} was aborted: {}", operation.reason);
                    Some(Err(error::single_line(&text).into_owned().into()))
                }
            },
        }
    }
}

impl Ask for Watched {
    fn start(&mut self, _context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        Ok(Vec::new())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let id = match self.operation {
            Some(id) => id,
            None => {
                let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
                match Reply::take(&mut &*answer) {
                    Some(Reply::Integer(id)) => *self.operation.insert(id.unsigned_abs()),
                    Some(Reply::Error(text)) => return Err(String::from_utf8_lossy(text).into_owned().into()),
                    Some(_) | None => return Err(error::MASTER_LOST),
                }
            }
        };
        match self.end(id, &context.routing.snapshot) {
            Some(end) => {
                end?;
                context.reply().ok();
                Ok(Round::Done)
            }
            // Nothing else of this connection runs meanwhile. In a transaction the master is not asked, and nothing comes here.
            None => Ok(Round::Later { pause: LOOK_AGAIN, requests: Vec::new(), otherwise: Vec::new() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};
    use crate::routing::Routing;
    use std::sync::Arc;
    use vasto_proto::id::StoreId;
    use vasto_proto::topology::KeyspaceRecord;

    #[test]
    fn what_is_wrong_is_said_before_the_master_is_asked() {
        let mut harness = Harness::new();
        harness.script(
            r#"
            > KEYSPACE RESIZE users / < -ERR wrong number of arguments for 'keyspace|resize' command
            > KEYSPACE RESIZE users SHARDS / < -ERR wrong number of arguments for 'keyspace|resize' command
            > KEYSPACE RESIZE users SHARDS x / < -ERR value is not an integer or out of range
            > KEYSPACE RESIZE users SHARDS 2.0 / < -ERR value is not an integer or out of range
            > KEYSPACE RESIZE users SHARDS -1 / < -ERR value is not an integer or out of range
            > KEYSPACE RESIZE users SHARDS 4294967296 / < -ERR value is not an integer or out of range
            > KEYSPACE RESIZE users COPIES 2 / < -ERR syntax error
            > KEYSPACE RESIZE users WATCH WATCH / < -ERR syntax error
            > KEYSPACE RESIZE users SHARDS 2 SHARDS / < -ERR syntax error
            > KEYSPACE RESIZE users SHARDS 2 now / < -ERR syntax error
            > KEYSPACE REPLACE users / < -ERR wrong number of arguments for 'keyspace|replace' command
            > KEYSPACE REPLACE users WITH 0000000b / < -ERR syntax error
            > KEYSPACE REPLACE users STORE 0000000b WITH / < -ERR syntax error
            > KEYSPACE REPLACE users STORE 0000000b now / < -ERR syntax error
            > KEYSPACE REPLACE users STORE b / < -ERR STORE and WITH are followed by the id of a store, 8 hexadecimal digits as STORES shows it
            > KEYSPACE REPLACE users STORE 0000000b WITH 00000000 / < -ERR STORE and WITH are followed by the id of a store, 8 hexadecimal digits as STORES shows it
            > KEYSPACE STATUS / < -ERR wrong number of arguments for 'keyspace|status' command
            > KEYSPACE STATUS users now / < -ERR wrong number of arguments for 'keyspace|status' command
            > KEYSPACE ABORT / < -ERR wrong number of arguments for 'keyspace|abort' command
            > KEYSPACE ABORT users now / < -ERR wrong number of arguments for 'keyspace|abort' command
            "#,
        );
        assert_eq!(harness.asked_master, None);
    }

    #[test]
    fn the_master_is_asked_and_its_answer_is_the_reply() {
        let mut harness = Harness::new();
        harness.master = packed(|reply| reply.integer(17));
        assert_eq!(harness.run("KEYSPACE RESIZE nosuch shards 1025"), "17");
        let asked = Change::Resize(Resizing { name: "nosuch".to_owned(), shards: 1025 });
        assert_eq!(harness.asked_master.take(), Some(asked));
        assert_eq!(harness.run("KEYSPACE REPLACE users with 0000000A store 0000000b"), "17");
        let with = Some(StoreId(0xa));
        let asked = Change::Replace(Replacement { name: "users".to_owned(), store: StoreId(0xb), with });
        assert_eq!(harness.asked_master.take(), Some(asked));
        harness.run("KEYSPACE REPLACE users STORE 0000000b");
        let asked = Change::Replace(Replacement { name: "users".to_owned(), store: StoreId(0xb), with: None });
        assert_eq!(harness.asked_master.take(), Some(asked));
        harness.master = packed(|reply| reply.ok());
        assert_eq!(harness.run("KEYSPACE ABORT users"), "OK");
        assert_eq!(harness.asked_master.take(), Some(Change::Abort("users".to_owned())));
        harness.master = packed(|reply| {
            reply.map(1);
            reply.bulk(b"phase");
            reply.bulk(b"none");
        });
        assert_eq!(harness.run("KEYSPACE STATUS users"), r#"{"phase": "none"}"#);
        assert_eq!(harness.asked_master.take(), Some(Change::Observe("users".to_owned())));
        harness.master = packed(|reply| reply.error("ERR no such keyspace 'users'"));
        for line in ["RESIZE users SHARDS 2", "RESIZE users SHARDS 2 WATCH", "STATUS users", "ABORT users"] {
            assert_eq!(harness.run(&format!("KEYSPACE {line}")), "-ERR no such keyspace 'users'", "{line}");
        }
    }

    /// The harness's topology with another record of `users`.
    fn with(harness: &Harness, record: &KeyspaceRecord) -> Snapshot {
        let mut snapshot = Snapshot::clone(&harness.routing.snapshot);
        snapshot.keyspaces[1] = record.clone();
        snapshot
    }

    #[test]
    fn who_watches_is_answered_at_the_end() {
        let mut harness = Harness::new();
        let users = harness.routing.snapshot.keyspaces[1].clone();
        let growing = users.begin_resize(2, vec![StoreId(0xa)]).expect("possible");
        let id = growing.epoch.0;
        let watched = || Watched { name: "users".to_owned(), operation: Some(id), keyspace: None };
        for record in [&users, &growing, &growing.fence().expect("possible")] {
            assert_eq!(watched().end(id, &with(&harness, record)), None);
        }
        let committed = growing.fence().and_then(|fenced| fenced.commit()).expect("possible");
        let done = committed.clean().and_then(|cleaning| cleaning.finish()).expect("possible");
        let aborted = growing.abort("the disk\nis full").expect("possible");
        assert_eq!(watched().end(id, &with(&harness, &done)), Some(Ok(())));
        let error = |text: &str| Some(Err(CommandError::from(text.to_owned())));
        let text = format!("ERR operation {id} was aborted: the disk is full");
        assert_eq!(watched().end(id, &with(&harness, &aborted)), error(&text));
        let next = aborted.begin_resize(3, vec![StoreId(0xa); 2]).expect("possible");
        let text = format!("UNKNOWN operation {id} has ended, and operation {} has begun since", next.epoch.0);
        assert_eq!(watched().end(id, &with(&harness, &next)), error(&text));
        // Not known is not dropped.
        let mut watched = watched();
        let mut without = with(&harness, &users);
        without.keyspaces.pop();
        assert_eq!(watched.end(id, &without), None);
        assert_eq!(watched.end(id, &with(&harness, &growing)), None);
        assert_eq!(watched.end(id, &without), None);
        without.dropped.insert(users.id);
        let text = format!("ERR keyspace users was dropped, and operation {id} with it");
        assert_eq!(watched.end(id, &without), error(&text));
        // From the master's answer on.
        harness.master = packed(|reply| reply.integer(id as i64));
        harness.routing = Routing::new(Arc::new(with(&harness, &done)));
        assert_eq!(harness.run("KEYSPACE RESIZE users SHARDS 2 WATCH"), "OK");
        harness.routing = Routing::new(Arc::new(with(&harness, &aborted)));
        let text = format!("-ERR operation {id} was aborted: the disk is full");
        assert_eq!(harness.run("KEYSPACE REPLACE users STORE 0000000b watch"), text);
    }
}
