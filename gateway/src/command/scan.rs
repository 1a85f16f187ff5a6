//! SCAN: one page of a walk over all shards in slot order.
//!
//! A page asks at most twice: the owner of the slot that the cursor stands in, for the rest of that slot; then all shards, each for its
//! share of what is missing from the next slot on. The page ends at the first place where a shard stopped: what others have seen behind it
//! is dropped and read again later, so that the one number in the cursor says where everything stands.

use super::{Ask, Context, Next, Round, ShardRequest};
use crate::routing::KeyspaceRoutes;
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, Reply};
use vasto_proto::error::{self, CommandError};
use vasto_proto::slot::{SLOT_COUNT, hash_tag, slot_of};

const COUNT_DEFAULT: u64 = 10;
/// The slot's place in a cursor; below it stand the order within the slot and a hash, which are the store's.
const CURSOR_SLOT_SHIFT: u32 = 39;
const LAST_SLOT: u16 = SLOT_COUNT - 1;
const MALFORMED_ANSWER: CommandError =
    CommandError::fixed("ERR the store answered something that is no page of a walk");

fn start_of(slot: u16) -> u64 {
    u64::from(slot) << CURSOR_SLOT_SHIFT
}

/// `None` for a number that no walk answered with.
fn slot_of_cursor(cursor: u64) -> Option<u16> {
    u16::try_from(cursor >> CURSOR_SLOT_SHIFT).ok().filter(|slot| *slot < SLOT_COUNT)
}

/// Reads a cursor as Redis does, with strtoul: a sign is fine, nothing is 0, too much is an error.
fn parse_cursor(text: &[u8]) -> Result<u64, CommandError> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    if text.is_empty() {
        return Ok(0);
    }
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(error::INVALID_CURSOR);
    }
    let number =
        std::str::from_utf8(digits).ok().and_then(|digits| digits.parse::<u64>().ok()).ok_or(error::INVALID_CURSOR)?;
    Ok(if negative { number.wrapping_neg() } else { number })
}

/// What a pattern says about the keys that can match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Everywhere,
    /// They all lie in this slot.
    OneSlot(u16),
}

/// A pattern whose literal beginning holds a whole hash tag, or that has no wildcard at all, matches keys of one slot only.
fn reach(pattern: Option<&[u8]>) -> Reach {
    let Some(pattern) = pattern else {
        return Reach::Everywhere;
    };
    let literal = pattern.iter().position(|byte| matches!(byte, b'*' | b'?' | b'[' | b'\\')).unwrap_or(pattern.len());
    let prefix = &pattern[..literal];
    let has_tag = hash_tag(prefix).len() < prefix.len();
    if has_tag || literal == pattern.len() { Reach::OneSlot(slot_of(prefix)) } else { Reach::Everywhere }
}

pub fn scan(context: &mut Context<'_>, mut args: Args<'_>) -> Result<Next, CommandError> {
    let cursor = parse_cursor(args.bytes()?)?;
    let (mut count, mut pattern, mut kind) = (COUNT_DEFAULT, None, None);
    while !args.is_empty() {
        if args.option("count") {
            count = u64::try_from(args.integer()?).ok().filter(|count| *count > 0).ok_or(error::SYNTAX)?;
        } else if args.option("match") {
            pattern = Some(args.bytes()?.to_vec());
        } else if args.option("type") {
            kind = Some(args.bytes()?.to_vec());
        } else {
            return Err(error::SYNTAX);
        }
    }
    // For the store an empty type is none; no key has one of this name.
    let nothing_matches = kind.as_ref().is_some_and(Vec::is_empty);
    let kind = kind.unwrap_or_default();
    let mut scan =
        Scan { count, pattern, kind, last_slot: LAST_SLOT, keys: Vec::new(), round: RoundKind::AllShards, asked: 1 };
    match scan.begin(cursor).filter(|_| !nothing_matches) {
        Some(cursor) => Ok(Next::Ask(Box::new(ScanFrom { scan, cursor }))),
        None => {
            scan.reply(context, 0);
            Ok(Next::Replied)
        }
    }
}

/// Whom the round under way asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RoundKind {
    /// The owner of one slot, for the rest of it.
    OneSlot(u16),
    /// All shards, to the end of the walk.
    AllShards,
}

#[derive(Debug)]
struct Scan {
    count: u64,
    pattern: Option<Vec<u8>>,
    kind: Vec<u8>,
    /// The walk ends behind it.
    last_slot: u16,
    keys: Vec<Vec<u8>>,
    round: RoundKind,
    /// Shards asked in this round.
    asked: usize,
}

/// A page whose round under way starts at a cursor; the keys before it are taken.
#[derive(Debug)]
struct ScanFrom {
    scan: Scan,
    cursor: u64,
}

impl Scan {
    /// Where the walk goes on; `None` if it is over.
    fn begin(&mut self, cursor: u64) -> Option<u64> {
        let slot = slot_of_cursor(cursor)?;
        let Reach::OneSlot(only) = reach(self.pattern.as_deref()) else {
            return Some(cursor);
        };
        self.last_slot = only;
        match slot.cmp(&only) {
            std::cmp::Ordering::Less => Some(start_of(only)),
            std::cmp::Ordering::Equal => Some(cursor),
            std::cmp::Ordering::Greater => None,
        }
    }

    fn request(
        &self,
        routes: &KeyspaceRoutes,
        cursor: u64,
        last_slot: u16,
        count: u64,
        shard: vasto_proto::id::ShardId,
    ) -> ShardRequest {
        let arguments = vec![
            cursor.to_string().into_bytes(),
            last_slot.to_string().into_bytes(),
            count.to_string().into_bytes(),
            self.pattern.clone().unwrap_or_default(),
            self.kind.clone(),
        ];
        ShardRequest { target: routes.shard_key(shard), command: StoreCommand::InternalScan, arguments }
    }

    /// The requests for what is missing from a cursor on.
    fn ask_from(&mut self, routes: &KeyspaceRoutes, cursor: u64) -> Vec<ShardRequest> {
        let missing = self.count.saturating_sub(self.keys.len() as u64).max(1);
        let slot = slot_of_cursor(cursor).expect("checked by begin");
        let shards: Vec<_> = routes.shard_keys().map(|key| key.shard).collect();
        let requests: Vec<ShardRequest> = if self.last_slot == slot || shards.len() > 1 && cursor != start_of(slot) {
            self.round = RoundKind::OneSlot(slot);
            vec![self.request(routes, cursor, slot, missing, routes.shard_of_slot(slot))]
        } else {
            self.round = RoundKind::AllShards;
            let share = missing.div_ceil(shards.len() as u64);
            shards.iter().map(|shard| self.request(routes, cursor, self.last_slot, share, *shard)).collect()
        };
        self.asked = requests.len();
        requests
    }

    /// Takes the answers of a round; the cursor from which to go on, 0 = the walk is over.
    fn take(&mut self, answers: &[Vec<u8>]) -> Result<u64, CommandError> {
        let pages = answers.iter().map(|answer| page(answer)).collect::<Result<Vec<Page>, CommandError>>()?;
        if pages.len() != self.asked {
            return Err(MALFORMED_ANSWER);
        }
        let walked_on = match self.round {
            RoundKind::OneSlot(slot) if slot < self.last_slot => start_of(slot + 1),
            RoundKind::OneSlot(_) | RoundKind::AllShards => 0,
        };
        let (kept, stopped) = merge(pages);
        self.keys.extend(kept);
        if self.pattern.as_deref() == Some(b"") {
            // For the store an empty pattern is none; here it matches the empty key.
            self.keys.retain(Vec::is_empty);
        }
        Ok(stopped.unwrap_or(walked_on))
    }

    fn reply(&mut self, context: &mut Context<'_>, cursor: u64) {
        let mut reply = context.reply();
        reply.array(2);
        reply.bulk(cursor.to_string().as_bytes());
        reply.array(self.keys.len());
        self.keys.iter().for_each(|key| reply.bulk(key));
    }
}

impl Ask for ScanFrom {
    fn start(&mut self, context: &mut Context<'_>) -> Result<Vec<ShardRequest>, CommandError> {
        let routes = context.routing.keyspace(context.session.keyspace).ok_or(error::NO_KEYSPACE)?;
        Ok(self.scan.ask_from(routes, self.cursor))
    }

    fn next(&mut self, context: &mut Context<'_>, answers: Vec<Vec<u8>>) -> Result<Round, CommandError> {
        let was_slot_end = self.scan.round != RoundKind::AllShards;
        let cursor = self.scan.take(&answers)?;
        let slot_is_done =
            was_slot_end && cursor != 0 && slot_of_cursor(cursor).is_some_and(|slot| cursor == start_of(slot));
        if slot_is_done && (self.scan.keys.len() as u64) < self.scan.count {
            let routes = context.routing.keyspace(context.session.keyspace).ok_or(error::NO_KEYSPACE)?;
            self.cursor = cursor;
            return Ok(Round::Again(self.scan.ask_from(routes, cursor)));
        }
        self.scan.reply(context, cursor);
        Ok(Round::Done)
    }
}

/// What one shard answered.
#[derive(Debug, PartialEq, Eq)]
struct Page {
    /// Where it stopped; `None` = it walked to the end.
    stopped: Option<u64>,
    keys: Vec<Vec<u8>>,
}

fn page(mut answer: &[u8]) -> Result<Page, CommandError> {
    match Reply::take(&mut answer) {
        Some(Reply::Array(2)) => {}
        Some(Reply::Error(text)) => return Err(String::from_utf8_lossy(text).into_owned().into()),
        _ => return Err(MALFORMED_ANSWER),
    }
    let Some(Reply::Integer(cursor)) = Reply::take(&mut answer) else {
        return Err(MALFORMED_ANSWER);
    };
    let stopped = match cursor {
        -1 => None,
        _ => Some(
            u64::try_from(cursor).ok().filter(|cursor| slot_of_cursor(*cursor).is_some()).ok_or(MALFORMED_ANSWER)?,
        ),
    };
    let Some(Reply::Array(count)) = Reply::take(&mut answer) else {
        return Err(MALFORMED_ANSWER);
    };
    let key = |_| match Reply::take(&mut answer) {
        Some(Reply::Bulk(key)) => Ok(key.to_vec()),
        _ => Err(MALFORMED_ANSWER),
    };
    Ok(Page { stopped, keys: (0..count).map(key).collect::<Result<_, _>>()? })
}

/// The keys of all pages in slot order up to the first place where one stopped, and that place.
fn merge(pages: Vec<Page>) -> (Vec<Vec<u8>>, Option<u64>) {
    let first = pages.iter().enumerate().filter_map(|(place, page)| page.stopped.map(|cursor| (cursor, place))).min();
    let mut kept: Vec<(u16, Vec<u8>)> = Vec::new();
    for (place, page) in pages.into_iter().enumerate() {
        let keys = page.keys.into_iter().map(|key| (slot_of(&key), key));
        // All that the page which stopped first has returned lies before its cursor; of the others only what lies in earlier slots.
        kept.extend(keys.filter(|(slot, _)| {
            first.is_none_or(|(cursor, stopped)| place == stopped || Some(*slot) < slot_of_cursor(cursor))
        }));
    }
    // A slot lies in one shard: the stable sort keeps the shard's order within it.
    kept.sort_by_key(|(slot, _)| *slot);
    (kept.into_iter().map(|(_, key)| key).collect(), first.map(|(cursor, _)| cursor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::harness::{Harness, packed, show};
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use vasto_proto::slot::SlotTable;

    #[test]
    fn errors_are_those_of_redis() {
        Harness::new().script(
            r#"
            > SCAN a / < -ERR invalid cursor
            > SCAN a foo / < -ERR invalid cursor
            > SCAN 18446744073709551616 / < -ERR invalid cursor
            > SCAN " 0" / < -ERR invalid cursor
            > SCAN 0x10 / < -ERR invalid cursor
            > SCAN 0 COUNT 0 / < -ERR syntax error
            > SCAN 0 COUNT -5 / < -ERR syntax error
            > SCAN 0 COUNT a / < -ERR value is not an integer or out of range
            > SCAN 0 COUNT / < -ERR syntax error
            > SCAN 0 foo / < -ERR syntax error
            > SCAN 0 TYPE a b / < -ERR syntax error
            > SCAN 18446744073709551615 / < ["0", []]
            > SCAN -1 / < ["0", []]
            > SCAN 9007199254740991 MATCH {user1000}* / < ["0", []]
            "#,
        );
    }

    #[test]
    fn a_pattern_with_a_tag_reaches_one_slot() {
        for (pattern, slot) in [
            ("{user1000}.*", Some(3443)),
            ("x{user1000}*", Some(3443)),
            ("foo", Some(12182)),
            ("{user*}", None),
            ("{}x*", None),
            ("user*", None),
            ("*", None),
            ("\\foo", None),
        ] {
            assert_eq!(reach(Some(pattern.as_bytes())), slot.map_or(Reach::Everywhere, Reach::OneSlot), "{pattern}");
        }
    }

    /// Three shards that answer `_scan` from a set of keys; within a slot the rank of a key stands in for its hash.
    struct Model {
        table: SlotTable,
        keys: BTreeSet<(u16, Vec<u8>)>,
        requests: usize,
    }

    impl Model {
        fn new(keys: impl IntoIterator<Item = Vec<u8>>) -> Self {
            Self {
                table: SlotTable::new(3),
                keys: keys.into_iter().map(|key| (slot_of(&key), key)).collect(),
                requests: 0,
            }
        }

        fn answer(&mut self, request: &ShardRequest) -> Vec<u8> {
            self.requests += 1;
            let number = |place: usize| {
                String::from_utf8(request.arguments[place].clone()).expect("digits").parse::<u64>().expect("digits")
            };
            let (cursor, last_slot, count) = (number(0), number(1), number(2));
            let (slot, rank) = ((cursor >> CURSOR_SLOT_SHIFT) as u16, (cursor & 0xffff) as usize);
            let own: Vec<&(u16, Vec<u8>)> = self
                .keys
                .iter()
                .filter(|(key_slot, _)| {
                    self.table.shard(*key_slot) == request.target.shard && u64::from(*key_slot) <= last_slot
                })
                .collect();
            let rank_of =
                |(slot, key): &(u16, Vec<u8>)| self.keys.range((*slot, Vec::new())..=(*slot, key.clone())).count();
            let ahead: Vec<_> = own
                .into_iter()
                .filter(|key| key.0 > slot || key.0 == slot && rank_of(key) > rank)
                .take(count as usize + 1)
                .collect();
            let returned = &ahead[..ahead.len().min(count as usize)];
            let next = match returned.last() {
                Some(last) if ahead.len() > returned.len() => start_of(last.0) as i64 | rank_of(last) as i64,
                _ => -1,
            };
            packed(|reply| {
                reply.array(2);
                reply.integer(next);
                reply.array(returned.len());
                returned.iter().for_each(|(_, key)| reply.bulk(key));
            })
        }

        /// All keys that a whole walk returns, in order.
        fn walk(&mut self, options: &str) -> Vec<Vec<u8>> {
            let mut harness = Harness::new();
            let (mut cursor, mut all) = ("0".to_owned(), Vec::new());
            for _ in 0..10_000 {
                let reply = harness.run_with(&format!("SCAN {cursor} {options}"), &mut |request| self.answer(request));
                let (next, keys) =
                    reply.strip_prefix("[\"").and_then(|reply| reply.split_once("\", [")).expect("a page");
                let keys = keys.strip_suffix("]]").expect("a page");
                all.extend(
                    keys.split(", ").filter(|key| !key.is_empty()).map(|key| key.trim_matches('"').as_bytes().to_vec()),
                );
                if next == "0" {
                    return all;
                }
                cursor = next.to_owned();
            }
            panic!("the walk does not end");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_walk_returns_every_key_once_in_slot_order(
            keys in prop::collection::btree_set("[a-c]{0,2}(\\{[x-z]\\})?[0-9]{1,3}", 0..200),
            count in 1u64..60,
        ) {
            let mut model = Model::new(keys.iter().map(|key| key.clone().into_bytes()));
            let expected: Vec<Vec<u8>> = model.keys.iter().map(|(_, key)| key.clone()).collect();
            prop_assert_eq!(model.walk(&format!("COUNT {count}")), expected);
        }
    }

    #[test]
    fn a_page_asks_at_most_once_per_shard_and_once_more() {
        let mut model = Model::new((0..100).map(|number| format!("k{number}").into_bytes()));
        let reply = Harness::new().run_with("SCAN 0 COUNT 30", &mut |request| model.answer(request));
        assert_eq!(model.requests, 3);
        let keys = reply.matches('"').count() / 2 - 1;
        assert!((1..=30).contains(&keys), "{keys} keys for COUNT 30");
    }

    #[test]
    fn a_tag_asks_only_its_slot() {
        let mut model = Model::new(["{user1000}.a", "{user1000}.b", "other"].map(|key| key.as_bytes().to_vec()));
        assert_eq!(model.walk("MATCH {user1000}.*").len(), 2);
        assert_eq!(model.requests, 1);
        assert_eq!(model.walk("MATCH {user1000}.* COUNT 1").len(), 2);
        assert_eq!(model.requests, 3);
    }

    #[test]
    fn an_empty_pattern_matches_the_empty_key_only() {
        let mut model = Model::new(["", "06S"].map(|key| key.as_bytes().to_vec()));
        let reply = Harness::new().run_with("SCAN 0 MATCH \"\"", &mut |request| model.answer(request));
        assert_eq!(reply, r#"["0", [""]]"#);
    }

    #[test]
    fn a_shard_that_fails_fails_the_page() {
        let mut harness = Harness::new();
        assert_eq!(harness.run_with("SCAN 0", &mut |_| packed(|reply| reply.error("CLUSTERDOWN x"))), "-CLUSTERDOWN x");
        assert!(harness.run_with("SCAN 0", &mut |_| vec![b'x']).starts_with("-ERR the store answered"));
        assert_eq!(show(&packed(|reply| reply.ok())), "OK");
    }
}
