//! Shards that give slots away, in one process: what they own while writers run, and what a target hears.

use super::rows::tests::unpack;
use super::source::{Giving, MESSAGES_MAX};
use crate::StoreHandle;
use crate::engine::Tier;
use crate::shard::Shard;
use crate::shard::executor::now_ns;
use crate::shard::tests::{Client, open, shard};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vasto_proto::batch::{FLAG_AFTER_REFUSAL, FLAG_LARGE_PERMIT, Outcome, with_shard_count};
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::key::encode_key_into;
use vasto_proto::pb;
use vasto_proto::pb::move_message::Kind;
use vasto_proto::row::Header;
use vasto_proto::slot::slot_of;
use vasto_proto::topology::{KeyspaceRecord, Layout, SlotSet};

const SHARD: ShardKey = ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) };
const TARGET: ShardId = ShardId(1);
/// Another store, which is not there.
const OTHER: StoreId = StoreId(7);

/// A seed of the clock, or the one that VASTO_SEED says.
fn seed() -> u64 {
    let seed = std::env::var("VASTO_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(now_ns);
    eprintln!("VASTO_SEED={seed}");
    seed
}

/// A store with one shard, half of whose slots are on their way to a second shard of another store.
fn copying(handle: &StoreHandle) -> (KeyspaceRecord, SlotSet) {
    let first = handle.records().remove(0);
    let record = first.begin_resize(2, vec![OTHER]).unwrap();
    handle.put_record(record.clone()).unwrap();
    let leaving = Layout::of(&record).leaving(SHARD.shard);
    (record, leaving)
}

fn put(handle: &StoreHandle, record: KeyspaceRecord) -> KeyspaceRecord {
    handle.put_record(record.clone()).unwrap();
    record
}

/// All physical rows in slots.
fn rows_of(shard: &Shard, slots: &SlotSet) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut rows = BTreeMap::new();
    let mut walk = shard.database.walk();
    walk.seek(&[]);
    while let Some((key, row)) = walk.key().zip(walk.value()) {
        if slots.contains(u16::from_be_bytes(*key.first_chunk().unwrap())) {
            rows.insert(key.to_vec(), row.to_vec());
        }
        walk.next();
    }
    walk.status().unwrap();
    rows
}

/// Lets others end, also when a test fails before it says so.
struct EndsOthers<'o>(&'o AtomicBool);

impl Drop for EndsOthers<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn ask(client: &mut Client, shard_count: u16, words: &[&[u8]]) -> (Outcome, String) {
    let flags = with_shard_count(FLAG_LARGE_PERMIT | FLAG_AFTER_REFUSAL, shard_count);
    client.add_head(SHARD, 1, words, flags, Epoch(1));
    client.send().0.remove(0)
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} does not come about");
        std::thread::yield_now();
    }
}

#[test]
fn nothing_of_a_slot_that_was_taken_away_is_written_or_read_any_more() {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let (mut record, leaving) = copying(&handle);
    let is_over = AtomicBool::new(false);
    let keys: Vec<String> = (0..200).map(|number| format!("key:{number}")).collect();
    let acknowledged = std::thread::scope(|scope| {
        let _over = EndsOthers(&is_over);
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (handle, keys, is_over) = (&handle, &keys, &is_over);
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed ^ writer);
                    let mut client = Client::new(handle);
                    let mut acknowledged = BTreeMap::<String, u64>::new();
                    while !is_over.load(Ordering::Relaxed) {
                        // One by one, so that each is refused or run for itself.
                        let key = &keys[random.usize(..keys.len())];
                        let words: &[&[u8]] =
                            if random.bool() { &[b"incr", key.as_bytes()] } else { &[b"get", key.as_bytes()] };
                        let (outcome, _) = ask(&mut client, 2, words);
                        assert!(matches!(outcome, Outcome::Reply | Outcome::WrongEpoch), "{outcome:?}");
                        if outcome == Outcome::Reply && words.len() == 2 && words[0] == b"incr" {
                            *acknowledged.entry(key.clone()).or_default() += 1;
                        }
                    }
                    acknowledged
                })
            })
            .collect();
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = Client::new(&handle);
        for _ in 0..20 {
            record = put(&handle, record.fence().unwrap());
            let before = rows_of(&shard(&handle), &leaving);
            for _ in 0..random.usize(..200) {
                let key = &keys[random.usize(..keys.len())];
                let (outcome, text) = ask(&mut client, 2, &[b"get", key.as_bytes()]);
                let is_gone = leaving.contains(slot_of(key.as_bytes()));
                assert_eq!(outcome == Outcome::WrongEpoch, is_gone, "{key}: {outcome:?} {text}");
            }
            assert!(rows_of(&shard(&handle), &leaving) == before, "rows behind a fence have changed");
            record = put(&handle, record.unfence().unwrap());
        }
        is_over.store(true, Ordering::Relaxed);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
    });
    let mut client = Client::new(&handle);
    for key in &keys {
        let count: u64 = acknowledged.iter().filter_map(|counts| counts.get(key)).sum();
        let expected = if count == 0 { "null".to_owned() } else { count.to_string() };
        assert_eq!(ask(&mut client, 2, &[b"get", key.as_bytes()]), (Outcome::Reply, expected), "{key}");
    }
}

#[test]
fn what_covers_slots_is_refused_by_another_number_of_shards_and_behind_a_fence() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    for number in 0..100 {
        client.call(&[b"set", format!("key:{number}").as_bytes(), b"v"]);
    }
    let commands: [&[&[u8]]; 6] = [
        &[b"dbsize"],
        &[b"keys", b"*"],
        &[b"randomkey"],
        &[b"_scan", b"0", b"16383", b"10", b"", b""],
        &[b"_stats"],
        &[b"flushdb"],
    ];
    assert_eq!(ask(&mut client, 2, commands[0]).0, Outcome::WrongEpoch);
    assert_eq!((ask(&mut client, 0, commands[0]).1, ask(&mut client, 1, commands[0]).1), ("100".into(), "100".into()));
    let (record, leaving) = copying(&handle);
    for command in commands {
        assert_eq!(ask(&mut client, 2, command).0, Outcome::WrongEpoch, "{command:?}");
        // A gateway that says nothing may have the old number.
        assert_eq!(ask(&mut client, 0, command).0, Outcome::WrongEpoch, "{command:?}");
    }
    assert_eq!(ask(&mut client, 1, commands[0]).1, "100");
    let record = put(&handle, record.fence().unwrap());
    for command in commands {
        assert_eq!(ask(&mut client, 1, command).0, Outcome::NotServing, "{command:?}");
    }
    let kept = (0..100).filter(|number| !leaving.contains(slot_of(format!("key:{number}").as_bytes()))).count();
    assert!(kept > 0 && kept < 100);
    put(&handle, record.commit().unwrap());
    assert_eq!(ask(&mut client, 1, commands[0]).0, Outcome::WrongEpoch);
    assert_eq!(ask(&mut client, 2, commands[0]).1, kept.to_string(), "rows of slots that have gone are hidden");
    assert_eq!(ask(&mut client, 2, commands[1]).1.split(',').count(), kept);
    assert_eq!(ask(&mut client, 2, commands[5]).1, "OK");
    assert_eq!(ask(&mut client, 2, commands[0]).1, "0");
}

#[test]
fn a_walk_that_was_under_way_when_slots_changed_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let mut client = Client::new(&handle);
    let keys: Vec<String> = (0..30_000).map(|number| format!("key:{number}")).collect();
    for chunk in keys.chunks(1000) {
        let words: Vec<&[u8]> =
            std::iter::once(&b"mset"[..]).chain(chunk.iter().flat_map(|key| [key.as_bytes(), b"v"])).collect();
        client.call(&words);
    }
    let (mut record, _) = copying(&handle);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let mut client = Client::new(&handle);
            let (mut whole, mut changed) = (0, 0);
            until("a walk meets a change", || {
                match ask(&mut client, 1, &[b"keys", b"*"]) {
                    (Outcome::Reply, found) => {
                        assert_eq!(found.split(',').count(), keys.len(), "a walk has missed keys");
                        whole += 1;
                    }
                    (Outcome::WrongEpoch, text) => {
                        assert!(text.contains("have changed meanwhile"), "{text}");
                        changed += 1;
                    }
                    (outcome, _) => assert_eq!(outcome, Outcome::NotServing),
                }
                whole > 0 && changed > 0
            });
            is_over.store(true, Ordering::Relaxed);
        });
        let mut pause = 0;
        while !is_over.load(Ordering::Relaxed) && !walker.is_finished() {
            record = put(&handle, record.fence().unwrap());
            record = put(&handle, record.unfence().unwrap());
            // Longer and longer, so that walks come to their ends as well.
            pause += 1;
            std::thread::park_timeout(Duration::from_millis(pause));
        }
    });
}

/// A target that only keeps what it hears, and checks the order of it.
struct Listener {
    runtime: tokio::runtime::Runtime,
    messages: mpsc::Receiver<Result<pb::MoveMessage, String>>,
    slots: Vec<u16>,
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
    unfinished: Option<(Vec<u8>, Vec<u8>)>,
    last_copied: Vec<u8>,
    complete: usize,
    groups: usize,
    starts: usize,
    largest_message: usize,
}

impl Listener {
    fn new(handle: &StoreHandle, record: &KeyspaceRecord) -> Result<Self, String> {
        let open = pb::MoveOpen {
            store_id: OTHER.0,
            keyspace_id: 0,
            source: 0,
            target: TARGET.0.into(),
            operation: record.operation.as_ref().map_or(0, |operation| operation.id),
            source_epoch: 1,
        };
        let giving = Giving::new(handle.core(), &open, SHARD, TARGET)?;
        let (outgoing, messages) = mpsc::channel(MESSAGES_MAX);
        handle.core().replicator.spawn(giving.run(outgoing, CancellationToken::new()));
        Ok(Self {
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            messages,
            slots: Layout::of(record).leaving(SHARD.shard).iter().collect(),
            rows: BTreeMap::new(),
            unfinished: None,
            last_copied: Vec::new(),
            complete: 0,
            groups: 0,
            starts: 0,
            largest_message: 0,
        })
    }

    /// Takes the next message; an end is returned, and so is why there are no more.
    fn hear(&mut self) -> Result<Option<pb::MoveEnd>, String> {
        let deadline = Duration::from_secs(60);
        let messages = &mut self.messages;
        let heard = self.runtime.block_on(async { tokio::time::timeout(deadline, messages.recv()).await });
        let Some(message) = heard.expect("the source is silent") else { return Err("it has ended".to_owned()) };
        match message?.kind.unwrap() {
            Kind::Start(start) => {
                assert_eq!(start.slots as usize, self.slots.len());
                self.starts += 1;
                self.rows.clear();
                (self.unfinished, self.complete, self.groups) = (None, 0, 0);
                self.last_copied.clear();
            }
            Kind::Copied(rows) => {
                for (key, row, goes_on) in self.take(&rows) {
                    assert!(key > self.last_copied || self.unfinished.is_some(), "copied rows are not in order");
                    self.keep(key.clone(), row, goes_on);
                    self.last_copied = key;
                }
            }
            Kind::GroupEnd(end) => {
                assert!(self.unfinished.is_none() && end.slots_complete as usize >= self.complete);
                self.complete = end.slots_complete as usize;
                self.groups += 1;
            }
            Kind::Changed(rows) => {
                for (key, row, goes_on) in self.take(&rows) {
                    let slot = u16::from_be_bytes(*key.first_chunk().unwrap());
                    assert!(
                        self.slots[..self.complete].contains(&slot),
                        "a change of slot {slot}, which is not complete"
                    );
                    self.keep(key, row, goes_on);
                }
            }
            Kind::Progress(_) => {}
            Kind::End(end) => {
                assert_eq!((self.complete, self.unfinished.is_some()), (self.slots.len(), false));
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn take(&mut self, rows: &pb::MovedRows) -> Vec<super::rows::tests::Piece> {
        self.largest_message = self.largest_message.max(rows.unpacked_bytes as usize).max(rows.packed.len());
        unpack(rows)
    }

    fn keep(&mut self, key: Vec<u8>, piece: Vec<u8>, goes_on: bool) {
        let (begun, mut row) = self.unfinished.take().unwrap_or_else(|| (key.clone(), Vec::new()));
        assert_eq!(begun, key, "a row is interrupted by another");
        row.extend(piece);
        if goes_on {
            self.unfinished = Some((key, row));
        } else {
            self.rows.insert(key, row);
        }
    }

    /// Until the fence of this epoch.
    fn drain(&mut self, fence: Epoch) -> pb::MoveEnd {
        loop {
            if let Some(end) = self.hear().unwrap()
                && end.fence == fence.0
            {
                return end;
            }
        }
    }
}

/// Rows that clients see.
fn alive(rows: &BTreeMap<Vec<u8>, Vec<u8>>, now_ms: u64, flush_ns: u64) -> BTreeMap<&[u8], &[u8]> {
    let is_alive = |row: &[u8]| {
        let (header, _) = Header::decode(row).unwrap();
        header.is_alive(now_ms) && header.stamp.ns > flush_ns
    };
    rows.iter().filter(|(_, row)| is_alive(row)).map(|(key, row)| (&key[..], &row[..])).collect()
}

fn agree(listener: &Listener, shard: &Shard, leaving: &SlotSet) -> usize {
    let there = rows_of(shard, leaving);
    let now_ms = now_ns() / 1_000_000;
    let (there, here) = (alive(&there, now_ms, shard.flush_ns()), alive(&listener.rows, now_ms, 0));
    let (missing, more): (Vec<_>, Vec<_>) = (
        there.keys().filter(|key| !here.contains_key(*key)).collect(),
        here.keys().filter(|key| !there.contains_key(*key)).collect(),
    );
    assert!(missing.is_empty() && more.is_empty(), "{missing:?} are missing, {more:?} are too many");
    assert!(here == there, "rows differ");
    here.len()
}

/// A key in a slot that leaves.
fn key_in(leaving: &SlotSet, prefix: &str) -> String {
    (0..).map(|number| format!("{prefix}{number}")).find(|key| leaving.contains(slot_of(key.as_bytes()))).unwrap()
}

#[test]
fn a_target_ends_with_the_rows_of_its_slots_while_writers_run() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |config| {
        config.gc_grace = if random.bool() { Duration::ZERO } else { Duration::from_secs(3600) };
        config.resize_bytes_per_second = if random.bool() { 0 } else { 32_000_000 };
    });
    let leaving = Layout::of(&handle.records()[0].begin_resize(2, vec![OTHER]).unwrap()).leaving(SHARD.shard);
    // More than a group in one slot, and rows that no message has room for.
    let tag = key_in(&leaving, "tag");
    let mut client = Client::new(&handle);
    let noise: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(3000).collect();
    for number in 0..15_000 {
        client.add_head(SHARD, 1, &[b"set", format!("{{{tag}}}:{number}").as_bytes(), &noise], 0, Epoch(1));
        if number % 100 == 99 {
            client.send();
        }
    }
    let large = [key_in(&leaving, "large"), key_in(&leaving, "larger")];
    client.call(&[b"set", large[0].as_bytes(), &vec![b'x'; 5_000_000]]);
    for number in 0..5000 {
        client.add_head(SHARD, 1, &[b"set", format!("key:{number}").as_bytes(), b"before"], 0, Epoch(1));
    }
    client.send();

    let (mut record, _) = copying(&handle);
    let mut listener = Listener::new(&handle, &record).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = EndsOthers(&is_over);
        let writers: Vec<_> = (0..3u64)
            .map(|writer| {
                let (handle, is_over, tag, large) = (&handle, &is_over, &tag, &large);
                let mut random = fastrand::Rng::with_seed(seed ^ writer << 32);
                scope.spawn(move || {
                    let mut client = Client::new(handle);
                    let mut round = 0u64;
                    while !is_over.load(Ordering::Relaxed) {
                        round += 1;
                        for _ in 0..20 {
                            let key = match random.u8(..10) {
                                0..4 => format!("{{{tag}}}:{}", random.u32(..16_000)),
                                _ => format!("key:{}", random.u32(..6000)),
                            };
                            let key = key.as_bytes();
                            let flags = with_shard_count(FLAG_LARGE_PERMIT | FLAG_AFTER_REFUSAL, 1);
                            let words: &[&[u8]] = match random.u8(..10) {
                                0 | 1 => &[b"del", key],
                                2 => &[b"append", key, b"+"],
                                3 => &[b"set", key, b"short", b"px", b"2"],
                                _ => &[b"set", key, &round.to_le_bytes()],
                            };
                            // On a connection of its own each: behind a refusal nothing else is refused.
                            client.add_head(SHARD, random.u32(..), words, flags, Epoch(1));
                        }
                        if writer == 0 && round.is_multiple_of(64) {
                            let value = vec![round as u8; 3_000_000];
                            let key = large[random.usize(..2)].as_bytes();
                            client.add_head(
                                SHARD,
                                1,
                                &[b"set", key, &value],
                                FLAG_LARGE_PERMIT | FLAG_AFTER_REFUSAL,
                                Epoch(1),
                            );
                        }
                        client.send();
                    }
                })
            })
            .collect();
        let mut flusher = Client::new(&handle);
        let (mut flushes, mut drained) = (0, 0);
        while drained < 4 {
            // Some way into it, everything is flushed, twice.
            let heard = random.usize(20..200);
            (0..heard).for_each(|_| assert_eq!(listener.hear(), Ok(None), "no fence stands"));
            if flushes < 2 {
                flushes += 1;
                assert_eq!(ask(&mut flusher, 1, &[b"flushdb"]), (Outcome::Reply, "OK".to_owned()));
                let starts = listener.starts;
                while listener.starts == starts {
                    assert_eq!(listener.hear(), Ok(None));
                }
                continue;
            }
            if random.bool() {
                handle.compact();
            }
            let (fencing, at) = (&handle, record.fence().unwrap());
            record = at.clone();
            // The stream must be heard meanwhile: its messages take no more than they may.
            let fenced = scope.spawn(move || put(fencing, at));
            let end = listener.drain(record.operation.as_ref().unwrap().fence);
            fenced.join().unwrap();
            let shard = shard(&handle);
            assert!(agree(&listener, &shard, &leaving) > 0);
            let newest = listener.rows.values().map(|row| Header::decode(row).unwrap().0.stamp.ns).max();
            assert!(newest <= Some(end.stamps_above_ns) && end.dropped_ns >= shard.flush_ns());
            drained += 1;
            record = put(&handle, record.unfence().unwrap());
        }
        is_over.store(true, Ordering::Relaxed);
        // They may wait for what only the listener makes room for.
        while writers.iter().any(|writer| !writer.is_finished()) {
            assert_eq!(listener.hear(), Ok(None));
        }
    });
    assert_eq!(listener.starts, 3, "once, and once for each flush");
    assert!(listener.largest_message <= 600 << 10, "{} bytes in one message", listener.largest_message);

    // It ends with the move.
    put(&handle, record.abort("a test").unwrap());
    let reason = loop {
        match listener.hear() {
            Ok(_) => {}
            Err(reason) => break reason,
        }
    };
    assert!(reason.contains("do not leave any more"), "{reason}");
    until("nothing is noted any more", || !shard(&handle).changes.is_on());
    assert!(Listener::new(&handle, &record).is_err());
}

#[test]
fn a_huge_slot_comes_in_several_groups_and_a_deletion_that_is_forgotten_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |config| {
        config.gc_grace = Duration::ZERO;
        config.resize_bytes_per_second = 0;
    });
    let leaving = Layout::of(&handle.records()[0].begin_resize(2, vec![OTHER]).unwrap()).leaving(SHARD.shard);
    let tag = key_in(&leaving, "tag");
    let mut client = Client::new(&handle);
    let value = vec![b'v'; 100_000];
    let keys: Vec<String> = (0..1000).map(|number| format!("{{{tag}}}:{number}")).collect();
    keys.iter().for_each(|key| assert_eq!(client.call(&[b"set", key.as_bytes(), &value]), "OK"));
    let (record, _) = copying(&handle);
    let mut listener = Listener::new(&handle, &record).unwrap();
    while listener.complete < listener.slots.len() {
        assert_eq!(listener.hear(), Ok(None));
    }
    assert!(listener.groups >= 3, "{} groups", listener.groups);
    assert_eq!(listener.rows.len(), keys.len());

    let mut physical = Vec::new();
    encode_key_into(&mut physical, keys[7].as_bytes());
    let shard = shard(&handle);
    // What compaction has dropped before it is looked up is nowhere any more.
    client.call(&[b"del", keys[7].as_bytes()]);
    let end = loop {
        handle.compact();
        if shard.database.get(&physical, Tier::Disk).unwrap().is_none() {
            break shard.database.garbage().dropped_ns();
        }
    };
    shard.changes.wrote(std::iter::once(physical.as_slice()));
    let fenced = put(&handle, record.fence().unwrap());
    let told = listener.drain(fenced.operation.as_ref().unwrap().fence);
    assert!(told.dropped_ns >= end);
    let (header, _) = Header::decode(&listener.rows[&physical]).unwrap();
    assert!(!header.is_alive(0) && header.stamp.ns <= told.dropped_ns);
    assert_eq!(agree(&listener, &shard, &leaving), keys.len() - 1);
}

#[test]
fn a_target_is_refused_that_names_what_no_record_says_and_a_newer_stream_ends_an_older_one() {
    let folder = tempfile::tempdir().unwrap();
    let handle = open(folder.path(), |_| {});
    let before = handle.records().remove(0);
    let refused = Listener::new(&handle, &before).err().unwrap();
    assert!(refused.contains("no record here"), "{refused}");
    let (record, leaving) = copying(&handle);
    let open = |operation, source_epoch, target| pb::MoveOpen {
        store_id: OTHER.0,
        keyspace_id: 0,
        source: 0,
        target,
        operation,
        source_epoch,
    };
    let operation = record.epoch.0;
    for (open, target) in
        [(open(operation + 1, 1, 1), TARGET), (open(operation, 2, 1), TARGET), (open(operation, 1, 2), ShardId(2))]
    {
        assert!(Giving::new(handle.core(), &open, SHARD, target).is_err(), "{open:?}");
    }
    let mut first = Listener::new(&handle, &record).unwrap();
    let mut second = Listener::new(&handle, &record).unwrap();
    let reason = loop {
        match first.hear() {
            Ok(_) => {}
            Err(reason) => break reason,
        }
    };
    assert!(reason.contains("another stream"), "{reason}");
    Client::new(&handle).call(&[b"set", key_in(&leaving, "key").as_bytes(), b"1"]);
    let fenced = put(&handle, record.fence().unwrap());
    second.drain(fenced.epoch);
    assert_eq!(agree(&second, &shard(&handle), &leaving), 1);
    let keys: BTreeSet<&[u8]> = second.rows.keys().map(Vec::as_slice).collect();
    assert_eq!(keys.len(), 1);
    drop(second);
    let shard: Arc<Shard> = shard(&handle);
    until("whoever went is forgotten", || !shard.changes.is_on());
}
