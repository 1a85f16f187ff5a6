//! Owns the state: feeds it what sessions report and the passing of time, sends what it decides, publishes its snapshots.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vasto_proto::pb;
use vasto_proto::topology::{KeyspaceRecord, Phase, Snapshot};

use crate::failover::Planned;
use crate::keyspaces::Creation;
use crate::leadership::Notice;
use crate::operations::{Doing, OperationWish};
use crate::progress::Step;
use crate::state::{
    Action, AlterError, AlterResult, Alteration, Effect, Event, Refusal, Report, RequestId, SessionId, State,
};

/// How often silence is looked for: a store is found down at most so much later than the limit says.
const TICK: Duration = Duration::from_millis(250);

/// Events that wait for the driver: a heartbeat each from more stores than a cluster has. When it is full, sessions wait.
const EVENT_QUEUE_MAX: usize = 1024;

/// Directives that wait for one store: all records and some acknowledgements. A store that lets them pile up does not
/// read its stream: its session ends, and it starts afresh with the next one.
const DIRECTIVE_QUEUE_MAX: usize = 64;

/// Why a store's session ends, in words for its log.
#[derive(Clone, Debug)]
pub struct SessionEnd(pub String);

/// What a store's stream gets: directives, and at last perhaps why it ends.
pub type Directives = mpsc::Receiver<Result<pb::Directive, SessionEnd>>;
type DirectiveSender = mpsc::Sender<Result<pb::Directive, SessionEnd>>;

enum Input {
    Opened { session: SessionId, directives: DirectiveSender },
    Reported { session: SessionId, report: Box<Report> },
    Ended { session: SessionId, reason: Option<SessionEnd> },
    Change { change: Change, answer: oneshot::Sender<AlterResult> },
    AskedForOperation { name: String, answer: oneshot::Sender<Result<pb::OperationStatus, AlterError>> },
}

/// A change of a keyspace, as a gateway asks for it.
#[derive(Clone, Debug)]
pub enum Change {
    Alter(Alteration),
    Create(Creation),
    /// The keyspace of this name.
    Drop(String),
    /// Another primary for a shard.
    Failover(Planned),
    /// What is done with the keyspace as a whole; answered when its record says so.
    Operate(OperationWish),
}

/// The way to the driver for the rpc module.
#[derive(Debug)]
pub struct Link {
    inputs: mpsc::Sender<Input>,
    sessions: std::sync::atomic::AtomicU64,
    topology: watch::Receiver<Arc<Snapshot>>,
}

/// Why a keyspace was not altered.
#[derive(Debug)]
pub enum AlterFailure {
    Refused(AlterError),
    /// What becomes of it, the next master finds on the stores.
    Stopped,
}

/// The driver has stopped.
#[derive(Debug)]
pub struct Stopped;

impl Link {
    pub async fn open_session(&self) -> Result<(SessionId, Directives), Stopped> {
        let session = SessionId(self.sessions.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let (directives, receiver) = mpsc::channel(DIRECTIVE_QUEUE_MAX);
        self.send(Input::Opened { session, directives }).await?;
        Ok((session, receiver))
    }

    pub async fn report(&self, session: SessionId, report: Report) -> Result<(), Stopped> {
        self.send(Input::Reported { session, report: Box::new(report) }).await
    }

    /// The store's stream ends; `reason` tells it why if the fault was its own.
    pub async fn end_session(&self, session: SessionId, reason: Option<SessionEnd>) -> Result<(), Stopped> {
        self.send(Input::Ended { session, reason }).await
    }

    /// Changes, makes or drops a keyspace; returns when its stores have confirmed it, or have not in time.
    pub async fn change(&self, change: Change) -> Result<KeyspaceRecord, AlterFailure> {
        let (answer, answered) = oneshot::channel();
        self.send(Input::Change { change, answer }).await.map_err(|_| AlterFailure::Stopped)?;
        answered.await.map_err(|_| AlterFailure::Stopped)?.map_err(AlterFailure::Refused)
    }

    /// How far the operation of a keyspace has come.
    pub async fn operation_status(&self, name: String) -> Result<pb::OperationStatus, AlterFailure> {
        let (answer, answered) = oneshot::channel();
        self.send(Input::AskedForOperation { name, answer }).await.map_err(|_| AlterFailure::Stopped)?;
        answered.await.map_err(|_| AlterFailure::Stopped)?.map_err(AlterFailure::Refused)
    }

    /// The snapshot as it is now, and a notice of each change; whoever is slow sees the latest.
    pub fn topology(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.topology.clone()
    }

    async fn send(&self, input: Input) -> Result<(), Stopped> {
        self.inputs.send(input).await.map_err(|_| Stopped)
    }
}

pub struct Driver {
    state: State,
    inputs: mpsc::Receiver<Input>,
    directives: HashMap<SessionId, DirectiveSender>,
    /// Those who wait for a change; bounded by [`EVENT_QUEUE_MAX`] a turn and by the patience that the state has with each.
    waiting: HashMap<RequestId, oneshot::Sender<AlterResult>>,
    requests: u64,
    topology: watch::Sender<Arc<Snapshot>>,
    shutdown: CancellationToken,
}

impl Driver {
    pub fn new(state: State, shutdown: CancellationToken) -> (Self, Link) {
        let (sender, inputs) = mpsc::channel(EVENT_QUEUE_MAX);
        let (topology, receiver) = watch::channel(Arc::new(state.snapshot().clone()));
        let link = Link { inputs: sender, sessions: 1.into(), topology: receiver };
        let (directives, waiting) = (HashMap::new(), HashMap::new());
        (Self { state, inputs, directives, waiting, requests: 0, topology, shutdown }, link)
    }

    /// Runs until shutdown; then every session and watcher sees the end of its stream.
    pub async fn run(mut self) {
        let start = Instant::now();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        info!(waiting_for = self.state.snapshot().waiting_for, "no keyspace yet");
        loop {
            // All three are cancel safe.
            let event = tokio::select! {
                () = self.shutdown.cancelled() => return,
                input = self.inputs.recv() => match input {
                    Some(Input::Opened { session, directives }) => {
                        self.directives.insert(session, directives);
                        continue;
                    }
                    Some(Input::Reported { session, report }) => {
                        // What a session sent before it was ended by us is not heard any more.
                        if !self.directives.contains_key(&session) {
                            continue;
                        }
                        if !report.failure.is_empty() {
                            warn!(store = %report.store, failure = report.failure, "a store could not carry out a directive");
                        }
                        counter!("vasto_master_reports_total").increment(1);
                        Event::Reported { session, report }
                    }
                    Some(Input::Ended { session, reason }) => {
                        if let Some((directives, reason)) = self.directives.remove(&session).zip(reason) {
                            // A full queue loses the reason, not the end.
                            let _ = directives.try_send(Err(reason));
                        }
                        Event::SessionEnded { session }
                    }
                    Some(Input::Change { change, answer }) => {
                        info!(?change, "a keyspace is to be changed");
                        self.requests += 1;
                        let request = RequestId(self.requests);
                        self.waiting.insert(request, answer);
                        match change {
                            Change::Alter(alteration) => Event::AlterRequested { request, alteration },
                            Change::Create(creation) => Event::CreateRequested { request, creation },
                            Change::Drop(name) => Event::DropRequested { request, name },
                            Change::Failover(planned) => Event::FailoverRequested { request, planned },
                            Change::Operate(wish) => Event::OperationRequested { request, wish },
                        }
                    }
                    Some(Input::AskedForOperation { name, answer }) => {
                        // Whoever asked may be gone.
                        let _ = answer.send(self.state.operation_status(&name, start.elapsed()));
                        continue;
                    }
                    None => return,
                },
                _ = ticks.tick() => Event::TimePassed,
            };
            self.apply(event, start.elapsed());
        }
    }

    fn apply(&mut self, event: Event, now: Duration) {
        let mut effects = self.state.apply(event, now);
        while !effects.is_empty() {
            let mut lost = Vec::new();
            for effect in effects {
                if !self.send(&effect) {
                    lost.push(effect.session);
                }
            }
            effects = Vec::new();
            for session in lost {
                if self.directives.remove(&session).is_some() {
                    effects.extend(self.state.apply(Event::SessionEnded { session }, now));
                }
            }
        }
        for notice in self.state.take_notices() {
            match notice {
                Notice::Leads(term) => {
                    info!(term = term.number, address = self.state.address(), "this master leads");
                }
                Notice::GroupChanges(group) => {
                    info!(version = group.version, holders = ?group.members, "the group of holders changes");
                }
                Notice::SteppedBack { own, newer } => {
                    let (own, newer) = (own.number, newer.number);
                    warn!("another master has term {newer}: this one steps back from term {own} and stands by");
                }
            }
        }
        let steps = self.state.take_steps();
        if !steps.is_empty() {
            gauge!("vasto_master_operations").set(self.state.operations_running() as f64);
        }
        steps.iter().for_each(log_step);
        // The topology first: who hears that a change holds finds it there.
        self.publish();
        for (request, result) in self.state.take_answers() {
            if let Err(error) = &result {
                warn!(%error, "a keyspace was not changed");
            }
            if let Some(answer) = self.waiting.remove(&request) {
                // Nobody waits any more: the gateway is gone.
                let _ = answer.send(result);
            }
        }
    }

    /// Whether the session goes on.
    fn send(&mut self, effect: &Effect) -> bool {
        let session = effect.session;
        let Some(directives) = self.directives.get(&session) else {
            return false;
        };
        let kind = match &effect.action {
            Action::Acknowledge => pb::directive::Kind::HeartbeatAck(pb::HeartbeatAck {
                master: self.state.address().to_owned(),
                leads: self.state.term().map(Into::into),
            }),
            Action::Prepare(term) => pb::directive::Kind::Prepare(pb::Prepare {
                term: Some((*term).into()),
                leader: self.state.address().to_owned(),
            }),
            Action::Accept(term, entries) => pb::directive::Kind::Accept(pb::Accept {
                term: Some((*term).into()),
                entries: entries.iter().map(Into::into).collect(),
                leader: self.state.address().to_owned(),
            }),
            Action::Peers(peers) => pb::directive::Kind::Peers(peers.into()),
            Action::PutRecord(record) => pb::directive::Kind::PutRecord(record.into()),
            Action::Welcome(cluster) => pb::directive::Kind::Welcome(pb::Welcome { cluster_id: cluster.0 }),
            Action::Refuse(refusal) => {
                match refusal {
                    Refusal::Replaced { .. } => info!("{refusal}"),
                    Refusal::OtherCluster { .. }
                    | Refusal::StoreTaken { .. }
                    | Refusal::OtherRecord { .. }
                    | Refusal::OtherStore { .. }
                    | Refusal::Incomplete { .. } => warn!("{refusal}"),
                }
                counter!("vasto_master_refusals_total").increment(1);
                // A full queue loses the reason, not the end.
                let _ = directives.try_send(Err(SessionEnd(refusal.to_string())));
                self.directives.remove(&session);
                return true;
            }
        };
        directives.try_send(Ok(pb::Directive { kind: Some(kind) })).is_ok()
    }

    fn publish(&mut self) {
        let snapshot = self.state.snapshot();
        let before = self.topology.borrow().clone();
        if before.version == snapshot.version {
            return;
        }
        log_changes(&before, snapshot);
        gauge!("vasto_master_stores").set(snapshot.stores.len() as f64);
        gauge!("vasto_master_stores_up").set(snapshot.stores.iter().filter(|store| store.up).count() as f64);
        gauge!("vasto_master_keyspaces").set(snapshot.keyspaces.len() as f64);
        gauge!("vasto_master_leads").set(if snapshot.leadership.is_own { 1.0 } else { 0.0 });
        gauge!("vasto_master_topology_version").set(snapshot.version as f64);
        self.topology.send_replace(Arc::new(snapshot.clone()));
    }
}

/// Writes a step of an operation to the log, and counts it.
fn log_step(step: &Step) {
    let Step { keyspace, operation, before, elapsed, waited_for } = step;
    let doing = Doing::from(operation).to_string();
    let id = operation.id;
    let took_ms = before.map_or(0, |(_, took)| took.as_millis());
    let elapsed_ms = elapsed.as_millis();
    if let Some((Phase::Fence, took)) = before {
        histogram!("vasto_master_fence_seconds").record(took.as_secs_f64());
    }
    match (operation.phase, before) {
        (Phase::Copy, Some((Phase::Fence, _))) => {
            counter!("vasto_master_fences_lifted_total").increment(1);
            warn!(keyspace, id, took_ms, waited_for, "fence lifted: the slots go back to who had them");
        }
        (Phase::Copy, _) => info!(keyspace, id, doing, "operation begins"),
        (Phase::Fence, None) | (Phase::Committed | Phase::Clean, None) => {
            info!(keyspace, id, doing, "operation goes on under this master");
        }
        (Phase::Fence, Some(_)) => info!(keyspace, id, took_ms, "fence set: slots that go elsewhere are held"),
        (Phase::Committed, Some(_)) => info!(keyspace, id, took_ms, "slots handed over"),
        (Phase::Clean, Some(_)) => info!(keyspace, id, took_ms, "all stores know; rows are deleted where they were"),
        (Phase::Done, _) => {
            counter!("vasto_master_operations_total", "end" => "done").increment(1);
            info!(keyspace, id, elapsed_ms, "operation done");
        }
        (Phase::Aborted, _) => {
            counter!("vasto_master_operations_total", "end" => "aborted").increment(1);
            warn!(keyspace, id, elapsed_ms, reason = operation.reason, "operation aborted");
        }
    }
}

fn log_changes(before: &Snapshot, after: &Snapshot) {
    for store in &after.stores {
        let was_up = before.store(store.id).is_some_and(|before| before.up);
        match (was_up, store.up) {
            (false, true) => info!(store = %store.id, address = store.address, "store up"),
            (true, false) => warn!(store = %store.id, address = store.address, "store down"),
            (true, true) | (false, false) => {}
        }
    }
    for keyspace in &after.keyspaces {
        let known = before.keyspace(keyspace.id).map(|before| before.epoch);
        if known != Some(keyspace.epoch) {
            let shards = keyspace.shards.len();
            info!(keyspace = keyspace.name, epoch = %keyspace.epoch, shards, cluster = %after.cluster, "keyspace served");
        }
    }
    for keyspace in after.dropped.difference(&before.dropped) {
        let name = before.keyspace(*keyspace).map_or("", |record| &record.name);
        info!(%keyspace, name, "keyspace dropped");
    }
    if before.waiting_for != after.waiting_for && !after.waiting_for.is_empty() {
        info!(waiting_for = after.waiting_for, "no keyspace yet");
    }
}
