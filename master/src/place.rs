//! Spreads shards evenly over stores.

use vasto_proto::id::StoreId;

/// A store that may get shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub id: StoreId,
    pub free_disk_bytes: u64,
}

/// The primary of each of `shard_count` shards: no store has more than one shard more than another, and the stores with
/// the most free disk are the ones that have it. The same input in another order gives the same result.
pub fn spread(shard_count: u16, candidates: &[Candidate]) -> Vec<StoreId> {
    let mut ranked = candidates.to_vec();
    ranked.sort_by_key(|candidate| (std::cmp::Reverse(candidate.free_disk_bytes), candidate.id));
    ranked.iter().cycle().take(usize::from(shard_count)).map(|candidate| candidate.id).collect()
}

#[cfg(test)]
mod tests {

    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn candidates(free: &[u64]) -> Vec<Candidate> {
        (1..).zip(free).map(|(id, free)| Candidate { id: StoreId(id), free_disk_bytes: *free }).collect()
    }

    #[test]
    fn the_most_free_disk_comes_first() {
        assert_eq!(spread(4, &candidates(&[10, 30, 20])), [2, 3, 1, 2].map(StoreId));
        assert_eq!(spread(2, &candidates(&[5, 5, 5])), [1, 2].map(StoreId));
        assert!(spread(3, &[]).is_empty());
    }

    proptest! {
        #[test]
        fn shards_are_spread_evenly(shard_count in 1u16..200, free in prop::collection::vec(0u64..4, 1..20)) {
            let candidates = candidates(&free);
            let primaries = spread(shard_count, &candidates);
            prop_assert_eq!(primaries.len(), usize::from(shard_count));
            let mut counts: BTreeMap<StoreId, usize> = candidates.iter().map(|candidate| (candidate.id, 0)).collect();
            for primary in &primaries {
                *counts.get_mut(primary).unwrap() += 1;
            }
            let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
            prop_assert!(most - least <= 1);
            for rich in &candidates {
                for poor in candidates.iter().filter(|poor| poor.free_disk_bytes < rich.free_disk_bytes) {
                    prop_assert!(counts[&rich.id] >= counts[&poor.id]);
                }
            }
            let reversed: Vec<Candidate> = candidates.iter().rev().copied().collect();
            prop_assert_eq!(spread(shard_count, &reversed), primaries);
        }
    }
}
