//! Compares a shard's copies at one place of its log, and has those made anew that differ.
//!
//! The primary digests what it has behind a batch; each follower that is in sync is asked right behind that batch. So writes go on meanwhile.

use super::state::{Part, followers};
use crate::shard::Shard;
use crate::shard::executor::{Core, now_ns};
use crate::shard::map::Entry;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use vasto_proto::digest::{Digests, SlotDigest};
use vasto_proto::id::{ShardKey, StoreId};
use vasto_proto::pb;

/// Rows that expire within this do not count: a copy whose clock is ahead may have buried them already, and a follower comes to the place
/// of the comparison later than its primary.
const EXPIRY_MARGIN_MS: u64 = 60_000;
/// What a comparison that nobody waits for reads: little beside what a disk gives.
const BACKGROUND_BYTES_PER_SECOND: u64 = 16 << 20;
/// How long a follower may take longer than its primary.
const ANSWER_MAX: Duration = Duration::from_secs(600);
/// How often whoever waits looks whether that makes sense still.
const LOOK: Duration = Duration::from_millis(100);
/// How often it is looked whether a comparison is due.
const ROUND: Duration = Duration::from_secs(1);
/// Slots that a log line names.
const SLOTS_NAMED_MAX: usize = 16;

/// How fast a comparison reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    AtOnce,
    InBackground,
}

impl Haste {
    /// 0 = without limit.
    fn bytes_per_second(self) -> u64 {
        match self {
            Self::AtOnce => 0,
            Self::InBackground => BACKGROUND_BYTES_PER_SECOND,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    pub rows: u64,
    /// Other copies that were compared.
    pub copies: usize,
    /// In all of them together.
    pub slots_differing: usize,
    /// Which copies differ, and which were not compared and why; empty = there is nothing to say.
    pub text: String,
}

/// What a follower is asked, and where the answer goes.
#[derive(Debug)]
pub struct Asked {
    pub request: pb::DigestRequest,
    /// The number of the last entry of the log that it is to have.
    pub at: u64,
    pub is_sent: bool,
    answers: mpsc::SyncSender<(StoreId, pb::FollowDigests)>,
}

impl Asked {
    pub fn answer(self, store: StoreId, digests: pb::FollowDigests) {
        // There is room for one of each; whoever asked may be gone.
        let _ = self.answers.try_send((store, digests));
    }
}

/// Whether the shard is still what the map has.
fn is_current(core: &Core, shard: &Shard) -> bool {
    let map = core.shards.current();
    let is_same = |entry: &Entry| matches!(entry, Entry::Serving(serving) if serving.instance == shard.instance);
    map.entry(shard.key).is_some_and(is_same) && !shard.is_failed() && !core.replicator.stop.is_cancelled()
}

/// Waits after so many bytes for as long as they may take.
fn pace(bytes: usize, bytes_per_second: u64) {
    if bytes_per_second > 0 {
        std::thread::park_timeout(Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64));
    }
}

/// Compares the copies of a shard that is led here with what is here. Blocks, for as long as it takes to read all rows.
pub fn compare(core: &Core, shard: &Shard, haste: Haste) -> Result<Comparison, String> {
    let Some(_turn) = shard.replication.comparing.try_lock() else {
        return Err("they are being compared already".to_owned());
    };
    let request = pb::DigestRequest {
        id: fastrand::u64(1..),
        at_ms: now_ns() / 1_000_000 + EXPIRY_MARGIN_MS,
        bytes_per_second: haste.bytes_per_second(),
    };
    let mut text = String::new();
    let (still, era, mut waiting, answered) = {
        // Held for all of it: a follower is sent nothing more before it is looked whether it is asked.
        let mut state = shard.replication.state.lock();
        let part = state.part.as_ref().filter(|_| shard.replication.leads());
        let part = part.ok_or_else(|| format!("shard {} is not led here", shard.key))?;
        let still = shard.database.still().map_err(|error| error.to_string())?;
        let (in_sync, others): (Vec<_>, Vec<_>) =
            followers(&state, part, still.sequence).partition(|follower| follower.in_sync);
        let waiting: Vec<StoreId> = in_sync.into_iter().map(|follower| follower.store).collect();
        for other in others {
            say(&mut text, format_args!("store {} was not compared: it is not in sync", other.store));
        }
        let (answers, answered) = mpsc::sync_channel(waiting.len());
        for store in &waiting {
            if let Some(follower) = state.followers.get_mut(store) {
                follower.asked = Some(Asked { request, at: still.sequence, is_sent: false, answers: answers.clone() });
            }
        }
        (still, state.era, waiting, answered)
    };
    let go_on = |bytes| {
        pace(bytes, request.bytes_per_second);
        if is_current(core, shard) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let own = shard.digests(still, request.at_ms, go_on).map_err(|error| error.to_string())?;
    let own = own.ok_or_else(|| format!("shard {} is being closed", shard.key))?;

    let (mut copies, mut slots_differing) = (0, 0);
    let deadline = Instant::now() + ANSWER_MAX;
    let lost = loop {
        if waiting.is_empty() {
            break "";
        }
        match answered.recv_timeout(LOOK) {
            Ok((store, digests)) => {
                waiting.retain(|waiting| *waiting != store);
                if !digests.error.is_empty() {
                    say(&mut text, format_args!("store {store} was not compared: {}", digests.error));
                    continue;
                }
                let differing = own.differing(&received(&digests));
                core.counters.compared(differing.len());
                copies += 1;
                if !differing.is_empty() {
                    slots_differing += differing.len();
                    let named = &differing[..differing.len().min(SLOTS_NAMED_MAX)];
                    tracing::error!(shard = %shard.key, follower = %store, slots = differing.len(), ?named,
                        "a copy differs from its primary; it is made anew, what only it has is given up");
                    say(&mut text, format_args!("store {store} differs in {} slots: {named:?}", differing.len()));
                    let mut state = shard.replication.state.lock();
                    if state.era.is_some() && state.era == era {
                        state.renewals.insert(store, None);
                    }
                }
            }
            Err(RecvTimeoutError::Disconnected) => break "it went away",
            Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => break "it did not answer in time",
            Err(RecvTimeoutError::Timeout) if !is_current(core, shard) || !shard.replication.leads() => {
                break "its primary stopped";
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    };
    for store in waiting {
        say(&mut text, format_args!("store {store} was not compared: {lost}"));
        if let Some(follower) = shard.replication.state.lock().followers.get_mut(&store) {
            follower.asked.take_if(|asked| asked.request.id == request.id);
        }
    }
    tracing::debug!(shard = %shard.key, rows = own.rows(), copies, slots_differing, text, "compared the copies");
    Ok(Comparison { rows: own.rows(), copies, slots_differing, text })
}

fn say(text: &mut String, what: std::fmt::Arguments<'_>) {
    let separator = if text.is_empty() { "" } else { "; " };
    // A String takes everything.
    let _ = write!(text, "{separator}{what}");
}

/// What a follower says of its rows at this moment, on which it is asked. `standing` hears when the log may be followed on.
pub fn answer(
    core: &Core,
    shard: &Shard,
    request: &pb::DigestRequest,
    standing: oneshot::Sender<()>,
    connected: &CancellationToken,
) -> pb::FollowDigests {
    let digest = || {
        let still = shard.database.still().map_err(|error| error.to_string());
        // Whoever follows may have ended.
        let _ = standing.send(());
        let still = still?;
        if now_ns() / 1_000_000 >= request.at_ms {
            return Err("it came there too late, or its clock is ahead".to_owned());
        }
        let go_on = |bytes| {
            pace(bytes, request.bytes_per_second);
            if is_current(core, shard) && !connected.is_cancelled() {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        };
        let digests = shard.digests(still, request.at_ms, go_on).map_err(|error| error.to_string())?;
        digests.ok_or_else(|| "it was closed".to_owned())
    };
    let (slots, error) = match digest() {
        Ok(digests) => (digests.iter().map(sent).collect(), String::new()),
        Err(error) => (Vec::new(), error),
    };
    pb::FollowDigests { id: request.id, error, slots }
}

fn sent((slot, digest): (u16, SlotDigest)) -> pb::SlotDigest {
    pb::SlotDigest { slot: u32::from(slot), rows: digest.rows, sum: digest.sum }
}

fn received(digests: &pb::FollowDigests) -> Digests {
    let mut received = Digests::default();
    for pb::SlotDigest { slot, rows, sum } in &digests.slots {
        // No shard has a slot that u16 has no room for.
        if let Ok(slot) = u16::try_from(*slot) {
            received.insert(slot, SlotDigest { rows: *rows, sum: *sum });
        }
    }
    received
}

/// The shard whose turn comes behind `last`, in order of their keys and then from the first again.
fn next_in_turn(mut led: Vec<ShardKey>, last: Option<ShardKey>) -> Option<ShardKey> {
    led.sort_unstable();
    led.iter().find(|key| Some(**key) > last).or(led.first()).copied()
}

/// Compares the copies of one shard after the other that is led here, so that each has its turn within the interval.
pub(super) async fn compare_in_turn(core: &Arc<Core>) {
    let interval = core.replicator.verify_interval;
    let (mut last, mut compared) = (None, Instant::now());
    while !interval.is_zero() {
        tokio::time::sleep(ROUND).await;
        let map = core.shards.current();
        let is_compared = |shard: &&Arc<Shard>| {
            let has_others = || shard.replication.state.lock().part.as_ref().is_some_and(Part::has_others);
            !shard.is_failed() && shard.replication.leads() && has_others()
        };
        let led: Vec<ShardKey> = map.serving().filter(is_compared).map(|shard| shard.key).collect();
        if led.is_empty() || compared.elapsed() < interval / led.len() as u32 {
            continue;
        }
        let Some(key) = next_in_turn(led, last) else { continue };
        let Some(Entry::Serving(shard)) = map.entry(key) else { continue };
        (last, compared) = (Some(key), Instant::now());
        let (core, shard) = (Arc::clone(core), Arc::clone(shard));
        drop(map);
        let comparing = tokio::task::spawn_blocking(move || compare(&core, &shard, Haste::InBackground));
        match comparing.await {
            Ok(Ok(Comparison { text, .. })) if text.is_empty() => {}
            Ok(Ok(Comparison { text, .. })) => {
                tracing::info!(shard = %key, text, "not all copies are compared and equal")
            }
            Ok(Err(reason)) => tracing::info!(shard = %key, reason, "the copies cannot be compared now"),
            Err(error) => tracing::error!(shard = %key, %error, "comparing copies panicked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::id::{KeyspaceId, ShardId};

    #[test]
    fn each_shard_has_its_turn() {
        let key = |keyspace, shard| ShardKey { keyspace: KeyspaceId(keyspace), shard: ShardId(shard) };
        let led = vec![key(1, 0), key(0, 2), key(0, 1)];
        let mut last = None;
        let turns: Vec<ShardKey> = std::iter::repeat_with(|| {
            last = next_in_turn(led.clone(), last);
            last.unwrap()
        })
        .take(4)
        .collect();
        assert_eq!(turns, [key(0, 1), key(0, 2), key(1, 0), key(0, 1)]);
        assert_eq!(next_in_turn(led.clone(), Some(key(0, 3))), Some(key(1, 0)), "one that is not here any more");
        assert_eq!(next_in_turn(Vec::new(), last), None);
    }
}
