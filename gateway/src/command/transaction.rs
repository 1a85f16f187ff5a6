//! MULTI, EXEC, DISCARD, WATCH, UNWATCH: the queue lies in the session, one shard runs it as one operation.

use super::connection::{database_to_create, find_keyspace};
use super::{Ask, Context, Next, Round, ShardRequest, handler};
use crate::routing::Routing;
use crate::session::{Protocol, QueuedCommand, Session, Transaction, WatchedKey};
use vasto_proto::batch::Arguments;
use vasto_proto::command::table::{Command, GatewayCommand, StoreCommand};
use vasto_proto::command::{Args, CommandSpec, Keys, Reply, ReplyWriter, Route};
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::{KeyspaceId, ShardKey};

const EXEC_ABORTED: CommandError = CommandError::fixed("EXECABORT Transaction discarded because of previous errors.");
const MALFORMED_ANSWER: CommandError =
    CommandError::fixed("ERR the store answered something that is no reply of a transaction");
/// The element of a command that would end or hold up the connection in mid-transaction.
const NOT_IN_TRANSACTION: &str = "ERR this command cannot run inside a transaction";

pub fn multi(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    if context.session.transaction.is_some() {
        return Err(CommandError::fixed("ERR MULTI calls can not be nested"));
    }
    context.session.transaction = Some(Transaction::default());
    context.session.client.set_queued_commands(Some(0));
    context.reply().ok();
    Ok(Next::Replied)
}

/// Ends the transaction and forgets the watched keys.
fn end(session: &mut Session) -> Option<(Transaction, Vec<WatchedKey>)> {
    let transaction = session.transaction.take()?;
    session.client.set_queued_commands(None);
    Some((transaction, std::mem::take(&mut session.watched)))
}

pub fn discard(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    end(context.session).ok_or(CommandError::fixed("ERR DISCARD without MULTI"))?;
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn unwatch(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    context.session.watched.clear();
    context.reply().ok();
    Ok(Next::Replied)
}

pub fn watch(context: &mut Context<'_>, args: Args<'_>) -> Result<Next, CommandError> {
    if context.session.transaction.is_some() {
        return Err(CommandError::fixed("ERR WATCH inside MULTI is not allowed"));
    }
    Ok(Next::Ask(Box::new(Watch {
        keyspace: context.session.keyspace,
        keys: args.map(<[u8]>::to_vec).collect(),
        groups: Vec::new(),
    })))
}

/// Asks each shard for the tokens of its keys.
#[derive(Debug)]
struct Watch {
    keyspace: KeyspaceId,
    keys: Vec<Vec<u8>>,
    /// The keys of each request.
    groups: Vec<(ShardKey, Vec<Vec<u8>>)>,
}

impl Ask for Watch {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        let routes = context.routing.keyspace(self.keyspace).ok_or(error::NO_KEYSPACE)?;
        self.groups.clear();
        for key in &self.keys {
            // A key that is watched already keeps its first token.
            let is_it = |watched: &WatchedKey| watched.keyspace == self.keyspace && watched.key == *key;
            if context.session.watched.iter().any(is_it) {
                continue;
            }
            let target = routes.shard_key(routes.shard_of_key(key));
            match self.groups.iter_mut().find(|(known, _)| *known == target) {
                Some((_, keys)) if keys.contains(key) => {}
                Some((_, keys)) => keys.push(key.clone()),
                None => self.groups.push((target, vec![key.clone()])),
            }
        }
        let request = |(target, keys): &(ShardKey, Vec<Vec<u8>>)| ShardRequest {
            target: *target,
            command: StoreCommand::InternalWatch,
            arguments: keys.clone(),
        };
        Ok(self.groups.iter().map(request).collect())
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let mut watched = Vec::new();
        let keyspace = self.keyspace;
        for ((_, keys), answer) in self.groups.drain(..).zip(&answers) {
            let tokens = tokens(answer, keys.len())?;
            watched.extend(keys.into_iter().zip(tokens).map(|(key, token)| WatchedKey { keyspace, key, token }));
        }
        context.session.watched.extend(watched);
        context.reply().ok();
        Ok(Round::Done)
    }
}

/// The error that a store answered, if it is one.
fn as_error(answer: &[u8]) -> Option<CommandError> {
    match Reply::take(&mut &*answer)? {
        Reply::Error(text) => Some(String::from_utf8_lossy(text).into_owned().into()),
        _ => None,
    }
}

fn tokens(mut answer: &[u8], count: usize) -> Result<Vec<Vec<u8>>, CommandError> {
    if let Some(error) = as_error(answer) {
        return Err(error);
    }
    if Reply::take(&mut answer) != Some(Reply::Array(count)) {
        return Err(MALFORMED_ANSWER);
    }
    let token = |_| match Reply::take(&mut answer) {
        Some(Reply::Bulk(token)) => Ok(token.to_vec()),
        _ => Err(MALFORMED_ANSWER),
    };
    (0..count).map(token).collect()
}

pub fn exec(context: &mut Context<'_>, _args: Args<'_>) -> Result<Next, CommandError> {
    let (transaction, watched) = end(context.session).ok_or(CommandError::fixed("ERR EXEC without MULTI"))?;
    if transaction.is_broken {
        return Err(EXEC_ABORTED);
    }
    for queued in &transaction.commands {
        if queued.command == Command::Gateway(GatewayCommand::Select) {
            let name = arguments(queued)?.next().unwrap_or_default();
            // The commands behind it mean that database, and nothing may be created between what is atomic.
            if let Some(number) = database_to_create(context, name) {
                let text = format!(
                    "EXECABORT Transaction discarded because of: database {number} does not exist yet; SELECT it once before MULTI"
                );
                return Err(text.into());
            }
        }
    }
    Ok(Next::Ask(Box::new(Exec {
        keyspace: context.session.keyspace,
        commands: transaction.commands,
        watched,
        store_replies: None,
        done: Vec::new(),
        nested: None,
    })))
}

fn arguments(command: &QueuedCommand) -> Result<Arguments<'_>, CommandError> {
    Arguments::parse(&command.packed_arguments, command.argument_count)
        .map_err(|_| CommandError::fixed("ERR a queued command is damaged; nothing was executed"))
}

/// The one shard that all keys of the transaction lie in; `None` if it needs none.
fn target(
    routing: &Routing,
    mut keyspace: KeyspaceId,
    commands: &[QueuedCommand],
    watched: &[WatchedKey],
) -> Result<Option<ShardKey>, CommandError> {
    let mut found = None;
    let mut add = |shard: ShardKey| {
        if *found.get_or_insert(shard) == shard { Ok(()) } else { Err(error::CROSS_SHARD) }
    };
    for watched in watched {
        // Tokens move with their rows: they hold in whichever shard the key is now.
        let routes = routing.keyspace(watched.keyspace).ok_or(error::NO_KEYSPACE)?;
        add(routes.shard_key(routes.shard_of_key(&watched.key)))?;
    }
    for queued in commands {
        let command = match queued.command {
            Command::Store(command) => command,
            Command::Gateway(GatewayCommand::Select) => {
                // It will run in its turn; the commands behind it mean another keyspace. One that fails changes nothing.
                let name = arguments(queued)?.next().unwrap_or_default();
                keyspace = find_keyspace(routing, name).unwrap_or(keyspace);
                continue;
            }
            Command::Gateway(_) => continue,
        };
        let routes = routing.keyspace(keyspace).ok_or(error::NO_KEYSPACE)?;
        match command.spec().route {
            Route::OneShard | Route::Split(_) => {
                for key in keys(command.spec(), arguments(queued)?) {
                    add(routes.shard_key(routes.shard_of_key(key)))?;
                }
            }
            Route::AllShards(_) => routes.shard_keys().try_for_each(&mut add)?,
            Route::AllKeyspaces(_) => {
                routing.keyspaces().flat_map(|routes| routes.shard_keys()).try_for_each(&mut add)?
            }
            // The table's own tests hold that these rows are the gateway's.
            Route::Here => {}
        }
    }
    Ok(found)
}

/// The keys among a command's arguments.
fn keys<'a>(spec: &CommandSpec, arguments: Arguments<'a>) -> impl Iterator<Item = &'a [u8]> {
    debug_assert!(spec.keys != Keys::NONE, "{} has keys", spec.name);
    let words = spec.name_words();
    let word = |place: usize| {
        let mut ahead = arguments;
        ahead.nth(place - words).unwrap_or_default()
    };
    let before_event_time = spec.words_before_event_time(words + arguments.len(), word);
    let mut positions = spec.key_positions(before_event_time).peekable();
    arguments.enumerate().filter_map(move |(place, argument)| positions.next_if_eq(&(words + place)).map(|_| argument))
}

/// A transaction on its way: first the shard, then what the gateway answers itself, each reply in its place.
#[derive(Debug)]
struct Exec {
    /// Of the connection when it began; SELECT is a command of its own in it.
    keyspace: KeyspaceId,
    commands: Vec<QueuedCommand>,
    watched: Vec<WatchedKey>,
    /// The packed replies of the store's commands, those that were not taken yet at the end.
    store_replies: Option<std::vec::IntoIter<Vec<u8>>>,
    /// Packed replies in the order of the commands, as far as they are known.
    done: Vec<Vec<u8>>,
    /// A command in its turn that asks shards itself.
    nested: Option<Box<dyn Ask>>,
}

impl Ask for Exec {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        let target = target(context.routing, self.keyspace, &self.commands, &self.watched)?;
        let Some(target) = target else {
            self.store_replies = Some(Vec::new().into_iter());
            return Ok(Vec::new());
        };
        let mut request = vec![self.watched.len().to_string().into_bytes()];
        for watched in &self.watched {
            request.extend([watched.key.clone(), watched.token.clone()]);
        }
        for queued in &self.commands {
            if let Command::Store(command) = queued.command {
                request.push(command.code().to_le_bytes().to_vec());
                request.push(queued.argument_count.to_le_bytes().to_vec());
                request.extend(arguments(queued)?.map(<[u8]>::to_vec));
            }
        }
        Ok(vec![ShardRequest { target, command: StoreCommand::InternalExec, arguments: request }])
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        if self.store_replies.is_none() {
            let [answer] = answers.as_slice() else {
                return Err(MALFORMED_ANSWER);
            };
            match Reply::take(&mut answer.as_slice()) {
                Some(Reply::NullArray) => {
                    context.reply().null_array();
                    return Ok(Round::Done);
                }
                Some(Reply::Error(_)) => return Err(as_error(answer).unwrap_or(MALFORMED_ANSWER)),
                _ => self.store_replies = Some(elements(answer)?.into_iter()),
            }
        } else if let Some(mut nested) = self.nested.take() {
            let mut reply = Vec::new();
            let round = nested.next(&mut sub_context(context, &mut reply), answers);
            return self.take_nested(context, nested, round, reply);
        }
        self.go_on(context)
    }

    fn again(&mut self, context: &mut Context<'_>, answered: &[Option<Vec<u8>>]) -> Result<Round, CommandError> {
        let Some(mut nested) = self.nested.take() else {
            // The store has executed none of it.
            return self.start(context).map(Round::Again);
        };
        let mut reply = Vec::new();
        let round = nested.again(&mut sub_context(context, &mut reply), answered);
        self.take_nested(context, nested, round, reply)
    }
}

impl Exec {
    /// What the command wants whose turn it is; `reply` is its own if it is done.
    fn take_nested(
        &mut self,
        context: &mut Context<'_>,
        nested: Box<dyn Ask>,
        round: Result<Round, CommandError>,
        reply: Vec<u8>,
    ) -> Result<Round, CommandError> {
        match round {
            Ok(Round::Again(requests)) => {
                self.nested = Some(nested);
                return Ok(Round::Again(requests));
            }
            Ok(Round::Later { otherwise, .. }) => self.done.push(otherwise),
            Ok(Round::Done) => self.done.push(reply),
            Err(error) => self.done.push(error_reply(error.text())),
        }
        self.go_on(context)
    }

    /// Collects replies until a command must ask shards, or all are there.
    fn go_on(&mut self, context: &mut Context<'_>) -> Result<Round, CommandError> {
        while let Some(queued) = self.commands.get(self.done.len()) {
            let reply = match queued.command {
                Command::Store(_) => self.store_replies.as_mut().and_then(Iterator::next).ok_or(MALFORMED_ANSWER)?,
                Command::Gateway(command) => match run_here(context, command, arguments(queued)?) {
                    Here::Replied(reply) => reply,
                    Here::Asks(nested, requests) => {
                        self.nested = Some(nested);
                        return Ok(Round::Again(requests));
                    }
                },
            };
            self.done.push(reply);
        }
        let mut writer = context.reply();
        writer.array(self.done.len());
        self.done.iter().for_each(|reply| writer.packed(reply));
        Ok(Round::Done)
    }
}

/// How a command of a transaction ended that the gateway answers.
enum Here {
    Replied(Vec<u8>),
    Asks(Box<dyn Ask>, Vec<ShardRequest>),
}

fn run_here(context: &mut Context<'_>, command: GatewayCommand, arguments: Arguments<'_>) -> Here {
    let mut reply = Vec::new();
    let protocol = context.session.protocol;
    let next = handler(command)(&mut sub_context(context, &mut reply), Args::new(arguments));
    if context.session.protocol != protocol {
        // What was answered before HELLO keeps its form.
        let version = if context.session.protocol == Protocol::Resp3 { 3 } else { 2 };
        let mut marked = Vec::with_capacity(2 + reply.len());
        ReplyWriter::new(&mut marked).protocol(version);
        marked.append(&mut reply);
        reply = marked;
    }
    Here::Replied(match next {
        Ok(Next::Replied) => reply,
        Ok(Next::RepliedThenClose) => {
            // CLIENT KILL of oneself: the rest of the transaction still has its turn.
            context.session.client.kill();
            reply
        }
        Ok(Next::Ask(mut ask)) => match ask.start(&mut sub_context(context, &mut Vec::new())) {
            Ok(requests) => return Here::Asks(ask, requests),
            Err(error) => error_reply(error.text()),
        },
        Ok(Next::Silent | Next::AskMaster(..) | Next::RepliedAfter(_) | Next::Shutdown) => {
            error_reply(NOT_IN_TRANSACTION)
        }
        Err(error) => error_reply(error.text()),
    })
}

/// The same context with a reply of its own.
fn sub_context<'a>(context: &'a mut Context<'_>, reply: &'a mut Vec<u8>) -> Context<'a> {
    Context { session: &mut *context.session, shared: context.shared, routing: context.routing, reply }
}

fn error_reply(text: &str) -> Vec<u8> {
    let mut reply = Vec::new();
    ReplyWriter::new(&mut reply).error(text);
    reply
}

/// The elements of a packed array.
fn elements(mut answer: &[u8]) -> Result<Vec<Vec<u8>>, CommandError> {
    let Some(Reply::Array(count)) = Reply::take(&mut answer) else {
        return Err(MALFORMED_ANSWER);
    };
    let element = |_| Reply::take_whole(&mut answer).map(<[u8]>::to_vec).ok_or(MALFORMED_ANSWER);
    (0..count).map(element).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed, parse, words};

    fn queue(harness: &mut Harness, lines: &[&str]) {
        assert_eq!(harness.run("MULTI"), "OK");
        for line in lines {
            let line = parse(&words(line)).expect("a valid line");
            let queued = QueuedCommand {
                command: line.command,
                argument_count: line.argument_count,
                packed_arguments: line.packed_arguments,
            };
            harness.session.transaction.as_mut().expect("open").commands.push(queued);
        }
    }

    /// A shard that answers every command of a transaction with its code word and keys as the tokens.
    fn shard(request: &ShardRequest) -> Vec<u8> {
        match request.command {
            StoreCommand::InternalWatch => packed(|reply| {
                reply.array(request.arguments.len());
                request.arguments.iter().for_each(|key| reply.bulk(&[b"token of ", key.as_slice()].concat()));
            }),
            StoreCommand::InternalExec => {
                let text: Vec<String> =
                    request.arguments.iter().map(|argument| String::from_utf8_lossy(argument).into_owned()).collect();
                let mut rest = request.arguments.iter();
                let watched: usize = text[0].parse().expect("a count");
                let mut rest = rest.by_ref().skip(1 + 2 * watched);
                let mut replies = Vec::new();
                while let Some(code) = rest.next() {
                    let command = StoreCommand::from_code(u16::from_le_bytes([code[0], code[1]])).expect("a code");
                    let count = rest
                        .next()
                        .map(|count| u32::from_le_bytes(count.as_slice().try_into().expect("4 bytes")))
                        .expect("a count");
                    let arguments: Vec<String> = rest
                        .by_ref()
                        .take(count as usize)
                        .map(|argument| String::from_utf8_lossy(argument).into_owned())
                        .collect();
                    replies.push(format!("{} {}", command.spec().name, arguments.join(" ")));
                }
                packed(|reply| {
                    reply.array(replies.len());
                    replies.iter().for_each(|text| reply.bulk(text.as_bytes()));
                })
            }
            other => panic!("unexpected {other:?}"),
        }
    }

    #[test]
    fn errors_are_those_of_redis() {
        Harness::new().script(
            r#"
            > EXEC / < -ERR EXEC without MULTI
            > DISCARD / < -ERR DISCARD without MULTI
            > MULTI / < OK
            > MULTI / < -ERR MULTI calls can not be nested
            > WATCH a / < -ERR WATCH inside MULTI is not allowed
            > EXEC / < []
            > MULTI / < OK
            > DISCARD / < OK
            > UNWATCH / < OK
            "#,
        );
        let mut harness = Harness::new();
        harness.run("MULTI");
        harness.session.transaction.as_mut().expect("open").is_broken = true;
        assert_eq!(harness.run("EXEC"), "-EXECABORT Transaction discarded because of previous errors.");
        assert!(harness.session.transaction.is_none());
    }

    #[test]
    fn replies_of_store_and_gateway_come_in_their_order() {
        let mut harness = Harness::new();
        queue(
            &mut harness,
            &["PING", "SET {t}a 1", "ECHO hi", "GET {t}a", "SELECT 99", "OBJECT ENCODING {t}a", "CLIENT REPLY off"],
        );
        let reply = harness.run_with("EXEC", &mut shard);
        assert_eq!(
            reply,
            r#"[+PONG, "set {t}a 1", "hi", "get {t}a", -ERR DB index is out of range, "object|encoding {t}a", -ERR this command cannot run inside a transaction]"#
        );
        queue(&mut harness, &["PING", "TIME"]);
        assert!(harness.run("EXEC").starts_with("[+PONG, [\""), "no shard is asked");
    }

    #[test]
    fn keys_of_several_shards_are_refused_and_the_transaction_is_dropped() {
        let mut harness = Harness::new();
        for lines in [vec!["SET a 1", "SET b 1", "SET c 1"], vec!["DBSIZE"], vec!["SELECT users", "DBSIZE", "FLUSHALL"]]
        {
            queue(&mut harness, &lines);
            assert_eq!(harness.run("EXEC"), format!("-{}", error::CROSS_SHARD.text()), "{lines:?}");
            assert!(harness.session.transaction.is_none());
        }
        queue(&mut harness, &["SELECT users", "DBSIZE", "SET a 1", "SET b 1"]);
        let mut asked = Vec::new();
        harness.run_with("EXEC", &mut |request| {
            asked.push(request.target.keyspace);
            shard(request)
        });
        assert_eq!((asked, harness.session.keyspace), (vec![KeyspaceId(5)], KeyspaceId(5)));
    }

    #[test]
    fn watched_keys_travel_with_exec_and_a_stale_one_stops_it() {
        let mut harness = Harness::new();
        assert_eq!(harness.run_with("WATCH {t}a {t}b {t}a", &mut shard), "OK");
        assert_eq!(harness.run_with("WATCH {t}a", &mut |request| panic!("{request:?}")), "OK");
        assert_eq!(harness.session.watched.len(), 2);
        queue(&mut harness, &["SET {t}a 1"]);
        let reply = harness.run_with("EXEC", &mut |request| {
            assert_eq!(request.arguments[..5].join(b"|".as_slice()), b"2|{t}a|token of {t}a|{t}b|token of {t}b");
            packed(|reply| reply.null_array())
        });
        assert_eq!((reply.as_str(), harness.session.watched.len()), ("null array", 0));
        assert_eq!(harness.run_with("WATCH a b c", &mut shard), "OK");
        queue(&mut harness, &["PING"]);
        assert!(harness.run("EXEC").starts_with("-CROSSSLOT"));
    }

    #[test]
    fn a_shard_that_fails_fails_the_whole() {
        let mut harness = Harness::new();
        let mut down = |_: &ShardRequest| packed(|reply| reply.error("CLUSTERDOWN x"));
        assert_eq!(harness.run_with("WATCH a", &mut down), "-CLUSTERDOWN x");
        assert!(harness.session.watched.is_empty());
        queue(&mut harness, &["SET a 1", "PING"]);
        assert_eq!(harness.run_with("EXEC", &mut down), "-CLUSTERDOWN x");
        queue(&mut harness, &["SET a 1"]);
        assert!(harness.run_with("EXEC", &mut |_| b"*\x01\0\0\0".to_vec()).starts_with("-ERR the store answered"));
    }

    #[test]
    fn a_command_that_asks_shards_itself_has_its_turn() {
        let mut harness = Harness::new();
        queue(&mut harness, &["PING", "SCAN 0", "SET {t}a 1"]);
        let reply = harness.run_with("EXEC", &mut |request| match request.command {
            StoreCommand::InternalScan => packed(|reply| {
                reply.array(2);
                reply.integer(-1);
                reply.array(0);
            }),
            _ => shard(request),
        });
        assert_eq!(reply, r#"[+PONG, ["0", []], "set {t}a 1"]"#);
    }
}
