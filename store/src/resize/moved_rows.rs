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
#[derive(Clone, Debug, Default)]
pub struct Unpacker {
    /// The physical key, and what has come of the row.
    unfinished: Option<(Vec<u8>, Vec<u8>)>,
}

impl Unpacker {
    /// Hands over the rows that are whole with this message: physical key and row.
    pub fn take<E: From<MovedRowsError>>(
        &mut self,
        message: &MovedRows,
        slots: &SlotSet,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let unpacked = if message.unpacked_bytes == 0 {
            Cow::Borrowed(&message.packed[..])
        } else {
            if message.unpacked_bytes > UNPACKED_BYTES_MAX {
                return Err(MovedRowsError::Malformed.into());
            }
            let unpacked = lz4_flex::block::decompress(&message.packed, message.unpacked_bytes as usize);
            Cow::Owned(unpacked.map_err(|_| MovedRowsError::Malformed)?)
        };
        let mut rest = &*unpacked;
        while !rest.is_empty() {
            let key_length = number(&mut rest)?;
            let piece_length = number(&mut rest)?;
            let key = bytes(&mut rest, key_length)?;
            let piece = bytes(&mut rest, piece_length & !MORE)?;
            let slot = key.first_chunk().map(|slot| u16::from_be_bytes(*slot)).ok_or(MovedRowsError::Malformed)?;
            if !slots.contains(slot) {
                return Err(MovedRowsError::Slot(slot).into());
            }
            let row = match self.unfinished.take() {
                Some((begun, _)) if begun != key => return Err(MovedRowsError::Malformed.into()),
                Some((_, mut row)) => {
                    row.extend_from_slice(piece);
                    Cow::Owned(row)
                }
                None => Cow::Borrowed(piece),
            };
            if piece_length & MORE == 0 {
                each(key, &row)?;
            } else {
                self.unfinished = Some((key.to_vec(), row.into_owned()));
            }
        }
        Ok(())
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
/// another clock; here it would be dead. Returns the event time that it has then too.
pub fn above_flush(row: &[u8], flush_ns: u64) -> Result<(Cow<'_, [u8]>, u64), MovedRowsError> {
    let (mut header, payload) = Header::decode(row).map_err(|_| MovedRowsError::Malformed)?;
    if header.stamp.ns > flush_ns {
        return Ok((Cow::Borrowed(row), header.stamp.ns));
    }
    // When it was written stays what it was: that decides how long a tombstone is kept.
    if header.written_at_ns == 0 {
        header.written_at_ns = header.stamp.ns.max(1);
    }
    header.stamp.ns = flush_ns + 1;
    let mut lifted = Vec::with_capacity(header.encoded_bytes() + payload.len());
    header.encode_into(&mut lifted);
    lifted.extend_from_slice(payload);
    Ok((Cow::Owned(lifted), header.stamp.ns))
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
        MovedRows { packed: packed.into(), ..MovedRows::default() }
    }

    type Rows = Vec<(Vec<u8>, Vec<u8>)>;

    /// The rows that are whole with a message.
    fn take(unpacker: &mut Unpacker, message: &MovedRows, slots: &SlotSet) -> Result<Rows, MovedRowsError> {
        let mut rows = Rows::new();
        unpacker.take(message, slots, |key, row| {
            rows.push((key.to_vec(), row.to_vec()));
            Ok::<_, MovedRowsError>(())
        })?;
        Ok(rows)
    }

    #[test]
    fn rows_come_whole_whatever_they_were_cut_into() {
        let slots: SlotSet = [1, 2].into_iter().collect();
        let mut unpacker = Unpacker::default();
        let mut first = Vec::new();
        piece(&mut first, &[0, 1, b'a'], b"one", 0);
        piece(&mut first, &[0, 2, b'b'], b"tw", MORE);
        let rows = take(&mut unpacker, &message(first.clone()), &slots).unwrap();
        assert_eq!(rows, [(vec![0, 1, b'a'], b"one".to_vec())]);
        assert!(unpacker.is_in_a_row());
        let mut second = Vec::new();
        piece(&mut second, &[0, 2, b'b'], b"o", 0);
        let unpacked_bytes = second.len() as u32;
        let second = MovedRows { unpacked_bytes, ..message(lz4_flex::block::compress(&second)) };
        assert_eq!(take(&mut unpacker, &second, &slots).unwrap(), [(vec![0, 2, b'b'], b"two".to_vec())]);
        assert!(!unpacker.is_in_a_row());

        let mut other = Vec::new();
        piece(&mut other, &[0, 3, b'c'], b"three", 0);
        assert_eq!(take(&mut unpacker, &message(other), &slots), Err(MovedRowsError::Slot(3)));
        take(&mut unpacker, &message(first), &slots).unwrap();
        let mut another_key = Vec::new();
        piece(&mut another_key, &[0, 2, b'c'], b"o", 0);
        assert_eq!(take(&mut unpacker, &message(another_key), &slots), Err(MovedRowsError::Malformed));
    }

    #[test]
    fn a_row_from_before_the_flush_here_is_lifted_above_it_and_keeps_the_rest() {
        let stamp = Stamp { ns: 50, origin: 2, sequence: 9 };
        let header =
            Header { kind: RowKind::String, stamp, expires_at_ms: 7, changed_in_place: true, written_at_ns: 0 };
        let mut row = Vec::new();
        header.encode_into(&mut row);
        row.extend_from_slice(b"value");
        assert_eq!(above_flush(&row, 49), Ok((Cow::Borrowed(&row[..]), 50)));
        let (row, stamp_ns) = above_flush(&row, 80).unwrap();
        assert_eq!(stamp_ns, 81);
        let (lifted, payload) = Header::decode(&row).unwrap();
        assert_eq!((lifted.stamp, lifted.written_ns(), payload), (Stamp { ns: 81, ..stamp }, 50, &b"value"[..]));
        assert_eq!(Header { stamp, written_at_ns: 0, ..lifted }, header);
        assert_eq!(above_flush(b"no row", 80), Err(MovedRowsError::Malformed));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_refused(packed in prop::collection::vec(any::<u8>(), 0..200), unpacked_bytes in 0..300u32) {
            let message = MovedRows { unpacked_bytes, ..message(packed) };
            let _ = take(&mut Unpacker::default(), &message, &SlotSet::default().complement());
        }
    }
}
