//! Rows on their way to another shard: packed into messages, large ones in pieces, compressed where that pays.

use vasto_proto::pb::MovedRows;

/// Bytes of rows in one message.
pub const MESSAGE_BYTES: usize = 256 << 10;
/// Of a row's length: it goes on in the next piece.
const GOES_ON: u32 = 1 << 31;
/// It pays to compress what gets shorter by an eighth.
const PAYS_BELOW: (usize, usize) = (7, 8);
/// Messages that are sent as they are when it did not.
const UNCOMPRESSED_MESSAGES: u32 = 16;

/// Packs rows into messages.
#[derive(Default)]
pub struct Packer {
    packed: Vec<u8>,
    rows: u32,
    bytes: u64,
    /// So many messages more are not worth a try.
    skips: u32,
}

impl Packer {
    /// Adds a row, or a piece of one; gives a message that is full.
    pub fn add(&mut self, key: &[u8], piece: &[u8], goes_on: bool) -> Option<MovedRows> {
        if self.packed.capacity() == 0 {
            self.packed.reserve(MESSAGE_BYTES + MESSAGE_BYTES / 16);
        }
        let length = piece.len() as u32 | if goes_on { GOES_ON } else { 0 };
        self.packed.extend_from_slice(&(key.len() as u32).to_le_bytes());
        self.packed.extend_from_slice(&length.to_le_bytes());
        self.packed.extend_from_slice(key);
        self.packed.extend_from_slice(piece);
        self.rows += u32::from(!goes_on);
        self.bytes += (piece.len() + if goes_on { 0 } else { key.len() }) as u64;
        if self.packed.len() >= MESSAGE_BYTES { self.finish() } else { None }
    }

    /// What is left.
    pub fn finish(&mut self) -> Option<MovedRows> {
        if self.packed.is_empty() {
            return None;
        }
        let packed = std::mem::take(&mut self.packed);
        let (rows, bytes) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.bytes));
        self.skips = self.skips.saturating_sub(1);
        if self.skips == 0 {
            let compressed = lz4_flex::block::compress(&packed);
            if compressed.len() * PAYS_BELOW.1 < packed.len() * PAYS_BELOW.0 {
                return Some(MovedRows { packed: compressed.into(), unpacked_bytes: packed.len() as u32, rows, bytes });
            }
            self.skips = UNCOMPRESSED_MESSAGES;
        }
        Some(MovedRows { packed: packed.into(), unpacked_bytes: 0, rows, bytes })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A row's key, the piece of it, and whether it goes on.
    pub type Piece = (Vec<u8>, Vec<u8>, bool);

    /// Takes a message apart.
    pub fn unpack(message: &MovedRows) -> Vec<Piece> {
        let unpacked = match message.unpacked_bytes {
            0 => message.packed.to_vec(),
            bytes => lz4_flex::block::decompress(&message.packed, bytes as usize).unwrap(),
        };
        let mut rest = unpacked.as_slice();
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let mut number = || {
                let (number, after) = rest.split_first_chunk::<4>().unwrap();
                rest = after;
                u32::from_le_bytes(*number)
            };
            let (key, row) = (number(), number());
            let (key, after) = rest.split_at(key as usize);
            let (piece, after) = after.split_at((row & !GOES_ON) as usize);
            pieces.push((key.to_vec(), piece.to_vec(), row & GOES_ON != 0));
            rest = after;
        }
        pieces
    }

    #[test]
    fn rows_come_out_as_they_went_in_compressed_or_not() {
        let mut packer = Packer::default();
        let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(1000).collect();
        let rows: Vec<Piece> = (0..2000u32)
            .map(|number| {
                let row = if number < 1000 { vec![7; 1000] } else { noise.clone() };
                let noise = fastrand::u64(..).to_le_bytes();
                (number.to_be_bytes().to_vec(), [&row[..], &noise].concat(), number % 7 == 0)
            })
            .collect();
        let mut messages: Vec<MovedRows> =
            rows.iter().filter_map(|(key, row, goes_on)| packer.add(key, row, *goes_on)).collect();
        messages.extend(packer.finish());
        assert!(packer.finish().is_none());
        assert!(messages.iter().any(|message| message.unpacked_bytes > 0 && message.packed.len() < MESSAGE_BYTES / 4));
        let ended = rows.iter().filter(|(_, _, goes_on)| !goes_on).count();
        assert_eq!(messages.iter().map(|message| message.rows as usize).sum::<usize>(), ended);
        let bytes = |(key, row, goes_on): &Piece| row.len() + if *goes_on { 0 } else { key.len() };
        let bytes: usize = rows.iter().map(bytes).sum();
        assert_eq!(messages.iter().map(|message| message.bytes as usize).sum::<usize>(), bytes);
        let unpacked: Vec<Piece> = messages.iter().flat_map(unpack).collect();
        assert!(unpacked == rows);
    }
}
