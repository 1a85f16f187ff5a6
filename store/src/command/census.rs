//! Counts the rows of a shard: one by one while they are few; above, a sample of its slots says how many there are.
//!
//! A slot is one contiguous range on disk, so a sample of slots is cheap to read and, keys being hashed to slots, fair. What hash tags
//! make of it is dealt with apart: slots that hold much of the files' bytes are found by their bytes and always looked at. What is in
//! memory only has no bytes yet: if that is more than a sixteenth of the rows it is written out first.
//!
//! A long slot is not read to its end. Its keys are a tree, byte by byte: the tree is laid open from its root until it has some dozens
//! of branches, and in each branch some random ways lead down to where few rows are left. Those rows, times the number of ways that
//! there were at every fork, are on average the rows of the branch (Knuth 1975, Estimating the efficiency of backtrack programs).

use super::source::{Child, RowState, Source, children, start_of};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vasto_proto::slot::SLOT_COUNT;

/// Keys that are counted one by one.
pub const COUNTED_KEYS_MAX: u64 = 100_000;
/// Rows that are read for it at most, dead ones included: about two seconds.
const COUNTED_ROWS_MAX: u64 = 4_000_000;
/// Rows that a sample looks at: about 0.1 s. The error is about 1 / sqrt(100,000) = 0.3 % where slots are alike.
const SAMPLED_ROWS: u64 = 100_000;
/// Slots that it looks at at least, so that slots that are not alike are noticed.
const SAMPLED_SLOTS_MIN: u64 = 64;
/// Rows at which a sampled slot is long, and at which one is that is known to be.
const SAMPLED_SLOT_ROWS_MAX: u64 = 50_000;
const HEAVY_SLOT_ROWS_MAX: u64 = 5_000;
/// Branches that the tree of a long slot is laid open to; at most so many are looked at, and so many whatever the time.
const BRANCHES_MIN: usize = 64;
const BRANCHES_LOOKED_AT_MAX: usize = 128;
const BRANCHES_LOOKED_AT_MIN: u32 = 16;
/// Ways down each branch, and down each of a slot that is one of a sample.
const WAYS: u32 = 2;
const SAMPLED_WAYS: u32 = 1;
/// So few rows end a way down, and at most so many bytes of a key, behind which rows are counted up to a limit.
const LEAF_ROWS: u64 = 512;
const DEPTH_MAX: usize = 96;
const DEEP_LEAF_ROWS: u64 = 10_000;
/// Least bytes of files that say something: blocks have 4 KiB.
const HEAVY_BYTES_MIN: u64 = 64 << 10;
/// A slot with more than this part of the bytes is always looked at.
const HEAVY_PART: u64 = 32;
/// The sample ends here whatever it lacks; then come the long slots, with as much time again.
const SAMPLE_ROWS_MAX: u64 = 1_000_000;
const SAMPLE_TIME_MAX: Duration = Duration::from_secs(1);
/// How long an estimate is answered again …
const KEPT_FOR: Duration = Duration::from_secs(5);
/// … if no more rows were written meanwhile than this part of the keys.
const KEPT_WRITES_PART: f64 = 20.0;
/// As chances for a random key the numbers stay good enough for longer.
const CHANCES_KEPT_FOR: Duration = Duration::from_secs(60);
const CHANCES_WRITES_PART: u64 = 4;

/// Rows by what they are; whole numbers where they were counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    pub keys: f64,
    /// Bytes of the rows of these keys.
    pub bytes: f64,
    pub expires: f64,
    /// Sum of what the keys that expire have left.
    pub time_to_live_ms: f64,
    pub expired: f64,
    pub tombstones: f64,
    pub flushed: f64,
}

impl Counts {
    fn note(&mut self, state: RowState, now_ms: u64) {
        match state {
            RowState::Alive { bytes, expires_at_ms } => {
                self.keys += 1.0;
                self.bytes += bytes as f64;
                if expires_at_ms != 0 {
                    self.expires += 1.0;
                    self.time_to_live_ms += expires_at_ms.saturating_sub(now_ms) as f64;
                }
            }
            RowState::Expired => self.expired += 1.0,
            RowState::Tombstone => self.tombstones += 1.0,
            RowState::Flushed => self.flushed += 1.0,
        }
    }

    fn add(&mut self, other: &Counts, times: f64) {
        self.keys += other.keys * times;
        self.bytes += other.bytes * times;
        self.expires += other.expires * times;
        self.time_to_live_ms += other.time_to_live_ms * times;
        self.expired += other.expired * times;
        self.tombstones += other.tombstones * times;
        self.flushed += other.flushed * times;
    }

    /// Mean time to live of the keys that expire.
    pub fn mean_time_to_live_ms(&self) -> f64 {
        if self.expires > 0.0 { self.time_to_live_ms / self.expires } else { 0.0 }
    }
}

/// How many rows there are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Census {
    pub counts: Counts,
    /// Whether every row was counted.
    pub exact: bool,
    /// Standard error of the number of keys, as far as the sampling of slots makes it.
    pub keys_error: f64,
    /// Keys of the slots that were looked at one by one: of all that have some, or of the long ones.
    pub keys_by_slot: Arc<[(u16, u64)]>,
}

/// What a random choice among keys goes by.
#[derive(Clone, Debug, Default)]
pub struct Chances {
    pub keys_by_slot: Arc<[(u16, u64)]>,
    /// Keys of all other slots together.
    pub other_keys: u64,
}

impl Census {
    pub fn chances(&self) -> Chances {
        let of_slots: u64 = self.keys_by_slot.iter().map(|(_, keys)| keys).sum();
        let other_keys = (self.counts.keys as u64).saturating_sub(of_slots);
        Chances { keys_by_slot: Arc::clone(&self.keys_by_slot), other_keys }
    }
}

fn range_of(first: u16, last: u16) -> Range<Vec<u8>> {
    start_of(first)..start_of(last + 1)
}

/// Counts the rows of the slots (ascending) that a shard owns.
pub fn take<S: Source>(
    source: &mut S,
    slots: &[u16],
    now_ms: u64,
    random: &mut fastrand::Rng,
) -> Result<Census, S::Error> {
    let mut whole = Counts::default();
    let mut begun = (0, Counts::default());
    let mut keys_by_slot = Vec::new();
    let mut rows = 0;
    source.seek(&start_of(0));
    loop {
        let Some((slot, state)) = source.row()? else {
            whole.add(&begun.1, 1.0);
            keys_by_slot.extend(slot_with_keys(&begun));
            return Ok(Census { counts: whole, exact: true, keys_error: 0.0, keys_by_slot: keys_by_slot.into() });
        };
        if slot != begun.0 {
            whole.add(&begun.1, 1.0);
            keys_by_slot.extend(slot_with_keys(&begun));
            begun = (slot, Counts::default());
        }
        if rows == COUNTED_ROWS_MAX || (whole.keys + begun.1.keys) as u64 == COUNTED_KEYS_MAX {
            break;
        }
        begun.1.note(state, now_ms);
        rows += 1;
        source.next();
    }
    let begun_at = source.key().unwrap_or_default().to_vec();
    let rest = &slots[slots.partition_point(|slot| *slot <= begun.0)..];
    let until = Instant::now() + SAMPLE_TIME_MAX;
    Sample { source, now_ms, random, rows: 0, until, scaled: false }.take(whole, begun, &begun_at, rest)
}

/// A slot and its keys, if it has some.
fn slot_with_keys((slot, counts): &(u16, Counts)) -> Option<(u16, u64)> {
    (counts.keys > 0.0).then_some((*slot, counts.keys as u64))
}

struct Sample<'s, S> {
    source: &'s mut S,
    now_ms: u64,
    random: &'s mut fastrand::Rng,
    rows: u64,
    until: Instant,
    /// Not everything that was looked at was counted.
    scaled: bool,
}

impl<S: Source> Sample<'_, S> {
    /// Completes a count: `whole` of the slots that were read, `begun` of the one that was being read up to `begun_at`.
    fn take(
        mut self,
        mut whole: Counts,
        (begun_slot, begun): (u16, Counts),
        begun_at: &[u8],
        rest: &[u16],
    ) -> Result<Census, S::Error> {
        self.source.write_out();
        let heavy = self.heavy_slots(rest);
        let mut light: Vec<u16> = rest.iter().copied().filter(|slot| !heavy.contains(slot)).collect();
        self.random.shuffle(&mut light);

        let (mut sum, mut squares, mut sampled) = (Counts::default(), 0.0, 0u64);
        for slot in &light {
            let enough = self.rows >= SAMPLED_ROWS && sampled >= SAMPLED_SLOTS_MIN;
            if enough || sampled > 0 && self.is_over() {
                break;
            }
            self.source.seek(&start_of(*slot));
            let counts = self.count_slot(*slot, Counts::default(), SAMPLED_SLOT_ROWS_MAX, SAMPLED_WAYS)?;
            sum.add(&counts, 1.0);
            squares += counts.keys * counts.keys;
            sampled += 1;
        }
        let (in_all, seen) = (light.len() as f64, sampled as f64);
        let mut keys_error = 0.0;
        if sampled > 0 {
            whole.add(&sum, in_all / seen);
            let variance = (squares - sum.keys * sum.keys / seen) / (seen - 1.0).max(1.0);
            keys_error = in_all * ((1.0 - seen / in_all) * variance.max(0.0) / seen).sqrt();
        }

        self.until = Instant::now() + SAMPLE_TIME_MAX;
        self.source.seek(begun_at);
        let mut long = vec![(begun_slot, self.count_slot(begun_slot, begun, HEAVY_SLOT_ROWS_MAX, WAYS)?)];
        for slot in heavy {
            self.source.seek(&start_of(slot));
            long.push((slot, self.count_slot(slot, Counts::default(), HEAVY_SLOT_ROWS_MAX, WAYS)?));
        }
        long.iter().for_each(|(_, counts)| whole.add(counts, 1.0));
        let exact = sampled as usize == light.len() && !self.scaled;
        let keys_by_slot = long.iter().filter_map(slot_with_keys).collect();
        Ok(Census { counts: whole, exact, keys_error, keys_by_slot })
    }

    fn is_over(&self) -> bool {
        self.rows >= SAMPLE_ROWS_MAX || Instant::now() >= self.until
    }

    /// Counts the rest of a slot from where the source stands, `counts` being what lies before; one of more rows is estimated.
    fn count_slot(&mut self, slot: u16, mut counts: Counts, rows_max: u64, ways: u32) -> Result<Counts, S::Error> {
        let mut rows = 0u64;
        while let Some((_, state)) = self.source.row()?.filter(|(at, _)| *at == slot) {
            if rows == rows_max {
                return self.estimate_slot(slot, ways);
            }
            counts.note(state, self.now_ms);
            rows += 1;
            self.source.next();
        }
        self.rows += rows;
        Ok(counts)
    }

    /// Estimates the rows of a slot by the tree of its keys.
    fn estimate_slot(&mut self, slot: u16, ways: u32) -> Result<Counts, S::Error> {
        self.scaled = true;
        let (mut branches, mut counts) = self.branches(slot)?;
        self.random.shuffle(&mut branches);
        let (mut found, mut looked_at) = (Counts::default(), 0u32);
        for branch in branches.iter().take(BRANCHES_LOOKED_AT_MAX) {
            if looked_at >= BRANCHES_LOOKED_AT_MIN && Instant::now() >= self.until {
                break;
            }
            for way in 1..=ways {
                let (rows, times) = self.descend(branch.clone())?;
                if times == 1.0 {
                    // The whole branch was read.
                    found.add(&rows, f64::from(ways - way + 1) / f64::from(ways));
                    break;
                }
                found.add(&rows, 1.0 / f64::from(ways));
            }
            looked_at += 1;
        }
        counts.add(&found, branches.len() as f64 / f64::from(looked_at.max(1)));
        Ok(counts)
    }

    /// Prefixes that the keys of a slot begin with, and what is known of the keys that are shorter.
    fn branches(&mut self, slot: u16) -> Result<(Vec<Vec<u8>>, Counts), S::Error> {
        let mut counts = Counts::default();
        let mut branches = vec![start_of(slot)];
        let mut depth = 0;
        while (1..BRANCHES_MIN).contains(&branches.len()) && depth < DEPTH_MAX {
            let mut longer = Vec::new();
            for branch in branches {
                for child in children(self.source, &branch)? {
                    match child {
                        Child::Itself => self.note_one(&branch, &mut counts)?,
                        Child::Byte(byte) => longer.push([branch.as_slice(), &[byte]].concat()),
                    }
                }
            }
            branches = longer;
            depth += 1;
        }
        Ok((branches, counts))
    }

    fn note_one(&mut self, key: &[u8], counts: &mut Counts) -> Result<(), S::Error> {
        self.source.seek(key);
        if let Some((_, state)) = self.source.row()? {
            counts.note(state, self.now_ms);
        }
        Ok(())
    }

    /// Goes down from a prefix by a random way: the rows below if all ways are like it, and how many ways there are then.
    fn descend(&mut self, mut prefix: Vec<u8>) -> Result<(Counts, f64), S::Error> {
        let depth_max = prefix.len() + DEPTH_MAX;
        let mut times = 1.0;
        let mut found = Counts::default();
        loop {
            let rows_max = if prefix.len() < depth_max { LEAF_ROWS } else { DEEP_LEAF_ROWS };
            let mut counts = Counts::default();
            self.source.seek(&prefix);
            let mut rows = 0;
            while rows < rows_max && self.source.is_below(&prefix) {
                if let Some((_, state)) = self.source.row()? {
                    counts.note(state, self.now_ms);
                }
                rows += 1;
                self.source.next();
            }
            self.rows += rows;
            if prefix.len() >= depth_max || !self.source.is_below(&prefix) {
                found.add(&counts, times);
                return Ok((found, times));
            }
            // Down to the next fork.
            loop {
                let mut bytes = Vec::new();
                for child in children(self.source, &prefix)? {
                    match child {
                        // A key that others begin with is no way, but on all ways behind it.
                        Child::Itself => {
                            let mut itself = Counts::default();
                            self.note_one(&prefix, &mut itself)?;
                            found.add(&itself, times);
                        }
                        Child::Byte(byte) => bytes.push(byte),
                    }
                }
                let Some(byte) = self.random.choice(bytes.iter()) else { return Ok((found, times)) };
                prefix.push(*byte);
                times *= bytes.len() as f64;
                if bytes.len() > 1 || prefix.len() >= depth_max {
                    break;
                }
            }
        }
    }

    /// Slots that have more than their part of the bytes: halves the slots and goes on with the halves that have so much.
    fn heavy_slots(&self, slots: &[u16]) -> Vec<u16> {
        let range = |part: &Range<usize>| range_of(slots[part.start], slots[part.end - 1]);
        let mut parts: Vec<Range<usize>> = std::iter::once(0..slots.len()).filter(|all| !all.is_empty()).collect();
        let heavy_bytes =
            self.source.bytes(&parts.iter().map(range).collect::<Vec<_>>()).iter().sum::<u64>() / HEAVY_PART;
        if heavy_bytes < HEAVY_BYTES_MIN {
            return Vec::new();
        }
        while parts.iter().any(|part| part.len() > 1) {
            let halves = parts.iter().flat_map(|part| {
                let middle = part.start + part.len() / 2;
                [part.start..middle, middle..part.end]
            });
            let halves: Vec<Range<usize>> = halves.filter(|half| !half.is_empty()).collect();
            let bytes = self.source.bytes(&halves.iter().map(range).collect::<Vec<_>>());
            parts =
                halves.into_iter().zip(bytes).filter(|(_, bytes)| *bytes > heavy_bytes).map(|(half, _)| half).collect();
        }
        parts.iter().map(|part| slots[part.start]).collect()
    }
}

/// The last census of a shard, for as long as it may be answered again: polls shall cost little.
#[derive(Debug, Default)]
pub struct Kept(Mutex<Option<KeptCensus>>);

#[derive(Debug)]
struct KeptCensus {
    census: Census,
    at: Moment,
    taken: Instant,
}

/// What a count depends on beside the rows themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The database's number of its last write.
    pub sequence: u64,
    pub flush_ns: u64,
    /// Which slots are counted, by the version of what the shard owns.
    pub ownership: u64,
}

impl Moment {
    /// Whether nothing but single writes lies between the two.
    fn counts_the_same(self, other: Self) -> bool {
        (self.flush_ns, self.ownership) == (other.flush_ns, other.ownership)
    }
}

impl Kept {
    /// The census of before, if it is still one: an exact one when nothing can have changed, an estimate for a while.
    pub fn get(&self, at: Moment, now: Instant) -> Option<Census> {
        let kept = self.0.lock();
        let kept = kept.as_ref()?;
        let writes = at.sequence.saturating_sub(kept.at.sequence);
        let is_valid = if kept.census.exact {
            writes == 0 && kept.census.counts.expires == 0.0
        } else {
            now.saturating_duration_since(kept.taken) < KEPT_FOR
                && writes as f64 * KEPT_WRITES_PART <= kept.census.counts.keys
        };
        (is_valid && kept.at.counts_the_same(at)).then(|| kept.census.clone())
    }

    /// Keys of slots for a random choice among them, as they were a while ago.
    pub fn chances(&self, at: Moment, now: Instant) -> Option<Chances> {
        let kept = self.0.lock();
        let kept = kept.as_ref()?;
        let writes = at.sequence.saturating_sub(kept.at.sequence);
        let is_recent = now.saturating_duration_since(kept.taken) < CHANCES_KEPT_FOR
            && kept.at.counts_the_same(at)
            && writes * CHANCES_WRITES_PART <= kept.census.counts.keys as u64;
        is_recent.then(|| kept.census.chances())
    }

    /// Keeps a census that was begun at this moment.
    pub fn put(&self, census: Census, at: Moment, taken: Instant) {
        *self.0.lock() = Some(KeptCensus { census, at, taken });
    }
}

const _: () = assert!(SLOT_COUNT < u16::MAX, "the slot behind the last one has a number");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    const ROW_BYTES: u64 = 100;

    /// Slots of so many rows each; every `dead_every`-th row is a tombstone.
    struct Model {
        rows: Vec<u64>,
        /// Rows of the slots before.
        before: Vec<u64>,
        dead_every: u64,
        /// What files say of a row: 0 while all is in memory.
        file_bytes: u64,
        at: u64,
        key: Option<Vec<u8>>,
        looked_at: std::cell::Cell<u64>,
    }

    impl Model {
        fn new(rows: Vec<u64>, dead_every: u64, file_bytes: u64) -> Self {
            let mut sum = 0;
            let mut before = vec![0];
            for rows in &rows {
                sum += rows;
                before.push(sum);
            }
            Self { rows, before, dead_every, file_bytes, at: 0, key: None, looked_at: Default::default() }
        }

        fn slot(&self) -> Option<usize> {
            let slot = self.before.partition_point(|before| *before <= self.at) - 1;
            (self.at < self.before[self.rows.len()]).then_some(slot)
        }

        fn place(&self, key: &[u8]) -> u64 {
            let slot = usize::from(u16::from_be_bytes(*key.first_chunk().unwrap()));
            if slot >= self.rows.len() {
                return self.before[self.rows.len()];
            }
            let mut within = [0; 8];
            within.iter_mut().zip(key.iter().skip(2)).for_each(|(to, from)| *to = *from);
            // A longer key stands behind the one that it begins with.
            let within = u64::from_be_bytes(within).saturating_add(u64::from(key.len() > 10));
            self.before[slot] + within.min(self.rows[slot])
        }

        fn key_here(&self, slot: usize) -> Vec<u8> {
            [&(slot as u16).to_be_bytes()[..], &(self.at - self.before[slot]).to_be_bytes()].concat()
        }

        fn keys(&self) -> u64 {
            let rows = self.before[self.rows.len()];
            rows - rows.div_ceil(self.dead_every)
        }

        fn census(&mut self, seed: u64) -> Census {
            let slots: Vec<u16> = (0..self.rows.len() as u16).collect();
            let Ok(census) = take(self, &slots, 0, &mut fastrand::Rng::with_seed(seed));
            census
        }
    }

    impl Source for Model {
        type Error = Infallible;

        fn seek(&mut self, key: &[u8]) {
            self.at = self.place(key);
            self.key = self.slot().map(|slot| self.key_here(slot));
        }

        fn next(&mut self) {
            self.at += 1;
            self.key = self.slot().map(|slot| self.key_here(slot));
        }

        fn row(&self) -> Result<Option<(u16, RowState)>, Infallible> {
            self.looked_at.set(self.looked_at.get() + 1);
            Ok(self.slot().map(|slot| {
                let is_dead = self.at.is_multiple_of(self.dead_every);
                let alive = RowState::Alive { bytes: ROW_BYTES, expires_at_ms: 0 };
                (slot as u16, if is_dead { RowState::Tombstone } else { alive })
            }))
        }

        fn key(&self) -> Option<&[u8]> {
            self.key.as_deref()
        }

        fn write_out(&mut self) {}

        fn bytes(&self, ranges: &[Range<Vec<u8>>]) -> Vec<u64> {
            ranges.iter().map(|range| (self.place(&range.end) - self.place(&range.start)) * self.file_bytes).collect()
        }
    }

    /// Rows of each slot: hashed keys, and some tags with many.
    fn slots(random: &mut fastrand::Rng, keys: u64, tags: &[u64]) -> Vec<u64> {
        let mut rows = vec![0; usize::from(SLOT_COUNT)];
        (0..keys).for_each(|_| rows[random.usize(..usize::from(SLOT_COUNT))] += 1);
        for tag in tags {
            rows[random.usize(..usize::from(SLOT_COUNT))] += tag;
        }
        rows
    }

    #[test]
    fn up_to_100_000_keys_every_one_is_counted() {
        for (keys, dead_every) in [(0, 2), (1000, 3), (100_000, u64::MAX - 1)] {
            let mut model = Model::new(slots(&mut fastrand::Rng::with_seed(1), keys, &[]), dead_every, ROW_BYTES);
            let census = model.census(1);
            assert_eq!((census.counts.keys as u64, census.exact, census.keys_error), (model.keys(), true, 0.0));
            assert_eq!(census.counts.bytes, census.counts.keys * ROW_BYTES as f64);
        }
        // What the sample covers is counted as well.
        let mut model = Model::new(slots(&mut fastrand::Rng::with_seed(1), 150_000, &[]), 2, ROW_BYTES);
        let census = model.census(1);
        assert_eq!((census.counts.keys as u64, census.exact), (model.keys(), true));
        assert_eq!(census.counts.tombstones, 75_000.0);
    }

    #[test]
    fn hashed_keys_are_estimated_within_a_few_per_cent_and_most_rows_are_not_read() {
        let mut model = Model::new(slots(&mut fastrand::Rng::with_seed(2), 3_000_000, &[]), 1000, ROW_BYTES);
        let census = model.census(3);
        let (keys, truth) = (census.counts.keys, model.keys() as f64);
        assert!(!census.exact && (keys - truth).abs() < 0.03 * truth, "{keys} of {truth}");
        assert!(census.keys_error > 0.0 && census.keys_error < 0.01 * truth, "{}", census.keys_error);
        assert!(model.looked_at.get() < 300_000, "{} rows were read", model.looked_at.get());
    }

    #[test]
    fn one_slot_with_nearly_all_rows_is_neither_missed_nor_read_to_its_end() {
        for slot in [0, 5_000, 16_383] {
            let mut rows = slots(&mut fastrand::Rng::with_seed(4), 150_000, &[]);
            rows[slot] = 20_000_000;
            let mut model = Model::new(rows, 1000, ROW_BYTES);
            let census = model.census(5);
            let (keys, truth) = (census.counts.keys, model.keys() as f64);
            assert!((keys - truth).abs() < 0.03 * truth, "slot {slot}: {keys} of {truth}");
            assert!(model.looked_at.get() < 500_000, "{} rows were read", model.looked_at.get());
        }
    }

    #[test]
    fn a_long_slot_where_the_count_stops_is_estimated_though_no_file_has_it_yet() {
        let mut rows = slots(&mut fastrand::Rng::with_seed(6), 50_000, &[]);
        rows[0] = 10_000_000;
        let mut model = Model::new(rows, 1000, 0);
        let census = model.census(7);
        let (keys, truth) = (census.counts.keys, model.keys() as f64);
        assert!(!census.exact && (keys - truth).abs() < 0.05 * truth, "{keys} of {truth}");
        assert!(model.looked_at.get() < 500_000, "{} rows were read", model.looked_at.get());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn whatever_tags_make_of_the_slots_the_estimate_is_near(
            seed in any::<u64>(),
            keys in 0u64..400_000,
            tags in prop::collection::vec(1u64..2_000_000, 0..8),
            dead_every in 2u64..50,
        ) {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut model = Model::new(slots(&mut random, keys, &tags), dead_every, ROW_BYTES);
            let census = model.census(seed);
            let (found, truth) = (census.counts.keys, model.keys() as f64);
            let bound = if census.exact { 0.5 } else { 0.05 * truth + 6.0 * census.keys_error };
            prop_assert!((found - truth).abs() <= bound, "{} of {}, error {}", found, truth, census.keys_error);
        }
    }

    #[test]
    fn a_census_is_answered_again_only_while_it_is_true_enough() {
        let kept = Kept::default();
        let (at, now) = (Moment { sequence: 1000, flush_ns: 5, ownership: 1 }, Instant::now());
        assert_eq!(kept.get(at, now), None);
        let counts = Counts { keys: 200_000.0, ..Counts::default() };
        let estimate = Census { counts, keys_error: 100.0, ..Census::default() };
        kept.put(estimate.clone(), at, now);
        assert_eq!(kept.get(at, now + KEPT_FOR / 2), Some(estimate.clone()));
        assert_eq!(kept.get(at, now + KEPT_FOR), None, "too old");
        assert_eq!(kept.get(Moment { sequence: 11_000, ..at }, now), Some(estimate.clone()));
        assert_eq!(kept.get(Moment { sequence: 11_001, ..at }, now), None, "more than 5 % were written");
        assert_eq!(kept.get(Moment { flush_ns: 6, ..at }, now), None, "flushed");
        assert_eq!(kept.get(Moment { ownership: 2, ..at }, now), None, "of other slots");
        let exact = Census { exact: true, ..estimate };
        kept.put(exact.clone(), at, now);
        assert_eq!(kept.get(at, now + 10 * KEPT_FOR), Some(exact.clone()));
        assert_eq!(kept.get(Moment { sequence: 1001, ..at }, now), None, "one write is one too many");
        kept.put(Census { counts: Counts { expires: 1.0, ..counts }, ..exact }, at, now);
        assert_eq!(kept.get(at, now), None, "a key may have expired");
    }
}
