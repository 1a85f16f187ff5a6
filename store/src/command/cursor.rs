//! SCAN cursors: 53-bit numbers that say where a walk in slot order stands, whoever continues it.
//!
//! ```text
//! bits 39..53  slot
//! bit  38      order within the slot: 0 = as the keys lie, 1 = by hash
//! bits 0..38   hash of the last key visited; 0 = the start of the slot
//! ```
//!
//! 53 bits, since some clients keep numbers as doubles. Slots change with no topology, hashes with no store.

use vasto_proto::slot::{SLOT_COUNT, splitmix64};

const HASH_BITS: u32 = 38;
const HASH_MASK: u64 = (1 << HASH_BITS) - 1;
const ORDER_BIT: u64 = 1 << HASH_BITS;
const SLOT_SHIFT: u32 = HASH_BITS + 1;

/// How a walk goes through one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// As the keys lie on disk.
    Key,
    /// By ascending hash: when the key that a cursor stands for is gone.
    Hash,
}

/// Where a walk stands: behind everything up to the key with this hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cursor {
    pub slot: u16,
    pub order: Order,
    /// Below 2^38; 0 = nothing of the slot was visited yet.
    pub hash: u64,
}

impl Cursor {
    pub fn start_of(slot: u16) -> Self {
        Self { slot, order: Order::Key, hash: 0 }
    }

    pub fn encode(self) -> u64 {
        let order = match self.order {
            Order::Key => 0,
            Order::Hash => ORDER_BIT,
        };
        u64::from(self.slot) << SLOT_SHIFT | order | self.hash & HASH_MASK
    }

    /// `None` for a number that no walk answered with: clients may send any.
    pub fn decode(number: u64) -> Option<Self> {
        let slot = u16::try_from(number >> SLOT_SHIFT).ok().filter(|slot| *slot < SLOT_COUNT)?;
        let order = if number & ORDER_BIT == 0 { Order::Key } else { Order::Hash };
        Some(Self { slot, order, hash: number & HASH_MASK })
    }
}

/// The hash of a key in cursors: 38 bits and never 0. Every store and every version must compute it alike.
pub fn key_hash(key: &[u8]) -> u64 {
    let fnv = key
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    (splitmix64(fnv) >> (64 - HASH_BITS)).max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cursors_are_golden() {
        assert_eq!(Cursor::start_of(0).encode(), 0);
        assert_eq!(Cursor::start_of(1).encode(), 549_755_813_888);
        assert_eq!(Cursor { slot: 16383, order: Order::Hash, hash: HASH_MASK }.encode(), (1 << 53) - 1);
        assert_eq!(Cursor::decode(1 << 53), None);
        assert_eq!(Cursor::decode(u64::MAX), None);
    }

    /// A cursor may be continued by a store of another version: these numbers must never change.
    #[test]
    fn hashes_are_golden() {
        for (key, hash) in HASHES {
            assert_eq!(key_hash(key.as_bytes()), *hash, "{key:?}");
        }
    }

    const HASHES: &[(&str, u64)] = &[("", 209_922_752_602), ("foo", 49_672_541_845), ("user:1000", 194_332_571_501)];

    proptest! {
        #[test]
        fn a_cursor_round_trips(slot in 0..SLOT_COUNT, by_hash in any::<bool>(), hash in 0..=HASH_MASK) {
            let order = if by_hash { Order::Hash } else { Order::Key };
            let cursor = Cursor { slot, order, hash };
            prop_assert!(cursor.encode() < 1 << 53);
            prop_assert_eq!(Cursor::decode(cursor.encode()), Some(cursor));
        }

        #[test]
        fn a_hash_fits_and_is_never_zero(key in any::<Vec<u8>>()) {
            prop_assert!((1..=HASH_MASK).contains(&key_hash(&key)));
        }
    }
}
