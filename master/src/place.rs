//! Spreads shards and their copies over stores.

use std::cmp::Reverse;
use std::collections::HashMap;

use thiserror::Error;
use vasto_proto::id::StoreId;

/// What stands and falls together; an empty text says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// The part of the house that fails as one: a room, a rack, a zone of a cloud.
    pub zone: String,
    /// The machine.
    pub host: String,
    /// The file system of the data folder: stores on one share its free bytes.
    pub disk: String,
    /// Words of whoever runs the store; shown, not read.
    pub tags: Vec<String>,
}

/// A store that may get shards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    pub id: StoreId,
    pub free_disk_bytes: u64,
    pub site: Site,
    /// Copies of shards that it has, of all keyspaces.
    pub held: usize,
}

/// Copies of one shard never share a store.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{copies} copies of a shard need {copies} stores, and {up} are up")]
pub struct TooFewStores {
    pub copies: usize,
    pub up: usize,
}

/// Who holds each of `shard_count` shards: the primary first, then its replicas.
///
/// No store has more than one primary of the keyspace more than another; those that hold least of all keyspaces come first, and among
/// them those with the most free disk, of which stores on one disk have equal parts. Copies of one shard share neither a host nor a
/// zone while there is another; a host weighs more. The same input in another order gives the same result.
pub fn place(shard_count: u16, copies: usize, candidates: &[Candidate]) -> Result<Vec<Vec<StoreId>>, TooFewStores> {
    place_beside(&HashMap::new(), shard_count, copies, candidates)
}

/// As [`place`], for more shards of a keyspace of which stores lead so many.
pub fn place_beside(
    leads: &HashMap<StoreId, usize>,
    shard_count: u16,
    copies: usize,
    candidates: &[Candidate],
) -> Result<Vec<Vec<StoreId>>, TooFewStores> {
    let copies = copies.max(1);
    if candidates.len() < copies {
        return Err(TooFewStores { copies, up: candidates.len() });
    }
    let mut places: Vec<Place<'_>> = candidates.iter().map(|candidate| Place::new(candidate, candidates)).collect();
    places.sort_by_key(|place| place.candidate.id);
    for place in &mut places {
        place.primaries = leads.get(&place.candidate.id).copied().unwrap_or_default();
    }
    let mut shards = Vec::with_capacity(usize::from(shard_count));
    for _ in 0..shard_count {
        let mut chosen: Vec<usize> = Vec::with_capacity(copies);
        while chosen.len() < copies {
            let free = (0..places.len()).filter(|number| !chosen.contains(number));
            let next = if chosen.is_empty() {
                free.min_by_key(|number| places[*number].as_primary())
            } else {
                free.min_by_key(|number| (places[*number].nearness(&chosen, &places), places[*number].as_replica()))
            };
            let Some(next) = next else { break };
            places[next].primaries += usize::from(chosen.is_empty());
            places[next].copies += 1;
            chosen.push(next);
        }
        shards.push(chosen.into_iter().map(|number| places[number].candidate.id).collect());
    }
    Ok(shards)
}

/// Where one more copy of a shard goes that has copies in `places`: to a store that is not `taken`, by the rules of [`place`].
pub fn place_one(taken: &[StoreId], places: &[&Site], candidates: &[Candidate]) -> Option<StoreId> {
    let free = candidates.iter().filter(|candidate| !taken.contains(&candidate.id));
    let weight = |candidate: &&Candidate| {
        let place = Place::new(candidate, candidates);
        (nearness(&candidate.site, places.iter().copied()), place.as_replica(), candidate.id)
    };
    free.min_by_key(weight).map(|candidate| candidate.id)
}

/// How much would fail together with copies in these places.
pub fn nearness<'a>(site: &Site, places: impl Iterator<Item = &'a Site> + Clone) -> usize {
    let shared = |of: fn(&Site) -> &str| {
        let own = of(site);
        !own.is_empty() && places.clone().any(|other| of(other) == own)
    };
    2 * usize::from(shared(|site| &site.host)) + usize::from(shared(|site| &site.zone))
}

/// A candidate and what it was given so far.
struct Place<'a> {
    candidate: &'a Candidate,
    free_bytes: u64,
    primaries: usize,
    copies: usize,
}

impl<'a> Place<'a> {
    fn new(candidate: &'a Candidate, all: &[Candidate]) -> Self {
        let disk = &candidate.site.disk;
        let on_disk = if disk.is_empty() { 1 } else { all.iter().filter(|other| other.site.disk == *disk).count() };
        let free_bytes = candidate.free_disk_bytes / (on_disk.max(1) as u64);
        Self { candidate, free_bytes, primaries: 0, copies: 0 }
    }

    fn as_primary(&self) -> (usize, usize, Reverse<u64>) {
        (self.primaries, self.candidate.held + self.copies, Reverse(self.free_bytes))
    }

    fn as_replica(&self) -> (usize, usize, Reverse<u64>) {
        (self.copies, self.candidate.held + self.copies, Reverse(self.free_bytes))
    }

    /// How much would fail together with the copies that are placed already.
    fn nearness(&self, chosen: &[usize], places: &[Place<'_>]) -> usize {
        nearness(&self.candidate.site, chosen.iter().map(|other| &places[*other].candidate.site))
    }
}

/// How many copies of shards each store has.
pub fn count_copies(holders: impl Iterator<Item = StoreId>) -> HashMap<StoreId, usize> {
    let mut counts = HashMap::new();
    for store in holders {
        *counts.entry(store).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {

    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn candidates(free: &[u64]) -> Vec<Candidate> {
        let candidate =
            |(id, free): (u32, &u64)| Candidate { id: StoreId(id), free_disk_bytes: *free, ..Candidate::default() };
        (1..).zip(free).map(candidate).collect()
    }

    fn primaries(shard_count: u16, candidates: &[Candidate]) -> Vec<u32> {
        place(shard_count, 1, candidates).unwrap().iter().map(|copies| copies[0].0).collect()
    }

    #[test]
    fn the_most_free_disk_comes_first() {
        assert_eq!(primaries(4, &candidates(&[10, 30, 20])), [2, 3, 1, 2]);
        assert_eq!(primaries(2, &candidates(&[5, 5, 5])), [1, 2]);
        assert_eq!(place(3, 1, &[]), Err(TooFewStores { copies: 1, up: 0 }));
    }

    #[test]
    fn stores_on_one_disk_do_not_count_it_twice() {
        let mut stores = candidates(&[100, 100, 60]);
        stores[0].site.disk = "one".to_owned();
        stores[1].site.disk = "one".to_owned();
        assert_eq!(primaries(3, &stores), [3, 1, 2]);
    }

    #[test]
    fn who_holds_least_comes_first() {
        let mut stores = candidates(&[100, 10, 10]);
        stores[0].held = 1;
        assert_eq!(primaries(1, &stores), [2]);
        // One after the other, keyspaces of one shard go round.
        for _ in 0..30 {
            let first = primaries(1, &stores)[0];
            stores[first as usize - 1].held += 1;
        }
        let held: Vec<usize> = stores.iter().map(|store| store.held).collect();
        assert!(held.iter().max().unwrap() - held.iter().min().unwrap() <= 1, "{held:?}");
    }

    #[test]
    fn more_shards_go_where_few_are_led() {
        let leads = HashMap::from([(StoreId(1), 2), (StoreId(2), 1)]);
        let placed = place_beside(&leads, 4, 1, &candidates(&[30, 20, 10])).unwrap();
        assert_eq!(placed.concat(), [3, 2, 3, 1].map(StoreId), "all lead two or three");
    }

    #[test]
    fn too_few_stores_are_refused() {
        let error = place(1, 3, &candidates(&[1, 1])).unwrap_err();
        assert_eq!(error.to_string(), "3 copies of a shard need 3 stores, and 2 are up");
    }

    #[test]
    fn one_more_copy_goes_where_it_fails_least_with_the_others() {
        let mut stores = candidates(&[10, 90, 50, 50]);
        for (store, (host, zone)) in stores.iter_mut().zip([("a", "x"), ("a", "x"), ("b", "x"), ("c", "y")]) {
            store.site = Site { host: host.to_owned(), zone: zone.to_owned(), ..Site::default() };
        }
        let beside = |taken: &[u32], stores: &[Candidate]| {
            let taken: Vec<StoreId> = taken.iter().map(|store| StoreId(*store)).collect();
            let places: Vec<&Site> =
                stores.iter().filter(|store| taken.contains(&store.id)).map(|store| &store.site).collect();
            place_one(&taken, &places, stores).map(|store| store.0)
        };
        assert_eq!(beside(&[1], &stores), Some(4), "another host in another zone");
        assert_eq!(beside(&[1, 4], &stores), Some(3), "another host");
        assert_eq!(beside(&[1, 3, 4], &stores), Some(2));
        assert_eq!(beside(&[1, 2, 3, 4], &stores), None);
        // Of a store that is away nothing is known but that it has a copy.
        assert_eq!(beside(&[9], &stores), Some(2), "most free disk");
        stores[1].held = 1;
        assert_eq!(beside(&[9], &stores), Some(3), "who holds least");
    }

    proptest! {
        #[test]
        fn primaries_are_spread_evenly(shard_count in 1u16..200, free in prop::collection::vec(0u64..4, 1..20)) {
            let candidates = candidates(&free);
            let placed = place(shard_count, 1, &candidates).unwrap();
            prop_assert_eq!(placed.len(), usize::from(shard_count));
            let counts = count_copies(placed.iter().flatten().copied());
            let count = |candidate: &Candidate| counts.get(&candidate.id).copied().unwrap_or_default();
            let (least, most) = (candidates.iter().map(count).min().unwrap(), candidates.iter().map(count).max().unwrap());
            prop_assert!(most - least <= 1);
            for rich in &candidates {
                for poor in candidates.iter().filter(|poor| poor.free_disk_bytes < rich.free_disk_bytes) {
                    prop_assert!(count(rich) >= count(poor));
                }
            }
            let reversed: Vec<Candidate> = candidates.iter().rev().cloned().collect();
            prop_assert_eq!(place(shard_count, 1, &reversed).unwrap(), placed);
        }

        /// Hosts lie in one zone each, as they do.
        #[test]
        fn copies_of_a_shard_share_no_store_and_neither_host_nor_zone_while_there_is_another(
            shard_count in 1u16..40,
            copies in 1usize..5,
            hosts in prop::collection::vec((0u8..4, 0u64..4, 0usize..5), 5..12),
            zones in prop::collection::vec(0u8..3, 4),
        ) {
            let mut candidates = candidates(&hosts.iter().map(|(_, free, _)| *free).collect::<Vec<_>>());
            for (candidate, (host, _, held)) in candidates.iter_mut().zip(&hosts) {
                candidate.site.host = format!("host-{host}");
                candidate.site.zone = format!("zone-{}", zones[usize::from(*host)]);
                candidate.held = *held;
            }
            let site = |id: &StoreId| &candidates[id.0 as usize - 1].site;
            let all: Vec<StoreId> = candidates.iter().map(|candidate| candidate.id).collect();
            let distinct = |stores: &[StoreId], of: fn(&Site) -> &str| {
                stores.iter().map(|store| of(site(store))).collect::<BTreeSet<_>>().len()
            };
            let placed = place(shard_count, copies, &candidates).unwrap();
            for shard in &placed {
                prop_assert_eq!(shard.iter().collect::<BTreeSet<_>>().len(), copies);
                prop_assert_eq!(distinct(shard, |site| &site.host), copies.min(distinct(&all, |site| &site.host)));
                prop_assert_eq!(distinct(shard, |site| &site.zone), copies.min(distinct(&all, |site| &site.zone)));
            }
            let firsts = count_copies(placed.iter().map(|shard| shard[0]));
            let counts: Vec<usize> = all.iter().map(|store| firsts.get(store).copied().unwrap_or_default()).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            let reversed: Vec<Candidate> = candidates.iter().rev().cloned().collect();
            prop_assert_eq!(place(shard_count, copies, &reversed).unwrap(), placed);
        }
    }
}
