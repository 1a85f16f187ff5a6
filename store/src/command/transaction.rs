//! Transactions on one shard: what WATCH notes and what EXEC runs, the latter under the locks of all its keys at once.
//!
//! The arguments of `_exec` are the number of watched keys in decimal, a key and its token for each, and then the commands: code (u16 LE),
//! number of arguments (u32 LE), arguments.

use super::{PlainKeys, run};
use crate::shard::context::{Context, Failure};
use vasto_proto::batch::{Arguments, write_bytes};
use vasto_proto::command::table::StoreCommand;
use vasto_proto::command::{Args, Flags};
use vasto_proto::error::{self, CommandError};
use vasto_proto::row::Stamp;

const MALFORMED: CommandError = CommandError::fixed("ERR malformed transaction");

/// Changes whenever what a client sees of a key does: the stamp of its row, and whether that is alive.
type Token = [u8; Stamp::BYTES + 1];

fn token(context: &mut Context<'_>, key: &[u8]) -> Result<Token, Failure> {
    let (stamp, alive) = context.seen_stamp(key)?;
    let mut token = [u8::from(alive); Stamp::BYTES + 1];
    token[..Stamp::BYTES].copy_from_slice(&stamp.to_bytes());
    Ok(token)
}

/// `_watch key…`
pub fn watch(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    context.reply().array(args.len());
    for key in args {
        let token = token(context, key)?;
        context.reply().bulk(&token);
    }
    Ok(())
}

/// Takes the number of watched keys; `None` if there are fewer arguments than that.
fn take_watched_count(args: &mut Args<'_>) -> Option<usize> {
    let count = usize::try_from(args.integer().ok()?).ok()?;
    (count <= args.len() / 2).then_some(count)
}

/// Takes the head of a command: the command and how many arguments follow.
fn take_head(args: &mut Args<'_>) -> Option<(StoreCommand, usize)> {
    let code = u16::from_le_bytes(args.next()?.try_into().ok()?);
    let count = u32::from_le_bytes(args.next()?.try_into().ok()?) as usize;
    (count <= args.len()).then_some((StoreCommand::from_code(code)?, count))
}

/// The commands inside, each with its arguments and all that follows them; ends early if they are malformed or one is a transaction itself.
fn commands(mut args: Args<'_>) -> impl Iterator<Item = (StoreCommand, Args<'_>)> {
    let watched = take_watched_count(&mut args);
    skip(&mut args, watched.map_or(usize::MAX, |watched| 2 * watched));
    std::iter::from_fn(move || {
        let (command, count) = take_head(&mut args)?;
        let own = args;
        skip(&mut args, count);
        (command != StoreCommand::InternalExec).then_some((command, own))
    })
}

fn skip(args: &mut Args<'_>, count: usize) {
    for _ in 0..count {
        if args.next().is_none() {
            return;
        }
    }
}

pub fn needs_lane(args: Args<'_>) -> bool {
    commands(args).any(|(command, args)| super::needs_lane(command, args))
}

pub fn covers_slots(args: Args<'_>) -> bool {
    commands(args).any(|(command, args)| super::covers_slots(command, args))
}

pub fn writes(args: Args<'_>) -> bool {
    commands(args).any(|(command, args)| super::writes(command, args))
}

pub fn takes_all_keys(args: Args<'_>) -> bool {
    commands(args).any(|(command, args)| super::takes_all_keys(command, args))
}

/// Walks the watched keys, then the keys of the commands inside.
#[derive(Clone, Debug)]
pub struct Keys<'a> {
    args: Args<'a>,
    watched: usize,
    inner: Option<PlainKeys<'a>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(mut args: Args<'a>) -> Self {
        let watched = take_watched_count(&mut args).unwrap_or_else(|| {
            skip(&mut args, usize::MAX);
            0
        });
        Self { args, watched, inner: None }
    }
}

impl<'a> Iterator for Keys<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.watched > 0 {
            self.watched -= 1;
            let key = self.args.next();
            self.args.next();
            return key;
        }
        loop {
            if let Some(key) = self.inner.as_mut().and_then(Iterator::next) {
                return Some(key);
            }
            let (command, count) = take_head(&mut self.args)?;
            self.inner = Some(PlainKeys::new(command, self.args, count));
            skip(&mut self.args, count);
        }
    }
}

/// Checks the commands inside before any of them runs, and counts them.
fn check(mut args: Args<'_>) -> Result<usize, CommandError> {
    let mut count = 0;
    while !args.is_empty() {
        let (command, length) = take_head(&mut args).ok_or(MALFORMED)?;
        // Only what clients may queue, and SCAN's page: a transaction inside a transaction would recurse.
        if command.spec().flags.contains(Flags::INTERNAL) && command != StoreCommand::InternalScan {
            return Err(MALFORMED);
        }
        skip(&mut args, length);
        count += 1;
    }
    Ok(count)
}

/// `_exec watched-count (key token)… (command argument-count argument…)…`
pub fn exec(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    let mut rest = args;
    let watched = take_watched_count(&mut rest).ok_or(MALFORMED)?;
    let mut is_stale = false;
    for _ in 0..watched {
        let (key, noted) = (rest.key()?, rest.bytes()?);
        is_stale |= token(context, key)? != *noted;
    }
    let count = check(rest)?;
    if is_stale {
        context.reply().null_array();
        return Ok(());
    }
    // A row that cannot be read fails the whole transaction before it begins, so that no command inside fails half way.
    for key in Keys::new(args) {
        context.seen_stamp(key)?;
    }
    context.reply().array(count);
    let mut packed = Vec::new();
    while let Some((command, length)) = take_head(&mut rest) {
        packed.clear();
        rest.by_ref().take(length).for_each(|argument| write_bytes(&mut packed, argument));
        let arguments = u32::try_from(length).ok().and_then(|length| Arguments::parse(&packed, length).ok());
        let arguments = arguments.expect("they were packed right here");
        let spec = command.spec();
        let word = |place: usize| {
            let mut ahead = arguments;
            ahead.nth(place - spec.name_words()).unwrap_or_default()
        };
        let answer = if spec.accepts(length + spec.name_words(), word) {
            run(command, context, Args::new(arguments))
        } else {
            Err(error::wrong_arity(spec.name).into())
        };
        match answer {
            Ok(()) => {}
            Err(Failure::Error(error)) => context.reply().error(error.text()),
            Err(Failure::Refused(outcome, text)) => return Err(Failure::Refused(outcome, text)),
            Err(Failure::Diverted) => return Err(Failure::Diverted),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::script::{Script, bulks, text, words};
    use super::*;
    use vasto_proto::command::Reply;
    use vasto_proto::command::table::{Command, find};

    /// Runs command lines, separated by `;`, in one transaction.
    fn transact(script: &mut Script, watched: &[(&str, &[u8])], lines: &str) -> String {
        let mut arguments = vec![watched.len().to_string().into_bytes()];
        for (key, token) in watched {
            arguments.extend([key.as_bytes().to_vec(), token.to_vec()]);
        }
        for line in lines.split(';').filter(|line| !line.is_empty()) {
            let words = words(line);
            let Some(Command::Store(command)) = find(&words[0]) else { panic!("{line}") };
            arguments.push(command.code().to_le_bytes().to_vec());
            arguments.push((words.len() as u32 - 1).to_le_bytes().to_vec());
            arguments.extend_from_slice(&words[1..]);
        }
        let arguments: Vec<&[u8]> = arguments.iter().map(Vec::as_slice).collect();
        text(&script.ask(StoreCommand::InternalExec, &arguments))
    }

    fn tokens(script: &mut Script, keys: &[&[u8]]) -> Vec<Vec<u8>> {
        let reply = script.ask(StoreCommand::InternalWatch, keys);
        bulks(&mut reply.as_slice()).into_iter().map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn commands_inside_see_those_before_them_and_fail_alone() {
        let mut script = Script::new();
        for (lines, expected) in [
            ("", "[]"),
            ("SET a 1;INCR a;GET a", r#"[OK, (integer) 2, "2"]"#),
            ("SET a x;INCR a;APPEND a y", "[OK, (error) ERR value is not an integer or out of range, (integer) 2]"),
            ("SET a;GET a", r#"[(error) ERR wrong number of arguments for 'set' command, "xy"]"#),
            (
                "SET b 1;DBSIZE;KEYS *;FLUSHDB;GET a;SET c 1;DBSIZE;KEYS *",
                r#"[OK, (integer) 2, ["b", "a"], OK, (nil), OK, (integer) 1, ["c"]]"#,
            ),
            ("GET b;EXISTS c;MGET a c", r#"[(nil), (integer) 1, [(nil), "1"]]"#),
            ("SET k v;RENAME k c;RANDOMKEY;DEL c c;RANDOMKEY", r#"[OK, OK, "c", (integer) 1, (nil)]"#),
        ] {
            assert_eq!(transact(&mut script, &[], lines), expected, "{lines}");
        }
    }

    #[test]
    fn event_times_decide_inside_a_transaction_too() {
        let mut script = Script::new();
        for (lines, expected) in [
            (
                "SET e 1 EVENTTIME 5;SETEX e 9 2 EVENTTIME 4;GET e;DEL e EVENTTIME 6;SET e 3 EVENTTIME 6",
                "[OK, (nil), \"1\", (integer) 1, (nil)]",
            ),
            (
                "SETEX e 9 v EVENTTIME 7;SETEX e 1 2 3;INCR e",
                "[OK, (error) ERR wrong number of arguments for 'setex' command, (error) ERR value is not an integer or out of range]",
            ),
            (
                "DEL a b EVENTTIME 5;SET e 1 EVENTTIME 8 GET;GET e",
                "[(error) ERR EVENTTIME goes with one key; nothing was written, \"v\", \"1\"]",
            ),
            ("SET e plain;SET e 2 EVENTTIME 9;DEL e EVENTTIME 10;GET e", "[OK, (nil), (integer) 0, \"plain\"]"),
        ] {
            assert_eq!(transact(&mut script, &[], lines), expected, "{lines}");
        }
    }

    #[test]
    fn a_change_of_a_watched_key_stops_the_transaction() {
        for (change, stops) in [
            ("GET w", false),
            ("SET other 1", false),
            ("DEL missing", false),
            ("DEL missing EVENTTIME 5", false),
            ("DEL w EVENTTIME 5", false),
            ("SET w v", true),
            ("APPEND w x", true),
            ("EXPIRE w 100", true),
            ("DEL w", true),
            ("FLUSHDB", true),
            ("SET missing 1", true),
            ("RENAME w missing", true),
        ] {
            let mut script = Script::new();
            script.line("SET w v");
            let tokens = tokens(&mut script, &[b"w", b"missing"]);
            script.line(change);
            let watched = [("w", tokens[0].as_slice()), ("missing", tokens[1].as_slice())];
            let expected = if stops { "(nil array)" } else { "[OK]" };
            assert_eq!(transact(&mut script, &watched, "SET done 1"), expected, "{change}");
            assert_eq!(script.line("EXISTS done"), if stops { "(integer) 0" } else { "(integer) 1" });
        }
    }

    #[test]
    fn a_key_that_expires_stops_the_transaction() {
        let mut script = Script::new();
        script.line("SET w v PX 1");
        let watched = tokens(&mut script, &[b"w"]);
        if watched[0].last() == Some(&1) {
            while script.line("EXISTS w") == "(integer) 1" {}
            assert_eq!(transact(&mut script, &[("w", &watched[0])], "SET w 1"), "(nil array)");
        }
        let watched = tokens(&mut script, &[b"w"]);
        assert_eq!(transact(&mut script, &[("w", &watched[0])], "SET w 1"), "[OK]");
    }

    #[test]
    fn malformed_transactions_run_nothing() {
        let mut script = Script::new();
        let set = StoreCommand::Set.code().to_le_bytes();
        let exec = StoreCommand::InternalExec.code().to_le_bytes();
        let two = 2u32.to_le_bytes();
        let huge = u32::MAX.to_le_bytes();
        let malformed: &[&[&[u8]]] = &[
            &[b"x", b""],
            &[b"-1", b""],
            &[b"9", b""],
            &[b"0", &set, &two, b"k", b"v", b"?"],
            &[b"0", &set, &two, b"k", b"v", &set, &huge, b"k", b"v"],
            &[b"0", &set, &two, b"k", b"v", &[255, 255], &two, b"k", b"v"],
            &[b"0", &set, &two, b"k", b"v", &exec, &two, b"0", b""],
        ];
        for arguments in malformed {
            let reply = script.ask(StoreCommand::InternalExec, arguments);
            assert_eq!(Reply::take(&mut reply.as_slice()), Some(Reply::Error(MALFORMED.text().as_bytes())));
        }
        assert_eq!(script.line("EXISTS k"), "(integer) 0");
    }
}
