//! What one shard knows of its copies: its own part, its history, and how far its followers have come.

use super::comparison::Asked;
use super::copy::OutgoingCopy;
use super::follower::Task;
use super::history::{Entry, History};
use crate::engine::database::Database;
use crate::engine::log_batch::{Change, Family, LogBatch, Malformed};
use crate::engine::{EngineError, Tier, meta};
use crate::shard::Shard;
use crate::shard::executor::now_ns;
use crate::shard::stripes::{Patience, StripeGuard, StripeSet, Stripes};
use parking_lot::Mutex;
use smallvec::SmallVec;
use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vasto_proto::batch::FLAG_FROM_REPLICA;
use vasto_proto::id::{Epoch, StoreId};
use vasto_proto::topology::ShardRecord;
use vasto_proto::topology::{Era, FollowerStatus, Position, Role, ShardStatus};

/// Parts of the log that a follower may have been sent and not confirmed, of which lag is measured.
const UNCONFIRMED_MAX: usize = 1024;
/// After a copy has left, its store opens it and comes back for the log behind it.
const RETURN_PATIENCE: Duration = Duration::from_secs(120);

/// What a record says that this store is to a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub epoch: Epoch,
    pub role: Role,
    /// [`NOBODY`](vasto_proto::topology::NOBODY) while the shard is vacant.
    pub primary: StoreId,
    pub previous: StoreId,
    pub replicas: Vec<StoreId>,
    pub learners: Vec<StoreId>,
    pub min_replicas: u32,
}

impl Part {
    pub fn new(store: StoreId, described: &ShardRecord, min_replicas: u32) -> Self {
        Self {
            epoch: described.epoch,
            role: if described.primary == store { Role::Primary } else { Role::Replica },
            primary: described.primary,
            previous: described.previous,
            replicas: described.replicas.clone(),
            learners: described.learners.clone(),
            min_replicas,
        }
    }

    /// Whether the shard has more than one copy, whole or in the making.
    pub fn has_others(&self) -> bool {
        self.role == Role::Replica || !self.replicas.is_empty() || !self.learners.is_empty()
    }

    /// Whether a store follows this shard's primary.
    pub fn is_followed_by(&self, store: StoreId) -> bool {
        self.replicas.contains(&store) || self.learners.contains(&store)
    }
}

/// What may be done with the shard: a number in [`Replication::mode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It runs whatever comes.
    Leads,
    /// It takes over, or nobody leads.
    Waits,
    /// It answers those who take what may be old.
    Follows,
    /// It has no whole copy.
    IsMade,
}

impl Mode {
    const ALL: [Self; 4] = [Self::Leads, Self::Waits, Self::Follows, Self::IsMade];
}

/// A follower as its primary sees it.
#[derive(Debug, Default)]
pub struct Follower {
    /// Which of its connections is the newest.
    pub connection: u64,
    pub connected: bool,
    /// It is sent the log.
    pub follows: bool,
    pub applied: u64,
    /// Last numbers of what was sent and not confirmed, and when.
    unconfirmed: VecDeque<(u64, Instant)>,
    lag: Duration,
    /// Goes with the connection: whoever waits for the answer hears of it.
    pub asked: Option<Asked>,
}

impl Follower {
    fn lag(&self, now: Instant) -> Duration {
        self.unconfirmed.front().map_or(self.lag, |(_, sent)| now.duration_since(*sent))
    }
}

/// What was done for copies since the shard was opened.
#[derive(Debug, Default)]
pub struct Counts {
    pub full_copies: AtomicU64,
    pub partial_resumes: AtomicU64,
    pub handed_over_rows: AtomicU64,
}

/// Everything that changes with the record and with the copies.
#[derive(Default)]
pub struct State {
    pub part: Option<Part>,
    pub history: History,
    pub log: Option<u64>,
    /// What lies in `meta`.
    pub noted: Option<Position>,
    /// The era that this store leads now.
    pub era: Option<Era>,
    /// It has stopped leading: its log goes to this position and no further.
    pub end: Option<Position>,
    pub followers: BTreeMap<StoreId, Follower>,
    pub copies: BTreeMap<StoreId, Arc<OutgoingCopy>>,
    /// Stores whose copy differs and is made anew whatever their position says; and what they can have of the log at most without one that
    /// was begun since.
    pub renewals: BTreeMap<StoreId, Option<u64>>,
    /// A copy is on its way or its store has not come back: more of the log is kept until then.
    pub copying_until: Option<Instant>,
    pub task: Option<Task>,
    /// The end of the log of the primary before is yet to come.
    pub takes_over: bool,
    connections: u64,
    /// A place in the log and when it was written, which not all copies have confirmed.
    awaited: Option<(u64, u64)>,
    watermark: u64,
}

/// What became of a copy that differed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    Unneeded,
    Needed,
    Done,
}

/// One shard's part in replication.
#[derive(Default)]
pub struct Replication {
    mode: AtomicU8,
    min_replicas: AtomicU32,
    /// Replicas that follow the log.
    following: AtomicU32,
    /// A whole copy waits to be opened in the place of this one.
    replaced: AtomicBool,
    /// Up to when every copy has applied what was written.
    replicated_ns: AtomicU64,
    pub counts: Counts,
    /// Held by whoever compares the copies.
    pub(super) comparing: Mutex<()>,
    /// Held by whoever changes the part, and whoever begins to lead.
    pub(super) turn: Mutex<()>,
    pub state: Mutex<State>,
}

/// How far one follower has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FollowerFigures {
    pub store: StoreId,
    pub connected: bool,
    pub in_sync: bool,
    /// Up to where in the primary's log it has applied.
    pub applied: u64,
    /// Age of the oldest write that it has not confirmed; how long the last one took, if it has all.
    pub lag: Duration,
}

/// How far the copies of a shard have come, as this store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    pub role: Role,
    pub position: Option<Position>,
    /// The last sequence number of this store's own log.
    pub sequence: u64,
    pub followers: Vec<FollowerFigures>,
    pub full_copies: u64,
    pub partial_resumes: u64,
    pub handed_over_rows: u64,
}

impl Replication {
    /// Reads what `meta` says; nothing may be run before a part is assumed.
    pub fn open(database: &Database) -> Result<Self, EngineError> {
        let malformed = |name: &str| EngineError::Failed(format!("the {name} in meta is malformed"));
        let history = match database.meta(meta::HISTORY)? {
            Some(bytes) => History::from_bytes(&bytes).ok_or_else(|| malformed("history"))?,
            None => History::default(),
        };
        let noted = match database.meta(meta::POSITION)? {
            Some(bytes) => Some(Position::from_bytes(&bytes).ok_or_else(|| malformed("position"))?),
            None => None,
        };
        let number = |bytes: Vec<u8>| bytes.as_slice().try_into().map(u64::from_be_bytes);
        let log = database.meta(meta::LOG_ID)?.map(number).transpose().map_err(|_| malformed("log's id"))?;
        let watermark = database.meta(meta::REPLICATED)?.unwrap_or_default();
        let watermark = match watermark.as_chunks::<8>() {
            ([of, up_to], []) if Some(u64::from_be_bytes(*of)) == log => u64::from_be_bytes(*up_to),
            _ => 0,
        };
        let state = State { history, noted, log, watermark, ..State::default() };
        let mode = AtomicU8::new(Mode::Waits as u8);
        Ok(Self { mode, state: Mutex::new(state), ..Self::default() })
    }

    pub fn mode(&self) -> Mode {
        Mode::ALL[usize::from(self.mode.load(Ordering::Acquire))]
    }

    pub(super) fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// Why an operation with these flags may not run, whatever it does.
    pub fn refuses(&self, flags: u32) -> Option<&'static str> {
        match self.mode() {
            Mode::Leads => None,
            Mode::Follows if flags & FLAG_FROM_REPLICA != 0 => None,
            Mode::Follows => Some("is a replica here"),
            Mode::Waits => Some("has no primary here yet"),
            Mode::IsMade => Some("is being copied to this store"),
        }
    }

    /// Whether writes may run as far as the part goes.
    pub fn leads(&self) -> bool {
        self.mode() == Mode::Leads
    }

    /// Whether another store is the primary, or nobody.
    pub fn is_replica(&self) -> bool {
        self.state.lock().part.as_ref().is_some_and(|part| part.role == Role::Replica)
    }

    /// What a write must be told that fewer replicas follow than must have it.
    pub fn lacks_replicas(&self) -> Option<String> {
        let wanted = self.min_replicas.load(Ordering::Acquire);
        let following = self.following.load(Ordering::Acquire);
        (following < wanted).then(|| format!("{following} of the {wanted} replicas follow that must have a write"))
    }

    /// Whether answers wait for replicas.
    pub fn min_replicas(&self) -> u32 {
        self.min_replicas.load(Ordering::Acquire)
    }

    pub fn is_replaced(&self) -> bool {
        self.replaced.load(Ordering::Acquire)
    }

    pub(super) fn replace(&self) {
        self.replaced.store(true, Ordering::Release);
    }

    pub(super) fn set_min_replicas(&self, min_replicas: u32) {
        self.min_replicas.store(min_replicas, Ordering::Release);
    }

    /// Up to when everything that was written is applied by every copy; 0 = that is not known.
    pub fn replicated_ns(&self) -> u64 {
        self.replicated_ns.load(Ordering::Acquire)
    }

    /// There are no other copies any more: those that come later have nothing of what was written until then.
    pub(super) fn forget_others(&self) {
        self.replicated_ns.store(0, Ordering::Release);
        self.state.lock().awaited = None;
    }

    /// Follows no more; waits until what is being applied is.
    pub fn stop_following(&self) {
        let task = self.state.lock().task.take();
        if let Some(task) = task {
            task.stop();
        }
    }
}

impl State {
    pub fn position(&self, latest: u64) -> Option<Position> {
        self.history.position(self.log, self.noted, latest)
    }

    pub fn connected(&mut self, store: StoreId) -> u64 {
        self.connections += 1;
        let follower = self.followers.entry(store).or_default();
        *follower =
            Follower { connection: self.connections, connected: true, lag: follower.lag, ..Follower::default() };
        self.connections
    }

    /// The follower, if this is its newest connection.
    pub fn follower(&mut self, store: StoreId, connection: u64) -> Option<&mut Follower> {
        self.followers.get_mut(&store).filter(|follower| follower.connection == connection)
    }

    pub fn sent(&mut self, store: StoreId, connection: u64, last: u64) {
        let Some(follower) = self.follower(store, connection) else { return };
        if follower.unconfirmed.len() < UNCONFIRMED_MAX {
            follower.unconfirmed.push_back((last, Instant::now()));
        }
    }

    pub fn confirmed(&mut self, store: StoreId, connection: u64, applied: u64) {
        let Some(follower) = self.follower(store, connection) else { return };
        follower.applied = follower.applied.max(applied);
        while let Some((last, sent)) = follower.unconfirmed.front().copied().filter(|(last, _)| *last <= applied) {
            follower.lag = sent.elapsed();
            debug_assert!(last <= applied);
            follower.unconfirmed.pop_front();
        }
    }

    /// What every replica and learner of the record has applied; `None` if one is not there.
    fn applied_by_all(&self) -> Option<u64> {
        let part = self.part.as_ref()?;
        let applied =
            |store: &StoreId| self.followers.get(store).filter(|follower| follower.follows).map(|f| f.applied);
        part.replicas.iter().chain(&part.learners).map(applied).min().flatten()
    }

    /// Whether the copy of a store must be made anew that comes with this position; else it needs that no more.
    pub fn renewal(&mut self, store: StoreId, position: Option<Position>) -> Renewal {
        let Some(cut) = self.renewals.get(&store) else { return Renewal::Unneeded };
        let is_new = |cut: &u64| position.is_some_and(|at| Some(at.era) == self.era && at.sequence > *cut);
        if !cut.as_ref().is_some_and(is_new) {
            return Renewal::Needed;
        }
        self.renewals.remove(&store);
        Renewal::Done
    }

    /// A copy leaves or has left.
    pub fn copies(&mut self) {
        self.copying_until = Some(Instant::now() + RETURN_PATIENCE);
    }
}

impl Shard {
    /// The number of the last entry of the log that `min-replicas` replicas must have before an answer given now may leave; `None` if they
    /// have it.
    pub fn not_copied_yet(&self) -> Option<u64> {
        let rows_up_to = self.database.tail().rows_up_to();
        (rows_up_to > self.durability.copied()).then_some(rows_up_to)
    }

    /// Whether the log up to this number is wherever it must be before another shard's rows count as being here: with all replicas of the
    /// record that follow, with as many as answers wait for, and with one at least if there are any.
    pub fn is_copied_up_to(&self, sequence: u64) -> bool {
        let state = self.replication.state.lock();
        let Some(part) = &state.part else { return false };
        let follower = |store: &StoreId| state.followers.get(store).filter(|follower| follower.follows);
        let following: Vec<&Follower> = part.replicas.iter().filter_map(follower).collect();
        let needed = (part.min_replicas as usize).max(part.replicas.len().min(1));
        following.len() >= needed && following.iter().all(|follower| follower.applied >= sequence)
    }

    /// Whether all replicas that follow have applied the log up to this number.
    pub fn has_reached_followers(&self, sequence: u64) -> bool {
        let state = self.replication.state.lock();
        let replicas = state.part.iter().flat_map(|part| &part.replicas);
        let mut following = replicas.filter_map(|store| state.followers.get(store)).filter(|follower| follower.follows);
        following.all(|follower| follower.applied >= sequence)
    }

    /// Whether it is led here, and others have copies or make them.
    pub fn has_followers(&self) -> bool {
        self.replication.leads() && self.database.tail().is_on()
    }

    /// Draws the conclusions from how far the followers have come.
    pub fn count_followers(&self) {
        let copied = {
            let state = self.replication.state.lock();
            let Some(part) = &state.part else { return };
            let follower = |store: &StoreId| state.followers.get(store).filter(|follower| follower.follows);
            // Who takes the end of the log here has it, and is to lead: what it has the next one has that is chosen.
            let successor = match part.role {
                Role::Primary => None,
                Role::Replica => Some(&part.primary),
            };
            let counted = part.replicas.iter().chain(successor).filter_map(follower);
            let mut applied: Vec<u64> = counted.map(|follower| follower.applied).collect();
            self.replication.following.store(applied.len() as u32, Ordering::Release);
            applied.sort_unstable_by(|a, b| b.cmp(a));
            applied.get(part.min_replicas.max(1) as usize - 1).copied()
        };
        if let Some(copied) = copied {
            self.durability.copied_up_to(copied);
        }
    }

    /// Waits until every group that was admitted before has committed; the mode has been set so that none is admitted any more.
    pub(super) fn fence(&self, stripes: &Stripes) {
        let mut all = StripeSet::default();
        all.add_all();
        let mut guards: SmallVec<[StripeGuard<'_>; 4]> = SmallVec::new();
        all.lock(stripes, Patience::Unbounded, &mut guards);
    }

    /// Keeps what is written from here on for followers.
    pub(super) fn start_tail(&self, stripes: &Stripes) -> Result<(), EngineError> {
        let mut all = StripeSet::default();
        all.add_all();
        let mut guards: SmallVec<[StripeGuard<'_>; 4]> = SmallVec::new();
        // No row is being written then.
        all.lock(stripes, Patience::Unbounded, &mut guards);
        self.database.tail().start(self.database.sequence(), self.last_row()?);
        Ok(())
    }

    /// The number of the last entry of the log that clients can see, as far as it is behind what is known to be replicated.
    fn last_row(&self) -> Result<u64, EngineError> {
        let latest = self.database.sequence();
        let watermark = self.replication.state.lock().watermark;
        if watermark == 0 || watermark > latest {
            return Ok(latest);
        }
        let (mut reached, mut last_row, mut is_whole) = (watermark, watermark, true);
        self.database.walk_log(watermark, |logged| {
            is_whole &= logged.first == reached + 1;
            reached = logged.last;
            let is_seen = |change: Result<Change<'_>, Malformed>| match change {
                Ok(Change::Put { family: Family::Meta, key, .. }) => key == meta::FLUSH,
                Ok(Change::Put { .. } | Change::Delete { .. } | Change::DeleteRange { .. }) | Err(Malformed) => true,
            };
            if LogBatch::parse(&logged.data).is_none_or(|batch| batch.changes().any(is_seen)) {
                last_row = logged.last;
            }
            if is_whole { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(if is_whole && reached >= latest { last_row } else { latest })
    }

    /// Begins an era: from here on its writes are of it. Call it when the shard may serve as primary under this epoch.
    pub(super) fn begin_era(&self, epoch: Epoch) -> Result<(), EngineError> {
        let mut state = self.replication.state.lock();
        let latest = self.database.sequence();
        let parent = state.position(latest);
        let came_from_another = match (state.history.last(), state.log) {
            (Some(last), Some(log)) => last.log != log,
            (Some(_), None) => true,
            (None, _) => false,
        };
        let log = state.log.unwrap_or_else(|| fastrand::u64(1..));
        let era = state.history.next_era(epoch);
        let mut history = state.history.clone();
        self.stamps.begin_above(|floor_ns, bound| {
            history.push(Entry { era, log, start: latest, floor_ns, parent });
            let bytes = history.to_bytes();
            let mut writes = self.database.writes(3, bytes.len() + 128);
            // First this: its entry of the log is the one behind `start`.
            writes.put_meta(meta::HISTORY, &bytes);
            writes.put_meta(meta::LOG_ID, &log.to_be_bytes());
            // Copies that follow know it before they have a row of this era.
            writes.put_meta(meta::STAMPS, bound);
            self.database.write_synced(writes)
        })?;
        // What came from another store is on that one too.
        let copied = if came_from_another { latest } else { state.watermark.min(latest) };
        state.history = history;
        state.log = Some(log);
        state.era = Some(era);
        state.end = None;
        state.followers.clear();
        state.copies.clear();
        state.renewals.clear();
        state.awaited = None;
        drop(state);
        self.durability.copied_up_to(copied);
        tracing::info!(shard = %self.key, epoch = epoch.0, opened = era.opened, "begins to lead");
        Ok(())
    }

    /// Notes for good where the copy stands, before anything else enters its log. The log of a primary ends there.
    pub(super) fn pin_position(&self) -> Result<(), EngineError> {
        let mut state = self.replication.state.lock();
        let position = state.position(self.database.sequence());
        state.era = None;
        // Whoever leads next compares anew.
        state.renewals.clear();
        let own = state.history.last().filter(|last| Some(last.log) == state.log).map(|last| last.era);
        state.end = position.filter(|position| Some(position.era) == own);
        if position == state.noted {
            return Ok(());
        }
        if let Some(position) = position {
            self.database.put_meta_synced(meta::POSITION, &position.to_bytes())?;
            state.noted = Some(position);
        }
        Ok(())
    }

    /// Once a second: what of the log is kept, what a restart may take for replicated, which tombstones may go.
    pub(super) fn tend_copies(&self, log_bytes_max: u64, log_bytes_copying_max: u64) {
        let (kept, watermark, is_copying) = {
            let mut state = self.replication.state.lock();
            let now = Instant::now();
            if state.copying_until.is_some_and(|until| until < now) {
                state.copying_until = None;
            }
            state.copies.retain(|_, copy| !copy.is_forgotten());
            let has_others = state.part.as_ref().is_some_and(Part::has_others);
            let kept = match (has_others, &state.copying_until) {
                (false, _) => 0,
                (true, None) => log_bytes_max,
                (true, Some(_)) => log_bytes_copying_max,
            };
            if state.era.is_some() {
                self.follow_all(&mut state);
            }
            let copied = self.durability.copied();
            // Only for what clients see: the note itself is copied as well.
            let is_news = state.era.is_some()
                && state.watermark < self.database.tail().rows_up_to()
                && (state.watermark + 1..=self.database.sequence()).contains(&copied);
            if is_news {
                state.watermark = copied;
            }
            (kept, state.log.filter(|_| is_news).map(|log| (log, copied)), state.copying_until.is_some())
        };
        if let Some((log, copied)) = watermark {
            let mut bytes = log.to_be_bytes().to_vec();
            bytes.extend_from_slice(&copied.to_be_bytes());
            // Left out while the disk is full: a restart then takes less for replicated.
            if let Err(error) = self.database.put_meta(meta::REPLICATED, &bytes, Tier::Memory) {
                tracing::debug!(shard = %self.key, %error, "cannot note what is replicated");
            }
        }
        if let Err(error) = self.database.shorten_log(kept) {
            tracing::warn!(shard = %self.key, %error, "cannot delete old logs");
        }
        if !is_copying && let Err(error) = self.database.keep_files(false) {
            tracing::warn!(shard = %self.key, %error, "cannot delete old files");
        }
    }

    /// Moves the time on up to which all copies have everything.
    fn follow_all(&self, state: &mut State) {
        let Some(applied) = state.applied_by_all() else { return };
        if let Some((sequence, ns)) = state.awaited
            && applied >= sequence
        {
            self.replication.replicated_ns.store(ns, Ordering::Release);
            self.database.garbage().set_replicated_ns(ns);
            state.awaited = None;
        }
        if state.awaited.is_none() {
            // The time first: what is written behind it may count or not.
            let ns = now_ns();
            state.awaited = Some((self.database.sequence(), ns));
        }
    }

    /// What the primary says of the tombstones that no copy needs any more.
    pub(super) fn learn_replicated_ns(&self, ns: u64) {
        if ns > self.replication.replicated_ns.fetch_max(ns, Ordering::AcqRel) {
            self.database.garbage().set_replicated_ns(ns);
        }
    }

    /// Where this copy stands, for the master; `None` before it has a part.
    pub fn status(&self) -> Option<ShardStatus> {
        let state = self.replication.state.lock();
        let part = state.part.as_ref()?;
        let latest = self.database.sequence();
        let follower = |figures: FollowerFigures| FollowerStatus {
            store: figures.store,
            connected: figures.connected,
            in_sync: figures.in_sync,
            applied: figures.applied,
        };
        Some(ShardStatus {
            key: self.key,
            epoch: self.epoch(),
            role: part.role,
            position: state.position(latest),
            serves: self.replication.leads() && self.lease.allows(),
            followers: followers(&state, part, latest).map(follower).collect(),
            bytes: self.database.disk_bytes() + self.database.memtable_bytes(),
            has_foreign_rows: self.takes.has_foreign_rows(),
            moves: self.takes.moves(),
        })
    }

    /// For people and clients.
    pub fn replication_figures(&self) -> Option<Figures> {
        let state = self.replication.state.lock();
        let part = state.part.as_ref()?;
        let sequence = self.database.sequence();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Some(Figures {
            role: part.role,
            position: state.position(sequence),
            sequence,
            followers: followers(&state, part, sequence).collect(),
            full_copies: read(&self.replication.counts.full_copies),
            partial_resumes: read(&self.replication.counts.partial_resumes),
            handed_over_rows: read(&self.replication.counts.handed_over_rows),
        })
    }
}

/// What may be on its way to a follower that has all: batches of this second.
const IN_SYNC_LAG_MAX: Duration = Duration::from_secs(1);

pub(super) fn followers<'s>(
    state: &'s State,
    part: &'s Part,
    latest: u64,
) -> impl Iterator<Item = FollowerFigures> + 's {
    let own = if part.role == Role::Primary { &part.replicas[..] } else { &[] };
    let learners = if part.role == Role::Primary { &part.learners[..] } else { &[] };
    let now = Instant::now();
    own.iter().chain(learners).map(move |store| match state.followers.get(store) {
        Some(follower) => {
            let lag = follower.lag(now);
            let has_all = follower.applied >= latest || lag < IN_SYNC_LAG_MAX && follower.applied > 0;
            let in_sync = follower.connected && follower.follows && has_all;
            FollowerFigures { store: *store, connected: follower.connected, in_sync, applied: follower.applied, lag }
        }
        None => FollowerFigures { store: *store, connected: false, in_sync: false, applied: 0, lag: Duration::ZERO },
    })
}
