//! Decides what happens with one command: refused, queued, answered here, or sent to shards.

use crate::clients::PauseMode;
use crate::command::{self, Context, Next, ShardRequest};
use crate::connection::{Closing, Connection, Pending, PendingReply, State};
use crate::resp::scanner::CommandLine;
use crate::route::merge::Gather;
use crate::route::plan::{self, Plan};
use crate::routing::KeyspaceRoutes;
use crate::session::{QueuedCommand, ReplyMode, Session};
use crate::upstream::pool::{ALONE_BYTES, Request};
use std::rc::Rc;
use std::time::Instant;
use vasto_proto::batch::{
    Arguments, FLAG_AFTER_REFUSAL, FLAG_FROM_REPLICA, FLAG_LARGE_PERMIT, OperationHead, with_shard_count, write_bytes,
    write_operation,
};
use vasto_proto::command::table::{self, Command, GatewayCommand, StoreCommand};
use vasto_proto::command::{Args, CommandSpec, Flags, ReplyWriter, Route};
use vasto_proto::error;
use vasto_proto::id::ShardKey;

/// Bytes of a command's name and of its arguments that an error text quotes, as in Redis.
const QUOTED_BYTES_MAX: usize = 128;

/// Whether the command is dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Done,
    /// It must wait; the connection offers it again later.
    Blocked,
}

/// Deals with one command.
pub fn dispatch(connection: &Rc<Connection>, state: &mut State, line: CommandLine<'_>) -> Flow {
    let command = match resolve(line) {
        Ok(command) => command,
        Err(Refusal::Close) => {
            state.closing = Closing::Now;
            return Flow::Done;
        }
        Err(Refusal::Error { mut text, command }) => {
            if let Some(transaction) = &mut state.session.transaction {
                transaction.is_broken = true;
            }
            if let Some(command) = command {
                connection.shared().statistics.rejected(command);
                if command == Command::Gateway(GatewayCommand::Exec) {
                    // As Redis: an EXEC that cannot run ends its transaction.
                    state.session.transaction = None;
                    state.session.watched.clear();
                    state.session.client.set_queued_commands(None);
                    text =
                        [b"EXECABORT Transaction discarded because of: ", text.strip_prefix(b"ERR ").unwrap_or(&text)]
                            .concat();
                }
            }
            let is_muted = take_muted(state);
            connection.shared().statistics.error(&text);
            connection.owe_error(state, &text, is_muted);
            return Flow::Done;
        }
    };
    let spec = command.spec();
    if must_wait(connection, state, spec) {
        return Flow::Blocked;
    }
    if state.session.transaction.is_some() && !runs_inside_transaction(command) {
        queue(connection, state, command, line);
        return Flow::Done;
    }
    let flow = match command {
        Command::Gateway(gateway_command) => {
            run_here(connection, state, gateway_command, line);
            Flow::Done
        }
        Command::Store(store_command) => send(connection, state, store_command, line),
    };
    if flow == Flow::Done {
        state.blocked_since = None;
    }
    flow
}

enum Refusal {
    /// The text may quote what the client sent; `command` is the row that was found, if any.
    Error { text: Vec<u8>, command: Option<Command> },
    /// Without a word, as Redis does with what looks like HTTP.
    Close,
}

/// Finds the row of a command line and checks its length.
fn resolve(line: CommandLine<'_>) -> Result<Command, Refusal> {
    let name = line.word(0);
    let found = table::find(name).filter(|command| {
        let spec = command.spec();
        !spec.flags.contains(Flags::INTERNAL) && spec.name_words() == 1
    });
    let Some(mut command) = found else {
        if name.eq_ignore_ascii_case(b"post") || name.eq_ignore_ascii_case(b"host:") {
            return Err(Refusal::Close);
        }
        return Err(Refusal::Error { text: unknown_command(line), command: None });
    };
    let mut spec = command.spec();
    if spec.flags.contains(Flags::CONTAINER) && line.len() > 1 {
        let unknown = || Refusal::Error { text: unknown_subcommand(spec, line.word(1)), command: Some(command) };
        command = table::find_subcommand(spec, line.word(1)).ok_or_else(unknown)?;
        spec = command.spec();
    }
    if spec.accepts(line.len(), |place| line.word(place)) {
        return Ok(command);
    }
    let text = error::wrong_arity(spec.name).text().as_bytes().to_vec();
    Err(Refusal::Error { text, command: Some(command) })
}

/// What C's `%.*s` prints: up to the first NUL, at most `limit` bytes.
fn quoted(word: &[u8], limit: usize) -> &[u8] {
    let word = &word[..word.len().min(limit)];
    &word[..memchr::memchr(0, word).unwrap_or(word.len())]
}

fn unknown_command(line: CommandLine<'_>) -> Vec<u8> {
    let mut arguments: Vec<u8> = Vec::new();
    for word in line.words_from(1) {
        if arguments.len() >= QUOTED_BYTES_MAX {
            break;
        }
        let room = QUOTED_BYTES_MAX - arguments.len();
        arguments.push(b'\'');
        arguments.extend_from_slice(quoted(word, room));
        arguments.extend_from_slice(b"' ");
    }
    let mut text = b"ERR unknown command '".to_vec();
    text.extend_from_slice(quoted(line.word(0), QUOTED_BYTES_MAX));
    text.extend_from_slice(b"', with args beginning with: ");
    text.extend_from_slice(&arguments);
    text
}

fn unknown_subcommand(container: &CommandSpec, word: &[u8]) -> Vec<u8> {
    let mut text = b"ERR unknown subcommand '".to_vec();
    text.extend_from_slice(quoted(word, QUOTED_BYTES_MAX));
    text.extend_from_slice(format!("'. Try {} HELP.", container.name.to_uppercase()).as_bytes());
    text
}

/// Takes the reply mode of this command: SKIP holds for one.
fn take_muted(state: &mut State) -> bool {
    match state.session.reply_mode {
        ReplyMode::On => false,
        ReplyMode::Off => true,
        ReplyMode::SkipNext | ReplyMode::SkipThis => {
            state.session.reply_mode = ReplyMode::On;
            true
        }
    }
}

/// CLIENT PAUSE holds up what it names; the connection is looked at again every few milliseconds.
fn must_wait(connection: &Rc<Connection>, state: &mut State, spec: &CommandSpec) -> bool {
    let Some(pause) = connection.shared().clients.pause_state() else {
        return false;
    };
    let writes = spec.flags.contains(Flags::WRITE) || spec.name == "exec" && state.session.transaction.is_some();
    let is_exempt = spec.name.starts_with("client|");
    if is_exempt || pause.mode == PauseMode::Write && !writes {
        return false;
    }
    connection.worker().check_later(connection);
    true
}

/// Commands that MULTI does not queue.
fn runs_inside_transaction(command: Command) -> bool {
    use GatewayCommand::{Discard, Exec, Multi, Quit, Reset, Watch};
    matches!(command, Command::Gateway(Exec | Discard | Multi | Watch | Quit | Reset))
}

fn queue(connection: &Rc<Connection>, state: &mut State, command: Command, line: CommandLine<'_>) {
    let is_muted = take_muted(state);
    let protocol = state.session.protocol;
    let Some(transaction) = &mut state.session.transaction else { return };
    let mut packed = Vec::new();
    if command.spec().flags.contains(Flags::NO_MULTI) {
        transaction.is_broken = true;
        connection.shared().statistics.rejected(command);
        ReplyWriter::new(&mut packed).error("ERR Command not allowed inside a transaction");
    } else {
        let (packed_arguments, argument_count) = pack_arguments(command.spec(), line);
        transaction.commands.push(QueuedCommand { command, argument_count, packed_arguments });
        state.session.client.set_queued_commands(Some(transaction.commands.len()));
        ReplyWriter::new(&mut packed).simple("QUEUED");
    }
    connection.owe_packed(state, &packed, is_muted, protocol);
}

fn pack_arguments(spec: &CommandSpec, line: CommandLine<'_>) -> (Vec<u8>, u32) {
    let mut packed = Vec::new();
    line.words_from(spec.name_words()).for_each(|word| write_bytes(&mut packed, word));
    (packed, line.len().saturating_sub(spec.name_words()) as u32)
}

fn run_here(connection: &Rc<Connection>, state: &mut State, command: GatewayCommand, line: CommandLine<'_>) {
    let spec = command.spec();
    let row = Command::Gateway(command);
    state.session.client.set_last_command(row);
    let started = connection.worker().now();
    let skips = matches!(state.session.reply_mode, ReplyMode::SkipNext);
    if skips {
        state.session.reply_mode = ReplyMode::On;
    }
    let (packed_arguments, count) = pack_arguments(spec, line);
    let arguments = Arguments::parse(&packed_arguments, count).expect("packed a moment ago");
    let routing = connection.worker().routing();
    let mut packed = Vec::new();
    let mut context =
        Context { session: &mut state.session, shared: connection.shared(), routing: &routing, reply: &mut packed };
    let next = command::handler(command)(&mut context, Args::new(arguments));
    let is_muted = skips || state.session.reply_mode == ReplyMode::Off;
    let protocol = state.session.protocol;
    let words = || line.words_from(0).collect::<Vec<_>>();
    match next {
        Ok(Next::Replied) => {
            connection.account(&state.session, row, started, &packed, words);
            connection.owe_packed(state, &packed, is_muted, protocol);
        }
        Ok(Next::RepliedThenClose) => {
            connection.account(&state.session, row, started, &packed, words);
            connection.owe_packed(state, &packed, is_muted, protocol);
            state.closing = Closing::AfterReplies;
        }
        Ok(Next::Silent) => connection.account(&state.session, row, started, &[], words),
        Ok(Next::Ask(ask)) => connection.start_ask(state, row, ask, is_muted),
        Ok(Next::AskMaster(change, ask)) => connection.ask_master(state, row, change, ask, is_muted),
        Ok(Next::RepliedAfter(after)) => connection.owe_later(state, row, packed, is_muted, after),
        Ok(Next::Shutdown) => {
            connection.shared().shutdown.cancel();
            state.closing = Closing::AfterReplies;
        }
        Err(error) => {
            packed.clear();
            ReplyWriter::new(&mut packed).error(error.text());
            connection.account(&state.session, row, started, &packed, words);
            connection.owe_packed(state, &packed, is_muted, protocol);
        }
    }
}

/// The keyspace of the connection; while there is none the command waits, within the deadline.
fn routes(connection: &Rc<Connection>, state: &mut State) -> Result<Rc<KeyspaceRoutes>, Flow> {
    let routing = connection.worker().routing();
    if let Some(keyspace) = routing.keyspace(state.session.keyspace) {
        return Ok(Rc::clone(keyspace));
    }
    if routing.snapshot.dropped.contains(&state.session.keyspace) {
        // It never comes back: there is nothing to wait for.
        state.blocked_since = None;
        let is_muted = take_muted(state);
        connection.owe_error(state, error::KEYSPACE_DROPPED.text().as_bytes(), is_muted);
        return Err(Flow::Done);
    }
    let since = *state.blocked_since.get_or_insert_with(Instant::now);
    if since.elapsed() < connection.shared().settings.request_deadline() {
        connection.worker().check_later(connection);
        return Err(Flow::Blocked);
    }
    state.blocked_since = None;
    let is_muted = take_muted(state);
    connection.owe_error(state, error::NO_KEYSPACE.text().as_bytes(), is_muted);
    Err(Flow::Done)
}

fn send(connection: &Rc<Connection>, state: &mut State, command: StoreCommand, line: CommandLine<'_>) -> Flow {
    let spec = command.spec();
    let keyspace = match routes(connection, state) {
        Ok(keyspace) => keyspace,
        Err(flow) => return flow,
    };
    let worker = connection.worker();
    let is_one_simple_key = spec.route == Route::OneShard && spec.keys.last == spec.keys.first;
    let plan = if is_one_simple_key {
        Ok(Plan::One(keyspace.shard_key(keyspace.shard_of_key(line.word(spec.keys.first as usize)))))
    } else {
        plan::plan(spec, &line, &keyspace, &worker.routing())
    };
    let row = Command::Store(command);
    let started = worker.now();
    let protocol = state.session.protocol;
    match plan {
        Ok(Plan::One(target)) => {
            let bytes: usize = line.words_from(1).map(|word| word.len() + 4).sum();
            let mut sender = match Sender::to(connection, &state.session, command, target, bytes) {
                Ok(sender) => sender,
                Err(no_way) => return wait_for_way(connection, state, no_way),
            };
            let is_muted = take_muted(state);
            state.session.client.set_last_command(row);
            sender.request.sequence = state.next_sequence();
            state.ring.push_back(Pending { reply: PendingReply::Waiting, protocol, is_muted, command: row, started });
            sender.send(connection, state, line.words_from(spec.name_words()), bytes);
        }
        Ok(Plan::Many { parts, merge }) => {
            let mut senders = Vec::with_capacity(parts.len());
            for part in &parts {
                match Sender::to(connection, &state.session, command, part.target, 0) {
                    Ok(sender) => senders.push(sender),
                    Err(no_way) => return wait_for_way(connection, state, no_way),
                }
            }
            let is_muted = take_muted(state);
            state.session.client.set_last_command(row);
            let sequence = state.next_sequence();
            let groups = parts.iter().map(|part| part.groups.clone().unwrap_or_default()).collect();
            let reply = PendingReply::Gather(Box::new(Gather::new(merge, groups)));
            state.ring.push_back(Pending { reply, protocol, is_muted, command: row, started });
            for (index, (part, mut sender)) in parts.iter().zip(senders).enumerate() {
                sender.request.sequence = sequence;
                sender.request.part = index as u32;
                match &part.groups {
                    None => {
                        // Refused by some shards it may have to run again in all: nothing may have run behind it.
                        state.is_barred = true;
                        let words = line.words_from(spec.name_words());
                        let bytes = line.words_from(1).map(|word| word.len() + 4).sum();
                        sender.send(connection, state, words, bytes);
                    }
                    Some(groups) => {
                        let (first, step) = (spec.keys.first as usize, spec.keys.step as usize);
                        let words = || {
                            groups.iter().flat_map(move |group| {
                                (0..step).map(move |offset| line.word(first + *group as usize * step + offset))
                            })
                        };
                        let bytes = words().map(|word| word.len() + 4).sum();
                        sender.send(connection, state, words(), bytes);
                    }
                }
            }
        }
        Err(error) => {
            let is_muted = take_muted(state);
            let mut packed = Vec::new();
            ReplyWriter::new(&mut packed).error(error.text());
            connection.account(&state.session, row, started, &packed, || line.words_from(0).collect());
            connection.owe_packed(state, &packed, is_muted, protocol);
        }
    }
    Flow::Done
}

/// Why an operation cannot be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoWay {
    /// The link is full; the connection is woken when it has room.
    Full,
    /// The shard is between two primaries, or gone.
    NoPrimary(ShardKey),
}

/// The command waits: for room, or within the deadline for a primary.
fn wait_for_way(connection: &Rc<Connection>, state: &mut State, no_way: NoWay) -> Flow {
    let NoWay::NoPrimary(shard) = no_way else {
        return Flow::Blocked;
    };
    let since = *state.blocked_since.get_or_insert_with(Instant::now);
    if since.elapsed() < connection.shared().settings.request_deadline() {
        connection.worker().check_later(connection);
        return Flow::Blocked;
    }
    state.blocked_since = None;
    let is_muted = take_muted(state);
    let error = error::shard_unreachable(&error::vacant(shard));
    connection.shared().statistics.error(error.text().as_bytes());
    connection.owe_error(state, error.text().as_bytes(), is_muted);
    Flow::Done
}

/// One operation on its way to its link.
struct Sender {
    link: Rc<crate::upstream::pool::Link>,
    request: Request,
}

impl Sender {
    fn to(
        connection: &Rc<Connection>,
        session: &Session,
        command: StoreCommand,
        target: ShardKey,
        bytes: usize,
    ) -> Result<Self, NoWay> {
        let worker = connection.worker();
        let routing = worker.routing();
        let keyspace = routing.keyspace(target.keyspace).ok_or(NoWay::NoPrimary(target))?;
        let is_read = command.spec().flags.contains(Flags::READONLY);
        let mut flags = if bytes > vasto_proto::net::LARGE_VALUE_BYTES { FLAG_LARGE_PERMIT } else { 0 };
        let replica = if is_read && session.reads_from_replicas {
            let answers = |store| routing.is_up(store) && !worker.link(store).is_down();
            keyspace.replica(target.shard, connection.id(), answers)
        } else {
            None
        };
        if replica.is_some() {
            // A refusal is answered by the primary: the replica has nothing to hold back the next read for.
            flags |= FLAG_FROM_REPLICA | FLAG_AFTER_REFUSAL;
        }
        let (store, epoch) = replica.or_else(|| keyspace.owner(target.shard)).ok_or(NoWay::NoPrimary(target))?;
        let link = worker.link(store);
        if link.holds_up(connection) {
            return Err(NoWay::Full);
        }
        let flags = with_shard_count(flags, keyspace.shard_count());
        let request = Request { target, epoch, command: command.code(), flags, is_read, sequence: 0, part: 0 };
        Ok(Self { link, request })
    }

    fn send<'a>(
        mut self,
        connection: &Rc<Connection>,
        state: &mut State,
        words: impl Iterator<Item = &'a [u8]>,
        bytes: usize,
    ) {
        if bytes > ALONE_BYTES {
            // It travels beside the batches: nothing of this connection may overtake it.
            state.is_barred = true;
        }
        if state.has_permit() {
            self.request.flags |= FLAG_LARGE_PERMIT;
        }
        if !self.request.is_read {
            state.session.written.note(self.request.target, self.request.shard_count());
        }
        if self.request.flags & FLAG_FROM_REPLICA == 0 {
            self.request.flags |= state.after_refusal(self.request.target);
        }
        state.outstanding += 1;
        self.link.push(connection, self.request, words, bytes);
    }
}

/// Sends the operations of one round of a command.
pub fn send_requests(connection: &Rc<Connection>, state: &mut State, sequence: u64, requests: Vec<ShardRequest>) {
    let worker = connection.worker();
    let routing = worker.routing();
    let must_wait = state.must_wait_for_earlier();
    for (part, request) in requests.iter().enumerate() {
        let target = request.target;
        let keyspace = routing.keyspace(target.keyspace);
        let owner = keyspace.and_then(|keyspace| keyspace.owner(target.shard));
        let shard_count = keyspace.map_or(0, |keyspace| keyspace.shard_count());
        let flags = if state.has_permit() { FLAG_LARGE_PERMIT } else { 0 };
        let mut operation = Request {
            target,
            epoch: owner.map(|(_, epoch)| epoch).unwrap_or_default(),
            command: request.command.code(),
            flags: with_shard_count(flags, shard_count),
            is_read: request.command.spec().flags.contains(Flags::READONLY),
            sequence,
            part: part as u32,
        };
        let arguments = || request.arguments.iter().map(Vec::as_slice);
        if request.command == StoreCommand::InternalExec {
            state.session.written.note(target, shard_count);
        }
        let Some((store, _)) = owner.filter(|_| !must_wait) else {
            let mut packed = Vec::new();
            let head = OperationHead {
                id: 0,
                connection: connection.id(),
                target,
                epoch: operation.epoch,
                command: operation.command,
                flags: operation.flags,
            };
            write_operation(&mut packed, &head, arguments());
            connection.park(state, operation, packed);
            continue;
        };
        let bytes = arguments().map(|argument| argument.len() + 4).sum();
        operation.flags |= state.after_refusal(target);
        state.outstanding += 1;
        worker.link(store).push(connection, operation, arguments(), bytes);
    }
}
