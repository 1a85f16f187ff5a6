//! What the master knows and decides: events in, directives and snapshots out. No clock, no chance, no I/O.
//!
//! Invariants:
//! - Keyspace `0` is created only while no store has reported a record or a cluster id.
//! - A store gets its cluster id after all records, so that one with a cluster id and no record never comes from an
//!   interrupted bootstrap: somewhere there are stores that hold the records, and the master waits for them.
//! - A record is changed only when the stores of its shards hold the version before, and one change at a time; gateways see the new
//!   version when these stores have confirmed it. Until then the old one is what the master says.
//! - A new keyspace and the end of one go to all stores at once, and hold when the stores with its shards (of a dropped one: those
//!   that are up) and more than half of all known stores keep them. No id is used twice, and the record of a dropped keyspace stays:
//!   it wins over every other version, so no store that was away and no master brings the keyspace back.
//! - Until a record changes for the first time, the cluster id is a function of it: a master that takes over an interrupted
//!   bootstrap arrives at the same id.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::time::Duration;

use thiserror::Error;
use vasto_proto::id::{ClusterId, Epoch, KeyspaceId, StoreId};
use vasto_proto::slot::splitmix64;
use vasto_proto::topology::{Fsync, KeyspaceRecord, Settings, Snapshot, StoreInfo};
use vasto_proto::{DROP_VERSION, SETTINGS_VERSION};

use crate::keyspaces::{self, Creation, Decision, KeyspaceError};
use crate::place::{self, Site};

/// The keyspace that an empty cluster starts with; what `SELECT 0` means.
pub const FIRST_KEYSPACE: KeyspaceId = KeyspaceId(0);
const FIRST_KEYSPACE_NAME: &str = "0";

/// After a store could not carry out a directive: long enough not to flood its log, short enough to see a disk freed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How long a change of a keyspace waits for its stores: some heartbeats and a synced file on a busy disk, and less than a
/// gateway waits for the answer.
const ALTER_PATIENCE: Duration = Duration::from_secs(5);

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
    #[error(transparent)]
    Keyspace(#[from] KeyspaceError),
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
}

#[derive(Clone, Debug)]
pub enum Event {
    Reported {
        session: SessionId,
        report: Report,
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
    TimePassed,
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
    cluster: ClusterId,
    members: BTreeMap<StoreId, Member>,
    sessions: HashMap<SessionId, StoreId>,
    records: BTreeMap<KeyspaceId, Known>,
    /// At most one for each keyspace.
    pending: BTreeMap<KeyspaceId, Pending>,
    answers: Vec<(RequestId, AlterResult)>,
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
}

#[derive(Debug)]
struct Known {
    /// The newest version, which all stores shall have.
    record: KeyspaceRecord,
    /// The version that gateways may know: it came from a store's disk, or all stores that own shards have confirmed it.
    published: Option<KeyspaceRecord>,
}

/// A change that waits for its stores.
#[derive(Debug)]
struct Pending {
    /// Several may want the same.
    requests: Vec<RequestId>,
    record: KeyspaceRecord,
    deadline: Duration,
}

impl Member {
    fn is_up(&self, now: Duration, silence_max: Duration) -> bool {
        self.session.is_some() && now.saturating_sub(self.reported_at) < silence_max
    }

    fn holds(&self, record: &KeyspaceRecord) -> bool {
        self.held.get(&record.id).is_some_and(|epoch| *epoch >= record.epoch)
    }
}

impl State {
    pub fn new(limits: Limits) -> Self {
        let mut state = Self {
            limits,
            cluster: ClusterId(0),
            members: BTreeMap::new(),
            sessions: HashMap::new(),
            records: BTreeMap::new(),
            pending: BTreeMap::new(),
            answers: Vec::new(),
            snapshot: Snapshot::default(),
        };
        state.refresh_snapshot(Duration::ZERO);
        state
    }

    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// `now` counts from the start of the master and never goes back.
    pub fn apply(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Reported { session, report } => match self.admit(session, &report, now) {
                Ok(replaced) => {
                    effects.extend(replaced);
                    self.take_in(session, report, now);
                    effects.push(Effect { session, action: Action::Acknowledge });
                }
                Err(refusal) => {
                    self.forget_session(session);
                    effects.push(Effect { session, action: Action::Refuse(refusal) });
                }
            },
            Event::SessionEnded { session } => self.forget_session(session),
            Event::AlterRequested { request, alteration } => self.alter(request, &alteration, now),
            Event::CreateRequested { request, creation } => {
                let decision = keyspaces::create(&self.view(now), &creation);
                self.carry_out(request, decision, now);
            }
            Event::DropRequested { request, name } => {
                let decision = keyspaces::drop(&self.view(now), &name);
                self.carry_out(request, decision, now);
            }
            Event::TimePassed => {}
        }
        self.bootstrap(now);
        let disputed = self.settle_names();
        self.instruct(now, &disputed, &mut effects);
        self.publish_confirmed(now);
        self.settle_alterations(now);
        self.refresh_snapshot(now);
        effects
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
        });
        if member.session != Some(session) {
            if let Some(old) = member.session.replace(session) {
                self.sessions.remove(&old);
            }
            self.sessions.insert(session, report.store);
            member.sent.clear();
            member.welcomed = false;
            member.retry_at = Duration::ZERO;
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
            member.retry_at = now + RETRY_PAUSE;
        }
        let Some(records) = report.records else { return };
        member.held = records.iter().map(|record| (record.id, record.epoch)).collect();
        for record in records {
            let newer = self.records.get(&record.id).is_none_or(|known| known.record.epoch < record.epoch);
            if newer {
                self.records.insert(record.id, Known { published: Some(record.clone()), record });
            }
        }
    }

    fn forget_session(&mut self, session: SessionId) {
        let store = self.sessions.remove(&session);
        if let Some(member) = store.and_then(|store| self.members.get_mut(&store)) {
            member.session = None;
        }
    }

    /// Decides on keyspace `0` in a cluster that has nothing yet, and on the cluster id.
    fn bootstrap(&mut self, now: Duration) {
        if self.cluster != ClusterId(0) {
            return;
        }
        if self.records.is_empty() {
            let candidates = self.candidates(now);
            if candidates.len() < self.limits.bootstrap_stores {
                return;
            }
            let Ok(placed) = place::place(self.limits.bootstrap_shards, 1, &candidates) else { return };
            let primaries: Vec<StoreId> = placed.into_iter().flatten().collect();
            let record = KeyspaceRecord::new(FIRST_KEYSPACE, FIRST_KEYSPACE_NAME, &primaries)
                .expect("the shard count was checked when the master was bound");
            self.records.insert(record.id, Known { record, published: None });
        }
        self.cluster = self.records.values().find_map(|known| cluster_of(&known.record)).unwrap_or_default();
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

    /// Every store that has come since the master started, or that a living record names.
    fn known_stores(&self) -> BTreeSet<StoreId> {
        let living = self.records.values().map(|known| &known.record).filter(|record| !record.dropped);
        living.flat_map(holders).chain(self.members.keys().copied()).collect()
    }

    fn view(&self, now: Duration) -> keyspaces::View<'_> {
        let published = |known: &&Known| known.published.as_ref() == Some(&known.record);
        let is_older = |(_, member): &(&StoreId, &Member)| member.protocol_version < DROP_VERSION;
        keyspaces::View {
            records: self.records.values().map(|known| &known.record).collect(),
            published: self.records.values().filter(published).map(|known| known.record.id).collect(),
            up: self.candidates(now),
            known: self.known_stores(),
            older: self.members.iter().filter(is_older).map(|(store, _)| *store).collect(),
            moment: splitmix64(now.as_nanos() as u64),
        }
    }

    /// Ends what a master began and could not finish, when another one, which had not heard of it, made a keyspace of the same name: that one
    /// is on more than half of the stores, and nobody who knows of it takes the other. Returns those of which it is not known yet which one
    /// that is: they are not spread any further.
    fn settle_names(&mut self) -> BTreeSet<KeyspaceId> {
        let mut by_name: BTreeMap<&str, Vec<&KeyspaceRecord>> = BTreeMap::new();
        for known in self.records.values().filter(|known| !known.record.dropped) {
            by_name.entry(&known.record.name).or_default().push(&known.record);
        }
        by_name.retain(|_, records| records.len() > 1);
        if by_name.is_empty() {
            return BTreeSet::new();
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
        for record in ended {
            if let Some(known) = self.records.get_mut(&record.id) {
                known.record = record;
            }
        }
        disputed
    }

    /// Makes what was decided, which [`State::instruct`] sends out, or answers.
    fn carry_out(&mut self, request: RequestId, decision: Result<Decision, KeyspaceError>, now: Duration) {
        let record = match decision {
            Ok(Decision::Holds(record)) => return self.answers.push((request, Ok(record))),
            Err(error) => return self.answers.push((request, Err(error.into()))),
            Ok(Decision::UnderWay(record)) => record,
            Ok(Decision::Make(record)) => {
                let new = Known { record: record.clone(), published: None };
                self.records.entry(record.id).or_insert(new).record = record.clone();
                record
            }
        };
        match self.pending.get_mut(&record.id) {
            Some(pending) if pending.record == record => pending.requests.push(request),
            Some(_) | None => {
                let deadline = now + ALTER_PATIENCE;
                let name = record.name.clone();
                let pending = Pending { requests: vec![request], record, deadline };
                if let Some(overtaken) = self.pending.insert(pending.record.id, pending) {
                    let answer = |request| (request, Err(AlterError::Overtaken { name: name.clone() }));
                    self.answers.extend(overtaken.requests.into_iter().map(answer));
                }
            }
        }
    }

    /// Who has yet to confirm the newest version of a record before it may be published.
    fn awaited(&self, record: &KeyspaceRecord, now: Duration) -> BTreeSet<StoreId> {
        let mut awaited = unconfirmed(record, &self.members, self.cluster);
        if !keyspaces::concerns_all(record) {
            return awaited;
        }
        let is_up =
            |store: &StoreId| self.members.get(store).is_some_and(|member| member.is_up(now, self.limits.silence_max));
        if record.dropped {
            // It gets to know when it is back: until then it serves nobody.
            awaited.retain(is_up);
        }
        let known = self.known_stores();
        let holds = |store: &&StoreId| self.members.get(store).is_some_and(|member| member.holds(record));
        if known.iter().filter(holds).count() * 2 <= known.len() {
            awaited.extend(known.iter().filter(|store| !holds(store)));
        }
        awaited
    }

    /// Sends each store what it lacks: first the records, and when it has them all, its cluster id. A change that is not confirmed
    /// goes to the stores that own shards and to nobody else: what a master made and could not finish is then only where the
    /// next one looks before it makes another.
    fn instruct(&mut self, now: Duration, disputed: &BTreeSet<KeyspaceId>, effects: &mut Vec<Effect>) {
        for (store, member) in &mut self.members {
            let Some(session) = member.session else { continue };
            if now < member.retry_at || !member.is_up(now, self.limits.silence_max) {
                continue;
            }
            let mut lacks_records = self.records.is_empty();
            let lacks = |(id, epoch): &(&KeyspaceId, &Epoch)| member.held.get(id).is_none_or(|held| held < *epoch);
            let mut under_way = member.sent.iter().filter(lacks).count();
            for known in self.records.values() {
                let newest = Some(&known.record)
                    .filter(|record| keyspaces::concerns_all(record) || stores_of(record).contains(store));
                let Some(record) = newest.or(known.published.as_ref()) else {
                    lacks_records = true;
                    continue;
                };
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

    fn publish_confirmed(&mut self, now: Duration) {
        let news = self.records.values().filter(|known| known.published.as_ref() != Some(&known.record));
        let confirmed = news.filter(|known| self.awaited(&known.record, now).is_empty());
        for keyspace in confirmed.map(|known| known.record.id).collect::<Vec<_>>() {
            if let Some(known) = self.records.get_mut(&keyspace) {
                known.published = Some(known.record.clone());
            }
        }
    }

    /// Makes the next version of a record, which [`State::instruct`] sends out, or answers why not.
    fn alter(&mut self, request: RequestId, alteration: &Alteration, now: Duration) {
        match self.try_alter(alteration, now) {
            Ok(Altered::Nothing(record)) => self.answers.push((request, Ok(record))),
            Ok(Altered::Made(record)) => {
                if let Some(known) = self.records.get_mut(&record.id) {
                    known.record = record.clone();
                }
                self.pending
                    .insert(record.id, Pending { requests: vec![request], record, deadline: now + ALTER_PATIENCE });
            }
            Err(error) => self.answers.push((request, Err(error))),
        }
    }

    fn try_alter(&self, alteration: &Alteration, now: Duration) -> Result<Altered, AlterError> {
        let name = alteration.name.clone();
        let is_meant = |known: &&Known| known.published.as_ref().is_some_and(|published| published.name == name);
        let is_living = |known: &&Known| !known.record.dropped;
        let Some(Known { record, .. }) = self.records.values().filter(is_living).find(is_meant) else {
            return Err(AlterError::NoSuchKeyspace(name));
        };
        let unconfirmed = unconfirmed(record, &self.members, self.cluster);
        let silence_max = self.limits.silence_max;
        let is_up = |store: &StoreId| self.members.get(store).is_some_and(|member| member.is_up(now, silence_max));
        let down: BTreeSet<StoreId> = stores_of(record).into_iter().filter(|store| !is_up(store)).collect();
        // A store that is down could come back under the old settings after the new ones were confirmed.
        if !down.is_empty() {
            return Err(AlterError::StoresDown { name, stores: StoreList(down) });
        }
        if !unconfirmed.is_empty() || self.pending.contains_key(&record.id) {
            return Err(AlterError::Busy { name, stores: StoreList(unconfirmed) });
        }
        // Every store keeps every record: an older one would keep it without its settings.
        let is_older = |(_, member): &(StoreId, &Member)| member.protocol_version < SETTINGS_VERSION;
        let older: BTreeSet<StoreId> = self.up(now).filter(is_older).map(|(store, _)| store).collect();
        if !older.is_empty() {
            return Err(AlterError::StoresOlder { stores: StoreList(older) });
        }
        if let Some(expected) = alteration.expected_epoch.filter(|expected| *expected != record.epoch) {
            return Err(AlterError::OtherEpoch { name, expected, found: record.epoch });
        }
        let settings = record.settings.changed_by(&alteration.changes);
        if settings == record.settings {
            return Ok(Altered::Nothing(record.clone()));
        }
        Ok(Altered::Made(record.with_settings(settings)))
    }

    /// Answers those changes that are confirmed, and those that have waited for too long.
    fn settle_alterations(&mut self, now: Duration) {
        let waiting = std::mem::take(&mut self.pending);
        for (keyspace, pending) in waiting {
            let Some(known) = self.records.get(&keyspace) else { continue };
            let name = known.record.name.clone();
            let answer = if known.record != pending.record {
                Err(AlterError::Overtaken { name })
            } else if known.published.as_ref() == Some(&known.record) {
                Ok(known.record.clone())
            } else if now >= pending.deadline {
                let stores = StoreList(self.awaited(&known.record, now));
                Err(AlterError::Unconfirmed { name, stores })
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
            dropped: dropped.into_iter().map(|record| record.id).collect(),
        };
        if snapshot != self.snapshot {
            snapshot.version += 1;
            self.snapshot = snapshot;
        }
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
    record.shards.iter().flat_map(|shard| std::iter::once(shard.primary).chain(shard.replicas.iter().copied()))
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
        let mix = |id: u64, shard: &vasto_proto::topology::ShardRecord| splitmix64(id ^ u64::from(shard.primary.0));
        // 0 means "none yet".
        ClusterId(record.shards.iter().fold(record.shards.len() as u64, mix).max(1))
    })
}

#[cfg(test)]
mod tests {

    use super::*;
    use proptest::prelude::*;

    const SILENCE_MAX: Duration = Duration::from_secs(2);

    fn limits(shards: u16, stores: usize) -> Limits {
        Limits { bootstrap_shards: shards, bootstrap_stores: stores, silence_max: SILENCE_MAX }
    }

    fn at_ms(now_ms: u64) -> Duration {
        Duration::from_millis(now_ms)
    }

    /// What a store has on its disk.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Disk {
        cluster: ClusterId,
        records: BTreeMap<KeyspaceId, KeyspaceRecord>,
    }

    impl Disk {
        fn report(&self, store: u32) -> Report {
            Report {
                store: StoreId(store),
                address: format!("store-{store}:1"),
                protocol_version: DROP_VERSION,
                cluster: self.cluster,
                records: Some(self.records.values().cloned().collect()),
                free_disk_bytes: 1 << 40,
                fsync: Some(Fsync::EverySecond),
                site: Site::default(),
                failure: String::new(),
            }
        }

        fn carry_out(&mut self, action: Action) {
            match action {
                Action::Acknowledge => {}
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

    /// Reports and carries out what comes back until nothing does.
    fn settle(state: &mut State, disks: &mut BTreeMap<u32, Disk>, now: Duration) {
        for _ in 0..10 {
            let mut done = true;
            for store in disks.keys().copied().collect::<Vec<_>>() {
                let session = SessionId(u64::from(store));
                let report = disks[&store].report(store);
                for effect in state.apply(Event::Reported { session, report }, now) {
                    done &= effect.action == Action::Acknowledge;
                    // Sessions from before that died unnoticed get what they get.
                    if let Some(disk) = disks.get_mut(&u32::try_from(effect.session.0).unwrap()) {
                        disk.carry_out(effect.action);
                    }
                }
            }
            if done {
                return;
            }
        }
        panic!("the master never comes to rest");
    }

    fn blank(stores: impl IntoIterator<Item = u32>) -> BTreeMap<u32, Disk> {
        stores.into_iter().map(|store| (store, Disk::default())).collect()
    }

    fn bootstrapped(shards: u16, stores: u32) -> (State, BTreeMap<u32, Disk>) {
        let mut state = State::new(limits(shards, stores as usize));
        let mut disks = blank(1..=stores);
        settle(&mut state, &mut disks, Duration::ZERO);
        (state, disks)
    }

    fn refusal(effects: &[Effect]) -> Option<String> {
        effects.iter().find_map(|effect| match &effect.action {
            Action::Refuse(refusal) => Some(refusal.to_string()),
            Action::Acknowledge | Action::PutRecord(_) | Action::Welcome(_) => None,
        })
    }

    #[test]
    fn an_empty_cluster_gets_keyspace_0_when_all_stores_are_there() {
        let mut state = State::new(limits(4, 2));
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
        let mut state = State::new(limits(2, 2));
        let (mut one, mut two) = (Disk::default(), Disk::default());
        let report = |state: &mut State, store: u32, disk: &Disk| {
            state.apply(
                Event::Reported { session: SessionId(u64::from(store)), report: disk.report(store) },
                Duration::ZERO,
            )
        };
        assert_eq!(report(&mut state, 1, &one).len(), 1);
        let effects = report(&mut state, 2, &two);
        assert!(state.snapshot().keyspaces.is_empty());
        assert_eq!(
            state.snapshot().waiting_for,
            "keyspace 0 is created; not yet confirmed by stores 00000001,00000002"
        );
        for effect in effects {
            let disk = if effect.session == SessionId(1) { &mut one } else { &mut two };
            disk.carry_out(effect.action);
        }
        for effect in report(&mut state, 1, &one) {
            one.carry_out(effect.action);
        }
        report(&mut state, 1, &one);
        assert_eq!(state.snapshot().waiting_for, "keyspace 0 is created; not yet confirmed by stores 00000002");
        for effect in report(&mut state, 2, &two) {
            two.carry_out(effect.action);
        }
        report(&mut state, 2, &two);
        assert_eq!(state.snapshot().keyspaces.len(), 1);
    }

    #[test]
    fn a_restarted_master_adopts_what_the_stores_have() {
        let (before, mut disks) = bootstrapped(3, 3);
        let mut state = State::new(limits(7, 1));
        let session = SessionId(2);
        state.apply(Event::Reported { session, report: disks[&2].report(2) }, Duration::ZERO);
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
        let mut state = State::new(limits(2, 2));
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
        let mut other = State::new(limits(1, 1));
        let mut theirs = blank([9]);
        settle(&mut other, &mut theirs, Duration::ZERO);
        let mut state = State::new(limits(1, 1));
        settle(&mut state, &mut ours, Duration::ZERO);
        let report = theirs[&9].report(9);
        let effects = state.apply(Event::Reported { session: SessionId(9), report }, Duration::ZERO);
        let text = format!(
            "store 00000009 belongs to cluster {}, but this master leads cluster {}",
            theirs[&9].cluster, ours[&1].cluster
        );
        assert_eq!(refusal(&effects), Some(text));
        assert_eq!(state.snapshot().stores.len(), 1);
    }

    #[test]
    fn no_bootstrap_beside_a_store_that_has_a_cluster_id() {
        let mut state = State::new(limits(1, 1));
        let joined = Disk { cluster: ClusterId(77), records: BTreeMap::new() };
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
        let event = Event::Reported { session: SessionId(50), report: copy };
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
        let mut state = State::new(limits(1, 1));
        let session = SessionId(1);
        let blank = Disk::default();
        let puts = |effects: Vec<Effect>| effects.iter().filter(|e| matches!(e.action, Action::PutRecord(_))).count();
        assert_eq!(puts(state.apply(Event::Reported { session, report: blank.report(1) }, at_ms(0))), 1);
        assert_eq!(puts(state.apply(Event::Reported { session, report: blank.report(1) }, at_ms(500))), 0);
        let failed = Report { failure: "disk full".to_owned(), ..blank.report(1) };
        assert_eq!(puts(state.apply(Event::Reported { session, report: failed }, at_ms(600))), 0);
        assert_eq!(puts(state.apply(Event::TimePassed, at_ms(1_500))), 0);
        assert_eq!(puts(state.apply(Event::TimePassed, at_ms(1_700))), 1);
    }

    #[test]
    fn heartbeats_with_nearly_the_same_free_disk_publish_nothing() {
        let (mut state, disks) = bootstrapped(1, 1);
        let version = state.snapshot().version;
        let mut report = Report { records: None, ..disks[&1].report(1) };
        report.free_disk_bytes -= 1 << 30;
        state.apply(Event::Reported { session: SessionId(1), report: report.clone() }, at_ms(10));
        assert_eq!(state.snapshot().version, version);
        report.free_disk_bytes /= 2;
        state.apply(Event::Reported { session: SessionId(1), report: report.clone() }, at_ms(20));
        assert_eq!(state.snapshot().stores[0].free_disk_bytes, report.free_disk_bytes);
    }

    fn ask(state: &mut State, fsync: Fsync, now: Duration) -> Vec<Effect> {
        let changes = Settings { fsync: Some(fsync) };
        let alteration = Alteration { name: "0".to_owned(), changes, expected_epoch: None };
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

    #[test]
    fn a_change_holds_when_the_stores_that_own_shards_have_confirmed_it() {
        let (mut state, mut disks) = bootstrapped(2, 2);
        disks.insert(3, Disk::default());
        settle(&mut state, &mut disks, Duration::ZERO);
        let before = state.snapshot().keyspaces[0].clone();
        let effects = ask(&mut state, Fsync::Always, at_ms(10));
        let receivers: Vec<u64> = effects.iter().map(|effect| effect.session.0).collect();
        assert_eq!(receivers, [1, 2], "a store without a shard waits");
        for effect in effects {
            disks.get_mut(&(effect.session.0 as u32)).unwrap().carry_out(effect.action);
        }
        state.apply(Event::Reported { session: SessionId(1), report: disks[&1].report(1) }, at_ms(20));
        assert_eq!((answer(&mut state).as_str(), published(&state)), ("", (1, None)));
        // One at a time.
        let second =
            Alteration { name: "0".to_owned(), changes: Settings { fsync: Some(Fsync::Never) }, expected_epoch: None };
        state.apply(Event::AlterRequested { request: RequestId(1), alteration: second }, at_ms(21));
        assert_eq!(
            answer(&mut state),
            "an earlier change of keyspace 0 is not yet confirmed by stores 00000002; nothing was changed"
        );
        state.apply(Event::Reported { session: SessionId(2), report: disks[&2].report(2) }, at_ms(30));
        assert_eq!((answer(&mut state).as_str(), published(&state)), ("2 Some(Always)", (2, Some(Fsync::Always))));
        assert_eq!(state.snapshot().keyspaces[0].shards, before.shards, "no request in flight is refused for it");
        settle(&mut state, &mut disks, at_ms(40));
        assert_eq!(disks[&3], disks[&1]);
        // The same again changes nothing.
        assert_eq!(ask(&mut state, Fsync::Always, at_ms(50)), []);
        assert_eq!(answer(&mut state), "2 Some(Always)");
        // A restarted master finds it.
        let mut state = State::new(limits(2, 2));
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
            let changes = Settings { fsync: Some(Fsync::Never) };
            let alteration = Alteration { name: name.to_owned(), changes, expected_epoch };
            assert_eq!(state.apply(Event::AlterRequested { request: RequestId(1), alteration }, at_ms(1)), []);
            assert_eq!(answer(&mut state), text);
        }
        state.apply(Event::SessionEnded { session: SessionId(2) }, at_ms(2));
        assert_eq!(ask(&mut state, Fsync::Never, at_ms(3)), []);
        assert_eq!(answer(&mut state), "stores 00000002 of keyspace 0 are down; nothing was changed");
        let older = Report { protocol_version: SETTINGS_VERSION - 1, ..disks[&2].report(2) };
        state.apply(Event::Reported { session: SessionId(2), report: older }, at_ms(4));
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
        for effect in ask(&mut state, Fsync::Always, now) {
            if effect.session == SessionId(1) {
                disks.get_mut(&1).unwrap().carry_out(effect.action);
            }
        }
        let asked = now;
        while now < asked + ALTER_PATIENCE {
            assert_eq!(answer(&mut state), "");
            now += at_ms(500);
            // The second store lives and does not get round to it.
            for store in [1, 2] {
                let report = disks[&store].report(store);
                state.apply(Event::Reported { session: SessionId(u64::from(store)), report }, now);
            }
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
        assert_eq!(ask(&mut state, Fsync::Never, now).len(), 2, "the next change may be asked for");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Alter(Fsync),
        /// The store reports, if it runs; `carries_out` of the directives take effect before anything else happens.
        Report {
            store: u32,
            carries_out: usize,
        },
        StoreRestarts(u32),
        MasterRestarts,
        TimePasses(u64),
    }

    fn step(stores: u32) -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (1..=stores, 0usize..3).prop_map(|(store, carries_out)| Step::Report { store, carries_out }),
            2 => (1..=stores).prop_map(Step::StoreRestarts),
            1 => Just(Step::MasterRestarts),
            2 => prop::sample::select(Fsync::ALL.to_vec()).prop_map(Step::Alter),
            1 => (0u64..3_000).prop_map(Step::TimePasses),
        ]
    }

    proptest! {
        /// Whatever is lost and restarted on the way: one cluster, one record of each epoch, no confirmed change is lost, and in the
        /// end it is served.
        #[test]
        fn bootstrap_and_changes_survive_restarts_of_everybody(
            shards in 1u16..6,
            steps in prop::collection::vec(step(3), 0..60),
        ) {
            const STORES: u32 = 3;
            let mut state = State::new(limits(shards, STORES as usize));
            let mut disks = blank(1..=STORES);
            let mut sessions: BTreeMap<u32, SessionId> = BTreeMap::new();
            let (mut next_session, mut now) = (100, Duration::ZERO);
            let mut lost: BTreeSet<SessionId> = BTreeSet::new();
            let mut seen: Vec<(ClusterId, KeyspaceRecord)> = Vec::new();
            let mut confirmed = Vec::new();
            for step in steps {
                now += Duration::from_millis(1);
                match step {
                    Step::Report { store, carries_out } => {
                        let session = *sessions.entry(store).or_insert_with(|| {
                            next_session += 1;
                            SessionId(next_session)
                        });
                        let effects = state.apply(Event::Reported { session, report: disks[&store].report(store) }, now);
                        let mut budget = BTreeMap::from([(session, carries_out)]);
                        for effect in effects {
                            if lost.contains(&effect.session) {
                                continue;
                            }
                            let receiver = sessions.iter().find(|(_, session)| **session == effect.session);
                            let (receiver, _) = receiver.expect("the master answers sessions that it has");
                            let left = budget.entry(effect.session).or_insert(1);
                            if effect.action == Action::Acknowledge {
                                continue;
                            }
                            if *left > 0 {
                                *left -= 1;
                                disks.get_mut(receiver).unwrap().carry_out(effect.action);
                            } else {
                                // Lost with its session: nothing later on that stream arrives either.
                                let receiver = *receiver;
                                sessions.remove(&receiver);
                                lost.insert(effect.session);
                            }
                        }
                    }
                    Step::Alter(fsync) => {
                        for effect in ask(&mut state, fsync, now) {
                            let receiver = sessions.iter().find(|(_, session)| **session == effect.session);
                            if let Some((receiver, _)) = receiver.filter(|_| !lost.contains(&effect.session)) {
                                disks.get_mut(receiver).unwrap().carry_out(effect.action);
                            }
                        }
                    }
                    Step::StoreRestarts(store) => {
                        if let Some(session) = sessions.remove(&store) {
                            state.apply(Event::SessionEnded { session }, now);
                        }
                    }
                    Step::MasterRestarts => {
                        state = State::new(limits(shards, STORES as usize));
                        sessions.clear();
                    }
                    Step::TimePasses(ms) => {
                        now += Duration::from_millis(ms);
                        state.apply(Event::TimePassed, now);
                    }
                }
                confirmed.extend(state.take_answers().into_iter().filter_map(|(_, result)| result.ok()));
                let snapshot = state.snapshot();
                seen.extend(snapshot.keyspaces.iter().map(|record| (snapshot.cluster, record.clone())));
                for disk in disks.values().filter(|disk| disk.cluster != ClusterId(0)) {
                    seen.extend(disk.records.values().map(|record| (disk.cluster, record.clone())));
                }
            }
            // All come back for good; old sessions end.
            for session in sessions.into_values() {
                state.apply(Event::SessionEnded { session }, now);
            }
            settle(&mut state, &mut disks, now + Duration::from_secs(10));
            let snapshot = state.snapshot();
            prop_assert_eq!(snapshot.keyspaces.len(), 1);
            let last = &snapshot.keyspaces[0];
            let mut by_epoch = BTreeMap::from([(last.epoch, last)]);
            for (cluster, record) in &seen {
                prop_assert_eq!(*cluster, snapshot.cluster);
                prop_assert_eq!(*by_epoch.entry(record.epoch).or_insert(record), record);
            }
            for record in &confirmed {
                prop_assert_eq!(by_epoch.get(&record.epoch), Some(&record));
                prop_assert!(record.epoch <= last.epoch);
            }
        }
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
            let (state, disks) = bootstrapped(2, STORES);
            // Sessions of the bootstrap live on under the same numbers.
            let sessions = (1..=STORES).map(|store| (store, SessionId(u64::from(store)))).collect();
            Self { state, disks, sessions, lost: BTreeSet::new(), next: 100, now: at_ms(1) }
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
            let effects = self.state.apply(Event::Reported { session, report }, self.now);
            self.deliver(effects, BTreeMap::from([(session, carries_out)]));
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
            self.state = State::new(limits(2, STORES as usize));
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
            self.now += Duration::from_secs(10);
            settle(&mut self.state, &mut self.disks, self.now);
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
        (1..=STORES).for_each(|store| world.report(store, 9));
        let record = world.answers().remove(0).unwrap();
        assert_eq!((world.names(), record.epoch), (vec!["0".to_owned(), "a".to_owned()], Epoch(1)));
        assert!(world.disks.values().all(|disk| disk.records[&record.id] == record));
        world.create("a");
        assert_eq!(world.answers(), [Err("keyspace a exists already; nothing was changed".to_owned())]);

        // One of its stores is away.
        let away = record.shards[0].primary.0;
        world.stop_store(away);
        world.drop("a");
        (1..=STORES).filter(|store| *store != away).for_each(|store| world.report(store, 9));
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
        (1..=STORES).for_each(|store| world.report(store, 9));
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
            answers.iter().all(|answer| answer.as_ref().is_err_and(|text| text.starts_with("1 of 3 known"))),
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
        let effects = world.state.apply(Event::Reported { session: SessionId(9), report }, world.now);
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
