//! A worker with scripted stores: what clients are answered when stores hang, vanish, refuse, or are no longer what they were.

mod resizing;

use super::link::{AnswerReceiver, BatchSender, Connector, LinkError, LinkHalves, LocalFuture};
use crate::clients::Clients;
use crate::process::Memory;
use crate::routing::Routing;
use crate::settings::{Config, Settings};
use crate::shared::Shared;
use crate::slowlog::Slowlog;
use crate::statistics::Statistics;
use crate::upstream::masters::Masters;
use crate::worker::{NewSocket, Worker, WorkerParts};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use vasto_proto::batch::{FLAG_AFTER_REFUSAL, FLAG_FROM_REPLICA, Operations, Outcome, write_answer};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Flags, ReplyWriter};
use vasto_proto::id::{ClusterId, Epoch, KeyspaceId, ShardId, StoreId};
use vasto_proto::topology::{KeyspaceRecord, NOBODY, ShardRecord, Snapshot, StoreInfo};

/// What is waited for comes long before.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a store behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    /// Reads with its own name, writes with OK.
    #[default]
    Answers,
    /// It takes what it is sent and keeps its answers.
    Hangs,
    Refuses(Outcome),
    /// Nobody can connect.
    Gone,
    /// Connecting takes until the mode changes.
    Opens,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    line: String,
    shard: u16,
    epoch: u64,
    flags: u32,
}

#[derive(Default)]
struct Store {
    mode: Mode,
    seen: Vec<Seen>,
    /// Packed answers that were kept.
    kept: Vec<Vec<u8>>,
    answers: Option<mpsc::Sender<Bytes>>,
}

/// The stores 1 and 2.
#[derive(Default)]
struct Stores {
    stores: Mutex<BTreeMap<StoreId, Store>>,
    changed: Condvar,
    mode_changed: Notify,
    /// Says what operations come to instead, if there is one.
    model: Mutex<Option<resizing::Model>>,
}

impl Stores {
    fn with<T>(&self, store: u32, act: impl FnOnce(&mut Store) -> T) -> T {
        let result = act(self.stores.lock().entry(StoreId(store)).or_default());
        self.changed.notify_all();
        result
    }

    fn set(&self, store: u32, mode: Mode) {
        self.with(store, |store| store.mode = mode);
        self.mode_changed.notify_waiters();
    }

    /// The store's link breaks, and nobody can connect.
    fn cut(&self, store: u32) {
        self.with(store, |store| (store.mode, store.answers) = (Mode::Gone, None));
    }

    /// The store goes on: it answers what it has taken.
    fn go_on(&self, store: u32) {
        self.with(store, |store| {
            store.mode = Mode::Answers;
            for answer in store.kept.drain(..) {
                let answers = store.answers.as_ref().expect("it has a link");
                answers.try_send(answer.into()).expect("the queue is long enough");
            }
        });
    }

    /// What the store was sent, when it is at least so much.
    fn seen(&self, store: u32, count: usize) -> Vec<Seen> {
        let until = Instant::now() + PATIENCE;
        let mut stores = self.stores.lock();
        loop {
            let seen = &stores.entry(StoreId(store)).or_default().seen;
            if seen.len() >= count {
                return seen.clone();
            }
            assert!(Instant::now() < until, "store {store} has seen {seen:?}");
            self.changed.wait_until(&mut stores, until);
        }
    }

    fn lines(&self, store: u32, count: usize) -> Vec<String> {
        self.seen(store, count).into_iter().map(|seen| seen.line).collect()
    }

    fn take(&self, store: StoreId, batch: &[u8]) {
        let mut model = self.model.lock();
        self.with(store.0, |known| {
            for operation in Operations::new(batch) {
                let operation = operation.expect("a whole operation");
                let command = StoreCommand::from_code(operation.head.command).expect("a command");
                let mut words = vec![command.spec().name.to_uppercase()];
                words.extend(operation.arguments.map(|argument| String::from_utf8_lossy(argument).into_owned()));
                let (epoch, flags) = (operation.head.epoch.0, operation.head.flags);
                known.seen.push(Seen { line: words.join(" "), shard: operation.head.target.shard.0, epoch, flags });
                if let Some(model) = model.as_mut() {
                    let (outcome, body) = model.run(store, &operation.head, &words);
                    let mut answer = Vec::new();
                    write_answer(&mut answer, operation.head.id, outcome, &body);
                    match &known.answers {
                        Some(answers) if known.kept.is_empty() && !model.answers_late() => {
                            answers.try_send(answer.into()).expect("the queue is long enough");
                        }
                        Some(_) | None => known.kept.push(answer),
                    }
                    continue;
                }
                let mut reply = Vec::new();
                if command.spec().flags.contains(Flags::WRITE) {
                    ReplyWriter::new(&mut reply).ok();
                } else {
                    ReplyWriter::new(&mut reply).bulk(format!("store-{}", store.0).as_bytes());
                }
                let mut answer = Vec::new();
                match known.mode {
                    Mode::Refuses(outcome) => write_answer(&mut answer, operation.head.id, outcome, b"not now"),
                    Mode::Answers | Mode::Hangs | Mode::Gone | Mode::Opens => {
                        write_answer(&mut answer, operation.head.id, Outcome::Reply, &reply);
                    }
                }
                match (&known.mode, &known.answers) {
                    (Mode::Hangs, _) | (_, None) => known.kept.push(answer),
                    (_, Some(answers)) => answers.try_send(answer.into()).expect("the queue is long enough"),
                }
            }
        });
    }
}

struct Ways(Arc<Stores>);

impl Connector for Ways {
    fn connect(
        &self,
        store: StoreId,
        _address: &str,
        _cluster: ClusterId,
    ) -> LocalFuture<'static, Result<LinkHalves, LinkError>> {
        let stores = Arc::clone(&self.0);
        Box::pin(async move {
            loop {
                let changed = stores.mode_changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                match stores.with(store.0, |store| store.mode) {
                    Mode::Opens => changed.await,
                    Mode::Gone => return Err(LinkError("nobody is there".to_owned())),
                    Mode::Answers | Mode::Hangs | Mode::Refuses(_) => break,
                }
            }
            let (sender, answers) = mpsc::channel(1000);
            stores.with(store.0, |store| {
                store.kept.clear();
                store.answers = Some(sender);
            });
            let sender = ToStore { store, stores };
            Ok((Box::new(sender) as Box<dyn BatchSender>, Box::new(FromStore(answers)) as Box<dyn AnswerReceiver>))
        })
    }
}

struct ToStore {
    store: StoreId,
    stores: Arc<Stores>,
}

impl BatchSender for ToStore {
    fn send(&mut self, batch: Bytes) -> LocalFuture<'_, Result<(), LinkError>> {
        self.stores.take(self.store, &batch);
        Box::pin(async { Ok(()) })
    }
}

struct FromStore(mpsc::Receiver<Bytes>);

impl AnswerReceiver for FromStore {
    fn receive(&mut self) -> LocalFuture<'_, Result<Bytes, LinkError>> {
        Box::pin(async { self.0.recv().await.ok_or_else(|| LinkError("the link broke".to_owned())) })
    }
}

/// One worker, its stores and its topology.
struct Cluster {
    stores: Arc<Stores>,
    shared: Arc<Shared>,
    topology: watch::Sender<Arc<Snapshot>>,
    sockets: mpsc::Sender<NewSocket>,
    shutdown: CancellationToken,
    worker: Option<JoinHandle<()>>,
}

/// Keyspace 0 with these shards; the stores 1 and 2 are up but for those in `down`.
fn snapshot(shards: &[ShardRecord], down: &[u32]) -> Snapshot {
    let store = |id: u32| StoreInfo {
        id: StoreId(id),
        address: format!("store-{id}:1"),
        up: !down.contains(&id),
        free_disk_bytes: 1,
        fsync: None,
        zone: String::new(),
        tags: Vec::new(),
    };
    let mut record = KeyspaceRecord::new(KeyspaceId(0), "0", &[StoreId(1)]).expect("valid");
    record.shards = shards.to_vec();
    record.shard_count = shards.len() as u16;
    Snapshot {
        cluster: ClusterId(1),
        version: 1,
        stores: vec![store(1), store(2)],
        keyspaces: vec![record],
        ..Snapshot::default()
    }
}

/// A shard under an epoch with a primary (0 = nobody) and replicas.
fn shard(epoch: u64, primary: u32, replicas: &[u32]) -> ShardRecord {
    ShardRecord::new(Epoch(epoch), StoreId(primary), replicas.iter().map(|store| StoreId(*store)).collect())
}

impl Cluster {
    fn new(first: Snapshot) -> Self {
        Self::with_deadline(first, Duration::from_secs(10))
    }

    fn with_deadline(first: Snapshot, request_deadline: Duration) -> Self {
        let config = Config { request_deadline, ..Config::default() };
        let (topology, followed) = watch::channel(Arc::new(first));
        let shutdown = CancellationToken::new();
        let shared = Arc::new(Shared {
            settings: Settings::new(&config),
            clients: Clients::new(),
            slowlog: Slowlog::new(),
            statistics: Statistics::new(),
            masters: Masters::new(Vec::new(), followed.clone()),
            started: Instant::now(),
            started_at: SystemTime::now(),
            started_with: Memory::read(),
            run_id: String::new(),
            shutdown: shutdown.clone(),
        });
        let stores = Arc::new(Stores::default());
        let (sockets, incoming) = mpsc::channel(16);
        let parts = WorkerParts {
            shared: Arc::clone(&shared),
            connector: Arc::new(Ways(Arc::clone(&stores))),
            topology: followed,
            sockets: incoming,
            load: Arc::new(AtomicUsize::new(0)),
            large_permits: Arc::new(Semaphore::new(2)),
            shutdown: shutdown.clone(),
        };
        let worker = Some(std::thread::spawn(move || Worker::run(parts)));
        Self { stores, shared, topology, sockets, shutdown, worker }
    }

    fn publish(&self, snapshot: Snapshot) {
        self.topology.send_replace(Arc::new(snapshot));
    }

    fn client(&self) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        theirs.set_nonblocking(true).expect("a socket");
        ours.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let new = NewSocket::Unix { socket: theirs, path: "test".to_owned() };
        self.sockets.blocking_send(new).unwrap_or_else(|_| panic!("the worker runs"));
        Client { input: BufReader::new(ours.try_clone().expect("a socket")), output: ours }
    }

    /// A key of a shard while keyspace 0 has `count`.
    fn key(&self, shard: u16) -> String {
        let routing = Routing::new(Arc::clone(&self.topology.borrow()));
        let routes = routing.keyspace(KeyspaceId(0)).expect("keyspace 0");
        let mut keys = (0..).map(|number: u32| format!("key-{number}"));
        keys.find(|key| routes.shard_of_key(key.as_bytes()) == ShardId(shard)).expect("keys without end")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
        let ended = self.worker.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_some_and(|ended| ended.is_ok()), "the worker panicked");
    }
}

struct Client {
    input: BufReader<UnixStream>,
    output: UnixStream,
}

impl Client {
    fn send(&mut self, lines: &[&str]) {
        let text: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
        self.output.write_all(text.as_bytes()).expect("the worker reads");
    }

    /// The next reply: a line, or the bytes of a bulk string.
    fn reply(&mut self) -> String {
        let mut line = String::new();
        self.input.read_line(&mut line).expect("a reply in time");
        let line = line.trim_end();
        let Some(length) = line.strip_prefix('$') else {
            return line.to_owned();
        };
        let mut bytes = vec![0; length.parse::<usize>().expect("a length") + 2];
        self.input.read_exact(&mut bytes).expect("the rest of a reply");
        bytes.truncate(bytes.len() - 2);
        String::from_utf8(bytes).expect("text")
    }

    fn ask(&mut self, line: &str) -> String {
        self.send(&[line]);
        self.reply()
    }
}

const MOVED: &str = "-UNKNOWN the command may or may not have been executed: the shard has another primary now";

#[test]
fn a_command_for_a_vacant_shard_waits_for_the_primary() {
    let cluster = Cluster::new(snapshot(&[shard(2, 0, &[1, 2])], &[]));
    let mut client = cluster.client();
    client.send(&["GET a", "SET a 1", "WATCH a", "PING"]);
    // Another client of the same worker is not held up.
    assert_eq!(cluster.client().ask("PING"), "+PONG");
    cluster.publish(snapshot(&[shard(3, 2, &[1])], &[]));
    assert_eq!((client.reply(), client.reply()), ("store-2".to_owned(), "+OK".to_owned()));
    assert!(client.reply().starts_with("-ERR the store answered"), "the script knows no tokens");
    assert_eq!(client.reply(), "+PONG");
    assert_eq!(cluster.stores.lines(2, 3), ["GET a", "SET a 1", "_WATCH a"]);
    assert_eq!(cluster.stores.seen(1, 0), []);
    assert!(cluster.stores.seen(2, 3).iter().all(|seen| seen.epoch == 3));
}

#[test]
fn a_shard_that_stays_vacant_is_an_error_after_the_deadline_in_every_round() {
    let cluster = Cluster::with_deadline(snapshot(&[shard(2, 0, &[1])], &[]), Duration::from_millis(50));
    let mut client = cluster.client();
    let error = "-CLUSTERDOWN the shard of this key cannot be reached; nothing was executed (shard 0/0 has no primary at the moment)";
    for line in ["GET a", "SET a 1", "WATCH a", "DBSIZE", "SCAN 0"] {
        assert_eq!(client.ask(line), error, "{line}");
    }
    assert_eq!((cluster.stores.seen(1, 0), cluster.stores.seen(2, 0)), (vec![], vec![]));
    // The next command has its own time.
    cluster.publish(snapshot(&[shard(3, 1, &[])], &[]));
    assert_eq!(client.ask("GET a"), "store-1");
}

#[test]
fn what_hangs_at_the_old_primary_is_read_at_the_new_one_or_unknown() {
    let cluster = Cluster::new(snapshot(&[shard(1, 1, &[2])], &[]));
    cluster.stores.set(1, Mode::Hangs);
    let (mut reader, mut writer, mut both) = (cluster.client(), cluster.client(), cluster.client());
    reader.send(&["GET r"]);
    writer.send(&["INCR w"]);
    both.send(&["GET a", "SET b 1", "GET c"]);
    cluster.stores.seen(1, 5);
    cluster.publish(snapshot(&[shard(3, 2, &[1])], &[1]));
    assert_eq!(reader.reply(), "store-2");
    assert_eq!(writer.reply(), MOVED);
    assert_eq!((both.reply(), both.reply(), both.reply()), ("store-2".into(), MOVED.into(), "store-2".into()));
    let of_both: Vec<String> = cluster.stores.lines(2, 3).into_iter().filter(|line| line != "GET r").collect();
    assert_eq!(of_both, ["GET a", "GET c"], "in their order, and no write twice");
    // The old one goes on: nobody takes its late answers, and their ids are free again.
    cluster.stores.go_on(1);
    for client in [&mut reader, &mut writer, &mut both] {
        assert_eq!(client.ask("GET x"), "store-2");
    }
    cluster.publish(snapshot(&[shard(5, 1, &[2])], &[]));
    for client in [&mut reader, &mut writer, &mut both] {
        client.send(&["GET y", "SET y 1", "GET y"]);
        assert_eq!(
            (client.reply(), client.reply(), client.reply()),
            ("store-1".into(), "+OK".into(), "store-1".into())
        );
    }
}

#[test]
fn a_primary_that_hands_over_still_answers_what_it_has_taken() {
    let cluster = Cluster::new(snapshot(&[shard(1, 1, &[2])], &[]));
    cluster.stores.set(1, Mode::Hangs);
    let (mut first, mut second) = (cluster.client(), cluster.client());
    first.send(&["SET a 1", "GET a"]);
    cluster.stores.seen(1, 2);
    let planned = ShardRecord { previous: StoreId(1), ..shard(2, 2, &[1]) };
    cluster.publish(snapshot(&[planned], &[]));
    // The read has left it; the topology is known then.
    assert_eq!(second.ask("GET b"), "store-2");
    cluster.stores.go_on(1);
    assert_eq!((first.reply(), first.reply()), ("+OK".to_owned(), "store-2".to_owned()));
    // One that does not is given up, although it was not overdue yet.
    cluster.publish(snapshot(&[shard(3, 1, &[2])], &[]));
    cluster.stores.set(1, Mode::Hangs);
    first.send(&["SET a 2"]);
    cluster.stores.seen(1, 3);
    let planned = ShardRecord { previous: StoreId(1), ..shard(4, 2, &[1]) };
    cluster.publish(snapshot(&[planned], &[]));
    assert_eq!(first.reply(), MOVED);
}

#[test]
fn a_store_that_hangs_while_nothing_moves_is_given_up_after_the_deadline() {
    let cluster = Cluster::with_deadline(snapshot(&[shard(1, 1, &[])], &[]), Duration::from_millis(100));
    cluster.stores.set(1, Mode::Hangs);
    let (mut reader, mut writer) = (cluster.client(), cluster.client());
    reader.send(&["GET a"]);
    writer.send(&["SET a 1"]);
    let down = "-CLUSTERDOWN the shard of this key cannot be reached; nothing was executed (the store does not answer)";
    assert_eq!(reader.reply(), down);
    assert_eq!(writer.reply(), "-UNKNOWN the command may or may not have been executed: the store does not answer");
    cluster.stores.seen(1, 2);
    cluster.stores.go_on(1);
    assert_eq!((reader.ask("GET b"), writer.ask("SET b 1")), ("store-1".to_owned(), "+OK".to_owned()));
    // The time of a read goes on while its link is lost and opened again.
    cluster.stores.set(1, Mode::Hangs);
    reader.send(&["GET c"]);
    cluster.stores.seen(1, 5);
    cluster.stores.with(1, |store| (store.mode, store.answers) = (Mode::Opens, None));
    assert!(reader.reply().starts_with("-CLUSTERDOWN the shard of this key cannot be reached"));
    cluster.stores.set(1, Mode::Answers);
    assert_eq!(reader.ask("GET d"), "store-1");
    // A walk takes as long as it takes, unless its store is down.
    cluster.stores.set(1, Mode::Hangs);
    reader.send(&["DBSIZE"]);
    writer.send(&["GET a"]);
    assert_eq!(writer.reply(), down);
    cluster.publish(snapshot(&[shard(1, 1, &[])], &[1]));
    assert_eq!(reader.reply(), down);
}

#[test]
fn a_lost_link_gives_back_what_was_not_sent_and_what_only_reads() {
    let cluster = Cluster::new(snapshot(&[shard(1, 1, &[2])], &[]));
    cluster.stores.set(1, Mode::Hangs);
    let (mut reader, mut writer, mut late) = (cluster.client(), cluster.client(), cluster.client());
    reader.send(&["GET a"]);
    writer.send(&["SET a 1"]);
    cluster.stores.seen(1, 2);
    cluster.stores.cut(1);
    assert_eq!(
        writer.reply(),
        "-UNKNOWN the connection to the store was lost after the command was sent: it may or may not have been executed"
    );
    // The link is down now: this one is refused before it is sent.
    late.send(&["SET b 1", "GET b"]);
    cluster.publish(snapshot(&[shard(2, 0, &[1, 2])], &[1]));
    cluster.publish(snapshot(&[shard(3, 2, &[1])], &[1]));
    assert_eq!(reader.reply(), "store-2");
    assert_eq!((late.reply(), late.reply()), ("+OK".to_owned(), "store-2".to_owned()));
    assert_eq!(writer.ask("SET c 1"), "+OK");
}

#[test]
fn a_batch_that_waits_for_its_link_loses_only_what_was_moved() {
    let cluster = Cluster::new(snapshot(&[shard(1, 1, &[]), shard(1, 1, &[])], &[]));
    let (first, second) = (cluster.key(0), cluster.key(1));
    cluster.stores.set(1, Mode::Opens);
    let mut client = cluster.client();
    let lines: Vec<String> = [&first, &second, &first, &second]
        .into_iter()
        .enumerate()
        .map(|(number, key)| format!("SET {key} {number}"))
        .collect();
    client.send(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    // Read by the worker before the next client's command is.
    assert_eq!(cluster.client().ask("PING"), "+PONG");
    cluster.publish(snapshot(&[shard(1, 1, &[]), shard(2, 2, &[])], &[]));
    // The worker has taken that in before the link opens: the scripted store takes whatever comes.
    assert_eq!(cluster.client().ask(&format!("GET {second}")), "store-2");
    cluster.stores.set(1, Mode::Answers);
    for _ in &lines {
        assert_eq!(client.reply(), "+OK");
    }
    assert_eq!(cluster.stores.lines(1, 2), [lines[0].as_str(), &lines[2]]);
    let mut moved = cluster.stores.lines(2, 3);
    moved.retain(|line| line.starts_with("SET"));
    assert_eq!(moved, [lines[1].as_str(), &lines[3]]);
}

#[test]
fn a_store_that_the_master_hears_again_is_tried_at_once_and_has_its_time_again() {
    let cluster = Cluster::with_deadline(snapshot(&[shard(1, 1, &[])], &[1]), Duration::from_millis(50));
    cluster.stores.set(1, Mode::Gone);
    let mut client = cluster.client();
    while !client.ask("GET a").contains("nobody is there") {}
    cluster.stores.set(1, Mode::Answers);
    cluster.publish(snapshot(&[shard(1, 1, &[])], &[]));
    while client.ask("GET a") != "store-1" {}
}

#[test]
fn too_few_replicas_are_waited_for_and_then_redis_has_the_word() {
    let cluster = Cluster::with_deadline(snapshot(&[shard(1, 1, &[2])], &[]), Duration::from_millis(100));
    cluster.stores.set(1, Mode::Refuses(Outcome::NoReplicas));
    let mut client = cluster.client();
    assert_eq!(client.ask("SET a 1"), "-NOREPLICAS Not enough good replicas to write.");
    let seen = cluster.stores.seen(1, 2);
    assert!(seen.iter().all(|seen| seen.line == "SET a 1"), "{seen:?}");
    assert!(seen[0].flags & FLAG_AFTER_REFUSAL == 0 && seen[1].flags & FLAG_AFTER_REFUSAL != 0, "{seen:?}");
    cluster.shared.settings.set(&[("request-deadline-ms", "10000")]).expect("a deadline");
    client.send(&["SET b 1"]);
    while !cluster.stores.lines(1, 3).contains(&"SET b 1".to_owned()) {
        std::thread::yield_now();
    }
    cluster.stores.set(1, Mode::Answers);
    assert_eq!(client.reply(), "+OK");
}

#[test]
fn readonly_reads_from_a_replica_and_the_primary_answers_what_it_refuses() {
    let cluster = Cluster::new(snapshot(&[shard(1, 1, &[2])], &[]));
    let mut client = cluster.client();
    assert_eq!(client.ask("GET a"), "store-1");
    assert_eq!(client.ask("READONLY"), "+OK");
    assert_eq!((client.ask("GET b"), client.ask("SET b 1")), ("store-2".to_owned(), "+OK".to_owned()));
    let seen = cluster.stores.seen(2, 1);
    assert!(seen[0].flags & FLAG_FROM_REPLICA != 0, "{seen:?}");
    assert_eq!(cluster.stores.lines(1, 2), ["GET a", "SET b 1"]);
    cluster.stores.set(2, Mode::Refuses(Outcome::NotServing));
    assert_eq!(client.ask("GET c"), "store-1");
    let seen = cluster.stores.seen(1, 3);
    assert_eq!((seen[2].line.as_str(), seen[2].flags & FLAG_FROM_REPLICA), ("GET c", 0));
    // One that hangs is left when the master misses it, and one that is gone is not asked.
    cluster.stores.set(2, Mode::Hangs);
    client.send(&["GET d"]);
    cluster.stores.seen(2, 3);
    cluster.publish(snapshot(&[shard(1, 1, &[2])], &[2]));
    assert_eq!(client.reply(), "store-1");
    assert_eq!(client.ask("GET e"), "store-1");
    assert_eq!(cluster.stores.seen(2, 0).len(), 3);
    cluster.stores.set(2, Mode::Answers);
    cluster.publish(snapshot(&[shard(1, 1, &[2])], &[]));
    assert_eq!(client.ask("GET f"), "store-2");
    // A vacant shard's replicas are asked as well.
    cluster.publish(snapshot(&[shard(2, NOBODY.0, &[2])], &[]));
    assert_eq!(client.ask("GET g"), "store-2");
    cluster.publish(snapshot(&[shard(3, 1, &[2])], &[]));
    assert_eq!((client.ask("READWRITE"), client.ask("GET h")), ("+OK".to_owned(), "store-1".to_owned()));
}

#[test]
fn wait_holds_up_its_own_client_alone_and_ends_with_it() {
    let cluster = Cluster::new(snapshot(&[shard(1, 1, &[])], &[]));
    let (mut waiting, mut other) = (cluster.client(), cluster.client());
    waiting.send(&["SET a 1", "WAIT 1 0"]);
    assert_eq!(waiting.reply(), "+OK");
    let blocked = |other: &mut Client, count: usize| {
        let is_blocked = |client: &Arc<crate::clients::ClientRecord>| client.is_blocked();
        while cluster.shared.clients.all().iter().filter(|client| is_blocked(client)).count() < count {
            assert_eq!(other.ask("GET a"), "store-1");
        }
    };
    blocked(&mut other, 1);
    drop(waiting);
    while cluster.shared.clients.count() > 1 {
        assert_eq!(other.ask("PING"), "+PONG");
    }
    assert_eq!(other.ask("WAIT 1 1"), ":0");
    other.send(&["MULTI", "WAIT 1 0", "EXEC"]);
    let replies: Vec<String> = (0..4).map(|_| other.reply()).collect();
    assert_eq!(replies, ["+OK", "+QUEUED", "*1", ":0"]);
}
