//! One worker's link to one store: forms batches of what is waiting, remembers what is in flight, and says what became of it.
//!
//! A batch leaves when the one before is handed over: what all connections of the worker put in meanwhile is the next one. No timer.

use super::link::{Connector, LinkError, LinkHalves};
use crate::connection::Connection;
use crate::routing::Routing;
use bytes::Bytes;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tracing::{info, warn};
use vasto_proto::batch::{Answers, OPERATION_HEAD_BYTES, OperationHead, Outcome, write_operation};
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

/// An operation that was not executed, with all that is needed to send it again.
#[derive(Clone, Debug)]
pub struct Refused {
    pub request: Request,
    pub outcome: Outcome,
    pub text: String,
    /// Its packed bytes, head included.
    pub operation: Bytes,
}

#[derive(Debug)]
struct InFlight {
    connection: Rc<Connection>,
    request: Request,
    batch: u64,
    offset: u32,
    bytes: u32,
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
    in_flight: Slab<InFlight>,
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
}

/// A link and its queue. The task in [`Link::run`] drives it.
#[derive(Debug)]
pub struct Link {
    store: StoreId,
    state: RefCell<State>,
    work: Notify,
    /// Since when no attempt to connect has succeeded.
    down_since: Cell<Option<Instant>>,
}

impl Link {
    pub fn new(store: StoreId) -> Self {
        Self { store, state: RefCell::default(), work: Notify::new(), down_since: Cell::new(None) }
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

    /// Adds an operation to the batch that gathers; `arguments` are cloned into it.
    pub fn push<'a>(
        &self,
        connection: &Rc<Connection>,
        request: Request,
        arguments: impl Iterator<Item = &'a [u8]>,
        argument_bytes: usize,
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
        entry.insert(InFlight {
            connection: Rc::clone(connection),
            request,
            batch: serial,
            offset: offset as u32,
            bytes: bytes as u32,
        });
    }

    /// Sends a refused operation again, to where it belongs now. `flags` are added to its own.
    pub fn push_again(&self, connection: &Rc<Connection>, refused: &Refused, epoch: Epoch, flags: u32) {
        let mut request = refused.request;
        request.epoch = epoch;
        request.flags |= flags;
        let arguments = packed_arguments(&refused.operation);
        self.push(connection, request, arguments, refused.operation.len() - OPERATION_HEAD_BYTES);
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
                connector.connect(self.store, &address, known.snapshot.cluster).await
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
                // Both are cancel safe.
                tokio::select! {
                    () = &mut next_attempt => break,
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
            let Some((entry, operation)) = self.settle(answer.id) else {
                return Err(LinkError(format!("the store answered operation {} which is not in flight", answer.id)));
            };
            let InFlight { connection, request, .. } = entry;
            if std::mem::take(&mut is_first) {
                connection.worker().read_clock();
            }
            match answer.outcome {
                Outcome::Reply => connection.answered(&request, answer.body, &operation),
                Outcome::Unknown => {
                    let reason = String::from_utf8_lossy(answer.body);
                    connection.unknown(&request, &error::unknown_outcome(&reason));
                }
                Outcome::NotHere | Outcome::WrongEpoch | Outcome::NotServing | Outcome::NeedsLargePermit => {
                    let text = String::from_utf8_lossy(answer.body).into_owned();
                    connection.refused(Refused { request, outcome: answer.outcome, text, operation });
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

    /// Takes an operation out of flight and returns it with its packed bytes.
    fn settle(&self, id: u32) -> Option<(InFlight, Bytes)> {
        let state = &mut *self.state.borrow_mut();
        let entry = state.in_flight.try_remove(id as usize)?;
        state.bytes -= entry.bytes as usize;
        let batch = state.sent.get_mut(entry.batch.checked_sub(state.first_serial)? as usize)?;
        let operation = batch.packed.slice(entry.offset as usize..(entry.offset + entry.bytes) as usize);
        batch.unanswered -= 1;
        while state.sent.front().is_some_and(|batch| batch.unanswered == 0) {
            state.sent.pop_front();
            state.first_serial += 1;
        }
        Some((entry, operation))
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
            let entries: Vec<InFlight> = state.in_flight.drain().collect();
            let waiting: Vec<Bytes> = state.waiting.drain(..).map(|batch| Bytes::from(batch.packed)).collect();
            let sent: Vec<Bytes> = state.sent.drain(..).map(|batch| batch.packed).collect();
            let first_serial = state.first_serial;
            state.first_serial += (sent.len() + waiting.len()) as u64;
            state.bytes = 0;
            (entries, waiting, sent, first_serial)
        };
        let mut touched: Vec<Rc<Connection>> = Vec::new();
        for InFlight { connection, request, batch, offset, bytes } in entries {
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
