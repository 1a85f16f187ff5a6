//! What one operation costs inside the store: SET and GET straight through a session, without network.
//!
//!     cargo run --release -p vasto-store --example hot_path [KEYS] [VALUE_BYTES] [OPERATIONS]

use bytes::Bytes;
use std::io::Write;
use std::time::{Duration, Instant};
use vasto_proto::batch::{OperationHead, write_operation};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey};
use vasto_proto::topology::KeyspaceRecord;
use vasto_store::{Config, LateAnswers, MemoryConfig, Session, Store};

const BATCH_SIZES: [usize; 3] = [1, 16, 64];

struct Client {
    session: Session,
    late: LateAnswers,
    late_answers: usize,
    answers: Vec<u8>,
    packed: Vec<u8>,
    value: Vec<u8>,
}

impl Client {
    /// Runs one batch on the given keys; answers that come late are taken when there is time.
    fn batch(&mut self, command: StoreCommand, keys: impl Iterator<Item = u64>) {
        self.packed.clear();
        for (id, key) in keys.enumerate() {
            let head = OperationHead {
                id: id as u32,
                connection: id as u32 % 50,
                target: ShardKey { keyspace: KeyspaceId(0), shard: ShardId(0) },
                epoch: Epoch(1),
                command: command.code(),
                flags: 0,
            };
            let mut key_text = *b"key:000000000000";
            write!(&mut key_text[4..], "{key:012}").expect("twelve digits fit");
            match command {
                StoreCommand::Set => write_operation(&mut self.packed, &head, [&key_text[..], &self.value]),
                _ => write_operation(&mut self.packed, &head, [&key_text[..]]),
            }
        }
        self.answers.clear();
        self.session.execute(Bytes::copy_from_slice(&self.packed), &mut self.answers);
        let mut task = std::task::Context::from_waker(std::task::Waker::noop());
        while self.late.is_waiting() {
            if let std::task::Poll::Ready(Some(_)) = self.late.poll_next(&mut task) {
                self.late_answers += 1;
            }
        }
    }

    fn measure(&mut self, name: &str, command: StoreCommand, operations: u64, mut key: impl FnMut() -> u64) {
        for batch in BATCH_SIZES {
            self.late_answers = 0;
            let batches = operations / batch as u64;
            let started = Instant::now();
            for _ in 0..batches {
                self.batch(command, std::iter::repeat_with(&mut key).take(batch));
            }
            let each = started.elapsed().as_nanos() as f64 / (batches * batch as u64) as f64;
            let mut out = std::io::stdout().lock();
            writeln!(out, "{name:28} batch {batch:3}: {each:7.0} ns/op   late {}", self.late_answers).expect("stdout");
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse().expect("a number"));
    let keys: u64 = arguments.next().unwrap_or(1_000_000);
    let value_bytes = arguments.next().unwrap_or(64);
    let operations = arguments.next().unwrap_or(1_000_000);
    let folder = tempfile::tempdir().expect("a folder");
    for row_cache_bytes in [0, 512 << 20] {
        let config = Config {
            data: folder.path().join(row_cache_bytes.to_string()),
            memory: MemoryConfig { row_cache_bytes, ..MemoryConfig::default() },
            ..Config::default()
        };
        let store = Store::open(config).expect("an empty folder opens");
        let handle = store.handle();
        let record = KeyspaceRecord::new(KeyspaceId(0), "0", &[handle.id()]).expect("a valid record");
        handle.put_record(record).expect("the shard opens");
        let (session, late) = handle.open_session();
        let mut client = Client {
            session,
            late,
            late_answers: 0,
            answers: Vec::new(),
            packed: Vec::new(),
            value: vec![b'x'; value_bytes as usize],
        };
        let cache = if row_cache_bytes == 0 { "no row cache" } else { "row cache" };
        let mut next = 0;
        client.measure(&format!("SET new, {cache}"), StoreCommand::Set, keys / 3, || {
            next += 1;
            next % keys
        });
        let random = || fastrand::u64(..keys);
        client.measure(&format!("SET again, {cache}"), StoreCommand::Set, operations, random);
        std::thread::sleep(Duration::from_secs(1));
        client.measure(&format!("GET first, {cache}"), StoreCommand::Get, operations, random);
        client.measure(&format!("GET, {cache}"), StoreCommand::Get, operations, random);
        client.measure(&format!("SET cached, {cache}"), StoreCommand::Set, operations, random);
    }
}
