//! The primary's side of one follower: says where it stands, sends a copy if it must, then the log to its end.

use super::apply::find_carried;
use super::copy::OutgoingCopy;
use super::history::Place;
use super::state::{Part, Renewal};
use crate::engine::tail::Behind;
use crate::engine::{Tier, meta};
use crate::shard::Shard;
use crate::shard::executor::{Core, now_ns};
use crate::shard::map::Entry;
use futures_util::{Stream, StreamExt};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use vasto_proto::id::{ShardKey, StoreId};
use vasto_proto::pb;
use vasto_proto::pb::leader_message::Kind;
use vasto_proto::topology::{Position, Role};

/// Without anything to send: so that both ends know of each other, and how far behind the follower is.
const HEARTBEAT: Duration = Duration::from_millis(100);
/// Batches that travel in one message.
const PART_BYTES: usize = 256 << 10;
/// What is read from the log's files at once: each visit reads a file from its start.
const FILE_PART_BYTES: usize = 4 << 20;
/// Between two parts of the log writes gather for so long at least, unless answers wait for copies. Each part wakes both stores and is a
/// write to the follower's disk: under a load of small writes, sent as they come they cost more than the writes themselves.
const GATHERING: Duration = Duration::from_millis(1);
/// Messages that wait for the network.
pub const MESSAGES_MAX: usize = 4;

/// Messages of one follower; the text of an error is for people.
pub type Outgoing = mpsc::Sender<Result<pb::LeaderMessage, String>>;

/// What a follower says.
#[derive(Debug)]
pub enum Heard {
    /// Up to where in the log it has everything.
    Applied(u64),
    Digests(pb::FollowDigests),
}

/// One follower's connection.
pub struct Connection {
    core: Arc<Core>,
    /// Nobody who waits keeps a shard from being closed.
    shard: Weak<Shard>,
    key: ShardKey,
    store: StoreId,
    number: u64,
    open: pb::FollowOpen,
}

/// The shard that a store may follow here, if it may.
pub fn find(core: &Core, key: ShardKey, store: StoreId, epoch: u64) -> Result<Arc<Shard>, String> {
    let shard = match core.shards.current().entry(key) {
        Some(Entry::Serving(shard)) if !shard.is_failed() => Arc::clone(shard),
        Some(Entry::Serving(_) | Entry::Opening | Entry::Closing(_) | Entry::Failed(_)) | None => {
            return Err(format!("shard {key} is not open here"));
        }
    };
    if shard.epoch().0 != epoch {
        return Err(format!("shard {key} is at epoch {}, not {epoch}", shard.epoch()));
    }
    {
        let state = shard.replication.state.lock();
        let may_follow = |part: &Part| match part.role {
            Role::Primary => state.era.is_some() && part.is_followed_by(store),
            // It takes the end of the log, and leads then.
            Role::Replica => part.previous == core.replicator.store && part.primary == store && state.end.is_some(),
        };
        if !state.part.as_ref().is_some_and(may_follow) {
            return Err(format!("shard {key} does not lead here, or store {store} has no part in it"));
        }
    }
    Ok(shard)
}

/// What a follower is told first.
enum Answer {
    Log { sequence: u64, led: bool, position: Position },
    HandOver { common: Option<Position> },
    Copy,
}

/// What is sent between two parts of the log.
enum Wanted {
    Nothing,
    /// Digests of exactly what the log up to `at` makes.
    Digests {
        at: u64,
        request: pb::DigestRequest,
    },
    Copy,
}

impl Connection {
    pub fn new(core: &Arc<Core>, shard: &Arc<Shard>, open: pb::FollowOpen) -> Self {
        let store = StoreId(open.store_id);
        let number = shard.replication.state.lock().connected(store);
        Self { core: Arc::clone(core), shard: Arc::downgrade(shard), key: shard.key, store, number, open }
    }

    /// Serves the follower until it goes, the log ends or the store stops.
    pub async fn run(
        self,
        progress: impl Stream<Item = Heard> + Unpin + Send,
        outgoing: Outgoing,
        shutdown: CancellationToken,
    ) {
        let stop = self.core.replicator.stopping();
        let serving = shutdown.run_until_cancelled(self.serve(progress, &outgoing));
        let served = stop.run_until_cancelled(serving).await.flatten();
        if let Some(Err(reason)) = served {
            tracing::debug!(shard = %self.key, follower = %self.store, reason, "a follower is served no more");
            // Gone is gone.
            let _ = outgoing.try_send(Err(reason));
        }
        if let Some(shard) = self.shard.upgrade() {
            if let Some(follower) = shard.replication.state.lock().follower(self.store, self.number) {
                follower.connected = false;
                follower.follows = false;
                follower.asked = None;
            }
            shard.count_followers();
        }
    }

    fn shard(&self) -> Result<Arc<Shard>, String> {
        self.shard.upgrade().filter(|shard| !shard.is_failed()).ok_or_else(|| "the shard is being closed".to_owned())
    }

    /// Does something with the shard that may wait for the disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Core, &Shard) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let (core, shard) = (Arc::clone(&self.core), self.shard()?);
        let done = tokio::task::spawn_blocking(move || work(&core, &shard)).await;
        done.unwrap_or_else(|error| Err(format!("serving a follower panicked: {error}")))
    }

    async fn serve(
        &self,
        mut progress: impl Stream<Item = Heard> + Unpin + Send,
        outgoing: &Outgoing,
    ) -> Result<(), String> {
        let position = self.open.position.map(Position::from);
        let renewal = self.shard()?.replication.state.lock().renewal(self.store, position);
        if renewal == Renewal::Done {
            tracing::info!(shard = %self.key, follower = %self.store, "the copy that differed is made anew");
            self.core.counters.repaired();
        }
        let answer = match position {
            None => Answer::Copy,
            Some(_) if renewal == Renewal::Needed => Answer::Copy,
            Some(position) => self.blocking(move |_, shard| answer(shard, position)).await?,
        };
        match answer {
            Answer::Log { sequence, led, position } => {
                let start = pb::LogStart { position: Some(position.into()), led };
                send(outgoing, Kind::LogStart(start)).await?;
                tracing::info!(shard = %self.key, follower = %self.store, sequence, "a follower goes on in the log");
                self.send_log(sequence, &mut progress, outgoing).await
            }
            Answer::HandOver { common } => {
                let common = common.map(Into::into);
                send(outgoing, Kind::HandOver(pb::HandOverRequest { common })).await
            }
            Answer::Copy => self.send_copy(outgoing).await,
        }
    }

    async fn send_log(
        &self,
        mut after: u64,
        progress: &mut (impl Stream<Item = Heard> + Unpin + Send),
        outgoing: &Outgoing,
    ) -> Result<(), String> {
        let mut latest: watch::Receiver<u64> = {
            let shard = self.shard()?;
            let mut state = shard.replication.state.lock();
            let Some(follower) = state.follower(self.store, self.number) else { return Ok(()) };
            follower.follows = true;
            follower.applied = after;
            shard.replication.counts.partial_resumes.fetch_add(1, Ordering::Relaxed);
            shard.database.tail().latest()
        };
        self.confirmed(after)?;
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut sent_at = None;
        loop {
            if let Some(sent_at) = sent_at
                && self.gathers(after)?
            {
                // Both are cancel safe: a stream's next item, time.
                tokio::select! {
                    heard = progress.next() => match heard {
                        Some(heard) => {
                            self.heard(heard)?;
                            continue;
                        }
                        None => return Ok(()),
                    },
                    () = tokio::time::sleep_until(sent_at + GATHERING) => {}
                }
            }
            sent_at = None;
            latest.borrow_and_update();
            let (end, behind) = {
                let shard = self.shard()?;
                let end = {
                    let mut state = shard.replication.state.lock();
                    if state.follower(self.store, self.number).is_none() {
                        return Err("a newer connection of this follower is there".to_owned());
                    }
                    match (state.era, state.end) {
                        (Some(_), _) => None,
                        (None, Some(end)) => Some(end),
                        (None, None) => return Err("the shard leads no more".to_owned()),
                    }
                };
                (end, shard.database.tail().ring.lock().behind(after, shard.database.sequence(), PART_BYTES))
            };
            let behind = match behind {
                Behind::Older => {
                    let read = move |_: &Core, shard: &Shard| {
                        shard.database.log_behind(after, FILE_PART_BYTES).map_err(|error| error.to_string())
                    };
                    self.blocking(read).await?
                }
                in_memory => in_memory,
            };
            let mut batches = match behind {
                Behind::Batches(batches) => batches,
                Behind::Nothing => Vec::new(),
                // Its position is still good, but what is behind it is gone.
                Behind::Older => return self.send_copy(outgoing).await,
            };
            if let Some(end) = end {
                batches.retain(|batch| batch.last <= end.sequence);
                if batches.is_empty() {
                    send(outgoing, Kind::LogEnd(pb::LogEnd { position: Some(end.into()) })).await?;
                    // What it confirms now may release answers; it goes when it has all.
                    while let Some(heard) = progress.next().await {
                        self.heard(heard)?;
                    }
                    return Ok(());
                }
            }
            // Looked for when the batches are here: those behind the place of a request are none of these, or are held back.
            match self.asked(after)? {
                Wanted::Nothing => {}
                Wanted::Copy => return self.send_copy(outgoing).await,
                Wanted::Digests { at, request } if at == after => {
                    send(outgoing, Kind::DigestRequest(request)).await?;
                    continue;
                }
                Wanted::Digests { at, .. } => {
                    batches.retain(|batch| batch.last <= at);
                    if batches.is_empty() {
                        continue;
                    }
                }
            }
            if let Some(last) = batches.last() {
                after = last.last;
                // Who has far to go does not wait.
                let is_full = batches.iter().map(|batch| batch.data.len()).sum::<usize>() > PART_BYTES / 2;
                self.send_batches(batches, outgoing).await?;
                sent_at = (!is_full).then(tokio::time::Instant::now);
                // What has come meanwhile; whoever only sends would never hear.
                while let Some(Some(heard)) = futures_util::FutureExt::now_or_never(progress.next()) {
                    self.heard(heard)?;
                }
                continue;
            }
            // All are cancel safe: a stream's next item, a change of a watch, a tick.
            tokio::select! {
                heard = progress.next() => match heard {
                    Some(heard) => self.heard(heard)?,
                    None => return Ok(()),
                },
                changed = latest.changed() => changed.map_err(|_| "the shard is being closed".to_owned())?,
                _ = heartbeat.tick() => self.send_batches(Vec::new(), outgoing).await?,
            }
        }
    }

    /// Whether what is behind `after`, up to where the log was sent just now, had better not follow at once. Where answers wait for copies
    /// it follows as soon as the follower has that.
    fn gathers(&self, after: u64) -> Result<bool, String> {
        let shard = self.shard()?;
        if shard.replication.min_replicas() == 0 {
            return Ok(true);
        }
        let mut state = shard.replication.state.lock();
        Ok(state.follower(self.store, self.number).is_some_and(|follower| follower.applied < after))
    }

    /// Sends batches in messages of about [`PART_BYTES`]; without any, a heartbeat.
    async fn send_batches(&self, batches: Vec<crate::engine::tail::Logged>, outgoing: &Outgoing) -> Result<(), String> {
        let mut batches = batches.into_iter().peekable();
        loop {
            let (mut part, mut bytes, mut last) = (Vec::new(), 0, None);
            while let Some(batch) = batches.next_if(|batch| bytes == 0 || bytes + batch.data.len() <= PART_BYTES) {
                bytes += batch.data.len();
                last = Some(batch.last);
                part.push(batch.data);
            }
            let (latest, replicated_ns) = {
                let shard = self.shard()?;
                if let Some(last) = last {
                    shard.replication.state.lock().sent(self.store, self.number, last);
                }
                (shard.database.sequence(), shard.replication.replicated_ns())
            };
            let part = pb::LogPart { batches: part, latest, sent_ns: now_ns(), replicated_ns };
            send(outgoing, Kind::LogPart(part)).await?;
            if batches.peek().is_none() {
                return Ok(());
            }
        }
    }

    /// What this follower, which has been sent the log up to `after`, is to be sent before more of it.
    fn asked(&self, after: u64) -> Result<Wanted, String> {
        let shard = self.shard()?;
        let mut state = shard.replication.state.lock();
        let is_renewed = state.renewals.contains_key(&self.store);
        let Some(follower) = state.follower(self.store, self.number) else { return Ok(Wanted::Nothing) };
        if is_renewed {
            follower.follows = false;
            follower.asked = None;
            drop(state);
            shard.count_followers();
            return Ok(Wanted::Copy);
        }
        // One whose place has passed is never answered rightly.
        let asked = follower.asked.take_if(|asked| !asked.is_sent && asked.at < after);
        drop(asked);
        let Some(asked) = follower.asked.as_mut().filter(|asked| !asked.is_sent) else { return Ok(Wanted::Nothing) };
        asked.is_sent = asked.at == after;
        Ok(Wanted::Digests { at: asked.at, request: asked.request })
    }

    fn heard(&self, heard: Heard) -> Result<(), String> {
        match heard {
            Heard::Applied(applied) => self.confirmed(applied),
            Heard::Digests(digests) => {
                let shard = self.shard()?;
                let mut state = shard.replication.state.lock();
                let follower = state.follower(self.store, self.number);
                if let Some(asked) =
                    follower.and_then(|follower| follower.asked.take_if(|asked| asked.request.id == digests.id))
                {
                    asked.answer(self.store, digests);
                }
                Ok(())
            }
        }
    }

    fn confirmed(&self, applied: u64) -> Result<(), String> {
        let shard = self.shard()?;
        shard.replication.state.lock().confirmed(self.store, self.number, applied);
        shard.count_followers();
        Ok(())
    }

    /// Sends a whole copy, or what is left of one.
    async fn send_copy(&self, outgoing: &Outgoing) -> Result<(), String> {
        let store = self.store;
        let making = self.blocking(move |core, shard| make_copy(core, shard, store));
        tokio::pin!(making);
        // A checkpoint of a large shard takes its time.
        let copy = loop {
            tokio::select! {
                made = &mut making => break made?,
                () = tokio::time::sleep(HEARTBEAT) => send(outgoing, Kind::LogPart(pb::LogPart::default())).await?,
            }
        };
        let mut from = if copy.id == self.open.copy_id { self.open.copy_bytes.min(copy.bytes()) } else { 0 };
        tracing::info!(shard = %self.key, follower = %self.store, bytes = copy.bytes(), from, "sends a copy");
        send(outgoing, Kind::CopyStart(copy.start(from))).await?;
        loop {
            let reading = Arc::clone(&copy);
            let part = self
                .blocking(move |_, shard| {
                    shard.replication.state.lock().copies();
                    reading.read(from).map_err(|error| error.to_string())
                })
                .await?;
            if part.is_empty() {
                break;
            }
            from += part.len() as u64;
            send(outgoing, Kind::CopyPart(pb::CopyPart { data: part.into() })).await?;
        }
        let reading = Arc::clone(&copy);
        let checksums = self.blocking(move |_, _| reading.checksums().map_err(|error| error.to_string())).await?;
        send(outgoing, Kind::CopyEnd(pb::CopyEnd { checksums })).await?;
        copy.is_sent();
        let shard = self.shard()?;
        shard.replication.counts.full_copies.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// What a follower's position means here.
fn answer(shard: &Shard, position: Position) -> Result<Answer, String> {
    let latest = shard.database.sequence();
    let (place, own) = {
        let state = shard.replication.state.lock();
        let Some((log, now)) = state.log.zip(state.position(latest)) else { return Ok(Answer::Copy) };
        (state.history.place(log, now, position), now)
    };
    Ok(match place {
        Place::At { sequence, led: true } => {
            Answer::Log { sequence, led: true, position: Position { sequence, ..position } }
        }
        Place::At { sequence, led: false } => {
            Answer::Log { sequence, led: false, position: Position { era: own.era, sequence } }
        }
        Place::Carried => match find_carried(&shard.database, position).map_err(|error| error.to_string())? {
            Some(sequence) => Answer::Log { sequence, led: false, position: Position { era: own.era, sequence } },
            None => Answer::Copy,
        },
        Place::Ahead { common } => Answer::HandOver { common },
    })
}

/// Lets the log have something that a copy which differs has not, before the new one is begun: by its position it can be told then.
fn cut_off(shard: &Shard, store: StoreId) -> Result<(), String> {
    if shard.replication.state.lock().renewals.get(&store) != Some(&None) {
        return Ok(());
    }
    let cut = shard.database.sequence();
    shard.database.put_meta(meta::PROBE, &[], Tier::Disk).map_err(|error| error.to_string())?;
    let mut state = shard.replication.state.lock();
    state.copies.remove(&store);
    if let Some(renewal) = state.renewals.get_mut(&store) {
        *renewal = Some(cut);
    }
    Ok(())
}

fn make_copy(core: &Core, shard: &Shard, store: StoreId) -> Result<Arc<OutgoingCopy>, String> {
    cut_off(shard, store)?;
    let era = {
        let mut state = shard.replication.state.lock();
        // None is deleted that a copy in the making may need.
        state.copies();
        state.copies.retain(|_, copy| !copy.is_forgotten());
        if let Some(copy) = state.copies.get(&store) {
            return Ok(Arc::clone(copy));
        }
        state.era.ok_or_else(|| "the shard leads no more".to_owned())?
    };
    shard.database.keep_files(true).map_err(|error| error.to_string())?;
    let position = Position { era, sequence: shard.database.sequence() };
    let copy = OutgoingCopy::make(&shard.database, &core.replicator.shards, shard.key, position);
    let copy = Arc::new(copy.map_err(|error| error.to_string())?);
    let mut state = shard.replication.state.lock();
    if state.era != Some(era) {
        return Err("the shard leads no more".to_owned());
    }
    state.copies.insert(store, Arc::clone(&copy));
    Ok(copy)
}

async fn send(outgoing: &Outgoing, kind: Kind) -> Result<(), String> {
    let message = pb::LeaderMessage { kind: Some(kind) };
    outgoing.send(Ok(message)).await.map_err(|_| "the follower is gone".to_owned())
}
