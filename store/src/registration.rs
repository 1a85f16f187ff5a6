//! The store's session with the master: registers, reports, carries out directives; for as long as the process lives.
//!
//! Nothing here is needed to serve: without a master the store goes on with the records that it has on its disk.

use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vasto_proto::id::ClusterId;
use vasto_proto::pb::master_client::MasterClient;
use vasto_proto::topology::{Fsync, KeyspaceRecord};
use vasto_proto::{PROTOCOL_VERSION, net, pb};

use crate::StoreHandle;

/// Between two reports: the master calls a store down after 2 s without one.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);

/// Every report is acknowledged; a master that is silent for so long hangs, and another address is tried.
const MASTER_SILENCE_MAX: Duration = Duration::from_secs(5);

/// Reports that wait for the network; when it is full a heartbeat is left out.
const REPORT_QUEUE_MAX: usize = 8;

/// Between attempts to reach a master: doubles from the first to the last, minus up to a half at random, so that the
/// stores of a cluster do not come back to a restarted master all at once, yet within the silence it allows.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(1600);

/// Keeps a session with one of the masters until `shutdown`. `address` is host:port where gateways reach this store.
pub async fn run(handle: StoreHandle, masters: Vec<String>, address: String, shutdown: CancellationToken) {
    let store = handle.id();
    let (host, disk) = handle.host_and_disk();
    let registration = Registration { handle, address, host, disk };
    let mut pause = RETRY_PAUSE_MIN;
    let mut reason_before = String::new();
    for master in masters.iter().cycle() {
        // Dropping a session at shutdown ends its stream; a record that is being persisted gets persisted.
        let Some(ended) = shutdown.run_until_cancelled(registration.hold_session(master)).await else {
            return;
        };
        if ended.was_open {
            pause = RETRY_PAUSE_MIN;
            reason_before.clear();
        }
        // One line a reason, not one an attempt.
        if ended.reason != reason_before {
            warn!(%store, master, reason = ended.reason, "no master; serving goes on, trying again");
            reason_before = ended.reason;
        }
        let jitter = pause.mul_f64(fastrand::f64() / 2.0);
        if shutdown.run_until_cancelled(tokio::time::sleep(pause - jitter)).await.is_none() {
            return;
        }
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

struct Registration {
    handle: StoreHandle,
    address: String,
    /// Where the data lie; neither changes while the process lives.
    host: String,
    disk: String,
}

/// How a session ended.
struct Ended {
    /// The master had answered.
    was_open: bool,
    reason: String,
}

impl Registration {
    async fn hold_session(&self, master: &str) -> Ended {
        let mut was_open = false;
        let reason = match self.try_session(master, &mut was_open).await {
            Ok(()) => "the master ended the session".to_owned(),
            Err(reason) => reason,
        };
        Ended { was_open, reason }
    }

    async fn try_session(&self, master: &str, was_open: &mut bool) -> Result<(), String> {
        let endpoint = net::endpoint(master).map_err(|error| describe(&error))?;
        let channel = endpoint.connect().await.map_err(|error| describe(&error))?;
        let mut client = MasterClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX);
        let (reports, outgoing) = mpsc::channel(REPORT_QUEUE_MAX);
        let first = self.report(Records::All, String::new()).await;
        // The queue is new and its receiver is here.
        reports.try_send(first).map_err(|error| error.to_string())?;
        let opening = client.register(ReceiverStream::new(outgoing));
        let response = tokio::time::timeout(MASTER_SILENCE_MAX, opening).await;
        let response = response.map_err(|_| "the master does not answer".to_owned())?;
        let mut directives = response.map_err(|status| status.message().to_owned())?.into_inner();

        let mut ticks = tokio::time::interval(REPORT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard_at = Instant::now();
        // One directive at a time, in order, while heartbeats go on: opening a shard may take long.
        let mut at_work: Option<JoinHandle<Result<(), String>>> = None;
        loop {
            // All are cancel safe: a stream's next item, a tick, a task by reference.
            tokio::select! {
                done = finished(&mut at_work) => {
                    heard_at = Instant::now();
                    let failure = match done {
                        Ok(Ok(())) => String::new(),
                        Ok(Err(failure)) => failure,
                        Err(panic) => format!("carrying out a directive panicked: {panic}"),
                    };
                    if !failure.is_empty() {
                        error!(store = %self.handle.id(), failure, "a directive of the master failed");
                    }
                    let report = self.report(Records::All, failure).await;
                    reports.send(report).await.map_err(|_| "the session is lost".to_owned())?;
                }
                directive = directives.next(), if at_work.is_none() => {
                    heard_at = Instant::now();
                    let directive = match directive {
                        Some(directive) => directive.map_err(|status| status.message().to_owned())?,
                        None => return Ok(()),
                    };
                    if !*was_open {
                        *was_open = true;
                        info!(store = %self.handle.id(), master, address = self.address, "registered with the master");
                    }
                    at_work = self.carry_out(directive);
                }
                _ = ticks.tick() => {
                    if at_work.is_none() && heard_at.elapsed() > MASTER_SILENCE_MAX {
                        return Err("the master is silent".to_owned());
                    }
                    let report = self.report(Records::Unchanged, String::new()).await;
                    // Full: the network is slow, and the next heartbeat says the same.
                    let _ = reports.try_send(report);
                }
            }
        }
    }

    fn carry_out(&self, directive: pb::Directive) -> Option<JoinHandle<Result<(), String>>> {
        let handle = self.handle.clone();
        match directive.kind? {
            pb::directive::Kind::HeartbeatAck(pb::HeartbeatAck {}) => None,
            pb::directive::Kind::Welcome(welcome) => Some(tokio::task::spawn_blocking(move || {
                let cluster = ClusterId(welcome.cluster_id);
                handle.set_cluster(cluster).map_err(|error| describe(&error))?;
                info!(store = %handle.id(), %cluster, "joined the cluster");
                Ok(())
            })),
            pb::directive::Kind::PutRecord(record) => Some(tokio::task::spawn_blocking(move || {
                let record = KeyspaceRecord::try_from(record).map_err(|error| describe(&error))?;
                let (keyspace, epoch) = (record.name.clone(), record.epoch);
                let shards = record.shards_of(handle.id()).count();
                handle.put_record(record).map_err(|error| describe(&error))?;
                info!(store = %handle.id(), keyspace, %epoch, shards, "record kept");
                Ok(())
            })),
        }
    }

    async fn report(&self, records: Records, failure: String) -> pb::StoreReport {
        let handle = self.handle.clone();
        // Asking the file system may block.
        let asked = tokio::task::spawn_blocking(move || handle.free_disk_bytes()).await;
        let (zone, tags) = self.handle.zone_and_tags();
        let has_records = match records {
            Records::All => true,
            Records::Unchanged => false,
        };
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
            fsync: Fsync::code(Some(self.handle.fsync())),
        }
    }
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
