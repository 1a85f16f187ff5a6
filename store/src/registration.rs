//! The store's sessions with all masters: registers, reports, votes, carries out directives; for as long as the process lives.
//!
//! Nothing here is needed to serve: without a master the store goes on with the records that it has on its disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vasto_proto::id::ClusterId;
use vasto_proto::pb::directive::Kind;
use vasto_proto::pb::master_client::MasterClient;
use vasto_proto::topology::ballot::{Accepted, Answer, Refusal, Request, Term};
use vasto_proto::topology::{Entry, Fsync, KeyspaceRecord, Peers, entry};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

use crate::StoreHandle;

/// Between two reports: the master calls a store down after 2 s without one.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);

/// Every report is acknowledged; a master that is silent for so long hangs, and its session is opened anew.
const MASTER_SILENCE_MAX: Duration = Duration::from_secs(5);

/// Reports that wait for the network; when it is full a heartbeat is left out.
const REPORT_QUEUE_MAX: usize = 8;

/// Directives that wait for the one before: what a master sends at most at a time. When it is full nothing more is read.
const WORK_QUEUE_MAX: usize = 64;

/// Between attempts to reach a master: doubles from the first to the last, minus up to a half at random, so that the
/// stores of a cluster do not come back to a restarted master all at once, yet within the silence it allows.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(1600);

/// Keeps a session with each of the masters until `shutdown`. `address` is host:port where gateways reach this store.
pub async fn run(handle: StoreHandle, masters: Vec<String>, address: String, shutdown: CancellationToken) {
    let (host, disk) = handle.host_and_disk();
    let registration = Registration { handle, address, host, disk, heard: Mutex::default() };
    // Two sessions with one master would end each other.
    let masters: BTreeSet<&String> = masters.iter().collect();
    let sessions = masters.into_iter().enumerate().map(|(number, master)| registration.keep_session(number, master));
    // Dropping a session at shutdown ends its stream; a record that is being persisted gets persisted.
    let aside = registration.handle.has_stepped_aside();
    let sessions = aside.run_until_cancelled(futures_util::future::join_all(sessions));
    // A master that hears the end of a session gives others what this store has led: not before they may have it.
    shutdown.run_until_cancelled(sessions).await;
}

struct Registration {
    handle: StoreHandle,
    address: String,
    /// Where the data lie; neither changes while the process lives.
    host: String,
    disk: String,
    heard: Mutex<Heard>,
}

/// What the masters say of themselves.
#[derive(Default)]
struct Heard {
    /// The addresses of those that have a session, by its number.
    masters: BTreeMap<usize, String>,
    leader: Option<Leader>,
}

struct Leader {
    term: Term,
    address: String,
    session: usize,
    /// Nothing when the session has ended.
    heard_at: Option<Instant>,
}

/// How a session ended.
struct Ended {
    /// The master had answered.
    was_open: bool,
    reason: String,
}

/// What came of a directive that is done.
enum Done {
    Carried,
    Voted(Vec<Result<Answer<Entry>, Refusal>>),
}

type Work = JoinHandle<Result<Done, String>>;

impl Registration {
    async fn keep_session(&self, number: usize, master: &str) {
        let store = self.handle.id();
        let mut pause = RETRY_PAUSE_MIN;
        let mut reason_before = String::new();
        loop {
            let ended = self.hold_session(number, master).await;
            self.forget(number);
            if ended.was_open {
                pause = RETRY_PAUSE_MIN;
                reason_before.clear();
            }
            // One line a reason, not one an attempt.
            if ended.reason != reason_before {
                warn!(%store, master, reason = ended.reason, "no session with this master; serving goes on, trying again");
                reason_before = ended.reason;
            }
            let jitter = pause.mul_f64(fastrand::f64() / 2.0);
            tokio::time::sleep(pause - jitter).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    async fn hold_session(&self, number: usize, master: &str) -> Ended {
        let mut was_open = false;
        let reason = match self.try_session(number, master, &mut was_open).await {
            Ok(()) => "the master ended the session".to_owned(),
            Err(reason) => reason,
        };
        Ended { was_open, reason }
    }

    async fn try_session(&self, number: usize, master: &str, was_open: &mut bool) -> Result<(), String> {
        let endpoint = net::endpoint(master).map_err(|error| describe(&error))?;
        let channel = endpoint.connect().await.map_err(|error| describe(&error))?;
        let mut client = MasterClient::new(channel).max_decoding_message_size(net::CONTROL_BYTES_MAX);
        let (reports, outgoing) = mpsc::channel(REPORT_QUEUE_MAX);
        let first = self.report(Records::All, String::new(), &[]).await;
        // The queue is new and its receiver is here.
        reports.try_send(first).map_err(|error| error.to_string())?;
        let opening = client.register(ReceiverStream::new(outgoing));
        let response = tokio::time::timeout(MASTER_SILENCE_MAX, opening).await;
        let response = response.map_err(|_| "the master does not answer".to_owned())?;
        let mut directives = response.map_err(|status| status.message().to_owned())?.into_inner();

        let mut ticks = tokio::time::interval(REPORT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut news = self.handle.news();
        let mut heard_at = Instant::now();
        // One at a time, in order, while heartbeats go on: opening a shard may take long. Votes do not wait for that.
        let (mut work, mut ballots) = (VecDeque::new(), VecDeque::new());
        let mut at_work: Option<Work> = None;
        let mut voting: Option<Work> = None;
        loop {
            if at_work.is_none() {
                at_work = work.pop_front().map(|kind| self.carry_out(kind));
            }
            if voting.is_none() {
                voting = ballots.pop_front().map(|kind| self.vote(number, master, kind));
            }
            let has_room = work.len() < WORK_QUEUE_MAX && ballots.len() < WORK_QUEUE_MAX;
            // All are cancel safe: a stream's next item, a tick, a task by reference.
            let done = tokio::select! {
                done = finished(&mut at_work) => done,
                done = finished(&mut voting) => done,
                directive = directives.next(), if has_room => {
                    heard_at = Instant::now();
                    let directive = match directive {
                        Some(directive) => directive.map_err(|status| status.message().to_owned())?,
                        None => return Ok(()),
                    };
                    if !*was_open {
                        *was_open = true;
                        info!(store = %self.handle.id(), master, address = self.address, "registered with the master");
                    }
                    match directive.kind {
                        Some(Kind::HeartbeatAck(ack)) => self.hear(number, master, ack),
                        Some(kind @ (Kind::Prepare(_) | Kind::Accept(_))) => ballots.push_back(kind),
                        Some(kind @ (Kind::Welcome(_) | Kind::PutRecord(_) | Kind::Peers(_))) => work.push_back(kind),
                        // Of a later version.
                        None => {}
                    }
                    continue;
                }
                () = due(&mut ticks, &mut news) => {
                    if has_room && heard_at.elapsed() > MASTER_SILENCE_MAX {
                        return Err("the master is silent".to_owned());
                    }
                    let report = self.report(Records::Unchanged, String::new(), &[]).await;
                    // Full: the network is slow, and the next heartbeat says the same.
                    let _ = reports.try_send(report);
                    continue;
                }
            };
            heard_at = Instant::now();
            let (records, failure, answers) = match done {
                Ok(Ok(Done::Carried)) => (Records::All, String::new(), Vec::new()),
                Ok(Ok(Done::Voted(answers))) => (Records::Unchanged, String::new(), answers),
                Ok(Err(failure)) => (Records::All, failure, Vec::new()),
                Err(panic) => (Records::All, format!("carrying out a directive panicked: {panic}"), Vec::new()),
            };
            if !failure.is_empty() {
                error!(store = %self.handle.id(), failure, "a directive of the master failed");
            }
            let report = self.report(records, failure, &answers).await;
            reports.send(report).await.map_err(|_| "the session is lost".to_owned())?;
        }
    }

    fn carry_out(&self, kind: Kind) -> Work {
        let handle = self.handle.clone();
        tokio::task::spawn_blocking(move || {
            match kind {
                Kind::Welcome(welcome) => {
                    let cluster = ClusterId(welcome.cluster_id);
                    handle.set_cluster(cluster).map_err(|error| describe(&error))?;
                    info!(store = %handle.id(), %cluster, "joined the cluster");
                }
                Kind::Peers(peers) => {
                    let known = handle.peers().borrow().clone();
                    handle.set_peers(newer_peers(&known, peers.into())).map_err(|error| describe(&error))?;
                }
                Kind::PutRecord(record) => {
                    let record = KeyspaceRecord::try_from(record).map_err(|error| describe(&error))?;
                    let (keyspace, epoch) = (record.name.clone(), record.epoch);
                    let shards = record.shards_of(handle.id()).count();
                    handle.put_record(record).map_err(|error| describe(&error))?;
                    info!(store = %handle.id(), keyspace, %epoch, shards, "record kept");
                }
                // Answered elsewhere.
                Kind::HeartbeatAck(_) | Kind::Prepare(_) | Kind::Accept(_) => {}
            }
            Ok(Done::Carried)
        })
    }

    /// Answers requests of a master that proposes, each from the disk.
    fn vote(&self, number: usize, master: &str, kind: Kind) -> Work {
        let handle = self.handle.clone();
        let (term, leader, entries) = match kind {
            Kind::Prepare(prepare) => (entry::term(prepare.term), prepare.leader, None),
            Kind::Accept(accept) => (entry::term(accept.term), accept.leader, Some(accept.entries)),
            Kind::HeartbeatAck(_) | Kind::Welcome(_) | Kind::PutRecord(_) | Kind::Peers(_) => {
                (Term::NONE, String::new(), Some(Vec::new()))
            }
        };
        // Who may ask leads, or is about to: another one leaves it the time.
        if term >= handle.promised_term() {
            self.hear_leader(number, term, named(leader, master));
        }
        tokio::task::spawn_blocking(move || {
            let requests = match entries {
                None => vec![Request::Prepare { term }],
                Some(entries) => {
                    let read = entries.into_iter().map(Entry::from_message).collect::<Result<Vec<_>, _>>();
                    let records = read.map_err(|error| describe(&error))?.into_iter().flatten();
                    records.map(|record| Request::Accept(Accepted { term, record })).collect()
                }
            };
            let vote = |request| handle.vote(request).map_err(|error| format!("cannot keep a vote: {error}"));
            Ok(Done::Voted(requests.into_iter().map(vote).collect::<Result<Vec<_>, _>>()?))
        })
    }

    fn hear(&self, number: usize, master: &str, ack: pb::HeartbeatAck) {
        let address = named(ack.master, master);
        self.heard.lock().masters.insert(number, address.clone());
        if let Some(term) = ack.leads.map(Term::from).filter(|term| *term >= self.handle.promised_term()) {
            self.hear_leader(number, term, address);
        }
    }

    fn hear_leader(&self, session: usize, term: Term, address: String) {
        self.handle.note_leader();
        let mut heard = self.heard.lock();
        if heard.leader.as_ref().is_none_or(|known| known.term <= term) {
            heard.leader = Some(Leader { term, address, session, heard_at: Some(Instant::now()) });
        }
    }

    fn forget(&self, session: usize) {
        let mut heard = self.heard.lock();
        heard.masters.remove(&session);
        if let Some(leader) = heard.leader.as_mut().filter(|leader| leader.session == session) {
            leader.heard_at = None;
        }
    }

    async fn report(
        &self,
        records: Records,
        failure: String,
        answers: &[Result<Answer<Entry>, Refusal>],
    ) -> pb::StoreReport {
        let handle = self.handle.clone();
        // Asking the file system may block.
        let asked = tokio::task::spawn_blocking(move || handle.free_disk_bytes()).await;
        let (zone, tags) = self.handle.zone_and_tags();
        let shards = self.handle.shard_statuses().iter().map(Into::into).collect();
        let has_records = match records {
            Records::All => true,
            Records::Unchanged => false,
        };
        let promised = self.handle.promised_term();
        let heard = self.heard.lock();
        // One that is overruled is no leader any more.
        let leader = heard.leader.as_ref().filter(|leader| leader.term >= promised);
        let follows = leader.map_or(promised, |leader| leader.term);
        let heard_at = leader.and_then(|leader| leader.heard_at);
        pb::StoreReport {
            store_id: self.handle.id().0,
            address: self.address.clone(),
            cluster_id: self.handle.cluster().0,
            protocol_version: PROTOCOL_VERSION,
            records: if has_records { self.handle.records().iter().map(Into::into).collect() } else { Vec::new() },
            has_records,
            free_disk_bytes: asked.unwrap_or_default(),
            zone: zone.to_owned(),
            tags: tags.to_vec(),
            disk: self.disk.clone(),
            host: self.host.clone(),
            failure,
            shards,
            fsync: Fsync::code(Some(self.handle.fsync())),
            follows: Some(follows.into()),
            leader_heard_ms: heard_at.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)),
            leader: leader.map(|leader| leader.address.clone()).unwrap_or_default(),
            group: self.handle.accepted_group().as_ref().map(Into::into),
            answers: answers.iter().map(Into::into).collect(),
            masters: heard.masters.values().cloned().collect(),
        }
    }
}

/// The next report is due: by the clock, or because there is news. Both are cancel safe.
async fn due(ticks: &mut tokio::time::Interval, news: &mut watch::Receiver<u64>) {
    tokio::select! {
        _ = ticks.tick() => {}
        // Its sender lives as long as the store.
        Ok(()) = news.changed() => {}
    }
}

/// A master that does not know how it is reached is called as this store was told.
fn named(own: String, told: &str) -> String {
    if own.is_empty() { told.to_owned() } else { own }
}

/// A master that has just started does not know of all stores, and one that was overruled knows an old group.
fn newer_peers(known: &Peers, told: Peers) -> Peers {
    let mut addresses = known.addresses.clone();
    addresses.extend(told.addresses);
    let group = if told.group.version >= known.group.version { told.group } else { known.group.clone() };
    Peers { addresses, group }
}

#[derive(Clone, Copy)]
enum Records {
    All,
    Unchanged,
}

/// The result of the work, once; never ready while there is none.
fn finished<T>(at_work: &mut Option<JoinHandle<T>>) -> impl Future<Output = Result<T, tokio::task::JoinError>> + '_ {
    std::future::poll_fn(move |context| match at_work {
        Some(task) => {
            let done = std::task::ready!(std::pin::Pin::new(task).poll(context));
            *at_work = None;
            std::task::Poll::Ready(done)
        }
        None => std::task::Poll::Pending,
    })
}

/// An error and what caused it: the text of a transport error says no more than that.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
