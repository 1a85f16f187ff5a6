//! Lifts a fence while no master leads: proposes that version of the record, under a term of its own.
//!
//! A master keeps a fence for two seconds at most. If it dies meanwhile, nobody serves the slots behind the fence until another one leads; but
//! no store lifts a fence by a timer alone, since the targets may serve these slots already. The holders of the records decide, who answer a
//! store as they answer a master: what one of them has accepted is completed first, be it the commit, and only if the fence stands even then
//! a version without it is proposed. What is chosen is followed here and told to the others; a master that returns finds a higher term
//! and asks for one above it.

use super::rpc;
use crate::StoreHandle;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use metrics::counter;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vasto_proto::id::{Epoch, KeyspaceId, StoreId};
use vasto_proto::pb;
use vasto_proto::pb::vote_request::Kind;
use vasto_proto::topology::ballot::{Accepted, Answer, Refusal, Request, Term, Versioned};
use vasto_proto::topology::entry::{self, GROUP};
use vasto_proto::topology::proposer::{Progress, Proposer};
use vasto_proto::topology::{Entry, KeyspaceRecord, OperationKind, Phase};

/// A fence that stands for so long while no master is heard is nobody's: one that leads lifts it after two seconds, and is heard four times in
/// that time.
const FENCE_PATIENCE: Duration = Duration::from_secs(3);
/// How often fences are looked for: a tenth of the patience.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Before each attempt, drawn at random up to this: of two stores that see the same one is mostly done before the other begins.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Rounds of questions in one attempt: the promise, what is adopted, what is changed, and as many again for a group that was found on the way.
const ROUNDS_MAX: usize = 6;

/// The version of the record that set the fence behind which slots of this store are, if there is one.
pub fn fence_at(record: &KeyspaceRecord, store: StoreId) -> Option<Epoch> {
    let operation = record.active_operation().filter(|operation| operation.phase == Phase::Fence)?;
    let OperationKind::Resize { from, to } = operation.kind else { return None };
    // A keyspace that grows takes slots from all shards that it had, one that shrinks from those that vanish.
    let sources = if from < to { 0..from } else { to..from };
    let is_source = record.shards_of(store).any(|(shard, _)| sources.contains(&shard.0));
    is_source.then_some(operation.fence)
}

/// Lifts fences that stand too long while no master leads, until `shutdown`.
pub async fn run(handle: StoreHandle, shutdown: CancellationToken) {
    let mut unfencing = Unfencing::new(handle);
    // Where it is stopped does not matter: a master can be stopped there too.
    shutdown.run_until_cancelled(unfencing.watch()).await;
}

struct Unfencing {
    handle: StoreHandle,
    seen: BTreeMap<KeyspaceId, Seen>,
    /// The highest term of which a holder has said that it was promised.
    highest: Term,
    /// Why the last attempt failed; each reason is logged once.
    trouble: String,
}

/// A fence that stands.
#[derive(Clone, Copy, Debug)]
struct Seen {
    fence: Epoch,
    /// When it is to be lifted if no master is heard.
    due: Instant,
}

impl Unfencing {
    fn new(handle: StoreHandle) -> Self {
        Self { handle, seen: BTreeMap::new(), highest: Term::NONE, trouble: String::new() }
    }

    async fn watch(&mut self) {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            for (keyspace, fence) in self.look(Instant::now()) {
                match self.decide(keyspace, fence).await {
                    Ok(record) => self.follow(record, fence).await,
                    Err(trouble) => self.note(trouble),
                }
                if let Some(seen) = self.seen.get_mut(&keyspace) {
                    seen.due = Instant::now() + pause();
                }
            }
        }
    }

    fn note(&mut self, trouble: String) {
        if trouble != self.trouble {
            warn!(store = %self.handle.id(), trouble, "a fence cannot be lifted without a master; trying again");
            self.trouble = trouble;
        }
    }

    /// The fences that are to be lifted now.
    fn look(&mut self, now: Instant) -> Vec<(KeyspaceId, Epoch)> {
        let Some(fenced) = self.handle.fenced() else { return Vec::new() };
        let fenced: BTreeMap<KeyspaceId, Epoch> = fenced.into_iter().collect();
        self.seen.retain(|keyspace, seen| fenced.get(keyspace) == Some(&seen.fence));
        for (keyspace, fence) in &fenced {
            self.seen.entry(*keyspace).or_insert_with(|| Seen { fence: *fence, due: now + FENCE_PATIENCE + pause() });
        }
        if self.handle.leader_silence() < FENCE_PATIENCE {
            return Vec::new();
        }
        let due = self.seen.iter().filter(|(_, seen)| seen.due <= now);
        due.map(|(keyspace, seen)| (*keyspace, seen.fence)).collect()
    }

    /// The version of the record that holders agree upon: without the fence if it stands.
    async fn decide(&mut self, keyspace: KeyspaceId, fence: Epoch) -> Result<KeyspaceRecord, String> {
        let mut proposer = self.proposer()?;
        proposer.campaign();
        for _ in 0..ROUNDS_MAX {
            let may_propose = proposer.leads();
            let troubles = self.ask(&mut proposer, keyspace).await;
            let Some(term) = proposer.term() else { return Err("another one proposes under a higher term".to_owned()) };
            let lacking = || format!("too few holders vote: {}", troubles.join(", "));
            if !may_propose {
                // A group of which it has heard only now is asked in the next round.
                if !proposer.leads() && !troubles.is_empty() {
                    return Err(lacking());
                }
                continue;
            }
            let is_held = proposer.chosen(GROUP).is_some();
            let Some(record) = proposer.chosen(keyspace).filter(|_| is_held).and_then(Entry::record).cloned() else {
                return Err(lacking());
            };
            let Some(lifted) = without_fence(&record, fence) else { return Ok(record) };
            warn!(
                store = %self.handle.id(), keyspace = record.name, term = term.number, epoch = %lifted.epoch,
                "slots are behind a fence and no master leads: proposing to lift it"
            );
            let proposed = proposer.propose(record.epoch, Entry::Keyspace(lifted));
            proposed.map_err(|error| error.to_string())?;
        }
        Err("the holders have not agreed in so many rounds".to_owned())
    }

    fn proposer(&self) -> Result<Proposer<Entry>, String> {
        let mut proposer = Proposer::of_cluster(fastrand::u64(..));
        let told = self.handle.peers().borrow().group.clone();
        if told.version > 0 {
            proposer.hear_group(Accepted { term: Term::NONE, record: Entry::Group(told) });
        }
        if let Some(accepted) = self.handle.accepted_group() {
            proposer.hear_group(accepted);
        }
        if proposer.heard_group().is_none() {
            return Err("no master has said yet who holds the records".to_owned());
        }
        proposer.hear_term(self.handle.promised_term().max(self.highest));
        Ok(proposer)
    }

    /// All stores that are known: which of them vote, the proposer knows.
    fn holders(&self) -> BTreeSet<StoreId> {
        let peers = self.handle.peers().borrow().clone();
        peers.addresses.keys().copied().chain([self.handle.id()]).collect()
    }

    /// Asks all holders for what they have not answered, until enough of them have. Returns why others have not.
    async fn ask(&mut self, proposer: &mut Proposer<Entry>, keyspace: KeyspaceId) -> Vec<String> {
        let was_leading = proposer.leads();
        let concerns = |request: &Request<Entry>| match request {
            Request::Prepare { .. } => true,
            // Of other keyspaces nothing is said under this term: the next one adopts them.
            Request::Accept(accepted) => [GROUP, keyspace].contains(&accepted.record.keyspace()),
        };
        let mut asked: FuturesUnordered<Asked> = FuturesUnordered::new();
        for store in self.holders() {
            let requests: Vec<_> = proposer.requests(store).into_iter().filter(concerns).collect();
            if !requests.is_empty() {
                asked.push(self.ask_one(store, requests));
            }
        }
        let mut troubles = Vec::new();
        while let Some((store, answers)) = asked.next().await {
            match answers {
                Ok(answers) => {
                    for answer in answers {
                        if let Err(Refusal::LowerTerm { promised, .. }) = &answer {
                            self.highest = self.highest.max(*promised);
                        }
                        // What it changes is looked at when all that are needed have answered.
                        let _: Progress = proposer.hear(store, answer);
                    }
                }
                Err(trouble) => troubles.push(format!("store {store} {trouble}")),
            }
            let is_chosen = proposer.chosen(GROUP).is_some() && proposer.chosen(keyspace).is_some();
            let is_done = if was_leading { is_chosen } else { proposer.leads() };
            if is_done || proposer.term().is_none() {
                break;
            }
        }
        troubles
    }

    fn ask_one(&self, store: StoreId, requests: Vec<Request<Entry>>) -> Asked {
        if store == self.handle.id() {
            let handle = self.handle.clone();
            return Box::pin(async move {
                let voting = tokio::task::spawn_blocking(move || {
                    let votes = requests.into_iter().map(|request| handle.vote(request));
                    votes.collect::<Result<Vec<_>, _>>()
                });
                let votes = voting.await.map_err(|panic| format!("panicked: {panic}"));
                (store, votes.and_then(|votes| votes.map_err(|error| format!("cannot keep a vote: {error}"))))
            });
        }
        let said = self.say(store, message(requests));
        Box::pin(async move {
            let answers = said.await.and_then(|response| {
                let answers = response.answers.into_iter().map(entry::answer).collect::<Result<Vec<_>, _>>();
                Ok(answers.map_err(|error| error.to_string())?.into_iter().flatten().collect())
            });
            (store, answers)
        })
    }

    /// Sends another store one message.
    fn say(&self, store: StoreId, kind: Kind) -> impl Future<Output = Result<pb::VoteResponse, String>> + Send + use<> {
        let address = self.handle.peers().borrow().addresses.get(&store).cloned().unwrap_or_default();
        let cluster = self.handle.cluster();
        async move { rpc::say(&address, cluster, kind).await }
    }

    /// Follows what was chosen, and tells the others.
    async fn follow(&mut self, record: KeyspaceRecord, fence: Epoch) {
        let (keyspace, epoch) = (record.name.clone(), record.epoch);
        let phase = record.operation.as_ref().map(|operation| operation.phase);
        let store = self.handle.id();
        let others = self.holders().into_iter().filter(|other| *other != store);
        let told: Vec<_> = others.map(|other| self.say(other, Kind::Chosen((&record).into()))).collect();
        let handle = self.handle.clone();
        match tokio::task::spawn_blocking(move || handle.put_record(record)).await {
            Ok(Ok(())) => {
                self.trouble.clear();
                counter!("vasto_store_fences_ended_total").increment(1);
                info!(%store, keyspace, %fence, %epoch, ?phase, "a fence has ended without a master");
            }
            Ok(Err(error)) => self.note(error.to_string()),
            Err(panic) => self.note(format!("following a record panicked: {panic}")),
        }
        // Those that do not hear it lift the fence by themselves, or hear it from the next master.
        futures_util::future::join_all(told).await;
    }
}

/// What a holder answers, or why it does not.
type Asked = Pin<Box<dyn Future<Output = (StoreId, Result<Vec<Result<Answer<Entry>, Refusal>>, String>)> + Send>>;

fn pause() -> Duration {
    PAUSE_MAX.mul_f64(fastrand::f64())
}

/// The version without this fence, if it stands; not without a later one, which somebody may still be waiting for.
fn without_fence(record: &KeyspaceRecord, fence: Epoch) -> Option<KeyspaceRecord> {
    record.active_operation().filter(|operation| operation.fence == fence)?;
    record.unfence().ok()
}

/// Requests of one term: one for a promise, or several for votes.
fn message(requests: Vec<Request<Entry>>) -> Kind {
    let mut votes = pb::Accept::default();
    for request in requests {
        match request {
            Request::Prepare { term } => {
                return Kind::Prepare(pb::Prepare { term: Some(term.into()), leader: String::new() });
            }
            Request::Accept(accepted) => {
                votes.term = Some(accepted.term.into());
                votes.entries.push((&accepted.record).into());
            }
        }
    }
    Kind::Accept(votes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Store};
    use std::path::Path;
    use std::task::{Context, Poll, Waker};
    use std::thread::JoinHandle;
    use tempfile::TempDir;
    use vasto_proto::batch::{Answers, FLAG_AFTER_REFUSAL, OperationHead, Outcome, write_operation};
    use vasto_proto::command::table::StoreCommand;
    use vasto_proto::id::{ShardId, ShardKey};
    use vasto_proto::slot::slot_of;
    use vasto_proto::topology::{HolderGroup, Layout, Peers};

    const KEYSPACE: KeyspaceId = KeyspaceId(0);

    fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() {
            assert!(Instant::now() < deadline, "in 60 s not yet: {what}");
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    struct Running {
        handle: StoreHandle,
        address: String,
        shutdown: CancellationToken,
        thread: JoinHandle<()>,
    }

    impl Running {
        fn start(data: &Path) -> Self {
            let config = Config { data: data.to_owned(), workers: 1, lane_threads: 1, ..Config::default() };
            let store = Store::open(config).unwrap();
            let (handle, shutdown) = (store.handle(), CancellationToken::new());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let bound = runtime.block_on(store.bind()).unwrap();
            let address = bound.address().to_string();
            let stop = shutdown.clone();
            let thread = std::thread::spawn(move || runtime.block_on(bound.run(stop)).unwrap());
            Self { handle, address, shutdown, thread }
        }

        fn stop(self) {
            self.shutdown.cancel();
            self.thread.join().unwrap();
        }

        fn record(&self) -> KeyspaceRecord {
            self.handle.records().remove(0)
        }

        fn phase(&self) -> Option<Phase> {
            self.record().operation.map(|operation| operation.phase)
        }

        /// Writes a key of a slot that the change takes from the shard, or of one that stays.
        fn set(&self, shard: u16, leaves: bool) -> Outcome {
            let layout = Layout::of(&fenced(&[self.handle.id()]));
            let shard = ShardId(shard);
            let (leaving, served) = (layout.leaving(shard), layout.served(shard));
            let is_meant = |slot| if leaves { leaving.contains(slot) } else { served.contains(slot) };
            let key = (0..).map(|number| format!("k{number}")).find(|key| is_meant(slot_of(key.as_bytes()))).unwrap();
            let (mut session, mut late) = self.handle.open_session();
            let (mut batch, mut answers) = (Vec::new(), Vec::new());
            let target = ShardKey { keyspace: KEYSPACE, shard };
            let (epoch, command) = (Epoch(1), StoreCommand::Set.code());
            let head = OperationHead { id: 0, connection: 0, target, epoch, command, flags: FLAG_AFTER_REFUSAL };
            write_operation(&mut batch, &head, [key.as_bytes(), b"value"]);
            session.execute(batch.into(), &mut answers);
            eventually("it is answered", || {
                if let (true, Poll::Ready(Some(more))) =
                    (answers.is_empty(), late.poll_next(&mut Context::from_waker(Waker::noop())))
                {
                    answers.extend_from_slice(&more);
                }
                !answers.is_empty()
            });
            Answers::new(&answers).next().unwrap().unwrap().outcome
        }
    }

    /// Three shards, which are about to become four: one on each of three stores, or all on one.
    fn fenced(stores: &[StoreId]) -> KeyspaceRecord {
        let primaries = [stores[0], stores[1 % stores.len()], stores[2 % stores.len()]];
        let record = KeyspaceRecord::new(KEYSPACE, "0", &primaries).unwrap();
        record.begin_resize(4, vec![stores[0]]).unwrap().fence().unwrap()
    }

    fn folders() -> [TempDir; 3] {
        std::array::from_fn(|_| tempfile::tempdir().unwrap())
    }

    /// They know each other, and a master that is gone has set a fence.
    fn introduce(stores: &[&Running]) {
        let addresses: BTreeMap<_, _> = stores.iter().map(|store| (store.handle.id(), store.address.clone())).collect();
        let group = HolderGroup { version: 1, members: addresses.keys().copied().collect() };
        let ids: Vec<StoreId> = stores.iter().map(|store| store.handle.id()).collect();
        for store in stores {
            store.handle.set_peers(Peers { addresses: addresses.clone(), group: group.clone() }).unwrap();
            store.handle.put_record(fenced(&ids)).unwrap();
        }
    }

    fn accept(store: &Running, term: Term, record: &KeyspaceRecord) {
        let record = Entry::Keyspace(record.clone());
        store.handle.vote(Request::Accept(Accepted { term, record })).unwrap().unwrap();
    }

    /// What a majority of the stores has accepted under the highest term.
    fn accepted(stores: &[Running]) -> KeyspaceRecord {
        let term = Term { number: 1 << 32, life: 1 };
        let mut newest: Option<Accepted<Entry>> = None;
        for store in &stores[..2] {
            let answer = store.handle.vote(Request::Prepare { term }).unwrap().unwrap();
            let Answer::Promised { accepted, .. } = answer else { panic!("{answer:?}") };
            for it in accepted.into_iter().filter(|it| it.record.keyspace() == KEYSPACE) {
                if newest.as_ref().is_none_or(|known| known.position() < it.position()) {
                    newest = Some(it);
                }
            }
        }
        newest.unwrap().record.record().unwrap().clone()
    }

    fn agree(stores: &[Running]) -> KeyspaceRecord {
        eventually("all follow the same record without a fence", || {
            let first = stores[0].record();
            let is_open = |store: &Running| store.phase() != Some(Phase::Fence) && store.record() == first;
            stores.iter().all(is_open)
        });
        stores[0].record()
    }

    #[test]
    fn slots_are_served_again_if_no_master_comes() {
        let folders = folders();
        let stores = folders.each_ref().map(|folder| Running::start(folder.path()));
        introduce(&stores.each_ref());
        for (shard, store) in (0..).zip(&stores) {
            assert_eq!(store.set(shard, false), Outcome::Reply);
            assert_ne!(store.set(shard, true), Outcome::Reply, "it is behind the fence");
        }
        // As long as a master is heard the fence is his.
        for _ in 0..50 {
            stores.iter().for_each(|store| store.handle.note_leader());
            std::thread::park_timeout(Duration::from_millis(100));
            assert!(stores.iter().all(|store| store.phase() == Some(Phase::Fence)));
        }
        let lifted = agree(&stores);
        assert_eq!(
            (lifted.epoch, &lifted),
            (Epoch(4), &fenced(&stores.each_ref().map(|it| it.handle.id())).unfence().unwrap())
        );
        for (shard, store) in (0..).zip(&stores) {
            assert_eq!(store.set(shard, true), Outcome::Reply);
            assert!(store.handle.promised_term().number > 0);
        }
        assert_eq!(accepted(&stores), lifted, "the next master finds it");
        stores.into_iter().for_each(Running::stop);
    }

    #[test]
    fn without_a_majority_the_fence_stands() {
        let folders = folders();
        let mut stores = Vec::from(folders.each_ref().map(|folder| Running::start(folder.path())));
        introduce(&stores.iter().collect::<Vec<_>>());
        let (third, second) = (stores.pop().unwrap(), stores.pop().unwrap());
        third.stop();
        second.stop();
        let patience = Instant::now() + FENCE_PATIENCE + 3 * PAUSE_MAX;
        eventually("it would have been lifted", || Instant::now() > patience);
        assert_eq!(stores[0].phase(), Some(Phase::Fence));
        assert_ne!(stores[0].set(0, true), Outcome::Reply);
        // One of them is back, at another address.
        let second = Running::start(folders[1].path());
        let mut peers = (**stores[0].handle.peers().borrow()).clone();
        peers.addresses.insert(second.handle.id(), second.address.clone());
        stores[0].handle.set_peers(peers).unwrap();
        eventually("the fence is lifted", || {
            stores[0].phase() == Some(Phase::Copy) && second.phase() == Some(Phase::Copy)
        });
        assert_eq!(stores[0].set(0, true), Outcome::Reply);
        second.stop();
        stores.into_iter().for_each(Running::stop);
    }

    #[test]
    fn a_commit_that_was_chosen_is_completed() {
        let folders = folders();
        let stores = folders.each_ref().map(|folder| Running::start(folder.path()));
        introduce(&stores.each_ref());
        let committed = stores[0].record().commit().unwrap();
        // Two of three have accepted it, and nobody has heard that.
        let term = Term { number: 5, life: 1 };
        stores[1..].iter().for_each(|store| accept(store, term, &committed));
        assert_eq!(agree(&stores), committed);
        assert!(stores.iter().all(|store| store.handle.promised_term() > term));
        // Not served by the source any more.
        assert_ne!(stores[1].set(1, true), Outcome::Reply);
        stores.into_iter().for_each(Running::stop);
    }

    #[test]
    fn a_commit_that_one_has_accepted_is_completed_or_overruled_by_all() {
        let folders = folders();
        let stores = folders.each_ref().map(|folder| Running::start(folder.path()));
        introduce(&stores.each_ref());
        let fenced = stores[0].record();
        accept(&stores[2], Term { number: 5, life: 1 }, &fenced.commit().unwrap());
        let decided = agree(&stores);
        assert!([fenced.commit().unwrap(), fenced.unfence().unwrap()].contains(&decided), "{decided:?}");
        assert_eq!(accepted(&stores), decided);
        stores.into_iter().for_each(Running::stop);
    }

    #[test]
    fn all_that_lift_a_fence_at_once_agree() {
        let folders = folders();
        let stores = folders.each_ref().map(|folder| Running::start(folder.path()));
        introduce(&stores.each_ref());
        let fence = Epoch(3);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let attempts = stores.each_ref().map(|store| async {
            let mut unfencing = Unfencing::new(store.handle.clone());
            loop {
                match unfencing.decide(KEYSPACE, fence).await {
                    Ok(record) => return record,
                    Err(_) => tokio::time::sleep(pause()).await,
                }
            }
        });
        let decided = runtime.block_on(futures_util::future::join_all(attempts));
        let lifted = fenced(&stores.each_ref().map(|it| it.handle.id())).unfence().unwrap();
        assert_eq!(decided, vec![lifted.clone(); 3]);
        assert_eq!(agree(&stores), lifted);
        stores.into_iter().for_each(Running::stop);
    }

    #[test]
    fn only_sources_of_a_fence_are_concerned() {
        let stores = [1, 2, 3].map(StoreId);
        let grows = fenced(&stores);
        assert_eq!(stores.map(|store| fence_at(&grows, store)), [Some(Epoch(3)); 3]);
        assert_eq!(fence_at(&grows, StoreId(4)), None);
        let shrinks = KeyspaceRecord::new(KEYSPACE, "0", &stores).unwrap().begin_resize(1, Vec::new()).unwrap();
        assert_eq!(stores.map(|store| fence_at(&shrinks, store)), [None; 3]);
        let shrinks = shrinks.fence().unwrap();
        assert_eq!(stores.map(|store| fence_at(&shrinks, store)), [None, Some(Epoch(3)), Some(Epoch(3))]);
        assert_eq!(without_fence(&shrinks, Epoch(2)), None);
        let again = shrinks.unfence().unwrap().fence().unwrap();
        assert_eq!((without_fence(&again, Epoch(3)), without_fence(&again, Epoch(5))), (None, again.unfence().ok()));
        assert_eq!(without_fence(&again.commit().unwrap(), Epoch(5)), None);
    }
}
