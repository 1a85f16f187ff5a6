//! KEYSPACE CREATE, ALTER, DROP and FAILOVER, and the databases that SELECT creates: through the master, for all gateways.

use super::config::alter;
use super::connection::{choose, find_keyspace};
use super::topology::named_keyspace;
use super::{Ask, Context, Next, Round, ShardRequest};
use crate::settings::Changes;
use crate::upstream::masters::{Change, Creation, Failover};
use vasto_proto::command::{Args, Reply};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::StoreId;
use vasto_proto::topology::{Fsync, Settings, validate_name};

const NOT_A_SHARD_COUNT: CommandError = CommandError::fixed("ERR SHARDS is a number from 1 to 1024");
const NOT_A_COPY_COUNT: CommandError = CommandError::fixed("ERR COPIES is a number from 1 on");
const NOT_A_REPLICA_COUNT: CommandError = CommandError::fixed("ERR MIN-REPLICAS is a number from 0 on");
const TOO_FEW_COPIES: CommandError = CommandError::fixed(
    "ERR MIN-REPLICAS counts the copies beside the primary and must be below COPIES; nothing was changed",
);
const UNKNOWN_FSYNC: CommandError = CommandError::fixed("ERR FSYNC is one of always, everysec, no");
const NOT_YES_OR_NO: CommandError = CommandError::fixed("ERR STRICT is yes or no");
const NOT_A_SHARD: CommandError = CommandError::fixed("ERR SHARD is a number from 0 on");
const NOT_A_STORE: CommandError =
    CommandError::fixed("ERR TO is followed by the id of a store, 8 hexadecimal digits as STORES shows it");
const NOT_CONFIRMED: CommandError = CommandError::fixed(
    "ERR a dropped keyspace is gone with all its data: KEYSPACE DROP name CONFIRM drops it; nothing was changed",
);

/// What CREATE and ALTER have in common.
#[derive(Debug, Default)]
struct Wishes {
    copies: Option<u32>,
    settings: Settings,
}

impl Wishes {
    /// Reads one option with its value, if the next word is one.
    fn take(&mut self, args: &mut Args<'_>) -> Result<bool, CommandError> {
        if args.option("copies") {
            self.copies = Some(count(args, 1).ok_or(NOT_A_COPY_COUNT)?);
        } else if args.option("fsync") {
            self.settings.fsync = Some(Fsync::from_word(args.bytes()?).ok_or(UNKNOWN_FSYNC)?);
        } else if args.option("min-replicas") {
            self.settings.min_replicas = Some(count(args, 0).ok_or(NOT_A_REPLICA_COUNT)?);
        } else if args.option("strict") {
            self.settings.strict = Some(match args.bytes()?.to_ascii_lowercase().as_slice() {
                b"yes" => true,
                b"no" => false,
                _ => return Err(NOT_YES_OR_NO),
            });
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// What the line itself makes impossible; what else is, the master knows.
    fn check(&self, copies: Option<u32>) -> Result<(), CommandError> {
        let is_too_many = |copies: u32| self.settings.min_replicas() >= copies;
        if copies.is_some_and(is_too_many) { Err(TOO_FEW_COPIES) } else { Ok(()) }
    }
}

/// The next word as a number of at least `min`.
fn count(args: &mut Args<'_>, min: u32) -> Option<u32> {
    args.integer().ok().and_then(|count| u32::try_from(count).ok()).filter(|count| *count >= min)
}

/// KEYSPACE CREATE name SHARDS n [COPIES r] [FSYNC word] [MIN-REPLICAS k] [STRICT yes|no]
pub fn create(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = context;
    let name = String::from_utf8_lossy(args.bytes()?).into_owned();
    let as_error = |text: String| error::single_line(&text).into_owned();
    validate_name(&name).map_err(|refused| as_error(format!("ERR {refused}")))?;
    let (mut shards, mut wishes) = (None, Wishes::default());
    while !args.is_empty() {
        if args.option("shards") {
            shards = Some(count(&mut args, 1).ok_or(NOT_A_SHARD_COUNT)?);
        } else if !wishes.take(&mut args)? {
            return Err(error::SYNTAX);
        }
    }
    // Else the master would take as many as keyspace 0 has; whoever names a keyspace shall say how far it can be spread.
    let shards = Some(shards.ok_or(error::SYNTAX)?);
    let copies = wishes.copies.unwrap_or(1);
    wishes.check(Some(copies))?;
    let creation = Creation { name, shards, copies, settings: wishes.settings, may_exist: false };
    Ok(Next::AskMaster(Change::Create(creation), Box::new(Answered)))
}

/// KEYSPACE ALTER name [COPIES r] [FSYNC word] [MIN-REPLICAS k] [STRICT yes|no]
pub fn keyspace_alter(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let keyspace = named_keyspace(&context.routing.snapshot, args.bytes()?)?;
    let mut wishes = Wishes::default();
    while !args.is_empty() {
        if !wishes.take(&mut args)? {
            return Err(error::SYNTAX);
        }
    }
    wishes.check(wishes.copies)?;
    Ok(alter(keyspace, wishes.copies, wishes.settings, Changes::default()))
}

/// KEYSPACE FAILOVER name SHARD i [TO store]
pub fn failover(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let _ = context;
    let name = String::from_utf8_lossy(args.bytes()?).into_owned();
    let (mut shard, mut to) = (None, None);
    while !args.is_empty() {
        if args.option("shard") {
            shard = Some(count(&mut args, 0).ok_or(NOT_A_SHARD)?);
        } else if args.option("to") {
            to = Some(store_id(args.bytes()?).ok_or(NOT_A_STORE)?);
        } else {
            return Err(error::SYNTAX);
        }
    }
    let failover = Failover { name, shard: shard.ok_or(error::SYNTAX)?, to };
    Ok(Next::AskMaster(Change::Failover(failover), Box::new(Answered)))
}

/// A store as it is printed.
pub fn store_id(word: &[u8]) -> Option<StoreId> {
    let digits = std::str::from_utf8(word).ok().filter(|word| word.len() == 8)?;
    let is_hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = u32::from_str_radix(digits, 16).ok().filter(|id| is_hexadecimal && *id != 0)?;
    Some(StoreId(id))
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
pub struct Answered;

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
    use vasto_proto::id::KeyspaceId;
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
            > KEYSPACE CREATE a SHARDS 1 MIN-REPLICAS 1 / < -ERR MIN-REPLICAS counts the copies beside the primary and must be below COPIES; nothing was changed
            > KEYSPACE CREATE a SHARDS 1 COPIES 3 MIN-REPLICAS 3 / < -ERR MIN-REPLICAS counts the copies beside the primary and must be below COPIES; nothing was changed
            > KEYSPACE CREATE a SHARDS 1 MIN-REPLICAS -1 / < -ERR MIN-REPLICAS is a number from 0 on
            > KEYSPACE CREATE a SHARDS 1 MIN-REPLICAS / < -ERR MIN-REPLICAS is a number from 0 on
            > KEYSPACE CREATE a SHARDS 1 STRICT maybe / < -ERR STRICT is yes or no
            > KEYSPACE FAILOVER users / < -ERR wrong number of arguments for 'keyspace|failover' command
            > KEYSPACE FAILOVER users SHARD x / < -ERR SHARD is a number from 0 on
            > KEYSPACE FAILOVER users SHARD -1 / < -ERR SHARD is a number from 0 on
            > KEYSPACE FAILOVER users TO 0000000b / < -ERR syntax error
            > KEYSPACE FAILOVER users SHARD 0 NOW / < -ERR syntax error
            > KEYSPACE FAILOVER users SHARD 0 TO here / < -ERR TO is followed by the id of a store, 8 hexadecimal digits as STORES shows it
            > KEYSPACE FAILOVER users SHARD 0 TO +000000b / < -ERR TO is followed by the id of a store, 8 hexadecimal digits as STORES shows it
            > KEYSPACE FAILOVER users SHARD 0 TO 00000000 / < -ERR TO is followed by the id of a store, 8 hexadecimal digits as STORES shows it
            > KEYSPACE ALTER users FSYNC / < -ERR wrong number of arguments for 'keyspace|alter' command
            > KEYSPACE ALTER nosuch FSYNC no / < -ERR no such keyspace 'nosuch'
            > KEYSPACE ALTER users COLOUR red / < -ERR syntax error
            > KEYSPACE ALTER users SHARDS 2 / < -ERR syntax error
            > KEYSPACE ALTER users FSYNC red / < -ERR FSYNC is one of always, everysec, no
            > KEYSPACE ALTER users FSYNC no FSYNC / < -ERR syntax error
            > KEYSPACE ALTER users COPIES 0 / < -ERR COPIES is a number from 1 on
            > KEYSPACE ALTER users COPIES 2 MIN-REPLICAS 2 / < -ERR MIN-REPLICAS counts the copies beside the primary and must be below COPIES; nothing was changed
            > KEYSPACE ALTER users STRICT x / < -ERR STRICT is yes or no
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
        let line = "KEYSPACE CREATE a shards 4 COPIES 3 fsync ALWAYS min-replicas 2 strict NO";
        assert_eq!(harness.run(line), "OK");
        let creation = Creation {
            name: "a".to_owned(),
            shards: Some(4),
            copies: 3,
            settings: Settings { fsync: Some(Fsync::Always), min_replicas: Some(2), strict: Some(false) },
            may_exist: false,
        };
        assert_eq!(harness.asked_master.take(), Some(Change::Create(creation)));
        harness.run("KEYSPACE CREATE a SHARDS 4");
        let Some(Change::Create(creation)) = harness.asked_master.take() else { panic!("the master was asked") };
        assert_eq!((creation.copies, creation.settings), (1, Settings::default()));
        harness.master = packed(|reply| reply.ok());
        assert_eq!(harness.run("KEYSPACE FAILOVER nosuch SHARD 3 TO 0000000B"), "OK");
        let failover = Failover { name: "nosuch".to_owned(), shard: 3, to: Some(StoreId(0xb)) };
        assert_eq!(harness.asked_master.take(), Some(Change::Failover(failover)));
        assert_eq!(harness.run("KEYSPACE FAILOVER users shard 0"), "OK");
        let failover = Failover { name: "users".to_owned(), shard: 0, to: None };
        assert_eq!(harness.asked_master.take(), Some(Change::Failover(failover)));
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
    fn a_keyspace_is_altered_by_the_master() {
        let mut harness = Harness::new();
        assert_eq!(harness.run("KEYSPACE ALTER users fsync NO"), "OK");
        let Some(Change::Alter(asked)) = harness.asked_master.take() else { panic!("the master was asked") };
        assert_eq!((asked.name.as_str(), asked.changes.fsync, asked.copies), ("users", Some(Fsync::Never), None));
        // Whether the copies that there are suffice is the master's to say.
        assert_eq!(harness.run("KEYSPACE ALTER users copies 3 min-replicas 2 strict yes"), "OK");
        let Some(Change::Alter(asked)) = harness.asked_master.take() else { panic!("the master was asked") };
        let changes = Settings { fsync: None, min_replicas: Some(2), strict: Some(true) };
        assert_eq!((asked.changes, asked.copies), (changes, Some(3)));
        assert_eq!(harness.run("KEYSPACE ALTER users MIN-REPLICAS 7"), "OK");
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
