//! The store as a primary: asks the holders for the leases of its shards, and says of each shard until when it may be served.
//!
//! One thread with a runtime of its own does it for all shards, in one message a holder: neither busy workers nor a slow disk cost a lease.

use super::clock::BootClock;
use super::holder::Holder;
use super::rpc::{ANSWER_MAX, Link};
use crate::engine::EngineError;
use crate::replication::begin_leading;
use crate::shard::Shard;
use crate::shard::executor::Core;
use crate::shard::map::{Entry, ShardMap};
use metrics::{counter, gauge};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::future::Future;
use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vasto_proto::id::{ClusterId, Epoch, ShardKey, StoreId};
use vasto_proto::pb;
use vasto_proto::topology::Peers;
use vasto_proto::topology::lease::{KnownGroup, Lease};

/// How often every lease is asked for again: two attempts may fail before one ends.
const RENEWAL_INTERVAL: Duration = Duration::from_millis(500);
/// How often leases are asked for that are not held: what a failover takes longer because of it.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Leases of one message, which stays far below what a message may have.
const LEASES_PER_MESSAGE: usize = 4096;

/// A lease, as a store tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseFigures {
    pub shard: ShardKey,
    pub epoch: Epoch,
    /// How long it holds yet; `None` = it is not held.
    pub left: Option<Duration>,
    /// Holders that grant it now, and how many there are.
    pub granted_by: usize,
    pub holder_count: usize,
    /// It is held, and all is done that a primary does first.
    pub serves: bool,
    /// Which holders do not grant it, and why.
    pub reason: String,
}

/// The leases of a store's shards.
pub struct Leases {
    store: StoreId,
    core: Arc<Core>,
    clock: Arc<BootClock>,
    holder: Arc<Holder>,
    cluster: Arc<Mutex<ClusterId>>,
    peers: watch::Receiver<Arc<Peers>>,
    bell: Notify,
    stopping: CancellationToken,
    thread: Mutex<Option<JoinHandle<()>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: KnownGroup,
    tenures: BTreeMap<ShardKey, Tenure>,
}

/// One time of being primary of a shard that needs a lease.
struct Tenure {
    number: u64,
    epoch: Epoch,
    shard: Weak<Shard>,
    /// Of the shard: one that was opened anew begins anew.
    instance: u32,
    /// Its shard is open: else the lease is not asked for.
    is_open: bool,
    lease: Lease,
    leading: Leading,
    /// What the shard met last when it was to begin to lead; empty = nothing.
    trouble: String,
    /// It was served when it was last looked at.
    serves: bool,
    /// Why holders have not granted it last.
    refusals: BTreeMap<StoreId, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leading {
    Not,
    Begins,
    Begun,
}

/// Which leases are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    All,
    NotHeld,
}

/// What a message was about.
#[derive(Clone, Copy)]
struct AskedLease {
    key: ShardKey,
    tenure: u64,
}

/// Work that has ended.
enum Done {
    Answered {
        holder: StoreId,
        group_version: u64,
        asked_ns: u64,
        asked: Vec<AskedLease>,
        response: Result<pb::RenewResponse, String>,
    },
    Released {
        holder: StoreId,
        has_answered: bool,
    },
    Led {
        asked: AskedLease,
        instance: u32,
        result: Result<(), EngineError>,
    },
}

impl Leases {
    pub fn new(
        store: StoreId,
        core: &Arc<Core>,
        holder: &Arc<Holder>,
        cluster: &Arc<Mutex<ClusterId>>,
        peers: watch::Receiver<Arc<Peers>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            core: Arc::clone(core),
            clock: Arc::clone(&core.clock),
            holder: Arc::clone(holder),
            cluster: Arc::clone(cluster),
            peers,
            bell: Notify::new(),
            stopping: CancellationToken::new(),
            thread: Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// Starts the thread.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let leases = Arc::clone(self);
        let thread = std::thread::Builder::new().name("store-leases".into());
        let thread = thread.spawn(move || runtime.block_on(Keeper::new(leases).run()))?;
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// A record has come: it may make this store primary, or take that away.
    pub fn ring(&self) {
        self.bell.notify_one();
    }

    /// Gives all leases back. The shards are not served any more.
    pub fn stop(&self) {
        self.stopping.cancel();
    }

    /// Waits until what [`Leases::stop`] began is done.
    pub fn join(&self) {
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            error!("the thread of the leases had panicked");
        }
    }

    /// The number of a shard's tenure.
    #[cfg(test)]
    pub fn tenure(&self, shard: ShardKey) -> Option<u64> {
        self.state.lock().tenures.get(&shard).map(|tenure| tenure.number)
    }

    /// Where the leases of this store's shards stand.
    pub fn figures(&self) -> Vec<LeaseFigures> {
        let now_ns = self.clock.now_ns();
        let State { known, tenures } = &*self.state.lock();
        let figures = |(key, tenure): (&ShardKey, &Tenure)| LeaseFigures {
            shard: *key,
            epoch: tenure.epoch,
            left: tenure.left_ns(now_ns).map(Duration::from_nanos),
            granted_by: tenure.lease.holder_count(known, now_ns),
            holder_count: known.group.members.len(),
            serves: tenure.leading == Leading::Begun && tenure.lease.is_held(now_ns),
            reason: tenure.reason(known, now_ns),
        };
        tenures.iter().map(figures).collect()
    }
}

impl Tenure {
    fn new(epoch: Epoch, shard: &Arc<Shard>) -> Self {
        Self {
            number: fastrand::u64(1..),
            epoch,
            shard: Arc::downgrade(shard),
            instance: shard.instance,
            is_open: true,
            lease: Lease::default(),
            leading: Leading::Not,
            trouble: String::new(),
            serves: false,
            refusals: BTreeMap::new(),
        }
    }

    fn left_ns(&self, now_ns: u64) -> Option<u64> {
        self.lease.is_held(now_ns).then(|| self.lease.until_ns() - now_ns)
    }

    /// Why it is not held, or not by all.
    fn reason(&self, known: &KnownGroup, now_ns: u64) -> String {
        if known.group.version == 0 {
            return "this store knows of no holders who could grant it, since no master has named any".to_owned();
        }
        let granted_by = self.lease.holder_count(known, now_ns);
        let mut reason = format!("{granted_by} of {} holders grant it", known.group.members.len());
        let unusable_ms = known.unusable_ns(now_ns) / 1_000_000;
        if unusable_ms > 0 && !self.lease.is_held(now_ns) {
            let _ = write!(reason, ", and the group of holders may be new: it counts in {unusable_ms} ms");
        }
        for (holder, refusal) in self.refusals.iter().filter(|(holder, _)| known.group.members.contains(holder)) {
            let _ = write!(reason, "; store {holder} {refusal}");
        }
        if !self.trouble.is_empty() {
            let _ = write!(reason, "; it cannot begin to serve: {}", self.trouble);
        }
        reason
    }
}

struct Keeper {
    leases: Arc<Leases>,
    peers: watch::Receiver<Arc<Peers>>,
    links: BTreeMap<StoreId, Link>,
    at_work: JoinSet<Done>,
}

impl Keeper {
    fn new(leases: Arc<Leases>) -> Self {
        let peers = leases.peers.clone();
        Self { leases, peers, links: BTreeMap::new(), at_work: JoinSet::new() }
    }

    async fn run(mut self) {
        let leases = Arc::clone(&self.leases);
        // A group that was known before this life may have been new when that one ended.
        self.meet_peers();
        let mut next_renewal = Instant::now();
        loop {
            let next_look = if self.waits() { next_renewal.min(Instant::now() + RETRY_INTERVAL) } else { next_renewal };
            // All are cancel safe: a token, a finished task, a permit of a bell, a change of a watch, a time.
            tokio::select! {
                biased;
                () = leases.stopping.cancelled() => break,
                Some(done) = self.at_work.join_next() => {
                    match done {
                        Ok(done) => self.hear(done),
                        Err(error) => self.hear_panic(&error),
                    }
                    continue;
                }
                () = leases.bell.notified() => {}
                Ok(()) = self.peers.changed() => self.meet_peers(),
                () = tokio::time::sleep_until(next_look) => {}
            }
            let which = if Instant::now() >= next_renewal { Which::All } else { Which::NotHeld };
            if which == Which::All {
                next_renewal = Instant::now() + RENEWAL_INTERVAL;
            }
            self.look();
            self.ask(which);
        }
        self.release_all().await;
    }

    /// Whether a lease is wanted that is not held.
    fn waits(&self) -> bool {
        let now_ns = self.leases.clock.now_ns();
        let state = self.leases.state.lock();
        let waits =
            |tenure: &Tenure| tenure.is_open && !(tenure.lease.is_held(now_ns) && tenure.leading == Leading::Begun);
        state.known.group.version > 0 && state.tenures.values().any(waits)
    }

    /// Takes up what is said of the other stores.
    fn meet_peers(&mut self) {
        let peers = Arc::clone(&self.peers.borrow_and_update());
        let now_ns = self.leases.clock.now_ns();
        let mut state = self.leases.state.lock();
        if state.known.group != peers.group {
            state.known = KnownGroup::new(peers.group.clone(), now_ns);
        }
        let own = self.leases.store;
        self.links.retain(|store, link| peers.addresses.get(store).is_some_and(|address| address == link.address()));
        for store in peers.group.members.iter().filter(|store| **store != own) {
            if let Some(address) = peers.addresses.get(store)
                && !self.links.contains_key(store)
            {
                self.links.insert(*store, Link::new(address.clone()));
            }
        }
    }

    /// Sees for which shards leases are wanted, gives back what is not, and notes which have ended.
    fn look(&mut self) {
        let map = self.leases.core.shards.current();
        let now_ns = self.leases.clock.now_ns();
        let mut over = Vec::new();
        let leases = Arc::clone(&self.leases);
        let State { known, tenures } = &mut *leases.state.lock();
        tenures.retain(|key, tenure| match fate(&map, *key, tenure) {
            Fate::Open => {
                tenure.is_open = true;
                true
            }
            Fate::NotOpen => {
                tenure.is_open = false;
                true
            }
            Fate::NeedsNone => false,
            Fate::Over => {
                // Whoever still runs operations on it may not answer them when another store serves.
                if let Some(shard) = tenure.shard.upgrade() {
                    shard.lease.end(tenure.epoch);
                }
                info!(shard = %key, epoch = %tenure.epoch, "lease given back, this store is not primary any more");
                over.push(release(*key, tenure));
                false
            }
        });
        for shard in map.serving() {
            let Some(epoch) = shard.lease.wanted() else { continue };
            let tenure = tenures.entry(shard.key).or_insert_with(|| Tenure::new(epoch, shard));
            if tenure.instance != shard.instance {
                tenure.instance = shard.instance;
                tenure.shard = Arc::downgrade(shard);
                tenure.leading = Leading::Not;
                tenure.serves = false;
            }
        }
        let (mut held, mut not_held) = (0, 0);
        for (key, tenure) in tenures {
            if tenure.lease.is_held(now_ns) && tenure.leading == Leading::Begun && tenure.is_open {
                held += 1;
                continue;
            }
            not_held += 1;
            let reason = tenure.reason(known, now_ns);
            if std::mem::take(&mut tenure.serves) && tenure.is_open {
                counter!("vasto_store_lease_lapses_total").increment(1);
                warn!(shard = %key, epoch = %tenure.epoch, reason, "lease lost, shard is not served until it is granted again");
            }
            if let Some(shard) = tenure.shard.upgrade() {
                shard.lease.explain(tenure.epoch, reason);
            }
        }
        gauge!("vasto_store_shards_leased").set(held);
        gauge!("vasto_store_shards_without_lease").set(not_held);
        let group_version = known.group.version;
        drop(map);
        self.send_releases(over, group_version);
    }

    /// Asks all holders, each in one message.
    fn ask(&mut self, which: Which) {
        // Before anything else: the lease is counted from here.
        let asked_ns = self.leases.clock.now_ns();
        let leases = Arc::clone(&self.leases);
        let (group, wanted) = {
            let mut state = leases.state.lock();
            let State { known, tenures } = &mut *state;
            let is_wanted = |tenure: &Tenure| {
                let is_settled = tenure.lease.is_held(asked_ns) && tenure.leading == Leading::Begun;
                tenure.is_open && (which == Which::All || !is_settled)
            };
            let mut wanted = Vec::new();
            for (key, tenure) in tenures.iter_mut().filter(|(_, tenure)| is_wanted(tenure)) {
                for member in known.group.members.iter().filter(|member| **member != leases.store) {
                    if !self.links.contains_key(member) {
                        tenure.refusals.insert(*member, "has no known address".to_owned());
                    }
                }
                wanted.push((*key, tenure.epoch, tenure.number));
            }
            (known.group.clone(), wanted)
        };
        let cluster = *leases.cluster.lock();
        for wanted in wanted.chunks(LEASES_PER_MESSAGE) {
            let asked: Vec<_> =
                wanted.iter().map(|(key, _, tenure)| AskedLease { key: *key, tenure: *tenure }).collect();
            let request = pb::RenewRequest {
                store_id: leases.store.0,
                leases: wanted.iter().map(|(key, epoch, tenure)| lease_request(*key, *epoch, *tenure)).collect(),
                group_version: group.version,
            };
            for holder in group.members.iter().copied() {
                let (asked, group_version) = (asked.clone(), group.version);
                if holder == leases.store {
                    let response = Ok(leases.holder.renew(&request));
                    self.hear(Done::Answered { holder, group_version, asked_ns, asked, response });
                } else if let Some(link) = self.links.get_mut(&holder)
                    && let Some(call) = link.ask(request.clone(), cluster)
                {
                    self.at_work.spawn(async move {
                        Done::Answered { holder, group_version, asked_ns, asked, response: call.await }
                    });
                }
            }
        }
    }

    fn hear(&mut self, done: Done) {
        match done {
            Done::Answered { holder, group_version, asked_ns, asked, response } => {
                if let Some(link) = self.links.get_mut(&holder) {
                    link.ended(response.is_ok());
                }
                self.hear_answers(holder, group_version, asked_ns, &asked, response);
            }
            Done::Released { holder, has_answered } => {
                if let Some(link) = self.links.get_mut(&holder) {
                    link.ended(has_answered);
                }
            }
            Done::Led { asked, instance, result } => self.hear_led(asked, instance, result),
        }
    }

    fn hear_answers(
        &mut self,
        holder: StoreId,
        group_version: u64,
        asked_ns: u64,
        asked: &[AskedLease],
        response: Result<pb::RenewResponse, String>,
    ) {
        let now_ns = self.leases.clock.now_ns();
        let leases = Arc::clone(&self.leases);
        let State { known, tenures } = &mut *leases.state.lock();
        let (answers, failure) = match response {
            Ok(response) => (response.answers, "does not answer".to_owned()),
            Err(failure) => (Vec::new(), failure),
        };
        let mut renewals = 0;
        for (place, asked) in asked.iter().enumerate() {
            let Some(tenure) = tenures.get_mut(&asked.key).filter(|tenure| tenure.number == asked.tenure) else {
                continue;
            };
            match answers.get(place) {
                Some(pb::LeaseAnswer { granted: true, .. }) => {
                    tenure.refusals.remove(&holder);
                    let before_ns = tenure.lease.until_ns();
                    tenure.lease.granted(holder, group_version, asked_ns, known, now_ns);
                    renewals += u64::from(tenure.lease.until_ns() > before_ns);
                    self.settle(*asked, tenure, known, now_ns);
                }
                Some(answer) => {
                    tenure.refusals.insert(holder, answer.reason.clone());
                }
                None => {
                    tenure.refusals.insert(holder, failure.clone());
                }
            }
        }
        counter!("vasto_store_lease_renewals_total").increment(renewals);
    }

    /// Lets a shard be served whose lease is held.
    fn settle(&mut self, asked: AskedLease, tenure: &mut Tenure, known: &KnownGroup, now_ns: u64) {
        if !tenure.lease.is_held(now_ns) {
            return;
        }
        let Some(shard) = tenure.shard.upgrade() else { return };
        match tenure.leading {
            Leading::Not => {
                tenure.leading = Leading::Begins;
                let epoch = tenure.epoch;
                self.at_work.spawn_blocking(move || {
                    let result = begin_leading(&shard, epoch);
                    Done::Led { asked, instance: shard.instance, result }
                });
            }
            Leading::Begins => {}
            Leading::Begun => {
                shard.lease.extend(tenure.epoch, tenure.lease.until_ns());
                if !std::mem::replace(&mut tenure.serves, true) {
                    let granted_by = tenure.lease.holder_count(known, now_ns);
                    info!(shard = %asked.key, epoch = %tenure.epoch, granted_by, "lease gained, shard is served");
                }
            }
        }
    }

    fn hear_led(&mut self, asked: AskedLease, instance: u32, result: Result<(), EngineError>) {
        let now_ns = self.leases.clock.now_ns();
        let leases = Arc::clone(&self.leases);
        let State { known, tenures } = &mut *leases.state.lock();
        let is_same = |tenure: &&mut Tenure| (tenure.number, tenure.instance) == (asked.tenure, instance);
        let Some(tenure) = tenures.get_mut(&asked.key).filter(is_same) else { return };
        match result {
            Ok(()) => {
                tenure.leading = Leading::Begun;
                tenure.trouble.clear();
                self.settle(asked, tenure, known, now_ns);
            }
            Err(error) => {
                // Tried again with the next grant.
                tenure.leading = Leading::Not;
                let trouble = error.to_string();
                // One line an error, not one an attempt.
                if trouble != tenure.trouble {
                    error!(shard = %asked.key, epoch = %tenure.epoch, %error, "shard has its lease and cannot begin to serve");
                    tenure.trouble = trouble;
                }
            }
        }
    }

    /// Whose work it was is not known; what had begun is begun again.
    fn hear_panic(&self, panic: &JoinError) {
        error!(%panic, "work for leases panicked");
        for tenure in self.leases.state.lock().tenures.values_mut() {
            if tenure.leading == Leading::Begins {
                tenure.leading = Leading::Not;
            }
        }
    }

    fn send_releases(&mut self, leases: Vec<pb::LeaseRequest>, group_version: u64) {
        for (holder, call) in self.releases(leases, group_version) {
            self.at_work.spawn(async move { Done::Released { holder, has_answered: call.await.is_ok() } });
        }
    }

    /// Gives leases back: to this store at once, to the others by these calls.
    fn releases(
        &mut self,
        leases: Vec<pb::LeaseRequest>,
        group_version: u64,
    ) -> Vec<(StoreId, impl Future<Output = Result<pb::RenewResponse, String>> + Send + use<>)> {
        let cluster = *self.leases.cluster.lock();
        let mut calls = Vec::new();
        for leases in leases.chunks(LEASES_PER_MESSAGE) {
            let request = pb::RenewRequest { store_id: self.leases.store.0, leases: leases.to_vec(), group_version };
            self.leases.holder.renew(&request);
            for (holder, link) in &mut self.links {
                if let Some(call) = link.ask(request.clone(), cluster) {
                    calls.push((*holder, call));
                }
            }
        }
        calls
    }

    /// The store stops: what it holds is given back, so that others need not wait.
    async fn release_all(mut self) {
        let (over, group_version) = {
            let state = &mut *self.leases.state.lock();
            let tenures = std::mem::take(&mut state.tenures);
            for tenure in tenures.values() {
                if let Some(shard) = tenure.shard.upgrade() {
                    shard.lease.end(tenure.epoch);
                }
            }
            let over: Vec<_> = tenures.iter().map(|(key, tenure)| release(*key, tenure)).collect();
            (over, state.known.group.version)
        };
        let calls = self.releases(over, group_version).into_iter().map(|(_, call)| call);
        let all = futures_util::future::join_all(calls);
        // Each has its own deadline.
        let answers = tokio::time::timeout(2 * ANSWER_MAX, all).await.unwrap_or_default();
        for failure in answers.into_iter().filter_map(Result::err) {
            info!(failure, "a holder could not be given leases back; it grants them to others a little later");
        }
    }
}

/// What becomes of a tenure.
enum Fate {
    Open,
    /// The shard is not open, yet this store is its primary as far as it knows.
    NotOpen,
    /// The record does not ask for leases any more. Nobody else serves, so nothing need be given back.
    NeedsNone,
    Over,
}

fn fate(map: &ShardMap, key: ShardKey, tenure: &Tenure) -> Fate {
    match map.entry(key) {
        Some(Entry::Serving(shard)) => match shard.lease.wanted() {
            Some(epoch) if epoch == tenure.epoch => Fate::Open,
            Some(_) => Fate::Over,
            None if shard.lease.allows() => Fate::NeedsNone,
            None => Fate::Over,
        },
        Some(Entry::Opening | Entry::Closing(_) | Entry::Failed(_)) => Fate::NotOpen,
        None => Fate::Over,
    }
}

fn lease_request(key: ShardKey, epoch: Epoch, tenure: u64) -> pb::LeaseRequest {
    let ShardKey { keyspace, shard } = key;
    pb::LeaseRequest { keyspace_id: keyspace.0, shard: u32::from(shard.0), epoch: epoch.0, release: false, tenure }
}

fn release(key: ShardKey, tenure: &Tenure) -> pb::LeaseRequest {
    pb::LeaseRequest { release: true, ..lease_request(key, tenure.epoch, tenure.number) }
}
