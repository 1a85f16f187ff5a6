//! Commands on strings.

use super::event_time;
use super::float::LongDouble;
use crate::shard::context::{Context, Failure, Put, Verdict};
use vasto_proto::command::Args;
use vasto_proto::command::args::parse_integer;
use vasto_proto::error::{self, CommandError};

/// An option of SET or GETEX that gives an expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clock {
    Seconds,
    Milliseconds,
    UnixSeconds,
    UnixMilliseconds,
}

const CLOCKS: [(&str, Clock); 4] = [
    ("EX", Clock::Seconds),
    ("PX", Clock::Milliseconds),
    ("EXAT", Clock::UnixSeconds),
    ("PXAT", Clock::UnixMilliseconds),
];

/// What becomes of the expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lifetime<'a> {
    /// Nothing was said.
    Default,
    Keep,
    Persist,
    Given(Clock, &'a [u8]),
}

impl<'a> Lifetime<'a> {
    /// Takes an expiry option with its value; the same one may come again, two different ones are a syntax error later.
    fn option(self, args: &mut Args<'a>) -> Option<Self> {
        if args.len() < 2 {
            return None;
        }
        for (word, clock) in CLOCKS {
            let fits = match self {
                Self::Default => true,
                Self::Given(given, _) => given == clock,
                Self::Keep | Self::Persist => false,
            };
            if fits && args.option(word) {
                return args.next().map(|text| Self::Given(clock, text));
            }
        }
        None
    }
}

/// The absolute expiry in milliseconds of an option's value, checked as Redis checks it for the command `name`.
fn expires_at_ms(name: &str, clock: Clock, text: &[u8], now_ms: u64) -> Result<u64, CommandError> {
    let value = parse_integer(text).ok_or(error::NOT_AN_INTEGER)?;
    let milliseconds = match clock {
        Clock::Seconds | Clock::UnixSeconds => value.checked_mul(1000),
        Clock::Milliseconds | Clock::UnixMilliseconds => Some(value),
    };
    let absolute = milliseconds.filter(|value| *value > 0).and_then(|milliseconds| match clock {
        Clock::Seconds | Clock::Milliseconds => milliseconds.checked_add_unsigned(now_ms),
        Clock::UnixSeconds | Clock::UnixMilliseconds => Some(milliseconds),
    });
    absolute.and_then(|absolute| u64::try_from(absolute).ok()).ok_or_else(|| error::invalid_expire_time(name))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    None,
    Missing,
    Existing,
}

struct SetOptions<'a> {
    condition: Condition,
    answers_old: bool,
    lifetime: Lifetime<'a>,
    event_time: Option<&'a [u8]>,
}

impl<'a> SetOptions<'a> {
    fn parse(mut args: Args<'a>) -> Result<Self, CommandError> {
        let (condition, lifetime) = (Condition::None, Lifetime::Default);
        let mut options = Self { condition, answers_old: false, lifetime, event_time: None };
        while !args.is_empty() {
            if options.condition != Condition::Existing && args.option("NX") {
                options.condition = Condition::Missing;
            } else if options.condition != Condition::Missing && args.option("XX") {
                options.condition = Condition::Existing;
            } else if args.option("GET") {
                options.answers_old = true;
            } else if matches!(options.lifetime, Lifetime::Default | Lifetime::Keep) && args.option("KEEPTTL") {
                options.lifetime = Lifetime::Keep;
            } else if options.event_time.is_none() && args.len() > 1 && args.option(event_time::OPTION) {
                options.event_time = Some(args.bytes()?);
            } else {
                options.lifetime = options.lifetime.option(&mut args).ok_or(error::SYNTAX)?;
            }
        }
        Ok(options)
    }
}

/// Whether SET with these arguments may need the row there is.
pub fn set_reads(args: Args<'_>) -> bool {
    let words = ["NX", "XX", "GET", "KEEPTTL", event_time::OPTION];
    args.skip(2).any(|argument| words.iter().any(|word| argument.eq_ignore_ascii_case(word.as_bytes())))
}

fn put(context: &mut Context<'_>, key: &[u8], value: &[u8], expires_at_ms: u64) -> Result<(), Failure> {
    context.put_string(key, Put { value, expires_at_ms, changed_in_place: false })
}

/// GET key
pub fn get(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    context.reply_value(args.key()?)
}

/// SET key value [NX | XX] [GET] [EX seconds | PX milliseconds | EXAT unix-seconds | PXAT unix-milliseconds | KEEPTTL] [EVENTTIME unix-ns]
pub fn set(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, value) = (args.key()?, args.bytes()?);
    if args.is_empty() {
        put(context, key, value, 0)?;
        context.reply().ok();
        return Ok(());
    }
    let options = SetOptions::parse(args)?;
    let mut expiry = match options.lifetime {
        Lifetime::Given(clock, text) => expires_at_ms("set", clock, text, context.now_ms())?,
        Lifetime::Default | Lifetime::Keep | Lifetime::Persist => 0,
    };
    let time = options.event_time.map(|text| event_time::read(context, text)).transpose()?;
    let reads = options.condition != Condition::None || options.lifetime == Lifetime::Keep;
    let applies = if reads {
        let old = context.peek(key)?;
        if let (Lifetime::Keep, Some((header, _))) = (options.lifetime, &old) {
            expiry = header.expires_at_ms;
        }
        match options.condition {
            Condition::None => true,
            Condition::Missing => old.is_none(),
            Condition::Existing => old.is_some(),
        }
    } else {
        true
    };
    // A write with an event time may fail, so the reply comes after it, and the old value is copied to outlive it.
    let old = match (options.answers_old, time) {
        (true, Some(_)) => context.row(key)?,
        (true, None) => {
            context.reply_value(key)?;
            None
        }
        (false, _) => None,
    };
    let put = Put { value, expires_at_ms: expiry, changed_in_place: false };
    let verdict = if applies { context.put_string_at(key, put, time)? } else { Verdict::Older };
    match (options.answers_old, time, old) {
        (true, None, _) => {}
        (true, Some(_), Some(old)) => context.reply().bulk(&old.value),
        (true, Some(_), None) => context.reply().null(),
        (false, _, _) if verdict.holds() => context.reply().ok(),
        (false, _, _) => context.reply().null(),
    }
    Ok(())
}

/// SETNX key value
pub fn setnx(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, value) = (args.key()?, args.bytes()?);
    let missing = context.peek(key)?.is_none();
    if missing {
        put(context, key, value, 0)?;
    }
    context.reply().integer(i64::from(missing));
    Ok(())
}

fn set_expiring(context: &mut Context<'_>, mut args: Args<'_>, name: &str, clock: Clock) -> Result<(), Failure> {
    let (key, time, value) = (args.key()?, args.bytes()?, args.bytes()?);
    let expires_at_ms = expires_at_ms(name, clock, time, context.now_ms())?;
    let time = event_time::take_last(context, &mut args)?;
    let verdict = context.put_string_at(key, Put { value, expires_at_ms, changed_in_place: false }, time)?;
    if verdict.holds() {
        context.reply().ok();
    } else {
        context.reply().null();
    }
    Ok(())
}

/// SETEX key seconds value [EVENTTIME unix-ns]
pub fn setex(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    set_expiring(context, args, "setex", Clock::Seconds)
}

/// PSETEX key milliseconds value [EVENTTIME unix-ns]
pub fn psetex(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    set_expiring(context, args, "psetex", Clock::Milliseconds)
}

/// GETSET key value
pub fn getset(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, value) = (args.key()?, args.bytes()?);
    context.reply_value(key)?;
    put(context, key, value, 0)
}

/// GETDEL key
pub fn getdel(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let key = args.key()?;
    let exists = context.peek(key)?.is_some();
    context.reply_value(key)?;
    if exists { context.delete(key) } else { Ok(()) }
}

/// GETEX key [EX seconds | PX milliseconds | EXAT unix-seconds | PXAT unix-milliseconds | PERSIST]
pub fn getex(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let key = args.key()?;
    let mut lifetime = Lifetime::Default;
    while !args.is_empty() {
        lifetime = if matches!(lifetime, Lifetime::Default | Lifetime::Persist) && args.option("PERSIST") {
            Lifetime::Persist
        } else {
            lifetime.option(&mut args).ok_or(error::SYNTAX)?
        };
    }
    if lifetime == Lifetime::Default {
        return context.reply_value(key);
    }
    let Some(row) = context.row(key)? else {
        context.reply().null();
        return Ok(());
    };
    let now_ms = context.now_ms();
    let expiry = match lifetime {
        Lifetime::Given(clock, text) => expires_at_ms("getex", clock, text, now_ms)?,
        Lifetime::Default | Lifetime::Keep | Lifetime::Persist => 0,
    };
    context.reply().bulk(&row.value);
    if expiry != 0 && expiry <= now_ms {
        context.delete(key)
    } else if expiry != row.header.expires_at_ms {
        let put = Put { value: &row.value, expires_at_ms: expiry, changed_in_place: row.header.changed_in_place };
        context.put_string(key, put)
    } else {
        Ok(())
    }
}

/// MGET key…
pub fn mget(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    context.reply().array(args.len());
    for key in args {
        context.reply_value(key)?;
    }
    Ok(())
}

fn check_pairs(args: Args<'_>, name: &str) -> Result<(), CommandError> {
    if args.is_empty() || args.len() % 2 == 1 { Err(error::wrong_arity(name)) } else { Ok(()) }
}

fn put_pairs(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    while !args.is_empty() {
        let (key, value) = (args.key()?, args.bytes()?);
        put(context, key, value, 0)?;
    }
    Ok(())
}

/// MSET (key value)…
pub fn mset(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    check_pairs(args, "mset")?;
    put_pairs(context, args)?;
    context.reply().ok();
    Ok(())
}

/// MSETNX (key value)…
pub fn msetnx(context: &mut Context<'_>, args: Args<'_>) -> Result<(), Failure> {
    check_pairs(args, "msetnx")?;
    let mut pairs = args;
    while !pairs.is_empty() {
        let (key, _) = (pairs.key()?, pairs.bytes()?);
        if context.peek(key)?.is_some() {
            context.reply().integer(0);
            return Ok(());
        }
    }
    put_pairs(context, args)?;
    context.reply().integer(1);
    Ok(())
}

/// Refuses a string above `proto-max-bulk-len`.
fn check_length(context: &Context<'_>, head: usize, tail: usize) -> Result<(), Failure> {
    match head.checked_add(tail) {
        Some(total) if total <= context.limits().proto_max_bulk_len => context.admit_value(total),
        Some(_) | None => Err(error::STRING_TOO_LONG.into()),
    }
}

fn reply_length(context: &mut Context<'_>, length: usize) {
    context.reply().integer(i64::try_from(length).expect("a value is shorter than 2^63 bytes"));
}

/// APPEND key value
pub fn append(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, tail) = (args.key()?, args.bytes()?);
    let old = context.peek(key)?.map(|(header, value)| (header.expires_at_ms, value.len()));
    let Some((expires_at_ms, old_length)) = old else {
        put(context, key, tail, 0)?;
        reply_length(context, tail.len());
        return Ok(());
    };
    check_length(context, old_length, tail.len())?;
    let mut value = Vec::with_capacity(old_length + tail.len());
    if let Some((_, head)) = context.peek(key)? {
        value.extend_from_slice(head);
    }
    value.extend_from_slice(tail);
    context.put_string(key, Put { value: &value, expires_at_ms, changed_in_place: true })?;
    reply_length(context, value.len());
    Ok(())
}

/// STRLEN key
pub fn strlen(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let length = context.peek(args.key()?)?.map_or(0, |(_, value)| value.len());
    reply_length(context, length);
    Ok(())
}

/// The bytes that GETRANGE returns of a value of this length; negative positions count from the end.
fn range(length: usize, start: i64, end: i64) -> std::ops::Range<usize> {
    if start < 0 && end < 0 && start > end {
        return 0..0;
    }
    let length = i64::try_from(length).expect("a value is shorter than 2^63 bytes");
    let from_front = |position: i64| if position < 0 { (length + position).max(0) } else { position };
    let (start, end) = (from_front(start), from_front(end).min(length - 1));
    if start > end || length == 0 { 0..0 } else { start as usize..end as usize + 1 }
}

/// GETRANGE key start end
pub fn getrange(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, start, end) = (args.key()?, args.integer()?, args.integer()?);
    // A part of a row is copied: the reply and the row have one owner.
    let part = context.peek(key)?.map(|(_, value)| value[range(value.len(), start, end)].to_vec());
    context.reply().bulk(&part.unwrap_or_default());
    Ok(())
}

/// A SETRANGE that starts behind this writes a long value, whatever is there.
const FAR_OFFSET: i64 = 256 << 10;

/// Whether SETRANGE with these arguments makes a value that is too long for a worker to write in passing.
pub fn setrange_is_far(mut args: Args<'_>) -> bool {
    args.next();
    args.integer().is_ok_and(|offset| offset > FAR_OFFSET)
}

/// SETRANGE key offset value
pub fn setrange(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, offset, part) = (args.key()?, args.integer()?, args.bytes()?);
    let offset = usize::try_from(offset).map_err(|_| error::OFFSET_OUT_OF_RANGE)?;
    let (expires_at_ms, old_length) =
        context.peek(key)?.map_or((0, 0), |(header, value)| (header.expires_at_ms, value.len()));
    if part.is_empty() {
        reply_length(context, old_length);
        return Ok(());
    }
    check_length(context, offset, part.len())?;
    let end = offset + part.len();
    let mut value = Vec::with_capacity(old_length.max(end));
    if let Some((_, old)) = context.peek(key)? {
        value.extend_from_slice(old);
    }
    if value.len() < end {
        value.resize(end, 0);
    }
    value[offset..end].copy_from_slice(part);
    context.put_string(key, Put { value: &value, expires_at_ms, changed_in_place: true })?;
    reply_length(context, value.len());
    Ok(())
}

fn add_integer(context: &mut Context<'_>, key: &[u8], increment: i64) -> Result<(), Failure> {
    let (expires_at_ms, old) = match context.peek(key)? {
        Some((header, value)) => (header.expires_at_ms, parse_integer(value).ok_or(error::NOT_AN_INTEGER)?),
        None => (0, 0),
    };
    let sum = old.checked_add(increment).ok_or(error::INCREMENT_OVERFLOW)?;
    put(context, key, itoa::Buffer::new().format(sum).as_bytes(), expires_at_ms)?;
    context.reply().integer(sum);
    Ok(())
}

/// INCR key
pub fn incr(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    add_integer(context, args.key()?, 1)
}

/// DECR key
pub fn decr(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    add_integer(context, args.key()?, -1)
}

/// INCRBY key increment
pub fn incrby(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, increment) = (args.key()?, args.integer()?);
    add_integer(context, key, increment)
}

/// DECRBY key decrement
pub fn decrby(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, decrement) = (args.key()?, args.integer()?);
    add_integer(context, key, decrement.checked_neg().ok_or(error::DECREMENT_OVERFLOW)?)
}

/// INCRBYFLOAT key increment
pub fn incrbyfloat(context: &mut Context<'_>, mut args: Args<'_>) -> Result<(), Failure> {
    let (key, increment) = (args.key()?, args.bytes()?);
    let (expires_at_ms, old) = match context.peek(key)? {
        Some((header, value)) => (header.expires_at_ms, LongDouble::parse(value).ok_or(error::NOT_A_FLOAT)?),
        None => (0, LongDouble::zero()),
    };
    let increment = LongDouble::parse(increment).ok_or(error::NOT_A_FLOAT)?;
    let sum = old.add(increment).ok_or(error::NAN_OR_INFINITY)?.to_text();
    put(context, key, sum.as_bytes(), expires_at_ms)?;
    context.reply().bulk(sum.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_redis() {
        for (length, start, end, expected) in [
            (5, 0, -1, 0..5),
            (5, 1, 3, 1..4),
            (5, -3, -1, 2..5),
            (5, -100, 1, 0..2),
            (5, 3, 100, 3..5),
            (5, 3, 2, 0..0),
            (5, 5, 9, 0..0),
            (5, -1, -2, 0..0),
            (5, -100, -100, 0..1),
            (5, i64::MIN, i64::MAX, 0..5),
            (0, 0, 0, 0..0),
            (0, -1, -1, 0..0),
        ] {
            assert_eq!(range(length, start, end), expected, "{length} {start} {end}");
        }
    }

    #[test]
    fn expiries_are_checked_for_overflow() {
        let invalid = || Err(error::invalid_expire_time("set"));
        for (clock, text, expected) in [
            (Clock::Seconds, "10", Ok(11_000)),
            (Clock::Milliseconds, "10", Ok(1010)),
            (Clock::UnixSeconds, "10", Ok(10_000)),
            (Clock::UnixMilliseconds, "10", Ok(10)),
            (Clock::Seconds, "0", invalid()),
            (Clock::Seconds, "-1", invalid()),
            (Clock::Seconds, "9223372036854776", invalid()),
            (Clock::Seconds, "9223372036854775", invalid()),
            (Clock::UnixSeconds, "9223372036854775", Ok(9_223_372_036_854_775_000)),
            (Clock::Milliseconds, "9223372036854775807", invalid()),
            (Clock::UnixMilliseconds, "9223372036854775807", Ok(i64::MAX as u64)),
            (Clock::Seconds, "x", Err(error::NOT_AN_INTEGER)),
        ] {
            assert_eq!(expires_at_ms("set", clock, text.as_bytes(), 1000), expected, "{clock:?} {text}");
        }
    }
}
