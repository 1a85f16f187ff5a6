//! One worker's link to one store: forms batches of what is waiting, remembers what is in flight, and says what became of it.
//!
//! A batch leaves when the one before is handed over: what all connections of the worker put in meanwhile is the next one. No timer.

use super::link::{Connector, LinkError, LinkHalves};
use crate::connection::Connection;
use crate::routing::{Place, Reader, Routing};
use bytes::Bytes;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tracing::{info, warn};
use vasto_proto::batch::{
    Answers, FLAG_FROM_REPLICA, FLAG_LARGE_PERMIT, OPERATION_HEAD_BYTES, OperationHead, Outcome, SHARD_COUNT_SHIFT,
    write_operation,
};
use vasto_proto::command::Flags;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::error;
use vasto_proto::id::{Epoch, ShardKey, StoreId};
use vasto_proto::net::BATCH_BYTES_TARGET;

/// Operations above this travel in a batch of their own, since they hold up what is behind them.
pub const ALONE_BYTES: usize = 256 << 10;
/// Bytes of operations that wait or are in flight on one link before connections that want more of it wait: enough for some
/// hundred batches at full speed, little enough that one slow store costs each worker a bounded amount of memory.
const IN_FLIGHT_BYTES_MAX: usize = 16 << 20;
/// First and longest pause between attempts to connect.
const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(50);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// However short the deadline is: a store that does not answer for less than this is only busy (a sync of a slow disk takes a second).
const ANSWER_PATIENCE_MIN: Duration = Duration::from_secs(2);
/// A large value takes its time on the way: a minute at the default deadline.
const LARGE_VALUE_PATIENCE: u32 = 12;
/// A replica that does not answer costs a read this part of its deadline; the primary gets the rest.
const REPLICA_PATIENCE_PART: u32 = 5;
/// A primary that hands over by plan answers what it has taken, and so does a shard whose slots are assigned anew; it is given this long for it.
const HANDING_OVER_PATIENCE: Duration = Duration::from_secs(1);

/// Why an operation comes back whose shard was moved.
const MOVED: &str = "the shard has another primary now";
/// Why an operation comes back that took too long.
const NO_ANSWER: &str = "the store does not answer";

/// One operation to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub target: ShardKey,
    pub epoch: Epoch,
    pub command: u16,
    pub flags: u32,
    /// May be sent again if the link is lost: it changes nothing.
    pub is_read: bool,
    /// Which reply of the connection it belongs to, and which part of it.
    pub sequence: u64,
    pub part: u32,
}

impl Request {
    fn reader(&self) -> Reader {
        if self.flags & FLAG_FROM_REPLICA != 0 { Reader::OfReplicas } else { Reader::OfPrimaries }
    }

    /// By how many shards slots were assigned when it was planned.
    pub fn shard_count(&self) -> u16 {
        (self.flags >> SHARD_COUNT_SHIFT) as u16
    }

    /// How long a store may take for it. `None`: as long as it needs, while the master hears of the store.
    fn patience(&self, deadline: Duration) -> Option<Duration> {
        let takes_its_time = |command: StoreCommand| {
            command.spec().flags.contains(Flags::WALKS) || command == StoreCommand::InternalExec
        };
        if StoreCommand::from_code(self.command).is_some_and(takes_its_time) {
            return None;
        }
        let patience = deadline.max(ANSWER_PATIENCE_MIN);
        Some(if self.flags & FLAG_LARGE_PERMIT != 0 {
            patience * LARGE_VALUE_PATIENCE
        } else if self.reader() == Reader::OfReplicas {
            patience / REPLICA_PATIENCE_PART
        } else {
            patience
        })
    }
}

/// An operation that was not executed, with all that is needed to send it again.
#[derive(Clone, Debug)]
pub struct Refused {
    pub request: Request,
    pub outcome: Outcome,
    pub text: String,
    /// When it was sent, or was to be, for the first time.
    pub since: Instant,
    /// And for the last time.
    pub sent_at: Instant,
    /// Its packed bytes, head included.
    pub operation: Bytes,
}

#[derive(Debug)]
struct InFlight {
    connection: Rc<Connection>,
    request: Request,
    pushed_at: Instant,
    /// When it was pushed for the first time, to whatever link.
    since: Instant,
    batch: u64,
    offset: u32,
    bytes: u32,
}

/// What an operation's id stands for.
#[derive(Debug)]
enum Entry {
    InFlight(InFlight),
    /// Its client was answered without the store. When the store answers after all, nobody takes it; until then the id is in use.
    Abandoned,
}

/// What is to become of an operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Keep,
    /// The shard is served elsewhere.
    Elsewhere,
    /// The store had its time.
    TooLate,
}

#[derive(Debug, Default)]
struct WaitingBatch {
    packed: Vec<u8>,
    operations: usize,
    /// Holds one long operation: nothing may join it.
    is_closed: bool,
}

#[derive(Debug)]
struct SentBatch {
    packed: Bytes,
    unanswered: usize,
}

#[derive(Debug, Default)]
struct State {
    in_flight: Slab<Entry>,
    /// Batches that wait to be sent; their serials follow those of `sent`.
    waiting: VecDeque<WaitingBatch>,
    sent: VecDeque<SentBatch>,
    /// Serial of the first batch in `sent`.
    first_serial: u64,
    bytes: usize,
    /// Connections that wait until the link has room.
    held_up: Vec<Rc<Connection>>,
}

impl State {
    fn first_waiting_serial(&self) -> u64 {
        self.first_serial + self.sent.len() as u64
    }

    /// Counts an operation of a sent batch as answered, and returns its packed bytes.
    fn take_answered(&mut self, operation: &InFlight) -> Option<Bytes> {
        self.bytes -= operation.bytes as usize;
        let batch = self.sent.get_mut(operation.batch.checked_sub(self.first_serial)? as usize)?;
        let packed = batch.packed.slice(operation.offset as usize..(operation.offset + operation.bytes) as usize);
        batch.unanswered -= 1;
        self.forget_answered_batches();
        Some(packed)
    }

    fn forget_answered_batches(&mut self) {
        while self.sent.front().is_some_and(|batch| batch.unanswered == 0) {
            self.sent.pop_front();
            self.first_serial += 1;
        }
    }

    /// Takes operations that were given up out of the batches that still wait.
    fn repack(&mut self, serial: u64) {
        let Some(index) = serial.checked_sub(self.first_waiting_serial()) else { return };
        let Some(batch) = self.waiting.get_mut(index as usize) else { return };
        let mut kept: Vec<&mut InFlight> = self
            .in_flight
            .iter_mut()
            .filter_map(|(_, entry)| match entry {
                Entry::InFlight(operation) if operation.batch == serial => Some(operation),
                Entry::InFlight(_) | Entry::Abandoned => None,
            })
            .collect();
        kept.sort_unstable_by_key(|operation| operation.offset);
        let before = std::mem::take(&mut batch.packed);
        batch.operations = kept.len();
        for operation in kept {
            let offset = operation.offset as usize;
            operation.offset = batch.packed.len() as u32;
            batch.packed.extend_from_slice(&before[offset..offset + operation.bytes as usize]);
        }
    }
}

/// An operation that the link has given up.
struct GivenUp {
    operation: InFlight,
    packed: Bytes,
    was_sent: bool,
    verdict: Verdict,
}

/// Whom an answer is for.
enum Settled {
    /// With the operation's packed bytes.
    InFlight(InFlight, Bytes),
    Abandoned,
    /// Nothing of this id was sent.
    Unknown,
}

/// A link and its queue. The task in [`Link::run`] drives it.
#[derive(Debug)]
pub struct Link {
    store: StoreId,
    state: RefCell<State>,
    work: Notify,
    /// Since when no attempt to connect has succeeded.
    down_since: Cell<Option<Instant>>,
    /// The store has come back: it is not waited for the next attempt to connect.
    returned: Notify,
}

impl Link {
    pub fn new(store: StoreId) -> Self {
        Self {
            store,
            state: RefCell::default(),
            work: Notify::new(),
            down_since: Cell::new(None),
            returned: Notify::new(),
        }
    }

    /// Whether a connection must wait before it sends more here; if so it is resumed when there is room.
    pub fn holds_up(&self, connection: &Rc<Connection>) -> bool {
        let mut state = self.state.borrow_mut();
        if state.bytes < IN_FLIGHT_BYTES_MAX {
            return false;
        }
        if !state.held_up.iter().any(|waiting| Rc::ptr_eq(waiting, connection)) {
            state.held_up.push(Rc::clone(connection));
        }
        true
    }

    /// Whether the store has been away for so long that commands for it no longer wait for its return.
    pub fn is_given_up(&self, deadline: Duration) -> bool {
        self.down_since.get().is_some_and(|since| since.elapsed() > deadline)
    }

    /// Whether the last attempt to connect failed.
    pub fn is_down(&self) -> bool {
        self.down_since.get().is_some()
    }

    /// The master hears of the store again: it is tried at once, and has the whole deadline again.
    pub fn note_return(&self) {
        if self.is_down() {
            self.down_since.set(Some(Instant::now()));
            self.returned.notify_one();
        }
    }

    /// Takes back what no longer belongs here: reads, and what was not sent, go to where the shard is now; of the rest the outcome is
    /// unknown. A primary that hands over by plan still answers that, and is given the time for it by [`Link::give_up_late`]. So are stores
    /// that were sent something by another number of shards: what they still serve of it they answer, the rest they refuse. Until then
    /// nothing of its connection may go the new way.
    pub fn follow(&self, routing: &Routing) {
        self.give_up(|InFlight { connection, request, .. }, was_sent| {
            let is_assigned_anew = !routing.is_assigned_by(request.target.keyspace, request.shard_count());
            if is_assigned_anew && was_sent {
                connection.keep_order();
            }
            match routing.place(self.store, request.target, request.reader()) {
                Place::Here | Place::Unknown if is_assigned_anew && !was_sent => Verdict::Elsewhere,
                Place::Here | Place::Unknown => Verdict::Keep,
                Place::HandingOver if was_sent && !request.is_read => {
                    connection.keep_order();
                    Verdict::Keep
                }
                Place::HandingOver | Place::Elsewhere => Verdict::Elsewhere,
            }
        });
        // What they wait to send may belong to another link now.
        let held_up = std::mem::take(&mut self.state.borrow_mut().held_up);
        held_up.iter().for_each(|connection| connection.wake());
    }

    /// Answers what the store had its time for: it may hang with its connections open.
    pub fn give_up_late(&self, now: Instant, deadline: Duration, routing: &Routing) {
        let is_up = routing.is_up(self.store);
        self.give_up(|InFlight { request, pushed_at, since, .. }, was_sent| {
            // The store has its time from when it was sent, the way to it only what the deadline has left.
            let age = now.saturating_duration_since(if was_sent { *pushed_at } else { *since });
            let place = routing.place(self.store, request.target, request.reader());
            let patience = request.patience(deadline);
            // A read may ask elsewhere; of a write that its old shard may have executed only that one can tell.
            let may_ask_elsewhere = request.is_read
                && patience.is_some()
                && !routing.is_assigned_by(request.target.keyspace, request.shard_count());
            if (place == Place::HandingOver || may_ask_elsewhere) && age > HANDING_OVER_PATIENCE {
                return Verdict::Elsewhere;
            }
            let patience = patience.or((!is_up).then_some(deadline.max(ANSWER_PATIENCE_MIN)));
            if patience.is_some_and(|patience| age > patience) { Verdict::TooLate } else { Verdict::Keep }
        });
    }

    /// Takes operations out of flight and answers their connections, or gives them back.
    fn give_up(&self, judge: impl Fn(&InFlight, bool) -> Verdict) {
        let given_up = self.take_given_up(judge);
        if given_up.is_empty() {
            return;
        }
        let mut touched: Vec<Rc<Connection>> = Vec::new();
        for GivenUp { operation: InFlight { connection, request, since, pushed_at, .. }, packed, was_sent, verdict } in
            given_up
        {
            let reason = if verdict == Verdict::TooLate { NO_ANSWER } else { MOVED };
            if was_sent && !request.is_read {
                connection.unknown(&request, &error::unknown_outcome(reason));
            } else if verdict == Verdict::TooLate && request.reader() == Reader::OfPrimaries {
                connection.failed(&request, reason);
            } else {
                let text = reason.to_owned();
                let outcome = Outcome::NotServing;
                connection.refused(Refused { request, outcome, text, since, sent_at: pushed_at, operation: packed });
            }
            if connection.touch() {
                touched.push(connection);
            }
        }
        for connection in touched {
            connection.flush_after_answers();
        }
        self.resume_held_up();
    }

    fn take_given_up(&self, judge: impl Fn(&InFlight, bool) -> Verdict) -> Vec<GivenUp> {
        let state = &mut *self.state.borrow_mut();
        let first_waiting = state.first_waiting_serial();
        let judged = |(id, entry): (usize, &Entry)| match entry {
            Entry::InFlight(operation) => {
                let verdict = judge(operation, operation.batch < first_waiting);
                (verdict != Verdict::Keep).then_some((id, verdict))
            }
            Entry::Abandoned => None,
        };
        let judged: Vec<(usize, Verdict)> = state.in_flight.iter().filter_map(judged).collect();
        let mut given_up = Vec::with_capacity(judged.len());
        let mut to_repack: Vec<u64> = Vec::new();
        for (id, verdict) in judged {
            let Entry::InFlight(operation) = std::mem::replace(&mut state.in_flight[id], Entry::Abandoned) else {
                continue;
            };
            let was_sent = operation.batch < first_waiting;
            let packed = if was_sent {
                state.take_answered(&operation).unwrap_or_default()
            } else {
                // The store never hears of it.
                state.in_flight.remove(id);
                state.bytes -= operation.bytes as usize;
                let batch = &state.waiting[(operation.batch - first_waiting) as usize];
                if to_repack.last() != Some(&operation.batch) {
                    to_repack.push(operation.batch);
                }
                let range = operation.offset as usize..(operation.offset + operation.bytes) as usize;
                Bytes::copy_from_slice(&batch.packed[range])
            };
            given_up.push(GivenUp { operation, packed, was_sent, verdict });
        }
        to_repack.sort_unstable();
        to_repack.dedup();
        to_repack.into_iter().for_each(|serial| state.repack(serial));
        // Their connections get them in the order in which they were sent.
        given_up.sort_by_key(|given_up| (given_up.operation.batch, given_up.operation.offset));
        given_up
    }

    /// Adds an operation to the batch that gathers; `arguments` are cloned into it.
    pub fn push<'a>(
        &self,
        connection: &Rc<Connection>,
        request: Request,
        arguments: impl Iterator<Item = &'a [u8]>,
        argument_bytes: usize,
    ) {
        self.push_since(connection, request, arguments, argument_bytes, connection.worker().now());
    }

    fn push_since<'a>(
        &self,
        connection: &Rc<Connection>,
        request: Request,
        arguments: impl Iterator<Item = &'a [u8]>,
        argument_bytes: usize,
        since: Instant,
    ) {
        let state = &mut *self.state.borrow_mut();
        let alone = argument_bytes > ALONE_BYTES;
        if state.waiting.is_empty() {
            // The one wake-up of a batch; whatever else comes before the task runs joins it.
            self.work.notify_one();
        }
        if alone || state.waiting.back().is_none_or(|batch| batch.is_closed || batch.packed.len() >= BATCH_BYTES_TARGET)
        {
            state.waiting.push_back(WaitingBatch::default());
        }
        let serial = state.first_waiting_serial() + state.waiting.len() as u64 - 1;
        let batch = state.waiting.back_mut().expect("a batch was just made sure of");
        let offset = batch.packed.len();
        let entry = state.in_flight.vacant_entry();
        let head = OperationHead {
            id: entry.key() as u32,
            connection: connection.id(),
            target: request.target,
            epoch: request.epoch,
            command: request.command,
            flags: request.flags,
        };
        write_operation(&mut batch.packed, &head, arguments);
        batch.operations += 1;
        batch.is_closed = alone;
        let bytes = batch.packed.len() - offset;
        state.bytes += bytes;
        entry.insert(Entry::InFlight(InFlight {
            connection: Rc::clone(connection),
            request,
            pushed_at: connection.worker().now(),
            since,
            batch: serial,
            offset: offset as u32,
            bytes: bytes as u32,
        }));
    }

    /// Sends a refused operation again, as `request`, with the time that it has left.
    pub fn push_again(&self, connection: &Rc<Connection>, request: Request, refused: &Refused) {
        let arguments = packed_arguments(&refused.operation);
        let bytes = refused.operation.len() - OPERATION_HEAD_BYTES;
        self.push_since(connection, request, arguments, bytes, refused.since);
    }

    /// Connects, and connects again, and moves batches and answers until the worker drops it.
    pub async fn run(self: Rc<Self>, connector: Arc<dyn Connector>, routing: impl Fn() -> Rc<Routing>) {
        let mut pause = RECONNECT_PAUSE_MIN;
        loop {
            // A store that is away is tried again without being asked, so that its return is known at once.
            if self.down_since.get().is_none() {
                self.wait_for_work().await;
            }
            let known = routing();
            let address = known.snapshot.store(self.store).map(|store| store.address.clone()).unwrap_or_default();
            let opened = if address.is_empty() {
                Err(LinkError("its address is not known yet".into()))
            } else {
                // Dropping a half-opened link closes it.
                tokio::select! {
                    opened = connector.connect(self.store, &address, known.snapshot.cluster) => opened,
                    () = self.returned.notified() => continue,
                }
            };
            let error = match opened {
                Ok(halves) => {
                    if self.down_since.take().is_some() {
                        info!(store = %self.store, %address, "link is back");
                    }
                    pause = RECONNECT_PAUSE_MIN;
                    self.drive(halves).await
                }
                Err(error) => error,
            };
            if self.down_since.get().is_none() {
                warn!(store = %self.store, %address, %error, "link lost");
                self.down_since.set(Some(Instant::now()));
            }
            self.lost(&error);
            let next_attempt = tokio::time::sleep(pause);
            tokio::pin!(next_attempt);
            loop {
                // All are cancel safe.
                tokio::select! {
                    () = &mut next_attempt => break,
                    () = self.returned.notified() => break,
                    () = self.work.notified() => {}
                }
                // Refused at once, so that the connection decides: it tries again within the deadline, or answers.
                self.lost(&error);
            }
            pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
        }
    }

    async fn wait_for_work(&self) {
        while self.state.borrow().waiting.is_empty() {
            self.work.notified().await;
        }
    }

    async fn drive(&self, (mut sender, mut receiver): LinkHalves) -> LinkError {
        let send = async {
            loop {
                self.wait_for_work().await;
                let packed = {
                    let state = &mut *self.state.borrow_mut();
                    let Some(batch) = state.waiting.pop_front() else { continue };
                    let packed = Bytes::from(batch.packed);
                    state.sent.push_back(SentBatch { packed: packed.clone(), unanswered: batch.operations });
                    if batch.operations == 0 {
                        // All of it was given up meanwhile.
                        state.forget_answered_batches();
                        continue;
                    }
                    packed
                };
                metrics::histogram!("vasto_gateway_batch_bytes").record(packed.len() as f64);
                if let Err(error) = sender.send(packed).await {
                    return error;
                }
            }
        };
        let receive = async {
            loop {
                match receiver.receive().await {
                    Ok(answers) => {
                        if let Err(error) = self.hand_out(&answers) {
                            return error;
                        }
                    }
                    Err(error) => return error,
                }
            }
        };
        // Both are loops over cancel-safe steps, and whichever ends first ends the link.
        tokio::select! {
            error = receive => error,
            error = send => error,
        }
    }

    /// Gives a batch of answers to their connections, then lets each of these write what it has.
    fn hand_out(&self, answers: &[u8]) -> Result<(), LinkError> {
        let mut touched: Vec<Rc<Connection>> = Vec::new();
        let mut is_first = true;
        for answer in Answers::new(answers) {
            let answer = answer.map_err(|error| LinkError(format!("the store sent a {error}")))?;
            let (InFlight { connection, request, since, pushed_at, .. }, operation) = match self.settle(answer.id) {
                Settled::InFlight(operation, packed) => (operation, packed),
                Settled::Abandoned => continue,
                Settled::Unknown => {
                    let id = answer.id;
                    return Err(LinkError(format!("the store answered operation {id} which is not in flight")));
                }
            };
            if std::mem::take(&mut is_first) {
                connection.worker().read_clock();
            }
            match answer.outcome {
                Outcome::Reply => connection.answered(&request, answer.body, &operation),
                Outcome::Unknown => {
                    let reason = String::from_utf8_lossy(answer.body);
                    connection.unknown(&request, &error::unknown_outcome(&reason));
                }
                Outcome::NotHere
                | Outcome::WrongEpoch
                | Outcome::NotServing
                | Outcome::NeedsLargePermit
                | Outcome::NoReplicas => {
                    let text = String::from_utf8_lossy(answer.body).into_owned();
                    let outcome = answer.outcome;
                    connection.refused(Refused { request, outcome, text, since, sent_at: pushed_at, operation });
                }
            }
            if connection.touch() {
                touched.push(connection);
            }
        }
        for connection in touched {
            connection.flush_after_answers();
        }
        self.resume_held_up();
        Ok(())
    }

    /// Takes an operation out of flight.
    fn settle(&self, id: u32) -> Settled {
        let state = &mut *self.state.borrow_mut();
        match state.in_flight.try_remove(id as usize) {
            Some(Entry::InFlight(operation)) => match state.take_answered(&operation) {
                Some(packed) => Settled::InFlight(operation, packed),
                None => Settled::Unknown,
            },
            Some(Entry::Abandoned) => Settled::Abandoned,
            None => Settled::Unknown,
        }
    }

    fn resume_held_up(&self) {
        let state = &mut *self.state.borrow_mut();
        if state.bytes < IN_FLIGHT_BYTES_MAX / 2 {
            for connection in state.held_up.drain(..) {
                connection.wake();
            }
        }
    }

    /// The link is gone: what was not sent, and what only reads, was refused and may be sent again; the rest has an unknown outcome.
    fn lost(&self, error: &LinkError) {
        let (entries, waiting, sent, first_serial) = {
            let state = &mut *self.state.borrow_mut();
            let in_flight = |entry| match entry {
                Entry::InFlight(operation) => Some(operation),
                Entry::Abandoned => None,
            };
            let entries: Vec<InFlight> = state.in_flight.drain().filter_map(in_flight).collect();
            let waiting: Vec<Bytes> = state.waiting.drain(..).map(|batch| Bytes::from(batch.packed)).collect();
            let sent: Vec<Bytes> = state.sent.drain(..).map(|batch| batch.packed).collect();
            let first_serial = state.first_serial;
            state.first_serial += (sent.len() + waiting.len()) as u64;
            state.bytes = 0;
            (entries, waiting, sent, first_serial)
        };
        let mut touched: Vec<Rc<Connection>> = Vec::new();
        for InFlight { connection, request, since, pushed_at, batch, offset, bytes } in entries {
            let index = (batch - first_serial) as usize;
            let was_sent = index < sent.len();
            if was_sent && !request.is_read {
                connection.unknown(&request, &error::UNKNOWN_OUTCOME);
            } else {
                let packed = if was_sent { &sent[index] } else { &waiting[index - sent.len()] };
                let operation = packed.slice(offset as usize..(offset + bytes) as usize);
                connection.refused(Refused {
                    request,
                    outcome: Outcome::NotServing,
                    text: error.to_string(),
                    since,
                    sent_at: pushed_at,
                    operation,
                });
            }
            if connection.touch() {
                touched.push(connection);
            }
        }
        for connection in touched {
            connection.flush_after_answers();
        }
        self.resume_held_up();
    }
}

/// The arguments of a packed operation.
pub fn packed_arguments(operation: &[u8]) -> impl Iterator<Item = &[u8]> {
    let parsed = vasto_proto::batch::Operations::new(operation).next();
    parsed.and_then(Result::ok).into_iter().flat_map(|operation| operation.arguments)
}
