//! Sessions against real shards: a model, order, crashes, concurrency, limits.

use super::durability::{Pass, SYNC_THREADS};
use super::map::Entry;
use super::session::{LateAnswers, Session};
use super::stripes::{Patience, StripeGuard, StripeSet};
use crate::config::{Config, Fsync, MemoryConfig};
use crate::engine::EngineError;
use crate::{Store, StoreHandle};
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};
use vasto_proto::batch::{Answers, FLAG_AFTER_REFUSAL, FLAG_LARGE_PERMIT, OperationHead, Outcome, write_operation};
use vasto_proto::command::Reply;
use vasto_proto::command::table::{Command, StoreCommand, find};
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey};
use vasto_proto::net::LARGE_VALUE_BYTES;
use vasto_proto::slot::{SlotTable, slot_of};
use vasto_proto::topology::{KeyspaceRecord, Settings};

const SHARD: ShardKey = ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) };

/// A store with one shard.
pub(crate) fn open(data: &Path, change: impl FnOnce(&mut Config)) -> StoreHandle {
    let mut config = Config { data: data.to_owned(), lane_threads: 3, ..Config::default() };
    change(&mut config);
    let store = Store::open(config).unwrap();
    let handle = store.handle();
    handle.put_record(KeyspaceRecord::new(KeyspaceId(0), "0", &[handle.id()]).unwrap()).unwrap();
    handle
}

/// So little memory that most reads of what was written out must go to the disk.
fn starved(config: &mut Config) {
    config.memory =
        MemoryConfig { row_cache_bytes: 4096 * 600, block_cache_bytes: 1 << 10, write_buffer_bytes: 64 << 20 };
}

pub(crate) struct Client {
    session: Session,
    late: LateAnswers,
    next_id: u32,
    batch: Vec<u8>,
    sent: Vec<u32>,
}

impl Client {
    pub(crate) fn new(handle: &StoreHandle) -> Self {
        let (session, late) = handle.open_session();
        Self { session, late, next_id: 0, batch: Vec::new(), sent: Vec::new() }
    }

    fn add(&mut self, connection: u32, words: &[&[u8]]) {
        self.add_with(connection, words, FLAG_LARGE_PERMIT, Epoch(1));
    }

    fn add_to(&mut self, shard: ShardId, words: &[&[u8]]) {
        self.add_head(ShardKey { shard, ..SHARD }, 1, words, 0, Epoch(1));
    }

    fn add_with(&mut self, connection: u32, words: &[&[u8]], flags: u32, epoch: Epoch) {
        self.add_head(SHARD, connection, words, flags, epoch);
    }

    pub(crate) fn add_head(&mut self, target: ShardKey, connection: u32, words: &[&[u8]], flags: u32, epoch: Epoch) {
        let Some(Command::Store(command)) = find(words[0]) else { panic!("{words:?} is no command of the store") };
        self.next_id += 1;
        let head = OperationHead { id: self.next_id, connection, target, epoch, command: command.code(), flags };
        write_operation(&mut self.batch, &head, words[1..].iter().copied());
        self.sent.push(self.next_id);
    }

    /// Sends what was added; returns the answers in order of their operations, and how many of them were late.
    pub(crate) fn send(&mut self) -> (Vec<(Outcome, String)>, usize) {
        let mut answers = Vec::new();
        self.session.execute(Bytes::from(std::mem::take(&mut self.batch)), &mut answers);
        let mut by_id = HashMap::new();
        let mut collect = |answers: &[u8]| {
            for answer in Answers::new(answers) {
                let answer = answer.unwrap();
                let body = match answer.outcome {
                    Outcome::Reply => show(answer.body),
                    _ => String::from_utf8_lossy(answer.body).into_owned(),
                };
                assert!(by_id.insert(answer.id, (answer.outcome, body)).is_none(), "{} is answered twice", answer.id);
            }
            by_id.len()
        };
        let at_once = collect(&answers);
        let mut count = at_once;
        let deadline = Instant::now() + Duration::from_secs(20);
        while count < self.sent.len() {
            assert!(Instant::now() < deadline, "answers are missing");
            match self.late.poll_next(&mut std::task::Context::from_waker(Waker::noop())) {
                Poll::Ready(answers) => count = collect(&answers.unwrap()),
                Poll::Pending => std::thread::yield_now(),
            }
        }
        let answers = self.sent.drain(..).map(|id| by_id.remove(&id).unwrap()).collect();
        (answers, count - at_once)
    }

    pub(crate) fn call(&mut self, words: &[&[u8]]) -> String {
        self.add(1, words);
        let (answers, _) = self.send();
        assert_eq!(answers[0].0, Outcome::Reply, "{}", answers[0].1);
        answers[0].1.clone()
    }
}

fn show(mut body: &[u8]) -> String {
    fn one(body: &mut &[u8]) -> String {
        match Reply::take(body).unwrap() {
            Reply::Ok => "OK".into(),
            Reply::Integer(value) => value.to_string(),
            Reply::Null => "null".into(),
            Reply::Bulk(text) => String::from_utf8_lossy(text).into_owned(),
            Reply::Error(text) => format!("-{}", String::from_utf8_lossy(text)),
            Reply::Array(count) => (0..count).map(|_| one(body)).collect::<Vec<_>>().join(","),
            other => format!("{other:?}"),
        }
    }
    let shown = one(&mut body);
    assert!(body.is_empty(), "a reply has a tail");
    shown
}

/// What a client may do to a few keys.
#[derive(Clone, Debug)]
enum Step {
    Batch(Vec<(u8, u8, u16)>),
    /// Writes everything to files, so that reads must go to the disk.
    WriteOut,
    Reopen,
    Crash,
}

const KEYS: u8 = 12;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let operation = (0..14u8, 0..KEYS, any::<u16>());
    let step = prop_oneof![
        12 => prop::collection::vec(operation, 1..24).prop_map(Step::Batch),
        2 => Just(Step::WriteOut),
        1 => Just(Step::Reopen),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..20)
}

/// Applies one command to the model and returns the reply it must have.
fn apply(model: &mut BTreeMap<String, String>, words: &[String]) -> String {
    let key = words.get(1).cloned().unwrap_or_default();
    let exists = model.contains_key(&key);
    match words[0].as_str() {
        "set" => {
            model.insert(key, words[2].clone());
            "OK".into()
        }
        "get" => model.get(&key).cloned().unwrap_or("null".into()),
        "del" => words[1..].iter().filter(|key| model.remove(*key).is_some()).count().to_string(),
        "exists" => words[1..].iter().filter(|key| model.contains_key(*key)).count().to_string(),
        "setnx" => {
            model.entry(key).or_insert(words[2].clone());
            u8::from(!exists).to_string()
        }
        "append" => {
            let value = model.entry(key).or_default();
            value.push_str(&words[2]);
            value.len().to_string()
        }
        "incr" => match model.get(&key).map_or(Ok(0), |value| value.parse::<i64>()) {
            Ok(value) => {
                model.insert(key, (value + 1).to_string());
                (value + 1).to_string()
            }
            Err(_) => "-ERR value is not an integer or out of range".into(),
        },
        "mget" => {
            let values: Vec<_> =
                words[1..].iter().map(|key| model.get(key).cloned().unwrap_or("null".into())).collect();
            values.join(",")
        }
        "mset" => {
            for pair in words[1..].chunks(2) {
                model.insert(pair[0].clone(), pair[1].clone());
            }
            "OK".into()
        }
        "pexpireat" => {
            model.remove(&key);
            u8::from(exists).to_string()
        }
        "setex" => "-ERR invalid expire time in 'setex' command".into(),
        "dbsize" => model.len().to_string(),
        "flushdb" => {
            model.clear();
            "OK".into()
        }
        other => panic!("{other} is not in the model"),
    }
}

fn words(operation: u8, key: u8, number: u16) -> Vec<String> {
    let name = |key: u8| format!("key{}", key % KEYS);
    let other = name(key.wrapping_add(number as u8));
    // Some values are larger than the row cache takes, some than a block.
    let value = if number.is_multiple_of(7) { "v".repeat(usize::from(number) % 9000) } else { number.to_string() };
    let key = name(key);
    let text = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    match operation {
        0 | 1 => text(&["set", &key, &value]),
        2 | 3 => text(&["get", &key]),
        4 => text(&["del", &key, &other]),
        5 => text(&["exists", &key, &other, &key]),
        6 => text(&["setnx", &key, &value]),
        7 => text(&["append", &key, &value]),
        8 => text(&["incr", &key]),
        9 => text(&["mget", &key, &other]),
        10 => text(&["mset", &key, &value, &other, "m"]),
        11 => text(&["pexpireat", &key, "1000"]),
        12 => text(&["setex", &key, "0", &value]),
        _ if number.is_multiple_of(5) => text(&["flushdb"]),
        _ => text(&["dbsize"]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_connection_sees_what_a_map_would_show(steps in steps(), is_starved in any::<bool>(), fsync in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let change = |config: &mut Config| {
            if is_starved {
                starved(config);
            }
            config.fsync = if fsync { Fsync::Always } else { Fsync::EverySecond };
        };
        let mut data = folder.path().join("0");
        let mut handle = open(&data, change);
        let mut client = Client::new(&handle);
        let mut model = BTreeMap::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Batch(operations) => {
                    let mut expected = Vec::new();
                    for (operation, key, number) in operations {
                        let words = words(operation, key, number);
                        expected.push((Outcome::Reply, apply(&mut model, &words)));
                        client.add(1, &words.iter().map(String::as_bytes).collect::<Vec<_>>());
                    }
                    let (answers, _) = client.send();
                    prop_assert_eq!(answers, expected);
                }
                Step::WriteOut => handle.compact(),
                Step::Reopen => {
                    drop(client);
                    handle.close();
                    drop(handle);
                    handle = open(&data, change);
                    client = Client::new(&handle);
                }
                Step::Crash => {
                    // What the files hold while the store runs is what a killed process leaves.
                    let copy = folder.path().join((number + 1).to_string());
                    copy_folder(&data, &copy);
                    drop(client);
                    handle.close();
                    drop(handle);
                    data = copy;
                    handle = open(&data, change);
                    client = Client::new(&handle);
                }
            }
        }
    }
}

/// Copies the folder of a running store as a crash would leave it: again, until no file came, grew or went meanwhile.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    for _ in 0..1000 {
        let before = listing(from);
        let copied = try_copy(from, to);
        if copied.is_ok() && before.is_ok_and(|before| listing(from).is_ok_and(|after| after == before)) {
            return;
        }
        std::fs::remove_dir_all(to).unwrap();
    }
    panic!("the folder never stood still");
}

/// Every file below with its length, sorted; an error if one went while it was looked at.
fn listing(folder: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(listing(&entry.path())?);
        } else {
            files.push((entry.path(), entry.metadata()?.len()));
        }
    }
    files.sort();
    Ok(files)
}

fn try_copy(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            try_copy(&entry.path(), &to.join(entry.file_name()))?;
        } else if entry.file_name() != "LOCK" {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

pub(crate) fn shard(handle: &StoreHandle) -> Arc<super::Shard> {
    match handle.core().shards.current().entry(SHARD) {
        Some(Entry::Serving(shard)) => Arc::clone(shard),
        _ => panic!("the shard is not served"),
    }
}

#[test]
fn stamps_go_on_above_those_of_a_killed_process() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("1"), folder.path().join("2"));
    let handle = open(&first, |_| {});
    let far_future = super::executor::now_ns() + 3_600_000_000_000;
    let draw = |handle: &StoreHandle, now_ns| {
        let shard = shard(handle);
        super::stamps::StampBlock::default()
            .next(&shard.stamps, now_ns, 5, &shard.database, crate::engine::Tier::Disk)
            .unwrap()
    };
    let before = draw(&handle, far_future);
    copy_folder(&first, &second);
    let handle = open(&second, |_| {});
    let after = draw(&handle, 0);
    assert!(after.ns > before.ns + 4, "the clock went back by an hour");
    assert!(after.sequence > before.sequence + 4);
}

#[test]
fn a_connection_keeps_its_order_when_one_of_its_reads_must_go_to_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), starved);
    let mut client = Client::new(&handle);
    let key = |number: u32| format!("cold{number}");
    for number in 0..500 {
        client.add(1, &[b"set", key(number).as_bytes(), b"old"]);
    }
    client.send();
    handle.compact();
    client.call(&[b"set", b"hot", b"1"]);
    let mut late_answers = 0;
    for round in 0..40u32 {
        let cold = key(round * 7);
        let cold = cold.as_bytes();
        client.add(1, &[b"get", cold]);
        client.add(1, &[b"set", b"x", round.to_string().as_bytes()]);
        client.add(1, &[b"set", cold, b"new"]);
        client.add(1, &[b"get", cold]);
        client.add(1, &[b"append", cold, b"er"]);
        client.add(2, &[b"get", b"hot"]);
        client.add(1, &[b"dbsize"]);
        client.add(1, &[b"get", b"x"]);
        client.add(1, &[b"del", cold]);
        let (answers, late) = client.send();
        let answers: Vec<&str> = answers.iter().map(|(_, text)| text.as_str()).collect();
        let (size, x) = ((502 - round).to_string(), round.to_string());
        assert_eq!(answers, ["old", "OK", "OK", "new", "5", "1", &size, &x, "1"]);
        late_answers += late;
    }
    assert!(late_answers >= 40, "only {late_answers} answers were late: nothing went to the disk");
}

#[test]
fn counters_of_many_sessions_are_exact() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), starved);
    const THREADS: u64 = 4;
    const BATCHES: u64 = 300;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let handle = handle.clone();
            scope.spawn(move || {
                let mut client = Client::new(&handle);
                for batch in 0..BATCHES {
                    for number in 0..10u64 {
                        let key = format!("counter{}", (number + batch) % 5);
                        client.add(number as u32, &[b"incr", key.as_bytes()]);
                        client.add(number as u32, &[b"set", format!("{thread}-{batch}").as_bytes(), b"filler"]);
                    }
                    client.send();
                    if batch % 100 == 50 && thread == 0 {
                        handle.compact();
                    }
                }
            });
        }
    });
    let mut client = Client::new(&handle);
    let values = client.call(&[b"mget", b"counter0", b"counter1", b"counter2", b"counter3", b"counter4"]);
    let expected = (THREADS * BATCHES * 2).to_string();
    assert_eq!(values, [expected.as_str(); 5].join(","));
}

#[test]
fn a_flush_and_increments_never_mix() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    // An increment that read before a flush and wrote after it would go on counting from the old value.
    std::thread::scope(|scope| {
        let flusher = handle.clone();
        scope.spawn(move || {
            let mut client = Client::new(&flusher);
            for _ in 0..200 {
                assert_eq!(client.call(&[b"flushdb"]), "OK");
                let seen: u64 = client.call(&[b"incrby", b"k", b"0"]).parse().unwrap();
                assert!(seen < 5_000);
            }
        });
        let mut client = Client::new(&handle);
        let mut before = 0u64;
        for _ in 0..3000 {
            let value: u64 = client.call(&[b"incr", b"k"]).parse().unwrap();
            assert!(value == before + 1 || value == 1, "{before} then {value}");
            before = value;
        }
    });
}

#[test]
fn what_may_not_run_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    let large = vec![b'x'; LARGE_VALUE_BYTES + 1];
    client.add_with(1, &[b"set", b"k", &large], 0, Epoch(1));
    client.add_with(2, &[b"get", b"k"], 0, Epoch(2));
    let (answers, _) = client.send();
    assert_eq!(answers[0], (Outcome::NeedsLargePermit, String::new()));
    assert_eq!(answers[1], (Outcome::WrongEpoch, "shard 0/0 is at epoch 1, not 2".into()));
    client.add_with(1, &[b"set", b"k", &large], FLAG_LARGE_PERMIT | FLAG_AFTER_REFUSAL, Epoch(1));
    client.add_with(1, &[b"strlen", b"k"], FLAG_LARGE_PERMIT, Epoch(1));
    client.add_with(1, &[b"get", b"k"], 0, Epoch(1));
    let (answers, late) = client.send();
    assert_eq!(answers[0].1, "OK");
    assert_eq!(answers[1].1, large.len().to_string());
    assert_eq!(answers[2], (Outcome::NeedsLargePermit, String::new()));
    assert_eq!(late, 3);
    handle.close();
    client.add(1, &[b"get", b"k"]);
    let (answers, _) = client.send();
    assert_eq!(answers[0].0, Outcome::NotServing);
}

/// Gives a batch to a store and returns how many answers came at once.
fn send_without_waiting(client: &mut Client, words: &[&[u8]]) -> usize {
    client.add(1, words);
    let mut answers = Vec::new();
    client.session.execute(Bytes::from(std::mem::take(&mut client.batch)), &mut answers);
    Answers::new(&answers).count()
}

fn has_late_answers(client: &mut Client) -> bool {
    client.late.poll_next(&mut std::task::Context::from_waker(Waker::noop())).is_ready()
}

/// The late answers of everything that was sent, as text.
fn late_answers(client: &mut Client) -> Vec<String> {
    let (mut found, deadline) = (BTreeMap::new(), Instant::now() + Duration::from_secs(20));
    while found.len() < client.sent.len() {
        assert!(Instant::now() < deadline, "answers are missing");
        match client.late.poll_next(&mut std::task::Context::from_waker(Waker::noop())) {
            Poll::Ready(answers) => {
                let answers = answers.unwrap();
                found.extend(Answers::new(&answers).map(Result::unwrap).map(|answer| (answer.id, show(answer.body))));
            }
            Poll::Pending => std::thread::yield_now(),
        }
    }
    client.sent.clear();
    found.into_values().collect()
}

fn alter(handle: &StoreHandle, fsync: Fsync) {
    let record = handle.records()[0].clone();
    let settings = record.settings.changed_by(&Settings { fsync: Some(fsync), ..Settings::default() });
    handle.put_record(record.with_settings(settings)).unwrap();
}

#[test]
fn under_always_an_answer_leaves_only_after_a_sync() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |config| config.fsync = Fsync::Always);
    let mut client = Client::new(&handle);
    let shard = shard(&handle);
    let before = shard.durability.figures();
    let disk = shard.durability.stall();
    assert_eq!(send_without_waiting(&mut client, &[b"set", b"k", b"v"]), 0);
    // What a reader sees is as durable as what a writer was told.
    assert_eq!(send_without_waiting(&mut client, &[b"get", b"k"]), 0);
    assert!(!has_late_answers(&mut client));
    let stalled = shard.durability.figures();
    assert_eq!((stalled.syncs, stalled.held_batches_now), (before.syncs, 2));
    drop(disk);
    assert_eq!(late_answers(&mut client), ["OK", "v"]);
    let after = shard.durability.figures();
    assert!(after.syncs > before.syncs && after.held_batches_now == 0, "{after:?}");
    // Nothing is written: nothing waits.
    assert_eq!(send_without_waiting(&mut client, &[b"get", b"k"]), 1);
}

#[test]
fn a_change_of_fsync_acts_on_what_is_not_synced_yet_and_outlives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |config| config.fsync = Fsync::Never);
    let mut client = Client::new(&handle);
    assert_eq!(client.call(&[b"set", b"k", b"1"]), "OK");
    let syncs = |handle: &StoreHandle| shard(handle).durability.figures().syncs;
    assert_eq!((syncs(&handle), shard(&handle).durability.figures().lag), (0, None));
    // The write from before is synced when the change is done.
    alter(&handle, Fsync::Always);
    assert_eq!(syncs(&handle), 1);
    assert_eq!(send_without_waiting(&mut client, &[b"get", b"k"]), 1);
    client.sent.clear();
    let opened = shard(&handle);
    let disk = opened.durability.stall();
    assert_eq!(send_without_waiting(&mut client, &[b"incr", b"k"]), 0);
    // Away from `always`: new answers leave at once, those that are held with the sync that they wait for.
    alter(&handle, Fsync::EverySecond);
    assert!(!has_late_answers(&mut client));
    let mut other = Client::new(&handle);
    assert_eq!(send_without_waiting(&mut other, &[b"get", b"k"]), 1);
    drop(disk);
    assert_eq!(late_answers(&mut client), ["2"]);
    let disk = opened.durability.stall();
    alter(&handle, Fsync::Never);
    drop(disk);
    drop((client, other, opened, handle));
    let handle = open(folder.path(), |config| config.fsync = Fsync::Always);
    assert_eq!(shard(&handle).durability.fsync(), Fsync::Never, "the record wins over the option");
    assert_eq!(handle.records()[0].settings.fsync, Some(Fsync::Never));
}

/// A thread that syncs stayed with a shard for as long as it was written to: four of them, and no other shard was ever synced.
#[test]
fn shards_that_always_want_a_sync_leave_others_their_rounds() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let busy = KeyspaceRecord::new(KeyspaceId(1), "busy", &[handle.id(); SYNC_THREADS]).unwrap();
    handle.put_record(busy.with_settings(Settings { fsync: Some(Fsync::Always), ..Settings::default() })).unwrap();
    let map = handle.core().shards.current();
    let shards: Vec<_> = map.serving().filter(|shard| shard.key.keyspace == KeyspaceId(1)).collect();
    assert_eq!(shards.len(), SYNC_THREADS);
    for shard in shards {
        // As if another batch had been written during each sync.
        let pass = Pass::new(&shard.lease, shard.lease.admission(Epoch(1)));
        shard.durability.hold(u64::MAX, None, pass, Vec::new(), Arc::default());
        handle.core().sync_bell.ring();
    }
    assert_eq!(Client::new(&handle).call(&[b"set", b"k", b"1"]), "OK");
    let deadline = Instant::now() + Duration::from_secs(20);
    while shard(&handle).durability.figures().syncs == 0 {
        assert!(Instant::now() < deadline, "its round never came");
        std::thread::yield_now();
    }
}

#[test]
fn always_is_not_confirmed_when_what_was_written_before_cannot_be_synced() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    assert_eq!(Client::new(&handle).call(&[b"set", b"k", b"1"]), "OK");
    let (shard, bell) = (shard(&handle), &handle.core().sync_bell);
    shard.fail("the disk is gone");
    for _ in 0..2 {
        let refused = shard.set_fsync(Fsync::Always, bell).unwrap_err().to_string();
        assert!(refused.contains("the disk is gone"), "{refused}");
    }
}

/// What waited for a lock took for alive what others had seen dead meanwhile, and gave it a longer life.
#[test]
fn a_key_that_expires_while_a_command_waits_for_its_lock_stays_dead() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    assert_eq!(client.call(&[b"set", b"k", b"v", b"px", b"300"]), "OK");
    let expired = Instant::now() + Duration::from_millis(310);
    let core = handle.core();
    let mut set = StripeSet::default();
    set.add_all();
    let mut guards: smallvec::SmallVec<[StripeGuard<'_>; 64]> = smallvec::SmallVec::new();
    assert!(set.lock(&core.stripes, Patience::Unbounded, &mut guards));
    // It goes to the lane, which waits.
    assert_eq!(send_without_waiting(&mut client, &[b"persist", b"k"]), 0);
    while Instant::now() < expired {
        std::thread::yield_now();
    }
    drop(guards);
    assert_eq!(late_answers(&mut client), ["0"]);
    client.sent.clear();
    assert_eq!(client.call(&[b"get", b"k"]), "null");
}

/// `SET k 2` was under way behind a `SET k 1` that was refused: it must not overtake it.
#[test]
fn what_is_behind_a_refusal_is_refused_until_the_gateway_knows() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    client.add_with(1, &[b"set", b"k", b"1"], 0, Epoch(2));
    client.add_with(1, &[b"set", b"k", b"2"], 0, Epoch(1));
    client.add_with(2, &[b"set", b"other", b"x"], 0, Epoch(1));
    let (answers, _) = client.send();
    let outcomes: Vec<Outcome> = answers.iter().map(|answer| answer.0).collect();
    assert_eq!(outcomes, [Outcome::WrongEpoch, Outcome::NotServing, Outcome::Reply]);
    client.add_with(1, &[b"set", b"k", b"3"], 0, Epoch(1));
    assert_eq!(client.send().0[0].0, Outcome::NotServing, "a later batch is behind it as well");
    client.add_with(1, &[b"set", b"k", b"1"], FLAG_AFTER_REFUSAL, Epoch(1));
    client.add_with(1, &[b"set", b"k", b"2"], 0, Epoch(1));
    let (answers, _) = client.send();
    assert!(answers.iter().all(|answer| answer.0 == Outcome::Reply), "{answers:?}");
    assert_eq!(client.call(&[b"get", b"k"]), "2");
}

/// Each shard lets memtables gather before it writes them out; together they must not take more memory than they may.
#[test]
fn memtables_of_many_shards_keep_to_their_memory() {
    const SHARDS: u16 = 12;
    const BUDGET_BYTES: usize = 256 << 20;
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config { data: folder.path().to_owned(), lane_threads: 3, ..Config::default() };
    config.memory.write_buffer_bytes = BUDGET_BYTES;
    let handle = Store::open(config).unwrap().handle();
    let primaries = vec![handle.id(); usize::from(SHARDS)];
    handle.put_record(KeyspaceRecord::new(KeyspaceId(0), "0", &primaries).unwrap()).unwrap();
    let table = SlotTable::new(SHARDS);
    let mut client = Client::new(&handle);
    let value = vec![b'x'; 1 << 20];
    // A little less than what a shard would write out by itself, one shard after the other.
    for shard in (0..SHARDS).map(ShardId) {
        let keys =
            (0..).map(|number: u32| number.to_string()).filter(|key| table.shard(slot_of(key.as_bytes())) == shard);
        for key in keys.take(26) {
            client.add_to(shard, &[b"set", key.as_bytes(), &value]);
            assert_eq!(client.send().0[0].1, "OK");
        }
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while handle.core().engine.memtable_bytes() > BUDGET_BYTES {
        assert!(Instant::now() < deadline, "{} bytes stay", handle.core().engine.memtable_bytes());
        std::thread::yield_now();
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "rows expire by the clock")]
fn compaction_takes_the_space_of_dead_rows_back() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |config| config.gc_grace = Duration::ZERO);
    let mut client = Client::new(&handle);
    let value: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(1000).collect();
    for number in 0..300u32 {
        let key = number.to_string();
        match number % 3 {
            0 => client.add(1, &[b"set", key.as_bytes(), &value, b"px", b"1"]),
            1 => client.add(1, &[b"set", key.as_bytes(), &value]),
            _ => client.add(1, &[b"set", key.as_bytes(), &value, b"ex", b"1000"]),
        }
    }
    client.send();
    for number in 0..100u32 {
        client.add(1, &[b"del", (number * 3 + 1).to_string().as_bytes()]);
    }
    client.send();
    std::thread::sleep(Duration::from_millis(5));
    handle.compact();
    let shard = shard(&handle);
    assert_eq!(shard.database.estimate_keys(), 100);
    assert!(shard.database.disk_bytes() < 150_000, "{}", shard.database.disk_bytes());
    let garbage = shard.database.garbage();
    assert!(garbage.dropped_ns() > 0);
    assert_eq!((garbage.rows_expired(), garbage.tombstones_dropped()), (100, 200));
    assert_eq!(client.call(&[b"dbsize"]), "100");
    client.call(&[b"flushdb"]);
    handle.compact();
    assert_eq!(shard.database.estimate_keys(), 0);
    assert_eq!(client.call(&[b"exists", b"2"]), "0");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "rows expire by the clock")]
fn compaction_leaves_a_tombstone_of_an_expired_row_and_gives_its_value_back() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    let value: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(10_000).collect();
    let physical = |number: u32| {
        let mut physical = Vec::new();
        vasto_proto::key::encode_key_into(&mut physical, number.to_string().as_bytes());
        physical
    };
    for number in 0..200u32 {
        let (key, time) = (number.to_string(), (1000 + number).to_string());
        match number % 2 {
            0 => client.add(1, &[b"set", key.as_bytes(), &value, b"px", b"1"]),
            _ => client.add(1, &[b"set", key.as_bytes(), &value, b"px", b"1", b"EVENTTIME", time.as_bytes()]),
        }
    }
    client.send();
    let shard = shard(&handle);
    let header = |number| {
        let row = shard.database.get(&physical(number), crate::engine::Tier::Disk).unwrap().unwrap();
        let (header, payload) = vasto_proto::row::Header::decode(&row).unwrap();
        (header, payload.len())
    };
    let before: Vec<_> = (0..200).map(header).collect();
    std::thread::sleep(Duration::from_millis(5));
    handle.compact();
    for (number, (expired, length)) in (0..200).zip(&before) {
        assert_eq!((header(number), *length), ((expired.buried(), 0), value.len()), "{number}");
        assert_eq!(expired.written_at_ns != 0, number % 2 == 1);
    }
    assert!(shard.database.disk_bytes() < 50_000, "{}", shard.database.disk_bytes());
    let garbage = shard.database.garbage();
    assert_eq!((garbage.rows_expired(), garbage.tombstones_dropped(), garbage.dropped_ns()), (200, 0, 0));
}

#[test]
fn a_shard_of_an_older_format_is_raised_and_of_a_newer_one_refused() {
    use crate::engine::meta;
    let folder = tempfile::tempdir().unwrap();
    let open_with = |version: u32| {
        let handle = open(folder.path(), |_| {});
        let shard = shard(&handle);
        Client::new(&handle).call(&[b"set", b"k", b"v"]);
        shard.database.put_meta_synced(meta::FORMAT, &version.to_be_bytes()).unwrap();
        handle.close();
    };
    open_with(1);
    {
        let handle = open(folder.path(), |_| {});
        let version = shard(&handle).database.meta(meta::FORMAT).unwrap();
        assert_eq!(version.as_deref(), Some(&meta::FORMAT_VERSION.to_be_bytes()[..]));
        assert_eq!(Client::new(&handle).call(&[b"get", b"k"]), "v");
        handle.close();
    }
    open_with(meta::FORMAT_VERSION + 1);
    let store = Store::open(Config { data: folder.path().to_owned(), ..Config::default() }).unwrap();
    let mut client = Client::new(&store.handle());
    client.add(1, &[b"get", b"k"]);
    let (answers, _) = client.send();
    let path = folder.path().join("shards/0-0");
    let reason = format!(
        "shard 0/0 is not open: {0} cannot be opened: the shard in {0} has format version {1}; this program knows {2} and older",
        path.display(),
        meta::FORMAT_VERSION + 1,
        meta::FORMAT_VERSION
    );
    assert_eq!(answers[0], (Outcome::NotServing, reason));
}

#[test]
fn a_folder_is_used_by_one_process_and_keeps_its_identity() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let again = Store::open(Config { data: folder.path().to_owned(), ..Config::default() });
    assert!(matches!(again.err(), Some(crate::OpenError::InUse(_))));
    handle.set_cluster(vasto_proto::id::ClusterId(7)).unwrap();
    assert!(handle.set_cluster(vasto_proto::id::ClusterId(8)).is_err());
    let record = KeyspaceRecord { epoch: Epoch(2), ..handle.records()[0].clone() };
    handle.put_record(record.clone()).unwrap();
    // An older record changes nothing, another one of the same epoch is refused.
    handle.put_record(KeyspaceRecord { epoch: Epoch(1), ..record.clone() }).unwrap();
    assert!(handle.put_record(KeyspaceRecord { name: "other".into(), ..record.clone() }).is_err());
    let id = handle.id();
    drop(handle);
    let store = Store::open(Config { data: folder.path().to_owned(), ..Config::default() }).unwrap();
    let handle = store.handle();
    assert_eq!((handle.id(), handle.cluster()), (id, vasto_proto::id::ClusterId(7)));
    assert_eq!(handle.records(), std::slice::from_ref(&record));
    assert_eq!(Client::new(&handle).call(&[b"set", b"k", b"v"]), "OK");
    drop((store, handle));
    let file = folder.path().join("records/0");
    let mut content = std::fs::read(&file).unwrap();
    content[9] ^= 1;
    std::fs::write(&file, content).unwrap();
    let damaged = Store::open(Config { data: folder.path().to_owned(), ..Config::default() });
    assert!(matches!(damaged.err(), Some(crate::OpenError::Damaged { .. })));
    std::fs::write(folder.path().join("identity"), "format=3\nstore=1\ncluster=0\n").unwrap();
    let newer = Store::open(Config { data: folder.path().to_owned(), ..Config::default() });
    assert!(matches!(newer.err(), Some(crate::OpenError::NewerFormat { found: 3, .. })));
}

#[test]
fn unknown_commands_and_malformed_batches_harm_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    let head = OperationHead { id: 9, connection: 1, target: SHARD, epoch: Epoch(1), command: 9999, flags: 0 };
    write_operation(&mut client.batch, &head, [b"k".as_slice()]);
    client.sent.push(9);
    let (answers, _) = client.send();
    assert!(answers[0].1.starts_with("-ERR this store is older"), "{}", answers[0].1);
    let mut answers = Vec::new();
    let mut batch = Vec::new();
    let set = OperationHead { command: StoreCommand::Set.code(), ..head };
    write_operation(&mut batch, &set, [b"k".as_slice(), b"v"]);
    batch.push(1);
    assert!(client.session.try_execute(&Bytes::from(batch), &mut answers).is_err());
    assert!(answers.is_empty());
    assert_eq!(client.call(&[b"get", b"k"]), "null");
}

/// Sends a command until it is answered, as a gateway does.
fn call_until_served(client: &mut Client, words: &[&[u8]]) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        client.add_with(1, words, FLAG_AFTER_REFUSAL, Epoch(1));
        match client.send().0.remove(0) {
            (Outcome::Reply, reply) => return reply,
            (Outcome::NotServing, _) => std::thread::yield_now(),
            other => panic!("{other:?}"),
        }
        assert!(Instant::now() < deadline, "the shard is not served again");
    }
}

#[test]
fn a_failed_shard_is_closed_although_sessions_rest_and_serves_again_with_all_that_it_had() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |config| config.fsync = Fsync::Always);
    let mut client = Client::new(&handle);
    let mut resting = Client::new(&handle);
    assert_eq!(resting.call(&[b"set", b"k", b"1"]), "OK");
    for life in 0..3 {
        let value = life.to_string();
        assert_eq!(client.call(&[b"set", b"k", value.as_bytes()]), "OK");
        let before = shard(&handle).instance;
        shard(&handle).fail("IO error: While fdatasync: a test: Input/output error");
        assert_eq!(call_until_served(&mut client, &[b"get", b"k"]), value);
        assert_ne!(shard(&handle).instance, before, "it is the same database");
    }
    assert_eq!(resting.call(&[b"get", b"k"]), "2");
}

#[test]
fn answers_that_wait_for_a_sync_that_will_not_come_are_unknown() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |config| config.fsync = Fsync::Always);
    let mut client = Client::new(&handle);
    assert_eq!(client.call(&[b"set", b"k", b"1"]), "OK");
    shard(&handle).durability.end("a test");
    client.add(1, &[b"set", b"k", b"2"]);
    assert_eq!(client.send().0, [(Outcome::Unknown, "a test".to_owned())]);
}

#[test]
fn a_damaged_shard_refuses_writes_as_errors_and_serves_reads() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    assert_eq!(client.call(&[b"set", b"k", b"1"]), "OK");
    shard(&handle).meet(&EngineError::Corrupt("Corruption: bad block in 000012.sst".into()));
    let [inner_set, inner_get] = [StoreCommand::Set, StoreCommand::Get].map(|command| command.code().to_le_bytes());
    let (one, two) = (1u32.to_le_bytes(), 2u32.to_le_bytes());
    for words in [
        &[b"set".as_slice(), b"k", b"2"] as &[&[u8]],
        &[b"del", b"k"],
        &[b"flushall"],
        &[b"_exec", b"0", &inner_get, &one, b"k", &inner_set, &two, b"k", b"2"],
    ] {
        let refusal = client.call(words);
        assert!(refusal.starts_with("-MISCONF Errors writing to shard 0/0: Corruption: "), "{refusal}");
        assert!(refusal.contains("000012.sst") && refusal.contains("restore"), "{refusal}");
    }
    assert_eq!(client.call(&[b"get", b"k"]), "1");
    assert_eq!(client.call(&[b"_exec", b"0", &inner_get, &one, b"k"]), "1");
}

#[test]
fn a_full_disk_is_probed_until_it_takes_writes_again() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    assert_eq!(client.call(&[b"set", b"k", b"1"]), "OK");
    let before = shard(&handle).instance;
    shard(&handle).meet(&EngineError::Full("IO error: No space left on device: a test".into()));
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let reply = client.call(&[b"set", b"k", b"2"]);
        if reply == "OK" {
            break;
        }
        assert!(reply.starts_with("-MISCONF ") && reply.ends_with("nothing was executed"), "{reply}");
        assert_eq!(client.call(&[b"get", b"k"]), "1", "reads are served");
        assert!(Instant::now() < deadline, "writes are still refused");
        std::thread::yield_now();
    }
    assert_eq!(shard(&handle).instance, before, "it was opened anew without need");
}

#[test]
fn a_shard_whose_folder_is_gone_is_refused_until_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    assert_eq!(Client::new(&handle).call(&[b"set", b"k", b"1"]), "OK");
    handle.close();
    drop(handle);
    let (shard, away) = (folder.path().join("shards/0-0"), folder.path().join("away"));
    std::fs::rename(&shard, &away).unwrap();
    let handle = Store::open(Config { data: folder.path().to_owned(), ..Config::default() }).unwrap().handle();
    let mut client = Client::new(&handle);
    client.add(1, &[b"get", b"k"]);
    let (answers, _) = client.send();
    assert_eq!(answers[0].0, Outcome::NotServing);
    assert!(answers[0].1.contains(&format!("{} is missing", shard.display())), "{}", answers[0].1);
    std::fs::rename(&away, &shard).unwrap();
    assert_eq!(call_until_served(&mut client, &[b"get", b"k"]), "1");
}
