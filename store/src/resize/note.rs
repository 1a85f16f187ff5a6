//! What a shard keeps in its `meta` of slots that move: of which resize it may hold rows that are not its own, and how much has come.
//!
//! It stands in the log, so every copy has it together with the rows that it speaks of.

use std::collections::BTreeMap;
use vasto_proto::id::{Epoch, ShardId};

/// Bytes of the operation, of the event time and of the state.
const HEAD_BYTES: usize = 8 + 8 + 1;
/// Bytes of a source's number and of a fence.
const MOVE_BYTES: usize = 2 + 8;
const CLEAN: u8 = 0;
const FOREIGN: u8 = 1;

/// Whether rows may be here of slots that the shard does not own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rows {
    /// Everything that the operation has left here is deleted.
    #[default]
    Clean,
    Foreign,
}

/// What lies in `meta`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// The resize, by the epoch of the record that began it; 0 = there was none.
    pub operation: u64,
    pub rows: Rows,
    /// Sources whose rows have begun to come, and the newest fence up to which all are here; 0 = none yet.
    pub moves: BTreeMap<ShardId, Epoch>,
    /// Deletions up to this event time were forgotten by some source: of a key without any row, nothing older is known.
    pub dropped_ns: u64,
}

impl Note {
    /// What a resize begins with.
    pub fn of(&self, operation: u64) -> Self {
        if self.operation == operation {
            return Self { rows: Rows::Foreign, ..self.clone() };
        }
        Self { operation, rows: Rows::Foreign, moves: BTreeMap::new(), dropped_ns: self.dropped_ns }
    }

    /// The fence up to which everything of a source is here.
    pub fn drained(&self, operation: u64, source: ShardId) -> Option<Epoch> {
        let fence = self.moves.get(&source).filter(|_| self.operation == operation);
        fence.copied().filter(|fence| *fence != Epoch::default())
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + MOVE_BYTES * self.moves.len());
        bytes.extend_from_slice(&self.operation.to_be_bytes());
        bytes.extend_from_slice(&self.dropped_ns.to_be_bytes());
        bytes.push(match self.rows {
            Rows::Clean => CLEAN,
            Rows::Foreign => FOREIGN,
        });
        for (source, fence) in &self.moves {
            bytes.extend_from_slice(&source.0.to_be_bytes());
            bytes.extend_from_slice(&fence.0.to_be_bytes());
        }
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (operation, rest) = bytes.split_first_chunk::<8>()?;
        let (dropped_ns, rest) = rest.split_first_chunk::<8>()?;
        let (rows, moves) = rest.split_first()?;
        let rows = match *rows {
            CLEAN => Rows::Clean,
            FOREIGN => Rows::Foreign,
            _ => return None,
        };
        let (moves, []) = moves.as_chunks::<MOVE_BYTES>() else { return None };
        let read = |bytes: &[u8; MOVE_BYTES]| {
            let (source, fence) = (bytes.first_chunk()?, bytes.last_chunk()?);
            Some((ShardId(u16::from_be_bytes(*source)), Epoch(u64::from_be_bytes(*fence))))
        };
        let moves = moves.iter().map(read).collect::<Option<_>>()?;
        let (operation, dropped_ns) = (u64::from_be_bytes(*operation), u64::from_be_bytes(*dropped_ns));
        Some(Self { operation, rows, moves, dropped_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_note_is_read_as_it_was_written() {
        let note = Note { operation: 7, dropped_ns: 1 << 50, ..Note::default() }.of(9);
        assert_eq!((note.operation, note.rows, note.dropped_ns), (9, Rows::Foreign, 1 << 50));
        let moves = [(ShardId(3), Epoch(12)), (ShardId(1), Epoch(0))].into_iter().collect();
        let note = Note { moves, ..note };
        assert_eq!(Note::from_bytes(&note.to_bytes()), Some(note.clone()));
        assert_eq!((note.drained(9, ShardId(3)), note.drained(9, ShardId(1))), (Some(Epoch(12)), None));
        assert_eq!((note.drained(9, ShardId(2)), note.drained(8, ShardId(3))), (None, None));
        assert_eq!(note.of(9), note);
        assert!(note.of(10).moves.is_empty());
        let clean = Note { rows: Rows::Clean, ..note };
        assert_eq!(Note::from_bytes(&clean.to_bytes()), Some(clean));
    }

    proptest! {
        #[test]
        fn whatever_lies_there_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Some(note) = Note::from_bytes(&bytes) {
                prop_assert!(note.to_bytes().len() <= bytes.len());
            }
        }
    }
}
