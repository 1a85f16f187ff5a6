//! Sends refused operations again: to where their shards are now, or their keys if the number of shards has changed.

use super::{Connection, PendingReply, State};
use crate::route::merge::Gather;
use crate::route::plan::{self, Plan};
use crate::routing::{KeyspaceRoutes, Routing};
use crate::upstream::pool::{Refused, Request, packed_arguments};
use bytes::Bytes;
use std::rc::Rc;
use std::time::Instant;
use vasto_proto::batch::{
    FLAG_AFTER_REFUSAL, FLAG_FROM_REPLICA, FLAG_LARGE_PERMIT, OperationHead, Outcome, with_shard_count, write_operation,
};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{CommandSpec, ReplyWriter, Route};
use vasto_proto::error;
use vasto_proto::id::ShardKey;

/// What is sent again of a command, one operation of which was refused.
enum Again {
    /// That one: what the command's other operations were answered holds.
    Operations(Vec<Refused>),
    /// All of it: what its operations were answered, or are to be sent again, no longer counts.
    Command(Vec<Refused>),
}

impl Connection {
    /// The request was not executed and may be sent again.
    pub fn refused(self: &Rc<Self>, refused: Refused) {
        if self.is_closed.get() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        state.note_return();
        state.refused_since.get_or_insert(refused.since);
        state.refused.push(refused);
        self.resend_refused(state);
    }

    /// Sends refused requests again, in order, once everything that was under way behind them has come back.
    pub(super) fn resend_refused(self: &Rc<Self>, state: &mut State) {
        if state.refused.is_empty() || state.outstanding > 0 || state.is_waiting_for_permit {
            return;
        }
        if state.refused.iter().any(|refused| refused.outcome == Outcome::NeedsLargePermit) && state.permit.is_none() {
            self.wait_for_permit(state);
        } else if state.refused.iter().any(|refused| refused.sent_at < self.worker.adopted_at()) {
            // There is a topology that it was not sent by, which may be the one that its store waits for.
            self.send_refused_again(state);
        } else {
            self.worker.check_later(self);
        }
    }

    pub(super) fn send_refused_again(self: &Rc<Self>, state: &mut State) {
        let deadline = self.shared().settings.request_deadline();
        let is_late = state.refused_since.is_some_and(|since| since.elapsed() > deadline);
        let routing = self.worker.routing();
        let mut refused = std::mem::take(&mut state.refused);
        refused.sort_by_key(|refused| (refused.request.sequence, refused.request.part));
        for target in refused.iter().map(|refused| refused.request.target) {
            if !state.refusing.contains(&target) {
                state.refusing.push(target);
            }
        }
        let mut parked = Vec::new();
        let mut sent_whole = None;
        for operation in refused {
            let request = &operation.request;
            if sent_whole == Some(request.sequence) {
                continue;
            }
            let keyspace = routing.keyspace(request.target.keyspace);
            let planned_otherwise = keyspace.filter(|keyspace| keyspace.shard_count() != request.shard_count());
            let operations = match planned_otherwise {
                Some(keyspace) if !is_late => {
                    let sequence = request.sequence;
                    match self.plan_again(state, keyspace, &routing, operation) {
                        Again::Operations(operations) => operations,
                        Again::Command(operations) => {
                            sent_whole = Some(sequence);
                            operations
                        }
                    }
                }
                Some(_) | None => vec![operation],
            };
            for operation in operations {
                parked.extend(self.send_again(state, &routing, operation, is_late));
            }
        }
        if !parked.is_empty() {
            // What was refused meanwhile (a further round of a command) belongs behind it.
            parked.append(&mut state.refused);
            state.refused = parked;
            state.refused_since.get_or_insert_with(Instant::now);
            self.worker.check_later(self);
        } else if state.outstanding == 0 && state.refused.is_empty() {
            state.refused_since = None;
        }
    }

    /// Sends an operation to the primary of its shard, or answers that its time is over; returned is one that waits for a primary.
    fn send_again(
        self: &Rc<Self>,
        state: &mut State,
        routing: &Routing,
        operation: Refused,
        is_late: bool,
    ) -> Option<Refused> {
        let target = operation.request.target;
        let keyspace = routing.keyspace(target.keyspace);
        let owner = keyspace.and_then(|keyspace| Some((keyspace, keyspace.owner(target.shard)?)));
        let deadline = self.shared().settings.request_deadline();
        match owner {
            Some((keyspace, (store, epoch))) if !is_late && !self.worker.link(store).is_given_up(deadline) => {
                let mut request = Request { epoch, ..operation.request };
                let permit = if state.permit.is_some() { FLAG_LARGE_PERMIT } else { 0 };
                let flags = request.flags & !(FLAG_FROM_REPLICA | FLAG_AFTER_REFUSAL) | permit;
                request.flags = with_shard_count(flags, keyspace.shard_count()) | state.after_refusal(target);
                if !request.is_read {
                    state.session.written.note(target, keyspace.shard_count());
                }
                state.outstanding += 1;
                self.worker.link(store).push_again(self, request, &operation);
                None
            }
            None if !is_late && keyspace.is_some_and(|keyspace| keyspace.is_vacant(target.shard)) => Some(operation),
            Some(_) | None => {
                let error = if operation.outcome == Outcome::NoReplicas {
                    error::NO_REPLICAS
                } else {
                    error::shard_unreachable(&operation.text)
                };
                self.settle_error(state, &operation.request, error.text());
                None
            }
        }
    }

    fn settle_error(self: &Rc<Self>, state: &mut State, request: &Request, text: &str) {
        let mut packed = Vec::new();
        ReplyWriter::new(&mut packed).error(text);
        self.settle_failed(state, request, &packed);
    }

    /// Plans anew an operation that went by another number of shards. All else of its command has come back.
    fn plan_again(
        self: &Rc<Self>,
        state: &mut State,
        keyspace: &KeyspaceRoutes,
        routing: &Routing,
        refused: Refused,
    ) -> Again {
        let index = (refused.request.sequence - state.first_sequence) as usize;
        if matches!(state.ring[index].reply, PendingReply::Ask(_)) {
            self.same_round_again(state, index);
            return Again::Command(Vec::new());
        }
        let Some(spec) = StoreCommand::from_code(refused.request.command).map(StoreCommand::spec) else {
            return Again::Operations(vec![refused]);
        };
        let words = words(spec, &refused.operation);
        let to = |target: ShardKey, part: u32, operation: Bytes| Refused {
            request: Request { target, part, ..refused.request },
            operation,
            ..refused.clone()
        };
        let reply = &mut state.ring[index].reply;
        let covers_slots = matches!(spec.route, Route::AllShards(_) | Route::AllKeyspaces(_));
        match plan::plan(spec, &words, keyspace, routing) {
            Ok(Plan::One(target)) if covers_slots => {
                *reply = PendingReply::Waiting;
                Again::Command(vec![to(target, 0, refused.operation.clone())])
            }
            Ok(Plan::One(target)) => {
                Again::Operations(vec![to(target, refused.request.part, refused.operation.clone())])
            }
            Ok(Plan::Many { parts, merge }) if covers_slots => {
                *reply = PendingReply::Gather(Box::new(Gather::new(merge, vec![Vec::new(); parts.len()])));
                let operations =
                    parts.iter().zip(0..).map(|(part, number)| to(part.target, number, refused.operation.clone()));
                Again::Command(operations.collect())
            }
            Ok(Plan::Many { parts, merge }) => {
                let shares: Vec<Vec<u32>> = parts.iter().map(|part| part.groups.clone().unwrap_or_default()).collect();
                let operations: Vec<Bytes> = shares.iter().map(|share| share_of(spec, &words, share)).collect();
                let numbers = if let PendingReply::Gather(gather) = reply {
                    gather.split(refused.request.part as usize, &shares)
                } else {
                    *reply = PendingReply::Gather(Box::new(Gather::new(merge, shares)));
                    (0..parts.len() as u32).collect()
                };
                let operations = parts.iter().zip(numbers).zip(operations);
                Again::Operations(operations.map(|((part, number), words)| to(part.target, number, words)).collect())
            }
            Err(error) => {
                // Its keys lie in different shards now: what a client that comes later is answered too.
                self.settle_error(state, &refused.request, error.text());
                Again::Operations(Vec::new())
            }
        }
    }

    /// A request that cannot be sent yet: its shard has no primary, or what was sent before must come back first. It waits like a refused one.
    pub fn park(self: &Rc<Self>, state: &mut State, request: Request, operation: Vec<u8>) {
        let text = error::vacant(request.target);
        let since = Instant::now();
        let (outcome, operation) = (Outcome::NotServing, operation.into());
        let refused = Refused { request, outcome, text, since, sent_at: since, operation };
        state.refused_since.get_or_insert(since);
        state.refused.push(refused);
        self.worker.check_later(self);
    }
}

/// The command line of a packed operation, or of a share.
fn words<'a>(spec: &'a CommandSpec, operation: &'a Bytes) -> Vec<&'a [u8]> {
    let name = spec.name.split('|').map(str::as_bytes);
    name.chain(packed_arguments(operation)).collect()
}

/// An operation with some of the key groups of `words` alone; its head is written when it is sent.
fn share_of(spec: &CommandSpec, words: &[&[u8]], groups: &[u32]) -> Bytes {
    let (first, step) = (spec.keys.first as usize, usize::from(spec.keys.step.unsigned_abs()).max(1));
    let chosen = groups.iter().flat_map(|group| {
        let start = first + *group as usize * step;
        words[start..start + step].iter().copied()
    });
    let head = OperationHead {
        id: 0,
        connection: 0,
        target: ShardKey::default(),
        epoch: Default::default(),
        command: 0,
        flags: 0,
    };
    let mut packed = Vec::new();
    write_operation(&mut packed, &head, chosen);
    packed.into()
}
