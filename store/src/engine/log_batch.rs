//! Reads the batches of RocksDB's log: a number, a count, then entries, each with its type and its column family.

/// Number of the first entry (8, little endian) and of entries (4, little endian).
const HEAD_BYTES: usize = 12;

/// Types of entries that we write; any other is not ours to interpret.
const DELETION: u8 = 0x0;
const VALUE: u8 = 0x1;
const LOG_DATA: u8 = 0x3;
const FAMILY_DELETION: u8 = 0x4;
const FAMILY_VALUE: u8 = 0x5;
const NOOP: u8 = 0xd;
const FAMILY_RANGE_DELETION: u8 = 0xe;
const RANGE_DELETION: u8 = 0xf;

/// A column family, by the number that the order of opening gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// RocksDB's own, which stays empty.
    Default,
    Keys,
    Elements,
    Meta,
}

impl Family {
    fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Default),
            1 => Some(Self::Keys),
            2 => Some(Self::Elements),
            3 => Some(Self::Meta),
            _ => None,
        }
    }
}

/// One entry of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'b> {
    Put {
        family: Family,
        key: &'b [u8],
        value: &'b [u8],
    },
    Delete {
        family: Family,
        key: &'b [u8],
    },
    /// Of all keys from `begin` on and below `end`.
    DeleteRange {
        family: Family,
        begin: &'b [u8],
        end: &'b [u8],
    },
}

/// A batch that has its head; its entries may still turn out to be malformed.
#[derive(Clone, Copy, Debug)]
pub struct LogBatch<'b> {
    pub first: u64,
    pub count: u32,
    entries: &'b [u8],
}

/// An entry of a type that we do not write, or that is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl<'b> LogBatch<'b> {
    pub fn parse(data: &'b [u8]) -> Option<Self> {
        let (head, entries) = data.split_first_chunk::<HEAD_BYTES>()?;
        let first = u64::from_le_bytes(*head.first_chunk()?);
        let count = u32::from_le_bytes(*head.last_chunk()?);
        Some(Self { first, count, entries })
    }

    /// The entries in their order. What only the log itself is told (marks of what is synced) is left out.
    pub fn changes(&self) -> impl Iterator<Item = Result<Change<'b>, Malformed>> + use<'b> {
        let mut rest = self.entries;
        std::iter::from_fn(move || {
            let change = next(&mut rest);
            if change.is_err() {
                rest = &[];
            }
            change.transpose()
        })
    }
}

fn next<'b>(rest: &mut &'b [u8]) -> Result<Option<Change<'b>>, Malformed> {
    loop {
        let Some((kind, after)) = rest.split_first() else { return Ok(None) };
        *rest = after;
        let family = match *kind {
            FAMILY_VALUE | FAMILY_DELETION | FAMILY_RANGE_DELETION => {
                Family::from_number(number(rest)?).ok_or(Malformed)?
            }
            VALUE | DELETION | RANGE_DELETION => Family::Default,
            LOG_DATA => {
                bytes(rest)?;
                continue;
            }
            NOOP => continue,
            _ => return Err(Malformed),
        };
        let key = bytes(rest)?;
        return Ok(Some(match *kind {
            FAMILY_VALUE | VALUE => Change::Put { family, key, value: bytes(rest)? },
            FAMILY_RANGE_DELETION | RANGE_DELETION => Change::DeleteRange { family, begin: key, end: bytes(rest)? },
            _ => Change::Delete { family, key },
        }));
    }
}

/// A number in groups of seven bits, the lowest first.
fn number(rest: &mut &[u8]) -> Result<u32, Malformed> {
    let mut number = 0u64;
    for shift in (0..35).step_by(7) {
        let (byte, after) = rest.split_first().ok_or(Malformed)?;
        *rest = after;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return u32::try_from(number).map_err(|_| Malformed);
        }
    }
    Err(Malformed)
}

fn bytes<'b>(rest: &mut &'b [u8]) -> Result<&'b [u8], Malformed> {
    let length = number(rest)? as usize;
    let (bytes, after) = rest.split_at_checked(length).ok_or(Malformed)?;
    *rest = after;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_refused(data in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(batch) = LogBatch::parse(&data) {
                prop_assert!(batch.changes().count() <= data.len());
            }
        }
    }

    #[test]
    fn a_foreign_entry_and_one_that_is_cut_off_are_no_changes() {
        let mut data = vec![0; HEAD_BYTES];
        // A merge.
        data.extend_from_slice(&[0x6, 1, 1, b'k', 1, b'v']);
        assert_eq!(LogBatch::parse(&data).unwrap().changes().collect::<Vec<_>>(), [Err(Malformed)]);
        data.truncate(HEAD_BYTES);
        data.extend_from_slice(&[LOG_DATA, 2, 0, 0, FAMILY_VALUE, 3, 1, b'k', 2, b'v']);
        assert_eq!(LogBatch::parse(&data).unwrap().changes().collect::<Vec<_>>(), [Err(Malformed)]);
        data.push(b'w');
        let put = Change::Put { family: Family::Meta, key: b"k", value: b"vw" };
        assert_eq!(LogBatch::parse(&data).unwrap().changes().collect::<Vec<_>>(), [Ok(put)]);
        assert!(LogBatch::parse(&data[..HEAD_BYTES - 1]).is_none());
    }

    #[test]
    fn a_deletion_of_a_range_is_read_as_rocksdb_writes_it() {
        let mut batch = rocksdb::WriteBatch::default();
        batch.delete_range(b"a", b"b");
        let data = batch.data().to_vec();
        let deletion = Change::DeleteRange { family: Family::Default, begin: b"a", end: b"b" };
        assert_eq!(LogBatch::parse(&data).unwrap().changes().collect::<Vec<_>>(), [Ok(deletion)]);
        let mut of_a_family = vec![0; HEAD_BYTES];
        of_a_family.extend_from_slice(&[FAMILY_RANGE_DELETION, 1, 2, 0, 7, 2, 0, 9, FAMILY_DELETION, 1, 1, b'k']);
        let deletions = [
            Ok(Change::DeleteRange { family: Family::Keys, begin: &[0, 7], end: &[0, 9] }),
            Ok(Change::Delete { family: Family::Keys, key: b"k" }),
        ];
        assert_eq!(LogBatch::parse(&of_a_family).unwrap().changes().collect::<Vec<_>>(), deletions);
        of_a_family.truncate(HEAD_BYTES + 6);
        assert_eq!(LogBatch::parse(&of_a_family).unwrap().changes().collect::<Vec<_>>(), [Err(Malformed)]);
    }
}
