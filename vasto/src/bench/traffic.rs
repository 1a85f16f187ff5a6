//! What the connections of one thread send next, and what their answers mean: the load of all keys, the workload, and
//! the reading back.

use std::time::{Duration, Instant};

use fastrand::Rng;

use super::arguments::{Settings, Workload};
use super::command::{Request, Verb};
use super::distribution::Chooser;
use super::ledger::{self, Entry, Fate, Partition, Verdict};
use super::reply::Reply;
use super::value::Values;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// The answer fits the command.
    Answered(Reply<'a>),
    /// An error reply, or one that does not fit.
    Failed(&'a [u8]),
    /// The connection was lost before the answer.
    Lost,
}

impl Outcome<'_> {
    fn fate(&self) -> Fate {
        match self {
            Self::Answered(_) => Fate::Acknowledged,
            Self::Failed(text) => Fate::of_error(text),
            Self::Lost => Fate::Unknown,
        }
    }
}

/// The requests of all connections of one thread.
pub trait Traffic {
    /// The next request for this connection; `None` when there will be none any more.
    fn next(&mut self, connection: u64) -> Option<Request>;

    /// Each request that `next` gave comes back once.
    fn settle(&mut self, request: &Request, outcome: Outcome<'_>);
}

/// One thread's part of what was acknowledged.
#[derive(Clone, Debug)]
pub struct Records {
    pub partition: Partition,
    pub entries: Vec<Entry>,
}

impl Records {
    pub fn new(partition: Partition) -> Self {
        let count = usize::try_from(partition.len()).expect("a 64-bit machine counts its keys in a usize");
        Self { partition, entries: vec![Entry::default(); count] }
    }

    fn entry(&mut self, key: u64) -> &mut Entry {
        &mut self.entries[self.partition.index_of(key)]
    }
}

/// Keys that failed and shall be sent again, until nothing succeeds any more for the time of one's patience.
#[derive(Debug)]
struct Retries {
    keys: Vec<u64>,
    successes: u64,
    patience: Duration,
    /// When it was last seen that something had succeeded, and how much had by then. The clock is read on failures only.
    progress_at: Instant,
    progress: u64,
    hopeless: bool,
}

impl Retries {
    fn new(patience: Duration) -> Self {
        Self { keys: Vec::new(), successes: 0, patience, progress_at: Instant::now(), progress: 0, hopeless: false }
    }

    fn failed(&mut self, key: u64) {
        self.keys.push(key);
        if self.progress != self.successes {
            self.progress = self.successes;
            self.progress_at = Instant::now();
        } else if self.progress_at.elapsed() > self.patience {
            self.hopeless = true;
        }
    }
}

/// Writes each key once, in order.
#[derive(Debug)]
pub struct Load {
    partition: Partition,
    records: Option<Records>,
    verb: Verb,
    next_index: u64,
    retries: Retries,
}

impl Load {
    pub fn new(settings: &Settings, partition: Partition, records: Option<Records>) -> Self {
        let verb = if settings.workload == Workload::Incr { Verb::SetZero } else { Verb::Set };
        Self { partition, records, verb, next_index: 0, retries: Retries::new(settings.server.timeout) }
    }

    /// How many keys could not be written, and what was acknowledged.
    pub fn finish(self) -> (u64, Option<Records>) {
        (self.partition.len() - self.retries.successes, self.records)
    }
}

impl Traffic for Load {
    fn next(&mut self, _connection: u64) -> Option<Request> {
        if self.retries.hopeless {
            return None;
        }
        let key = if let Some(key) = self.retries.keys.pop() {
            key
        } else if self.next_index < self.partition.len() {
            self.next_index += 1;
            let key = self.partition.key_at(self.next_index - 1);
            if let Some(records) = &mut self.records {
                records.entry(key).begin();
            }
            key
        } else {
            return None;
        };
        // A repeated write has the same version and value, so it cannot harm.
        Some(Request { verb: self.verb, key, version: 1 })
    }

    fn settle(&mut self, request: &Request, outcome: Outcome<'_>) {
        let fate = outcome.fate();
        if let Some(records) = &mut self.records {
            records.entry(request.key).settle_value(1, fate);
        }
        match fate {
            Fate::Acknowledged => self.retries.successes += 1,
            Fate::Refused | Fate::Unknown => self.retries.failed(request.key),
        }
    }
}

/// Answers to GET and INCR during the run that cannot be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    /// Older than what was acknowledged before the command was sent.
    pub stale: u64,
    /// Never written, or a counter that jumped.
    pub wrong: u64,
}

/// GET, SET or INCR of keys chosen at random.
#[derive(Debug)]
pub struct Mix {
    workload: Workload,
    chooser: KeyChooser,
    values: Values,
    random: Rng,
    records: Option<Records>,
    versions: u32,
    violations: Violations,
    remaining: u64,
}

/// With records each connection walks its own keys when they come in sequence; else all share one walk, so that each key
/// comes once.
#[derive(Debug)]
enum KeyChooser {
    Shared { chooser: Chooser, partition: Option<Partition> },
    Own(Vec<u64>),
}

/// A key whose fate is unknown is passed over in favour of a neighbour, this many times; then it is read instead.
const FROZEN_KEYS_PASSED_MAX: u64 = 64;

impl Mix {
    pub fn new(settings: &Settings, values: Values, partition: Partition, records: Option<Records>) -> Self {
        use super::distribution::Distribution;
        let sequential = settings.distribution == Distribution::Sequential;
        let chooser = if sequential && records.is_some() {
            KeyChooser::Own(vec![0; partition.own_connections() as usize])
        } else if sequential {
            let chooser = Chooser::new(settings.distribution, partition.len());
            KeyChooser::Shared { chooser, partition: Some(partition) }
        } else {
            KeyChooser::Shared { chooser: Chooser::new(settings.distribution, settings.keys), partition: None }
        };
        let remaining =
            settings.requests.map_or(u64::MAX, |requests| ledger::share(requests, partition.threads, partition.thread));
        Self {
            workload: settings.workload,
            chooser,
            values,
            // Each thread has numbers of its own.
            random: Rng::with_seed(settings.seed ^ (partition.thread + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            records,
            versions: 0,
            violations: Violations::default(),
            remaining,
        }
    }

    pub fn finish(self) -> (Violations, Option<Records>) {
        (self.violations, self.records)
    }

    fn choose_verb(&mut self) -> Verb {
        match self.workload {
            Workload::Set => Verb::Set,
            Workload::Get => Verb::Get,
            Workload::Incr => Verb::Incr,
            Workload::Mixed { read_ratio } if self.random.f64() < read_ratio => Verb::Get,
            Workload::Mixed { .. } => Verb::Set,
        }
    }

    fn choose_key(&mut self, connection: u64) -> u64 {
        match &mut self.chooser {
            KeyChooser::Shared { chooser, partition } => {
                let chosen = chooser.choose(&mut self.random);
                partition.map_or(chosen, |partition| partition.key_at(chosen))
            }
            KeyChooser::Own(next) => {
                let partition = self.records.as_ref().expect("only used with records").partition;
                let next = &mut next[(connection / partition.threads) as usize];
                let key = *next * partition.connections + connection;
                if key < partition.keys {
                    *next += 1;
                    key
                } else {
                    *next = 1;
                    connection
                }
            }
        }
    }
}

impl Traffic for Mix {
    fn next(&mut self, connection: u64) -> Option<Request> {
        self.remaining = self.remaining.checked_sub(1)?;
        let verb = self.choose_verb();
        let key = self.choose_key(connection);
        let Some(records) = &mut self.records else {
            self.versions = self.versions.wrapping_add(1);
            return Some(Request { verb, key, version: self.versions });
        };
        let partition = records.partition;
        if verb == Verb::Get {
            let key = partition.owned_by_thread(key);
            return Some(Request { verb, key, version: records.entry(key).acknowledged });
        }
        let mut key = partition.owned_by(key, connection);
        for _ in 0..FROZEN_KEYS_PASSED_MAX {
            let entry = records.entry(key);
            let usable = if verb == Verb::Incr { entry.may_increment() } else { !entry.is_frozen() };
            if usable {
                return Some(Request { verb, key, version: entry.begin() });
            }
            key = if key + partition.connections < partition.keys { key + partition.connections } else { connection };
        }
        Some(Request { verb: Verb::Get, key, version: records.entry(key).acknowledged })
    }

    fn settle(&mut self, request: &Request, outcome: Outcome<'_>) {
        let Some(records) = &mut self.records else { return };
        let entry = records.entry(request.key);
        let verdict = match (request.verb, outcome) {
            (Verb::Get, Outcome::Answered(_)) if self.workload == Workload::Incr => Verdict::Open,
            (Verb::Get, Outcome::Answered(reply)) => {
                let found = if let Reply::Bulk(found) = reply { Some(found) } else { None };
                ledger::judge_read(self.values, request.key, entry, request.version, found)
            }
            (Verb::Get, Outcome::Failed(_) | Outcome::Lost) => Verdict::Open,
            (Verb::Set | Verb::SetZero, outcome) => {
                entry.settle_value(request.version, outcome.fate());
                Verdict::Open
            }
            (Verb::Incr, outcome) => {
                // The zero counts as a version: this increment is at least the next, and at most the number of its version.
                let least = i64::from(entry.acknowledged);
                let most = i64::from(request.version) - 1;
                let loaded = entry.acknowledged > 0;
                entry.settle_increment(request.version, outcome.fate());
                match outcome {
                    Outcome::Answered(Reply::Integer(number)) if loaded && number < least => Verdict::Lost,
                    Outcome::Answered(Reply::Integer(number)) if loaded && number > most => Verdict::Wrong,
                    Outcome::Answered(_) | Outcome::Failed(_) | Outcome::Lost => Verdict::Open,
                }
            }
        };
        match verdict {
            Verdict::Kept | Verdict::Open => {}
            Verdict::Lost => self.violations.stale += 1,
            Verdict::Wrong => self.violations.wrong += 1,
        }
    }
}

/// One key that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub key: u64,
    pub verdict: Verdict,
    pub entry: Entry,
    pub found: Option<Vec<u8>>,
}

/// Findings that are told one by one.
const FINDINGS_MAX: usize = 20;

/// Bytes of a value that are kept to be told.
const FOUND_BYTES_MAX: usize = 32;

/// The result of reading everything back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    pub kept: u64,
    pub open: u64,
    pub lost: u64,
    pub wrong: u64,
    /// Keys that could not be read.
    pub unread: u64,
    pub findings: Vec<Finding>,
}

impl Audit {
    pub fn merge(&mut self, other: Self) {
        self.kept += other.kept;
        self.open += other.open;
        self.lost += other.lost;
        self.wrong += other.wrong;
        self.unread += other.unread;
        self.findings.extend(other.findings);
        self.findings.truncate(FINDINGS_MAX);
    }

    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.wrong == 0 && self.unread == 0
    }
}

/// Reads every key of a part of a ledger and judges it.
#[derive(Debug)]
pub struct ReadBack {
    /// Sorted by key.
    entries: Vec<(u64, Entry)>,
    next_index: usize,
    retries: Retries,
    values: Values,
    counters: bool,
    audit: Audit,
}

impl ReadBack {
    pub fn new(entries: Vec<(u64, Entry)>, values: Values, counters: bool, patience: Duration) -> Self {
        let retries = Retries::new(patience);
        Self { entries, next_index: 0, retries, values, counters, audit: Audit::default() }
    }

    pub fn finish(self) -> Audit {
        Audit { unread: self.entries.len() as u64 - self.retries.successes, ..self.audit }
    }
}

impl Traffic for ReadBack {
    fn next(&mut self, _connection: u64) -> Option<Request> {
        if self.retries.hopeless {
            return None;
        }
        let key = match self.retries.keys.pop() {
            Some(key) => key,
            None => {
                let (key, _) = self.entries.get(self.next_index)?;
                self.next_index += 1;
                *key
            }
        };
        Some(Request { verb: Verb::Get, key, version: 0 })
    }

    fn settle(&mut self, request: &Request, outcome: Outcome<'_>) {
        let Outcome::Answered(reply) = outcome else { return self.retries.failed(request.key) };
        self.retries.successes += 1;
        let index = self
            .entries
            .binary_search_by_key(&request.key, |(key, _)| *key)
            .expect("only keys of the entries are asked for");
        let (key, entry) = self.entries[index];
        let found = if let Reply::Bulk(found) = reply { Some(found) } else { None };
        let verdict = if self.counters {
            ledger::judge_counter(&entry, found)
        } else {
            ledger::judge_value(self.values, key, &entry, found)
        };
        match verdict {
            Verdict::Kept => self.audit.kept += 1,
            Verdict::Open => self.audit.open += 1,
            Verdict::Lost => self.audit.lost += 1,
            Verdict::Wrong => self.audit.wrong += 1,
        }
        if matches!(verdict, Verdict::Lost | Verdict::Wrong) && self.audit.findings.len() < FINDINGS_MAX {
            let found = found.map(|found| found[..found.len().min(FOUND_BYTES_MAX)].to_vec());
            self.audit.findings.push(Finding { key, verdict, entry, found });
        }
    }
}

#[cfg(test)]
mod tests {

    use std::collections::HashMap;

    use clap::Parser;

    use super::super::arguments::BenchArguments;
    use super::super::reply;
    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArguments,
    }

    fn settings(line: &str) -> Settings {
        let words = ["bench", "--seed", "1"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).unwrap().bench.settings().unwrap()
    }

    fn partition(settings: &Settings, thread: u64) -> Partition {
        let (connections, threads) = (settings.clients as u64, settings.threads as u64);
        Partition { keys: settings.keys, connections, threads, thread }
    }

    fn values(settings: &Settings) -> Values {
        Values { seed: settings.seed, size: settings.value_size }
    }

    /// A server of one map.
    struct Model {
        values: Values,
        data: HashMap<u64, Vec<u8>>,
    }

    impl Model {
        fn apply(&mut self, request: &Request) -> Reply<'_> {
            match request.verb {
                Verb::Get => self.data.get(&request.key).map_or(Reply::Nil, |value| Reply::Bulk(value)),
                Verb::Set => {
                    let mut value = Vec::new();
                    self.values.append(request.key, request.version, &mut value);
                    self.data.insert(request.key, value);
                    Reply::Simple(b"OK")
                }
                Verb::SetZero => {
                    self.data.insert(request.key, b"0".to_vec());
                    Reply::Simple(b"OK")
                }
                Verb::Incr => {
                    let value = self.data.entry(request.key).or_insert_with(|| b"0".to_vec());
                    let number = reply::integer(value).unwrap() + 1;
                    *value = number.to_string().into_bytes();
                    Reply::Integer(number)
                }
            }
        }
    }

    /// Runs load, workload and reading back on a model that fails now and then and, when told so, forgets.
    fn run(line: &str, forgets: bool) -> (Violations, Audit) {
        let settings = settings(line);
        let partition = partition(&settings, 0);
        let values = values(&settings);
        let mut model = Model { values, data: HashMap::new() };
        let mut random = Rng::with_seed(5);
        let mut load = Load::new(&settings, partition, Some(Records::new(partition)));
        while let Some(request) = load.next(0) {
            load.settle(&request, Outcome::Answered(model.apply(&request)));
        }
        let (missing, records) = load.finish();
        assert_eq!(missing, 0);
        let mut mix = Mix::new(&settings, values, partition, records);
        let mut connection = 0;
        while let Some(request) = mix.next(connection) {
            match random.u32(0..100) {
                0 => mix.settle(&request, Outcome::Lost),
                1 => {
                    model.apply(&request);
                    mix.settle(&request, Outcome::Lost);
                }
                2 => mix.settle(&request, Outcome::Failed(b"OOM refused")),
                3 => {
                    model.apply(&request);
                    mix.settle(&request, Outcome::Failed(b"ERR odd"));
                }
                _ => {
                    let before = model.data.get(&request.key).cloned();
                    let reply = model.apply(&request);
                    mix.settle(&request, Outcome::Answered(reply));
                    if forgets && random.u32(0..50) == 0 {
                        model.data.insert(request.key, before.unwrap());
                    }
                }
            }
            connection = (connection + 1) % partition.connections;
        }
        let (violations, records) = mix.finish();
        let entries = records.unwrap().entries;
        let entries = (0..).zip(entries).map(|(index, entry)| (partition.key_at(index), entry)).collect();
        let counters = settings.workload == Workload::Incr;
        let mut back = ReadBack::new(entries, values, counters, settings.server.timeout);
        while let Some(request) = back.next(0) {
            if random.u32(0..10) == 0 {
                back.settle(&request, Outcome::Lost);
            } else {
                back.settle(&request, Outcome::Answered(model.apply(&request)));
            }
        }
        (violations, back.finish())
    }

    const WORKLOADS: [&str; 4] = [
        "--verify --workload incr --keys 1000 -n 20000",
        "--verify --workload set --load --keys 5000 -n 20000",
        "--verify --read-ratio 0.5 --load --keys 5000 -n 20000 --value-size 8-50 --distribution zipfian",
        "--verify --read-ratio 0.2 --load --keys 999 -n 3000 --distribution sequential",
    ];

    #[test]
    fn a_true_server_is_found_true() {
        for line in WORKLOADS {
            let (violations, audit) = run(line, false);
            assert_eq!(violations, Violations::default(), "{line}");
            assert!(audit.is_clean() && audit.kept > audit.open, "{line}: {audit:?}");
        }
    }

    #[test]
    fn a_forgetful_server_is_found_out() {
        for line in WORKLOADS {
            let (violations, audit) = run(line, true);
            assert!(audit.lost > 0, "{line}: {violations:?} {audit:?}");
        }
    }

    #[test]
    fn the_load_writes_each_key_once_and_repeats_what_failed() {
        let settings = settings("--keys 1003 --clients 7 --threads 3");
        let mut written = vec![0; 1003];
        for thread in 0..3 {
            let mut load = Load::new(&settings, partition(&settings, thread), None);
            let mut count = 0;
            while let Some(request) = load.next(0) {
                count += 1;
                if count % 10 == 0 {
                    load.settle(&request, Outcome::Failed(b"LOADING"));
                } else {
                    written[request.key as usize] += 1;
                    load.settle(&request, Outcome::Answered(Reply::Simple(b"OK")));
                }
            }
            assert_eq!(load.finish().0, 0);
        }
        assert!(written.iter().all(|count| *count == 1));
    }

    #[test]
    fn sequential_sets_write_each_key_once() {
        for line in ["", "--verify"] {
            let line =
                format!("{line} --distribution sequential --workload set --keys 600 -n 600 --clients 6 --threads 2");
            let settings = settings(&line);
            let mut written = vec![0; 600];
            for thread in 0..2 {
                let partition = partition(&settings, thread);
                let records = settings.verify.then(|| Records::new(partition));
                let mut mix = Mix::new(&settings, values(&settings), partition, records);
                let mut connection = thread;
                while let Some(request) = mix.next(connection) {
                    written[request.key as usize] += 1;
                    connection = (connection + 2) % 6;
                }
            }
            assert!(written.iter().all(|count| *count == 1), "{line}");
        }
    }

    #[test]
    fn reads_and_writes_keep_their_ratio() {
        let settings = settings("--read-ratio 0.8 -n 10000");
        let mut mix = Mix::new(&settings, values(&settings), partition(&settings, 0), None);
        let reads = std::iter::from_fn(|| mix.next(0)).filter(|request| request.verb == Verb::Get).count();
        assert!((7800..8200).contains(&reads), "{reads}");
    }

    #[test]
    fn hopeless_retries_end() {
        let settings = settings("--keys 100 --timeout 0.01");
        let mut load = Load::new(&settings, partition(&settings, 0), None);
        while let Some(request) = load.next(0) {
            load.settle(&request, Outcome::Failed(b"OOM"));
        }
        assert_eq!(load.finish().0, 100);
    }
}
