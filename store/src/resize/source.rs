//! Gives one target the rows of the slots that it takes over: as they are, group by group, then as they change, until a fence stands.

use super::changes::{Outbox, Taken, noted_bytes};
use super::rows::{MESSAGE_BYTES, Packer};
use crate::engine::{EngineError, Tier};
use crate::shard::Shard;
use crate::shard::executor::Core;
use crate::shard::map::Entry;
use crate::shard::ownership::Owned;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use vasto_proto::id::{Epoch, ShardId, ShardKey};
use vasto_proto::key::decode_key;
use vasto_proto::pb;
use vasto_proto::pb::move_message::Kind;
use vasto_proto::row::{Header, RowKind, Stamp};

/// Rows of one group: the target puts them into one file.
const GROUP_BYTES: u64 = 32 << 20;
/// Rows that are read at once, between two looks at everything else.
const STEP_BYTES: usize = 2 << 20;
/// What a small row counts as against the rate: it takes as much of the CPU.
const PACED_ROW_BYTES_MIN: usize = 256;
/// Changed rows that are looked up at once.
const CHANGED_KEYS: usize = 16;
/// How often the target hears how much there is to come.
const PROGRESS: Duration = Duration::from_millis(100);
/// Changes gather for so long while no fence stands: fewer messages, and a row that changes often is sent less often.
const GATHERING: Duration = Duration::from_millis(5);
/// A target that takes nothing for so long while writes are refused on its account is given up: it begins anew when it can.
const STUCK_MAX: Duration = Duration::from_secs(1);
/// What all moves of a shard may read at once.
const STEPS_BYTES_MAX: usize = 64 << 20;
/// Messages that wait for the network.
pub const MESSAGES_MAX: usize = 4;

/// Messages of one move; the text of an error is for people.
pub type Outgoing = mpsc::Sender<Result<pb::MoveMessage, String>>;

/// One move to one target, as long as it is connected.
pub struct Giving {
    core: Arc<Core>,
    /// Nobody who waits keeps a shard from being closed.
    shard: Weak<Shard>,
    key: ShardKey,
    ownership: watch::Receiver<Arc<Owned>>,
    outbox: Arc<Outbox>,
    giver: Option<Box<Giver>>,
}

/// How far it has come; it is worked on by one thread at a time.
struct Giver {
    target: ShardId,
    operation: u64,
    epoch: Epoch,
    outbox: Arc<Outbox>,
    ownership: watch::Receiver<Arc<Owned>>,
    /// All that leave for this target, in ascending order.
    slots: Vec<u16>,
    /// Bytes of files for each of them.
    bytes: Vec<u64>,
    step_bytes: usize,
    turn: Turn,
    /// Which of `slots` are being copied; those before are complete.
    copying: Range<usize>,
    /// Of the slot that is read: its place in `slots`, and the physical key to go on from.
    reading: usize,
    place: Vec<u8>,
    group_bytes: u64,
    taken: Taken,
    /// How many of the taken keys are sent.
    taken_sent: usize,
    rest: Option<Rest>,
    packer: Packer,
    /// Slots of which all rows have been sent, and of which changes may follow now.
    to_close: Range<usize>,
    /// The fence that the target has heard of.
    ended: Option<Epoch>,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Start,
    Copy,
    Changes,
}

/// What is left of a row that is larger than a step.
struct Rest {
    key: Vec<u8>,
    row: Vec<u8>,
    sent: usize,
}

/// What came of a step.
enum Step {
    /// Messages; rows that are copied must keep to the rate, of which they take so many bytes.
    Send { messages: Vec<Kind>, paced_bytes: usize },
    /// Nothing is to be sent now.
    Wait { is_fenced: bool },
}

/// Whether a target may take slots from a shard here; the shard, and all that go there.
fn find(core: &Core, open: &pb::MoveOpen, key: ShardKey, target: ShardId) -> Result<(Arc<Shard>, Arc<Owned>), String> {
    let shard = match core.shards.current().entry(key) {
        Some(Entry::Serving(shard)) if !shard.is_failed() => Arc::clone(shard),
        Some(Entry::Serving(_) | Entry::Opening | Entry::Closing(_) | Entry::Failed(_)) | None => {
            return Err(format!("shard {key} is not open here"));
        }
    };
    if shard.epoch().0 != open.source_epoch {
        return Err(format!("shard {key} is at epoch {}, not {}", shard.epoch(), open.source_epoch));
    }
    if !shard.replication.leads() || !shard.lease.allows() {
        return Err(format!("shard {key} is not served here"));
    }
    let owned = Arc::clone(&shard.settled_ownership().borrow());
    if !gives(&owned, open.operation, target) {
        return Err(format!("no record here says that shard {key} gives slots to shard {target} now"));
    }
    Ok((shard, owned))
}

fn gives(owned: &Owned, operation: u64, target: ShardId) -> bool {
    let outgoing = owned.outgoing.as_ref().filter(|outgoing| outgoing.operation == operation);
    outgoing.is_some_and(|outgoing| outgoing.to(target).is_some())
}

impl Giving {
    /// Begins a move; one to the same target that goes on ends. Waits until what is being written has been written.
    pub fn new(core: &Arc<Core>, open: &pb::MoveOpen, key: ShardKey, target: ShardId) -> Result<Self, String> {
        let (shard, owned) = find(core, open, key, target)?;
        let outgoing = owned.outgoing.as_ref().ok_or("no slots leave")?;
        let given = outgoing.to(target).ok_or("no slots leave for it")?;
        let outbox = shard.changes.begin(target, given.slots.clone(), outgoing.moves.len());
        // Who holds a stripe now may not have seen that changes are to be noted.
        core.stripes.pass(|_| {});
        fail::fail_point!("resize::source_opened");
        let ownership = shard.settled_ownership();
        let giver = Giver {
            target,
            operation: open.operation,
            epoch: Epoch(open.source_epoch),
            outbox: Arc::clone(&outbox),
            ownership: ownership.clone(),
            slots: given.slots.iter().collect(),
            bytes: Vec::new(),
            step_bytes: core.pace.step_bytes(STEPS_BYTES_MAX / outgoing.moves.len()).clamp(MESSAGE_BYTES, STEP_BYTES),
            turn: Turn::Start,
            copying: 0..0,
            reading: 0,
            place: Vec::new(),
            group_bytes: 0,
            taken: Taken::default(),
            taken_sent: 0,
            rest: None,
            packer: Packer::default(),
            to_close: 0..0,
            ended: None,
        };
        tracing::info!(shard = %key, %target, slots = giver.slots.len(), store = open.store_id, "gives slots away");
        let (core, shard, giver) = (Arc::clone(core), Arc::downgrade(&shard), Some(Box::new(giver)));
        Ok(Self { core, shard, key, ownership, outbox, giver })
    }

    /// Gives until the target goes, the move or this shard ends, or the store stops.
    pub async fn run(mut self, outgoing: Outgoing, shutdown: CancellationToken) {
        let core = Arc::clone(&self.core);
        let _moving = core.pace.begin();
        let stop = core.replicator.stopping();
        let giving = shutdown.run_until_cancelled(self.give(&outgoing));
        let ended = stop.run_until_cancelled(giving).await.flatten();
        if let Some(Err(reason)) = ended {
            tracing::info!(shard = %self.key, target = %self.outbox.target, reason, "gives no more slots away");
            // Gone is gone.
            let _ = outgoing.try_send(Err(reason));
        }
    }

    async fn give(&mut self, outgoing: &Outgoing) -> Result<(), String> {
        let mut told = Instant::now();
        loop {
            match self.step().await? {
                Step::Send { messages, paced_bytes } => {
                    for kind in messages {
                        self.send(outgoing, kind).await?;
                    }
                    let mut until = Instant::now();
                    // Changes wait for nobody, and writes that are refused for what is not copied yet do not wait for a rate.
                    if paced_bytes > 0 && !self.outbox.is_full() {
                        until += self.core.pace.wait_for(paced_bytes);
                    }
                    while let Some(wait) = until.checked_duration_since(Instant::now()).filter(|wait| !wait.is_zero()) {
                        self.tell(outgoing, &mut told).await?;
                        tokio::time::sleep(wait.min(PROGRESS)).await;
                    }
                }
                Step::Wait { is_fenced } => {
                    let outbox = Arc::clone(&self.outbox);
                    let until_told = PROGRESS.saturating_sub(told.elapsed());
                    // All are cancel safe: a change of a watch, a wake that is kept if it comes between, a closed channel, time.
                    let has_changes = tokio::select! {
                        changed = self.ownership.changed() => {
                            changed.map_err(|_| "the shard is being closed".to_owned())?;
                            false
                        }
                        () = outbox.wakes.notified() => true,
                        () = outgoing.closed() => return Err("the target is gone".to_owned()),
                        () = tokio::time::sleep(until_told) => false,
                    };
                    if has_changes && !is_fenced {
                        tokio::time::sleep(GATHERING).await;
                    }
                }
            }
            self.tell(outgoing, &mut told).await?;
        }
    }

    /// Does what comes next, on a thread that may wait for the disk; what somebody waits for does not come behind what clients want.
    async fn step(&mut self) -> Result<Step, String> {
        let shard = self.shard.upgrade().ok_or("the shard is being closed")?;
        let (core, mut giver) = (Arc::clone(&self.core), self.giver.take().ok_or("an earlier step was given up")?);
        let may_wait = giver.turn == Turn::Copy && !self.outbox.is_full();
        let step = move || {
            let step = giver.step(&core, &shard);
            (giver, step)
        };
        let done = if may_wait { self.core.replicator.spawn_aside(step) } else { tokio::task::spawn_blocking(step) };
        let (giver, step) = done.await.map_err(|error| format!("giving slots away panicked: {error}"))?;
        self.giver = Some(giver);
        step
    }

    /// Says now and then how much there is to come.
    async fn tell(&self, outgoing: &Outgoing, told: &mut Instant) -> Result<(), String> {
        if told.elapsed() < PROGRESS {
            return Ok(());
        }
        *told = Instant::now();
        let progress = self.giver.as_ref().map(|giver| giver.progress()).unwrap_or_default();
        self.send(outgoing, Kind::Progress(progress)).await
    }

    async fn send(&self, outgoing: &Outgoing, kind: Kind) -> Result<(), String> {
        let (is_group, is_end) = (matches!(kind, Kind::GroupEnd(_)), matches!(kind, Kind::End(_)));
        if is_end {
            fail::fail_point!("resize::source_before_end");
        }
        let room = loop {
            match tokio::time::timeout(STUCK_MAX, outgoing.reserve()).await {
                Ok(room) => break room.map_err(|_| "the target is gone".to_owned())?,
                Err(_) if self.outbox.is_full() => {
                    return Err("the target takes nothing, and much has changed".to_owned());
                }
                Err(_) => {}
            }
        };
        room.send(Ok(pb::MoveMessage { kind: Some(kind) }));
        if is_group {
            fail::fail_point!("resize::source_group_sent");
        }
        if is_end {
            fail::fail_point!("resize::source_after_end");
        }
        Ok(())
    }
}

impl Drop for Giving {
    fn drop(&mut self) {
        if let Some(shard) = self.shard.upgrade() {
            shard.changes.end(&self.outbox);
        }
    }
}

impl Giver {
    fn step(&mut self, core: &Core, shard: &Shard) -> Result<Step, String> {
        if shard.is_failed() || !shard.replication.leads() || shard.epoch() != self.epoch {
            return Err("the shard is not led here any more".to_owned());
        }
        // In this order: what was written before the fence stood has been noted, unless somebody else notes it.
        let owned = Arc::clone(&self.ownership.borrow());
        if !gives(&owned, self.operation, self.target) {
            return Err("these slots do not leave any more".to_owned());
        }
        if self.outbox.has_ended() {
            return Err("another stream to the same target is there".to_owned());
        }
        if shard.changes.begins_anew(&self.outbox) {
            self.begin_anew();
        }
        if let Some(rest) = self.rest.take() {
            return Ok(self.go_on(rest));
        }
        match self.turn {
            Turn::Start => Ok(self.start(shard)),
            Turn::Changes => {
                let fence = owned.fence.filter(|fence| self.ended != Some(*fence));
                self.send_changes(core, shard, owned.fence.is_some(), fence).map_err(|error| error.to_string())
            }
            Turn::Copy => self.copy(core, shard).map_err(|error| error.to_string()),
        }
    }

    fn begin_anew(&mut self) {
        self.turn = Turn::Start;
        (self.copying, self.reading, self.group_bytes) = (0..0, 0, 0);
        (self.taken, self.taken_sent, self.rest) = (Taken::default(), 0, None);
        self.packer = Packer::default();
        self.to_close = 0..0;
        self.ended = None;
    }

    fn is_copied(&self) -> bool {
        self.copying.end == self.slots.len() && self.copying.is_empty()
    }

    fn start(&mut self, shard: &Shard) -> Step {
        let range = |slot: &u16| slot.to_be_bytes().to_vec()..(slot + 1).to_be_bytes().to_vec();
        self.bytes = shard.database.bytes_between(&self.slots.iter().map(range).collect::<Vec<_>>());
        let start = pb::MoveStart { slots: self.slots.len() as u32, bytes_expected: self.bytes.iter().sum() };
        self.turn = Turn::Copy;
        Step::Send { messages: vec![Kind::Start(start)], paced_bytes: 0 }
    }

    /// Reads on in the open group, or opens one.
    fn copy(&mut self, core: &Core, shard: &Shard) -> Result<Step, EngineError> {
        if self.copying.is_empty() {
            let start = self.copying.end;
            let mut bytes = 0;
            let fits = |slot: &usize| {
                bytes += self.bytes[*slot];
                bytes <= GROUP_BYTES || *slot == start
            };
            let end = (start..self.slots.len()).take_while(fits).last().map_or(start, |last| last + 1);
            self.copying = start..end;
            self.reading = start;
            // Before the rows are read.
            self.outbox.open(&self.slots[self.copying.clone()]);
            self.place = self.slots[start].to_be_bytes().to_vec();
        }
        let mut walk = shard.database.walk_apart();
        // Whoever flushes meanwhile lets the move begin anew.
        let flush_ns = shard.flush_ns();
        let (mut messages, mut bytes, mut paced_bytes, mut rows, mut is_complete) = (Vec::new(), 0, 0, 0, false);
        walk.seek(&self.place);
        while bytes < self.step_bytes && self.group_bytes < GROUP_BYTES {
            let Some((key, row)) = walk.key().zip(walk.value()) else {
                walk.status()?;
                is_complete = true;
                break;
            };
            let Some((slot, _)) = decode_key(key) else {
                walk.next();
                continue;
            };
            let at = self.reading + self.slots[self.reading..self.copying.end].partition_point(|own| *own < slot);
            if at == self.copying.end {
                is_complete = true;
                break;
            }
            self.reading = at;
            if self.slots[at] != slot {
                walk.seek(&self.slots[at].to_be_bytes());
                continue;
            }
            let (header, _) = Header::decode(row).map_err(|error| EngineError::Corrupt(error.to_string()))?;
            if header.stamp.ns > flush_ns {
                let length = key.len() + row.len();
                bytes += length;
                self.group_bytes += length as u64;
                rows += 1;
                if row.len() > STEP_BYTES {
                    let (key, row) = (key.to_vec(), row.to_vec());
                    self.place = [&key[..], &[0]].concat();
                    core.counters.moved(rows, bytes as u64);
                    self.rest = Some(Rest { key, row, sent: 0 });
                    messages.extend(self.packer.finish().map(Kind::Copied));
                    return Ok(Step::Send { messages, paced_bytes });
                }
                paced_bytes += length.max(PACED_ROW_BYTES_MIN);
                add(&mut self.packer, key, row, &mut |full| messages.push(Kind::Copied(full)));
            }
            self.place.clear();
            self.place.extend_from_slice(key);
            self.place.push(0);
            walk.next();
        }
        drop(walk);
        core.counters.moved(rows, bytes as u64);
        messages.extend(self.packer.finish().map(Kind::Copied));
        if is_complete || self.group_bytes >= GROUP_BYTES {
            let complete = if is_complete { self.copying.end } else { self.reading };
            messages.push(Kind::GroupEnd(pb::MoveGroupEnd { slots_complete: complete as u32 }));
            self.to_close = self.copying.start..complete;
            self.copying.start = complete;
            self.group_bytes = 0;
            self.turn = Turn::Changes;
            if self.is_copied() {
                fail::fail_point!("resize::source_copied");
            }
        }
        Ok(Step::Send { messages, paced_bytes })
    }

    /// Sends rows that have changed; says that this is the end if a fence stands of which the target has not heard, and there are none.
    fn send_changes(
        &mut self,
        core: &Core,
        shard: &Shard,
        is_fenced: bool,
        fence: Option<Epoch>,
    ) -> Result<Step, EngineError> {
        if !self.to_close.is_empty() {
            self.outbox.close(&self.slots[std::mem::take(&mut self.to_close)]);
        }
        if self.taken_sent == self.taken.keys.len() {
            (self.taken, self.taken_sent) = (self.outbox.take(), 0);
        }
        if self.taken.keys.is_empty() {
            self.taken.since = None;
            if !self.is_copied() {
                self.turn = Turn::Copy;
                return Ok(Step::Send { messages: Vec::new(), paced_bytes: 0 });
            }
            let Some(fence) = fence else { return Ok(Step::Wait { is_fenced }) };
            self.ended = Some(fence);
            let garbage = shard.database.garbage();
            let end = pb::MoveEnd {
                fence: fence.0,
                stamps_above_ns: shard.stamps.time_ns(0),
                dropped_ns: garbage.dropped_ns().max(garbage.flush_ns()),
            };
            return Ok(Step::Send { messages: vec![Kind::End(end)], paced_bytes: 0 });
        }
        // Another end must follow.
        self.ended = None;
        let (mut messages, mut bytes, mut rows, mut noted) = (Vec::new(), 0, 0, 0);
        while bytes < self.step_bytes && self.rest.is_none() && self.taken_sent < self.taken.keys.len() {
            let keys = &self.taken.keys[self.taken_sent..];
            let keys = &keys[..keys.len().min(CHANGED_KEYS)];
            let stored = shard.database.get_many(keys.iter().map(|key| &key[..]), Tier::Disk);
            for (key, row) in keys.iter().zip(stored) {
                let row = row?;
                let row = row.as_deref().map_or_else(|| forgotten(shard), <[u8]>::to_vec);
                self.taken_sent += 1;
                noted += noted_bytes(key);
                rows += 1;
                bytes += key.len() + row.len();
                if row.len() > STEP_BYTES {
                    self.rest = Some(Rest { key: key.to_vec(), row, sent: 0 });
                    break;
                }
                add(&mut self.packer, key, &row, &mut |full| messages.push(Kind::Changed(full)));
            }
        }
        messages.extend(self.packer.finish().map(Kind::Changed));
        core.counters.moved(rows, bytes as u64);
        shard.changes.sent(&self.outbox, noted);
        if self.taken_sent == self.taken.keys.len() && !self.is_copied() {
            // What is not copied yet has its turn.
            self.turn = Turn::Copy;
            self.taken = Taken::default();
            self.taken_sent = 0;
        }
        Ok(Step::Send { messages, paced_bytes: 0 })
    }

    /// Sends more of a large row.
    fn go_on(&mut self, mut rest: Rest) -> Step {
        let wrap = if self.is_being_copied() { Kind::Copied } else { Kind::Changed };
        let mut messages = Vec::new();
        let end = rest.row.len().min(rest.sent + STEP_BYTES);
        let bytes = end - rest.sent;
        while rest.sent < end {
            let piece = &rest.row[rest.sent..rest.row.len().min(rest.sent + MESSAGE_BYTES)];
            rest.sent += piece.len();
            messages.extend(self.packer.add(&rest.key, piece, rest.sent < rest.row.len()).map(wrap));
        }
        messages.extend(self.packer.finish().map(wrap));
        let paced_bytes = if self.is_being_copied() { bytes } else { 0 };
        if rest.sent < rest.row.len() {
            self.rest = Some(rest);
        }
        Step::Send { messages, paced_bytes }
    }

    /// Whether the rest of a row belongs to the open group.
    fn is_being_copied(&self) -> bool {
        self.group_bytes > 0
    }

    fn progress(&self) -> pb::MoveProgress {
        let (waiting, since) = self.outbox.waiting();
        let taken = self.taken.keys.len() - self.taken_sent;
        let since = self.taken.since.filter(|_| taken > 0).or(since);
        let behind_ms = since.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX));
        pb::MoveProgress { behind_keys: (waiting + taken) as u64, behind_ms }
    }
}

/// Packs a row, in pieces if it is larger than a message.
fn add(packer: &mut Packer, key: &[u8], row: &[u8], send: &mut impl FnMut(pb::MovedRows)) {
    let mut rest = row;
    while rest.len() > MESSAGE_BYTES {
        let (piece, after) = rest.split_at(MESSAGE_BYTES);
        if let Some(full) = packer.add(key, piece, true) {
            send(full);
        }
        rest = after;
    }
    if let Some(full) = packer.add(key, rest, false) {
        send(full);
    }
}

/// What is sent of a key whose deletion is forgotten here already: the row that was copied must not come back.
fn forgotten(shard: &Shard) -> Vec<u8> {
    let garbage = shard.database.garbage();
    let ns = garbage.dropped_ns().max(garbage.flush_ns());
    let header = Header {
        kind: RowKind::Tombstone,
        stamp: Stamp { ns, origin: Stamp::CLIENT, sequence: 0 },
        expires_at_ms: 0,
        changed_in_place: false,
        written_at_ns: 0,
    };
    let mut row = Vec::with_capacity(header.encoded_bytes());
    header.encode_into(&mut row);
    row
}
