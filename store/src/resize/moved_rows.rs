//! Reads the packed rows of a move, also those that come in pieces, and makes them valid where they come to.

use std::borrow::Cow;
use thiserror::Error;
use vasto_proto::pb::MovedRows;
use vasto_proto::row::Header;
use vasto_proto::topology::SlotSet;

/// Of a piece's length: the row goes on in the next one.
const MORE: u32 = 1 << 31;
/// A message has about a megabyte; this bounds what a header may promise.
const UNPACKED_BYTES_MAX: u32 = 1 << 30;

/// A physical key and its row.
pub type Row = (Vec<u8>, Vec<u8>);

#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MovedRowsError {
    #[error("the source has sent what are no rows")]
    Malformed,
    #[error("the source has sent a row of slot {0}, which does not come from it")]
    Slot(u16),
    #[error("the source has sent rows that are not in the order of their keys")]
    Order,
}

/// Puts pieces together, from message to message of one kind.
#[derive(Debug, Default)]
pub struct Unpacker {
    unfinished: Option<Row>,
}

impl Unpacker {
    /// The rows that are whole with this message.
    pub fn take(&mut self, message: &MovedRows, slots: &SlotSet) -> Result<Vec<Row>, MovedRowsError> {
        let unpacked = if message.unpacked_bytes == 0 {
            Cow::Borrowed(&message.packed[..])
        } else {
            if message.unpacked_bytes > UNPACKED_BYTES_MAX {
                return Err(MovedRowsError::Malformed);
            }
            let unpacked = lz4_flex::block::decompress(&message.packed, message.unpacked_bytes as usize);
            Cow::Owned(unpacked.map_err(|_| MovedRowsError::Malformed)?)
        };
        let mut rest = &*unpacked;
        let mut rows = Vec::new();
        while !rest.is_empty() {
            let key_length = number(&mut rest)?;
            let piece_length = number(&mut rest)?;
            let key = bytes(&mut rest, key_length)?;
            let piece = bytes(&mut rest, piece_length & !MORE)?;
            let mut row = match self.unfinished.take() {
                Some((begun, row)) if begun == key => row,
                Some(_) => return Err(MovedRowsError::Malformed),
                None => Vec::with_capacity(piece.len()),
            };
            row.extend_from_slice(piece);
            if piece_length & MORE != 0 {
                self.unfinished = Some((key.to_vec(), row));
                continue;
            }
            let slot = key.first_chunk().map(|slot| u16::from_be_bytes(*slot)).ok_or(MovedRowsError::Malformed)?;
            if !slots.contains(slot) {
                return Err(MovedRowsError::Slot(slot));
            }
            rows.push((key.to_vec(), row));
        }
        Ok(rows)
    }

    /// Whether a row is yet to be completed.
    pub fn is_in_a_row(&self) -> bool {
        self.unfinished.is_some()
    }
}

fn number(rest: &mut &[u8]) -> Result<u32, MovedRowsError> {
    let (number, after) = rest.split_first_chunk().ok_or(MovedRowsError::Malformed)?;
    *rest = after;
    Ok(u32::from_le_bytes(*number))
}

fn bytes<'r>(rest: &mut &'r [u8], length: u32) -> Result<&'r [u8], MovedRowsError> {
    let (bytes, after) = rest.split_at_checked(length as usize).ok_or(MovedRowsError::Malformed)?;
    *rest = after;
    Ok(bytes)
}

/// The row with an event time above that of the last flush here. It is alive where it comes from, which was flushed at another time by
/// another clock; here it would be dead. Returns the event time that it has then.
pub fn above_flush(row: &mut Vec<u8>, flush_ns: u64) -> Result<u64, MovedRowsError> {
    let (mut header, payload) = Header::decode(row).map_err(|_| MovedRowsError::Malformed)?;
    if header.stamp.ns > flush_ns {
        return Ok(header.stamp.ns);
    }
    // When it was written stays what it was: that decides how long a tombstone is kept.
    if header.written_at_ns == 0 {
        header.written_at_ns = header.stamp.ns.max(1);
    }
    header.stamp.ns = flush_ns + 1;
    let mut lifted = Vec::with_capacity(header.encoded_bytes() + payload.len());
    header.encode_into(&mut lifted);
    lifted.extend_from_slice(payload);
    *row = lifted;
    Ok(header.stamp.ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vasto_proto::row::{RowKind, Stamp};

    fn piece(packed: &mut Vec<u8>, key: &[u8], piece: &[u8], more: u32) {
        packed.extend_from_slice(&(key.len() as u32).to_le_bytes());
        packed.extend_from_slice(&(piece.len() as u32 | more).to_le_bytes());
        packed.extend_from_slice(key);
        packed.extend_from_slice(piece);
    }

    fn message(packed: Vec<u8>) -> MovedRows {
        MovedRows { packed, unpacked_bytes: 0, rows: 0 }
    }

    #[test]
    fn rows_come_whole_whatever_they_were_cut_into() {
        let slots: SlotSet = [1, 2].into_iter().collect();
        let mut unpacker = Unpacker::default();
        let mut first = Vec::new();
        piece(&mut first, &[0, 1, b'a'], b"one", 0);
        piece(&mut first, &[0, 2, b'b'], b"tw", MORE);
        let rows = unpacker.take(&message(first.clone()), &slots).unwrap();
        assert_eq!(rows, [(vec![0, 1, b'a'], b"one".to_vec())]);
        assert!(unpacker.is_in_a_row());
        let mut second = Vec::new();
        piece(&mut second, &[0, 2, b'b'], b"o", 0);
        let packed = lz4_flex::block::compress(&second);
        let second = MovedRows { packed, unpacked_bytes: second.len() as u32, rows: 1 };
        assert_eq!(unpacker.take(&second, &slots).unwrap(), [(vec![0, 2, b'b'], b"two".to_vec())]);
        assert!(!unpacker.is_in_a_row());

        let mut other = Vec::new();
        piece(&mut other, &[0, 3, b'c'], b"three", 0);
        assert_eq!(unpacker.take(&message(other), &slots), Err(MovedRowsError::Slot(3)));
        unpacker.take(&message(first), &slots).unwrap();
        let mut another_key = Vec::new();
        piece(&mut another_key, &[0, 2, b'c'], b"o", 0);
        assert_eq!(unpacker.take(&message(another_key), &slots), Err(MovedRowsError::Malformed));
    }

    #[test]
    fn a_row_from_before_the_flush_here_is_lifted_above_it_and_keeps_the_rest() {
        let stamp = Stamp { ns: 50, origin: 2, sequence: 9 };
        let header =
            Header { kind: RowKind::String, stamp, expires_at_ms: 7, changed_in_place: true, written_at_ns: 0 };
        let mut row = Vec::new();
        header.encode_into(&mut row);
        row.extend_from_slice(b"value");
        let before = row.clone();
        assert_eq!(above_flush(&mut row, 49), Ok(50));
        assert_eq!(row, before);
        assert_eq!(above_flush(&mut row, 80), Ok(81));
        let (lifted, payload) = Header::decode(&row).unwrap();
        assert_eq!((lifted.stamp, lifted.written_ns(), payload), (Stamp { ns: 81, ..stamp }, 50, &b"value"[..]));
        assert_eq!(Header { stamp, written_at_ns: 0, ..lifted }, header);
        assert_eq!(above_flush(&mut b"no row".to_vec(), 80), Err(MovedRowsError::Malformed));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_refused(packed in prop::collection::vec(any::<u8>(), 0..200), unpacked_bytes in 0..300u32) {
            let message = MovedRows { packed, unpacked_bytes, rows: 0 };
            let _ = Unpacker::default().take(&message, &SlotSet::default().complement());
        }
    }
}
