//! The replica's side: one task for each shard that follows a primary, as long as the record says so.

use super::apply::{ApplyError, Cursor, apply};
use super::comparison;
use super::copy::IncomingCopy;
use super::hand_over::{self, Surplus};
use super::rpc::{self, Link, NotOpen};
use crate::engine::tail::Logged;
use crate::shard::Shard;
use crate::shard::executor::Core;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use vasto_proto::id::{Epoch, ShardKey, StoreId};
use vasto_proto::pb::follower_message;
use vasto_proto::pb::leader_message::Kind;
use vasto_proto::topology::Position;
use vasto_proto::{id::ClusterId, pb};

/// Between attempts to reach the primary: doubles from the first to the last.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The last one while the primary answers that it does not lead yet: writes wait for those who follow.
const REFUSED_PAUSE_MAX: Duration = Duration::from_millis(200);

/// What a shard follows another store for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be its replica.
    Replicate,
    /// To take the end of its log and lead then.
    TakeOver,
}

/// A running follower.
pub struct Task {
    stop: CancellationToken,
    /// Its other end goes with the task.
    ended: mpsc::Receiver<()>,
}

impl Task {
    /// Ends it; what it is applying is applied when this returns.
    pub fn stop(self) {
        self.stop.cancel();
        // An error is what it waits for: the sender is gone.
        let _ = self.ended.recv();
    }
}

/// Begins to follow `leader` as what this shard is at this epoch.
pub fn start(core: &Arc<Core>, shard: &Arc<Shard>, leader: StoreId, epoch: Epoch, purpose: Purpose) -> Task {
    let stop = core.replicator.stopping();
    let (ending, ended) = mpsc::channel();
    let following = Following {
        core: Arc::clone(core),
        shard: Arc::downgrade(shard),
        key: shard.key,
        leader,
        epoch,
        purpose,
        coming: None,
        has_handed_over: false,
        stop: stop.clone(),
    };
    core.replicator.spawn(async move {
        // Dropped when nothing of the task is left.
        let _ending = ending;
        following.run().await;
    });
    Task { stop, ended }
}

struct Following {
    core: Arc<Core>,
    /// Nobody who waits keeps a shard from being closed.
    shard: Weak<Shard>,
    key: ShardKey,
    leader: StoreId,
    epoch: Epoch,
    purpose: Purpose,
    /// A copy that is not whole yet.
    coming: Option<IncomingCopy>,
    /// What only this copy had is with the primary: it needs a copy of everything.
    has_handed_over: bool,
    stop: CancellationToken,
}

/// Why a connection ended.
enum Ended {
    /// There is nothing more to do.
    Done,
    /// Come again at once.
    Again,
    /// The primary has said that its log ends.
    LogEnd,
    /// The primary is there and cannot be followed yet.
    Refused(String),
}

impl Following {
    async fn run(mut self) {
        let stop = self.stop.clone();
        let mut pause = PAUSE_MIN;
        let mut reason_before = String::new();
        loop {
            let mut was_connected = false;
            // What is being applied is applied to its end all the same: see `blocking`.
            let ended = self.follow_once(&stop, &mut was_connected).await;
            if stop.is_cancelled() {
                return;
            }
            if was_connected {
                pause = PAUSE_MIN;
                reason_before.clear();
            }
            let pause_max = match &ended {
                Ok(Ended::Refused(_)) => REFUSED_PAUSE_MAX,
                Ok(Ended::Done | Ended::Again | Ended::LogEnd) | Err(_) => PAUSE_MAX,
            };
            pause = pause.min(pause_max);
            match ended {
                Ok(Ended::Done) => return,
                Ok(Ended::Again) => continue,
                Ok(Ended::LogEnd) => {}
                Ok(Ended::Refused(reason)) | Err(reason) => {
                    // One line a reason, not one an attempt.
                    if reason != reason_before {
                        tracing::warn!(shard = %self.key, leader = %self.leader, reason, "does not follow; tries again");
                        reason_before = reason;
                    }
                }
            }
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(pause_max);
        }
    }

    fn shard(&self) -> Result<Arc<Shard>, String> {
        self.shard.upgrade().filter(|shard| !shard.is_failed()).ok_or_else(|| "the shard is being closed".to_owned())
    }

    /// Does something that waits for the disk, to its end whatever happens.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Core>, &Arc<Shard>) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let (core, shard) = (Arc::clone(&self.core), self.shard()?);
        let done = tokio::task::spawn_blocking(move || work(&core, &shard)).await;
        done.unwrap_or_else(|error| Err(format!("following panicked: {error}")))
    }

    async fn follow_once(&mut self, stop: &CancellationToken, was_connected: &mut bool) -> Result<Ended, String> {
        let address = self.core.replicator.address_of(self.leader)?;
        let cluster = self.core.replicator.cluster();
        let position = {
            let shard = self.shard()?;
            let state = shard.replication.state.lock();
            state.position(shard.database.sequence()).filter(|_| !self.has_handed_over)
        };
        let open = pb::FollowOpen {
            store_id: self.core.replicator.store.0,
            keyspace_id: self.key.keyspace.0,
            shard: u32::from(self.key.shard.0),
            epoch: self.epoch.0,
            position: position.map(Into::into),
            copy_id: self.coming.as_ref().map_or(0, |coming| coming.id),
            copy_bytes: self.coming.as_ref().map_or(0, |coming| coming.bytes),
        };
        let opening = stop.run_until_cancelled(Link::open(&address, cluster, open)).await;
        let mut link = match opening {
            None => return Ok(Ended::Done),
            Some(Ok(link)) => link,
            Some(Err(NotOpen::Unreachable(reason))) => return Err(reason),
            Some(Err(NotOpen::Refused(reason))) => return Ok(Ended::Refused(reason)),
        };
        *was_connected = true;
        let mut cursor: Option<Cursor> = None;
        // Nobody wants digests that are not there when the connection ends.
        let connected = stop.child_token();
        let _connected = connected.clone().drop_guard();
        loop {
            let Some(next) = stop.run_until_cancelled(link.next()).await else { return Ok(Ended::Done) };
            match next? {
                None => return Ok(Ended::LogEnd),
                Some(Kind::LogStart(start)) => {
                    let at = start.position.map(Position::from).ok_or("the log starts nowhere")?;
                    let position = position.ok_or("the log starts for a copy that is none")?;
                    self.coming = None;
                    cursor = Some(Cursor { after: at.sequence, led: start.led.then_some(at.era), position });
                    tracing::info!(shard = %self.key, leader = %self.leader, %position, "follows");
                    link.confirm(at.sequence)?;
                }
                // A sign of life while a copy is being made.
                Some(Kind::LogPart(_)) if cursor.is_none() => {}
                Some(Kind::LogPart(part)) => {
                    let Some(at) = cursor else { continue };
                    let batches: Option<Vec<Logged>> = part.batches.into_iter().map(Logged::read).collect();
                    let batches = batches.ok_or("a batch of the log is malformed")?;
                    let replicated_ns = part.replicated_ns;
                    let moved = self.blocking(move |core, shard| {
                        let mut at = at;
                        let applied =
                            if batches.is_empty() { Ok(()) } else { apply(&core.stripes, shard, &mut at, &batches) };
                        shard.learn_replicated_ns(replicated_ns);
                        Ok((at, applied))
                    });
                    let (moved, applied) = moved.await?;
                    match applied {
                        Ok(()) => {}
                        Err(ApplyError::Foreign) => {
                            // Nothing that is tried again would go better.
                            self.has_handed_over = true;
                            return Err(ApplyError::Foreign.to_string());
                        }
                        Err(error @ (ApplyError::Gap { .. } | ApplyError::Engine(_) | ApplyError::NotSynced)) => {
                            return Err(error.to_string());
                        }
                    }
                    cursor = Some(moved);
                    link.confirm(moved.after)?;
                }
                // It comes right behind what is applied now.
                Some(Kind::DigestRequest(request)) => self.digest(request, &link, connected.clone()).await?,
                Some(Kind::HandOver(request)) => return self.hand_over(&address, cluster, position, request).await,
                Some(Kind::CopyStart(start)) => {
                    cursor = None;
                    self.begin_copy(start).await?;
                }
                Some(Kind::CopyPart(part)) => {
                    let mut coming = self.coming.take().ok_or("a part of no copy")?;
                    let taken = self.blocking(move |_, _| {
                        coming.take(&part.data).map_err(|error| error.to_string())?;
                        Ok(coming)
                    });
                    self.coming = Some(taken.await?);
                }
                Some(Kind::CopyEnd(end)) => return self.end_copy(end.checksums).await,
                Some(Kind::LogEnd(end)) => {
                    let end = end.position.map(Position::from).ok_or("the log ends nowhere")?;
                    let ended = self.log_ended(end, cursor).await;
                    // Answers of the old primary wait for what was confirmed last.
                    stop.run_until_cancelled(link.finish()).await;
                    return ended;
                }
            }
        }
    }

    /// Digests what is here at this moment, while the log is followed on.
    async fn digest(
        &self,
        request: pb::DigestRequest,
        link: &Link,
        connected: CancellationToken,
    ) -> Result<(), String> {
        let (core, shard, answers) = (Arc::clone(&self.core), self.shard()?, link.sender());
        let (standing, stands) = oneshot::channel();
        self.core.replicator.spawn_blocking(move || {
            let digests = comparison::answer(&core, &shard, &request, standing, &connected);
            drop(shard);
            let kind = Some(follower_message::Kind::Digests(digests));
            // Gone is gone.
            let _ = answers.blocking_send(pb::FollowerMessage { kind });
        });
        // Dropped without a word if the rows cannot be read, which the answer says.
        let _ = stands.await;
        Ok(())
    }

    /// Gives the primary what only this copy has.
    async fn hand_over(
        &mut self,
        address: &str,
        cluster: ClusterId,
        position: Option<Position>,
        request: pb::HandOverRequest,
    ) -> Result<Ended, String> {
        let common = request.common.map(Position::from);
        let surplus = self
            .blocking(move |_, shard| {
                let surplus = hand_over::surplus(shard, common).map_err(|error| error.to_string())?;
                if let Surplus::Nothing { common } = &surplus {
                    hand_over::step_back(shard, *common).map_err(|error| error.to_string())?;
                }
                Ok(surplus)
            })
            .await?;
        if let Surplus::Nothing { common } = surplus {
            tracing::info!(shard = %self.key, leader = %self.leader, %common, "has nothing that its primary lacks");
            return Ok(Ended::Again);
        }
        let first = pb::HandOverMessage {
            store_id: self.core.replicator.store.0,
            keyspace_id: self.key.keyspace.0,
            shard: u32::from(self.key.shard.0),
            epoch: self.epoch.0,
            position: position.map(Into::into),
            ..Default::default()
        };
        let (sender, messages) = rpc::handed();
        let giving = self.blocking(move |_, shard| {
            let give = |message| sender.blocking_send(message).is_ok();
            hand_over::messages(shard, &surplus, first, give).map_err(|error| error.to_string())
        });
        let handing = async { tokio::join!(giving, rpc::hand_over(address, cluster, messages)) };
        // A primary that hangs must not keep the record from being followed.
        let Some((given, answered)) = self.stop.run_until_cancelled(handing).await else { return Ok(Ended::Done) };
        let (given, answered) = (given?, answered?);
        let pb::HandOverResponse { merged, older, quarantined } = answered;
        tracing::info!(shard = %self.key, leader = %self.leader, given, merged, older, quarantined, "handed over what only this copy had");
        if let Some(shard) = self.shard.upgrade() {
            shard.replication.counts.handed_over_rows.fetch_add(given, Ordering::Relaxed);
        }
        self.has_handed_over = true;
        Ok(Ended::Again)
    }

    async fn begin_copy(&mut self, start: pb::CopyStart) -> Result<(), String> {
        let goes_on =
            self.coming.as_ref().is_some_and(|coming| (coming.id, coming.bytes) == (start.copy_id, start.from_bytes));
        if goes_on {
            tracing::info!(shard = %self.key, bytes = start.from_bytes, "the copy goes on");
            return Ok(());
        }
        self.coming = None;
        let key = self.key;
        let begun = self.blocking(move |core, _| {
            IncomingCopy::begin(&core.replicator.shards, key, &start).map_err(|error| error.to_string())
        });
        self.coming = Some(begun.await?);
        Ok(())
    }

    /// The copy has come: whoever opens the shard next puts it in the place of what is there.
    async fn end_copy(&mut self, checksums: Vec<u32>) -> Result<Ended, String> {
        let coming = self.coming.take().ok_or("the end of no copy")?;
        let key = self.key;
        let finished = self.blocking(move |core, shard| {
            let shards = &core.replicator.shards;
            let finished = coming.finish(&core.engine, shards, key, &checksums);
            let position = finished.map_err(|error| error.to_string())?;
            shard.replication.replace();
            core.alarm.ring();
            Ok(position)
        });
        let position = finished.await?;
        tracing::info!(shard = %self.key, leader = %self.leader, %position, "a whole copy has come");
        Ok(Ended::Done)
    }

    async fn log_ended(&mut self, end: Position, cursor: Option<Cursor>) -> Result<Ended, String> {
        match self.purpose {
            Purpose::Replicate => Ok(Ended::LogEnd),
            Purpose::TakeOver
                if cursor.is_some_and(|cursor| cursor.position >= end || cursor.after >= end.sequence) =>
            {
                let epoch = self.epoch;
                self.blocking(move |_, shard| {
                    shard.replication.state.lock().takes_over = false;
                    // Else with the first lease.
                    if shard.lease.wanted().is_none() {
                        super::begin_leading(shard, epoch).map_err(|error| error.to_string())?;
                    }
                    Ok(())
                })
                .await?;
                Ok(Ended::Done)
            }
            Purpose::TakeOver => Err(format!("the log of the old primary ends at {end}, which has not come")),
        }
    }
}
