//! Redis's own format of values: strings as they lie in RDB files and in DUMP payloads, and what the two share.
//!
//! Nothing here believes a length: memory grows with the bytes that really come, and LZF with what it really makes.

pub mod crc64;
pub mod lzf;
pub mod payload;
pub mod string;

use std::fmt;
use std::io;
use thiserror::Error;

/// Version of the format that redis-server 7.0 writes; DUMP puts it behind each value.
pub const VERSION: u16 = 10;

/// The largest type byte that version 10 knows; later versions of Redis write larger ones.
const TYPE_MAX_OF_VERSION_10: u8 = 19;

/// Why bytes are no value.
#[derive(Debug, Error)]
pub enum RdbError {
    #[error("it ends in the middle of a value")]
    Ended,
    #[error("byte {0:#04x} begins no length")]
    UnknownLength(u8),
    #[error("{0} is no encoding of a string")]
    UnknownEncoding(u64),
    #[error("a compressed string is damaged")]
    Compression,
    #[error("a string of {bytes} bytes is longer than the {bytes_max} bytes that a value may have")]
    TooLong { bytes: u64, bytes_max: u64 },
    #[error("it cannot be read")]
    Io(#[source] io::Error),
}

impl From<io::Error> for RdbError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Ended,
            _ => Self::Io(error),
        }
    }
}

/// What a client sees of a value: the types of Redis, whatever they are encoded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    String,
    List,
    Set,
    SortedSet,
    Hash,
    Stream,
    Module,
}

impl Kind {
    /// Of a type byte in a file of version 11 or older.
    pub fn of(type_byte: u8) -> Option<Self> {
        Some(match type_byte {
            0 => Self::String,
            1 | 10 | 14 | 18 => Self::List,
            2 | 11 | 20 => Self::Set,
            3 | 5 | 12 | 17 => Self::SortedSet,
            4 | 9 | 13 | 16 => Self::Hash,
            6 | 7 => Self::Module,
            15 | 19 | 21 => Self::Stream,
            _ => return None,
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::String => "string",
            Self::List => "list",
            Self::Set => "set",
            Self::SortedSet => "sorted set",
            Self::Hash => "hash",
            Self::Stream => "stream",
            Self::Module => "module value",
        })
    }
}
