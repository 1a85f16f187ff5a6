//! What the table says of one command.

use std::fmt;

/// Properties of a command: Redis's command flags and ours, as bits.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(pub u32);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $text:literal;)*) => {
        impl Flags {
            $($(#[$doc])* pub const $name: Flags = Flags(1 << $bit);)*
            /// Each flag with the name that COMMAND INFO gives it; ours have an empty one.
            pub const ALL: &'static [(Flags, &'static str)] = &[$((Flags::$name, $text)),*];
        }
    };
}

flags! {
    WRITE = 0, "write";
    READONLY = 1, "readonly";
    DENYOOM = 2, "denyoom";
    ADMIN = 3, "admin";
    PUBSUB = 4, "pubsub";
    NOSCRIPT = 5, "noscript";
    BLOCKING = 6, "blocking";
    LOADING = 7, "loading";
    STALE = 8, "stale";
    SKIP_MONITOR = 9, "skip_monitor";
    SKIP_SLOWLOG = 10, "skip_slowlog";
    FAST = 11, "fast";
    NO_AUTH = 12, "no_auth";
    MAY_REPLICATE = 13, "may_replicate";
    NO_MULTI = 14, "no_multi";
    ALLOW_BUSY = 15, "allow_busy";
    NO_ASYNC_LOADING = 19, "no_async_loading";
    /// A container: its second word chooses one of the rows `name|word`.
    CONTAINER = 16, "";
    /// Between gateway and store only; clients cannot call it.
    INTERNAL = 17, "";
    /// Walks many rows: always runs in the store's blocking lane.
    WALKS = 18, "";
    /// Its line may end in `EVENTTIME unix-ns`, two words that its arity and its keys do not count.
    EVENT_TIME = 20, "";
}

impl Flags {
    pub const NONE: Flags = Flags(0);

    pub const fn union(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Flags({:#x})", self.0)
    }
}

/// Where the keys stand, counted as Redis counts: the command's name is position 0, `last` may be negative (from the end).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keys {
    /// 0 = no keys.
    pub first: i16,
    pub last: i16,
    pub step: i16,
}

impl Keys {
    pub const NONE: Keys = Keys { first: 0, last: 0, step: 0 };
}

/// `EVENTTIME` and the time.
const EVENT_TIME_WORDS: usize = 2;

/// How the answers of several shards become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// Array elements in the order of the keys.
    InKeyOrder,
    /// The sum of integers.
    Sum,
    /// OK if all are.
    AllOk,
    /// One array of all elements.
    Concat,
    /// One of the answers that are not null, chosen at random.
    AnyNonNull,
}

/// Who runs a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The gateway that was asked.
    Here,
    /// The one shard of all its keys.
    OneShard,
    /// The shards of its keys, each with its share; the first error wins.
    Split(Merge),
    /// All shards of the keyspace with the same arguments; the first error wins.
    AllShards(Merge),
    /// All shards of all keyspaces with the same arguments; the first error wins.
    AllKeyspaces(Merge),
}

/// One row of the command table.
#[derive(Clone, Copy, Debug)]
pub struct CommandSpec {
    /// Lower case; a subcommand as `container|sub`.
    pub name: &'static str,
    /// As Redis counts: the name included (both words of a subcommand); negative = at least.
    pub arity: i16,
    pub flags: Flags,
    pub keys: Keys,
    pub route: Route,
    /// Group of the command's page.
    pub group: &'static str,
    /// The version of Redis that introduced it, or of Vasto.
    pub since: &'static str,
    pub summary: &'static str,
}

impl CommandSpec {
    /// Words of the name: 2 for a subcommand.
    pub fn name_words(&self) -> usize {
        if self.name.contains('|') { 2 } else { 1 }
    }

    /// Whether a command line of `count` words, the name included, has the right length.
    pub fn accepts_count(&self, count: usize) -> bool {
        let arity = usize::from(self.arity.unsigned_abs());
        if self.arity < 0 { count >= arity } else { count == arity }
    }

    /// As [`CommandSpec::accepts_count`], an event time at the end not counted. `word` gives the line's words by position.
    pub fn accepts<'a>(&self, count: usize, word: impl Fn(usize) -> &'a [u8]) -> bool {
        self.accepts_count(count) || self.accepts_count(self.words_before_event_time(count, word))
    }

    /// How many words of a command line stand before an event time at its end; all of them if it has none.
    ///
    /// `DEL a EVENTTIME b` is three keys, as in Redis: behind a list of keys only digits are a time, and only if a key stands before.
    pub fn words_before_event_time<'a>(&self, count: usize, word: impl Fn(usize) -> &'a [u8]) -> usize {
        let least = usize::from(self.arity.unsigned_abs()) + EVENT_TIME_WORDS;
        if !self.flags.contains(Flags::EVENT_TIME) || count < least {
            return count;
        }
        let time = word(count - 1);
        let is_time = self.arity > 0 || !time.is_empty() && time.iter().all(u8::is_ascii_digit);
        if is_time && word(count - 2).eq_ignore_ascii_case(b"EVENTTIME") { count - EVENT_TIME_WORDS } else { count }
    }

    /// Positions of the keys in a command line of `count` words, the name being word 0.
    pub fn key_positions(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        let last = if self.keys.last < 0 {
            count.saturating_sub(usize::from(self.keys.last.unsigned_abs()))
        } else {
            self.keys.last as usize
        };
        let first = self.keys.first as usize;
        let range = if first == 0 || count == 0 { 1..1 } else { first..last.min(count - 1) + 1 };
        range.step_by(usize::from(self.keys.step.unsigned_abs()).max(1))
    }
}

#[cfg(test)]
mod tests {
    use crate::command::table;

    #[test]
    fn an_event_time_at_the_end_is_neither_a_key_nor_counted() {
        for (line, keys) in [
            ("del a EVENTTIME 5", Some(1)),
            ("unlink a eventtime 5", Some(1)),
            ("del a b EVENTTIME 5", Some(2)),
            ("del a EVENTTIME b", Some(3)),
            ("del a EVENTTIME -5", Some(3)),
            ("del EVENTTIME 5", Some(2)),
            ("del a EVENTTIME", Some(2)),
            ("exists a EVENTTIME 5", Some(3)),
            ("setex a 1 v", Some(1)),
            ("setex a 1 v EVENTTIME x", Some(1)),
            ("setex a 1 v EVENTTIM 5", None),
            ("setex a 1 EVENTTIME 5", None),
            ("setex a 1 v w EVENTTIME 5", None),
            ("persist a EVENTTIME 5", Some(1)),
            ("persist a b", None),
            ("getset a v EVENTTIME 5", None),
        ] {
            let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
            let spec = table::find(words[0]).unwrap().spec();
            let before = spec.words_before_event_time(words.len(), |place| words[place]);
            let found = spec.accepts(words.len(), |place| words[place]).then(|| spec.key_positions(before).count());
            assert_eq!(found, keys, "{line}");
        }
    }
}
