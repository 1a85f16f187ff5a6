//! What the master knows and decides: events in, directives and snapshots out. No clock, no chance, no I/O.
//!
//! Invariants:
//! - Nothing is made, changed or dropped but by proposing it to the holders under a term; it is spread and published when it is chosen.
//! - What a store keeps as chosen is chosen: a standby shows it, and a leader that has not adopted it proposes it.
//! - Keyspace `0` is created only while no store has reported a record or a cluster id.
//! - A store gets its cluster id after all records, so that one with a cluster id and no record never comes from an
//!   interrupted bootstrap: somewhere there are stores that hold the records, and the master waits for them.
//! - A change is answered when it is chosen and the stores with shards of the record that are up keep it.
//! - No id is used twice, and the record of a dropped keyspace stays: it wins over every other version, so no store that was away and no
//!   master brings the keyspace back.
//! - Until a record changes for the first time, the cluster id is a function of it: a master that takes over an interrupted
//!   bootstrap arrives at the same id.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::time::Duration;

use thiserror::Error;
use vasto_proto::id::{ClusterId, Epoch, KeyspaceId, StoreId};
use vasto_proto::pb;
use vasto_proto::slot::splitmix64;
use vasto_proto::topology::ballot::{Request, Term};
use vasto_proto::topology::proposer::ProposeError;
use vasto_proto::topology::{
    Entry, Fsync, KeyspaceRecord, NOBODY, OperationKind, Peers, Phase, Settings, ShardRecord, ShardStatus, Snapshot,
    StoreInfo,
};
use vasto_proto::{COPIES_VERSION, DROP_VERSION, RESIZE_VERSION, SETTINGS_VERSION};

use crate::failover::{self, Planned, PlannedError};
use crate::keyspaces::{self, Creation, Decision, KeyspaceError};
use crate::leadership::{Ballot, Founding, LEADER_SILENCE_MAX, Leadership, Notice, Voter};
use crate::operations::{self, OperationError, OperationWish};
use crate::place::{self, Site};
use crate::progress::{self, Progresses, Step};
use crate::replacing::{self, ReplaceError};
use crate::resizing::{self, ResizeError};
use crate::standing::{self, Standing};

/// The keyspace that an empty cluster starts with; what `SELECT 0` means.
pub const FIRST_KEYSPACE: KeyspaceId = KeyspaceId(0);
const FIRST_KEYSPACE_NAME: &str = "0";

/// After a store could not carry out a directive: long enough not to flood its log, short enough to see a disk freed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How long a change of a keyspace waits for its stores: some heartbeats and a synced file on a busy disk, and less than a
/// gateway waits for the answer.
const ALTER_PATIENCE: Duration = Duration::from_secs(5);

/// How long a change waits for a master that leads: one whose session has ended is followed within a second or two.
const LEADER_PATIENCE: Duration = Duration::from_secs(3);

/// A master that is so young may not have heard of stores that are up.
const YOUTH: Duration = Duration::from_secs(5);

/// Records on their way to one store: fewer than its queue of directives takes, so that a new store gets all records of a cluster with
/// many keyspaces, bit by bit.
const RECORDS_UNDER_WAY_MAX: usize = 16;

/// Free disk is published when it differs by this part of what was published, or by this many bytes if that is more:
/// every heartbeat carries a new figure, and gateways need not hear of each.
const FREE_DISK_PART: u64 = 64;
const FREE_DISK_STEP_BYTES: u64 = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub bootstrap_shards: u16,
    pub bootstrap_stores: usize,
    pub silence_max: Duration,
    /// A holder that is down for so long is replaced.
    pub replace_after: Duration,
}

/// One stream from a store, numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// One change that a gateway asked for, numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What is to be changed in a keyspace; validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alteration {
    pub name: String,
    pub changes: Settings,
    /// The primary and its replicas together; `None` = as before.
    pub copies: Option<u32>,
    /// The version that whoever asks has seen; `None` = any.
    pub expected_epoch: Option<Epoch>,
}

/// Why a keyspace was not altered, or not for sure.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AlterError {
    #[error("no such keyspace '{0}'")]
    NoSuchKeyspace(String),
    #[error("keyspace {name} has epoch {found}, not {expected}; nothing was changed")]
    OtherEpoch { name: String, expected: Epoch, found: Epoch },
    #[error("an earlier change of keyspace {name} is not yet confirmed by stores {stores}; nothing was changed")]
    Busy { name: String, stores: StoreList },
    #[error("stores {stores} of keyspace {name} are down; nothing was changed")]
    StoresDown { name: String, stores: StoreList },
    #[error("stores {stores} run an older version that does not know settings of keyspaces; nothing was changed")]
    StoresOlder { stores: StoreList },
    /// It holds wherever it was confirmed, and everywhere as soon as the others are back.
    #[error(
        "stores {stores} have not confirmed the change of keyspace {name} in time; it goes on, and holds when they have"
    )]
    Unconfirmed { name: String, stores: StoreList },
    #[error("keyspace {name} was changed by somebody else meanwhile")]
    Overtaken { name: String },
    /// Nothing is known: the next leader may find it or not.
    #[error("holders {stores} have not voted for the change of keyspace {name} in time; it may hold later or never")]
    NotChosen { name: String, stores: StoreList },
    #[error("another master leads since term {term}; the change of keyspace {name} was under way and may hold or not")]
    Overruled { name: String, term: u64 },
    #[error("this master is a standby, the master at {leader} leads (term {term}); nothing was changed")]
    Standby { leader: String, term: u64 },
    #[error(
        "{up} of {known} holders of the records are up, and it takes more than half of them; stores {down} are down; nothing was changed"
    )]
    NoMajority { up: usize, known: usize, down: StoreList },
    #[error("no master leads yet: {reason}; nothing was changed")]
    NoLeader { reason: String },
    #[error(transparent)]
    Keyspace(#[from] KeyspaceError),
    #[error(transparent)]
    Planned(#[from] PlannedError),
    #[error(transparent)]
    Operation(#[from] OperationError),
    #[error(transparent)]
    Resize(#[from] ResizeError),
    #[error(transparent)]
    Replace(#[from] ReplaceError),
}

impl AlterError {
    /// Whether another master may do it; nothing was changed.
    pub fn is_elsewhere(&self) -> bool {
        match self {
            Self::Standby { .. } | Self::NoLeader { .. } => true,
            Self::NoSuchKeyspace(_)
            | Self::OtherEpoch { .. }
            | Self::Busy { .. }
            | Self::StoresDown { .. }
            | Self::StoresOlder { .. }
            | Self::Unconfirmed { .. }
            | Self::Overtaken { .. }
            | Self::NotChosen { .. }
            | Self::Overruled { .. }
            | Self::NoMajority { .. }
            | Self::Planned(_)
            | Self::Operation(_)
            | Self::Resize(_)
            | Self::Replace(_)
            | Self::Keyspace(_) => false,
        }
    }
}

/// Stores by their ids, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreList(pub BTreeSet<StoreId>);

impl fmt::Display for StoreList {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, store) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { "," };
            write!(formatter, "{separator}{store}")?;
        }
        Ok(())
    }
}

/// What became of a change.
pub type AlterResult = Result<KeyspaceRecord, AlterError>;

/// What a store says of itself; validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub store: StoreId,
    pub address: String,
    pub protocol_version: u32,
    pub cluster: ClusterId,
    /// All records on its disk; a heartbeat leaves them out.
    pub records: Option<Vec<KeyspaceRecord>>,
    pub free_disk_bytes: u64,
    /// What it does for keyspaces whose records do not say.
    pub fsync: Option<Fsync>,
    pub site: Site,
    /// Why a directive could not be carried out; else empty.
    pub failure: String,
    /// Where each copy on it stands.
    pub shards: Vec<ShardStatus>,
    pub ballot: Ballot,
}

#[derive(Clone, Debug)]
pub enum Event {
    Reported {
        session: SessionId,
        report: Box<Report>,
    },
    SessionEnded {
        session: SessionId,
    },
    /// Answered by [`State::take_answers`], now or later.
    AlterRequested {
        request: RequestId,
        alteration: Alteration,
    },
    /// Answered as a change is.
    CreateRequested {
        request: RequestId,
        creation: Creation,
    },
    /// Answered as a change is.
    DropRequested {
        request: RequestId,
        name: String,
    },
    /// Answered as a change is.
    FailoverRequested {
        request: RequestId,
        planned: Planned,
    },
    /// Answered when the record says so: what follows takes its time.
    OperationRequested {
        request: RequestId,
        wish: OperationWish,
    },
    TimePassed,
}

#[cfg(test)]
impl Event {
    pub fn reported(session: SessionId, report: Report) -> Self {
        Self::Reported { session, report: Box::new(report) }
    }
}

/// What is to be sent to one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    pub session: SessionId,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Acknowledge,
    Prepare(Term),
    Accept(Term, Vec<Entry>),
    Peers(Peers),
    PutRecord(KeyspaceRecord),
    Welcome(ClusterId),
    /// The session ends with this; its end is not reported as an event any more.
    Refuse(Refusal),
}

/// Why a store's session ends.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    #[error("store {store} belongs to cluster {theirs}, but this master leads cluster {ours}")]
    OtherCluster { store: StoreId, theirs: ClusterId, ours: ClusterId },
    #[error("store id {store} is in use by the store at {address}; a copied data folder cannot join")]
    StoreTaken { store: StoreId, address: String },
    #[error("store {store} holds another record of keyspace {keyspace} with the same epoch {epoch}")]
    OtherRecord { store: StoreId, keyspace: KeyspaceId, epoch: Epoch },
    #[error("the session of store {first} reports store {second}")]
    OtherStore { first: StoreId, second: StoreId },
    #[error("the first report of store {store} lacks its {lacking}")]
    Incomplete { store: StoreId, lacking: &'static str },
    #[error("store {store} has opened another session")]
    Replaced { store: StoreId },
}

#[derive(Debug)]
pub struct State {
    limits: Limits,
    /// Where stores and gateways reach this master.
    address: String,
    leadership: Leadership,
    waiting: Vec<Waiting>,
    cluster: ClusterId,
    members: BTreeMap<StoreId, Member>,
    sessions: HashMap<SessionId, StoreId>,
    records: BTreeMap<KeyspaceId, Known>,
    /// Changes that were proposed; at most one for each keyspace.
    pending: BTreeMap<KeyspaceId, Pending>,
    answers: Vec<(RequestId, AlterResult)>,
    standing: Standing,
    progress: Progresses,
    snapshot: Snapshot,
}

/// A store that has registered since the master started.
#[derive(Debug)]
struct Member {
    address: String,
    protocol_version: u32,
    fsync: Option<Fsync>,
    site: Site,
    session: Option<SessionId>,
    reported_at: Duration,
    cluster: ClusterId,
    held: BTreeMap<KeyspaceId, Epoch>,
    free_disk_bytes: u64,
    published_free_disk_bytes: u64,
    /// Directives of this session that need no repetition.
    sent: BTreeMap<KeyspaceId, Epoch>,
    welcomed: bool,
    retry_at: Duration,
    /// What it was told last in this session.
    peers: Option<Peers>,
    ballot: Ballot,
    was_up: bool,
    /// Since when it is up or down.
    since: Duration,
}

#[derive(Debug)]
struct Known {
    /// The newest version that is chosen, which all stores shall have.
    record: KeyspaceRecord,
    /// The version that gateways may know: it came from a store's disk, or the stores that own shards have confirmed it.
    published: Option<KeyspaceRecord>,
    /// Whether the stores with shards must keep the newest version before it is published: somebody waits for that, or the keyspace is new.
    waits: bool,
}

/// A change that waits until this master leads and has settled.
#[derive(Debug)]
struct Waiting {
    request: RequestId,
    wish: Wish,
    asked: Duration,
}

#[derive(Clone, Debug)]
enum Wish {
    Alter(Alteration),
    Create(Creation),
    Drop(String),
    FailOver(Planned),
    Operate(OperationWish),
}

/// A change that waits for the holders, and then for its stores.
#[derive(Debug)]
struct Pending {
    /// Several may want the same.
    requests: Vec<RequestId>,
    record: KeyspaceRecord,
    until: Until,
    deadline: Duration,
}

/// When a change is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// It cannot be lost any more.
    Chosen,
    /// The stores with shards that are up keep it too.
    Confirmed,
}

impl Member {
    fn is_up(&self, now: Duration, silence_max: Duration) -> bool {
        self.session.is_some() && now.saturating_sub(self.reported_at) < silence_max
    }

    /// Whether it hears a master that leads and is not this one, in this life or an earlier one.
    fn hears_leader(&self, address: &str, life: u64, now: Duration) -> bool {
        let silence = now.saturating_sub(self.reported_at);
        let is_other = self.ballot.follows.life != life && (self.ballot.leader != address || address.is_empty());
        is_other && self.was_up && self.ballot.leader_heard.is_some_and(|heard| heard + silence < LEADER_SILENCE_MAX)
    }

    fn holds(&self, record: &KeyspaceRecord) -> bool {
        self.held.get(&record.id).is_some_and(|epoch| *epoch >= record.epoch)
    }
}

impl State {
    /// `address` is where stores and gateways reach this master; `life` is drawn at random by each start.
    pub fn new(limits: Limits, address: String, life: u64) -> Self {
        let mut state = Self {
            limits,
            address,
            leadership: Leadership::new(life),
            waiting: Vec::new(),
            cluster: ClusterId(0),
            members: BTreeMap::new(),
            sessions: HashMap::new(),
            records: BTreeMap::new(),
            pending: BTreeMap::new(),
            answers: Vec::new(),
            standing: Standing::default(),
            progress: Progresses::default(),
            snapshot: Snapshot::default(),
        };
        state.refresh_snapshot(Duration::ZERO);
        state
    }

    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Where stores and gateways reach this master.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The term under which this master leads.
    pub fn term(&self) -> Option<Term> {
        self.leadership.term()
    }

    /// What is to be written in the log, each once.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        self.leadership.take_notices()
    }

    /// `now` counts from the start of the master and never goes back.
    pub fn apply(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Reported { session, report } => match self.admit(session, &report, now) {
                Ok(replaced) => {
                    effects.extend(replaced);
                    self.take_in(session, *report, now);
                    effects.push(Effect { session, action: Action::Acknowledge });
                }
                Err(refusal) => {
                    self.forget_session(session);
                    effects.push(Effect { session, action: Action::Refuse(refusal) });
                }
            },
            Event::SessionEnded { session } => self.forget_session(session),
            Event::AlterRequested { request, alteration } => self.wait(request, Wish::Alter(alteration), now),
            Event::CreateRequested { request, creation } => self.wait(request, Wish::Create(creation), now),
            Event::DropRequested { request, name } => self.wait(request, Wish::Drop(name), now),
            Event::FailoverRequested { request, planned } => self.wait(request, Wish::FailOver(planned), now),
            Event::OperationRequested { request, wish } => self.wait(request, Wish::Operate(wish), now),
            Event::TimePassed => {}
        }
        self.note_presence(now);
        if let Some(term) = self.leadership.take_overruling() {
            self.abandon_pending(term);
        }
        self.leadership.campaign(&self.voters(now), &self.founding(now), now);
        self.adopt_chosen();
        let (disputed, ended) = self.settle_names();
        if self.leadership.is_settled() {
            self.bootstrap(now);
            self.propose_wishes(ended, now);
            self.leadership.tend_group(&self.voters(now), self.limits.replace_after, now);
        }
        self.name_cluster();
        self.serve_waiting(now);
        self.instruct(now, &disputed, &mut effects);
        self.publish_confirmed();
        self.settle_alterations(now);
        self.refresh_snapshot(now);
        effects
    }

    fn wait(&mut self, request: RequestId, wish: Wish, now: Duration) {
        self.waiting.push(Waiting { request, wish, asked: now });
    }

    /// Notes who has come and gone since the last event.
    fn note_presence(&mut self, now: Duration) {
        let silence_max = self.limits.silence_max;
        for member in self.members.values_mut() {
            let is_up = member.is_up(now, silence_max);
            if is_up != member.was_up {
                (member.was_up, member.since) = (is_up, now);
            }
        }
    }

    fn voters(&self, now: Duration) -> BTreeMap<StoreId, Voter> {
        let voter = |member: &Member| Voter {
            is_up: member.was_up,
            votes: member.protocol_version >= COPIES_VERSION,
            since: member.since,
            follows: member.ballot.follows,
            hears_leader: self.hears_leader(member, now),
        };
        self.members.iter().map(|(store, member)| (*store, voter(member))).collect()
    }

    /// What must be there before a cluster without a group gets one.
    fn founding(&self, now: Duration) -> Founding {
        let living = self.records.values().map(|known| &known.record).filter(|record| !record.dropped);
        let owners: BTreeSet<StoreId> = living.flat_map(holders).collect();
        let is_empty = self.records.is_empty() && self.cluster == ClusterId(0);
        let is_ready = !owners.is_empty() || is_empty && self.up(now).count() >= self.limits.bootstrap_stores;
        Founding { owners, is_ready }
    }

    /// Takes over what a majority of the holders has voted for under this master's term.
    fn adopt_chosen(&mut self) {
        for (record, is_chosen) in self.leadership.records() {
            if !is_chosen {
                continue;
            }
            let is_awaited = |pending: &Pending| pending.record == *record && pending.until == Until::Confirmed;
            let is_awaited = self.pending.get(&record.id).is_some_and(is_awaited);
            match self.records.get_mut(&record.id) {
                Some(known) if known.record.epoch < record.epoch => {
                    known.record = record.clone();
                    known.waits = is_awaited || known.published.is_none();
                }
                Some(_) => {}
                None => {
                    self.records.insert(record.id, Known { record: record.clone(), published: None, waits: true });
                }
            }
        }
    }

    /// The one place where a leader changes records by itself: the next versions that it wishes for are proposed, one at a time for each
    /// keyspace. What cannot be proposed now is wished for again.
    fn propose_wishes(&mut self, ended: Vec<KeyspaceRecord>, now: Duration) {
        let newest: BTreeMap<KeyspaceId, Epoch> =
            self.leadership.records().map(|(record, _)| (record.id, record.epoch)).collect();
        // What a store keeps as chosen, and no holder that has promised had heard of: from before there were terms.
        let is_missing = |record: &&KeyspaceRecord| newest.get(&record.id).is_none_or(|epoch| *epoch < record.epoch);
        let missing = self.records.values().map(|known| &known.record).filter(is_missing).cloned();
        let mut wishes: Vec<KeyspaceRecord> = missing.chain(ended).collect();
        wishes.extend(self.copies_wished(now));
        for record in wishes {
            // Busy: the change before is not chosen yet.
            let _ = self.leadership.propose(record);
        }
    }

    /// The next versions of records by which who leads and who holds is to be changed. What is being voted on is waited for.
    fn copies_wished(&mut self, now: Duration) -> Vec<KeyspaceRecord> {
        let living = self.records.values().map(|known| &known.record).filter(|record| !record.dropped);
        for record in living {
            self.standing.note(record, now);
        }
        let lives = |keyspace| self.records.get(&keyspace).is_some_and(|known| !known.record.dropped);
        self.standing.keep(lives);
        self.progress.keep(lives);
        self.note_operations(now);
        let under_way: BTreeSet<KeyspaceId> =
            self.leadership.records().filter(|(_, is_chosen)| !is_chosen).map(|(record, _)| record.id).collect();
        let view = self.standing_view(now);
        let (mut wishes, mut unfit, mut lifted) = (Vec::new(), Vec::new(), Vec::new());
        for known in self.records.values().filter(|known| !under_way.contains(&known.record.id)) {
            let record = &known.record;
            if let Some(next) = self.next_version(record, &view) {
                unfit.extend(failover::unfit(record, &next, &view));
                if phases(record, &next) == (Some(Phase::Fence), Some(Phase::Copy)) {
                    lifted.push((record.id, self.operation_waits_for(record, &view)));
                }
                reach_fail_point_before(record, &next);
                wishes.push(next);
            }
        }
        for (key, epoch, store) in unfit {
            self.standing.note_unfit(key, epoch, store);
        }
        for (keyspace, reason) in lifted {
            self.progress.note_lift(keyspace, reason);
        }
        wishes
    }

    /// The next version of a record that is wished now.
    fn next_version(&self, record: &KeyspaceRecord, view: &standing::View<'_>) -> Option<KeyspaceRecord> {
        match record.active_operation().map(|operation| operation.kind) {
            Some(OperationKind::Resize { .. }) => {
                resizing::next(record, self.progress.of(record)?, &self.awaited(record), view)
            }
            Some(OperationKind::Replace { .. }) => replacing::next(record, view),
            None => failover::next(record, view),
        }
    }

    /// Takes in how far operations have come.
    fn note_operations(&mut self, now: Duration) {
        let mut progress = std::mem::take(&mut self.progress);
        // Most of the time nothing goes on anywhere, and no view is needed.
        let known = self.records.values().map(|known| &known.record);
        let mut operating = known.filter(|record| progress.concerns(record)).collect::<Vec<_>>().into_iter().peekable();
        if operating.peek().is_some() {
            let view = self.standing_view(now);
            for record in operating {
                progress.note(record, &view);
                progress.sample(record, &view);
            }
        }
        self.progress = progress;
    }

    /// What the next step of a keyspace's operation waits for, in words.
    fn operation_waits_for(&self, record: &KeyspaceRecord, view: &standing::View<'_>) -> String {
        match (record.active_operation().map(|operation| operation.kind), self.progress.of(record)) {
            (Some(OperationKind::Resize { .. }), Some(progress)) => {
                resizing::waits_for(record, progress, &self.awaited(record), view)
            }
            (Some(OperationKind::Replace { .. }), _) => replacing::waits_for(record, view),
            (Some(OperationKind::Resize { .. }) | None, _) => String::new(),
        }
    }

    /// How far the operation of a keyspace has come.
    pub fn operation_status(&self, name: &str, now: Duration) -> Result<pb::OperationStatus, AlterError> {
        if !self.leadership.is_settled() {
            self.may_change(now).map_err(|(NotNow::Yet(error) | NotNow::Never(error))| error)?;
        }
        let mut living = self.records.values().filter(|known| !known.record.dropped);
        let Some(known) = living.find(|known| known.record.name == name) else {
            return Err(AlterError::NoSuchKeyspace(name.to_owned()));
        };
        let view = self.standing_view(now);
        let waits_for = self.operation_waits_for(&known.record, &view);
        Ok(progress::describe(&known.record, self.progress.of(&known.record), waits_for, &view))
    }

    /// The steps of operations since the last time, for the log.
    pub fn take_steps(&mut self) -> Vec<Step> {
        self.progress.take_steps()
    }

    /// How many operations go on, as far as this master has seen.
    pub fn operations_running(&self) -> usize {
        self.progress.running()
    }

    /// Carries out the changes that wait, or answers why not, or lets them wait.
    fn serve_waiting(&mut self, now: Duration) {
        for waiting in std::mem::take(&mut self.waiting) {
            let Waiting { request, wish, asked } = waiting;
            match self.may_change(now) {
                Ok(()) => match wish {
                    Wish::Alter(alteration) => {
                        let altered = self.try_alter(&alteration, now);
                        self.make(request, altered, asked, Until::Confirmed);
                    }
                    Wish::FailOver(planned) => {
                        let altered = self.try_fail_over(&planned, now);
                        self.make(request, altered, asked, Until::Confirmed);
                    }
                    Wish::Operate(wish) => {
                        let altered = self.try_operate(&wish, now);
                        // The change before, of which the master itself may be the author, is about to be confirmed, or a shard to be served.
                        let may_come = |error: &AlterError| {
                            matches!(error, AlterError::Busy { .. } | AlterError::Resize(ResizeError::NotServed(_)))
                        };
                        if altered.as_ref().is_err_and(may_come) && now < asked + LEADER_PATIENCE {
                            self.waiting.push(Waiting { request, wish: Wish::Operate(wish), asked });
                        } else {
                            self.make(request, altered, asked, Until::Chosen);
                        }
                    }
                    Wish::Create(creation) => {
                        let decision = keyspaces::create(&self.view(now), &creation);
                        self.carry_out(request, decision, asked);
                    }
                    Wish::Drop(name) => {
                        let decision = keyspaces::drop(&self.view(now), &name);
                        self.carry_out(request, decision, asked);
                    }
                },
                Err(NotNow::Yet(_)) if now < asked + LEADER_PATIENCE => {
                    self.waiting.push(Waiting { request, wish, asked });
                }
                Err(NotNow::Yet(error) | NotNow::Never(error)) => {
                    // Of a store that is down it matters more that it serves the keyspace than that it is a holder.
                    let nearer = match (&error, &wish) {
                        (AlterError::NoMajority { .. }, Wish::Alter(alteration)) => {
                            self.try_alter(alteration, now).err()
                        }
                        _ => None,
                    };
                    self.answers.push((request, Err(nearer.unwrap_or(error))));
                }
            }
        }
    }

    fn may_change(&self, now: Duration) -> Result<(), NotNow> {
        if let Some(member) = self.leader_heard(now).filter(|_| !self.leadership.leads()) {
            let (leader, term) = (member.ballot.leader.clone(), member.ballot.follows.number);
            return Err(NotNow::Never(AlterError::Standby { leader, term }));
        }
        let Some(group) = self.leadership.heard_group() else {
            if self.members.is_empty() {
                let reason = "no store has come".to_owned();
                return Err(NotNow::Yet(AlterError::NoLeader { reason }));
            }
            if self.records.is_empty() {
                return Err(NotNow::Yet(KeyspaceError::NotBootstrapped.into()));
            }
            let owners = self.founding(now).owners;
            let is_there = |store: &StoreId| self.members.get(store).is_some_and(|member| member.was_up);
            let missing = StoreList(owners.into_iter().filter(|store| !is_there(store)).collect());
            let reason = if missing.0.is_empty() {
                "the stores are being asked for their votes".to_owned()
            } else {
                format!(
                    "stores {missing} have shards and have not come, and all such stores must before the first term"
                )
            };
            return Err(NotNow::Yet(AlterError::NoLeader { reason }));
        };
        let is_up = |store: &&StoreId| self.members.get(*store).is_some_and(|member| member.was_up);
        let up: BTreeSet<StoreId> = group.members.iter().filter(is_up).copied().collect();
        if up.len() < group.quorum() {
            let down = StoreList(group.members.difference(&up).copied().collect());
            let error = AlterError::NoMajority { up: up.len(), known: group.members.len(), down };
            return Err(if now < YOUTH { NotNow::Yet(error) } else { NotNow::Never(error) });
        }
        // Votes that nobody waits for are for the next group, or for what a new leader has adopted.
        let is_busy = self.leadership.records().any(|(it, is_chosen)| !is_chosen && !self.pending.contains_key(&it.id));
        if !self.leadership.is_settled() || is_busy {
            let reason = "the holders are being asked for their votes".to_owned();
            return Err(NotNow::Yet(AlterError::NoLeader { reason }));
        }
        Ok(())
    }

    /// Another master leads: what was under way here is in its hands.
    fn abandon_pending(&mut self, Term { number: term, .. }: Term) {
        for pending in std::mem::take(&mut self.pending).into_values() {
            let name = pending.record.name;
            let answer = |request| (request, Err(AlterError::Overruled { name: name.clone(), term }));
            self.answers.extend(pending.requests.into_iter().map(answer));
        }
    }

    /// The answers that are ready, each once.
    pub fn take_answers(&mut self) -> Vec<(RequestId, AlterResult)> {
        std::mem::take(&mut self.answers)
    }

    /// Whether the report may be taken in; if so, the end of the session that it replaces.
    fn admit(&self, session: SessionId, report: &Report, now: Duration) -> Result<Option<Effect>, Refusal> {
        let store = report.store;
        match self.sessions.get(&session) {
            Some(first) if *first != store => return Err(Refusal::OtherStore { first: *first, second: store }),
            None if report.records.is_none() => return Err(Refusal::Incomplete { store, lacking: "records" }),
            Some(_) | None => {}
        }
        if report.address.is_empty() {
            return Err(Refusal::Incomplete { store, lacking: "address" });
        }
        if report.cluster != ClusterId(0) && self.cluster != ClusterId(0) && report.cluster != self.cluster {
            return Err(Refusal::OtherCluster { store, theirs: report.cluster, ours: self.cluster });
        }
        for record in report.records.iter().flatten() {
            let known = self.records.get(&record.id).map(|known| &known.record);
            if known.is_some_and(|known| known.contradicts(record)) {
                return Err(Refusal::OtherRecord { store, keyspace: record.id, epoch: record.epoch });
            }
        }
        let Some(member) = self.members.get(&store) else {
            return Ok(None);
        };
        match member.session {
            Some(other) if other != session => {
                if member.address != report.address && member.is_up(now, self.limits.silence_max) {
                    return Err(Refusal::StoreTaken { store, address: member.address.clone() });
                }
                // The same store came back before its old stream was found dead.
                Ok(Some(Effect { session: other, action: Action::Refuse(Refusal::Replaced { store }) }))
            }
            Some(_) | None => Ok(None),
        }
    }

    fn take_in(&mut self, session: SessionId, report: Report, now: Duration) {
        if self.cluster == ClusterId(0) {
            self.cluster = report.cluster;
        }
        let member = self.members.entry(report.store).or_insert_with(|| Member {
            address: String::new(),
            protocol_version: report.protocol_version,
            fsync: report.fsync,
            site: report.site.clone(),
            session: None,
            reported_at: now,
            cluster: report.cluster,
            held: BTreeMap::new(),
            free_disk_bytes: report.free_disk_bytes,
            published_free_disk_bytes: report.free_disk_bytes,
            sent: BTreeMap::new(),
            welcomed: false,
            retry_at: Duration::ZERO,
            peers: None,
            ballot: Ballot::default(),
            was_up: false,
            since: now,
        });
        if member.session != Some(session) {
            if let Some(old) = member.session.replace(session) {
                self.sessions.remove(&old);
            }
            self.sessions.insert(session, report.store);
            member.sent.clear();
            member.welcomed = false;
            member.retry_at = Duration::ZERO;
            member.peers = None;
            self.leadership.forget_session(report.store);
        }
        member.address = report.address;
        member.protocol_version = report.protocol_version;
        member.fsync = report.fsync;
        member.site = report.site;
        member.reported_at = now;
        member.cluster = report.cluster;
        member.free_disk_bytes = report.free_disk_bytes;
        if !report.failure.is_empty() {
            member.sent.clear();
            member.welcomed = false;
            member.peers = None;
            member.retry_at = now + RETRY_PAUSE;
            self.leadership.forget_session(report.store);
        }
        member.ballot = report.ballot;
        self.leadership.hear(report.store, &mut member.ballot, now);
        if let Some(records) = &report.records {
            member.held = records.iter().map(|record| (record.id, record.epoch)).collect();
        }
        self.progress.hear(report.store, &report.shards, now);
        self.standing.hear(report.store, report.shards, &member.held, now);
        for record in report.records.into_iter().flatten() {
            let newer = self.records.get(&record.id).is_none_or(|known| known.record.epoch < record.epoch);
            if newer {
                self.records.insert(record.id, Known { published: Some(record.clone()), record, waits: false });
            }
        }
    }

    fn forget_session(&mut self, session: SessionId) {
        let store = self.sessions.remove(&session);
        if let Some((store, member)) = store.and_then(|store| Some((store, self.members.get_mut(&store)?))) {
            member.session = None;
            self.leadership.forget_session(store);
        }
    }

    /// Proposes keyspace `0` in a cluster that has nothing yet.
    fn bootstrap(&mut self, now: Duration) {
        let is_proposed = self.leadership.records().next().is_some();
        if self.cluster != ClusterId(0) || !self.records.is_empty() || is_proposed {
            return;
        }
        let candidates = self.candidates(now);
        if candidates.len() < self.limits.bootstrap_stores {
            return;
        }
        let Ok(placed) = place::place(self.limits.bootstrap_shards, 1, &candidates) else { return };
        let primaries: Vec<StoreId> = placed.into_iter().flatten().collect();
        let record = KeyspaceRecord::new(FIRST_KEYSPACE, FIRST_KEYSPACE_NAME, &primaries)
            .expect("the shard count was checked when the master was bound");
        // It leads and there is no record: it is not refused.
        let _ = self.leadership.propose(record);
    }

    /// The cluster id follows from the first record, once that is chosen.
    fn name_cluster(&mut self) {
        if self.cluster == ClusterId(0) {
            self.cluster = self.records.values().find_map(|known| cluster_of(&known.record)).unwrap_or_default();
        }
    }

    fn up(&self, now: Duration) -> impl Iterator<Item = (StoreId, &Member)> {
        let silence_max = self.limits.silence_max;
        self.members.iter().filter(move |(_, member)| member.is_up(now, silence_max)).map(|(id, member)| (*id, member))
    }

    /// The stores that may get shards.
    fn candidates(&self, now: Duration) -> Vec<place::Candidate> {
        let living = self.records.values().map(|known| &known.record).filter(|record| !record.dropped);
        let held = place::count_copies(living.flat_map(holders));
        let candidate = |(id, member): (StoreId, &Member)| place::Candidate {
            id,
            free_disk_bytes: member.free_disk_bytes,
            site: member.site.clone(),
            held: held.get(&id).copied().unwrap_or_default(),
        };
        self.up(now).map(candidate).collect()
    }

    /// What is known of stores and the copies on them.
    fn standing_view(&self, now: Duration) -> standing::View<'_> {
        let living = self.records.values().map(|known| &known.record).filter(|record| !record.dropped);
        let held = place::count_copies(living.flat_map(holders));
        let silence_max = self.limits.silence_max;
        let store = |(id, member): (&StoreId, &Member)| {
            let up = member.is_up(now, silence_max);
            let candidate = place::Candidate {
                id: *id,
                free_disk_bytes: member.free_disk_bytes,
                site: member.site.clone(),
                held: held.get(id).copied().unwrap_or_default(),
            };
            let since = if up { member.since } else { member.reported_at };
            let older = member.protocol_version < COPIES_VERSION;
            (*id, standing::Store { candidate, up, since, older })
        };
        standing::View {
            now,
            began: Duration::ZERO,
            replace_after: self.limits.replace_after,
            stores: self.members.iter().map(store).collect(),
            standing: &self.standing,
        }
    }

    /// Every store that has come since the master started, or that a living record names.
    fn known_stores(&self) -> BTreeSet<StoreId> {
        let living = self.records.values().map(|known| &known.record).filter(|record| !record.dropped);
        living.flat_map(holders).chain(self.members.keys().copied()).collect()
    }

    /// The newest version of each record, proposed ones among them.
    fn newest(&self) -> BTreeMap<KeyspaceId, &KeyspaceRecord> {
        let mut newest: BTreeMap<KeyspaceId, &KeyspaceRecord> =
            self.records.iter().map(|(id, known)| (*id, &known.record)).collect();
        for (record, _) in self.leadership.records() {
            if newest.get(&record.id).is_none_or(|known| known.epoch <= record.epoch) {
                newest.insert(record.id, record);
            }
        }
        newest
    }

    fn view(&self, now: Duration) -> keyspaces::View<'_> {
        let newest = self.newest();
        let published = |record: &&KeyspaceRecord| {
            self.records.get(&record.id).is_some_and(|known| known.published.as_ref() == Some(*record))
        };
        let is_older = |(_, member): &(&StoreId, &Member)| member.protocol_version < DROP_VERSION;
        let lacks_copies = |(_, member): &(&StoreId, &Member)| member.protocol_version < COPIES_VERSION;
        keyspaces::View {
            published: newest.values().copied().filter(published).map(|record| record.id).collect(),
            records: newest.into_values().collect(),
            up: self.candidates(now),
            older: self.members.iter().filter(is_older).map(|(store, _)| *store).collect(),
            without_copies: self.members.iter().filter(lacks_copies).map(|(store, _)| *store).collect(),
            moment: splitmix64(now.as_nanos() as u64),
        }
    }

    /// Of two keyspaces of one name, made by two masters of before there were terms, the one that is on more than half of the stores stays:
    /// nobody was told of the other. Returns those of which it is not known yet which one that is, they are not spread any further; and the
    /// ends of the others.
    fn settle_names(&self) -> (BTreeSet<KeyspaceId>, Vec<KeyspaceRecord>) {
        let mut by_name: BTreeMap<&str, Vec<&KeyspaceRecord>> = BTreeMap::new();
        for known in self.records.values().filter(|known| !known.record.dropped) {
            by_name.entry(&known.record.name).or_default().push(&known.record);
        }
        by_name.retain(|_, records| records.len() > 1);
        if by_name.is_empty() {
            return (BTreeSet::new(), Vec::new());
        }
        let stores = self.known_stores();
        let holders = |record: &KeyspaceRecord| self.members.values().filter(|member| member.holds(record)).count();
        let (mut disputed, mut ended) = (BTreeSet::new(), Vec::new());
        for records in by_name.into_values() {
            let decided = records.iter().find(|record| holders(record) * 2 > stores.len());
            // When all are heard and none is on most of them, nobody was told of any of them.
            let is_over = stores.iter().all(|store| self.members.contains_key(store));
            match decided.or(records.last().filter(|_| is_over)) {
                Some(winner) => ended
                    .extend(records.iter().filter(|record| record.id != winner.id).map(|record| record.as_dropped())),
                None => disputed.extend(records.iter().map(|record| record.id)),
            }
        }
        (disputed, ended)
    }

    /// Proposes what was decided, or answers.
    fn carry_out(&mut self, request: RequestId, decision: Result<Decision, KeyspaceError>, asked: Duration) {
        match decision {
            Ok(Decision::Holds(record)) => self.answers.push((request, Ok(record))),
            Err(error) => self.answers.push((request, Err(error.into()))),
            Ok(Decision::UnderWay(record)) => self.await_change(request, record, asked, Until::Confirmed),
            Ok(Decision::Make(record)) => self.propose(request, record, asked, Until::Confirmed),
        }
    }

    fn propose(&mut self, request: RequestId, record: KeyspaceRecord, asked: Duration, until: Until) {
        let name = record.name.clone();
        let error = match self.leadership.propose(record.clone()) {
            Ok(()) => return self.await_change(request, record, asked, until),
            Err(ProposeError::Busy | ProposeError::NotOneStore) => {
                AlterError::Busy { name, stores: StoreList(self.leadership.awaited(record.id)) }
            }
            Err(ProposeError::NotLeading) => AlterError::NoLeader { reason: "this master was overruled".to_owned() },
            Err(ProposeError::OtherEpoch { expected, found }) => AlterError::OtherEpoch { name, expected, found },
            Err(ProposeError::Gap { .. }) => AlterError::Overtaken { name },
        };
        self.answers.push((request, Err(error)));
    }

    fn await_change(&mut self, request: RequestId, record: KeyspaceRecord, asked: Duration, until: Until) {
        match self.pending.get_mut(&record.id) {
            Some(pending) if pending.record == record => pending.requests.push(request),
            Some(_) | None => {
                let deadline = asked + ALTER_PATIENCE;
                let name = record.name.clone();
                let pending = Pending { requests: vec![request], record, until, deadline };
                if let Some(overtaken) = self.pending.insert(pending.record.id, pending) {
                    let answer = |request| (request, Err(AlterError::Overtaken { name: name.clone() }));
                    self.answers.extend(overtaken.requests.into_iter().map(answer));
                }
            }
        }
    }

    /// The stores with shards of it that are up and have yet to say that they keep the newest version of a record.
    fn awaited(&self, record: &KeyspaceRecord) -> BTreeSet<StoreId> {
        let mut awaited = unconfirmed(record, &self.members, self.cluster);
        // One that is down gets to know when it is back: until then it serves nobody.
        awaited.retain(|store| self.members.get(store).is_some_and(|member| member.was_up));
        awaited
    }

    /// Sends each store what it lacks: the votes that it is asked for; and from the leader the records, where the others are, and when it has
    /// all records, its cluster id.
    fn instruct(&mut self, now: Duration, disputed: &BTreeSet<KeyspaceId>, effects: &mut Vec<Effect>) {
        // Until a cluster of before there were terms has its first group, everybody spreads what is on the disks.
        let spreads = self.leadership.leads() || self.leadership.heard_group().is_none();
        let peers = self.leadership.group().map(|group| Peers {
            addresses: self.members.iter().map(|(store, member)| (*store, member.address.clone())).collect(),
            group: group.clone(),
        });
        for (store, member) in &mut self.members {
            let Some(session) = member.session else { continue };
            if now < member.retry_at || !member.is_up(now, self.limits.silence_max) {
                continue;
            }
            if member.protocol_version >= COPIES_VERSION {
                for action in ballot_of(self.leadership.requests(*store, now)) {
                    effects.push(Effect { session, action });
                }
                if peers.is_some() && member.peers != peers {
                    member.peers.clone_from(&peers);
                    effects.extend(peers.clone().map(|peers| Effect { session, action: Action::Peers(peers) }));
                }
            }
            if !spreads {
                continue;
            }
            let mut lacks_records = self.records.is_empty();
            let lacks = |(id, epoch): &(&KeyspaceId, &Epoch)| member.held.get(id).is_none_or(|held| held < *epoch);
            let mut under_way = member.sent.iter().filter(lacks).count();
            for known in self.records.values() {
                let record = &known.record;
                if member.holds(record) || disputed.contains(&record.id) {
                    continue;
                }
                lacks_records = true;
                let is_due = member.sent.get(&record.id).is_none_or(|sent| *sent < record.epoch);
                if is_due && under_way < RECORDS_UNDER_WAY_MAX {
                    under_way += 1;
                    member.sent.insert(record.id, record.epoch);
                    effects.push(Effect { session, action: Action::PutRecord(record.clone()) });
                }
            }
            let joins = member.cluster == ClusterId(0) && self.cluster != ClusterId(0);
            if joins && !lacks_records && !member.welcomed {
                member.welcomed = true;
                effects.push(Effect { session, action: Action::Welcome(self.cluster) });
            }
        }
    }

    fn publish_confirmed(&mut self) {
        let is_due = |known: &&Known| {
            known.published.as_ref() != Some(&known.record) && (!known.waits || self.is_confirmed(&known.record))
        };
        let due: Vec<KeyspaceId> = self.records.values().filter(is_due).map(|known| known.record.id).collect();
        for keyspace in due {
            if let Some(known) = self.records.get_mut(&keyspace) {
                known.published = Some(known.record.clone());
                known.waits = false;
            }
        }
    }

    fn is_confirmed(&self, record: &KeyspaceRecord) -> bool {
        // Without any of its stores, nobody has said that the keyspace is there.
        let keeps = |member: &Member| member.holds(record) && member.cluster == self.cluster;
        let is_kept = record.dropped || self.members.values().any(keeps);
        is_kept && self.cluster != ClusterId(0) && self.awaited(record).is_empty()
    }

    /// Proposes the next version of a record, or answers why not.
    fn make(&mut self, request: RequestId, altered: Result<Altered, AlterError>, asked: Duration, until: Until) {
        match altered {
            Ok(Altered::Nothing(record)) => self.answers.push((request, Ok(record))),
            Ok(Altered::Made(record)) => self.propose(request, record, asked, until),
            Err(error) => self.answers.push((request, Err(error))),
        }
    }

    fn try_fail_over(&self, planned: &Planned, now: Duration) -> Result<Altered, AlterError> {
        let record = self.changeable(&planned.name, now)?;
        operations::require_none(record)?;
        Ok(Altered::Made(failover::plan(record, planned, &self.standing_view(now))?))
    }

    /// The next version of a record with an operation begun or ended.
    fn try_operate(&self, wish: &OperationWish, now: Duration) -> Result<Altered, AlterError> {
        let record = self.newest_of(wish.name())?;
        if let OperationWish::Abort { .. } = wish {
            return Ok(Altered::Made(operations::abort(record)?));
        }
        operations::require_none(record)?;
        // Every store keeps every record: an older one would keep it without what it says of operations.
        let is_older = |(_, member): &(&StoreId, &Member)| member.protocol_version < RESIZE_VERSION;
        let older: BTreeSet<StoreId> = self.members.iter().filter(is_older).map(|(store, _)| *store).collect();
        if !older.is_empty() {
            return Err(OperationError::StoresOlder(StoreList(older)).into());
        }
        let view = self.standing_view(now);
        Ok(Altered::Made(match wish {
            OperationWish::Resize { name, shards } => resizing::begin(self.changeable(name, now)?, *shards, &view)?,
            OperationWish::Replace { store, with, .. } => replacing::begin(record, *store, *with, &view)?,
            OperationWish::Abort { .. } => operations::abort(record)?,
        }))
    }

    /// The newest record of a keyspace that gateways know.
    fn newest_of(&self, name: &str) -> Result<&KeyspaceRecord, AlterError> {
        let is_meant = |known: &&Known| known.published.as_ref().is_some_and(|published| published.name == name);
        let newest = self.newest();
        let mut meant =
            self.records.values().filter(is_meant).filter_map(|known| newest.get(&known.record.id).copied());
        meant.find(|record| !record.dropped).ok_or_else(|| AlterError::NoSuchKeyspace(name.to_owned()))
    }

    /// The newest record of a keyspace of which no change is under way.
    fn changeable(&self, name: &str, now: Duration) -> Result<&KeyspaceRecord, AlterError> {
        let record = self.newest_of(name)?;
        let name = name.to_owned();
        let mut unconfirmed = unconfirmed(record, &self.members, self.cluster);
        let silence_max = self.limits.silence_max;
        let is_up = |store: &StoreId| self.members.get(store).is_some_and(|member| member.is_up(now, silence_max));
        let primaries = record.shards.iter().map(|shard| shard.primary).filter(|store| *store != NOBODY);
        let down: BTreeSet<StoreId> = primaries.filter(|store| !is_up(store)).collect();
        // A store that is down could come back under the old settings after the new ones were confirmed.
        if !down.is_empty() {
            return Err(AlterError::StoresDown { name, stores: StoreList(down) });
        }
        unconfirmed.retain(is_up);
        if self.leadership.records().any(|(proposed, is_chosen)| proposed.id == record.id && !is_chosen) {
            unconfirmed.extend(self.leadership.awaited(record.id));
        }
        if !unconfirmed.is_empty() || self.pending.contains_key(&record.id) {
            return Err(AlterError::Busy { name, stores: StoreList(unconfirmed) });
        }
        Ok(record)
    }

    fn try_alter(&self, alteration: &Alteration, now: Duration) -> Result<Altered, AlterError> {
        let name = alteration.name.clone();
        let record = self.changeable(&name, now)?;
        // Every store keeps every record: an older one would keep it without its settings.
        let is_older = |(_, member): &(StoreId, &Member)| member.protocol_version < SETTINGS_VERSION;
        let older: BTreeSet<StoreId> = self.up(now).filter(is_older).map(|(store, _)| store).collect();
        if !older.is_empty() {
            return Err(AlterError::StoresOlder { stores: StoreList(older) });
        }
        if let Some(expected) = alteration.expected_epoch.filter(|expected| *expected != record.epoch) {
            return Err(AlterError::OtherEpoch { name, expected, found: record.epoch });
        }
        if alteration.copies.is_some_and(|copies| copies != record.copies) {
            operations::require_none(record)?;
        }
        Ok(match keyspaces::alter(&self.view(now), record, alteration)? {
            Some(record) => Altered::Made(record),
            None => Altered::Nothing(record.clone()),
        })
    }

    /// Answers those changes that are confirmed, and those that have waited for too long.
    fn settle_alterations(&mut self, now: Duration) {
        let waiting = std::mem::take(&mut self.pending);
        for (keyspace, pending) in waiting {
            let name = pending.record.name.clone();
            let known = self.records.get(&keyspace).filter(|known| known.record.epoch >= pending.record.epoch);
            let same = |record: &KeyspaceRecord| {
                let id = |record: &KeyspaceRecord| record.operation.as_ref().map(|operation| operation.id);
                !record.dropped && id(record) == id(&pending.record)
            };
            let chosen = known.filter(|_| pending.until == Until::Chosen);
            let answer = if let Some(known) = chosen {
                if same(&known.record) { Ok(known.record.clone()) } else { Err(AlterError::Overtaken { name }) }
            } else if let Some(known) = known.filter(|known| known.published.as_ref() == Some(&known.record)) {
                let awaited = self.awaited(&known.record);
                if !awaited.is_empty() {
                    Err(AlterError::Unconfirmed { name, stores: StoreList(awaited) })
                } else if known.record == pending.record || !known.record.dropped {
                    Ok(known.record.clone())
                } else {
                    Err(AlterError::Overtaken { name })
                }
            } else if now >= pending.deadline {
                match known {
                    Some(known) => {
                        Err(AlterError::Unconfirmed { name, stores: StoreList(self.awaited(&known.record)) })
                    }
                    None => Err(AlterError::NotChosen { name, stores: StoreList(self.leadership.awaited(keyspace)) }),
                }
            } else {
                self.pending.insert(keyspace, pending);
                continue;
            };
            self.answers.extend(pending.requests.into_iter().map(|request| (request, answer.clone())));
        }
    }

    fn refresh_snapshot(&mut self, now: Duration) {
        let silence_max = self.limits.silence_max;
        let mut stores: BTreeMap<StoreId, StoreInfo> = BTreeMap::new();
        // Stores that records name but that have not come since the master started: down, address unknown.
        let living = self.records.values().map(|known| &known.record).filter(|record| !record.dropped);
        for store in living.flat_map(stores_of) {
            let info = StoreInfo {
                id: store,
                address: String::new(),
                up: false,
                free_disk_bytes: 0,
                fsync: None,
                zone: String::new(),
                tags: Vec::new(),
            };
            stores.insert(store, info);
        }
        for (id, member) in &mut self.members {
            let step = FREE_DISK_STEP_BYTES.max(member.published_free_disk_bytes / FREE_DISK_PART);
            if member.free_disk_bytes.abs_diff(member.published_free_disk_bytes) > step {
                member.published_free_disk_bytes = member.free_disk_bytes;
            }
            let info = StoreInfo {
                id: *id,
                address: member.address.clone(),
                up: member.is_up(now, silence_max),
                free_disk_bytes: member.published_free_disk_bytes,
                fsync: member.fsync,
                zone: member.site.zone.clone(),
                tags: member.site.tags.clone(),
            };
            stores.insert(*id, info);
        }
        // A cluster id that is on no disk yet may still become another one.
        let confirmed = self.members.values().any(|member| member.cluster == self.cluster);
        let cluster = if confirmed { self.cluster } else { ClusterId(0) };
        let published = self.records.values().filter_map(|known| known.published.clone());
        let published = published.filter(|_| cluster != ClusterId(0));
        let (dropped, keyspaces): (Vec<KeyspaceRecord>, Vec<_>) = published.partition(|record| record.dropped);
        let waiting_for = if keyspaces.is_empty() { self.waiting_for(now) } else { String::new() };
        let mut snapshot = Snapshot {
            cluster,
            version: self.snapshot.version,
            stores: stores.into_values().collect(),
            keyspaces,
            waiting_for,
            leadership: self.describe_leadership(now),
            dropped: dropped.into_iter().map(|record| record.id).collect(),
        };
        if snapshot != self.snapshot {
            snapshot.version += 1;
            self.snapshot = snapshot;
        }
    }

    fn hears_leader(&self, member: &Member, now: Duration) -> bool {
        member.hears_leader(&self.address, self.leadership.life(), now)
    }

    /// The store that hears the other master of the highest term.
    fn leader_heard(&self, now: Duration) -> Option<&Member> {
        let heard = self.members.values().filter(|member| self.hears_leader(member, now));
        heard.max_by_key(|member| member.ballot.follows)
    }

    fn describe_leadership(&self, now: Duration) -> vasto_proto::topology::Leadership {
        let heard = self.leader_heard(now);
        let (term, address, is_own) = match (self.leadership.term(), heard) {
            (Some(term), _) => (term.number, self.address.clone(), true),
            (None, Some(member)) => (member.ballot.follows.number, member.ballot.leader.clone(), false),
            (None, None) => (0, String::new(), false),
        };
        let up = self.members.values().filter(|member| member.was_up);
        let mut masters: BTreeSet<String> = up.flat_map(|member| member.ballot.masters.iter().cloned()).collect();
        masters.insert(self.address.clone());
        masters.remove(&address);
        masters.remove("");
        let group = self.leadership.heard_group().cloned().unwrap_or_default();
        vasto_proto::topology::Leadership { term, address, is_own, standbys: masters.into_iter().collect(), group }
    }

    /// What is missing until a keyspace is served, in words.
    fn waiting_for(&self, now: Duration) -> String {
        let up = self.up(now).count();
        let Some(known) = self.records.values().find(|known| !known.record.dropped) else {
            return if self.cluster == ClusterId(0) {
                let needed = self.limits.bootstrap_stores;
                format!("{up} of {needed} stores registered; keyspace {FIRST_KEYSPACE_NAME} is created when all are")
            } else {
                let cluster = self.cluster;
                format!(
                    "no registered store ({up}) of cluster {cluster} holds a record; the stores that hold them must register"
                )
            };
        };
        if self.cluster == ClusterId(0) {
            return "no registered store knows the cluster id; one that has joined before must register".to_owned();
        }
        let stores = StoreList(unconfirmed(&known.record, &self.members, self.cluster));
        format!("keyspace {} is created; not yet confirmed by stores {stores}", known.record.name)
    }
}

/// Why a change is not made.
enum NotNow {
    /// It may be soon.
    Yet(AlterError),
    Never(AlterError),
}

/// The phases of a record's operation and of its next version's.
fn phases(record: &KeyspaceRecord, next: &KeyspaceRecord) -> (Option<Phase>, Option<Phase>) {
    let phase = |record: &KeyspaceRecord| record.operation.as_ref().map(|operation| operation.phase);
    (phase(record), phase(next))
}

/// Where tests end the process before a step of a resize is proposed.
fn reach_fail_point_before(record: &KeyspaceRecord, next: &KeyspaceRecord) {
    let goes = |from, to| phases(record, next) == (Some(from), Some(to));
    if goes(Phase::Copy, Phase::Fence) {
        fail::fail_point!("resize::master_before_fence");
    } else if goes(Phase::Fence, Phase::Committed) {
        fail::fail_point!("resize::master_before_commit");
    } else if goes(Phase::Committed, Phase::Clean) {
        fail::fail_point!("resize::master_before_clean");
    } else if goes(Phase::Clean, Phase::Done) {
        fail::fail_point!("resize::master_before_done");
    }
}

/// The requests to one holder as directives: one promise, or votes in one message.
fn ballot_of(requests: Vec<Request<Entry>>) -> Vec<Action> {
    let mut actions = Vec::new();
    for request in requests {
        match (request, actions.last_mut()) {
            (Request::Prepare { term }, _) => actions.push(Action::Prepare(term)),
            (Request::Accept(accepted), Some(Action::Accept(_, entries))) => entries.push(accepted.record),
            (Request::Accept(accepted), _) => actions.push(Action::Accept(accepted.term, vec![accepted.record])),
        }
    }
    actions
}

/// What an alteration comes to.
enum Altered {
    /// The record says so already.
    Nothing(KeyspaceRecord),
    Made(KeyspaceRecord),
}

fn stores_of(record: &KeyspaceRecord) -> BTreeSet<StoreId> {
    holders(record).collect()
}

/// The store of each copy of each shard.
fn holders(record: &KeyspaceRecord) -> impl Iterator<Item = StoreId> {
    record.shards.iter().flat_map(|shard| shard.copies())
}

/// The stores with shards of the record that have not said that they hold it as members of the cluster.
fn unconfirmed(record: &KeyspaceRecord, members: &BTreeMap<StoreId, Member>, cluster: ClusterId) -> BTreeSet<StoreId> {
    let mut stores = stores_of(record);
    stores.retain(|store| {
        !members.get(store).is_some_and(|member| member.holds(record) && member.cluster == cluster && cluster.0 != 0)
    });
    stores
}

/// The id of the cluster that begins with this record; `None` if it is no longer the first version, so that the id is
/// with the stores alone. Store ids are drawn at random, hence so is this.
fn cluster_of(record: &KeyspaceRecord) -> Option<ClusterId> {
    let first = record.id == FIRST_KEYSPACE && record.epoch == Epoch(1);
    first.then(|| {
        let mix = |id: u64, shard: &ShardRecord| splitmix64(id ^ u64::from(shard.primary.0));
        // 0 means "none yet".
        ClusterId(record.shards.iter().fold(record.shards.len() as u64, mix).max(1))
    })
}

#[cfg(test)]
mod tests {

    use super::*;
    use proptest::prelude::*;
    use vasto_proto::topology::HolderGroup;
    use vasto_proto::topology::ballot::{Accepted, Answer, Holder, Versioned};
    use vasto_proto::topology::entry::GROUP;

    mod several_masters;

    const SILENCE_MAX: Duration = Duration::from_secs(2);

    fn limits(shards: u16, stores: usize) -> Limits {
        let replace_after = Duration::from_secs(300);
        Limits { bootstrap_shards: shards, bootstrap_stores: stores, silence_max: SILENCE_MAX, replace_after }
    }

    fn at_ms(now_ms: u64) -> Duration {
        Duration::from_millis(now_ms)
    }

    /// What a store has on its disk.
    #[derive(Clone, Debug, Default)]
    struct Disk {
        cluster: ClusterId,
        records: BTreeMap<KeyspaceId, KeyspaceRecord>,
        holder: Holder<Entry>,
        /// The last ones go along with every report: the second time they must change nothing.
        answers: Vec<Result<Answer<Entry>, vasto_proto::topology::ballot::Refusal>>,
    }

    /// What stores must agree on.
    impl PartialEq for Disk {
        fn eq(&self, other: &Self) -> bool {
            (self.cluster, &self.records) == (other.cluster, &other.records)
        }
    }

    const ANSWERS_MAX: usize = 100;

    impl Disk {
        fn report(&self, store: u32) -> Report {
            Report {
                store: StoreId(store),
                address: format!("store-{store}:1"),
                protocol_version: RESIZE_VERSION,
                cluster: self.cluster,
                records: Some(self.records.values().cloned().collect()),
                free_disk_bytes: 1 << 40,
                fsync: Some(Fsync::EverySecond),
                site: Site::default(),
                failure: String::new(),
                shards: Vec::new(),
                ballot: Ballot {
                    follows: self.holder.promised(),
                    group: self.holder.accepted_of(GROUP).cloned(),
                    answers: self.answers.clone(),
                    ..Ballot::default()
                },
            }
        }

        fn vote(&mut self, request: Request<Entry>) {
            let mut answer = self.holder.answer(request);
            if let Ok(Answer::Promised { accepted, .. }) = &mut answer {
                let without_vote = self.records.values().filter(|it| self.holder.accepted_of(it.id).is_none());
                let before = |record: &KeyspaceRecord| Entry::Keyspace(record.clone());
                accepted.extend(without_vote.map(|it| Accepted { term: Term::NONE, record: before(it) }));
            }
            self.answers.push(answer);
            let too_many = self.answers.len().saturating_sub(ANSWERS_MAX);
            self.answers.drain(..too_many);
        }

        fn carry_out(&mut self, action: Action) {
            match action {
                Action::Acknowledge | Action::Peers(_) => {}
                Action::Prepare(term) => self.vote(Request::Prepare { term }),
                Action::Accept(term, entries) => {
                    entries.into_iter().for_each(|record| self.vote(Request::Accept(Accepted { term, record })));
                }
                Action::PutRecord(record) => {
                    let newer = self.records.get(&record.id).is_none_or(|held| held.epoch < record.epoch);
                    if newer {
                        self.records.insert(record.id, record);
                    }
                }
                Action::Welcome(cluster) => {
                    assert!(
                        self.cluster == ClusterId(0) || self.cluster == cluster,
                        "a store never changes its cluster"
                    );
                    assert!(!self.records.is_empty(), "records come before the cluster id");
                    self.cluster = cluster;
                }
                Action::Refuse(refusal) => panic!("refused: {refusal}"),
            }
        }
    }

    fn master(shards: u16, stores: usize, life: u64) -> State {
        State::new(limits(shards, stores), format!("master-{life}:1"), life)
    }

    /// Reports and carries out what comes back until nothing does; time passes only while the master has to wait. Returns when that is.
    fn settle(state: &mut State, disks: &mut BTreeMap<u32, Disk>, mut now: Duration) -> Duration {
        let mut idle = 0;
        for _ in 0..200 {
            let mut done = true;
            for store in disks.keys().copied().collect::<Vec<_>>() {
                let session = SessionId(u64::from(store));
                let report = disks[&store].report(store);
                for effect in state.apply(Event::reported(session, report), now) {
                    done &= effect.action == Action::Acknowledge;
                    // Sessions from before that died unnoticed get what they get.
                    if let Some(disk) = disks.get_mut(&u32::try_from(effect.session.0).unwrap()) {
                        disk.carry_out(effect.action);
                    }
                }
            }
            if done && (state.leadership.is_settled() || idle >= 20) {
                return now;
            }
            if done {
                idle += 1;
                now += Duration::from_millis(250);
            }
        }
        panic!("the master never comes to rest");
    }

    fn blank(stores: impl IntoIterator<Item = u32>) -> BTreeMap<u32, Disk> {
        stores.into_iter().map(|store| (store, Disk::default())).collect()
    }

    fn bootstrapped(shards: u16, stores: u32) -> (State, BTreeMap<u32, Disk>) {
        let mut state = master(shards, stores as usize, 7);
        let mut disks = blank(1..=stores);
        settle(&mut state, &mut disks, Duration::ZERO);
        (state, disks)
    }

    fn refusal(effects: &[Effect]) -> Option<String> {
        effects.iter().find_map(|effect| match &effect.action {
            Action::Refuse(refusal) => Some(refusal.to_string()),
            Action::Acknowledge
            | Action::Prepare(_)
            | Action::Accept(..)
            | Action::Peers(_)
            | Action::PutRecord(_)
            | Action::Welcome(_) => None,
        })
    }

    #[test]
    fn an_empty_cluster_gets_keyspace_0_when_all_stores_are_there() {
        let mut state = master(4, 2, 7);
        assert_eq!(state.snapshot().waiting_for, "0 of 2 stores registered; keyspace 0 is created when all are");
        let mut disks = blank([1]);
        settle(&mut state, &mut disks, Duration::ZERO);
        assert_eq!(state.snapshot().waiting_for, "1 of 2 stores registered; keyspace 0 is created when all are");
        assert_eq!(disks[&1], Disk::default());

        disks.insert(2, Disk::default());
        settle(&mut state, &mut disks, Duration::ZERO);
        let snapshot = state.snapshot();
        assert_eq!(snapshot.waiting_for, "");
        let record = snapshot.keyspace(KeyspaceId(0)).unwrap();
        let primaries: Vec<u32> = record.shards.iter().map(|shard| shard.primary.0).collect();
        assert_eq!((record.name.as_str(), primaries), ("0", vec![1, 2, 1, 2]));
        for disk in disks.values() {
            assert_eq!((disk.cluster, &disk.records[&KeyspaceId(0)]), (snapshot.cluster, record));
        }
        assert_ne!(snapshot.cluster, ClusterId(0));
    }

    #[test]
    fn keyspace_0_is_published_only_when_its_owners_have_confirmed() {
        let mut state = master(2, 2, 1);
        let mut disks = blank([1, 2]);
        // The second votes, and does not get round to anything else.
        for _ in 0..10 {
            for store in [1, 2] {
                let report = disks[&store].report(store);
                for effect in state.apply(Event::reported(SessionId(store.into()), report), Duration::ZERO) {
                    let is_vote = matches!(effect.action, Action::Prepare(_) | Action::Accept(..));
                    if effect.session == SessionId(1) || is_vote {
                        disks.get_mut(&(effect.session.0 as u32)).unwrap().carry_out(effect.action);
                    }
                }
            }
        }
        assert!(state.snapshot().keyspaces.is_empty());
        assert_eq!(state.snapshot().waiting_for, "keyspace 0 is created; not yet confirmed by stores 00000002");
        state.apply(Event::SessionEnded { session: SessionId(2) }, Duration::ZERO);
        settle(&mut state, &mut disks, Duration::ZERO);
        assert_eq!(state.snapshot().keyspaces.len(), 1);
    }

    #[test]
    fn the_group_of_holders_is_formed_and_grows() {
        let (mut state, mut disks) = bootstrapped(1, 1);
        let group = |state: &State| {
            let group = &state.snapshot().leadership.group;
            (group.version, group.members.iter().map(|store| store.0).collect::<Vec<_>>())
        };
        assert_eq!(group(&state), (1, vec![1]));
        let mut now = at_ms(0);
        for (store, expected) in [(2, (1, vec![1])), (3, (3, vec![1, 2, 3])), (4, (3, vec![1, 2, 3]))] {
            disks.insert(store, Disk::default());
            now = settle(&mut state, &mut disks, now);
            assert_eq!(group(&state), expected);
        }
        // Each of the new holders keeps everything.
        let kept = |disk: &Disk| disk.holder.accepted_of(FIRST_KEYSPACE).map(|it| it.record.epoch());
        assert!((1..=3).all(|store| kept(&disks[&store]) == Some(Epoch(1))));
        // One stays away.
        disks.remove(&2);
        now = settle(&mut state, &mut disks, now + Duration::from_secs(10));
        assert_eq!(group(&state), (3, vec![1, 2, 3]));
        settle(&mut state, &mut disks, now + Duration::from_secs(301));
        assert_eq!(group(&state), (5, vec![1, 3, 4]));
    }

    #[test]
    fn a_cluster_of_before_there_were_terms_gets_its_group_when_all_who_have_shards_are_there() {
        let (_, mut disks) = bootstrapped(3, 3);
        for disk in disks.values_mut() {
            (disk.holder, disk.answers) = (Holder::default(), Vec::new());
        }
        // A change that was only on its way: the store of the shard has it and nobody else.
        let newer = disks[&3].records[&FIRST_KEYSPACE].with_settings(Settings::default());
        let away = disks.remove(&3).unwrap();
        let mut state = master(3, 3, 7);
        let now = settle(&mut state, &mut disks, Duration::ZERO);
        assert_eq!((state.term(), &state.snapshot().leadership.group), (None, &HolderGroup::default()));
        assert_eq!(state.snapshot().keyspaces.len(), 1, "it is served all the same");
        ask(&mut state, Fsync::Always, now);
        state.apply(Event::TimePassed, now + LEADER_PATIENCE);
        let text = answer(&mut state);
        assert!(text.starts_with("no master leads yet: stores ") && text.contains("00000003 have shards"), "{text}");
        disks.insert(3, away);
        disks.get_mut(&3).unwrap().records.insert(FIRST_KEYSPACE, newer.clone());
        settle(&mut state, &mut disks, now + LEADER_PATIENCE);
        assert_eq!(state.snapshot().leadership.group.members.len(), 3);
        assert!(disks.values().all(|disk| disk.records[&FIRST_KEYSPACE] == newer));
    }

    /// A leader that was away for a while finds another one, and changes nothing.
    #[test]
    fn a_leader_that_was_overruled_steps_back_and_refuses() {
        let (mut old, mut disks) = bootstrapped(2, 3);
        let mut new = master(2, 3, 9);
        let now = settle(&mut new, &mut disks, at_ms(10));
        let (first, second) = (old.term().unwrap(), new.term().unwrap());
        assert!(first < second);
        // It does not know yet: what it asks for is refused by the holders.
        let before = disks[&1].records.clone();
        for effect in ask(&mut old, Fsync::Never, now) {
            disks.get_mut(&(effect.session.0 as u32)).unwrap().carry_out(effect.action);
        }
        for store in 1..=3 {
            let (session, report) = (SessionId(store.into()), disks[&store].report(store));
            let effects = old.apply(Event::reported(session, report), now);
            assert!(effects.iter().all(|effect| effect.action == Action::Acknowledge), "{effects:?}");
        }
        assert_eq!((old.term(), &disks[&1].records), (None, &before));
        let text = format!(
            "another master leads since term {}; the change of keyspace 0 was under way and may hold or not",
            second.number
        );
        assert_eq!(answer(&mut old), text);
        assert!(old.take_notices().contains(&Notice::SteppedBack { own: first, newer: second }));
        // From then on it names the other one.
        let mut report = disks[&1].report(1);
        report.ballot.leader_heard = Some(Duration::ZERO);
        report.ballot.leader = "master-9:1".to_owned();
        old.apply(Event::reported(SessionId(1), report), now);
        ask(&mut old, Fsync::Never, now);
        let text = answer(&mut old);
        assert!(text.starts_with("this master is a standby, the master at master-9:1 leads (term "), "{text}");
    }

    #[test]
    fn a_restarted_master_adopts_what_the_stores_have() {
        let (before, mut disks) = bootstrapped(3, 3);
        let mut state = master(7, 1, 7);
        let session = SessionId(2);
        state.apply(Event::reported(session, disks[&2].report(2)), Duration::ZERO);
        let snapshot = state.snapshot();
        assert_eq!((snapshot.cluster, &snapshot.keyspaces), (before.snapshot().cluster, &before.snapshot().keyspaces));
        let missing = snapshot.store(StoreId(3)).unwrap();
        assert_eq!((missing.up, missing.address.as_str()), (false, ""));
        settle(&mut state, &mut disks, Duration::ZERO);
        assert_eq!(state.snapshot().stores, before.snapshot().stores);
    }

    #[test]
    fn the_highest_epoch_wins_and_reaches_the_others() {
        let (_, mut disks) = bootstrapped(2, 2);
        let newer = disks.get_mut(&2).unwrap().records.get_mut(&KeyspaceId(0)).unwrap();
        newer.epoch = Epoch(5);
        newer.shards.reverse();
        let newer = newer.clone();
        let mut state = master(2, 2, 7);
        settle(&mut state, &mut disks, Duration::ZERO);
        assert_eq!(state.snapshot().keyspaces, std::slice::from_ref(&newer));
        assert_eq!(disks[&1].records[&KeyspaceId(0)], newer);
    }

    #[test]
    fn a_store_that_joins_later_gets_records_and_no_shard() {
        let (mut state, mut disks) = bootstrapped(2, 2);
        disks.insert(3, Disk::default());
        settle(&mut state, &mut disks, Duration::ZERO);
        assert_eq!(disks[&3], disks[&1]);
        assert_eq!(state.snapshot().keyspaces[0].shards_of(StoreId(3)).count(), 0);
        assert_eq!(state.snapshot().stores.len(), 3);
    }

    #[test]
    fn stores_of_two_clusters_do_not_mix() {
        let (_, mut ours) = bootstrapped(1, 1);
        let mut other = master(1, 1, 7);
        let mut theirs = blank([9]);
        settle(&mut other, &mut theirs, Duration::ZERO);
        let mut state = master(1, 1, 7);
        settle(&mut state, &mut ours, Duration::ZERO);
        let report = theirs[&9].report(9);
        let effects = state.apply(Event::reported(SessionId(9), report), Duration::ZERO);
        let text = format!(
            "store 00000009 belongs to cluster {}, but this master leads cluster {}",
            theirs[&9].cluster, ours[&1].cluster
        );
        assert_eq!(refusal(&effects), Some(text));
        assert_eq!(state.snapshot().stores.len(), 1);
    }

    #[test]
    fn no_bootstrap_beside_a_store_that_has_a_cluster_id() {
        let mut state = master(1, 1, 7);
        let joined = Disk { cluster: ClusterId(77), ..Disk::default() };
        let mut disks = blank([1, 2]);
        disks.insert(0, joined);
        settle(&mut state, &mut disks, Duration::ZERO);
        assert!(disks.values().all(|disk| disk.records.is_empty()));
        assert_eq!(
            state.snapshot().waiting_for,
            "no registered store (3) of cluster 000000000000004d holds a record; the stores that hold them must register"
        );
    }

    #[test]
    fn a_store_is_down_after_silence_and_up_again_with_its_next_report() {
        let (mut state, mut disks) = bootstrapped(1, 1);
        let is_up = |state: &State| state.snapshot().store(StoreId(1)).unwrap().up;
        state.apply(Event::TimePassed, at_ms(1_999));
        assert!(is_up(&state));
        let version = state.snapshot().version;
        state.apply(Event::TimePassed, at_ms(2_000));
        assert!(!is_up(&state));
        assert_eq!(state.snapshot().version, version + 1);
        assert_eq!(state.snapshot().store(StoreId(1)).unwrap().address, "store-1:1");
        settle(&mut state, &mut disks, at_ms(2_500));
        assert!(is_up(&state));
        state.apply(Event::SessionEnded { session: SessionId(1) }, at_ms(2_600));
        assert!(!is_up(&state));
        assert_eq!(state.snapshot().keyspaces.len(), 1);
    }

    #[test]
    fn a_copied_data_folder_is_refused_while_the_first_store_is_up() {
        let (mut state, disks) = bootstrapped(1, 1);
        let mut copy = disks[&1].report(1);
        copy.address = "elsewhere:1".to_owned();
        let event = Event::reported(SessionId(50), copy);
        let effects = state.apply(event.clone(), at_ms(10));
        let text = "store id 00000001 is in use by the store at store-1:1; a copied data folder cannot join";
        assert_eq!(refusal(&effects).as_deref(), Some(text));
        // When the first is down, the store has moved.
        let effects = state.apply(event, at_ms(5_000));
        assert_eq!(refusal(&effects).as_deref(), Some("store 00000001 has opened another session"));
        assert_eq!(state.snapshot().store(StoreId(1)).unwrap().address, "elsewhere:1");
        // The late end of the replaced session changes nothing.
        state.apply(Event::SessionEnded { session: SessionId(1) }, at_ms(5_001));
        assert!(state.snapshot().store(StoreId(1)).unwrap().up);
    }

    #[test]
    fn a_failed_directive_is_repeated_after_a_pause() {
        let (mut state, _) = bootstrapped(1, 1);
        let session = SessionId(2);
        let blank = Disk::default();
        let puts = |effects: Vec<Effect>| effects.iter().filter(|e| matches!(e.action, Action::PutRecord(_))).count();
        assert_eq!(puts(state.apply(Event::reported(session, blank.report(2)), at_ms(0))), 1);
        assert_eq!(puts(state.apply(Event::reported(session, blank.report(2)), at_ms(500))), 0);
        let failed = Report { failure: "disk full".to_owned(), ..blank.report(2) };
        assert_eq!(puts(state.apply(Event::reported(session, failed), at_ms(600))), 0);
        assert_eq!(puts(state.apply(Event::TimePassed, at_ms(1_500))), 0);
        assert_eq!(puts(state.apply(Event::TimePassed, at_ms(1_700))), 1);
    }

    #[test]
    fn heartbeats_with_nearly_the_same_free_disk_publish_nothing() {
        let (mut state, disks) = bootstrapped(1, 1);
        let version = state.snapshot().version;
        let mut report = Report { records: None, ..disks[&1].report(1) };
        report.free_disk_bytes -= 1 << 30;
        state.apply(Event::reported(SessionId(1), report.clone()), at_ms(10));
        assert_eq!(state.snapshot().version, version);
        report.free_disk_bytes /= 2;
        state.apply(Event::reported(SessionId(1), report.clone()), at_ms(20));
        assert_eq!(state.snapshot().stores[0].free_disk_bytes, report.free_disk_bytes);
    }

    fn ask(state: &mut State, fsync: Fsync, now: Duration) -> Vec<Effect> {
        let changes = Settings { fsync: Some(fsync), ..Settings::default() };
        let alteration = Alteration { name: "0".to_owned(), changes, copies: None, expected_epoch: None };
        state.apply(Event::AlterRequested { request: RequestId(1), alteration }, now)
    }

    /// The one answer that is ready, as text: the epoch and the setting, or the error.
    fn answer(state: &mut State) -> String {
        let answers = state.take_answers();
        assert!(answers.len() <= 1);
        match answers.into_iter().next() {
            None => String::new(),
            Some((RequestId(1), Ok(record))) => format!("{} {:?}", record.epoch, record.settings.fsync),
            Some((RequestId(1), Err(error))) => error.to_string(),
            Some((other, _)) => panic!("{other:?} was not asked"),
        }
    }

    fn published(state: &State) -> (u64, Option<Fsync>) {
        let record = &state.snapshot().keyspaces[0];
        (record.epoch.0, record.settings.fsync)
    }

    /// Those stores report, and carry out what they are sent.
    fn exchange(state: &mut State, disks: &mut BTreeMap<u32, Disk>, stores: &[u32], now: Duration) {
        for store in stores {
            let report = disks[store].report(*store);
            for effect in state.apply(Event::reported(SessionId(u64::from(*store)), report), now) {
                let receiver = effect.session.0 as u32;
                if stores.contains(&receiver) {
                    disks.get_mut(&receiver).unwrap().carry_out(effect.action);
                }
            }
        }
    }

    #[test]
    fn a_change_holds_when_it_is_chosen_and_the_stores_with_shards_keep_it() {
        let (mut state, mut disks) = bootstrapped(2, 3);
        let now = settle(&mut state, &mut disks, Duration::ZERO);
        let before = state.snapshot().keyspaces[0].clone();
        let owners: Vec<u32> = stores_of(&before).into_iter().map(|store| store.0).collect();
        let effects = ask(&mut state, Fsync::Always, now);
        assert!(effects.iter().all(|effect| matches!(effect.action, Action::Accept(..))), "{effects:?}");
        assert_eq!(effects.len(), 3, "all holders are asked");
        // One of them votes: that is no majority.
        disks.get_mut(&1).unwrap().carry_out(effects[0].action.clone());
        exchange(&mut state, &mut disks, &[1], now);
        assert_eq!((answer(&mut state).as_str(), published(&state)), ("", (1, None)));
        // One at a time.
        ask(&mut state, Fsync::Never, now);
        let text = answer(&mut state);
        assert!(text.starts_with("an earlier change of keyspace 0 is not yet confirmed by stores 0000000"), "{text}");
        // The second: it is chosen and spread.
        disks.get_mut(&2).unwrap().carry_out(effects[1].action.clone());
        let report = disks[&2].report(2);
        for effect in state.apply(Event::reported(SessionId(2), report), now) {
            disks.get_mut(&(effect.session.0 as u32)).unwrap().carry_out(effect.action);
        }
        assert_eq!((answer(&mut state).as_str(), published(&state)), ("", (1, None)));
        state.apply(Event::SessionEnded { session: SessionId(3) }, now);
        let mut now = now;
        for _ in 0..8 {
            now += at_ms(1);
            exchange(&mut state, &mut disks, &owners, now);
        }
        assert_eq!((answer(&mut state).as_str(), published(&state)), ("2 Some(Always)", (2, Some(Fsync::Always))));
        assert_eq!(state.snapshot().keyspaces[0].shards, before.shards, "no request in flight is refused for it");
        let now = settle(&mut state, &mut disks, now);
        assert_eq!(disks[&3], disks[&1]);
        // The same again changes nothing.
        assert_eq!(ask(&mut state, Fsync::Always, now), []);
        assert_eq!(answer(&mut state), "2 Some(Always)");
        // A restarted master finds it.
        let mut state = master(2, 2, 7);
        settle(&mut state, &mut disks, Duration::ZERO);
        assert_eq!(published(&state), (2, Some(Fsync::Always)));
    }

    #[test]
    fn a_change_is_refused_while_it_could_not_hold_everywhere() {
        let (mut state, mut disks) = bootstrapped(2, 2);
        for (name, expected_epoch, text) in [
            ("1", None, "no such keyspace '1'"),
            ("0", Some(Epoch(7)), "keyspace 0 has epoch 1, not 7; nothing was changed"),
        ] {
            let changes = Settings { fsync: Some(Fsync::Never), ..Settings::default() };
            let alteration = Alteration { name: name.to_owned(), changes, copies: None, expected_epoch };
            assert_eq!(state.apply(Event::AlterRequested { request: RequestId(1), alteration }, at_ms(1)), []);
            assert_eq!(answer(&mut state), text);
        }
        state.apply(Event::SessionEnded { session: SessionId(2) }, at_ms(2));
        assert_eq!(ask(&mut state, Fsync::Never, at_ms(3)), []);
        assert_eq!(answer(&mut state), "stores 00000002 of keyspace 0 are down; nothing was changed");
        let older = Report { protocol_version: SETTINGS_VERSION - 1, ..disks[&2].report(2) };
        state.apply(Event::reported(SessionId(2), older), at_ms(4));
        assert_eq!(ask(&mut state, Fsync::Never, at_ms(5)), []);
        assert_eq!(
            answer(&mut state),
            "stores 00000002 run an older version that does not know settings of keyspaces; nothing was changed"
        );
        settle(&mut state, &mut disks, at_ms(6));
        assert_eq!(published(&state), (1, None));
    }

    #[test]
    fn a_change_that_a_store_does_not_confirm_is_answered_in_time_and_goes_on() {
        let (mut state, mut disks) = bootstrapped(2, 2);
        let mut now = at_ms(100);
        let asked = now;
        for effect in ask(&mut state, Fsync::Always, now) {
            assert_eq!(effect.session, SessionId(1), "two stores have one holder");
            disks.get_mut(&1).unwrap().carry_out(effect.action);
        }
        while now < asked + ALTER_PATIENCE {
            assert_eq!(answer(&mut state), "");
            now += at_ms(500);
            exchange(&mut state, &mut disks, &[1], now);
            // The second store lives and does not get round to it.
            let report = disks[&2].report(2);
            state.apply(Event::reported(SessionId(2), report), now);
        }
        assert_eq!(
            answer(&mut state),
            "stores 00000002 have not confirmed the change of keyspace 0 in time; it goes on, and holds when they have"
        );
        assert_eq!(published(&state), (1, None));
        // The store comes back in a new session and gets what it lacks.
        state.apply(Event::SessionEnded { session: SessionId(2) }, now);
        settle(&mut state, &mut disks, now);
        assert_eq!((published(&state), answer(&mut state).as_str()), ((2, Some(Fsync::Always)), ""));
        assert_eq!(ask(&mut state, Fsync::Never, now).len(), 1, "the next change may be asked for");
    }

    #[test]
    fn a_change_for_which_no_majority_votes_is_answered_in_time() {
        let (mut state, mut disks) = bootstrapped(2, 3);
        let now = settle(&mut state, &mut disks, Duration::ZERO);
        ask(&mut state, Fsync::Always, now);
        let report = Report { records: None, ..disks[&1].report(1) };
        state.apply(Event::reported(SessionId(1), report), now + ALTER_PATIENCE);
        let text = answer(&mut state);
        assert!(
            text.starts_with("holders 00000001,00000002,00000003 have not voted for the change of keyspace 0"),
            "{text}"
        );
        assert_eq!(published(&state), (1, None));
    }

    /// The cluster of the tests of keyspaces: what is lost and what arrives is chosen step by step.
    struct World {
        state: State,
        disks: BTreeMap<u32, Disk>,
        sessions: BTreeMap<u32, SessionId>,
        lost: BTreeSet<SessionId>,
        next: u64,
        now: Duration,
    }

    const STORES: u32 = 3;

    impl World {
        fn new() -> Self {
            let (mut state, mut disks) = bootstrapped(2, STORES);
            settle(&mut state, &mut disks, Duration::from_secs(10));
            // Sessions of the bootstrap live on under the same numbers.
            let sessions = (1..=STORES).map(|store| (store, SessionId(u64::from(store)))).collect();
            Self { state, disks, sessions, lost: BTreeSet::new(), next: 100, now: Duration::from_secs(10) }
        }

        /// Each store gets its directives, the one in `budget` only the first so many; what is not carried out is lost with its session.
        fn deliver(&mut self, effects: Vec<Effect>, mut budget: BTreeMap<SessionId, usize>) {
            for effect in effects {
                if self.lost.contains(&effect.session) || effect.action == Action::Acknowledge {
                    continue;
                }
                let receiver = self.sessions.iter().find(|(_, session)| **session == effect.session);
                let Some(receiver) = receiver.map(|(store, _)| *store) else { continue };
                let left = budget.entry(effect.session).or_insert(usize::MAX);
                if *left > 0 {
                    *left -= 1;
                    self.disks.get_mut(&receiver).unwrap().carry_out(effect.action);
                } else {
                    self.sessions.remove(&receiver);
                    self.lost.insert(effect.session);
                }
            }
        }

        fn report(&mut self, store: u32, carries_out: usize) {
            let session = *self.sessions.entry(store).or_insert_with(|| {
                self.next += 1;
                SessionId(self.next)
            });
            let report = self.disks[&store].report(store);
            let effects = self.state.apply(Event::reported(session, report), self.now);
            self.deliver(effects, BTreeMap::from([(session, carries_out)]));
        }

        /// Votes, records and confirmations take some reports each.
        fn rounds(&mut self, stores: &[u32]) {
            for _ in 0..4 {
                stores.iter().for_each(|store| self.report(*store, 9));
            }
        }

        fn create(&mut self, name: &str) {
            self.next += 1;
            let settings = Settings::default();
            let creation = Creation { name: name.to_owned(), shards: Some(2), copies: 1, settings, may_exist: false };
            let request = RequestId(self.next);
            let effects = self.state.apply(Event::CreateRequested { request, creation }, self.now);
            self.deliver(effects, BTreeMap::new());
        }

        fn drop(&mut self, name: &str) {
            self.next += 1;
            let (request, name) = (RequestId(self.next), name.to_owned());
            let effects = self.state.apply(Event::DropRequested { request, name }, self.now);
            self.deliver(effects, BTreeMap::new());
        }

        fn stop_store(&mut self, store: u32) {
            if let Some(session) = self.sessions.remove(&store) {
                let effects = self.state.apply(Event::SessionEnded { session }, self.now);
                self.deliver(effects, BTreeMap::new());
            }
        }

        fn restart_master(&mut self) {
            self.next += 1;
            self.state = master(2, STORES as usize, self.next);
            self.sessions.clear();
        }

        /// All come back for good.
        fn settle(&mut self) {
            for store in 1..=STORES {
                self.stop_store(store);
                // Those of the function below, of which a directive may have been lost.
                let session = SessionId(u64::from(store));
                self.state.apply(Event::SessionEnded { session }, self.now);
                self.lost.remove(&session);
            }
            self.now = settle(&mut self.state, &mut self.disks, self.now + Duration::from_secs(10));
            self.sessions = (1..=STORES).map(|store| (store, SessionId(u64::from(store)))).collect();
        }

        fn answers(&mut self) -> Vec<Result<KeyspaceRecord, String>> {
            let answers = self.state.take_answers();
            answers.into_iter().map(|(_, result)| result.map_err(|error| error.to_string())).collect()
        }

        fn names(&self) -> Vec<String> {
            self.state.snapshot().keyspaces.iter().map(|record| record.name.clone()).collect()
        }
    }

    #[test]
    fn a_keyspace_is_created_everywhere_and_its_end_reaches_a_store_that_was_away() {
        let mut world = World::new();
        world.create("a");
        world.rounds(&[1, 2, 3]);
        let record = world.answers().remove(0).unwrap();
        assert_eq!((world.names(), record.epoch), (vec!["0".to_owned(), "a".to_owned()], Epoch(1)));
        assert!(world.disks.values().all(|disk| disk.records[&record.id] == record));
        world.create("a");
        assert_eq!(world.answers(), [Err("keyspace a exists already; nothing was changed".to_owned())]);

        // One of its stores is away.
        let away = record.shards[0].primary.0;
        world.stop_store(away);
        world.drop("a");
        let others: Vec<u32> = (1..=STORES).filter(|store| *store != away).collect();
        world.rounds(&others);
        let dropped = world.answers().remove(0).unwrap();
        assert_eq!(dropped, record.as_dropped());
        assert_eq!((world.names(), world.state.snapshot().dropped.len()), (vec!["0".to_owned()], 1));
        // It is back, before and after the master has been restarted.
        for _ in 0..2 {
            world.report(away, 9);
            world.report(away, 9);
            assert_eq!(world.disks[&away].records[&record.id], dropped);
            world.settle();
            assert_eq!(world.names(), ["0"]);
            world.restart_master();
        }
        world.settle();
        world.create("a");
        world.rounds(&[1, 2, 3]);
        world.settle();
        let again = world.answers().remove(0).unwrap();
        assert!(again.id > record.id, "an id is never used twice");
        assert_eq!(world.names(), ["0", "a"]);
    }

    #[test]
    fn without_most_stores_nothing_is_created_or_dropped() {
        let mut world = World::new();
        world.create("a");
        world.settle();
        world.answers();
        world.stop_store(1);
        world.stop_store(2);
        world.create("b");
        world.drop("a");
        let answers = world.answers();
        assert!(
            answers.iter().all(|answer| answer.as_ref().is_err_and(|text| text.starts_with("1 of 3 holders"))),
            "{answers:?}"
        );
        world.settle();
        assert_eq!(world.names(), ["0", "a"]);
    }

    #[test]
    fn a_new_store_gets_many_records_bit_by_bit() {
        let mut world = World::new();
        for number in 0..40 {
            world.create(&format!("k{number}"));
            world.settle();
        }
        world.disks.insert(9, Disk::default());
        let report = world.disks[&9].report(9);
        let effects = world.state.apply(Event::reported(SessionId(9), report), world.now);
        let puts = effects.iter().filter(|effect| matches!(effect.action, Action::PutRecord(_))).count();
        assert_eq!(puts, RECORDS_UNDER_WAY_MAX);
        effects.into_iter().for_each(|effect| world.disks.get_mut(&9).unwrap().carry_out(effect.action));
        settle(&mut world.state, &mut world.disks, world.now);
        assert_eq!(world.disks[&9], world.disks[&1]);
    }

    #[derive(Clone, Debug)]
    enum Turn {
        Create(u8),
        Drop(u8),
        Report { store: u32, carries_out: usize },
        StoreStops(u32),
        MasterRestarts,
        TimePasses(u64),
    }

    fn turn() -> impl Strategy<Value = Turn> {
        prop_oneof![
            8 => (1..=STORES, 0usize..4).prop_map(|(store, carries_out)| Turn::Report { store, carries_out }),
            2 => (1..=STORES).prop_map(Turn::StoreStops),
            1 => Just(Turn::MasterRestarts),
            3 => (0u8..3).prop_map(Turn::Create),
            3 => (0u8..3).prop_map(Turn::Drop),
            1 => (0u64..3_000).prop_map(Turn::TimePasses),
        ]
    }

    proptest! {
        /// Whatever is lost and restarted on the way: what was answered as created is there unless it was to be dropped, what was answered as
        /// dropped is gone, no name is used twice at a time, and no id ever.
        #[test]
        fn no_keyspace_is_lost_and_none_comes_back(turns in prop::collection::vec(turn(), 0..80)) {
            let mut world = World::new();
            let mut created: Vec<KeyspaceRecord> = Vec::new();
            let (mut dropped, mut meant): (BTreeSet<KeyspaceId>, BTreeSet<String>) = Default::default();
            let mut names: BTreeMap<KeyspaceId, String> = BTreeMap::new();
            for turn in turns {
                world.now += at_ms(1);
                match turn {
                    Turn::Create(number) => world.create(&format!("k{number}")),
                    Turn::Drop(number) => {
                        let name = format!("k{number}");
                        meant.insert(name.clone());
                        world.drop(&name);
                    }
                    Turn::Report { store, carries_out } => world.report(store, carries_out),
                    Turn::StoreStops(store) => world.stop_store(store),
                    Turn::MasterRestarts => world.restart_master(),
                    Turn::TimePasses(ms) => {
                        world.now += at_ms(ms);
                        let effects = world.state.apply(Event::TimePassed, world.now);
                        world.deliver(effects, BTreeMap::new());
                    }
                }
                for record in world.answers().into_iter().flatten() {
                    if record.dropped { dropped.insert(record.id); } else { created.push(record); }
                }
                for record in world.disks.values().flat_map(|disk| disk.records.values()) {
                    prop_assert_eq!(names.entry(record.id).or_insert_with(|| record.name.clone()), &record.name);
                }
            }
            world.settle();
            let snapshot = world.state.snapshot();
            for record in &created {
                let lives = snapshot.keyspace(record.id) == Some(record);
                prop_assert!(lives || meant.contains(&record.name), "{record:?} is lost");
            }
            for keyspace in &dropped {
                prop_assert!(snapshot.keyspace(*keyspace).is_none(), "{keyspace} is back");
                prop_assert!(snapshot.dropped.contains(keyspace));
            }
            let living: BTreeSet<&str> = snapshot.keyspaces.iter().map(|record| record.name.as_str()).collect();
            prop_assert_eq!(living.len(), snapshot.keyspaces.len(), "a name twice: {:?}", snapshot.keyspaces);
            for disk in world.disks.values() {
                prop_assert_eq!(disk, &world.disks[&1]);
            }
        }
    }
}
