//! Looks through a shard's write-ahead logs and its manifest before RocksDB replays them: each must be whole, or torn at its end.
//!
//! RocksDB takes a flipped bit in the header of a record for the end of the file and silently leaves out what follows; a
//! flipped type of a later record it reads for ever. A manifest that is cut so forgets tables, a log forgets writes. Here every
//! record is compared with its checksum, and what cannot be read is told apart:
//! - One flipped bit explains it, wherever it lies: damage.
//! - A later batch of the logs carries a mark (`synced_mark`) which says that this place was synced: damage.
//! - Else it was being written when the power went: pages that were not synced may reach the disk in any order, or as zeros. The log
//!   is cut there. A manifest is synced record by record, so there nothing may follow but zeros.

use super::EngineError;
use super::crc32c::{crc32c, is_one_bit_off, mask};
use super::synced_mark::Marks;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Records lie in blocks of this size; what is too short for a header at the end of a block is padding.
const BLOCK_BYTES: usize = 32 << 10;
/// Checksum (4, little endian), length (2, little endian), type (1).
pub const HEADER_BYTES: usize = 7;
/// A batch begins with the sequence number of its first row (8, little endian) and the number of its rows (4, little endian).
const BATCH_HEAD_BYTES: usize = 12;
/// What a disk writes whole or not at all.
const SECTOR_BYTES: u64 = 512;
/// The manifest that a database is born with; it has a log from the next one on.
const FIRST_MANIFEST: u64 = 1;

const MANIFEST: &str = "MANIFEST-";
const TABLE_EXTENSION: &str = ".sst";
/// A shard may have thousands of tables.
const TABLES_NAMED_MAX: usize = 20;

/// How a file of records ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// In the middle of a record, as a crash leaves it: that record was not acknowledged, or not as synced.
    Torn {
        offset: u64,
        bytes: u64,
        remains: Remains,
    },
}

/// What lies where a file is torn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remains {
    /// The beginning of a record, or space that was never written: RocksDB passes over it.
    Beginning,
    /// Parts of what was written, in any order: RocksDB would call it damaged, so it is cut off.
    Pieces,
}

/// What the records of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Of a log; some carry a mark of what is synced.
    Batches,
    /// Of a manifest; each is synced before the next is written.
    Edits,
}

/// Something that no crash leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Damage {
    offset: u64,
    reason: &'static str,
}

/// Fails, naming the file, if one of the shard's files that RocksDB reads at its start is damaged or missing. A folder without a
/// database is in order.
pub fn check(folder: &Path) -> Result<(), EngineError> {
    let files = Files::of(folder)?;
    let Some(manifest) = files.current(folder)? else { return Ok(()) };
    if files.logs.is_empty() && manifest > FIRST_MANIFEST {
        return Err(damaged(format!("the write-ahead log in {} is missing", folder.display())));
    }
    let manifest = folder.join(manifest_name(manifest));
    check_file(&manifest, Content::Edits, &mut 0)?.map_or(Ok(()), |torn| torn.cut_off(&manifest))?;
    let mut next_sequence = 0;
    for (number, log) in files.logs.iter().enumerate() {
        let Some(torn) = check_file(log, Content::Batches, &mut next_sequence)? else { continue };
        for later in &files.logs[number + 1..] {
            if largest_mark(later)?.is_some_and(|synced| synced >= next_sequence) {
                let reason = "what lies here is no record, and a later log says that it was synced";
                return Err(Damage { offset: torn.offset, reason }.of(log));
            }
        }
        torn.cut_off(log)?;
    }
    Ok(())
}

/// The error of a database that does not open though its files passed [`check`]. RocksDB blames the manifest for what it meets while it
/// replays it, as a damaged head of a table, whose name it does not tell. Nobody shall throw the manifest away for that.
pub fn opening_error(folder: &Path, error: rocksdb::Error) -> EngineError {
    let text: &str = error.as_ref();
    match text.split_once(" The file ") {
        Some((reason, file)) if file.contains(MANIFEST) && !reason.contains(TABLE_EXTENSION) => {
            let Ok(Files { tables, .. }) = Files::of(folder) else { return error.into() };
            let more = tables.len().saturating_sub(TABLES_NAMED_MAX);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let names = tables[..tables.len().min(TABLES_NAMED_MAX)].join(", ");
            let reason = reason.trim_end();
            damaged(format!(
                "{reason}: the manifest is whole, so it is a table in {}: one of {names}{more}",
                folder.display()
            ))
        }
        Some(_) | None => error.into(),
    }
}

fn manifest_name(number: u64) -> String {
    format!("{MANIFEST}{number:06}")
}

fn unreadable(path: &Path, error: &io::Error) -> EngineError {
    EngineError::Disk(format!("cannot read {}: {error}", path.display()))
}

fn damaged(text: String) -> EngineError {
    EngineError::Corrupt(text)
}

impl Damage {
    fn of(&self, path: &Path) -> EngineError {
        damaged(format!("{} is damaged at byte {}: {}", path.display(), self.offset, self.reason))
    }
}

/// Pieces at the end of a file that are not to be read.
struct Pieces {
    offset: u64,
    bytes: u64,
}

impl Pieces {
    fn cut_off(&self, path: &Path) -> Result<(), EngineError> {
        let Self { offset, bytes } = *self;
        tracing::warn!(file = %path.display(), offset, bytes, "what was being written when the power went, and never synced, is cut off");
        let cut = File::options().write(true).open(path).and_then(|file| {
            file.set_len(offset)?;
            file.sync_all()
        });
        cut.map_err(|error| EngineError::Disk(format!("cannot cut off the end of {}: {error}", path.display())))
    }
}

/// Fails if the file is damaged; else what must be cut off its end before RocksDB reads it.
fn check_file(path: &Path, content: Content, next_sequence: &mut u64) -> Result<Option<Pieces>, EngineError> {
    let examined = File::open(path).and_then(|file| examine(file, content, next_sequence));
    match examined.map_err(|error| unreadable(path, &error))? {
        Ok(End::Whole) => Ok(None),
        Ok(End::Torn { offset, bytes, remains: Remains::Beginning }) => {
            tracing::warn!(file = %path.display(), offset, bytes, "a record was being written at the last end; it is left out");
            Ok(None)
        }
        Ok(End::Torn { offset, bytes, remains: Remains::Pieces }) => Ok(Some(Pieces { offset, bytes })),
        Err(damage) => Err(damage.of(path)),
    }
}

/// The largest sequence number that a mark in the log calls synced.
fn largest_mark(path: &Path) -> Result<Option<u64>, EngineError> {
    let mut behind = Behind::default();
    let read = File::open(path).and_then(|mut file| behind.read_on(&mut file, &mut vec![0; BLOCK_BYTES]));
    read.map_err(|error| unreadable(path, &error))?;
    Ok(behind.marks.largest())
}

/// What lies in a shard's folder.
#[derive(Default)]
struct Files {
    logs: Vec<PathBuf>,
    tables: Vec<String>,
    last_manifest: u64,
}

impl Files {
    fn of(folder: &Path) -> Result<Self, EngineError> {
        let mut files = Self::default();
        let mut logs: Vec<(u64, PathBuf)> = Vec::new();
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            // RocksDB would make a new database here and forget the one that was.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged(format!("{} is missing", folder.display())));
            }
            Err(error) => return Err(unreadable(folder, &error)),
        };
        for entry in entries {
            let path = entry.map_err(|error| unreadable(folder, &error))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some(number) = name.strip_prefix(MANIFEST).and_then(|number| number.parse().ok()) {
                files.last_manifest = files.last_manifest.max(number);
            }
            match name.split_once('.') {
                Some((number, "log")) => logs.extend(number.parse().ok().map(|number| (number, path))),
                Some((_, "sst")) => files.tables.push(name.to_owned()),
                Some(_) | None => {}
            }
        }
        // By number: with the millionth file the names get longer.
        logs.sort();
        files.logs = logs.into_iter().map(|(_, path)| path).collect();
        files.tables.sort();
        Ok(files)
    }

    /// The number of the manifest that the file CURRENT names; `None` where no database is yet.
    fn current(&self, folder: &Path) -> Result<Option<u64>, EngineError> {
        let path = folder.join("CURRENT");
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // RocksDB would make a new database here and forget this one.
                return if !self.tables.is_empty() || !self.logs.is_empty() || self.last_manifest > FIRST_MANIFEST {
                    Err(damaged(format!("{} is missing, though data are there", path.display())))
                } else {
                    Ok(None)
                };
            }
            Err(error) => return Err(unreadable(&path, &error)),
        };
        let name = content.strip_suffix(b"\n").and_then(|name| std::str::from_utf8(name).ok());
        let number = name.and_then(|name| name.strip_prefix(MANIFEST)?.parse::<u64>().ok());
        match number {
            Some(number) if folder.join(manifest_name(number)).exists() => Ok(Some(number)),
            Some(number) => Err(damaged(format!(
                "{} is damaged: it names {}, which is not there",
                path.display(),
                manifest_name(number)
            ))),
            None => Err(damaged(format!("{} is damaged: it names no manifest", path.display()))),
        }
    }
}

/// Types of records, as far as they are written: logs are not recycled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Full,
    First,
    Middle,
    Last,
    /// Says something about the file itself.
    Note,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Full),
            2 => Some(Self::First),
            3 => Some(Self::Middle),
            4 => Some(Self::Last),
            9 | 10 | 130 => Some(Self::Note),
            _ => None,
        }
    }
}

/// Why there is no record at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoRecord {
    /// It reaches beyond the block.
    TooLong,
    /// A length and a type of zero: space that was never written.
    Blank,
    Wrong(&'static str),
}

/// The record whose header lies at the start of `bytes`: its kind and its bytes with the header.
fn record(bytes: &[u8]) -> Result<(Kind, usize), NoRecord> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(NoRecord::TooLong)?;
    record_with(*header, rest)
}

fn record_with(header: [u8; HEADER_BYTES], rest: &[u8]) -> Result<(Kind, usize), NoRecord> {
    let [sum_0, sum_1, sum_2, sum_3, length_0, length_1, kind] = header;
    let length = usize::from(u16::from_le_bytes([length_0, length_1]));
    if length == 0 && kind == 0 {
        return Err(NoRecord::Blank);
    }
    let payload = rest.get(..length).ok_or(NoRecord::TooLong)?;
    let known = Kind::from_byte(kind).ok_or(NoRecord::Wrong("a record is of an unknown type"))?;
    if mask(crc32c(&[&[kind], payload])) != u32::from_le_bytes([sum_0, sum_1, sum_2, sum_3]) {
        return Err(NoRecord::Wrong("a record does not have its checksum"));
    }
    Ok((known, HEADER_BYTES + length))
}

/// The length, header included, of the record that `bytes` begin with.
#[cfg(test)]
pub fn record_bytes(bytes: &[u8]) -> Option<usize> {
    record(bytes).ok().map(|(_, bytes)| bytes)
}

/// Whether turning back one bit makes it a record: then it was one.
fn is_one_bit_from_a_record(bytes: &[u8]) -> bool {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return false };
    let by_header = (4 * 8..HEADER_BYTES * 8).any(|bit| {
        let mut turned = *header;
        turned[bit / 8] ^= 1 << (bit % 8);
        record_with(turned, rest).is_ok()
    });
    let [sum_0, sum_1, sum_2, sum_3, length_0, length_1, kind] = *header;
    let payload = rest.get(..usize::from(u16::from_le_bytes([length_0, length_1])));
    by_header
        || payload.filter(|_| Kind::from_byte(kind).is_some()).is_some_and(|payload| {
            let sum = crc32c(&[&[kind], payload]);
            is_one_bit_off(sum, u32::from_le_bytes([sum_0, sum_1, sum_2, sum_3]), 1 + payload.len())
        })
}

/// The first bytes of a batch, gathered from the parts of its record.
#[derive(Default)]
struct BatchHead {
    bytes: [u8; BATCH_HEAD_BYTES],
    length: usize,
}

impl BatchHead {
    fn take(&mut self, payload: &[u8]) {
        let taken = payload.len().min(BATCH_HEAD_BYTES - self.length);
        self.bytes[self.length..][..taken].copy_from_slice(&payload[..taken]);
        self.length += taken;
    }

    /// The sequence number that follows those of the batch.
    fn next_sequence(&self) -> Option<u64> {
        let (sequence, rest) = self.bytes[..self.length].split_first_chunk::<8>()?;
        let (count, _) = rest.split_first_chunk::<4>()?;
        Some(u64::from_le_bytes(*sequence).saturating_add(u64::from(u32::from_le_bytes(*count))))
    }
}

/// Reads a file of records to its end. For a log, `next_sequence` becomes the sequence number after those of its last whole batch.
fn examine(mut file: impl Read, content: Content, next_sequence: &mut u64) -> io::Result<Result<End, Damage>> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut block_start = 0;
    // Where the record began whose last part has not come yet.
    let mut unfinished: Option<u64> = None;
    let mut head = BatchHead::default();
    loop {
        let length = read_block(&mut file, &mut buffer)?;
        let block = &buffer[..length];
        let mut at = 0;
        while block.len() - at >= HEADER_BYTES {
            let offset = block_start + at as u64;
            let (kind, bytes) = match record(&block[at..]) {
                Ok(record) => record,
                Err(reason) => {
                    let is_last_block = length < BLOCK_BYTES;
                    let stop = Stop { offset, reason, is_last_block, unfinished, next_sequence: *next_sequence };
                    let rest = block[at..].to_vec();
                    return stopped(stop, content, &rest, file, &mut buffer);
                }
            };
            let damage = |offset, reason| Ok(Err(Damage { offset, reason }));
            unfinished = match (kind, unfinished) {
                (Kind::Full, None) => None,
                (Kind::First, None) => Some(offset),
                (Kind::Middle, Some(start)) => Some(start),
                (Kind::Last, Some(_)) => None,
                (Kind::Note, unfinished) => unfinished,
                (Kind::Full | Kind::First, Some(start)) => return damage(start, "a record has no end"),
                (Kind::Middle | Kind::Last, None) => return damage(offset, "a record has no beginning"),
            };
            if kind != Kind::Note {
                head.take(&block[at + HEADER_BYTES..at + bytes]);
                if unfinished.is_none() {
                    *next_sequence = head.next_sequence().unwrap_or(*next_sequence);
                    head = BatchHead::default();
                }
            }
            at += bytes;
        }
        if length < BLOCK_BYTES {
            let end = block_start + length as u64;
            let torn = unfinished.or((at < length).then_some(block_start + at as u64));
            let torn = torn.map(|offset| End::Torn { offset, bytes: end - offset, remains: Remains::Beginning });
            return Ok(Ok(torn.unwrap_or(End::Whole)));
        }
        block_start += length as u64;
    }
}

/// The place where a file cannot be read on.
struct Stop {
    offset: u64,
    reason: NoRecord,
    is_last_block: bool,
    unfinished: Option<u64>,
    /// The sequence number of the first row that cannot be read.
    next_sequence: u64,
}

/// What lies behind such a place.
#[derive(Default)]
struct Behind {
    bytes: u64,
    /// How many of them there are to the last that is not zero.
    written_bytes: u64,
    has_records: bool,
    marks: Marks,
}

impl Behind {
    /// Reads `block`, a whole one or the end of one. Its first record may lie anywhere, and so may one behind something unreadable,
    /// since a length is not to be trusted. Such a one must be followed by records to the end of the block: a value that was cut off
    /// may hold a log itself.
    fn take(&mut self, block: &[u8]) {
        let written = block.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if written > 0 {
            self.written_bytes = self.bytes + written as u64;
        }
        self.bytes += block.len() as u64;
        let mut at = 0;
        while at < written {
            match record(&block[at..]) {
                Ok((_, bytes)) => {
                    self.has_records = true;
                    self.marks.take(&block[at + HEADER_BYTES..at + bytes]);
                    at += bytes;
                }
                Err(_) => match (at + 1..written).find(|next| are_records_to_the_end(&block[*next..])) {
                    Some(next) => at = next,
                    None => return,
                },
            }
        }
    }

    fn read_on(&mut self, file: &mut impl Read, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            let length = read_block(file, buffer)?;
            if length == 0 {
                return Ok(());
            }
            self.take(&buffer[..length]);
        }
    }
}

/// Tells a torn end from damage. `rest` is the block from the stop on, `file` what follows the block.
fn stopped(
    stop: Stop,
    content: Content,
    rest: &[u8],
    mut file: impl Read,
    buffer: &mut [u8],
) -> io::Result<Result<End, Damage>> {
    let damage = |reason| Ok(Err(Damage { offset: stop.offset, reason }));
    if is_one_bit_from_a_record(rest) {
        return damage("a bit of a record is flipped");
    }
    let mut behind = Behind::default();
    behind.take(rest);
    behind.read_on(&mut file, buffer)?;
    let is_beginning = match stop.reason {
        // RocksDB skips blank space, but not in the middle of a record.
        NoRecord::Blank => behind.written_bytes == 0 && stop.unfinished.is_none(),
        NoRecord::TooLong => stop.is_last_block,
        NoRecord::Wrong(_) => false,
    };
    // The unwritten end of a record that was never synced.
    let blank_from = stop.offset + behind.written_bytes;
    let ends_blank = blank_from.next_multiple_of(SECTOR_BYTES) < stop.offset + behind.bytes;
    match (content, stop.reason) {
        (Content::Edits, _) if behind.has_records => return damage("what lies here is no record, and records follow"),
        (Content::Batches, _) if behind.marks.largest().is_some_and(|synced| synced >= stop.next_sequence) => {
            return damage("what lies here is no record, and what follows says that it was synced");
        }
        (Content::Edits, NoRecord::Wrong(reason)) if !ends_blank => return damage(reason),
        (Content::Edits, NoRecord::TooLong) if !is_beginning && !ends_blank => {
            return damage("a record is longer than its block");
        }
        (Content::Edits | Content::Batches, NoRecord::Blank | NoRecord::TooLong | NoRecord::Wrong(_)) => {}
    }
    let offset = stop.unfinished.unwrap_or(stop.offset);
    let remains = if is_beginning && !behind.has_records { Remains::Beginning } else { Remains::Pieces };
    Ok(Ok(End::Torn { offset, bytes: stop.offset + behind.bytes - offset, remains }))
}

/// Whether these are records, one at least, and nothing but zeros behind them.
fn are_records_to_the_end(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let Ok((_, length)) = record(rest) {
        rest = &rest[length..];
    }
    rest.len() < bytes.len() && rest.iter().all(|byte| *byte == 0)
}

/// Fills the buffer, or reads to the end of the file.
fn read_block(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(bytes) => length += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::super::synced_mark;
    use super::*;

    /// Writes records as RocksDB does.
    #[derive(Default)]
    struct Log {
        bytes: Vec<u8>,
        /// Where the headers lie.
        headers: Vec<usize>,
    }

    impl Log {
        fn of(lengths: &[usize]) -> Self {
            let mut log = Self::default();
            for (number, length) in lengths.iter().enumerate() {
                let payload: Vec<u8> = (0..*length).map(|byte| (byte * 7 + number) as u8).collect();
                log.append(&payload);
            }
            log
        }

        fn append(&mut self, mut payload: &[u8]) {
            let mut is_first = true;
            loop {
                let mut room = BLOCK_BYTES - self.bytes.len() % BLOCK_BYTES;
                if room < HEADER_BYTES {
                    self.bytes.resize(self.bytes.len() + room, 0);
                    room = BLOCK_BYTES;
                }
                let (part, rest) = payload.split_at(payload.len().min(room - HEADER_BYTES));
                let kind = match (is_first, rest.is_empty()) {
                    (true, true) => 1,
                    (true, false) => 2,
                    (false, false) => 3,
                    (false, true) => 4,
                };
                self.headers.push(self.bytes.len());
                self.bytes.extend_from_slice(&mask(crc32c(&[&[kind], part])).to_le_bytes());
                self.bytes.extend_from_slice(&(part.len() as u16).to_le_bytes());
                self.bytes.push(kind);
                self.bytes.extend_from_slice(part);
                if rest.is_empty() {
                    return;
                }
                (is_first, payload) = (false, rest);
            }
        }
    }

    /// What these bytes are as a log and as a manifest, if that is the same.
    fn examined(bytes: &[u8]) -> Result<End, Damage> {
        let of_log = examine(bytes, Content::Batches, &mut 0).unwrap();
        let of_manifest = examine(bytes, Content::Edits, &mut 0).unwrap();
        assert_eq!(of_log, of_manifest);
        of_log
    }

    /// Records of all shapes: short ones, one that ends where its block ends, ones over two and four blocks.
    fn shapes() -> Vec<Log> {
        let exact = BLOCK_BYTES - HEADER_BYTES;
        vec![
            Log::of(&[]),
            Log::of(&[1]),
            Log::of(&[40, 0, 300, 25]),
            Log::of(&[exact, 10]),
            Log::of(&[exact - 3, 10]),
            Log::of(&[100, BLOCK_BYTES, 50, 3 * BLOCK_BYTES, 77]),
        ]
    }

    #[test]
    fn a_whole_log_is_whole() {
        for log in shapes() {
            assert_eq!(examined(&log.bytes), Ok(End::Whole));
        }
    }

    #[test]
    fn a_log_that_a_crash_cut_anywhere_is_torn_at_most() {
        for log in shapes() {
            let step = 1 + log.bytes.len() / 2_000;
            for length in (0..log.bytes.len()).step_by(step) {
                let end = examined(&log.bytes[..length]);
                assert!(end.is_ok(), "cut at {length} of {}: {end:?}", log.bytes.len());
                if let Ok(End::Torn { offset, bytes, remains }) = end {
                    assert_eq!(offset + bytes, length as u64);
                    assert_eq!(remains, Remains::Beginning);
                }
            }
            // Space that was allocated ahead.
            let mut padded = log.bytes.clone();
            padded.resize(log.bytes.len() + 100, 0);
            assert!(examined(&padded).is_ok());
        }
    }

    #[test]
    fn a_value_that_was_cut_off_may_hold_a_log() {
        let mut value = Log::of(&[40, 0, 300, 25]).bytes;
        value.extend_from_slice(&[0x5a; 50]);
        let mut log = Log::of(&[100]);
        let start = log.bytes.len() as u64;
        log.append(&value);
        for cut in 1..50 {
            let bytes = &log.bytes[..log.bytes.len() - cut];
            let torn = End::Torn { offset: start, bytes: bytes.len() as u64 - start, remains: Remains::Beginning };
            assert_eq!(examined(bytes), Ok(torn));
        }
    }

    /// The last record too: RocksDB would take a flip of its length for a torn end, and so would we one of its payload if more of
    /// it were wrong.
    #[test]
    fn no_flipped_bit_passes_for_the_end_of_the_log() {
        for log in shapes() {
            let mut bytes = log.bytes.clone();
            let headers = log.headers.iter().flat_map(|header| header * 8..(header + HEADER_BYTES) * 8);
            let others = (0..bytes.len() * 8).step_by(8 * 997 + 1);
            for bit in headers.chain(others).filter(|bit| bit / 8 < log.bytes.len()) {
                bytes[bit / 8] ^= 1 << (bit % 8);
                let is_padding = !log
                    .headers
                    .iter()
                    .any(|header| (*header..header + record_bytes(&log, *header)).contains(&(bit / 8)));
                assert_eq!(examined(&bytes).is_err(), !is_padding, "bit {bit} of {} bytes", bytes.len());
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    fn record_bytes(log: &Log, header: usize) -> usize {
        HEADER_BYTES + usize::from(u16::from_le_bytes([log.bytes[header + 4], log.bytes[header + 5]]))
    }

    /// Batches of random lengths with syncs in between, of which the next batch tells.
    struct Grown {
        log: Log,
        synced_bytes: usize,
        synced_sequence: u64,
        /// What of it the marks in the log cover.
        noted_bytes: usize,
    }

    impl Grown {
        fn by(random: &mut fastrand::Rng) -> Self {
            let log = Log::default();
            let mut grown = Self { log, synced_bytes: 0, synced_sequence: 0, noted_bytes: 0 };
            let mut sequence = 1_u64;
            for _ in 0..random.usize(2..60) {
                let count = random.u32(1..4);
                let mut batch = sequence.to_le_bytes().to_vec();
                batch.extend_from_slice(&count.to_le_bytes());
                if grown.synced_bytes > grown.noted_bytes {
                    batch.extend_from_slice(&synced_mark::encode(grown.synced_sequence));
                    grown.noted_bytes = grown.synced_bytes;
                }
                let value_bytes = [40, 6_000][random.usize(..2)];
                batch.extend(std::iter::repeat_with(|| random.u8(..)).take(value_bytes));
                grown.log.append(&batch);
                sequence += u64::from(count);
                if random.u8(..4) == 0 {
                    grown.synced_bytes = grown.log.bytes.len();
                    grown.synced_sequence = sequence - 1;
                }
            }
            grown
        }
    }

    #[test]
    fn a_power_cut_takes_the_end_that_was_not_synced() {
        let mut cut_off = 0;
        for seed in 0..2_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let Grown { log, synced_bytes, synced_sequence, .. } = Grown::by(&mut random);
            let mut bytes = log.bytes;
            bytes.truncate(random.usize(synced_bytes..=bytes.len()));
            // Each sector that was not synced is there or not, whatever became of the others.
            let mut start = synced_bytes;
            while start < bytes.len() {
                let end = bytes.len().min((start + 1).next_multiple_of(512));
                if random.bool() {
                    bytes[start..end].fill(0);
                }
                start = end;
            }
            let mut next_sequence = 0;
            let end = examine(&bytes[..], Content::Batches, &mut next_sequence).unwrap();
            let offset = match end {
                Ok(End::Whole) => bytes.len(),
                Ok(End::Torn { offset, remains, .. }) => {
                    cut_off += usize::from(remains == Remains::Pieces);
                    offset as usize
                }
                Err(damage) => panic!("seed {seed}: {damage:?}, synced to byte {synced_bytes}"),
            };
            assert!(offset >= synced_bytes, "seed {seed}: torn at {offset}, synced to byte {synced_bytes}");
            assert!(next_sequence > synced_sequence || synced_bytes == 0, "seed {seed}: up to {next_sequence}");
            let cut = examine(&bytes[..offset], Content::Batches, &mut 0).unwrap();
            assert_eq!(cut, Ok(End::Whole), "seed {seed}: what is left opens");
        }
        assert!(cut_off > 100, "{cut_off} logs had pieces at their end");
    }

    #[test]
    fn damage_of_what_a_mark_calls_synced_is_no_power_cut() {
        let mut damaged = 0;
        for seed in 0..2_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let Grown { log, noted_bytes, .. } = Grown::by(&mut random);
            let mut bytes = log.bytes;
            if noted_bytes < 100 {
                continue;
            }
            let length = random.usize(20..=noted_bytes.min(3_000));
            let start = random.usize(0..=noted_bytes - length);
            for byte in &mut bytes[start..start + length] {
                *byte = if seed % 2 == 0 { 0 } else { random.u8(..) };
            }
            let end = examine(&bytes[..], Content::Batches, &mut 0).unwrap();
            assert!(end.is_err(), "seed {seed}: bytes {start}.. are {end:?}, synced to byte {noted_bytes}");
            damaged += 1;
        }
        assert!(damaged > 500, "{damaged} logs were damaged");
    }

    /// Each record of a manifest is synced before the next is written.
    #[test]
    fn a_manifest_may_end_in_zeros_but_not_go_on_behind_them() {
        let log = Log::of(&[400, 400, 9_000]);
        let last = log.headers[2];
        let mut torn = log.bytes.clone();
        torn[last + 3_000..].fill(0);
        let bytes = (torn.len() - last) as u64;
        let end = examine(&torn[..], Content::Edits, &mut 0).unwrap();
        assert_eq!(end, Ok(End::Torn { offset: last as u64, bytes, remains: Remains::Pieces }));
        let mut overwritten = log.bytes.clone();
        overwritten[last + 3_000..].fill(0x55);
        assert!(examine(&overwritten[..], Content::Edits, &mut 0).unwrap().is_err());
        let mut holed = log.bytes;
        holed[log.headers[1] + 50..log.headers[2]].fill(0);
        assert!(examine(&holed[..], Content::Edits, &mut 0).unwrap().is_err());
        assert!(examine(&holed[..], Content::Batches, &mut 0).unwrap().is_ok(), "of a log this may be a power cut");
    }
}
