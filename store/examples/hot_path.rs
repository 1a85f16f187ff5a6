//! What one operation costs inside the store: SET and GET straight through a session, without network.
//!
//! ```text
//! cargo run --release -p vasto-store --example hot_path [KEYS] [VALUE_BYTES] [OPERATIONS] [ROW_CACHE_MIB]
//! ```

use bytes::Bytes;
use std::io::Write;
use std::time::Instant;
use vasto_proto::batch::{OperationHead, write_operation};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::id::{Epoch, KeyspaceId, ShardId, ShardKey};
use vasto_proto::topology::KeyspaceRecord;
use vasto_store::{Config, LateAnswers, MemoryConfig, Session, Store};

// As in the binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH_SIZES: [usize; 3] = [1, 16, 64];

/// CPU time of this thread: what counts on a machine that others use too.
fn own_cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// CPU time of all threads, flushes and compactions included.
fn all_cpu_ns() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok());
    texts.filter_map(|text| text.split(' ').next()?.parse::<u64>().ok()).sum()
}

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
            let (started, own, all) = (Instant::now(), own_cpu_ns(), all_cpu_ns());
            for _ in 0..batches {
                self.batch(command, std::iter::repeat_with(&mut key).take(batch));
            }
            let each = |ns: u64| ns / (batches * batch as u64);
            let (wall, own, all) = (started.elapsed().as_nanos() as u64, own_cpu_ns() - own, all_cpu_ns() - all);
            let (wall, own, all) = (each(wall), each(own), each(all));
            let late = self.late_answers;
            let mut out = std::io::stdout().lock();
            writeln!(out, "{name:26} batch {batch:3}: {wall:6} ns/op, CPU {own:6} here {all:6} in all, late {late}")
                .expect("stdout");
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse().expect("a number"));
    let keys: u64 = arguments.next().unwrap_or(1_000_000);
    let value_bytes = arguments.next().unwrap_or(64);
    let operations = arguments.next().unwrap_or(1_000_000);
    let row_caches = arguments.next().map_or(vec![0, 512 << 20], |mib: u64| vec![(mib as usize) << 20]);
    let folder = tempfile::tempdir().expect("a folder");
    for row_cache_bytes in row_caches {
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
        client.measure(&format!("GET first, {cache}"), StoreCommand::Get, operations, random);
        // Reads every row once, so that a cache that is large enough misses nothing from here on.
        for first in (0..keys).step_by(64) {
            client.batch(StoreCommand::Get, first..keys.min(first + 64));
        }
        client.measure(&format!("GET, {cache}"), StoreCommand::Get, operations, random);
        client.measure(&format!("SET cached, {cache}"), StoreCommand::Set, operations, random);
    }
}
