//! Rows as they lie in the column family `keys`: a header, then the value of a string or the summary of a collection.
//!
//! ```text
//! byte 0        kind
//! byte 1        flags: 1 = expires, 2 = was changed in place
//! bytes 2..22   stamp (ns u64 BE, origin u32 BE, sequence u64 BE)
//! 8 bytes       expires_at_ms u64 BE, only with the flag
//! 20 bytes      version, collections only
//! rest          payload
//! ```

use thiserror::Error;

/// When and where a row was written: a total order, compared as bytes; the larger one wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Event time, nanoseconds since 1970.
    pub ns: u64,
    /// The store that ordered the write.
    pub origin: u32,
    /// A counter of that store's shard, never reused after a crash.
    pub sequence: u64,
}

impl Stamp {
    /// Bytes of an encoded stamp.
    pub const BYTES: usize = 20;

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&self.ns.to_be_bytes());
        out[8..12].copy_from_slice(&self.origin.to_be_bytes());
        out[12..].copy_from_slice(&self.sequence.to_be_bytes());
        out
    }

    /// `None` unless `bytes` is exactly [`Stamp::BYTES`] long.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        Some(Self {
            ns: u64::from_be_bytes(*bytes.first_chunk()?),
            origin: u32::from_be_bytes(*bytes[8..].first_chunk()?),
            sequence: u64::from_be_bytes(*bytes[12..].first_chunk()?),
        })
    }
}

/// What a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RowKind {
    /// A deletion that must still be remembered.
    Tombstone = 0,
    String = 1,
}

impl RowKind {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Tombstone),
            1 => Some(Self::String),
            _ => None,
        }
    }
}

/// Bytes from disk that are no row.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RowError {
    #[error("row of {0} bytes is shorter than its header")]
    TooShort(usize),
    #[error("row of unknown kind {0}")]
    UnknownKind(u8),
}

const FLAG_EXPIRES: u8 = 1;
const FLAG_CHANGED_IN_PLACE: u8 = 2;

/// What stands before a row's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: RowKind,
    pub stamp: Stamp,
    /// Unix time in milliseconds; 0 = never.
    pub expires_at_ms: u64,
    /// APPEND and SETRANGE leave a string that OBJECT ENCODING calls `raw` whatever its length.
    pub changed_in_place: bool,
}

impl Header {
    /// Most bytes of a string's or tombstone's header.
    pub const BYTES_MAX: usize = 2 + Stamp::BYTES + 8;

    /// Bytes that the header takes.
    pub fn encoded_bytes(&self) -> usize {
        2 + Stamp::BYTES + if self.expires_at_ms != 0 { 8 } else { 0 }
    }

    /// Appends the header; the payload follows it.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let mut flags = 0;
        if self.expires_at_ms != 0 {
            flags |= FLAG_EXPIRES;
        }
        if self.changed_in_place {
            flags |= FLAG_CHANGED_IN_PLACE;
        }
        out.push(self.kind as u8);
        out.push(flags);
        out.extend_from_slice(&self.stamp.to_bytes());
        if self.expires_at_ms != 0 {
            out.extend_from_slice(&self.expires_at_ms.to_be_bytes());
        }
    }

    /// Splits a row into header and payload.
    pub fn decode(row: &[u8]) -> Result<(Self, &[u8]), RowError> {
        let too_short = || RowError::TooShort(row.len());
        let (&[kind, flags], rest) = row.split_first_chunk::<2>().ok_or_else(too_short)?;
        let kind = RowKind::from_byte(kind).ok_or(RowError::UnknownKind(kind))?;
        let (stamp, mut rest) = rest.split_at_checked(Stamp::BYTES).ok_or_else(too_short)?;
        let stamp = Stamp::from_bytes(stamp).ok_or_else(too_short)?;
        let mut expires_at_ms = 0;
        if flags & FLAG_EXPIRES != 0 {
            let (bytes, after) = rest.split_first_chunk::<8>().ok_or_else(too_short)?;
            expires_at_ms = u64::from_be_bytes(*bytes);
            rest = after;
        }
        let changed_in_place = flags & FLAG_CHANGED_IN_PLACE != 0;
        Ok((Self { kind, stamp, expires_at_ms, changed_in_place }, rest))
    }

    /// Whether a reader at `now_ms` sees the row: neither deleted nor expired. A row lives up to and including its
    /// millisecond, as in Redis (`now > when` is expired).
    pub fn is_alive(&self, now_ms: u64) -> bool {
        self.kind != RowKind::Tombstone && (self.expires_at_ms == 0 || now_ms <= self.expires_at_ms)
    }
}

/// The row that wins when two rows of one key meet: the larger stamp; equal stamps are equal rows.
pub fn newer<'a>(a: &'a [u8], b: &'a [u8]) -> &'a [u8] {
    let stamp = |row: &[u8]| Header::decode(row).map(|(header, _)| header.stamp).ok();
    if stamp(b) > stamp(a) { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_header() -> impl Strategy<Value = Header> {
        (any::<bool>(), any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
            |(string, ns, origin, sequence, expires_at_ms, changed_in_place)| Header {
                kind: if string { RowKind::String } else { RowKind::Tombstone },
                stamp: Stamp { ns, origin, sequence },
                expires_at_ms,
                changed_in_place,
            },
        )
    }

    proptest! {
        #[test]
        fn a_header_round_trips(header in any_header(), payload in any::<Vec<u8>>()) {
            let mut row = Vec::new();
            header.encode_into(&mut row);
            prop_assert_eq!(row.len(), header.encoded_bytes());
            row.extend_from_slice(&payload);
            prop_assert_eq!(Header::decode(&row), Ok((header, payload.as_slice())));
        }

        #[test]
        fn decoding_never_panics(bytes in any::<Vec<u8>>()) {
            let _ = Header::decode(&bytes);
        }

        #[test]
        fn stamps_compare_as_their_bytes(a in any_header(), b in any_header()) {
            prop_assert_eq!(a.stamp.cmp(&b.stamp), a.stamp.to_bytes().cmp(&b.stamp.to_bytes()));
        }
    }
}
