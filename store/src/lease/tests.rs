//! Stores that grant each other leases over the network, without a master; and one whose process is stopped.

use super::state::Need;
use crate::shard::Shard;
use crate::shard::map::Entry;
use crate::{Config, LeaseFigures, Store, StoreHandle};
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use vasto_proto::batch::{Answers, FLAG_AFTER_REFUSAL, OperationHead, Outcome, write_operation};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::pb;
use vasto_proto::topology::{Fsync, HolderGroup, KeyspaceRecord, Peers, Settings, ShardRecord};

const SHARD: ShardKey = ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) };
const SECOND_NS: u64 = 1_000_000_000;

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "in 30 s not yet: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn open(data: &Path) -> Store {
    Store::open(Config { data: data.to_owned(), workers: 1, lane_threads: 2, ..Config::default() }).unwrap()
}

/// A store that serves until it is stopped.
struct Running {
    handle: StoreHandle,
    address: String,
    shutdown: CancellationToken,
    thread: JoinHandle<()>,
}

impl Running {
    fn start(data: &Path) -> Self {
        let store = open(data);
        let handle = store.handle();
        let shutdown = CancellationToken::new();
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

    fn id(&self) -> StoreId {
        self.handle.id()
    }
}

fn peers<'s>(stores: impl IntoIterator<Item = &'s Running>) -> Peers {
    let addresses: std::collections::BTreeMap<_, _> =
        stores.into_iter().map(|store| (store.id(), store.address.clone())).collect();
    let group = HolderGroup { version: 1, members: addresses.keys().copied().collect() };
    Peers { addresses, group }
}

fn record(epoch: u64, shard: ShardRecord) -> KeyspaceRecord {
    let mut record = KeyspaceRecord::new(SHARD.keyspace, "0", &[shard.primary]).unwrap();
    record.epoch = Epoch(epoch);
    record.shards = vec![shard];
    record
}

/// A batch of operations, each of a connection of its own; their outcomes, in order.
fn send(handle: &StoreHandle, epoch: u64, operations: &[(StoreCommand, &[&[u8]])]) -> Vec<(Outcome, String)> {
    let (mut session, mut late) = handle.open_session();
    let mut batch = Vec::new();
    for (id, (command, arguments)) in operations.iter().enumerate() {
        let (id, command) = (id as u32, command.code());
        let head = OperationHead {
            id,
            connection: id,
            target: SHARD,
            epoch: Epoch(epoch),
            command,
            flags: FLAG_AFTER_REFUSAL,
        };
        write_operation(&mut batch, &head, arguments.iter().copied());
    }
    let mut answers = Vec::new();
    session.execute(batch.into(), &mut answers);
    let mut outcomes = Vec::new();
    let mut collect = |answers: &[u8]| {
        for answer in Answers::new(answers) {
            let answer = answer.unwrap();
            outcomes.push((answer.id, answer.outcome, String::from_utf8_lossy(answer.body).into_owned()));
        }
        outcomes.len()
    };
    let mut count = collect(&answers);
    eventually("all operations are answered", || {
        if let Poll::Ready(Some(answers)) = late.poll_next(&mut Context::from_waker(Waker::noop())) {
            count = collect(&answers);
        }
        count == operations.len()
    });
    outcomes.sort_unstable_by_key(|(id, _, _)| *id);
    outcomes.into_iter().map(|(_, outcome, text)| (outcome, text)).collect()
}

fn set(handle: &StoreHandle, epoch: u64) -> (Outcome, String) {
    send(handle, epoch, &[(StoreCommand::Set, &[b"key", b"value"])]).remove(0)
}

fn serves(handle: &StoreHandle, epoch: u64) -> bool {
    set(handle, epoch).0 == Outcome::Reply
}

fn lease(handle: &StoreHandle) -> LeaseFigures {
    handle.leases().into_iter().find(|lease| lease.shard == SHARD).expect("the shard needs a lease")
}

fn shard(handle: &StoreHandle) -> Arc<Shard> {
    match handle.core().shards.current().entry(SHARD) {
        Some(Entry::Serving(shard)) => Arc::clone(shard),
        _ => panic!("the shard is not open"),
    }
}

fn folders() -> [TempDir; 3] {
    std::array::from_fn(|_| tempfile::tempdir().unwrap())
}

#[test]
fn a_shard_with_copies_is_served_while_a_majority_of_the_holders_grants_it() {
    let folders = folders();
    let [first, second, third] = std::array::from_fn(|number| Running::start(folders[number].path()));
    let alone = ShardRecord::new(Epoch(1), first.id(), Vec::new());
    first.handle.put_record(record(1, alone)).unwrap();
    assert!(serves(&first.handle, 1), "without copies it needs no lease");
    assert_eq!(first.handle.leases(), []);

    // It gets a copy, and nobody has named holders.
    let copied = record(2, ShardRecord::new(Epoch(1), first.id(), vec![second.id()]));
    for store in [&first, &second, &third] {
        store.handle.put_record(copied.clone()).unwrap();
    }
    let unknown =
        "shard 0/0 has no lease: this store knows of no holders who could grant it, since no master has named any";
    eventually("it says why it does not serve", || set(&first.handle, 1) == (Outcome::NotServing, unknown.to_owned()));
    assert!(lease(&first.handle).left.is_none());

    let known = peers([&first, &second, &third]);
    for store in [&first, &second, &third] {
        store.handle.set_peers(known.clone()).unwrap();
    }
    eventually("it serves", || serves(&first.handle, 1));
    eventually("all three grant it", || lease(&first.handle).granted_by == 3);
    let figures = lease(&first.handle);
    assert_eq!((figures.serves, figures.holder_count, figures.epoch), (true, 3, Epoch(1)));
    assert_eq!(figures.reason, "3 of 3 holders grant it");

    // One holder is missed by nobody; two are.
    third.stop();
    eventually("two grant it", || lease(&first.handle).granted_by == 2);
    assert!(serves(&first.handle, 1));
    second.stop();
    eventually("it stops", || !serves(&first.handle, 1));
    eventually("it says that the others do not grant it", || {
        let (outcome, text) = set(&first.handle, 1);
        assert_eq!(outcome, Outcome::NotServing);
        text.starts_with("shard 0/0 has no lease: it ended ")
            && text.contains("; 1 of 3 holders grant it; store ")
            && text.contains("cannot be asked: ")
    });

    // They come back, at other addresses.
    let [second, third] = [1, 2].map(|number| Running::start(folders[number].path()));
    let moved = peers([&first, &second, &third]);
    assert_ne!(moved, known);
    first.handle.set_peers(moved).unwrap();
    eventually("it serves again", || serves(&first.handle, 1));

    // Nobody asks for a lease where it was given up.
    let lax = Settings { strict: Some(false), ..Settings::default() };
    first.handle.put_record(copied.with_settings(lax)).unwrap();
    eventually("no lease is wanted", || first.handle.leases().is_empty());
    [second, third].into_iter().for_each(Running::stop);
    assert!(serves(&first.handle, 1));
    first.stop();
}

#[test]
fn a_new_primary_serves_when_the_old_one_cannot_any_more() {
    let folders = folders();
    let [first, second, third] = std::array::from_fn(|number| Running::start(folders[number].path()));
    let known = peers([&first, &second, &third]);
    let before = record(1, ShardRecord::new(Epoch(1), first.id(), vec![second.id()]));
    for store in [&first, &second, &third] {
        store.handle.set_peers(known.clone()).unwrap();
        store.handle.put_record(before.clone()).unwrap();
    }
    eventually("the old one serves", || serves(&first.handle, 1));

    // The old primary has not heard of the change, and grants itself what it asks for.
    let after = record(2, ShardRecord::new(Epoch(2), second.id(), vec![first.id()]));
    for store in [&second, &third] {
        store.handle.put_record(after.clone()).unwrap();
    }
    eventually("the new one serves", || serves(&second.handle, 2));
    let (outcome, text) = set(&first.handle, 1);
    assert_eq!(outcome, Outcome::NotServing);
    assert!(text.starts_with("shard 0/0 has no lease: it ended "), "{text}");
    let refusal = format!("store {} knows epoch 2, at which store {} is primary", third.id(), second.id());
    eventually("it says who serves", || lease(&first.handle).reason.contains(&refusal));

    // Now it hears.
    first.handle.put_record(after).unwrap();
    assert_eq!(set(&first.handle, 1).0, Outcome::WrongEpoch);
    eventually("it wants no lease", || first.handle.leases().is_empty());
    eventually("all grant it to the new one", || lease(&second.handle).granted_by == 3);
    [first, second, third].into_iter().for_each(Running::stop);
}

#[test]
fn a_lease_that_is_given_back_is_granted_to_the_next_before_it_would_have_ended() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Running::start(folder.path());
    holder.handle.set_peers(peers([&holder])).unwrap();
    let other = StoreId(holder.id().0 ^ 1);
    // The machine may be too slow for one attempt.
    let is_granted_early = (0..10).any(|attempt| {
        let epoch = 1 + 2 * attempt;
        let own = record(epoch, ShardRecord::new(Epoch(epoch), holder.id(), vec![other]));
        holder.handle.put_record(own).unwrap();
        eventually("it serves", || serves(&holder.handle, epoch));
        let next = record(epoch + 1, ShardRecord::new(Epoch(epoch + 1), other, vec![holder.id()]));
        let until_ns = shard(&holder.handle).lease.until_ns().unwrap();
        holder.handle.put_record(next).unwrap();
        let ask = pb::LeaseRequest { epoch: epoch + 1, tenure: attempt, ..Default::default() };
        let ask = pb::RenewRequest { store_id: other.0, leases: vec![ask], group_version: 1 };
        eventually("the next one is granted it", || holder.handle.renew(&ask).answers[0].granted);
        let is_early = holder.handle.core().clock.now_ns() < until_ns;
        let back = pb::RenewRequest { leases: vec![pb::LeaseRequest { release: true, ..ask.leases[0] }], ..ask };
        holder.handle.renew(&back);
        is_early
    });
    assert!(is_granted_early);
    holder.stop();
}

#[test]
fn a_store_that_is_closed_gives_its_leases_back() {
    let folders = folders();
    let holder = Running::start(folders[0].path());
    // The machine may be too slow for one attempt: what is over is forgotten.
    let was_given_back = (0..5).any(|_| {
        let primary = Running::start(folders[1].path());
        let known = peers([&holder, &primary]);
        let own = record(1, ShardRecord::new(Epoch(1), primary.id(), vec![holder.id()]));
        for store in [&holder, &primary] {
            store.handle.set_peers(known.clone()).unwrap();
            store.handle.put_record(own.clone()).unwrap();
        }
        eventually("it serves", || serves(&primary.handle, 1));
        let tenure = primary.handle.tenure(SHARD).unwrap();
        let ask = pb::LeaseRequest { epoch: 1, tenure, ..Default::default() };
        let ask = pb::RenewRequest { store_id: primary.id().0, leases: vec![ask], group_version: 1 };
        primary.stop();
        holder.handle.renew(&ask).answers[0].reason == "was given it back"
    });
    assert!(was_given_back);
    holder.stop();
}

#[test]
fn a_holder_answers_by_the_newest_record_while_its_disk_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path()).handle();
    let other = StoreId(handle.id().0 ^ 1);
    let shards = [ShardRecord::new(Epoch(1), handle.id(), Vec::new()), ShardRecord::new(Epoch(1), other, Vec::new())];
    let mut before = record(1, shards[0].clone());
    before.shards = shards.to_vec();
    handle.put_record(before.clone()).unwrap();
    assert!(serves(&handle, 1));
    let shard = shard(&handle);
    let mut after = before.with_settings(Settings { fsync: Some(Fsync::Always), ..Settings::default() });
    after.shards[1].epoch = Epoch(2);
    let ask = pb::LeaseRequest { shard: 1, epoch: 2, ..Default::default() };
    let ask = pb::RenewRequest { store_id: other.0, leases: vec![ask], group_version: 0 };
    std::thread::scope(|scope| {
        let hanging = shard.durability.stall();
        scope.spawn(|| handle.put_record(after).unwrap());
        eventually("the newer record counts", || !handle.renew(&ask).answers[0].reason.starts_with("knows epoch 1"));
        drop(hanging);
    });
    eventually("it grants", || handle.renew(&ask).answers[0].granted);
    handle.close();
}

/// A store with a shard that needs a lease, which the test gives.
fn leased(data: &Path, fsync: Fsync) -> (StoreHandle, Arc<Shard>) {
    let handle = open(data).handle();
    let mut record = record(1, ShardRecord::new(Epoch(1), handle.id(), vec![StoreId(handle.id().0 ^ 1)]));
    record.settings.fsync = Some(fsync);
    handle.put_record(record).unwrap();
    let shard = shard(&handle);
    assert!(!serves(&handle, 1));
    crate::replication::begin_leading(&shard, Epoch(1)).unwrap();
    assert!(!serves(&handle, 1));
    (handle, shard)
}

#[test]
fn what_was_run_before_the_process_was_stopped_is_not_answered_as_done() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, shard) = leased(folder.path(), Fsync::EverySecond);
    let clock = Arc::clone(&handle.core().clock);
    shard.lease.extend(Epoch(1), clock.now_ns() + 3600 * SECOND_NS);
    assert!(serves(&handle, 1));
    let batch: [(StoreCommand, &[&[u8]]); 3] = [
        (StoreCommand::Set, &[b"key", b"other"]),
        (StoreCommand::Get, &[b"key"]),
        (StoreCommand::Append, &[b"key", b"!"]),
    ];
    // Between the gate and the answers.
    clock.stop_after(1, 7200 * SECOND_NS);
    let answers = send(&handle, 1, &batch);
    let outcomes: Vec<Outcome> = answers.iter().map(|(outcome, _)| *outcome).collect();
    assert_eq!(outcomes, [Outcome::Unknown, Outcome::NotServing, Outcome::Unknown]);
    for (_, text) in &answers {
        assert!(text.starts_with("shard 0/0 has lost its lease meanwhile: it ended 3"), "{text}");
    }
    // What comes later does not even run.
    let (outcome, text) = set(&handle, 1);
    assert_eq!(outcome, Outcome::NotServing);
    assert!(text.starts_with("shard 0/0 has no lease: it ended 3"), "{text}");
    // The writes are there: unknown was the truth.
    shard.lease.extend(Epoch(1), clock.now_ns() + 3600 * SECOND_NS);
    let answers = send(&handle, 1, &[(StoreCommand::Get, &[b"key"])]);
    assert!(answers[0].0 == Outcome::Reply && answers[0].1.ends_with("other!"), "{answers:?}");
    handle.close();
}

#[test]
fn answers_that_waited_for_a_sync_do_not_leave_after_the_lease() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, shard) = leased(folder.path(), Fsync::Always);
    let clock = Arc::clone(&handle.core().clock);
    let run_stalled = |then: &dyn Fn()| {
        std::thread::scope(|scope| {
            let hanging = shard.durability.stall();
            let sent = scope.spawn(|| set(&handle, 1));
            eventually("the answer is held", || shard.durability.figures().held_batches_now == 1);
            then();
            drop(hanging);
            sent.join().unwrap()
        })
    };
    shard.lease.extend(Epoch(1), clock.now_ns() + 3600 * SECOND_NS);
    assert_eq!(run_stalled(&|| ()).0, Outcome::Reply);
    let (outcome, text) = run_stalled(&|| {
        clock.stop_after(0, 7200 * SECOND_NS);
        clock.now_ns();
    });
    assert_eq!(outcome, Outcome::Unknown);
    assert!(text.starts_with("shard 0/0 has lost its lease meanwhile: it ended 3"), "{text}");

    // A lease of a later epoch is not that under which they were given.
    shard.lease.extend(Epoch(1), clock.now_ns() + 3600 * SECOND_NS);
    let (outcome, _) = run_stalled(&|| {
        shard.lease.follow(Epoch(3), Need::Lease);
        shard.set_epoch(Epoch(3));
        shard.lease.extend(Epoch(3), clock.now_ns() + 3600 * SECOND_NS);
    });
    assert_eq!(outcome, Outcome::Unknown);
    assert!(serves(&handle, 3));
    handle.close();
}
