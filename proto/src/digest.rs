//! Digests of slots: what two copies of a shard compare to find out whether they hold the same rows.
//!
//! Only rows count that a client would see at a stated time: copies drop dead rows when their own compactions meet them.

use crate::slot::splitmix64;
use std::collections::BTreeMap;

/// The rows of one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotDigest {
    pub rows: u64,
    /// Sum of the rows' hashes, modulo 2^64: no order matters.
    pub sum: u64,
}

/// The slots of a shard that have rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    slots: BTreeMap<u16, SlotDigest>,
}

impl Digests {
    /// Counts one row; `physical_key` begins with its slot.
    pub fn add(&mut self, physical_key: &[u8], row: &[u8]) {
        let slot = physical_key.first_chunk().map_or(0, |slot| u16::from_be_bytes(*slot));
        let digest = self.slots.entry(slot).or_default();
        digest.rows += 1;
        digest.sum = digest.sum.wrapping_add(hash(physical_key, row));
    }

    pub fn insert(&mut self, slot: u16, digest: SlotDigest) {
        if digest.rows > 0 {
            self.slots.insert(slot, digest);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u16, SlotDigest)> {
        self.slots.iter().map(|(slot, digest)| (*slot, *digest))
    }

    pub fn rows(&self) -> u64 {
        self.slots.values().map(|digest| digest.rows).sum()
    }

    /// The slots whose rows are not the same in both, ascending.
    pub fn differing(&self, other: &Self) -> Vec<u16> {
        let mut slots: Vec<u16> = self.slots.keys().chain(other.slots.keys()).copied().collect();
        slots.sort_unstable();
        slots.dedup();
        slots.retain(|slot| self.slots.get(slot) != other.slots.get(slot));
        slots
    }
}

/// FNV-1a over the key's length, key and row, its bits then mixed: sums of what FNV leaves related would cancel out.
fn hash(physical_key: &[u8], row: &[u8]) -> u64 {
    let fold = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let length = (physical_key.len() as u64).to_le_bytes();
    splitmix64(length.iter().chain(physical_key).chain(row).fold(0xcbf2_9ce4_8422_2325, fold))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Row = (Vec<u8>, Vec<u8>);

    fn digests<'r>(rows: impl Iterator<Item = &'r Row>) -> Digests {
        let mut digests = Digests::default();
        rows.for_each(|(key, row)| digests.add(key, row));
        digests
    }

    proptest! {
        #[test]
        fn order_does_not_matter_and_every_change_shows_in_its_slot(
            rows in prop::collection::btree_map(prop::collection::vec(any::<u8>(), 2..6), prop::collection::vec(any::<u8>(), 1..9), 1..20),
            at in any::<prop::sample::Index>(),
            bit in 0..8u8,
        ) {
            let rows: Vec<Row> = rows.into_iter().collect();
            let all = digests(rows.iter());
            prop_assert_eq!(&all, &digests(rows.iter().rev()));
            prop_assert_eq!(all.differing(&all), Vec::<u16>::new());
            let index = at.index(rows.len());
            let slot = u16::from_be_bytes([rows[index].0[0], rows[index].0[1]]);
            let mut flipped = rows.clone();
            flipped[index].1[0] ^= 1 << bit;
            prop_assert_eq!(all.differing(&digests(flipped.iter())), vec![slot]);
            let missing = digests(rows.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, row)| row));
            prop_assert_eq!(all.differing(&missing), vec![slot]);
        }
    }

    #[test]
    fn the_hash_is_the_same_in_every_version() {
        let mut digests = Digests::default();
        digests.add(&[0x30, 0x39, b'k'], b"row");
        assert_eq!(digests.iter().collect::<Vec<_>>(), [(12345, SlotDigest { rows: 1, sum: hash(b"09k", b"row") })]);
        assert_eq!(hash(b"09k", b"row"), 4334909159005335529);
    }
}
