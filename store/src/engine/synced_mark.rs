//! What a log says of how far it is synced: a mark in a batch, and how it is found where the log is damaged.
//!
//! A power cut may leave any part of what was not synced, and damage may hit any part of what was. To tell one from the other, the
//! first batch that is written after a sync carries the sequence number up to which it reached.

/// Begins a mark; chosen at random, so that nothing else looks like one by chance. A value that holds a mark can only make a damaged log
/// look more damaged.
const MAGIC: [u8; 8] = [0x9b, 0xd1, 0x3e, 0xa6, 0x57, 0x0c, 0xf4, 0x72];
/// The magic number and the sequence number, little endian.
pub const MARK_BYTES: usize = 16;

/// The mark that says: all rows up to this sequence number are synced.
pub fn encode(sequence: u64) -> [u8; MARK_BYTES] {
    let mut mark = [0; MARK_BYTES];
    mark[..8].copy_from_slice(&MAGIC);
    mark[8..].copy_from_slice(&sequence.to_le_bytes());
    mark
}

/// The marks found in the parts of a log.
#[derive(Default)]
pub struct Marks {
    largest: Option<u64>,
    /// The end of the part before: a mark may be cut in two by the end of a block.
    tail: Vec<u8>,
}

impl Marks {
    /// Takes the next part.
    pub fn take(&mut self, part: &[u8]) {
        let head = &part[..part.len().min(MARK_BYTES - 1)];
        self.tail.extend_from_slice(head);
        let seam = std::mem::take(&mut self.tail);
        self.find(&seam);
        self.find(part);
        let kept = if part.len() < MARK_BYTES { &seam[..] } else { part };
        self.tail.extend_from_slice(&kept[kept.len().saturating_sub(MARK_BYTES - 1)..]);
    }

    fn find(&mut self, bytes: &[u8]) {
        for window in bytes.windows(MARK_BYTES) {
            if let Some(sequence) = window.strip_prefix(&MAGIC).and_then(|rest| rest.first_chunk::<8>()) {
                self.largest = self.largest.max(Some(u64::from_le_bytes(*sequence)));
            }
        }
    }

    pub fn largest(&self) -> Option<u64> {
        self.largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_however_the_log_is_cut_into_parts() {
        let mut log = vec![7; 40];
        log.extend_from_slice(&encode(5));
        log.extend_from_slice(&[0x9b; 30]);
        log.extend_from_slice(&encode(1 << 40));
        log.extend_from_slice(&encode(9));
        for length in 1..log.len() {
            let mut marks = Marks::default();
            log.chunks(length).for_each(|part| marks.take(part));
            assert_eq!(marks.largest(), Some(1 << 40), "parts of {length} bytes");
        }
        let mut marks = Marks::default();
        marks.take(&log[..50]);
        assert_eq!(marks.largest(), None);
    }
}
