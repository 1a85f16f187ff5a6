//! Stores that move slots between each other over real connections, driven by records without a master.

use super::note::Rows;
use crate::engine::Tier;
use crate::replication::tests::{Running, eventually};
use crate::shard::Shard;
use crate::shard::map::Entry;
use crate::shard::tests::copy_folder;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use vasto_proto::batch::{Answers, FLAG_AFTER_REFUSAL, OperationHead, Outcome, with_shard_count, write_operation};
use vasto_proto::command::Reply;
use vasto_proto::command::table::{Command, find};
use vasto_proto::id::{KeyspaceId, ShardId, ShardKey, StoreId};
use vasto_proto::row::Header;
use vasto_proto::slot::{SlotTable, slot_of};
use vasto_proto::topology::{
    HolderGroup, KeyspaceRecord, Layout, MoveStage, MoveStatus, Peers, Role, Settings, ShardStatus,
};

/// Stores, of which the first have a shard each.
struct Cluster {
    _folder: tempfile::TempDir,
    data: Vec<PathBuf>,
    ids: Vec<StoreId>,
    running: Vec<Option<Running>>,
    record: KeyspaceRecord,
    copied: u32,
    next_id: u32,
}

impl Cluster {
    fn new(stores: usize, shards: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<PathBuf> = (0..stores).map(|number| folder.path().join(number.to_string())).collect();
        let running: Vec<_> = data.iter().map(|data| Some(Running::start(data))).collect();
        let ids: Vec<StoreId> = running.iter().flatten().map(|running| running.handle.id()).collect();
        // There are no holders here, and so no leases.
        let settings = Settings { min_replicas: Some(0), strict: Some(false), ..Settings::default() };
        let record = KeyspaceRecord { settings, ..KeyspaceRecord::new(KeyspaceId(0), "0", &ids[..shards]).unwrap() };
        let cluster = Self { _folder: folder, data, ids, running, record, copied: 0, next_id: 0 };
        cluster.spread();
        cluster
    }

    /// All that run hear where the others are, and the record.
    fn spread(&self) {
        let addresses = self.ids.iter().zip(&self.running);
        let addresses = addresses.filter_map(|(id, running)| Some((*id, running.as_ref()?.address.clone()))).collect();
        let peers = Peers { addresses, group: HolderGroup::default() };
        for running in self.running.iter().flatten() {
            running.handle.set_peers(peers.clone()).unwrap();
        }
        // Who gives slots away hears first, as the order must not matter.
        for running in self.running.iter().flatten() {
            running.handle.put_record(self.record.clone()).unwrap();
        }
    }

    fn follow(&mut self, record: KeyspaceRecord) {
        self.record = record;
        self.spread();
    }

    fn stop(&mut self, number: usize) {
        self.running[number].take().unwrap().stop();
    }

    /// As kill -9.
    fn kill(&mut self, number: usize) {
        self.copied += 1;
        let copy = self.data[number].with_extension(self.copied.to_string());
        copy_folder(&self.data[number], &copy);
        self.stop(number);
        self.data[number] = copy;
    }

    fn start(&mut self, number: usize) {
        self.running[number] = Some(Running::start(&self.data[number]));
        self.spread();
    }

    fn shard_on(&self, number: usize, shard: u16) -> Option<Arc<Shard>> {
        let key = ShardKey { keyspace: KeyspaceId(0), shard: ShardId(shard) };
        match self.running[number].as_ref()?.handle.core().shards.current().entry(key) {
            Some(Entry::Serving(shard)) => Some(Arc::clone(shard)),
            _ => None,
        }
    }

    /// The store that leads a shard.
    fn leader(&self, shard: u16) -> usize {
        let primary = self.record.shards[usize::from(shard)].primary;
        self.ids.iter().position(|id| *id == primary).unwrap()
    }

    fn shard(&self, shard: u16) -> Arc<Shard> {
        self.shard_on(self.leader(shard), shard).unwrap()
    }

    fn status(&self, shard: u16) -> Option<ShardStatus> {
        let statuses = self.running[self.leader(shard)].as_ref()?.handle.shard_statuses();
        statuses.into_iter().find(|status| status.key.shard.0 == shard)
    }

    fn moves(&self, target: u16) -> Vec<MoveStatus> {
        self.status(target).map(|status| status.moves).unwrap_or_default()
    }

    fn all_moves_are(&self, target: u16, count: usize, stage: MoveStage) -> bool {
        let moves = self.moves(target);
        moves.len() == count && moves.iter().all(|part| part.stage == stage)
    }

    /// Lets the slots go over, by which everything has been copied.
    fn go_over(&mut self, targets: &[u16], sources: usize) {
        for target in targets {
            eventually("everything is copied", || self.all_moves_are(*target, sources, MoveStage::Follows));
        }
        self.follow(self.record.fence().unwrap());
        let fence = self.record.operation.as_ref().unwrap().fence;
        for target in targets {
            eventually("everything has come", || self.all_moves_are(*target, sources, MoveStage::Drained { fence }));
        }
        self.follow(self.record.commit().unwrap());
    }

    fn finish(&mut self) {
        self.follow(self.record.clean().unwrap());
        self.cleaned();
        self.follow(self.record.finish().unwrap());
        self.cleaned();
    }

    /// Waits until no shard has rows that are not its own, and sees to it that this is so.
    fn cleaned(&self) {
        for shard in 0..self.record.shard_count() {
            eventually("foreign rows are deleted", || {
                self.status(shard).is_some_and(|status| status.serves && !status.has_foreign_rows)
            });
            let open = self.shard(shard);
            let served = Layout::of(&self.record).served(ShardId(shard));
            let left = open.database.slots_with_rows(&served.complement()).unwrap();
            assert!(left.is_empty(), "shard {shard} has rows of {} slots", left.len());
            assert_eq!(open.takes.note().rows, Rows::Clean);
        }
    }

    /// Runs a command where the record says, again as long as nothing was executed.
    fn ask(&mut self, words: &[&str]) -> String {
        let key = words[1].as_bytes();
        let shard = SlotTable::new(self.record.shard_count()).shard(slot_of(key));
        let mut reply = String::new();
        eventually("a refusal ends", || {
            let (outcome, text) = self.ask_once(shard, words);
            reply = text;
            outcome == Outcome::Reply
        });
        reply
    }

    fn ask_once(&mut self, shard: ShardId, words: &[&str]) -> (Outcome, String) {
        let Some(Command::Store(command)) = find(words[0].as_bytes()) else { panic!("{words:?}") };
        self.next_id += 1;
        let target = ShardKey { keyspace: KeyspaceId(0), shard };
        let epoch = self.record.shards[usize::from(shard.0)].epoch;
        let flags = with_shard_count(FLAG_AFTER_REFUSAL, self.record.shard_count());
        let id = self.next_id;
        let head = OperationHead { id, connection: 1, target, epoch, command: command.code(), flags };
        let mut batch = Vec::new();
        write_operation(&mut batch, &head, words[1..].iter().map(|word| word.as_bytes()));
        let leader = self.leader(shard.0);
        let (mut session, mut late) = self.running[leader].as_ref().unwrap().handle.open_session();
        let mut answers = Vec::new();
        session.execute(Bytes::from(batch), &mut answers);
        let read = |answers: &[u8]| {
            let answer = Answers::new(answers).map(|answer| answer.unwrap()).find(|answer| answer.id == id)?;
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
        };
        let mut answer = read(&answers);
        eventually("there is an answer", || {
            if answer.is_none()
                && let Poll::Ready(answers) = late.poll_next(&mut Context::from_waker(Waker::noop()))
            {
                answer = read(&answers.unwrap());
            }
            answer.is_some()
        });
        answer.unwrap()
    }

    /// Writes keys of a name and remembers them.
    fn fill(&mut self, expected: &mut BTreeMap<String, String>, name: &str, count: usize) {
        for number in 0..count {
            let (key, value) = (format!("{name}{number}"), format!("value {name} {}", "v".repeat(number % 300)));
            self.ask(&["set", &key, &value]);
            expected.insert(key, value);
        }
    }

    fn delete(&mut self, expected: &mut BTreeMap<String, String>, key: &str) {
        self.ask(&["del", key]);
        expected.remove(key);
    }

    /// Whether the keys are what they should be, each with the shard that has it.
    fn check(&mut self, expected: &BTreeMap<String, String>) {
        let mut found = BTreeMap::new();
        let table = SlotTable::new(self.record.shard_count());
        for shard in 0..self.record.shard_count() {
            let open = self.shard(shard);
            let mut walk = open.database.walk();
            walk.seek(&[]);
            while let Some((key, row)) = walk.key().zip(walk.value()) {
                let (header, payload) = Header::decode(row).unwrap();
                let user_key = &key[2..];
                let is_own = table.shard(slot_of(user_key)) == ShardId(shard);
                if is_own && header.is_alive(0) && header.stamp.ns > open.flush_ns() {
                    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                    assert!(found.insert(text(user_key), text(payload)).is_none());
                }
                walk.next();
            }
        }
        assert!(found == *expected, "{} keys for {}", found.len(), expected.len());
        for (key, value) in expected.iter().step_by(37) {
            assert_eq!(self.ask(&["get", key]), *value);
        }
    }
}

/// All rows of one copy.
fn rows(shard: &Shard) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut walk = shard.database.walk();
    walk.seek(&[]);
    let mut rows = Vec::new();
    while let Some((key, row)) = walk.key().zip(walk.value()) {
        rows.push((key.to_vec(), row.to_vec()));
        walk.next();
    }
    rows
}

#[test]
fn a_keyspace_grows_and_shrinks_and_every_key_is_where_the_record_says() {
    let mut cluster = Cluster::new(3, 1);
    let mut expected = BTreeMap::new();
    cluster.fill(&mut expected, "first", 1000);
    let places = vec![cluster.ids[1], cluster.ids[2]];
    cluster.follow(cluster.record.begin_resize(3, places).unwrap());
    for target in [1, 2] {
        eventually("everything is copied", || cluster.all_moves_are(target, 1, MoveStage::Follows));
        let moved = cluster.moves(target).remove(0);
        let coming: Vec<_> =
            expected.keys().filter(|key| SlotTable::new(3).shard(slot_of(key.as_bytes())).0 == target).collect();
        assert_eq!((moved.rows_copied as usize, moved.attempts), (coming.len(), 1), "{moved:?}");
        assert_eq!(moved.slots_copied, moved.slots);
    }
    // They go on being the first shard's.
    cluster.fill(&mut expected, "second", 500);
    for number in 0..300 {
        cluster.delete(&mut expected, &format!("first{number}"));
    }
    cluster.go_over(&[1, 2], 1);
    cluster.check(&expected);
    for shard in [1, 2] {
        cluster.fill(&mut expected, &format!("third{shard}"), 100);
    }
    cluster.check(&expected);
    cluster.finish();
    cluster.check(&expected);
    assert!(cluster.shard(0).database.disk_bytes() < 10 << 20);

    // Back to one: rows come from two shards to one that serves.
    cluster.follow(cluster.record.begin_resize(1, Vec::new()).unwrap());
    cluster.fill(&mut expected, "fourth", 300);
    for number in 300..500 {
        cluster.delete(&mut expected, &format!("first{number}"));
    }
    cluster.go_over(&[0], 2);
    cluster.check(&expected);
    cluster.finish();
    cluster.check(&expected);
    assert_eq!(cluster.record.shards.len(), 1);
    let folder = cluster.data[1].join("shards/0-1");
    eventually("the folder of a shard that is gone is deleted", || !folder.exists());
}

#[test]
fn an_aborted_move_leaves_nothing() {
    let mut cluster = Cluster::new(2, 2);
    let mut expected = BTreeMap::new();
    cluster.fill(&mut expected, "key", 1000);
    let before = rows(&cluster.shard(0));
    for fenced in [false, true] {
        cluster.follow(cluster.record.begin_resize(1, Vec::new()).unwrap());
        eventually("everything is copied", || cluster.all_moves_are(0, 1, MoveStage::Follows));
        assert!(cluster.status(0).unwrap().has_foreign_rows);
        assert!(rows(&cluster.shard(0)).len() > before.len());
        if fenced {
            cluster.follow(cluster.record.fence().unwrap());
            let fence = cluster.record.operation.as_ref().unwrap().fence;
            eventually("everything has come", || cluster.all_moves_are(0, 1, MoveStage::Drained { fence }));
        }
        cluster.follow(cluster.record.abort("a test").unwrap());
        cluster.cleaned();
        assert_eq!(rows(&cluster.shard(0)), before);
        assert!(cluster.moves(0).is_empty());
        cluster.check(&expected);
    }
    // A shard that never had a slot goes with its folder.
    cluster.follow(cluster.record.begin_resize(3, vec![cluster.ids[0]]).unwrap());
    eventually("everything is copied", || cluster.all_moves_are(2, 2, MoveStage::Follows));
    let folder = cluster.data[0].join("shards/0-2");
    assert!(folder.exists());
    cluster.follow(cluster.record.abort("a test").unwrap());
    eventually("the folder is deleted", || !folder.exists());
    cluster.check(&expected);
}

#[test]
fn copies_of_a_target_get_its_rows_and_its_deletions_through_the_log() {
    let mut cluster = Cluster::new(3, 2);
    cluster.record.shards[0].replicas = vec![cluster.ids[2]];
    cluster.record.copies = 2;
    cluster.record.epoch.0 += 1;
    cluster.spread();
    let mut expected = BTreeMap::new();
    cluster.fill(&mut expected, "key", 1000);
    let equal = |cluster: &Cluster| {
        let led = cluster.shard(0);
        eventually("the copies are equal", || {
            cluster.shard_on(2, 0).is_some_and(|copy| {
                copy.replication.is_replica()
                    && rows(&copy) == rows(&led)
                    && copy.takes.note() == led.takes.note()
                    && copy.takes.has_foreign_rows() == led.takes.has_foreign_rows()
            })
        });
        rows(&led)
    };
    let before = equal(&cluster);
    cluster.follow(cluster.record.begin_resize(1, Vec::new()).unwrap());
    eventually("everything is copied", || cluster.all_moves_are(0, 1, MoveStage::Follows));
    assert!(equal(&cluster).len() > before.len());
    cluster.follow(cluster.record.abort("a test").unwrap());
    cluster.cleaned();
    assert_eq!(equal(&cluster), before);
    cluster.follow(cluster.record.begin_resize(1, Vec::new()).unwrap());
    cluster.fill(&mut expected, "more", 200);
    cluster.go_over(&[0], 1);
    equal(&cluster);
    cluster.finish();
    cluster.check(&expected);
    let all = equal(&cluster);
    assert_eq!(cluster.shard(0).replication.counts.full_copies.load(Ordering::Relaxed), 1, "all came through the log");

    // The copy knows what its primary knew of what has come, and leads with everything.
    cluster.record.epoch.0 += 1;
    let ids = cluster.ids.clone();
    let shard = &mut cluster.record.shards[0];
    (shard.epoch.0, shard.primary, shard.replicas) = (shard.epoch.0 + 1, ids[2], vec![ids[0]]);
    cluster.spread();
    eventually("the other leads", || cluster.status(0).is_some_and(|status| status.serves));
    assert_eq!(cluster.status(0).unwrap().role, Role::Primary);
    assert_eq!(rows(&cluster.shard(0)), all);
    cluster.check(&expected);
}

#[test]
fn a_move_begins_anew_after_a_kill_of_either_side_and_cleaning_goes_on_after_a_restart() {
    let mut cluster = Cluster::new(2, 1);
    let mut expected = BTreeMap::new();
    cluster.fill(&mut expected, "key", 1000);
    cluster.follow(cluster.record.begin_resize(2, vec![cluster.ids[1]]).unwrap());
    eventually("everything is copied", || cluster.all_moves_are(1, 1, MoveStage::Follows));
    // What it had is deleted at the source before it comes back.
    cluster.kill(1);
    for number in 0..200 {
        cluster.delete(&mut expected, &format!("key{number}"));
    }
    let left = cluster.record.clone();
    cluster.start(1);
    assert_eq!(cluster.record, left);
    eventually("everything is copied", || cluster.all_moves_are(1, 1, MoveStage::Follows));
    cluster.kill(0);
    eventually("the move waits", || cluster.all_moves_are(1, 1, MoveStage::Waits));
    assert!(!cluster.moves(1)[0].trouble.is_empty());
    cluster.start(0);
    cluster.fill(&mut expected, "more", 100);
    eventually("everything is copied", || cluster.all_moves_are(1, 1, MoveStage::Follows));
    assert_eq!((cluster.moves(1)[0].attempts, cluster.moves(1)[0].trouble.as_str()), (2, ""));
    cluster.go_over(&[1], 1);
    // What is committed is there after a kill.
    cluster.kill(1);
    cluster.start(1);
    assert!(cluster.moves(1).iter().all(|part| part.trouble.is_empty()), "{:?}", cluster.moves(1));
    cluster.check(&expected);
    // A source that is away when the record says that its rows may go.
    cluster.kill(0);
    cluster.record = cluster.record.clean().unwrap();
    cluster.start(0);
    cluster.cleaned();
    cluster.kill(0);
    cluster.start(0);
    cluster.cleaned();
    cluster.follow(cluster.record.finish().unwrap());
    cluster.cleaned();
    cluster.check(&expected);
}

#[test]
fn the_space_of_slots_that_have_gone_comes_back() {
    let mut cluster = Cluster::new(2, 1);
    let mut expected = BTreeMap::new();
    for number in 0..3000 {
        let key = format!("key{number}");
        let value: String = std::iter::repeat_with(fastrand::alphanumeric).take(2000).collect();
        cluster.ask(&["set", &key, &value]);
        expected.insert(key, value);
    }
    let source = cluster.shard(0);
    source.database.flush().unwrap();
    let before = source.database.disk_bytes();
    cluster.follow(cluster.record.begin_resize(2, vec![cluster.ids[1]]).unwrap());
    cluster.go_over(&[1], 1);
    cluster.finish();
    eventually("files are smaller", || source.database.disk_bytes() < before / 3 * 2);
    cluster.check(&expected);
}

#[test]
fn there_is_no_backup_while_slots_are_on_their_way() {
    let mut cluster = Cluster::new(2, 1);
    let mut expected = BTreeMap::new();
    cluster.fill(&mut expected, "key", 100);
    let back_up = |cluster: &Cluster, name: &str| {
        let core = cluster.running[0].as_ref().unwrap().handle.core();
        core.backups.begin(name).and_then(|()| core.backups.run(&core.shards.current(), name))
    };
    cluster.follow(cluster.record.begin_resize(2, vec![cluster.ids[1]]).unwrap());
    let refused = back_up(&cluster, "one").unwrap_err().to_string();
    assert!(refused.contains("keyspace 0 is being resized"), "{refused}");
    cluster.go_over(&[1], 1);
    assert!(back_up(&cluster, "one").is_err());
    cluster.finish();
    back_up(&cluster, "one").unwrap();
}

#[test]
fn a_first_copy_of_a_target_follows_its_log_behind_what_was_taken_in() {
    let mut cluster = Cluster::new(3, 1);
    let mut expected = BTreeMap::new();
    cluster.fill(&mut expected, "key", 1000);
    cluster.follow(cluster.record.begin_resize(2, vec![cluster.ids[1]]).unwrap());
    eventually("everything is copied", || cluster.all_moves_are(1, 1, MoveStage::Follows));
    // As the master does once a target has everything.
    let mut record = cluster.record.clone();
    record.epoch.0 += 1;
    record.shards[1].learners = vec![cluster.ids[2]];
    cluster.follow(record);
    cluster.fill(&mut expected, "more", 300);
    eventually("the learner has all", || {
        cluster.status(1).is_some_and(|status| status.followers.iter().any(|follower| follower.in_sync))
    });
    let mut record = cluster.record.clone();
    record.epoch.0 += 1;
    record.shards[1].replicas = std::mem::take(&mut record.shards[1].learners);
    cluster.follow(record);
    cluster.fill(&mut expected, "again", 300);
    cluster.go_over(&[1], 1);
    cluster.finish();
    cluster.fill(&mut expected, "last", 100);
    cluster.check(&expected);
    let led = cluster.shard(1);
    eventually("the copies are equal", || cluster.shard_on(2, 1).is_some_and(|copy| rows(&copy) == rows(&led)));
    assert_eq!(led.replication.counts.full_copies.load(Ordering::Relaxed), 1);
}

/// Each shard is flushed by its own clock: what was written behind the one may lie before the other.
#[test]
fn a_flush_at_the_target_kills_no_row_that_is_alive_at_the_source() {
    let mut cluster = Cluster::new(2, 2);
    let mut expected = BTreeMap::new();
    cluster.fill(&mut expected, "key", 400);
    let flush = |cluster: &mut Cluster, shard: u16| {
        let (outcome, text) = cluster.ask_once(ShardId(shard), &["flushdb"]);
        assert_eq!(outcome, Outcome::Reply, "{text}");
    };
    flush(&mut cluster, 0);
    let of = |key: &String| SlotTable::new(2).shard(slot_of(key.as_bytes())).0;
    expected.retain(|key, _| of(key) == 1);
    cluster.check(&expected);
    cluster.follow(cluster.record.begin_resize(1, Vec::new()).unwrap());
    eventually("everything is copied", || cluster.all_moves_are(0, 1, MoveStage::Follows));
    // Once more while they come: they come again.
    flush(&mut cluster, 0);
    cluster.fill(&mut expected, "more", 200);
    eventually("it has begun anew", || cluster.moves(0)[0].attempts > 1);
    cluster.go_over(&[0], 1);
    cluster.check(&expected);
    let key = expected.keys().next().unwrap().clone();
    assert_eq!(cluster.ask(&["append", &key, "!"]), (expected[&key].len() + 1).to_string());
    expected.get_mut(&key).unwrap().push('!');
    cluster.finish();
    cluster.check(&expected);
    assert!(cluster.shard(0).database.get(b"none", Tier::Disk).unwrap().is_none());
}
