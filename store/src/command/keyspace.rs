//! Commands on all keys of a shard. They walk the rows on disk and run in the blocking lane.

use super::census::{self, Census};
use super::cursor::{Cursor, Order, key_hash};
use super::glob::{self, Pattern};
use super::random;
use super::source::{RowState, Source};
use crate::shard::context::{Context, Failure};
use crate::shard::view::{ShardView, Walk};
use std::ops::Range;
use std::time::{Duration, Instant};
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};
use vasto_proto::key::{decode_key, encode_key_of_slot_into};
use vasto_proto::row::RowKind;
use vasto_proto::slot::{SLOT_COUNT, hash_tag, slot_of};

const PATTERN_TOO_LONG: CommandError = CommandError::fixed("ERR pattern is longer than 1 MiB");
const TOO_MANY_KEYS: CommandError =
    CommandError::fixed("ERR the keys of one shard that match fill more than 512 MiB, walk them with SCAN");

/// A page of SCAN ends after this time, which a client waits and a lane thread is busy…
const PAGE_TIME: Duration = Duration::from_millis(20);
/// … and when its keys have this many bytes, whatever COUNT says.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// A page in hash order reads its whole slot, so it returns at least that many keys if they are there.
const HASH_PAGE_KEYS_MIN: usize = 1000;
/// Rows between two looks at the clock: 64 rows take some 50 µs.
const ROWS_PER_CLOCK_READING: usize = 64;
/// Jumps over rows that cannot match between two looks at the clock: each is a seek of some 10 µs.
const JUMPS_PER_CLOCK_READING: usize = 64;
/// An answer must stay far below the 4 GiB that its length can say.
const KEYS_BYTES_MAX: usize = 512 << 20;

/// Which keys a walk is after.
#[derive(Default)]
struct Filter {
    pattern: Option<Pattern>,
    /// Every matching key starts with it…
    prefix: Vec<u8>,
    /// … and lies in this slot, if the prefix decides that.
    slot: Option<u16>,
    /// No key has the wanted type.
    nothing: bool,
}

impl Filter {
    /// An empty type means any.
    fn new(pattern: &[u8], kind: &[u8]) -> Result<Self, CommandError> {
        let nothing = !(kind.is_empty() || kind.eq_ignore_ascii_case(b"string"));
        if pattern == b"*" {
            return Ok(Self { nothing, ..Self::default() });
        }
        let compiled = Pattern::new(pattern).ok_or(PATTERN_TOO_LONG)?;
        let prefix = glob::literal_prefix(pattern);
        // The tag of every matching key is known if its braces lie in the prefix.
        let has_tag = hash_tag(&prefix).len() != prefix.len();
        let slot = (has_tag || compiled.is_literal()).then(|| slot_of(&prefix));
        Ok(Self { pattern: Some(compiled), prefix, slot, nothing })
    }

    fn matches(&self, key: &[u8]) -> bool {
        !self.nothing && self.pattern.as_ref().is_none_or(|pattern| pattern.matches(key))
    }
}

fn physical_key(slot: u16, key: &[u8]) -> Vec<u8> {
    let mut physical = Vec::with_capacity(2 + key.len());
    encode_key_of_slot_into(&mut physical, slot, key);
    physical
}

/// Where a walk stands.
struct Place<'w> {
    slot: u16,
    key: &'w [u8],
    /// Whether a client sees the row.
    alive: bool,
}

/// Walks the rows of a range of slots that can match a filter; jumps over what cannot.
struct Rows<'a> {
    view: &'a ShardView<'a>,
    walk: Walk<'a>,
    filter: &'a Filter,
    last_slot: u16,
}

impl<'a> Rows<'a> {
    fn new(view: &'a ShardView<'a>, filter: &'a Filter, last_slot: u16) -> Self {
        Self { view, walk: view.walk(), filter, last_slot }
    }

    /// Goes to the first row that can match, from the start of a slot on.
    fn seek_slot(&mut self, slot: u16) {
        self.walk.seek(&physical_key(slot, &self.filter.prefix));
        self.settle();
    }

    fn next(&mut self) {
        self.walk.next();
        self.settle();
    }

    /// Jumps over rows that cannot match; every jump goes forward. Many jumps end at a row that cannot match, so that the caller may look at the clock.
    fn settle(&mut self) {
        for _ in 0..JUMPS_PER_CLOCK_READING {
            let Some((slot, key)) = self.walk.key().and_then(decode_key) else { return };
            let prefix = &self.filter.prefix;
            let wanted_slot = self.filter.slot.unwrap_or(slot);
            let target = if slot < wanted_slot {
                wanted_slot
            } else if slot > wanted_slot || slot > self.last_slot || key.starts_with(prefix) {
                return;
            } else if key < prefix.as_slice() {
                slot
            } else {
                slot + 1
            };
            if target > self.last_slot {
                return self.walk.seek(&physical_key(target, b""));
            }
            self.walk.seek(&physical_key(target, prefix));
        }
    }

    /// The row here; `None` behind the last slot.
    fn place(&self) -> Result<Option<Place<'_>>, Failure> {
        let Some((slot, key)) = self.walk.key().and_then(decode_key) else {
            self.walk.status()?;
            return Ok(None);
        };
        if slot > self.last_slot || self.filter.slot.is_some_and(|wanted| slot > wanted) {
            return Ok(None);
        }
        let header = self.walk.row()?.map(|(header, _)| header);
        let alive = header.is_some_and(|header| self.view.is_alive(&header));
        Ok(Some(Place { slot, key, alive }))
    }

    /// Goes behind the key that a cursor in key order stands for; false if no row, dead or alive, has its hash.
    fn seek_behind(&mut self, slot: u16, hash: u64) -> Result<bool, Failure> {
        let is = |physical: &[u8]| decode_key(physical).is_some_and(|(at, key)| at == slot && key_hash(key) == hash);
        if let Some(place) = self.view.find_place(hash).filter(|place| is(place)) {
            self.walk.seek(&place);
            if self.walk.key() == Some(&place) {
                self.walk.next();
            }
            self.settle();
            return Ok(true);
        }
        self.walk.seek(&physical_key(slot, b""));
        while let Some((at, key)) = self.walk.key().and_then(decode_key) {
            if at != slot {
                return Ok(false);
            }
            if key_hash(key) == hash {
                self.next();
                return Ok(true);
            }
            self.walk.next();
        }
        self.walk.status()?;
        Ok(false)
    }
}

/// One page of a walk.
struct Page {
    /// `None`: the walk passed the last slot.
    next: Option<Cursor>,
    keys: Vec<Vec<u8>>,
}

fn page(view: &ShardView<'_>, cursor: Cursor, last_slot: u16, count: usize, filter: &Filter) -> Result<Page, Failure> {
    let mut rows = Rows::new(view, filter, last_slot);
    match (cursor.order, cursor.hash) {
        (Order::Key, 0) => rows.seek_slot(cursor.slot),
        (Order::Key, hash) => {
            if cursor.slot <= last_slot && !rows.seek_behind(cursor.slot, hash)? {
                return hash_page(rows, cursor.slot, 0, count);
            }
        }
        (Order::Hash, hash) => return hash_page(rows, cursor.slot, hash, count),
    }
    key_page(rows, count)
}

/// A page in the order of keys, from where the rows stand.
fn key_page(mut rows: Rows<'_>, count: usize) -> Result<Page, Failure> {
    let started = Instant::now();
    let (mut keys, mut bytes, mut visited, mut counted) = (Vec::new(), 0, 0usize, 0);
    loop {
        let Some(place) = rows.place()? else { return Ok(Page { next: None, keys }) };
        let (slot, hash_of_last) = (place.slot, key_hash(place.key));
        visited += 1;
        let in_reach = place.key.starts_with(&rows.filter.prefix);
        if place.alive && in_reach {
            counted += 1;
            if rows.filter.matches(place.key) {
                bytes += place.key.len();
                keys.push(place.key.to_vec());
            }
        }
        let looks = !in_reach || visited.is_multiple_of(ROWS_PER_CLOCK_READING);
        let late = looks && started.elapsed() >= PAGE_TIME;
        if counted < count && bytes < PAGE_BYTES_MAX && !late {
            rows.next();
            continue;
        }
        let last = physical_key(slot, place.key);
        rows.next();
        let next = match rows.place()? {
            None => None,
            Some(place) if place.slot != slot => Some(Cursor::start_of(place.slot)),
            Some(_) => {
                rows.view.remember_place(hash_of_last, &last);
                Some(Cursor { slot, order: Order::Key, hash: hash_of_last })
            }
        };
        return Ok(Page { next, keys });
    }
}

/// The keys of smallest hash above one hash: those that a page has room for.
struct SmallestHashes {
    above: u64,
    /// Once something had no room: nothing above it has.
    up_to: u64,
    count: usize,
    entries: Vec<(u64, Vec<u8>)>,
    bytes: usize,
}

impl SmallestHashes {
    fn offer(&mut self, key: &[u8]) {
        let hash = key_hash(key);
        if hash <= self.above || hash > self.up_to {
            return;
        }
        self.bytes += key.len();
        self.entries.push((hash, key.to_vec()));
        if self.entries.len() >= 2 * self.count || self.bytes >= 2 * PAGE_BYTES_MAX {
            self.prune();
        }
    }

    /// Keeps what fits into a page; keys of one hash stay together, since a cursor cannot stand between them.
    fn prune(&mut self) {
        self.entries.sort_unstable();
        let mut bytes = 0;
        let mut kept = 0;
        for (index, (hash, key)) in self.entries.iter().enumerate() {
            let tied = index > 0 && self.entries[index - 1].0 == *hash;
            if !tied && (index >= self.count || bytes >= PAGE_BYTES_MAX) {
                break;
            }
            bytes += key.len();
            kept = index + 1;
        }
        if kept < self.entries.len() {
            self.up_to = self.entries[kept - 1].0;
            self.entries.truncate(kept);
        }
        self.bytes = bytes;
    }
}

/// A page in the order of hashes: every key of the slot that is there during the whole walk has its turn, whatever comes and goes.
fn hash_page(mut rows: Rows<'_>, slot: u16, above: u64, count: usize) -> Result<Page, Failure> {
    let count = count.max(HASH_PAGE_KEYS_MIN);
    let mut smallest = SmallestHashes { above, up_to: u64::MAX, count, entries: Vec::new(), bytes: 0 };
    if slot <= rows.last_slot {
        rows.seek_slot(slot);
    }
    while let Some(place) = rows.place()?.filter(|place| place.slot == slot) {
        if place.alive && rows.filter.matches(place.key) {
            smallest.offer(place.key);
        }
        rows.next();
    }
    smallest.prune();
    let next = if smallest.up_to < u64::MAX {
        Some(Cursor { slot, order: Order::Hash, hash: smallest.up_to })
    } else {
        (slot < rows.last_slot).then(|| Cursor::start_of(slot + 1))
    };
    Ok(Page { next, keys: smallest.entries.into_iter().map(|(_, key)| key).collect() })
}

/// `_scan cursor last-slot count pattern type`
pub fn scan(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let number = u64::try_from(args.integer()?).map_err(|_| error::INVALID_CURSOR)?;
    let cursor = Cursor::decode(number).ok_or(error::INVALID_CURSOR)?;
    let last_slot = u16::try_from(args.integer()?).map_err(|_| error::SYNTAX)?.min(SLOT_COUNT - 1);
    let count = usize::try_from(args.integer()?.max(1)).unwrap_or(usize::MAX / 2);
    let (pattern, kind) = (args.bytes()?, args.bytes()?);
    let filter = Filter::new(if pattern.is_empty() { b"*" } else { pattern }, kind)?;
    let page = if filter.nothing {
        Page { next: None, keys: Vec::new() }
    } else {
        page(&context.shard(), cursor, last_slot, count, &filter)?
    };
    let next = page.next.map_or(-1, |cursor| i64::try_from(cursor.encode()).expect("a cursor has 53 bits"));
    let mut reply = context.reply();
    reply.array(2);
    reply.integer(next);
    reply.array(page.keys.len());
    page.keys.iter().for_each(|key| reply.bulk(key));
    Ok(())
}

/// KEYS pattern
pub fn keys(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let filter = Filter::new(args.bytes()?, b"")?;
    let mut keys = Vec::new();
    {
        let view = context.shard();
        let mut rows = Rows::new(&view, &filter, SLOT_COUNT - 1);
        let mut bytes = 0;
        rows.seek_slot(0);
        while let Some(place) = rows.place()? {
            if place.alive && filter.matches(place.key) {
                bytes += place.key.len();
                if bytes > KEYS_BYTES_MAX {
                    return Err(TOO_MANY_KEYS.into());
                }
                keys.push(place.key.to_vec());
            }
            rows.next();
        }
    }
    let mut reply = context.reply();
    reply.array(keys.len());
    keys.iter().for_each(|key| reply.bulk(key));
    Ok(())
}

/// Rows that no file has are written out before a sample by bytes if they are more than this part of all.
const MEMORY_PART: u64 = 16;

/// A shard's rows, for those who count them or choose among them.
struct ShardRows<'a> {
    view: &'a ShardView<'a>,
    walk: Walk<'a>,
}

impl Source for ShardRows<'_> {
    type Error = Failure;

    fn seek(&mut self, physical_key: &[u8]) {
        self.walk.seek(physical_key);
    }

    fn next(&mut self) {
        self.walk.next();
    }

    fn row(&self) -> Result<Option<(u16, RowState)>, Failure> {
        let Some(physical) = self.walk.key() else {
            self.walk.status()?;
            return Ok(None);
        };
        let (Some((slot, _)), Some((header, value))) = (decode_key(physical), self.walk.row()?) else {
            return Ok(None);
        };
        let state = if self.view.is_alive(&header) {
            let bytes = (physical.len() + header.encoded_bytes() + value.len()) as u64;
            RowState::Alive { bytes, expires_at_ms: header.expires_at_ms }
        } else if self.view.is_flushed(&header) {
            RowState::Flushed
        } else {
            match header.kind {
                RowKind::Tombstone => RowState::Tombstone,
                RowKind::String => RowState::Expired,
            }
        };
        Ok(Some((slot, state)))
    }

    fn key(&self) -> Option<&[u8]> {
        self.walk.key()
    }

    fn write_out(&mut self) {
        if self.view.memory_rows() * MEMORY_PART > self.view.estimate_keys() {
            self.view.write_out();
        }
    }

    fn bytes(&self, ranges: &[Range<Vec<u8>>]) -> Vec<u64> {
        self.view.bytes_between(ranges)
    }
}

/// How many rows there are; what was found a moment ago where that still holds.
fn census(view: &ShardView<'_>, now_ms: u64) -> Result<Census, Failure> {
    // Before the walk: a write in between makes the count one that is not answered again.
    let (moment, now) = (view.moment(), Instant::now());
    let has_own_writes = view.has_own_writes();
    if let Some(kept) = view.kept_census().get(moment, now).filter(|_| !has_own_writes) {
        return Ok(kept);
    }
    let mut source = ShardRows { view, walk: view.walk() };
    let census = census::take(&mut source, view.slots(), now_ms, &mut fastrand::Rng::new())?;
    if !has_own_writes {
        view.kept_census().put(census.clone(), moment, now);
    }
    Ok(census)
}

fn figure(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A figure that may be an estimate.
fn rounded(value: f64) -> u64 {
    value.round() as u64
}

/// DBSIZE
pub fn dbsize(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    let census = census(&context.shard(), context.now_ms())?;
    context.reply().integer(figure(rounded(census.counts.keys)));
    Ok(())
}

/// RANDOMKEY
pub fn randomkey(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    let key = {
        let view = context.shard();
        let chances = match view.kept_census().chances(view.moment(), Instant::now()) {
            Some(kept) => kept,
            None => census(&view, context.now_ms())?.chances(),
        };
        random::physical_key(&mut ShardRows { view: &view, walk: view.walk() }, view.slots(), &chances)?
    };
    match key.as_deref().and_then(random::user_key) {
        Some(key) => context.reply().bulk(key),
        None => context.reply().null(),
    }
    Ok(())
}

/// FLUSHDB [ASYNC | SYNC], FLUSHALL [ASYNC | SYNC]: both are at once here.
pub fn flush(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let _ = args.option("ASYNC") || args.option("SYNC");
    args.end()?;
    context.flush()?;
    context.reply().ok();
    Ok(())
}

/// `_stats [NOKEYS]`: figures of the shard and, beginning with `store_`, of its store; NOKEYS leaves out what takes a walk.
pub fn stats(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let counts_keys = !args.option("NOKEYS");
    args.end()?;
    let mut figures: Vec<(&str, u64)> = Vec::new();
    {
        let view = context.shard();
        if counts_keys {
            let census = census(&view, context.now_ms())?;
            let counts = census.counts;
            figures.extend([
                ("keys", rounded(counts.keys)),
                ("keys_exact", u64::from(census.exact)),
                ("keys_error", rounded(census.keys_error)),
                ("expires", rounded(counts.expires)),
                ("avg_ttl", rounded(counts.mean_time_to_live_ms())),
                ("row_bytes", rounded(counts.bytes)),
                ("expired", rounded(counts.expired)),
                ("tombstones", rounded(counts.tombstones)),
                ("flushed", rounded(counts.flushed)),
            ]);
        }
        let durability = view.durability();
        figures.extend([
            ("rows_estimate", view.estimate_keys()),
            ("disk_bytes", view.disk_bytes()),
            ("memtable_bytes", view.memtable_bytes()),
            ("shards_read_only", u64::from(view.is_read_only())),
            ("rows_expired_by_compaction", view.rows_expired_by_compaction()),
            ("tombstones_dropped", view.tombstones_dropped()),
            ("unsynced_ms", durability.lag.map_or(0, |lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX))),
            ("syncs", durability.syncs),
            ("slow_syncs", durability.slow_syncs),
            ("held_batches", durability.held_batches_now),
        ]);
    }
    figures.extend([
        ("store_row_cache_bytes", context.row_cache_bytes()),
        ("store_block_cache_bytes", context.shard().block_cache_bytes()),
    ]);
    let mut reply = context.reply();
    reply.array(1);
    reply.map(figures.len());
    for (name, value) in figures {
        reply.bulk(name.as_bytes());
        reply.integer(figure(value));
    }
    Ok(())
}

/// `_compact`
pub fn compact(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    context.shard().compact();
    context.reply().ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::script::{Script, bulks, text};
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};
    use vasto_proto::command::Reply;
    use vasto_proto::command::table::StoreCommand;

    /// Pages by what they were asked: a walk that does not end fails the test.
    const PAGES_MAX: usize = 20_000;

    fn page_of(script: &mut Script, cursor: i64, last_slot: u16, count: usize, pattern: &str) -> (i64, Vec<Vec<u8>>) {
        let [cursor, last_slot, count] = [cursor.to_string(), last_slot.to_string(), count.to_string()];
        let arguments: [&[u8]; 5] =
            [cursor.as_bytes(), last_slot.as_bytes(), count.as_bytes(), pattern.as_bytes(), b""];
        let reply = script.ask(StoreCommand::InternalScan, &arguments);
        let mut reply = reply.as_slice();
        assert_eq!(Reply::take(&mut reply), Some(Reply::Array(2)));
        let Some(Reply::Integer(next)) = Reply::take(&mut reply) else { panic!("no cursor") };
        (next, bulks(&mut reply).into_iter().map(<[u8]>::to_vec).collect())
    }

    /// Walks all slots; how often each key was returned. `between` runs after each page.
    fn walk(
        script: &mut Script,
        count: usize,
        pattern: &str,
        mut between: impl FnMut(&mut Script),
    ) -> BTreeMap<Vec<u8>, usize> {
        let mut found = BTreeMap::new();
        let mut cursor = 0;
        for _ in 0..PAGES_MAX {
            let (next, keys) = page_of(script, cursor, SLOT_COUNT - 1, count, pattern);
            keys.into_iter().for_each(|key| *found.entry(key).or_default() += 1);
            if next == -1 {
                return found;
            }
            cursor = next;
            between(script);
        }
        panic!("the walk does not end");
    }

    fn set_all(script: &mut Script, keys: impl IntoIterator<Item = String>) -> BTreeSet<Vec<u8>> {
        let keys: BTreeSet<Vec<u8>> = keys.into_iter().map(String::into_bytes).collect();
        for chunk in keys.iter().collect::<Vec<_>>().chunks(100) {
            let pairs: Vec<&[u8]> = chunk.iter().flat_map(|key| [key.as_slice(), b"v"]).collect();
            script.ask(StoreCommand::Mset, &pairs);
        }
        keys
    }

    #[test]
    fn a_walk_returns_every_key_once_whatever_the_count() {
        let mut script = Script::new();
        let keys =
            set_all(&mut script, (0..300).map(|n| format!("k{n}")).chain((0..100).map(|n| format!("{{tag}}{n}"))));
        for count in [1, 3, 10, 1000] {
            let found = walk(&mut script, count, "", |_| {});
            assert!(found.values().all(|times| *times == 1), "count {count}");
            assert_eq!(found.into_keys().collect::<BTreeSet<_>>(), keys, "count {count}");
        }
    }

    #[test]
    fn patterns_choose_among_keys_wherever_they_seek() {
        let mut script = Script::new();
        let all = set_all(
            &mut script,
            (0..50).flat_map(|n| {
                [format!("a{n}"), format!("ab{n}"), format!("{{t}}a{n}"), format!("x{{t}}{n}"), format!("z{n}")]
            }),
        );
        for pattern in
            ["*", "a*", "ab*", "ab1?", "ab7", "{t}*", "{t}a1*", "x{t}*", "{*", "*7", "nothing*", "[xz]*", "a\\b*"]
        {
            let compiled = Pattern::new(pattern.as_bytes()).unwrap();
            let expected: BTreeSet<Vec<u8>> = all.iter().filter(|key| compiled.matches(key)).cloned().collect();
            for count in [1, 7, 1000] {
                let found = walk(&mut script, count, pattern, |_| {});
                assert!(found.values().all(|times| *times == 1), "{pattern}");
                assert_eq!(found.into_keys().collect::<BTreeSet<_>>(), expected, "{pattern}");
            }
            let reply = script.ask(StoreCommand::Keys, &[pattern.as_bytes()]);
            let found: BTreeSet<Vec<u8>> = bulks(&mut reply.as_slice()).into_iter().map(<[u8]>::to_vec).collect();
            assert_eq!(found, expected, "KEYS {pattern}");
        }
    }

    #[test]
    fn keys_that_stay_are_returned_while_others_come_and_go() {
        let mut script = Script::new();
        let stay = set_all(&mut script, (0..200).map(|n| format!("{{tag}}stay{n}")));
        let mut round = 0;
        let found = walk(&mut script, 5, "", |script| {
            script.line(&format!("SET {{tag}}come{round} 1"));
            script.line(&format!("DEL {{tag}}come{}", round / 2));
            round += 1;
        });
        assert!(stay.iter().all(|key| found.contains_key(key)));
    }

    #[test]
    fn a_page_goes_on_behind_a_deleted_key() {
        let mut script = Script::new();
        set_all(&mut script, (0..20).map(|n| format!("{{tag}}{n:02}")));
        let (cursor, keys) = page_of(&mut script, 0, SLOT_COUNT - 1, 5, "");
        script.ask(StoreCommand::Del, &[&keys[4]]);
        let (_, rest) = page_of(&mut script, cursor, SLOT_COUNT - 1, 100, "");
        assert_eq!(rest.len(), 15);
        assert_eq!(rest[0], b"{tag}05");
    }

    #[test]
    fn a_cursor_whose_key_nobody_knows_starts_its_slot_again_in_hash_order() {
        let mut script = Script::new();
        let keys = set_all(&mut script, (0..2500).map(|n| format!("{{tag}}{n}")));
        let slot = slot_of(b"{tag}");
        let unknown = (1..).find(|hash| keys.iter().all(|key| key_hash(key) != *hash)).unwrap();
        let mut cursor = Cursor { slot, order: Order::Key, hash: unknown }.encode() as i64;
        let mut found: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        let mut pages = 0;
        while cursor != -1 {
            let (next, keys) = page_of(&mut script, cursor, SLOT_COUNT - 1, 10, "");
            keys.into_iter().for_each(|key| *found.entry(key).or_default() += 1);
            assert!(next == -1 || Cursor::decode(next as u64).unwrap().order == Order::Hash || next > cursor);
            cursor = next;
            pages += 1;
        }
        assert_eq!(pages, 2500usize.div_ceil(HASH_PAGE_KEYS_MIN) + 1, "the last page looks behind the slot");
        assert!(found.values().all(|times| *times == 1));
        assert_eq!(found.into_keys().collect::<BTreeSet<_>>(), keys);
    }

    #[test]
    fn a_page_ends_at_the_last_slot_it_was_asked_for() {
        let mut script = Script::new();
        set_all(&mut script, (0..100).map(|n| format!("k{n}")));
        let slot = slot_of(b"k50");
        let (next, keys) = page_of(&mut script, Cursor::start_of(slot).encode() as i64, slot, 1000, "");
        assert_eq!(next, -1);
        assert!(keys.contains(&b"k50".to_vec()) && keys.iter().all(|key| slot_of(key) == slot));
        let (next, keys) = page_of(&mut script, Cursor::start_of(slot).encode() as i64, 0, 1000, "");
        assert_eq!((next, keys.len()), (-1, 0));
    }

    #[test]
    fn hidden_rows_are_neither_returned_nor_counted() {
        let mut script = Script::new();
        set_all(&mut script, (0..10).map(|n| format!("flushed{n}")));
        script.line("FLUSHDB");
        set_all(&mut script, (0..10).map(|n| format!("k{n}")));
        script.line("SET expired v PXAT 1");
        script.line("DEL k3");
        assert_eq!(walk(&mut script, 10, "", |_| {}).len(), 9);
        assert_eq!(script.line("DBSIZE"), "(integer) 9");
        let arguments: [&[u8]; 5] = [b"0", b"16383", b"100", b"", b"list"];
        assert_eq!(text(&script.ask(StoreCommand::InternalScan, &arguments)), "[(integer) -1, []]");
    }

    #[test]
    fn cursors_that_no_walk_answered_with_are_refused_or_harmless() {
        let mut script = Script::new();
        set_all(&mut script, (0..10).map(|n| format!("k{n}")));
        for cursor in ["-1", "9007199254740992", "9223372036854775807"] {
            let arguments: [&[u8]; 5] = [cursor.as_bytes(), b"16383", b"10", b"", b""];
            assert_eq!(text(&script.ask(StoreCommand::InternalScan, &arguments)), "(error) ERR invalid cursor");
        }
        for cursor in [1, 12345, (1 << 53) - 1, 1 << 38] {
            let (next, _) = page_of(&mut script, cursor, SLOT_COUNT - 1, 1000, "");
            assert!(next == -1 || Cursor::decode(next as u64).is_some());
        }
    }

    #[test]
    fn random_keys_are_spread_over_all_keys() {
        let mut script = Script::new();
        set_all(&mut script, (0..20).map(|n| format!("k{n}")));
        let chosen: BTreeSet<String> = (0..400).map(|_| script.line("RANDOMKEY")).collect();
        assert_eq!(chosen.len(), 20);
        set_all(&mut script, (0..3000).map(|n| format!("k{n}")));
        let chosen: BTreeSet<String> = (0..400).map(|_| script.line("RANDOMKEY")).collect();
        assert!(chosen.len() > 200, "only {} of 3000 keys in 400 draws", chosen.len());
    }

    #[test]
    fn figures_of_a_small_shard_are_exact() {
        let mut script = Script::new();
        set_all(&mut script, (0..10).map(|n| format!("k{n}")));
        script.line("EXPIRE k1 1000");
        let figures = text(&script.ask(StoreCommand::InternalStats, &[]));
        assert!(
            figures.starts_with(
                r#"[{"keys": (integer) 10, "keys_exact": (integer) 1, "keys_error": (integer) 0, "expires": (integer) 1, "avg_ttl": "#
            ),
            "{figures}"
        );
        script.line("DEL k2 k3");
        script.line("SET k4 v PXAT 1");
        let figures = text(&script.ask(StoreCommand::InternalStats, &[]));
        assert!(
            figures.contains(r#""expired": (integer) 1, "tombstones": (integer) 2, "flushed": (integer) 0, "#),
            "{figures}"
        );
        // The bytes are those that MEMORY USAGE says of each key.
        let bytes: u64 = script
            .ask(StoreCommand::Keys, &[b"*"])
            .split(|byte| *byte == b'k')
            .skip(1)
            .map(|number| {
                let usage = script.line(&format!("MEMORY USAGE k{}", char::from(number[0])));
                usage.strip_prefix("(integer) ").unwrap().parse::<u64>().unwrap()
            })
            .sum();
        assert!(figures.contains(&format!(r#""row_bytes": (integer) {bytes}, "#)), "{bytes} in {figures}");
        let figures = text(&script.ask(StoreCommand::InternalStats, &[b"nokeys"]));
        assert!(figures.starts_with(r#"[{"rows_estimate": "#), "{figures}");
    }

    /// Sets many keys with values of random length, MSET by MSET.
    fn fill(script: &mut Script, keys: impl Iterator<Item = String>) {
        let keys: Vec<String> = keys.collect();
        let value = [b'v'; 64];
        for chunk in keys.chunks(1000) {
            let pairs: Vec<&[u8]> =
                chunk.iter().flat_map(|key| [key.as_bytes(), &value[..fastrand::usize(..64)]]).collect();
            script.ask(StoreCommand::Mset, &pairs);
        }
    }

    fn dbsize(script: &mut Script) -> f64 {
        script.line("DBSIZE").strip_prefix("(integer) ").unwrap().parse().unwrap()
    }

    #[test]
    fn above_100_000_keys_the_size_is_near_whatever_was_overwritten_or_deleted() {
        let mut script = Script::new();
        for _ in 0..2 {
            fill(&mut script, (0..220_000).map(|number| format!("key:{number}")));
        }
        let size = dbsize(&mut script);
        assert!((size - 220_000.0).abs() < 0.03 * 220_000.0, "{size}");
        // Half in one slot, a part of it in memory only.
        fill(&mut script, (0..220_000).map(|number| format!("{{tag}}:{number}")));
        let size = dbsize(&mut script);
        assert!((size - 440_000.0).abs() < 0.05 * 440_000.0, "{size}");
        // What is small again is counted.
        script.line("FLUSHDB");
        fill(&mut script, (0..100_000).map(|number| format!("key:{number}")));
        assert_eq!(dbsize(&mut script), 100_000.0);
        script.line("DEL key:1 key:2");
        assert_eq!(dbsize(&mut script), 99_998.0);
        script.line("SET more 1");
        assert_eq!(dbsize(&mut script), 99_999.0);
    }

    #[test]
    fn random_keys_come_from_everywhere_in_a_large_shard() {
        let mut script = Script::new();
        // One slot has nine of ten keys.
        fill(&mut script, (0..2_000).map(|number| format!("key:{number}")));
        fill(&mut script, (0..18_000).map(|number| format!("{{tag}}:{number}")));
        let drawn: Vec<String> = (0..2_000).map(|_| script.line("RANDOMKEY")).collect();
        let (tagged, others): (BTreeSet<&String>, BTreeSet<&String>) =
            drawn.iter().partition(|key| key.contains("{tag}"));
        assert!(tagged.len() > 100 && others.len() > 100, "{} and {} different keys", tagged.len(), others.len());
        // From its whole length, not from its first rows alone.
        let late = tagged.iter().filter(|key| key.as_str() > "\"{tag}:5").count();
        assert!(late * 4 > tagged.len(), "{late} of {} lie in the second half", tagged.len());
    }

    #[test]
    fn a_random_key_is_alive_and_found_among_many_dead_rows() {
        let mut script = Script::new();
        fill(&mut script, (0..3_000).map(|number| format!("dead:{number}")));
        for chunk in (0..3_000).map(|number| format!("dead:{number}")).collect::<Vec<_>>().chunks(500) {
            let keys: Vec<&[u8]> = chunk.iter().map(String::as_bytes).collect();
            script.ask(StoreCommand::Del, &keys);
        }
        assert_eq!(script.line("RANDOMKEY"), "(nil)");
        script.line("SET last 1");
        script.line("SET gone 1 PXAT 1");
        for _ in 0..20 {
            assert_eq!(script.line("RANDOMKEY"), "\"last\"");
        }
    }

    #[test]
    fn a_page_of_hashes_keeps_ties_together() {
        let mut smallest = SmallestHashes { above: 0, up_to: u64::MAX, count: 2, entries: Vec::new(), bytes: 0 };
        smallest.entries = vec![(5, b"a".to_vec()), (3, b"b".to_vec()), (5, b"c".to_vec()), (9, b"d".to_vec())];
        smallest.prune();
        let kept: Vec<u64> = smallest.entries.iter().map(|(hash, _)| *hash).collect();
        assert_eq!((kept, smallest.up_to), (vec![3, 5, 5], 5));
    }
}
