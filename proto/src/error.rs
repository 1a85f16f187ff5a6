//! The one table of error texts that clients see: Redis's own, byte for byte, and ours.

use crate::id::ShardKey;
use std::borrow::Cow;
use std::fmt;

/// An error of a command: nothing was changed. The text starts with its code word (`ERR …`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandError(pub Cow<'static, str>);

impl CommandError {
    pub const fn fixed(text: &'static str) -> Self {
        Self(Cow::Borrowed(text))
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

impl From<String> for CommandError {
    fn from(text: String) -> Self {
        Self(Cow::Owned(text))
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for CommandError {}

// As Redis 7 says them.
pub const SYNTAX: CommandError = CommandError::fixed("ERR syntax error");
pub const NOT_AN_INTEGER: CommandError = CommandError::fixed("ERR value is not an integer or out of range");
pub const NOT_A_FLOAT: CommandError = CommandError::fixed("ERR value is not a valid float");
pub const WRONG_TYPE: CommandError =
    CommandError::fixed("WRONGTYPE Operation against a key holding the wrong kind of value");
pub const NO_SUCH_KEY: CommandError = CommandError::fixed("ERR no such key");
pub const INCREMENT_OVERFLOW: CommandError = CommandError::fixed("ERR increment or decrement would overflow");
pub const DECREMENT_OVERFLOW: CommandError = CommandError::fixed("ERR decrement would overflow");
pub const NAN_OR_INFINITY: CommandError = CommandError::fixed("ERR increment would produce NaN or Infinity");
pub const OFFSET_OUT_OF_RANGE: CommandError = CommandError::fixed("ERR offset is out of range");
pub const STRING_TOO_LONG: CommandError =
    CommandError::fixed("ERR string exceeds maximum allowed size (proto-max-bulk-len)");
pub const INVALID_CURSOR: CommandError = CommandError::fixed("ERR invalid cursor");
pub const SAME_OBJECT: CommandError = CommandError::fixed("ERR source and destination objects are the same");
pub const INVALID_DB_INDEX: CommandError = CommandError::fixed("ERR invalid DB index");
pub const DB_INDEX_OUT_OF_RANGE: CommandError = CommandError::fixed("ERR DB index is out of range");
pub const SAVE_IN_PROGRESS: CommandError = CommandError::fixed("ERR Background save already in progress");
pub const NO_REPLICAS: CommandError = CommandError::fixed("NOREPLICAS Not enough good replicas to write.");
pub const MAX_CLIENTS: CommandError = CommandError::fixed("ERR max number of clients reached");

/// `name` in lower case; a subcommand as `container|sub`.
pub fn wrong_arity(name: &str) -> CommandError {
    format!("ERR wrong number of arguments for '{name}' command").into()
}

pub fn invalid_expire_time(name: &str) -> CommandError {
    format!("ERR invalid expire time in '{name}' command").into()
}

// Ours. CROSSSLOT is the code that Redis Cluster clients know; the rest of the text says what it means here.
pub const CROSS_SHARD: CommandError = CommandError::fixed(
    "CROSSSLOT Keys in request don't hash to the same shard; give them one {hash tag} to keep them together",
);
/// The store of a shard was lost after the command was sent.
pub const UNKNOWN_OUTCOME: CommandError = CommandError::fixed(
    "UNKNOWN the connection to the store was lost after the command was sent: it may or may not have been executed",
);
/// Nothing was executed: a shard could not be reached, or did not serve, within the deadline. The reason follows in parentheses.
pub const SHARD_UNREACHABLE: CommandError =
    CommandError::fixed("CLUSTERDOWN the shard of this key cannot be reached; nothing was executed");
pub fn shard_unreachable(reason: &str) -> CommandError {
    if reason.is_empty() {
        return SHARD_UNREACHABLE;
    }
    format!("{} ({})", SHARD_UNREACHABLE.text(), single_line(reason)).into()
}

/// Why a shard cannot be reached that is between two primaries.
pub fn vacant(shard: ShardKey) -> String {
    format!("shard {shard} has no primary at the moment")
}

/// A change of a keyspace without a master.
pub const NO_MASTER: CommandError =
    CommandError::fixed("ERR keyspaces are changed by the master, and none can be reached; nothing was changed");
/// The master was lost after the change was asked for.
pub const MASTER_LOST: CommandError = CommandError::fixed(
    "UNKNOWN the connection to the master was lost after the change was asked for: KEYSPACE INFO shows whether it was made",
);
/// Nothing was executed: the gateway has no topology, or none with this keyspace.
pub const NO_KEYSPACE: CommandError =
    CommandError::fixed("CLUSTERDOWN this keyspace is not served yet; nothing was executed");

/// Nothing was executed: the keyspace that the connection chose is no more.
pub const KEYSPACE_DROPPED: CommandError =
    CommandError::fixed("ERR the keyspace of this connection was dropped; SELECT another one");
/// Databases are keyspaces with shards of their own: nothing changes two of them at once.
pub const NOT_BETWEEN_KEYSPACES: CommandError = CommandError::fixed(
    "ERR databases have shards of their own and nothing moves between them at once; use DUMP and RESTORE; nothing was executed",
);

/// The store cannot say whether the command was executed: its disk failed meanwhile.
pub fn unknown_outcome(reason: &str) -> CommandError {
    format!("UNKNOWN the command may or may not have been executed: {}", single_line(reason)).into()
}

/// Nothing was executed: the shard takes no writes. As Redis says it of its AOF.
pub fn writes_refused(shard: ShardKey, reason: &str) -> CommandError {
    format!("MISCONF Errors writing to shard {shard}: {}; nothing was executed", single_line(reason)).into()
}

/// DEL with an event time: the route splits a list of keys, and each of them would need a time of its own.
pub const EVENT_TIME_OF_SEVERAL: CommandError =
    CommandError::fixed("ERR EVENTTIME goes with one key; nothing was written");
/// A tombstone of this key may have been dropped that is newer than the event time.
pub const EVENT_TIME_TOO_OLD: CommandError = CommandError::fixed(
    "TOOOLD the key has no row and the event time is not above those of deletions that are forgotten; nothing was written",
);

pub fn event_time_ahead(ahead_ms: u64, max_clock_skew_ms: u64) -> CommandError {
    format!(
        "ERR the event time is {ahead_ms} ms ahead of the store's clock, max-clock-skew is {max_clock_skew_ms} ms; \
         nothing was written"
    )
    .into()
}

/// What a client sent as Redis quotes it in an error text, by C's `%s`: up to the first NUL. Bytes that are no UTF-8 become U+FFFD.
pub fn printed(word: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(&word[..memchr::memchr(0, word).unwrap_or(word.len())])
}

/// Replaces what would break a line of RESP, as Redis does in error texts.
pub fn single_line(text: &str) -> Cow<'_, str> {
    if text.contains(['\r', '\n']) { Cow::Owned(text.replace(['\r', '\n'], " ")) } else { Cow::Borrowed(text) }
}
