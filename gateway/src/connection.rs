//! One client connection: reads and finds commands, keeps the replies in the order of the requests, writes them.
//!
//! The connection belongs to its worker's thread. Its task only waits for the socket; answers of stores are put into the ring, and the ring
//! into the socket, by whoever brings them: waking the task for each would cost more than the work.

mod refusals;

use crate::command::{Ask, Context, Round};
use crate::dispatch::{self, Flow};
use crate::resp::encode;
use crate::resp::scanner::{Scan, Scanner};
use crate::route::merge::Gather;
use crate::routing::Routing;
use crate::session::{Protocol, Session};
use crate::shared::Shared;
use crate::upstream::masters::Change;
use crate::upstream::pool::{Refused, Request, packed_arguments};
use crate::worker::Worker;
use futures_util::FutureExt;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use vasto_proto::batch::FLAG_AFTER_REFUSAL;
use vasto_proto::command::ReplyWriter;
use vasto_proto::command::table::Command;
use vasto_proto::error::{self, CommandError};
use vasto_proto::id::ShardKey;
use vasto_proto::net::LARGE_VALUE_BYTES;

/// Bytes read at once into a buffer that all connections of a worker share: an idle connection keeps none.
pub const READ_BYTES: usize = 64 << 10;
/// Least room that is made for the rest of a command that came in part.
const REST_BYTES_MIN: usize = 16 << 10;
/// Replies that a connection may be owed at once is this divided by what its replies weigh on average …
const WINDOW_BYTES: usize = 4 << 20;
/// … and at least 1, at most this, and so many before the first reply tells what they weigh.
const WINDOW_MAX: usize = 4096;
const WINDOW_FIRST: usize = 64;
/// A command that came in part and does not go on for this long closes the connection.
const REQUEST_STALL: Duration = Duration::from_secs(60);

/// A client's socket.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

macro_rules! on_socket {
    ($self:expr, $socket:ident => $call:expr) => {
        match $self {
            Socket::Tcp($socket) => $call,
            Socket::Unix($socket) => $call,
        }
    };
}

impl Socket {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        on_socket!(self, socket => socket.try_write(bytes))
    }

    /// Whether the client has closed its side, without reading what it sent before.
    fn is_read_closed(&self) -> bool {
        let ready = on_socket!(self, socket => socket.ready(Interest::READABLE).now_or_never());
        ready.and_then(Result::ok).is_some_and(|ready| ready.is_read_closed())
    }

    /// Tells the runtime that everything was read, which a short read shows without asking the kernel again.
    fn note_drained(&self) {
        let drained = || Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock));
        let _ = on_socket!(self, socket => socket.try_io(Interest::READABLE, drained));
    }
}

/// What a client is owed for one command.
#[derive(Debug)]
pub struct Pending {
    pub reply: PendingReply,
    pub protocol: Protocol,
    /// CLIENT REPLY OFF or SKIP: the reply is dropped.
    pub is_muted: bool,
    pub command: Command,
    pub started: Instant,
}

#[derive(Debug)]
pub enum PendingReply {
    /// One shard answers.
    Waiting,
    /// Written, but not yet its turn.
    Ready(Vec<u8>),
    /// Several shards answer.
    Gather(Box<Gather>),
    /// A command in rounds.
    Ask(Box<AskInProgress>),
}

#[derive(Debug)]
pub struct AskInProgress {
    pub ask: Box<dyn Ask>,
    pub answers: Vec<Option<Vec<u8>>>,
    pub left: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    No,
    /// When all replies have left.
    AfterReplies,
    Now,
}

/// What the connection knows; borrowed for one turn at a time.
#[derive(Debug)]
pub struct State {
    pub session: Session,
    scanner: Scanner,
    /// Bytes that are not run yet; begins at a command.
    input: Vec<u8>,
    input_changed: Instant,
    output: Vec<u8>,
    output_at: usize,
    /// With more replies than this waiting for its client the connection runs no further command; the setting, looked up once a second.
    output_bytes_max: usize,
    /// Set while the socket takes nothing more.
    output_blocked: Option<Instant>,
    pub ring: VecDeque<Pending>,
    first_sequence: u64,
    /// Operations in flight.
    pub outstanding: usize,
    refused: Vec<Refused>,
    refused_since: Option<Instant>,
    /// Shards whose stores refuse what comes next of this connection, until it says that it knows of their refusals.
    refusing: Vec<ShardKey>,
    /// What is under way was sent by another topology, under which it may have had another way: later commands wait until it has come back.
    keeps_order: bool,
    /// Later commands wait until the ring is empty.
    pub is_barred: bool,
    pub closing: Closing,
    saw_end: bool,
    /// The command at the head of the input cannot run yet; nothing more is read until it is offered again.
    is_blocked: bool,
    /// The task does not wait for input, since no further command may run.
    stopped_reading: bool,
    /// Since when a command waits for a topology or the end of a pause.
    pub blocked_since: Option<Instant>,
    is_waiting_for_permit: bool,
    permit: Option<OwnedSemaphorePermit>,
    reply_bytes_average: usize,
    window: usize,
}

impl State {
    fn may_run(&self) -> bool {
        self.closing == Closing::No
            && !self.is_barred
            && !self.is_waiting_for_permit
            && !self.must_wait_for_earlier()
            && self.ring.len() < self.window
            && self.output.len() - self.output_at < self.output_bytes_max
    }

    /// What was sent before may still run behind what would be sent now.
    pub fn must_wait_for_earlier(&self) -> bool {
        self.keeps_order || !self.refused.is_empty()
    }

    /// The flag of the next operation for a shard: set if its store waits for a sign that its refusals are known. All that it has refused
    /// has come back, since nothing is sent before that.
    pub fn after_refusal(&mut self, shard: ShardKey) -> u32 {
        if self.refusing.is_empty() {
            return 0;
        }
        match self.refusing.iter().position(|known| *known == shard) {
            Some(place) => {
                self.refusing.swap_remove(place);
                FLAG_AFTER_REFUSAL
            }
            None => 0,
        }
    }

    /// An operation is no longer under way.
    fn note_return(&mut self) {
        self.outstanding -= 1;
        if self.outstanding == 0 {
            self.keeps_order = false;
        }
    }

    pub fn next_sequence(&self) -> u64 {
        self.first_sequence + self.ring.len() as u64
    }

    /// Holds the process-wide permit for a value above the large-value threshold.
    pub fn has_permit(&self) -> bool {
        self.permit.is_some()
    }

    /// Owes nothing, holds nothing, waits for nothing: a drained gateway may close it.
    fn is_quiet(&self) -> bool {
        self.ring.is_empty() && self.output.len() == self.output_at
    }

    fn note_reply_bytes(&mut self, bytes: usize) {
        // An average over about eight replies; it follows a change of sizes within one window. The first one counts whole.
        self.reply_bytes_average =
            if self.reply_bytes_average == 0 { bytes } else { (self.reply_bytes_average * 7 + bytes) / 8 };
        self.window = (WINDOW_BYTES / self.reply_bytes_average.max(1)).clamp(1, WINDOW_MAX);
    }
}

/// One client connection.
#[derive(Debug)]
pub struct Connection {
    id: u32,
    socket: Socket,
    worker: Rc<Worker>,
    state: RefCell<State>,
    waker: RefCell<Option<Waker>>,
    is_touched: Cell<bool>,
    is_to_be_checked: Cell<bool>,
    is_closed: Cell<bool>,
}

impl Connection {
    pub fn new(id: u32, socket: Socket, worker: Rc<Worker>, session: Session) -> Self {
        let state = State {
            session,
            scanner: Scanner::default(),
            input: Vec::new(),
            input_changed: Instant::now(),
            output: Vec::new(),
            output_at: 0,
            output_bytes_max: worker.shared().settings.output_buffer_limit(),
            output_blocked: None,
            ring: VecDeque::new(),
            first_sequence: 0,
            outstanding: 0,
            refused: Vec::new(),
            refused_since: None,
            refusing: Vec::new(),
            keeps_order: false,
            is_barred: false,
            closing: Closing::No,
            saw_end: false,
            is_blocked: false,
            stopped_reading: false,
            blocked_since: None,
            is_waiting_for_permit: false,
            permit: None,
            reply_bytes_average: 0,
            window: WINDOW_FIRST,
        };
        Self {
            id,
            socket,
            worker,
            state: RefCell::new(state),
            waker: RefCell::default(),
            is_touched: Cell::new(false),
            is_to_be_checked: Cell::new(false),
            is_closed: Cell::new(false),
        }
    }

    /// Unique among the open connections of its worker.
    pub fn id(&self) -> u32 {
        self.id
    }

    pub fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    pub fn shared(&self) -> &Shared {
        self.worker.shared()
    }

    /// Lets the connection's task look again.
    pub fn wake(&self) {
        if let Some(waker) = self.waker.borrow().as_ref() {
            waker.wake_by_ref();
        }
    }

    /// True for the first answer of a batch: the caller flushes each connection once.
    pub fn touch(&self) -> bool {
        !self.is_touched.replace(true)
    }

    /// Serves the client until either side closes.
    pub async fn run(self: Rc<Self>) {
        std::future::poll_fn(|context| {
            let is_known = self.waker.borrow().as_ref().is_some_and(|waker| waker.will_wake(context.waker()));
            if !is_known {
                *self.waker.borrow_mut() = Some(context.waker().clone());
                self.state.borrow().session.client.register_waker(context.waker());
            }
            self.poll(context)
        })
        .await;
        self.is_closed.set(true);
        let state = &mut *self.state.borrow_mut();
        state.ring.clear();
        state.refused.clear();
        state.output = Vec::new();
        state.input = Vec::new();
        state.permit = None;
    }

    fn poll(self: &Rc<Self>, context: &mut std::task::Context<'_>) -> Poll<()> {
        let state = &mut *self.state.borrow_mut();
        if state.session.client.is_killed() {
            state.closing = Closing::Now;
        }
        if state.output_blocked.is_some() {
            let ready = on_socket!(&self.socket, socket => socket.poll_write_ready(context));
            match ready {
                Poll::Ready(Ok(())) => self.flush(state),
                Poll::Ready(Err(_)) => state.closing = Closing::Now,
                Poll::Pending => {}
            }
        }
        // What could not run when it was read: the window was full, a barrier, a pause.
        if !state.input.is_empty() && state.may_run() {
            self.run_input(state);
        }
        self.read(state, context);
        self.flush(state);
        Self::release_permit(state);
        let is_over = match state.closing {
            Closing::Now => true,
            Closing::AfterReplies => state.is_quiet(),
            Closing::No => state.saw_end && state.is_quiet() && state.may_run() && !state.is_blocked,
        };
        if is_over {
            return Poll::Ready(());
        }
        if state.output_blocked.is_some() {
            // Registered anew, since a write since then may have found the socket full.
            match on_socket!(&self.socket, socket => socket.poll_write_ready(context)) {
                Poll::Ready(Ok(())) => context.waker().wake_by_ref(),
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    /// Reads what is there, at most one buffer a turn so that connections take turns, and runs it.
    fn read(self: &Rc<Self>, state: &mut State, context: &mut std::task::Context<'_>) {
        loop {
            state.stopped_reading = !state.may_run();
            if state.saw_end || state.is_blocked || state.stopped_reading {
                return;
            }
            let ready = on_socket!(&self.socket, socket => socket.poll_read_ready(context));
            match ready {
                Poll::Pending => return,
                Poll::Ready(Err(_)) => {
                    state.closing = Closing::Now;
                    return;
                }
                Poll::Ready(Ok(())) => self.worker.read_clock(),
            }
            let (result, room) = if state.input.is_empty() {
                let mut scratch = self.worker.read_buffer();
                let result = on_socket!(&self.socket, socket => socket.try_read(&mut scratch));
                if let Ok(count) = result {
                    let consumed = self.run_bytes(state, &scratch[..count]);
                    state.input.extend_from_slice(&scratch[consumed..count]);
                }
                (result, READ_BYTES)
            } else {
                let wanted = state.scanner.bulk_under_way().unwrap_or(0).saturating_sub(state.input.len());
                let room = wanted.min(state.input.len()).max(REST_BYTES_MIN);
                state.input.reserve(room);
                let room = state.input.capacity() - state.input.len();
                let result = on_socket!(&self.socket, socket => socket.try_read_buf(&mut state.input));
                if result.is_ok() {
                    self.run_input(state);
                }
                (result, room)
            };
            match result {
                Ok(0) => state.saw_end = true,
                Ok(count) => {
                    let shared = self.shared();
                    shared.statistics.input_bytes(count);
                    state.input_changed = self.worker.now();
                    state.session.client.touch(self.worker.now_ms());
                    if state.input.len() > shared.settings.client_query_buffer_limit() {
                        state.closing = Closing::Now;
                    }
                    if count < room {
                        self.socket.note_drained();
                    } else {
                        // More may be waiting, but others come first.
                        context.waker().wake_by_ref();
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => state.closing = Closing::Now,
            }
        }
    }

    fn run_input(self: &Rc<Self>, state: &mut State) {
        let mut input = std::mem::take(&mut state.input);
        let consumed = self.run_bytes(state, &input);
        if consumed == input.len() {
            // A buffer that held one large value is not kept for small commands.
            if input.capacity() <= READ_BYTES {
                input.clear();
                state.input = input;
            }
            if state.input.is_empty() && state.ring.is_empty() {
                state.input = Vec::new();
            }
        } else {
            input.drain(..consumed);
            state.input = input;
        }
    }

    /// Runs the commands in `bytes` as far as it may, and returns how many bytes they were.
    fn run_bytes(self: &Rc<Self>, state: &mut State, bytes: &[u8]) -> usize {
        let mut consumed = 0;
        let bulk_bytes_max = self.shared().settings.proto_max_bulk_len();
        let mut scanner = std::mem::take(&mut state.scanner);
        state.is_blocked = false;
        while state.may_run() {
            match scanner.scan(&bytes[consumed..], bulk_bytes_max) {
                Scan::Incomplete => {
                    if scanner.bulk_under_way().is_some_and(|bulk| bulk > LARGE_VALUE_BYTES) && state.permit.is_none() {
                        self.wait_for_permit(state);
                    }
                    break;
                }
                Scan::Skip { consumed: skipped } => consumed += skipped,
                Scan::Ready { consumed: length } => {
                    match dispatch::dispatch(self, state, scanner.line(&bytes[consumed..])) {
                        Flow::Done => consumed += length,
                        Flow::Blocked => {
                            state.is_blocked = true;
                            break;
                        }
                    }
                }
                Scan::Invalid(text) => {
                    let mut reply = Vec::new();
                    encode::error(format!("ERR Protocol error: {text}").as_bytes(), &mut reply);
                    self.owe_written(state, reply);
                    self.shared().statistics.error(b"ERR");
                    state.closing = Closing::AfterReplies;
                    consumed = bytes.len();
                }
            }
        }
        state.scanner = scanner;
        consumed
    }

    /// A reply that is already RESP, outside any command.
    fn owe_written(&self, state: &mut State, reply: Vec<u8>) {
        if state.ring.is_empty() {
            self.output_buffer(state).extend_from_slice(&reply);
        } else {
            let protocol = state.session.protocol;
            let command = Command::Gateway(vasto_proto::command::table::GatewayCommand::Ping);
            let pending = Pending {
                reply: PendingReply::Ready(reply),
                protocol,
                is_muted: false,
                command,
                started: self.worker.now(),
            };
            state.ring.push_back(pending);
        }
    }

    /// Puts a packed reply in its place behind all that is owed.
    pub fn owe_packed(&self, state: &mut State, packed: &[u8], is_muted: bool, protocol: Protocol) {
        if is_muted {
            return;
        }
        if state.ring.is_empty() {
            encode::encode(packed, protocol, self.output_buffer(state));
        } else {
            let mut reply = Vec::new();
            encode::encode(packed, protocol, &mut reply);
            self.owe_written(state, reply);
        }
    }

    /// As [`Connection::owe_packed`] for an error whose text may hold any bytes.
    pub fn owe_error(&self, state: &mut State, text: &[u8], is_muted: bool) {
        if !is_muted {
            let mut reply = Vec::with_capacity(text.len() + 3);
            encode::error(text, &mut reply);
            self.owe_written(state, reply);
        }
    }

    fn output_buffer<'a>(&self, state: &'a mut State) -> &'a mut Vec<u8> {
        if state.output.capacity() == 0 {
            state.output = self.worker.take_buffer();
        }
        &mut state.output
    }

    /// The packed reply of a request's part has come.
    pub fn answered(self: &Rc<Self>, request: &Request, body: &[u8], operation: &[u8]) {
        if self.is_closed.get() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        state.note_return();
        let index = (request.sequence - state.first_sequence) as usize;
        match &mut state.ring[index].reply {
            PendingReply::Waiting => self.settle(state, index, body, || {
                let name = vasto_proto::command::table::StoreCommand::from_code(request.command)
                    .map_or("", |command| command.spec().name);
                let mut words: Vec<&[u8]> = name.split('|').map(str::as_bytes).collect();
                words.extend(packed_arguments(operation));
                words
            }),
            PendingReply::Gather(gather) => {
                if gather.put(request.part as usize, body) {
                    let mut merged = Vec::new();
                    gather.finish(fastrand::usize(..), &mut merged);
                    self.settle_named(state, index, &merged);
                }
            }
            PendingReply::Ask(progress) => {
                if progress.answers[request.part as usize].replace(body.to_vec()).is_none() {
                    progress.left -= 1;
                }
                if progress.left == 0 {
                    self.next_round(state, index);
                }
            }
            PendingReply::Ready(_) => unreachable!("a reply is settled once"),
        }
        self.resend_refused(state);
    }

    /// Whether the request was executed is not known.
    pub fn unknown(self: &Rc<Self>, request: &Request, error: &CommandError) {
        let mut packed = Vec::new();
        ReplyWriter::new(&mut packed).error(error.text());
        self.answered(request, &packed, &[]);
    }

    /// Nothing came of the request and its time is over.
    pub fn failed(self: &Rc<Self>, request: &Request, reason: &str) {
        let mut packed = Vec::new();
        ReplyWriter::new(&mut packed).error(error::shard_unreachable(reason).text());
        self.answered(request, &packed, &[]);
    }

    /// Something of this connection is under way by another topology than the newest, so what comes next must not have another way yet.
    pub fn keep_order(&self) {
        self.state.borrow_mut().keeps_order = true;
    }

    /// True for the first who asks until the next [`Connection::check`]: thousands may wait for one primary.
    pub fn is_first_to_ask_for_check(&self) -> bool {
        !self.is_to_be_checked.replace(true)
    }

    /// Called by the worker every few milliseconds while the connection waits for something that gives no sign.
    pub fn check(self: &Rc<Self>) {
        self.is_to_be_checked.set(false);
        if self.is_closed.get() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        if state.outstanding == 0 && !state.refused.is_empty() && !state.is_waiting_for_permit {
            self.send_refused_again(state);
            self.flush(state);
        }
        self.wake();
    }

    fn settle_failed(self: &Rc<Self>, state: &mut State, request: &Request, packed: &[u8]) {
        let index = (request.sequence - state.first_sequence) as usize;
        let is_complete = match &mut state.ring[index].reply {
            PendingReply::Waiting => Some(packed.to_vec()),
            PendingReply::Gather(gather) => gather.put(request.part as usize, packed).then(|| {
                let mut merged = Vec::new();
                gather.finish(0, &mut merged);
                merged
            }),
            PendingReply::Ask(progress) => {
                if progress.answers[request.part as usize].replace(packed.to_vec()).is_none() {
                    progress.left -= 1;
                }
                if progress.left == 0 {
                    self.next_round(state, index);
                }
                None
            }
            PendingReply::Ready(_) => None,
        };
        if let Some(reply) = is_complete {
            self.settle_named(state, index, &reply);
        }
    }

    fn settle_named(&self, state: &mut State, index: usize, packed: &[u8]) {
        let name = state.ring[index].command.spec().name;
        self.settle(state, index, packed, || name.split('|').map(str::as_bytes).collect());
    }

    /// The reply at `index` of the ring is known.
    fn settle<'a>(&self, state: &mut State, index: usize, packed: &[u8], words: impl FnOnce() -> Vec<&'a [u8]>) {
        state.note_reply_bytes(packed.len());
        let pending = &state.ring[index];
        self.account(&state.session, pending.command, pending.started, packed, words);
        if index > 0 {
            let pending = &mut state.ring[index];
            let mut reply = Vec::new();
            if !pending.is_muted {
                encode::encode(packed, pending.protocol, &mut reply);
            }
            pending.reply = PendingReply::Ready(reply);
            return;
        }
        let (protocol, is_muted) = (pending.protocol, pending.is_muted);
        if !is_muted {
            encode::encode(packed, protocol, self.output_buffer(state));
        }
        state.ring.pop_front();
        state.first_sequence += 1;
        while let Some(Pending { reply: PendingReply::Ready(reply), .. }) = state.ring.front() {
            if state.output.capacity() == 0 {
                state.output = self.worker.take_buffer();
            }
            state.output.extend_from_slice(reply);
            state.ring.pop_front();
            state.first_sequence += 1;
        }
        if state.ring.is_empty() {
            state.is_barred = false;
            if state.refused.is_empty() {
                state.refused_since = None;
            }
        }
    }

    /// Counts a command that is done.
    pub fn account<'a>(
        &self,
        session: &Session,
        command: Command,
        started: Instant,
        packed: &[u8],
        words: impl FnOnce() -> Vec<&'a [u8]>,
    ) {
        let shared = self.shared();
        let duration_us = self.worker.now().saturating_duration_since(started).as_micros() as u64;
        let is_error = packed.first() == Some(&b'-');
        shared.statistics.command(command, duration_us, is_error);
        if is_error {
            shared.statistics.error(packed.get(5..).unwrap_or_default());
        }
        shared.slowlog.observe(&shared.settings, duration_us, words, &session.client);
    }

    /// Starts a command in rounds, whose place in the ring is the last.
    pub fn start_ask(self: &Rc<Self>, state: &mut State, command: Command, mut ask: Box<dyn Ask>, is_muted: bool) {
        let routing = self.worker.routing();
        let (protocol, started) = (state.session.protocol, self.worker.now());
        let mut packed = Vec::new();
        let context = &mut self.context(&mut state.session, &routing, &mut packed);
        match ask.start(context) {
            Ok(requests) => {
                let progress = AskInProgress { ask, answers: vec![None; requests.len()], left: requests.len() };
                let reply = PendingReply::Ask(Box::new(progress));
                let sequence = state.next_sequence();
                state.ring.push_back(Pending { reply, protocol, is_muted, command, started });
                state.is_barred = true;
                if requests.is_empty() {
                    self.next_round(state, (sequence - state.first_sequence) as usize);
                } else {
                    dispatch::send_requests(self, state, sequence, requests);
                }
            }
            Err(error) => {
                ReplyWriter::new(&mut packed).error(error.text());
                self.account(&state.session, command, started, &packed, Vec::new);
                self.owe_packed(state, &packed, is_muted, protocol);
            }
        }
    }

    /// Starts a command in rounds with a question to the master; later commands wait.
    pub fn ask_master(
        self: &Rc<Self>,
        state: &mut State,
        command: Command,
        change: Change,
        ask: Box<dyn Ask>,
        is_muted: bool,
    ) {
        let (protocol, started) = (state.session.protocol, self.worker.now());
        let sequence = state.next_sequence();
        let reply = PendingReply::Ask(Box::new(AskInProgress { ask, answers: vec![None], left: 1 }));
        state.ring.push_back(Pending { reply, protocol, is_muted, command, started });
        state.is_barred = true;
        let connection = Rc::clone(self);
        self.worker.spawn(async move {
            let answer = connection.shared().masters.change(change).await;
            // The worker may not have had its turn to look; who made a change sees it at once.
            connection.worker.adopt(connection.shared().masters.latest());
            if connection.is_closed.get() {
                return;
            }
            let state = &mut *connection.state.borrow_mut();
            let index = (sequence - state.first_sequence) as usize;
            if let PendingReply::Ask(progress) = &mut state.ring[index].reply {
                progress.answers[0] = Some(answer);
                progress.left = 0;
            }
            connection.worker.read_clock();
            connection.next_round(state, index);
            connection.flush(state);
            connection.wake();
        });
    }

    fn context<'a>(&'a self, session: &'a mut Session, routing: &'a Routing, reply: &'a mut Vec<u8>) -> Context<'a> {
        Context { session, shared: self.shared(), routing, reply }
    }

    fn next_round(self: &Rc<Self>, state: &mut State, index: usize) {
        let routing = self.worker.routing();
        let mut packed = Vec::new();
        let PendingReply::Ask(progress) = &mut state.ring[index].reply else {
            unreachable!("only a command in rounds has another round");
        };
        let answers = std::mem::take(&mut progress.answers).into_iter().map(Option::unwrap_or_default).collect();
        let context = &mut self.context(&mut state.session, &routing, &mut packed);
        let round = progress.ask.next(context, answers);
        self.take_round(state, index, round, packed);
    }

    /// The operations of a round anew: the number of shards has changed since it was planned, and some of it was refused.
    fn same_round_again(self: &Rc<Self>, state: &mut State, index: usize) {
        let routing = self.worker.routing();
        let mut packed = Vec::new();
        let PendingReply::Ask(progress) = &mut state.ring[index].reply else {
            unreachable!("only a command in rounds has a round again");
        };
        let answered = std::mem::take(&mut progress.answers);
        let context = &mut self.context(&mut state.session, &routing, &mut packed);
        let round = progress.ask.again(context, &answered);
        self.take_round(state, index, round, packed);
    }

    /// What a command in rounds wants next; `packed` is its reply if it is done.
    fn take_round(
        self: &Rc<Self>,
        state: &mut State,
        index: usize,
        round: Result<Round, CommandError>,
        mut packed: Vec<u8>,
    ) {
        let PendingReply::Ask(progress) = &mut state.ring[index].reply else {
            unreachable!("only a command in rounds has another round");
        };
        let sequence = state.first_sequence + index as u64;
        match round {
            // A command of a transaction that asks nobody.
            Ok(Round::Again(requests)) if requests.is_empty() => {
                progress.answers.clear();
                self.next_round(state, index);
            }
            Ok(Round::Again(requests)) => {
                progress.answers = vec![None; requests.len()];
                progress.left = requests.len();
                dispatch::send_requests(self, state, sequence, requests);
            }
            Ok(Round::Later { pause, requests, .. }) => {
                progress.answers = vec![None; requests.len()];
                progress.left = requests.len();
                state.session.client.set_blocked(true);
                self.go_on_later(sequence, pause, requests);
            }
            Ok(Round::Done) => {
                self.settle_named(state, index, &packed);
            }
            Err(error) => {
                packed.clear();
                ReplyWriter::new(&mut packed).error(error.text());
                self.settle_named(state, index, &packed);
            }
        }
    }

    /// Another round of a command, after a pause; only its own connection waits for it.
    fn go_on_later(self: &Rc<Self>, sequence: u64, pause: Duration, requests: Vec<crate::command::ShardRequest>) {
        let connection = Rc::clone(self);
        self.worker.spawn(async move {
            tokio::time::sleep(pause).await;
            if connection.is_closed.get() {
                return;
            }
            connection.worker.read_clock();
            let state = &mut *connection.state.borrow_mut();
            state.session.client.set_blocked(false);
            if connection.socket.is_read_closed() {
                // As Redis: nobody waits for the answer of a command that is held up.
                state.closing = Closing::Now;
            } else if requests.is_empty() {
                connection.next_round(state, (sequence - state.first_sequence) as usize);
            } else {
                dispatch::send_requests(&connection, state, sequence, requests);
            }
            connection.flush(state);
            connection.wake();
        });
    }

    /// A reply that leaves after a while; later commands wait for it.
    pub fn owe_later(
        self: &Rc<Self>,
        state: &mut State,
        command: Command,
        packed: Vec<u8>,
        is_muted: bool,
        after: Duration,
    ) {
        let (protocol, started) = (state.session.protocol, self.worker.now());
        let sequence = state.next_sequence();
        state.ring.push_back(Pending { reply: PendingReply::Waiting, protocol, is_muted, command, started });
        state.is_barred = true;
        let connection = Rc::clone(self);
        self.worker.spawn(async move {
            tokio::time::sleep(after).await;
            if connection.is_closed.get() {
                return;
            }
            let state = &mut *connection.state.borrow_mut();
            connection.settle_named(state, (sequence - state.first_sequence) as usize, &packed);
            connection.flush(state);
            connection.wake();
        });
    }

    /// At most [`vasto_proto::net::LARGE_VALUES_IN_FLIGHT`] values above the threshold are in flight in the process; this one waits its turn.
    fn wait_for_permit(self: &Rc<Self>, state: &mut State) {
        if state.is_waiting_for_permit {
            return;
        }
        state.is_waiting_for_permit = true;
        let connection = Rc::clone(self);
        let permits = self.worker.large_permits();
        self.worker.spawn(async move {
            let permit = permits.acquire_owned().await.ok();
            if connection.is_closed.get() {
                return;
            }
            let state = &mut *connection.state.borrow_mut();
            state.is_waiting_for_permit = false;
            state.permit = permit;
            // The time in the queue for a permit is not the store's.
            state.refused_since = state.refused_since.map(|_| Instant::now());
            if !state.refused.is_empty() && state.outstanding == 0 {
                connection.send_refused_again(state);
            }
            connection.wake();
        });
    }

    /// After a batch of answers: writes, and runs what waited for them.
    pub fn flush_after_answers(self: &Rc<Self>) {
        self.is_touched.set(false);
        if self.is_closed.get() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        self.flush(state);
        let wants_turn = state.saw_end || state.closing != Closing::No || state.stopped_reading && state.may_run();
        if wants_turn {
            self.wake();
        }
    }

    /// Writes what the socket takes.
    fn flush(&self, state: &mut State) {
        let mut written = 0;
        while state.output_at < state.output.len() {
            match self.socket.try_write(&state.output[state.output_at..]) {
                Ok(count) => {
                    state.output_at += count;
                    written += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if state.output_blocked.is_none() || written > 0 {
                        state.output_blocked = Some(self.worker.now());
                        self.wake();
                    }
                    break;
                }
                Err(_) => {
                    state.closing = Closing::Now;
                    self.wake();
                    break;
                }
            }
        }
        if written > 0 {
            self.shared().statistics.output_bytes(written);
        }
        if state.output_at == state.output.len() && state.output.capacity() > 0 {
            state.output_blocked = None;
            state.output_at = 0;
            self.worker.give_buffer(std::mem::take(&mut state.output));
            Self::release_permit(state);
        }
    }

    /// A permit is kept from the first byte of a large value until its reply has left.
    fn release_permit(state: &mut State) {
        let is_used = !state.is_quiet() || !state.refused.is_empty() || state.scanner.bulk_under_way().is_some();
        if !is_used && !state.is_blocked {
            state.permit = None;
        }
    }

    /// Once a second: figures for CLIENT LIST, and the connection is closed if it has been idle or stuck for too long.
    pub fn tick(&self) {
        let state = &mut *self.state.borrow_mut();
        let settings = &self.shared().settings;
        let now = self.worker.now();
        state.output_bytes_max = settings.output_buffer_limit();
        let client = &state.session.client;
        client.set_query_bytes(state.input.len());
        client.set_output_bytes(state.output.len() - state.output_at);
        let is_stuck =
            state.output_blocked.is_some_and(|since| now.duration_since(since) > settings.output_stall_timeout());
        let is_half_sent =
            !state.input.is_empty() && state.may_run() && now.duration_since(state.input_changed) > REQUEST_STALL;
        let is_idle = state.is_quiet()
            && settings.timeout().is_some_and(|timeout| now.duration_since(state.input_changed) > timeout);
        if is_stuck || is_half_sent || is_idle {
            state.closing = Closing::Now;
            self.wake();
        }
    }

    /// The gateway stops: what was asked is answered, nothing more is read.
    pub fn drain(&self) {
        let state = &mut *self.state.borrow_mut();
        if state.closing == Closing::No {
            state.closing = Closing::AfterReplies;
        }
        self.wake();
    }
}
