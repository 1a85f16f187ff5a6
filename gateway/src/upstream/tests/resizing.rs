//! Clients while the number of shards changes: scripted stores that serve slots as real ones do, and refuse what they do not serve.

use super::*;
use crate::command::harness::show;
use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use vasto_proto::batch::OperationHead;
use vasto_proto::slot::{SlotTable, slot_of};
use vasto_proto::topology::Layout;

const STORES: [StoreId; 2] = [StoreId(1), StoreId(2)];
/// The slot's place in the cursor of a walk; below it stands how many keys of the slot are passed.
const CURSOR_SLOT_SHIFT: u32 = 39;

/// What happens by chance with each operation, in percent.
#[derive(Clone, Copy, Default)]
struct Chances {
    refusal: u8,
    /// The next version of the record is chosen, a store follows it, the gateway hears of it.
    step: u8,
    late_answer: u8,
}

/// All stores together. Rows need not move: who serves a slot is what is tested.
pub(super) struct Model {
    /// Versions of the record, each made of the one before.
    versions: Vec<KeyspaceRecord>,
    chosen: usize,
    /// The version that each store follows; the next one is chosen when all have it.
    followed: [usize; 2],
    keys: BTreeMap<String, String>,
    /// What stores refuse since they have refused something before it.
    refusing: HashSet<(StoreId, u32, ShardId)>,
    /// Writes as they were executed, with their shards.
    executed: Vec<(u16, String)>,
    chances: Chances,
    random: fastrand::Rng,
    topology: watch::Sender<Arc<Snapshot>>,
}

impl Model {
    pub(super) fn answers_late(&mut self) -> bool {
        self.random.u8(..100) < self.chances.late_answer
    }

    /// What an operation comes to; `words` begin with its name.
    pub(super) fn run(&mut self, store: StoreId, head: &OperationHead, words: &[String]) -> (Outcome, Vec<u8>) {
        let (shard, place) = (head.target.shard, (store.0 - 1) as usize);
        let lane = (store, head.connection, shard);
        if head.flags & FLAG_AFTER_REFUSAL != 0 {
            self.refusing.remove(&lane);
        }
        let outcome = if self.refusing.contains(&lane) {
            Some(Outcome::NotServing)
        } else {
            self.refusal(&self.versions[self.followed[place]].clone(), store, head, words)
        };
        let is_refused = outcome.is_some();
        let answer = match outcome {
            Some(outcome) => {
                self.refusing.insert(lane);
                (outcome, b"not mine".to_vec())
            }
            None => (Outcome::Reply, self.execute(shard, place, words)),
        };
        // Who is refused waits for a step.
        let chance = if is_refused { self.chances.step.saturating_mul(4) } else { self.chances.step };
        if self.random.u8(..100) < chance {
            self.step();
        }
        answer
    }

    fn refusal(
        &mut self,
        record: &KeyspaceRecord,
        store: StoreId,
        head: &OperationHead,
        words: &[String],
    ) -> Option<Outcome> {
        let shard = head.target.shard;
        let Some(described) = record.shards.get(usize::from(shard.0)) else { return Some(Outcome::NotHere) };
        if described.primary != store {
            return Some(if described.replicas.contains(&store) { Outcome::NotServing } else { Outcome::NotHere });
        }
        if described.epoch != head.epoch {
            return Some(Outcome::WrongEpoch);
        }
        let layout = Layout::of(record);
        let served = layout.served(shard);
        let keys = keys_of(words);
        let all = SlotTable::new(record.shard_count()).slots(shard).count();
        let is_walk = keys.is_empty();
        if is_walk && head.shard_count() != Some(record.shard_count()) {
            return Some(Outcome::WrongEpoch);
        }
        if is_walk && served.len() < all || keys.iter().any(|key| !served.contains(slot_of(key.as_bytes()))) {
            return Some(Outcome::NotServing);
        }
        (self.random.u8(..100) < self.chances.refusal).then_some(Outcome::NotServing)
    }

    fn execute(&mut self, shard: ShardId, place: usize, words: &[String]) -> Vec<u8> {
        let table = SlotTable::new(self.versions[self.followed[place]].shard_count());
        let is_own = move |key: &str| table.shard(slot_of(key.as_bytes())) == shard;
        if !matches!(words[0].as_str(), "GET" | "MGET" | "EXISTS" | "KEYS" | "DBSIZE" | "_SCAN" | "_WATCH") {
            self.executed.push((shard.0, words.join(" ")));
        }
        let mut reply = Vec::new();
        execute(&mut self.keys, words, &is_own, &mut ReplyWriter::new(&mut reply));
        reply
    }

    fn step(&mut self) {
        match self.random.u8(..3) {
            0 => self.choose_next(),
            1 => self.publish(),
            _ => {
                let place = self.random.usize(..2);
                self.followed[place] = self.chosen;
            }
        }
    }

    fn choose_next(&mut self) {
        if self.followed == [self.chosen; 2] && self.chosen + 1 < self.versions.len() {
            self.chosen += 1;
        }
    }

    fn publish(&self) {
        self.topology.send_replace(Arc::new(snapshot_of(&self.versions[self.chosen])));
    }
}

fn snapshot_of(record: &KeyspaceRecord) -> Snapshot {
    Snapshot { keyspaces: vec![record.clone()], ..snapshot(&record.shards, &[]) }
}

/// The keys of an operation; none of one that covers slots.
fn keys_of(words: &[String]) -> Vec<&str> {
    let count = words.len();
    let places: Vec<usize> = match words[0].as_str() {
        "MSET" => (1..count).step_by(2).collect(),
        "MGET" | "DEL" | "EXISTS" | "_WATCH" => (1..count).collect(),
        "GET" | "SET" | "APPEND" => vec![1],
        // Watched keys with their tokens; what is queued is for keys of the same tag.
        "_EXEC" => vec![if words[1] == "0" { 4 } else { 2 }],
        "DBSIZE" | "KEYS" | "FLUSHDB" | "_SCAN" => Vec::new(),
        other => panic!("unexpected {other}"),
    };
    places.into_iter().map(|place| words[place].as_str()).collect()
}

/// Runs an operation on the keys that are its shard's.
fn execute(
    keys: &mut BTreeMap<String, String>,
    words: &[String],
    is_own: &dyn Fn(&str) -> bool,
    reply: &mut ReplyWriter<'_>,
) {
    let value = |keys: &BTreeMap<String, String>, key: &str, reply: &mut ReplyWriter<'_>| match keys.get(key) {
        Some(value) => reply.bulk(value.as_bytes()),
        None => reply.null(),
    };
    let arguments = &words[1..];
    match words[0].as_str() {
        "GET" => value(keys, &arguments[0], reply),
        "MGET" => {
            reply.array(arguments.len());
            arguments.iter().for_each(|key| value(keys, key, reply));
        }
        "SET" | "MSET" => {
            for pair in arguments.chunks(2) {
                keys.insert(pair[0].clone(), pair[1].clone());
            }
            reply.ok();
        }
        "APPEND" => {
            let value = keys.entry(arguments[0].clone()).or_default();
            value.push_str(&arguments[1]);
            reply.integer(value.len() as i64);
        }
        "DEL" => reply.integer(arguments.iter().filter(|key| keys.remove(*key).is_some()).count() as i64),
        "EXISTS" => reply.integer(arguments.iter().filter(|key| keys.contains_key(*key)).count() as i64),
        "DBSIZE" => reply.integer(keys.keys().filter(|key| is_own(key)).count() as i64),
        "KEYS" => {
            let own: Vec<&String> = keys.keys().filter(|key| is_own(key)).collect();
            reply.array(own.len());
            own.into_iter().for_each(|key| reply.bulk(key.as_bytes()));
        }
        "FLUSHDB" => {
            keys.retain(|key, _| !is_own(key));
            reply.ok();
        }
        "_WATCH" => {
            reply.array(arguments.len());
            let token = |key: &String| keys.get(key).map_or("none", String::as_str);
            arguments.iter().for_each(|key| reply.bulk(token(key).as_bytes()));
        }
        "_EXEC" => execute_all(keys, arguments, is_own, reply),
        "_SCAN" => scan(keys, arguments, is_own, reply),
        other => panic!("unexpected {other}"),
    }
}

/// Watched keys with tokens, then commands of which all but the first argument count is told by their names: APPEND alone is queued here.
fn execute_all(
    keys: &mut BTreeMap<String, String>,
    arguments: &[String],
    is_own: &dyn Fn(&str) -> bool,
    reply: &mut ReplyWriter<'_>,
) {
    let watched: usize = arguments[0].parse().expect("a count");
    let (pairs, commands) = arguments[1..].split_at(2 * watched);
    if pairs.chunks(2).any(|pair| keys.get(&pair[0]).map_or("none", String::as_str) != pair[1]) {
        return reply.null_array();
    }
    // Code, count, key, value.
    reply.array(commands.len() / 4);
    for command in commands.chunks(4) {
        execute(keys, &["APPEND".to_owned(), command[2].clone(), command[3].clone()], is_own, reply);
    }
}

/// `_scan cursor last-slot count …`
fn scan(
    keys: &BTreeMap<String, String>,
    arguments: &[String],
    is_own: &dyn Fn(&str) -> bool,
    reply: &mut ReplyWriter<'_>,
) {
    let number = |place: usize| arguments[place].parse::<u64>().expect("a number");
    let (cursor, last_slot, count) = (number(0), number(1), number(2) as usize);
    let (slot, passed) = (cursor >> CURSOR_SLOT_SHIFT, (cursor & 0xffff) as usize);
    let mut by_slot = BTreeMap::<u64, Vec<&String>>::new();
    for key in keys.keys() {
        by_slot.entry(u64::from(slot_of(key.as_bytes()))).or_default().push(key);
    }
    let places =
        by_slot.iter().flat_map(|(slot, keys)| keys.iter().enumerate().map(move |(rank, key)| (*slot, rank + 1, *key)));
    let is_ahead = |(at, rank, key): &(u64, usize, &String)| {
        *at <= last_slot && (*at > slot || *at == slot && *rank > passed) && is_own(key)
    };
    let ahead: Vec<_> = places.filter(is_ahead).take(count + 1).collect();
    let page = &ahead[..ahead.len().min(count)];
    let next = match page.last() {
        Some((slot, rank, _)) if ahead.len() > page.len() => (slot << CURSOR_SLOT_SHIFT) as i64 | *rank as i64,
        Some(_) | None => -1,
    };
    reply.array(2);
    reply.integer(next);
    reply.array(page.len());
    page.iter().for_each(|(_, _, key)| reply.bulk(key.as_bytes()));
}

/// A cluster of which the gateway and all stores follow the first of some versions of keyspace 0.
struct Resizing {
    cluster: Cluster,
    ends: Option<Sender<()>>,
    /// Late answers stay where they are.
    holds: Arc<AtomicBool>,
    late: Option<JoinHandle<()>>,
}

impl Resizing {
    fn new(versions: Vec<KeyspaceRecord>, chances: Chances, seed: u64) -> Self {
        let cluster = Cluster::new(snapshot_of(&versions[0]));
        let topology = cluster.topology.clone();
        let random = fastrand::Rng::with_seed(seed);
        *cluster.stores.model.lock() = Some(Model {
            versions,
            chosen: 0,
            followed: [0; 2],
            keys: BTreeMap::new(),
            refusing: HashSet::new(),
            executed: Vec::new(),
            chances,
            random,
            topology,
        });
        let (ends, ended) = std::sync::mpsc::channel::<()>();
        let holds = Arc::new(AtomicBool::new(false));
        let (stores, is_held) = (Arc::clone(&cluster.stores), Arc::clone(&holds));
        let late = std::thread::spawn(move || {
            // Late answers leave in their order; the pause gives what is sent meanwhile its chance.
            while ended.recv_timeout(Duration::from_millis(2)) == Err(RecvTimeoutError::Timeout) {
                if is_held.load(Ordering::Acquire) {
                    continue;
                }
                for store in stores.stores.lock().values_mut() {
                    let Some(answers) = &store.answers else { continue };
                    for answer in store.kept.drain(..) {
                        answers.try_send(answer.into()).expect("the queue is long enough");
                    }
                }
            }
        });
        Self { cluster, ends: Some(ends), holds, late: Some(late) }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Model) -> T) -> T {
        act(self.cluster.stores.model.lock().as_mut().expect("there is a model"))
    }

    /// All stores follow this version from now on.
    fn follow(&self, version: usize) {
        self.with(|model| (model.chosen, model.followed) = (version, [version; 2]));
    }

    fn publish(&self) {
        self.with(|model| model.publish());
    }

    /// Returns when stores have been sent a line at least so often.
    fn until_seen(&self, line: &str, count: usize) {
        let until = Instant::now() + PATIENCE;
        let seen = || {
            let stores = self.cluster.stores.stores.lock();
            stores.values().flat_map(|store| &store.seen).filter(|seen| seen.line == line).count()
        };
        while seen() < count {
            assert!(Instant::now() < until, "{line} was seen {} times", seen());
            std::thread::yield_now();
        }
    }

    fn seen(&self) -> Vec<Seen> {
        self.cluster.stores.stores.lock().values().flat_map(|store| store.seen.clone()).collect()
    }
}

impl Drop for Resizing {
    fn drop(&mut self) {
        drop(self.ends.take());
        let ended = self.late.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_some_and(|ended| ended.is_ok()), "late answers are delivered");
    }
}

/// Shards lie on the two stores by turns.
fn placed(shards: std::ops::Range<u16>) -> Vec<StoreId> {
    shards.map(|shard| STORES[usize::from(shard % 2)]).collect()
}

fn record(shards: u16) -> KeyspaceRecord {
    KeyspaceRecord::new(KeyspaceId(0), "0", &placed(0..shards)).expect("valid")
}

fn begin(record: &KeyspaceRecord, to: u16) -> KeyspaceRecord {
    record.begin_resize(to, placed(record.shard_count()..to.max(record.shard_count()))).expect("a resize")
}

/// A record as it is before a resize, in the copy, behind the fence, committed, cleaning, and done.
fn versions(before: &KeyspaceRecord, to: u16) -> Vec<KeyspaceRecord> {
    let copying = begin(before, to);
    let fenced = copying.fence().expect("a fence");
    let committed = fenced.commit().expect("a commit");
    let cleaning = committed.clean().expect("cleaned");
    let done = cleaning.finish().expect("done");
    vec![before.clone(), copying, fenced, committed, cleaning, done]
}

const FENCED: usize = 2;
const COMMITTED: usize = 3;
const DONE: usize = 5;

/// Keys that a resize moves, and keys that it leaves where they are.
fn moving_and_staying(from: u16, to: u16) -> (Vec<String>, Vec<String>) {
    let (before, after) = (SlotTable::new(from), SlotTable::new(to));
    let is_moving = |key: &String| {
        let slot = slot_of(key.as_bytes());
        before.shard(slot) != after.shard(slot)
    };
    (0..400).map(|number| format!("k{number}")).partition(is_moving)
}

fn shard_by(count: u16, key: &str) -> u16 {
    SlotTable::new(count).shard(slot_of(key.as_bytes())).0
}

impl Client {
    /// The next reply as text, arrays with their elements.
    fn whole(&mut self) -> String {
        let line = self.reply_or_nil();
        let Some(count) = line.strip_prefix('*').and_then(|count| count.parse::<usize>().ok()) else { return line };
        let elements: Vec<String> = (0..count).map(|_| self.whole()).collect();
        format!("[{}]", elements.join(", "))
    }

    fn reply_or_nil(&mut self) -> String {
        let mut first = [0; 1];
        self.input.read_exact(&mut first).expect("a reply in time");
        if first != *b"$" {
            let mut line = String::from_utf8(first.to_vec()).expect("text");
            self.input.read_line(&mut line).expect("a reply in time");
            return line.trim_end().to_owned();
        }
        let mut length = String::new();
        self.input.read_line(&mut length).expect("a reply in time");
        let Ok(length) = length.trim_end().parse::<usize>() else { return "nil".to_owned() };
        let mut bytes = vec![0; length + 2];
        self.input.read_exact(&mut bytes).expect("the rest of a reply");
        bytes.truncate(length);
        String::from_utf8(bytes).expect("text")
    }

    fn run(&mut self, line: &str) -> String {
        self.send(&[line]);
        self.whole()
    }
}

#[test]
fn what_a_fence_refuses_goes_to_its_new_shard_in_its_order() {
    let (moving, staying) = moving_and_staying(3, 4);
    let resizing = Resizing::new(versions(&record(3), 4), Chances::default(), 0);
    let mut client = resizing.cluster.client();
    let key = &moving[0];
    let neighbour = staying.iter().find(|other| shard_by(3, other) == shard_by(3, key)).expect("there is one");
    assert_eq!(client.run(&format!("SET {key} 0")), "+OK");
    // The gateway has slept meanwhile.
    resizing.follow(FENCED);
    let lines: Vec<String> = ["SET k 1", "SET n 1", "APPEND k 2", "GET k", "APPEND n 2"]
        .map(|line| line.replace(" k", &format!(" {key}")).replace(" n", &format!(" {neighbour}")))
        .to_vec();
    client.send(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    resizing.until_seen(&lines[0], 2);
    resizing.follow(COMMITTED);
    resizing.until_seen(&lines[0], 4);
    resizing.publish();
    let replies: Vec<String> = lines.iter().map(|_| client.whole()).collect();
    assert_eq!(replies, ["+OK", "+OK", ":2", "12", ":2"]);
    let executed = resizing.with(|model| model.executed.clone());
    assert_eq!(executed[0], (shard_by(3, key), format!("SET {key} 0")));
    let of_key: Vec<_> = executed.iter().skip(1).filter(|(_, line)| line.contains(key.as_str())).collect();
    assert_eq!(of_key, [&(3, lines[0].clone()), &(3, lines[2].clone())]);
    let of_neighbour: Vec<_> = executed.iter().filter(|(_, line)| line.contains(neighbour.as_str())).collect();
    let home = shard_by(3, key);
    assert_eq!(of_neighbour, [&(home, lines[1].clone()), &(home, lines[4].clone())]);
    // Its old shard does not go on refusing it.
    let before = resizing.seen().len();
    assert_eq!(client.run(&format!("SET {neighbour} 5")), "+OK");
    assert_eq!(resizing.seen().len(), before + 1);
    assert!(resizing.seen().iter().all(|seen| seen.flags >> 16 == 3 || seen.flags >> 16 == 4));
}

#[test]
fn a_shard_whose_keys_have_all_gone_elsewhere_is_told_that_its_refusals_are_known() {
    let (moving, staying) = moving_and_staying(3, 4);
    let resizing = Resizing::new(versions(&record(3), 4), Chances::default(), 0);
    let mut client = resizing.cluster.client();
    let key = &moving[0];
    let neighbour = staying.iter().find(|other| shard_by(3, other) == shard_by(3, key)).expect("there is one");
    resizing.follow(FENCED);
    client.send(&[&format!("SET {key} 1")]);
    resizing.until_seen(&format!("SET {key} 1"), 1);
    resizing.follow(COMMITTED);
    resizing.publish();
    assert_eq!(client.whole(), "+OK");
    let before = resizing.seen().len();
    assert_eq!(client.run(&format!("SET {neighbour} 5")), "+OK");
    assert_eq!(resizing.seen().len(), before + 1, "it was sent once");
}

#[test]
fn a_write_on_its_way_to_the_old_shard_is_not_overtaken_by_one_to_the_new() {
    let (moving, _) = moving_and_staying(3, 4);
    let key = &moving[0];
    let resizing = Resizing::new(versions(&record(3), 4), Chances::default(), 0);
    let (mut client, mut other) = (resizing.cluster.client(), resizing.cluster.client());
    // The store behind the fence has refused it, and that is on its way.
    resizing.follow(FENCED);
    resizing.holds.store(true, Ordering::Release);
    resizing.with(|model| model.chances.late_answer = 100);
    client.send(&[&format!("SET {key} 1")]);
    resizing.until_seen(&format!("SET {key} 1"), 1);
    resizing.with(|model| model.chances.late_answer = 0);
    resizing.follow(COMMITTED);
    resizing.publish();
    // The gateway routes by the new layout when this comes back.
    let new_store = resizing.with(|model| model.versions[COMMITTED].shards[3].primary);
    let quiet = moving.iter().find(|other| shard_by(4, other) == 3 && *other != key).expect("there is one");
    if new_store == STORES[usize::from(shard_by(3, key) % 2)] {
        // Behind what is late on the same link.
        other.send(&[&format!("GET {quiet}")]);
        resizing.until_seen(&format!("GET {quiet}"), 1);
    } else {
        assert_eq!(other.run(&format!("GET {quiet}")), "nil");
    }
    client.send(&[&format!("APPEND {key} 2"), "PING"]);
    for _ in 0..3 {
        let mut third = resizing.cluster.client();
        assert_eq!(third.run("PING"), "+PONG");
    }
    resizing.holds.store(false, Ordering::Release);
    assert_eq!((client.whole(), client.whole(), client.whole()), ("+OK".into(), ":2".into(), "+PONG".into()));
    assert_eq!(client.run(&format!("GET {key}")), "12");
}

#[test]
fn shares_that_were_answered_are_kept_and_the_others_split_anew() {
    let (moving, staying) = moving_and_staying(2, 5);
    // One shard's keys all stay; of the other's some move, to several shards.
    let quiet: Vec<&String> = staying.iter().filter(|key| shard_by(2, key) == 0).take(3).collect();
    let mut busy: Vec<&String> = moving.iter().filter(|key| shard_by(2, key) == 1).take(6).collect();
    busy.extend(staying.iter().filter(|key| shard_by(2, key) == 1).take(2));
    assert!(busy.iter().map(|key| shard_by(5, key)).collect::<BTreeSet<_>>().len() > 2);
    let mut keys: Vec<&String> = quiet.iter().chain(&busy).copied().collect();
    keys.swap(0, 7);
    keys.swap(2, 5);
    keys.extend([busy[0], quiet[0], busy[6], busy[0]]);
    let pairs: Vec<String> = keys.iter().enumerate().map(|(number, key)| format!("{key} {number}")).collect();
    let names = keys.iter().map(|key| key.as_str()).collect::<Vec<_>>().join(" ");
    // The fence stands while the commands are sent, and the gateway hears of the commit alone.
    let across_commit = |known: BTreeMap<String, String>, lines: &[String]| {
        let resizing = Resizing::new(versions(&record(2), 5), Chances::default(), 0);
        resizing.with(|model| model.keys = known);
        resizing.follow(FENCED);
        let mut client = resizing.cluster.client();
        client.send(&lines.iter().map(String::as_str).collect::<Vec<_>>());
        let is_quiet = |seen: &&Seen| quiet.iter().any(|key| seen.line.split(' ').any(|word| word == key.as_str()));
        let until = Instant::now() + PATIENCE;
        while resizing.seen().iter().filter(is_quiet).count() < lines.len() {
            assert!(Instant::now() < until);
        }
        resizing.follow(COMMITTED);
        resizing.publish();
        let replies: Vec<String> = lines.iter().map(|_| client.whole()).collect();
        let asked_quiet = resizing.seen().iter().filter(is_quiet).count();
        let (executed, keys) = resizing.with(|model| (model.executed.clone(), model.keys.clone()));
        (replies, executed, keys, asked_quiet)
    };
    let (replies, executed, known, asked_quiet) =
        across_commit(BTreeMap::new(), &[format!("MSET {}", pairs.join(" "))]);
    assert_eq!((replies.as_slice(), asked_quiet), (["+OK".to_owned()].as_slice(), 1), "what was answered is kept");
    let mut written: Vec<&str> = executed.iter().flat_map(|(_, line)| line.split(' ').skip(1).step_by(2)).collect();
    let mut wanted: Vec<&str> = keys.iter().map(|key| key.as_str()).collect();
    written.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(written, wanted, "each pair once");
    assert!(executed.len() > 3, "{executed:?}");
    let last_place = |key: &&String| keys.iter().rposition(|other| other == key).expect("it is there").to_string();
    let expected: Vec<String> = keys.iter().map(last_place).collect();
    let distinct = wanted.iter().collect::<BTreeSet<_>>().len();
    let lines = [format!("MGET {names}"), format!("EXISTS {names}"), format!("DEL {names} none")];
    let (replies, _, known, _) = across_commit(known, &lines);
    assert_eq!(replies, [format!("[{}]", expected.join(", ")), format!(":{}", keys.len()), format!(":{distinct}")]);
    assert_eq!(known, BTreeMap::new());
}

#[test]
fn what_covers_slots_is_asked_anew_of_all_shards() {
    for (from, to) in [(1, 3), (3, 4), (4, 2), (3, 1)] {
        let resizing = Resizing::new(versions(&record(from), to), Chances::default(), 0);
        let mut client = resizing.cluster.client();
        let names: BTreeSet<String> = (0..50).map(|number| format!("k{number}")).collect();
        resizing.with(|model| model.keys = names.iter().map(|name| (name.clone(), "v".to_owned())).collect());
        // Stores are ahead of the gateway, and some shards are gone for good.
        resizing.follow(DONE);
        client.send(&["DBSIZE", "KEYS *", "SCAN 0 COUNT 1000", "FLUSHDB", "SET k0 1", "DBSIZE"]);
        resizing.until_seen("DBSIZE", 1);
        resizing.publish();
        assert_eq!(client.whole(), ":50", "{from} to {to}");
        let listed = client.whole();
        let listed: BTreeSet<String> = listed.trim_matches(['[', ']']).split(", ").map(str::to_owned).collect();
        assert_eq!(listed, names, "{from} to {to}");
        assert_eq!(client.whole().matches('k').count(), 50, "{from} to {to}");
        assert_eq!(client.whole(), "+OK");
        assert_eq!((client.whole(), client.whole()), ("+OK".to_owned(), ":1".to_owned()), "{from} to {to}");
    }
}

#[test]
fn a_transaction_and_its_watched_keys_follow_their_slot() {
    let (moving, _) = moving_and_staying(3, 4);
    let tag = &moving[0];
    let key = format!("{{{tag}}}x");
    let resizing = Resizing::new(versions(&record(3), 4), Chances::default(), 0);
    let (mut client, mut late) = (resizing.cluster.client(), resizing.cluster.client());
    assert_eq!((client.run(&format!("WATCH {key}")), late.run(&format!("WATCH {key}"))), ("+OK".into(), "+OK".into()));
    for client in [&mut client, &mut late] {
        assert_eq!(client.run("MULTI"), "+OK");
        assert_eq!(client.run(&format!("APPEND {key} a")), "+QUEUED");
    }
    resizing.follow(FENCED);
    client.send(&["EXEC"]);
    let until = Instant::now() + PATIENCE;
    while !resizing.seen().iter().any(|seen| seen.line.starts_with("_EXEC")) {
        assert!(Instant::now() < until);
    }
    resizing.follow(COMMITTED);
    resizing.publish();
    assert_eq!(client.whole(), "[:1]");
    assert_eq!(late.run("EXEC"), "*-1", "the token of another shard holds");
    assert_eq!(resizing.with(|model| model.executed.iter().filter(|(shard, _)| *shard == 3).count()), 2);
    // Keys of one WATCH may part.
    resizing.follow(DONE);
    assert_eq!(client.run("WATCH a b c d e f"), "+OK");
}

#[test]
fn a_replica_that_refuses_sends_the_read_to_the_new_primary() {
    let (moving, _) = moving_and_staying(3, 4);
    let mut before = record(3);
    for shard in &mut before.shards {
        shard.replicas = vec![if shard.primary == STORES[0] { STORES[1] } else { STORES[0] }];
    }
    let resizing = Resizing::new(versions(&before, 4), Chances::default(), 0);
    let mut client = resizing.cluster.client();
    let key = &moving[0];
    assert_eq!(client.run(&format!("SET {key} 7")), "+OK");
    assert_eq!(client.run("READONLY"), "+OK");
    resizing.follow(FENCED);
    client.send(&[&format!("GET {key}")]);
    resizing.until_seen(&format!("GET {key}"), 2);
    resizing.follow(COMMITTED);
    resizing.publish();
    assert_eq!(client.whole(), "7");
    let asked: Vec<Seen> = resizing.seen().into_iter().filter(|seen| seen.line.starts_with("GET")).collect();
    assert!(asked.iter().any(|seen| seen.flags & FLAG_FROM_REPLICA != 0));
    assert!(asked.iter().any(|seen| seen.shard == 3 && seen.flags & FLAG_FROM_REPLICA == 0));
}

#[test]
fn a_fence_that_is_lifted_and_an_aborted_resize_leave_everything_as_it_was() {
    let (moving, _) = moving_and_staying(3, 4);
    let copying = begin(&record(3), 4);
    let fenced = copying.fence().expect("a fence");
    let unfenced = fenced.unfence().expect("lifted");
    let aborted = unfenced.fence().expect("a fence").abort("enough").expect("aborted");
    let resizing = Resizing::new(vec![record(3), copying, fenced, unfenced, aborted], Chances::default(), 0);
    let mut client = resizing.cluster.client();
    resizing.follow(2);
    resizing.publish();
    let line = format!("MSET {} 1 {} 2 other 3", moving[0], moving[1]);
    client.send(&[&line, "DBSIZE"]);
    // Nobody tells the gateway.
    resizing.follow(3);
    assert_eq!((client.whole(), client.whole()), ("+OK".to_owned(), ":3".to_owned()));
    resizing.follow(4);
    resizing.publish();
    assert_eq!(client.run(&format!("GET {}", moving[1])), "2");
}

/// Records through all of these numbers of shards, with fences that are lifted and resizes that are aborted among them.
fn winding(counts: &[u16]) -> Vec<KeyspaceRecord> {
    let mut all = vec![record(counts[0])];
    for to in &counts[1..] {
        let before = all.last().expect("there is one").clone();
        let copying = begin(&before, *to);
        let fenced = copying.fence().expect("a fence");
        let unfenced = fenced.unfence().expect("lifted");
        let aborted = unfenced.abort("enough").expect("aborted");
        all.extend([copying, fenced, unfenced, aborted.clone()]);
        all.extend(versions(&aborted, *to).into_iter().skip(1));
    }
    all
}

fn seed() -> u64 {
    let seed = std::env::var("VASTO_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    eprintln!("VASTO_SEED={seed}");
    seed
}

#[test]
fn one_client_sees_what_it_would_see_without_any_resize() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let chances = Chances { refusal: 2, step: 20, late_answer: 20 };
    let versions = winding(&[3, 4, 6, 2, 1, 3, 5, 1, 2]);
    let last = versions.len() - 1;
    let resizing = Resizing::new(versions, chances, seed);
    let mut client = resizing.cluster.client();
    let mut expected = BTreeMap::new();
    let mut rounds = 0;
    while rounds < 20 || resizing.with(|model| model.chosen) < last {
        rounds += 1;
        let lines: Vec<String> = (0..random.usize(1..30)).map(|number| line(&mut random, number)).collect();
        // What the gateway reads at once it plans by one topology.
        let (first, second) = lines.split_at(random.usize(..lines.len()));
        client.send(&first.iter().map(String::as_str).collect::<Vec<_>>());
        (0..random.usize(..8)).for_each(|_| resizing.with(Model::step));
        client.send(&second.iter().map(String::as_str).collect::<Vec<_>>());
        for line in &lines {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let mut reply = Vec::new();
            execute(&mut expected, &words, &|_| true, &mut ReplyWriter::new(&mut reply));
            let (wanted, got) = (plain(&show(&reply)), plain(&client.whole()));
            assert_eq!(got, wanted, "seed {seed}, round {rounds}, {line}, of {lines:?}");
        }
        assert_eq!(resizing.with(|model| model.keys.clone()), expected, "seed {seed}, round {rounds}");
    }
}

/// Letters and digits of a reply alone, those of a list in order: what is compared is what it says, not how it is written.
fn plain(reply: &str) -> String {
    let mut words: Vec<String> = reply
        .split([' ', ',', '[', ']'])
        .map(|word| word.trim_matches(['"', '+', ':']).replace("nil", "null"))
        .filter(|word| !word.is_empty())
        .collect();
    if words.iter().all(|word| word.starts_with('k')) {
        words.sort_unstable();
    }
    words.join(" ")
}

fn line(random: &mut fastrand::Rng, number: usize) -> String {
    let mut key = |_: usize| format!("k{}", random.u8(..12));
    let (one, several) = (key(0), (0..5).map(&mut key).collect::<Vec<_>>());
    let pairs: Vec<String> = several.iter().map(|key| format!("{key} v{number}")).collect();
    match random.u8(..100) {
        0..25 => format!("GET {one}"),
        25..40 => format!("SET {one} v{number}"),
        40..55 => format!("APPEND {one} {number}"),
        55..65 => format!("MGET {}", several.join(" ")),
        65..75 => format!("MSET {}", pairs.join(" ")),
        75..82 => format!("DEL {one} {}", several[0]),
        82..88 => format!("EXISTS {}", several.join(" ")),
        88..93 => "DBSIZE".to_owned(),
        93..97 => "KEYS *".to_owned(),
        97.. => "FLUSHDB".to_owned(),
    }
}

#[test]
fn a_walk_misses_nothing_while_shards_come_and_go() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..10 {
        let chances = Chances { refusal: 3, step: 30, late_answer: 10 };
        let resizing = Resizing::new(winding(&[3, 4, 2]), chances, random.u64(..));
        let names: BTreeSet<String> = (0..random.u32(1..150)).map(|number| format!("k{number}")).collect();
        resizing.with(|model| model.keys = names.iter().map(|name| (name.clone(), "v".to_owned())).collect());
        let mut client = resizing.cluster.client();
        let (mut cursor, mut found) = ("0".to_owned(), BTreeSet::new());
        let count = random.u32(1..20);
        loop {
            let page = client.run(&format!("SCAN {cursor} COUNT {count}"));
            let (next, keys) = page.trim_start_matches('[').split_once(", [").expect("a page");
            found.extend(keys.trim_end_matches(']').split(", ").filter(|key| !key.is_empty()).map(str::to_owned));
            cursor = next.to_owned();
            if cursor == "0" {
                break;
            }
        }
        assert_eq!(found, names, "seed {seed}");
    }
}
