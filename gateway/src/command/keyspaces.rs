//! KEYSPACE CREATE and DROP, and the databases that SELECT creates: through the master, for all gateways.

use super::connection::{choose, find_keyspace};
use super::topology::{UNKNOWN_FSYNC, named_keyspace};
use super::{Ask, Context, Next, Round, ShardRequest};
use crate::upstream::masters::{Change, Creation};
use vasto_proto::command::{Args, Reply};
use vasto_proto::error::{self, CommandError};
use vasto_proto::topology::{Fsync, Settings, validate_name};

const NOT_A_SHARD_COUNT: CommandError = CommandError::fixed("ERR SHARDS is a number from 1 to 1024");
const NOT_A_COPY_COUNT: CommandError = CommandError::fixed("ERR COPIES is a number from 1 on");
const NO_REPLICAS: CommandError = CommandError::fixed(
    "ERR MIN-REPLICAS counts copies beside the primary: copies on other stores do not exist yet; nothing was created",
);
const NOT_CONFIRMED: CommandError = CommandError::fixed(
    "ERR a dropped keyspace is gone with all its data: KEYSPACE DROP name CONFIRM drops it; nothing was changed",
);

/// KEYSPACE CREATE name SHARDS n [COPIES 1] [FSYNC word] [MIN-REPLICAS 0]
pub fn create(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = context;
    let name = String::from_utf8_lossy(args.bytes()?).into_owned();
    let as_error = |text: String| error::single_line(&text).into_owned();
    validate_name(&name).map_err(|refused| as_error(format!("ERR {refused}")))?;
    let (mut shards, mut copies, mut settings) = (None, 1, Settings::default());
    while !args.is_empty() {
        if args.option("shards") {
            let count = args.integer().ok().and_then(|count| u32::try_from(count).ok());
            shards = Some(count.filter(|count| *count > 0).ok_or(NOT_A_SHARD_COUNT)?);
        } else if args.option("copies") {
            let count = args.integer().ok().and_then(|count| u32::try_from(count).ok());
            copies = count.filter(|count| *count > 0).ok_or(NOT_A_COPY_COUNT)?;
        } else if args.option("fsync") {
            settings.fsync = Some(Fsync::from_word(args.bytes()?).ok_or(UNKNOWN_FSYNC)?);
        } else if args.option("min-replicas") {
            if args.integer()? != 0 {
                return Err(NO_REPLICAS);
            }
        } else {
            return Err(error::SYNTAX);
        }
    }
    // Else the master would take as many as keyspace 0 has; whoever names a keyspace shall say how far it can be spread.
    let shards = Some(shards.ok_or(error::SYNTAX)?);
    let creation = Creation { name, shards, copies, settings, may_exist: false };
    Ok(Next::AskMaster(Change::Create(creation), Box::new(Answered)))
}

/// KEYSPACE DROP name CONFIRM
pub fn drop(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let name = args.bytes()?;
    let is_confirmed = args.option("confirm");
    if !args.is_empty() {
        return Err(error::SYNTAX);
    }
    if !is_confirmed {
        named_keyspace(&context.routing.snapshot, name)?;
        return Err(NOT_CONFIRMED);
    }
    // Whether there is one is the master's to say: this gateway may not have heard of it yet.
    let name = String::from_utf8_lossy(name).into_owned();
    Ok(Next::AskMaster(Change::Drop(name), Box::new(Answered)))
}

/// MOVE and SWAPDB
pub fn refuse(_context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    Err(error::NOT_BETWEEN_KEYSPACES)
}

/// Creates the keyspace of a database's number, as keyspace `0` was made, and chooses it.
pub fn create_database(number: i64) -> Next {
    let name = number.to_string();
    let creation =
        Creation { name: name.clone(), shards: None, copies: 1, settings: Settings::default(), may_exist: true };
    Next::AskMaster(Change::Create(creation), Box::new(Chosen { name }))
}

/// The master's answer is the reply.
#[derive(Debug)]
struct Answered;

impl Ask for Answered {
    fn start(&mut self, _context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        Ok(Vec::new())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
        match Reply::take(&mut &*answer) {
            Some(Reply::Error(text)) => Err(String::from_utf8_lossy(text).into_owned().into()),
            Some(_) => {
                context.reply().packed(answer);
                Ok(Round::Done)
            }
            None => Err(error::MASTER_LOST),
        }
    }
}

/// Chooses the keyspace when it is there.
#[derive(Debug)]
struct Chosen {
    name: String,
}

impl Ask for Chosen {
    fn start(&mut self, _context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        Ok(Vec::new())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        match answers.first().and_then(|answer| Reply::take(&mut answer.as_slice())) {
            Some(Reply::Ok) => {
                // It exists, but the topology that says so may not have come: then the client has to ask again.
                let keyspace = find_keyspace(context.routing, self.name.as_bytes()).map_err(|_| error::NO_KEYSPACE)?;
                choose(context, keyspace, self.name.as_bytes());
                Ok(Round::Done)
            }
            Some(Reply::Error(text)) => Err(String::from_utf8_lossy(text).into_owned().into()),
            Some(_) | None => Err(error::MASTER_LOST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};
    use crate::routing::Routing;
    use std::sync::Arc;
    use vasto_proto::id::{KeyspaceId, StoreId};
    use vasto_proto::topology::{KeyspaceRecord, Snapshot};

    #[test]
    fn what_is_wrong_is_said_before_the_master_is_asked() {
        let mut harness = Harness::new();
        harness.script(
            r#"
            > KEYSPACE CREATE a / < -ERR wrong number of arguments for 'keyspace|create' command
            > KEYSPACE CREATE a FSYNC no / < -ERR syntax error
            > KEYSPACE CREATE a SHARDS 0 / < -ERR SHARDS is a number from 1 to 1024
            > KEYSPACE CREATE a SHARDS x / < -ERR SHARDS is a number from 1 to 1024
            > KEYSPACE CREATE a SHARDS 1 COPIES 0 / < -ERR COPIES is a number from 1 on
            > KEYSPACE CREATE a SHARDS 1 FSYNC sometimes / < -ERR FSYNC is one of always, everysec, no
            > KEYSPACE CREATE a SHARDS 1 MIN-REPLICAS 1 / < -ERR MIN-REPLICAS counts copies beside the primary: copies on other stores do not exist yet; nothing was created
            > KEYSPACE CREATE a SHARDS 1 COLOUR red / < -ERR syntax error
            > KEYSPACE CREATE "a b" SHARDS 1 / < -ERR keyspace name "a b" is empty, longer than 64 bytes or has other characters than letters, digits, '_', '-', '.'
            > KEYSPACE DROP users / < -ERR a dropped keyspace is gone with all its data: KEYSPACE DROP name CONFIRM drops it; nothing was changed
            > KEYSPACE DROP nosuch / < -ERR no such keyspace 'nosuch'
            > KEYSPACE DROP users CONFIRM now / < -ERR syntax error
            > MOVE a 1 / < -ERR databases have shards of their own and nothing moves between them at once; use DUMP and RESTORE; nothing was executed
            "#,
        );
        assert_eq!(harness.asked_master, None);
    }

    #[test]
    fn the_master_creates_and_drops() {
        let mut harness = Harness::new();
        assert_eq!(harness.run("KEYSPACE CREATE a shards 4 COPIES 1 fsync ALWAYS min-replicas 0"), "OK");
        let creation = Creation {
            name: "a".to_owned(),
            shards: Some(4),
            copies: 1,
            settings: Settings { fsync: Some(Fsync::Always) },
            may_exist: false,
        };
        assert_eq!(harness.asked_master.take(), Some(Change::Create(creation)));
        harness.master =
            packed(|reply| reply.simple("OK, stores 0000000b delete their shards of it when they are back"));
        assert_eq!(
            harness.run("KEYSPACE DROP users confirm"),
            "+OK, stores 0000000b delete their shards of it when they are back"
        );
        assert_eq!(harness.asked_master.take(), Some(Change::Drop("users".to_owned())));
        harness.master = packed(|reply| reply.error("ERR no such keyspace 'users'"));
        assert_eq!(harness.run("KEYSPACE DROP users CONFIRM"), "-ERR no such keyspace 'users'");
    }

    #[test]
    fn a_database_is_created_when_it_is_chosen_first() {
        let mut harness = Harness::new();
        harness.master = packed(|reply| reply.error("ERR no store"));
        assert_eq!(harness.run("SELECT 15"), "-ERR no store");
        assert_eq!(harness.session.keyspace, KeyspaceId(0));
        let Some(Change::Create(asked)) = harness.asked_master.take() else { panic!("the master was asked") };
        assert_eq!((asked.name.as_str(), asked.shards, asked.may_exist), ("15", None, true));
        harness.master = packed(|reply| reply.ok());
        let mut snapshot = Snapshot::clone(&harness.routing.snapshot);
        snapshot.keyspaces.push(KeyspaceRecord::new(KeyspaceId(9), "7", &[StoreId(0xa)]).unwrap());
        harness.routing = Routing::new(Arc::new(snapshot));
        assert_eq!(harness.run("SELECT 7"), "OK");
        assert_eq!((harness.session.keyspace, harness.session.client.keyspace().as_str()), (KeyspaceId(9), "7"));
        assert_eq!(harness.asked_master, None);
        assert_eq!(harness.run("SELECT 16"), "-ERR DB index is out of range");
    }
}
