//! CONFIG: settings of the gateway that was asked, and those of the connection's keyspace, which the master changes for all gateways.

use super::{Ask, Context, Next, Round, ShardRequest};
use crate::settings::{Changes, OfKeyspaceShown};
use crate::upstream::masters::{Alteration, Change};
use vasto_proto::command::{Args, Reply};
use vasto_proto::error::{self, CommandError};
use vasto_proto::topology::{KeyspaceRecord, Settings};

pub fn get(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    let snapshot = &context.routing.snapshot;
    let keyspace = snapshot.keyspace(context.session.keyspace);
    let shown = OfKeyspaceShown {
        fsync: keyspace.map(|keyspace| snapshot.fsync(keyspace)).unwrap_or_default(),
        min_replicas: keyspace.map(|keyspace| keyspace.settings.min_replicas()).unwrap_or_default(),
    };
    let found = context.shared.settings.get(args, shown);
    let mut reply = context.reply();
    reply.map(found.len());
    for (name, value) in found {
        reply.bulk(&name);
        reply.bulk(value.as_bytes());
    }
    Ok(Next::Replied)
}

pub fn set(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    if !args.len().is_multiple_of(2) {
        return Err(error::SYNTAX);
    }
    let mut pairs = Vec::with_capacity(args.len() / 2);
    while !args.is_empty() {
        pairs.push((args.bytes()?, args.bytes()?));
    }
    let changes = context.shared.settings.check(&pairs)?;
    if changes.of_keyspace == Settings::default() {
        context.shared.settings.make(changes);
        context.reply().ok();
        return Ok(Next::Replied);
    }
    let keyspace = context.routing.snapshot.keyspace(context.session.keyspace).ok_or(error::NO_KEYSPACE)?;
    Ok(alter(keyspace, None, changes.of_keyspace.clone(), changes))
}

/// Changes a keyspace, and when that has succeeded, this gateway.
pub fn alter(keyspace: &KeyspaceRecord, copies: Option<u32>, of_keyspace: Settings, here: Changes) -> Next {
    let alteration = Alteration { name: keyspace.name.clone(), changes: of_keyspace, copies };
    Next::AskMaster(Change::Alter(alteration), Box::new(Alter { here }))
}

/// Waits for the master's answer. Nothing here can fail any more, so that all changes are made or none is.
#[derive(Debug)]
struct Alter {
    here: Changes,
}

impl Ask for Alter {
    fn start(&mut self, _context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        Ok(Vec::new())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        match answers.first().and_then(|answer| Reply::take(&mut answer.as_slice())) {
            Some(Reply::Ok) => {
                context.shared.settings.make(std::mem::take(&mut self.here));
                context.reply().ok();
                Ok(Round::Done)
            }
            Some(Reply::Error(text)) => Err(String::from_utf8_lossy(text).into_owned().into()),
            Some(_) | None => Err(error::MASTER_LOST),
        }
    }
}

pub fn resetstat(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.shared.statistics.reset();
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn rewrite(_context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    Err(CommandError::fixed("ERR The server is running without a config file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed};
    use std::sync::Arc;
    use vasto_proto::topology::{Fsync, Snapshot};

    #[test]
    fn answers_are_those_of_redis() {
        Harness::new().script(
            r#"
            > CONFIG GET hz / < {"hz": "10"}
            > CONFIG GET nosuch / < {}
            > CONFIG GET Timeout maxclient* / < {"Timeout": "0", "maxclients": "10000"}
            > CONFIG SET hz 20 timeout 5 / < OK
            > CONFIG GET hz timeout / < {"hz": "20", "timeout": "5"}
            > CONFIG SET hz 10 timeout / < -ERR syntax error
            > CONFIG SET hz 30 foo bar / < -ERR Unknown option or number of arguments for CONFIG SET - 'foo'
            > CONFIG SET hz 30 timeout x / < -ERR CONFIG SET failed (possibly related to argument 'timeout') - argument couldn't be parsed into an integer
            > CONFIG GET hz / < {"hz": "20"}
            > CONFIG GET save appendonly appendfsync / < {"save": "", "appendonly": "yes", "appendfsync": "everysec"}
            > CONFIG RESETSTAT / < OK
            > CONFIG REWRITE / < -ERR The server is running without a config file
            "#,
        );
    }

    #[test]
    fn what_belongs_to_the_keyspace_is_asked_of_the_master_and_the_rest_follows() {
        let mut harness = Harness::new();
        harness.session.keyspace = vasto_proto::id::KeyspaceId(5);
        let settings = Settings { fsync: Some(Fsync::Always), ..Settings::default() };
        let expected = Alteration { name: "users".to_owned(), changes: settings.clone(), copies: None };
        assert_eq!(harness.run("CONFIG SET hz 20 AppendFsync ALWAYS timeout 5"), "OK");
        assert_eq!(harness.asked_master, Some(Change::Alter(expected)));
        assert_eq!(harness.run("CONFIG GET hz timeout"), r#"{"hz": "20", "timeout": "5"}"#);
        harness.master = packed(|reply| reply.error("ERR stores 0000000b of keyspace users are down"));
        assert_eq!(harness.run("CONFIG SET hz 30 appendfsync no"), "-ERR stores 0000000b of keyspace users are down");
        assert_eq!(harness.run("CONFIG GET hz"), r#"{"hz": "20"}"#, "all or nothing");
        harness.master = packed(|reply| reply.ok());
        assert_eq!(harness.run("CONFIG SET min-replicas-to-write 2 hz 40"), "OK");
        let changes = Settings { min_replicas: Some(2), ..Settings::default() };
        let expected = Alteration { name: "users".to_owned(), changes, copies: None };
        assert_eq!(harness.asked_master, Some(Change::Alter(expected)));
        // What is wrong here asks nobody.
        for line in [
            "CONFIG SET appendfsync no hz x",
            "CONFIG SET appendfsync sometimes",
            "CONFIG SET min-slaves-to-write -1",
            "CONFIG SET hz 25",
        ] {
            harness.run(line);
            assert_eq!(harness.asked_master, None, "{line}");
        }
        // What is shown is what the record says.
        let mut snapshot = Snapshot::clone(&harness.routing.snapshot);
        let settings = Settings { min_replicas: Some(2), ..settings };
        snapshot.keyspaces[1] = snapshot.keyspaces[1].with_settings(settings);
        harness.routing = crate::routing::Routing::new(Arc::new(snapshot));
        assert_eq!(harness.run("CONFIG GET append*"), r#"{"appendfsync": "always", "appendonly": "yes"}"#);
        assert_eq!(
            harness.run("CONFIG GET min-*-to-write"),
            r#"{"min-replicas-to-write": "2", "min-slaves-to-write": "2"}"#
        );
        harness.session.keyspace = vasto_proto::id::KeyspaceId(0);
        assert_eq!(harness.run("CONFIG GET min-replicas-to-write"), r#"{"min-replicas-to-write": "0"}"#);
        assert_eq!(harness.run("CONFIG GET appendfsync"), r#"{"appendfsync": "everysec"}"#);
    }
}
