//! Stores that copy to each other over real connections, driven by records without a master.
#![expect(clippy::print_stdout, reason = "seeds and figures are for people")]

mod comparisons;

use super::comparison::{Comparison, Haste, compare};
use super::state::Figures;
use crate::engine::Tier;
use crate::shard::Shard;
use crate::shard::executor::now_ns;
use crate::shard::map::Entry;
use crate::shard::stripes::{Patience, StripeGuard, StripeSet};
use crate::shard::tests::copy_folder;
use crate::{Config, LateAnswers, Session, Store, StoreHandle};
use bytes::Bytes;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use vasto_proto::batch::{Answers, FLAG_AFTER_REFUSAL, FLAG_FROM_REPLICA, OperationHead, Outcome, write_operation};
use vasto_proto::command::Reply;
use vasto_proto::command::table::{Command, find};
use vasto_proto::id::{ClusterId, Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::row::Header;
use vasto_proto::topology::{
    HolderGroup, KeyspaceRecord, NOBODY, Peers, Position, Role, Settings, ShardRecord, ShardStatus,
};

const SHARD: ShardKey = ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) };
/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);

fn rest() {
    std::thread::park_timeout(Duration::from_millis(5));
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} in {PATIENCE:?}");
        rest();
    }
}

/// A store that serves.
pub struct Running {
    pub handle: StoreHandle,
    pub address: String,
    shutdown: CancellationToken,
    thread: JoinHandle<()>,
}

impl Running {
    pub fn start(data: &Path) -> Self {
        Self::start_with(data, |_| ())
    }

    fn start_with(data: &Path, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config { data: data.to_owned(), workers: 1, lane_threads: 2, ..Config::default() };
        change(&mut config);
        let store = Store::open(config).unwrap();
        let handle = store.handle();
        handle.set_cluster(ClusterId(5)).unwrap();
        let shutdown = CancellationToken::new();
        let (sender, address) = std::sync::mpsc::channel();
        let token = shutdown.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let bound = store.bind().await.unwrap();
                sender.send(bound.address().to_string()).unwrap();
                bound.run(token).await.unwrap();
            });
        });
        Self { handle, address: address.recv().unwrap(), shutdown, thread }
    }

    pub fn stop(self) {
        self.shutdown.cancel();
        self.thread.join().unwrap();
    }
}

/// Stores with one keyspace of one shard.
struct Cluster {
    _folder: tempfile::TempDir,
    data: Vec<PathBuf>,
    ids: Vec<StoreId>,
    running: Vec<Option<Running>>,
    record: KeyspaceRecord,
    group: HolderGroup,
    copied: u32,
}

impl Cluster {
    /// The first leads, the others replicate.
    fn new(count: usize, settings: Settings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<PathBuf> = (0..count).map(|number| folder.path().join(number.to_string())).collect();
        let running: Vec<_> = data.iter().map(|data| Some(Running::start(data))).collect();
        let ids: Vec<StoreId> = running.iter().flatten().map(|running| running.handle.id()).collect();
        let record = KeyspaceRecord { settings, ..KeyspaceRecord::new(KeyspaceId(0), "0", &ids[..1]).unwrap() };
        let group = HolderGroup::default();
        let mut cluster = Self { _folder: folder, data, ids, running, record, group, copied: 0 };
        cluster.record.shards[0].replicas = cluster.ids[1..].to_vec();
        cluster.record.copies = count as u32;
        cluster.spread();
        cluster
    }

    fn handle(&self, number: usize) -> &StoreHandle {
        &self.running[number].as_ref().unwrap().handle
    }

    fn shard(&self, number: usize) -> Option<Arc<Shard>> {
        match self.running[number].as_ref()?.handle.core().shards.current().entry(SHARD) {
            Some(Entry::Serving(shard)) => Some(Arc::clone(shard)),
            _ => None,
        }
    }

    /// All that run hear where the others are, and the record.
    fn spread(&self) {
        let addresses = self.ids.iter().zip(&self.running);
        let addresses = addresses.filter_map(|(id, running)| Some((*id, running.as_ref()?.address.clone()))).collect();
        let peers = Peers { addresses, group: self.group.clone() };
        for running in self.running.iter().flatten() {
            running.handle.set_peers(peers.clone()).unwrap();
            running.handle.put_record(self.record.clone()).unwrap();
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut ShardRecord, &[StoreId])) {
        change(&mut self.record.shards[0], &self.ids);
        self.record.epoch.0 += 1;
        self.spread();
    }

    /// Somebody else leads, or nobody; all others replicate.
    fn lead(&mut self, leader: Option<usize>) {
        let leader = leader.map_or(NOBODY, |leader| self.ids[leader]);
        self.change(|shard, ids| {
            shard.epoch.0 += 1;
            shard.primary = leader;
            shard.replicas = ids.iter().copied().filter(|id| *id != leader).collect();
        });
    }

    fn epoch(&self) -> Epoch {
        self.record.shards[0].epoch
    }

    fn stop(&mut self, number: usize) {
        self.running[number].take().unwrap().stop();
    }

    fn start(&mut self, number: usize) {
        self.running[number] = Some(Running::start(&self.data[number]));
        self.spread();
    }

    /// What a kill would leave of a store's data at this moment.
    fn copy_data(&mut self, number: usize) -> PathBuf {
        self.copied += 1;
        let copy = self.data[number].with_extension(self.copied.to_string());
        copy_folder(&self.data[number], &copy);
        copy
    }

    /// As kill -9.
    fn kill(&mut self, number: usize) {
        let copy = self.copy_data(number);
        self.stop(number);
        self.data[number] = copy;
    }

    fn status(&self, number: usize) -> Option<ShardStatus> {
        self.handle(number).shard_statuses().pop()
    }

    fn position(&self, number: usize) -> Option<Position> {
        self.status(number)?.position
    }

    fn figures(&self, number: usize) -> Figures {
        self.handle(number).replication_figures(SHARD).unwrap()
    }

    /// Compares the copies with the leader's.
    fn compare(&self, leader: usize) -> Result<Comparison, String> {
        let shard = self.shard(leader).ok_or("it is not open")?;
        compare(self.handle(leader).core(), &shard, Haste::AtOnce)
    }

    fn client(&self, number: usize) -> Client {
        let (session, late) = self.handle(number).open_session();
        Client { session, late, next_id: 0, epoch: self.epoch(), flags: 0 }
    }

    /// Says how the copies differ.
    fn tell(&self, leader: usize) {
        let led = self.shard(leader).map(|shard| rows(&shard)).unwrap_or_default();
        for number in (0..self.running.len()).filter(|number| self.running[*number].is_some()) {
            let own = self.shard(number).map(|shard| rows(&shard)).unwrap_or_default();
            let differs = |row: &&(Vec<u8>, Vec<u8>)| !led.contains(row);
            let differing: Vec<_> =
                own.iter().filter(differs).map(|(key, _)| String::from_utf8_lossy(&key[2..]).into_owned()).collect();
            println!("{number} leads: {}, {} rows of {}: {differing:?}", number == leader, own.len(), led.len());
            let lacks = |row: &&(Vec<u8>, Vec<u8>)| !own.contains(row);
            println!(
                "    lacks {:?}",
                led.iter().filter(lacks).map(|(_, row)| Header::decode(row)).collect::<Vec<_>>()
            );
            println!("    {:?}", self.status(number));
        }
    }

    /// Waits until all that run have the same rows as the leader, and says which.
    fn equal(&self, leader: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let running: Vec<usize> = (0..self.running.len()).filter(|number| self.running[*number].is_some()).collect();
        let mut expected = Vec::new();
        let begun = Instant::now();
        let mut is_told = false;
        eventually("all copies are equal", || {
            if begun.elapsed() > PATIENCE - Duration::from_secs(1) && !std::mem::replace(&mut is_told, true) {
                self.tell(leader);
            }
            let Some(rows) = self.shard(leader).map(|shard| rows(&shard)) else { return false };
            expected = rows;
            let is_equal = |shard: Arc<Shard>| {
                shard.flush_ns() == self.shard(leader).unwrap().flush_ns() && self::rows(&shard) == expected
            };
            running.iter().all(|number| self.shard(*number).is_some_and(is_equal))
                && self.status(leader).is_some_and(|status| {
                    status.followers.iter().filter(|follower| follower.connected).count() == running.len() - 1
                })
        });
        // Their digests are equal as well.
        eventually("all copies are compared", || {
            let compared = self.compare(leader);
            assert!(compared.as_ref().is_ok_and(|compared| compared.slots_differing == 0), "{compared:?}");
            compared.is_ok_and(|compared| compared.copies == running.len() - 1)
        });
        expected
    }
}

/// All rows but those that a flush killed, which compactions drop at different times.
fn rows(shard: &Shard) -> Vec<(Vec<u8>, Vec<u8>)> {
    let flush_ns = shard.flush_ns();
    let mut walk = shard.database.walk();
    walk.seek(&[]);
    let mut rows = Vec::new();
    while let Some((key, row)) = walk.key().zip(walk.value()) {
        if Header::decode(row).unwrap().0.stamp.ns > flush_ns {
            rows.push((key.to_vec(), row.to_vec()));
        }
        walk.next();
    }
    walk.status().unwrap();
    rows
}

struct Client {
    session: Session,
    late: LateAnswers,
    next_id: u32,
    epoch: Epoch,
    flags: u32,
}

impl Client {
    fn send(&mut self, words: &[&str]) -> Option<(Outcome, String)> {
        let Some(Command::Store(command)) = find(words[0].as_bytes()) else { panic!("{words:?}") };
        self.next_id += 1;
        let head = OperationHead {
            id: self.next_id,
            connection: 1,
            target: SHARD,
            epoch: self.epoch,
            command: command.code(),
            flags: self.flags | FLAG_AFTER_REFUSAL,
        };
        let mut batch = Vec::new();
        write_operation(&mut batch, &head, words[1..].iter().map(|word| word.as_bytes()));
        let mut answers = Vec::new();
        self.session.execute(Bytes::from(batch), &mut answers);
        self.read(&answers)
    }

    fn read(&self, answers: &[u8]) -> Option<(Outcome, String)> {
        let answer = Answers::new(answers).map(|answer| answer.unwrap()).find(|answer| answer.id == self.next_id)?;
        let text = match answer.outcome {
            Outcome::Reply => match Reply::take(&mut { answer.body }).unwrap() {
                Reply::Ok => "OK".into(),
                Reply::Integer(value) => value.to_string(),
                Reply::Null => "null".into(),
                Reply::Bulk(text) => String::from_utf8_lossy(text).into_owned(),
                other => format!("{other:?}"),
            },
            _ => String::from_utf8_lossy(answer.body).into_owned(),
        };
        Some((answer.outcome, text))
    }

    fn poll(&mut self) -> Option<(Outcome, String)> {
        match self.late.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answers) => self.read(&answers.unwrap()),
            Poll::Pending => None,
        }
    }

    fn ask(&mut self, words: &[&str]) -> (Outcome, String) {
        let mut answer = self.send(words);
        eventually("there is an answer", || {
            answer = answer.take().or_else(|| self.poll());
            answer.is_some()
        });
        answer.unwrap()
    }

    fn call(&mut self, words: &[&str]) -> String {
        let (outcome, text) = self.ask(words);
        assert_eq!(outcome, Outcome::Reply, "{words:?}: {text}");
        text
    }

    /// As [`Client::call`], again as long as nothing was executed.
    fn insist(&mut self, words: &[&str]) -> String {
        let mut reply = String::new();
        eventually("a refusal ends", || {
            let (outcome, text) = self.ask(words);
            reply = text;
            match outcome {
                Outcome::Reply => true,
                Outcome::NotHere | Outcome::WrongEpoch | Outcome::NotServing | Outcome::NoReplicas => false,
                Outcome::Unknown | Outcome::NeedsLargePermit => panic!("{words:?}: {reply}"),
            }
        });
        reply
    }
}

/// There are no holders here, and so no leases.
fn replicated(min_replicas: u32) -> Settings {
    Settings { min_replicas: Some(min_replicas), strict: Some(false), ..Settings::default() }
}

#[test]
fn a_learner_gets_a_copy_then_the_log_and_is_read_with_permission_only() {
    let mut cluster = Cluster::new(2, replicated(0));
    // Back to one copy, with rows from before there is history.
    cluster.change(|shard, _| shard.replicas.clear());
    assert!(cluster.shard(1).is_none());
    let mut client = cluster.client(0);
    for number in 0..500 {
        client.call(&["set", &format!("key{number}"), "before"]);
    }
    cluster.change(|shard, ids| shard.learners = vec![ids[1]]);
    eventually("the learner has all", || {
        cluster.status(0).is_some_and(|status| status.followers.iter().any(|follower| follower.in_sync))
    });
    cluster.change(|shard, _| shard.replicas = std::mem::take(&mut shard.learners));
    assert_eq!(cluster.epoch(), Epoch(1), "requests under way are not refused");
    let rows = cluster.equal(0);
    assert_eq!(rows.len(), 500);

    let mut reader = cluster.client(1);
    let (outcome, text) = reader.ask(&["get", "key1"]);
    assert_eq!((outcome, text.as_str()), (Outcome::NotServing, "shard 0/0 is a replica here"));
    reader.flags = FLAG_FROM_REPLICA;
    assert_eq!(reader.call(&["get", "key1"]), "before");
    assert_eq!(reader.ask(&["set", "key1", "never"]).0, Outcome::NotServing);
    // It is in the row cache now, which must not keep the old value.
    client.call(&["set", "key1", "after"]);
    eventually("the replica shows the new value", || reader.call(&["get", "key1"]) == "after");
    client.call(&["flushdb"]);
    eventually("the replica shows the flush", || reader.call(&["get", "key1"]) == "null");
    client.call(&["set", "key1", "again"]);
    cluster.equal(0);
    let status = cluster.status(1).unwrap();
    assert_eq!((status.role, status.epoch, status.serves), (Role::Replica, Epoch(1), false));
    assert!(status.position <= cluster.position(0) && status.position.is_some());
    // A copy that is needed no more leaves the disk.
    let folder = cluster.data[1].join("shards/0-0");
    assert!(folder.exists());
    cluster.change(|shard, _| shard.replicas.clear());
    eventually("the folder is deleted", || !folder.exists());
    client.call(&["set", "key1", "alone"]);
}

#[test]
fn a_follower_goes_on_where_it_was_and_is_copied_anew_when_the_log_is_gone() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "first", "1"]);
    cluster.equal(0);
    let copies = cluster.figures(0).full_copies;
    assert_eq!(copies, 1, "even an empty one comes as a copy");

    cluster.kill(1);
    client.call(&["set", "second", "2"]);
    client.call(&["del", "first"]);
    cluster.start(1);
    cluster.equal(0);
    assert_eq!(cluster.figures(0).full_copies, copies);

    // More than is kept in memory: the files have it.
    cluster.kill(1);
    let value = "v".repeat(100 << 10);
    for number in 0..300 {
        client.call(&["set", &format!("large{number}"), &value]);
    }
    cluster.shard(0).unwrap().database.flush().unwrap();
    cluster.start(1);
    cluster.equal(0);
    assert_eq!(cluster.figures(0).full_copies, copies);

    // The files are gone too. What the follower has stays until the copy is whole.
    cluster.kill(1);
    for number in 0..300 {
        client.call(&["set", &format!("large{number}"), &format!("{value}2")]);
    }
    let leading = cluster.shard(0).unwrap();
    leading.database.flush().unwrap();
    leading.database.tail().ring.lock().clear();
    leading.database.shorten_log(0).unwrap();
    drop(leading);
    cluster.start(1);
    cluster.equal(0);
    assert_eq!(cluster.figures(0).full_copies, copies + 1);
    assert!(!cluster.data[1].join("shards/0-0.replaced").exists());
}

#[test]
fn a_leader_that_restarts_is_followed_on_and_a_copy_that_breaks_off_is_made_again() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "first", "1"]);
    cluster.equal(0);
    for _ in 0..3 {
        drop(client);
        cluster.kill(0);
        cluster.start(0);
        client = cluster.client(0);
        client.insist(&["incr", "first"]);
        cluster.equal(0);
        // Opened once more, and nothing was copied for that.
        assert_eq!(cluster.figures(0).full_copies, 0);
    }
    assert_eq!(cluster.position(0).unwrap().era.opened, 4);

    let value = "v".repeat(64 << 10);
    for number in 0..1500 {
        client.call(&["set", &format!("large{number}"), &value]);
    }
    cluster.equal(0);
    cluster.stop(1);
    // Its database is of another shard, as it were: no position.
    fs::remove_dir_all(cluster.data[1].join("shards/0-0")).unwrap();
    fs::create_dir(cluster.data[1].join("shards/0-0")).unwrap();
    cluster.start(1);
    let coming = cluster.data[1].join("shards/0-0.copying");
    eventually("the copy has begun", || coming.exists() || cluster.figures(0).full_copies > 0);
    cluster.stop(1);
    cluster.start(1);
    cluster.equal(0);
    assert!(!coming.exists());
    drop(client);
    cluster.stop(0);
    let left: Vec<_> =
        fs::read_dir(cluster.data[0].join("shards")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["0-0"], "no checkpoint is left behind");
}

#[test]
fn an_old_primary_hands_over_what_only_it_has_and_follows() {
    let mut cluster = Cluster::new(3, replicated(0));
    let mut client = cluster.client(0);
    for number in 0..100 {
        client.insist(&["set", &format!("key{number}"), "common"]);
    }
    cluster.equal(0);
    // What comes now reaches nobody.
    cluster.kill(1);
    cluster.kill(2);
    client.call(&["set", "key1", "lost and found"]);
    client.call(&["set", "key2", "older"]);
    client.call(&["set", "key3", "older"]);
    client.call(&["del", "key4"]);
    drop(client);
    cluster.kill(0);
    cluster.start(1);
    cluster.start(2);
    // Nobody leads, and both say so.
    cluster.lead(None);
    let status = cluster.status(2).unwrap();
    assert_eq!((status.epoch, status.role), (Epoch(2), Role::Replica));
    assert_eq!(cluster.client(1).ask(&["get", "key1"]).0, Outcome::NotServing);
    let chosen = if cluster.position(1) >= cluster.position(2) { 1 } else { 2 };
    cluster.lead(Some(chosen));
    let mut client = cluster.client(chosen);
    assert_eq!(client.insist(&["get", "key1"]), "common");
    client.call(&["set", "key2", "newer"]);
    client.call(&["del", "key3"]);
    client.call(&["set", "new", "1"]);
    cluster.equal(chosen);
    assert_eq!(cluster.figures(chosen).full_copies, 0, "the other replica went on in the log");
    let mut stale = cluster.client(chosen);
    stale.epoch = Epoch(1);
    assert_eq!(stale.ask(&["get", "key1"]).0, Outcome::WrongEpoch);

    cluster.start(0);
    eventually("what it had is merged", || client.call(&["get", "key1"]) == "lost and found");
    cluster.equal(chosen);
    for (key, value) in [("key2", "newer"), ("key3", "null"), ("key4", "null"), ("key5", "common"), ("new", "1")] {
        assert_eq!(client.call(&["get", key]), value, "{key}");
    }
    let figures = cluster.figures(chosen);
    assert_eq!((figures.full_copies, figures.handed_over_rows), (1, 2), "{figures:?}");
    // It can lead again, and what comes then wins.
    cluster.lead(None);
    cluster.lead(Some(0));
    let mut client = cluster.client(0);
    assert_eq!(client.insist(&["get", "key1"]), "lost and found");
    client.call(&["set", "key1", "last"]);
    let rows = cluster.equal(0);
    assert_eq!(rows.len(), 101);
    assert_eq!(client.call(&["get", "key1"]), "last");
}

const SECOND_NS: u64 = 1_000_000_000;

#[test]
fn stamps_of_a_fast_clock_bind_whoever_leads_next() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "key", "common"]);
    cluster.equal(0);
    let fast = cluster.shard(1).unwrap();
    // The replica's clock is fast, and it looks after its bound as every shard that is written to.
    let ahead_ns = now_ns() + 120 * SECOND_NS;
    fast.stamps.raise_ahead(ahead_ns, &fast.database).unwrap();
    cluster.lead(None);
    cluster.lead(Some(1));
    let mut client = cluster.client(1);
    client.insist(&["set", "key", "2"]);
    // Below its bound, as a draw by that clock.
    fast.stamps.rise_above(ahead_ns, &fast.database).unwrap();
    client.call(&["set", "other", "older"]);
    cluster.equal(1);
    cluster.kill(0);
    client.call(&["set", "key", "older"]);
    drop((client, fast));
    cluster.kill(1);
    cluster.start(0);
    cluster.lead(None);
    cluster.lead(Some(0));
    let mut client = cluster.client(0);
    for key in ["key", "other"] {
        client.insist(&["set", key, "newer"]);
    }
    cluster.start(1);
    let rows = cluster.equal(0);
    for key in ["key", "other"] {
        assert_eq!(client.call(&["get", key]), "newer", "{key}");
    }
    for (key, row) in rows {
        assert!(Header::decode(&row).unwrap().0.stamp.ns > ahead_ns, "{key:?} is below what was written before");
    }
}

#[test]
fn what_an_old_primary_wrote_by_a_fast_clock_loses_to_what_was_written_since() {
    // With leases nothing that the old one wrote came after the new one had begun. The third store only grants.
    let mut cluster = Cluster::new(3, Settings { min_replicas: Some(0), strict: Some(true), ..Settings::default() });
    cluster.group = HolderGroup { version: 1, members: std::iter::once(cluster.ids[2]).collect() };
    let name_leader = |cluster: &mut Cluster, leader: Option<usize>| {
        cluster.change(|shard, ids| {
            shard.epoch.0 += 1;
            shard.primary = leader.map_or(NOBODY, |leader| ids[leader]);
            shard.replicas = ids[..2].iter().copied().filter(|id| *id != shard.primary).collect();
        });
    };
    name_leader(&mut cluster, Some(0));
    let equal = |cluster: &Cluster, leader: usize| {
        eventually("both copies are equal", || match (cluster.shard(leader), cluster.shard(1 - leader)) {
            (Some(one), Some(other)) => one.flush_ns() == other.flush_ns() && rows(&one) == rows(&other),
            _ => false,
        });
    };
    let mut client = cluster.client(0);
    for key in ["overwritten", "deleted", "kept"] {
        client.insist(&["set", key, "common"]);
    }
    equal(&cluster, 0);
    cluster.kill(1);
    let fast = cluster.shard(0).unwrap();
    fast.stamps.rise_above(now_ns() + 120 * SECOND_NS, &fast.database).unwrap();
    for key in ["overwritten", "deleted", "kept"] {
        client.call(&["set", key, "surplus"]);
    }
    drop((client, fast));
    cluster.kill(0);
    cluster.start(1);
    name_leader(&mut cluster, None);
    name_leader(&mut cluster, Some(1));
    let mut client = cluster.client(1);
    client.insist(&["set", "overwritten", "newer"]);
    client.call(&["del", "deleted"]);
    cluster.start(0);
    eventually("what it had is merged", || client.call(&["get", "kept"]) == "surplus");
    equal(&cluster, 1);
    assert_eq!(client.call(&["get", "overwritten"]), "newer");
    assert_eq!(client.call(&["get", "deleted"]), "null");

    // The same with a flush: it kills what was there before, and nothing that came since.
    cluster.kill(0);
    let fast = cluster.shard(1).unwrap();
    fast.stamps.rise_above(now_ns() + 300 * SECOND_NS, &fast.database).unwrap();
    client.call(&["flushdb"]);
    drop((client, fast));
    cluster.kill(1);
    cluster.start(0);
    name_leader(&mut cluster, None);
    name_leader(&mut cluster, Some(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "overwritten", "newest"]);
    cluster.start(1);
    eventually("the flush is taken over", || client.call(&["get", "kept"]) == "null");
    equal(&cluster, 0);
    assert_eq!(client.call(&["get", "overwritten"]), "newest");
}

#[test]
fn what_a_power_cut_took_from_the_leader_comes_back_from_its_follower() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "first", "1"]);
    cluster.equal(0);
    let before_cut = cluster.copy_data(0);
    for number in 0..50 {
        client.call(&["set", &format!("key{number}"), "1"]);
    }
    cluster.equal(0);
    drop(client);
    cluster.stop(0);
    cluster.data[0] = before_cut;
    // The follower may not give anything back before the numbers are used again.
    cluster.stop(1);
    cluster.start(0);
    let mut client = cluster.client(0);
    for number in 0..80 {
        client.insist(&["set", &format!("other{number}"), "2"]);
    }
    cluster.start(1);
    eventually("the rows are back", || client.call(&["get", "key49"]) == "1");
    assert_eq!(cluster.equal(0).len(), 131);
}

#[test]
fn a_planned_change_takes_the_end_of_the_log_along() {
    let mut cluster = Cluster::new(3, replicated(1));
    let mut client = cluster.client(0);
    client.insist(&["set", "counter", "0"]);
    for _ in 0..200 {
        client.call(&["incr", "counter"]);
    }
    for round in 0..4 {
        let (old, new) = (round % 3, (round + 1) % 3);
        cluster.equal(old);
        let before = cluster.figures(new);
        // The record reaches the old one first: what it acknowledged in between must be there.
        cluster.change(|shard, ids| {
            shard.epoch.0 += 1;
            shard.previous = ids[old];
            shard.primary = ids[new];
            shard.replicas = ids.iter().copied().filter(|id| *id != ids[new]).collect();
        });
        let mut client = cluster.client(new);
        assert_eq!(client.insist(&["get", "counter"]), (200 + round).to_string());
        client.insist(&["incr", "counter"]);
        cluster.equal(new);
        assert_eq!(cluster.figures(new).full_copies, before.full_copies, "round {round}");
        assert_eq!(cluster.figures(new).handed_over_rows, 0, "round {round}");
    }
}

/// Keeps what comes to a store from being applied.
fn stall(cluster: &Cluster, number: usize, stalled: impl FnOnce()) {
    let mut all = StripeSet::default();
    all.add_all();
    let mut held: SmallVec<[StripeGuard<'_>; 4]> = SmallVec::new();
    all.lock(&cluster.handle(number).core().stripes, Patience::Unbounded, &mut held);
    stalled();
}

#[test]
fn who_hands_over_answers_what_waits_for_its_successor() {
    let mut cluster = Cluster::new(2, replicated(1));
    let mut client = cluster.client(0);
    client.insist(&["set", "key", "1"]);
    let shard = &mut cluster.record.shards[0];
    (shard.epoch, shard.primary, shard.previous) = (Epoch(shard.epoch.0 + 1), cluster.ids[1], cluster.ids[0]);
    shard.replicas = vec![cluster.ids[0]];
    cluster.record.epoch.0 += 1;
    std::thread::scope(|scope| {
        stall(&cluster, 1, || {
            assert_eq!(client.send(&["set", "key", "2"]), None);
            for number in [0, 1] {
                let cluster = &cluster;
                scope.spawn(move || cluster.handle(number).put_record(cluster.record.clone()).unwrap());
            }
            eventually("the old primary follows", || {
                cluster.status(0).is_some_and(|status| status.epoch == cluster.epoch())
            });
            assert_eq!(client.poll(), None);
        });
    });
    eventually("the answer leaves", || client.poll() == Some((Outcome::Reply, "OK".into())));
    assert_eq!(cluster.client(1).insist(&["get", "key"]), "2");
}

#[test]
fn who_stops_answers_what_waits_for_a_replica_and_does_not_take_long() {
    let cluster = Cluster::new(2, replicated(1));
    let mut client = cluster.client(0);
    client.insist(&["set", "key", "1"]);
    stall(&cluster, 1, || {
        assert_eq!(client.send(&["set", "key", "2"]), None);
        cluster.running[0].as_ref().unwrap().shutdown.cancel();
        let waits = client.next_id;
        eventually("nothing more is run", || client.send(&["get", "key"]).is_some());
        // The answer that is read from here on.
        client.next_id = waits;
    });
    eventually("the answer leaves", || client.poll() == Some((Outcome::Reply, "OK".into())));
}

#[test]
fn an_answer_waits_until_enough_replicas_have_what_it_tells() {
    let mut cluster = Cluster::new(2, replicated(1));
    let mut client = cluster.client(0);
    assert_eq!(client.insist(&["set", "key", "1"]), "OK");
    assert_eq!(rows(&cluster.shard(1).unwrap()).len(), 1, "the answer came after the replica had it");
    let following = cluster.shard(1).unwrap();
    {
        let mut all = StripeSet::default();
        all.add_all();
        let mut held: SmallVec<[StripeGuard<'_>; 4]> = SmallVec::new();
        all.lock(&cluster.handle(1).core().stripes, Patience::Unbounded, &mut held);
        assert_eq!(client.send(&["set", "key", "2"]), None);
        let mut reader = cluster.client(0);
        assert_eq!(reader.send(&["get", "key"]), None, "it shows what a failover could take back");
        for _ in 0..40 {
            rest();
            assert_eq!((client.poll(), reader.poll()), (None, None));
        }
        drop(held);
        eventually("the answer leaves", || client.poll() == Some((Outcome::Reply, "OK".into())));
        eventually("the answer leaves", || reader.poll() == Some((Outcome::Reply, "2".into())));
        // It confirms nothing for too long.
        let mut held: SmallVec<[StripeGuard<'_>; 4]> = SmallVec::new();
        all.lock(&cluster.handle(1).core().stripes, Patience::Unbounded, &mut held);
        assert_eq!(client.ask(&["set", "key", "3"]).0, Outcome::Unknown);
    }
    drop(following);
    assert_eq!(client.insist(&["get", "key"]), "3");
    drop(client);
    eventually("what is replicated is noted", || {
        let shard = cluster.shard(0).unwrap();
        let noted = shard.database.meta(crate::engine::meta::REPLICATED).unwrap().unwrap_or_default();
        noted.last_chunk::<8>().is_some_and(|up_to| u64::from_be_bytes(*up_to) >= shard.database.tail().rows_up_to())
    });
    cluster.stop(1);
    let mut client = cluster.client(0);
    eventually("the replica is gone", || client.ask(&["set", "key", "4"]).0 == Outcome::NoReplicas);
    assert_eq!(client.call(&["get", "key"]), "3", "nothing is seen that the replica lacks");
    drop(client);
    cluster.kill(0);
    cluster.start(0);
    let mut client = cluster.client(0);
    assert_eq!(client.insist(&["get", "key"]), "3", "a restart knows what was replicated");
    cluster.start(1);
    assert_eq!(client.insist(&["set", "key", "4"]), "OK");
    cluster.equal(0);
}

#[test]
fn rows_older_than_a_forgotten_deletion_are_kept_aside_and_a_flush_is_honoured() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "common", "1"]);
    cluster.equal(0);
    cluster.kill(1);
    client.call(&["set", "zombie", "1"]);
    client.call(&["set", "common", "2"]);
    drop(client);
    cluster.kill(0);
    cluster.start(1);
    cluster.lead(None);
    cluster.lead(Some(1));
    let mut client = cluster.client(1);
    client.insist(&["set", "common", "3"]);
    // As if a compaction had dropped a tombstone of now.
    let leading = cluster.shard(1).unwrap();
    leading.database.garbage().may_drop_up_to(now_ns() + 60_000_000_000);
    cluster.start(0);
    cluster.equal(1);
    assert_eq!(client.call(&["get", "zombie"]), "null");
    assert_eq!(client.call(&["get", "common"]), "3");
    let aside = fs::read(leading.database.folder().join(super::hand_over::QUARANTINE)).unwrap();
    assert!(aside.windows(6).any(|window| window == b"zombie"));
    drop(leading);

    // The other way round: only the old primary was flushed.
    cluster.kill(0);
    client.call(&["flushdb"]);
    drop(client);
    cluster.kill(1);
    cluster.start(0);
    cluster.lead(None);
    cluster.lead(Some(0));
    let mut client = cluster.client(0);
    assert_eq!(client.insist(&["get", "common"]), "3");
    cluster.start(1);
    eventually("the flush is taken over", || client.call(&["get", "common"]) == "null");
    cluster.equal(0);
}

#[test]
fn tombstones_leave_when_all_copies_have_them() {
    let mut cluster = Cluster::new(2, replicated(0));
    let mut client = cluster.client(0);
    client.insist(&["set", "key", "1"]);
    let before = now_ns();
    eventually("all have what was written before", || {
        [0, 1]
            .iter()
            .all(|number| cluster.shard(*number).is_some_and(|shard| shard.replication.replicated_ns() > before))
    });
    cluster.stop(1);
    let stopped = now_ns();
    for _ in 0..600 {
        rest();
        assert!(cluster.shard(0).unwrap().replication.replicated_ns() < stopped);
    }
}

/// What a client may believe of a key.
#[derive(Clone, Debug, Default)]
struct Belief {
    /// `None`: no row.
    acknowledged: Option<String>,
    /// Writes behind it whose fate is unknown.
    possible: Vec<Option<String>>,
}

#[test]
fn whatever_happens_all_copies_are_equal_in_the_end_and_nothing_acknowledged_is_lost() {
    let seed = std::env::var("VASTO_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    let steps = std::env::var("VASTO_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(40);
    println!("VASTO_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::new(3, replicated(1));
    let mut leader = 0;
    let mut beliefs: BTreeMap<String, Belief> = BTreeMap::new();
    cluster.equal(leader);
    let mut value = 0;
    for step in 0..steps {
        let mut client = cluster.client(leader);
        for _ in 0..random.u32(1..60) {
            let key = format!("key{}", random.u8(0..40));
            value += 1;
            let written = (random.u8(0..4) > 0).then(|| value.to_string());
            let words: Vec<&str> = match &written {
                Some(value) => vec!["set", &key, value],
                None => vec!["del", &key],
            };
            let (outcome, text) = client.ask(&words);
            let belief = beliefs.entry(key).or_default();
            match outcome {
                Outcome::Reply => *belief = Belief { acknowledged: written, possible: Vec::new() },
                Outcome::Unknown => belief.possible.push(written),
                _ => assert!(!text.is_empty()),
            }
        }
        if random.u8(0..20) == 0 && client.ask(&["flushdb"]).0 == Outcome::Reply {
            beliefs.clear();
        }
        drop(client);
        let other = (leader + random.usize(1..3)) % 3;
        let third = 3 - leader - other;
        match random.u8(0..8) {
            // A replica dies, or is away for a while.
            0 | 1 => {
                cluster.kill(other);
                cluster.start(other);
            }
            2 => {
                cluster.shard(leader).unwrap().database.flush().unwrap();
                cluster.kill(other);
                cluster.shard(leader).unwrap().database.tail().ring.lock().clear();
                cluster.start(other);
            }
            // The primary dies and comes back.
            3 => {
                cluster.kill(leader);
                cluster.start(leader);
            }
            // It dies, another leads, and it comes back later, or a replica was away as well.
            4 | 5 => {
                let both = random.bool();
                if both {
                    // What the primary writes now is on one replica only.
                    cluster.kill(third);
                    let mut client = cluster.client(leader);
                    for number in 0..20 {
                        let (key, value) = (format!("key{number}"), format!("{step}-{number}"));
                        match client.ask(&["set", &key, &value]).0 {
                            Outcome::Reply => {
                                beliefs.insert(key, Belief { acknowledged: Some(value), possible: Vec::new() });
                            }
                            Outcome::Unknown => beliefs.entry(key).or_default().possible.push(Some(value)),
                            _ => {}
                        }
                    }
                    drop(client);
                    cluster.kill(leader);
                    cluster.start(third);
                } else {
                    cluster.kill(leader);
                }
                cluster.lead(None);
                let away = leader;
                leader = if cluster.position(other) >= cluster.position(third) { other } else { third };
                cluster.lead(Some(leader));
                let mut client = cluster.client(leader);
                let key = format!("key{}", random.u8(0..40));
                client.insist(&["set", &key, &format!("{step}-led")]);
                beliefs.insert(key, Belief { acknowledged: Some(format!("{step}-led")), possible: Vec::new() });
                drop(client);
                cluster.start(away);
            }
            // A planned change.
            6 => {
                let (old, new) = (cluster.ids[leader], cluster.ids[other]);
                eventually("the target is whole", || cluster.status(other).is_some_and(|s| s.position.is_some()));
                cluster.change(|shard, ids| {
                    shard.epoch.0 += 1;
                    shard.previous = old;
                    shard.primary = new;
                    shard.replicas = ids.iter().copied().filter(|id| *id != new).collect();
                });
                leader = other;
                eventually("it leads", || cluster.status(leader).is_some_and(|status| status.serves));
                cluster.change(|shard, _| shard.previous = NOBODY);
            }
            _ => {}
        }
        if random.bool() {
            cluster.equal(leader);
        }
        // All copies that may be chosen are whole before the next accident: two at once are more than one replica is for.
        eventually("all follow", || {
            cluster.status(leader).is_some_and(|status| status.followers.iter().all(|follower| follower.in_sync))
        });
    }
    cluster.equal(leader);
    let mut client = cluster.client(leader);
    for (key, belief) in beliefs {
        let found = Some(client.insist(&["get", &key])).filter(|value| value != "null");
        let is_right = found == belief.acknowledged || belief.possible.contains(&found);
        assert!(is_right, "{key} is {found:?}, believed to be {belief:?}; VASTO_SEED={seed}");
    }
    let sent: u64 = (0..3).map(|number| cluster.figures(number).full_copies).sum();
    println!("full copies by the last lives of the stores: {sent}");
}

#[test]
fn lag_is_measured() {
    let cluster = Cluster::new(2, replicated(1));
    let mut client = cluster.client(0);
    client.insist(&["set", "key", "0"]);
    let mut took: Vec<Duration> = (0..2000)
        .map(|number| {
            let begin = Instant::now();
            let mut answer = client.send(&["set", &format!("key{}", number % 100), "value"]);
            while answer.is_none() {
                answer = client.poll();
                std::thread::yield_now();
            }
            assert_eq!(answer.unwrap().0, Outcome::Reply);
            begin.elapsed()
        })
        .collect();
    took.sort_unstable();
    let follower = &cluster.figures(0).followers[0];
    assert!(follower.in_sync && follower.connected && follower.applied > 2000);
    println!("a write that waits for one replica: p50 {:?}, p99 {:?}; lag {:?}", took[1000], took[1980], follower.lag);
    let shard = cluster.shard(0).unwrap();
    assert!(shard.durability.figures().held_batches > 1000, "answers were held until the replica had confirmed");
    assert!(shard.replication.counts.partial_resumes.load(Ordering::Relaxed) > 0);
    assert!(shard.database.meta(crate::engine::meta::HISTORY).unwrap().is_some());
    assert!(shard.database.get(b"nothing", Tier::Disk).unwrap().is_none());
}
