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
