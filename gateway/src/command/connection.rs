//! Commands on the connection itself: its protocol, its keyspace, its end.

use super::client;
use super::keyspaces;
use super::{Context, Next};
use crate::routing::Routing;
use crate::session::{Protocol, ReplyMode};
use vasto_proto::command::Args;
use vasto_proto::command::args::parse_integer;
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::KeyspaceId;

const WRONG_PASSWORD: CommandError =
    CommandError::fixed("WRONGPASS invalid username-password pair or user is disabled.");
const NO_PASSWORD_SET: CommandError = CommandError::fixed(
    "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?",
);

pub fn ping(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    match (args.next(), args.next()) {
        (None, _) => context.reply().simple("PONG"),
        (Some(message), None) => context.reply().bulk(message),
        (Some(_), Some(_)) => return Err(error::wrong_arity("ping")),
    }
    Ok(Next::Replied)
}

pub fn echo(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    context.reply().bulk(args.bytes()?);
    Ok(Next::Replied)
}

pub fn hello(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let mut protocol = None;
    if let Some(version) = args.next() {
        protocol = match parse_integer(version) {
            Some(2) => Some(Protocol::Resp2),
            Some(3) => Some(Protocol::Resp3),
            Some(_) => return Err(CommandError::fixed("NOPROTO unsupported protocol version")),
            None => return Err(CommandError::fixed("ERR Protocol version is not an integer or out of range")),
        };
    }
    // Options act from left to right, also when a later one is wrong, as in Redis.
    while let Some(option) = args.next() {
        if option.eq_ignore_ascii_case(b"auth") && args.len() >= 2 {
            authenticate(args.bytes()?)?;
            args.bytes()?;
        } else if option.eq_ignore_ascii_case(b"setname") && !args.is_empty() {
            let name = client::valid_name(args.bytes()?)?;
            context.session.client.change_names(|names| names.name = name.to_vec());
        } else {
            let text = format!("ERR Syntax error in HELLO option '{}'", error::printed(option));
            return Err(error::single_line(&text).into_owned().into());
        }
    }
    if let Some(protocol) = protocol {
        set_protocol(context, protocol);
    }
    let version = match context.session.protocol {
        Protocol::Resp2 => 2,
        Protocol::Resp3 => 3,
    };
    let id = i64::try_from(context.session.client.id).expect("fewer than 2^63 connections");
    let mut reply = context.reply();
    reply.map(7);
    for (field, value) in [("server", "redis"), ("version", vasto_proto::REDIS_VERSION)] {
        reply.bulk(field.as_bytes());
        reply.bulk(value.as_bytes());
    }
    for (field, value) in [("proto", version), ("id", id)] {
        reply.bulk(field.as_bytes());
        reply.integer(value);
    }
    for (field, value) in [("mode", "standalone"), ("role", "master")] {
        reply.bulk(field.as_bytes());
        reply.bulk(value.as_bytes());
    }
    reply.bulk(b"modules");
    reply.array(0);
    Ok(Next::Replied)
}

fn set_protocol(context: &mut Context<'_>, protocol: Protocol) {
    context.session.protocol = protocol;
    context.session.client.set_protocol_version(match protocol {
        Protocol::Resp2 => 2,
        Protocol::Resp3 => 3,
    });
}

/// There is one user, `default`, who needs no password.
fn authenticate(user: &[u8]) -> Result<(), CommandError> {
    if user == b"default" { Ok(()) } else { Err(WRONG_PASSWORD) }
}

pub fn auth(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    match args.len() {
        1 => return Err(NO_PASSWORD_SET),
        2 => authenticate(args.bytes()?)?,
        _ => return Err(error::SYNTAX),
    }
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn select(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let name = args.bytes()?;
    match find_keyspace(context.routing, name) {
        Ok(keyspace) => {
            choose(context, keyspace, name);
            Ok(Next::Replied)
        }
        Err(error) => database_to_create(context, name).map(keyspaces::create_database).ok_or(error),
    }
}

/// Makes a keyspace that of the connection, and answers so.
pub fn choose(context: &mut Context<'_>, keyspace: KeyspaceId, name: &[u8]) {
    context.session.keyspace = keyspace;
    context.session.client.set_keyspace(&String::from_utf8_lossy(name));
    context.reply().ok();
}

/// The number of a database that has no keyspace yet and may have one.
pub fn database_to_create(context: &Context<'_>, name: &[u8]) -> Option<i64> {
    let databases: i64 = context.shared.settings.text("databases").parse().unwrap_or_default();
    let is_missing = find_keyspace(context.routing, name).is_err();
    parse_integer(name).filter(|number| is_missing && (0..databases).contains(number))
}

/// The keyspace that SELECT means: the one of this name. Redis's numbers are names like others; keyspace 0 exists always, even while the
/// cluster is not ready yet.
pub fn find_keyspace(routing: &Routing, name: &[u8]) -> Result<KeyspaceId, CommandError> {
    if let Some(record) = routing.snapshot.keyspaces.iter().find(|record| record.name.as_bytes() == name) {
        return Ok(record.id);
    }
    match parse_integer(name) {
        Some(0) => Ok(KeyspaceId(0)),
        Some(number) if i32::try_from(number).is_ok() => Err(error::DB_INDEX_OUT_OF_RANGE),
        Some(_) => Err(CommandError::fixed("ERR value is out of range, value must between -2147483648 and 2147483647")),
        None => Err(error::NOT_AN_INTEGER),
    }
}

/// READONLY: in Redis only with cluster support; here replicas may answer what only reads.
pub fn readonly(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    read_from(context, Readers::Replicas);
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn readwrite(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    read_from(context, Readers::Primaries);
    context.reply().ok();
    Ok(Next::Replied)
}

/// Who answers what only reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readers {
    Primaries,
    Replicas,
}

fn read_from(context: &mut Context<'_>, readers: Readers) {
    let from_replicas = readers == Readers::Replicas;
    context.session.reads_from_replicas = from_replicas;
    context.session.client.set_reads_from_replicas(from_replicas);
}

pub fn quit(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.reply().ok();
    Ok(Next::RepliedThenClose)
}

pub fn reset(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    read_from(context, Readers::Primaries);
    let session = &mut *context.session;
    session.transaction = None;
    session.watched.clear();
    session.reply_mode = ReplyMode::On;
    session.keyspace = KeyspaceId(0);
    session.client.set_queued_commands(None);
    session.client.set_keyspace("0");
    session.client.change_names(|names| names.name.clear());
    set_protocol(context, Protocol::Resp2);
    context.reply().simple("RESET");
    Ok(Next::Replied)
}

#[cfg(test)]
mod tests {
    use crate::command::harness::Harness;
    use crate::session::Protocol;

    #[test]
    fn answers_are_those_of_redis() {
        Harness::new().script(
            r#"
            > PING / < +PONG
            > PING hi / < "hi"
            > PING a b / < -ERR wrong number of arguments for 'ping' command
            > ECHO x / < "x"
            > HELLO 4 / < -NOPROTO unsupported protocol version
            > HELLO x / < -ERR Protocol version is not an integer or out of range
            > HELLO 2 foo / < -ERR Syntax error in HELLO option 'foo'
            > HELLO 2 auth a / < -ERR Syntax error in HELLO option 'auth'
            > HELLO 3 auth foo x / < -WRONGPASS invalid username-password pair or user is disabled.
            > HELLO 2 setname a\nb / < -ERR Client names cannot contain spaces, newlines or special characters.
            > HELLO 2 AUTH default x SETNAME me / < {"server": "redis", "version": "7.0.15", "proto": 2, "id": 1, "mode": "standalone", "role": "master", "modules": []}
            > CLIENT GETNAME / < "me"
            > AUTH a b c / < -ERR syntax error
            > AUTH x / < -ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?
            > AUTH default x / < OK
            > AUTH foo x / < -WRONGPASS invalid username-password pair or user is disabled.
            > SELECT 0 / < OK
            > SELECT users / < OK
            > SELECT 16 / < -ERR DB index is out of range
            > SELECT -1 / < -ERR DB index is out of range
            > SELECT 1000000000000 / < -ERR value is out of range, value must between -2147483648 and 2147483647
            > SELECT 1.5 / < -ERR value is not an integer or out of range
            > QUIT / < OK
            > RESET / < +RESET
            > CLIENT GETNAME / < null
            "#,
        );
    }

    #[test]
    fn readonly_is_kept_until_readwrite_or_reset() {
        let mut harness = Harness::new();
        for (line, is_kept) in [("READONLY", true), ("READWRITE", false), ("READONLY", true), ("RESET", false)] {
            harness.run(line);
            assert_eq!(harness.session.reads_from_replicas, is_kept, "{line}");
            assert_eq!(harness.run("CLIENT INFO").contains(" flags=r "), is_kept, "{line}");
        }
        assert_eq!((harness.run("READONLY"), harness.run("READWRITE")), ("OK".to_owned(), "OK".to_owned()));
        assert_eq!(harness.run("READONLY x"), "-ERR wrong number of arguments for 'readonly' command");
    }

    #[test]
    fn hello_switches_the_protocol_only_when_all_of_it_is_valid() {
        let mut harness = Harness::new();
        harness.run("HELLO 3 setname");
        assert_eq!(harness.session.protocol, Protocol::Resp2);
        harness.run("HELLO 3");
        assert_eq!((harness.session.protocol, harness.session.client.protocol_version()), (Protocol::Resp3, 3));
        harness.run("RESET");
        assert_eq!(harness.session.protocol, Protocol::Resp2);
    }
}
