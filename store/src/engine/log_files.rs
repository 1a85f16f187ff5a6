//! Looks through a shard's write-ahead logs and its manifest before RocksDB replays them: each must be whole, or torn at its end.
//!
//! RocksDB takes a flipped bit in the header of a record for the end of the file and silently leaves out what follows; a
//! flipped type of a later record it reads for ever. A manifest that is cut so forgets tables, a log forgets writes. Here every
//! record is compared with its checksum, and what cannot be read is a torn end only if no record follows and no single bit explains it.

use super::EngineError;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Records lie in blocks of this size; what is too short for a header at the end of a block is padding.
const BLOCK_BYTES: usize = 32 << 10;
/// Checksum (4, little endian), length (2, little endian), type (1).
pub const HEADER_BYTES: usize = 7;
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
    /// In the middle of a record, as a crash leaves it: that record was not acknowledged.
    Torn {
        offset: u64,
        bytes: u64,
    },
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
    check_file(&folder.join(manifest_name(manifest)))?;
    files.logs.iter().try_for_each(|log| check_file(log))
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

fn check_file(path: &Path) -> Result<(), EngineError> {
    let examined = File::open(path).and_then(examine).map_err(|error| unreadable(path, &error))?;
    match examined {
        Ok(End::Whole) => Ok(()),
        Ok(End::Torn { offset, bytes }) => {
            tracing::warn!(file = %path.display(), offset, bytes, "a record was being written at the last end; it is left out");
            Ok(())
        }
        Err(Damage { offset, reason }) => {
            Err(damaged(format!("{} is damaged at byte {offset}: {reason}", path.display())))
        }
    }
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
                Some((number, "log")) if number.parse::<u64>().is_ok() => files.logs.push(path),
                Some((_, "sst")) => files.tables.push(name.to_owned()),
                Some(_) | None => {}
            }
        }
        files.logs.sort();
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

/// Whether turning back one bit of the length or the type makes it a record: then it was one.
fn is_one_bit_from_a_record(bytes: &[u8]) -> bool {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return false };
    (4 * 8..HEADER_BYTES * 8).any(|bit| {
        let mut turned = *header;
        turned[bit / 8] ^= 1 << (bit % 8);
        record_with(turned, rest).is_ok()
    })
}

/// Reads a file of records to its end.
fn examine(mut file: impl Read) -> io::Result<Result<End, Damage>> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut block_start = 0;
    // Where the record began whose last part has not come yet.
    let mut unfinished: Option<u64> = None;
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
                    let found = Stop { offset, reason, is_last_block, unfinished };
                    let rest = block[at..].to_vec();
                    return stopped(found, &rest, file, &mut buffer);
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
            at += bytes;
        }
        if length < BLOCK_BYTES {
            let end = block_start + length as u64;
            let torn = unfinished.or((at < length).then_some(block_start + at as u64));
            return Ok(Ok(torn.map_or(End::Whole, |offset| End::Torn { offset, bytes: end - offset })));
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
}

/// Tells a torn end from damage. `rest` is the block from the stop on, `file` what follows the block.
fn stopped(stop: Stop, rest: &[u8], mut file: impl Read, buffer: &mut [u8]) -> io::Result<Result<End, Damage>> {
    let damage = |reason| Ok(Err(Damage { offset: stop.offset, reason }));
    if is_one_bit_from_a_record(rest) {
        return damage("a bit of the length or the type of a record is flipped");
    }
    // Within the block records may lie anywhere, since the length of this one is not to be trusted. They must go on to the end: a
    // value that was cut off may hold a log itself.
    let mut is_followed = (1..rest.len()).any(|skipped| are_records_to_the_end(&rest[skipped..]));
    let mut is_blank = rest.iter().all(|byte| *byte == 0);
    let mut bytes = rest.len() as u64;
    loop {
        let length = read_block(&mut file, buffer)?;
        if length == 0 {
            break;
        }
        bytes += length as u64;
        is_followed |= record(&buffer[..length]).is_ok();
        is_blank &= buffer[..length].iter().all(|byte| *byte == 0);
    }
    if is_followed {
        return damage("what lies here is no record, and records follow");
    }
    match stop.reason {
        // RocksDB skips blank space, but not in the middle of a record.
        NoRecord::Blank if is_blank && stop.unfinished.is_none() => {}
        NoRecord::TooLong if stop.is_last_block => {}
        NoRecord::Blank => return damage("what lies here was never written"),
        NoRecord::TooLong => return damage("a record is longer than its block"),
        NoRecord::Wrong(reason) => return damage(reason),
    }
    let offset = stop.unfinished.unwrap_or(stop.offset);
    Ok(Ok(End::Torn { offset, bytes: stop.offset + bytes - offset }))
}

fn are_records_to_the_end(mut bytes: &[u8]) -> bool {
    while let Ok((_, length)) = record(bytes) {
        bytes = &bytes[length..];
        if bytes.len() < HEADER_BYTES {
            return bytes.iter().all(|byte| *byte == 0);
        }
    }
    false
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

/// RocksDB stores checksums so, since a checksum of data with checksums in them would be weak.
fn mask(sum: u32) -> u32 {
    sum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Tables for eight bytes at a time: about 2 GB/s, so that a log of 256 MiB costs a restart an eighth of a second.
static CRC_TABLES: [[u32; 256]; 8] = crc_tables();

const fn crc_tables() -> [[u32; 256]; 8] {
    // The polynomial of Castagnoli, bits reversed.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ POLYNOMIAL } else { sum >> 1 };
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// The CRC-32C of several parts in a row.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut sum = u32::MAX;
    for part in parts {
        let (chunks, rest) = part.as_chunks::<8>();
        for chunk in chunks {
            let [a, b, c, d, e, f, g, h] = *chunk;
            let [a, b, c, d] = (u32::from_le_bytes([a, b, c, d]) ^ sum).to_le_bytes();
            let bytes = [h, g, f, e, d, c, b, a];
            sum = (0..8).fold(0, |sum, table| sum ^ CRC_TABLES[table][usize::from(bytes[table])]);
        }
        for byte in rest {
            sum = sum >> 8 ^ CRC_TABLES[0][usize::from(*byte ^ sum as u8)];
        }
    }
    !sum
}

#[cfg(test)]
mod tests {
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

    fn examined(bytes: &[u8]) -> Result<End, Damage> {
        examine(bytes).unwrap()
    }

    #[test]
    fn the_checksum_is_that_of_castagnoli() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[b"1", b"23456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[&[0; 32]]), 0x8a91_36aa);
        assert_eq!(crc32c(&[]), 0);
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
                if let Ok(End::Torn { offset, bytes }) = end {
                    assert_eq!(offset + bytes, length as u64);
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
            assert_eq!(examined(bytes), Ok(End::Torn { offset: start, bytes: bytes.len() as u64 - start }));
        }
    }

    /// The last record too: RocksDB would take a flip of its length for a torn end.
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
}
