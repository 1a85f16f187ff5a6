//! The commands a shard executes: which function runs each row of the command table, and what must be known before it runs.

mod backup;
pub mod census;
pub mod cursor;
mod dump;
mod event_time;
mod expiry;
mod float;
mod generic;
pub mod glob;
mod keyspace;
mod lcs;
mod random;
mod replication;
mod source;
mod string;
mod transaction;

#[cfg(test)]
mod script;

use crate::shard::context::{Context, Failure};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, Flags};

/// What the executor must know of a command before it runs it, derived from its row once.
struct Plan {
    /// Position of the first key among the arguments; `usize::MAX` = no keys.
    first: usize,
    /// Position of the last key; negative = from the end.
    last: isize,
    step: usize,
    walks: bool,
    /// The arguments may end in an event time.
    has_event_time: bool,
}

/// Words of a command's name, which the table counts as positions before the arguments.
const fn name_words(name: &str) -> usize {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'|' {
            return 2;
        }
        at += 1;
    }
    1
}

const fn plan(name: &str, first: i16, last: i16, step: i16, flags: Flags) -> Plan {
    let words = name_words(name);
    Plan {
        first: if first == 0 { usize::MAX } else { first as usize - words },
        last: if last < 0 { last as isize } else { last as isize - words as isize },
        step: if step < 1 { 1 } else { step as usize },
        walks: flags.contains(Flags::WALKS),
        has_event_time: flags.contains(Flags::EVENT_TIME),
    }
}

macro_rules! dispatch {
    ($($variant:ident $name:literal $arity:literal [$($flag:ident)*] ($first:literal $last:literal $step:literal) $route:ident$(($merge:ident))?
        $module:ident::$function:ident $group:literal $since:literal $summary:literal;)*) => {
        /// Runs one command. One that fails has written neither a row nor any part of a reply.
        pub fn run(command: StoreCommand, context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
            match command {
                $(StoreCommand::$variant => $module::$function(context, args),)*
            }
        }

        /// By [`StoreCommand::code`].
        static PLANS: &[Plan] = &[$(plan($name, $first, $last, $step, Flags::NONE$(.union(Flags::$flag))*)),*];
    };
}

vasto_proto::store_commands!(dispatch);

/// The keys of a command, those of the commands inside a transaction included; malformed arguments end the walk early.
pub fn keys_of(command: StoreCommand, args: Args<'_>) -> Keys<'_> {
    if command == StoreCommand::InternalExec {
        Keys::Transaction(transaction::Keys::new(args))
    } else {
        Keys::Plain(PlainKeys::new(command, args, args.len()))
    }
}

/// Whether the command may run long or read much, so that it belongs in the blocking lane wherever its rows are.
pub fn needs_lane(command: StoreCommand, args: Args<'_>) -> bool {
    if command == StoreCommand::InternalExec {
        return transaction::needs_lane(args);
    }
    let plan = &PLANS[command as usize];
    // LCS fills a table of up to 128 million cells: a third of a second.
    plan.walks
        || command == StoreCommand::Lcs
        || command == StoreCommand::Setrange && string::setrange_is_far(args)
        || command == StoreCommand::Restore && dump::restore_is_far(args)
}

/// Whether the command changes what is seen of every key, so that it must run alone on its shard.
pub fn takes_all_keys(command: StoreCommand, args: Args<'_>) -> bool {
    let flushes = matches!(command, StoreCommand::Flushdb | StoreCommand::Flushall);
    flushes || command == StoreCommand::InternalExec && transaction::takes_all_keys(args)
}

/// Whether the command is about all keys of the shard's slots, without naming them; of a transaction, whether one of its commands is.
pub fn covers_slots(command: StoreCommand, args: Args<'_>) -> bool {
    if command == StoreCommand::InternalExec {
        return transaction::covers_slots(args);
    }
    let covers = matches!(
        command,
        StoreCommand::Dbsize
            | StoreCommand::Keys
            | StoreCommand::Randomkey
            | StoreCommand::Flushdb
            | StoreCommand::Flushall
            | StoreCommand::InternalScan
    );
    // With an argument it counts no keys.
    covers || command == StoreCommand::InternalStats && args.is_empty()
}

/// Whether the command may change rows; of a transaction, whether one of its commands may.
pub fn writes(command: StoreCommand, args: Args<'_>) -> bool {
    if command == StoreCommand::InternalExec {
        return transaction::writes(args);
    }
    command.spec().flags.contains(Flags::WRITE)
}

/// Whether the command writes without having read any row, so that nothing need be fetched for it.
pub fn is_blind(command: StoreCommand, args: Args<'_>) -> bool {
    match command {
        StoreCommand::Set => args.len() == 2 || !string::set_reads(args),
        other => {
            matches!(
                other,
                StoreCommand::Setex
                    | StoreCommand::Psetex
                    | StoreCommand::Mset
                    | StoreCommand::Flushdb
                    | StoreCommand::Flushall
            ) && before_event_time(other, args, args.len()) == args.len()
        }
    }
}

/// How many of the next `count` arguments, which are a command's, stand before an event time at their end; all of them if there is none.
pub fn before_event_time(command: StoreCommand, args: Args<'_>, count: usize) -> usize {
    if !PLANS[command as usize].has_event_time {
        return count;
    }
    let spec = command.spec();
    let words = spec.name_words();
    let word = |place: usize| {
        let mut ahead = args;
        ahead.nth(place - words).unwrap_or_default()
    };
    spec.words_before_event_time(count + words, word) - words
}

/// Walks the keys of one command.
#[derive(Clone, Debug)]
pub enum Keys<'a> {
    Plain(PlainKeys<'a>),
    Transaction(transaction::Keys<'a>),
}

impl<'a> Iterator for Keys<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        match self {
            Self::Plain(keys) => keys.next(),
            Self::Transaction(keys) => keys.next(),
        }
    }
}

/// Walks the keys of one command that is no transaction.
#[derive(Clone, Debug)]
pub struct PlainKeys<'a> {
    args: Args<'a>,
    /// Arguments before the next key.
    skip: usize,
    step: usize,
    left: usize,
}

impl<'a> PlainKeys<'a> {
    /// The command's arguments are the next `count` of `args`.
    #[inline]
    fn new(command: StoreCommand, args: Args<'a>, count: usize) -> Self {
        let plan = &PLANS[command as usize];
        let count = before_event_time(command, args, count);
        let end = if plan.last < 0 {
            (count + 1).saturating_sub(plan.last.unsigned_abs())
        } else {
            (plan.last as usize + 1).min(count)
        };
        let left = end.saturating_sub(plan.first).div_ceil(plan.step);
        Self { args, skip: if left == 0 { 0 } else { plan.first }, step: plan.step, left }
    }
}

impl<'a> Iterator for PlainKeys<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        for _ in 0..self.skip {
            self.args.next();
        }
        self.skip = self.step - 1;
        self.args.next()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_proto::batch::{Arguments, write_bytes};

    fn packed(words: &[&[u8]]) -> Vec<u8> {
        let mut out = Vec::new();
        for word in words {
            write_bytes(&mut out, word);
        }
        out
    }

    fn keys(command: StoreCommand, words: &[&[u8]]) -> Vec<String> {
        let packed = packed(words);
        let args = Args::new(Arguments::parse(&packed, words.len() as u32).unwrap());
        keys_of(command, args).map(|key| String::from_utf8_lossy(key).into_owned()).collect()
    }

    #[test]
    fn keys_are_found_where_the_table_says() {
        assert_eq!(keys(StoreCommand::Get, &[b"a"]), ["a"]);
        assert_eq!(keys(StoreCommand::Set, &[b"a", b"v", b"EX", b"1"]), ["a"]);
        assert_eq!(keys(StoreCommand::Mset, &[b"a", b"1", b"b", b"2"]), ["a", "b"]);
        assert_eq!(keys(StoreCommand::Del, &[b"a", b"b", b"a"]), ["a", "b", "a"]);
        assert_eq!(keys(StoreCommand::Del, &[b"a", b"EventTime", b"5"]), ["a"]);
        assert_eq!(keys(StoreCommand::Del, &[b"a", b"EVENTTIME", b"b"]), ["a", "EVENTTIME", "b"]);
        assert_eq!(keys(StoreCommand::Rename, &[b"a", b"b"]), ["a", "b"]);
        assert_eq!(keys(StoreCommand::Copy, &[b"a", b"b", b"REPLACE"]), ["a", "b"]);
        assert_eq!(keys(StoreCommand::ObjectEncoding, &[b"a"]), ["a"]);
        assert_eq!(keys(StoreCommand::MemoryUsage, &[b"a", b"SAMPLES", b"1"]), ["a"]);
        assert_eq!(keys(StoreCommand::Keys, &[b"*"]), [""; 0]);
        assert_eq!(keys(StoreCommand::Dbsize, &[]), [""; 0]);
        assert_eq!(keys(StoreCommand::InternalWatch, &[b"a", b"b"]), ["a", "b"]);
        assert_eq!(keys(StoreCommand::Get, &[]), [""; 0]);
    }

    #[test]
    fn the_table_and_the_walk_agree_on_every_command() {
        let words: Vec<Vec<u8>> = (0..9).map(|number| format!("k{number}").into_bytes()).collect();
        for command in (0..).map_while(StoreCommand::from_code) {
            if command == StoreCommand::InternalExec {
                continue;
            }
            for count in 0..words.len() {
                let words: Vec<&[u8]> = words[..count].iter().map(Vec::as_slice).collect();
                let spec = command.spec();
                let expected: Vec<String> = spec
                    .key_positions(count + spec.name_words())
                    .filter(|position| *position >= spec.name_words())
                    .map(|position| format!("k{}", position - spec.name_words()))
                    .collect();
                assert_eq!(keys(command, &words), expected, "{} with {count} arguments", spec.name);
            }
        }
    }

    #[test]
    fn a_transaction_yields_watched_keys_and_those_inside() {
        let code = |command: StoreCommand| command.code().to_le_bytes();
        let words: &[&[u8]] = &[
            b"1",
            b"watched",
            b"token",
            &code(StoreCommand::Mset),
            &4u32.to_le_bytes(),
            b"a",
            b"1",
            b"b",
            b"2",
            &code(StoreCommand::Dbsize),
            &0u32.to_le_bytes(),
            &code(StoreCommand::Get),
            &1u32.to_le_bytes(),
            b"c",
        ];
        assert_eq!(keys(StoreCommand::InternalExec, words), ["watched", "a", "b", "c"]);
        let packed = packed(words);
        let args = Args::new(Arguments::parse(&packed, words.len() as u32).unwrap());
        assert!(needs_lane(StoreCommand::InternalExec, args));
        assert_eq!(keys(StoreCommand::InternalExec, &words[..11]), ["watched", "a", "b"]);
        assert_eq!(keys(StoreCommand::InternalExec, &[b"x"]), [""; 0]);
    }

    #[test]
    fn only_writes_that_read_nothing_are_blind() {
        let blind = |words: &[&[u8]]| {
            let packed = packed(words);
            is_blind(StoreCommand::Set, Args::new(Arguments::parse(&packed, words.len() as u32).unwrap()))
        };
        assert!(blind(&[b"k", b"v"]));
        assert!(blind(&[b"k", b"nx"]));
        assert!(blind(&[b"k", b"v", b"PX", b"10"]));
        for word in ["nx", "XX", "Get", "KEEPTTL", "EventTime"] {
            assert!(!blind(&[b"k", b"v", word.as_bytes()]), "{word}");
        }
        for words in [&[b"k".as_slice(), b"1", b"v"][..], &[b"k", b"1", b"v", b"EVENTTIME", b"5"]] {
            let packed = packed(words);
            let args = Args::new(Arguments::parse(&packed, words.len() as u32).unwrap());
            assert_eq!(is_blind(StoreCommand::Setex, args), words.len() == 3);
        }
    }
}
