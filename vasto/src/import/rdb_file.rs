//! Reads RDB files, one key after the other: strings with their value, values of other types over to their end.
//!
//! It knows what redis-server up to 7.2 writes (version 11). Its memory grows with what a string really has, never with a promise.

use std::fmt;
use std::io::{self, Read};

use vasto_proto::rdb::crc64::Crc64;
use vasto_proto::rdb::string::{Length, read_length, read_string, skip_bytes, skip_string};
use vasto_proto::rdb::{Kind, RdbError};

const MAGIC: &[u8; 5] = b"REDIS";
const VERSION_DIGITS: usize = 4;
/// The newest version that is known: redis-server 7.2.
const VERSION_MAX: u16 = 11;
/// Files of older versions have no checksum.
const VERSION_WITH_CHECKSUM: u16 = 5;

const CODE_FUNCTION: u8 = 245;
const CODE_FUNCTION_OF_A_PRERELEASE: u8 = 246;
const CODE_MODULE_AUX: u8 = 247;
const CODE_IDLE_TIME: u8 = 248;
const CODE_FREQUENCY: u8 = 249;
const CODE_AUX: u8 = 250;
const CODE_SIZES: u8 = 251;
const CODE_EXPIRES_MS: u8 = 252;
const CODE_EXPIRES_S: u8 = 253;
const CODE_DATABASE: u8 = 254;
const CODE_END: u8 = 255;

/// Parts of a module's value.
const MODULE_END: u64 = 0;
const MODULE_SIGNED: u64 = 1;
const MODULE_UNSIGNED: u64 = 2;
const MODULE_FLOAT: u64 = 3;
const MODULE_DOUBLE: u64 = 4;
const MODULE_STRING: u64 = 5;

/// Redis itself allows 512 MiB unless told otherwise; more than this is damage.
const STRING_BYTES_MAX: u64 = 4 << 30;

/// What is wrong with a file, and where.
#[derive(Debug)]
pub struct FileError {
    pub offset: u64,
    pub reason: Reason,
}

#[derive(Debug)]
pub enum Reason {
    NoRdb,
    Version(u16),
    Rdb(RdbError),
    Type(u8),
    Prerelease,
    ModulePart(u64),
    Checksum,
    MoreFollows,
}

impl fmt::Display for FileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "at byte {}: ", self.offset)?;
        match &self.reason {
            Reason::NoRdb => formatter.write_str("it does not begin as an RDB file"),
            Reason::Version(found) => write!(formatter, "it has version {found}; known are 1 to {VERSION_MAX}"),
            Reason::Rdb(error) => error.fmt(formatter),
            Reason::Type(found) => write!(formatter, "{found} is no type of value up to version {VERSION_MAX}"),
            Reason::Prerelease => formatter.write_str("it has functions or modules in the form of a pre-release"),
            Reason::ModulePart(found) => write!(formatter, "a module's value has a part of unknown kind {found}"),
            Reason::Checksum => formatter.write_str("the checksum of the file is wrong"),
            Reason::MoreFollows => formatter
                .write_str("more follows behind its end; is it an append-only file that begins with an RDB file?"),
        }
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.reason {
            Reason::Rdb(error) => std::error::Error::source(error),
            Reason::NoRdb
            | Reason::Version(_)
            | Reason::Type(_)
            | Reason::Prerelease
            | Reason::ModulePart(_)
            | Reason::Checksum
            | Reason::MoreFollows => None,
        }
    }
}

impl From<RdbError> for Reason {
    fn from(error: RdbError) -> Self {
        Self::Rdb(error)
    }
}

impl From<io::Error> for Reason {
    fn from(error: io::Error) -> Self {
        Self::Rdb(error.into())
    }
}

/// Counts and sums up what is read through it.
struct Meter<R> {
    source: R,
    offset: u64,
    crc: Crc64,
}

impl<R: Read> Read for Meter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.source.read(buffer)?;
        self.crc.update(&buffer[..length]);
        self.offset += length as u64;
        Ok(length)
    }
}

/// Whether the bytes of strings are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strings {
    Read,
    /// Only to see whether the file is whole.
    Skip,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Empty if strings are skipped.
    String(Vec<u8>),
    Other(Kind),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub database: u64,
    pub key: Vec<u8>,
    /// Unix time in milliseconds.
    pub expires_at_ms: Option<i64>,
    pub value: Value,
}

/// An RDB file that is being read.
pub struct RdbFile<R> {
    source: Meter<R>,
    strings: Strings,
    version: u16,
    database: u64,
    /// Libraries of functions that were read over.
    pub functions: u64,
    /// Data of modules beside the keys that were read over.
    pub module_data: u64,
    has_ended: bool,
}

impl<R: Read> RdbFile<R> {
    /// Reads the head; `source` should be buffered.
    pub fn open(source: R, strings: Strings) -> Result<Self, FileError> {
        let mut source = Meter { source, offset: 0, crc: Crc64::default() };
        let version = read_head(&mut source).map_err(|reason| FileError { offset: 0, reason })?;
        Ok(Self { source, strings, version, database: 0, functions: 0, module_data: 0, has_ended: false })
    }

    /// Where it is read.
    pub fn offset(&self) -> u64 {
        self.source.offset
    }

    /// The next key; `None` behind the last one, when the file's checksum was right.
    pub fn next(&mut self) -> Result<Option<Entry>, FileError> {
        if self.has_ended {
            return Ok(None);
        }
        self.try_next().map_err(|reason| FileError { offset: self.source.offset, reason })
    }

    fn try_next(&mut self) -> Result<Option<Entry>, Reason> {
        let mut expires_at_ms = None;
        loop {
            let [code] = self.array()?;
            match code {
                CODE_EXPIRES_S => expires_at_ms = Some(i64::from(i32::from_le_bytes(self.array()?)) * 1000),
                CODE_EXPIRES_MS => expires_at_ms = Some(i64::from_le_bytes(self.array()?)),
                CODE_FREQUENCY => self.skip(1)?,
                CODE_IDLE_TIME => self.skip_numbers(1)?,
                CODE_DATABASE => self.database = self.number()?,
                CODE_SIZES => self.skip_numbers(2)?,
                CODE_AUX => self.skip_strings(2)?,
                CODE_FUNCTION => {
                    self.skip_strings(1)?;
                    self.functions += 1;
                }
                CODE_MODULE_AUX => {
                    // The module, and when it wants the data: a kind of part and a number.
                    self.skip_numbers(3)?;
                    self.skip_module_parts()?;
                    self.module_data += 1;
                }
                CODE_FUNCTION_OF_A_PRERELEASE => return Err(Reason::Prerelease),
                CODE_END => {
                    self.end()?;
                    return Ok(None);
                }
                kind => {
                    let key = self.string()?;
                    let value = self.value(kind)?;
                    return Ok(Some(Entry { database: self.database, key, expires_at_ms, value }));
                }
            }
        }
    }

    fn end(&mut self) -> Result<(), Reason> {
        let sum = self.source.crc.value();
        if self.version >= VERSION_WITH_CHECKSUM {
            let expected = u64::from_le_bytes(self.array()?);
            // 0: written with `rdbchecksum no`.
            if expected != 0 && expected != sum {
                return Err(Reason::Checksum);
            }
        }
        match self.source.read(&mut [0])? {
            0 => self.has_ended = true,
            _ => return Err(Reason::MoreFollows),
        }
        Ok(())
    }

    fn value(&mut self, kind: u8) -> Result<Value, Reason> {
        let Some(known) = Kind::of(kind) else { return Err(Reason::Type(kind)) };
        match kind {
            0 if self.strings == Strings::Read => return Ok(Value::String(self.string()?)),
            0 => {
                self.skip_strings(1)?;
                return Ok(Value::String(Vec::new()));
            }
            // Lists, sets, lists of packed nodes.
            1 | 2 | 14 => {
                let count = self.number()?;
                self.skip_strings(count)?;
            }
            // Sorted sets with scores as text.
            3 => {
                for _ in 0..self.number()? {
                    self.skip_strings(1)?;
                    match self.array()? {
                        // Not a number and the infinities.
                        [253..=255] => {}
                        [length] => self.skip(length.into())?,
                    }
                }
            }
            4 => {
                let count = self.number()?;
                self.skip_strings(count.saturating_mul(2))?;
            }
            5 => {
                for _ in 0..self.number()? {
                    self.skip_strings(1)?;
                    self.skip(8)?;
                }
            }
            6 => return Err(Reason::Prerelease),
            7 => {
                // The module.
                self.number()?;
                self.skip_module_parts()?;
            }
            15 => self.skip_stream(1)?,
            19 => self.skip_stream(2)?,
            21 => self.skip_stream(3)?,
            // Lists of nodes that are packed or plain.
            18 => {
                for _ in 0..self.number()? {
                    self.number()?;
                    self.skip_strings(1)?;
                }
            }
            // Everything else is packed into one string.
            _ => self.skip_strings(1)?,
        }
        Ok(Value::Other(known))
    }

    /// `form`: 1 = redis 5, 2 = redis 7.0, 3 = redis 7.2.
    fn skip_stream(&mut self, form: u8) -> Result<(), Reason> {
        // Nodes: first id and packed entries.
        let nodes = self.number()?;
        self.skip_strings(nodes.saturating_mul(2))?;
        // Entries, last id; then first id, largest deleted id, entries ever added.
        let numbers = if form >= 2 { 8 } else { 3 };
        self.skip_numbers(numbers)?;
        for _ in 0..self.number()? {
            // A group: name, last id, entries read.
            self.skip_strings(1)?;
            self.skip_numbers(if form >= 2 { 3 } else { 2 })?;
            for _ in 0..self.number()? {
                // What is pending: id, time of delivery, number of deliveries.
                self.skip(16 + 8)?;
                self.number()?;
            }
            for _ in 0..self.number()? {
                // A consumer: name, when it was seen, when it was active, ids of what is pending.
                self.skip_strings(1)?;
                self.skip(if form >= 3 { 16 } else { 8 })?;
                let pending = self.number()?;
                self.skip(pending.saturating_mul(16))?;
            }
        }
        Ok(())
    }

    fn skip_module_parts(&mut self) -> Result<(), Reason> {
        loop {
            match self.number()? {
                MODULE_END => return Ok(()),
                MODULE_SIGNED | MODULE_UNSIGNED => self.skip_numbers(1)?,
                MODULE_FLOAT => self.skip(4)?,
                MODULE_DOUBLE => self.skip(8)?,
                MODULE_STRING => self.skip_strings(1)?,
                other => return Err(Reason::ModulePart(other)),
            }
        }
    }

    fn array<const BYTES: usize>(&mut self) -> Result<[u8; BYTES], Reason> {
        let mut bytes = [0; BYTES];
        self.source.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64, Reason> {
        Ok(read_length(&mut self.source).map(Length::number)?)
    }

    fn string(&mut self) -> Result<Vec<u8>, Reason> {
        Ok(read_string(&mut self.source, STRING_BYTES_MAX)?)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), Reason> {
        Ok(skip_bytes(&mut self.source, bytes)?)
    }

    /// Each takes a byte at least, so that a wrong count ends with the file.
    fn skip_strings(&mut self, count: u64) -> Result<(), Reason> {
        for _ in 0..count {
            skip_string(&mut self.source)?;
        }
        Ok(())
    }

    fn skip_numbers(&mut self, count: u64) -> Result<(), Reason> {
        for _ in 0..count {
            self.number()?;
        }
        Ok(())
    }
}

fn read_head(source: &mut impl Read) -> Result<u16, Reason> {
    let mut head = [0; MAGIC.len() + VERSION_DIGITS];
    source.read_exact(&mut head)?;
    let digits = head.strip_prefix(MAGIC).and_then(|digits| std::str::from_utf8(digits).ok());
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(version @ 1..=VERSION_MAX) => Ok(version),
        Some(version) => Err(Reason::Version(version)),
        None => Err(Reason::NoRdb),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_proto::rdb::crc64::crc64;
    use vasto_proto::rdb::string::{write_length, write_string};

    fn text(value: &str) -> Vec<u8> {
        let mut out = Vec::new();
        write_string(value.as_bytes(), &mut out);
        out
    }

    fn number(value: usize) -> Vec<u8> {
        let mut out = Vec::new();
        write_length(value, &mut out);
        out
    }

    /// A file of these parts, with its end and checksum.
    fn file(version: &str, parts: &[Vec<u8>]) -> Vec<u8> {
        let mut out = format!("REDIS{version}").into_bytes();
        out.extend(parts.concat());
        out.push(CODE_END);
        let sum = crc64(&out);
        out.extend(sum.to_le_bytes());
        out
    }

    fn key(kind: u8, name: &str, value: &[Vec<u8>]) -> Vec<u8> {
        [vec![kind], text(name), value.concat()].concat()
    }

    fn read(bytes: &[u8], strings: Strings) -> Result<Vec<Entry>, String> {
        let mut file = RdbFile::open(bytes, strings).map_err(|error| error.to_string())?;
        let mut entries = Vec::new();
        while let Some(entry) = file.next().map_err(|error| error.to_string())? {
            entries.push(entry);
        }
        assert_eq!(file.offset(), bytes.len() as u64);
        Ok(entries)
    }

    /// One value of every type byte that there is, followed by a string each.
    fn every_type() -> Vec<(u8, Vec<Vec<u8>>)> {
        let score = |bytes: &[u8]| bytes.to_vec();
        let group = |form: u8| {
            let mut group = [text("group"), number(5), number(1)].concat();
            if form >= 2 {
                group.extend(number(7));
            }
            group.extend([number(1), vec![0; 24], number(3)].concat());
            group.extend([number(1), text("consumer"), vec![0; 8]].concat());
            if form >= 3 {
                group.extend([0; 8]);
            }
            group.extend([number(2), vec![0; 32]].concat());
            group
        };
        let stream = |form: u8| {
            let mut parts = vec![number(1), text("node"), text("entries"), number(4), number(1 << 20), number(0)];
            if form >= 2 {
                parts.extend([number(1), number(0), number(2), number(0), number(9)]);
            }
            parts.extend([number(1), group(form)]);
            parts
        };
        let mut types = vec![
            (1, vec![number(2), text("a"), text("12")]),
            (2, vec![number(1), text("a")]),
            (3, vec![number(3), text("a"), score(b"\x031.5"), text("b"), score(b"\xff"), text("c"), score(b"\xfd")]),
            (4, vec![number(1), text("field"), text("value")]),
            (5, vec![number(1), text("a"), score(&1.5f64.to_le_bytes())]),
            (
                7,
                vec![
                    number(77),
                    [number(1), number(5)].concat(),
                    [number(2), number(1 << 30)].concat(),
                    [number(3), vec![0; 4]].concat(),
                    [number(4), vec![0; 8]].concat(),
                    [number(5), text("text")].concat(),
                    number(0),
                ],
            ),
            (14, vec![number(2), text("node"), text("node")]),
            (15, stream(1)),
            (18, vec![number(2), number(2), text("packed"), number(1), text("plain")]),
            (19, stream(2)),
            (21, stream(3)),
        ];
        types.extend([9, 10, 11, 12, 13, 16, 17, 20].map(|kind| (kind, vec![text("packed")])));
        types
    }

    #[test]
    fn values_of_every_other_type_are_read_over() {
        let types = every_type();
        let known = (1..=21).filter(|kind| Kind::of(*kind).is_some_and(|_| *kind != 6)).count();
        assert_eq!(types.len(), known, "each type once");
        let mut parts = Vec::new();
        for (kind, value) in &types {
            parts.extend([key(*kind, "other", value), key(0, "string", &[text("value")])]);
        }
        let entries = read(&file("0011", &parts), Strings::Read).unwrap();
        for (pair, (kind, _)) in entries.chunks(2).zip(&types) {
            assert_eq!(pair[0].value, Value::Other(Kind::of(*kind).unwrap()), "type {kind}");
            assert_eq!(pair[1].value, Value::String(b"value".to_vec()), "behind type {kind}");
        }
        assert_eq!(entries.len(), 2 * types.len());
    }

    #[test]
    fn what_stands_between_keys_belongs_to_the_next_one_or_to_none() {
        let parts = [
            [vec![CODE_AUX], text("redis-ver"), text("7.0.15")].concat(),
            [vec![CODE_MODULE_AUX], number(9), number(2), number(1), number(5), text("data"), number(0)].concat(),
            [vec![CODE_FUNCTION], text("#!lua name=f")].concat(),
            [vec![CODE_DATABASE], number(3), vec![CODE_SIZES], number(4), number(2)].concat(),
            [vec![CODE_EXPIRES_MS], (-5i64).to_le_bytes().to_vec(), vec![CODE_FREQUENCY, 7]].concat(),
            key(0, "12345", &[text("-1")]),
            [vec![CODE_EXPIRES_S], 2_000_000_000i32.to_le_bytes().to_vec(), vec![CODE_IDLE_TIME], number(100)].concat(),
            key(0, "b", &[text(&"x".repeat(1000))]),
            key(0, "c", &[text("")]),
        ];
        let bytes = file("0010", &parts);
        let mut opened = RdbFile::open(bytes.as_slice(), Strings::Read).unwrap();
        let mut next =
            || opened.next().unwrap().map(|entry| (entry.database, entry.expires_at_ms, entry.key, entry.value));
        let string = |value: &[u8]| Value::String(value.to_vec());
        assert_eq!(next(), Some((3, Some(-5), b"12345".to_vec(), string(b"-1"))));
        assert_eq!(next(), Some((3, Some(2_000_000_000_000), b"b".to_vec(), string(&[b'x'; 1000]))));
        assert_eq!(next(), Some((3, None, b"c".to_vec(), string(b""))));
        assert_eq!(next(), None);
        assert_eq!(next(), None);
        assert_eq!((opened.functions, opened.module_data), (1, 1));
        assert_eq!(read(&bytes, Strings::Skip).unwrap().len(), 3);
    }

    #[test]
    fn every_cut_is_an_error_and_every_flip_is_noticed() {
        let mut parts: Vec<Vec<u8>> = every_type().iter().map(|(kind, value)| key(*kind, "k", value)).collect();
        parts.push(key(0, "k", &[text(&"abc".repeat(20))]));
        let bytes = file("0011", &parts);
        for strings in [Strings::Read, Strings::Skip] {
            assert!(read(&bytes, strings).is_ok());
            for at in 0..bytes.len() {
                assert!(read(&bytes[..at], strings).is_err(), "cut at {at}");
                let mut flipped = bytes.clone();
                flipped[at] ^= 0x10;
                assert!(read(&flipped, strings).is_err(), "flip at {at}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (bytes, expected) in [
            (b"REDIS0010".to_vec(), "at byte 9: it ends in the middle of a value"),
            (b"RE".to_vec(), "at byte 0: it ends in the middle of a value"),
            (b"hello, world".to_vec(), "at byte 0: it does not begin as an RDB file"),
            (b"REDIS0012".to_vec(), "at byte 0: it has version 12; known are 1 to 11"),
            (file("0010", &[key(8, "k", &[])]), "at byte 12: 8 is no type of value up to version 11"),
            (
                file("0010", &[key(0, "k", &[b"\xc3\x04\x05\x02abc".to_vec()])]),
                "at byte 19: a compressed string is damaged",
            ),
            (
                [file("0010", &[]), b"*1".to_vec()].concat(),
                "at byte 19: more follows behind its end; is it an append-only file that begins with an RDB file?",
            ),
        ] {
            assert_eq!(read(&bytes, Strings::Read).unwrap_err(), expected);
        }
    }

    #[test]
    fn checksums_may_be_off_or_not_there_at_all() {
        let mut bytes = file("0010", &[key(0, "k", &[text("v")])]);
        let end = bytes.len() - 8;
        bytes[end..].fill(0);
        assert_eq!(read(&bytes, Strings::Read).unwrap().len(), 1);
        bytes[end] = 1;
        assert_eq!(
            read(&bytes, Strings::Read).unwrap_err(),
            format!("at byte {}: the checksum of the file is wrong", bytes.len())
        );
        let mut old = file("0004", &[key(0, "k", &[text("v")])]);
        old.truncate(old.len() - 8);
        assert_eq!(read(&old, Strings::Read).unwrap().len(), 1);
    }

    #[test]
    fn random_bytes_never_panic() {
        let given = std::env::var("VASTO_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| fastrand::u64(..1 << 32));
        eprintln!("random RDB files: VASTO_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let types = every_type();
        for round in 0..20_000 {
            let (kind, value) = &types[round % types.len()];
            let whole = file("0011", &[key(*kind, "k", value), key(0, "s", &[text(&"ab".repeat(30))])]);
            let mut bytes = whole.clone();
            for _ in 0..1 + random.usize(..4) {
                let at = random.usize(9..bytes.len());
                bytes[at] = random.u8(..);
            }
            for strings in [Strings::Read, Strings::Skip] {
                assert!(read(&bytes, strings).is_err() || bytes == whole);
            }
        }
    }
}
