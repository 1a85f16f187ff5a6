//! Where an answer of ours may differ from redis-server's, each with the reason: the only such list.

use redis_tests::Value;

/// How two answers to one command are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Byte for byte.
    Exact,
    /// Two integers that are both positive may differ so much.
    Close(i64),
    /// The same elements in any order.
    AnyOrder,
    /// Answers of the same kind; errors byte for byte.
    SameKind,
    /// Not at all.
    Anything,
}

/// Stands in front of a word that may be any of the arguments.
const ANY_ARGUMENT: &str = "...";

pub struct KnownDifference {
    /// The first words of the command, in capitals.
    pub command: &'static [&'static str],
    pub comparison: Comparison,
    pub reason: &'static str,
}

pub const KNOWN_DIFFERENCES: &[KnownDifference] = &[
    KnownDifference {
        command: &["TTL"],
        comparison: Comparison::Close(5),
        reason: "the two servers take a command at two times",
    },
    KnownDifference {
        command: &["PTTL"],
        comparison: Comparison::Close(5_000),
        reason: "the two servers take a command at two times",
    },
    KnownDifference {
        command: &["EXPIRETIME"],
        comparison: Comparison::Close(5),
        reason: "the two servers take a command at two times",
    },
    KnownDifference {
        command: &["PEXPIRETIME"],
        comparison: Comparison::Close(5_000),
        reason: "the two servers take a command at two times",
    },
    KnownDifference {
        command: &["KEYS"],
        comparison: Comparison::AnyOrder,
        reason: "redis promises no order; ours is that of the slots",
    },
    KnownDifference {
        command: &["SCAN", ANY_ARGUMENT, "\0"],
        comparison: Comparison::Anything,
        reason: "redis reads the cursor up to the first NUL: one that begins with it is 0",
    },
    KnownDifference {
        command: &["SCAN"],
        comparison: Comparison::SameKind,
        reason: "cursors are each server's own; whole walks are compared instead",
    },
    KnownDifference {
        command: &["DBSIZE"],
        comparison: Comparison::SameKind,
        reason: "redis counts what has expired until it notices; compared on its own when it has",
    },
    KnownDifference {
        command: &["TIME"],
        comparison: Comparison::SameKind,
        reason: "the two servers take a command at two times",
    },
    KnownDifference { command: &["RANDOMKEY"], comparison: Comparison::SameKind, reason: "random" },
    KnownDifference {
        command: &["HELLO"],
        comparison: Comparison::SameKind,
        reason: "names the connection's id and the server's version",
    },
    KnownDifference {
        command: &["CLIENT", "ID"],
        comparison: Comparison::SameKind,
        reason: "ids are each server's own",
    },
    KnownDifference {
        command: &["OBJECT", "HELP"],
        comparison: Comparison::SameKind,
        reason: "help tells what ours does, not what redis does",
    },
    KnownDifference {
        command: &["OBJECT", "ENCODING"],
        comparison: Comparison::SameKind,
        reason: "redis remembers how a value came about (APPEND leaves raw), ours knows the value alone",
    },
    KnownDifference {
        command: &["OBJECT", "REFCOUNT"],
        comparison: Comparison::SameKind,
        reason: "redis shares small integers between keys and answers 2147483647 for them",
    },
    KnownDifference {
        command: &["OBJECT", "IDLETIME"],
        comparison: Comparison::SameKind,
        reason: "ours does not keep the time of the last read",
    },
    KnownDifference {
        command: &["CONFIG", "GET", ANY_ARGUMENT, "*"],
        comparison: Comparison::SameKind,
        reason: "each server has options of its own",
    },
    KnownDifference {
        command: &["COMMAND", "LIST", ANY_ARGUMENT, "*"],
        comparison: Comparison::SameKind,
        reason: "ours does not have all commands of redis, and has some of its own",
    },
    KnownDifference {
        command: &["SLOWLOG", "GET"],
        comparison: Comparison::SameKind,
        reason: "what is slow is a matter of the machine",
    },
    KnownDifference {
        command: &["MEMORY", "USAGE"],
        comparison: Comparison::Anything,
        reason: "bytes on disk are not bytes of jemalloc, and redis measures what has expired as long as it is there",
    },
];

/// How the answers to this command are compared.
pub fn comparison(command: &[Vec<u8>]) -> Comparison {
    let words: Vec<String> = command.iter().map(|word| String::from_utf8_lossy(word).to_ascii_uppercase()).collect();
    KNOWN_DIFFERENCES
        .iter()
        .find(|known| match known.command {
            [first @ .., ANY_ARGUMENT, anywhere] => {
                begins_with(&words, first) && words[first.len()..].iter().any(|word| word == anywhere)
            }
            first => begins_with(&words, first),
        })
        .map_or(Comparison::Exact, |known| known.comparison)
}

fn begins_with(words: &[String], first: &[&str]) -> bool {
    first.len() <= words.len() && first.iter().zip(words).all(|(first, word)| first == word)
}

/// Whether the two answers are as alike as this comparison asks for.
pub fn alike(comparison: Comparison, theirs: &Value, ours: &Value) -> bool {
    if theirs == ours || comparison == Comparison::Anything {
        return true;
    }
    if theirs.is_error() && ours.is_error() {
        // In every command: bytes that are no UTF-8 come back as U+FFFD in our error texts, which are text; redis repeats them.
        return theirs.text() == ours.text();
    }
    if theirs.is_error() || ours.is_error() {
        return false;
    }
    match comparison {
        Comparison::Exact => false,
        Comparison::Close(tolerance) => match (theirs, ours) {
            (Value::Integer(theirs), Value::Integer(ours)) => {
                *theirs > 0 && *ours > 0 && theirs.abs_diff(*ours) <= tolerance.unsigned_abs()
            }
            _ => false,
        },
        Comparison::AnyOrder => match (theirs, ours) {
            (Value::Array(theirs), Value::Array(ours)) => sorted(theirs) == sorted(ours),
            _ => false,
        },
        Comparison::Anything => true,
        Comparison::SameKind => std::mem::discriminant(theirs) == std::mem::discriminant(ours),
    }
}

fn sorted(values: &[Value]) -> Vec<Vec<u8>> {
    let mut texts: Vec<Vec<u8>> = values.iter().map(|value| value.bytes().unwrap_or_default().to_vec()).collect();
    texts.sort();
    texts
}

#[test]
fn every_known_difference_has_a_reason() {
    for known in KNOWN_DIFFERENCES {
        assert!(!known.reason.is_empty(), "{:?}", known.command);
    }
}
