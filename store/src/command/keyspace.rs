//! Commands on all keys of a shard. They walk the rows on disk and run in the blocking lane.

use super::cursor::{Cursor, Order, key_hash};
use super::glob::{self, Pattern};
use crate::shard::context::{Context, Failure};
use crate::shard::view::{ShardView, Walk};
use std::time::{Duration, Instant};
use vasto_proto::command::Args;
use vasto_proto::error::{self, CommandError};
use vasto_proto::key::{decode_key, encode_key_of_slot_into};
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
/// Keys that DBSIZE counts one by one.
const COUNTED_KEYS_MAX: u64 = 100_000;
/// Rows that DBSIZE reads at most, dead ones included: about two seconds.
const COUNTED_ROWS_MAX: u64 = 4_000_000;
/// A shard of up to this many rows is read whole to choose a random key, each with the same chance.
const RANDOM_ROWS_MAX: u64 = 1000;
/// Slots that RANDOMKEY tries before it takes the next key from a random place on.
const RANDOM_SLOTS_TRIED: usize = 64;

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
    expires_at_ms: u64,
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
        Ok(Some(Place { slot, key, alive, expires_at_ms: header.map_or(0, |header| header.expires_at_ms) }))
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

/// How many keys there are.
#[derive(Debug, Default)]
struct Census {
    keys: u64,
    expires: u64,
    /// Mean time to live of the keys that expire.
    time_to_live_ms: u64,
    /// Whether every row was counted.
    exact: bool,
}

/// Counts keys one by one up to [`COUNTED_KEYS_MAX`]; above it takes the rows that were read for a sample of RocksDB's estimate.
fn census(view: &ShardView<'_>, now_ms: u64) -> Result<Census, Failure> {
    let filter = Filter::default();
    let mut rows = Rows::new(view, &filter, SLOT_COUNT - 1);
    let (mut visited, mut keys, mut expires, mut time_to_live_ms) = (0u64, 0u64, 0u64, 0u128);
    rows.seek_slot(0);
    while let Some(place) = rows.place()? {
        if keys >= COUNTED_KEYS_MAX || visited >= COUNTED_ROWS_MAX {
            break;
        }
        visited += 1;
        if place.alive {
            keys += 1;
            if place.expires_at_ms != 0 {
                expires += 1;
                time_to_live_ms += u128::from(place.expires_at_ms.saturating_sub(now_ms));
            }
        }
        rows.next();
    }
    let exact = rows.place()?.is_none();
    let mean = time_to_live_ms.checked_div(u128::from(expires)).unwrap_or(0) as u64;
    if exact {
        return Ok(Census { keys, expires, time_to_live_ms: mean, exact });
    }
    let rows_in_all = view.estimate_keys().max(visited);
    let scaled = |part: u64| (u128::from(part) * u128::from(rows_in_all) / u128::from(visited.max(1))) as u64;
    Ok(Census { keys: scaled(keys), expires: scaled(expires), time_to_live_ms: mean, exact })
}

fn figure(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// DBSIZE
pub fn dbsize(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    let census = census(&context.shard(), context.now_ms())?;
    context.reply().integer(figure(census.keys));
    Ok(())
}

/// Chooses one of the alive keys among the next rows, each with the same chance; also says whether the rows ended.
fn choose(rows: &mut Rows<'_>, rows_max: u64, slot: Option<u16>) -> Result<(Option<Vec<u8>>, bool), Failure> {
    let (mut chosen, mut alive) = (None, 0u64);
    for _ in 0..rows_max {
        let Some(place) = rows.place()?.filter(|place| slot.is_none_or(|slot| place.slot == slot)) else {
            return Ok((chosen, true));
        };
        if place.alive {
            alive += 1;
            if fastrand::u64(..alive) == 0 {
                chosen = Some(place.key.to_vec());
            }
        }
        rows.next();
    }
    Ok((chosen, false))
}

fn random_key(view: &ShardView<'_>) -> Result<Option<Vec<u8>>, Failure> {
    let filter = Filter::default();
    let mut rows = Rows::new(view, &filter, SLOT_COUNT - 1);
    rows.seek_slot(0);
    if let (chosen, true) = choose(&mut rows, RANDOM_ROWS_MAX, None)? {
        return Ok(chosen);
    }
    let Some(mut slot) = fastrand::choice(view.slots()).copied() else { return Ok(None) };
    for _ in 0..RANDOM_SLOTS_TRIED {
        rows.seek_slot(slot);
        if let (Some(chosen), _) = choose(&mut rows, RANDOM_ROWS_MAX, Some(slot))? {
            return Ok(Some(chosen));
        }
        slot = fastrand::choice(view.slots()).copied().unwrap_or(slot);
    }
    // Few slots have keys: the next one from a random slot on, around the end.
    for start in [slot, 0] {
        rows.seek_slot(start);
        while let Some(place) = rows.place()? {
            if place.alive {
                return Ok(Some(place.key.to_vec()));
            }
            rows.next();
        }
    }
    Ok(None)
}

/// RANDOMKEY
pub fn randomkey(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    let key = random_key(&context.shard())?;
    match key {
        Some(key) => context.reply().bulk(&key),
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

/// `_stats`
pub fn stats(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    args.end()?;
    let figures = {
        let view = context.shard();
        let census = census(&view, context.now_ms())?;
        [
            ("keys", census.keys),
            ("keys_exact", u64::from(census.exact)),
            ("expires", census.expires),
            ("avg_ttl", census.time_to_live_ms),
            ("rows_estimate", view.estimate_keys()),
            ("row_bytes", view.live_bytes()),
            ("disk_bytes", view.disk_bytes()),
            ("memtable_bytes", view.memtable_bytes()),
            ("block_cache_bytes", view.block_cache_bytes()),
            ("shards_read_only", u64::from(view.is_read_only())),
            ("rows_expired_by_compaction", view.rows_expired_by_compaction()),
            ("tombstones_dropped", view.tombstones_dropped()),
        ]
    };
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
                r#"[{"keys": (integer) 10, "keys_exact": (integer) 1, "expires": (integer) 1, "avg_ttl": "#
            ),
            "{figures}"
        );
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
