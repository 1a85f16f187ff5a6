//! Chooses a random key of a shard: each with about the same chance, without reading all of them each time.
//!
//! First a slot is chosen, by what the last census found: each slot by its keys while they are counted, above that the long ones by
//! theirs and the others, among which no census tells, by putting some together. Part of the choices take slots as they come whatever
//! the census says: what was written since is found as well. In a long slot the choice goes down the tree of its keys, byte by byte,
//! until few rows are left.

use super::census::Chances;
use super::source::{Child, RowState, Source, children, start_of};
use vasto_proto::key::decode_key;

/// A shard of up to this many rows is read whole: each key has the same chance.
const SHARD_ROWS_MAX: u64 = 1_000;
/// Slots that are put together, and rows of one that are read before its keys are chosen by their bytes.
const SLOTS_POOLED: usize = 8;
const SLOT_ROWS_MAX: u64 = 128;
/// Ways down the tree of one slot that a choice is among.
const WAYS: usize = 8;
/// Of so many choices one takes slots as they come.
const AS_THEY_COME: usize = 8;
/// Choices that find nothing, in slots without a key, before the next key from a random place on is taken.
const TRIES: usize = 24;
/// Bytes of a key that a choice goes down at most: each costs a seek or, where keys differ, up to 256.
const DEPTH_MAX: usize = 96;

/// A choice among keys that come one after the other, each with the same chance.
#[derive(Default)]
struct Choice {
    chosen: Option<Vec<u8>>,
    seen: u64,
}

impl Choice {
    /// Offers a key that stands for `weight` keys.
    fn offer(&mut self, key: &[u8], weight: u64) {
        self.seen = self.seen.saturating_add(weight);
        if weight > 0 && fastrand::u64(..self.seen) < weight {
            self.chosen = Some(key.to_vec());
        }
    }
}

/// A physical key that is alive; `None` if there is none in the slots.
pub fn physical_key<S: Source>(source: &mut S, slots: &[u16], chances: &Chances) -> Result<Option<Vec<u8>>, S::Error> {
    source.seek(&[]);
    let mut choice = Choice::default();
    if choose_from(source, &[], SHARD_ROWS_MAX, &mut choice)? {
        return Ok(choice.chosen);
    }
    for _ in 0..TRIES {
        let mut choice = Choice::default();
        let weighted = if fastrand::usize(..AS_THEY_COME) == 0 { None } else { by_keys(chances) };
        match weighted {
            Some(slot) => {
                for _ in 0..WAYS {
                    choose_below(source, start_of(slot), &mut choice)?;
                }
            }
            None => {
                for _ in 0..SLOTS_POOLED {
                    let Some(slot) = fastrand::choice(slots) else { return Ok(None) };
                    choose_below(source, start_of(*slot), &mut choice)?;
                }
            }
        }
        if choice.chosen.is_some() {
            return Ok(choice.chosen);
        }
    }
    // Few slots have keys: the next one from a random slot on, around the end.
    let slot = fastrand::choice(slots).copied().unwrap_or(0);
    for start in [slot, 0] {
        source.seek(&start_of(start));
        let mut choice = Choice::default();
        while choice.chosen.is_none() && !choose_from(source, &[], SHARD_ROWS_MAX, &mut choice)? {}
        if choice.chosen.is_some() {
            return Ok(choice.chosen);
        }
    }
    Ok(None)
}

/// Offers the next rows that begin with a prefix; true if there are no more of them.
fn choose_from<S: Source>(source: &mut S, prefix: &[u8], rows_max: u64, choice: &mut Choice) -> Result<bool, S::Error> {
    for _ in 0..rows_max {
        let Some((_, state)) = source.row()? else { return Ok(true) };
        let Some(key) = source.key().filter(|key| key.starts_with(prefix)) else { return Ok(true) };
        if let RowState::Alive { .. } = state {
            choice.offer(key, 1);
        }
        source.next();
    }
    Ok(false)
}

/// Offers one of the rows that begin with a prefix, standing for as many as were seen of them; of many, goes on with those that have
/// one of the bytes that come next, and each then stands for as many as there were bytes: some ways together are fair.
fn choose_below<S: Source>(source: &mut S, mut prefix: Vec<u8>, choice: &mut Choice) -> Result<(), S::Error> {
    let depth_max = prefix.len() + DEPTH_MAX;
    let mut times = 1u64;
    loop {
        source.seek(&prefix);
        let mut found = Choice::default();
        let is_all = choose_from(source, &prefix, SLOT_ROWS_MAX, &mut found)?;
        if is_all || prefix.len() >= depth_max {
            if let Some(key) = found.chosen {
                choice.offer(&key, found.seen.saturating_mul(times));
            }
            return Ok(());
        }
        // Down to where keys differ.
        loop {
            let children = children(source, &prefix)?;
            times = times.saturating_mul(children.len() as u64);
            match fastrand::choice(children.iter()) {
                Some(Child::Byte(byte)) => prefix.push(*byte),
                Some(Child::Itself) => {
                    source.seek(&prefix);
                    let mut itself = Choice::default();
                    choose_from(source, &prefix, 1, &mut itself)?;
                    if let Some(key) = itself.chosen {
                        choice.offer(&key, times);
                    }
                    return Ok(());
                }
                None => return Ok(()),
            }
            if children.len() > 1 || prefix.len() >= depth_max {
                break;
            }
        }
    }
}

/// A slot by its share of the keys; `None` if it is one of those that were not looked at by themselves.
fn by_keys(chances: &Chances) -> Option<u16> {
    let by_slot = &chances.keys_by_slot;
    let total = by_slot.iter().map(|(_, keys)| keys).sum::<u64>() + chances.other_keys;
    let mut left = if total == 0 { return None } else { fastrand::u64(..total) };
    let slot = by_slot.iter().find(|(_, keys)| {
        let is_here = left < *keys;
        left = left.saturating_sub(*keys);
        is_here
    });
    slot.map(|(slot, _)| *slot)
}

/// The user key of a physical one.
pub fn user_key(physical: &[u8]) -> Option<&[u8]> {
    decode_key(physical).map(|(_, key)| key)
}
