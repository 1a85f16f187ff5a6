//! Tests on databases as they lie on disk: damaged, missing, or of another version.

use super::database::Database;
use super::garbage::Rules;
use super::{Engine, Tier, log_files, meta};
use crate::config::{Config, MemoryConfig};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vasto_proto::topology::SlotSet;

fn engine() -> Engine {
    let memory = MemoryConfig { row_cache_bytes: 1 << 20, block_cache_bytes: 1 << 20, write_buffer_bytes: 8 << 20 };
    Engine::new(&Config { memory, background_jobs: 1, ..Config::default() }).unwrap()
}

const RULES: Rules = Rules { grace: Duration::from_secs(3600), replicated_ns: super::garbage::ONLY_COPY };

/// A row of a length that depends on its number.
fn row(number: u32) -> Vec<u8> {
    let byte = (number * 31) as u8;
    vec![byte; 30 + number as usize % 50]
}

fn put(database: &Database, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let mut writes = database.writes(1, 100);
        writes.put_row(&number.to_be_bytes(), &row(number));
        database.write(writes, Tier::Disk).unwrap();
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn find(folder: &Path, is: impl Fn(&str) -> bool) -> PathBuf {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| is(path.file_name().unwrap().to_str().unwrap()));
    found.sort();
    found.pop().expect("there is such a file")
}

/// A shard with rows in tables and rows that only its log has.
fn filled(engine: &Engine, folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let database = Database::open(engine, folder, RULES, super::OldLogs::Deleted).unwrap();
    put(&database, 0..50);
    database.flush().unwrap();
    put(&database, 50..100);
    database.flush().unwrap();
    put(&database, 100..150);
}

/// What RocksDB makes of real files: every bit of every header of a manifest and of a log, one at a time.
#[test]
fn a_flipped_bit_in_a_header_is_refused_with_the_name_of_the_file() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    filled(&engine, &original);
    for name in [find(&original, |name| name.starts_with("MANIFEST")), find(&original, |name| name.ends_with(".log"))] {
        let name = name.file_name().unwrap();
        let whole = fs::read(original.join(name)).unwrap();
        let copy = folder.path().join("copy");
        copy_folder(&original, &copy);
        let (mut at, mut headers) = (0, 0);
        while let Some(bytes) = log_files::record_bytes(&whole[at..]) {
            for bit in at * 8..(at + log_files::HEADER_BYTES) * 8 {
                let mut flipped = whole.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                fs::write(copy.join(name), flipped).unwrap();
                let error = Database::open(&engine, &copy, RULES, super::OldLogs::Deleted)
                    .err()
                    .expect("a flipped bit is found")
                    .to_string();
                assert!(error.contains(name.to_str().unwrap()), "bit {bit} of {name:?}: {error}");
            }
            at += bytes;
            headers += 1;
        }
        assert!(headers > 5, "{headers} records in {name:?}");
        assert_eq!(at, whole.len());
        fs::write(copy.join(name), &whole).unwrap();
        let database = Database::open(&engine, &copy, RULES, super::OldLogs::Deleted).unwrap();
        for number in 0..150_u32 {
            let found = database.get(&number.to_be_bytes(), Tier::Disk).unwrap();
            assert_eq!(found.as_deref(), Some(row(number).as_slice()));
        }
        drop(database);
        fs::remove_dir_all(&copy).unwrap();
    }
}

/// What a killed process leaves of a new database; returns its folder in `folder`.
fn killed_after(engine: &Engine, folder: &Path, run: impl FnOnce(&Database)) -> PathBuf {
    let (original, copy) = (folder.join("original"), folder.join("copy"));
    fs::create_dir_all(&original).unwrap();
    let database = Database::open(engine, &original, RULES, super::OldLogs::Deleted).unwrap();
    run(&database);
    copy_folder(&original, &copy);
    copy
}

/// Turns over a stretch of the log's record with this number, counted from its end.
fn spoil(log: &Path, from_end: usize) {
    let mut content = fs::read(log).unwrap();
    let (mut at, mut records) = (0, Vec::new());
    while let Some(bytes) = log_files::record_bytes(&content[at..]) {
        records.push(at..at + bytes);
        at += bytes;
    }
    assert_eq!(at, content.len());
    let record = records[records.len() - from_end].clone();
    for byte in &mut content[record.start + 10..record.end - 5] {
        *byte = !*byte;
    }
    fs::write(log, content).unwrap();
}

/// The log itself says what of it is synced: what is spoilt there is refused, what is spoilt behind it was never synced.
#[test]
fn a_log_is_cut_off_only_behind_what_is_synced() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let copy = killed_after(&engine, folder.path(), |database| {
        put(database, 0..20);
        database.sync_log().unwrap();
        put(database, 20..50);
    });
    let log = find(&copy, |name| name.ends_with(".log"));
    let whole = fs::read(&log).unwrap();

    for from_end in 31..50 {
        spoil(&log, from_end);
        let error =
            Database::open(&engine, &copy, RULES, super::OldLogs::Deleted).err().expect("it is refused").to_string();
        assert!(error.contains(log.file_name().unwrap().to_str().unwrap()), "{error}");
        assert!(error.contains("synced"), "{error}");
        fs::write(&log, &whole).unwrap();
    }

    spoil(&log, 10);
    let database = Database::open(&engine, &copy, RULES, super::OldLogs::Deleted).unwrap();
    let is_there =
        |database: &Database, number: u32| database.get(&number.to_be_bytes(), Tier::Disk).unwrap().is_some();
    assert!((0..40).all(|number| is_there(&database, number)));
    assert!(!(40..50).any(|number| is_there(&database, number)), "nothing is kept behind what is lost");
    put(&database, 40..60);
    drop(database);
    let database = Database::open(&engine, &copy, RULES, super::OldLogs::Deleted).unwrap();
    assert!((0..60).all(|number| is_there(&database, number)));
}

/// The first write after a pause need not come: the log says so by itself.
#[test]
fn what_was_synced_before_a_pause_is_noted() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let copy = killed_after(&engine, folder.path(), |database| {
        put(database, 0..20);
        database.sync_log().unwrap();
        database.note_synced().unwrap();
        let sequence = database.sequence();
        database.note_synced().unwrap();
        assert_eq!(database.sequence(), sequence, "once is enough");
    });
    spoil(&find(&copy, |name| name.ends_with(".log")), 2);
    let error =
        Database::open(&engine, &copy, RULES, super::OldLogs::Deleted).err().expect("it is refused").to_string();
    assert!(error.contains("synced"), "{error}");
}

/// RocksDB reads the properties of a table before their checksum is looked at, and blames the manifest.
#[test]
fn a_table_that_does_not_open_is_named_and_not_the_manifest() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    filled(&engine, &original);
    let copy = folder.path().join("copy");
    copy_folder(&original, &copy);
    let table = find(&copy, |name| name.ends_with(".sst"));
    let mut content = fs::read(&table).unwrap();
    // In the name of a property (rocksdb.num.data.blocks, stored without what it shares with the one before), so that they are no
    // longer in order.
    let name = b"um.data.blocks";
    let place =
        content.windows(name.len()).position(|bytes| bytes == name).expect("the properties are stored as plain text");
    content[place] ^= 1 << 6;
    fs::write(&table, content).unwrap();
    let error =
        Database::open(&engine, &copy, RULES, super::OldLogs::Deleted).err().expect("it is refused").to_string();
    assert!(error.contains(table.file_name().unwrap().to_str().unwrap()), "{error}");
    assert!(!error.contains("MANIFEST"), "{error}");
}

#[test]
fn a_file_that_is_missing_is_refused() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    filled(&engine, &original);
    for (is, named) in [
        (&(|name: &str| name == "CURRENT") as &dyn Fn(&str) -> bool, "CURRENT"),
        (&|name: &str| name.starts_with("MANIFEST"), "MANIFEST"),
        (&|name: &str| name.ends_with(".log"), "write-ahead log"),
        (&|name: &str| name.ends_with(".sst"), ".sst"),
    ] {
        let copy = folder.path().join("copy");
        copy_folder(&original, &copy);
        fs::remove_file(find(&copy, is)).unwrap();
        let error =
            Database::open(&engine, &copy, RULES, super::OldLogs::Deleted).err().expect("it is missed").to_string();
        assert!(error.contains(named), "{named}: {error}");
        fs::remove_dir_all(&copy).unwrap();
    }
}

#[test]
fn a_database_whose_making_was_cut_short_is_made_again() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("MANIFEST-000001"), b"half").unwrap();
    Database::open(&engine, folder.path(), RULES, super::OldLogs::Deleted).unwrap();
}

/// A later version of this program has been here: it alone knows how to read the rows.
#[test]
fn a_newer_format_is_refused_and_left_as_it_was() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    filled(&engine, folder.path());
    let database = Database::open(&engine, folder.path(), RULES, super::OldLogs::Deleted).unwrap();
    database.put_meta_synced(meta::FORMAT, &(meta::FORMAT_VERSION + 1).to_be_bytes()).unwrap();
    drop(database);
    for _ in 0..2 {
        let error = Database::open(&engine, folder.path(), RULES, super::OldLogs::Deleted)
            .err()
            .expect("it is refused")
            .to_string();
        assert!(error.contains(&format!("format version {}", meta::FORMAT_VERSION + 1)), "{error}");
    }
    let names = rocksdb::DB::list_cf(&rocksdb::Options::default(), folder.path()).unwrap();
    let database =
        rocksdb::DB::open_cf_for_read_only(&rocksdb::Options::default(), folder.path(), names, false).unwrap();
    let keys = database.cf_handle("keys").unwrap();
    for number in 0..150_u32 {
        assert_eq!(database.get_cf(keys, number.to_be_bytes()).unwrap(), Some(row(number)), "row {number}");
    }
}

/// Takes rows in as a file.
fn ingest(database: &Database, numbers: std::ops::Range<u32>) {
    let files = database.moved_files();
    let mut writer = files.begin().unwrap();
    numbers.for_each(|number| writer.put(&number.to_be_bytes(), &row(number)).unwrap());
    let file = writer.finish().unwrap();
    if !database.ingest(&file).unwrap() {
        // What memtables have between its keys keeps a file out.
        database.write_out_memtables().unwrap();
        assert!(database.ingest(&file).unwrap());
    }
}

/// Writes a key behind that of a number, so that a file with keys on both sides must be newer.
fn put_between(database: &Database, number: u32) {
    let mut writes = database.writes(1, 100);
    writes.put_row(&[&number.to_be_bytes()[..], b"between"].concat(), b"row");
    database.write(writes, Tier::Disk).unwrap();
}

fn reopen(engine: &Engine, copy: &Path) -> Database {
    Database::open(engine, copy, RULES, super::OldLogs::Deleted).unwrap()
}

/// A file that is taken in has a number that stands in no log.
#[test]
fn what_was_taken_in_is_there_after_a_kill_among_what_was_written_before_and_behind() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let copy = killed_after(&engine, folder.path(), |database| {
        put(database, 0..20);
        database.sync_log().unwrap();
        put(database, 500..501);
        put_between(database, 250);
        let before = database.sequence();
        ingest(database, 100..400);
        assert_eq!(database.sequence(), before + 1, "it takes a number");
        put(database, 20..60);
        database.sync_log().unwrap();
        database.note_synced().unwrap();
        ingest(database, 600..700);
        put(database, 60..80);
        assert!(
            !fs::read_dir(database.folder())
                .unwrap()
                .any(|entry| { entry.unwrap().path().extension().is_some_and(|extension| extension == "moved") })
        );
    });
    fs::write(copy.join("0123.moved"), "half").unwrap();
    for _ in 0..2 {
        let database = reopen(&engine, &copy);
        for number in (0..80).chain(100..400).chain(500..501).chain(600..700) {
            let found = database.get(&u32::to_be_bytes(number), Tier::Disk).unwrap();
            assert_eq!(found.as_deref(), Some(row(number).as_slice()), "row {number}");
        }
        assert!(!copy.join("0123.moved").exists(), "what was not taken in is gone");
        put(&database, 0..5);
    }
}

/// The number that a file has taken is that before the first batch behind it, which nobody has synced.
#[test]
fn a_file_that_is_taken_in_does_not_call_the_batch_behind_it_synced() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let copy = killed_after(&engine, folder.path(), |database| {
        // In a table, so that the log stays the same.
        put_between(database, 555);
        database.flush().unwrap();
        put(database, 0..20);
        let before = database.sequence();
        ingest(database, 550..560);
        assert_eq!(database.sequence(), before + 1, "it takes a number");
        database.sync_log().unwrap();
        // Both say how far the log was synced when they began.
        let [mut first, mut second] = [database.writes(1, 100), database.writes(1, 100)];
        first.put_row(&20u32.to_be_bytes(), &row(20));
        second.put_row(&21u32.to_be_bytes(), &row(21));
        database.write(first, Tier::Disk).unwrap();
        database.write(second, Tier::Disk).unwrap();
    });
    spoil(&find(&copy, |name| name.ends_with(".log")), 2);
    let database = reopen(&engine, &copy);
    let is_there = |number: u32| database.get(&number.to_be_bytes(), Tier::Disk).unwrap().is_some();
    assert!((0..20).chain(550..560).all(is_there));
    assert!(!is_there(20) && !is_there(21), "they were never synced");
}

#[test]
fn slots_are_deleted_with_all_their_rows_and_nothing_else() {
    let engine = engine();
    let folder = tempfile::tempdir().unwrap();
    let database = Database::open(&engine, folder.path(), RULES, super::OldLogs::Deleted).unwrap();
    let key = |slot: u16, name: &[u8]| [&slot.to_be_bytes()[..], name].concat();
    let all = || SlotSet::default().complement();
    let set = |slots: &[u16]| slots.iter().copied().collect::<SlotSet>();
    for slot in [0, 7, 8, 9, 255, 256, 16383] {
        for name in [&b""[..], b"a", b"\xff\xff"] {
            let mut writes = database.writes(1, 100);
            writes.put_row(&key(slot, name), b"row");
            database.write(writes, Tier::Disk).unwrap();
        }
    }
    assert_eq!(database.slots_with_rows(&all()).unwrap(), set(&[0, 7, 8, 9, 255, 256, 16383]));
    assert_eq!(database.slots_with_rows(&set(&[1, 8, 255, 300])).unwrap(), set(&[8, 255]));
    database.flush().unwrap();
    let mut writes = database.writes(8, 100);
    writes.put_row(&key(8, b"before"), b"row");
    writes.delete_slots(&set(&[7, 8, 255, 16383]));
    writes.put_row(&key(255, b"behind"), b"row");
    database.write(writes, Tier::Disk).unwrap();
    for _ in 0..2 {
        assert_eq!(database.slots_with_rows(&all()).unwrap(), set(&[0, 9, 255, 256]));
        assert!(database.get(&key(255, b"behind"), Tier::Disk).unwrap().is_some());
        assert!(database.get(&key(255, b"a"), Tier::Disk).unwrap().is_none());
        database.flush().unwrap();
        database.compact_slots(0..100);
        database.compact_slots(100..16384);
    }
}
