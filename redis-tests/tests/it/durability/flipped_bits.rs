//! One flipped bit anywhere in the data folder, or a file that is gone: never a wrong value, never a key that is silently missing.
//!
//! Either everything is returned right, or whoever asks (or whoever reads the log of the process) learns which file is damaged.
//! `VASTO_FLIPS` is the number of bits for each kind of file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;
use redis_tests::cluster::{launch_server, temporary_directory, wait_until_serving};
use redis_tests::eventually::eventually_within;
use redis_tests::node::READY_TIMEOUT;
use redis_tests::seed::{number_from_environment, seeded};
use redis_tests::{Connection, Node, Value, heavy};
use tempfile::TempDir;

use super::small_with;

const FLIPS: u64 = 3;
const SHARDS: usize = 3;
/// A shard that does not serve is waited for this long by each command.
const OPTIONS: [&str; 4] = ["--shards", "3", "--request-deadline-ms", "300"];

/// What every key holds; `None`: it was deleted.
type Rows = BTreeMap<String, Option<String>>;

/// Picks files of a kind by their paths.
type IsOfKind = fn(&str) -> bool;

/// A data folder with rows in tables and rows in logs alone.
struct Original {
    directory: TempDir,
    rows: Rows,
}

fn value(key: &str, version: u32) -> String {
    format!("{key}#{version}#").repeat(1 + version as usize % 7)
}

impl Original {
    fn fill() -> Original {
        let directory = temporary_directory();
        let data = directory.path().join("data");
        let mut node = launch_server(directory.path(), &data, &small_with(&OPTIONS), &[]);
        node.wait_ready(READY_TIMEOUT);
        wait_until_serving(&node.redis_address());
        let mut rows = Rows::new();
        // Twice in tables: what a stop flushes.
        for round in 0..2 {
            write(&node, &mut rows, round * 100..round * 100 + 200, round);
            assert!(node.terminate().success());
            node.start_again();
        }
        // In the log alone.
        write(&node, &mut rows, 150..500, 2);
        node.kill_9();
        Original { directory, rows }
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// A copy to be damaged.
    fn copy(&self) -> (TempDir, PathBuf) {
        let directory = temporary_directory();
        let data = directory.path().join("data");
        copy_folder(&self.data(), &data);
        (directory, data)
    }

    /// The files of a kind, by their paths in the data folder; empty ones hold nothing that could be damaged.
    fn files(&self, is: IsOfKind) -> Vec<PathBuf> {
        let mut found = Vec::new();
        list(&self.data(), &mut found);
        found.retain(|path| is(path.to_str().unwrap()) && fs::metadata(path).unwrap().len() > 0);
        found.sort();
        assert!(!found.is_empty(), "there is no such file");
        found.iter().map(|path| path.strip_prefix(self.data()).unwrap().to_owned()).collect()
    }
}

/// Sets keys, and deletes some of them again.
fn write(node: &Node, rows: &mut Rows, numbers: std::ops::Range<u32>, version: u32) {
    let mut connection = Connection::open(&node.redis_address());
    for number in numbers {
        let key = format!("key:{number}");
        let value = value(&key, version + number);
        connection.done(&["SET", &key, &value]);
        rows.insert(key.clone(), Some(value));
        if number % 11 == version {
            connection.done(&["DEL", &key]);
            rows.insert(key, None);
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, target).unwrap();
        }
    }
}

fn list(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { list(&path, found) } else { found.push(path) }
    }
}

/// What became of a damaged folder.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Every row is there.
    Whole,
    /// Rows could not be read, and the file was named; the other shards serve.
    PartRefused,
    /// The process did not start, and named the file.
    NotStarted,
}

/// Starts on a damaged copy and looks at every row. `named` is how the damaged file must be called where a row is missed.
fn outcome(original: &Original, directory: &Path, data: &Path, named: &str) -> Outcome {
    let mut node = launch_server(directory, data, &small_with(&OPTIONS), &[]);
    if let Err(reason) = node.try_wait_ready(READY_TIMEOUT) {
        assert!(!node.is_running(), "it neither starts nor ends: {reason}\n{}", node.log());
        assert!(node.log().contains(named), "{named} is not named:\n{}", node.log());
        assert!(!node.log().contains("panicked"), "{}", node.log());
        return Outcome::NotStarted;
    }
    let mut connection = Connection::open(&node.redis_address());
    let commands: Vec<Vec<&str>> = original.rows.keys().map(|key| vec!["GET", key]).collect();
    let replies = connection.pipeline(&commands).unwrap();
    let mut errors = Vec::new();
    for ((key, expected), reply) in original.rows.iter().zip(&replies) {
        match (reply, expected) {
            (Value::Error(text), _) => errors.push(String::from_utf8_lossy(text).into_owned()),
            (Value::Bulk(found), Some(expected)) if found == expected.as_bytes() => {}
            (Value::Nil, None) => {}
            _ => panic!("{key}: {}, not {expected:?}, and no error; damaged is {named}\n{}", reply.text(), node.log()),
        }
    }
    // Walks: all, or an error.
    let live = original.rows.values().flatten().count();
    match connection.call(&["KEYS", "*"]) {
        Value::Error(text) => errors.push(String::from_utf8_lossy(&text).into_owned()),
        keys => assert_eq!(keys.elements().unwrap().len(), live, "keys are silently missing; damaged is {named}"),
    }
    match connection.call(&["DBSIZE"]) {
        Value::Error(text) => errors.push(String::from_utf8_lossy(&text).into_owned()),
        count => assert_eq!(count, Value::Integer(live as i64), "damaged is {named}"),
    }
    if errors.is_empty() {
        return Outcome::Whole;
    }
    let log = node.log();
    for error in &errors {
        assert!(error.contains(named) || log.contains(named), "{error}\nnames no {named}, nor does\n{log}");
    }
    assert!(!log.contains("panicked"), "{log}");
    let served = replies.iter().filter(|reply| !reply.is_error()).count();
    assert!(served > replies.len() / (2 * SHARDS), "the other shards serve too: {served} of {}", replies.len());
    // What could be read can be written.
    let (key, _) = original.rows.keys().zip(&replies).find(|(_, reply)| !reply.is_error()).unwrap();
    connection.done(&["SET", key, "after"]);
    assert_eq!(connection.call(&["GET", key]), Value::bulk("after"));
    Outcome::PartRefused
}

fn flip(original: &Original, kind: &str, is: IsOfKind, random: &mut Rng) {
    let files = original.files(is);
    let (mut whole, mut refused, mut not_started) = (0, 0, 0);
    for _ in 0..number_from_environment("VASTO_FLIPS").unwrap_or(FLIPS) {
        let file = &files[random.usize(..files.len())];
        let (directory, data) = original.copy();
        let path = data.join(file);
        let mut content = fs::read(&path).unwrap();
        let bit = random.usize(..content.len() * 8);
        content[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, content).unwrap();
        eprintln!("{kind}: bit {bit} of {}", file.display());
        match outcome(original, directory.path(), &data, file.file_name().unwrap().to_str().unwrap()) {
            Outcome::Whole => whole += 1,
            Outcome::PartRefused => refused += 1,
            Outcome::NotStarted => not_started += 1,
        }
    }
    eprintln!("{kind}: {whole} without effect, {refused} refused by their shard, {not_started} at the start");
}

#[test]
fn a_flipped_bit_is_named_and_hides_nothing() {
    let _turn = heavy();
    let mut random = seeded("flipped bits").random;
    let original = Original::fill();
    let kinds: [(&str, IsOfKind); 8] = [
        ("log", |path| path.contains("/shards/") && path.ends_with(".log")),
        ("table", |path| path.ends_with(".sst")),
        ("manifest", |path| path.contains("/MANIFEST-")),
        ("current", |path| path.ends_with("/CURRENT")),
        ("options", |path| path.contains("/OPTIONS-")),
        ("identity of a database", |path| path.ends_with("/IDENTITY")),
        ("identity of the store", |path| path.ends_with("/identity")),
        ("record", |path| path.contains("/records/")),
    ];
    for (kind, is) in kinds {
        flip(&original, kind, is, &mut random);
    }
}

#[test]
fn a_file_that_is_missing_is_named_and_hides_nothing() {
    let _turn = heavy();
    let original = Original::fill();
    for (is, named) in [
        ((|path: &str| path.contains("/shards/") && path.ends_with(".log")) as IsOfKind, "write-ahead log"),
        (|path: &str| path.ends_with(".sst"), ""),
        (|path: &str| path.contains("/MANIFEST-"), ""),
        (|path: &str| path.ends_with("/CURRENT"), ""),
    ] {
        let file = &original.files(is)[0];
        let (directory, data) = original.copy();
        fs::remove_file(data.join(file)).unwrap();
        let named = if named.is_empty() { file.file_name().unwrap().to_str().unwrap() } else { named };
        let outcome = outcome(&original, directory.path(), &data, named);
        assert_eq!(outcome, Outcome::PartRefused, "{} is missing", file.display());
    }
}

/// Not a flipped bit but bytes that a crash cut off: what was being written is left out, everything before is there, and
/// the log of the process says where.
#[test]
fn a_log_that_is_cut_short_loses_its_end_alone_and_it_is_said() {
    let _turn = heavy();
    let mut random = seeded("cut log").random;
    let original = Original::fill();
    let files = original.files(|path| path.contains("/shards/") && path.ends_with(".log"));
    let file = &files[random.usize(..files.len())];
    let (directory, data) = original.copy();
    let path = data.join(file);
    let length = fs::metadata(&path).unwrap().len();
    // Less than the shortest record of a row: the last one is cut.
    let cut = random.u64(1..40);
    fs::File::options().write(true).open(&path).unwrap().set_len(length - cut).unwrap();
    let mut node = launch_server(directory.path(), &data, &small_with(&OPTIONS), &[]);
    node.wait_ready(READY_TIMEOUT);
    let name = file.file_name().unwrap().to_str().unwrap();
    eventually_within(Duration::from_secs(10), "the log says what was left out", || {
        if node.log().contains(name) { Ok(()) } else { Err(node.log()) }
    });
    let mut connection = Connection::open(&node.redis_address());
    let different = original.rows.iter().filter(|(key, expected)| {
        let found = connection.call(&["GET", key.as_str()]);
        found != expected.as_ref().map_or(Value::Nil, Value::bulk)
    });
    assert_eq!(different.count(), 1, "only the last write of the shard was cut");
}
